package spool

import (
	"fmt"
	"math"
	"os"
	"sync"
	"syscall"
)

// spare is what a spool leaves free on its disk, for whoever else uses that.
const spare = 256 << 20

// disk is the file of a segment. It has no name: nothing is left of it when the
// process ends, however that happens.
type disk struct {
	dir  string
	once sync.Once
	file *os.File
	err  error
}

// open makes the file when something is to be written.
func (d *disk) open() (*os.File, error) {
	d.once.Do(func() {
		d.file, d.err = os.CreateTemp(d.dir, "segment-")
		if d.err == nil {
			d.err = os.Remove(d.file.Name())
		}
	})
	if d.err != nil {
		return nil, fmt.Errorf("spooling a context: %w", d.err)
	}
	return d.file, nil
}

// close gives the space back. Nobody uses the disk any more.
func (d *disk) close() {
	d.once.Do(func() {}) // it may never have been opened
	if d.file != nil {
		_ = d.file.Close()
	}
}

// room is what may be taken of the disk that has the folder.
func room(dir string) int64 {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return math.MaxInt64 // a disk that does not tell is found full by writing to it
	}
	return int64(fs.Bavail)*int64(fs.Bsize) - spare //nolint:gosec,unconvert // disks are smaller than that; the types differ between systems
}
