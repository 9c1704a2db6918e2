package main

import (
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/history"
)

func TestCoordinatorConfig_History(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		args     []string
		disabled bool
		entries  int
		age      time.Duration
		size     int64
	}{
		"by default":             {nil, false, history.DefaultMaxEntries, history.DefaultMaxAge, history.DefaultMaxSize},
		"own limits":             {[]string{"--history-max-entries=7", "--history-max-age=1h", "--history-max-size=1000"}, false, 7, time.Hour, 1000},
		"off":                    {[]string{"--history=false"}, true, history.DefaultMaxEntries, history.DefaultMaxAge, history.DefaultMaxSize},
		"off, as in a buildkitd": {[]string{"--history-max-entries=0"}, true, 0, history.DefaultMaxAge, history.DefaultMaxSize},
	} {
		cmd := newCoordinator(nil)
		cmd.Flags().AddFlagSet(newRoot(nil).PersistentFlags())
		if err := cmd.ParseFlags(append(test.args, "--data-dir=x")); err != nil {
			t.Fatal(err)
		}
		cfg, err := coordinatorConfig(cmd, nil)
		if err != nil || cfg.HistoryDisabled != test.disabled || cfg.HistoryMaxEntries != test.entries || cfg.HistoryMaxAge != test.age || cfg.HistoryMaxSize != test.size {
			t.Errorf("%s: %+v, %v", name, cfg, err)
		}
	}
	for _, bad := range []string{"--history-max-entries=-1", "--history-max-age=0s", "--history-max-size=-1"} {
		cmd := newCoordinator(nil)
		cmd.Flags().AddFlagSet(newRoot(nil).PersistentFlags())
		if err := cmd.ParseFlags([]string{bad, "--data-dir=x"}); err != nil {
			t.Fatal(err)
		}
		if _, err := coordinatorConfig(cmd, nil); err == nil {
			t.Errorf("%s is no error", bad)
		}
	}
}
