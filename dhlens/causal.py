"""What every head does beside where it looks: the exact causal map of one episode's answer, as a table.

    table = causal_table(model, episode)
    kl, active, attention, tokens = causal_arrays(table)
    dh.render.figures.causal_raster(kl, active, tokens)

One row per step and head. Cost: layers x heads x steps shadow rows; `dhlens.causal_map` gives the bare numbers.
"""

import pandas as pd
import torch

from dhlens.edits import Edit
from dhlens.engine import observe
from dhlens.episode import Episode
from dhlens.model import Model
from dhlens.reads import Capture
from dhlens.scores import copy_paste
from dhlens.shadow import causal_map


def causal_table(
    model: Model,
    episode: Episode,
    *,
    span: str = "needle",
    max_new_tokens: int = 48,
    edit: Edit | None = None,
    rows: int = 256,
    progress: bool = True,
) -> pd.DataFrame:
    """Every single head at every step of the answer that the model gives.

    Columns: episode, step, token (text), layer, head, kl (nats), logit_change, kept; active (Eq. 1) and attention (on
    the span's tokens that equal the next one). Arguments and errors as in `dhlens.causal_map`.
    """
    capture = Capture(hidden=(), focus=(span,))
    trace = observe(model, [episode], max_new_tokens=max_new_tokens, capture=capture, progress=False)
    trace = trace.select(trace.answer_rows())
    said = trace.next_token
    whole = causal_map(model, episode, said, edit=edit, rows=rows, progress=progress)
    step, layer, head = torch.cartesian_prod(*map(torch.arange, whole.kl.shape)).unbind(1)
    texts = [model.tokenizer.decode(token) for token in said]
    return pd.DataFrame(
        {
            "episode": episode.id,
            "step": step.numpy(),
            "token": [texts[s] for s in step.tolist()],
            "layer": layer.numpy(),
            "head": head.numpy(),
            "kl": whole.kl.flatten().numpy(),
            "logit_change": whole.logit_change.flatten().numpy(),
            "kept": whole.kept.flatten().numpy(),
            "active": copy_paste(trace, span).heads().flatten().numpy(),
            "attention": copy_paste(trace, span, soft=True).values.flatten().numpy(),
        }
    )
