package main

import (
	"path/filepath"
	"regexp"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// registryStart is how long a registry may take to listen.
const registryStart = 30 * time.Second

var listening = regexp.MustCompile(`listening on 127\.0\.0\.1:(\d+)`)

// startRegistry starts an empty registry on disk and returns its host: farmtest's is in memory, where each piece of a
// layer that is added takes longer than the one before.
func startRegistry(t farmtest.T, tools farmtest.Tools) (host string) {
	t.Helper()
	dir := farmtest.Folder(t)
	config := farmtest.WriteFile(t, dir, "registry.yml", "version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\n"+
		"storage:\n  filesystem: {rootdirectory: "+filepath.Join(dir, "data")+"}\nhttp:\n  addr: 127.0.0.1:0\n  relativeurls: true\n")
	process := farmtest.StartProcess(t, farmtest.Spec{
		Name: "registry", Path: tools.Registry, Args: []string{"serve", config}, Env: []string{"OTEL_TRACES_EXPORTER=none"},
	})
	return process.WaitOutput(t, registryStart, "listening", func(output string) string {
		if m := listening.FindStringSubmatch(output); m != nil {
			return "localhost:" + m[1] // BuildKit speaks plain HTTP to localhost
		}
		return ""
	})
}
