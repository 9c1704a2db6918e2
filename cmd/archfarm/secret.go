package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/file"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// maxSecret is what BuildKit lets a secret have, in bytes (secretsprovider.MaxSecretSize).
const maxSecret = 500 << 10

func newSecret() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "secret",
		Short: "Keep secrets at the farm, which jobs may name",
		Example: `  printf %s "$NPM_TOKEN" | archfarm secret create npm
  archfarm submit --context . --platform linux/amd64 --secret id=npm,name=npm`,
		Args: cobra.ArbitraryArgs, // RunE tells what it does not know
	}
	cmd.RunE = group(cmd)
	cmd.AddCommand(newSecretCreate(), newSecretList(), newSecretDelete(), newSecretForget())
	return cmd
}

func newSecretCreate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Store a secret, or replace it",
		Long: `Store a secret under a name. Its value is read from standard input, or from a file, to
the last byte: "echo" would add the end of a line. It is encrypted at rest, and no
command shows it again.`,
		Example: `  printf %s "$NPM_TOKEN" | archfarm secret create npm
  archfarm secret create deploy-key --from-file ~/.ssh/id_ed25519`,
		Args: oneArg("the secret's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			value, err := secretValue(cmd)
			if err != nil {
				return err
			}
			return changeSecret(cmd, "storing the secret ", args[0], func(ctx context.Context, secrets archfarmv1.SecretServiceClient) error {
				_, err := secrets.PutSecret(ctx, &archfarmv1.PutSecretRequest{Name: args[0], Value: value})
				return err
			})
		},
	}
	cmd.Flags().String("from-file", "", "file that holds the value (default: standard input)")
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

// secretValue reads the value of a secret from where it is not seen by others.
func secretValue(cmd *cobra.Command) ([]byte, error) {
	path, _ := cmd.Flags().GetString("from-file")
	var value []byte
	var err error
	if path != "" && path != "-" {
		value, err = file.Read(path, maxSecret)
	} else if value, err = io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxSecret+1)); len(value) > maxSecret {
		err = fmt.Errorf("it has more than the %d bytes that a secret may have", maxSecret)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the secret: %w", err)
	}
	if len(value) == 0 {
		return nil, usageError{errors.New("the secret is empty: give its value on standard input, or a file with --from-file")}
	}
	return value, nil
}

func newSecretList() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the secrets' names",
		Example: `  archfarm secret list`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			return withSecrets(cmd, "listing the secrets", func(ctx context.Context, secrets archfarmv1.SecretServiceClient) error {
				answer, err := secrets.ListSecrets(ctx, &archfarmv1.ListSecretsRequest{})
				if err != nil {
					return err
				}
				return printSecrets(cmd.OutOrStdout(), output, answer.GetSecrets(), time.Now())
			})
		},
	}
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

// secretJSON is a secret as --output json prints it.
type secretJSON struct {
	Name    string     `json:"name"`
	Updated *time.Time `json:"updated,omitempty"`
}

func printSecrets(out io.Writer, output string, secrets []*archfarmv1.SecretInfo, now time.Time) error {
	list := []secretJSON{}
	for _, s := range secrets {
		list = append(list, secretJSON{s.GetName(), timeOf(s.GetUpdateTime())})
	}
	if output == "json" {
		return printJSON(out, list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "NAME\tAGE")
	for _, s := range list {
		printRow(table, []string{s.Name, ago(now, s.Updated)})
	}
	return table.Flush()
}

func newSecretDelete() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "delete NAME",
		Short:             "Remove a secret; jobs that name it fail from then on",
		Example:           `  archfarm secret delete npm`,
		Args:              oneArg("the secret's name, as archfarm secret list shows it"),
		ValidArgsFunction: completeSecrets,
		RunE: func(cmd *cobra.Command, args []string) error {
			return changeSecret(cmd, "deleting the secret ", args[0], func(ctx context.Context, secrets archfarmv1.SecretServiceClient) error {
				_, err := secrets.DeleteSecret(ctx, &archfarmv1.DeleteSecretRequest{Name: args[0]})
				return err
			})
		},
	}
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

// changeSecret does something to a secret; as a table it has nothing to tell.
func changeSecret(cmd *cobra.Command, what, name string, change func(context.Context, archfarmv1.SecretServiceClient) error) error {
	output, err := outputOf(cmd)
	if err == nil {
		err = withSecrets(cmd, what+name, change)
	}
	if err == nil && output == "json" {
		err = printJSON(cmd.OutOrStdout(), secretJSON{Name: name})
	}
	return err
}

// completeSecrets offers the names of secrets to a shell: only one is taken.
func completeSecrets(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	if err := applySources(cmd, os.LookupEnv); err != nil { // a completion does not run what runs before commands
		return nil, cobra.ShellCompDirectiveError
	}
	var out []cobra.Completion
	err := withSecrets(cmd, "completing", func(ctx context.Context, secrets archfarmv1.SecretServiceClient) error {
		answer, err := secrets.ListSecrets(ctx, &archfarmv1.ListSecretsRequest{})
		for _, s := range answer.GetSecrets() {
			out = append(out, printable(s.GetName()))
		}
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// withSecrets calls f with the farm's secrets, and words its error.
func withSecrets(cmd *cobra.Command, what string, f func(context.Context, archfarmv1.SecretServiceClient) error) error {
	conn, err := dialFarm(cmd)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
	defer cancel()
	return farmFault(cmd, what, f(ctx, archfarmv1.NewSecretServiceClient(conn)))
}
