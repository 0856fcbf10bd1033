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
from dhlens.engine import generate, observe, replay
from dhlens.episode import Episode, Outcome, Span
from dhlens.executor import Processes
from dhlens.heads import HeadSet
from dhlens.model import Model, load
from dhlens.prefix import prefill
from dhlens.reads import Capture
from dhlens.scores import Score, copy_paste, reasoning_mass
from dhlens.store import load_trace, save_trace
from dhlens.trace import Trace
from dhlens.wu import copy_paste_wu, read_head_scores

__all__ = [
    "Capture",
    "Dynamics",
    "Episode",
    "HeadSet",
    "Model",
    "Outcome",
    "Processes",
    "RunCard",
    "Score",
    "Span",
    "Trace",
    "copy_paste",
    "copy_paste_wu",
    "dynamics",
    "generate",
    "load",
    "load_trace",
    "observe",
    "prefill",
    "read_head_scores",
    "reads",
    "reasoning_mass",
    "recipes",
    "render",
    "replay",
    "save_trace",
]
