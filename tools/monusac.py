"""MoNuSAC 2020 in the HW3 layout: from the published originals, or from the public Parquet copy.

    python -m tools.monusac SOURCE DESTINATION      originals (.svs, .tif beside .xml) or Parquet
    python -m tools.monusac download DESTINATION    the Parquet copy RationAI/MoNuSAC

What is written, whatever the source:

- ``train/<image id>/image.tif``: RGB uint8, LZW. The course release has an alpha channel that is
  opaque everywhere; left out.
- ``train/<image id>/class<k>.tif`` for each class present: uint16, LZW, 0 = background, other
  values = instance ids, which count a class's regions from 1 in the source's order (a vanished one
  leaves a gap). The course release has float64, four times the size for the same numbers. An image
  without any cell gets an empty ``class1.tif``: it has an annotation, without cells.
- ``patients.csv``: image_id, patient, organ ("" in the originals, which do not state it). Left out
  where an image or its folder has no TCGA name, since the patient is then unknown.

The image id is the original's file name (``TCGA-5P-A9K0-01Z-00-DX1_1``). The Parquet copy holds no
names: there it is the patient and a running number (``TCGA-5P-A9K0_001``).

**Overlaps.** A label map holds one id a pixel. Where instances of one class overlap, the smaller
one gets the pixel (of two equal ones, the earlier): a small cell on a large one would otherwise
disappear, while the large one only loses a part. Classes have a label map each, so that overlaps
between classes stay. The report names every instance that has no pixel.

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
from cellseg_helpers.config import one_line, replacing
from cellseg_helpers.data.cache import DataError
from cellseg_helpers.data.splits import patient_of

HUB_NAME = "RationAI/MoNuSAC"
# From the copy's public commit list; that this commit holds the Parquet files has not been tried.
# If it does not, `download` says so, and `--revision` takes another.
HUB_REVISION = "72affa16ec0dcbb53aafbd2ad3d75114e3e8c6c8"
HUB_COLUMNS = ("patient", "image", "instances", "categories", "tissue")
AMBIGUOUS = "ambiguous"
MAX_INSTANCES = np.iinfo(np.uint16).max
PROGRESS = {"desc": "converting", "unit": "image", "leave": False}


class Region(NamedTuple):
    """One annotated cell: its name in the source, its pixels, and why it has none."""

    class_id: int  # 0: ambiguous
    name: str
    pixels: np.ndarray  # int [n], row * width + column
    clipped: bool = False  # reaches beyond the image
    problem: str = ""


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
        rows = [("images", self.images, ""), ("patients", self.patients, "")]
        rows += [(name, count, "") for name, count in self.instances.items()]
        rows += [
            ("all instances", sum(self.instances.values()), ""),
            ("ambiguous", self.ambiguous, "left out"),
            ("overlapping", self.overlapping, "lost pixels to smaller instances of their class"),
            ("clipped", self.clipped, "reached beyond the image"),
            ("vanished", len(self.vanished), "have no pixel left" if self.vanished else ""),
        ]
        table = [f"  {name:<14}{count:>7}  {remark}".rstrip() for name, count, remark in rows]
        return "\n".join(
            [str(self.destination), *table, *(f"    {each}" for each in self.vanished)]
        )


def convert_originals(source: str | Path, destination: str | Path) -> ConversionReport:
    """Write MoNuSAC originals in the HW3 layout (module docstring).

    Args:
        source: folder with, at any depth, images ``<name>.svs`` or ``<name>.tif`` and beside each
            ``<name>.xml``. Of both kinds of image, the ``.svs`` is read, and of its pages the
            first: the others are a thumbnail and pictures of the glass slide.
        destination: a new or empty folder.

    Raises:
        DataError: a file is missing or damaged, a class is unknown, or the destination is not
            empty. Nothing is left behind.
    """
    pairs, destination = _pair_originals(Path(source)), Path(destination).absolute()
    _refuse_full(destination)
    with replacing(destination, folder=True) as folder:
        images = (_read_original(*pair) for pair in tqdm(pairs, **PROGRESS))
        return _write_layout(images, folder, destination)


def convert_parquet(source: str | Path, destination: str | Path) -> dict[str, ConversionReport]:
    """Write the Parquet copy of MoNuSAC in the HW3 layout (module docstring).

    The split ``train`` goes to ``destination``, any other to a folder of the same layout beside it:
    ``test``, with public annotations, to ``<destination>_test``. Classes are known by their names
    in the file, never by their numbers. The masks of an image are decoded one at a time.

    Args:
        source: a Parquet file (taken as ``train``), or a folder of ``train-*.parquet`` and
            ``test-*.parquet``.
        destination: a new or empty folder.

    Returns:
        A report for each split.

    Raises:
        DataError: the file is unreadable, has other columns or unknown classes, a row is damaged,
            or a destination is not empty. Nothing is left behind.
    """
    splits, train = _open_parquet(Path(source)), Path(destination).absolute()
    targets = {name: train.with_name(f"{train.name}_{name}") for name in splits} | {"train": train}
    for target in targets.values():
        _refuse_full(target)
    reports = {}
    with ExitStack() as stack:
        for name, rows in splits.items():
            target = targets[name]
            folder = stack.enter_context(replacing(target, folder=True))
            images = _read_rows(rows, f"{source}, split {name}")
            reports[name] = _write_layout(images, folder, target)
    return reports


def download(destination: str | Path, revision: str = HUB_REVISION) -> dict[str, ConversionReport]:
    """Download the public copy on Hugging Face and convert it.

    About 300 MB come into that library's cache: 209 training and 101 test images, by the copy's own
    description.

    Args:
        destination: as for `convert_parquet`.
        revision: full commit hash, or a branch.

    Raises:
        DataError: there is no network, no such revision, or what `convert_parquet` raises.
    """
    _refuse_full(Path(destination).absolute())
    from huggingface_hub import HfApi, snapshot_download

    options = {"repo_type": "dataset", "revision": revision}
    try:
        HfApi().dataset_info(HUB_NAME, revision=revision, timeout=10)  # the download would retry
        wanted = ["*.parquet", "README.md"]
        folder = Path(snapshot_download(HUB_NAME, allow_patterns=wanted, **options))
    except Exception as error:  # the network's errors are of many libraries
        raise DataError(
            f"the dataset {HUB_NAME}, revision {revision}, could not be downloaded from Hugging "
            f"Face ({one_line(error)}); with a network, try again, or name another revision "
            "(--revision main is the newest); without one, get the originals of the MoNuSAC 2020 "
            "challenge (grand-challenge.org, 'MoNuSAC 2020', page 'Data'; licence CC BY-NC-SA 4.0) "
            "on another machine, unpack them here, and convert each of their two folders: "
            f"python -m tools.monusac FOLDER {destination}"
        ) from error
    if not any(folder.rglob("*.parquet")):
        raise DataError(
            f"revision {revision} of {HUB_NAME} holds no Parquet files; take another one, such as "
            "--revision main"
        )
    return convert_parquet(folder, destination)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.monusac",
        description="Write MoNuSAC 2020 in the HW3 layout: train/<image id>/image.tif and "
        "class<k>.tif, patients.csv.",
        epilog="The originals are published as two folders, training and test: convert each into a "
        "destination of its own. From Parquet, the training split goes to DESTINATION and the test "
        "split, masks included, to DESTINATION_test. Licence of the data: CC BY-NC-SA 4.0.",
    )
    source = "folder of originals (.svs or .tif beside .xml), Parquet file or folder, or 'download'"
    revision = f"for 'download': commit or branch of {HUB_NAME} (default: %(default)s)"
    parser.add_argument("source", help=source)
    parser.add_argument("destination", help="a new or empty folder")
    parser.add_argument("--revision", default=HUB_REVISION, help=revision)
    options = parser.parse_args(arguments)
    source = Path(options.source)
    try:
        if options.source == "download":
            reports = download(options.destination, options.revision).values()
        elif source.suffix == ".parquet" or any(source.rglob("*.parquet")):
            reports = convert_parquet(source, options.destination).values()
        else:
            reports = [convert_originals(source, options.destination)]
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*reports, sep="\n")
    return 0


# Originals


def _pair_originals(source: Path) -> list[tuple[Path, Path]]:
    """Every image with its annotation, without hidden files (``._x``, ``__MACOSX``)."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    of_kind: dict[str, dict[Path, Path]] = {".tif": {}, ".svs": {}, ".xml": {}}
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        if path.suffix.lower() in of_kind and not any(
            part.startswith((".", "__MACOSX")) for part in parts
        ):
            of_kind[path.suffix.lower()][path.with_suffix("")] = path
    images, annotations = of_kind[".tif"] | of_kind[".svs"], of_kind[".xml"]
    if not images and not annotations:
        raise DataError(
            f"{source}: no MoNuSAC originals (.svs or .tif images beside .xml) and no .parquet in "
            "this folder"
        )
    alone = [f"{images[path]} has no .xml beside it" for path in images.keys() - annotations.keys()]
    alone += [
        f"{annotations[path]} has no image beside it" for path in annotations.keys() - images.keys()
    ]
    if alone:
        raise DataError("; ".join(sorted(alone)))
    by_name: dict[str, Path] = {}
    for path in sorted(images):
        first = by_name.setdefault(path.name, path)
        if first != path:
            raise DataError(
                f"{images[path]} and {images[first]} have the same name; image ids must differ"
            )
    return [(images[path], annotations[path]) for path in sorted(images)]


def _read_original(image_file: Path, annotation_file: Path) -> AnnotatedImage:
    image = _read_tiff(image_file)
    regions = _read_annotation(annotation_file, image.shape[:2])
    image_id = image_file.stem
    patient = patient_of(image_id) or patient_of(image_file.parent.name)
    return AnnotatedImage(image_id, patient, "", image, regions)


def _read_tiff(path: Path) -> np.ndarray:
    try:
        with tifffile.TiffFile(path) as tiff:
            image = tiff.pages[0].asarray()
    except Exception as error:  # tifffile and its codecs raise many kinds for a damaged file
        raise DataError(
            f"{path}: the image cannot be read ({one_line(error)}); get this file again"
        ) from error
    if image.ndim != 3 or image.shape[2] not in (3, 4) or image.dtype != np.uint8:
        raise DataError(
            f"{path}: expected a uint8 RGB image, found {image.dtype} of shape {image.shape}"
        )
    return image[..., :3]


def _read_annotation(path: Path, shape: tuple[int, int]) -> list[Region]:
    try:
        layers = ElementTree.parse(path).getroot().findall("Annotation")
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(
            f"{path}: the annotation cannot be read ({one_line(error)}); get this file again"
        ) from error
    if not layers:
        raise DataError(
            f"{path}: no element Annotations/Annotation, so this is no MoNuSAC annotation"
        )
    regions = []
    for layer in layers:
        outlines = layer.findall("Regions/Region")
        if outlines:
            attribute = layer.find("Attributes/Attribute")
            class_id = _class_id("" if attribute is None else attribute.get("Name", ""), path)
            regions += [_read_region(outline, class_id, shape, path) for outline in outlines]
    return regions


def _class_id(name: str, where: object) -> int:
    """1..K, or 0 for ambiguous."""
    known = name.strip().lower()
    if known not in (AMBIGUOUS, *CLASS_NAMES):
        raise DataError(
            f"{where}: unknown class {name!r}; one of {', '.join(CLASS_NAMES)}, {AMBIGUOUS}"
        )
    return (AMBIGUOUS, *CLASS_NAMES).index(known)


def _read_region(
    outline: ElementTree.Element, class_id: int, shape: tuple[int, int], path: Path
) -> Region:
    name = f"{path.name}, region {outline.get('Id', '?')}"
    if class_id == 0:
        return Region(0, name, np.empty(0, int))
    name += f" ({CLASS_NAMES[class_id - 1]})"
    try:
        points = [vertex.attrib for vertex in outline.findall("Vertices/Vertex")]
        vertices = np.array([(float(point["Y"]), float(point["X"])) for point in points])
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path.parent / name}: a vertex without a numeric X and Y ({error})"
        ) from error
    if not np.isfinite(vertices).all():
        raise DataError(f"{path.parent / name}: a vertex that is not a finite number")
    if len(vertices) < 3:
        problem = f"has {len(vertices)} vertices, an outline needs 3"
        return Region(class_id, name, np.empty(0, int), problem=problem)
    outside = (vertices < 0) | (vertices > np.array(shape) - 1)
    pixels = fill_outline(vertices, shape)
    no_pixel = "encloses no pixel centre of the image: too thin, or outside it"
    return Region(class_id, name, pixels, bool(outside.any()), "" if len(pixels) else no_pixel)


def fill_outline(vertices: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels inside an outline, by the rule of the module docstring.

    Args:
        vertices: float [n, 2], row and column, px; pixel centres are at whole numbers.
        shape: height and width of the image; what lies outside is cut off.

    Returns:
        int64 [m], row * width + column, sorted.
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


def _open_parquet(source: Path) -> dict[str, Any]:
    """Split name -> rows, read as a stream, images and masks still encoded."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    from datasets import Image, List, load_dataset

    try:
        if source.is_file():
            splits = load_dataset("parquet", data_files={"train": str(source)}, streaming=True)
        else:
            splits = load_dataset(str(source), streaming=True)
    except Exception as error:  # of many libraries below
        raise DataError(f"{source}: cannot be read as Parquet ({one_line(error)})") from error
    for name, rows in splits.items():
        _check_features(rows.features or {}, f"{source}, split {name}")
    encoded = Image(decode=False)
    return {
        name: rows.cast_column("image", encoded).cast_column("instances", List(encoded))
        for name, rows in splits.items()
    }


def _check_features(features: dict[str, Any], where: str) -> None:
    missing = [column for column in HUB_COLUMNS if column not in features]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(missing)}; expected {', '.join(HUB_COLUMNS)}"
        )
    categories = getattr(features["categories"], "feature", None)
    for column, feature in (("categories", categories), ("tissue", features["tissue"])):
        if not hasattr(feature, "names"):
            raise DataError(
                f"{where}: column {column} has no class names, so its numbers cannot be understood"
            )
    for name in categories.names:
        _class_id(name, f"{where}, column categories")


def _read_rows(rows: Any, where: str) -> Iterator[AnnotatedImage]:
    names = (rows.features["categories"].feature.names, rows.features["tissue"].names)
    numbers = Counter()
    try:
        for index, row in enumerate(tqdm(rows, **PROGRESS), 1):
            numbers[row["patient"]] += 1
            yield _read_row(row, *names, numbers[row["patient"]], f"{where}, row {index}")
    except DataError:
        raise
    except Exception as error:  # of many libraries below
        raise DataError(
            f"{where}: cannot be read to its end ({one_line(error)}); get this file again"
        ) from error


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
        name, pixels = f"{where}, instance {index}", np.empty(0, int)
        if class_id:
            name += f" ({CLASS_NAMES[class_id - 1]})"
            mask = _decode(encoded, "1", name)
            if mask.shape != image.shape[:2]:
                raise DataError(
                    f"{name}: mask of shape {mask.shape} on an image of shape {image.shape[:2]}"
                )
            pixels = np.flatnonzero(mask)
        problem = "" if len(pixels) else "has an empty mask"
        regions.append(Region(class_id, name, pixels, problem=problem))
    organ = _name_of(row["tissue"], organs, where).lower()
    image_id = f"{patient}_{number:03d}"
    return AnnotatedImage(image_id, patient_of(patient) or patient, organ, image, regions)


def _name_of(number: int | None, names: list[str], where: str) -> str:
    if number is None or not 0 <= number < len(names):
        raise DataError(f"{where}: label {number} has no name; names are {', '.join(names)}")
    return names[number]


def _decode(encoded: dict[str, Any] | None, mode: str, where: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded["bytes"])) as picture:
            return np.asarray(picture.convert(mode))
    except Exception as error:  # Pillow raises many kinds for a damaged picture
        raise DataError(f"{where}: cannot be decoded ({one_line(error)})") from error


# Writing


def draw_instances(
    pixels: list[np.ndarray], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Instances of one class as a label map; where they overlap, the smaller is on top (module
    docstring).

    Args:
        pixels: for each of N instances its pixels, int [n], row * width + column.
        shape: height and width.

    Returns:
        label_map: uint16 [H, W], instance i has the id i + 1.
        areas_px: int64 [N], the pixels of each in the label map.
    """
    label_map = np.zeros(shape, np.uint16)
    for index in sorted(range(len(pixels)), key=lambda i: (-len(pixels[i]), -i)):
        label_map.ravel()[pixels[index]] = index + 1
    return label_map, np.bincount(label_map.ravel(), minlength=len(pixels) + 1)[1:]


def _write_layout(
    images: Iterable[AnnotatedImage], folder: Path, destination: Path
) -> ConversionReport:
    instances, counts, vanished, rows = Counter(), Counter(), [], []
    for item in images:
        image_folder, shape = folder / "train" / item.image_id, item.image.shape[:2]
        image_folder.mkdir(parents=True)
        _write_tiff(image_folder / "image.tif", item.image)
        for class_id, class_name in enumerate(CLASS_NAMES, 1):
            regions = [region for region in item.regions if region.class_id == class_id]
            if len(regions) > MAX_INSTANCES:
                raise DataError(
                    f"{item.image_id}: {len(regions)} regions of class {class_name}, at most "
                    f"{MAX_INSTANCES} fit"
                )
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
    return ConversionReport(
        destination,
        images=len(rows),
        patients=len(patients - {None}),
        instances={name: instances[name] for name in CLASS_NAMES},
        ambiguous=counts["ambiguous"],
        overlapping=counts["overlapping"],
        clipped=counts["clipped"],
        vanished=vanished,
    )


def _write_tiff(path: Path, array: np.ndarray) -> None:
    is_rgb = array.ndim == 3
    photometric = "rgb" if is_rgb else "minisblack"
    options = {"compression": "lzw", "predictor": is_rgb, "metadata": None}
    tifffile.imwrite(path, array, photometric=photometric, **options)


def _refuse_full(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(
            f"{destination} exists and is not an empty folder; remove it, or name another "
            "destination"
        )


if __name__ == "__main__":
    sys.exit(main())
