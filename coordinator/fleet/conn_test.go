package fleet_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/fleet"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
)

type ctx = context.Context

// lost checks that err says that the worker was lost.
func lost(t *testing.T, err error, worker string) {
	t.Helper()
	var l *build.LostError
	if !errors.As(err, &l) || l.Worker != worker {
		t.Errorf("got %v, want the loss of %s", err, worker)
	}
}

func TestWorker_ConnectionsAreDialedBackByTheAgent(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		b := a.works()
		plain, slot := must(t, w.Dial), must(t, w.Take)
		for _, c := range []*fleet.Conn{plain, slot} {
			if err := answers(t, c); err != nil {
				t.Error(err)
			}
		}
		first, second := b.conns[0].open, b.conns[1].open
		if first.GetTakesSlot() || !second.GetTakesSlot() {
			t.Errorf("takes a slot: %v, %v", first.GetTakesSlot(), second.GetTakesSlot())
		}
		if first.GetConnectionId() == second.GetConnectionId() || len(first.GetConnectionId()) < 26 || !tunnel.ValidID(first.GetConnectionId()) {
			t.Errorf("ids %q and %q", first.GetConnectionId(), second.GetConnectionId())
		}
		for _, c := range []*fleet.Conn{plain, slot} {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			if err := c.Close(); err != nil {
				t.Errorf("closing again: %v", err)
			}
			if c.Lost() != nil {
				t.Errorf("closed, not lost: %v", c.Lost())
			}
		}
		synctest.Wait()
		if n := b.alive(); n != 0 {
			t.Errorf("%d connections are open at the worker", n)
		}
	})
}

func TestWorker_RefusalsAreTold(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		for cause, check := range map[archfarmv1.Refused_Cause]func(error) bool{
			archfarmv1.Refused_CAUSE_NO_SLOT:  func(err error) bool { return errors.Is(err, fleet.ErrNoSlot) },
			archfarmv1.Refused_CAUSE_DRAINING: func(err error) bool { return errors.Is(err, fleet.ErrNoSlot) },
			archfarmv1.Refused_CAUSE_UNAVAILABLE: func(err error) bool {
				return status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "worker amd-1: buildkitd is away") && len(err.Error()) < 1000
			},
			archfarmv1.Refused_Cause(99): func(err error) bool { return status.Code(err) == codes.Unavailable },
		} {
			take := begin(t.Context(), w.Take)
			open := <-a.opens
			a.refuse("another", cause, "not this one")
			a.refuse(open.GetConnectionId(), cause, "buildkitd is away"+strings.Repeat("!", 1<<20))
			if err := take.result(t); !check(err) {
				t.Errorf("%v: got %.200v", cause, err)
			}
			a.refuse(open.GetConnectionId(), cause, "again")
		}
	})
}

func TestWorker_AnOpenThatIsNeverAnsweredEnds(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		dial := begin(t.Context(), w.Dial)
		open := <-a.opens
		for range 3 {
			time.Sleep(3 * time.Second)
			a.report(report(archfarmv1.Worker_STATE_READY, 2, 0))
		}
		if err := dial.result(t); err.Error() != "still waiting" {
			t.Fatal(err)
		}
		time.Sleep(openTimeout - 9*time.Second)
		if err := dial.result(t); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
		a.refuse(open.GetConnectionId(), archfarmv1.Refused_CAUSE_NO_SLOT, "too late")
		closedAtOnce(t, f, open.GetConnectionId())
	})
}

// closedAtOnce dials back with an id that nobody waits for.
func closedAtOnce(t *testing.T, f *farm, id string) {
	t.Helper()
	theirs, ours := net.Pipe()
	f.Accept(id, theirs)
	if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("a connection of id %q: %v", id, err)
	}
}

func TestFleet_ConnectionsNobodyAskedForAreClosed(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		closedAtOnce(t, f, "")
		closedAtOnce(t, f, "guessed")
		b := a.works()
		conn := must(t, w.Dial)
		defer conn.Close()
		closedAtOnce(t, f, b.conns[0].open.GetConnectionId()) // used already
		if err := answers(t, conn); err != nil {
			t.Error(err)
		}
	})
}

func TestWorker_WhoStopsWaitingLeavesNoConnectionBehind(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		enough := errors.New("enough")
		for range 200 {
			ctx, cancel := context.WithCancelCause(t.Context())
			dial := begin(ctx, w.Dial)
			open := <-a.opens
			theirs, ours := net.Pipe()
			go cancel(enough) // at the very moment
			go f.Accept(open.GetConnectionId(), theirs)
			go func() { _, _ = io.Copy(io.Discard, ours) }() // ends with the connection, without which the bubble does not end
			<-dial.done
			if dial.err == nil {
				_ = dial.conn.Close()
			} else if !errors.Is(dial.err, enough) {
				t.Fatal(dial.err)
			}
			cancel(nil)
		}
	})
}

func TestWorker_WhoWaitsForAWorkerThatLeavesIsTold(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		dial := begin(t.Context(), w.Take)
		<-a.opens
		_ = a.stream.CloseSend()
		lost(t, dial.result(t), "amd-1")
		_, err := w.Take(t.Context())
		lost(t, err, "amd-1")
	})
}

func TestConn_IsLostWhenTheOtherSideEnds(t *testing.T) {
	for name, end := range map[string]func(b *buildkit){
		"buildkitd is killed":      func(b *buildkit) { b.server.Stop() },
		"the connection is cut":    func(b *buildkit) { _ = b.conns[0].Conn.Close() },
		"buildkitd stops in peace": func(b *buildkit) { go b.server.GracefulStop() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				a, w := f.attach(t, "amd-1")
				b := a.works()
				conn := must(t, w.Take)
				if err := answers(t, conn); err != nil || conn.Lost() != nil {
					t.Fatal(err, conn.Lost())
				}
				end(b)
				<-conn.Down()
				lost(t, conn.Lost(), "amd-1")
				if status.Code(conn.Lost()) != codes.Unavailable {
					t.Errorf("its code is %v", status.Code(conn.Lost()))
				}
				if err := answers(t, conn); err == nil {
					t.Error("it answers all the same")
				}
				if err := conn.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// An error of a running call must find the connection lost already: that is how
// it is told from an Unavailable that a build step returned.
func TestConn_IsLostBeforeItsCallsFail(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		b := a.works()
		for i := range 50 {
			conn := must(t, w.Take)
			go func() {
				<-b.blocked
				_ = b.conns[i].Conn.Close()
			}()
			_, err := controlapi.NewControlClient(conn).DiskUsage(t.Context(), &controlapi.DiskUsageRequest{})
			if status.Code(err) != codes.Unavailable || conn.Lost() == nil {
				t.Fatalf("got %v, lost %v", err, conn.Lost())
			}
			_ = conn.Close()
		}
	})
}

func TestWorker_ControlIsSharedAndRedialed(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		b := a.works()
		for range 2 {
			var all []*pending
			for range 20 { // all at first use
				all = append(all, begin(t.Context(), w.Control))
			}
			for _, p := range all {
				if err := p.result(t); err != nil || p.conn != all[0].conn {
					t.Fatalf("got %p and %p, %v", p.conn, all[0].conn, err)
				}
			}
			if n := b.alive(); n != 1 || answers(t, all[0].conn) != nil {
				t.Fatalf("%d connections are open, want 1", n)
			}
			if again := must(t, w.Control); again != all[0].conn {
				t.Error("it is not shared")
			}
			for _, c := range b.conns {
				_ = c.Conn.Close()
			}
			<-all[0].conn.Down()
		}
		last := must(t, w.Control)
		_ = a.stream.CloseSend()
		synctest.Wait()
		if n := b.alive(); n != 0 || last.Lost() != nil {
			t.Errorf("%d connections are open after the worker has left", n)
		}
		_, err := w.Control(t.Context())
		lost(t, err, "amd-1")
	})
}

// What runs outlives an agent's stream that breaks, if the agent is soon back.
func TestFleet_ConnectionsOutliveAStreamThatIsReplaced(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		a.works()
		conn := must(t, w.Take)
		defer conn.Close()
		_ = a.stream.CloseSend()
		time.Sleep(lostAfter - time.Second)
		again, _ := f.attach(t, "amd-1")
		time.Sleep(lostAfter - time.Second)
		again.report(report(archfarmv1.Worker_STATE_READY, 2, 1))
		time.Sleep(time.Second)
		if err := answers(t, conn); err != nil || conn.Lost() != nil {
			t.Fatalf("%v, lost %v", err, conn.Lost())
		}
		time.Sleep(lostAfter) // now the new stream is silent, too
		synctest.Wait()
		lost(t, conn.Lost(), "amd-1")
	})
}

func TestFleet_ConnectionsToAWorkerThatDoesNotComeBackAreSevered(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		a.works()
		conn := must(t, w.Take)
		defer conn.Close()
		_ = a.stream.CloseSend()
		time.Sleep(lostAfter - time.Second)
		if err := answers(t, conn); err != nil || conn.Lost() != nil {
			t.Fatalf("%v, lost %v", err, conn.Lost())
		}
		time.Sleep(time.Second)
		synctest.Wait()
		lost(t, conn.Lost(), "amd-1")
		if err := answers(t, conn); err == nil {
			t.Error("it answers all the same")
		}
	})
}

func TestConn_IsLostWhenTheAgentSaysThatBuildKitDoesNotAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		b := a.works()
		conn := must(t, w.Take)
		a.report(report(archfarmv1.Worker_STATE_DRAINING, 2, 1))
		synctest.Wait()
		if conn.Lost() != nil || b.alive() != 1 {
			t.Fatalf("lost although its worker only drains: %v", conn.Lost())
		}
		a.report(&archfarmv1.Report{State: archfarmv1.Worker_STATE_UNAVAILABLE, Reason: "buildkitd has not answered"})
		<-conn.Down()
		lost(t, conn.Lost(), "amd-1")
		if !strings.Contains(conn.Lost().Error(), "buildkitd has not answered") {
			t.Errorf("it is not told why: %v", conn.Lost())
		}
		synctest.Wait()
		if n := b.alive(); n != 0 {
			t.Errorf("%d connections are open", n)
		}
		_ = conn.Close()
		late := must(t, w.Dial) // as the queue has not heard yet
		a.report(&archfarmv1.Report{State: archfarmv1.Worker_STATE_UNAVAILABLE})
		<-late.Down()
		_ = late.Close()
	})
}
