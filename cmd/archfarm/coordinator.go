package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/archfarm/archfarm/coordinator"
	"github.com/archfarm/archfarm/coordinator/export"
	"github.com/archfarm/archfarm/coordinator/history"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/session/spool"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/handover"
)

func newCoordinator(stop <-chan struct{}) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "coordinator",
		Short: "Serve the BuildKit endpoint and send its builds to workers",
		Long: `Serve BuildKit's API to unmodified clients. Builds are split by platform and run
on the workers that have joined; SIGTERM lets running builds end and takes no new
ones, a second SIGTERM stops at once. SIGUSR2 starts the same command anew, of what
may be a newer binary by now: that takes what is new, at the same addresses, while this
process lets its builds end. No build is lost.

Sockets of --listen and --http that systemd has opened (sd_listen_fds(3)) are used.`,
		Example: `  archfarm coordinator --data-dir /var/lib/archfarm
  archfarm coordinator --listen 10.0.0.5:8372 --listen unix:///run/archfarm.sock \
      --http 10.0.0.5:8373 --gossip 10.0.0.5:7946 --data-dir /var/lib/archfarm
  archfarm coordinator --data-dir /var/lib/archfarm --push-policy enforce \
      --tag-policy "repository=registry.example.com/app/**,mutable=latest;main;@semver" --tag-policy "repository=registry.example.com/scratch/*,push=off,jobs=off"
  PGPASSFILE=/etc/archfarm/pgpass archfarm coordinator --name farm-2 --data-dir /var/lib/archfarm \
      --store "postgres://archfarm@db.example.com/archfarm?sslmode=verify-full" --secrets-key-file /etc/archfarm/secrets.key`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := coordinatorConfig(cmd, stop)
			if err != nil {
				return err
			}
			if cfg.Inherited, err = handover.Inherit(); err != nil {
				return err
			}
			release, err := upgradable(&cfg)
			if err != nil {
				return err
			}
			defer release()
			return coordinator.Run(cmd.Context(), cfg)
		},
	}
	coordinatorFlags(cmd)
	cmd.Flags().String("name", "", "this coordinator's name in gossip (default: the host's name)")
	cmd.Flags().String("data-dir", "", "folder for the coordinator's state")
	return cmd
}

// upgradable lets SIGUSR2 start a successor.
func upgradable(cfg *coordinator.Config) (release func(), err error) {
	program, err := os.Executable() // as it was called, whatever has been put in its place since
	if err != nil {
		return nil, fmt.Errorf("finding out which program this is: %w", err)
	}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR2)
	cfg.Upgrade, cfg.Successor = asked, append([]string{program}, os.Args[1:]...)
	cfg.Ready = func(coordinator.Bound) {
		if err := handover.Notify("READY=1"); err != nil {
			cfg.Logger.Warn("systemd does not know that this coordinator serves", "error", err)
		}
	}
	return func() { signal.Stop(asked) }, nil
}

func coordinatorFlags(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArray("listen", []string{coordinator.DefaultListen}, "where clients and workers connect: host:port, tcp://host:port or unix:///path; may repeat")
	flags.String("http", coordinator.DefaultHTTP, "where health, metrics and jobs (JSON over HTTP) are served; empty for nowhere")
	flags.Bool("pprof", false, "serve Go's profiles on --http, under /debug/pprof/")
	flags.String("gossip", coordinator.DefaultGossip, "host:port, TCP and UDP, by which workers find this coordinator; empty for none")
	flags.String("advertise", "", "host:port that workers and clients are told to dial (default: the first TCP address of --listen; for 0.0.0.0, this host by its name and addresses)")
	tlsFlags(flags)
	flags.Duration("drain-timeout", coordinator.DefaultDrainTimeout, "how long running builds may take to end after SIGTERM")
	flags.Int("max-builds", coordinator.DefaultMaxBuilds, "how many builds may run or wait at a time; more are refused")
	flags.Int("max-sessions", coordinator.DefaultMaxSessions, "how many client sessions may be open at a time; more are refused")
	flags.Int("leg-attempts", coordinator.DefaultLegAttempts, "on how many workers a build is tried when they are lost on the way; 1: it is not continued elsewhere")
	flags.Duration("failover-wait", coordinator.DefaultFailoverWait, "how long a build whose worker was lost waits for it to come back, when no other runs its platform; 0: not at all")
	flags.StringArray("allow-emulation", nil, "pool whose workers may emulate platforms that no worker runs natively; may repeat")
	flags.Int64("spool-max-size", export.DefaultSpoolLimit, "bytes of disk that archives merged from several platforms may take while they are made")
	flags.Int64("context-spool-max-size", spool.DefaultLimit, "bytes of disk that files of local contexts may take which several workers of a build want, so that clients send each once; 0 for none, then they send them to each")
	flags.String("cache", "", "registry cache of builds that name none: registry.example.com/cache/{{.Repository}}, with the tenant before that and the platform as its tag")
	historyFlags(flags)
	jobFlags(flags)
	gossipFlags(flags)
}

func jobFlags(flags *pflag.FlagSet) {
	flags.String("store", "", "where jobs, tags, secrets and the build history are kept: a postgres:// URL that several coordinators share (default: a database in --data-dir); a password is better in "+envName("store")+" or PGPASSFILE")
	flags.String("secrets-key-file", "", "key that encrypts jobs' secrets in --store, the same for all coordinators that share it (default: one that is made in --data-dir)")
	flags.StringArray("tag-policy", nil, `which tags of some repositories may move: "repository=registry.example.com/app/**,push=enforce,mutable=latest;main;@semver"; may repeat, the first that fits counts`)
	markOwnLines(flags, "tag-policy")
	flags.String("push-policy", string(publish.Warn), "off, warn or enforce immutable tags for docker buildx build --push, where no --tag-policy says another")
	flags.Int("max-jobs", coordinator.DefaultMaxJobs, "how many jobs run or wait for a worker at a time; the others stay in the queue")
	flags.Duration("job-timeout", coordinator.DefaultJobTimeout, "how long a job may run that does not say itself")
	flags.Int("job-attempts", coordinator.DefaultJobAttempts, "how often a leg is tried whose failure is not its build's, of a job that does not say itself")
	flags.Duration("job-retention", coordinator.DefaultJobRetention, "for how long ended jobs are kept, with their logs")
	flags.Duration("job-lease", coordinator.DefaultLease, "how long another coordinator waits before it goes on with the jobs of one that is lost")
	flags.Duration("job-worker-wait", coordinator.DefaultWorkerWait, "how long a job waits for a worker of its platform to be attached, before it is tried all the same")
	flags.Int64("max-context-size", coordinator.DefaultMaxContext, "bytes that an uploaded context may have")
}

func failoverConfig(flags *pflag.FlagSet, cfg *coordinator.Config) error {
	if cfg.LegAttempts, _ = flags.GetInt("leg-attempts"); cfg.LegAttempts < 1 {
		return usageError{fmt.Errorf("--leg-attempts %d: at least 1 must be possible", cfg.LegAttempts)}
	}
	switch cfg.FailoverWait, _ = flags.GetDuration("failover-wait"); {
	case cfg.FailoverWait < 0:
		return usageError{errors.New("--failover-wait must not be negative")}
	case cfg.FailoverWait == 0:
		cfg.FailoverWait = -1 // of a Config, 0 is the default
	}
	return nil
}

func jobConfig(flags *pflag.FlagSet, cfg *coordinator.Config) error {
	cfg.Store, _ = flags.GetString("store")
	cfg.SecretsKeyFile, _ = flags.GetString("secrets-key-file")
	rules, _ := flags.GetStringArray("tag-policy")
	for _, text := range rules {
		rule, err := publish.ParseRule(text)
		if err != nil {
			return usageError{fmt.Errorf("--tag-policy: %w", err)}
		}
		cfg.Policy.Rules = append(cfg.Policy.Rules, rule)
	}
	mode, _ := flags.GetString("push-policy")
	var err error
	if cfg.Policy.Push, err = publish.ParseMode(mode); err != nil {
		return usageError{fmt.Errorf("--push-policy: %w", err)}
	}
	for name, value := range map[string]*int{"max-jobs": &cfg.MaxJobs, "job-attempts": &cfg.JobAttempts} {
		if *value, _ = flags.GetInt(name); *value < 1 {
			return usageError{fmt.Errorf("--%s %d: at least 1 must be possible", name, *value)}
		}
	}
	for name, value := range map[string]*time.Duration{"job-timeout": &cfg.JobTimeout, "job-retention": &cfg.JobRetention, "job-lease": &cfg.JobLease, "job-worker-wait": &cfg.JobWorkerWait} {
		if *value, _ = flags.GetDuration(name); *value <= 0 {
			return usageError{fmt.Errorf("--%s must be positive", name)}
		}
	}
	if cfg.MaxContext, _ = flags.GetInt64("max-context-size"); cfg.MaxContext <= 0 {
		return usageError{errors.New("--max-context-size must be positive")}
	}
	return nil
}

func tlsFlags(flags *pflag.FlagSet) {
	flags.Bool("insecure", false, "take connections without TLS from other machines, too: whoever reaches --listen may do anything")
	flags.StringArray("tls-host", nil, "further name or address by which clients reach the coordinator, for its certificate; may repeat")
	flags.String("ca-cert", "", "your own authority's certificate, PEM (default: the farm's own, in --data-dir)")
	flags.String("ca-key", "", "its key, to issue certificates for workers and clients; without it, --tls-cert and --tls-key are needed")
	flags.String("tls-cert", "", "your own certificate for the coordinator, PEM, the intermediates after it")
	flags.String("tls-key", "", "its key")
}

func tlsConfig(flags *pflag.FlagSet, cfg *coordinator.Config) {
	cfg.Insecure, _ = flags.GetBool("insecure")
	cfg.TLSHosts, _ = flags.GetStringArray("tls-host")
	cfg.CACert, _ = flags.GetString("ca-cert")
	cfg.CAKey, _ = flags.GetString("ca-key")
	cfg.TLSCert, _ = flags.GetString("tls-cert")
	cfg.TLSKey, _ = flags.GetString("tls-key")
}

func historyFlags(flags *pflag.FlagSet) {
	flags.Bool("history", true, "keep records of builds, as docker buildx history shows them")
	flags.Int("history-max-entries", history.DefaultMaxEntries, "build records to keep whatever their age; 0 is --history=false")
	flags.Duration("history-max-age", history.DefaultMaxAge, "how old further build records may become")
	flags.Int64("history-max-size", history.DefaultMaxSize, "bytes that all build records and their content may take; the oldest go first")
}

func historyConfig(flags *pflag.FlagSet, cfg *coordinator.Config) error {
	enabled, _ := flags.GetBool("history")
	cfg.HistoryMaxEntries, _ = flags.GetInt("history-max-entries")
	cfg.HistoryMaxAge, _ = flags.GetDuration("history-max-age")
	cfg.HistoryMaxSize, _ = flags.GetInt64("history-max-size")
	cfg.HistoryDisabled = !enabled || cfg.HistoryMaxEntries == 0
	switch {
	case cfg.HistoryMaxEntries < 0:
		return usageError{errors.New("--history-max-entries must not be negative")}
	case cfg.HistoryMaxAge <= 0:
		return usageError{errors.New("--history-max-age must be positive")}
	case cfg.HistoryMaxSize <= 0:
		return usageError{errors.New("--history-max-size must be positive")}
	}
	return nil
}

func coordinatorConfig(cmd *cobra.Command, stop <-chan struct{}) (coordinator.Config, error) {
	flags := cmd.Flags()
	cfg := coordinator.Config{Version: version, Stop: stop}
	listen, _ := flags.GetStringArray("listen")
	var err error
	if cfg.Listen, err = addresses("listen", listen); err != nil {
		return cfg, err
	}
	if cfg.GossipKey, err = gossipKey(cmd); err != nil {
		return cfg, err
	}
	if cfg.Logger, err = logger(cmd); err != nil {
		return cfg, err
	}
	cfg.Name, _ = flags.GetString("name")
	if cfg.Name == "" {
		if cfg.Name, err = os.Hostname(); err != nil {
			return cfg, err
		}
	}
	tlsConfig(flags, &cfg)
	cfg.HTTP, _ = flags.GetString("http")
	cfg.Pprof, _ = flags.GetBool("pprof")
	cfg.Gossip, _ = flags.GetString("gossip")
	cfg.GossipAdvertise, _ = flags.GetString("gossip-advertise")
	cfg.Advertise, _ = flags.GetString("advertise")
	cfg.Join, _ = flags.GetStringArray("join")
	if cfg.DataDir, _ = flags.GetString("data-dir"); cfg.DataDir == "" {
		return cfg, usageError{errors.New("no folder for the state is named; use --data-dir")}
	}
	cfg.DrainTimeout, _ = flags.GetDuration("drain-timeout")
	cfg.AllowEmulation, _ = flags.GetStringArray("allow-emulation")
	if template, _ := flags.GetString("cache"); template != "" {
		var err error
		if cfg.Cache, err = split.ParseFarmCache(template); err != nil {
			return cfg, usageError{fmt.Errorf("--cache %w", err)}
		}
	}
	for name, limit := range map[string]*int{"max-builds": &cfg.MaxBuilds, "max-sessions": &cfg.MaxSessions} {
		if *limit, _ = flags.GetInt(name); *limit < 1 {
			return cfg, usageError{fmt.Errorf("--%s %d: at least 1 must be possible", name, *limit)}
		}
	}
	if cfg.SpoolMaxSize, _ = flags.GetInt64("spool-max-size"); cfg.SpoolMaxSize <= 0 {
		return cfg, usageError{errors.New("--spool-max-size must be positive")}
	}
	if cfg.ContextSpoolMaxSize, _ = flags.GetInt64("context-spool-max-size"); cfg.ContextSpoolMaxSize < 0 {
		return cfg, usageError{errors.New("--context-spool-max-size must not be negative")}
	}
	err = errors.Join(historyConfig(flags, &cfg), failoverConfig(flags, &cfg), jobConfig(flags, &cfg)) // before cfg is copied
	return cfg, err
}
