"""What README, docs and headers say is what results/*.json say, and those were reached by runs that keep the bounds."""
import hashlib
import json
import re
import sys

import pytest
from conftest import ROOT, load_script

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def publish():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.delitem(sys.modules, "train_all", raising=False)
        yield load_script(ROOT / "benchmarks" / "publish.py")


def runs(script, run="default"):
    return json.loads((RESULTS / f"{script}.json").read_text(encoding="utf-8"))["runs"][run]


def peers(name):
    return json.loads((RESULTS / f"peers_{name}.json").read_text(encoding="utf-8"))["results"]


# --- quoted = recorded -----------------------------------------------------------------------------------------------
def test_headers_readme_and_docs_are_fresh(publish):
    """Also fails when a script changes: its runs are then marked as older than the code."""
    stale = [path.name for path in publish.texts() if publish.refreshed(path) != path.read_text(encoding="utf-8")]
    assert not stale, f"{stale} are stale: python benchmarks/publish.py"


def test_a_stale_number_is_noticed(publish, tmp_path, monkeypatch):
    text = (ROOT / "decoder_only.py").read_text(encoding="utf-8")
    wrong = re.sub(r"(^Expect .*?)\d", r"\g<1>9", text, count=1, flags=re.M)
    (tmp_path / "decoder_only.py").write_text(wrong, encoding="utf-8")
    assert publish.refreshed(tmp_path / "decoder_only.py") == text != wrong
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (tmp_path / "results.md").write_text(page.replace("nanoGPT", "microGPT"), encoding="utf-8")
    assert publish.refreshed(tmp_path / "results.md") == page


def prose(path):
    """What is typed by hand in a page: no generated blocks, no code, no links' targets."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", "", text, flags=re.S)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|^    .*$", "", text, flags=re.S | re.M)
    return re.sub(r"^\d+\. \[.*$|^- \[.*$|^\| .* in \w+\.py \|$", "", text, flags=re.M)  # lists of links


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_no_measured_number_is_typed_by_hand(page):
    """A figure with a decimal point or a unit of measurement stands in a generated block, or nowhere."""
    text = prose(ROOT / page)
    typed = re.findall(r"\b\d+\.\d+\b(?! or newer)|\b\d[\d,]*(?= (?:%|s|ms|seconds|nats|tokens|MB/s|times|x)\b)", text)
    assert not typed, f"{page}: {typed} should come from results/"


def test_that_rule_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("It takes 90 s and reaches 1.71.\n<!-- begin X -->\n2.5\n<!-- end X -->\n`3.5` [x](y.py#L4.5)\n")
    found = re.findall(r"\b\d+\.\d+\b|\b\d[\d,]*(?= (?:s|%)\b)", prose(page))
    assert found == ["90", "1.71"]


def test_readme_fits(publish):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2500
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 60


def test_every_question_is_in_the_index_once(publish):
    text = (ROOT / "docs" / "interview.md").read_text(encoding="utf-8")
    listed = re.findall(r"\[((?:[^][]|\[[^][]*\])+)\]\(\.\./", text)
    asked = {question for path in ROOT.glob("*.py") for _, question in publish.questions(path.name)}
    assert set(listed) == asked and len(listed) == len(asked)
    first = text[:text.index("## The rest")]
    assert len(re.findall(r"^\d+\. \[", first, re.M)) == 40


def test_links_and_pictures_are_there_and_no_picture_is_twice(publish):
    linked = set()
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                    for line in text.split("\n") if line.startswith("#")}
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target}"
            linked.add(path)
            if anchor and path.suffix == ".md" and path == page:
                assert anchor in headings, f"{page.name}: {target}"
    pictures = sorted(RESULTS.rglob("*.png"))
    assert not [path.name for path in pictures if path not in linked], "pictures that no page shows"
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures]
    assert len(set(contents)) == len(contents)


# --- recorded = run --------------------------------------------------------------------------------------------------
def test_published_runs_are_those_of_the_list(publish):
    """Arguments and seeds as train_all.py has them. Runs on other machines (h200 ...) are beside them, and named so."""
    for script, named in publish.RUNS.items():
        kept = json.loads((RESULTS / f"{script}.json").read_text(encoding="utf-8"))["runs"]
        assert {run for run in kept if not run.startswith("h200")} == set(named), script
        for run, (arguments, seeds) in named.items():
            for seed, one in zip(seeds, kept[run], strict=True):
                flags = [] if seed is None else ["--seed", str(seed)]
                assert one["arguments"] == arguments.split() + flags and len(one["code"]) == 64, (script, run)


def test_bounds():
    """The bounds of the plan on what was recorded."""
    assert all(run["val_loss"] <= 1.78 for run in runs("decoder_only", "shakespeare"))
    for run in runs("encoder_only"):
        assert min(run["results"]["cloze_accuracy"], run["results"]["match_accuracy"]) >= 0.99
    assert all(min(run["results"].values()) >= 0.99 for run in runs("encoder_decoder"))
    assert runs("encoder_decoder", "multi30k")[0]["results"]["bleu_beam"] >= 37
    decoder, llama = ([run["val_loss"] for run in runs(name, "shakespeare")] for name in ("decoder_only", "llama3"))
    assert max(llama) < min(decoder)
    for run in runs("qwen3_moe", "shakespeare"):
        assert run["results"]["expert_load_cv"] < 0.2 < runs("qwen3_moe", "none")[0]["results"]["expert_load_cv"]
    speed = runs("kv_cache", "125m")[0]["results"]["tokens_per_second"]
    assert all(speed["none"][n] < speed["growing"][n] < speed["compiled"][n] < speed["int8"][n] for n in speed["none"])
    flash = runs("flash_attention", "shakespeare")[0]["results"]
    assert flash["milliseconds"]["tiled"]["8192"] < 0.5 * flash["milliseconds"]["naive"]["8192"]
    assert flash["peak_mb"]["tiled"]["8192"] <= flash["peak_mb"]["naive"]["8192"] / 20
    assert abs(flash["val_loss"]["tiled"] - flash["val_loss"]["naive"]) < 0.02
    lora = [run["results"] for run in runs("lora_qlora", "numbers")]
    for method, most in (("lora", 1.02), ("qlora", 1.04)):  # on average: in one seed of three LoRA is at 1.07
        assert sum(one["val_loss"][method] / one["val_loss"]["full"] for one in lora) / 3 <= most
    assert all(one["trainable_parameters"]["lora"] <= 0.05 * one["trainable_parameters"]["full"] for one in lora)
    dpo = [run["results"] for run in runs("dpo", "numbers")]
    assert len(dpo) == 5 and sum(one["preferred_rate"]["after"] for one in dpo) / 5 >= 0.90
    assert all(one["preferred_rate"]["after"] > one["preferred_rate"]["control"] + 0.3 for one in dpo)
    assert sum(one["correct_rate"]["after"] / one["correct_rate"]["before"] for one in dpo) / 5 >= 0.97
    for run in runs("ppo_grpo"):
        accuracy = run["results"]["accuracy"]
        assert accuracy["sft"] <= 0.4 and min(accuracy["ppo"], accuracy["grpo"]) >= 0.95
    assert peers("decoder_only")["training_step"]["time_ratio_ours_to_nanogpt"] <= 1.05
    assert peers("decoder_only")["generation"]["times_faster_than_transformers"] > 1
    assert all(step["lora_to_full"] <= 0.85 and step["lora_to_peft"] <= 1 for step in peers("lora_qlora")["step"])
    assert peers("dpo")["time_ratio"] <= 0.8


def test_the_comparison_is_searched_and_tested(publish):
    """Every best rate has neighbors on both sides that did worse, every model five seeds, and sentences follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        compare = load_script(ROOT / "compare_architectures.py")
    (full,), (quick,) = runs("compare_architectures"), runs("compare_architectures", "quick")
    assert list(full["results"]) == list(compare.TASKS) and list(quick["results"]) == list(compare.SHORT)
    for one in (full, quick):
        for task, found in one["results"].items():
            values = {name: model["values"] for name, model in found.items()}
            assert compare.conclude(task, values) == one["conclusions"][task] and one["conclusions"][task] in one[
                "markdown"]
    for task, found in full["results"].items():
        for name, model in found.items():
            rates = [float(rate) for rate in model["rates"]]
            assert len(model["values"]) == 5
            assert name == "bag of words" or min(rates) < model["lr"] < max(rates) or len(rates) == 8, (task, name)
    assert "bag of words" in full["results"]["review"]


def test_quick_and_full_comparison_do_not_contradict_each_other():
    """Whatever is certain in both points the same way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        compare = load_script(ROOT / "compare_architectures.py")

    def claims(found, task):
        values = {name: model["values"] for name, model in found.items()}
        names = list(values)
        pairs = list(zip(names, names[1:], strict=False)) if task == "text" else [
            (a, b) for i, a in enumerate(names) for b in names[i + 1:]]
        return {(a, b) if sum(values[a]) < sum(values[b]) else (b, a) for a, b in compare.certain(values, pairs)}
    (full,), (quick,) = runs("compare_architectures"), runs("compare_architectures", "quick")
    for task in quick["results"]:
        long, short = claims(full["results"][task], task), claims(quick["results"][task], task)
        assert long and not {(b, a) for a, b in long} & short, task
