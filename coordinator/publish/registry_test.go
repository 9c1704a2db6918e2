package publish

import (
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
)

// registry is the part of the distribution specification that a push of one
// manifest needs.
type registry struct {
	// user and password, when set, are asked for: by basic authentication, or by
	// that of a token server when bearer is set.
	user, password string
	bearer         bool
	// answer, when set, may answer a request itself.
	answer func(w http.ResponseWriter, r *http.Request) bool

	mu        sync.Mutex
	manifests map[string][]byte // by repository and tag or digest
	types     map[string]string
	requests  []string
	host      string
}

// serve starts the registry; its name for references is returned.
func (g *registry) serve(t *testing.T) string {
	t.Helper()
	server := httptest.NewServer(g)
	t.Cleanup(server.Close)
	g.host = server.Listener.Addr().String()
	return g.host
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.requests = append(g.requests, r.Method+" "+r.URL.Path)
	switch {
	case g.answer != nil && g.answer(w, r):
	case r.URL.Path == "/token":
		g.token(w, r)
	case !g.allowed(r):
		challenge := `Basic realm="registry"`
		if g.bearer {
			challenge = fmt.Sprintf(`Bearer realm="http://%s/token",service="registry",scope="repository:app:pull,push"`, g.host)
		}
		w.Header().Set("WWW-Authenticate", challenge)
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	default:
		g.manifest(w, r)
	}
}

func (g *registry) allowed(r *http.Request) bool {
	switch {
	case g.user == "":
		return true
	case g.bearer:
		return r.Header.Get("Authorization") == "Bearer a-token"
	}
	return g.knows(r)
}

func (g *registry) knows(r *http.Request) bool {
	user, password, ok := r.BasicAuth()
	return ok && user == g.user && password == g.password
}

func (g *registry) token(w http.ResponseWriter, r *http.Request) {
	if !g.knows(r) {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "who are you")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, `{"token":"a-token","expires_in":300}`)
}

func refuse(w http.ResponseWriter, code int, name, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, name, message)
}

func (g *registry) manifest(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v2/")
	repo, object, ok := strings.Cut(path, "/manifests/")
	if !ok {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN", "no such thing")
		return
	}
	if r.Method == http.MethodPut {
		g.put(w, r, repo, object)
		return
	}
	blob, ok := g.manifests[repo+"/"+object]
	if !ok {
		refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "no such manifest")
		return
	}
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(blob).String())
	w.Header().Set("Content-Type", g.types[repo+"/"+object])
	if r.Method == http.MethodGet {
		_, _ = w.Write(blob)
	}
}

func (g *registry) put(w http.ResponseWriter, r *http.Request, repo, object string) {
	blob, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 4<<20))
	if err != nil {
		refuse(w, http.StatusBadRequest, "MANIFEST_INVALID", err.Error())
		return
	}
	if g.manifests == nil {
		g.manifests, g.types = map[string][]byte{}, map[string]string{}
	}
	sum := digest.FromBytes(blob).String()
	for _, name := range []string{object, sum} {
		g.manifests[repo+"/"+name], g.types[repo+"/"+name] = blob, r.Header.Get("Content-Type")
	}
	w.Header().Set("Docker-Content-Digest", sum)
	w.WriteHeader(http.StatusCreated)
}

// holds returns what is at a repository and tag or digest.
func (g *registry) holds(name string) (blob []byte, mediaType string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.manifests[name], g.types[name]
}

// count tells how many requests there were of a method.
func (g *registry) count(method string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(slices.Collect(func(yield func(string) bool) {
		for _, r := range g.requests {
			if strings.HasPrefix(r, method+" ") && !yield(r) {
				return
			}
		}
	}))
}

// secrets are all the forms in which a password travels.
func (g *registry) secrets() []string {
	return []string{g.password, base64.StdEncoding.EncodeToString([]byte(g.user + ":" + g.password)), "a-token"}
}
