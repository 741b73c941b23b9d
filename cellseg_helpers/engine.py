"""``fit``: train a run from its settings, on one or several devices. A run that was stopped resumes
from its last checkpoint.

With several devices: ``torchrun --nproc_per_node 2 -m cellseg_helpers.engine params/full.yaml``.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, distributed, nn, optim
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from cellseg_helpers import devices, runs
from cellseg_helpers.cells import Cells
from cellseg_helpers.config import RunConfig
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.data.coco import to_coco
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.samples import EpochSampler, SampleKey, TrainingSet, collate
from cellseg_helpers.data.splits import make_split
from cellseg_helpers.devices import TrainingError, explaining_errors, make_fabric
from cellseg_helpers.inference import predict
from cellseg_helpers.metrics import evaluate
from cellseg_helpers.model import anchors
from cellseg_helpers.model.build import build_model, count_parameters
from cellseg_helpers.model.views import with_views
from cellseg_helpers.runs import save_checkpoint, save_weights, start_run, write_json, write_text

History = list[dict[str, Any]]  # one row per epoch, with the columns of history.csv
LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")


def fit(config: RunConfig, on_epoch: Callable[[pd.DataFrame], None] | None = None) -> Path:
    """Train a run, validate it every ``validation_every_epochs`` and save the best epoch.

    On the CPU the same settings give the same numbers, bit for bit, with any number of workers, and
    also if the run was killed and started again: every random choice depends only on the seed, the
    epoch and the sample's position in the epoch.

    How it works: 1. Read and split the data and make the run folder (see ``runs``). 2. Build model,
    optimizer, schedules and batches; if the folder has a checkpoint, load it into them. 3. In each
    epoch, train on ``steps_per_epoch`` batches, validate, and save the results and a checkpoint.

    Args:
        config: the run's settings.
        on_epoch: called after each epoch with the history so far.

    Returns:
        The run folder.

    Raises:
        ValueError: settings or data that cannot be used.
        RunError: the folder holds another run.
        TrainingError: a loss that is not finite, or no memory left.
    """
    config = replace(config.named(), precision=devices.resolve_precision(config))
    fabric = make_fabric(config)
    torch.manual_seed(config.seed)
    dataset, truth_dataset = open_data(config)
    train, validation, split = split_dataset(truth_dataset, config)
    config = with_anchors(config, dataset, train)
    truth = to_coco(truth_dataset[i] for i in validation)
    with fabric.rank_zero_first():
        run_dir = start_run(config, dataset.fingerprint, split, truth)
    if (run_dir / "finished.json").exists() and not (run_dir / "last.pt").exists():
        return run_dir  # finished, checkpoint deleted to save disk: nothing to do

    model = build_model(config)
    if config.normalization == "data":
        model.transform.learn_statistics(*image_statistics(dataset, train))
    optimizer = make_optimizer(model, config)
    rank = (fabric.global_rank, fabric.world_size)
    step_crops = config.batch_size * fabric.world_size
    steps = config.steps_per_epoch or math.ceil(len(train) / step_crops)
    sampler = EpochSampler(train, steps * step_crops, config.seed, *rank, config.batch_size)
    loader = make_loader(make_samples(dataset, train, config), config, sampler)
    schedule, plateau = make_schedulers(optimizer, config, steps)
    model, optimizer = fabric.setup(model, optimizer)
    # What a checkpoint saves:
    parts = {"model": model, "optimizer": optimizer, "precision": fabric.strategy.precision}
    parts |= {"per_step_schedule": schedule, "plateau": plateau}
    history = runs.resume(parts, run_dir, config)

    saved_at = time.perf_counter()
    is_main = fabric.is_global_zero  # only one process saves files and shows the progress
    done, total = len(history) * steps, config.epochs * steps
    bar_options = {"unit": "step", "mininterval": 1, "disable": not is_main}
    progress = tqdm(desc="training", total=total, initial=done, **bar_options)
    for epoch in range(len(history), config.epochs):
        if stopped_early(history, config):
            break
        is_last = epoch + 1 == config.epochs
        validates = is_last or (epoch + 1) % config.validation_every_epochs == 0
        previous = history[-1] if history else {"train_minutes": 0.0, "cpu_minutes": 0.0}
        sampler.set_epoch(epoch)
        with explaining_errors():
            started, cpu_started = time.perf_counter(), time.process_time()
            losses = train_epoch(fabric, model, optimizer, schedule, loader, config, progress)
            row = {
                "epoch": epoch + 1,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "loss": sum(losses.values()),
                **losses,
                "train_minutes": previous["train_minutes"] + (time.perf_counter() - started) / 60,
                "cpu_minutes": previous["cpu_minutes"] + (time.process_time() - cpu_started) / 60,
                "validation_loss": math.nan,
                "validation_ap50": math.nan,
            }
            if validates:
                row["validation_loss"] = validation_loss(fabric, model, dataset, validation, config)
                cells = predict_images(fabric, model, dataset, validation, config)
                scores = evaluate(truth, cells, config.score_threshold, config.iou_threshold)
                row["validation_ap50"] = scores["coco_dense"]["summary"]["AP50"]
        history.append(row | {"peak_memory_bytes": devices.peak_memory_bytes(fabric.device)})
        if config.scheduler == "plateau" and not math.isnan(row[config.monitor]):
            plateau.step(row[config.monitor])

        if is_main:
            if config.keep_every_epoch:
                save_weights(run_dir / f"epoch_{epoch + 1}.safetensors", model.state_dict())
            if validates and best_epoch(history, config) == epoch:
                save_weights(run_dir / "best.safetensors", model.state_dict())
                write_json(run_dir / "detections.json", cells.to_coco())
                write_json(run_dir / "metrics.json", scores)
            write_text(run_dir / "history.csv", pd.DataFrame(history).to_csv(index=False))
            ends = is_last or stopped_early(history, config)
            is_due = validates or time.perf_counter() - saved_at > devices.CHECKPOINT_EVERY_S
            if is_due and (config.keep_checkpoint or not ends):
                states = {name: part.state_dict() for name, part in parts.items()}
                checkpoint = {"settings": config.to_dict(), **states, "history": history}
                save_checkpoint(run_dir / "last.pt", checkpoint)
                saved_at = time.perf_counter()
        fabric.barrier()
        if on_epoch and is_main:
            on_epoch(pd.DataFrame(history))
    progress.close()
    if is_main:
        finish(run_dir, model, history, config)
    return run_dir


def finish(run_dir: Path, model: nn.Module, history: History, config: RunConfig) -> None:
    """Write ``finished.json``; delete the checkpoint unless ``keep_checkpoint``."""
    tensors = model.state_dict().values()
    finished = {
        "epochs": len(history),
        "stopped_early": len(history) < config.epochs,
        "parameters": count_parameters(model),
        "model_megabytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
    }
    write_json(run_dir / "finished.json", finished)
    if not config.keep_checkpoint:
        (run_dir / "last.pt").unlink(missing_ok=True)


def open_data(config: RunConfig) -> tuple[CellDataset, CellDataset]:
    """The data set twice: with the cells that training learns, and with the annotations that
    scores compare with (all cells by ``truth_reading``, small ones too).
    """
    skip = config.skip_faulty_images
    dataset = open_dataset(config.data, config.instance_reading, config.min_instance_area_px, skip)
    return dataset, open_dataset(config.data, config.truth_reading, 0, skip)


def split_dataset(
    dataset: CellDataset, config: RunConfig
) -> tuple[list[int], list[int], dict[str, Any]]:
    """Indices of the training images, those of the validation images, and split.json's content."""
    images = dataset.image_ids, dataset.counts, dataset.patients
    options = config.validation_fraction, config.split_seed, config.folds, config.fold
    split = make_split(*images, config.split, *options)
    index_of = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    sides = [[index_of[image_id] for image_id in side] for side in (split.train, split.validation)]
    return *sides, split._asdict()


def with_anchors(config: RunConfig, dataset: CellDataset, train: list[int]) -> RunConfig:
    """The settings; ``anchor_sizes`` auto becomes sizes that fit the training images' cells."""
    if config.anchor_sizes != "auto":
        return config
    cells = anchors.cell_boxes(dataset, train)
    sizes = anchors.fit_anchor_sizes(*cells, config.anchor_ratios, config.stem_stride)
    return replace(config, anchor_sizes=sizes)


def image_statistics(dataset: CellDataset, indices: list[int]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of R, G and B in [0, 1] over all pixels of some images."""
    sums, square_sums, pixel_count = np.zeros(3), np.zeros(3), 0
    for index in indices:
        image = dataset[index].image.reshape(3, -1) / 255
        sums, square_sums = sums + image.sum(1), square_sums + (image**2).sum(1)
        pixel_count += image.shape[1]
    mean = sums / pixel_count
    return mean.tolist(), np.sqrt(square_sums / pixel_count - mean**2).tolist()


def make_samples(dataset: CellDataset, indices: list[int], config: RunConfig) -> TrainingSet:
    """The training set of augmented crops from some images, with their targets."""
    sampling = config.crop_size_px, config.class_balance, config.augmentation, config.seed
    targets = config.drop_cut_cells, config.boxes_miss_last_pixel
    return TrainingSet(dataset, indices, *sampling, *targets)


def make_loader(
    samples: TrainingSet, config: RunConfig, sampler: Iterable[SampleKey]
) -> DataLoader:
    """A loader of batches (list of images, list of targets), in the sampler's order."""
    workers = {"num_workers": config.num_workers, "persistent_workers": config.num_workers > 0}
    options = {"collate_fn": collate, "pin_memory": torch.cuda.is_available(), **workers}
    return DataLoader(samples, config.batch_size, sampler=sampler, **options)


def make_optimizer(model: nn.Module, config: RunConfig) -> optim.Optimizer:
    """Adam, AdamW or SGD over the trainable parameters. It is fused, except with 16-mixed: a fused
    optimizer unscales the gradients in its step, after they were clipped.
    """
    optimizers = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = config.precision != "16-mixed"
    return optimizers[config.optimizer](trainable, fused=fused, **options)


def make_schedulers(
    optimizer: optim.Optimizer, config: RunConfig, steps_per_epoch: int
) -> tuple[lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau]:
    """Two schedules: the first is stepped after each training step (linear warm-up, then cosine or
    constant), the second after an epoch (plateau; ``fit`` steps it only if the settings say so).
    """
    warmup, lowest_rate = config.warmup_steps, config.min_learning_rate
    per_step = lr_scheduler.LinearLR(optimizer, 1 / max(warmup, 1), total_iters=warmup)
    if config.scheduler == "cosine":
        steps = max(config.epochs * steps_per_epoch - warmup, 1)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lowest_rate)
        both = [per_step, cosine]
        per_step = lr_scheduler.SequentialLR(optimizer, both, [warmup]) if warmup else cosine
    mode = "max" if config.monitor == "validation_ap50" else "min"
    factor, patience = config.plateau_factor, config.plateau_patience
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor, patience, min_lr=lowest_rate)
    return per_step, plateau


def train_epoch(
    fabric: Fabric,
    model: nn.Module,
    optimizer: optim.Optimizer,
    schedule: lr_scheduler.LRScheduler,
    loader: DataLoader,
    config: RunConfig,
    progress: tqdm,
) -> dict[str, float]:
    """Train for one epoch: for each batch, compute the losses, backpropagate, clip the gradient,
    and step optimizer and schedule. At the end, the batch-norm statistics of process 0, which the
    checkpoint saves, are copied to all processes, so that all validate the same model.

    Returns:
        The mean of each loss over the steps and processes.

    Raises:
        TrainingError: a loss is not finite; the message names the loss and the images.
    """
    model.train()
    sums = torch.zeros(len(LOSSES), device=fabric.device)
    for images, targets in loader:
        images, targets = to_device(images, targets, fabric.device)
        losses, loss_values = _finite_losses(model(images, targets), targets)
        optimizer.zero_grad()
        fabric.backward(losses.sum())
        if limit := config.gradient_clip_norm:
            fabric.clip_gradients(model, optimizer, max_norm=limit, error_if_nonfinite=False)
        optimizer.step()
        schedule.step()
        sums += losses.detach()
        names = ("loss", "objectness", "rpn_box", "class", "box", "mask")
        shown = zip(names, (sum(loss_values), *loss_values), strict=True)
        progress.set_postfix({name: f"{value:.2f}" for name, value in shown}, refresh=False)
        progress.update()
    means = fabric.all_reduce(sums / len(loader), reduce_op="mean")
    if fabric.world_size > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
    return dict(zip(LOSSES, means.tolist(), strict=True))


@torch.no_grad()
def validation_loss(
    fabric: Fabric, model: nn.Module, dataset: CellDataset, indices: list[int], config: RunConfig
) -> float:
    """The mean total loss over one fixed crop of each validation image.

    Batch-norm statistics are not updated. With ``validation_updates_norms`` they are, so that the
    model adapts to the validation images (a mistake of released code; to measure its effect).

    Raises:
        TrainingError: a loss is not finite. Since this runs before saving, weights spoiled by the
            epoch's last step are never saved.
    """
    config = replace(config, class_balance=0.0, augmentation="none", seed=0, num_workers=0)
    keys = [SampleKey(0, position, index) for position, index in enumerate(indices)]
    model.train()  # torchvision's model returns losses only in training mode
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not config.validation_updates_norms:
            module.eval()
    totals = []
    with fabric.autocast():
        for images, targets in make_loader(make_samples(dataset, indices, config), config, keys):
            images, targets = to_device(images, targets, fabric.device)
            # ``.module``: without Fabric's wrapper, since each process computes all losses itself.
            losses, _ = _finite_losses(model.module(images, targets), targets)
            totals += [losses.sum().item()] * len(images)
    return sum(totals) / len(totals)


def predict_images(
    fabric: Fabric, model: nn.Module, dataset: CellDataset, indices: list[int], config: RunConfig
) -> Cells:
    """The cells that the model finds in whole images; image ids count from 1 in the order of
    ``indices``, as in ``to_coco``. Each process predicts a share of the images and gets all cells.
    """
    tiling = (config.tile_size_px, config.tile_overlap_px, config.mask_threshold)
    predictor = with_views(model.module, config)  # adds test-time augmentation, if set
    with fabric.autocast():
        cells = Cells.concatenate(
            predict(predictor, dataset[indices[number]].image, *tiling, number + 1)
            for number in range(fabric.global_rank, len(indices), fabric.world_size)
        )
    if fabric.world_size > 1:
        gathered = [None] * fabric.world_size
        distributed.all_gather_object(gathered, cells)
        cells = Cells.concatenate(gathered)
        cells = cells[np.argsort(cells.image_ids, kind="stable")]
    return cells


def to_device(
    images: list[Tensor], targets: list[dict[str, Any]], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Move images and targets to ``device``; uint8 [3, h, w] images become float32 in [0, 1]."""
    images, targets = move_data_to_device((images, targets), device)
    return [image.float() / 255 for image in images], targets


def best_epoch(history: History, config: RunConfig) -> int:
    """Index of the first validated epoch with the best monitored value; 0 if none has a value.

    >>> rows = [{"validation_loss": 1.0, "validation_ap50": value} for value in (0.1, 0.3, 0.2)]
    >>> best_epoch(rows, RunConfig(monitor="validation_ap50"))
    1
    """
    table = pd.DataFrame(history, dtype=float)
    sign = 1 if config.monitor == "validation_ap50" else -1
    values = sign * table[config.monitor].where(table["validation_loss"].notna())
    return int(values.fillna(-math.inf).argmax())


def stopped_early(history: History, config: RunConfig) -> bool:
    """Whether training must end: the last epoch was validated, and the monitored value has not
    improved for ``early_stopping_patience`` epochs (0: never stop).
    """
    patience = config.early_stopping_patience
    if not patience or not history or math.isnan(history[-1]["validation_loss"]):
        return False
    return len(history) - 1 - best_epoch(history, config) >= patience


def _finite_losses(
    losses: dict[str, Tensor], targets: list[dict[str, Any]]
) -> tuple[Tensor, list[float]]:
    """The losses in the order of ``LOSSES``, as a float32 tensor [5] and as numbers; an error if
    one is not finite. They are copied from a GPU once per step, before the backward pass.
    """
    stacked = torch.stack([losses[name].float() for name in LOSSES])
    loss_values = stacked.tolist()
    named = zip(LOSSES, loss_values, strict=True)
    bad = [f"{name} = {value}" for name, value in named if not math.isfinite(value)]
    if bad:
        images = ", ".join(target["image_id"] for target in targets)
        raise TrainingError(
            f"training stopped: {', '.join(bad)} in a batch of images {images}; lower "
            f"learning_rate, lengthen warmup_steps or set gradient_clip_norm; "
            f"{devices.LAST_CHECKPOINT}"
        )
    return stacked, loss_values


if __name__ == "__main__":
    print(fit(RunConfig.from_yaml(*sys.argv[1:])))
