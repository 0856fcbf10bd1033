"""The tasks of `dhlens.carryover.carry_over` side by side: a panel per measure, a dot per task, chance as a line."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dhlens.carryover import MEASURES
from dhlens.render.draw import BLUE, GREY, need


def carry_map(table: pd.DataFrame) -> Figure:
    """Each measure of each task with its 95 % interval; the grey stroke beside a dot is chance.

    `table` has task, measure, value, low, high and chance.

    Raises:
        ValueError: a column is missing, or there is no row.
    """
    need(table, "task", "measure", "value", "low", "high", "chance")
    shown = [name for name in MEASURES if name in set(table["measure"])]
    if not shown:
        raise ValueError("a map of tasks needs a measured row, got none")
    tasks = list(table["task"].unique())
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1.4 + 2.3 * columns, lines * (0.7 + 0.26 * len(tasks))), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for axes, name in zip(grid.flat, shown, strict=False):
        part = table.loc[table["measure"] == name].set_index("task").reindex(tasks)
        y = np.arange(len(tasks))
        axes.hlines(y, part["low"], part["high"], color=BLUE, lw=1.3)
        axes.plot(part["value"], y, "o", color=BLUE, ms=4.5)
        axes.vlines(part["chance"].to_numpy(dtype=float), y - 0.28, y + 0.28, color=GREY, lw=1.8)
        axes.set_title(fill(MEASURES[name], 32), fontsize=8, loc="left")
        axes.tick_params(axis="x", labelsize=7)
        axes.set_yticks(y, tasks, fontsize=8)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
    return figure
