#!/bin/sh
# Keeps an EC2 autoscaling group as large as the farm's queue asks for. Run it on or near the coordinator, once, or for
# ever with an interval; it needs curl, awk, the AWS CLI, and autoscaling:SetDesiredCapacity.
#   asg.sh GROUP POOL PLATFORM SLOTS [SECONDS]     SLOTS: --slots of one worker
#   asg.sh farm-graviton graviton linux/arm64 4 30
# It asks for what runs and waits, so the group shrinks as builds end; the instances that go drain first
# (deploy/cloud-init). The group's minimum and maximum hold whatever is asked. The minimum should be 1: a build for a
# platform that no attached worker runs is refused, it does not wait.
set -eu
[ $# -ge 4 ] || { sed -n 's/^#   \(asg.sh GROUP.*\)/usage: \1/p' "$0" >&2; exit 2; }
group=$1 pool=$2 platform=$3 slots=$4 every=${5:-}
metrics=${ASG_METRICS:-http://127.0.0.1:8373/metrics}
idle=${ASG_IDLE:-10} # rounds of less demand before the group shrinks, as a machine takes longer to come than to go

# Instances for the legs that wait and those that run, from the metrics on standard input.
wanted() {
	awk -v pool="pool=\"$pool\"" -v any='pool="any"' -v platform="platform=\"$platform\"" -v slots="$slots" '
		index($1, platform) == 0 { next }
		/^archfarm_queue_depth[{]/ && (index($1, pool) || index($1, any)) { legs += $2 }
		/^archfarm_slots[{]/ && index($1, pool) && index($1, "state=\"used\"") { legs += $2 }
		END { printf "%d\n", (legs + slots - 1) / slots }
	'
}

last=0 less=0
round() {
	page=$(curl -fsS -m 10 "$metrics") || return 0 # a coordinator that restarts is no reason to shrink
	now=$(echo "$page" | wanted)
	if [ "$now" -lt "$last" ] && [ "$less" -lt "$idle" ]; then
		less=$((less + 1))
		return 0
	fi
	less=0
	if [ "$now" != "$last" ] || [ -z "$every" ]; then
		echo "$group: $now instances for $platform in pool $pool"
		aws autoscaling set-desired-capacity --auto-scaling-group-name "$group" --desired-capacity "$now" --no-honor-cooldown || return 0
	fi
	last=$now
}

round
while [ -n "$every" ]; do
	sleep "$every"
	round
done
