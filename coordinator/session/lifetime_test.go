package session_test

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/session"
)

func pong(context.Context) ([]byte, error) { return []byte("pong"), nil }

func (w *worker) reaches(t *testing.T, id string) {
	t.Helper()
	if got, err := callUnary(t.Context(), w.caller(t, id)); err != nil || string(got) != "pong" {
		t.Errorf("worker %s calls the client: %q, %v", w.name, got, err)
	}
}

func TestRelays_TwoUsersOnOneWorkerShareOneConnection(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t, &probe{unary: pong})
	first := f.expose(t, w, s.ID())
	second := f.expose(t, w, s.ID())
	w.reaches(t, s.ID())
	first()
	first() // counts once
	w.reaches(t, s.ID())
	second()
	if len(w.began) != 1 {
		t.Errorf("the session was opened %d times", len(w.began))
	}
	if w.knows(t, s.ID()) || f.relays.Len() != 0 {
		t.Error("the worker still has the session after its last user has released it")
	}
}

// BuildKit forgets a session when a connection of that id ends, also if there is a
// newer one: builds that share a session (bake) follow each other closely.
func TestRelays_ANewUserIsNotCutOffByTheEndOfTheLast(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t, &probe{unary: pong})
	release := f.expose(t, w, s.ID())
	for range 50 {
		var releasing sync.WaitGroup
		releasing.Go(release)
		for f.relays.Used("w", s.ID()) { // until the relay is ending
			runtime.Gosched()
		}
		release = f.expose(t, w, s.ID())
		releasing.Wait()
		w.reaches(t, s.ID())
	}
}

func TestRelays_AClientThatEndsItsSessionEndsItOnEveryWorker(t *testing.T) {
	t.Parallel()
	f, a, b := newFarm(t), newWorker(t, "a"), newWorker(t, "b")
	s, end := f.client(t, &probe{unary: pong})
	f.expose(t, a, s.ID())
	f.expose(t, b, s.ID())
	a.reaches(t, s.ID())
	b.reaches(t, s.ID())
	end()
	for _, w := range []*worker{a, b} {
		await(t, "the session ends on "+w.name, w.ended)
		await(t, "the relay ends", f.relays.Ended(w.name, s.ID()))
	}
}

func TestRelays_AWorkerThatIsLostEndsOnlyItsOwnRelay(t *testing.T) {
	t.Parallel()
	f, a, b := newFarm(t), newWorker(t, "a"), newWorker(t, "b")
	s, _ := f.client(t, &probe{unary: pong})
	f.expose(t, a, s.ID())
	f.expose(t, b, s.ID())
	a.reaches(t, s.ID())
	ended := f.relays.Ended("a", s.ID())
	a.server.stop()
	await(t, "the relay to the lost worker ends", ended)
	b.reaches(t, s.ID())
}

func TestRelays_OneThatEndedByItselfIsReplacedForTheNextUser(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t, &probe{unary: pong})
	first := f.expose(t, w, s.ID())
	w.reaches(t, s.ID())
	ended := f.relays.Ended("w", s.ID())
	w.kill <- struct{}{} // as buildkitd does when its health check of the session fails
	await(t, "the relay ends", ended)
	second := f.expose(t, w, s.ID())
	w.reaches(t, s.ID())
	first()
	w.reaches(t, s.ID())
	second()
	if f.relays.Len() != 0 {
		t.Error("a relay is left")
	}
}

func TestRelays_ASessionThatIsNeverOpenedIsNotFound(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	f.relays.Hasten(10 * time.Millisecond)
	_, err := f.relays.Expose(t.Context(), w, "nobody")
	if status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
	if len(w.began) != 0 || f.relays.Len() != 0 {
		t.Error("something is left of it")
	}
}

func TestRelays_ASessionThatIsOpenedLaterIsWaitedFor(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	open := make(chan string)
	dialed := dialing{worker: w, dialed: make(chan struct{}, 1)}
	id := "chosen-by-the-client"
	go func() {
		_, err := f.relays.Expose(t.Context(), dialed, id)
		open <- errorText(err)
	}()
	stream, err := f.control.Session(metadata.AppendToOutgoingContext(t.Context(), "x-docker-expose-session-uuid", id))
	if err != nil {
		t.Fatal(err)
	}
	if got := <-open; got != "" {
		t.Error(got)
	}
	if len(dialed.dialed) != 1 {
		t.Error("the worker was not dialed")
	}
	_ = stream.CloseSend()
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// dialing tells of the dialing.
type dialing struct {
	*worker
	dialed chan struct{}
}

func (d dialing) Dial(ctx context.Context) (session.Conn, error) {
	d.dialed <- struct{}{}
	return d.worker.Dial(ctx)
}

func TestRelays_AUserThatGivesUpLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	cancel(enough)
	if _, err := f.relays.Expose(ctx, w, "nobody"); !errors.Is(err, enough) {
		t.Errorf("got %v", err)
	}
	if f.relays.Len() != 0 {
		t.Error("a relay is left")
	}
}

// stuck is a worker whose buildkitd takes a session and then does nothing, not
// even end it.
type stuck struct{ *worker }

func newStuck(t *testing.T) stuck {
	t.Helper()
	w := stuck{newWorker(t, "stuck")}
	w.server = serve(t, &door{handle: func(stream controlapi.Control_SessionServer) error {
		<-stream.Context().Done()
		return nil
	}})
	return w
}

func TestRelays_AFrozenWorkerHoldsUpNoRelease(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newStuck(t)
	f.relays.Hasten(10 * time.Millisecond)
	s, _ := f.client(t, &probe{unary: pong})
	f.registry.Settle(t.Context(), s.ID())
	release := f.expose(t, w, s.ID())
	released := make(chan struct{})
	go func() {
		defer close(released)
		release()
	}()
	await(t, "the release of a session on a frozen worker", released)
}

func TestRelays_AWorkerThatIsGoneIsSaidToBeLost(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t)
	w.lost = &build.LostError{Worker: "w"}
	w.server.stop()
	_, err := f.relays.Expose(t.Context(), w, s.ID())
	if lost := (*build.LostError)(nil); !errors.As(err, &lost) {
		t.Errorf("got %v", err)
	}
}

func TestRegistry_RefusesWhatItCannotFindAgain(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	s, _ := f.client(t)
	f.registry.Settle(t.Context(), s.ID())
	long := make([]byte, 1000)
	for i := range long {
		long[i] = 'x'
	}
	for name, test := range map[string]struct {
		id   string
		code codes.Code
	}{
		"no id":           {"", codes.InvalidArgument},
		"an id in use":    {s.ID(), codes.AlreadyExists},
		"an endless id":   {string(long), codes.InvalidArgument},
		"an id like a:b":  {"prefix:" + s.ID(), codes.InvalidArgument},
		"an id like ends": {s.ID() + ":", codes.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			stream, err := f.control.Session(metadata.AppendToOutgoingContext(ctx, "x-docker-expose-session-uuid", test.id))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); status.Code(err) != test.code {
				t.Errorf("got %v, want %v", err, test.code)
			}
		})
	}
	t.Cleanup(func() {
		if n := f.registry.Len(); n != 1 {
			t.Errorf("%d sessions are open, want 1", n)
		}
	})
}

func TestRegistry_NoMoreAreOpenThanTheLimit(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	f.registry.Limit = 1
	s, _ := f.client(t)
	f.registry.Settle(t.Context(), s.ID())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := f.control.Session(metadata.AppendToOutgoingContext(ctx, "x-docker-expose-session-uuid", "second"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a second: %v", err)
	}
}

func TestRegistry_AnIdIsFreeAgainOnceItsSessionHasEnded(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := f.control.Session(metadata.AppendToOutgoingContext(ctx, "x-docker-expose-session-uuid", "again"))
		if err != nil {
			t.Fatal(err)
		}
		release := f.expose(t, w, "again")
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = stream.Recv()
		}
		release()
		cancel()
		if f.registry.Len() != 0 || f.registry.SharedKey("again") != "" {
			t.Fatal("the session is still open")
		}
	}
}

func TestRegistry_SettleReturnsForASessionThatNeverComes(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.registry.Settle(ctx, "nobody")
}
