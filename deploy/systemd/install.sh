#!/bin/sh
# Installs archfarm as a service on a Linux machine with systemd, or updates it. Run it as root from a checkout,
# or from a copy of this folder:
#   install.sh coordinator ARCHFARM          ARCHFARM: the binary, say bin/archfarm-linux-arm64
#   install.sh worker ARCHFARM [BUILDKIT]    BUILDKIT: a folder with buildkitd, and with buildkit-runc or runc
# Settings that are there stay as they are. It starts nothing: the last line says how.
set -eu

usage() {
	sed -n 's/^#   \(install.sh.*\)/usage: \1/p' "$0" >&2
	exit 2
}
die() {
	echo "install: $*" >&2
	exit 1
}
role=${1:-} archfarm=${2:-} buildkit=${3:-}
case $role in coordinator | worker) ;; *) usage ;; esac
[ -n "$archfarm" ] || usage
here=$(dirname "$0")
root=${DESTDIR:-} # where packages are made; empty on a machine

[ -f "$archfarm" ] || die "$archfarm is not a file; make build or make cross makes one"
if [ -z "$root" ]; then
	[ "$(id -u)" = 0 ] || die "needs root"
	[ -d /run/systemd/system ] || die "systemd does not run here: run archfarm $role by other means"
	"$archfarm" --version >/dev/null || die "$archfarm does not run here: is it for another kind of machine than $(uname -m)?"
fi

bin=$root/usr/local/bin
mkdir -p "$bin" "$root/etc/systemd/system" "$root/usr/lib/sysusers.d" "$root/usr/lib/tmpfiles.d"
install -d -m 0700 "$root/etc/archfarm"
put() { # MODE FROM TO: also over a program that runs
	install -m "$1" "$2" "$3.new"
	mv "$3.new" "$3"
}
put 0755 "$archfarm" "$bin/archfarm"
if [ -n "$buildkit" ]; then
	[ -f "$buildkit/buildkitd" ] || die "there is no buildkitd in $buildkit"
	# buildkit-qemu-*, the emulators, stay behind: this farm builds natively.
	for program in buildkitd buildctl buildkit-runc runc; do
		[ ! -f "$buildkit/$program" ] || put 0755 "$buildkit/$program" "$bin/$program"
	done
fi
put 0644 "$here/archfarm-$role.service" "$root/etc/systemd/system/archfarm-$role.service"
[ "$role" = worker ] || put 0644 "$here/archfarm-$role.socket" "$root/etc/systemd/system/archfarm-$role.socket"
put 0644 "$here/archfarm.sysusers.conf" "$root/usr/lib/sysusers.d/archfarm.conf"
put 0644 "$here/archfarm.tmpfiles.conf" "$root/usr/lib/tmpfiles.d/archfarm.conf"
[ -e "$root/etc/archfarm/$role.env" ] || put 0600 "$here/$role.env" "$root/etc/archfarm/$role.env"
[ -z "$root" ] || exit 0

if [ "$role" = coordinator ]; then
	systemd-sysusers /usr/lib/sysusers.d/archfarm.conf
else
	PATH=$PATH:/usr/local/bin
	command -v buildkitd >/dev/null || die "there is no buildkitd: name the folder of one, or put one into /usr/local/bin"
	command -v buildkit-runc >/dev/null || command -v runc >/dev/null || die "there is no runc, which buildkitd needs: install it"
fi
systemctl daemon-reload
if [ "$role" = coordinator ] && systemctl --quiet is-active archfarm-coordinator; then
	echo "installed; now: systemctl reload archfarm-coordinator"
	exit 0
fi
echo "installed; now adapt /etc/archfarm/$role.env, then: systemctl enable --now archfarm-$role"
