package tunnel

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/address"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// secured is a Listener whose clients may use TLS, or must.
func secured(t *testing.T, required bool) (*farm, *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"farm"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	server := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}
	security := Security{Required: required, Advice: "use TLS: cacert, cert and key", TLS: func(conn net.Conn) (net.Conn, error) {
		secure := tls.Server(conn, server)
		return secure, secure.Handshake()
	}}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &farm{addr: address.Address{Network: "tcp", Addr: inner.Addr().String()}, tunnels: make(chan opened, 64)}
	f.Listener = newListener(inner, security, func(id string, conn net.Conn) { f.tunnels <- opened{id, conn} }, slog.New(slog.DiscardHandler), 10, time.Minute)
	t.Cleanup(func() { _ = f.Close() })
	return f, &tls.Config{RootCAs: roots, ServerName: "farm", MinVersion: tls.VersionTLS13}
}

func overTLS(config *tls.Config) Dialer {
	return func(ctx context.Context, addr address.Address) (net.Conn, error) {
		conn, err := addr.Dial(ctx)
		if err != nil {
			return nil, err
		}
		secure := tls.Client(conn, config)
		return secure, secure.HandshakeContext(ctx)
	}
}

func TestSecurity_TunnelsAndOthersInTLS(t *testing.T) {
	t.Parallel()
	f, client := secured(t, true)
	agent, err := Dial(t.Context(), overTLS(client), f.addr, "in-tls")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	if _, err := agent.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	o := <-f.tunnels
	defer o.conn.Close()
	got := make([]byte, 4)
	if _, err := io.ReadFull(o.conn, got); err != nil || o.id != "in-tls" || string(got) != "ping" {
		t.Errorf("tunnel %q carried %q, %v", o.id, got, err)
	}
	ask(t, f, credentials.NewTLS(client), "")
}

func TestSecurity_PlaintextBesideTLS(t *testing.T) {
	t.Parallel()
	f, client := secured(t, false)
	agent, err := Dial(t.Context(), Plain, f.addr, "plain")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	o := <-f.tunnels
	if _, ok := o.conn.(*net.TCPConn); !ok || o.id != "plain" {
		t.Errorf("tunnel %q is a %T, which cannot be spliced", o.id, o.conn)
	}
	o.conn.Close()
	ask(t, f, insecure.NewCredentials(), "")
	ask(t, f, credentials.NewTLS(client), "")
}

func TestSecurity_APlaintextClientIsToldWhatToDo(t *testing.T) {
	t.Parallel()
	f, _ := secured(t, true)
	ask(t, f, insecure.NewCredentials(), "use TLS: cacert, cert and key")
	agent, err := Dial(t.Context(), Plain, f.addr, "plain")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	if answer, _ := io.ReadAll(agent); !strings.HasSuffix(string(answer), "use TLS: cacert, cert and key") {
		t.Errorf("a tunnel in plaintext was answered %q", answer)
	}
	select {
	case o := <-f.tunnels:
		t.Errorf("tunnel %q was accepted in plaintext", o.id)
	default:
	}
}

// ask makes a call, which has to succeed, or to fail with these words.
func ask(t *testing.T, f *farm, creds credentials.TransportCredentials, words string) {
	t.Helper()
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, health.NewServer())
	served := make(chan struct{})
	pipe := &handOver{Listener: f.Listener, done: make(chan struct{})}
	go func() { defer close(served); _ = server.Serve(pipe) }()
	defer func() { server.Stop(); <-served }()
	cc, err := grpc.NewClient(f.addr.Addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	_, err = healthpb.NewHealthClient(cc).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if words == "" && err != nil || words != "" && (err == nil || !strings.Contains(err.Error(), words)) {
		t.Errorf("answered with %v, want %q", err, words)
	}
}

// handOver lets a server stop without closing the listener.
type handOver struct {
	*Listener
	done chan struct{}
}

func (h *handOver) Accept() (net.Conn, error) {
	select {
	case conn := <-h.others:
		return conn, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handOver) Close() error { close(h.done); return nil }
