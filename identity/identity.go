// Package identity says who is at the other end of a connection: which part of
// the farm or which client, and what it may use. It is written into certificates
// as a URI in the manner of SPIFFE (https://github.com/spiffe/spiffe, SPIFFE-ID):
//
//	spiffe://archfarm/worker/mac-2/pool/office
//	spiffe://archfarm/client/ci/tenant/acme/pool/office/pool/cloud
//	spiffe://archfarm/admin/alice/tenant/default
//	spiffe://archfarm/coordinator/farm-1
package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

const (
	// TrustDomain is the authority part of every identity's URI.
	TrustDomain = "archfarm"
	// DefaultPool is the pool of a worker that names none.
	DefaultPool = "default"
	// DefaultTenant is the tenant of a client that names none.
	DefaultTenant = "default"

	// maxName bounds names, pools and tenants; maxPools the pools of one identity.
	maxName  = 128
	maxPools = 64
)

// Kind is what somebody is to the farm.
type Kind string

// The kinds. The zero value is Local: somebody on the coordinator's own machine,
// over a connection without TLS that the operator's configuration allows.
const (
	Local       Kind = ""
	Coordinator Kind = "coordinator"
	Worker      Kind = "worker"
	Client      Kind = "client"
	// Admin is a client that may also manage the farm.
	Admin Kind = "admin"
	// Anonymous has no certificate, on a connection that wants one.
	Anonymous Kind = "anonymous"
)

// Identity is who somebody is.
type Identity struct {
	Kind Kind
	Name string
	// Tenant is whose builds a client sees; empty for workers and coordinators.
	Tenant string
	// Pools are, of a worker, the one that it belongs to; of a client, those that
	// it may use, none for any.
	Pools []string
	// Socket tells of a Local caller that it came through the coordinator's own
	// socket, which only its user and root can open.
	Socket bool
}

// Administers tells whether the caller may manage the farm's certificates and keys.
func (i Identity) Administers() bool { return i.Kind == Admin || i.Kind == Local && i.Socket }

// Operates tells whether the caller may take workers out of service.
func (i Identity) Operates() bool { return i.Kind == Admin || i.Kind == Local }

// Builds tells whether the caller may build.
func (i Identity) Builds() bool { return i.Kind == Local || i.Kind == Client || i.Kind == Admin }

// MaySee tells whether the caller may see what belongs to a tenant.
func (i Identity) MaySee(tenant string) bool { return i.Operates() || i.Tenant == tenant }

// MayUse tells whether a client may use a pool.
func (i Identity) MayUse(pool string) bool {
	return len(i.Pools) == 0 || slices.Contains(i.Pools, pool)
}

// String is the identity as logs and errors name it.
func (i Identity) String() string {
	switch i.Kind {
	case Local:
		return "a local client"
	case Anonymous:
		return "a client without a certificate"
	}
	return string(i.Kind) + " " + i.Name
}

// ValidName tells whether a name, pool or tenant may stand in an identity: 1 to
// 128 letters, digits, ".", "_" and "-" (SPIFFE-ID, section 2.2), and not a path's
// own "." or "..".
func ValidName(name string) bool {
	return name != "" && len(name) <= maxName && name != "." && name != ".." &&
		!strings.ContainsFunc(name, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '_' && r != '-'
		})
}

// Validate says what of an identity cannot be written into a certificate.
func (i Identity) Validate() error {
	switch {
	case i.Kind != Coordinator && i.Kind != Worker && i.Kind != Client && i.Kind != Admin:
		return fmt.Errorf("there are no certificates for %s", i)
	case !ValidName(i.Name):
		return fmt.Errorf("name %q: use 1 to %d letters, digits, '.', '_' and '-'", i.Name, maxName)
	case i.Kind == Worker && len(i.Pools) != 1:
		return fmt.Errorf("worker %s: %d pools, a worker belongs to one", i.Name, len(i.Pools))
	case len(i.Pools) > maxPools:
		return fmt.Errorf("%s: %d pools, at most %d are possible", i, len(i.Pools), maxPools)
	case (i.Kind == Client || i.Kind == Admin) != (i.Tenant != ""):
		return fmt.Errorf("%s: clients have a tenant, and nobody else", i)
	case i.Tenant != "" && !ValidName(i.Tenant):
		return fmt.Errorf("tenant %q: use 1 to %d letters, digits, '.', '_' and '-'", i.Tenant, maxName)
	}
	for _, pool := range i.Pools {
		if !ValidName(pool) {
			return fmt.Errorf("pool %q: use 1 to %d letters, digits, '.', '_' and '-'", pool, maxName)
		}
	}
	return nil
}

// URI is the identity as certificates name it.
func (i Identity) URI() *url.URL {
	path := "/" + string(i.Kind) + "/" + i.Name
	if i.Tenant != "" {
		path += "/tenant/" + i.Tenant
	}
	for _, pool := range i.Pools {
		path += "/pool/" + pool
	}
	return &url.URL{Scheme: "spiffe", Host: TrustDomain, Path: path}
}

// Parse reads an identity's URI.
func Parse(u *url.URL) (Identity, error) {
	if u.Scheme != "spiffe" || u.Host != TrustDomain || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" {
		return Identity{}, fmt.Errorf("%q does not begin with spiffe://%s/", u.Redacted(), TrustDomain)
	}
	parts := strings.Split(strings.TrimPrefix(u.Path, "/"), "/")
	if len(parts)%2 != 0 {
		return Identity{}, fmt.Errorf("the path %q does not consist of words and their values", u.Path)
	}
	i := Identity{Kind: Kind(parts[0]), Name: parts[1]}
	for p := 2; p < len(parts); p += 2 {
		switch {
		case parts[p] == "tenant" && i.Tenant == "" && len(i.Pools) == 0:
			i.Tenant = parts[p+1]
		case parts[p] == "pool":
			i.Pools = append(i.Pools, parts[p+1])
		default:
			return Identity{}, fmt.Errorf("the path %q has an unexpected %q", u.Path, parts[p])
		}
	}
	if err := i.Validate(); err != nil {
		return Identity{}, err
	}
	if i.URI().String() != u.String() {
		return Identity{}, fmt.Errorf("%q is not in its canonical form", u.Redacted())
	}
	return i, nil
}

// Of returns the identity that a certificate, which has been verified, gives its
// holder.
func Of(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return Identity{}, errors.New("the certificate does not name exactly one identity of the farm (a URI that begins with spiffe://" + TrustDomain + "/)")
	}
	i, err := Parse(cert.URIs[0])
	if err != nil {
		return Identity{}, fmt.Errorf("the certificate's identity: %w", err)
	}
	return i, nil
}

type contextKey struct{}

// NewContext returns a context that says who is calling.
func NewContext(ctx context.Context, i Identity) context.Context {
	return context.WithValue(ctx, contextKey{}, i)
}

// FromContext returns who is calling; Local where nobody has said.
func FromContext(ctx context.Context) Identity {
	i, _ := Lookup(ctx)
	return i
}

// Lookup is FromContext, and whether somebody has said.
func Lookup(ctx context.Context) (Identity, bool) {
	i, ok := ctx.Value(contextKey{}).(Identity)
	return i, ok
}
