"""One tiny model for the suite: a byte tokenizer and random weights moved off their initial values."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Tokenizer                                  # noqa: E402
from model import PRESETS, Config, LanguageModel            # noqa: E402
from shine import Shine, ShineConfig                        # noqa: E402

torch.set_num_threads(2)


def perturb(module, seed=1):
    """Move every parameter off its initial value: norms of ones and biases of zeros would hide a missing use."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return module


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer({bytes([b]): b for b in range(256)})


@pytest.fixture
def base(tokenizer):
    return perturb(LanguageModel(Config(vocab_size=tokenizer.vocab_size, **PRESETS["test"])))


@pytest.fixture
def shine(base, tokenizer):
    model = Shine(base, tokenizer, ShineConfig(r=2, meta_r=3, m2p_layers=2, scale=0.05, context_length=64))
    for p in model.trained().values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))


def close(a, b, tolerance=1e-5):
    """Largest difference relative to the largest entry."""
    return (a - b).abs().max() <= tolerance * b.abs().max()
