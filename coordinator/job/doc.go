// Package job is the coordinator's second door: builds that clients submit and
// leave. A job is durable before its submission is answered; whichever coordinator
// holds its lease runs its legs, each as a build at the farm's own endpoint,
// assembles what they pushed, and publishes it.
//
// The way of a job: server (submit.go, server.go) stores it; runner (runner.go) claims
// it; work (work.go) does what plan (plan.go, pure) says: attempts of its legs (leg.go),
// then index and tags (finish.go). All that happens to it goes through its recorder
// (record.go), conditional on the lease, and what is durable comes out of the feed
// (watch.go).
package job
