package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	bk "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/jobprogress"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// board turns a job's events into what BuildKit's progress display shows: the steps
// of its legs, and one step that is the job itself, whose output tells of states,
// attempts and notices.
type board struct {
	id     string
	job    *bk.Vertex
	runs   int // how often the job has been in the queue
	legs   map[string]*archfarmv1.JobLeg
	away   bool                                    // the farm, and that has been told
	legNow map[string]int32                        // platform → its attempt that shows progress
	open   map[string]map[digest.Digest]*bk.Vertex // platform → its steps that have begun
}

func newBoard(id string) *board {
	return &board{id: id, legs: map[string]*archfarmv1.JobLeg{}, legNow: map[string]int32{}, open: map[string]map[digest.Digest]*bk.Vertex{}}
}

// take is what an event changes on the display.
func (b *board) take(event *archfarmv1.JobEvent) *bk.SolveStatus {
	out, at := &bk.SolveStatus{}, moment(event.GetTime())
	b.begin(out, at)
	if b.away {
		b.away = false
		b.tell(out, at, "the farm answers again")
	}
	switch {
	case event.GetJob() != nil:
		b.jobChanged(out, event.GetJob(), at)
	case event.GetLeg() != nil:
		b.legChanged(out, event.GetLeg(), at)
	case event.GetProgress() != nil:
		b.progressed(out, event.GetProgress(), at)
	case event.GetNotice() != "":
		b.tell(out, at, event.GetNotice())
	}
	return out
}

// lost tells, once, that the farm does not answer.
func (b *board) lost(why string, at time.Time) *bk.SolveStatus {
	out := &bk.SolveStatus{}
	if b.away || b.job == nil || b.job.Completed != nil {
		return out
	}
	b.away = true
	b.tell(out, at, "the farm does not answer; trying again: "+why)
	return out
}

// begin shows the job's own step, anew when the job is retried.
func (b *board) begin(out *bk.SolveStatus, at time.Time) {
	if b.job != nil && b.job.Completed == nil {
		return
	}
	b.runs++
	name := "[archfarm] job " + printable(b.id)
	if b.runs > 1 {
		name += fmt.Sprintf(", retry %d", b.runs-1)
	}
	b.job = &bk.Vertex{Digest: digest.FromString(fmt.Sprintf("archfarm job %s %d", b.id, b.runs)), Name: name, Started: &at}
	b.show(out, b.job)
}

// show adds a vertex as it is now: the display keeps what it gets.
func (b *board) show(out *bk.SolveStatus, v *bk.Vertex) {
	now := *v
	out.Vertexes = append(out.Vertexes, &now)
}

func (b *board) tell(out *bk.SolveStatus, at time.Time, words string) {
	out.Logs = append(out.Logs, &bk.VertexLog{Vertex: b.job.Digest, Stream: 2, Data: []byte(printableLines(words) + "\n"), Timestamp: at})
}

func (b *board) jobChanged(out *bk.SolveStatus, job *archfarmv1.Job, at time.Time) {
	b.tell(out, at, shortState(job.GetState()))
	for _, leg := range job.GetLegs() { // those of a leg that has been told already change nothing
		b.legChanged(out, leg, at)
	}
	if !client.Ended(job.GetState()) {
		return
	}
	if job.GetDigest() != "" {
		for _, tag := range job.GetTags() {
			b.tell(out, at, "published "+tag+"@"+job.GetDigest())
		}
	}
	for _, platform := range slices.Sorted(maps.Keys(b.open)) {
		b.closeSteps(out, platform, at, shortState(job.GetState()))
	}
	b.job.Completed = &at
	if job.GetState() != archfarmv1.Job_STATE_SUCCEEDED {
		b.job.Error = printableLines(jobOutcome(job).Error())
	}
	b.show(out, b.job)
}

func (b *board) legChanged(out *bk.SolveStatus, leg *archfarmv1.JobLeg, at time.Time) {
	for _, words := range legWords(b.legs[leg.GetPlatform()], leg) {
		b.tell(out, at, leg.GetPlatform()+": "+words)
	}
	b.legs[leg.GetPlatform()] = leg
	switch s := leg.GetState(); s {
	case archfarmv1.JobLeg_STATE_SUCCEEDED, archfarmv1.JobLeg_STATE_FAILED, archfarmv1.JobLeg_STATE_CANCELLED:
		b.closeSteps(out, leg.GetPlatform(), at, shortState(s))
	case archfarmv1.JobLeg_STATE_QUEUED: // attempts are counted anew after a retry
		b.closeSteps(out, leg.GetPlatform(), at, "interrupted")
		delete(b.legNow, leg.GetPlatform())
	}
}

// legWords tells what has changed about a leg; was may be nil.
func legWords(was, now *archfarmv1.JobLeg) []string {
	var out []string
	before := map[int32]*archfarmv1.LegAttempt{}
	for _, a := range was.GetAttempts() {
		before[a.GetNumber()] = a
	}
	for _, a := range now.GetAttempts() {
		old, known := before[a.GetNumber()]
		if (!known || old.GetWorker() == "") && a.GetWorker() != "" {
			out = append(out, fmt.Sprintf("attempt %d runs on %s", a.GetNumber(), a.GetWorker()))
		}
		if a.GetError() != "" && old.GetError() == "" {
			out = append(out, fmt.Sprintf("attempt %d failed: %s", a.GetNumber(), a.GetError()))
		}
	}
	if now.GetState() == was.GetState() {
		return out
	}
	words := shortState(now.GetState())
	switch {
	case now.GetState() == archfarmv1.JobLeg_STATE_RUNNING && now.GetWorker() == "" || now.GetState() == archfarmv1.JobLeg_STATE_QUEUED && was == nil:
		return out // the job's own state says so
	case now.GetState() == archfarmv1.JobLeg_STATE_RUNNING:
		return out // its attempt has been told
	case now.GetDigest() != "":
		words += " " + now.GetDigest()
	case now.GetError() != "":
		words += ": " + now.GetError()
	}
	return append(out, words)
}

func (b *board) progressed(out *bk.SolveStatus, p *archfarmv1.Progress, at time.Time) {
	platform := p.GetPlatform()
	if p.GetAttempt() != b.legNow[platform] {
		b.closeSteps(out, platform, at, "interrupted")
		b.legNow[platform] = p.GetAttempt()
	}
	steps := b.open[platform]
	if steps == nil {
		steps = map[digest.Digest]*bk.Vertex{}
		b.open[platform] = steps
	}
	status := jobprogress.ToSolveStatus(p)
	for _, v := range status.Vertexes {
		v.Name = progress.StepName(platform, v.Name)
		if v.Started != nil && v.Completed == nil {
			steps[v.Digest] = v
		} else {
			delete(steps, v.Digest)
		}
	}
	out.Vertexes = append(out.Vertexes, status.Vertexes...)
	out.Statuses, out.Warnings = append(out.Statuses, status.Statuses...), append(out.Warnings, status.Warnings...)
	out.Logs = append(out.Logs, status.Logs...)
}

// closeSteps ends what an attempt that has ended has left open: a coordinator or a
// worker that was lost tells no end.
func (b *board) closeSteps(out *bk.SolveStatus, platform string, at time.Time, why string) {
	steps := b.open[platform]
	for _, d := range slices.Sorted(maps.Keys(steps)) {
		v := *steps[d]
		v.Completed = &at
		if why != shortState(archfarmv1.JobLeg_STATE_SUCCEEDED) {
			v.Error = why
		}
		b.show(out, &v)
	}
	delete(b.open, platform)
}

func moment(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Now()
	}
	return t.AsTime()
}

// printableLines is printable for text of several lines.
func printableLines(text string) string {
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		lines[i] = printable(strings.ReplaceAll(strings.TrimSuffix(l, "\r"), "\t", "    "))
	}
	return strings.Join(lines, "\n")
}
