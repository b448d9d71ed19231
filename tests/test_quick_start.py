"""quick_start.py: the tour runs from end to end, its models can be asked, and what it says of them is so."""
import json
import math
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, load_script


@pytest.fixture(scope="module")
def m(request):
    sys.path.insert(0, str(ROOT))  # an orchestrator finds the scripts beside it
    yield load_script(request.config.getoption("--script") or ROOT / "quick_start.py")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def tour(m, tmp_path_factory):
    """(out, what main returned, what it printed) of a tour with a hundredth of the steps, in a folder with a space."""
    out, capture = tmp_path_factory.mktemp("a tour"), pytest.MonkeyPatch()
    printed = []
    capture.setattr("builtins.print", lambda *parts, sep=" ": printed.append(sep.join(map(str, parts))))
    some = [m.toy.draw_numbers(count, 0, validation) for count, validation in ((2000, False), (100, True))]
    capture.setattr(m, "choose_numbers", lambda cfg: some)  # fewer than 50,000: making the rows takes longest here
    results = m.main(m.parse_config(["--effort", "0.01", "--number", "70013", "--out", str(out)]))
    capture.undo()
    return out, results, "\n".join(printed)


def test_it_leaves_what_it_promises(m, tour):
    out, results, printed = tour
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["results"] == results and list(results) == ["encoder_only", "decoder_only", "encoder_decoder"]
    assert summary["config"]["number"] == 70013 and (out / "comparison.png").stat().st_size > 20_000
    assert all(set(one) == {"exact_match", "seconds", "parameters"} for one in results.values())
    # Nothing was learned in so few steps, and nothing else is said: few names are right, and errors are shown.
    assert all(one["exact_match"] < 0.2 and one["seconds"] < summary["seconds"] for one in results.values())
    assert printed.count("  wrong: ") == 9 and "seventy thousand thirteen" in printed


def test_what_it_suggests_works(m, tour, capsys):
    commands = [shlex.split(line) for line in tour[2].splitlines() if line.startswith(f'  "{sys.executable}"')]
    assert [command[1] for command in commands] == [str(ROOT / f"{name}.py") for name in tour[1]]
    for command, (name, one) in zip(commands, tour[1].items(), strict=True):
        script = getattr(m, name)
        model = script.main(script.parse_config(command[2:]))
        assert sum(p.numel() for p in model.parameters()) == one["parameters"]
        said = capsys.readouterr().out
        assert {"encoder_only": "[MASK]: ", "decoder_only": "1984="}.get(name, "") in said
    tokenizer, text = m.decoder_only.make_tokenizer("json", m.toy_tokenizer()), "70013=seventy thousand thirteen"
    assert tokenizer.encode(text) == m.toy.encode_toy(text) and tokenizer.eos == m.toy.EOS  # so that it stops


def test_your_number_and_the_held_out_ones_are_not_trained_on(m):
    for number in (7, 708):  # one that would be in training, one that would be held out
        train, held_out = m.choose_numbers(m.Config(number=number))
        assert number not in train + held_out and not set(train) & set(held_out) and len(held_out) > 450
    assert 8 in train and 708 in m.choose_numbers(m.Config())[1]


def test_every_model_learns_what_it_is_shown(m, tmp_path, capsys):
    """Four numbers, again and again: asked about these, each architecture must have every name right."""
    numbers = [3, 14, 15, 93_238]
    for name, effort in (("encoder_only", 0.04), ("decoder_only", 0.08), ("encoder_decoder", 0.12)):
        cfg = m.Config(out=str(tmp_path), effort=effort, number=93_238)
        result = getattr(m, f"meet_{name}")(cfg, m.toy_tokenizer(), (numbers * 8, numbers * 2))
        printed = capsys.readouterr().out
        assert result["exact_match"] == 1 and "wrong" not in printed, printed
        assert result["history"][0]["loss"] > math.log(46) - 0.5 > 1 > result["history"][-1]["loss"]
    assert "ninety three thousand two hundred thirty eight" in printed


def test_wrong_settings_are_one_line(m, tmp_path):
    for wrong in (dict(number=1_000_000), dict(number=-1), dict(effort=0.0), dict(effort=math.nan), dict(seed=-1)):
        with pytest.raises(ValueError, match="number goes from 0 to 999999"):
            m.main(m.Config(out=str(tmp_path / "run"), **wrong))
    assert not (tmp_path / "run").exists()
    done = subprocess.run([sys.executable, ROOT / "quick_start.py", "--effort", "0"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: number goes") and done.stderr.count("\n") == 1
