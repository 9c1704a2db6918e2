package worker

import (
	"context"
	"log/slog"
	"sync"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/vitals"
	"github.com/moby/buildkit/client"
)

const (
	// sizeEvery is the least time between two questions for the cache's size, and
	// sizeShare the share of time that answering them may take: BuildKit walks
	// through what it has not measured yet.
	sizeEvery  = time.Minute
	sizeShare  = 20
	sizeWithin = 5 * time.Minute
	// busyIO is the pressure above which the size is not asked for.
	busyIO = 0.3
	// pruneWithin bounds one pruning.
	pruneWithin = 15 * time.Minute
)

// reader is what the caretaker wants of vitals.Machine.
type reader interface {
	Read(now time.Time) (*archfarmv1.Load, vitals.Disk)
}

// caretaker looks after the machine: it takes readings, offers fewer slots under
// pressure, and makes room on a disk that is nearly full.
type caretaker struct {
	slots    *slots
	machine  reader
	buildkit *daemon
	timing   timing
	log      *slog.Logger

	mu       sync.Mutex
	throttle vitals.Throttle
	fill     vitals.Fill
	offered  int
	full     bool // when last looked
	disk     vitals.Disk
	cache    *uint64
}

func newCaretaker(cfg Config, slots *slots, buildkit *daemon, timing timing) *caretaker {
	return &caretaker{
		slots: slots, machine: vitals.New(cfg.BuildKitRoot), buildkit: buildkit, timing: timing, log: cfg.Logger,
		offered: slots.total, fill: vitals.Fill{High: cfg.DiskHigh, Low: cfg.DiskLow},
	}
}

// run looks at the machine until ctx ends, and waits for what it has started.
func (c *caretaker) run(ctx context.Context) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	wake := make(chan struct{}, 1) // the disk is full
	tasks.Go(func() { c.measure(ctx) })
	tasks.Go(func() { c.prune(ctx, wake) })
	for {
		if c.look(time.Now()) {
			select {
			case wake <- struct{}{}:
			default: // it prunes already
			}
		}
		if !sleep(ctx, c.timing.lookEvery) {
			return
		}
	}
}

// look takes readings and draws the conclusions. It tells whether the disk is to
// be pruned.
func (c *caretaker) look(now time.Time) (full bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	load, disk := c.machine.Read(now)
	load.CacheBytes = c.cache
	c.disk = disk
	used := c.slots.setLoad(load)
	offered, why := c.throttle.Update(now, c.slots.total, used, load)
	if c.offered != offered {
		c.log.Info("changing what is offered", "slots", offered, "reason", why)
	}
	c.offered = offered
	c.slots.offer(offered, why)
	c.judge(disk)
	return c.full
}

// judge cordons a worker whose disk is full, and takes that back.
func (c *caretaker) judge(disk vitals.Disk) {
	full := c.fill.Update(disk)
	if full == c.full {
		return
	}
	c.full = full
	if !full {
		c.log.Info("the disk has room again", "disk", disk.String())
		c.slots.setDiskFull("")
		return
	}
	c.log.Warn("the disk is nearly full: nothing new is taken, and the cache is pruned", "disk", disk.String())
	c.slots.setDiskFull("disk " + disk.String())
}

// overrule takes attempts on a full disk, too, until it has had room once.
func (c *caretaker) overrule() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fill.Overrule()
	c.full = false
	c.slots.setDiskFull("")
}

// measure asks BuildKit for the size of its cache, at most once a minute, until
// ctx ends.
func (c *caretaker) measure(ctx context.Context) {
	pause := c.timing.lookEvery // the first soon
	for sleep(ctx, pause) {
		pause = sizeEvery
		if c.busy() {
			continue
		}
		begun := time.Now()
		size, err := c.buildkit.cacheSize(ctx)
		pause = max(sizeEvery, sizeShare*time.Since(begun))
		if err != nil {
			c.log.Debug("asking buildkitd for the size of its cache", "error", err)
			continue
		}
		c.mu.Lock()
		c.cache = &size
		c.mu.Unlock()
	}
}

// busy tells whether questions that cost something have to wait.
func (c *caretaker) busy() bool {
	report, _ := c.slots.report()
	return report.GetState() == archfarmv1.Worker_STATE_UNAVAILABLE || report.GetLoad().GetIoPressure() >= busyIO ||
		int(report.GetSlots().GetTotal()) < c.slots.total
}

// prune makes room whenever wake says that the disk is full, and again as long as
// it is, when an attempt has ended and let go of its share, or after a while.
func (c *caretaker) prune(ctx context.Context, wake <-chan struct{}) {
	for {
		select {
		case <-wake:
		case <-ctx.Done():
			return
		}
		if !c.isFull() { // meanwhile
			continue
		}
		c.makeRoom(ctx)
		if !c.awaitRelease(ctx) {
			return
		}
	}
}

// awaitRelease waits until an attempt has ended, at most as long as there is
// between two prunings, and tells whether ctx let it.
func (c *caretaker) awaitRelease(ctx context.Context) bool {
	enough := time.NewTimer(c.timing.pruneEvery)
	defer enough.Stop()
	for used := uint32(0); ; {
		report, changed := c.slots.report()
		if report.GetSlots().GetUsed() < used {
			return sleep(ctx, c.timing.releaseWithin)
		}
		used = report.GetSlots().GetUsed()
		select {
		case <-changed:
		case <-enough.C:
			return true
		case <-ctx.Done():
			return false
		}
	}
}

func (c *caretaker) isFull() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.full
}

// makeRoom first prunes what is missing below the low mark. Where that is not
// enough, everything goes that is not in use.
func (c *caretaker) makeRoom(ctx context.Context) {
	c.mu.Lock()
	// BuildKit counts what is reserved for the superuser as free.
	want := int64(c.fill.Target(c.disk) + c.disk.Reserved) //nolint:gosec // no disk is that large
	c.mu.Unlock()
	for _, all := range []bool{false, true} {
		freed, err := c.buildkit.prune(ctx, want, all)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			c.log.Warn("cannot prune the cache", "error", err)
			return
		}
		c.log.Info("pruned the cache", "freed", vitals.Bytes(freed), "everything", all)
		if !c.look(time.Now()) {
			return
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.full {
		c.log.Warn("nothing more can be pruned, and the disk is still too full: something else fills it, or running builds do", "disk", c.disk.String())
		c.slots.setDiskFull("disk " + c.disk.String() + ", although all unused cache is pruned")
	}
}

// cacheSize is what BuildKit's cache takes, in bytes.
func (d *daemon) cacheSize(ctx context.Context) (size uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, sizeWithin)
	defer cancel()
	records, err := d.client.DiskUsage(ctx)
	if err != nil {
		return 0, err
	}
	for _, r := range records {
		if !r.Shared {
			size += uint64(max(0, r.Size)) //nolint:gosec // not negative
		}
	}
	return size, nil
}

// prune removes cache that is not in use until free bytes of the disk are free, or
// all of it, and returns how much that was. A daemon before BuildKit 0.17 knows no
// such limit, and removes all that it can.
func (d *daemon) prune(ctx context.Context, free int64, all bool) (freed uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, pruneWithin)
	defer cancel()
	options := []client.PruneOption{client.WithKeepOpt(0, 0, 0, free)}
	if all {
		options = []client.PruneOption{client.PruneAll}
	}
	pruned, counted := make(chan client.UsageInfo), make(chan struct{})
	go func() { // ends with pruned
		defer close(counted)
		for r := range pruned {
			freed += uint64(max(0, r.Size)) //nolint:gosec // not negative
		}
	}()
	err = d.client.Prune(ctx, pruned, options...)
	close(pruned)
	<-counted
	return freed, err
}
