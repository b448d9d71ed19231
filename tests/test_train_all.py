"""train_all.py on made-up scripts that take a fraction of a second: order, failures, kills, Ctrl-C, what is kept.

The made-up scripts behave like the real ones as far as train_all.py can see: flags --out, --seed, --resume, a
checkpoint per step, metrics.jsonl, summary.json, exit code 130 after Ctrl-C. Each notes starts and ends in events.txt.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load_script

FAKE = '''"""A made-up script.

Expect   nothing yet
"""
import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("out", "seed", "steps", "fail", "value"):
    parser.add_argument("--" + name, default="")
parser.add_argument("--resume", action="store_true")   # resume: bool, says train_all.py
args = parser.parse_args()
out, steps = Path(args.out), int(args.steps or 2)
out.mkdir(parents=True, exist_ok=True)
checkpoint, first, stop = out / "ckpt.pt", 0, []


def note(what):
    with open(Path(__file__).parent / "events.txt", "a") as file:
        file.write(f"{what} {out.name} {time.time():.3f} {os.environ['OMP_NUM_THREADS']} {first}\\n")


signal.signal(signal.SIGINT, lambda *_: stop.append(1))
if args.resume:
    if args.fail == "resume":
        sys.exit("error: the checkpoint is damaged")
    first = int(checkpoint.read_text())
note("resumed" if args.resume else "began")
print(f"data: somewhere (/a/private/place), everything goes to {out}/")
for step in range(first, steps):
    time.sleep(0.1)
    checkpoint.write_text(str(step + 1))
    if stop:
        note("interrupted")
        sys.exit(130)
    if args.fail in ("yes", "hard") or args.fail and Path(args.fail).is_file():
        sys.stderr.write("Traceback\\nerror: nothing works today\\n\\n")
        sys.exit(1)
rows = [{"step": i, "loss": 4 - i / 100, **({"val_loss": 4.5 - i / 100} if i % 2 else {})} for i in range(1, 202)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(out / "curve.png").write_bytes(b"picture of " + args.value.encode())
summary = {"config": {"out": str(out), "seed": int(args.seed), "vocab_size": 20, "resume": args.resume},
           "val_loss": 2.5, "floor": 0.5, "seconds": 1.0, "figures": ["curve.png"], "torch": "2.x",
           "results": {"value": args.value}}
(out / "summary.json").write_text(json.dumps(summary))
note("ended")
'''
RUNS = {"alpha": {"one": ("default", "--value a", (7, 8, 9)), "two": ("real", "--value r", (7,))},
        "beta": {"one": ("default", "--value b", (7,))},
        "gamma": {"one": ("default", "--value c", (7,))}}
SLOW = {name: {"one": ("default", "--steps 12 --value x", (7,))} for name in ("alpha", "beta", "gamma")}
# What a child process of the tests runs: train_all.py with the made-up scripts in the place of the real ones.
DRIVER = """
import json, sys, importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("train_all", sys.argv.pop(1))
m = importlib.util.module_from_spec(spec)
sys.modules["train_all"] = m
spec.loader.exec_module(m)
root = Path(sys.argv.pop(1))
runs = json.loads(sys.argv.pop(1))
m.SCRIPTS_AT, m.RESULTS, m.ALONE_RUNS = root, root / "results", ("gamma",)
m.RUNS = {script: {what: (p, a, tuple(seeds)) for what, (p, a, seeds) in one.items()}
          for script, one in runs.items()}
m.QUICK_RUNS = {script: ("one", "--value q") for script in m.RUNS}
sys.exit(m.main(m.parse_config(m.Config, m.PRESETS)))
"""


@pytest.fixture
def scratch(tmp_path, m, monkeypatch):
    """A folder with three made-up scripts, and train_all.py pointed at it."""
    for name in RUNS:
        (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.setattr(m, "SCRIPTS_AT", tmp_path)
    monkeypatch.setattr(m, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(m, "RUNS", RUNS)
    monkeypatch.setattr(m, "QUICK_RUNS", {name: ("one", "--value q") for name in RUNS})
    monkeypatch.setattr(m, "ALONE_RUNS", ("gamma",))
    monkeypatch.setattr(m, "LOOK_EVERY", 0.02)
    return tmp_path


def configured(m, scratch, **more):
    return m.Config(out=str(scratch / "out"), results=str(scratch / "results"), **more)


def events(scratch, kind=""):
    """-> [(what happened, to which job, when, with how many threads, from which step)]."""
    path = scratch / "events.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if line[0].startswith(kind)]


def recorded(scratch, script):
    return json.loads((scratch / "results" / f"{script}.json").read_text())


def begin(m, scratch, runs, *flags, **options):
    command = [sys.executable, "-c", DRIVER, m.__file__, str(scratch), json.dumps(runs), "--out", str(scratch / "out")]
    return subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, seconds=20):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


# ---------------------------------------------------------------------------------------- a pass


def test_a_pass_records_everything(m, scratch, capsys):
    assert m.main(configured(m, scratch, seeds=0)) == 0
    kept = recorded(scratch, "alpha")
    assert [run["config"]["seed"] for run in kept["runs"]["one"]] == [7, 8, 9] and "two" not in kept["runs"]
    assert {"cpu", "cores", "threads", "python", "system", "torch"} <= set(kept["environment"])
    assert kept["environment"]["torch"] == "2.x" and kept["environment"]["threads"] == m.cores()
    # The first seed's output and pictures are kept, without where things lay on this machine.
    first = kept["runs"]["one"][0]
    assert first["printed"] == "data: somewhere, everything goes to runs/alpha/\n"
    assert "printed" not in kept["runs"]["one"][1] and "out" not in first["config"]
    assert (scratch / "results" / "alpha_curve.png").read_bytes() == b"picture of a"
    assert (scratch / "results" / "curves.png").stat().st_size > 1000
    assert first["arguments"] == "--value a" and first["wall_seconds"] > 0.1
    # Nothing is left of the journal: the next call is a new pass.
    assert not (scratch / "out" / "default" / "journal.jsonl").exists()
    lines = capsys.readouterr().out
    assert re.search(r"^alpha-one-8: \d+ s, val loss 2.5000$", lines, re.M)
    assert m.main(configured(m, scratch, only="beta,alpha:one")) == 0
    assert len(events(scratch, "began")) == 5 + 2
    # Another preset's run joins the file; its pictures have its name.
    assert m.main(configured(m, scratch, which="real")) == 0
    assert list(recorded(scratch, "alpha")["runs"]) == ["one", "two"]
    assert (scratch / "results" / "alpha_two_curve.png").read_bytes() == b"picture of r"


def test_jobs_share_the_cores_and_what_is_timed_runs_alone(m, scratch, monkeypatch):
    monkeypatch.setattr(m, "cores", lambda: 4)
    runs = {name: {"one": ("default", "--steps 6", (7,))} for name in ("gamma", "alpha", "beta")}
    monkeypatch.setattr(m, "RUNS", runs)
    assert m.main(configured(m, scratch, jobs=2)) == 0
    span = {job: [float(when) for _, name, when, *_ in events(scratch) if name == job]
            for job in ("alpha-one-7", "beta-one-7", "gamma-one-7")}
    threads = {name: count for _, name, _, count, _ in events(scratch)}

    def together(one, two):
        return max(one[0], two[0]) < min(one[1], two[1])
    assert not any(together(span["gamma-one-7"], span[name]) for name in ("alpha-one-7", "beta-one-7"))
    assert together(span["alpha-one-7"], span["beta-one-7"])
    assert threads == {"alpha-one-7": "2", "beta-one-7": "2", "gamma-one-7": "4"}
    assert recorded(scratch, "alpha")["environment"]["threads"] == 2
    assert recorded(scratch, "gamma")["environment"]["threads"] == 4


def test_next_job(m):
    def job(name, alone=False):
        return m.Job(name, "x", "default", "", 1, (1,), 1, Path("x"), 1.0, alone=alone)
    a, b, quiet = job("a"), job("b"), job("quiet", True)
    assert m.next_job([quiet, a], [], 2) is quiet and m.next_job([quiet, a], [b], 2) is a
    assert m.next_job([quiet], [b], 2) is None and m.next_job([a], [quiet], 2) is None
    assert m.next_job([a], [b], 1) is None and m.next_job([], [], 2) is None


def test_a_failure_is_survived_and_overwrites_nothing(m, scratch, monkeypatch, capsys):
    assert m.main(configured(m, scratch)) == 0
    before = (scratch / "results" / "beta.json").read_text()
    broken = scratch / "broken"
    broken.touch()
    changed = RUNS | {"beta": {"one": ("default", f"--value new --fail {broken}", (7,))}}
    monkeypatch.setattr(m, "RUNS", changed)
    (scratch / "events.txt").unlink()
    capsys.readouterr()
    assert m.main(configured(m, scratch)) == 1
    told = capsys.readouterr()
    assert "beta-one-7: error: nothing works today" in told.err and "1 of 3 runs failed" in told.err
    assert (scratch / "results" / "beta.json").read_text() == before
    assert (scratch / "results" / "beta_curve.png").read_bytes() == b"picture of b"
    assert [name for _, name, *_ in events(scratch, "ended")] == ["alpha-one-7", "gamma-one-7"]
    # The next call runs what failed, from the start, and nothing else.
    broken.unlink()
    assert m.main(configured(m, scratch)) == 0
    assert [line[:2] for line in events(scratch)[5:]] == [["began", "beta-one-7"], ["ended", "beta-one-7"]]
    assert recorded(scratch, "beta")["runs"]["one"][0]["results"] == {"value": "new"}


def test_a_summary_that_makes_no_sense_is_a_failure(m, scratch, capsys):
    (scratch / "beta.py").write_text(FAKE.replace('(out / "summary.json").write_text(json.dumps(summary))',
                                                  '(out / "summary.json").write_text("{")'))
    (scratch / "gamma.py").write_text(FAKE.replace('(out / "summary.json").write_text(json.dumps(summary))', ""))
    assert m.main(configured(m, scratch)) == 1
    told = capsys.readouterr().err
    assert "beta-one-7: JSONDecodeError" in told and "gamma-one-7: FileNotFoundError" in told
    assert not (scratch / "results" / "beta.json").exists() and recorded(scratch, "alpha")


# ---------------------------------------------------------------------------------------- interrupted


def test_killed_and_started_again(m, scratch):
    process = begin(m, scratch, SLOW)
    # alpha is through, beta has saved a few steps.
    wait_for(lambda: len(events(scratch, "began")) == 2)
    checkpoint = scratch / "out" / "default" / "beta-one-7" / "ckpt.pt"
    wait_for(lambda: checkpoint.is_file() and checkpoint.read_text() > "2")
    process.kill()
    process.communicate()
    assert [name for _, name, *_ in events(scratch, "ended")] == ["alpha-one-7"]
    if sys.platform == "linux":  # the child went with its parent: nothing more is written
        time.sleep(0.3)
        saved = checkpoint.read_text()
        time.sleep(0.5)
        assert checkpoint.read_text() == saved
    # A power cut may leave half a line.
    with open(scratch / "out" / "default" / "journal.jsonl", "a") as file:
        file.write('{"finished": "gamma-one-7", "ident')
    again = begin(m, scratch, SLOW)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "3 runs, 1 finished before, 1 to be continued" in out
    # alpha began once, beta went on from its checkpoint, gamma began: nothing that was finished is repeated.
    assert [line[:2] for line in events(scratch, "began")] == [["began", f"{name}-one-7"] for name in SLOW]
    (resumed,) = events(scratch, "resumed")
    assert resumed[1] == "beta-one-7" and int(resumed[4]) >= 3
    # A resumed run does not know how long it took, and is recorded as the same run as any other.
    run = recorded(scratch, "beta")["runs"]["one"][0]
    assert run["wall_seconds"] is None and run["config"]["resume"] is False


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups exist on POSIX")
def test_ctrl_c_saves_and_goes_on(m, scratch):
    process = begin(m, scratch, SLOW, "--jobs", "2", start_new_session=True)
    wait_for(lambda: len(events(scratch, "began")) == 2)
    time.sleep(0.4)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err and "the same command goes on" in err
    assert "FAILED" not in out and len(events(scratch, "interrupted")) == 2
    again = begin(m, scratch, SLOW, "--jobs", "2")
    out, err = again.communicate()
    assert again.returncode == 0 and "2 to be continued" in out
    assert len(events(scratch, "resumed")) == 2 and len(events(scratch, "ended")) == 3


def test_changed_code_is_run_again_and_changed_comments_are_not(m, scratch, monkeypatch):
    # beta fails in each call, so that the pass goes on and alpha stays finished.
    monkeypatch.setattr(m, "RUNS", RUNS | {"beta": {"one": ("default", "--fail yes", (7,))}})

    def began():
        assert m.main(configured(m, scratch)) == 1
        starts = [name for _, name, *_ in events(scratch, "began")]
        (scratch / "events.txt").unlink()
        return starts
    assert began() == ["alpha-one-7", "beta-one-7", "gamma-one-7"]
    script = scratch / "alpha.py"
    script.write_text(FAKE.replace("nothing yet", "val loss 2.5").replace("import time\n", "import time   # why\n\n"))
    assert began() == ["beta-one-7"]
    script.write_text(FAKE.replace("time.sleep(0.1)", "time.sleep(0.05)"))
    assert began() == ["alpha-one-7", "beta-one-7"]
    # Another number of threads is another environment, and other arguments are another run.
    monkeypatch.setattr(m, "cores", lambda: 7)
    assert began() == ["alpha-one-7", "beta-one-7", "gamma-one-7"]
    monkeypatch.setitem(m.RUNS["gamma"], "one", ("default", "--value other", (7,)))
    assert began() == ["beta-one-7", "gamma-one-7"]
    # A folder that somebody deleted is run again, deleted results are recorded again from the folder.
    shutil.rmtree(scratch / "out" / "default" / "gamma-one-7")
    (scratch / "results" / "alpha.json").unlink()
    assert began() == ["beta-one-7", "gamma-one-7"]
    assert recorded(scratch, "alpha")["runs"]["one"][0]["config"]["seed"] == 7


def test_a_refused_resumption_begins_again(m, scratch, monkeypatch, capsys):
    monkeypatch.setattr(m, "RUNS", {"alpha": {"one": ("default", "--fail resume", (7,))}})
    (job,) = m.plan_jobs(configured(m, scratch), scratch / "results")
    journal = scratch / "out" / "default" / "journal.jsonl"
    m.note(journal, "started", job)
    assert not m.left_to_do([job], journal, scratch / "results")[0].resume  # there is nothing to go on with
    (job.folder / "stage").mkdir(parents=True)
    (job.folder / "stage" / "ckpt.pt").write_text("1")
    assert m.left_to_do([job], journal, scratch / "results")[0].resume      # stages keep theirs one level down
    assert m.main(configured(m, scratch)) == 0
    assert "cannot be continued (error: the checkpoint is damaged); again from the start" in capsys.readouterr().out
    assert [what for what, *_ in events(scratch)] == ["began", "ended"]
    # What is begun anew finds no old checkpoint.
    assert not (job.folder / "stage").exists()


def test_journal(m, scratch):
    one, two, three = m.plan_jobs(configured(m, scratch), scratch / "results")
    path = scratch / "journal.jsonl"
    for kind, job in (("started", one), ("finished", one), ("started", two), ("failed", two)):
        m.note(path, kind, job)
    whole = path.read_text()
    path.write_text(whole + '{"started": "gam')
    state = m.read_journal(path)
    assert state == {one.name: ("finished", one.identity), two.name: ("failed", two.identity)}
    m.note(path, "started", three)  # behind half a line
    assert m.read_journal(path) == state | {three.name: ("started", three.identity)}
    # Jobs of another call stay in it.
    m.forget(path, [one, three])
    assert m.read_journal(path) == {two.name: ("failed", two.identity)}
    m.forget(path, [two])
    assert not path.exists()


# ---------------------------------------------------------------------------------------- what is kept


def test_merging_by_seed_and_environment(m):
    here = {"cpu": "x", "cores": 2, "threads": 2, "python": "3.11", "system": "Linux", "torch": "2"}

    def run(seed, value=0):
        return {"config": {"seed": seed}, "value": value}
    order = {"a": (1, 2, 3), "b": (1,)}
    kept = {"environment": here, "runs": {"b": [run(1)], "a": [run(3), run(1, "old")]}}
    new, gone = m.merge(kept, here, "a", run(1, "new"), order)
    assert gone == 0 and list(new["runs"]) == ["a", "b"] and new["runs"]["a"] == [run(1, "new"), run(3)]
    assert m.merge(new, here, "a", run(2), order)[0]["runs"]["a"] == [run(1, "new"), run(2), run(3)]
    # None: a file that did not say. Cores that no thread uses change nothing.
    for old in (here | {"torch": None}, here | {"cores": 64}, {k: v for k, v in here.items() if k != "cores"}):
        assert m.merge(kept | {"environment": old}, here, "a", run(1), order)[1] == 0
    for key in ("cpu", "threads", "python", "torch"):
        new, gone = m.merge(kept, here | {key: "other"}, "a", run(1, "new"), order)
        assert gone == 3 and new["runs"] == {"a": [run(1, "new")]} and new["environment"][key] == "other"


def test_thinning_keeps_both_ends(m, tmp_path):
    def write(folder, rows):
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"step": i, "loss": 1 / i} | ({"val_loss": 2 / i} if i % 10 == 0 else {}) for i in range(1, 1001)]
    write(tmp_path, rows)
    points = m.thinned(tmp_path)
    assert points[0] == [1, 1.0, None] and points[-1] == [1000, 0.001, 0.002] and 60 <= len(points) <= 81
    steps = [step for step, _, _ in points]
    assert steps == sorted(set(steps)) and max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 30
    assert 30 <= sum(val is not None for *_, val in points) <= 41
    assert all((val is None) == (step % 10 > 0) for step, _, val in points)
    # A short run keeps every line; one that was never evaluated has no curve.
    write(tmp_path, rows[:39])
    assert [step for step, _, _ in m.thinned(tmp_path)] == list(range(1, 40))
    write(tmp_path, rows[:9])
    assert m.thinned(tmp_path) is None
    (tmp_path / "metrics.jsonl").unlink()
    # Stages in the order in which they were run; rewards are no losses.
    write(tmp_path / "sft", rows[:20])
    os.utime(tmp_path / "sft" / "metrics.jsonl", (1, 1))
    write(tmp_path / "dpo", rows[:20])
    write(tmp_path / "ppo", [{"update": 1, "reward": 0.5}, {"update": 2, "reward": 0.5}])
    assert list(m.thinned(tmp_path)) == ["sft", "dpo"]
    text = m.to_json({"curve": points, "load_cv": [[1, 2]]})
    assert json.loads(text) == {"curve": points, "load_cv": [[1, 2]]} and "\n  [1, 1.0, null],\n" in text


def test_key_figures_of_all_recorded_runs(m):
    """None fails on what the scripts really write, stages without a right answer included."""
    for script in m.RUNS:
        for runs in m.results(script, ROOT / "results").values():
            assert all(re.search(r"\d", m.key_figure(script, run)) for run in runs)
    none = {"before": None, "after": None}
    run = {"results": {"preferred_rate": none, "correct_rate": none, "pair_accuracy": {"before": 0, "after": 0.75}}}
    assert m.key_figure("dpo", run) == "75.0% of the held-out pairs in the right order"


def test_results_without_curves_are_skipped(m, scratch):
    assert not m.curves_picture(scratch)
    (scratch / "results").mkdir()
    (scratch / "results" / "alpha.json").write_text(json.dumps({"environment": {}, "runs": {"one": [{"config": {}}]}}))
    assert not m.curves_picture(scratch / "results")
    stages = {"sft": [[1, 3.0, None], [5, 2.0, 2.1]], "dpo": [[1, 0.7, 0.7], [5, 0.2, 0.3]]}
    run = {"config": {"vocab_size": 20}, "floor": 0.5, "curve": stages}
    (scratch / "results" / "beta.json").write_text(json.dumps({"environment": {}, "runs": {"one": [run]}}))
    assert m.curves_picture(scratch / "results") and (scratch / "results" / "curves.png").is_file()


def test_a_quick_pass_touches_its_block_alone(m, scratch, monkeypatch):
    readme = "".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in ("TABLE", "QUICK", "QUESTIONS"))
    (scratch / "README.md").write_text(readme)
    # Headers could be refreshed: there are results, and somebody who says what to write.
    (scratch / "results").mkdir()
    (scratch / "results" / "alpha.json").write_text(json.dumps({"environment": {}, "runs": {"one": [{"results": {}}]}}))
    monkeypatch.setattr(m, "expectation", lambda *_: ("9 s", "something else"))
    assert m.refresh_header(FAKE, "alpha", None) != FAKE
    assert m.main(configured(m, scratch, which="quick")) == 0
    assert all((scratch / f"{name}.py").read_text() == FAKE for name in RUNS)
    assert {path.name for path in (scratch / "results").iterdir()} == {"quick", "alpha.json"}
    assert {path.name for path in (scratch / "results" / "quick").iterdir()} == {
        "alpha.json", "beta.json", "gamma.json", "curves.png"}
    now = (scratch / "README.md").read_text()
    assert "| `alpha.py --value q` | " in now and now.count("old") == 2
    # Results that go elsewhere change nothing in the repository.
    (scratch / "README.md").write_text(readme)
    elsewhere = m.Config(out=str(scratch / "out"), results=str(scratch / "elsewhere"), which="quick")
    assert m.main(elsewhere) == 0 and (scratch / "README.md").read_text() == readme


# ---------------------------------------------------------------------------------------- what quotes the results


@pytest.fixture
def copy(tmp_path, m, monkeypatch):
    """A copy of the repository's scripts and README, with train_all.py pointed at it."""
    for path in [*ROOT.glob("*.py"), ROOT / "README.md"]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(m, "SCRIPTS_AT", tmp_path)
    return tmp_path


def test_a_partial_results_folder(m, copy, capsys):
    before = {path.name: path.read_text() for path in copy.iterdir()}
    (copy / "some").mkdir()
    m.refresh(copy / "some")  # nothing at all: headers and tables of results stay
    assert {name: (copy / name).read_text() for name in before if name != "README.md"} == {
        name: text for name, text in before.items() if name != "README.md"}

    def block(text, name):
        return re.search(rf"<!-- begin {name} -->\n(.*?)<!-- end {name} -->", text, re.S)[1]
    for name in ("OUTPUT", "PEERS", "QUICK"):
        assert block((copy / "README.md").read_text(), name) == block(before["README.md"], name)
    # Some: what is there is quoted, what is missing is named and stays.
    shutil.copy(ROOT / "results" / "ppo_grpo.json", copy / "some")
    kept = json.loads((ROOT / "results" / "decoder_only.json").read_text())
    (copy / "some" / "decoder_only.json").write_text(json.dumps(kept | {"runs": {"numbers": kept["runs"]["numbers"]}}))
    shutil.copy(ROOT / "results" / "llama3.json", copy / "some")  # its header also quotes lr_search.json
    for name in ("ppo_grpo", "decoder_only", "llama3"):
        text = before[f"{name}.py"]
        (copy / f"{name}.py").write_text(re.sub(r"^Expect +", "Expect   stale, ", text, count=1, flags=re.M))
    m.refresh(copy / "some")
    told = capsys.readouterr().out
    assert (copy / "ppo_grpo.py").read_text() == before["ppo_grpo.py"]
    assert "decoder_only.py: its header stays as it is; missing or not as it should be: 'shakespeare'" in told
    assert "llama3.py: its header stays" in told
    assert "stale, " in (copy / "decoder_only.py").read_text() and "stale, " in (copy / "llama3.py").read_text()


def test_a_stale_block_is_noticed(m, copy):
    m.refresh(ROOT / "results")
    text = (copy / "README.md").read_text()
    for name in ("TABLE", "OUTPUT", "PEERS", "CONCEPTS", "HYPERPARAMETERS", "QUESTIONS"):
        start = text.index(f"<!-- begin {name} -->") + 40
        digit = re.search(r"\d", text[start:]).start() + start
        changed = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1:]
        assert changed != text and m.refresh_readme(changed, ROOT / "results", (name,)) == text, name


def test_the_comparison_has_no_runs(m, tmp_path):
    (tmp_path / "compare_architectures.json").write_text('{"tasks": {}}')
    assert m.results("compare_architectures", tmp_path) is None and m.results("nothing", tmp_path) is None


def test_its_own_header_adds_up_the_runs(m, tmp_path):
    for place, which in ((tmp_path, "default"), (tmp_path, "real"), (tmp_path / "quick", "quick")):
        place.mkdir(exist_ok=True)
        for script, runs in m.runs_of(which).items():
            kept = m.kept_file(script, place)
            kept["runs"] |= {what: [{"wall_seconds": 10.0}, {"wall_seconds": 1e6}] for what in runs}
            (place / f"{script}.json").write_text(json.dumps(kept))
    text = (ROOT / "train_all.py").read_text(encoding="utf-8")
    new = m.put_header(text, "train_all", *m.own_expectation(tmp_path))
    some, many = (sum(map(len, m.runs_of(which).values())) for which in ("default", "real"))
    said = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", new, re.M)[1].split())
    assert f"--preset quick {len(m.RUNS)} runs in 2 min, default {some} in {some / 6:.0f} min, real {many} in " in said
    assert re.search(rf"^RUN EVERYTHING.*python train_all.py +{some / 6:.0f} min on two CPU cores$", new, re.M)
    # The rest of the file is as it was.
    assert len(new) - len(text) < 300 and new[new.index("Asked "):] == text[text.index("Asked "):]
    # A run that was resumed does not know its time, and then nothing is claimed.
    (tmp_path / "dpo.json").write_text(json.dumps({"runs": {"numbers": [{"wall_seconds": None}]}}))
    with pytest.raises(KeyError):
        m.own_expectation(tmp_path)


def test_indexes(m):
    assert len(m.CONCEPTS) >= 60
    lines = m.concepts().splitlines()[2:]
    shown = [line.split(" | ")[0].lower() for line in lines]
    assert shown == sorted(shown) and len(lines) == len(m.CONCEPTS)
    for line in lines:
        file, name, number = re.search(r"`(\w+\.py)`: `[\w.]*?(\w+)`\]\(\w+\.py#L(\d+)\)", line).groups()
        source = (ROOT / file).read_text().splitlines()[int(number) - 1].strip()
        assert re.match(rf"(def|class) {name}\b", source), line
    for name in ("decoder_only.py:nothing", "decoder_only.py:GPT.nothing", "nothing.py:GPT"):
        with pytest.raises(SystemExit, match="there is no"):
            m.line_of(name)
    table = m.hyperparameters()
    assert re.search(r"^\| `n_embd` \| 128 \|", table, re.M) and "`kv_cache.py --preset 125m`" in table


def test_every_run_is_a_valid_command_line(m):
    """Flags and presets of all runs exist: found now, and not an hour into a pass."""
    assert set(m.QUICK_RUNS) == set(m.RUNS) and set(m.ALONE_RUNS) <= set(m.RUNS)
    assert all(what in m.RUNS[script] for script, (what, _) in m.QUICK_RUNS.items())
    quick = m.runs_of("quick")
    for script, runs in m.RUNS.items():
        module = load_script(ROOT / f"{script}.py")
        calls = [(preset, arguments) for preset, arguments, _ in runs.values()]
        for preset, arguments in calls + [("quick", arguments) for arguments, _ in quick[script].values()]:
            cfg = module.parse_config(module.Config, module.PRESETS, arguments.split())
            assert hasattr(cfg, "seed") == (runs[next(iter(runs))][2] != (None,))
            # default and quick need no data from the network; real ones name theirs.
            data = getattr(cfg, "data", "numbers")
            offline = data in ("numbers", "pydocs", "random") or script == "lora_qlora" and data == "auto"
            assert offline == (preset != "real"), (script, arguments)


@pytest.mark.parametrize("flags, words", [
    (["--only", "nonsense"], "nonsense"), (["--only", "decoder_only:shakespeare"], "preset default"),
    (["--jobs", "0"], "jobs must be at least 1"), (["--seeds", "-1"], "seeds"), (["--which", "all"], "which"),
    (["--preset", "fast"], "fast")])
def test_wrong_flags_end_with_one_line(run_script, tmp_path, flags, words):
    done = run_script(ROOT / "train_all.py", *flags, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout and list(tmp_path.iterdir()) == []


def test_real_scripts(m, tmp_path, monkeypatch, capsys):
    """Two of the real ones, very short: their files are what the made-up ones pretend to leave."""
    small = "--data pydocs --max-steps 4 --eval-every 2 --n-layer 1 --n-embd 32 --n-head 2 --max-new-tokens 5"
    monkeypatch.setattr(m, "RUNS", {"decoder_only": {"pydocs": ("default", small, (1337,))},
                                    "toy_dataset": {"default": ("default", "", (1337,))}})
    monkeypatch.setattr(m, "cores", lambda: 2)
    cfg = m.Config(out=str(tmp_path / "out"), results=str(tmp_path / "results"), jobs=2)
    assert m.main(cfg) == 0
    run = recorded(tmp_path, "decoder_only")["runs"]["pydocs"][0]
    assert [step for step, *_ in run["curve"]] == [1, 2, 4] and run["curve"][-1][2] == round(run["val_loss"], 5)
    assert run["printed"].startswith("data: ")
    assert str(tmp_path) not in json.dumps(run)
    assert recorded(tmp_path, "toy_dataset")["runs"]["default"][0]["curve"] is None
    assert (tmp_path / "results" / "decoder_only_curve.png").is_file()
    assert re.search(r"decoder_only-pydocs-1337: \d+ s, val loss \d", capsys.readouterr().out)
