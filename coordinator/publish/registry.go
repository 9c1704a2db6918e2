package publish

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/resolver"
	resolverconfig "github.com/moby/buildkit/util/resolver/config"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/manifest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Registry speaks to registries with the credentials of a client, which it asks
// for through the client's session and does not keep, or with those it was given
// (WithCredentials). It may be used concurrently.
type Registry struct {
	Sessions *session.Manager
	// Session is the client's.
	Session string
	// Insecure allows plain HTTP and unknown certificates, as the exporter's
	// option registry.insecure does. Registries on localhost may always use HTTP.
	Insecure bool

	given *given
}

// WithCredentials is a Registry with credentials of its own; without any, it is
// anybody.
func WithCredentials(credentials []*archfarmv1.RegistryCredential, insecure bool) Registry {
	return Registry{Insecure: insecure, given: newGiven(credentials)}
}

// Push makes a reference point at the content: a tag ("latest" when it has
// none), or just the digest. Pushing what is there already changes nothing. An
// error carries PermissionDenied when the registry refuses the client,
// Unavailable when it fails itself or cannot be reached, after a few tries.
func (r Registry) Push(ctx context.Context, name string, byDigest bool, c Content) error {
	t, err := readTarget(name, byDigest, c.Descriptor.Digest)
	if err != nil {
		return err
	}
	e, err := r.endpoint(t.named, true)
	if err != nil {
		return r.refused("failed to push", name, err)
	}
	found, err := e.look(ctx, t.object(c))
	if err == nil && found.Digest == c.Descriptor.Digest {
		return nil
	}
	if err != nil && !errors.Is(err, errMissing) {
		return r.refused("failed to push", name, err)
	}
	return r.refused("failed to push", name, e.put(ctx, t.object(c), c))
}

// Resolve returns what a reference points at: its tag ("latest" when it has none),
// or its digest. NotFound when the registry says that there is nothing;
// other codes as Push has them.
func (r Registry) Resolve(ctx context.Context, name string) (ocispecs.Descriptor, error) {
	t, err := readTarget(name, false, "")
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	return r.resolve(ctx, t, Content{}, false)
}

// resolve looks; pushing asks for the right to push along with it, so that a push
// afterwards needs no other token.
func (r Registry) resolve(ctx context.Context, t target, c Content, pushing bool) (ocispecs.Descriptor, error) {
	e, err := r.endpoint(t.named, pushing)
	if err != nil {
		return ocispecs.Descriptor{}, r.refused("looking up", t.name, err)
	}
	found, err := e.look(ctx, t.object(c))
	return found, r.refused("looking up", t.name, err)
}

// Fetch reads a manifest or index, of at most manifest.MaxBlob bytes, from a
// repository, and checks its size and digest. NotFound when it is not there,
// DataLoss when it is something else.
func (r Registry) Fetch(ctx context.Context, repository string, d ocispecs.Descriptor) (Content, error) {
	t, err := readTarget(repository, false, "")
	if err != nil {
		return Content{}, err
	}
	name := reference.TrimNamed(t.named).String() + "@" + d.Digest.String()
	if err := d.Digest.Validate(); err != nil {
		return Content{}, status.Errorf(codes.InvalidArgument, "fetching %s: %v", name, err)
	}
	if d.Size > manifest.MaxBlob || d.Size < 0 {
		return Content{}, status.Errorf(codes.InvalidArgument, "fetching %s: its size is %d, from 0 to %d are possible", name, d.Size, manifest.MaxBlob)
	}
	e, err := r.endpoint(t.named, false)
	if err != nil {
		return Content{}, r.refused("fetching", name, err)
	}
	blob, _, err := e.get(ctx, d.Digest.String())
	if err != nil {
		return Content{}, r.refused("fetching", name, err)
	}
	if got := d.Digest.Algorithm().FromBytes(blob); got != d.Digest || int64(len(blob)) != d.Size {
		return Content{}, status.Errorf(codes.DataLoss, "fetching %s: the registry answers %s of %d bytes, not of %d", name, got, len(blob), d.Size)
	}
	return Content{Descriptor: d, Blob: blob}, nil
}

// target is a reference to publish.
type target struct {
	name     string // as it was given
	named    reference.Named
	tag      string // empty: by digest only
	byDigest bool
}

func readTarget(name string, byDigest bool, content digest.Digest) (target, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return target{}, status.Errorf(codes.InvalidArgument, "pushing %q: %v", shorten(name), err)
	}
	if byDigest && !reference.IsNameOnly(named) {
		return target{}, status.Errorf(codes.InvalidArgument, "can't push tagged ref %s by digest", named)
	}
	if content != "" {
		if err := content.Validate(); err != nil {
			return target{}, status.Errorf(codes.InvalidArgument, "pushing %q: %v", shorten(name), err)
		}
	}
	t := target{name: name, named: named, byDigest: byDigest}
	if tagged, ok := reference.TagNameOnly(named).(reference.Tagged); ok && !byDigest {
		t.tag = tagged.Tag()
	}
	return t, nil
}

// repository is the normalized one, with its host.
func (t target) repository() string { return t.named.Name() }

// object is what the registry knows the content by.
func (t target) object(c Content) string {
	digested, ok := t.named.(reference.Digested)
	switch {
	case t.tag != "":
		return t.tag
	case c.Descriptor.Digest == "" && ok:
		return digested.Digest().String()
	}
	return c.Descriptor.Digest.String()
}

// endpoint finds the registry of a name.
func (r Registry) endpoint(named reference.Named, push bool) (endpoint, error) {
	e := endpoint{path: reference.Path(named), domain: reference.Domain(named), push: push, given: r.given}
	if r.given != nil {
		e.hosts = r.given.hosts(r.knownHosts(e.domain), r.Insecure)
	} else {
		group := session.NewGroup(r.Session)
		scope := resolver.ScopeType{Push: true, Insecure: r.Insecure} // Push: no other session gets to these tokens
		e.hosts = resolver.DefaultPool.GetResolver(scrubbed(r.knownHosts(e.domain)), named.Name(), scope, r.Sessions, group).HostsFunc
	}
	_, err := e.host()
	return e, err
}

// knownHosts are how registries are reached.
func (r Registry) knownHosts(domain string) docker.RegistryHosts {
	if !r.Insecure {
		return secureHosts
	}
	yes := true
	return resolver.NewRegistryConfig(map[string]resolverconfig.RegistryConfig{
		domain: {Insecure: &yes, PlainHTTP: &yes},
	})
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

// refused adds to a registry's error what was being done and a considered code, and
// takes out of it what nobody may read.
func (r Registry) refused(doing, name string, err error) error {
	if err == nil {
		return nil
	}
	text := describe(err)
	if r.given != nil {
		text = r.given.redact(text)
	}
	return status.Error(codeOf(err), fmt.Sprintf("%s %s: %s", doing, name, text))
}
