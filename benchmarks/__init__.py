"""Benchmarks: this library beside named peers on the same inputs, in one run.

python -m benchmarks.run [--suite NAME] [--base GITREF] [--results benchmarks/results]
python -m benchmarks.figures                     the figures, and the pages that show them
benchmarks/on_gpu.sh RESULTS_DIR                 a first run on a GPU

stand/     inputs, tasks with their checks, clocks, floors, result files
peers/     what a user would run instead, one file each
suites/    what is compared on which inputs, one file each
results/   <device>/<suite>.json and the figures
"""
