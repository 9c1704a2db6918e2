package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/cli/cli/config"
	bk "github.com/moby/buildkit/client"
	buildctl "github.com/moby/buildkit/cmd/buildctl/build"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/moby/buildkit/session/upload"
	"github.com/spf13/cobra"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc"

	"github.com/archfarm/archfarm/coordinator/job/spec"
)

// solveOpt is the build that the flags ask for. What it holds open, release gives back.
func solveOpt(cmd *cobra.Command, from string) (opt bk.SolveOpt, release func(), err error) {
	kept := &sources{mounts: map[string]fsutil.FS{}}
	defer func() {
		if err != nil {
			kept.release()
		}
	}()
	opt = bk.SolveOpt{Frontend: "dockerfile.v0", LocalMounts: kept.mounts}
	if opt.FrontendAttrs, err = frontendAttrs(cmd); err != nil {
		return opt, nil, err
	}
	if err = kept.context(cmd, from, opt.FrontendAttrs); err != nil {
		return opt, nil, err
	}
	if opt.Exports, err = exportsOf(cmd, os.Stdout); err != nil {
		return opt, nil, err
	}
	if opt.CacheImports, err = buildCaches(cmd, "cache-from", buildctl.ParseImportCache); err != nil {
		return opt, nil, err
	}
	if opt.CacheExports, err = buildCaches(cmd, "cache-to", buildctl.ParseExportCache); err != nil {
		return opt, nil, err
	}
	if opt.Session, err = attachables(cmd); err != nil {
		return opt, nil, err
	}
	if kept.archive != nil {
		opt.Session = append(opt.Session, kept.archive)
	}
	opt.AllowedEntitlements, _ = cmd.Flags().GetStringArray("allow")
	if err = buildctl.ValidateAllow(opt.AllowedEntitlements); err != nil {
		return opt, nil, fmt.Errorf("--allow: %w", err)
	}
	opt.SharedKey = sharedKey(from)
	return opt, kept.release, nil
}

// sharedKey is the same for builds of one folder on one machine, so that workers get
// only what has changed there since.
func sharedKey(from string) string {
	path, _ := filepath.Abs(from)
	host, _ := os.Hostname()
	sum := sha256.Sum256([]byte("archfarm build\x00" + host + "\x00" + path))
	return hex.EncodeToString(sum[:])
}

// sources are what a build reads of this machine.
type sources struct {
	mounts  map[string]fsutil.FS
	archive *archive // nil: none
	remove  []string
}

func (s *sources) release() {
	for _, path := range s.remove {
		_ = os.RemoveAll(path)
	}
}

// context puts the context, the Dockerfile and named contexts where the frontend
// looks for them.
func (s *sources) context(cmd *cobra.Command, from string, attrs map[string]string) error {
	file, _ := cmd.Flags().GetString("file")
	switch {
	case from == "-" && file == "-":
		return errors.New("the context and the Dockerfile cannot both be standard input")
	case from == "-":
		if err := s.spool(cmd.InOrStdin()); err != nil {
			return err
		}
		attrs["context"] = "http://buildkit-session/" + archiveName
		setFile(attrs, file)
	case !isFolder(from) && isURL(from):
		attrs["context"] = from
		setFile(attrs, file)
	default:
		if err := s.mount("context", from); err != nil {
			return fmt.Errorf("the context %s: %w", from, err)
		}
	}
	if _, local := s.mounts["context"]; local || file == "-" {
		if err := s.dockerfile(cmd, from, file, attrs); err != nil {
			return err
		}
	}
	named, _ := cmd.Flags().GetStringArray("build-context")
	for _, item := range named {
		name, value, ok := strings.Cut(item, "=")
		if !ok || name == "" || value == "" {
			return fmt.Errorf("--build-context %q: write NAME=PATH or NAME=URL", item)
		}
		if attrs["context:"+name] = value; isFolder(value) {
			attrs["context:"+name] = "local:" + name
			if err := s.mount(name, value); err != nil {
				return fmt.Errorf("--build-context %s: %w", item, err)
			}
		}
	}
	return nil
}

// isURL tells what BuildKit fetches by itself: what has a scheme, and git's and
// GitHub's short forms.
func isURL(text string) bool {
	if u, err := url.Parse(text); err == nil && u.Scheme != "" && u.Host != "" {
		return true
	}
	repository, _, err := spec.ParseContext(text)
	return err == nil && repository != nil
}

func setFile(attrs map[string]string, file string) {
	if file != "" && file != "-" {
		attrs["filename"] = filepath.ToSlash(file)
	}
}

// dockerfile shows the Dockerfile's folder, in which its own .dockerignore may be.
func (s *sources) dockerfile(cmd *cobra.Command, from, file string, attrs map[string]string) error {
	switch file {
	case "":
		file = filepath.Join(from, "Dockerfile")
	case "-":
		dir, err := os.MkdirTemp("", "archfarm-build-")
		if err != nil {
			return err
		}
		s.remove = append(s.remove, dir)
		file = filepath.Join(dir, "Dockerfile")
		text, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), spec.MaxFile))
		if err != nil {
			return fmt.Errorf("reading the Dockerfile: %w", err)
		}
		if err := os.WriteFile(file, text, 0o600); err != nil {
			return err
		}
		attrs["dockerfilekey"] = "dockerfile"
	}
	if info, err := os.Stat(file); err != nil {
		return fmt.Errorf("the Dockerfile: %w; name it with --file", err)
	} else if info.IsDir() {
		return fmt.Errorf("the Dockerfile %s is a folder", file)
	}
	attrs["filename"] = filepath.Base(file)
	return s.mount("dockerfile", filepath.Dir(file))
}

func (s *sources) mount(name, dir string) error {
	files, err := fsutil.NewFS(dir)
	if err != nil {
		return err
	}
	s.mounts[name] = files
	return nil
}

const archiveName = "context"

// archive is a tar archive that workers, one per platform, fetch through the session.
type archive struct{ path string }

// spool keeps what comes from standard input, which can be read only once.
func (s *sources) spool(from io.Reader) error {
	f, err := os.CreateTemp("", "archfarm-context-")
	if err != nil {
		return err
	}
	s.remove = append(s.remove, f.Name())
	defer f.Close()
	if _, err := io.Copy(f, from); err != nil {
		return fmt.Errorf("reading the context: %w", err)
	}
	s.archive = &archive{f.Name()}
	return nil
}

// Register is called by the session.
func (a *archive) Register(server *grpc.Server) { upload.RegisterUploadServer(server, a) }

// Pull sends the archive.
func (a *archive) Pull(stream upload.Upload_PullServer) error {
	f, err := os.Open(a.path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(pullWriter{stream}, f) // in pieces of 32 KiB
	return err
}

type pullWriter struct{ upload.Upload_PullServer }

func (w pullWriter) Write(p []byte) (int, error) {
	if err := w.Send(&upload.BytesMessage{Data: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// attachables are what workers ask of this machine while they build.
func attachables(cmd *cobra.Command) ([]session.Attachable, error) {
	flags := cmd.Flags()
	out := []session.Attachable{authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{
		AuthConfigProvider: authprovider.LoadAuthConfig(config.LoadDefaultConfigFile(cmd.ErrOrStderr())),
	})}
	if list, _ := flags.GetStringArray("secret"); len(list) > 0 {
		values := map[string][]byte{}
		for _, text := range list {
			s, err := parseSecret(text)
			if err == nil && s.name != "" {
				err = fmt.Errorf("--secret id=%s: secrets that the farm keeps are for archfarm submit", s.id)
			}
			if err != nil {
				return nil, err
			}
			if values[s.id], err = s.value(); err != nil {
				return nil, err
			}
		}
		out = append(out, secretsprovider.FromMap(values))
	}
	if list, _ := flags.GetStringArray("ssh"); len(list) > 0 {
		configs, err := buildctl.ParseSSH(list)
		if err != nil {
			return nil, fmt.Errorf("--ssh: %w", err)
		}
		agents, err := sshprovider.NewSSHAgentProvider(configs)
		if err != nil {
			return nil, fmt.Errorf("--ssh: %w", err)
		}
		out = append(out, agents)
	}
	return out, nil
}

// buildCaches reads caches as buildx does: a word alone is a registry's.
func buildCaches(cmd *cobra.Command, flag string, parse func([]string) ([]bk.CacheOptionsEntry, error)) ([]bk.CacheOptionsEntry, error) {
	list, _ := cmd.Flags().GetStringArray(flag)
	for i, text := range list {
		switch {
		case !strings.Contains(text, "="):
			list[i] = "type=registry,ref=" + text
		case !strings.Contains(text, "type="):
			return nil, fmt.Errorf("--%s %q: it has no type, as type=registry,ref=…", flag, text)
		}
	}
	out, err := parse(list)
	if err != nil {
		return nil, fmt.Errorf("--%s: %w", flag, err)
	}
	return out, nil
}
