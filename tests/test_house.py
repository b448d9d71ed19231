"""The rules of the house. Each is a function check_...(script) that yields complaints "file:line: what is wrong".

    python tests/test_house.py --fix llama3.py:RMSNorm     copy one text into all scripts that have the name
A new script needs entries in BUDGETS and RUNS and, in its test file, scenario(m, tmp_path, fixed), which reaches every
shape comment; `fixed` takes the letters that the configuration decides.
"""
import ast
import io
import itertools
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import types
from collections import ChainMap, Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = dict(  # most lines of code, most lines
    decoder_only=(420, 820), encoder_only=(420, 820), encoder_decoder=(450, 880), llama3=(420, 820),
    qwen3_moe=(450, 880), lora_qlora=(480, 920), dpo=(400, 780), ppo_grpo=(430, 850), kv_cache=(500, 960),
    flash_attention=(520, 990), bpe_tokenizer=(220, 430), toy_dataset=(170, 330), train_all=(280, 450),
    compare_architectures=(420, 720), visualizations=(480, 800), quick_start=(150, 260))
ORCHESTRATORS = {"train_all", "compare_architectures", "visualizations", "quick_start"}  # may import scripts
DATA = {"toy_dataset", "bpe_tokenizer"}  # no model: fewer sections
TITLES = ["Config", "Model", "Objective", "Data", "Training", "Decoding", "Interchange", "Main"]
LABELS = ["Idea", "Picture", "Not here", "Expect", "Asked", "Paper", "Symbols", "New here"]  # the first 5 everywhere
EXEMPT = {"Config", "PRESETS", "SHAPE", "HARMLESS", "main", "load", "compute_loss", "make_data", "from_pretrained",
          "save_pretrained", "hf_config"}  # of one name in several scripts, and yet each script's own
MODEL, TINY = ["summary.json", "ckpt.pt", "curve.png"], "--max-steps 3 --n-layer 1"
TEXT, TOY = f"{TINY} --data pydocs", f"{TINY} --sft-steps 200"
RUNS = {"toy_dataset": ("", ["summary.json", "masks.png"]),  # arguments for seconds, what is left in runs/<script>/
        "bpe_tokenizer": ("--vocab-size 300", ["summary.json", "tokenizer.json", "bytes_per_token.png"]),
        **dict.fromkeys(("decoder_only", "llama3"), (TEXT, MODEL)), "qwen3_moe": (TEXT, [*MODEL, "expert_load.png"]),
        "encoder_only": (TINY, MODEL), "encoder_decoder": (TINY, [*MODEL, "attention.png"]),
        "kv_cache": (f"{TEXT} --contexts=", MODEL[:1]), "lora_qlora": ("--base-steps 3 --max-steps 3", MODEL[::2]),
        "flash_attention": (f"{TEXT} --lengths 64", [*MODEL[::2], "lengths.png"]),
        "dpo": (f"{TOY} --pairs 20", MODEL[::2]), "ppo_grpo": (f"{TOY} --right-share 0.9 --methods grpo", MODEL[::2]),
        "visualizations": ("--only rope", ["rope.png", "summary.json"]),
        "train_all": ("--only toy_dataset", [*map("toy_dataset/default/1337/{}".format, (
            "done.json", "log.txt", "masks.png", "summary.json"))])}


class Script:
    """One file's text, and what the rules want to know about it."""

    def __init__(self, path, text=None):
        self.path, self.name, self.stem = Path(path), Path(path).name, Path(path).stem
        self.text = Path(path).read_text(encoding="utf-8") if text is None else text
        self.lines, self.tree = self.text.split("\n"), ast.parse(self.text, self.name)
        self.functions = [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]
        tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        self.comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
        self.operators = {(token.start[0], token.string) for token in tokens if token.type == tokenize.OP}
        docs = [node.body[0] for node in ast.walk(self.tree) if isinstance(node, (
            ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None]
        inside = {line for doc in docs for line in range(doc.lineno, doc.end_lineno + 1)}
        # For each line, counted from 1: "blank", "doc", "comment" (and nothing else) or "code".
        self.kinds = [""] + ["blank" if not line.strip() else "doc" if i in inside else "comment"
                             if line.strip().startswith("#") else "code" for i, line in enumerate(self.lines, 1)]

    def at(self, line, problem):
        return f"{self.name}:{line}: {problem}"


SCRIPTS = [Script(path) for path in sorted(ROOT.glob("*.py"))]


def imports(node):
    """(line, module) of every import below `node`; a relative one begins with a dot."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.lineno, "." * child.level + (child.module or "")


# --- the rules -------------------------------------------------------------------------------------------------------
def check_imports(script):
    for line, name in imports(script.tree):
        top, siblings = name.split(".")[0], set(BUDGETS) - {script.stem}
        if not top or top in ORCHESTRATORS or top in siblings and script.stem not in ORCHESTRATORS:
            yield script.at(line, f"imports {name}: a script stands alone, paste what you need")
    for node in script.tree.body:
        for line, name in imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            if name.split(".")[0] not in {"torch", "numpy", "tqdm", *BUDGETS, *sys.stdlib_module_names}:
                yield script.at(line, f"import {name} inside the function that uses it")


def check_pep723(script):
    end = script.lines.index("# ///") if "# ///" in script.lines else 0
    block = tomllib.loads("\n".join(line[2:] for line in script.lines[1:end]))
    declared = {re.sub(">=[0-9.]+$", "", item).replace("-", "_") for item in block.get("dependencies", [])}
    real = {name.split(".")[0] for _, name in imports(script.tree)}
    real -= {*sys.stdlib_module_names, *BUDGETS, "triton"}  # triton is optional
    if script.lines[0] != "# /// script" or block.get("requires-python") != ">=3.11" or declared != real:
        yield script.at(1, f"the script block declares {sorted(declared)}, the file imports {sorted(real)}")
    if not script.lines[end + 1].startswith("# SPDX-License-Identifier: MIT"):
        yield script.at(end + 2, "write `# SPDX-License-Identifier: MIT` right below the script block")


def check_header(script):
    header = ast.get_docstring(script.tree) or ""
    if f"python {script.name}" not in header.split("\n")[0]:
        yield script.at(1, f"the title line must show the run line `python {script.name}`")
    for label in LABELS[:5 if script.stem in DATA | ORCHESTRATORS else 8]:
        if not re.search(rf"^{label} +\S", header, re.MULTILINE):
            yield script.at(1, f"header: no line begins with {label!r} and a text after it")


def check_sections(script):
    numbers = []
    for line, comment in script.comments.items():
        if comment.startswith("# ---"):
            found = re.fullmatch(r"# --- (\d)\. (\w+): .+", comment)
            if not found or TITLES[int(found[1]) - 1] != found[2] or numbers and int(found[1]) <= numbers[-1]:
                yield script.at(line, f"no banner `# --- N. Title: text` of {TITLES}, in this order")
            numbers += [int(found[1])] if found else []
            if len(numbers) == 2 and line > 150:
                yield script.at(line, "the subject must be on the page before line 150")
    if missing := ({1, 8} if script.stem in DATA | ORCHESTRATORS else {1, 2, 8}) - set(numbers):
        yield script.at(1, f"banner missing: {missing}")
    if script.kinds.index("code") > 35 or not script.text.split("\n\n\n")[-1].startswith('if __name__ == "__main__"'):
        yield script.at(1, "code begins before line 35 and ends with `if __name__`")


def check_budget(script):
    words = sum(len(comment.split()) - 1 for comment in script.comments.values())
    words += sum(len(line.split()) for line, kind in zip(script.lines, script.kinds[1:], strict=True) if kind == "doc")
    config = next((node for node in script.tree.body if getattr(node, "name", "") == "Config"), None)
    size = Counter(script.kinds[1:])
    code, most, share = size["code"], BUDGETS[script.stem], 1 - size["code"] / (len(script.lines) - size["blank"])
    for what, size, ceiling in (
            ("lines of code", code, most[0]), ("lines", len(script.text.splitlines()), most[1]),
            ("words of prose", words, 5500), ("% of comments, at least 35 needed", -100 * share, -35),
            ("% of comments", 100 * share, 45), ("imports, siblings aside", len([
                n for n in script.tree.body if isinstance(n, (ast.Import, ast.ImportFrom))
                and n.names[0].name not in BUDGETS]), 16), ("settings", len([n for n in config.body if isinstance(
                    n, ast.AnnAssign)]) if config else 0, 28)):
        if size > ceiling:
            yield script.at(1, f"{abs(size):.4g} {what}, {abs(ceiling)} allowed: fewer things, not denser lines")
    for node in script.functions:
        lines = script.kinds[node.lineno:node.end_lineno + 1].count("code")
        if lines > (allowed := 65 if node.name in ("train", "main") else 50):
            yield script.at(node.lineno, f"{node.name} has {lines} lines of code, {allowed} are allowed")


def check_lines(script):
    run = {"code": 0, "comment": 0}
    in_function = {line for node in script.functions for line in range(node.lineno, node.end_lineno + 1)}
    for line, (text, kind) in enumerate(zip(script.lines, script.kinds[1:], strict=True), 1):
        run["code"] = 0 if kind in ("comment", "doc") else run["code"] + (kind == "code")
        run["comment"] = run["comment"] + 1 if kind == "comment" and line in in_function else 0
        if len(text) > 120 or (line, ";") in script.operators or re.search(r"(?<![\w.])(/home/|/Users/|/root/)", text):
            yield script.at(line, "more than 120 columns, a semicolon, or a path of one machine")
        if run["code"] == 26 or run["comment"] == 9:
            yield script.at(line, "26 lines of code without a comment, or 9 of comment inside a function")
        if text.strip().startswith("# Q:") and not any("# A:" in other for other in script.lines[line:line + 4]):
            yield script.at(line, "a question without an answer: `# A:` belongs within the next 4 lines")
    for node in ast.walk(script.tree):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or isinstance(node.body[0], ast.Pass)):
            yield script.at(node.lineno, "swallows errors: name the exception and do something")
        call = ast.unparse(node) if isinstance(node, ast.Call) else ""
        if call.startswith("torch.load(") and "weights_only=True" not in call:
            yield script.at(node.lineno, "torch.load without weights_only=True runs code from the file")


RULES = [check_imports, check_pep723, check_header, check_sections, check_budget, check_lines]


# --- same name, same text --------------------------------------------------------------------------------------------
def blocks(script):
    """{name: (first line, last line, text with the comment above, `# differs from ...` line in it)} of definitions."""
    found = {}
    for node in script.tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node
        name = getattr(target, "name", getattr(target, "id", ""))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or isinstance(node, ast.Assign) and name.isupper():
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            while script.kinds[first - 1] == "comment" and not script.lines[first - 2].startswith("# ---"):
                first -= 1
            lines = script.lines[first - 1:node.end_lineno]
            marker = next((line for line in lines if line.startswith("# differs from ")), "")
            found[name] = first, node.end_lineno, "\n".join(lines), marker
    return found


def check_same_text(scripts):
    copies = defaultdict(list)
    for script in scripts:
        for name, (first, _, text, marker) in blocks(script).items():
            if name not in EXEMPT:
                copies[name, marker].append((script, first, text))
    for (name, _), group in copies.items():
        usual = Counter(text for _, _, text in group).most_common(1)[0][0]
        source = next(script.name for script, _, text in group if text == usual)
        for script, first, text in group:
            if text != usual:
                pairs = itertools.zip_longest(usual.split("\n"), text.split("\n"))
                yield script.at(first, f"{name} is not the text of {source}: {next(p for p in pairs if p[0] != p[1])}; "
                                       f"python tests/test_house.py --fix {source}:{name}, or # differs from {source}:")


def fix(source, root=ROOT):
    """Copy the block "file.py:Name" into the scripts that must equal it -> their names. All are written or none."""
    file, _, name = source.partition(":")
    scripts = {path.name: Script(path) for path in sorted(root.glob("*.py"))}
    _, _, text, marker = blocks(scripts[file])[name]
    changed = {}
    for script in scripts.values():
        first, last, old, other = blocks(script).get(name, (0, 0, text, marker))
        if old != text and other == marker and name not in EXEMPT:
            changed[script.path] = "\n".join(script.lines[:first - 1] + text.split("\n") + script.lines[last:])
            ast.parse(changed[script.path])
    for path, whole in changed.items():
        path.write_text(whole, encoding="utf-8", newline="\n")
    return [path.name for path in changed]


# --- shape comments, executed ----------------------------------------------------------------------------------------
def parse_claim(comment):
    """The shape that a comment begins with: "# (B, 3*C) queries" -> ["B", "3*C"]; None if it begins with prose."""
    found = re.match(r"#\s*\(([A-Za-z0-9_+*/, -]*)\)", comment)
    dims = [re.sub(r"\s", "", dim) for dim in found[1].split(",") if dim.strip()] if found else []
    return dims if dims and all(re.fullmatch(r"([A-Z0-9n]|rows|[+*/-])+", dim) for dim in dims) else None


class Tracer(ast.NodeTransformer):
    """Runs a script with every shape comment at the end of an assignment or a return turned into a check.
        q = self.q(x)      # (B, T, C)      ->      q = self.q(x); __shape__(q, 12, __dims__)
        return y           # (B, T, C)      ->      return __shape__(y, 14, __dims__)
    A letter is bound where a function first meets it and keeps its size until the function returns; in a loop, letters
    first met inside are bound anew in each round. `fixed` holds the letters that the configuration decides.
    """

    def __init__(self, script):
        self.script, self.fixed, self.reached, self.claims = script, {}, set(), {}
        self.tree = ast.fix_missing_locations(self.visit(ast.parse(script.text, script.name)))

    def load(self):
        module = types.ModuleType(f"traced_{self.script.stem}")
        module.__dict__.update(__shape__=self.check, __dims__={}, __file__=str(self.script.path))
        sys.modules[module.__name__] = module  # dataclasses look their module up by name
        exec(compile(self.tree, str(self.script.path), "exec"), module.__dict__)
        return module

    def check(self, value, line, dims):
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if hasattr(tensor, "shape"):
                self.reached.add(line)
                claim, shape, names = self.claims[line], tuple(tensor.shape), ChainMap(dims, self.fixed)
                same = len(claim) == len(shape) and all(
                    size == (names.setdefault(dim, size) if dim.isidentifier() else eval(dim, {}, names))
                    for dim, size in zip(claim, shape, strict=True))
                if not same:
                    raise AssertionError(self.script.at(line, f"({', '.join(claim)}) is really {shape}"))
        return value

    def missed(self):
        lines = sorted(set(self.claims) - self.reached)
        return [self.script.at(line, "no tensor came by: extend scenario(), or drop the comment") for line in lines]

    def claimed(self, node):
        claim = parse_claim(self.script.comments.get(node.end_lineno, ""))
        if claim and node.value is not None:
            self.claims[node.end_lineno] = claim
        return bool(claim and node.value is not None)

    def visit_Assign(self, node):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        check = f"__shape__({ast.unparse(target)}, {node.end_lineno}, __dims__)"
        return [node, *ast.parse(check).body] if self.claimed(node) else node

    visit_AugAssign = visit_Assign

    def visit_Return(self, node):
        if self.claimed(node):
            call = ast.parse(f"__shape__(0, {node.end_lineno}, __dims__)", mode="eval").body
            call.args[0], node.value = node.value, call
        return node

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.body[ast.get_docstring(node) is not None:0] = ast.parse("__dims__ = {}").body
        return node

    def visit_For(self, node):
        self.generic_visit(node)
        copy = f"__dims_{node.lineno}__"
        node.body[:0] = ast.parse(f"__dims__ = dict({copy})").body
        return [*ast.parse(f"{copy} = dict(__dims__)").body, node]

    visit_While = visit_For


# --- the tests -------------------------------------------------------------------------------------------------------
def report(problems):
    if problems := list(problems):
        raise AssertionError("\n".join(["", *problems]))


def pytest_generate_tests(metafunc):  # a hook and no decorators: this file must load without pytest, for --fix
    if "script" in metafunc.fixturenames:
        wanted = [one for one in SCRIPTS if metafunc.function is not test_alone or one.stem in RUNS]  # others: minutes
        metafunc.parametrize("script", wanted, ids=[script.stem for script in wanted])
    if "damage" in metafunc.fixturenames:
        metafunc.parametrize("damage", DAMAGES, ids=[f"{d[0].__name__[6:]}-{i}" for i, d in enumerate(DAMAGES)])


def test_rules(script):
    report(problem for rule in RULES for problem in rule(script))


def test_same_name_same_text():
    report(check_same_text(SCRIPTS))


def test_shape_comments(script, tmp_path, monkeypatch):
    tracer = Tracer(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # orchestrators import scripts
    if tracer.claims:
        __import__(f"test_{script.stem}").scenario(tracer.load(), tmp_path, tracer.fixed)
    report(tracer.missed())


def test_alone(script, tmp_path):
    """In an empty folder: importing is silent, and a run leaves what it promises below runs/<script>/, nothing else."""
    files = [shutil.copy(one.path, tmp_path) for one in SCRIPTS if one is script or script.stem in ORCHESTRATORS]
    code = f"import os, sys, {script.stem} as m; print(len(os.listdir())); m.main(m.parse_config(sys.argv[1:]))"
    command = [sys.executable, "-Bc", code, *RUNS[script.stem][0].split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"{len(files)}\n"), done.stdout + done.stderr
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and str(p) not in files}
    assert left == {f"runs/{script.stem}/{name}" for name in RUNS[script.stem][1]}


# --- can every rule fail? --------------------------------------------------------------------------------------------
GOOD = (ROOT / "toy_dataset.py").read_text(encoding="utf-8")
DAMAGES = [  # (rule, text, replacement)
    *((check_imports, "import json", other) for other in (
        "import decoder_only", "from . import json", "import train_all", "import matplotlib")),
    (check_pep723, "# /// script", "#"), (check_pep723, '"torch>=2.11"', '"torch==2.11"'),
    (check_pep723, ', "torch>=2.11"', ""), (check_pep723, '"torch>=2.11"', '"torch>=2.11", "tqdm>=4"'),
    (check_pep723, "# SPDX-License-Identifier: MIT", "#"), (check_header, "python toy_dataset.py", "python toy.py"),
    (check_header, "\nExpect   ", "\nExpects  "), (check_sections, "# --- 4. Data", "# --- 4. Dates"),
    (check_sections, "# --- 1. Config", "# --- 8. Main"), (check_sections, "# --- 8. Main: show it", "#"),
    (check_sections, "# --- 4. Data", "\n" * 150 + "# --- 4. Data"), (check_sections, "\nif __name__", "\n\n\nif 1"),
    (check_sections, "import argparse", "\n" * 15 + "import argparse"),
    *((check_budget, "import json", other) for other in (
        "import json\n" * 9, "#\n" * 200 + "import json", "import json\n\n" * 200, "import json\n#" * 99)),
    (check_budget, "\nPRESETS", "    a: int = 1\n" * 30 + "\nPRESETS"), (check_budget, "Numbers and", "w " * 5500),
    (check_budget, "def toy_line(n):", "def long(n):\n" + "    n\n" * 51 + "def toy_line(n):"),
    *((check_lines, "import json", other) for other in (
        "import json; import os", "import json  #" + "." * 110, "import json\n" * 26, "torch.load('x')",
        "try: 1\nexcept: 1", "try: 1\nexcept OSError: pass", "def f():\n" + "    #\n" * 9 + "    1")),
    (check_lines, "runs/toy_dataset", "/home/me/runs"), (check_lines, "# A: ", "# B: ")]


def test_each_rule_can_fail(damage):
    rule, old, new = damage
    assert old in GOOD and list(rule(Script("toy_dataset.py", GOOD.replace(old, new, 1))))


def test_same_text_and_fix_can_fail(tmp_path):
    text = "# --- 2. Model: x\n# Keep it.\ndef norm(x):\n    return x\n\n\nLIMIT = 1\n"
    marked = text.replace("# Keep it.", "# differs from a.py: two").replace("return x", "return x, x")
    for name, one in dict(a=text, b=text.replace("Keep", "Drop"), c=marked, d=marked.replace("x, x", "0")).items():
        (tmp_path / f"{name}.py").write_text(one)
    a, b, c, d = (Script(path) for path in sorted(tmp_path.glob("*.py")))
    for wrong, scripts in ((0, [a, a, c, c]), (1, [a, a, b, c]), (1, [c, c, d]), (1, [a, Script("e.py", "LIMIT = 2")])):
        assert len(list(check_same_text(scripts))) == wrong
    assert fix("a.py:norm", tmp_path) == ["b.py"] and (tmp_path / "b.py").read_text() == text
    assert fix("c.py:norm", tmp_path) == ["d.py"] and fix("a.py:norm", tmp_path) == []


def test_tracer_can_fail(tmp_path):
    import numpy as np
    source = "def f(x):\n    x = x              # (B, T)\n    for i in range(2):\n        x = x[:, 1:]   # (B, N)\n" \
             "        y = x          # (B, N)\n    x += 1             # ({})\n    return x           # (B, T-2)\n"
    for claim, good in (("B, T-2", True), ("T, B", False), ("B", False), ("B, T, 1", False), ("C, T-2", True)):
        tracer = Tracer(Script(tmp_path / "f.py", source.format(claim)))
        tracer.fixed["C"] = 3
        assert len(tracer.missed()) == 5
        try:
            tracer.load().f(np.zeros((3, 5)))
        except AssertionError as problem:
            assert not good and "f.py:6:" in str(problem)
        else:
            assert good and not tracer.missed()
    for text, claim in {"# (B, 3 * C) x": ["B", "3*C"], "# (B,)": ["B"], "# (why)": None, "# see (B)": None}.items():
        assert parse_claim(text) == claim


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--fix":
        raise SystemExit("usage: python tests/test_house.py --fix llama3.py:RMSNorm")
    print("changed: " + (", ".join(fix(sys.argv[2])) or "nothing, all copies are equal"))
