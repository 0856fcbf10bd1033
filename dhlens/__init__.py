"""dhlens: find, change, predict and show dynamic retrieval heads, on TransformerLens.

import dhlens as dh
from dhlens.tasks import niah

model = dh.load("smollm2-135m")
episodes = niah.episodes(model.tokenizer, lengths=(500,), n=4)
trace = dh.observe(model, episodes)
print(dh.dynamics(dh.copy_paste(trace)))
"""

from dhlens import reads, recipes, render
from dhlens.card import RunCard
from dhlens.dynamics import Dynamics, dynamics
from dhlens.edits import hide, mean, patch, resample, uniform, zero
from dhlens.engine import generate, observe, replay
from dhlens.episode import Episode, Outcome, Span
from dhlens.executor import Processes
from dhlens.heads import HeadSet
from dhlens.lanes import Lane, decode
from dhlens.model import Model, load
from dhlens.policies import Dynamic, OtherEpisode, OtherStep, Policy, RandomLike, Static, StepView
from dhlens.prefix import prefill
from dhlens.reads import Capture
from dhlens.scores import Score, copy_paste, reasoning_mass
from dhlens.shadow import causal_map, effects
from dhlens.store import load_trace, save_trace
from dhlens.trace import Trace
from dhlens.wu import copy_paste_wu, read_head_scores

__all__ = [
    "Capture",
    "Dynamic",
    "Dynamics",
    "Episode",
    "HeadSet",
    "Lane",
    "Model",
    "OtherEpisode",
    "OtherStep",
    "Outcome",
    "Policy",
    "Processes",
    "RandomLike",
    "RunCard",
    "Score",
    "Span",
    "Static",
    "StepView",
    "Trace",
    "causal_map",
    "copy_paste",
    "copy_paste_wu",
    "decode",
    "dynamics",
    "effects",
    "generate",
    "hide",
    "load",
    "load_trace",
    "mean",
    "observe",
    "patch",
    "prefill",
    "read_head_scores",
    "reads",
    "reasoning_mass",
    "recipes",
    "render",
    "replay",
    "resample",
    "save_trace",
    "uniform",
    "zero",
]
