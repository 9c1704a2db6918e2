package binfmt

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestBundled_AreTheProgramsInBuildkitdsFolders(t *testing.T) {
	t.Parallel()
	proc := t.TempDir()
	write := func(mode os.FileMode, path ...string) {
		t.Helper()
		file := filepath.Join(append([]string{proc}, path...)...)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	write(0o755, "root/opt/buildkit/buildkit-qemu-aarch64")
	write(0o755, "root/usr/bin/buildkit-qemu-arm")
	write(0o644, "root/usr/bin/buildkit-qemu-s390x") // not to be executed
	write(0o755, "root/usr/sbin/buildkit-qemu-riscv64")
	if err := os.Symlink("/opt/buildkit/buildkitd", filepath.Join(proc, "exe")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(proc, "environ"), []byte("HOME=/root\x00PATH=/bin:/usr/bin\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range bundledIn(foldersOf(proc)) {
		got = append(got, p.Architecture+p.Variant)
	}
	if want := []string{"arm64", "armv7", "armv6"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
