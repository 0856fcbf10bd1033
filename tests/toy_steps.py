"""Twins for small random models, and the slow judge of a step's edges: the plain model on the whole sequence.

The judge knows nothing of caches, copies or shadow rows. It runs Hugging Face's own layers over prompt and answer and
sets every row outside the needle and the step back to its clean state behind each layer: that is what "frozen" means.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from tiny import VOCAB, episode
from torch import Tensor

from dhlens.episode import Episode
from dhlens.nodes import Edge, Sender

N, STEP = 40, 2


def twins(n: int = N) -> tuple[Episode, Episode]:
    """A prompt and the same with another answer in its needle."""
    clean = episode(n, name="clean")
    tokens, span = clean.tokens.clone(), clean.span("answer")
    tokens[span.start : span.stop] = torch.randint(3, VOCAB, (len(span),), generator=torch.Generator().manual_seed(7))
    return clean, dataclasses.replace(clean, id="twin", tokens=tokens, answer=tokens[span.start : span.stop])


class Judge:
    """One step of a plain model with Llama's layout."""

    def __init__(self, hf: Any, clean: Episode, twin: Episode, step: int = STEP) -> None:
        hf.set_attn_implementation("eager")
        self.hf, self.layers, self.config = hf, hf.model.layers, hf.config
        self.run, self.other = (torch.cat([e.tokens, clean.answer[:step]]) for e in (clean, twin))
        self.right, self.wrong = int(clean.answer[step]), int(twin.answer[step])
        needle = clean.span("needle")
        self.rows = [*range(needle.start, needle.stop), len(self.run) - 1]
        self.others = [i for i in range(len(self.run)) if i not in self.rows]
        self.after: list[Tensor] = []  # behind each layer, clean
        self.inputs, self.clean_parts, self.clean_logits = self.look(self.run, frozen=False)
        _, self.twin_parts, self.twin_logits = self.look(self.other, frozen=True)

    def metric(self, logits: Tensor) -> float:
        return float(logits[self.right] - logits[self.wrong])

    def look(self, tokens: Tensor, *, frozen: bool) -> tuple[list[Tensor], dict[Any, Tensor], Tensor]:
        """Input of every layer, input of every output projection and output of every MLP, and the last logits."""
        inputs: list[Tensor] = []
        parts: dict[Any, Tensor] = {"embed": self.hf.model.embed_tokens(tokens).detach()}
        with ExitStack() as stack:
            for n, layer in enumerate(self.layers):
                put = {layer: lambda x, out: inputs.append(x)}
                put[layer.self_attn.o_proj] = lambda x, out, n=n: parts.update({("z", n): x})
                put[layer.mlp] = lambda x, out, n=n: parts.update({("mlp", n): out[0]})
                for module, look in put.items():
                    stack.enter_context(seeing(module, look))
            logits = self.logits(tokens, frozen=frozen)
        return inputs, parts, logits

    def logits(self, tokens: Tensor, *, frozen: bool = True) -> Tensor:
        """Of the last row; the first call leaves the clean state of all rows behind."""
        clean = list(self.after)

        def set_back(n: int) -> Callable[[Any, Any, Any], Tensor]:
            def hook(module: Any, args: Any, out: Tensor) -> Tensor:
                out = out.clone()
                if frozen:
                    out[0, self.others] = clean[n][self.others]
                elif not clean:
                    self.after.append(out[0])
                return out

            return hook

        handles = [layer.register_forward_hook(set_back(n)) for n, layer in enumerate(self.layers)]
        with torch.no_grad():
            logits = self.hf(tokens[None], use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits

    def difference(self, sender: Sender) -> Tensor:
        """What a sender writes into every row, twin less clean."""
        if sender.kind == "embed":
            return self.twin_parts["embed"] - self.clean_parts["embed"]
        if sender.kind == "mlp":
            return self.twin_parts["mlp", sender.layer] - self.clean_parts["mlp", sender.layer]
        part = slice(sender.head * self.config.head_dim, (sender.head + 1) * self.config.head_dim)
        z = self.twin_parts["z", sender.layer] - self.clean_parts["z", sender.layer]
        return z[:, part] @ self.layers[sender.layer].self_attn.o_proj.weight[:, part].T

    def change(self, edge: Edge) -> float:
        """The metric with one edge replaced, less the clean one."""
        rows = {"needle": self.rows[:-1], "step": self.rows[-1:]}.get(edge.at)
        rows = [self.rows[int(edge.at.removeprefix("needle+"))]] if rows is None else rows
        moved = torch.zeros_like(self.inputs[0])
        moved[rows] = self.difference(edge.sender)[rows]
        kind, layer = edge.receiver.kind, self.layers[edge.receiver.layer]
        if kind in ("mlp", "logits"):
            norm = layer.post_attention_layernorm if kind == "mlp" else self.hf.model.norm
            handle = norm.register_forward_pre_hook(lambda module, args: (args[0] + moved,))
        else:
            projection = getattr(layer.self_attn, f"{kind}_proj")
            size = self.config.head_dim
            part = slice(edge.receiver.index * size, (edge.receiver.index + 1) * size)
            new = layer.input_layernorm(self.inputs[edge.receiver.layer] + moved) @ projection.weight.T

            def put(module: Any, args: Any, out: Tensor) -> Tensor:
                out = out.clone()
                for row in rows:
                    out[0, row, part] = new[row, part]
                return out

            handle = projection.register_forward_hook(put)
        changed = self.metric(self.logits(self.run))
        handle.remove()
        return changed - self.metric(self.clean_logits)


@contextmanager
def seeing(module: Any, look: Callable[[Tensor, Any], Any]) -> Any:
    """Look at what enters a module and what leaves it."""

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        look((*args, *kwargs.values())[0][0], out)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()
