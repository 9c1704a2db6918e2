package sqlite

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/archfarm/archfarm/file"
)

// lockFile keeps others from opening a database. While it is shared, it also tells the
// successor by how many nanoseconds the leases' clock is ahead of the time of day.
func lockFile(path string) string { return path + ".lock" }

// Share lets a successor open the database (Options.Succeeds). From then on leases are
// all that tells whose a job is.
func (s *Store) Share() error {
	if err := s.writeClock(); err != nil {
		return fmt.Errorf("sharing the database %s: %w", s.path, err)
	}
	if err := s.lock.Share(); err != nil {
		return fmt.Errorf("sharing the database %s: %w", s.path, err)
	}
	return nil
}

// Alone ends the sharing: nobody else can open the database any more. file.ErrLocked as
// long as another process has it open.
func (s *Store) Alone() error {
	if err := s.lock.Alone(); err != nil {
		return fmt.Errorf("having the database %s alone: %w", s.path, err)
	}
	return nil
}

// writeClock tells a successor how late it is. Two processes' clocks differ once the
// machine's has been set between their starts, and one would see the other's leases end
// early.
func (s *Store) writeClock() error {
	ahead := s.engine.now().Sub(time.Now().Round(0)) // by the time of day, not since the start
	return os.WriteFile(lockFile(s.path), []byte(strconv.FormatInt(int64(ahead), 10)), 0o600)
}

func readClock(path string) (ahead time.Duration, err error) {
	data, err := file.Read(path, 64)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0, errors.New("its predecessor has not said what time it is: it does not share the database, start without taking over")
	}
	return time.Duration(n), nil
}
