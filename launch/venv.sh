# Makes the virtual environment and activates it; to be sourced by the other scripts here.
#
# SSDTUNE_VENV   where it lives (default: .venv in the repository)
# PYTHON         the Python to make it with (default: the first 3.11 or newer that is found)
#
# torch goes first and by itself: named by a range, or pulled in by another package, it may bring
# gigabytes of CUDA libraries to a machine without a GPU. A second run finds the stamp and is quick.

ssdtune_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SSDTUNE_VENV=${SSDTUNE_VENV:-$ssdtune_root/.venv}

ssdtune_fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

# Prints the first Python that runs, is new enough and can make a virtual environment.
ssdtune_find_python() {
  local candidate found=""
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    found=$candidate
    "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 || continue
    command -v "$candidate"
    return
  done
  [ -z "$found" ] || ssdtune_fail \
    "$found is new enough but cannot make virtual environments (no ensurepip)." \
    "Debian and Ubuntu: apt-get install python3-venv"
  ssdtune_fail "no Python 3.11 or newer found (looked for python3, python3.11 … python3.14)." \
    "Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

ssdtune_has_gpu() {
  [ -e /dev/nvidia0 ] || [ -e /dev/dxg ] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1
}

# The exact torch of constraints.txt, or whatever version of it the user's pip is set to find.
ssdtune_install_torch() {
  local torch index=https://download.pytorch.org/whl/cpu
  torch=$(grep '^torch==' "$ssdtune_root/constraints.txt")
  if ! ssdtune_has_gpu && timeout 5 python -c '
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=4)' "$index/torch/" >/dev/null 2>&1; then
    echo "no NVIDIA GPU here: installing PyTorch's CPU build" >&2
    # Without dependencies: those come, as pinned, from the usual index in the next step.
    python -m pip install --quiet --no-deps --index-url "$index" "$torch" && return
  fi
  python -m pip install --quiet -c "$ssdtune_root/constraints.txt" "$torch"
}

ssdtune_make_venv() {
  local python stamp want
  stamp=$SSDTUNE_VENV/.ssdtune-stamp
  want="$ssdtune_root $(cat "$ssdtune_root/pyproject.toml" "$ssdtune_root/constraints.txt" | cksum)"
  if ! "$SSDTUNE_VENV/bin/python" -c '' >/dev/null 2>&1; then
    python=$(ssdtune_find_python) || exit 1
    # --clear empties the folder: only one that is a virtual environment already, or nothing.
    [ -e "$SSDTUNE_VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$SSDTUNE_VENV" 2>/dev/null)" ] || ssdtune_fail \
      "$SSDTUNE_VENV exists and is no virtual environment: it is left alone." \
      "Name another place: SSDTUNE_VENV=/path/to/venv $0"
    echo "making $SSDTUNE_VENV with $("$python" --version)" >&2
    "$python" -m venv --clear "$SSDTUNE_VENV"
  fi
  # shellcheck disable=SC1091
  . "$SSDTUNE_VENV/bin/activate"
  [ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0
  echo "installing into $SSDTUNE_VENV (some minutes, once)" >&2
  ssdtune_install_torch
  python -m pip install --quiet -c "$ssdtune_root/constraints.txt" -e "$ssdtune_root[dev]"
  printf '%s\n' "$want" >"$stamp"
}

ssdtune_make_venv
