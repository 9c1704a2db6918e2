package gitref

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxOutput bounds what is kept of git's output: the refs of a large repository
	// (100,000 have some 8 MiB).
	maxOutput = 32 << 20
	maxErrors = 64 << 10
	// maxPack bounds what is fetched, and maxMemory each process, in KiB.
	maxPack   = 512 << 10
	maxMemory = 1 << 20
)

// errTooLarge tells that a limit ended git.
var errTooLarge = errors.New("the repository is too large to look at here")

// fence is run by sh: git cannot write a file larger than $1 blocks of 512 bytes, nor
// use more than $2 KiB of memory where the system knows that limit.
const fence = `ulimit -c 0; ulimit -f "$1" || exit 125; ulimit -v "$2" 2>/dev/null; shift 2; exec "$@"`

// passed are the variables of the coordinator's environment that git may see: where
// programs are, how to get out, whom to trust.
var passed = []string{
	"PATH", "http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY",
	"SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH",
}

// cli runs git on one repository, in an empty folder of its own.
type cli struct {
	dir    string
	remote string
	auth   bool
	sh     string
	git    string
	env    []string
	pack   int // the most that is fetched, in KiB
	memory int // that a process may use, in KiB
	ready  bool
}

func newCLI(base, remote, ref string, auth Auth) (*cli, error) {
	sh, err := exec.LookPath("sh")
	git, gitErr := exec.LookPath("git")
	if err = cmp.Or(err, gitErr); err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "this coordinator has no git: install the packages git and ca-certificates where it runs, or submit a folder instead (%v)", err)
	}
	u, err := url.Parse(remote)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "the URL is malformed")
	}
	dir, err := os.MkdirTemp(base, "archfarm-git-")
	if err != nil {
		return nil, status.Errorf(codes.Internal, "making a folder for git: %v", err)
	}
	c := &cli{dir: dir, remote: remote, auth: auth.header != "", sh: sh, git: git, pack: maxPack, memory: maxMemory}
	c.env = environment(dir, strings.ToLower(u.Scheme), remote, auth)
	format := "sha1"
	if len(ref) == 64 && objectID.MatchString(ref) {
		format = "sha256"
	}
	c.env = append(c.env, "GIT_DEFAULT_HASH="+format)
	return c, nil
}

func (c *cli) close() { _ = os.RemoveAll(c.dir) }

// environment is all that git gets to see: no configuration but this, no home, no
// way to ask anybody, no protocol but the URL's (and https, where http leads to it).
func environment(dir, scheme, remote string, auth Auth) []string {
	env := []string{
		"HOME=" + dir, "XDG_CONFIG_HOME=" + dir, "TMPDIR=" + dir, "GIT_DIR=" + filepath.Join(dir, "git"),
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=" + os.DevNull, "GIT_CONFIG_SYSTEM=" + os.DevNull, "GIT_ATTR_NOSYSTEM=1",
		"GIT_TERMINAL_PROMPT=0", "GIT_ASKPASS=", "SSH_ASKPASS=", "GIT_SSH_COMMAND=false", "GIT_NO_LAZY_FETCH=1", "GIT_NO_REPLACE_OBJECTS=1",
		"LC_ALL=C", "LANGUAGE=C",
		"GIT_ALLOW_PROTOCOL=" + map[string]string{"http": "http:https", "https": "https", "git": "git"}[scheme],
	}
	for _, name := range passed {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	redirects := "initial"
	if auth.header != "" {
		redirects = "false" // git would send the credentials to wherever it is led
	}
	config := [][2]string{
		{"http.followRedirects", redirects}, {"http.lowSpeedLimit", "100"}, {"http.lowSpeedTime", "30"},
		{"credential.helper", ""}, {"protocol.version", "2"}, {"core.hooksPath", os.DevNull},
		{"gc.auto", "0"}, {"maintenance.auto", "false"}, {"fetch.unpackLimit", "1"}, {"pack.threads", "1"}, {"core.packedGitLimit", "64m"}, {"core.packedGitWindowSize", "16m"}, {"fetch.recurseSubmodules", "false"},
		{"core.fsmonitor", "false"}, {"transfer.bundleURI", "false"}, {"init.templateDir", ""},
	}
	if auth.header != "" {
		config = append(config, [2]string{"http." + remote + ".extraHeader", "Authorization: " + auth.header})
	}
	env = append(env, "GIT_CONFIG_COUNT="+strconv.Itoa(len(config)))
	for i, kv := range config {
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, kv[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, kv[1]))
	}
	return env
}

// list returns the refs that fit patterns, all without any.
func (c *cli) list(ctx context.Context, patterns ...string) (refs, error) {
	args := []string{"ls-remote", "--quiet"}
	if len(patterns) > 0 && patterns[0] == "--symref" {
		args, patterns = append(args, patterns[0]), patterns[1:]
	}
	out, err := c.run(ctx, append(append(args, "--", c.remote), patterns...)...)
	return parseRefs(out), err
}

// commit fetches a commit, without its trees and history where the server can, and
// returns its id and time.
func (c *cli) commit(ctx context.Context, id string) (string, time.Time, error) {
	if _, err := c.run(ctx, "fetch", "--quiet", "--no-tags", "--depth=1", "--filter=tree:0", "--no-write-fetch-head", "--", c.remote, id); err != nil {
		return "", time.Time{}, err
	}
	out, err := c.run(ctx, "log", "-1", "--no-show-signature", "--format=%H %ct", id+"^{commit}", "--")
	if err != nil {
		return "", time.Time{}, status.Errorf(codes.InvalidArgument, "%s is no commit", id)
	}
	full, seconds, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	at, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil || !objectID.MatchString(full) {
		return "", time.Time{}, status.Errorf(codes.InvalidArgument, "%s is a commit that git cannot read", id)
	}
	return full, time.Unix(at, 0), nil
}

// run runs git and returns its output. When the context ends, so does everything
// that git has started.
func (c *cli) run(ctx context.Context, args ...string) ([]byte, error) {
	if !c.ready {
		c.ready = true
		if _, err := c.run(ctx, "init", "--quiet", "--bare"); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out, errs := &bounded{limit: maxOutput, full: cancel}, &bounded{limit: maxErrors}
	cmd := exec.CommandContext(ctx, c.sh, append([]string{"-c", fence, "sh", strconv.Itoa(2 * c.pack), strconv.Itoa(c.memory), c.git}, args...)...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = c.dir, c.env, out, errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) { // something of the group still holds the pipes
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	switch {
	case err == nil:
		return out.kept.Bytes(), nil
	case out.over:
		return nil, status.Errorf(codes.ResourceExhausted, "the repository has too many branches and tags to look at here (more than %d MiB): give a commit in full", maxOutput>>20)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	}
	return nil, c.explain(args[0], err, errs.kept.String())
}

// bounded keeps so many bytes, and drops what comes after, calling full once if it is
// there. It has no method but Write that takes bytes: io.Copy would use it.
type bounded struct {
	kept  bytes.Buffer
	limit int
	over  bool
	full  func()
}

func (b *bounded) Write(p []byte) (int, error) {
	keep := min(len(p), b.limit-b.kept.Len())
	b.kept.Write(p[:keep])
	if keep < len(p) && !b.over {
		b.over = true
		if b.full != nil {
			b.full()
		}
	}
	return len(p), nil
}
