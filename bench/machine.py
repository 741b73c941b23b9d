"""Where and with what something was measured."""

import json
import os
import platform
import shutil
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from bench.measure import fresh_process
from cellseg_helpers.runs import provenance

PACKAGES = (
    "torch", "torchvision", "numpy", "scipy", "scikit-image", "pycocotools", "hotcoco", "tifffile", "imagecodecs",
)  # fmt: skip


def save_table(table: pd.DataFrame, path: Path, seconds: dict[str, float]) -> None:
    """A table as CSV, with four digits, and beside it, as JSON, the machine, the versions and the
    seconds that it took.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.4g")
    with fresh_process() as process:  # it has torch
        record = process.submit(machine).result() | {"seconds": seconds}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def machine() -> dict[str, Any]:
    import torch

    listed = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "code_version": provenance()["code_version"],
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": listed or "none",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "date": datetime.now().date().isoformat(),
    }
