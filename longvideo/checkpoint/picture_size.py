"""The size of pictures: how it is written, and which sizes a model can generate in place of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longvideo.errors import UserError

MAX_CHARACTERS = 20


@dataclass(frozen=True)
class PictureSize:
    """Width and height in pixels."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> PictureSize:
        """Return the size of a text such as "1280x704". Raises UserError for another text."""
        width, cross, height = text.lower().partition("x")
        numbers = cross and width.isdecimal() and height.isdecimal() and len(text) <= MAX_CHARACTERS
        if not numbers or not int(width) or not int(height):
            raise UserError(f"size is {text!r}; expected WIDTHxHEIGHT in pixels, such as 1280x704")
        return cls(int(width), int(height))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    def check(self, own: PictureSize, unit: int) -> None:
        """Raise UserError unless a model can generate this size.

        own: size that the model was trained for. Other sizes may have at most as many tokens. unit: pixels along the
        side of a token.
        """
        if self.width % unit or self.height % unit:
            raise UserError(f"size is {self}; expected multiples of {unit}, such as {self._near(own, unit)}")
        if self._tokens(unit) > own._tokens(unit):
            raise UserError(
                f"size is {self}, {self._tokens(unit)} tokens for each latent frame; the model was trained with"
                f" {own._tokens(unit)}, {own}; use at most as many, such as {self._near(own, unit)}"
            )

    def _tokens(self, unit: int) -> int:
        return (self.width // unit) * (self.height // unit)

    def _near(self, own: PictureSize, unit: int) -> PictureSize:
        """Return a possible size of about this shape."""
        scale = min(1.0, math.sqrt(own.width * own.height / (self.width * self.height)))
        # one side may be shorter than a token; the other then has no more tokens than the model's budget
        columns = min(max(1, int(self.width * scale / unit)), own._tokens(unit))
        rows = min(max(1, int(self.height * scale / unit)), own._tokens(unit) // columns)
        return PictureSize(columns * unit, rows * unit)
