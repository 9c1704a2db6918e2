package sqlstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// job is a row of jobs.
type job struct {
	store.Job
	epoch, leaseUntil int64
}

const jobColumns = `jobs.id, request_id, jobs.tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories,
	priority, jobs.state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until`

func scanJob(scan func(...any) error) (j job, err error) {
	var pools, tags, repositories, legs string
	var created, started, ended int64
	if err := scan(&j.ID, &j.RequestID, &j.Tenant, &j.SubmittedBy, &pools, &j.Spec, &j.SpecDigest, &j.Sealed, &j.Context, &tags, &repositories,
		&j.Priority, &j.State, &j.Digest, &j.Error, &j.Retries, &j.CancelRequested, &j.Coordinator, &j.LastSeq, &created, &started, &ended,
		&legs, &j.epoch, &j.leaseUntil); err != nil {
		return job{}, err
	}
	j.Created, j.Started, j.Ended = moment(created), moment(started), moment(ended)
	j.Legs, err = decodeLegs(legs)
	if err := errors.Join(err, decode(pools, &j.Pools), decode(tags, &j.Tags), decode(repositories, &j.Repositories)); err != nil {
		return job{}, fmt.Errorf("job %s: %w: %w", j.ID, store.ErrCorrupt, err)
	}
	return j, nil
}

// held tells whether somebody has the job's lease.
func (j *job) held(now time.Time) bool { return j.leaseUntil > micros(now) }

// leg and attempt are how they are stored, in one column of the job: they are read
// and written with it.
type leg struct {
	Platform   string      `json:"platform"`
	State      store.State `json:"state"`
	Descriptor []byte      `json:"descriptor,omitempty"`
	Worker     string      `json:"worker,omitempty"`
	Error      string      `json:"error,omitempty"`
	Attempts   []attempt   `json:"attempts,omitempty"`
}

type attempt struct {
	Number      int    `json:"number"`
	Coordinator string `json:"coordinator,omitempty"`
	Worker      string `json:"worker,omitempty"`
	Error       string `json:"error,omitempty"`
	Began       int64  `json:"began,omitempty"`
	Ended       int64  `json:"ended,omitempty"`
}

func encodeLegs(legs []store.Leg) (string, error) {
	all := make([]leg, len(legs))
	for i, l := range legs {
		all[i] = leg{Platform: l.Platform, State: l.State, Descriptor: l.Descriptor, Worker: l.Worker, Error: l.Error}
		for _, a := range l.Attempts {
			all[i].Attempts = append(all[i].Attempts, attempt{
				Number: a.Number, Coordinator: a.Coordinator, Worker: a.Worker, Error: a.Error,
				Began: micros(a.Began), Ended: micros(a.Ended),
			})
		}
	}
	return encode(all)
}

func decodeLegs(data string) ([]store.Leg, error) {
	var all []leg
	if err := decode(data, &all); err != nil {
		return nil, err
	}
	var legs []store.Leg
	for _, l := range all {
		next := store.Leg{Platform: l.Platform, State: l.State, Descriptor: l.Descriptor, Worker: l.Worker, Error: l.Error}
		for _, a := range l.Attempts {
			next.Attempts = append(next.Attempts, store.Attempt{
				Number: a.Number, Coordinator: a.Coordinator, Worker: a.Worker, Error: a.Error,
				Began: moment(a.Began), Ended: moment(a.Ended),
			})
		}
		legs = append(legs, next)
	}
	return legs, nil
}

// source is a store.Source as it is stored.
type source struct {
	URL        string `json:"url,omitempty"`
	Commit     string `json:"commit,omitempty"`
	Branch     string `json:"branch,omitempty"`
	Tag        string `json:"tag,omitempty"`
	CommitTime int64  `json:"commit_time,omitempty"`
}

func encodeSource(s store.Source) (string, error) {
	if s == (store.Source{}) {
		return "", nil
	}
	data, err := json.Marshal(source{URL: s.URL, Commit: s.Commit, Branch: s.Branch, Tag: s.Tag, CommitTime: micros(s.CommitTime)})
	return string(data), err
}

func decodeSource(data string) (store.Source, error) {
	if data == "" {
		return store.Source{}, nil
	}
	var s source
	err := json.Unmarshal([]byte(data), &s)
	return store.Source{URL: s.URL, Commit: s.Commit, Branch: s.Branch, Tag: s.Tag, CommitTime: moment(s.CommitTime)}, err
}
