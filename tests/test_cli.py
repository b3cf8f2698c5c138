"""The command line as a user starts it, and the shipped weights on held-out generated texts."""
import json
import os
import random
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import shine as cli
from conftest import ROOT
from data import Source
from model import UserError, read_tensors
from shine import DEFAULT_MODEL, Shine
from train import evaluate

TEXT = "Mara keeps a green parrot called Biscuit in the lighthouse."
SHIPPED_EXACT_MATCH = 0.5     # asserted below, on 40 held-out texts; the README's table has the measured figures


def shell(*arguments, stdin="", script="shine.py", cwd=ROOT, **options):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, input=stdin, capture_output=True, text=True,
                          timeout=120, **options)


def fails(run, *words):
    """One clear line, exit status 2, no traceback."""
    assert run.returncode == 2, (run.returncode, run.stdout, run.stderr)
    assert len(run.stderr.strip().splitlines()) == 1 and all(word in run.stderr for word in words), run.stderr
    return True


def call(*arguments):
    """The same command inside this process: faster than starting Python anew."""
    cli.main([str(a) for a in arguments])


def test_ask_in_a_pipe():
    run = shell(TEXT, "--ask", "What is the parrot called?", "--ask", "What color is it?")
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and not run.stderr
    assert "LoRA numbers" in lines[0] and "rank 72 on 1 linear" in lines[1] and lines[2] == "> What is the parrot called?" and len(lines) == 6


def test_json_is_one_object(capsys):
    call(TEXT, "--ask", "Who keeps Biscuit?", "--json")
    out = json.loads(capsys.readouterr().out)
    assert out["turns"][0]["question"] == "Who keeps Biscuit?" and out["turns"][0]["answer"] and out["tokens"] > 5 and out["numbers"] == 276480


def test_saved_lora_answers_like_the_text(tmp_path, capsys):
    call(TEXT, "--save", tmp_path / "a.safetensors", "--ask", "Who keeps Biscuit?")
    first = capsys.readouterr().out.splitlines()[-1]
    call("--load", tmp_path / "a.safetensors", "--ask", "Who keeps Biscuit?")
    assert capsys.readouterr().out.splitlines()[-1] == first


def test_inspect_shows_every_step(capsys):
    call(TEXT, "--inspect")
    out = capsys.readouterr().out
    assert "(1, 10, 72, 384)" in out and "M2P layer 3, over the M axis" in out and "down_proj" in out and out.count("%") == 10


def test_chat(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("Tom lives in Oslo.", encoding="utf-8")
    script = f"Who keeps Biscuit?\n/compare\nwhat color is it\n/forget\n/file {path}\nWhere does Tom live?\n/text Ann is a baker.\n" \
             f"/save {tmp_path}/x.safetensors\n/nonsense\n/file nowhere.txt\n/file\n/help\n/text \n/quit\n"
    run = shell(TEXT, "--chat", stdin=script)
    assert run.returncode == 0 and not run.stderr, run.stderr
    for word in ("text in the prompt:", "without the text:", "cleared", "saved to", "no command /nonsense", "nowhere.txt", "path of the file is empty", "/forget", "the text is empty"):
        assert word in run.stdout, word
    assert (tmp_path / "x.safetensors").is_file()
    assert shell(TEXT, "--chat", stdin="").returncode == 0            # Ctrl-D leaves


def test_standard_input_and_sampling(capsys):
    run = shell("-", "--ask", "Who keeps Biscuit?", "--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--seed", "3", stdin=TEXT)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 4


def test_a_file_from_windows_is_read_as_any_other(tmp_path, capsys):
    for ending in ("\n", "\r\n"):
        (tmp_path / "t.txt").write_bytes(f"Tom lives in Oslo.{ending}He has a boat.".encode())
        call("--file", tmp_path / "t.txt", "--json")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["tokens"] == second["tokens"]


def test_a_conversation_that_is_too_long_says_so(capsys):
    call(TEXT, "--json", *["--ask", "Who keeps " + "the very green " * 10 + "parrot?"] * 9)
    out = capsys.readouterr()
    assert sum(turn.get("dropped", 0) for turn in json.loads(out.out)["turns"]) > 1 and "the conversation is full" in out.err


def test_a_long_text_says_so_and_uses_what_fits(tmp_path, capsys):
    path = tmp_path / "long.txt"
    path.write_text("The old man has a boat. " * 9000, encoding="utf-8")
    call("--file", path, "--ask", "Who has a boat?")
    assert "this model reads 512" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("text", ["🦜🏠👩‍👩‍👧", "玛拉在灯塔里养了一只绿鹦鹉。", "x", "e\u0301" * 50, "\x00"])
def test_any_text_is_read(text, capsys):
    call("--ask", "¿Qué? 什么", "--", text) if text != "\x00" else Shine.load(DEFAULT_MODEL).generate_lora(text)


def test_bad_input(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match="not UTF-8"):
        call("--file", tmp_path / "latin.txt")
    with pytest.raises(UserError, match="cannot be read"):
        call("--file", tmp_path)
    for empty in ("", "   \n"):
        with pytest.raises(UserError, match="empty"):
            call(empty)
    for word, *arguments in (("give one of",), ("give one of", TEXT, "--file", "x"), ("empty", "--file", ""), ("empty", TEXT, "--ask", " "), ("--temperature", TEXT, "--temperature", "-1"),
                             ("--top-p", TEXT, "--top-p", "0"), ("--temperature", TEXT, "--temperature", "nan"), ("--seed", TEXT, "--seed", str(2 ** 64)), ("--json", TEXT, "--json", "--chat"),
                             ("positions for 2048", TEXT, "--ask", "Who?", "--max-new-tokens", "100000000"), ("white space", "A" + " " * 600_000 + "b"),
                             ("a path is empty", "--load", ""), ("--convert takes", "--convert", "x", "--base", "y", "--out", "z", "--hypernet", "w"),
                             ("--inspect", "--load", "x", "--inspect"), ("--base alone", TEXT, "--base", "x"), ("--base alone", "", "--base", "x"), ("give one of", "--base", "x")):
        with pytest.raises(UserError, match=word):
            call(*arguments)
    assert fails(shell("--file", tmp_path / "none.txt"), "none.txt", "No such file")
    assert fails(shell(TEXT, "--wat"), "--wat")
    assert fails(shell(TEXT, "--model", tmp_path / "none"), "not a model folder")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            call(TEXT, "--device", "cuda")


@pytest.mark.parametrize("harm, word", [("missing", "missing"), ("cut", "damaged"), ("other base", "another language model"),
                                        ("size", "expected"), ("negative", "r = -1"), ("fraction", "meta_r = 4.5"), ("tokenizer", "bpe.json"), ("bytes", "156 of the 256 bytes"), ("words", "3005 tokens, the model's embedding 8192 rows")])
def test_a_bad_checkpoint_folder(tmp_path, harm, word):
    folder = tmp_path / "m"
    shutil.copytree(DEFAULT_MODEL, folder)
    path = folder / "hypernet.safetensors"
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif harm in (harms := {"other base": {"base": "0" * 12}, "size": {"meta_r": 2}, "negative": {"r": -1}, "fraction": {"meta_r": 4.5}}):
        raw = json.loads((folder / "hypernet.json").read_text()) | harms[harm]
        (folder / "hypernet.json").write_text(json.dumps(raw))
    else:
        raw = json.loads((folder / "bpe.json").read_text())
        kept = {"tokenizer": {}, "bytes": raw | {"ranks": raw["ranks"][:100]}, "words": raw | {"ranks": raw["ranks"][:3000]}}
        (folder / "bpe.json").write_text(json.dumps(kept[harm]))
    with pytest.raises(UserError, match=word):
        call(TEXT, "--model", folder)


def test_a_lora_for_another_model_and_a_file_that_is_none(shine, tmp_path):
    shine.generate_lora("x").save(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="another language model"):
        call("--load", tmp_path / "a.safetensors", "--ask", "q")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        call("--load", tmp_path / "b.safetensors", "--ask", "q")
    with pytest.raises(UserError, match="not a LoRA"):
        call("--load", DEFAULT_MODEL / "model.safetensors", "--ask", "q")


def test_saving_where_one_cannot(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        call(TEXT, "--save", "/proc/none/x.safetensors")
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "d", tmp_path / "pipe", "."):
        with pytest.raises(UserError, match="cannot write"):
            call(TEXT, "--save", target)
    for target in (tmp_path / "pipe", "."):
        with pytest.raises(UserError, match="cannot write"):
            call(TEXT, "--export-peft", target)
    (tmp_path / "link").symlink_to(tmp_path / "x.safetensors")
    call(TEXT, "--save", tmp_path / "link")
    assert not list(tmp_path.glob(".*")) and (tmp_path / "link").is_symlink() and (tmp_path / "x.safetensors").is_file()


def test_data_command_shows_and_writes(tmp_path):
    run = shell("--count", "1", script="data.py")
    assert run.returncode == 0 and "\033[92m" in run.stdout and run.stdout.count("===") == 7
    run = shell("--write", tmp_path / "x.jsonl", "--count", "5", script="data.py")
    assert run.returncode == 0 and len((tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()) == 5


def test_quality_command(tmp_path):
    qa = {"context": TEXT, "conversations": [{"role": "user", "content": "Who keeps Biscuit?"}, {"role": "assistant", "content": "Mara"}],
          "accept": [["nobody", "Mara"]]}
    (tmp_path / "q.jsonl").write_text(json.dumps(qa) + "\n")
    run = subprocess.run([sys.executable, "-m", "benchmarks.quality", "--data", str(tmp_path / "q.jsonl"), "--json", str(tmp_path / "o.json")],
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(json.loads((tmp_path / "o.json").read_text())["conditions"]) == {"shine", "in-context", "question"}


def test_shipped_weights_answer_held_out_texts():
    """40 unseen texts of the procedural source: by LoRA alone, and hardly ever without the text."""
    shine, source = Shine.load(DEFAULT_MODEL), Source("heldout")
    records = [source.sample(random.Random(5 * 10**8 + i), n_turns=4) for i in range(40)]

    def score(condition):
        rows = evaluate(shine.base, shine.tokenizer, records, condition, shine)
        return sum(row["em"] for row in rows) / len(rows)
    assert score("shine") > SHIPPED_EXACT_MATCH and score("question") < 0.2


def test_readme_commands_and_python_example():
    """Every line of Python in the README runs, and its commands exist."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [b.split("```")[0] for b in readme.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        run = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
        assert run.returncode == 0, run.stderr
    commands = [shlex.split(line, comments=True)[2:] for line in readme.splitlines() if line.startswith("    python shine.py ")]
    assert len(commands) > 4 and all(cli.parse(command) for command in commands)


def test_loading_does_not_import_torchs_compiler():
    """Layers made on the meta device once ran torch's initial values there, which imported torch._dynamo: 1.7 of 4.4 seconds."""
    code = "import sys, shine; shine.Shine.load(shine.DEFAULT_MODEL).generate_lora('A hat.'); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_states_are_bf16_where_the_device_has_it_and_the_weights_are_stored_so(tmp_path, monkeypatch):
    full = tmp_path / "full"
    shutil.copytree(ROOT / "checkpoints/tiny", full)
    Shine.load(full).save(full, dtype=torch.float32)
    tensors = {n: t.float() for n, t in read_tensors(full / "model.safetensors").items()}
    save_file(tensors, full / "model.safetensors")
    for hardware in (torch.bfloat16, torch.float32):
        device = lambda name, float32=False: (torch.device("cpu"), torch.float32 if float32 else hardware, "")
        monkeypatch.setattr(cli, "pick_device", device)
        for folder, flags, dtype in ((ROOT / "checkpoints/tiny", [], hardware), (ROOT / "checkpoints/tiny", ["--float32"], torch.float32), (full, [], torch.float32)):
            lora = cli.load_model(cli.parse([TEXT, "--chat", "--model", str(folder), *flags])).generate_lora(TEXT)
            assert lora[-1]["mlp.down_proj"][1].dtype == dtype
