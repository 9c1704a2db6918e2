package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/coordinator"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
)

func TestSecretForget_RemovesOnlyWhenToldTo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secrets.key"), []byte("01"+strings.Repeat("02", 31)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := try(t, "", "secret", "forget", "--data-dir", dir, "--yes"); got.err == nil || !strings.Contains(got.err.Error(), dir) {
		t.Errorf("without a database: %v", got)
	}
	store, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(dir, coordinator.StoreFile), BlobDir: filepath.Join(dir, "blobs")})
	if err != nil {
		t.Fatal(err)
	}
	if err := store.PutSecret(t.Context(), "acme", "npm", []byte("sealed by nobody")); err != nil {
		t.Fatal(err)
	}
	if got := try(t, "", "secret", "forget", "--data-dir", dir, "--yes"); got.err == nil || !strings.Contains(got.err.Error(), "another archfarm has it open") {
		t.Errorf("while a coordinator runs: %v", got)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the first has changed nothing
		if got := try(t, "", "secret", "forget", "--data-dir", dir); got.err != nil || !strings.Contains(got.stdout, "acme     npm") || !strings.Contains(got.stderr, "--yes") {
			t.Errorf("asked only: %v", got)
		}
	}
	if got := run(t, "secret", "forget", "--data-dir", dir, "--yes", "--output", "json"); !strings.Contains(got, `"removed": true`) || !strings.Contains(got, `"name": "npm"`) {
		t.Errorf("removed: %s", got)
	}
	if got := run(t, "secret", "forget", "--data-dir", dir, "--output", "json"); got != "[]\n" {
		t.Errorf("left: %s", got)
	}
}
