"""The pictures of a scan: which of the figures go into its report, each with its caption."""

import pandas as pd
from matplotlib.figure import Figure

from dhlens.dynamics import Dynamics
from dhlens.heads import HeadSet
from dhlens.render import figures
from dhlens.scores import Score


def scan_pictures(score: Score, dynamics: Dynamics | None, outcomes: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Title to figure and caption; a picture that would have nothing to show is left out.

    Args:
        score: of the scan, with its trace.
        dynamics: None where nothing could be measured.
        outcomes: one row per episode, with length, depth and correct.
    """
    found: dict[str, tuple[Figure, str]] = {}
    if dynamics is not None and dynamics["activated"]:
        found |= _of_dynamics(score, dynamics)
    judged = outcomes.dropna(subset=["length", "depth", "correct"])
    if len(judged):
        found["Accuracy"] = (figures.answer_grids(judged), "Share of answers that contain the whole answer.")
    return found


def _of_dynamics(score: Score, d: Dynamics) -> dict[str, tuple[Figure, str]]:
    assert score.trace is not None
    static = HeadSet(d.heads.loc[d.heads.in_static_20, ["layer", "head"]].to_numpy().tolist(), score.shape)
    right = [i for i, o in enumerate(score.trace.outcomes) if o.correct] or [0]
    example = right[len(right) // 2]
    return {
        "One episode": (
            figures.raster(score, example, static=static),
            f"Heads that copy the next token, at each step of {score.trace.episodes[example].id}. Static: the top 20 "
            "by mean score over the windows that they were fitted on.",
        ),
        "How often each head fires": (figures.head_map(d.heads), "Share of the steps at which a head is active."),
        "The long tail": (figures.long_tail(d.heads), "Heads by activity; the static top 20 set apart."),
        "Similarity over time": (
            figures.lag_curve(d.lags),
            "Mean Jaccard of the active heads of two steps; the null puts each episode's steps in random order.",
        ),
        "Against static sets": (
            figures.static_curve(d.static),
            "Static heads are fitted on other haystack windows; the cap is what the sizes of the two sets allow.",
        ),
        "What more episodes would show": (
            figures.accumulation(d.accumulation),
            "Heads ever active and entropy grow with the number of episodes drawn.",
        ),
    }
