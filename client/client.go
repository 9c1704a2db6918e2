// Package client is what a pipeline needs of an archfarm coordinator: submit a job,
// follow it through whatever restarts, and read what has been published.
//
//	farm, err := client.Dial(client.Config{Farm: "farm.example:8372", CertDir: "/etc/archfarm"})
//	…
//	job, _, err := farm.Submit(ctx, &archfarmv1.SubmitRequest{Spec: spec})
//	…
//	job, err = farm.Wait(ctx, job.GetId())
//
// Errors of calls are those of gRPC, with their codes; Faults lists what is wrong
// with a specification.
package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/contextpack"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/enroll"
)

const (
	// keepaliveTime is well above what coordinators allow (5 s), and finds a network
	// that has gone in about a minute.
	keepaliveTime = 30 * time.Second
	// maxMessage is for a page of jobs, in bytes.
	maxMessage = 32 << 20
	// callTimeout bounds one try of a short call, connecting included.
	callTimeout = 30 * time.Second
)

// ErrPlaintext is in the errors about a coordinator on another machine that would
// be talked to without encryption, and has not been allowed to.
var ErrPlaintext = errors.New("it is another machine, and wants a certificate")

// Config says which farm to talk to, and how.
type Config struct {
	// Farm is the coordinator: host:port, tcp://host:port or unix:///path. Required.
	Farm string
	// CertDir is a folder with ca.pem, cert.pem and key.pem, as archfarm client-cert
	// makes it; they are read anew at each connection. Empty: no TLS.
	CertDir string
	// Insecure allows plaintext to another machine.
	Insecure bool
}

// Client talks to one farm. It is safe for concurrent use.
type Client struct {
	// Patience is how long calls that are tried again, Submit's, Watch's and Wait's, put
	// up with a farm that does not answer, since it last did. Five minutes when zero.
	Patience time.Duration
	// Retrying, when set before the first call, is told why a call is about to be tried
	// again. It may be called concurrently.
	Retrying func(error)

	jobs  archfarmv1.JobServiceClient
	tags  archfarmv1.TagServiceClient
	conn  *grpc.ClientConn // nil: the caller's
	pause func(context.Context, time.Duration) error
}

// Dial returns a client of a farm. The connection is made at the first call, and
// anew whenever it is lost. It is the caller's to close.
func Dial(c Config) (*Client, error) {
	conn, err := c.Connect()
	if err != nil {
		return nil, err
	}
	client := New(conn)
	client.conn = conn
	return client, nil
}

// Connect returns the connection that Dial would use, for calls that Client has no
// method for. It is the caller's to close.
func (c Config) Connect() (*grpc.ClientConn, error) {
	a, err := address.Parse(c.Farm)
	if err != nil {
		return nil, err
	}
	creds, err := c.Credentials(a)
	if err != nil {
		return nil, err
	}
	return Connect(a, creds)
}

// Credentials are those for a coordinator at an address: TLS where there is a
// CertDir, but for Unix sockets; ErrPlaintext.
func (c Config) Credentials(a address.Address) (credentials.TransportCredentials, error) {
	switch {
	case a.Network == "unix", c.CertDir == "" && (c.Insecure || a.Local()):
		return insecure.NewCredentials(), nil
	case c.CertDir == "":
		return nil, fmt.Errorf("%s: %w", a, ErrPlaintext)
	}
	creds, err := enroll.Load(c.CertDir)
	if err != nil {
		return nil, fmt.Errorf("loading the certificate in %s: %w", c.CertDir, err)
	}
	return credentials.NewTLS(creds.TLS()), nil
}

// Connect returns a connection to a coordinator, made at the first call on it.
func Connect(a address.Address, creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	authority := "localhost"
	if a.Network == "tcp" {
		authority = a.Addr
	}
	return grpc.NewClient("passthrough:///farm", grpc.WithTransportCredentials(creds), grpc.WithAuthority(authority),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTime}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.Dial(ctx) }))
}

// New returns a client on a connection that is, and stays, the caller's.
func New(conn grpc.ClientConnInterface) *Client {
	return &Client{jobs: archfarmv1.NewJobServiceClient(conn), tags: archfarmv1.NewTagServiceClient(conn), pause: sleep}
}

// Close ends the connection that Dial has made.
func (c *Client) Close() error {
	if c.conn == nil {
		return nil
	}
	return c.conn.Close()
}

// Upload sends a context, as much of it as the farm has not got, and returns what a
// specification names it by. Progress may be nil. The caller closes the source.
func (c *Client) Upload(ctx context.Context, source *contextpack.Source, progress func(sent, total int64)) (*archfarmv1.BuildContext, error) {
	digest, _, err := contextpack.Upload(ctx, c.jobs, source, progress)
	if err != nil {
		return nil, fmt.Errorf("uploading the context: %w", err)
	}
	return &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Digest{Digest: digest}}, nil
}

// Submit submits a job, and tells whether an earlier submission of its request id
// made it. Without one it gets a random one, so that a submission whose answer is
// lost can be, and is, tried again: there is one job, however often that happened.
func (c *Client) Submit(ctx context.Context, req *archfarmv1.SubmitRequest) (job *archfarmv1.Job, existed bool, err error) {
	if req.GetRequestId() == "" {
		req = &archfarmv1.SubmitRequest{RequestId: uuid.NewString(), Spec: req.GetSpec(), Secrets: req.GetSecrets(), Credentials: req.GetCredentials()}
	}
	for patience := c.patience(); ; {
		answer, err := short(ctx, c.jobs.Submit, req)
		if err == nil {
			return answer.GetJob(), answer.GetExisted(), nil
		}
		if err := patience.wait(ctx, err); err != nil {
			return nil, false, err
		}
	}
}

// Get returns a job by its id, or the beginning of it that is unique.
func (c *Client) Get(ctx context.Context, id string) (*archfarmv1.Job, error) {
	answer, err := short(ctx, c.jobs.Get, &archfarmv1.GetRequest{Id: id})
	return answer.GetJob(), err
}

// List goes through the jobs that a question selects, the newest first, asking for a
// page whenever one is needed. An error is the last element.
func (c *Client) List(ctx context.Context, req *archfarmv1.ListRequest) iter.Seq2[*archfarmv1.Job, error] {
	return pages(req.GetPageToken(), func(token string) ([]*archfarmv1.Job, string, error) {
		answer, err := short(ctx, c.jobs.List, &archfarmv1.ListRequest{
			States: req.GetStates(), Repository: req.GetRepository(), Since: req.GetSince(), PageSize: req.GetPageSize(), PageToken: token,
		})
		return answer.GetJobs(), answer.GetNextPageToken(), err
	})
}

// Tags goes through what a repository's tags, or one of them, have been bound to, the
// newest first, as List does.
func (c *Client) Tags(ctx context.Context, req *archfarmv1.ListTagsRequest) iter.Seq2[*archfarmv1.TagBinding, error] {
	return pages(req.GetPageToken(), func(token string) ([]*archfarmv1.TagBinding, string, error) {
		answer, err := short(ctx, c.tags.ListTags, &archfarmv1.ListTagsRequest{
			Repository: req.GetRepository(), Tag: req.GetTag(), PageSize: req.GetPageSize(), PageToken: token,
		})
		return answer.GetBindings(), answer.GetNextPageToken(), err
	})
}

// pages asks for pages until one has no next.
func pages[T any](token string, page func(string) ([]T, string, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for next := token; ; {
			items, after, err := page(next)
			if err == nil && after != "" && after == next {
				err = status.Error(codes.Internal, "the farm's next page is the same page again")
			}
			for _, item := range items {
				if !yield(item, nil) {
					return
				}
			}
			if err != nil {
				yield(*new(T), err)
				return
			}
			if next = after; next == "" {
				return
			}
		}
	}
}

// Cancel ends a job that has not been published yet, and returns it as it is then.
func (c *Client) Cancel(ctx context.Context, id string) (*archfarmv1.Job, error) {
	answer, err := short(ctx, c.jobs.Cancel, &archfarmv1.CancelRequest{Id: id})
	return answer.GetJob(), err
}

// Retry puts an ended job back into the queue. Legs that succeeded keep what they
// built, but for the platforms that are named.
func (c *Client) Retry(ctx context.Context, id string, platforms ...string) (*archfarmv1.Job, error) {
	answer, err := short(ctx, c.jobs.Retry, &archfarmv1.RetryRequest{Id: id, Platforms: platforms})
	return answer.GetJob(), err
}

// short calls a method that answers soon.
func short[Q, A any](ctx context.Context, call func(context.Context, *Q, ...grpc.CallOption) (*A, error), question *Q) (*A, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return call(ctx, question, grpc.MaxCallRecvMsgSize(maxMessage))
}

// Fault is something that is wrong with a specification.
type Fault struct {
	// Field is its path in the message, as "platforms[1]".
	Field string
	// Description of what is wrong, and what would be right.
	Description string
}

// Faults lists what a refused call has been told is wrong with it, in the farm's
// order; none when the error is about something else.
func Faults(err error) []Fault {
	var out []Fault
	for _, detail := range status.Convert(err).Details() {
		if bad, ok := detail.(*errdetails.BadRequest); ok {
			for _, v := range bad.GetFieldViolations() {
				out = append(out, Fault{Field: v.GetField(), Description: v.GetDescription()})
			}
		}
	}
	return out
}

// Ended tells whether nothing more happens to a job by itself.
func Ended(s archfarmv1.Job_State) bool {
	return s == archfarmv1.Job_STATE_SUCCEEDED || s == archfarmv1.Job_STATE_FAILED || s == archfarmv1.Job_STATE_CANCELLED
}

func (c *Client) patience() *patience {
	return &patience{client: c, limit: cmp.Or(c.Patience, 5*time.Minute), answered: time.Now()}
}
