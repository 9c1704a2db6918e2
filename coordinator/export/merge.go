// Package export merges what the legs of a build export into what one buildkitd
// that built all platforms would have written: an OCI layout, a tar archive, a
// tree of files.
//
// A leg's worker sends its share to the client's session. On the way, on the
// leg's own alias of that session, the calls of these exporters are answered here.
// Archives are put aside on disk until all legs are there; tar archives and trees
// go on to the client as they come. Nothing is held in memory but lists of ids.
package export

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"

	bksession "github.com/moby/buildkit/session"
	sessionexporter "github.com/moby/buildkit/session/exporter"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/split"
)

// Metadata of a session's FileSend calls (BuildKit, session/filesync).
const (
	exporterID     = "buildkit-attachable-exporter-id"
	exporterPrefix = "exporter-md-"
)

// Methods are those that a leg's worker must find in the session, even where the
// client takes what the leg exports in another way.
var Methods = []string{filesync.FileSend_DiffCopy_FullMethodName}

// Part is a leg's part in the result that is exported.
type Part struct {
	// Leg is its place in the order asked.
	Leg int
	// Key is of its platform in the result; empty when the result has no platforms.
	Key string
	// Found are the exporters that its worker is to find in the session, beside
	// those that it was started with.
	Found []*sessionexporter.ExporterRequest
}

// Beginning is what is known once the frontend has returned.
type Beginning struct {
	// Client is whose session the exports go to.
	Client bksession.Caller
	// Exports are all of the build's.
	Exports []split.Export
	// Parts are the legs that take part, in the order of the result's platforms.
	Parts []Part
}

// Merge is the merging of one build's exports.
type Merge struct {
	shelf  *shelf
	ctx    context.Context
	cancel context.CancelFunc

	mu       sync.Mutex
	begun    bool
	closed   bool
	captures map[int]capture                            // by the exporter's id
	found    map[int][]*sessionexporter.ExporterRequest // by leg
	fault    error
	active   sync.WaitGroup // calls of workers, and what they started
}

// capture is one export that is merged.
type capture interface {
	// begin names the legs that take part, in the order of the result's platforms.
	begin(client bksession.Caller, parts []Part)
	// serve answers a leg's call.
	serve(leg int, stream grpc.ServerStream, md metadata.MD) error
}

// New returns the merging of a build's exports. Close must be called once no leg
// runs any more.
func New(ctx context.Context, spool *Spool) *Merge {
	m := &Merge{shelf: newShelf(spool), captures: map[int]capture{}, found: map[int][]*sessionexporter.ExporterRequest{}}
	m.ctx, m.cancel = context.WithCancel(ctx)
	return m
}

// Leg is one leg's side of a merging.
type Leg struct {
	merge *Merge
	leg   int
}

// Leg returns the side of a leg, by its place in the order asked.
func (m *Merge) Leg(leg int) Leg { return Leg{m, leg} }

// Intercept answers those calls of the leg's worker that are about captured
// exports, or about exporters of the session; it returns nil for the others.
func (l Leg) Intercept(method string, md metadata.MD) func(grpc.ServerStream) error {
	m := l.merge
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.begun {
		return nil
	}
	switch method {
	case filesync.FileSend_DiffCopy_FullMethodName:
		if c, ok := m.captures[exporterOf(md)]; ok {
			return func(stream grpc.ServerStream) error { return m.serve(c, l.leg, stream, md) }
		}
	case sessionexporter.Exporter_FindExporters_FullMethodName:
		return answer(&sessionexporter.FindExportersRequest{}, &sessionexporter.FindExportersResponse{Exporters: m.found[l.leg]})
	case sessionexporter.Exporter_FinalizeExport_FullMethodName: // the client is told of the whole build's
		return answer(&sessionexporter.FinalizeExportRequest{}, &sessionexporter.FinalizeExportResponse{})
	}
	return nil
}

// answer is how a unary call is answered.
func answer(request, response any) func(grpc.ServerStream) error {
	return func(stream grpc.ServerStream) error {
		if err := stream.RecvMsg(request); err != nil {
			return err
		}
		return stream.SendMsg(response)
	}
}

func (m *Merge) serve(c capture, leg int, stream grpc.ServerStream, md metadata.MD) error {
	if err := m.enter(); err != nil {
		return err
	}
	defer m.active.Done()
	return grpcerrors.ToGRPC(stream.Context(), c.serve(leg, stream, md))
}

// exporterOf is the exporter that a call is about: the first unless it says so,
// as clients understand it.
func exporterOf(md metadata.MD) int {
	values := md.Get(exporterID)
	if len(values) == 0 {
		return 0
	}
	id, err := strconv.Atoi(values[0])
	if err != nil {
		return 0
	}
	return id
}

func (m *Merge) enter() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return status.Error(codes.Canceled, "exporting: the build has ended")
	}
	m.active.Add(1)
	return nil
}

// Begin makes the legs' calls be answered. It comes before any of them exports.
func (m *Merge) Begin(with Beginning) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range with.Exports {
		var c capture
		switch e.Kind {
		case split.KindArchive:
			c = newArchive(m)
		case split.KindTar:
			c = newTarball(m, e.Exporter)
		case split.KindTree:
			c = newTree(m, e.Apart)
		default:
			continue
		}
		c.begin(with.Client, with.Parts)
		m.captures[e.Exporter] = c
	}
	for _, p := range with.Parts {
		m.found[p.Leg] = p.Found
	}
	m.begun = true
}

// Close ends what still goes on and removes what is on disk.
func (m *Merge) Close() error {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.cancel()
	m.active.Wait()
	return m.shelf.clear()
}

// Fault is what the merging itself failed of, nil when it was a leg or the
// client. The legs' errors are only its consequence.
func (m *Merge) Fault() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fault
}

// blame notes the first error that is the merging's own.
func (m *Merge) blame(err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil && m.fault == nil {
		m.fault = err
	}
	return err
}

// blameSpool notes an error if it is one of too little space.
func (m *Merge) blameSpool(err error) error {
	if status.Code(err) == codes.ResourceExhausted {
		return m.blame(err)
	}
	return err
}

// errShare ends what goes to the client because a leg's share of it broke off.
// That leg fails of its own error, and the build of that: the others wait for it.
var errShare = errors.New("the share of another platform broke off")

// header is what an exporter tells the client with its file.
func header(md metadata.MD) map[string]string {
	out := map[string]string{}
	for k, v := range md {
		if key, ok := strings.CutPrefix(k, exporterPrefix); ok {
			out[key] = strings.Join(v, ",")
		}
	}
	return out
}
