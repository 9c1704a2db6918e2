package e2e_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/exporter"
	"github.com/moby/buildkit/session/exporter/exporterprovider"
	"github.com/moby/buildkit/session/filesync"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// pinned makes two builds of the same give the same bytes.
var pinned = []string{"--allow=buildx.local.delete", "--platform", both, "--provenance=false", "--build-arg", "SOURCE_DATE_EPOCH=1700000000"}

// exportsContext is a context whose two platforms have files in common and files of their own.
func (r rig) exportsContext(t *testing.T) string {
	t.Helper()
	return r.context(t, map[string]string{
		"Dockerfile": "FROM scratch AS base\nCOPY common /\nCOPY busybox /bin/\n" +
			"FROM base AS leg-amd64\nCOPY amd /\nFROM base AS leg-arm64\nCOPY arm /\n" +
			"FROM leg-${TARGETARCH}\nARG TARGETARCH\nENV ARCH=$TARGETARCH\n",
		"common/a": "a", "common/sub/b": strings.Repeat("b", 100_000), "common/zero": "", "common/sub.x": "sorts before sub's files in a list, after them in a walk",
		"amd/only/amd": "amd", "amd/sub/m": "1", "arm/only/arm": "arm", "arm/sub/n": "2",
	})
}

// clashContext is one whose two platforms have a file in common, and no folders. One buildkitd finds that out while it
// sends the first platform's files, and then breaks that off. Of this buildx's client panics when the contents of a file in
// a folder are under way (tonistiigi/fsutil, rootdiskwriter.go: the folder is closed while its files are still written).
func (r rig) clashContext(t *testing.T) string {
	t.Helper()
	return r.context(t, map[string]string{
		"Dockerfile": "FROM scratch AS leg-amd64\nCOPY amd /\nFROM scratch AS leg-arm64\nCOPY arm /\nFROM leg-${TARGETARCH}\n",
		"amd/a":      "a", "amd/b": "amd", "arm/a": "a", "arm/c": "arm",
	})
}

// apartContext is one whose two platforms have no file in common, but folders.
func (r rig) apartContext(t *testing.T) string {
	t.Helper()
	return r.context(t, map[string]string{
		"Dockerfile":  "FROM scratch AS leg-amd64\nCOPY amd /\nFROM scratch AS leg-arm64\nCOPY arm /\nFROM leg-${TARGETARCH}\n",
		"amd/bin/amd": "amd", "amd/etc/a/deep/file": "1", "amd/x": "x", "arm/bin/arm": "arm", "arm/etc/a/file": "2", "arm/etc.d": "3",
	})
}

// plainTwin is one plain buildkitd, of which the farm must not differ.
func (r rig) plainTwin(t *testing.T) *farmtest.Client {
	t.Helper()
	farmOnly(t)
	return farmtest.StartDirect(t, r.tools).Client
}

func TestExport_FilesEqualThoseOfOneBuildkitd(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	plain := r.plainTwin(t)
	dir := r.exportsContext(t)
	for name, output := range map[string]string{
		"oci":                  "type=oci,rewrite-timestamp=true",
		"oci named":            "type=oci,rewrite-timestamp=true,name=example.com/team/app:v1,annotation-index.a=b,annotation-index-descriptor.c=d",
		"oci zstd":             "type=oci,rewrite-timestamp=true,compression=zstd,force-compression=true,name=app",
		"oci, docker's types":  "type=oci,rewrite-timestamp=true,oci-mediatypes=false",
		"oci, annotated parts": "type=oci,rewrite-timestamp=true,annotation.all=x,annotation-manifest[linux/arm64].leg=arm",
		"tar":                  "type=tar",
		"tar not split":        "type=tar,platform-split=false",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := farmtest.Folder(t)
			file := func(client *farmtest.Client, name string) []byte {
				dest, metadata := filepath.Join(out, name), filepath.Join(out, name+".json")
				client.Build(t, append(pinned, "--metadata-file", metadata, "--output", output+",dest="+dest, dir)...)
				return read(t, dest)
			}
			farm, one := file(r.Client, "farm"), file(plain, "one")
			if !bytes.Equal(farm, one) {
				t.Errorf("%d bytes of the farm differ from the %d of one buildkitd:\n%s\n%s", len(farm), len(one), listTar(t, farm), listTar(t, one))
			}
			wantEqual(t, "metadata", exporterMetadata(t, filepath.Join(out, "farm.json")), exporterMetadata(t, filepath.Join(out, "one.json")))
		})
	}
}

func TestExport_FoldersEqualThoseOfOneBuildkitd(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	plain := r.plainTwin(t)
	dir, apart := r.exportsContext(t), r.apartContext(t)
	for name, test := range map[string]struct {
		context, output string
		same            string // the output of one buildkitd that is the same, where that is not output
	}{
		"local":            {dir, "type=local", ""},
		"local, deleting":  {dir, "type=local,mode=delete", ""},
		"local, not split": {apart, "type=local,platform-split=false", ""},
		// BuildKit 0.34 leaves the files of all but the last platform empty there: MergeFS.Open never looks further.
		"local, deleting, not split":  {apart, "type=local,mode=delete,platform-split=false", "type=local,platform-split=false"},
		"oci without tar":             {dir, "type=oci,tar=false,rewrite-timestamp=true", ""},
		"oci without tar, with names": {dir, "type=oci,tar=false,rewrite-timestamp=true,name=app:v1", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := farmtest.Folder(t)
			folder := func(client *farmtest.Client, where, output string) map[string]string {
				dest := filepath.Join(out, where)
				farmtest.WriteFile(t, dest, "old", "was here before") // a file: of folders, BuildKit's client fails to delete some
				if !strings.Contains(name, "not split") {
					farmtest.WriteFile(t, dest, "linux_amd64/old", "was here before")
				}
				client.Build(t, append(pinned, "--output", output+",dest="+dest, test.context)...)
				return listFolder(t, dest)
			}
			farm, one := folder(r.Client, "farm", test.output), folder(plain, "one", cmp.Or(test.same, test.output))
			_, kept := farm["old"]
			if test.same != "" {
				delete(one, "old")
			}
			wantSame(t, farm, one)
			wantEqual(t, "what was there before is still there", kept, !strings.Contains(name, "deleting"))
		})
	}
}

func TestExport_ConflictsAndWhatNobodyCanExportAreToldAsBuildkitdTellsThem(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	plain := r.plainTwin(t)
	dir := r.clashContext(t)
	for name, test := range map[string]struct{ output, words string }{
		"the same file":           {"type=local,platform-split=false", "with linux/"},
		"the same file, deleting": {"type=local,platform-split=false,mode=delete", "cannot overwrite a from linux/amd64 with linux/arm64 when split option is disabled"},
		"an unknown mode":         {"type=local,mode=remove", "invalid local exporter mode \"remove\""},
		"a name that is none":     {"type=oci,name=App", "failed to parse App"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := farmtest.Folder(t)
			for where, client := range map[string]*farmtest.Client{"farm": r.Client, "one": plain} {
				dest := filepath.Join(out, where)
				if strings.Contains(test.output, "local") {
					farmtest.WriteFile(t, dest, "old", "was here before")
				}
				result := client.TryBuild(t, append(pinned, "--output", test.output+",dest="+dest, dir)...)
				wantFailure(t, result, test.words)
				if strings.Contains(test.output, "delete") {
					wantEqual(t, "files of the folder at "+where, fmt.Sprint(slices.Collect(maps.Keys(listFolder(t, dest)))), "[old]")
				}
			}
		})
	}
}

func TestExport_DockerTakesNoSeveralPlatforms(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.exportsContext(t)
	result := farmtest.Buildctl(t, r.tools, r.Addr, "build", "--progress=plain", "--frontend", "dockerfile.v0", // buildx refuses it before it builds
		"--local", "context="+dir, "--local", "dockerfile="+dir, "--opt", "platform="+both,
		"--output", "type=docker,name=app,dest="+filepath.Join(farmtest.Folder(t), "docker.tar"))
	wantFailure(t, result, "docker exporter does not currently support exporting manifest lists")
}

func TestExport_SeveralAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	plain := r.plainTwin(t)
	dir, other := r.exportsContext(t), newRepo(t)
	build := func(client *farmtest.Client, tag string) (out, metadata string) {
		out = farmtest.Folder(t)
		metadata = filepath.Join(out, "metadata.json")
		client.Build(t, append(pinned, "--metadata-file", metadata,
			"--output", "type=image,push=true,rewrite-timestamp=true,name="+r.ref(tag)+",annotation-index.of=first",
			"--output", "type=image,push=true,rewrite-timestamp=true,compression=uncompressed,force-compression=true,name="+r.registry.Host+"/"+other+":"+tag,
			"--output", "type=oci,rewrite-timestamp=true,dest="+filepath.Join(out, "oci.tar"),
			"--output", "type=oci,rewrite-timestamp=true,compression=zstd,force-compression=true,name=app,dest="+filepath.Join(out, "zstd.tar"),
			"--output", "type=tar,dest="+filepath.Join(out, "files.tar"),
			"--output", "type=local,dest="+filepath.Join(out, "copied"),
			"--output", "type=local,mode=delete,dest="+filepath.Join(out, "mirrored"),
			dir)...)
		return out, metadata
	}
	farm, farmMetadata := build(r.Client, "farm")
	one, oneMetadata := build(plain, "one")
	for _, repo := range []string{r.repo, other} {
		wantEqual(t, "index in "+repo, r.registry.Index(t, repo, "farm").Digest, r.registry.Index(t, repo, "one").Digest)
	}
	if r.registry.Index(t, r.repo, "farm").Annotations["of"] != "first" || r.registry.Index(t, other, "farm").Annotations["of"] != "" {
		t.Error("an exporter's annotation is not on its index, or on another's")
	}
	for _, name := range []string{"oci.tar", "zstd.tar", "files.tar"} {
		if !bytes.Equal(read(t, filepath.Join(farm, name)), read(t, filepath.Join(one, name))) {
			t.Errorf("%s differs from that of one buildkitd", name)
		}
	}
	for _, name := range []string{"copied", "mirrored"} {
		wantSame(t, listFolder(t, filepath.Join(farm, name)), listFolder(t, filepath.Join(one, name)))
	}
	wantEqual(t, "metadata", exporterMetadata(t, farmMetadata), exporterMetadata(t, oneMetadata))
}

func TestExport_AttestationsAreInTheArchive(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := filepath.Join(farmtest.Folder(t), "oci.tar")
	r.Client.Build(t, "--platform", both, "--provenance=mode=max", "--output", "type=oci,name=app:v1,attestation-inline=true,dest="+file, r.exportsContext(t))
	files := map[string]string{}
	if err := farmtest.ReadTar(bytes.NewReader(read(t, file)), files); err != nil {
		t.Fatal(err)
	}
	var layout, index ocispec.Index
	if err := json.Unmarshal([]byte(files["index.json"]), &layout); err != nil || len(layout.Manifests) != 1 {
		t.Fatalf("index.json: %v: %s", err, files["index.json"])
	}
	blob := func(d ocispec.Descriptor) string {
		content, ok := files["blobs/sha256/"+d.Digest.Encoded()]
		if !ok {
			t.Errorf("the archive lacks %s", d.Digest)
		}
		return content
	}
	if err := json.Unmarshal([]byte(blob(layout.Manifests[0])), &index); err != nil {
		t.Fatal(err)
	}
	attestations := 0
	for _, d := range index.Manifests {
		var manifest ocispec.Manifest
		if err := json.Unmarshal([]byte(blob(d)), &manifest); err != nil {
			t.Fatal(err)
		}
		blob(manifest.Config)
		for _, layer := range manifest.Layers {
			content := blob(layer)
			if farmtest.IsAttestation(d) {
				attestations++
				if !strings.Contains(content, "slsa.dev/provenance") || !strings.Contains(content, "pkg:docker/app@v1") {
					t.Errorf("no provenance of the image: %s", content)
				}
			}
		}
	}
	wantEqual(t, "images and attestations", len(index.Manifests), 4)
	wantEqual(t, "attestations", attestations, 2)
}

func TestExport_AFailedLegLeavesNoArchiveNorTag(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	farmOnly(t)
	dir := r.context(t, map[string]string{
		"Dockerfile": "FROM scratch AS leg-amd64\nCOPY busybox /bin/\n" + farmtest.Run("exit 7") + "\nFROM scratch AS leg-arm64\nCOPY busybox /\nFROM leg-${TARGETARCH}\n",
	})
	out := farmtest.Folder(t)
	result := r.Client.TryBuild(t, "--allow=buildx.local.delete", "--platform", both, "--output", "type=oci,dest="+filepath.Join(out, "oci.tar"),
		"--output", "type=tar,dest="+filepath.Join(out, "files.tar"), "--output", "type=local,mode=delete,dest="+filepath.Join(out, "files"),
		"--output", "type=image,push=true,name="+r.ref("v1"), dir)
	wantFailure(t, result, "exit code: 7")
	r.wantNoTags(t)
	wantEqual(t, "files of the mirror", len(listFolder(t, filepath.Join(out, "files"))), 0)
}

// TestExport_TheFrontendsNameForAnImage lets the exporter have the name that a frontend would choose, which it prefers.
func TestExport_TheFrontendsNameForAnImage(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	plain := r.plainTwin(t)
	dir := r.exportsContext(t)
	build := func(client *farmtest.Client, tag string) string {
		metadata := filepath.Join(farmtest.Folder(t), "metadata.json")
		client.Build(t, append(pinned, "--metadata-file", metadata,
			"--output", "type=image,push=true,rewrite-timestamp=true,name=*,image.name="+r.ref(tag), dir)...)
		return strings.ReplaceAll(exporterMetadata(t, metadata), r.ref(tag), "the name")
	}
	wantEqual(t, "metadata", build(r.Client, "farm"), build(plain, "one"))
	wantEqual(t, "index", r.registry.Index(t, r.repo, "farm").Digest, r.registry.Index(t, r.repo, "one").Digest)
}

// TestExport_ByTheClientsSession has exporters that only the client's session knows, once the build is done.
func TestExport_ByTheClientsSession(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	plain := farmtest.StartDirect(t, r.tools)
	local, err := fsutil.NewFS(r.exportsContext(t))
	if err != nil {
		t.Fatal(err)
	}
	build := func(addr, tag string) (archive []byte, answered string) {
		c, err := client.New(t.Context(), addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var asked, finished int
		var file bytes.Buffer
		provider := exporterprovider.New(func(_ context.Context, _ map[string][]byte, refs []string) ([]*exporter.ExporterRequest, error) {
			asked++
			wantEqual(t, "references", len(refs), 2)
			return []*exporter.ExporterRequest{
				{Type: client.ExporterImage, Attrs: map[string]string{"name": r.ref(tag), "push": "true", "rewrite-timestamp": "true", "source-date-epoch": "1700000000"}},
				{Type: client.ExporterOCI, Attrs: map[string]string{"rewrite-timestamp": "true", "source-date-epoch": "1700000000"}},
			}, nil
		}, exporterprovider.WithFinalizeCallback(func(_ context.Context, response map[string]string) error {
			finished++
			answered = response["containerimage.digest"]
			return nil
		}))
		_, err = c.Build(t.Context(), client.SolveOpt{
			EnableSessionExporter: true,
			LocalMounts:           map[string]fsutil.FS{"context": local, "dockerfile": local},
			Session: []session.Attachable{provider, filesync.NewFSSyncTarget(filesync.WithFSSync(2, func(map[string]string) (io.WriteCloser, error) {
				return closer{&file}, nil
			}))},
			Exports: []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": "unused"}}},
		}, "", func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
			return c.Solve(ctx, gateway.SolveRequest{Frontend: "dockerfile.v0", FrontendOpt: map[string]string{"platform": both, "build-arg:SOURCE_DATE_EPOCH": "1700000000"}})
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "questions about exporters, and ends told", asked*10+finished, 11)
		return file.Bytes(), answered
	}
	farm, farmAnswer := build(r.Addr, "farm")
	one, oneAnswer := build(plain.Addr, "one")
	if !bytes.Equal(farm, one) {
		t.Errorf("%d bytes of the farm differ from the %d of one buildkitd", len(farm), len(one))
	}
	wantEqual(t, "digest in the answer", farmAnswer, oneAnswer)
	wantEqual(t, "index", r.registry.Index(t, r.repo, "farm").Digest, r.registry.Index(t, r.repo, "one").Digest)
}

// closer is a writer that needs no closing.
type closer struct{ io.Writer }

func (closer) Close() error { return nil }

// stuck is a client's file that takes nothing until its build is given up.
type stuck struct {
	ctx     context.Context
	arrived func()
}

func (s stuck) Write([]byte) (int, error) {
	s.arrived()
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

func (s stuck) Close() error { return nil }

func TestExport_AClientThatGoesAwayLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools, data := farmtest.FindFarmTools(t), farmtest.Folder(t)
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: fleet(), CoordinatorArgs: []string{"--data-dir", data}})
	r := rigAt(t, tools, &farm.Endpoint, nil)
	local, err := fsutil.NewFS(r.exportsContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{client.ExporterOCI, client.ExporterTar} {
		ctx, cancel := context.WithCancel(t.Context())
		arrived := make(chan struct{})
		file := stuck{ctx, sync.OnceFunc(func() { close(arrived) })}
		c, err := client.New(ctx, r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			_, err := c.Solve(ctx, nil, client.SolveOpt{
				Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{"platform": both},
				LocalMounts: map[string]fsutil.FS{"context": local, "dockerfile": local},
				Exports:     []client.ExportEntry{{Type: kind, Output: func(map[string]string) (io.WriteCloser, error) { return file, nil }}},
			}, nil)
			ended <- err
		}()
		select {
		case <-arrived:
		case err := <-ended:
			t.Fatalf("%s: ended before it had exported anything: %v", kind, err)
		}
		spooled := len(listFolder(t, filepath.Join(data, "spool")))
		wantEqual(t, kind+" is spooled", spooled > 0, kind == client.ExporterOCI)
		cancel()
		if err := <-ended; err == nil {
			t.Errorf("%s: succeeded", kind)
		}
		c.Close()
		r.Farm.WaitWorkersWithin(t, goneLimit, "all slots are free", idle)
		farmtest.Eventually(t, goneLimit, "the spool is empty", func() (string, bool) {
			left := listFolder(t, filepath.Join(data, "spool"))
			return fmt.Sprint(len(left)), len(left) == 0
		})
	}
}

// exporterMetadata is what exporters answered, of the metadata that buildx writes.
func exporterMetadata(t *testing.T, file string) string {
	t.Helper()
	var all map[string]json.RawMessage
	if err := json.Unmarshal(read(t, file), &all); err != nil {
		t.Fatal(err)
	}
	for k := range all {
		if strings.HasPrefix(k, "buildx.") {
			delete(all, k)
		}
	}
	out, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// listTar is what an archive holds, for messages.
func listTar(t *testing.T, archive []byte) string {
	t.Helper()
	files := map[string]string{}
	if err := farmtest.ReadTar(bytes.NewReader(archive), files); err != nil {
		return err.Error()
	}
	var lines []string
	for name, content := range files {
		lines = append(lines, fmt.Sprintf("%s %d %.400q", name, len(content), content))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// listFolder describes everything below a folder by its path.
func listFolder(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		files[name] = info.Mode().String()
		if info.Mode().IsRegular() {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			files[name] += fmt.Sprintf(" %q", content)
		}
		return nil
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return files
}

// wantSame checks that two folders hold the same.
func wantSame(t *testing.T, got, want map[string]string) {
	t.Helper()
	for name := range got {
		if got[name] != want[name] {
			t.Errorf("%s: %.200s of the farm, %.200s of one buildkitd", name, got[name], want[name])
		}
	}
	for name := range want {
		if _, ok := got[name]; !ok {
			t.Errorf("%s is missing at the farm", name)
		}
	}
}
