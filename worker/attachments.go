package worker

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/archfarm/archfarm/address"
)

// maxReleased bounds the links to processes that have been replaced and have builds
// still; of more, a coordinator that does not know what it says is the likelier cause.
const maxReleased = 16

// knownWithin is how long gossip may take to know a coordinator in the place of one that
// has left it.
const knownWithin = time.Minute

// errDuplicate tells that another link already leads to the same coordinator.
var errDuplicate = errors.New("this coordinator is attached under another address already")

// attachments keeps one link to every coordinator that is configured or that
// gossip knows.
//
// One coordinator under several addresses would get several streams of one worker,
// and the newest is the one that counts. Where two addresses end at the same IP
// address and port, the agent knows it; else the coordinator does, which is told
// with each Hello where the agent is attached.
type attachments struct {
	agent      *agent
	configured []address.Address
	finder     coordinatorFinder

	running  sync.WaitGroup // the links
	released chan struct{}  // receives after an address has become free

	mu    sync.Mutex
	links map[address.Address]*link
	peers map[string]*link              // attached links by what their connection really leads to
	ids   map[*link]string              // of the coordinators that have welcomed the worker
	old   map[*link]bool                // attached links that are released
	heirs map[address.Address]time.Time // where others attach in the place of such, and until when whatever gossip knows
}

// run follows gossip until ctx ends, and waits for all links.
func (s *attachments) run(ctx context.Context) {
	defer s.running.Wait()
	for {
		s.update(ctx)
		select {
		case <-s.finder.Changed():
		case <-s.released:
		case <-ctx.Done():
			return
		}
	}
}

// update starts links to coordinators that are new and lets go of those that
// are gone.
func (s *attachments) update(ctx context.Context) {
	wanted := map[address.Address]bool{}
	for _, a := range s.configured {
		wanted[a] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, found := range s.finder.Coordinators() {
		if a, err := address.Parse(found); err == nil {
			wanted[a] = true
		}
	}
	for a, until := range s.heirs {
		if time.Now().After(until) {
			delete(s.heirs, a)
		} else {
			wanted[a] = true
		}
	}
	for a := range wanted {
		if s.links[a] == nil {
			l := newLink(s, a)
			s.links[a] = l
			s.running.Go(func() { l.run(ctx) })
		}
	}
	for a, l := range s.links {
		l.wanted = wanted[a]
		if !l.wanted {
			l.poke()
		}
	}
}

// release lets another link have l's address, and what it leads to, at once: another
// process than the one that l is attached to serves there now. l lasts as long as its
// stream. False: too many do already.
func (s *attachments) release(l *link, peer string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.old) >= maxReleased {
		return false
	}
	s.old[l], s.heirs[l.addr] = true, time.Now().Add(knownWithin)
	if s.links[l.addr] == l {
		delete(s.links, l.addr)
	}
	if s.peers[peer] == l {
		delete(s.peers, peer)
	}
	select {
	case s.released <- struct{}{}:
	default: // update is due already
	}
	return true
}

// isOver tells whether l, whose stream has ended, was released: it has to end then.
func (s *attachments) isOver(l *link) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	released := s.old[l]
	delete(s.old, l)
	return released
}

// retire removes l if it is wanted no more, and tells whether it did: l has to
// end then.
func (s *attachments) retire(l *link) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.wanted {
		return false
	}
	delete(s.links, l.addr)
	return true
}

// claim makes l the one link to peer.
func (s *attachments) claim(peer string, l *link) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.peers[peer]; other != nil && other != l {
		return errDuplicate
	}
	s.peers[peer] = l
	return nil
}

// unclaim lets another link lead to peer, if l has it.
func (s *attachments) unclaim(peer string, l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peers[peer] == l {
		delete(s.peers, peer)
	}
}

// welcomed notes which coordinator a link leads to.
func (s *attachments) welcomed(l *link, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != "" {
		s.ids[l] = id
	}
}

// detached forgets that; links that lead to the same one may be needed now.
func (s *attachments) detached(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.ids[l]; !known {
		return
	}
	delete(s.ids, l)
	for _, other := range s.links {
		if other != l {
			other.poke()
		}
	}
}

// attachedTo lists the coordinators that other links lead to.
func (s *attachments) attachedTo(l *link) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []string
	for other, id := range s.ids {
		if other != l {
			ids = append(ids, id)
		}
	}
	return ids
}
