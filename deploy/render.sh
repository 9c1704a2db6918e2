#!/bin/sh
# Files that machines get by themselves hold other files of this folder, so that there is one of each. This prints
# NAME.in.yaml with the files that its @PATH@ lines name, indented as the line; what it prints is committed as NAME.yaml.
#   deploy/render.sh deploy/lima/archfarm.in.yaml >deploy/lima/archfarm.yaml
#   deploy/render.sh deploy/cloud-init/graviton.in.yaml >deploy/cloud-init/graviton.yaml
set -eu
template=$(realpath "$1")
cd "$(dirname "$0")/.."
awk '
	match($0, /^ *@[^@ ]+@$/) {
		indent = $0
		sub(/@.*/, "", indent)
		path = substr($0, length(indent) + 2, length($0) - length(indent) - 2)
		lines = 0
		while ((status = (getline line < path)) > 0) {
			print (line == "" ? "" : indent line)
			lines++
		}
		if (status < 0 || lines == 0) {
			print "render: cannot read " path > "/dev/stderr"
			exit 1
		}
		close(path)
		next
	}
	{ print }
' "$template"
