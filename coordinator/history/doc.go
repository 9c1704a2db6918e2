// Package history remembers builds as a buildkitd does: one record per build,
// whatever number of legs it had, with the logs, attestations, results and trace
// that it names. The records outlive the workers and the coordinator.
//
// A Recorder writes one record. It is visible to clients as soon as the build has
// been answered, and in the store a moment later: no client waits for that.
package history

import "time"

// Defaults of Limits: BuildKit's own for age and number.
const (
	DefaultMaxAge     = 48 * time.Hour
	DefaultMaxEntries = 50
	DefaultMaxSize    = 1 << 30
)

const (
	// maxJSON bounds an index or a manifest, in bytes.
	maxJSON = 4 << 20
	// maxCopy bounds another blob that is copied from a worker; what is larger
	// stays there and is passed through while the worker is attached.
	maxCopy = 32 << 20
	// maxBlobs bounds the blobs that are copied for one build.
	maxBlobs = 1000
	// maxFresh is the size, in bytes, up to which a blob waits in memory, not in a file, for
	// the store.
	maxFresh = 1 << 20
	// maxLogs bounds a build's logs, in bytes. What comes after is left out.
	maxLogs = 256 << 20
	// maxPending bounds the events that a listener has not read yet.
	maxPending = 10_000

	// fetchTimeout bounds the wait for what one worker remembers of a leg.
	fetchTimeout = 5 * time.Second
	// copyTimeout bounds the copying of what a build's results consist of.
	copyTimeout = 30 * time.Second
	// progressGrace bounds the wait for the end of a build's progress once it has
	// been answered.
	progressGrace = 5 * time.Second
	// tracePatience is for how long spans are awaited when nobody asks for the
	// trace (BuildKit solver/llbsolver/history.go).
	tracePatience = 3 * time.Second
	// gcInterval is BuildKit's.
	gcInterval = 2 * time.Minute
)

// The media types of what a record names, which are BuildKit's.
const (
	typeLogs  = "application/vnd.buildkit.status.v0"
	typeTrace = "application/vnd.buildkit.otlp.json.v0"
	typeError = "application/vnd.googleapis.google.rpc.status+proto"
)
