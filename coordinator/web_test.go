package coordinator

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/coordinator/schedule"
)

// served is a coordinator's web, without the rest of it being served.
func served(t *testing.T, cfg Config) (c *coordinator, get func(method, path string) (int, string)) {
	t.Helper()
	cfg.Listen, cfg.DataDir, cfg.Version = []address.Address{tcp}, t.TempDir(), "v1.2.3"
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	c, err := assembleCoordinator(t.Context(), cfg, &dataDir{own: cfg.DataDir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.closeHistory(context.WithoutCancel(t.Context())), c.closeJobs()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(c.farm.Fleet.Close)
	var bound Bound
	calls, err := c.inside.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = calls.Close() })
	server, listener, err := c.web(t.Context(), calls, &bound)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener.secured) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return c, func(method, path string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+bound.HTTP+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, string(body)
	}
}

func TestWeb_ADrainingCoordinatorIsHealthyButNotReady(t *testing.T) {
	t.Parallel()
	c, get := served(t, Config{HTTP: "127.0.0.1:0"})
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := get(http.MethodGet, path); code != http.StatusOK || body != "ok\n" {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	if err := c.builds.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if code, body := get(http.MethodGet, "/readyz"); code != http.StatusServiceUnavailable || body != "draining\n" {
		t.Errorf("/readyz while draining: %d %q", code, body)
	}
	if code, _ := get(http.MethodGet, "/healthz"); code != http.StatusOK {
		t.Errorf("/healthz while draining: %d", code)
	}
}

func TestWeb_Metrics(t *testing.T) {
	t.Parallel()
	c, get := served(t, Config{HTTP: "127.0.0.1:0"})
	c.farm.Metrics.Begun()("OK")
	code, body := get(http.MethodGet, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("%d %s", code, body)
	}
	for _, line := range []string{
		`archfarm_build_info{goversion=`, `version="v1.2.3"} 1`, `archfarm_builds_total{code="OK"} 1`, "archfarm_builds_running 0", "archfarm_sessions 0",
		"go_goroutines ", "process_resident_memory_bytes ",
	} {
		if !strings.Contains(body, line) {
			t.Errorf("no %q among the metrics", line)
		}
	}
}

func TestWeb_OffersNothingElse(t *testing.T) {
	t.Parallel()
	_, get := served(t, Config{HTTP: "127.0.0.1:0"})
	for _, path := range []string{"/", "/debug/pprof/", "/debug/pprof/heap", "/healthz/x"} {
		if code, _ := get(http.MethodGet, path); code != http.StatusNotFound {
			t.Errorf("%s: %d", path, code)
		}
	}
	if code, _ := get(http.MethodPost, "/readyz"); code != http.StatusMethodNotAllowed {
		t.Errorf("POST /readyz: %d", code)
	}
}

func TestWeb_ProfilesOnlyWhenAskedFor(t *testing.T) {
	t.Parallel()
	_, get := served(t, Config{HTTP: "127.0.0.1:0", Pprof: true})
	if code, body := get(http.MethodGet, "/debug/pprof/goroutine?debug=1"); code != http.StatusOK || !strings.Contains(body, "goroutine profile") {
		t.Errorf("%d %s", code, body)
	}
}

func TestWeb_NowhereWhenNoAddressIsGiven(t *testing.T) {
	t.Parallel()
	c := &coordinator{}
	var bound Bound
	server, listener, err := c.web(t.Context(), nil, &bound)
	if err != nil || bound.HTTP != "" {
		t.Fatalf("bound to %q, %v", bound.HTTP, err)
	}
	if err := server.Serve(listener.secured); !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}

func TestWeb_AddressInUse(t *testing.T) {
	t.Parallel()
	other, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	c := &coordinator{cfg: Config{HTTP: other.Addr().String()}}
	_, _, err = c.web(context.Background(), nil, &Bound{})
	if err == nil || !strings.Contains(err.Error(), other.Addr().String()) {
		t.Errorf("got %v", err)
	}
}

func TestWeb_AutoscalersSeeZeroWhereNothingWaits(t *testing.T) {
	t.Parallel()
	amd, arm := platforms.MustParse("linux/amd64"), platforms.MustParse("linux/arm64")
	workers := []schedule.Worker{
		{Name: "a", Pool: "cloud", Platforms: []ocispecs.Platform{amd}, Slots: 4, Used: 3},
		{Name: "b", Pool: "cloud", Platforms: []ocispecs.Platform{amd}, Slots: 4, Used: 1, State: schedule.Draining},
		{Name: "c", Pool: "office", Platforms: []ocispecs.Platform{arm}, Slots: 2, Used: 5}, // another coordinator's word is late
		{Name: "d", Pool: "office", Platforms: []ocispecs.Platform{arm}, Slots: 2, State: schedule.Cordoned},
		{Name: "e", Pool: "office", Platforms: []ocispecs.Platform{arm}, Slots: 2, State: schedule.Unavailable},
	}
	waiting := map[schedule.Place]int{{Platform: "linux/arm64", Pool: "any"}: 7, {Platform: "any", Pool: "any"}: 1}
	depths := queueDepths(workers, waiting)
	if want := (map[schedule.Place]int{
		{Platform: "linux/amd64", Pool: "cloud"}: 0, {Platform: "linux/amd64", Pool: "any"}: 0,
		{Platform: "linux/arm64", Pool: "office"}: 0, {Platform: "linux/arm64", Pool: "any"}: 7, {Platform: "any", Pool: "any"}: 1,
	}); !maps.Equal(depths, want) {
		t.Errorf("depths %v, want %v", depths, want)
	}
	slots := slotCounts(workers)
	if got, want := slots[schedule.Place{Platform: "linux/amd64", Pool: "cloud"}], map[string]int{"used": 4, "free": 1, "draining": 3}; !maps.Equal(got, want) {
		t.Errorf("amd64: %v, want %v", got, want)
	}
	if got, want := slots[schedule.Place{Platform: "linux/arm64", Pool: "office"}], map[string]int{"used": 2, "free": 0, "cordoned": 2, "unavailable": 2}; !maps.Equal(got, want) {
		t.Errorf("arm64: %v, want %v", got, want)
	}
}

func TestWeb_MetricsOfTheFleet(t *testing.T) {
	t.Parallel()
	c, get := served(t, Config{HTTP: "127.0.0.1:0"})
	c.farm.Scheduler.Update([]schedule.Worker{{Name: "a", Pool: "cloud", Platforms: []ocispecs.Platform{platforms.MustParse("linux/amd64")}, Slots: 2, Used: 1}})
	_, body := get(http.MethodGet, "/metrics")
	for _, line := range []string{
		`archfarm_queue_depth{platform="linux/amd64",pool="any"} 0`, `archfarm_queue_depth{platform="linux/amd64",pool="cloud"} 0`,
		`archfarm_slots{platform="linux/amd64",pool="cloud",state="free"} 1`, `archfarm_slots{platform="linux/amd64",pool="cloud",state="cordoned"} 0`,
		`archfarm_worker_slots{platform="linux/amd64",pool="cloud",state="used",worker="a"} 1`, `archfarm_worker_state{platform="linux/amd64",pool="cloud",state="ready",worker="a"} 1`,
	} {
		if !strings.Contains(body, line+"\n") {
			t.Errorf("no %q among the metrics", line)
		}
	}
}
