#!/usr/bin/env bash
# Everything a first run on a GPU should answer, in about ten minutes:
#
#   benchmarks/on_gpu.sh RESULTS_DIR [--rehearse]
#
# Builds the CUDA library (or takes it from FEDLORA_LIBRARIES), runs the operators' tests on the
# device, compute-sanitizer on small cases, the measurements beside their peers and a profile of the
# heaviest kernels. FEDLORA_BACKEND chooses the backend, cuda by default. A tool that is missing is
# recorded as such; failing tests refuse the measurements. --rehearse uses tiny sizes and few tests.
set -euo pipefail
cd "$(dirname "$0")/.."
export FEDLORA_BACKEND="${FEDLORA_BACKEND:-cuda}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; fi
exec "$python" -m benchmarks.on_gpu "$@"
