package spec

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/buildkit/util/gitutil"
	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/coordinator/gitref"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const maxSourceURL = 2 << 10

var commitForm = regexp.MustCompile(`^([0-9a-f]{40}|[0-9a-f]{64})$`)

func checkContext(f *faults, field string, c *archfarmv1.BuildContext) {
	switch from := c.GetFrom().(type) {
	case *archfarmv1.BuildContext_Git:
		f.err(under(field, "git.url"), gitref.CheckURL(from.Git.GetUrl()))
		f.err(under(field, "git.ref"), gitref.CheckRef(from.Git.GetRef()))
		checkPath(f, under(field, "git.subdir"), from.Git.GetSubdir())
		if c.GetSource() != nil {
			f.add(under(field, "source"), "the coordinator finds out the commit of a git context: leave it out")
		}
	case *archfarmv1.BuildContext_Digest:
		if d, err := digest.Parse(from.Digest); err != nil || d.Algorithm() != digest.SHA256 {
			f.add(under(field, "digest"), "%s is no digest: give what UploadContext returned (sha256:…)", quote(from.Digest))
		}
		if c.GetSource() != nil {
			checkSource(f, under(field, "source"), c.GetSource())
		}
	default:
		f.add(field, "required: a git repository, or the digest of an uploaded folder")
	}
}

// checkSource checks where an uploaded folder comes from, as its client says.
func checkSource(f *faults, field string, s *archfarmv1.Source) {
	checkName(f, under(field, "url"), s.GetUrl(), maxSourceURL)
	if u, err := url.Parse(s.GetUrl()); err == nil && u.User != nil {
		if _, password := u.User.Password(); password || u.Scheme != "ssh" {
			f.add(under(field, "url"), "it contains credentials, which everyone who may see the job could read: leave them out")
		}
	}
	if s.GetCommit() != "" && !commitForm.MatchString(s.GetCommit()) {
		f.add(under(field, "commit"), "%s is no commit in full (40 or 64 hexadecimal digits, in lower case)", quote(s.GetCommit()))
	}
	f.err(under(field, "branch"), gitref.CheckRef(s.GetBranch()))
	f.err(under(field, "tag"), gitref.CheckRef(s.GetTag()))
	if s.GetCommitTime() != nil && s.GetCommitTime().CheckValid() != nil {
		f.add(under(field, "commit_time"), "it is no time")
	}
}

// ParseContext reads a context as docker build takes it: https://HOST/PATH.git,
// git://HOST/PATH, git@HOST:PATH and github.com/OWNER/NAME, each with #REF:SUBDIR or
// the queries ?ref=, ?branch=, ?tag=, ?commit= and ?subdir=, are git repositories;
// all else is the path of something local. A folder that is called github.com/… goes
// before the repository, which only the caller can see. SSH is an error that says
// what to use.
func ParseContext(text string) (git *archfarmv1.GitContext, local string, err error) {
	remote := text
	if rest, ok := strings.CutPrefix(text, "github.com/"); ok {
		path, more := rest, ""
		if i := strings.IndexAny(rest, "?#"); i >= 0 {
			path, more = rest[:i], rest[i:]
		}
		remote = "https://github.com/" + strings.TrimSuffix(strings.TrimSuffix(path, "/"), ".git") + ".git" + more
	}
	if !gitutil.IsGitTransport(remote) {
		if scheme, _, ok := strings.Cut(text, "://"); ok && !strings.ContainsAny(scheme, "/.") {
			return nil, "", fmt.Errorf("reading the context %s: use https://HOST/PATH.git, or a local path", showURL(text))
		}
		return nil, text, nil
	}
	if git, err = parseGit(remote); err != nil {
		return nil, "", fmt.Errorf("reading the context %s: %w", showURL(text), err)
	}
	return git, "", nil
}

func parseGit(remote string) (*archfarmv1.GitContext, error) {
	u, err := gitutil.ParseURL(remote)
	if err != nil {
		return nil, errors.New("it is malformed (want https://HOST/PATH.git)") // the error would quote it
	}
	web := strings.HasPrefix(strings.ToLower(u.Scheme), "http")
	if web && !strings.HasSuffix(u.Path, ".git") && u.Opts == nil && u.Query == nil {
		return nil, errors.New("if it is a git repository, say so by its ending (.git) or by a branch (#main); if it is an archive, download it and give its path")
	}
	git := &archfarmv1.GitContext{Url: u.Remote}
	if u.Opts != nil {
		git.Ref, git.Subdir = u.Opts.Ref, u.Opts.Subdir
	}
	for _, name := range slices.Sorted(maps.Keys(u.Query)) {
		if err := gitQuery(git, name, u.Query[name]); err != nil {
			return nil, err
		}
	}
	return git, cmp.Or(gitref.CheckURL(git.Url), gitref.CheckRef(git.Ref))
}

// gitQuery reads one of the queries of a repository's URL.
func gitQuery(git *archfarmv1.GitContext, name string, values []string) error {
	if len(values) != 1 || values[0] == "" {
		return fmt.Errorf("the query %s needs one value", quote(name))
	}
	value, field := values[0], &git.Ref
	switch name {
	case "ref", "commit", "checksum":
	case "branch":
		value = "refs/heads/" + strings.TrimPrefix(value, "refs/heads/")
	case "tag":
		value = "refs/tags/" + strings.TrimPrefix(value, "refs/tags/")
	case "subdir":
		value, field = strings.TrimPrefix(path.Clean("/"+value), "/"), &git.Subdir
	default:
		return fmt.Errorf("the query %s is not taken: jobs know ref, branch, tag, commit and subdir", quote(name))
	}
	if *field != "" && *field != value {
		return fmt.Errorf("it gives two: %s and %s", quote(*field), quote(value))
	}
	*field = value
	return nil
}

// showURL quotes what was given as a URL, without credentials and queries.
func showURL(text string) string {
	text, _, _ = strings.Cut(text, "?")
	scheme, rest, ok := strings.Cut(text, "://")
	if i := strings.LastIndex(rest, "@"); ok && i >= 0 {
		text = scheme + "://…" + rest[i:]
	}
	return quote(text)
}
