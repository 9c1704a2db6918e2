package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	sourcepolicy "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// frontendProgram builds BuildKit's own Dockerfile frontend, once.
var frontendProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "farm-frontend-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	find := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/moby/buildkit")
	module, err := find.Output()
	if err != nil {
		return nil, fmt.Errorf("finding BuildKit's module: %w", err)
	}
	program := filepath.Join(dir, "dockerfile-frontend")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, "./frontend/dockerfile/cmd/dockerfile-frontend")
	build.Dir, build.Env = strings.TrimSpace(string(module)), append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the Dockerfile frontend: %w: %s", err, out)
	}
	return os.ReadFile(program)
})

// frontendImage pushes an image of the Dockerfile frontend.
func (r rig) frontendImage(t *testing.T) string {
	t.Helper()
	program, err := frontendProgram()
	if err != nil {
		t.Fatal(err)
	}
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY --chmod=755 frontend /bin/dockerfile-frontend\n" +
		"LABEL moby.buildkit.frontend.network.none=true\nLABEL moby.buildkit.frontend.caps=moby.buildkit.frontend.inputs,moby.buildkit.frontend.subrequests,moby.buildkit.frontend.contexts\n" +
		"ENTRYPOINT [\"/bin/dockerfile-frontend\"]\n", "frontend": string(program)})
	r.Client.Build(t, "--platform", "linux/amd64", "--provenance=false", "--output", "type=image,compression=uncompressed,push=true,name="+r.ref("frontend"), dir)
	return r.ref("frontend")
}

// TestGateway_AFrontendThatIsAnImage is named by the Dockerfile, or by a build argument.
func TestGateway_AFrontendThatIsAnImage(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	image := r.frontendImage(t)
	files := map[string]string{"Dockerfile": legs, "told": "told\n", "app": "app of " + t.Name()}
	byArg := r.context(t, files)
	files["Dockerfile"] = "# syntax=" + image + "\n" + legs
	byLine := r.context(t, files)
	files["Dockerfile"] = "# syntax=" + image + "\nFROM scratch\nCOPY app /app\nCOPY does-not-exist /app2\n"
	broken := r.context(t, files)
	for tag, args := range map[string][]string{"line": {byLine}, "arg": {"--build-arg", "BUILDKIT_SYNTAX=" + image, byArg}} {
		result := r.Client.Build(t, append([]string{"--platform", both, "--push", "-t", r.ref(tag)}, args...)...)
		if !strings.Contains(result.Output, "docker-image://"+image) {
			t.Errorf("%s: the frontend's image was not used:\n%s", tag, result.Output)
		}
		index := r.registry.Index(t, r.repo, tag)
		wantList(t, tag+": platforms", index.Platforms(), "linux/amd64", "linux/arm64")
		r.checkLeg(t, index, "linux/amd64", "x86_64\n")
		r.checkLeg(t, index, "linux/arm64", "told\n")
	}
	result := r.Client.TryBuild(t, "--platform", both, "--push", "-t", r.ref("none"), broken)
	wantFailure(t, result, "Dockerfile:4", "4 | >>> COPY does-not-exist /app2", `"/does-not-exist": not found`)
	result = r.Client.Run(t, "build", "--builder", "farm", "--platform", both, "--call", "targets", byLine)
	wantSuccess(t, result, "leg-amd64", "leg-arm64")
}

func wantSuccess(t *testing.T, result farmtest.Result, texts ...string) {
	t.Helper()
	if result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	for _, text := range texts {
		if !strings.Contains(result.Output, text) {
			t.Errorf("the output does not say %q:\n%s", text, result.Output)
		}
	}
}

func TestGateway_QuestionsAboutADockerfile(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.context(t, map[string]string{"Dockerfile": "ARG VERSION=7\nFROM scratch AS early\nCOPY app /app\n# late is the whole\nFROM early AS late\nARG LATER=yes\nLABEL v=$VERSION\n", "app": "app"})
	warned := r.context(t, map[string]string{"Dockerfile": "FROM scratch as early\nCOPY app /app\n", "app": "app"})
	ask := func(args ...string) farmtest.Result {
		return r.Client.Run(t, append([]string{"build", "--builder", "farm", "--platform", both}, args...)...)
	}
	wantSuccess(t, ask("--call", "targets", dir), "early", "late (default)", "is the whole")
	wantSuccess(t, ask("--call", "outline", "--target", "late", dir), "LATER", "yes")
	wantSuccess(t, ask("--check", "--target", "early", dir), "Check complete, no warnings found.")
	for _, flag := range []string{"--check", "--call=check"} {
		wantFailure(t, ask(flag, warned), "FromAsCasing", "1 | >>> FROM scratch as early")
	}
}

// gatewayBuild runs a build whose frontend is this test. Steps are those of its progress, warnings included.
func (r rig) gatewayBuild(t *testing.T, opt client.SolveOpt, frontend gateway.BuildFunc) (steps string, err error) {
	t.Helper()
	steps, warnings, err := r.watched(t, func(ctx context.Context, c *client.Client, updates chan *client.SolveStatus) error {
		_, err := c.Build(ctx, opt, "farmtest", frontend, updates)
		return err
	})
	return steps + warnings, err
}

// solveState solves raw LLB through the gateway.
func solveState(ctx context.Context, c gateway.Client, state llb.State, evaluate bool) (gateway.Reference, digest.Digest, error) {
	def, err := state.Marshal(ctx, llb.LinuxAmd64)
	if err != nil {
		return nil, "", err
	}
	head, err := def.Head()
	if err != nil {
		return nil, "", err
	}
	res, err := c.Solve(ctx, gateway.SolveRequest{Definition: def.ToPB(), Evaluate: evaluate})
	if err != nil {
		return nil, "", err
	}
	ref, err := res.SingleRef()
	return ref, head, err
}

func TestGateway_EveryCallOfAFrontendOnTheClientsSide(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	base := r.base(t)
	busybox := llb.Image(base, llb.LinuxAmd64)
	input, err := llb.Scratch().File(llb.Mkfile("/in", 0o644, []byte("the input"))).Marshal(t.Context(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	opt := client.SolveOpt{Exports: r.pushTo("v1"), FrontendInputs: map[string]llb.State{"given": newState(t, input)}}
	steps, err := r.gatewayBuild(t, opt, func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		inputs, err := c.Inputs(ctx)
		if err != nil {
			return nil, fmt.Errorf("Inputs: %w", err)
		}
		given, _, err := solveState(ctx, c, inputs["given"], false)
		if err != nil {
			return nil, err
		}
		content, err := given.ReadFile(ctx, gateway.ReadRequest{Filename: "/in"})
		wantAnswer(t, "ReadFile of the input", string(content), err, "the input")

		for _, arch := range []string{"amd64", "arm64"} {
			platform := &ocispecs.Platform{OS: "linux", Architecture: arch}
			_, dgst, config, err := c.ResolveImageConfig(ctx, base, sourceresolver.Opt{ImageOpt: &sourceresolver.ResolveImageOpt{Platform: platform}})
			wantAnswer(t, "ResolveImageConfig", fmt.Sprint(strings.Contains(string(config), `"architecture":"`+arch+`"`)), err, "true")
			meta, err := c.ResolveSourceMetadata(ctx, &pb.SourceOp{Identifier: "docker-image://" + base}, sourceresolver.Opt{ImageOpt: &sourceresolver.ResolveImageOpt{Platform: platform}})
			if err != nil {
				return nil, fmt.Errorf("ResolveSourceMetadata: %w", err)
			}
			wantEqual(t, "ResolveSourceMetadata: digest", meta.Image.Digest, dgst)
		}

		run := busybox.Run(llb.Args([]string{"/bin/busybox", "sh", "-c", "mkdir /d; echo made > /d/made"})).Root()
		ref, head, err := solveState(ctx, c, run, false)
		if err != nil {
			return nil, err
		}
		if err := ref.Evaluate(ctx); err != nil {
			return nil, fmt.Errorf("Evaluate: %w", err)
		}
		content, err = ref.ReadFile(ctx, gateway.ReadRequest{Filename: "/d/made", Range: &gateway.FileRange{Offset: 1, Length: 3}})
		wantAnswer(t, "ReadFile of a range", string(content), err, "ade")
		entries, err := ref.ReadDir(ctx, gateway.ReadDirRequest{Path: "/d"})
		wantAnswer(t, "ReadDir", fmt.Sprintf("%d %s", len(entries), entries[0].GetPath()), err, "1 made")
		stat, err := ref.StatFile(ctx, gateway.StatRequest{Path: "/d/made"})
		wantAnswer(t, "StatFile", fmt.Sprint(stat.GetSize()), err, "5")
		if err := c.Warn(ctx, head, "mind the gap", gateway.WarnOpts{Level: 1}); err != nil {
			return nil, fmt.Errorf("Warn: %w", err)
		}
		out, err := inContainer(ctx, c, []gateway.Mount{{Dest: "/", Ref: ref, MountType: pb.MountType_BIND}}, "read line; cat /d/made; echo $line", "said\n")
		wantAnswer(t, "a container", out, err, "made\nsaid\n")
		res := gateway.NewResult()
		res.SetRef(ref)
		return res, nil
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, steps)
	}
	if !strings.Contains(steps, "warning: mind the gap") {
		t.Errorf("the warning was not told:\n%s", steps)
	}
	image := r.registry.Image(t, r.repo, farmtest.Descriptor(r.registry.Index(t, r.repo, "v1")))
	wantEqual(t, "/d/made", image.Files["d/made"], "made\n")
}

func newState(t *testing.T, def *llb.Definition) llb.State {
	t.Helper()
	op, err := llb.NewDefinitionOp(def.ToPB())
	if err != nil {
		t.Fatal(err)
	}
	return llb.NewState(op)
}

func wantAnswer(t *testing.T, what, got string, err error, want string) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	wantEqual(t, what, got, want)
}

type output struct{ bytes.Buffer }

func (*output) Close() error { return nil }

// inContainer runs a script in a container and returns what it wrote.
func inContainer(ctx context.Context, c gateway.Client, mounts []gateway.Mount, script, input string) (string, error) {
	container, err := c.NewContainer(ctx, gateway.NewContainerRequest{Mounts: mounts, Platform: &pb.Platform{OS: "linux", Architecture: "amd64"}})
	if err != nil {
		return "", fmt.Errorf("NewContainer: %w", err)
	}
	defer func() { _ = container.Release(ctx) }()
	var out output
	process, err := container.Start(ctx, gateway.StartRequest{
		Args: []string{"/bin/busybox", "sh", "-e", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/",
		Stdin: io.NopCloser(strings.NewReader(input)), Stdout: &out, Stderr: &out,
	})
	if err != nil {
		return "", fmt.Errorf("Start: %w", err)
	}
	if err := process.Wait(); err != nil {
		return "", fmt.Errorf("the process: %w: %s", err, out.String())
	}
	return out.String(), nil
}

// TestGateway_AFailedStepCanBeLookedInto does what interactive debuggers do, by the ids in the error: by those of the
// step's inputs as it found them, and of its mounts as it left them.
func TestGateway_AFailedStepCanBeLookedInto(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	base := r.base(t)
	steps, err := r.gatewayBuild(t, client.SolveOpt{}, func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		state := llb.Image(base, llb.LinuxAmd64).Run(llb.Args([]string{"/bin/busybox", "sh", "-c", "echo left behind > /left; exit 7"})).Root()
		_, _, err := solveState(ctx, c, state, true)
		var failed *errdefs.SolveError
		if !errors.As(err, &failed) {
			return nil, fmt.Errorf("the step's error has no details: %w", err)
		}
		mounts := failed.Op.GetExec().GetMounts()
		if len(mounts) != len(failed.MountIDs) || len(failed.InputIDs) == 0 {
			return nil, fmt.Errorf("%d mounts, the error names %v and the inputs %v", len(mounts), failed.MountIDs, failed.InputIDs)
		}
		look := func(id, script string) (string, error) {
			return inContainer(ctx, c, []gateway.Mount{{Dest: "/", ResultID: id, MountType: pb.MountType_BIND}}, script, "")
		}
		out, lookErr := look(failed.MountIDs[0], "cat /left")
		wantAnswer(t, "as the step left it", out, lookErr, "left behind\n")
		out, lookErr = look(failed.InputIDs[mounts[0].GetInput()], "if [ -e /left ]; then echo there; else echo not yet; fi")
		wantAnswer(t, "as the step found it", out, lookErr, "not yet\n")
		return nil, err
	})
	if err == nil || !strings.Contains(err.Error(), "exit code: 7") {
		t.Errorf("%v\n%s", err, steps)
	}
}

func TestGateway_SourcePoliciesHoldOnEveryLeg(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	base := r.base(t)
	local, err := fsutil.NewFS(r.context(t, map[string]string{"Dockerfile": "FROM registry.invalid/missing:v1\nCOPY app /app\n", "app": t.Name()}))
	if err != nil {
		t.Fatal(err)
	}
	build := func(rule *sourcepolicy.Rule) (solved, error) {
		rule.Selector = &sourcepolicy.Selector{Identifier: "docker-image://registry.invalid/missing:v1"}
		return r.goClient(t, nil, client.SolveOpt{
			Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{"platform": both}, Exports: r.pushTo("v1"),
			LocalMounts:  map[string]fsutil.FS{"context": local, "dockerfile": local},
			SourcePolicy: &sourcepolicy.Policy{Version: 1, Rules: []*sourcepolicy.Rule{rule}},
		})
	}
	_, err = build(&sourcepolicy.Rule{Action: sourcepolicy.PolicyAction_DENY})
	if err == nil || !strings.Contains(err.Error(), "denied by policy") {
		t.Errorf("a denied source: %v", err)
	}
	wantList(t, "tags", r.registry.Tags(t, r.repo), "base")
	result, err := build(&sourcepolicy.Rule{Action: sourcepolicy.PolicyAction_CONVERT, Updates: &sourcepolicy.Update{Identifier: "docker-image://" + base}})
	if err != nil {
		t.Fatalf("a converted source: %v\n%s", err, result.steps)
	}
	index := r.registry.Index(t, r.repo, "v1")
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		wantEqual(t, platform+": /app", image.Files["app"], t.Name())
		if image.Files["bin/busybox"] == "" {
			t.Errorf("%s: it is not from the other base", platform)
		}
	}
}

func TestGateway_NamedContextsOfEveryKindForTwoPlatforms(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	base := r.base(t)
	layout := farmtest.Folder(t)
	stamped := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nARG TARGETARCH\nENV FROM_LAYOUT=$TARGETARCH\nCOPY layout /from-layout\n", "layout": "layout"})
	r.Client.Build(t, "--platform", both, "--output", "type=oci,tar=false,name=layout:v1,dest="+layout, stamped)
	dir := r.context(t, map[string]string{"Dockerfile": "FROM layout\nCOPY --from=repo in-git /in-git\nCOPY --from=image /bin/busybox /busybox\n"})
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), "--build-context", "layout=oci-layout://"+layout+":v1",
		"--build-context", "repo="+gitRepository(t, "in-git", t.Name())+"#main", "--build-context", "image=docker-image://"+base, dir)
	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	for _, arch := range []string{"amd64", "arm64"} {
		image := r.registry.Image(t, r.repo, index.For(t, "linux/"+arch))
		wantEqual(t, arch+": /in-git", image.Files["in-git"], t.Name())
		wantEqual(t, arch+": /from-layout", image.Files["from-layout"], "layout")
		if !strings.Contains(strings.Join(image.Config.Config.Env, " "), "FROM_LAYOUT="+arch) {
			t.Errorf("%s: the layout's environment is %v", arch, image.Config.Config.Env)
		}
		if image.Files["busybox"] == "" {
			t.Errorf("%s: nothing from the image", arch)
		}
	}
}

// gitRepository serves a repository with one file on its branch main.
func gitRepository(t *testing.T, name, content string) string {
	t.Helper()
	dir := farmtest.Folder(t)
	work := filepath.Join(dir, "work")
	farmtest.WriteFile(t, work, name, content)
	git := func(args ...string) string {
		cmd := exec.Command("git", args...)
		cmd.Dir = work
		cmd.Env = append(os.Environ(), "HOME="+dir, "GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b.c", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b.c")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	git("init", "-q", "-b", "main")
	git("add", ".")
	git("commit", "-q", "-m", "one")
	git("clone", "-q", "--bare", work, filepath.Join(dir, "served", "r.git"))
	server := httptest.NewServer(&cgi.Handler{
		Path: filepath.Join(git("--exec-path"), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + filepath.Join(dir, "served"), "GIT_HTTP_EXPORT_ALL=1", "HOME=" + dir},
	})
	t.Cleanup(server.Close)
	return server.URL + "/r.git"
}

// TestGateway_SecretsAndSSHAgentsReachEveryLeg has two legs that both execute: a machine of amd64 runs 386, too.
func TestGateway_SecretsAndSSHAgentsReachEveryLeg(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	secret, platforms := nonce(t), []string{"linux/amd64", "linux/386"}
	file := farmtest.WriteFile(t, farmtest.Folder(t), "token", secret)
	socket, _ := startSSHAgent(t)
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nARG TARGETARCH\n" +
		farmtest.Run("echo $TARGETARCH $(/bin/busybox sha256sum < /run/secrets/token) > /sum; /bin/busybox test -S $SSH_AUTH_SOCK",
			"--mount=type=secret,id=token,required=true", "--mount=type=ssh,required=true")})
	if direct() {
		t.Skip("a buildkitd lists 386 only where it has looked for it")
	}
	r.Client.Build(t, "--platform", strings.Join(platforms, ","), "--secret", "id=token,src="+file, "--ssh", "default="+socket, "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	for _, platform := range platforms {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		wantEqual(t, platform+": /sum", image.Files["sum"], strings.TrimPrefix(platform, "linux/")+" "+sha256Hex(secret)+" -\n")
	}
}

// TestGateway_EntitlementsAreTheWorkersToGrant asks daemons that allow a step more, and others that do not.
func TestGateway_EntitlementsAreTheWorkersToGrant(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	for name, test := range map[string]struct{ flag, entitlement, script, without string }{
		"insecure": {"--security=insecure", "security.insecure", "grep CapEff /proc/self/status > /out", "a80425fb"}, // what steps usually may
		"network":  {"--network=host", "network.host", "echo connected > /out", "nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{})
			allowed := rigAt(t, tools, &farm.Endpoint, r.registry)
			startPermissive(t, tools, farm, test.entitlement)
			dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + farmtest.Run(test.script, test.flag)})
			args := []string{"--platform", "linux/amd64,linux/386", "--push", "-t", allowed.ref("v1"), dir}
			wantFailure(t, allowed.Client.TryBuild(t, args...), test.entitlement+" is not allowed") // the client did not ask
			args = append([]string{"--allow", test.entitlement}, args...)
			wantFailure(t, r.Client.TryBuild(t, args...), test.entitlement+" is not allowed") // the daemons of the shared farm say no
			allowed.Client.Build(t, args...)
			index := r.registry.Index(t, allowed.repo, "v1")
			for _, platform := range index.Platforms() {
				image := r.registry.Image(t, allowed.repo, index.For(t, platform))
				if out := image.Files["out"]; out == "" || strings.Contains(out, test.without) {
					t.Errorf("%s: /out is %q", platform, out)
				}
			}
		})
	}
}

// startPermissive adds a worker whose buildkitd grants an entitlement.
func startPermissive(t *testing.T, tools farmtest.Tools, farm *farmtest.Farm, entitlement string) {
	t.Helper()
	dir := farmtest.Folder(t)
	addr := "unix://" + filepath.Join(dir, "s")
	daemon := farmtest.StartProcess(t, farmtest.Spec{Name: "a permissive buildkitd", Path: tools.Buildkitd, Args: []string{
		"--config", farmtest.WriteFile(t, dir, "buildkitd.toml", ""), "--root", filepath.Join(dir, "root"), "--addr", addr,
		"--oci-worker=true", "--oci-worker-net=host", "--oci-worker-gc=false", "--containerd-worker=false",
		"--otel-socket-path", filepath.Join(dir, "otel"), "--allow-insecure-entitlement", entitlement,
	}})
	daemon.WaitOutput(t, startLimit, "listening", farmtest.Contains("running server on"))
	w := &farmtest.FarmWorker{WorkerSpec: farmtest.WorkerSpec{Name: "permissive", Slots: 2}, Buildkitd: &farmtest.Buildkitd{Process: daemon, Addr: addr}}
	farm.Workers = append(farm.Workers, w)
	farm.RestartAgent(t, w)
	farm.WaitWorkers(t, "the permissive worker is ready", func(list []farmtest.WorkerStatus) bool { return len(list) == 1 && list[0].State == farmtest.Ready })
}
