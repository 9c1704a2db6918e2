package worker

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRun_ItsOwnBuildkitdIsReportedAndEnded has a buildkitd that can only die; who
// answers in its place is at its socket.
func TestRun_ItsOwnBuildkitdIsReportedAndEnded(t *testing.T) {
	t.Parallel()
	c, dir := startCoordinator(t, onLoopback()), filepath.Dir(socketPath(t).Addr)
	program, fuse := filepath.Join(dir, "buildkitd"), filepath.Join(dir, "fuse")
	script := "#!/bin/sh\n[ \"$1\" = --version ] && { echo 'buildkitd github.com/moby/buildkit v0.34.2 0'; exit; }\n" +
		"while [ ! -e " + fuse + " ]; do sleep 0.05; done\necho 'buildkitd: out of coffee'; exit 7\n"
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	where := socketPath(t)
	where.Addr = filepath.Join(dir, "buildkitd.sock")
	startBuildkitd(t, where)
	r := startAgent(t, Config{Managed: &Managed{Program: program}, DataDir: dir, Coordinators: []string{c.addr.String()}}, hasty)
	a := c.attach(t)
	a.wantReport(ready, 0)
	if err := os.WriteFile(fuse, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if report := a.wantReport(unavailable, 0); !strings.Contains(report.GetReason(), "exit status 7: buildkitd: out of coffee") {
		t.Errorf("reason %q", report.GetReason())
	}
	if err := os.Remove(fuse); err != nil {
		t.Fatal(err)
	}
	a.wantReport(ready, 0)
	r.cancel()
	r.wantEnd(t)
}
