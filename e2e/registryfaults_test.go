package e2e_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// misery is a registry that treats requests to write a tag badly, and counts them.
type misery struct {
	// do treats one, the first of which is number 1; nil: as the registry would.
	do func(number int, w http.ResponseWriter, r *http.Request, pass func(http.ResponseWriter))

	mu sync.Mutex
	at []time.Time
}

func (m *misery) trouble(w http.ResponseWriter, r *http.Request, pass func(http.ResponseWriter)) {
	if !farmtest.PutsTag(r) {
		pass(w)
		return
	}
	m.mu.Lock()
	m.at = append(m.at, time.Now())
	number := len(m.at)
	m.mu.Unlock()
	m.do(number, w, r, pass)
}

// times at which somebody tried to write a tag.
func (m *misery) times() []time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at[:len(m.at):len(m.at)]
}

// first treats the first n requests badly.
func first(n int, bad func(w http.ResponseWriter, r *http.Request, pass func(http.ResponseWriter))) func(int, http.ResponseWriter, *http.Request, func(http.ResponseWriter)) {
	return func(number int, w http.ResponseWriter, r *http.Request, pass func(http.ResponseWriter)) {
		if number <= n {
			bad(w, r, pass)
			return
		}
		pass(w)
	}
}

const always = 1 << 30

// refusing answers with a status, and reads what it was sent before, as registries do.
func refusing(status int, code, words string, header ...string) func(http.ResponseWriter, *http.Request, func(http.ResponseWriter)) {
	return func(w http.ResponseWriter, r *http.Request, _ func(http.ResponseWriter)) {
		_, _ = io.Copy(io.Discard, r.Body)
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		farmtest.Refuse(w, status, code, words)
	}
}

// ledgered is what archfarm tags --output json prints of a binding.
type ledgered struct {
	Tag, Digest, State, Job string
	Current                 bool
	Source                  struct{ Commit string }
}

// ledger is what the farm says that it has published to the rig's repository, the newest first.
func (r jobRig) ledger(t *testing.T) (list []ledgered) {
	t.Helper()
	result := r.Farm.Archfarm(t, "tags", "--output", "json", r.registry.Host+"/"+r.repo)
	if result.Code != 0 {
		t.Fatalf("archfarm tags: exit code %d:\n%s", result.Code, result.Output)
	}
	readJSON(t, result.Output, &list)
	return list
}

// at is the rig with another registry, and a repository of its own.
func (r jobRig) at(t *testing.T, registry *farmtest.Registry) jobRig {
	t.Helper()
	r.registry, r.repo = registry, newRepo(t)
	return r
}

// wait submits a job, with credentials for the rig's registry, and waits for its end.
func (r jobRig) wait(t *testing.T, dir string, args ...string) farmtest.Result {
	t.Helper()
	config, start := farmtest.Folder(t), time.Now()
	farmtest.WriteFile(t, config, "config.json", fmt.Sprintf(`{"auths":{%q:{"auth":"Y2k6cGFzc3dvcmQ="}}}`, r.registry.Host))
	args = append([]string{"submit", "--farm", r.Farm.Addr, "--context", dir, "--platform", both, "--wait", "--progress", "plain"}, args...)
	result := r.command(t, []string{"DOCKER_CONFIG=" + config}, r.tools.Archfarm, args...)
	result.Took = time.Since(start)
	return result
}

// wantSettled checks that a job was published: the registry and the ledger say the same, once.
func (r jobRig) wantSettled(t *testing.T, result farmtest.Result, tag string) {
	t.Helper()
	if result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	wantList(t, "tags", r.registry.Tags(t, r.repo), tag)
	index := r.registry.Index(t, r.repo, tag)
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	var current []ledgered
	for _, b := range r.ledger(t) {
		if b.State == "pending" {
			t.Errorf("the ledger has a pending binding: %+v", b)
		}
		if b.Current {
			current = append(current, b)
		}
		wantEqual(t, "the digest of a binding", b.Digest, index.Digest.String()) // of the one job, whatever became of it
	}
	if len(current) != 1 || current[0].State != "published" {
		t.Errorf("the ledger's current bindings are %+v, want one that is published", current)
	}
	if job := r.job(t, result); job.GetDigest() != index.Digest.String() {
		t.Errorf("the job says %q, the registry %s", job.GetDigest(), index.Digest)
	}
}

// wantNothing checks that a job has failed, said why, and published nothing by the ledger.
func (r jobRig) wantNothing(t *testing.T, result farmtest.Result, texts ...string) {
	t.Helper()
	if result.Code != 1 {
		t.Fatalf("exit code %d, want 1:\n%s", result.Code, result.Output)
	}
	job := r.job(t, result)
	wantEqual(t, "the job's state", job.GetState(), archfarmv1.Job_STATE_FAILED)
	for _, text := range texts {
		if !strings.Contains(job.GetError(), text) {
			t.Errorf("the job's error %q does not say %q", job.GetError(), text)
		}
	}
	for _, b := range r.ledger(t) {
		if b.State != "undone" || b.Current {
			t.Errorf("the ledger has %+v, want nothing but what was undone", b)
		}
	}
}

var jobID = regexp.MustCompile(`(?m)^[0-9a-f]{8}-[0-9a-f-]{27}$`)

// job is the one whose id submit --wait has printed.
func (r jobRig) job(t *testing.T, result farmtest.Result) *archfarmv1.Job {
	t.Helper()
	job, err := r.client.Get(t.Context(), jobID.FindString(result.Output))
	if err != nil {
		t.Fatalf("%v:\n%s", err, result.Output)
	}
	return job
}

// TestRegistry_ThatTreatsTagsBadly has jobs pushed to a registry that fails, in every way that one has been seen to, at
// the one request that matters: the tag's.
func TestRegistry_ThatTreatsTagsBadly(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	whole := newJobRig(t, farmtest.FarmOptions{})
	dir := whole.context(t, map[string]string{"Dockerfile": plain, "hello": "hello\n"})
	const words = "the moon is in the wrong house"
	down := refusing(http.StatusInternalServerError, "UNKNOWN", words)
	busy := refusing(http.StatusTooManyRequests, "TOOMANYREQUESTS", words, "Retry-After", "2")
	cut := func(w http.ResponseWriter, r *http.Request, _ func(http.ResponseWriter)) {
		_, _ = io.CopyN(io.Discard, r.Body, r.ContentLength/2)
		farmtest.Cut(w)
	}
	lost := func(w http.ResponseWriter, _ *http.Request, pass func(http.ResponseWriter)) {
		farmtest.Swallow(w, pass)
	}
	lie := func(w http.ResponseWriter, r *http.Request, _ func(http.ResponseWriter)) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	}

	for name, c := range map[string]struct {
		do      func(int, http.ResponseWriter, *http.Request, func(http.ResponseWriter))
		refused []string      // what the job's error says; none: it succeeds
		tries   int           // at least
		apart   time.Duration // the first two of them, at least
	}{
		"401":                               {do: first(always, refusing(http.StatusUnauthorized, "UNAUTHORIZED", words)), refused: []string{"401 Unauthorized", words}},
		"403":                               {do: first(always, refusing(http.StatusForbidden, "DENIED", words)), refused: []string{"403 Forbidden", words}},
		"429 once":                          {do: first(1, busy), tries: 2, apart: 2 * time.Second},
		"500 twice":                         {do: first(2, down), tries: 3},
		"500 for longer than a push tries":  {do: first(6, down), tries: 7},
		"500 for ever":                      {do: first(always, down), refused: []string{"500 Internal Server Error", words}, tries: 4},
		"cut in the middle":                 {do: first(2, cut), tries: 3},
		"cut in the middle for ever":        {do: first(always, cut), refused: []string{"EOF"}, tries: 4},
		"an answer is lost":                 {do: first(1, lost), tries: 2},
		"all answers are lost":              {do: first(always, lost), tries: 4},
		"nothing is stored":                 {do: first(always, lie), refused: []string{"reading back", "answers nothing"}},
		"400: the manifest is not accepted": {do: first(always, refusing(http.StatusBadRequest, "MANIFEST_INVALID", words)), refused: []string{"400 Bad Request", words}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := &misery{do: c.do}
			r := whole.at(t, whole.registry.Behind(t, m.trouble))
			result := r.wait(t, dir, "--tag", r.ref("v1.0.0"))
			if c.refused == nil {
				r.wantSettled(t, result, "v1.0.0")
			} else {
				r.wantNothing(t, result, append(c.refused, r.ref("v1.0.0"))...)
				r.wantNoTags(t)
			}
			at := m.times()
			if len(at) < max(c.tries, 1) || c.tries == 0 && len(at) > 5 { // 401 is answered with other credentials, while there are any
				t.Errorf("the tag was written %d times, want at least %d", len(at), c.tries)
			}
			if c.apart > 0 && len(at) > 1 && at[1].Sub(at[0]) < c.apart {
				t.Errorf("the registry asked for %s, and was asked again after %s", c.apart, at[1].Sub(at[0]))
			}
			t.Logf("%d tries in %s", len(at), result.Took.Round(100*time.Millisecond))
		})
	}
	t.Run("another manifest is stored", func(t *testing.T) {
		t.Parallel()
		var r jobRig
		m := &misery{do: func(_ int, w http.ResponseWriter, req *http.Request, _ func(http.ResponseWriter)) {
			lie(w, req, nil)
			r.registry.Put(t, r.repo, "v1.0.0", r.registry.Index(t, r.repo, "other"))
		}}
		r = whole.at(t, whole.registry.Behind(t, m.trouble))
		other := whole.context(t, map[string]string{"Dockerfile": plain, "hello": "other\n"})
		direct := r
		direct.registry = whole.registry
		r.Client.Build(t, "--platform", both, "--push", "-t", direct.ref("other"), other)
		result := r.wait(t, dir, "--tag", r.ref("v1.0.0"))
		r.wantNothing(t, result, "reading back", r.registry.Index(t, r.repo, "other").Digest.String())
	})
	t.Run("one of two tags fails", func(t *testing.T) {
		t.Parallel()
		m := &misery{do: func(_ int, w http.ResponseWriter, req *http.Request, pass func(http.ResponseWriter)) {
			if strings.HasSuffix(req.URL.Path, "/v1.0.1") {
				refusing(http.StatusForbidden, "DENIED", words)(w, req, pass)
				return
			}
			pass(w)
		}}
		r := whole.at(t, whole.registry.Behind(t, m.trouble))
		result := r.wait(t, dir, "--tag", r.ref("v1.0.0"), "--tag", r.ref("v1.0.1"))
		if result.Code != 1 || !strings.Contains(r.job(t, result).GetError(), "published before that: "+r.ref("v1.0.0")) {
			t.Errorf("exit code %d, the job's error %q does not say what was published", result.Code, r.job(t, result).GetError())
		}
		wantList(t, "tags", r.registry.Tags(t, r.repo), "v1.0.0")
		states := map[string]string{}
		for _, b := range r.ledger(t) {
			states[b.Tag] = b.State
			wantEqual(t, "the digest", b.Digest, r.registry.Index(t, r.repo, "v1.0.0").Digest.String())
		}
		wantEqual(t, "the ledger", fmt.Sprint(states), "map[v1.0.0:published v1.0.1:undone]")
	})
}

// TestRegistry_TwoCommitsRaceForAnImmutableTag holds the first push of the tag until the other job waits for it.
func TestRegistry_TwoCommitsRaceForAnImmutableTag(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{})
	gate := make(chan struct{})
	var open sync.Once
	m := &misery{do: func(_ int, w http.ResponseWriter, req *http.Request, pass func(http.ResponseWriter)) {
		select {
		case <-gate:
		case <-req.Context().Done():
		}
		pass(w)
	}}
	r = r.at(t, r.registry.Behind(t, m.trouble))
	t.Cleanup(func() { open.Do(func() { close(gate) }) })
	dir := r.context(t, map[string]string{"Dockerfile": plain, "hello": "one\n"})
	var ids []string
	for _, hello := range []string{"one\n", "two\n"} {
		farmtest.WriteFile(t, dir, "hello", hello)
		commit(t, dir)
		ids = append(ids, r.submit(t, "--context", dir, "--platform", both, "--tag", r.ref("v1.0.0")))
	}
	farmtest.Eventually(t, jobLimit, "one of the jobs waits for the other", func() (string, bool) {
		said := ""
		for _, id := range ids {
			job, err := r.client.Get(t.Context(), id)
			if err != nil {
				return err.Error(), false
			}
			said += job.GetState().String() + " "
		}
		watched := r.Farm.Archfarm(t, "watch", ids[0], "--timeout", "500ms", "--progress", "plain").Output + r.Farm.Archfarm(t, "watch", ids[1], "--timeout", "500ms", "--progress", "plain").Output
		return said + watched, strings.Contains(watched, "waiting for "+r.ref("v1.0.0")+", which job ")
	})
	open.Do(func() { close(gate) })

	ended := map[archfarmv1.Job_State]*archfarmv1.Job{}
	for _, id := range ids {
		job, err := r.client.Wait(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		ended[job.GetState()] = job
	}
	won, lost := ended[archfarmv1.Job_STATE_SUCCEEDED], ended[archfarmv1.Job_STATE_FAILED]
	if won == nil || lost == nil {
		t.Fatalf("want one that succeeds and one that fails: %v", ended)
	}
	for _, text := range []string{"immutable", won.GetDigest(), won.GetId()} {
		if !strings.Contains(lost.GetError(), text) {
			t.Errorf("the loser's error does not say %q: %s", text, lost.GetError())
		}
	}
	if strings.Count(lost.GetError(), "sha256:") != 2 {
		t.Errorf("the loser's error does not name two digests: %s", lost.GetError())
	}
	wantEqual(t, "the tag", r.registry.Index(t, r.repo, "v1.0.0").Digest.String(), won.GetDigest())
	list := r.ledger(t)
	if len(list) != 1 || list[0].Digest != won.GetDigest() || list[0].Job != won.GetId() || list[0].State != "published" {
		t.Errorf("the ledger says %+v, want one binding by %s", list, won.GetId())
	}
}

// TestRegistry_TheNewerCommitEndsAsLatest lets the job of the older commit end after, and before, that of the newer one.
func TestRegistry_TheNewerCommitEndsAsLatest(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	whole := newJobRig(t, farmtest.FarmOptions{})
	gated := func(gate *farmtest.Gate) string {
		return "FROM scratch AS base-arm64\nFROM scratch AS base-amd64\nCOPY busybox /bin/busybox\n" + gate.Run() + "\nFROM base-$TARGETARCH\nARG TARGETARCH\nCOPY hello /hello-$TARGETARCH\n"
	}
	for name, olderLast := range map[string]bool{"the older ends last": true, "the newer ends last": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := whole.at(t, whole.registry)
			gate := farmtest.NewGate(t)
			dockerfile := map[bool]string{true: gated(gate), false: plain}
			dir := r.context(t, map[string]string{"Dockerfile": dockerfile[olderLast], "hello": "older\n"})
			submit := func() string {
				return r.submit(t, "--context", dir, "--platform", both, "--tag", r.ref("latest"))
			}
			oldest := commitAt(t, dir, time.Now().Add(-2*time.Hour))
			older := submit()
			farmtest.WriteFile(t, dir, "Dockerfile", dockerfile[!olderLast])
			farmtest.WriteFile(t, dir, "hello", "newer\n")
			newest := commitAt(t, dir, time.Now().Add(-time.Hour))
			newer := submit()

			late, early := newer, older
			if olderLast {
				late, early = older, newer
			}
			gate.WaitArrival(t, r.Farm.Coordinator, jobLimit)
			r.ended(t, early, archfarmv1.Job_STATE_SUCCEEDED)
			gate.Open()
			if olderLast {
				refused := r.ended(t, late, archfarmv1.Job_STATE_FAILED)
				for _, text := range []string{oldest, newest, newer, "older"} {
					if !strings.Contains(refused.GetError(), text) {
						t.Errorf("the error of the older does not say %q: %s", text, refused.GetError())
					}
				}
			}
			job := r.ended(t, newer, archfarmv1.Job_STATE_SUCCEEDED)
			wantEqual(t, "latest", r.registry.Index(t, r.repo, "latest").Digest.String(), job.GetDigest())
			list := r.ledger(t)
			if len(list) == 0 || !list[0].Current || list[0].Job != newer || list[0].Source.Commit != newest {
				t.Errorf("the ledger says %+v, want the newer commit's first", list)
			}
		})
	}
}

// commitAt is commit with a time of its own.
func commitAt(t *testing.T, dir string, at time.Time) string {
	t.Helper()
	sha := commit(t, dir)
	amend := exec.CommandContext(t.Context(), "git", "commit", "--quiet", "--amend", "--no-edit", "--date", at.Format(time.RFC3339))
	amend.Dir = dir
	amend.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com", "GIT_COMMITTER_DATE="+at.Format(time.RFC3339))
	if out, err := amend.CombinedOutput(); err != nil {
		t.Fatalf("dating %s: %v: %s", sha, err, out)
	}
	return git(t, dir, "rev-parse", "HEAD")
}
