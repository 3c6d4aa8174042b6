#!/usr/bin/env bash
# What LoRA costs on one GPU: tests, then benchmarks, into benchmarks/results/gpu.md. Nothing is fetched.
#
#   benchmarks/gpu.sh [--wheels FOLDER] [OPTIONS OF benchmarks/gpu.py]
#
# --wheels is for packages that the machine lacks: where there is a network,
#   pip download --no-deps --only-binary=:all: -d FOLDER NAME...
# with the --platform and --python-version of that machine, and carry the folder there. --out FOLDER writes the page elsewhere.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"

if [[ "${1:-}" == --wheels ]]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${2:?the folder of the wheels}"/*.whl
    export PYTHONPATH="$site:$PYTHONPATH"
    shift 2
fi

"$python" - <<'PYTHON'
import importlib.util
import sys

for needed, names in (True, ("torch", "safetensors", "einops", "rich", "pytest")), (False, ("peft", "bitsandbytes", "torchao")):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing and needed:
        sys.exit(f"not installed here: {', '.join(missing)}; carry them as wheels, see the head of benchmarks/gpu.sh")
    if missing:
        print(f"not installed here, so left out: {', '.join(missing)}")
PYTHON

"$python" "$here/gpu.py" "$@"
