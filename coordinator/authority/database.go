package authority

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
)

const (
	// turnLimit is how long a transaction waits for the other process, whose own take
	// milliseconds.
	turnLimit = 10 * time.Second
	// reviewEvery is how late a process notices what another one has revoked.
	reviewEvery = time.Second
)

// database is the authority's. It is open as long as it is this process's alone. While
// it is shared, with a coordinator that takes over from another, each transaction
// opens it: bbolt has it locked as long as it is open.
type database struct {
	path string

	using sync.RWMutex // read for the time of a transaction
	own   *bolt.DB     // nil: shared
	turn  sync.Mutex   // of this process's transactions, while it is shared
}

func openDatabase(path string, shared bool) (*database, error) {
	d := &database{path: path}
	if shared {
		return d, nil
	}
	return d, d.alone(time.Second)
}

func (d *database) open(limit time.Duration) (*bolt.DB, error) {
	db, err := bolt.Open(d.path, 0o600, &bolt.Options{Timeout: limit, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", d.path, err)
	}
	return db, nil
}

// View, Update and Batch are those of bbolt.
func (d *database) View(f func(*bolt.Tx) error) error {
	return d.use(func(db *bolt.DB) error { return db.View(f) })
}

func (d *database) Update(f func(*bolt.Tx) error) error {
	return d.use(func(db *bolt.DB) error { return db.Update(f) })
}

func (d *database) Batch(f func(*bolt.Tx) error) error {
	return d.use(func(db *bolt.DB) error {
		if d.own == nil {
			return db.Update(f) // nobody else could join in
		}
		return db.Batch(f)
	})
}

func (d *database) use(f func(*bolt.DB) error) error {
	d.using.RLock()
	defer d.using.RUnlock()
	if d.own != nil {
		return f(d.own)
	}
	d.turn.Lock()
	defer d.turn.Unlock()
	db, err := d.open(turnLimit)
	if err != nil {
		return err
	}
	return errors.Join(f(db), db.Close())
}

// share lets another process have it, too.
func (d *database) share() error {
	d.using.Lock()
	defer d.using.Unlock()
	if d.own == nil {
		return nil
	}
	err := d.own.Close()
	d.own = nil
	return err
}

// alone keeps it open.
func (d *database) alone(limit time.Duration) (err error) {
	d.using.Lock()
	defer d.using.Unlock()
	if d.own == nil {
		d.own, err = d.open(limit)
	}
	return err
}

// changed is when it was, last.
func (d *database) changed() time.Time {
	info, err := os.Stat(d.path)
	if err != nil {
		return time.Time{} // its next transaction says why
	}
	return info.ModTime()
}
