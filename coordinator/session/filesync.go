package session

import (
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/session/spool"
)

const (
	// diffCopy is how a worker gets a client's files (BuildKit session/filesync).
	diffCopy = "/moby.filesync.v1.FileSync/DiffCopy"
	// dirName is the metadata that names the folder of the client.
	dirName = "dir-name"

	// chunkSize is how much of a file is sent at once: with its header a message that
	// fits a buffer of the worker's pool. One of 32 KiB, as fsutil sends, takes one of
	// 1 MiB there, which is cleared each time.
	chunkSize = writeSize
	// maxPassing bounds what waits for a worker in memory: the list of 100,000 files.
	maxPassing = 16 << 20
	// maxOffers bounds the files of one call that can be shared, at 24 bytes each.
	maxOffers = 1 << 20
	// stallPatience is how long a worker may take nothing before the others stop
	// waiting for what the client is sending on its stream.
	stallPatience = time.Second
)

var errChanged = status.Error(codes.Aborted, "sending the build's context: a file changed while it was being sent; build again")

// fileSync relays one worker's call of DiffCopy while other workers may want the
// same files. What the client tells of its files passes as it is. What it sends of
// their content goes into the spool, from where every worker that asked for the
// file gets it; the client hears only the first one's question.
//
// Of its goroutines, down (the call's own) takes what the client sends, up what the
// worker sends, deliver is the only one who sends to the worker, and ask asks the
// client for files whose fetchers have given up. All end with the call, up at the
// latest when its handler has returned.
type fileSync struct {
	scope   *spool.Scope
	dir     string // the folder, by the name that the call has for it
	metrics *Metrics
	worker  grpc.ServerStream
	client  grpc.ClientStream
	cancel  func() // the client's stream

	telling sync.Mutex // the client

	mu      sync.Mutex
	offers  []offered // by the file's id
	wants   map[uint32]*want
	asks    []uint32 // files that the client is to be asked for
	ready   []*want  // that deliver has to look at
	passing []frame
	waiting int   // bytes in passing
	ended   bool  // nothing more will pass, nor be wanted
	failure error // of sending to the worker

	work   chan struct{} // there is something for deliver
	worked chan struct{} // deliver has done something
	asked  chan struct{} // there is something to ask
}

// want is a file that the worker has asked for, and has not got yet.
type want struct {
	sync  *fileSync
	id    uint32
	share *spool.Share

	// guarded by sync.mu
	queued  bool  // in ready
	serving bool  // deliver is at it
	sent    int64 // to the worker
	asked   bool  // the client was, on this stream
	got     int64 // from the client, on this stream
	fetched bool  // all of it
	alone   bool  // beyond got, the worker gets what the client sends on this stream
	over    bool  // the worker has all
}

func newFileSync(scope *spool.Scope, md metadata.MD, metrics *Metrics, worker grpc.ServerStream, client grpc.ClientStream, cancel func()) *fileSync {
	return &fileSync{
		scope: scope, dir: first(md.Get(dirName)), metrics: metrics, worker: worker, client: client, cancel: cancel, wants: map[uint32]*want{},
		work: make(chan struct{}, 1), worked: make(chan struct{}, 1), asked: make(chan struct{}, 1),
	}
}

// signal wakes whoever waits on a channel of one place.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run ends when the client's stream has, or either side has failed.
func (s *fileSync) run() error {
	over := make(chan struct{})
	var running sync.WaitGroup
	running.Go(s.deliver)
	running.Go(func() { s.ask(over) })
	err := s.down()
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.cancel()
	signal(s.work)
	close(over)
	running.Wait()
	s.close()
	if s.failure != nil {
		return s.failure
	}
	return err
}

func (s *fileSync) close() {
	s.mu.Lock()
	wants := s.wants
	s.wants = nil
	for _, f := range s.passing {
		f.data.Free()
	}
	s.passing = nil
	s.mu.Unlock()
	for _, w := range wants {
		w.share.Close()
	}
}

// up relays what the worker says, until it has no more to say (nil).
func (s *fileSync) up() error {
	for {
		var f frame
		if err := s.worker.RecvMsg(&f); errors.Is(err, io.EOF) {
			s.telling.Lock()
			defer s.telling.Unlock()
			return s.client.CloseSend()
		} else if err != nil {
			return err
		}
		if p, ok := parsePacket(f.data); ok && p.kind == packetReq {
			known, err := s.want(p.id)
			if err != nil || known {
				f.data.Free()
			}
			if err != nil {
				return err
			}
			if known {
				continue
			}
		}
		if err := s.tell(&f); err != nil {
			return err
		}
	}
}

func (s *fileSync) tell(f *frame) error {
	s.telling.Lock()
	defer s.telling.Unlock()
	return s.client.SendMsg(f)
}

// want notes that the worker asks for a file. It tells whether that is all there
// is to do: else the client has to be asked, too.
func (s *fileSync) want(id uint32) (done bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || int64(id) >= int64(len(s.offers)) || s.offers[id].size == 0 {
		return false, nil
	}
	o := &s.offers[id]
	if o.size < 0 {
		return false, status.Errorf(codes.InvalidArgument, "relaying the build's context: the worker asks for file %d twice", id)
	}
	w := &want{sync: s, id: id}
	share, fetch := s.scope.Want(o.key, o.size, w)
	o.size = -1
	if share == nil {
		return false, nil
	}
	w.share, w.asked = share, fetch
	s.wants[id] = w
	s.enqueue(w)
	return !fetch, nil
}

// enqueue lets deliver look at a file. It is called with the lock held.
func (s *fileSync) enqueue(w *want) {
	if !w.queued && !w.over {
		w.queued = true
		s.ready = append(s.ready, w)
		signal(s.work)
	}
}

// Ready implements spool.Reader.
func (w *want) Ready() {
	w.sync.mu.Lock()
	defer w.sync.mu.Unlock()
	w.sync.enqueue(w)
}

// Fetch implements spool.Reader.
func (w *want) Fetch() {
	w.sync.mu.Lock()
	defer w.sync.mu.Unlock()
	w.sync.fetch(w)
}

// fetch has the client asked, on this stream, unless it was. It is called with the
// lock held.
func (s *fileSync) fetch(w *want) {
	if !w.asked {
		w.asked = true
		s.asks = append(s.asks, w.id)
		signal(s.asked)
	}
}

// ask asks the client for files in the place of other streams. It is not deliver's
// business: a client that takes no question before it is rid of what it sends would
// wait for deliver.
func (s *fileSync) ask(over <-chan struct{}) {
	for {
		select {
		case <-over:
			return
		case <-s.asked:
		}
		s.mu.Lock()
		ids := s.asks
		s.asks = nil
		s.mu.Unlock()
		for _, id := range ids {
			if err := s.tell(&frame{data: bufferSlice(request(id))}); err != nil {
				return // down hears why
			}
		}
	}
}

// down takes what the client sends, until it has ended (nil) or failed.
func (s *fileSync) down() error {
	for {
		var f frame
		if err := s.client.RecvMsg(&f); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		s.metrics.fromClient(f.data.Len())
		p, ok := parsePacket(f.data)
		var w *want
		switch {
		case ok && p.kind == packetStat:
			s.learn(f.data, p.stat)
		case ok && p.kind == packetData:
			w = s.askedFor(p.id)
		}
		var err error
		if w != nil {
			err = s.take(w, f, p)
		} else {
			err = s.pass(f)
		}
		if err != nil {
			return err
		}
	}
}

// learn notes what file is the next one. Ids count stats.
func (s *fileSync) learn(message mem.BufferSlice, stat span) {
	if stat.from == 0 { // there is none: the list is complete
		return
	}
	var o offered
	raw := make([]byte, 0, stat.len())
	_ = pieces(message, stat, func(b []byte) error { raw = append(raw, b...); return nil })
	o = offer(s.dir, raw)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.offers) < maxOffers {
		s.offers = append(s.offers, o)
	}
}

func (s *fileSync) askedFor(id uint32) *want {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w, ok := s.wants[id]; ok && w.asked && !w.fetched {
		return w
	}
	return nil
}

// take keeps what the client sends of a file, or passes it on where that is not
// possible.
func (s *fileSync) take(w *want, f frame, p packet) error {
	if !s.isAlone(w) {
		err := s.keep(w, f, p)
		if err == nil {
			f.data.Free()
			return nil
		}
		s.mu.Lock()
		s.leave(w)
		s.mu.Unlock()
	}
	if err := s.until(func() bool { return !w.serving && w.sent >= w.got }); err != nil {
		f.data.Free()
		return err
	}
	if p.data.len() == 0 {
		return s.forwardEnd(w, f)
	}
	return s.forward(w, f, p)
}

func (s *fileSync) isAlone(w *want) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return w.alone
}

// keep puts what the client has sent into the spool. After an error nothing of it
// is there.
func (s *fileSync) keep(w *want, f frame, p packet) error {
	n := p.data.len()
	if n == 0 {
		err := w.share.Finish()
		s.mu.Lock()
		defer s.mu.Unlock()
		w.fetched = err == nil
		return err
	}
	pool := mem.DefaultBufferPool()
	buf := pool.Get(n) // contiguous: another call of the disk for each piece costs more than the copy
	defer pool.Put(buf)
	at := 0
	_ = pieces(f.data, p.data, func(b []byte) error { at += copy((*buf)[at:], b); return nil })
	if err := w.share.Write(*buf); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w.got += int64(n)
	return nil
}

// leave makes a file one of this stream alone: what this stream has not got yet,
// the worker gets from the client. It is called with the lock held.
func (s *fileSync) leave(w *want) {
	if !w.alone {
		w.alone = true
		s.fetch(w)
		s.enqueue(w) // the rest of what it has got
	}
}

// forward passes on what the client sends of a file, but for what the worker has
// from another stream, and that must be the same.
func (s *fileSync) forward(w *want, f frame, p packet) error {
	s.mu.Lock()
	start, sent := w.got, w.sent
	end := start + int64(p.data.len())
	w.got, w.sent = end, max(sent, end)
	s.mu.Unlock()
	if sent == start {
		return s.pass(f)
	}
	defer f.data.Free()
	rest := p.data.from + int(min(sent, end)-start)
	off := start
	if err := pieces(f.data, span{p.data.from, rest}, func(b []byte) error {
		same, err := w.share.Equal(b, off)
		if err == nil && !same {
			err = errChanged
		}
		off += int64(len(b))
		return err
	}); err != nil {
		return err
	}
	if sent >= end {
		return nil
	}
	out := dataHeader(w.id, int(end-sent))
	_ = pieces(f.data, span{rest, p.data.to}, func(b []byte) error { out = append(out, b...); return nil })
	return s.pass(frame{data: bufferSlice(out)})
}

// forwardEnd passes on the end of a file.
func (s *fileSync) forwardEnd(w *want, f frame) error {
	s.mu.Lock()
	got, sent := w.got, w.sent
	s.mu.Unlock()
	s.done(w)
	if got < sent {
		f.data.Free()
		return errChanged
	}
	return s.pass(f)
}

// done forgets a file that the worker has.
func (s *fileSync) done(w *want) {
	s.mu.Lock()
	w.over = true
	delete(s.wants, w.id)
	s.mu.Unlock()
	w.share.Close() // without the lock, for it may call other streams
}

// pass sends a message on to the worker, when there is room.
func (s *fileSync) pass(f frame) error {
	if err := s.until(func() bool { return s.waiting < maxPassing }); err != nil {
		f.data.Free()
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.passing = append(s.passing, f)
	s.waiting += f.data.Len()
	signal(s.work)
	return nil
}

// until waits for what only deliver can bring about. If that takes long, nobody else
// waits for this worker: others ask the client themselves for what it is fetching.
func (s *fileSync) until(reached func() bool) error {
	var patience <-chan time.Time
	for {
		s.mu.Lock()
		done, err := reached(), s.failure
		s.mu.Unlock()
		if done || err != nil {
			return err
		}
		if patience == nil {
			timer := time.NewTimer(stallPatience)
			defer timer.Stop()
			patience = timer.C
		}
		select {
		case <-s.worked:
		case <-patience:
			s.stalled()
		}
	}
}

// stalled leaves to others what this stream is fetching.
func (s *fileSync) stalled() {
	var left []*want
	s.mu.Lock()
	for _, w := range s.wants {
		if w.asked && !w.fetched && !w.alone {
			s.leave(w)
			left = append(left, w)
		}
	}
	s.mu.Unlock()
	for _, w := range left {
		w.share.Abandon()
	}
}

// deliver sends the worker what passes, and files as they come into the spool. It
// ends when all has passed, or the worker is gone, which ends the call.
func (s *fileSync) deliver() {
	for own := false; ; own = !own {
		f, w, more := s.next(own)
		if !more {
			return
		}
		var err error
		if w != nil {
			err = s.serve(w)
		} else {
			err = s.worker.SendMsg(&f)
		}
		if err != nil {
			s.mu.Lock()
			s.failure = err
			s.mu.Unlock()
			s.cancel()
		}
		signal(s.worked)
		if err != nil {
			return
		}
	}
}

// next waits for what is to be done next: a file's turn (own) and that of what
// passes alternate.
func (s *fileSync) next(own bool) (f frame, w *want, more bool) {
	for {
		s.mu.Lock()
		switch {
		case len(s.ready) > 0 && !s.ended && (own || len(s.passing) == 0):
			w = s.ready[0]
			s.ready[0] = nil
			s.ready = s.ready[1:]
			w.queued, w.serving = false, true
		case len(s.passing) > 0:
			f = s.passing[0]
			s.passing[0] = frame{}
			s.passing = s.passing[1:]
			s.waiting -= f.data.Len()
		case !s.ended:
			s.mu.Unlock()
			<-s.work
			continue
		default:
			s.mu.Unlock()
			return frame{}, nil, false
		}
		s.mu.Unlock()
		return f, w, true
	}
}

// serve sends the worker the next bytes of a file, if there are any.
func (s *fileSync) serve(w *want) error {
	off, n, last := s.turn(w)
	if n > 0 {
		if err := s.send(w, off, n); err != nil {
			return err
		}
	}
	if last {
		if err := s.worker.SendMsg(&frame{data: bufferSlice(dataHeader(w.id, 0))}); err != nil {
			return err
		}
		s.done(w)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w.sent += int64(n)
	w.serving = false
	if n == chunkSize {
		s.enqueue(w)
	}
	return nil
}

// turn tells what to send of a file, and whether its end follows.
func (s *fileSync) turn(w *want) (off int64, n int, last bool) {
	written, whole, failed := w.share.State()
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.over {
		return 0, 0, false
	}
	if failed {
		s.leave(w)
	}
	limit := written
	if w.alone {
		limit, whole = min(written, w.got), false
	}
	n = int(max(0, min(limit-w.sent, chunkSize)))
	if !w.asked {
		s.metrics.fromSpool(n)
	}
	return w.sent, n, whole && w.sent+int64(n) == written
}

func (s *fileSync) send(w *want, off int64, n int) error {
	pool := mem.DefaultBufferPool()
	buf := pool.Get(n)
	if err := w.share.ReadAt(*buf, off); err != nil {
		pool.Put(buf)
		return status.Errorf(codes.Internal, "relaying the build's context: %v; is the coordinator's disk in order?", err)
	}
	return s.worker.SendMsg(&frame{data: mem.BufferSlice{mem.SliceBuffer(dataHeader(w.id, n)), mem.NewBuffer(buf, pool)}})
}
