package coordinator

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/address"
)

var tcp, unix = address.Address{Network: "tcp", Addr: "10.0.0.5:8372"}, address.Address{Network: "unix", Addr: "/run/a.sock"}

func TestConfig_WhatIsMissingHasADefault(t *testing.T) {
	t.Parallel()
	cfg := Config{Listen: []address.Address{tcp}, DataDir: "x", Name: "Farm-1"}
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	if cfg.Logger == nil || cfg.DrainTimeout != DefaultDrainTimeout || cfg.Name != "farm-1" {
		t.Errorf("completed to %+v", cfg)
	}
	cfg = Config{Listen: []address.Address{tcp}, DataDir: "x"}
	if err := cfg.validate(); err != nil || cfg.Name == "" {
		t.Errorf("without a name: %q, %v", cfg.Name, err)
	}
}

func TestConfig_Refused(t *testing.T) {
	t.Parallel()
	for word, cfg := range map[string]Config{
		"--listen":   {DataDir: "x"},
		"--data-dir": {Listen: []address.Address{tcp}},
		`"farm"`:     {Listen: []address.Address{tcp}, DataDir: "x", Advertise: "farm"},
	} {
		if err := cfg.validate(); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("want an error about %s, got %v", word, err)
		}
	}
}

func TestAdvertised_IsTheFirstDoorThatOthersCanReach(t *testing.T) {
	t.Parallel()
	if got := (&Config{}).advertised([]address.Address{unix, tcp}); got != tcp.Addr {
		t.Errorf("got %q", got)
	}
	if got := (&Config{Advertise: "farm.example:1"}).advertised([]address.Address{tcp}); got != "farm.example:1" {
		t.Errorf("got %q instead of the operator's word", got)
	}
	if got := (&Config{}).advertised([]address.Address{unix}); got != "" {
		t.Errorf("got %q of a socket", got)
	}
}

func TestDataDir_BelongsToOneCoordinatorUnlessItIsShared(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "new", "state")
	opened := func(succeeds bool) *dataDir {
		t.Helper()
		d, err := openDataDir(dir, succeeds)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	refused := func(when string, succeeds bool) {
		t.Helper()
		if _, err := openDataDir(dir, succeeds); err == nil || !strings.Contains(err.Error(), "another coordinator uses it") || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", when, err)
		}
	}
	closed := func(d *dataDir) {
		t.Helper()
		if err := d.close(); err != nil {
			t.Error(err)
		}
	}
	first := opened(false)
	refused("a second one", false)
	refused("a successor of nobody", true)
	if err := first.lock.Share(); err != nil {
		t.Fatal(err)
	}
	heir := opened(true)
	refused("a third one", false)
	if first.own != dir || filepath.Dir(heir.own) != dir {
		t.Errorf("their own folders are %s and %s", first.own, heir.own)
	}
	closed(first)
	refused("beside the successor", false)
	closed(heir)
	if _, err := os.Stat(heir.own); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the successor's folder: %v", err)
	}
	killed := filepath.Join(dir, "successor-1")
	if err := os.MkdirAll(filepath.Join(killed, "spool"), 0o700); err != nil {
		t.Fatal(err)
	}
	closed(opened(false))
	if _, err := os.Stat(killed); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder of a successor that was killed: %v", err)
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder's mode is %v, %v", info.Mode(), err)
	}
}

func TestDataDir_ThatCannotBeMade(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openDataDir(filepath.Join(file, "state"), false); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("under a file: %v", err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "lock"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := openDataDir(dir, false); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("with a folder where the lock should be: %v", err)
	}
}
