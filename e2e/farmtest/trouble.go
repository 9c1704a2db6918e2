package farmtest

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
)

// Trouble sees each request to a registry before the registry does. It answers it, in any way that HTTP allows or does
// not, or calls pass, which has the registry answer; with another writer than w, nobody else hears of the answer.
type Trouble func(w http.ResponseWriter, r *http.Request, pass func(http.ResponseWriter))

// Behind is the same registry by another name, for which every request meets the trouble first. What the returned one
// reads itself (Tags, Index, …) goes past it.
func (r *Registry) Behind(t T, trouble Trouble) *Registry {
	t.Helper()
	proxy := &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(&url.URL{Scheme: "http", Host: r.direct})
			p.Out.Host = p.In.Host // in the addresses that it answers with
		},
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // a client that gave up is no news
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		trouble(w, req, func(w http.ResponseWriter) { proxy.ServeHTTP(w, req) })
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	front := *r
	front.Host = strings.Replace(strings.TrimPrefix(server.URL, "http://"), "127.0.0.1", "localhost", 1)
	return &front
}

// Refuse answers as registries do, with a status and words of their own.
func Refuse(w http.ResponseWriter, status int, code, words string) {
	if status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Basic realm="farmtest"`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, `{"errors":[{"code":"`+code+`","message":"`+words+`"}]}`)
}

// Swallow has the registry answer, and cuts the connection instead of passing the answer on.
func Swallow(w http.ResponseWriter, pass func(http.ResponseWriter)) {
	pass(httptest.NewRecorder())
	Cut(w)
}

// Cut ends the connection of a request that has not been answered.
func Cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		_ = conn.Close()
	}
}

// Put writes a manifest under a tag, as somebody who knows nothing of a farm.
func (r *Registry) Put(t T, repo, tag string, index Index) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPut, "http://"+r.direct+"/v2/"+repo+"/manifests/"+tag, strings.NewReader(string(index.Raw)))
	if err != nil {
		t.Fatalf("registry: PUT %s:%s: %v", repo, tag, err)
	}
	req.Header.Set("Content-Type", index.MediaType)
	resp, err := r.http.Do(req)
	if err != nil {
		t.Fatalf("registry: PUT %s:%s: %v", repo, tag, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("registry: PUT %s:%s: %s", repo, tag, resp.Status)
	}
}
