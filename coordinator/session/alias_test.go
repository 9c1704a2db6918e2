package session_test

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const extra = "/archfarm.test.Extra/Method"

func TestAlias_PassesEverythingButWhatIsIntercepted(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t, &probe{unary: func(context.Context) ([]byte, error) { return []byte("the client"), nil }, echo: echo})
	var aliases []string
	for _, name := range []string{"first", "second"} {
		id, forget := f.relays.Alias(s.ID(), []string{extra, "/archfarm.test.probe/unary"}, func(method string, md metadata.MD) func(grpc.ServerStream) error {
			if method != "/archfarm.test.Probe/Echo" || len(md.Get("intercept")) == 0 {
				return nil
			}
			return func(stream grpc.ServerStream) error {
				var m wrapperspb.BytesValue
				if err := stream.RecvMsg(&m); err != nil {
					return err
				}
				return stream.SendMsg(wrapperspb.Bytes(append([]byte(name+" answers "), m.GetValue()...)))
			}
		})
		defer forget()
		f.expose(t, w, id)
		aliases = append(aliases, id)
	}
	f.expose(t, w, s.ID())
	for i, id := range append(aliases, s.ID()) {
		caller := w.caller(t, id)
		if got, err := callUnary(t.Context(), caller); err != nil || string(got) != "the client" {
			t.Errorf("%d: the client answers %q, %v", i, got, err)
		}
		for ctx, want := range map[context.Context]string{
			t.Context(): "x",
			metadata.AppendToOutgoingContext(t.Context(), "intercept", "1"): []string{"first answers x", "second answers x", "x"}[i],
		} {
			stream := callEcho(ctx, t, caller)
			var m wrapperspb.BytesValue
			if err := stream.SendMsg(wrapperspb.Bytes([]byte("x"))); err != nil {
				t.Fatal(err)
			}
			if err := stream.RecvMsg(&m); err != nil || string(m.GetValue()) != want {
				t.Errorf("%d: got %q, %v, want %q", i, m.GetValue(), err, want)
			}
		}
		if caller.SharedKey() != "shared-key" || !caller.Supports("/archfarm.test.Probe/Unary") || caller.Supports(extra) != (i < 2) {
			t.Errorf("%d: the worker does not see the session as it was described", i)
		}
	}
}

func TestAlias_AnInterceptorsErrorIsTheWorkers(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t)
	id, forget := f.relays.Alias(s.ID(), nil, func(string, metadata.MD) func(grpc.ServerStream) error {
		return func(grpc.ServerStream) error { return status.Error(codes.DataLoss, "cut short") }
	})
	defer forget()
	f.expose(t, w, id)
	if _, err := callUnary(t.Context(), w.caller(t, id)); status.Code(err) != codes.DataLoss {
		t.Errorf("got %v", err)
	}
}

func TestAlias_EndsWithItsSessionAndItsForgetting(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, end := f.client(t)
	id, forget := f.relays.Alias(s.ID(), nil, func(string, metadata.MD) func(grpc.ServerStream) error { return nil })
	release := f.expose(t, w, id)
	end()
	await(t, "the worker forgets the alias", w.ended)
	release()
	forget()
	f.relays.Hasten(0)
	if _, err := f.relays.Expose(t.Context(), w, id); status.Code(err) != codes.NotFound {
		t.Errorf("after that: %v", err)
	}
}

func TestAlias_TakingOneAwayFromItsRelayLeavesItWorking(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t, &probe{unary: func(context.Context) ([]byte, error) { return []byte("the client"), nil }})
	id, forget := f.relays.Alias(s.ID(), nil, func(string, metadata.MD) func(grpc.ServerStream) error { return nil })
	release := f.expose(t, w, id)
	forget()
	if got, err := callUnary(t.Context(), w.caller(t, id)); err != nil || string(got) != "the client" {
		t.Errorf("got %q, %v", got, err)
	}
	release()
	if f.relays.Len() != 0 || w.knows(t, id) {
		t.Error("something is left")
	}
}
