package dispatch

import (
	"encoding/json"

	"github.com/moby/buildkit/solver/errdefs"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// withVertex returns a worker's error with the step that failed called what
// translated calls it, which is what the build's progress does: clients show that
// step's output below the error. Everything else of the error stays.
func withVertex(err error, translated func(digest string) string) error {
	carrier, ok := err.(interface{ GRPCStatus() *status.Status }) // not errors.As: of a wrapped one, the text around it would be lost
	if !ok {
		return err
	}
	in := carrier.GRPCStatus().Proto()
	out := &spb.Status{Code: in.GetCode(), Message: in.GetMessage(), Details: make([]*anypb.Any, len(in.GetDetails()))}
	changed := false
	for i, detail := range in.GetDetails() {
		out.Details[i] = detail
		if other, ok := translateVertex(detail, translated); ok {
			out.Details[i], changed = other, true
		}
	}
	if !changed {
		return err
	}
	return status.ErrorProto(out)
}

// vertexType is how BuildKit names the detail (solver/errdefs), which is JSON as all
// of its details are (util/grpcerrors).
const vertexType = "github.com/moby/buildkit/errdefs.Vertex+json"

// translateVertex translates the detail that names a vertex, if it is one.
func translateVertex(detail *anypb.Any, translated func(digest string) string) (*anypb.Any, bool) {
	if detail.GetTypeUrl() != vertexType {
		return nil, false
	}
	var vertex errdefs.Vertex
	if err := json.Unmarshal(detail.GetValue(), &vertex); err != nil {
		return nil, false
	}
	raw, err := json.Marshal(&errdefs.Vertex{Digest: translated(vertex.GetDigest())})
	if err != nil {
		return nil, false
	}
	return &anypb.Any{TypeUrl: vertexType, Value: raw}, true
}
