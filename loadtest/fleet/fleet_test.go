package main

import (
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"pgregory.net/rapid"
)

// TestMeasure_ShortRunFillsTheTable takes a small fleet through everything, with the real parts.
func TestMeasure_ShortRunFillsTheTable(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a coordinator")
	}
	farmtest.FindFarmTools(t) // skips, or fails, where they are missing
	var out strings.Builder
	o := shortly()
	if !measure(t.Context(), t, o, &out) {
		t.Errorf("even %d workers miss a goal:\n%s", o.Workers, out.String())
	}
	for _, want := range []string{
		"20 workers", "all join at once", "killed, started 1.0 s later", "peak resident memory", "CPU use while idle", "an idle agent's",
		"ok", "tries that came to nothing, by time after the kill:\n    0 s ", "connections, by time after the new start:\n    0 s ",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
}

func TestResults_AMissIsTold(t *testing.T) {
	t.Parallel()
	within := results{join: time.Second, back: time.Second, memory: 1 << 20, idle: usage{took: time.Second}}
	o := options{Workers: 2, Goals: goals{Join: 2 * time.Second, Return: 2 * time.Second, Memory: 2 << 20}}
	misses := map[string]func(*results){
		"none":            func(*results) {},
		"join":            func(r *results) { r.join = 2 * time.Second },
		"return":          func(r *results) { r.back = 3 * time.Second },
		"resident memory": func(r *results) { r.memory = 2 << 20 },
	}
	for name, worsen := range misses {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := within
			worsen(&r)
			var out strings.Builder
			reached := r.write(t, &out, o)
			if told := strings.Count(out.String(), "MISS"); reached != (name == "none") || (told == 1) == reached {
				t.Errorf("reached: %v, told %d times:\n%s", reached, told, out.String())
			}
		})
	}
}

func TestMoments_OnlyThoseOfTheTimeAsked(t *testing.T) {
	t.Parallel()
	var m moments
	begin := time.Now()
	for _, s := range []time.Duration{-1, 0, 1, 2, 3} {
		m.add(begin.Add(s * time.Second))
	}
	if got := m.between(begin, begin.Add(3*time.Second)); !slices.Equal(got, []time.Duration{0, time.Second, 2 * time.Second}) {
		t.Errorf("got %v", got)
	}
}

func TestHistogram(t *testing.T) {
	t.Parallel()
	after := []time.Duration{2 * time.Second, 0, 2500 * time.Millisecond, 2999 * time.Millisecond, 500 * time.Millisecond, 999 * time.Millisecond}
	if got := perSecond(after); !slices.Equal(got, []int{3, 0, 3}) {
		t.Errorf("by second: %v", got)
	}
	if got := histogram(after); !strings.Contains(got, "    1 s     0\n") || strings.Count(got, "\n") != 3 {
		t.Errorf("drawn:\n%s", got)
	}
	if perSecond(nil) != nil || histogram(nil) != "  none\n" {
		t.Errorf("of nothing: %v, %q", perSecond(nil), histogram(nil))
	}
}

// TestBusiest compares with counting from every moment on.
func TestBusiest(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		after := rapid.SliceOfN(rapid.Custom(func(r *rapid.T) time.Duration { return time.Duration(rapid.IntRange(0, 30).Draw(r, "at")) }), 0, 20).Draw(r, "after")
		span := time.Duration(rapid.IntRange(1, 10).Draw(r, "span"))
		want := 0
		for _, from := range after {
			n := 0
			for _, d := range after {
				if d >= from && d < from+span {
					n++
				}
			}
			want = max(want, n)
		}
		if got := busiest(after, span); got != want {
			r.Fatalf("%d of %v within %d, want %d", got, after, span, want)
		}
	})
}

func TestEnoughFiles(t *testing.T) {
	t.Parallel()
	if err := enoughFiles(1); err != nil {
		t.Error(err)
	}
	if err := enoughFiles(1 << 30); err == nil || !strings.Contains(err.Error(), "ulimit") {
		t.Errorf("with more workers than there can be files: %v", err)
	}
}

func TestEar_HearsOnlyOfFailedTries(t *testing.T) {
	t.Parallel()
	var m moments
	log := slog.New(ear{&m}).With("coordinator", "c").WithGroup("g")
	log.Info(notAttached)
	log.Warn("something else")
	if n := len(m.all); n != 0 {
		t.Errorf("heard %d of 0", n)
	}
	log.Warn(notAttached)
	if n := len(m.all); n != 1 {
		t.Errorf("heard %d of 1", n)
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	for line, ok := range map[string]bool{
		"": true, "-workers 7": true, "-short": true,
		"more": false, "-workers 0": false, "-workers 10001": false, "-idle 0s": false, "-down -1s": false, "-limit 0s": false, "-unknown": false,
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			if _, err := parse(strings.Fields(line)); (err == nil) != ok {
				t.Errorf("error %v", err)
			}
		})
	}
	if o, err := parse([]string{"-short", "-workers", "7"}); err != nil || o != shortly() {
		t.Errorf("short: %+v, %v", o, err)
	}
}
