package fleet

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// directTimeout is for how long an agent may think about a directive.
const directTimeout = 10 * time.Second

// Direct has the worker's agent do something, and returns once it has done so and
// reported what has changed. The directive's id is chosen here; d is not modified.
// FailedPrecondition: the agent says why it did not. Unavailable: it has not
// answered within 10 s, or (a *build.LostError) it left meanwhile.
func (w *Worker) Direct(ctx context.Context, d *archfarmv1.Directive) error {
	id := rand.Text()
	answer := w.directives.expect(id)
	defer w.directives.forget(id)
	ctx, cancel := context.WithTimeoutCause(ctx, directTimeout,
		status.Errorf(codes.Unavailable, "the agent of worker %s did not answer within %s; is it of a version that knows the order?", w.Name, directTimeout))
	defer cancel()
	select {
	case w.outbox <- &archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Directive{
		Directive: &archfarmv1.Directive{Id: id, Action: d.GetAction()},
	}}:
	case <-w.gone:
		return w.left()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-answer:
		return err
	case <-w.gone:
		return w.left()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// done takes the agent's answer to a directive.
func (w *Worker) done(d *archfarmv1.Done) {
	var err error
	if d.GetError() != "" {
		err = status.Errorf(codes.FailedPrecondition, "worker %s: %s", w.Name, text(d.GetError()))
	}
	w.directives.give(d.GetDirectiveId(), err)
}

// answers are what an agent is yet to say, by the unguessable id of the question.
// What nobody waits for, or is said a second time, goes unheard.
type answers struct {
	mu      sync.Mutex
	waiting map[string]chan<- error
}

// expect returns where the answer will come. Forget must be called.
func (a *answers) expect(id string) <-chan error {
	answer := make(chan error, 1)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting == nil {
		a.waiting = map[string]chan<- error{}
	}
	a.waiting[id] = answer
	return answer
}

func (a *answers) forget(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.waiting, id)
}

func (a *answers) give(id string, answer error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if waiting, ok := a.waiting[id]; ok {
		delete(a.waiting, id)
		waiting <- answer // has room for one
	}
}
