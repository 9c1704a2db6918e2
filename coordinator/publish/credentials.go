package publish

import (
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// given are credentials, and the tokens that they brought.
type given struct {
	secrets map[string]credential // by host

	mu    sync.Mutex
	known map[string][]docker.RegistryHost // by domain, with authorizers
}

type credential struct{ user, secret string }

func newGiven(credentials []*archfarmv1.RegistryCredential) *given {
	g := &given{secrets: map[string]credential{}, known: map[string][]docker.RegistryHost{}}
	for _, c := range credentials {
		secret := credential{c.GetUsername(), c.GetPassword()}
		if c.GetIdentityToken() != "" { // without a user, it is exchanged for tokens
			secret = credential{"", c.GetIdentityToken()}
		}
		g.secrets[configured(c.GetHost())] = secret
	}
	return g
}

// hub are the names that Docker's own registry goes by.
var hub = []string{"docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"}

// configured is the host of an entry of Docker's configuration, which may be an
// address ("https://index.docker.io/v1/").
func configured(host string) string {
	if _, after, ok := strings.Cut(host, "://"); ok {
		host = after
	}
	host, _, _ = strings.Cut(host, "/")
	host = strings.ToLower(host)
	if slices.Contains(hub, host) {
		return hub[0]
	}
	return host
}

// of returns the credentials for a host, empty when there are none.
func (g *given) of(host string) (user, secret string, err error) {
	c := g.secrets[configured(host)]
	return c.user, c.secret, nil
}

// hosts keeps a domain's hosts, and thereby their tokens.
func (g *given) hosts(reach docker.RegistryHosts, insecure bool) docker.RegistryHosts {
	return func(domain string) ([]docker.RegistryHost, error) {
		key := domain
		if insecure {
			key += " insecure"
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if known, ok := g.known[key]; ok {
			return known, nil
		}
		known, err := scrubbed(reach)(domain)
		if err != nil {
			return nil, err
		}
		for i := range known {
			known[i].Authorizer = docker.NewDockerAuthorizer(docker.WithAuthClient(known[i].Client), docker.WithAuthCreds(g.of))
		}
		g.known[key] = known
		return known, nil
	}
}

// forget drops the tokens: an authorizer that failed to get one remembers that.
func (g *given) forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.known)
}

// redact takes the secrets out of a text.
func (g *given) redact(text string) string {
	for _, c := range g.secrets {
		text = redact(text, forms(c.user, c.secret))
	}
	return text
}
