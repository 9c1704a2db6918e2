package manifest

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	cachetypes "github.com/moby/buildkit/cache/remotecache/v1/types"
	"github.com/opencontainers/go-digest"
)

// identity names a layer with all below it, or a record with all that it is made of,
// whatever their places in a configuration.
type identity = digest.Digest

// chainLayer is a layer on the layers below it.
type chainLayer struct {
	cachetypes.CacheLayer
	parent identity // empty: none
}

// chainResult is a result of a record: a layer with all below it.
type chainResult struct {
	at    time.Time
	layer identity
}

// chainLink is an input of a record: another one's result, or a part of that.
type chainLink struct {
	selector string
	record   identity
}

type chainRecord struct {
	digest digest.Digest
	inputs [][]chainLink // each sorted, every link once
	result *chainResult
}

// chains are a configuration by identities.
type chains struct {
	described describedLayers
	layers    map[identity]chainLayer
	records   map[identity]chainRecord
}

// reader turns places of a configuration into identities.
type reader struct {
	cachetypes.CacheConfig
	chains
	layerIDs, recordIDs []identity
	open                []bool // records that are being read
}

func readChains(c Cache) (chains, error) {
	r := &reader{
		CacheConfig: c.Config,
		chains:      chains{describedLayers{}, map[identity]chainLayer{}, map[identity]chainRecord{}},
		layerIDs:    make([]identity, len(c.Config.Layers)), recordIDs: make([]identity, len(c.Config.Records)), open: make([]bool, len(c.Config.Records)),
	}
	for _, d := range c.Layers {
		r.described.add(d)
	}
	for i := range r.Layers {
		if err := r.layer(i); err != nil {
			return chains{}, err
		}
	}
	for i := range r.Records {
		if _, err := r.record(i); err != nil {
			return chains{}, err
		}
	}
	return r.chains, nil
}

// layer reads a layer and all below it, which may be many: it does not recurse.
func (r *reader) layer(at int) error {
	var pending []int
	for at != -1 && (at < 0 || at >= len(r.Layers) || r.layerIDs[at] == "") {
		if at < 0 || at >= len(r.Layers) {
			return fmt.Errorf("there is no layer %d", at)
		}
		if len(pending) == len(r.Layers) {
			return errors.New("its layers loop")
		}
		pending, at = append(pending, at), r.Layers[at].ParentIndex
	}
	for _, i := range slices.Backward(pending) {
		l := chainLayer{CacheLayer: r.Layers[i]}
		if l.ParentIndex != -1 {
			l.parent = r.layerIDs[l.ParentIndex]
		}
		r.layerIDs[i] = digest.FromString(l.Blob.String() + " on " + l.parent.String())
		r.layers[r.layerIDs[i]] = l
	}
	return nil
}

// record reads a record and what it is made of.
func (r *reader) record(at int) (identity, error) {
	switch {
	case at < 0 || at >= len(r.Records):
		return "", fmt.Errorf("there is no record %d", at)
	case r.recordIDs[at] != "":
		return r.recordIDs[at], nil
	case r.open[at]:
		return "", fmt.Errorf("record %d is made of itself", at)
	}
	r.open[at] = true
	raw := r.Records[at]
	out := chainRecord{digest: raw.Digest, inputs: make([][]chainLink, len(raw.Inputs))}
	for i, alternatives := range raw.Inputs {
		if len(alternatives) == 0 {
			return "", fmt.Errorf("an input of record %d is empty", at)
		}
		for _, in := range alternatives {
			record, err := r.record(in.LinkIndex)
			if err != nil {
				return "", err
			}
			out.inputs[i] = append(out.inputs[i], chainLink{in.Selector, record})
		}
		slices.SortFunc(out.inputs[i], compareLinks)
		out.inputs[i] = slices.Compact(out.inputs[i])
	}
	if err := r.results(raw, &out); err != nil {
		return "", err
	}
	id := out.identity()
	r.recordIDs[at] = id
	r.addRecord(id, out)
	return id, nil
}

func compareLinks(a, b chainLink) int {
	return cmp.Or(cmp.Compare(a.record, b.record), cmp.Compare(a.selector, b.selector))
}

func (r chainRecord) identity() identity {
	var b strings.Builder
	fmt.Fprintf(&b, "%q", r.digest)
	for i, alternatives := range r.inputs {
		fmt.Fprintf(&b, "\n%d", i)
		for _, in := range alternatives {
			fmt.Fprintf(&b, " %q %s", in.selector, in.record)
		}
	}
	return digest.FromString(b.String())
}

// results takes the best of a record's results whose layers are all there. (Chained
// results are of inline caches only.)
func (r *reader) results(raw cachetypes.CacheRecord, out *chainRecord) error {
	for _, res := range raw.Results {
		if res.LayerIndex < 0 || res.LayerIndex >= len(r.Layers) {
			return fmt.Errorf("there is no layer %d", res.LayerIndex)
		}
		if id := r.layerIDs[res.LayerIndex]; r.available(id) {
			out.take(chainResult{res.CreatedAt, id})
		}
	}
	return nil
}

// available tells whether a layer and those below it are there.
func (r *reader) available(id identity) bool {
	for ; id != ""; id = r.layers[id].parent {
		if _, ok := r.described[r.layers[id].Blob]; !ok {
			return false
		}
	}
	return true
}

// take keeps the better of two results: the later one, as BuildKit does (cache/remotecache/v1/chains.go, bestResult).
func (r *chainRecord) take(res chainResult) {
	if r.result == nil || res.compare(*r.result) > 0 {
		r.result = &res
	}
}

func (r chainResult) compare(other chainResult) int {
	return cmp.Or(r.at.Compare(other.at), cmp.Compare(r.layer, other.layer))
}

func (c chains) addRecord(id identity, r chainRecord) {
	if known, ok := c.records[id]; ok && known.result != nil {
		r.take(*known.result)
	}
	c.records[id] = r
}

// cacheUnion is what the caches that were added have together.
type cacheUnion struct{ chains }

func newCacheUnion() cacheUnion {
	return cacheUnion{chains{describedLayers{}, map[identity]chainLayer{}, map[identity]chainRecord{}}}
}

func (u cacheUnion) add(c chains) {
	for _, d := range c.described {
		u.described.add(d)
	}
	for id, l := range c.layers {
		if known, ok := u.layers[id]; !ok || known.Annotations == nil {
			u.layers[id] = l
		}
	}
	for id, r := range c.records {
		u.addRecord(id, r)
	}
}

// cache is the union as a configuration: records by their key, layers by their blob.
func (u cacheUnion) cache() Cache {
	layers := slices.SortedFunc(maps.Keys(u.used()), func(a, b identity) int {
		return cmp.Or(cmp.Compare(u.layers[a].Blob, u.layers[b].Blob), cmp.Compare(a, b))
	})
	records := slices.SortedFunc(maps.Keys(u.records), func(a, b identity) int {
		return cmp.Or(cmp.Compare(u.records[a].digest, u.records[b].digest), cmp.Compare(a, b))
	})
	layerAt, recordAt := places(layers), places(records)
	var out Cache
	for _, id := range layers {
		l := u.layers[id].CacheLayer
		l.ParentIndex = -1
		if parent := u.layers[id].parent; parent != "" {
			l.ParentIndex = layerAt[parent]
		}
		out.Config.Layers = append(out.Config.Layers, l)
		if n := len(out.Layers); n == 0 || out.Layers[n-1].Digest != l.Blob {
			out.Layers = append(out.Layers, u.described[l.Blob])
		}
	}
	for _, id := range records {
		out.Config.Records = append(out.Config.Records, u.records[id].config(layerAt, recordAt))
	}
	return out
}

// used are the layers of results, and those below them.
func (u cacheUnion) used() map[identity]bool {
	used := map[identity]bool{}
	for _, r := range u.records {
		if r.result == nil {
			continue
		}
		for id := r.result.layer; id != "" && !used[id]; id = u.layers[id].parent {
			used[id] = true
		}
	}
	return used
}

func places(ids []identity) map[identity]int {
	out := make(map[identity]int, len(ids))
	for i, id := range ids {
		out[id] = i
	}
	return out
}

func (r chainRecord) config(layerAt, recordAt map[identity]int) cachetypes.CacheRecord {
	out := cachetypes.CacheRecord{Digest: r.digest}
	for _, alternatives := range r.inputs {
		var inputs []cachetypes.CacheInput
		for _, in := range alternatives {
			inputs = append(inputs, cachetypes.CacheInput{Selector: in.selector, LinkIndex: recordAt[in.record]})
		}
		slices.SortFunc(inputs, func(a, b cachetypes.CacheInput) int {
			return cmp.Or(cmp.Compare(a.LinkIndex, b.LinkIndex), cmp.Compare(a.Selector, b.Selector))
		})
		out.Inputs = append(out.Inputs, inputs)
	}
	if r.result != nil {
		out.Results = []cachetypes.CacheResult{{LayerIndex: layerAt[r.result.layer], CreatedAt: r.result.at}}
	}
	return out
}
