// Package fleet knows the workers that are attached to this coordinator and
// opens connections to their BuildKit daemons. Every connection is dialed by the
// worker's agent, on request: a worker needs no open port, and its buildkitd is
// reachable in no other way.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/containerd/platforms"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// heartbeat is how often an idle agent reports; three missed reports are a
	// lost worker, hence one is noticed within 10 s.
	heartbeat     = 3 * time.Second
	lostAfter     = 3 * heartbeat
	openTimeout   = 10 * time.Second
	maxPlatforms  = 64
	maxNameLength = 128
	maxSlots      = 1024
	// maxText bounds what an agent may say in words: versions, reasons, refusals.
	maxText = 512
	// outboxSize is how many Opens may wait to be sent; who asks for more waits.
	outboxSize = 64
)

// ErrNoSlot is why Dial fails when the agent has given its slots to others.
var ErrNoSlot = errors.New("the worker has no free slot")

// Fleet is the set of attached workers. It serves AgentService and FleetService.
type Fleet struct {
	archfarmv1.UnimplementedAgentServiceServer
	archfarmv1.UnimplementedFleetServiceServer

	log     *slog.Logger
	changed func([]*Worker)

	mu      sync.Mutex
	workers map[string]*Worker // by name
	pending map[string]chan net.Conn
	conns   map[string]map[*Conn]struct{} // open ones, by the worker's name
	orphans map[string]*time.Timer        // of names whose agent has left; severs their conns
	serial  uint64
	closed  chan struct{}
}

// New returns a fleet without workers. Changed is called after every change of
// the set, or of one worker's report, with all workers by name; calls do not overlap.
func New(log *slog.Logger, changed func([]*Worker)) *Fleet {
	return &Fleet{
		log: log, changed: changed, workers: map[string]*Worker{}, pending: map[string]chan net.Conn{},
		conns: map[string]map[*Conn]struct{}{}, orphans: map[string]*time.Timer{}, closed: make(chan struct{}),
	}
}

// Close ends every agent's stream: the agents look for another coordinator.
// Connections stay as they are. It must be called once.
func (f *Fleet) Close() { close(f.closed) }

// Workers returns the attached workers by name.
func (f *Fleet) Workers() []*Worker {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sorted()
}

// Worker returns the attached worker of that name.
func (f *Fleet) Worker(name string) (*Worker, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w, ok := f.workers[name]
	return w, ok
}

func (f *Fleet) sorted() []*Worker {
	out := make([]*Worker, 0, len(f.workers))
	for _, w := range f.workers {
		out = append(out, w)
	}
	slices.SortFunc(out, func(a, b *Worker) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// ListWorkers implements FleetService.
func (f *Fleet) ListWorkers(context.Context, *archfarmv1.ListWorkersRequest) (*archfarmv1.ListWorkersResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	response := &archfarmv1.ListWorkersResponse{}
	for _, w := range f.sorted() {
		response.Workers = append(response.Workers, &archfarmv1.Worker{
			Name: w.Name, Platforms: w.platformNames, Slots: &archfarmv1.Slots{Total: w.report.GetSlots().GetTotal(), Used: w.report.GetSlots().GetUsed()},
			State: w.report.GetState(), Reason: w.report.GetReason(), Version: w.Version, BuildkitVersion: w.BuildKitVersion,
			Machine: w.Machine, Since: timestamppb.New(w.Since),
		})
	}
	return response, nil
}

// Attach implements AgentService: it keeps one worker in the fleet for as long
// as its agent's stream lasts and its reports keep coming.
func (f *Fleet) Attach(stream archfarmv1.AgentService_AttachServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	w, err := f.newWorker(first.GetHello(), stream)
	if err != nil {
		return err
	}
	if err := stream.Send(&archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Welcome{
		Welcome: &archfarmv1.Welcome{HeartbeatSeconds: uint32(heartbeat / time.Second)},
	}}); err != nil {
		return err
	}
	f.add(w)
	f.log.Info("worker attached", "worker", w.Name, "platforms", w.platformNames, "slots", w.report.GetSlots().GetTotal(), "version", w.Version, "buildkit", w.BuildKitVersion)
	err = f.serve(w, stream)
	f.remove(w)
	f.log.Info("worker detached", "worker", w.Name, "reason", err)
	return err
}

// newWorker checks what an agent says of itself.
func (f *Fleet) newWorker(hello *archfarmv1.Hello, stream archfarmv1.AgentService_AttachServer) (*Worker, error) {
	if hello == nil {
		return nil, status.Error(codes.InvalidArgument, "attaching a worker: the first message must be Hello")
	}
	if err := checkName(hello.GetName()); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "attaching a worker: %v", err)
	}
	if n := len(hello.GetPlatforms()); n == 0 || n > maxPlatforms {
		return nil, status.Errorf(codes.InvalidArgument, "attaching worker %s: %d platforms, want 1 to %d", hello.GetName(), n, maxPlatforms)
	}
	report, err := checkReport(hello.GetReport())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "attaching worker %s: %v", hello.GetName(), err)
	}
	w := &Worker{
		Name: hello.GetName(), Version: text(hello.GetVersion()), BuildKitVersion: text(hello.GetBuildkitVersion()), Machine: text(hello.GetMachine()),
		Since: time.Now(), fleet: f, report: report, reported: time.Now(), outbox: make(chan *archfarmv1.AttachResponse, outboxSize), gone: make(chan struct{}),
	}
	for _, name := range hello.GetPlatforms() {
		p, err := platforms.Parse(name)
		if err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "attaching worker %s: platform %q: %v", w.Name, name, err)
		}
		p = platforms.Normalize(p)
		w.Platforms = append(w.Platforms, p)
		w.platformNames = append(w.platformNames, platforms.FormatAll(p))
	}
	if p, ok := peer.FromContext(stream.Context()); ok {
		w.Address = p.Addr.String()
	}
	return w, nil
}

func checkName(name string) error {
	if name == "" || len(name) > maxNameLength {
		return fmt.Errorf("the name must have 1 to %d characters", maxNameLength)
	}
	for _, r := range name {
		if r <= ' ' || r > '~' {
			return fmt.Errorf("the name %q has characters other than visible ASCII", name)
		}
	}
	return nil
}

// checkReport bounds what an agent says of the present.
func checkReport(r *archfarmv1.Report) (*archfarmv1.Report, error) {
	slots := r.GetSlots()
	if slots.GetTotal() > maxSlots || slots.GetUsed() > maxSlots {
		return nil, fmt.Errorf("%d of %d slots used, at most %d are possible", slots.GetUsed(), slots.GetTotal(), maxSlots)
	}
	return &archfarmv1.Report{Slots: slots, State: r.GetState(), Reason: text(r.GetReason())}, nil
}

// text makes an agent's words fit for errors, logs and tables.
func text(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s[:min(len(s), maxText)])
	return strings.TrimSpace(s)
}

// serve handles one agent's messages and sends the coordinator's, until the
// stream ends or the agent has been silent for too long. Its goroutines end with
// the stream, which ends when Attach returns. Sending is one of them, since an
// agent that does not read must not keep its silence from being noticed.
func (f *Fleet) serve(w *Worker, stream archfarmv1.AgentService_AttachServer) error {
	messages, failed := make(chan *archfarmv1.AttachRequest), make(chan error, 2)
	go func() { failed <- receive(stream, messages) }()
	go func() {
		if err := send(stream, w.outbox); err != nil {
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
		case <-w.gone: // replaced by a newer stream of the same name
			return status.Errorf(codes.Aborted, "another agent attached as %s: worker names must be unique", w.Name)
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
func send(stream archfarmv1.AgentService_AttachServer, outbox <-chan *archfarmv1.AttachResponse) error {
	for {
		select {
		case m := <-outbox:
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (f *Fleet) handle(w *Worker, m *archfarmv1.AttachRequest) error {
	switch m := m.GetMessage().(type) {
	case *archfarmv1.AttachRequest_Report:
		report, err := checkReport(m.Report)
		if err != nil {
			return status.Errorf(codes.InvalidArgument, "reading the report of worker %s: %v", w.Name, err)
		}
		f.mu.Lock()
		w.report, w.reported = report, time.Now()
		f.notify()
	case *archfarmv1.AttachRequest_Refused:
		w.refuse(m.Refused)
	}
	return nil
}

// notify calls changed with the set as it is, in order; it unlocks.
func (f *Fleet) notify() {
	defer f.mu.Unlock()
	f.changed(f.sorted())
}

func (f *Fleet) add(w *Worker) {
	f.mu.Lock()
	f.serial++
	w.id = fmt.Sprintf("%s#%d", w.Name, f.serial)
	if old, ok := f.workers[w.Name]; ok {
		old.leave()
	}
	if timer, ok := f.orphans[w.Name]; ok { // it is back: its heartbeats vouch for what is open, too
		timer.Stop()
		delete(f.orphans, w.Name)
	}
	f.workers[w.Name] = w
	f.notify()
}

// remove lets go of a worker. Its connections may outlive its agent's stream,
// but not for longer than an agent may be silent.
func (f *Fleet) remove(w *Worker) {
	w.leave()
	w.closeControl()
	f.mu.Lock()
	if f.workers[w.Name] == w {
		delete(f.workers, w.Name)
		f.orphans[w.Name] = time.AfterFunc(lostAfter, func() { f.disown(w.Name) })
	}
	f.notify()
}
