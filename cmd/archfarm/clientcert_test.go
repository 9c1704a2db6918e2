package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/archfarm/archfarm/coordinator/authority"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/enroll"
)

// certifier is an authority behind a Unix socket, for administrators, and TLS.
type certifier struct {
	socket, address string
}

func startCertifier(t *testing.T) certifier {
	t.Helper()
	dir, err := os.MkdirTemp("", "archfarm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := certifier{socket: filepath.Join(dir, "admin.sock"), address: tcp.Addr().String()}
	unix, err := net.Listen("unix", c.socket)
	if err != nil {
		t.Fatal(err)
	}
	a, err := authority.Open(authority.Config{Dir: dir, Name: "farm-1", Advertise: func() []string { return []string{c.address} }})
	if err != nil {
		t.Fatal(err)
	}
	serve := func(listener net.Listener, who identity.Identity, options ...grpc.ServerOption) {
		server := grpc.NewServer(append(options, grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			return handler(identity.NewContext(ctx, callerOf(ctx, who)), req)
		}))...)
		archfarmv1.RegisterAuthorityServiceServer(server, a)
		done := make(chan struct{})
		go func() { defer close(done); _ = server.Serve(listener) }() // ends with the server
		t.Cleanup(func() { server.Stop(); <-done })
	}
	t.Cleanup(func() { _ = a.Close() })
	serve(unix, identity.Identity{Socket: true})
	serve(tcp, identity.Identity{Kind: identity.Anonymous}, grpc.Creds(certifiedCreds{credentials.NewTLS(a.ServerTLS())}))
	return c
}

func callerOf(ctx context.Context, who identity.Identity) identity.Identity {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(certifiedInfo); ok && info.Certificate() != nil {
			who, _ = identity.Of(info.Certificate())
		}
	}
	return who
}

type certifiedCreds struct {
	credentials.TransportCredentials
}

func (c certifiedCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	return conn, certifiedInfo{info.(credentials.TLSInfo)}, nil
}

type certifiedInfo struct{ credentials.TLSInfo }

func (i certifiedInfo) Certificate() *x509.Certificate {
	if len(i.State.PeerCertificates) == 0 {
		return nil
	}
	return i.State.PeerCertificates[0]
}

// execute runs one command as the shell would, and returns what it prints on
// standard output.
func execute(t *testing.T, cmd *cobra.Command, args ...string) (string, error) {
	t.Helper()
	root := &cobra.Command{Use: "archfarm", SilenceErrors: true, SilenceUsage: true}
	root.AddCommand(cmd)
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&bytes.Buffer{})
	root.SetArgs(append([]string{cmd.Name()}, args...))
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

func TestClientCert_FromTokenToBuilderToRenewalToRevocation(t *testing.T) {
	t.Parallel()
	c, dir := startCertifier(t), filepath.Join(t.TempDir(), "it's here")
	socket := "--farm=unix://" + c.socket
	token, err := execute(t, newToken(), "create", "--client", "--name", "ci", "--pool", "office", "--tenant", "acme", socket)
	if err != nil {
		t.Fatal(err)
	}
	list, err := execute(t, newToken(), "list", socket)
	if err != nil || !strings.Contains(list, "client   ci     acme     office   1") || strings.Contains(list, strings.TrimSpace(token)) {
		t.Errorf("token list: %v\n%s", err, list)
	}
	out, err := execute(t, newClientCert(), "--token", token, "--dir", dir)
	if err != nil {
		t.Fatal(err)
	}
	quoted := strings.ReplaceAll(dir, "'", `'\''`)
	if want := "docker buildx create --name farm --driver remote --driver-opt 'cacert=" + quoted + "/ca.pem,cert=" + quoted + "/cert.pem,key=" + quoted + "/key.pem' tcp://" + c.address + "\n"; out != want {
		t.Errorf("printed\n%swant\n%s", out, want)
	}
	before, err := os.ReadFile(filepath.Join(dir, "cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	out, err = execute(t, newClientCert(), "--dir", dir, "--output", "json", "--farm", "localhost"+c.address[strings.LastIndex(c.address, ":"):])
	if err != nil {
		t.Fatal("renewing:", err)
	}
	var told clientJSON
	if err := json.Unmarshal([]byte(out), &told); err != nil || told.Identity != "spiffe://archfarm/client/ci/tenant/acme/pool/office" || told.ServerName != "" {
		t.Errorf("told %+v, %v", told, err)
	}
	if after, _ := os.ReadFile(filepath.Join(dir, "cert.pem")); bytes.Equal(before, after) {
		t.Error("the certificate was not renewed")
	}
	if _, err := execute(t, newToken(), "list", "--cert-dir", dir); err == nil || !strings.Contains(err.Error(), "client ci may not list tokens") {
		t.Errorf("over TLS, as a client: %v", err)
	}
	out, err = execute(t, newClient(), "revoke", "ci", socket)
	if err != nil || !regexp.MustCompile("^client ci: revoked, certificates that were good until now: [12]\n$").MatchString(out) {
		t.Errorf("revoked: %q, %v", out, err)
	}
	if _, err := execute(t, newClientCert(), "--dir", dir); err == nil {
		t.Error("renewed after it was revoked")
	}
}

func TestClientCert_RefusesAWorkersToken(t *testing.T) {
	t.Parallel()
	c, dir := startCertifier(t), t.TempDir()
	token, err := execute(t, newToken(), "create", "--worker", "--farm=unix://"+c.socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := execute(t, newClientCert(), "--token", token, "--dir", dir); err == nil || !strings.Contains(err.Error(), "for another kind, --worker") {
		t.Error(err)
	}
	_, err = execute(t, newClientCert(), "--dir", dir)
	if exitCode(err) != exitUsage || !strings.Contains(err.Error(), "--token") {
		t.Error(err)
	}
	if _, err = execute(t, newClientCert(), "--token", "archfarm1.AAAA", "--dir", dir); exitCode(err) != exitUsage {
		t.Error(err)
	}
}

func TestTokenDelete(t *testing.T) {
	t.Parallel()
	c := startCertifier(t)
	socket := "--farm=unix://" + c.socket
	out, err := execute(t, newToken(), "create", "--admin", "--output", "json", socket)
	if err != nil {
		t.Fatal(err)
	}
	var made tokenJSON
	if err := json.Unmarshal([]byte(out), &made); err != nil || made.Kind != "admin" || made.Token == "" {
		t.Fatalf("made %+v, %v", made, err)
	}
	if _, err := execute(t, newToken(), "delete", made.ID, socket); err != nil {
		t.Fatal(err)
	}
	if out, err := execute(t, newToken(), "list", "-o", "json", socket); err != nil || out != "[]\n" {
		t.Errorf("list: %q, %v", out, err)
	}
	if _, err := execute(t, newToken(), "delete", made.ID, socket); err == nil || !strings.Contains(err.Error(), "there is no token") {
		t.Error(err)
	}
}

func TestToken_CommandLinesThatMakeNoSense(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"create"}, {"create", "--worker", "--client"}, {"create", "--worker", "--uses", "0"}, {"create", "--worker", "-o", "xml"}, {"delete"}, {"list", "x"}, {"make"},
		{"list", "--farm", "farm.example:8372"}, {"list", "--cert-dir", "/nowhere"}, {"list", "--farm", "http://x"}} {
		if _, err := execute(t, newToken(), args...); exitCode(err) != exitUsage {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestFarm_WhoIsAskedAndHow(t *testing.T) {
	t.Parallel()
	c, dir := startCertifier(t), t.TempDir()
	token, err := execute(t, newToken(), "create", "--worker", "--farm=unix://"+c.socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := enroll.Join(t.Context(), enroll.Request{Token: token, Name: "mac", Dir: dir}); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args            []string
		address, secure string
	}{
		{[]string{"--farm", "farm.example:1", "--cert-dir", dir}, "tcp://farm.example:1", "tls"},
		{[]string{"--farm", "127.0.0.1:1", "--cert-dir", dir}, "tcp://127.0.0.1:1", "tls"},
		{[]string{"--cert-dir", dir}, "tcp://" + c.address, "tls"},
		{[]string{"--farm", "localhost:1"}, "tcp://localhost:1", "insecure"},
		{[]string{"--farm", "[::1]:1"}, "tcp://[::1]:1", "insecure"},
		{[]string{"--farm", "farm.example:1", "--insecure"}, "tcp://farm.example:1", "insecure"},
		{[]string{"--farm", "unix:///run/a.sock", "--cert-dir", dir}, "unix:///run/a.sock", "insecure"},
	} {
		cmd := &cobra.Command{}
		farmFlags(cmd.Flags())
		if err := cmd.ParseFlags(test.args); err != nil {
			t.Fatal(err)
		}
		a, creds, err := farmOf(cmd)
		if err != nil {
			t.Errorf("%q: %v", test.args, err)
			continue
		}
		if got := creds.Info().SecurityProtocol; a.String() != test.address || got != test.secure {
			t.Errorf("%q asks %s over %s; want %s over %s", test.args, a, got, test.address, test.secure)
		}
	}
}

func TestNameFor_AServerThatIsDialedByAnotherName(t *testing.T) {
	t.Parallel()
	leaf := &x509.Certificate{DNSNames: []string{"localhost", "farm-1"}, IPAddresses: []net.IP{net.ParseIP("10.0.0.5")}}
	for host, want := range map[string]string{"localhost": "", "farm-1": "", "10.0.0.5": "", "farm.example": "farm-1", "192.0.2.1": "farm-1"} {
		if got := nameFor(leaf, host); got != want {
			t.Errorf("%s: expects %q, want %q", host, got, want)
		}
	}
}
