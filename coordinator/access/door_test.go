package access_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/coordinator/authority"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var management = identity.Identity{Socket: true}

// house is a gRPC server behind a door, at a Unix socket and at loopback.
type house struct {
	*authority.Authority
	door       *access.Door
	tcp, admin address.Address
	tunnels    chan net.Conn
	seen       chan identity.Identity
}

type agents struct {
	archfarmv1.UnimplementedAgentServiceServer
	seen chan identity.Identity
}

// Attach waits for the stream's end, which an eviction brings.
func (a agents) Attach(stream archfarmv1.AgentService_AttachServer) error {
	a.seen <- identity.FromContext(stream.Context())
	_, err := stream.Recv()
	return err
}

func open(t *testing.T, insecurely bool) *house {
	t.Helper()
	dir, err := os.MkdirTemp("", "af") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := &house{tunnels: make(chan net.Conn, 1), seen: make(chan identity.Identity, 10)}
	h.Authority, err = authority.Open(authority.Config{Dir: dir, Name: "farm", Hosts: []string{"farm"}, Evict: func(who identity.Identity) { h.door.Evict(who) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	h.door = access.NewDoor(h.Authority, slog.New(slog.DiscardHandler))
	h.door.AdminSocket = filepath.Join(dir, "admin.sock")

	server := grpc.NewServer(grpc.Creds(h.door.Credentials(insecure.NewCredentials())), grpc.UnaryInterceptor(h.door.Unary), grpc.StreamInterceptor(h.door.Stream))
	archfarmv1.RegisterAuthorityServiceServer(server, h.Authority)
	archfarmv1.RegisterFleetServiceServer(server, archfarmv1.UnimplementedFleetServiceServer{})
	archfarmv1.RegisterAgentServiceServer(server, agents{seen: h.seen})
	controlapi.RegisterControlServer(server, controlapi.UnimplementedControlServer{})
	healthpb.RegisterHealthServer(server, health.NewServer())
	var serving sync.WaitGroup
	t.Cleanup(serving.Wait)
	t.Cleanup(server.Stop)
	for _, a := range []*address.Address{&h.tcp, &h.admin} {
		*a = address.Address{Network: "unix", Addr: h.door.AdminSocket}
		if a == &h.tcp {
			*a = address.Address{Network: "tcp", Addr: "127.0.0.1:0"}
		}
		l, err := a.Listen(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		security := h.door.Security(*a, insecurely)
		if a.Network == "tcp" && !insecurely { // as on an address that others reach
			security = h.door.Security(address.Address{Network: "tcp", Addr: "192.0.2.1:1"}, false)
		}
		a.Addr = l.Addr().String()
		serving.Go(func() {
			_ = server.Serve(tunnel.NewListener(l, security, func(_ string, conn net.Conn) { h.tunnels <- conn }, slog.New(slog.DiscardHandler)))
		})
	}
	return h
}

// join issues a certificate.
func (h *house) join(t *testing.T, kind archfarmv1.CreateTokenRequest_Kind, name string) *tls.Config {
	t.Helper()
	ctx := identity.NewContext(t.Context(), management)
	token, err := h.CreateToken(ctx, &archfarmv1.CreateTokenRequest{Kind: kind})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	joined, err := h.Join(t.Context(), &archfarmv1.JoinRequest{Token: token.GetToken(), CertificateRequest: csr, Name: name})
	if err != nil {
		t.Fatal(err)
	}
	config := h.anonymous(t)
	config.Certificates = []tls.Certificate{{Certificate: joined.GetCertificates(), PrivateKey: key}}
	return config
}

// anonymous is a client without a certificate.
func (h *house) anonymous(t *testing.T) *tls.Config {
	t.Helper()
	return &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}} //nolint:gosec // the client's side is not what is tested
}

func dial(t *testing.T, a address.Address, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///farm", grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.Dial(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// calls returns the code of one call of each sort.
func calls(t *testing.T, cc *grpc.ClientConn) map[string]codes.Code {
	t.Helper()
	out := map[string]codes.Code{}
	note := func(name string, err error) { out[name] = status.Code(err) }
	_, err := healthpb.NewHealthClient(cc).Check(t.Context(), &healthpb.HealthCheckRequest{})
	note("health", err)
	_, err = controlapi.NewControlClient(cc).Info(t.Context(), &controlapi.InfoRequest{})
	note("build", err)
	_, err = archfarmv1.NewFleetServiceClient(cc).ListWorkers(t.Context(), &archfarmv1.ListWorkersRequest{})
	note("fleet", err)
	_, err = archfarmv1.NewAuthorityServiceClient(cc).ListTokens(t.Context(), &archfarmv1.ListTokensRequest{})
	note("tokens", err)
	_, err = archfarmv1.NewAuthorityServiceClient(cc).Join(t.Context(), &archfarmv1.JoinRequest{Token: "x"})
	note("join", err)
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := archfarmv1.NewAgentServiceClient(cc).Attach(ctx)
	if err == nil {
		_ = stream.CloseSend()
		_, err = stream.Recv()
	}
	note("attach", err)
	cancel()
	return out
}

func TestDoor_WhoMayDoWhat(t *testing.T) {
	t.Parallel()
	const (
		yes    = codes.Unimplemented // reached
		no     = codes.PermissionDenied
		nobody = codes.Unauthenticated
	)
	strict, lax := open(t, false), open(t, true)
	for name, test := range map[string]struct {
		cc                           *grpc.ClientConn
		build, fleet, tokens, attach codes.Code
	}{
		"the admin socket":            {dial(t, strict.admin, insecure.NewCredentials()), yes, yes, codes.OK, codes.Unknown},
		"plaintext where it may be":   {dial(t, lax.tcp, insecure.NewCredentials()), yes, yes, no, codes.Unknown},
		"no certificate":              {dial(t, strict.tcp, credentials.NewTLS(strict.anonymous(t))), nobody, nobody, nobody, nobody},
		"no certificate, in the open": {dial(t, lax.tcp, credentials.NewTLS(lax.anonymous(t))), nobody, nobody, nobody, nobody},
		"a client":                    {dial(t, strict.tcp, credentials.NewTLS(strict.join(t, archfarmv1.CreateTokenRequest_KIND_CLIENT, "ci"))), yes, yes, no, no},
		"an administrator":            {dial(t, strict.tcp, credentials.NewTLS(strict.join(t, archfarmv1.CreateTokenRequest_KIND_ADMIN, "ops"))), yes, yes, codes.OK, no},
		"a worker":                    {dial(t, strict.tcp, credentials.NewTLS(strict.join(t, archfarmv1.CreateTokenRequest_KIND_WORKER, "mac"))), no, no, no, codes.Unknown},
	} {
		t.Run(name, func(t *testing.T) {
			got := calls(t, test.cc)
			want := map[string]codes.Code{"health": codes.OK, "build": test.build, "fleet": test.fleet, "tokens": test.tokens, "join": codes.InvalidArgument, "attach": test.attach}
			for call, code := range want {
				if got[call] != code {
					t.Errorf("%s: %s, want %s", call, got[call], code)
				}
			}
		})
	}
}

func TestDoor_ARevokedWorkerIsShownOut(t *testing.T) {
	t.Parallel()
	h := open(t, false)
	config := h.join(t, archfarmv1.CreateTokenRequest_KIND_WORKER, "mac")
	other := h.join(t, archfarmv1.CreateTokenRequest_KIND_WORKER, "mac-2")
	attach := func(config *tls.Config) grpc.BidiStreamingClient[archfarmv1.AttachRequest, archfarmv1.AttachResponse] {
		stream, err := archfarmv1.NewAgentServiceClient(dial(t, h.tcp, credentials.NewTLS(config))).Attach(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	mine, theirs := attach(config), attach(other)
	for range 2 {
		if who := <-h.seen; who.Kind != identity.Worker {
			t.Fatalf("seen as %s", who)
		}
	}
	back, err := tunnel.Dial(t.Context(), func(ctx context.Context, a address.Address) (net.Conn, error) {
		conn, err := a.Dial(ctx)
		if err != nil {
			return nil, err
		}
		over := tls.Client(conn, config)
		return over, over.HandshakeContext(ctx)
	}, h.tcp, "a-tunnel")
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	carried := <-h.tunnels
	defer carried.Close()
	if who := carried.(interface{ Identity() identity.Identity }).Identity(); who.Name != "mac" {
		t.Errorf("the tunnel is %s's", who)
	}

	ctx := identity.NewContext(t.Context(), management)
	if _, err := h.Revoke(ctx, &archfarmv1.RevokeRequest{Kind: archfarmv1.CreateTokenRequest_KIND_WORKER, Name: "mac"}); err != nil {
		t.Fatal(err)
	}
	if _, err := mine.Recv(); err == nil {
		t.Error("its stream goes on")
	}
	if _, err := io.ReadAll(carried); err == nil {
		t.Error("its tunnel goes on")
	}
	if stream, err := archfarmv1.NewAgentServiceClient(dial(t, h.tcp, credentials.NewTLS(config))).Attach(t.Context()); err == nil {
		if _, err = stream.Recv(); err == nil {
			t.Error("it comes back")
		}
	}
	if err := theirs.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := theirs.Recv(); status.Code(err) != codes.Unknown { // EOF of the server's Recv: it went on to its end
		t.Errorf("another worker's stream ended with %v", err)
	}
}
