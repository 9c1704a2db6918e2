package progress_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/archfarm/archfarm/coordinator/progress"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/protobuf/proto"
)

const maxMessage = 1 << 20

// reader keeps what a client would know after the messages it was sent.
type reader struct {
	messages int
	largest  int
	vertices map[string]*controlapi.Vertex
	runs     map[string]*controlapi.Vertex // by digest and start
	lines    map[string]*controlapi.VertexStatus
	unknown  []string // what was about vertices that had not been named
	log      []byte
	warnings int
}

func newReader() *reader {
	return &reader{
		vertices: make(map[string]*controlapi.Vertex),
		runs:     make(map[string]*controlapi.Vertex),
		lines:    make(map[string]*controlapi.VertexStatus),
	}
}

func (r *reader) take(m *controlapi.StatusResponse) error {
	r.messages++
	r.largest = max(r.largest, m.SizeVT())
	for _, v := range m.Vertexes {
		// As BuildKit's own display: a repeated initial state resets nothing.
		if r.vertices[v.Digest].GetStarted() == nil || v.Started != nil {
			r.vertices[v.Digest] = v
		}
		r.runs[fmt.Sprint(v.Digest, v.Started)] = v
	}
	for _, s := range m.Statuses {
		r.about(s.Vertex)
		r.lines[s.Vertex+s.ID] = s
	}
	for _, l := range m.Logs {
		r.about(l.Vertex)
		r.log = append(r.log, l.Msg...)
	}
	for _, w := range m.Warnings {
		r.about(w.Vertex)
		r.warnings++
	}
	return nil
}

func (r *reader) about(vertex string) {
	if r.vertices[vertex] == nil {
		r.unknown = append(r.unknown, vertex)
	}
}

// all reads a closed stream from its start.
func all(t interface {
	Context() context.Context
	Fatal(...any)
}, s *progress.Stream) *reader {
	r := newReader()
	if err := s.Follow(t.Context(), r.take); err != nil {
		t.Fatal(err)
	}
	return r
}

func vertex(name string) *controlapi.StatusResponse {
	return &controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: dgst(name), Name: name, Started: at(1)}}}
}

func completed(name string) *controlapi.StatusResponse {
	r := vertex(name)
	r.Vertexes[0].Completed = at(2)
	return r
}

func logged(name string, msg []byte) *controlapi.StatusResponse {
	return &controlapi.StatusResponse{Logs: []*controlapi.VertexLog{{Vertex: dgst(name), Msg: msg}}}
}

func TestFollow_ReplaysThenFollowsUntilClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := progress.NewStream(0)
		s.Publish(vertex("a"))
		s.Publish(logged("a", []byte("one")))
		got, end := newReader(), make(chan error)
		go func() { end <- s.Follow(t.Context(), got.take) }()
		synctest.Wait()
		if string(got.log) != "one" || got.messages != 1 {
			t.Fatalf("the replay was %q in %d messages", got.log, got.messages)
		}
		s.Publish(logged("a", []byte(" two")))
		synctest.Wait()
		s.Publish(completed("a"))
		s.Close()
		s.Close()
		s.Publish(logged("a", []byte(" too late")))
		if err := <-end; err != nil {
			t.Fatal(err)
		}
		if string(got.log) != "one two" || got.vertices[dgst("a")].Completed == nil {
			t.Errorf("got %q and %v", got.log, got.vertices)
		}
		if late := all(t, s); string(late.log) != "one two" {
			t.Errorf("after the end: %q", late.log)
		}
	})
}

func TestFollow_EndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := progress.NewStream(0)
		why := errors.New("the client is gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		end := make(chan error)
		go func() { end <- s.Follow(ctx, newReader().take) }()
		synctest.Wait()
		cancel(why)
		if err := <-end; !errors.Is(err, why) {
			t.Errorf("got %v, want %v", err, why)
		}
		s.Publish(vertex("a"))
		if err := s.Follow(ctx, newReader().take); !errors.Is(err, why) {
			t.Errorf("with messages left: got %v, want %v", err, why)
		}
	})
}

func TestFollow_ReturnsTheErrorOfSend(t *testing.T) {
	t.Parallel()
	s := progress.NewStream(0)
	s.Publish(vertex("a"))
	why := errors.New("broken pipe")
	if err := s.Follow(t.Context(), func(*controlapi.StatusResponse) error { return why }); !errors.Is(err, why) {
		t.Errorf("got %v, want %v", err, why)
	}
}

func TestPublish_EmptyMessagesAreLeftOut(t *testing.T) {
	t.Parallel()
	s := progress.NewStream(0)
	s.Publish(nil)
	s.Publish(&controlapi.StatusResponse{})
	s.Close()
	if got := all(t, s); got.messages != 0 {
		t.Errorf("%d messages", got.messages)
	}
}

func TestFollow_LoneMessageIsNotCopied(t *testing.T) {
	t.Parallel()
	s := progress.NewStream(0)
	m := everything()
	s.Publish(m)
	s.Close()
	if err := s.Follow(t.Context(), func(got *controlapi.StatusResponse) error {
		if got != m {
			t.Error("the message was copied")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestFollow_LaggardGetsBatchesAndPublishersDoNotWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := progress.NewStream(64 << 20)
		stuck, quick := newReader(), newReader()
		release := make(chan struct{})
		var followers sync.WaitGroup
		followers.Go(func() {
			if err := s.Follow(t.Context(), func(m *controlapi.StatusResponse) error {
				<-release
				return stuck.take(m)
			}); err != nil {
				t.Error(err)
			}
		})
		followers.Go(func() {
			if err := s.Follow(t.Context(), quick.take); err != nil {
				t.Error(err)
			}
		})
		s.Publish(vertex("a"))
		synctest.Wait()
		for range 300 {
			s.Publish(logged("a", make([]byte, 10_000)))
			synctest.Wait() // all that can run has run: only the stuck one lags
		}
		s.Publish(completed("a"))
		s.Close()
		synctest.Wait()
		if quick.messages != 302 || len(quick.log) != 3_000_000 {
			t.Errorf("the quick follower has %d messages with %d bytes", quick.messages, len(quick.log))
		}
		close(release)
		followers.Wait()
		if len(stuck.log) != 3_000_000 || stuck.vertices[dgst("a")].Completed == nil {
			t.Errorf("the stuck follower has %d bytes and %v", len(stuck.log), stuck.vertices)
		}
		// The first one, sent before the rest came, and about 3 MB in batches.
		if stuck.messages != 4 || stuck.largest > maxMessage {
			t.Errorf("%d messages, of up to %d bytes", stuck.messages, stuck.largest)
		}
	})
}

func TestPublish_SplitsWhatIsTooLarge(t *testing.T) {
	t.Parallel()
	s := progress.NewStream(64 << 20)
	large := &controlapi.StatusResponse{}
	for i := range 3000 {
		name := fmt.Sprint("v", i)
		large.Vertexes = append(large.Vertexes, &controlapi.Vertex{Digest: dgst(name), Name: name, Inputs: []string{dgst("x"), dgst("y"), dgst("z")}})
		large.Statuses = append(large.Statuses, &controlapi.VertexStatus{ID: name, Vertex: dgst(name)})
		large.Logs = append(large.Logs, &controlapi.VertexLog{Vertex: dgst(name), Msg: make([]byte, 1000)})
		large.Warnings = append(large.Warnings, &controlapi.VertexWarning{Vertex: dgst(name)})
	}
	large.Logs = append(large.Logs, &controlapi.VertexLog{Vertex: dgst("v1"), Msg: make([]byte, 2*maxMessage)})
	before := proto.Clone(large)
	s.Publish(large)
	s.Close()
	requireEqual(t, large, before)
	again, messages, tooLarge := &controlapi.StatusResponse{}, 0, 0
	if err := s.Follow(t.Context(), func(m *controlapi.StatusResponse) error {
		messages++
		if m.SizeVT() > maxMessage {
			tooLarge++
			if len(named(m)) != 1 {
				t.Errorf("a message of %d bytes has %d items", m.SizeVT(), len(named(m)))
			}
		}
		proto.Merge(again, m)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	requireEqual(t, again, large)
	if want := 1 + large.SizeVT()/maxMessage; tooLarge != 1 || messages > want {
		t.Errorf("%d messages, %d of them over the size; at most %d are needed, and only the one log is over", messages, tooLarge, want)
	}
}

// For the race detector: several legs publish, followers come and go, one never
// reads on until the end.
func TestStream_ManyPublishersAndFollowers(t *testing.T) {
	t.Parallel()
	s := progress.NewStream(64 << 10)
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	release := make(chan struct{})
	var publishers, followers sync.WaitGroup
	readers := make([]*reader, 4)
	for i := range readers {
		readers[i] = newReader()
		followers.Go(func() {
			err := s.Follow(t.Context(), func(m *controlapi.StatusResponse) error {
				if i == 0 {
					<-release
				}
				if _, err := proto.Marshal(m); err != nil {
					return err
				}
				return readers[i].take(m)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	for range 4 {
		followers.Go(func() {
			if err := s.Follow(ctx, func(*controlapi.StatusResponse) error { return nil }); err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		publishers.Go(func() {
			leg := progress.NewLeg(platform, true)
			for i := range 300 {
				s.Publish(leg.Translate(vertex(fmt.Sprint(i))))
				s.Publish(leg.Translate(logged(fmt.Sprint(i), make([]byte, 500))))
				if i%2 == 0 {
					s.Publish(leg.Translate(completed(fmt.Sprint(i))))
				}
			}
			s.Publish(leg.Fail(epoch, "cancelled"))
		})
	}
	publishers.Go(func() {
		for i := range 100 {
			step := s.Step("waiting for a worker")
			step.Status("place", fmt.Sprint(i, " ahead"))
			step.Log("a line")
			step.Done(nil)
		}
	})
	publishers.Wait()
	leave()
	s.Close()
	close(release)
	followers.Wait()
	for i, r := range readers {
		if len(r.vertices) != 700 {
			t.Errorf("follower %d knows %d vertices", i, len(r.vertices))
		}
		for d, v := range r.vertices {
			if v.Completed == nil {
				t.Errorf("follower %d: vertex %s is open", i, d)
			}
		}
	}
}

func BenchmarkPublish(b *testing.B) {
	s := progress.NewStream(0)
	s.Publish(vertex("a"))
	msg := make([]byte, 100)
	b.ReportAllocs()
	for b.Loop() {
		s.Publish(logged("a", msg))
	}
}
