package publish

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/moby/buildkit/util/bklog"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"

	"github.com/archfarm/archfarm/manifest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func login(host, user, password string) []*archfarmv1.RegistryCredential {
	return []*archfarmv1.RegistryCredential{{Host: host, Username: user, Password: password}}
}

func TestCredentials_HostsAsDockerNamesThem(t *testing.T) {
	t.Parallel()
	g := newGiven([]*archfarmv1.RegistryCredential{
		{Host: "https://index.docker.io/v1/", Username: "hub", Password: "1"},
		{Host: "https://Registry.example:5000/v2/", Username: "r", Password: "2"},
		{Host: "ghcr.example", Username: "ignored", IdentityToken: "3"},
	})
	for host, want := range map[string]credential{
		"registry-1.docker.io":  {"hub", "1"},
		"docker.io":             {"hub", "1"},
		"registry.example:5000": {"r", "2"},
		"registry.example":      {},
		"ghcr.example":          {"", "3"},
		"evil.example":          {},
	} {
		if user, secret, err := g.of(host); err != nil || (credential{user, secret}) != want {
			t.Errorf("%s: %s %s, %v", host, user, secret, err)
		}
	}
}

func TestCredentials_PushResolveAndFetch(t *testing.T) {
	t.Parallel()
	for name, bearer := range map[string]bool{"basic": false, "token": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := &registry{user: "anna", password: "a secret", bearer: bearer}
			host, content := g.serve(t), index(name)
			r := WithCredentials(login("http://"+host+"/v2/", g.user, g.password), false)
			if _, err := r.Resolve(t.Context(), host+"/app:v1"); err == nil {
				t.Error("there is something")
			} else {
				wantStatus(t, err, codes.NotFound, "app:v1")
			}
			if err := r.Push(t.Context(), host+"/app:v1", false, content); err != nil {
				t.Fatal(err)
			}
			found, err := r.Resolve(t.Context(), host+"/app:v1")
			if err != nil || found.Digest != content.Descriptor.Digest || found.MediaType != content.Descriptor.MediaType {
				t.Errorf("%+v, %v", found, err)
			}
			got, err := r.Fetch(t.Context(), host+"/app", content.Descriptor)
			if err != nil || !bytes.Equal(got.Blob, content.Blob) {
				t.Errorf("%q, %v", got.Blob, err)
			}
			_, err = anybody().Resolve(t.Context(), host+"/app:v1")
			wantStatus(t, err, codes.PermissionDenied)
		})
	}
}

func TestCredentials_IdentityTokenIsExchanged(t *testing.T) {
	t.Parallel()
	g := &registry{user: "nobody", password: "unused", bearer: true}
	g.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/token" || r.Method != http.MethodPost {
			return false
		}
		if r.FormValue("grant_type") != "refresh_token" || r.FormValue("refresh_token") != "an-identity" {
			refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "who are you")
			return true
		}
		_, _ = io.WriteString(w, `{"access_token":"a-token","expires_in":300}`)
		return true
	}
	host := g.serve(t)
	r := WithCredentials([]*archfarmv1.RegistryCredential{{Host: host, IdentityToken: "an-identity"}}, false)
	if err := r.Push(t.Context(), host+"/app:v1", false, index("x")); err != nil {
		t.Fatal(err)
	}
}

func TestCredentials_TokenServerThatFailedOnceIsAskedAgain(t *testing.T) {
	t.Parallel()
	g, failures := &registry{user: "anna", password: "a secret", bearer: true}, 2
	g.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/token" || failures == 0 {
			return false
		}
		failures--
		refuse(w, http.StatusServiceUnavailable, "UNAVAILABLE", "on fire")
		return true
	}
	host := g.serve(t)
	if err := WithCredentials(login(host, g.user, g.password), false).Push(t.Context(), host+"/app:v1", false, index("x")); err != nil {
		t.Fatal(err)
	}
}

func TestFetch_OnlyWhatWasAskedFor(t *testing.T) {
	t.Parallel()
	content := index("x")
	for name, test := range map[string]struct {
		change func(*Content)
		answer string
		code   codes.Code
	}{
		"another manifest": {answer: "something else", code: codes.DataLoss},
		"another size":     {change: func(c *Content) { c.Descriptor.Size++ }, code: codes.DataLoss},
		"too large":        {answer: strings.Repeat("x", manifest.MaxBlob+2), code: codes.Unknown},
		"to be too large":  {change: func(c *Content) { c.Descriptor.Size = manifest.MaxBlob + 1 }, code: codes.InvalidArgument},
		"no digest":        {change: func(c *Content) { c.Descriptor.Digest = "sha256:short" }, code: codes.InvalidArgument},
		"not there":        {change: func(c *Content) { c.Descriptor.Digest = digest.FromString("y") }, code: codes.NotFound},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := &registry{}
			host, wanted := g.serve(t), content
			if err := anybody().Push(t.Context(), host+"/app", true, content); err != nil {
				t.Fatal(err)
			}
			g.mu.Lock()
			g.answer = func(w http.ResponseWriter, _ *http.Request) bool {
				if test.answer != "" {
					_, _ = io.WriteString(w, test.answer)
				}
				return test.answer != ""
			}
			g.mu.Unlock()
			if test.change != nil {
				test.change(&wanted)
			}
			_, err := anybody().Fetch(t.Context(), host+"/app", wanted.Descriptor)
			wantStatus(t, err, test.code)
		})
	}
}

// echoes repeats everything that a request says, as careless servers do.
func echoes(w http.ResponseWriter, r *http.Request, code int) {
	body, _ := io.ReadAll(r.Body)
	user, password, _ := r.BasicAuth()
	form, _ := url.ParseQuery(string(body))
	w.WriteHeader(code)
	_, _ = fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":%q,"detail":%q}]}`,
		"no, "+r.Header.Get("Authorization")+" "+user+" "+password, string(body)+" "+form.Get("password")+" "+form.Get("refresh_token"))
}

// record is what sessions log while they end, too.
type record struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

// Not parallel: it listens to what the whole process logs.
func TestCredentials_AreNeitherSaidNorLogged(t *testing.T) {
	var logged record
	logger := bklog.L.Logger
	before, level := logger.Out, logger.GetLevel()
	logger.SetOutput(&logged)
	logger.SetLevel(everything)
	defer func() { logger.SetOutput(before); logger.SetLevel(level) }()

	const user, password, signature = "anna", `correct "horse" & battery+staple`, "a-signature"
	var g *registry
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"the token server echoes": func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/token" {
				echoes(w, r, http.StatusUnauthorized)
			}
			return r.URL.Path == "/token"
		},
		"the registry echoes": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Authorization") != "" && r.URL.Path != "/token" {
				echoes(w, r, http.StatusBadRequest)
				return true
			}
			return false
		},
		"redirected with credentials": func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/elsewhere" {
				refuse(w, http.StatusTeapot, "NO", "not here")
				return true
			}
			w.Header().Set("Location", "http://anna:"+url.QueryEscape(password)+"@"+g.host+"/elsewhere?sig="+signature)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		},
		"redirected to nowhere": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Location", "http://anna:"+url.QueryEscape(password)+"@127.0.0.1:1/x?sig="+signature)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		},
		"redirected to nonsense": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Location", "http://anna:"+url.QueryEscape(password)+"@[::bad?sig="+signature)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		},
	} {
		for _, bearer := range []bool{false, true} {
			for _, given := range []bool{false, true} {
				g = &registry{user: user, password: password, bearer: bearer, answer: answer}
				host := g.serve(t)
				r := (&client{user: user, password: password}).open(t)
				if given {
					r = WithCredentials(login(host, user, password), false)
				}
				err := r.Push(t.Context(), host+"/app:v1", false, index("x"))
				if _, fetched := r.Fetch(t.Context(), host+"/app", index("x").Descriptor); err == nil {
					err = fetched
				}
				if err == nil {
					if name == "the token server echoes" && !bearer {
						continue // it has none
					}
					t.Errorf("%s: no error", name)
					continue
				}
				for _, secret := range append(g.secrets(), url.QueryEscape(password), url.PathEscape(password), base64.StdEncoding.EncodeToString([]byte(user+":"+password)), "battery", signature) {
					if strings.Contains(err.Error(), secret) {
						t.Errorf("%s: the error tells %q: %v", name, secret, err)
					}
					if strings.Contains(logged.String(), secret) {
						t.Errorf("%s: the log tells %q:\n%s", name, secret, logged.String())
					}
				}
			}
		}
	}
}

func TestCredentials_NotSentInTheClearAfterARedirect(t *testing.T) {
	t.Parallel()
	reached := false
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	t.Cleanup(plain.Close)
	safe := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL+"/x", http.StatusTemporaryRedirect)
	}))
	t.Cleanup(safe.Close)
	host := safe.Listener.Addr().String()
	err := WithCredentials(login(host, "a", "b"), true).Push(t.Context(), host+"/app:v1", false, index("x"))
	if err == nil || reached || !strings.Contains(err.Error(), "redirected from https to http") {
		t.Errorf("%v, reached: %t", err, reached)
	}
}
