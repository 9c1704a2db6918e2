package job

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/archfarm/archfarm/coordinator/contexts"
	"github.com/archfarm/archfarm/coordinator/gitref"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/seal"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	amd64  = "linux/amd64"
	arm64  = "linux/arm64"
	commit = "0123456789abcdef0123456789abcdef01234567"
	// soon is how long a test waits for what must happen.
	soon = 20 * time.Second
)

var (
	registryOnce sync.Once
	registryHost string
)

// registry is the address of a real one, which all tests share.
func registry(t *testing.T) string {
	t.Helper()
	tools := farmtest.FindTools(t)
	registryOnce.Do(func() {
		suite.Start(t, func(t farmtest.T) { registryHost = farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{}).Host })
	})
	if registryHost == "" {
		t.Fatal("the registry did not start")
	}
	return registryHost
}

var (
	repositories sync.Map // by test
	repositoryNo atomic.Int64
)

// repository is a test's own, each time it runs.
func repository(t *testing.T) string {
	name, _ := repositories.LoadOrStore(t, fmt.Sprintf("%s/test-%d", registry(t), repositoryNo.Add(1)))
	return name.(string)
}

// pushImage pushes an image by digest, as a leg does.
func pushImage(ctx context.Context, repository, platform, content string) (ocispecs.Descriptor, error) {
	host, name, _ := strings.Cut(repository, "/")
	base := "http://" + host + "/v2/" + name
	config := fmt.Appendf(nil, `{"os":%q,"content":%q}`, platform, content)
	d := digest.FromBytes(config)
	where, err := send(ctx, http.MethodPost, base+"/blobs/uploads/", "", nil)
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	where = resolve(base, where)
	if _, err := send(ctx, http.MethodPut, where+cmp.Or(map[bool]string{true: "&"}[strings.Contains(where, "?")], "?")+"digest="+d.String(), "application/octet-stream", config); err != nil {
		return ocispecs.Descriptor{}, err
	}
	blob := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[]}`,
		ocispecs.MediaTypeImageManifest, ocispecs.MediaTypeImageConfig, d, len(config))
	md := digest.FromBytes(blob)
	_, err = send(ctx, http.MethodPut, base+"/manifests/"+md.String(), ocispecs.MediaTypeImageManifest, blob)
	p := platforms.MustParse(platform)
	return ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: md, Size: int64(len(blob)), Platform: &p}, err
}

func resolve(base, where string) string {
	if strings.HasPrefix(where, "/") {
		return base[:strings.Index(base, "/v2/")] + where
	}
	return where
}

func send(ctx context.Context, method, url, kind string, body []byte) (location string, err error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", kind)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	if resp.StatusCode >= 300 {
		return "", fmt.Errorf("%s %s: %s: %s", method, url, resp.Status, text)
	}
	return resp.Header.Get("Location"), nil
}

// builds is a Builder that does what a test says.
type builds struct {
	do func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error)

	mu    sync.Mutex
	begun []Leg
}

// Build implements Builder.
func (b *builds) Build(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
	b.mu.Lock()
	b.begun = append(b.begun, leg)
	b.mu.Unlock()
	report("worker-"+leg.Platform, nil)
	if b.do != nil {
		return b.do(ctx, leg, report)
	}
	return pushes(ctx, leg, report)
}

// count is how many attempts of a platform's leg have begun.
func (b *builds) count(platform string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.begun {
		if l.Platform == platform {
			n++
		}
	}
	return n
}

// pushes is a build that goes well.
func pushes(ctx context.Context, leg Leg, report Report) (d ocispecs.Descriptor, err error) {
	report("", logged("building "+leg.Platform))
	for _, r := range leg.Repositories {
		if d, err = pushImage(ctx, r, leg.Platform, leg.Job); err != nil {
			return d, status.Error(codes.Internal, err.Error())
		}
	}
	return d, nil
}

func logged(text string) *archfarmv1.Progress {
	return &archfarmv1.Progress{Logs: []*archfarmv1.VertexLog{{Vertex: "sha256:1", Stream: 1, Msg: []byte(text)}}}
}

// farm is a store and those who share it.
type farm struct {
	t        *testing.T
	store    store.Store
	key      *seal.Key
	contexts *contexts.Contexts
}

func newFarm(t *testing.T) *farm {
	t.Helper()
	dir := t.TempDir()
	s, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(dir, "db"), BlobDir: filepath.Join(dir, "blobs")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	key, err := seal.Open(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := contexts.New(s, filepath.Join(dir, "contexts"), contexts.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return &farm{t, s, key, c}
}

// coordinator is one of those who run jobs.
type coordinator struct {
	*Service
	*builds
	archfarmv1.JobServiceClient
	archfarmv1.TagServiceClient
	archfarmv1.SecretServiceClient
	farm *farm
	stop func() // waits
}

type quiet struct{ t *testing.T }

func (q quiet) Write(p []byte) (int, error) {
	q.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// lease is longer than any test: one that were lost because the machine is busy would
// have legs built twice. Tests about leases that end have their own.
const lease = time.Hour

func (f *farm) options(owner string) Options {
	publisher := publish.NewPublisher(publish.Config{Ledger: f.store, Owner: owner, Lease: lease, Poll: 20 * time.Millisecond})
	f.t.Cleanup(publisher.Close)
	return Options{
		Store: f.store, Publisher: publisher, Contexts: f.contexts, Key: f.key, Owner: owner,
		Resolve: func(_ context.Context, git *archfarmv1.GitContext, _ gitref.Auth) (*archfarmv1.Source, error) {
			return &archfarmv1.Source{Url: git.GetUrl(), Commit: commit, Branch: "main"}, nil
		},
		Poll: 50 * time.Millisecond, Backoff: time.Millisecond, Lease: lease,
		Log: slog.New(slog.NewTextHandler(quiet{f.t}, nil)),
	}
}

// start starts a coordinator, which serves calls of any identity.
func (f *farm) start(b *builds, change func(*Options)) *coordinator {
	f.t.Helper()
	o := f.options("coordinator-1")
	o.Builder = b
	if change != nil {
		change(&o)
	}
	c := &coordinator{Service: New(o), builds: b, farm: f}
	server := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		return h(identified(ctx), req)
	}), grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		return h(srv, identifiedStream{stream})
	}))
	c.Register(server)
	listener := bufconn.Listen(1 << 20)
	ctx, stop := context.WithCancel(f.t.Context())
	var all sync.WaitGroup
	all.Go(func() { _ = server.Serve(listener) }) // ends with the server
	all.Go(func() { c.Run(ctx) })                 // ends with ctx
	conn, err := grpc.NewClient("passthrough:///", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		f.t.Fatal(err)
	}
	c.JobServiceClient, c.TagServiceClient, c.SecretServiceClient = archfarmv1.NewJobServiceClient(conn), archfarmv1.NewTagServiceClient(conn), archfarmv1.NewSecretServiceClient(conn)
	c.stop = sync.OnceFunc(func() {
		stop()
		server.Stop()
		conn.Close()
		all.Wait()
	})
	f.t.Cleanup(c.stop)
	return c
}

// as makes a call somebody's.
func as(ctx context.Context, tenant string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "tenant", tenant)
}

func identified(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	if tenant := md.Get("tenant"); len(tenant) > 0 {
		return identity.NewContext(ctx, identity.Identity{Kind: identity.Client, Name: "ci-" + tenant[0], Tenant: tenant[0], Pools: []string{"office"}})
	}
	return ctx
}

type identifiedStream struct{ grpc.ServerStream }

func (s identifiedStream) Context() context.Context { return identified(s.ServerStream.Context()) }

// request is a job for both platforms, to a test's repository.
func request(t *testing.T) *archfarmv1.SubmitRequest {
	return &archfarmv1.SubmitRequest{Spec: &archfarmv1.JobSpec{
		Context:   &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Git{Git: &archfarmv1.GitContext{Url: "https://git.example.com/app.git", Ref: "main"}}},
		Platforms: []string{amd64, arm64},
		Tags:      []string{repository(t) + ":{{.GitSHA}}"},
	}}
}

func (c *coordinator) submit(req *archfarmv1.SubmitRequest) *archfarmv1.Job {
	c.farm.t.Helper()
	resp, err := c.Submit(c.farm.t.Context(), req)
	if err != nil {
		c.farm.t.Fatal(err)
	}
	return resp.GetJob()
}

func (c *coordinator) get(id string) *archfarmv1.Job {
	c.farm.t.Helper()
	resp, err := c.Get(c.farm.t.Context(), &archfarmv1.GetRequest{Id: id})
	if err != nil {
		c.farm.t.Fatal(err)
	}
	return resp.GetJob()
}

// watched is all of a job's events until it ends, checked for gaps.
func (c *coordinator) watched(id string, after int64) []*archfarmv1.JobEvent {
	c.farm.t.Helper()
	ctx, done := context.WithTimeout(c.farm.t.Context(), soon)
	defer done()
	events, err := c.watch(ctx, id, after)
	if err != nil {
		c.farm.t.Fatalf("watching, after %d events: %v", len(events), err)
	}
	return events
}

func (c *coordinator) watch(ctx context.Context, id string, after int64) (events []*archfarmv1.JobEvent, err error) {
	stream, err := c.Watch(ctx, &archfarmv1.WatchRequest{Id: id, AfterSeq: after})
	if err != nil {
		return nil, err
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return events, nil
		}
		if err != nil {
			return events, err
		}
		after++
		if got := resp.GetEvent().GetSeq(); got != after {
			return events, fmt.Errorf("event %d comes where %d should", got, after)
		}
		events = append(events, resp.GetEvent())
	}
}

// ended waits for a job's end, as a watcher.
func (c *coordinator) ended(id string) *archfarmv1.Job {
	c.farm.t.Helper()
	events := c.watched(id, 0)
	last := events[len(events)-1].GetJob()
	if last == nil || !ended(last.GetState()) {
		c.farm.t.Fatalf("the last event is %v", events[len(events)-1])
	}
	return c.get(id)
}

func wantState(t *testing.T, j *archfarmv1.Job, want archfarmv1.Job_State) {
	t.Helper()
	if j.GetState() != want {
		t.Fatalf("job is %v (%s), want %v", j.GetState(), j.GetError(), want)
	}
}

func wantCode(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("error is %v, want %v", err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

// tagged is the digest that the registry has behind a tag; empty for none.
func tagged(t *testing.T, name string) string {
	t.Helper()
	d, err := publish.WithCredentials(nil, true).Resolve(t.Context(), name)
	if status.Code(err) == codes.NotFound {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return d.Digest.String()
}

func legOf(j *archfarmv1.Job, platform string) *archfarmv1.JobLeg {
	i := slices.IndexFunc(j.GetLegs(), func(l *archfarmv1.JobLeg) bool { return l.GetPlatform() == platform })
	return j.GetLegs()[i]
}

// gate is something that happens once, and can be waited for.
type gate chan struct{}

func (g gate) wait(t *testing.T) {
	t.Helper()
	select {
	case <-g:
	case <-time.After(soon):
		t.Fatal("waited in vain")
	}
}
