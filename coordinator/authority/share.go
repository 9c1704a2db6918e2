package authority

import (
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/archfarm/archfarm/identity"
)

// Share lets a successor use the database, too (Config.Shared): what either issues and
// revokes is true for both, in the other one within about a second.
func (a *Authority) Share() error {
	if err := a.db.share(); err != nil {
		return err
	}
	a.follow()
	return nil
}

// Alone ends the sharing; nobody else may use the database any more.
func (a *Authority) Alone() error {
	if err := a.db.alone(turnLimit); err != nil {
		return err
	}
	a.leave()
	return a.review() // what was revoked at the last moment
}

// follow learns what the other process revokes, until leave.
func (a *Authority) follow() {
	a.following.Lock()
	defer a.following.Unlock()
	if a.unfollow != nil {
		return
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	a.unfollow = func() { close(stop); <-stopped }
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(reviewEvery)
		defer ticker.Stop()
		for seen := (time.Time{}); ; {
			select {
			case <-stop:
				return
			case <-ticker.C:
			}
			changed := a.db.changed()
			if changed.Equal(seen) {
				continue
			}
			if err := a.review(); err != nil {
				a.cfg.Logger.Warn("learning what the other coordinator of this folder has revoked", "error", err)
				continue
			}
			seen = changed
		}
	}()
}

func (a *Authority) leave() {
	a.following.Lock()
	defer a.following.Unlock()
	if a.unfollow != nil {
		a.unfollow()
		a.unfollow = nil
	}
}

// review reads the revocations, and evicts whom it does not know to be revoked.
func (a *Authority) review() error {
	var now map[string]revocation
	if err := a.db.View(func(tx *bolt.Tx) (err error) { now, err = revocations(tx); return err }); err != nil {
		return err
	}
	var victims []identity.Identity
	a.mu.Lock()
	for who, r := range now {
		if known, ok := a.revoked[who]; !ok || !known.At.Equal(r.At) || known.Seq != r.Seq {
			kind, name, _ := strings.Cut(who, "/")
			victims = append(victims, identity.Identity{Kind: identity.Kind(kind), Name: name})
		}
	}
	a.revoked = now
	a.mu.Unlock()
	for _, who := range victims {
		a.cfg.Logger.Warn("certificates revoked by the other coordinator of this folder", "of", who.Name, "kind", who.Kind)
		a.cfg.Evict(who)
	}
	return nil
}
