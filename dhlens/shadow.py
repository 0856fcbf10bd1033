"""What taking heads away does to the very next token: any head sets at any steps of an answer, many in one pass.

    e = dh.effects(model, episode, answer, [(3, tail), (3, static), (7, tail)])
    e.table                                         # a row per set: logit, prob, kept, kl, and the clean values
    dh.causal_map(model, episode, answer).kl        # every single head at every step, exact: [step, layer, head]

The prompt and the answer stay clean; a set acts on one step alone, whose query row is the one that predicts the answer
token of that step. Behind the clean rows of the answer each experiment gets a *shadow row* (`dhlens.masks`): the same
token at the same position, seeing what its original sees, edited by its own set. Equal to rewinding and feeding one
edited row at a time, and an order of magnitude faster. A HookedTransformer takes no such masks; there the rows are fed
one by one, slower, with the same results.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor
from tqdm.auto import tqdm

from dhlens.edits import Edit, zero
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.hooks import Hook
from dhlens.limits import check_edit_on, check_episodes
from dhlens.masks import shadow_masks, shadow_positions
from dhlens.model import Model
from dhlens.prefix import prefill
from dhlens.stream import Stream

AtStep = tuple[int, HeadSet]
"""A generation step and the heads to edit there."""


@dataclass(frozen=True, eq=False)
class Effects:
    """The effect of each experiment on the token of its step. "Right" is the answer token of that step."""

    step: Int[Tensor, " n"]
    """Int[n]: the step of each experiment."""
    size: Int[Tensor, " n"]
    """Int[n]: how many heads it edited."""
    logit: Float32[Tensor, " n"]
    """Float32[n]: logit of the right token, edited."""
    logit_clean: Float32[Tensor, " n"]
    """Float32[n]: the same, clean."""
    logprob: Float32[Tensor, " n"]
    """Float32[n]: log-probability of the right token, edited, nats."""
    logprob_clean: Float32[Tensor, " n"]
    """Float32[n]: the same, clean."""
    kept: Bool[Tensor, " n"]
    """Bool[n]: the edited argmax is the clean argmax."""
    kl: Float32[Tensor, " n"]
    """Float32[n]: KL(clean || edited) of the next-token distribution, nats."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per experiment, in the order they were given, with probabilities and differences."""
        columns = {name: getattr(self, name).numpy() for name in self.__dataclass_fields__}
        table = pd.DataFrame(columns)
        table["prob"], table["prob_clean"] = torch.exp(self.logprob).numpy(), torch.exp(self.logprob_clean).numpy()
        table["logit_change"] = table["logit"] - table["logit_clean"]
        return table


@dataclass(frozen=True, eq=False)
class CausalMap:
    """The one-step effect of every single head at every step."""

    logit_change: Float32[Tensor, "step layer head"]
    """Float32[step layer head]: logit of the right token, edited less clean."""
    kl: Float32[Tensor, "step layer head"]
    """Float32[step layer head]: KL(clean || edited), nats."""
    kept: Bool[Tensor, "step layer head"]
    """Bool[step layer head]: the argmax stayed."""


def effects(
    model: Model,
    episode: Episode,
    answer: Int[Tensor, " step"],
    sets: Sequence[AtStep],
    *,
    edit: Edit | None = None,
    rows: int = 256,
    progress: bool = False,
) -> Effects:
    """The one-step effect of each (step, heads) on the token that the answer has at that step.

    Args:
        model: a loaded model.
        episode: the prompt.
        answer: the tokens that are fed and predicted, as generated (`trace.outcomes[i].tokens`).
        sets: experiments, in any order; a set may be empty.
        edit: what happens to the heads; default `zero()`.
        rows: shadow rows per pass: bounds the memory, rows x (vocabulary + keys x heads).
        progress: show a bar.

    Raises:
        ValueError: see `limits.check_episodes`; no experiment, a step outside the answer, heads of another shape.
    """
    _check(model, episode, answer, sets, rows)
    check_edit_on(model, edit or zero())
    _, stream = next(prefill(model, [episode]))
    with tqdm(total=len(sets), desc="effects", unit="set", disable=not progress) as bar:
        return effects_on(model, stream, episode, answer, sets, edit=edit, rows=rows, bar=bar)


def effects_on(
    model: Model,
    stream: Stream,
    episode: Episode,
    answer: Int[Tensor, " step"],
    sets: Sequence[AtStep],
    *,
    edit: Edit | None = None,
    rows: int = 256,
    bar: tqdm | None = None,
) -> Effects:
    """`effects` on a prefilled stream, which is left as it was. Arguments are not checked again."""
    edit = edit or zero()
    order = sorted(range(len(sets)), key=lambda i: sets[i][0])
    start = stream.mark()
    fed = torch.cat([episode.tokens[-1:], answer[:-1]])
    clean = stream.feed(fed[None], hooks=(), keep=len(fed))[0].float().cpu()
    stream.rewind(start)
    one_pass = "shadow_rows" not in model.limits
    parts: list[tuple[Tensor, ...]] = []
    for begin in range(0, len(sets), rows):
        part = [sets[i] for i in order[begin : begin + rows]]
        edited = (_shadow if one_pass else _one_by_one)(model, stream, fed, part, edit)
        stream.rewind(start)
        steps = torch.tensor([s for s, _ in part])
        parts.append(_compare(edited.float().cpu(), clean[steps], answer[steps]))
        if bar is not None:
            bar.update(len(part))
    back = torch.argsort(torch.tensor(order))
    logit, logit_clean, logprob, logprob_clean, kept, kl = (torch.cat(p)[back] for p in zip(*parts, strict=True))
    return Effects(
        step=torch.tensor([s for s, _ in sets]),
        size=torch.tensor([len(h) for _, h in sets]),
        logit=logit,
        logit_clean=logit_clean,
        logprob=logprob,
        logprob_clean=logprob_clean,
        kept=kept,
        kl=kl,
    )


def causal_map(
    model: Model,
    episode: Episode,
    answer: Int[Tensor, " step"],
    *,
    edit: Edit | None = None,
    rows: int = 256,
    progress: bool = True,
) -> CausalMap:
    """Every single head at every step of an answer, exactly: layers x heads x steps experiments.

    Arguments and errors as in `effects`.
    """
    n_layers, n_heads = model.shape
    single = [HeadSet([(layer, head)], model.shape) for layer in range(n_layers) for head in range(n_heads)]
    sets = [(step, heads) for step in range(len(answer)) for heads in single]
    e = effects(model, episode, answer, sets, edit=edit, rows=rows, progress=progress)
    shape = (len(answer), n_layers, n_heads)
    return CausalMap((e.logit - e.logit_clean).reshape(shape), e.kl.reshape(shape), e.kept.reshape(shape))


def _check(model: Model, episode: Episode, answer: Tensor, sets: Sequence[AtStep], rows: int) -> None:
    check_episodes(model, [episode], max_new_tokens=len(answer))
    if not sets or rows < 1:
        raise ValueError(f"effects need at least one experiment and one row per pass, got {len(sets)} and {rows}")
    for step, heads in sets:
        if not 0 <= step < len(answer):
            raise ValueError(f"a step must lie in the answer, 0..{len(answer) - 1}, got {step}")
        if heads.shape != model.shape:
            raise ValueError(f"heads must be of the model's shape {model.shape}, got {heads.shape}")


def feed_shadows(
    model: Model, stream: Stream, fed: Int[Tensor, " row"], sources: Sequence[int], hooks: Sequence[Hook]
) -> Float[Tensor, "n vocab"]:
    """Logits of shadow rows of the rows `sources` of `fed`.

    In the pass they stand behind the plain rows 0..max(sources): the first of them is row max(sources) + 1.
    """
    n_clean = max(sources) + 1
    return stream.feed(
        torch.cat([fed[:n_clean], fed[list(sources)]])[None],
        hooks=hooks,
        keep=len(sources),
        positions=shadow_positions(stream.length, n_clean, sources),
        mask=shadow_masks(stream.length, n_clean, sources, windows=model.windows, dtype=model.dtype),
    )[0]


def _shadow(model: Model, stream: Stream, fed: Tensor, part: Sequence[AtStep], edit: Edit) -> Float[Tensor, "n vocab"]:
    steps, heads = [s for s, _ in part], [h for _, h in part]
    first = max(steps) + 1
    rows = range(first, first + len(part))
    hooks = edit(heads, rows=rows, steps=steps, keys=stream.length + rows.stop)
    return feed_shadows(model, stream, fed, steps, hooks)


def _one_by_one(
    model: Model, stream: Stream, fed: Tensor, part: Sequence[AtStep], edit: Edit
) -> Float[Tensor, "n vocab"]:
    return torch.cat(list(_single_rows(stream, fed, part, edit)))


def _single_rows(stream: Stream, fed: Tensor, part: Sequence[AtStep], edit: Edit) -> Iterator[Tensor]:
    """Feed clean up to each step, then one edited row and back; `part` is in the order of steps."""
    done = 0
    for step, heads in part:
        if step > done:
            stream.feed(fed[None, done:step], hooks=())
            done = step
        here = stream.mark()
        hooks = edit([heads], rows=[0], steps=[step], keys=stream.length + 1)
        yield stream.feed(fed[None, step : step + 1], hooks=hooks)[0]
        stream.rewind(here)


def _compare(
    edited: Float[Tensor, "n vocab"], clean: Float[Tensor, "n vocab"], right: Int[Tensor, " n"]
) -> tuple[Tensor, ...]:
    at = right[:, None]
    p, q = edited.log_softmax(-1), clean.log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1).clamp(min=0)
    kept = edited.argmax(-1) == clean.argmax(-1)
    picked = (t.gather(1, at)[:, 0] for t in (edited, clean, p, q))
    return (*picked, kept, kl)
