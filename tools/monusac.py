"""MoNuSAC 2020 in the HW3 layout: from the published originals, or from the public Parquet copy.

    python -m tools.monusac SOURCE DESTINATION      originals (.svs, .tif beside .xml) or Parquet
    python -m tools.monusac download DESTINATION    the Parquet copy RationAI/MoNuSAC

The originals are published as two folders, training and test: convert each into a destination of
its own. From Parquet, the test split, masks included, goes to DESTINATION_test. What is written:

- ``train/<image id>/image.tif``: RGB uint8, LZW, without the course release's opaque alpha channel.
- ``train/<image id>/class<k>.tif`` for each class present: uint16 (the course release has float64),
  LZW, 0 = background, other values = instance ids, which count a class's regions from 1 in the
  source's order (a vanished one leaves a gap). An image without any cell gets an empty
  ``class1.tif``: it has an annotation, without cells.
- ``patients.csv``: image_id, patient, organ ("" in the originals, which do not state it). Left out
  where an image or its folder has no TCGA name, since the patient is then unknown.

The image id is the original's file name (``TCGA-5P-A9K0-01Z-00-DX1_1``). The Parquet copy holds no
names: there it is the patient and a running number (``TCGA-5P-A9K0_001``).

**Overlaps.** Where instances of one class overlap, the smaller one gets the pixel (of two equal
ones, the earlier): a small cell on a large one would otherwise disappear, while the large one only
loses a part. Overlaps between classes stay. The report names every instance that has no pixel.

**Outlines.** A pixel belongs to a region if its centre (at whole coordinates) lies inside the
outline by ``skimage.draw.polygon``, cut to the image; the hole that an outline leaves by crossing
itself is filled. One outline is one instance, in however many pieces.

MoNuSAC 2020: Verma et al., IEEE Transactions on Medical Imaging 2021, licence CC BY-NC-SA 4.0.
"""

import argparse
import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from tqdm import tqdm

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.config import replacing
from cellseg_helpers.data.cache import LARGEST_ID
from cellseg_helpers.data.faults import DataError, as_data_error
from cellseg_helpers.data.splits import patient_of

HUB_NAME = "RationAI/MoNuSAC"
# From the copy's public commit list; that this commit holds the Parquet files has not been tried.
# If it does not, `download` says so, and `--revision` takes another.
HUB_REVISION = "72affa16ec0dcbb53aafbd2ad3d75114e3e8c6c8"
HUB_COLUMNS = ("patient", "image", "instances", "categories", "tissue")
CLASSES = ("ambiguous", *CLASS_NAMES)  # by class id; ambiguous regions are left out
PROGRESS = {"desc": "converting", "unit": "image", "leave": False}
AGAIN = "get this file again"


class Region(NamedTuple):
    """One annotated cell: its name in the source, its pixels, and why it has none."""

    class_id: int  # 0: ambiguous
    name: str
    pixels: np.ndarray = np.empty(0, int)  # int [n], row * width + column
    problem: str = ""
    clipped: bool = False  # reaches beyond the image


class AnnotatedImage(NamedTuple):
    """One image and its cells, before they are drawn into label maps."""

    image_id: str
    patient: str | None
    organ: str
    image: np.ndarray  # uint8 [H, W, 3]
    regions: list[Region]


class ConversionReport(NamedTuple):
    """What was written, and what was not; ``str`` makes the table that the command line prints."""

    destination: Path
    images: int
    patients: int
    instances: dict[str, int]  # by class, in the label maps
    ambiguous: int  # regions of the class "Ambiguous", left out
    overlapping: int  # instances that lost pixels, but not all, to smaller ones of their class
    clipped: int  # instances that reach beyond the image and were cut
    vanished: list[str]  # a sentence for each region without a pixel

    def __str__(self) -> str:
        counts = {"images": self.images, "patients": self.patients, **self.instances}
        rows = [(name, count, "") for name, count in counts.items()]
        rows += [
            ("all instances", sum(self.instances.values()), ""),
            ("ambiguous", self.ambiguous, "left out"),
            ("overlapping", self.overlapping, "lost pixels to smaller instances of their class"),
            ("clipped", self.clipped, "reached beyond the image"),
            ("vanished", len(self.vanished), "have no pixel left" if self.vanished else ""),
        ]
        table = [f"  {name:<14}{count:>7}  {remark}".rstrip() for name, count, remark in rows]
        return "\n".join([str(self.destination), *table, *(f"    {why}" for why in self.vanished)])


def convert_originals(source: str | Path, destination: str | Path) -> ConversionReport:
    """Write MoNuSAC originals in the HW3 layout (module docstring) into a new or empty folder.

    The source holds, at any depth, images ``<name>.svs`` or ``<name>.tif`` and beside each
    ``<name>.xml``. Of both kinds of image, the ``.svs`` is read, and of its pages the first: the
    others are a thumbnail and pictures of the glass slide.

    Raises:
        DataError: a file is missing or damaged, a class is unknown, or the destination is not
            empty. Nothing is left behind.
    """
    images = _read_originals(_pair_originals(Path(source)))
    (report,) = _write({Path(destination).absolute(): images})
    return report


def convert_parquet(source: str | Path, destination: str | Path) -> dict[str, ConversionReport]:
    """Write the Parquet copy of MoNuSAC in the HW3 layout (module docstring) into new or empty
    folders: the split ``train`` into ``destination``, ``test`` into ``<destination>_test``.

    The source is a Parquet file (taken as ``train``), or a folder of ``train-*.parquet`` and
    ``test-*.parquet``. Classes are known by their names in the file, never by their numbers. Masks
    are decoded one at a time.

    Raises:
        DataError: the file is unreadable, has other columns or unknown classes, a row is damaged,
            or a destination is not empty. Nothing is left behind.
    """
    splits, train = _open_parquet(Path(source)), Path(destination).absolute()
    targets = {name: train.with_name(f"{train.name}_{name}") for name in splits} | {"train": train}
    images = {targets[name]: _read_rows(*split) for name, split in splits.items()}
    return dict(zip(splits, _write(images), strict=True))


def download(destination: str | Path, revision: str = HUB_REVISION) -> dict[str, ConversionReport]:
    """Download the public copy on Hugging Face (a commit or branch of it) and convert it. About 300
    MB come into that library's cache: by its own description 209 training and 101 test images.

    Raises:
        DataError: there is no network, no such revision, or what ``convert_parquet`` raises.
    """
    _refuse_full(Path(destination).absolute())
    from huggingface_hub import HfApi, snapshot_download

    copy = f"the dataset {HUB_NAME}, revision {revision},"
    remedy = (
        "with a network, try again, or name another revision (--revision main is the newest); "
        "without one, get the originals of the MoNuSAC 2020 challenge (grand-challenge.org, "
        "'MoNuSAC 2020', page 'Data'; licence CC BY-NC-SA 4.0) on another machine, unpack them "
        "here, and convert each of their two folders: "
        f"python -m tools.monusac FOLDER {destination}"
    )
    with as_data_error(f"{copy} could not be downloaded from Hugging Face", remedy):
        HfApi().dataset_info(HUB_NAME, revision=revision, timeout=10)  # the download would retry
        options = {"repo_type": "dataset", "revision": revision}
        wanted = ["*.parquet", "README.md"]
        folder = Path(snapshot_download(HUB_NAME, allow_patterns=wanted, **options))
    if not any(folder.rglob("*.parquet")):
        none = f"revision {revision} of {HUB_NAME} holds no Parquet files"
        raise DataError(f"{none}; take another one, such as --revision main")
    return convert_parquet(folder, destination)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m tools.monusac", description=__doc__, **as_written)
    source = "folder of originals (.svs or .tif beside .xml), Parquet file or folder, or 'download'"
    parser.add_argument("source", help=source)
    parser.add_argument("destination", help="a new or empty folder")
    revision = f"for 'download': commit or branch of {HUB_NAME} (default: %(default)s)"
    parser.add_argument("--revision", default=HUB_REVISION, help=revision)
    given = parser.parse_args(arguments)
    source = Path(given.source)
    try:
        if given.source == "download":
            reports = download(given.destination, given.revision).values()
        elif source.suffix == ".parquet" or any(source.rglob("*.parquet")):
            reports = convert_parquet(source, given.destination).values()
        else:
            reports = [convert_originals(source, given.destination)]
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*reports, sep="\n")
    return 0


def _class_id(name: str, where: object) -> int:
    """The class id, 1..K, of a class name, in any case; 0 for ambiguous."""
    known = name.strip().lower()
    if known not in CLASSES:
        listed = f"{', '.join(CLASS_NAMES)}, {CLASSES[0]}"
        raise DataError(f"{where}: unknown class {name!r}; one of {listed}")
    return CLASSES.index(known)


# Originals


def _pair_originals(source: Path) -> list[tuple[Path, Path]]:
    """Every image with its annotation, without hidden files (``._x``, ``__MACOSX``)."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    of_kind: dict[str, dict[Path, Path]] = {".tif": {}, ".svs": {}, ".xml": {}}
    for path in sorted(source.rglob("*")):
        kind, parts = path.suffix.lower(), path.relative_to(source).parts
        if kind in of_kind and not any(part.startswith((".", "__MACOSX")) for part in parts):
            of_kind[kind][path.with_suffix("")] = path
    images, annotations = of_kind[".tif"] | of_kind[".svs"], of_kind[".xml"]
    if not images and not annotations:
        nothing = "no MoNuSAC originals (.svs or .tif images beside .xml) and no .parquet"
        raise DataError(f"{source}: {nothing} in this folder")
    no_xml, no_image = images.keys() - annotations.keys(), annotations.keys() - images.keys()
    alone = [f"{images[name]} has no .xml beside it" for name in no_xml]
    alone += [f"{annotations[name]} has no image beside it" for name in no_image]
    if alone:
        raise DataError("; ".join(sorted(alone)))
    by_name: dict[str, Path] = {}
    for path in sorted(images):
        first = by_name.setdefault(path.name, path)
        if first != path:
            same = f"{images[path]} and {images[first]} have the same name"
            raise DataError(f"{same}; image ids must differ")
    return [(images[path], annotations[path]) for path in sorted(images)]


def _read_originals(pairs: list[tuple[Path, Path]]) -> Iterator[AnnotatedImage]:
    for file, annotation_file in tqdm(pairs, **PROGRESS):
        with as_data_error(f"{file}: the image cannot be read", AGAIN):
            image = tifffile.imread(file, key=0)
        if image.ndim != 3 or image.shape[2] not in (3, 4) or image.dtype != np.uint8:
            found = f"{image.dtype} of shape {image.shape}"
            raise DataError(f"{file}: expected a uint8 RGB image, found {found}")
        regions = _read_annotation(annotation_file, image.shape[:2])
        patient = patient_of(file.stem) or patient_of(file.parent.name)
        yield AnnotatedImage(file.stem, patient, "", image[..., :3], regions)


def _read_annotation(path: Path, shape: tuple[int, int]) -> list[Region]:
    with as_data_error(f"{path}: the annotation cannot be read", AGAIN):
        layers = ElementTree.parse(path).getroot().findall("Annotation")
    if not layers:
        missing = "no element Annotations/Annotation, so this is no MoNuSAC annotation"
        raise DataError(f"{path}: {missing}")
    regions = []
    for layer in layers:
        if outlines := layer.findall("Regions/Region"):
            attribute = layer.find("Attributes/Attribute")
            class_id = _class_id("" if attribute is None else attribute.get("Name", ""), path)
            regions += [_read_region(outline, class_id, shape, path) for outline in outlines]
    return regions


def _read_region(
    outline: ElementTree.Element, class_id: int, shape: tuple[int, int], path: Path
) -> Region:
    name = f"{path.name}, region {outline.get('Id', '?')} ({CLASSES[class_id]})"
    if class_id == 0:
        return Region(0, name)
    with as_data_error(f"{path.parent / name}: a vertex without a numeric X and Y", AGAIN):
        points = [vertex.attrib for vertex in outline.findall("Vertices/Vertex")]
        vertices = np.array([(float(point["Y"]), float(point["X"])) for point in points])
    if not np.isfinite(vertices).all():
        raise DataError(f"{path.parent / name}: a vertex that is not a finite number")
    if len(vertices) < 3:
        few = f"has {len(vertices)} vertices, an outline needs 3"
        return Region(class_id, name, problem=few)
    outside = (vertices < 0) | (vertices > np.array(shape) - 1)
    pixels = fill_outline(vertices, shape)
    no_pixel = "encloses no pixel centre of the image: too thin, or outside it"
    return Region(class_id, name, pixels, "" if len(pixels) else no_pixel, bool(outside.any()))


def fill_outline(vertices: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels (int64 [m], row * width + column, sorted) inside an outline, by the rule of the
    module docstring.

    Args:
        vertices: float [n, 2], row and column, px; pixel centres are at whole numbers.
        shape: height and width of the image; what lies outside is cut off.
    """
    from scipy.ndimage import binary_fill_holes
    from skimage.draw import polygon

    rows, columns = polygon(vertices[:, 0], vertices[:, 1], shape)
    if not len(rows):
        return np.empty(0, np.int64)
    top, left = rows.min(), columns.min()
    mask = np.zeros((rows.max() - top + 1, columns.max() - left + 1), bool)
    mask[rows - top, columns - left] = True
    rows, columns = np.nonzero(binary_fill_holes(mask))
    return (rows + top) * shape[1] + columns + left


# Parquet


def _open_parquet(source: Path) -> dict[str, tuple[Any, str]]:
    """Split name -> its rows (a stream, pictures still encoded), and the place for messages."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    from datasets import Image, List, load_dataset

    with as_data_error(f"{source}: cannot be read as Parquet", AGAIN):
        if source.is_file():
            splits = load_dataset("parquet", data_files={"train": str(source)}, streaming=True)
        else:
            splits = load_dataset(str(source), streaming=True)
    encoded, opened = Image(decode=False), {}
    for name, rows in splits.items():
        where = f"{source}, split {name}"
        _check_features(rows.features or {}, where)
        rows = rows.cast_column("image", encoded).cast_column("instances", List(encoded))
        opened[name] = rows, where
    return opened


def _check_features(features: dict[str, Any], where: str) -> None:
    if missing := ", ".join(column for column in HUB_COLUMNS if column not in features):
        raise DataError(f"{where}: no column {missing}; expected {', '.join(HUB_COLUMNS)}")
    categories = getattr(features["categories"], "feature", None)
    for column, feature in (("categories", categories), ("tissue", features["tissue"])):
        if not hasattr(feature, "names"):
            no_names = "has no class names, so its numbers cannot be understood"
            raise DataError(f"{where}: column {column} {no_names}")
    for name in categories.names:
        _class_id(name, f"{where}, column categories")


def _read_rows(rows: Any, where: str) -> Iterator[AnnotatedImage]:
    names = (rows.features["categories"].feature.names, rows.features["tissue"].names)
    numbers = Counter()
    with as_data_error(f"{where}: cannot be read to its end", AGAIN):
        for index, row in enumerate(tqdm(rows, **PROGRESS), 1):
            numbers[row["patient"]] += 1
            yield _read_row(row, *names, numbers[row["patient"]], f"{where}, row {index}")


def _read_row(
    row: dict[str, Any], class_names: list[str], organs: list[str], number: int, where: str
) -> AnnotatedImage:
    patient, instances, categories = row["patient"], row["instances"], row["categories"]
    if not re.fullmatch(r"[\w-][\w.-]*", patient or ""):
        raise DataError(f"{where}: the patient {patient!r} cannot be part of a file name")
    if instances is None or categories is None or len(instances) != len(categories):
        raise DataError(f"{where}: instances and categories must be two lists of the same length")
    image = _decode(row["image"], "RGB", f"{where}, image")
    regions = []
    for index, (encoded, category) in enumerate(zip(instances, categories, strict=True), 1):
        class_id = _class_id(_name_of(category, class_names, where), where)
        name = f"{where}, instance {index} ({CLASSES[class_id]})"
        if class_id == 0:
            regions.append(Region(0, name))
            continue
        mask = _decode(encoded, "1", name)
        if mask.shape != image.shape[:2]:
            size = f"mask of shape {mask.shape} on an image of shape {image.shape[:2]}"
            raise DataError(f"{name}: {size}")
        problem = "" if mask.any() else "has an empty mask"
        regions.append(Region(class_id, name, np.flatnonzero(mask), problem))
    organ = _name_of(row["tissue"], organs, where).lower()
    image_id = f"{patient}_{number:03d}"
    return AnnotatedImage(image_id, patient_of(patient) or patient, organ, image, regions)


def _name_of(number: int | None, names: list[str], where: str) -> str:
    if number is None or not 0 <= number < len(names):
        raise DataError(f"{where}: label {number} has no name; names are {', '.join(names)}")
    return names[number]


def _decode(encoded: dict[str, Any] | None, mode: str, where: str) -> np.ndarray:
    from PIL import Image

    with as_data_error(f"{where}: cannot be decoded", AGAIN):
        return np.asarray(Image.open(io.BytesIO(encoded["bytes"])).convert(mode))


# Writing


def draw_instances(
    pixels: list[np.ndarray], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Instances of one class, given by their pixels (int [n], row * width + column), as a label map
    (uint16 [H, W], ids from 1 in their order); the number of pixels of each in it (int64 [N]).
    Where they overlap, the smaller is on top.
    """
    label_map = np.zeros(shape, np.uint16)
    for index in sorted(range(len(pixels)), key=lambda i: (-len(pixels[i]), -i)):
        label_map.ravel()[pixels[index]] = index + 1
    return label_map, np.bincount(label_map.ravel(), minlength=len(pixels) + 1)[1:]


def _write(images_of: dict[Path, Iterable[AnnotatedImage]]) -> list[ConversionReport]:
    """The images of each destination; all of them, or nothing."""
    for destination in images_of:
        _refuse_full(destination)
    reports = []
    with ExitStack() as stack:
        for destination, images in images_of.items():
            folder = stack.enter_context(replacing(destination, folder=True))
            reports.append(_write_layout(images, folder, destination))
    return reports


def _refuse_full(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        remedy = "remove it, or name another destination"
        raise DataError(f"{destination} exists and is not an empty folder; {remedy}")


def _write_layout(
    images: Iterable[AnnotatedImage], folder: Path, destination: Path
) -> ConversionReport:
    """Write into a folder that will become ``destination``."""
    instances, counts, vanished, rows = dict.fromkeys(CLASS_NAMES, 0), Counter(), [], []
    for item in images:
        image_folder, shape = folder / "train" / item.image_id, item.image.shape[:2]
        image_folder.mkdir(parents=True)
        _write_tiff(image_folder / "image.tif", item.image)
        for class_id, class_name in enumerate(CLASS_NAMES, 1):
            regions = [region for region in item.regions if region.class_id == class_id]
            if len(regions) > LARGEST_ID:
                many = f"{len(regions)} regions of class {class_name}, at most {LARGEST_ID} fit"
                raise DataError(f"{item.image_id}: {many}")
            label_map, areas_px = draw_instances([region.pixels for region in regions], shape)
            if areas_px.any():
                _write_tiff(image_folder / f"class{class_id}.tif", label_map)
            instances[class_name] += int((areas_px > 0).sum())
            for region, area_px in zip(regions, areas_px, strict=True):
                counts["overlapping"] += 0 < area_px < len(region.pixels)
                counts["clipped"] += region.clipped
                if area_px == 0:
                    covered = "is covered by smaller or equal ones of its class"
                    vanished.append(f"{region.name} {region.problem or covered}")
        if not any(image_folder.glob("class*.tif")):
            _write_tiff(image_folder / "class1.tif", np.zeros(shape, np.uint16))
        counts["ambiguous"] += sum(region.class_id == 0 for region in item.regions)
        rows.append((item.image_id, item.patient, item.organ))
    if not rows:
        raise DataError(f"no images for {destination}")
    patients = {patient for _, patient, _ in rows}
    if None not in patients:
        with open(folder / "patients.csv", "w", newline="") as file:
            csv.writer(file).writerows([("image_id", "patient", "organ"), *rows])
    numbers = len(rows), len(patients - {None}), instances
    left_out = (counts[name] for name in ("ambiguous", "overlapping", "clipped"))
    return ConversionReport(destination, *numbers, *left_out, vanished)


def _write_tiff(path: Path, array: np.ndarray) -> None:
    is_rgb = array.ndim == 3
    photometric = "rgb" if is_rgb else "minisblack"
    options = {"compression": "lzw", "predictor": is_rgb, "metadata": None}
    tifffile.imwrite(path, array, photometric=photometric, **options)


if __name__ == "__main__":
    sys.exit(main())
