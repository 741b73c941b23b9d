"""A run folder of the size of the full study, without a model: to time the analysis notebooks.

    python -m tools.large_run outputs/large_run [--images 200] [--detections 100000]

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
from tqdm import tqdm

from cellseg_helpers.borders import near_border
from cellseg_helpers.cells import CLASS_NAMES, BoxMask, Cells
from cellseg_helpers.config import ROOT, RunConfig, resolve_path
from cellseg_helpers.metrics import evaluate
from cellseg_helpers.runs import provenance, write_json, write_text

CELLS_PER_MEGAPIXEL = 350  # before the border cuts or hides a seventh of them
CLASS_SHARES = (0.45, 0.45, 0.06, 0.04)
DIAMETERS_PX = np.array([(20, 40), (15, 25), (20, 32), (34, 50)])


def throw_blobs(
    rng: np.random.Generator, count: int, image: dict[str, Any], outside_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random blobs, with centres up to ``outside_px`` outside the image.

    Returns:
        class_ids: int [n].
        shapes: float [n, 7]: centre x and y, mean radius, px, then amplitudes and phases of two
            waves.
    """
    class_ids = rng.choice(len(CLASS_NAMES), count, p=CLASS_SHARES) + 1
    radii = rng.uniform(*DIAMETERS_PX[class_ids - 1].T) / 2
    furthest = (image["width"] + outside_px, image["height"] + outside_px)
    centres = rng.uniform(-outside_px, furthest, (count, 2))
    waves = (rng.normal(0, 0.07, (count, 2)), rng.uniform(0, 2 * np.pi, (count, 2)))
    return class_ids, np.column_stack([centres, radii, *waves])


def mask_of(shape: np.ndarray, height: int, width: int) -> BoxMask:
    """What an image shows of a blob."""
    x, y, radius = shape[:3]
    x0, y0 = max(int(x - 1.3 * radius), 0), max(int(y - 1.3 * radius), 0)
    x1, y1 = min(int(x + 1.3 * radius) + 2, width), min(int(y + 1.3 * radius) + 2, height)
    rows, columns = np.ogrid[y0:y1, x0:x1]
    angle = np.arctan2(rows - y, columns - x)
    waves = zip((2, 3), shape[3:5], shape[5:], strict=True)
    wave = sum(amplitude * np.cos(k * angle + phase) for k, amplitude, phase in waves)
    return BoxMask.around(np.hypot(rows - y, columns - x) <= radius * (1 + wave), x0, y0)


def draw(
    image: dict[str, Any], class_ids: np.ndarray, shapes: np.ndarray, scores: np.ndarray | None
) -> tuple[Cells, np.ndarray]:
    """The blobs of which the image shows something, and their rows in ``shapes`` (int)."""
    height, width = image["height"], image["width"]
    masks = [mask_of(shape, height, width) for shape in shapes]
    cells = Cells.of_image(height, width, class_ids, masks, scores, image_id=image["id"])
    shown = np.flatnonzero(cells.area_px)
    return cells[shown], shown


def detect(
    rng: np.random.Generator, image: dict, class_ids: np.ndarray, shapes: np.ndarray, count: int
) -> Cells:
    """At most ``count`` detections: found cells, second finds, and false positives to fill up."""
    found = np.flatnonzero(rng.random(len(shapes)) < 0.88)
    copied = np.append(found, rng.choice(found, len(found) // 4, replace=False))
    first, right = np.arange(len(copied)) < len(found), rng.random(len(copied)) < 0.94
    copied_ids = np.where(right, class_ids[copied], class_ids[copied] % len(CLASS_NAMES) + 1)
    copies = shapes[copied]
    noise = np.where(first, 0.1, 0.2)[:, None] * copies[:, 2:3]  # of x, y and radius
    copies[:, :3] += noise * rng.normal(size=(len(copied), 3))
    other_ids, others = throw_blobs(rng, max(count - len(copied), 0), image, outside_px=0)
    alpha = np.where(first & right, 5, 2)
    beta = np.where(first, np.where(right, 2, 3), 5)
    scores = 0.05 + 0.95 * np.append(rng.beta(alpha, beta), rng.beta(1, 5, len(others)))
    ids, blobs = np.append(copied_ids, other_ids), np.append(copies, others, axis=0)
    return draw(image, ids[:count], blobs[:count], scores[:count])[0]


def draw_run(num_images: int, num_detections: int) -> tuple[dict[str, Any], Cells]:
    """Truth as a COCO data set, and about ``num_detections`` detections."""
    rng = np.random.default_rng(0)
    images, cells, detections = [], [], []
    counts = np.diff(np.linspace(0, num_detections, num_images + 1).astype(int))
    for number, count in enumerate(tqdm(counts, disable=None), 1):  # a bar at a terminal only
        height, width = rng.integers(900, 1101, 2).tolist()
        image = {"id": number, "file_name": f"image{number}", "height": height, "width": width}
        image["patient"] = f"drawn-{number % 10}"
        blobs = round(CELLS_PER_MEGAPIXEL * height * width / 1e6)
        class_ids, shapes = throw_blobs(rng, blobs, image, outside_px=25)
        drawn, shown = draw(image, class_ids, shapes, None)
        images.append(image)
        cells.append(drawn)
        detections.append(detect(rng, image, class_ids[shown], shapes[shown], count))
    cells = Cells.concatenate(cells)
    annotated = cells[~near_border(cells)]
    annotations, areas_px = annotated.to_coco(), annotated.area_px.tolist()
    for number, (annotation, area_px) in enumerate(zip(annotations, areas_px, strict=True), 1):
        del annotation["score"]
        annotation |= {"id": number, "iscrowd": 0, "area": area_px}
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, 1)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    return truth, Cells.concatenate(detections)


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
    scored = [image["file_name"] for image in truth["images"]]
    metrics = evaluate(truth, detections, config.score_threshold, config.iou_threshold)
    split = {"kind": "random", "train": [], "validation": scored, "warning": "nothing was trained"}
    parts = {
        "settings": config.to_dict(),
        "split": split,
        "provenance": provenance() | {"data_fingerprint": "none: drawn by tools/large_run.py"},
        "truth": truth,
        "detections": detections.to_coco(),
        "metrics": metrics,
    }
    for name, part in parts.items():
        write_json(folder / f"{name}.json", part)
    write_text(folder / "history.csv", "epoch,learning_rate,loss,train_minutes,validation_ap50\n")
    at = metrics["at_threshold"]["all"]
    ratios = f"precision {at['precision']:.2f}, recall {at['recall']:.2f}"
    print(f"{len(detections)} detections of {metrics['cells']} cells: {ratios}")
    for notebook in sorted((ROOT / "notebooks").glob("0[3-6]_*.ipynb")):
        output = f"outputs/notebooks/{notebook.stem}_{folder.name}.ipynb"
        command = f"papermill --cwd notebooks notebooks/{notebook.name} {output}"
        print(f"time .venv/bin/{command} -p run_dir {arguments.folder}")


if __name__ == "__main__":
    main()
