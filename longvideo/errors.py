"""Errors that a user can cause and correct. The command line prints them as one line and exits with code 2."""

EXIT_USER_ERROR = 2
"""Exit code of a command that ends in a UserError."""


class UserError(ValueError):
    """An input cannot be used. The message contains the input, what was expected, and the remedy."""


class ConfigError(UserError):
    """A key or value of a configuration is wrong."""


class CheckpointError(UserError):
    """A model folder or weight file is missing, damaged, or does not fit the model."""


class RefusedByMain(UserError):
    """The main rank of a launcher has refused to continue and prints the reason; other ranks print nothing."""
