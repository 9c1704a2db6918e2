package access_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// web is a house's HTTP port as the coordinator has it: /healthz is for all, /v1/
// tells who asks, and how. It returns host:port. Told to wait, it says so in what
// it answers before the rest comes.
func (h *house) web(t *testing.T, a address.Address, insecure bool) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })
	mux.Handle("/v1/", h.door.Identified(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/wait" {
			_, _ = io.WriteString(w, "waiting\n")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return
		}
		_, _ = io.WriteString(w, identity.FromContext(r.Context()).String()+", "+r.Proto)
		if r.TLS != nil {
			_, _ = io.WriteString(w, ", TLS")
		}
	})))
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second,
		ConnContext: h.door.ConnContext, Protocols: access.HTTPProtocols(),
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(h.door.HTTP(l, a, insecure)) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

var (
	toAll  = address.Address{Network: "tcp", Addr: "192.0.2.1:1"}
	toSelf = address.Address{Network: "tcp", Addr: "127.0.0.1:1"}
)

func get(t *testing.T, config *tls.Config, h2 bool, url string) (int, string, error) {
	t.Helper()
	var protocols http.Protocols
	protocols.SetHTTP1(!h2)
	protocols.SetHTTP2(h2)
	if config != nil {
		config = config.Clone()
		config.NextProtos = nil
	}
	transport := &http.Transport{TLSClientConfig: config, Protocols: &protocols, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

func TestHTTP_WhoIsWho(t *testing.T) {
	t.Parallel()
	h := open(t, false)
	client := h.join(t, archfarmv1.CreateTokenRequest_KIND_CLIENT, "ci")
	for name, test := range map[string]struct {
		address  address.Address
		insecure bool
		config   *tls.Config // nil: plaintext
		h2       bool
		code     int
		says     string
	}{
		"plaintext on this machine":          {toSelf, false, nil, false, http.StatusOK, "a local client, HTTP/1.1"},
		"plaintext elsewhere":                {toAll, false, nil, false, http.StatusUnauthorized, "client-cert --token"},
		"plaintext elsewhere, insecurely":    {toAll, true, nil, false, http.StatusOK, "a local client, HTTP/1.1"},
		"a certificate":                      {toAll, false, client, false, http.StatusOK, "client ci, HTTP/1.1, TLS"},
		"a certificate, HTTP/2":              {toAll, false, client, true, http.StatusOK, "client ci, HTTP/2.0, TLS"},
		"a certificate on this machine":      {toSelf, false, client, true, http.StatusOK, "client ci, HTTP/2.0, TLS"},
		"no certificate":                     {toAll, false, h.anonymous(t), true, http.StatusUnauthorized, "client-cert --token"},
		"no certificate on this machine":     {toSelf, false, h.anonymous(t), false, http.StatusUnauthorized, `"code":16`},
		"no certificate, and yet insecurely": {toSelf, true, h.anonymous(t), false, http.StatusUnauthorized, `"code":16`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			scheme := "http://"
			if test.config != nil {
				scheme = "https://"
			}
			at := scheme + h.web(t, test.address, test.insecure)
			if code, body, err := get(t, test.config, test.h2, at+"/v1/jobs"); code != test.code || !strings.Contains(body, test.says) {
				t.Errorf("%d %s, %v; want %d %s", code, body, err, test.code, test.says)
			}
			if code, body, err := get(t, test.config, test.h2, at+"/healthz"); code != http.StatusOK || body != "ok" {
				t.Errorf("health: %d %s, %v", code, body, err)
			}
		})
	}
}

func TestHTTP_ACertificateOfNobodysIsRefused(t *testing.T) {
	t.Parallel()
	h, other := open(t, false), open(t, false)
	config := other.join(t, archfarmv1.CreateTokenRequest_KIND_CLIENT, "ci")
	if code, body, err := get(t, config, false, "https://"+h.web(t, toAll, false)+"/healthz"); err == nil {
		t.Errorf("answered %d %s", code, body)
	}
}

func TestHTTP_NothingIsAnsweredInPlaintextToABrokenHandshake(t *testing.T) {
	t.Parallel()
	h := open(t, false)
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", h.web(t, toAll, false))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("\x16\x03\x01\x00\x05hello")); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(conn); err != nil || strings.Contains(string(answer), "HTTP") {
		t.Errorf("answered %q, %v", answer, err)
	}
}

func TestHTTP_ARevocationEndsWhatIsOpenAndWhatComes(t *testing.T) {
	t.Parallel()
	h := open(t, false)
	at := "https://" + h.web(t, toAll, false)
	for _, h2 := range []bool{false, true} {
		name := map[bool]string{false: "one", true: "two"}[h2]
		config := h.join(t, archfarmv1.CreateTokenRequest_KIND_CLIENT, name)
		config.NextProtos = nil
		var protocols http.Protocols
		protocols.SetHTTP1(!h2)
		protocols.SetHTTP2(h2)
		transport := &http.Transport{TLSClientConfig: config, Protocols: &protocols}
		client := &http.Client{Transport: transport}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, at+"/v1/wait", nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		ctx := identity.NewContext(t.Context(), management)
		if _, err := h.Revoke(ctx, &archfarmv1.RevokeRequest{Kind: archfarmv1.CreateTokenRequest_KIND_CLIENT, Name: name}); err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(response.Body); err == nil {
			t.Errorf("HTTP/2 %t: its answer goes on to %q", h2, body)
		}
		_ = response.Body.Close()
		if code, body, err := get(t, config, h2, at+"/v1/jobs"); err == nil {
			t.Errorf("HTTP/2 %t: it comes back: %d %s", h2, code, body)
		}
		transport.CloseIdleConnections()
	}
}

// The files are those of archfarm client-cert.
func TestHTTP_Curl(t *testing.T) {
	t.Parallel()
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("curl is not installed")
	}
	h := open(t, false)
	config := h.join(t, archfarmv1.CreateTokenRequest_KIND_CLIENT, "ci")
	dir := t.TempDir()
	write := func(name, kind string, ders ...[]byte) {
		var all []byte
		for _, der := range ders {
			all = append(all, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
		}
		if err := os.WriteFile(filepath.Join(dir, name), all, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	key, err := x509.MarshalPKCS8PrivateKey(config.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	write("ca.pem", "CERTIFICATE", h.Roots()...)
	write("cert.pem", "CERTIFICATE", config.Certificates[0].Certificate...)
	write("key.pem", "PRIVATE KEY", key)
	_, port, err := net.SplitHostPort(h.web(t, toAll, false))
	if err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, curl, append([]string{"--silent", "--show-error", "--noproxy", "*", "--cacert", "ca.pem", "--resolve", "farm:" + port + ":127.0.0.1"}, args...)...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		return string(out)
	}
	at := "https://farm:" + port + "/v1/jobs"
	for want, args := range map[string][]string{
		"client ci, HTTP/2.0, TLS": {"--cert", "cert.pem", "--key", "key.pem", at},
		"client ci, HTTP/1.1, TLS": {"--http1.1", "--cert", "cert.pem", "--key", "key.pem", at},
		access.HTTPAdvice:          {at},
	} {
		if got := run(args...); !strings.Contains(got, want) {
			t.Errorf("%v: %s", args, got)
		}
	}
}
