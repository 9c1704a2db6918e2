#!/bin/sh
# Installs the Debian packages that `make test` and `make demo` need. Does nothing when all are there.
# With --ci, also what only the checks in .ci/run need; with --bench, what only `make bench` needs.
set -eu

# binary:package. A package counts as installed when its binary is there, whoever put it there.
needed="
make:make
gcc:gcc
git:git
runc:runc
busybox:busybox-static
ssh-agent:openssh-client
qemu-system-aarch64:qemu-system-arm
cpio:cpio
mke2fs:e2fsprogs
flock:util-linux
ip:iproute2
nft:nftables
sysctl:procps
"
if [ "${1:-}" = --ci ]; then
	needed="$needed shellcheck:shellcheck systemd-analyze:systemd python3:python3"
elif [ "${1:-}" = --bench ]; then
	needed="$needed qemu-aarch64:qemu-user" # the package that registers no emulator with the kernel
fi

PATH=$PATH:/usr/sbin:/sbin
missing=
for pair in $needed; do
	command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
# PostgreSQL's server, which is not on the PATH: the tests start their own.
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing postgresql"
# The race detector links with the C library.
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
# apt reads the arm64 machine's packages over https where the sources say so.
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"
# Containers FROM scratch hold nothing but busybox, so it has to be the static one.
if command -v dpkg-query >/dev/null; then
	case "$missing" in
	*busybox-static*) ;;
	*) dpkg-query -W -f '${Status}' busybox-static 2>/dev/null | grep -q ' installed$' || missing="$missing busybox-static" ;;
	esac
fi
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "setup: this machine has no apt-get; install the equivalents of these Debian packages:$missing" >&2
	exit 1
fi
if [ "$(id -u)" != 0 ]; then
	echo "setup: these packages are missing; install them as root: apt-get install$missing" >&2
	exit 1
fi

echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086 # one word a package
install() { apt-get install -y -qq --no-install-recommends $missing >"$log" 2>&1 </dev/null; }

# The package lists may be absent or stale: refresh them only when the install does not work without.
if ! install; then
	if ! apt-get update -qq >"$log" 2>&1 || ! install; then
		tail -n 20 "$log" >&2
		echo "setup: apt-get could not install$missing; its last lines are above" >&2
		exit 1
	fi
fi
