"""What `ssdtune pack` does: packs a model, and says what the packing costs."""

from ssdtune.pack.command import Request, run_pack

__all__ = ["Request", "run_pack"]
