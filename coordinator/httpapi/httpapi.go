// Package httpapi is archfarm's API for a plain HTTP client: JobService, TagService
// and SecretService as JSON (proto/archfarm/v1/job.http.yaml), a job's events one a
// line or as server-sent events, and contexts as tar archives.
//
// It holds no rules of its own about who may do what: every request becomes a call
// over the given connection, in whose context the caller's identity is
// (identity.NewContext). What it adds is what browsers and slow clients make
// necessary, see guard.go.
//
//	POST   /v1/jobs                 SubmitRequest → SubmitResponse
//	GET    /v1/jobs                 ListRequest as a query → ListResponse
//	GET    /v1/jobs/{id}            → GetResponse
//	GET    /v1/jobs/{id}/events     ?after_seq= → WatchResponse, one a line
//	POST   /v1/jobs/{id}:cancel     → CancelResponse
//	POST   /v1/jobs/{id}:retry      RetryRequest → RetryResponse
//	POST   /v1/contexts             a tar archive, ?dockerfile= → UploadContextResponse
//	POST   /v1/contexts:missing     FindMissingRequest → FindMissingResponse
//	GET    /v1/tags                 ?repository= → ListTagsResponse
//	GET    /v1/secrets              → ListSecretsResponse
//	PUT    /v1/secrets/{name}       {"value": base64} → {}
//	DELETE /v1/secrets/{name}       → {}
//
// Errors are a google.rpc.Status in JSON, with the HTTP status that goes with its
// code (google/rpc/code.proto).
package httpapi

import (
	"cmp"
	"context"
	"net/http"
	"net/url"
	"strings"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"github.com/prometheus/client_golang/prometheus"
	_ "google.golang.org/genproto/googleapis/rpc/errdetails" // BadRequest, to be written as JSON
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	maxUploads = 4
	maxArchive = 2 << 30
	// maxAnswer bounds an answer, a page of a list: as clients of gRPC.
	maxAnswer = 16 << 20
)

// Options of the API. The zero value is usable.
type Options struct {
	// Metrics counts requests; nil: they are not counted.
	Metrics prometheus.Registerer
	// MaxUploads is how many archives are taken at a time; each may take as much of
	// the temporary folder's disk as contextpack allows. Zero means 4.
	MaxUploads int
	// MaxArchive is how big an archive may be as it is sent, in bytes. Zero means 2 GiB.
	MaxArchive int64
}

type api struct {
	jobs     archfarmv1.JobServiceClient
	uploads  chan struct{} // a place for each
	archive  int64
	requests *prometheus.CounterVec
}

// New returns the handler of everything below /v1/. Requests need an identity in
// their context; the connection has to carry it on, and lasts longer than the
// handler.
func New(ctx context.Context, conn grpc.ClientConnInterface, o Options) (http.Handler, error) {
	conn = bounded{conn}
	a := &api{
		jobs:    archfarmv1.NewJobServiceClient(conn),
		uploads: make(chan struct{}, cmp.Or(o.MaxUploads, maxUploads)),
		archive: cmp.Or(o.MaxArchive, maxArchive),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "archfarm_http_requests_total", Help: "Requests to the API over HTTP, by route and status.",
		}, []string{"method", "route", "code"}),
	}
	if o.Metrics != nil {
		if err := o.Metrics.Register(a.requests); err != nil {
			return nil, err
		}
	}
	gateway := newGateway()
	if err := archfarmv1.RegisterJobServiceHandlerClient(ctx, gateway, a.jobs); err != nil {
		return nil, err
	}
	if err := archfarmv1.RegisterTagServiceHandlerClient(ctx, gateway, archfarmv1.NewTagServiceClient(conn)); err != nil {
		return nil, err
	}
	if err := archfarmv1.RegisterSecretServiceHandlerClient(ctx, gateway, archfarmv1.NewSecretServiceClient(conn)); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/v1/", a.guard(gateway, bodyJSON))
	mux.Handle("GET /v1/jobs/{id}/events", a.guard(routed("/v1/jobs/{id}/events", a.events), bodyJSON))
	mux.Handle("POST /v1/contexts", a.guard(routed("/v1/contexts", a.upload), bodyArchive))
	return mux, nil
}

// newGateway translates requests as job.http.yaml says. Of HTTP's headers none
// becomes metadata of the calls, which say who is calling.
func newGateway() *runtime.ServeMux {
	none := func(string) (string, bool) { return "", false }
	return runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, lines{&runtime.JSONPb{MarshalOptions: answers}}),
		runtime.WithIncomingHeaderMatcher(none), runtime.WithOutgoingHeaderMatcher(none), runtime.WithOutgoingTrailerMatcher(none),
		runtime.WithDisableHTTPMethodOverride(), runtime.WithDisablePathLengthFallback(),
		runtime.WithErrorHandler(func(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, err error) {
			fail(w, tooLarge(r, err))
		}),
		runtime.WithRoutingErrorHandler(func(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, code int) {
			fail(w, misrouted(r, code))
		}),
		runtime.WithMiddlewares(func(next runtime.HandlerFunc) runtime.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request, params map[string]string) {
				pattern, _ := runtime.HTTPPattern(r.Context())
				route := strings.ReplaceAll(pattern.String(), "=*", "")
				setRoute(w, route)
				if err := checkQuery(route, r); err != nil {
					fail(w, err)
					return
				}
				next(w, r, params)
			}
		}),
	)
}

// answers have all fields but messages that are not there: scripts find a list where
// there is one, though it be empty.
var answers = protojson.MarshalOptions{EmitDefaultValues: true}

// lines ends answers with a newline, for people at terminals.
type lines struct{ *runtime.JSONPb }

// Marshal implements runtime.Marshaler.
func (l lines) Marshal(v any) ([]byte, error) {
	b, err := l.JSONPb.Marshal(v)
	return append(b, '\n'), err
}

// queries are the messages that a query can fill in, by route. Others take none.
var queries = map[string]protoreflect.FieldDescriptors{
	"/v1/jobs": (*archfarmv1.ListRequest)(nil).ProtoReflect().Descriptor().Fields(),
	"/v1/tags": (*archfarmv1.ListTagsRequest)(nil).ProtoReflect().Descriptor().Fields(),
}

// checkQuery refuses parameters that do not exist, which the gateway ignores:
// ?state=… would list jobs of all states.
func checkQuery(route string, r *http.Request) error {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "the query: %v", err)
	}
	fields := queries[route]
	for name := range values {
		switch {
		case fields == nil || r.Method != http.MethodGet:
			return status.Errorf(codes.InvalidArgument, "there is no parameter %.80q: %s %s takes none", name, r.Method, route)
		case fields.ByName(protoreflect.Name(name)) == nil && fields.ByJSONName(name) == nil:
			return status.Errorf(codes.InvalidArgument, "there is no parameter %.80q: %s are possible", name, strings.Join(names(fields), ", "))
		}
	}
	return nil
}

func names(fields protoreflect.FieldDescriptors) []string {
	var out []string
	for i := range fields.Len() {
		out = append(out, fields.Get(i).TextName())
	}
	return out
}

// bounded is a connection whose answers may be as big as those that clients take.
type bounded struct{ grpc.ClientConnInterface }

// Invoke implements grpc.ClientConnInterface.
func (b bounded) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return b.ClientConnInterface.Invoke(ctx, method, args, reply, append(opts, grpc.MaxCallRecvMsgSize(maxAnswer))...)
}

// NewStream implements grpc.ClientConnInterface.
func (b bounded) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return b.ClientConnInterface.NewStream(ctx, desc, method, append(opts, grpc.MaxCallRecvMsgSize(maxAnswer))...)
}
