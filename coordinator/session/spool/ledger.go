package spool

import (
	"container/list"
	"slices"
)

const (
	// segmentSize is up to where small files share one file of the disk: thousands
	// of them are one, and 10 GiB of anything take less than a thousand descriptors.
	segmentSize = 64 << 20
	// largeFile is from where a file has a segment of its own.
	largeFile = segmentSize / 4
	// maxFiles bounds the memory for what is known of files, about 300 bytes each.
	maxFiles = 1 << 19
)

// state is how far a file has come. It moves forward only.
type state int

const (
	filling state = iota
	whole
	broken // what is there may be read, but there will not be more
)

// file is one file of a client.
//
// While it is filling it has a fetcher, who is one of its readers; a file that
// loses its last reader while it is filling is broken.
type file struct {
	scope   *Scope
	key     Key
	size    int64
	written int64
	state   state
	segment *segment
	offset  int64 // in the segment

	fetcher *Share
	readers []*Share // by the order in which they came
}

// segment is one file of the disk, with files of one scope in it. It is evicted as
// a whole, while nothing pins it.
type segment struct {
	scope  *Scope
	space  int64   // what it counts
	files  []*file // all that have been in it
	found  int     // of these, those that can be found
	pins   int     // shares of its files
	unused *list.Element
	disk   *disk
}

// ledger says who has, who fetches and who waits for which file, and what has to
// go. It is pure: its callers hold the lock, close the segments that it drops, and
// tell the shares that it returns.
type ledger struct {
	limit    int64
	maxFiles int

	used     int64      // by segments that are on the disk
	promised int64      // of that, not written yet
	files    int        // that can be found
	unused   *list.List // of segments without pins, least recently used first
}

func newLedger(limit int64) *ledger {
	return &ledger{limit: limit, maxFiles: maxFiles, unused: list.New()}
}

// want finds a file or makes it: then the caller is its fetcher. Room is what may be
// taken of the disk. It returns nil where there is no space for it, and what it
// dropped to make some.
func (l *ledger) want(sc *Scope, key Key, size int64, reader Reader, room func() int64, newDisk func() *disk) (h *Share, dropped []*segment) {
	if sc.closed || size <= 0 {
		return nil, nil
	}
	f, known := sc.files[key]
	if !known {
		var enough bool
		if enough, dropped = l.makeRoom(size, room); !enough {
			return nil, dropped
		}
		f = l.add(sc, key, size, newDisk)
	}
	h = &Share{spool: sc.spool, file: f, reader: reader}
	f.readers = append(f.readers, h)
	l.pin(f.segment)
	if !known {
		f.fetcher = h
	}
	return h, dropped
}

// makeRoom evicts until a file of that size fits, unless it cannot.
func (l *ledger) makeRoom(size int64, room func() int64) (enough bool, dropped []*segment) {
	if size > l.limit {
		return false, nil
	}
	free := room()
	for size > l.limit-l.used || size > free-l.promised || l.files >= l.maxFiles {
		oldest := l.unused.Front()
		if oldest == nil {
			return false, dropped
		}
		seg := oldest.Value.(*segment)
		free += seg.space // all of it written: nothing is filling in a segment without pins
		l.evict(seg)
		dropped = append(dropped, seg)
	}
	return true, dropped
}

// evict drops a segment without pins.
func (l *ledger) evict(seg *segment) {
	for _, f := range seg.files {
		l.lose(f)
	}
	l.drop(seg)
}

// lose makes a file one that cannot be found.
func (l *ledger) lose(f *file) {
	if f.scope.files[f.key] == f {
		delete(f.scope.files, f.key)
		f.segment.found--
		l.files--
	}
}

func (l *ledger) drop(seg *segment) {
	l.used -= seg.space
	if seg.unused != nil {
		l.unused.Remove(seg.unused)
		seg.unused = nil
	}
	if seg.scope.current == seg {
		seg.scope.current = nil
	}
	delete(seg.scope.segments, seg)
}

func (l *ledger) add(sc *Scope, key Key, size int64, newDisk func() *disk) *file {
	seg := sc.current
	if size >= largeFile || seg == nil || seg.space+size > segmentSize {
		seg = &segment{scope: sc, disk: newDisk()}
		sc.segments[seg] = struct{}{}
		if size < largeFile {
			sc.current = seg
		}
	}
	f := &file{scope: sc, key: key, size: size, segment: seg, offset: seg.space}
	seg.space += size
	seg.files = append(seg.files, f)
	seg.found++
	l.used += size
	l.promised += size
	l.files++
	sc.files[key] = f
	return f
}

func (l *ledger) pin(seg *segment) {
	seg.pins++
	if seg.unused != nil {
		l.unused.Remove(seg.unused)
		seg.unused = nil
	}
}

// unpin returns the segment if nobody can want anything of it any more.
func (l *ledger) unpin(seg *segment) *segment {
	seg.pins--
	switch {
	case seg.pins > 0:
		return nil
	case seg.found == 0 || seg.scope.closed:
		l.drop(seg)
		return seg
	}
	seg.unused = l.unused.PushBack(seg)
	return nil
}

// wrote notes that a file has so many bytes.
func (l *ledger) wrote(f *file, written int64) {
	if written > f.written {
		l.promised -= written - f.written
		f.written = written
	}
}

// finish makes a file whole.
func (l *ledger) finish(f *file) { f.state, f.fetcher = whole, nil }

// breakOff ends a file that will not be whole. The next one who wants it begins anew.
func (l *ledger) breakOff(f *file) {
	if f.state != filling {
		return
	}
	f.state, f.fetcher = broken, nil
	l.promised -= f.size - f.written
	l.lose(f)
}

// retire takes a share from its file's readers. Where it was the fetcher, it
// returns the one who is now.
func (l *ledger) retire(h *Share) (fetcher *Share) {
	f := h.file
	if i := slices.Index(f.readers, h); i >= 0 {
		f.readers = slices.Delete(f.readers, i, i+1)
	}
	if f.state != filling || f.fetcher != h {
		return nil
	}
	if len(f.readers) == 0 {
		l.breakOff(f)
		return nil
	}
	f.fetcher = f.readers[0]
	return f.fetcher
}

// closeScope forgets a scope's files, and returns the segments that nothing pins.
func (l *ledger) closeScope(sc *Scope) (dropped []*segment) {
	if sc.closed {
		return nil
	}
	sc.closed = true
	for _, f := range sc.files {
		l.lose(f)
	}
	for seg := range sc.segments {
		if seg.pins == 0 {
			l.drop(seg)
			dropped = append(dropped, seg)
		}
	}
	return dropped
}
