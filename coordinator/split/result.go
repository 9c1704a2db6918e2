package split

import (
	"cmp"
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	commonexptypes "github.com/moby/buildkit/exporter/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// perPlatform are the metadata keys of a result that a platform's key may
// follow (exptypes.KnownRefMetadataKeys, and the source date).
var perPlatform = append(slices.Clone(exptypes.KnownRefMetadataKeys), commonexptypes.ExporterEpochKey)

// Merge makes the results of a build's legs into the one that a frontend
// building all platforms would have returned: a reference for each platform.
// Results[i] belongs to legs[i]. Errors are InvalidArgument.
func Merge(legs []Leg, results []*gwpb.Result) (*gwpb.Result, error) {
	refs := map[string]*gwpb.Ref{}
	merged := &gwpb.Result{Metadata: map[string][]byte{}}
	var all exptypes.Platforms
	for i, res := range results {
		key, known, err := platformKey(legs[i], res)
		if err != nil {
			return nil, err
		}
		all.Platforms = append(all.Platforms, known...)
		for id, ref := range refsOf(key, res) {
			if _, taken := refs[id]; taken {
				return nil, status.Errorf(codes.InvalidArgument, "merging the results of the build's platforms: %s was returned twice", id)
			}
			refs[id] = ref
		}
		mergeMetadata(merged.GetMetadata(), key, res.GetMetadata())
		for id, attestations := range res.GetAttestations() {
			if merged.Attestations == nil {
				merged.Attestations = map[string]*gwpb.Attestations{}
			}
			if _, taken := merged.GetAttestations()[id]; taken {
				return nil, status.Errorf(codes.InvalidArgument, "merging the results of the build's platforms: attestations of %s were returned twice", id)
			}
			merged.Attestations[id] = attestations
		}
	}
	list, err := json.Marshal(all)
	if err != nil {
		return nil, err
	}
	merged.Metadata[exptypes.ExporterPlatformsKey] = list
	merged.Result = &gwpb.Result_Refs{Refs: &gwpb.RefMap{Refs: refs}}
	return merged, nil
}

// platformKey is the key that a leg's frontend gave its platform (Windows adds
// a version), and the platforms that it lists.
func platformKey(leg Leg, res *gwpb.Result) (string, []exptypes.Platform, error) {
	fallback := []exptypes.Platform{{ID: leg.String(), Platform: leg.Platform}}
	if _, ok := res.GetMetadata()[exptypes.ExporterPlatformsKey]; !ok {
		return leg.String(), fallback, nil
	}
	known, err := exptypes.ParsePlatforms(res.GetMetadata())
	if err != nil {
		return "", nil, status.Errorf(codes.InvalidArgument, "%s: reading the platforms of the frontend's result: %v", leg, err)
	}
	return known.Platforms[0].ID, known.Platforms, nil
}

func mergeMetadata(into map[string][]byte, key string, metadata map[string][]byte) {
	for k, v := range metadata {
		switch {
		case k == exptypes.ExporterPlatformsKey:
		case slices.Contains(perPlatform, k):
			into[k+"/"+key] = v
		default:
			into[k] = v
		}
	}
}

// refsOf lists a result's references by platform key.
func refsOf(key string, res *gwpb.Result) map[string]*gwpb.Ref {
	switch r := res.GetResult().(type) {
	case *gwpb.Result_RefDeprecated:
		return map[string]*gwpb.Ref{key: {Id: r.RefDeprecated}}
	case *gwpb.Result_Ref:
		if r.Ref != nil {
			return map[string]*gwpb.Ref{key: r.Ref}
		}
	case *gwpb.Result_RefsDeprecated:
		out := map[string]*gwpb.Ref{}
		for k, id := range r.RefsDeprecated.GetRefs() {
			out[k] = &gwpb.Ref{Id: id}
		}
		return out
	case *gwpb.Result_Refs:
		return r.Refs.GetRefs()
	}
	return map[string]*gwpb.Ref{key: {}}
}

// RefsByKey returns a result's references by their platforms' keys; a single one
// has the empty key.
func RefsByKey(res *gwpb.Result) map[string]*gwpb.Ref { return refsOf("", res) }

// Refs lists every reference of a result, those of attestations included.
func Refs(res *gwpb.Result) []*gwpb.Ref {
	var out []*gwpb.Ref
	for _, ref := range refsOf("", res) {
		out = append(out, ref)
	}
	for _, attestations := range res.GetAttestations() {
		for _, a := range attestations.GetAttestation() {
			if a.GetRef() != nil {
				out = append(out, a.GetRef())
			}
		}
	}
	return slices.DeleteFunc(out, func(r *gwpb.Ref) bool { return r.GetId() == "" })
}

// Single tells whether a result holds one reference that belongs to no platform.
func Single(res *gwpb.Result) bool {
	switch res.GetResult().(type) {
	case *gwpb.Result_Refs, *gwpb.Result_RefsDeprecated:
		return false
	}
	return true
}

// Keys lists the keys of a result's platforms in their order; the empty one for
// a result that has none.
func Keys(res *gwpb.Result) []string {
	if Single(res) {
		return []string{""}
	}
	refs := refsOf("", res)
	keys := slices.Sorted(maps.Keys(refs))
	listed, err := exptypes.ParsePlatforms(res.GetMetadata())
	if err != nil { // the exporters say so
		return keys
	}
	place := func(key string) int {
		i := slices.IndexFunc(listed.Platforms, func(p exptypes.Platform) bool { return p.ID == key })
		if i < 0 {
			return len(listed.Platforms)
		}
		return i
	}
	slices.SortStableFunc(keys, func(a, b string) int { return cmp.Compare(place(a), place(b)) })
	return keys
}

// Part is what one leg's worker gets of the result that the client returned:
// the references for which mine holds (given the platform's key, empty for a
// single reference, and the reference's id, empty for an empty image), and what
// belongs to their platforms. Nil: the leg has no part in the result. Errors are
// InvalidArgument.
func Part(res *gwpb.Result, mine func(key, ref string) bool) (*gwpb.Result, error) {
	all, refs := refsOf("", res), map[string]*gwpb.Ref{}
	for key, ref := range all {
		if len(key) > maxName {
			return nil, status.Errorf(codes.InvalidArgument, "reading the build's result: a platform's key of %d bytes, at most %d are possible", len(key), maxName)
		}
		if mine(key, ref.GetId()) {
			refs[key] = ref
		}
	}
	if len(refs) == 0 {
		return nil, nil
	}
	if Single(res) {
		return res, nil
	}
	part := &gwpb.Result{
		Result:   &gwpb.Result_Refs{Refs: &gwpb.RefMap{Refs: refs}},
		Metadata: maps.Clone(res.GetMetadata()),
	}
	own, err := narrowPlatforms(part.GetMetadata(), refs)
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(part.Metadata, func(k string, _ []byte) bool { return foreign(k, all, refs, own) })
	for key, attestations := range res.GetAttestations() {
		if _, ok := refs[key]; ok {
			if part.Attestations == nil {
				part.Attestations = map[string]*gwpb.Attestations{}
			}
			part.Attestations[key] = attestations
		}
	}
	return part, nil
}

// foreign tells whether a metadata key is about a platform that is in all of a
// result, but not in the part of it that has refs, for the platforms in own.
func foreign(metadata string, all, refs map[string]*gwpb.Ref, own map[string]bool) bool {
	if a, ok, err := exptypes.ParseAnnotationKey(metadata); ok {
		return err == nil && len(own) > 0 && a.Platform != nil && !own[a.PlatformString()]
	}
	key, ok := suffix(metadata, all)
	_, ours := refs[key]
	return ok && !ours
}

// suffix is the platform's key that a metadata key ends in: the longest, as
// keys are the frontend's choice and may end in one another.
func suffix(metadata string, all map[string]*gwpb.Ref) (string, bool) {
	rest := metadata
	if len(rest) > maxName+1 {
		rest = rest[len(rest)-maxName-1:]
	}
	for {
		_, key, found := strings.Cut(rest, "/")
		if !found {
			return "", false
		}
		if _, known := all[key]; known {
			return key, true
		}
		rest = key
	}
}

// narrowPlatforms leaves in the list of platforms those that have a reference,
// and returns them, formatted; none when there is no list.
func narrowPlatforms(metadata map[string][]byte, refs map[string]*gwpb.Ref) (map[string]bool, error) {
	if _, ok := metadata[exptypes.ExporterPlatformsKey]; !ok {
		return nil, nil
	}
	listed, err := exptypes.ParsePlatforms(metadata)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "reading the platforms of the build's result: %v", err)
	}
	own := map[string]bool{}
	listed.Platforms = slices.DeleteFunc(listed.Platforms, func(p exptypes.Platform) bool {
		_, ok := refs[p.ID]
		return !ok
	})
	for _, p := range listed.Platforms {
		own[platforms.FormatAll(p.Platform)] = true
	}
	metadata[exptypes.ExporterPlatformsKey], err = json.Marshal(listed)
	return own, err
}
