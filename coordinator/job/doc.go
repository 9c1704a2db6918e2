// Package job is the coordinator's second door: builds that clients submit and
// leave. A job is durable before its submission is answered; whichever coordinator
// holds its lease runs its legs, each as a build at the farm's own endpoint,
// assembles what they pushed, and publishes it.
package job
