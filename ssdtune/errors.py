"""The base of every error that a user can mend."""

import errno


class SSDTuneError(ValueError):
    """What could not be done, the numbers, the likely cause, and the next action.

    Its message is printed as it is, without a traceback, by the command line.
    """


def reason_of(error: OSError) -> str:
    """Why the system refused, with the errno's name: "No space left on device (ENOSPC)"."""
    return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'unknown errno')})"
