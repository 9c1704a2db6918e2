package split

import (
	"encoding/json"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// wantConsidered: whatever comes in, an error has one of the codes that are meant
// for the client, and no message of a size that gRPC could not carry.
func wantConsidered(t *testing.T, err error) {
	t.Helper()
	if code := status.Code(err); code != codes.InvalidArgument && code != codes.Unimplemented {
		t.Fatalf("code %s: %v", code, err)
	}
}

func FuzzLegs(f *testing.F) {
	for _, seed := range []string{"", "linux/amd64,linux/arm64/v8", "windows(10.0+a,b)/amd64", "linux(%2c)/a", "linux(%2f..%2f)/a", ",", "linux/arm/v7/x", "arm64", "a/b/c,b/c"} {
		f.Add(seed, "true", "")
	}
	f.Fuzz(func(t *testing.T, list, multi, request string) {
		opt := map[string]string{optPlatform: list, optMultiPlatform: multi, optRequestID: request}
		legs, err := Legs(opt)
		if err != nil {
			wantConsidered(t, err)
			return
		}
		if len(legs) == 0 || len(legs) > maxPlatforms {
			t.Fatalf("%d legs", len(legs))
		}
		seen := map[string]bool{}
		for _, l := range legs {
			if l.Unnamed() {
				continue
			}
			if seen[l.String()] {
				t.Fatalf("%s twice", l)
			}
			seen[l.String()] = true
			// The worker reads the platform again: it must find the same one.
			again, err := Legs(l.FrontendOpt(opt))
			if err != nil || len(again) != 1 || again[0].String() != l.String() {
				t.Fatalf("leg %q reads as %v, %v", l, again, err)
			}
		}
	})
}

// attributes reads a JSON object of strings: what a fuzzer can vary of a map.
func attributes(data []byte) map[string]string {
	var out map[string]string
	if json.Unmarshal(data, &out) != nil {
		return nil
	}
	return out
}

func FuzzPlanExports(f *testing.F) {
	for _, seed := range []string{
		`{"name":"registry.example/app:v1,app","push":"true"}`, `{"push":"","name":"*"}`, `{"annotation-index.a":"b","annotation[linux/arm64].c":"d"}`,
		`{"name":"app","push":"true","push-by-digest":"true","registry.insecure":"1"}`, `{"annotation[linux/arm64/v8].c":"d","annotation[linux/mips].c":"d"}`,
	} {
		f.Add("image", []byte(seed))
		f.Add("oci", []byte(seed))
	}
	f.Add("image", []byte(`{"name":"*","push":"true","image.name":"a:1,b","dangling-name-prefix":"p"}`))
	f.Add("local", []byte(`{"mode":"delete","platform-split":"f"}`))
	legs, err := Legs(map[string]string{optPlatform: "linux/amd64,linux/arm64,linux/arm/v6"})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, kind string, data []byte) {
		attrs := attributes(data)
		before := len(attrs)
		plan, err := PlanExports([]*controlapi.Exporter{{Type: kind, Attrs: attrs}}, legs)
		if err != nil {
			wantConsidered(t, err)
			return
		}
		export := plan.Exports()[0]
		publication, err := export.Publication(map[string][]byte{"image.name": []byte("chosen:v1")}, index)
		if err != nil {
			wantConsidered(t, err)
		}
		for _, l := range legs {
			got := plan.Leg(l)
			if len(got) != 1 || got[0].GetType() != kind {
				t.Fatalf("%s: %v", l, got)
			}
			if len(publication.Names) > 0 && got[0].GetAttrs()["push-by-digest"] != "true" {
				t.Fatalf("%s would push tags: %v", l, got[0].GetAttrs())
			}
			for k := range got[0].GetAttrs() {
				a, ok, _ := exptypes.ParseAnnotationKey(k)
				if export.Indexed() && ok && a.Platform != nil && a.PlatformString() != l.String() {
					t.Fatalf("%s: got an annotation that is not its: %s", l, k)
				}
			}
		}
		if len(attrs) != before {
			t.Fatal("the client's attributes were changed")
		}
	})
}

func FuzzDefinition(f *testing.F) {
	for _, op := range []*pb.Op{exec(arm64, "make"), source(amd64), exec(&pb.Platform{OS: "linux", OSVersion: "%"}, "x"), {Inputs: []*pb.Input{{Digest: "sha256:a"}}}, {}} {
		raw, err := op.MarshalVT()
		if err != nil {
			f.Fatal(err)
		}
		def, err := (&pb.Definition{Def: [][]byte{raw, raw}, Metadata: map[string]*pb.OpMetadata{"": nil}}).MarshalVT()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(def)
	}
	f.Add([]byte("\x0a\x02\xff\xff"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var def pb.Definition
		if def.UnmarshalVT(raw) != nil {
			return
		}
		execs, err := Execs(&def)
		leg, legErr := DefinitionLeg(&def)
		if err != nil {
			wantConsidered(t, err)
			return // DefinitionLeg stops at the first step it can use
		}
		if head := Head(&def); head != "" {
			last, err := readOp(0, def.GetDef()[len(def.GetDef())-1])
			if err != nil || string(head) != last.GetInputs()[0].GetDigest() {
				t.Fatalf("head %q of a definition whose last op is %v, %v", head, last, err)
			}
		}
		if legErr != nil {
			t.Fatalf("steps could be read, their leg not: %v", legErr)
		}
		for _, e := range execs {
			if len(e.Name) > maxStepName+len("…") {
				t.Fatalf("a step's name of %d bytes", len(e.Name))
			}
			if e.Platform != nil {
				if leg.Unnamed() {
					t.Fatalf("the leg has no platform, step %q has %v", e.Name, e.Platform)
				}
				return
			}
		}
	})
}

// FuzzResult merges what two workers return, however strange, and takes it apart.
func FuzzResult(f *testing.F) {
	legs, err := Legs(map[string]string{optPlatform: "linux/amd64,linux/arm64"})
	if err != nil {
		f.Fatal(err)
	}
	for _, res := range []*gwpb.Result{
		bare("a", map[string]string{"containerimage.config": "c"}), several(map[string]string{"config/a/b": "1", "/": "2"}, "a/b", "b", ""),
		attested(several(map[string]string{"refs.platforms": `{"Platforms":[{"ID":"b","Platform":{"os":"linux","architecture":"arm64"}}]}`}, "b"), "b", "x"),
		{Result: &gwpb.Result_Refs{}}, {Result: &gwpb.Result_RefsDeprecated{}}, {},
	} {
		raw, err := res.MarshalVT()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, []byte{}, "b")
		f.Add([]byte{}, raw, "linux/arm64")
	}
	f.Fuzz(func(t *testing.T, first, second []byte, mine string) {
		var a, b gwpb.Result
		if a.UnmarshalVT(first) != nil || b.UnmarshalVT(second) != nil {
			return
		}
		results := []*gwpb.Result{&a, &b}
		if merged, err := Merge(legs, results); err != nil {
			wantConsidered(t, err)
		} else {
			results = append(results, merged)
		}
		for _, res := range results {
			part, err := Part(res, func(key, _ string) bool { return key == mine })
			if err != nil {
				wantConsidered(t, err)
				continue
			}
			if part == nil || Single(res) {
				continue
			}
			for key := range part.GetRefs().GetRefs() {
				if key != mine {
					t.Fatalf("%q was given the reference of %q", mine, key)
				}
			}
			for key := range part.GetAttestations() {
				if key != mine {
					t.Fatalf("%q was given attestations of %q", mine, key)
				}
			}
		}
	})
}
