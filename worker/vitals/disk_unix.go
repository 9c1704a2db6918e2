//go:build linux || darwin

package vitals

import "golang.org/x/sys/unix"

func statfs(dir string) (Disk, bool) {
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) != nil || s.Bsize <= 0 || s.Blocks == 0 {
		return Disk{}, false
	}
	block := uint64(s.Bsize)
	reserved := s.Bfree - min(s.Bavail, s.Bfree)
	return Disk{
		Total: (s.Blocks - min(reserved, s.Blocks)) * block, Free: s.Bavail * block, Reserved: reserved * block,
	}, true
}
