package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/fault"
)

func isPut(r *http.Request) bool { return farmtest.PutsTag(r) }

func looksAtTag(r *http.Request) bool {
	_, object, ok := strings.Cut(r.URL.Path, "/manifests/")
	return ok && r.Method == http.MethodHead && !strings.Contains(object, ":")
}

func TestPublish_PlainPushIsBoundReadBackAndWarned(t *testing.T) {
	t.Parallel()
	g, one, two := newRig(t, farmtest.RegistryOptions{}), index("one"), index("two")
	p := g.publisher(t)
	if err := p.Publish(t.Context(), g.build("b1", one, "app:v1.0.0"), nil); err != nil {
		t.Fatal(err)
	}
	p.Close()
	if asked := g.asked(); len(asked) != 4 {
		t.Errorf("%d requests, want a look, the content, the tag, and reading back: %q", len(asked), asked)
	}
	g.wantTag(t, "app:v1.0.0", one)
	g.wantBindings(t, "app:v1.0.0", published(one))

	var s seen
	if err := p.Publish(t.Context(), g.build("b2", two, "app:v1.0.0", "app", "other/app:dev"), &s); err != nil {
		t.Fatal(err)
	}
	p.Close()
	for _, reference := range []string{"app:v1.0.0", "app:latest", "other/app:dev"} {
		g.wantTag(t, reference, two)
	}
	g.wantBindings(t, "app:v1.0.0", published(two), published(one))
	g.wantBindings(t, "app:latest", published(two))
	if want := []string{"pushing manifest for " + g.name("app:v1.0.0"), "pushing manifest for " + g.name("app"), "pushing manifest for " + g.name("other/app:dev")}; !slices.Equal(s.steps, want) {
		t.Errorf("steps %q", s.steps)
	}
	if len(s.warnings) != 1 || !strings.Contains(s.warnings[0], "immutable") || !strings.Contains(s.warnings[0], "build b1") {
		t.Errorf("warnings %q", s.warnings)
	}
}

// TestPublish_WhatAWorkerHasPushedIsOnlyRecorded, and told where the policy would not have had it.
func TestPublish_WhatAWorkerHasPushedIsOnlyRecorded(t *testing.T) {
	t.Parallel()
	g, one, two := newRig(t, farmtest.RegistryOptions{}), index("one"), index("two")
	p := g.publisher(t)
	var s seen
	for _, r := range []Request{g.build("b1", one, "app:v1.0.0"), g.build("b2", two, "app:v1.0.0")} {
		r.Pushed = true
		if err := p.Publish(t.Context(), r, &s); err != nil {
			t.Fatal(err)
		}
		p.Close()
	}
	if asked := g.asked(); len(asked) != 0 {
		t.Errorf("the registry was asked: %q", asked)
	}
	g.wantBindings(t, "app:v1.0.0", published(two), published(one))
	if len(s.steps) != 0 || len(s.warnings) != 1 || !strings.Contains(s.warnings[0], "build b1") {
		t.Errorf("steps %q, warnings %q", s.steps, s.warnings)
	}
}

func TestPublish_OffIsNotRecorded(t *testing.T) {
	t.Parallel()
	g, one := newRig(t, farmtest.RegistryOptions{}), index("one")
	p := g.publisher(t, func(c *Config) { c.Policy.Push = Off })
	if err := p.Publish(t.Context(), g.build("b", one, "app:v1", "app@"+one.Descriptor.Digest.String()), nil); err != nil {
		t.Fatal(err)
	}
	g.wantTag(t, "app:v1", one)
	g.wantBindings(t, "app:v1")
	enforcing := g.publisher(t)
	byDigest := g.job("j", index("two"), "app")
	byDigest.ByDigest = true
	if err := enforcing.Publish(t.Context(), byDigest, nil); err != nil {
		t.Fatal(err)
	}
	g.wantTag(t, "app:"+index("two").Descriptor.Digest.String(), index("two"))
	g.wantBindings(t, "app:")
}

func TestPublish_JobsTagsAreImmutable(t *testing.T) {
	t.Parallel()
	g, one, two := newRig(t, farmtest.RegistryOptions{}), index("one"), index("two")
	p := g.publisher(t)
	if err := p.Publish(t.Context(), g.job("j1", one, "app:v1.2.3", "app:v1"), nil); err != nil {
		t.Fatal(err)
	}
	err := p.Publish(t.Context(), g.job("j2", two, "app:v1", "app:v1.2.3"), nil)
	wantStatus(t, err, codes.FailedPrecondition, "app:v1.2.3", one.Descriptor.Digest.String(), two.Descriptor.Digest.String(), "job j1", time.Now().UTC().Format("2006-01"))
	g.wantTag(t, "app:v1", one) // all or nothing
	g.wantBindings(t, "app:v1", published(one))
	if err := p.Publish(t.Context(), g.job("j3", one, "app:v1.2.3"), nil); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if err := p.Publish(t.Context(), g.job("j4", two, "app:v1"), nil); err != nil {
		t.Errorf("a mutable one: %v", err)
	}
	g.wantTag(t, "app:v1", two)
	g.wantTag(t, "app:v1.2.3", one)
}

func TestPublish_SomebodyElsesTagIsNotReplaced(t *testing.T) {
	t.Parallel()
	g, theirs, ours := newRig(t, farmtest.RegistryOptions{}), index("theirs"), index("ours")
	if err := anybody().Push(t.Context(), g.name("app:v1.2.3"), false, theirs); err != nil {
		t.Fatal(err)
	}
	p := g.publisher(t)
	err := p.Publish(t.Context(), g.job("j", ours, "app:v1.2.3"), nil)
	wantStatus(t, err, codes.FailedPrecondition, "somebody else", theirs.Descriptor.Digest.String(), ours.Descriptor.Digest.String())
	g.wantTag(t, "app:v1.2.3", theirs)
	g.wantBindings(t, "app:v1.2.3", undone(ours))
	var s seen
	if err := p.Publish(t.Context(), g.build("b", ours, "app:v1.2.3"), &s); err != nil || len(s.warnings) != 1 {
		t.Errorf("where the policy is to warn: %v, %q", err, s.warnings)
	}
	g.wantTag(t, "app:v1.2.3", ours)
}

func TestPublish_OlderCommitDoesNotReplaceANewerOne(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	p := g.publisher(t)
	commit := func(n int) Request {
		r := g.job(fmt.Sprintf("j%d", n), index(fmt.Sprint(n)), "app:main")
		r.Source = store.Source{URL: "https://git.example/app", Commit: fmt.Sprintf("commit%d", n), CommitTime: time.Unix(int64(1e9+n), 0)}
		return r
	}
	if err := p.Publish(t.Context(), commit(2), nil); err != nil {
		t.Fatal(err)
	}
	old := commit(1)
	wantStatus(t, p.Publish(t.Context(), old, nil), codes.FailedPrecondition, "commit1", "commit2", "app:main")
	old.OverwriteNewer = true
	if err := p.Publish(t.Context(), old, nil); err != nil {
		t.Fatal(err)
	}
	g.wantTag(t, "app:main", index("1"))
}

type gate func(Candidate) error

func (f gate) Check(_ context.Context, c Candidate) error { return f(c) }

func TestPublish_GateForbids(t *testing.T) {
	t.Parallel()
	g, one := newRig(t, farmtest.RegistryOptions{}), index("one")
	var asked Candidate
	p := g.publisher(t, func(c *Config) {
		c.Gates = []Gate{gate(func(c Candidate) error { asked = c; return errors.New("it has a hole") })}
	})
	wantStatus(t, p.Publish(t.Context(), g.job("j", one, "app:a", "app:b", "web:a"), nil), codes.FailedPrecondition, "it has a hole")
	if !slices.Equal(asked.Repositories, []string{g.name("app"), g.name("web")}) || asked.Job != "j" {
		t.Errorf("the gate was asked about %+v", asked)
	}
	g.wantBindings(t, "app:a")
	if len(g.asked()) > 0 {
		t.Error("the registry was touched")
	}
}

func cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		conn.Close()
	}
}

// answering misbehaves, the first times that a request matches.
func answering(times int, match func(*http.Request) bool, answer func(w http.ResponseWriter, r *http.Request, pass func())) func(http.ResponseWriter, *http.Request, func()) bool {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request, pass func()) bool {
		mu.Lock()
		mine := match(r) && times > 0
		if mine {
			times--
		}
		mu.Unlock()
		if mine {
			answer(w, r, pass)
		}
		return mine
	}
}

const always = 1 << 30

func failsWith(code int, headers ...string) func(http.ResponseWriter, *http.Request, func()) {
	return func(w http.ResponseWriter, r *http.Request, _ func()) {
		_, _ = io.Copy(io.Discard, r.Body)
		for i := 0; i+1 < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		refuse(w, code, "NO", "injected")
	}
}

func TestPublish_RegistryMisbehaves(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	other := digest.FromString("other").String()
	headLies := func(w http.ResponseWriter, _ *http.Request, _ func()) {
		w.Header().Set("Docker-Content-Digest", other)
		w.Header().Set("Content-Length", "5")
	}
	for name, test := range map[string]struct {
		times  int
		match  func(*http.Request) bool
		answer func(http.ResponseWriter, *http.Request, func())
		code   codes.Code
		words  []string
		moved  bool // the tag, really
		lies   bool // the registry cannot be believed afterwards
	}{
		"401":                  {always, isPut, failsWith(401), codes.PermissionDenied, []string{"401"}, false, false},
		"401 at the look":      {always, looksAtTag, failsWith(401), codes.PermissionDenied, []string{"401"}, false, false},
		"403":                  {always, isPut, failsWith(403), codes.PermissionDenied, []string{"injected"}, false, false},
		"429, then better":     {2, isPut, failsWith(429, "Retry-After", "0"), codes.OK, nil, true, false},
		"429 for ever":         {always, isPut, failsWith(429), codes.Unavailable, []string{"429", "injected"}, false, false},
		"500, then better":     {3, isPut, failsWith(500), codes.OK, nil, true, false},
		"500 for ever":         {always, isPut, failsWith(500), codes.Unavailable, []string{"injected"}, false, false},
		"500 at the look":      {always, looksAtTag, failsWith(500), codes.Unavailable, []string{"500"}, false, false},
		"cut, then better":     {2, isPut, func(w http.ResponseWriter, _ *http.Request, _ func()) { cut(w) }, codes.OK, nil, true, false},
		"cut for ever":         {always, isPut, func(w http.ResponseWriter, _ *http.Request, _ func()) { cut(w) }, codes.Unavailable, nil, false, false},
		"cut in the body":      {always, isPut, func(w http.ResponseWriter, r *http.Request, _ func()) { _, _ = r.Body.Read(make([]byte, 3)); cut(w) }, codes.Unavailable, nil, false, false},
		"the answer is cut":    {always, isPut, g.lost, codes.Unavailable, nil, true, false},
		"lies after the push":  {always, isPut, g.misreported(other), codes.Unknown, []string{other}, true, false},
		"lies when asked":      {always, looksAtTag, headLies, codes.DataLoss, []string{other, "read"}, true, true},
		"forgets it":           {always, isPut, func(w http.ResponseWriter, _ *http.Request, _ func()) { w.WriteHeader(201) }, codes.DataLoss, []string{"nothing"}, false, false},
		"digests in GET only":  {always, looksAtTag, failsWith(405), codes.OK, nil, true, false},
		"late to tell the tag": {2, looksAtTag, failsWith(404), codes.OK, nil, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			content := index(name)
			repo := "app" + digest.FromString(name).Encoded()[:8]
			p := g.publisher(t)
			g.misbehave(answering(test.times, test.match, test.answer))
			err := p.Publish(t.Context(), g.job("job "+name, content, repo+":dev"), nil)
			wantStatus(t, err, test.code, test.words...)
			if moved := g.is(t, repo+":dev") == content.Descriptor.Digest.String(); moved != test.moved {
				t.Errorf("the tag moved: %t", moved)
			}
			if !test.lies && strings.HasPrefix(g.bindings(t, repo+":dev")[0], "published") != test.moved {
				t.Errorf("the ledger says %q", g.bindings(t, repo+":dev"))
			}
			g.misbehave(nil)
			if err := p.Publish(t.Context(), g.job("again "+name, content, repo+":dev"), nil); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			g.wantTag(t, repo+":dev", content)
		})
	}
}

// lost passes a request on, and cuts the answer.
func (g *rig) lost(w http.ResponseWriter, r *http.Request, _ func()) {
	g.direct(r)
	cut(w)
}

func (g *rig) misreported(other string) func(http.ResponseWriter, *http.Request, func()) {
	return func(w http.ResponseWriter, r *http.Request, _ func()) {
		g.direct(r)
		w.Header().Set("Docker-Content-Digest", other)
		w.WriteHeader(http.StatusCreated)
	}
}

// direct makes the registry do what a request asks, without anybody reading the answer.
func (g *rig) direct(r *http.Request) {
	out := r.Clone(context.WithoutCancel(r.Context()))
	out.RequestURI, out.URL.Scheme, out.URL.Host = "", "http", g.Host
	if resp, err := http.DefaultTransport.RoundTrip(out); err == nil {
		resp.Body.Close()
	}
}

func TestPublish_RetryAfterIsHeard(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	g.misbehave(answering(1, isPut, failsWith(429, "Retry-After", "1")))
	start := time.Now()
	if err := g.publisher(t).Publish(t.Context(), g.job("j", index("x"), "app:dev"), nil); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < time.Second {
		t.Errorf("asked again within %s", took)
	}
}

func TestPublish_ClientGoesAway(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	for name, test := range map[string]struct {
		at    func(*http.Request) bool
		moved bool
	}{
		"before the tag": {func(r *http.Request) bool { return r.Method == http.MethodPut && !isPut(r) }, false},
		"with the tag":   {isPut, true}, // what was sent is let arrive
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			content, repo := index(name), "gone"+digest.FromString(name).Encoded()[:8]
			g.misbehave(answering(1, test.at, func(_ http.ResponseWriter, _ *http.Request, pass func()) { cancel(); pass() }))
			err := g.publisher(t).Publish(ctx, g.job("job "+name, content, repo+":dev"), nil)
			wantStatus(t, err, codes.Canceled)
			if test.moved {
				g.wantBindings(t, repo+":dev", published(content))
				g.wantTag(t, repo+":dev", content)
				return
			}
			g.wantBindings(t, repo+":dev", undone(content))
			if got := g.is(t, repo+":dev"); got != "" {
				t.Errorf("the tag is %s", got)
			}
		})
	}
}

func TestPublish_SecondNameFailsTheFirstStays(t *testing.T) {
	t.Parallel()
	g, one := newRig(t, farmtest.RegistryOptions{}), index("one")
	g.misbehave(answering(always, func(r *http.Request) bool { return isPut(r) && strings.HasSuffix(r.URL.Path, "/b") }, failsWith(403)))
	var s seen
	err := g.publisher(t).Publish(t.Context(), g.job("j", one, "app:a", "app:b", "app:c"), &s)
	wantStatus(t, err, codes.PermissionDenied, "app:b", "published before that: "+g.name("app:a"))
	g.wantBindings(t, "app:a", published(one))
	g.wantBindings(t, "app:b", undone(one))
	g.wantBindings(t, "app:c", undone(one))
	if len(s.steps) != 2 || !strings.Contains(s.steps[1], "403") {
		t.Errorf("steps %q", s.steps)
	}
}

func TestPublish_RegistryDiesBetweenTags(t *testing.T) {
	t.Parallel()
	g, one := newRig(t, farmtest.RegistryOptions{}), index("one")
	var dead atomic.Bool
	g.misbehave(func(w http.ResponseWriter, r *http.Request, _ func()) bool {
		if isPut(r) && strings.HasSuffix(r.URL.Path, "/b") {
			dead.Store(true)
		}
		if dead.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return dead.Load()
	})
	err := g.publisher(t).Publish(t.Context(), g.job("j", one, "app:a", "app:b", "app:c"), nil)
	wantStatus(t, err, codes.Unavailable, "failed to push "+g.name("app:b"),
		"; taken by the registry before that, which could not be asked since: "+g.name("app:a")+"; not known whether published: "+g.name("app:b"))
	if strings.Contains(err.Error(), "app:c") {
		t.Errorf("app:c was never sent, but the error names it: %v", err)
	}
	g.wantTag(t, "app:a", one)
}

func TestPublish_RaceForAnImmutableTag(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	publishers := []*Publisher{g.publisher(t), g.publisher(t)} // two coordinators
	const racers = 10
	results := make([]error, racers)
	var group sync.WaitGroup
	for i := range racers {
		group.Go(func() {
			results[i] = publishers[i%2].Publish(t.Context(), g.job(fmt.Sprint("j", i), index(fmt.Sprint(i)), "app:v1.0.0"), nil)
		})
	}
	group.Wait()
	winner := slices.Index(results, nil)
	if winner < 0 {
		t.Fatalf("nobody won: %v", results)
	}
	for i, err := range results {
		if i != winner {
			wantStatus(t, err, codes.FailedPrecondition, fmt.Sprint("job j", winner), index(fmt.Sprint(winner)).Descriptor.Digest.String(), index(fmt.Sprint(i)).Descriptor.Digest.String())
		}
	}
	g.wantTag(t, "app:v1.0.0", index(fmt.Sprint(winner)))
	g.wantBindings(t, "app:v1.0.0", published(index(fmt.Sprint(winner))))
}

func TestPublish_RaceForAMutableTag(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	publishers := []*Publisher{g.publisher(t), g.publisher(t)}
	const racers = 10
	var group sync.WaitGroup
	for i := range racers {
		group.Go(func() {
			r := g.job(fmt.Sprint("j", i), index(fmt.Sprint(i)), "app:main", "app:dev")
			r.Source = store.Source{URL: "u", Commit: fmt.Sprint("c", i), CommitTime: time.Unix(int64(1e9+i), 0)}
			if err := publishers[i%2].Publish(t.Context(), r, nil); err != nil && status.Code(err) != codes.FailedPrecondition {
				t.Error(err)
			}
		})
	}
	group.Wait()
	newest := index(fmt.Sprint(racers - 1))
	for _, reference := range []string{"app:main", "app:dev"} {
		g.wantTag(t, reference, newest)
		if got := g.bindings(t, reference); got[0] != published(newest) || slices.ContainsFunc(got, func(b string) bool { return !strings.HasPrefix(b, "published") }) {
			t.Errorf("%s was bound %q", reference, got)
		}
	}
}

func TestPublish_WaitingIsShownAndEndsWithTheClient(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	p := g.publisher(t)
	arrived, leave := make(chan struct{}), make(chan struct{})
	g.misbehave(answering(1, isPut, func(_ http.ResponseWriter, _ *http.Request, pass func()) { close(arrived); <-leave; pass() }))
	first := make(chan error, 1)
	go func() { first <- p.Publish(t.Context(), g.job("j1", index("1"), "app:dev"), nil) }()
	<-arrived
	ctx, cancel := context.WithCancel(t.Context())
	s := seen{began: func(text string) {
		if strings.Contains(text, "app:dev") && strings.Contains(text, "job j1") {
			cancel()
		}
	}}
	wantStatus(t, p.Publish(ctx, g.job("j2", index("2"), "app:dev"), &s), codes.Canceled, "waiting for")
	close(leave)
	if err := <-first; err != nil {
		t.Error(err)
	}
	g.wantBindings(t, "app:dev", published(index("1")))
}

// crash publishes until a fault point, where the process is gone, as far as anybody
// can tell.
func (g *rig) crash(t *testing.T, r Request, point string) {
	t.Helper()
	p := g.publisher(t, func(c *Config) { c.Lease = 300 * time.Millisecond })
	reached := false
	p.point = func(here string) {
		if here == point {
			reached = true
			runtime.Goexit()
		}
	}
	var gone sync.WaitGroup
	gone.Go(func() { _ = p.Publish(t.Context(), r, nil) })
	gone.Wait()
	p.Close()
	if !reached {
		t.Fatalf("%s was not reached", point)
	}
}

var crashPoints = []string{fault.PublishGated, fault.PublishBound, fault.PublishIndex, fault.PublishTagged, fault.PublishChecked, fault.PublishSettled}

func TestResume_JobIsFinishedWithTheSameBytes(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	for _, point := range crashPoints {
		t.Run(point, func(t *testing.T) {
			content, repo, job := index(point), strings.ReplaceAll(point, ".", "/"), "job "+point
			g.crash(t, g.job(job, content, repo+":v1.0.0", repo+":main"), point)
			p := g.publisher(t)
			done, err := p.Resume(t.Context(), job, job, anybody(), nil)
			if err != nil || done != (point != fault.PublishGated) {
				t.Fatalf("resumed: %t, %v", done, err)
			}
			if !done {
				if err := p.Publish(t.Context(), g.job(job, content, repo+":v1.0.0", repo+":main"), nil); err != nil {
					t.Fatal(err)
				}
			}
			for _, reference := range []string{repo + ":v1.0.0", repo + ":main"} {
				g.wantTag(t, reference, content)
				g.wantBindings(t, reference, published(content))
			}
			if again, err := p.Resume(t.Context(), job, job, anybody(), nil); !again || err != nil {
				t.Errorf("once more: %t, %v", again, err)
			}
			if other, err := p.Resume(t.Context(), job, job+".1", anybody(), nil); other || err != nil {
				t.Errorf("for the job's next run: %t, %v", other, err)
			}
		})
	}
}

func TestRecover_BuildsTagIsWhatTheRegistrySays(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	for _, point := range crashPoints {
		t.Run(point, func(t *testing.T) {
			content, repo := index(point), strings.ReplaceAll(point, ".", "/")
			g.crash(t, g.build("b", content, repo+":v1.0.0", repo+":main"), point)
			p := g.publisher(t)
			eventually(t, "settling", func() bool {
				if err := p.Recover(t.Context()); err != nil {
					t.Fatal(err)
				}
				return !slices.Contains(g.bindings(t, repo+":main"), pending(content))
			})
			for _, reference := range []string{repo + ":v1.0.0", repo + ":main"} {
				moved := g.is(t, reference) == content.Descriptor.Digest.String()
				if bound := g.bindings(t, reference); point != fault.PublishGated && strings.HasPrefix(bound[0], "published") != moved {
					t.Errorf("%s moved: %t, and was bound %q", reference, moved, bound)
				}
			}
			if err := p.Publish(t.Context(), g.build("b2", content, repo+":main"), nil); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func TestPublish_CrashedBuildDoesNotBlockItsTag(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	for _, point := range crashPoints[1:5] {
		t.Run(point, func(t *testing.T) {
			lost, next, repo := index("lost "+point), index("next "+point), strings.ReplaceAll(point, ".", "/")
			g.crash(t, g.build("b", lost, repo+":dev"), point)
			before := g.is(t, repo+":dev")
			if err := g.publisher(t).Publish(t.Context(), g.job("job "+point, next, repo+":dev"), nil); err != nil {
				t.Fatal(err)
			}
			g.wantTag(t, repo+":dev", next)
			want := undone(lost)
			if before != "" {
				want = published(lost)
			}
			g.wantBindings(t, repo+":dev", published(next), want)
		})
	}
}

func TestRecover_PrivateRegistryIsLeftToWhoMayLook(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{User: "anna", Password: "correct-horse"})
	mine := WithCredentials(login(g.host, "anna", "correct-horse"), false)
	lost, next := index("lost"), index("next")
	r := g.build("b", lost, "app:dev")
	r.Registry = mine
	g.crash(t, r, fault.PublishTagged)
	p := g.publisher(t, func(c *Config) { c.Lease = 500 * time.Millisecond })
	var left store.Publication
	eventually(t, "the lease's end", func() bool {
		var err error
		left, _, err = g.ledger.Abandoned(t.Context(), "test", time.Millisecond, false)
		return err == nil
	})
	eventually(t, "the lease's end", func() bool {
		if err := p.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, _, err := g.ledger.Takeover(t.Context(), left.ID, "test", time.Millisecond)
		return errors.Is(err, store.ErrLeaseLost) // Recover has it: it has looked
	})
	g.wantBindings(t, "app:dev", pending(lost))
	stranger := g.build("c", next, "app:dev")
	wantStatus(t, p.Publish(t.Context(), stranger, nil), codes.PermissionDenied, "build b", "is gone")
	g.wantBindings(t, "app:dev", pending(lost))
	stranger.Registry = mine
	if err := p.Publish(t.Context(), stranger, nil); err != nil {
		t.Fatal(err)
	}
	p.Close()
	g.wantBindings(t, "app:dev", published(next), published(lost))
}

// forgetful is a ledger that cannot extend leases.
type forgetful struct{ store.Ledger }

func (forgetful) RenewPublication(context.Context, store.Lease) (store.Lease, error) {
	return store.Lease{}, store.ErrLeaseLost
}

func TestPublish_WithoutALeaseNothingMovesAnyMore(t *testing.T) {
	t.Parallel()
	g, one := newRig(t, farmtest.RegistryOptions{}), index("one")
	p := g.publisher(t, func(c *Config) { c.Ledger, c.Lease = forgetful{g.ledger}, 600*time.Millisecond })
	g.misbehave(answering(always, func(r *http.Request) bool { return r.Method == http.MethodPut && !isPut(r) },
		func(_ http.ResponseWriter, r *http.Request, _ func()) {
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		}))
	err := p.Publish(t.Context(), g.job("j", one, "app:dev"), nil)
	wantStatus(t, err, codes.Aborted, "lease")
	if got := g.is(t, "app:dev"); got != "" {
		t.Errorf("the tag is %s", got)
	}
}

func TestPublish_LedgerIsAwayAfterwards(t *testing.T) {
	t.Parallel()
	g, one, two := newRig(t, farmtest.RegistryOptions{}), index("one"), index("two")
	p := g.publisher(t, func(c *Config) { c.Ledger, c.Lease = deaf{g.ledger}, 300*time.Millisecond })
	if err := p.Publish(t.Context(), g.build("b", one, "app:dev"), nil); err != nil {
		t.Fatal(err) // the tag is published, which the registry tells whoever asks
	}
	p.Close()
	g.wantBindings(t, "app:dev", pending(one))
	if err := g.publisher(t).Publish(t.Context(), g.job("j", two, "app:dev"), nil); err != nil {
		t.Fatal(err)
	}
	g.wantBindings(t, "app:dev", published(two), published(one))
}

// deaf is a ledger that is never told of an end.
type deaf struct{ store.Ledger }

func (deaf) Settle(context.Context, store.Lease, map[int64]store.BindingState) error {
	return store.ErrLeaseLost
}

func BenchmarkPublish(b *testing.B) {
	for _, mode := range []Mode{Off, Warn} {
		b.Run(string(mode), func(b *testing.B) {
			g := newRig(b, farmtest.RegistryOptions{})
			p := g.publisher(b, func(c *Config) { c.Policy.Push = mode })
			for i := 0; b.Loop(); i++ {
				if err := p.Publish(b.Context(), g.build("b", index(fmt.Sprint(i)), "app:dev"), nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
