package history

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

const typeStatement = "application/vnd.in-toto+json"

// image is what a leg has exported, with an attestation, and what its worker
// remembers of it.
type image struct {
	index, manifest, config, layer, statement ocispecs.Descriptor
}

func (d *daemon) image(t *testing.T, ref, platform string, keyed bool) image {
	t.Helper()
	var i image
	i.layer = d.blob(t, ocispecs.MediaTypeImageLayerGzip, []byte("layer of "+platform))
	i.config = d.blob(t, ocispecs.MediaTypeImageConfig, []byte(`{"platform":"`+platform+`"}`))
	i.statement = d.blob(t, typeStatement, []byte(`{"statement":"`+platform+`"}`))
	i.manifest = d.json(t, ocispecs.MediaTypeImageManifest, ocispecs.Manifest{Config: i.config, Layers: []ocispecs.Descriptor{i.layer}})
	attestation := d.json(t, ocispecs.MediaTypeImageManifest, ocispecs.Manifest{Config: i.config, Layers: []ocispecs.Descriptor{i.statement}})
	i.index = d.json(t, ocispecs.MediaTypeImageIndex, ocispecs.Index{Manifests: []ocispecs.Descriptor{i.manifest, attestation}})
	provenance := d.blob(t, typeStatement, []byte(`{"provenance":"`+platform+`"}`))
	info := &controlapi.BuildResultInfo{Attestations: []*controlapi.Descriptor{apiDescriptor(provenance)}}
	record := &controlapi.BuildHistoryRecord{Ref: ref, Result: &controlapi.BuildResultInfo{
		ResultDeprecated: apiDescriptor(i.index), Results: map[int64]*controlapi.Descriptor{0: apiDescriptor(i.index)},
	}, ExporterResponse: map[string]string{"of": platform}}
	if keyed {
		record.Results = map[string]*controlapi.BuildResultInfo{platform: info}
	} else {
		record.Result.Attestations = info.GetAttestations()
	}
	d.records[ref] = record
	return i
}

func provenance(t *testing.T, h *History, info *controlapi.BuildResultInfo) string {
	t.Helper()
	if len(info.GetAttestations()) != 1 {
		t.Fatalf("attestations %v", info.GetAttestations())
	}
	raw, err := readAll(t, h, info.GetAttestations()[0].GetDigest())
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestLegs_TheirResultsBecomeTheBuilds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, b := newDaemon(t), newDaemon(t)
		one, two := a.image(t, "leg-a", "linux/amd64", false), b.image(t, "leg-b", "linux/arm64", true)
		h, _ := open(t, Options{Workers: daemons{"a": a, "b": b}})
		legs := []Leg{{Platform: "linux/amd64", Worker: "a", Ref: "leg-a"}, {Platform: "linux/arm64", Worker: "b", Ref: "leg-b"}}
		index, err := json.Marshal(ocispecs.Index{Manifests: []ocispecs.Descriptor{one.manifest, two.manifest}})
		if err != nil {
			t.Fatal(err)
		}
		merged := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromBytes(index), Size: int64(len(index))}
		build := begin(t, h, &controlapi.SolveRequest{Ref: "b"})
		build.Built(t.Context(), legs, map[string][]byte{"refs.platforms": []byte("…"), "broken": {0xff}})
		build.Image(1, merged, index)
		build.end(legs, nil)

		r := the(t, h, "b")
		if got := provenance(t, h, r.GetResults()["linux/amd64"]) + provenance(t, h, r.GetResults()["linux/arm64"]); got != `{"provenance":"linux/amd64"}{"provenance":"linux/arm64"}` {
			t.Errorf("provenance %s", got)
		}
		if got := r.GetResult().GetResults(); len(got) != 1 || got[1].GetDigest() != merged.Digest.String() || r.GetResult().GetResultDeprecated().GetDigest() != merged.Digest.String() {
			t.Errorf("the result is %v", r.GetResult())
		}
		if got := r.GetExporterResponse(); !maps.Equal(got, map[string]string{"refs.platforms": "…", "broken": "\uFFFD", "archfarm.leg/linux/amd64": "a", "archfarm.leg/linux/arm64": "b"}) {
			t.Errorf("the response is %v", got)
		}
		pass(patience)
		for _, layer := range []ocispecs.Descriptor{one.layer, two.layer} {
			if raw, err := readAll(t, h, layer.Digest.String()); err != nil || !strings.HasPrefix(string(raw), "layer of") {
				t.Errorf("a layer while the workers are there: %q, %v", raw, err)
			}
		}
		a.leave()
		b.leave()
		for name, desc := range map[string]ocispecs.Descriptor{"index": merged, "manifest": one.manifest, "the other": two.manifest, "configuration": two.config} {
			if raw, err := readAll(t, h, desc.Digest.String()); err != nil || digest.FromBytes(raw) != desc.Digest {
				t.Errorf("%s when the workers are gone: %v", name, err)
			}
		}
		provenance(t, h, the(t, h, "b").GetResults()["linux/amd64"])
		if _, err := readAll(t, h, one.layer.Digest.String()); !errdefs.IsNotFound(err) {
			t.Errorf("a layer when the workers are gone: %v", err)
		}
	})
}

func TestLegs_TheOnlyOnesResultIsTheBuilds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newDaemon(t)
		i := w.image(t, "leg", "linux/amd64", false)
		other := w.blob(t, "text/plain", []byte("of another build"))
		h, _ := open(t, Options{Workers: daemons{"w": w}})
		built(t, h, "b", Leg{Worker: "w", Ref: "leg"})
		r := the(t, h, "b")
		if r.GetResult().GetResults()[0].GetDigest() != i.index.Digest.String() || provenance(t, h, r.GetResult()) == "" {
			t.Errorf("the result is %v", r.GetResult())
		}
		if got := r.GetExporterResponse(); !maps.Equal(got, map[string]string{"of": "linux/amd64", "archfarm.leg": "w"}) {
			t.Errorf("the response is %v", got)
		}
		if _, err := readAll(t, h, other.Digest.String()); !errdefs.IsNotFound(err) {
			t.Errorf("what no record names: %v", err)
		}
		w.leave()
		for name, desc := range map[string]ocispecs.Descriptor{"index": i.index, "manifest": i.manifest, "configuration": i.config, "attestation": i.statement} {
			if _, err := readAll(t, h, desc.Digest.String()); err != nil {
				t.Errorf("%s when the worker is gone: %v", name, err)
			}
		}
	})
}

func TestLegs_AWorkerThatDoesNotAnswerLeavesAGap(t *testing.T) {
	bubble(t, func(t *testing.T) {
		a, frozen := newDaemon(t), newDaemon(t)
		a.image(t, "leg-a", "linux/amd64", false)
		frozen.frozen = true
		h, _ := open(t, Options{Workers: daemons{"a": a, "frozen": frozen}})
		begun := time.Now()
		legs := []Leg{{Platform: "linux/amd64", Worker: "a", Ref: "leg-a"}, {Platform: "linux/arm64", Worker: "frozen", Ref: "leg"}, {Platform: "linux/s390x", Worker: "gone"}}
		b := begin(t, h, &controlapi.SolveRequest{Ref: "b"})
		b.Built(t.Context(), legs, nil)
		b.end(legs, nil)
		if got := slices.Collect(maps.Keys(the(t, h, "b").GetResults())); !slices.Equal(got, []string{"linux/amd64"}) {
			t.Errorf("results of %v", got)
		}
		if took := time.Since(begun); took != fetchTimeout {
			t.Errorf("it took %v", took)
		}
	})
}

func TestLegs_WhatAWorkerGetsWrongIsLeftOut(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newDaemon(t)
		w.records["leg"] = &controlapi.BuildHistoryRecord{Ref: "leg", Result: &controlapi.BuildResultInfo{
			Attestations: []*controlapi.Descriptor{{Digest: "nonsense"}, {Digest: "sha512:" + strings.Repeat("0", 128)}, {Digest: digest.FromString("missing").String(), Size: -1}},
			Results: map[int64]*controlapi.Descriptor{
				0: apiDescriptor(w.blob(t, ocispecs.MediaTypeImageIndex, []byte("no JSON"))),
				1: apiDescriptor(w.json(t, ocispecs.MediaTypeImageIndex, ocispecs.Index{Manifests: []ocispecs.Descriptor{{Digest: "../../x", MediaType: ocispecs.MediaTypeImageManifest, Size: 1}}})),
			},
		}}
		h, _ := open(t, Options{Workers: daemons{"w": w}})
		built(t, h, "b", Leg{Worker: "w", Ref: "leg"})
		_, e, err := h.records.get(t.Context(), "b")
		if err != nil || len(e.Blobs) != 3 { // with the logs
			t.Errorf("kept %v, %v", e.Blobs, err)
		}
	})
}

// span is one of a trace.
func span(traceID trace.TraceID, id byte, name string) tracetest.SpanStub {
	return tracetest.SpanStub{Name: name, SpanContext: trace.NewSpanContext(trace.SpanContextConfig{TraceID: traceID, SpanID: trace.SpanID{id}})}
}

func encode(t *testing.T, spans ...tracetest.SpanStub) []byte {
	t.Helper()
	var out bytes.Buffer
	for _, s := range spans {
		if err := json.NewEncoder(&out).Encode(s); err != nil {
			t.Fatal(err)
		}
	}
	return out.Bytes()
}

func TestTrace_ThoseOfTheLegsAndTheCoordinatorsAreOne(t *testing.T) {
	for name, wait := range map[string]func(t *testing.T, h *History) time.Duration{
		"by itself": func(*testing.T, *History) time.Duration {
			pass(tracePatience)
			return tracePatience
		},
		"when asked": func(t *testing.T, h *History) time.Duration {
			if err := h.Update(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: "b", Finalize: true}); err != nil {
				t.Error(err)
			}
			return 0
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				id := trace.TraceID{1}
				ctx := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{TraceID: id, SpanID: trace.SpanID{1}}))
				workers := daemons{"a": newDaemon(t), "b": newDaemon(t)}
				var legs []Leg
				for i, w := range []string{"a", "b"} {
					ref := "leg-" + w
					workers[w].records[ref] = &controlapi.BuildHistoryRecord{Ref: ref}
					desc := workers[w].blob(t, typeTrace, encode(t, span(id, 2, "shared"), span(id, byte(3+i), ref), span(trace.TraceID{9}, 9, "foreign")))
					workers[w].traces[ref] = apiDescriptor(desc)
					legs = append(legs, Leg{Platform: w, Worker: w, Ref: ref})
				}
				h, _ := open(t, Options{Workers: workers, Spans: traced{span(id, 1, "Solve"), span(id, 2, "shared")}})
				b := begin(t, h, &controlapi.SolveRequest{Ref: "b"})
				b.traceID = trace.SpanContextFromContext(ctx).TraceID() // of the request
				begun := time.Now()
				b.end(legs, nil)
				want := wait(t, h)
				r := the(t, h, "b")
				if took := time.Since(begun); took != want || r.GetGeneration() != 1 || r.GetTrace().GetMediaType() != typeTrace {
					t.Errorf("after %v, want %v: %v", took, want, r)
				}
				raw, err := readAll(t, h, r.GetTrace().GetDigest())
				if err != nil {
					t.Fatal(err)
				}
				var names []string
				for in := json.NewDecoder(bytes.NewReader(raw)); in.More(); {
					var s struct{ Name string }
					if err := in.Decode(&s); err != nil {
						t.Fatal(err)
					}
					names = append(names, s.Name)
				}
				slices.Sort(names)
				if !slices.Equal(names, []string{"Solve", "leg-a", "leg-b", "shared"}) {
					t.Errorf("the spans are %v", names)
				}
			})
		})
	}
}

func TestTrace_ABrokenOneOfALegAddsWhatCanBeRead(t *testing.T) {
	t.Parallel()
	set := newTrace(trace.TraceID{1})
	if err := set.addBlob(append(encode(t, span(trace.TraceID{1}, 1, "one")), "{half"...)); err == nil || len(set.spans) != 1 {
		t.Errorf("%v with %d spans", err, len(set.spans))
	}
}

func FuzzTrace(f *testing.F) {
	f.Add([]byte(`{"SpanContext":{"TraceID":"01000000000000000000000000000000","SpanID":"1"}} []`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		set := newTrace(trace.TraceID{1})
		_ = set.addBlob(raw)
		again := newTrace(trace.TraceID{1})
		if err := again.addBlob(set.encode()); err != nil || len(again.spans) != len(set.spans) {
			t.Errorf("%d spans become %d: %v", len(set.spans), len(again.spans), err)
		}
	})
}
