"""train_all.py with small scripts in place of the real ones: what is run, kept, repeated, and what is published."""
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load_script

# A script as train_all.py sees one. --fail, --slow N and --silent decide how it ends.
FAKE = '''
"""A script."""
import json, os, sys, time
argv = sys.argv[1:]
out = argv[argv.index("--out") + 1]
print("step 1", flush=True)
print("half%|", end="\\r", flush=True)
open(os.path.join(out, "begun"), "w").close()
for _ in range(int(argv[argv.index("--slow") + 1]) if "--slow" in argv else 0):
    time.sleep(0 if os.path.exists(__file__ + ".fast") else 0.1)
    print("slowly", flush=True)
if "--fail" in argv:
    sys.exit("error: no such luck")
if "--silent" not in argv:
    seed = int(argv[argv.index("--seed") + 1]) if "--seed" in argv else None
    history = [{"step": s, "loss": 3.0 / s, "val_loss": 3.1 / s} for s in (1, 2)]
    json.dump({"config": {"seed": seed, "out": out}, "results": {"x": seed}, "val_loss": 1.5, "seconds": 1.0,
               "history": history}, open(os.path.join(out, "summary.json"), "w"))
'''


@pytest.fixture
def small(m, tmp_path, monkeypatch):
    """The module with ROOT at a folder of small scripts, and with RUNS of its own. -> (module, a Config maker)."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.setattr(m, "ROOT", tmp_path)
    monkeypatch.setattr(m, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(m, "RUNS", {"one": {"default": ("", (1, 2, 3)), "shakespeare": ("--data shakespeare", (1,))},
                                    "two": {"default": ("", (None,))}})
    monkeypatch.setattr(m, "QUICK", {"one": "--short"})
    return m, lambda **more: m.Config(out=str(tmp_path / "runs"), **more)


def names(jobs):
    return [job.name for job in jobs]


def test_plan(small):
    m, cfg = small
    assert names(m.plan(cfg())) == ["one:default seed 1", "two:default"]
    assert names(m.plan(cfg(seeds=0, which="all"))) == [
        "one:default seed 1", "one:default seed 2", "one:default seed 3", "one:shakespeare seed 1", "two:default"]
    assert names(m.plan(cfg(which="real"))) == ["one:shakespeare seed 1"]
    assert names(m.plan(cfg(only="one:shakespeare"))) == ["one:shakespeare seed 1"]  # named: whatever the pass
    assert names(m.plan(cfg(only="two"))) == ["two:default"]
    with pytest.raises(ValueError, match="no run of this pass"):
        m.main(cfg(only="two", which="real"))
    (quick,) = m.plan(cfg(which="quick"))
    assert quick.name == "one:quick seed 1" and quick.arguments == ["--short", "--seed", "1"]
    with pytest.raises(ValueError, match="no 'three'; there are one, one:default"):
        m.plan(cfg(only="three"))


@pytest.mark.parametrize("bad", [dict(jobs=0), dict(seeds=-1), dict(which="some"), dict(which="quick", publish=True)])
def test_settings_that_mean_nothing(small, bad):
    m, cfg = small
    with pytest.raises(ValueError):
        m.main(cfg(**bad))


def test_what_is_finished_is_not_repeated(small, capsys):
    m, cfg = small
    assert m.main(cfg(seeds=2, jobs=2)) == {}
    folder = Path(cfg().out)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("done.json")}
    assert len(stamps) == 3 and (folder / "curves.png").stat().st_size > 5000
    assert json.loads((folder / "offline.json").read_text())["runs"] == 3
    log = (folder / "one" / "default" / "1" / "log.txt").read_text()
    assert "step 1" in log and "half" not in log  # progress bars are for the eye
    assert m.main(cfg(seeds=2)) == {}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("done.json")} == stamps
    assert "3 runs, 3 of them finished before" in capsys.readouterr().out
    # Other code: again. Another comment: not.
    (m.ROOT / "two.py").write_text(FAKE + "# a comment\n")
    assert all(job.finished() for job in m.plan(cfg(seeds=2)))
    (m.ROOT / "two.py").write_text(FAKE + "x = 1\n")
    assert [job.finished() for job in m.plan(cfg(seeds=2))] == [True, True, False]


def test_code_hash_follows_imports_and_ignores_words(m, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "ROOT", tmp_path)
    for name, text in dict(a="import b\n\ndef f():\n    return b.x\n", b="x = 1\n").items():
        (tmp_path / f"{name}.py").write_text(text)
    before = m.code_hash("a"), m.code_hash("b")
    text = '"""{0}."""\nimport b\n\ndef f():\n    """{0}."""  # {0}\n    return b.x\n'
    (tmp_path / "a.py").write_text(text.format("Doc"))
    assert m.code_hash("a") != before[0]  # a docstring that was not there is a statement more ...
    one = m.code_hash("a")
    (tmp_path / "a.py").write_text(text.format("Words"))
    assert m.code_hash("a") == one        # ... other words in it are nothing
    (tmp_path / "b.py").write_text("x = 2\n")
    assert m.code_hash("a") != one and m.code_hash("b") != before[1]


@pytest.mark.parametrize("flag, words", [("--fail", "exit code 1: error: no such luck"), ("--silent", "exit code 0")])
def test_a_failure_is_named_and_the_others_go_on(small, capsys, monkeypatch, flag, words):
    m, cfg = small
    monkeypatch.setitem(m.RUNS["one"], "default", (flag, (1,)))
    failed = m.main(cfg())
    assert list(failed) == ["one:default seed 1"] and words in failed["one:default seed 1"]
    assert [job.finished() for job in m.plan(cfg())] == [False, True]
    assert "failed: one:default seed 1" in capsys.readouterr().err
    monkeypatch.setitem(m.RUNS["one"], "default", ("", (1,)))
    assert m.main(cfg()) == {}


def test_a_folder_that_cannot_be_made_ends_it_before_the_first_run(small, tmp_path):
    m, cfg = small
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        m.main(m.Config(out=str(tmp_path / "file" / "runs")))
    assert not list(tmp_path.rglob("begun"))


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_started_again(tmp_path, way):
    """Ctrl-C: one line and 130. kill -9: nobody is left behind. Either way only what was under way is run again."""
    source = (ROOT / "train_all.py").read_text(encoding="utf-8")
    start, end = source.index("RUNS = {\n"), source.index("NEEDS_DATA = ")
    (tmp_path / "train_all.py").write_text(
        source[:start] + "RUNS = {'one': {'a': ('', (1,)), 'b': ('--slow 100', (1,))}}\n" + source[end:])
    (tmp_path / "one.py").write_text(FAKE)
    command = [sys.executable, "train_all.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    begun = tmp_path / "runs" / "train_all" / "one" / "b" / "1" / "begun"
    while not begun.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(way)
    errors = process.communicate(timeout=20)[1]
    if way == signal.SIGINT:
        assert process.returncode == 130 and errors.strip().split("\n")[-1].startswith("interrupted: ")
        assert "Traceback" not in errors
    time.sleep(0.5)  # the child meets its closed pipe at its next line
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "one.py") not in running
    done = tmp_path / "runs" / "train_all" / "one" / "a" / "1" / "done.json"
    stamp = done.stat().st_mtime_ns
    (tmp_path / "one.py.fast").touch()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "2 runs, 1 of them finished before" in again.stdout, again.stderr
    assert done.stat().st_mtime_ns == stamp and (begun.parent / "done.json").is_file()


def test_curves_of_the_three_forms(m, tmp_path):
    rows = [dict(step=1, loss=4.0, val_loss=4.1), dict(step=10, loss=2.0), dict(step=20, loss=1.0, val_loss=1.1)]
    assert m.curves(dict(history=rows)) == dict(training=[(1, 4.0), (10, 2.0), (20, 1.0)],
                                                validation=[(1, 4.1), (20, 1.1)])
    assert m.curves(dict(history=dict(dpo=[dict(step=0, preferred=0.2, kl=0)]))) == dict(dpo=[(0, 0.2)])
    assert m.curves(dict(history=dict(ppo=[dict(answers=64, sampled=0.5)]))) == dict(ppo=[(64, 0.5)])
    assert m.curves(dict(history=dict(lora=[[0, 7.0], [40, 1.0]]))) == dict(lora=[[0, 7.0], [40, 1.0]])
    assert m.curves({}) == m.curves(dict(history=[])) == {}
    m.draw_curves(dict(nothing={}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_tensorboard_or_one_line(m, tmp_path):
    summaries = {"one:a": dict(history=[dict(step=1, loss=4.0, val_loss=4.1)])}
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ValueError, match="pip install tensorboard"):
            m.write_tensorboard(summaries, tmp_path)
    else:
        m.write_tensorboard(summaries, tmp_path)
        assert list(tmp_path.glob("one-a/events*"))


def test_every_script_is_run_with_arguments_that_it_knows(m, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert set(m.RUNS) == scripts - {"train_all"} and set(m.QUICK) == set(m.RUNS) - {"compare_architectures"}
    for job in [*m.plan(m.Config(which="all", seeds=0)), *m.plan(m.Config(which="quick"))]:
        cfg = importlib.import_module(job.script).parse_config([*job.arguments, "--out", "x"])
        assert job.seed is None or cfg.seed == job.seed


# --- publishing ------------------------------------------------------------------------------------------------------
@pytest.fixture
def publish(small, monkeypatch):
    m, cfg = small
    monkeypatch.setitem(sys.modules, "train_all", m)
    p = load_script(ROOT / "benchmarks" / "publish.py")
    monkeypatch.setattr(p, "ROOT", m.ROOT)
    monkeypatch.setattr(p, "RESULTS", m.RESULTS)
    m.RESULTS.mkdir()
    return p, m, cfg


def test_only_runs_with_all_their_seeds_are_published(publish, capsys):
    p, m, cfg = publish
    m.main(cfg(seeds=2))
    p.publish(m.plan(cfg(seeds=0)))
    assert "one:default has 2 of its 3 seeds" in capsys.readouterr().out
    assert [path.name for path in m.RESULTS.iterdir()] == ["two.json"]
    m.main(cfg(seeds=0))
    (m.plan(cfg())[0].folder / "curve.png").write_bytes(b"png")
    p.publish(m.plan(cfg(seeds=0)))
    kept = json.loads((m.RESULTS / "one.json").read_text())["runs"]["default"]
    assert [run["config"]["seed"] for run in kept] == [1, 2, 3] and kept[0]["code"] == m.code_hash("one")
    assert "out" not in kept[0]["config"]
    assert str(m.ROOT) not in (m.RESULTS / "one.json").read_text()
    assert (m.RESULTS / "one_curve.png").read_bytes() == b"png"


def test_sentences_are_filled(publish):
    p, m, _ = publish
    runs = [dict(results=dict(x=value, y=4.0, parts=[1, 2]), seconds=90) for value in (1.0, 3.0)]
    (m.RESULTS / "one.json").write_text(json.dumps(dict(runs=dict(a=runs), total=0.5, bytes=2e6, word="yes")))
    for hole, text in {"one:a:results/x:.1f": "2.0", "one:a:results/x:.0f:range": "1 to 3", "one:a:seconds:min": "2",
                       "one:-:total:.0%": "50 %", "one:-:bytes:MB": "2.00", "one:-:word:s": "yes",
                       "one:a:results/x over results/y:.2f": "0.50", "one:a:results/parts/*:.1f": "1.5"}.items():
        assert p.fill(f"<{{{hole}}}>") == f"<{text}>"
    with pytest.raises(KeyError):
        p.fill("{one:a:results/z:.1f}")
    with pytest.raises(OSError):
        p.fill("{three:a:x:.1f}")


def test_links_find_their_lines(publish):
    p, m, _ = publish
    lines = ["class A:", "    def f(self):", "        # Q: Why", "        #    so? And how?", "        return 1", ""]
    (m.ROOT / "one.py").write_text("\n".join(lines))
    assert p.line_of("one.py", "`A.f`") == 2 and p.line_of("one.py", "Why so?") == 3
    with pytest.raises(ValueError, match="one.py has no `B`"):
        p.line_of("one.py", "`B`")
    with pytest.raises(ValueError, match="has no Where"):
        p.line_of("one.py", "Where?")
    page = m.ROOT / "page.md"
    page.write_text("[`A.f`](../one.py#L99) [Why so?](one.py#L1)")
    assert p.refreshed(page) == "[`A.f`](../one.py#L2) [Why so?](one.py#L3)"


def test_header(publish):
    p, _, _ = publish
    text = '"""\nIdea     x\nExpect   old\n         lines\nAsked    y\n"""\n'
    assert p.with_header(text, "new " * 40).split("\nAsked")[0].count("\n") == 3
    assert p.with_header(p.with_header(text, "a b"), "a b") == '"""\nIdea     x\nExpect   a b\nAsked    y\n"""\n'
