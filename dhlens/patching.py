"""Activation patching by step: which activations carry the answer over from one prompt to another.

    twin = niah.twin(model.tokenizer, clean, seed=0)
    dh.patch_effects(model, clean, twin).values          # [step position layer head]: 0 the twin's run, 1 the clean one
    dh.patch_effects(model, clean, twin, site="v", positions="needle", together=True, direction="noise").table

Two prompts of equal length differ in one fact, and each is fed its own answer. "denoise" runs the twin with activations
of the clean prompt put in (what is enough to bring the clean answer?), "noise" the clean prompt with those of the twin
(what is needed for it?). Exact, and nothing is run twice up to the first patched position:

1. A patch in the row that predicts its own step (the default) is a shadow row: hundreds share one pass.
2. A patch at an earlier position is a lane that runs from there to the last step and answers for all steps at once.

Cost: one hooked row per step, layer and head (1), or as many as lie between the position and the last step per
position, layer and head (2), all of them past a change of position factors (longrope). A long span is dear one by one:
patch it `together` first. `dh.causal_map` asks without a twin; `transformer_lens.patching` patches these sites and
more, and runs the whole sequence for every patch.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float32, Int
from torch import Tensor
from tqdm.auto import tqdm

from dhlens import hooks as sites
from dhlens.episode import Episode
from dhlens.limits import check_episodes
from dhlens.model import Model
from dhlens.prefix import prefill
from dhlens.stream import attached
from dhlens.transplant import Task, by_lanes, by_shadows, measure, read

SITES = {"z": sites.z, "q": sites.q, "k": sites.k, "v": sites.v, "resid_pre": sites.resid_pre}
"""Site to its hook name by layer: head outputs; queries, keys and values as projected, before any norm or rotation; the
residual stream that enters the layer."""

Answers = tuple[Int[Tensor, " clean"], Int[Tensor, " twin"]]


@dataclass(frozen=True, eq=False)
class Patching:
    """How each patch moved the logit of the clean token over that of the twin's, by step."""

    site: str
    """What was patched, one of `SITES`."""
    direction: str
    """Either "denoise" or "noise"."""
    step: Int[Tensor, " step"]
    """Int[step]: the generation steps."""
    position: Int[Tensor, "step position patched"]
    """Int[step position patched]: absolute positions; those along the last axis were patched at once."""
    metric: Float32[Tensor, "step position layer head"]
    """Float32[step position layer head]: logit of the clean token less that of the twin's, patched. Heads are key/value
    heads for "k" and "v" of a grouped-query model; "resid_pre" counts as one head."""
    metric_clean: Float32[Tensor, " step"]
    """Float32[step]: the same in the clean run."""
    metric_twin: Float32[Tensor, " step"]
    """Float32[step]: the same in the twin's run."""

    @property
    def values(self) -> Float32[Tensor, "step position layer head"]:
        """The metric on a scale where the twin's run is 0 and the clean run 1, whatever the direction.

        It means little at a step where `metric_clean` and `metric_twin` hardly differ.
        """
        twin, clean = (m[:, None, None, None] for m in (self.metric_twin, self.metric_clean))
        return (self.metric - twin) / (clean - twin)

    @property
    def table(self) -> pd.DataFrame:
        """One row per step, position, layer and head; `position` is the first of the `patched` many."""
        i, j, layer, head = torch.cartesian_prod(*map(torch.arange, self.metric.shape)).unbind(1)
        columns = {
            "step": self.step[i],
            "position": self.position[i, j, 0],
            "layer": layer,
            "head": head,
            "value": self.values.flatten(),
            "metric": self.metric.flatten(),
            "metric_clean": self.metric_clean[i],
            "metric_twin": self.metric_twin[i],
        }
        table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        return table.assign(site=self.site, direction=self.direction, patched=self.position.shape[2])


def patch_effects(
    model: Model,
    clean: Episode,
    twin: Episode,
    *,
    answers: Answers | None = None,
    site: str = "z",
    positions: str | Sequence[int] | None = None,
    together: bool = False,
    steps: Sequence[int] | None = None,
    direction: str = "denoise",
    rows: int = 256,
    progress: bool = True,
) -> Patching:
    """Patch every layer and head of a site, one at a time.

    Args:
        model: a loaded model.
        clean: the prompt.
        twin: its counterfactual, a prompt of equal length (`niah.twin`).
        answers: what each is fed and measured by; default their own `answer`.
        site: "z", "q", "k", "v" or "resid_pre".
        positions: where to patch: absolute positions or the name of a span; default each step's own row, which predicts
            its token.
        together: patch all `positions` at once instead of one by one.
        steps: the steps to measure; default all at which the answers differ.
        direction: "denoise" or "noise".
        rows: rows per pass, over all lanes: bounds the memory, rows x (vocabulary + keys x heads).
        progress: show a bar.

    Raises:
        ValueError: see `limits.check_episodes`; prompts of unequal length, steps without a metric, positions that no
            step can feel, a site that the model lacks, an unknown word.
    """
    _check(model, site, direction, rows)
    said = (clean.answer, twin.answer) if answers is None else answers
    chosen = _steps(model, clean, twin, said, steps)
    row = torch.tensor(chosen) + len(clean.tokens) - 1
    where = _where(clean, positions, row, together=together)
    runs = [
        dataclasses.replace(e, tokens=torch.cat([e.tokens, y[: max(chosen)]]))
        for e, y in zip((clean, twin), said, strict=True)
    ]
    task = Task(model, SITES[site], where, row, said[0][chosen], said[1][chosen], len(runs[0].tokens))
    streams = dict(prefill(model, runs, upto=[task.start(int(where.min()))] * 2))
    source, target = (0, 1) if direction == "denoise" else (1, 0)
    found, plain = read(task, streams[source], runs[source].tokens)
    untouched = measure(task, streams[target].fork(), runs[target].tokens, lambda start, stop: [])[0]
    metric = torch.empty(*where.shape[:2], *found.shape[1:3])
    in_passes = by_shadows if task.own_rows and "shadow_rows" not in model.limits else by_lanes
    with tqdm(total=metric.numel(), desc="patching", unit="patch", disable=not progress) as bar:
        for place, patched in in_passes(task, streams[target], runs[target].tokens, found, rows):
            metric[place] = patched
            bar.update(patched.numel())
    ends = {source: plain, target: untouched}
    return Patching(site, direction, torch.tensor(chosen), where, metric, ends[0], ends[1])


def _check(model: Model, site: str, direction: str, rows: int) -> None:
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {site!r}")
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction must be 'denoise' or 'noise', got {direction!r}")
    if rows < 1:
        raise ValueError(f"rows must be at least 1 per pass, got {rows}")
    with attached(model.hooked, [(SITES[site](layer), lambda x, hook: None) for layer in range(model.n_layers)]):
        pass  # refuses a site that the model lacks


def _steps(model: Model, clean: Episode, twin: Episode, answers: Answers, steps: Sequence[int] | None) -> list[int]:
    """The steps to measure, once prompts and answers are in order."""
    if len(clean.tokens) != len(twin.tokens):
        raise ValueError(f"prompts must be of equal length, got {len(clean.tokens)} and {len(twin.tokens)} tokens")
    n = min(map(len, answers))
    check_episodes(model, [clean, twin], max_new_tokens=n)
    y, other = (a[:n].tolist() for a in answers)
    if any(not 0 <= token < model.hooked.cfg.d_vocab for token in (*y, *other)):
        raise ValueError(f"answers must hold token ids within 0..{model.hooked.cfg.d_vocab - 1}")
    chosen = [s for s in range(n) if y[s] != other[s]] if steps is None else [int(s) for s in steps]
    if not chosen:
        raise ValueError(f"there must be a step at which the answers differ, got none in {n} tokens")
    for s in chosen:
        if not 0 <= s < n:
            raise ValueError(f"a step must lie in both answers, 0..{n - 1}, got {s}")
        if y[s] == other[s]:
            words = " and ".join(f"{t} {model.tokenizer.decode([t])!r}" for t in (y[s], other[s]))
            raise ValueError(f"the answers must differ at a step that is measured, got {words} at step {s}")
    return chosen


def _where(
    clean: Episode, positions: str | Sequence[int] | None, row: Int[Tensor, " step"], *, together: bool
) -> Int[Tensor, "step position patched"]:
    if positions is None:
        return row[:, None, None]
    if isinstance(positions, str):
        span = clean.span(positions)
        positions = range(span.start, span.stop)
    chosen = list(positions)
    last = int(row.min())
    if not chosen or min(chosen) < 0 or max(chosen) > last:
        got = f"{min(chosen)}..{max(chosen)}" if chosen else "none"
        raise ValueError(f"positions must lie within 0..{last}, the row of the earliest step, got {got}")
    return torch.tensor(chosen).reshape((1, 1, -1) if together else (1, -1, 1)).repeat(len(row), 1, 1)
