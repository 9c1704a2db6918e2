package fleet

import (
	"context"
	"log/slog"
	"testing"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// silence is an agent's stream of which only the context matters.
type silence struct {
	archfarmv1.AgentService_AttachServer
}

func (silence) Context() context.Context { return context.Background() }

// FuzzHello checks what is let into the fleet of what an agent says of itself.
func FuzzHello(f *testing.F) {
	for _, hello := range []*archfarmv1.Hello{
		{},
		{Name: "amd-1", Platforms: []string{"linux/amd64", "linux/arm/v7"}, Version: "v1", Report: &archfarmv1.Report{Slots: &archfarmv1.Slots{Total: 4, Used: 1}}},
		{Name: "a b", Platforms: []string{"linux/amd64"}}, {Name: "a", Platforms: []string{"linux(10)/x/y/z", "*", ""}},
		{Name: "a", Platforms: []string{"windows(10.0.17763+x)/amd64"}, Machine: "a\x1b[31m\nb", Report: &archfarmv1.Report{Slots: &archfarmv1.Slots{Total: 1 << 31}}},
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
		w, err := New(slog.New(slog.DiscardHandler), nil).newWorker(hello, silence{})
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("refused with %v", err)
			}
			return
		}
		if w.Name == "" || len(w.Name) > maxNameLength || len(w.Platforms) != len(w.platformNames) || len(w.Platforms) > maxPlatforms {
			t.Errorf("let in: %+v", w)
		}
		for _, p := range w.Platforms {
			if p.OS == "" || p.Architecture == "" {
				t.Errorf("let in with the platform %+v", p)
			}
		}
		for _, words := range []string{w.Version, w.BuildKitVersion, w.Machine, w.report.GetReason()} {
			for _, r := range words {
				if !unicode.IsPrint(r) {
					t.Errorf("let in with %q", words)
				}
			}
		}
		if s := w.report.GetSlots(); s.GetTotal() > maxSlots || s.GetUsed() > maxSlots {
			t.Errorf("let in with %v", s)
		}
	})
}
