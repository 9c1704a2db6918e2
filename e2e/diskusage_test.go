package e2e_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// usageRecord is a line of buildx du --format json.
type usageRecord struct {
	ID          string
	Parents     []string
	Description string
	Reclaimable bool
}

// usage returns what buildx du lists.
func (r rig) usage(t *testing.T, args ...string) []usageRecord {
	t.Helper()
	var out []usageRecord
	decoder := json.NewDecoder(strings.NewReader(r.buildx(t, append([]string{"du", "--format", "json"}, args...)...)))
	for decoder.More() {
		var record usageRecord
		if err := decoder.Decode(&record); err != nil {
			t.Fatalf("buildx du --format json: %v", err)
		}
		out = append(out, record)
	}
	return out
}

// buildx runs a buildx command that has to succeed.
func (r rig) buildx(t *testing.T, args ...string) string {
	t.Helper()
	return succeeded(t, r.Client.Run(t, args...), args)
}

// buildctl runs a buildctl command that has to succeed.
func (r rig) buildctl(t *testing.T, args ...string) string {
	t.Helper()
	return succeeded(t, farmtest.Buildctl(t, r.tools, r.Addr, args...), args)
}

func succeeded(t *testing.T, result farmtest.Result, args []string) string {
	t.Helper()
	if result.Code != 0 {
		t.Fatalf("%s: exit code %d:\n%s", strings.Join(args, " "), result.Code, result.Output)
	}
	return result.Output
}

// of counts the records of a worker, which are those with its name in their id.
func of(records []usageRecord, worker string) (n int) {
	for _, record := range records {
		if strings.HasSuffix(record.ID, "@"+worker) {
			n++
		}
	}
	return n
}

// wantSays checks that an output has each of the texts.
func wantSays(t *testing.T, what, output string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(output, text) {
			t.Errorf("%s does not say %q:\n%s", what, text, output)
		}
	}
}

// TestDiskUsage_OneWorkerIsABuildkitd plays on a plain buildkitd, too.
func TestDiskUsage_OneWorkerIsABuildkitd(t *testing.T) {
	t.Parallel()
	tools := findTools(t)
	r := rigAt(t, tools, startEndpoint(t, tools, []farmtest.WorkerSpec{oneSlot()}), nil)
	r.Client.Build(t, "--platform", "linux/amd64", r.legsContext(t))

	records := r.usage(t)
	if len(records) < 3 {
		t.Fatalf("a build with a RUN step left %d records", len(records))
	}
	for _, record := range records {
		if strings.Contains(record.ID, "@") {
			t.Errorf("the id %q tells a worker where there is only one", record.ID)
		}
		wantEqual(t, "records of id "+record.ID, len(r.usage(t, "--filter", "id="+record.ID)), 1)
		wantSays(t, "buildctl du", r.buildctl(t, "du", "-v", "--filter", "id=="+record.ID), record.ID, record.Description)
	}
	wantSays(t, "buildx du", r.buildx(t, "du"), records[0].ID, "Total:")
	wantSays(t, "buildx du --verbose", r.buildx(t, "du", "--verbose"), records[0].ID, records[0].Description)
	wantFailure(t, farmtest.Buildctl(t, tools, r.Addr, "du", "--filter", "id=x"), "failed to parse diskusage filters [id=x]: filters: parse error")

	wantSays(t, "buildctl prune", r.buildctl(t, "prune", "--filter", "type==source.local"), "Total:")
	wantEqual(t, "local sources left", len(r.usage(t, "--filter", "type=source.local")), 0)
	if len(r.usage(t)) == 0 {
		t.Error("a filtered prune took everything")
	}
	wantSays(t, "buildx prune", r.buildx(t, "prune", "--all", "--force"), "Total:")
	wantEqual(t, "records left", len(r.usage(t)), 0)
}

func TestDiskUsage_TwoWorkersAreToldApart(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := findTools(t)
	r := rigAt(t, tools, startEndpoint(t, tools, fleet()), nil)
	r.Client.Build(t, "--platform", "linux/amd64,linux/arm64", r.legsContext(t))

	records := r.usage(t)
	amd, arm := of(records, "amd-1"), of(records, "arm-1")
	if amd == 0 || arm == 0 || amd+arm != len(records) {
		t.Fatalf("of %d records %d are amd-1's and %d arm-1's: %+v", len(records), amd, arm, records)
	}
	wantSays(t, "buildx du", r.buildx(t, "du"), "@amd-1", "@arm-1")
	wantSays(t, "buildx du --verbose", r.buildx(t, "du", "--verbose"), "@amd-1", "@arm-1")
	wantSays(t, "buildctl du -v", r.buildctl(t, "du", "-v"), "@amd-1", "@arm-1")
	for filter, want := range map[string]int{"worker=arm-1": arm, "worker!=arm-1": amd, "worker~=^a": amd + arm, "id=" + records[0].ID: 1} {
		wantEqual(t, "records with "+filter, len(r.usage(t, "--filter", filter)), want)
	}
	wantFailure(t, r.Client.Run(t, "du", "--filter", "worker=arm1"), "chooses no worker", "amd-1, arm-1")
	wantSays(t, "buildctl du", r.buildctl(t, "du", "--filter", "worker=arm-1"), "@arm-1")

	wantSays(t, "buildctl prune", r.buildctl(t, "prune", "--filter", "id=="+records[0].ID), records[0].ID)
	wantEqual(t, "records left", len(r.usage(t)), len(records)-1)
	wantSays(t, "buildx prune", r.buildx(t, "prune", "--all", "--force", "--filter", "worker=arm-1"), "@arm-1")
	left := r.usage(t)
	if of(left, "arm-1") != 0 || of(left, "amd-1") < amd-1 {
		t.Errorf("after pruning arm-1: %+v", left)
	}
	wantSays(t, "buildctl prune", r.buildctl(t, "prune", "--all"), "@amd-1")
	wantEqual(t, "records left", len(r.usage(t)), 0)
}

func TestDiskUsage_AWorkerThatIsDownIsShownAndStopsNoOther(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := findTools(t)
	r := rigAt(t, tools, startEndpoint(t, tools, fleet()), nil)
	r.Client.Build(t, "--platform", "linux/amd64,linux/arm64", r.legsContext(t))
	r.Farm.Workers[1].Buildkitd.Kill()

	wantSays(t, "buildx du", r.buildx(t, "du"), "@amd-1", "unreachable@arm-1", "Total:")
	wantSays(t, "buildx du --verbose", r.buildx(t, "du", "--verbose"), "worker arm-1 does not tell its disk usage")
	result := r.Client.Run(t, "prune", "--all", "--force")
	wantFailure(t, result, "@amd-1", "not every worker is pruned: worker arm-1")
	wantEqual(t, "records of amd-1 left", of(r.usage(t), "amd-1"), 0)
	wantSays(t, "buildx inspect", r.buildx(t, "inspect"), "linux/amd64", "linux/arm64")
}

// TestListWorkers_DescribesTheDaemons compares with what the daemons themselves say.
func TestListWorkers_DescribesTheDaemons(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := findTools(t)
	r := rigAt(t, tools, startEndpoint(t, tools, []farmtest.WorkerSpec{
		{Name: "amd-1", Slots: 1}, {Name: "a-s390x", Platforms: []string{"linux/s390x"}, Slots: 1},
	}), nil)
	const labels, versions = `{{range .}}{{json .Labels}}{{end}}`, `{{range .}}{{json .BuildkitVersion}}{{json .GCPolicy}}{{json .CDIDevices}}{{end}}`
	own := func(worker int, format string) string {
		return succeeded(t, farmtest.Buildctl(t, tools, r.Farm.Workers[worker].Buildkitd.Addr, "debug", "workers", "--format", format), nil)
	}
	wantEqual(t, "workers", strings.TrimSpace(r.buildctl(t, "debug", "workers", "--format", `{{range .}}{{.ID}} {{end}}`)), "amd-1 a-s390x")
	for i, name := range []string{"amd-1", "a-s390x"} {
		only := []string{"debug", "workers", "--filter", "id==" + name, "--format"}
		wantEqual(t, "version, GC policy and devices of "+name, r.buildctl(t, append(only, versions)...), own(i, versions))
		var ours, theirs map[string]string
		for text, into := range map[string]*map[string]string{r.buildctl(t, append(only, labels)...): &ours, own(i, labels): &theirs} {
			if err := json.Unmarshal([]byte(text), into); err != nil {
				t.Fatalf("labels: %v: %s", err, text)
			}
		}
		wantEqual(t, "label archfarm.worker", ours["archfarm.worker"], name)
		for key, value := range theirs {
			wantEqual(t, "label "+key+" of "+name, ours[key], value)
		}
	}
	wantEqual(t, "filtered by label", r.buildctl(t, "debug", "workers", "--filter", `labels."archfarm.worker"==a-s390x`, "--format", `{{range .}}{{.ID}}{{end}}`), "a-s390x\n")
	const info = `{{json .BuildkitVersion}}`
	wantEqual(t, "info", r.buildctl(t, "debug", "info", "--format", info), succeeded(t, farmtest.Buildctl(t, tools, r.Farm.Workers[0].Buildkitd.Addr, "debug", "info", "--format", info), nil))

	inspected := r.buildx(t, "inspect")
	wantSays(t, "buildx inspect", inspected, "BuildKit version:", "org.mobyproject.buildkit.worker.executor:", "archfarm.worker:", "linux/s390x")
	wantSays(t, "buildx ls", r.buildx(t, "ls"), "farm", "running", "linux/amd64", "linux/s390x")
}
