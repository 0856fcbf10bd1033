"""dhlens: find, change, predict and show dynamic retrieval heads, on TransformerLens.

import dhlens as dh
from dhlens.tasks import niah

model = dh.load("smollm2-135m")
episodes = niah.episodes(model.tokenizer, lengths=(500,), n=4)
trace = dh.observe(model, episodes)
print(dh.dynamics(dh.copy_paste(trace)))
"""

from dhlens import edits, hooks, reads, recipes, render
from dhlens.agreement import agreement_table, causal_arrays, rank_agreement
from dhlens.card import RunCard
from dhlens.causal import causal_table
from dhlens.compare import Comparison, compare
from dhlens.controls import OtherEpisode, OtherStep, RandomLike, StaticLike, sized_policies, standard_policies
from dhlens.detectors import attention_mass, headkv_r2, qr_ndcg, qr_score, query_episodes
from dhlens.dynamics import Dynamics, dynamics
from dhlens.edits import hide, mean, patch, resample, uniform, zero
from dhlens.engine import generate, observe, replay
from dhlens.episode import Episode, Outcome, Span, split_episodes
from dhlens.executor import Processes
from dhlens.fitting import fit_probe
from dhlens.heads import HeadSet
from dhlens.lagged import lagged_cca
from dhlens.lanes import Lane, decode
from dhlens.model import Model, load
from dhlens.patching import Patching, patch_effects
from dhlens.plan import Plan, plan
from dhlens.policies import Dynamic, Policy, Static, StepView
from dhlens.predicted import Predicted
from dhlens.prefix import prefill
from dhlens.probe import Probe
from dhlens.reads import Capture
from dhlens.render.player import Player, player
from dhlens.scores import Score, copy_paste, copy_rank, reasoning_mass
from dhlens.shadow import causal_map, effects
from dhlens.spellings import read_head_scores, read_head_set, write_head_scores, write_head_set
from dhlens.store import load_trace, save_trace
from dhlens.trace import Trace
from dhlens.wu import copy_paste_wu

__all__ = [
    "Capture",
    "Comparison",
    "Dynamic",
    "Dynamics",
    "Episode",
    "HeadSet",
    "Lane",
    "Model",
    "OtherEpisode",
    "OtherStep",
    "Outcome",
    "Patching",
    "Plan",
    "Player",
    "Policy",
    "Predicted",
    "Probe",
    "Processes",
    "RandomLike",
    "RunCard",
    "Score",
    "Span",
    "Static",
    "StaticLike",
    "StepView",
    "Trace",
    "agreement_table",
    "attention_mass",
    "causal_arrays",
    "causal_map",
    "causal_table",
    "compare",
    "copy_paste",
    "copy_paste_wu",
    "copy_rank",
    "decode",
    "dynamics",
    "edits",
    "effects",
    "fit_probe",
    "generate",
    "headkv_r2",
    "hide",
    "hooks",
    "lagged_cca",
    "load",
    "load_trace",
    "mean",
    "observe",
    "patch",
    "patch_effects",
    "plan",
    "player",
    "prefill",
    "qr_ndcg",
    "qr_score",
    "query_episodes",
    "rank_agreement",
    "read_head_scores",
    "read_head_set",
    "reads",
    "reasoning_mass",
    "recipes",
    "render",
    "replay",
    "resample",
    "save_trace",
    "sized_policies",
    "split_episodes",
    "standard_policies",
    "uniform",
    "write_head_scores",
    "write_head_set",
    "zero",
]
