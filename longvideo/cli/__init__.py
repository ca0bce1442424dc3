"""The command line: one module per command, which imports large packages only when the command runs."""
