package worker

import (
	"context"
	"errors"
	"sync"

	"github.com/archfarm/archfarm/address"
)

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

	running sync.WaitGroup // the links

	mu    sync.Mutex
	links map[address.Address]*link
	peers map[string]*link // attached links by what their connection really leads to
	ids   map[*link]string // of the coordinators that have welcomed the worker
}

// run follows gossip until ctx ends, and waits for all links.
func (s *attachments) run(ctx context.Context) {
	defer s.running.Wait()
	for {
		s.update(ctx)
		select {
		case <-s.finder.Changed():
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
	for _, found := range s.finder.Coordinators() {
		if a, err := address.Parse(found); err == nil {
			wanted[a] = true
		}
	}

	s.mu.Lock()
	defer s.mu.Unlock()
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

func (s *attachments) unclaim(peer string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.peers, peer)
}

// welcomed notes which coordinator a link leads to.
func (s *attachments) welcomed(l *link, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != "" {
		s.ids[l] = id
	}
}

// departed forgets that; links that lead to the same one may be needed now.
func (s *attachments) departed(l *link) {
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
