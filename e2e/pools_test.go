package e2e_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/worker/native/program"
)

// member is somebody who has joined a secured farm as a client.
type member struct {
	rig
	dir string // of the certificate
}

// member joins the farm with a token for which archfarm token create was given args.
func (r rig) member(t *testing.T, name string, args ...string) member {
	t.Helper()
	m, endpoint := member{rig: r}, *r.Endpoint
	m.Endpoint = &endpoint // with a client of its own
	m.Client, m.dir = r.Farm.Secured(t, append(args, "--name", name)...)
	return m
}

// fleetCommand runs a command of archfarm with the member's certificate.
func (m member) fleetCommand(t *testing.T, args ...string) farmtest.Result {
	t.Helper()
	return farmtest.Command(t, m.tools.Archfarm, append(args, "--farm", m.Farm.Addr, "--cert-dir", m.dir)...)
}

// buildctl runs buildctl with the member's certificate.
func (m member) buildctl(t *testing.T, args ...string) farmtest.Result {
	t.Helper()
	files := []string{"--tlscacert", m.dir + "/ca.pem", "--tlscert", m.dir + "/cert.pem", "--tlskey", m.dir + "/key.pem"}
	return farmtest.Buildctl(t, m.tools, m.Farm.Addr, append(files, args...)...)
}

// names lists what the member sees of the fleet.
func (m member) names(t *testing.T) []string {
	t.Helper()
	var names []string
	for _, w := range unmarshal[[]farmtest.WorkerStatus](t, said(t, m.fleetCommand(t, "workers", "--output", "json"))) {
		names = append(names, w.Name)
	}
	slices.Sort(names)
	return names
}

// said is what a command says that must succeed.
func said(t *testing.T, result farmtest.Result) string {
	t.Helper()
	if result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	return result.Output
}

func twoPools() []farmtest.WorkerSpec {
	return []farmtest.WorkerSpec{{Name: "mac-1", Slots: 1, Pool: "office"}, {Name: "graviton-1", Slots: 2, Pool: "cloud"}}
}

// TestPools_ACertificateNamesWhatItMayUse has a client that may use the office only.
func TestPools_ACertificateNamesWhatItMayUse(t *testing.T) {
	t.Parallel()
	all, _ := office(t, twoPools()...)
	m := all.member(t, "builder", "--pool", "office")
	wantList(t, "what it sees", m.names(t), "mac-1")
	seen := said(t, m.buildctl(t, "debug", "workers", "--verbose"))
	wantTexts(t, "buildctl debug workers", seen, "mac-1")
	if strings.Contains(seen, "graviton-1") {
		t.Errorf("buildctl debug workers tells of another pool:\n%s", seen)
	}
	one := unmarshal[[]explained](t, said(t, m.fleetCommand(t, "explain", "linux/amd64", "--output", "json")))
	if len(one) != 1 || len(one[0].Workers) != 1 || one[0].Workers[0].Worker != "mac-1" {
		t.Errorf("archfarm explain tells of %+v", one)
	}

	// The cloud is the better choice each time: it has more free slots.
	m.buildsAMD64(t, "v1")
	m.Client.Build(t, "--platform", "linux/amd64", "--no-cache", "--push", "-t", m.ref("v2"), m.legsContext(t))
	m.Client.Build(t, "--platform", "linux/amd64", "--build-arg", "archfarm.pool=office", "--push", "-t", m.ref("v3"), m.legsContext(t))
	wantEqual(t, "attempts in the office", m.attempts(t)["mac-1"], 3)

	refused := m.Client.TryBuild(t, "--platform", "linux/amd64", "--build-arg", "archfarm.pool=cloud", "--push", "-t", m.ref("refused"), m.legsContext(t))
	wantFailure(t, refused, "may not use the pool cloud", "PermissionDenied")
	t.Logf("refused: %s", refused.Output[strings.LastIndex(refused.Output, "ERROR:"):])
	wantFailure(t, m.fleetCommand(t, "explain", "linux/amd64", "--pool", "cloud"), "may not use the pool cloud")
	wantFailure(t, m.fleetCommand(t, "drain", "mac-1"), "drain mac-1", "client builder") // who builds does not operate
	wantEqual(t, "attempts in the cloud", m.attempts(t)["graviton-1"], 0)
	wantList(t, "tags", m.registry.Tags(t, m.repo), "v1", "v2", "v3")

	all.Farm.Manage(t, "cordon", "mac-1")
	waiting := m.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", m.ref("v4"), m.legsContext(t))
	waiting.WaitOutput(t, startLimit, "that it waits though the cloud is idle", lineAbout("cordoned"))
	all.Farm.Manage(t, "uncordon", "mac-1")
	if code := waiting.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, waiting.Output())
	}
	wantEqual(t, "attempts in the cloud", m.attempts(t)["graviton-1"], 0)
}

// TestPools_ABuildArgAsksForOneAndGoesNoFurther chooses the pool of each build, with a certificate for any.
func TestPools_ABuildArgAsksForOneAndGoesNoFurther(t *testing.T) {
	t.Parallel()
	r, _ := office(t, twoPools()...)
	dockerfile := "FROM scratch\nCOPY busybox /bin/busybox\nARG archfarm.pool\nARG wanted.pool\n" +
		`RUN ["/bin/busybox", "dd", "if=/proc/self/environ", "of=/environment"]` + "\n" // a shell would take out what has a dot
	dir := r.context(t, map[string]string{"Dockerfile": dockerfile})
	for i, pool := range []string{"cloud", "office", "cloud"} {
		file := filepath.Join(farmtest.Folder(t), "metadata.json")
		tag := pool + string(rune('a'+i))
		r.Client.Build(t, "--platform", "linux/amd64", "--no-cache", "--provenance", "mode=max", "--metadata-file", file,
			"--build-arg", "archfarm.pool="+pool, "--build-arg", "wanted.pool=yes", "--push", "-t", r.ref(tag), dir)
		index := r.registry.Index(t, r.repo, tag)
		environment := r.registry.Image(t, r.repo, index.For(t, "linux/amd64")).Files["environment"]
		if !strings.Contains(environment, "wanted.pool=yes\x00") || strings.Contains(environment, "archfarm") {
			t.Errorf("the step's environment is %q", environment)
		}
		provenance := readMetadata(t, file).all["buildx.build.provenance"]
		if !bytes.Contains(provenance, []byte(`"build-arg:wanted.pool"`)) || bytes.Contains(provenance, []byte("archfarm.pool="+pool)) || bytes.Contains(provenance, []byte("build-arg:archfarm")) {
			t.Errorf("the provenance is %s", provenance)
		}
	}
	wantEqual(t, "attempts in the cloud", r.attempts(t)["graviton-1"], 2)
	wantEqual(t, "attempts in the office", r.attempts(t)["mac-1"], 1)

	// As its workers may still be coming, this is no refusal yet.
	none := r.Client.StartBuild(t, "--platform", "linux/amd64", "--build-arg", "archfarm.pool=basement", "--push", "-t", r.ref("none"), dir)
	t.Logf("a pool without workers: %s", none.WaitOutput(t, startLimit, "what it waits for", lineAbout("basement")))
	none.Kill()
	wantFailure(t, r.Client.TryBuild(t, "--platform", "linux/amd64", "--build-arg", "archfarm.pool=a/b", "--push", "-t", r.ref("none"), dir),
		"no pool can be called", "a/b")
}

// TestTenants_DoNotSeeEachOther has two clients at one farm, and looks with the eyes of the second.
func TestTenants_DoNotSeeEachOther(t *testing.T) {
	t.Parallel()
	r, _ := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1})
	acme, globex := r.member(t, "ci-1", "--tenant", "acme"), r.member(t, "ci-2", "--tenant", "globex")
	running, gate := acme.atGate(t, "running", "linux/amd64")
	waiting := acme.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", acme.ref("waiting"), acme.legsContext(t))
	waiting.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))

	queue := func(m member) []queued {
		return unmarshal[[]queued](t, said(t, m.fleetCommand(t, "queue", "--output", "json")))
	}
	own := queue(acme)
	if len(own) != 1 || own[0].Tenant != "acme" {
		t.Fatalf("acme sees the queue as %+v", own)
	}
	wantTexts(t, "acme's explain", said(t, acme.fleetCommand(t, "explain", own[0].Build)), "waiting", "mac-1")
	if others := queue(globex); len(others) != 0 {
		t.Errorf("globex sees the queue as %+v", others)
	}
	ahead := unmarshal[[]explained](t, said(t, globex.fleetCommand(t, "explain", "linux/amd64", "--output", "json")))
	if len(ahead) != 1 || !strings.Contains(ahead[0].Summary, "1 leg comes first") { // that it is busy is no secret
		t.Errorf("globex is told %+v", ahead)
	}
	denied := globex.fleetCommand(t, "explain", own[0].Build)
	wantFailure(t, denied, "no such build is running")
	wantEqual(t, "what is said of a build that does not exist", strings.ReplaceAll(globex.fleetCommand(t, "explain", "nonesuch").Output, "nonesuch", own[0].Build), denied.Output)

	gate.Open()
	r.wantBuilt(t, running, "running")
	if code := waiting.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, waiting.Output())
	}
	theirs := globex.recorded(t, "--platform", "linux/amd64", "--push", "-t", globex.ref("theirs"), globex.legsContext(t))
	wantEqual(t, "acme's build in acme's history", acme.has(t, own[0].Build), 1)
	wantEqual(t, "acme's build in globex' history", globex.has(t, own[0].Build), 0)
	wantEqual(t, "globex' build in acme's history", acme.has(t, theirs), 0)
	wantEqual(t, "globex' build in globex' history", globex.has(t, theirs), 1)
	for _, command := range []string{"logs", "inspect", "trace", "rm"} {
		wantFailure(t, globex.Client.Run(t, "history", command, own[0].Build))
	}
	globex.history(t, "rm", "--all")
	wantEqual(t, "globex' build after globex has cleared its history", globex.has(t, theirs), 0)
	wantTexts(t, "acme's logs after that", acme.history(t, "logs", own[0].Build), "uname -m")
}

// TestEmulation_OnlyWhereThePoolAllowsIt registers an emulator for arm64 programs, and has a pool that may use it. It
// takes part in no other test at the same time: a handler is there for the whole machine.
func TestEmulation_OnlyWhereThePoolAllowsIt(t *testing.T) {
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	emulates, _ := registerARM64(t, tools)
	if !emulates {
		t.Skip("SKIPPED: no emulator: install qemu-user-static")
	}
	r := newFarm(t, farmtest.FarmOptions{
		Workers: []farmtest.WorkerSpec{
			{Name: "native-1", Slots: 4, Args: []string{"--pool", "native"}},
			{Name: "slow-1", Slots: 1, Args: []string{"--pool", "slow"}},
		},
		CoordinatorArgs: []string{"--allow-emulation", "slow"},
	})
	r.Farm.WaitWorkers(t, "the emulator is seen", func(list []farmtest.WorkerStatus) bool {
		return len(list) == 2 && !slices.ContainsFunc(list, func(w farmtest.WorkerStatus) bool { return !slices.Contains(w.Emulated, "linux/arm64") })
	})
	// The shell is of amd64 and runs as ever; the program is what only an emulator can run here.
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nCOPY --chmod=755 program /program\n" +
		farmtest.Run("/program > /said") + "\n"})
	if err := os.WriteFile(filepath.Join(dir, "program"), program.Bytes("arm64"), 0o600); err != nil {
		t.Fatal(err)
	}
	result := r.Client.Build(t, "--platform", "linux/arm64", "--push", "-t", r.ref("v1"), dir)
	wantTexts(t, "the progress", result.Output, "assigned to worker slow-1 (emulated: no native worker")
	image := r.registry.Image(t, r.repo, r.registry.Index(t, r.repo, "v1").For(t, "linux/arm64"))
	wantTexts(t, "the program", image.Files["said"], "qemu", "aarch64")
	wantEqual(t, "platform", farmtest.PlatformName(&image.Config.Platform), "linux/arm64")
	wantEqual(t, "attempts where emulation is not allowed", r.attempts(t)["native-1"], 0)
	wantTexts(t, "archfarm explain", r.archfarm(t, "explain", "linux/arm64"), "would run on slow-1", "emulated", "its pool does not allow emulation")

	wantFailure(t, r.Client.TryBuild(t, "--platform", "linux/arm64", "--build-arg", "archfarm.pool=native", "--push", "-t", r.ref("v2"), dir),
		"no native worker for linux/arm64")
	wantList(t, "tags", r.registry.Tags(t, r.repo), "v1")

	r.Farm.AddWorker(t, farmtest.WorkerSpec{Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1})
	r.Farm.WaitWorkers(t, "a native worker is there", isState("arm-1", farmtest.Ready, ""))
	wantTexts(t, "archfarm explain", r.archfarm(t, "explain", "linux/arm64"), "would run on arm-1", "does not emulate what others run natively")
}
