#!/usr/bin/env bash
# Makes the virtual environment, then fine-tunes a real model under a memory budget smaller than
# its weights.
#   --big            a random 4 GB model under a 1 GB budget, 3 steps
#   --dataset FILE   your own JSONL instead of Python's language reference
#   --help           everything else
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ssdtune_root"
exec python -m ssdtune.quickstart "$@"
