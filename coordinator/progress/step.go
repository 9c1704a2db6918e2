package progress

import (
	"fmt"
	"strings"
	"sync"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/coordinator/build"
)

// Step is a vertex of the farm's own in a Stream. It is safe for concurrent
// use. What comes after Done or Cached is left out.
type Step struct {
	stream *Stream
	digest string
	name   string

	mu        sync.Mutex
	started   *timestamppb.Timestamp
	completed bool
	lines     map[string]*controlapi.VertexStatus // open, by id
}

// Step returns a new step of the stream. Clients see it once it starts. Steps of
// one name are different steps.
func (s *Stream) Step(name string) *Step {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps++
	return &Step{
		stream: s,
		digest: digest.FromString(fmt.Sprintf("archfarm step %d\x00%s", s.steps, name)).String(),
		name:   validText(name),
		lines:  make(map[string]*controlapi.VertexStatus),
	}
}

// Start starts the step, if it has not started yet. The other methods do so too.
func (t *Step) Start() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.start()
}

// Log adds a line to the step's log, as standard error. The end of the line may
// be left out.
func (t *Step) Log(msg string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.completed {
		return
	}
	t.start()
	if !strings.HasSuffix(msg, "\n") {
		msg += "\n"
	}
	t.stream.Publish(&controlapi.StatusResponse{Logs: []*controlapi.VertexLog{
		{Vertex: t.digest, Timestamp: t.now(), Stream: 2, Msg: []byte(msg)},
	}})
}

// Warn adds a warning to the step, whose digest it gets.
func (t *Step) Warn(w *controlapi.VertexWarning) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.completed {
		return
	}
	t.start()
	w.Vertex = t.digest
	t.stream.Publish(&controlapi.StatusResponse{Warnings: []*controlapi.VertexWarning{w}})
}

// Status shows text as what the step is at. The id names the line: another text
// of the same id takes its place, which clients show as the former line done and
// a new one begun, since they print a line's identity and not its name. An empty
// text only completes the line. Lines of one step should differ in their text.
func (t *Step) Status(id, text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.completed {
		return
	}
	t.start()
	text = validText(text)
	out := &controlapi.StatusResponse{}
	old := t.lines[id]
	if old == nil && text == "" || old != nil && old.ID == text {
		return
	}
	now := t.now()
	if old != nil {
		delete(t.lines, id)
		out.Statuses = append(out.Statuses, finished(old, now))
	}
	if text != "" {
		line := &controlapi.VertexStatus{ID: text, Vertex: t.digest, Name: text, Timestamp: now, Started: now}
		t.lines[id] = line
		out.Statuses = append(out.Statuses, line)
	}
	t.stream.Publish(out)
}

// Done completes the step, with err as its error if not nil. Only the first Done
// or Cached counts.
func (t *Step) Done(err error) {
	reason := ""
	if err != nil {
		reason = validText(build.Message(err))
	}
	t.complete(&controlapi.Vertex{Error: reason})
}

// Cached completes the step as one that had not to be run.
func (t *Step) Cached() {
	t.complete(&controlapi.Vertex{Cached: true})
}

// complete fills in the last state of the step and publishes it.
func (t *Step) complete(v *controlapi.Vertex) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.completed {
		return
	}
	t.completed = true
	now := t.now()
	if t.started == nil {
		t.started = now
	}
	v.Digest, v.Name, v.Started, v.Completed = t.digest, t.name, t.started, now
	out := &controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{v}}
	for _, line := range t.lines {
		out.Statuses = append(out.Statuses, finished(line, now))
	}
	t.lines = nil
	t.stream.Publish(out)
}

// start publishes the start of the step if that is still to be done. t.mu is
// held.
func (t *Step) start() {
	if t.started != nil || t.completed {
		return
	}
	t.started = t.now()
	t.stream.Publish(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{
		{Digest: t.digest, Name: t.name, Started: t.started},
	}})
}

func (t *Step) now() *timestamppb.Timestamp { return timestamppb.New(t.stream.Now()) }

func finished(line *controlapi.VertexStatus, now *timestamppb.Timestamp) *controlapi.VertexStatus {
	return &controlapi.VertexStatus{
		ID: line.ID, Vertex: line.Vertex, Name: line.Name, Timestamp: now, Started: line.Started, Completed: now,
	}
}

// validText makes text fit for a protobuf string, which gRPC refuses to send
// otherwise.
func validText(text string) string {
	return strings.ToValidUTF8(text, "\uFFFD")
}
