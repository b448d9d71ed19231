# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "regex>=2023.12", "requests>=2.31", "safetensors>=0.4.3",
#                 "tiktoken>=0.7", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
RUN EVERYTHING, KEEP WHAT CAME OUT               python train_all.py                32 min on two CPU cores

Idea     A number in a README is true on the day when it is typed. Here none is typed: every script is run as a reader
         would run it, what it reached goes into results/<script>.json, and headers and README quote those files. The
         rest is patience: failures, Ctrl-C and power cuts happen, and cost the runs that they hit, no others.
Picture  RUNS -> jobs - what the journal says is finished -> run, N at a time -> <out>/<preset>/<job>/summary.json
                                                              |                     |
                        journal.jsonl <- started, finished, failed        results/<script>.json, pictures
                                                                                    |
                                                           results/curves.png, headers, README between markers
Not here searching learning rates (benchmarks/lr_search.py), other libraries (benchmarks/peers.py), equal parameters
         for all architectures (compare_architectures.py)
Expect   one line per finished run, then results/<script>.json, pictures and results/curves.png. One seed each: --preset
         quick 14 runs in 7 min, default 24 in 32 min, real 14 in 44 min (sums of the runs, one at a time)
Asked    Why three seeds?   Why quote min to max and no standard error?   Why a journal?   What is exit code 130?
         Two runs with a thread each, or one run with two?                                 (grep "# Q:")
"""
import argparse
import ast
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

SCRIPTS_AT = Path(__file__).resolve().parent
RESULTS = SCRIPTS_AT / "results"


# --- 1. Config: what to run ------------------------------------------------------------------------------------------
#     python train_all.py --preset quick               every script once, shortened: does everything work here?
#     python train_all.py                              what needs no data from the network, one seed each
#     python train_all.py --preset real --seeds 0      Shakespeare, SST-2, Multi30k, preferences; all published seeds
#     python train_all.py --only dpo,llama3:numbers    a few of the preset's runs
#     python train_all.py --readme                     run nothing, refresh what quotes the results
# Data that the real runs need lie in $LLM_DATA or data/, or are fetched by the scripts themselves; so is the folder for
# caches. Everything that is written lies below --out and --results; only when --results is the repository's own folder
# are the headers and README.md rewritten as well, because these are what they quote.
# Sections have the same numbers in all scripts; this one has no use for the others.
@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    which: str = "default"       # which runs: default | quick | real; --preset sets it
    jobs: int = 1                # how many runs at once; each gets its share of the cores
    only: str = ""               # some of the runs, with commas: script or script:what, "dpo,llama3:numbers"
    seeds: int = 1               # the first so many seeds of each run; 0 = all that the published results have
    readme: bool = False         # run nothing, only refresh the headers and README.md from the results
    out: str = "runs/train_all"  # folder for runs, logs and the journal
    results: str = "results"     # folder for what is kept; a relative one lies beside this file

    def __post_init__(self):
        if self.which not in ("default", "quick", "real"):
            raise ValueError(f"which must be default, quick or real, not {self.which!r}")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, not {self.jobs}")
        if self.seeds < 0:
            raise ValueError(f"seeds must be 0 (all) or more, not {self.seeds}")


PRESETS = {"default": {}, "quick": dict(which="quick"), "real": dict(which="real")}


# Plumbing, the same in every script. First reading: skip.
def parse_config(cls, presets, argv=None):
    """Command line -> cls. Every field is a flag (--n-layer 6, --no-compile); explicit flags win over --preset NAME.

    A wrong flag or an impossible value ends the program with one line `error: ...` and exit status 1.
    """
    # The help texts are read from the source: a comment and a help string that say the same would drift apart.
    notes = dict(re.findall(r"^ {4}(\w+): \w+ = .*?# (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse would print its whole usage above the message, and the one line that matters would scroll away.
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)), help="a set of defaults")
    for field in dataclasses.fields(cls):
        # Trap: type=bool makes "--resume False" true, because bool("False") is True. Booleans get --x and --no-x.
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        # SUPPRESS leaves flags that were not given out of the result; what is left is what the user really said.
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=f"{notes[field.name]} [{field.default}]".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    try:
        cfg = cls(**{**presets[given.pop("preset")], **given})
    except ValueError as problem:
        sys.exit(f"error: {problem}")
    cfg.given = frozenset(given)  # a flag that repeats a default was still asked for: --resume must not ignore it
    return cfg


# Q: Why three seeds?
# A: A seed draws the initial weights and the order of the batches. The same run with another seed ends elsewhere, about
#    1 % of the validation loss apart in decoder_only.py, tens of points of accuracy in dpo.py with adapters. With one
#    seed you cannot know whether a difference of 1 % is your idea or your luck. Three show the size of luck, and where
#    it is large there are five.
#
# script -> {what: (preset, arguments, seeds)}. Seeds are listed, not drawn: anybody can run the same ones again. The
# first `what` of a script and the first seed of a `what` are those whose pictures and output are shown.
#
# Which preset a run belongs to follows from what it needs. default: data that are made up or come with Python, so that
# it works on a plane. real: Tiny Shakespeare, SST-2, Multi30k or the preference pairs. Both fill the same files, and a
# header is refreshed as soon as all runs that it quotes are there.
RUNS = {
    # The same model on two texts and on the toy language. pydocs is what a reader gets who is offline: its figure is
    # told so that he can compare too.
    "decoder_only": {"shakespeare": ("real", "--data shakespeare", (1337, 1, 2)),
                     "pydocs": ("default", "--data pydocs", (1337,)),
                     "numbers": ("default", "--preset numbers", (1337, 1, 2))},
    # sst2 is from scratch, on 6,900 sentences: there to show what pre-training on much more text is for.
    "encoder_only": {"numbers": ("default", "", (1337, 1, 2)), "sst2": ("real", "--preset sst2", (1337,))},
    # multi30k is by far the longest run of all. One seed; its test set of 1,000 sentences is a spread of its own.
    "encoder_decoder": {"numbers": ("default", "", (1337, 1, 2)), "multi30k": ("real", "--preset multi30k", (1337,)),
                        "span": ("real", "--preset span --data shakespeare", (1337,))},
    # As decoder_only, number for number: only the architecture differs.
    "llama3": {"shakespeare": ("real", "--data shakespeare", (1337, 1, 2)),
               "numbers": ("default", "--preset numbers", (1337, 1, 2))},
    # dense: the same work per token without experts. bias, none: another way to balance them, and no way.
    "qwen3_moe": {"shakespeare": ("real", "--data shakespeare", (1337, 1, 2)),
                  "dense": ("real", "--data shakespeare --n-experts 0", (1337, 1, 2)),
                  "bias": ("real", "--data shakespeare --balance bias", (1337,)),
                  "none": ("real", "--data shakespeare --balance none", (1337,)),
                  "numbers": ("default", "--preset numbers", (1337,))},
    # Speed does not depend on what the weights are: the large shape is measured with random ones, trained on nothing.
    # Quality does: `text` trains, and measures what rounding costs (--contexts= measures no speed again).
    "kv_cache": {"numbers": ("default", "", (1337,)), "125m": ("default", "--preset 125m", (1337,)),
                 "text": ("real", "--preset text --data shakespeare --contexts=", (1337,))},
    # naive: the same training with the other attention, to the same loss.
    "flash_attention": {"shakespeare": ("real", "--data shakespeare", (1337,)),
                        "naive": ("real", "--data shakespeare --attention naive --lengths=", (1337,)),
                        "pydocs": ("default", "--data pydocs", (1337,))},
    # lower, higher: the learning rates beside the chosen ones, to show that these were not chosen for effect.
    # all: with every line of the data, where the order of the methods turns round.
    "lora_qlora": {"numbers": ("default", "", (1337, 1, 2)), "all": ("default", "--examples 0", (1337,)),
                   "lower": ("default", "--lr 5e-3 --full-lr 2e-3", (1337,)),
                   "higher": ("default", "--lr 2e-2 --full-lr 8e-3", (1337,))},
    # Five seeds: the carriers `all` and `lora` differ more between seeds than most methods do between each other.
    # --no-compare leaves out the control and the other carriers, which do not depend on the loss.
    "dpo": {"numbers": ("default", "", (1337, 1, 2, 3, 4)), "ipo": ("default", "--loss ipo --no-compare", (1337,)),
            "simpo": ("default", "--loss simpo --no-compare", (1337,)),
            "flipped": ("default", "--flip 0.1 --no-compare", (1337,)),
            "flipped-cdpo": ("default", "--flip 0.1 --loss cdpo --no-compare", (1337,)),
            "nll": ("default", "--carrier all --nll 0.2 --no-compare", (1337,)),
            # A fifth of the preset's steps: most of the 13.7 million weights are the table of 50,257 tokens, and slow.
            "preference": ("real", "--preset preference --sft-steps 60 --max-steps 40", (1337,))},
    # All three methods in one run, from the same imitator.
    "ppo_grpo": {"numbers": ("default", "", (1337, 1, 2, 3, 4))},
    # Nothing here is random, so there is no seed.
    "bpe_tokenizer": {"shakespeare": ("real", "--data shakespeare", (None,)),
                      "pydocs": ("default", "--data pydocs", (None,))},
    # Trains nothing: prints and counts.
    "toy_dataset": {"default": ("default", "", (1337,))},
    # The tour and the pictures, which use the scripts above. (The comparison keeps its own results: it takes as long as
    # everything else together, and has its own search, seeds and journal.)
    "quick_start": {"default": ("default", "", (1337,))},
    "visualizations": {"default": ("default", "", (1337,))},
}
# script -> (which of the runs above it shortens, arguments): as much learned as half a minute allows. A shorter run is
# no beginning of the long one: the learning rate falls to its end in either, which is worth more than a few steps.
# What is learned all at once (an encoder that finds out that halves match, a reward that is found by luck) may not be
# learned at all in a short run. The README shows both figures side by side, so nobody takes one for the other.
QUICK_RUNS = {
    # Half of the steps, and nearly all of the answers.
    "decoder_only": ("numbers", "--preset numbers --max-steps 450"),
    "llama3": ("numbers", "--preset numbers --max-steps 450"),
    # Short enough as they are.
    "bpe_tokenizer": ("pydocs", "--data pydocs"),
    "toy_dataset": ("default", ""),
    # Fewer steps.
    "encoder_only": ("numbers", "--max-steps 400 --warmup-steps 100 --eval-every 200"),
    "encoder_decoder": ("numbers", "--max-steps 350"),
    "qwen3_moe": ("numbers", "--preset numbers --max-steps 350"),
    # Fewer steps, and fewer lengths to measure at. kv_cache.py measures no speed at all here: compiling the rungs for a
    # large model alone takes a minute.
    "kv_cache": ("numbers", "--max-steps 200 --eval-every 100 --contexts="),
    "flash_attention": ("pydocs", "--data pydocs --max-steps 60 --eval-every 60 --lengths 1024,2048"),
    # In stages: the first needs most of the steps, since nothing can be built on a base that knows nothing.
    "lora_qlora": ("numbers", "--base-steps 300 --max-steps 60"),
    "dpo": ("numbers", "--sft-steps 600 --no-compare --max-steps 100"),
    "ppo_grpo": ("numbers", "--max-steps 400 --grpo-updates 12 --ppo-updates 12 --reinforce-updates 12"),
    # A part of the tour's steps; four pictures, one of which needs a small model of text.
    "quick_start": ("default", "--effort 0.1"),
    "visualizations": ("default", "--only rope,masks,schedule,softmax"),
}
# These are made of the other scripts: when one of those changes, what they showed is of old code too. (Whether a run is
# still valid is a question about all code that it ran, not about the file that was called. The scripts themselves are
# easy: they import no other, so their own file is all there is.)
MADE_OF_ALL = ("quick_start", "visualizations")
# What measures seconds and memory is measured alone. A second program on the machine takes cores, cache and bandwidth,
# and the slower of two rungs may then be the one that had company.
ALONE_RUNS = ("kv_cache", "flash_attention", "bpe_tokenizer")
GUESS = 60        # seconds that a run is expected to take before it was ever measured; only the bar believes it
LOOK_EVERY = 0.3  # seconds between looks at the running processes: short for a human, and 0.1 % of one core


# --- 4. Data: what a run leaves and what is kept of it ---------------------------------------------------------------
# All JSON files have one form, so that one reader serves all of them. results/llama3.json, shortened:
#     {"environment": {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "python": "3.11.7", "torch": "2.13.0+cpu", ...},
#      "runs": {"shakespeare": [{"config": {..., "seed": 1337}, "val_loss": ..., "results": {...}, "curve": [...],
#                                "printed": "data: Tiny Shakespeare, ..."},        <- the first seed keeps its output
#                               {"config": {..., "seed": 1}, ...}],
#               "numbers": [...]}}
# It is committed: a diff of this file is how one sees that a change of the code changed a result.
def cores():
    """How many cores this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name():
    """The processor's name as the system gives it."""
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found[1] if found else platform.machine()
    return platform.processor() or platform.machine()


def environment(threads):
    """What times depend on, and the last digits of losses: a sum over four threads is rounded unlike one over two."""
    return {"cpu": cpu_name(), "cores": cores(), "threads": threads, "python": platform.python_version(),
            "system": platform.system(), "torch": importlib.metadata.version("torch")}


def kept_file(script, folder):
    """results/<script>.json -> {"environment", "runs": {what: [summary, one per seed]}}; empty before the first run.

    Read anew each time: the files are small, and a copy in memory would miss what was recorded since.
    """
    path = Path(folder) / f"{script}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"environment": {}, "runs": {}}


def results(script, folder=RESULTS):
    """-> {what: [summaries]} of a script, or None before it was measured."""
    return kept_file(script, folder).get("runs") or None  # compare_architectures.json has tasks instead


def merge(kept, env, what, run, order=()):
    """Put one run into what is kept of its script. -> (the new content, how many runs had to go).

    It replaces the run of the same name and seed. The others stay if they come from the same machine, threads and
    versions; otherwise they go: one file names one environment, and a mixture under that name would be a lie.

        kept runs          new run         result, same environment     another environment
        numbers: 1337, 1   numbers: 1      numbers: 1337, 1 (new)       numbers: 1 (new)
        pydocs: 1337                       pydocs: 1337                 (gone, until it is run here too)
    """
    # None: an old file that did not say. order: {what: seeds} as published, so that the first seed stays the first.
    same = all(kept["environment"].get(key) in (None, env[key]) for key in ("cpu", "threads", "torch", "python"))
    runs = dict(kept["runs"]) if same else {}
    gone = 0 if same else sum(map(len, kept["runs"].values()))
    # Nor do seeds stay that older code or other arguments made: a spread over them would be one of two programs.
    others = [one for one in runs.get(what, []) if one["config"].get("seed") != run["config"].get("seed")
              and all(one.get(key) in (None, run.get(key)) for key in ("code", "arguments"))]
    gone += len([one for one in runs.get(what, []) if one["config"].get("seed") != run["config"].get("seed")]
                ) - len(others)
    # Sorted as published, whatever came first: the spread does not care, but the first one is shown.
    order = dict(order)
    seeds = list(order.get(what, ()))
    place = {seed: i for i, seed in enumerate(seeds)}
    runs[what] = sorted([*others, run], key=lambda one: place.get(one["config"].get("seed"), len(seeds)))
    names = [*(name for name in order if name in runs), *(name for name in runs if name not in order)]
    return {"environment": env, "runs": {name: runs[name] for name in names}}, gone


# metrics.jsonl has a line every 10 steps, hundreds in all. Thinning keeps those with an evaluation, since only these
# have both losses, and every so-many-th of the others: 40 of either are as many as a picture three centimetres high
# can show. The first and the last line always stay. A curve that does not begin at ln V hides most of what was learned,
# and one that is drawn through evaluations alone turns the steep fall of the first steps into a gentle slope.
def thinned(folder, most=40):
    """-> [[step, train loss, val loss], ...] of a run, or {stage: such a list}; None where no loss was written."""
    curves = {}
    # By date: stages are told in the order in which they were run, not in that of the alphabet.
    for path in sorted(Path(folder).rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if "loss" in row and "step" in row]  # rewards have no place among losses
        looks = [i for i, row in enumerate(rows) if "val_loss" in row]
        # Counted from the end: the last evaluation is the one that is quoted.
        keep = {0, *looks[::-1][::math.ceil(len(looks) / most) or 1], *range(0, len(rows), len(rows) // most + 1)}
        rows = [rows[i] for i in sorted(keep & set(range(len(rows))))]
        if looks:
            curves[path.parent.relative_to(folder).as_posix()] = [
                [row["step"], round(row["loss"], 5), round(row["val_loss"], 5) if "val_loss" in row else None]
                for row in rows]
    return curves.get(".", curves) or None


def sacrebleu_beside(folder, got):
    """Translations: the library's BLEU beside the script's own. Raises ValueError where they differ."""
    # A package for tests and benchmarks, no dependency of this file: used where it happens to be.
    library = "sacrebleu"
    if not (folder / "test.beam.txt").is_file() or importlib.util.find_spec(library) is None:
        return
    sacrebleu = importlib.import_module(library)
    # Two implementations of a formula rarely share a mistake; that they agree is worth more than either number.
    lines = {kind: (folder / f"test.{kind}.txt").read_text(encoding="utf-8").split("\n")
             for kind in ("greedy", "beam", "reference")}
    for kind in ("greedy", "beam"):
        got[f"sacrebleu_{kind}"] = sacrebleu.corpus_bleu(lines[kind], [lines["reference"]]).score
        if abs(got[f"sacrebleu_{kind}"] - got[f"bleu_{kind}"]) > 1e-6:
            raise ValueError(f"its BLEU and sacrebleu's differ: {got}")


def to_json(kept):
    """Readable and not endless: one line per number, but the points of a curve in one line each."""
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    return re.sub(r"\[\n\s+(\S+),\n\s+(\S+),\n\s+(\S+)\n\s+\]", r"[\1, \2, \3]", text) + "\n"


def record(job, folder, seconds):
    """A finished job's files -> results/<script>.json and pictures in `folder`. -> the run as kept.

    seconds: of the whole process, imports and pictures included; None after a resumption. Raises OSError, ValueError or
    KeyError for a summary that is missing or makes no sense, before anything is written.
    """
    summary = json.loads((job.folder / "summary.json").read_text(encoding="utf-8"))
    sacrebleu_beside(job.folder, summary["results"])
    summary["config"].pop("out", None)
    # What the run knows of itself stays as the script wrote it; only what says where and how it was called goes.
    summary["config"].update({"resume": False} if "resume" in summary["config"] else {})  # the same run all the same
    # torch: as the process saw it. It may be another one than the version that pip believes is installed.
    env = environment(job.threads)
    env["torch"] = summary.pop("torch", env["torch"])
    summary |= {"arguments": job.arguments, "code": job.code, "identity": job.identity,
                "wall_seconds": seconds and round(seconds, 1), "curve": thinned(job.folder)}
    if job.seed == job.seeds[0]:
        # Where the data lay on this machine is nobody's business.
        printed = job.log.read_text(encoding="utf-8", errors="replace")
        summary["printed"] = re.sub(r" \(/[^)]*\)", "", printed).replace(str(job.folder), f"runs/{job.script}")
    order = {what: seeds for what, (_, _, seeds) in RUNS[job.script].items()} if job.which != "quick" else {}
    kept, gone = merge(kept_file(job.script, folder), env, job.what, summary, order)
    if gone:
        tqdm.write(f"{job.script}.json: {gone} older runs go: of another machine, thread count, version or code")

    # Pictures first, the JSON that names them last: whoever reads it finds what it names.
    if job.seed == job.seeds[0] and job.which != "quick":
        name = "" if job.what == next(iter(RUNS[job.script])) else f"_{job.what}"
        for figure in summary["figures"]:
            picture = (job.folder / figure).read_bytes()
            write_atomically(folder / f"{job.script}{name}_{figure.replace('/', '_')}",
                             lambda file, picture=picture: file.write(picture))
        if job.script == "qwen3_moe" and {"shakespeare", "bias", "none"} <= set(kept["runs"]):
            balance_picture(kept["runs"], folder)
    write_atomically(folder / f"{job.script}.json", lambda file: file.write(to_json(kept).encode()))
    return summary


def balance_picture(runs, folder):
    """How unequal the experts' loads are during training, with and without balancing, in one figure.

    0: every expert gets the same number of tokens. 1: as unequal as if about half of them got nothing at all. The
    validation loss stands in the legend because balance is no end in itself.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120)
    for what, label in (("none", "--balance none"), ("bias", "--balance bias (DeepSeek-V3)"),
                        ("shakespeare", "--balance aux (Switch), the default")):
        looks = runs[what][0]["load_cv"]
        ax.plot(*zip(*looks, strict=True), "o-", ms=3, label=f"{label}: val loss {runs[what][0]['val_loss']:.3f}")
    # Below this line the summary of a run calls the loads balanced.
    ax.axhline(0.2, ls="--", lw=0.8, color="tab:red")
    ax.set(xlabel="step", ylabel="standard deviation / mean of the loads", ylim=(0, None),
           title="qwen3_moe.py: who balances the experts?")
    ax.legend()
    fig.tight_layout()
    write_atomically(folder / "qwen3_moe_balance.png", lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def curves_picture(folder):
    """results/*.json -> curves.png beside them: each script's first run that has a curve. -> False if none has.

    Drawn from the JSON alone, so it can be drawn again years after the checkpoints were deleted. Files written before
    curves were kept are left out.
    """
    shown = []
    for script in RUNS:
        runs = [(what, run) for what, seeds in (results(script, folder) or {}).items() for run in seeds[:1]]
        shown += [(script, what, run) for what, run in runs if run.get("curve")][:1]
    if not shown:
        return False
    import matplotlib
    matplotlib.use("Agg")  # draws into files; no window, so it works on a server
    import matplotlib.pyplot as plt
    # Three or four in a row can still be read at the width of a README.
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    # Small multiples: many plots of one form are compared at a glance, many lines in one plot are a tangle. No shared
    # y axis: nats per character, per word and per pair are different units.
    fig, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.7 * rows), dpi=120, squeeze=False)
    for ax, (script, what, run) in zip(axes.flat, shown, strict=False):
        stages = run["curve"] if isinstance(run["curve"], dict) else {"": run["curve"]}
        for i, (stage, points) in enumerate(stages.items()):
            # A colour per stage. Line: training. Dots: validation, a wide gap between the two is overfitting.
            steps, train, _ = zip(*points, strict=True)
            ax.plot(steps, train, "-", lw=1, color=f"C{i}", label=f"{stage} train".strip())
            looks = [(step, val) for step, _, val in points if val is not None]
            ax.plot(*zip(*looks, strict=True), "o", ms=3, color=f"C{i}", label=f"{stage} val".strip())
        # How far a loss can fall at all is the question that its number alone does not answer.
        # Both ends of the scale where they are known: guessing, and the best that anybody could do.
        if size := run["config"].get("vocab_size"):
            ax.axhline(math.log(size), ls=":", lw=0.8, color="gray")
            ax.text(0.98, math.log(size), f"ln {size}", va="bottom", ha="right", fontsize=6,
                    transform=ax.get_yaxis_transform())
        if run.get("floor") is not None:
            ax.axhline(run["floor"], ls=":", lw=0.8, color="tab:red")
        ax.set_title(f"{script}: {what}", fontsize=9)
        # From 0: a curve whose axis begins at its own minimum always looks as if it had reached the ground.
        ax.tick_params(labelsize=7)
        ax.set_ylim(0, None)
        ax.legend(fontsize=6)
    for ax in axes.flat[len(shown):]:
        ax.set_axis_off()
    fig.supxlabel("step", fontsize=8)
    fig.supylabel("loss, nats", fontsize=8)
    fig.tight_layout()
    write_atomically(Path(folder) / "curves.png", lambda file: fig.savefig(file, format="png"))
    plt.close(fig)
    return True


# Q: A program can be killed at any moment, also in the middle of writing its checkpoint. What is on the disk then?
# A: With open(path, "w"), half a file, and the previous good one is gone. With the function below always a whole one.
def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, then rename it: one operation for the file system."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # always the same name: a killed run leaves one behind at most
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # first the bytes on the disk, then the name: a power cut may come in between
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def out_folder(cfg):
    """-> Path of --out, made now: a folder that cannot be made should end the run before the work, not behind it."""
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        sys.exit(f"error: --out {cfg.out}: {problem}")
    return Path(cfg.out)


@contextlib.contextmanager
def polite_interrupt():
    """-> a list that is empty until Ctrl-C is pressed. A second Ctrl-C ends the program at once, as ever."""
    pressed = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, before)))
    try:
        yield pressed
    finally:  # whatever ended the run: in a notebook the process lives on, and its stop button should work
        signal.signal(signal.SIGINT, before)


# --- 5. Training: jobs, the journal, and one loop that runs them -----------------------------------------------------
# What can go wrong in an hour of other people's code, and what happens then:
#     a script fails              it is reported with the last line it wrote; the others go on; exit code 1 at the end
#     Ctrl-C                      every script finishes its step and saves; the same command goes on from there
#     kill -9, a power cut        children die too (Linux); the journal knows what was finished; the rest is continued
#     a result file half written  cannot be: write_atomically
#     the code was changed        what the old code made is made again, comments and headers aside
#     another machine, Python     old results go rather than stand beside new ones under one name
# What cannot be helped: two calls at once with the same --out would write into the same folders.
@dataclass
class Job:
    """One call of one script, and what is known of it before it runs."""

    script: str
    what: str
    which: str             # the preset that asked for it
    arguments: str
    seed: int | None
    seeds: tuple           # the published ones; the first is the one that is shown
    threads: int
    folder: Path           # its --out
    expected: float        # seconds, from the last time
    code: str = ""         # a hash of what its script does
    identity: str = ""     # a hash of that and of everything else that decides what comes out
    alone: bool = False
    resume: bool = False

    @property
    def name(self):
        """Also the name of its folder and its log."""
        return f"{self.script}-{self.what}" + ("" if self.seed is None else f"-{self.seed}")

    @property
    def log(self):
        """What it prints, both streams."""
        return self.folder.with_name(self.name + ".log")


# Q: Why a hash of the syntax tree and not of the file, or its date?
# A: A comment changes no result, and this program rewrites a line of every header itself. Hashing the file would call a
#    run stale because its own result was written down; a date changes with every checkout. The tree without the
#    header's docstring changes when the code does, and then everything made by the old code is made again.
def code_hash(path):
    """A short hash of what a script does: comments, layout and the header left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return hashlib.sha256(ast.dump(ast.Module(body, [])).encode()).hexdigest()[:16]


def runs_of(which):
    """-> {script: {what: (arguments, seeds)}} of one preset: the one form that the rest of this file works with.

    runs_of("default")["llama3"] is {"numbers": ("--preset numbers", (1337, 1, 2))}.
    """
    if which == "quick":
        return {script: {QUICK_RUNS[script][0]: (QUICK_RUNS[script][1], RUNS[script][QUICK_RUNS[script][0]][2][:1])}
                for script in RUNS}
    chosen = {script: {what: (arguments, seeds) for what, (preset, arguments, seeds) in runs.items() if preset == which}
              for script, runs in RUNS.items()}
    return {script: runs for script, runs in chosen.items() if runs}


def plan_jobs(cfg, folder):
    """cfg -> the list of jobs. An unknown name in --only ends the program. folder: results, for expected seconds."""
    table, jobs = runs_of(cfg.which), []
    codes = {script: code_hash(SCRIPTS_AT / f"{script}.py") for script in RUNS}
    # Checked before anything runs: a typo in the last of ten names should not cost the nine runs before it.
    wanted = [name for name in cfg.only.split(",") if name]
    for name in wanted:
        script, _, what = name.partition(":")
        if script not in table or what and what not in table[script]:
            known = ", ".join(f"{script}:{what}" for script, runs in table.items() for what in runs)
            sys.exit(f"error: --only {name}: no such run in the preset {cfg.which}; it has {known}")
    # Q: One run with two threads, or two runs with a thread each?
    # A: Two runs, for work like this. One thread never waits for another, and a model of 0.1 million parameters has too
    #    little in a step to share. Data parallel training is for the other case: one model that takes days, split by
    #    rows, with an exchange of gradients after each step. It makes one run faster; jobs make all of them faster.
    # More jobs than cores: one thread each, and the system shares out the time.
    share = max(1, cores() // cfg.jobs)
    for script, runs in table.items():
        before = results(script, folder) or {}
        code = "".join(codes.values()) if script in MADE_OF_ALL else codes[script]
        for what, (arguments, seeds) in runs.items():
            if wanted and not {script, f"{script}:{what}"} & set(wanted):
                continue
            # Older files know only what the script measured of itself, without imports and pictures.
            last = [run.get("wall_seconds") or run.get("seconds") for run in before.get(what, [])]
            alone = script in ALONE_RUNS
            for seed in seeds[:cfg.seeds] if cfg.seeds else seeds:
                job = Job(script, what, cfg.which, arguments, seed, seeds, cores() if alone else share, Path(),
                          max(filter(None, last), default=GUESS), alone=alone)
                job.folder = Path(cfg.out) / cfg.which / job.name
                # The environment belongs to it: after a change of --jobs one file would mix two numbers of threads.
                job.code = hashlib.sha256(code.encode()).hexdigest()[:16]
                made_of = [arguments, seed, job.code, environment(job.threads)]
                job.identity = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
                jobs.append(job)
    return jobs


# Q: Why a journal, and not simply "is there a summary.json"?
# A: A file says that something was finished once. It does not say with which arguments or which code, nor whether it
#    was finished in this pass or last month. The journal says it in order, one line each, and a line is the smallest
#    thing that a power cut can tear: then the last one is half there, and is ignored as if it had not been written.
#     {"started": "decoder_only-pydocs-1337", "identity": "52d80b7bee751047"}
#     {"finished": "decoder_only-pydocs-1337", "identity": "52d80b7bee751047"}
#     {"started": "encoder_only-numbers-1337", "identity": "f241e6c19de02956"}       <- was running when the power went
# The last word on a job counts. An identity that is not today's means: other code, arguments or machine; run it again.
def read_journal(path):
    """-> {job name: (what the last line says of it, its identity)}, with "started", "finished" or "failed"."""
    state = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # half a line: the power went while it was written
            continue
        kind = next(kind for kind in ("started", "finished", "failed") if kind in entry)
        state[entry[kind]] = kind, entry["identity"]
    return state


def note(path, kind, job):
    """Append one line to the journal, and return when it is on the disk.

    Appending needs no temporary file: what was there stays whole whatever happens. A few milliseconds for the fsync are
    nothing beside a run, and without it the line might be lost that says that an hour of work is done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
        # Behind half a line the new one would be lost too.
        file.write("\n" * torn + json.dumps({kind: job.name, "identity": job.identity}) + "\n")
        file.flush()             # out of Python's buffer
        os.fsync(file.fileno())  # out of the system's


def forget(path, jobs):
    """Take jobs out of the journal: the next call runs them again. The file goes with its last job.

    Only those of this call: `--only toy_dataset` in between must not make an interrupted pass forget what it has done.
    """
    gone = {job.name for job in jobs}
    left = {name: entry for name, entry in read_journal(path).items() if name not in gone}
    lines = "".join(json.dumps({kind: name, "identity": mark}) + "\n" for name, (kind, mark) in left.items())
    if left:
        write_atomically(path, lambda file: file.write(lines.encode()))
    else:
        path.unlink(missing_ok=True)


def left_to_do(jobs, journal, folder):
    """Jobs without those that are finished; those that were begun are marked for --resume. folder: results.

        the journal says       on the disk            what happens
        nothing, or failed     anything               from the start
        another identity       anything               from the start: the old checkpoint is of other code or arguments
        started                a checkpoint           --resume
        started                none yet               from the start
        finished               summary.json           nothing. If `folder` lost the result, it is recorded again
        finished               no summary.json        from the start: somebody has tidied up
    """
    state, left = read_journal(journal), []
    for job in jobs:
        kind, identity = state.get(job.name, ("", ""))
        if identity == job.identity and kind == "finished" and (job.folder / "summary.json").is_file():
            known = (results(job.script, folder) or {}).get(job.what, [])
            # By its identity: an older run with the same seed is another one.
            if any(run.get("identity") == job.identity for run in known):
                continue
            try:
                record(job, folder, None)
                continue
            except (OSError, ValueError, KeyError):
                pass  # its log or a picture was tidied away: run it again
        # A checkpoint alone is not enough: the folder may be of older code, or of other arguments. Stages keep their
        # checkpoints one level down.
        saved = [*job.folder.glob("ckpt.pt"), *job.folder.glob("*/ckpt.pt")]
        able = "resume: bool" in (SCRIPTS_AT / f"{job.script}.py").read_text(encoding="utf-8")
        job.resume = identity == job.identity and kind == "started" and bool(saved) and able
        left.append(job)
    return left


def next_job(waiting, running, limit):
    """The first of `waiting` that may start beside `running`, or None. Both are lists of jobs.

    Three rules: no more than `limit` at once; nothing beside one that is alone; one that is alone beside nothing.
    """
    if len(running) >= limit or any(job.alone for job in running):
        return None
    # With --jobs above 1 those that need the machine for themselves end up last: only then is nobody else running.
    return next((job for job in waiting if not job.alone or not running), None)


def end_with_parent():
    """-> a function for the child to call before it becomes the script: it dies with this process. None outside Linux.

    Killed with SIGKILL this program cannot stop its children, and orphans would go on writing into folders that the
    next call uses. Linux can be asked to kill a child whose parent is gone. Elsewhere (macOS, Windows) nothing can be
    asked for: look for left-over python processes there, and end them before the next call.
    """
    if not sys.platform.startswith("linux"):
        return None
    import ctypes
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # loaded here: between fork and exec as little as possible

    def ask():
        prctl(1, signal.SIGKILL)     # 1 = PR_SET_PDEATHSIG
        if os.getppid() != parent:   # it was already gone before we could ask
            os._exit(1)
    return ask


# Why a process per script, when Python could import them all? Because it is what a reader does, so it tests the
# command line and the defaults as well. Because memory and threads belong to a process: peak_memory_mb means something,
# and OMP_NUM_THREADS is read once, at the start. And because a crash in C, or the kernel's memory killer, ends that
# script alone and not this program.
def start(job):
    """Begin a job. -> its process. Both streams go to its log; a resumed one's is continued."""
    if not job.resume:
        # Old checkpoints must go: were this run killed before its first, the next call would resume from a stranger's.
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    # sys.executable: the same Python, hence the same packages, also when no virtual environment is active.
    command = [sys.executable, str(SCRIPTS_AT / f"{job.script}.py"), *job.arguments.split(), "--out", str(job.folder)]
    command += [] if job.seed is None else ["--seed", str(job.seed)]
    command += ["--resume"] * job.resume
    # Into a file Python writes output in lumps of 8 kB and errors at once. Unbuffered, both stay in their order.
    env = os.environ | {"OMP_NUM_THREADS": str(job.threads), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with open(job.log, "ab" if job.resume else "wb") as log:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                preexec_fn=end_with_parent())


def last_line(path):
    """The last line of a log that is not empty: the message of an error, or the last line of a traceback.

    The scripts end with one line `error: ...`; Python's own tracebacks say what happened in their last line as well.
    """
    # errors="replace": a process that dies in the middle of a character must not take this one along.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


# One loop that looks at every process three times a second. Threads or a pool would wait more elegantly, and bring
# locks, a second place where Ctrl-C arrives, and PR_SET_PDEATHSIG firing when the thread that started a child ends.
def run_jobs(jobs, limit, journal, folder):
    """Run all jobs, `limit` at a time, and record each as it finishes. -> ({name: why it failed}, interrupted?)."""
    # running: name -> (job, its process, when it began). done: expected seconds of the jobs that have ended.
    waiting, running, failed, done = list(jobs), {}, {}, 0.0
    # In seconds and not in jobs: one bar for all would otherwise creep through a translation and leap over a tokenizer.
    bar = tqdm(total=sum(job.expected for job in jobs), disable=None,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left{postfix}")
    with polite_interrupt() as stop, bar:
        try:
            while waiting or running:
                # Ctrl-C reaches the children too, since they are in the same process group: nothing has to be passed
                # on, only nothing new may begin. (kill -INT on this process alone: what runs is run to its end.)
                if stop and waiting:
                    waiting.clear()
                    tqdm.write("interrupted: waiting for what runs to save its checkpoint (Ctrl-C again: do not wait)")
                while job := next_job(waiting, [one for one, *_ in running.values()], limit):
                    waiting.remove(job)
                    note(journal, "started", job)
                    running[job.name] = job, start(job), time.monotonic()
                time.sleep(LOOK_EVERY)
                # Who has ended? poll() asks and does not wait; a copy of the list, because entries leave it.
                for job, process, began in list(running.values()):
                    if (code := process.poll()) is None:
                        continue
                    del running[job.name]
                    # monotonic, not time(): a clock that is set while we wait would make a run last minus an hour.
                    seconds, problem = time.monotonic() - began, None
                    if code == 0:
                        try:
                            said = key_figure(job.script, record(job, folder, None if job.resume else seconds))
                            note(journal, "finished", job)  # behind the record: a kill in between costs a repetition
                            tqdm.write(f"{job.name}: {seconds:.0f} s, {said}")
                        except (OSError, ValueError, KeyError) as mistake:
                            problem = f"{type(mistake).__name__}: {mistake}"
                    # Q: What does exit code 130 mean?
                    # A: 128 + 2: ended by signal 2, SIGINT, which Ctrl-C sends to every process of the terminal. The
                    #    scripts catch it, save, and exit with that number themselves, so that a caller can tell
                    #    "interrupted, go on later" from 1, "failed".
                    elif not stop:
                        problem = last_line(job.log)
                    if problem and job.resume:
                        # Refused, or the checkpoint is damaged: the way that always works is to begin again.
                        tqdm.write(f"{job.name}: cannot be continued ({problem}); again from the start")
                        job.resume = False
                        waiting.insert(0, job)
                        continue
                    if problem:
                        note(journal, "failed", job)  # so the next call does not trust its checkpoint
                        failed[job.name] = problem
                        tqdm.write(f"{job.name}: FAILED: {problem}  ({job.log})")
                    done += job.expected
                # A job that takes longer than expected stands still in the bar instead of running past the end.
                bar.n = done + sum(min(job.expected, time.monotonic() - began) for job, _, began in running.values())
                bar.set_postfix_str("now " + ", ".join(running), refresh=False)
                bar.refresh()
        finally:
            for _, process, _ in running.values():  # only after a second Ctrl-C, or an error of this program
                process.kill()
                process.wait()
    return failed, bool(stop)


# --- 7. Interchange: from results to headers and README --------------------------------------------------------------
# Everything here is a pure function of results/*.json and of the scripts' text: refreshing twice changes nothing, and a
# test that refreshes in memory and compares can tell whether a number in the README is still true.
def key_figure(script, run):
    """The figure that matters, in a few words: what a finished run says of itself, and what the README compares.

    Known by the keys of `results` and not by the script's name: sst2 and the toy language are one script and two tasks.
    """
    got, loss = run["results"], run.get("val_loss")
    if "sst2_accuracy" in got:
        return f"{got['sst2_accuracy']:.1%} of the sentences right"
    if "cloze_accuracy_words" in got:
        return f"{got['cloze_accuracy_words']:.1%} of the words, {got['match_accuracy']:.1%} of the pairs right"
    # Chosen by what a user of the technique would ask first: how good, how fast, how much memory.
    if "bleu_greedy" in got:
        return f"BLEU {got['bleu_greedy']:.1f} greedy, {got['bleu_beam']:.1f} beam"
    if isinstance(got.get("exact_match"), dict) and not got.get("tokens_per_second") and script == "kv_cache":
        return f"{got['exact_match']['gqa']:.1%} of unseen numbers right, with int8 {got['exact_match']['int8']:.1%}"
    if "tokens_per_second" in got:
        pace = got["tokens_per_second"]
        return f"tokens/s: none {pace['none']:.0f}, compiled {pace['compiled']:.0f}, int8 {pace['int8']:.0f}"
    # flash_attention.py measures naive attention only as far as memory allows: the longest text that both got through.
    if got.get("peak_mb"):
        longest = max(set(got["peak_mb"]["naive"]) & set(got["peak_mb"]["tiled"]), key=int)
        return (f"{int(longest):,} tokens in {got['peak_mb']['tiled'][longest]:.0f} MB, naive "
                f"{got['peak_mb']['naive'][longest]:,.0f} MB")
    # Four models from one base: which of them won is the figure.
    if script == "lora_qlora":
        return "val loss " + ", ".join(f"{name} {value:.3f}" for name, value in got["val_loss"].items())
    # Real preferences have no right answer that a program could check; the pairs have an order all the same.
    if "preferred_rate" in got and got["preferred_rate"]["before"] is None:
        return f"{got['pair_accuracy']['after']:.1%} of the held-out pairs in the right order"
    if "preferred_rate" in got:
        return f"preferred answers {got['preferred_rate']['before']:.1%} -> {got['preferred_rate']['after']:.1%}"
    if "accuracy_greedy" in got:
        return "right " + ", ".join(f"{name} {value:.1%}" for name, value in got["accuracy"].items())
    # The rest: whole answers where they can be checked, bytes per token, floors, a loss.
    if isinstance(got.get("exact_match"), float):
        return f"{got['exact_match']:.1%} of unseen numbers right"
    if "bytes_per_token" in got:
        size = max(got["bytes_per_token"], key=int)
        return f"{got['bytes_per_token'][size]:.2f} bytes per token with {int(size):,} tokens"
    if "encoder_decoder" in got:  # the tour: one figure for each of the three
        return "names right: " + ", ".join(f"{name} {one['exact_match']:.1%}" for name, one in got.items())
    # Pictures have no score; how many there are tells at least that none is missing.
    if "pictures" in got:
        return f"{got['pictures']} pictures"
    if "floors" in got:
        return f"{len(got['floors'])} floors, the highest {max(got['floors'].values()):.2f} nats"
    return "done" if loss is None else f"val loss {loss:.4f}"


# Q: Why from the least to the largest value, and not plus or minus a standard error?
# A: A standard error says how well the mean is known, and with n = 3 it hardly knows itself: 95 % needs 4.3 of them on
#    either side (Student's t with 2 degrees of freedom), and a bell curve. Minimum and maximum assume nothing and hide
#    nothing: if one of three seeds fails, "57% (28% to 75%)" shows it, and "57% +- 15%" looks like noise.
def seed_spread(values, form="{:.3f}"):
    """[1.699, 1.705, 1.711] -> "1.705 (1.699 to 1.711, 3 seeds)"; [1.705] -> "1.705"; [1, 1] -> "1.000 (2 of 2 seeds)".

    Equal means equal as printed: nobody can see a spread in "100.0% (100.0% to 100.0%)".
    """
    values = sorted(values)
    mean = form.format(sum(values) / len(values))
    if len(values) == 1 or form.format(values[0]) == form.format(values[-1]):
        return mean + (f" ({len(values)} of {len(values)} seeds)" if len(values) > 1 else "")
    return f"{mean} ({form.format(values[0])} to {form.format(values[-1])}, {len(values)} seeds)"


def minutes(seconds):
    """90 -> "90 s", 150 -> "2 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def cores_in_words(env):
    """{"threads": 2} -> "two CPU cores": what a small laptop or a free build server offers. Older files did not say."""
    count = env.get("threads") or 2
    return {1: "one CPU core", 2: "two CPU cores"}.get(count, f"{count} CPU cores")


def look_up(run, path):
    """look_up(run, "results/kl/grpo") is run["results"]["kl"]["grpo"]. Raises KeyError for what is not there."""
    for key in path.split("/"):
        run = run[key]
    return run


# The sentences are written here, by hand, and every measured number in them comes from a run. A reader should be able
# to judge from them alone whether his own run went well, so each tells what was reached, where it can be known what
# could have been reached (a floor, a ceiling, a control), and how far seeds lie apart.
# Raises KeyError where a run is missing: half a sentence would be worse than the old one, which then stays.
def expectation(script, runs, folder=RESULTS):
    """-> (time for the title line, the Expect paragraph) of a script. runs: what results(script) gives."""
    def over(what, path, form="{:.3f}"):
        """One figure over all seeds of a run."""
        return seed_spread([look_up(run, path) for run in runs[what]], form)

    def first(what, path):
        """The figure of the first seed: settings, which all seeds share, and runs with one seed."""
        return look_up(runs[what][0], path)

    # The slowest seed: a reader who waits less does not complain. Machines differ by more than seeds do, and the JSON
    # says which one it was.
    def slowest(what, path="seconds"):
        return max(look_up(run, path) for run in runs[what])

    # What measures and trains counts its training alone as `seconds`; what the reader waits for is wall_seconds.
    def on_two(what, path="seconds"):
        return f"{minutes(slowest(what, path))} on {cores_in_words(kept_file(script, folder)['environment'])}"

    # Real text has no known floor: two texts and a loss each say more than one. The toy language has right answers.
    if script == "decoder_only":
        return (on_two("shakespeare"),
                f"validation loss {over('shakespeare', 'val_loss')} nats per character after "
                f"{first('shakespeare', 'config/max_steps'):,} steps on Tiny Shakespeare, "
                f"{first('pydocs', 'val_loss'):.2f} on the Python docs. --preset numbers: "
                f"{over('numbers', 'results/exact_match', '{:.1%}')} of unseen numbers exactly right in "
                f"{minutes(slowest('numbers'))}")
    # The share of right guesses means nothing without its ceiling: some hidden tokens nobody could know, because both
    # the digit and its word are hidden. And nothing without a baseline: a bag of words knows no order, and is hard to
    # beat with a few thousand sentences.
    if script == "encoder_only":
        got = runs["numbers"][0]["results"]
        return (on_two("numbers"),
                f"of the tokens that can be known from the other half only "
                f"{over('numbers', 'results/cloze_accuracy_digits', '{:.1%}')} digits and "
                f"{over('numbers', 'results/cloze_accuracy_words', '{:.1%}')} words are guessed right (from one half "
                f"{got['one_half_reader']:.1%}; of all hidden tokens {got['all_hidden_tokens']:.1%}, ceiling "
                f"{got['all_hidden_ceiling']:.1%}), and {over('numbers', 'results/match_accuracy', '{:.1%}')} of the "
                f"pairs are judged right. --preset sst2, from scratch: "
                f"{over('sst2', 'results/sst2_accuracy', '{:.1%}')}, a bag of words "
                f"{first('sst2', 'results/bag_of_words_accuracy'):.1%}")
    # Two decimals: near 100 % the rare failures are all that is left to see, and long numbers with many zeros are where
    # they would be. BLEU is comparable on the same test set only, hence its name.
    if script == "encoder_decoder":
        real = runs["multi30k"][0]
        return (on_two("numbers"),
                f"{over('numbers', 'results/exact_match', '{:.2%}')} of unseen numbers exactly right, of those of 5 or "
                f"6 digits with three or more zeros {over('numbers', 'results/exact_match_stress', '{:.2%}')}. "
                f"--preset multi30k, {minutes(real['seconds'])}: BLEU {real['results']['bleu_greedy']:.1f} greedy, "
                f"{real['results']['bleu_beam']:.1f} with {real['config']['beams']} beams on the test set of 2016")
    # Two architectures at one learning rate would show whom that rate suits: hence the search for both.
    if script == "llama3":
        search = json.loads((Path(folder) / "lr_search.json").read_text(encoding="utf-8"))["scripts"]
        return (on_two("shakespeare"),
                f"validation loss {over('shakespeare', 'val_loss')} nats per character after "
                f"{first('shakespeare', 'config/max_steps'):,} steps on Tiny Shakespeare. After one search over "
                f"learning rates for both (one seed): {search['llama3']['best']:.3f} here, "
                f"{search['decoder_only']['best']:.3f} in decoder_only.py (results/lr_search.json). --preset numbers: "
                f"{over('numbers', 'results/exact_match', '{:.1%}')} of unseen numbers exactly right in "
                f"{minutes(slowest('numbers'))}")
    # Beside the mixture stands the dense model with the same work per token: its rival in seconds, not in weights. How
    # unequal the loads are is told for every way to balance them, because only "none" shows what balancing does.
    if script == "qwen3_moe":
        return (on_two("shakespeare"),
                f"validation loss {over('shakespeare', 'val_loss')} nats per character after "
                f"{first('shakespeare', 'config/max_steps'):,} steps on Tiny Shakespeare; the dense model of the same "
                f"work per token {over('dense', 'val_loss')}. The experts' loads vary by "
                f"{over('shakespeare', 'results/expert_load_cv', '{:.2f}')} of their mean, with --balance bias "
                f"{first('bias', 'results/expert_load_cv'):.2f}, none {first('none', 'results/expert_load_cv'):.2f} "
                f"(one seed each)")
    # Tokens per second are of one machine; the share of its bandwidth travels better, so both are told.
    if script == "kv_cache":
        small, large = (runs[what][0]["results"] for what in ("numbers", "125m"))
        text, window = runs["text"][0]["results"]["rounding"], runs["text"][0]["config"]

        # The five rungs that change most; the others are in the file.
        def paces(got):
            return ", ".join(f"{rung} {got['tokens_per_second'][rung]:.0f}" for rung in
                             ("none", "growing", "gqa", "compiled", "int8"))
        return (on_two("numbers", "wall_seconds"),
                f"tokens per second behind {next(iter(small['ladder']['gqa']['tokens_per_second']))} others, "
                f"{small['weight_bytes'] / 1e6:.0f} MB of weights: {paces(small)}. --preset 125m, "
                f"{large['weight_bytes'] / 1e6:.0f} MB: {paces(large)}; compiled is "
                f"{large['bandwidth_fraction']['compiled']:.0%} of the bandwidth of "
                f"{large['read_bandwidth_gb_s']:.0f} GB/s, gqa {large['bandwidth_fraction']['gqa']:.0%}. "
                # Speed that costs quality would be no speed: what rounding and forgetting do to the perplexity.
                f"--preset text: perplexity {text['gqa']['perplexity']:.4f} exact, "
                f"{text['int8']['perplexity']:.4f} with int8 weights, {text['int8-cache']['perplexity']:.4f} with an "
                f"int8 cache too, {text['window']['perplexity']:.3f} with a window of {window['window']} and "
                f"{window['sinks']} sinks")
    # Memory is exact and time is noisy: from where on the tiles are faster is looked up, not assumed. The two losses at
    # the end are the proof that nothing was approximated.
    if script == "flash_attention":
        got, naive = runs["shakespeare"][0], runs["naive"][0]
        times, peaks = got["results"]["milliseconds"], got["results"]["peak_mb"]
        slower = [int(n) for n, naive_ms in times["naive"].items() if times["tiled"][n] >= naive_ms]
        faster = min((int(n) for n in times["naive"] if int(n) > max(slower, default=0)), default=0)
        limit = got["results"]["in_2_gib"]
        if not faster or not limit["naive"]["fails"] or limit["tiled"]["fails"]:
            raise ValueError("a run in which tiles are not faster, or in which memory sufficed,")
        return (on_two("shakespeare", "wall_seconds"),
                f"forward + backward of 8,192 tokens, two heads, in {peaks['tiled']['8192']:.0f} MB (naive: "
                f"{peaks['naive']['8192']:,.0f}), 16,384 in {peaks['tiled']['16384']:.0f}; at 2,048 tokens in "
                f"{times['tiled']['2048'] / times['naive']['2048']:.2f} of naive's time (PyTorch's own kernel: "
                f"{times['sdpa']['2048'] / times['naive']['2048']:.2f}), faster from {faster:,} on. With 2 GiB naive "
                f"fails at {limit['naive']['fails']:,} tokens, tiled passes. Training ends at a "
                f"validation loss of {got['val_loss']:.4f}, with naive attention at {naive['val_loss']:.4f}")
    # What was learned and what was forgotten: an adaptation that tells only the first is half a result. With few lines
    # the narrow detour is ahead, with many it is behind; telling one of the two would be advertising.
    if script == "lora_qlora":
        many, trained = runs["all"][0]["results"]["val_loss"], first("numbers", "results/trainable_parameters")
        loss = {way: over("numbers", f"results/val_loss/{way}") for way in ("full", "lora", "qlora")}
        old = [over("numbers", f"results/exact_match/{way}", "{:.0%}") for way in loss]
        modern = [over("numbers", f"results/exact_match_modern/{way}", "{:.0%}") for way in (*loss, "base")]
        return (on_two("numbers"),
                f"validation loss after {first('numbers', 'config/examples'):,} lines of the old form: full "
                f"fine-tuning {loss['full']}, LoRA with {trained['lora'] / trained['full']:.1%} of the parameters "
                f"{loss['lora']}, QLoRA on four bits {loss['qlora']}; old names right {', '.join(old)}; modern names "
                f"still right {', '.join(modern[:3])} (base {modern[3]}). With all lines full "
                f"fine-tuning {many['full']:.3f}, LoRA {many['lora']:.3f}. Of the squared full update "
                f"{over('numbers', 'results/full_update_within_rank', '{:.0%}')} lies within rank "
                f"{first('numbers', 'config/rank')}")
    # The control (imitate the chosen answers) separates what the pairs bring from what more training brings.
    if script == "dpo":
        rate = {name: over("numbers", f"results/preferred_rate/{name}", "{:.1%}")
                for name in ("before", "after", "control", "dpo, all", "dpo, lora")}
        right = {name: over("numbers", f"results/correct_rate/{name}", "{:.1%}") for name in ("before", "after")}
        # Variants were run with one seed: they are told as such, and close ones should not be ranked by these.
        other = {what: f"{first(what, 'results/preferred_rate/after'):.1%}"
                 for what in ("ipo", "simpo", "nll", "flipped", "flipped-cdpo")}
        return (on_two("numbers"),
                f"answers without a slip and with the right number {rate['before']} before, {rate['after']} after "
                f"{first('numbers', 'config/max_steps')} steps of DPO in "
                f"{slowest('numbers', 'results/dpo_seconds'):.0f} s (right number {right['before']} and "
                f"{right['after']}); imitating the chosen answers instead "
                f"{rate['control']}; all weights as the carrier {rate['dpo, all']}, adapters {rate['dpo, lora']}. One "
                f"seed each: IPO {other['ipo']}, SimPO {other['simpo']}, all weights with --nll 0.2 {other['nll']}; "
                f"with 10 % of the labels swapped DPO {other['flipped']}, cDPO {other['flipped-cdpo']}")
    # Sampled and greedy: sloppy annotators make an imitator that is far worse greedy; one trained on a reward is not.
    # The distance from the imitator stands beside the least that any perfect policy needs.
    if script == "ppo_grpo":
        both = {way: f"{over('numbers', f'results/accuracy/{way}', '{:.1%}')} sampled, "
                     f"{over('numbers', f'results/accuracy_greedy/{way}', '{:.1%}')} greedy"
                for way in ("sft", "reinforce", "grpo", "ppo")}
        took = {way: f"{slowest('numbers', f'results/method_seconds/{way}'):.0f} s" for way in list(both)[1:]}
        return (on_two("numbers"),
                f"names right on prompts that were looked at once: imitation {both['sft']}; REINFORCE "
                f"{both['reinforce']}, in {took['reinforce']}; GRPO {both['grpo']}, in {took['grpo']}; PPO "
                f"{both['ppo']}, in {took['ppo']}. KL to the imitator {over('numbers', 'results/kl/grpo', '{:.2f}')} "
                f"nats with GRPO, the least for it {first('numbers', 'results/least_kl'):.2f}")
    # The two without a model: nothing random in the one, nothing trained in the other.
    if script == "bpe_tokenizer":
        one = runs["shakespeare"][0]["results"]
        last = max(one["bytes_per_token"], key=int)
        return (f"{minutes(first('shakespeare', 'seconds'))} on one CPU core",
                f"{one['merges']:,} merges on Tiny Shakespeare in {one['train_seconds']:.1f} s, "
                f"{one['bytes_per_token'][last]:.2f} bytes per token on held-out text with {int(last):,} tokens")
    if script == "quick_start":
        tour = runs["default"][0]["results"]
        return (on_two("default"),
                "names of unseen numbers exactly right after so short a training: " + ", ".join(
                    f"{name}.py {one['exact_match']:.1%} in {one['seconds']:.0f} s" for name, one in tour.items())
                + "; half-trained models err in ways worth looking at")
    if script == "visualizations":
        return (on_two("default"),
                f"{first('default', 'results/pictures')} pictures. The models behind them are small, and most are "
                f"trained for a part of their usual steps (each picture says how many): read shapes and orders of "
                f"magnitude, not last digits")
    if script != "toy_dataset":
        raise KeyError(script)
    floors = first("default", "results/floors")
    return ("seconds on a laptop CPU",
            "floors, in nats per token: " + "; ".join(f"{floor:.2f} {task}" for task, floor in floors.items()))


# This file's own header: how long the presets take, added up from what the runs took.
def own_expectation(folder=RESULTS):
    """-> (time for the title line, the Expect paragraph) of train_all.py. Raises KeyError where a run is missing.

    Sums over runs, one at a time: what --jobs 1 takes. With more jobs it is less, by how much depends on the machine.
    """
    def total(which):
        place = Path(folder) / "quick" if which == "quick" else folder
        jobs = [(script, what) for script, runs in runs_of(which).items() for what in runs]
        kept = {script: results(script, place) or {} for script, _ in jobs}
        runs = [kept[script][what][0] for script, what in jobs]
        # A resumed run does not know how long it took in all; what the script counted itself then stands in for it.
        seconds = [run.get("wall_seconds") or run.get("seconds") for run in runs]
        if None in seconds:
            raise KeyError("wall_seconds")
        return len(jobs), sum(seconds)
    # How many runs, and for how long.
    (few, quick), (some, default), (many, real) = map(total, ("quick", "default", "real"))
    return (f"{minutes(default)} on {cores_in_words(kept_file('decoder_only', folder)['environment'])}",
            f"one line per finished run, then results/<script>.json, pictures and results/curves.png. One seed each: "
            f"--preset quick {few} runs in {minutes(quick)}, default {some} in {minutes(default)}, real {many} in "
            f"{minutes(real)} (sums of the runs, one at a time)")


def comparison_expectation(folder=RESULTS):
    """-> (time for the title line, the Expect paragraph) of compare_architectures.py: its own sentences, word for word.

    One of each question: who is best, and who is level with it. Raises OSError before it was run.
    """
    # That file's sentences are computed where its numbers are; repeating the rules here would be a second set of them.
    # Its time is the sum over all trainings, shared out over those that ran side by side: a run that was interrupted
    # and continued has no wall time worth quoting.
    kept = json.loads((Path(folder) / "compare_architectures.json").read_text(encoding="utf-8"))
    best = {task: next(line for line in one["conclusions"] if " is best with " in line)
            for task, one in kept["tasks"].items()}
    said = " ".join(f"{task}: {line}" for task, line in best.items())
    jobs = max(one["environment"]["jobs"] for one in kept["tasks"].values())
    seconds = sum(one["training_seconds"] / one["environment"]["jobs"] for one in kept["tasks"].values())
    return (f"{minutes(seconds)} on {cores_in_words({'threads': jobs})}",
            f"{said} (results/compare_architectures.json)")


def comparison_tables(folder=RESULTS):
    """The tables of compare_architectures.py, as it wrote them; "" before it was run."""
    # Markdown that is already finished: nothing to compute, so nothing that could differ from the file.
    path = Path(folder) / "compare_architectures.md"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def put_header(source, script, took, expect):
    """A script's text with another time in its title line and another Expect paragraph.

    Only two places are touched, each known by its form: what stands behind the run line in the title, and `Expect` with
    the lines behind it that are indented by nine columns. Where they are missing nothing happens; a test of the house
    finds that.
    """
    source = re.sub(rf"^(.+python {script}\.py +).+$", lambda found: found[1] + took, source, count=1, flags=re.M)
    paragraph = textwrap.fill(f"Expect   {expect}", 120, subsequent_indent=" " * 9, break_on_hyphens=False)
    return re.sub(r"^Expect .+(?:\n {9}.+)*", lambda _: paragraph, source, count=1, flags=re.M)


def refresh_header(source, script, runs, folder=RESULTS):
    """The script's text with its time and its Expect paragraph as measured."""
    took, expect = expectation(script, runs, folder)
    return put_header(source, script, took, f"{expect} (results/{script}.json)")


# In the order in which one would read them: the scripts, a tour through three of them, then what draws, compares and
# runs them. What is in no list comes last.
ORDER = [*RUNS, "compare_architectures", "train_all"]


def in_order():
    """All scripts of the repository, as paths, in the order of ORDER."""
    paths = sorted(SCRIPTS_AT.glob("*.py"))
    return sorted(paths, key=lambda path: ORDER.index(path.stem) if path.stem in ORDER else len(ORDER))


def script_table(folder=RESULTS):
    """The README's table of scripts: the idea, the paper, how long it is, what it reaches.

    Everything in it is read from the scripts' headers: said once there, it cannot be said differently here.
    """
    rows = ["| script | idea | paper | lines | reaches |", "|---|---|---|---|---|"]
    for path in in_order():
        # A label begins its line, and what belongs to it is indented by nine columns, as in this file's own header.
        source, said = path.read_text(encoding="utf-8"), {}
        for label in ("Idea", "Expect"):
            found = re.search(rf"^{label} +(.+(?:\n {{9}}.+)*)", source, re.M)
            if not found:
                sys.exit(f"error: {path.name}: its header has no line that begins with {label}")
            said[label] = " ".join(found[1].split())
        paper = re.search(r"^Paper +([^,]+),", source, re.M)
        # Two sentences of the idea; the rest is read in the file.
        rows.append(f"| [`{path.name}`]({path.name}) | {' '.join(re.split(r'(?<=[.!?]) ', said['Idea'])[:2])} "
                    f"| {paper[1] if paper else 'none'} | {len(source.splitlines()):,} | {said['Expect']} |")
    return "\n".join(rows)


def questions(folder=RESULTS):
    """The interview index: every `# Q:` of every script, with its line; those of shared blocks once.

    A question is code's comment first and README's line second: answered where the code stands that it asks about.
    """
    # known: a block that was pasted into nine scripts asks its question nine times; the first place is the one named.
    out, known = [], set()
    for path in in_order():
        lines = path.read_text(encoding="utf-8").splitlines()
        out += [f"\n**{path.name}**\n"]
        for i, line in enumerate(lines):
            if line.strip().startswith("# Q: "):
                text, j = line.strip()[5:], i + 1
                while not lines[j].strip().startswith("# A:"):  # a question may take several lines
                    text, j = f"{text} {lines[j].strip().lstrip('# ')}", j + 1
                if text not in known:
                    out.append(f"- [{text}]({path.name}#L{i + 1})")
                known.add(text)
    return "\n".join(out).strip()


def printed(folder=RESULTS):
    """What the default run prints, in short; "" before it was recorded.

    A reader compares it line by line with his own screen: so it is cut out of a real output, never retyped.
    """
    runs = (results("decoder_only", folder) or {}).get("shakespeare")
    if not runs:
        return ""
    lines = runs[0]["printed"].splitlines()
    first = [line for line in lines if line.startswith(("data:", "model:", "step     1"))]
    # Three looks, each with the line of text behind it: the first, one in the middle, the last.
    steps = [i for i, line in enumerate(lines) if re.match(r"step +\d\d+:", line)]
    some = [line for i in (steps[0], steps[len(steps) // 2], steps[-1]) for line in lines[i:i + 2]]
    return "\n".join(["```", "$ python decoder_only.py", *first, *some, "```"])


def peers(folder=RESULTS):
    """Ratios against the usual alternatives, from results/peers_*.json; "" if there are none.

    Those files come from benchmarks/peers.py, which runs both sides in one process, taking turns. Ratios are quoted and
    not seconds: a slow machine is slow for both sides. A row appears as soon as its file is there.
    """
    def of(script):
        path = Path(folder) / f"peers_{script}.json"
        return json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else None
    rows, head = [], ["| work | against | result |", "|---|---|---|"]
    # Architectures: one training step, then writing.
    if got := of("decoder_only"):
        step, made = got["training_step"], got["generation"]
        rows += [f"| training step, laptop preset | nanoGPT's loop | "
                 f"{step['time_ratio_ours_to_nanogpt']:.2f} of its time |",
                 f"| greedy generation, 256 tokens | nanoGPT's `generate`, no cache | "
                 f"{made['times_faster_than_nanogpt']:.1f} times as fast |",
                 f"| the same | `transformers` `generate`, cached | "
                 f"{made['times_faster_than_transformers']:.1f} times as fast |"]
    # An output layer of 30,522 words for a few hidden positions only: most of the time that is saved is saved there.
    if got := of("encoder_only"):
        got = got["training_step"]
        rows += [f"| masked-token training step, vocabulary {got['vocabulary']:,}, 4 layers x 256, "
                 f"{got['batch']} x {got['tokens']} | `transformers` `BertForMaskedLM` | "
                 f"{got['time_ratio_ours_to_transformers']:.2f} of its time |"]
    # Two shapes, one source and many: the smaller the work per step, the more a library's own steps cost.
    if got := of("encoder_decoder"):
        rows += [f"| beam search, 4 beams, {one['label']}, {one['sources']} "
                 f"source{'s' if one['sources'] > 1 else ''} at a time, same output | `transformers` `generate` | "
                 f"{one['times_faster_than_transformers']:.1f} times as fast |" for one in got["beam_search"]]
        rows += [f"| encoder-decoder training step, 32 x (32 -> 32) | `transformers` T5 | "
                 f"{got['training_step']['time_ratio_ours_to_transformers']:.2f} of its time |"]
    # The same tokens come out, so the ratio is one of time alone.
    if got := of("llama3"):
        got = got["decoding"]
        rows += [f"| cached greedy generation, Llama of {one['parameters'] / 1e6:.0f} M parameters, "
                 f"{one['rows']} row{'s' if one['rows'] > 1 else ''}, same tokens | `transformers` `generate` | "
                 f"{one['times_faster_than_transformers']:.1f} times as fast |" for one in got]
    # Both of the library's ways to run experts: the loop over them, and the grouped product.
    if got := of("qwen3_moe"):
        got = got["step"]
        rows += [f"| forward + backward, 64 experts, 8 per token, {one['tokens']:,} tokens | `transformers`, eager and "
                 f"grouped | {one['time_ratio_to_eager']:.2f} and {one['time_ratio_to_grouped']:.2f} of its time |"
                 for one in got]
    # Rung by rung, with the share of the bandwidth that is the bound for both.
    if got := of("kv_cache"):
        rows += [f"| one token at a time, Llama of {got['parameters'] / 1e6:.0f} M parameters, rung {rung} | "
                 f"`transformers` `generate` | {one['times_faster_than_transformers']:.1f} times as fast, "
                 f"{one['bandwidth_fraction']:.0%} of the read bandwidth"
                 f"{', same tokens' if one['same_tokens'] else ''} |" for rung, one in got["rungs"].items()]
    # Techniques: a step, a rollout.
    if got := of("lora_qlora"):
        got = got["step"]
        for one in got:
            where = f"{one['tokens']:,} tokens, {one['layers']} layers x {one['width']}, rank {one['rank']}"
            rows += [f"| LoRA step, {where} | full fine-tuning, and `peft`'s LoRA | {one['lora_to_full']:.2f} and "
                     f"{one['lora_to_peft']:.2f} of its time |",
                     f"| QLoRA step, the same | full fine-tuning | {one['qlora_to_full']:.2f} of its time |"]
    # Reference log-probs computed once, and both answers in one batch.
    if got := of("dpo"):
        rows += [f"| DPO step, {got['parameters'] / 1e6:.1f} M parameters, {got['pairs']} pairs of {got['tokens']} "
                 f"tokens | two models, a forward pass for each answer | {got['time_ratio']:.2f} of its time |"]
    # Most of the time of learning from a reward is spent on writing answers.
    if got := of("ppo_grpo"):
        rows += [f"| rollout, {got['rows']} answers of {got['new_tokens']:.0f} tokens, {got['parameters'] / 1e6:.1f} "
                 f"M parameters | `transformers` `generate` | "
                 f"{got['times_faster_than_transformers']:.1f} times as fast |"]
    # Pure Python against Rust: the comparison that is not expected to be won.
    if got := of("bpe_tokenizer"):
        small, large, speed = got["train_512"], got["train_4096_merges"], got["encode"]["megabytes_per_second"]
        rows += [f"| BPE training, 200 kB to 512 tokens | minbpe's algorithm | "
                 f"{small['times_faster_than_minbpe']:.0f} times as fast |",
                 f"| BPE training, 1.1 MB, 4,096 merges, pure Python | Hugging Face `tokenizers`, Rust | "
                 f"{large['time_ratio_ours_to_tokenizers']:.1f} of its time ({large['seconds']['ours']:.1f} s) |",
                 f"| encoding with our merges | tiktoken, Rust | {speed['ours']:.1f} MB/s in Python, "
                 f"{speed['tiktoken']:.0f} MB/s handed to tiktoken |"]
    return "\n".join(head + rows) if rows else ""


def quick_table(folder=RESULTS):
    """The quick pass beside the full runs that it shortens; "" before it was run.

    | `llama3.py --preset numbers` | 20 | 99.9% of unseen numbers right | 99.9% of unseen numbers right |
    """
    rows, total = [], 0.0
    for script in RUNS:
        what, arguments = QUICK_RUNS[script]
        if not (quick := (results(script, Path(folder) / "quick") or {}).get(what)):
            continue
        run, full = quick[0], (results(script, folder) or {}).get(what)
        # Of the whole process where it is known: loading torch takes seconds too, and they are the reader's seconds.
        seconds = run.get("wall_seconds") or run.get("seconds") or 0.0
        total += seconds
        rows.append(f"| `{' '.join([f'{script}.py', run.get('arguments', arguments)]).strip()}` | {seconds:.0f} "
                    f"| {key_figure(script, run)} | {key_figure(script, full[0]) if full else ''} |")
    head = ["| run | seconds | reaches | the whole run reaches |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, f"| all of them | {total:.0f} | | |"]) if rows else ""


# Many readers come with a word and not with a file: "what is QK-norm?" is answered by the twenty lines that do it.
# concept -> where it is best read: the first or the plainest of its copies. Line numbers are looked up when the README
# is made, and a name that is no longer there stops that: an index that points elsewhere is worse than none.
CONCEPTS = {
    # A to C
    "AdamW, weight-decay groups": "decoder_only.py:make_optimizer",
    "adapters as PEFT's files": "lora_qlora.py:save_adapter", "attention": "decoder_only.py:attention",
    "attention maps": "encoder_decoder.py:alignment", "attention sinks, sliding window": "kv_cache.py:WindowCache",
    "bag of words (baseline)": "encoder_only.py:bag_of_words",
    "batches as a function of (seed, step)": "decoder_only.py:get_batch", "beam search": "decoder_only.py:beam_search",
    "BERT": "encoder_only.py:BERT", "BLEU": "encoder_decoder.py:bleu",
    "BPE encoding": "bpe_tokenizer.py:BPE.encode_piece", "BPE training": "bpe_tokenizer.py:train_bpe",
    "causal mask": "decoder_only.py:causal_mask", "cDPO": "dpo.py:cdpo_loss",
    "chat template": "llama3.py:Llama3Tokenizer.chat_ids", "checkpoint": "decoder_only.py:save_checkpoint",
    "cloze accuracy and its ceiling": "encoder_only.py:cloze_accuracy",
    "compiled decoding step": "kv_cache.py:compiled_step", "continuous batching": "kv_cache.py:serve",
    "cross-attention": "encoder_decoder.py:T5Attention",
    # D to F
    "DAPO": "ppo_grpo.py:aggregate", "data parallel training": "decoder_only.py:train",
    "DoRA": "lora_qlora.py:LoRALinear.row_norms", "double quantisation": "lora_qlora.py:quantise_nf4",
    "DPO": "dpo.py:dpo_loss", "Dr. GRPO": "ppo_grpo.py:group_advantages", "exact match": "decoder_only.py:exact_match",
    "expert dispatch": "qwen3_moe.py:experts_fast", "fill in blanks jointly": "encoder_only.py:fill_beam",
    "FlashAttention backward": "flash_attention.py:tiled_backward",
    "FlashAttention forward": "flash_attention.py:tiled_forward", "floor of a loss": "toy_dataset.py:all_tokens_floor",
    # G to L
    "GAE": "ppo_grpo.py:gae", "GELU": "decoder_only.py:FastGELU", "GQA": "llama3.py:GroupedQueryAttention",
    "gradient accumulation, clipping": "decoder_only.py:train", "GRPO": "ppo_grpo.py:grpo_loss",
    "importance ratio, clipped": "ppo_grpo.py:clipped_loss",
    "instruction tuning, prompt masked": "lora_qlora.py:answer_rows", "int8 KV cache": "kv_cache.py:Int8Cache",
    "int8 weights": "kv_cache.py:Int8Linear", "IPO": "dpo.py:ipo_loss",
    "iterative unmasking": "encoder_only.py:unmask", "KL estimate (k3)": "ppo_grpo.py:k3",
    "KV cache": "decoder_only.py:KVCache", "label smoothing": "encoder_decoder.py:compute_loss",
    "load balancing (loss)": "qwen3_moe.py:load_balancing_loss",
    "load balancing (measured)": "qwen3_moe.py:expert_load", "LoRA": "lora_qlora.py:LoRALinear",
    "LoRA, merging": "lora_qlora.py:merge_adapters",
    # M to P
    "masked language modelling": "encoder_only.py:mask_tokens", "mean pooling": "encoder_only.py:mean_pool",
    "memory estimate": "decoder_only.py:memory_gb", "mixture of experts, routing": "qwen3_moe.py:MixtureOfExperts",
    "NF4": "lora_qlora.py:NF4Linear", "online softmax": "flash_attention.py:running_softmax",
    "padding mask": "toy_dataset.py:padding_mask", "post-norm": "encoder_only.py:BertLayer",
    "PPO": "ppo_grpo.py:ppo_loss", "pre-norm": "decoder_only.py:Block", "preference pairs": "dpo.py:number_pairs",
    "prefill and decoding": "decoder_only.py:prefill", "published weights, renamed": "decoder_only.py:import_weights",
    "QK-norm": "qwen3_moe.py:Qwen3Attention",
    # R
    "reference model, stored": "dpo.py:reference_logps", "REINFORCE": "ppo_grpo.py:learn_from_reward",
    "relative position buckets": "encoder_decoder.py:relative_bucket",
    "resume, bit for bit": "decoder_only.py:load_checkpoint", "reward from a program": "ppo_grpo.py:exact_reward",
    "RMSNorm": "llama3.py:RMSNorm", "rollout": "ppo_grpo.py:rollout", "RoPE": "llama3.py:apply_rope",
    "RoPE, stretched": "llama3.py:rope_frequencies",
    # S to Z
    "sampling: temperature, top-k, top-p": "decoder_only.py:sample_next", "SimPO": "dpo.py:simpo_loss",
    "sinusoidal positions": "encoder_decoder.py:sinusoids", "span corruption": "encoder_decoder.py:corrupt_spans",
    "sum of log-probs of an answer": "dpo.py:sequence_logps", "SwiGLU": "llama3.py:SwiGLU",
    "T5": "encoder_decoder.py:T5", "teacher forcing, the shift": "toy_dataset.py:decoder_lines",
    "tiles of keys": "flash_attention.py:key_tiles", "train/validation split by hash": "toy_dataset.py:is_validation",
    "Triton kernel": "flash_attention.py:forward_kernel", "unigram tokenizer": "encoder_decoder.py:Unigram",
    "value function, clipped": "ppo_grpo.py:value_loss", "warm-up and cosine": "decoder_only.py:lr_at",
    "weight tying": "decoder_only.py:GPT", "WordPiece": "encoder_only.py:WordPiece",
    "writing files whole": "decoder_only.py:write_atomically",
}


def line_of(name, trees=None):
    """'decoder_only.py:KVCache.update' -> the line of that definition. An unknown name ends the program.

    Looked up in the syntax tree and not by searching for "def update": a method's name may occur in several classes.
    trees: {file: its tree}, filled here, so that ninety look-ups parse twelve files and not ninety.
    """
    trees = {} if trees is None else trees
    file, _, dotted = name.partition(":")
    if file not in trees:
        path = SCRIPTS_AT / file
        trees[file] = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([])
    node = trees[file]
    # From the outside inwards: the class first, then its method. Also inside `if`: Triton's kernels exist only where
    # Triton does.
    for part in dotted.split("."):
        node = next((one for one in ast.walk(node) if one is not node and getattr(one, "name", None) == part
                     and isinstance(one, (ast.FunctionDef, ast.ClassDef))), None)
        if node is None:
            sys.exit(f"error: CONCEPTS: there is no {name}")
    return node.lineno


def concepts(folder=RESULTS):
    """The concept index: a table with one link per line, sorted as a reader would look a word up.

    | RMSNorm | [`llama3.py`: `RMSNorm`](llama3.py#L249) |
    """
    rows, trees = ["| concept | where |", "|---|---|"], {}
    for concept, name in sorted(CONCEPTS.items(), key=lambda item: item[0].lower()):
        file, _, dotted = name.partition(":")
        rows.append(f"| {concept} | [`{file}`: `{dotted}`]({file}#L{line_of(name, trees)}) |")
    return "\n".join(rows)


# The settings that several scripts share, in the order of their Configs. Where a script has no such setting the cell is
# empty: BERT has no key/value heads to share, GPT-2 no feed-forward width of its own (it is 4 * n_embd).
SHARED_SETTINGS = """n_layer n_head n_kv_head n_embd head_size ffn_size block_size dropout init_std batch_size
    grad_accum max_steps lr min_lr_ratio warmup_steps weight_decay beta2 grad_clip eval_every temperature""".split()


def settings_of(script):
    """-> (an instance of the script's Config, its PRESETS). Imports the script: values, not their source text.

    Reading the text would be faster and would have to understand dict(GPT2, n_layer=12). Under a name of its own, so
    that whoever has imported the script already keeps his copy.
    """
    # What `import script` does, in its single steps, because the name under which it is known must be another one.
    spec = importlib.util.spec_from_file_location(f"settings_of_{script}", SCRIPTS_AT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look a class's module up by its name
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module.Config(), module.PRESETS


def hyperparameters(folder=RESULTS):
    """Two tables: the defaults of all scripts side by side, and what each preset changes in them.

    Side by side, since the interesting thing about a learning rate is that another script needs another one. A column
    per preset would make forty columns, most of them empty: presets are told by what they change.
    """
    found = {script: settings_of(script) for script in RUNS if script not in MADE_OF_ALL}
    models = [script for script in found if hasattr(found[script][0], "n_layer")]

    def show(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    # 0 in head_size and the like means "as the comment in Config says"; it is shown as it stands there.
    rows = ["| default of | " + " | ".join(f"`{script}`" for script in models) + " |", "|---" * (len(models) + 1) + "|"]
    for name in SHARED_SETTINGS:
        values = [show(getattr(found[script][0], name, "")) for script in models]
        rows.append(f"| `{name}` | " + " | ".join(values) + " |")
    # A preset that changes nothing is the defaults, and those are above.
    rows += ["", "| preset | changes |", "|---|---|"]
    for script, (_, presets) in found.items():
        for name, new in presets.items():
            if changes := ", ".join(f"{key} {show(value)}" for key, value in new.items()):
                rows.append(f"| `{script}.py --preset {name}` | {changes} |")
    return "\n".join(rows)


# A block of the README stands between <!-- begin NAME --> and <!-- end NAME -->, comments that Markdown does not show.
# All that lies between them is made, all around is written by hand; a marker that is not there switches its block off.
BLOCKS = {"TABLE": script_table, "OUTPUT": printed, "PEERS": peers, "QUICK": quick_table,
          "COMPARISON": comparison_tables, "CONCEPTS": concepts, "HYPERPARAMETERS": hyperparameters,
          "QUESTIONS": questions}


def refresh_readme(source, folder=RESULTS, names=tuple(BLOCKS)):
    """The README with everything between its markers as it follows from results and scripts.

    A block whose results are not there ("" from its function) stays as it is.
    """
    for name in names:
        if f"<!-- begin {name} -->" in source and (text := BLOCKS[name](folder)):
            # A function and not a string as the replacement: a backslash in a result is then just a backslash.
            source = re.sub(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)",
                            lambda found, text=text: f"{found[1]}{text}\n{found[2]}", source, flags=re.S)
    return source


def rewrite(path, new):
    """Write a text file if it changed.

    An equal file keeps its date, and an editor that has it open does not ask whether to load it again.
    """
    if path.read_text(encoding="utf-8") != new:
        write_atomically(path, lambda file: file.write(new.encode()))


def refresh(folder=RESULTS, names=tuple(BLOCKS), headers=True):
    """Headers and README as the results in `folder` say. Headers first: the README's table quotes them.

    names: which blocks of the README. What cannot be said yet, because a run is missing, stays as it is and is named.
    """
    # Two headers that do not follow from one file of runs: a sum over all of them, and the comparison's own.
    others = {"train_all": own_expectation, "compare_architectures": comparison_expectation}
    for script in [*RUNS, *others] if headers else []:
        # Nothing recorded at all is no news (a fresh folder); a file that lacks a run is.
        path, runs = SCRIPTS_AT / f"{script}.py", results(script, folder)
        if not path.is_file() or script in RUNS and not runs:
            continue
        source = path.read_text(encoding="utf-8")
        try:
            new = (refresh_header(source, script, runs, folder) if script in RUNS
                   else put_header(source, script, *others[script](folder)))
        except (KeyError, OSError, ValueError, TypeError) as missing:
            print(f"{script}.py: its header stays as it is; missing or not as it should be: {missing}")
            continue
        rewrite(path, new)
    readme = SCRIPTS_AT / "README.md"
    if readme.is_file():
        rewrite(readme, refresh_readme(readme.read_text(encoding="utf-8"), folder, names))


# --- 8. Main: one pass -----------------------------------------------------------------------------------------------
def main(cfg):
    """One pass over the runs of cfg. -> exit code: 0 all succeeded, 1 some failed, 130 interrupted.

    plan -> leave out what is finished -> run and record -> picture, headers, README. A call that is killed at any point
    and made again ends with the same files.
    """
    # Path(a, b) is b where b is absolute.
    kept = Path(SCRIPTS_AT, cfg.results)
    folder = kept / "quick" if cfg.which == "quick" else kept
    # What README and headers quote is results/ in the repository. Results that go elsewhere change no file there.
    quoted, quick = kept.resolve() == RESULTS.resolve(), cfg.which == "quick"
    if cfg.readme:
        if not quoted:
            sys.exit(f"error: --readme: headers and README.md quote {RESULTS.name}/ and nothing else, not {kept}")
        refresh(kept, ("QUICK",) if quick else tuple(BLOCKS), headers=not quick)
        return 0
    # What can fail at once does so before anything is started: names in --only, an --out that cannot be made.
    jobs = plan_jobs(cfg, folder)
    out_folder(cfg)
    journal = Path(cfg.out) / cfg.which / "journal.jsonl"
    left = left_to_do(jobs, journal, folder)
    # Said before the first run: whoever expected another number can still stop.
    again = sum(job.resume for job in left)
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} finished before, {again} to be continued; {cfg.jobs} at a time; "
          f"logs: {journal.parent}/")
    try:
        failed, interrupted = run_jobs(left, cfg.jobs, journal, folder)
    except KeyboardInterrupt:  # the second one
        failed, interrupted = {}, True
    if interrupted:
        print(f"interrupted: what is finished is in {folder}/; the same command goes on from here", file=sys.stderr)
        return 130  # what a shell expects of a program that Ctrl-C ended

    # What quotes the results. A quick pass touches its own block alone: its figures are of shortened runs.
    if curves_picture(folder):
        print(f"the curves of all runs are in {folder}/curves.png")
    # Failed runs do not hinder it: what the others reached is as true as before.
    if quoted:
        refresh(kept, ("QUICK",) if quick else tuple(BLOCKS), headers=not quick)
    # The journal stays: it says what need not be run again.
    if failed:
        print(f"\n{len(failed)} of {len(jobs)} runs failed; the same command runs them again:", file=sys.stderr)
        print("\n".join(f"  {name}: {problem}" for name, problem in failed.items()), file=sys.stderr)
        return 1
    forget(journal, jobs)  # everything of this pass is in results/: the next call is a new pass
    print(f"{len(jobs)} runs are in {folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_config(Config, PRESETS)))
