package endpoint_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client/buildid"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
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
		if err != nil || len(header.Get("buildkit-timestamp")) != 1 {
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

func TestControl_WhatIsNotOfferedIsUnimplemented(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		if _, err := f.control().UpdateBuildHistory(t.Context(), &controlapi.UpdateBuildHistoryRequest{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("got %v", err)
		}
		if _, err := f.control().DiskUsage(t.Context(), &controlapi.DiskUsageRequest{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("got %v", err)
		}
	})
}

func result(digest string) *controlapi.BuildResultInfo {
	return &controlapi.BuildResultInfo{Attestations: []*controlapi.Descriptor{{Digest: digest}}}
}

// listen returns the records that a client gets for a build.
func (f *farm) listen(ctx context.Context, t *testing.T, req *controlapi.BuildHistoryRequest) (out []*controlapi.BuildHistoryRecord) {
	t.Helper()
	stream, err := f.control().ListenBuildHistory(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, event.GetRecord())
	}
}

func legs(workers ...string) (out []dispatch.LegRecord) {
	for _, w := range workers {
		out = append(out, dispatch.LegRecord{Platform: "linux/" + w, Worker: w, Ref: "leg-" + w})
	}
	return out
}

func TestHistory_TheRecordsOfTheLegsBecomeOne(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "a", &controlapi.BuildHistoryRecord{Ref: "another", NumTotalSteps: 100}, &controlapi.BuildHistoryRecord{Ref: "leg-a", NumTotalSteps: 3, NumCachedSteps: 1})
		f.worker(t, "b", &controlapi.BuildHistoryRecord{Ref: "leg-b", NumTotalSteps: 4, Result: result("sha256:b")})
		f.worker(t, "c", &controlapi.BuildHistoryRecord{Ref: "leg-c", NumTotalSteps: 5, Results: map[string]*controlapi.BuildResultInfo{"linux/c/v2": result("sha256:c")}, Logs: &controlapi.Descriptor{Digest: "sha256:log"}})
		f.worker(t, "d") // has forgotten its own
		f.history.Add("build", legs("a", "b", "c", "d", "gone"))
		got := f.listen(t.Context(), t, &controlapi.BuildHistoryRequest{Ref: "build", EarlyExit: true})
		if len(got) != 1 {
			t.Fatalf("%d records", len(got))
		}
		r := got[0]
		if r.GetRef() != "build" || r.GetNumTotalSteps() != 12 || r.GetNumCachedSteps() != 1 || r.GetResult() != nil || len(r.GetResults()) != 2 {
			t.Errorf("got %v", r)
		}
		for digest, worker := range map[string]string{"sha256:b": "b", "sha256:c": "c", "sha256:log": "c"} {
			if got := f.read(t, digest); got != worker {
				t.Errorf("blob %s: %q", digest, got)
			}
		}
		for _, digest := range []string{"sha256:unknown", ""} {
			if _, err := contentapi.NewContentClient(f.cc).Info(t.Context(), &contentapi.InfoRequest{Digest: digest}); status.Code(err) != codes.NotFound {
				t.Errorf("blob %q: %v", digest, err)
			}
		}
	})
}

func (f *farm) read(t *testing.T, digest string) (got string) {
	t.Helper()
	content := contentapi.NewContentClient(f.cc)
	info, err := content.Info(t.Context(), &contentapi.InfoRequest{Digest: digest})
	if err != nil || info.GetInfo().GetDigest() != digest {
		t.Errorf("info of %s: %v, %v", digest, info, err)
	}
	stream, err := content.Read(t.Context(), &contentapi.ReadContentRequest{Digest: digest})
	for err == nil {
		var chunk *contentapi.ReadContentResponse
		chunk, err = stream.Recv()
		got += string(chunk.GetData())
	}
	if !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	return got
}

func TestHistory_OneLegsRecordIsTheBuilds(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "a", &controlapi.BuildHistoryRecord{Ref: "leg-a", Result: result("sha256:a")})
		f.history.Add("build", legs("a"))
		got := f.listen(t.Context(), t, &controlapi.BuildHistoryRequest{Ref: "build", EarlyExit: true})
		if len(got) != 1 || got[0].GetRef() != "build" || got[0].GetResult() == nil {
			t.Errorf("got %v", got)
		}
	})
}

func TestHistory_AWorkerThatDoesNotAnswerDelaysTheRecordButLittle(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "a", &controlapi.BuildHistoryRecord{Ref: "leg-a", NumTotalSteps: 3}).frozen = true
		f.worker(t, "b", &controlapi.BuildHistoryRecord{Ref: "leg-b", NumTotalSteps: 4})
		f.history.Add("build", legs("a", "b"))
		begun := time.Now()
		got := f.listen(t.Context(), t, &controlapi.BuildHistoryRequest{Ref: "build", EarlyExit: true})
		if len(got) != 1 || got[0].GetNumTotalSteps() != 4 {
			t.Errorf("got %v", got)
		}
		if took := time.Since(begun); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestHistory_WhatIsNotRememberedIsAnEmptyStream(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "a", &controlapi.BuildHistoryRecord{Ref: "leg-a"})
		f.history.Add("build", legs("a"))
		for _, req := range []*controlapi.BuildHistoryRequest{
			{Ref: "buildx-test-history-api-feature", ActiveOnly: true, EarlyExit: true},
			{Ref: "build", ActiveOnly: true, EarlyExit: true},
			{Ref: "unknown", EarlyExit: true},
			{EarlyExit: true},
		} {
			if got := f.listen(t.Context(), t, req); len(got) != 0 {
				t.Errorf("%v: got %v", req, got)
			}
		}
		for i := range 1000 { // pushes the build out
			f.history.Add(fmt.Sprint("later-", i), legs("a"))
		}
		if got := f.listen(t.Context(), t, &controlapi.BuildHistoryRequest{Ref: "build", EarlyExit: true}); len(got) != 0 {
			t.Errorf("after a thousand others: %v", got)
		}
	})
}

func TestHistory_ListeningGoesOnUntilTheClientLeaves(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		stream, err := f.control().ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{Ref: "unknown"})
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		if _, err := stream.Recv(); status.Code(err) != codes.DeadlineExceeded || time.Since(begun) != time.Hour {
			t.Errorf("got %v after %v", err, time.Since(begun))
		}
	})
}
