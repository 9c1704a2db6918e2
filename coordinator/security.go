package coordinator

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/coordinator/authority"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/identity"
)

const (
	// adminSocket is the socket in the data folder through which the farm is
	// administered.
	adminSocket = "admin.sock"
	// maxSocketPath is the longest path of a socket (unix(7)).
	maxSocketPath = 107
	// maxAdvertised bounds the addresses that a join token carries.
	maxAdvertised = 8
)

var errRevoked = errors.New("its certificate was revoked")

// openAuthority opens the farm's certificates, and the door that goes by them.
func (c *coordinator) openAuthority(workers *fleet.Fleet) (err error) {
	hosts := slices.Concat(c.cfg.TLSHosts, ownHosts(c.cfg))
	c.authority, err = authority.Open(authority.Config{
		Dir: c.cfg.DataDir, Shared: c.cfg.succeeds(), Name: c.cfg.Name, Hosts: hosts,
		CACert: c.cfg.CACert, CAKey: c.cfg.CAKey, TLSCert: c.cfg.TLSCert, TLSKey: c.cfg.TLSKey,
		Advertise: c.dialable, Logger: c.log,
		Evict: func(who identity.Identity) {
			c.door.Evict(who)
			if who.Kind == identity.Worker {
				workers.Evict(who.Name, errRevoked)
			}
		},
	})
	if err != nil {
		return err
	}
	c.door = access.NewDoor(c.authority, c.log)
	return nil
}

// administrated is where the coordinator listens, its own socket last.
func (c *coordinator) administrated() []address.Address {
	path, err := filepath.Abs(filepath.Join(c.cfg.DataDir, adminSocket))
	if err != nil || len(path) > maxSocketPath {
		c.log.Warn("the data folder's path is too long for a socket: certificates can be managed by administrators' certificates only", "folder", c.cfg.DataDir)
		return c.cfg.Listen
	}
	c.door.AdminSocket = path
	return slices.Concat(c.cfg.Listen, []address.Address{{Network: "unix", Addr: path}})
}

// warnOfPlaintext says what --insecure means, while it is not too late.
func (c *coordinator) warnOfPlaintext() {
	for _, a := range c.cfg.Listen {
		if c.cfg.Insecure && !a.Local() {
			c.log.Warn("INSECURE: whoever reaches this address can build, attach workers and read what others build; nothing is encrypted unless the client wants it", "listen", a.String())
		}
	}
}

// ownHosts are the names and addresses by which clients may know this machine.
func ownHosts(cfg Config) []string {
	var hosts []string
	for _, a := range slices.Concat(cfg.Listen, []address.Address{{Network: "tcp", Addr: cfg.Advertise}}) {
		if host, _, err := net.SplitHostPort(a.Addr); err == nil && a.Network == "tcp" && host != "" && !net.ParseIP(host).IsUnspecified() {
			hosts = append(hosts, host)
		}
	}
	if name, err := os.Hostname(); err == nil {
		hosts = append(hosts, name)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return hosts
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && !ip.IP.IsLinkLocalUnicast() {
			hosts = append(hosts, ip.IP.String())
		}
	}
	return hosts
}

// dialable are the addresses that a join token carries: what is advertised, or
// what this machine has where that is every address.
func (c *coordinator) dialable() []string {
	bound := c.bound.Load()
	if bound == nil {
		return nil
	}
	advertised := c.cfg.advertised(bound.Listen)
	host, port, err := net.SplitHostPort(advertised)
	if err != nil {
		return nil
	}
	if ip := net.ParseIP(host); host != "" && (ip == nil || !ip.IsUnspecified()) {
		return []string{advertised}
	}
	var out []string
	for _, host := range ownHosts(c.cfg) {
		if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() || strings.EqualFold(host, "localhost") {
			continue
		}
		if len(out) < maxAdvertised {
			out = append(out, net.JoinHostPort(host, port))
		}
	}
	return out
}
