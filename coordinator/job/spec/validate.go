// Package spec reads what a job is to be: it tells every fault of a submitted
// specification, and fills in its tags. It does no I/O.
package spec

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/gitref"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Bounds of a request. Sizes are in bytes, of each unless it says otherwise.
const (
	MaxRequest   = 8 << 20 // the whole request
	MaxSpec      = 256 << 10
	MaxRequestID = 128
	MaxPlatforms = 64
	MaxTags      = 64
	MaxTag       = 1 << 10
	MaxPath      = 4 << 10
	MaxSecrets   = 100
	// MaxSecret is BuildKit's own.
	MaxSecret      = secretsprovider.MaxSecretSize
	MaxCaches      = 64
	MaxCredentials = 100
	MaxPriority    = 100
	MaxTimeout     = 7 * 24 * time.Hour
	MaxAttempts    = 100

	maxTarget   = 255
	maxSecretID = 255
	maxAttests  = 4 << 10
	maxPassword = 64 << 10
	maxHost     = 512
)

// Validate tells everything that is wrong with a request, as InvalidArgument with a
// google.rpc.BadRequest: one violation per fault, whose field is a path of names as
// in job.proto (spec.platforms[1], secrets["npm"]). It shows no secret.
func Validate(req *archfarmv1.SubmitRequest) error {
	const doing = "reading the job"
	f := &faults{}
	if size := proto.Size(req); size > MaxRequest {
		f.add("", "the request is %d bytes long, at most %d are possible", size, MaxRequest)
		return f.status(doing)
	}
	if req.GetSpec() == nil {
		f.add("spec", "required")
		return f.status(doing)
	}
	if size := proto.Size(req.GetSpec()); size > MaxSpec {
		f.add("spec", "%d bytes long, at most %d are possible", size, MaxSpec)
		return f.status(doing)
	}
	if checkText(f, "", req.ProtoReflect()); len(f.list) > 0 {
		return f.status(doing) // what follows may take texts for texts
	}
	checkName(f, "request_id", req.GetRequestId(), MaxRequestID)
	checkSpec(f, req.GetSpec())
	checkSecrets(f, req)
	checkCredentials(f, req.GetCredentials())
	return f.status(doing)
}

func checkSpec(f *faults, spec *archfarmv1.JobSpec) {
	checkContext(f, "spec.context", spec.GetContext())
	checkPath(f, "spec.dockerfile", spec.GetDockerfile())
	checkName(f, "spec.target", spec.GetTarget(), maxTarget)
	checkPlatforms(f, spec.GetPlatforms())
	checkTags(f, spec.GetTags())
	checkMap(f, "spec.build_args", spec.GetBuildArgs(), bounds{entries: 1000, key: 255, value: 64 << 10})
	if _, err := split.Pools(map[string]string{"build-arg:" + split.PoolArg: spec.GetBuildArgs()[split.PoolArg]}); err != nil && hasPool(spec) {
		f.err(key("spec.build_args", split.PoolArg), plain(err))
	}
	checkMap(f, "spec.labels", spec.GetLabels(), bounds{entries: 1000, key: 1 << 10, value: 64 << 10})
	checkMap(f, "spec.annotations", spec.GetAnnotations(), bounds{entries: 1000, key: 1 << 10, value: 64 << 10})
	for _, name := range slices.Sorted(maps.Keys(spec.GetAnnotations())) {
		f.err(key("spec.annotations", name), checkAnnotation(name))
	}
	checkMap(f, "spec.metadata", spec.GetMetadata(), bounds{entries: 64, key: 128, value: 1 << 10})
	checkCaches(f, "spec.cache_from", spec.GetCacheFrom(), checkCacheFrom)
	checkCaches(f, "spec.cache_to", spec.GetCacheTo(), checkCacheTo)
	f.err("spec.provenance", checkProvenance(spec.GetProvenance()))
	f.err("spec.sbom", checkSBOM(spec.GetSbom()))
	checkRun(f, spec)
}

func hasPool(spec *archfarmv1.JobSpec) bool {
	_, ok := spec.GetBuildArgs()[split.PoolArg]
	return ok
}

// checkRun checks how a job is run.
func checkRun(f *faults, spec *archfarmv1.JobSpec) {
	if p := spec.GetPriority(); p < -MaxPriority || p > MaxPriority {
		f.add("spec.priority", "%d is not between %d and %d", p, -MaxPriority, MaxPriority)
	}
	if n := spec.GetMaxAttempts(); n < 0 || n > MaxAttempts {
		f.add("spec.max_attempts", "%d is not between 1 and %d, or 0 for the coordinator's", n, MaxAttempts)
	}
	if t := spec.GetTimeout(); t != nil {
		switch d := t.AsDuration(); {
		case t.CheckValid() != nil:
			f.add("spec.timeout", "it is no duration")
		case d < 0, d > MaxTimeout:
			f.add("spec.timeout", "%v is not between 0s and %v", d, MaxTimeout)
		case d > 0 && d < time.Second:
			f.add("spec.timeout", "%v is shorter than a second", d)
		}
	}
}

func checkPlatforms(f *faults, names []string) {
	switch {
	case len(names) == 0:
		f.add("spec.platforms", "required: name at least one, as linux/amd64")
	case len(names) > MaxPlatforms:
		f.add("spec.platforms", "%d platforms, at most %d are possible", len(names), MaxPlatforms)
		return
	}
	first := map[string]int{}
	for i, name := range names {
		p, err := Platform(name)
		if err != nil {
			f.err(at("spec.platforms", i), err)
			continue
		}
		if j, twice := first[p]; twice {
			f.add(at("spec.platforms", i), "%s is the same platform as spec.platforms[%d] (%s)", quote(name), j, p)
			continue
		}
		first[p] = i
	}
}

// Platform returns a platform in the form in which legs have it: "arm64" and
// "linux/arm64/v8" are "linux/arm64".
func Platform(name string) (string, error) {
	if strings.TrimSpace(name) == "" {
		return "", errors.New("it is empty (want os/arch, as linux/arm64)")
	}
	if strings.Contains(name, ",") {
		return "", errors.New("it contains a comma: give each platform as an element of its own")
	}
	legs, err := split.Legs(map[string]string{"platform": name})
	if err != nil {
		return "", plain(err)
	}
	return legs[0].String(), nil
}

// checkPath checks the path of something within the context.
func checkPath(f *faults, field, name string) {
	checkName(f, field, name, MaxPath)
	clean := path.Clean("/" + strings.ReplaceAll(name, `\`, "/"))
	switch {
	case name == "":
	case strings.HasPrefix(name, "/"):
		f.add(field, "%s is absolute: give it relative to the context", quote(name))
	case escapes(name):
		f.add(field, "%s leads out of the context", quote(name))
	case clean == "/" && field == "spec.dockerfile":
		f.add(field, "%s is the context itself, not a file in it", quote(name))
	}
}

// escapes tells whether a path leads out of where it begins, at any of its steps.
func escapes(name string) bool {
	depth := 0
	for part := range strings.FieldsFuncSeq(name, func(r rune) bool { return r == '/' || r == '\\' }) {
		switch part {
		case ".":
		case "..":
			if depth--; depth < 0 {
				return true
			}
		default:
			depth++
		}
	}
	return false
}

// checkName checks a text of one line.
func checkName(f *faults, field, text string, limit int) {
	if len(text) > limit {
		f.add(field, "%d bytes long, at most %d are possible", len(text), limit)
		return
	}
	if strings.ContainsFunc(text, unicode.IsControl) {
		f.add(field, "it contains control characters")
	}
}

// bounds of a map: how many entries, and how many bytes a key and a value.
type bounds struct{ entries, key, value int }

// checkMap checks what becomes key=value in BuildKit's options.
func checkMap(f *faults, field string, m map[string]string, b bounds) {
	if len(m) > b.entries {
		f.add(field, "%d entries, at most %d are possible", len(m), b.entries)
		return
	}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		switch {
		case name == "":
			f.add(field, "a key is empty")
		case strings.Contains(name, "="):
			f.add(key(field, name), "a key cannot contain '='")
		}
		checkName(f, key(field, name), name, b.key)
		if n := len(m[name]); n > b.value {
			f.add(key(field, name), "%d bytes long, at most %d are possible", n, b.value)
		}
	}
}

// SecretName tells what is wrong with the name of a stored secret.
func SecretName(name string) error {
	if !identity.ValidName(name) {
		return fmt.Errorf("%s cannot be a secret's name: use 1 to 128 letters, digits, '.', '_' and '-'", quote(name))
	}
	return nil
}

// checkSecrets checks that each secret is there and has a use.
func checkSecrets(f *faults, req *archfarmv1.SubmitRequest) {
	refs, values := req.GetSpec().GetSecrets(), req.GetSecrets()
	if len(refs) > MaxSecrets {
		f.add("spec.secrets", "%d secrets, at most %d are possible", len(refs), MaxSecrets)
		return
	}
	if len(values) > MaxSecrets {
		f.add("secrets", "%d secrets, at most %d are possible", len(values), MaxSecrets)
		return
	}
	used := map[string]bool{} // by value
	seen := map[string]bool{}
	for i, ref := range refs {
		field := at("spec.secrets", i)
		checkSecretRef(f, field, ref, seen)
		_, sent := values[ref.GetId()]
		switch {
		case ref.GetName() == "" && !sent && ref.GetId() != "":
			f.add(field, "the secret %s has no name, so its value has to come with the request, in secrets", quote(ref.GetId()))
		case ref.GetName() != "" && sent:
			f.add(key("secrets", ref.GetId()), "%s takes the stored secret %s: leave out the name or the value", field, quote(ref.GetName()))
		}
		used[ref.GetId()] = true
	}
	checkCacheSecrets(f, req, used)
	for _, id := range slices.Sorted(maps.Keys(values)) {
		checkSecretValue(f, id, values[id], used[id])
	}
}

func checkSecretRef(f *faults, field string, ref *archfarmv1.SecretRef, seen map[string]bool) {
	id := ref.GetId()
	switch {
	case id == "":
		f.add(under(field, "id"), "required: by it, build steps mount the secret")
	case seen[id]:
		f.add(under(field, "id"), "the id %s is there twice", quote(id))
	}
	seen[id] = true
	checkName(f, under(field, "id"), id, maxSecretID)
	if ref.GetName() != "" {
		f.err(under(field, "name"), SecretName(ref.GetName()))
	}
}

func checkSecretValue(f *faults, id string, value []byte, used bool) {
	field := key("secrets", id)
	checkName(f, field, id, maxSecretID)
	if len(value) > MaxSecret {
		f.add(field, "%d bytes long, at most %d are possible", len(value), MaxSecret)
	}
	switch {
	case id == "":
		f.add("secrets", "an id is empty")
	case gitref.AuthSecret(id):
		f.err(field, gitref.CheckAuth(id, value))
	case !used:
		f.add(field, "nothing uses it: list its id in spec.secrets, or leave it out")
	}
}

func checkCredentials(f *faults, list []*archfarmv1.RegistryCredential) {
	if len(list) > MaxCredentials {
		f.add("credentials", "%d credentials, at most %d are possible", len(list), MaxCredentials)
		return
	}
	seen := map[string]bool{}
	for i, c := range list {
		field := at("credentials", i)
		switch host := c.GetHost(); {
		case host == "":
			f.add(under(field, "host"), "required: the registry, as registry.example.com:5000")
		case strings.ContainsFunc(host, unicode.IsSpace), strings.Contains(host, "@"):
			f.add(under(field, "host"), "it is no registry's host")
		case seen[host]:
			f.add(under(field, "host"), "%s has two credentials", quote(host))
		}
		seen[c.GetHost()] = true
		checkName(f, under(field, "host"), c.GetHost(), maxHost)
		checkName(f, under(field, "username"), c.GetUsername(), maxHost)
		for name, secret := range map[string]string{"password": c.GetPassword(), "identity_token": c.GetIdentityToken()} {
			if len(secret) > maxPassword {
				f.add(under(field, name), "%d bytes long, at most %d are possible", len(secret), maxPassword)
			}
		}
		switch {
		case c.GetIdentityToken() == "" && (c.GetUsername() == "" || c.GetPassword() == ""):
			f.add(field, "give username and password, or identity_token")
		case c.GetIdentityToken() != "" && c.GetPassword() != "":
			f.add(field, "give a password or an identity_token, not both")
		}
	}
}
