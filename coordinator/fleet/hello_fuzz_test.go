package fleet

import (
	"log/slog"
	"math"
	"slices"
	"strings"
	"testing"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// FuzzHello checks what is let into the fleet of what an agent says of itself.
func FuzzHello(f *testing.F) {
	for _, hello := range []*archfarmv1.Hello{
		{},
		{Name: "amd-1", Platforms: []string{"linux/amd64", "linux/arm/v7"}, Version: "v1", Report: &archfarmv1.Report{Slots: &archfarmv1.Slots{Total: 4, Used: 1}}},
		{Name: "a b", Platforms: []string{"linux/amd64"}}, {Name: "a", Platforms: []string{"linux(10)/x/y/z", "*", ""}},
		{Name: "a", Platforms: []string{"windows(10.0.17763+x)/amd64"}, Machine: "a\x1b[31m\nb", Report: &archfarmv1.Report{Slots: &archfarmv1.Slots{Total: 1 << 31}}},
		{Name: "a", Platforms: []string{"linux/amd64"}, Pool: "office", Labels: map[string]string{"zone": "office", "rack": "№ 7"}},
		{Name: "a", Platforms: []string{"linux/amd64"}, Pool: "../x", Labels: map[string]string{"a=b": "\x00", "": ""}},
		{Name: "a", Platforms: []string{"linux/amd64"}, Report: &archfarmv1.Report{Emulated: []string{"linux/arm64", "linux/s390x"}, Load: &archfarmv1.Load{
			Cpu: proto.Float64(1.5), CpuPressure: proto.Float64(math.NaN()), IoPressure: proto.Float64(math.Inf(-1)), DiskFreeBytes: 7,
		}}},
		{Name: "a", Platforms: []string{"linux/amd64"}, Report: &archfarmv1.Report{Emulated: []string{"no/such/platform/at/all"}}},
	} {
		raw, err := proto.Marshal(hello)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		hello := &archfarmv1.Hello{}
		if proto.Unmarshal(raw, hello) != nil {
			return
		}
		w, err := New(slog.New(slog.DiscardHandler), nil).newWorker(t.Context(), hello)
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("refused with %v", err)
			}
			return
		}
		if w.Name == "" || len(w.Name) > maxNameLength || len(w.Platforms) != len(w.platformNames) || len(w.Platforms) > maxPlatforms {
			t.Errorf("let in: %+v", w)
		}
		if w.Pool == "" || !identity.ValidName(w.Pool) || len(w.Labels) > maxLabels || len(w.Emulated()) > maxPlatforms {
			t.Errorf("let in: %+v", w)
		}
		for key, value := range w.Labels {
			if key == "" || len(key) > maxLabelKey || len([]rune(value)) > maxLabelValue || strings.ContainsFunc(key+value, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("let in with the label %q=%q", key, value)
			}
		}
		l := w.Load()
		if l == nil {
			l = &archfarmv1.Load{}
		}
		for _, share := range []*float64{l.Cpu, l.CpuPressure, l.MemoryPressure, l.IoPressure} {
			if share != nil && !(*share >= 0 && *share <= 1) {
				t.Errorf("let in with a share of %v", *share)
			}
		}
		if l.GetDiskFreeBytes() > l.GetDiskTotalBytes() || l.GetMemoryAvailableBytes() > l.GetMemoryTotalBytes() {
			t.Errorf("let in with %v", l)
		}
		for _, p := range slices.Concat(w.Platforms, w.Emulated()) {
			if p.OS == "" || p.Architecture == "" {
				t.Errorf("let in with the platform %+v", p)
			}
		}
		for _, words := range []string{w.Version, w.BuildKitVersion, w.Machine, w.Report().GetReason()} {
			for _, r := range words {
				if !unicode.IsPrint(r) {
					t.Errorf("let in with %q", words)
				}
			}
		}
		if s := w.Report().GetSlots(); s.GetTotal() > maxSlots || s.GetUsed() > maxSlots {
			t.Errorf("let in with %v", s)
		}
	})
}
