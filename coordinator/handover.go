package coordinator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/archfarm/archfarm/file"
	"github.com/archfarm/archfarm/handover"
)

const (
	// succession bounds how long a successor may take until it could serve: the check
	// and the migrations of a large database are most of it.
	succession = 2 * time.Minute
	// lookAround is how often a predecessor looks whether it is needed any more.
	lookAround = 250 * time.Millisecond
	// aloneEvery is how often a successor tries to have the data folder alone.
	aloneEvery = 5 * time.Second
	// tellLeft is how often it says what is left.
	tellLeft = time.Minute
)

// succeed waits until the predecessor, if there is one, has left everything new to this
// process.
func (c *coordinator) succeed(ctx context.Context) error {
	if err := c.cfg.Inherited.Done(); err != nil {
		return err
	}
	if !c.cfg.succeeds() {
		return nil
	}
	if err := c.cfg.Inherited.Predecessor.Ready(ctx); err != nil {
		return fmt.Errorf("taking over: %w", err)
	}
	c.cfg.Inherited.Own()
	c.accompanied.Set(1)
	c.log.Info("took over from the predecessor, which lets its builds end")
	return nil
}

func (c *Config) succeeds() bool { return c.Inherited != nil && c.Inherited.Predecessor != nil }

// attend has the data folder for this process alone when its predecessor, and those
// before that, have ended.
func (c *coordinator) attend(ctx context.Context) {
	if !c.cfg.succeeds() {
		return
	}
	select {
	case <-c.cfg.Inherited.Predecessor.Gone():
		c.accompanied.Set(0)
		c.log.Info("the predecessor has ended")
	case <-ctx.Done():
		return
	}
	again := time.NewTicker(aloneEvery)
	defer again.Stop()
	for {
		err := c.alone()
		switch {
		case err == nil:
			return
		case !errors.Is(err, file.ErrLocked):
			c.log.Warn("sharing the data folder with nobody", "error", err)
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return
		}
	}
}

// handOver starts a successor, and leaves to it everything new. After an error nothing
// has changed, unless s.retired.
func (s *service) handOver(ctx context.Context) (err error) {
	began := time.Now()
	defer func() {
		if err != nil {
			_ = s.alone() // unless an older process is still there
		}
	}()
	if err := s.share(); err != nil {
		return err
	}
	s.writeRoll()
	next, err := handover.Start(s.cfg.Successor[0], s.cfg.Successor[1:], s.sockets())
	if err != nil {
		return err
	}
	s.log.Info("started a successor", "pid", next.Pid())
	defer func() {
		if err != nil {
			next.Kill()
		}
	}()
	waiting, cancel := context.WithTimeoutCause(ctx, succession, fmt.Errorf("it has taken longer than %s", succession))
	defer cancel()
	if err := next.AwaitReady(waiting); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := s.farm.Fleet.OpenInline(waiting); err != nil { // what agents have been asked to dial comes to this process
		return fmt.Errorf("waiting for the workers' connections: %w", err)
	}
	s.retire(ctx)
	if err := next.Serve(); err != nil {
		return fmt.Errorf("the successor has died at the last moment, and nobody serves new clients: %w", err)
	}
	if err := handover.Notify(fmt.Sprintf("MAINPID=%d", next.Pid())); err != nil {
		s.log.Warn("systemd takes this process for the service still", "error", err)
	}
	s.farm.Fleet.Depart()
	s.log.Info("handed over: the successor takes what is new", "pid", next.Pid(), "after", time.Since(began).Round(time.Millisecond), "builds", s.builds.Count(), "sessions", s.farm.Sessions.Len())
	return nil
}

// sockets are what a successor inherits.
func (s *service) sockets() []handover.Socket {
	var out []handover.Socket
	for _, d := range s.doors {
		if d.raw != nil {
			out = append(out, handover.Socket{Name: d.name, Listener: d.raw})
		}
	}
	return out
}

// retire accepts nobody any more, and serves those who have been.
func (s *service) retire(ctx context.Context) {
	s.retired.Store(true)
	for _, d := range s.doors {
		if d.tunnels != nil {
			_ = d.tunnels.Retire() // the socket is the successor's, too
		}
	}
	go func() { // ends with the last request, or with stop
		_ = s.web.Shutdown(context.WithoutCancel(ctx))
	}()
	s.leave(ctx) // its port is for the successor
}

// outlive lets end what has begun here. Who has a session may begin further builds in
// it: nobody else could serve it.
func (s *service) outlive(ctx context.Context) error {
	patience, cancel := s.patience(ctx)
	defer cancel()
	jobs := make(chan error, 1)
	go func() { jobs <- s.jobs.Drain(patience) }() // ends with patience
	look, tell := time.NewTicker(lookAround), time.NewTicker(tellLeft)
	defer look.Stop()
	defer tell.Stop()
	for s.builds.Count() > 0 || s.farm.Sessions.Len() > 0 {
		select {
		case <-look.C:
			continue
		case <-tell.C:
			s.log.Info("handed over; what has begun here goes on", "builds", s.builds.Count(), "sessions", s.farm.Sessions.Len())
			continue
		case <-ctx.Done(): // told to end
		case <-patience.Done():
		}
		break
	}
	return s.drainAll(patience)
}
