package access_test

import (
	"context"
	"log/slog"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// fleetOf answers with who has asked.
type fleetOf struct {
	archfarmv1.UnimplementedFleetServiceServer
	seen chan identity.Identity
}

func (f fleetOf) ListWorkers(ctx context.Context, _ *archfarmv1.ListWorkersRequest) (*archfarmv1.ListWorkersResponse, error) {
	f.seen <- identity.FromContext(ctx)
	return &archfarmv1.ListWorkersResponse{}, nil
}

func TestInside_CallsAreOnBehalfOfWhomTheContextNames(t *testing.T) {
	t.Parallel()
	seen := make(chan identity.Identity, 1)
	door := access.NewDoor(open(t, false).Authority, slog.New(slog.DiscardHandler))
	server := grpc.NewServer(grpc.Creds(door.Credentials(insecure.NewCredentials())), grpc.UnaryInterceptor(door.Unary), grpc.StreamInterceptor(door.Stream))
	archfarmv1.RegisterFleetServiceServer(server, fleetOf{seen: seen})
	archfarmv1.RegisterAgentServiceServer(server, agents{seen: seen})
	inside, served := access.NewInside(), make(chan struct{})
	go func() { defer close(served); _ = server.Serve(inside) }()
	t.Cleanup(func() { server.Stop(); <-served })
	conn, err := inside.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	fleet := archfarmv1.NewFleetServiceClient(conn)

	for _, who := range []identity.Identity{
		{Kind: identity.Client, Name: "ci", Tenant: "acme", Pools: []string{"office"}},
		{Kind: identity.Admin, Name: "alice", Tenant: "default"},
		{}, // somebody on this machine
	} {
		if _, err := fleet.ListWorkers(identity.NewContext(t.Context(), who), &archfarmv1.ListWorkersRequest{}); err != nil {
			t.Errorf("%s: %v", who, err)
			continue
		}
		if got := <-seen; got.String() != who.String() || got.Tenant != who.Tenant || len(got.Pools) != len(who.Pools) {
			t.Errorf("called as %+v, on behalf of %+v", got, who)
		}
	}
	anonymous := identity.NewContext(t.Context(), identity.Identity{Kind: identity.Anonymous})
	if _, err := fleet.ListWorkers(anonymous, &archfarmv1.ListWorkersRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("on behalf of nobody: %v", err)
	}
	stream, err := archfarmv1.NewAgentServiceClient(conn).Attach(identity.NewContext(t.Context(), identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "a"}))
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a client's stream of an agent: %v", err)
	}
	if _, err := fleet.ListWorkers(t.Context(), &archfarmv1.ListWorkersRequest{}); status.Code(err) != codes.Internal {
		t.Errorf("without an identity: %v", err)
	}
}

func TestInside_TheIdentityOfACallFromElsewhereIsItsCertificates(t *testing.T) {
	t.Parallel()
	h := open(t, false)
	forged := metadata.AppendToOutgoingContext(t.Context(), "archfarm-identity", `{"Kind":"admin","Name":"alice"}`)
	fleet := archfarmv1.NewFleetServiceClient(dial(t, h.tcp, credentials.NewTLS(h.anonymous(t))))
	if _, err := fleet.ListWorkers(forged, &archfarmv1.ListWorkersRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a forged identity: %v", err)
	}
	options := append(access.DialOptions(), grpc.WithTransportCredentials(credentials.NewTLS(h.anonymous(t))))
	conn, err := grpc.NewClient(h.tcp.Addr, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	admin := identity.NewContext(t.Context(), identity.Identity{Kind: identity.Admin, Name: "alice"})
	if _, err := archfarmv1.NewFleetServiceClient(conn).ListWorkers(admin, &archfarmv1.ListWorkersRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a forged identity by our own interceptor: %v", err)
	}
}
