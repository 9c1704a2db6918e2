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
	mu     sync.Mutex
	most   map[digest.Digest]int // by content: how often one leg has
	first  bool                  // the first leg has told what is wrong with the source
	holder *Leg                  // whose warnings of the source are held
	held   []*controlapi.VertexWarning
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

// told notes that the first leg has told what is wrong with the source.
func (w *Warned) told() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.first = true
}

// hold keeps a leg's warning of the source, in case the first leg does not come to
// tell its own. Those of one leg are enough.
func (w *Warned) hold(l *Leg, warning *controlapi.VertexWarning) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.holder == nil {
		w.holder = l
	}
	if w.holder == l && len(w.held) < maxWarned {
		w.held = append(w.held, warning)
	}
}

// Untold returns, for a build that failed, what is wrong with the source where the
// first leg was stopped before it could tell; nil otherwise.
func (w *Warned) Untold() *controlapi.StatusResponse {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.first || len(w.held) == 0 {
		return nil
	}
	return &controlapi.StatusResponse{Warnings: w.held}
}

// Together makes the leg leave out what others of the same build have warned of
// already. Of what its frontend finds in the source, only the first leg tells, as
// BuildKit's frontend does only for its first platform. Call it before the first
// Translate.
func (l *Leg) Together(with *Warned, first bool) {
	l.warned, l.second, l.warnings = with, !first, map[digest.Digest]int{}
}

// fresh returns the warnings that are the leg's to tell. l.mu is held.
func (l *Leg) fresh(warnings []*controlapi.VertexWarning) []*controlapi.VertexWarning {
	if l.warned == nil || len(warnings) == 0 {
		return warnings
	}
	return slices.DeleteFunc(slices.Clone(warnings), func(w *controlapi.VertexWarning) bool {
		if w.GetInfo() != nil && l.second {
			l.warned.hold(l, l.warning(w))
			return true
		}
		if w.GetInfo() != nil {
			l.warned.told()
		}
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
