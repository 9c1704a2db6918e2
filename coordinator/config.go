package coordinator

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/handover"
	"github.com/archfarm/archfarm/identity"
)

// Defaults of a coordinator.
const (
	DefaultListen       = "127.0.0.1:8372"
	DefaultHTTP         = "127.0.0.1:8373"
	DefaultGossip       = "127.0.0.1:7946"
	DefaultDrainTimeout = 10 * time.Minute
	DefaultLegAttempts  = 3
	DefaultFailoverWait = 2 * time.Minute
	DefaultMaxBuilds    = 1000
	DefaultMaxSessions  = 4000
	DefaultMaxJobs      = 100
	DefaultJobTimeout   = 6 * time.Hour
	DefaultJobAttempts  = 3
	DefaultJobRetention = 30 * 24 * time.Hour
	DefaultWorkerWait   = 5 * time.Minute
	// DefaultLease is how long a job of a coordinator that was killed stays its own.
	DefaultLease = 15 * time.Second
	// StoreFile is the database's name in DataDir.
	StoreFile = "archfarm.db"
	// DefaultMaxContext bounds an uploaded context, in bytes.
	DefaultMaxContext = 8 << 30
)

// Config is how a coordinator runs.
type Config struct {
	// Name is unique among the coordinators of a farm.
	Name string
	// Listen are the addresses of the gRPC door: BuildKit's API, archfarm's own,
	// and the connections that agents dial back. At least one; the first TCP one
	// is what gossip tells the workers.
	Listen []address.Address
	// Insecure takes connections in plaintext from other machines, too.
	Insecure bool
	// TLSHosts are further names and addresses that the coordinator's certificate
	// is for, beside those of this machine.
	TLSHosts []string
	// CACert and CAKey are the operator's own authority; empty: one in DataDir. With
	// CACert alone, TLSCert and TLSKey are the coordinator's certificate, and no
	// certificates are issued.
	CACert, CAKey   string
	TLSCert, TLSKey string
	// HTTP is host:port of health, metrics and jobs; empty for none.
	HTTP string
	// Pprof adds Go's profiles to HTTP. They show what the process does, not what
	// it builds, but slow it down: not for everybody.
	Pprof bool
	// Gossip is host:port, TCP and UDP, of the member list; empty for none.
	Gossip string
	// GossipAdvertise is what others reach Gossip by, when that is not its address.
	GossipAdvertise string
	// Advertise is the host:port that workers dial; by default the first TCP
	// address of Listen.
	Advertise string
	// Join are other members' gossip addresses.
	Join []string
	// GossipKey encrypts gossip: 16, 24 or 32 bytes.
	GossipKey []byte
	// DataDir holds the coordinator's state. It belongs to one process at a time.
	DataDir string
	// DrainTimeout bounds the wait for running builds once the context has ended.
	DrainTimeout time.Duration
	// HistoryDisabled makes new builds leave no record.
	HistoryDisabled bool
	// HistoryMaxEntries is how many build records are kept whatever their age;
	// those beyond go when they are older than HistoryMaxAge. HistoryMaxSize bounds
	// all records with what they name, in bytes; the oldest go first. Pinned records
	// stay. Zero means the default of package history.
	HistoryMaxEntries int
	HistoryMaxAge     time.Duration
	HistoryMaxSize    int64
	// SpoolMaxSize is how many bytes of disk archives that are merged from several
	// platforms may take at a time, of all builds together; zero means 64 GiB.
	SpoolMaxSize int64
	// ContextSpoolMaxSize is how many bytes of disk the files of local contexts may take
	// that several workers of a build want, of all builds together; zero: none, each
	// worker asks the client.
	ContextSpoolMaxSize int64
	// MaxBuilds is how many builds run or wait at a time, MaxSessions how many client
	// sessions are open; more are refused. A build that waits takes some 180 KiB, a
	// session 120 KiB; a build that prints much up to 32 MiB.
	MaxBuilds, MaxSessions int
	// LegAttempts is on how many workers a leg is tried when they are lost. FailoverWait
	// is for how long it waits for a lost worker when no other runs its platform; negative:
	// it does not.
	LegAttempts  int
	FailoverWait time.Duration
	// AllowEmulation names the pools whose workers may emulate platforms that no worker
	// runs natively.
	AllowEmulation []string
	// Store is where jobs, tags, secrets and the history are kept: empty for a database in DataDir,
	// or the URL of a PostgreSQL that several coordinators share.
	Store string
	// SecretsKeyFile encrypts the secrets in Store; empty: one in DataDir. Coordinators
	// that share a store need the same.
	SecretsKeyFile string
	// Policy says which tags may be moved.
	Policy publish.Policy
	// Cache names the caches that builds use which name none; nil for no such.
	Cache *split.FarmCache
	// MaxJobs is how many jobs run at a time on this coordinator, those whose legs
	// wait for a worker included. The others wait in the store.
	MaxJobs int
	// JobTimeout and JobAttempts hold for jobs that do not say. JobRetention is for how
	// long ended jobs are kept, JobLease how long a lost coordinator's jobs rest.
	// JobWorkerWait is how long a leg waits for a worker of its platform to be attached.
	JobTimeout, JobRetention, JobLease, JobWorkerWait time.Duration
	JobAttempts                                       int
	// MaxContext bounds an uploaded context, in bytes.
	MaxContext int64
	// Inherited are listening sockets that this process was given; nil: none. With a
	// predecessor among them, Run takes over from it.
	Inherited *handover.Inheritance
	// Upgrade has Run start Successor, a command with its arguments, each time that it
	// sends: that process inherits the sockets and shares DataDir, and everything new is
	// its; Run returns when what has begun here has ended.
	Upgrade   <-chan os.Signal
	Successor []string
	// Stop, when closed, ends the wait for running builds.
	Stop <-chan struct{}
	// Version of this program.
	Version string
	Logger  *slog.Logger
	// Ready is called once, when all addresses are bound.
	Ready func(Bound)
}

// Bound are the addresses in use, ports that were 0 filled in.
type Bound struct {
	Listen []address.Address
	HTTP   string
	Gossip string
	// Admin is the path of the socket for administrators; empty: there is none.
	Admin string
}

func (c *Config) validate() error {
	if len(c.Listen) == 0 {
		return errors.New("no address to listen on; name one with --listen")
	}
	if c.DataDir == "" {
		return errors.New("no folder for the coordinator's state; name one with --data-dir")
	}
	if c.DrainTimeout <= 0 {
		c.DrainTimeout = DefaultDrainTimeout
	}
	if c.MaxBuilds <= 0 {
		c.MaxBuilds = DefaultMaxBuilds
	}
	if c.MaxSessions <= 0 {
		c.MaxSessions = DefaultMaxSessions
	}
	c.LegAttempts = cmp.Or(max(c.LegAttempts, 0), DefaultLegAttempts)
	c.FailoverWait = cmp.Or(c.FailoverWait, DefaultFailoverWait)
	c.jobDefaults()
	for _, pool := range c.AllowEmulation {
		if !identity.ValidName(pool) {
			return fmt.Errorf("--allow-emulation %q: no pool can be called that: use letters, digits, '.', '_' and '-'", pool)
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Advertise != "" {
		if _, _, err := net.SplitHostPort(c.Advertise); err != nil {
			return fmt.Errorf("the address to advertise, %q, is not host:port: %w", c.Advertise, err)
		}
	}
	if c.Name == "" {
		c.Name = "coordinator"
	}
	c.Name = strings.ToLower(c.Name)
	return nil
}

// jobDefaults fills in what nobody has said of jobs.
func (c *Config) jobDefaults() {
	c.MaxJobs = cmp.Or(max(c.MaxJobs, 0), DefaultMaxJobs)
	c.JobAttempts = cmp.Or(max(c.JobAttempts, 0), DefaultJobAttempts)
	c.JobTimeout = cmp.Or(max(c.JobTimeout, 0), DefaultJobTimeout)
	c.JobRetention = cmp.Or(max(c.JobRetention, 0), DefaultJobRetention)
	c.JobWorkerWait = cmp.Or(max(c.JobWorkerWait, 0), DefaultWorkerWait)
	c.JobLease = cmp.Or(max(c.JobLease, 0), DefaultLease)
	c.MaxContext = cmp.Or(max(c.MaxContext, 0), DefaultMaxContext)
}

// advertised is the gRPC address that gossip tells.
func (c *Config) advertised(bound []address.Address) string {
	if c.Advertise != "" {
		return c.Advertise
	}
	for _, a := range bound {
		if a.Network == "tcp" {
			return a.Addr
		}
	}
	return ""
}
