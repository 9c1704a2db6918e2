package session

import (
	"crypto/sha256"
	"encoding/binary"
	"os"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/archfarm/archfarm/coordinator/session/spool"
)

// What FileSync's messages are (fsutil types/wire.proto, Packet).
type packetType uint64

const (
	packetStat packetType = iota
	packetReq
	packetData
)

// Numbers of the fields of Packet, and of those of Stat that are read.
const (
	fieldType, fieldStat, fieldID, fieldData = 1, 2, 3, 4

	statMode, statSize, statLinkname, statXattrs = 2, 5, 7, 10
)

// packet is where the parts of a FileSync message are. Nothing of it is copied.
type packet struct {
	kind packetType
	id   uint32
	// stat and data are byte ranges of the message; a stat that is absent, which ends
	// the list of files, is not there.
	stat, data span
}

type span struct{ from, to int }

func (s span) len() int { return s.to - s.from }

// parsePacket finds out what a message is. It tells false of what is not a
// packet; fields that it does not know are passed over.
func parsePacket(message mem.BufferSlice) (p packet, ok bool) {
	r := wireReader{rest: message, size: message.Len()}
	for r.pos < r.size {
		number, kind, ok := r.tag()
		if !ok {
			return packet{}, false
		}
		switch {
		case number == fieldType && kind == protowire.VarintType:
			var v uint64
			v, ok = r.varint()
			p.kind = packetType(v)
		case number == fieldID && kind == protowire.VarintType:
			var v uint64
			v, ok = r.varint()
			p.id = uint32(v) //nolint:gosec // as protobuf decodes a longer one
		case number == fieldStat && kind == protowire.BytesType:
			p.stat, ok = r.bytes()
		case number == fieldData && kind == protowire.BytesType:
			p.data, ok = r.bytes()
		default:
			ok = r.skip(kind)
		}
		if !ok {
			return packet{}, false
		}
	}
	return p, true
}

// wireReader reads protobuf over the pieces of a message, without what a field of
// bytes holds.
type wireReader struct {
	rest      mem.BufferSlice
	skipped   int // of rest's first piece
	pos, size int
}

func (r *wireReader) byte() (byte, bool) {
	for len(r.rest) > 0 {
		if piece := r.rest[0].ReadOnlyData(); r.skipped < len(piece) {
			b := piece[r.skipped]
			r.skipped++
			r.pos++
			return b, true
		}
		r.rest, r.skipped = r.rest[1:], 0
	}
	return 0, false
}

func (r *wireReader) varint() (v uint64, ok bool) {
	for shift := 0; shift < 64; shift += 7 {
		b, ok := r.byte()
		if !ok {
			return 0, false
		}
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v, true
		}
	}
	return 0, false
}

func (r *wireReader) tag() (protowire.Number, protowire.Type, bool) {
	v, ok := r.varint()
	if !ok {
		return 0, 0, false
	}
	number, kind := protowire.DecodeTag(v)
	return number, kind, number > 0
}

// bytes passes over a field of bytes, and tells where it is.
func (r *wireReader) bytes() (span, bool) {
	n, ok := r.varint()
	if !ok || n > uint64(r.size-r.pos) { //nolint:gosec // not negative
		return span{}, false
	}
	from := r.pos
	return span{from, from + int(n)}, r.advance(int(n)) //nolint:gosec // at most size
}

func (r *wireReader) advance(n int) bool {
	if n > r.size-r.pos {
		return false
	}
	r.pos += n
	for n > 0 {
		left := r.rest[0].Len() - r.skipped
		if n < left {
			r.skipped += n
			return true
		}
		n -= left
		r.rest, r.skipped = r.rest[1:], 0
	}
	return true
}

func (r *wireReader) skip(kind protowire.Type) bool {
	switch kind {
	case protowire.VarintType:
		_, ok := r.varint()
		return ok
	case protowire.Fixed32Type:
		return r.advance(4)
	case protowire.Fixed64Type:
		return r.advance(8)
	case protowire.BytesType:
		_, ok := r.bytes()
		return ok
	default: // groups, which proto3 has not
		return false
	}
}

// pieces calls f with what a range of a message consists of, until that fails.
func pieces(message mem.BufferSlice, s span, f func([]byte) error) error {
	pos := 0
	for _, piece := range message {
		b := piece.ReadOnlyData()
		from, to := max(s.from-pos, 0), min(s.to-pos, len(b))
		pos += len(b)
		if from < to {
			if err := f(b[from:to]); err != nil {
				return err
			}
		}
	}
	return nil
}

// offered is a file whose content a worker may ask for, and that can be shared.
type offered struct {
	key  spool.Key
	size int64 // 0: there is nothing to share
}

// offer reads a stat. Files are the same if all is the same that it says, but for
// extended attributes, which come in any order and say nothing of the content.
func offer(dir string, stat []byte) offered {
	var size, mode uint64
	var link bool
	identity := make([]byte, 0, len(dir)+len(stat)+binary.MaxVarintLen64)
	identity = append(binary.AppendUvarint(identity, uint64(len(dir))), dir...)
	for rest := stat; len(rest) > 0; {
		number, kind, n := protowire.ConsumeField(rest)
		if n < 0 {
			return offered{}
		}
		field := rest[:n]
		rest = rest[n:]
		if number == statXattrs {
			continue
		}
		identity = append(identity, field...)
		_, _, tag := protowire.ConsumeTag(field)
		switch {
		case number == statMode && kind == protowire.VarintType:
			mode, _ = protowire.ConsumeVarint(field[tag:])
		case number == statSize && kind == protowire.VarintType:
			size, _ = protowire.ConsumeVarint(field[tag:])
		case number == statLinkname:
			link = len(field) > tag+1
		}
	}
	if os.FileMode(mode)&os.ModeType != 0 || link || int64(size) <= 0 { //nolint:gosec // as protobuf decodes them
		return offered{}
	}
	sum := sha256.Sum256(identity)
	return offered{key: spool.Key(sum[:len(spool.Key{})]), size: int64(size)} //nolint:gosec // seen to be positive
}

// dataHeader is a DATA packet up to its content of n bytes; the end of a file for 0.
func dataHeader(id uint32, n int) []byte {
	out := make([]byte, 0, 3+2*binary.MaxVarintLen32)
	out = protowire.AppendVarint(protowire.AppendTag(out, fieldType, protowire.VarintType), uint64(packetData))
	if id != 0 {
		out = protowire.AppendVarint(protowire.AppendTag(out, fieldID, protowire.VarintType), uint64(id))
	}
	if n > 0 {
		out = protowire.AppendVarint(protowire.AppendTag(out, fieldData, protowire.BytesType), uint64(n)) //nolint:gosec // not negative
	}
	return out
}

// request is a REQ packet.
func request(id uint32) []byte {
	out := protowire.AppendVarint(protowire.AppendTag(nil, fieldType, protowire.VarintType), uint64(packetReq))
	if id != 0 {
		out = protowire.AppendVarint(protowire.AppendTag(out, fieldID, protowire.VarintType), uint64(id))
	}
	return out
}
