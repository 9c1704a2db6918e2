package gitref

import (
	"cmp"
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	maxReason = 200
	// serverSaid begins what git repeats of a server's words.
	serverSaid = "remote error: "
)

// reasons are how git and curl say why something did not work; the first that fits
// is taken. Tested with git 2.39 and later.
var reasons = []struct {
	texts  []string
	code   codes.Code
	advice string
}{
	{[]string{"Authentication failed", "could not read Username", "could not read Password", "terminal prompts disabled", "returned error: 401"}, codes.PermissionDenied, ""},
	{[]string{"returned error: 403"}, codes.PermissionDenied, "the server refuses it: check that the secret GIT_AUTH_TOKEN may read the repository"},
	{[]string{"returned error: 301", "returned error: 302", "returned error: 307", "returned error: 308", "unable to update url base from redirection"}, codes.InvalidArgument,
		"the server redirects elsewhere, where credentials are not sent: give the URL that it redirects to (often the one that ends in .git, or has the repository's new name)"},
	{[]string{"not allowed", "Protocol \""}, codes.InvalidArgument, "the server redirects to a protocol that is not taken"},
	{[]string{"not our ref", "unadvertised object", "couldn't find remote ref", "no such remote ref", "did not send all necessary objects"}, codes.NotFound,
		"there is no such commit that the server hands out: push it, or give a branch or tag"},
	{[]string{"repository not found", "not found", "returned error: 404", "returned error: 410", "does not exist", "not exported"}, codes.NotFound, ""},
	{[]string{"is this a git repository", "not valid:", "protocol error", "bad line length", "mismatched algorithms"}, codes.InvalidArgument, "it does not speak as a git repository does"},
	{[]string{"Out of memory", "malloc"}, codes.ResourceExhausted, "it is too large to look at here"},
	{[]string{"certificate", "SSL"}, codes.FailedPrecondition, "its certificate is not trusted where the coordinator runs: add the CA there (ca-certificates, or GIT_SSL_CAINFO)"},
}

// explain makes an error of what git said. What the server said is left out: whoever
// submits a job could have the coordinator read its neighbours.
func (c *cli) explain(doing string, err error, stderr string) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && fileLimit(exit, stderr) {
		return errTooLarge
	}
	said := fatal(stderr)
	shown := said
	if strings.HasPrefix(said, serverSaid) {
		shown = serverSaid + "…"
	}
	for _, r := range reasons {
		for _, text := range r.texts {
			if !strings.Contains(strings.ToLower(said), strings.ToLower(text)) {
				continue
			}
			advice := r.advice
			if advice == "" {
				advice = c.credentials(r.code)
			}
			return status.Errorf(r.code, "%s (git: %s)", advice, shown)
		}
	}
	return status.Errorf(codes.Unavailable, "git %s: %s", doing, cmp.Or(shown, err.Error()))
}

// credentials is what to do when the server wants some, or denies that there is
// anything.
func (c *cli) credentials(code codes.Code) string {
	switch {
	case code == codes.NotFound && !c.auth:
		return "there is no such repository, or it is private: check the URL, or send the secret GIT_AUTH_TOKEN"
	case code == codes.NotFound:
		return "there is no such repository, or the credentials that came with the job may not see it"
	case c.auth:
		return "the server refuses the credentials that came with the job (GIT_AUTH_TOKEN, GIT_AUTH_HEADER)"
	}
	return "the server wants credentials: send the secret GIT_AUTH_TOKEN with the job"
}

// fileLimit tells whether git or what it started wrote too large a file. Of an
// index-pack that the system ended, git tells that it said nothing.
func fileLimit(exit *exec.ExitError, stderr string) bool {
	ws, ok := exit.Sys().(syscall.WaitStatus)
	return ok && ws.Signaled() && ws.Signal() == syscall.SIGXFSZ ||
		strings.Contains(stderr, "File too large") || strings.Contains(stderr, "died of signal 25") ||
		strings.Contains(stderr, "invalid index-pack output") && strings.Count(stderr, "fatal: ") == 1
}

// fatal is the last line in which git itself says what is wrong, bounded, on one
// line.
func fatal(stderr string) string {
	var last string
	for line := range strings.Lines(stderr) {
		for _, prefix := range []string{"fatal: ", "error: "} {
			if rest, ok := strings.CutPrefix(line, prefix); ok && (last == "" || prefix == "fatal: " || telling(rest)) {
				last = rest
			}
		}
	}
	last = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, strings.TrimSpace(last))
	if len(last) > maxReason {
		last = strings.ToValidUTF8(last[:maxReason], "") + "…"
	}
	return last
}

// telling tells whether an error says more than that the remote end hung up.
func telling(line string) bool {
	return strings.Contains(line, "not our ref") || strings.Contains(line, "unadvertised")
}
