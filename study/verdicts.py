"""Test whether the effects that a report claims hold on the study's own runs, by differences paired
over images (or patients) and seeds. Needs no torch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from cellseg_helpers.resampling import ALIKE, FEWEST_IMAGES, Draw, SavedScores, interval

HOLDS = "holds here"
OPPOSITE = "the opposite holds here"
CANNOT_TELL = "this data cannot tell"
NO_DIFFERENCE = "no difference here"
NOT_ASKED = "cannot be asked"
WORDS = (HOLDS, OPPOSITE, CANNOT_TELL, NO_DIFFERENCE, NOT_ASKED)
ONE_EACH = "One training each was compared"
LEAST_SCORE = 0.01  # if both models score less than this, neither has learned to find cells yet
VISIBLE = 0.01  # smaller changes cannot be seen in scores of two digits, as the reports give them


class Estimate(NamedTuple):
    """A score, or a difference of two scores, from S trainings."""

    value: float  # mean over the trainings
    seed_sd: float  # standard deviation over the trainings; NaN for one training
    low: float  # of the 95 % interval; NaN for fewer than five images (or patients)
    high: float


class Side(NamedTuple):
    """One side of a comparison. Both sides have the same seeds and the same bootstrap samples."""

    label: str  # its name in the verdict's sentence
    values: Sequence[np.ndarray]  # per seed: the score, then B bootstrap values, float64 [1 + B]
    reported: float | str | None = None  # what the report gives: a score, or words


class Verdict(NamedTuple):
    """What a comparison says about a claim."""

    word: str  # one of ``WORDS``
    base: float  # mean score of this side; NaN if a side is missing
    other: float
    difference: Estimate  # other - base, paired
    sentence: str  # the claim, the word, the numbers and the reason


def estimate(values: Sequence[np.ndarray], units: int) -> Estimate:
    """Estimate the mean over S trainings with a 95 % interval for other images and other seeds.

    How it works: 1. For one training, the interval is that of its bootstrap values
    (``resampling.interval``), which ignores the variation between seeds. 2. For several, the
    variance of the mean is V = V_units + s^2 / S. V_units is the bootstrap variance of the mean
    times n / (n - 1); s is the standard deviation of the scores over the trainings. 3. The interval
    is mean +- t sqrt(V), with Welch's and Satterthwaite's degrees of freedom from n - 1 and S - 1
    (Satterthwaite, "An approximate distribution of estimates of variance components", 1946).

    ``values`` are as in ``Side``; ``units`` is n, the number of images (or patients) resampled.
    """
    trainings = np.stack(values)
    mean, seeds = trainings.mean(0), len(trainings)
    value = float(mean[0])
    if seeds == 1:
        return Estimate(value, math.nan, *interval(mean[1:], units))
    seed_sd = float(trainings[:, 0].std(ddof=1))
    defined = mean[1:][~np.isnan(mean[1:])]  # bootstrap values that are not NaN
    if units < FEWEST_IMAGES or not len(defined):
        return Estimate(value, seed_sd, math.nan, math.nan)
    of_units, of_seeds = defined.var(ddof=1) * units / (units - 1), seed_sd**2 / seeds
    total = of_units + of_seeds
    degrees = total**2 / (of_units**2 / (units - 1) + of_seeds**2 / (seeds - 1)) if total else 1
    half_width = float(student_t.ppf(0.975, degrees)) * math.sqrt(total)
    return Estimate(value, seed_sd, value - half_width, value + half_width)


def judge(
    claim: str,
    base: Side,
    other: Side,
    draw: Draw | SavedScores,
    expected: int = 1,
    same_weights: bool = False,
    metric: str = "AP50",
    caution: str = "",
) -> Verdict:
    """Decide whether a claim holds, by the difference ``other`` - ``base`` and its 95 % interval.

    - The claim that ``other`` scores higher (or lower) holds if the whole interval lies on that
      side of 0; its opposite holds if it lies on the other side. If the difference and the interval
      are within ``ALIKE`` of 0, the verdict is ``NO_DIFFERENCE``.
    - The claim that nothing changes holds if the interval lies within ``VISIBLE`` of 0; its
      opposite holds if 0 lies outside and the difference is ``VISIBLE`` or more.
    - Else, without an interval, or if both sides score below ``LEAST_SCORE``, the data cannot tell.

    Args:
        claim: a statement, without full stop.
        base, other: the two sides.
        draw: the bootstrap samples behind the values of both sides.
        expected: what is claimed of ``other``: it scores higher than ``base`` (1), lower (-1), or
            the same (0).
        same_weights: whether both sides are detections of the same trainings, treated differently.
        metric: name of the score.
        caution: a sentence to put at the end.
    """
    pairs = zip(base.values, other.values, strict=True)
    difference = estimate([of_other - of_base for of_base, of_other in pairs], draw.units)
    scores = [float(np.mean([values[0] for values in side.values])) for side in (base, other)]
    units, seeds = f"{draw.units} {draw.unit}", len(base.values)
    word, reason = _decide(difference, max(scores), units, expected, metric)
    span = f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    numbers = (
        f'{metric} {scores[0]:.3f} for "{base.label}" and {scores[1]:.3f} for "{other.label}", '
        f"difference {difference.value:+.3f}{'' if math.isnan(difference.low) else span}, "
        f"paired over {units}{f' and {seeds} seeds' if seeds > 1 else ''}."
    )
    parts = [f"{claim}: {word}.", numbers, reason]
    if isinstance(base.reported, float) and isinstance(other.reported, float):
        parts.append(f"Reported: {base.reported:g} and {other.reported:g}.")
    if seeds == 1 and not same_weights:
        parts.append(f"{ONE_EACH}: another seed may differ.")
    return Verdict(word, *scores, difference, " ".join([*parts, *filter(None, [caution])]))


def not_asked(claim: str, reason: str) -> Verdict:
    """Make the verdict for a comparison of which a side is missing."""
    nan, sentence = math.nan, f"{claim}: {NOT_ASKED}. Reason: {reason}."
    return Verdict(NOT_ASKED, nan, nan, Estimate(nan, nan, nan, nan), sentence)


def _decide(
    difference: Estimate, best: float, units: str, expected: int, metric: str
) -> Sequence[str]:
    """The word of the verdict, and the reason in a sentence; ``best`` is the higher score."""
    value, _, low, high = difference
    if best < LEAST_SCORE:
        least = f"{metric} under {LEAST_SCORE:g}"
        return CANNOT_TELL, f"Neither model finds cells yet ({least}), so this scale cannot tell."
    if math.isnan(low):
        return CANNOT_TELL, f"{units} are too few for an interval."
    largest, excludes_zero = max(abs(low), abs(high)), low > 0 or high < 0
    if max(abs(value), largest) < ALIKE:
        word = NO_DIFFERENCE if expected else HOLDS
        return word, f"The scores differ by less than {ALIKE:.4f}."
    if expected and not excludes_zero:
        return CANNOT_TELL, "0 lies inside the interval."
    if expected:
        word = HOLDS if (low > 0) == (expected > 0) else OPPOSITE
        return word, "The effect is larger than its interval: 0 lies outside."
    if largest < VISIBLE:
        return HOLDS, f"The interval lies within {VISIBLE:g} of 0."
    if excludes_zero and abs(value) >= VISIBLE:
        return OPPOSITE, "The change is larger than its interval: 0 lies outside."
    return CANNOT_TELL, f"The interval holds both changes under {VISIBLE:g} and larger ones."
