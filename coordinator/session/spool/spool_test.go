package spool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// told notes what a reader was told.
type told struct {
	mu    sync.Mutex
	ready int
	fetch int
}

func (r *told) Ready() { r.mu.Lock(); r.ready++; r.mu.Unlock() }
func (r *told) Fetch() { r.mu.Lock(); r.fetch++; r.mu.Unlock() }

func newSpool(t *testing.T, limit int64) *Spool {
	t.Helper()
	s, err := New(filepath.Join(t.TempDir(), "spool"), limit)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func want(t *testing.T, sc *Scope, key byte, size int64, fetcher bool) (*Share, *told) {
	t.Helper()
	r := &told{}
	h, fetch := sc.Want(Key{key}, size, r)
	if h == nil || fetch != fetcher {
		t.Fatalf("file %d: %v, fetcher: %v", key, h, fetch)
	}
	return h, r
}

func wantContent(t *testing.T, h *Share, content string) {
	t.Helper()
	written, done, failed := h.State()
	got := make([]byte, written)
	if err := h.ReadAt(got, 0); err != nil || !done || failed || string(got) != content {
		t.Errorf("%q, done: %v, failed: %v, %v", got, done, failed, err)
	}
}

func wantNone(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func TestNew_RemovesWhatAKilledProcessLeftAndKeepsNoNames(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	wantNone(t, os.WriteFile(filepath.Join(dir, "segment-1"), nil, 0o600))
	s, err := New(dir, 1000)
	wantNone(t, err)
	sc := s.Scope()
	h, _ := want(t, sc, 1, 5, true)
	wantNone(t, h.Write([]byte("hello")), h.Finish())
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("a kill would leave %v, %v", left, err)
	}
	wantContent(t, h, "hello")
	h.Close()
	sc.Close()
	if s.Used() != 0 {
		t.Errorf("%d bytes are used", s.Used())
	}
}

func TestShare_AReaderFollowsTheFetcher(t *testing.T) {
	t.Parallel()
	sc := newSpool(t, 1000).Scope()
	first, _ := want(t, sc, 1, 10, true)
	second, news := want(t, sc, 1, 10, false)
	wantNone(t, first.Write([]byte("01234")))
	half := make([]byte, 5)
	wantNone(t, second.ReadAt(half, 0))
	if string(half) != "01234" || news.ready != 1 {
		t.Errorf("%q, told %d times", half, news.ready)
	}
	wantNone(t, first.Write([]byte("56789")), first.Finish())
	first.Close()
	wantContent(t, second, "0123456789")
	if news.fetch != 0 || news.ready != 2 {
		t.Errorf("told %+v", news)
	}
}

func TestShare_AFetcherThatGoesIsReplacedByTheFirstWhoWaits(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(*Share){"closes": (*Share).Close, "abandons": (*Share).Abandon} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sc := newSpool(t, 1000).Scope()
			first, _ := want(t, sc, 1, 10, true)
			second, news := want(t, sc, 1, 10, false)
			third, others := want(t, sc, 1, 10, false)
			wantNone(t, first.Write([]byte("01234")))
			leave(first)
			if news.fetch != 1 || others.fetch != 0 {
				t.Fatalf("told %+v and %+v", news, others)
			}
			wantNone(t, second.Write([]byte("01")), second.Write([]byte("2345678"))) // from the beginning
			if written, _, _ := third.State(); written != 9 {
				t.Errorf("%d bytes are there", written)
			}
			wantNone(t, second.Write([]byte("9")), second.Finish())
			wantContent(t, third, "0123456789")
		})
	}
}

func TestShare_WhatIsNotAsListedBreaksTheFile(t *testing.T) {
	t.Parallel()
	for name, fetch := range map[string]func(*Share) error{
		"longer":  func(h *Share) error { return h.Write([]byte("012345")) },
		"shorter": func(h *Share) error { return errors.Join(h.Write([]byte("0123")), h.Finish()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSpool(t, 1000)
			sc := s.Scope()
			first, _ := want(t, sc, 1, 5, true)
			second, news := want(t, sc, 1, 5, false)
			if err := fetch(first); !errors.Is(err, ErrChanged) {
				t.Errorf("got %v", err)
			}
			if _, done, failed := second.State(); done || !failed || news.ready == 0 {
				t.Errorf("done: %v, failed: %v, told %+v", done, failed, news)
			}
			next, _ := want(t, sc, 1, 5, true) // anew
			for _, h := range []*Share{first, second, next} {
				h.Close()
			}
			if s.Used() != 0 {
				t.Errorf("%d bytes are used", s.Used())
			}
		})
	}
	t.Run("another content than before", func(t *testing.T) {
		t.Parallel()
		sc := newSpool(t, 1000).Scope()
		first, _ := want(t, sc, 1, 5, true)
		second, _ := want(t, sc, 1, 5, false)
		wantNone(t, first.Write([]byte("0123")))
		first.Close()
		if err := second.Write([]byte("01x34")); !errors.Is(err, ErrChanged) {
			t.Errorf("got %v", err)
		}
	})
}

func TestSpool_EvictsWhatWasUsedLeastRecently(t *testing.T) {
	t.Parallel()
	s := newSpool(t, 3*largeFile+1000)
	old, busy := s.Scope(), s.Scope()
	fetch := func(sc *Scope, key byte) *Share {
		t.Helper()
		h, _ := want(t, sc, key, largeFile, true)
		wantNone(t, h.Write(make([]byte, largeFile)), h.Finish())
		return h
	}
	fetch(old, 1).Close()
	held := fetch(busy, 2)
	fetch(old, 3).Close()
	again, _ := want(t, old, 1, largeFile, false)
	again.Close()
	fetch(busy, 4).Close() // in the place of 3
	for key, there := range map[byte]bool{1: true, 3: false} {
		if _, ok := old.files[Key{key}]; ok != there {
			t.Errorf("file %d is there: %v", key, ok)
		}
	}
	fetch(busy, 5).Close() // of 1
	fetch(busy, 6).Close() // of 4
	if _, ok := busy.files[Key{2}]; !ok {
		t.Error("a file in use was evicted")
	}
	if h, _ := busy.Want(Key{9}, s.ledger.limit, &told{}); h != nil {
		t.Error("there is space for what is held and as much as is possible")
	}
	held.Close()
	old.Close()
	busy.Close()
	if s.Used() != 0 || s.ledger.files != 0 || s.ledger.promised != 0 {
		t.Errorf("%d bytes, %d files, %d promised", s.Used(), s.ledger.files, s.ledger.promised)
	}
}

func TestSpool_LeavesTheDiskSomeSpace(t *testing.T) {
	t.Parallel()
	sc := newSpool(t, 1<<62).Scope()
	if h, _ := sc.Want(Key{1}, 1<<60, &told{}); h != nil {
		t.Error("there is space for what no disk has")
	}
	if h, _ := sc.Want(Key{1}, -1, &told{}); h != nil {
		t.Error("there is space for less than nothing")
	}
	sc.Close()
	if h, _ := sc.Want(Key{1}, 1, &told{}); h != nil {
		t.Error("a scope that is closed has space")
	}
}

// TestLedger_Property has readers of some scopes come, write, read, give up and go, in any order.
func TestLedger_Property(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		s := &Spool{dir: dir, ledger: newLedger(rapid.Int64Range(50, 500).Draw(rt, "limit"))}
		s.ledger.maxFiles = rapid.IntRange(1, 20).Draw(rt, "files")
		m := &model{spool: s, scopes: []*Scope{s.Scope(), s.Scope()}}
		rt.Repeat(map[string]func(*rapid.T){
			"want":   m.want,
			"write":  m.write,
			"finish": m.finish,
			"abandon": func(rt *rapid.T) {
				if r := m.any(rt); r != nil && !r.abandoned {
					r.share.Abandon()
					r.abandoned, r.fetcher = true, false
				}
			},
			"close": func(rt *rapid.T) {
				if r := m.any(rt); r != nil {
					m.close(r)
				}
			},
			"close a scope": func(rt *rapid.T) {
				i := rapid.IntRange(0, 1).Draw(rt, "scope")
				m.scopes[i].Close()
				m.scopes[i] = s.Scope()
			},
			"": m.check,
		})
		for len(m.readers) > 0 {
			m.close(m.readers[0])
		}
		for _, sc := range m.scopes {
			sc.Close()
		}
		l := s.ledger
		if l.used != 0 || l.promised != 0 || l.files != 0 || l.unused.Len() != 0 {
			rt.Fatalf("after all: %d bytes, %d promised, %d files, %d segments", l.used, l.promised, l.files, l.unused.Len())
		}
	})
}

type model struct {
	spool   *Spool
	scopes  []*Scope
	readers []*modelReader
}

type modelReader struct {
	share     *Share
	key       byte
	size      int64
	fetcher   bool
	abandoned bool
	pos       int64
}

func (r *modelReader) Ready() {}
func (r *modelReader) Fetch() { r.fetcher, r.pos = true, 0 }

// content is what the file of a key has at an offset.
func content(key byte, off int64) byte { return key*31 + byte(off)*7 }

func (m *model) any(rt *rapid.T) *modelReader {
	if len(m.readers) == 0 {
		return nil
	}
	return rapid.SampledFrom(m.readers).Draw(rt, "reader")
}

func (m *model) close(r *modelReader) {
	m.readers = slices.DeleteFunc(m.readers, func(o *modelReader) bool { return o == r })
	r.share.Close()
}

func (m *model) want(rt *rapid.T) {
	key := rapid.ByteRange(1, 6).Draw(rt, "key")
	r := &modelReader{key: key, size: int64(key) * 13}
	h, fetch := m.scopes[rapid.IntRange(0, 1).Draw(rt, "scope")].Want(Key{key}, r.size, r)
	if h != nil {
		r.share, r.fetcher = h, fetch
		m.readers = append(m.readers, r)
	}
}

func (m *model) write(rt *rapid.T) {
	r := m.any(rt)
	if r == nil || !r.fetcher {
		return
	}
	part := make([]byte, rapid.IntRange(1, 40).Draw(rt, "bytes"))
	for i := range part {
		part[i] = content(r.key, r.pos+int64(i))
	}
	err := r.share.Write(part)
	if tooMuch := r.pos+int64(len(part)) > r.size; tooMuch != (err != nil) {
		rt.Fatalf("%d bytes at %d of %d: %v", len(part), r.pos, r.size, err)
	}
	if err != nil {
		r.fetcher = false
		return
	}
	r.pos += int64(len(part))
}

func (m *model) finish(rt *rapid.T) {
	r := m.any(rt)
	if r == nil || !r.fetcher {
		return
	}
	if err := r.share.Finish(); (err == nil) != (r.pos == r.size) {
		rt.Fatalf("finished at %d of %d: %v", r.pos, r.size, err)
	}
	r.fetcher = false
}

// check compares what every reader sees with the truth.
func (m *model) check(rt *rapid.T) {
	l := m.spool.ledger
	if l.used > l.limit || l.used < 0 || l.promised < 0 || l.promised > l.used || l.files > l.maxFiles {
		rt.Fatalf("%d bytes of %d, %d promised, %d files of %d", l.used, l.limit, l.promised, l.files, l.maxFiles)
	}
	fetchers := map[*file]int{}
	waiting := map[*file]bool{}
	for _, r := range m.readers {
		written, done, failed := r.share.State()
		got := make([]byte, written)
		if written > 0 {
			if err := r.share.ReadAt(got, 0); err != nil {
				rt.Fatal(err)
			}
		}
		for i, b := range got {
			if b != content(r.key, int64(i)) {
				rt.Fatalf("file %d has something else at %d", r.key, i)
			}
		}
		if done && written != r.size {
			rt.Fatalf("file %d is whole with %d bytes", r.key, written)
		}
		if r.fetcher {
			fetchers[r.share.file]++
		}
		if !done && !failed && !r.abandoned {
			waiting[r.share.file] = true
		}
	}
	for f := range waiting {
		if fetchers[f] != 1 {
			rt.Fatalf("somebody waits for file %v, which has %d fetchers", f.key, fetchers[f])
		}
	}
}

func BenchmarkShare_SmallFiles(b *testing.B) {
	s, err := New(filepath.Join(b.TempDir(), "spool"), DefaultLimit)
	if err != nil {
		b.Fatal(err)
	}
	sc := s.Scope()
	defer sc.Close()
	data := make([]byte, 1000)
	for i := 0; b.Loop(); i++ {
		key := Key{byte(i), byte(i >> 8), byte(i >> 16)}
		h, _ := sc.Want(key, 1000, &told{})
		other, _ := sc.Want(key, 1000, &told{})
		if h == nil || other == nil {
			b.Fatal(fmt.Sprint("no share of file ", i))
		}
		if err := errors.Join(h.Write(data), h.Finish(), other.ReadAt(data, 0)); err != nil {
			b.Fatal(err)
		}
		h.Close()
		other.Close()
	}
}
