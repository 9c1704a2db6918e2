package fleet_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/fleet"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

var drain = &archfarmv1.Directive{Action: &archfarmv1.Directive_Change{Change: &archfarmv1.WorkerChange{
	Action: archfarmv1.WorkerChange_ACTION_DRAIN, Reason: "a new disk",
}}}

func direct(t *testing.T, w *fleet.Worker) *pending {
	t.Helper()
	return attempt(t.Context(), func(ctx context.Context) error { return w.Direct(ctx, drain) })
}

func TestWorker_DirectReturnsOnceTheAgentHasDoneAndReported(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		before := proto.Clone(drain)
		call := direct(t, w)
		order := <-a.orders
		if order.GetId() == "" || !proto.Equal(order.GetChange(), drain.GetChange()) || !proto.Equal(drain, before) {
			t.Errorf("the agent is told %v", order)
		}
		if err := call.result(t); err.Error() != "still waiting" {
			t.Fatalf("returned before Done: %v", err)
		}
		a.report(report(archfarmv1.Worker_STATE_DRAINING, 2, 1))
		a.done(order.GetId(), "")
		if err := call.result(t); err != nil || w.Report().GetState() != archfarmv1.Worker_STATE_DRAINING {
			t.Errorf("got %v, the worker is %v", err, w.Report())
		}
	})
}

func TestWorker_DirectTellsWhyTheAgentDidNot(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		call := direct(t, w)
		a.done((<-a.orders).GetId(), "the disk is \x1b[31mfull\n"+strings.Repeat("x", 10_000))
		err := call.result(t)
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "worker amd-1: the disk is  [31mfull xx") || len(err.Error()) > 700 {
			t.Errorf("got %v", err)
		}
	})
}

func TestWorker_DirectIsOnlyForSoLongIgnored(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		call := direct(t, w)
		late := <-a.orders
		for range 3 {
			time.Sleep(3 * time.Second)
			a.report(report(archfarmv1.Worker_STATE_READY, 2, 0))
		}
		if err := call.result(t); err.Error() != "still waiting" {
			t.Fatalf("after 9 s: %v", err)
		}
		time.Sleep(time.Second)
		if err := call.result(t); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "amd-1") {
			t.Fatalf("after 10 s: %v", err)
		}
		again := direct(t, w)
		order := <-a.orders
		a.done(late.GetId(), "too late")
		a.done("", "whatever")
		a.done("never asked", "whatever")
		if err := again.result(t); err.Error() != "still waiting" {
			t.Fatalf("answered by what was not said to it: %v", err)
		}
		a.done(order.GetId(), "")
		a.done(order.GetId(), "and once more") // unheard
		if err := again.result(t); err != nil || late.GetId() == order.GetId() {
			t.Errorf("got %v", err)
		}
	})
}

func TestWorker_DirectMatchesAnswersByTheirIds(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		orders := map[string]*archfarmv1.Directive{}
		calls := map[string]*pending{}
		for i := range 20 {
			reason := fmt.Sprint(i)
			calls[reason] = attempt(t.Context(), func(ctx context.Context) error {
				return w.Direct(ctx, &archfarmv1.Directive{Action: &archfarmv1.Directive_Change{Change: &archfarmv1.WorkerChange{Reason: reason}}})
			})
			order := <-a.orders
			orders[order.GetChange().GetReason()] = order
		}
		for reason, order := range orders {
			a.done(order.GetId(), "no to "+reason)
		}
		for reason, call := range calls {
			if err := call.result(t); err == nil || !strings.HasSuffix(err.Error(), "no to "+reason) {
				t.Errorf("%s: %v", reason, err)
			}
		}
	})
}

func TestWorker_DirectEndsWithTheAgentOrItsCaller(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		gaveUp, giveUp := context.WithCancel(t.Context())
		given := attempt(gaveUp, func(ctx context.Context) error { return w.Direct(ctx, drain) })
		left := direct(t, w)
		synctest.Wait()
		giveUp()
		if err := given.result(t); err != context.Canceled { //nolint:errorlint // the very cause
			t.Errorf("who gave up got %v", err)
		}
		if err := a.stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		lost(t, left.result(t), "amd-1")
		lost(t, direct(t, w).result(t), "amd-1")
	})
}

// What an agent does not read fills what there is room for; nobody waits for that
// longer than for an answer.
func TestWorker_DirectDoesNotWaitForAFrozenAgent(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		_, w := f.enter(t, hello("amd-1"))
		var calls []*pending
		for range 5000 {
			calls = append(calls, direct(t, w))
		}
		time.Sleep(lostAfter)
		for _, c := range calls {
			lost(t, c.result(t), "amd-1")
		}
	})
}
