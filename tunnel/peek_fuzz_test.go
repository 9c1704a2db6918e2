package tunnel

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// said is a connection whose peer has said something and then ended its side.
type said struct {
	net.Conn
	*bytes.Reader
}

func (s said) Read(p []byte) (int, error)      { return s.Reader.Read(p) }
func (s said) SetReadDeadline(time.Time) error { return nil }

// FuzzPeek checks that a connection is a tunnel only if it says so, and that no byte of what it carries is lost.
func FuzzPeek(f *testing.F) {
	for _, seed := range []string{
		"", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", preamble, preamble + "id\nbytes", preamble + "\n", preamble + "a b\n",
		preamble + strings.Repeat("x", maxID) + "\n", preamble + strings.Repeat("x", maxID+1) + "\n", preamble[:5] + "x", "ARCHFARM-TUNNEL/2 id\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		conn := said{Reader: bytes.NewReader(data)}
		id, head, err := (&Listener{within: time.Minute}).peek(conn)
		rest, _ := io.ReadAll(&replayed{Conn: conn, head: head})
		switch {
		case err != nil:
			if id != "" || head != nil {
				t.Errorf("%v, and yet an id %q or a beginning %q", err, id, head)
			}
		case id == "":
			if !bytes.Equal(rest, data) {
				t.Errorf("%q became %q", data, rest)
			}
			if bytes.HasPrefix(data, []byte(preamble)) {
				t.Errorf("%q is no tunnel", data)
			}
		default:
			if want := preamble + id + "\n" + string(rest); !ValidID(id) || want != string(data) {
				t.Errorf("%q became tunnel %q with %q", data, id, rest)
			}
		}
	})
}
