package dispatch

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/moby/buildkit/client/buildid"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ExecProcess relays the processes of one client: it has a single stream for
// all of them, while their containers may be on several workers.
func (b *Build) ExecProcess(client gwpb.LLBBridge_ExecProcessServer) error {
	ctx, cancel := context.WithCancelCause(client.Context())
	defer cancel(nil)
	group, ctx := errgroup.WithContext(ctx)
	x := &execRelay{build: b, client: client, group: group, ctx: ctx, workers: map[*leg]gwpb.LLBBridge_ExecProcessClient{}, processes: map[string]*leg{}}
	requests := make(chan error, 1)
	go func() { requests <- x.requests() }() // ends with the client's stream, at the latest when this function returns
	select {
	case err := <-requests:
		if err != nil {
			cancel(err)
			_ = group.Wait()
			return err
		}
		return group.Wait()
	case <-ctx.Done(): // a worker's end; the client may be waiting for just its answer
		_ = group.Wait()
		return context.Cause(ctx)
	}
}

type execRelay struct {
	build     *Build
	client    gwpb.LLBBridge_ExecProcessServer
	group     *errgroup.Group
	ctx       context.Context
	workers   map[*leg]gwpb.LLBBridge_ExecProcessClient
	processes map[string]*leg

	sending sync.Mutex // to the client, from several workers
}

// requests sends each of the client's messages to the worker of its process, and
// after the last one tells the workers that there are no more.
func (x *execRelay) requests() error {
	for {
		message, err := x.client.Recv()
		if errors.Is(err, io.EOF) {
			for _, worker := range x.workers {
				_ = worker.CloseSend()
			}
			return nil
		}
		if err != nil {
			return err
		}
		if start := message.GetInit(); start != nil {
			l, err := x.build.container(start.GetContainerID())
			if err != nil {
				return err
			}
			x.processes[message.GetProcessID()] = l
		}
		l, ok := x.processes[message.GetProcessID()]
		if !ok {
			return status.Errorf(codes.NotFound, "process %s was not started on this stream", message.GetProcessID())
		}
		worker, err := x.worker(l)
		if err != nil {
			return err
		}
		if err := worker.Send(message); err != nil && !errors.Is(err, io.EOF) { // EOF: the worker has ended the stream, and said why in its answer
			return err
		}
	}
}

// worker returns the stream to a leg's worker, opened at first use.
func (x *execRelay) worker(l *leg) (gwpb.LLBBridge_ExecProcessClient, error) {
	if stream, ok := x.workers[l]; ok {
		return stream, nil
	}
	stream, err := l.attempt.gateway.ExecProcess(buildid.AppendToOutgoingContext(outgoing(x.ctx), l.attempt.ref))
	if err != nil {
		return nil, err
	}
	x.workers[l] = stream
	done := l.busy()
	x.group.Go(func() error {
		defer done()
		return x.answers(l, stream)
	})
	return stream, nil
}

func (x *execRelay) answers(l *leg, worker gwpb.LLBBridge_ExecProcessClient) error {
	for {
		message, err := worker.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if lost := l.attempt.conn.Lost(); err != nil && lost != nil {
			return l.failed(lost, l.worker.Name)
		}
		if err != nil {
			return err
		}
		x.sending.Lock()
		err = x.client.Send(message)
		x.sending.Unlock()
		if err != nil {
			return err
		}
	}
}
