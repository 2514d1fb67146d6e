"""What keeps a run from starting."""

from ssdtune.errors import SSDTuneError


class RunError(SSDTuneError):
    """A run that cannot start; the message names the key."""
