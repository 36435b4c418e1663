#!/usr/bin/env bash
# Everything a first run on a GPU should answer, in about ten minutes:
#
#   benchmarks/on_gpu.sh RESULTS_DIR [--only PHASE] [--seconds N] [--rehearse]
#
# Builds the CUDA library for the present GPU (or takes it from FEDLORA_LIBRARIES), runs the
# operators' tests on the device, the measurements beside their peers, a profile of the heaviest
# kernels and compute-sanitizer on chosen cases. Each of these phases can be run alone and then has
# all N seconds (570 by default): --only tests, measure, sanitize or profile; and two more that take
# a call each: tune (tiles of the Triton kernels) and finetune (a small Llama on 8 clients). Both go
# on in a second call where the first was stopped.
#
# FEDLORA_BACKEND chooses the backend, cuda by default. A tool that is missing is recorded as such.
# Failing tests refuse the measurements of the same call. RESULTS_DIR/on_gpu.json collects the
# phases of all calls, on_gpu.txt the tables, STEP.log what a step printed. --rehearse uses tiny
# sizes and few tests, and runs without a GPU.
set -euo pipefail
results="$(realpath -m "${1:?usage: on_gpu.sh RESULTS_DIR [--only PHASE] [--seconds N] [--rehearse]}")"
shift
cd "$(dirname "$0")/.."
export FEDLORA_BACKEND="${FEDLORA_BACKEND:-cuda}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; fi
exec "$python" -m benchmarks.on_gpu "$results" "$@"
