"""Numbers computed by the paper's own code on random weights, to 1e-5 on the CPU and 1e-4 on a GPU; SHINE_GOLDEN may name another such folder."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import close
from model import LanguageModel, cut
from shine import Shine, ShineConfig

CASE = Path(os.environ.get("SHINE_GOLDEN") or Path(__file__).parent / "golden/official_case_a")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def near(a, b, bound=None):
    """Largest difference relative to the largest entry, within the bound of the device."""
    return close(a.detach().float().cpu(), b.cpu(), bound or (1e-4 if a.is_cuda else 1e-5))


def load(device):
    """-> (Shine with the case's weights, its numbers)"""
    info = json.loads((CASE / "case.json").read_text())
    m2p = info["m2p"]
    config = ShineConfig(r=info["lora_r"], meta_r=info["metalora_r"], m2p_layers=m2p["num_layers"], m2p_heads=m2p["nhead"],
                         scale=info["scale"])
    shine = Shine(LanguageModel.load(CASE / "base", dtype=torch.float32), None, config)
    shine.load_state_dict(shine.from_published(load_file(CASE / "hypernet/hypernet.safetensors")), strict=False)
    assert shine.M == info["num_mem_token"]
    return shine.to(device), {n: t.to(device) for n, t in load_file(CASE / "vectors.safetensors").items()}


@pytest.fixture(scope="module", params=DEVICES)
def case(request):
    return load(request.param)


@pytest.fixture(scope="module")
def results(case):
    """One forward and backward pass; the published loss is the mean over all counted tokens."""
    shine, v = case
    states = shine.read(v["evidence_ids"], v["evidence_attention_mask"])
    flat = shine.m2p(states)
    lora = shine.to_lora(states)
    labels = v["labels"]
    batch = {"input_ids": v["input_ids"], "attention_mask": v["input_attention_mask"], "weights": (labels != -100).float(),
             "context_ids": v["evidence_ids"], "context_mask": v["evidence_attention_mask"]}
    loss = shine(batch)
    loss.backward()
    return states, flat, lora, loss


def test_memory_states(case, results):
    assert near(results[0], case[1]["memory_states"])


def test_m2p_output(case, results):
    assert near(results[1].flatten(1), case[1]["m2p_output"])


def test_every_generated_A_and_B(case, results):
    names = [n for n in case[1] if n.startswith("layers.")]
    assert len(names) == 14 * case[0].base.config.num_hidden_layers
    for name in names:
        _, i, *linear, half = name.split(".")
        assert near(results[2][int(i)][".".join(linear)]["AB".index(half[-1])], case[1][name]), name


@pytest.mark.parametrize("which", ["lora", "base"])
def test_logits(case, results, which):
    shine, v = case
    real = v["input_attention_mask"].bool()
    logits = shine.base(v["input_ids"], v["input_attention_mask"], results[2] if which == "lora" else None)
    assert near(logits[real], v[f"logits_{which}"][real])


def test_loss(case, results):
    assert near(results[3], case[1]["loss"])


def test_gradients(case, results):
    shine, v = case
    names = [n for n in v if n.startswith("grad.")]
    assert names
    grads = {n: p.grad for n, p in shine.trained().items()}
    meta = cut(grads["meta_lora"], shine.base.config, shine.config.meta_r)
    for name in names:
        key = name.removeprefix("grad.")
        if key == "mem_tokens":
            ours = grads["memory"]
        elif key.startswith("metalora."):
            _, _, i, *linear, half = key.split(".")
            ours = meta[int(i)][".".join(linear)]["AB".index(half[-1])][None]
        else:
            ours = grads["m2p." + key.removeprefix("metanetwork.")]
        assert near(ours, v[name]), name


@pytest.mark.parametrize("which", ["lora", "base"])
def test_greedy_ids(case, results, which):
    shine, v = case
    expected = v[f"greedy_{which}_ids"]
    mask = next(n for n in v if n.startswith("prompt") and n.endswith("mask"))
    lora = results[2] if which == "lora" else None
    got = torch.stack(list(shine.base.generate(v["prompt_ids"], v[mask], lora, expected.shape[1])), 1)
    assert torch.equal(got, expected)


def test_a_forgotten_meta_lora_would_be_seen(case):
    shine, v = case
    states = shine.base.read(v["evidence_ids"], v["evidence_attention_mask"], shine.memory)
    assert not near(states, v["memory_states"], 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_bf16_on_a_gpu():
    """bf16 keeps 8 bits: logits with the generated LoRA within 5 % of the largest, the loss within 2 %."""
    shine, v = load("cuda")
    shine.base.to(torch.bfloat16)
    batch = {"input_ids": v["input_ids"], "attention_mask": v["input_attention_mask"], "weights": (v["labels"] != -100).float(),
             "context_ids": v["evidence_ids"], "context_mask": v["evidence_attention_mask"]}
    with torch.no_grad():
        logits = shine.base(v["input_ids"], v["input_attention_mask"], shine.generate_lora(v["evidence_ids"], v["evidence_attention_mask"]))
        loss = shine(batch)
    real = v["input_attention_mask"].bool()
    assert near(logits[real], v["logits_lora"][real], 0.05) and near(loss, v["loss"], 0.02)
