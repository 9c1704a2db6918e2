package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/coordinator"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
)

func TestBackup_WhileTheDatabaseIsInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(dir, coordinator.StoreFile), BlobDir: filepath.Join(dir, "blobs")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	if err := store.PutSecret(t.Context(), "acme", "npm", []byte("sealed")); err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(t.TempDir(), "copy.db")
	if got := run(t, "backup", "--data-dir", dir, copied); !strings.HasPrefix(got, copied+": ") {
		t.Errorf("printed %q", got)
	}
	again, err := sqlite.Open(t.Context(), sqlite.Options{Path: copied, BlobDir: filepath.Join(t.TempDir(), "blobs")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }()
	if sealed, err := again.Secret(t.Context(), "acme", "npm"); err != nil || string(sealed) != "sealed" {
		t.Errorf("in the copy: %q, %v", sealed, err)
	}
	if help := run(t, "backup", "--help"); !strings.Contains(help, "The\ncoordinator may be running") || !strings.Contains(help, "secrets.key") || !strings.Contains(help, "authority.db") {
		t.Errorf("its help does not say what belongs to a backup:\n%s", help)
	}
	for what, args := range map[string][]string{"a file that is there": {dir, copied}, "a folder without a database": {t.TempDir(), copied + "2"}} {
		if got := try(t, "", "backup", "--data-dir", args[0], args[1]); exitCode(got.err) != exitUsage {
			t.Errorf("%s: %v", what, got.err)
		}
	}
	if _, err := os.Stat(copied + "2"); err == nil {
		t.Error("a file has been made")
	}
}
