"""Devices, precision and memory of a run."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision

from cellseg_helpers.config import RunConfig

CHECKPOINT_EVERY_S = 60  # or sooner: after every validated epoch (see engine)
LAST_CHECKPOINT = (
    f"the last epoch's checkpoint is kept, or one from less than {CHECKPOINT_EVERY_S} s before"
)
NO_MEMORY = (  # what messages of errors say when memory is lacking
    "allocate memory", "Unable to allocate", "out of memory", "ALLOC_FAILED",
    "killed by signal: Killed", "killed by signal: Bus error",
)  # fmt: skip


class TrainingError(RuntimeError):
    """A training or prediction had to stop; the message is written for the user."""


def accelerator_of(config: RunConfig) -> str:
    """The accelerator of a run, ``cpu`` or ``cuda``; ``auto`` is a GPU if the machine has one."""
    if config.accelerator != "auto":
        return config.accelerator
    return "cuda" if torch.cuda.device_count() else "cpu"


def resolve_precision(config: RunConfig) -> str:
    """The precision of a run on this machine. ``auto`` is bf16-mixed on a GPU or CPU (AMX) with
    units for bfloat16 matrices, else 32: a CPU that has only AVX-512's bfloat16 instructions trains
    faster in 32 bits (measured on one of Intel's, ``bench/README.md``).
    """
    if config.precision != "auto":
        return config.precision
    if accelerator_of(config) == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32"


class AutocastPrecision(MixedPrecision):
    """Mixed precision that leaves the model's inputs in float32: in bfloat16, coordinates from
    256 px on are rounded by up to 1 px.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def make_fabric(config: RunConfig) -> Fabric:
    """A Fabric with a run's devices, processes and precision. It starts one process per device if
    there are several (not possible in a notebook).

    Raises:
        ValueError: a device or precision that this machine does not have.
    """
    config = replace(config, accelerator=accelerator_of(config))  # refuses 16-mixed on a CPU
    gpus, precision = torch.cuda.device_count(), resolve_precision(config)
    if config.accelerator == "cuda" and gpus < config.devices:
        available = f"this machine has {gpus} GPUs that torch can use"
        advice = "lower it, or accelerator 'cpu'"
        raise ValueError(f"devices is {config.devices}, but {available}; {advice}")
    mixed = precision != "32"
    plugin = AutocastPrecision(precision, config.accelerator) if mixed else Precision()
    processes = {"devices": config.devices, "strategy": "ddp" if config.devices > 1 else "auto"}
    fabric = Fabric(accelerator=config.accelerator, plugins=plugin, **processes)
    fabric.launch()
    return fabric


def peak_memory_bytes(device: torch.device) -> int:
    """This process's peak memory so far: of torch's tensors on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def explaining_errors() -> Iterator[None]:
    """Turn an error of torch that a setting can prevent into a ``TrainingError`` that names it."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, MemoryError) or any(phrase in str(error) for phrase in NO_MEMORY):
            raise TrainingError(
                "out of memory; lower batch_size, crop_size_px (or max_size), "
                "box_batch_size_per_image, rpn_post_nms_top_n_train, num_workers or, in "
                f"prediction, tile_size_px, or use precision 'bf16-mixed'; {LAST_CHECKPOINT}"
            ) from None
        if "Expected more than 1 value per channel when training" in str(error):
            cause = "the batch norms (its deepest feature map has one pixel)"
            advice = "raise batch_size or crop_size_px"
            raise TrainingError(f"a batch of one crop is too small for {cause}; {advice}") from None
        raise
