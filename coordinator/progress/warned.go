package progress

import (
	"slices"
	"sync"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

// maxWarned bounds the memory for warnings seen before. Beyond the bound every
// warning is passed on.
const maxWarned = 1 << 12

// Warned is what the legs of one build have warned of. A frontend that builds
// several platforms warns once of what is wrong with all of them; when each leg has
// its own frontend, they all do.
type Warned struct {
	mu   sync.Mutex
	most map[digest.Digest]int // by content: how often one leg has
}

// NewWarned returns an empty set.
func NewWarned() *Warned { return &Warned{most: map[digest.Digest]int{}} }

// fresh tells whether a leg's n-th warning of one content is no other leg's.
func (w *Warned) fresh(content digest.Digest, n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n <= w.most[content] {
		return false
	}
	if _, known := w.most[content]; known || len(w.most) < maxWarned {
		w.most[content] = n
	}
	return true
}

// Together makes the leg leave out what others of the same build have warned of
// already. Call it before the first Translate.
func (l *Leg) Together(with *Warned) { l.warned, l.warnings = with, map[digest.Digest]int{} }

// fresh returns the warnings that no other leg has told. l.mu is held.
func (l *Leg) fresh(warnings []*controlapi.VertexWarning) []*controlapi.VertexWarning {
	if l.warned == nil || len(warnings) == 0 {
		return warnings
	}
	return slices.DeleteFunc(slices.Clone(warnings), func(w *controlapi.VertexWarning) bool {
		content := contentOf(w)
		if _, known := l.warnings[content]; !known && len(l.warnings) >= maxWarned {
			return false
		}
		l.warnings[content]++
		return !l.warned.fresh(content, l.warnings[content])
	})
}

// contentOf identifies a warning but for the vertex, which is the leg's own.
func contentOf(w *controlapi.VertexWarning) digest.Digest {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(&controlapi.VertexWarning{
		Level: w.GetLevel(), Short: w.GetShort(), Detail: w.GetDetail(), Url: w.GetUrl(), Info: w.GetInfo(), Ranges: w.GetRanges(),
	})
	if err != nil { // it came as a message, so it can be one; a wrong guess shows a warning too many or too few
		raw = w.GetShort()
	}
	return digest.FromBytes(raw)
}
