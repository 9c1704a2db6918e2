package spec

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// MaxFile bounds a file that describes a job, in bytes.
	MaxFile = 1 << 20
	// maxNodes bounds what its aliases unfold to.
	maxNodes = 100_000
	// maxYAMLFaults are told of one file.
	maxYAMLFaults = 20
)

// File is a job as its users write it.
type File struct {
	// Request has no values of secrets, and no context when that is Local.
	Request *archfarmv1.SubmitRequest
	// Local is the path of a folder or archive, relative to wherever the reader takes
	// paths from; empty: the context is in Request, or nowhere.
	Local string
	// Secrets that come with the job, in the order of the file.
	Secrets []SecretSource
}

// SecretSource is where the value of a secret is to be taken from: a file, or a
// variable of the environment, or the one that is called as the secret when both are
// empty.
type SecretSource struct{ ID, File, Env string }

// FromYAML reads a job from YAML (or JSON): the fields of JobSpec, in snake_case or
// lowerCamelCase, and request_id. Some may be written shorter:
//
//	context: https://github.com/org/app.git#main    # or ./folder, see ParseContext
//	tags: registry.example.com/app                  # one, without a list
//	timeout: 10m
//	cache_from: ["type=registry,ref=app:cache"]
//	secrets: [{id: npm, src: token.txt}, {id: key, env: KEY}, {id: a, name: stored}]
//
// Errors tell every fault, with its line. What the values mean, Validate checks.
func FromYAML(data []byte) (*File, error) {
	if len(data) > MaxFile {
		return nil, fmt.Errorf("reading the job: %d bytes long, at most %d are possible", len(data), MaxFile)
	}
	root, err := document(data)
	if err != nil {
		return nil, fmt.Errorf("reading the job: %w", err)
	}
	r := &yamlReader{file: &File{}}
	spec := &archfarmv1.JobSpec{}
	requestID := r.takeRequestID(root)
	tree := r.message(root, spec.ProtoReflect().Descriptor())
	if len(r.faults) > 0 {
		return nil, fmt.Errorf("reading the job: %s", strings.Join(r.faults, "; "))
	}
	text, err := json.Marshal(tree)
	if err != nil {
		return nil, fmt.Errorf("reading the job: %w", err)
	}
	if err := protojson.Unmarshal(text, spec); err != nil {
		return nil, fmt.Errorf("reading the job: %s", shorten(strings.TrimPrefix(err.Error(), "proto:"), maxFault))
	}
	if r.git != nil {
		if spec.Context == nil {
			spec.Context = &archfarmv1.BuildContext{}
		}
		spec.Context.From = &archfarmv1.BuildContext_Git{Git: r.git}
	}
	r.file.Request = &archfarmv1.SubmitRequest{RequestId: requestID, Spec: spec}
	return r.file, nil
}

// document is the only document's root, a mapping.
func document(data []byte) (*yaml.Node, error) {
	decoder := yaml.NewDecoder(strings.NewReader(string(data)))
	var doc, more yaml.Node
	switch err := decoder.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, errors.New("it is empty")
	case err != nil:
		return nil, errors.New(shorten(err.Error(), maxFault))
	}
	if err := decoder.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, errors.New("it has several documents (---), and a job is one")
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, errors.New("it is no mapping (want context: …, platforms: …, tags: …)")
	}
	return doc.Content[0], nil
}

// yamlReader turns YAML into what protojson reads, guided by the message's fields: so
// each fault has a line, and aliases unfold no deeper than messages do.
type yamlReader struct {
	faults []string
	nodes  int
	file   *File
	git    *archfarmv1.GitContext
}

func (r *yamlReader) fault(n *yaml.Node, format string, args ...any) {
	if len(r.faults) < maxYAMLFaults {
		r.faults = append(r.faults, fmt.Sprintf("line %d: %s", n.Line, shorten(fmt.Sprintf(format, args...), maxFault)))
	}
}

// follow is what an alias stands for.
func (r *yamlReader) follow(n *yaml.Node) *yaml.Node {
	if r.nodes++; r.nodes == maxNodes {
		r.fault(n, "its aliases unfold to too much")
	}
	for range 10 {
		if n.Kind != yaml.AliasNode || n.Alias == nil {
			break
		}
		n = n.Alias
	}
	return n
}

// entries calls each with the keys and values of a mapping; a key that is there
// twice is a fault.
func (r *yamlReader) entries(n *yaml.Node, each func(key, value *yaml.Node)) {
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content) && r.nodes < maxNodes; i += 2 {
		key := r.follow(n.Content[i])
		if key.Kind != yaml.ScalarNode {
			r.fault(key, "a key is no text")
			continue
		}
		if line, twice := seen[key.Value]; twice {
			r.fault(key, "%s is there already, in line %d", quote(key.Value), line)
			continue
		}
		seen[key.Value] = key.Line
		each(key, r.follow(n.Content[i+1]))
	}
}

// takeRequestID takes the one field that is the request's out of the mapping.
func (r *yamlReader) takeRequestID(root *yaml.Node) string {
	for i := 0; i+1 < len(root.Content); i += 2 {
		if name := root.Content[i].Value; name == "request_id" || name == "requestId" {
			value := r.follow(root.Content[i+1])
			if value.Kind != yaml.ScalarNode {
				r.fault(value, "request_id: want a text")
			}
			root.Content = slices.Delete(root.Content, i, i+2)
			return value.Value
		}
	}
	return ""
}

func (r *yamlReader) message(n *yaml.Node, md protoreflect.MessageDescriptor) any {
	if n.Kind != yaml.MappingNode {
		r.fault(n, "want a mapping of %s", names(md))
		return nil
	}
	out := map[string]any{}
	from := map[string]string{} // field to how it is written
	r.entries(n, func(key, value *yaml.Node) {
		fd := field(md, key.Value)
		if fd == nil {
			r.fault(key, "there is no %s; there are %s", quote(key.Value), names(md))
			return
		}
		if as, twice := from[fd.JSONName()]; twice {
			r.fault(key, "%s is there already, as %s", key.Value, as)
			return
		}
		from[fd.JSONName()] = key.Value
		if value.Tag == "!!null" {
			return
		}
		out[fd.JSONName()] = r.field(value, fd)
	})
	for name, value := range out {
		if value == nil {
			delete(out, name)
		}
	}
	return out
}

// field finds a field by either of its names.
func field(md protoreflect.MessageDescriptor, name string) protoreflect.FieldDescriptor {
	if fd := md.Fields().ByName(protoreflect.Name(name)); fd != nil {
		return fd
	}
	return md.Fields().ByJSONName(name)
}

func names(md protoreflect.MessageDescriptor) string {
	var list []string
	for i := range md.Fields().Len() {
		list = append(list, string(md.Fields().Get(i).Name()))
	}
	return strings.Join(list, ", ")
}

func (r *yamlReader) field(n *yaml.Node, fd protoreflect.FieldDescriptor) any {
	switch {
	case fd.IsMap():
		return r.texts(n, fd)
	case fd.IsList():
		list := []*yaml.Node{n}
		if n.Kind == yaml.SequenceNode {
			list = n.Content
		}
		out := []any{}
		for _, element := range list {
			if r.nodes < maxNodes {
				out = append(out, r.value(r.follow(element), fd))
			}
		}
		return out
	}
	return r.value(n, fd)
}

// texts reads a map from text to text. What is written counts: 1.10 is not 1.1.
func (r *yamlReader) texts(n *yaml.Node, fd protoreflect.FieldDescriptor) any {
	if n.Kind != yaml.MappingNode {
		r.fault(n, "%s: want a mapping", fd.Name())
		return nil
	}
	out := map[string]any{}
	r.entries(n, func(key, value *yaml.Node) { out[key.Value] = r.text(value, key.Value) })
	return out
}

func (r *yamlReader) text(n *yaml.Node, name string) any {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Tag == "!!binary" {
		r.fault(n, `%s: want a text ("" for an empty one)`, quote(name))
		return nil
	}
	return n.Value
}

func (r *yamlReader) value(n *yaml.Node, fd protoreflect.FieldDescriptor) any {
	if fd.Kind() == protoreflect.MessageKind {
		return r.nested(n, fd)
	}
	text := r.text(n, string(fd.Name()))
	switch fd.Kind() {
	case protoreflect.BoolKind:
		var b bool
		if n.Tag != "!!bool" || n.Decode(&b) != nil {
			r.fault(n, "%s: want true or false", fd.Name())
		}
		return b
	case protoreflect.Int32Kind, protoreflect.Int64Kind:
		var i int32
		if n.Tag != "!!int" || n.Decode(&i) != nil {
			r.fault(n, "%s: want a whole number", fd.Name())
		}
		return i
	}
	return text
}

// nested reads a message, and the shorter forms that some have.
func (r *yamlReader) nested(n *yaml.Node, fd protoreflect.FieldDescriptor) any {
	scalar := n.Kind == yaml.ScalarNode
	switch name := fd.Message().FullName(); {
	case name == "google.protobuf.Duration" && scalar:
		d, err := time.ParseDuration(n.Value)
		if err != nil {
			r.fault(n, "%s: %s is no duration (want 90s, 10m or 1h30m)", fd.Name(), quote(n.Value))
		}
		text, _ := protojson.Marshal(durationpb.New(d)) // of every Duration there is
		return json.RawMessage(text)
	case name == "google.protobuf.Timestamp" && scalar:
		return n.Value
	case name == "archfarm.v1.BuildContext" && scalar:
		return r.context(n)
	case name == "archfarm.v1.CacheEntry" && scalar:
		entry, err := ParseCache(n.Value)
		if err != nil {
			r.fault(n, "%v", err)
		}
		return map[string]any{"type": entry.GetType(), "attrs": entry.GetAttrs()}
	case name == "archfarm.v1.SecretRef" && n.Kind == yaml.MappingNode:
		return r.secret(n)
	}
	return r.message(n, fd.Message())
}

func (r *yamlReader) context(n *yaml.Node) any {
	git, local, err := ParseContext(n.Value)
	if err != nil {
		r.fault(n, "%v", err)
	}
	r.git, r.file.Local = git, local
	return nil
}

// secret reads a secret, and where its value comes from.
func (r *yamlReader) secret(n *yaml.Node) any {
	out, source := map[string]any{}, SecretSource{}
	r.entries(n, func(key, value *yaml.Node) {
		text, _ := r.text(value, key.Value).(string)
		switch key.Value {
		case "id":
			out["id"], source.ID = text, text
		case "name":
			out["name"] = text
		case "src", "file":
			source.File = text
		case "env":
			source.Env = text
		default:
			r.fault(key, "there is no %s; there are id, name (of a stored secret), src and env", quote(key.Value))
		}
	})
	switch _, stored := out["name"]; {
	case source.ID == "":
		r.fault(n, "the secret has no id")
	case source.File != "" && source.Env != "", stored && (source.File != "" || source.Env != ""):
		r.fault(n, "the secret %s comes from one place: a name, src or env", quote(source.ID))
	case !stored:
		r.file.Secrets = append(r.file.Secrets, source)
	}
	return out
}
