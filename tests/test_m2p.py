"""The M2P Transformer against torch's own encoder layer."""
import pytest
import torch
from torch import nn

from conftest import close, perturb
from m2p import M2P, EncoderLayer, attention_heads, memory_tokens


def test_encoder_layer_is_torchs_post_norm_layer():
    ours, x = perturb(EncoderLayer(16, 4)), torch.randn(3, 5, 16)
    torchs = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=False)
    torchs.load_state_dict(ours.state_dict())            # the same names and shapes
    assert close(ours(x), torchs(x))


def test_even_layers_mix_depths_and_odd_ones_memory_tokens():
    """A change at one grid point reaches its column after one layer and the whole grid after two."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 8)
    y = x.clone()
    y[0, 1, 2] += 1.0
    for layers, expected in ((1, {(i, 2) for i in range(3)}), (2, {(i, j) for i in range(3) for j in range(4)})):
        m2p = perturb(M2P(3, 4, 8, layers, 2))
        changed = (m2p(x) - m2p(y)).abs().view(3, 4, 8).amax(-1) > 1e-6
        assert {tuple(p) for p in changed.nonzero().tolist()} == expected


def test_one_axis_only_for_the_ablation():
    x = torch.randn(1, 3, 4, 8)
    y = x.clone()
    y[0, 1, 2] += 1.0
    for axes, expected in (("rows", {(1, j) for j in range(4)}), ("columns", {(i, 2) for i in range(3)})):
        m2p = perturb(M2P(3, 4, 8, 2, 2, axes))
        changed = (m2p(x) - m2p(y)).abs().view(3, 4, 8).amax(-1) > 1e-6
        assert {tuple(p) for p in changed.nonzero().tolist()} == expected
    with pytest.raises(ValueError, match="diagonal"):
        M2P(3, 4, 8, 2, 2, "diagonal")


def test_normalized_memory_states_have_no_size():
    x = torch.randn(2, 3, 4, 8)
    plain, normal = (perturb(M2P(3, 4, 8, 2, 2, normalize=n)) for n in (False, True))
    normal.load_state_dict(plain.state_dict())
    assert close(normal(x), normal(50 * x)) and not close(plain(x), plain(50 * x))
    assert close(normal(x), plain(x / x.square().mean(-1, keepdim=True).sqrt()))


def test_position_embeddings_are_used():
    m2p = perturb(M2P(3, 4, 8, 2, 2))
    x = m2p(torch.zeros(1, 3, 4, 8)).view(3, 4, 8)
    assert len({tuple(v.tolist()) for v in x.flatten(0, 1)}) == 12


def test_output_is_the_grid_read_row_by_row():
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(M2P(3, 4, 8, 0, 2)(x), x.reshape(2, 3, 32))


def test_memory_tokens_follow_from_the_sizes():
    assert memory_tokens(8 * 75776, 4096) == 148
    with pytest.raises(ValueError, match="100.*48"):
        memory_tokens(100, 48)


def test_heads_of_the_published_runs():
    assert (attention_heads(4096), attention_heads(1024), 48 % attention_heads(48)) == (32, 8, 0)
