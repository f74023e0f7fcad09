"""What to install where an optional package is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needed"]


@contextmanager
def needed(what: str, install: str) -> Iterator[None]:
    """Around the import of an optional package: raise ImportError that says what needs it, and ``pip install`` of what."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{what} needs {str(error.name).partition('.')[0]}: pip install {install}") from error
