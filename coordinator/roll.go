package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"

	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/file"
)

const (
	// rollFile names the workers that were attached, last.
	rollFile = "fleet.json"
	// maxRoll bounds what is read of it, in bytes.
	maxRoll = 16 << 20
	// callRoll is how often it is brought up to date.
	callRoll = 5 * time.Second
)

// member is a worker of the roll.
type member struct {
	Name      string   `json:"name"`
	Pool      string   `json:"pool"`
	Platforms []string `json:"platforms"`
}

// expectWorkers has builds wait for the workers of the coordinator's last run, or of
// its predecessor: they are coming back, and what they run is not to be refused, nor
// tried elsewhere.
func (c *coordinator) expectWorkers() {
	data, err := file.Read(c.rollPath(), maxRoll)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var roll []member
	if err == nil {
		err = json.Unmarshal(data, &roll)
	}
	if err != nil {
		c.log.Warn("reading which workers the farm had", "error", err)
		return
	}
	var workers []schedule.Worker
	for _, m := range roll {
		w := schedule.Worker{Name: m.Name, Pool: m.Pool}
		for _, name := range m.Platforms {
			if p, err := platforms.Parse(name); err == nil {
				w.Platforms = append(w.Platforms, platforms.Normalize(p))
			}
		}
		workers = append(workers, w)
	}
	c.farm.Scheduler.Expect(workers)
	c.roll = string(data)
}

func (c *coordinator) rollPath() string { return filepath.Join(c.cfg.DataDir, rollFile) }

// keepRoll keeps the roll up to date until ctx ends.
func (c *coordinator) keepRoll(ctx context.Context) {
	ticker := time.NewTicker(callRoll)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			c.writeRoll()
		}
	}
}

// writeRoll writes the roll down if it has changed.
func (c *coordinator) writeRoll() {
	c.rolling.Lock()
	defer c.rolling.Unlock()
	roll := []member{}
	for _, w := range c.farm.Scheduler.Members() {
		m := member{Name: w.Name, Pool: w.Pool}
		for _, p := range w.Platforms {
			m.Platforms = append(m.Platforms, platforms.Format(p))
		}
		roll = append(roll, m)
	}
	slices.SortFunc(roll, func(a, b member) int { return strings.Compare(a.Name, b.Name) })
	data, err := json.Marshal(roll)
	if err == nil && string(data) != c.roll {
		err = file.Replace(c.rollPath(), data, 0o600)
	}
	if err != nil {
		c.log.Warn("noting which workers the farm has", "error", err)
		return
	}
	c.roll = string(data)
}
