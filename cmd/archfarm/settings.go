package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/archfarm/archfarm/address"

	"github.com/archfarm/archfarm/file"
)

const (
	// maxConfig bounds a configuration file.
	maxConfig = 1 << 20
	// maxKeyFile bounds a file that holds a key.
	maxKeyFile = 4 << 10
)

// notSettings are flags that make sense on the command line only; config may be
// in the environment too.
var notSettings = []string{"config", "help", "version"}

// ownLines marks flags whose values may have commas of their own: in the environment
// each of them is a line.
const ownLines = "archfarm_own_lines"

func markOwnLines(flags *pflag.FlagSet, names ...string) {
	for _, name := range names {
		_ = flags.SetAnnotation(name, ownLines, []string{"true"}) // fails only for flags that are none
	}
}

// applySources fills every flag that the command line did not set from the
// environment, or else from the configuration file.
func applySources(cmd *cobra.Command, lookup func(string) (string, bool)) error {
	flags := cmd.Flags()
	path, _ := flags.GetString("config")
	if v, ok := lookup(envName("config")); ok && !flags.Changed("config") {
		path = v
	}
	file, err := readConfig(path)
	if err != nil {
		return err
	}
	for name := range file {
		if slices.Contains(notSettings, name) || knownFlag(cmd.Root(), name) == nil {
			return fmt.Errorf("reading %s: there is no setting %q", path, name)
		}
	}
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Changed || slices.Contains(notSettings, f.Name) {
			return
		}
		if v, ok := lookup(envName(f.Name)); ok {
			errs = append(errs, set(flags, f, fromEnv(f, v), "environment variable "+envName(f.Name)))
		} else if v, ok := file[f.Name]; ok {
			errs = append(errs, set(flags, f, v, path))
		}
	})
	return errors.Join(errs...)
}

// knownFlag finds a flag of any subcommand: one file may serve several.
func knownFlag(cmd *cobra.Command, name string) *pflag.Flag {
	if f := cmd.Flags().Lookup(name); f != nil {
		return f
	}
	if f := cmd.PersistentFlags().Lookup(name); f != nil {
		return f
	}
	for _, sub := range cmd.Commands() {
		if f := knownFlag(sub, name); f != nil {
			return f
		}
	}
	return nil
}

// fromEnv reads a variable: a list's values are separated by commas or ends of lines,
// those that may have commas by ends of lines only.
func fromEnv(f *pflag.Flag, v string) []string {
	if _, list := f.Value.(pflag.SliceValue); !list {
		return []string{v}
	}
	separators := ",\n"
	if f.Annotations[ownLines] != nil {
		separators = "\n"
	}
	values := []string{}
	for item := range strings.FieldsFuncSeq(v, func(r rune) bool { return strings.ContainsRune(separators, r) }) {
		if item = strings.TrimSpace(item); item != "" {
			values = append(values, item)
		}
	}
	return values
}

func set(flags *pflag.FlagSet, f *pflag.Flag, values []string, source string) error {
	if list, ok := f.Value.(pflag.SliceValue); ok {
		if err := list.Replace(values); err != nil {
			return fmt.Errorf("%s: setting %q: %w", source, f.Name, err)
		}
		f.Changed = true
		return nil
	}
	if len(values) != 1 {
		return fmt.Errorf("%s: setting %q takes one value, not a list", source, f.Name)
	}
	if err := flags.Set(f.Name, values[0]); err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	return nil
}

func envName(flag string) string {
	return "ARCHFARM_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// readConfig reads settings from a YAML file: scalars, or lists of them.
func readConfig(path string) (map[string][]string, error) {
	if path == "" {
		return nil, nil
	}
	data, err := file.Read(path, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	return parseConfig(path, data)
}

// parseConfig reads the one document of a file. Settings without a value count
// as not set.
func parseConfig(path string, data []byte) (map[string][]string, error) {
	var raw map[string]yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	if err := decoder.Decode(&raw); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if err := decoder.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading %s: it must hold one YAML document", path)
	}
	out := map[string][]string{}
	for name, node := range raw {
		values, err := parseSetting(name, &node)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		if values != nil {
			out[name] = values
		}
	}
	return out, nil
}

// parseSetting returns a setting's values, nil for none.
func parseSetting(name string, node *yaml.Node) ([]string, error) {
	switch node.Kind {
	case yaml.ScalarNode:
		if node.ShortTag() == "!!null" {
			return nil, nil
		}
		return []string{node.Value}, nil
	case yaml.SequenceNode:
		values := []string{}
		for _, item := range node.Content {
			if item.Kind != yaml.ScalarNode || item.ShortTag() == "!!null" {
				return nil, fmt.Errorf("%q must be a list of plain values (line %d)", name, item.Line)
			}
			values = append(values, item.Value)
		}
		return values, nil
	}
	return nil, fmt.Errorf("%q must be a value or a list (line %d)", name, node.Line)
}

// logger writes to standard error, as --log-level and --log-format say.
func logger(cmd *cobra.Command) (*slog.Logger, error) {
	name, _ := cmd.Flags().GetString("log-level")
	format, _ := cmd.Flags().GetString("log-format")
	var level slog.Level
	if err := level.UnmarshalText([]byte(name)); err != nil {
		return nil, usageError{fmt.Errorf("--log-level %q: use debug, info, warn or error", name)}
	}
	options := &slog.HandlerOptions{Level: level}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, options)), nil
	}
	return nil, usageError{fmt.Errorf("--log-format %q: use text or json", format)}
}

// addresses parses what --listen and the like were given.
func addresses(flag string, values []string) ([]address.Address, error) {
	var out []address.Address
	for _, v := range values {
		a, err := address.Parse(v)
		if err != nil {
			return nil, usageError{fmt.Errorf("--%s: %w", flag, err)}
		}
		out = append(out, a)
	}
	return out, nil
}

// gossipKey decodes --gossip-key, which is hexadecimal or base64, or reads it
// from a file named by --gossip-key-file. Nil without an error: none was given.
func gossipKey(cmd *cobra.Command) ([]byte, error) {
	text, _ := cmd.Flags().GetString("gossip-key")
	path, _ := cmd.Flags().GetString("gossip-key-file")
	return readGossipKey(text, path)
}

// readGossipKey decodes a key that is given as text or in a file.
func readGossipKey(text, path string) ([]byte, error) {
	if path != "" {
		if text != "" {
			return nil, usageError{errors.New("the gossip key is given twice: name it or its file, not both")}
		}
		data, err := file.Read(path, maxKeyFile)
		if err != nil {
			return nil, fmt.Errorf("reading the gossip key: %w", err)
		}
		if text = strings.TrimSpace(string(data)); text == "" { // gossip would not be encrypted, and nobody would notice
			return nil, usageError{fmt.Errorf("reading the gossip key: %s is empty", path)}
		}
	}
	if text == "" {
		return nil, nil
	}
	for _, decode := range []func(string) ([]byte, error){hex.DecodeString, base64.StdEncoding.DecodeString} {
		key, err := decode(text)
		if err == nil && (len(key) == 16 || len(key) == 24 || len(key) == 32) {
			return key, nil
		}
	}
	return nil, usageError{errors.New("the gossip key must be 16, 24 or 32 bytes in hexadecimal or base64; make one with: head -c 32 /dev/urandom | base64")}
}

func gossipFlags(flags *pflag.FlagSet) {
	flags.String("gossip-advertise", "", "host:port by which others reach --gossip, when that is not its own address")
	flags.StringArray("join", nil, "gossip address of any member to join; may repeat")
	flags.String("gossip-key", "", "encrypts gossip: 16, 24 or 32 bytes in hexadecimal or base64, the same on all members")
	flags.String("gossip-key-file", "", "file that holds the gossip key")
}
