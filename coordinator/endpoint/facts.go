package endpoint

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/fleet"
)

const (
	// factsFresh is how long a daemon is believed before it is asked again. A
	// client asks five times at the beginning of a build, and should not wait five
	// times for the farthest worker; but one that waits for a CDI device to appear
	// asks for 5 s.
	factsFresh = 2 * time.Second
	// factsPatience bounds the wait for a daemon's answer.
	factsPatience = 2 * time.Second
	// factsRetry is how long a daemon that did not answer is left in peace.
	factsRetry = 10 * time.Second
	// maxFacts bounds what one daemon may add to the answer, in bytes.
	maxFacts = 256 << 10
)

// fact is what one worker's daemon says of itself. Its parts are shared: they are
// not to be changed, and nil when the daemon has never answered.
type fact struct {
	record  *apitypes.WorkerRecord    // of its first, that is default, BuildKit worker
	version *apitypes.BuildkitVersion // of itself
}

// facts remembers what the daemons said last. The zero value remembers nothing.
type facts struct {
	mu    sync.Mutex
	known map[string]*memory // by the id of the worker's stay
}

// memory is what is remembered of one worker.
type memory struct {
	worker *fleet.Worker
	turn   chan struct{} // holds one token; who has it may use what follows
	conn   *fleet.Conn   // that the fact came over
	until  time.Time     // when to ask again
	last   fact
}

// of returns what the worker's daemon says now, or said last when it does not
// answer in time.
func (f *facts) of(ctx context.Context, w *fleet.Worker) fact {
	m := f.memory(w)
	select {
	case <-m.turn:
	case <-ctx.Done():
		return fact{}
	}
	defer func() { m.turn <- struct{}{} }()
	restarted := m.conn != nil && m.conn.Lost() != nil
	if !restarted && time.Now().Before(m.until) {
		return m.last
	}
	answer, conn, err := ask(ctx, w)
	switch {
	case err == nil:
		m.last, m.conn, m.until = answer, conn, time.Now().Add(factsFresh)
	case ctx.Err() == nil: // not for want of a client
		m.conn, m.until = nil, time.Now().Add(factsRetry)
	}
	return m.last
}

// memory returns the worker's, and forgets those of workers that have left.
func (f *facts) memory(w *fleet.Worker) *memory {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m, ok := f.known[w.ID()]; ok {
		return m
	}
	for id, m := range f.known {
		select {
		case <-m.worker.Gone():
			delete(f.known, id)
		default:
		}
	}
	if f.known == nil {
		f.known = map[string]*memory{}
	}
	m := &memory{worker: w, turn: make(chan struct{}, 1)}
	m.turn <- struct{}{}
	f.known[w.ID()] = m
	return m
}

// ask asks a worker's daemon to describe itself.
func ask(ctx context.Context, w *fleet.Worker) (fact, *fleet.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, factsPatience)
	defer cancel()
	conn, err := w.Control(ctx)
	if err != nil {
		return fact{}, nil, err
	}
	daemon := controlapi.NewControlClient(conn)
	var answer fact
	asking, ctx := errgroup.WithContext(ctx)
	asking.Go(func() error {
		list, err := daemon.ListWorkers(ctx, &controlapi.ListWorkersRequest{})
		if err != nil {
			return err
		}
		if len(list.GetRecord()) == 0 {
			return errors.New("it has no worker of its own")
		}
		answer.record = list.GetRecord()[0]
		return nil
	})
	asking.Go(func() error {
		info, err := daemon.Info(ctx, &controlapi.InfoRequest{})
		if status.Code(err) == codes.Unimplemented { // older than v0.11
			return nil
		}
		answer.version = info.GetBuildkitVersion()
		return err
	})
	if err := asking.Wait(); err != nil {
		return fact{}, nil, err
	}
	if n := proto.Size(answer.record) + proto.Size(answer.version); n > maxFacts {
		return fact{}, nil, fmt.Errorf("it describes itself in %d bytes, at most %d are taken", n, maxFacts)
	}
	return answer, conn, nil
}
