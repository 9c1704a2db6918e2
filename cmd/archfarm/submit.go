package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/coordinator/job/spec"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func newSubmit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "submit",
		Short: "Submit a job: a build that outlives this command, published as one digest",
		Long: `Submit a job and print its id. The job is durable then: it is built for all its
platforms, and its tags are published as one digest or not at all, whatever happens to
this machine or to a coordinator.

The context is a git repository, whose commit is pinned at submission; a folder,
uploaded as far as the farm has not got it, .dockerignore honoured; or a tar archive
(- for standard input). Tags may contain {{.GitSHA}}, {{.ShortSHA}}, {{.Branch}},
{{.Tag}}, {{.Date}}, {{.Version}}, {{.Major}}, {{.Minor}} and {{.Patch}}.

With -f the job is read from a YAML file, in which paths are relative to its folder;
flags win over it, and lists of theirs replace the file's. Secrets, and the credentials
in Docker's configuration for the registries that tags and caches name, are sent with
the job and encrypted there.

Exit codes: 0 submitted, or with --wait, succeeded; 1 the job has failed, or cannot be
submitted; 2 the command line or the job makes no sense; 3 --wait-timeout has passed,
and the job goes on; 4 the job was cancelled.`,
		Example: `  archfarm submit --context https://git.example.com/app.git#main --platform linux/amd64,linux/arm64 --tag registry.example.com/app:{{.GitSHA}}
  archfarm submit --context . --platform linux/arm64 --tag registry.example.com/app:{{.ShortSHA}} --secret id=npm,env=NPM_TOKEN --wait
  archfarm submit -f job.yaml --request-id "$CI_PIPELINE_ID" --output json
  git archive HEAD | archfarm submit --context - --platform linux/amd64 --wait --wait-timeout 30m`,
		Args: submitArgs,
		RunE: runSubmit,
	}
	specFlags(cmd.Flags())
	flags := cmd.Flags()
	flags.StringP("spec", "f", "", "YAML file with the job, - for standard input (the Dockerfile is --file)")
	flags.String("request-id", "", "makes submitting idempotent, as a pipeline's run does that is started again: the same id is the same job, however often it is submitted")
	flags.Bool("no-credentials", false, "send no registry credentials of Docker's configuration")
	flags.StringArray("credential", nil, "send the credentials for this registry too, as for base images; may repeat")
	flags.Bool("wait", false, "show the job's progress until it has ended")
	flags.Duration("wait-timeout", 0, "how long --wait waits at most (default: for ever)")
	progressFlag(flags)
	outputFlag(flags)
	farmFlags(flags)
	completeProgress(cmd)
	_ = cmd.RegisterFlagCompletionFunc("platform", completePlatforms) // fails only for flags that are none
	return cmd
}

// specFlags are those that say what a job is.
func specFlags(flags *pflag.FlagSet) {
	flags.String("context", "", "what to build: GIT_URL#REF:SUBDIR, a folder, a tar archive, or - for one on standard input")
	flags.String("file", "", "the Dockerfile (default: Dockerfile in the context)")
	flags.String("target", "", "the stage to build (default: the last one)")
	flags.StringSlice("platform", nil, "platforms to build for, as linux/amd64,linux/arm64; may repeat")
	flags.StringArray("tag", nil, "what to publish, as registry.example.com/app:{{.GitSHA}}; may repeat. Building a commit again makes another digest, which an immutable tag refuses: use --request-id")
	flags.StringArray("build-arg", nil, "KEY=VALUE, or KEY for the environment's value; may repeat")
	flags.StringArray("label", nil, "label of the images, as KEY=VALUE; may repeat")
	flags.StringArray("annotation", nil, "annotation of the image index, as KEY=VALUE; may repeat")
	flags.StringArray("secret", nil, "secret for build steps: id=ID,env=VARIABLE or id=ID,src=FILE, or of the farm's: id=ID,name=NAME; may repeat")
	flags.StringArray("cache-from", nil, "cache to import: a reference, or type=registry,ref=…; may repeat")
	flags.StringArray("cache-to", nil, "cache to export, as type=registry,ref=…,mode=max; may repeat")
	attestFlag(flags, "provenance", "provenance attestation: true, false, or attributes as --provenance=mode=max")
	attestFlag(flags, "sbom", "SBOM attestation: true, false, or attributes as --sbom=generator=IMAGE")
	flags.Bool("no-cache", false, "build all steps anew")
	flags.Bool("pull", false, "ask registries for newer base images")
	flags.Int32("priority", 0, "jobs of a higher priority start first; -100 to 100")
	flags.Duration("timeout", 0, "how long the job may take from its start (default: the coordinator's)")
	flags.Int32("max-attempts", 0, "how often each platform is tried when a worker or a registry fails (default: the coordinator's)")
	flags.Bool("overwrite-newer", false, "let an older commit replace a newer one behind a mutable tag")
	flags.Bool("registry-insecure", false, "allow plain HTTP and unknown certificates to the registries of the tags")
	flags.StringArray("metadata", nil, "KEY=VALUE that the job is listed with, as the pipeline's URL; may repeat")
	markOwnLines(flags, "build-arg", "label", "annotation", "secret", "cache-from", "cache-to", "metadata")
}

// attestFlag is a flag that means true when it stands alone.
func attestFlag(flags *pflag.FlagSet, name, usage string) {
	flags.String(name, "", usage)
	flags.Lookup(name).NoOptDefVal = "true"
}

// submitArgs takes no argument but what was meant for --provenance or --sbom: these
// may stand alone, so that the parser leaves the mode=max of "--provenance mode=max",
// as docker's users write it, where an argument would be.
func submitArgs(cmd *cobra.Command, args []string) error {
	flags := cmd.Flags()
	for _, arg := range args {
		for _, name := range []string{"provenance", "sbom"} {
			value, _ := flags.GetString(name)
			if flags.Changed(name) && value == "true" && isAttestation(name, arg) {
				_ = flags.Set(name, arg) // a string's fails never
				arg = ""
				break
			}
		}
		if arg != "" {
			return usageError{fmt.Errorf("%q takes no argument %q; name the context with --context", cmd.CommandPath(), arg)}
		}
	}
	return nil
}

// isAttestation tells whether a word can be the value of the flag.
func isAttestation(flag, word string) bool {
	if word == "true" || word == "false" {
		return true
	}
	fields, err := fieldsOf(word)
	return err == nil && (flag == "sbom") == slices.ContainsFunc(fields, func(f field) bool { return f.name == "generator" })
}

func runSubmit(cmd *cobra.Command, _ []string) error {
	output, err := outputOf(cmd)
	if err != nil {
		return err
	}
	waiting, err := waitingOf(cmd, output)
	if err != nil {
		return err
	}
	req, local, err := submission(cmd)
	if err != nil {
		return err
	}
	if err := addCredentials(cmd, req); err != nil {
		return err
	}
	return withFarm(cmd, "submitting the job", func(ctx context.Context, farm *client.Client) error {
		if local != "" {
			if err := sendContext(ctx, cmd, farm, req, local); err != nil {
				return err
			}
		}
		job, existed, err := farm.Submit(ctx, req)
		if err != nil {
			return refusal(err)
		}
		if waiting == nil {
			return tellSubmitted(cmd, output, job, existed)
		}
		if output == "table" {
			fmt.Fprintln(cmd.OutOrStdout(), printable(job.GetId()))
		} else { // the object is printed at the end
			fmt.Fprintf(cmd.ErrOrStderr(), "submitted job %s\n", printable(job.GetId()))
		}
		return watchJob(ctx, cmd, farm, job.GetId(), *waiting)
	})
}

// waitingOf is how --wait waits, nil without it.
func waitingOf(cmd *cobra.Command, output string) (*jobWatch, error) {
	wait, _ := cmd.Flags().GetBool("wait")
	timeout, _ := cmd.Flags().GetDuration("wait-timeout")
	mode, err := progressOf(cmd)
	switch {
	case err != nil:
		return nil, err
	case timeout < 0 || timeout > 0 && !wait:
		return nil, usageError{fmt.Errorf("--wait-timeout %s: it is how long --wait waits at most, 0 for ever; the job's own limit is --timeout", timeout)}
	case !wait:
		return nil, nil
	}
	return &jobWatch{mode: mode, timeout: timeout, output: output}, nil
}

func tellSubmitted(cmd *cobra.Command, output string, job *archfarmv1.Job, existed bool) error {
	if output == "json" {
		shown := jobOf(job)
		shown.Existed = &existed
		return printJSON(cmd.OutOrStdout(), shown)
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout(), printable(job.GetId()))
	return err
}

// submission is what the flags and the file ask for, and the path of the context
// that is to be uploaded first; empty: there is none.
func submission(cmd *cobra.Command) (*archfarmv1.SubmitRequest, string, error) {
	req, local := &archfarmv1.SubmitRequest{Spec: &archfarmv1.JobSpec{}}, ""
	if path, _ := cmd.Flags().GetString("spec"); path != "" {
		var err error
		if req, local, err = readSpec(cmd, path); err != nil {
			return nil, "", usageError{err}
		}
	}
	if cmd.Flags().Changed("request-id") {
		req.RequestId, _ = cmd.Flags().GetString("request-id")
	}
	given, err := contextFlag(cmd, req.Spec)
	if err != nil {
		return nil, "", usageError{err}
	}
	if cmd.Flags().Changed("context") {
		local = given
	}
	if err := errors.Join(specOf(cmd, req.Spec), secretsOf(cmd, req)); err != nil {
		return nil, "", usageError{err}
	}
	if local == "" && req.Spec.GetContext() == nil {
		return nil, "", usageError{errors.New("there is nothing to build: name a git repository, a folder or a tar archive with --context")}
	}
	if local != "" && isFolder(local) && req.Spec.GetContext().GetSource() == nil {
		req.Spec.Context = &archfarmv1.BuildContext{Source: gitSource(cmd.Context(), local, os.LookupEnv)}
	}
	return req, local, check(req, local)
}

// contextFlag puts a git repository that --context names into the specification, and
// returns what else it names.
func contextFlag(cmd *cobra.Command, s *archfarmv1.JobSpec) (local string, err error) {
	text, _ := cmd.Flags().GetString("context")
	if text == "" {
		return "", nil
	}
	s.Context = nil
	if isFolder(text) {
		return text, nil
	}
	git, local, err := spec.ParseContext(text)
	if err != nil {
		return "", fmt.Errorf("--context: %w", err)
	}
	if git != nil {
		s.Context = &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Git{Git: git}}
	}
	return local, nil
}

// check finds what the farm would refuse before a context is sent there in vain.
func check(req *archfarmv1.SubmitRequest, local string) error {
	if local == "" {
		return refusal(spec.Validate(req))
	}
	whole := &archfarmv1.SubmitRequest{RequestId: req.GetRequestId(), Spec: withContext(req.GetSpec()), Secrets: req.GetSecrets()}
	if isFolder(local) { // its path is this machine's, which packing looks at
		whole.Spec.Dockerfile = ""
	}
	_, tags := spec.Tags(whole.GetSpec(), whole.GetSpec().GetContext().GetSource(), time.Now())
	return refusal(spec.Validate(whole), tags)
}

// refusal lists what is wrong with a job, by the flags that say so; what is about
// something else is returned as it is.
func refusal(refused ...error) error {
	var text strings.Builder
	text.WriteString("the job cannot be taken:")
	told := map[string]bool{}
	for _, err := range refused {
		faults := client.Faults(err)
		if err != nil && len(faults) == 0 {
			return err
		}
		for _, f := range faults {
			where := f.Field
			if flag := flagOf(f.Field); flag != "" {
				where = "--" + flag + " (" + f.Field + ")"
			}
			if line := printable(strings.TrimPrefix(where+": "+f.Description, ": ")); !told[line] {
				told[line] = true
				text.WriteString("\n  " + line)
			}
		}
	}
	if len(told) == 0 {
		return nil
	}
	return usageError{errors.New(text.String())}
}

// flagOf is the flag that a field of a SubmitRequest comes from; empty for none.
func flagOf(field string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(field, "spec."), "[")
	name, _, _ = strings.Cut(name, ".")
	return map[string]string{
		"context": "context", "dockerfile": "file", "target": "target", "platforms": "platform", "tags": "tag", "build_args": "build-arg",
		"labels": "label", "annotations": "annotation", "secrets": "secret", "cache_from": "cache-from", "cache_to": "cache-to",
		"provenance": "provenance", "sbom": "sbom", "priority": "priority", "timeout": "timeout", "max_attempts": "max-attempts",
		"overwrite_newer": "overwrite-newer", "insecure_registry": "registry-insecure", "metadata": "metadata",
		"request_id": "request-id", "credentials": "credential",
	}[name]
}
