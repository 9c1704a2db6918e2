#!/usr/bin/env bash
# What pipeline.sh does, with nothing but curl and jq: submits a commit of a git repository, or this folder, waits, and
# prints IMAGE@DIGEST.
#   FARM               https://farm.example:8373, the coordinator's --http
#   IMAGE, RUN_ID      as in pipeline.sh
#   ARCHFARM_CERT_DIR  with ca.pem, cert.pem and key.pem, as archfarm client-cert makes them; not for loopback
#   GIT_URL, GIT_REF   what to build; without GIT_URL, the commit that is checked out here
#   REGISTRY_USER, REGISTRY_PASSWORD   for IMAGE's registry; may be left out
set -euo pipefail
: "${FARM:?}" "${IMAGE:?}" "${RUN_ID:?}"
farm() { # METHOD PATH [ARGUMENT…] of curl
	local certs=()
	[ -z "${ARCHFARM_CERT_DIR:-}" ] || certs=(--cacert "$ARCHFARM_CERT_DIR/ca.pem" --cert "$ARCHFARM_CERT_DIR/cert.pem" --key "$ARCHFARM_CERT_DIR/key.pem")
	curl --silent --show-error --fail-with-body "${certs[@]}" --request "$1" "$FARM$2" "${@:3}"
}

if [ -n "${GIT_URL:-}" ]; then
	context=$(jq -n --arg url "$GIT_URL" --arg ref "${GIT_REF:-}" '{git: {$url, $ref}}')
else
	digest=$(git archive --format=tar.gz HEAD | farm POST /v1/contexts --header 'Content-Type: application/gzip' --upload-file - | jq -r .digest)
	context=$(jq -n --arg digest "$digest" --arg commit "$(git rev-parse HEAD)" --arg time "$(git log -1 --format=%cI)" \
		'{$digest, source: {$commit, commitTime: $time}}')
fi

# The password goes from the environment into the request, and is on nobody's command line.
export IMAGE RUN_ID REGISTRY_USER="${REGISTRY_USER:-}" REGISTRY_PASSWORD="${REGISTRY_PASSWORD:-}"
id=$(jq -n --argjson context "$context" '{
	requestId: env.RUN_ID,
	spec: {$context, platforms: ["linux/amd64", "linux/arm64"], tags: [env.IMAGE + ":{{.GitSHA}}"]},
	credentials: (if env.REGISTRY_USER == "" then [] else
		[{host: (env.IMAGE | split("/")[0]), username: env.REGISTRY_USER, password: env.REGISTRY_PASSWORD}] end)
}' | farm POST /v1/jobs --header 'Content-Type: application/json' --data-binary @- | jq -r .job.id)
echo "archfarm: job $id" >&2

while
	job=$(farm GET "/v1/jobs/$id" --retry 10 --retry-connrefused)
	state=$(jq -r .job.state <<<"$job")
	[[ $state != STATE_@(SUCCEEDED|FAILED|CANCELLED) ]]
do sleep 5; done
if [ "$state" != STATE_SUCCEEDED ]; then
	jq -r '"archfarm: " + .job.state + ": " + .job.error' <<<"$job" >&2
	exit 1
fi
echo "$IMAGE@$(jq -r .job.digest <<<"$job")"
