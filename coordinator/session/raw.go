package session

import (
	_ "github.com/moby/buildkit/util/grpcutil/encoding/proto" // registers buildkitd's codec
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// frame is one gRPC message of which only the bytes matter here.
type frame struct{ data mem.BufferSlice }

// rawCodec hands frames through undecoded, so that a relayed file costs no copy
// and a message type that this version does not know passes all the same. Other
// messages, those of intercepted calls, are decoded as buildkitd does.
type rawCodec struct{}

// Marshal gives the frame's buffers to the transport, which frees them.
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return encoding.GetCodecV2(grpcproto.Name).Marshal(v)
	}
	data := f.data
	f.data = nil
	return data, nil
}

// Unmarshal keeps the buffers beyond the call, hence the reference.
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return encoding.GetCodecV2(grpcproto.Name).Unmarshal(data, v)
	}
	data.Ref()
	f.data = data
	return nil
}

// Name is that of the codec whose messages are relayed: it becomes the
// content-subtype on the wire.
func (rawCodec) Name() string { return grpcproto.Name }
