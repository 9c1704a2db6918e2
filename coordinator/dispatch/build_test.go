package dispatch_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/dispatch"
)

const both = amd64 + "," + arm64

func TestFarm_RefusesWhatItsLegsCouldNotMergeBeforeAnythingStarts(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "a", 1, amd64)
		if _, err := f.Begin(t.Context(), request("b", both, "Registry/X")); status.Code(err) != codes.InvalidArgument {
			t.Errorf("an image of a name that is none: %v", err)
		}
		if _, err := f.Begin(t.Context(), request("b", "linux/amd64,!", "")); status.Code(err) != codes.InvalidArgument {
			t.Errorf("a malformed platform: %v", err)
		}
		f.begin(t.Context(), t, request("b", amd64, "Registry/X")) // its only leg refuses that
		f.idle(t, d)
	})
}

func TestBuild_LegsStartOnceAndTheirResultsBecomeOne(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 2, amd64), f.worker(t, "arm", 2, arm64)
		b, end := f.begin(t.Context(), t, request("client-ref", both, "registry/x:1"))
		var calls []func(*testing.T) error
		for range 5 { // concurrently, as bake's linked targets do
			calls = append(calls, beside(func() error {
				resp, err := b.Solve(t.Context(), frontend(both))
				if err == nil && len(resp.GetResult().GetRefs().GetRefs()) != 2 {
					err = fmt.Errorf("merged: %v", resp)
				}
				return err
			}))
		}
		for _, done := range calls {
			if err := done(t); err != nil {
				t.Error(err)
			}
		}
		seen := map[string]bool{"client-ref": true}
		for d, platform := range map[*daemon]string{amd: amd64, arm: arm64} {
			if n := len(d.attempts()); n != 1 {
				t.Fatalf("%s got %d attempts", d.name, n)
			}
			req := d.attempts()[0].req
			if seen[req.GetRef()] || req.GetFrontendAttrs()["platform"] != platform || req.GetExporters()[0].GetAttrs()["push-by-digest"] != "true" {
				t.Errorf("%s got %v", d.name, req)
			}
			seen[req.GetRef()] = true
			if got := d.solves[0].GetFrontendOpt()["platform"]; got != platform || len(d.solves) != 5 {
				t.Errorf("%s's frontend was called %d times, for %s", d.name, len(d.solves), got)
			}
			if d.Used() != 1 {
				t.Errorf("%d slots of %s are used", d.Used(), d.name)
			}
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestBuild_GatewayCallsGoToTheWorkerThatHasTheReference(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "amd", 1, amd64)
		f.worker(t, "arm", 1, arm64)
		b, _ := f.begin(t.Context(), t, request("b", both, ""))
		refs := must(b.Solve(t.Context(), frontend(both)))(t).GetResult().GetRefs().GetRefs()
		for platform, name := range map[string]string{amd64: "amd", arm64: "arm"} {
			id := refs[platform].GetId()
			got := must(b.ReadFile(t.Context(), &gwpb.ReadFileRequest{Ref: id, FilePath: "/etc/x"}))(t)
			if string(got.GetData()) != name+":"+id+":/etc/x" {
				t.Errorf("%s: read %q", platform, got.GetData())
			}
		}
		if _, err := b.ReadFile(t.Context(), &gwpb.ReadFileRequest{Ref: "another-build's"}); status.Code(err) != codes.NotFound {
			t.Errorf("a reference of another build: %v", err)
		}
	})
}

func TestBuild_WhatIsNotNativeIsRefusedByTheNameOfItsStep(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		d.Frontend = func(_ context.Context, req *gwpb.SolveRequest) (*gwpb.Result, error) {
			if !req.GetAllowResultArrayRef() {
				return nil, errors.New("an answer without definitions was asked for")
			}
			if req.GetEvaluate() {
				return nil, errors.New("evaluation was asked for before the check")
			}
			return d.reference(runs("amd64", req.GetFrontendOpt()["second"])), nil
		}
		b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
		for _, evaluate := range []bool{false, true} {
			for _, definitions := range []bool{true, false} {
				req := frontend(amd64)
				req.Evaluate, req.AllowResultArrayRef = evaluate, definitions
				req.FrontendOpt["second"] = "s390x"
				_, err := b.Solve(t.Context(), req)
				if none := (*build.NoWorkerError)(nil); !errors.As(err, &none) || none.Platform != "linux/s390x" || none.Step != "[linux/s390x 2/2] RUN make" || none.Fleet != "linux/amd64 (1)" {
					t.Errorf("evaluate %v, definitions %v: got %v", evaluate, definitions, err)
				}
				req.FrontendOpt["second"] = "amd64"
				resp := must(b.Solve(t.Context(), req))(t)
				id := resp.GetResult().GetRef().GetId() + resp.GetResult().GetRefDeprecated()
				if (resp.GetResult().GetRef() != nil) != definitions || (d.called("Evaluate "+id) == 1) != evaluate {
					t.Errorf("evaluate %v, definitions %v: got %v, evaluated %d times", evaluate, definitions, resp.GetResult(), d.called("Evaluate "+id))
				}
			}
		}
	})
}

func TestBuild_APlatformThatIsNativeNowhereIsBuiltAnywhereIfNothingExecutes(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		b, _ := f.begin(t.Context(), t, request("b", "linux/s390x", ""))
		must(b.Solve(t.Context(), frontend("linux/s390x")))(t)
		d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) {
			return d.reference(runs("s390x")), nil
		}
		if _, err := b.Solve(t.Context(), frontend("linux/s390x")); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("got %v", err)
		}
	})
}

func TestBuild_ReturnIsCheckedAndEndsTheFrontendOnce(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "amd", 1, amd64)
		f.worker(t, "arm", 1, arm64)
		b, _ := f.begin(t.Context(), t, request("b", both, "")) // of one platform, the worker checks
		result := must(b.Solve(t.Context(), frontend(both)))(t).GetResult()
		if err := b.Return(&gwpb.ReturnRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("nothing at all: %v", err)
		}
		foreign := &gwpb.Result{Result: &gwpb.Result_Ref{Ref: &gwpb.Ref{Id: "another-build's"}}}
		if err := b.Return(&gwpb.ReturnRequest{Result: foreign}); status.Code(err) != codes.NotFound {
			t.Errorf("a reference of another build: %v", err)
		}
		waiting := beside(func() error {
			got, err := b.Result(t.Context())
			if got != result {
				t.Errorf("got %v", got)
			}
			return err
		})
		if err := b.Return(&gwpb.ReturnRequest{Result: result}); err != nil {
			t.Error(err)
		}
		if err := b.Return(&gwpb.ReturnRequest{Error: status.New(codes.Internal, "too late").Proto()}); err != nil {
			t.Error(err)
		}
		if err := waiting(t); err != nil {
			t.Error(err)
		}
	})
}

func TestBuild_AnErrorOfTheFrontendKeepsItsDetails(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
		st, err := status.New(codes.InvalidArgument, "Dockerfile:2").WithDetails(durationpb.New(time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Return(&gwpb.ReturnRequest{Error: st.Proto()}); err != nil {
			t.Fatal(err)
		}
		_, err = b.Result(t.Context())
		if got, _ := status.FromError(err); got.Code() != codes.InvalidArgument || len(got.Details()) != 1 {
			t.Errorf("got %v", err)
		}
	})
}

// built brings a build of both platforms to the point where it exports.
func built(t *testing.T, b *dispatch.Build) *gwpb.Result {
	t.Helper()
	resp := must(b.Solve(t.Context(), frontend(both)))(t)
	if err := b.Return(&gwpb.ReturnRequest{Result: resp.GetResult()}); err != nil {
		t.Fatal(err)
	}
	return must(b.Result(t.Context()))(t)
}

func TestBuild_ExportCollectsTheLegsInTheOrderAsked(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		arm.Export = func(ctx context.Context) error { // ends last
			select {
			case <-amd.attempts()[0].ended:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		req := request("b", arm64+","+amd64, "registry.example/x:1,registry.example/y:2")
		b, end := f.begin(t.Context(), t, req)
		result := must(b.Solve(t.Context(), frontend(arm64+","+amd64)))(t).GetResult()
		out := must(b.Export(t.Context(), result))(t)
		if len(out.Images) != 1 {
			t.Fatalf("images %v", out.Images)
		}
		image := out.Images[0]
		if len(image.Legs) != 2 || !strings.Contains(string(image.Legs[0].Blob), `"arm"`) || !strings.Contains(string(image.Legs[1].Blob), `"amd"`) {
			t.Fatalf("legs %v", image.Legs)
		}
		if out.Response["by"] != "arm" || out.Response["only.amd"] != "yes" || out.Response[exptypes.ExporterImageDescriptorKey] != "" || image.Plain {
			t.Errorf("response %v, plain %v", out.Response, image.Plain)
		}
		p := must(image.Publication(out.Metadata, "sha256:index"))(t)
		if want := []string{"registry.example/x:1", "registry.example/y:2"}; !slices.Equal(p.Names, want) {
			t.Errorf("to be published: %v", p.Names)
		}
		for _, d := range []*daemon{amd, arm} {
			got := d.attempts()[0].result
			refs := got.GetRefs().GetRefs()
			if len(refs) != 1 {
				t.Errorf("%s was returned %v", d.name, refs)
			}
			for platform := range refs {
				if _, ok := got.GetMetadata()[exptypes.ExporterImageConfigKey+"/"+platform]; !ok || len(got.GetMetadata()) != 2 {
					t.Errorf("%s was returned the metadata %v", d.name, got.GetMetadata())
				}
			}
		}
		if legs := b.Legs(); len(legs) != 2 || legs[0].Worker != "arm" || legs[0].Platform != arm64 || legs[0].Ref != arm.attempts()[0].req.GetRef() {
			t.Errorf("records %v", legs)
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestBuild_ALegThatFailsStopsTheOthersAndFreesTheirSlots(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		failed, err := status.New(codes.Unknown, `process "false" did not complete: exit code 1`).WithDetails(durationpb.New(time.Second))
		if err != nil {
			t.Fatal(err)
		}
		begun := make(chan struct{})
		amd.Export = func(ctx context.Context) error {
			close(begun)
			<-ctx.Done()
			return ctx.Err()
		}
		arm.Export = func(context.Context) error { <-begun; return failed.Err() }
		b, end := f.begin(t.Context(), t, request("b", both, "registry/x:1"))
		_, err = b.Export(t.Context(), built(t, b))
		if got, _ := status.FromError(err); got.Message() != failed.Message() || len(got.Details()) != 1 {
			t.Errorf("got %v", err)
		}
		end(err)
		f.idle(t, amd, arm)
	})
}

func TestBuild_AClientThatGoesAwayFreesEverySlot(t *testing.T) {
	for name, at := range map[string]func(ctx context.Context, t *testing.T, b *dispatch.Build) error{
		"while its frontend runs": func(ctx context.Context, t *testing.T, b *dispatch.Build) error {
			_, err := b.Result(ctx)
			return err
		},
		"while its legs export": func(ctx context.Context, t *testing.T, b *dispatch.Build) error {
			_, err := b.Export(ctx, built(t, b))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
				for _, d := range []*daemon{amd, arm} {
					d.Export = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
				}
				ctx, cancel := context.WithCancel(t.Context())
				b, end := f.begin(ctx, t, request("b", both, ""))
				must(b.Solve(ctx, frontend(both)))(t)
				done := beside(func() error { return at(ctx, t, b) })
				synctest.Wait()
				cancel()
				err := done(t)
				if err == nil {
					t.Error("it ended well")
				}
				end(err)
				f.idle(t, amd, arm)
			})
		})
	}
}

func TestBuild_AnAttemptThatFailsByItselfEndsTheBuildWithItsError(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		fail := make(chan struct{})
		arm.Early = func(context.Context) error {
			<-fail
			return status.Error(codes.ResourceExhausted, "no space left on device")
		}
		b, end := f.begin(t.Context(), t, request("b", both, ""))
		must(b.Solve(t.Context(), frontend(both)))(t)
		result := beside(func() error { _, err := b.Result(t.Context()); return err })
		close(fail)
		err := result(t)
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
		if _, err := b.Solve(t.Context(), frontend(both)); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a later call: %v", err)
		}
		end(err)
		f.idle(t, amd, arm)
	})
}

func TestBuild_DirectRequestsNeedNoClient(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		req := request("b", both, "registry/x:1")
		req.Frontend = "dockerfile.v0"
		b, end := f.begin(t.Context(), t, req)
		out := must(b.Export(t.Context(), must(b.Result(t.Context()))(t)))(t)
		if len(out.Images) != 1 || len(out.Images[0].Legs) != 2 {
			t.Errorf("images %v", out.Images)
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestBuild_ALegThatTheClientDoesNotUseIsLetGo(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		b, end := f.begin(t.Context(), t, request("b", both, ""))
		refs := must(b.Solve(t.Context(), frontend(both)))(t).GetResult().GetRefs().GetRefs()
		part := &gwpb.Result{Result: &gwpb.Result_Ref{Ref: refs[arm64]}}
		must(b.Export(t.Context(), part))(t)
		if arm.called("Return") != 1 || amd.called("Return") != 0 {
			t.Errorf("returned to arm %d, to amd %d times", arm.called("Return"), amd.called("Return"))
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestBuild_TheRestOfALegsProgressIsToldAfterItHasFailed(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		d.Progress = []*controlapi.StatusResponse{{Vertexes: []*controlapi.Vertex{{Digest: "sha256:1", Name: "[1/1] RUN false"}}}}
		d.Early = func(context.Context) error { return status.Error(codes.Unknown, "exit code 1") }
		b, end := f.begin(t.Context(), t, request("b", amd64, ""))
		_, _ = b.Solve(t.Context(), frontend(amd64))
		_, err := b.Result(t.Context())
		end(err)
		var names []string
		if err := b.Progress.Follow(t.Context(), func(s *controlapi.StatusResponse) error {
			for _, v := range s.GetVertexes() {
				names = append(names, v.GetName()+" "+v.GetError())
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(names, func(n string) bool { return strings.Contains(n, "RUN false") }) {
			t.Errorf("the client saw %q", names)
		}
	})
}
