package main

import (
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Flags whose values are paths, and words for those that take few. Of all others
// without a completion of their own, a shell offers nothing: the names of files, its
// default, would make no sense.
var (
	fileFlags = []string{
		"buildkitd", "ca-cert", "ca-key", "config", "context", "file", "from-file", "gossip-key-file", "iidfile", "key-file",
		"metadata-file", "secrets-key-file", "spec", "tls-ca", "tls-cert", "tls-key", "token-file",
	}
	folderFlags = []string{"buildkit-root", "cert-dir", "data-dir", "dir"}
	wordFlags   = map[string][]string{
		"log-level": {"debug", "info", "warn", "error"}, "log-format": {"text", "json"}, "push-policy": {"off", "warn", "enforce"},
		"provenance": {"true", "false", "mode=min", "mode=max"}, "sbom": {"true", "false"},
	}
	// fileArgs are commands whose arguments are paths.
	fileArgs = []string{"backup", "build"}
)

// completeAll gives the commands under one what a shell offers for their flags and
// arguments, unless they have it.
func completeAll(cmd *cobra.Command) {
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) { completeFlag(cmd, f) })
	if !cmd.HasSubCommands() && cmd.ValidArgsFunction == nil && !slices.Contains(fileArgs, cmd.Name()) {
		cmd.ValidArgsFunction = cobra.NoFileCompletions
	}
	for _, sub := range cmd.Commands() {
		completeAll(sub)
	}
}

func completeFlag(cmd *cobra.Command, f *pflag.Flag) {
	offer := cobra.NoFileCompletions
	words := wordFlags[f.Name]
	if f.Usage == tableOrJSON {
		words = []string{"table", "json"}
	}
	_, has := cmd.GetFlagCompletionFunc(f.Name)
	isPath := slices.Contains(fileFlags, f.Name) || f.Name == "output" && words == nil // of build
	switch {
	case has || isPath:
		return
	case words != nil:
		offer = cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
	case slices.Contains(folderFlags, f.Name):
		offer = cobra.FixedCompletions(nil, cobra.ShellCompDirectiveFilterDirs)
	}
	_ = cmd.RegisterFlagCompletionFunc(f.Name, offer) // fails only for flags that are none
}
