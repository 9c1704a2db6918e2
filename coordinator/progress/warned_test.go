package progress

import (
	"fmt"
	"slices"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"pgregory.net/rapid"
)

func warning(vertex, short string) *controlapi.VertexWarning {
	return &controlapi.VertexWarning{Vertex: vertex, Short: []byte(short), Detail: [][]byte{[]byte("why")}, Level: 1}
}

// Whatever the order in which legs warn, the client sees each warning as often as
// the leg does that has it most often.
func TestWarned_IsTheUnionOfTheLegsWarnings(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		warned := NewWarned()
		legs := make([]*Leg, rapid.IntRange(1, 4).Draw(t, "legs"))
		for i := range legs {
			legs[i] = NewLeg(fmt.Sprintf("linux/leg%d", i), true)
			legs[i].Together(warned, i == 0)
		}
		want, got := map[string]int{}, map[string]int{}
		told := make([]map[string]int, len(legs))
		for range rapid.IntRange(0, 40).Draw(t, "warnings") {
			i := rapid.IntRange(0, len(legs)-1).Draw(t, "leg")
			text := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "text")
			if told[i] == nil {
				told[i] = map[string]int{}
			}
			told[i][text]++
			want[text] = max(want[text], told[i][text])
			in := &controlapi.StatusResponse{Warnings: []*controlapi.VertexWarning{warning("sha256:x", text)}}
			for _, w := range legs[i].Translate(in).GetWarnings() {
				got[string(w.GetShort())]++
			}
			if len(in.GetWarnings()) != 1 {
				t.Fatal("the worker's message was changed")
			}
		}
		for text, n := range want {
			if got[text] != n {
				t.Fatalf("%q was told %d times, want %d", text, got[text], n)
			}
		}
	})
}

func TestWarned_TellsApartWhatDiffers(t *testing.T) {
	t.Parallel()
	warned := NewWarned()
	first, second := NewLeg("linux/amd64", true), NewLeg("linux/arm64", true)
	first.Together(warned, true)
	second.Together(warned, false)
	other := warning("sha256:x", "text")
	other.Url = "https://example.com"
	first.Translate(&controlapi.StatusResponse{Warnings: []*controlapi.VertexWarning{warning("sha256:x", "text")}})
	got := second.Translate(&controlapi.StatusResponse{Warnings: []*controlapi.VertexWarning{warning("sha256:x", "text"), other}}).GetWarnings()
	if len(got) != 1 || got[0].GetUrl() != other.GetUrl() || got[0].GetVertex() != second.Translated("sha256:x") {
		t.Errorf("the second leg's warnings: %v", got)
	}
}

func TestWarned_IsBounded(t *testing.T) {
	t.Parallel()
	warned := NewWarned()
	leg := NewLeg("linux/amd64", true)
	leg.Together(warned, true)
	var all []*controlapi.VertexWarning
	for i := range 2 * maxWarned {
		all = append(all, warning("sha256:x", fmt.Sprint(i)))
	}
	for range 2 {
		if got := leg.Translate(&controlapi.StatusResponse{Warnings: slices.Clone(all)}).GetWarnings(); len(got) != len(all) {
			t.Fatalf("%d of %d warnings of one leg were passed on", len(got), len(all))
		}
	}
	if len(warned.most) > maxWarned || len(leg.warnings) > maxWarned {
		t.Errorf("%d and %d warnings are remembered", len(warned.most), len(leg.warnings))
	}
}

// BuildKit's Dockerfile frontend, asked for several platforms, warns for the first only.
func TestWarned_OfTheSourceOnlyTheFirstLegTells(t *testing.T) {
	t.Parallel()
	warned := NewWarned()
	for i, want := range []int{1, 0, 0} {
		leg := NewLeg(fmt.Sprintf("linux/leg%d", i), true)
		leg.Together(warned, i == 0)
		lint := warning("sha256:x", fmt.Sprintf("base image is not for leg %d", i))
		lint.Info = &pb.SourceInfo{Filename: "Dockerfile"}
		if got := leg.Translate(&controlapi.StatusResponse{Warnings: []*controlapi.VertexWarning{lint}}).GetWarnings(); len(got) != want {
			t.Errorf("leg %d tells %d warnings, want %d", i, len(got), want)
		}
	}
}

// A leg that fails may stop the first before that could say what is wrong with the source.
func TestWarned_TellsOfOneLegWhatTheFirstCouldNot(t *testing.T) {
	t.Parallel()
	warned := NewWarned()
	legs := make([]*Leg, 3)
	lint := func(text string) *controlapi.StatusResponse {
		w := warning("sha256:x", text)
		w.Info = &pb.SourceInfo{Filename: "Dockerfile"}
		return &controlapi.StatusResponse{Warnings: []*controlapi.VertexWarning{w}}
	}
	for i := range legs {
		legs[i] = NewLeg(fmt.Sprintf("linux/leg%d", i), true)
		legs[i].Together(warned, i == 0)
	}
	if warned.Untold() != nil {
		t.Error("something is untold before anything was said")
	}
	legs[1].Translate(lint("a"))
	legs[2].Translate(lint("a"))
	legs[1].Translate(lint("b"))
	if got := warned.Untold().GetWarnings(); len(got) != 2 || got[1].GetVertex() != legs[1].Translated("sha256:x") {
		t.Errorf("untold: %v", got)
	}
	legs[0].Translate(lint("a"))
	if got := warned.Untold(); got != nil {
		t.Errorf("untold though the first leg has told: %v", got)
	}
}
