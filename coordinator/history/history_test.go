package history

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func TestHistory_ABuildIsKnownFromItsBeginning(t *testing.T) {
	bubble(t, func(t *testing.T) {
		dir := t.TempDir()
		h, end := open(t, Options{Dir: dir})
		all, active := listen(t, h, &controlapi.BuildHistoryRequest{}), listen(t, h, &controlapi.BuildHistoryRequest{Ref: "b", ActiveOnly: true})
		b := begin(t, h, &controlapi.SolveRequest{
			Ref: "b", Frontend: "gateway.v0", FrontendAttrs: map[string]string{"source": "dockerfile.v0", "target": "x"},
			Exporters: []*controlapi.Exporter{{Type: "image", Attrs: map[string]string{"name": "n"}}},
		})
		other := begin(t, h, &controlapi.SolveRequest{Ref: "other"})
		started := listed(t, h, &controlapi.BuildHistoryRequest{Ref: "b", ActiveOnly: true})
		if len(started) != 1 || started[0].GetType() != controlapi.BuildHistoryEventType_STARTED || started[0].GetRecord().GetCompletedAt() != nil {
			t.Errorf("while it runs: %v", started)
		}
		if known, err := h.Status(t.Context(), "b", nil); known || err != nil {
			t.Errorf("the progress of a running build is known: %v, %v", known, err)
		}
		begun := time.Now()
		pass(time.Minute)
		b.progress.Publish(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: "sha256:1", Completed: timestamppb.Now(), Cached: true}}})
		b.Built(t.Context(), nil, map[string][]byte{"key": []byte("value")})
		b.end(nil, nil)
		pass(patience)
		want := &controlapi.BuildHistoryRecord{
			Ref: "b", Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{"target": "x"},
			Exporters: []*controlapi.Exporter{{Type: "image", Attrs: map[string]string{"name": "n"}}},
			CreatedAt: timestamppb.New(begun), CompletedAt: timestamppb.New(begun.Add(time.Minute)),
			ExporterResponse: map[string]string{"key": "value"}, NumTotalSteps: 1, NumCompletedSteps: 1, NumCachedSteps: 1,
		}
		for _, when := range []string{"at once", "after a restart"} {
			got := proto.CloneOf(the(t, h, "b"))
			want.Logs = got.GetLogs()
			if !proto.Equal(got, want) || got.GetLogs().GetMediaType() != typeLogs {
				t.Errorf("%s: %v", when, got)
			}
			var names []string
			known, err := h.Status(t.Context(), "b", func(m *controlapi.StatusResponse) error {
				names = append(names, m.GetVertexes()[0].GetDigest())
				return nil
			})
			if !known || err != nil || !slices.Equal(names, []string{"sha256:1"}) {
				t.Errorf("%s: progress %v, %v, %v", when, known, names, err)
			}
			if when == "at once" {
				if got := all.heard(); !slices.Equal(got, []string{"STARTED b", "STARTED other", "COMPLETE b"}) {
					t.Errorf("heard %v", got)
				}
				if got := active.heard(); !slices.Equal(got, []string{"STARTED b", "COMPLETE b"}) {
					t.Errorf("heard of b: %v", got)
				}
				all.leave(t)
				active.leave(t)
				other.end(nil, nil)
				end()
				h, _ = open(t, Options{Dir: dir})
			}
		}
	})
}

func TestHistory_ARecordIsThereWhenItsClientHasTheAnswer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, _ := open(t, Options{})
		b := begin(t, h, &controlapi.SolveRequest{Ref: "b"})
		b.Complete(nil, nil) // its progress lags
		go func() {
			time.Sleep(time.Second)
			b.progress.Close()
		}()
		begun := time.Now()
		the(t, h, "b")
		if took := time.Since(begun); took != time.Second {
			t.Errorf("it took %v", took)
		}
		stuck := begin(t, h, &controlapi.SolveRequest{Ref: "stuck"})
		stuck.Complete(nil, nil) // and its progress never ends
		defer stuck.progress.Close()
		begun = time.Now()
		the(t, h, "stuck")
		if took := time.Since(begun); took != progressGrace {
			t.Errorf("the other took %v", took)
		}
	})
}

func TestHistory_TheNextBuildOfAReferenceReplacesTheRecord(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, _ := open(t, Options{})
		built(t, h, "b")
		first := the(t, h, "b").GetLogs()
		b := begin(t, h, &controlapi.SolveRequest{Ref: "b"})
		b.progress.Publish(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: "sha256:2"}}})
		b.end(nil, nil)
		pass(patience)
		if got := the(t, h, "b"); got.GetNumTotalSteps() != 1 || got.GetLogs().GetDigest() == first.GetDigest() {
			t.Errorf("the record is %v", got)
		}
		if _, err := h.Content().Info(t.Context(), digest.Digest(first.GetDigest())); !errdefs.IsNotFound(err) {
			t.Errorf("the first one's logs: %v", err)
		}
	})
}

func TestHistory_AFailedBuildHasItsError(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, _ := open(t, Options{})
		detail, err := anypb.New(&pb.SourceInfo{Filename: "Dockerfile"})
		if err != nil {
			t.Fatal(err)
		}
		b := begin(t, h, &controlapi.SolveRequest{Ref: "b"})
		b.end(nil, status.ErrorProto(&spb.Status{Code: int32(codes.Canceled), Message: "context canceled", Details: []*anypb.Any{detail}}))
		got := the(t, h, "b")
		if got.GetError().GetCode() != int32(codes.Canceled) || got.GetError().GetMessage() != "context canceled" || len(got.GetError().GetDetails()) > 0 {
			t.Errorf("the error is %v", got.GetError())
		}
		raw, err := readAll(t, h, got.GetExternalError().GetDigest())
		var whole spb.Status
		if err != nil || proto.Unmarshal(raw, &whole) != nil || !proto.Equal(whole.GetDetails()[0], detail) {
			t.Errorf("with its details it is %v, %v", &whole, err)
		}
		if err := grpcerrors.FromGRPC(status.ErrorProto(&whole)); status.Code(err) != codes.Canceled {
			t.Errorf("a client reads %v", err)
		}
		if got := listed(t, h, &controlapi.BuildHistoryRequest{Filter: []string{"status==canceled"}}); len(got) != 1 {
			t.Errorf("canceled builds: %v", got)
		}
	})
}

func TestHistory_SomeBuildsLeaveNoRecord(t *testing.T) {
	bubble(t, func(t *testing.T) {
		dir := t.TempDir()
		h, end := open(t, Options{Dir: dir})
		built(t, h, "kept")
		probe := begin(t, h, &controlapi.SolveRequest{Ref: "probe", Internal: true})
		probe.Built(t.Context(), []Leg{{Worker: "w"}}, nil)
		probe.Image(0, ocispecs.Descriptor{}, nil)
		probe.end(nil, nil)
		if got := listed(t, h, &controlapi.BuildHistoryRequest{Ref: "probe"}); len(got) > 0 {
			t.Errorf("of an internal build: %v", got)
		}
		end()
		h, _ = open(t, Options{Dir: dir, Disabled: true})
		built(t, h, "new")
		if got := listed(t, h, &controlapi.BuildHistoryRequest{}); len(got) != 1 || got[0].GetRecord().GetRef() != "kept" {
			t.Errorf("while it is disabled: %v", got)
		}
	})
}

func TestHistory_PinningIsAChangeThatListenersSee(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, _ := open(t, Options{})
		built(t, h, "b")
		heard := listen(t, h, &controlapi.BuildHistoryRequest{Ref: "b"})
		for i, pinned := range []bool{true, true, false} {
			if err := h.Update(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: "b", Pinned: pinned}); err != nil {
				t.Fatal(err)
			}
			if got := the(t, h, "b"); got.GetPinned() != pinned || got.GetGeneration() != int32(i+1) {
				t.Errorf("pinned %v, generation %d", got.GetPinned(), got.GetGeneration())
			}
		}
		if got := heard.heard(); !slices.Equal(got, []string{"COMPLETE b", "COMPLETE b", "COMPLETE b", "COMPLETE b"}) {
			t.Errorf("heard %v", got)
		}
		heard.leave(t)
	})
}

func TestHistory_UnknownReferences(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, _ := open(t, Options{})
		running := begin(t, h, &controlapi.SolveRequest{Ref: "running"})
		defer running.end(nil, nil)
		for _, ref := range []string{"unknown", "", "running"} {
			for _, req := range []*controlapi.UpdateBuildHistoryRequest{{Pinned: true}, {}, {Delete: true}} {
				req.Ref = ref
				if err := h.Update(t.Context(), req); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%v: %v", req, err)
				}
			}
			if err := h.Update(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: ref, Finalize: true}); err != nil {
				t.Errorf("finalizing %q: %v", ref, err)
			}
		}
		for _, req := range []*controlapi.BuildHistoryRequest{{Ref: "unknown"}, {Ref: "buildx-test-history-api-feature", ActiveOnly: true}} {
			if got := listed(t, h, req); len(got) > 0 {
				t.Errorf("%v: %v", req, got)
			}
		}
		if known, err := h.Status(t.Context(), "unknown", nil); known || err != nil {
			t.Errorf("its progress: %v, %v", known, err)
		}
		ignore := func(*controlapi.BuildHistoryEvent) error { return nil }
		if err := h.Listen(t.Context(), &controlapi.BuildHistoryRequest{Limit: -1, EarlyExit: true}, ignore); err == nil {
			t.Error("a negative limit is no error")
		}
	})
}

func TestHistory_DeletingRemovesEverything(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newDaemon(t)
		h, _ := open(t, Options{Workers: daemons{"w": w}})
		heard := listen(t, h, &controlapi.BuildHistoryRequest{})
		built(t, h, "b", Leg{Worker: "w", Ref: "leg"}, Leg{Worker: "gone", Ref: "leg-2"})
		logs := the(t, h, "b").GetLogs().GetDigest()
		if err := h.Update(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: "b", Delete: true}); err != nil {
			t.Fatal(err)
		}
		if got := heard.heard(); !slices.Equal(got, []string{"STARTED b", "COMPLETE b", "DELETED b"}) {
			t.Errorf("heard %v", got)
		}
		heard.leave(t)
		if _, err := h.Content().Info(t.Context(), digest.Digest(logs)); !errdefs.IsNotFound(err) {
			t.Errorf("its logs: %v", err)
		}
		if !slices.Equal(w.removed, []string{"leg"}) {
			t.Errorf("on the worker, %v was removed", w.removed)
		}
		if got := listed(t, h, &controlapi.BuildHistoryRequest{}); len(got) > 0 {
			t.Errorf("listed %v", got)
		}
	})
}

func TestHistory_WhatSomebodyListensToIsHiddenUntilHeLeaves(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, _ := open(t, Options{})
		built(t, h, "a")
		built(t, h, "b")
		all, b := listen(t, h, &controlapi.BuildHistoryRequest{ActiveOnly: true}), listen(t, h, &controlapi.BuildHistoryRequest{Ref: "b"})
		if err := h.Update(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: "b", Delete: true}); err != nil {
			t.Fatal(err)
		}
		if got := listed(t, h, &controlapi.BuildHistoryRequest{Limit: 10}); len(got) != 1 || got[0].GetRecord().GetRef() != "a" {
			t.Errorf("listed %v", got)
		}
		if err := h.Listen(t.Context(), &controlapi.BuildHistoryRequest{Ref: "b", EarlyExit: true}, nil); err == nil {
			t.Error("it can still be asked for")
		}
		if got := all.heard(); len(got) > 0 {
			t.Errorf("heard already: %v", got)
		}
		b.leave(t)
		if got := all.heard(); !slices.Equal(got, []string{"DELETED b"}) {
			t.Errorf("heard then: %v", got)
		}
		all.leave(t)
		if got := listed(t, h, &controlapi.BuildHistoryRequest{Ref: "b"}); len(got) > 0 {
			t.Errorf("listed at the end: %v", got)
		}
	})
}

func TestHistory_TheLimitsAreKept(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, _ := open(t, Options{Limits: Limits{MaxEntries: 2, MaxAge: time.Hour}})
		for i := range 5 {
			built(t, h, fmt.Sprint("b", i))
			pass(time.Second)
		}
		if err := h.Update(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: "b0", Pinned: true}); err != nil {
			t.Fatal(err)
		}
		pass(30 * time.Minute)
		if got := listed(t, h, &controlapi.BuildHistoryRequest{}); len(got) != 5 {
			t.Errorf("after half an hour there are %d", len(got))
		}
		pass(time.Hour)
		var left []string
		for _, e := range listed(t, h, &controlapi.BuildHistoryRequest{}) {
			left = append(left, e.GetRecord().GetRef())
		}
		if !slices.Equal(left, []string{"b0", "b3", "b4"}) {
			t.Errorf("after an hour and a half there are %v", left)
		}
	})
}

func TestHistory_FinishEndsListenersAndWaitsForBuilds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, end := open(t, Options{})
		heard := listen(t, h, &controlapi.BuildHistoryRequest{})
		b := begin(t, h, &controlapi.SolveRequest{Ref: "b"})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := h.Finish(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with a build running: %v", err)
		}
		if err := <-heard.result; err != nil {
			t.Errorf("the listener's end: %v", err)
		}
		if late := begin(t, h, &controlapi.SolveRequest{Ref: "late"}); late.Recorder != nil {
			t.Error("a build that begins now is recorded")
		}
		b.end(nil, nil)
		if err := h.Finish(t.Context()); err != nil {
			t.Errorf("without: %v", err)
		}
		if _, _, err := h.records.get(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		end()
	})
}

func TestListener_OneThatDoesNotReadIsCutOff(t *testing.T) {
	t.Parallel()
	l := &listener{wake: make(chan struct{}, 1)}
	for range maxPending + 1 {
		l.tell(&controlapi.BuildHistoryEvent{})
	}
	got := 0
	err := l.follow(t.Context(), func(*controlapi.BuildHistoryEvent) error { got++; return nil })
	if status.Code(err) != codes.ResourceExhausted || got != maxPending {
		t.Errorf("%v after %d events", err, got)
	}
}

func TestContent_NothingCanBeWritten(t *testing.T) {
	bubble(t, func(t *testing.T) {
		h, _ := open(t, Options{})
		built(t, h, "b")
		logs := digest.Digest(the(t, h, "b").GetLogs().GetDigest())
		store := h.Content()
		_, writing := store.Writer(t.Context(), content.WithRef("x"))
		_, updating := store.Update(t.Context(), content.Info{Digest: logs})
		for name, err := range map[string]error{"write": writing, "update": updating, "delete": store.Delete(t.Context(), logs), "abort": store.Abort(t.Context(), "x")} {
			if err == nil || !strings.Contains(err.Error(), "read-only content store") {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := store.Status(t.Context(), "x"); !errdefs.IsNotFound(err) {
			t.Errorf("status: %v", err)
		}
		synctest.Wait()
		var walked []digest.Digest
		if err := store.Walk(t.Context(), func(i content.Info) error { walked = append(walked, i.Digest); return nil }); err != nil || !slices.Equal(walked, []digest.Digest{logs}) {
			t.Errorf("there is %v, %v", walked, err)
		}
	})
}
