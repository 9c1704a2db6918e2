#!/usr/bin/env bash
# `make test`: the unit and property tests, and after them, alone, the end-to-end tests, which know time limits.
# Everything runs with the race detector, the farm under test too. The summary lines of go test come last.
set -euo pipefail
cd "$(dirname "$0")/.."

root=
if [ "$(id -u)" = 0 ]; then
	root=yes
else
	echo "test: not root: SKIPPING the end-to-end tests, which need buildkitds and the arm64 machine; run make test as root for them"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/races"
mapfile -t units < <(go list ./... | grep -v '/e2e$')
status=0

# Before the first test starts, so that none of them competes with the compiler.
echo "test: compiling with the race detector"
go build -race ./...
# The tag lets tests kill it at the moments of package fault.
[ -z "$root" ] || go build -race -tags archfarm_faults -o bin/archfarm-race ./cmd/archfarm

run() { # NAME ARGUMENT… of go test
	local name=$1 began=$SECONDS
	shift
	go test -race -count=1 "$@" 2>&1 | tee "$work/$name.log" || status=1
	echo "test: $name took $((SECONDS - began)) s"
}
run unit -timeout 10m "${units[@]}"
if [ -n "$root" ]; then
	# A program that finds a race says so in a file there, even when a test kills it afterwards.
	export GORACE=log_path=$work/races/report
	ARCHFARM_E2E=require ARCHFARM_E2E_ARM64=1 ARCHFARM_E2E_BINARY=$PWD/bin/archfarm-race \
		run e2e -timeout 25m -parallel 4 ./e2e
	if [ -n "$(ls "$work/races")" ]; then
		echo "test: data races in the programs of the end-to-end tests:"
		cat "$work/races"/*
		status=1
	fi
fi

echo "test: summary"
grep -hE '^(ok|FAIL|panic:|\?|---\ FAIL:)[[:space:]]' "$work"/{unit,e2e}.log 2>/dev/null | sed '/no test files/d' || true
exit $status
