"""``Cells``: the one type for cells, found by a model or annotated. numpy and pycocotools.

A cell is a box, a class, a score and a mask, stored in its tight box. Run-length encodings (RLE)
exist only in files (``Cells.from_coco``, ``Cells.to_coco``) and where COCO's tools ask for them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

CLASS_NAMES = ("epithelial", "lymphocyte", "neutrophil", "macrophage")  # class_id k: [k - 1]


class BoxMask(NamedTuple):
    """A binary mask in its tight box.

    Attributes:
        mask: bool [h, w]; every side of it has a pixel. Shape (0, 0) where the mask is empty.
        x0, y0: column and row of its top left pixel in the image.
    """

    mask: np.ndarray
    x0: int
    y0: int

    @classmethod
    def around(cls, mask: np.ndarray, x0: int = 0, y0: int = 0) -> "BoxMask":
        """The tight mask of ``mask``, bool [h, w] with its top left pixel at (x0, y0).

        >>> BoxMask.around(np.array([[0, 0, 0], [0, 1, 1]], bool), x0=10, y0=20)
        BoxMask(mask=array([[ True,  True]]), x0=11, y0=21)
        """
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return cls(np.zeros((0, 0), bool), 0, 0)
        (top, bottom), (left, right) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
        return cls(mask[top : bottom + 1, left : right + 1].copy(), x0 + left, y0 + top)


@dataclass(frozen=True, eq=False)
class Cells:
    """N cells of one or more images.

    ``len(cells)`` is N, ``cells[rows]`` selects by a mask, by indices or by a slice.

    Attributes:
        image_ids: int64 [N].
        sizes: int64 [N, 2], height and width of each cell's image, px.
        labels: int64 [N], class ids 1..K.
        scores: float64 [N], 0..1; 1 for annotated cells.
        boxes: float64 [N, 4], x1, y1, x2, y2 px: the model's box, or the mask's.
        masks: N masks, each inside its image.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: list[BoxMask]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray | Sequence[int] | slice) -> "Cells":
        rows = rows if isinstance(rows, slice) or len(rows) else slice(0)
        index = np.arange(len(self))[rows]
        arrays = (self.image_ids, self.sizes, self.labels, self.scores, self.boxes)
        return Cells(*(array[index] for array in arrays), [self.masks[row] for row in index])

    @classmethod
    def concatenate(cls, parts: Iterable["Cells"]) -> "Cells":
        """All cells of some parts, in their order."""
        parts = [cls.empty(), *parts]
        names = ("image_ids", "sizes", "labels", "scores", "boxes")
        arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return cls(*arrays, [mask for part in parts for mask in part.masks])

    @classmethod
    def empty(cls) -> "Cells":
        return cls.from_coco([])

    @classmethod
    def of_image(
        cls,
        height: int,
        width: int,
        labels: np.ndarray,
        masks: Sequence[BoxMask],
        scores: np.ndarray | None = None,
        boxes: np.ndarray | None = None,
        image_id: int = 1,
    ) -> "Cells":
        """The cells of one image; without ``scores`` 1 each, without ``boxes`` the masks' own."""
        cells = cls(
            image_ids=np.full(len(masks), image_id, np.int64),
            sizes=np.full((len(masks), 2), (height, width), np.int64),
            labels=np.asarray(labels, np.int64),
            scores=np.ones(len(masks)) if scores is None else np.asarray(scores, np.float64),
            boxes=np.zeros((len(masks), 4)) if boxes is None else np.asarray(boxes, np.float64),
            masks=list(masks),
        )
        return replace(cells, boxes=cells.mask_boxes.astype(float)) if boxes is None else cells

    @classmethod
    def from_coco(cls, rows: Sequence[Mapping[str, Any]]) -> "Cells":
        """COCO results or annotations whose masks are RLEs (``segmentation``: size, counts).

        Without a ``bbox`` the mask's box is taken, without a ``score`` 1.
        """
        masks = [decode_mask(row["segmentation"]) for row in rows]
        own_boxes = [(mask.x0, mask.y0, *mask.mask.shape[::-1]) for mask in masks]
        boxes = [row.get("bbox", own) for row, own in zip(rows, own_boxes, strict=True)]
        boxes = np.array(boxes, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return cls(
            image_ids=np.array([row["image_id"] for row in rows], np.int64),
            sizes=np.array([row["segmentation"]["size"] for row in rows], np.int64).reshape(-1, 2),
            labels=np.array([row["category_id"] for row in rows], np.int64),
            scores=np.array([row.get("score", 1) for row in rows], np.float64),
            boxes=boxes,
            masks=masks,
        )

    def to_coco(self) -> list[dict[str, Any]]:
        """COCO results; a ``bbox`` is x, y, width, height px, a ``segmentation`` an RLE."""
        sides = np.hstack([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]])
        columns = (self.image_ids, sides, self.scores, self.labels)
        rows = zip(*(column.tolist() for column in columns), self.to_rles(), strict=True)
        names = ("image_id", "bbox", "score", "category_id", "segmentation")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def to_rles(self) -> list[dict[str, Any]]:
        """The masks' run-length encodings."""
        pairs = zip(self.masks, self.sizes.tolist(), strict=True)
        return [encode_mask(mask, *size) for mask, size in pairs]

    @property
    def area_px(self) -> np.ndarray:
        """int64 [N], pixels of each mask."""
        return np.array([np.count_nonzero(mask.mask) for mask in self.masks], np.int64)

    @property
    def mask_boxes(self) -> np.ndarray:
        """int64 [N, 4], the masks' tight boxes x1, y1, x2, y2 px; all 0 for an empty mask."""
        corners = [(x, y, x + mask.shape[1], y + mask.shape[0]) for mask, x, y in self.masks]
        return np.array(corners, np.int64).reshape(-1, 4)

    def with_masks(self, masks: Mapping[int, BoxMask]) -> "Cells":
        """The cells with some masks, and the boxes of these rows, replaced; then without the cells
        whose mask is empty.
        """
        changed = replace(self, masks=[masks.get(row, old) for row, old in enumerate(self.masks)])
        is_new = np.isin(np.arange(len(self)), list(masks))
        boxes = np.where(is_new[:, None], changed.mask_boxes, self.boxes)
        return replace(changed, boxes=boxes)[changed.area_px > 0]


def mask_iou(cells: Cells, others: Cells) -> np.ndarray:
    """Mask IoU of each cell with each of others, all of one image: float64 [N, M]."""
    iou = coco_mask.iou(cells.to_rles(), others.to_rles(), [0] * len(others))
    return np.reshape(iou, (len(cells), len(others)))


def encode_mask(mask: BoxMask, height: int, width: int) -> dict[str, Any]:
    """COCO's run-length encoding of a mask in an otherwise empty image: the bytes of
    ``pycocotools.mask.encode``, its oracle, without an array of the image's size.

    Returns:
        ``{"size": [height, width], "counts": str}``.

    Raises:
        ValueError: the mask reaches outside the image.

    >>> encode_mask(BoxMask(np.ones((2, 3), bool), x0=1, y0=1), height=5, width=6)
    {'size': [5, 6], 'counts': '6230009'}
    """
    (rows, columns), (x0, y0) = mask.mask.shape, mask[1:]
    if min(x0, y0) < 0 or y0 + rows > height or x0 + columns > width:
        raise ValueError(
            f"a {rows} x {columns} px mask at x {x0}, y {y0} reaches outside its "
            f"{height} x {width} px image"
        )
    line = np.zeros(columns * height + 2, bool)  # the box's columns, and a pixel at either end
    line[1:-1].reshape(columns, height)[:, y0 : y0 + rows] = mask.mask.T
    changes = np.flatnonzero(line[1:] != line[:-1]) + x0 * height
    lengths = np.diff(np.concatenate([[0], changes, [height * width]]))
    runs = {"size": [height, width], "counts": lengths if lengths[-1] else lengths[:-1]}
    counts = coco_mask.frPyObjects(runs, height, width)["counts"]
    return {"size": runs["size"], "counts": counts.decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> BoxMask:
    """The mask of an RLE (``size``; ``counts``, str or bytes, well formed) in its tight box.

    Only the box's columns are decoded; the oracle is ``pycocotools.mask.decode``.

    >>> decode_mask({"size": [5, 6], "counts": "6230009"})[1:]
    (1, 1)
    """
    height = rle["size"][0]
    left, _, columns, _ = coco_mask.toBbox(rle).astype(int).tolist()
    ends = np.cumsum(run_lengths(rle["counts"])).clip(left * height, (left + columns) * height)
    is_mask = np.arange(len(ends)) % 2 == 1
    pixels = np.repeat(is_mask, np.diff(ends, prepend=left * height)).reshape(-1, height)
    return BoxMask.around(pixels.T, left)


def run_lengths(counts: str | bytes) -> np.ndarray:
    """The run lengths in COCO's compressed counts: int64 [R], background and mask in turn.

    Each number stands in groups of 5 bits, lowest first, as characters from "0" on; bit 32 says
    that more groups follow, bit 16 of the last that the number is negative. From the fourth on,
    a number is the difference to the one two before it (``rleFrString`` of the COCO API).

    >>> run_lengths("6230009").tolist()
    [6, 2, 3, 2, 3, 2, 12]
    """
    lengths, number, shift = [], 0, 0
    for character in counts.encode("ascii") if isinstance(counts, str) else counts:
        group = character - 48
        number |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        number -= (1 << shift) if group & 16 else 0
        lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
        number = shift = 0
    return np.array(lengths, np.int64)
