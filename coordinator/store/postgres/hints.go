package postgres

import (
	"context"
	"crypto/rand"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
)

const (
	channel = "archfarm"
	// unsent bounds the hints that wait for being told; more are dropped.
	unsent = 1024
)

// hints are exchanged with other coordinators by NOTIFY. They are sent after the
// transactions that they are about, many at a time: within, all commits of the
// database would wait for each other. One that gets lost costs whoever waits for it
// until it polls.
type hints struct {
	engine *engine
	wakes  *sqlstore.Wakes
	log    *slog.Logger
	self   string
	queue  chan store.Wake
	stop   context.CancelFunc
	ended  sync.WaitGroup
}

func exchange(ctx context.Context, e *engine, wakes *sqlstore.Wakes, log *slog.Logger) *hints {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx)) // as long as the store is open
	h := &hints{engine: e, wakes: wakes, log: log, self: rand.Text(), queue: make(chan store.Wake, unsent), stop: stop}
	h.ended.Go(func() { h.send(ctx) })   // until close
	h.ended.Go(func() { h.listen(ctx) }) // until close
	return h
}

func (h *hints) close() {
	h.stop()
	h.ended.Wait()
}

// tell passes a hint on, without waiting.
func (h *hints) tell(w store.Wake) {
	select {
	case h.queue <- w:
	default:
	}
}

func (h *hints) send(ctx context.Context) {
	for {
		var first store.Wake
		select {
		case <-ctx.Done():
			return
		case first = <-h.queue:
		}
		said := map[store.Wake]bool{first: true}
		payloads := []string{h.self + " " + first.Job}
		for range len(h.queue) {
			if next := <-h.queue; !said[next] {
				said[next] = true
				payloads = append(payloads, h.self+" "+next.Job)
			}
		}
		err := h.engine.Read(ctx, func(t sqlstore.Tx) error {
			_, err := t.Exec("SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payloads (payload)", channel, payloads)
			return err
		})
		if err != nil {
			h.log.Debug("other coordinators could not be told of changes", "err", err)
		}
	}
}

// listen hears what others tell, over a connection of its own.
func (h *hints) listen(ctx context.Context) {
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		heard, err := h.hear(ctx)
		if ctx.Err() != nil {
			return
		}
		h.log.Debug("other coordinators cannot be heard", "err", err)
		if heard {
			wait = firstWait
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// hear tells whether it got so far as to listen.
func (h *hints) hear(ctx context.Context) (listening bool, err error) {
	conn, err := pgx.ConnectConfig(ctx, h.engine.pool.Config().ConnConfig)
	if err != nil {
		return false, err
	}
	defer func() {
		bye, stop := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer stop()
		_ = conn.Close(bye)
	}()
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return false, err
	}
	h.wakes.Hear(store.Wake{}) // something may have been missed
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return true, err
		}
		if sender, job, _ := strings.Cut(n.Payload, " "); sender != h.self {
			h.wakes.Hear(store.Wake{Job: job})
		}
	}
}
