package gitref

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"unicode"
)

const (
	maxURL = 2 << 10
	maxRef = 512
)

var (
	hostForm = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\.?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)
	scpForm  = regexp.MustCompile(`^([A-Za-z0-9._-]+@)?([A-Za-z0-9.-]+):([^/:].*)$`)
	objectID = regexp.MustCompile(`^([0-9a-fA-F]{40}|[0-9a-fA-F]{64})$`)
)

// CheckURL tells what is wrong with the URL of a repository that a coordinator is to
// read: only https, http and git URLs of a host and a path are taken, without
// credentials. Errors hold no credentials.
func CheckURL(raw string) error {
	switch {
	case raw == "":
		return errors.New("the repository's URL is missing")
	case len(raw) > maxURL:
		return fmt.Errorf("%d bytes long, at most %d are possible", len(raw), maxURL)
	case strings.ContainsFunc(raw, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) }):
		return errors.New("it contains spaces or control characters")
	}
	if scp := scpForm.FindStringSubmatch(raw); scp != nil && !strings.Contains(raw, "://") {
		return sshAdvice(scp[2], scp[3])
	}
	u, err := url.Parse(raw)
	if err != nil {
		return errors.New("it is no URL (want https://HOST/PATH)") // the error would quote it
	}
	switch strings.ToLower(u.Scheme) {
	case "https", "http", "git":
	case "ssh", "git+ssh", "ssh+git":
		return sshAdvice(u.Hostname(), strings.TrimPrefix(u.Path, "/"))
	default:
		return fmt.Errorf("%s: use https://HOST/PATH", cmp.Or(quotedScheme(u.Scheme), "it has no scheme"))
	}
	return checkParts(u, raw)
}

func checkParts(u *url.URL, raw string) error {
	switch {
	case u.User != nil:
		return errors.New("it contains credentials, which everyone who may see the job could read: leave them out, and send the secret GIT_AUTH_TOKEN")
	case !hostForm.MatchString(u.Host):
		return errors.New("its host is malformed (want https://HOST/PATH)")
	case strings.Trim(u.Path, "/") == "":
		return errors.New("it names a host, but no repository (want https://HOST/PATH)")
	case strings.ContainsFunc(u.Path, unicode.IsControl):
		return errors.New("its path contains control characters")
	case strings.Contains(raw, "#"):
		return errors.New("it contains a fragment: branch, tag or commit and the folder have fields of their own, ref and subdir")
	case strings.Contains(raw, "?"):
		return errors.New("it contains a query: branch, tag or commit and the folder have fields of their own, ref and subdir")
	}
	return nil
}

func quotedScheme(scheme string) string {
	if scheme == "" {
		return ""
	}
	if len(scheme) > 16 {
		scheme = scheme[:16] + "…"
	}
	return scheme + ":// is not taken"
}

func sshAdvice(host, path string) error {
	advice := "the repository's https:// URL"
	if hostForm.MatchString(host) && len(path) < 256 {
		advice = "https://" + host + "/" + path
	}
	return fmt.Errorf("SSH needs a key, and jobs outlive the agent that could lend one: use %s, with the secret GIT_AUTH_TOKEN unless it is public", advice)
}

// CheckRef tells what is wrong with the name of a branch, tag or commit; the empty
// one stands for the remote's HEAD. The rules are those of git check-ref-format.
func CheckRef(ref string) error {
	switch {
	case ref == "":
		return nil
	case len(ref) > maxRef:
		return fmt.Errorf("%d bytes long, at most %d are possible", len(ref), maxRef)
	case strings.HasPrefix(ref, "-"):
		return errors.New("no branch, tag or commit begins with '-'")
	case ref == "@", strings.Contains(ref, "@{"), strings.Contains(ref, ".."), strings.ContainsAny(ref, "~^:?*[\\"):
		return errors.New("give the name of a branch or tag, or a commit: no revision expressions, ranges or patterns")
	case strings.ContainsFunc(ref, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) || r == unicode.ReplacementChar }):
		return errors.New("it contains spaces or control characters")
	}
	for part := range strings.SplitSeq(ref, "/") {
		if part == "" || strings.HasPrefix(part, ".") || strings.HasSuffix(part, ".") || strings.HasSuffix(part, ".lock") {
			return errors.New("it is malformed: no part of a name between slashes is empty, begins or ends with '.', or ends in '.lock'")
		}
	}
	return nil
}
