package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/archfarm/archfarm/coordinator"
)

// settings is where a command's come from.
type settings struct {
	args []string
	env  map[string]string
	file string // content
}

// apply gives a subcommand its settings, as running it does.
func (s settings) apply(t *testing.T, name string) (*cobra.Command, error) {
	t.Helper()
	cmd, _, err := newRoot(nil).Find([]string{name})
	if err != nil {
		t.Fatal(err)
	}
	args := s.args
	if s.file != "" {
		path := filepath.Join(t.TempDir(), "archfarm.yaml")
		if err := os.WriteFile(path, []byte(s.file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append([]string{"--config", path}, args...)
	}
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return cmd, applySources(cmd, func(name string) (string, bool) {
		v, ok := s.env[name]
		return v, ok
	})
}

func (s settings) coordinator(t *testing.T) coordinator.Config {
	t.Helper()
	cmd, err := s.apply(t, "coordinator")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := coordinatorConfig(cmd, nil)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestSettings_TheCommandLineWinsOverTheEnvironmentAndThatOverTheFile(t *testing.T) {
	t.Parallel()
	all := settings{
		args: []string{"--data-dir", "flag"},
		env:  map[string]string{"ARCHFARM_DATA_DIR": "env", "ARCHFARM_NAME": "env"},
		file: "data-dir: file\nname: file\nhttp: file:1\n",
	}
	cfg := all.coordinator(t)
	got := []string{cfg.DataDir, cfg.Name, cfg.HTTP, cfg.Gossip}
	if want := []string{"flag", "env", "file:1", coordinator.DefaultGossip}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSettings_EmptyIsAValueToo(t *testing.T) {
	t.Parallel()
	for from, s := range map[string]settings{
		"flag": {args: []string{"--data-dir", "x", "--http", ""}},
		"env":  {args: []string{"--data-dir", "x"}, env: map[string]string{"ARCHFARM_HTTP": ""}},
		"file": {args: []string{"--data-dir", "x"}, file: `http: ""`},
	} {
		if cfg := s.coordinator(t); cfg.HTTP != "" {
			t.Errorf("%s: %q", from, cfg.HTTP)
		}
	}
}

func TestSettings_Lists(t *testing.T) {
	t.Parallel()
	base := []string{"--data-dir", "x"}
	for name, test := range map[string]struct {
		settings
		want []string
	}{
		"default":                         {settings{args: base}, []string{}},
		"flags":                           {settings{args: append(base, "--join", "a:1", "--join", "b:2")}, []string{"a:1", "b:2"}},
		"environment":                     {settings{args: base, env: map[string]string{"ARCHFARM_JOIN": "a:1, b:2,"}}, []string{"a:1", "b:2"}},
		"nothing in the environment":      {settings{args: base, env: map[string]string{"ARCHFARM_JOIN": ""}, file: "join: [c:3]"}, []string{}},
		"a list in the file":              {settings{args: base, file: "join: [a:1, 'b:2']"}, []string{"a:1", "b:2"}},
		"one value in the file":           {settings{args: base, file: "join: a:1"}, []string{"a:1"}},
		"an empty list in the file":       {settings{args: base, file: "join: []"}, []string{}},
		"no value in the file":            {settings{args: base, file: "join:\nname: ~"}, []string{}},
		"flags instead of, not as well":   {settings{args: append(base, "--join", "a:1"), env: map[string]string{"ARCHFARM_JOIN": "b:2"}, file: "join: [c:3]"}, []string{"a:1"}},
		"environment instead of the file": {settings{args: base, env: map[string]string{"ARCHFARM_JOIN": "b:2"}, file: "join: [c:3]"}, []string{"b:2"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := test.coordinator(t)
			if !slices.Equal(cfg.Join, test.want) {
				t.Errorf("got %q, want %q", cfg.Join, test.want)
			}
			if cfg.Name == "" || cfg.Name == "~" {
				t.Errorf("the name is %q", cfg.Name)
			}
		})
	}
}

func TestSettings_ListsWhoseValuesHaveCommasStandOnLines(t *testing.T) {
	t.Parallel()
	policy := "repository=r.example/team/**,push=enforce,mutable=latest;@semver"
	for name, value := range map[string]string{"one": policy, "two": policy + "\n repository=r.example/**,push=off \n\n"} {
		cfg := settings{args: []string{"--data-dir", "x"}, env: map[string]string{"ARCHFARM_TAG_POLICY": value}}.coordinator(t)
		if want := map[string]int{"one": 1, "two": 2}[name]; len(cfg.Policy.Rules) != want {
			t.Errorf("%s: %d rules: %+v", name, len(cfg.Policy.Rules), cfg.Policy.Rules)
		}
	}
	for command, flags := range map[string][]string{
		"submit": {"secret", "build-arg", "label", "annotation", "cache-from", "cache-to", "metadata"},
		"build":  {"secret", "build-arg", "label", "annotation", "cache-from", "cache-to", "build-context", "ssh", "output"},
	} {
		for _, flag := range flags {
			cmd, err := settings{env: map[string]string{envName(flag): "id=a,src=b c\nid=d,e"}}.apply(t, command)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := cmd.Flags().GetStringArray(flag); err != nil || !slices.Equal(got, []string{"id=a,src=b c", "id=d,e"}) {
				t.Errorf("%s --%s: %q, %v", command, flag, got, err)
			}
		}
	}
	cmd, err := settings{env: map[string]string{"ARCHFARM_LABEL": "zone=a,rack=b\nsite=c", "ARCHFARM_PLATFORM": "linux/arm64"}}.apply(t, "worker")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := cmd.Flags().GetStringArray("label"); err != nil || !slices.Equal(got, []string{"zone=a", "rack=b", "site=c"}) {
		t.Errorf("a worker's labels: %q, %v", got, err)
	}
}

func TestSettings_OfEveryType(t *testing.T) {
	t.Parallel()
	cfg := settings{file: "data-dir: x\npprof: true\ndrain-timeout: 90s\nlisten: [unix:///run/a.sock, 127.0.0.1:1]\nslots: 3\n"}.coordinator(t) // slots are a worker's: one file may serve both
	if !cfg.Pprof || cfg.DrainTimeout != 90*time.Second || len(cfg.Listen) != 2 || cfg.Listen[0].Addr != "/run/a.sock" {
		t.Errorf("read as %+v", cfg)
	}
}

func TestSettings_Refused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		settings
		words []string
	}{
		"an unknown one":              {settings{file: "data-dir: x\ncolour: red"}, []string{"archfarm.yaml", `no setting "colour"`}},
		"another file":                {settings{file: "config: other.yaml"}, []string{`no setting "config"`}},
		"help":                        {settings{file: "help: true"}, []string{`no setting "help"`}},
		"a list for one value":        {settings{file: "data-dir: [a, b]"}, []string{"archfarm.yaml", `"data-dir"`, "one value"}},
		"nothing for one value":       {settings{file: "data-dir: []"}, []string{`"data-dir"`, "one value"}},
		"a map":                       {settings{file: "listen: {a: b}"}, []string{`"listen"`, "line 1"}},
		"a list of lists":             {settings{file: "a: b\nlisten:\n- [a]"}, []string{`"listen"`, "line 3"}},
		"a list with a hole":          {settings{file: "listen: [a, ~]"}, []string{`"listen"`}},
		"an alias":                    {settings{file: "a: &x b\nlisten: *x"}, []string{`"listen"`, "line 2"}},
		"twice":                       {settings{file: "name: a\nname: b"}, []string{"archfarm.yaml", "name"}},
		"two documents":               {settings{file: "name: a\n---\nname: b"}, []string{"one YAML document"}},
		"no settings at all":          {settings{file: "- a\n- b"}, []string{"archfarm.yaml"}},
		"not YAML":                    {settings{file: "a: [b"}, []string{"archfarm.yaml"}},
		"a file without end":          {settings{file: "name: a\n#" + strings.Repeat("x", maxConfig)}, []string{"archfarm.yaml", "larger than"}},
		"a bad value in the file":     {settings{file: "pprof: perhaps"}, []string{"archfarm.yaml", "pprof", "perhaps"}},
		"a bad value in a variable":   {settings{env: map[string]string{"ARCHFARM_PPROF": "perhaps"}}, []string{"ARCHFARM_PPROF", "perhaps"}},
		"several bad ones, all named": {settings{env: map[string]string{"ARCHFARM_PPROF": "perhaps", "ARCHFARM_DRAIN_TIMEOUT": "soon"}}, []string{"ARCHFARM_PPROF", "ARCHFARM_DRAIN_TIMEOUT"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := test.apply(t, "coordinator")
			if err == nil {
				t.Fatal("accepted")
			}
			for _, word := range test.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("error %q does not say %q", err, word)
				}
			}
		})
	}
}

// Every flag of every command must be settable in each way.
func TestSettings_EveryFlagHasAVariable(t *testing.T) {
	t.Parallel()
	if got := envName("gossip-key-file"); got != "ARCHFARM_GOSSIP_KEY_FILE" {
		t.Errorf("the variable of --gossip-key-file is %s", got)
	}
	seen := map[string]string{}
	for _, cmd := range commands() {
		if err := cmd.ParseFlags(nil); err != nil {
			t.Fatal(err)
		}
		for _, name := range flagNames(cmd) {
			if other, ok := seen[envName(name)]; ok && other != name {
				t.Errorf("--%s and --%s have the same variable", name, other)
			}
			seen[envName(name)] = name
			if knownFlag(newRoot(nil), name) == nil && name != "help" {
				t.Errorf("--%s of %q is not known in files", name, cmd.CommandPath())
			}
		}
	}
}

func flagNames(cmd *cobra.Command) []string {
	var names []string
	for line := range strings.Lines(cmd.Flags().FlagUsages()) {
		if _, rest, ok := strings.Cut(line, "--"); ok {
			name, _, _ := strings.Cut(rest, " ")
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}

func TestGossipKey_InEitherNotation(t *testing.T) {
	t.Parallel()
	key := bytes.Repeat([]byte{0xfb, 0xef}, 16)
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("\n "+base64.StdEncoding.EncodeToString(key)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"hexadecimal": {"--gossip-key", hex.EncodeToString(key)},
		"upper case":  {"--gossip-key", strings.ToUpper(hex.EncodeToString(key))},
		"base64":      {"--gossip-key", base64.StdEncoding.EncodeToString(key)},
		"a file":      {"--gossip-key-file", file},
	} {
		if got := (settings{args: append(args, "--data-dir", "x")}).coordinator(t).GossipKey; !bytes.Equal(got, key) {
			t.Errorf("%s: %x", name, got)
		}
	}
	for _, size := range []int{16, 24, 32} {
		if got := (settings{args: []string{"--data-dir", "x", "--gossip-key", hex.EncodeToString(key[:size])}}).coordinator(t).GossipKey; len(got) != size {
			t.Errorf("of %d bytes: %x", size, got)
		}
	}
	if got := (settings{args: []string{"--data-dir", "x"}}).coordinator(t).GossipKey; got != nil {
		t.Errorf("of none: %x", got)
	}
}

func TestGossipKey_Refused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const secret = "not a key, but a secret"
	for name, test := range map[string]struct {
		args  []string
		usage bool
	}{
		"no notation at all": {[]string{"--gossip-key", secret}, true},
		"a wrong length":     {[]string{"--gossip-key", hex.EncodeToString(make([]byte, 20))}, true},
		"an empty file":      {[]string{"--gossip-key-file", write("empty", "\n")}, true},
		"a secret in a file": {[]string{"--gossip-key-file", write("secret", secret)}, true},
		"a file without end": {[]string{"--gossip-key-file", write("large", strings.Repeat("a", maxKeyFile+1))}, false},
		"no such file":       {[]string{"--gossip-key-file", filepath.Join(dir, "none")}, false},
		"both":               {[]string{"--gossip-key", "x", "--gossip-key-file", write("other", "x")}, true},
	} {
		cmd, err := settings{args: test.args}.apply(t, "worker")
		if err != nil {
			t.Fatal(err)
		}
		key, err := gossipKey(cmd)
		var usage usageError
		if err == nil || key != nil || errors.As(err, &usage) != test.usage {
			t.Errorf("%s: %x, %v", name, key, err)
			continue
		}
		if strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error tells the key: %v", name, err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, seed := range []string{
		"", "name: a", "listen: [a, b]\njoin:\n- c", "a: &x [b]\nc: *x", "a: ~\nb: null\n", "---\n---\n", "a: !!binary aGk=", "? [a]\n: b",
		"a: {b: c}", "<<: {a: b}", "1: 2\ntrue: false", "a: |\n  text\n", "\xff", "a: \"\\0\"", "&a [*a]",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseConfig("file", data)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "reading file: ") {
				t.Fatalf("the error %q does not name the file", err)
			}
			return
		}
		// What was read, written again, reads the same.
		for name, values := range got {
			if values == nil {
				t.Fatalf("%q has no values, but is there", name)
			}
		}
		again, err := yaml.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		same, err := parseConfig("file", again)
		if err != nil || !reflect.DeepEqual(got, same) {
			t.Fatalf("read as %q (%v), then as %q, %v", got, slices.Sorted(maps.Keys(got)), same, err)
		}
	})
}
