"""The claims of the method, and the Python interface the README shows."""
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import close
from data import Examples, collate, render
from model import Config, LanguageModel, UserError, cut, flatten, lora_size, rope
from shine import Conversation, LoRA, Shine, ShineConfig, absorb, answer_batch, chat, fingerprint, inspect
from train import save_base


@pytest.fixture
def batch(tokenizer):
    def fixed(rows, width):
        return torch.tensor([list(r.encode()) + [0] * (width - len(r)) for r in rows]), \
            torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows])
    context, context_mask = fixed(["Mara has a parrot.", "Tom has a cat"], 18)
    ids, mask = fixed(["who? parrot", "what? cat"], 11)
    return {"context_ids": context, "context_mask": context_mask, "input_ids": ids, "attention_mask": mask,
            "weights": (mask & (torch.arange(11) > 4)).float()}


def test_only_memory_meta_lora_and_m2p_train_and_each_of_them_moves(shine, batch):
    base_before = {n: p.clone() for n, p in shine.base.state_dict().items()}
    before = {n: p.clone() for n, p in shine.trained().items()}
    assert {n.split(".")[0] for n in before} == {"memory", "meta_lora", "m2p"}
    assert all(not p.requires_grad for p in shine.base.parameters())
    optimizer = torch.optim.SGD(shine.trained().values(), lr=1.0)
    shine(batch).backward()
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in shine.trained().items())
    assert all(torch.equal(base_before[n], p) for n, p in shine.base.state_dict().items())


def test_the_second_pass_never_sees_the_context(shine, batch):
    """The loss is that of the conversation alone with the LoRA, which alone depends on the text."""
    alone = {name: t for name, t in batch.items() if not name.startswith("context")}
    direct = shine.base.loss(alone, shine.generate_lora(batch["context_ids"], batch["context_mask"]))
    assert torch.equal(direct, shine(batch))
    assert not torch.equal(shine(batch | {"context_ids": batch["context_ids"].flip(1)}), direct)


def test_loss_is_one_mean_over_all_counted_tokens(shine, batch):
    lora = shine.generate_lora(batch["context_ids"], batch["context_mask"])
    logits = shine.base(batch["input_ids"], batch["attention_mask"], lora).log_softmax(-1)
    picked = [-logits[b, t, batch["input_ids"][b, t + 1]] for b in range(2) for t in range(10) if batch["weights"][b, t + 1]]
    assert close(shine(batch), torch.stack(picked).mean())


def test_gisting_is_one_sequence_whose_conversation_sees_memory_tokens_only(shine, batch):
    base, M, want = shine.base, shine.M, []
    shine.meta_lora.data.zero_()                       # so that one pass over everything is the same as two
    for context, row in (("Mara has a parrot.", "who? parrot"), ("Tom has a cat", "what? cat")):
        N, S = len(context), len(row)
        tokens = base.model.embed_tokens.weight[list((context + row).encode())]
        x = torch.cat((tokens[:N], shine.memory, tokens[N:]))[None]
        seen = torch.ones(N + M + S, N + M + S).tril().bool()
        seen[N + M:, :N] = False
        bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
        angles = rope(torch.arange(N + M + S)[None], base.config.head_dim, base.config.rope_theta)
        for layer in base.model.layers:
            x = layer(x, angles, bias, {})
        want.append(base.model.norm(x)[0, N + M:])
    got = base.hidden(batch["input_ids"], batch["attention_mask"], memory=shine.memory_cache(batch["context_ids"], batch["context_mask"]))
    assert all(close(g[:len(w)], w) for g, w in zip(got, want))
    alone = base.hidden(batch["input_ids"][:1], memory=shine.memory_cache(batch["context_ids"][:1], batch["context_mask"][:1]))
    assert close(alone, got[:1])


@pytest.mark.parametrize("checkpointing", (False, True))
def test_gisting_trains_what_reads_and_keeps_conversations_apart(shine, batch, checkpointing):
    shine.base.checkpointing = checkpointing
    batch["attention_mask"] = torch.tensor([[1] * 5 + [0] + [2] * 5, [1] * 9 + [0] * 2])
    batch["weights"][0, 5] = 0
    loss = shine.gist(batch)
    loss.backward()
    assert {n.split(".")[0] for n, p in shine.trained().items() if p.grad is not None and p.grad.abs().max() > 0} == {"memory", "meta_lora"}
    first, grad = loss.item(), shine.memory.grad.clone()
    batch["input_ids"][0, :5] += 1                     # another first conversation: the second, which has the loss, does not see it
    assert shine.gist(batch).item() == pytest.approx(first, rel=1e-6)
    batch["context_ids"][0] += 1
    assert shine.gist(batch).item() != pytest.approx(first, rel=1e-4)
    if checkpointing:
        shine.base.checkpointing = False
        batch["input_ids"][0, :5] -= 1
        batch["context_ids"][0] -= 1
        shine.zero_grad()
        shine.gist(batch).backward()
        assert close(shine.memory.grad, grad)


def test_rows_of_a_batch_are_texts_on_their_own(shine):
    together = shine.generate_lora(["A red hat.", "Tom lives in a very old mill."])
    for i, text in enumerate(["A red hat.", "Tom lives in a very old mill."]):
        alone = shine.generate_lora(text)
        for a, b in zip(alone, together.row(i)):
            for name in a:
                assert close(a[name][0], b[name][0], 1e-4) and close(a[name][1], b[name][1], 1e-4)
    assert together.rows == 2 and together.row(-1).info == together.row(1).info and torch.equal(together.row(-1)[0]["mlp.down_proj"][1], together[0]["mlp.down_proj"][1][1:])
    with pytest.raises(IndexError):
        together.row(2)
    with pytest.raises(AssertionError, match="this has 2"):
        shine.answer("Who?", together)
    with pytest.raises(AssertionError, match="1 and 2"):
        shine.answer(["Who?"], together)
    with pytest.raises(UserError, match="no text"):
        shine.generate_lora([])


def test_four_lines_from_text_to_answer(shine, tmp_path):
    lora = shine.generate_lora("Mara has a parrot.")
    assert isinstance(shine.answer("Who?", lora), str)
    assert len(shine.answer(["Who?", "What?"], shine.generate_lora(["One.", "Two."]))) == 2
    talk = shine.conversation(lora)
    talk.ask("Who?"), talk.ask("And?")
    assert [role for role, _ in talk.turns] == ["user", "assistant"] * 2
    lora.save(tmp_path / "a.safetensors")
    shine.generate_lora(torch.tensor([[65, 66]])).row(0).save(tmp_path / "ids.safetensors")
    assert LoRA.load(tmp_path / "ids.safetensors", shine.base).r == 2
    again = LoRA.load(tmp_path / "a.safetensors", shine.base)
    assert all(torch.equal(x, y) for a, b in zip(lora, again) for name in a for x, y in zip(a[name], b[name]))
    assert "parrot" not in (tmp_path / "a.safetensors").read_bytes().decode("latin-1")


def test_a_lora_for_some_linears_only(base, tokenizer, ids, batch, tmp_path):
    """It computes what a LoRA for all seven does that is zero elsewhere; it is saved, exported and trained as it is."""
    modules, seven = "o_proj,down_proj", ShineConfig(r=3)
    config = replace(seven, r=6, target_modules=modules, scale=0.05)
    shine = Shine(base, tokenizer, config)
    assert shine.M == 6 * ((32 + 32) + (64 + 32)) // 32 and Shine(base, tokenizer, seven).M == 3 * (64 + 48 + 48 + 64 + 96 * 3) // 32
    lora = shine.generate_lora("Mara has a parrot.")
    assert list(lora[0]) == ["self_attn.o_proj", "mlp.down_proj"]
    whole = cut(torch.zeros(1, 2, lora_size(base.config, 6)), base.config, 6)
    assert close(base(ids, None, lora), base(ids, None, [a | b for a, b in zip(whole, lora)])) and not close(base(ids, None, lora), base(ids), 1e-3)
    assert shine.conversation(lora, max_new_tokens=20).ask("Who?") == answer_batch(base, tokenizer, [[("user", "Who?")]], lora, max_new_tokens=20)[0]
    lora.save(tmp_path / "a.safetensors")
    again = LoRA.load(tmp_path / "a.safetensors", base)
    assert all(torch.equal(x, y) for a, b in zip(lora, again) for name in a for x, y in zip(a[name], b[name])) and list(again[0]) == list(lora[0])
    lora.export_peft(tmp_path / "peft", "base")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["target_modules"] == modules.split(",")
    said = []
    assert absorb(shine, "Mara.", said.append)[1]["numbers"] == 2 * shine.P and "rank 6 on 2 linears of 2 layers" in said[1]
    inspect(shine, "Mara.", said.append)
    assert "o_proj" in said[-3] and "down_proj" in said[-3] and "up_proj" not in said[-3]
    shine(batch).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in shine.m2p.parameters())
    shine.save(tmp_path / "m")
    save_base(base, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    assert Shine.load(tmp_path / "m", base=base).config.target_modules == modules
    with pytest.raises(UserError, match="'up' is not one of q_proj"):
        Shine(base, tokenizer, replace(config, target_modules="o_proj,up"))


def test_answer_is_greedy_decoding_with_the_lora(shine):
    """Alone, where a Decoder takes over after some tokens, and in a batch: the largest logit of the whole prompt, token by token."""
    lora, tokenizer = shine.generate_lora("Mara has a parrot."), shine.tokenizer
    ids, _ = render(tokenizer, [("user", "Who?")], open_ended=True)
    start = len(ids)
    while len(ids) < start + 12 and ids[-1] not in tokenizer.stops:
        ids.append(int(shine.base(torch.tensor([ids]), None, lora)[0, -1].argmax()))
    want = tokenizer.decode([i for i in ids[start:] if i not in tokenizer.stops]).strip()
    assert shine.answer("Who?", lora, max_new_tokens=12) == shine.answer(["Who?"], lora, max_new_tokens=12)[0] == want


def test_a_turn_reads_only_what_is_new(shine, monkeypatch):
    """With a LoRA, and with the text in the prompt; the answers are those to prompts that are read as a whole."""
    hidden, read = shine.base.hidden, []
    monkeypatch.setattr(shine.base, "hidden", lambda x, *args, **options: read.append(x.shape[1]) or hidden(x, *args, **options))
    for talk in (Conversation(shine, shine.generate_lora("Mara has a parrot."), max_new_tokens=4), Conversation(shine, None, "Mara has a parrot.", max_new_tokens=4)):
        for question in ("Who?", "And who feeds it?", "Why?"):
            prompt = talk.prompt(question)
            read.clear()
            answer = talk.ask(question)
            assert read[0] == len(prompt) if question == "Who?" else read[0] <= len(prompt) - before
            assert answer == answer_batch(shine.base, shine.tokenizer, [talk.turns[:-1]], talk.lora, talk.context and ["Mara has a parrot."], max_new_tokens=4)[0]
            before = len(prompt)


def test_who_is_compared_with_knows_the_whole_conversation(shine, monkeypatch):
    """Also what was said while the comparison was off."""
    lines, known = iter(["/compare", "One?", "/compare", "Two?", "/compare", "Three?", "/quit"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))

    def asked(self, question):
        known.append([said for role, said in self.turns if role == "user"])
        self.turns = self.turns + [("user", question), ("assistant", "x")]
        return "x"
    monkeypatch.setattr(Conversation, "ask", asked)
    lora = shine.generate_lora("A red hat.")
    chat(shine, lora, "A red hat.", {"max_new_tokens": 2}, lambda *_: None, Conversation(shine, lora, max_new_tokens=2))
    assert known == [[], [], ["One?", "Two?"], ["One?", "Two?"]]


def test_stopping_an_answer_early_keeps_the_turn(shine):
    shine.base.generate = lambda *a, **k: iter(torch.tensor([[98], [99], [100]]))      # b, c, d
    talk = Conversation(shine, shine.generate_lora("x"))
    stream = talk.stream("Who?")
    assert next(stream) == "b"
    stream.close()
    assert talk.turns == [("user", "Who?"), ("assistant", "b")]


def test_an_old_turn_goes_when_the_conversation_grows_too_long(shine):
    talk = Conversation(shine, max_new_tokens=8)
    talk.turns = [("user", "a" * 100), ("assistant", "b" * 100)] * 3
    assert len(talk.prompt("c")) + 8 <= shine.config.conversation_length and len(talk.turns) < 6
    with pytest.raises(UserError, match="tokens"):
        talk.prompt("d" * 2000)


def test_a_long_text_says_so_and_an_empty_one_is_refused(shine):
    with pytest.warns(UserWarning, match="64 tokens"):
        shine.generate_lora("a" * 200)
    assert shine.encode_context("a" * 200_000)[1] == 200_000 + 1 - 64      # + 1: the prefix space
    assert shine.encode_context(" " * 20000 + "hello") == shine.encode_context("hello")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shine.generate_lora("short")
    for empty in ("", "  \n "):
        with pytest.raises(UserError, match="empty"):
            shine.generate_lora(empty)


def test_lora_of_another_model_is_refused(shine, tokenizer, tmp_path):
    shine.generate_lora("x").save(tmp_path / "a.safetensors")
    shine.base.model.norm.weight.data += 1
    with pytest.raises(UserError, match="another language model"):
        LoRA.load(tmp_path / "a.safetensors", shine.base)


def test_save_and_load(shine, tokenizer, tmp_path):
    save_base(shine.base, tmp_path)
    tokenizer.save(tmp_path)
    stored = Shine(LanguageModel.load(tmp_path, dtype=torch.float32), tokenizer, shine.config)
    stored.load_state_dict({n: p.bfloat16().float() for n, p in shine.trained().items()}, strict=False)
    stored.save(tmp_path)
    again = Shine.load(tmp_path)
    assert again.config == shine.config and fingerprint(again.base) == fingerprint(stored.base)
    a, b = again.generate_lora("Mara"), stored.generate_lora("Mara")
    assert all(torch.equal(x, y) for la, lb in zip(a, b) for n in la for x, y in zip(la[n], lb[n]))


def test_sizes_that_do_not_divide_are_refused_with_their_numbers(tokenizer):
    base = LanguageModel(Config(vocab_size=300, hidden_size=44, intermediate_size=97))
    with pytest.raises(UserError, match="/ 44 ="):
        Shine(base, tokenizer, ShineConfig(r=1))


def test_initial_values(base, tokenizer):
    """Section 6: meta LoRA A normal times sqrt(scale), B zero; position embeddings zero; memory small and random."""
    shine = Shine(base, tokenizer, ShineConfig(r=2, meta_r=64, scale=0.04))
    for layer in cut(shine.meta_lora, base.config, 64):
        for A, B in layer.values():
            assert abs(A.std() - math.sqrt(0.04)) < 0.02 and not B.any()
    assert not shine.m2p.layer_pe.any() and not shine.m2p.token_pe.any() and 0 < shine.memory.std() < 0.05


def test_a_grown_meta_lora_computes_the_same_and_learns_more(shine, batch):
    before = shine(batch)
    shine.grow_meta_lora(5)
    assert shine.config.meta_r == 5 and shine.meta_lora.shape[1] == lora_size(shine.base.config, 5)
    loss = shine(batch)
    assert abs(loss - before) < 1e-5 * before
    loss.backward()
    A, B = cut(shine.meta_lora.grad, shine.base.config, 5)[0]["mlp.up_proj"]
    assert B[3:].abs().min() > 0 and not A[:, 3:].any()            # as in any LoRA: B moves first


def test_examples_reach_the_loss(shine, tokenizer):
    examples = Examples("finetune", tokenizer, 400, 900, max_facts=2)
    assert math.isfinite(shine(collate([examples(0), examples(1)], tokenizer)).item())


def test_a_lora_whose_a_is_the_same_for_every_text(base, tokenizer, batch, tmp_path):
    """B alone is cut out of the memory states: for as many of them more rank. A trains, is saved, and may take over another's reading."""
    config = ShineConfig(r=16, meta_r=3, target_modules="down_proj", static_a=True, scale=0.05)
    shine = Shine(base, tokenizer, config)
    assert shine.M == 16 and shine.P == 16 * 32 and shine.lora_a.shape == (2, 16 * 64)
    lora = shine.generate_lora(["Mara has a parrot.", "Otto owns a mill and a boat."])
    A, B = lora[1]["mlp.down_proj"]
    assert not flatten(lora).requires_grad
    assert torch.equal(A[0], A[1]) and torch.equal(A[0], shine.lora_a[1].view(64, 16)) and not torch.equal(B[0], B[1])
    states = shine.read(torch.tensor([[65, 66, 67]]))
    assert torch.equal(shine.to_lora(states)[0]["mlp.down_proj"][1][0], (shine.m2p(states)[0, 0] * 0.05 ** 0.5).view(16, 32))
    shine(batch).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in shine.trained().items() if n != "meta_lora") and "lora_a" in shine.trained()
    one = lora.row(0)
    one.save(tmp_path / "a.safetensors")
    again = LoRA.load(tmp_path / "a.safetensors", base)
    assert all(torch.equal(x, y) for a, b in zip(one, again) for name in a for x, y in zip(a[name], b[name]))
    said = []
    assert absorb(shine, "Mara.", said.append)[1]["numbers"] == 2 * 16 * 32
    inspect(shine, "Mara.", said.append)
    assert any("cut into B (A is the same for every text) of rank 16" in line for line in said)
    shine.save(tmp_path / "m", torch.float32)
    save_base(base, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    loaded = Shine.load(tmp_path / "m", base=base)
    assert loaded.config == config and torch.equal(loaded.lora_a, shine.lora_a)

    pairs = ShineConfig(r=2, meta_r=3, target_modules="down_proj,gate_proj,up_proj", scale=0.05)       # 2 x 3 x (64 + 32) / 32 = 18 memory tokens
    old = Shine(base, tokenizer, pairs, seed=3)
    texts = ["Mara has a parrot.", "Otto owns a mill."]
    new = old.retargeted(replace(pairs, r=18, target_modules="down_proj", static_a=True), texts)
    assert torch.equal(new.memory, old.memory) and torch.equal(new.read(torch.tensor([[65, 66]])), old.read(torch.tensor([[65, 66]]))) and new.config.r == 18
    assert all(torch.equal(p, q) for p, q in zip(new.m2p.parameters(), old.m2p.parameters()))
    before, after = old.generate_lora(texts)[1]["mlp.down_proj"], new.generate_lora(texts)[1]["mlp.down_proj"]
    assert torch.equal(after[1][:, 16:], before[1])      # the last two of 18 memory tokens were its B before
    assert close(after[0][0][:, 16:], before[0].mean(0)) and not after[0][:, :, :16].any()
    last = old.retargeted(replace(pairs, r=18, target_modules="down_proj", static_a=True, lora_layers=1), texts)
    assert torch.equal(last.lora_a, new.lora_a[1:])
    with pytest.raises(UserError, match="out of 9 memory tokens, this hypernetwork has 18: choose a rank of 18"):
        old.retargeted(replace(pairs, r=9, target_modules="down_proj", static_a=True), texts)
    with pytest.raises(UserError, match="a multiple of 2 fits"):
        Shine(base, tokenizer, replace(config, r=3, target_modules="k_proj"))


@pytest.mark.parametrize("generated", [dict(r=16, target_modules="down_proj", static_a=True), dict(r=2, target_modules="gate_proj,down_proj"), dict(r=2)])
def test_a_lora_for_answering_stands_beside_the_generated_one(base, tokenizer, batch, tmp_path, generated):
    """It is the same for every text, changes nothing before it trains, trains, and is in what is saved and exported."""
    config = ShineConfig(meta_r=3, scale=0.05, **generated)
    plain = Shine(base, tokenizer, config, seed=3)
    texts, names = ["Mara has a parrot.", "Otto owns a mill."], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    new = plain.retargeted(replace(config, answer_r=2), texts)
    was, now = plain.generate_lora(texts), new.generate_lora(texts)
    assert [name.split(".")[1] for name in now[0]] == names and now.ranks == {name: 2 + was.ranks.get(name, 0) for name in now.ranks} and new.M == plain.M
    ids = torch.tensor([[65, 66, 67]]).expand(2, -1)
    assert close(base(ids, None, now), base(ids, None, was))
    with torch.no_grad():
        new.answer_lora.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    now = new.generate_lora(texts)
    for layer, old, trained in zip(now, was, cut(new.answer_lora, base.config, 2)):
        for name, (A, B) in trained.items():
            change = layer[name][0] @ layer[name][1]
            assert close(change, A @ B + (old[name][0] @ old[name][1] if name in old else 0), 1e-5)
    with pytest.raises(UserError, match="has rank 2, and would be lost"):
        new.retargeted(replace(config, answer_r=3), texts)
    made, trained = new.apart(now)
    assert torch.equal(flatten(made), flatten(was)) and torch.equal(flatten(trained)[0], new.answer_lora) and len(plain.apart(was)) == 1
    said = []
    inspect(new, texts[0], said.append)
    tables = "\n".join(said).split("\n5. ")[1].split("\n6. ")
    assert [t.split("\n")[1].split()[1:] for t in tables] == [[name.split(".")[1] for name in layer] for layer in (was[0], now[0])]
    new(batch).backward()
    assert new.answer_lora.grad.abs().max() > 0 and "answer_lora" in new.trained()
    one = now.row(1)
    one.save(tmp_path / "a.safetensors")
    again = LoRA.load(tmp_path / "a.safetensors", base)
    assert again.ranks == now.ranks and close(base(ids[:1], None, again), base(ids, None, now)[1:])
    one.export_peft(tmp_path / "peft", "base")
    peft = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert all(peft["rank_pattern"].get(name, peft["r"]) == r == peft["alpha_pattern"].get(name, peft["lora_alpha"]) for name, r in now.ranks.items())
    new.save(tmp_path / "m", torch.float32)
    save_base(base, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    loaded = Shine.load(tmp_path / "m", base=base)
    assert loaded.config == new.config and close(base(ids, None, loaded.generate_lora(texts)), base(ids, None, now))


@pytest.mark.parametrize("kind", [dict(r=16, target_modules="down_proj", static_a=True, answer_r=2), dict(r=16, target_modules="down_proj", static_a=True), dict(r=2)])
def test_a_lora_for_the_last_layers_only(base, tokenizer, batch, tmp_path, kind):
    """The M2P sees the memory states of these layers; the others have the LoRA for answering or none; taken over from all layers, what is said of these stays."""
    texts, ids, answers = ["Mara has a parrot.", "Otto owns a mill."], torch.tensor([[65, 66, 67]]).expand(2, -1), "answer_r" in kind
    whole = Shine(base, tokenizer, ShineConfig(meta_r=3, scale=0.05, **kind), seed=3)
    with torch.no_grad():
        for p in [whole.m2p.layer_pe, *([whole.answer_lora] if answers else [])]:
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    shine = whole.retargeted(replace(whole.config, lora_layers=1), texts)
    assert (whole.K, shine.K, shine.M) == (2, 1, whole.M) and torch.equal(shine.m2p.layer_pe, whole.m2p.layer_pe[1:])
    states = shine.read(ids)
    assert torch.equal(states, whole.read(ids)[:, 1:]) and shine.m2p(states).shape == (2, 1, shine.P)
    lora, before = shine.generate_lora(texts), whole.generate_lora(texts)
    assert len(lora) == 2 and lora[1].keys() == before[1].keys() and len(lora[0]) == (7 if answers else 0)
    if answers:
        assert torch.equal(shine.lora_a, whole.lora_a[1:]) and all(B.shape[-2] == 2 for _, B in lora[0].values())
    made = shine.apart(lora)[0]
    again = shine.beside(shine.cut(flatten(made)))
    assert not made[0] and all(torch.equal(x, y) for a, b in zip(lora, again) for name in a for x, y in zip(a[name], b[name]))
    one = lora.row(1)
    one.save(tmp_path / "a.safetensors")
    again = LoRA.load(tmp_path / "a.safetensors", base)
    tensors, info = load_file(tmp_path / "a.safetensors"), safe_open(tmp_path / "a.safetensors", framework="pt").metadata()
    for lost, word in (("layers.1.mlp.down_proj.lora_B", "lacks the tensor layers.1.mlp.down_proj.lora_B"), ("layers.1.", "no LoRA for the last layer")):
        save_file({n: t for n, t in tensors.items() if not n.startswith(lost)}, tmp_path / "less.safetensors", metadata=info)
        with pytest.raises(UserError, match=word):
            LoRA.load(tmp_path / "less.safetensors", base)
    logits = base(ids, None, lora)
    assert again.ranks == lora.ranks and close(base(ids[:1], None, again), logits[1:]) and not close(logits, base(ids), 1e-4)
    assert shine.conversation(one, max_new_tokens=20).ask("Who?") == answer_batch(base, tokenizer, [[("user", "Who?")]], one, max_new_tokens=20)[0]
    one.export_peft(tmp_path / "peft", "base")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["layers_to_transform"] == (None if answers else [1])
    said = []
    absorb(shine, texts[0], said.append), inspect(shine, texts[0], said.append)
    assert "of 1 layer" in said[1] and "L x M = 1 x" in "\n".join(said) and any(line.startswith("   0: ") and "  1: " in line for line in said)
    shine(batch).backward()
    assert shine.m2p.layer_pe.grad.abs().max() > 0
    shine.save(tmp_path / "m", torch.float32)
    save_base(base, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    loaded = Shine.load(tmp_path / "m", base=base)
    assert loaded.config == shine.config and close(base(ids, None, loaded.generate_lora(texts)), logits)
    back = shine.retargeted(whole.config, texts)
    assert back.K == 2 and torch.equal(back.m2p.layer_pe[1:], shine.m2p.layer_pe)
    with pytest.raises(UserError, match="lora_layers 3: the language model has 2"):
        Shine(base, tokenizer, replace(whole.config, lora_layers=3))


def test_a_lora_of_b_alone_grows(base, tokenizer, batch):
    """More rank takes more memory tokens: reading says the same to the old ones, which stand before them, and the new ranks add nothing until they train."""
    config = ShineConfig(r=16, meta_r=3, target_modules="down_proj", static_a=True, scale=0.05)
    old = Shine(base, tokenizer, config, seed=3)
    with torch.no_grad():
        old.m2p.token_pe.normal_()
    new = old.retargeted(replace(config, r=24), [], seed=4)
    ids = torch.tensor([[65, 66, 67]])
    assert new.M == 24 and close(new.read(ids)[:, :, :16], old.read(ids)) and torch.equal(new.m2p.token_pe[:16], old.m2p.token_pe)
    for (A, B), (was, _) in zip(*([layer["mlp.down_proj"] for layer in s.generate_lora(["Mara."])] for s in (new, old))):
        assert torch.equal(A[:, :, :16], was) and not A[:, :, 16:].any() and B[:, 16:].any()
    last = old.retargeted(replace(config, r=24, lora_layers=1), [], seed=4)      # and for the last layer alone
    assert torch.equal(last.lora_a, new.lora_a[1:]) and torch.equal(last.memory, new.memory)
    new(batch).backward()
    assert new.lora_a.grad.view(2, 64, 24)[:, :, 16:].any()
    with pytest.raises(UserError, match="24 memory tokens, this hypernetwork has 16"):      # another linear's rows of B
        old.retargeted(replace(config, r=24, target_modules="o_proj"), [])
