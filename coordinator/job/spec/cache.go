package spec

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"google.golang.org/protobuf/proto"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// secretPrefix before a cache's attribute says that its value is that of a secret.
const secretPrefix = "secret:"

// cacheTypes are BuildKit's caches that need no client, and their attributes that
// have to be there.
var cacheTypes = map[string][]string{
	"registry": {"ref"},
	"inline":   nil,
	"gha":      nil,
	"s3":       {"bucket", "region"},
	"azblob":   {"account_url"},
}

// cacheCredentials are attributes whose values nobody may see.
var cacheCredentials = []string{"token", "ghtoken", "secret_access_key", "session_token"}

// ParseCache reads a cache as buildx's --cache-from and --cache-to take it:
// type=registry,ref=app:cache, or a reference.
func ParseCache(text string) (*archfarmv1.CacheEntry, error) {
	fields, err := pairs(text)
	if err != nil {
		return nil, fmt.Errorf("reading the cache: %w", err)
	}
	if len(fields) == 1 && !strings.Contains(fields[0], "=") {
		return &archfarmv1.CacheEntry{Type: "registry", Attrs: map[string]string{"ref": fields[0]}}, nil
	}
	out := &archfarmv1.CacheEntry{Attrs: map[string]string{}}
	for _, field := range fields {
		name, value, ok := strings.Cut(field, "=")
		switch name = strings.ToLower(name); {
		case !ok:
			return nil, fmt.Errorf("reading the cache: %s: want name=value", quote(field))
		case name == "type":
			out.Type = value
		default:
			out.Attrs[name] = value
		}
	}
	if out.Type == "" {
		return nil, fmt.Errorf("reading the cache: it has no type (want type=registry,ref=…)")
	}
	return out, nil
}

// FillCaches returns caches whose attributes of the form "secret:ID" have the values
// of these secrets. Not to be logged or kept.
func FillCaches(list []*archfarmv1.CacheEntry, secrets map[string][]byte) ([]*archfarmv1.CacheEntry, error) {
	var out []*archfarmv1.CacheEntry
	for _, entry := range list {
		entry = proto.CloneOf(entry)
		for name, value := range entry.GetAttrs() {
			id, ok := strings.CutPrefix(value, secretPrefix)
			if !ok {
				continue
			}
			secret, ok := secrets[id]
			if !ok {
				return nil, fmt.Errorf("filling in the %s cache: its attribute %s names the secret %s, which is not there", entry.GetType(), name, quote(id))
			}
			entry.Attrs[name] = string(secret)
		}
		out = append(out, entry)
	}
	return out, nil
}

func checkCaches(f *faults, field string, list []*archfarmv1.CacheEntry, check func(*archfarmv1.CacheEntry) error) {
	if len(list) > MaxCaches {
		f.add(field, "%d caches, at most %d are possible", len(list), MaxCaches)
		return
	}
	for i, entry := range list {
		checkMap(f, under(at(field, i), "attrs"), entry.GetAttrs(), bounds{entries: 64, key: 128, value: 4 << 10})
		if err := checkCache(entry); err != nil {
			f.err(at(field, i), err)
			continue
		}
		f.err(at(field, i), check(entry))
	}
}

func checkCache(entry *archfarmv1.CacheEntry) error {
	required, known := cacheTypes[entry.GetType()]
	switch {
	case entry.GetType() == "local":
		return errors.New("a local cache is a folder of the client's, and a job has no client: use type=registry,ref=…")
	case !known:
		return fmt.Errorf("the type %s is unknown: want one of %s", quote(entry.GetType()), strings.Join(slices.Sorted(maps.Keys(cacheTypes)), ", "))
	}
	for _, name := range required {
		if entry.GetAttrs()[name] == "" {
			return fmt.Errorf("a cache of type %s needs the attribute %s", entry.GetType(), name)
		}
	}
	if _, ok := entry.GetAttrs()["type"]; ok {
		return errors.New("type is a field of its own, not an attribute")
	}
	if ref := entry.GetAttrs()["ref"]; entry.GetType() == "registry" {
		if _, err := reference.ParseNormalizedNamed(ref); err != nil {
			return fmt.Errorf("ref=%s: %w", quote(ref), err)
		}
	}
	for _, name := range cacheCredentials {
		if value := entry.GetAttrs()[name]; value != "" && !strings.HasPrefix(value, secretPrefix) {
			return fmt.Errorf("everyone who may see the job could read the attribute %s: send its value as a secret, and say %s=%sID here", name, name, secretPrefix)
		}
	}
	return nil
}

func checkCacheFrom(entry *archfarmv1.CacheEntry) error {
	if entry.GetType() == "inline" {
		return errors.New("an inline cache is imported from its image: use type=registry,ref=IMAGE")
	}
	return nil
}

func checkCacheTo(entry *archfarmv1.CacheEntry) error {
	switch mode := entry.GetAttrs()["mode"]; mode {
	case "", "min", "max":
		return nil
	default:
		return fmt.Errorf("mode=%s: want min or max", quote(mode))
	}
}

// checkCacheSecrets checks that the secrets are there which caches name, and marks
// them as used.
func checkCacheSecrets(f *faults, req *archfarmv1.SubmitRequest, used map[string]bool) {
	check := func(field string, list []*archfarmv1.CacheEntry) {
		for i, entry := range list[:min(len(list), MaxCaches)] {
			for _, name := range slices.Sorted(maps.Keys(entry.GetAttrs())) {
				id, ok := strings.CutPrefix(entry.GetAttrs()[name], secretPrefix)
				if !ok {
					continue
				}
				if _, sent := req.GetSecrets()[id]; !sent && !used[id] {
					f.add(key(under(at(field, i), "attrs"), name), "the secret %s is neither in secrets nor in spec.secrets", quote(id))
				}
				used[id] = true
			}
		}
	}
	check("spec.cache_from", req.GetSpec().GetCacheFrom())
	check("spec.cache_to", req.GetSpec().GetCacheTo())
}
