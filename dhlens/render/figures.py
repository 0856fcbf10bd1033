"""Pictures for papers and reports: each takes one table or Score and returns a matplotlib Figure.

Nothing is drawn on a shared canvas and no global style is touched: `figure.savefig("x.pdf")` writes it, a notebook
shows it, `dhlens.render.report` embeds it. Colours stay apart for colour-blind eyes and in grey print; text is 8 to 10
points at a width of about 5 inches, a column of a paper or a phone held upright. Each takes a fraction of a second. For
hovering and stepping use the player instead.
"""

from dhlens.render.ablation import compensation, contrast_forest, effect_dots, k_sweep
from dhlens.render.answers import answer_curves, answer_points
from dhlens.render.carryover import carry_map
from dhlens.render.causal import causal_raster
from dhlens.render.circuit import core_raster, estimated_exact, faithfulness_curves, feeder_bars, overlap_points
from dhlens.render.crowd import cluster_panels, coactivation_matrix, direct_bars, direct_raster
from dhlens.render.grids import answer_grids, atlas
from dhlens.render.layered import layered
from dhlens.render.monitor import monitor_curves
from dhlens.render.one_lag import calibration, f1_by_frequency, joint_map, precision_recall_curves
from dhlens.render.overlap import overlap_map
from dhlens.render.predicted import predicted_raster
from dhlens.render.prediction import lag_curves, lagged_correlations, lead_curves
from dhlens.render.rag import leak_curves, recall_curves, selection_curves, timeline
from dhlens.render.raster import raster
from dhlens.render.reasoning import mass_raster, score_maps, share_points, step_curves
from dhlens.render.scan import accumulation, head_map, lag_curve, long_tail, static_curve
from dhlens.render.sites import site_lag_map

__all__ = [
    "accumulation",
    "answer_curves",
    "answer_grids",
    "answer_points",
    "atlas",
    "calibration",
    "carry_map",
    "causal_raster",
    "cluster_panels",
    "coactivation_matrix",
    "compensation",
    "contrast_forest",
    "core_raster",
    "direct_bars",
    "direct_raster",
    "effect_dots",
    "estimated_exact",
    "f1_by_frequency",
    "faithfulness_curves",
    "feeder_bars",
    "head_map",
    "joint_map",
    "k_sweep",
    "lag_curve",
    "lag_curves",
    "lagged_correlations",
    "layered",
    "lead_curves",
    "leak_curves",
    "long_tail",
    "mass_raster",
    "monitor_curves",
    "overlap_map",
    "overlap_points",
    "precision_recall_curves",
    "predicted_raster",
    "raster",
    "recall_curves",
    "score_maps",
    "selection_curves",
    "share_points",
    "site_lag_map",
    "static_curve",
    "step_curves",
    "timeline",
]
