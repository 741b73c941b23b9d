"""Instances as a COCO data set, which pycocotools and other readers take."""

from collections.abc import Iterable
from typing import Any

from cellseg_helpers.data.labels import CLASS_NAMES, encode_instances, find_instances
from cellseg_helpers.data.readers import CellImage


def to_coco(cell_images: Iterable[CellImage]) -> dict[str, Any]:
    """A COCO data set dict of images and their instances; image ids count from 1 in the order given.

    An image's ``file_name`` is its image id, ``patient`` its patient or None. An annotation's ``bbox`` is x, y, w, h px, its
    ``area`` the mask's pixels, its ``segmentation`` an RLE whose counts are text.
    """
    images, annotations = [], []
    for number, cell_image in enumerate(cell_images, 1):
        height, width = cell_image.image.shape[1:]
        images.append(
            {"id": number, "file_name": cell_image.image_id, "height": height, "width": width, "patient": cell_image.patient}
        )
        instances = find_instances(cell_image.label_maps)
        masks = encode_instances(cell_image.label_maps, instances)
        for box, label, area, mask in zip(instances.boxes.tolist(), instances.labels, instances.area_px, masks, strict=True):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(area),
                    "iscrowd": 0,
                    "segmentation": mask,
                }
            )
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}
