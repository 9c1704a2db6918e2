//go:build !archfarm_faults

package fault

// Point does nothing.
func Point(string) {}
