package gitref

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

func TestCheckURL(t *testing.T) {
	t.Parallel()
	for _, good := range []string{
		"https://github.com/moby/buildkit.git", "http://localhost:8080/a", "git://example.com/a.git", "https://[::1]:8443/a/b", "HTTPS://Example.com/a%20b",
		"https://example.com/~user/a.git",
	} {
		if err := CheckURL(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for bad, says := range map[string]string{
		"": "missing", "https://": "host", "https://example.com": "no repository", "https://example.com/": "no repository", "/etc": "scheme", "a b": "spaces",
		"file:///etc": "file://", "ext::sh -c x": "spaces", "ext::sh": "https://HOST", "-x": "scheme", "https://-x/a": "host", "git://-oProxy=x/a": "host",
		"https://user:hunter2@example.com/a": "GIT_AUTH_TOKEN", "https://hunter2@example.com/a": "GIT_AUTH_TOKEN", "https://x:hunter2@%zz/": "no URL",
		"ssh://git@example.com/o/a.git": "https://example.com/o/a.git", "git@example.com:o/a.git": "https://example.com/o/a.git", "example.com:o/a": "https://example.com/o/a",
		"https://example.com/a#main": "ref", "https://example.com/a?x=y": "ref", "git://example.com/a%0ahost=b": "control", "https://exa\x01mple.com/": "control",
		"https://example.com:99999999/a": "host", "https://exa mple.com/a": "spaces", "https://example.com/" + strings.Repeat("x", 3000): "bytes long",
	} {
		err := CheckURL(bad)
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%.60q: %v, want it to say %q", bad, err, says)
		}
	}
}

// TestCheckRef_TakesNoMoreThanGit asks git itself.
func TestCheckRef_TakesNoMoreThanGit(t *testing.T) {
	t.Parallel()
	for ref, want := range map[string]bool{
		"": true, "main": true, "feature/x": true, "refs/heads/main": true, "v1.2.3+meta": true, "café": true, "HEAD": true,
		"-x": false, "a..b": false, "a~1": false, "a^": false, "a:b": false, "a?": false, "a*": false, "[a": false, `a\b`: false, "a b": false, "a\nb": false,
		"a\x7f": false, "a/": false, "/a": false, "a//b": false, ".a": false, "a/.b": false, "a.lock": false, "a.lock/b": false, "a.": false, "@": false, "a@{1}": false,
	} {
		if err := CheckRef(ref); (err == nil) != want {
			t.Errorf("%q: %v", ref, err)
		}
		if ref == "" || !want {
			continue
		}
		if err := exec.Command("git", "check-ref-format", "--allow-onelevel", ref).Run(); err != nil {
			t.Errorf("git does not take %q: %v", ref, err)
		}
	}
}

func TestSimilar_NamesTheNearest(t *testing.T) {
	t.Parallel()
	r := parseRefs([]byte(strings.Repeat("a", 40) + "\trefs/heads/main\n" + strings.Repeat("b", 40) + "\trefs/tags/release-1.2\n" + strings.Repeat("c", 40) + "\trefs/heads/develop\n"))
	for ref, want := range map[string]string{"mian": "main", "1.2": "release-1.2", "devel": "develop", "release-1.3": "release-1.2"} {
		if got := r.similar(ref); got[0] != want || len(got) != 3 {
			t.Errorf("%s: %v", ref, got)
		}
	}
}

func FuzzCheckURL(f *testing.F) {
	for _, seed := range []string{"https://example.com/a.git", "git@example.com:a", "ext::sh", "https://u:p@h/a", "file:///a", "git://[::1]/a%0a"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		if CheckURL(raw) != nil {
			return
		}
		scheme, rest, ok := strings.Cut(strings.ToLower(raw), "://")
		host, _, _ := strings.Cut(rest, "/")
		if !ok || !slices.Contains([]string{"https", "http", "git"}, scheme) || strings.ContainsAny(host, "@-") && host[0] == '-' || strings.Contains(host, "@") {
			t.Errorf("taken: %q", raw)
		}
		if strings.ContainsAny(raw, "\x00\r\n \t") {
			t.Errorf("taken with white space: %q", raw)
		}
	})
}

func FuzzRefs(f *testing.F) {
	id := strings.Repeat("1234567890", 4)
	f.Add("ref: refs/heads/main\tHEAD\n"+id+"\tHEAD\n"+id+"\trefs/tags/v1\n"+id+"\trefs/tags/v1^{}\n", "v1")
	f.Add(id+"\trefs/heads/-x\n"+id+"\t\n\t\n", "1234567")
	f.Fuzz(func(t *testing.T, out, ref string) {
		if CheckRef(ref) != nil {
			return
		}
		r := parseRefs([]byte(out))
		source, err := r.choose(ref)
		if source == nil && err == nil {
			source, err = r.abbreviated(ref)
		}
		if (source == nil) == (err == nil) {
			t.Fatalf("%v, %v", source, err)
		}
		if source != nil && !objectID.MatchString(source.GetCommit()) {
			t.Errorf("no commit: %v", source)
		}
	})
}
