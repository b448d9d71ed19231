"""Put finished runs of train_all.py into results/, and what quotes them into headers, README.md and docs/.

    python train_all.py --only dpo --seeds 0 --publish      runs, and calls this
    python benchmarks/publish.py                            publishes nothing new, refreshes what quotes results/

A run is kept with its arguments and a hash of the code that made it. Its pictures become results/NAME[_RUN]_*.png.
"""
import ast
import importlib
import json
import os
import platform
import re
import shutil
import sys
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))
from train_all import RUNS, Config, code_hash, draw_curves, plan  # noqa: E402

ALSO_DRAWN = {"encoder_decoder:multi30k", "qwen3_moe:none"}


def publish(jobs):
    """Runs of which every seed is finished -> results/<script>.json and pictures. The other runs there stay."""
    groups = {}
    for job in jobs:
        groups.setdefault((job.script, job.run), []).append(job)
    for (script, run), group in groups.items():
        ready = sum(job.finished() for job in group)
        if ready < len(group):
            if ready:
                print(f"not published: {script}:{run} has {ready} of its {len(group)} seeds (--seeds 0 runs all)")
            continue
        path, kept = RESULTS / f"{script}.json", []
        for job in group:
            summary = json.loads((job.folder / "summary.json").read_text(encoding="utf-8"))
            summary["config"].pop("out", None)  # a path of one machine
            if isinstance(summary.get("history"), list):  # a row with an evaluation is enough for a curve
                summary["history"] = [row for row in summary["history"] if "val_loss" in row]
            kept.append(summary | json.loads((job.folder / "done.json").read_text()))
        whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
        whole["runs"][run] = kept
        whole["environment"] = dict(cores=os.cpu_count(), python=platform.python_version(), system=platform.system())
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        # Pictures of each script's first run, and of two others that docs/results.md shows beside them.
        first = run == next(iter(RUNS[script]))
        for picture in group[0].folder.glob("*.png") if first or f"{script}:{run}" in ALSO_DRAWN else ():
            shutil.copy(picture, RESULTS / f"{script}{'' if first else f'_{run}'}_{picture.name}")


def curves_picture():
    """results/curves.png: a panel for the first run of each script that has a history."""
    found = {script: json.loads((RESULTS / f"{script}.json").read_text(encoding="utf-8"))["runs"] for script in RUNS
             if (RESULTS / f"{script}.json").is_file()}
    firsts = {script: kept[run][0] for script, kept in found.items() if (run := next(iter(RUNS[script]))) in kept}
    draw_curves(firsts, RESULTS / "curves.png")


def publish_pass(path):
    """How long a quick pass took (runs/train_all/quick.json) -> results/train_all.json."""
    if path.is_file():
        done = json.loads(path.read_text())
        whole = {"runs": {"quick": [{"arguments": ["--preset", "quick"], "results": done}]}}
        (RESULTS / "train_all.json").write_text(json.dumps(whole, indent=1) + "\n")


# Sentences that quote results stand in docs/sentences.toml with holes in them:
#     "validation loss {llama3:shakespeare:val_loss:.2f}"     file : run : path : format, the mean over seeds
# A run "-" is a file without runs (peers_*.json). "A over B" divides, "*" takes all of a list; `range` behind the
# format gives least to largest. The formats min and MB divide by 60 and by a million.
def values(file, run, path):
    """-> the numbers at `path` (keys with slashes between them) of results/<file>.json, one for each seed."""
    whole = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    if " over " in path:
        above, below = (values(file, run, part) for part in path.split(" over "))
        return [a / b for a, b in zip(above, below, strict=True)]
    found = [whole] if run == "-" else whole["runs"][run]
    for key in path.split("/"):
        if key == "*":
            found = [part for one in found for part in one]
        else:
            found = [one[int(key)] if isinstance(one, list) else one[key] for one in found]
    return found


def fill(sentence):
    """A sentence with its holes filled. Raises KeyError or OSError for a result that is not there."""
    def hole(match):
        file, run, path, form, *how = match[1].split(":")
        found = values(file, run, path)
        if isinstance(found[0], str):
            return found[0]
        factor, form = {"min": (1 / 60, ".0f"), "MB": (1e-6, ".2f")}.get(form, (1, form))
        numbers = [min(found), max(found)] if how else [sum(found) / len(found)]
        return " to ".join(f"{number * factor:{form}}".replace("%", " %") for number in numbers)
    return re.sub(r"\{([^{}]+)\}", hole, sentence)


def sentences():
    """docs/sentences.toml -> {"expect": {script: sentence}, "scripts": {script: [idea, number]}, "peers": rows}."""
    return tomllib.loads((ROOT / "docs" / "sentences.toml").read_text(encoding="utf-8"))


def with_header(text, sentence):
    """A script's text with this sentence behind "Expect" in its docstring, in lines of 120 columns."""
    lines = textwrap.fill(sentence, 120, initial_indent=" " * 9, subsequent_indent=" " * 9)
    return re.sub(r"^Expect   .*?(?=^\w)", lambda _: f"Expect{lines[6:]}\n", text, count=1, flags=re.M | re.S)


def table(head, rows):
    """Markdown. A "|" inside a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def scripts_table():
    """README: what each script is about, how long it is, and one number."""
    def lines(script):
        return len((ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines())
    return table(["script", "what it teaches", "lines", "what came out"],
                 [[f"[`{script}.py`]({script}.py)", idea, lines(script), fill(number)]
                  for script, (idea, number) in sentences()["scripts"].items()])


def output_block():
    """README: what the first command prints, shortened: evaluations, and the first lines of the text at the end."""
    run = json.loads((RESULTS / "decoder_only.json").read_text(encoding="utf-8"))["runs"]["shakespeare"][0]
    looks = [f"step {row['step']:5d}: train {row['loss']:.4f}   val {row['val_loss']:.4f}" for row in run["history"]]
    sample = run["sample"].splitlines()[:7]
    return "\n".join(["```", "$ python decoder_only.py", *looks[::2], "", *sample, "...", "```"])


def runs_table():
    """docs/results.md: every published run. Mean over seeds, least to largest in brackets."""
    def cell(found, form=".4g"):
        spread = f" ({min(found):{form}} to {max(found):{form}})" if len(found) > 1 else ""
        return f"{sum(found) / len(found):{form}}{spread}"
    rows = []
    for script in RUNS:
        path = RESULTS / f"{script}.json"
        for name, seeds in json.loads(path.read_text(encoding="utf-8"))["runs"].items() if path.is_file() else ():
            got = {key: [one["results"][key] for one in seeds] for key in seeds[0]["results"]}
            plain = [f"{key} {cell(found)}" for key, found in got.items() if isinstance(found[0], (int, float))]
            # {"before": 0.2, "after": 0.9}: the means of each part. What is nested deeper is in the JSON alone.
            for key, found in got.items():
                if isinstance(found[0], dict) and all(isinstance(v, (int, float)) for v in found[0].values()):
                    means = {part: sum(one[part] for one in found) / len(found) for part in found[0]}
                    parts = (
                        f"{part} {mean:,.0f}" if mean >= 1000 else f"{part} {mean:.3g}" for part, mean in means.items())
                    plain.append(f"{key}: {', '.join(parts)}")
            loss = cell([one["val_loss"] for one in seeds], ".3f") if "val_loss" in seeds[0] else ""
            # (A comparison that went on where it was counts its last call only.)
            seconds = [one["seconds"] for one in seeds if "seconds" in one and script != "compare_architectures"]
            age = "" if seeds[0].get("code") == code_hash(script) else "yes"
            rows.append([f"{script}: {name}", f"`{' '.join(seeds[0]['arguments'])}`", len(seeds),
                         f"{sum(seconds) / len(seconds):.0f}" if seconds else "", loss, "; ".join(plain), age])
    return table(["run", "arguments of the first seed", "seeds", "s", "validation loss", "results",
                  "older than the code"], rows)


def peers_table():
    """docs/results.md: against other libraries."""
    return table(["work", "against", "result"], [[fill(cell) for cell in row] for row in sentences()["peers"]])


def presets_table():
    """docs/results.md: what each preset changes in the defaults. Values, not source text: the scripts are imported."""
    rows = []
    for script in RUNS:
        for name, changes in importlib.import_module(script).PRESETS.items():
            rows += [[f"`{script}.py --preset {name}`", ", ".join(f"{k} {v}" for k, v in changes.items())]
                     ] if changes else []
    return table(["preset", "changes"], rows)


# A block stands between <!-- begin NAME --> and <!-- end NAME -->, comments that Markdown does not show.
BLOCKS = {"SCRIPTS": scripts_table, "OUTPUT": output_block, "RUNS": runs_table, "PEERS": peers_table,
          "PRESETS": presets_table, "COMPARISON": lambda: fill("{compare_architectures:default:markdown:s}"),
          "QUICK": lambda: fill("{compare_architectures:quick:markdown:s}")}


def questions(file):
    """[(line, question)] of a script: the words behind "# Q:" up to the first question mark, over two lines or one."""
    lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
    found = []
    for i, line in enumerate(lines):
        if line.strip().startswith("# Q: "):
            words = line.strip()[5:]
            if "?" not in words:
                words += " " + lines[i + 1].strip().lstrip("# ")
            found.append((i + 1, words.partition("?")[0] + "?"))
    return found


def line_of(file, name):
    """The line of a definition, "`KVCache.append`", or of a question. Raises ValueError if it is not there: an index
    that points elsewhere is worse than none."""
    if not name.startswith("`"):
        line = next((line for line, question in questions(file) if question == name), None)
    else:
        node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in name.strip("`").split("."):
            node = next((one for one in ast.walk(node) if getattr(one, "name", None) == part), ast.Pass())
        line = getattr(node, "lineno", None)
    if line is None:
        raise ValueError(f"{file} has no {name}")
    return line


def refreshed(path):
    """The text of a script, of README.md or of a file in docs/, as the results and the scripts say it now."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return with_header(text, fill(sentences()["expect"][path.stem]))
    for name, make in BLOCKS.items():
        if f"<!-- begin {name} -->" in text:
            block = make()
            text = re.sub(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)",
                          lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text, flags=re.S)
    # A question may have brackets in it: [Why not always [MASK]?](../encoder_only.py#L260)
    return re.sub(r"\[((?:[^][]|\[[^][]*\])+)\]\((\.\./)?((?:extras/)?\w+\.py)#L\d+\)",
                  lambda link: f"[{link[1]}]({link[2] or ''}{link[3]}#L{line_of(link[3], link[1])})", text)


def texts():
    """Everything that quotes results, headers first: their length moves the lines that docs/ link to."""
    return [*(ROOT / f"{script}.py" for script in sentences()["expect"]), ROOT / "README.md",
            *sorted((ROOT / "docs").glob("*.md"))]


def refresh_texts():
    for path in texts():
        path.write_text(refreshed(path), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        publish(plan(Config(which="all", seeds=0, out=sys.argv[1])))
        publish_pass(Path(sys.argv[1], "quick.json"))
        curves_picture()
    refresh_texts()
