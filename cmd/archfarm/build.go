package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	bk "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
)

func newBuild() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "build [flags] PATH|URL|-",
		Short: "Build at the farm as docker buildx build does, without docker",
		Long: `Build at the farm, with the flags and the progress of docker buildx build, and without
docker: files, secrets and the credentials in Docker's configuration stay here, and are
sent as the build needs them. The build ends with this command; archfarm submit is for
builds that outlive it.

The context is a folder, the URL of a git repository or of a tar archive, or - for a
tar archive on standard input. Without --push and --output, the result stays in the
farm's cache.

Exit codes: 0 built; 1 the build has failed; 2 the command line makes no sense.`,
		Example: `  archfarm build --platform linux/amd64,linux/arm64 -t registry.example.com/app:1.2 --push .
  archfarm build --target test --progress plain .
  archfarm build --platform linux/arm64 -o type=oci,dest=app.tar --metadata-file app.json .
  archfarm build --secret id=npm,env=NPM_TOKEN --ssh default --cache-from type=registry,ref=registry.example.com/app:cache https://git.example.com/app.git#main`,
		Args: oneArg("a folder, a URL, or - for a tar archive on standard input"),
		RunE: func(cmd *cobra.Command, args []string) error {
			mode, err := progressOf(cmd)
			if err != nil {
				return err
			}
			if quiet, _ := cmd.Flags().GetBool("quiet"); quiet {
				mode = progressui.QuietMode
			}
			opt, release, err := solveOpt(cmd, args[0])
			if err != nil {
				return usageError{err}
			}
			defer release()
			return build(cmd, mode, opt)
		},
	}
	buildFlags(cmd.Flags())
	progressFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	completeProgress(cmd)
	_ = cmd.RegisterFlagCompletionFunc("platform", completePlatforms) // fails only for flags that are none
	return cmd
}

func buildFlags(flags *pflag.FlagSet) {
	flags.StringP("file", "f", "", "the Dockerfile, - for standard input (default: PATH/Dockerfile)")
	flags.String("target", "", "the stage to build (default: the last one)")
	flags.StringSlice("platform", nil, "platforms to build for, as linux/amd64,linux/arm64; may repeat")
	flags.StringArrayP("tag", "t", nil, "name of the image, as registry.example.com/app:1.2; may repeat")
	flags.StringArray("build-arg", nil, "KEY=VALUE, or KEY for the environment's value; may repeat")
	flags.StringArray("build-context", nil, "NAME=PATH, NAME=URL or NAME=docker-image://IMAGE; may repeat")
	flags.StringArray("label", nil, "label of the image, as KEY=VALUE; may repeat")
	flags.StringArray("annotation", nil, "annotation, as KEY=VALUE or index:KEY=VALUE; may repeat")
	flags.StringArray("secret", nil, "secret for build steps: id=ID,env=VARIABLE or id=ID,src=FILE; may repeat")
	flags.StringArray("ssh", nil, "SSH agent or keys for build steps: default, or ID=SOCKET or ID=KEY,KEY; may repeat")
	flags.StringArray("allow", nil, "privilege for build steps: network.host or security.insecure; may repeat")
	flags.StringArrayP("output", "o", nil, "where the result goes: type=image|registry|oci|docker|tar|local,dest=…, a folder, or - ; may repeat")
	flags.Bool("push", false, "push the image to its names: --output type=registry")
	flags.StringArray("cache-from", nil, "cache to import: a reference, or type=registry,ref=…; may repeat")
	flags.StringArray("cache-to", nil, "cache to export, as type=registry,ref=…,mode=max; may repeat")
	flags.String("provenance", "", "provenance attestation: true, false, or attributes as mode=max")
	flags.String("sbom", "", "SBOM attestation: true, false, or attributes as generator=IMAGE")
	flags.Bool("no-cache", false, "build all steps anew")
	flags.Bool("pull", false, "ask registries for newer base images")
	flags.BoolP("quiet", "q", false, "show no progress, and print the image's digest")
	flags.String("metadata-file", "", "file for what is known of the result, as JSON")
	flags.String("iidfile", "", "file for the image's digest")
	markOwnLines(flags, "build-arg", "build-context", "label", "annotation", "secret", "ssh", "output", "cache-from", "cache-to")
}

// build runs the build, shown as mode says, and keeps what is known of its result.
func build(cmd *cobra.Command, mode progressui.DisplayMode, opt bk.SolveOpt) error {
	ctx := cmd.Context()
	endpoint, err := dialEndpoint(ctx, cmd)
	if err != nil {
		return err
	}
	defer endpoint.Close()
	updates, shown, err := display(context.WithoutCancel(ctx), cmd, mode) // a build that is interrupted is drawn to its end
	if err != nil {
		return err
	}
	answer, err := endpoint.Solve(ctx, nil, opt, updates) // closes updates
	if err := errors.Join(err, <-shown); err != nil {
		for _, source := range errdefs.Sources(err) {
			_ = source.Print(cmd.ErrOrStderr())
		}
		return farmFault(cmd, "building", err)
	}
	return keepResult(cmd, answer.ExporterResponse)
}

// dialEndpoint returns a BuildKit client of the farm, which is the caller's to close.
func dialEndpoint(ctx context.Context, cmd *cobra.Command) (*bk.Client, error) {
	a, creds, err := farmOf(cmd)
	if err != nil {
		return nil, err
	}
	authority := "localhost"
	if a.Network == "tcp" {
		authority = a.Addr
	}
	return bk.New(ctx, "passthrough:///farm", bk.WithGRPCDialOption(grpc.WithTransportCredentials(creds)), bk.WithGRPCDialOption(grpc.WithAuthority(authority)),
		bk.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.Dial(ctx) }))
}

// keepResult writes what --metadata-file and --iidfile ask for, and prints what
// --quiet does.
func keepResult(cmd *cobra.Command, answer map[string]string) error {
	flags := cmd.Flags()
	metadata, _ := flags.GetString("metadata-file")
	iidfile, _ := flags.GetString("iidfile")
	quiet, _ := flags.GetBool("quiet")
	digest := answer[exptypes.ExporterImageDigestKey]
	if config, ok := answer[exptypes.ExporterImageConfigDigestKey]; ok { // docker's image id, of one platform
		digest = config
	}
	if metadata != "" {
		if err := writeMetadata(metadata, answer); err != nil {
			return fmt.Errorf("writing --metadata-file: %w", err)
		}
	}
	if iidfile != "" {
		if err := os.WriteFile(iidfile, []byte(digest), 0o644); err != nil { //nolint:gosec // as docker writes it
			return fmt.Errorf("writing --iidfile: %w", err)
		}
	}
	if quiet && digest != "" {
		fmt.Fprintln(cmd.OutOrStdout(), digest)
	}
	return nil
}

// frontendAttrs are what the Dockerfile frontend is told.
func frontendAttrs(cmd *cobra.Command) (map[string]string, error) {
	flags := cmd.Flags()
	attrs := map[string]string{}
	if target, _ := flags.GetString("target"); target != "" {
		attrs["target"] = target
	}
	platforms, err := platformsOf(cmd)
	if err != nil {
		return nil, err
	}
	if len(platforms) > 0 {
		attrs["platform"] = strings.Join(platforms, ",")
	}
	if set, _ := flags.GetBool("no-cache"); set {
		attrs["no-cache"] = ""
	}
	if set, _ := flags.GetBool("pull"); set {
		attrs["image-resolve-mode"] = "pull"
	}
	for name, prefix := range map[string]string{"build-arg": "build-arg:", "label": "label:"} {
		list, _ := flags.GetStringArray(name)
		var values map[string]string
		if err := addPairs(&values, "--"+name, list, name == "build-arg"); err != nil {
			return nil, err
		}
		for key, value := range values {
			attrs[prefix+key] = value
		}
	}
	return attrs, attestations(cmd, attrs)
}

// attestations are asked for as buildx does: without a word about it, a small
// provenance within the image.
func attestations(cmd *cobra.Command, attrs map[string]string) error {
	for name, silent := range map[string]string{"provenance": "mode=min,inline-only=true", "sbom": "false"} {
		text, _ := cmd.Flags().GetString(name)
		if text == "" {
			text = silent
		}
		wanted, value, err := attestation(text)
		if err != nil {
			return fmt.Errorf("--%s %q: %w", name, text, err)
		}
		if wanted {
			attrs["attest:"+name] = value
		}
	}
	return nil
}

// attestation reads a truth value, or attributes.
func attestation(text string) (wanted bool, attrs string, err error) {
	switch text {
	case "true", "1":
		return true, "", nil
	case "false", "0":
		return false, "", nil
	}
	fields, err := fieldsOf(text)
	for _, f := range fields {
		if f.name == "disabled" && f.value == "true" {
			return false, "", nil
		}
	}
	return true, text, err
}
