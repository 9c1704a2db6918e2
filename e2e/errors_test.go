package e2e_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

const (
	buildLimit = 2 * time.Minute
	// startLimit is how long something may take to start on a busy machine.
	startLimit = 30 * time.Second
)

func sha256Hex(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// solve runs one build of dir through BuildKit's Go client, which unlike buildx shows the error's gRPC code.
func solve(t *testing.T, addr, dir, platform string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildLimit)
	defer cancel()
	c, err := client.New(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	local, err := fsutil.NewFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Solve(ctx, nil, client.SolveOpt{
		Frontend:      "dockerfile.v0",
		FrontendAttrs: map[string]string{"platform": platform},
		LocalMounts:   map[string]fsutil.FS{"context": local, "dockerfile": local},
	}, nil)
	return err
}

// wantCode checks an error's gRPC code; a plain buildkitd says Unknown to most, so only a farm's are checked.
func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if err == nil {
		t.Error("the build succeeded")
		return
	}
	if got := grpcerrors.Code(err); !direct() && got != want {
		t.Errorf("gRPC code %s, want %s: %v", got, want, err)
	}
}

func TestErrors_ExecForAPlatformThatNobodyRunsNatively(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	dir := r.context(t, map[string]string{
		"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nCOPY app /app\n" + farmtest.Run("make all") + "\n", "app": "app",
	})
	message := regexp.MustCompile(`no native worker for linux/s390x, needed by "\[[^"\]]*3/3\] RUN [^\n]*make all.*": ` +
		`the farm has [^\n]*linux/amd64 \(1\)[^\n]*linux/arm64 \(1\)`)
	for _, platforms := range []string{"linux/s390x", "linux/amd64,linux/s390x"} {
		result := r.Client.TryBuild(t, "--platform", platforms, "--push", "-t", r.ref("v1"), dir)
		wantFailure(t, result, "linux/s390x")
		if !message.MatchString(result.Output) {
			t.Errorf("%s: the output does not match %s:\n%s", platforms, message, result.Output)
		}
		r.wantNoTags(t)
		wantCode(t, solve(t, r.Addr, dir, platforms), codes.FailedPrecondition)
	}
}

func TestErrors_MalformedPlatform(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.legsContext(t)
	for _, platform := range []string{"linux/amd64,li nux/arm64", "linux/amd64/v1/extra", "linux/amd64,/", "linux/../arm64"} {
		result := farmtest.Buildctl(t, r.tools, r.Addr, "build", "--progress=plain", "--frontend", "dockerfile.v0",
			"--local", "context="+dir, "--local", "dockerfile="+dir, "--opt", "platform="+platform,
			"--output", "type=image,name="+r.ref("v1")+",push=true")
		wantFailure(t, result, "invalid")
		r.wantNoTags(t)
		wantCode(t, solve(t, r.Addr, dir, platform), codes.InvalidArgument)
	}
}

func TestErrors_ADockerArchiveHoldsOnePlatform(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := filepath.Join(farmtest.Folder(t), "archive")
	result := r.Client.TryBuild(t, "--platform", both, "--output", "type=docker,dest="+file, r.legsContext(t))
	wantFailure(t, result, "exporting manifest lists") // BuildKit says so, and buildx before it
	if info, err := os.Stat(file); err == nil && info.Size() > 0 {
		t.Errorf("the refused build wrote %d bytes", info.Size())
	}
}

func TestErrors_DockerfileErrorShowsItsSourceLines(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for name, test := range map[string]struct {
		dockerfile string
		want       []string
	}{
		"syntax": {
			"FROM scratch\nCOPY app /app\nCOOPY app /app2\nLABEL a=b\n",
			[]string{"Dockerfile:3", "3 | >>> COOPY app /app2", "unknown instruction: COOPY"},
		},
		"missing file": {
			"FROM scratch\nCOPY app /app\n\nCOPY does-not-exist /x\n",
			[]string{"Dockerfile:4", "4 | >>> COPY does-not-exist /x", `"/does-not-exist": not found`},
		},
		"failing step": {
			"FROM scratch AS leg-amd64\nCOPY busybox /bin/busybox\n" + farmtest.Run("echo the step says this; exit 42") +
				"\nFROM scratch AS leg-arm64\nCOPY app /app\nFROM leg-${TARGETARCH}\n",
			[]string{"Dockerfile:3", "3 | >>> RUN ", "the step says this", "exit code: 42"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := r
			r.repo = newRepo(t)
			dir := r.context(t, map[string]string{"Dockerfile": test.dockerfile, "app": "app"})
			result := r.Client.TryBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), dir)
			wantFailure(t, result, test.want...)
			r.wantNoTags(t)
		})
	}
}

func TestErrors_AFailingLegCancelsItsSiblings(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	gate := farmtest.NewGate(t)
	failGate := farmtest.NewGate(t) // the arm64 leg can fail only once the amd64 leg runs
	dockerfile := "FROM scratch AS base\nCOPY busybox /bin/busybox\nFROM base AS leg-amd64\n" + gate.Run() +
		"\nFROM scratch AS held\nADD " + failGate.URL + "/file /file\n" +
		"FROM base AS leg-arm64\nCOPY --from=held /does-not-exist /\nFROM leg-${TARGETARCH}\n"
	dir := r.context(t, map[string]string{"Dockerfile": dockerfile})
	build := r.Client.StartBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), dir)
	gate.WaitArrival(t, build, startLimit)
	failGate.Open()
	opened := time.Now() // the arm64 leg has a file to fetch before it fails
	gate.WaitKilled(t, siblingLimit)
	killed := since(opened)
	if code := build.Wait(t, startLimit); code == 0 {
		t.Fatalf("the build succeeded:\n%s", build.Output())
	}
	t.Logf("the sibling's step was killed %s after the failing leg was let go, and the client gone after %s", killed, since(opened))
	if !strings.Contains(build.Output(), `"/does-not-exist": not found`) {
		t.Errorf("the output does not say why the build failed:\n%s", build.Output())
	}
	r.wantNoTags(t)
}

func TestErrors_AFailingLegKeepsTheFinishedOneUnpublished(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	gate := farmtest.NewGate(t)
	dockerfile := "FROM scratch AS base\nCOPY busybox /bin/busybox\nFROM base AS leg-amd64\n" + gate.Run() + "\n" +
		farmtest.Run("exit 7") + "\nFROM base AS leg-arm64\nFROM leg-${TARGETARCH}\n"
	dir := r.context(t, map[string]string{"Dockerfile": dockerfile})
	build := r.Client.StartBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), "-t", r.ref("v2"), dir)
	gate.WaitArrival(t, build, startLimit)
	gate.Open()
	if code := build.Wait(t, startLimit); code == 0 || !strings.Contains(build.Output(), "exit code: 7") {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	r.wantNoTags(t)
}

func TestErrors_RegistryRefusesTheTag(t *testing.T) {
	t.Parallel()
	for name, status := range map[string]int{"401": http.StatusUnauthorized, "403": http.StatusForbidden, "500": http.StatusInternalServerError} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			refused := make(chan string, 100)
			r.registry = farmtest.StartRegistry(t, r.tools, farmtest.RegistryOptions{Fault: func(request *http.Request) int {
				if !farmtest.PutsTag(request) {
					return 0
				}
				refused <- request.URL.Path
				return status
			}})
			result := r.Client.TryBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), r.legsContext(t))
			wantFailure(t, result, "failed to push "+r.ref("v1")+": ", farmtest.FaultMessage)
			if strings.Contains(result.Output, "rpc error:") {
				t.Errorf("the output has words of gRPC:\n%s", result.Output)
			}
			if len(refused) == 0 {
				t.Errorf("nothing tried to write the tag:\n%s", result.Output)
			}
			r.wantNoTags(t)
		})
	}
}

// TestErrors_ARegistryThatFailsOnceIsAskedAgain checks that a hiccup, as registries have them, costs nobody a build.
func TestErrors_ARegistryThatFailsOnceIsAskedAgain(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusServiceUnavailable} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			var asked atomic.Int64
			r.registry = farmtest.StartRegistry(t, r.tools, farmtest.RegistryOptions{Fault: func(request *http.Request) int {
				if farmtest.PutsTag(request) && asked.Add(1) == 1 {
					return status
				}
				return 0
			}})
			r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), r.legsContext(t))
			wantList(t, "platforms", r.registry.Index(t, r.repo, "v1").Platforms(), "linux/amd64", "linux/arm64")
			if asked.Load() < 2 {
				t.Errorf("the tag was written %d times: nothing failed", asked.Load())
			}
		})
	}
}

// TestErrors_TheSecondRepositoryRefuses checks that a user is told which names have moved when not all could.
func TestErrors_TheSecondRepositoryRefuses(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	other := newRepo(t)
	r.registry = farmtest.StartRegistry(t, r.tools, farmtest.RegistryOptions{Fault: func(request *http.Request) int {
		if farmtest.PutsTag(request) && strings.Contains(request.URL.Path, "/"+other+"/") {
			return http.StatusForbidden
		}
		return 0
	}})
	refused := r.registry.Host + "/" + other + ":v1"
	result := r.Client.TryBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), "-t", r.ref("v2"), "-t", refused, r.legsContext(t))
	wantFailure(t, result, farmtest.FaultMessage, refused)
	wantList(t, "tags of the first repository", r.registry.Tags(t, r.repo), "v1", "v2")
	wantList(t, "tags of the second repository", r.registry.Tags(t, other))
	if published := "published before that: " + r.ref("v1") + ", " + r.ref("v2"); !direct() && !strings.Contains(result.Output, published) {
		t.Errorf("the output does not say %q:\n%s", published, result.Output)
	}
}

// TestErrors_ARegistryThatDiesBetweenTags has three tags that mean an earlier build; the registry fails while they are
// moved to a new one, and stays that way. Each means one whole build then, and the user is told which means which.
func TestErrors_ARegistryThatDiesBetweenTags(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	for name, registry := range map[string]struct {
		fails func(*http.Request) bool
		said  string
	}{
		"it takes no more tags":   {farmtest.PutsTag, "published before that: "},
		"it answers nothing more": {func(*http.Request) bool { return true }, "taken by the registry before that, which could not be asked since: "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.repo = newRepo(t)
			var puts atomic.Int64
			armed := make(chan struct{})
			r.registry = farmtest.StartRegistry(t, r.tools, farmtest.RegistryOptions{Fault: func(request *http.Request) int {
				select {
				case <-armed:
				default:
					return 0
				}
				if farmtest.PutsTag(request) {
					puts.Add(1)
				}
				if puts.Load() > 1 && registry.fails(request) {
					return http.StatusServiceUnavailable
				}
				return 0
			}})
			push := []string{"--platform", both, "--push", "-t", r.ref("v1"), "-t", r.ref("v2"), "-t", r.ref("v3")}
			dir := r.legsContext(t)
			r.Client.Build(t, append(push, dir)...)
			before := r.registry.Index(t, r.repo, "v1")
			close(armed)
			result := r.Client.TryBuild(t, append(push, "--label", "is=new", dir)...)
			wantFailure(t, result, "failed to push "+r.ref("v2"), farmtest.FaultMessage, registry.said+r.ref("v1"))
			t.Logf("after %s: %s", result.Took.Round(time.Millisecond), lineAbout("error: ")(result.Output))

			wantList(t, "tags", r.registry.Tags(t, r.repo), "v1", "v2", "v3")
			for tag, moved := range map[string]bool{"v1": true, "v2": false, "v3": false} {
				index := r.registry.Index(t, r.repo, tag)
				wantEqual(t, tag+" has moved", index.Digest != before.Digest, moved)
				r.checkLeg(t, index, "linux/amd64", "x86_64\n")
				r.checkLeg(t, index, "linux/arm64", "told\n")
			}
		})
	}
}

func TestErrors_RegistryRefusesTheLegs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.registry = farmtest.StartRegistry(t, r.tools, farmtest.RegistryOptions{Fault: func(request *http.Request) int {
		if request.Method == http.MethodPost && strings.Contains(request.URL.Path, "/blobs/uploads") {
			return http.StatusForbidden
		}
		return 0
	}})
	result := r.Client.TryBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), r.legsContext(t))
	wantFailure(t, result, farmtest.FaultMessage, r.registry.Host)
	r.wantNoTags(t)
}

func TestErrors_MessageOverTheCap(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	network, addr, _ := strings.Cut(r.Addr, "://")
	if network == "unix" {
		addr = "unix://" + addr
	}
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request := &control.SolveRequest{Ref: nonce(t), Session: nonce(t), FrontendAttrs: map[string]string{"build-arg:X": strings.Repeat("x", 17<<20)}}
	_, err = control.NewControlClient(conn).Solve(t.Context(), request)
	if got := status.Code(err); got != codes.ResourceExhausted {
		t.Errorf("gRPC code %s, want %s: %v", got, codes.ResourceExhausted, err)
	}
}
