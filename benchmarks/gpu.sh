#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU and a Python that has torch, transformers and peft; no network needed.
#
#   bash benchmarks/gpu.sh [--minutes 8] [--parts ...]     options are those of benchmarks/gpu.py
#
# Wheels of what that Python lacks (bitsandbytes, as a rule) are taken from wheels/, or from the file or folder that
# WHEELS names; they are installed into a folder of their own that is gone afterwards. Results go to OUT, or gpu_out/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-wheels}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -d "$wheels" ]; then found=("$wheels"/*.whl); else found=("$wheels"); fi
if [ -e "${found[0]}" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" \
        "${found[@]}" || echo "pip couldn't install ${found[*]}: going on without" >&2
else
    echo "no wheels in $wheels: going on with what $python has" >&2
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
"$python" benchmarks/gpu.py "$@"
