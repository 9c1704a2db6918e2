package load

import (
	"encoding/json"
	"net/http"
	"path/filepath"
	"regexp"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// registryStart is how long a registry may take to listen.
const registryStart = 30 * time.Second

var listening = regexp.MustCompile(`listening on 127\.0\.0\.1:(\d+)`)

// StartRegistry starts an empty registry on disk and returns its host: farmtest's is in memory, where each piece of a
// layer that is added takes longer than the one before.
func StartRegistry(t farmtest.T, tools farmtest.Tools) (host string) {
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

// Tags lists a repository's tags at such a registry; none for a repository that does not exist.
func Tags(t farmtest.T, host, repository string) []string {
	t.Helper()
	resp, err := http.Get("http://" + host + "/v2/" + repository + "/tags/list")
	if err != nil {
		t.Fatalf("listing the tags of %s: %v", repository, err)
	}
	defer resp.Body.Close()
	var list struct {
		Tags []string `json:"tags"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&list); resp.StatusCode == http.StatusNotFound {
		return nil
	} else if resp.StatusCode != http.StatusOK || err != nil {
		t.Fatalf("listing the tags of %s: %s, %v", repository, resp.Status, err)
	}
	return list.Tags
}
