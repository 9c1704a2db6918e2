package publish

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// maxRefusal bounds how much of a refusal is read, in bytes.
const maxRefusal = 64 << 10

// redacted stands where a secret was.
const redacted = "***"

// scrubbed are hosts whose refusals do not repeat the credentials they were sent,
// as some do; neither errors nor logs can then.
func scrubbed(reach docker.RegistryHosts) docker.RegistryHosts {
	return func(domain string) ([]docker.RegistryHost, error) {
		known, err := reach(domain)
		if err != nil {
			return nil, err
		}
		known = slices.Clone(known)
		for i, h := range known {
			client := http.Client{}
			if h.Client != nil {
				client = *h.Client
			}
			if client.Transport == nil {
				client.Transport = http.DefaultTransport
			}
			client.Transport = scrubber{client.Transport}
			client.CheckRedirect = redirect
			known[i].Client = &client
		}
		return known, nil
	}
}

// redirect keeps credentials, which net/http sends to the same host again, from
// leaving in the clear.
func redirect(to *http.Request, via []*http.Request) error {
	switch first := via[0].URL; {
	case len(via) >= 10:
		return fmt.Errorf("redirected %d times", len(via))
	case first.Scheme == "https" && to.URL.Scheme != "https":
		return fmt.Errorf("redirected from https to %s", to.URL.Scheme)
	}
	return nil
}

type scrubber struct{ next http.RoundTripper }

func (s scrubber) RoundTrip(r *http.Request) (*http.Response, error) {
	secrets := sent(r) // before the transport has the request
	resp, err := s.next.RoundTrip(r)
	if err != nil || resp.StatusCode < http.StatusBadRequest {
		return resp, err
	}
	resp.Status = fmt.Sprintf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode)) // not the server's words
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxRefusal))
	resp.Body.Close()
	resp.Body = io.NopCloser(io.MultiReader(strings.NewReader(redact(string(body), secrets)), ends{err}))
	resp.ContentLength = -1
	return resp, nil
}

// ends is the rest of a body: how reading it ended.
type ends struct{ err error }

func (f ends) Read([]byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	return 0, io.EOF
}

// sent are the secrets of a request, in every form an answer may repeat them in.
func sent(r *http.Request) (out []string) {
	if user, password, ok := r.BasicAuth(); ok {
		out = forms(user, password)
	} else if _, token, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok {
		out = forms("", token)
	}
	if password, ok := r.URL.User.Password(); ok {
		out = append(out, forms(r.URL.User.Username(), password)...)
	}
	if r.GetBody == nil || r.Header.Get("Content-Type") == "" || !strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded") {
		return out
	}
	body, err := r.GetBody() // the form that asks for a token
	if err != nil {
		return out
	}
	defer body.Close()
	var raw bytes.Buffer
	_, _ = io.Copy(&raw, io.LimitReader(body, maxRefusal))
	form, _ := url.ParseQuery(raw.String())
	for _, key := range []string{"password", "refresh_token"} {
		out = append(out, forms(form.Get("username"), form.Get(key))...)
	}
	return out
}

func forms(user, secret string) []string {
	if secret == "" {
		return nil
	}
	escaped, _ := json.Marshal(secret)
	both := user + ":" + secret
	return []string{
		base64.StdEncoding.EncodeToString([]byte(both)), base64.RawStdEncoding.EncodeToString([]byte(both)), base64.URLEncoding.EncodeToString([]byte(both)),
		url.QueryEscape(secret), url.PathEscape(secret), unquoted(string(escaped)), unquoted(strconv.Quote(secret)), secret,
	}
}

func unquoted(s string) string { return s[1 : len(s)-1] }

func redact(text string, secrets []string) string {
	for _, s := range secrets {
		text = strings.ReplaceAll(text, s, redacted)
	}
	return text
}

var (
	userinfo = regexp.MustCompile(`://[^\s/"?#]*@`)
	query    = regexp.MustCompile(`(https?://[^\s"?]*)\?[^\s"]*`)
)

// bare takes out of addresses in a text what may grant something: userinfo, and
// queries, which of redirects are signed.
func bare(text string) string {
	return query.ReplaceAllString(userinfo.ReplaceAllString(text, "://"), "$1?"+redacted)
}
