"""Write docs/supported-models.md: `make supported-models`. Every cell of the matrix is run before."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

from laws import LAWS, ONLY, Case
from tiny import tokenizer
from transformers.utils import logging
from zoo import FALLING_SHORT, KINDS, build

from dhlens.model import load

PAGE = Path(__file__).parents[1] / "docs" / "supported-models.md"
HEAD = """# Supported models

<!-- Written by `make supported-models`; a test fails where this page and the code part. -->

Every model is checked on a few tokens when it is loaded (`dhlens.check`), whatever its kind. The kinds below are proven
further, on small random models built from the config classes of the real ones with their head topology (grouped or
full attention, norms, biases, tied embeddings, rope scaling), against the plain Hugging Face model.

**Only SmolLM2-135M-Instruct (`smollm2-135m`) has been run with its real weights.** No other model named here was:
their weights were not at hand. What a row proves is the arithmetic of its kind, not that a model finds needles.

## What holds

{table}

✓ holds; – does not arise. The laws, float32 unless said otherwise:

{laws}

## What each cannot do

{limits}

Of every model: prompt and answer together must fit its positions, and longer ones are refused before any pass, with
both numbers. Stop tokens come from the generation config, prompts from the tokenizer's chat template; its options go
through `template_kwargs=` (`dhlens scan --template-kwargs '{{"enable_thinking": false}}'`, or `date_string` where a
template would write today's date).

## What loads with limits

Passed by the self-check, not part of the matrix.

{limited}

## What is refused at load

{refused}

HookedTransformer models of TransformerLens 3.9 have a [page of their own](hooked-transformer.md).
"""


def page() -> str:
    """The text, from the matrix and from what `load` says."""
    cells = {name: ["✓" if name in ONLY.get(law, KINDS) else "–" for law in LAWS] for name in KINDS}
    rows = [[kind.title, *cells[name]] for name, kind in KINDS.items()]
    head = ["kind", *LAWS]
    lines = [head, ["---", *[":-:"] * len(LAWS)], *rows]
    limited, refused = shortfalls()
    return HEAD.format(
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        laws=listed({f"**{name}**": first_line(law) for name, law in LAWS.items()}),
        limits=listed({short(kind.title): kind.limits for kind in KINDS.values() if kind.limits}),
        limited=listed(limited),
        refused=listed(refused),
    )


def shortfalls() -> tuple[dict[str, str], dict[str, str]]:
    """What loads with limits, and what not at all: kind to reason."""
    limited: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in FALLING_SHORT:
        try:
            model = load(build(name), tokenizer=tokenizer())
        except ValueError as error:
            refused[name] = str(error)
            continue
        reasons = list(model.limits.values())
        if model.twin is None:
            reasons.append("no fused attention: everything goes through the hooked model, slower")
        limited[name] = "; ".join(reasons)
    return limited, refused


def listed(lines: dict[str, str]) -> str:
    told = {name: re.sub(r"^(\w+) \(\1\):? ", "", text) for name, text in lines.items()}  # a class, named twice
    return "\n".join(f"- {name}: {text.rstrip('.')}." for name, text in told.items())


def first_line(law: Callable[[Case], None]) -> str:
    return (law.__doc__ or "").partition("\n")[0]


def short(title: str) -> str:
    return title.partition(":")[0]


if __name__ == "__main__":
    warnings.simplefilter("error")
    logging.set_verbosity_error()
    for name in KINDS:
        case = Case(name)
        for law in LAWS:
            if name in ONLY.get(law, KINDS):
                LAWS[law](case)
    PAGE.write_text(page())
