package binfmt

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// bundledPrefix begins the names of the emulators that BuildKit brings along
	// and uses on its own (docs/multi-platform.md of BuildKit).
	bundledPrefix = "buildkit-qemu-"
	// maxFolders bounds a PATH.
	maxFolders = 64
)

// qemuNames are qemu's words for architectures, where they differ from Go's.
var qemuNames = map[string]string{
	"amd64": "x86_64", "arm64": "aarch64", "386": "i386", "loong64": "loongarch64", "mips64le": "mips64el",
}

// Bundled are the platforms for which a buildkitd, a process of this machine,
// finds an emulator in its PATH or beside itself.
func Bundled(pid int) []ocispecs.Platform {
	return bundledIn(foldersOf(fmt.Sprintf("/proc/%d", pid)))
}

// foldersOf are the folders where the process shown in proc looks for programs,
// as this process reaches them. Those that it may not see are left out.
func foldersOf(proc string) (folders []string) {
	if program, err := os.Readlink(filepath.Join(proc, "exe")); err == nil {
		folders = append(folders, filepath.Dir(program))
	}
	path := os.Getenv("PATH")
	if environ, err := os.ReadFile(filepath.Join(proc, "environ")); err == nil {
		for entry := range bytes.SplitSeq(environ, []byte{0}) {
			if value, ok := strings.CutPrefix(string(entry), "PATH="); ok {
				path = value
			}
		}
	}
	folders = append(folders, filepath.SplitList(path)...)
	folders = folders[:min(len(folders), maxFolders)]
	for i, f := range folders {
		folders[i] = filepath.Join(proc, "root", f) // it may be in a container
	}
	return folders
}

func bundledIn(folders []string) (found []ocispecs.Platform) {
	for _, k := range kinds {
		arch := k.platforms[0].Architecture
		name := arch
		if n, ok := qemuNames[arch]; ok {
			name = n
		}
		if slices.ContainsFunc(folders, func(f string) bool {
			info, err := os.Stat(filepath.Join(f, bundledPrefix+name))
			return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
		}) {
			found = append(found, k.platforms...)
		}
	}
	return found
}
