"""Reads on hand-made patterns, alone in TransformerLens' own hooks, and under ties and windows."""

import pytest
import torch
from tiny import build, episode, tokenizer

from dhlens import reads
from dhlens.model import load
from dhlens.reads import Capture


def fire(hooks, pattern):
    """Run each hook on `pattern` as if it came from its layer; none may change it."""
    before = pattern.clone()
    for _, fn in hooks:
        assert fn(pattern, None) is None
    assert torch.equal(pattern, before)


def test_peaks_by_hand():
    pattern = torch.tensor([[[[0.1, 0.6, 0.3]], [[0.4, 0.2, 0.4]]]])
    out = {}
    fire(reads.peaks(out, n_layers=1, k=2), pattern)
    assert reads.stack(out["peak_key"]).tolist() == [[[[1, 2], [0, 2]]]]
    torch.testing.assert_close(reads.stack(out["peak_weight"]), torch.tensor([[[[0.6, 0.3], [0.4, 0.4]]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_go_to_the_lowest_key(dtype):
    generator = torch.Generator().manual_seed(0)
    pattern = (torch.randint(0, 4, (1, 3, 5, 300), generator=generator) / 256).to(dtype)
    out = {}
    fire(reads.peaks(out, n_layers=1, k=4), pattern)
    slow = pattern[0].float().sort(dim=-1, descending=True, stable=True).indices[..., :4]
    assert torch.equal(reads.stack(out["peak_key"])[:, 0], slow.transpose(0, 1))


def test_fewer_keys_than_peaks_are_padded():
    out = {}
    fire(reads.peaks(out, n_layers=1, k=4), torch.tensor([[[[0.25, 0.75]]]]))
    assert reads.stack(out["peak_key"]).flatten().tolist() == [1, 0, -1, -1]
    assert reads.stack(out["peak_weight"]).flatten().tolist() == [0.75, 0.25, 0, 0]


def test_mass_and_core_by_hand():
    #                      key   0    1    2    3    4    5   and two queries at positions 4 and 5
    pattern = torch.tensor([[[[0.1, 0.2, 0.3, 0.2, 0.2, 0.0], [0.0, 0.5, 0.1, 0.1, 0.1, 0.2]]]])
    out = {}
    fire(reads.mass(out, n_layers=1, spans=[(1, 3), (0, 10**9)], sink=1, local=2), pattern)
    torch.testing.assert_close(reads.stack(out["mass"])[:, 0, 0], torch.tensor([[0.5, 1.0], [0.6, 1.0]]))
    # query 4 leaves out key 0 and keys 3, 4; query 5 key 0 and keys 4, 5
    torch.testing.assert_close(reads.stack(out["mass_core"])[:, 0, 0], torch.tensor([[0.5, 0.5], [0.6, 0.7]]))


def test_columns_of_a_window_are_the_last_positions():
    pattern = torch.tensor([[[[0.2, 0.7, 0.1]]]])
    out = {}
    hooks = reads.peaks(out, n_layers=1, k=1, keys=10) + reads.rows(out, n_layers=1, keys=10)
    hooks += reads.mass(out, n_layers=1, spans=[(0, 8), (8, 10)], sink=0, local=0, keys=10)
    hooks += reads.focus(out, n_layers=1, at=torch.tensor([3, 8]), keys=10)
    fire(hooks, pattern)
    assert reads.stack(out["peak_key"]).item() == 8
    torch.testing.assert_close(reads.stack(out["mass"]).flatten(), torch.tensor([0.2, 0.8]))
    torch.testing.assert_close(reads.stack(out["focus"]).flatten().float(), torch.tensor([0.0, 0.7]), atol=1e-3, rtol=0)
    assert reads.stack(out["rows"]).shape[-1] == 10 and reads.stack(out["rows"])[..., :7].sum() == 0


def test_reads_work_alone_in_the_hooks_of_transformerlens():
    model = load(build("llama"), tokenizer=tokenizer())
    tokens = episode().tokens[None]
    _, cache = model.hooked.run_with_cache(tokens)
    out = {}
    with model.hooked.hooks(
        fwd_hooks=reads.peaks(out, n_layers=3) + reads.hidden(out, "r", site="blocks.1.hook_resid_post")
    ):
        model.hooked(tokens)
    want = torch.stack([cache["pattern", layer][0] for layer in range(3)]).argmax(-1).permute(2, 0, 1)
    assert torch.equal(reads.stack(out["peak_key"])[..., 0], want)
    torch.testing.assert_close(out["r"][0], cache["resid_post", 1][0])


def test_sizes_out_of_range():
    for sizes in ({"k": 0}, {"sink": -1}, {"local": -1}):
        with pytest.raises(ValueError, match="k must be at least 1"):
            Capture(**sizes)
