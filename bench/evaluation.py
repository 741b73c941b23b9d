"""COCO's twelve numbers of many detections: ``score_coco`` beside pycocotools' ``COCOeval``.

Both sides begin at the same annotations and detections of a drawn run (``tools.large_run``), and
end at the precision and recall of each IoU threshold, class, area range and limit of detections.
pycocotools gets results without a ``bbox``: with one, it takes a box's area for its mask's.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.measure import Pair, Row, less, side_by_side, time_and_memory, verdict
from cellseg_helpers.metrics import COCO_MAX_DETS, at_max_dets, score_coco, summarize
from tools.large_run import draw_run

IMAGES, DETECTIONS_PER_IMAGE = 100, 500
TOLERANCE = 1e-9
Scores = tuple[np.ndarray, np.ndarray, np.ndarray]  # precision, recall, the 12 numbers


def score_both() -> Pair:
    """At COCO's limits of detections, and at one that leaves none out."""
    truth, detections = draw_run(IMAGES, IMAGES * DETECTIONS_PER_IMAGE)
    cells = f"{len(truth['annotations']) / IMAGES:.0f} cells an image"
    results = detections.to_coco()
    max_dets = [*COCO_MAX_DETS, DETECTIONS_PER_IMAGE]

    def peer() -> Scores:
        boxless = [{name: row[name] for name in row if name != "bbox"} for row in results]
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(boxless), "segm")
            evaluation.params.maxDets = max_dets
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.eval["precision"], evaluation.eval["recall"], evaluation.stats

    def ours() -> Scores:
        scores = score_coco(truth, detections, max_dets)
        numbers = summarize(at_max_dets(scores, COCO_MAX_DETS))
        return scores.precision, scores.recall, np.array(list(numbers.values()))

    return Pair(ours, peer, lambda ours, peer: f"{compare(ours, peer)}; {cells}")


def compare(ours: Scores, peer: Scores) -> str:
    """pycocotools' -1, for "no such cell", is NaN in the package."""
    largest = 0.0
    for values, theirs in zip(ours, peer, strict=True):
        theirs = np.where(theirs < 0, np.nan, theirs)
        if not np.array_equal(np.isnan(values), np.isnan(theirs)):
            return verdict(False, "a number on one side only")
        largest = max(largest, np.nanmax(np.abs(values - theirs), initial=0))
    numbers = "precision, recall and the 12 numbers"
    return verdict(largest < TOLERANCE, f"max difference {largest:.1g} in {numbers}")


def rows() -> list[Row]:
    measured = side_by_side(score_both, repeats=3, repeat_peer=False)
    note = f"{IMAGES} drawn images, about 300 cells and {DETECTIONS_PER_IMAGE} detections each, "
    note += "maxDets 1, 10, 100 and all; pycocotools, one call"
    goals = "goal 20x", "peak that one call adds"
    wall, memory = time_and_memory("evaluation", measured, note, *goals)
    ours, peer, identical = measured
    cpu = (ours.cpu_seconds, peer.cpu_seconds, "s", identical, f"a core for a core; {note}")
    return [wall, less("evaluation: CPU time", *cpu), memory]
