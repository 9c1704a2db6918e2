package fleet_test

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestFleet_EvictEndsAWorkerAndItsConnectionsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		b, other := f.attach(t, "amd-2")
		daemon := a.works()
		b.works()
		taken, control, bystander := must(t, w.Take), must(t, w.Control), must(t, other.Take)
		defer taken.Close()
		defer bystander.Close()
		f.Evict("amd-1", errors.New("its certificate was revoked"))
		if _, attached := f.Worker("amd-1"); attached || len(f.last()) != 1 {
			t.Errorf("still in the fleet: %v", f.last())
		}
		<-w.Gone()
		<-taken.Down()
		<-control.Down()
		lost(t, taken.Lost(), "amd-1")
		synctest.Wait()
		if err := <-a.ended; status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "its certificate was revoked") {
			t.Errorf("the agent is told %v", err)
		}
		if n := daemon.alive(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
		lost(t, begin(t.Context(), w.Dial).result(t), "amd-1")
		if _, attached := f.Worker("amd-2"); !attached || bystander.Lost() != nil || answers(t, bystander) != nil {
			t.Error("another worker suffered")
		}
		f.Evict("amd-1", errors.New("again"))
		f.Evict("nobody", errors.New("whatever"))
		if _, back := f.attach(t, "amd-1"); back.ID() == w.ID() {
			t.Error("the one that came later is the one that was sent away")
		}
	})
}

// The agent's stream may be over while its attempts still run.
func TestFleet_EvictSeversWhatAnAgentLeftBehind(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		a.works()
		conn := must(t, w.Take)
		defer conn.Close()
		if err := a.stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if conn.Lost() != nil || answers(t, conn) != nil {
			t.Fatal("lost with the stream")
		}
		f.Evict("amd-1", errors.New("its certificate was revoked"))
		lost(t, conn.Lost(), "amd-1")
	})
}

func TestFleet_EvictEndsWhatIsBeingOpened(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		dialing, order := begin(t.Context(), w.Take), direct(t, w)
		open := <-a.opens
		f.Evict("amd-1", errors.New("its certificate was revoked"))
		lost(t, dialing.result(t), "amd-1")
		lost(t, order.result(t), "amd-1")
		if !refusedBack(f, open.GetConnectionId(), f.as) {
			t.Error("a connection of the evicted worker was taken")
		}
	})
}
