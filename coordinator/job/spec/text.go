package spec

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// checkText finds, anywhere in a message, what no database, environment or header
// can hold, and fields that this version does not know: what they ask for must not
// be left out silently.
func checkText(f *faults, field string, m protoreflect.Message) {
	if len(m.GetUnknown()) > 0 {
		f.add(field, "it has fields that this coordinator does not know: it is older than the client")
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := strings.TrimPrefix(field+"."+string(fd.Name()), ".")
		switch {
		case fd.IsMap():
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				checkString(f, name, k.String())
				checkValue(f, key(name, k.String()), fd.MapValue(), v)
				return true
			})
		case fd.IsList():
			for i := range v.List().Len() {
				checkValue(f, at(name, i), fd, v.List().Get(i))
			}
		default:
			checkValue(f, name, fd, v)
		}
		return true
	})
}

func checkValue(f *faults, field string, fd protoreflect.FieldDescriptor, v protoreflect.Value) {
	switch fd.Kind() {
	case protoreflect.StringKind:
		checkString(f, field, v.String())
	case protoreflect.MessageKind:
		checkText(f, field, v.Message())
	}
}

func checkString(f *faults, field, s string) {
	switch {
	case !utf8.ValidString(s):
		f.add(field, "it is no text: it is not in UTF-8")
	case strings.Contains(s, "\x00"):
		f.add(field, "it contains a NUL character")
	}
}

// plain is a status without what gRPC puts before it.
func plain(err error) error {
	text := status.Convert(err).Message()
	for _, doing := range []string{"reading the platforms of the build: ", "reading the build-arg archfarm.pool: "} {
		text = strings.TrimPrefix(text, doing)
	}
	return fmt.Errorf("%s", text)
}
