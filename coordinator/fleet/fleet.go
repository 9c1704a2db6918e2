// Package fleet knows the workers that are attached to this coordinator and
// opens connections to their BuildKit daemons. Every connection is dialed by the
// worker's agent, on request: a worker needs no open port, and its buildkitd is
// reachable in no other way.
package fleet

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// heartbeat is how often an idle agent reports; three missed reports are a
	// lost worker, hence one is noticed within 10 s.
	heartbeat   = 3 * time.Second
	lostAfter   = 3 * heartbeat
	openTimeout = 10 * time.Second
	// outboxSize is how many Opens may wait to be sent; who asks for more waits.
	outboxSize = 64
)

// ErrNoSlot is why Dial fails when the agent has given its slots to others.
var ErrNoSlot = errors.New("the worker has no free slot")

// Fleet is the set of attached workers. It serves AgentService and FleetService,
// but for what only the queue knows.
type Fleet struct {
	archfarmv1.UnimplementedAgentServiceServer
	archfarmv1.UnimplementedFleetServiceServer

	// Reported is called, if set, instead of changed where a report has changed
	// nothing but one worker, so that 1,000 workers' heartbeats cost no more than
	// one each. Calls do not overlap each other's or changed's. Set it before the
	// first worker attaches.
	Reported func(*Worker)

	log     *slog.Logger
	changed func([]*Worker)
	telling sync.Mutex // held around calls of changed and Reported, and taken before mu
	keyring keyring

	mu      sync.Mutex
	workers map[string]*Worker // by name
	list    []*Worker          // the same, in order of name; replaced, never modified
	untold  bool               // the list is not what changed was last called with
	pending map[string]*dialing
	conns   map[string]map[*Conn]struct{} // open ones, by the worker's name
	orphans map[string]*time.Timer        // of names whose agent has left; severs their conns
	serial  uint64
	closed  chan struct{}
	id      string // of this run, in Welcome

	inline   bool          // what is opened from now on comes by Carry
	departed chan struct{} // closed, under mu, by Depart
}

// New returns a fleet without workers. Changed is called after changes of the set
// (changes at the same moment are told together), and of one worker's report where
// Reported is not set, with all workers by name; calls do not overlap.
func New(log *slog.Logger, changed func([]*Worker)) *Fleet {
	return &Fleet{
		log: log, changed: changed, workers: map[string]*Worker{}, pending: map[string]*dialing{},
		conns: map[string]map[*Conn]struct{}{}, orphans: map[string]*time.Timer{}, closed: make(chan struct{}),
		id: rand.Text(), departed: make(chan struct{}),
	}
}

// Close ends every agent's stream: the agents look for another coordinator.
// Connections stay as they are. It must be called once.
func (f *Fleet) Close() { close(f.closed) }

// Workers returns the attached workers by name. The slice is the caller's.
func (f *Fleet) Workers() []*Worker {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list)
}

// Worker returns the attached worker of that name.
func (f *Fleet) Worker(name string) (*Worker, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w, ok := f.workers[name]
	return w, ok
}

// Attach implements AgentService: it keeps one worker in the fleet for as long
// as its agent's stream lasts and its reports keep coming.
func (f *Fleet) Attach(stream archfarmv1.AgentService_AttachServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	w, err := f.newWorker(stream.Context(), first.GetHello())
	if err != nil {
		return err
	}
	if f.hasDeparted() {
		return errDeparted
	}
	if _, attached := f.Worker(w.Name); attached && slices.Contains(first.GetHello().GetAttachedTo(), f.id) {
		return status.Errorf(codes.AlreadyExists, "attaching worker %s: it is attached, under another address of this coordinator", w.Name)
	}
	defer f.keyring.forget(w)
	if err := stream.Send(&archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Welcome{
		Welcome: &archfarmv1.Welcome{HeartbeatSeconds: uint32(heartbeat / time.Second), GossipKeyring: f.keyring.hand(stream.Context(), w), CoordinatorId: f.id},
	}}); err != nil {
		return err
	}
	if !f.add(w) {
		return errDeparted
	}
	f.check(w)
	f.log.Info("worker attached", "worker", w.Name, "pool", w.Pool, "as", w.who.String(), "platforms", w.platformNames, "slots", w.Report().GetSlots().GetTotal(), "version", w.Version, "buildkit", w.BuildKitVersion)
	err = f.serve(w, stream)
	f.remove(w)
	f.log.Info("worker detached", "worker", w.Name, "reason", err)
	return err
}

// serve handles one agent's messages and sends the coordinator's, until the
// stream ends or the agent has been silent for too long. Its goroutines end with
// the stream, which ends when Attach returns. Sending is one of them, since an
// agent that does not read must not keep its silence from being noticed.
func (f *Fleet) serve(w *Worker, stream archfarmv1.AgentService_AttachServer) error {
	messages, failed := make(chan *archfarmv1.AttachRequest), make(chan error, 2)
	go func() { failed <- receive(stream, messages) }()
	go func() {
		if err := f.send(w, stream); err != nil {
			failed <- err
		}
	}()
	silence := time.NewTimer(lostAfter)
	defer silence.Stop()
	for {
		select {
		case m := <-messages:
			silence.Reset(lostAfter)
			if err := f.handle(w, m); err != nil {
				return err
			}
		case err := <-failed:
			if errors.Is(err, io.EOF) { // an orderly end
				return nil
			}
			return err
		case <-w.gone: // replaced by a newer stream of the same name, or evicted
			return w.farewell
		case <-f.closed:
			return status.Error(codes.Unavailable, "this coordinator is stopping")
		case <-silence.C:
			f.sever(w.Name, fmt.Errorf("no heartbeat for %s", lostAfter))
			return status.Errorf(codes.DeadlineExceeded, "no report for %s", lostAfter)
		}
	}
}

// receive passes the agent's messages on. It returns io.EOF after the last.
func receive(stream archfarmv1.AgentService_AttachServer, messages chan<- *archfarmv1.AttachRequest) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		select {
		case messages <- m:
		case <-stream.Context().Done():
			return context.Cause(stream.Context())
		}
	}
}

// send returns nil when the stream has ended, which receive explains better.
func (f *Fleet) send(w *Worker, stream archfarmv1.AgentService_AttachServer) error {
	departed := f.departed
	if !w.inline {
		departed = nil // the agent would not understand
	}
	for {
		var m *archfarmv1.AttachResponse
		select {
		case m = <-w.outbox:
		case <-departed:
			departed = nil // once is enough
			m = &archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Departing{Departing: &archfarmv1.Departing{}}}
		case <-stream.Context().Done():
			return nil
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
}

func (f *Fleet) handle(w *Worker, m *archfarmv1.AttachRequest) error {
	switch m := m.GetMessage().(type) {
	case *archfarmv1.AttachRequest_Report:
		now, err := checkReport(m.Report, w.now.Load())
		if err != nil {
			return status.Errorf(codes.InvalidArgument, "reading the report of worker %s: %v", w.Name, err)
		}
		w.now.Store(now)
		f.reported(w)
		f.check(w)
	case *archfarmv1.AttachRequest_Refused:
		w.refuse(m.Refused)
	case *archfarmv1.AttachRequest_Done:
		w.done(m.Done)
	}
	return nil
}

// check severs what is open to a BuildKit of which the agent says that it does not
// answer: one that is frozen keeps its connections.
func (f *Fleet) check(w *Worker) {
	if r := w.Report(); r.GetState() == archfarmv1.Worker_STATE_UNAVAILABLE {
		f.sever(w.Name, fmt.Errorf("its agent reports: %s", cmp.Or(r.GetReason(), "BuildKit does not answer")))
	}
}

// reported tells of one worker's report.
func (f *Fleet) reported(w *Worker) {
	if f.Reported == nil {
		f.mu.Lock()
		f.untold = true
		f.mu.Unlock()
		f.tell()
		return
	}
	f.telling.Lock()
	defer f.telling.Unlock()
	if now, attached := f.Worker(w.Name); attached && now == w {
		f.Reported(w)
	}
}

// tell returns once changed knows the set as it is now. Of those who come while it
// is being called, one calls it again for all.
func (f *Fleet) tell() {
	f.telling.Lock()
	defer f.telling.Unlock()
	f.mu.Lock()
	untold, all := f.untold, slices.Clone(f.list)
	f.untold = false
	f.mu.Unlock()
	if untold {
		f.changed(all)
	}
}

// add makes w the worker of its name, unless the coordinator has departed meanwhile.
func (f *Fleet) add(w *Worker) bool {
	f.mu.Lock()
	if f.hasDeparted() {
		f.mu.Unlock()
		return false
	}
	f.serial++
	w.id = fmt.Sprintf("%s#%d", w.Name, f.serial)
	if old, ok := f.workers[w.Name]; ok {
		old.leave(status.Errorf(codes.Aborted, "another agent attached as %s: worker names must be unique", w.Name))
	}
	if timer, ok := f.orphans[w.Name]; ok { // it is back: its heartbeats vouch for what is open, too
		timer.Stop()
		delete(f.orphans, w.Name)
	}
	f.workers[w.Name] = w
	f.relist(w.Name)
	f.mu.Unlock()
	f.tell()
	return true
}

// relist makes the list agree with the map about one name. f.mu is held.
func (f *Fleet) relist(name string) {
	at, listed := slices.BinarySearchFunc(f.list, name, func(w *Worker, name string) int { return strings.Compare(w.Name, name) })
	after := at
	if listed {
		after++
	}
	next := make([]*Worker, 0, len(f.list)+1)
	next = append(next, f.list[:at]...)
	if w, ok := f.workers[name]; ok {
		next = append(next, w)
	}
	f.list, f.untold = append(next, f.list[after:]...), true
}

// remove lets go of a worker. Its connections may outlive its agent's stream,
// but not for longer than an agent may be silent.
func (f *Fleet) remove(w *Worker) {
	w.leave(nil)
	w.closeControl()
	f.mu.Lock()
	if f.workers[w.Name] == w {
		delete(f.workers, w.Name)
		f.relist(w.Name)
		f.orphans[w.Name] = time.AfterFunc(lostAfter, func() { f.disown(w.Name) })
	}
	f.mu.Unlock()
	f.tell()
}

// Evict ends the agent's stream of the worker of that name, if it is attached, and
// every connection to its BuildKit, at once. The agent is told the cause, with
// PermissionDenied: the certificate by which it came is not good any more.
func (f *Fleet) Evict(name string, cause error) {
	f.mu.Lock()
	if w, ok := f.workers[name]; ok {
		w.leave(status.Errorf(codes.PermissionDenied, "worker %s may not stay: %v", name, cause))
		delete(f.workers, name)
		f.relist(name)
	}
	if timer, ok := f.orphans[name]; ok {
		timer.Stop()
		delete(f.orphans, name)
	}
	f.mu.Unlock()
	f.sever(name, cause)
	f.tell()
}
