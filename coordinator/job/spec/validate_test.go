package spec_test

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/archfarm/archfarm/coordinator/job/spec"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const commit = "0123456789abcdef0123456789abcdef01234567"

// whole is a request with everything in it, and nothing wrong.
func whole() *archfarmv1.SubmitRequest {
	return &archfarmv1.SubmitRequest{
		RequestId: "pipeline 17",
		Spec: &archfarmv1.JobSpec{
			Context:    gitContext("https://github.com/org/app.git", "main", "services/api"),
			Dockerfile: "build/Dockerfile", Target: "release",
			Platforms:   []string{"linux/amd64", "linux/arm64", "linux/arm/v7"},
			Tags:        []string{"registry.example.com:5000/app:{{.GitSHA}}", "app:{{ .Branch }}-{{.ShortSHA}}-{{.Date}}", "app:{{.Version}}", "app:{{.Major}}.{{.Minor}}.{{.Patch}}", "app"},
			BuildArgs:   map[string]string{"VERSION": "a=b\nc", "EMPTY": "", "archfarm.pool": "office,cloud"},
			Labels:      map[string]string{"org.opencontainers.image.title": "app"},
			Annotations: map[string]string{"org.opencontainers.image.title": "app"},
			Secrets:     []*archfarmv1.SecretRef{{Id: "npm"}, {Id: "signing", Name: "release-key"}},
			CacheFrom:   []*archfarmv1.CacheEntry{cache("registry", "ref", "app:cache"), cache("gha", "token", "secret:gha")},
			CacheTo:     []*archfarmv1.CacheEntry{cache("inline"), cache("registry", "ref", "app:cache", "mode", "max"), cache("s3", "bucket", "b", "region", "r"), cache("azblob", "account_url", "https://a")},
			Provenance:  "mode=max,version=v1", Sbom: "generator=docker/scout-sbom-indexer:latest",
			Priority: -100, Timeout: durationpb.New(time.Hour), MaxAttempts: 3,
			Metadata: map[string]string{"pipeline": "https://ci.example.com/17"},
		},
		Secrets:     map[string][]byte{"npm": []byte("hunter2"), "gha": []byte("hunter2"), "GIT_AUTH_TOKEN": []byte("hunter2"), "GIT_AUTH_HEADER.github.com": []byte("basic aHVudGVyMg==")},
		Credentials: []*archfarmv1.RegistryCredential{{Host: "registry.example.com:5000", Username: "ci", Password: "hunter2"}, {Host: "https://index.docker.io/v1/", IdentityToken: "hunter2"}},
	}
}

func gitContext(url, ref, subdir string) *archfarmv1.BuildContext {
	return &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Git{Git: &archfarmv1.GitContext{Url: url, Ref: ref, Subdir: subdir}}}
}

func digestContext(digest string, source *archfarmv1.Source) *archfarmv1.BuildContext {
	return &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Digest{Digest: digest}, Source: source}
}

func cache(kind string, attrs ...string) *archfarmv1.CacheEntry {
	c := &archfarmv1.CacheEntry{Type: kind, Attrs: map[string]string{}}
	for i := 0; i < len(attrs); i += 2 {
		c.Attrs[attrs[i]] = attrs[i+1]
	}
	return c
}

// violations are an error's, by field.
func violations(t *testing.T, err error) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	if err == nil {
		return out
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Fatalf("%v, want InvalidArgument", err)
	}
	for _, d := range status.Convert(err).Details() {
		if bad, ok := d.(*errdetails.BadRequest); ok {
			for _, v := range bad.GetFieldViolations() {
				out[v.GetField()] = append(out[v.GetField()], v.GetDescription())
			}
		}
	}
	if len(out) == 0 {
		t.Fatalf("%v has no violations", err)
	}
	return out
}

func TestValidate_TakesWhatIsRight(t *testing.T) {
	t.Parallel()
	if err := spec.Validate(whole()); err != nil {
		t.Error(err)
	}
	small := &archfarmv1.SubmitRequest{Spec: &archfarmv1.JobSpec{Context: digestContext("sha256:"+strings.Repeat("a", 64), nil), Platforms: []string{"windows/amd64"}}}
	if err := spec.Validate(small); err != nil {
		t.Error(err)
	}
	small.Spec.Context.Source = &archfarmv1.Source{Url: "ssh://git@example.com/a.git", Commit: commit, Branch: "feature/x", Tag: "v1", Dirty: true}
	if err := spec.Validate(small); err != nil {
		t.Error(err)
	}
}

// TestValidate_NamesTheField breaks one thing at a time.
func TestValidate_NamesTheField(t *testing.T) {
	t.Parallel()
	type request = archfarmv1.SubmitRequest
	source := func(s *archfarmv1.Source) func(*request) {
		return func(r *request) { r.Spec.Context = digestContext("sha256:"+strings.Repeat("a", 64), s) }
	}
	many := func(n int) map[string]string {
		m := map[string]string{}
		for i := range n {
			m[fmt.Sprint("k", i)] = ""
		}
		return m
	}
	for name, c := range map[string]struct {
		breaks func(*request)
		field  string
		says   string
	}{
		"no specification":  {func(r *request) { r.Spec = nil }, "spec", "required"},
		"request id":        {func(r *request) { r.RequestId = strings.Repeat("x", 129) }, "request_id", "at most 128"},
		"request id, lines": {func(r *request) { r.RequestId = "a\nb" }, "request_id", "control"},
		"no context":        {func(r *request) { r.Spec.Context = nil }, "spec.context", "required"},
		"git password":      {func(r *request) { r.Spec.Context = gitContext("https://ci:hunter2@github.com/a", "", "") }, "spec.context.git.url", "GIT_AUTH_TOKEN"},
		"git token":         {func(r *request) { r.Spec.Context = gitContext("https://hunter2@github.com/a", "", "") }, "spec.context.git.url", "GIT_AUTH_TOKEN"},
		"git file":          {func(r *request) { r.Spec.Context = gitContext("file:///etc", "", "") }, "spec.context.git.url", "https://"},
		"git ref":           {func(r *request) { r.Spec.Context.GetGit().Ref = "-x" }, "spec.context.git.ref", "begins with"},
		"git subdir":        {func(r *request) { r.Spec.Context.GetGit().Subdir = "a/../../b" }, "spec.context.git.subdir", "leads out"},
		"git source":        {func(r *request) { r.Spec.Context.Source = &archfarmv1.Source{} }, "spec.context.source", "leave it out"},
		"digest":            {func(r *request) { r.Spec.Context = digestContext("sha256:x", nil) }, "spec.context.digest", "UploadContext"},
		"source commit":     {source(&archfarmv1.Source{Commit: "abc"}), "spec.context.source.commit", "in full"},
		"source password":   {source(&archfarmv1.Source{Url: "https://a:hunter2@b/c"}), "spec.context.source.url", "credentials"},
		"source branch":     {source(&archfarmv1.Source{Branch: "a..b"}), "spec.context.source.branch", "revision"},
		"dockerfile":        {func(r *request) { r.Spec.Dockerfile = "../Dockerfile" }, "spec.dockerfile", "leads out"},
		"dockerfile, root":  {func(r *request) { r.Spec.Dockerfile = "/etc/passwd" }, "spec.dockerfile", "absolute"},
		"dockerfile, dir":   {func(r *request) { r.Spec.Dockerfile = "a/.." }, "spec.dockerfile", "itself"},
		"dockerfile, back":  {func(r *request) { r.Spec.Dockerfile = `..\Dockerfile` }, "spec.dockerfile", "leads out"},
		"target":            {func(r *request) { r.Spec.Target = strings.Repeat("x", 256) }, "spec.target", "at most"},
		"no platform":       {func(r *request) { r.Spec.Platforms = nil }, "spec.platforms", "required"},
		"platform":          {func(r *request) { r.Spec.Platforms[1] = "linux/" }, "spec.platforms[1]", "malformed"},
		"platform list":     {func(r *request) { r.Spec.Platforms[1] = "linux/arm64,linux/s390x" }, "spec.platforms[1]", "comma"},
		"empty platform":    {func(r *request) { r.Spec.Platforms[0] = "" }, "spec.platforms[0]", "empty"},
		"platform twice":    {func(r *request) { r.Spec.Platforms = []string{"arm64", "linux/arm64/v8"} }, "spec.platforms[1]", "spec.platforms[0]"},
		"platforms": {func(r *request) { r.Spec.Platforms = slices.Repeat([]string{"linux/amd64"}, 65) },
			"spec.platforms", "at most 64"},
		"tag":            {func(r *request) { r.Spec.Tags[0] = "Registry/APP:x" }, "spec.tags[0]", "lowercase"},
		"tag, field":     {func(r *request) { r.Spec.Tags[4] = "app:{{.Gitsha}}" }, "spec.tags[4]", "{{.GitSHA}}"},
		"tags":           {func(r *request) { r.Spec.Tags = slices.Repeat([]string{"app"}, 65) }, "spec.tags", "at most 64"},
		"build arg":      {func(r *request) { r.Spec.BuildArgs["a=b"] = "" }, `spec.build_args["a=b"]`, "'='"},
		"build arg, nul": {func(r *request) { r.Spec.BuildArgs["a"] = "\x00" }, `spec.build_args["a"]`, "NUL"},
		"build arg, key": {func(r *request) { r.Spec.BuildArgs[""] = "a" }, "spec.build_args", "empty"},
		"build args":     {func(r *request) { r.Spec.BuildArgs = many(1001) }, "spec.build_args", "at most 1000"},
		"pool":           {func(r *request) { r.Spec.BuildArgs["archfarm.pool"] = "a b" }, `spec.build_args["archfarm.pool"]`, "no pool can be called"},
		"label":          {func(r *request) { r.Spec.Labels["a"] = strings.Repeat("x", 65<<10) }, `spec.labels["a"]`, "at most"},
		"annotation":     {func(r *request) { r.Spec.Annotations["manifest[linux/amd64]:a"] = "b" }, `spec.annotations["manifest[linux/amd64]:a"]`, "image index"},
		"metadata":       {func(r *request) { r.Spec.Metadata["a"] = strings.Repeat("x", 1025) }, `spec.metadata["a"]`, "at most"},
		"secret unsent":  {func(r *request) { delete(r.Secrets, "npm") }, "spec.secrets[0]", "has to come with"},
		"secret unused":  {func(r *request) { r.Secrets["other"] = nil }, `secrets["other"]`, "nothing uses it"},
		"secret no id":   {func(r *request) { r.Spec.Secrets[1].Id = "" }, "spec.secrets[1].id", "required"},
		"secret twice":   {func(r *request) { r.Spec.Secrets[1] = &archfarmv1.SecretRef{Id: "npm"} }, "spec.secrets[1].id", "twice"},
		"secret name":    {func(r *request) { r.Spec.Secrets[1].Name = "../x" }, "spec.secrets[1].name", "letters"},
		"secret both":    {func(r *request) { r.Secrets["signing"] = []byte("x") }, `secrets["signing"]`, "stored secret"},
		"secret size":    {func(r *request) { r.Secrets["npm"] = make([]byte, 500<<10+1) }, `secrets["npm"]`, "at most 512000"},
		"git token line": {func(r *request) { r.Secrets["GIT_AUTH_TOKEN"] = []byte("hunter2\n") }, `secrets["GIT_AUTH_TOKEN"]`, "line break"},
		"cache local":    {func(r *request) { r.Spec.CacheFrom[0] = cache("local", "src", "/x") }, "spec.cache_from[0]", "no client"},
		"cache type":     {func(r *request) { r.Spec.CacheTo[1] = cache("magic") }, "spec.cache_to[1]", "registry"},
		"cache inline":   {func(r *request) { r.Spec.CacheFrom[1] = cache("inline"); delete(r.Secrets, "gha") }, "spec.cache_from[1]", "type=registry"},
		"cache ref":      {func(r *request) { r.Spec.CacheTo[1] = cache("registry") }, "spec.cache_to[1]", "ref"},
		"cache mode":     {func(r *request) { r.Spec.CacheTo[1].Attrs["mode"] = "all" }, "spec.cache_to[1]", "min or max"},
		"cache token":    {func(r *request) { r.Spec.CacheFrom[1].Attrs["token"] = "hunter2"; delete(r.Secrets, "gha") }, "spec.cache_from[1]", "secret:ID"},
		"cache secret":   {func(r *request) { r.Spec.CacheFrom[1].Attrs["token"] = "secret:none"; delete(r.Secrets, "gha") }, `spec.cache_from[1].attrs["token"]`, "none"},
		"provenance":     {func(r *request) { r.Spec.Provenance = "mode=all" }, "spec.provenance", "min or max"},
		"provenance, no": {func(r *request) { r.Spec.Provenance = "maybe" }, "spec.provenance", "true, false"},
		"sbom":           {func(r *request) { r.Spec.Sbom = "generator=A B" }, "spec.sbom", "generator"},
		"priority":       {func(r *request) { r.Spec.Priority = 101 }, "spec.priority", "between -100 and 100"},
		"attempts":       {func(r *request) { r.Spec.MaxAttempts = -1 }, "spec.max_attempts", "between"},
		"timeout":        {func(r *request) { r.Spec.Timeout = durationpb.New(-1) }, "spec.timeout", "between"},
		"timeout, mad":   {func(r *request) { r.Spec.Timeout = &durationpb.Duration{Seconds: 1, Nanos: -1} }, "spec.timeout", "no duration"},
		"no host":        {func(r *request) { r.Credentials[0].Host = "" }, "credentials[0].host", "required"},
		"host twice":     {func(r *request) { r.Credentials[1].Host = r.Credentials[0].Host }, "credentials[1].host", "two"},
		"no password":    {func(r *request) { r.Credentials[0].Password = "" }, "credentials[0]", "username and password"},
		"both":           {func(r *request) { r.Credentials[0].IdentityToken = "hunter2" }, "credentials[0]", "not both"},
		"large":          {func(r *request) { r.Secrets["npm"] = make([]byte, 9<<20) }, "", "at most 8388608"},
		"large spec":     {func(r *request) { r.Spec.BuildArgs["a"] = strings.Repeat("x", 300<<10) }, "spec", "at most 262144"},
		"no UTF-8":       {func(r *request) { r.Spec.Target = "\xff" }, "spec.target", "UTF-8"},
		"unknown field": {func(r *request) { r.Spec.Context.GetGit().ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 0x01}) },
			"spec.context.git", "older than the client"},
	} {
		req := whole()
		c.breaks(req)
		err := spec.Validate(req)
		got := violations(t, err)
		if len(got) != 1 || len(got[c.field]) != 1 || !strings.Contains(strings.Join(got[c.field], ""), c.says) {
			t.Errorf("%s: %v, want %s to say %q", name, got, c.field, c.says)
		}
		if err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: the message %v does not say it", name, err)
		}
		if strings.Contains(fmt.Sprint(err, got), "hunter2") {
			t.Errorf("%s: a secret is shown: %v", name, err)
		}
	}
}

func TestValidate_TellsEveryFaultAtOnce(t *testing.T) {
	t.Parallel()
	req := whole()
	req.Spec.Platforms[1], req.Spec.Tags[0], req.Spec.Dockerfile, req.Spec.Priority = "nope/", "{{.X}}", "../x", 1000
	delete(req.Secrets, "npm")
	err := spec.Validate(req)
	got := violations(t, err)
	want := []string{"spec.dockerfile", "spec.platforms[1]", "spec.priority", "spec.secrets[0]", "spec.tags[0]"}
	if fields := slices.Sorted(maps.Keys(got)); !slices.Equal(fields, want) {
		t.Errorf("%v, want %v", fields, want)
	}
	for _, field := range want {
		if !strings.Contains(err.Error(), field+": ") {
			t.Errorf("the message does not name %s: %v", field, err)
		}
	}
}

// TestValidate_ErrorsFitIntoTrailers: gRPC's implementations take 8 KiB of them.
func TestValidate_ErrorsFitIntoTrailers(t *testing.T) {
	t.Parallel()
	req := whole()
	for i := range 60 {
		req.Spec.Tags = append(req.Spec.Tags[:min(i, len(req.Spec.Tags))], strings.Repeat("Ü", 200))
		req.Spec.BuildArgs[fmt.Sprintf("%d=%s", i, strings.Repeat("x", 200))] = ""
	}
	err := spec.Validate(req)
	if size := proto.Size(status.Convert(err).Proto()); size*4/3+len(err.Error()) > 8<<10 {
		t.Errorf("%d bytes of status, and %d of message", size, len(err.Error()))
	}
	if got := violations(t, err); len(got[""]) != 1 || !strings.Contains(got[""][0], "more") {
		t.Errorf("it does not say that there are more: %v", got[""])
	}
}

func TestNormalize(t *testing.T) {
	t.Parallel()
	in := whole().Spec
	in.Platforms, in.Dockerfile, in.Context.GetGit().Subdir = []string{"arm64", "linux/aarch64", "linux/arm"}, "", "./a//b/."
	before := proto.CloneOf(in)
	out := spec.Normalize(in)
	if want := []string{"linux/arm64", "linux/arm64", "linux/arm/v7"}; !slices.Equal(out.GetPlatforms(), want) || out.GetDockerfile() != "Dockerfile" || out.GetContext().GetGit().GetSubdir() != "a/b" {
		t.Errorf("%v", out)
	}
	if !proto.Equal(in, before) {
		t.Error("it changes what it is given")
	}
}

func TestSpecDigest_OfEqualSpecificationsOnly(t *testing.T) {
	t.Parallel()
	of := func(s *archfarmv1.JobSpec) string {
		d, err := spec.SpecDigest(s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	base := of(whole().Spec)
	if got := of(&archfarmv1.JobSpec{Platforms: []string{"linux/amd64"}, Priority: 3, BuildArgs: map[string]string{"b": "2", "a": "<1>"}}); got != "sha256:c51719993ef19ae8e8dcebbbcac9911e1fa8e3ec53ae4d49c9289c39361f7d21" {
		t.Errorf("the digest is another than in the version that stored it: %s", got)
	}
	for range 20 { // maps have no order
		if again := of(whole().Spec); again != base {
			t.Fatalf("%s, then %s", base, again)
		}
	}
	seen := map[string]string{base: "whole"}
	for name, change := range map[string]func(*archfarmv1.JobSpec){
		"platforms": func(s *archfarmv1.JobSpec) { s.Platforms = s.Platforms[:1] },
		"arg":       func(s *archfarmv1.JobSpec) { s.BuildArgs["VERSION"] = "2" },
		"context":   func(s *archfarmv1.JobSpec) { s.Context.GetGit().Ref = "other" },
		"flag":      func(s *archfarmv1.JobSpec) { s.NoCache = true },
		"timeout":   func(s *archfarmv1.JobSpec) { s.Timeout = durationpb.New(time.Minute) },
	} {
		s := whole().Spec
		change(s)
		if other, twice := seen[of(s)]; twice {
			t.Errorf("%s and %s are alike", name, other)
		}
		seen[of(s)] = name
	}
}

func TestFillCaches(t *testing.T) {
	t.Parallel()
	in := whole().Spec.CacheFrom
	out, err := spec.FillCaches(in, map[string][]byte{"gha": []byte("hunter2")})
	if err != nil || out[1].GetAttrs()["token"] != "hunter2" || in[1].GetAttrs()["token"] != "secret:gha" || out[0].GetAttrs()["ref"] != "app:cache" {
		t.Errorf("%v, %v, %v", out, in, err)
	}
	if out, err := spec.FillCaches(in, nil); err == nil || !strings.Contains(err.Error(), "gha") {
		t.Errorf("without the secret: %v, %v", out, err)
	}
}

func FuzzValidate(f *testing.F) {
	for _, req := range []*archfarmv1.SubmitRequest{whole(), {}, {Spec: &archfarmv1.JobSpec{Platforms: []string{"a,b", "\x00"}, Tags: []string{"{{"}}}} {
		raw, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		req := &archfarmv1.SubmitRequest{}
		if proto.Unmarshal(raw, req) != nil {
			return
		}
		before := proto.CloneOf(req)
		err := spec.Validate(req)
		if !proto.Equal(req, before) {
			t.Error("the request was changed")
		}
		if err != nil {
			violations(t, err)
			if size := proto.Size(status.Convert(err).Proto()); size > 6<<10 {
				t.Errorf("an error of %d bytes", size)
			}
			return
		}
		checkValid(t, req)
	})
}

// checkValid checks what those who get a valid request rely upon.
func checkValid(t *testing.T, req *archfarmv1.SubmitRequest) {
	t.Helper()
	s := spec.Normalize(req.GetSpec())
	if seen := slices.Compact(slices.Sorted(slices.Values(s.GetPlatforms()))); len(seen) != len(s.GetPlatforms()) || len(seen) == 0 {
		t.Errorf("platforms: %q", s.GetPlatforms())
	}
	for _, name := range []string{s.GetDockerfile(), s.GetContext().GetGit().GetSubdir()} {
		if strings.HasPrefix(name, "/") || slices.Contains(strings.Split(name, "/"), "..") {
			t.Errorf("a path leads out: %q", name)
		}
	}
	if _, err := spec.SpecDigest(req.GetSpec()); err != nil {
		t.Error(err)
	}
	again := &archfarmv1.SubmitRequest{Spec: s, Secrets: req.GetSecrets(), Credentials: req.GetCredentials()}
	if err := spec.Validate(again); err != nil {
		t.Errorf("what was normalised is not valid: %v", err)
	}
	full := &archfarmv1.Source{Commit: commit, Branch: "main", Tag: "v1.2.3"}
	if _, err := spec.Tags(s, full, time.Unix(0, 0)); err != nil {
		t.Errorf("a valid request's tags: %v", err)
	}
	if secret, err := spec.FillCaches(s.GetCacheFrom(), map[string][]byte{}); err == nil && bytes.Contains([]byte(fmt.Sprint(secret)), []byte("\x00")) {
		t.Error("a NUL in a cache")
	}
}
