package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/worker/enroll"
)

const (
	// adminSocket is where a coordinator that was installed as the guide says can be
	// asked anything by whoever the file system lets.
	adminSocket = "/var/lib/archfarm/admin.sock"
	localFarm   = "tcp://127.0.0.1:8372"
)

// farmFlags are those of every command that asks a coordinator.
func farmFlags(flags *pflag.FlagSet) {
	flags.String("farm", "", "the coordinator to ask: host:port, tcp://host:port or unix:///path (default: unix://"+adminSocket+" where that exists, else the first that came with --cert-dir, else "+localFarm+")")
	flags.String("cert-dir", "", "folder with ca.pem, cert.pem and key.pem, as archfarm client-cert makes it")
	flags.Bool("insecure", false, "talk to a coordinator on another machine without encryption")
}

// dialFarm returns a connection to the coordinator that the flags of farmFlags
// name. The connection is made at the first call on it; see farmName for errors.
func dialFarm(cmd *cobra.Command) (*grpc.ClientConn, error) {
	a, creds, err := farmOf(cmd)
	if err != nil {
		return nil, err
	}
	return client.Connect(a, creds)
}

// farmName is how messages name the coordinator that dialFarm dials.
func farmName(cmd *cobra.Command) string {
	a, err := farmAddress(cmd)
	if err != nil {
		return "the farm"
	}
	return a.String()
}

// farmOf is where the coordinator is, and how to talk to it.
func farmOf(cmd *cobra.Command) (address.Address, credentials.TransportCredentials, error) {
	a, err := farmAddress(cmd)
	if err != nil {
		return a, nil, err
	}
	dir, _ := cmd.Flags().GetString("cert-dir")
	plain, _ := cmd.Flags().GetBool("insecure")
	creds, err := client.Config{CertDir: dir, Insecure: plain}.Credentials(a)
	switch {
	case errors.Is(err, client.ErrPlaintext):
		return a, nil, usageError{fmt.Errorf("%s is another machine, and wants a certificate: name its folder with --cert-dir (archfarm client-cert makes one), or use --insecure if nobody can listen on the way", a)}
	case errors.Is(err, fs.ErrNotExist):
		return a, nil, usageError{fmt.Errorf("--cert-dir %s: %w; archfarm client-cert --dir %s makes them", dir, err, dir)}
	}
	return a, creds, err
}

func farmAddress(cmd *cobra.Command) (address.Address, error) {
	text, _ := cmd.Flags().GetString("farm")
	if text == "" {
		dir, _ := cmd.Flags().GetString("cert-dir")
		text = defaultFarm(dir)
	}
	list, err := addresses("farm", []string{text})
	if err != nil {
		return address.Address{}, err
	}
	return list[0], nil
}

// defaultFarm is where commands ask that are not told: a certificate's own farm, a
// coordinator's socket, or what runs with the defaults on this machine.
func defaultFarm(certDir string) string {
	if certDir != "" {
		return cmp.Or(append(enroll.Coordinators(filepath.Clean(certDir)), localFarm)...)
	}
	if info, err := os.Stat(adminSocket); err == nil && info.Mode().Type() == fs.ModeSocket {
		return "unix://" + adminSocket
	}
	return localFarm
}
