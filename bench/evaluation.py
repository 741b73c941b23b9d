"""COCO's twelve numbers of many detections: ``score_coco`` against pycocotools' ``COCOeval``.

Images of about 1000 x 1000 px with about 300 cells and 500 detections each, drawn by ``large_run``; both sides begin at the same lists
of annotations and results with compressed RLE masks, and end at the precision and recall of each IoU threshold, class, area range
and limit of detections. Results have no ``bbox``: with one, pycocotools takes a box's area for its mask's.
"""

import contextlib
import io
import time
from functools import cache

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.large_run import draw_run
from bench.measure import Pair, Row, both_megabytes, times_less, verdict
from cellseg_helpers.analysis.metrics import COCO_MAX_DETS, CocoScores, at_max_dets, score_coco, summarize

IMAGES, FEWER_IMAGES = 100, 10
DETECTIONS_PER_IMAGE = 500
TOLERANCE = 1e-9


@cache
def drawn(images: int) -> tuple[dict, list[dict]]:
    return draw_run(images, images * DETECTIONS_PER_IMAGE)


def score_both(images: int = FEWER_IMAGES) -> Pair:
    """The two evaluations of a drawn run, at COCO's limits of detections and at one that leaves none out."""
    truth, detections = drawn(images)
    max_dets = [*COCO_MAX_DETS, DETECTIONS_PER_IMAGE]

    def peer() -> COCOeval:
        results = [{key: value for key, value in row.items() if key != "bbox"} for row in detections]
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(results), "segm")
            evaluation.params.maxDets = max_dets
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    return Pair(lambda: score_coco(truth, detections, max_dets), peer, compare)


def compare(ours: CocoScores, peer: COCOeval) -> str:
    """-1 of pycocotools, where there is no truth, is NaN of the package."""
    stats = np.array(list(summarize(at_max_dets(ours, COCO_MAX_DETS)).values()))
    largest = 0.0
    for values, theirs in ((ours.precision, peer.eval["precision"]), (ours.recall, peer.eval["recall"]), (stats, peer.stats)):
        theirs = np.where(theirs < 0, np.nan, theirs)
        if not np.array_equal(np.isnan(values), np.isnan(theirs)):
            return verdict(False, "values where there is no truth, or none where there is")
        largest = max(largest, np.nanmax(np.abs(values - theirs), initial=0))
    return verdict(largest < TOLERANCE, f"max difference {largest:.1g} in precision, recall and the 12 numbers")


def wall_and_cpu(pair: Pair) -> tuple[np.ndarray, np.ndarray, str]:
    """Seconds of ours (median of 3 after a warm-up) and of the peer (one call), on the wall and of CPU; how alike they are."""
    results, taken = [], []
    for call in (pair.ours, pair.ours, pair.ours, pair.ours, pair.peer):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        results.append(call())
        taken.append((time.perf_counter() - begun, time.process_time() - cpu_begun))
    return np.median(taken[1:4], axis=0), np.array(taken[4]), pair.identical(results[0], results[4])


def rows() -> list[Row]:
    ours, peer, identical = wall_and_cpu(score_both(IMAGES))
    cells = len(drawn(IMAGES)[0]["annotations"]) / IMAGES
    note = f"{IMAGES} drawn images, {cells:.0f} cells and {DETECTIONS_PER_IMAGE} detections each on average, maxDets 1, 10, 100 and all; pycocotools, one call"
    kinds = (("time", "goal 20x"), ("CPU time", "a core for a core"))
    table = [
        Row(f"evaluation: {kind}", ours[part], peer[part], "s", times_less(ours[part], peer[part]), identical, f"{goal}; {note}")
        for part, (kind, goal) in enumerate(kinds)
    ]
    ours_mb, peer_mb = both_megabytes("bench.evaluation:score_both")
    note = f"peak that one call adds; {FEWER_IMAGES} such images"
    return [*table, Row("evaluation: memory", ours_mb, peer_mb, "MB", times_less(ours_mb, peer_mb), identical, note)]
