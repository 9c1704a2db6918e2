// Command conformance runs the integration suites of buildx and BuildKit twice, against a plain buildkitd
// and against a farm in its place, and compares: what passes on the former must pass on the latter, but for
// the differences that are listed, each with its reason. `make conformance` runs it; see docs/development.md.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var o options
	flag.StringVar(&o.suite, "suite", "buildx", "buildx, or one of BuildKit's: client, dockerfile, buildctl")
	flag.StringVar(&o.run, "run", "", "only tests that match this regular expression")
	flag.StringVar(&o.only, "only", "", "plain or farm: run against just that one, without a comparison")
	flag.IntVar(&o.workers, "workers", 2, "workers of the farm")
	flag.IntVar(&o.parallel, "parallel", 4, "tests at a time")
	flag.DurationVar(&o.timeout, "timeout", 2*time.Hour, "for each of the two runs")
	flag.StringVar(&o.dir, "dir", "bin/conformance", "folder for test programs, images and logs")
	flag.StringVar(&o.archfarm, "archfarm", "bin/archfarm", "the archfarm to test")
	flag.StringVar(&o.known, "known", "conformance/known.txt", "file of known differences")
	flag.Parse()
	if err := o.conform(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

type options struct {
	suite, run, only, dir, known, archfarm string
	workers, parallel                      int
	timeout                                time.Duration
}

// maxAgain is beyond what chance explains.
const maxAgain = 10

// errNothing is what a pattern that matches nothing gives.
var errNothing = errors.New("the pattern matches none")

// suites are packages of tests by name: the module and the folder in it.
var suites = map[string][2]string{
	"buildx":     {"github.com/docker/buildx", "tests"},
	"client":     {"github.com/moby/buildkit", "client"},
	"dockerfile": {"github.com/moby/buildkit", "frontend/dockerfile"},
	"buildctl":   {"github.com/moby/buildkit", "cmd/buildctl"},
}

// errDiffers is the outcome of a run that worked, and found what it looks for.
var errDiffers = errors.New("the farm differs from a plain buildkitd in what is listed above")

func (o options) conform(ctx context.Context, w io.Writer) error {
	if _, ok := suites[o.suite]; !ok {
		return fmt.Errorf("unknown suite %q: buildx, client, dockerfile or buildctl", o.suite)
	}
	if o.run == "" && o.suite != "buildx" {
		o.run = "Integration$/.*/worker=oci$" // the others need containerd or rootless set-ups
	}
	known, err := readKnown(o.known)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	kit, err := prepare(ctx, dir, o.suite)
	if err != nil {
		return err
	}
	if o.only != "" {
		results, err := kit.test(ctx, o, o.only)
		if err != nil {
			return err
		}
		report(w, o.only, results)
		return nil
	}
	plain, err := kit.test(ctx, o, "plain")
	if err != nil {
		return err
	}
	farm, err := kit.test(ctx, o, "farm")
	if err != nil {
		return err
	}
	report(w, "plain", plain)
	report(w, "farm", farm)
	if farm, err = kit.again(ctx, o, w, plain, farm, known); err != nil {
		return err
	}
	if differences := compare(plain, farm, known); len(differences) > 0 {
		for _, d := range differences {
			fmt.Fprintln(w, d)
		}
		return errDiffers
	}
	fmt.Fprintln(w, "every test that passes on a plain buildkitd passes on the farm, but for the known differences")
	return nil
}

// again runs what differed once more, one at a time: the suites know time limits, and some of their tests
// fail now and then on a plain buildkitd, too. Whatever passes only then is named.
func (k *kit) again(ctx context.Context, o options, w io.Writer, plain, farm map[string]outcome, known []difference) (map[string]outcome, error) {
	differing := regressions(plain, farm, known)
	if len(differing) == 0 || len(differing) > maxAgain {
		return farm, nil
	}
	o.run, o.parallel = pattern(differing), 1
	second, err := k.test(ctx, o, "farm")
	if err != nil {
		return nil, err
	}
	out := maps.Clone(farm)
	for _, name := range differing {
		if second[name] == pass {
			fmt.Fprintln(w, name+": passed when it was run again, alone")
			out[name] = pass
		}
	}
	return out, nil
}

// kit is what a run needs, as paths.
type kit struct {
	dir, suite, tools, mirror, source string
}

// prepare builds the suite, the shim and the frontend, and makes the images.
func prepare(ctx context.Context, dir, suite string) (*kit, error) {
	tools, err := filepath.Abs("bin/tools")
	if err != nil {
		return nil, err
	}
	k := &kit{dir: dir, suite: suite, tools: tools, mirror: filepath.Join(dir, "mirror")}
	if err := os.MkdirAll(filepath.Join(dir, "farm"), 0o755); err != nil { //nolint:gosec // programs
		return nil, err
	}
	module, folder := suites[suite][0], suites[suite][1]
	root, err := k.module(ctx, module)
	if err != nil {
		return nil, err
	}
	k.source = filepath.Join(root, folder)
	buildkit, err := k.module(ctx, "github.com/moby/buildkit")
	if err != nil {
		return nil, err
	}
	frontend := filepath.Join(dir, "dockerfile-frontend")
	for _, build := range []struct {
		in   string
		args []string
	}{
		// In their own modules, whose go.mod knows what their tests need.
		{root, []string{"test", "-c", "-o", k.program(), "./" + folder}},
		{buildkit, []string{"build", "-o", frontend, "./frontend/dockerfile/cmd/dockerfile-frontend"}},
		{".", []string{"build", "-o", filepath.Join(dir, "farm", "buildkitd"), "./conformance/buildkitd"}},
	} {
		if err := run(ctx, build.in, []string{"CGO_ENABLED=0"}, "go", build.args...); err != nil {
			return nil, err
		}
	}
	return k, fill(ctx, k.mirror, filepath.Join(tools, "registry"), frontend)
}

func (k *kit) program() string { return filepath.Join(k.dir, k.suite+".test") }

// module is the folder of a module's source, of the version that the tools are built from.
func (k *kit) module(ctx context.Context, path string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", path)
	cmd.Dir, cmd.Stderr = "tools/runtime", os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("finding the source of %s: %w", path, err)
	}
	return string(out[:len(out)-1]), nil
}

func run(ctx context.Context, dir string, env []string, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.Env = dir, os.Stderr, os.Stderr, append(os.Environ(), env...)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running %s %v: %w", program, args, err)
	}
	return nil
}

// test runs the suite against a plain buildkitd or against the farm.
func (k *kit) test(ctx context.Context, o options, backend string) (map[string]outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout+time.Minute)
	defer cancel()
	temp, err := os.MkdirTemp("", "conformance")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(temp) //nolint:errcheck // what is left is in a folder for temporary files
	defer sweep(time.Now())
	archfarm, err := filepath.Abs(o.archfarm)
	if err != nil {
		return nil, err
	}
	path := k.tools
	if backend == "farm" {
		path = filepath.Join(k.dir, "farm") + ":" + path
	}
	args := []string{"tool", "test2json", "-t", k.program(), "-test.v=test2json", "-test.timeout=" + o.timeout.String(), "-test.parallel=" + strconv.Itoa(o.parallel)}
	if o.run != "" {
		args = append(args, "-test.run="+o.run)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Stderr = k.source, os.Stderr // the tests read files beside them
	cmd.Env = append(os.Environ(), "PATH="+path+":"+os.Getenv("PATH"), "TMPDIR="+temp, "GOMAXPROCS="+strconv.Itoa(o.parallel),
		"BUILDKIT_REGISTRY_MIRROR_DIR="+k.mirror, "FRONTEND_CLIENT_ONLY="+os.Getenv("FRONTEND_CLIENT_ONLY"),
		"ARCHFARM_CONFORMANCE_BUILDKITD="+filepath.Join(k.tools, "buildkitd"), "ARCHFARM_CONFORMANCE_ARCHFARM="+archfarm,
		"ARCHFARM_CONFORMANCE_WORKERS="+strconv.Itoa(o.workers))
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(k.dir, k.suite+"-"+backend+".json"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	results, err := read(io.TeeReader(out, log))
	ended := cmd.Wait()
	if err != nil {
		return nil, err
	}
	if len(results) == 0 {
		return nil, fmt.Errorf("no test of %s was run against %s: %w", k.suite, backend, errors.Join(errNothing, ended))
	}
	return results, nil
}

// buildxFolders are where buildx's suite keeps the clients' configuration, whatever TMPDIR says.
const buildxFolders = "/tmp/buildx-integration-*"

// sweep removes those that were made since then.
func sweep(since time.Time) {
	folders, _ := filepath.Glob(buildxFolders) // the pattern is well-formed
	for _, f := range folders {
		if info, err := os.Stat(f); err == nil && !info.ModTime().Before(since) {
			_ = os.RemoveAll(f) // what is left is in a folder for temporary files
		}
	}
}

var port = regexp.MustCompile(`listening on 127\.0\.0\.1:(\d+)`)

// listening reads a registry's log until it tells its address.
func listening(log io.Reader) (string, error) {
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		if m := port.FindStringSubmatch(lines.Text()); m != nil {
			return "localhost:" + m[1], nil
		}
	}
	return "", errors.New("it ended without saying where it listens")
}
