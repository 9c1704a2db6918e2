package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/csv"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/credentials"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/identity"
	"github.com/archfarm/archfarm/worker/enroll"
)

func newClientCert() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "client-cert",
		Short: "Get a client's certificate, or renew it, and print how buildx uses it",
		Long: `Exchange a token for a client's certificate: ca.pem, cert.pem and key.pem, in a folder
of its own. Printed on standard output is the command that makes a builder of them.
Without --token, the certificate in the folder is renewed; buildx reads the files at
every connection, so a timer that does this is all that rotation takes.`,
		Example: `  archfarm client-cert --token archfarm1.…
  archfarm client-cert --dir /etc/archfarm/client          # renew
  ARCHFARM_TOKEN=archfarm1.… archfarm client-cert          # what other users do not see in ps`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			dir, err := clientDir(cmd)
			if err != nil {
				return err
			}
			creds, err := clientCertificate(cmd, dir)
			if err != nil {
				return err
			}
			return tellClient(cmd, output, creds)
		},
	}
	flags := cmd.Flags()
	flags.String("token", "", "join token, of archfarm token create --client; needed once")
	flags.String("farm", "", "host:port of the coordinator (default: what the token, or the last answer, names)")
	flags.String("dir", "", "folder for the certificate (default: archfarm in the user's configuration folder)")
	flags.String("name", "", "the client's name (default: the token's, else the user's and the host's)")
	outputFlag(flags)
	return cmd
}

func clientDir(cmd *cobra.Command) (string, error) {
	dir, _ := cmd.Flags().GetString("dir")
	if dir == "" {
		config, err := os.UserConfigDir()
		if err != nil {
			return "", usageError{fmt.Errorf("%w; name a folder with --dir", err)}
		}
		dir = filepath.Join(config, "archfarm")
	}
	return filepath.Abs(dir) // buildx wants absolute paths
}

func clientCertificate(cmd *cobra.Command, dir string) (*enroll.Credentials, error) {
	token, _ := cmd.Flags().GetString("token")
	coordinators, err := clientFarm(cmd)
	if err != nil {
		return nil, err
	}
	if token != "" {
		return joinAsClient(cmd, token, dir, coordinators)
	}
	creds, err := enroll.Load(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, usageError{fmt.Errorf("there is no certificate in %s to renew: give a token with --token (archfarm token create --client)", dir)}
	}
	if err != nil {
		return nil, err
	}
	if len(coordinators) == 0 {
		coordinators = creds.Coordinators()
	}
	return creds, renewAtAny(cmd.Context(), creds, coordinators)
}

func clientFarm(cmd *cobra.Command) ([]string, error) {
	farm, _ := cmd.Flags().GetString("farm")
	if farm == "" {
		return nil, nil
	}
	list, err := addresses("farm", []string{farm})
	if err != nil {
		return nil, err
	}
	if list[0].Network != "tcp" {
		return nil, usageError{fmt.Errorf("--farm %s: certificates are for host:port; the socket needs none", farm)}
	}
	return []string{list[0].Addr}, nil
}

func joinAsClient(cmd *cobra.Command, token, dir string, coordinators []string) (*enroll.Credentials, error) {
	req := enroll.Request{Token: token, Kinds: []identity.Kind{identity.Client, identity.Admin}, Coordinators: coordinators, Dir: dir}
	req.Name, _ = cmd.Flags().GetString("name")
	if _, bad := identity.ParseToken(token); bad != nil && req.Name == "" {
		return nil, usageError{bad}
	}
	return joinAs(cmd.Context(), req, defaultClient())
}

// defaultClient is whom a client's certificate is for that nobody has named.
func defaultClient() string {
	host, _ := os.Hostname()
	who, err := user.Current()
	if err != nil {
		who = &user.User{Username: "client"}
	}
	name := strings.Map(func(r rune) rune {
		if identity.ValidName("-" + string(r)) {
			return r
		}
		return '-'
	}, who.Username+"-"+host)
	return name[:min(len(name), 128)]
}

func renewAtAny(ctx context.Context, creds *enroll.Credentials, coordinators []string) error {
	list, err := addresses("farm", coordinators)
	if err != nil {
		return err
	}
	errs := []error{errors.New("the certificate was not renewed")}
	if len(list) == 0 {
		errs = append(errs, errors.New("no coordinator is known: name one with --farm"))
	}
	for _, a := range list {
		conn, err := client.Connect(a, credentials.NewTLS(creds.TLS()))
		if err == nil {
			err = creds.Renew(ctx, conn)
			_ = conn.Close() // nothing is on it any more
		}
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("at %s: %w", a, err))
	}
	return errors.Join(errs...)
}

// clientJSON is what client-cert prints with --output json.
type clientJSON struct {
	Identity string    `json:"identity"`
	Expires  time.Time `json:"expires"`
	CA       string    `json:"ca"`
	Cert     string    `json:"cert"`
	Key      string    `json:"key"`
	Farm     string    `json:"farm"`
	// ServerName is what buildx must expect in the server's certificate, where that
	// is not the host's name.
	ServerName string   `json:"serverName,omitempty"`
	Command    []string `json:"command"`
}

func tellClient(cmd *cobra.Command, output string, creds *enroll.Credentials) error {
	dir, who := creds.Dir(), creds.Identity()
	out := clientJSON{
		Identity: who.URI().String(), Expires: creds.NotAfter(),
		CA: filepath.Join(dir, "ca.pem"), Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"),
	}
	coordinators, err := clientFarm(cmd)
	if err != nil {
		return err
	}
	if len(coordinators) == 0 {
		coordinators = creds.Coordinators()
	}
	if len(coordinators) > 0 {
		out.Farm = "tcp://" + coordinators[0]
		out.ServerName = serverName(cmd.Context(), creds, coordinators[0])
		out.Command = builderCommand(out)
	}
	if output == "json" {
		return printJSON(cmd.OutOrStdout(), out)
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s: ca.pem, cert.pem and key.pem are in %s; good until %s, or longer if you run this again before, without a token\n",
		who, dir, out.Expires.Local().Format(time.DateTime))
	if len(out.Command) == 0 {
		return errors.New("the coordinator's address is not known: name it with --farm")
	}
	quoted := make([]string, 0, len(out.Command))
	for _, word := range out.Command {
		quoted = append(quoted, shellWord(word))
	}
	fmt.Fprintln(cmd.OutOrStdout(), strings.Join(quoted, " "))
	return nil
}

// builderCommand makes a builder of buildx' remote driver. The options are one
// record of CSV.
func builderCommand(c clientJSON) []string {
	options := []string{"cacert=" + c.CA, "cert=" + c.Cert, "key=" + c.Key}
	if c.ServerName != "" {
		options = append(options, "servername="+c.ServerName)
	}
	var record strings.Builder
	w := csv.NewWriter(&record)
	_ = w.Write(options) // into memory
	w.Flush()
	return []string{"docker", "buildx", "create", "--name", "farm", "--driver", "remote", "--driver-opt", strings.TrimSuffix(record.String(), "\n"), c.Farm}
}

// serverName is what a client that verifies host names must expect of a server
// whose certificate does not cover the name that it is dialed by; empty: nothing
// else, or the server does not answer.
func serverName(ctx context.Context, creds *enroll.Credentials, farm string) string {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	raw, err := address.Address{Network: "tcp", Addr: farm}.Dial(ctx)
	if err != nil {
		return ""
	}
	defer raw.Close()
	host, _, err := net.SplitHostPort(farm)
	if err != nil {
		return ""
	}
	config := creds.TLS()
	config.ServerName = host
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return ""
	}
	return nameFor(conn.ConnectionState().PeerCertificates[0], host)
}

func nameFor(leaf *x509.Certificate, host string) string {
	if leaf.VerifyHostname(host) == nil {
		return ""
	}
	fallback := ""
	for _, name := range leaf.DNSNames {
		if name != "localhost" {
			return name
		}
		fallback = name
	}
	for _, ip := range leaf.IPAddresses {
		fallback = cmp.Or(fallback, ip.String())
	}
	return fallback
}

// shellWord quotes a word for a POSIX shell where it needs that.
func shellWord(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("-_./:=,@%+[]", r)
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
