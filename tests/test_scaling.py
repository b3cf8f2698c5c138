"""benchmarks.scaling: cells differ in one thing, none is run twice, the table has them all. Training itself is train.py's."""
import json
from pathlib import Path

import pytest

from benchmarks import scaling
from model import UserError


@pytest.fixture
def calls(monkeypatch):
    """Runs of train.py, recorded instead of made; each leaves the folder that the next one starts from."""
    made = []

    def call(out, *args):
        out.mkdir(parents=True)
        made.append(list(map(str, args)))
        scores = {"shine": {"em": 0.5, "f1": 0.6}, "in-context": {"em": 0.8}, "question": {"em": 0.0}, "loss": 1.0, "reconstruction": 0.7}
        if value(made[-1], "--stage") == "gist":
            del scores["shine"]
        return [{"step": 1, "loss": 2.0}, {"step": 2, "samples": 64, "unseen": scores}]
    monkeypatch.setattr(scaling, "call", call)
    return made


def value(args, flag):
    return next((a.split("=")[1] for a in args if a.startswith(flag + "=")), None) or args[args.index(flag) + 1]


def test_cells_differ_in_one_thing_and_are_not_run_twice(tmp_path, calls, capsys):
    arguments = ["--only", "shared", "rank", "order", "--steps", "8", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "s.json")]
    scaling.main(arguments)
    cells = json.loads((tmp_path / "s.json").read_text())["cells"]
    assert len(cells) == 5 and len(calls) == 6                       # "pretrain first" takes two runs
    assert [value(a, "--rank") for a in calls[:3]] == ["4", "2", "8"] and all(value(a, "--meta-rank") == "24" and value(a, "--answer-rank") == "0" for a in calls[:3])
    first, second = calls[3:5]
    assert value(first, "--question-share") == "0.0" and value(second, "--stage") == "finetune" and value(second, "--model").endswith("first")
    assert {value(a, "--steps") for a in (first, second)} == {"4"} and value(calls[5], "--question-share") == "1.0"
    table = capsys.readouterr().out
    assert "| rank 8 | 50.0 | 80.0 | 70.0 | 1.000 |" in table and "| order pretrain first | 50.0 | 80.0 | 70.0 |  |" in table      # the loss of another stage
    assert [point[0] for point in cells[next(name for name in cells if "pretrain first" in name)]["curve"]] == [64, 128]
    scaling.main(arguments)
    assert len(calls) == 6
    with pytest.raises(UserError, match="use these or another --json"):
        scaling.main([*arguments, "--steps", "9"])
    results = json.loads((tmp_path / "s.json").read_text())
    results["settings"]["language model"] = "another"
    (tmp_path / "s.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="another"):
        scaling.main(arguments)


def test_gisting_takes_its_half_of_the_steps(tmp_path, calls):
    scaling.main(["--only", "recipe", "--steps", "8", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "s.json")])
    first, second = calls[3:]
    assert [value(a, "--stage") for a in (first, second)] == ["gist", "pretrain"] and value(second, "--model").endswith("first")
    assert value(first, "--steps") == "16" and value(second, "--steps") == "4"           # of 8 and of 32 texts
    cells = json.loads((tmp_path / "s.json").read_text())["cells"]
    assert cells[next(name for name in cells if "gist" in name)]["curve"] == [[128, 0.5, 1.0]]


def test_language_models_are_trained_once(tmp_path, calls):
    scaling.main(["--only", "model", "--seeds", "2", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "s.json")])
    bases = [a for a in calls if value(a, "--stage") == "base"]
    assert [value(a, "--preset") for a in bases] == ["nano", "micro", "tiny"] and len(calls) == 3 + 6
    assert not Path(tmp_path / "runs/fresh/hypernet.json").exists()
