package worker

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func change(id string, action archfarmv1.WorkerChange_Action, reason string) *archfarmv1.Directive {
	return &archfarmv1.Directive{Id: id, Action: &archfarmv1.Directive_Change{Change: &archfarmv1.WorkerChange{Action: action, Reason: reason}}}
}

const (
	drainIt    = archfarmv1.WorkerChange_ACTION_DRAIN
	cordonIt   = archfarmv1.WorkerChange_ACTION_CORDON
	uncordonIt = archfarmv1.WorkerChange_ACTION_UNCORDON
)

func TestRun_AnOperatorsOrderHoldsForAllCoordinatorsAndTheNextRun(t *testing.T) {
	t.Parallel()
	b, c1, c2 := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback()), startCoordinator(t, onLoopback())
	cfg := Config{BuildKit: b.addr, Coordinators: []string{c1.addr.String(), c2.addr.String()}, Slots: 2, DataDir: filepath.Join(t.TempDir(), "new")}
	patient := hasty
	patient.welcomeWithin = patience // a stream given up in the first run would be taken for one of the second
	first := startAgent(t, cfg, patient)
	a1, a2 := c1.attach(t), c2.attach(t)
	conn := a1.open("one", true)
	a2.wantReport(ready, 1)

	r, failure := a1.direct(change("d1", drainIt, "new\nfans"))
	if failure != "" || r.GetState() != draining || r.GetReason() != "drained by an operator: new fans" || r.GetSlots().GetUsed() != 1 {
		t.Errorf("after a drain: %v, %q", r, failure)
	}
	a2.wantReport(draining, 1)
	a2.ask("two", true)
	a2.wantRefused("two", archfarmv1.Refused_CAUSE_DRAINING)
	wantInfo(t, conn) // still carried; and closes it
	a2.wantReport(draining, 0)
	if r, failure = a2.direct(change("d2", cordonIt, "")); failure != "" || r.GetState() != cordoned || r.GetReason() != "cordoned by an operator" {
		t.Errorf("after a cordon: %v, %q", r, failure)
	}
	first.cancel()
	first.wantEnd(t)

	startAgent(t, cfg, patient)
	a1 = c1.attach(t)
	c2.attach(t)
	if r := a1.hello.GetReport(); r.GetState() != cordoned {
		t.Errorf("the next run begins with %v", r)
	}
	if r, failure = a1.direct(change("d3", uncordonIt, "")); failure != "" || r.GetState() != ready {
		t.Errorf("after the end of a cordon: %v, %q", r, failure)
	}
	wantInfo(t, a1.open("three", true))
	if o, err := loadOrder(cfg.DataDir); err != nil || o != (order{}) {
		t.Errorf("kept: %v, %v", o, err)
	}
}

func TestRun_AnOrderThatCannotBeKeptIsDoneAndSaysSo(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "dir")
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}, DataDir: dir}, hasty)
	a := c.attach(t)
	if err := os.Symlink(file, dir); err != nil {
		t.Fatal(err)
	}
	r, failure := a.direct(change("d", drainIt, ""))
	if !strings.Contains(failure, "will be forgotten") || r.GetState() != draining {
		t.Errorf("%v, %q", r, failure)
	}
}

func TestRun_ReportsNowAndSaysWhatItCannotDo(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}, BuildKitRoot: t.TempDir()}, hasty)
	a := c.attach(t)
	r, failure := a.direct(&archfarmv1.Directive{Id: "now", Action: &archfarmv1.Directive_ReportNow{}})
	if failure != "" || r.GetLoad().GetDiskTotalBytes() == 0 {
		t.Errorf("a report now: %v, %q", r, failure)
	}
	for name, d := range map[string]*archfarmv1.Directive{
		"nothing": {Id: "nothing"},
	} {
		if _, failure := a.direct(d); !strings.Contains(failure, "not supported") {
			t.Errorf("%s: %q", name, failure)
		}
	}
	if _, failure := a.direct(change("unknown", 99, "")); !strings.Contains(failure, "no order") {
		t.Errorf("an unknown order: %q", failure)
	}
}

func TestRun_ReadingsMakeNoReports(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}}, hasty) // reads 50 times a second
	a := c.attach(t)
	for range 3 { // the first, and two heartbeats of a second
		a.wantReport(ready, 0)
	}
	if n := len(a.messages); n > 1 {
		t.Errorf("%d further reports", n)
	}
}

func TestRun_SaysItsPoolAndLabels(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}, Pool: "office", Labels: map[string]string{"zone": "attic"}}, hasty)
	if h := c.attach(t).hello; h.GetPool() != "office" || h.GetLabels()["zone"] != "attic" {
		t.Errorf("hello %v", h)
	}
}

func TestRun_AnUnreadableStateIsAnError(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, stateFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := Run(t.Context(), Config{Name: "w", Slots: 1, BuildKit: socketPath(t), Coordinators: []string{"127.0.0.1:1"}, DataDir: dir})
	if err == nil || !strings.Contains(err.Error(), "remove the file") {
		t.Errorf("error %v", err)
	}
}

func TestUsable(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]bool{"v0.12.5": false, "v0.10": true, "v0.10.0": false, "v0.13.0": true, "v0.0.0+unknown": true, "": true} {
		if err := usable(version); (err == nil) != want {
			t.Errorf("%q: %v", version, err)
		}
	}
}

func TestClip_KeepsTextValid(t *testing.T) {
	t.Parallel()
	if s := clip(strings.Repeat("é", maxReason)[1:]); !utf8.ValidString(clip(strings.Repeat("x", maxReason-1)+"é")) || len(s) > maxReason+3 {
		t.Error("cut within a character")
	}
}

func TestCheckLabels(t *testing.T) {
	t.Parallel()
	many := map[string]string{}
	for i := range 33 {
		many["k"+strings.Repeat("x", i)] = ""
	}
	for name, test := range map[string]struct {
		labels map[string]string
		want   string
	}{
		"none":              {nil, ""},
		"usual":             {map[string]string{"zone": "eu-1a", "example.org/rack": "7", "empty": ""}, ""},
		"too many":          {many, "at most 32"},
		"no key":            {map[string]string{"": "x"}, "a key"},
		"a long key":        {map[string]string{strings.Repeat("k", 64): ""}, "a key"},
		"a line in a key":   {map[string]string{"a\nb": ""}, "a key"},
		"a key's bad end":   {map[string]string{"a-": ""}, "a key"},
		"two prefixes":      {map[string]string{"a/b/c": ""}, "a key"},
		"a long value":      {map[string]string{"k": strings.Repeat("v", 64)}, "its value"},
		"a space in values": {map[string]string{"k": "a b"}, "its value"},
	} {
		err := CheckLabels(test.labels)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(`{"operator":{"action":"drain","reason":"x"}}`))
	f.Add([]byte(`{"operator":{"action":"explode"}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		o, err := parseState(raw)
		if err != nil {
			return
		}
		dir := t.TempDir()
		if err := saveOrder(dir, o); err != nil {
			t.Fatal(err)
		}
		again, err := loadOrder(dir)
		if err != nil || again != o {
			t.Fatalf("kept %+v, read %+v, %v", o, again, err)
		}
		if len(o.String()) > maxReason || !utf8.ValidString(o.String()) {
			t.Fatalf("reason %q", o)
		}
	})
}
