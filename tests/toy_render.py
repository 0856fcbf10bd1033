"""A Trace worked by hand for the renderers: an answer that copies its needle, 3 layers x 4 heads.

Head L1H2 looks at the needle token that comes next at every step, L0H1 does so at even steps; all others look at
token 0.
"""

import torch

from dhlens.card import RunCard
from dhlens.episode import Episode, Outcome, Span
from dhlens.scores import Score, copy_paste
from dhlens.trace import Trace

LAYERS, HEADS, K = 3, 4, 2


def toy_trace(prompt: int = 60, start: int = 20, answer: int = 5, *, rows: bool = False, focus: bool = False) -> Trace:
    """Prompt tokens are 1000 + position; the answer repeats the tokens from `start`."""
    tokens = 1000 + torch.arange(prompt)
    emitted = tokens[start : start + answer].clone()
    step = torch.arange(answer)
    looking = torch.zeros(answer, LAYERS, HEADS, dtype=torch.bool)
    looking[:, 1, 2] = True
    looking[::2, 0, 1] = True
    key = torch.zeros(answer, LAYERS, HEADS, K, dtype=torch.long)
    key[..., 0] = torch.where(looking, (start + step)[:, None, None], 0)
    key[..., 1] = 1
    weight = torch.tensor([0.75, 0.125]).expand(answer, LAYERS, HEADS, K).contiguous()
    position = prompt - 1 + step
    zeros = torch.zeros(answer)
    mass = torch.zeros(answer, 3, LAYERS, HEADS)
    whole = torch.zeros(answer, LAYERS, HEADS, prompt + answer)
    whole.scatter_(3, key, weight)
    return Trace(
        episodes=(Episode("toy", tokens, emitted, (Span("needle", start, start + answer),), {"group": "a"}),),
        outcomes=(Outcome(emitted, "answer", True, "max_new_tokens"),),
        card=RunCard(model="toy", versions={}),
        episode=torch.zeros(answer, dtype=torch.long),
        step=step,
        position=position,
        fed=torch.cat([tokens[-1:], emitted[:-1]]),
        next_token=emitted,
        argmax=emitted,
        logprob=zeros,
        entropy=zeros,
        peak_key=key,
        peak_token=tokens[key],
        peak_weight=weight,
        span_names=("needle", "prompt", "all"),
        mass=mass,
        mass_core=mass,
        focus_key=torch.arange(start, start + answer).expand(answer, answer).contiguous() if focus else None,
        focus=torch.full((answer, LAYERS, HEADS, answer), 0.0625, dtype=torch.float16) if focus else None,
        rows=whole.half() if rows else None,
    )


def toy_score(**options: int) -> Score:
    """Eq. 1 on the toy: L1H2 fires at every step, L0H1 at even ones."""
    return copy_paste(toy_trace(**options), "needle")
