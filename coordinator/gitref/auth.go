package gitref

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"strings"
	"unicode"
)

// The secrets by which BuildKit authenticates to git servers; each may have a host
// appended ("GIT_AUTH_TOKEN.git.example.com"), and is for that host only then.
const (
	TokenSecret  = "GIT_AUTH_TOKEN"
	HeaderSecret = "GIT_AUTH_HEADER"
)

// Auth authenticates to a git server over HTTP. The zero value does not. It does not
// show when printed.
type Auth struct{ header string }

// String tells whether there is something to authenticate with.
func (a Auth) String() string {
	if a.header == "" {
		return "no credentials"
	}
	return "credentials (not shown)"
}

// GoString is String.
func (a Auth) GoString() string { return a.String() }

// AuthSecret tells whether a secret of this id authenticates to git servers.
func AuthSecret(id string) bool {
	return id == TokenSecret || id == HeaderSecret || strings.HasPrefix(id, TokenSecret+".") || strings.HasPrefix(id, HeaderSecret+".")
}

// CheckAuth tells why the value of such a secret cannot be used, without showing it.
func CheckAuth(id string, value []byte) error {
	if len(value) == 0 {
		return fmt.Errorf("%s is empty", id)
	}
	if strings.ContainsFunc(string(value), unicode.IsControl) {
		return fmt.Errorf("%s contains a line break or another control character: send it without (a file's last line break counts)", id)
	}
	if len(value) > 16<<10 {
		return fmt.Errorf("%s is %d bytes long, at most %d are possible", id, len(value), 16<<10)
	}
	return nil
}

// AuthFor chooses among a job's secrets as BuildKit does: the host's own header, its
// token, then the header and token for any host.
func AuthFor(repository string, secrets map[string][]byte) (Auth, error) {
	u, err := url.Parse(repository)
	if err != nil {
		return Auth{}, fmt.Errorf("choosing credentials: the repository's URL is malformed")
	}
	for _, id := range []string{HeaderSecret + "." + u.Host, TokenSecret + "." + u.Host, HeaderSecret, TokenSecret} {
		value, ok := secrets[id]
		if !ok {
			continue
		}
		if err := CheckAuth(id, value); err != nil {
			return Auth{}, fmt.Errorf("choosing credentials: the secret %w", err)
		}
		header := string(value)
		if strings.HasPrefix(id, TokenSecret) {
			header = "basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+header))
		}
		return Auth{header: header}, nil
	}
	return Auth{}, nil
}
