package endpoint

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/fleet"
)

// maxRecords bounds the builds that are remembered. What they produced stays on
// their workers, subject to the workers' own garbage collection.
const maxRecords = 1000

const (
	// maxBlobs bounds what is remembered of where blobs are. It is only a cache of
	// what Listen found out: clients ask for the record first, which finds out again.
	maxBlobs = 8 * maxRecords
	// fetchTimeout bounds the wait for one worker's record.
	fetchTimeout = 5 * time.Second
)

// History answers what clients ask of a build after it has ended: which
// attestations it has, and their content. It remembers where the legs ran and
// asks there.
type History struct {
	contentapi.UnimplementedContentServer

	fleet *fleet.Fleet

	mu    sync.Mutex
	legs  map[string][]dispatch.LegRecord // by the build's reference
	order []string
	blobs map[string]string // digest → worker that has it
}

// NewHistory returns an empty history.
func NewHistory(f *fleet.Fleet) *History {
	return &History{fleet: f, legs: map[string][]dispatch.LegRecord{}, blobs: map[string]string{}}
}

// Add remembers where the legs of a build ran.
func (h *History) Add(ref string, legs []dispatch.LegRecord) {
	if len(legs) == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, known := h.legs[ref]; !known {
		h.order = append(h.order, ref)
	}
	h.legs[ref] = legs
	for len(h.order) > maxRecords {
		delete(h.legs, h.order[0])
		h.order = h.order[1:]
	}
}

// Listen sends the record of the build that is asked for, if it is remembered.
// Without EarlyExit it goes on until ctx ends, as buildkitd's does.
func (h *History) Listen(ctx context.Context, req *controlapi.BuildHistoryRequest, send func(*controlapi.BuildHistoryEvent) error) error {
	h.mu.Lock()
	legs := h.legs[req.GetRef()]
	h.mu.Unlock()
	if len(legs) > 0 && !req.GetActiveOnly() {
		record, err := h.record(ctx, req.GetRef(), legs)
		if err != nil {
			return err
		}
		if err := send(&controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: record}); err != nil {
			return err
		}
	}
	if !req.GetEarlyExit() {
		<-ctx.Done()
	}
	return nil
}

// record makes one record of those that the legs' workers hold.
func (h *History) record(ctx context.Context, ref string, legs []dispatch.LegRecord) (*controlapi.BuildHistoryRecord, error) {
	var merged *controlapi.BuildHistoryRecord
	for _, leg := range legs {
		record, err := h.fetch(ctx, leg)
		if unreachable(err) { // the build succeeded: that its worker is gone by now must not make the client fail
			continue
		}
		if err != nil {
			return nil, err
		}
		if record == nil {
			continue
		}
		if len(legs) > 1 && len(record.Results) == 0 && record.Result != nil {
			record.Results = map[string]*controlapi.BuildResultInfo{leg.Platform: record.Result}
			record.Result = nil
		}
		h.locate(record, leg.Worker)
		if merged == nil {
			merged = record
			merged.Ref = ref
			continue
		}
		if merged.Results == nil {
			merged.Results = map[string]*controlapi.BuildResultInfo{}
		}
		for platform, result := range record.Results {
			merged.Results[platform] = result
		}
		merged.NumCachedSteps += record.NumCachedSteps
		merged.NumTotalSteps += record.NumTotalSteps
		merged.NumCompletedSteps += record.NumCompletedSteps
		merged.NumWarnings += record.NumWarnings
	}
	if merged == nil {
		merged = &controlapi.BuildHistoryRecord{Ref: ref}
	}
	return merged, nil
}

// unreachable tells an error of the way to a worker from one that it answered.
func unreachable(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.DeadlineExceeded
}

// fetch asks a worker for its record of a leg; nil when it has none.
func (h *History) fetch(ctx context.Context, leg dispatch.LegRecord) (*controlapi.BuildHistoryRecord, error) {
	worker, ok := h.fleet.Worker(leg.Worker)
	if !ok {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	conn, err := worker.Control(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := controlapi.NewControlClient(conn).ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{Ref: leg.Ref, EarlyExit: true})
	if err != nil {
		return nil, err
	}
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if event.GetRecord().GetRef() == leg.Ref {
			return event.GetRecord(), nil
		}
	}
}

// locate notes which worker has the blobs that a record names.
func (h *History) locate(record *controlapi.BuildHistoryRecord, worker string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.blobs) > maxBlobs {
		clear(h.blobs)
	}
	results := []*controlapi.BuildResultInfo{record.GetResult()}
	for _, result := range record.GetResults() {
		results = append(results, result)
	}
	for _, result := range results {
		for _, d := range result.GetAttestations() {
			h.blobs[d.GetDigest()] = worker
		}
		for _, d := range result.GetResults() {
			h.blobs[d.GetDigest()] = worker
		}
	}
	for _, d := range []*controlapi.Descriptor{record.GetLogs(), record.GetTrace(), record.GetExternalError()} {
		if d != nil {
			h.blobs[d.GetDigest()] = worker
		}
	}
}

// content returns the content API of the worker that has a blob.
func (h *History) content(ctx context.Context, digest string) (contentapi.ContentClient, error) {
	h.mu.Lock()
	name, ok := h.blobs[digest]
	h.mu.Unlock()
	if ok {
		if worker, attached := h.fleet.Worker(name); attached {
			conn, err := worker.Control(ctx)
			if err != nil {
				return nil, err
			}
			return contentapi.NewContentClient(conn), nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "content %s: not found", digest)
}

// Info implements containerd's Content for blobs of recent builds.
func (h *History) Info(ctx context.Context, req *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	client, err := h.content(ctx, req.GetDigest())
	if err != nil {
		return nil, err
	}
	return client.Info(ctx, req)
}

// Read implements containerd's Content for blobs of recent builds.
func (h *History) Read(req *contentapi.ReadContentRequest, stream contentapi.Content_ReadServer) error {
	client, err := h.content(stream.Context(), req.GetDigest())
	if err != nil {
		return err
	}
	from, err := client.Read(stream.Context(), req)
	if err != nil {
		return err
	}
	for {
		chunk, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(chunk); err != nil {
			return err
		}
	}
}
