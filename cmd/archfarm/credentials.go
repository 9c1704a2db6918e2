package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/file"
	"github.com/archfarm/archfarm/identity"
	"github.com/archfarm/archfarm/worker"
	"github.com/archfarm/archfarm/worker/enroll"
)

// joinAgain is the pause, on average, between two tries to join a farm that does
// not answer.
const joinAgain = 5 * time.Second

// credentialFlags are how a worker gets its certificate.
func credentialFlags(flags *pflag.FlagSet) {
	flags.String("token", "", "join token, of archfarm token create --worker; needed once, the certificate is kept in --data-dir and renews itself")
	flags.String("token-file", "", "file that holds the join token")
	flags.String("tls-ca", "", "your own authority's certificate, PEM, instead of joining with a token")
	flags.String("tls-cert", "", "the worker's certificate from your own authority; read anew at every connection")
	flags.String("tls-key", "", "its key")
	flags.Bool("insecure", false, "talk to coordinators on other machines without encryption")
}

// runWorker gives the worker its certificate, keeps it fresh, and runs the agent.
func runWorker(cmd *cobra.Command, cfg worker.Config) error {
	if cfg.Insecure, _ = cmd.Flags().GetBool("insecure"); cfg.Insecure {
		cfg.Logger.Warn("INSECURE: coordinators on other machines are talked to in plaintext unless this worker has a certificate: who is on the way sees and changes everything")
	}
	creds, err := workerCredentials(cmd, &cfg)
	if err != nil {
		return err
	}
	if creds == nil {
		return worker.Run(cmd.Context(), cfg)
	}
	cfg.Credentials = creds
	// While it drains, the agent may need to connect anew.
	life, end := context.WithCancel(context.WithoutCancel(cmd.Context()))
	var renewing sync.WaitGroup
	defer renewing.Wait()
	defer end()
	renewing.Go(func() { creds.KeepFresh(life, dialAny(creds, cfg.Coordinators)) })
	return worker.Run(cmd.Context(), cfg)
}

// workerCredentials returns the operator's own certificate, or the one that the
// worker has, or joins the farm for one; nil if it has none and no token.
func workerCredentials(cmd *cobra.Command, cfg *worker.Config) (*enroll.Credentials, error) {
	flags := cmd.Flags()
	ca, _ := flags.GetString("tls-ca")
	cert, _ := flags.GetString("tls-cert")
	key, _ := flags.GetString("tls-key")
	if ca != "" || cert != "" || key != "" {
		if ca == "" || cert == "" || key == "" {
			return nil, usageError{errors.New("--tls-ca, --tls-cert and --tls-key belong together")}
		}
		creds, err := enroll.Files(ca, cert, key)
		if err != nil {
			return nil, err
		}
		return creds, adopt(creds, cmd, cfg)
	}
	token, err := joinToken(flags)
	if err != nil {
		return nil, err
	}
	creds, err := enroll.Load(cfg.DataDir)
	valid := err == nil && time.Now().Before(creds.NotAfter())
	switch {
	case valid && (token == "" || enroll.JoinedWith(cfg.DataDir, token)):
	case token != "": // perhaps a new one because the certificate was revoked
		named, _ := flags.GetString("name")
		joined, err := join(cmd.Context(), token, named, cfg)
		switch {
		case err == nil:
			creds = joined
		case valid && cmd.Context().Err() == nil:
			cfg.Logger.Warn("the token is of no use; going on with the certificate that there is", "error", err, "certificate_until", creds.NotAfter())
		default:
			return nil, err
		}
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	default:
		return nil, fmt.Errorf("the worker's certificate in %s expired at %s; give it a new token with --token (archfarm token create --worker)", cfg.DataDir, creds.NotAfter().Format(time.RFC3339))
	}
	return creds, adopt(creds, cmd, cfg)
}

// adopt makes the worker the one that its certificate is for.
func adopt(creds *enroll.Credentials, cmd *cobra.Command, cfg *worker.Config) error {
	who := creds.Identity()
	if who.Kind != identity.Worker {
		return fmt.Errorf("the certificate is for %s, and not for a worker", who)
	}
	if name, _ := cmd.Flags().GetString("name"); name != "" && name != who.Name {
		return fmt.Errorf("the certificate is for worker %s, and --name says %s: remove the certificate from %s and join with a new token to change the name", who.Name, name, cfg.DataDir)
	}
	cfg.Name = who.Name
	if len(cfg.Coordinators) == 0 {
		cfg.Coordinators = creds.Coordinators()
	}
	return nil
}

// joinToken is the token that the flags give, if any.
func joinToken(flags *pflag.FlagSet) (string, error) {
	token, _ := flags.GetString("token")
	path, _ := flags.GetString("token-file")
	if path != "" && token != "" {
		return "", usageError{errors.New("the join token is given twice: use either --token or --token-file")}
	}
	if path != "" {
		data, err := file.Read(path, maxKeyFile)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // it may have been removed after joining
			return "", fmt.Errorf("reading the join token: %w", err)
		}
		token = strings.TrimSpace(string(data))
	}
	if token == "" {
		return "", nil
	}
	if _, err := identity.ParseToken(token); err != nil {
		return "", usageError{err}
	}
	return token, nil
}

// join asks until the farm answers. Those to ask are the coordinators that the
// operator names, else those of the token, else whoever --join names. The worker is
// called as the operator says, else as the token does, else like its machine.
func join(ctx context.Context, token, named string, cfg *worker.Config) (*enroll.Credentials, error) {
	log := cfg.Logger
	ask := [][]string{cfg.Coordinators}
	if len(cfg.Coordinators) == 0 && len(cfg.Gossip.Join) > 0 {
		ask = append(ask, cfg.Gossip.Join)
	}
	for {
		for _, coordinators := range ask {
			request := enroll.Request{Token: token, Kinds: []identity.Kind{identity.Worker}, Coordinators: coordinators, Name: named, Dir: cfg.DataDir, Logger: log}
			creds, err := joinAs(ctx, request, cfg.Name)
			if err == nil {
				log.Info("joined the farm", "as", creds.Identity().String(), "pool", creds.Identity().Pools[0], "certificate_until", creds.NotAfter())
				forgetJoin(cfg, coordinators)
				return creds, nil
			}
			if final(err) || ctx.Err() != nil {
				return nil, fmt.Errorf("joining the farm: %w", err)
			}
			log.Warn("cannot join the farm yet: trying again in a while", "error", err)
		}
		select {
		case <-time.After(joinAgain/2 + rand.N(joinAgain)): // machines that boot together do not ask together
		case <-ctx.Done():
			return nil, fmt.Errorf("joining the farm: %w", context.Cause(ctx))
		}
	}
}

// joinAs joins under the name that is asked for; without one, under the token's
// own, or else the usual one.
func joinAs(ctx context.Context, req enroll.Request, usual string) (*enroll.Credentials, error) {
	creds, err := enroll.Join(ctx, req)
	if req.Name == "" && status.Code(err) == codes.InvalidArgument { // the token is for any name
		req.Name = usual
		return enroll.Join(ctx, req)
	}
	return creds, err
}

// forgetJoin takes a coordinator that --join named out of the gossip's seeds.
func forgetJoin(cfg *worker.Config, coordinators []string) {
	if len(cfg.Coordinators) == 0 && len(coordinators) > 0 {
		cfg.Coordinators, cfg.Gossip.Join = coordinators, nil
	}
}

// final tells whether asking again would be answered alike: somebody has answered,
// and it was not a passing trouble.
func final(err error) bool {
	switch around := err.(type) { //nolint:errorlint // it looks at each of several
	case interface{ Unwrap() []error }:
		return slices.ContainsFunc(around.Unwrap(), final)
	case interface{ GRPCStatus() *status.Status }:
		switch around.GRPCStatus().Code() {
		case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Internal, codes.Unknown:
			return false
		default:
			return true
		}
	}
	inner := errors.Unwrap(err)
	return inner != nil && final(inner)
}

// dialAny connects to the first coordinator that answers, with the certificate.
func dialAny(creds *enroll.Credentials, coordinators []string) func(context.Context) (grpc.ClientConnInterface, func(), error) {
	return func(ctx context.Context) (grpc.ClientConnInterface, func(), error) {
		list, err := addresses("coordinator", coordinators)
		if err != nil {
			return nil, nil, err
		}
		for _, a := range list {
			raw, dialErr := a.Dial(ctx)
			if dialErr != nil {
				err = errors.Join(err, dialErr)
				continue
			}
			_ = raw.Close() // it only shows that somebody listens
			conn, dialErr := client.Connect(a, credentials.NewTLS(creds.TLS()))
			if dialErr != nil {
				err = errors.Join(err, dialErr)
				continue
			}
			return conn, func() { _ = conn.Close() }, nil
		}
		return nil, nil, errors.Join(errors.New("no coordinator answers"), err)
	}
}
