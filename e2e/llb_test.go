package e2e_test

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/identity"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sync/errgroup"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// fileFor is raw LLB that makes an image's one file, for no platform in particular.
func fileFor(t *testing.T, content string) *llb.Definition {
	t.Helper()
	return marshal(t, llb.Scratch().File(llb.Mkfile("/app", 0o644, []byte(content))), llb.LinuxAmd64)
}

func marshal(t *testing.T, state llb.State, platform llb.ConstraintsOpt) *llb.Definition {
	t.Helper()
	def, err := state.Marshal(t.Context(), platform)
	if err != nil {
		t.Fatal(err)
	}
	return def
}

// solved is what came of a build by BuildKit's Go client.
type solved struct {
	response map[string]string
	steps    string // the names of all steps
}

// goClient runs one build by BuildKit's Go client, which hands the request to Control.Solve as it is: no buildx, and no
// frontend on the client's side.
func (r rig) goClient(t *testing.T, def *llb.Definition, opt client.SolveOpt) (solved, error) {
	t.Helper()
	var result solved
	steps, _, err := r.watched(t, func(ctx context.Context, c *client.Client, updates chan *client.SolveStatus) error {
		response, err := c.Solve(ctx, def, opt, updates)
		if response != nil {
			result.response = response.ExporterResponse
		}
		return err
	})
	result.steps = steps
	return result, err
}

// watched runs a build by BuildKit's Go client, and returns the names of its steps and its warnings, one a line.
func (r rig) watched(t *testing.T, build func(context.Context, *client.Client, chan *client.SolveStatus) error) (steps, warnings string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildLimit)
	defer cancel()
	c, err := client.New(ctx, r.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var names, warned strings.Builder
	updates := make(chan *client.SolveStatus)
	var both errgroup.Group
	both.Go(func() error {
		for update := range updates { // the client closes it
			for _, v := range update.Vertexes {
				names.WriteString(v.Name + "\n")
			}
			for _, w := range update.Warnings {
				warned.WriteString("warning: " + string(w.Short) + "\n")
			}
		}
		return nil
	})
	both.Go(func() error { return build(ctx, c, updates) })
	err = both.Wait()
	return names.String(), warned.String(), err
}

func (r rig) pushTo(tag string) []client.ExportEntry {
	return []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": r.ref(tag), "push": "true"}}}
}

// TestLLB_ADefinitionIsBuiltByAWorkerOfItsPlatform lets the platform of the base image decide.
func TestLLB_ADefinitionIsBuiltByAWorkerOfItsPlatform(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	base := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n"})
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("base"), base)
	for platform, test := range map[string]struct {
		constraint llb.ConstraintsOpt
		worker     string
	}{
		"linux/amd64": {llb.LinuxAmd64, "amd-1"},
		"linux/arm64": {llb.LinuxArm64, "arm-1"},
	} {
		tag := strings.ReplaceAll(platform, "/", "-")
		state := llb.Image(r.ref("base"), test.constraint).File(llb.Mkfile("/app", 0o644, []byte(platform)))
		ref := identity.NewID()
		result, err := r.goClient(t, marshal(t, state, test.constraint), client.SolveOpt{Ref: ref, Exports: r.pushTo(tag)})
		if err != nil {
			t.Errorf("%s: %v\n%s", platform, err, result.steps)
			continue
		}
		single := r.registry.Index(t, r.repo, tag)
		wantEqual(t, platform+": digest in the answer", result.response["containerimage.digest"], single.Digest.String())
		image := r.registry.Image(t, r.repo, farmtest.Descriptor(single))
		wantEqual(t, platform+": /app", image.Files["app"], platform)
		if !direct() && !strings.Contains(r.Farm.Coordinator.Output(), "build="+ref+" platform="+platform+" worker="+test.worker+" ") {
			t.Errorf("%s: not on worker %s", platform, test.worker)
		}
	}
}

func TestLLB_ADefinitionForNoPlatformInParticular(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	result, err := r.goClient(t, fileFor(t, t.Name()), client.SolveOpt{Exports: r.pushTo("v1")})
	if err != nil {
		t.Fatalf("%v\n%s", err, result.steps)
	}
	image := r.registry.Image(t, r.repo, farmtest.Descriptor(r.registry.Index(t, r.repo, "v1")))
	wantEqual(t, "/app", image.Files["app"], t.Name())
}

func TestLLB_BuildctlReadsADefinitionFromItsInput(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var def bytes.Buffer
	if err := llb.WriteTo(fileFor(t, t.Name()), &def); err != nil {
		t.Fatal(err)
	}
	out := farmtest.Folder(t)
	result := farmtest.BuildctlInput(t, r.tools, r.Addr, &def, "build", "--progress=plain", "--output", "type=local,dest="+out)
	if result.Code != 0 {
		t.Fatalf("buildctl: exit code %d:\n%s", result.Code, result.Output)
	}
	wantEqual(t, "/app", readFile(t, out, "app"), t.Name())
}

func TestLLB_AnExecThatNobodyRunsNativelyIsRefused(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	state := llb.Scratch().Run(llb.Args([]string{"/make", "all"}), llb.WithCustomName("make it all")).Root()
	_, err := r.goClient(t, marshal(t, state, llb.LinuxS390x), client.SolveOpt{Exports: r.pushTo("v1")})
	if err == nil {
		t.Fatal("the build succeeded")
	}
	for _, want := range []string{"no native worker for linux/s390x", "make it all"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	r.wantNoTags(t)
}

// TestLLB_AFrontendOnTheDaemonsSideIsSplit takes the way on which the client leaves the frontend to the daemon.
func TestLLB_AFrontendOnTheDaemonsSideIsSplit(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	local, err := fsutil.NewFS(r.legsContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, platforms := range []string{both, "linux/arm64"} {
		tag := strings.NewReplacer("/", "-", ",", "-").Replace(platforms)
		result, err := r.goClient(t, nil, client.SolveOpt{
			Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{"platform": platforms},
			LocalMounts: map[string]fsutil.FS{"context": local, "dockerfile": local},
			Exports:     r.pushTo(tag),
		})
		if err != nil {
			t.Errorf("%s: %v\n%s", platforms, err, result.steps)
			continue
		}
		index := r.registry.Index(t, r.repo, tag)
		wantEqual(t, platforms+": digest in the answer", result.response["containerimage.digest"], index.Digest.String())
		if platforms != both {
			r.checkImage(t, r.registry.Image(t, r.repo, farmtest.Descriptor(index)), platforms, "told\n")
			continue
		}
		wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
		r.checkLeg(t, index, "linux/amd64", "x86_64\n")
		r.checkLeg(t, index, "linux/arm64", "told\n")
	}
}
