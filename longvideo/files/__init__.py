"""Atomic writing of files and folders, locks, and bounded reading of text."""

from longvideo.files.locks import BusyError, locked, locked_target
from longvideo.files.names import LOCK_SUFFIX, TEMPORARY_SUFFIX, temporary_name, temporary_names
from longvideo.files.reading import check_file, check_text, parse_json, read_json, read_lines, read_text, reason
from longvideo.files.writing import (
    Spool,
    WriteError,
    append_line,
    check_target,
    copy_file,
    flush,
    spooled,
    write_bytes,
    write_file,
    write_folder,
    write_json,
    write_text,
)

__all__ = [
    "LOCK_SUFFIX",
    "TEMPORARY_SUFFIX",
    "BusyError",
    "Spool",
    "WriteError",
    "append_line",
    "check_file",
    "check_target",
    "check_text",
    "copy_file",
    "flush",
    "locked",
    "locked_target",
    "parse_json",
    "read_json",
    "read_lines",
    "read_text",
    "reason",
    "spooled",
    "temporary_name",
    "temporary_names",
    "write_bytes",
    "write_file",
    "write_folder",
    "write_json",
    "write_text",
]
