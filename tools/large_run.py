"""A run folder of the size of the full study, without a model: to time the analysis notebooks.

    python tools/large_run.py outputs/large_run [--images 200] [--detections 100000]

Images of about 1000 x 1000 px hold about 300 cells each, wavy blobs 15 to 50 px across; those that
the border cuts are not annotated. The detections are noisy copies of all of these, some of the
wrong class, some twice, and blobs where no cell is; their scores mostly tell right from wrong.
There are no pixel images, and nothing was trained: the settings are mere defaults.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from cellseg_helpers.borders import near_border
from cellseg_helpers.cells import CLASS_NAMES, Cells
from cellseg_helpers.config import ROOT, RunConfig, resolve_path
from cellseg_helpers.data.labels import encode_box_masks
from cellseg_helpers.metrics import evaluate
from cellseg_helpers.runs import provenance, write_json, write_text

CELLS_PER_MEGAPIXEL = 350  # before the border cuts or hides a seventh of them
CLASS_SHARES = (0.45, 0.45, 0.06, 0.04)
DIAMETERS_PX = np.array([(20, 40), (15, 25), (20, 32), (34, 50)])


def throw_blobs(
    rng: np.random.Generator, count: int, image: dict[str, Any], outside_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Class ids int [n]; shapes float [n, 7]: centre x and y, mean radius, px, then amplitudes and
    phases of two waves.
    """
    class_ids = rng.choice(len(CLASS_NAMES), count, p=CLASS_SHARES) + 1
    radii = rng.uniform(*DIAMETERS_PX[class_ids - 1].T) / 2
    places = rng.uniform(
        -outside_px, (image["width"] + outside_px, image["height"] + outside_px), (count, 2)
    )
    return class_ids, np.column_stack(
        [places, radii, rng.normal(0, 0.07, (count, 2)), rng.uniform(0, 2 * np.pi, (count, 2))]
    )


def mask_of(shape: np.ndarray, image: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    """What the image shows of a blob, bool [h, w], with its column and row, px."""
    x, y, radius = shape[:3]
    x0, y0 = max(int(x - 1.3 * radius), 0), max(int(y - 1.3 * radius), 0)
    x1, y1 = (
        min(int(x + 1.3 * radius) + 2, image["width"]),
        min(int(y + 1.3 * radius) + 2, image["height"]),
    )
    rows, columns = np.ogrid[y0:y1, x0:x1]
    angle = np.arctan2(rows - y, columns - x)
    wave = sum(
        a * np.cos(k * angle + phase)
        for k, a, phase in zip((2, 3), shape[3:5], shape[5:], strict=True)
    )
    return np.hypot(rows - y, columns - x) <= radius * (1 + wave), x0, y0


def draw(
    image: dict[str, Any], class_ids: np.ndarray, shapes: np.ndarray
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """COCO rows of the blobs of which the image shows something, and which these are (int)."""
    masks = [mask_of(shape, image) for shape in shapes]
    shown = np.flatnonzero([mask.any() for mask, _, _ in masks])
    rles = encode_box_masks(
        [masks[row] for row in shown], [(image["height"], image["width"])] * len(shown)
    )
    parts = zip(class_ids[shown].tolist(), coco_mask.toBbox(rles).tolist(), rles, strict=True)
    return [
        {"image_id": image["id"], "category_id": k, "bbox": box, "segmentation": rle}
        for k, box, rle in parts
    ], shown


def detect(
    rng: np.random.Generator,
    image: dict[str, Any],
    class_ids: np.ndarray,
    shapes: np.ndarray,
    count: int,
) -> list[dict]:
    """At most ``count`` detections: found cells, second finds, and false positives to fill up."""
    found = np.flatnonzero(rng.random(len(shapes)) < 0.88)
    copied = np.append(found, rng.choice(found, len(found) // 4, replace=False))
    first, right = np.arange(len(copied)) < len(found), rng.random(len(copied)) < 0.94
    copied_ids = np.where(right, class_ids[copied], class_ids[copied] % len(CLASS_NAMES) + 1)
    copies = shapes[copied]
    copies[:, :3] += (
        np.where(first, 0.1, 0.2)[:, None] * copies[:, 2:3] * rng.normal(size=(len(copied), 3))
    )
    other_ids, others = throw_blobs(rng, max(count - len(copied), 0), image, outside_px=0)
    copied_scores = rng.beta(
        np.where(first & right, 5, 2), np.where(first, np.where(right, 2, 3), 5)
    )
    scores = 0.05 + 0.95 * np.append(copied_scores, rng.beta(1, 5, len(others)))
    rows, shown = draw(
        image, np.append(copied_ids, other_ids)[:count], np.append(copies, others, axis=0)[:count]
    )
    return [row | {"score": score} for row, score in zip(rows, scores[shown].tolist(), strict=True)]


def draw_run(num_images: int, num_detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth as a COCO data set, and about ``num_detections`` COCO results."""
    rng = np.random.default_rng(0)
    images, cells, detections = [], [], []
    counts = np.diff(np.linspace(0, num_detections, num_images + 1).astype(int))
    for number, count in enumerate(
        tqdm(counts, disable=None), 1
    ):  # no bar where no terminal shows it
        height, width = rng.integers(900, 1101, 2).tolist()
        image = {
            "id": number,
            "file_name": f"image{number}",
            "height": height,
            "width": width,
            "patient": f"drawn-{number % 10}",
        }
        class_ids, shapes = throw_blobs(
            rng, round(CELLS_PER_MEGAPIXEL * height * width / 1e6), image, outside_px=25
        )
        drawn, shown = draw(image, class_ids, shapes)
        images.append(image)
        cells += drawn
        detections += detect(rng, image, class_ids[shown], shapes[shown], count)
    at_border = near_border(Cells.from_coco(cells))
    annotations = [cell for cell, near in zip(cells, at_border, strict=True) if not near]
    for number, cell in enumerate(annotations, 1):
        cell |= {"id": number, "iscrowd": 0, "area": int(coco_mask.area(cell["segmentation"]))}
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="absent or empty")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--detections", type=int, default=100_000, help="in all images together")
    arguments = parser.parse_args()
    folder = resolve_path(arguments.folder)
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{arguments.folder} is not empty; delete it or name another folder")
    truth, detections = draw_run(arguments.images, arguments.detections)
    most = math.ceil(arguments.detections / arguments.images)
    config = RunConfig(run_name=folder.name, data="drawn detections", detections_per_image=most)
    split = {
        "kind": "random",
        "train": [],
        "validation": [image["file_name"] for image in truth["images"]],
    }
    parts = {"settings": config.to_dict(), "split": split | {"warning": "nothing was trained"}}
    parts |= {
        "provenance": provenance() | {"data_fingerprint": "none: drawn by tools/large_run.py"}
    }
    for name, part in (parts | {"truth": truth, "detections": detections}).items():
        write_json(folder / f"{name}.json", part)
    write_text(folder / "history.csv", "epoch,learning_rate,loss,train_minutes,validation_ap50\n")
    cells = Cells.from_coco(detections)
    metrics = evaluate(truth, cells, config.score_threshold, config.iou_threshold)
    write_json(folder / "metrics.json", metrics)
    at = metrics["at_threshold"]["all"]
    print(
        f"{len(detections)} detections of {metrics['cells']} cells: precision {at['precision']:.2f}, recall {at['recall']:.2f}"
    )
    for notebook in sorted((ROOT / "notebooks").glob("0[3-6]_*.ipynb")):
        output = f"outputs/notebooks/{notebook.stem}_{folder.name}.ipynb"
        print(
            f"time .venv/bin/papermill --cwd notebooks notebooks/{notebook.name} {output} -p run_dir {arguments.folder}"
        )


if __name__ == "__main__":
    main()
