// Package publish makes references point at what was built: once, last, when
// every leg of a build has succeeded.
package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/errutil"
	"github.com/moby/buildkit/util/push"
	"github.com/moby/buildkit/util/resolver"
	resolverconfig "github.com/moby/buildkit/util/resolver/config"
	"github.com/moby/buildkit/util/resolver/retryhandler"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Content is a manifest or an index whose parts the registry holds already.
type Content struct {
	Descriptor ocispecs.Descriptor
	Blob       []byte
}

// Registry pushes with the credentials of a client, which it asks for through
// the client's session; it keeps none.
type Registry struct {
	Sessions *session.Manager
	// Session is the client's.
	Session string
	// Insecure allows plain HTTP and unknown certificates, as the exporter's
	// option registry.insecure does. Registries on localhost may always use HTTP.
	Insecure bool
}

// Push makes a reference point at the content: a tag ("latest" when it has
// none), or just the digest. Pushing what is there already changes nothing. An
// error carries PermissionDenied when the registry refuses the client,
// Unavailable when it fails itself or cannot be reached, after a few tries.
func (r Registry) Push(ctx context.Context, name string, byDigest bool, c Content) error {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "pushing %q: %v", name, err)
	}
	target := named.Name()
	if byDigest && !reference.IsNameOnly(named) {
		return status.Errorf(codes.InvalidArgument, "can't push tagged ref %s by digest", named)
	}
	if !byDigest {
		exact, err := reference.WithDigest(reference.TagNameOnly(named), c.Descriptor.Digest)
		if err != nil {
			return status.Errorf(codes.InvalidArgument, "pushing %q: %v", name, err)
		}
		target = exact.String() // tag and digest: the resolver needs the latter to tell the root from its parts
	}
	_, err = retryhandler.WithRetry(ctx, nil, func(ctx context.Context) (struct{}, error) {
		pusher, err := push.Pusher(ctx, r.resolver(named, target), target)
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, write(ctx, pusher, c)
	})
	return refused(name, err)
}

func (r Registry) resolver(named reference.Named, target string) remotes.Resolver {
	scope := resolver.ScopeType{Push: true, Insecure: r.Insecure}
	hosts := secureHosts
	if r.Insecure {
		yes := true
		hosts = resolver.NewRegistryConfig(map[string]resolverconfig.RegistryConfig{
			reference.Domain(named): {Insecure: &yes, PlainHTTP: &yes},
		})
	}
	return resolver.DefaultPool.GetResolver(hosts, target, scope, r.Sessions, session.NewGroup(r.Session))
}

// secureHosts shares connections between pushes, which BuildKit's default does
// not: each of its resolvers keeps its own until they have been idle for long.
// Credentials are not the connection's but each resolver's.
var secureHosts = docker.ConfigureDefaultRegistries(
	docker.WithClient(&http.Client{Transport: transport()}),
	docker.WithPlainHTTP(docker.MatchLocalhost),
)

// idleConnections to a registry are closed after a while, as registries do.
const idleConnections = 30 * time.Second

func transport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: 5 * time.Second,
		IdleConnTimeout:       idleConnections,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   4,
	}
}

func write(ctx context.Context, pusher remotes.Pusher, c Content) error {
	writer, err := pusher.Push(ctx, c.Descriptor)
	if errors.Is(err, cerrdefs.ErrAlreadyExists) {
		return nil
	}
	if err != nil {
		return err
	}
	defer writer.Close()
	// Copy starts over when the registry asks for it, by 401, 429 or 503.
	return content.Copy(ctx, writer, bytes.NewReader(c.Blob), c.Descriptor.Size, c.Descriptor.Digest)
}

// refused adds the name and a considered code to a registry's error.
func refused(name string, err error) error {
	if err == nil {
		return nil
	}
	text := errutil.WithDetails(err).Error()
	if answer := answered(err); answer != 0 && !strings.Contains(text, http.StatusText(answer)) {
		text = fmt.Sprintf("%d %s: %s", answer, http.StatusText(answer), text)
	}
	return status.Error(codeOf(err), fmt.Sprintf("failed to push %s: %s", name, text))
}

func codeOf(err error) codes.Code {
	var network *net.OpError
	answer := answered(err)
	switch {
	case answer == http.StatusUnauthorized, answer == http.StatusForbidden, errors.Is(err, docker.ErrInvalidAuthorization):
		return codes.PermissionDenied
	case answer == http.StatusTooManyRequests, answer >= http.StatusInternalServerError:
		return codes.Unavailable
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.As(err, &network), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF): // before the deadline: a timeout to connect counts as one
		return codes.Unavailable
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return codes.Unknown
}

// answered is the HTTP status that a registry or its token server answered with,
// 0 for none. Of the latter's, BuildKit keeps only the registry's error code.
func answered(err error) int {
	var answer remoteserrors.ErrUnexpectedStatus
	if errors.As(err, &answer) {
		return answer.StatusCode
	}
	var coded docker.Errors
	var first docker.Error
	if errors.As(err, &coded) && len(coded) > 0 && errors.As(coded[0], &first) {
		return first.Code.Descriptor().HTTPStatusCode
	}
	return 0
}

// Partly adds to the error of a push which names had been published before it.
func Partly(err error, done []string) error {
	if len(done) == 0 {
		return err
	}
	return status.Errorf(status.Code(err), "%s; published before that: %s", status.Convert(err).Message(), strings.Join(done, ", "))
}
