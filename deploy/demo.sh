#!/usr/bin/env bash
# `make demo`: a whole farm on this machine, and one build on it. A registry, a coordinator, an amd64
# worker, and an arm64 worker in a machine of its own; stock docker buildx builds examples/hello for
# both through the one endpoint. Checks what was built, tells it, cleans up, and fails loudly.
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
tools=$repo/bin/tools
archfarm=$repo/bin/archfarm

[ "$(id -u)" = 0 ] || { echo "demo: needs root, which buildkitd needs to run build steps" >&2; exit 1; }
[ "$(uname -m)" = x86_64 ] || { echo "demo: the host plays the amd64 machine, so it has to be one; this is $(uname -m)" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/archfarm-demo.XXXXXX")
logs=$work/logs
mkdir "$logs"
export ARM64VM_NAME=arm64-vm ARM64VM_RUN=$work/vm
pids=() # newest first
passed=''
interrupted=''

cleanup() {
	local pid mount
	trap - EXIT
	trap '' INT TERM # once is enough
	"$repo/deploy/arm64vm/vm.sh" stop >>"$logs/arm64-vm.log" 2>&1 || true
	for pid in "${pids[@]}"; do
		kill -TERM "$pid" 2>/dev/null || true
		for _ in $(seq 100); do
			kill -0 "$pid" 2>/dev/null || break
			sleep 0.1
		done
		kill -KILL "$pid" 2>/dev/null || true
	done
	# A buildkitd that was killed leaves its mounts.
	while read -r mount; do umount -l "$mount" || true; done < <(awk -v under="$work/" 'index($5, under) == 1 {print $5}' /proc/self/mountinfo | sort -r)
	if [ -n "$passed" ]; then
		rm -rf "$work"
		return
	fi
	if [ -n "$interrupted" ]; then
		rm -rf "$work"
		exit 130
	fi
	find "$work" -mindepth 1 -maxdepth 1 ! -path "$logs" -exec rm -rf {} +
	echo >&2
	echo "demo: FAILED. The last lines of each log:" >&2
	for log in "$logs"/*; do
		echo "--- $log" >&2
		tail -n 15 "$log" >&2
	done
	exit 1
}
trap cleanup EXIT
trap 'interrupted=yes; exit' INT TERM

heading() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
[ -t 1 ] || heading() { printf '\n== %s\n' "$*"; }
row() { printf '   %-12s %-16s %s\n' "$@"; }
fail() {
	echo "demo: $*" >&2
	exit 1
}
spawn() { # LOG COMMAND…: in the background
	local log=$logs/$1.log
	shift
	"$@" >"$log" 2>&1 </dev/null &
	pids=($! "${pids[@]}")
}
await() { # SECONDS WHAT COMMAND…: until the command succeeds
	local limit=$((SECONDS + $1)) what=$2 pid
	shift 2
	until "$@" >/dev/null 2>&1; do
		for pid in "${pids[@]}"; do
			kill -0 "$pid" 2>/dev/null || fail "a process ended while the demo waited for $what"
		done
		[ $SECONDS -lt $limit ] || fail "$what did not come up in time"
		sleep 0.1
	done
}
listening() { : <"/dev/tcp/127.0.0.1/$1"; }
taken=" "
free_port() { # sets $port to one that nobody listens on and that this function has not given before
	while :; do
		port=$((20000 + RANDOM % 10000))
		[[ $taken != *" $port "* ]] || continue
		(listening "$port") 2>/dev/null || break
	done
	taken+="$port "
}
free_port && registry=localhost:$port registry_port=$port
free_port && farm=$port
free_port && http=$port
free_port && gossip=$port

heading "1. A farm on this machine"
row registry "$registry" "where the image goes"
row coordinator "127.0.0.1:$farm" "the only address that docker buildx gets to know"
row amd64-host worker "this machine: a buildkitd and its agent, on $(uname -sr) $(uname -m)"
row arm64-vm worker "a virtual arm64 machine, booting now: the same two, on a kernel of its own, behind NAT, by mutual TLS"
cat >"$work/registry.yml" <<END
version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: "$work/registry"}}
http: {addr: "127.0.0.1:$registry_port"}
END
OTEL_TRACES_EXPORTER=none spawn registry "$tools/registry" serve "$work/registry.yml"
spawn coordinator "$archfarm" coordinator --listen "127.0.0.1:$farm" --http "127.0.0.1:$http" \
	--gossip "127.0.0.1:$gossip" --data-dir "$work/coordinator"
spawn amd64-buildkitd "$tools/buildkitd" --root "$work/buildkit" --addr "unix://$work/buildkitd.sock" \
	--config /dev/null --oci-worker-net=host --cdi-disabled
await 30 "the registry" listening "$registry_port"
await 30 "the coordinator" listening "$farm"
await 60 "buildkitd" test -S "$work/buildkitd.sock"
spawn amd64-worker "$archfarm" worker --name amd64-host --join "127.0.0.1:$gossip" --gossip 127.0.0.1:0 \
	--buildkit "unix://$work/buildkitd.sock" --slots 2 --data-dir "$work/worker"
# What comes from another machine is encrypted, and has a certificate.
token=$("$archfarm" token create --worker --farm "unix://$work/coordinator/admin.sock")
ARM64VM_COORDINATOR=10.0.2.2:$farm ARM64VM_AGENT_ARGS="--token $token" deploy/arm64vm/vm.sh start >>"$logs/arm64-vm.log" 2>&1

workers() { "$archfarm" workers --farm "tcp://127.0.0.1:$farm" "$@"; }
both_ready() { [ "$(workers --output json | tr -d ' \n\t' | grep -o '"state":"ready"' | wc -l)" = 2 ]; }
await 60 "both workers" both_ready
printf '\n$ archfarm workers --farm %s\n' "tcp://127.0.0.1:$farm"
workers

heading "2. Stock docker buildx builds examples/hello for both platforms, through the coordinator"
export BUILDX_CONFIG=$work/buildx # the user's own builders stay as they are
if docker buildx version >/dev/null 2>&1; then
	buildx=(docker buildx)
elif command -v docker >/dev/null; then
	# The docker command finds its plugins in its configuration folder.
	export DOCKER_CONFIG=$work/docker
	mkdir -p "$DOCKER_CONFIG/cli-plugins"
	ln -s "$tools/buildx" "$DOCKER_CONFIG/cli-plugins/docker-buildx"
	buildx=(docker buildx)
	echo "(docker has no buildx on this machine: lending it the one that make tools built)"
else
	buildx=("$tools/buildx")
	echo "(no docker on this machine: \"docker buildx\" below is $tools/buildx, which make tools built)"
fi
buildx() {
	printf '$ docker buildx %s\n' "$*"
	(cd "$work" && "${buildx[@]}" "$@") 2>&1
}
cp -R examples "$work" # the checkout stays as it is
cp "$(command -v busybox)" "$work/examples/hello/busybox-amd64"
cp "$(deploy/arm64vm/image.sh)/busybox" "$work/examples/hello/busybox-arm64"
image=$registry/hello:latest
buildx create --name farm --driver remote "tcp://127.0.0.1:$farm"
began=$(date +%s%N)
buildx build --builder farm --platform linux/amd64,linux/arm64 --tag "$image" --push \
	--metadata-file metadata.json --progress plain examples/hello | tee "$logs/build.log"
took=$((($(date +%s%N) - began) / 100000000))

heading "3. The index in the registry"
buildx imagetools inspect "$image" | tee "$logs/index.log"
echo "(unknown/unknown are the attestations: how each of the two images was built)"
digest=$(sed -n 's/.*"containerimage.digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' "$work/metadata.json" | head -n 1)
[ -n "$digest" ] || fail "--metadata-file holds no containerimage.digest"
inspected=$(sed -n 's/^Digest: *//p' "$logs/index.log")
[ "$digest" = "$inspected" ] || fail "--metadata-file says $digest, the registry $inspected"

heading "4. Where each leg ran, and what uname said in its RUN step"
go run ./deploy/imagefile "$registry/hello@$digest" /uname >"$work/unames"
worker() { sed -nE "s,.* \\[linux/$1\\] assigned to worker ([^ ]+) .*,\\1,p" "$logs/build.log" | head -n 1; }
said() { sed -n "s,^linux/$1	,,p" "$work/unames"; }
row platform worker "the file /uname, read from the image's layer in the registry"
row linux/amd64 "$(worker amd64)" "$(said amd64)"
row linux/arm64 "$(worker arm64)" "$(said arm64)"
row "" "" "(this machine itself: $(uname -m) $(uname -r))"
[ "$(worker amd64)" = amd64-host ] || fail "the build's progress does not say that linux/amd64 went to amd64-host"
[ "$(worker arm64)" = arm64-vm ] || fail "the build's progress does not say that linux/arm64 went to arm64-vm"
[ "$(said amd64)" = "x86_64 $(uname -r)" ] || fail "linux/amd64 was not built natively on this machine"
read -r machine kernel <<<"$(said arm64)"
[ "$machine" = aarch64 ] || fail "linux/arm64 was built on '$machine'"
[ "$kernel" != "$(uname -r)" ] || fail "linux/arm64 ran on this machine's kernel, so BuildKit emulated it"
[ "$kernel" = "$(deploy/arm64vm/vm.sh run uname -r)" ] || fail "linux/arm64 ran on a kernel $kernel that is not the arm64 machine's"

passed=yes
printf '\nOne Dockerfile, one endpoint, one build of %s s: each leg ran on a machine of its own architecture,\n' "$((took / 10)).$((took % 10))"
printf 'and %s names one index with both. Cleaning up.\n' "$image"
