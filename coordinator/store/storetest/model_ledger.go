package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/store"
)

// testLedgerModel publishes whatever in any order, and compares the ledger with the
// simplest program that does the same. Whatever happens, one tag has at most one
// pending binding, and what is current changes by Settle only.
func testLedgerModel(t *testing.T, s store.Store) {
	round := 0
	rapid.Check(t, func(rt *rapid.T) {
		round++
		m := &ledgerModel{ctx: t.Context(), store: s, round: fmt.Sprint(round), publications: map[string]*modelPublication{}}
		defer m.clear() // also after a failure, which is repeated to find the shortest
		rt.Repeat(map[string]func(*rapid.T){
			"bind": m.bind, "bindAgain": m.bindAgain, "renew": m.renew, "settle": m.settle,
			"abandoned": m.abandoned, "takeover": m.takeover, "": m.check,
		})
	})
}

type modelPublication struct {
	id, owner string
	tags      map[string]store.BindingState
	ids       map[string]int64
	epoch     int64
	held      bool
}

func (p *modelPublication) pending() bool {
	return slices.Contains(slices.Collect(maps.Values(p.tags)), store.Pending)
}

type ledgerModel struct {
	ctx          context.Context
	store        store.Store
	round        string
	publications map[string]*modelPublication
	order        []string // of ids, as bound
	leases       []store.Lease
}

var (
	errImmutable = errors.New("immutable")
	modelTags    = []string{"a", "b", "c"}
)

func (m *ledgerModel) repository() string { return "registry.example/" + m.round }

// of is what a tag is, by its state: the last such publication.
func (m *ledgerModel) of(tag string, state store.BindingState) *modelPublication {
	var last *modelPublication
	for _, id := range m.order {
		if p := m.publications[id]; p.tags[tag] == state {
			last = p
		}
	}
	return last
}

func (m *ledgerModel) leased(p *modelPublication, owner string, lease time.Duration, l store.Lease, t *rapid.T) {
	if l.Epoch <= p.epoch || l.Job != p.id || l.Owner != owner {
		t.Fatalf("the lease %+v follows epoch %d", l, p.epoch)
	}
	p.epoch, p.owner, p.held = l.Epoch, owner, lease == long
	m.leases = append(m.leases, l)
}

func drawOwner(t *rapid.T) string {
	return rapid.SampledFrom([]string{"one", "two"}).Draw(t, "owner")
}

func drawLease(t *rapid.T) time.Duration {
	return rapid.SampledFrom([]time.Duration{long, over}).Draw(t, "lease")
}

func (m *ledgerModel) bind(t *rapid.T) {
	id := fmt.Sprintf("%s-%d", m.round, len(m.order))
	tags := rapid.SliceOfNDistinct(rapid.SampledFrom(modelTags), 1, 3, rapid.ID[string]).Draw(t, "tags")
	p := publication(id)
	for _, tag := range tags {
		p.Bindings = append(p.Bindings, store.Binding{Repository: m.repository(), Tag: tag})
	}
	owner, lease, immutable := drawOwner(t), drawLease(t), rapid.IntRange(0, 3).Draw(t, "immutable") == 0
	got, l, err := m.store.Bind(m.ctx, p, owner, lease, func(b store.Binding, current *store.Binding) error {
		was := ""
		if current != nil {
			was = current.Publication
		}
		want := ""
		if last := m.of(b.Tag, store.Published); last != nil {
			want = last.id
		}
		mustEqual(t, "current of "+b.Tag, was, want)
		if immutable && current != nil {
			return errImmutable
		}
		return nil
	})
	for _, tag := range tags { // in this order
		switch {
		case m.of(tag, store.Pending) != nil:
			mustBe(t, err, store.ErrBusy)
			return
		case immutable && m.of(tag, store.Published) != nil:
			mustBe(t, err, errImmutable)
			return
		}
	}
	must(t, err)
	made := &modelPublication{id: id, tags: map[string]store.BindingState{}, ids: map[string]int64{}}
	for _, b := range got.Bindings {
		made.tags[b.Tag], made.ids[b.Tag] = store.Pending, b.ID
	}
	m.publications[id] = made
	m.order = append(m.order, id)
	m.leased(made, owner, lease, l, t)
}

func (m *ledgerModel) any(t *rapid.T) *modelPublication {
	if len(m.order) == 0 {
		t.Skip("no publications yet")
	}
	return m.publications[rapid.SampledFrom(m.order).Draw(t, "publication")]
}

func (m *ledgerModel) bindAgain(t *rapid.T) {
	p, owner, lease := m.any(t), drawOwner(t), drawLease(t)
	if !p.pending() {
		t.Skip("it is settled")
	}
	got, l, err := m.store.Bind(m.ctx, publication(p.id, "x"), owner, lease, nil)
	if p.held && p.owner != owner {
		mustBe(t, err, store.ErrLeaseLost)
		return
	}
	must(t, err)
	m.leased(p, owner, lease, l, t)
	mustEqual(t, "bindings", len(got.Bindings), len(p.tags))
}

func (m *ledgerModel) lease(t *rapid.T) (store.Lease, *modelPublication, bool) {
	if len(m.leases) == 0 {
		t.Skip("no leases yet")
	}
	l := rapid.SampledFrom(m.leases).Draw(t, "lease")
	p := m.publications[l.Job]
	return l, p, p.held && p.epoch == l.Epoch
}

func (m *ledgerModel) renew(t *rapid.T) {
	l, p, good := m.lease(t)
	l.For = drawLease(t)
	_, err := m.store.RenewPublication(m.ctx, l)
	if !good {
		mustBe(t, err, store.ErrLeaseLost)
		return
	}
	must(t, err)
	p.held = l.For == long
}

func (m *ledgerModel) settle(t *rapid.T) {
	l, p, good := m.lease(t)
	states, settled := map[int64]store.BindingState{}, map[string]store.BindingState{}
	for _, tag := range slices.Sorted(maps.Keys(p.tags)) {
		state := rapid.SampledFrom([]store.BindingState{"", store.Published, store.Undone}).Draw(t, tag)
		if state != "" {
			states[p.ids[tag]], settled[tag] = state, state
		}
	}
	err := m.store.Settle(m.ctx, l, states)
	if !good {
		mustBe(t, err, store.ErrLeaseLost)
		return
	}
	must(t, err)
	for tag, state := range settled {
		if p.tags[tag] == store.Pending {
			p.tags[tag] = state
		}
	}
	p.held = p.held && p.pending()
}

func (m *ledgerModel) abandoned(t *rapid.T) {
	owner, lease := drawOwner(t), drawLease(t)
	got, l, err := m.store.Abandoned(m.ctx, owner, lease, true)
	for _, id := range m.order {
		if p := m.publications[id]; p.pending() && !p.held {
			must(t, err)
			mustEqual(t, "the oldest", got.ID, id)
			m.leased(p, owner, lease, l, t)
			return
		}
	}
	mustBe(t, err, store.ErrNotFound)
}

func (m *ledgerModel) takeover(t *rapid.T) {
	p, owner, lease := m.any(t), drawOwner(t), drawLease(t)
	_, l, err := m.store.Takeover(m.ctx, p.id, owner, lease)
	switch {
	case !p.pending():
		mustBe(t, err, store.ErrNotFound)
	case p.held:
		mustBe(t, err, store.ErrLeaseLost)
	default:
		must(t, err)
		m.leased(p, owner, lease, l, t)
	}
}

func (m *ledgerModel) check(t *rapid.T) {
	for _, tag := range modelTags {
		got, err := m.store.Current(m.ctx, m.repository(), tag)
		if want := m.of(tag, store.Published); want != nil {
			must(t, err)
			mustEqual(t, "current of "+tag, got.Publication, want.id)
		} else {
			mustBe(t, err, store.ErrNotFound)
		}
		all, err := m.store.Bindings(m.ctx, nil, m.repository(), tag, 0, 1000)
		must(t, err)
		var is, want []string
		for _, b := range all {
			is = append(is, b.Publication+" "+string(b.State))
		}
		for _, id := range slices.Backward(m.order) {
			if state, bound := m.publications[id].tags[tag]; bound {
				want = append(want, id+" "+string(state))
			}
		}
		mustEqual(t, "bindings of "+tag, is, want)
	}
	for _, id := range m.order {
		got, err := m.store.PublicationOf(m.ctx, "job of "+id)
		must(t, err)
		mustEqual(t, "there is a blob", got.Blob != nil, m.publications[id].pending())
	}
}

// clear settles everything, so that the next round finds nothing abandoned.
func (m *ledgerModel) clear() {
	for _, p := range m.publications {
		got, l, err := m.store.Bind(m.ctx, publication(p.id), p.owner, long, nil)
		if err != nil {
			continue
		}
		states := map[int64]store.BindingState{}
		for _, b := range got.Bindings {
			states[b.ID] = store.Undone
		}
		_ = m.store.Settle(m.ctx, l, states)
	}
}
