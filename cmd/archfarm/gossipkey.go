package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// rotateTimeout bounds a change of keys: all workers are asked, up to three times.
const rotateTimeout = time.Minute

func newGossipKey() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "gossip-key",
		Short: "List and rotate the keys that the farm's gossip is encrypted with",
		Long: `List and rotate the keys that the farm's gossip is encrypted with. Nothing is
restarted, and no member is lost, when it is done in this order: install a new key,
use it, remove the old one. Each step waits until every worker that is attached has
confirmed it; a key that one does not have is not used.

A farm of several coordinators: take each step on every coordinator (--farm) before
the next one, and install the same key on all. Keys themselves are never shown, only
their ids; the ring is in gossip.keyring in a coordinator's data folder.

It takes an administrator: ask through admin.sock in the coordinator's data folder,
or with --cert-dir and the certificate of one.`,
		Example: `  archfarm gossip-key list
  archfarm gossip-key install                    # makes a key, and tells its id
  archfarm gossip-key use 5f1c29b07a3de486
  archfarm gossip-key remove 02d5c1e8f4a97b36
  head -c 32 /dev/urandom | base64 > key         # for several coordinators
  archfarm gossip-key install --key-file key --farm unix:///var/lib/archfarm/admin.sock`,
		Args: cobra.ArbitraryArgs, // RunE tells what it does not know
	}
	cmd.RunE = group(cmd)
	cmd.AddCommand(newGossipKeyList(), newGossipKeyInstall(),
		newGossipKeyChange("use", "Encrypt with a key that is installed", archfarmv1.ChangeGossipKeysRequest_ACTION_USE),
		newGossipKeyChange("remove", "Forget a key that is not in use", archfarmv1.ChangeGossipKeysRequest_ACTION_REMOVE))
	return cmd
}

func newGossipKeyList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the keys by their ids, and who has them",
		Example: `  archfarm gossip-key list
  archfarm gossip-key list --output json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return changeGossipKeys(cmd, "listing the gossip keys", &archfarmv1.ChangeGossipKeysRequest{Action: archfarmv1.ChangeGossipKeysRequest_ACTION_LIST})
		},
	}
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

func newGossipKeyInstall() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "install [KEY]",
		Short: "Add a key to decrypt with: a new one, or KEY in hexadecimal or base64",
		Long: `Add a key to decrypt with. Without KEY one is made. KEY, 16, 24 or 32 bytes in
hexadecimal or base64, is seen by others who list this machine's processes; they do
not see the one in --key-file.`,
		Example: `  archfarm gossip-key install
  archfarm gossip-key install --key-file /etc/archfarm/gossip.key`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError{fmt.Errorf("%q takes one key at most", cmd.CommandPath())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path, _ := cmd.Flags().GetString("key-file")
			key, err := readGossipKey(strings.Join(args, ""), path)
			if err != nil {
				return err
			}
			return changeGossipKeys(cmd, "installing a gossip key", &archfarmv1.ChangeGossipKeysRequest{Action: archfarmv1.ChangeGossipKeysRequest_ACTION_INSTALL, Key: key})
		},
	}
	cmd.Flags().String("key-file", "", "file that holds the key, instead of KEY")
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

func newGossipKeyChange(verb, short string, action archfarmv1.ChangeGossipKeysRequest_Action) *cobra.Command {
	cmd := &cobra.Command{
		Use:     verb + " ID",
		Short:   short,
		Example: "  archfarm gossip-key " + verb + " 1f2e3d4c5b6a7988",
		Args:    oneArg("a key's id, as \"archfarm gossip-key list\" shows it"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return changeGossipKeys(cmd, "changing the gossip keys", &archfarmv1.ChangeGossipKeysRequest{Action: action, KeyId: args[0]})
		},
	}
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

func changeGossipKeys(cmd *cobra.Command, what string, req *archfarmv1.ChangeGossipKeysRequest) error {
	output, err := outputOf(cmd)
	if err != nil {
		return err
	}
	conn, err := dialFarm(cmd)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), rotateTimeout)
	defer cancel()
	answer, err := archfarmv1.NewFleetServiceClient(conn).ChangeGossipKeys(ctx, req)
	if err != nil {
		return fmt.Errorf("%s at %s: %s", what, farmName(cmd), status.Convert(err).Message())
	}
	return printGossipKeys(cmd.OutOrStdout(), output, answer.GetKeys())
}

// gossipKeyJSON is a key as --output json prints it.
type gossipKeyJSON struct {
	ID        string   `json:"id"`
	Primary   bool     `json:"primary"`
	Confirmed uint32   `json:"confirmed"`
	Missing   []string `json:"missing"`
}

func printGossipKeys(out io.Writer, output string, keys []*archfarmv1.GossipKey) error {
	list := []gossipKeyJSON{}
	for _, k := range keys {
		list = append(list, gossipKeyJSON{k.GetId(), k.GetPrimary(), k.GetConfirmed(), append([]string{}, k.GetMissing()...)})
	}
	if output == "json" {
		return printJSON(out, list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "ID\tIN USE\tCONFIRMED\tMISSING ON")
	for _, k := range list {
		use := ""
		if k.Primary {
			use = "yes"
		}
		fmt.Fprintf(table, "%s\t%s\t%d/%d\t%s\n", printable(k.ID), use, k.Confirmed, int(k.Confirmed)+len(k.Missing), printable(strings.Join(k.Missing, ",")))
	}
	return table.Flush()
}
