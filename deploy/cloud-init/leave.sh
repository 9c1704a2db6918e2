#!/bin/sh
# Drains this instance's worker when EC2 is about to take the instance away, then lets it go. Two signs, both from the
# instance's own metadata: the autoscaling group terminates it (target-lifecycle-state), or a spot instance is
# interrupted (spot/instance-action), two minutes ahead.
set -eu
imds=${LEAVE_IMDS:-http://169.254.169.254}
every=${LEAVE_EVERY:-5} # seconds

metadata() { # PATH: what it says; nothing where there is nothing
	token=$(curl -fsS -m 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$imds/latest/api/token" 2>/dev/null) || return 0
	curl -fsS -m 5 -H "X-aws-ec2-metadata-token: $token" "$imds/latest/meta-data/$1" 2>/dev/null || return 0
}
why() {
	if [ "$(metadata autoscaling/target-lifecycle-state)" = Terminated ]; then
		echo "the autoscaling group terminates this instance"
	elif [ -n "$(metadata spot/instance-action)" ]; then
		echo "this spot instance is interrupted in two minutes"
	fi
}

while reason=$(why) && [ -z "$reason" ]; do
	sleep "$every"
done
echo "$reason: draining"
# Returns when every build has ended, or with the unit's TimeoutStopSec. No build moves meanwhile: what a spot
# instance cannot finish fails with the worker's name.
systemctl stop archfarm-worker || true

# With the AWS CLI and the right, the group need not wait for the hook's timeout.
if [ -n "${ASG_HOOK:-}" ] && command -v aws >/dev/null; then
	aws autoscaling complete-lifecycle-action --lifecycle-action-result CONTINUE --lifecycle-hook-name "$ASG_HOOK" \
		--auto-scaling-group-name "$ASG_NAME" --instance-id "$(metadata instance-id)" --region "$(metadata placement/region)" ||
		echo "the hook $ASG_HOOK could not be completed: the group waits for its timeout"
fi
