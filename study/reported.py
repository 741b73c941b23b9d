"""Values that the five reports give, read from ``reported.yaml``, and the post-processing that they
apply to detections. Needs no torch.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict

from cellseg_helpers import borders, postprocess
from cellseg_helpers.cells import Cells


class Record(BaseModel):
    """A part of ``reported.yaml``; the comment at its top explains the fields.

    Raises:
        ValueError: a field is unknown, missing or of a wrong type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(Record):
    label: str
    reported: float | str | None = None
    run: str
    variant: str = "all detections"
    measure: str = "AP50"


class Comparison(Record):
    claim: str
    base: str
    other: str
    expected: Literal[-1, 0, 1] = 1


class Table(Record):
    title: str
    note: str = ""
    not_needed: bool = False
    rows: list[Row] = []
    comparisons: list[Comparison] = []
    columns: list[str] = []
    measured: list[str] = []
    values: list[list[int | float | str]] = []

    @property
    def frame(self) -> pd.DataFrame:
        """The reported ``values``, with empty ``measured`` columns beside them."""
        empty = dict.fromkeys(self.measured, math.nan)
        return pd.DataFrame(self.values, columns=self.columns).assign(**empty)


class Reported(Record):
    systems: dict[str, str]
    size_factors: dict[float, float]
    tables: dict[str, Table]


def read() -> Reported:
    """Read and check ``reported.yaml``.

    >>> [row.reported for row in read().tables["A-T2"].rows]
    [0.335, 0.334, 0.357]
    """
    text = Path(__file__).with_name("reported.yaml").read_text(encoding="utf-8")
    return Reported.model_validate(yaml.safe_load(text))


SYSTEMS, _size_factors, TABLES = (value for _, value in read())
SCORE_TABLES = {key: table for key, table in TABLES.items() if table.rows}


def column(key: str, name: str) -> list[Any]:
    """One column of the reported values of the table ``key``."""
    return TABLES[key].frame[name].tolist()


LOSSES = {key: column(key, "reported") for key in ("B-T2", "C-Fig3")}
E_THRESHOLDS = dict(enumerate(column("E-T3", "reported_threshold"), 1))  # by class id
E_GRID = column("E-sweep", "score_threshold")
E_SIZE_FACTORS = list(_size_factors.items())
E_BOTH = "class thresholds + refinement"


def refine(cells: Cells) -> Cells:
    """Refine masks as report E does: close 5 x 5, open 3 x 3, keep the largest component, fill its
    holes, close 3 x 3. Instead of squares, discs with radii of 2, 1 and 1 px are used.
    """
    opened = postprocess.open_masks(postprocess.close_masks(cells, 2), 1)
    filled = postprocess.fill_holes(postprocess.keep_largest_component(opened))
    return postprocess.close_masks(filled, 1)


_apply_thresholds = partial(postprocess.apply_class_thresholds, score_thresholds=E_THRESHOLDS)
_raise_small = partial(postprocess.adjust_scores_by_size, factors=E_SIZE_FACTORS)
VARIANTS: dict[str, Callable[[Cells], Cells]] = {
    "all detections": lambda cells: cells,
    "score ≥ 0.2": lambda cells: cells[cells.scores >= 0.2],
    "score ≥ 0.5": lambda cells: cells[cells.scores >= 0.5],
    "no box at the border": borders.drop_border_detections,
    "class thresholds": _apply_thresholds,
    E_BOTH: lambda cells: refine(_apply_thresholds(_raise_small(cells))),
    "score ≥ 0.5 + refinement": lambda cells: refine(VARIANTS["score ≥ 0.5"](_raise_small(cells))),
}
