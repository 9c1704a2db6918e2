package publish

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
	"github.com/archfarm/archfarm/e2e/farmtest"
)

// rig is a real registry behind a proxy that may misbehave, and a ledger.
type rig struct {
	*farmtest.Registry
	ledger store.Store
	host   string // of the proxy

	mu       sync.Mutex
	disturb  func(w http.ResponseWriter, r *http.Request, pass func()) bool // true: it has answered
	requests []string
}

func newRig(t testing.TB, options farmtest.RegistryOptions) *rig {
	t.Helper()
	g := &rig{Registry: farmtest.StartRegistry(t, farmtest.FindTools(t), options)}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: g.Host})
			r.Out.Host = r.In.Host
		},
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // a client that gave up is no news
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		disturb := g.disturb
		g.requests = append(g.requests, r.Method+" "+r.URL.Path)
		g.mu.Unlock()
		if disturb == nil || !disturb(w, r, func() { proxy.ServeHTTP(w, r) }) {
			proxy.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	t.Cleanup(http.DefaultTransport.(*http.Transport).CloseIdleConnections) // the proxy's
	g.host = server.Listener.Addr().String()
	var err error
	dir := t.TempDir()
	g.ledger, err = sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(dir, "farm.db"), BlobDir: filepath.Join(dir, "blobs")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.ledger.Close() })
	return g
}

func (g *rig) misbehave(f func(w http.ResponseWriter, r *http.Request, pass func()) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.disturb, g.requests = f, nil
}

func (g *rig) asked() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.requests)
}

func (g *rig) publisher(t testing.TB, change ...func(*Config)) *Publisher {
	t.Helper()
	c := Config{Ledger: g.ledger, Owner: t.Name() + time.Now().String(), Poll: 20 * time.Millisecond, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()}
	for _, f := range change {
		f(&c)
	}
	p := NewPublisher(c)
	t.Cleanup(p.Close)
	return p
}

// anybody talks to the registry without credentials.
func anybody() Registry { return WithCredentials(nil, false) }

func (g *rig) name(reference string) string { return g.host + "/" + reference }

func (g *rig) build(id string, c Content, references ...string) Request {
	r := Request{Build: id, Content: c, Registry: anybody()}
	for _, ref := range references {
		r.Names = append(r.Names, g.name(ref))
	}
	return r
}

func (g *rig) job(id string, c Content, references ...string) Request {
	r := g.build("", c, references...)
	r.Job, r.ID = id, id
	return r
}

// is returns what a tag really is, past the proxy; empty for nothing.
func (g *rig) is(t *testing.T, reference string) string {
	t.Helper()
	repository, tag, _ := strings.Cut(reference, ":")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodHead, "http://"+g.Host+"/v2/"+repository+"/manifests/"+tag, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accepted)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.Header.Get("Docker-Content-Digest")
}

func (g *rig) wantTag(t *testing.T, reference string, c Content) {
	t.Helper()
	if got := g.is(t, reference); got != c.Descriptor.Digest.String() {
		t.Errorf("%s is %q in the registry, want %s", reference, got, c.Descriptor.Digest)
	}
}

// bindings of a tag, the newest first, as "state digest".
func (g *rig) bindings(t *testing.T, reference string) (out []string) {
	t.Helper()
	repository, tag, _ := strings.Cut(reference, ":")
	all, err := g.ledger.Bindings(t.Context(), nil, g.host+"/"+repository, tag, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		out = append(out, fmt.Sprintf("%s %s", b.State, b.Digest))
	}
	return out
}

func (g *rig) wantBindings(t *testing.T, reference string, want ...string) {
	t.Helper()
	if got := g.bindings(t, reference); !slices.Equal(got, want) {
		t.Errorf("%s was bound %q, want %q", reference, got, want)
	}
}

func published(c Content) string { return "published " + c.Descriptor.Digest.String() }
func undone(c Content) string    { return "undone " + c.Descriptor.Digest.String() }
func pending(c Content) string   { return "pending " + c.Descriptor.Digest.String() }

// seen is what an observer is told.
type seen struct {
	mu       sync.Mutex
	steps    []string // with their errors
	warnings []string
	began    func(text string)
}

func (s *seen) Step(text string) func(error) {
	if s.began != nil {
		s.began(text)
	}
	return func(err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if err != nil {
			text += ": " + err.Error()
		}
		s.steps = append(s.steps, text)
	}
}

func (s *seen) Warn(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.warnings = append(s.warnings, text)
}

// eventually tries until it is true or the test's time is up.
func eventually(t *testing.T, what string, try func() bool) {
	t.Helper()
	ctx, done := context.WithTimeout(t.Context(), 20*time.Second)
	defer done()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !try() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s did not come true", what)
		}
	}
}
