package dispatch

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/cache"
	"github.com/archfarm/archfarm/coordinator/split"
)

// CacheManifest is where a build's answer has the descriptor of its cache's manifest
// (BuildKit, cache/remotecache, ExporterResponseManifestDesc).
const CacheManifest = "cache.manifest"

// maxCacheNotes bounds the vertices of a worker's progress that notes are taken of.
const maxCacheNotes = 100

// Cache is a cache that legs exported, each its share, and that is to become one.
type Cache struct {
	split.CacheExport
	// Shares of the legs that had something to export, in the order of the result's
	// platforms.
	Shares []cache.Share
}

// cacheNotes are what a worker's progress tells of the caches that it exports: the
// manifest of each, of which the answer to the solve names the last one only.
type cacheNotes struct {
	mu        sync.Mutex
	names     map[string]string        // of vertices that export a cache, by their digest
	manifests map[string]digest.Digest // by vertex
}

// written is how BuildKit tells of a manifest (cache/remotecache/export.go).
var written = regexp.MustCompile(`^writing cache (?:image )?manifest (sha256:[0-9a-f]{64})$`)

func (n *cacheNotes) take(s *controlapi.StatusResponse) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.names == nil {
		n.names, n.manifests = map[string]string{}, map[string]digest.Digest{}
	}
	for _, v := range s.GetVertexes() {
		if split.ExportsCache(v.GetName()) && len(n.names) < maxCacheNotes {
			n.names[v.GetDigest()] = v.GetName()
		}
	}
	for _, line := range s.GetStatuses() {
		if m := written.FindStringSubmatch(line.GetID()); m != nil && n.names[line.GetVertex()] != "" {
			n.manifests[line.GetVertex()] = digest.Digest(m[1])
		}
	}
}

// manifest is what an export of the attempt wrote, by the session that it used; empty for nothing.
// BuildKit numbers the vertices of the exports (solver/llbsolver/export.go).
func (n *cacheNotes) manifest(session string, e split.CacheExport) digest.Digest {
	n.mu.Lock()
	defer n.mu.Unlock()
	nth := 0
	for i := range maxCacheNotes {
		vertex := digest.FromString(fmt.Sprint(session, "-cache-", i)).String()
		if n.names[vertex] != e.Step {
			continue
		}
		if nth == e.Nth {
			return n.manifests[vertex]
		}
		nth++
	}
	return ""
}

// cacheShares are the manifests that the leg wrote, by the place of their exports among
// those that are merged.
func (l *leg) cacheShares(ctx context.Context, response map[string]string) ([]digest.Digest, error) {
	merged := l.build.caches.Merged()
	out := make([]digest.Digest, len(merged))
	if len(merged) == 0 {
		return out, nil
	}
	var last ocispecs.Descriptor
	if err := json.Unmarshal([]byte(response[CacheManifest]), &last); err != nil || last.Digest.Validate() != nil {
		return out, nil // nothing was exported, or what could not be may be missing
	}
	if !l.build.caches.Several() {
		out[0] = last.Digest
		return out, nil
	}
	select { // the rest of the progress, as Attempt.finish does
	case <-l.attempt.status:
	case <-time.After(statusGrace):
	case <-l.attempt.conn.Down():
		return nil, fmt.Errorf("%s: which caches worker %s exported: %w", l, l.worker.Name, errNotTold)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	for i, e := range merged {
		out[i] = l.notes.manifest(l.exposed(), e)
	}
	return out, nil
}

// errNotTold: the worker is gone before it has told everything.
var errNotTold = status.Error(codes.Unavailable, "its connection ended before it had told")

// exposed is the session that the leg's worker knows.
func (l *leg) exposed() string {
	if l.session != "" {
		return l.session
	}
	return l.build.req.GetSession()
}

// collectCaches joins what the legs exported as caches. What is answered of them is said
// when they are merged.
func (b *Build) collectCaches(shares []share, parts []exported, out *Exported) {
	merged := b.caches.Merged()
	for i, e := range merged {
		c := Cache{CacheExport: e}
		for j, part := range parts {
			if d := part.caches[i]; d != "" {
				c.Shares = append(c.Shares, cache.Share{Platform: shares[j].leg.String(), Manifest: d})
			}
		}
		out.Caches = append(out.Caches, c)
	}
	if len(merged) > 0 || b.cache.Exports() {
		delete(out.Response, CacheManifest)
	}
}
