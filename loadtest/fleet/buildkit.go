package main

import (
	"context"
	"net"
	"path/filepath"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"google.golang.org/grpc"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/e2e/farmtest"
)

// buildkit answers what agents ask of a BuildKit that builds nothing.
type buildkit struct {
	controlapi.UnimplementedControlServer
}

func (buildkit) Info(context.Context, *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{BuildkitVersion: &apitypes.BuildkitVersion{Package: "github.com/moby/buildkit", Version: "v0.34.2"}}, nil
}

func (buildkit) ListWorkers(context.Context, *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{ID: "stub"}}}, nil
}

func (buildkit) DiskUsage(context.Context, *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	return &controlapi.DiskUsageResponse{}, nil
}

// startBuildkit serves one for all agents until t ends.
func startBuildkit(t farmtest.T) address.Address {
	t.Helper()
	path := filepath.Join(farmtest.Folder(t), "buildkitd.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatalf("serving a BuildKit to the agents: %v", err)
	}
	server := grpc.NewServer()
	controlapi.RegisterControlServer(server, buildkit{})
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }() // ends with Stop
	t.Cleanup(func() {
		server.Stop()
		if err := <-ended; err != nil {
			t.Errorf("serving a BuildKit to the agents: %v", err)
		}
	})
	return address.Address{Network: "unix", Addr: path}
}
