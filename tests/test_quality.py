"""The gradient baselines of benchmarks.quality: fair only if each text's LoRA is trained as it would be alone."""
import argparse
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from benchmarks import mean, official, quality, tables, where
from conftest import ROOT, close
from model import UserError, cut, flatten, map_lora
from shine import LoRA, Shine
from test_golden import CASE, load
from train import save_base

TEXTS = ["Mara has a parrot.", "Tom is a baker in Oslo, and he sings."]


def record(text):
    turns = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    return {"context": text, "conversations": turns("Who?", "Mara"), "others": [turns(f"Q{i}?", "yes no"[i % 2 * 4:][:3]) for i in range(10)]}


def test_texts_trained_together_are_trained_alone(shine):
    rows = [quality.text_rows(shine, record(t)) for t in TEXTS]
    start = quality.plain_start(shine, 2)
    together = [flat.clone() for _, flat in quality.fit(shine, start, rows, 3, 1e-2)][-1]
    for i in range(2):
        alone = [flat.clone() for _, flat in quality.fit(shine, start[:1], rows[i:i + 1], 3, 1e-2)][-1]
        assert close(together[i:i + 1], alone, 1e-3) and not torch.equal(alone, start[:1])


def test_what_is_written_out_counts_when_it_is_the_text_to_the_last_sign(shine, monkeypatch):
    """Three short texts, one of them written with a wrong sign, and one that is too long to be asked for."""
    texts, asked = [*TEXTS, "Ann sings.", "Tom ran. " * 60], []

    def write(base, tokenizer, conversations, lora, max_new_tokens):
        asked.extend(conversations)
        return ["Ann sings!", *TEXTS]      # the shortest first
    monkeypatch.setattr(quality, "answer_batch", write)
    result = quality.reconstruction(shine, texts)
    assert asked == [[("user", [shine.tokenizer.recon])]] * 3 and result["written out"] == {"texts": 3, "right": 66.67}
    assert 0 <= result["reconstruction token accuracy"] <= 100 and "written out" not in quality.reconstruction(shine, texts[-1:])


def test_a_plain_start_changes_nothing_and_training_lowers_the_loss_of_the_text(shine):
    start, rows = quality.plain_start(shine, 1), [quality.text_rows(shine, record(TEXTS[0]))]
    ids = torch.tensor([rows[0][0][0]])
    assert torch.equal(shine.base(ids, None, cut(start, shine.base.config, shine.config.r)), shine.base(ids))
    loss = lambda flat: torch.nn.functional.cross_entropy(shine.base(ids, None, cut(flat, shine.base.config, shine.config.r))[0, :-1], ids[0, 1:])
    trained = [flat.clone() for _, flat in quality.fit(shine, start, rows, 30, 1e-2)][-1]
    assert loss(trained) < 0.8 * loss(start)


@pytest.mark.parametrize("config", [{}, {"answer_r": 2, "lora_layers": 1}])
def test_every_condition_is_scored_and_costed(shine, monkeypatch, config):
    if config:
        shine = shine.retargeted(replace(shine.config, **config), TEXTS)
    monkeypatch.setattr(quality, "EPOCHS", 1)
    monkeypatch.setattr(quality, "TTT", (1, 3))
    assert quality.plain_start(shine, 1).shape[1] == shine.base.config.num_hidden_layers      # a fair opponent, also of a LoRA for the last layers
    records, rates = [record(t) for t in TEXTS], {"sft": 1e-2, "ttt": 1e-2, "shine+ttt": 1e-3}
    result = quality.measure(shine, records, rates)["conditions"]
    assert set(result) == {"shine", "in-context", "question", *(f"sft {n}" for n in quality.SFT),
                           *(f"{kind} {n}" for kind in ("ttt", "shine+ttt") for n in quality.TTT)}
    assert all(0 <= r["em"]["mean"] <= 100 and r["em"]["questions"] == 2 for r in result.values())
    table = quality.costs(shine, records, rates)
    assert table["in-context"]["prompt tokens"] > table["shine"]["prompt tokens"] and table["question"]["GFLOP to prepare"] == 0
    assert table["sft 10"]["GFLOP to prepare"] > table["sft 1"]["GFLOP to prepare"] > 0 and table["shine"]["GFLOP to prepare"] > 0
    assert table["ttt 30"]["MiB to prepare"] > 0
    assert list(quality.costs(shine, records[:1], {"shine+ttt": 1e-3}, ("shine",))) == ["shine", "shine+ttt 30"]


def test_a_baseline_from_the_generated_lora_keeps_what_stands_beside_it(shine):
    """Test-time training goes on from what is generated, with the LoRA for answering in place and unmoved; a LoRA from nothing has none."""
    shine = shine.retargeted(replace(shine.config, answer_r=2), TEXTS)
    torch.nn.init.normal_(shine.answer_lora, 0, 0.3, generator=torch.Generator().manual_seed(1))
    generated = shine.generate_lora(TEXTS)
    start, rows, before = quality.generated_part(shine, generated), [quality.text_rows(shine, record(t)) for t in TEXTS], shine.answer_lora.clone()
    assert torch.equal(flatten(quality.as_lora(shine, start, True)), flatten(generated)) and quality.as_lora(shine, start, False).ranks["layers.0.self_attn.q_proj"] == 2
    moved = {beside: [flat.clone() for _, flat in quality.fit(shine, start, rows, 1, 1e-2, beside=beside)][-1] for beside in (False, True)}
    assert not torch.equal(moved[False], moved[True]) and torch.equal(shine.answer_lora, before)


def test_baselines_of_another_hypernetwork_keep_those_that_do_not_know_it(shine, tmp_path, monkeypatch):
    for name, value in {"EPOCHS": 1, "TTT": (1,), "SFT": (1,)}.items():
        monkeypatch.setattr(quality, name, value)
    runs = iter((1, 2))
    monkeypatch.setattr(quality, "choose_rates", lambda _, others, kinds=quality.KINDS: ({kind: 1e-3 * run for kind in kinds}, dict.fromkeys(kinds, run)) if (run := next(runs)) else None)
    monkeypatch.setattr(quality, "costs", lambda _, records, rates, conditions: {name: {"prepare s": rates} for name in [*conditions, *rates]})
    save(shine, tmp_path / "m")
    out = tmp_path / "out.json"
    run = ["--generate", "1", "--turns", "1", "--facts", "1", "--baselines", "--model", str(tmp_path / "m"), "--device", "cpu", "--json", str(out)]
    quality.main(run)
    whole = json.loads(out.read_text())
    assert list(whole["conditions"]) == ["shine", "in-context", "question", "sft 1", "ttt 1", "shine+ttt 1"] and list(whole["costs"]) == ["shine", "in-context", "question", *quality.KINDS]
    out.write_text(json.dumps(whole | {"conditions": {c: r | {"seconds": -1} for c, r in whole["conditions"].items()}}))
    quality.main([*run, "--only", "shine"])
    again = json.loads(out.read_text())
    assert {c for c, r in again["conditions"].items() if r["seconds"] == -1} == {"in-context", "question", "sft 1", "ttt 1"} and set(again["conditions"]) == set(whole["conditions"])
    assert {name for name, row in again["costs"].items() if row == {"prepare s": {"shine+ttt": 2e-3}}} == {"shine", "shine+ttt"} and set(again["costs"]) == set(whole["costs"])
    assert again["learning rates"] == {"sft": 1e-3, "ttt": 1e-3, "shine+ttt": 2e-3}
    quality.main([*run[:-1], str(tmp_path / "third.json"), "--rates", str(out)])      # rates and costs are not found a third time
    third = json.loads((tmp_path / "third.json").read_text())
    assert all(third[name] == again[name] for name in quality.FOUND) and set(third["conditions"]) == set(whole["conditions"])
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match="no learning rate of sft, ttt, shine[+]ttt"):
        quality.main([*run, "--rates", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="--rates RESULT is for --baselines"):
        quality.parse(["--generate", "1", "--rates", str(out)])


def save(shine, folder):
    shine.save(folder)
    save_base(shine.base, folder)
    shine.tokenizer.save(folder)


def test_one_condition_anew_keeps_the_others_of_the_same_texts_and_language_model(shine, tmp_path):
    save(shine, tmp_path / "m")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record(t)) for t in TEXTS))
    out, run = tmp_path / "out.json", ["--data", str(tmp_path / "a.jsonl"), "--model", str(tmp_path / "m"), "--device", "cpu", "--json", str(tmp_path / "out.json")]
    quality.main(run)
    whole = json.loads(out.read_text())
    assert set(whole["conditions"]) == set(quality.CONDITIONS)
    marked = {c: r | {"seconds": -1} for c, r in whole["conditions"].items()}
    out.write_text(json.dumps(whole | {"conditions": marked}))
    quality.main([*run, "--only", "shine"])
    again = json.loads(out.read_text())["conditions"]
    assert list(again) == list(marked) and {c: r for c, r in again.items() if c != "shine"} == {c: r for c, r in marked.items() if c != "shine"}
    assert again["shine"]["seconds"] >= 0 and again["shine"]["em"] == whole["conditions"]["shine"]["em"]
    out.write_text(json.dumps(whole | {"written out": "marked"}))
    quality.main([*run, "--only", "question"])
    assert json.loads(out.read_text())["written out"] == "marked" and json.loads(out.read_text())["reconstruction token accuracy"] == whole["reconstruction token accuracy"]
    with pytest.raises(UserError, match="its texts is 2, here it is 1"):
        quality.main([*run, "--only", "shine", "--limit", "1"])


def test_scenes_of_some_names_are_scored(shine, tmp_path):
    save(shine, tmp_path / "m")
    run = ["--generate", "3", "--turns", "1", "--only", "question", "--model", str(tmp_path / "m"), "--device", "cpu", "--json", str(tmp_path / "o.json"), "--answers", str(tmp_path / "a.json")]
    quality.main([*run, "--scenes", "ru_skip,ru_ski"])
    assert json.loads((tmp_path / "o.json").read_text())["set"].endswith("scenes ru_skip,ru_ski")
    assert all("pass" in answer["context"] for answer in json.loads((tmp_path / "a.json").read_text()))
    with pytest.raises(UserError, match="no scene of assets/scenes begins with 'zz_'"):
        quality.main([*run, "--scenes", "ru_,zz_"])


@pytest.mark.parametrize("page, line", list(zip(tables.PAGES, ("| generated texts of 1 to 9 facts, all | ", "| 10 to 24 | "))))
def test_tables_of_a_page_are_those_of_the_results(page, line):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") >= 2
    assert tables.fill(text) == text, "python -m benchmarks.tables"
    wrong = text.replace(line, line + "9")
    assert wrong != text and tables.fill(wrong) == text


@pytest.mark.parametrize("page", tables.PAGES)
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert len(links) > 5
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_by_gradient_a_part_alone_moves_each_text_its_own_way(shine, monkeypatch):
    mean, part = where.mean_row(shine.generate_lora(TEXTS)), where.PARTS["the same B one layer before"]
    start, (a, b) = flatten(mean)[0], where.by_gradient(shine, [record(TEXTS[0]), record(TEXTS[1]) | {"others": record("")["others"][::-1]}], mean, part, 1e-2)
    own = where.mixed(LoRA(map_lora(torch.zeros_like, mean), shine.config.r), map_lora(torch.ones_like, mean), part)
    kept = flatten(own)[0].bool()
    assert 0 < (~kept).sum() < kept.numel() / 4
    for row in (a, b):
        assert torch.equal(row[kept], start[kept]) and (row[~kept] != start[~kept]).all()
    assert not torch.equal(a, b)
    (same,) = where.by_gradient(shine, [record(TEXTS[0])], mean, where.PARTS["none of it"], 1e-2)
    assert torch.equal(same, start)
    assert where.asked_before([record("x"), record("y") | {"conversations": record("y")["others"][3]}]) == {(1, 0)}
    marked = [record("x"), record("y") | {"conversations": record("y")["others"][3]}]
    monkeypatch.setattr(where, "score", lambda *_, **__: [{"record": 0, "turn": 0, "em": 0.0}, {"record": 1, "turn": 0, "em": 1.0}])      # the second was asked before
    result = where.measure(shine, marked, TEXTS, 2, 1e-2)
    assert {(held["mean"], unmet["mean"], unmet["questions"]) for held, unmet in zip(result["by gradient"].values(), result["by gradient, not asked before"].values())} == {(50, 0, 1)}


def test_texts_are_grouped_by_their_length():
    records = [{"context": "x", "conversations": [{}, {}], "meta": {"turns": 1}}] * 3
    names = quality.groups(records, [{"record": i, "turn": 0} for i in range(3)], [9, 49, 400])
    assert [k for k in names if k.startswith("text of")] == ["text of 0 to 9 tokens", "text of 25 to 49 tokens", "text of 400 tokens or more"]


def test_a_part_of_a_set_is_spread_over_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record(f"{i}.")) for i in range(10)))
    asked = lambda limit: [int(float(r["context"])) for r in quality.texts(argparse.Namespace(data=str(tmp_path / "a.jsonl"), limit=limit, typed=False))]
    assert asked(None) == asked(99) == list(range(10)) and asked(5) == [0, 2, 4, 6, 8] and asked(7) == [0, 1, 2, 4, 5, 7, 8]


def test_answers_to_accept_stand_beside_the_sets_own(shine, monkeypatch):
    said = iter([["Mara"], ["a lady"], ["Tom"]])
    monkeypatch.setattr(train, "answer_batch", lambda *_: next(said))
    scored = [train.evaluate(shine.base, shine.tokenizer, [record("Mara.") | {"accept": [["lady"]]}], "question")[0]["em"] for _ in range(3)]
    assert scored == [1, 1, 0]


def test_where_the_text_is(shine):
    """All of a LoRA is itself, none of it is the mean; B alone leaves A to the mean; a part that is the same for all texts has no share."""
    lora, mean = (made := shine.generate_lora(TEXTS)), where.mean_row(made)
    A, B = (t.detach() for t in lora[-1]["mlp.down_proj"])
    part = lambda name: where.mixed(lora, mean, where.PARTS[name])[-1]["mlp.down_proj"]
    same = lambda pair, a, b: torch.equal(pair[0], a) and torch.equal(pair[1], b)
    middle = [t.expand(2, -1, -1) for t in mean[-1]["mlp.down_proj"]]
    assert same(part("all of it"), A, B) and same(part("none of it"), *middle) and same(part("B alone"), middle[0], B)
    assert same(part("the last layer"), A, B) and same(part("all but these two"), *middle)
    first = where.mixed(lora, mean, where.PARTS["all but the last layer"])[0]["mlp.down_proj"]
    assert same(first, *lora[0]["mlp.down_proj"]) and not same(first, *(t.expand(2, -1, -1) for t in mean[0]["mlp.down_proj"]))
    shares = where.shares(lora)
    assert 0 < shares["mlp.down_proj"]["B"][-1] < 1 and where.shares([{}, *lora[1:]])["mlp.down_proj"]["B"] == shares["mlp.down_proj"]["B"][1:]
    assert where.shares(where.mixed(lora, mean, where.PARTS["A alone"]))["mlp.down_proj"]["B"] == [0] * len(lora)


def test_the_papers_code_gets_our_lora_in_its_own_form():
    """benchmarks.official hands the meta LoRA over as the authors' checkpoint has it, and reads theirs back."""
    shine, _ = load("cpu")
    lora = [{name: tuple(t[None] for t in pair) for name, pair in layer.items()} for layer in cut(shine.meta_lora.data, shine.base.config, shine.config.meta_r)]
    theirs, count = official.nested(lora), 0
    for name, tensor in load_file(CASE / "hypernet/hypernet.safetensors").items():
        if name.startswith("metalora."):
            _, _, i, block, linear, half = name.split(".")
            assert torch.equal(theirs[int(i)]["attention" if block == "self_attn" else block][linear.removesuffix("_proj")][half[-1]], tensor), name
            count += 1
    assert count == 14 * len(lora) and torch.equal(flatten(official.listed(theirs, lora[0])), flatten(lora))


def test_a_folder_that_is_not_the_papers_code_is_refused(tmp_path, shine):
    with pytest.raises(UserError, match="no checkout of the paper's code"):
        official.theirs(tmp_path, shine)


def test_the_mean_of_models_is_that_of_their_weights(shine, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, factor in zip(folders, (1.0, 3.0)):
        with torch.no_grad():
            for p in (*shine.base.parameters(), *shine.trained().values()):
                p.mul_(factor)
        save(shine, folder)
    parts = [f"0.75={folders[0]}", f"0.25={folders[1]}"]
    mean.main([str(tmp_path / "mean"), "--model", *parts, "--hypernet", *parts])
    Shine.load(tmp_path / "mean")      # its hypernetwork belongs to its language model
    for name in ("model.safetensors", "hypernet.safetensors"):
        a, b, c = (load_file(folder / name) for folder in (*folders, tmp_path / "mean"))
        assert a.keys() == c.keys() and all(close(c[k].float(), 0.75 * a[k].float() + 0.25 * b[k].float(), 1e-2) for k in a)
    mean.main([str(tmp_path / "alone"), "--model", f"1={folders[0]}"])
    assert (tmp_path / "alone/model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes() and not (tmp_path / "alone/hypernet.json").exists()
    for wrong, complaint in ((parts[:1], "make 0.75, not 1"), ([folders[0]], "SHARE=FOLDER"), ([parts[0], "0.25=nowhere"], "nowhere")):
        with pytest.raises(UserError, match=complaint):
            mean.main([str(tmp_path / "no"), "--model", *map(str, wrong)])
    assert not (tmp_path / "no").exists()


def test_a_set_as_people_type(tmp_path):
    """--typed writes text, questions and right answers in one way, and what was right stays right."""
    path = tmp_path / "set.jsonl"
    row = {"context": "Mrs Li paid 12 dollars.", "conversations": [{"role": "user", "content": "What did Mrs Li pay?"}, {"role": "assistant", "content": "12 dollars"}],
           "accept": [["12 dollars", "12"]]}
    path.write_text((json.dumps(row) + "\n") * 60)
    plain, typed = (quality.texts(quality.parse(["--data", str(path), *flags])) for flags in ([], ["--typed"]))
    assert all(record == row for record in plain) and len({record["context"] for record in typed}) > 4
    for record in typed:
        amount = record["conversations"][1]["content"]
        assert amount in record["context"] and {"12 dollars", "12", amount} <= set(record["accept"][0])
    assert {"$12", "12 dollars"} <= {record["conversations"][1]["content"] for record in typed}
