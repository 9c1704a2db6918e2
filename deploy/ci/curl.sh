#!/usr/bin/env bash
# What pipeline.sh does, with nothing but curl and jq: submits a commit of a git repository, or this folder, waits, and
# prints IMAGE@DIGEST.
#   FARM               https://farm.example:8373, the coordinator's --http
#   IMAGE, RUN_ID      as in pipeline.sh
#   ARCHFARM_CERT_DIR  with ca.pem, cert.pem and key.pem, as archfarm client-cert makes them; not for loopback
#   GIT_URL, GIT_REF   what to build; without GIT_URL, the commit that is checked out here
#   REGISTRY_USER, REGISTRY_PASSWORD   for IMAGE's registry; may be left out
#   POLL               seconds between two looks at the job (default: 5)
set -euo pipefail
: "${FARM:?}" "${IMAGE:?}" "${RUN_ID:?}"
farm() { # METHOD PATH [ARGUMENT…] of curl
	local certs=() answer
	[ -z "${ARCHFARM_CERT_DIR:-}" ] || certs=(--cacert "$ARCHFARM_CERT_DIR/ca.pem" --cert "$ARCHFARM_CERT_DIR/cert.pem" --key "$ARCHFARM_CERT_DIR/key.pem")
	if ! answer=$(curl --silent --show-error --fail-with-body "${certs[@]}" --request "$1" "$FARM$2" "${@:3}"); then
		echo "archfarm: $1 $2: $answer" >&2 # why it was refused, each fault by its field
		return 1
	fi
	echo "$answer"
}

if [ -n "${GIT_URL:-}" ]; then
	context=$(jq -n --arg url "$GIT_URL" --arg ref "${GIT_REF:-}" '{git: {$url, $ref}}')
else
	digest=$(git archive --format=tar.gz HEAD | farm POST /v1/contexts --header 'Content-Type: application/gzip' --upload-file - | jq -r .digest)
	context=$(jq -n --arg digest "$digest" --arg commit "$(git rev-parse HEAD)" --arg time "$(git log -1 --format=%cI)" \
		'{$digest, source: {$commit, commitTime: $time}}')
fi

# The password goes from the environment into the request, and is on nobody's command line.
export IMAGE REGISTRY_USER="${REGISTRY_USER:-}" REGISTRY_PASSWORD="${REGISTRY_PASSWORD:-}"
submit() { # REQUEST_ID
	jq -n --arg id "$1" --argjson context "$context" '{
		requestId: $id,
		spec: {$context, platforms: ["linux/amd64", "linux/arm64"], tags: [env.IMAGE + ":{{.GitSHA}}"]},
		credentials: (if env.REGISTRY_USER == "" then [] else
			[{host: (env.IMAGE | split("/")[0]), username: env.REGISTRY_USER, password: env.REGISTRY_PASSWORD}] end)
	}' | farm POST /v1/jobs --header 'Content-Type: application/json' --data-binary @-
}

# As in pipeline.sh: when the run's job has failed or was cancelled, it is another one.
request=$RUN_ID again=0
while
	job=$(submit "$request") || exit
	state=$(jq -r .job.state <<<"$job")
	[[ $state == STATE_@(FAILED|CANCELLED) ]]
do request=$RUN_ID.$((again += 1)); done
id=$(jq -r .job.id <<<"$job")
echo "archfarm: job $id" >&2
trap 'trap - INT TERM; farm POST "/v1/jobs/$id:cancel" >/dev/null; exit 130' INT TERM

# A coordinator that is started anew is away for a moment: it takes 60 questions without an answer to end this.
for ((lost = 0; lost < 60; lost++)); do
	if job=$(farm GET "/v1/jobs/$id"); then
		lost=0 state=$(jq -r .job.state <<<"$job")
		[[ $state != STATE_@(SUCCEEDED|FAILED|CANCELLED) ]] || break
	fi
	sleep "${POLL:-5}" & wait $! # the trap does not have to wait
done
if [ "$state" != STATE_SUCCEEDED ]; then
	jq -r '"archfarm: " + .job.state + ": " + .job.error' <<<"$job" >&2
	exit 1
fi
echo "$IMAGE@$(jq -r .job.digest <<<"$job")"
