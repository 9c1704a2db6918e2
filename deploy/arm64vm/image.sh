#!/usr/bin/env bash
# Makes the arm64 machine's image: Debian's cloud kernel, an initramfs, and a root file system with
# busybox and runc. Prints its folder; at once when it is there already.
# Needs no root, and leaves the host's packages and sources alone.
set -euo pipefail
# shellcheck source=deploy/arm64vm/settings.sh
. "$(dirname "$0")/settings.sh"

image=$(image_folder)
mkdir -p "$ARM64VM_CACHE"
exec 9>"$ARM64VM_CACHE/lock"
flock 9
if [ -e "$image/root.ext4" ]; then
	echo "$image"
	exit
fi
need apt-get dpkg-deb mke2fs cpio

work=$(mktemp -d "$ARM64VM_CACHE/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# An apt of our own: no installed packages, one architecture, and the lists kept between runs.
configure_apt() {
	local apt=$ARM64VM_CACHE/apt file n=0
	mkdir -p "$apt"/{lists/partial,archives/partial,debs} "$work/sources"
	: >"$work/status"
	for file in $(sources); do
		n=$((n + 1))
		# An entry that names the host's architecture is meant for the host; here it is for arm64.
		sed -E -e '/^Architectures:/d' -e 's/^(deb[^[]*\[[^]]*)arch=[^] ]*/\1/; s/^(deb[^[]*)\[ *\] */\1/' "$file" >"$work/sources/$n-${file##*/}"
	done
	cat >"$work/apt.conf" <<-END
		Dir::State "$apt";
		Dir::State::lists "$apt/lists";
		Dir::State::status "$work/status";
		Dir::Cache "$apt";
		Dir::Cache::archives "$apt/archives";
		Dir::Etc::sourcelist "/dev/null";
		Dir::Etc::sourceparts "$work/sources";
		Dir::Etc::preferences "/dev/null";
		Dir::Etc::preferencesparts "/dev/null";
		APT::Architecture "arm64";
		APT::Architectures { "arm64"; };
		APT::Install-Recommends "false";
		APT::Sandbox::User "$(id -un)";
		Acquire::Languages "none";
		Acquire::PDiffs "false";
		Acquire::Retries "3";
		Debug::NoLocking "true";
	END
	export APT_CONFIG=$work/apt.conf
}

# Unpacks the packages into $work/root and the kernel into $work/kernel.
unpack_packages() {
	local debs=$ARM64VM_CACHE/apt/debs packages deb
	say "resolving $ARM64VM_KERNEL $ARM64VM_PACKAGES"
	# One third-party source that fails is no reason to stop: what matters is whether the packages are found.
	apt-get -qq update || say "apt-get update reported errors; going on"
	# The kernel package also wants an initramfs builder and module tools: only the kernel is taken.
	# shellcheck disable=SC2086 # one word a package
	packages=$(
		apt-get -qq -y -s install $ARM64VM_PACKAGES | sed -n 's/^Inst \([^ ]*\).*/\1/p' &&
		apt-get -qq -y -s install "$ARM64VM_KERNEL" | sed -n 's/^Inst \(linux-image-[0-9][^ ]*\).*/\1/p'
	) || die "apt finds no arm64 $ARM64VM_PACKAGES $ARM64VM_KERNEL in $(sources); name Debian's sources in ARM64VM_SOURCES"
	say "downloading $(wc -w <<<"$packages") packages"
	# shellcheck disable=SC2086
	(cd "$debs" && apt-get -qq download $packages) || die "could not download the packages"
	mkdir -p "$work/root"
	# shellcheck disable=SC2086
	for deb in $(apt-get -qq --print-uris download $packages | cut -d' ' -f2); do
		case $deb in
		linux-image-*) dpkg-deb -x "$debs/$deb" "$work/kernel" ;;
		*) dpkg-deb -x "$debs/$deb" "$work/root" ;;
		esac
		echo "$deb" >>"$work/contents"
	done
}

# Copies a kernel module and, before it, what it depends on: the file names' order is the order of loading.
declare -A placed=()
place_module() {
	local path dependency
	[ -z "${placed[$1]:-}" ] || return 0
	path=$(find "$work/kernel" -name "$1.ko*" -o -name "${1//_/-}.ko*" | head -n 1)
	[ -n "$path" ] || return 0 # built in
	case $path in
	*.xz) xz -d "$path" && path=${path%.xz} ;;
	*.zst) zstd -q -d --rm "$path" && path=${path%.zst} ;;
	esac
	placed[$1]=yes
	for dependency in $(grep -a -o -z '^depends=.*' "$path" | tr -d '\0' | sed 's/^depends=//; s/,/ /g'); do
		place_module "$dependency"
	done
	cp "$path" "$work/ram/lib/modules/$((100 + $(find "$work/ram/lib/modules" -type f | wc -l)))-${path##*/}"
}

make_initramfs() {
	local module
	mkdir -p "$work/ram"/{bin,lib/modules,proc,sys,dev,layers,root}
	cp "$(busybox)" "$work/ram/bin/busybox"
	ln -s busybox "$work/ram/bin/sh"
	install -m 755 "$rig/guest/init" "$work/ram/init"
	for module in virtio_mmio virtio_blk virtio_net virtio_console virtio-rng overlay; do place_module "$module"; done
	(cd "$work/ram" && find . -print0 | LC_ALL=C sort -z | cpio --null -o -H newc -R 0:0 --reproducible --quiet) >"$work/image/initramfs"
}

busybox() { # at /bin or /usr/bin, as the Debian release has it
	find "$work/root/bin/" "$work/root/usr/bin/" -name busybox 2>/dev/null | head -n 1 | grep . || die "no busybox in $ARM64VM_PACKAGES"
}

make_root() {
	local root=$work/root size
	cp "$(busybox)" "$work/image/busybox" # for images built FROM scratch
	rm -rf "$root"/usr/share/{doc,man,info,locale,lintian,bash-completion,bug}
	mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,proc,sys,dev,run,tmp,root,etc,var/lib/buildkit}
	# Debian releases with a merged /usr unpack into it and link the old folders.
	[ -e "$root/bin/busybox" ] || cp "$(busybox)" "$root/bin/busybox"
	[ -n "$(find "$root/lib" -name 'ld-linux-aarch64*' 2>/dev/null)" ] || { rm -rf "${root:?}/lib" && ln -s usr/lib "$root/lib"; }
	size=$(($(du -sm "$root" | cut -f1) + 24))
	mke2fs -q -t ext4 -O ^has_journal -m 0 -E root_owner=0:0 -L arm64vm-root -d "$root" "$work/image/root.ext4" "${size}M" >/dev/null
}

mkdir "$work/image"
configure_apt
unpack_packages
unset APT_CONFIG
make_initramfs
make_root
cp "$work"/kernel/boot/vmlinuz-* "$work/image/kernel"
sort "$work/contents" >"$work/image/contents"
rm -rf "$image"
mv "$work/image" "$image"
say "image ready: $(du -sh "$image" | cut -f1) in $image"
echo "$image"
