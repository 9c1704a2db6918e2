// Package fault names the moments at which a crash matters. Only a program built
// with the tag archfarm_faults can be made to die at one of them, by the variable
// ARCHFARM_FAULT; in any other a Point is nothing.
package fault

// The points, in the order in which the life of a job passes them.
const (
	JobSubmitted   = "job.submitted"   // durable, the client has no answer yet
	JobClaimed     = "job.claimed"     // leased, nothing said of it
	JobRunning     = "job.running"     // recorded as running
	LegStarted     = "leg.started"     // the attempt is recorded, the build begins
	LegBuilt       = "leg.built"       // pushed by digest, not recorded
	LegRecorded    = "leg.recorded"    // its digest is durable
	JobAssembled   = "job.assembled"   // the index exists in memory
	PublishGated   = "publish.gated"   // the gates are passed
	PublishBound   = "publish.bound"   // the tags are bound in the ledger
	PublishIndex   = "publish.index"   // the index is in the registry, no tag moved
	PublishTagged  = "publish.tagged"  // a tag moved; passed once for each
	PublishChecked = "publish.checked" // everything has been read back
	PublishSettled = "publish.settled" // the ledger says published
	JobEnded       = "job.ended"       // recorded as succeeded
)

// Points are all of them.
var Points = []string{
	JobSubmitted, JobClaimed, JobRunning, LegStarted, LegBuilt, LegRecorded, JobAssembled,
	PublishGated, PublishBound, PublishIndex, PublishTagged, PublishChecked, PublishSettled, JobEnded,
}
