#!/usr/bin/env bash
# Checks what is under deploy/, and the commands of the guides in docs/, without starting any of it: units, launchd's
# plist, user data, Lima's template, alerting rules, and that every flag, setting and metric that they name exists.
# Needs bin/archfarm, bin/tools/actionlint, shellcheck, systemd-analyze, python3 and apt-get; `.ci/run setup tools build deploy`.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=''
archfarm=${ARCHFARM_BINARY:-bin/archfarm}
complain() {
	echo "deploy: $*" >&2
	failed=yes
}

# cloud-init and Prometheus would run on this machine if they were installed: they are only unpacked, with what cloud-init's
# schema check imports.
packages=(cloud-init prometheus python3-attr python3-blinker python3-certifi python3-chardet python3-charset-normalizer
	python3-configobj python3-idna python3-jinja2 python3-json-pointer python3-jsonpatch python3-jsonschema python3-markupsafe
	python3-netifaces python3-oauthlib python3-pyrsistent python3-requests python3-serial python3-six python3-urllib3 python3-yaml)
unpacked=${XDG_CACHE_HOME:-$HOME/.cache}/archfarm/deploy-check-$(echo "${packages[@]}" | cat - /etc/os-release | sha256sum | cut -c1-12)
export PYTHONPATH=$unpacked/usr/lib/python3/dist-packages PYTHONDONTWRITEBYTECODE=1

unpack() {
	[ ! -e "$unpacked" ] || return 0
	mkdir "$work/debs" "$work/unpacked"
	# As in setup.sh: the package lists may be absent or stale.
	download() { (cd "$work/debs" && apt-get download -qq "${packages[@]}" >"$work/apt.log" 2>&1); }
	download || { apt-get update -qq >"$work/apt.log" 2>&1 && download; } || {
		cat "$work/apt.log" >&2
		echo "deploy: apt-get could not download what the checks need; its messages are above" >&2
		exit 1
	}
	for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/unpacked"; done
	mkdir -p "$(dirname "$unpacked")"
	cp -R "$work/unpacked" "$unpacked.$$"
	mv "$unpacked.$$" "$unpacked"
}

# Commands, flags and the settings that stand for them are known to archfarm: it says so itself.
accepts() { # WHERE ARGUMENT…
	local path where=$1
	shift
	if ! "$archfarm" "$@" --help >"$work/help" 2>&1; then
		complain "$where: archfarm $*: $(cat "$work/help")"
		return
	fi
	# To a group of commands, one that it does not know is an argument, and --help shows the group's.
	path=$(sed -nE '/^Usage:/,$ s/^  (archfarm( [a-z-]+)*).*/\1/p' "$work/help" | head -n 1)
	case "archfarm $* " in "$path "[!-]*) ! grep -q '^Available Commands' "$work/help" || complain "$where: there is no command archfarm $*" ;; esac
}
knows_settings() { # FILE COMMAND…: every ARCHFARM_NAME in FILE, commented out or not, is a flag of COMMAND
	local name flag
	"$archfarm" "${@:2}" --help >"$work/help"
	for name in $(grep -oE '^ *#?ARCHFARM_[A-Z_]+=' "$1" | tr -d ' #='); do
		case $name in ARCHFARM_URL | ARCHFARM_SHA256) continue ;; esac # fetch.sh's
		flag=$(echo "${name#ARCHFARM_}" | tr 'A-Z_' 'a-z-')
		grep -qE -- "--$flag( |$)" "$work/help" || complain "$1: archfarm ${*:2} has no --$flag, which $name sets"
	done
}

units() {
	local unit command exposed
	for unit in deploy/systemd/*.service deploy/cloud-init/*.service; do
		# What ExecStart names is not installed here.
		sed -E 's,^(ExecStart=)[^ ]+,\1/bin/true,' "$unit" >"$work/${unit##*/}"
		systemd-analyze verify "$work/${unit##*/}" >"$work/verify" 2>&1 || complain "$unit: $(cat "$work/verify")"
		[ ! -s "$work/verify" ] || complain "$unit: $(cat "$work/verify")"
		command=$(sed -n 's,^ExecStart=/usr/local/bin/archfarm ,,p' "$unit")
		# shellcheck disable=SC2086 # one word an argument
		[ -z "$command" ] || accepts "$unit" $command
	done
	cp deploy/systemd/archfarm-coordinator.socket "$work"
	systemd-analyze verify "$work/archfarm-coordinator.socket" >"$work/verify" 2>&1 || complain "archfarm-coordinator.socket: $(cat "$work/verify")"
	[ ! -s "$work/verify" ] || complain "archfarm-coordinator.socket: $(cat "$work/verify")"
	# Tenths; newer systemd counts a little differently than the 252 whose figure the unit quotes.
	exposed=$(systemd-analyze security --offline=true --no-pager --threshold=20 "$work/archfarm-coordinator.service" 2>&1) ||
		complain "archfarm-coordinator.service is exposed more than it was: ${exposed##*$'\n'}"
	knows_settings deploy/systemd/coordinator.env coordinator
	knows_settings deploy/systemd/worker.env worker
}

installed() {
	local root=$work/root
	DESTDIR=$root deploy/systemd/install.sh coordinator "$archfarm"
	DESTDIR=$root deploy/systemd/install.sh worker "$archfarm"
	systemd-sysusers --root="$root" archfarm.conf >"$work/log" 2>&1 || complain "sysusers: $(cat "$work/log")"
	grep -q ^archfarm: "$root/etc/passwd" || complain "sysusers made no user archfarm: $(cat "$work/log")"
	systemd-tmpfiles --root="$root" --create archfarm.conf >"$work/log" 2>&1 || complain "tmpfiles: $(cat "$work/log")"
	[ "$(stat -c %a "$root/etc/archfarm" "$root/etc/archfarm/worker.env" | tr '\n' ' ')" = "700 600 " ] || complain "install.sh leaves settings to everybody"
}

rendered() {
	local template
	for template in deploy/*/*.in.yaml; do
		deploy/render.sh "$template" | diff -u "${template%.in.yaml}.yaml" - ||
			complain "${template%.in.yaml}.yaml is not what deploy/render.sh makes of $template"
	done
}

user_data() {
	local file=deploy/cloud-init/graviton.yaml
	python3 -m cloudinit.cmd.main schema --config-file $file >"$work/log" 2>&1 || complain "$file: $(cat "$work/log")"
	[ "$(stat -c %s $file)" -le 16384 ] || complain "$file is larger than the 16 KiB that EC2 takes"
	knows_settings $file worker
	knows_settings deploy/lima/archfarm.yaml worker
}

# Whatever is YAML or a plist parses, and what is a script in it, too.
parsed() {
	python3 - "$work" <<'END' || complain "see above"
import glob, plistlib, subprocess, sys, yaml

def shell(where, script):
    run = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True)
    if run.returncode:
        sys.exit(f"{where}: {run.stderr}")

for path in glob.glob("deploy/**/*.y*ml", recursive=True):
    if not path.endswith(".in.yaml"):
        list(yaml.safe_load_all(open(path)))
for entry in yaml.safe_load(open("deploy/cloud-init/graviton.yaml"))["runcmd"]:
    shell("graviton.yaml, runcmd", entry)
for step in yaml.safe_load(open("deploy/lima/archfarm.yaml"))["provision"]:
    if step["mode"] == "system":
        shell("lima/archfarm.yaml, provision", step["script"])

kinds = {"Label": str, "UserName": str, "ProgramArguments": list, "RunAtLoad": bool, "KeepAlive": dict, "ThrottleInterval": int,
         "ExitTimeOut": int, "ProcessType": str, "StandardErrorPath": str, "StandardOutPath": str}
for path in glob.glob("deploy/launchd/*.plist"):
    job = plistlib.load(open(path, "rb"))
    for key, value in job.items():
        if key not in kinds or type(value) is not kinds[key]:
            sys.exit(f"{path}: launchd.plist(5) knows no such {key}: {value!r}")
    if job["Label"] + ".plist" != path.rsplit("/", 1)[1]:
        sys.exit(f"{path}: the file is called otherwise than its Label {job['Label']}")
    open(f"{sys.argv[1]}/plist", "w").write("\n".join(job["ProgramArguments"][1:]))
END
	local command
	mapfile -t command <"$work/plist"
	accepts "the plist" "${command[@]}"
}

alerts() {
	local name
	"$unpacked/usr/bin/promtool" check rules deploy/alerts.yml >"$work/log" 2>&1 || complain "$(cat "$work/log")"
	"$unpacked/usr/bin/promtool" test rules deploy/alerts_test.yml >"$work/log" 2>&1 || complain "$(cat "$work/log")"
	while read -r name; do
		grep -rqF --include='*.go' "\"${name%_bucket}\"" coordinator worker gossip || complain "there is no metric $name"
	done < <(grep -ohE 'archfarm_[a-z_]+' deploy/alerts.yml deploy/scaling/* docs/operations.md | sort -u)
}

# Lines of the guides' code blocks that run archfarm, with what continues them. Capitals, as in NAME, are placeholders.
guides() {
	local guide line
	for guide in docs/operations.md docs/macos.md docs/ci.md README.md; do
		while read -r line; do
			# shellcheck disable=SC2086 # one word an argument; no guide quotes one
			accepts "$guide" $line
		done < <(awk '/^```/ { code = !code; next } code' "$guide" | sed -e ':a' -e '/\\$/ { N; s/\\\n//; ba' -e '}' |
			sed -nE "s/ +#.*//; s/'//g; s/[|>].*//; s,^(sudo )?(bin/)?archfarm ,,p")
	done
}

# The pipelines: GitHub's by actionlint, which has shellcheck look at its scripts; the scripts that it starts are shellchecked
# with all others. The guide quotes the files as they are.
pipelines() {
	bin/tools/actionlint -no-color deploy/ci/github-actions.yml >"$work/log" 2>&1 || complain "$(cat "$work/log")"
	python3 - <<'END' || complain "see above"
import subprocess, sys, yaml

guide = open("docs/ci.md").read()
for name in ["pipeline.sh", "github-actions.yml", "gitlab-ci.yml"]:
    if "\n" + open("deploy/ci/" + name).read() + "```\n" not in guide:
        sys.exit(f"docs/ci.md does not quote deploy/ci/{name} as it is")
pipeline = yaml.safe_load(open("deploy/ci/gitlab-ci.yml"))
for name in pipeline["stages"]:
    job = pipeline[name]
    script = "\n".join(job.get("before_script", []) + job["script"])
    run = subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC2154", "-"], input=script, text=True, capture_output=True) # GitLab's variables
    if job["stage"] != name or run.returncode:
        sys.exit(f"deploy/ci/gitlab-ci.yml, {name}: {run.stdout}{run.stderr}")
END
}

unpack
for check in units installed rendered user_data parsed alerts guides pipelines; do "$check"; done
[ -z "$failed" ] || exit 1
echo "deploy: units, plist, user data, templates, rules and the guides' commands are in order"
