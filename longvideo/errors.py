"""Errors that a user can cause and mend. The command line prints them as one line and exits with code 2."""


class UserError(ValueError):
    """What was given cannot be used; the message says what, got, wanted and the remedy."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class CheckpointError(UserError):
    """A model folder or weight file is missing, damaged or does not fit."""
