package endpoint_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client/buildid"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestControl_AFarmWithoutWorkersShowsItselfAsOne(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		list := func() []string {
			resp, err := f.control().ListWorkers(t.Context(), &controlapi.ListWorkersRequest{})
			if err != nil {
				t.Fatal(err)
			}
			var ids []string
			for _, r := range resp.GetRecord() {
				if len(r.GetPlatforms()) == 0 {
					t.Errorf("%s has no platforms", r.GetID())
				}
				ids = append(ids, r.GetID())
			}
			return ids
		}
		if got := list(); len(got) != 1 || got[0] != "archfarm" {
			t.Errorf("without workers: %v", got)
		}
		f.worker(t, "b")
		f.worker(t, "a")
		if got := list(); len(got) != 2 || got[0] != "a" || got[1] != "b" {
			t.Errorf("with two: %v", got)
		}
		info, err := f.control().Info(t.Context(), &controlapi.InfoRequest{})
		if err != nil || info.GetBuildkitVersion().GetVersion() == "" {
			t.Errorf("info %v, %v", info, err)
		}
	})
}

func TestGateway_PingNeedsABuildButNoWorker(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		gateway := gwpb.NewLLBBridgeClient(f.cc)
		f.begin(t, "b")
		pong, err := gateway.Ping(buildid.AppendToOutgoingContext(t.Context(), "b"), &gwpb.PingRequest{})
		if err != nil || len(pong.GetWorkers()) != 1 || len(pong.GetFrontendAPICaps()) == 0 || len(pong.GetLLBCaps()) == 0 {
			t.Errorf("got %v, %v", pong, err)
		}
		if _, err := gateway.Ping(t.Context(), &gwpb.PingRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("without a build: %v", err)
		}
	})
}

func TestGateway_CallsAboutABuildThatNeverBeginsAreNotFound(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		gateway := gwpb.NewLLBBridgeClient(f.cc)
		ctx := buildid.AppendToOutgoingContext(t.Context(), "never")
		for name, call := range map[string]func() error{
			"Ping":     func() error { _, err := gateway.Ping(ctx, &gwpb.PingRequest{}); return err },
			"Solve":    func() error { _, err := gateway.Solve(ctx, &gwpb.SolveRequest{}); return err },
			"Return":   func() error { _, err := gateway.Return(ctx, &gwpb.ReturnRequest{}); return err },
			"ReadFile": func() error { _, err := gateway.ReadFile(ctx, &gwpb.ReadFileRequest{}); return err },
			"ExecProcess": func() error {
				stream, err := gateway.ExecProcess(ctx)
				if err == nil {
					_, err = stream.Recv()
				}
				return err
			},
			"Status": func() error {
				stream, err := f.control().Status(t.Context(), &controlapi.StatusRequest{Ref: "never"})
				if err == nil {
					_, err = stream.Recv()
				}
				return err
			},
		} {
			begun, want := time.Now(), 3*time.Second
			if name == "Status" {
				want = 6 * time.Second
			}
			if err := call(); status.Code(err) != codes.NotFound {
				t.Errorf("%s: %v", name, err)
			}
			if took := time.Since(begun); took != want {
				t.Errorf("%s took %v, want %v", name, took, want)
			}
		}
	})
}

func TestControl_StatusTellsTheClockAndEverything(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		stream, err := f.control().Status(t.Context(), &controlapi.StatusRequest{Ref: "b"}) // before the build
		if err != nil {
			t.Fatal(err)
		}
		header, err := stream.Header()
		if err != nil || len(header.Get("buildkit-current-timestamp")) != 1 {
			t.Errorf("header %v, %v", header, err)
		}
		b := f.begin(t, "b")
		b.Progress.Publish(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: "sha256:1", Name: "one"}}})
		b.Progress.Close()
		got, err := stream.Recv()
		if err != nil || got.GetVertexes()[0].GetName() != "one" {
			t.Errorf("got %v, %v", got, err)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
	})
}

func TestControl_AClientThatNeverReadsItsStatusHoldsUpNothing(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		b := f.begin(t, "b")
		if _, err := f.control().Status(t.Context(), &controlapi.StatusRequest{Ref: "b"}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for i := range 1000 {
			b.Progress.Publish(&controlapi.StatusResponse{Logs: []*controlapi.VertexLog{{Vertex: "sha256:1", Msg: []byte(strings.Repeat("x", 10<<10) + fmt.Sprint(i))}}})
		}
		b.Progress.Close()
		f.stop() // while Send waits for the client
	})
}
