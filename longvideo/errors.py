"""Errors that a user can cause and mend. The command line prints them as one line and exits with code 2."""

EXIT_USER_ERROR = 2
"""Exit code of a command that ends in a UserError."""


class UserError(ValueError):
    """What was given cannot be used; the message says what, got, wanted and the remedy."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class CheckpointError(UserError):
    """A model folder or weight file is missing, damaged or does not fit."""


class RefusedByMain(UserError):
    """The main rank of a launcher has refused to continue, and prints why; other ranks print nothing."""
