package worker

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
)

// maxTunnels bounds the connections to buildkitd that coordinators can make this
// agent hold; an attempt needs a few.
const maxTunnels = 1024

// tunnels owns the goroutines of all connections, which outlive the streams that
// they were asked for on.
type tunnels struct {
	running sync.WaitGroup
	mu      sync.Mutex
	count   int
}

// start runs f in a goroutine unless there are too many already.
func (t *tunnels) start(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.count >= maxTunnels {
		return false
	}
	t.count++
	t.running.Go(func() {
		f()
		t.mu.Lock()
		defer t.mu.Unlock()
		t.count--
	})
	return true
}

func (t *tunnels) wait() { t.running.Wait() }

// open answers one Open: a slot is taken here, in the order of asking; the rest
// goes on beside.
func (s *stream) open(o *archfarmv1.Open) {
	id := o.GetConnectionId()
	if !tunnel.ValidID(id) {
		s.link.log.Warn("the coordinator asks for a connection with an invalid id")
		return
	}
	release := func() {}
	if o.GetTakesSlot() {
		var cause archfarmv1.Refused_Cause
		if release, cause = s.link.set.agent.slots.take(); release == nil {
			s.refuse(id, cause, reasons[cause])
			return
		}
	}
	started := s.link.set.agent.tunnels.start(func() {
		defer release()
		s.carry(s.tunnels, o)
		if o.GetTakesSlot() { // it may be buildkitd that has ended it: the slot is not free before that is known
			s.link.set.agent.buildkit.doubt(s.tunnels)
		}
	})
	if !started {
		release()
		s.refuse(id, archfarmv1.Refused_CAUSE_UNAVAILABLE, "the worker holds too many connections")
	}
}

var reasons = map[archfarmv1.Refused_Cause]string{
	archfarmv1.Refused_CAUSE_NO_SLOT:     "every slot is taken",
	archfarmv1.Refused_CAUSE_DRAINING:    "the worker is draining",
	archfarmv1.Refused_CAUSE_UNAVAILABLE: "buildkitd does not answer",
}

// carry joins buildkitd and the coordinator until one of them, or ctx, ends it.
func (s *stream) carry(ctx context.Context, o *archfarmv1.Open) {
	id, slot := o.GetConnectionId(), o.GetTakesSlot()
	log := s.link.log.With("connection", id)
	backend, back, err := s.dialBoth(ctx, o)
	if err != nil {
		log.Warn("cannot open a connection for the coordinator", "error", err)
		s.refuse(id, archfarmv1.Refused_CAUSE_UNAVAILABLE, err.Error())
		return
	}
	log.Info("connection opened", "slot", slot)
	begun := time.Now()
	defer context.AfterFunc(ctx, func() { _ = back.Close(); _ = backend.Close() })()

	in, out, err := tunnel.SpliceCount(back, backend)
	log = log.With("slot", slot, "bytes_in", in, "bytes_out", out, "duration", time.Since(begun))
	if err != nil {
		log.Info("connection broke", "error", err)
		return
	}
	log.Info("connection ended")
}

// dialBoth connects to buildkitd first: what it refuses, the coordinator need
// not see as a connection.
func (s *stream) dialBoth(ctx context.Context, o *archfarmv1.Open) (backend, back net.Conn, err error) {
	dialing, cancel := context.WithTimeout(ctx, dialWithin)
	defer cancel()
	backend, err = s.link.set.agent.cfg.BuildKit.Dial(dialing)
	if err != nil {
		return nil, nil, fmt.Errorf("reaching buildkitd: %w", err)
	}
	if o.GetInline() {
		back, err = s.inline(ctx, o.GetConnectionId())
	} else {
		back, err = tunnel.Dial(dialing, s.link.set.agent.dial, s.peer, o.GetConnectionId())
	}
	if err != nil {
		_ = backend.Close() // nothing was written
		return nil, nil, fmt.Errorf("dialing back: %w", err)
	}
	return backend, back, nil
}
