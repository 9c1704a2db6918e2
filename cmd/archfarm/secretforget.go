package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/coordinator"
)

func newSecretForget() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "forget --data-dir DIR",
		Short: "Give up stored secrets whose key is lost",
		Long: `List the stored secrets that no key in DIR/secrets.key opens, of all tenants, and with
--yes remove them. A coordinator that finds such a store does not start: bring the key
back if there is a copy, as nothing else opens them. What can be opened stays as it is.

To be run on the coordinator's machine, with its --data-dir, --store and
--secrets-key-file, while no coordinator of the store runs. Store the secrets again
afterwards; jobs that have brought some under the lost key fail.`,
		Example: `  archfarm secret forget --data-dir /var/lib/archfarm
  archfarm secret forget --data-dir /var/lib/archfarm --yes`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			flags := cmd.Flags()
			var cfg coordinator.Config
			cfg.DataDir, _ = flags.GetString("data-dir")
			cfg.Store, _ = flags.GetString("store")
			cfg.SecretsKeyFile, _ = flags.GetString("secrets-key-file")
			yes, _ := flags.GetBool("yes")
			if cfg.DataDir == "" {
				return usageError{errors.New("no folder of a coordinator is named; use --data-dir")}
			}
			secrets, err := coordinator.ForgetSecrets(cmd.Context(), cfg, yes)
			if err != nil {
				return fmt.Errorf("looking for secrets whose key is lost: %w", err)
			}
			return tellForgotten(cmd.OutOrStdout(), cmd.ErrOrStderr(), output, secrets, yes)
		},
	}
	flags := cmd.Flags()
	flags.String("data-dir", defaultDataDir(), "the coordinator's data folder")
	flags.String("store", "", "its store, if that is a postgres:// URL")
	flags.String("secrets-key-file", "", "its file of keys, if that is not in --data-dir")
	flags.Bool("yes", false, "remove them, and do not only list them")
	outputFlag(flags)
	return cmd
}

// forgottenJSON is a secret that cannot be opened, as --output json prints it.
type forgottenJSON struct {
	Tenant  string `json:"tenant"`
	Name    string `json:"name"`
	Removed bool   `json:"removed"`
}

func tellForgotten(out, aside io.Writer, output string, secrets []coordinator.StoredSecret, removed bool) error {
	list := []forgottenJSON{}
	for _, s := range secrets {
		list = append(list, forgottenJSON{s.Tenant, s.Name, removed})
	}
	if output == "json" {
		return printJSON(out, list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "TENANT\tNAME")
	for _, s := range list {
		printRow(table, []string{s.Tenant, s.Name})
	}
	if removed {
		fmt.Fprintln(aside, "removed: a coordinator starts with the keys that there are now")
	} else {
		fmt.Fprintln(aside, "nothing is removed: --yes does that")
	}
	return table.Flush()
}
