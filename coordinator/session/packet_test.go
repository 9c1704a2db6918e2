package session

import (
	"bytes"
	"os"
	"testing"

	"github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/mem"
	"pgregory.net/rapid"
)

// cut makes a message of pieces that end where they like.
func cut(message []byte, at ...int) mem.BufferSlice {
	var out mem.BufferSlice
	for _, n := range at {
		n = min(n, len(message))
		out, message = append(out, mem.SliceBuffer(message[:n])), message[n:]
	}
	return append(out, mem.SliceBuffer(message))
}

func joined(message mem.BufferSlice, s span) []byte {
	var out []byte
	_ = pieces(message, s, func(b []byte) error { out = append(out, b...); return nil })
	return out
}

func TestParsePacket_PropertyFindsWhatFsutilWrites(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p := &types.Packet{
			Type: types.Packet_PacketType(rapid.Int32Range(0, 4).Draw(t, "type")),
			ID:   rapid.Uint32().Draw(t, "id"), Data: rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "data"),
		}
		if rapid.Bool().Draw(t, "with stat") {
			p.Stat = &types.Stat{Path: rapid.String().Draw(t, "path"), Mode: rapid.Uint32().Draw(t, "mode"), Size: rapid.Int64().Draw(t, "size"), Xattrs: map[string][]byte{"user.x": []byte("1")}}
		}
		raw, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		message := cut(raw, rapid.SliceOfN(rapid.IntRange(0, 50), 0, 5).Draw(t, "pieces")...)
		got, ok := parsePacket(message)
		if !ok || types.Packet_PacketType(got.kind) != p.Type || got.id != p.ID || !bytes.Equal(joined(message, got.data), p.Data) || (got.stat.from > 0) != (p.Stat != nil) {
			t.Fatalf("%+v became %+v, %v", p, got, ok)
		}
		if p.Stat != nil {
			stat, _ := p.Stat.MarshalVT()
			if !bytes.Equal(joined(message, got.stat), stat) {
				t.Fatal("another stat")
			}
		}
	})
}

func FuzzParsePacket(f *testing.F) {
	for _, p := range []*types.Packet{{}, {Type: types.PACKET_DATA, ID: 7, Data: []byte("data")}, {Stat: &types.Stat{Path: "a", Size: 5}}, {Type: types.PACKET_REQ, ID: 1 << 31}} {
		raw, err := p.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, 3)
	}
	f.Fuzz(func(t *testing.T, raw []byte, at int) {
		message := cut(raw, max(0, at))
		got, ok := parsePacket(message)
		var want types.Packet
		if err := want.Unmarshal(raw); err == nil && ok {
			if got.id != want.ID || int32(got.kind) != int32(want.Type) && got.kind <= packetData || !bytes.Equal(joined(message, got.data), want.Data) {
				t.Errorf("%x: %+v, fsutil says %+v", raw, got, &want)
			}
		}
		offer("context", joined(message, got.stat))
	})
}

func TestOffer_TellsFilesApart(t *testing.T) {
	t.Parallel()
	stat := func(change func(*types.Stat)) []byte {
		s := &types.Stat{Path: "a/b", Mode: 0o644, Uid: 1, Gid: 2, Size: 5, ModTime: 99}
		change(s)
		raw, err := s.MarshalVT()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	first := offer("context", stat(func(*types.Stat) {}))
	if first.size != 5 {
		t.Fatalf("the size is %d", first.size)
	}
	for name, change := range map[string]func(*types.Stat){
		"path": func(s *types.Stat) { s.Path = "a/c" }, "mode": func(s *types.Stat) { s.Mode = 0o600 }, "uid": func(s *types.Stat) { s.Uid = 0 },
		"gid": func(s *types.Stat) { s.Gid = 0 }, "size": func(s *types.Stat) { s.Size = 6 }, "time": func(s *types.Stat) { s.ModTime++ },
	} {
		if offer("context", stat(change)).key == first.key {
			t.Errorf("another %s, and the same file", name)
		}
	}
	if offer("other", stat(func(*types.Stat) {})).key == first.key {
		t.Error("another folder, and the same file")
	}
	if offer("context", stat(func(s *types.Stat) { s.Xattrs = map[string][]byte{"user.a": []byte("1")} })).key != first.key {
		t.Error("attributes make another file")
	}
	for name, change := range map[string]func(*types.Stat){
		"an empty file": func(s *types.Stat) { s.Size = 0 }, "a hard link": func(s *types.Stat) { s.Linkname = "a/a" },
		"a folder": func(s *types.Stat) { s.Mode |= uint32(os.ModeDir) }, "a negative size": func(s *types.Stat) { s.Size = -1 },
	} {
		if got := offer("context", stat(change)); got.size != 0 {
			t.Errorf("%s is shared: %+v", name, got)
		}
	}
}

func TestDataHeader_IsWhatFsutilReads(t *testing.T) {
	t.Parallel()
	for _, id := range []uint32{0, 1, 1 << 31} {
		for _, data := range []string{"", "x", string(make([]byte, chunkSize))} {
			var p types.Packet
			if err := p.Unmarshal(append(dataHeader(id, len(data)), data...)); err != nil || p.Type != types.PACKET_DATA || p.ID != id || string(p.Data) != data {
				t.Errorf("%d, %d bytes: %+v, %v", id, len(data), p.Type, err)
			}
		}
		var p types.Packet
		if err := p.Unmarshal(request(id)); err != nil || p.Type != types.PACKET_REQ || p.ID != id {
			t.Errorf("%+v, %v", &p, err)
		}
	}
}
