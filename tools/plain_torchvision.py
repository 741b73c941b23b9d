"""Mask R-CNN for cell instances in plain torchvision: the peer of the project's own trainer.

Self-contained on purpose. It is the script that one would write with torchvision alone: `MaskRCNN`
on a ResNet-18 FPN, dense masks, torchvision's default sampling, and no part of `cellseg_helpers`.
It trains for a budget of CPU minutes of this process (loading and evaluation do not count), then
measures COCO mask AP on the validation images.

    python -m tools.plain_torchvision DATA SPLIT_JSON WEIGHTS OUT_DIR --cpu-minutes 60 --seed 0

DATA        folder with train/<uuid>/image.tif (RGBA uint8) and class<k>.tif (label maps, k = 1..4;
            absent classes have no file)
SPLIT_JSON  {"train": [uuid, ...], "validation": [uuid, ...]}
WEIGHTS     ImageNet weights of ResNet-18 under torchvision's key names (safetensors), also partial
OUT_DIR     gets history.csv, weights.pt, detections.json and metrics.json

With --eval-only the weights of an earlier run in OUT_DIR are evaluated again.
"""

import argparse
import csv
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import tifffile
import torch
import torchvision
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d, masks_to_boxes

CLASSES = (1, 2, 3, 4)
CROP = 256
OVERLAP = 128
BATCH = 2
LEARNING_RATE, WEIGHT_DECAY, WARM_UP, MAX_NORM = 2e-4, 1e-4, 0.05, 10.0
SCORE_THRESHOLD = 0.05


def load_images(folder, uuids):
    images = []
    for uuid in uuids:
        image = tifffile.imread(folder / uuid / "image.tif")[..., :3]
        files = {k: folder / uuid / f"class{k}.tif" for k in CLASSES}
        files = {k: file for k, file in files.items() if file.exists()}
        images.append((image, {k: tifffile.imread(f).astype(np.int32) for k, f in files.items()}))
    return images


def build_model(weights, rois_per_image, proposals, detections):
    resnet = resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    missing, unexpected = resnet.load_state_dict(load_file(weights), strict=False)
    unknown = ", ".join(unexpected) or "none"
    print(f"not in the checkpoint: {', '.join(missing)} | unknown: {unknown}", flush=True)
    for name in {key.rpartition(".")[0] for key in missing if key.endswith("running_mean")}:
        resnet.set_submodule(name, nn.BatchNorm2d(resnet.get_submodule(name).weight.numel()))
    sizes, ratios = ((8,), (16,), (32,), (64,), (128,)), (0.5, 1.0, 2.0)
    model = MaskRCNN(
        _resnet_fpn_extractor(resnet, trainable_layers=3),
        num_classes=len(CLASSES) + 1,
        rpn_anchor_generator=AnchorGenerator(sizes, (ratios,) * 5),
        rpn_pre_nms_top_n_test=proposals,
        rpn_post_nms_top_n_test=proposals,
        box_batch_size_per_image=rois_per_image,
        box_detections_per_img=detections,
        box_score_thresh=SCORE_THRESHOLD,
    )
    # No choice of min_size and max_size keeps both a 256 px crop and a larger tile as they are.
    model.transform.resize = lambda image, target=None: (image, target)
    return model


def to_tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def random_crop(image, labels, rng):
    """Returns a flipped crop and its target, or None where no instance is in the crop."""
    y, x = (rng.integers(max(size - CROP, 0) + 1) for size in image.shape[:2])
    flips = (slice(None, None, rng.choice((-1, 1))), slice(None, None, rng.choice((-1, 1))))
    window = (slice(y, y + CROP), slice(x, x + CROP))
    masks, classes = [], []
    for k, label_map in labels.items():
        crop = label_map[window][flips]
        ids = np.unique(crop[crop != 0])
        masks.append(crop == ids[:, None, None])
        classes += [k] * len(ids)
    if not classes:
        return None
    masks = torch.from_numpy(np.concatenate(masks))
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    keep = (boxes[:, 2:] - boxes[:, :2] >= 2).all(1)
    if not keep.any():
        return None
    target = {"boxes": boxes[keep].float(), "labels": torch.tensor(classes)[keep]}
    target["masks"] = masks[keep].to(torch.uint8)
    return to_tensor(image[window][flips]), target


def random_batch(images, rng):
    batch = []
    for index in rng.integers(len(images), size=BATCH):
        sample = None
        while sample is None:
            sample = random_crop(*images[index], rng)
        batch.append(sample)
    return zip(*batch, strict=True)


def train(model, images, cpu_minutes, seed, history):
    rng = np.random.default_rng(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    model.train()
    steps, losses_seen = 0, []
    cpu_start, wall_start, used = time.process_time(), time.perf_counter(), 0.0
    with open(history, "w", newline="") as file:
        writer = csv.writer(file)
        while used < cpu_minutes:
            share = used / cpu_minutes
            after_warm_up = max(share - WARM_UP, 0) / (1 - WARM_UP)
            cosine = 0.5 * (1 + math.cos(math.pi * after_warm_up))
            rate = LEARNING_RATE * min(share / WARM_UP, 1) * cosine
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = model(*map(list, random_batch(images, rng)))
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()

            steps += 1
            used = (time.process_time() - cpu_start) / 60
            values = [value.item() for value in (loss, *losses.values())]
            losses_seen.append(values[0])
            if steps == 1:
                writer.writerow(["step", "cpu_minutes", "learning_rate", "loss", *losses])
            row = [steps, f"{used:.4f}", f"{rate:.3g}", *(f"{value:.4f}" for value in values)]
            writer.writerow(row)
            file.flush()
            if steps % 20 == 0:
                recent = np.mean(losses_seen[-20:])
                print(f"step {steps}  {used:.2f} CPU min  loss {recent:.3f}", flush=True)
    wall_minutes = (time.perf_counter() - wall_start) / 60
    return {"steps": steps, "cpu_minutes": used, "wall_minutes": wall_minutes, "seed": seed}


def tile_spans(size, tile):
    """Returns (start, core start, core end) of each tile along one axis; the cores partition the
    axis.
    """
    starts = [*range(0, max(size - tile, 0), tile - OVERLAP), max(size - tile, 0)]
    cuts = [(left + tile + right) / 2 for left, right in pairwise(starts)]
    return list(zip(starts, [-math.inf, *cuts], [*cuts, math.inf], strict=True))


def encode(mask, y, x, shape):
    full = np.zeros(shape, np.uint8, order="F")
    full[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    code = rle.encode(full)
    return {"size": list(map(int, shape)), "counts": code["counts"].decode()}


@torch.inference_mode()
def detect(model, image, tile):
    results = []
    for y, top, bottom in tile_spans(image.shape[0], tile):
        for x, left, right in tile_spans(image.shape[1], tile):
            found = model([to_tensor(image[y : y + tile, x : x + tile])])[0]
            corners = found["boxes"] + torch.tensor([x, y, x, y])
            centre_x, centre_y = (corners[:, :2] + corners[:, 2:]).T / 2
            keep = (centre_x >= left) & (centre_x < right) & (centre_y >= top) & (centre_y < bottom)
            for i in keep.nonzero().flatten().tolist():
                x1, y1, x2, y2 = corners[i].tolist()
                mask = found["masks"][i, 0].numpy() >= 0.5
                result = {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": found["scores"][i].item()}
                result["category_id"] = found["labels"][i].item()
                result["segmentation"] = encode(mask, y, x, image.shape[:2])
                results.append(result)
    return results


def ground_truth(images):
    categories = [{"id": k, "name": f"class{k}"} for k in CLASSES]
    truth = {"info": {}, "images": [], "annotations": [], "categories": categories}
    for image_id, (image, labels) in enumerate(images, 1):
        truth["images"].append({"id": image_id, "height": image.shape[0], "width": image.shape[1]})
        for k, label_map in labels.items():
            for value in np.unique(label_map[label_map != 0]):
                code = encode(label_map == value, 0, 0, label_map.shape)
                annotation = {"id": len(truth["annotations"]) + 1, "image_id": image_id}
                annotation |= {"category_id": k, "iscrowd": 0, "segmentation": code}
                annotation |= {"area": float(rle.area(code)), "bbox": rle.toBbox(code).tolist()}
                truth["annotations"].append(annotation)
    return truth


def average_precision(truth, detections):
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    precision = np.zeros((10, 101, len(CLASSES)))  # by IoU threshold, recall, class
    if detections:
        evaluation = COCOeval(coco, coco.loadRes(detections), "segm")
        evaluation.params.maxDets = [100, 500, 1000]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # at most 1000 detections
    present = sorted({a["category_id"] for a in truth["annotations"]})
    curves = precision[:, :, [k - 1 for k in present]]
    averages = {"AP": curves.mean(), "AP50": curves[0].mean(), "AP75": curves[5].mean()}
    by_class = {f"class{k}": float(curves[0, :, i].mean()) for i, k in enumerate(present)}
    return averages | {"per_class_AP50": by_class}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "split_json", "weights", "out_dir"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--cpu-minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    for name, default, about in (
        ("--rois-per-image", 512, "sampled for the heads in training; torchvision's: 512"),
        ("--tile", 512, "side of the tiles in prediction, px"),
        ("--proposals", 1000, "of the RPN in prediction, before and after its NMS"),
        ("--detections", 300, "at most a tile"),
    ):
        parser.add_argument(name, type=int, default=default, help=about)
    parser.add_argument("--eval-only", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    split = json.loads(args.split_json.read_text())
    model = build_model(args.weights, args.rois_per_image, args.proposals, args.detections)

    if not args.eval_only:
        images = load_images(args.data / "train", split["train"])
        training = train(model, images, args.cpu_minutes, args.seed, args.out_dir / "history.csv")
        training |= {"training_images": len(images), "threads": args.threads}
        training["rois_per_image"] = args.rois_per_image
        torch.save({"model": model.state_dict(), "training": training}, args.out_dir / "weights.pt")

    saved = torch.load(args.out_dir / "weights.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    model.eval()
    images = load_images(args.data / "train", split["validation"])
    detections, start = [], time.process_time()
    for image_id, (image, _) in enumerate(images, 1):
        found = detect(model, image, args.tile)
        detections += [{"image_id": image_id} | result for result in found]
        print(f"validation image {image_id} of {len(images)}: {len(found)} detections", flush=True)
    (args.out_dir / "detections.json").write_text(json.dumps(detections))
    metrics = average_precision(ground_truth(images), detections) | saved["training"]
    metrics |= {"validation_images": len(images), "detections": len(detections)}
    metrics |= {"tile": args.tile, "proposals": args.proposals}
    metrics |= {"detections_per_tile": args.detections}
    metrics |= {"evaluation_cpu_minutes": (time.process_time() - start) / 60}
    metrics |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    (args.out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(json.dumps(metrics, indent=2), flush=True)


if __name__ == "__main__":
    main()
