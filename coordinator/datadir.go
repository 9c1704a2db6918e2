package coordinator

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/archfarm/archfarm/file"
)

// successors begins the name of a folder that is a successor's alone.
const successors = "successor-"

// dataDir is the folder of the state: of one coordinator, or, while one takes over from
// another, of both.
type dataDir struct {
	// own is for what is this process's alone. Folders in it are emptied by who opens
	// them: those of a process that was killed are of no use.
	own  string
	lock *file.Lock
	temp bool // own goes when the process ends
}

// openDataDir makes the folder, and makes sure that no other coordinator uses it but,
// for a successor, those that share it.
func openDataDir(path string, succeeds bool) (*dataDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("making the data folder: %w", err)
	}
	lock, err := file.TakeLock(filepath.Join(path, "lock"), succeeds)
	if errors.Is(err, file.ErrLocked) {
		return nil, fmt.Errorf("locking the data folder %s: another coordinator uses it", path)
	}
	if err != nil {
		return nil, fmt.Errorf("locking the data folder %s: %w", path, err)
	}
	d := &dataDir{own: path, lock: lock, temp: succeeds}
	if succeeds {
		d.own = filepath.Join(path, fmt.Sprint(successors, os.Getpid()))
		err = os.MkdirAll(d.own, 0o700)
	} else {
		err = sweepSuccessors(path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the data folder: %w", err), lock.Close())
	}
	return d, nil
}

// sweepSuccessors removes what successors have left that were killed.
func sweepSuccessors(path string) error {
	left, err := filepath.Glob(filepath.Join(path, successors+"*"))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

func (d *dataDir) close() error {
	var err error
	if d.temp {
		err = os.RemoveAll(d.own)
	}
	return errors.Join(err, d.lock.Close())
}

// sharer is a store that is one process's, or shared with its successor.
type sharer interface {
	Share() error
	Alone() error
}

// sharers are the things in the data folder of which a coordinator has been the only
// user. A PostgreSQL is everybody's anyway.
func (c *coordinator) sharers() []sharer {
	out := []sharer{c.data.lock, c.authority}
	if s, ok := c.state.store.(sharer); ok {
		out = append(out, s)
	}
	return out
}

// share lets a successor use the data folder.
func (c *coordinator) share() error {
	for _, s := range c.sharers() {
		if err := s.Share(); err != nil {
			return fmt.Errorf("sharing the data folder: %w", err)
		}
	}
	return nil
}

// alone ends that; file.ErrLocked while another process still shares it.
func (c *coordinator) alone() error {
	for _, s := range c.sharers() {
		if err := s.Alone(); err != nil {
			return fmt.Errorf("having the data folder alone: %w", err)
		}
	}
	return nil
}
