"""MoNuSAC 2020 in the HW3 layout: from the published originals, or from the public Parquet copy.

    python -m tools.monusac SOURCE DESTINATION      originals (.svs or .tif beside
    .xml), or Parquet python -m tools.monusac download DESTINATION    the Parquet
    copy RationAI/MoNuSAC, one pinned revision

What is written, whatever the source:

- ``train/<image id>/image.tif``: RGB uint8, LZW. The course release has an alpha channel that is
  opaque everywhere; left out.
- ``train/<image id>/class<k>.tif`` for each class present: uint16, LZW, 0 = background, other
  values = instance ids, which count a class's regions from 1 in the source's order (a vanished one
  leaves a gap). The course release has float64, four times the size for the same numbers. An image
  without any cell gets an empty ``class1.tif``, so that "looked at, no cells" is not taken for a
  missing annotation.
- ``patients.csv``: image_id, patient, organ ("" in the originals, which do not state it). Left out
  where an image or its folder has no TCGA name, since the patient is then unknown.

The image id is the original's file name (``TCGA-5P-A9K0-01Z-00-DX1_1``), or in the Parquet copy,
which holds no names, the patient and a running number (``TCGA-5P-A9K0_001``), so that the patient
stays readable in it.

**Overlaps.** A label map has room for one id a pixel. Where instances of one class overlap, the
smaller one keeps the pixel (of two equal ones, the earlier): a small cell on a large one would else
disappear, while the large one only loses a part, and the result does not depend on the order of the
file. Classes have a label map each, so that overlaps between classes stay. Every instance that lost
all its pixels, or never had one, is named in the report.

**Outlines.** A pixel belongs to a region if its centre (at whole coordinates) lies inside the
outline by ``skimage.draw.polygon``, cut to the image; the hole that an outline leaves by crossing
itself is filled. One outline is one instance, in however many pieces.

MoNuSAC 2020: Verma et al., IEEE Transactions on Medical Imaging 2021, licence CC BY-NC-SA 4.0.
"""

import argparse
import csv
import io
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from tqdm import tqdm

from cellseg_helpers.cells import CLASS_NAMES
from cellseg_helpers.data.cache import DataError
from cellseg_helpers.data.splits import patient_of

HUB_NAME = "RationAI/MoNuSAC"
# Taken from the copy's public commit list, without a network: that this commit already holds the
# Parquet files has not been tried. Where it does not, `download` says so, and `--revision` takes
# another.
HUB_REVISION = "72affa16ec0dcbb53aafbd2ad3d75114e3e8c6c8"
HUB_COLUMNS = ("patient", "image", "instances", "categories", "tissue")
AMBIGUOUS = "ambiguous"
MAX_INSTANCES = np.iinfo(np.uint16).max


class Region(NamedTuple):
    """One annotated cell: where it stands in its source, its pixels, and why it has none."""

    class_id: int
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
    ambiguous: int  # regions left out


class ConversionReport(NamedTuple):
    """What was written, and what was not; ``str`` makes the table that the command line prints."""

    destination: Path
    images: int
    patients: int
    instances: dict[str, int]  # by class, as they stand in the label maps
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
            [str(self.destination), *table, *(f"    {sentence}" for sentence in self.vanished)]
        )


def convert_originals(source: str | Path, destination: str | Path) -> ConversionReport:
    """Write MoNuSAC originals in the HW3 layout (module docstring).

    Args:
        source: folder with, at any depth, images ``<name>.svs`` or ``<name>.tif`` and beside each
            ``<name>.xml``. Where both kinds of image are there, the ``.svs`` is read, and of its
            pages the first: the others are a thumbnail and pictures of the glass slide, which can
            be larger. Training and test set are published as two folders: convert each into a
            destination of its own.
        destination: a new or empty folder.

    Raises:
        DataError: a file is missing or damaged, a class is unknown, or the destination is not
            empty. Nothing is left behind.
    """
    pairs, destination = _pair_originals(Path(source)), Path(destination).absolute()
    with _new_folder(destination) as folder:
        progress = tqdm(pairs, desc="converting", unit="image", leave=False)
        return _write_layout((_read_original(*pair) for pair in progress), folder, destination)


def convert_parquet(source: str | Path, destination: str | Path) -> dict[str, ConversionReport]:
    """Write the Parquet copy of MoNuSAC in the HW3 layout (module docstring).

    The split ``train`` goes to ``destination``; any other, to a folder of the same layout beside
    it: ``test``, whose truth is public, to ``<destination>_test``. Classes are known by their names
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
    splits = _open_parquet(Path(source))
    train = Path(destination).absolute()
    destinations = {
        name: train if name == "train" else train.with_name(f"{train.name}_{name}")
        for name in splits
    }
    with ExitStack() as stack:
        folders = {
            name: stack.enter_context(_new_folder(target)) for name, target in destinations.items()
        }
        return {
            name: _write_layout(
                _read_rows(rows, f"{source}, split {name}"), folders[name], destinations[name]
            )
            for name, rows in splits.items()
        }


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

    try:
        HfApi().dataset_info(
            HUB_NAME, revision=revision, timeout=10
        )  # fails at once where the download would retry
        wanted = ["*.parquet", "README.md"]
        folder = Path(
            snapshot_download(
                HUB_NAME, repo_type="dataset", revision=revision, allow_patterns=wanted
            )
        )
    except Exception as error:  # the network's errors are of many libraries
        raise DataError(
            f"the dataset {HUB_NAME}, revision {revision}, could not be downloaded from Hugging Face ({_first_line(error)}); "
            "with a network, try again, or name another revision (--revision main is the newest); without one, get the "
            "originals of the MoNuSAC 2020 challenge (grand-challenge.org, 'MoNuSAC 2020', page 'Data'; licence "
            "CC BY-NC-SA 4.0) on another machine, unpack them here, and convert each of their two folders: "
            f"python -m tools.monusac FOLDER {destination}"
        ) from error
    if not any(folder.rglob("*.parquet")):
        raise DataError(
            f"revision {revision} of {HUB_NAME} holds no Parquet files; take another one, such as --revision main"
        )
    return convert_parquet(folder, destination)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.monusac",
        description="Write MoNuSAC 2020 in the HW3 layout: train/<image id>/image.tif and class<k>.tif, patients.csv.",
        epilog=(
            "The originals are published as two folders, training and test: convert each into a destination of its own. "
            "From Parquet, the training split goes to DESTINATION and the test split, masks included, to DESTINATION_test. "
            "Licence of the data: CC BY-NC-SA 4.0."
        ),
    )
    parser.add_argument(
        "source",
        help="folder of originals (.svs or .tif beside .xml), Parquet file or folder, or the word 'download'",
    )
    parser.add_argument("destination", help="a new or empty folder")
    parser.add_argument(
        "--revision",
        default=HUB_REVISION,
        help=f"for 'download': commit or branch of {HUB_NAME} (default: %(default)s)",
    )
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
    """Every image with its annotation; hidden files (``._x``, ``__MACOSX``) are no part of the
    data.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    files = [
        path
        for path in sorted(source.rglob("*"))
        if not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(source).parts)
    ]
    of_kind = {
        kind: {p.with_suffix(""): p for p in files if p.suffix.lower() == kind}
        for kind in (".tif", ".svs", ".xml")
    }
    images, annotations = of_kind[".tif"] | of_kind[".svs"], of_kind[".xml"]
    if not images and not annotations:
        raise DataError(
            f"{source}: no MoNuSAC originals (.svs or .tif images beside .xml) and no .parquet in this folder"
        )
    alone = sorted(images.keys() ^ annotations.keys())
    if alone:
        kinds = [(images[p], ".xml") if p in images else (annotations[p], "image") for p in alone]
        raise DataError("; ".join(f"{path} has no {kind} beside it" for path, kind in kinds))
    by_name = {}
    for path in sorted(images):
        if path.name in by_name:
            raise DataError(
                f"{images[path]} and {images[by_name[path.name]]} have the same name; image ids must differ"
            )
        by_name[path.name] = path
    return [(images[path], annotations[path]) for path in sorted(images)]


def _read_original(image_file: Path, annotation_file: Path) -> AnnotatedImage:
    image = _read_tiff(image_file)
    regions, ambiguous = _read_annotation(annotation_file, image.shape[:2])
    image_id = image_file.stem
    patient = patient_of(image_id) or patient_of(image_file.parent.name)
    return AnnotatedImage(image_id, patient, "", image, regions, ambiguous)


def _read_tiff(path: Path) -> np.ndarray:
    try:
        with tifffile.TiffFile(path) as tiff:
            image = tiff.pages[0].asarray()
    except (
        Exception
    ) as error:  # tifffile and its codecs raise errors of many kinds for a damaged file
        raise DataError(
            f"{path}: the image cannot be read ({error}); get this file again"
        ) from error
    if image.ndim != 3 or image.shape[2] not in (3, 4) or image.dtype != np.uint8:
        raise DataError(
            f"{path}: expected a uint8 RGB image, found {image.dtype} of shape {image.shape}"
        )
    return image[..., :3]


def _read_annotation(path: Path, shape: tuple[int, int]) -> tuple[list[Region], int]:
    """The regions of the four classes, and the number of ambiguous ones."""
    try:
        layers = ElementTree.parse(path).getroot().findall("Annotation")
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(
            f"{path}: the annotation cannot be read ({error}); get this file again"
        ) from error
    if not layers:
        raise DataError(
            f"{path}: no element Annotations/Annotation, so this is no MoNuSAC annotation"
        )
    regions, ambiguous = [], 0
    for layer in layers:
        outlines = layer.findall("Regions/Region")
        if not outlines:
            continue
        attribute = layer.find("Attributes/Attribute")
        class_id = _class_id("" if attribute is None else attribute.get("Name", ""), path)
        if class_id is None:
            ambiguous += len(outlines)
        else:
            regions += [_read_region(outline, class_id, shape, path) for outline in outlines]
    return regions, ambiguous


def _class_id(name: str, where: object) -> int | None:
    """1..K, or None for ambiguous."""
    known = name.strip().lower()
    if known == AMBIGUOUS:
        return None
    if known not in CLASS_NAMES:
        raise DataError(
            f"{where}: unknown class {name!r}; one of {', '.join(CLASS_NAMES)}, {AMBIGUOUS}"
        )
    return CLASS_NAMES.index(known) + 1


def _read_region(
    outline: ElementTree.Element, class_id: int, shape: tuple[int, int], path: Path
) -> Region:
    name = f"{path.name}, region {outline.get('Id', '?')} ({CLASS_NAMES[class_id - 1]})"
    try:
        vertices = [
            (float(v.attrib["Y"]), float(v.attrib["X"])) for v in outline.findall("Vertices/Vertex")
        ]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path.parent / name}: a vertex without a numeric X and Y ({error})"
        ) from error
    if not np.isfinite(vertices).all():
        raise DataError(f"{path.parent / name}: a vertex that is not a finite number")
    if len(vertices) < 3:
        return Region(
            class_id,
            name,
            np.empty(0, int),
            problem=f"has {len(vertices)} vertices, an outline needs 3",
        )
    outside = (np.array(vertices) < 0) | (np.array(vertices) > np.array(shape) - 1)
    pixels = fill_outline(np.array(vertices), shape)
    problem = (
        "" if len(pixels) else "encloses no pixel centre of the image: too thin, or outside it"
    )
    return Region(class_id, name, pixels, bool(outside.any()), problem)


def fill_outline(vertices: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels inside an outline, by the rule of the module docstring.

    Args:
        vertices: float [n, 2], row and column, px; pixel centres stand at whole numbers.
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


def _open_parquet(source: Path) -> dict:
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
        raise DataError(f"{source}: cannot be read as Parquet ({_first_line(error)})") from error
    for name, rows in splits.items():
        _check_features(rows.features or {}, f"{source}, split {name}")
    return {
        name: rows.cast_column("image", Image(decode=False)).cast_column(
            "instances", List(Image(decode=False))
        )
        for name, rows in splits.items()
    }


def _check_features(features: dict, where: str) -> None:
    missing = [column for column in HUB_COLUMNS if column not in features]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(missing)}; expected {', '.join(HUB_COLUMNS)}"
        )
    for column, feature in (
        ("categories", getattr(features["categories"], "feature", None)),
        ("tissue", features["tissue"]),
    ):
        if not hasattr(feature, "names"):
            raise DataError(
                f"{where}: column {column} has no class names, so its numbers cannot be understood"
            )
    for name in features["categories"].feature.names:
        _class_id(name, f"{where}, column categories")


def _read_rows(rows, where: str) -> Iterator[AnnotatedImage]:
    class_names, organs = rows.features["categories"].feature.names, rows.features["tissue"].names
    numbers = Counter()
    try:
        for index, row in enumerate(tqdm(rows, desc="converting", unit="image", leave=False), 1):
            numbers[row["patient"]] += 1
            yield _read_row(
                row, class_names, organs, numbers[row["patient"]], f"{where}, row {index}"
            )
    except DataError:
        raise
    except Exception as error:  # of many libraries below
        raise DataError(
            f"{where}: cannot be read to its end ({_first_line(error)}); get this file again"
        ) from error


def _read_row(
    row: dict, class_names: list[str], organs: list[str], number: int, where: str
) -> AnnotatedImage:
    patient, instances, categories = row["patient"], row["instances"], row["categories"]
    if not re.fullmatch(r"[\w-][\w.-]*", patient or ""):
        raise DataError(f"{where}: the patient {patient!r} cannot be part of a file name")
    if instances is None or categories is None or len(instances) != len(categories):
        raise DataError(f"{where}: instances and categories must be two lists of the same length")
    image = _decode(row["image"], "RGB", f"{where}, image")
    regions, ambiguous = [], 0
    for index, (encoded, category) in enumerate(zip(instances, categories, strict=True), 1):
        class_id = _class_id(_name_of(category, class_names, where), where)
        if class_id is None:
            ambiguous += 1
            continue
        name = f"{where}, instance {index} ({CLASS_NAMES[class_id - 1]})"
        mask = _decode(encoded, "1", name)
        if mask.shape != image.shape[:2]:
            raise DataError(
                f"{name}: mask of shape {mask.shape} on an image of shape {image.shape[:2]}"
            )
        pixels = np.flatnonzero(mask)
        regions.append(
            Region(class_id, name, pixels, problem="" if len(pixels) else "has an empty mask")
        )
    organ = _name_of(row["tissue"], organs, where).lower()
    return AnnotatedImage(
        f"{patient}_{number:03d}", patient_of(patient) or patient, organ, image, regions, ambiguous
    )


def _name_of(number: int | None, names: list[str], where: str) -> str:
    if number is None or not 0 <= number < len(names):
        raise DataError(f"{where}: label {number} has no name; names are {', '.join(names)}")
    return names[number]


def _decode(encoded: dict | None, mode: str, where: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded["bytes"])) as picture:
            return np.asarray(picture.convert(mode))
    except Exception as error:  # Pillow raises errors of many kinds for a damaged picture
        raise DataError(f"{where}: cannot be decoded ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


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
        areas_px: int64 [N], the pixels that each kept.
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
        image_folder = folder / "train" / item.image_id
        image_folder.mkdir(parents=True)
        _write_tiff(image_folder / "image.tif", item.image)
        for class_id in range(1, len(CLASS_NAMES) + 1):
            regions = [region for region in item.regions if region.class_id == class_id]
            if len(regions) > MAX_INSTANCES:
                class_name = CLASS_NAMES[class_id - 1]
                raise DataError(
                    f"{item.image_id}: {len(regions)} regions of class {class_name}, at most {MAX_INSTANCES} fit"
                )
            label_map, kept = draw_instances(
                [region.pixels for region in regions], item.image.shape[:2]
            )
            if kept.any():
                _write_tiff(image_folder / f"class{class_id}.tif", label_map)
            instances[class_id] += int((kept > 0).sum())
            for region, area in zip(regions, kept, strict=True):
                counts["overlapping"] += 0 < area < len(region.pixels)
                counts["clipped"] += region.clipped
                if area == 0:
                    vanished.append(
                        f"{region.name} {region.problem or 'is covered by smaller or equal ones of its class'}"
                    )
        if not any(image_folder.glob("class*.tif")):
            _write_tiff(image_folder / "class1.tif", np.zeros(item.image.shape[:2], np.uint16))
        counts["ambiguous"] += item.ambiguous
        rows.append((item.image_id, item.patient, item.organ))
    if not rows:
        raise DataError(f"no images for {destination}")
    if all(patient for _, patient, _ in rows):
        with open(folder / "patients.csv", "w", newline="") as file:
            csv.writer(file).writerows([("image_id", "patient", "organ"), *rows])
    return ConversionReport(
        destination,
        images=len(rows),
        patients=len({patient for _, patient, _ in rows if patient}),
        instances={name: instances[class_id] for class_id, name in enumerate(CLASS_NAMES, 1)},
        ambiguous=counts["ambiguous"],
        overlapping=counts["overlapping"],
        clipped=counts["clipped"],
        vanished=vanished,
    )


def _write_tiff(path: Path, array: np.ndarray) -> None:
    photometric = "rgb" if array.ndim == 3 else "minisblack"
    tifffile.imwrite(
        path,
        array,
        compression="lzw",
        predictor=array.ndim == 3,
        photometric=photometric,
        metadata=None,
    )


def _refuse_full(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(
            f"{destination} exists and is not an empty folder; remove it, or name another destination"
        )


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder beside the destination that takes its name at the end, and is removed if anything
    fails before.
    """
    _refuse_full(destination)
    folder = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
