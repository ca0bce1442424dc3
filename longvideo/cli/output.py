"""The option that names the file or folder a command writes, spelled the same in every command."""

OUTPUT = ("--output", "--out", "-o")
