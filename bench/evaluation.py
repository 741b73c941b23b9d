"""COCO's twelve numbers of many detections: ``score_coco`` against pycocotools' ``COCOeval``.

Images of about 1000 x 1000 px with about 300 cells and 500 detections each, drawn by ``large_run``;
both sides begin at the same lists of annotations and results with compressed RLE masks, and end at
the precision and recall of each IoU threshold, class, area range and limit of detections. Results
have no ``bbox``: with one, pycocotools takes a box's area for its mask's.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.measure import Pair, Row, side_by_side, time_and_memory, times_less, verdict
from cellseg_helpers.metrics import COCO_MAX_DETS, at_max_dets, score_coco, summarize
from tools.large_run import draw_run

IMAGES, DETECTIONS_PER_IMAGE = 100, 500
TOLERANCE = 1e-9
Scores = tuple[np.ndarray, np.ndarray, np.ndarray]  # precision, recall, the 12 numbers


def score_both() -> Pair:
    """The two evaluations of a drawn run, at COCO's limits of detections and at one that leaves
    none out.
    """
    truth, detections = draw_run(IMAGES, IMAGES * DETECTIONS_PER_IMAGE)
    cells = f"{len(truth['annotations']) / IMAGES:.0f} cells an image"
    max_dets = [*COCO_MAX_DETS, DETECTIONS_PER_IMAGE]

    def peer() -> Scores:
        results = [
            {key: value for key, value in row.items() if key != "bbox"} for row in detections
        ]
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
        scores = score_coco(truth, detections, max_dets)
        return (
            scores.precision,
            scores.recall,
            np.array(list(summarize(at_max_dets(scores, COCO_MAX_DETS)).values())),
        )

    return Pair(ours, peer, lambda ours, peer: f"{compare(ours, peer)}; {cells}")


def compare(ours: Scores, peer: Scores) -> str:
    """-1 of pycocotools, where there is no truth, is NaN of the package."""
    largest = 0.0
    for values, theirs in zip(ours, peer, strict=True):
        theirs = np.where(theirs < 0, np.nan, theirs)
        if not np.array_equal(np.isnan(values), np.isnan(theirs)):
            return verdict(False, "values where there is no truth, or none where there is")
        largest = max(largest, np.nanmax(np.abs(values - theirs), initial=0))
    return verdict(
        largest < TOLERANCE, f"max difference {largest:.1g} in precision, recall and the 12 numbers"
    )


def rows() -> list[Row]:
    ours, peer, alike = side_by_side(score_both, repeats=3, repeat_peer=False)
    note = (
        f"{IMAGES} drawn images, about 300 cells and {DETECTIONS_PER_IMAGE} detections each, maxDets 1, 10, 100 and all; pycocotools, "
        "one call"
    )
    cpu_ratio = times_less(ours.cpu_seconds, peer.cpu_seconds)
    time, memory = time_and_memory(
        "evaluation", (ours, peer, alike), f"goal 20x; {note}", f"peak that one call adds; {note}"
    )
    return [
        time,
        Row(
            "evaluation: CPU time",
            ours.cpu_seconds,
            peer.cpu_seconds,
            "s",
            cpu_ratio,
            alike,
            f"a core for a core; {note}",
        ),
        memory,
    ]
