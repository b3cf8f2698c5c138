"""The language model: LoRA as an argument, memory, padding, generation, merging, folders."""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model
from conftest import close
from model import (PRESETS, BlockAttention, Config, Decoder, KVCache, LanguageModel, RMSNorm, UserError, cut, flatten, linear, lora_layout,
                   lora_size, map_lora, pick)
from train import save_base


def random_lora(config, rows=None, r=3, seed=5, size=0.2, modules="all"):
    lead = (rows,) if rows else ()
    flat = size * torch.randn(*lead, config.num_hidden_layers, lora_size(config, r, modules), generator=torch.Generator().manual_seed(seed))
    return cut(flat, config, r, modules), flat


def test_layout_gives_the_numbers_of_the_paper():
    """Section 4: Qwen3-8B, r = 8: in + out = 75776 a layer, 148 memory tokens."""
    qwen = Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=12288)
    assert [i + o for _, i, o in lora_layout(qwen)] == [8192, 5120, 5120, 8192, 16384, 16384, 16384]
    assert lora_size(qwen, 8) / 4096 == 148


def test_cut_by_hand_and_back():
    """The first in * r numbers of a layer are q_proj's A row by row, the next r * out its B."""
    c, r = Config(hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=2, intermediate_size=6), 2
    flat = torch.arange(2.0 * lora_size(c, r)).view(2, -1)
    A, B = cut(flat, c, r)[0]["self_attn.q_proj"]
    assert A.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and B.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert torch.equal(flatten(cut(flat, c, r)), flat)
    batched = torch.stack((flat, flat + 1))
    assert torch.equal(flatten(cut(batched, c, r)), batched)


def test_linear_by_hand():
    """W = 2I, A = [[1], [0]], B = [[0, 3]]: (x1, x2) -> (2 x1, 2 x2 + 3 x1)."""
    x = torch.tensor([[[1.0, 10.0]]])
    y = linear(x, 2 * torch.eye(2), (torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 3.0]])))
    assert y.tolist() == [[[2.0, 23.0]]]


def test_the_norm_with_its_gradient_by_hand_is_the_plain_one():
    """Against autograd through the formula that inference uses; a norm with weights off 1 and rows of very different size."""
    norm = RMSNorm(12, 1e-6)
    norm.weight.data += 0.3 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    a, b = (x.clone().requires_grad_() for _ in range(2))
    plain = lambda z: z * (z.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    grad = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))
    ours, theirs = norm(a), plain(b)
    assert ours.grad_fn.name() == "TrainedNormBackward"
    (dx, dw), (ex, ew) = (torch.autograd.grad(y, (z, norm.weight), grad) for y, z in ((ours, a), (theirs, b)))
    with torch.no_grad():
        assert close(norm(x), theirs)
    assert close(ours, theirs) and close(dw, ew) and all(close(p, q) for p, q in zip(dx, ex))


@pytest.mark.parametrize("T, keys, masked", [(11, 11, False), (5, 11, False), (3, 9, True), (8, 8, True)])
def test_attention_in_blocks_and_its_gradient_are_the_plain_ones(T, keys, masked, monkeypatch):
    """Against autograd through softmax(q k^T + bias) v: blocks of four queries, the last one shorter, two query heads on each key head,
    queries that are the last of more keys; the mask hides the first two keys of one row."""
    monkeypatch.setattr(BlockAttention, "BLOCK", 4)
    random = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()
    q, k, v, grad = random(2, 4, T, 6), random(2, 2, keys, 6), random(2, 2, keys, 6).detach().flip(2).requires_grad_(), random(2, T, 4, 6)
    bias = torch.full((T, keys), float("-inf"), dtype=torch.float64).triu(keys - T + 1).repeat(2, 1, 1, 1)
    if masked:
        bias[1, :, 2:, :2] = float("-inf")
    plain = (torch.softmax(q @ k.repeat_interleave(2, 1).mT + bias, -1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    ours = BlockAttention.apply(q, k, v, bias if masked else None)
    assert torch.allclose(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(plain, (q, k, v), grad)):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("T", [40, 300])
def test_bf16_reads_in_blocks_as_float32_does_by_the_kernel(T, monkeypatch):
    """A text of several blocks, with memory tokens behind it, of which alone the last layer is wanted."""
    base, ids = LanguageModel(Config()), torch.arange(2 * T).view(2, T) % 500 + 5
    memory, calls, apply = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)), [], BlockAttention.apply
    monkeypatch.setattr(BlockAttention, "apply", lambda *args: calls.append(args[0].shape[2]) or apply(*args))
    with torch.no_grad():
        exact = base.read(ids, None, memory)
        assert calls == [7]      # kernels know no queries that are the last of more keys
        rounded = base.to(torch.bfloat16).read(ids, None, memory.bfloat16())
    assert calls == [7, T + 7, 7] and close(rounded.float(), exact, 0.05)


def test_two_rows_with_two_loras_are_two_runs(base, ids):
    lora, _ = random_lora(base.config, rows=2)
    together = base(ids, None, lora)
    for i in range(2):
        alone = base(ids[i:i + 1], None, map_lora(lambda t: t[i], lora))
        assert close(alone, together[i:i + 1])
    assert not close(together, base(ids), 1e-2)


def test_merged_equals_lora_in_the_forward_and_comes_out_bitwise(base, ids):
    lora, _ = random_lora(base.config)
    before = {n: p.clone() for n, p in base.state_dict().items()}
    with torch.no_grad():
        expected = base(ids, None, lora)
        with base.merged(lora):
            assert close(base(ids), expected)
        with pytest.raises(KeyboardInterrupt), base.merged(lora):
            raise KeyboardInterrupt
    assert all(torch.equal(before[n], p) for n, p in base.state_dict().items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_positions(base, ids, side):
    pad = (4, 0) if side == "left" else (0, 4)
    real = slice(4, None) if side == "left" else slice(0, -4)
    padded, mask = F.pad(ids, pad, value=7), F.pad(torch.ones_like(ids), pad)
    assert close(base(padded, mask)[:, real], base(ids))
    memory = torch.randn(5, base.config.hidden_size)
    assert close(base.read(padded, mask, memory), base.read(ids, None, memory))


def test_padding_at_the_end_of_long_rows_changes_nothing(base):
    ids = torch.randint(0, 256, (2, 600), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 600, dtype=torch.bool)
    mask[1, 530:] = False
    assert close(base(ids, mask)[1, :530], base(ids[1:, :530])[0])
    conversations = mask.long() + (torch.arange(600) >= 520) * mask      # the second row's last ten tokens are another one: RoPE is relative
    assert close(base(ids, conversations)[1, 520:530], base(ids[1:, 520:530])[0], 1e-4)
    assert close(base(ids, mask.flip(1))[1, 70:], base(ids[1:, 70:])[0], 1e-4)                       # at the front it is seen
    unmasked = [base._positions(base._embed(ids[:, :m.shape[1]]), m, 0)[1] is None for m in (mask, conversations, (3 - conversations) * mask, mask.flip(1), mask[:, :500])]
    assert unmasked == [True, False, False, False, False]


def test_memory_states_are_the_appended_positions_after_each_layer(base, ids):
    c, memory = base.config, torch.randn(5, base.config.hidden_size)
    states = base.read(ids, None, memory)
    assert states.shape == (2, c.num_hidden_layers, 5, c.hidden_size)
    x = torch.cat((base.model.embed_tokens(ids), memory.expand(2, -1, -1)), 1)
    angles, bias = base._positions(x, None, 0)
    for i, layer in enumerate(base.model.layers):
        x = layer(x, angles, bias, {})
        assert close(states[:, i], x[:, -5:])
    first_alone = base.read(ids, None, memory[:1])       # causal: memory token 1 does not see the later ones
    assert close(states[:, :, :1], first_alone)


def test_later_tokens_do_not_reach_back(base, ids):
    changed = ids.clone()
    changed[:, -1] += 1
    assert close(base(changed)[:, :-1], base(ids)[:, :-1])


def test_tied_and_untied_and_wide_heads():
    for tied in (True, False):
        c = Config(vocab_size=50, hidden_size=20, num_attention_heads=4, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied)
        model = LanguageModel(c)
        assert ("lm_head.weight" in model.state_dict()) is not tied
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 50)


def test_the_last_positions_alone_are_those_of_all(base, ids):
    """Of the others the last layer computes keys and values only: with and without padding, a LoRA, and a cache."""
    lora, _ = random_lora(base.config, rows=2)
    seen = []
    base.model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for mask in (None, torch.tensor([[1] * 9, [0] * 3 + [1] * 6])):
        for last in (1, 4, 9):
            states, cache = base.hidden(ids, mask, lora), KVCache(base.config, 2, 12, torch.float32, ids.device)
            assert close(base.hidden(ids, mask, lora, last=last), states[:, -last:]) and seen[-1] == last
            assert close(base.hidden(ids, mask, lora, cache, last=last), states[:, -last:])
            following = base.hidden(torch.cat((ids, ids[:, :1]), 1), None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1), lora)
            assert close(base.hidden(ids[:, :1], None, lora, cache), following[:, -1:])


def test_cache_gives_the_logits_of_the_whole_row(base, ids):
    cache = KVCache(base.config, 2, 9, torch.float32, "cpu")
    with torch.no_grad():
        parts = [base.head(base.hidden(ids[:, a:b], None, None, cache)) for a, b in ((0, 4), (4, 5), (5, 9))]
    assert close(torch.cat(parts, 1), base(ids))


def test_greedy_generation_is_the_argmax_of_full_passes_also_for_padded_rows(base, ids):
    lora, _ = random_lora(base.config, rows=2)
    rows, expected = [ids[0].tolist(), ids[1, :5].tolist()], []
    for i, row in enumerate(rows):
        row = list(row)
        for _ in range(6):
            row.append(int(base(torch.tensor([row]), None, map_lora(lambda t: t[i:i + 1], lora))[0, -1].argmax()))
        expected.append(row[-6:])
    padded = torch.tensor([rows[0], [0] * 4 + rows[1]])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    got = torch.stack(list(base.generate(padded, mask, lora, max_new_tokens=6)), 1)
    assert got.tolist() == expected


@pytest.mark.parametrize("dtype, activations, small", [(torch.float32, None, 0), (torch.bfloat16, None, 0), (torch.bfloat16, torch.float32, 0), (torch.bfloat16, None, 2 ** 22)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_decoder_gives_the_logits_of_full_passes_and_is_used_again(ids, dtype, activations, small, device, rows, monkeypatch):
    monkeypatch.setattr(Decoder, "SMALL", small)
    base = LanguageModel(Config(vocab_size=257, tie_word_embeddings=rows == 1)).to(device, dtype)
    base.compute_dtype = activations
    exact = LanguageModel(base.config).to(device)
    exact.load_state_dict(base.state_dict())
    lora, _ = random_lora(base.config, modules="all" if rows == 1 else "v_proj,o_proj,gate_proj")
    lora, ids = map_lora(lambda t: t.to(device), lora), ids[:rows].to(device)
    decoder = Decoder(base, lora)
    for length in (5, 7):                                                     # the second conversation goes on in the same cache
        cache = decoder.room(rows, 40)
        with torch.inference_mode():
            base.hidden(cache.begin(ids[:, :length], False), None, lora, cache)
            for t in range(length, 9):
                expected = exact(ids[:, :t + 1], None, lora)[:, -1]
                static = decoder.cache.used
                assert close(decoder(ids[:, t]), expected, 1e-5 if dtype == torch.float32 else 0.06)
                assert close(decoder.step(ids[:, t], None), expected, 1e-5 if dtype == torch.float32 else 0.06)      # as a CUDA graph holds it
                assert decoder.cache.used == static + 1
    bags = device == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    assert bool(decoder.rows) == bags and Decoder.suits(base, lora) == (bags or device == "cuda" or dtype == torch.float32)
    if bags:
        assert decoder.output[0].dtype == (torch.float32 if small else dtype)
    assert decoder.output[0].shape[2] >= 32      # 257 divides into no parts worth a bag


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_with_compiled_layers_gives_the_same_logits(ids, dtype):
    base = LanguageModel(Config()).to("cuda", dtype)
    lora, ids = map_lora(lambda t: t.cuda(), random_lora(base.config)[0]), ids[:1].cuda()
    decoder = Decoder(base, lora)
    decoder.compiled, cache = True, decoder.room(1, 40)
    with torch.inference_mode():
        base.hidden(ids[:, :5], None, lora, cache)
        for t in range(5, 9):
            assert close(decoder(ids[:, t]), base(ids[:, :t + 1], None, lora)[:, -1], 1e-4 if dtype == torch.float32 else 0.03)


def test_generation_with_and_without_a_decoder_is_the_same(base, ids):
    lora, _ = random_lora(base.config)
    decoder = Decoder(base, lora)
    fast = torch.stack(list(base.generate(ids, None, lora, max_new_tokens=20, decoder=decoder)), 1)
    assert decoder.layers is not None
    short = Decoder(base, lora)
    assert torch.equal(fast[:, :3], torch.stack(list(base.generate(ids, None, lora, max_new_tokens=3, decoder=short)), 1)) and short.layers is None      # no copy
    assert torch.equal(torch.stack(list(base.generate(ids, None, lora, max_new_tokens=20)), 1), fast)
    for rows in ((torch.ones_like(ids), lora), (None, random_lora(base.config)[0])):      # padded rows, another LoRA
        with pytest.raises(AssertionError, match="not for these rows"):
            next(base.generate(ids, *rows, decoder=decoder))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_conversation_goes_on_in_its_cache(base, ids, rows, monkeypatch):
    lora, hidden, read = random_lora(base.config, rows if rows > 1 else None)[0], base.hidden, []
    decoder = Decoder(base, lora)
    monkeypatch.setattr(base, "hidden", lambda x, *args, **options: read.append(x.shape[1]) or hidden(x, *args, **options))

    def turn(prompt):
        read.clear()
        fresh = torch.stack(list(base.generate(prompt, None, lora, max_new_tokens=6)), 1)
        assert read == [prompt.shape[1]] + 5 * [1]
        read.clear()
        assert torch.equal(torch.stack(list(base.generate(prompt, None, lora, max_new_tokens=6, decoder=decoder, resume=True)), 1), fresh)
        return fresh, read[0]
    prompt, held = ids[:rows, :9], 0
    for new in (4, 140, 3):                                     # behind the second turn the cache is a larger one
        answer, tokens = turn(prompt)
        assert tokens == prompt.shape[1] - held
        held = prompt.shape[1] + 5                              # the last token of the answer was not read yet
        prompt = torch.cat((prompt, answer, torch.randint(5, 257, (rows, new), generator=torch.Generator().manual_seed(new))), 1)
    assert (decoder.layers is not None) == (rows == 1)          # the steps of the Decoder fill it too; two LoRAs have none
    prompt[:, 7] = (prompt[:, 7] + 1) % 257                     # another beginning: from there on all is read
    assert turn(prompt)[1] == prompt.shape[1] - 7
    assert turn(prompt)[1] == 1 and turn(prompt[:, :20])[1] == 1      # the same, and less than it holds: one token, for the logits

    def stopped(*args):
        raise KeyboardInterrupt
    given = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):      # Ctrl-C in the middle of a step
        for token in base.generate(prompt[:, :20], None, lora, max_new_tokens=6, decoder=decoder, resume=True):
            given.append(token[:, None])
            if len(given) == 3:
                patch.setattr(F, "silu", stopped)
    assert turn(torch.cat((prompt[:, :20], *given, prompt[:, :1]), 1))[1] == 2      # the third token was on its way into the cache


@pytest.mark.parametrize("where", ["parts", "room"])
def test_a_copy_that_is_stopped_half_way_is_made_anew(base, ids, monkeypatch, where):
    """Ctrl-C while a Decoder copies the weights, or makes its cache larger: the next answer is what it would have been."""
    lora, calls = random_lora(base.config)[0], []
    decoder = Decoder(base, lora)
    answer = lambda length=12: torch.stack(list(base.generate(ids[:1], None, lora, length, decoder=decoder)), 1)
    want, whole = torch.stack(list(base.generate(ids[:1], None, lora, 150)), 1), model.rope if where == "room" else Decoder.parts
    if where == "room":
        answer()

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3 - 2 * (where == "room"):
            raise KeyboardInterrupt
        return whole(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*(model, "rope") if where == "room" else (Decoder, "parts"), stopped)
        answer(150)
    assert torch.equal(answer(150), want)


def test_stop_tokens_end_a_row_and_then_the_generator(base, ids):
    free = torch.stack(list(base.generate(ids, max_new_tokens=8)), 1)
    stop = [int(free[0, 2]), int(free[1, 4])]
    got = torch.stack(list(base.generate(ids, max_new_tokens=8, stop=stop)), 1)
    ends = [next(j for j, t in enumerate(row.tolist()) if t in stop) for row in free]
    assert got.shape[1] == max(ends) + 1
    for row, whole, end in zip(got, free, ends):
        assert torch.equal(row[:end + 1], whole[:end + 1]) and (row[end:] == row[end]).all()


def test_sampling():
    logits, generator = torch.tensor([[0.0, 5.0, 4.0, -2.0]]).repeat(500, 1), torch.Generator().manual_seed(0)
    assert set(pick(logits, 0, 0, 1.0, generator).tolist()) == {1}
    assert set(pick(logits, 5.0, 2, 1.0, generator).tolist()) == {1, 2}
    assert set(pick(logits, 1.0, 0, 0.5, generator).tolist()) == {1}
    assert len(set(pick(logits, 9.0, 0, 1.0, generator).tolist())) == 4


def test_folder_round_trip_by_hugging_face_names(base, ids, tmp_path):
    save_base(base, tmp_path)
    again = LanguageModel.load(tmp_path, dtype=torch.float32)
    assert close(again(ids), base(ids), 3e-2)           # bf16 on disk
    assert "model.layers.0.self_attn.q_norm.weight" in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == 1


@pytest.mark.parametrize("harm, word", [("drop", "lacks"), ("extra", "does not have"), ("shape", "expected"),
                                        ("cut", "damaged"), ("gone", "missing"), ("config", "rope_scaling")])
def test_bad_folders_are_named(base, tmp_path, harm, word):
    save_base(base, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if harm == "drop":
        tensors.pop("model.norm.weight")
    elif harm == "extra":
        tensors["model.layers.9.x"] = torch.zeros(1)
    elif harm == "shape":
        tensors["model.norm.weight"] = torch.zeros(33)
    save_file(tensors, path)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif harm == "gone":
        path.unlink()
    elif harm == "config":
        raw = json.loads((tmp_path / "config.json").read_text()) | {"rope_scaling": {"type": "yarn"}}
        (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=word):
        LanguageModel.load(tmp_path)


def test_presets_are_consistent():
    for name, sizes in PRESETS.items():
        c = Config(**sizes)
        assert lora_size(c, 4) % c.hidden_size == 0, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_equals_cpu(base, ids):
    lora, _ = random_lora(base.config)
    expected = base(ids, None, lora)
    got = base.cuda()(ids.cuda(), None, map_lora(lambda t: t.cuda(), lora)).cpu()
    assert close(got, expected, 1e-4)


def test_conversations_in_one_row_do_not_see_each_other():
    """Numbers in the mask: each conversation gets what it gets in a row of its own, and the loss is the sum."""
    model = LanguageModel(Config(**PRESETS["test"], vocab_size=300), 3)
    torch.manual_seed(0)
    a, b = torch.randint(0, 300, (1, 9)), torch.randint(0, 300, (1, 14))
    row, numbers = torch.cat((a, a[:, :1], b), 1), torch.tensor([[1] * 9 + [0] + [2] * 14])
    logits = model(row, numbers)
    torch.testing.assert_close(logits[:, :9], model(a), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, 10:], model(b), atol=1e-5, rtol=1e-5)
    assert (model(row, (numbers > 0).long())[:, 10:] - model(b)).abs().max() > 1e-3
