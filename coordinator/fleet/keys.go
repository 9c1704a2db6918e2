package fleet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/gossip"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// maxNamed bounds how many workers an error names.
	maxNamed = 8
	// undoWithin is how long the workers have to take a ring back.
	undoWithin = 15 * time.Second
)

// keyring is the farm's gossip keys, and which of them the workers have.
type keyring struct {
	change   func(gossip.Keyring) error // keeps and uses another ring here
	changing sync.Mutex                 // held for a whole change, workers' answers included

	mu      sync.Mutex
	ring    gossip.Keyring
	workers map[*Worker]*holder
}

// holder is what a worker has of the keyring.
type holder struct {
	told      bool           // whether it may be told keys
	confirmed gossip.Keyring // the ring that it last confirmed
	failure   error          // why it has not confirmed another
}

// KeepKeys makes the fleet give the gossip keys to workers that attach, and
// administrators change them. Change keeps a changed ring, so that it outlasts this
// process, and has this coordinator gossip with it; calls do not overlap. Without a
// ring there are no keys to give or change. It must be called before the first
// worker attaches.
func (f *Fleet) KeepKeys(ring gossip.Keyring, change func(gossip.Keyring) error) {
	f.keyring.ring, f.keyring.change = ring, change
}

// hand returns what an agent that attaches is told of the keys: nil if its
// connection is one that others may listen to. Forget must be called.
func (k *keyring) hand(ctx context.Context, w *Worker) *archfarmv1.GossipKeyring {
	h := &holder{told: confidential(ctx)}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.workers == nil {
		k.workers = map[*Worker]*holder{}
	}
	k.workers[w] = h
	if len(k.ring) == 0 || !h.told {
		return nil
	}
	return &archfarmv1.GossipKeyring{Keys: k.ring}
}

func (k *keyring) forget(w *Worker) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.workers, w)
}

// confidential tells whether nobody else reads what is said to a caller: it has
// shown a worker's certificate, hence there is TLS, or it is on this machine. A
// caller without TLS may be elsewhere, where the operator allows it.
func confidential(ctx context.Context) bool {
	switch identity.FromContext(ctx).Kind {
	case identity.Worker:
		return true
	case identity.Local:
		p, ok := peer.FromContext(ctx)
		if !ok {
			return false
		}
		if !strings.HasPrefix(p.Addr.Network(), "tcp") { // a Unix socket
			return true
		}
		addr, err := netip.ParseAddrPort(p.Addr.String())
		return err == nil && addr.Addr().Unmap().IsLoopback()
	default:
		return false
	}
}

// ChangeGossipKeys implements FleetService, for administrators. A key is used, or
// removed, by all workers or by none, and by this coordinator last.
func (f *Fleet) ChangeGossipKeys(ctx context.Context, req *archfarmv1.ChangeGossipKeysRequest) (*archfarmv1.ChangeGossipKeysResponse, error) {
	k, who := &f.keyring, identity.FromContext(ctx)
	switch {
	case !who.Administers():
		return nil, status.Errorf(codes.PermissionDenied, "gossip keys: %s may not manage them; ask through admin.sock in the coordinator's data folder, or with an administrator's certificate", who)
	case len(k.current()) == 0:
		return nil, status.Error(codes.FailedPrecondition, "gossip keys: gossip of this coordinator is not encrypted; start it with --gossip-key-file, or with --gossip at an address that other machines reach")
	case !k.changing.TryLock():
		return nil, status.Error(codes.Aborted, "gossip keys: another change of them is under way; try again")
	}
	defer k.changing.Unlock()
	k.distribute(ctx, k.current()) // to whom it has not reached yet
	var err error
	switch req.GetAction() {
	case archfarmv1.ChangeGossipKeysRequest_ACTION_LIST:
		return k.describe(), nil
	case archfarmv1.ChangeGossipKeysRequest_ACTION_INSTALL:
		err = k.install(ctx, req.GetKey())
	case archfarmv1.ChangeGossipKeysRequest_ACTION_USE:
		err = k.use(ctx, req.GetKeyId())
	case archfarmv1.ChangeGossipKeysRequest_ACTION_REMOVE:
		err = k.remove(ctx, req.GetKeyId())
	default:
		err = status.Error(codes.InvalidArgument, "gossip keys: the action must be list, install, use or remove")
	}
	if err != nil {
		return nil, err
	}
	response := k.describe()
	f.log.Info("gossip keys changed", "action", req.GetAction().String(), "by", who.String(), "keys", len(response.GetKeys()), "in_use", response.GetKeys()[0].GetId())
	return response, nil
}

func (k *keyring) current() gossip.Keyring {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ring
}

// install adds a key, here first: whoever has it understands more than before.
func (k *keyring) install(ctx context.Context, key []byte) error {
	if len(key) == 0 {
		key = gossip.NewKey()
	}
	next, err := k.current().Install(key)
	if errors.Is(err, gossip.ErrKeyringFull) {
		return status.Errorf(codes.FailedPrecondition, "installing a gossip key: %v", err)
	}
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "installing a gossip key: %v", err)
	}
	if err := k.adopt(next); err != nil {
		return status.Errorf(codes.Internal, "installing a gossip key: %v", err)
	}
	k.distribute(ctx, next)
	return nil
}

func (k *keyring) use(ctx context.Context, id string) error {
	next, err := k.current().Use(id)
	if err != nil {
		return status.Errorf(codes.NotFound, "using the gossip key %s: %v; install it first", text(id), err)
	}
	if lacking := k.lacking(func(r gossip.Keyring) bool { return r.Has(next[0]) }); len(lacking) > 0 {
		return status.Errorf(codes.FailedPrecondition, "using the gossip key %s: workers that are attached have not confirmed that they have it: %s", id, list(lacking))
	}
	if err := k.replace(ctx, next); err != nil {
		return fmt.Errorf("using the gossip key %s: %w", id, err)
	}
	return nil
}

func (k *keyring) remove(ctx context.Context, id string) error {
	current := k.current()
	next, err := current.Remove(id)
	switch {
	case errors.Is(err, gossip.ErrPrimaryKey):
		return status.Errorf(codes.FailedPrecondition, "removing the gossip key %s: %v", id, err)
	case err != nil:
		return status.Errorf(codes.NotFound, "removing the gossip key %s: %v", text(id), err)
	}
	if lacking := k.lacking(func(r gossip.Keyring) bool { return len(r) > 0 && r[:1].Has(current[0]) }); len(lacking) > 0 {
		return status.Errorf(codes.FailedPrecondition, "removing the gossip key %s: workers that are attached have not confirmed that they use %s: %s", id, gossip.KeyID(current[0]), list(lacking))
	}
	if err := k.replace(ctx, next); err != nil {
		return fmt.Errorf("removing the gossip key %s: %w", id, err)
	}
	return nil
}

// replace has all workers take a ring, and this coordinator then, or all keep the
// one they have: a worker may know of another coordinator for which it is too early.
func (k *keyring) replace(ctx context.Context, next gossip.Keyring) error {
	k.distribute(ctx, next)
	var err error
	if lacking := k.lacking(next.Equal); len(lacking) > 0 {
		err = status.Errorf(codes.FailedPrecondition, "nothing was changed, because of workers that are attached and have not confirmed it: %s", list(lacking))
	} else if failed := k.adopt(next); failed != nil {
		err = status.Errorf(codes.Internal, "nothing was changed: %v", failed)
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWithin) // also for a caller that has gone
		defer cancel()
		k.distribute(ctx, k.current())
		return err
	}
	k.distribute(ctx, next) // to those that have attached meanwhile
	return nil
}

// adopt makes a ring this coordinator's.
func (k *keyring) adopt(next gossip.Keyring) error {
	if err := k.change(next); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ring = next
	return nil
}

// distribute gives the ring to all attached workers that have not confirmed it,
// and waits for their answers.
func (k *keyring) distribute(ctx context.Context, ring gossip.Keyring) {
	var asked sync.WaitGroup
	defer asked.Wait()
	k.mu.Lock()
	defer k.mu.Unlock()
	for w, h := range k.workers {
		if h.told && !h.confirmed.Equal(ring) {
			asked.Go(func() { k.give(ctx, w, ring) })
		}
	}
}

func (k *keyring) give(ctx context.Context, w *Worker, ring gossip.Keyring) {
	err := w.Direct(ctx, &archfarmv1.Directive{Action: &archfarmv1.Directive_GossipKeyring{GossipKeyring: &archfarmv1.GossipKeyring{Keys: ring}}})
	k.mu.Lock()
	defer k.mu.Unlock()
	h, attached := k.workers[w]
	switch {
	case !attached:
	case err == nil:
		h.confirmed, h.failure = ring, nil
	case status.Code(err) == codes.FailedPrecondition: // it has kept what it had
		h.failure = err
	default: // who knows
		h.confirmed, h.failure = nil, err
	}
}

// lacking returns the attached workers that have not confirmed a ring as it should
// be, by name, and why not.
func (k *keyring) lacking(asItShould func(gossip.Keyring) bool) map[string]string {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := map[string]string{}
	for w, h := range k.workers {
		switch {
		case w.hasLeft() || asItShould(h.confirmed):
		case !h.told:
			out[w.Name] = "its connection is not encrypted"
		case h.failure != nil:
			out[w.Name] = strings.TrimPrefix(status.Convert(h.failure).Message(), "worker "+w.Name+": ")
		default:
			out[w.Name] = "it has just attached"
		}
	}
	return out
}

func (w *Worker) hasLeft() bool {
	select {
	case <-w.gone:
		return true
	default:
		return false
	}
}

// list is workers and reasons, for an error.
func list(reasons map[string]string) string {
	var out []string
	names := slices.Sorted(maps.Keys(reasons))
	for _, name := range names[:min(len(names), maxNamed)] {
		out = append(out, fmt.Sprintf("%s (%s)", name, cmp.Or(reasons[name], "no answer")))
	}
	if more := len(names) - len(out); more > 0 {
		out = append(out, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(out, ", ")
}

// describe names the keys and who has them.
func (k *keyring) describe() *archfarmv1.ChangeGossipKeysResponse {
	response := &archfarmv1.ChangeGossipKeysResponse{}
	for i, key := range k.current() {
		missing := k.lacking(func(r gossip.Keyring) bool { return r.Has(key) })
		response.Keys = append(response.Keys, &archfarmv1.GossipKey{
			Id: gossip.KeyID(key), Primary: i == 0, Missing: slices.Sorted(maps.Keys(missing)),
			Confirmed: k.having(key),
		})
	}
	return response
}

func (k *keyring) having(key []byte) (n uint32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for w, h := range k.workers {
		if !w.hasLeft() && h.confirmed.Has(key) {
			n++
		}
	}
	return n
}
