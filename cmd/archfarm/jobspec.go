package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/archfarm/archfarm/coordinator/job/spec"
	"github.com/archfarm/archfarm/file"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// nowhere stands for a context that has not been uploaded yet.
const nowhere = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

func withContext(s *archfarmv1.JobSpec) *archfarmv1.JobSpec {
	s = proto.CloneOf(s)
	s.Context = &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Digest{Digest: nowhere}, Source: s.GetContext().GetSource()}
	return s
}

func isFolder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// specOf puts what the flags say into a specification: single values and lists
// replace those that are there, maps are merged.
func specOf(cmd *cobra.Command, s *archfarmv1.JobSpec) error {
	flags := cmd.Flags()
	var errs []error
	for name, to := range map[string]*string{"file": &s.Dockerfile, "target": &s.Target, "provenance": &s.Provenance, "sbom": &s.Sbom} {
		if flags.Changed(name) {
			*to, _ = flags.GetString(name)
		}
	}
	for name, to := range map[string]*bool{"no-cache": &s.NoCache, "pull": &s.Pull, "overwrite-newer": &s.OverwriteNewer, "registry-insecure": &s.InsecureRegistry} {
		if flags.Changed(name) {
			*to, _ = flags.GetBool(name)
		}
	}
	for name, to := range map[string]*int32{"priority": &s.Priority, "max-attempts": &s.MaxAttempts} {
		if flags.Changed(name) {
			*to, _ = flags.GetInt32(name)
		}
	}
	if flags.Changed("timeout") {
		timeout, _ := flags.GetDuration("timeout")
		s.Timeout = durationpb.New(timeout)
	}
	if flags.Changed("tag") {
		s.Tags, _ = flags.GetStringArray("tag")
	}
	if flags.Changed("platform") {
		platforms, err := platformsOf(cmd)
		s.Platforms, errs = platforms, append(errs, err)
	}
	for name, to := range map[string]*map[string]string{"build-arg": &s.BuildArgs, "label": &s.Labels, "annotation": &s.Annotations, "metadata": &s.Metadata} {
		list, _ := flags.GetStringArray(name)
		errs = append(errs, addPairs(to, "--"+name, list, name == "build-arg"))
	}
	for name, to := range map[string]*[]*archfarmv1.CacheEntry{"cache-from": &s.CacheFrom, "cache-to": &s.CacheTo} {
		if flags.Changed(name) {
			list, _ := flags.GetStringArray(name)
			caches, err := caches("--"+name, list)
			*to, errs = caches, append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// addPairs adds KEY=VALUE to a map. With env, a KEY alone has the environment's value,
// and is left out where there is none, as docker does it.
func addPairs(to *map[string]string, flag string, list []string, env bool) error {
	var errs []error
	for _, item := range list {
		key, value, ok := strings.Cut(item, "=")
		switch {
		case key == "" || !ok && !env:
			errs = append(errs, fmt.Errorf("%s %q: write KEY=VALUE", flag, item))
			continue
		case !ok:
			if value, ok = os.LookupEnv(key); !ok {
				continue
			}
		}
		if *to == nil {
			*to = map[string]string{}
		}
		(*to)[key] = value
	}
	return errors.Join(errs...)
}

func caches(flag string, list []string) ([]*archfarmv1.CacheEntry, error) {
	var out []*archfarmv1.CacheEntry
	for _, text := range list {
		entry, err := spec.ParseCache(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", flag, err)
		}
		out = append(out, entry)
	}
	return out, nil
}

// secretFlag is one --secret.
type secretFlag struct {
	id, env, src, name string
}

// parseSecret reads id=ID with env=VARIABLE, src=FILE or name=NAME; without any, the
// variable of that name, or else the file, as docker does it.
func parseSecret(text string) (secretFlag, error) {
	var s secretFlag
	kind := ""
	fields, err := fieldsOf(text)
	if err != nil {
		return s, fmt.Errorf("--secret %q: %w", text, err)
	}
	for _, f := range fields {
		switch f.name {
		case "id":
			s.id = f.value
		case "env":
			s.env = f.value
		case "src", "source":
			s.src = f.value
		case "name":
			s.name = f.value
		case "type":
			kind = f.value
		default:
			return s, fmt.Errorf("--secret %q: there is no %q: use id, env, src, name and type", text, f.name)
		}
	}
	if kind == "env" && s.env == "" {
		s.env, s.src = s.src, ""
	}
	sources := 0
	for _, v := range []string{s.env, s.src, s.name} {
		if v != "" {
			sources++
		}
	}
	switch {
	case kind != "" && kind != "env" && kind != "file":
		return s, fmt.Errorf("--secret %q: the type is env or file", text)
	case s.id == "":
		return s, fmt.Errorf("--secret %q: it needs an id, by which build steps mount it", text)
	case sources > 1:
		return s, fmt.Errorf("--secret %q: it comes from one of env, src and name", text)
	}
	return s, nil
}

// value reads a secret that comes with the job.
func (s secretFlag) value() ([]byte, error) {
	env, src := s.env, s.src
	if env == "" && src == "" {
		if _, ok := os.LookupEnv(s.id); ok {
			env = s.id
		} else {
			src = s.id
		}
	}
	if env != "" {
		value, ok := os.LookupEnv(env)
		if !ok {
			return nil, fmt.Errorf("--secret id=%s: the environment has no %s", s.id, env)
		}
		return []byte(value), nil
	}
	value, err := file.Read(src, maxSecret)
	if err != nil {
		return nil, fmt.Errorf("--secret id=%s: %w", s.id, err)
	}
	return value, nil
}

// secretsOf adds what --secret names, in the place of what the file says of the same
// ids: references to the specification, and the values of those that the farm does
// not keep to the request.
func secretsOf(cmd *cobra.Command, req *archfarmv1.SubmitRequest) error {
	list, _ := cmd.Flags().GetStringArray("secret")
	seen := map[string]bool{}
	for _, text := range list {
		s, err := parseSecret(text)
		switch {
		case err != nil:
			return err
		case seen[s.id]:
			return fmt.Errorf("--secret: the id %s is given twice", s.id)
		}
		seen[s.id] = true
		req.Spec.Secrets = slices.DeleteFunc(req.GetSpec().GetSecrets(), func(ref *archfarmv1.SecretRef) bool { return ref.GetId() == s.id })
		delete(req.Secrets, s.id)
		req.Spec.Secrets = append(req.Spec.Secrets, &archfarmv1.SecretRef{Id: s.id, Name: s.name})
		if s.name != "" {
			continue
		}
		if err := s.send(req); err != nil {
			return err
		}
	}
	return nil
}

// send adds the secret's value to a request.
func (s secretFlag) send(req *archfarmv1.SubmitRequest) error {
	value, err := s.value()
	if err != nil {
		return err
	}
	if req.Secrets == nil {
		req.Secrets = map[string][]byte{}
	}
	req.Secrets[s.id] = value
	return nil
}

// readSpec reads a job from a YAML file, and the path of its context if that is not
// a git repository. Paths in it are relative to its folder.
func readSpec(cmd *cobra.Command, path string) (*archfarmv1.SubmitRequest, string, error) {
	var data []byte
	var err error
	if path == "-" {
		data, err = io.ReadAll(io.LimitReader(cmd.InOrStdin(), spec.MaxFile+1))
	} else {
		data, err = file.Read(path, spec.MaxFile)
	}
	if err != nil {
		return nil, "", fmt.Errorf("--spec: reading the job: %w", err)
	}
	job, err := spec.FromYAML(data)
	if err != nil {
		return nil, "", fmt.Errorf("--spec %s: %w", path, err)
	}
	from := func(name string) string {
		if name == "" || name == "-" || filepath.IsAbs(name) || path == "-" {
			return name
		}
		return filepath.Join(filepath.Dir(path), name)
	}
	for _, s := range job.Secrets {
		if err := (secretFlag{id: s.ID, env: s.Env, src: from(s.File)}).send(job.Request); err != nil {
			return nil, "", fmt.Errorf("--spec %s: %w", path, err)
		}
	}
	return job.Request, from(job.Local), nil
}
