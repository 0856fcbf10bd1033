"""A norm as the linear map that it is while its scale stands still; what splits a sum behind it among its parts.

A norm divides by the size of the whole, so that no part has an effect of its own. With the scale kept from the clean
run, as TransformerLens keeps it (`ActivationCache.apply_ln_to_stack`), parts add up exactly: what leaves the norm is
`(x - mean) * weight * scale + shift`, without the mean and the shift for an RMS norm. Which of the two it is, its
weight (that of Gemma is 1 + w) and its shift are read off what the norm does to three vectors, whatever its class.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_LOUD = 1e3


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm at some rows, with the scale that it has there."""

    weight: Float[Tensor, " d_model"]
    """Float[d_model]: of each dimension."""
    shift: Float[Tensor, " d_model"]
    """Float[d_model]: what is added; 0 for an RMS norm."""
    centred: bool
    """Whether the mean is taken off first."""
    scale: Float[Tensor, " row"]
    """Float[row]: one over the size of each row."""

    @classmethod
    @torch.no_grad()
    def of(cls, norm: Callable[[Tensor], Tensor], rows: Float[Tensor, "row d_model"]) -> "FrozenNorm":
        """The norm at these inputs."""
        d_model = rows.shape[1]
        assert d_model % 2 == 0, "the probe has as many dimensions up as down"
        updown = torch.tensor([1.0, -1.0]).repeat(d_model // 2).to(rows)
        probes = torch.stack([torch.zeros_like(updown), _LOUD * updown, _LOUD * torch.ones_like(updown)])
        shift, swing, even = (norm(p[None, None])[0, 0].float() for p in probes)
        weight = (swing - shift) * updown
        centred = bool((even - shift).norm() < 0.1 * weight.norm())
        x, y = rows.float(), norm(rows[None])[0].float() - shift
        scaleless = (x - x.mean(1, keepdim=True) if centred else x) * weight
        scale = (y * scaleless).sum(1) / (scaleless**2).sum(1)
        return cls(weight, shift, centred, scale)

    def pull(self, direction: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The direction before the norm that does to its input what `direction` does to its output."""
        found = direction * self.weight * self.scale[:, None]
        return found - found.mean(1, keepdim=True) if self.centred else found

    def fold(self, matrix: Float[Tensor, "*head d_model d_head"]) -> Float[Tensor, "*head d_model d_head"]:
        """A matrix that reads the norm's output, as one that reads its input, up to the scale."""
        found = matrix.float() * self.weight[:, None]
        return found - found.mean(-2, keepdim=True) if self.centred else found
