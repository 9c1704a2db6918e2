package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	bksession "github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// tree makes the legs' trees of files one, which the client receives as if one
// sender had it (fsutil, receive.go, describes the protocol). Each leg lists its
// files first; the lists wait on disk until all are there, and are merged when
// nothing in them conflicts. Then the client asks for contents, which pass through.
type tree struct {
	merge *Merge
	apart bool

	ctx    context.Context // of the client's stream
	cancel context.CancelFunc

	mu     sync.Mutex
	client bksession.Caller
	legs   []*branch // in the order of the result's platforms
	listed int

	over    chan struct{} // closed by the first of what ends the transfer
	outcome error
	once    sync.Once
}

// branch is one leg's part of a tree.
type branch struct {
	leg    int
	key    string
	stream grpc.ServerStream
	list   *list
	last   chan struct{} // closed when the leg has said its last word
}

func newTree(m *Merge, apart bool) *tree {
	t := &tree{merge: m, apart: apart, over: make(chan struct{})}
	t.ctx, t.cancel = context.WithCancel(m.ctx)
	return t
}

func (t *tree) begin(client bksession.Caller, parts []Part) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.client = client
	for _, p := range parts {
		t.legs = append(t.legs, &branch{leg: p.Leg, key: p.Key, last: make(chan struct{})})
	}
}

// serve reads a leg's list, then leaves its stream to the transfer.
func (t *tree) serve(leg int, stream grpc.ServerStream, md metadata.MD) error {
	b, err := t.join(leg, stream)
	if err != nil {
		return err
	}
	if b.list, err = t.merge.shelf.list(); err != nil {
		return t.merge.blameSpool(err)
	}
	defer b.list.close()
	if err := readList(stream, b.list); err != nil {
		t.leave(b, false)
		return t.merge.blameSpool(fmt.Errorf("exporting files: %w", err))
	}
	if t.arrived() {
		t.merge.active.Go(func() { t.end(t.transfer(md)) }) // ends with the client's stream or a leg's, see end
	}
	select {
	case <-t.over:
	case <-stream.Context().Done():
		if t.leave(b, true) {
			return context.Cause(stream.Context())
		}
		t.end(errShare)
	}
	if errors.Is(t.outcome, errShare) {
		<-stream.Context().Done()
		return context.Cause(stream.Context())
	}
	return t.outcome
}

func (t *tree) join(leg int, stream grpc.ServerStream) (*branch, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.IndexFunc(t.legs, func(b *branch) bool { return b.leg == leg })
	if i < 0 {
		return nil, status.Error(codes.FailedPrecondition, "exporting files: this leg has no part in the result")
	}
	if t.legs[i].stream != nil {
		return nil, status.Error(codes.AlreadyExists, "exporting files: this leg has sent its files already")
	}
	t.legs[i].stream = stream
	return t.legs[i], nil
}

// arrived tells whether the leg that has listed its files was the last to do so.
func (t *tree) arrived() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.listed++
	return t.listed == len(t.legs)
}

// leave lets another worker list a leg's files, in the place of one that was lost,
// unless the client knows of them already.
func (t *tree) leave(b *branch, listed bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.listed == len(t.legs) {
		return false
	}
	if listed {
		t.listed--
	}
	b.stream = nil
	return true
}

// end ends the transfer. Streams that are still in use end with their calls.
func (t *tree) end(outcome error) {
	t.once.Do(func() {
		t.outcome = outcome
		close(t.over)
		t.cancel()
	})
}

// readList puts a leg's files onto a list, up to the mark that there are no more.
func readList(stream grpc.ServerStream, to *list) error {
	for {
		var p types.Packet
		if err := stream.RecvMsg(&p); err != nil {
			return unexpected(err)
		}
		switch {
		case p.Type == types.PACKET_ERR:
			return fmt.Errorf("error from sender: %s", p.Data)
		case p.Type != types.PACKET_STAT:
			return status.Errorf(codes.InvalidArgument, "a worker sent %s before it had listed its files", p.Type)
		case p.Stat == nil:
			return nil
		}
		record, err := p.Stat.MarshalVT()
		if err != nil {
			return err
		}
		if err := to.add(record); err != nil {
			return err
		}
	}
}

// unexpected makes the end of a stream an error.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// transfer sends the client the merged list, and then what it asks for.
func (t *tree) transfer(md metadata.MD) error {
	if err := t.check(); err != nil {
		return t.merge.blame(err)
	}
	files, err := t.files()
	if err != nil {
		return err
	}
	if method := bksession.MethodURL(filesync.FileSend_ServiceDesc.ServiceName, "diffcopy"); !t.client.Supports(method) {
		return fmt.Errorf("method %s not supported by the client", method)
	}
	ctx := metadata.NewOutgoingContext(t.client.Context(t.ctx), callOf(md))
	client, err := filesync.NewFileSendClient(t.client.Conn()).DiffCopy(ctx)
	if err != nil {
		return err
	}
	s := &transfer{tree: t, client: client, local: make([][]uint32, len(t.legs))}
	group := &errgroup.Group{}
	group.Go(func() error { return t.stopAfter(s.offer(files)) })
	group.Go(func() error { return t.stopAfter(s.requests()) })
	for i := range t.legs {
		t.merge.active.Go(func() { // ends with the leg's call
			if err := s.contents(i); err != nil {
				t.end(err)
			}
		})
	}
	return group.Wait()
}

func (t *tree) stopAfter(err error) error {
	if err != nil {
		t.end(err)
	}
	return err
}

// callOf is the metadata of a worker's call that the client understands.
func callOf(md metadata.MD) metadata.MD {
	out := metadata.MD{}
	for k, v := range md {
		if strings.HasPrefix(k, "buildkit-") {
			out[k] = v
		}
	}
	return out
}

// files returns the merged list from its beginning.
func (t *tree) files() (*mergedList, error) {
	m := &mergedList{}
	for _, b := range t.legs {
		next, err := b.list.read()
		if err != nil {
			return nil, err
		}
		m.next = append(m.next, next)
	}
	return m, m.start()
}

// check goes through the lists for what one buildkitd would not write, and says
// so in its words (exporter/local/export.go).
func (t *tree) check() error {
	files, err := t.files()
	if err != nil {
		return err
	}
	later, conflict := len(t.legs), error(nil)
	for {
		same, err := files.pop()
		if err != nil {
			return err
		}
		if len(same) == 0 {
			return conflict
		}
		if t.apart {
			if len(same) > 1 && !strings.Contains(same[0].stat.Path, "/") {
				return status.Errorf(codes.Unknown, "duplicate path %s: file exists", same[0].stat.Path)
			}
			continue
		}
		same = slices.DeleteFunc(same, func(e entry) bool { return os.FileMode(e.stat.Mode).IsDir() })
		if len(same) > 1 && same[1].leg < later { // the platforms are checked in their order, each path by path
			later = same[1].leg
			conflict = status.Errorf(codes.Unknown, "cannot overwrite %s from %s with %s when split option is disabled",
				same[0].stat.Path, t.legs[same[0].leg].key, t.legs[later].key)
		}
	}
}
