package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/enroll"
)

func newToken() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make and manage the tokens that workers and clients join with",
		Example: `  archfarm token create --worker --pool office
  archfarm token list`,
		Args: cobra.ArbitraryArgs, // RunE tells what it does not know
	}
	cmd.RunE = group(cmd)
	cmd.AddCommand(newTokenCreate(), newTokenList(), newTokenDelete())
	return cmd
}

// group is what a command does that only has subcommands.
func group(cmd *cobra.Command) func(*cobra.Command, []string) error {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return unknownCommand(cmd, args[0])
	}
}

func newTokenCreate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a token that a worker or a client joins with",
		Long: `Make a join token. It is printed once, alone on standard output; whoever has it can
join until it has expired or been used up. It names the farm's CA, so that who joins
knows the farm.`,
		Example: `  archfarm token create --worker --pool office
  archfarm token create --worker --uses 50 --ttl 720h --pool graviton    # for an image or cloud-init
  archfarm token create --client --name ci --tenant acme --pool office --pool graviton`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req, err := tokenRequest(cmd)
			if err != nil {
				return err
			}
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			return withAuthority(cmd, "creating a token", func(ctx context.Context, authority archfarmv1.AuthorityServiceClient) error {
				answer, err := authority.CreateToken(ctx, req)
				if err != nil {
					return err
				}
				return printNewToken(cmd, output, answer)
			})
		},
	}
	flags := cmd.Flags()
	flags.Bool("worker", false, "for a worker")
	flags.Bool("client", false, "for a client, which builds")
	flags.Bool("admin", false, "for a client that may also manage the farm")
	flags.Duration("ttl", time.Hour, "how long the token is good")
	flags.Int("uses", 1, "how often it may be used")
	flags.StringArray("pool", nil, "the pool of the worker (default: \"default\"), or a pool that the client may use (default: any); may repeat for a client")
	flags.String("tenant", "", "whose builds the client sees (default: \"default\")")
	flags.String("name", "", "the only name that one may join as (default: any)")
	flags.Duration("cert-ttl", 0, "how long certificates are good (default: 24h for a worker, 720h for a client)")
	outputFlag(flags)
	farmFlags(flags)
	return cmd
}

func tokenRequest(cmd *cobra.Command) (*archfarmv1.CreateTokenRequest, error) {
	flags := cmd.Flags()
	req := &archfarmv1.CreateTokenRequest{}
	for flag, kind := range map[string]archfarmv1.CreateTokenRequest_Kind{
		"worker": archfarmv1.CreateTokenRequest_KIND_WORKER,
		"client": archfarmv1.CreateTokenRequest_KIND_CLIENT,
		"admin":  archfarmv1.CreateTokenRequest_KIND_ADMIN,
	} {
		if set, _ := flags.GetBool(flag); set && req.Kind != archfarmv1.CreateTokenRequest_KIND_UNSPECIFIED {
			return nil, usageError{errors.New("a token is for one kind: use one of --worker, --client and --admin")}
		} else if set {
			req.Kind = kind
		}
	}
	if req.Kind == archfarmv1.CreateTokenRequest_KIND_UNSPECIFIED {
		return nil, usageError{errors.New("say what the token is for: --worker, --client or --admin")}
	}
	uses, _ := flags.GetInt("uses")
	if uses < 1 || uses > math.MaxInt32 {
		return nil, usageError{fmt.Errorf("--uses %d: use at least 1", uses)}
	}
	req.Uses = uint32(uses)
	ttl, _ := flags.GetDuration("ttl")
	req.Ttl = durationpb.New(ttl)
	if ttl, _ := flags.GetDuration("cert-ttl"); ttl != 0 {
		req.CertificateTtl = durationpb.New(ttl)
	}
	req.Pools, _ = flags.GetStringArray("pool")
	req.Tenant, _ = flags.GetString("tenant")
	req.Name, _ = flags.GetString("name")
	return req, nil
}

func printNewToken(cmd *cobra.Command, output string, answer *archfarmv1.CreateTokenResponse) error {
	info := tokenOf(answer.GetInfo())
	if output == "json" {
		info.Token = answer.GetToken()
		return printJSON(cmd.OutOrStdout(), info)
	}
	fmt.Fprintln(cmd.OutOrStdout(), answer.GetToken())
	use := "archfarm worker --token TOKEN"
	if info.Kind != "worker" {
		use = "archfarm client-cert --token TOKEN"
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "Token %s is good until %s. Use it with: %s\n", info.ID, info.Expires.Local().Format(time.DateTime), use)
	return nil
}

func newTokenList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the tokens that are still good, without their secrets",
		Example: `  archfarm token list
  archfarm token list --output json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			return withAuthority(cmd, "listing the tokens", func(ctx context.Context, authority archfarmv1.AuthorityServiceClient) error {
				answer, err := authority.ListTokens(ctx, &archfarmv1.ListTokensRequest{})
				if err != nil {
					return err
				}
				return printTokens(cmd.OutOrStdout(), output, answer.GetTokens(), time.Now())
			})
		},
	}
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

// tokenJSON is a token as --output json prints it.
type tokenJSON struct {
	ID       string    `json:"id"`
	Kind     string    `json:"kind"`
	Name     string    `json:"name,omitempty"`
	Tenant   string    `json:"tenant,omitempty"`
	Pools    []string  `json:"pools,omitempty"`
	UsesLeft uint32    `json:"usesLeft"`
	Expires  time.Time `json:"expires"`
	Token    string    `json:"token,omitempty"` // only when it has just been made
}

func tokenOf(t *archfarmv1.Token) tokenJSON {
	return tokenJSON{
		ID: t.GetId(), Kind: strings.ToLower(strings.TrimPrefix(t.GetKind().String(), "KIND_")), Name: t.GetName(), Tenant: t.GetTenant(),
		Pools: t.GetPools(), UsesLeft: t.GetUsesLeft(), Expires: t.GetExpires().AsTime(),
	}
}

func printTokens(out io.Writer, output string, tokens []*archfarmv1.Token, now time.Time) error {
	list := []tokenJSON{}
	for _, t := range tokens {
		list = append(list, tokenOf(t))
	}
	if output == "json" {
		return printJSON(out, list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "ID\tKIND\tNAME\tTENANT\tPOOLS\tUSES LEFT\tEXPIRES IN")
	for _, t := range list {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%d\t%s\n", t.ID, t.Kind, orDash(t.Name), orDash(t.Tenant), orDash(strings.Join(t.Pools, ",")),
			t.UsesLeft, t.Expires.Sub(now).Round(time.Second))
	}
	return table.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newTokenDelete() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "delete ID",
		Short:   "Make a token worthless; what has joined with it stays",
		Example: `  archfarm token delete 8d6cc5b7f84c6e88`,
		Args:    oneArg("the token's id, as archfarm token list shows it"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withAuthority(cmd, "deleting the token", func(ctx context.Context, authority archfarmv1.AuthorityServiceClient) error {
				_, err := authority.DeleteToken(ctx, &archfarmv1.DeleteTokenRequest{Id: args[0]})
				return err
			})
		},
	}
	farmFlags(cmd.Flags())
	return cmd
}

const tableOrJSON = "table or json"

func outputFlag(flags *pflag.FlagSet) {
	flags.StringP("output", "o", "table", tableOrJSON)
}

// outputOf is what --output says.
func outputOf(cmd *cobra.Command) (string, error) {
	output, _ := cmd.Flags().GetString("output")
	if output != "table" && output != "json" {
		return "", usageError{fmt.Errorf("--output %q: use table or json", output)}
	}
	return output, nil
}

// oneArg wants exactly one argument.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 || args[0] == "" {
			return usageError{fmt.Errorf("%q takes one argument: %s", cmd.CommandPath(), what)}
		}
		return nil
	}
}

// withAuthority calls f with the farm's certificate authority, and words its error.
func withAuthority(cmd *cobra.Command, what string, f func(context.Context, archfarmv1.AuthorityServiceClient) error) error {
	conn, err := dialFarm(cmd)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
	defer cancel()
	if err := f(ctx, archfarmv1.NewAuthorityServiceClient(conn)); err != nil {
		return fmt.Errorf("%s at %s: %w", what, farmName(cmd), enroll.Explain(errors.New(status.Convert(err).Message())))
	}
	return nil
}

func printJSON(out io.Writer, value any) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}
