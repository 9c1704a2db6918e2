package history

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"
)

func emptyBlobs(t testing.TB) *blobs {
	t.Helper()
	s, end := reopened(t, t.TempDir())
	t.Cleanup(end)
	return s.blobs
}

// rewritten writes messages as logs and reads them again.
func rewritten(t testing.TB, b *blobs, messages []*controlapi.StatusResponse) (*logs, []*controlapi.StatusResponse) {
	t.Helper()
	l := &logs{hold: b.hold()}
	defer l.hold.release(context.Background())
	for _, m := range messages {
		if err := l.add(m); err != nil {
			t.Fatal(err)
		}
	}
	desc, err := l.finish()
	if err != nil {
		t.Fatal(err)
	}
	ra, err := b.ReaderAt(context.Background(), desc)
	if err != nil {
		t.Fatal(err)
	}
	defer ra.Close()
	var got []*controlapi.StatusResponse
	if err := replay(content.NewReader(ra), func(m *controlapi.StatusResponse) error { got = append(got, m); return nil }); err != nil {
		t.Fatal(err)
	}
	if desc.MediaType != typeLogs || desc.Size != ra.Size() {
		t.Errorf("the logs are %v, and have %d bytes", desc, ra.Size())
	}
	return l, got
}

func TestLogs_WhatIsWrittenIsReplayed(t *testing.T) {
	t.Parallel()
	b := emptyBlobs(t)
	rapid.Check(t, func(r *rapid.T) {
		var messages []*controlapi.StatusResponse
		for range rapid.IntRange(0, 5).Draw(r, "messages") {
			size := rapid.SampledFrom([]int{0, 1, 100, 400_000, 1_100_000}).Draw(r, "size")
			messages = append(messages, &controlapi.StatusResponse{
				Vertexes: []*controlapi.Vertex{{Digest: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(r, "vertex")}},
				Logs:     []*controlapi.VertexLog{{Vertex: "a", Msg: bytes.Repeat([]byte("x"), size)}},
			})
		}
		_, got := rewritten(t, b, messages)
		if len(got) != len(messages) {
			r.Fatalf("%d messages of %d", len(got), len(messages))
		}
		for i := range got {
			if !proto.Equal(got[i], messages[i]) {
				r.Fatalf("message %d is another", i)
			}
		}
	})
	if left, err := os.ReadDir(b.dir); err != nil || len(left)+len(b.fresh) > 0 {
		t.Errorf("left: %v, %v, %v", left, b.fresh, err)
	}
}

func TestLogs_StepsAreCountedOnce(t *testing.T) {
	t.Parallel()
	now := timestamppb.Now()
	l, _ := rewritten(t, emptyBlobs(t), []*controlapi.StatusResponse{
		{Vertexes: []*controlapi.Vertex{{Digest: "a"}, {Digest: "b"}}},
		{Vertexes: []*controlapi.Vertex{{Digest: "a", Started: now}, {Digest: "a", Started: now, Completed: now}}},
		{Vertexes: []*controlapi.Vertex{{Digest: "b", Cached: true, Completed: now}, {Digest: "a", Completed: now}}, Warnings: []*controlapi.VertexWarning{{}, {}}},
		{Vertexes: []*controlapi.Vertex{{Digest: "c"}, {Digest: "b", Cached: true}}, Warnings: []*controlapi.VertexWarning{{}}},
	})
	if s := l.steps; s.total != 3 || s.cached != 1 || s.completed != 2 || s.warnings != 3 {
		t.Errorf("counted %+v", s)
	}
}

func TestReplay_BrokenLogsAreAnError(t *testing.T) {
	t.Parallel()
	for name, raw := range map[string]string{
		"half a length": "\x01\x00", "half a message": "\x05\x00\x00\x00ab",
		"too long": "\xff\xff\xff\x7f", "no message": "\x03\x00\x00\x00\xff\xff\xff",
	} {
		if err := replay(strings.NewReader(raw), func(*controlapi.StatusResponse) error { return nil }); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzReplay(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00"))
	f.Add([]byte("\x05\x00\x00\x00ab"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var again bytes.Buffer
		l := &logs{}
		err := replay(bytes.NewReader(raw), func(m *controlapi.StatusResponse) error { return l.add(m) })
		if err != nil {
			return
		}
		first := bytes.Clone(l.buffer.Bytes())
		l = &logs{}
		if err := replay(bytes.NewReader(first), func(m *controlapi.StatusResponse) error { return l.add(m) }); err != nil {
			t.Fatal(err)
		}
		if again.Write(l.buffer.Bytes()); !bytes.Equal(first, again.Bytes()) && len(first) < maxFresh {
			t.Error("what was replayed does not replay to the same")
		}
	})
}
