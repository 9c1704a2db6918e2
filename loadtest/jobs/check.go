package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// maxShown is how many faults of a kind are told.
	maxShown = 5
	// letGo is how long the coordinator may take to let go of what is over. Afterwards it has no more goroutines than
	// before but for those of idle connections, and no more memory but for caches, in bytes.
	letGo                      = 30 * time.Second
	spareGoroutines, spareHeap = 100, 64 << 20
)

// faults counts what is wrong, and tells the first of it.
type faults struct {
	t      farmtest.T
	number int
}

func (f *faults) add(format string, args ...any) {
	if f.number++; f.number <= maxShown {
		f.t.Errorf(format, args...)
	}
}

// check compares what there is in the end with what was submitted: by the coordinator's lists, its ledger of tags, the
// registry, and those who watched.
func (r *run) check(ctx context.Context, t farmtest.T, ids map[int]string, out io.Writer) {
	t.Helper()
	attempts := r.checkJobs(ctx, t, ids)
	// An attempt may have ended, with its coordinator, before it reached a worker.
	if began := int(r.buildkit.Solves.Load()); began != attempts && !r.Kill || began > attempts || began < len(ids)*r.Platforms {
		t.Errorf("the workers have begun %d builds, the jobs tell of %d attempts", began, attempts)
	}
	r.running.Wait()
	for _, wrong := range r.wrong[:min(len(r.wrong), maxShown)] {
		t.Errorf("%s", wrong)
	}
	fmt.Fprintf(out, "checked: %d jobs, each succeeded once, %d attempts of %d legs; %d jobs watched, %d events without a gap\n",
		len(ids), attempts, len(ids)*r.Platforms, r.number, r.events)
	if r.Publish {
		r.checkTags(ctx, t, ids)
		fmt.Fprintf(out, "checked: %d tags in the registry and the ledger, each bound once\n", len(ids))
	}
}

// checkHeld waits until the coordinator has let go of what the jobs were run with.
func (r *run) checkHeld(t farmtest.T, before load.Held, out io.Writer) {
	t.Helper()
	pid := r.farm.Coordinator.Pid()
	after := load.Holds(t, r.farm.HTTP, pid)
	more := func() bool {
		return after.Goroutines > before.Goroutines+spareGoroutines || after.Heap > before.Heap+spareHeap
	}
	for limit := time.Now().Add(letGo); more() && time.Now().Before(limit); after = load.Holds(t, r.farm.HTTP, pid) {
		time.Sleep(10 * lookEvery)
	}
	if more() {
		t.Errorf("the coordinator keeps more than it had before the jobs")
	}
	fmt.Fprintf(out, "coordinator before: %s\ncoordinator after:  %s\n", before, after)
}

// checkJobs goes through the list of all jobs, and returns how many attempts there were.
func (r *run) checkJobs(ctx context.Context, t farmtest.T, ids map[int]string) (attempts int) {
	t.Helper()
	wrong, missing := faults{t: t}, make(map[string]bool, len(ids))
	for _, id := range ids {
		missing[id] = true
	}
	if len(missing) != r.Jobs {
		t.Errorf("%d jobs have %d ids", r.Jobs, len(missing))
	}
	for j, err := range r.clients[0].List(ctx, &archfarmv1.ListRequest{PageSize: 500}) {
		if err != nil {
			t.Fatalf("listing jobs: %v", err)
		}
		if !missing[j.GetId()] {
			wrong.add("job %s is listed twice, or was never submitted", j.GetId())
		}
		delete(missing, j.GetId())
		if j.GetState() != archfarmv1.Job_STATE_SUCCEEDED || (j.GetDigest() != "") != r.Publish {
			wrong.add("job %s is %s: %s", j.GetId(), j.GetState(), j.GetError())
		}
		for _, l := range j.GetLegs() {
			attempts += len(l.GetAttempts())
			if l.GetState() != archfarmv1.JobLeg_STATE_SUCCEEDED || len(l.GetAttempts()) != 1 && !r.Kill {
				wrong.add("job %s, %s: %s, %d attempts: %s", j.GetId(), l.GetPlatform(), l.GetState(), len(l.GetAttempts()), l.GetError())
			}
		}
	}
	if len(missing) > 0 {
		t.Errorf("%d jobs were lost", len(missing))
	}
	if wrong.number > 0 {
		t.Errorf("%d faults in the list of jobs", wrong.number)
	}
	return attempts
}

// checkTags goes through the ledger and the registry.
func (r *run) checkTags(ctx context.Context, t farmtest.T, ids map[int]string) {
	t.Helper()
	wrong, bound := faults{t: t}, map[string]string{}
	for repository := range min(repositories, r.Jobs) {
		for b, err := range r.clients[0].Tags(ctx, &archfarmv1.ListTagsRequest{Repository: r.registry + "/" + name(repository), PageSize: 500}) {
			if err != nil {
				t.Fatalf("listing tags: %v", err)
			}
			if b.GetState() != archfarmv1.TagBinding_STATE_PUBLISHED || !b.GetCurrent() || bound[b.GetTag()] != "" {
				wrong.add("tag %s of %s is %s, current: %v, or bound twice", b.GetTag(), b.GetRepository(), b.GetState(), b.GetCurrent())
			}
			bound[b.GetTag()] = b.GetJob()
		}
		for _, tag := range load.Tags(t, r.registry, name(repository)) {
			if bound[tag] == "" {
				wrong.add("the registry has the tag %s, of which the ledger does not know", tag)
			}
			if bound[tag+" pushed"] != "" {
				wrong.add("the registry has the tag %s twice", tag)
			}
			bound[tag+" pushed"] = "yes"
		}
	}
	for i, id := range ids {
		tag := fmt.Sprintf("job-%05d", i)
		if bound[tag] != id || bound[tag+" pushed"] == "" {
			wrong.add("tag %s is bound by job %q instead of %s, in the registry: %q", tag, bound[tag], id, bound[tag+" pushed"])
		}
	}
	if wrong.number > 0 {
		t.Errorf("%d faults in the tags", wrong.number)
	}
}
