"""Hand-made truth and detections: discs in small images, as COCO data sets and results."""

import numpy as np
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 90, 110
CLASS_NAMES = ["epithelial", "lymphocyte", "neutrophil", "macrophage"]


def disc(x: float, y: float, radius: float) -> dict:
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    rle = coco_mask.encode(
        np.asfortranarray(((xs - x) ** 2 + (ys - y) ** 2 <= radius**2).astype(np.uint8))
    )
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


def truth_of(cells: list[tuple[int, int, dict]], images: int = 1) -> dict:
    """COCO truth of cells (image_id, class_id, mask)."""
    return {
        "images": [
            {"id": i, "file_name": f"image{i}", "height": HEIGHT, "width": WIDTH}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, 1)],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": class_id,
                "bbox": coco_mask.toBbox(mask).tolist(),
                "area": int(coco_mask.area(mask)),
                "iscrowd": 0,
                "segmentation": mask,
            }
            for number, (image_id, class_id, mask) in enumerate(cells, 1)
        ],
    }


def result(image_id: int, class_id: int, score: float, mask: dict) -> dict:
    box = coco_mask.toBbox(mask) + [-0.5, -0.5, 3, 3]
    return {
        "image_id": image_id,
        "bbox": box.tolist(),
        "score": score,
        "category_id": class_id,
        "segmentation": mask,
    }
