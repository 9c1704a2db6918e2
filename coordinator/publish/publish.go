// Package publish makes references point at what was built: once, last, when
// every leg of a build has succeeded.
package publish

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

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
// Unavailable when it fails itself.
func (r Registry) Push(ctx context.Context, name string, byDigest bool, c Content) error {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "pushing %q: %v", name, err)
	}
	target := named.Name()
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
	if _, err := writer.Write(c.Blob); err != nil {
		return err
	}
	err = writer.Commit(ctx, c.Descriptor.Size, c.Descriptor.Digest)
	if errors.Is(err, cerrdefs.ErrAlreadyExists) {
		return nil
	}
	return err
}

// refused adds the name and a considered code to a registry's error.
func refused(name string, err error) error {
	if err == nil {
		return nil
	}
	code := codes.Unknown
	var answer remoteserrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.As(err, &answer) && answer.StatusCode >= http.StatusInternalServerError:
		code = codes.Unavailable
	case errors.As(err, &answer) && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden),
		errors.Is(err, docker.ErrInvalidAuthorization):
		code = codes.PermissionDenied
	}
	return status.Error(code, fmt.Sprintf("failed to push %s: %v", name, errutil.WithDetails(err)))
}

// Partly adds to the error of a push which names had been published before it.
func Partly(err error, done []string) error {
	if len(done) == 0 {
		return err
	}
	return status.Errorf(status.Code(err), "%s; published before that: %s", status.Convert(err).Message(), strings.Join(done, ", "))
}
