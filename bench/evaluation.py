"""COCO's twelve numbers of many drawn detections: ``score_coco`` beside pycocotools' ``COCOeval``,
with the precision and recall of each IoU threshold, class, area range and limit of detections.
pycocotools gets results without a ``bbox``: with one, it takes a box's area for its mask's.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.measure import Pair, Row, row, side_by_side, time_and_memory, verdict
from cellseg_helpers.metrics import COCO_MAX_DETS, score_coco, summarize
from tools.large_run import draw_run

IMAGES, DETECTIONS_PER_IMAGE = 100, 500
TOLERANCE = 1e-9
Scores = tuple[np.ndarray, np.ndarray, np.ndarray]  # precision, recall, the 12 numbers


def score_both() -> Pair:
    """At COCO's limits of detections, and at one that leaves none out."""
    truth, detections = draw_run(IMAGES, IMAGES * DETECTIONS_PER_IMAGE)
    results = [{name: row[name] for name in row if name != "bbox"} for row in detections.to_coco()]
    max_dets = [*COCO_MAX_DETS, DETECTIONS_PER_IMAGE]

    def peer() -> Scores:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(results), "segm")
            evaluation.params.maxDets = max_dets
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.eval["precision"], evaluation.eval["recall"], evaluation.stats

    def ours() -> Scores:
        scores = score_coco(truth, detections[:], max_dets)  # a copy, so masks are encoded anew
        numbers = summarize(scores, COCO_MAX_DETS)
        return scores.precision, scores.recall, np.array(list(numbers.values()))

    def compare(ours: Scores, peer: Scores) -> str:
        found, theirs = (np.concatenate([part.ravel() for part in side]) for side in (ours, peer))
        theirs = np.where(theirs < 0, np.nan, theirs)  # pycocotools' -1: no such cell
        if not np.array_equal(np.isnan(found), np.isnan(theirs)):
            return verdict(False, "a number on one side only")
        largest = np.nanmax(np.abs(found - theirs))
        numbers = f"max difference {largest:.1g} in precision, recall and the 12 numbers"
        cells = f"{len(truth['annotations']) / IMAGES:.0f} cells an image"
        return verdict(largest < TOLERANCE, f"{numbers}; {cells}")

    return Pair(ours, peer, compare)


def rows() -> list[Row]:
    measured = side_by_side(score_both, repeats=3, repeat_peer=False)
    note = f"{IMAGES} drawn images, about 300 cells and {DETECTIONS_PER_IMAGE} detections each, "
    note += "maxDets 1, 10, 100 and all; pycocotools, one call"
    goals = "goal 20x", "peak that one call adds"
    wall, memory = time_and_memory("evaluation", measured, note, *goals)
    ours, peer, same = measured
    cpu = (ours.cpu_seconds, peer.cpu_seconds, "s", same, f"a core for a core; {note}")
    return [wall, row("evaluation: CPU time", *cpu), memory]
