package main

import (
	"bytes"
	"context"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// gitTimeout bounds what is asked of git altogether: a job without the commit's
	// name is better than none.
	gitTimeout = 15 * time.Second
	maxGit     = 64 << 10
)

// gitSource tells which commit a folder is of; nil where there is no git, or no commit.
// In a pipeline whose checkout has no branch, the branch or tag is the one that the
// pipeline says the commit is of.
func gitSource(ctx context.Context, dir string, lookup func(string) (string, bool)) *archfarmv1.Source {
	ctx, cancel := context.WithTimeout(ctx, gitTimeout)
	defer cancel()
	head, err := git(ctx, dir, "log", "-1", "--no-show-signature", "--format=%H %cI")
	commit, when, ok := strings.Cut(head, " ")
	if err != nil || !ok {
		return nil
	}
	out := &archfarmv1.Source{Commit: commit}
	if at, err := time.Parse(time.RFC3339, when); err == nil {
		out.CommitTime = timestamppb.New(at)
	}
	out.Branch, _ = git(ctx, dir, "symbolic-ref", "--quiet", "--short", "HEAD")
	out.Tag, _ = git(ctx, dir, "describe", "--tags", "--exact-match", "HEAD")
	if remote, err := git(ctx, dir, "config", "--get", "remote.origin.url"); err == nil {
		out.Url = withoutCredentials(remote)
	}
	changes, err := git(ctx, dir, "status", "--porcelain", "--", ".")
	out.Dirty = err != nil || changes != ""
	fromPipeline(out, lookup)
	return out
}

// git asks the folder's repository. What the repository's configuration would have
// executed (a file system monitor, hooks) is not, nothing is asked of the user or
// written, and a repository of another user's is refused by git itself.
func git(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir, "-c", "core.fsmonitor=false", "-c", "core.hooksPath=" + os.DevNull, "--no-pager"}, args...)...)
	cmd.Env = append(os.Environ(), "GIT_TERMINAL_PROMPT=0", "GIT_OPTIONAL_LOCKS=0", "GIT_EXTERNAL_DIFF=", "LC_ALL=C")
	cmd.WaitDelay = time.Second
	out := &firstBytes{}
	cmd.Stdout = out
	if err := cmd.Run(); err != nil {
		return "", err
	}
	return strings.TrimSpace(out.String()), nil
}

// firstBytes keeps the beginning of what is written to it.
type firstBytes struct{ bytes.Buffer }

func (f *firstBytes) Write(p []byte) (int, error) {
	f.Buffer.Write(p[:min(len(p), maxGit-f.Len())])
	return len(p), nil
}

// withoutCredentials is a remote's URL without user and password, but for the user of
// ssh. What is no URL is git@host:path, or a path, which is nobody's business.
func withoutCredentials(remote string) string {
	u, err := url.Parse(remote)
	if err != nil || u.Scheme == "" || u.Host == "" {
		host, path, ok := strings.Cut(remote, ":")
		if !ok || strings.Contains(host, "/") || strings.HasPrefix(path, "/") || strings.Contains(path, "@") {
			return ""
		}
		return remote
	}
	if u.Scheme == "ssh" && u.User != nil {
		u.User = url.User(u.User.Username())
	} else {
		u.User = nil
	}
	u.RawQuery, u.Fragment = "", ""
	return u.String()
}

// fromPipeline fills in branch and tag as GitLab and GitHub tell them, if they speak
// of this commit.
func fromPipeline(s *archfarmv1.Source, lookup func(string) (string, bool)) {
	env := func(name string) string { v, _ := lookup(name); return v }
	var branch, tag string
	switch s.GetCommit() {
	case env("CI_COMMIT_SHA"):
		branch, tag = env("CI_COMMIT_BRANCH"), env("CI_COMMIT_TAG")
	case env("GITHUB_SHA"):
		switch env("GITHUB_REF_TYPE") {
		case "branch":
			branch = env("GITHUB_REF_NAME")
		case "tag":
			tag = env("GITHUB_REF_NAME")
		}
	}
	if s.Branch == "" {
		s.Branch = branch
	}
	if s.Tag == "" {
		s.Tag = tag
	}
}
