package httpapi_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/contextpack"
	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/coordinator/httpapi"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const published = "sha256:4355a46b19d348dc2f57c046f8ef63d4538ebb936000f3c9ee954a27460dd865"

// services answer as they are asked, and remember what that was.
type services struct {
	archfarmv1.UnimplementedJobServiceServer
	archfarmv1.UnimplementedTagServiceServer
	archfarmv1.UnimplementedSecretServiceServer

	mu   sync.Mutex
	last proto.Message
	sent *archfarmv1.SubmitRequest
	md   metadata.MD

	events chan *archfarmv1.JobEvent
	chunks map[string][]byte
}

func (s *services) note(ctx context.Context, m proto.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = m
	s.md, _ = metadata.FromIncomingContext(ctx)
}

func (s *services) Submit(ctx context.Context, r *archfarmv1.SubmitRequest) (*archfarmv1.SubmitResponse, error) {
	s.note(ctx, r)
	s.sent = r
	if len(r.GetSpec().GetPlatforms()) == 0 {
		faulty, err := status.New(codes.InvalidArgument, "the job has 1 fault").WithDetails(
			&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "spec.platforms", Description: "name at least one"}}})
		if err != nil {
			return nil, err
		}
		return nil, faulty.Err()
	}
	return &archfarmv1.SubmitResponse{Job: &archfarmv1.Job{Id: "j1", State: archfarmv1.Job_STATE_QUEUED, LastSeq: 1}}, nil
}

func (s *services) Get(ctx context.Context, r *archfarmv1.GetRequest) (*archfarmv1.GetResponse, error) {
	s.note(ctx, r)
	if code, ok := map[string]codes.Code{"missing": codes.NotFound, "denied": codes.PermissionDenied, "away": codes.Unavailable, "full": codes.ResourceExhausted, "twice": codes.AlreadyExists, "early": codes.FailedPrecondition}[r.GetId()]; ok {
		return nil, status.Error(code, "no "+r.GetId())
	}
	return &archfarmv1.GetResponse{Job: &archfarmv1.Job{Id: r.GetId(), State: archfarmv1.Job_STATE_SUCCEEDED, Digest: published}}, nil
}

func (s *services) List(ctx context.Context, r *archfarmv1.ListRequest) (*archfarmv1.ListResponse, error) {
	s.note(ctx, r)
	return &archfarmv1.ListResponse{}, nil
}

func (s *services) Cancel(ctx context.Context, r *archfarmv1.CancelRequest) (*archfarmv1.CancelResponse, error) {
	s.note(ctx, r)
	return &archfarmv1.CancelResponse{}, nil
}

func (s *services) Retry(ctx context.Context, r *archfarmv1.RetryRequest) (*archfarmv1.RetryResponse, error) {
	s.note(ctx, r)
	return &archfarmv1.RetryResponse{}, nil
}

func (s *services) Watch(r *archfarmv1.WatchRequest, stream grpc.ServerStreamingServer[archfarmv1.WatchResponse]) error {
	s.note(stream.Context(), r)
	if r.GetId() == "missing" {
		return status.Error(codes.NotFound, "no missing")
	}
	for {
		select {
		case e, ok := <-s.events:
			switch {
			case !ok:
				return nil
			case e == nil:
				return status.Error(codes.Unavailable, "stopping")
			}
			if err := stream.Send(&archfarmv1.WatchResponse{Event: e}); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (s *services) FindMissing(ctx context.Context, r *archfarmv1.FindMissingRequest) (*archfarmv1.FindMissingResponse, error) {
	s.note(ctx, r)
	if identity.FromContext(ctx).Name == "stranger" {
		return nil, status.Error(codes.PermissionDenied, "not for strangers")
	}
	return &archfarmv1.FindMissingResponse{Digests: r.GetDigests()}, nil
}

func (s *services) UploadContext(stream grpc.ClientStreamingServer[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse]) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		if whole := r.GetWhole(); whole != nil {
			return stream.SendAndClose(&archfarmv1.UploadContextResponse{Digest: contextpack.Digest(whole)})
		}
		s.mu.Lock()
		s.chunks[digest.FromBytes(r.GetChunk()).String()] = r.GetChunk()
		s.mu.Unlock()
	}
}

func (s *services) ListTags(ctx context.Context, r *archfarmv1.ListTagsRequest) (*archfarmv1.ListTagsResponse, error) {
	s.note(ctx, r)
	return &archfarmv1.ListTagsResponse{}, nil
}

func (s *services) PutSecret(ctx context.Context, r *archfarmv1.PutSecretRequest) (*archfarmv1.PutSecretResponse, error) {
	s.note(ctx, r)
	return &archfarmv1.PutSecretResponse{}, nil
}

func (s *services) ListSecrets(ctx context.Context, r *archfarmv1.ListSecretsRequest) (*archfarmv1.ListSecretsResponse, error) {
	s.note(ctx, r)
	return &archfarmv1.ListSecretsResponse{}, nil
}

func (s *services) DeleteSecret(ctx context.Context, r *archfarmv1.DeleteSecretRequest) (*archfarmv1.DeleteSecretResponse, error) {
	s.note(ctx, r)
	return &archfarmv1.DeleteSecretResponse{}, nil
}

// rig is the API over HTTP on loopback, and the services behind it over the
// coordinator's connection to itself.
type rig struct {
	*services
	url     string
	client  *http.Client
	metrics *prometheus.Registry
}

func serve(t *testing.T, o httpapi.Options) *rig {
	t.Helper()
	s := &services{events: make(chan *archfarmv1.JobEvent), chunks: map[string][]byte{}}
	inside := access.NewInside()
	server := grpc.NewServer(grpc.MaxRecvMsgSize(16 << 20))
	archfarmv1.RegisterJobServiceServer(server, s)
	archfarmv1.RegisterTagServiceServer(server, s)
	archfarmv1.RegisterSecretServiceServer(server, s)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(inside) })
	t.Cleanup(serving.Wait)
	t.Cleanup(server.Stop)
	conn, err := inside.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	r := &rig{services: s, metrics: prometheus.NewRegistry()}
	o.Metrics = r.metrics
	handler, err := httpapi.New(t.Context(), conn, o)
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		handler.ServeHTTP(w, q.WithContext(identity.NewContext(q.Context(), identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "acme"})))
	}))
	t.Cleanup(web.Close)
	r.url, r.client = web.URL, web.Client()
	return r
}

// do makes a request whose body is JSON unless the headers, in pairs, say otherwise.
func (r *rig) do(t *testing.T, method, path, body string, headers ...string) (int, http.Header, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, r.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
		}
		req.Header.Set(headers[i], headers[i+1])
	}
	response, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, response.Header, string(answer)
}

func TestAPI_EachRouteIsItsMethod(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{})
	for _, test := range []struct {
		method, path, body string
		want               proto.Message
		answer             string
	}{
		{http.MethodPost, "/v1/jobs", `{"requestId":"r","spec":{"platforms":["linux/arm64"],"build_args":{"A":"1"}},"secrets":{"npm":"czNjcmV0"}}`,
			&archfarmv1.SubmitRequest{RequestId: "r", Spec: &archfarmv1.JobSpec{Platforms: []string{"linux/arm64"}, BuildArgs: map[string]string{"A": "1"}}, Secrets: map[string][]byte{"npm": []byte("s3cret")}},
			`"state":"STATE_QUEUED"`},
		{http.MethodGet, "/v1/jobs/j1", "", &archfarmv1.GetRequest{Id: "j1"}, `"id":"j1"`},
		{http.MethodGet, "/v1/jobs", "", &archfarmv1.ListRequest{}, `"jobs":[]`},
		{http.MethodGet, "/v1/jobs?states=STATE_QUEUED&states=STATE_RUNNING&repository=r.example/app&page_size=5&since=2026-01-02T03:04:05Z", "",
			&archfarmv1.ListRequest{States: []archfarmv1.Job_State{archfarmv1.Job_STATE_QUEUED, archfarmv1.Job_STATE_RUNNING}, Repository: "r.example/app", PageSize: 5,
				Since: &timestamppb.Timestamp{Seconds: 1767323045}}, `"nextPageToken":""`},
		{http.MethodPost, "/v1/jobs/j1:cancel", "", &archfarmv1.CancelRequest{Id: "j1"}, `{}`},
		{http.MethodPost, "/v1/jobs/j1:retry", `{"platforms":["linux/amd64"]}`, &archfarmv1.RetryRequest{Id: "j1", Platforms: []string{"linux/amd64"}}, `{}`},
		{http.MethodPost, "/v1/contexts:missing", `{"digests":["sha256:x"]}`, &archfarmv1.FindMissingRequest{Digests: []string{"sha256:x"}}, `"sha256:x"`},
		{http.MethodGet, "/v1/tags?repository=r.example/app&tag=1.0", "", &archfarmv1.ListTagsRequest{Repository: "r.example/app", Tag: "1.0"}, `"bindings":[]`},
		{http.MethodGet, "/v1/secrets", "", &archfarmv1.ListSecretsRequest{}, `"secrets":[]`},
		{http.MethodPut, "/v1/secrets/npm", `{"value":"czNjcmV0"}`, &archfarmv1.PutSecretRequest{Name: "npm", Value: []byte("s3cret")}, `{}`},
		{http.MethodDelete, "/v1/secrets/npm", "", &archfarmv1.DeleteSecretRequest{Name: "npm"}, `{}`},
	} {
		code, headers, answer := r.do(t, test.method, test.path, test.body)
		if code != http.StatusOK || headers.Get("Content-Type") != "application/json" || !strings.Contains(strings.ReplaceAll(answer, `": `, `":`), test.answer) {
			t.Errorf("%s %s: %d %v %s", test.method, test.path, code, headers, answer)
		}
		if !proto.Equal(r.last, test.want) {
			t.Errorf("%s %s: called with %v, want %v", test.method, test.path, r.last, test.want)
		}
	}
	scrape := httptest.NewRecorder()
	promhttp.HandlerFor(r.metrics, promhttp.HandlerOpts{}).ServeHTTP(scrape, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	for _, line := range []string{
		`archfarm_http_requests_total{code="200",method="DELETE",route="/v1/secrets/{name}"} 1`,
		`archfarm_http_requests_total{code="200",method="GET",route="/v1/jobs"} 2`,
		`archfarm_http_requests_total{code="200",method="GET",route="/v1/jobs/{id}"} 1`,
		`archfarm_http_requests_total{code="200",method="GET",route="/v1/secrets"} 1`,
		`archfarm_http_requests_total{code="200",method="GET",route="/v1/tags"} 1`,
		`archfarm_http_requests_total{code="200",method="POST",route="/v1/contexts:missing"} 1`,
		`archfarm_http_requests_total{code="200",method="POST",route="/v1/jobs"} 1`,
		`archfarm_http_requests_total{code="200",method="POST",route="/v1/jobs/{id}:cancel"} 1`,
		`archfarm_http_requests_total{code="200",method="POST",route="/v1/jobs/{id}:retry"} 1`,
		`archfarm_http_requests_total{code="200",method="PUT",route="/v1/secrets/{name}"} 1`,
	} {
		if !strings.Contains(scrape.Body.String(), line+"\n") {
			t.Errorf("no %s in %s", line, scrape.Body)
		}
	}
}

func TestAPI_CallsAreOnBehalfOfTheCallerWhateverHeadersSay(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{})
	code, _, answer := r.do(t, http.MethodGet, "/v1/jobs/j1", "", "Grpc-Metadata-Archfarm-Identity", `{"Kind":"admin"}`, "Archfarm-Identity", `{"Kind":"admin"}`, "Grpc-Metadata-X", "y")
	if code != http.StatusOK {
		t.Fatalf("%d %s", code, answer)
	}
	if got := r.md.Get("archfarm-identity"); len(got) != 1 || !strings.Contains(got[0], `"ci"`) {
		t.Errorf("called on behalf of %v", got)
	}
	if len(r.md.Get("x")) > 0 {
		t.Errorf("metadata %v", r.md)
	}
}

func TestAPI_ErrorsAreAStatus(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{})
	long := strings.Repeat("x", 9<<20)
	for name, test := range map[string]struct {
		method, path, body string
		headers            []string
		code               int
		says               string
	}{
		"faults of a job":      {http.MethodPost, "/v1/jobs", `{"spec":{}}`, nil, http.StatusBadRequest, `"spec.platforms"`},
		"malformed":            {http.MethodPost, "/v1/jobs", `{"spec":`, nil, http.StatusBadRequest, "unexpected"},
		"a misspelt field":     {http.MethodPost, "/v1/jobs", `{"spec":{"platform":"linux/arm64"}}`, nil, http.StatusBadRequest, `platform`},
		"a misspelt parameter": {http.MethodGet, "/v1/jobs?state=STATE_QUEUED", "", nil, http.StatusBadRequest, "states"},
		"a stray parameter":    {http.MethodGet, "/v1/jobs/j1?x=y", "", nil, http.StatusBadRequest, "takes none"},
		"a malformed query":    {http.MethodGet, "/v1/jobs?%zz=1", "", nil, http.StatusBadRequest, "escape"},
		"an unknown state":     {http.MethodGet, "/v1/jobs?states=STATE_LOST", "", nil, http.StatusBadRequest, "STATE_LOST"},
		"after nothing":        {http.MethodGet, "/v1/jobs/j1/events?after_seq=-1", "", nil, http.StatusBadRequest, "after_seq"},
		"events of none":       {http.MethodGet, "/v1/jobs/missing/events", "", nil, http.StatusNotFound, "no missing"},
		"none":                 {http.MethodGet, "/v1/jobs/missing", "", nil, http.StatusNotFound, "no missing"},
		"denied":               {http.MethodGet, "/v1/jobs/denied", "", nil, http.StatusForbidden, "no denied"},
		"away":                 {http.MethodGet, "/v1/jobs/away", "", nil, http.StatusServiceUnavailable, "no away"},
		"full":                 {http.MethodGet, "/v1/jobs/full", "", nil, http.StatusTooManyRequests, "no full"},
		"twice":                {http.MethodGet, "/v1/jobs/twice", "", nil, http.StatusConflict, "no twice"},
		"early":                {http.MethodGet, "/v1/jobs/early", "", nil, http.StatusBadRequest, "no early"},
		"no such path":         {http.MethodGet, "/v1/nothing", "", nil, http.StatusNotFound, "/v1/nothing"},
		"no such method":       {http.MethodDelete, "/v1/jobs", "", nil, http.StatusMethodNotAllowed, "DELETE"},
		"a method in a header": {http.MethodPost, "/v1/secrets/npm", "", []string{"X-HTTP-Method-Override", "DELETE"}, http.StatusMethodNotAllowed, "POST"},
		"too large":            {http.MethodPost, "/v1/jobs", long, nil, http.StatusRequestEntityTooLarge, "8 MiB"},
		"a form":               {http.MethodPost, "/v1/jobs", "{}", []string{"Content-Type", "application/x-www-form-urlencoded"}, http.StatusUnsupportedMediaType, "application/json"},
		"plain text":           {http.MethodPost, "/v1/jobs", "{}", []string{"Content-Type", "text/plain"}, http.StatusUnsupportedMediaType, "application/json"},
		"an archive in JSON":   {http.MethodPost, "/v1/contexts", "{}", nil, http.StatusUnsupportedMediaType, "application/x-tar"},
		"another's page":       {http.MethodPost, "/v1/jobs", "{}", []string{"Origin", "https://evil.example"}, http.StatusForbidden, "evil.example"},
		"a page of nowhere":    {http.MethodGet, "/v1/jobs", "", []string{"Origin", "null"}, http.StatusForbidden, "null"},
		"fetched from another": {http.MethodGet, "/v1/jobs", "", []string{"Sec-Fetch-Site", "cross-site"}, http.StatusForbidden, "other sites"},
		"a rebound name":       {http.MethodGet, "/v1/jobs", "", []string{"Host", "evil.example"}, http.StatusMisdirectedRequest, "localhost"},
		"rebound with a port":  {http.MethodGet, "/v1/jobs", "", []string{"Host", "evil.example:8373", "Origin", "http://evil.example:8373"}, http.StatusMisdirectedRequest, "localhost"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, headers, answer := r.do(t, test.method, test.path, test.body, test.headers...)
			var s struct {
				Code    int
				Message string
			}
			if err := json.Unmarshal([]byte(answer), &s); err != nil || s.Code == 0 || s.Message == "" {
				t.Errorf("no status: %q, %v", answer, err)
			}
			if code != test.code || !strings.Contains(answer, test.says) {
				t.Errorf("%d %s, want %d and %q", code, answer, test.code, test.says)
			}
			if headers.Get("X-Content-Type-Options") != "nosniff" || headers.Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("headers %v", headers)
			}
		})
	}
}

func TestAPI_ABodyOfUnknownLengthIsBoundedToo(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.url+"/v1/jobs", io.MultiReader(strings.NewReader(`{"requestId":"`), strings.NewReader(strings.Repeat("x", 9<<20))))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	response, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("answered %d", response.StatusCode)
	}
}

func TestAPI_OwnPagesAndThisMachineAreServed(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{})
	for _, headers := range [][]string{
		{"Host", "localhost:8373"}, {"Host", "[::1]:8373"}, {"Host", "127.0.0.2"}, {"Host", "farm.localhost"},
		{"Host", "localhost:8373", "Origin", "http://localhost:8373"}, {"Sec-Fetch-Site", "same-origin"}, {"Sec-Fetch-Site", "none"},
	} {
		if code, _, answer := r.do(t, http.MethodGet, "/v1/jobs", "", headers...); code != http.StatusOK {
			t.Errorf("%v: %d %s", headers, code, answer)
		}
	}
}

func TestEvents_AreLinesAsTheyCome(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{})
	lines, contentType := r.watch(t, "/v1/jobs/j1/events?after_seq=6")
	r.events <- &archfarmv1.JobEvent{Seq: 7, Event: &archfarmv1.JobEvent_Notice{Notice: "one\ntwo"}}
	var got struct {
		Event struct{ Seq, Notice string }
		Error struct {
			Code    int
			Message string
		}
	}
	if err := json.Unmarshal([]byte(lines()), &got); err != nil || got.Event.Seq != "7" || got.Event.Notice != "one\ntwo" {
		t.Errorf("got %+v, %v", got, err)
	}
	if contentType() != "application/x-ndjson" {
		t.Errorf("of type %s", contentType())
	}
	r.events <- nil
	if err := json.Unmarshal([]byte(lines()), &got); err != nil || got.Error.Code != int(codes.Unavailable) {
		t.Errorf("ended with %+v, %v", got, err)
	}
	if want := (&archfarmv1.WatchRequest{Id: "j1", AfterSeq: 6}); !proto.Equal(r.last, want) {
		t.Errorf("watched %v", r.last)
	}
	if rest := lines(); rest != "" {
		t.Errorf("and then %q", rest)
	}
}

func TestEvents_ServerSentWhereAskedFor(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{})
	lines, _ := r.watch(t, "/v1/jobs/j1/events", "Accept", "text/event-stream, */*;q=0.1", "Last-Event-ID", "11")
	r.events <- &archfarmv1.JobEvent{Seq: 12}
	var got []string
	for range 3 {
		got = append(got, lines())
	}
	close(r.events)
	for range 3 {
		got = append(got, lines())
	}
	all := strings.ReplaceAll(strings.Join(got, ""), `": `, `":`)
	if want := "id: 12\ndata: {\"event\":{\"seq\":\"12\"}}\n\nevent: end\ndata: {}\n\n"; all != want {
		t.Errorf("got %q", all)
	}
	if want := (&archfarmv1.WatchRequest{Id: "j1", AfterSeq: 11}); !proto.Equal(r.last, want) {
		t.Errorf("watched %v", r.last)
	}
}

// watch returns the lines of a stream, which has not begun yet.
func (r *rig) watch(t *testing.T, path string, headers ...string) (line, contentType func() string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	answered := make(chan *http.Response, 1)
	go func() { // ends with the first event
		defer close(answered)
		response, err := r.client.Do(req) //nolint:bodyclose // below
		if err != nil {
			t.Error(err)
			return
		}
		answered <- response
	}()
	var lines *bufio.Reader
	var kind string
	begin := sync.OnceFunc(func() {
		response := <-answered
		if response == nil {
			t.FailNow()
		}
		t.Cleanup(func() { _ = response.Body.Close() })
		lines, kind = bufio.NewReader(response.Body), response.Header.Get("Content-Type")
	})
	line = func() string {
		begin()
		s, err := lines.ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			t.Error(err)
		}
		return s
	}
	return line, func() string { begin(); return kind }
}

// archive is a tar archive of these files.
func archive(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestUpload_AnArchiveBecomesAContextWhateverItsCompression(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{})
	plain := archive(t, map[string]string{"Containerfile": "FROM scratch\n", "big": strings.Repeat("0123456789", 1<<20)})
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	if _, err := z.Write(plain); err != nil || z.Close() != nil {
		t.Fatal(err)
	}
	var digests []string
	for contentType, body := range map[string][]byte{"application/x-tar": plain, "application/gzip": zipped.Bytes()} {
		code, _, answer := r.do(t, http.MethodPost, "/v1/contexts?dockerfile=Containerfile", string(body), "Content-Type", contentType)
		var got struct{ Digest, Size string }
		if err := json.Unmarshal([]byte(answer), &got); err != nil || code != http.StatusOK || !strings.HasPrefix(got.Digest, "sha256:") || got.Size == "0" {
			t.Fatalf("%s: %d %s", contentType, code, answer)
		}
		digests = append(digests, got.Digest)
	}
	if digests[0] != digests[1] {
		t.Errorf("two contexts of one: %v", digests)
	}
}

func TestUpload_RefusesWhatIsNoContext(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{MaxArchive: 1 << 20})
	for name, test := range map[string]struct {
		path string
		body []byte
		code int
		says string
	}{
		"not an archive": {"/v1/contexts", []byte("hello"), http.StatusBadRequest, "tar"},
		"no Dockerfile":  {"/v1/contexts", archive(t, map[string]string{"a": "b"}), http.StatusBadRequest, "Dockerfile"},
		"too large":      {"/v1/contexts", make([]byte, 2<<20), http.StatusRequestEntityTooLarge, "1 MiB"},
		"misspelt":       {"/v1/contexts?file=x", archive(t, nil), http.StatusBadRequest, "dockerfile"},
		"nothing":        {"/v1/contexts", nil, http.StatusBadRequest, "archive"},
		"a way out":      {"/v1/contexts", archive(t, map[string]string{"../Dockerfile": "FROM scratch"}), http.StatusBadRequest, "out of the context"},
	} {
		if code, _, answer := r.do(t, http.MethodPost, test.path, string(test.body), "Content-Type", "application/x-tar"); code != test.code || !strings.Contains(answer, test.says) {
			t.Errorf("%s: %d %s", name, code, answer)
		}
	}
}

func TestUpload_OnlySoManyAtATime(t *testing.T) {
	t.Parallel()
	r := serve(t, httpapi.Options{MaxUploads: 1})
	body, slow := io.Pipe()
	first := make(chan int, 1)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.url+"/v1/contexts", body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-tar")
	go func() { // ends when its archive has
		defer close(first)
		response, err := r.client.Do(req)
		if err != nil {
			t.Error(err)
			return
		}
		_ = response.Body.Close()
		first <- response.StatusCode
	}()
	content := archive(t, map[string]string{"Dockerfile": "FROM scratch"})
	if _, err := slow.Write(content[:1]); err != nil { // taken: sent while the handler reads, or about to be
		t.Fatal(err)
	}
	for {
		code, headers, answer := r.do(t, http.MethodPost, "/v1/contexts", "x", "Content-Type", "application/x-tar")
		if code == http.StatusTooManyRequests {
			if headers.Get("Retry-After") == "" || !strings.Contains(answer, "try again") {
				t.Errorf("%v %s", headers, answer)
			}
			break
		}
	}
	if _, err := slow.Write(content[1:]); err != nil {
		t.Fatal(err)
	}
	_ = slow.Close()
	if code := <-first; code != http.StatusOK {
		t.Errorf("the first got %d", code)
	}
}
