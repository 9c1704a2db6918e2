package spec

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Normalize returns a valid specification in the form in which jobs are run and
// shown: platforms as legs are called, paths without detours, the Dockerfile's name.
// Tags stay as they are: Tags returns them in full.
func Normalize(spec *archfarmv1.JobSpec) *archfarmv1.JobSpec {
	spec = proto.CloneOf(spec)
	for i, name := range spec.GetPlatforms() {
		if p, err := Platform(name); err == nil {
			spec.Platforms[i] = p
		}
	}
	if spec.GetDockerfile() == "" {
		spec.Dockerfile = "Dockerfile"
	}
	spec.Dockerfile = within(spec.GetDockerfile())
	if git := spec.GetContext().GetGit(); git != nil {
		git.Subdir = within(git.GetSubdir())
	}
	return spec
}

func within(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// SpecDigest identifies what was submitted: equal specifications have equal digests, in
// every version of archfarm that knows their fields, and others have others. Fields
// that are unset count as not being there.
//
// It is over JSON with sorted keys: the binary form is not promised to be stable.
func SpecDigest(spec *archfarmv1.JobSpec) (string, error) { //nolint:revive // spec.Digest would read as a content's
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(spec)
	if err != nil {
		return "", fmt.Errorf("identifying a specification: %w", err)
	}
	var tree any
	if err := json.Unmarshal(text, &tree); err != nil {
		return "", fmt.Errorf("identifying a specification: %w", err)
	}
	if text, err = json.Marshal(tree); err != nil { // sorts keys, and has no spaces
		return "", fmt.Errorf("identifying a specification: %w", err)
	}
	sum := sha256.Sum256(text)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}
