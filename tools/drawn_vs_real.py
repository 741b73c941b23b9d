"""How near the drawn tissue comes to real images, in numbers.

    python -m tools.drawn_vs_real outputs/sample [--drawn drawn] [--out FILE]

Each row holds a quantity, its value on drawn and on real images, and their distance:

- ``ratio``: drawn / real, for sizes, densities, shares and spreads; 1 is perfect;
- ``sd``: (drawn - real) / standard deviation of the real images' own means, for mean amounts of
  stain; 0 is perfect.

A quantity of pixels is taken in each image first and then averaged over images, so that one large
image does not outweigh the others. Amounts of stain come from optical density, -log10(value / 255),
unmixed with the fixed vectors of haematoxylin and eosin (Ruifrok and Johnston 2001; the third
vector is at right angles to both). If nuclei absorb more blue than red, the channels are B, G, R
(haematoxylin absorbs red), and are put in order first.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import resolve_path
from cellseg_helpers.data.cache import CellDataset
from cellseg_helpers.data.drawn import STAINS
from cellseg_helpers.data.hw3 import open_dataset
from cellseg_helpers.data.labels import Instances, find_instances


def unmixing() -> np.ndarray:
    """float [3, 3]: optical density [..., 3] @ it = amounts of haematoxylin, eosin, rest."""
    vectors = STAINS[:2] / np.linalg.norm(STAINS[:2], axis=1, keepdims=True)
    rest = np.cross(*vectors)
    return np.linalg.inv(np.vstack([vectors, rest / np.linalg.norm(rest)]))


def optical_density(image: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] -> float [3, H, W]."""
    return -np.log10(np.maximum(image, 1) / 255.0)


def holds_bgr(dataset: CellDataset) -> bool:
    """Whether nuclei absorb more blue than red."""
    contrast = 0.0
    for cells in dataset:
        nuclei = cells.label_maps[:2].any(0)
        if nuclei.any():
            red, _, blue = optical_density(cells.image)[:, nuclei].mean(1)
            contrast += red - blue
    return contrast < 0


def touches_another(label_maps: np.ndarray, found: Instances) -> np.ndarray:
    """Whether another instance lies in the 8-neighbourhood of each instance: bool [N]."""
    touches = []
    rows = zip(found.boxes.astype(int), found.labels, found.ids, strict=True)
    for (x1, y1, x2, y2), label, instance_id in rows:
        window = label_maps[:, max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1]
        own = window[label - 1] == instance_id
        others = window > 0
        others[label - 1] &= ~own
        touches.append((others & ndimage.binary_dilation(own, np.ones((3, 3)))).any())
    return np.array(touches, bool)


def measure(dataset: CellDataset) -> tuple[dict[str, float], dict[str, float]]:
    """All quantities, and the standard deviation over images of those that have one."""
    bgr = holds_bgr(dataset)
    inverse = unmixing()
    cells_seen, densities, pixels = [], [], []
    for cells in dataset:
        image = cells.image[::-1] if bgr else cells.image
        found = find_instances(cells.label_maps)
        area_px = image.shape[1] * image.shape[2]
        columns = {"label": found.labels, "size": np.sqrt(found.area_px)}
        columns |= {"border": found.touches_border}
        columns |= {"touching": touches_another(cells.label_maps, found)}
        cells_seen.append(pd.DataFrame(columns))
        counts = np.bincount(found.labels, minlength=5)
        named = {name: counts[k] for k, name in enumerate(CLASS_NAMES, 1) if counts[k]}
        named["all classes"] = len(found.labels)
        densities.append({name: count / area_px * 1e4 for name, count in named.items()})
        amounts = np.tensordot(inverse.T, optical_density(image), 1)[:2]
        grounds = {name: cells.label_maps[k] > 0 for k, name in enumerate(CLASS_NAMES)}
        grounds["background"] = ~cells.label_maps.any(0)
        smooth = ndimage.gaussian_filter(image[1].astype(float), 1.0)
        row = {"fine detail": (image[1] - smooth).std()}
        for name, where in grounds.items():
            for stain, values in zip(("haematoxylin", "eosin"), amounts[:, where], strict=True):
                if values.size > 30:
                    row[f"{stain} in {name}"] = values.mean()
                    row[f"{stain} in {name}, spread within images"] = values.std()
        pixels.append(row)

    cells_seen = pd.concat(cells_seen)
    densities, pixels = pd.DataFrame(densities), pd.DataFrame(pixels)
    numbers, deviations = {}, {}
    for label, name in [*enumerate(CLASS_NAMES, 1), (0, "all classes")]:
        own = cells_seen[cells_seen.label == label] if label else cells_seen
        quarters = own["size"].quantile([0.25, 0.5, 0.75]).to_numpy()
        numbers[f"{name}: median sqrt(area), px"] = quarters[1]
        numbers[f"{name}: interquartile range of sqrt(area), px"] = quarters[2] - quarters[0]
        numbers[f"{name}: cells per 100 x 100 px where present"] = densities[name].mean()
        numbers[f"{name}: share touching another cell"] = own["touching"].mean()
        numbers[f"{name}: share with border contact"] = own["border"].mean()
    for name in pixels:
        numbers[name] = pixels[name].mean()
        if "spread" not in name and name != "fine detail":
            deviations[name] = pixels[name].std()
            numbers[f"{name}, spread between images"] = pixels[name].std()
    return numbers, deviations


def compare(drawn: CellDataset, real: CellDataset) -> pd.DataFrame:
    """One row a quantity: quantity, drawn, real, distance, measure (see the module)."""
    ours, _ = measure(drawn)
    theirs, deviations = measure(real)
    rows = []
    for name, value in theirs.items():
        if name in deviations:
            distance, kind = (ours[name] - value) / deviations[name], "sd"
        else:
            distance, kind = ours[name] / value if value else np.nan, "ratio"
        rows.append((name, ours[name], value, distance, kind))
    return pd.DataFrame(rows, columns=["quantity", "drawn", "real", "distance", "measure"]).round(3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("real", help="folder of real images in the HW3 layout")
    drawn = "folder of drawn images, or the word drawn"
    parser.add_argument("--drawn", default="drawn", help=drawn)
    parser.add_argument("--out", type=Path, default=Path("outputs/reference/drawn_vs_real.csv"))
    arguments = parser.parse_args()
    table = compare(open_dataset(arguments.drawn), open_dataset(arguments.real))
    out = resolve_path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    distance = table.distance
    near = np.where(table.measure == "ratio", (distance - 1).abs() <= 0.25, distance.abs() <= 0.5)
    print(table.assign(near=np.where(near, "yes", "")).to_string(index=False))
    share = f"{near.sum()} of {len(table)} are near (ratio within 25 %, mean within 0.5 sd)"
    print(f"{share}, written to {out}")


if __name__ == "__main__":
    main()
