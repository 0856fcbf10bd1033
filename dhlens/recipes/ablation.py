"""The second experiment: take the heads of each step away, and as many others, and see what is left of the answer.

    fit, held = dh.observe(model, episodes, capture=dh.Capture(z=True)).split(0.5, seed=0)
    result = dh.recipes.ablate(model, held.episodes, standard_policies(fit, seed=0), edit={"zero": dh.zero()})
    print(result.summary())
    result.report().save("report.html")

For every episode: (1) observe its clean answer; (2) under every policy and edit, the one-step effect on each token of
that answer, nothing else touched (`dhlens.effects`); (3) under every policy, edit and commit, the whole answer
(`dhlens.decode`). With `out=` the run is a folder that is resumed after a kill, one file per episode. Cost: two hooked
rows per lane and step: one to two seconds per condition and UUID episode for SmolLM2 on one core.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dhlens import contrasts
from dhlens.agreement import agreement_table
from dhlens.card import RunCard
from dhlens.causal import causal_table
from dhlens.edits import Edit, zero
from dhlens.engine import observation_card
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.model import Model
from dhlens.policies import Policy, score_key
from dhlens.prefix import prefill
from dhlens.render import Report, report
from dhlens.render.ablate import ablation_pictures
from dhlens.scores import Scoring
from dhlens.store import Run
from dhlens.tables import compact
from dhlens.trial import PerEpisode, Plan, check_plan, conditions_of, parted, trial

_SHOWN = {
    "summary": ["n", "groups"],
    "contrasts": ["p_mcnemar", "least", "n", "groups"],
    "sweep": ["n"],
}
"""Tables that are printed and stand in the report, each with the columns that are left to the parquet file."""


@dataclass(frozen=True, eq=False)
class Ablation:
    """What an ablation found. All tables follow from `answers` and `steps`."""

    answers: pd.DataFrame
    """One row per episode and condition (policy, k, edit, commit): text, correct, rouge_l, em, f1, steps, heads (mean
    at a step), comp_max, comp_mean, comp_steps (newly active static heads), answered (untouched, it is right)."""
    steps: pd.DataFrame
    """One row per episode, policy, k, edit and step of the clean answer: heads, active (those of them that copy at this
    very step), logit_change, prob, prob_clean, kl (nats), kept."""
    card: RunCard
    """Where the numbers come from."""
    causal: pd.DataFrame | None = None
    """Every single head at every step of some answered episodes, as `dhlens.causal.causal_table` gives it."""
    primary: tuple[str, str] = ("dynamic", "static")
    """The pair whose contrast was fixed beforehand."""
    seed: int = 0
    """Of the bootstrap and the permutations."""
    folder: Path | None = None
    """Where the run lies, if on disk."""
    by: str = "accuracy"
    """What answers are compared by, of `dhlens.contrasts.MEASURES`."""

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By name: answers and steps, and what follows from them.

        summary, contrasts and sweep count, by accuracy, the episodes that the untouched model answered, and by F1 all;
        causal and agreement are of causal maps.
        """
        all_count = self.by != "accuracy"
        counted = [t.loc[t["answered"].astype(bool) | all_count] for t in (self.answers, self.steps)]
        found = {"answers": self.answers, "steps": self.steps}
        if len(counted[0]):
            found["summary"] = contrasts.summary(*counted, by=self.by, seed=self.seed)
            found["contrasts"] = contrasts.contrasts(*counted, primary=self.primary, by=self.by, seed=self.seed)
            found["sweep"] = contrasts.sweep(*counted, by=self.by, seed=self.seed)
        if self.causal is not None:
            found |= {"causal": self.causal, "agreement": agreement_table(self.causal)}
        return {name: table for name, table in found.items() if len(table) or name in ("answers", "steps")}

    def notes(self) -> list[str]:
        """What was ablated, and what the contrasts say, in sentences."""
        episodes = self.answers.drop_duplicates("episode")
        right = int(np.count_nonzero(episodes["answered"]))
        lines = [f"{right} of {len(episodes)} episodes answered untouched, {episodes['group'].nunique()} windows."]
        if "summary" not in self.tables:
            return [*lines, "Nothing to compare: the untouched model answered none."]
        pairs = self.tables.get("contrasts")
        return [*lines, *contrasts.in_words(self.tables["summary"], pairs, self.primary, by=self.by)]

    def summary(self) -> str:
        """Notes, summary, contrasts and sweep, as text."""
        return "\n\n".join([*self.notes(), *(t.to_string(index=False) for t in self._shown().values())])

    def measures(self) -> pd.DataFrame:
        """What two ablations are compared by: the measures of answers, kept and kl by condition.

        Raises:
            ValueError: the untouched model gave no right answer.
        """
        if "summary" not in self.tables:
            raise ValueError("there is nothing to compare: the untouched model gave no right answer")
        table = self.tables["summary"].set_index(contrasts.CONDITION)
        return table.loc[:, [*contrasts.MEASURES[self.by], "kept", "kl"]]

    def values(self) -> dict[str, Any]:
        """Summary, contrasts and sweep as JSON values."""
        texts = {name: self.tables[name].to_json(orient="records") for name in _SHOWN if name in self.tables}
        return {name: json.loads(text or "[]") for name, text in texts.items()}

    def figures(self) -> dict[str, tuple[Figure, str]]:
        """The pictures of the report, each with its caption; those that have nothing to show are left out."""
        return ablation_pictures(self.tables)

    def report(self) -> Report:
        """One self-contained HTML page."""
        title = f"Taking heads away from {self.card.model}"
        shown = {"tables": self._shown(), "figures": self.figures(), "notes": self.notes()}
        return report(title, **shown, card=self.card, max_rows=100)

    def _shown(self) -> dict[str, pd.DataFrame]:
        known = {name: left for name, left in _SHOWN.items() if name in self.tables}
        return {name: compact(self.tables[name].drop(columns=left), digits=2) for name, left in known.items()}

    @classmethod
    def load(cls, folder: str | Path) -> "Ablation":
        """A finished ablation from its folder.

        Raises:
            ValueError: no run there, not finished, or not an ablation.
        """
        run = Run.read(folder)
        tables, settings = run.tables(), run.card.settings
        if settings.get("recipe") != "ablate":
            raise ValueError(f"{folder} is no ablation: it holds {', '.join(tables)}")
        first, second = settings["primary"]
        return cls(
            tables["answers"],
            tables["steps"],
            run.card,
            tables.get("causal"),
            (first, second),
            settings["stats_seed"],
            run.folder,
            settings.get("by", "accuracy"),
        )


def ablate(
    model: Model,
    episodes: Sequence[Episode],
    policies: Mapping[str, Policy | Mapping[int | None, Policy | None] | None],
    *,
    edit: Edit | PerEpisode | Mapping[str, Edit | PerEpisode] | None = None,
    commit: str | Sequence[str] = "edited",
    static: HeadSet | None = None,
    span: str = "needle",
    score: Scoring | None = None,
    by: str = "accuracy",
    prompt: bool = False,
    primary: tuple[str, str] = ("dynamic", "static"),
    max_new_tokens: int = 48,
    causal_maps: int = 0,
    batch: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Ablation:
    """Answer every episode under every policy, edit and commit, and measure each step's effect by itself.

    Args:
        model: a loaded model.
        episodes: prompts with known answers, of other haystack windows than static heads were fitted on.
        policies: name to policy, None for the untouched model, or {k: policy} for one run at several sizes (k None:
            of no fixed size).
        edit: what happens to the heads, default `zero()`; several by name; `PerEpisode` where it is made anew for each.
        commit: "edited", "clean" or both; see `dhlens.lanes`.
        static: heads whose new activity counts as compensation.
        span: where the answer is copied from: which heads are active.
        score: another score of yes and no that says so, such as `dhlens.reasoning.ReasoningHeads`.
        by: what answers are compared by: "accuracy", of episodes that the untouched model answers, or "f1", of all.
        prompt: edit the prompt's rows as well; needs policies that read nothing.
        primary: the two policies whose contrast is fixed beforehand.
        max_new_tokens: most answer tokens.
        causal_maps: of how many answered episodes, the first ones, every single head is tried at every step.
        batch: most lanes at once.
        seed: of the bootstrap and the permutations; policies and edits have their own.
        out: folder of the run; begun, resumed or, if finished with the same settings, read. Its card knows policies and
            edits by what they were made of; functions of your own by their names, so give each its own.
        progress: show a bar.

    Raises:
        ValueError: see `limits.check_episodes`, `dhlens.decode` and `store.Run.open`; no policy, a size beyond the
            model's heads, static heads of another shape, an episode without the span, another `by`.
        TypeError: `policies` is no mapping, or a policy something else.

    Source: arXiv 2602.11162, section 4, figures 2 and 3; the paper leaves edit, commit and the controls open.
    """
    if not isinstance(policies, Mapping):
        raise TypeError(f'policies must be {{name: policy}}, such as {{"dynamic": dh.Dynamic()}}, got {policies!r}')
    edits = edit if isinstance(edit, Mapping) else {_name_of(edit): edit or zero()}
    commits = [commit] if isinstance(commit, str) else list(commit)
    if causal_maps < 0:
        raise ValueError(f"causal_maps must be a number of episodes, at least 0, got {causal_maps}")
    if by not in contrasts.MEASURES:
        raise ValueError(f"answers are compared by {' or '.join(contrasts.MEASURES)}, got {by!r}")
    conditions = conditions_of(policies, edits)
    plan = Plan(conditions, edits, commits, static, span, prompt, max_new_tokens, batch, score)
    check_plan(model, episodes, plan)
    card = _card(model, episodes, plan, primary=list(primary), causal_maps=causal_maps, stats_seed=seed)
    if score is not None or by != "accuracy":
        card = card.with_settings(score=score_key(score), by=by)
    run = None if out is None else Run.open(out, card)
    if run is not None and run.finished:
        return Ablation.load(run.folder)
    with run.alone() if run else nullcontext():
        parts = dict(_trials(model, episodes, plan, card, run, progress=progress))
        whole = pd.concat([parts[i] for i in range(len(episodes))], ignore_index=True)
        maps = _causal_maps(model, episodes, whole, plan, run, causal_maps, progress=progress)
        result = Ablation(*parted(whole), card, maps, primary, seed, run.folder if run else None, by)
        if run:
            run.finish(result.tables, texts={"report.html": result.report().html, "summary.txt": result.summary()})
    return result


def _trials(
    model: Model, episodes: Sequence[Episode], plan: Plan, card: RunCard, run: Run | None, *, progress: bool
) -> Iterator[tuple[int, pd.DataFrame]]:
    """Each episode's table: read where the run has it, else made and kept."""
    left = []
    for i, e in enumerate(episodes):
        if run and run.done(e.id):
            yield i, run.load_part(e.id)
        else:
            left.append(i)
    done = len(episodes) - len(left)
    bar = tqdm(total=len(episodes), initial=done, desc="ablate", unit="episode", disable=not progress)
    for i, stream in prefill(model, episodes, only=left) if left else ():
        table = trial(model, stream, episodes[i], plan, card)
        if run:
            run.save_part(episodes[i].id, table)
        yield i, table
        bar.update()
    bar.close()


def _causal_maps(
    model: Model,
    episodes: Sequence[Episode],
    whole: pd.DataFrame,
    plan: Plan,
    run: Run | None,
    n: int,
    *,
    progress: bool,
) -> pd.DataFrame | None:
    """Causal maps of the first `n` episodes that the untouched model answered, zeroing single heads."""
    right = set(whole.loc[whole["answered"], "episode"])
    parts = []
    for e in [e for e in episodes if e.id in right][:n]:
        name = f"{e.id}=causal"
        if run and run.done(name):
            parts.append(run.load_part(name))
            continue
        parts.append(causal_table(model, e, span=plan.span, max_new_tokens=plan.max_new_tokens, progress=progress))
        if run:
            run.save_part(name, parts[-1])
    return pd.concat(parts, ignore_index=True) if parts else None


def _name_of(edit: Any) -> str:
    return "zero" if edit is None else str(getattr(edit, "__name__", type(edit).__name__))


def _card(model: Model, episodes: Sequence[Episode], plan: Plan, **settings: Any) -> RunCard:
    card = observation_card(model, capture=plan.capture, max_new_tokens=plan.max_new_tokens).with_episodes(episodes)
    policies = {c.key: f"{c.chosen.name} ({c.chosen.key})" if c.chosen else "untouched" for c in plan.conditions}
    return card.with_settings(
        recipe="ablate",
        conditions=policies,
        edits={name: str(getattr(edit, "key", "")) for name, edit in plan.edits.items()},
        commits=list(plan.commits),
        edit_prompt=plan.prompt,
        static=[list(head) for head in plan.static] if plan.static else None,
        span=plan.span,
        **settings,
    )
