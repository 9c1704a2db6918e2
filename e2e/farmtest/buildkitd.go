package farmtest

import (
	"os"
	"path/filepath"
	"time"
)

// startLimit is how long a daemon may take to be ready on a busy machine.
const startLimit = 30 * time.Second

// Buildkitd is a running BuildKit daemon on a unix socket.
type Buildkitd struct {
	*Process
	Addr string // unix:///…
}

// StartBuildkitd starts a buildkitd with an empty state. Its RUN steps share the machine's network, so that a
// Gate can be reached from them.
func StartBuildkitd(t T, tools Tools, name string) *Buildkitd {
	t.Helper()
	dir := Folder(t)
	socket := filepath.Join(dir, "s")
	config := WriteFile(t, dir, "buildkitd.toml", "") // not the machine's own
	process := StartProcess(t, Spec{
		Name: "buildkitd of " + name,
		Path: tools.Buildkitd,
		Args: []string{
			"--config", config, "--root", filepath.Join(dir, "root"), "--addr", "unix://" + socket,
			"--oci-worker=true", "--oci-worker-net=host", "--oci-worker-snapshotter=auto", "--oci-worker-gc=false",
			"--containerd-worker=false", "--otel-socket-path", filepath.Join(dir, "otel"),
		},
	})
	process.WaitOutput(t, startLimit, "listening", Contains("running server on"))
	if _, err := os.Stat(socket); err != nil {
		t.Fatalf("buildkitd of %s listens, but: %v", name, err)
	}
	return &Buildkitd{Process: process, Addr: "unix://" + socket}
}
