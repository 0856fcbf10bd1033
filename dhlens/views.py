"""What a model may see of its prompt: the same question under different parts of the context, and answers under each.

    full = next(prefill(model, [episode]))[1]                     # the clean prompt, but for its last token
    view = masked(model, episode, visible)                        # or hidden_in_decode(full, ...), spliced(...)
    draft = generate(model, [view], [[]], max_new_tokens=32)[0]

Three ways to make part of a context visible (`visible`: Bool[prompt]):

- `masked`: as if the prompt were prefilled under a mask that hides the rest from every row. A token that no row sees
  changes no row, so it is simply not fed; the others keep their positions. Nothing of it is left in any key or value.
- `hidden_in_decode`: the whole prompt is prefilled, and the rows that generate see the keys of visible tokens alone.
  What these took over from the rest is still there: compare `first_logits` to see how much.
- `spliced`: a new, shorter prompt of the visible parts, at new positions.

A view holds the keys of what it shows and nothing else, so a step costs by visible tokens, in all three ways. Lanes
of different views are decoded as one batch: one pass a step for all of them. Full attention and a fused twin are
needed; `check_views` refuses other models.

Source: arXiv 2602.11162, appendix (it masks the context while drafting and does not say which rows the mask covers).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from dhlens import hooks as sites
from dhlens.episode import Episode, Span
from dhlens.hooks import Hook
from dhlens.limits import finite
from dhlens.masks import additive
from dhlens.model import Model
from dhlens.stream import HFStream
from dhlens.triggers import Draft
from dhlens.windows import runs


@dataclass(frozen=True, eq=False)
class View:
    """A prompt as far as it is seen, all but its last token prefilled."""

    stream: HFStream
    """Holds what rows from the last prompt token on see, and that token not yet; forked, never changed."""
    last: int
    """Id of the last prompt token."""
    position: int
    """Position of the last prompt token."""


def check_views(model: Model) -> None:
    """Refuse models whose views cannot be built.

    Raises:
        ValueError: no fused twin (HookedTransformer), or sliding windows.
    """
    if model.twin is None or not isinstance(model.stream(), HFStream):
        raise ValueError(
            f"showing parts of a prompt needs a bridge with a fused twin, which {model.card.model} has not"
        )
    if any(window is not None for window in model.windows):
        raise ValueError(f"showing parts of a prompt needs full attention, {model.card.model} has sliding windows")


def masked(model: Model, episode: Episode, visible: Bool[Tensor, " prompt"], *, head: HFStream | None = None) -> View:
    """The prompt as if hidden tokens did not exist, everything else in its place.

    Args:
        model: a loaded model.
        episode: the prompt; its last token counts as visible.
        visible: which of its tokens exist.
        head: a stream that holds the first `head.length` tokens, all of them visible; forked.
    """
    kept = visible[:-1].nonzero()[:, 0]
    stream = model.stream() if head is None else head.fork()
    assert isinstance(stream, HFStream) and kept[: stream.length].tolist() == list(range(stream.length))
    rest = kept[stream.length :]
    if len(rest):
        stream.feed(episode.tokens[rest][None], positions=rest[None])
    return View(stream, int(episode.tokens[-1]), len(episode.tokens) - 1)


def hidden_in_decode(full: HFStream, episode: Episode, visible: Bool[Tensor, " prompt"]) -> View:
    """The clean prompt `full` (all but its last token), of which generated rows see the visible part."""
    stream = full.columns(visible[:-1].nonzero()[:, 0])
    return View(stream, int(episode.tokens[-1]), len(episode.tokens) - 1)


def spliced(
    model: Model,
    episode: Episode,
    visible: Bool[Tensor, " prompt"],
    *,
    within: Span,
    joint: Sequence[int] = (),
    head: HFStream | None = None,
) -> View:
    """A prompt of the visible tokens alone.

    Args:
        model: a loaded model.
        episode: the prompt.
        visible: which of its tokens stay.
        within: the span that is shortened.
        joint: tokens, such as a line break, between separate runs inside that span.
        head: see `masked`.
    """
    inside = visible[within.start : within.stop]
    pieces = [episode.tokens[within.start + a : within.start + b].tolist() for a, b in runs(inside)]
    middle = [token for i, piece in enumerate(pieces) for token in ([*joint, *piece] if i else piece)]
    before, behind = (
        episode.tokens[part][visible[part]].tolist() for part in (slice(within.start), slice(within.stop, None))
    )
    return prompt_view(model, [*before, *middle, *behind], head=head)


def prompt_view(model: Model, tokens: Sequence[int], *, head: HFStream | None = None) -> View:
    """Any prompt, seen as a whole; `head` holds its beginning."""
    stream = model.stream() if head is None else head.fork()
    assert isinstance(stream, HFStream)
    if rest := list(tokens[stream.length : -1]):
        stream.feed(torch.tensor([rest]))
    return View(stream, tokens[-1], len(tokens) - 1)


def generate(
    model: Model,
    views: Sequence[View],
    said: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    read: Collection[str] = (),
    batch: int = 16,
) -> list[Draft]:
    """Go on greedily under every view, behind what has been `said` under it.

    Args:
        model: a loaded model, see `check_views`.
        views: what is seen.
        said: the answer so far, for each view.
        max_new_tokens: most tokens more, for all or for each, at least 1; the stop token counts.
        read: "published" and "coded": the attention that `RIND` takes in this form.
        batch: lanes decoded at once.
    """
    room = [max_new_tokens] * len(views) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    lanes = [_advanced(model, view, list(before)) for view, before in zip(views, said, strict=True)]
    drafts: dict[int, Draft] = {}
    # lanes of one batch are filled up to the longest of them: like goes with like
    order = sorted(range(len(lanes)), key=lambda lane: lanes[lane].stream.length)
    for at in range(0, len(lanes), batch):
        part = order[at : at + batch]
        written = _greedy(model, [lanes[lane] for lane in part], [room[lane] for lane in part])
        for lane, tokens, entropy in zip(part, *written, strict=True):
            drafts[lane] = _draft(model, lanes[lane], tokens, entropy, read)
    return [drafts[lane] for lane in range(len(lanes))]


@torch.no_grad()
def first_logits(view: View) -> Float[Tensor, " vocab"]:
    """The logits behind the prompt's last token.

    Where two prompts differ in hidden tokens alone, any difference of these is what leaked.
    """
    return _feed(view.stream.fork(), view, [view.last])[0]


def _feed(
    stream: HFStream, view: View, tokens: Sequence[int], hooks: Sequence[Hook] | None = None
) -> Float[Tensor, "row vocab"]:
    """Feed rows from the view's last prompt token on, of which each sees what is shown and the rows before it."""
    n = len(tokens)
    positions = view.position + torch.arange(n)[None]
    return stream.feed(torch.tensor([list(tokens)]), hooks=hooks, keep=n, positions=positions)[0]


def _advanced(model: Model, view: View, said: list[int]) -> View:
    """The view with `said` behind its prompt."""
    if not said:
        return view
    stream = view.stream.fork()
    _feed(stream, view, [view.last, *said[:-1]])
    return View(stream, said[-1], view.position + len(said))


def _greedy(model: Model, views: Sequence[View], room: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens of each lane, the stop token included, and the entropies of the distributions they are from."""
    stream = HFStream.join([view.stream for view in views])
    shown = torch.arange(stream.length) < torch.tensor([[view.stream.length] for view in views])
    position = torch.tensor([[view.position] for view in views])
    fed = torch.tensor([[view.last] for view in views])
    tokens: list[list[int]] = [[] for _ in views]
    entropy: list[list[float]] = [[] for _ in views]
    alive = list(range(len(views)))
    while alive:
        shown = pad(shown, (0, 1), value=True)
        mask = additive(shown, model.dtype).transpose(0, 2)
        logits = finite(stream.feed(fed, positions=position, mask=mask)[:, -1]).float().cpu()
        for lane, token, nats in zip(alive, logits.argmax(-1).tolist(), _entropy(logits).tolist(), strict=True):
            tokens[lane].append(token)
            entropy[lane].append(nats)
        going = [i for i, n in enumerate(alive) if len(tokens[n]) < room[n] and tokens[n][-1] not in model.stop_ids]
        alive = [alive[i] for i in going]
        if alive:
            stream.select(going)
            shown, position = shown[going], position[going] + 1
            fed = torch.tensor([[tokens[lane][-1]] for lane in alive])
    return tokens, entropy


def _entropy(logits: Float[Tensor, "lane vocab"]) -> Float[Tensor, " lane"]:
    return torch.distributions.Categorical(logits=logits).entropy()


def _draft(model: Model, view: View, tokens: list[int], entropy: list[float], read: Collection[str]) -> Draft:
    stopped = tokens[-1] in model.stop_ids
    tokens = tokens[:-1] if stopped else tokens
    text = model.tokenizer.decode(tokens)
    starts = tuple(len(model.tokenizer.decode(tokens[:i])) for i in range(len(tokens)))
    attention = _running(model, view, tokens) if "published" in read and tokens else None
    alone = _alone(model, tokens) if "coded" in read and tokens else None
    return Draft(tuple(tokens), text, starts, torch.tensor(entropy[: len(tokens)]), stopped, attention, alone)


def _running(model: Model, view: View, tokens: list[int]) -> Float[Tensor, "token token"]:
    """Last layer, mean over heads, among the draft's tokens where they stand behind their prompt."""
    out: list[Tensor] = []
    _feed(view.stream.fork(), view, [view.last, *tokens], hooks=[_last_pattern(model, out)])
    return out[0][:, 1:, -len(tokens) :].mean(0)


def _alone(model: Model, tokens: list[int]) -> Float[Tensor, " token"]:
    """Last layer, largest weight from any row, mean over heads, of a pass over these tokens and nothing else."""
    out: list[Tensor] = []
    model.stream().feed(torch.tensor([tokens]), hooks=[_last_pattern(model, out)])
    return out[0].amax(1).mean(0)


def _last_pattern(model: Model, out: list[Tensor]) -> Hook:
    return sites.pattern(model.n_layers - 1), lambda pattern, hook: out.append(pattern[0].float().cpu())
