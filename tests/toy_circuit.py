"""A model whose circuit is wired by hand: two pairs of previous-token head and induction head that take turns.

Tokens are of class A or B (or filler). The needle alternates, `a0 b0 a1 b1 ...`; the prompt ends in `a0`, and the model
goes on `b0 a1 b1 ...`. Pair A (L0H0, L1H0) copies what follows a token of class A, pair B (L0H2, L1H2) what follows one
of class B: the class of the token that is fed is the switch that hands over from one to the other.

    L0H0, L0H2   previous-token heads: they attend one position back, whatever is there, and write its token into a
                 subspace of their own
    L1H0, L1H2   induction heads: their query is the token that is fed, their key what a previous-token head wrote,
                 their value the token there, which they write for the unembedding; without a match they attend to BOS
    decoys       L0H1, L0H3 attend everywhere; L1H1 attends as L1H0 does, on the same keys and values, and writes
                 where nothing reads; all other heads and every MLP have small random weights
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dhlens.episode import Episode, Span
from dhlens.nodes import Edge, parse_edge

N = 7
"""Tokens of a class."""
A, B, FILLER = range(1, 1 + N), range(1 + N, 1 + 2 * N), range(1 + 2 * N, 25)
D_MODEL, D_HEAD = 64, 32
CONST = 60
PREV, OUT, JUNK = {"A": 25, "B": 32}, {"A": 39, "B": 46}, 53
"""Subspaces of the residual stream; the first 25 dimensions are the token."""
STEADY, WHISPER = 3.0, 0.4
"""The constant part of every embedding, and how loud previous-token heads write, where a token has 1: a token must not
make up much of the residual stream, or the norm would be a path of its own."""
UNIT = (D_MODEL / (1 + STEADY**2)) ** 0.5
"""What 1 becomes behind a norm."""
SLOW = 8
"""First rotary dimension that hardly turns within 100 positions: contents; the first three tell neighbours apart."""


def build() -> Any:
    """The model."""
    rope = {"rope_type": "default", "rope_theta": 1e8}
    config = LlamaConfig(
        vocab_size=25,
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=D_HEAD,
        max_position_embeddings=256,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=24,
        pad_token_id=23,
    )
    hf: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in hf.model.layers.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.01, generator=generator)
    hf.model.embed_tokens.weight.zero_()
    hf.model.embed_tokens.weight[:, :25] = torch.eye(25)
    hf.model.embed_tokens.weight[:, CONST] = STEADY
    hf.lm_head.weight.zero_()
    for name, tokens in (("A", A), ("B", B)):
        hf.lm_head.weight[list(tokens), OUT[name] : OUT[name] + N] = 2.5 * torch.eye(N)
    for own, other, head in (("A", "B", 0), ("B", "A", 2)):
        _previous(hf.model.layers[0].self_attn, own, head)
        _induction(hf.model.layers[1].self_attn, own, other, head)
    return hf


def episodes(n: int = 60) -> tuple[Episode, Episode]:
    """A prompt of `n` tokens and its twin."""
    generator = torch.Generator().manual_seed(1)
    hay = torch.tensor(list(FILLER))[torch.randint(0, len(FILLER), (n,), generator=generator)]
    needles = [[A[0], B[0], A[1], B[1], A[2]], [A[0], B[3], A[4], B[4], A[5]]]
    start, found = n // 2, []
    for name, needle in zip(("clean", "twin"), needles, strict=True):
        tokens = hay.clone()
        tokens[0], tokens[-1] = 0, A[0]
        tokens[start : start + len(needle)] = torch.tensor(needle)
        spans = (Span("needle", start, start + len(needle)),)
        found.append(Episode(name, tokens, torch.tensor(needle[1:]), spans))
    return found[0], found[1]


def planted(step: int) -> set[Edge]:
    """The edges of a step that carry its token.

    The first token has nothing to find by: what precedes it is the same in the twin.
    """
    group, head = (0, 0) if step % 2 == 0 else (1, 2)
    found = {f"embed->L1KV{group}.v@needle", f"L1H{head}->logits@step"}
    if step:
        found |= {f"embed->L0KV{group}.v@needle", f"L0H{head}->L1KV{group}.k@needle"}
    return {parse_edge(text) for text in found}


def _of(weight: Tensor, head: int) -> Tensor:
    """Rows of a projection that belong to a head; a view, to be written to."""
    return weight[head * D_HEAD : (head + 1) * D_HEAD]


def _class(name: str) -> range:
    return A if name == "A" else B


def _previous(attention: Any, own: str, head: int) -> None:
    """Score 16 x sum of cos(f (distance - 1)) over the three fastest frequencies: at its best for distance 1 alone."""
    query, key, value = (_of(p.weight, h) for p, h in _projections(attention, head))
    frequency = torch.tensor([1.0, 10**-0.5, 0.1])
    query[:3, CONST] += 16 * D_HEAD**0.5 / (STEADY * UNIT)
    key[:3, CONST] += torch.cos(frequency) / (STEADY * UNIT)
    key[16:19, CONST] += torch.sin(frequency) / (STEADY * UNIT)
    value[range(N), list(_class(own))] += 1 / UNIT
    attention.o_proj.weight[PREV[own] : PREV[own] + N, head * D_HEAD : head * D_HEAD + N] += WHISPER * torch.eye(N)


def _induction(attention: Any, own: str, other: str, head: int) -> None:
    """Score 8.5 where the previous token is the one that is fed, 6.5 at BOS."""
    query, key, value = (_of(p.weight, h) for p, h in _projections(attention, head))
    for q in (query, _of(attention.q_proj.weight, 1)) if head == 0 else (query,):
        q[range(SLOW, SLOW + N), list(_class(own))] += 8.5 * D_HEAD**0.5 / UNIT
        q[SLOW + N, CONST] += 6.5 * D_HEAD**0.5 / (STEADY * UNIT)
    key[range(SLOW, SLOW + N), range(PREV[own], PREV[own] + N)] += 1 / (WHISPER * UNIT)
    key[SLOW + N, 0] += 1 / UNIT
    value[range(N), list(_class(other))] += 1 / UNIT
    attention.o_proj.weight[OUT[other] : OUT[other] + N, head * D_HEAD : head * D_HEAD + N] += torch.eye(N)
    if head == 0:
        attention.o_proj.weight[JUNK : JUNK + N, D_HEAD : D_HEAD + N] += 0.2 * torch.eye(N)


def _projections(attention: Any, head: int) -> tuple[tuple[Any, int], ...]:
    return (attention.q_proj, head), (attention.k_proj, head // 2), (attention.v_proj, head // 2)
