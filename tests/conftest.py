"""What all tests share: the fixture `m`, the option --script, the marker `slow`, and where the data lies.

    pytest                                             every test but the slow ones
    pytest -m slow                                     the long trainings
    pytest tests/test_llama3.py --script my_llama.py   grade your own file with the tests of llama3.py
"""

import os

# Set before torch, transformers or matplotlib can be imported: no network, no window, no warning on fork.
# One thread: tests are thousands of small computations, and handing those out to threads takes longer than doing them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Triton looks once, when it is imported, and many things import it: kernels then run in numpy.
os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import ORCHESTRATORS

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--script", metavar="PATH", help="grade this file instead of the repository's script")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long training; runs only with `pytest -m slow`")
    path = config.getoption("--script")
    if path and not Path(path).is_file():
        raise pytest.UsageError(f"--script {path}: no such file")


def pytest_collection_modifyitems(config, items):
    # With several processes (-n 2 --dist loadgroup) a file stays in one, which loads its script once. The house tests
    # are many and have nothing in common: they go wherever there is time.
    for item in items:
        if item.path.stem != "test_house":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    # Skipped rather than deselected: the summary then says that they exist and how to run them.
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run it with `pytest -m slow`"))


def load_script(path: Path):
    """Import one file by its path, under its own stem. Nothing is put on sys.path: siblings stay out of its reach."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses and inspect look a class's module up by name, already while the file is being executed.
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(path.stem, None)
        raise
    return module


@pytest.fixture(scope="module")
def m(request):
    """The script under test: tests/test_llama3.py gets llama3.py, or the file named by --script."""
    named = request.config.getoption("--script")
    path = Path(named).resolve() if named else ROOT / (request.path.stem.removeprefix("test_") + ".py")
    if not path.is_file():
        pytest.fail(f"{request.path.name} tests {path.name}, and there is no such file in {ROOT.name}/", pytrace=False)
    with pytest.MonkeyPatch.context() as patch:
        if path.stem in ORCHESTRATORS:  # these find the scripts beside them
            patch.syspath_prepend(str(ROOT))
        yield load_script(path)


def existing_folder(variable: str, beside: str) -> Path:
    """The folder an environment variable names, else the usual one beside the repository; skips when there is none."""
    named = os.environ.get(variable)
    folder = Path(named).resolve() if named else ROOT.parent / "shared" / beside
    if not folder.is_dir():
        pytest.skip(f"${variable} names no folder and ../shared/{beside} does not exist")
    return folder


@pytest.fixture
def data_dir() -> Path:
    """Folder with the downloaded data sets."""
    return existing_folder("LLM_DATA", "data")


@pytest.fixture
def tiktoken_cache(monkeypatch) -> Path:
    """Folder with tiktoken's downloaded vocabularies; tiktoken finds it through the variable set here."""
    folder = existing_folder("TIKTOKEN_CACHE_DIR", "tiktoken_cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def run_script():
    """A function that runs a script as a user does and returns the CompletedProcess (text, both streams captured)."""

    def run(script, *args, cwd, env=None, timeout=600):
        # -I: no PYTHONPATH, no current directory on sys.path. `env` is added to the environment, not put in its place.
        command = [sys.executable, "-I", str(script), *map(str, args)]
        environment = os.environ | {key: str(value) for key, value in (env or {}).items()}
        return subprocess.run(command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True)

    return run
