package vitals

import (
	"fmt"
	"path/filepath"
)

// Disk is the room on a disk, in bytes, as an ordinary user has it.
type Disk struct {
	Total uint64 // 0: not known
	Free  uint64
	// Reserved is free too, but for the superuser only.
	Reserved uint64
}

// Used is the share that is taken, 0 to 1.
func (d Disk) Used() float64 {
	if d.Total == 0 {
		return 0
	}
	return float64(d.Total-min(d.Free, d.Total)) / float64(d.Total)
}

func (d Disk) String() string {
	return fmt.Sprintf("%.0f %% full: %s free of %s", 100*d.Used(), Bytes(d.Free), Bytes(d.Total))
}

// Bytes is a number of bytes for people, in powers of 1000.
func Bytes(n uint64) string {
	const unit = 1000
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, prefix := float64(n)/unit, 0
	for ; value >= unit-0.05 && prefix < len("kMGTPE")-1; prefix++ {
		value /= unit
	}
	return fmt.Sprintf("%.1f %cB", value, "kMGTPE"[prefix])
}

// DiskOf reads the room on the disk that holds dir, or will hold it. The zero
// value says that it is not known.
func DiskOf(dir string) Disk {
	for dir != "" {
		if d, ok := statfs(dir); ok {
			return d
		}
		up := filepath.Dir(dir)
		if up == dir {
			break
		}
		dir = up
	}
	return Disk{}
}

func (m *Machine) diskSpace() Disk { return DiskOf(m.disk) }
