package authority

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// DefaultTokenTTL is how long a token is good that names nothing else.
	DefaultTokenTTL = time.Hour
	// WorkerTTL is how long a worker's certificate is good by default.
	WorkerTTL = 24 * time.Hour
	// ClientTTL is how long a client's is, an administrator's included.
	ClientTTL = 30 * 24 * time.Hour

	// maxTTL bounds tokens and certificates, minCertificateTTL the latter from below:
	// shorter ones could not be renewed in time.
	maxTTL            = 366 * 24 * time.Hour
	minCertificateTTL = time.Minute
	maxUses           = 100_000
	maxTokens         = 10_000
)

var kinds = map[archfarmv1.CreateTokenRequest_Kind]identity.Kind{
	archfarmv1.CreateTokenRequest_KIND_WORKER: identity.Worker,
	archfarmv1.CreateTokenRequest_KIND_CLIENT: identity.Client,
	archfarmv1.CreateTokenRequest_KIND_ADMIN:  identity.Admin,
}

// CreateToken makes a join token.
func (a *Authority) CreateToken(ctx context.Context, req *archfarmv1.CreateTokenRequest) (*archfarmv1.CreateTokenResponse, error) {
	caller, err := a.administers(ctx, "create tokens")
	if err != nil {
		return nil, err
	}
	if err := a.issues(); err != nil {
		return nil, err
	}
	rec, err := tokenOf(req, a.cfg.Clock())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "creating a token: %v", err)
	}
	t := identity.NewToken(rec.Kind, a.issuer.root(), a.cfg.Advertise())
	rec.Hash = sha256.Sum256(t.Secret[:])
	a.tidy()
	err = a.db.Update(func(tx *bolt.Tx) (err error) {
		if count(tx, tokensBucket) >= maxTokens {
			return status.Errorf(codes.ResourceExhausted, "creating a token: there are %d already; delete some, or wait until they expire", maxTokens)
		}
		if rec.Seq, err = tx.Bucket(tokensBucket).NextSequence(); err != nil {
			return err
		}
		return put(tx, tokensBucket, t.ID.String(), rec)
	})
	if err != nil {
		return nil, internal("creating a token", err)
	}
	a.cfg.Logger.InfoContext(ctx, "token created", "token", t, "kind", rec.Kind, "by", caller.String(), "uses", rec.Uses, "expires", rec.Expires)
	return &archfarmv1.CreateTokenResponse{Token: t.Text(), Info: rec.info(t.ID.String())}, nil
}

// ListTokens returns the tokens that are still good, the first to expire first.
func (a *Authority) ListTokens(ctx context.Context, _ *archfarmv1.ListTokensRequest) (*archfarmv1.ListTokensResponse, error) {
	if _, err := a.administers(ctx, "list tokens"); err != nil {
		return nil, err
	}
	now := a.cfg.Clock()
	out := &archfarmv1.ListTokensResponse{}
	err := a.db.View(func(tx *bolt.Tx) error {
		return each(tx, tokensBucket, func(id string, t token) {
			if t.Uses > 0 && !now.After(t.Expires) {
				out.Tokens = append(out.Tokens, t.info(id))
			}
		})
	})
	if err != nil {
		return nil, internal("listing tokens", err)
	}
	slices.SortFunc(out.Tokens, func(x, y *archfarmv1.Token) int {
		return x.GetExpires().AsTime().Compare(y.GetExpires().AsTime())
	})
	return out, nil
}

// DeleteToken makes a token worthless; certificates that were got with it stay.
func (a *Authority) DeleteToken(ctx context.Context, req *archfarmv1.DeleteTokenRequest) (*archfarmv1.DeleteTokenResponse, error) {
	caller, err := a.administers(ctx, "delete tokens")
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(req.GetId(), "archfarm1.") { // do not repeat the secret
		return nil, status.Error(codes.InvalidArgument, "deleting a token: give its id, as archfarm token list shows it, and not the token")
	}
	if req.GetId() == "" {
		return nil, status.Error(codes.InvalidArgument, "deleting a token: no id is given; archfarm token list shows them")
	}
	err = a.db.Update(func(tx *bolt.Tx) error {
		if tx.Bucket(tokensBucket).Get([]byte(req.GetId())) == nil {
			return status.Errorf(codes.NotFound, "there is no token %.40q; archfarm token list shows them", req.GetId())
		}
		return tx.Bucket(tokensBucket).Delete([]byte(req.GetId()))
	})
	if err != nil {
		return nil, internal("deleting a token", err)
	}
	a.cfg.Logger.InfoContext(ctx, "token deleted", "token", req.GetId(), "by", caller.String())
	return &archfarmv1.DeleteTokenResponse{}, nil
}

// tokenOf checks a request, and fills in what it leaves out.
func tokenOf(req *archfarmv1.CreateTokenRequest, now time.Time) (*token, error) {
	t := &token{Kind: kinds[req.GetKind()], Name: req.GetName(), Tenant: req.GetTenant(), Pools: req.GetPools(), Uses: max(req.GetUses(), 1)}
	fallback := ClientTTL
	switch t.Kind {
	case identity.Local:
		return nil, fmt.Errorf("say what it is for: a worker, a client or an administrator")
	case identity.Worker:
		fallback = WorkerTTL
		if len(t.Pools) == 0 {
			t.Pools = []string{identity.DefaultPool}
		}
	default:
		if t.Tenant == "" {
			t.Tenant = identity.DefaultTenant
		}
	}
	who := t.identity("any")
	if t.Name != "" {
		who = t.identity(t.Name)
	}
	if err := who.Validate(); err != nil {
		return nil, err
	}
	if t.Uses > maxUses {
		return nil, fmt.Errorf("%d uses: at most %d are possible", t.Uses, maxUses)
	}
	ttl, err := lifetime(req.GetTtl(), DefaultTokenTTL, time.Second)
	if err != nil {
		return nil, fmt.Errorf("the token's time to live: %w", err)
	}
	t.Expires = now.Add(ttl)
	if t.TTL, err = lifetime(req.GetCertificateTtl(), fallback, minCertificateTTL); err != nil {
		return nil, fmt.Errorf("the certificates' time to live: %w", err)
	}
	return t, nil
}

func lifetime(d *durationpb.Duration, fallback, least time.Duration) (time.Duration, error) {
	if d == nil {
		return fallback, nil
	}
	if got := d.AsDuration(); d.IsValid() && got >= least && got <= maxTTL {
		return got, nil
	}
	return 0, fmt.Errorf("%s is not between %s and %d days", d.AsDuration(), least, maxTTL/(24*time.Hour))
}

// identity is whom the token makes of somebody with a name.
func (t *token) identity(name string) identity.Identity {
	return identity.Identity{Kind: t.Kind, Name: name, Tenant: t.Tenant, Pools: t.Pools}
}

func (t *token) info(id string) *archfarmv1.Token {
	out := &archfarmv1.Token{Id: id, Expires: timestamppb.New(t.Expires), UsesLeft: t.Uses, Pools: t.Pools, Tenant: t.Tenant, Name: t.Name}
	for kind := range maps.Keys(kinds) {
		if kinds[kind] == t.Kind {
			out.Kind = kind
		}
	}
	return out
}

func count(tx *bolt.Tx, bucket []byte) int { return tx.Bucket(bucket).Stats().KeyN }

// issues says whether this authority can issue certificates.
func (a *Authority) issues() error {
	if a.issuer.key != nil {
		return nil
	}
	return status.Error(codes.FailedPrecondition,
		"this coordinator has no CA key, only the CA's certificate: get certificates from whoever runs that CA (docs: certificates of your own), or give the coordinator the key")
}

// internal leaves errors that have a code as they are; the rest is the disk.
func internal(what string, err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Errorf(codes.Internal, "%s: %v", what, err)
}
