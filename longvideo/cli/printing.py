"""Text from files, made fit for a terminal."""

MAX_CHARACTERS = 2000


def printable(text: str, *, limit: int = MAX_CHARACTERS) -> str:
    """Write control characters, which a terminal would obey, as escapes; cut what is longer than the limit."""
    shown = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text[: limit + 1])
    return shown if len(text) <= limit else f"{shown[:limit]} ..."
