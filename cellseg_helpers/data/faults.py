"""``DataError`` for data that cannot be used; ``Fault`` for one entry in a list of all faults."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cellseg_helpers.config import one_line


class DataError(ValueError):
    """The data cannot be used; the message says why, where, and what to do."""


class Fault(NamedTuple):
    """What is wrong with one file; ``str(fault)`` is one line of a message."""

    image_id: str  # "" if the fault concerns the whole data set
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@contextmanager
def as_data_error(problem: str, remedy: str = "copy or export it again") -> Iterator[None]:
    """Turn any error in the block into a ``DataError``: decoders raise many types of errors."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{problem} ({one_line(error)}); {remedy}") from error


@contextmanager
def adding_fault(faults: list[Fault], image_id: str, file: str) -> Iterator[None]:
    """Add a ``DataError`` in the block to ``faults``, and go on after the block."""
    try:
        yield
    except DataError as error:
        faults.append(Fault(image_id, file, str(error)))
