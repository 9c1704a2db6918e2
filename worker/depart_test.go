package worker

import (
	"testing"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// TestDeparting_TheAgentAttachesToTheSuccessorAsWell has another process take over a coordinator's address.
func TestDeparting_TheAgentAttachesToTheSuccessorAsWell(t *testing.T) {
	t.Parallel()
	b, former := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{former.addr.String()}, Slots: 2}, hasty)
	old := former.attach(t)
	if !old.hello.GetInlineConnections() {
		t.Error("the agent does not say that it understands")
	}
	old.wantReport(ready, 0)
	running := old.open("before", true)

	if err := former.door.Retire(); err != nil {
		t.Fatal(err)
	}
	next := startCoordinator(t, former.addr)
	old.say(&archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Departing{Departing: &archfarmv1.Departing{}}})
	heir := next.attach(t)
	heir.wantReport(ready, 1) // what the other one has taken

	old.say(&archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Open{Open: &archfarmv1.Open{ConnectionId: "after", TakesSlot: true, Inline: true}}})
	if id := receive(t, former.carried, "a carried connection"); id != "after" {
		t.Errorf("carried %q", id)
	}
	carried := receive(t, former.tunnels, "its bytes")
	heir.wantReport(ready, 2)
	heir.ask("surplus", true)
	heir.wantRefused("surplus", archfarmv1.Refused_CAUSE_NO_SLOT)
	wantInfo(t, running)
	heir.wantReport(ready, 1)
	wantInfo(t, carried)
	heir.wantReport(ready, 0)
	wantInfo(t, heir.open("heirs", false))

	old.hangUp() // the former one has ended
	former.stop()
	for until := time.Now().Add(3 * time.Second / 2); time.Now().Before(until); { // the agent would be back in a second
		heir.wantReport(ready, 0)
	}
	select {
	case <-next.attached:
		t.Error("the agent attached to the successor twice")
	default:
	}
}
