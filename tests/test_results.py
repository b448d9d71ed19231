"""What README and headers quote is what results/*.json say, and these were reached by runs that pass the bounds."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("train_all", ROOT / "train_all.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_all"] = module  # its dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_readme_quotes_the_results(record):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert record.refresh_readme(text) == text, "README.md is stale: python train_all.py --readme"


@pytest.mark.parametrize("script", ["decoder_only", "encoder_only", "encoder_decoder", "llama3", "qwen3_moe",
                                    "kv_cache", "flash_attention", "lora_qlora", "dpo", "ppo_grpo", "bpe_tokenizer",
                                    "toy_dataset", "quick_start", "visualizations"])
def test_header_quotes_the_results(record, script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert record.refresh_header(text, script, record.results(script)) == text, (
        f"{script}.py is stale: python train_all.py --readme")


@pytest.mark.parametrize("script, make", [("train_all", "own_expectation"),
                                          ("compare_architectures", "comparison_expectation")])
def test_other_headers_quote_the_results(record, script, make):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert record.put_header(text, script, *getattr(record, make)()) == text, (
        f"{script}.py is stale: python train_all.py --readme")


def test_the_comparison_is_equal_and_searched(monkeypatch):
    """What compare_architectures.py promises, on what is quoted: equal sizes, all rates, all seeds, nothing typed."""
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location("compare_architectures", ROOT / "compare_architectures.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_architectures", module)
    spec.loader.exec_module(module)
    cfg = module.Config()
    for folder in ("results", "results/quick"):
        kept = json.loads((ROOT / folder / "compare_architectures.json").read_text(encoding="utf-8"))
        assert (ROOT / folder / "compare_architectures.md").read_text(encoding="utf-8") == module.markdown(
            kept["tasks"], cfg)
        for task, one in kept["tasks"].items():
            assert {"cpu", "threads", "jobs", "python", "torch"} <= set(one["environment"])
            sizes = {name: entry["tables"] + entry["rest"] for name, entry in one["models"].items()}
            assert all(abs(size / sizes["GPT-2"] - 1) <= 0.05 for size in sizes.values()), (task, sizes)
            assert one["table"] == module.table(task, one["models"], one["costs"])
            assert one["conclusions"] == module.conclusions(task, one["models"], one["costs"], cfg)
    kept = json.loads((ROOT / "results" / "compare_architectures.json").read_text(encoding="utf-8"))
    assert list(kept["tasks"]) == [*module.TASKS, "ablate"]
    for task, one in kept["tasks"].items():
        for name, entry in one["models"].items():
            # All tried the same first rates, and then further ones until the best had a neighbour on either side.
            assert set(entry["by_rate"]) >= {f"{float(rate):g}" for rate in cfg.rates.split(",")}
            rates = [float(rate) for rate in entry["by_rate"]]
            assert min(rates) < entry["lr"] < max(rates) or len(rates) >= 8, (task, name)
            both = (entry["values"], entry["second_half"])
            assert cfg.seeds in map(len, both) and all(len(values) in (0, cfg.seeds) for values in both), (task, name)


def test_a_stale_number_is_noticed(record):
    text = (ROOT / "decoder_only.py").read_text(encoding="utf-8")
    changed = re.sub(r"(^Expect .*?)\d", r"\g<1>9", text, count=1, flags=re.M)
    assert changed != text and record.refresh_header(changed, "decoder_only", record.results("decoder_only")) == text


def test_results_name_machine_and_seeds(record):
    for script in record.RUNS:
        kept = json.loads((ROOT / "results" / f"{script}.json").read_text(encoding="utf-8"))
        assert {"cpu", "threads", "python", "torch"} <= set(kept["environment"])
        assert set(kept["runs"]) == set(record.RUNS[script])
        for what, (_, _, seeds) in record.RUNS[script].items():
            assert [run["config"].get("seed") for run in kept["runs"][what]] == list(seeds), (script, what)


def test_the_quick_pass_was_run(record):
    """As the table in train_all.py has it now: other arguments would make the README's table somebody else's."""
    for script, (what, arguments) in record.QUICK_RUNS.items():
        kept = json.loads((ROOT / "results" / "quick" / f"{script}.json").read_text(encoding="utf-8"))
        assert {"cpu", "threads", "python", "torch"} <= set(kept["environment"])
        (run,) = kept["runs"][what]
        assert run["arguments"] == arguments and set(kept["runs"]) == {what}


@pytest.mark.parametrize("script, what, preset", [
    ("decoder_only", "shakespeare", "laptop"), ("decoder_only", "numbers", "numbers"),
    ("encoder_only", "numbers", "laptop"), ("encoder_decoder", "numbers", "laptop"),
    ("encoder_decoder", "multi30k", "multi30k"), ("llama3", "shakespeare", "laptop"), ("llama3", "numbers", "numbers"),
    ("qwen3_moe", "shakespeare", "laptop"), ("kv_cache", "numbers", "laptop"), ("kv_cache", "125m", "125m"),
    ("flash_attention", "shakespeare", "laptop"), ("lora_qlora", "numbers", "laptop"),
    ("dpo", "numbers", "laptop"), ("ppo_grpo", "numbers", "laptop")])
def test_recorded_runs_are_of_these_defaults(record, script, what, preset):
    """A default that changed since the measurement makes the quoted figure somebody else's."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    now = vars(module.Config(**module.PRESETS[preset]))
    # What the data decides, and what 0 stands for, is filled in when a run begins.
    filled_in = {"data", "seed", "vocab_size", "mask_id", "head_size", "ffn_size", "method"}
    for run in record.results(script)[what]:
        for name, value in run["config"].items():
            assert name in filled_in or now[name] == value, name


def test_bounds(record):
    """The bounds of the contract, on what was recorded: whole validation split, several seeds."""
    runs = record.results("decoder_only")
    assert all(run["val_loss"] <= 1.78 and run["params"] == 809_856 for run in runs["shakespeare"])
    assert all(run["results"]["exact_match"] >= 0.99 for run in runs["numbers"])
    runs = record.results("encoder_only")["numbers"]
    assert len(runs) == 3
    for run in runs:
        got = run["results"]
        assert min(got["cloze_accuracy_digits"], got["cloze_accuracy_words"], got["match_accuracy"]) >= 0.99
        assert got["all_hidden_tokens"] <= got["all_hidden_ceiling"] + 0.01 and got["one_half_reader"] < 0.2
        assert run["floor"] < run["val_loss"]
    runs = record.results("encoder_decoder")["numbers"]
    assert len(runs) == 3 and all(run["seconds"] <= 60 for run in runs)
    assert all(run["results"]["exact_match"] == 1.0 and run["results"]["exact_match_stress"] >= 0.999 for run in runs)
    real = record.results("encoder_decoder")["multi30k"][0]["results"]
    for kind in ("greedy", "beam"):
        assert real[f"bleu_{kind}"] == pytest.approx(real[f"sacrebleu_{kind}"], abs=1e-6)
    gpt = record.results("decoder_only")["shakespeare"][0]
    runs = record.results("llama3")
    for run in runs["shakespeare"]:
        assert run["val_loss"] <= 1.72 and abs(run["params"] / gpt["params"] - 1) <= 0.02
        for name in ("max_steps", "batch_size", "block_size", "grad_accum"):
            assert run["config"][name] == gpt["config"][name]
    assert all(run["results"]["exact_match"] >= 0.99 for run in runs["numbers"])
    search = json.loads((ROOT / "results" / "lr_search.json").read_text())["scripts"]
    assert search["llama3"]["best"] < search["decoder_only"]["best"] - 0.02
    assert set(search["llama3"]["val_loss"]) == set(search["decoder_only"]["val_loss"])
    runs = record.results("qwen3_moe")
    assert all(run["results"]["expert_load_cv"] < 0.2 for run in runs["shakespeare"])
    runs = record.results("qwen3_moe")
    assert runs["none"][0]["results"]["expert_load_cv"] > 2 * runs["shakespeare"][0]["results"]["expert_load_cv"]
    runs = record.results("kv_cache")
    assert set(runs["numbers"][0]["results"]["exact_match"].values()) == {1.0}
    for what in ("numbers", "125m"):
        ladder = runs[what][0]["results"]["ladder"]
        assert all(ladder[rung]["same_tokens"] for rung in ("none", "growing", "static", "gqa", "compiled"))
    rounding = runs["text"][0]["results"]["rounding"]
    exact = rounding["gqa"]["perplexity"]
    assert rounding["int8"]["logit_error"] < 0.02 and rounding["int8-cache"]["logit_error"] < 0.02
    assert abs(rounding["int8-cache"]["perplexity"] / exact - 1) < 0.005
    rungs = json.loads((ROOT / "results" / "peers_kv_cache.json").read_text())["results"]["rungs"]
    assert rungs["compiled"]["times_faster_than_transformers"] >= 2.3
    assert rungs["compiled"]["bandwidth_fraction"] >= 0.7 and rungs["compiled"]["same_tokens"]
    assert rungs["int8"]["times_faster_than_transformers"] >= 6.5
    runs = record.results("flash_attention")
    got = runs["shakespeare"][0]["results"]
    for length in ("2048", "4096", "8192"):
        assert got["milliseconds"]["tiled"][length] <= 1.5 * got["milliseconds"]["naive"][length]
    peaks = got["peak_mb"]
    assert peaks["tiled"]["8192"] <= peaks["naive"]["8192"] / 20
    assert peaks["tiled"]["16384"] < 2.5 * peaks["tiled"]["8192"]
    assert got["in_2_gib"]["naive"]["fails"] == got["in_2_gib"]["tiled"]["passes"] == 16384
    assert abs(runs["shakespeare"][0]["val_loss"] - runs["naive"][0]["val_loss"]) < 0.02
    runs = record.results("lora_qlora")["numbers"]
    assert len(runs) == 3
    for run in runs:
        loss, trained = run["results"]["val_loss"], run["results"]["trainable_parameters"]
        assert loss["lora"] <= 1.02 * loss["full"] and loss["qlora"] <= 1.04 * loss["full"]
        assert trained["lora"] == trained["qlora"] <= 0.05 * trained["full"] and trained["full"] == run["params"]
    for step in json.loads((ROOT / "results" / "peers_lora_qlora.json").read_text())["results"]["step"]:
        assert step["width"] >= 512 and step["tokens"] >= 1024
        assert step["lora_to_full"] <= 0.8 and step["lora_to_peft"] <= 1
    runs = record.results("dpo")["numbers"]
    assert len(runs) == 5
    for run in runs:
        preferred, correct = run["results"]["preferred_rate"], run["results"]["correct_rate"]
        assert preferred["after"] >= 0.95 and correct["after"] >= 0.98 * correct["before"]
        assert preferred["after"] > preferred["control"] + 0.3 and run["results"]["dpo_seconds"] <= 60
    assert json.loads((ROOT / "results" / "peers_dpo.json").read_text())["results"]["time_ratio"] <= 0.8
    runs = record.results("ppo_grpo")["numbers"]
    assert len(runs) == 5
    for run in runs:
        for accuracy in (run["results"]["accuracy"], run["results"]["accuracy_greedy"]):
            assert accuracy["sft"] <= 0.4 and min(accuracy["ppo"], accuracy["grpo"]) >= 0.95
        assert max(run["results"]["method_seconds"].values()) <= 60


def test_advice_names_what_exists():
    """Functions and flags that the README's troubleshooting table names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    advice = text[text.index("## When something goes wrong"):text.index("## Concept index")]
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    names = re.findall(r"`([a-z_]+)`", advice)
    assert {"fetch", "import_weights", "half_split", "read_checkpoint"} <= set(names)
    for name in set(names) - {"mps", "transformers"}:
        assert f"def {name}(" in scripts, name
    for flag in re.findall(r"`--([a-z-]+)", advice):
        assert flag == "help" or f"\n    {flag.replace('-', '_')}: " in scripts, flag


def test_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    # A line that is linked to is a question, or the definition that a concept is explained by.
    for target in re.findall(r"\]\(([^)#]+)(?:#L(\d+))?\)", text):
        assert (ROOT / target[0]).exists(), target
        if target[1]:
            line = (ROOT / target[0]).read_text(encoding="utf-8").splitlines()[int(target[1]) - 1]
            assert line.strip().startswith(("# Q:", "def ", "class ")), target
