package endpoint

import (
	"context"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/history"
)

// Status streams a build's progress until the build has ended, or what the
// history keeps of it.
func (c *Control) Status(req *controlapi.StatusRequest, stream controlapi.Control_StatusServer) error {
	if err := sendTimestamp(stream); err != nil {
		return err
	}
	if known, err := c.History.Status(stream.Context(), req.GetRef(), stream.Send); known || err != nil {
		return err
	}
	b, err := c.Builds.Find(stream.Context(), req.GetRef(), statusPatience)
	if err != nil {
		return err
	}
	return b.Progress.Follow(stream.Context(), stream.Send)
}

// ListenBuildHistory streams records of builds.
func (c *Control) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream controlapi.Control_ListenBuildHistoryServer) error {
	if err := sendTimestamp(stream); err != nil {
		return err
	}
	return c.History.Listen(stream.Context(), req, stream.Send)
}

// UpdateBuildHistory pins or deletes a record, or completes its trace.
func (c *Control) UpdateBuildHistory(ctx context.Context, req *controlapi.UpdateBuildHistoryRequest) (*controlapi.UpdateBuildHistoryResponse, error) {
	return &controlapi.UpdateBuildHistoryResponse{}, c.History.Update(ctx, req)
}

// sendTimestamp tells the coordinator's clock, which clients correct theirs by.
func sendTimestamp(stream grpc.ServerStream) error {
	return stream.SendHeader(metadata.Pairs(dispatch.TimestampHeader, time.Now().Format(time.RFC3339Nano)))
}

// Content serves containerd's Content, read-only: what build records name.
func Content(h *history.History) contentapi.ContentServer { return contentserver.New(h.Content()) }

// Workers reaches the BuildKit of workers for the history.
type Workers struct{ *fleet.Fleet }

// BuildKit returns a connection that all callers share.
func (w Workers) BuildKit(ctx context.Context, name string) (grpc.ClientConnInterface, error) {
	worker, ok := w.Worker(name)
	if !ok {
		return nil, status.Errorf(codes.Unavailable, "worker %s is not attached", name)
	}
	return worker.Control(ctx)
}
