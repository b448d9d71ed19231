"""What README and headers quote is what results/*.json say, and these were reached by runs that pass the bounds."""
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_quotes_the_results(record):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert record.refresh_readme(text) == text, "README.md is stale: python benchmarks/record.py --readme"


@pytest.mark.parametrize("script", ["decoder_only", "bpe_tokenizer", "toy_dataset"])
def test_header_quotes_the_results(record, script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert record.refresh_header(text, script, record.results(script)) == text, (
        f"{script}.py is stale: python benchmarks/record.py --readme")


def test_a_stale_number_is_noticed(record):
    text = (ROOT / "decoder_only.py").read_text(encoding="utf-8")
    changed = re.sub(r"(^Expect .*?)\d", r"\g<1>9", text, count=1, flags=re.M)
    assert changed != text and record.refresh_header(changed, "decoder_only", record.results("decoder_only")) == text


def test_results_name_machine_and_seeds(record):
    for script in record.RUNS:
        kept = json.loads((ROOT / "results" / f"{script}.json").read_text(encoding="utf-8"))
        assert {"cpu", "threads", "python", "torch"} <= set(kept["environment"])
        for what, (_, seeds) in record.RUNS[script].items():
            assert len(kept["runs"][what]) == len(seeds)


def test_recorded_runs_are_of_these_defaults(record):
    """A default that changed since the measurement makes the quoted figure somebody else's."""
    import sys
    spec = importlib.util.spec_from_file_location("decoder_only", ROOT / "decoder_only.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["decoder_only"] = module
    spec.loader.exec_module(module)
    now = vars(module.Config())
    for run in record.results("decoder_only")["shakespeare"]:
        for name, value in run["config"].items():
            assert name in ("data", "seed", "vocab_size") or now[name] == value, name


def test_bounds(record):
    """The bounds of the contract, on what was recorded: whole validation split, several seeds."""
    runs = record.results("decoder_only")
    assert all(run["val_loss"] <= 1.78 and run["params"] == 809_856 for run in runs["shakespeare"])
    assert all(run["results"]["exact_match"] >= 0.99 for run in runs["numbers"])


def test_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#L(\d+))?\)", text):
        assert (ROOT / target[0]).exists(), target
        if target[1]:
            line = (ROOT / target[0]).read_text(encoding="utf-8").splitlines()[int(target[1]) - 1]
            assert line.strip().startswith("# Q:"), target
