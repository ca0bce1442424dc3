"""Close a resource at the end of a `with` statement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from types import TracebackType

R = TypeVar("R", bound="ClosedAtEnd")


class ClosedAtEnd(ABC):
    """A resource that is its own context manager."""

    @abstractmethod
    def close(self) -> None:
        """Free the resource. Closing twice does nothing."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
