//go:build !linux

package managed

func (*Daemon) clear() error { return nil }
