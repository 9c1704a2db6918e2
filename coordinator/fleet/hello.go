package fleet

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	maxPlatforms  = 64
	maxNameLength = 128
	maxSlots      = 1024
	// maxText bounds what an agent may say in words: versions, reasons, refusals.
	maxText       = 512
	maxLabels     = 32
	maxLabelKey   = 63
	maxLabelValue = 256
)

// present is what an agent last said of its worker. It is never modified.
type present struct {
	report   *archfarmv1.Report
	emulated []ocispecs.Platform // normalised
	at       time.Time
}

// newWorker checks what an agent says of itself, and that it is the one that it
// says it is.
func (f *Fleet) newWorker(ctx context.Context, hello *archfarmv1.Hello) (*Worker, error) {
	if hello == nil {
		return nil, status.Error(codes.InvalidArgument, "attaching a worker: the first message must be Hello")
	}
	if err := checkName(hello.GetName()); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "attaching a worker: %v", err)
	}
	who := identity.FromContext(ctx)
	pool, err := poolOf(who, hello)
	if err != nil {
		return nil, err
	}
	if n := len(hello.GetPlatforms()); n == 0 || n > maxPlatforms {
		return nil, status.Errorf(codes.InvalidArgument, "attaching worker %s: %d platforms, want 1 to %d", hello.GetName(), n, maxPlatforms)
	}
	if err := checkLabels(hello.GetLabels()); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "attaching worker %s: %v", hello.GetName(), err)
	}
	now, err := checkReport(hello.GetReport(), &present{})
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "attaching worker %s: %v", hello.GetName(), err)
	}
	w := &Worker{
		Name: hello.GetName(), Version: text(hello.GetVersion()), BuildKitVersion: text(hello.GetBuildkitVersion()), Machine: text(hello.GetMachine()),
		Pool: pool, Labels: maps.Clone(hello.GetLabels()), Since: now.at,
		who: who, fleet: f, outbox: make(chan *archfarmv1.AttachResponse, outboxSize), gone: make(chan struct{}),
		inline: hello.GetInlineConnections(),
	}
	w.now.Store(now)
	if w.Platforms, err = parsePlatforms(hello.GetPlatforms()); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "attaching worker %s: %v", w.Name, err)
	}
	w.platformNames = formatAll(w.Platforms)
	if p, ok := peer.FromContext(ctx); ok {
		w.Address = p.Addr.String()
	}
	return w, nil
}

// poolOf returns the pool that a worker belongs to. A certificate binds both its
// name and its pool; who is trusted without one may say what it likes.
func poolOf(who identity.Identity, hello *archfarmv1.Hello) (string, error) {
	name, pool := hello.GetName(), hello.GetPool()
	switch {
	case who.Kind == identity.Local && pool == "":
		return identity.DefaultPool, nil
	case who.Kind == identity.Local && !identity.ValidName(pool):
		return "", status.Errorf(codes.InvalidArgument, "attaching worker %s: pool %q: use letters, digits, '.', '_' and '-'", name, pool)
	case who.Kind == identity.Local:
		return pool, nil
	case who.Kind != identity.Worker:
		return "", status.Errorf(codes.PermissionDenied, "attaching worker %s: %s is no worker; join with a token made by \"archfarm token create --worker\"", name, who)
	case who.Name != name:
		return "", status.Errorf(codes.PermissionDenied, "attaching worker %s: the certificate is that of worker %s; use --name %s, or join anew under the other name", name, who.Name, who.Name)
	case len(who.Pools) != 1 || pool != "" && pool != who.Pools[0]:
		return "", status.Errorf(codes.PermissionDenied, "attaching worker %s: the certificate is for the pool %s and not %q; join anew with a token for that pool", name, strings.Join(who.Pools, ", "), pool)
	}
	return who.Pools[0], nil
}

func checkName(name string) error {
	if name == "" || len(name) > maxNameLength {
		return fmt.Errorf("the name must have 1 to %d characters", maxNameLength)
	}
	if !visible(name) {
		return fmt.Errorf("the name %q has characters other than visible ASCII", name)
	}
	return nil
}

func visible(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// checkLabels bounds what an operator may say of a worker.
func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fmt.Errorf("%d labels, at most %d are possible", len(labels), maxLabels)
	}
	for key, value := range labels {
		switch {
		case key == "" || len(key) > maxLabelKey || !visible(key) || strings.ContainsAny(key, "=,"):
			return fmt.Errorf("the label %q: its key must have 1 to %d visible ASCII characters other than '=' and ','", text(key), maxLabelKey)
		case utf8.RuneCountInString(value) > maxLabelValue || strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }):
			return fmt.Errorf("the label %s: its value must have at most %d printable characters", key, maxLabelValue)
		}
	}
	return nil
}

// checkReport bounds what an agent says of the present. What it said before saves
// the work of reading the same again.
func checkReport(r *archfarmv1.Report, before *present) (*present, error) {
	slots := r.GetSlots()
	if slots.GetTotal() > maxSlots || slots.GetUsed() > maxSlots {
		return nil, fmt.Errorf("%d of %d slots used, at most %d are possible", slots.GetUsed(), slots.GetTotal(), maxSlots)
	}
	now := &present{
		report: &archfarmv1.Report{Slots: slots, State: r.GetState(), Reason: text(r.GetReason()), Emulated: r.GetEmulated(), Load: plausible(r.GetLoad())},
		at:     time.Now(),
	}
	if slices.Equal(r.GetEmulated(), before.report.GetEmulated()) {
		now.report.Emulated, now.emulated = before.report.GetEmulated(), before.emulated
		return now, nil
	}
	if n := len(r.GetEmulated()); n > maxPlatforms {
		return nil, fmt.Errorf("%d emulated platforms, at most %d are possible", n, maxPlatforms)
	}
	var err error
	if now.emulated, err = parsePlatforms(r.GetEmulated()); err != nil {
		return nil, fmt.Errorf("emulated: %w", err)
	}
	return now, nil
}

// parsePlatforms reads platforms and normalises them.
func parsePlatforms(names []string) ([]ocispecs.Platform, error) {
	var out []ocispecs.Platform
	for _, name := range names {
		p, err := platforms.Parse(name)
		if err != nil {
			return nil, fmt.Errorf("platform %q: %w", text(name), err)
		}
		out = append(out, platforms.Normalize(p))
	}
	return out, nil
}

func formatAll(ps []ocispecs.Platform) []string {
	var out []string
	for _, p := range ps {
		out = append(out, platforms.FormatAll(p))
	}
	return out
}

// plausible is a load with every share within 0 to 1 and no more free than there
// is; shares that are no numbers are absent.
func plausible(l *archfarmv1.Load) *archfarmv1.Load {
	if l == nil {
		return nil
	}
	return &archfarmv1.Load{
		Cpu: share(l.Cpu), CpuPressure: share(l.CpuPressure), MemoryPressure: share(l.MemoryPressure), IoPressure: share(l.IoPressure),
		MemoryTotalBytes: l.GetMemoryTotalBytes(), MemoryAvailableBytes: min(l.GetMemoryAvailableBytes(), l.GetMemoryTotalBytes()),
		DiskTotalBytes: l.GetDiskTotalBytes(), DiskFreeBytes: min(l.GetDiskFreeBytes(), l.GetDiskTotalBytes()),
		CacheBytes: l.CacheBytes, OomKills: l.OomKills,
	}
}

func share(s *float64) *float64 {
	if s == nil || math.IsNaN(*s) {
		return nil
	}
	within := min(max(*s, 0), 1)
	return &within
}

// text makes an agent's words fit for errors, logs and tables.
func text(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s[:min(len(s), maxText)])
	return strings.TrimSpace(s)
}
