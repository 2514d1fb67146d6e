"""The base of every error that a user can mend."""


class SSDTuneError(ValueError):
    """What could not be done, the numbers, the likely cause, and the next action.

    Its message is printed as it is, without a traceback, by the command line.
    """
