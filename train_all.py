# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
RUN EVERYTHING, KEEP WHAT CAME OUT               python train_all.py                25 min on two CPU cores

Idea     A number in a README is true on the day it is typed. Here none is typed: every script is run as a reader would
         run it, what it reached goes into results/<script>.json, and headers, README and docs quote those files.
Picture  RUNS -> jobs - what is finished -> run them, N at a time -> runs/train_all/<script>/<run>/<seed>/summary.json
                                                                          |                     |
                                                                     curves.png     --publish: results/, headers, docs
Not here other libraries (benchmarks/peers.py), equal sizes for all architectures (compare_architectures.py)
Expect   a line per finished run, and curves.png. --preset quick: 14 runs
Asked    Why three seeds?   Why a hash of the code, and not the date of the file?   One run with two threads, or two
         runs with one each?                                                        (grep "# Q:")

    python train_all.py --preset quick                 the scripts once, shortened: does everything work here?
    python train_all.py                                what needs no network, one seed; killed, it goes on where it was
    python train_all.py --preset real                  what needs real texts: Shakespeare, Multi30k, SST-2
    python train_all.py --only dpo,llama3:pydocs       some of them: a script, or one run of a script
    python train_all.py --only dpo --seeds 0 --publish all seeds, and then into results/, headers, README and docs
    python train_all.py --tensorboard runs/board       the same curves for TensorBoard (pip install tensorboard)
"""
import argparse
import ast
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm


# --- 1. Config: what to run ------------------------------------------------------------------------------------------
# What is left behind, all of it below --out:
#     runs/train_all/llama3/pydocs/1337/   summary.json, ckpt.pt, curve.png    what the script itself writes
#                                          log.txt                             what it printed, without progress bars
#                                          done.json                           arguments, hash of the code, seconds
#     runs/train_all/curves.png            a panel for every run with a history
@dataclasses.dataclass
class Config:
    only: str = ""                # some of the runs, with commas: script or script:run, as in dpo,llama3:pydocs
    which: str = "offline"        # offline | real: Shakespeare, Multi30k, SST-2 | all | quick: each script, shortened
    seeds: int = 1                # the first so many seeds of each run; 0 = all
    jobs: int = 1                 # runs at once; each gets its share of the cores
    publish: bool = False         # copy what is complete into results/ and refresh headers, README.md and docs/
    tensorboard: str = ""         # folder to write the histories to as TensorBoard events
    out: str = "runs/train_all"   # folder for everything else


PRESETS = {"default": {}, "quick": dict(which="quick"), "real": dict(which="real"), "all": dict(which="all")}
ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"

# Q: Why three seeds?
# A: A seed draws the initial weights and the order of the batches. The same run with another seed ends elsewhere. With
#    one seed you cannot know whether a difference is your idea or your luck; three show how large luck is, and where
#    it is large there are five.
#
# Q: How large must a difference be before you believe it?
# A: Larger than what another seed does. The published results keep every seed, so least and largest can be quoted; a
#    standard error of three numbers is itself a guess. Where claims depend on it (compare_architectures.py), five seeds
#    are compared pair by pair.
#
# script -> {run: (arguments, seeds)}. The first run of a script, and its first seed, give the pictures. Seeds are
# listed and not drawn, so that anybody can run the same ones. None: the script has no --seed.
FIRST = (1337,)
SEEDS = (1337, 1338, 1339)
RUNS = {
    # The same model on two texts. pydocs is what a reader gets who is offline.
    "decoder_only": {"shakespeare": ("--data shakespeare", SEEDS), "pydocs": ("--data pydocs", FIRST)},
    "encoder_only": {"default": ("", SEEDS)},
    # multi30k is by far the longest run. One seed; its test set of 1,000 sentences is a spread of its own.
    "encoder_decoder": {"default": ("", SEEDS), "multi30k": ("--preset multi30k", FIRST)},
    # As decoder_only.py, number for number: only the architecture differs.
    "llama3": {"shakespeare": ("--data shakespeare", SEEDS), "pydocs": ("--data pydocs", FIRST)},
    # dense: the same work per token without experts. bias, none: another way to balance the experts, and no way.
    "qwen3_moe": {"shakespeare": ("--data shakespeare", SEEDS),
                  "bias": ("--data shakespeare --balance bias", FIRST),
                  "none": ("--data shakespeare --balance none", FIRST),
                  "dense": ("--data shakespeare --n-experts 0 --ffn-size 384", SEEDS),
                  "pydocs": ("--data pydocs", FIRST)},
    # Speed does not depend on what the weights are: the large shape is measured with random ones.
    "kv_cache": {"125m": ("--preset 125m", FIRST), "shakespeare": ("--data shakespeare", FIRST),
                 "pydocs": ("--data pydocs --contexts=", FIRST)},
    "flash_attention": {"shakespeare": ("--data shakespeare", FIRST), "pydocs": ("--data pydocs", FIRST)},
    # Every method stands in every run, from one base. dpo and ppo_grpo vary more between seeds: five.
    "lora_qlora": {"numbers": ("", (1337, 1, 2))},
    "dpo": {"numbers": ("", (1337, 1, 2, 3, 4)), "nll0": ("--nll 0", FIRST), "ipo": ("--loss ipo", FIRST),
            "simpo": ("--loss simpo", FIRST)},
    "ppo_grpo": {"default": ("", (1337, 1, 2, 3, 4))},
    # Nothing is trained, or nothing is random.
    "toy_dataset": {"default": ("", FIRST)},
    "bpe_tokenizer": {"default": ("--data shakespeare", (None,)), "pydocs": ("--data pydocs", (None,))},
    # Made of the other scripts, and so the last.
    "quick_start": {"default": ("", FIRST)},
    "visualizations": {"default": ("", FIRST)},
    "compare_architectures": {"default": ("", (None,)), "quick": ("--quick", (None,))},
}
NEEDS_DATA = {"shakespeare", "multi30k", "compare_architectures"}  # words in a command: fetched, or from $LLM_DATA
# The three passes: offline needs nothing but Python, so it works on a plane; real needs Tiny Shakespeare, Multi30k and
# SST-2, which the scripts fetch themselves (SST-2: by hand); quick asks whether everything works on this machine.
# The quick pass: as much learned as half a minute allows, offline. A short run is no beginning of the long one, whose
# learning rate would not have fallen yet. compare_architectures.py has a --quick of its own, and takes minutes.
QUICK = {
    "toy_dataset": "", "bpe_tokenizer": "--data pydocs", "quick_start": "--effort 0.1",
    "decoder_only": "--data pydocs --max-steps 400 --eval-every 200", "llama3": "--data pydocs --max-steps 300",
    "qwen3_moe": "--data pydocs --max-steps 300", "encoder_only": "--max-steps 400 --warmup-steps 50 --eval-every 200",
    "encoder_decoder": "--max-steps 400", "kv_cache": "--data pydocs --max-steps 200 --contexts=",
    "flash_attention": "--data pydocs --max-steps 60 --lengths 1024,2048",
    "lora_qlora": "--base-steps 300 --max-steps 60", "dpo": "--sft-steps 600 --max-steps 100",
    "ppo_grpo": "--max-steps 64 --sft-steps 400", "visualizations": "--only rope,softmax,scale",
}


# --- 5. Training: jobs, and one loop that runs them ------------------------------------------------------------------
# What goes wrong in an hour of runs, and what happens then:
#     a script fails         it is named with the last line that it wrote, the others go on, exit code 1 at the end
#     Ctrl-C                 running scripts are ended; what is finished stays
#     kill -9, power cut     the same: a run counts when done.json is there, and that is written last, by renaming
#     the code changes       runs that the old code made are not finished any more; comments and docstrings are no code
#                            (compare_architectures.py keeps its trainings: see scripts_hash there)
# The same command goes on from there each time. A run that was under way begins again: the longest takes a quarter of
# an hour, and what has no second half cannot differ from an undisturbed run.
# Not handled: two calls at once with the same --out write into the same folders.
@dataclasses.dataclass
class Job:
    """One call of one script: what is run, and where it writes."""

    script: str       # "llama3"
    run: str          # "pydocs": its name in RUNS
    seed: int | None  # 1337, or None where nothing is random
    arguments: list   # ["--data", "pydocs", "--seed", "1337"]
    code: str         # hash of the program
    folder: Path      # <out>/llama3/pydocs/1337

    @property
    def name(self):
        return f"{self.script}:{self.run}" + (f" seed {self.seed}" if self.seed else "")

    def finished(self):
        """Has exactly this been run to its end? done.json is written last, and only after exit code 0."""
        # Trap: asking for summary.json alone. It may be of other arguments, of older code, or of a shortened run.
        done = self.folder / "done.json"
        return done.is_file() and json.loads(done.read_text()) | {"seconds": 0} == dict(
            code=self.code, arguments=self.arguments, seconds=0)


# Q: Why a hash of the code, and not the date of the file?
# A: A date changes with every checkout and with every comment. What decides whether an old result still holds is the
#    program: its syntax tree without comments and docstrings, and the trees of the scripts that it imports.
def code_hash(script):
    """SHA-256 of a script's syntax tree, without docstrings, and of the scripts that it imports."""
    # Orchestrators are made of the scripts that they import: when one of those changes, what they showed is of old
    # code too. The others import none, so their own file is all there is.
    tree, siblings = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            siblings += [name.name for name in node.names if (ROOT / f"{name.name}.py").is_file()]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return hashlib.sha256("".join([ast.dump(tree), *map(code_hash, siblings)]).encode()).hexdigest()


def plan(cfg):
    """-> the jobs that cfg asks for, in the order of RUNS. Raises ValueError for a name in --only that is none.

    RUNS["llama3"] = {"pydocs": ("--data pydocs", (1337,))} gives one job, `llama3.py --data pydocs --seed 1337`.
    """
    # A short run has a name of its own: it is no substitute for the whole one.
    runs = {script: {"quick": (arguments, next(iter(RUNS[script].values()))[1][:1])}
            for script, arguments in QUICK.items()} if cfg.which == "quick" else RUNS
    names = {name for script in runs for name in (script, *(f"{script}:{run}" for run in runs[script]))}
    if unknown := (wanted := set(filter(None, cfg.only.split(",")))) - names:
        raise ValueError(f"--only: there is no {sorted(unknown)[0]!r}; there are {', '.join(sorted(names))}")
    # A script's name asks for its runs of this pass, a run's full name for that run in any pass.
    jobs = []
    for script in runs:
        for run, (arguments, seeds) in runs[script].items():
            kind = "real" if NEEDS_DATA & {script, *arguments.split()} else "offline"
            in_pass = cfg.which in (kind, "all", "quick") and (not wanted or script in wanted)
            for seed in seeds[:cfg.seeds or None] if in_pass or f"{script}:{run}" in wanted else ():
                folder = Path(cfg.out, script, run, str(seed or "")).resolve()
                flags = arguments.split() + ([] if seed is None else ["--seed", str(seed)])
                jobs.append(Job(script, run, seed, flags, code_hash(script), folder))
    return jobs


# As a reader would: a process of its own, the same command line. Calling main() in this process would start sooner,
# and one script's memory, threads and random numbers would be the next one's beginning.
#
# Q: One run with two threads, or two runs with one each?
# A: Two runs, if you have two to do: small models leave the second core idle half of the time, and two processes do
#    not wait for each other. One at a time where seconds are to be quoted, which is the default here.
def run(job, threads, show):
    """Run one script to its end; its output goes to log.txt. Returns nothing; raises RuntimeError if it fails.

    show(text): called with the line that the script printed last, the one that says how far it is.
    """
    # Half a run is run again from the start: minutes, and always right. compare_architectures.py, which takes an hour,
    # knows by itself what is finished.
    if job.script != "compare_architectures":
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    start, last = time.perf_counter(), ""
    # A session of its own: Ctrl-C in the terminal reaches this program alone, which then ends its children. Its output
    # is a pipe: if this program is killed, the children fail with their next line and none is left behind.
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / f"{job.script}.py"), *job.arguments, "--out", str(job.folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}, start_new_session=True)
    RUNNING.append(process)
    with open(job.folder / "log.txt", "w", encoding="utf-8") as log:
        for line in process.stdout:  # a progress bar's carriage return ends a line too
            last = line.strip() or last
            show(f"{job.name}: {last}")
            if not re.search(r"%\||^\d+/\d+ \[", line):
                log.write(line)
    RUNNING.remove(process)
    if process.wait() or not (job.folder / "summary.json").is_file():
        raise RuntimeError(f"exit code {process.returncode}: {last[:300]} ({job.folder / 'log.txt'})")
    done = dict(code=job.code, arguments=job.arguments, seconds=round(time.perf_counter() - start, 1))
    (job.folder / "done.tmp").write_text(json.dumps(done))
    os.replace(job.folder / "done.tmp", job.folder / "done.json")


RUNNING = []  # the processes to end when this one is interrupted


def run_all(jobs, cfg):
    """Run jobs, cfg.jobs at a time. -> {name: what went wrong}. On Ctrl-C: children are ended, exit code 130."""
    # Every thread of PyTorch's that waits for a core spins meanwhile: four threads on two cores are slower than two.
    failed, threads = {}, max(1, (os.cpu_count() or 1) // cfg.jobs)
    bar = tqdm(total=len(jobs), unit=" runs", bar_format="{n}/{total} [{elapsed}] {postfix}", disable=not jobs)

    def one(job):
        try:
            run(job, threads, lambda text: bar.set_postfix_str(text[:100]))
            tqdm.write(f"  {job.name}: {json.loads((job.folder / 'done.json').read_text())['seconds']:.0f} s")
        except (RuntimeError, OSError) as problem:  # the others go on; the end of the pass names it again
            failed[job.name] = str(problem)
            tqdm.write(f"  {job.name} failed: {problem}")
        bar.update()
    # Threads are enough to wait for processes: each spends its time reading a pipe.
    pool = ThreadPoolExecutor(cfg.jobs)
    try:
        list(pool.map(one, jobs))
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            process.kill()
        bar.close()
        print("interrupted: what is finished stays; the same command goes on from here", file=sys.stderr)
        os._exit(130)  # 128 + 2, the number of SIGINT: what a shell expects of a program that Ctrl-C ended
    bar.close()
    return failed


# --- 6. Decoding: what the runs say ----------------------------------------------------------------------------------
def curves(summary):
    """A run's history -> {name: [(x, y), ...]} of its losses, or of what it is about."""
    # Scripts write what they have: a loss for each evaluation, or what several methods reached one after the other.
    # Three forms: rows with loss and val_loss; {method: rows}, of which the first quantity that is there counts; pairs.
    history = summary.get("history") or {}
    methods = history.items() if isinstance(history, dict) else [("training", history), ("validation", history)]
    found = {}
    for name, rows in methods:
        keys = dict(training=["loss"], validation=["val_loss"]).get(name, ["preferred", "sampled", "val_loss"])
        for row in rows:
            if isinstance(row, dict):
                key = next((key for key in keys if key in row), None)
                row = row.get("step", row.get("answers")), row.get(key)
            if row[1] is not None:
                found.setdefault(name, []).append(row)
    return found


def draw_curves(summaries, path):
    """{title: summary} -> one picture, a panel for each that has a history.

    Drawn from the summaries alone, so it can be drawn again when the models are long gone.
    """
    from matplotlib.figure import Figure
    shown = {title: lines for title, summary in summaries.items() if (lines := curves(summary))}
    if not shown:
        return
    # Panels and no common axes: nats per character, per token and shares of right answers are different units.
    rows = (len(shown) + 2) // 3
    figure = Figure(figsize=(13, 3.2 * rows), layout="constrained")
    for i, (title, lines) in enumerate(shown.items(), 1):
        ax = figure.add_subplot(rows, 3, i)
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), "." if name == "validation" else "-", ms=7, label=name)
        # From 0: a curve whose axis begins at its own minimum always looks as if it had reached the ground. Dots are
        # validation: where they leave the line, the model learns its training data by heart.
        share = all(0 <= y <= 1 for points in lines.values() for _, y in points) and "training" not in lines
        ax.set(title=title, xlabel="answers judged" if "ppo" in title else "step", ylim=(0, None),
               ylabel="share right" if share else "loss, nats")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=90)


def write_tensorboard(summaries, folder):
    """The same curves as TensorBoard events: tensorboard --logdir FOLDER. Raises ValueError if it is not installed."""
    # One folder per run: TensorBoard shows folders as lines of one chart, so equal names are compared at a glance.
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as problem:
        raise ValueError(f"--tensorboard: pip install tensorboard ({problem})") from problem
    for title, summary in summaries.items():
        with SummaryWriter(str(Path(folder, title.replace(":", "-").replace(" ", "-")))) as writer:
            for name, points in curves(summary).items():
                for x, y in points:
                    writer.add_scalar(name, y, x)


# --- 8. Main: one pass -----------------------------------------------------------------------------------------------
# How a number gets into a header: docs/sentences.toml has the sentence with a hole in it,
#     llama3 = "validation loss {llama3:shakespeare:val_loss:.2f} nats per character ..."
# and --publish copies finished runs into results/llama3.json and fills the hole with the mean over that run's seeds.
# The same command refreshes the tables of README.md and docs/, and the line numbers of their links into the scripts.
# It is done by benchmarks/publish.py, a file for whoever keeps this repository; no reader of a script needs it.
#
# Publishing is a flag of its own because a pass on a reader's machine is his result and not ours. If it rewrote
# results/ and README.md, a first try would look like a change of the project.
def main(cfg):
    """Run what is not finished, draw the curves, publish if asked to. -> {name: what went wrong}; empty if all is well.

    Everything goes below cfg.out. Only --publish touches results/, the headers of scripts, README.md and docs/.
    """
    # What can be known to fail fails before the first run: settings, names in --only, folders. Publishing shortened
    # runs would put their figures beside the claims of whole ones.
    if cfg.jobs < 1 or cfg.seeds < 0 or cfg.publish and cfg.which == "quick":
        raise ValueError("--jobs starts at 1, --seeds at 0 (all), and a quick pass is not for publishing")
    if cfg.which not in ("offline", "real", "all", "quick"):
        raise ValueError(f"--which {cfg.which}: offline, real, all or quick")
    if not (jobs := plan(cfg)):
        raise ValueError(f"--only {cfg.only}: no run of this pass; try --preset all")
    # Trap: noticing only after a training that results/ cannot be written. The run then "failed".
    for folder in [Path(cfg.out)] + [RESULTS] * cfg.publish:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probe.tmp").touch()
        (folder / "probe.tmp").unlink()
    left = [job for job in jobs if not job.finished()]
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished before; logs and results below {cfg.out}")
    failed = run_all(left, cfg)
    # The first seed of each run is shown; all of them count in what is published.
    summaries = {}
    for job in jobs:
        if job.finished() and f"{job.script}:{job.run}" not in summaries:  # the first seed of each
            summaries[f"{job.script}:{job.run}"] = json.loads((job.folder / "summary.json").read_text(encoding="utf-8"))
    draw_curves(summaries, Path(cfg.out, "curves.png"))
    if cfg.tensorboard:
        write_tensorboard(summaries, cfg.tensorboard)
    if cfg.publish:
        if subprocess.run([sys.executable, str(ROOT / "benchmarks" / "publish.py"), cfg.out]).returncode:
            failed["--publish"] = "see the lines above"
    # What the pass as a whole took, also if it was interrupted in between: the sum over its runs.
    seconds = sum(json.loads((job.folder / "done.json").read_text())["seconds"] for job in jobs if job.finished())
    if not cfg.only and not failed:
        Path(cfg.out, f"{cfg.which}.json").write_text(json.dumps(dict(runs=len(jobs), seconds=seconds)))
    print(f"{sum(job.finished() for job in jobs)} of {len(jobs)} runs are finished, {seconds:.0f} s of work: {cfg.out}")
    for name, problem in failed.items():
        print(f"failed: {name}: {problem}", file=sys.stderr)
    return failed


def parse_config(argv=None):
    """Command line -> Config. Explicit flags win over --preset NAME, which wins over the defaults."""
    # Help texts are read from the source: a comment and a help string that say the same would drift apart.
    notes = dict(re.findall(r"^ {4}(\w+): \w+ = .*  # (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default=next(iter(PRESETS)), help="a set of defaults")
    for field in dataclasses.fields(Config):
        # Trap: type=bool makes "--resume False" true, because bool("False") is True. Booleans get --x and --no-x.
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=f"{notes[field.name]} [{field.default}]".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    return Config(**{**PRESETS[given.pop("preset")], **given})


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter prints "?" instead of a traceback
    try:
        sys.exit(1 if main(parse_config()) else 0)
    except (OSError, ValueError) as problem:  # wrong flags, files, network: one line, and nothing was overwritten
        sys.exit("error: " + " ".join(str(problem).split()))
