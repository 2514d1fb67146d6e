"""What is raised here."""

from ssdtune.errors import SSDTuneError


class AdapterError(SSDTuneError):
    """An adapter that cannot be made on this model."""
