#!/usr/bin/env bash
# Wheels of the packages that python -m benchmarks.gpu compares with, for a machine without a
# network: run this where there is one, carry the folder over, and give it as --wheels FOLDER.
#
#     benchmarks/fetch_peer_wheels.sh [FOLDER]        default: peer-wheels
#
# The pins are those of pyproject.toml's extra "peers". Their own needs (torch, triton, numpy) are
# not fetched: the machine has them. All are pure Python, so any platform's pip will do.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-peer-wheels}
mkdir -p "$folder"
python=${PYTHON:-python3}
pins=$("$python" - "$root/pyproject.toml" <<'PYTHON'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print("\n".join(extras["peers"]))
PYTHON
)
# shellcheck disable=SC2086  # one word for each pin
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" $pins
ls -l "$folder"
