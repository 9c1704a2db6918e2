package export

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	bksession "github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// endMark is what a tar archive ends in: two blocks of zeros.
var endMark = make([]byte, 1024)

// messageSize is how much goes to the client at once.
const messageSize = 32 << 10

// tarball makes the legs' tar archives one, whose folders are in the order of
// their names. A leg whose turn has not come is not read, so it waits.
type tarball struct {
	merge    *Merge
	exporter int

	mu     sync.Mutex
	client bksession.Caller
	turns  []turn
	out    *file // opened in the first leg's turn, then used by one turn after the other

	ctx    context.Context // of the client's stream
	cancel context.CancelFunc

	failed chan struct{} // closed by the first failure
	why    error
	once   sync.Once
}

type turn struct {
	leg   int
	taken *atomic.Bool
	done  chan struct{} // closed when the leg's share is with the client
}

func newTarball(m *Merge, exporter int) *tarball {
	t := &tarball{merge: m, exporter: exporter, failed: make(chan struct{})}
	t.ctx, t.cancel = context.WithCancel(m.ctx)
	return t
}

// fail ends what goes to the client.
func (t *tarball) fail(why error) {
	t.once.Do(func() {
		t.why = why
		close(t.failed)
		t.cancel()
	})
}

func (t *tarball) begin(client bksession.Caller, parts []Part) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.client = client
	parts = slices.Clone(parts)
	slices.SortStableFunc(parts, func(a, b Part) int { return strings.Compare(folder(a.Key), folder(b.Key)) })
	for _, p := range parts {
		t.turns = append(t.turns, turn{leg: p.Leg, taken: &atomic.Bool{}, done: make(chan struct{})})
	}
}

// folder is where BuildKit puts the files of a platform.
func folder(key string) string {
	name := strings.NewReplacer("/", "_", `\`, "_", ":", "_").Replace(key)
	if name == "." || name == ".." {
		return strings.Repeat("_", len(name))
	}
	return name
}

func (t *tarball) serve(leg int, stream grpc.ServerStream, _ metadata.MD) error {
	i, err := t.turn(stream.Context(), leg)
	if err != nil {
		return err
	}
	// Without this leg's share the archive is nothing: do not wait for the client.
	defer context.AfterFunc(stream.Context(), func() { t.fail(errShare) })()
	if t.out == nil {
		if t.out, err = t.open(); err != nil {
			t.fail(err)
			return err
		}
	}
	if err := t.share(stream); err != nil {
		return err
	}
	if i == len(t.turns)-1 {
		return t.finish()
	}
	close(t.turns[i].done)
	return nil
}

// turn waits for that of the leg.
func (t *tarball) turn(ctx context.Context, leg int) (int, error) {
	i := slices.IndexFunc(t.turns, func(turn turn) bool { return turn.leg == leg })
	if i < 0 {
		return 0, status.Error(codes.FailedPrecondition, "exporting a tar archive: this leg has no part in the result")
	}
	if t.turns[i].taken.Swap(true) {
		return 0, status.Error(codes.AlreadyExists, "exporting a tar archive: this leg has sent its share already")
	}
	if i == 0 {
		return i, nil
	}
	select {
	case <-t.turns[i-1].done:
		return i, nil
	case <-t.failed:
		if !errors.Is(t.why, errShare) {
			return 0, t.why
		}
		<-ctx.Done()
	case <-ctx.Done():
	}
	t.turns[i].taken.Store(false) // for another worker, where this one was lost
	return 0, context.Cause(ctx)
}

// file is the client's file. It takes whole messages, however small the writes.
type file struct {
	*bufio.Writer
	io.Closer
}

func (t *tarball) open() (*file, error) {
	w, err := filesync.CopyFileWriter(t.client.Context(t.ctx), nil, t.exporter, t.client)
	if err != nil {
		return nil, err
	}
	return &file{Writer: bufio.NewWriterSize(w, messageSize), Closer: w}, nil
}

// share sends a leg's archive on, without its end mark.
func (t *tarball) share(stream grpc.ServerStream) error {
	body := &bodyWriter{to: t.out}
	_, err := (&messages{stream: stream}).WriteTo(body)
	if err == nil && !bytes.Equal(body.held, endMark) {
		// A worker whose export fails ends its stream as if all were well, and tells
		// of the failure in its own answer.
		err = status.Error(codes.DataLoss, "exporting a tar archive: the worker's share is cut short")
	}
	switch {
	case body.err != nil:
		t.fail(body.err)
	case err != nil:
		t.fail(errShare)
	}
	return err
}

// finish ends the client's archive, and waits until it has that.
func (t *tarball) finish() error {
	if _, err := t.out.Write(endMark); err != nil {
		return err
	}
	if err := t.out.Flush(); err != nil {
		return err
	}
	return t.out.Close()
}

// bodyWriter holds back the last bytes that it was given, which may be the end mark.
type bodyWriter struct {
	to   io.Writer
	held []byte
	err  error // of to
}

func (w *bodyWriter) Write(p []byte) (int, error) {
	surplus := len(w.held) + len(p) - len(endMark)
	if surplus <= 0 {
		w.held = append(w.held, p...)
		return len(p), nil
	}
	first := min(surplus, len(w.held))
	if _, w.err = w.to.Write(w.held[:first]); w.err != nil {
		return 0, w.err
	}
	w.held = w.held[:copy(w.held, w.held[first:])]
	rest := surplus - first
	if _, w.err = w.to.Write(p[:rest]); w.err != nil {
		return 0, w.err
	}
	w.held = append(w.held, p[rest:]...)
	return len(p), nil
}
