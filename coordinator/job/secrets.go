package job

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/job/spec"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// secrets is the SecretService. A caller's secrets are its tenant's.
type secrets struct {
	archfarmv1.UnimplementedSecretServiceServer
	*server
}

// PutSecret implements archfarmv1.SecretServiceServer.
func (s secrets) PutSecret(ctx context.Context, req *archfarmv1.PutSecretRequest) (*archfarmv1.PutSecretResponse, error) {
	tenant, err := owner(ctx)
	if err != nil {
		return nil, err
	}
	if err := spec.SecretName(req.GetName()); err != nil {
		return nil, violation("name", err.Error())
	}
	switch n := len(req.GetValue()); {
	case n == 0:
		return nil, violation("value", "required")
	case n > spec.MaxSecret:
		return nil, status.Errorf(codes.InvalidArgument, "value: %d bytes long, at most %d are possible", n, spec.MaxSecret)
	}
	sealed, err := s.Key.Seal(req.GetValue(), SecretSeal(tenant, req.GetName()))
	if err != nil {
		return nil, status.Errorf(codes.Internal, "storing the secret: %v", err)
	}
	if err := s.Store.PutSecret(ctx, tenant, req.GetName(), sealed); err != nil {
		return nil, unavailable("storing the secret", err)
	}
	s.Log.Info("secret stored", "tenant", tenant, "name", req.GetName(), "by", identity.FromContext(ctx).String())
	return &archfarmv1.PutSecretResponse{}, nil
}

// ListSecrets implements archfarmv1.SecretServiceServer.
func (s secrets) ListSecrets(ctx context.Context, _ *archfarmv1.ListSecretsRequest) (*archfarmv1.ListSecretsResponse, error) {
	tenant, err := owner(ctx)
	if err != nil {
		return nil, err
	}
	list, err := s.Store.ListSecrets(ctx, tenant)
	if err != nil {
		return nil, unavailable("listing secrets", err)
	}
	resp := &archfarmv1.ListSecretsResponse{}
	for _, one := range list {
		resp.Secrets = append(resp.Secrets, &archfarmv1.SecretInfo{Name: one.Name, UpdateTime: stamp(one.Updated)})
	}
	return resp, nil
}

// DeleteSecret implements archfarmv1.SecretServiceServer.
func (s secrets) DeleteSecret(ctx context.Context, req *archfarmv1.DeleteSecretRequest) (*archfarmv1.DeleteSecretResponse, error) {
	tenant, err := owner(ctx)
	if err != nil {
		return nil, err
	}
	err = s.Store.DeleteSecret(ctx, tenant, req.GetName())
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, status.Errorf(codes.NotFound, "there is no secret named %q", req.GetName())
	case err != nil:
		return nil, unavailable("deleting the secret", err)
	}
	s.Log.Info("secret deleted", "tenant", tenant, "name", req.GetName(), "by", identity.FromContext(ctx).String())
	return &archfarmv1.DeleteSecretResponse{}, nil
}

// owner is the tenant whose secrets the caller manages.
func owner(ctx context.Context) (string, error) {
	who := identity.FromContext(ctx)
	if !who.Builds() {
		return "", status.Errorf(codes.PermissionDenied, "secrets: %s may not build", who)
	}
	return tenantOf(who), nil
}
