#!/usr/bin/env bash
# A real arm64 worker of the farm on a machine of any kind, under qemu's software emulation. Needs no root.
#   vm.sh start          boot; returns when buildkitd serves and the agent runs
#   vm.sh stop           let the agent leave the fleet, power off; nothing is left running
#   vm.sh kill           pull the plug
#   vm.sh status         exits with 3 when it does not run
#   vm.sh log            what the machine said on its console
#   vm.sh run COMMAND    as root in the machine
#   vm.sh clean          forget its build cache
# settings.sh lists the settings.
set -euo pipefail
# shellcheck source=deploy/arm64vm/settings.sh
. "$(dirname "$0")/settings.sh"

[[ $ARM64VM_NAME =~ ^[a-zA-Z0-9][a-zA-Z0-9.-]*$ ]] || die "ARM64VM_NAME has to be a host name, not '$ARM64VM_NAME'"
mkdir -p "$ARM64VM_RUN/$ARM64VM_NAME"
dir=$(cd "$ARM64VM_RUN/$ARM64VM_NAME" && pwd) # absolute: qemu leaves this folder when it goes to the background

# Prints the process id of the running machine. A number alone may be another process by now.
pid() {
	local p
	p=$(cat "$dir/pid" 2>/dev/null) && [ -n "$p" ] && grep -qsz -- "path=$dir/control" "/proc/$p/cmdline" && echo "$p"
}

# Runs a command in the machine; prints what it prints, returns its status.
guest() {
	local mark="end-$$-$RANDOM" line
	exec 9>"$dir/control.lock"
	flock 9 # one command at a time
	# For reading and writing, so that neither open waits for the other side.
	exec 7<>"$dir/control.in" 8<>"$dir/control.out"
	printf '( %s ); echo %s $?\n' "$*" "$mark" >&7
	while IFS= read -r -t "$ARM64VM_TIMEOUT" line <&8; do
		if [[ $line == *"$mark "* ]]; then # after output that does not end its line
			printf '%s' "${line%%"$mark "*}"
			return "${line##*"$mark "}"
		fi
		printf '%s\n' "$line"
	done
	die "$ARM64VM_NAME did not answer"
}

# Makes the disk with the programs and the settings of this machine.
make_given() {
	local given=$dir/given size
	rm -rf "$given"
	mkdir -p "$given"/{usr/bin,sbin,etc/buildkit,etc/ssl/certs}
	install -m 755 "$rig/guest/boot" "$rig/guest/shutdown" "$given/sbin/"
	[ -f "$ARM64VM_BUILDKITD" ] || die "no $ARM64VM_BUILDKITD: make arm64vm builds it"
	install -m 755 "$ARM64VM_BUILDKITD" "$given/usr/bin/buildkitd"
	if [ -n "$ARM64VM_AGENT" ]; then
		[ -f "$ARM64VM_AGENT" ] || die "no $ARM64VM_AGENT: make arm64vm builds it"
		install -m 755 "$ARM64VM_AGENT" "$given/usr/bin/archfarm"
	fi
	# The registries that the host trusts.
	[ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp -L /etc/ssl/certs/ca-certificates.crt "$given/etc/ssl/certs/"
	cat >"$given/etc/arm64vm.env" <<-END
		NAME=$ARM64VM_NAME
		SLOTS=$ARM64VM_SLOTS
		COORDINATOR=$ARM64VM_COORDINATOR
		AGENT_ARGS="$ARM64VM_AGENT_ARGS"
	END
	cat >"$given/etc/buildkit/buildkitd.toml" <<-END
		root = "/var/lib/buildkit"
		[grpc]
		  address = ["unix:///run/buildkit/buildkitd.sock"]
		[worker.oci]
		  enabled = true
		  snapshotter = "overlayfs"
		  gc = false
		[worker.containerd]
		  enabled = false
		[cdi]
		  disabled = true
	END
	size=$(($(du -sm "$given" | cut -f1) + 8))
	rm -f "$dir/given.ext4"
	mke2fs -q -t ext4 -O ^has_journal -m 0 -E root_owner=0:0 -d "$given" "$dir/given.ext4" "${size}M" >/dev/null
	rm -rf "$given"
}

# Lays out the machine's folder for a new start. The build cache of the last one stays.
prepare() {
	chmod 700 "$dir"
	rm -f "$dir"/{pid,console,qemu.log,control.in,control.out}
	make_given
	mkfifo "$dir"/control.{in,out}
	[ -e "$dir/state.ext4" ] ||
		mke2fs -q -t ext4 -m 0 -E lazy_itable_init=1,lazy_journal_init=1 "$dir/state.ext4" "$ARM64VM_DISK" >/dev/null
}

# Debian's 6.1 kernel was once seen to follow a null pointer in the per-cgroup lists of the slab allocator
# (list_lru_add) while runc started a container: nokmem does without them. Should it stumble all the same,
# oops=panic ends the machine instead of leaving it half dead.
launch() { # IMAGE
	local machine="virt,gic-version=3" disk=if=none,format=raw
	"$ARM64VM_QEMU" -daemonize -pidfile "$dir/pid" \
		-name "$ARM64VM_NAME" -nodefaults -no-user-config -display none -no-reboot \
		-machine "$machine" -cpu "$ARM64VM_CPU" -smp "$ARM64VM_CPUS" -m "$ARM64VM_MEMORY" \
		-accel tcg,thread=multi,tb-size=256 \
		-kernel "$1/kernel" -initrd "$1/initramfs" \
		-append "console=ttyAMA0 quiet loglevel=3 panic=-1 mitigations=off nokaslr oops=panic cgroup.memory=nokmem" \
		-serial "file:$dir/console" \
		-drive "$disk,id=image,readonly=on,file=$1/root.ext4" -device virtio-blk-device,drive=image,serial=image \
		-drive "$disk,id=given,readonly=on,file=$dir/given.ext4" -device virtio-blk-device,drive=given,serial=given \
		-drive "$disk,id=state,cache=unsafe,discard=unmap,file=$dir/state.ext4" -device virtio-blk-device,drive=state,serial=state \
		-netdev user,id=net -device virtio-net-device,netdev=net \
		-object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-device,rng=rng \
		-device virtio-serial-device -chardev "pipe,id=control,path=$dir/control" -device virtserialport,chardev=control \
		</dev/null >"$dir/qemu.log" 2>&1 || { cat "$dir/qemu.log" >&2; die "qemu did not start $ARM64VM_NAME"; }
}

await_ready() {
	local since=$SECONDS
	until grep -qs '^arm64vm: ready' "$dir/console"; do
		if ! pid >/dev/null; then
			tail -n 30 "$dir/console" >&2
			die "$ARM64VM_NAME switched itself off while it booted; its console is above"
		fi
		if [ $((SECONDS - since)) -ge "$ARM64VM_TIMEOUT" ]; then
			tail -n 30 "$dir/console" >&2
			halt
			die "$ARM64VM_NAME was not ready within $ARM64VM_TIMEOUT s; its console is above"
		fi
		sleep 0.1
	done
}

start() {
	local image began
	need "$ARM64VM_QEMU" mke2fs flock
	if pid >/dev/null; then
		die "$ARM64VM_NAME runs already"
	fi
	image=$("$rig/image.sh")
	began=$(date +%s%N)
	prepare
	launch "$image"
	await_ready
	say "$ARM64VM_NAME is ready after $((($(date +%s%N) - began) / 1000000)) ms"
}

halt() { # at once
	local p n=0
	p=$(pid) || return 0
	kill -KILL "$p"
	while pid >/dev/null; do
		n=$((n + 1))
		[ $n -lt 100 ] || die "process $p of $ARM64VM_NAME does not end"
		sleep 0.1
	done
	rm -f "$dir/pid"
}

stop() {
	local p n=0
	if ! p=$(pid); then
		say "$ARM64VM_NAME does not run"
		return
	fi
	exec 7<>"$dir/control.in"
	echo "/sbin/shutdown 5" >&7
	while pid >/dev/null; do
		n=$((n + 1))
		if [ $n -eq 150 ]; then
			say "$ARM64VM_NAME does not power off: killing it"
			halt
		fi
		sleep 0.1
	done
	rm -f "$dir/pid"
}

status() {
	local p
	if ! p=$(pid); then
		echo "$ARM64VM_NAME does not run"
		return 3
	fi
	echo "$ARM64VM_NAME runs: process $p, memory $(($(sed -n 's/^VmRSS:\s*\([0-9]*\).*/\1/p' "/proc/$p/status") / 1024)) MiB, build cache $(du -sm "$dir/state.ext4" | cut -f1) MiB"
}

case ${1:-} in
start | stop | status) "$1" ;;
kill) halt ;;
log) cat "$dir/console" ;;
run)
	shift
	pid >/dev/null || die "$ARM64VM_NAME does not run"
	guest "$@"
	;;
clean)
	! pid >/dev/null || die "$ARM64VM_NAME runs; stop it first"
	rm -rf "$dir"
	;;
*)
	sed -n '2,10s/^# //p' "$0" >&2
	exit 2
	;;
esac
