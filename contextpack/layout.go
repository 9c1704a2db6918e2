package contextpack

// Sizes of chunks, in bytes. They may be changed: contexts stay readable, but for
// the first upload after that nothing is found.
const (
	// groupSize is what the chunks of small files have on average, and groupMax at most.
	groupSize = 1 << 20
	groupMax  = 4 << 20
	// pieceSize is how much of a big file is in one chunk.
	pieceSize = 2 << 20

	block   = 512       // of a tar archive
	trailer = 2 * block // ends it
	end     = -1        // the part number of the trailer
)

// part is an entry of the archive as far as the layout depends on it.
type part struct {
	name         string
	header, size int64
}

// segment is a range of the bytes that a part takes: header, content, padding.
type segment struct {
	part     int
	from, to int64
}

// chunk is segments behind each other.
type chunk []segment

func (c chunk) size() (n int64) {
	for _, s := range c {
		n += s.to - s.from
	}
	return n
}

// layout cuts an archive. A big file has chunks for itself. Small ones share chunks,
// and whether one ends behind a file depends on this file's name and size only, so
// that what was added, removed or changed elsewhere moves no cut: a file of n bytes
// is the last of its chunk with the probability n/groupSize. (groupMax is the
// exception; what it moves is in order again behind the next such file.)
func layout(parts []part) []chunk {
	var chunks []chunk
	var group chunk
	cut := func() {
		if len(group) > 0 {
			chunks = append(chunks, group)
			group = nil
		}
	}
	for i, p := range parts {
		n := p.header + padded(p.size)
		if i <= 1 || p.size > pieceSize { // the times, part 0, are alone
			cut()
		}
		if p.size > pieceSize {
			chunks = append(chunks, pieces(i, p)...)
			continue
		}
		if group.size()+n > groupMax {
			cut()
		}
		group = append(group, segment{i, 0, n})
		if float64(hash(p.name))/(1<<64) < float64(n)/groupSize {
			cut()
		}
	}
	if len(chunks) == 0 {
		cut()
	}
	group = append(group, segment{end, 0, trailer})
	cut()
	return chunks
}

// pieces are the chunks of a big file, cut at multiples of pieceSize of its content.
func pieces(i int, p part) []chunk {
	var cs []chunk
	from := int64(0)
	for at := int64(pieceSize); at < p.size; at += pieceSize {
		cs = append(cs, chunk{{i, from, p.header + at}})
		from = p.header + at
	}
	return append(cs, chunk{{i, from, p.header + padded(p.size)}})
}

func padded(n int64) int64 { return (n + block - 1) / block * block }
