package e2e_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// TestSecrets_AreNowhereButInTheirSteps runs jobs, one that succeeds and one that fails, with every kind of secret, and
// looks for each in all that the farm has written, stored and answered.
func TestSecrets_AreNowhereButInTheirSteps(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	const password = "Registry-Pass-73f1a9"
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{User: "ci", Password: password})
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: fleet(), CoordinatorArgs: []string{"--log-level", "debug"}})
	r := jobsAt(t, rigAt(t, tools, &farm.Endpoint, registry))
	const sent, stored, token = "Sent-Secret-55b0c2", "Stored-Secret-9e41d7", "Git-Token-c2a8f3"
	folder := farmtest.Folder(t)
	if made := r.Farm.Archfarm(t, "secret", "create", "stored", "--from-file", farmtest.WriteFile(t, folder, "stored", stored)); made.Code != 0 {
		t.Fatalf("archfarm secret create: %s", made.Output)
	}
	dockerfile := "FROM scratch\nCOPY app/busybox /bin/busybox\n" + farmtest.Run(
		`{ test "$(/bin/busybox cat /run/secrets/sent /run/secrets/stored | /bin/busybox wc -c)" = %LENGTH% && echo right > /verdict; }`,
		"--mount=type=secret,id=sent", "--mount=type=secret,id=stored") + "\n"
	dir := r.context(t, map[string]string{"app/placeholder": ""})
	if err := os.Rename(filepath.Join(dir, "busybox"), filepath.Join(dir, "app", "busybox")); err != nil {
		t.Fatal(err)
	}
	farmtest.WriteFile(t, dir, "Dockerfile", strings.ReplaceAll(dockerfile, "%LENGTH%", fmt.Sprint(len(sent)+len(stored))))
	commit(t, dir)
	url := serveGit(t, dir, token)

	farmtest.WriteFile(t, folder, "config.json", fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, registry.Host, base64.StdEncoding.EncodeToString([]byte("ci:"+password))))
	env := []string{"DOCKER_CONFIG=" + folder, "SENT=" + sent, "TOKEN=" + token}
	submit := func(tag, file string) farmtest.Result {
		return r.command(t, env, r.tools.Archfarm, "submit", "--farm", r.Farm.Addr, "--output", "json", "--context", url+"#main", "--file", file, "--platform", "linux/amd64", "--tag", r.ref(tag),
			"--secret", "id=sent,env=SENT", "--secret", "id=stored,name=stored", "--secret", "id=GIT_AUTH_TOKEN,env=TOKEN", "--provenance", "mode=max")
	}
	var good, bad struct{ ID string }
	readJSON(t, submit("v1", "Dockerfile").Output, &good)
	readJSON(t, submit("v2", "missing").Output, &bad)
	done := r.ended(t, good.ID, archfarmv1.Job_STATE_SUCCEEDED)
	r.ended(t, bad.ID, archfarmv1.Job_STATE_FAILED)
	index := r.registry.Index(t, r.repo, "v1")
	wantEqual(t, "what the step saw", r.registry.Image(t, r.repo, index.For(t, "linux/amd64")).Files["verdict"], "right\n")

	heaps := map[string][]byte{"the coordinator's output": []byte(r.Farm.Coordinator.Output()), "the job": []byte(protojson.Format(done)), "the published image": index.Raw}
	for _, args := range [][]string{{"jobs", "--output", "json"}, {"logs", good.ID}, {"logs", bad.ID}, {"watch", good.ID, "--progress", "rawjson"}, {"watch", bad.ID, "--progress", "plain"}, {"secret", "list"}} {
		heaps["archfarm "+strings.Join(args, " ")] = []byte(r.Farm.Archfarm(t, args[0], args[1:]...).Output)
	}
	for _, w := range r.Farm.Workers {
		heaps["the output of "+w.Name] = []byte(w.Agent.Output())
	}
	files := 0
	if err := filepath.WalkDir(r.Farm.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		files++
		heaps[path], err = os.ReadFile(path)
		return err
	}); err != nil || files < 3 {
		t.Fatalf("reading the coordinator's folder: %d files, %v", files, err)
	}
	for _, secret := range []string{sent, stored, token, password} {
		for _, form := range []string{secret, base64.StdEncoding.EncodeToString([]byte(secret)), base64.StdEncoding.EncodeToString([]byte("ci:" + secret)), base64.StdEncoding.EncodeToString([]byte("x-access-token:" + secret))} {
			for where, heap := range heaps {
				if bytes.Contains(heap, []byte(form)) {
					t.Errorf("%s is in %s", form, where)
				}
			}
		}
	}
}
