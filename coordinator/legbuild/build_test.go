package legbuild

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/coordinator/job"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// A plain buildkitd is the endpoint of these tests: the coordinator's speaks the same
// protocol. With ARCHFARM_E2E_BACKEND=farm it is the coordinator of bin/archfarm.

const (
	user, password = "robot", "pass-of-the-robot"
	secretValue    = "value-of-the-secret"
	native         = "linux/amd64"
)

var common struct {
	once     sync.Once
	addr     string             // of the endpoint
	registry *farmtest.Registry // wants user and password
}

var serial atomic.Int64

// rig builds legs at a buildkitd.
type rig struct {
	*testing.T
	tools    farmtest.Tools
	registry *farmtest.Registry
	builder  *Builder
	repo     string

	mu      sync.Mutex
	callers map[string]identity.Identity // by method
	conns   []net.Conn
	told    []*archfarmv1.Progress
	workers []string
}

func newRig(t *testing.T) *rig {
	tools := farmtest.FindTools(t)
	common.once.Do(func() {
		suite.Start(t, func(s farmtest.T) {
			common.registry = farmtest.StartRegistry(s, tools, farmtest.RegistryOptions{User: user, Password: password, Fault: func(r *http.Request) int {
				if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/refused/manifests/") {
					return http.StatusInternalServerError
				}
				return 0
			}})
			if os.Getenv("ARCHFARM_E2E_BACKEND") == "farm" {
				common.addr = farmtest.StartFarm(s, farmtest.FindFarmTools(t), farmtest.FarmOptions{Workers: []farmtest.WorkerSpec{{Name: "w", Slots: 8}}}).Addr
				return
			}
			common.addr = farmtest.StartBuildkitd(s, tools, "legs").Addr
		})
	})
	if common.addr == "" {
		t.Fatal("the endpoint did not start; the first test that asked for it shows why")
	}
	r := &rig{T: t, tools: tools, registry: common.registry, repo: fmt.Sprintf("app%d", serial.Add(1)), callers: map[string]identity.Identity{}}
	r.builder = New(Options{
		Dial:        r.dial,
		DialOptions: append(access.DialOptions(), grpc.WithChainUnaryInterceptor(r.noteUnary), grpc.WithChainStreamInterceptor(r.noteStream)),
		Workers:     func(ref string) string { return "worker of " + ref },
	})
	return r
}

func (r *rig) dial(ctx context.Context) (net.Conn, error) {
	network, addr, _ := strings.Cut(common.addr, "://")
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err == nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.conns = append(r.conns, conn)
	}
	return conn, err
}

func (r *rig) note(ctx context.Context, method string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.callers[method[strings.LastIndex(method, "/")+1:]] = identity.FromContext(ctx)
}

func (r *rig) noteUnary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	r.note(ctx, method)
	return invoke(ctx, method, req, reply, conn, opts...)
}

func (r *rig) noteStream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	r.note(ctx, method)
	return open(ctx, desc, conn, method, opts...)
}

// leg returns one that builds a folder with a shell in it.
func (r *rig) leg(dockerfile string, files map[string]string) job.Leg {
	dir := r.TempDir()
	busybox, err := os.ReadFile(r.tools.Busybox)
	if err != nil {
		r.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "busybox"), busybox, 0o755); err != nil {
		r.Fatal(err)
	}
	files = with(files, "Dockerfile", "FROM scratch\nCOPY busybox /bin/busybox\nSHELL [\"/bin/busybox\", \"sh\", \"-c\"]\nENV PATH=/bin\n"+dockerfile)
	for name, content := range files {
		farmtest.WriteFile(r, dir, name, content)
	}
	return job.Leg{
		Job: "j", Attempt: 1, Ref: fmt.Sprintf("leg%d", serial.Add(1)), Platform: native, Dir: dir,
		Who:         identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "acme"},
		Secrets:     map[string][]byte{"token": []byte(secretValue)},
		Credentials: []*archfarmv1.RegistryCredential{{Host: r.registry.Host, Username: user, Password: password}},
		Spec: &archfarmv1.JobSpec{
			Platforms: []string{native},
			Context: &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Digest{Digest: fmt.Sprintf("sha256:%d", serial.Add(1))},
				Source: &archfarmv1.Source{Url: "https://example.com/app", Commit: commit}},
		},
	}
}

func with(files map[string]string, name, content string) map[string]string {
	out := map[string]string{name: content}
	for k, v := range files {
		out[k] = v
	}
	return out
}

func (r *rig) push(leg *job.Leg, repos ...string) {
	for _, repo := range repos {
		leg.Repositories = append(leg.Repositories, r.registry.Host+"/"+repo)
	}
}

func (r *rig) report(worker string, p *archfarmv1.Progress) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if worker != "" {
		r.workers = append(r.workers, worker)
	}
	if p != nil {
		r.told = append(r.told, p)
	}
}

func (r *rig) build(leg job.Leg) (ocispecs.Descriptor, error) {
	return r.builder.Build(r.Context(), leg, r.report)
}

func (r *rig) must(leg job.Leg) ocispecs.Descriptor {
	r.Helper()
	d, err := r.build(leg)
	if err != nil {
		r.Fatalf("%v: %v\n%s", status.Code(err), err, r.log())
	}
	return d
}

// log is everything that steps wrote.
func (r *rig) log() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, p := range r.told {
		b.WriteString(logs(p))
	}
	return b.String()
}

// vertices are the last states of the steps, by name.
func (r *rig) vertices() map[string]*archfarmv1.Vertex {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]*archfarmv1.Vertex{}
	for _, p := range r.told {
		for _, v := range p.GetVertexes() {
			out[v.GetName()] = v
		}
	}
	return out
}

// image reads the one image that a leg pushed, and what attests it.
func (r *rig) image(repo string, d ocispecs.Descriptor) farmtest.Image {
	r.Helper()
	index := r.registry.Index(r, repo, d.Digest.String())
	if index.Digest != d.Digest || int64(len(index.Raw)) != d.Size || index.MediaType != d.MediaType {
		r.Fatalf("the registry has %s %s, the leg pushed %+v", index.MediaType, index.Digest, d)
	}
	if tags := r.registry.Tags(r, repo); len(tags) != 0 {
		r.Errorf("%s has the tags %v", repo, tags)
	}
	if len(index.Manifests) == 0 {
		return r.registry.Image(r, repo, d)
	}
	return r.registry.Image(r, repo, index.For(r, native))
}

// silent fails the test if a secret was told.
func (r *rig) silent(err error) {
	r.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	text := fmt.Sprint(err, r.told, r.workers)
	for _, p := range r.told {
		text += logs(p)
	}
	for _, secret := range []string{secretValue, password} {
		if strings.Contains(text, secret) {
			r.Errorf("%q was told", secret)
		}
	}
}

func TestBuild_PushesByDigestToEveryRepository(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	leg := r.leg(`
ARG GREETING
COPY --chmod=644 file sub /data/
RUN --mount=type=secret,id=token echo "$GREETING" > /greeting && cat /run/secrets/token > /wrong && wc -c < /run/secrets/token > /length && rm /wrong
RUN --mount=type=secret,id=token echo before; cat /run/secrets/token; echo; echo behind # in `+r.repo+"\n", map[string]string{"file": "one", "sub/other": "two"})
	leg.Spec.BuildArgs, leg.Spec.Labels = map[string]string{"GREETING": "hello"}, map[string]string{"org.example.l": "v"}
	r.push(&leg, r.repo+"/a", r.repo+"/b")
	d := r.must(leg)
	for _, repo := range []string{r.repo + "/a", r.repo + "/b"} {
		image := r.image(repo, d)
		for name, want := range map[string]string{"greeting": "hello\n", "data/file": "one", "data/other": "two", "length": fmt.Sprintln(len(secretValue))} {
			if image.Files[name] != want {
				t.Errorf("%s in %s is %q, want %q", name, repo, image.Files[name], want)
			}
		}
		if image.Config.Config.Labels["org.example.l"] != "v" {
			t.Errorf("labels %v", image.Config.Config.Labels)
		}
	}
	r.checkProgress()
	r.checkProvenance(d)
	r.silent(nil)
	for _, method := range []string{"Solve", "Status", "Session"} {
		if r.callers[method].Tenant != "acme" {
			t.Errorf("%s is called by %v", method, r.callers[method])
		}
	}
	if len(r.workers) != 1 || r.workers[0] != "worker of "+leg.Ref {
		t.Errorf("workers %v", r.workers)
	}
}

func (r *rig) checkProgress() {
	r.Helper()
	if log := r.log(); !strings.Contains(log, "before\n***\nbehind\n") {
		r.Errorf("the log is %q", log)
	}
	run := 0
	for name, v := range r.vertices() {
		if v.GetStarted() != nil && v.GetCompleted() == nil || v.GetError() != "" {
			r.Errorf("%q is %v", name, v)
		}
		if strings.Contains(name, "RUN") && v.GetCompleted() != nil {
			run++
		}
	}
	if run != 2 {
		r.Errorf("%d RUN steps: %v", run, r.vertices())
	}
	for _, p := range r.told {
		if p.GetPlatform() != native || p.GetAttempt() != 1 {
			r.Errorf("progress of %s, attempt %d", p.GetPlatform(), p.GetAttempt())
		}
	}
}

// checkProvenance wants one attestation that knows where the context is from.
func (r *rig) checkProvenance(d ocispecs.Descriptor) {
	r.Helper()
	repo := r.repo + "/a"
	for _, m := range r.registry.Index(r, repo, d.Digest.String()).Manifests {
		if farmtest.IsAttestation(m) {
			statement := string(r.registry.Blob(r, repo, r.registry.Manifest(r, repo, m.Digest).Layers[0]))
			if !strings.Contains(statement, commit) || !strings.Contains(statement, "https://example.com/app") {
				r.Errorf("the provenance is %s", statement)
			}
			return
		}
	}
	r.Error("there is no provenance")
}

func TestBuild_WithoutRepositoriesPushesNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	leg := r.leg("RUN true\n", nil)
	leg.Spec.Platforms = []string{"linux/arm64", native}
	if d := r.must(leg); d.Digest != "" {
		t.Errorf("%v", d)
	}
	for name := range r.vertices() {
		if !strings.HasPrefix(name, "["+native) {
			t.Errorf("a step of one of several legs is called %q", name)
		}
	}
}

func TestBuild_ProvenanceOffIsOneManifest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	leg := r.leg("RUN true\n", nil)
	leg.Spec.Provenance = "false"
	r.push(&leg, r.repo)
	if index := r.registry.Index(r, r.repo, r.must(leg).Digest.String()); len(index.Manifests) != 0 {
		t.Errorf("%s", index.Raw)
	}
}

// Two contexts whose files have the same names, sizes and times are two contexts.
func TestBuild_ContextsThatLookAlikeAreNotMixedUp(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	then := time.Unix(1_700_000_000, 0)
	for _, content := range []string{"one", "two"} {
		leg := r.leg("COPY file /file\n", map[string]string{"file": content})
		for _, f := range []string{"file", "Dockerfile", "busybox", "."} {
			if err := os.Chtimes(filepath.Join(leg.Dir, f), then, then); err != nil {
				t.Fatal(err)
			}
		}
		r.push(&leg, r.repo)
		if got := r.image(r.repo, r.must(leg)).Files["file"]; got != content {
			t.Errorf("%q was built of %q", got, content)
		}
	}
}

func TestBuild_FailedStepIsShownWithItsLine(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	leg := r.leg("RUN --mount=type=secret,id=token cat /run/secrets/token; exit 3 # "+secretValue+"\n", nil)
	_, err := r.build(leg)
	if code := status.Code(err); code == codes.OK || code == codes.Unavailable || code == codes.Aborted || code == codes.ResourceExhausted {
		t.Fatalf("%v is worth another attempt: %v", code, err)
	}
	for _, part := range []string{"exit code: 3", "Dockerfile:5", "   5 | >>> RUN "} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is not in %v", part, err)
		}
	}
	r.silent(err)
}

func TestBuild_Registry(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	leg := r.leg("RUN true\n", nil)
	r.push(&leg, r.repo+"/refused")
	if _, err := r.build(leg); status.Code(err) != codes.Unavailable {
		t.Errorf("a registry that fails: %v: %v", status.Code(err), err)
	}
	leg.Ref, leg.Repositories = leg.Ref+"y", []string{r.registry.Host + "/" + r.repo}
	leg.Credentials[0].Password = "mistaken-password"
	_, err := r.build(leg)
	if code := status.Code(err); code == codes.OK || code == codes.Unavailable || strings.Contains(err.Error(), "mistaken") {
		t.Errorf("%v: %v", code, err)
	}
	leg.Ref, leg.Repositories = leg.Ref+"x", []string{"localhost:1/away"}
	if _, err := r.build(leg); status.Code(err) != codes.Unavailable {
		t.Errorf("%v: %v", status.Code(err), err)
	}
	r.silent(err)
}

// Each of two platforms has a place of its own for its cache, for the job to merge.
func TestBuild_CacheOfOneOfSeveralPlatforms(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	leg := r.leg("RUN echo "+r.repo+"\n", nil)
	ref := map[string]string{"ref": r.registry.Host + "/" + r.repo + ":cache"}
	leg.Spec.Platforms = []string{"linux/arm64", native}
	leg.Spec.CacheTo = []*archfarmv1.CacheEntry{{Type: "registry", Attrs: ref}}
	r.must(leg)
	if tags := r.registry.Tags(r, r.repo); len(tags) != 1 || tags[0] != "cache-linux-amd64" {
		t.Errorf("tags %v", tags)
	}
}

// waiting starts a build that waits in its last step, and returns when it does.
func (r *rig) waiting(ctx context.Context) (ref string, done <-chan error) {
	leg := r.leg("RUN echo waiting "+r.repo+"; exec sleep 1000\n", nil)
	seen, ended := make(chan struct{}), make(chan error, 1)
	go func() { // ends when the build does, which the test waits for
		once := sync.OnceFunc(func() { close(seen) })
		_, err := r.builder.Build(ctx, leg, func(worker string, p *archfarmv1.Progress) {
			r.report(worker, p)
			if strings.Contains(logs(p), "waiting "+r.repo+"\n") {
				once()
			}
		})
		ended <- err
	}()
	select {
	case <-seen:
	case err := <-ended:
		r.Fatalf("the build ended: %v", err)
	}
	return leg.Ref, ended
}

func TestBuild_CancelledLeavesNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ref, done := r.waiting(ctx)
	began := time.Now()
	cancel()
	if err := <-done; status.Code(err) != codes.Canceled {
		t.Errorf("%v: %v", status.Code(err), err)
	}
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("ending took %v", took)
	}
	r.checkAbandoned()
	r.checkEnded(ref)
}

func (r *rig) checkAbandoned() {
	r.Helper()
	failed := 0
	for name, v := range r.vertices() {
		if v.GetStarted() != nil && v.GetCompleted() == nil {
			r.Errorf("%q is open", name)
		}
		if v.GetError() != "" {
			failed++
		}
	}
	if failed == 0 {
		r.Error("no step says that it was ended")
	}
}

// checkEnded waits until the build is over at the endpoint.
func (r *rig) checkEnded(ref string) {
	r.Helper()
	c, err := client.New(r.Context(), common.addr)
	if err != nil {
		r.Fatal(err)
	}
	defer c.Close()
	stream, err := c.ControlClient().ListenBuildHistory(r.Context(), &controlapi.BuildHistoryRequest{Ref: ref, EarlyExit: false})
	if err != nil {
		r.Fatal(err)
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			r.Fatal(err)
		}
		if event.GetType() == controlapi.BuildHistoryEventType_COMPLETE {
			return
		}
	}
}

func TestBuild_DeadlineIsNotACancellation(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	_, done := r.waiting(deadline{ctx})
	cancel(context.DeadlineExceeded)
	if err := <-done; status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("%v: %v", status.Code(err), err)
	}
}

// deadline is a context whose end, which the test decides, counts as its deadline.
type deadline struct{ context.Context }

func (d deadline) Err() error {
	if d.Context.Err() != nil {
		return context.DeadlineExceeded
	}
	return nil
}

func TestBuild_EndpointThatGoesAway(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ref, done := r.waiting(t.Context())
	r.mu.Lock()
	for _, c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	if err := <-done; status.Code(err) != codes.Unavailable {
		t.Errorf("%v: %v", status.Code(err), err)
	}
	r.checkAbandoned()
	r.checkEnded(ref)
}
