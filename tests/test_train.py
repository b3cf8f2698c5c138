"""The loop: overfitting, resuming, skipping bad steps, two processes, scoring."""
import argparse
import json
import operator
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import shine
import train
from conftest import ROOT, close
from data import Examples, batches, collate, render
from model import Config, UserError, flatten
from shine import Shine, ShineConfig
from train import STAGES, Base, Watch, exact_match, f1_score, learning_rate, make_optimizers, normalize

TINY = ROOT / "checkpoints/tiny"
BASE = ["--stage", "base", "--preset", "test", "--vocab-size", "400", "--batch", "4", "--eval-texts", "2", "--workers", "0",
        "--float32", "--device", "cpu", "--max-facts", "2", "--warmup", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of four steps, and a hypernetwork of two on top."""
    out = tmp_path_factory.mktemp("run")
    train.main(BASE + ["--steps", "4", "--eval-every", "2", "--out", str(out / "base")])
    train.main(["--stage", "pretrain", "--model", str(out / "base"), "--steps", "2", "--out", str(out / "pre"), "--no-static-a", "--rank", "2"] + BASE[4:])
    return out


def test_scoring_is_squads():
    assert normalize(" The  Red, hat.") == "red hat"
    assert train.parse(["--stage", "finetune", "--preset", "paper-1qa", "--steps", "1"]).max_turns == 1
    assert exact_match("the red hat", ["a red hat", "x"]) == 1 and exact_match("hat", ["a red hat"]) == 0
    assert f1_score("red big hat", ["a red hat"]) == pytest.approx(0.8) and f1_score("", ["a"]) == 1 and f1_score("x", ["y"]) == 0


def test_learning_rate_by_hand():
    assert [round(learning_rate(p, s, 1.0, 2), 3) for s, p in ((0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0))] == [0.5, 0.75, 0.5, 0.0]


def fit(module, batch, steps, lr):
    """Train on one batch -> (first loss, last loss)."""
    optimizers, clips = make_optimizers(module, lr, lr, 0.0, (0.9, 0.99))
    first = None
    for _ in range(steps):
        loss = module(batch)
        first = first or loss.item()
        loss.backward()
        for params in clips.values():
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad()
    return first, loss.item()


def test_several_workers_make_one_stream(tokenizer):
    """Two workers with pools of two batches: no example twice, and a resumed run goes on with the same batches."""
    examples = Examples("finetune", tokenizer, 400, 600, max_facts=2)
    stream = lambda start: train.loader(examples, argparse.Namespace(batch=4, workers=2, cuda_graphs=False), start, 0, 1, torch.device("cpu"), pool=2)
    first, again = stream(0), stream(3)
    seen = [next(first) for _ in range(8)]
    texts = {tuple(row.tolist()) for batch in seen for row in batch["input_ids"]}
    assert len(texts) == 8 * 4
    for batch in seen[3:]:
        resumed = next(again)
        assert all(torch.equal(batch[k], resumed[k]) for k in batch)
    met = []

    class Noted(Examples):
        def __call__(self, index, before):
            met.append((index, before))
            return super().__call__(index, before)
    noted = Noted("finetune", tokenizer, 400, 600, max_facts=2)
    workers = [batches(noted, 4, pool=2, worker=i, workers=2) for i in (0, 1)]
    for _ in range(4):
        [next(stream) for stream in workers]
    # all that one process would make, and a curriculum that goes by time
    assert sorted(index for index, _ in met) == list(range(32)) and max(abs(index - before) for index, before in met) <= 8
    assert sorted(before for _, before in met)[:4] == [0, 0, 2, 2]


class Recorder:
    """What CUDA graphs do, for a machine without them: inside torch.cuda.graph a pass does not run, replay runs it on the tensors it was given."""

    def __init__(self, monkeypatch):
        self.one_pass = train.one_pass
        monkeypatch.setattr(train, "one_pass", self.pass_or_record)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"replay": lambda graph: graph.run()}))
        monkeypatch.setattr(torch.cuda, "graph", self.recording)
        self.graph = None

    @contextmanager
    def recording(self, graph, pool, capture_error_mode):
        self.graph = graph
        yield
        self.graph = None

    def pass_or_record(self, *args):
        if self.graph is None:
            return self.one_pass(*args)
        loss = torch.zeros(())
        self.graph.run = lambda: loss.copy_(self.one_pass(*args))
        return loss

    def recordable(self, function):
        """A function of tensors to a tensor, as it runs inside and outside of a recording."""
        def run(*args):
            if self.graph is None:
                return function(*args)
            result = torch.zeros_like(function(*args))
            self.graph.run = lambda: result.copy_(function(*args))
            return result
        return run


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_texts_read_by_recorded_passes_give_the_same_lora(shine, monkeypatch, device):
    """Of each shape the first text is read as it comes, the second recorded, the third replayed; an earlier LoRA is not overwritten."""
    recorder = Recorder(monkeypatch) if device == "cpu" else None
    shine.to(device)
    texts = ["Mara has a red hat.", "Tom sings.", "A goat sleeps here.", ["One hat.", "Two green hats."], ["Three.", "Four goats and a hen."], ["A.", "B."]]
    expected = [shine.generate_lora(text) for text in texts]
    shine.record()
    if recorder:
        shine.recorded.function = recorder.recordable(shine.recorded.function)
    got = [shine.generate_lora(text) for text in texts]
    for lora, same in zip(got, expected):
        assert close(flatten(lora), flatten(same))
    assert len(shine.recorded.records) == 2 and not close(flatten(got[1]), flatten(got[2]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_recorded_passes_give_the_same_gradients(shine, tokenizer, monkeypatch, device):
    """Two shapes in turn, three batches of each: the first runs, the second is recorded, the third is replayed with other numbers."""
    if device == "cpu":
        Recorder(monkeypatch)
    shine.to(device)
    examples, total = Examples("finetune", tokenizer, 60, 200, max_facts=1), torch.tensor(7.0, device=device)
    first, second = (collate([examples(i) for i in numbers], tokenizer, 32, quarters=True) for numbers in ((0, 1), (2, 3, 4)))
    other = lambda batch, k: {name: ((v + k) % 256 if name.endswith("_ids") else v).to(device) for name, v in batch.items()}
    full = {name: v for name, v in first.items() if not name.endswith("_mask")}      # as gradients() passes on full rows
    mixed = [other(batch, k) for k in range(3) for batch in (first, second, full)]
    expected = []
    for batch in mixed:
        loss = shine(batch, total)
        expected.append((loss.detach(), [*torch.autograd.grad(loss, shine.trained().values())]))
    del loss      # its graph would tie the parameters' gradients to the stream it ran on, which a record cannot use
    graphs = train.Graphs(shine)
    where = [p.grad.data_ptr() for p in shine.trained().values()]
    for batch, (loss, gradients) in zip(mixed, expected):
        assert close(graphs(shine, batch, total), loss)
        assert all(close(p.grad, g, 1e-4) for p, g in zip(shine.trained().values(), gradients))
        shine.zero_grad(set_to_none=False)
    assert [p.grad.data_ptr() for p in shine.trained().values()] == where and len(graphs.records) == 3


def test_masks_of_full_rows_are_left_out(shine, tokenizer):
    """They say nothing, and attention without a bias is the cheaper one; what is padded keeps its mask."""
    ids = torch.arange(2 * 12).view(2, 12) % 200
    for padding in (0, 3):
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[1, 12 - padding:] = False
        batch = {"context_ids": ids, "context_mask": mask, "input_ids": ids.flip(1), "attention_mask": mask.long(), "weights": mask.float()}
        expected, seen = shine(batch).detach(), []
        report = train.gradients(shine, [batch], {"all": list(shine.trained().values())}, 1.0, 1, torch.device("cpu"),
                                 lambda module, batch, total: seen.append(set(batch)) or train.one_pass(module, batch, total))
        assert close(report[0], expected)
        assert seen == [set(batch) if padding else {"context_ids", "input_ids", "weights"}]
        if not padding:
            assert close(shine.gist({name: batch[name] for name in seen[0]}), shine.gist(batch))


def test_quarters_change_no_loss(base, tokenizer):
    rows = [Examples("finetune", tokenizer, 60, 200, max_facts=1)(i)[1:] for i in range(3)]
    plain, even = (collate([(None, *row) for row in rows], tokenizer, 32, quarters=q) for q in (False, True))
    positions = plain["weights"][:, 1:].numel()
    assert len(plain["counted"]) < len(even["counted"]) == len(even["counted"].unique()) and len(even["counted"]) % -(-positions // 4) == 0
    assert close(base.loss(even).detach(), base.loss(plain).detach())


def test_a_resumed_run_keeps_its_workers(folder):
    with pytest.raises(UserError, match="has --workers 0: with 2"):
        train.main([a for a in BASE if a not in ("--workers", "0")] + ["--workers", "2", "--steps", "5", "--resume", "--out", str(folder / "base")])


def test_a_cpu_starts_from_the_smaller_model_that_ships():
    assert [train.shipped(torch.device(name)) for name in ("cpu", "cuda")] == [TINY, ROOT / "checkpoints/small"]


def test_overfits_four_examples(base, tokenizer):
    """A base learns four texts in its prompt; then the hypernetwork, with the base frozen, learns them without a prompt:
    the conversations ask the same thing, so only the generated LoRA tells the answers apart."""
    texts = (("A red hat.", "red"), ("A big dog.", "dog"), ("Tom came.", "Tom"), ("At nine.", "nine"))
    turns = [[("user", "?"), ("assistant", answer)] for _, answer in texts]
    prompted = collate([(None, *render(tokenizer, t, c)) for t, (c, _) in zip(turns, texts)], tokenizer)
    assert fit(Base(base.requires_grad_(True)), prompted, 40, 1e-2)[1] < 0.1
    shine = Shine(base, tokenizer, ShineConfig(r=4, meta_r=4, scale=0.1))
    absorbed = collate([(tokenizer.encode(c), *render(tokenizer, t)) for t, (c, _) in zip(turns, texts)], tokenizer)
    first, last = fit(shine, absorbed, 80, 3e-3)
    assert last < 0.2 < first, (first, last)


def test_optimizers_hold_exactly_what_trains(shine, tokenizer):
    assert len(make_optimizers(Shine(shine.base, tokenizer, ShineConfig(m2p_layers=0)), 1e-3, 1e-3, 0.01, (0.9, 0.99))[0]) == 1      # no matrices for Muon
    make_optimizers(shine, 1e-3, 1e-3, 0.01, (0.9, 0.99))
    make_optimizers(Base(shine.base.requires_grad_(True)), 1e-3, 1e-3, 0.01, (0.9, 0.99))
    with pytest.raises(AssertionError):
        make_optimizers(shine, 1e-3, 1e-3, 0.01, (0.9, 0.99))


def test_muon_is_torchs():
    """In bf16 to the bit for matrices that have their shape alone, and nearly for those that share it; in float32 but for bf16's rounding."""
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(8, 8), (16, 8), (8, 24), (8, 8)])]
    for dtype, close in ((torch.bfloat16, 1e-2), (torch.float32, 3e-2)):
        ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
        optimizers = train.Muon(ours, 1e-2, 0.1, dtype), torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in range(3):
            for i, pair in enumerate(zip(ours, theirs)):
                for p in pair:
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            for optimizer in optimizers:
                optimizer.step()
        for a, b, p in zip(ours, theirs, start):
            assert (a - b).norm() <= (0 if dtype == torch.bfloat16 and p.shape != (8, 8) else close) * (b - p).norm(), p.shape


def test_killed_and_resumed_equals_straight_bitwise(folder, tmp_path, monkeypatch):
    """2 + stop + resume + 2 steps equal 4 steps: the schedule is that of --steps 4 in both, and no flag has to be said again."""
    args, calls, real = BASE + ["--steps", "4", "--eval-every", "2", "--out", str(tmp_path)], [], train.evaluate

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(train, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(args)
    monkeypatch.setattr(train, "evaluate", real)
    assert (half := json.loads((tmp_path / "state.json").read_text()))["step"] == half["watch"]["seen"] == 2
    with open(tmp_path / "log.jsonl", "a") as log:      # as a later kill leaves it
        log.write('{"step": 3, "loss": 1.0}\n{"step": 3, "lo')
    bare = ["--stage", "base", "--resume", "--out", str(tmp_path), "--device", "cpu"]
    assert train.parse(bare).steps == 4
    train.main(bare)
    a, b = load_file(tmp_path / "state.safetensors"), load_file(folder / "base/state.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    whole, straight = (json.loads((p / "state.json").read_text()) for p in (tmp_path, folder / "base"))
    assert whole["watch"] == straight["watch"] and whole["samples"] == straight["samples"] == 16
    steps = lambda key: [line["step"] for line in map(json.loads, open(tmp_path / "log.jsonl")) if key in line]
    assert steps("tokens") == [1, 2, 3, 4] and steps("unseen") == [4]
    args = train.parse([*bare, "--minutes", "3", "--lr", "0.5"])
    assert (args.steps, args.minutes, args.lr, args.muon_lr, args.batch, args.max_facts) == (None, 3, 0.5, STAGES["base"]["muon_lr"], 4, 2)


def test_checkpoints_between_evaluations(folder, tmp_path, monkeypatch):
    """Killed at its third step with --save-every 1, a run goes on from the second; it ends as the straight one does."""
    args, calls, real = BASE + ["--steps", "4", "--eval-every", "4", "--save-every", "1", "--out", str(tmp_path)], [], train.Base.forward

    def killed(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **named)
    monkeypatch.setattr(train.Base, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(args)
    monkeypatch.setattr(train.Base, "forward", real)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 2
    train.main(args + ["--resume"])
    a, b = (load_file(p / "state.safetensors") for p in (tmp_path, folder / "base"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_that_comes_apart_goes_back(tmp_path, monkeypatch, capsys):
    """From the eighth step on the loss is 50 higher: weights and moments of the checkpoint before the last one, half the rates, once;
    killed in the next step, the run goes on from there."""
    gradients, go_back, watch, calls, back = train.gradients, train.go_back, train.Watch, [], []

    def spoiled(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return gradients(*arguments) + 50 * (len(calls) > 7)

    def noted(out, module, optimizers, *rest):
        before = load_file(out / train.BEFORE)
        go_back(out, module, optimizers, *rest)
        now = {"param." + n: p for n, p in module.trained().items()} | {
            f"{key}.{n}": value for n, p in module.trained().items() for o in optimizers for key, value in o.state.get(p, {}).items()}
        back.append(all(torch.equal(before[n], t) for n, t in now.items()))
    for name, value in (("gradients", spoiled), ("go_back", noted), ("Watch", lambda: watch(3))):
        monkeypatch.setattr(train, name, value)
    run = BASE + ["--steps", "10", "--eval-every", "10", "--save-every", "3", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        train.main(run)
    train.main(run + ["--resume"])
    assert back == [True] and "back to the weights of step 3" in capsys.readouterr().out
    rates = [row["lr"] for row in map(json.loads, open(tmp_path / "log.jsonl")) if "lr" in row]
    expected = [learning_rate(step / 10, step, 1.0, 2) for step in range(10)]
    assert [round(r / rates[0] / (e / expected[0]), 4) for r, e in zip(rates, expected)] == [1] * 8 + [0.5] * 2
    assert json.loads((tmp_path / "state.json").read_text())["slowed"] == 0.5
    calls.clear()
    monkeypatch.setattr(train, "go_back", go_back)
    train.main(BASE + ["--steps", "8", "--eval-every", "9", "--out", str(tmp_path / "none")])
    assert "there is no checkpoint to go back to (--save-every), the rates are now 0.5 of" in capsys.readouterr().out


def test_a_loss_that_wanders_is_not_one_that_rises():
    rng, watch = random.Random(0), Watch()
    assert not any(watch(abs(rng.gauss(1, 1)) + 2 * 0.99 ** i) for i in range(3000))


def test_the_run_that_came_apart_is_told_in_time():
    """The losses of a run on a GPU: sound until about step 1,800, of no text in particular from 1,950 on."""
    losses, watch = json.loads((ROOT / "benchmarks/results/small/apart.json").read_text())["loss of each of the first 2,200 steps"], Watch()
    assert 1850 < [watch(loss) for loss in losses].index(True) < 1950


def test_stages_follow_each_other_and_leave_the_base_alone(folder, tmp_path):
    train.main(["--stage", "finetune", "--model", str(folder / "pre"), "--steps", "2", "--out", str(tmp_path)] + BASE[4:])
    same = [load_file(p / "model.safetensors") for p in (folder / "base", folder / "pre", tmp_path)]
    assert all(torch.equal(same[0][k], s[k]) for s in same[1:] for k in s)
    a, b = load_file(folder / "pre/hypernet.safetensors"), load_file(tmp_path / "hypernet.safetensors")
    assert not torch.equal(a["memory"], b["memory"])
    assert Shine.load(tmp_path).config.r == 2 and Shine.load(tmp_path).config.m2p_norm
    with pytest.raises(UserError, match="--m2p-norm False.*has True"):
        train.main(["--stage", "finetune", "--model", str(folder / "pre"), "--no-m2p-norm", "--out", str(tmp_path / "no")] + BASE[4:])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"in-context", "question", "shine"} <= set(lines[-1]["unseen"])


def test_gisting_first_then_the_rest(folder, tmp_path, capsys, monkeypatch):
    more = ["--no-static-a", "--rank", "2", "--steps", "2"] + BASE[4:]
    with monkeypatch.context() as patch:
        patch.setattr(Shine, "generate_lora", None)                     # neither trained nor scored through a LoRA
        train.main(["--stage", "gist", "--model", str(folder / "base"), "--out", str(tmp_path / "gist")] + more)
    assert f"go on with --stage pretrain --model {tmp_path / 'gist'}" in capsys.readouterr().out
    a, b = load_file(tmp_path / "gist/hypernet.safetensors"), load_file(folder / "pre/hypernet.safetensors")     # the same seed
    new = Shine(Shine.load(tmp_path / "gist").base, Shine.load(tmp_path / "gist").tokenizer, ShineConfig(2, 24, m2p_norm=True))
    start = {n: p.to(torch.bfloat16) for n, p in new.trained().items()}
    assert a.keys() == b.keys() == start.keys()
    assert {n.split(".")[0] for n in a if not torch.equal(a[n], start[n])} == {"memory", "meta_lora"}
    assert {n.split(".")[0] for n in b if not torch.equal(b[n], start[n])} == {"memory", "meta_lora", "m2p"}
    scored = json.loads((tmp_path / "gist/log.jsonl").read_text().splitlines()[-1])["unseen"]
    assert set(scored) == {"loss", "in-context", "question", "reconstruction"}      # there is no LoRA yet to answer with
    train.main(["--stage", "pretrain", "--model", str(tmp_path / "gist"), "--out", str(tmp_path / "pre"), "--steps", "1"] + BASE[4:])
    train.main(["--stage", "gist", "--model", str(tmp_path / "pre"), "--out", str(tmp_path / "again"), "--steps", "1"] + BASE[4:])      # its M2P has trained
    for name, warned in (("gist", True), ("pre", False), ("again", False)):
        capsys.readouterr()
        shine.main(["A text.", "--model", str(tmp_path / name), "--ask", "What?"])
        assert (f"{tmp_path / name} is from the stage gist" in capsys.readouterr().out) == warned
    train.main(["--stage", "gist", "--resume", "--out", str(tmp_path / "gist"), "--rank", "2", "--steps", "3"] + BASE[4:])
    assert train.main(["--stage", "gist", "--model", str(folder / "base"), "--dry-run"] + more)["trained"] == sum(a[n].numel() for n in ("memory", "meta_lora"))
    with pytest.raises(UserError, match="--compile is for the other stages"):
        train.main(["--stage", "gist", "--compile"])
    with pytest.raises(UserError, match="paper is not one of stage gist: none"):
        train.main(["--stage", "gist", "--preset", "paper", "--steps", "1"])


def test_scale_of_a_new_hypernetwork_falls_with_the_width_from_192_on():
    """In proportion below it too, scale was 0.06 at H = 64: a LoRA so large that nothing was learnt."""
    scale = lambda H: train.new_config(train.parse(["--stage", "pretrain"]), Config(hidden_size=H)).scale
    assert [scale(H) for H in (64, 192, 384, 4096)] == pytest.approx([0.02, 0.02, 0.01, 0.0009375], rel=1e-3)


def test_a_new_hypernetwork_generates_b_alone_unless_it_is_to_be_as_in_the_paper():
    kind = lambda *more: (lambda c: (c.static_a, c.r, c.target_modules))(train.new_config(train.parse(["--stage", "pretrain", "--steps", "1", *more]), Config(hidden_size=192)))
    assert kind() == (True, 72, "down_proj") and kind("--no-static-a") == (False, 4, "all")
    assert kind("--preset", "paper") == (False, 8, "all") and kind("--rank", "6", "--target-modules", "o_proj") == (True, 6, "o_proj")


def test_runs_of_different_seeds_are_measured_on_the_same_examples(tokenizer):
    args = train.parse(["--stage", "pretrain", "--eval-texts", "3"])
    args.context_length, args.conversation_length = 192, 256
    one, two = (train.Unseen(argparse.Namespace(**vars(args) | {"seed": seed}), tokenizer) for seed in (0, 1))
    assert one.records == two.records and torch.equal(one.batch["input_ids"], two.batch["input_ids"])


def test_higher_rates_are_for_memory_states_of_unit_size(folder, tmp_path):
    (tmp_path / "hypernet.json").write_text('{"m2p_norm": false}')
    rates = lambda *more: operator.attrgetter("lr", "muon_lr", "read_lr")(train.parse(["--stage", "pretrain", *map(str, more)]))
    assert rates() == rates("--model", folder / "pre") == rates("--model", folder / "base") == (4e-3, 6e-3, 1e-3)
    assert rates("--no-m2p-norm") == rates("--model", tmp_path) == rates("--hypernet", tmp_path) == (1e-3, 2e-3, 1e-3)
    assert rates("--model", tmp_path, "--lr", 5e-4) == (5e-4, 2e-3, 5e-4) and rates("--lr", 2e-3, "--read-lr", 3e-3) == (2e-3, 6e-3, 3e-3)
    assert rates("--preset", "paper", "--steps", 1) == (5e-5, 0.0, 5e-5)


def test_reading_has_its_own_rate(shine):
    """Each parameter by the rate of its group: memory embeddings and meta LoRA 1, matrices of the M2P's layers 3, the rest 2."""
    optimizers, _ = make_optimizers(shine, 2.0, 3.0, 0.01, (0.9, 0.99), read_lr=1.0)
    peaks = {id(p): group["peak"] for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in shine.trained().items():
        assert peaks[id(p)] == (1 if name in ("memory", "meta_lora") else 3 if p.dim() == 2 and "layers." in name else 2), name


def test_a_new_language_model_may_take_a_tokenizer_that_is_there(folder, tmp_path):
    train.main(BASE + ["--steps", "1", "--tokenizer", str(folder / "base"), "--out", str(tmp_path / "b")])
    assert (tmp_path / "b/bpe.json").read_bytes() == (folder / "base/bpe.json").read_bytes()
    for wrong in (["--stage", "finetune"], ["--stage", "base", "--model", str(folder / "base")]):
        with pytest.raises(UserError, match="for a new language model"):
            train.parse([*wrong, "--tokenizer", "x"])
    with pytest.raises(UserError, match="bpe.json is missing"):
        train.main(BASE + ["--steps", "1", "--tokenizer", str(tmp_path), "--out", str(tmp_path / "c")])


def test_a_hypernetwork_made_for_an_earlier_base_is_a_start_on_request(folder, tmp_path):
    more = ["--model", str(folder / "base"), "--steps", "1", "--conversation-length", "300"] + BASE[4:]
    train.main(["--stage", "base", "--model", str(folder / "base"), "--steps", "1", "--out", str(tmp_path / "base")] + BASE[4:])
    moved = [str(tmp_path / "base") if a == str(folder / "base") else a for a in more]
    train.main(["--stage", "finetune", "--hypernet", str(folder / "pre"), "--out", str(tmp_path / "on")] + moved)
    assert Shine.load(tmp_path / "on").config.r == 2               # rank 2 is the old one's; its base is the new one
    with pytest.raises(UserError, match="belongs to another language model"):
        Shine.load(folder / "pre", base=str(tmp_path / "base"))
    with pytest.raises(UserError, match="no hypernet.json"):
        train.main(["--stage", "finetune", "--hypernet", str(folder / "base"), "--out", str(tmp_path / "no")] + moved)


def test_a_lora_with_one_a_for_all_texts_trains_and_takes_over_a_hypernetwork(folder, tmp_path):
    sizes = ["--rank", "6"]      # the rest is what new hypernetworks are
    for stage, start in (("gist", folder / "base"), ("pretrain", tmp_path / "gist")):
        train.main(["--stage", stage, "--model", str(start), "--out", str(tmp_path / stage), "--steps", "1"] + (sizes if stage == "gist" else []) + BASE[4:])
    a, b = (load_file(tmp_path / stage / "hypernet.safetensors") for stage in ("gist", "pretrain"))
    assert {n.split(".")[0] for n in a if not torch.equal(a[n], b[n])} == {"memory", "meta_lora", "lora_a", "answer_lora", "m2p"}
    assert train.main(["--stage", "pretrain", "--model", str(folder / "base"), "--dry-run", *sizes] + BASE[4:])["trained"] == sum(t.numel() for t in b.values())
    old = Shine.load(folder / "pre")      # with --no-static-a
    assert Shine.load(tmp_path / "pretrain").config.answer_r == 8 and old.config.answer_r == 0
    run = ["--stage", "pretrain", "--model", str(folder / "pre"), "--hypernet", str(folder / "pre"), "--out", str(tmp_path / "on"), "--steps", "1"]
    train.main(run + ["--static-a"] + BASE[4:])      # B of down_proj (r, H): as many ranks as memory tokens
    new = Shine.load(tmp_path / "on")
    assert new.config.static_a and new.M == new.config.r == old.M and new.config.target_modules == "down_proj"
    assert (new.memory - old.memory).abs().max() < 0.02      # one step away
    more = ["--stage", "pretrain", "--model", str(folder / "pre"), "--hypernet", str(tmp_path / "on"), "--answer-rank", "2", "--lora-layers", "1", "--out", str(tmp_path / "beside"), "--steps"]
    train.main(more + ["2"] + BASE[4:])
    train.main(["--stage", "pretrain", "--resume", "--out", str(tmp_path / "beside"), "--steps", "3", "--device", "cpu"])
    beside = Shine.load(tmp_path / "beside")
    assert beside.config == replace(new.config, answer_r=2, lora_layers=1) and beside.answer_lora.abs().max() > 0 and beside.generate_lora("A hat.").ranks["layers.0.self_attn.q_proj"] == 2
    with pytest.raises(UserError, match="--answer-rank 3: the hypernetwork in .* has 2"):
        train.main(["--stage", "pretrain", "--model", str(tmp_path / "beside"), "--answer-rank", "3", "--out", str(tmp_path / "no"), "--steps", "1"] + BASE[4:])
    with pytest.raises(UserError, match=f"choose a rank of {old.M}, or"):
        train.main(["--stage", "pretrain", "--hypernet", str(folder / "pre"), "--out", str(tmp_path / "no"), "--steps", "1", "--model", str(folder / "pre"),
                    "--static-a", "--target-modules", "down_proj", "--rank", "6"] + BASE[4:])
    with pytest.raises(UserError, match="--static-a True: the hypernetwork in .* has False"):
        train.main(["--stage", "pretrain", "--model", str(folder / "pre"), "--static-a", "--out", str(tmp_path / "no"), "--steps", "1"] + BASE[4:])


def test_a_loss_that_is_not_finite_skips_the_step_and_then_stops_the_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Base, "forward", lambda self, batch, total=None: self.model.loss(batch, total=total) * float("nan"))
    with pytest.raises(UserError, match="lower --lr"):
        train.main(BASE + ["--steps", "9", "--eval-every", "9", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("step skipped") == 5 and not (tmp_path / "state.safetensors").exists()


def test_accumulation_is_one_mean_over_all_counted_tokens(base, tokenizer):
    rows = [Examples("base", tokenizer, 400, 600, max_facts=1)(i) for i in range(4)]
    base.requires_grad_(True)
    whole = collate(rows, tokenizer)
    base.loss(whole).backward()
    expected = base.model.norm.weight.grad.clone()
    base.zero_grad()
    total = whole["weights"][:, 1:].sum()
    for part in (rows[:1], rows[1:]):
        base.loss(collate(part, tokenizer), total=total).backward()
    assert close(base.model.norm.weight.grad, expected, 1e-4)


def test_two_processes_give_the_loss_of_one_with_twice_the_batch(folder, tmp_path):
    args = ["--stage", "pretrain", "--model", str(folder / "base"), "--steps", "3", "--eval-every", "99", "--rank", "2"] + BASE[4:]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = lambda *more: subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py", *args, "--batch", "2",
                                        *more], cwd=ROOT, check=True, capture_output=True, env=environment, timeout=120)
    two("--out", str(tmp_path / "two"))
    train.main([*args, "--batch", "4", "--out", str(tmp_path / "one")])
    losses = [[json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl") if '"tokens"' in line] for name in ("one", "two")]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    args[args.index("--steps"):args.index("--steps") + 2] = ["--minutes", "0.03"]      # by the clock: both end after the same step, or one would wait for ever
    two("--out", str(tmp_path / "timed"))
    state = json.loads((tmp_path / "timed/state.json").read_text())
    assert state["step"] >= 1 and state["seconds"] / 60 >= 0.03


def test_a_run_is_not_overwritten_and_another_stage_does_not_resume_it(folder):
    with pytest.raises(UserError, match="holds a run"):
        train.main(BASE + ["--steps", "1", "--out", str(folder / "base")])
    with pytest.raises(UserError, match="holds a model .* choose another --out"):
        train.main(["--stage", "pretrain", "--model", str(TINY), "--out", str(TINY), "--steps", "1"] + BASE[4:])
    with pytest.raises(UserError, match="go on with --stage pretrain"):
        train.main(["--stage", "finetune", "--model", str(folder / "pre"), "--resume", "--out", str(folder / "pre"), "--steps", "9"] + BASE[4:])


@pytest.mark.parametrize("arguments, word", [
    (["--steps", "0"], "0"), (["--resume", "--out", "nowhere"], "nowhere"), (["--model", "nowhere"], "nowhere"), (["--qa", "none.jsonl"], "none.jsonl"),
    (["--text", "nowhere"], "nowhere"), (["--stage", "sleep"], "sleep"), (["--preset", "huge"], "huge"), (["--wat"], "--wat"), (["--hypernet", "nowhere"], "--hypernet"),
    (["--out", "/proc/none"], "/proc/none"), (["--vocab-size", "260"], "261"), (["--cuda-graphs", "--device", "cpu"], "--cuda-graphs")])
def test_bad_arguments_end_in_one_line_and_status_2(arguments, word, tmp_path):
    command = [sys.executable, "train.py", "--stage", "base", "--preset", "test", "--vocab-size", "300", "--steps", "1", "--out", str(tmp_path / "run")]
    run = subprocess.run(command + arguments, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and word in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr


@pytest.mark.parametrize("arguments", [["--scene-share", "50"], ["--recall-share", "nan"], ["--clip", "0"], ["--clip", "-1"], ["--weight-decay", "-0.1"], ["--muon-lr", "-1"],
                                       ["--curriculum", "-100"], ["--warmup", "-1"]])
def test_a_setting_out_of_range_is_refused(arguments):
    with pytest.raises(UserError, match=f"argument {arguments[0]}: {arguments[1]} is not"):
        train.parse(["--stage", "base", *arguments])


class Refusing(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise UserError("1,000 examples in a row are too long")


def test_what_a_worker_complains_of_is_one_line():
    job = argparse.Namespace(args=argparse.Namespace(accumulate=1), state={"waited": 0.0})
    with pytest.raises(UserError, match="^1,000 examples in a row are too long$"):
        train.Run.draw(job, iter(torch.utils.data.DataLoader(Refusing(), batch_size=None, num_workers=1)))


def test_a_dry_run_has_the_sizes_of_the_hypernetwork_it_goes_on_from(capsys):
    counted = train.main(["--stage", "finetune", "--model", str(TINY), "--dry-run", "--device", "cpu"])
    assert counted["trained"] == sum(t.numel() for t in load_file(TINY / "hypernet.safetensors").values())
    assert "Muon, AdamW" in (out := capsys.readouterr().out) and "(192 context + 256 conversation tokens)" in out
    muons = sum(p.numel() for n, p in load_file(TINY / "hypernet.safetensors").items() if n.startswith("m2p.transformer_layers") and p.dim() == 2)
    assert counted["total"][False] - counted["activations"][False] == counted["frozen_bytes"] + 16 * counted["trained"] - 4 * muons


def test_a_failed_write_leaves_the_older_checkpoint(folder, tmp_path, monkeypatch):
    """A full disk while saving must not destroy what was there."""
    (tmp_path / "state.safetensors").write_bytes(b"older")

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")
    monkeypatch.setattr(train, "save_file", full)
    shine = Shine.load(folder / "pre")
    with pytest.raises(UserError, match="No space left"):
        train.save_state(tmp_path, shine, [], {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(("state.safetensors", train.BEFORE), b"older")


def test_a_part_timed_anew_leaves_the_others_of_its_size(tmp_path):
    from benchmarks.speed import keep
    keep(tmp_path / "s.json", {"torch": "1", "tiny": {"training": 1, "answering": 2}, "small": {"answering": 3}})
    keep(tmp_path / "s.json", {"torch": "2", "tiny": {"answering": 4}})
    assert json.loads((tmp_path / "s.json").read_text()) == {"torch": "2", "tiny": {"training": 1, "answering": 4}, "small": {"answering": 3}}


@pytest.mark.parametrize("size, more", [("reference", {}), ("tiny", {}), ("tiny", {"answer_r": 48}), ("reference", {"lora_layers": 2})])      # a LoRA for seven linears; B alone for one; and one for answering
def test_the_speed_benchmarks_formula_agrees_with_torchs_counter(size, more):
    from benchmarks.speed import batch_of, build, counted, flops
    shine = build(size, torch.device("cpu"), torch.float32)
    shine = Shine(shine.base, shine.tokenizer, replace(shine.config, **more)) if more else shine
    config, hyper, batch = shine.base.config, shine.config, batch_of(2, 64, 48, shine.base.config.vocab_size, "cpu")
    assert flops(config, hyper, shine.M, 2, 64, 48, len(batch["counted"])) == pytest.approx(counted(lambda: shine(batch).backward()), rel=0.05)
