package dispatch

import (
	"context"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/split"
)

const (
	// importingStep is how BuildKit calls a step that imports a cache (solver/llbsolver/bridge.go).
	importingStep = "importing cache manifest from "
	// indexTimeout bounds the wait for a registry that holds an imported cache. BuildKit asks
	// it again, and says what is wrong.
	indexTimeout = 10 * time.Second
	// maxIndexes bounds the references of one build that are looked at.
	maxIndexes = 20
)

// imageIndexes are what the references are that a build imports caches from, each looked at once.
type imageIndexes struct {
	mu    sync.Mutex
	found map[split.ImportedCache]func() ocispecs.Index
}

// importing is a frontend request of the leg with the caches that it is to import.
func (l *leg) importing(req *gwpb.SolveRequest) (*gwpb.SolveRequest, error) {
	caches, err := split.ImportedCaches(req)
	if err != nil {
		return nil, err
	}
	if req, err = l.platform().Importing(req, l.build.indexes(caches)); err != nil {
		return nil, err
	}
	return l.build.cache.Import(l.platform(), req)
}

// indexes looks at references, as many at a time as there are.
func (b *Build) indexes(caches []split.ImportedCache) map[split.ImportedCache]ocispecs.Index {
	out := map[split.ImportedCache]ocispecs.Index{}
	if b.farm.Index == nil {
		return out
	}
	looks := make([]func() ocispecs.Index, len(caches))
	b.images.mu.Lock()
	if b.images.found == nil {
		b.images.found = map[split.ImportedCache]func() ocispecs.Index{}
	}
	for i, c := range caches {
		if b.images.found[c] == nil && len(b.images.found) < maxIndexes {
			b.images.found[c] = sync.OnceValue(func() ocispecs.Index { return b.index(c) })
		}
		looks[i] = b.images.found[c]
	}
	b.images.mu.Unlock()
	found := make([]ocispecs.Index, len(caches))
	var looking sync.WaitGroup
	for i, look := range looks {
		if look != nil {
			looking.Go(func() { found[i] = look() })
		}
	}
	looking.Wait()
	for i, c := range caches {
		out[c] = found[i]
	}
	return out
}

func (b *Build) index(c split.ImportedCache) ocispecs.Index {
	ctx, done := context.WithTimeout(b.ctx, indexTimeout)
	defer done()
	index, err := b.farm.Index(ctx, b.req.GetSession(), c)
	if err != nil {
		b.log.Debug("looking whether a cache is an image's", "ref", c.Ref, "error", err)
	}
	return index
}

// platform is the leg's, for the name of the farm's own cache.
func (l *leg) platform() split.Leg {
	if l.Unnamed() {
		return split.Leg{Platform: l.build.farm.DefaultPlatform(l.build.allowed()...)}
	}
	return l.Leg
}

// withoutMiss takes out of a worker's progress that the farm's own cache could not be
// imported: the client has not asked for it.
func (l *leg) withoutMiss(s *controlapi.StatusResponse) *controlapi.StatusResponse {
	if l.build.cache == nil {
		return s
	}
	for _, v := range s.GetVertexes() {
		if v.GetError() != "" && v.GetName() == importingStep+l.build.cache.Ref(l.platform()) {
			l.build.log.Debug("the farm's cache was not imported", "leg", l.String(), "error", v.GetError())
			v.Error = ""
		}
	}
	return s
}
