#!/bin/sh
# Downloads archfarm and BuildKit onto a Linux machine, and installs what the checksums vouch for. deploy/lima and
# deploy/cloud-init run it at first boot; it does nothing where /usr/local/bin holds these versions already. Settings,
# from the file named by the first argument (default /etc/archfarm/fetch.env) or from the environment:
#   ARCHFARM_URL       of the binary for this machine, as make cross makes it; https:// or file://
#   ARCHFARM_SHA256    its SHA-256 sum; may be left out for file://
#   BUILDKIT_VERSION   v0.34.2
#   BUILDKIT_URL       of the release archive (default: the one on GitHub for this machine)
#   BUILDKIT_SHA256    the archive's SHA-256 sum
set -eu

die() {
	echo "fetch: $*" >&2
	exit 1
}
settings=${1:-/etc/archfarm/fetch.env}
case $settings in */*) ;; *) settings=./$settings ;; esac # for "."
# shellcheck source=/dev/null
[ ! -f "$settings" ] || . "$settings"
bin=${FETCH_BIN:-/usr/local/bin}

case ${ARCHFARM_URL:-} in
file://*) : "${ARCHFARM_SHA256:=$(sha256sum <"${ARCHFARM_URL#file://}" | cut -d' ' -f1)}" ;;
esac
for name in ARCHFARM_URL ARCHFARM_SHA256 BUILDKIT_VERSION BUILDKIT_SHA256; do
	eval "value=\${$name:-}"
	[ -n "$value" ] || die "$name is not set; see $settings"
done
case $(uname -m) in
aarch64 | arm64) arch=arm64 ;;
x86_64) arch=amd64 ;;
*) arch=$(uname -m) ;;
esac
: "${BUILDKIT_URL:=https://github.com/moby/buildkit/releases/download/$BUILDKIT_VERSION/buildkit-$BUILDKIT_VERSION.linux-$arch.tar.gz}"

stamp=$bin/.archfarm-fetched
if [ "$(cat "$stamp" 2>/dev/null)" = "$ARCHFARM_SHA256 $BUILDKIT_SHA256" ]; then
	exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
get() { # URL SHA256 FILE
	curl --fail --silent --show-error --location --retry 5 --retry-connrefused --proto '=https,file' --output "$3" "$1" ||
		die "cannot download $1"
	echo "$2  $3" | sha256sum --check --status || die "$1 has another SHA-256 sum than $2: $(sha256sum <"$3" | cut -d' ' -f1)"
}
get "$ARCHFARM_URL" "$ARCHFARM_SHA256" "$work/archfarm"
get "$BUILDKIT_URL" "$BUILDKIT_SHA256" "$work/buildkit.tar.gz"
tar -xzf "$work/buildkit.tar.gz" -C "$work"
# Not buildkit-qemu-*, the emulators: this farm builds natively.
rm -f "$work"/bin/buildkit-qemu-*

mkdir -p "$bin"
for file in "$work/archfarm" "$work"/bin/*; do
	install -m 0755 "$file" "$bin/.new" # in two steps, as the old one may be running
	mv "$bin/.new" "$bin/${file##*/}"
done
echo "$ARCHFARM_SHA256 $BUILDKIT_SHA256" >"$stamp"
