"""Figures that only the study needs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cellseg_helpers.plots import BESIDE, BLUE, GREEN, RED, draw_by_epoch, new_figure


def losses_beside_reported(history: pd.DataFrame | None, reported: Sequence[float]) -> Figure:
    """Plot a run's training loss by epoch and the reported losses, whose first is of epoch 1.

    Later epochs of ``history`` than the reported ones are left out; None: there is no run.
    """
    fig, ax = new_figure(1, 1, 3.4)
    table = pd.DataFrame({"epoch": range(1, len(reported) + 1), "loss": reported})
    draw_by_epoch(ax, table, "loss", "0.5", "s", label="reported", linestyle="--")
    if history is not None:
        shown = history[history["epoch"] <= len(reported)]
        draw_by_epoch(ax, shown, "loss", BLUE, label="reproduced")
    ax.set(ylabel="training loss", ylim=(0, None))
    ax.legend(frameon=False)
    return fig


def value_ranges(table: pd.DataFrame) -> Figure:
    """Plot the range (line), mean (mark) and standard deviation (bar) of the pixel values that the
    model's first layer gets, by normalisation and channel (``released_code.normalised_values``).
    """
    names = list(dict.fromkeys(table.index.get_level_values(0)))
    fig, ax = new_figure(1, 1, 0.6 * len(names) + 1.4)
    channels = zip("RGB", (RED, GREEN, BLUE), "os^", (-0.22, 0, 0.22), strict=True)
    for channel, colour, mark, shift in channels:
        rows = table.xs(channel, level="channel").loc[names]
        y, mean, std = np.arange(len(names)) + shift, rows["mean"], rows["std"]
        ax.hlines(y, rows["least"], rows["greatest"], color=colour, linewidth=1)
        ax.hlines(y, mean - std, mean + std, color=colour, linewidth=4, alpha=0.5)
        ax.plot(mean, y, mark, color=colour, markersize=5, label=channel)
    ax.set_xscale("symlog", linthresh=1)
    ax.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("value at the first layer (linear within ±1, logarithmic beyond)")
    ax.legend(**BESIDE)
    return fig


def finding_effects(compared: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Plot the effect of each finding on the score with its 95 % interval, a row a comparison."""
    fig, ax = new_figure(1, 1, 0.32 * len(compared) + 1)
    places, effect = np.arange(len(compared)), compared["effect"]
    ends = [effect - compared["low"], compared["high"] - effect]
    ax.errorbar(effect, places, xerr=ends, fmt="o", color=BLUE)
    ax.axvspan(-0.01, 0.01, color="0.9", zorder=0)
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlabel("score as released minus score as reported (grey: no visible change)")
    return fig


def step_effects(effects: pd.DataFrame, steps: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Plot the change that each step of post-processing makes in the metrics of all classes
    together, with 95 % intervals; one panel per metric. Steps that were left out are hollow.

    ``effects`` and ``steps`` are those of ``ablation.Ablation``.
    """
    fig, axes = new_figure(1, len(metrics), 0.32 * len(steps) + 1.2, sharey=True, squeeze=False)
    all_classes = effects[effects["of"] == "all"].set_index(["metric", "step"])
    y = np.arange(len(steps))
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = all_classes.loc[metric].loc[steps.index]
        ax.axvline(0, color="0.5", linewidth=0.8, linestyle=":")
        ax.hlines(y, rows["low"], rows["high"], color=BLUE, linewidth=1.5)
        for row, carried in enumerate(steps["carried"]):
            style = {"markeredgecolor": BLUE, "color": BLUE if carried else "white"}
            ax.plot(rows["difference"].iloc[row], row, "o", clip_on=False, **style)
        ax.set_yticks(y, steps.index)
        ax.set(ylim=(len(steps) - 0.5, -0.5), title=metric)
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_xticks([-0.1, -0.01, 0, 0.01, 0.1], ["−.1", "−.01", "0", ".01", ".1"])
        ax.xaxis.set_minor_locator(NullLocator())
    fig.supxlabel("change (linear within ±0.01, logarithmic beyond)")
    return fig
