"""The pictures of an ablation: which of the figures go into its report, each with its caption."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from dhlens.agreement import causal_arrays
from dhlens.render import ablation
from dhlens.render.conditions import compared_by


def ablation_pictures(tables: Mapping[str, pd.DataFrame]) -> dict[str, tuple[Figure, str]]:
    """Title to figure and caption; a picture that would have nothing to show is left out.

    `tables` are those of `dhlens.recipes.ablate`.
    """
    found: dict[str, tuple[Figure, str]] = {}
    answers = tables["answers"]
    plain = answers.loc[answers["k"].isna()]
    if "summary" in tables:
        summary = tables["summary"]
        table, by = summary.loc[summary["k"].isna()], compared_by(summary)
        what = "Right answers" if by == "accuracy" else "F1 of answers"
        found["What is left"] = (
            ablation.effect_dots(table),
            f"{what}, and the one-step effects on the tokens of the clean answer, with 95 % intervals over "
            f"{'haystack windows. Episodes that the untouched model answers' if by == 'accuracy' else 'questions'}.",
        )
        if len(set(table["edit"])) > 2 or len(set(table["commit"])) > 2:
            found["Atlas"] = (
                ablation.atlas(table),
                f"{what}, and heads edited at a step.",
            )
    if "contrasts" in tables:
        pairs = tables["contrasts"]
        found["Contrasts"] = (
            ablation.contrast_forest(pairs.loc[pairs["edit"] == pairs["edit"].iloc[0]]),
            "Paired differences under the first edit; primary ones were fixed beforehand, the others' p is after Holm.",
        )
    if "sweep" in tables:
        sweep = tables["sweep"]
        found["How many heads"] = (
            ablation.k_sweep(sweep),
            "What is left of answers with k heads taken away at every step, and the effect on one next token alone.",
        )
        if len(sweep.dropna(subset=["comp_max"])):
            found["Compensation"] = (
                ablation.compensation(sweep),
                "Static heads that are active only once others are taken away: most at a step, and mean over steps.",
            )
    if "causal" in tables:
        kl, active, _, tokens = causal_arrays(tables["causal"])
        found["Every head, every step"] = (
            ablation.causal_raster(kl, active, tokens),
            f"Left what zeroing one head does to the next token, right the heads that copy it. {_agreement(tables)}",
        )
    placed = plain.dropna(subset=["length", "depth"])
    if len(placed.drop_duplicates(["length", "depth"])) > 1:
        edit, commit = ([x for x in dict.fromkeys(placed[name]) if x != "none"][:1] for name in ("edit", "commit"))
        first = placed.loc[placed["edit"].isin(["none", *edit]) & placed["commit"].isin(["none", *commit])]
        f1 = compared_by(tables.get("summary", answers.iloc[:0, :0])) == "f1"
        found["Length and depth"] = (
            ablation.answer_grids(first, "f1" if f1 else "correct"),
            f"{'F1 of answers' if f1 else 'Right answers'}, all episodes{_under(edit)}.",
        )
    return found


def _agreement(tables: Mapping[str, pd.DataFrame]) -> str:
    table = tables["agreement"]
    mean, n = table.mean(numeric_only=True), table["episode"].nunique()
    return (
        f"Mean over {len(table)} steps of {n} answer{'s' * (n > 1)}: rank correlation of effect and attention "
        f"{mean['spearman']:.2f}; of the heads that matter most, as many as are active, "
        f"{mean['precision_at_active']:.0%} are active ({mean['chance']:.0%} by chance)."
    )


def _under(edit: list[str]) -> str:
    return f", heads under {edit[0]}" if edit else ""
