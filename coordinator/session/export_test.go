package session

import "time"

// Hasten shortens the waits for clients that open no session and for workers that
// do not let go of one.
func (rs *Relays) Hasten(d time.Duration) { rs.findWithin, rs.farewell = d, d }

// Ended is closed once the present relay of a session to a worker has ended.
func (rs *Relays) Ended(worker, session string) <-chan struct{} {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.active[relayKey{worker, session}].ended
}

// Used tells whether the relay of a session to a worker has users.
func (rs *Relays) Used(worker, session string) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	r, ok := rs.active[relayKey{worker, session}]
	return ok && r.users > 0
}

// Len is the number of relays.
func (rs *Relays) Len() int {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return len(rs.active)
}
