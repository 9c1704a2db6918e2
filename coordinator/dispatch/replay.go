package dispatch

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/split"
)

// maxReplay bounds, in bytes, the frontend requests that are kept of a leg, to be asked
// again on another worker. They are the client's own, of at most 16 MB each.
const maxReplay = 64 << 20

// exchange is a frontend request that a leg's worker has answered.
type exchange struct {
	request *gwpb.SolveRequest
	answer  answer
}

// answer is what of a worker's answer the client may come back to.
type answer struct {
	ids      map[string]string // the worker's, by what they are of
	metadata map[string][]byte
}

// read keeps what an answer tells, before anybody changes it.
func read(resp *gwpb.SolveResponse) answer {
	a := answer{ids: map[string]string{}, metadata: maps.Clone(resp.GetResult().GetMetadata())}
	if id := resp.GetRef(); id != "" {
		a.ids["ref"] = id
	}
	if resp.GetResult() == nil {
		return a
	}
	for key, ref := range split.RefsByKey(resp.GetResult()) {
		if ref.GetId() != "" {
			a.ids["result "+key] = ref.GetId()
		}
	}
	for key, list := range resp.GetResult().GetAttestations() {
		for i, attestation := range list.GetAttestation() {
			if id := attestation.GetRef().GetId(); id != "" {
				a.ids["attestation "+strconv.Itoa(i)+" of "+key] = id
			}
		}
	}
	return a
}

// record keeps a request, for another worker that may have to answer it again.
// build.mu is held.
func (l *leg) record(req *gwpb.SolveRequest, resp *gwpb.SolveResponse) {
	if l.size <= maxReplay {
		l.calls = append(l.calls, exchange{request: req, answer: read(resp)})
		l.size += proto.Size(req)
	}
}

// retelling is a piece of metadata as the client has it, and as it is now.
type retelling struct{ before, now []byte }

// replay asks the leg's worker what the one before was asked, and returns how that
// called each result that this one calls otherwise.
func (l *leg) replay(ctx context.Context, calls []exchange) (renamed map[string]string, err error) {
	renamed = map[string]string{}
	for _, x := range calls {
		resp, err := l.solve(ctx, x.request)
		if err != nil {
			return nil, err
		}
		now := read(resp)
		for of, id := range x.answer.ids {
			if now.ids[of] == "" {
				return nil, l.changed("its " + of + " is not there any more")
			}
			renamed[id] = now.ids[of]
		}
		l.retell(x.answer.metadata, now.metadata)
	}
	return renamed, nil
}

// retell notes which of what the client was told is told otherwise now. What the worker
// before told may have been another retelling.
func (l *leg) retell(before, now map[string][]byte) {
	for k, v := range before {
		if told, ok := l.retold[k]; ok && bytes.Equal(told.now, v) {
			v = told.before
		}
		if !bytes.Equal(v, now[k]) {
			l.retold[k] = retelling{v, now[k]}
		} else {
			delete(l.retold, k)
		}
	}
}

func (l *leg) changed(what string) error {
	return status.Errorf(codes.FailedPrecondition,
		"%s: continuing on worker %s, as worker %s was lost: what is built has changed meanwhile, %s: build it again",
		l, l.worker.Name, l.lostOn[len(l.lostOn)-1], what)
}

// translate makes a part of the client's result, which knows results and metadata as a
// leg's first worker told them, what the present worker understands. Nothing of another
// attempt remains in it.
func (b *Build) translate(l *leg, part *gwpb.Result) (*gwpb.Result, error) {
	if len(l.lostOn) == 0 {
		return part, nil
	}
	part = proto.CloneOf(part)
	for k, told := range l.retold {
		for _, key := range []string{k, k + "/" + l.key} {
			switch v, there := part.GetMetadata()[key]; {
			case there && bytes.Equal(v, told.before):
				part.Metadata[key] = told.now
			case there && !bytes.Equal(v, told.now):
				return nil, l.changed(fmt.Sprintf("and the client has made something of its %q", k))
			}
		}
	}
	if r, ok := part.GetResult().(*gwpb.Result_RefDeprecated); ok {
		_, r.RefDeprecated, _ = b.owner(r.RefDeprecated)
		return part, nil
	}
	if r, ok := part.GetResult().(*gwpb.Result_RefsDeprecated); ok {
		for key, id := range r.RefsDeprecated.GetRefs() {
			_, r.RefsDeprecated.Refs[key], _ = b.owner(id)
		}
	}
	for _, ref := range split.Refs(part) {
		owner, id, err := b.owner(ref.GetId())
		if err != nil || owner != l {
			return nil, l.changed("and a result of it is not there any more")
		}
		ref.Id = id
	}
	return part, nil
}

// succeed makes a leg continue another one: what the client knows of that is the new
// leg's. b.mu is held.
func (b *Build) succeed(l, next *leg, renamed map[string]string) {
	b.legs[l.index], next.trial = next, false
	if at := slices.Index(l.siblings, l); at >= 0 {
		l.siblings[at] = next
	}
	for known, h := range b.refs {
		if h.leg != l {
			continue
		}
		if id, ok := renamed[h.id]; ok {
			b.refs[known] = held{next, id}
		} else { // of a step that failed, for debuggers
			delete(b.refs, known)
		}
	}
}
