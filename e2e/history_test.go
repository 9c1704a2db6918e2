package e2e_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// history runs a command of buildx history that must succeed.
func (r rig) history(t *testing.T, args ...string) string {
	t.Helper()
	result := r.Client.Run(t, append([]string{"history"}, args...)...)
	if result.Code != 0 {
		t.Fatalf("docker buildx history %s: exit code %d:\n%s", strings.Join(args, " "), result.Code, result.Output)
	}
	return strings.TrimSpace(result.Output)
}

// record is what these tests read of buildx history inspect.
type record struct {
	Status                           string
	Platform                         []string
	NumCompletedSteps, NumTotalSteps int
	Error                            *struct {
		Message, Name string
		Sources       []byte
	}
	Attachments []struct{ Digest, Platform, Type string }
}

func (r rig) inspect(t *testing.T, ref string) record {
	t.Helper()
	var out record
	if raw := r.history(t, "inspect", "--format", "json", ref); json.Unmarshal([]byte(raw), &out) != nil {
		t.Fatalf("buildx history inspect says %s", raw)
	}
	return out
}

// recorded builds and returns the reference of the build.
func (r rig) recorded(t *testing.T, args ...string) string {
	t.Helper()
	file := filepath.Join(farmtest.Folder(t), "metadata.json")
	r.Client.Build(t, append([]string{"--metadata-file", file}, args...)...)
	ref := readMetadata(t, file).BuildRef
	return ref[strings.LastIndex(ref, "/")+1:]
}

func (r rig) has(t *testing.T, ref string) int {
	t.Helper()
	n := 0
	for line := range strings.Lines(r.history(t, "ls", "--format", "{{.Ref}}")) {
		if strings.TrimSpace(line) == ref {
			n++
		}
	}
	return n
}

// traceOf returns the names of a build's spans.
func (r rig) traceOf(t *testing.T, ref string) []string {
	t.Helper()
	var trace struct {
		Data []struct {
			Spans []struct{ OperationName string }
		}
	}
	if raw := r.history(t, "trace", ref); json.Unmarshal([]byte(raw), &trace) != nil || len(trace.Data) != 1 {
		t.Fatalf("the trace is %.1000s", raw)
	}
	var names []string
	for _, s := range trace.Data[0].Spans {
		names = append(names, s.OperationName)
	}
	return names
}

func TestHistory_ABuildOfTwoPlatformsIsOneRecord(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ref := r.recorded(t, "--platform", both, "--push", "-t", r.ref("v1"), r.legsContext(t))
	index := r.registry.Index(t, r.repo, "v1")
	wantEqual(t, "records of the build", r.has(t, ref), 1)
	got := r.inspect(t, ref)
	wantEqual(t, "status", got.Status, "completed")
	wantList(t, "platforms", got.Platform, "linux/amd64", "linux/arm64")
	if got.NumTotalSteps == 0 || got.NumCompletedSteps != got.NumTotalSteps {
		t.Errorf("%d of %d steps completed", got.NumCompletedSteps, got.NumTotalSteps)
	}
	var attached []string
	for _, a := range got.Attachments {
		attached = append(attached, strings.TrimSpace(a.Platform+" "+a.Type[strings.LastIndexAny(a.Type, "./")+1:]))
	}
	wantList(t, "attachments", attached, "v1+json", "linux/amd64 v1+json", "linux/amd64 v1", "linux/arm64 v1+json", "linux/arm64 v1")
	wantEqual(t, "index in the record", got.Attachments[0].Digest, index.Digest.String())
	for _, platform := range got.Platform {
		var provenance struct{ BuildDefinition json.RawMessage }
		raw := r.history(t, "inspect", "attachment", "--type", "provenance", "--platform", platform, ref)
		if json.Unmarshal([]byte(raw), &provenance) != nil || len(provenance.BuildDefinition) == 0 {
			t.Errorf("provenance of %s: %.1000s", platform, raw)
		}
	}
	logs := r.history(t, "logs", ref)
	for _, want := range []string{"linux/amd64", "linux/arm64", "uname -m", "DONE"} {
		if !strings.Contains(logs, want) {
			t.Errorf("the logs do not say %q:\n%s", want, logs)
		}
	}
	file := filepath.Join(farmtest.Folder(t), "build.dockerbuild")
	r.history(t, "export", "--finalize", "--output", file, ref)
	if info, err := os.Stat(file); err != nil || info.Size() < 1000 {
		t.Errorf("exported %v, %v", info, err)
	}
	spans := r.traceOf(t, ref)
	for _, want := range []string{ // the daemon's, the client's, and what each platform has of its own, whoever ran the steps
		"moby.buildkit.v1.Control/Solve", "build", "create linux/amd64 history provenance", "create linux/arm64 history provenance",
	} {
		if !slices.Contains(spans, want) {
			t.Errorf("the trace has no %q: %q", want, spans)
		}
	}
	r.history(t, "rm", ref)
	wantEqual(t, "records once it is removed", r.has(t, ref), 0)
	if again := r.Client.Run(t, "history", "rm", "nonesuch"); again.Code == 0 {
		t.Errorf("removing an unknown build says %s", again.Output)
	}
}

func TestHistory_AFailedBuildTellsWhere(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	wantFailure(t, r.Client.TryBuild(t, "--platform", "linux/arm64", "--push", "-t", r.ref("v1"), "--label", "of="+r.repo,
		r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY nonesuch /\n"})), "nonesuch")
	ref := r.failed(t)
	got := r.inspect(t, ref)
	wantEqual(t, "status", got.Status, "failed")
	if got.Error == nil || !strings.Contains(got.Error.Message, "nonesuch") || !strings.Contains(string(got.Error.Sources), "COPY nonesuch /") || got.Error.Name == "" {
		t.Errorf("the error is %+v", got.Error)
	}
}

// failed returns the reference of the test's own failed build.
func (r rig) failed(t *testing.T) string {
	t.Helper()
	for line := range strings.Lines(r.history(t, "ls", "--filter", "status=error", "--format", "{{.Ref}}")) {
		ref := strings.TrimSpace(line)
		if strings.Contains(r.history(t, "inspect", "--format", "json", ref), r.repo) {
			return ref
		}
	}
	t.Fatal("no record of the failed build")
	return ""
}

func TestHistory_SurvivesTheCoordinatorAndItsWorkers(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	dir := farmtest.Folder(t)
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{CoordinatorArgs: []string{"--data-dir", dir}, Workers: fleet()})
	r := rigAt(t, tools, &farm.Endpoint, farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{}))
	ref := r.recorded(t, "--platform", both, "--push", "-t", r.ref("v1"), r.legsContext(t))
	before := r.inspect(t, ref)
	r.traceOf(t, ref) // which completes it
	for _, w := range farm.Workers {
		w.Agent.Signal(syscall.SIGTERM)
		w.Agent.Wait(t, 30*time.Second)
	}
	farm.Coordinator.Signal(syscall.SIGTERM)
	farm.Coordinator.Wait(t, 30*time.Second)
	farm.Coordinator = farmtest.StartProcess(t, farmtest.Spec{Name: "coordinator again", Path: tools.Archfarm, Args: []string{
		"coordinator", "--listen", strings.TrimPrefix(farm.Addr, "tcp://"), "--http", strings.TrimPrefix(farm.HTTP, "http://"), "--gossip", farm.Gossip, "--data-dir", dir,
	}})
	farm.WaitWorkers(t, "the coordinator answers", func([]farmtest.WorkerStatus) bool { return true })

	wantEqual(t, "records of the build", r.has(t, ref), 1)
	after := r.inspect(t, ref)
	if after.Status != "completed" || !slices.Equal(after.Attachments, before.Attachments) {
		t.Errorf("the record was %+v, and is %+v", before, after)
	}
	for _, a := range after.Attachments {
		raw := r.Client.Run(t, "history", "inspect", "attachment", ref, a.Digest).Output
		if got := digest.FromString(raw); got.String() != a.Digest {
			t.Errorf("%s of %s cannot be read without the workers: %.1000s", a.Type, a.Platform, raw)
		}
	}
	if logs := r.history(t, "logs", ref); !strings.Contains(logs, "uname -m") {
		t.Errorf("the logs are %s", logs)
	}
	if spans := r.traceOf(t, ref); !slices.ContainsFunc(spans, func(name string) bool { return strings.Contains(name, "COPY told") }) {
		t.Errorf("the trace is %q", spans)
	}
}
