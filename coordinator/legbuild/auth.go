package legbuild

import (
	"context"
	"strings"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	"google.golang.org/grpc"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// dockerHub has many names.
const dockerHub = "docker.io"

// registryAuth answers which credentials a registry wants. Nothing but what came with
// the job is offered: no files, no helpers. Workers fetch the tokens that registries
// make of them, because the address of a token server is the registry's word, and not
// one that a coordinator should follow.
type registryAuth struct {
	auth.UnimplementedAuthServer
	byHost map[string]*archfarmv1.RegistryCredential
}

var _ session.Attachable = (*registryAuth)(nil)

func newRegistryAuth(credentials []*archfarmv1.RegistryCredential) *registryAuth {
	a := &registryAuth{byHost: map[string]*archfarmv1.RegistryCredential{}}
	for _, c := range credentials {
		a.byHost[registryHost(c.GetHost())] = c
	}
	return a
}

// Register implements session.Attachable.
func (a *registryAuth) Register(s *grpc.Server) { auth.RegisterAuthServer(s, a) }

// Credentials implements auth.AuthServer.
func (a *registryAuth) Credentials(_ context.Context, req *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	c := a.byHost[registryHost(req.GetHost())]
	if token := c.GetIdentityToken(); token != "" {
		return &auth.CredentialsResponse{Secret: token}, nil // as Docker's clients do: without a name
	}
	return &auth.CredentialsResponse{Username: c.GetUsername(), Secret: c.GetPassword()}, nil
}

// registryHost is the host of a registry as Docker's configuration may name it.
func registryHost(name string) string {
	if _, rest, ok := strings.Cut(name, "://"); ok {
		name = rest
	}
	name, _, _ = strings.Cut(name, "/")
	switch name = strings.ToLower(name); name {
	case "index.docker.io", "registry-1.docker.io":
		return dockerHub
	}
	return name
}
