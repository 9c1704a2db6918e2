package split

import (
	"reflect"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
)

func legsFor(t *testing.T, list string) []Leg {
	t.Helper()
	legs, err := Legs(map[string]string{optPlatform: list})
	if err != nil {
		t.Fatal(err)
	}
	return legs
}

func names(legs []Leg) []string {
	out := []string{}
	for _, l := range legs {
		out = append(out, l.String())
	}
	return out
}

func wantEqual[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\ngot  %v\nwant %v", what, got, want)
	}
}

// wantRefusal checks an error's code and what a user reads in it.
func wantRefusal(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("error %v has code %s, want %s", err, status.Code(err), code)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
	if len(err.Error()) > 4<<10 {
		t.Errorf("the error has %d bytes: nobody reads that, and headers have limits", len(err.Error()))
	}
}

func TestLegs_OneForEachPlatformInTheOrderAsked(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		opt  map[string]string
		want []string
	}{
		"none named":                    {nil, []string{"default platform"}},
		"empty":                         {map[string]string{"platform": ""}, []string{"default platform"}},
		"one":                           {map[string]string{"platform": "linux/arm64"}, []string{"linux/arm64"}},
		"order":                         {map[string]string{"platform": "linux/s390x,linux/amd64,linux/arm64"}, []string{"linux/s390x", "linux/amd64", "linux/arm64"}},
		"spaces":                        {map[string]string{"platform": " linux/amd64 ,\tlinux/arm64"}, []string{"linux/amd64", "linux/arm64"}},
		"the same twice":                {map[string]string{"platform": "linux/amd64,linux/arm64,linux/amd64"}, []string{"linux/amd64", "linux/arm64"}},
		"the same in other words":       {map[string]string{"platform": "linux/arm64,linux/arm64/v8,linux/aarch64,linux/amd64,linux/x86_64"}, []string{"linux/arm64", "linux/amd64"}},
		"variants are different":        {map[string]string{"platform": "linux/arm/v6,linux/arm/v7,linux/arm,linux/amd64/v3,linux/amd64"}, []string{"linux/arm/v6", "linux/arm/v7", "linux/amd64/v3", "linux/amd64"}},
		"a version of the system":       {map[string]string{"platform": "windows(10.0.17763)/amd64"}, []string{"windows(10.0.17763)/amd64"}},
		"multi-platform for one":        {map[string]string{"platform": "linux/amd64", "multi-platform": "false"}, []string{"linux/amd64"}},
		"multi-platform for two":        {map[string]string{"platform": "linux/amd64,linux/arm64", "multi-platform": "1"}, []string{"linux/amd64", "linux/arm64"}},
		"a question about the build":    {map[string]string{"platform": "linux/amd64,linux/arm64", "requestid": "frontend.outline"}, []string{"linux/amd64"}},
		"a question without a platform": {map[string]string{"requestid": "frontend.lint"}, []string{"default platform"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			legs, err := Legs(test.opt)
			if err != nil {
				t.Fatal(err)
			}
			wantEqual(t, "legs", names(legs), test.want)
		})
	}
}

func TestLegs_RefusesWhatIsNoPlatform(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		platform, multi string
		words           []string
	}{
		"a word":              {"nonsense", "", []string{"malformed", `"nonsense"`, "linux/arm64"}},
		"an empty one":        {"linux/amd64,", "", []string{"malformed"}},
		"only commas":         {",,", "", []string{"malformed"}},
		"four parts":          {"linux/arm/v7/x", "", []string{"malformed"}},
		"a path":              {"linux/../amd64", "", []string{"malformed"}},
		"a hidden part":       {"linux/arm64/.v8", "", []string{"malformed"}},
		"a wildcard":          {"linux/*", "", []string{"malformed"}},
		"too many":            {strings.Repeat("linux/amd64,", maxPlatforms) + "linux/arm64", "", []string{"65 platforms", "at most 64"}},
		"very, very many":     {strings.Repeat(",", 1<<20), "", []string{"1048577 platforms"}},
		"a long one":          {"linux/" + strings.Repeat("a", 1<<20), "", []string{"malformed", "bytes"}},
		"a long part":         {"linux/" + strings.Repeat("a", maxName), "", []string{"malformed", "bytes"}},
		"one image of two":    {"linux/amd64,linux/arm64", "false", []string{"multi-platform", `"false"`}},
		"one image, garbled":  {"linux/amd64,linux/arm64", "maybe", []string{"multi-platform", `"maybe"`}},
		"not even characters": {"\xff\xfe/amd64", "", []string{"malformed"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			opt := map[string]string{"platform": test.platform}
			if test.multi != "" {
				opt["multi-platform"] = test.multi
			}
			_, err := Legs(opt)
			wantRefusal(t, err, codes.InvalidArgument, test.words...)
		})
	}
}

func TestFrontendOpt_NarrowsThePlatformAndNothingElse(t *testing.T) {
	t.Parallel()
	opt := map[string]string{"platform": "linux/amd64,linux/arm64", "multi-platform": "true", "target": "app"}
	got := legsFor(t, "linux/arm64")[0].FrontendOpt(opt)
	wantEqual(t, "options of the leg", got, map[string]string{"platform": "linux/arm64", "target": "app"})
	if opt["platform"] != "linux/amd64,linux/arm64" || opt["multi-platform"] != "true" {
		t.Errorf("the request's options were changed: %v", opt)
	}
	wantEqual(t, "options made from none", legsFor(t, "linux/arm64")[0].FrontendOpt(nil), map[string]string{"platform": "linux/arm64"})
}

// Every field that BuildKit's request has must have been thought of: a field
// that a later version adds fails here first.
func TestSolve_EveryFieldOfTheRequestReachesTheLegOrIsMeantNotTo(t *testing.T) {
	t.Parallel()
	req := &controlapi.SolveRequest{}
	fields := req.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		fill(req.ProtoReflect(), fields.Get(i))
	}
	req.FrontendAttrs = map[string]string{"platform": "linux/amd64,linux/arm64", "target": "app"}
	exporters := []*controlapi.Exporter{{Type: "image"}}
	out := legsFor(t, "linux/arm64")[0].Solve(req, "a-new-reference", exporters, true)

	if out.GetRef() != "a-new-reference" {
		t.Errorf("the leg's reference is %q", out.GetRef())
	}
	wantEqual(t, "the leg's attributes", out.GetFrontendAttrs(), map[string]string{"platform": "linux/arm64", "target": "app"})
	if len(out.GetExporters()) != 1 || out.GetExporters()[0] != exporters[0] {
		t.Errorf("the leg's exporters are %v", out.GetExporters())
	}
	// What the client's side of a gateway build does, and the old form of Exporters.
	dropped := map[protoreflect.Name]bool{"Definition": true, "Frontend": true, "ExporterDeprecated": true, "ExporterAttrsDeprecated": true}
	for i := range fields.Len() {
		if f := fields.Get(i); out.ProtoReflect().Has(f) == dropped[f.Name()] {
			t.Errorf("field %s: set on the leg's request: %t", f.Name(), out.ProtoReflect().Has(f))
		}
	}
}

// fill sets a field to something that is not its zero value.
func fill(m protoreflect.Message, f protoreflect.FieldDescriptor) {
	switch {
	case f.IsMap():
		entries := m.Mutable(f).Map()
		entries.Set(protoreflect.ValueOfString("key").MapKey(), entries.NewValue())
	case f.IsList():
		list := m.Mutable(f).List()
		list.Append(list.NewElement())
	case f.Message() != nil:
		m.Mutable(f)
	case f.Kind() == protoreflect.BoolKind:
		m.Set(f, protoreflect.ValueOfBool(true))
	case f.Kind() == protoreflect.Int64Kind:
		m.Set(f, protoreflect.ValueOfInt64(1))
	default:
		m.Set(f, protoreflect.ValueOfString("value"))
	}
}

func TestSolve_LeavesThePlatformToTheBuilderWhenTheClientDoes(t *testing.T) {
	t.Parallel()
	out := Leg{}.Solve(&controlapi.SolveRequest{FrontendAttrs: map[string]string{"target": "app"}}, "ref", nil, false)
	if _, ok := out.GetFrontendAttrs()["platform"]; ok {
		t.Errorf("attributes %v name a platform", out.GetFrontendAttrs())
	}
}

func exec(p *pb.Platform, args ...string) *pb.Op {
	return &pb.Op{Platform: p, Op: &pb.Op_Exec{Exec: &pb.ExecOp{Meta: &pb.Meta{Args: args}}}}
}

func source(p *pb.Platform) *pb.Op {
	return &pb.Op{Platform: p, Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "local://context"}}}
}

// definition marshals steps; names[i] names step i.
func definition(t *testing.T, names map[int]string, ops ...*pb.Op) *pb.Definition {
	t.Helper()
	def := &pb.Definition{Metadata: map[string]*pb.OpMetadata{}}
	for i, op := range ops {
		raw, err := op.MarshalVT()
		if err != nil {
			t.Fatal(err)
		}
		def.Def = append(def.Def, raw)
		if name := names[i]; name != "" {
			def.Metadata[digest.FromBytes(raw).String()] = &pb.OpMetadata{Description: map[string]string{"llb.customname": name}}
		}
	}
	return def
}

var (
	amd64 = &pb.Platform{OS: "linux", Architecture: "amd64"}
	arm64 = &pb.Platform{OS: "linux", Architecture: "arm64"}
)

func TestExecs_NamesEachStepThatExecutesAndItsPlatform(t *testing.T) {
	t.Parallel()
	def := definition(t, map[int]string{1: "[2/3] RUN make"},
		source(arm64),
		exec(amd64, "make"),
		exec(nil, "sh", "-c", "true"),
		exec(&pb.Platform{Architecture: "arm64"}, "no", "system"), // BuildKit takes it for linux/arm64
		exec(&pb.Platform{}, "nothing"),
		exec(arm64, strings.Repeat("ä", maxStepName)),
	)
	execs, err := Execs(def)
	if err != nil {
		t.Fatal(err)
	}
	got := []string{}
	for _, e := range execs {
		platform := "the worker's"
		if e.Platform != nil {
			platform = Leg{Platform: *e.Platform}.String()
		}
		got = append(got, e.Name+" on "+platform)
	}
	want := []string{
		"[2/3] RUN make on linux/amd64", "sh -c true on the worker's", "no system on linux/arm64", "nothing on the worker's",
		strings.Repeat("ä", maxStepName/2) + "… on linux/arm64",
	}
	wantEqual(t, "steps", got, want)
}

func TestExecs_RefusesAStepThatCannotBeRead(t *testing.T) {
	t.Parallel()
	def := definition(t, nil, source(nil))
	def.Def = append(def.Def, []byte("\xff\xff\xff"))
	_, err := Execs(def)
	wantRefusal(t, err, codes.InvalidArgument, "step 1")
	_, err = DefinitionLeg(def)
	wantRefusal(t, err, codes.InvalidArgument, "step 1")
}

func TestDefinitionLeg_IsWhereItsStepsExecute(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		ops  []*pb.Op
		want string
	}{
		"no steps":                      {nil, "default platform"},
		"no platform":                   {[]*pb.Op{source(nil), exec(nil)}, "default platform"},
		"only sources":                  {[]*pb.Op{source(nil), source(arm64), source(amd64)}, "linux/arm64"},
		"a source, then another's step": {[]*pb.Op{source(amd64), exec(arm64)}, "linux/arm64"},
		"a step without a platform":     {[]*pb.Op{exec(nil), exec(arm64), exec(amd64)}, "linux/arm64"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			leg, err := DefinitionLeg(definition(t, nil, test.ops...))
			if err != nil {
				t.Fatal(err)
			}
			if leg.String() != test.want {
				t.Errorf("the leg is %s, want %s", leg, test.want)
			}
		})
	}
}

func TestPlatformLeg(t *testing.T) {
	t.Parallel()
	if leg := PlatformLeg(nil); leg != nil {
		t.Errorf("of no platform: %s", leg)
	}
	if leg := PlatformLeg(&pb.Platform{OS: "Linux", Architecture: "aarch64", Variant: "v8"}); leg == nil || leg.String() != "linux/arm64" {
		t.Errorf("of linux/aarch64/v8: %v", leg)
	}
}

func TestHead(t *testing.T) {
	t.Parallel()
	input := func(names ...string) *pb.Op {
		op := &pb.Op{}
		for _, n := range names {
			op.Inputs = append(op.Inputs, &pb.Input{Digest: n})
		}
		return op
	}
	malformed := definition(t, nil, source(arm64))
	malformed.Def = append(malformed.Def, []byte("\xff"))
	for name, test := range map[string]struct {
		def  *pb.Definition
		want digest.Digest
	}{
		"what the last op points at":     {definition(t, nil, source(arm64), input("sha256:a")), "sha256:a"},
		"whatever the ops before it are": {definition(t, nil, input("sha256:b"), input("sha256:a")), "sha256:a"},
		"no definition":                  {nil, ""},
		"an empty one":                   {&pb.Definition{}, ""},
		"a last op without inputs":       {definition(t, nil, source(arm64)), ""},
		"a last op with several":         {definition(t, nil, source(arm64), input("sha256:a", "sha256:b")), ""},
		"a malformed last op":            {malformed, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := Head(test.def); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// TestHead_IsTheSameForADefinitionAndWhatBuildsOnIt takes the definitions from BuildKit itself, as clients do.
func TestHead_IsTheSameForADefinitionAndWhatBuildsOnIt(t *testing.T) {
	t.Parallel()
	state := llb.Image("base").File(llb.Mkfile("/a", 0o644, nil))
	base, err := state.Marshal(t.Context(), llb.LinuxArm64)
	if err != nil {
		t.Fatal(err)
	}
	op, err := llb.NewDefinitionOp(base.ToPB())
	if err != nil {
		t.Fatal(err)
	}
	again, err := llb.NewState(op).Marshal(t.Context(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := Head(again.ToPB()), Head(base.ToPB()); got == "" || got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
