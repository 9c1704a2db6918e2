# Settings and helpers of the arm64 machine; sourced by image.sh and vm.sh, never run.
# Every setting may come from the environment.
# shellcheck shell=bash disable=SC2034

shopt -s inherit_errexit # die ends the script from within $(…) too

rig=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$(cd "$rig/../.." && pwd)/bin

# Which machine: several may run at once under different names.
: "${ARM64VM_NAME:=arm64-vm}"
# Host and port of the coordinator as the guest sees it: 10.0.2.2 is the host's 127.0.0.1.
: "${ARM64VM_COORDINATOR:=10.0.2.2:8372}"
: "${ARM64VM_SLOTS:=2}"
# Further arguments of `archfarm worker`, separated by spaces.
: "${ARM64VM_AGENT_ARGS:=}"
# linux/arm64 binaries, from `make arm64vm`. They go on a disk made at every start: a new one needs no new image.
# With an empty ARM64VM_AGENT the machine runs buildkitd alone.
: "${ARM64VM_AGENT=$bin/archfarm-linux-arm64}"
: "${ARM64VM_BUILDKITD:=$bin/tools/buildkitd-linux-arm64}"

# Images and downloads. Safe to delete while no machine runs, safe to share between checkouts.
: "${ARM64VM_CACHE:=${XDG_CACHE_HOME:-$HOME/.cache}/archfarm/arm64vm}"
# One folder per machine: pid, console, build cache.
: "${ARM64VM_RUN:=$ARM64VM_CACHE/run}"

# What the image is made of; a change makes a new one. Unpacked, their install scripts do not run.
: "${ARM64VM_KERNEL:=linux-image-cloud-arm64}"
: "${ARM64VM_PACKAGES:=busybox-static runc}"
# Files with apt sources, one-line (.list) or deb822 (.sources), separated by spaces.
: "${ARM64VM_SOURCES:=}"

# The virtual hardware.
: "${ARM64VM_CPUS:=$(nproc)}"
: "${ARM64VM_MEMORY:=2048}" # MiB
: "${ARM64VM_DISK:=16G}"    # for build cache; the file is sparse
: "${ARM64VM_CPU:=neoverse-n1}"
: "${ARM64VM_QEMU:=qemu-system-aarch64}"
: "${ARM64VM_TIMEOUT:=180}" # seconds that starting may take, and one line of output of `run`

PATH=$PATH:/usr/sbin:/sbin # mke2fs, for users who are not root

say() { echo "arm64vm: $*" >&2; }
die() {
	say "$*"
	exit 1
}
need() {
	local tool
	for tool in "$@"; do
		command -v "$tool" >/dev/null || die "$tool is missing: run deploy/setup.sh as root"
	done
}

# The files whose sources the image's packages come from: the host's own, without third parties
# where Debian's can be told from them.
sources() {
	local file found=()
	if [ -n "$ARM64VM_SOURCES" ]; then
		for file in $ARM64VM_SOURCES; do
			[ -r "$file" ] || die "cannot read $file, named in ARM64VM_SOURCES"
		done
		echo "$ARM64VM_SOURCES"
		return
	fi
	for file in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
		! grep -qsE '^(deb|Types:)' "$file" || found+=("$file")
	done
	if [ ${#found[@]} = 0 ]; then
		for file in /etc/apt/sources.list.d/*.{list,sources}; do
			! grep -qsE '^(deb|Types:)' "$file" || found+=("$file")
		done
	fi
	[ ${#found[@]} != 0 ] || die "no apt sources in /etc/apt; name files with Debian's in ARM64VM_SOURCES"
	echo "${found[@]}"
}

# The image's folder is named by a digest of everything that decides what is in it.
image_folder() {
	local files digest
	files=$(sources)
	# shellcheck disable=SC2086 # one word a file
	digest=$({
		cat $files
		echo "$ARM64VM_KERNEL $ARM64VM_PACKAGES"
		cat "$rig/image.sh" "$rig/guest/init"
	} | sha256sum | cut -c1-12)
	echo "$ARM64VM_CACHE/image-$digest"
}
