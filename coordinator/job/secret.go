package job

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/seal"
	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// confidential is what a job needs and nobody gets to see. It does not print.
type confidential struct {
	secrets     map[string][]byte // by id
	credentials []*archfarmv1.RegistryCredential
}

func (confidential) String() string   { return "secrets (not shown)" }
func (confidential) GoString() string { return "secrets (not shown)" }

// sealed encrypts what came with a job; nil for nothing.
func sealed(key Key, tenant, job string, req *archfarmv1.SubmitRequest) ([]byte, error) {
	if len(req.GetSecrets())+len(req.GetCredentials()) == 0 {
		return nil, nil
	}
	plain, err := proto.Marshal(&archfarmv1.SubmitRequest{Secrets: req.GetSecrets(), Credentials: req.GetCredentials()})
	if err != nil {
		return nil, errors.New("encoding the job's secrets") // the cause may show one
	}
	return key.Seal(plain, jobSeal(tenant, job))
}

// jobSeal is what a job's sealed things belong to.
func jobSeal(tenant, job string) []byte { return seal.Context("job", tenant, job) }

// SecretSeal is what a stored secret, which is sealed, belongs to.
func SecretSeal(tenant, name string) []byte { return seal.Context("secret", tenant, name) }

// unsealed are a job's own secrets and the stored ones that it names.
func unsealed(ctx context.Context, key Key, secrets store.Secrets, j store.Job, spec *archfarmv1.JobSpec) (c confidential, err error) {
	c.secrets = map[string][]byte{}
	if len(j.Sealed) > 0 {
		plain, err := key.Unseal(j.Sealed, jobSeal(j.Tenant, j.ID))
		if err != nil {
			return c, fmt.Errorf("the job's secrets: %w", err)
		}
		own := &archfarmv1.SubmitRequest{}
		if err := proto.Unmarshal(plain, own); err != nil {
			return c, errUnreadable
		}
		c.credentials = own.GetCredentials()
		for id, value := range own.GetSecrets() {
			c.secrets[id] = value
		}
	}
	named, err := stocked(ctx, key, secrets, j.Tenant, spec)
	for id, value := range named {
		c.secrets[id] = value
	}
	return c, err
}

var errUnreadable = errors.New("the job's secrets cannot be read: a newer version may have written them")

// stocked are the stored secrets that a specification names, by id.
func stocked(ctx context.Context, key Key, secrets store.Secrets, tenant string, spec *archfarmv1.JobSpec) (map[string][]byte, error) {
	out := map[string][]byte{}
	for i, ref := range spec.GetSecrets() {
		if ref.GetName() == "" {
			continue
		}
		raw, err := secrets.Secret(ctx, tenant, ref.GetName())
		if errors.Is(err, store.ErrNotFound) {
			return nil, &noSecretError{i, ref.GetName()}
		}
		if err != nil {
			return nil, fmt.Errorf("secret %q: %w", ref.GetName(), err)
		}
		if out[ref.GetId()], err = key.Unseal(raw, SecretSeal(tenant, ref.GetName())); err != nil {
			return nil, fmt.Errorf("secret %q: %w", ref.GetName(), err)
		}
	}
	return out, nil
}

// noSecretError says which of a specification's secrets is not stored.
type noSecretError struct {
	index int
	name  string
}

func (e *noSecretError) Error() string {
	return fmt.Sprintf("there is no secret named %q: store it with \"archfarm secret create %s\", or send it with the job", e.name, e.name)
}

// isSealed tells whether something sealed cannot be opened, however often one tries.
func isSealed(err error) bool {
	return errors.Is(err, seal.ErrOtherKey) || errors.Is(err, seal.ErrAltered) || errors.Is(err, errUnreadable)
}
