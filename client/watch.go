package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Watch goes through the events of a job after a sequence number (0: all), those to
// come as they come, each once and without a gap, and ends after the last one. A
// connection that breaks is made anew, for Client.Patience. An error is the last
// element.
func (c *Client) Watch(ctx context.Context, id string, after int64) iter.Seq2[*archfarmv1.JobEvent, error] {
	return func(yield func(*archfarmv1.JobEvent, error) bool) {
		w := &watch{client: c, id: id, last: after, patience: c.patience()}
		for {
			err := w.once(ctx, yield)
			switch {
			case w.stopped, err == nil:
				return
			}
			if err = w.patience.wait(ctx, err); err != nil {
				yield(nil, err)
				return
			}
		}
	}
}

// watch is where a Watch stands.
type watch struct {
	client   *Client
	id       string
	last     int64 // sequence number of the last event that was yielded
	state    archfarmv1.Job_State
	stopped  bool // by who receives
	patience *patience
}

// once receives until the stream ends; nil: after the job's last event.
func (w *watch) once(ctx context.Context, yield func(*archfarmv1.JobEvent, error) bool) error {
	ctx, cancel := context.WithCancel(ctx) // the stream ends with it
	defer cancel()
	stream, err := w.client.jobs.Watch(ctx, &archfarmv1.WatchRequest{Id: w.id, AfterSeq: w.last}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return err
	}
	for {
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return w.end(ctx)
		}
		if err != nil {
			return err
		}
		switch event := answer.GetEvent(); {
		case event.GetSeq() <= w.last: // again: what was asked for begins later
		case event.GetSeq() > w.last+1:
			return fmt.Errorf("after event %d of %s comes %d: %w", w.last, w.id, event.GetSeq(), errGap)
		default:
			w.take(event)
			if !yield(event, nil) {
				w.stopped = true
				return nil
			}
		}
	}
}

// end tells whether a stream that has ended well was a job's end: a proxy, or a
// coordinator that stops, may end one early.
func (w *watch) end(ctx context.Context) error {
	if Ended(w.state) {
		return nil
	}
	job, err := w.client.Get(ctx, w.id)
	if err == nil && (!Ended(job.GetState()) || job.GetLastSeq() > w.last) {
		return status.Errorf(codes.Unavailable, "the stream of %s has ended before the job has", w.id)
	}
	return err
}

func (w *watch) take(event *archfarmv1.JobEvent) {
	w.last = event.GetSeq()
	w.patience.reset()
	if job := event.GetJob(); job != nil {
		w.state = job.GetState()
	}
}

// Wait returns a job once it has ended, however it did.
func (c *Client) Wait(ctx context.Context, id string) (*archfarmv1.Job, error) {
	for patience := c.patience(); ; {
		job, err := c.Get(ctx, id)
		if err == nil && Ended(job.GetState()) {
			return job, nil
		}
		if err == nil {
			patience.answered = time.Now()
			if err = c.follow(ctx, job); err == nil {
				continue // Watch has seen it end
			}
		}
		if err := patience.wait(ctx, err); err != nil {
			return nil, err
		}
	}
}

// follow returns when a job's events have ended.
func (c *Client) follow(ctx context.Context, job *archfarmv1.Job) error {
	for _, err := range c.Watch(ctx, job.GetId(), job.GetLastSeq()) {
		if err != nil {
			return err
		}
	}
	return nil
}
