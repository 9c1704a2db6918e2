package e2e_test

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"syscall"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/fault"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// TestCrash_AtEveryPointOfAJobsLife kills the coordinator, as kill -9 does, at each named moment of a job's and its
// publication's life, and starts it again: what was accepted is published once, with the bytes that it had when it was
// first seen, and who watches it gets every event once.
func TestCrash_AtEveryPointOfAJobsLife(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{CoordinatorArgs: []string{"--job-lease", "3s"}})
	points := append(fault.Points[:len(fault.Points):len(fault.Points)], fault.LegBuilt+":2", fault.LegRecorded+":2", fault.PublishTagged+":2")
	for i, point := range points {
		r.Farm.Coordinator.Signal(syscall.SIGKILL)
		r.Farm.Coordinator.Wait(t, jobLimit)
		r.Farm.StartCoordinator(t, "ARCHFARM_FAULT="+point)
		r.Farm.WaitWorkers(t, "amd-1 is back", ready("amd-1"))
		r.Farm.WaitWorkers(t, "arm-1 is back", ready("arm-1"))
		if !t.Run(point, func(t *testing.T) { r.crash(t, i, point) }) {
			t.Log(r.Logs())
			return
		}
	}
}

// crash submits a job to a coordinator that will die of it, and follows the job through the next one's life.
func (r jobRig) crash(t *testing.T, number int, point string) {
	repo := fmt.Sprintf("%s/%d", r.repo, number)
	tag := func(name string) string { return r.registry.Host + "/" + repo + ":" + name }
	dir := r.context(t, map[string]string{"Dockerfile": plain, "hello": point})
	submit := []string{"submit", "--farm", r.Farm.Addr, "--output", "json", "--request-id", fmt.Sprint("crash-", number), "--context", dir, "--platform", both, "--tag", tag("v1.0.0"), "--tag", tag("latest")}
	submission := farmtest.StartProcess(t, farmtest.Spec{Name: "archfarm submit", Path: r.tools.Archfarm, Args: submit})

	r.Farm.Coordinator.WaitOutput(t, jobLimit, "the fault", farmtest.Contains("fault: dying at"))
	r.Farm.Coordinator.Wait(t, jobLimit)
	before := map[string]string{}
	for _, name := range r.registry.Tags(t, repo) {
		before[name] = r.registry.Index(t, repo, name).Digest.String()
	}
	r.Farm.StartCoordinator(t)

	if code := submission.Wait(t, jobLimit); code != 0 { // its client tries again by itself
		t.Fatalf("archfarm submit: exit code %d:\n%s", code, submission.Output())
	}
	var made struct{ ID string }
	readJSON(t, submission.Output(), &made)
	watched := r.watch(t, made.ID)
	job := r.ended(t, made.ID, archfarmv1.Job_STATE_SUCCEEDED)
	if err := <-watched; err != nil {
		t.Error(err)
	}
	for _, name := range []string{"v1.0.0", "latest"} {
		wantEqual(t, name, r.registry.Index(t, repo, name).Digest.String(), job.GetDigest())
		if was, ok := before[name]; ok && was != job.GetDigest() {
			t.Errorf("%s was %s before the crash, and is %s: it was published twice", name, was, job.GetDigest())
		}
	}
	r.wantPublishedOnce(t, repo, job)
	var again struct{ ID string }
	readJSON(t, farmtest.Command(t, r.tools.Archfarm, submit...).Output, &again)
	wantEqual(t, "the job of the same request", again.ID, made.ID)
}

// wantPublishedOnce checks that the ledger has one published binding of each of the job's two tags, and nothing pending.
func (r jobRig) wantPublishedOnce(t *testing.T, repo string, job *archfarmv1.Job) {
	t.Helper()
	published := map[string]int{}
	for binding, err := range r.client.Tags(t.Context(), &archfarmv1.ListTagsRequest{Repository: r.registry.Host + "/" + repo}) {
		if err != nil {
			t.Fatal(err)
		}
		switch binding.GetState() {
		case archfarmv1.TagBinding_STATE_PUBLISHED:
			published[binding.GetTag()]++
			wantEqual(t, "the ledger's "+binding.GetTag(), binding.GetDigest(), job.GetDigest())
			wantEqual(t, "the ledger's job", binding.GetJob(), job.GetId())
		case archfarmv1.TagBinding_STATE_PENDING:
			t.Errorf("the ledger has a pending binding: %v", binding)
		}
	}
	if len(published) != 2 || published["v1.0.0"] != 1 || published["latest"] != 1 {
		t.Errorf("the ledger has published %v, want v1.0.0 and latest once", published)
	}
}

// watch follows a job from its first event on, and tells in the end whether each came once, in order.
func (r jobRig) watch(t *testing.T, id string) <-chan error {
	ctx, stop := context.WithTimeout(t.Context(), jobLimit)
	done := make(chan error, 1)
	go func() { // ends with the job, or the time
		defer stop()
		done <- r.follow(ctx, id)
	}()
	return done
}

func (r jobRig) follow(ctx context.Context, id string) error {
	var last int64
	var states []string
	for event, err := range r.client.Watch(ctx, id, 0) {
		if err != nil {
			return fmt.Errorf("watching %s after event %d: %w", id, last, err)
		}
		if event.GetSeq() != last+1 {
			return fmt.Errorf("watching %s: event %d comes after %d", id, event.GetSeq(), last)
		}
		last = event.GetSeq()
		if job := event.GetJob(); job != nil {
			states = append(states, strings.ToLower(strings.TrimPrefix(job.GetState().String(), "STATE_")))
		}
	}
	if len(states) < 3 || states[0] != "queued" || states[len(states)-1] != "succeeded" {
		return fmt.Errorf("watching %s: the states were %q", id, states)
	}
	return nil
}

// TestCrash_APushIsFinishedOrUndone kills the coordinator while it publishes a build of docker buildx, whose credentials
// are gone with it: the next one finds out from the registry which tags moved, and its ledger says so.
func TestCrash_APushIsFinishedOrUndone(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{CoordinatorArgs: []string{"--job-lease", "3s"}})
	for i, point := range []string{fault.PublishBound, fault.PublishIndex, fault.PublishTagged, fault.PublishTagged + ":2", fault.PublishChecked} {
		r.Farm.Coordinator.Signal(syscall.SIGKILL)
		r.Farm.Coordinator.Wait(t, jobLimit)
		r.Farm.StartCoordinator(t, "ARCHFARM_FAULT="+point)
		r.Farm.WaitWorkers(t, "amd-1 is back", ready("amd-1"))
		r.Farm.WaitWorkers(t, "arm-1 is back", ready("arm-1"))

		repo := fmt.Sprintf("%s/%d", r.repo, i)
		dir := r.context(t, map[string]string{"Dockerfile": plain, "hello": point})
		push := r.Client.StartBuild(t, "--platform", both, "--push", "-t", r.registry.Host+"/"+repo+":v1.0.0", "-t", r.registry.Host+"/"+repo+":v1.0.1", dir)
		r.Farm.Coordinator.WaitOutput(t, jobLimit, "the fault", farmtest.Contains("fault: dying at"))
		r.Farm.Coordinator.Wait(t, jobLimit)
		if code := push.Wait(t, jobLimit); code == 0 {
			t.Errorf("%s: buildx says that the push went well:\n%s", point, push.Output())
		}
		r.Farm.StartCoordinator(t)
		moved := map[string]string{}
		for _, tag := range r.registry.Tags(t, repo) {
			moved[tag] = r.registry.Index(t, repo, tag).Digest.String()
		}
		farmtest.Eventually(t, jobLimit, point+": the ledger says what the registry does", func() (string, bool) {
			said, pending := map[string]string{}, 0
			for b, err := range r.client.Tags(t.Context(), &archfarmv1.ListTagsRequest{Repository: r.registry.Host + "/" + repo}) {
				switch {
				case err != nil:
					return err.Error(), false
				case b.GetState() == archfarmv1.TagBinding_STATE_PUBLISHED:
					said[b.GetTag()] = b.GetDigest()
				case b.GetState() == archfarmv1.TagBinding_STATE_PENDING:
					pending++
				}
			}
			return fmt.Sprintf("the ledger %v and %d pending, the registry %v", said, pending, moved), pending == 0 && maps.Equal(said, moved)
		})
		t.Logf("%s: moved %d of 2 tags", point, len(moved))
	}
}
