package job

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

var suite farmtest.Shared

func TestMain(m *testing.M) {
	code := m.Run()
	if !suite.Close() && code == 0 {
		code = 1
	}
	if err := goleak.Find(
		// farmtest starts programs from a thread that lives as long as they may.
		goleak.IgnoreTopFunction("github.com/archfarm/archfarm/e2e/farmtest.spawn.func1.1"),
		// Connections to registries stay open for a while, for who is next.
		goleak.IgnoreTopFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreTopFunction("net/http.(*persistConn).writeLoop"),
		goleak.IgnoreTopFunction("internal/poll.runtime_pollWait"),
	); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}
