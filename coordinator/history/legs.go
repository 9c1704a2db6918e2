package history

import (
	"context"
	"errors"
	"io"
	"maps"
	"strings"
	"sync"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	controlapi "github.com/moby/buildkit/api/services/control"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// legKey begins the names under which a record's ExporterResponse tells the
// worker of each leg. Clients pass over what they do not know there, which is
// what a frontend may return.
const legKey = "archfarm.leg"

// legRecord is what a leg's worker remembers of it.
type legRecord struct {
	Leg
	record *controlapi.BuildHistoryRecord // nil: nothing
}

// fetch asks a leg's worker for its record, and copies the attestations. A worker
// that is gone leaves a gap, not a failed build.
func (r *Recorder) fetch(ctx context.Context, l *legRecord) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	log := r.h.options.Log.With("build", r.ref, "worker", l.Worker)
	conn, err := r.h.options.Workers.BuildKit(ctx, l.Worker)
	if err != nil {
		log.Warn("the build history lacks what a worker knows", "error", err)
		return
	}
	record, err := RecordOf(ctx, controlapi.NewControlClient(conn), l.Ref)
	if err != nil || record == nil {
		log.Warn("the build history lacks what a worker knows", "error", err)
		return
	}
	provider := proxy.NewContentStore(contentapi.NewContentClient(conn))
	var copying errgroup.Group
	copying.SetLimit(4)
	for _, info := range infos(record) {
		for _, d := range info.GetAttestations() {
			copying.Go(func() error {
				if err := r.copy(ctx, provider, Descriptor(d)); err != nil {
					log.Warn("the build history lacks an attestation", "digest", d.GetDigest(), "error", err)
				}
				return nil
			})
		}
	}
	_ = copying.Wait() // each has told its own
	l.record = record
}

// copy takes a blob from a worker, unless it is too large: then it stays there.
func (r *Recorder) copy(ctx context.Context, from content.Provider, desc ocispecs.Descriptor) error {
	if desc.Size > maxCopy {
		return nil
	}
	data, err := read(ctx, from, desc, maxCopy)
	if err == nil {
		_, err = r.hold.add(desc.MediaType, data)
	}
	return err
}

// RecordOf returns a daemon's record of an ended build; nil when it has none.
func RecordOf(ctx context.Context, daemon controlapi.ControlClient, ref string) (*controlapi.BuildHistoryRecord, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := daemon.ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{Ref: ref, EarlyExit: true})
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
		if event.GetType() == controlapi.BuildHistoryEventType_COMPLETE && event.GetRecord().GetRef() == ref {
			return event.GetRecord(), nil
		}
	}
}

// merge adds the results of the legs to the record of their build. One leg's are
// the build's own. Of several, each adds its platform's attestations, and what
// was exported is what the coordinator has made of them.
func merge(record *controlapi.BuildHistoryRecord, legs []*legRecord, metadata map[string][]byte, images map[int]ocispecs.Descriptor) {
	record.ExporterResponse = map[string]string{}
	for k, v := range metadata {
		record.ExporterResponse[k] = strings.ToValidUTF8(string(v), "\uFFFD")
	}
	for _, l := range legs {
		if len(legs) == 1 {
			record.Result, record.Results = l.record.GetResult(), l.record.GetResults()
			maps.Copy(record.ExporterResponse, l.record.GetExporterResponse())
			continue
		}
		if found := l.record.GetResult().GetAttestations(); len(found) > 0 {
			attest(record, l.Platform, found)
		}
		for platform, info := range l.record.GetResults() {
			attest(record, platform, info.GetAttestations())
		}
	}
	if len(images) == 0 {
		return
	}
	if record.Result == nil {
		record.Result = &controlapi.BuildResultInfo{}
	}
	record.Result.Results = map[int64]*controlapi.Descriptor{}
	first := -1
	for exporter, desc := range images {
		record.Result.Results[int64(exporter)] = apiDescriptor(desc)
		if first < 0 || exporter < first {
			first = exporter
		}
	}
	record.Result.ResultDeprecated = record.Result.Results[int64(first)]
}

func attest(record *controlapi.BuildHistoryRecord, platform string, attestations []*controlapi.Descriptor) {
	if record.Results == nil {
		record.Results = map[string]*controlapi.BuildResultInfo{}
	}
	if record.Results[platform] == nil {
		record.Results[platform] = &controlapi.BuildResultInfo{}
	}
	record.Results[platform].Attestations = append(record.Results[platform].Attestations, attestations...)
}

// tellLegs notes where the legs ran.
func tellLegs(record *controlapi.BuildHistoryRecord, legs []Leg) {
	for _, l := range legs {
		key := legKey
		if l.Platform != "" {
			key += "/" + l.Platform
		}
		record.ExporterResponse[key] = l.Worker
	}
}

// removeLegs removes the workers' own records of legs, where they can be reached.
func (h *History) removeLegs(ctx context.Context, legs []Leg) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	var removing sync.WaitGroup
	for _, l := range legs {
		removing.Go(func() {
			if conn, err := h.options.Workers.BuildKit(ctx, l.Worker); err == nil {
				_, _ = controlapi.NewControlClient(conn).UpdateBuildHistory(ctx, &controlapi.UpdateBuildHistoryRequest{Ref: l.Ref, Delete: true}) // its own limits remove it else
			}
		})
	}
	removing.Wait()
}
