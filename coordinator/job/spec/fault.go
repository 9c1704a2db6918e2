package spec

import (
	"cmp"
	"fmt"
	"strings"
	"unicode"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxFaults and maxFaultBytes bound what an error tells, so that it fits into the
	// trailers that gRPC's implementations take (8 KiB), once as details and once in
	// the message.
	maxFaults     = 40
	maxFaultBytes = 3 << 10
	maxMessage    = 1 << 10
	maxFault      = 400
	// maxQuoted bounds how much of what somebody wrote is quoted.
	maxQuoted = 64
)

// faults is what is wrong with a request, field by field.
type faults struct {
	list  []*errdetails.BadRequest_FieldViolation
	bytes int
	more  int // that had no room
}

func (f *faults) add(field, format string, args ...any) {
	field, text := shorten(field, 2*maxQuoted), shorten(fmt.Sprintf(format, args...), maxFault)
	if len(f.list) >= maxFaults || f.bytes+len(field)+len(text) > maxFaultBytes {
		f.more++
		return
	}
	f.bytes += len(field) + len(text)
	f.list = append(f.list, &errdetails.BadRequest_FieldViolation{Field: field, Description: text})
}

// err adds a fault where there is one.
func (f *faults) err(field string, err error) {
	if err != nil {
		f.add(field, "%v", err)
	}
}

// status is the faults as an error; nil when there are none.
func (f *faults) status(doing string) error {
	if len(f.list) == 0 {
		return nil
	}
	if f.more > 0 {
		f.list = append(f.list, &errdetails.BadRequest_FieldViolation{Description: fmt.Sprintf("and %d faults more", f.more)})
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s: ", doing)
	for i, fault := range f.list {
		line := strings.TrimPrefix(fault.GetField()+": "+fault.GetDescription(), ": ")
		if text.Len()+len(line) > maxMessage && i > 0 {
			fmt.Fprintf(&text, "; and %d more", len(f.list)-i+max(0, f.more-1))
			break
		}
		if i > 0 {
			text.WriteString("; ")
		}
		text.WriteString(line)
	}
	st, err := status.New(codes.InvalidArgument, text.String()).WithDetails(&errdetails.BadRequest{FieldViolations: f.list})
	return cmp.Or(err, st.Err())
}

// shorten cuts a text that comes from outside to so many bytes, whole characters
// without those that move a terminal's cursor.
func shorten(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, s)
}

// quote is a text from outside, shortened and in quotation marks.
func quote(s string) string { return fmt.Sprintf("%q", shorten(s, maxQuoted)) }

// at is the path of a list's element, and key that of a map's.
func at(field string, i int) string     { return fmt.Sprintf("%s[%d]", field, i) }
func key(field, name string) string     { return fmt.Sprintf("%s[%s]", field, quote(name)) }
func under(field, member string) string { return field + "." + member }
