"""The edits of the standard ablation, by name: what `dhlens ablate --edits` offers."""

import zlib
from collections.abc import Callable, Sequence

from dhlens.card import digest
from dhlens.edits import Edit, hide, mean, patch, resample, uniform, zero
from dhlens.engine import replay
from dhlens.episode import Episode
from dhlens.model import Model
from dhlens.reads import Capture
from dhlens.tasks import niah
from dhlens.trace import Trace
from dhlens.trial import PerEpisode

EDITS = ("zero", "mean", "uniform", "resample", "patch", "hide")


def standard_edits(
    model: Model, fit: Trace, names: Sequence[str], *, seed: int, span: str = "needle"
) -> dict[str, Edit | PerEpisode]:
    """Edits by name, of zero, mean, uniform, resample, patch and hide.

    `mean` and `resample` take head outputs from `fit`, observed with `Capture(z=True)`; `patch` from the counterfactual
    twin of each needle episode, which says its own answer; `hide` takes the span away from the heads.

    Raises:
        ValueError: a name is none of these, or `fit` lacks head outputs.
    """

    def from_twin(e: Episode) -> Edit:
        other = niah.twin(model.tokenizer, e, seed=seed)
        kept = Capture(z=True, focus=(), hidden=())
        return patch(replay(model, [other], [other.answer], capture=kept, progress=False))

    def resampled(e: Episode) -> Edit:
        return resample(fit, seed=zlib.crc32(f"{seed}/{e.id}".encode()))

    if "resample" in names:
        resample(fit, seed=seed)  # refuses a trace without head outputs at once
    known: dict[str, Callable[[], Edit | PerEpisode]] = {
        "zero": zero,
        "mean": lambda: mean(fit),
        "uniform": uniform,
        "resample": lambda: PerEpisode(resampled, f"seed {seed}, {digest(fit.z)}"),
        "patch": lambda: PerEpisode(from_twin, f"seed {seed}"),
        "hide": lambda: PerEpisode(lambda e: hide(range(e.span(span).start, e.span(span).stop)), span),
    }
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"edits must be among {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return {name: known[name]() for name in names}
