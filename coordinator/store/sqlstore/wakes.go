package sqlstore

import (
	"context"
	"sync"

	"github.com/archfarm/archfarm/coordinator/store"
)

// Wakes hands hints on to whoever waits for them.
type Wakes struct {
	// Elsewhere, unless nil, also passes hints on to other coordinators; it must not block.
	Elsewhere func(store.Wake)

	mu     sync.Mutex
	subs   map[chan store.Wake]struct{}
	closed bool
}

// waiting is how many hints a slow receiver may be behind.
const waiting = 64

// Subscribe returns a channel of hints, which is closed when ctx ends, or the store is closed.
func (w *Wakes) Subscribe(ctx context.Context) <-chan store.Wake {
	c := make(chan store.Wake, waiting)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		close(c)
		return c
	}
	if w.subs == nil {
		w.subs = map[chan store.Wake]struct{}{}
	}
	w.subs[c] = struct{}{}
	context.AfterFunc(ctx, func() { w.drop(c) })
	return c
}

func (w *Wakes) drop(c chan store.Wake) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, there := w.subs[c]; there {
		delete(w.subs, c)
		close(c)
	}
}

// send tells everybody.
func (w *Wakes) send(hint store.Wake) {
	w.Hear(hint)
	if w.Elsewhere != nil {
		w.Elsewhere(hint)
	}
}

// Hear tells those in this process.
func (w *Wakes) Hear(hint store.Wake) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.subs {
		select {
		case c <- hint:
		default: // it has enough to look at already
		}
	}
}

// Close ends all subscriptions.
func (w *Wakes) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	for c := range w.subs {
		delete(w.subs, c)
		close(c)
	}
}
