package publish

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/util/bklog"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) {
	firstPause = 10 * time.Millisecond                                                                            // the registries of these tests do not need rest
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/archfarm/archfarm/e2e/farmtest.spawn.func1.1")) // starts processes, for good
}

func index(annotation string) Content {
	blob := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[],"annotations":{"a":%q}}`, ocispecs.MediaTypeImageIndex, annotation)
	return Content{Descriptor: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromBytes(blob), Size: int64(len(blob))}, Blob: blob}
}

// client is a BuildKit client's session, as far as registries concern it.
type client struct {
	auth.UnimplementedAuthServer

	user, password string

	mu    sync.Mutex
	asked []string
}

func (c *client) Register(server *grpc.Server) { auth.RegisterAuthServer(server, c) }

func (c *client) Credentials(_ context.Context, req *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, req.GetHost())
	return &auth.CredentialsResponse{Username: c.user, Secret: c.password}, nil
}

// open connects the client to a new coordinator's sessions.
func (c *client) open(t *testing.T) Registry {
	t.Helper()
	sessions, err := session.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	s, err := session.NewSession(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	s.Allow(c)
	ctx, hangUp := context.WithCancel(t.Context())
	var ends sync.WaitGroup
	dial := func(_ context.Context, _ string, meta map[string][]string) (net.Conn, error) {
		here, there := net.Pipe()
		ends.Go(func() { _ = sessions.HandleConn(ctx, there, meta) }) // its end is the hanging up
		return here, nil
	}
	ends.Go(func() { _ = s.Run(ctx, dial) })
	t.Cleanup(func() { hangUp(); ends.Wait() })
	if _, err := sessions.Get(t.Context(), s.ID(), false); err != nil { // waits for it
		t.Fatal(err)
	}
	return Registry{Sessions: sessions, Session: s.ID()}
}

func wantStatus(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("error %v has code %s, want %s", err, status.Code(err), code)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
}

func TestPush_ByDigestTakesRepositoriesOnly(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"r.example/app:v1", "r.example/app@" + index("x").Descriptor.Digest.String()} {
		if err := (Registry{}).Push(t.Context(), name, true, index("x")); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "can't push tagged ref "+name+" by digest") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPush_ATagAndItsDigestPointAtTheContent(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		reference string // after the host
		byDigest  bool
		tag       string // where it is afterwards, empty for the digest alone
	}{
		"a tag":         {"/team/app:v1", false, "team/app/v1"},
		"no tag":        {"/app", false, "app/latest"},
		"by its digest": {"/team/app", true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g, content := &registry{}, index(name)
			host := g.serve(t)
			if err := (&client{}).open(t).Push(t.Context(), host+test.reference, test.byDigest, content); err != nil {
				t.Fatal(err)
			}
			repo, _, _ := strings.Cut(strings.TrimPrefix(test.reference, "/"), ":")
			want := map[string]bool{repo + "/" + content.Descriptor.Digest.String(): true}
			if test.tag != "" {
				want[test.tag] = true
			}
			for place := range want {
				blob, mediaType := g.holds(place)
				if !bytes.Equal(blob, content.Blob) || mediaType != ocispecs.MediaTypeImageIndex {
					t.Errorf("at %s: %q of type %s", place, blob, mediaType)
				}
			}
			g.mu.Lock()
			defer g.mu.Unlock()
			if len(g.manifests) != len(want) {
				t.Errorf("the registry holds %d references, want %d", len(g.manifests), len(want))
			}
		})
	}
}

func TestPush_WhatIsThereAlreadyIsNotWrittenAgain(t *testing.T) {
	t.Parallel()
	g := &registry{}
	name := g.serve(t) + "/app:v1"
	r := (&client{}).open(t)
	for range 2 {
		if err := r.Push(t.Context(), name, false, index("one")); err != nil {
			t.Fatal(err)
		}
	}
	if puts := g.count(http.MethodPut); puts != 1 {
		t.Errorf("%d times written", puts)
	}
	if err := r.Push(t.Context(), name, false, index("two")); err != nil {
		t.Fatal(err)
	}
	if blob, _ := g.holds("app/v1"); !bytes.Equal(blob, index("two").Blob) {
		t.Error("the tag was not moved to other content")
	}
}

func TestPush_InsecureRegistriesMayHaveAnyCertificate(t *testing.T) {
	t.Parallel()
	g := &registry{}
	server := httptest.NewUnstartedServer(g)
	server.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // the refused handshake
	server.StartTLS()
	t.Cleanup(server.Close)
	name := server.Listener.Addr().String() + "/app:v1"
	r := (&client{}).open(t)
	if err := r.Push(t.Context(), name, false, index("x")); err == nil {
		t.Error("a registry that nobody vouches for was trusted")
	}
	r.Insecure = true
	if err := r.Push(t.Context(), name, false, index("x")); err != nil {
		t.Fatal(err)
	}
	if blob, _ := g.holds("app/v1"); blob == nil {
		t.Error("nothing arrived")
	}
}

func TestPush_InsecureRegistriesMayHaveNoCertificate(t *testing.T) {
	t.Parallel()
	g := &registry{}
	name := g.serve(t) + "/app:v1"
	r := (&client{}).open(t)
	r.Insecure = true
	if err := r.Push(t.Context(), name, false, index("x")); err != nil {
		t.Fatal(err)
	}
	if blob, _ := g.holds("app/v1"); blob == nil {
		t.Error("nothing arrived")
	}
}

func TestPush_RegistryRefuses(t *testing.T) {
	t.Parallel()
	on := func(method string, code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == method {
				refuse(w, code, "DENIED", "not today")
			}
			return r.Method == method
		}
	}
	for name, test := range map[string]struct {
		answer func(http.ResponseWriter, *http.Request) bool
		code   codes.Code
		words  []string
	}{
		"forbidden to look":  {on(http.MethodHead, http.StatusForbidden), codes.PermissionDenied, []string{"403"}},
		"forbidden to write": {on(http.MethodPut, http.StatusForbidden), codes.PermissionDenied, []string{"not today"}},
		"no such repository": {on(http.MethodPut, http.StatusNotFound), codes.Unknown, []string{"not today"}},
		"not a manifest":     {on(http.MethodPut, http.StatusBadRequest), codes.Unknown, []string{"not today"}},
		"another digest": {func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				_, _ = io.Copy(io.Discard, r.Body)
				w.Header().Set("Docker-Content-Digest", digest.FromString("something else").String())
				w.WriteHeader(http.StatusCreated)
			}
			return r.Method == http.MethodPut
		}, codes.Unknown, []string{digest.FromString("something else").String(), index("x").Descriptor.Digest.String()}},
		"no digest at all": {func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				_, _ = io.Copy(io.Discard, r.Body)
				w.Header().Set("Docker-Content-Digest", "md5:none")
				w.WriteHeader(http.StatusCreated)
			}
			return r.Method == http.MethodPut
		}, codes.Unknown, []string{"digest"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := &registry{answer: test.answer}
			reference := g.serve(t) + "/team/app:v1"
			err := (&client{}).open(t).Push(t.Context(), reference, false, index("x"))
			wantStatus(t, err, test.code, append(test.words, reference)...)
			if blob, _ := g.holds("team/app/v1"); blob != nil {
				t.Error("the tag was moved all the same")
			}
		})
	}
}

func TestPush_ANameThatIsNone(t *testing.T) {
	t.Parallel()
	err := Registry{}.Push(t.Context(), "No:Such:Name", false, index("x"))
	wantStatus(t, err, codes.InvalidArgument, `"No:Such:Name"`)
	broken := index("x")
	broken.Descriptor.Digest = "sha256:short"
	err = Registry{}.Push(t.Context(), "app", false, broken)
	wantStatus(t, err, codes.InvalidArgument, `"app"`)
}

func TestPush_UsesTheClientsPassword(t *testing.T) {
	t.Parallel()
	for name, bearer := range map[string]bool{"basic": false, "token": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := &registry{user: "anna", password: "a secret", bearer: bearer}
			host := g.serve(t)
			c := &client{user: g.user, password: g.password}
			if err := c.open(t).Push(t.Context(), host+"/app:v1", false, index("x")); err != nil {
				t.Fatal(err)
			}
			if blob, _ := g.holds("app/v1"); blob == nil {
				t.Error("nothing arrived")
			}
			if len(c.asked) == 0 || c.asked[0] != host {
				t.Errorf("the client was asked for the passwords of %v", c.asked)
			}
		})
	}
}

func TestPush_OneClientsPasswordIsNotAnothers(t *testing.T) {
	t.Parallel()
	g := &registry{user: "anna", password: "a secret", bearer: true}
	name := g.serve(t) + "/app:v1"
	if err := (&client{user: g.user, password: g.password}).open(t).Push(t.Context(), name, false, index("anna's")); err != nil {
		t.Fatal(err)
	}
	err := (&client{}).open(t).Push(t.Context(), name, false, index("mallory's"))
	wantStatus(t, err, codes.PermissionDenied, name)
	if blob, _ := g.holds("app/v1"); !bytes.Equal(blob, index("anna's").Blob) {
		t.Error("somebody else moved the tag")
	}
}

// everything is logrus.TraceLevel.
const everything = 6

// Not parallel: it listens to what the whole process logs.
func TestPush_SaysAndLogsNoPassword(t *testing.T) {
	var logged bytes.Buffer
	logger := bklog.L.Logger // BuildKit's and containerd's
	before, level := logger.Out, logger.GetLevel()
	logger.SetOutput(&logged)
	logger.SetLevel(everything)
	defer func() { logger.SetOutput(before); logger.SetLevel(level) }()

	for _, bearer := range []bool{false, true} {
		g := &registry{user: "anna", password: "correct-horse", bearer: bearer}
		name := g.serve(t) + "/app:v1"
		if err := (&client{user: g.user, password: g.password}).open(t).Push(t.Context(), name, false, index("x")); err != nil {
			t.Fatal(err)
		}
		wrong := &client{user: "anna", password: "wrong-horse"}
		err := wrong.open(t).Push(t.Context(), name, false, index("y"))
		wantStatus(t, err, codes.PermissionDenied, name)
		for _, secret := range append(g.secrets(), wrong.password) {
			if strings.Contains(err.Error(), secret) {
				t.Errorf("the error tells the secret %q: %v", secret, err)
			}
			if strings.Contains(logged.String(), secret) {
				t.Errorf("the log tells the secret %q:\n%s", secret, logged.String())
			}
		}
	}
	if logged.Len() == 0 {
		t.Error("nothing was logged: this test looks in the wrong place")
	}
}

func TestPush_ClientGoneWhileTheRegistryThinks(t *testing.T) {
	t.Parallel()
	arrived, gone := make(chan struct{}), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
		close(gone)
	}))
	t.Cleanup(server.Close)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-arrived
		cancel()
	}()
	err := (&client{}).open(t).Push(ctx, server.Listener.Addr().String()+"/app:v1", false, index("x"))
	wantStatus(t, err, codes.Canceled, "app:v1")
	<-gone
}

func TestPartly_TellsWhichNamesHaveMoved(t *testing.T) {
	t.Parallel()
	err := status.Error(codes.PermissionDenied, "failed to push b: no")
	if got := Partly(err, nil); !errors.Is(got, err) {
		t.Errorf("of none: %v", got)
	}
	got := Partly(err, []string{"a:1", "a:2"})
	wantStatus(t, got, codes.PermissionDenied, "failed to push b: no; published before that: a:1, a:2")
	if strings.Contains(status.Convert(got).Message(), "rpc error") {
		t.Errorf("the message %q has gRPC's prefix inside", status.Convert(got).Message())
	}
}
