"""Drawn H&E-like tissue in the HW3 layout: the embedded default data set.

A picture is drawn as amounts of stain, never as colours: three planes (haematoxylin, eosin, red
blood cells) become light by Beer-Lambert's law in stain space, I = white * 10 ** -(amounts @ stain
vectors) (Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution",
2001). The vectors of haematoxylin and eosin are the reference of Macenko et al., "A method for
normalizing histology slides for quantitative analysis", 2009: real slides lie nearer to them than
to the older ones, whose eosin hardly absorbs blue. Each patient has a shade and a strength of its
own.

No two instances share a pixel, within a class or across classes: a cell lies beneath those that
stand there already. Cells that reach the image border are drawn but not annotated (unless asked
for), as report B says of the course data; such a cell uses up an id, so ids have gaps.

All arithmetic is in float64, so that the last bits in which processors differ do not reach a pixel.
"""

import argparse
import contextlib
import csv
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from scipy import ndimage, spatial

VERSION = 2  # raise it when the same seed draws something else
STAINS = np.array(
    [[0.563, 0.720, 0.406], [0.216, 0.801, 0.558], [0.06, 0.72, 0.69]]
)  # optical density of R, G, B
TRAIN_PATIENTS, TEST_PATIENTS = 8, 2


class Stamp(NamedTuple):
    """One object in its own small window."""

    amounts: np.ndarray  # float [3, h, w], amount of each stain
    opacity: np.ndarray  # float [h, w], 0..1
    mask: np.ndarray  # bool [h, w]


class Recipe(NamedTuple):
    """What an image holds: objects per 100 x 100 px, and the share of each kind of ground."""

    cells: tuple[float, float, float, float]
    spindles: float
    red_cells: float
    nests: float  # share of the ground that is epithelium, 0..1
    lumen: float  # share of the ground that is empty glass, 0..1
    margin_px: int  # how far outside the image cells may have their middle; crops around rare cells hold them whole


RECIPES = {
    "epithelium": Recipe((4.2, 0.5, 0.0, 0.0), 0.4, 0.1, 0.9, 0.04, 24),
    "lymphoid": Recipe((0.15, 10.0, 0.0, 0.0), 0.3, 0.1, 0.05, 0.10, 24),
    "mixed": Recipe((2.5, 3.2, 0.6, 0.5), 0.8, 0.4, 0.5, 0.06, 24),
    "neutrophils": Recipe((0.0, 0.5, 5.0, 0.0), 0.3, 8.0, 0.0, 0.4, -4),
    "macrophages": Recipe((0.3, 1.0, 0.0, 3.6), 0.3, 1.0, 0.0, 0.5, -20),
}
KINDS = (
    "epithelium",
    "lymphoid",
    "neutrophils",
    "epithelium",
    "macrophages",
    "mixed",
)  # each patient has one of each


def _noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Smooth noise of mean 0 and variance 1."""
    step = max(1, int(sigma / 1.5))
    coarse = ndimage.gaussian_filter(
        rng.standard_normal([n // step + 3 for n in shape]), sigma / step
    )
    fine = ndimage.zoom(coarse, step, order=1) if step > 1 else coarse
    return fine[: shape[0], : shape[1]] * (2 * np.sqrt(np.pi) * sigma / step)


def _edge(depth: np.ndarray, softness_px: float) -> np.ndarray:
    return np.clip(depth / softness_px + 0.5, 0, 1)


def _outline(
    rng: np.random.Generator, radius_px: float, elongation: float, roughness: float
) -> np.ndarray:
    """Depth below the outline of a wavy ellipse, in px, positive inside: float [h, w]."""
    reach = int(radius_px * np.sqrt(elongation) * (1 + 3 * roughness)) + 4
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    angle = rng.uniform(0, np.pi)
    u = (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(elongation)
    v = (y * np.cos(angle) - x * np.sin(angle)) * np.sqrt(elongation)
    theta = np.arctan2(v, u)
    wave = sum(
        rng.normal(0, roughness) * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4)
    )
    return radius_px * (1 + wave) - np.hypot(u, v)


def _discs(shape: tuple[int, ...], centres: np.ndarray, radii_px: np.ndarray) -> np.ndarray:
    """Depth below the union of discs, in px; centres [n, 2] are y, x from the window's middle."""
    y, x = np.indices(shape) - (np.array(shape)[:, None, None] - 1) / 2
    return np.max(
        [r - np.hypot(y - cy, x - cx) for (cy, cx), r in zip(centres, radii_px, strict=True)],
        axis=0,
    )


def _around(rng: np.random.Generator, n: int, distance_px: float, spacing: float) -> np.ndarray:
    """n places [n, 2] on an arc around the middle, ``spacing`` radians apart."""
    angles = rng.uniform(0, 2 * np.pi) + spacing * np.arange(n)
    return distance_px * np.stack([np.sin(angles), np.cos(angles)], 1)


def _stamp(
    depth: np.ndarray,
    haematoxylin: np.ndarray | float,
    eosin: np.ndarray | float,
    red: np.ndarray | float = 0.0,
    softness_px: float = 1.5,
    halo: float = 0.0,
) -> Stamp:
    """An object from its depth below its outline; ``halo`` (0..1) is how far the ground has shrunk
    away from it.
    """
    edge = _edge(depth, softness_px)
    amounts = np.stack(np.broadcast_arrays(haematoxylin, eosin, red, depth)[:3])
    return Stamp(
        np.where(depth > -0.7, amounts, 0.02),
        np.maximum(0.95 * edge, halo * _edge(depth + 2, 2.0)),
        depth > 0,
    )


def _epithelial(rng: np.random.Generator) -> Stamp:
    """A large pale oval nucleus: dark rim, grainy chromatin, a nucleolus or two."""
    depth = _outline(rng, 14.5 * rng.lognormal(0, 0.22), rng.uniform(1.05, 1.7), 0.03)
    nucleoli = _discs(depth.shape, rng.normal(0, 3, (2, 2)), rng.uniform(0.5, 2.6, 2))
    h = (
        rng.uniform(0.25, 0.65)
        + 0.18 * _noise(rng, depth.shape, 1.1)
        + 0.25 * np.exp(-((depth - 1.2) ** 2) / 2)
    )
    e = rng.uniform(0.1, 0.35) + 0.07 * _noise(rng, depth.shape, 1.3)
    return _stamp(depth, h + 0.45 * _edge(nucleoli, 1.5), e, softness_px=rng.uniform(1.2, 3.0))


def _lymphocyte(rng: np.random.Generator) -> Stamp:
    """A small dark round disc with clumped chromatin."""
    depth = _outline(rng, 9.4 * rng.lognormal(0, 0.13), rng.uniform(1.0, 1.4), 0.035)
    h = (
        rng.uniform(0.75, 1.25)
        + 0.25 * _noise(rng, depth.shape, 1.4)
        + 0.12 * np.exp(-((depth - 1) ** 2) / 2)
    )
    e = rng.uniform(0.0, 0.4) + 0.12 * _noise(rng, depth.shape, 1.3)
    return _stamp(depth, h, e, softness_px=rng.uniform(1.2, 2.5), halo=rng.uniform(0, 0.5))


def _neutrophil(rng: np.random.Generator) -> Stamp:
    """A round cell: two to four dark lobes, joined, in a thin grainy cytoplasm."""
    depth = _outline(rng, 13.0 * rng.lognormal(0, 0.13), rng.uniform(1.0, 1.3), 0.035)
    n = int(rng.integers(2, 5))
    lobes = _around(rng, n, rng.uniform(4.8, 6.0), rng.uniform(1.3, 1.8))
    centres = np.concatenate([lobes, (lobes[1:] + lobes[:-1]) / 2])
    nucleus = _edge(
        _discs(depth.shape, centres, np.append(rng.uniform(3.8, 5.0, n), np.full(n - 1, 2.4))), 1.8
    )
    h = (
        0.1
        + 0.05 * _noise(rng, depth.shape, 1.0)
        + (rng.uniform(1.05, 1.4) + 0.12 * _noise(rng, depth.shape, 1.2)) * nucleus
    )
    e = rng.uniform(0.3, 0.55) + 0.13 * _noise(rng, depth.shape, 1.2) - 0.1 * nucleus
    return _stamp(depth, h, e, halo=rng.uniform(0.1, 0.7))


def _macrophage(rng: np.random.Generator) -> Stamp:
    """A large irregular cell: foamy cytoplasm, a nucleus away from the middle, sometimes two."""
    radius_px = np.clip(25 * rng.lognormal(0, 0.27), 17, 46)
    depth = _outline(rng, radius_px, rng.uniform(1.0, 1.5), 0.05)
    foam = _noise(rng, depth.shape, rng.uniform(1.1, 1.7)) - np.exp(-(depth**2) / 3)
    n = 1 + int(rng.random() < 0.25)
    centres = _around(rng, n, 0.4 * radius_px, rng.uniform(1, 3))
    bean = np.concatenate([centres, centres + rng.normal(0, 3, (n, 2))])
    nucleus = _edge(_discs(depth.shape, bean, np.tile(rng.uniform(5.5, 8.0, n), 2)), 2.0)
    h = (
        rng.uniform(0.06, 0.2)
        - 0.09 * foam
        + (rng.uniform(0.45, 0.8) + 0.12 * _noise(rng, depth.shape, 1.3)) * nucleus
    )
    return _stamp(depth, h, rng.uniform(0.15, 0.4) - 0.11 * foam, halo=rng.uniform(0, 0.6))


def _spindle(rng: np.random.Generator) -> Stamp:
    """A fibroblast's long thin nucleus."""
    depth = _outline(rng, 6.5 * rng.lognormal(0, 0.2), rng.uniform(2.8, 5.5), 0.03)
    return _stamp(
        depth, rng.uniform(0.5, 0.9) + 0.12 * _noise(rng, depth.shape, 1.2), 0.25, softness_px=2.0
    )


def _red_cell(rng: np.random.Generator) -> Stamp:
    """A red blood cell: a disc without a nucleus, paler in the middle."""
    depth = _outline(rng, rng.uniform(6.0, 8.0), rng.uniform(1.0, 2.0), 0.03)
    return _stamp(depth, 0.0, 0.05, rng.uniform(0.5, 1.2) - 0.04 * np.clip(depth, 0, 7), halo=0.2)


def _debris(rng: np.random.Generator) -> Stamp:
    """A dark speck: a fragment of a dead cell, or dirt."""
    depth = _outline(rng, rng.uniform(1.2, 4.5), rng.uniform(1.0, 2.5), 0.1)
    return _stamp(depth, rng.uniform(0.4, 1.2), 0.2, softness_px=2.0)


CELLS = (_epithelial, _lymphocyte, _neutrophil, _macrophage)
LEAST_VISIBLE = (
    0.99,
    0.985,
    0.97,
    0.92,
)  # share of a cell that the ones before it must leave in sight


def _ground(
    rng: np.random.Generator, shape: tuple[int, int], recipe: Recipe
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stroma with fibres, epithelium and lumen: amounts float [3, H, W], and the shares of
    epithelium and lumen [H, W].
    """

    def patches(field: np.ndarray, share: float, softness: float) -> np.ndarray:
        return _edge(field - np.quantile(field, 1 - share), softness)

    nests = patches(_noise(rng, shape, 28), recipe.nests, 0.2)
    ragged = _noise(rng, shape, 14) + 0.15 * _noise(rng, shape, 4) + 0.05 * _noise(rng, shape, 1.2)
    lumen = patches(ragged, recipe.lumen * rng.uniform(0.3, 1.7), rng.uniform(0.15, 0.6))
    vacuoles = patches(_noise(rng, shape, 2.2), rng.uniform(0, 0.06), 0.6)
    y, x = np.indices(shape)
    angle = rng.uniform(0, np.pi)
    phase = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / rng.uniform(9, 14) + 2.5 * _noise(
        rng, shape, 14
    )
    strength = rng.uniform(0.15, 0.5)
    fibres = (
        strength
        + 0.13 * np.sin(phase) * np.abs(_noise(rng, shape, 7))
        + 0.08 * _noise(rng, shape, 1.4)
    )
    cytoplasm = strength + 0.07 * _noise(rng, shape, 1.3) + 0.06 * _noise(rng, shape, 7)
    clear = (1 - 0.95 * lumen) * (1 - 0.7 * vacuoles)
    e = (fibres * (1 - nests) + cytoplasm * nests) * clear
    h = (
        rng.uniform(0.0, 0.2)
        + 0.06 * nests
        + 0.04 * _noise(rng, shape, 1.5)
        + 0.04 * _noise(rng, shape, 9)
    ) * clear
    return np.clip(np.stack([h, e, 0 * e]), 0.01, None), nests, lumen


def _part_cells(
    rng: np.random.Generator, amounts: np.ndarray, taken: np.ndarray, centres: np.ndarray
) -> None:
    """Pale seams between the territories of neighbouring cells, where the tissue has shrunk."""
    if len(centres) < 2:
        return
    places = np.stack(np.nonzero(~taken), 1)
    near, far = spatial.cKDTree(centres).query(places, k=2)[0].T
    seam = (
        np.exp(-(((far - near) / rng.uniform(1.5, 3.5)) ** 2)) * (far < 34) * rng.uniform(0.1, 0.7)
    )
    amounts[:, places[:, 0], places[:, 1]] *= 1 - seam


def _scatter(
    rng: np.random.Generator, weight: np.ndarray, per_100px: float, margin_px: int
) -> tuple[np.ndarray, int]:
    """Candidate places [n, 2] (y, x), more of them where ``weight`` is high, and how many objects
    to draw.
    """
    size = np.array(weight.shape)
    margin = np.maximum(margin_px, -size // 3)
    count = int(rng.poisson(per_100px * np.prod(size + 2 * margin) / 1e4))
    places = rng.integers(-margin, size + margin, (15 * count, 2))
    chance = weight[tuple(places.clip(0, size - 1).T)]
    return places[rng.random(len(places)) < chance], count


def _place(
    amounts: np.ndarray, taken: np.ndarray, stamp: Stamp, y: int, x: int, least_visible: float
) -> tuple[tuple[slice, slice], np.ndarray, bool] | None:
    """Blend a stamp around (y, x) beneath the cells that are there.

    Returns:
        None where too little of it would be seen (then nothing is drawn); else its window in the
        image, the visible mask in that window, and whether the object reaches the image border.
    """
    (height, width), (h, w) = taken.shape, stamp.mask.shape
    top, left = y - h // 2, x - w // 2
    inner = (
        slice(max(-top, 0), max(min(height - top, h), 0)),
        slice(max(-left, 0), max(min(width - left, w), 0)),
    )
    window = slice(max(top, 0), max(top + h, 0)), slice(max(left, 0), max(left + w, 0))
    free = ~taken[window]
    visible = stamp.mask[inner] & free
    if visible.sum() < max(least_visible * stamp.mask[inner].sum(), 1):
        return None
    parts, count = ndimage.label(visible, np.ones((3, 3)))
    if count > 1:
        visible = parts == np.bincount(parts[visible]).argmax()
    opacity = stamp.opacity[inner] * free
    amounts[:, *window] += opacity * (stamp.amounts[:, *inner] - amounts[:, *window])
    rows, cols = np.nonzero(stamp.mask)
    cut = (
        min(rows[0] + top, cols.min() + left) <= 0
        or rows[-1] + top >= height - 1
        or cols.max() + left >= width - 1
    )
    return window, visible, bool(cut)


def draw_tissue(
    rng: np.random.Generator,
    height: int = 192,
    width: int = 192,
    kind: str = "mixed",
    stains: np.ndarray = STAINS,
    annotate_border_cells: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        rng: the source of all chance.
        height: of the image, px.
        width: of the image, px.
        kind: what it shows, a key of ``RECIPES``.
        stains: float [3, 3], optical density of R, G and B for one unit of haematoxylin, eosin and
            red blood cells.
        annotate_border_cells: whether cells that reach the image border stand in the label maps.

    Returns:
        The image, uint8 [3, H, W] RGB, and its label maps, int32 [4, H, W]: 0 = background, other
        values = instance ids.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in RECIPES:
        raise ValueError(f"unknown kind of tissue {kind!r}; one of {', '.join(RECIPES)}")
    recipe = RECIPES[kind]
    amounts, nests, lumen = _ground(rng, (height, width), recipe)
    taken = np.zeros((height, width), bool)
    label_maps = np.zeros((4, height, width), np.int32)
    stroma = 1 - 0.8 * nests
    homes = nests * (1 - lumen), stroma * (1 - 0.5 * lumen), stroma, stroma
    centres = []
    for index in (3, 0, 2, 1):
        instance_id = 0
        places, count = _scatter(rng, homes[index], recipe.cells[index], recipe.margin_px)
        for y, x in places:
            if instance_id == count:
                break
            if taken[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]:
                continue
            placed = _place(amounts, taken, CELLS[index](rng), y, x, LEAST_VISIBLE[index])
            if placed:
                window, visible, cut = placed
                instance_id += 1
                taken[window] |= visible
                centres.append((y, x))
                if annotate_border_cells or not cut:
                    label_maps[index][window][visible] = instance_id
    _part_cells(rng, amounts, taken, np.array(centres))
    red_cells = recipe.red_cells * rng.exponential()
    for draw, per_100px, home in (
        (_spindle, recipe.spindles, stroma),
        (_red_cell, red_cells, 1 - nests),
        (_debris, 0.6, stroma),
    ):
        places, count = _scatter(rng, home, per_100px, 10)
        for y, x in places[:count]:
            _place(amounts, taken, draw(rng), y, x, 0.5)
    return _expose(rng, amounts, stains), label_maps


def _expose(rng: np.random.Generator, amounts: np.ndarray, stains: np.ndarray) -> np.ndarray:
    """Amounts of stain -> light, through a lens out of focus by chance, onto a noisy sensor: uint8
    [3, H, W].
    """
    light = 10.0 ** -np.tensordot(stains.T, np.clip(amounts, 0, None), 1)
    light = ndimage.gaussian_filter(light, (0, *[rng.uniform(0.5, 1.1)] * 2)) * rng.uniform(
        240, 254, (3, 1, 1)
    )
    return np.clip(
        np.rint(light + rng.normal(0, rng.uniform(1.5, 3.5), light.shape)), 0, 255
    ).astype(np.uint8)


def _staining(rng: np.random.Generator) -> np.ndarray:
    """One laboratory's shade and strength of each stain, float [3, 3]."""
    stains = STAINS + rng.normal(0, [[0.04, 0.03, 0.03], [0.06, 0.06, 0.08], [0.03, 0.04, 0.04]])
    return np.clip(stains, 0.03, None) * rng.lognormal(0, [[0.22], [0.45], [0.15]])


def draw_dataset(
    folder: str | Path,
    num_train: int = 48,
    num_test: int = 8,
    seed: int = 0,
    image_size_px: tuple[int, int] = (160, 288),
    annotate_border_cells: bool = False,
) -> None:
    """Draw a data set in the HW3 layout; a folder that holds this very drawing is left as it is.

    The folder appears whole or not at all: the drawing is made beside it and then renamed. Training
    images come from eight patients, test images from two others (and have no masks). ``drawn.json``
    in the folder holds the settings.

    Args:
        folder: where to, absent or empty.
        num_train: images with masks.
        num_test: images without.
        seed: the same seed draws the same bytes.
        image_size_px: least and greatest side, before those around macrophages are made a third
            larger.
        annotate_border_cells: whether cells that reach the image border are annotated.

    Raises:
        ValueError: no training image, or images under 64 px.
        FileExistsError: the folder holds something else.
    """
    if num_train < 1 or num_test < 0:
        raise ValueError(
            f"num_train must be at least 1 and num_test at least 0, not {num_train} and {num_test}"
        )
    if not 64 <= image_size_px[0] <= image_size_px[1]:
        raise ValueError(
            f"image_size_px must be a least side of 64 or more and a greatest side, not {tuple(image_size_px)}"
        )
    folder = Path(folder)
    settings = {
        "version": VERSION,
        "num_train": num_train,
        "num_test": num_test,
        "seed": seed,
        "image_size_px": list(image_size_px),
        "annotate_border_cells": annotate_border_cells,
    }
    if _holds(folder, settings):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_images(part, num_train, num_test, seed, image_size_px, annotate_border_cells)
        (part / "drawn.json").write_text(json.dumps(settings, indent=1))
        part.chmod(0o755)
        try:
            os.rename(part, folder)
        except OSError:
            if not _holds(folder, settings):  # else another process was first
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def discard_older_drawing(folder: Path) -> None:
    """Remove a drawing that another version of this module made, so that it is drawn anew; anything
    else is left alone.
    """
    try:
        version = json.loads((folder / "drawn.json").read_text())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if version != VERSION:
        shutil.rmtree(folder)


def _holds(folder: Path, settings: dict) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    with contextlib.suppress(OSError, ValueError):
        if json.loads((folder / "drawn.json").read_text()) == settings:
            return True
    raise FileExistsError(
        f"{folder} holds something other than this drawing (other settings, another version of it, or other files); "
        "remove that folder or name another one"
    )


def _write_images(
    folder: Path,
    num_train: int,
    num_test: int,
    seed: int,
    image_size_px: tuple[int, int],
    annotate: bool,
) -> None:
    (folder / "test_release").mkdir()
    patients, tests = [], []
    for index in range(num_train + num_test):
        turn, is_test = (index - num_train, True) if index >= num_train else (index, False)
        group = TEST_PATIENTS if is_test else TRAIN_PATIENTS
        patient = turn % group + is_test * TRAIN_PATIENTS
        kind = KINDS[(turn // group + turn % group) % len(KINDS)]
        rng = np.random.default_rng([seed, index])
        stains = _staining(np.random.default_rng([seed, patient, 0])) * rng.lognormal(
            0, [[0.1], [0.2], [0.1]]
        )
        scale = 1.3 if kind == "macrophages" else 1.0
        height, width = (
            round(scale * n) for n in rng.integers(image_size_px[0], image_size_px[1] + 1, 2)
        )
        image, label_maps = draw_tissue(rng, height, width, kind, stains, annotate)
        while not label_maps.any():  # no image of the course is without a cell
            image, label_maps = draw_tissue(rng, height, width, kind, stains, annotate)
        name = str(uuid.uuid5(uuid.NAMESPACE_OID, f"drawn tissue {seed} {index}"))
        if is_test:
            _write(
                folder / "test_release" / f"{name}.tif", image.transpose(1, 2, 0), photometric="rgb"
            )
            tests.append(
                {"file_name": f"{name}.tif", "id": len(tests) + 1, "height": height, "width": width}
            )
            continue
        (folder / "train" / name).mkdir(parents=True)
        rgba = np.concatenate([image, np.full_like(image[:1], 255)]).transpose(1, 2, 0)
        _write(
            folder / "train" / name / "image.tif",
            rgba,
            photometric="rgb",
            extrasamples=["unassalpha"],
        )
        for class_id, label_map in enumerate(label_maps, 1):
            if label_map.any():
                _write(
                    folder / "train" / name / f"class{class_id}.tif",
                    label_map.astype(np.float64),
                    photometric="minisblack",
                )
        patients.append((name, f"drawn-{patient}"))
    (folder / "test_image_name_to_ids.json").write_text(json.dumps(tests, indent=1))
    with open(folder / "patients.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image_id", "patient"), *patients])


def _write(path: Path, array: np.ndarray, **tags) -> None:
    tifffile.imwrite(path, array, compression="lzw", metadata=None, **tags)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw H&E-like tissue in the HW3 layout.")
    parser.add_argument("folder", type=Path, help="where to; absent or empty")
    parser.add_argument("--num-train", type=int, default=48, help="images with masks (48)")
    parser.add_argument("--num-test", type=int, default=8, help="images without masks (8)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw_dataset(**vars(arguments))
    print(
        f"{arguments.num_train} training and {arguments.num_test} test images in {arguments.folder}"
    )
