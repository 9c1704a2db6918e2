package history

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
)

// listener is one client that listens to what happens.
type listener struct {
	ref    string // of the only build that it is interested in; empty for all
	viewer identity.Identity

	mu      sync.Mutex
	pending []*controlapi.BuildHistoryEvent
	over    bool
	behind  bool          // it reads too slowly
	wake    chan struct{} // holds a token when something has changed
}

// listen registers a listener, and returns what there was at that moment: the
// builds that run, and the ended ones that are not in the store yet.
func (h *History) listen(viewer identity.Identity, ref string) (l *listener, active []*controlapi.BuildHistoryRecord, fresh map[string]*Recorder, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, gone := h.deleted[ref]; gone {
		return nil, nil, nil, fmt.Errorf("ref %s is deleted", ref)
	}
	l = &listener{ref: ref, viewer: viewer, wake: make(chan struct{}, 1), over: h.closing}
	h.listeners[l] = struct{}{}
	for _, r := range h.running {
		if (ref == "" || ref == r.ref) && viewer.MaySee(r.tenant) {
			active = append(active, r.started)
		}
	}
	slices.SortFunc(active, func(a, b *controlapi.BuildHistoryRecord) int { return strings.Compare(a.GetRef(), b.GetRef()) })
	fresh = map[string]*Recorder{}
	for _, r := range h.fresh {
		if ref == "" || ref == r.ref {
			fresh[r.ref] = r
		}
	}
	return l, active, fresh, nil
}

// leave ends a listener. What was deleted under its eyes goes with the last one.
func (h *History) leave(l *listener) {
	h.mu.Lock()
	delete(h.listeners, l)
	_, gone := h.deleted[l.ref]
	h.mu.Unlock()
	if !gone {
		return
	}
	if _, err := h.remove(h.ctx, l.ref); err != nil {
		h.options.Log.Error("removing a build record", "build", l.ref, "error", err)
	}
}

func (l *listener) tell(e *controlapi.BuildHistoryEvent) {
	if l.ref != "" && l.ref != e.GetRecord().GetRef() {
		return
	}
	l.mu.Lock()
	if len(l.pending) < maxPending {
		l.pending = append(l.pending, e)
	} else {
		l.behind = true
	}
	l.mu.Unlock()
	l.signal()
}

func (l *listener) end() {
	l.mu.Lock()
	l.over = true
	l.mu.Unlock()
	l.signal()
}

func (l *listener) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// follow sends events as they come. Its end is the history's, or ctx's.
func (l *listener) follow(ctx context.Context, send func(*controlapi.BuildHistoryEvent) error) error {
	for {
		l.mu.Lock()
		events, over, behind := l.pending, l.over, l.behind
		l.pending = nil
		l.mu.Unlock()
		for _, e := range events {
			if err := send(e); err != nil {
				return err
			}
		}
		switch {
		case behind:
			return status.Errorf(codes.ResourceExhausted, "listening to the build history: more than %d events were not read", maxPending)
		case over:
			return nil
		}
		if err := wait(ctx, l.wake); err != nil {
			return err
		}
	}
}
