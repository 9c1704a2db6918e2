package history

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	controlapi "github.com/moby/buildkit/api/services/control"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
)

// maxFrame bounds a message of logs that are read: gRPC's limit.
const maxFrame = 16 << 20

// logs takes a build's progress as BuildKit keeps it: messages, each after its
// length in four bytes, the lowest first. It waits in memory while it is small.
type logs struct {
	hold *hold

	buffer bytes.Buffer
	file   *spool // once it is not small any more
	size   int64
	steps  steps
}

// add appends a message.
func (l *logs) add(m *controlapi.StatusResponse) error {
	l.steps.add(m)
	if l.size > maxLogs {
		m = &controlapi.StatusResponse{Vertexes: m.GetVertexes()} // who failed is still told
	}
	if l.size > maxLogs+maxLogs/4 {
		return nil
	}
	frame := binary.LittleEndian.AppendUint32(l.buffer.AvailableBuffer(), uint32(proto.Size(m)))
	frame, err := proto.MarshalOptions{}.MarshalAppend(frame, m)
	if err != nil {
		return err
	}
	l.size += int64(len(frame))
	l.buffer.Write(frame)
	if l.buffer.Len() < maxFresh {
		return nil
	}
	return l.spill()
}

// spill moves what is in memory to disk.
func (l *logs) spill() (err error) {
	if l.file == nil {
		if l.file, err = newSpool(l.hold.blobs.dir); err != nil {
			return fmt.Errorf("writing the logs: %w", err)
		}
	}
	if _, err := l.buffer.WriteTo(l.file); err != nil {
		return fmt.Errorf("writing the logs: %w", err)
	}
	return nil
}

// finish returns the whole, which is held.
func (l *logs) finish() (ocispecs.Descriptor, error) {
	if l.file == nil {
		return l.hold.add(typeLogs, l.buffer.Bytes())
	}
	if err := l.spill(); err != nil {
		return ocispecs.Descriptor{}, errors.Join(err, l.file.file.Close())
	}
	return l.hold.addSpool(typeLogs, l.file), nil
}

// steps counts the vertices of a build as its record tells them.
type steps struct {
	seen                               map[string]*vertex
	total, cached, completed, warnings int32
}

type vertex struct{ cached, completed bool }

func (s *steps) add(m *controlapi.StatusResponse) {
	if s.seen == nil {
		s.seen = map[string]*vertex{}
	}
	s.warnings += int32(len(m.GetWarnings()))
	for _, v := range m.GetVertexes() {
		known, ok := s.seen[v.GetDigest()]
		if !ok {
			known = &vertex{}
			s.seen[v.GetDigest()] = known
			s.total++
		}
		if v.GetCached() && !known.cached {
			known.cached = true
			s.cached++
		}
		if v.GetCompleted() != nil && !known.completed {
			known.completed = true
			s.completed++
		}
	}
}

// replay passes the messages of logs to send.
func replay(r io.Reader, send func(*controlapi.StatusResponse) error) error {
	in := bufio.NewReader(r)
	var header [4]byte
	var frame []byte
	for {
		if _, err := io.ReadFull(in, header[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("reading the logs of a build: %w", err)
		}
		size := binary.LittleEndian.Uint32(header[:])
		if size > maxFrame {
			return fmt.Errorf("reading the logs of a build: a message has %d bytes, at most %d are possible", size, maxFrame)
		}
		if int(size) > cap(frame) {
			frame = make([]byte, size)
		}
		frame = frame[:size]
		if _, err := io.ReadFull(in, frame); err != nil {
			return fmt.Errorf("reading the logs of a build: %w", err)
		}
		m := &controlapi.StatusResponse{}
		if err := proto.Unmarshal(frame, m); err != nil {
			return fmt.Errorf("reading the logs of a build: %w", err)
		}
		if err := send(m); err != nil {
			return err
		}
	}
}
