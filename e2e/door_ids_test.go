package e2e_test

import (
	"context"
	"strings"
	"testing"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client/buildid"
	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// rawBuild is a build by the bare API, which lets a client name what it likes.
type rawBuild struct {
	ctx       context.Context // names the build
	bridge    gateway.LLBBridgeClient
	ref       string // of a file system that it has solved
	container string
	result    <-chan error // of the build, once
}

// beginRaw starts a build, solves something in it, and makes a container of that.
func (r rig) beginRaw(t *testing.T) rawBuild {
	t.Helper()
	cc, err := grpc.NewClient(strings.TrimPrefix(r.Addr, "tcp://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	build, result, ended := identity.NewID(), make(chan error, 1), make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background()) // until the clean-up
	go func() {
		defer close(ended)
		_, err := control.NewControlClient(cc).Solve(ctx, &control.SolveRequest{Ref: build})
		result <- err
	}()
	t.Cleanup(func() { cancel(); <-ended; cc.Close() })

	b := rawBuild{result: result, ctx: buildid.AppendToOutgoingContext(ctx, build), bridge: gateway.NewLLBBridgeClient(cc), container: identity.NewID()}
	def := marshal(t, llb.Scratch().File(llb.Mkfile("/secret", 0o600, []byte(build))), llb.LinuxAmd64)
	solved, err := b.bridge.Solve(b.ctx, &gateway.SolveRequest{Definition: def.ToPB(), AllowResultReturn: true, AllowResultArrayRef: true})
	if err != nil {
		t.Fatal(err)
	}
	b.ref = solved.GetResult().GetRef().GetId()
	if err := b.calls(b.ref, "")["ReadFile"](); err != nil {
		t.Fatalf("reading from its own: %v", err)
	}
	if _, err := b.bridge.NewContainer(b.ctx, b.newContainer(b.container, b.ref)); err != nil {
		t.Fatalf("making a container of its own: %v", err)
	}
	return b
}

func (b rawBuild) newContainer(id, ref string) *gateway.NewContainerRequest {
	return &gateway.NewContainerRequest{
		ContainerID: id, Platform: &pb.Platform{OS: "linux", Architecture: "amd64"}, Mounts: []*pb.Mount{{Dest: "/", ResultID: ref}},
	}
}

// calls are the build's calls about a reference or a container of that id.
func (b rawBuild) calls(ref, container string) map[string]func() error {
	file := &gateway.ReadFileRequest{Ref: ref, FilePath: "/secret"}
	inside := &gateway.ReadFileRequest{Ref: container, FilePath: "/secret"}
	return map[string]func() error{
		"ReadFile": func() error { _, err := b.bridge.ReadFile(b.ctx, file); return err },
		"ReadDir": func() error {
			_, err := b.bridge.ReadDir(b.ctx, &gateway.ReadDirRequest{Ref: ref, DirPath: "/"})
			return err
		},
		"StatFile": func() error {
			_, err := b.bridge.StatFile(b.ctx, &gateway.StatFileRequest{Ref: ref, Path: "/"})
			return err
		},
		"Evaluate": func() error { _, err := b.bridge.Evaluate(b.ctx, &gateway.EvaluateRequest{Ref: ref}); return err },
		"NewContainer": func() error {
			_, err := b.bridge.NewContainer(b.ctx, b.newContainer(identity.NewID(), ref))
			return err
		},
		"Return": func() error {
			_, err := b.bridge.Return(b.ctx, &gateway.ReturnRequest{Result: &gateway.Result{Result: &gateway.Result_Ref{Ref: &gateway.Ref{Id: ref}}}})
			if err != nil {
				return err
			}
			return <-b.result
		},
		"ReadFileContainer": func() error { _, err := b.bridge.ReadFileContainer(b.ctx, inside); return err },
		"ReleaseContainer": func() error {
			_, err := b.bridge.ReleaseContainer(b.ctx, &gateway.ReleaseContainerRequest{ContainerID: container})
			return err
		},
		"ExecProcess": func() error {
			stream, err := b.bridge.ExecProcess(b.ctx)
			if err != nil {
				return err
			}
			_ = stream.Send(&gateway.ExecMessage{ProcessID: "p", Input: &gateway.ExecMessage_Init{Init: &gateway.InitMessage{ // Recv tells why not
				ContainerID: container, Meta: &pb.Meta{Args: []string{"/secret"}, Cwd: "/"}, Fds: []uint32{1, 2},
			}}})
			_ = stream.CloseSend() // a buildkitd says it only then
			_, err = stream.Recv()
			return err
		},
	}
}

// TestDoor_WhatIsAnotherBuildsDoesNotExist names another client's references and containers. It plays on a plain
// buildkitd, too.
func TestDoor_WhatIsAnotherBuildsDoesNotExist(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	victim := r.beginRaw(t)
	madeUp := identity.NewID()
	for name := range victim.calls("", "") {
		t.Run(name, func(t *testing.T) {
			foreign, unknown := r.beginRaw(t), r.beginRaw(t) // of their own, as some calls end a build
			got := foreign.calls(victim.ref, victim.container)[name]()
			want := unknown.calls(madeUp, madeUp)[name]()
			if got == nil || want == nil {
				t.Fatalf("another's: %v; what does not exist: %v", got, want)
			}
			wantEqual(t, "code", status.Code(got), status.Code(want))
			wantEqual(t, "message", blank(got, victim, foreign), blank(want, rawBuild{ref: madeUp, container: madeUp}, unknown))
			if code := status.Code(got); code != codes.NotFound && code != codes.Unknown { // Unknown is buildkitd's code for most
				t.Errorf("got %v, which is not about what does not exist", got)
			}
			if strings.Contains(got.Error(), "amd-1") {
				t.Errorf("it tells where the other is: %v", got)
			}
		})
	}
	if err := victim.calls(victim.ref, "")["ReadFile"](); err != nil {
		t.Errorf("the other build has been harmed: %v", err)
	}
	if err := victim.calls("", victim.container)["ReleaseContainer"](); err != nil {
		t.Errorf("the other build's container has been harmed: %v", err)
	}
}

// blank is an error's text without the ids in it.
func blank(err error, named, own rawBuild) string {
	return strings.NewReplacer(named.ref, "ID", named.container, "ID", own.ref, "OWN").Replace(status.Convert(err).Message())
}
