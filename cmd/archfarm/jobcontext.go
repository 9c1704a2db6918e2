package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/contextpack"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// sendContext uploads a folder or an archive, and names it in the specification.
func sendContext(ctx context.Context, cmd *cobra.Command, farm *client.Client, req *archfarmv1.SubmitRequest, local string) error {
	packed, err := packContext(cmd, local, req.GetSpec().GetDockerfile())
	if err != nil {
		return usageError{fmt.Errorf("--context %s: %w", local, err)}
	}
	defer packed.Close() //nolint:errcheck // it frees what the system frees too
	var sent, total int64
	uploaded, err := farm.Upload(ctx, packed, func(s, t int64) { sent, total = s, t })
	var changed *contextpack.ChangedError
	switch {
	case errors.As(err, &changed):
		return fmt.Errorf("--context %s: %w; try again when nothing writes there", local, changed)
	case err != nil:
		return err
	}
	if sent > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "uploaded %s of the context's %s\n", bytesText(total), bytesText(packed.Size()))
	}
	uploaded.Source = req.GetSpec().GetContext().GetSource()
	req.Spec.Context, req.Spec.Dockerfile = uploaded, packed.Dockerfile()
	return nil
}

func packContext(cmd *cobra.Command, local, dockerfile string) (*contextpack.Source, error) {
	options := contextpack.Options{Dockerfile: dockerfile}
	if isFolder(local) {
		if dockerfile != "" && !cmd.Flags().Changed("file") { // the job's file names it within the context
			options.Dockerfile = filepath.Join(local, dockerfile)
		}
		return contextpack.Folder(local, options)
	}
	if local == "-" {
		return contextpack.Tarball(cmd.InOrStdin(), options)
	}
	f, err := os.Open(local)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return contextpack.Tarball(f, options)
}

// bytesText is a size for people: "12.3 MiB".
func bytesText(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

const (
	dockerHub = "docker.io"
	// dockerHubKey is how Docker's configuration calls Docker Hub.
	dockerHubKey = "https://index.docker.io/v1/"
)

// addCredentials adds those for the registries that the job names, and for those of
// --credential, which Docker's configuration or its credential helpers have.
func addCredentials(cmd *cobra.Command, req *archfarmv1.SubmitRequest) error {
	if none, _ := cmd.Flags().GetBool("no-credentials"); none {
		return nil
	}
	more, _ := cmd.Flags().GetStringArray("credential")
	hosts := registryHosts(req.GetSpec(), more)
	if len(hosts) == 0 {
		return nil
	}
	list, err := credentialsFor(config.LoadDefaultConfigFile(cmd.ErrOrStderr()), hosts)
	if err != nil {
		return err
	}
	req.Credentials = list
	return nil
}

func credentialsFor(docker *configfile.ConfigFile, hosts []string) ([]*archfarmv1.RegistryCredential, error) {
	var out []*archfarmv1.RegistryCredential
	for _, host := range hosts {
		key := host
		if host == dockerHub {
			key = dockerHubKey
		}
		found, err := docker.GetAuthConfig(key)
		if err != nil {
			return nil, fmt.Errorf("reading the credentials for %s from Docker's configuration: %w; --no-credentials sends none", host, err)
		}
		if found.IdentityToken == "" && found.Password == "" {
			continue
		}
		out = append(out, &archfarmv1.RegistryCredential{Host: key, Username: found.Username, Password: found.Password, IdentityToken: found.IdentityToken})
	}
	return out, nil
}

// registryHosts are the registries that a job's tags and caches are at, and others,
// each once, in order.
func registryHosts(s *archfarmv1.JobSpec, others []string) []string {
	hosts := map[string]bool{}
	for _, tag := range s.GetTags() {
		hosts[hostOf(tag)] = true
	}
	for _, entry := range slices.Concat(s.GetCacheFrom(), s.GetCacheTo()) {
		if entry.GetType() == "registry" {
			hosts[hostOf(entry.GetAttrs()["ref"])] = true
		}
	}
	for _, host := range others {
		hosts[hostOf(strings.TrimSuffix(host, "/")+"/")] = true
	}
	return slices.SortedFunc(maps.Keys(hosts), cmp.Compare[string])
}

// hostOf is the registry of a reference, in which there may be templates: what is
// before the first slash, if it looks like a host, as Docker's references have it.
func hostOf(ref string) string {
	host, _, ok := strings.Cut(ref, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" && host == strings.ToLower(host) {
		return dockerHub
	}
	if host == "index.docker.io" || host == "registry-1.docker.io" {
		return dockerHub
	}
	return host
}
