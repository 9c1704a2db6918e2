package legbuild

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
	// farmtest starts programs from a thread that lives as long as they may.
	if err := goleak.Find(goleak.IgnoreTopFunction("github.com/archfarm/archfarm/e2e/farmtest.spawn.func1.1")); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}
