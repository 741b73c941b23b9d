"""``fit``: train a run from its settings, on one or several devices, and go on where a killed one
stopped.

Several devices: ``torchrun --nproc_per_node 2 -m cellseg_helpers.engine params/full.yaml``.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cellseg_helpers.cells import Cells
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.samples import EpochSampler, SampleKey, TrainingSet, collate
from cellseg_helpers.data.splits import make_split
from cellseg_helpers.devices import (
    CHECKPOINT_EVERY_S,
    KEPT,
    TrainingError,
    explaining_errors,
    make_fabric,
    peak_memory_bytes,
    resolve_precision,
)
from cellseg_helpers.inference import predict
from cellseg_helpers.metrics import evaluate
from cellseg_helpers.model.build import build_model, count_parameters
from cellseg_helpers.runs import (
    opening_checkpoint,
    save_checkpoint,
    save_weights,
    start_run,
    write_json,
    write_text,
)

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")


def fit(config: RunConfig, on_epoch: Callable[[pd.DataFrame], None] | None = None) -> Path:
    """Train, validate every ``validation_every_epochs``, keep the best epoch, and resume by itself.

    On the CPU the same settings give the same numbers, bit for bit, whatever the number of workers,
    and also when the run was killed and called again in between: every random choice is drawn from
    the seed, the epoch and the sample's place in it.

    Args:
        config: the run's settings.
        on_epoch: called after each epoch with the history so far.

    Returns:
        The run folder (see ``runs``).

    Raises:
        ValueError: settings or data that cannot be used; RunError: the folder holds another run.
        TrainingError: a loss that is not finite, or no memory left.
    """
    config = replace(config.named(), precision=resolve_precision(config))
    fabric = make_fabric(config)
    torch.manual_seed(config.seed)
    dataset, scored = open_data(config)
    train, validation, split = split_dataset(scored, config)
    truth = to_coco(scored[i] for i in validation)
    with fabric.rank_zero_first():
        run_dir = start_run(config, dataset.fingerprint, split, truth)
    if (run_dir / "finished.json").exists() and not (run_dir / "last.pt").exists():
        return run_dir  # whoever removed the checkpoint of a finished run wanted its room

    model = build_model(config)
    if config.normalization == "data":
        model.transform.learn_statistics(*image_statistics(dataset, train))
    optimizer = make_optimizer(model, config)
    samples = TrainingSet(
        dataset, train, config.crop_size_px, config.class_balance, config.augmentation, config.seed, config.drop_cut_cells,
        config.boxes_miss_last_pixel,
    )  # fmt: skip
    per_step = config.batch_size * fabric.world_size
    steps = config.steps_per_epoch or -(-len(train) // per_step)
    sampler = EpochSampler(
        train,
        steps * per_step,
        config.seed,
        fabric.global_rank,
        fabric.world_size,
        config.batch_size,
    )
    loader = make_loader(samples, config, sampler)
    per_step_schedule, plateau = make_schedulers(optimizer, config, steps)
    model, optimizer = fabric.setup(model, optimizer)

    history: list[dict[str, Any]] = []
    if (run_dir / "last.pt").exists():
        with opening_checkpoint(run_dir, config) as checkpoint:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            per_step_schedule.load_state_dict(checkpoint["per_step_schedule"])
            plateau.load_state_dict(checkpoint["plateau"])
            fabric.strategy.precision.load_state_dict(checkpoint["precision"])
            history = checkpoint["history"]

    saved_at = time.perf_counter()
    progress = tqdm(total=config.epochs * steps, initial=len(history) * steps, desc="training", unit="step", mininterval=1,
                    disable=not fabric.is_global_zero)  # fmt: skip
    for epoch in range(len(history), config.epochs):
        if stopped_early(history, config):
            break
        sampler.set_epoch(epoch)
        before = history[-1] if history else {"train_minutes": 0.0, "cpu_minutes": 0.0}
        with explaining_errors():
            started, cpu_started = time.perf_counter(), time.process_time()
            losses = train_epoch(
                fabric, model, optimizer, per_step_schedule, loader, config, progress
            )
            row = {
                "epoch": epoch + 1,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "loss": sum(losses.values()),
                **losses,
                "train_minutes": before["train_minutes"] + (time.perf_counter() - started) / 60,
                "cpu_minutes": before["cpu_minutes"] + (time.process_time() - cpu_started) / 60,
            }
            share_buffers(fabric, model)
            validated = (
                epoch + 1
            ) % config.validation_every_epochs == 0 or epoch + 1 == config.epochs
            if validated:
                row["validation_loss"] = validation_loss(fabric, model, dataset, validation, config)
                detections = predict_images(fabric, model, dataset, validation, config)
        if validated:
            scores = evaluate(
                truth,
                detections,
                score_threshold=config.score_threshold,
                iou_threshold=config.iou_threshold,
            )
        row.setdefault("validation_loss", math.nan)
        row["validation_ap50"] = scores["coco_dense"]["summary"]["AP50"] if validated else math.nan
        row["peak_memory_bytes"] = peak_memory_bytes(fabric.device)
        history.append(row)
        if config.scheduler == "plateau" and not math.isnan(row[config.monitor]):
            plateau.step(row[config.monitor])

        if fabric.is_global_zero:
            if config.keep_every_epoch:
                save_weights(run_dir / f"epoch_{epoch + 1}.safetensors", model.state_dict())
            if validated and best_epoch(history, config) == len(history) - 1:
                save_weights(run_dir / "best.safetensors", model.state_dict())
                write_json(run_dir / "detections.json", detections.to_coco())
                write_json(run_dir / "metrics.json", scores)
            write_text(run_dir / "history.csv", pd.DataFrame(history).to_csv(index=False))
            due = validated or time.perf_counter() - saved_at > CHECKPOINT_EVERY_S
            ends = len(history) == config.epochs or stopped_early(history, config)
            if due and (config.keep_checkpoint or not ends):
                save_checkpoint(
                    run_dir / "last.pt",
                    {
                        "settings": config.to_dict(),
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "per_step_schedule": per_step_schedule.state_dict(),
                        "plateau": plateau.state_dict(),
                        "precision": fabric.strategy.precision.state_dict(),
                        "history": history,
                    },
                )
                saved_at = time.perf_counter()
        fabric.barrier()
        if on_epoch and fabric.is_global_zero:
            on_epoch(pd.DataFrame(history))
    progress.close()
    if fabric.is_global_zero:
        sizes = [tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()]
        ended = {"epochs": len(history), "stopped_early": len(history) < config.epochs}
        write_json(
            run_dir / "finished.json",
            ended | {"parameters": count_parameters(model), "model_megabytes": sum(sizes) / 1e6},
        )
        if not config.keep_checkpoint:
            (run_dir / "last.pt").unlink(missing_ok=True)
    return run_dir


def open_data(config: RunConfig) -> tuple[CellDataset, CellDataset]:
    """The images as the training reads them, and as the validation's truth reads them: every cell
    of ``truth_reading``, small ones too.

    Raises:
        DataError: see ``readers.open_dataset``.
    """
    dataset = open_dataset(
        config.data, config.instance_reading, config.min_instance_area_px, config.skip_faulty_images
    )
    scored = open_dataset(config.data, config.truth_reading, 0, config.skip_faulty_images)
    return dataset, scored


def image_statistics(dataset: CellDataset, indices: list[int]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of R, G and B, in [0, 1], over all pixels of some images."""
    sums, squares, pixels = np.zeros(3), np.zeros(3), 0
    for index in indices:
        image = dataset[index].image.reshape(3, -1) / 255
        sums, squares, pixels = (
            sums + image.sum(1),
            squares + (image**2).sum(1),
            pixels + image.shape[1],
        )
    mean = sums / pixels
    return mean.tolist(), np.sqrt(squares / pixels - mean**2).tolist()


def split_dataset(
    dataset: CellDataset, config: RunConfig
) -> tuple[list[int], list[int], dict[str, Any]]:
    """Indices of the training and of the validation images, and the split as it is saved."""
    split = make_split(
        dataset.image_ids,
        dataset.counts,
        dataset.patients,
        config.split,
        config.validation_fraction,
        config.split_seed,
    )
    index = {image_id: i for i, image_id in enumerate(dataset.image_ids)}
    return [index[i] for i in split.train], [index[i] for i in split.validation], split._asdict()


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over the parameters that are not frozen; fused where gradients can still
    be clipped.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "fused": config.precision != "16-mixed",
    }
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](
        parameters, **shared
    )


def make_schedulers(optimizer: torch.optim.Optimizer, config: RunConfig, steps_per_epoch: int):
    """A schedule to step after each training step (linear warm-up, then cosine or constant), and
    one after each epoch (plateau).
    """
    schedulers = torch.optim.lr_scheduler
    warmup = schedulers.LinearLR(
        optimizer, 1 / max(config.warmup_steps, 1), total_iters=config.warmup_steps
    )
    per_step = warmup
    if config.scheduler == "cosine":
        decay_steps = max(config.epochs * steps_per_epoch - config.warmup_steps, 1)
        cosine = schedulers.CosineAnnealingLR(
            optimizer, decay_steps, eta_min=config.min_learning_rate
        )
        per_step = (
            schedulers.SequentialLR(optimizer, [warmup, cosine], [config.warmup_steps])
            if config.warmup_steps
            else cosine
        )
    mode = "max" if config.monitor == "validation_ap50" else "min"
    plateau = schedulers.ReduceLROnPlateau(
        optimizer,
        mode,
        config.plateau_factor,
        config.plateau_patience,
        min_lr=config.min_learning_rate,
    )
    return per_step, plateau


def make_loader(samples: TrainingSet, config: RunConfig, sampler) -> DataLoader:
    """Batches of (images, targets) lists in the sampler's order."""
    return DataLoader(
        samples,
        batch_size=config.batch_size,
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=collate,
        persistent_workers=config.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def train_epoch(
    fabric: Fabric, model, optimizer, schedule, loader: DataLoader, config: RunConfig, progress
) -> dict[str, float]:
    """One pass: images, targets, losses, backward, step. Returns each loss's mean over the steps
    and processes.

    Raises:
        TrainingError: a loss that is not finite; it is named, with the images.
    """
    model.train()
    sums = torch.zeros(len(LOSSES), device=fabric.device)
    for images, targets in loader:
        images, targets = to_device(images, targets, fabric.device)
        losses, values = _finite_losses(model(images, targets), targets)
        optimizer.zero_grad()
        fabric.backward(losses.sum())
        if config.gradient_clip_norm:
            fabric.clip_gradients(
                model, optimizer, max_norm=config.gradient_clip_norm, error_if_nonfinite=False
            )
        optimizer.step()
        schedule.step()
        sums += losses.detach()
        parts = zip(
            ("loss", "objectness", "rpn_box", "class", "box", "mask"),
            (sum(values), *values),
            strict=True,
        )
        progress.set_postfix({name: f"{value:.2f}" for name, value in parts}, refresh=False)
        progress.update()
    means = fabric.all_reduce(sums / len(loader), reduce_op="mean")
    return dict(zip(LOSSES, means.tolist(), strict=True))


@torch.no_grad()
def validation_loss(
    fabric: Fabric, model, dataset: CellDataset, indices: list[int], config: RunConfig
) -> float:
    """The mean total loss over one fixed crop of each validation image.

    The norms' statistics are left alone, unless ``validation_updates_norms`` (a loss computed in
    training mode, as in report E's released code: the statistics then learn from the validation
    images, and the model with them).

    Raises:
        TrainingError: as ``train_epoch``, so that weights which the epoch's last step spoilt reach
            no checkpoint.
    """
    samples = TrainingSet(
        dataset,
        indices,
        config.crop_size_px,
        0.0,
        "none",
        0,
        config.drop_cut_cells,
        config.boxes_miss_last_pixel,
    )
    keys = [SampleKey(0, position, index) for position, index in enumerate(indices)]
    model.train()
    for module in model.modules() if not config.validation_updates_norms else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    totals = []
    with fabric.autocast():
        for images, targets in make_loader(samples, replace(config, num_workers=0), keys):
            images, targets = to_device(images, targets, fabric.device)
            losses, _ = _finite_losses(model.module(images, targets), targets)
            totals += [losses.sum().item()] * len(images)
    return sum(totals) / len(totals)


def predict_images(
    fabric: Fabric, model, dataset: CellDataset, indices: list[int], config: RunConfig
) -> Cells:
    """The cells found in whole images; image ids count from 1 in the order of ``indices``, as
    ``to_coco`` does.
    """
    tiling = (config.tile_size_px, config.tile_overlap_px, config.mask_threshold)
    with fabric.autocast():
        found = [
            predict(model.module, dataset[indices[number]].image, *tiling, number + 1)
            for number in range(fabric.global_rank, len(indices), fabric.world_size)
        ]
    if fabric.world_size == 1:
        return Cells.concatenate(found)
    gathered = [None] * fabric.world_size
    distributed.all_gather_object(gathered, Cells.concatenate(found))
    cells = Cells.concatenate(gathered)
    return cells[np.argsort(cells.image_ids, kind="stable")]


def share_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Give every process the first one's norm statistics, which the checkpoint holds, so that all
    validate one model.
    """
    if fabric.world_size > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def to_device(
    images: list[Tensor], targets: list[dict], device: torch.device
) -> tuple[list[Tensor], list[dict]]:
    """Images as float32 in [0, 1] and targets, on ``device``."""
    images = [image.to(device, non_blocking=True).float() / 255 for image in images]
    moved = [
        {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in t.items()}
        for t in targets
    ]
    return images, moved


def best_epoch(history: list[dict[str, Any]], config: RunConfig) -> int:
    """Index of the first validated epoch with the best monitored value; one without a value, or not
    validated, counts as worst.
    """
    sign = 1 if config.monitor == "validation_ap50" else -1
    values = [row[config.monitor] if _validated(row) else math.nan for row in history]
    values = [-math.inf if value is None or math.isnan(value) else sign * value for value in values]
    return values.index(max(values))


def stopped_early(history: list[dict[str, Any]], config: RunConfig) -> bool:
    """Whether the monitored value has not improved for ``early_stopping_patience`` epochs (0: never
    stop).
    """
    patience = config.early_stopping_patience
    return (
        bool(patience and history)
        and _validated(history[-1])
        and len(history) - 1 - best_epoch(history, config) >= patience
    )


def _validated(row: dict[str, Any]) -> bool:
    value = row.get("validation_loss", 0.0)
    return value is not None and not math.isnan(value)


def _finite_losses(losses: dict[str, Tensor], targets: list[dict]) -> tuple[Tensor, list[float]]:
    """The losses as float32 [5], in the order of ``LOSSES``, and their values: read once a step,
    before a GPU has the backward to do.
    """
    stacked = torch.stack([losses[name].float() for name in LOSSES])
    values = stacked.tolist()
    if all(map(math.isfinite, values)):
        return stacked, values
    bad = ", ".join(
        f"{n} = {v}" for n, v in zip(LOSSES, values, strict=True) if not math.isfinite(v)
    )
    images = ", ".join(target["image_id"] for target in targets)
    raise TrainingError(
        f"training stopped: {bad} in a batch of images {images}; lower learning_rate, lengthen warmup_steps or set "
        f"gradient_clip_norm; {KEPT}"
    )


if __name__ == "__main__":
    print(fit(RunConfig.from_yaml(*sys.argv[1:])))
