package split

import (
	"maps"
	"slices"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
)

// PoolArg is the build-arg by which a build asks for pools of workers, several
// separated by commas. It is the farm's alone: no worker is told of it.
const PoolArg = "archfarm.pool"

const (
	optPool = "build-arg:" + PoolArg
	// maxAskedPools bounds the pools that one build asks for.
	maxAskedPools = 64
)

// Pools returns the pools that a request asks for, sorted, each once; none where it
// does not ask. Errors are InvalidArgument.
func Pools(opt map[string]string) ([]string, error) {
	list, asked := opt[optPool]
	if !asked {
		return nil, nil
	}
	if n := strings.Count(list, ",") + 1; n > maxAskedPools {
		return nil, status.Errorf(codes.InvalidArgument, "reading the build-arg %s: %d pools, at most %d are possible", PoolArg, n, maxAskedPools)
	}
	var pools []string
	for name := range strings.SplitSeq(list, ",") {
		name = strings.TrimSpace(name)
		if !identity.ValidName(name) {
			return nil, status.Errorf(codes.InvalidArgument, "reading the build-arg %s: no pool can be called %q: use letters, digits, '.', '_' and '-'", PoolArg, shorten(name, maxName))
		}
		pools = append(pools, name)
	}
	slices.Sort(pools)
	return slices.Compact(pools), nil
}

// WithoutPools returns the request as workers may see it: the same where it asks for
// no pools.
func WithoutPools(req *controlapi.SolveRequest) *controlapi.SolveRequest {
	if _, asked := req.GetFrontendAttrs()[optPool]; !asked {
		return req
	}
	out := req.CloneVT()
	delete(out.FrontendAttrs, optPool)
	return out
}

// FrontendWithoutPools is WithoutPools for a frontend's request.
func FrontendWithoutPools(req *gwpb.SolveRequest) *gwpb.SolveRequest {
	if _, asked := req.GetFrontendOpt()[optPool]; !asked {
		return req
	}
	out := Clone(req)
	out.FrontendOpt = maps.Clone(req.GetFrontendOpt())
	delete(out.FrontendOpt, optPool)
	return out
}
