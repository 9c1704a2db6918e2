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
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/archfarm/archfarm/address"
)

// maxConfig bounds a configuration file.
const maxConfig = 1 << 20

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
		if knownFlag(cmd.Root(), name) == nil {
			return fmt.Errorf("reading %s: there is no setting %q", path, name)
		}
	}
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Changed {
			return
		}
		if v, ok := lookup(envName(f.Name)); ok {
			errs = append(errs, set(flags, f, strings.Split(v, ","), "environment variable "+envName(f.Name)))
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

func set(flags *pflag.FlagSet, f *pflag.Flag, values []string, source string) error {
	list, many := f.Value.(pflag.SliceValue)
	if many {
		f.Changed = true
		return list.Replace(values)
	}
	if err := flags.Set(f.Name, strings.Join(values, ",")); err != nil {
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
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfig))
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	return parseConfig(path, data)
}

func parseConfig(path string, data []byte) (map[string][]string, error) {
	var raw map[string]yaml.Node
	if err := yaml.NewDecoder(bytes.NewReader(data)).Decode(&raw); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	out := map[string][]string{}
	for name, node := range raw {
		switch node.Kind {
		case yaml.ScalarNode:
			out[name] = []string{node.Value}
		case yaml.SequenceNode:
			out[name] = []string{}
			for _, item := range node.Content {
				if item.Kind != yaml.ScalarNode {
					return nil, fmt.Errorf("reading %s: %q must be a list of plain values (line %d)", path, name, item.Line)
				}
				out[name] = append(out[name], item.Value)
			}
		default:
			return nil, fmt.Errorf("reading %s: %q must be a value or a list (line %d)", path, name, node.Line)
		}
	}
	return out, nil
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
// from a file named by --gossip-key-file.
func gossipKey(cmd *cobra.Command) ([]byte, error) {
	text, _ := cmd.Flags().GetString("gossip-key")
	if path, _ := cmd.Flags().GetString("gossip-key-file"); path != "" {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("reading the gossip key: %w", err)
		}
		text = strings.TrimSpace(string(data))
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
