#!/usr/bin/env bash
# Has the farm build this commit for amd64 and arm64 and tag it with its commit, waits, and prints what to deploy,
# IMAGE@DIGEST, on standard output. Started again for the same run, it goes on with the same job. Needs archfarm, git, jq.
#   IMAGE              registry.example.com/team/app, without a tag; docker login gives the credentials
#   RUN_ID             of the pipeline's run, the same when it is started again
#   ARCHFARM_TOKEN     for a client's certificate, if ARCHFARM_CERT_DIR holds none
#   ARCHFARM_CERT_DIR  the folder for it (default: a temporary one)
# Every flag of archfarm is a variable, too: ARCHFARM_FARM, ARCHFARM_SECRET, ARCHFARM_TIMEOUT, … ARCHFARM_FILE is the
# Dockerfile's path from here.
set -euo pipefail
: "${IMAGE:?}" "${RUN_ID:?}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ARCHFARM_CERT_DIR=${ARCHFARM_CERT_DIR:-$work/certs}

# Without a token or files, archfarm asks the coordinator of this machine.
if [ ! -e "$ARCHFARM_CERT_DIR/cert.pem" ] && [ -z "${ARCHFARM_TOKEN:-}" ]; then
	unset ARCHFARM_CERT_DIR
elif [ ! -e "$ARCHFARM_CERT_DIR/cert.pem" ]; then
	# No two certificates have one name; this one's is used up with the runner.
	archfarm client-cert --dir "$ARCHFARM_CERT_DIR" --name "ci-$(od -An -N8 -tx1 /dev/urandom | tr -d ' ')" >/dev/null
fi

# The commit and nothing else. It is the same on every runner, as a checkout's times and its .git are not.
repository=$(git rev-parse --absolute-git-dir)
tree=$work/tree/$(git rev-parse --show-prefix) # where we are in it
mkdir -p "$tree"
git -c tar.umask=0022 archive HEAD | tar -xf - -C "$tree"

# Whoever submits the same id again gets the job that is there: a run that is started again after the runner was lost
# does not build twice. When its job has failed or was cancelled, it is another job, which begins with what the workers'
# caches have: the first one's credentials may have ended with the first CI job.
request=$RUN_ID again=0
while
	GIT_DIR=$repository GIT_WORK_TREE=$work/tree archfarm submit --context "$tree" --file "$tree/${ARCHFARM_FILE:-Dockerfile}" \
		--platform linux/amd64,linux/arm64 --tag "$IMAGE:{{.GitSHA}}" --request-id "$request" --output json >"$work/job" || exit
	[[ $(jq -r .state "$work/job") == @(failed|cancelled) ]]
do request=$RUN_ID.$((again += 1)); done
id=$(jq -r .id "$work/job")
echo "archfarm: job $id" >&2

archfarm watch "$id" --progress plain --output json >"$work/result" &
watcher=$!
trap 'trap - INT TERM; archfarm cancel "$id" >&2; wait "$watcher" || true; exit 130' INT TERM
wait "$watcher" # fails when the job does

echo "$IMAGE@$(jq -r .digest "$work/result")"
