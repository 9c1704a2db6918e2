package farmtest

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strings"

	"golang.org/x/crypto/bcrypt"
)

// RegistryOptions say what kind of registry to start; the zero value is an open one.
type RegistryOptions struct {
	// User and Password, when set, are what every request must carry.
	User, Password string
	// Fault, when set, sees every request first and answers it with the status it returns, unless that is 0.
	Fault func(*http.Request) int
}

// Registry is a running registry, and a reader of what is in it.
type Registry struct {
	*Process
	// Host is the registry's name in references: localhost:PORT, which BuildKit speaks plain HTTP to.
	Host string

	options RegistryOptions
	direct  string // host:port behind the fault injection
	http    *http.Client
}

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)

// StartRegistry starts a registry that keeps its content in memory.
func StartRegistry(t T, tools Tools, options RegistryOptions) *Registry {
	t.Helper()
	dir := Folder(t)
	config := "version: 0.1\nlog: {level: info}\nstorage:\n  inmemory: {}\n  delete: {enabled: true}\n" +
		"http:\n  addr: 127.0.0.1:0\n  relativeurls: true\n"
	if options.User != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(options.Password), bcrypt.MinCost)
		if err != nil {
			t.Fatalf("hashing the registry's password: %v", err)
		}
		file := WriteFile(t, dir, "htpasswd", options.User+":"+string(hash)+"\n")
		config += "auth:\n  htpasswd: {realm: farmtest, path: " + file + "}\n"
	}
	process := StartProcess(t, Spec{
		Name: "registry",
		Path: tools.Registry,
		Args: []string{"serve", WriteFile(t, dir, "registry.yml", config)},
		Env:  []string{"OTEL_TRACES_EXPORTER=none"},
	})
	direct := process.WaitOutput(t, startLimit, "listening", func(output string) string {
		if m := listening.FindStringSubmatch(output); m != nil {
			return m[1]
		}
		return ""
	})
	r := &Registry{Process: process, options: options, direct: direct, http: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	front := direct
	if options.Fault != nil {
		front = startFaults(t, direct, options.Fault)
	}
	_, port, err := net.SplitHostPort(front)
	if err != nil {
		t.Fatalf("reading the registry's address: %v", err)
	}
	r.Host = "localhost:" + port
	return r
}

// FaultMessage is the reason that a registry with a Fault gives.
const FaultMessage = "fault injected by the test"

// startFaults puts a proxy in front of the registry that answers some requests itself.
func startFaults(t T, direct string, fault func(*http.Request) int) string {
	proxy := &httputil.ReverseProxy{
		Rewrite:  func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: direct}) },
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // a client that gave up is no news
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		status := fault(r)
		if status == 0 {
			proxy.ServeHTTP(w, r)
			return
		}
		if status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", `Basic realm="farmtest"`)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"errors":[{"code":"FAULT","message":%q}]}`, FaultMessage)
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return strings.TrimPrefix(server.URL, "http://")
}

// PutsTag reports whether a request writes a manifest under a tag rather than under its digest.
func PutsTag(r *http.Request) bool {
	_, reference, ok := strings.Cut(r.URL.Path, "/manifests/")
	return ok && r.Method == http.MethodPut && !strings.Contains(reference, ":")
}
