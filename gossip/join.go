package gossip

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"time"
)

const (
	// resolveWithin bounds the resolving of one seed.
	resolveWithin = 5 * time.Second
	// contestedFor is how long after a conflict about our name the seeds are told
	// that it is ours, although they seem to be joined: as long as it takes them to
	// find out that whoever had it is dead.
	contestedFor = time.Minute
	// contestedRetry is how often they are told.
	contestedRetry = 2 * time.Second
)

// keepJoined joins the seeds that are not among the living members, for ever, and
// members that were living once, for long: memberlist forgets a member that was
// gone for a minute, so that two halves of a farm that a network failure had parted
// find together only by those.
//
// Seeds that are living members are left alone, as a join exchanges the whole
// state, but for two cases: they may know our name under another address, and a
// worker that knows of no coordinator asks again. Gossip alone would settle both
// too, with the next exchange of states between the two, in half a minute or
// more.
func (n *Node) keepJoined(ctx context.Context, seeds []string, interval time.Duration) {
	retry := min(firstRetry, interval)
	for {
		err := n.join(ctx, seeds)
		n.joinMissed(interval)
		wait := interval
		switch {
		case ctx.Err() != nil:
			return
		case err != nil || len(seeds) > 0 && n.isLost():
			wait = retry
			retry = min(2*retry, interval)
		case n.isContested():
			wait = min(contestedRetry, interval)
		default:
			retry = min(firstRetry, interval)
		}
		if err != nil {
			n.log.Warn("joining the farm's gossip: trying again", "error", err, "in", wait)
		}
		// Up to a fifth less, so that the members of a farm that was switched on at
		// once do not knock at the seeds in step.
		wait -= rand.N(wait/5 + 1)
		select {
		case <-time.After(wait):
		case <-n.poked:
		case <-ctx.Done():
			return
		}
	}
}

// joinMissed tries members that were lost, a few at a time. That they do not answer
// is what is expected of them.
func (n *Node) joinMissed(interval time.Duration) {
	n.mu.Lock()
	due := n.missed.due(time.Now(), interval)
	n.mu.Unlock()
	for _, addr := range due {
		if _, err := n.list.Join([]string{addr.String()}); err != nil {
			continue
		}
		n.mu.Lock()
		n.missed.forget(addr)
		n.mu.Unlock()
		n.log.Info("a member of the gossip that was lost answers again", "member", addr.String())
	}
}

// join tries every seed that is not a living member, or every one that is not
// this member itself if there is reason to. The error is that of the
// last seed that failed.
func (n *Node) join(ctx context.Context, seeds []string) (last error) {
	for _, seed := range seeds {
		missing, err := n.missing(ctx, seed)
		if err != nil {
			last = err
			continue
		}
		if len(missing) == 0 {
			continue
		}
		if _, err := n.list.Join(missing); err != nil {
			last = fmt.Errorf("seed %s: %w", seed, err)
			continue
		}
		n.log.Debug("joined the farm's gossip", "seed", seed)
	}
	return last
}

// missing resolves a seed and returns the addresses that are to be joined.
func (n *Node) missing(ctx context.Context, seed string) ([]string, error) {
	host, port, err := splitHostPort(seed)
	if err != nil {
		return nil, fmt.Errorf("seed: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, resolveWithin)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("seed %s: %w", seed, err)
	}
	living := map[netip.AddrPort]bool{}
	if own := n.list.LocalNode(); n.isContested() || n.isLost() {
		if ip, ok := netip.AddrFromSlice(own.Addr); ok {
			living[netip.AddrPortFrom(ip.Unmap(), own.Port)] = true
		}
	} else {
		for _, m := range n.living() {
			living[m.gossip] = true
		}
	}
	var missing []string
	for _, a := range addrs {
		if !living[netip.AddrPortFrom(a.Unmap(), port)] {
			missing = append(missing, net.JoinHostPort(a.Unmap().String(), strconv.Itoa(int(port))))
		}
	}
	return missing, nil
}

// isContested tells whether somebody knew our name under another address a short
// while ago.
func (n *Node) isContested() bool {
	at := n.contested.Load()
	return at != 0 && time.Since(time.Unix(0, at)) < contestedFor
}

// isLost tells whether this is a worker that knows no coordinator.
func (n *Node) isLost() bool { return n.role == Worker && len(n.Coordinators()) == 0 }
