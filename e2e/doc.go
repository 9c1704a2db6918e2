// Package e2e holds the end-to-end tests: a real farm (coordinator, agents, buildkitds), a real registry, and the stock
// clients docker buildx and buildctl. They need root and the tools of make tools; see farmtest.FindTools.
//
// With ARCHFARM_E2E_BACKEND=direct the scenarios run against one plain buildkitd instead of a farm. That is how to tell
// whether an expectation is BuildKit's behaviour or only ours; scenarios about the farm itself are skipped then.
package e2e
