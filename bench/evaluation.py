"""COCO's twelve numbers of many detections: ``score_coco`` against pycocotools' ``COCOeval``.

Images of about 1000 x 1000 px with 300 cells and 500 detections each, drawn by ``large_run``; both sides begin at the same lists
of annotations and results with compressed RLE masks, and end at the precision and recall of each IoU threshold, class, area range
and limit of detections. Results have no ``bbox``: with one, pycocotools takes a box's area for its mask's.
"""

import contextlib
import io
import time

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.large_run import draw_run
from bench.measure import Pair, Row, megabytes
from cellseg_helpers.analysis.metrics import COCO_MAX_DETS, CocoScores, at_max_dets, dense_max_dets, score_coco, summarize

IMAGES, FEWER_IMAGES = 100, 20
DETECTIONS_PER_IMAGE = 500


def score_both(images: int = FEWER_IMAGES, dense: bool = False) -> Pair:
    """The two evaluations of a drawn run; ``dense``: also at the limit that counts all cells, as ``metrics.evaluate`` does."""
    truth, detections = draw_run(images, images * DETECTIONS_PER_IMAGE)
    max_dets = sorted({*COCO_MAX_DETS, *(dense_max_dets(truth) if dense else ())})

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
    differences = [
        np.nanmax(np.abs(np.where(peer.eval[key] < 0, np.nan, peer.eval[key]) - values), initial=0)
        for key, values in (("precision", ours.precision), ("recall", ours.recall))
    ]
    differences += list(np.abs(peer.stats - list(summarize(at_max_dets(ours, COCO_MAX_DETS)).values())))
    return f"max difference {max(differences):.1g} in precision, recall and the 12 numbers"


def wall_and_cpu(pair: Pair) -> tuple[np.ndarray, np.ndarray, str]:
    """Seconds of ours (median of 3) and of the peer (one call: it is long), on the wall and of CPU, and how alike they are."""
    results, taken = [], []
    for call in (pair.ours, pair.ours, pair.ours, pair.peer):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        results.append(call())
        taken.append((time.perf_counter() - begun, time.process_time() - cpu_begun))
    return np.median(taken[:3], axis=0), np.array(taken[3]), pair.identical(results[0], results[3])


def rows() -> list[Row]:
    table = []
    for images, dense in ((IMAGES, False), (FEWER_IMAGES, True)):
        ours, peer, identical = wall_and_cpu(score_both(images, dense))
        limit = "dense maxDets" if dense else "maxDets 100"
        note = f"{images} drawn images, {DETECTIONS_PER_IMAGE} detections each; peer: pycocotools, one call"
        for part, kind, goal in ((0, "time", "goal 20x; hotcoco on all cores"), (1, "CPU time", "a core for a core")):
            row = (ours[part], peer[part], "s", peer[part] / ours[part], identical, f"{goal}; {note}")
            table.append(Row(f"evaluation, {limit}: {kind}", *row))
    ours_mb, peer_mb = (megabytes("bench.evaluation:score_both", side) for side in Pair._fields[:2])
    note = f"peak that one call adds; {FEWER_IMAGES} drawn images, {DETECTIONS_PER_IMAGE} detections each, maxDets 100"
    return [*table, Row("evaluation, maxDets 100: memory", ours_mb, peer_mb, "MB", peer_mb / ours_mb, table[0].identical, note)]
