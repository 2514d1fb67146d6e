#!/usr/bin/env bash
# Runs the GPU tests and the GPU benchmark on a machine with a CUDA PyTorch image, offline, in
# under 8 minutes, and writes one JSON (gpu_check.json).
#   --wheels DIR   a folder of wheels for what the image lacks (it is named first)
#   --out FILE     where the JSON goes
# Exit code: 0 all passed, 1 something failed, 2 a package is missing, 3 no CUDA device.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
