package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// maxDirectiveID bounds what is echoed, in bytes.
const maxDirectiveID = 128

// direct does what the coordinator says and answers with Done, which the stream's
// sender puts behind a report. It does not wait longer than the stream lives.
func (s *stream) direct(life context.Context, d *archfarmv1.Directive) {
	if len(d.GetId()) > maxDirectiveID {
		s.link.log.Warn("the coordinator sends a directive with an invalid id")
		return
	}
	done := &archfarmv1.Done{DirectiveId: d.GetId()}
	if err := s.do(life, d); err != nil {
		s.link.log.Warn("not done what the coordinator says", "error", err)
		done.Error = clip(err.Error())
	}
	s.answer(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Done{Done: done}})
}

func (s *stream) do(life context.Context, d *archfarmv1.Directive) error {
	a := s.link.set.agent
	switch action := d.GetAction().(type) {
	case *archfarmv1.Directive_Change:
		return a.obey(action.Change)
	case *archfarmv1.Directive_GossipKeyring:
		return a.gossip.direct(life, s.link, action.GossipKeyring.GetKeys())
	case *archfarmv1.Directive_ReportNow:
		a.caretaker.look(time.Now())
		return nil
	}
	return errors.New("not supported: the coordinator is newer than this agent")
}

// obey does what an operator wants, and keeps it for the next run of the agent.
func (a *agent) obey(c *archfarmv1.WorkerChange) error {
	o, err := orderOf(c)
	if err != nil {
		return err
	}
	a.ordering.Lock()
	defer a.ordering.Unlock()
	// Who uncordons a worker with a full disk means it.
	if o == (order{}) {
		a.caretaker.overrule()
	}
	a.slots.obey(o)
	a.cfg.Logger.Info("an operator has changed the worker", "action", c.GetAction().String(), "reason", o.Reason)
	if a.cfg.DataDir == "" {
		return nil
	}
	if err := saveOrder(a.cfg.DataDir, o); err != nil {
		return fmt.Errorf("it is done, but will be forgotten when the agent is restarted: %w", err)
	}
	return nil
}
