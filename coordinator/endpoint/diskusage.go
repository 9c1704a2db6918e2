package endpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/fleet"
)

// usageTimeout bounds the wait for one worker's records. buildkitd measures what
// it has not measured yet, and keeps the result: after a timeout the next call gets
// further.
const usageTimeout = time.Minute

var errNoAnswer = status.Errorf(codes.DeadlineExceeded, "no answer within %s", usageTimeout)

// asked is a worker that one call goes to.
type asked struct {
	worker *fleet.Worker
	filter []string
	tag    string // what its records' ids get, empty in a farm of one worker
}

// DiskUsage returns the cache records of every worker, in order of the workers'
// names and then each worker's own. When the farm has several workers, a record's id
// is "ID@WORKER", and so are its parents'; filters take both forms. The field
// "worker" may be filtered by.
//
// A worker that does not answer is a record of its own, "unreachable@WORKER", which
// says why: the others' records are worth having, but not to be taken for all. It is
// an error when no worker answers, or when a filter names none that is attached.
func (c *Control) DiskUsage(ctx context.Context, req *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	workers, err := c.askedBy(ctx, "diskusage", req.GetFilter())
	if err != nil {
		return nil, err
	}
	answers, errs := make([][]*controlapi.UsageRecord, len(workers)), make([]error, len(workers))
	var asking sync.WaitGroup
	for i, w := range workers {
		asking.Go(func() { answers[i], errs[i] = w.diskUsage(ctx, req) })
	}
	asking.Wait()
	if ctx.Err() != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if !slices.Contains(errs, nil) {
		return nil, together("no worker tells its disk usage", workers, errs)
	}
	response := &controlapi.DiskUsageResponse{}
	for i, w := range workers {
		if errs[i] != nil {
			c.Farm.Log.Warn("a worker does not tell its disk usage", "worker", w.worker.Name, "error", errs[i])
			answers[i] = []*controlapi.UsageRecord{w.unreachable(errs[i])}
		}
		response.Record = append(response.Record, answers[i]...)
	}
	if n := proto.Size(response); n > defaults.DefaultMaxSendMsgSize {
		return nil, status.Errorf(codes.ResourceExhausted,
			"the %d records of %d workers have %d bytes, a message has %d at most: ask for less, for instance with the filter worker==%s",
			len(response.GetRecord()), len(workers), n, defaults.DefaultMaxSendMsgSize, workers[0].worker.Name)
	}
	return response, nil
}

// Prune prunes every worker at the same time, each by the rules of the request, so
// that space to keep is meant per worker. Records are sent as they come, with ids as
// DiskUsage shows them. A worker that fails does not stop the others; the call ends
// with the error after the last of them, since who prunes must learn of what is left.
func (c *Control) Prune(req *controlapi.PruneRequest, stream controlapi.Control_PruneServer) error {
	workers, err := c.askedBy(stream.Context(), "prune", req.GetFilter())
	if err != nil {
		return err
	}
	var sending sync.Mutex
	send := func(r *controlapi.UsageRecord) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(r)
	}
	errs := make([]error, len(workers))
	var pruning sync.WaitGroup
	for i, w := range workers {
		pruning.Go(func() { errs[i] = w.prune(stream.Context(), req, send) })
	}
	pruning.Wait()
	return together("not every worker is pruned", workers, errs)
}

// askedBy returns the workers that a call with that filter goes to, by name, of
// those that the caller may use.
func (c *Control) askedBy(ctx context.Context, what string, list []string) ([]asked, error) {
	filter, err := parseRecordFilter(what, list)
	if err != nil {
		return nil, err
	}
	var out []asked
	workers := c.usable(ctx)
	names := make([]string, 0, len(workers))
	for _, w := range workers {
		names = append(names, w.Name)
		if own, ok := filter.of(w.Name); ok {
			out = append(out, asked{worker: w, filter: own})
		}
	}
	if len(workers) > 1 {
		for i := range out {
			out[i].tag = tag(out[i].worker.Name)
		}
	}
	switch {
	case len(workers) == 0:
		return nil, status.Errorf(codes.Unavailable, "no worker is attached to the farm; start one with \"archfarm worker\"")
	case len(out) == 0:
		return nil, status.Errorf(codes.NotFound, "the filter %v chooses no worker; attached are %s", list, strings.Join(names, ", "))
	}
	return out, nil
}

// diskUsage asks one worker.
func (a asked) diskUsage(ctx context.Context, req *controlapi.DiskUsageRequest) ([]*controlapi.UsageRecord, error) {
	// Not a deadline, which gRPC would tell the daemon: then both ends give up at
	// the same time, and either may be the one that says why.
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	defer time.AfterFunc(usageTimeout, func() { giveUp(errNoAnswer) }).Stop()
	conn, err := a.worker.Control(ctx)
	if err != nil {
		return nil, err
	}
	response, err := controlapi.NewControlClient(conn).DiskUsage(ctx, &controlapi.DiskUsageRequest{Filter: a.filter, AgeLimit: req.GetAgeLimit()})
	if errors.Is(context.Cause(ctx), errNoAnswer) {
		return nil, errNoAnswer
	}
	if err != nil {
		return nil, a.orLost(conn, err)
	}
	for _, r := range response.GetRecord() {
		a.mark(r)
	}
	return response.GetRecord(), nil
}

// prune prunes one worker. It ends with ctx, or with the worker.
func (a asked) prune(ctx context.Context, req *controlapi.PruneRequest, send func(*controlapi.UsageRecord) error) error {
	conn, err := a.worker.Control(ctx)
	if err != nil {
		return err
	}
	own := proto.CloneOf(req)
	own.Filter = a.filter
	stream, err := controlapi.NewControlClient(conn).Prune(ctx, own)
	if err != nil {
		return a.orLost(conn, err)
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return a.orLost(conn, err)
		}
		a.mark(r)
		if err := send(r); err != nil {
			return err
		}
	}
}

// orLost prefers the end of a worker or its connection to what a call on it made
// of that.
func (a asked) orLost(conn *fleet.Conn, err error) error {
	if lost := conn.Lost(); lost != nil {
		return lost
	}
	select {
	case <-a.worker.Gone():
		return &build.LostError{Worker: a.worker.Name, Cause: err}
	default:
		return err
	}
}

// mark tells the worker in a record. The id is what every client shows, even in its
// shortest table; descriptions are what clients compare.
func (a asked) mark(r *controlapi.UsageRecord) {
	if a.tag == "" {
		return
	}
	r.ID += a.tag
	for i := range r.Parents {
		r.Parents[i] += a.tag
	}
	if r.Parent != "" { //nolint:staticcheck // deprecated, but an old daemon says nothing else
		r.Parent += a.tag //nolint:staticcheck // likewise
	}
}

// unreachable stands for the records of a worker that did not answer.
func (a asked) unreachable(reason error) *controlapi.UsageRecord {
	return &controlapi.UsageRecord{
		ID: "unreachable" + tag(a.worker.Name), CreatedAt: timestamppb.Now(), RecordType: "internal",
		InUse:       true, // nobody can reclaim it now
		Description: fmt.Sprintf("worker %s does not tell its disk usage: %s", a.worker.Name, build.Message(reason)),
	}
}

// together makes one error of those of several workers, with the code of the first;
// nil when there is none. In a farm of one worker it is that worker's own.
func together(what string, workers []asked, errs []error) error {
	var texts []string
	var first error
	for i, err := range errs {
		if err == nil {
			continue
		}
		if first == nil {
			first = err
		}
		texts = append(texts, fmt.Sprintf("worker %s: %s", workers[i].worker.Name, build.Message(err)))
	}
	if first == nil || workers[0].tag == "" {
		return first
	}
	return status.Errorf(status.Code(first), "%s: %s", what, strings.Join(texts, "; "))
}
