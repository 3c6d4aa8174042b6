#!/usr/bin/env bash
# One row of the table in docs/versions.md: a virtual environment with these versions, and what is quick to run there.
#
#   tests/versions/run.sh <python> <what> <requirement>...
#   tests/versions/run.sh python3.10 core torch==2.8.0 safetensors==0.4.5 einops==0.6.0 'numpy<2.3'
#   tests/versions/run.sh python3.11 trainer torch==2.13.0 transformers==5.3.0 accelerate==1.10.0
#   tests/versions/run.sh python3.11 peft torch==2.13.0 peft==0.15.2 transformers==4.51.3
#   tests/versions/run.sh python3.11 resolve
#
# <what> is core (layers, files, compiling, imports), trainer (transformers), peft (folders both ways), or resolve
# (whether the constraints can be installed on each Python; nothing is). The environment lies in $VERSIONS, by default
# a temporary folder that is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1 what=$2
shift 2

home=${VERSIONS:-}
if [ -z "$home" ]; then
    home=$(mktemp -d)
    trap 'rm -rf "$home"' EXIT
fi
bin=$home/bin
[ -x "$bin/python" ] || "$python" -m venv "$home"
install() { "$bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check "$@"; }
tests() { "$bin/python" -m pytest -q -p no:cacheprovider "$@"; }

if [ "$what" = resolve ]; then
    install uv
    for version in 3.10 3.11 3.12 3.13 3.14; do
        for extra in test engines lint docs package; do
            "$bin/uv" pip compile --quiet --no-header --python-version "$version" --extra "$extra" \
                --constraint constraints.txt pyproject.toml >"$home/resolved.txt"
            echo "Python $version, [$extra]: $(grep -c == "$home/resolved.txt") packages"
        done
    done
    exit
fi

install 'pytest>=8.4' 'hypothesis>=6.100' 'safetensors>=0.4.5' 'einops>=0.6' 'torch>=2.8' numpy "$@"
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
"$bin/python" -m pip list --disable-pip-version-check 2>/dev/null |
    grep -E '^(torch|safetensors|einops|numpy|transformers|accelerate|peft) ' || true
"$bin/python" --version
old=$("$bin/python" -c 'import torch; print("old" if torch.__version__ < "2.9" else "")')

case $what in
core)
    # torch 2.8 makes a second graph where lengths vary, which costs time once,
    tests tests/test_private_names.py tests/test_packages.py tests/files/test_files.py \
        tests/files/test_atomic_writing.py tests/model/test_inject.py tests/layers/test_compile.py \
        tests/layers/test_transformer_layers.py tests/layers/test_user_classes.py \
        ${old:+--deselect tests/layers/test_compile.py::test_gradients_are_right_at_every_length_without_another_graph}
    # and refuses DoRA on a grouped nn.Conv3d, whose norm it gives a wrong shape
    tests tests/layers/test_laws.py -k 'merged or derivatives or compile or export or copies' \
        ${old:+--deselect "tests/layers/test_laws.py::test_compile_in_one_graph[conv3d-groups-dora]"} \
        ${old:+--deselect "tests/layers/test_laws.py::test_export[conv3d-groups-dora]"}
    tests tests/layers/test_parameters.py tests/layers/test_parameter_states.py -k 'compile or export or checkpoints'
    ;;
trainer)
    # in transformers 5.3 the Trainer itself, with plain LoRA, rounds its float32 loss otherwise than a loop by hand
    tests -m engines tests/test_private_names.py tests/engines/test_trainer.py -k 'not bnb and not lion_32bit' \
        --deselect tests/engines/test_trainer.py::test_a_run_equals_a_loop_over_groups_written_by_hand
    ;;
peft) "$bin/python" tests/versions/exchange.py ;;
*) echo "unknown: $what" >&2; exit 2 ;;
esac
