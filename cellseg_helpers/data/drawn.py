"""Draws synthetic H&E-like tissue in the HW3 layout: the built-in default data set.

An image is drawn as amounts of three stains (haematoxylin, eosin, red blood cells). Beer-Lambert's
law converts them to light: I = white * 10 ** -(amounts @ stain vectors) (Ruifrok and Johnston,
"Quantification of histochemical staining by color deconvolution", 2001). The vectors of the first
two are the reference vectors of Macenko et al., "A method for normalizing histology slides for
quantitative analysis", 2009. (Real slides are closer to them than to the vectors of 2001, whose
eosin hardly absorbs blue.) Each patient has its own shades and strengths of the stains.

No two instances share a pixel, even across classes: a new cell lies beneath those drawn before it.
As in the course data, cells that reach the image border are drawn but not annotated by default;
such a cell uses up an id, so ids have gaps. All arithmetic is in float64: the last bits, in which
processors differ, do not change a pixel.
"""

import csv
import json
import shutil
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from scipy import ndimage, spatial

from cellseg_helpers.config import replacing

Array, Rng = np.ndarray, np.random.Generator

VERSION = 2  # raise it when the same seed gives other images
# Optical density of R, G and B for one unit of haematoxylin, eosin, red blood cells.
STAINS = np.array([[0.563, 0.720, 0.406], [0.216, 0.801, 0.558], [0.06, 0.72, 0.69]])
TRAIN_PATIENTS, TEST_PATIENTS = 8, 2
PIECES_TOUCH_AT_CORNERS = np.ones((3, 3))
_write = partial(tifffile.imwrite, compression="lzw", metadata=None)


class Tissue(NamedTuple):
    """What an image shows: objects per 100 x 100 px, and shares (0..1) of the background."""

    cells: tuple[float, float, float, float]  # objects of each class
    spindles: float  # objects
    red_cells: float  # objects
    nests: float  # share of epithelium
    lumen: float  # share of empty glass
    margin_px: int  # centres lie up to this far outside the image (below 0: at least so far inside)


TISSUES = {
    "epithelium": Tissue((4.2, 0.5, 0.0, 0.0), 0.4, 0.1, 0.9, 0.04, 24),
    "lymphoid": Tissue((0.15, 10.0, 0.0, 0.0), 0.3, 0.1, 0.05, 0.10, 24),
    "mixed": Tissue((2.5, 3.2, 0.6, 0.5), 0.8, 0.4, 0.5, 0.06, 24),
    "neutrophils": Tissue((0.0, 0.5, 5.0, 0.0), 0.3, 8.0, 0.0, 0.4, -4),
    "macrophages": Tissue((0.3, 1.0, 0.0, 3.6), 0.3, 1.0, 0.0, 0.5, -20),
}
# The tissues of a patient's images, in turn.
KINDS = ("epithelium", "lymphoid", "neutrophils", "epithelium", "macrophages", "mixed")


class Stamp(NamedTuple):
    """One object in its own small window."""

    amounts: Array  # float [3, h, w], amount of each stain
    opacity: Array  # float [h, w], 0..1
    mask: Array  # bool [h, w]


def _noise(rng: Rng, shape: tuple[int, ...], sigma: float) -> Array:
    """Smooth noise of mean 0 and variance 1."""
    step = max(1, int(sigma / 1.5))
    white = rng.standard_normal([n // step + 3 for n in shape])
    noise = ndimage.gaussian_filter(white, sigma / step)
    if step > 1:
        noise = ndimage.zoom(noise, step, order=1)
    return noise[: shape[0], : shape[1]] * (2 * np.sqrt(np.pi) * sigma / step)


def _edge(depth: Array, softness_px: float) -> Array:
    """0 outside an outline, 1 inside, with a ramp ``softness_px`` wide across it."""
    return np.clip(depth / softness_px + 0.5, 0, 1)


def _outline(rng: Rng, radius_px: float, elongation: float, roughness: float) -> Array:
    """The depth of each pixel inside a wavy ellipse, px, negative outside: float [h, w]."""
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


def _discs(shape: tuple[int, ...], centres: Array, radii_px: Array) -> Array:
    """As ``_outline`` for a union of discs; centres y, x [n, 2] are from the window's middle."""
    y, x = np.indices(shape) - (np.array(shape)[:, None, None] - 1) / 2
    discs = zip(centres, radii_px, strict=True)
    return np.max([radius - np.hypot(y - cy, x - cx) for (cy, cx), radius in discs], axis=0)


def _on_arc(rng: Rng, n: int, distance_px: float, spacing: float) -> Array:
    """n points y, x [n, 2] on an arc around (0, 0), ``spacing`` radians apart; random start."""
    angles = rng.uniform(0, 2 * np.pi) + spacing * np.arange(n)
    return distance_px * np.stack([np.sin(angles), np.cos(angles)], 1)


def _stamp(depth: Array, haematoxylin, eosin, red=0.0, softness_px=1.5, halo=0.0) -> Stamp:
    """An object, from its depth inside its outline and its amounts of stain, numbers or [h, w].
    ``halo`` (0..1): how pale the gap is that it has left around itself by shrinking. In the
    functions below h and e are amounts of haematoxylin and eosin.
    """
    amounts = np.stack(np.broadcast_arrays(haematoxylin, eosin, red, depth)[:3])
    opacity = np.maximum(0.95 * _edge(depth, softness_px), halo * _edge(depth + 2, 2.0))
    return Stamp(np.where(depth > -0.7, amounts, 0.02), opacity, depth > 0)


def _epithelial(rng: Rng) -> Stamp:
    """A large pale oval nucleus: dark rim, grainy chromatin, a nucleolus or two."""
    depth = _outline(rng, 14.5 * rng.lognormal(0, 0.22), rng.uniform(1.05, 1.7), 0.03)
    nucleoli = _discs(depth.shape, rng.normal(0, 3, (2, 2)), rng.uniform(0.5, 2.6, 2))
    h = rng.uniform(0.25, 0.65) + 0.18 * _noise(rng, depth.shape, 1.1)
    h += 0.25 * np.exp(-((depth - 1.2) ** 2) / 2)  # the rim
    e = rng.uniform(0.1, 0.35) + 0.07 * _noise(rng, depth.shape, 1.3)
    return _stamp(depth, h + 0.45 * _edge(nucleoli, 1.5), e, softness_px=rng.uniform(1.2, 3.0))


def _lymphocyte(rng: Rng) -> Stamp:
    """A small dark round disc with clumped chromatin."""
    depth = _outline(rng, 9.4 * rng.lognormal(0, 0.13), rng.uniform(1.0, 1.4), 0.035)
    rim = 0.12 * np.exp(-((depth - 1) ** 2) / 2)
    h = rng.uniform(0.75, 1.25) + 0.25 * _noise(rng, depth.shape, 1.4) + rim
    e = rng.uniform(0.0, 0.4) + 0.12 * _noise(rng, depth.shape, 1.3)
    return _stamp(depth, h, e, softness_px=rng.uniform(1.2, 2.5), halo=rng.uniform(0, 0.5))


def _neutrophil(rng: Rng) -> Stamp:
    """A round cell: two to four dark lobes, joined, in a thin grainy cytoplasm."""
    depth = _outline(rng, 13.0 * rng.lognormal(0, 0.13), rng.uniform(1.0, 1.3), 0.035)
    n = int(rng.integers(2, 5))
    lobes = _on_arc(rng, n, rng.uniform(4.8, 6.0), rng.uniform(1.3, 1.8))
    centres = np.concatenate([lobes, (lobes[1:] + lobes[:-1]) / 2])
    radii = np.append(rng.uniform(3.8, 5.0, n), np.full(n - 1, 2.4))
    nucleus = _edge(_discs(depth.shape, centres, radii), 1.8)
    cytoplasm = 0.1 + 0.05 * _noise(rng, depth.shape, 1.0)
    h = cytoplasm + (rng.uniform(1.05, 1.4) + 0.12 * _noise(rng, depth.shape, 1.2)) * nucleus
    e = rng.uniform(0.3, 0.55) + 0.13 * _noise(rng, depth.shape, 1.2) - 0.1 * nucleus
    return _stamp(depth, h, e, halo=rng.uniform(0.1, 0.7))


def _macrophage(rng: Rng) -> Stamp:
    """A large irregular cell: foamy cytoplasm, a nucleus away from the middle, sometimes two."""
    radius_px = np.clip(25 * rng.lognormal(0, 0.27), 17, 46)
    depth = _outline(rng, radius_px, rng.uniform(1.0, 1.5), 0.05)
    foam = _noise(rng, depth.shape, rng.uniform(1.1, 1.7)) - np.exp(-(depth**2) / 3)
    n = 1 + int(rng.random() < 0.25)
    centres = _on_arc(rng, n, 0.4 * radius_px, rng.uniform(1, 3))
    bean = np.concatenate([centres, centres + rng.normal(0, 3, (n, 2))])
    nucleus = _edge(_discs(depth.shape, bean, np.tile(rng.uniform(5.5, 8.0, n), 2)), 2.0)
    cytoplasm = rng.uniform(0.06, 0.2) - 0.09 * foam
    h = cytoplasm + (rng.uniform(0.45, 0.8) + 0.12 * _noise(rng, depth.shape, 1.3)) * nucleus
    return _stamp(depth, h, rng.uniform(0.15, 0.4) - 0.11 * foam, halo=rng.uniform(0, 0.6))


def _spindle(rng: Rng) -> Stamp:
    """A fibroblast's long thin nucleus."""
    depth = _outline(rng, 6.5 * rng.lognormal(0, 0.2), rng.uniform(2.8, 5.5), 0.03)
    h = rng.uniform(0.5, 0.9) + 0.12 * _noise(rng, depth.shape, 1.2)
    return _stamp(depth, h, 0.25, softness_px=2.0)


def _red_cell(rng: Rng) -> Stamp:
    """A red blood cell: a disc without a nucleus, paler in the middle."""
    depth = _outline(rng, rng.uniform(6.0, 8.0), rng.uniform(1.0, 2.0), 0.03)
    return _stamp(depth, 0.0, 0.05, rng.uniform(0.5, 1.2) - 0.04 * np.clip(depth, 0, 7), halo=0.2)


def _debris(rng: Rng) -> Stamp:
    """A dark speck: a fragment of a dead cell, or dirt."""
    depth = _outline(rng, rng.uniform(1.2, 4.5), rng.uniform(1.0, 2.5), 0.1)
    return _stamp(depth, rng.uniform(0.4, 1.2), 0.2, softness_px=2.0)


CELLS = (_epithelial, _lymphocyte, _neutrophil, _macrophage)
LEAST_VISIBLE = (0.99, 0.985, 0.97, 0.92)  # share of a cell that must not be covered, by class


def _background(rng: Rng, shape: tuple[int, int], tissue: Tissue) -> tuple[Array, Array, Array]:
    """The background: amounts of stains [3, H, W], shares of epithelium and of lumen [H, W]."""
    noise = partial(_noise, rng, shape)

    def patches(field: Array, share: float, softness: float) -> Array:  # 1 where field is high
        return _edge(field - np.quantile(field, 1 - share), softness)

    nests = patches(noise(28), tissue.nests, 0.2)
    ragged = noise(14) + 0.15 * noise(4) + 0.05 * noise(1.2)
    lumen = patches(ragged, tissue.lumen * rng.uniform(0.3, 1.7), rng.uniform(0.15, 0.6))
    vacuoles = patches(noise(2.2), rng.uniform(0, 0.06), 0.6)
    y, x = np.indices(shape)
    angle = rng.uniform(0, np.pi)
    across = x * np.cos(angle) + y * np.sin(angle)
    phase = across * 2 * np.pi / rng.uniform(9, 14) + 2.5 * noise(14)
    strength = rng.uniform(0.15, 0.5)
    fibres = strength + 0.13 * np.sin(phase) * np.abs(noise(7)) + 0.08 * noise(1.4)
    cytoplasm = strength + 0.07 * noise(1.3) + 0.06 * noise(7)
    clear = (1 - 0.95 * lumen) * (1 - 0.7 * vacuoles)
    e = (fibres * (1 - nests) + cytoplasm * nests) * clear
    h = (rng.uniform(0.0, 0.2) + 0.06 * nests + 0.04 * noise(1.5) + 0.04 * noise(9)) * clear
    return np.clip(np.stack([h, e, 0 * e]), 0.01, None), nests, lumen


def _draw_seams(rng: Rng, amounts: Array, taken: Array, centres: Array) -> None:
    """Draw pale seams halfway between neighbouring cells, where the tissue has shrunk."""
    if len(centres) < 2:
        return
    pixels = np.nonzero(~taken)
    near, far = spatial.cKDTree(centres).query(np.stack(pixels, 1), k=2)[0].T
    seam = np.exp(-(((far - near) / rng.uniform(1.5, 3.5)) ** 2))
    amounts[:, *pixels] *= 1 - seam * (far < 34) * rng.uniform(0.1, 0.7)


def _scatter(rng: Rng, weight: Array, per_100px: float, margin_px: int) -> tuple[Array, int]:
    """Candidate centres y, x [n, 2], denser where ``weight`` is high; and the number of objects."""
    size = np.array(weight.shape)
    margin = np.maximum(margin_px, -size // 3)
    count = int(rng.poisson(per_100px * np.prod(size + 2 * margin) / 1e4))
    centres = rng.integers(-margin, size + margin, (15 * count, 2))
    chance = weight[tuple(centres.clip(0, size - 1).T)]
    return centres[rng.random(len(centres)) < chance], count


def _draw(
    amounts: Array, taken: Array, stamp: Stamp, y: int, x: int, least_visible: float
) -> tuple[tuple[slice, slice], Array, bool] | None:
    """Blend a stamp around (y, x) beneath the cells drawn before. Returns its window in the image,
    the visible mask in that window, and whether the object reaches the image border. If less than
    the share ``least_visible`` of it would be visible, returns None and draws nothing.
    """
    size, sides = np.array(taken.shape), np.array(stamp.mask.shape)
    start = (y, x) - sides // 2
    # The part of the stamp inside the image, and its window in the image.
    inner = tuple(map(slice, (-start).clip(0), (size - start).clip(0, sides)))
    window = tuple(map(slice, start.clip(0), (start + sides).clip(0)))
    free = ~taken[window]
    visible = stamp.mask[inner] & free
    if visible.sum() < max(least_visible * stamp.mask[inner].sum(), 1):
        return None
    pieces, count = ndimage.label(visible, PIECES_TOUCH_AT_CORNERS)
    if count > 1:  # the largest piece becomes the cell's mask
        visible = pieces == np.bincount(pieces[visible]).argmax()
    opacity = stamp.opacity[inner] * free
    amounts[:, *window] += opacity * (stamp.amounts[:, *inner] - amounts[:, *window])
    pixels = np.argwhere(stamp.mask) + start
    return window, visible, bool((pixels <= 0).any() or (pixels >= size - 1).any())


def draw_tissue(
    rng: Rng,
    height: int = 192,
    width: int = 192,
    kind: str = "mixed",
    stains: Array = STAINS,
    annotate_border_cells: bool = False,
) -> tuple[Array, Array]:
    """Draw one image, uint8 [3, H, W] RGB, and its label maps, int32 [4, H, W].

    Args:
        kind: the tissue, a key of ``TISSUES``.
        stains: float [3, 3], as ``STAINS``.
        annotate_border_cells: whether the label maps include cells that reach the image border.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in TISSUES:
        raise ValueError(f"unknown kind of tissue {kind!r}; one of {', '.join(TISSUES)}")
    tissue = TISSUES[kind]
    amounts, nests, lumen = _background(rng, (height, width), tissue)
    taken = np.zeros((height, width), bool)  # pixels of the cells drawn so far
    label_maps = np.zeros((4, height, width), np.int32)
    stroma = 1 - 0.8 * nests
    weights = nests * (1 - lumen), stroma * (1 - 0.5 * lumen), stroma, stroma  # by class
    all_centres = []
    for index in (3, 0, 2, 1):  # large cells first: later ones are drawn around them
        instance_id = 0
        centres, count = _scatter(rng, weights[index], tissue.cells[index], tissue.margin_px)
        for y, x in centres:
            if instance_id == count:
                break
            if taken[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]:
                continue
            cell = _draw(amounts, taken, CELLS[index](rng), y, x, LEAST_VISIBLE[index])
            if cell:
                window, visible, reaches_border = cell
                instance_id += 1
                taken[window] |= visible
                all_centres.append((y, x))
                if annotate_border_cells or not reaches_border:
                    label_maps[index][window][visible] = instance_id
    _draw_seams(rng, amounts, taken, np.array(all_centres))
    red_cells = tissue.red_cells * rng.exponential()
    for make_stamp, per_100px, weight in (
        (_spindle, tissue.spindles, stroma),
        (_red_cell, red_cells, 1 - nests),
        (_debris, 0.6, stroma),
    ):
        centres, count = _scatter(rng, weight, per_100px, 10)
        for y, x in centres[:count]:
            _draw(amounts, taken, make_stamp(rng), y, x, 0.5)
    return _expose(rng, amounts, stains), label_maps


def _expose(rng: Rng, amounts: Array, stains: Array) -> Array:
    """Photograph the stains: light, blurred by the lens, on a noisy sensor; uint8 [3, H, W]."""
    light = 10.0 ** -np.tensordot(stains.T, np.clip(amounts, 0, None), 1)
    light = ndimage.gaussian_filter(light, (0, *[rng.uniform(0.5, 1.1)] * 2))
    light = light * rng.uniform(240, 254, (3, 1, 1))
    noisy = light + rng.normal(0, rng.uniform(1.5, 3.5), light.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def draw_dataset(
    folder: str | Path,
    num_train: int = 48,
    num_test: int = 8,
    seed: int = 0,
    image_size_px: tuple[int, int] = (160, 288),
    annotate_border_cells: bool = False,
) -> None:
    """Draw a data set in the HW3 layout, whole or not at all. Its ``drawn.json`` holds the
    arguments; a folder that was drawn with the same ones is left as it is.

    Args:
        folder: a new or empty folder.
        num_train: number of images with masks, of eight patients.
        num_test: number of images without masks, of two other patients.
        seed: the same seed gives the same bytes.
        image_size_px: least and greatest side; for macrophages, sides are then multiplied by 1.3.

    Raises:
        ValueError: no training image, or images under 64 px.
        FileExistsError: the folder holds something else.
    """
    least, greatest = image_size_px
    if num_train < 1 or num_test < 0:
        least_counts = "num_train must be at least 1 and num_test at least 0"
        raise ValueError(f"{least_counts}, not {num_train} and {num_test}")
    if not 64 <= least <= greatest:
        sides = "image_size_px must be a least side of 64 or more and a greatest side"
        raise ValueError(f"{sides}, not {(least, greatest)}")
    settings = {"num_train": num_train, "num_test": num_test, "seed": seed}
    settings |= {"image_size_px": [least, greatest], "annotate_border_cells": annotate_border_cells}
    folder, drawing = Path(folder), {"version": VERSION, **settings}
    if _holds(folder, drawing):
        return
    try:
        with replacing(folder, folder=True) as part:
            _write_images(part, **settings)
            (part / "drawn.json").write_text(json.dumps(drawing, indent=1))
    except OSError:
        if not _holds(folder, drawing):  # else another process was first
            raise


def discard_older_drawing(folder: Path) -> None:
    """Remove a data set drawn by another version of this module; leave anything else alone."""
    if _drawing(folder).get("version", VERSION) != VERSION:
        shutil.rmtree(folder)


def _drawing(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``drawn.json``; empty if it cannot be read."""
    try:
        drawing = json.loads((folder / "drawn.json").read_text())
    except (OSError, ValueError):
        return {}
    return drawing if isinstance(drawing, dict) else {}


def _holds(folder: Path, drawing: dict[str, Any]) -> bool:
    """Whether a folder holds the data set; raises an error if it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if _drawing(folder) != drawing:
        other = "other settings, another version of it, or other files"
        problem = f"{folder} holds something other than this drawing ({other})"
        raise FileExistsError(f"{problem}; remove that folder or name another one")
    return True


def _write_images(
    folder: Path,
    num_train: int,
    num_test: int,
    seed: int,
    image_size_px: Sequence[int],
    annotate_border_cells: bool,
) -> None:
    """Draw the images of ``draw_dataset`` into a folder, with their masks and lists."""
    (folder / "test_release").mkdir()
    patients, tests = [("image_id", "patient")], []
    for index in range(num_train + num_test):
        number, patients_of_part, first = index, TRAIN_PATIENTS, 0
        if index >= num_train:
            number, patients_of_part, first = index - num_train, TEST_PATIENTS, TRAIN_PATIENTS
        turn, member = divmod(number, patients_of_part)
        patient, kind = first + member, KINDS[(turn + member) % len(KINDS)]
        rng = np.random.default_rng([seed, index])
        stains = _staining(np.random.default_rng([seed, patient, 0]))
        stains = stains * rng.lognormal(0, [[0.1], [0.2], [0.1]])
        scale = 1.3 if kind == "macrophages" else 1.0
        sides = rng.integers(image_size_px[0], image_size_px[1] + 1, 2)
        height, width = (round(scale * side) for side in sides)
        label_maps = np.zeros(0)
        while not label_maps.any():  # every image of the course data shows a cell
            image, label_maps = draw_tissue(rng, height, width, kind, stains, annotate_border_cells)
        image = image.transpose(1, 2, 0)
        name = str(uuid.uuid5(uuid.NAMESPACE_OID, f"drawn tissue {seed} {index}"))
        if index >= num_train:
            file = {"file_name": f"{name}.tif", "id": number + 1, "height": height, "width": width}
            _write(folder / "test_release" / file["file_name"], image, photometric="rgb")
            tests.append(file)
            continue
        image_folder = folder / "train" / name
        image_folder.mkdir(parents=True)
        rgba = np.concatenate([image, np.full_like(image[..., :1], 255)], 2)
        _write(image_folder / "image.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
        for class_id, label_map in enumerate(label_maps.astype(np.float64), 1):
            if label_map.any():
                _write(image_folder / f"class{class_id}.tif", label_map, photometric="minisblack")
        patients.append((name, f"drawn-{patient}"))
    (folder / "test_image_name_to_ids.json").write_text(json.dumps(tests, indent=1))
    with open(folder / "patients.csv", "w", newline="") as file:
        csv.writer(file).writerows(patients)


def _staining(rng: Rng) -> Array:
    """One laboratory's stains, varied in shade and strength: float [3, 3], as ``STAINS``."""
    stains = STAINS + rng.normal(0, [[0.04, 0.03, 0.03], [0.06, 0.06, 0.08], [0.03, 0.04, 0.04]])
    return np.clip(stains, 0.03, None) * rng.lognormal(0, [[0.22], [0.45], [0.15]])
