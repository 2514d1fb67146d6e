#!/usr/bin/env bash
# Makes the virtual environment and runs ruff, pyright and the fast tests.
# What follows goes to pytest:  ./launch/test.sh tests/test_report.py -k timeline
# The slow tests, an hour or more:  ./launch/test.sh -m slow
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ssdtune_root"

ruff check .
ruff format --check .
pyright
# The tests that train a real model need the quickstart's; they say so and skip without it.
python -m ssdtune.assets --text 2>/dev/null || echo "no quickstart model: its tests will be skipped" >&2
# One thread a process: two test processes share the cores, and sums keep one order. A file is one process's, since what
# its tests share is made once.
# Offline: no test may need a model hub, or wait for one that isn't there.
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile "$@"
