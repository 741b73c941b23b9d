"""What can be wrong with data: ``DataError``, and ``Fault`` where all faults are listed at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cellseg_helpers.config import one_line


class DataError(ValueError):
    """The data cannot be used; the message says why, where, and what to do."""


class Fault(NamedTuple):
    """What is wrong with one file; ``str`` gives it in one line."""

    image_id: str  # "" if the whole data set is concerned
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@contextmanager
def as_data_error(problem: str, remedy: str = "copy or export it again") -> Iterator[None]:
    """Any error in the block becomes a ``DataError``: decoders raise all kinds on damaged files."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{problem} ({one_line(error)}); {remedy}") from error


@contextmanager
def adding_fault(faults: list[Fault], image_id: str, file: str) -> Iterator[None]:
    """A ``DataError`` in the block ends it and is added to ``faults``."""
    try:
        yield
    except DataError as error:
        faults.append(Fault(image_id, file, str(error)))
