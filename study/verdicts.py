"""Does an effect that a report claims hold here? Paired differences over images or patients, and
seeds; sentences. No torch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from cellseg_helpers.resampling import ALIKE, FEWEST_IMAGES, interval

HOLDS = "holds here"
OPPOSITE = "the opposite holds here"
CANNOT_TELL = "this data cannot tell"
NO_DIFFERENCE = "no difference here"
NOT_ASKED = "cannot be asked"
ONE_EACH = "One training each was compared"
WORDS = (HOLDS, OPPOSITE, CANNOT_TELL, NO_DIFFERENCE, NOT_ASKED)
LEAST_SCORE = 0.01  # two models that both stay under it have not learned to find cells yet
VISIBLE = 0.01  # a report that gives two digits sees no smaller change


class Estimate(NamedTuple):
    """A score, or a difference of two.

    Attributes:
        value: mean over the trainings.
        seed_sd: standard deviation over the trainings; NaN for one.
        low: of the 95 % interval; NaN from fewer than five units.
        high: of it.
    """

    value: float
    seed_sd: float
    low: float
    high: float


class Side(NamedTuple):
    """One side of a comparison.

    Attributes:
        label: as the sentence names it.
        values: of each training (seed) the score and its B bootstrap values, float64 [1 + B]; the
            same images, drawn by the same weights, and the same seeds as the other side's.
        reported: in the report, or None.
    """

    label: str
    values: Sequence[np.ndarray]
    reported: float | None = None


class Verdict(NamedTuple):
    """What the numbers say of a claim.

    Attributes:
        word: one of ``WORDS``.
        base: score, mean over the trainings; NaN where a side is missing.
        other: the other side's.
        difference: other - base, paired.
        sentence: all of it in words.
    """

    word: str
    base: float
    other: float
    difference: Estimate
    sentence: str


def estimate(values: Sequence[np.ndarray], units: int) -> Estimate:
    """Mean over trainings with a 95 % interval that knows of both chances: which images were drawn,
    and which seeds.

    One training: ``resampling.interval`` of its bootstrap values; how much another training would
    differ, it cannot know. S trainings: the variance of the mean is V = V_units + s^2 / S, where
    V_units is the bootstrap variance of the mean times n / (n - 1) (n units), and s the standard
    deviation of the trainings' scores; the interval is mean +- t sqrt(V), with the degrees of
    freedom of Welch and Satterthwaite from n - 1 and S - 1 (Satterthwaite, "An approximate
    distribution of estimates of variance components", 1946).

    Args:
        values: of each training the score and its bootstrap values, float64 [1 + B], of the same
            weights.
        units: number of images (or patients) that were drawn.
    """
    trainings = np.stack(values)
    mean, seeds = trainings.mean(0), len(trainings)
    if seeds == 1:
        return Estimate(float(mean[0]), math.nan, *interval(mean[1:], units))
    seed_sd = float(trainings[:, 0].std(ddof=1))
    defined = mean[1:][~np.isnan(mean[1:])]
    if units < FEWEST_IMAGES or not len(defined):
        return Estimate(float(mean[0]), seed_sd, math.nan, math.nan)
    of_units, of_seeds = defined.var(ddof=1) * units / (units - 1), seed_sd**2 / seeds
    total = of_units + of_seeds
    degrees = total**2 / (of_units**2 / (units - 1) + of_seeds**2 / (seeds - 1)) if total else 1
    reach = float(student_t.ppf(0.975, degrees)) * math.sqrt(total)
    return Estimate(float(mean[0]), seed_sd, float(mean[0]) - reach, float(mean[0]) + reach)


def judge(
    claim: str,
    base: Side,
    other: Side,
    units: int,
    unit: str = "images",
    expected: int = 1,
    same_weights: bool = False,
    metric: str = "AP50",
) -> Verdict:
    """What the paired difference of two sides says of a claim.

    The claim holds (or its opposite) where the 95 % interval of the difference leaves out 0. A
    claim of no change holds where the interval lies within ``VISIBLE`` of 0, and its opposite where
    it leaves out 0 and the difference is ``VISIBLE`` or more. Without an interval, or where neither
    side reaches ``LEAST_SCORE``, nobody can tell.

    Args:
        claim: a statement, without full stop.
        base: what the other side is compared with.
        other: the other side.
        units: number of images (or patients) that were drawn.
        unit: ``images`` or ``patients``.
        expected: 1: the claim says that ``other`` scores higher, -1: lower, 0: that there is no
            change.
        same_weights: both sides are of the same trained models, and only what was done to their
            detections differs.
        metric: what the scores are.
    """
    difference = estimate(
        [after - before for before, after in zip(base.values, other.values, strict=True)], units
    )
    scores = [float(np.mean([values[0] for values in side.values])) for side in (base, other)]
    word, why = _judge(difference, max(scores), units, unit, expected, metric)
    told = f'{metric} {scores[0]:.3f} for "{base.label}" and {scores[1]:.3f} for "{other.label}", '
    told += f"difference {difference.value:+.3f}"
    if not math.isnan(difference.low):
        told += f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    seeds = len(base.values)
    told += f", paired over {units} {unit}" + (f" and {seeds} seeds." if seeds > 1 else ".")
    parts = [f"{claim}: {word}.", told, why]
    if base.reported is not None and other.reported is not None:
        parts.append(f"Reported: {base.reported:g} and {other.reported:g}.")
    if seeds == 1 and not same_weights:
        parts.append(f"{ONE_EACH}: another seed may differ.")
    return Verdict(word, *scores, difference, " ".join(part for part in parts if part))


def not_asked(claim: str, reason: str) -> Verdict:
    """The verdict where a side of the comparison is missing."""
    nothing = Estimate(math.nan, math.nan, math.nan, math.nan)
    return Verdict(
        NOT_ASKED, math.nan, math.nan, nothing, f"{claim}: {NOT_ASKED}. Reason: {reason}."
    )


def _judge(
    difference: Estimate, best: float, units: int, unit: str, expected: int, metric: str
) -> tuple[str, str]:
    """The verdict's word, and why."""
    value, low, high = difference.value, difference.low, difference.high
    if best < LEAST_SCORE:
        return (
            CANNOT_TELL,
            f"Neither model finds cells yet ({metric} under {LEAST_SCORE:g}), so this scale cannot tell.",
        )
    if math.isnan(low):
        return CANNOT_TELL, f"{units} {unit} are too few for an interval."
    beyond_zero = low > 0 or high < 0
    if max(abs(value), abs(low), abs(high)) < ALIKE:
        return (
            NO_DIFFERENCE if expected else HOLDS
        ), f"The scores differ by less than {ALIKE:.4f}."
    if not expected:
        if max(abs(low), abs(high)) < VISIBLE:
            return HOLDS, f"The interval lies within {VISIBLE:g} of 0."
        if beyond_zero and abs(value) >= VISIBLE:
            return OPPOSITE, "The change is larger than its interval: 0 lies outside."
        return CANNOT_TELL, f"The interval holds both changes under {VISIBLE:g} and larger ones."
    if not beyond_zero:
        return CANNOT_TELL, "0 lies inside the interval."
    return (
        HOLDS if (low > 0) == (expected > 0) else OPPOSITE
    ), "The effect is larger than its interval: 0 lies outside."
