package farmtest

import (
	"os"
	"path/filepath"
	"time"
)

// startLimit is how long a daemon may take to be ready on a busy machine.
const startLimit = 30 * time.Second

// Buildkitd is a running BuildKit daemon.
type Buildkitd struct {
	*Process
	Addr string // unix:///… or tcp://host:port
}

// StartBuildkitd starts a buildkitd with an empty state, on a unix socket. Its RUN steps share the machine's network, so
// that a Gate can be reached from them.
func StartBuildkitd(t T, tools Tools, name string) *Buildkitd {
	t.Helper()
	dir := Folder(t)
	socket := filepath.Join(dir, "s")
	daemon := startBuildkitd(t, tools, name, dir, "unix://"+socket)
	if _, err := os.Stat(socket); err != nil {
		t.Fatalf("buildkitd of %s listens, but: %v", name, err)
	}
	return daemon
}

// StartBuildkitdTCP is StartBuildkitd with a local TCP port instead of a socket.
func StartBuildkitdTCP(t T, tools Tools, name string) *Buildkitd {
	t.Helper()
	return startBuildkitd(t, tools, name, Folder(t), "tcp://"+freePort(t))
}

func startBuildkitd(t T, tools Tools, name, dir, addr string) *Buildkitd {
	t.Helper()
	config := WriteFile(t, dir, "buildkitd.toml", "") // not the machine's own
	temp := filepath.Join(dir, "tmp")                 // where it mounts what it builds from: one that is killed leaves that
	if err := os.Mkdir(temp, 0o700); err != nil {
		t.Fatalf("making the folder of buildkitd's mounts: %v", err)
	}
	process := StartProcess(t, Spec{
		Name: "buildkitd of " + name,
		Env:  []string{"TMPDIR=" + temp},
		Path: tools.Buildkitd,
		Args: []string{
			"--config", config, "--root", filepath.Join(dir, "root"), "--addr", addr,
			"--oci-worker=true", "--oci-worker-net=host", "--oci-worker-snapshotter=auto", "--oci-worker-gc=false",
			"--containerd-worker=false", "--otel-socket-path", filepath.Join(dir, "otel"),
		},
	})
	process.WaitOutput(t, startLimit, "listening", Contains("running server on"))
	return &Buildkitd{Process: process, Addr: addr}
}
