package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// newClient has what concerns clients, seen from the farm.
func newClient() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "client",
		Short:   "Manage the clients' certificates",
		Example: `  archfarm client revoke ci`,
		Args:    cobra.ArbitraryArgs, // RunE tells what it does not know
	}
	cmd.RunE = group(cmd)
	cmd.AddCommand(newRevoke("client", archfarmv1.CreateTokenRequest_KIND_CLIENT))
	return cmd
}

func newWorkerRevoke() *cobra.Command {
	return newRevoke("worker", archfarmv1.CreateTokenRequest_KIND_WORKER)
}

// newRevoke is the subcommand of a kind.
func newRevoke(kind string, number archfarmv1.CreateTokenRequest_Kind) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "revoke NAME",
		Short: fmt.Sprintf("Make the certificates of a %s worthless and end its connections", kind),
		Long: fmt.Sprintf(`Make all certificates of a %s worthless at once, and end its connections: what it is
at fails. Tokens that exist are no good for the name any more; a new one is.`, kind),
		Example: fmt.Sprintf("  archfarm %s revoke NAME\n  archfarm token create --%s --name NAME", kind, kind),
		Args:    oneArg("the name of the " + kind),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withAuthority(cmd, "revoking "+kind+" "+args[0], func(ctx context.Context, authority archfarmv1.AuthorityServiceClient) error {
				answer, err := authority.Revoke(ctx, &archfarmv1.RevokeRequest{Kind: number, Name: args[0]})
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s: revoked, certificates that were good until now: %d\n", kind, args[0], answer.GetRevoked())
				return nil
			})
		},
	}
	farmFlags(cmd.Flags())
	return cmd
}
