"""What cannot be run, refused in the caller's words before any forward pass."""

from collections import Counter
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from dhlens import hooks as sites
from dhlens.edits import Edit, check_edit
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.model import Model
from dhlens.prefix import straddles


def check_episodes(model: Model, episodes: Sequence[Episode], *, max_new_tokens: int) -> None:
    """Refuse what cannot be run, before any forward pass.

    Raises:
        ValueError: no episodes, doubled ids, tokens outside the vocabulary, prompt and answer beyond the model's
            positions, or position factors that change on the way (`rope_breaks`).
    """
    if not episodes:
        raise ValueError("there must be at least one episode, got none")
    doubled = [name for name, n in Counter(e.id for e in episodes).items() if n > 1]
    if doubled:
        raise ValueError(f"episode ids must be unique, got {doubled[0]!r} more than once")
    vocabulary = model.hooked.cfg.d_vocab
    for e in episodes:
        n, total = len(e.tokens), len(e.tokens) + max_new_tokens
        if total > model.max_positions:
            raise ValueError(
                f"episode {e.id!r}: {n} prompt tokens and {max_new_tokens} new ones exceed the model's "
                f"{model.max_positions} positions"
            )
        if straddles(model.rope_breaks, n - 1, total):
            raise ValueError(
                f"episode {e.id!r}: position factors change at length {model.rope_breaks[0]}, between the prompt's "
                f"{n} tokens and its end at {total}; choose a length on one side"
            )
        if int(e.tokens.min()) < 0 or int(e.tokens.max()) >= vocabulary:
            raise ValueError(
                f"episode {e.id!r}: token ids must lie in 0..{vocabulary - 1}: tokenised for another model?"
            )


def check_edit_on(model: Model, edit: Edit) -> None:
    """Refuse an edit that this model cannot carry, before any pass.

    Raises:
        ValueError, TypeError: see `dhlens.edits.check_edit`; it changes attention scores, and the self-check found that
            this does nothing here.
    """
    check_edit(edit, model.shape, model.hooked.cfg.d_head)
    hooks = edit(HeadSet([(0, 0)], model.shape), rows=[0], steps=[0], keys=1)
    if "hide" in model.limits and sites.scores(0) in {name for name, _ in hooks}:
        raise ValueError(model.limits["hide"])


def finite(logits: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row vocab"]:
    """The same logits.

    Raises:
        ValueError: one is NaN.
    """
    if bool(logits.isnan().any()):
        raise ValueError("the model's logits are NaN: its weights or its dtype cannot carry this prompt")
    return logits


def at_least_one(max_new_tokens: int) -> None:
    """Refuse to generate nothing.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
