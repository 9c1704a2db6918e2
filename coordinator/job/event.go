package job

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

var jobStates = map[store.State]archfarmv1.Job_State{
	store.Queued:     archfarmv1.Job_STATE_QUEUED,
	store.Running:    archfarmv1.Job_STATE_RUNNING,
	store.Publishing: archfarmv1.Job_STATE_PUBLISHING,
	store.Succeeded:  archfarmv1.Job_STATE_SUCCEEDED,
	store.Failed:     archfarmv1.Job_STATE_FAILED,
	store.Cancelled:  archfarmv1.Job_STATE_CANCELLED,
}

var legStates = map[store.State]archfarmv1.JobLeg_State{
	store.Queued:    archfarmv1.JobLeg_STATE_QUEUED,
	store.Running:   archfarmv1.JobLeg_STATE_RUNNING,
	store.Succeeded: archfarmv1.JobLeg_STATE_SUCCEEDED,
	store.Failed:    archfarmv1.JobLeg_STATE_FAILED,
	store.Cancelled: archfarmv1.JobLeg_STATE_CANCELLED,
}

func ended(s archfarmv1.Job_State) bool {
	return s == archfarmv1.Job_STATE_SUCCEEDED || s == archfarmv1.Job_STATE_FAILED || s == archfarmv1.Job_STATE_CANCELLED
}

// message is a job as clients see it. A specification that cannot be read is left
// out: the job's error tells.
func message(j store.Job) *archfarmv1.Job {
	spec := &archfarmv1.JobSpec{}
	if err := proto.Unmarshal(j.Spec, spec); err != nil {
		spec = nil
	}
	m := &archfarmv1.Job{
		Id: j.ID, State: jobStates[j.State], Spec: spec, Tags: j.Tags, Digest: j.Digest, Error: j.Error, RequestId: j.RequestID,
		Tenant: j.Tenant, SubmittedBy: j.SubmittedBy, CreateTime: stamp(j.Created), StartTime: stamp(j.Started), EndTime: stamp(j.Ended),
		LastSeq: j.LastSeq, Retries: int32(j.Retries), Coordinator: j.Coordinator, //nolint:gosec // counts calls
	}
	for _, l := range j.Legs {
		m.Legs = append(m.Legs, legMessage(l))
	}
	return m
}

func legMessage(l store.Leg) *archfarmv1.JobLeg {
	m := &archfarmv1.JobLeg{Platform: l.Platform, State: legStates[l.State], Worker: l.Worker, Error: l.Error}
	if d, err := descriptor(l); err == nil {
		m.Digest = d.Digest.String()
	}
	for _, a := range l.Attempts {
		m.Attempts = append(m.Attempts, &archfarmv1.LegAttempt{
			Number: int32(a.Number), Worker: a.Worker, Error: a.Error, Coordinator: a.Coordinator, //nolint:gosec // bounded by maxAttempts
			StartTime: stamp(a.Began), EndTime: stamp(a.Ended),
		})
	}
	return m
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func legEvent(l store.Leg) *archfarmv1.JobEvent {
	return &archfarmv1.JobEvent{Event: &archfarmv1.JobEvent_Leg{Leg: legMessage(l)}}
}

func noticeEvent(text string) *archfarmv1.JobEvent {
	return &archfarmv1.JobEvent{Event: &archfarmv1.JobEvent_Notice{Notice: readable(text)}}
}

// jobEvent is a snapshot of a job. What the store knows better, the sequence number
// and the times of its transaction, is filled in when the event is read.
func jobEvent(j store.Job) *archfarmv1.JobEvent {
	m := message(j)
	m.LastSeq = 0
	return &archfarmv1.JobEvent{Event: &archfarmv1.JobEvent_Job{Job: m}}
}

// stored are events on their way to the store.
func stored(events ...*archfarmv1.JobEvent) ([]store.Event, error) {
	out := make([]store.Event, 0, len(events))
	for _, e := range events {
		raw, err := proto.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encoding an event: %w", err)
		}
		out = append(out, store.Event{Data: raw})
	}
	return out, nil
}

// read is an event as it comes from the store.
func read(e store.Event) (*archfarmv1.JobEvent, error) {
	m := &archfarmv1.JobEvent{}
	if err := proto.Unmarshal(e.Data, m); err != nil {
		return nil, fmt.Errorf("event %d: %w", e.Seq, err)
	}
	m.Seq, m.Time = e.Seq, stamp(e.Time)
	if j := m.GetJob(); j != nil {
		j.LastSeq = e.Seq
		if j.StartTime == nil && j.State == archfarmv1.Job_STATE_RUNNING {
			j.StartTime = m.Time
		}
		if j.EndTime == nil && ended(j.State) {
			j.EndTime = m.Time
		}
		if j.CreateTime == nil {
			j.CreateTime = m.Time
		}
	}
	return m, nil
}

// maxText bounds an error or notice, in bytes.
const maxText = 16 << 10

// readable is a text that fits, and that protocol buffers take.
func readable(text string) string {
	text = strings.ToValidUTF8(text, "\uFFFD")
	if len(text) <= maxText {
		return text
	}
	cut := maxText
	for cut > 0 && !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut] + "… (cut)"
}
