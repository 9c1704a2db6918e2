package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc"

	"github.com/archfarm/archfarm/client"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// A pipeline's step: submit a commit for two platforms, follow it, and fail as it does.
func Example() {
	address, stop := exampleFarm()
	defer stop()
	ctx := context.Background()

	farm, err := client.Dial(client.Config{Farm: address}) // and a CertDir, if it is another machine
	if err != nil {
		panic(err)
	}
	defer func() { _ = farm.Close() }()
	job, _, err := farm.Submit(ctx, &archfarmv1.SubmitRequest{
		RequestId: os.Getenv("CI_PIPELINE_ID"), // the pipeline's step may run again: it is one job
		Spec: &archfarmv1.JobSpec{
			Context:   &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Git{Git: &archfarmv1.GitContext{Url: "https://git.example.com/app.git", Ref: "main"}}},
			Platforms: []string{"linux/amd64", "linux/arm64"},
			Tags:      []string{"registry.example.com/app:{{.GitSHA}}"},
		},
	})
	if err != nil {
		for _, fault := range client.Faults(err) {
			fmt.Println(fault.Field, fault.Description)
		}
		panic(err)
	}
	for event, err := range farm.Watch(ctx, job.GetId(), 0) {
		if err != nil {
			panic(err)
		}
		if j := event.GetJob(); j != nil {
			fmt.Println(strings.TrimSpace(j.GetState().String() + " " + j.GetDigest()))
		}
	}
	// Output:
	// STATE_QUEUED
	// STATE_RUNNING
	// STATE_SUCCEEDED sha256:2cf2…
}

// exampleFarm stands for a coordinator.
func exampleFarm() (address string, stop func()) {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	socket := filepath.Join(dir, "farm.sock")
	listener, err := new(net.ListenConfig).Listen(context.Background(), "unix", socket)
	if err != nil {
		panic(err)
	}
	server := grpc.NewServer()
	archfarmv1.RegisterJobServiceServer(server, oneJob{})
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	return "unix://" + socket, func() {
		server.Stop()
		if err := errors.Join(<-ended, os.RemoveAll(dir)); err != nil {
			panic(err)
		}
	}
}

type oneJob struct {
	archfarmv1.UnimplementedJobServiceServer
}

func (oneJob) Submit(context.Context, *archfarmv1.SubmitRequest) (*archfarmv1.SubmitResponse, error) {
	return &archfarmv1.SubmitResponse{Job: &archfarmv1.Job{Id: "1"}}, nil
}

func (oneJob) Watch(_ *archfarmv1.WatchRequest, stream grpc.ServerStreamingServer[archfarmv1.WatchResponse]) error {
	for i, state := range []archfarmv1.Job_State{archfarmv1.Job_STATE_QUEUED, archfarmv1.Job_STATE_RUNNING, archfarmv1.Job_STATE_SUCCEEDED} {
		job := &archfarmv1.Job{Id: "1", State: state}
		if client.Ended(state) {
			job.Digest = "sha256:2cf2…"
		}
		if err := stream.Send(&archfarmv1.WatchResponse{Event: &archfarmv1.JobEvent{Seq: int64(i + 1), Event: &archfarmv1.JobEvent_Job{Job: job}}}); err != nil {
			return err
		}
	}
	return nil
}
