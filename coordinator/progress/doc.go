// Package progress makes one status stream out of those of a build's legs.
//
// A Leg translates what one worker reports, so that the vertices of several
// workers can stand beside each other: BuildKit derives some digests from the
// session, which the legs share, so they would collide. A Stream keeps what was
// published and hands it to any number of subscribers, each at its own pace. A
// Step is a vertex of the farm's own, such as the wait for a worker.
//
// Messages are shared, never copied more than needed: whoever passes a
// StatusResponse to this package, or gets one from it, must not change it
// afterwards.
package progress
