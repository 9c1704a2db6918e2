package export

import (
	"errors"
	"io"
	"math"
	"sync"

	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// unlisted is the number of a leg's file that another's has replaced.
const unlisted = math.MaxUint32

// entry is a file on the list of a leg.
type entry struct {
	leg  int // its place among the branches
	stat *types.Stat
}

// mergedList is the lists of several legs, merged in the order of a walk.
type mergedList struct {
	next  []func() ([]byte, error)
	heads []*types.Stat // nil after the last
}

func (m *mergedList) start() error {
	m.heads = make([]*types.Stat, len(m.next))
	for i := range m.next {
		if err := m.advance(i); err != nil {
			return err
		}
	}
	return nil
}

func (m *mergedList) advance(i int) error {
	m.heads[i] = nil
	record, err := m.next[i]()
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	m.heads[i] = &types.Stat{}
	return m.heads[i].UnmarshalVT(record)
}

// pop returns the next path's entries, in the order of the legs; none at the end.
func (m *mergedList) pop() ([]entry, error) {
	var same []entry
	for i, head := range m.heads {
		if head == nil {
			continue
		}
		order := -1
		if len(same) > 0 {
			order = fsutil.ComparePath(head.Path, same[0].stat.Path)
		}
		switch {
		case order < 0:
			same = append(same[:0], entry{i, head})
		case order == 0:
			same = append(same, entry{i, head})
		}
	}
	for _, e := range same {
		if err := m.advance(e.leg); err != nil {
			return nil, err
		}
	}
	return same, nil
}

// transfer is the conversation with the client. Files are numbered in the order
// of the lists, and the numbers are all that is remembered of them.
type transfer struct {
	tree *tree

	sending sync.Mutex
	client  filesync.FileSend_DiffCopyClient

	mu     sync.Mutex
	origin []origin   // of the client's numbers
	local  [][]uint32 // the client's numbers, by leg and the leg's own
}

type origin struct {
	leg    int
	number uint32
}

// offer sends the merged list. Where several legs have a folder, the last one's
// is it (BuildKit util/staticfs, MergeFS).
func (t *transfer) offer(files *mergedList) error {
	for {
		same, err := files.pop()
		if err != nil {
			return err
		}
		if len(same) == 0 {
			return t.send(&types.Packet{Type: types.PACKET_STAT})
		}
		if err := t.number(same); err != nil {
			return err
		}
		if err := t.send(&types.Packet{Type: types.PACKET_STAT, Stat: same[len(same)-1].stat}); err != nil {
			return err
		}
	}
}

// number gives a path its number, before the client can ask for it.
func (t *transfer) number(same []entry) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.origin) >= unlisted {
		return status.Error(codes.ResourceExhausted, "exporting files: too many of them")
	}
	for i, e := range same {
		number := uint32(unlisted)
		if i == len(same)-1 {
			number = uint32(len(t.origin))                                          //nolint:gosec // checked above
			t.origin = append(t.origin, origin{e.leg, uint32(len(t.local[e.leg]))}) //nolint:gosec // no longer than origin and the lists before it
		}
		t.local[e.leg] = append(t.local[e.leg], number)
	}
	return nil
}

func (t *transfer) send(p *types.Packet) error {
	t.sending.Lock()
	defer t.sending.Unlock()
	err := t.client.SendMsg(p)
	if errors.Is(err, io.EOF) { // the client has ended the stream, and requests learns why
		return nil
	}
	return err
}

// requests passes on what the client asks for, to its end. It is the only one
// that sends to the legs.
func (t *transfer) requests() error {
	for {
		var p types.Packet
		if err := t.client.RecvMsg(&p); err != nil {
			return unexpected(err)
		}
		switch p.Type {
		case types.PACKET_REQ:
			if err := t.request(p.ID); err != nil {
				return err
			}
		case types.PACKET_ERR:
			if err := t.tell(&p); err != nil { // the legs' exporters fail of it, as if they had been told by the client
				return err
			}
		case types.PACKET_FIN:
			return t.finish(&p)
		}
	}
}

func (t *transfer) request(number uint32) error {
	t.mu.Lock()
	known := int64(number) < int64(len(t.origin))
	var of origin
	if known {
		of = t.origin[number]
	}
	t.mu.Unlock()
	if !known {
		return status.Errorf(codes.InvalidArgument, "invalid file id %d", number)
	}
	return t.sendTo(of.leg, &types.Packet{Type: types.PACKET_REQ, ID: of.number})
}

func (t *transfer) tell(p *types.Packet) error {
	for i := range t.tree.legs {
		if err := t.sendTo(i, p); err != nil {
			return err
		}
	}
	return nil
}

func (t *transfer) sendTo(leg int, p *types.Packet) error {
	if err := t.tree.legs[leg].stream.SendMsg(p); err != nil {
		return errShare
	}
	return nil
}

// finish ends the transfer on the legs' side, then on the client's.
func (t *transfer) finish(fin *types.Packet) error {
	if err := t.tell(fin); err != nil {
		return err
	}
	for _, b := range t.tree.legs {
		select {
		case <-b.last:
		case <-t.tree.ctx.Done():
			return errShare
		}
	}
	if err := t.send(fin); err != nil {
		return err
	}
	if err := t.client.CloseSend(); err != nil {
		return err
	}
	for { // until the client has ended the call; it has all files
		var p types.Packet
		if err := t.client.RecvMsg(&p); err != nil {
			return nil
		}
	}
}

// contents passes on what a leg sends.
func (t *transfer) contents(leg int) error {
	b := t.tree.legs[leg]
	var p types.Packet
	for {
		data := p.Data[:0]
		p.ResetVT()
		p.Data = data
		if err := b.stream.RecvMsg(&p); err != nil {
			return errShare
		}
		switch p.Type {
		case types.PACKET_DATA:
			number, err := t.numberOf(leg, p.ID)
			if err != nil {
				return err
			}
			p.ID = number
			if err := t.send(&p); err != nil {
				return err
			}
		case types.PACKET_FIN:
			close(b.last)
			return nil
		case types.PACKET_ERR: // its exporter fails
			return errShare
		}
	}
}

func (t *transfer) numberOf(leg int, local uint32) (uint32, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if int64(local) >= int64(len(t.local[leg])) || t.local[leg][local] == unlisted {
		return 0, status.Errorf(codes.InvalidArgument, "exporting files: a worker sent the contents of its file %d, which nobody asked for", local)
	}
	return t.local[leg][local], nil
}
