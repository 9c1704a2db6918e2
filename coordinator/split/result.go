package split

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	commonexptypes "github.com/moby/buildkit/exporter/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// perPlatform are the metadata keys of a result that a platform's key may
// follow (exptypes.KnownRefMetadataKeys, and the source date).
var perPlatform = append(slices.Clone(exptypes.KnownRefMetadataKeys), commonexptypes.ExporterEpochKey)

// Merge makes the results of a build's legs into the one that a frontend
// building all platforms would have returned: a reference for each platform.
// Results[i] belongs to legs[i].
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

// Part is what one leg's worker gets of the result that the client returned:
// the references for which mine holds (given the platform's key, empty for a
// single reference, and the reference's id, empty for an empty image), and what
// belongs to their platforms. Nil: the leg has no part in the result.
func Part(res *gwpb.Result, mine func(key, ref string) bool) (*gwpb.Result, error) {
	refs, keys := map[string]*gwpb.Ref{}, []string{}
	var others []string
	for key, ref := range refsOf("", res) {
		if mine(key, ref.GetId()) {
			refs[key] = ref
			keys = append(keys, key)
		} else {
			others = append(others, key)
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
	maps.DeleteFunc(part.Metadata, func(k string, _ []byte) bool { return hasKey(k, others) })
	if err := narrowPlatforms(part.GetMetadata(), keys); err != nil {
		return nil, err
	}
	for key, attestations := range res.GetAttestations() {
		if slices.Contains(keys, key) {
			if part.Attestations == nil {
				part.Attestations = map[string]*gwpb.Attestations{}
			}
			part.Attestations[key] = attestations
		}
	}
	return part, nil
}

// hasKey tells whether a metadata key ends in one of the platform keys.
func hasKey(metadata string, keys []string) bool {
	return slices.ContainsFunc(keys, func(key string) bool { return strings.HasSuffix(metadata, "/"+key) })
}

func narrowPlatforms(metadata map[string][]byte, keys []string) error {
	if _, ok := metadata[exptypes.ExporterPlatformsKey]; !ok {
		return nil
	}
	listed, err := exptypes.ParsePlatforms(metadata)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "reading the platforms of the build's result: %v", err)
	}
	listed.Platforms = slices.DeleteFunc(listed.Platforms, func(p exptypes.Platform) bool { return !slices.Contains(keys, p.ID) })
	metadata[exptypes.ExporterPlatformsKey], err = json.Marshal(listed)
	return err
}

func digestOf(b []byte) string { return digest.FromBytes(b).String() }
