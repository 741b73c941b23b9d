"""Checks of boxes and run-length encoded masks that somebody else wrote. numpy.

``data.labels`` says how they are written; its functions take for granted that they are whole.
"""

from collections.abc import Sequence

import numpy as np

from cellseg_helpers.data.labels import mask_boxes, run_lengths

MASKS_PER_BATCH = 10_000
CORNERS, SIDES = "corners", "x, y, width, height"
LARGEST_GROUPS = 6  # of 5 bits in one number: enough for 500 million px


def check_masks(
    texts: Sequence[str], sizes: Sequence[Sequence[int]]
) -> tuple[np.ndarray, list[str]]:
    """The tight boxes of masks, and what is wrong with the masks; none of them is decoded to
    pixels.

    Args:
        texts: compressed counts of N masks.
        sizes: height and width of each, px.

    Returns:
        int64 [N, 4], x, y, width, height in px, 0 where there is no box; and N sentences, "" for a
        mask that is whole.
    """
    boxes, problems = [np.zeros((0, 4), np.int64)], []
    for first in range(0, len(texts), MASKS_PER_BATCH):
        part = slice(first, first + MASKS_PER_BATCH)
        found = _check_batch(
            [text.encode("utf-8", "surrogatepass") for text in texts[part]],
            np.array(sizes[part], np.int64),
        )
        boxes.append(found[0])
        problems += found[1]
    return np.concatenate(boxes), problems


def box_reading(box: Sequence[float], mask_box: Sequence[float]) -> str:
    """What four numbers are, by the overlap with their mask's box (x, y, width, height): ``SIDES``,
    ``CORNERS`` or "unclear".
    """
    x, y, c, d = box
    as_sides, as_corners = _iou(box, mask_box), _iou((x, y, c - x, d - y), mask_box)
    return "unclear" if as_sides == as_corners else SIDES if as_sides > as_corners else CORNERS


def _iou(box: Sequence[float], other: Sequence[float]) -> float:
    (x, y, width, height), (u, v, w, h) = box, other
    shared = max(0, min(x + width, u + w) - max(x, u)) * max(0, min(y + height, v + h) - max(y, v))
    return shared / (width * height + w * h - shared) if shared else 0.0


def _check_batch(texts: list[bytes], sizes: np.ndarray) -> tuple[np.ndarray, list[str]]:
    no_rle = "its counts are damaged: they are no text of a compressed RLE"
    problems = np.where(_is_text_of_numbers(texts), "", no_rle).astype(object)
    boxes = np.zeros((len(texts), 4), np.int64)
    readable = np.flatnonzero(problems == "")
    if len(readable):
        lengths, rows = run_lengths([texts[row] for row in readable])
        begins = np.cumsum(rows) - rows
        covered, expected = (
            np.add.reduceat(lengths.sum(axis=1), begins),
            sizes[readable].prod(axis=1),
        )
        negative = np.minimum.reduceat(lengths.min(axis=1), begins) < 0
        for place in np.flatnonzero(negative | (covered != expected)).tolist():
            wrong = "one is negative" if negative[place] else f"they cover {covered[place]:,} px"
            problems[readable[place]] = (
                f"its counts are damaged: run lengths must cover the mask's {expected[place]:,} px, but {wrong}"
            )
        empty = np.maximum.reduceat(lengths[:, 1], begins) == 0
        problems[readable[empty & (problems[readable] == "")]] = (
            "its mask has no pixel; leave such results out"
        )
    whole = np.flatnonzero(problems == "")
    boxes[whole] = mask_boxes(
        [{"size": sizes[row].tolist(), "counts": texts[row]} for row in whole]
    )
    return boxes, problems.tolist()


def _is_text_of_numbers(texts: list[bytes]) -> np.ndarray:
    """bool [N]: only characters of the encoding, each number with an end, none too long."""
    lengths = np.array([len(text) for text in texts])
    groups = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(len(texts)), lengths)
    goes_on = groups >= 32
    number_ends = np.flatnonzero(~goes_on | (np.diff(owner, append=-1) != 0))
    wrong = (groups < 0) | (groups > 63)
    wrong[number_ends] |= goes_on[number_ends] | (np.diff(number_ends, prepend=-1) > LARGEST_GROUPS)
    return (lengths > 0) & (np.bincount(owner, wrong, len(texts)) == 0)
