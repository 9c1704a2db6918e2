// Package gitref finds out which commit a git context is, so that a job builds what
// it was submitted for, whatever is pushed meanwhile. It runs git, fenced in: what
// the URL, the server or a repository say is hostile until proven otherwise.
package gitref

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// patience is for how long one repository may take in all.
	patience = 90 * time.Second
	// atOnce bounds the gits that run at a time.
	atOnce = 16
)

// places are taken by calls of Resolve: processes and their memory are the
// machine's, whoever calls.
var places = make(chan struct{}, atOnce)

// Resolve asks the repository which commit a ref is: a branch, a tag (annotated ones
// stand for their commit), a full ref ("refs/pull/7/head"), a commit in full, or at
// least 7 digits of one at which a branch or tag is; HEAD when it is empty. It
// returns the commit, its time, and the branch or tag that the ref names.
//
// Where the server cannot leave out trees and files and the commit with them has more
// than 512 MiB, the commit is without a time, unless the ref is a commit's digits:
// that is an error then.
//
// Errors: InvalidArgument (the URL or ref, or several fit), NotFound (no such ref, with
// similar ones; no such repository), PermissionDenied (credentials are missing or not
// enough), Unavailable (the server is out of reach), FailedPrecondition (no git here,
// an untrusted certificate), ResourceExhausted (too large to look at). None of
// them holds credentials.
func Resolve(ctx context.Context, git *archfarmv1.GitContext, auth Auth) (*archfarmv1.Source, error) {
	return resolveIn(ctx, "", git, auth)
}

// In returns a Resolve whose git works in a folder of its own, which is nobody else's:
// what a process that was killed has left there is removed.
func In(dir string) (func(context.Context, *archfarmv1.GitContext, Auth) (*archfarmv1.Source, error), error) {
	_ = os.RemoveAll(dir) // a git that has outlived its coordinator may still write: the rest goes at the next start
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the folder for git: %w", err)
	}
	return func(ctx context.Context, git *archfarmv1.GitContext, auth Auth) (*archfarmv1.Source, error) {
		return resolveIn(ctx, dir, git, auth)
	}, nil
}

// resolveIn is Resolve with its files in a folder; empty: that for temporary files.
func resolveIn(ctx context.Context, dir string, git *archfarmv1.GitContext, auth Auth) (*archfarmv1.Source, error) {
	if err := CheckURL(git.GetUrl()); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "resolving the git context: url: %v", err)
	}
	if err := CheckRef(git.GetRef()); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "resolving the git context %s: ref: %v", git.GetUrl(), err)
	}
	select {
	case places <- struct{}{}:
		defer func() { <-places }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	source, err := resolve(limited, dir, git, auth)
	switch {
	case err == nil:
		return source, nil
	case ctx.Err() != nil:
		return nil, status.FromContextError(ctx.Err()).Err()
	case limited.Err() != nil:
		err = status.Errorf(codes.Unavailable, "the server took longer than %v", patience)
	}
	st := status.Convert(err)
	return nil, status.Errorf(st.Code(), "resolving the git context %s: %s", git.GetUrl(), st.Message())
}

func resolve(ctx context.Context, dir string, git *archfarmv1.GitContext, auth Auth) (*archfarmv1.Source, error) {
	cli, err := newCLI(dir, git.GetUrl(), git.GetRef(), auth)
	if err != nil {
		return nil, err
	}
	defer cli.close()
	source, tip, err := cli.find(ctx, git.GetRef())
	if err != nil {
		return nil, err
	}
	source.Url = git.GetUrl()
	id, at, err := cli.commit(ctx, source.GetCommit())
	switch {
	case errors.Is(err, errTooLarge) && tip:
		return source, nil
	case errors.Is(err, errTooLarge):
		return nil, status.Errorf(codes.ResourceExhausted, "%v: give a branch or tag, which need not be fetched", err)
	case err != nil:
		return nil, err
	}
	source.Commit = id // of a tag's own digits, the commit that it is of
	if stamp := timestamppb.New(at); stamp.IsValid() {
		source.CommitTime = stamp
	}
	return source, nil
}

// find asks which commit a ref is. Tip tells that the server says that it has it.
func (c *cli) find(ctx context.Context, ref string) (source *archfarmv1.Source, tip bool, err error) {
	if objectID.MatchString(ref) {
		return &archfarmv1.Source{Commit: strings.ToLower(ref)}, false, nil
	}
	if ref == "" || ref == "HEAD" {
		refs, err := c.list(ctx, "--symref", "HEAD")
		if err != nil {
			return nil, false, err
		}
		if refs.ids["HEAD"] == "" {
			return nil, false, status.Error(codes.NotFound, "there is no HEAD: the repository is empty, or its default branch is not there (name another), or the URL is not a repository's")
		}
		return &archfarmv1.Source{Commit: refs.ids["HEAD"], Branch: strings.TrimPrefix(refs.head, "refs/heads/")}, true, nil
	}
	refs, err := c.list(ctx, candidates(ref)...)
	if err != nil {
		return nil, false, err
	}
	source, err = refs.choose(ref)
	if source != nil || err != nil {
		return source, true, err
	}
	all, err := c.list(ctx)
	if err != nil {
		return nil, false, err
	}
	source, err = all.abbreviated(ref)
	return source, true, err
}

// candidates are the full names that a ref may stand for, and the commits of tags.
func candidates(ref string) []string {
	if strings.HasPrefix(ref, "refs/") {
		return []string{ref, ref + peeled}
	}
	return []string{"refs/heads/" + ref, "refs/tags/" + ref, "refs/tags/" + ref + peeled, "refs/" + ref, "refs/" + ref + peeled}
}

// unknown says that there is no such ref, and which ones there are.
func unknown(ref string, similar []string) error {
	text := fmt.Sprintf("there is no branch, tag or commit %q", ref)
	if len(similar) > 0 {
		text += "; there are " + strings.Join(similar, ", ")
	}
	if digits.MatchString(ref) {
		text += "; an abbreviated commit is found at branches and tags only: give all its digits"
	}
	return status.Error(codes.NotFound, text)
}
