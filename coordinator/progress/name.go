package progress

import "strings"

// StepName is name with the platform in front of it, in the form that BuildKit's
// Dockerfile frontend gives the steps of a build for several platforms:
// "[2/3] RUN x" becomes "[linux/amd64 2/3] RUN x", and "exporting to image"
// becomes "[linux/amd64] exporting to image". A name whose leading bracket
// mentions the platform already is left alone, also where it is the target of a
// cross-compiling step ("[linux/amd64->arm64 2/3] RUN x"). So is an empty name.
func StepName(platform, name string) string {
	if platform == "" || name == "" {
		return name
	}
	bracket, rest, closed := strings.Cut(name, "]")
	if !closed || !strings.HasPrefix(bracket, "[") {
		return "[" + platform + "] " + name
	}
	inside := bracket[1:]
	if mentions(inside, platform) {
		return name
	}
	if inside != "" {
		inside = " " + inside
	}
	return "[" + platform + inside + "]" + rest
}

// mentions says whether one of the words is the platform. A word may be a pair
// base->target, where a target without an operating system has the base's.
func mentions(words, platform string) bool {
	for word := range strings.FieldsSeq(words) {
		base, target, crosses := strings.Cut(word, "->")
		if base == platform || crosses && target == platform {
			return true
		}
		if os, _, ok := strings.Cut(base, "/"); crosses && ok && os+"/"+target == platform {
			return true
		}
	}
	return false
}
