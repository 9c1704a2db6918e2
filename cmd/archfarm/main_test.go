package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/goleak"
)

// asProgram makes the test binary the program itself, for tests of exit codes.
const asProgram = "TEST_AS_ARCHFARM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// program runs archfarm as a process of its own.
func program(t *testing.T, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append([]string{asProgram + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}, env...)
	cmd.Dir = t.TempDir()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func TestMain_ACommandLineThatMakesNoSenseIsExitCodeTwo(t *testing.T) {
	t.Parallel()
	file := func(content string) string {
		path := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, test := range map[string]struct {
		env, args []string
		words     []string
	}{
		"an unknown command":              {nil, []string{"nonsense"}, []string{`no command "nonsense"`, "--help"}},
		"a misspelt command":              {nil, []string{"coordinater"}, []string{`no command "coordinater"`, "did you mean coordinator?"}},
		"an unknown flag":                 {nil, []string{"coordinator", "--nonsense"}, []string{"--nonsense", "archfarm coordinator --help"}},
		"an argument too many":            {nil, []string{"workers", "all"}, []string{`"all"`, "archfarm workers"}},
		"an address that is none":         {nil, []string{"coordinator", "--data-dir", "x", "--listen", "nonsense"}, []string{"--listen", "nonsense"}},
		"no folder":                       {nil, []string{"coordinator"}, []string{"--data-dir"}},
		"no folder for all":               {nil, []string{"up", "--data-dir", ""}, []string{"--data-dir"}},
		"no build at a time":              {nil, []string{"coordinator", "--data-dir", "x", "--max-builds", "0"}, []string{"--max-builds", "at least 1"}},
		"a duration that is none":         {nil, []string{"coordinator", "--drain-timeout", "soon"}, []string{"drain-timeout", "soon"}},
		"a duration in the environment":   {[]string{"ARCHFARM_DRAIN_TIMEOUT=soon"}, []string{"coordinator"}, []string{"ARCHFARM_DRAIN_TIMEOUT", "soon"}},
		"an unknown level":                {nil, []string{"coordinator", "--data-dir", "x", "--log-level", "loud"}, []string{"--log-level", "loud", "debug"}},
		"an unknown format":               {[]string{"ARCHFARM_LOG_FORMAT=xml"}, []string{"coordinator", "--data-dir", "x"}, []string{"--log-format", "xml", "json"}},
		"a key that is too short":         {nil, []string{"worker", "--gossip-key", "abcd"}, []string{"16, 24 or 32 bytes"}},
		"an unknown output":               {nil, []string{"workers", "--output", "yaml"}, []string{"--output", "yaml", "json"}},
		"a farm that is no address":       {nil, []string{"workers", "--farm", "nowhere"}, []string{"--farm", "nowhere"}},
		"no slots":                        {nil, []string{"worker", "--slots", "0", "--coordinator", "127.0.0.1:1"}, []string{"--slots"}},
		"two buildkitds":                  {nil, []string{"worker", "--managed", "--buildkit", "unix:///x"}, []string{"--managed", "--buildkit"}},
		"nowhere to keep things":          {nil, []string{"worker", "--data-dir", ""}, []string{"--data-dir"}},
		"a label without a value":         {nil, []string{"worker", "--label", "zone"}, []string{"--label", "KEY=VALUE"}},
		"a label twice":                   {nil, []string{"worker", "--label", "zone=a", "--label", "zone=b"}, []string{"--label", "once"}},
		"a label that is none":            {nil, []string{"worker", "--label", "zone=a b"}, []string{"--label", "its value"}},
		"a disk that is full when empty":  {nil, []string{"worker", "--disk-high", "50"}, []string{"--disk-high 50", "--disk-low 90"}},
		"half a slot":                     {nil, []string{"worker", "--slots", "0.5"}, []string{"slots", "0.5"}},
		"a platform that is none":         {nil, []string{"worker", "--platform", "toaster", "--coordinator", "127.0.0.1:1"}, []string{"--platform", "toaster"}},
		"a buildkitd without an address":  {nil, []string{"worker", "--buildkit", "http://x"}, []string{"--buildkit", "http"}},
		"an unknown setting in the file":  {nil, []string{"workers", "--config", file("colour: red")}, []string{"config.yaml", `"colour"`}},
		"an unknown setting, environment": {[]string{"ARCHFARM_CONFIG=" + file("colour: red")}, []string{"workers"}, []string{"config.yaml", `"colour"`}},
		"a file that is not there":        {nil, []string{"workers", "--config", "not-there.yaml"}, []string{"not-there.yaml"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, stdout, stderr := program(t, test.env, test.args...)
			if code != exitUsage || stdout != "" {
				t.Errorf("exit code %d, output %q", code, stdout)
			}
			for _, word := range append(test.words, "archfarm: ") {
				if !strings.Contains(stderr, word) {
					t.Errorf("the message %q does not say %q", stderr, word)
				}
			}
		})
	}
}

func TestMain_AFarmThatDoesNotAnswerIsExitCodeOne(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "none.sock")
	code, _, stderr := program(t, nil, "workers", "--farm", "unix://"+socket)
	if code != exitError || !strings.Contains(stderr, socket) || !strings.Contains(stderr, "is the coordinator running") || strings.Contains(stderr, "rpc error") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

func TestMain_HelpAndVersionAreExitCodeZero(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"Usage:":                      {},
		"Available Commands":          {"--help"},
		"archfarm version " + version: {"--version"},
		"drain-timeout":               {"coordinator", "--help"},
	} {
		code, stdout, stderr := program(t, []string{"ARCHFARM_VERSION=1", "ARCHFARM_HELP=1"}, args...)
		if code != 0 || !strings.Contains(stdout, want) || stderr != "" {
			t.Errorf("archfarm %v: exit code %d, output %q, %q", args, code, stdout, stderr)
		}
	}
}

func TestCompletion_OfEveryShell(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		var out bytes.Buffer
		root := newRoot(nil)
		root.SetOut(&out)
		root.SetArgs([]string{"completion", shell})
		if err := root.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), "archfarm") {
			t.Errorf("%s: %v, %d bytes", shell, err, out.Len())
		}
	}
	var out bytes.Buffer
	root := newRoot(nil)
	root.SetOut(&out)
	root.SetErr(io.Discard)
	root.SetArgs([]string{cobra.ShellCompNoDescRequestCmd, "worker", "--slo"})
	if err := root.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), "--slots") {
		t.Errorf("of --slo: %v, %q", err, out.String())
	}
}

// A shell offers what makes sense, and names of files only where paths do.
func TestCompletion_OfFlagsAndArguments(t *testing.T) {
	t.Parallel()
	const none, files, folders = ":4\n", ":0\n", ":16\n"
	for line, want := range map[string]string{
		"jobs --state ":              strings.Join(jobStates(), "\n") + "\n" + none,
		"jobs --output ":             "table\njson\n" + none,
		"jobs --repo ":               none,
		"jobs ":                      none,
		"submit --output ":           "table\njson\n" + none,
		"submit --progress ":         strings.Join(progressModes, "\n") + "\n" + none,
		"submit --tag ":              none,
		"submit --file ":             files,
		"submit --cert-dir ":         folders,
		"submit --log-level ":        "debug\ninfo\nwarn\nerror\n" + none,
		"submit ":                    none,
		"tags ":                      none,
		"secret create --output ":    "table\njson\n" + none,
		"secret create --from-file ": files,
		"secret create ":             none,
		"backup ":                    files,
		"backup --data-dir ":         folders,
		"build ":                     files,
		"build --output ":            files,
		"coordinator --push-policy ": "off\nwarn\nenforce\n" + none,
		"coordinator --store ":       none,
		"workers --output ":          "table\nwide\njson\n" + none,
	} {
		words := append([]string{cobra.ShellCompNoDescRequestCmd}, strings.Split(line, " ")...)
		if got := run(t, words...); !strings.HasPrefix(got, want) {
			t.Errorf("%q is completed to %q, want %q", line, got, want)
		}
	}
	// Whoever adds a flag that takes a path, names it in completion.go.
	for _, cmd := range commands() {
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			kind, _ := pflag.UnquoteUsage(f)
			path := strings.HasPrefix(f.Usage, "file ") || strings.HasPrefix(f.Usage, "folder ")
			if kind == "string" && path && !slices.Contains(fileFlags, f.Name) && !slices.Contains(folderFlags, f.Name) {
				t.Errorf("%s --%s takes a path, which a shell does not complete", cmd.CommandPath(), f.Name)
			}
		})
	}
}

// commands are all of archfarm's own.
func commands() []*cobra.Command { return under(newRoot(nil)) }

func under(cmd *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{cmd}
	for _, sub := range cmd.Commands() {
		all = append(all, under(sub)...)
	}
	return all
}

func TestHelp_HasExamplesThatWork(t *testing.T) {
	t.Parallel()
	for _, cmd := range commands() {
		if cmd.Short == "" || cmd.Example == "" {
			t.Errorf("%s has no description or no examples", cmd.CommandPath())
		}
		for line := range strings.Lines(strings.ReplaceAll(cmd.Example, "\\\n", " ")) {
			line, _, _ = strings.Cut(line, "#")
			words := strings.Fields(line)
			if len(words) == 0 || words[0] != "archfarm" {
				continue
			}
			found, rest, err := newRoot(nil).Find(words[1:])
			if err != nil || found.Parent() == nil {
				t.Errorf("%s: the example %q names no command: %v", cmd.CommandPath(), line, err)
				continue
			}
			if err := found.ParseFlags(rest); err != nil {
				t.Errorf("%s: the example %q: %v", cmd.CommandPath(), line, err)
			}
		}
	}
}

func TestExitCode_FindsTheUsersMistakeUnderWhateverWrapsIt(t *testing.T) {
	t.Parallel()
	if code := exitCode(errors.Join(context.Canceled, usageError{errors.New("no")})); code != exitUsage {
		t.Errorf("of a usage error: %d", code)
	}
	if code := exitCode(context.Canceled); code != exitError {
		t.Errorf("of another: %d", code)
	}
}
