package main

import (
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"
)

// init sizes gRPC's buffers for what is relayed most: pieces of 32 KiB with a few bytes of header. Of its own sizes the
// next one is 1 MiB, and a buffer is cleared whole each time that it is used again: a fifth of the coordinator's CPU time.
func init() {
	const kib = 1 << 10
	experimental.SetDefaultBufferPool(mem.NewTieredBufferPool(256, 4*kib, 16*kib, 33*kib, 66*kib, 264*kib, 1056*kib))
}
