"""``Cells``: the one type for cells, detected or annotated. numpy and pycocotools.

A cell has a box, a class, a score and a mask, which is stored in its tight box. Run-length
encodings (RLE) are used only in files (``Cells.from_coco``, ``to_coco``) and for COCO's tools.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

CLASS_NAMES = ("epithelial", "lymphocyte", "neutrophil", "macrophage")  # of class ids 1..4


class BoxMask(NamedTuple):
    """A binary mask in its tight box.

    Attributes:
        mask: bool [h, w]; each of its four sides holds a True. An empty mask has the shape (0, 0).
        x0, y0: column and row of its top left pixel in the image.
    """

    mask: np.ndarray
    x0: int
    y0: int

    @classmethod
    def around(cls, mask: np.ndarray, x0: int = 0, y0: int = 0) -> "BoxMask":
        """Cut a mask, bool [h, w] with its top left pixel at (x0, y0), to its tight box.

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

    ``len(cells)`` is N. ``cells[rows]`` selects rows by a boolean array, indices or a slice.

    Attributes:
        image_ids: int64 [N].
        sizes: int64 [N, 2], height and width of each cell's image, px.
        labels: int64 [N], class ids 1..K.
        scores: float64 [N], 0..1; 1 for annotated cells.
        boxes: float64 [N, 4], x1, y1, x2, y2 px: the model's box or the mask's tight box.
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
        rows = rows if isinstance(rows, slice) or len(rows) else slice(0)  # any empty selection
        index = np.arange(len(self))[rows]
        arrays = (self.image_ids, self.sizes, self.labels, self.scores, self.boxes)
        return Cells(*(array[index] for array in arrays), [self.masks[row] for row in index])

    @classmethod
    def concatenate(cls, parts: Iterable["Cells"]) -> "Cells":
        """All cells of several ``Cells``, in the given order."""
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
        """The cells of one image. ``scores`` are 1 by default, ``boxes`` the masks' tight boxes."""
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
        """Read COCO results or annotations whose masks are RLEs (``segmentation``: size, counts).

        A missing ``bbox`` becomes the mask's tight box, a missing ``score`` 1.
        """
        masks = [decode_mask(row["segmentation"]) for row in rows]
        tight_boxes = [(mask.x0, mask.y0, *mask.mask.shape[::-1]) for mask in masks]
        boxes = [row.get("bbox", tight) for row, tight in zip(rows, tight_boxes, strict=True)]
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
        """Convert to COCO results: ``bbox`` is x, y, width, height px, ``segmentation`` an RLE."""
        bboxes = np.hstack([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]])
        columns = (self.image_ids, bboxes, self.scores, self.labels)
        rows = zip(*(column.tolist() for column in columns), self.rles, strict=True)
        names = ("image_id", "bbox", "score", "category_id", "segmentation")
        return [dict(zip(names, row, strict=True)) for row in rows]

    @cached_property
    def rles(self) -> list[dict[str, Any]]:
        """COCO's run-length encodings of the masks; encoded when first asked for."""
        pairs = zip(self.masks, self.sizes.tolist(), strict=True)
        return [encode_mask(mask, *size) for mask, size in pairs]

    @property
    def area_px(self) -> np.ndarray:
        """The number of pixels of each mask: int64 [N]."""
        return np.array([np.count_nonzero(mask.mask) for mask in self.masks], np.int64)

    @property
    def mask_boxes(self) -> np.ndarray:
        """The masks' tight boxes x1, y1, x2, y2 px, all 0 for an empty mask: int64 [N, 4]."""
        corners = [(x, y, x + mask.shape[1], y + mask.shape[0]) for mask, x, y in self.masks]
        return np.array(corners, np.int64).reshape(-1, 4)

    def with_masks(self, masks: Mapping[int, BoxMask]) -> "Cells":
        """A copy with the masks of some rows replaced (``masks``: by row), and these rows' boxes by
        the new masks' tight boxes; cells whose mask is empty are dropped.
        """
        changed = replace(self, masks=[masks.get(row, old) for row, old in enumerate(self.masks)])
        is_changed = np.isin(np.arange(len(self)), list(masks))
        boxes = np.where(is_changed[:, None], changed.mask_boxes, self.boxes)
        return replace(changed, boxes=boxes)[changed.area_px > 0]


def mask_iou(cells: Cells, others: Cells) -> np.ndarray:
    """Mask IoU of each of N cells with each of M others, all of one image: float64 [N, M]."""
    iou = coco_mask.iou(cells.rles, others.rles, [0] * len(others))
    return np.reshape(iou, (len(cells), len(others)))


def encode_mask(mask: BoxMask, height: int, width: int) -> dict[str, Any]:
    """COCO's run-length encoding of a mask in an image that is otherwise empty. The tests compare
    it with ``pycocotools.mask.encode``, which needs an array of the image's size; here the work
    grows with the box.

    How it works: 1. The box's columns become one line of pixels, each column followed by an empty
    pixel (unless the box is as high as the image: then a run may go on in the next column). 2. A
    run starts or ends where two neighbours differ. 3. These pixels get their numbers in COCO's
    order, ``x * height + y``; the differences of the numbers are the run lengths.

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
    step = rows + (rows < height)
    line = np.zeros(columns * step + 2, bool)  # an empty pixel at either end
    line[1:-1].reshape(columns, step)[:, :rows] = mask.mask.T
    changes = (line[1:] != line[:-1]).nonzero()[0]
    ends = np.zeros(len(changes) + 2, np.int64)  # of the runs, after a first 0
    ends[1:-1] = changes + changes // max(step, 1) * (height - step) + (x0 * height + y0)
    ends[-1] = height * width
    lengths = ends[1:] - ends[:-1]
    runs = {"size": [height, width], "counts": lengths if lengths[-1] else lengths[:-1]}
    counts = coco_mask.frPyObjects(runs, height, width)["counts"]
    return {"size": runs["size"], "counts": counts.decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> BoxMask:
    """The mask of a valid RLE (``size``; ``counts``, str or bytes) in its tight box.

    Decodes only the box's columns. The tests compare it with ``pycocotools.mask.decode``.

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

    Each number is written in groups of 5 bits, lowest first, each group as one character:
    ``chr(48 + group)``. Adding 32 to a group says that another follows; 16 set in the last group
    says that the number is negative. From the fourth run on, the number is the run's length minus
    that of the run two before (``rleFrString`` of the COCO API).

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
