package managed

import (
	"fmt"
	"testing"
)

func TestMountsUnder_LeavesAloneWhatIsNotAContainers(t *testing.T) {
	t.Parallel()
	mounts := "a /b/runc-overlayfs/executor/1/rootfs overlay\na /b/runc-overlayfs/executor/1/rootfs/with\\040space x\n" +
		"a /b/runc-overlayfs ext4\na /b ext4\na /bb/runc-x/executor/2 x\n"
	got := mountsUnder(mounts, "/b")
	if want := "[/b/runc-overlayfs/executor/1/rootfs/with space /b/runc-overlayfs/executor/1/rootfs]"; fmt.Sprint(got) != want {
		t.Errorf("mounts %s, want %s", got, want)
	}
}
