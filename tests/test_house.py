"""The rules of the house, checked on whichever scripts lie in the repository's root.

Every rule is one function `check_...(script)` that returns a list of complaints "file:line: what is wrong: what to do".
A made-up script, GOOD, passes all of them, and a list of small damages shows that each rule can fail.

    pytest tests/test_house.py
    python tests/test_house.py --fix llama3.py:RMSNorm     push one text into all its copies (needs no pytest)

A new script may need an entry in three tables: SCENARIOS (how to reach every line with a shape comment), ALONE (small
numbers for a run, and the files it promises) and, for code that needs a GPU, UNTRACED.
"""

import ast
import difflib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import types
from collections import ChainMap, Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORCHESTRATORS = {"train_all", "compare_architectures", "visualizations", "quick_start"}   # may import scripts
DATA = {"toy_dataset", "bpe_tokenizer"}                                   # no model: fewer sections, fewer labels
TITLES = ["Config", "Model", "Objective", "Data", "Training", "Decoding", "Interchange", "Main"]
LABELS = ["Paper", "Idea", "Picture", "Symbols", "New here", "Not here", "Expect", "Asked"]
FEW_LABELS = ["Idea", "Picture", "Not here", "Expect", "Asked"]
TOP_LEVEL = {"torch", "numpy", "tqdm"}                                   # third-party imports allowed outside functions
OPTIONAL = {"triton"}                  # guarded: exists on Linux with CUDA only, so the metadata may leave it out
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}     # import name -> name on PyPI
EXEMPT = set(  # every script has its own of these
    "Config PRESETS main build_model compute_loss prepare prefill decode_step reorder "
    "config_from_hf config_to_hf import_weights export_weights".split()
)
BANNER = re.compile(r"# --- (\d)\. (" + "|".join(TITLES) + r"): .+")
MARKER = re.compile(r"# differs from \S+: .+")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Script:
    """One file's text, and what every rule wants to know about it."""

    path: Path
    text: str

    @classmethod
    def read(cls, path) -> "Script":
        return cls(Path(path), Path(path).read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def kind(self) -> str:
        return "orchestrator" if self.stem in ORCHESTRATORS else "data" if self.stem in DATA else "model"

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    @cached_property
    def comments(self) -> dict[int, tokenize.TokenInfo]:
        """Line number -> its comment. By tokens, because a string may contain a '#'."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}

    def at(self, line: int, problem: str) -> str:
        return f"{self.name}:{line}: {problem}"


SCRIPTS = [Script.read(path) for path in sorted(ROOT.glob("*.py"))]
SIBLINGS = {script.stem for script in SCRIPTS} | ORCHESTRATORS | DATA


def pytest_generate_tests(metafunc):
    # A hook and no decorators: this file must load without pytest, for --fix.
    if "script" in metafunc.fixturenames:
        metafunc.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
    if "damage" in metafunc.fixturenames:
        metafunc.parametrize("damage", DAMAGES, ids=[f"{d[0].__name__[6:]}-{i}" for i, d in enumerate(DAMAGES)])


def report(problems: list[str]) -> None:
    # raise, not assert: pytest would print the values inside an assert once more.
    if problems:
        raise AssertionError("\n".join(["", *problems]))


# ---------------------------------------------------------------------------------------- imports and metadata


def imports(node: ast.AST, into_functions: bool = True):
    """Yields (line, full module name) for every import below `node`; a relative import begins with a dot."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.lineno, "." * child.level + (child.module or "")
        elif isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in ("import_module", "__import__"):
            if child.args and isinstance(child.args[0], ast.Constant):
                yield child.lineno, str(child.args[0].value)
        if into_functions or not isinstance(child, (*FUNCTION, ast.Lambda)):
            yield from imports(child, into_functions)


def third_party(script: Script) -> set[str]:
    """Distribution names of the packages a script imports anywhere, siblings and standard library aside."""
    tops = {name.split(".")[0] for _, name in imports(script.tree)} - SIBLINGS - set(sys.stdlib_module_names) - {""}
    return {DISTRIBUTION.get(top, top) for top in tops}


def check_siblings(script: Script) -> list[str]:
    problems = []
    for line, name in imports(script.tree):
        top = name.split(".")[0]
        if name.startswith("."):
            problems.append(script.at(line, f"relative import {name!r}: a script stands alone, paste what you need"))
        elif top in ORCHESTRATORS:
            problems.append(script.at(line, f"imports the orchestrator {top}: nothing does, move the code"))
        elif top in SIBLINGS and script.kind != "orchestrator":
            problems.append(script.at(line, f"imports its sibling {top}: paste the function, with its comment above"))
    return problems


def check_pep723(script: Script) -> list[str]:
    lines = script.lines
    if lines[0] != "# /// script" or "# ///" not in lines:
        return [script.at(1, "the file must begin with a `# /// script` block that `# ///` closes")]
    end = lines.index("# ///")
    problems = []
    try:
        block = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[1:end]))
    except tomllib.TOMLDecodeError as error:
        return [script.at(1, f"the script block is no TOML: {error}")]
    if extra := set(block) - {"requires-python", "dependencies"}:
        problems.append(script.at(1, f"script block: remove {sorted(extra)}; no index, no tool tables"))
    if block.get("requires-python") != ">=3.11":
        problems.append(script.at(1, 'script block: write requires-python = ">=3.11"'))
    declared = set()
    for item in block.get("dependencies", []):
        found = re.fullmatch(r"([A-Za-z0-9._-]+)\s*>=\s*[0-9][0-9.]*", item)
        if not found:
            problems.append(script.at(1, f"script block: {item!r} must be NAME>=VERSION, a lower bound only"))
        declared.add(found[1] if found else re.split(r"[^A-Za-z0-9._-]", item)[0])
    real = third_party(script)
    if missing := real - declared - OPTIONAL:
        problems.append(script.at(1, f"script block: add {sorted(missing)}, the file imports it"))
    # An orchestrator runs other scripts, so it may also list what those import.
    used = real.union(*map(third_party, SCRIPTS)) if script.kind == "orchestrator" else real
    if unused := declared - used:
        problems.append(script.at(1, f"script block: remove {sorted(unused)}, the file never imports it"))
    if not lines[end + 1].startswith("# SPDX-License-Identifier: MIT"):
        problems.append(script.at(end + 2, "write `# SPDX-License-Identifier: MIT` right below the script block"))
    return problems


def check_header(script: Script) -> list[str]:
    header = ast.get_docstring(script.tree)
    if not header:
        return [script.at(1, "no module docstring: write the header, with its title, picture and labels")]
    start = script.tree.body[0].lineno
    problems = []
    if f"python {script.name}" not in header.split("\n")[0]:
        problems.append(script.at(start, f"the title line must show the run line `python {script.name}`"))
    for label in LABELS if script.kind == "model" else FEW_LABELS:
        if not re.search(rf"^{label} +\S", header, re.MULTILINE):
            problems.append(script.at(start, f"header: no line begins with {label!r} and a text after it"))
    return problems


def check_banners(script: Script) -> list[str]:
    problems, seen = [], []
    for line, comment in sorted(script.comments.items()):
        if comment.start[1] == 0 and comment.string.startswith("# ---"):
            found = BANNER.fullmatch(comment.string)
            number = int(found[1]) if found else 0
            if not found or TITLES.index(found[2]) + 1 != number:
                wanted = ", ".join(f"{i}. {title}" for i, title in enumerate(TITLES, 1))
                problems.append(script.at(line, f"no banner of the house: `# --- N. Title: text` with {wanted}"))
            elif seen and number <= seen[-1]:
                problems.append(script.at(line, f"banner {number} comes after {seen[-1]}: sort the sections"))
            seen.append(number)
    required = {1, 2, 3, 4, 5, 6, 8} if script.kind == "model" else {1, 8}
    for number in sorted(required - set(seen)):
        problems.append(script.at(1, f"banner missing: `# --- {number}. {TITLES[number - 1]}: ...`"))
    last = script.tree.body[-1]
    if not isinstance(last, ast.If) or ast.unparse(last.test) != "__name__ == '__main__'" or last.orelse:
        problems.append(script.at(last.lineno, 'the last statement must be `if __name__ == "__main__":`'))
    elif script.kind == "model" and "\n".join(map(ast.unparse, last.body)) != "main(parse_config(Config, PRESETS))":
        problems.append(script.at(last.lineno, "only `main(parse_config(Config, PRESETS))` belongs below it"))
    return problems


# ---------------------------------------------------------------------------------------- same name, same text


@dataclass(frozen=True)
class Block:
    first: int          # first and last line, counted from 1: the comment above, the decorators, the definition
    last: int
    text: str
    marker: str         # the line `# differs from ...`, or ""


def blocks(script: Script) -> dict[str, Block]:
    """Top-level functions, classes and UPPER_CASE constants by name."""
    found = {}
    for node in script.tree.body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            name = node.name
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 or isinstance(node, ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if not isinstance(target, ast.Name) or not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", target.id):
                continue
            name = target.id
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        # Upwards over the comment that touches it. A banner belongs to the section, not to what comes first in it.
        while first > 1 and script.lines[first - 2].startswith("#") and not script.lines[first - 2].startswith("# ---"):
            first -= 1
        lines = [line.rstrip() for line in script.lines[first - 1 : node.end_lineno]]
        marker = next((line for line in itertools.takewhile(lambda s: s[:1] == "#", lines) if MARKER.match(line)), "")
        found[name] = Block(first, node.end_lineno, "\n".join(lines), marker)
    return found


def check_same_text(scripts: list[Script]) -> list[str]:
    copies = defaultdict(list)
    for script in scripts:
        for name, block in blocks(script).items():
            if name not in EXEMPT:
                copies[name, block.marker].append((script, block))
    problems = []
    for (name, _), group in copies.items():
        usual = Counter(block.text for _, block in group).most_common(1)[0][0]
        source = next(script for script, block in group if block.text == usual)
        for script, block in group:
            if block.text != usual:
                old, new = usual.split("\n"), block.text.split("\n")
                diff = difflib.unified_diff(old, new, source.name, script.name, n=1, lineterm="")
                command = f"python tests/test_house.py --fix {source.name}:{name}"
                advice = f"run `{command}`, or mark it `# differs from {source.name}: why`"
                what = f"{name} is not the text of {source.name}: {advice}"
                problems.append(script.at(block.first, "\n    ".join([what, *itertools.islice(diff, 24)])))
    return problems


def fix(source: str, root: Path = ROOT) -> list[str]:
    """Push the block "file.py:Name" into the copies that must equal it; returns the names of the files that changed."""
    file, _, name = source.partition(":")
    scripts = {path.name: Script.read(path) for path in sorted(root.glob("*.py"))}
    if file not in scripts or name not in blocks(scripts[file]):
        raise SystemExit(f"error: no top-level definition {source}")
    if name in EXEMPT:
        raise SystemExit(f"error: every script has its own {name}")
    origin = blocks(scripts[file])[name]
    changed = {}
    for script in scripts.values():
        block = blocks(script).get(name)
        if block and block.marker == origin.marker and block.text != origin.text:
            lines = script.lines[: block.first - 1] + origin.text.split("\n") + script.lines[block.last :]
            changed[script.path] = "\n".join(lines)
    # First look whether all results are still Python, then write: each file is replaced whole or not at all.
    for path, text in changed.items():
        ast.parse(text, path.name)
    for path, text in changed.items():
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text, encoding="utf-8", newline="")
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    return [path.name for path in changed]


# ---------------------------------------------------------------------------------------- shape comments


def parse_claim(comment: str) -> list[list[str]]:
    """The shapes a comment begins with: "# (B, T), (B, 3*C) queries" -> [["B", "T"], ["B", "3*C"]]; prose -> [].

    "()" is a scalar, "(B,)" and "(B)" a vector, "..." any number of axes. A word in lower case alone in parentheses is
    prose: "# (optional)"; as a shape it is written "(rows,)".
    """
    rest, claims = comment.lstrip("#").strip(), []
    while rest.startswith("("):
        depth = itertools.accumulate((char == "(") - (char == ")") for char in rest)
        end = next((i for i, d in enumerate(depth) if d == 0), None)
        if end is None:
            break
        dims = [re.sub(r"\s*([-+*/])\s*", r"\1", dim.strip()) for dim in rest[1:end].split(",")]
        vector = len(dims) > 1 or re.search(r"[A-Z0-9]", dims[0]) or len(dims[0]) <= 1
        if not dims[-1]:
            dims.pop()
        if not vector or not all(re.fullmatch(r"[\w()+*/-]+|\.\.\.", dim) for dim in dims):
            break
        claims.append(dims)
        another = re.match(r",\s*(?=\()", rest[end + 1 :])
        rest = rest[end + 1 + another.end() :] if another else ""
    return claims


def mismatch(shape: tuple, dims: list[str], names) -> str:
    """Why `shape` is not what `dims` claims, or "". Names not seen before are bound in the mapping `names`."""
    if "..." in dims:
        start, tail = dims.index("..."), len(dims) - dims.index("...") - 1
        dims = [dim for dim in dims if dim != "..."]
        if len(shape) >= len(dims):
            shape = shape[:start] + shape[len(shape) - tail :]
    if len(shape) != len(dims):
        return f"{len(dims)} axes are claimed"
    for size, dim in zip(shape, dims, strict=True):
        if dim.isidentifier() and dim not in names:
            names[dim] = size
            continue
        try:
            value = eval(dim, {"__builtins__": {}}, names)
        except Exception as error:
            return f"cannot work out {dim}: {error}"
        if value != size:
            return f"an axis of {size} is claimed to be {dim}, which is {value}"
    return ""


def tensors(value) -> list:
    """Everything with a shape in a value, or in its tuples and lists; None, numbers and other objects drop out."""
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return [value] if hasattr(value, "shape") else []


class Tracer(ast.NodeTransformer):
    """Runs a script with every shape comment turned into a check.

    A claim is a comment like `# (B, T, C)` on the last line of an assignment or a return. The code is rewritten:

        q = self.q(x)      # (B, T, C)      ->      q = self.q(x); __shape__(q, 12, __dims__)
        return y           # (B, T, C)      ->      return __shape__(y, 14, __dims__)

    __dims__ is a local dict, new in every call: a letter is bound where it is first seen and must keep its size until
    the function returns. In a loop, letters first bound inside are bound anew in each iteration (T grows in generate).
    `fixed` holds the letters the configuration decides; a scenario may change it at any time.
    """

    def __init__(self, script: Script, skip=()):
        self.script, self.skip = script, set(skip)
        self.fixed, self.wrong, self.reached = {}, [], set()
        self.claims: dict[int, list[list[str]]] = {}
        spoken = {line: parse_claim(comment.string) for line, comment in script.comments.items()}
        self.spoken = {line: claims for line, claims in spoken.items() if claims}
        self.tree = ast.fix_missing_locations(self.visit(ast.parse(script.text, script.name)))

    def load(self) -> types.ModuleType:
        """Execute the rewritten script as a module."""
        module = types.ModuleType(f"traced_{self.script.stem}")
        module.__file__ = str(self.script.path)
        module.__dict__.update(__shape__=self.check, __dims__={})
        sys.modules[module.__name__] = module         # dataclasses and inspect look the module up by name
        exec(compile(self.tree, str(self.script.path), "exec"), module.__dict__)
        return module

    def check(self, value, line: int, dims: dict):
        """What a claim turns into; hands the value through."""
        claims, items = self.claims[line], [value]            # one claim is for all tensors in the value
        if len(claims) > 1:
            by_position = isinstance(value, (tuple, list)) and len(value) == len(claims)
            items = value if by_position else tensors(value)
            if len(claims) != len(items):
                self.fail(line, f"{len(claims)} shapes are claimed for {len(items)} tensors")
        for item, claim in zip(items, claims, strict=True):
            for tensor in tensors(item):
                self.reached.add(line)
                why = mismatch(tuple(tensor.shape), claim, ChainMap(dims, self.fixed))
                if why:
                    self.fail(line, f"claimed ({', '.join(claim)}), real shape {tuple(tensor.shape)}: {why}")
        return value

    def fail(self, line: int, text: str):
        # Also kept in a list, in case the script catches the exception.
        self.wrong.append(self.script.at(line, f"{text}: correct the comment"))
        raise AssertionError(self.wrong[-1])

    def missed(self) -> list[str]:
        """Claims that no tensor came by: an untested comment may be a lie."""
        lines = sorted(set(self.claims) - self.reached)
        advice = "no tensor was seen here: let the scenario in tests/test_house.py reach it, or drop the comment"
        return [self.script.at(line, f"{self.script.lines[line - 1].strip()}: {advice}") for line in lines]

    def call(self, value: str, line: int) -> ast.expr:
        return ast.parse(f"__shape__({value}, {line}, __dims__)", mode="eval").body

    def claimed(self, node: ast.stmt) -> bool:
        line = node.end_lineno
        comment = self.script.comments.get(line)
        # Of two statements on one line the last one is meant: only white space and ';' before the comment.
        between = self.script.lines[line - 1].encode()[node.end_col_offset :].decode()
        if line in self.spoken and between.split("#")[0].strip(" ;") == "" and comment:
            self.claims[line] = self.spoken[line]
            return True
        return False

    def assignment(self, node):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if getattr(node, "value", None) is None or not self.claimed(node):
            return node
        # unparse and parse again turns the target into an expression that reads it; (*a, b) reads as a tuple too.
        check = ast.Expr(self.call(ast.unparse(target), node.end_lineno))
        return [node, ast.copy_location(check, node)]

    visit_Assign = visit_AnnAssign = visit_AugAssign = assignment

    def visit_Return(self, node):
        if node.value is not None and self.claimed(node):
            call = self.call("None", node.end_lineno)
            call.args[0] = node.value
            node.value = ast.copy_location(call, node)
        return node

    def visit_FunctionDef(self, node):
        if node.name in self.skip:
            return node
        self.generic_visit(node)
        after_docstring = 1 if ast.get_docstring(node) is not None else 0
        node.body[after_docstring:after_docstring] = ast.parse("__dims__ = {}").body
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def loop(self, node):
        self.generic_visit(node)
        copy = f"__dims_{node.lineno}_{node.col_offset}__"
        node.body[:0] = ast.parse(f"__dims__ = dict({copy})").body
        return [*ast.parse(f"{copy} = dict(__dims__)").body, node]

    visit_For = visit_While = visit_AsyncFor = loop


# Functions left out of the tracing of a script, such as triton kernels: their lines cannot run here.
UNTRACED: dict[str, set[str]] = {"kv_cache": {"replayed_step"}, "flash_attention": {
    "forward_kernel", "query_kernel", "key_kernel", "tile_mask", "kernels", "matmul_tflops"}}


def trace_decoder_only(m, tmp_path, fixed):
    import torch

    fixed.update(C=24, H=3, D=8, F=96)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(200)))
    small = dict(n_layer=2, n_head=3, n_embd=24, block_size=16, max_steps=3, eval_every=2, device="cpu")
    m.main(m.Config(**small, batch_size=5, data=str(text), out=str(tmp_path / "text")))
    # Larger batches: there are some thousand numbers to validate, and they take one pass each time.
    numbers = str(tmp_path / "numbers")
    model, cfg = m.main(m.Config(**small, batch_size=97, data="numbers", max_new_tokens=5, out=numbers))
    m.main(m.Config(load=numbers, prompt="12=", beams=2, max_new_tokens=5, device="cpu"))
    fixed["V"] = cfg.vocab_size
    ids = torch.randint(cfg.vocab_size, (5, 7))
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0, :3] = False
    model.eval()
    with torch.no_grad():
        model(ids)
        model(ids, mask)
        cache = m.KVCache(cfg, 5, 16, like=model.lm_head.weight)
        for piece in (ids[:, :3], ids[:, 3:]):                  # a prompt in two pieces
            model(piece, cache=cache)
        m.attention(torch.randn(5, 3, 7, 8), torch.randn(5, 3, 11, 8), torch.randn(5, 3, 11, 8), m.causal_mask(7, 11))
    m.generate(model, ids, 4, mask=mask)
    m.generate(model, ids, 4, mask=mask, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
    m.beam_search(model, ids, 3, mask=mask, num_beams=4, n_best=2, eos_ids=(1,))
    m.save_pretrained(model, cfg, tmp_path / "saved")
    m.from_pretrained(tmp_path / "saved")


def trace_toy_dataset(m, tmp_path, fixed):
    import torch

    m.main(m.Config(out=str(tmp_path / "run")))
    for side in ("right", "left"):
        ids, mask = m.pad_rows([[7, 8, 9], [7], [7, 8, 9, 10, 11]], side)
    m.both_masks(mask)
    m.mask_tokens(ids, mask, 0)
    list(m.batches({"ids": torch.zeros(11, 3)}, 4, 0))


def trace_encoder_only(m, tmp_path, fixed):
    import torch

    fixed.update(C=24, H=3, D=8)
    small = dict(n_layer=2, n_head=3, n_embd=24, max_steps=3, warmup_steps=1, eval_every=2, device="cpu")
    m.main(m.Config(**small, batch_size=97, out=str(tmp_path / "run")))
    for extra in ({}, {"rounds": 2}, {"beams": 2}):
        m.main(m.Config(load=str(tmp_path / "run"), prompt=m.EXAMPLES[2], device="cpu", **extra))
    text = tmp_path / "sentences.tsv"
    text.write_text("".join(f"{'good' if i % 2 else 'bad'} film number {i}\t{i % 2}\n" for i in range(300)))
    m.main(m.Config(**small, heads="mlm", block_size=16, batch_size=37, finetune_steps=3, data=str(text),
                    out=str(tmp_path / "text")))
    for heads, labels in (("pool", 0), ("tag", 5), ("mlm", 0)):
        model = m.build_model(m.Config(heads=heads, n_labels=labels, vocab_size=43, n_embd=24, n_head=3, mask_id=5))
        ids, mask = torch.randint(1, 43, (5, 7)), torch.ones(5, 7, dtype=torch.bool)
        mask[0, :3] = False
        model(ids)
        model(ids, mask)
        m.mean_pool(model.hidden(ids, mask), mask)


def trace_encoder_decoder(m, tmp_path, fixed):
    import torch

    fixed.update(C=24, H=3, D=10, F=50)
    small = dict(n_layer=2, n_head=3, n_embd=24, head_size=10, ffn_size=50, max_steps=3, warmup_steps=1, eval_every=2,
                 device="cpu")
    m.main(m.Config(**small, batch_size=97, out=str(tmp_path / "run")))
    m.main(m.Config(load=str(tmp_path / "run"), prompt="40215", beams=3, n_best=2, device="cpu"))
    text = tmp_path / "text.tsv"
    text.write_text("".join(f"zeile {i} von vielen\tline {i} of many\n" for i in range(200)))
    m.main(m.Config(**small, block_size=30, batch_size=19, data=str(text), vocab_size=300, gated=True, n_best=1,
                    tie_weights=False, max_new_tokens=4, out=str(tmp_path / "pairs")))
    m.main(m.Config(**small, block_size=30, batch_size=19, objective="span", data="pydocs", vocab_size=300,
                    positions="sinusoidal", out=str(tmp_path / "span")))
    for positions in ("relative", "sinusoidal"):
        model = m.build_model(m.Config(**{**small, "vocab_size": 43, "positions": positions})).eval()
        src, tgt, mask = torch.randint(1, 43, (5, 7)), torch.randint(1, 43, (5, 6)), torch.ones(5, 7, dtype=torch.bool)
        mask[0, :3] = False
        model(src, tgt)
        model(src, tgt, mask)
        m.generate(model, src, 4, mask=mask, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
        m.beam_search(model, src, 3, mask=mask, num_beams=4, n_best=2, eos_ids=(1,))


def trace_llama3(m, tmp_path, fixed):
    import base64

    import torch

    fixed.update(C=24, H=6, D=10, F=50)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(200)))
    small = dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=10, ffn_size=50, block_size=16, max_steps=3,
                 eval_every=2, device="cpu")
    m.main(m.Config(**small, batch_size=5, data=str(text), rope_factor=8.0, out=str(tmp_path / "text")))
    numbers = str(tmp_path / "numbers")
    model, cfg = m.main(m.Config(**small, batch_size=97, data="numbers", max_new_tokens=5, out=numbers))
    m.main(m.Config(load=numbers, prompt="12=", beams=2, max_new_tokens=5, device="cpu"))
    fixed["V"] = cfg.vocab_size
    ids, mask = torch.randint(cfg.vocab_size, (5, 7)), torch.ones(5, 7, dtype=torch.bool)
    mask[0, :3] = False
    model.eval()
    with torch.no_grad():
        model(ids, mask)
        cache = m.KVCache(cfg, 5, 16, like=model.lm_head.weight)
        for piece in (ids[:, :3], ids[:, 3:]):
            model(piece, cache=cache)
    m.generate(model, ids, 19, mask=mask)
    m.generate(model, ids, 4, mask=mask, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
    m.beam_search(model, ids, 3, mask=mask, num_beams=4, n_best=2, eos_ids=(1,))
    m.half_split(torch.randn(60, 24), 6)
    m.save_pretrained(model, cfg, tmp_path / "saved")
    m.from_pretrained(tmp_path / "saved")
    del fixed["V"]
    lines = (f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256))
    tokenizer = m.Llama3Tokenizer("\n".join(lines))
    talker = m.build_model(m.Config(**{**small, "block_size": 64, "vocab_size": tokenizer.n_vocab}))
    answers = iter(["hello", ""])
    m.input = lambda _: next(answers)
    m.chat(talker, tokenizer, m.dataclasses.replace(talker.cfg, max_new_tokens=3))
    m.write_text(talker, tokenizer, talker.cfg, "hello", 3)


def trace_qwen3_moe(m, tmp_path, fixed):
    import torch

    fixed.update(C=24, H=6, D=10, F=50, E=5, k=3, I=16)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(200)))
    small = dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=10, ffn_size=50, block_size=16, max_steps=3,
                 n_experts=5, experts_per_token=3, expert_size=16, eval_every=2, device="cpu")
    m.main(m.Config(**small, batch_size=7, data=str(text), balance="bias", out=str(tmp_path / "text")))
    numbers = str(tmp_path / "numbers")
    model, cfg = m.main(m.Config(**small, batch_size=97, data="numbers", max_new_tokens=5, mlp_only_layers="0",
                                 out=numbers))
    m.main(m.Config(load=numbers, prompt="12=", beams=2, max_new_tokens=5, device="cpu"))
    fixed["V"] = cfg.vocab_size
    ids, mask = torch.randint(cfg.vocab_size, (9, 7)), torch.ones(9, 7, dtype=torch.bool)
    mask[0, :3] = False
    model.eval()
    with torch.no_grad():
        model(ids, mask)
        m.load_balancing_loss([layer.logits for layer in model.mixtures()], 3, mask)
        cache = m.KVCache(cfg, 9, 16, like=model.lm_head.weight)
        for piece in (ids[:, :3], ids[:, 3:]):
            model(piece, cache=cache)
    m.experts_slow(torch.randn(7, 24), torch.randint(5, (7, 3)), torch.rand(7, 3), torch.randn(5, 32, 24),
                   torch.randn(5, 24, 16))
    m.generate(model, ids, 19, mask=mask)
    m.generate(model, ids, 4, mask=mask, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
    fixed.pop("k")
    m.beam_search(model, ids, 3, mask=mask, num_beams=4, n_best=2, eos_ids=(1,))
    m.save_pretrained(model, cfg, tmp_path / "saved")
    m.from_pretrained(tmp_path / "saved")
    del fixed["V"]
    tokenizer = m.QwenTokenizer([chr(i) for i in range(256)])
    talker = m.build_model(m.Config(**{**small, "block_size": 128, "vocab_size": tokenizer.n_vocab}))
    answers = iter(["hello", ""])
    m.input = lambda _: next(answers)
    m.chat(talker, tokenizer, m.dataclasses.replace(talker.cfg, max_new_tokens=3))


def trace_kv_cache(m, tmp_path, fixed):
    import torch

    m.compiled = lambda function: function                      # the tracer does not survive the compiler
    fixed.update(C=24, H=6, D=10, F=50)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(200)))
    small = dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=10, ffn_size=50, block_size=19, max_steps=3,
                 eval_every=2, device="cpu", contexts="", window=5, sinks=3)
    m.main(m.Config(**small, batch_size=5, data=str(text), rope_factor=8.0, out=str(tmp_path / "text")))
    numbers = str(tmp_path / "numbers")
    m.main(m.Config(**small, batch_size=97, out=numbers))
    m.main(m.Config(load=numbers, prompt="12=", beams=2, max_new_tokens=5, device="cpu"))
    model = m.build_model(m.Config(**{**small, "block_size": 64, "vocab_size": 83}))
    fixed["V"] = 83
    ids, mask = torch.randint(83, (4, 7)), torch.ones(4, 7, dtype=torch.bool)
    mask[0, :3] = False
    for rung in m.RUNGS:
        one = m.on_rung(model, rung)
        m.generate(one, ids, 4, mask=mask)
        m.generate(one, ids[:1], 4, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
        m.beam_search(one, ids[:3], 3, mask=mask[:3], num_beams=4, n_best=2, eos_ids=(1,))
        if rung not in ("none", "growing"):
            m.serve(one, ids.tolist(), 3, slots=4)
    with torch.no_grad():
        model(ids, mask)
    m.times(torch.randn(17, 24), torch.randn(31, 24))
    m.climb(model, [23], prompt=11, new=2, rounds=1)
    m.save_pretrained(model, model.cfg, tmp_path / "saved")
    m.from_pretrained(tmp_path / "saved")


def trace_flash_attention(m, tmp_path, fixed):
    import torch

    fixed.update(C=24, H=3, D=8, F=96)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(200)))
    small = dict(n_layer=2, n_head=3, n_embd=24, block_size=16, max_steps=3, eval_every=2, device="cpu", lengths="")
    m.main(m.Config(**small, batch_size=5, data=str(text), out=str(tmp_path / "text")))
    numbers = str(tmp_path / "numbers")
    model, cfg = m.main(m.Config(**small, batch_size=97, data="numbers", max_new_tokens=5, out=numbers))
    m.main(m.Config(load=numbers, prompt="12=", beams=2, max_new_tokens=5, device="cpu"))
    fixed["V"] = cfg.vocab_size
    ids, mask = torch.randint(cfg.vocab_size, (5, 7)), torch.ones(5, 7, dtype=torch.bool)
    mask[0, :3] = False
    model.eval()
    with torch.no_grad():
        model(ids, mask)
    m.generate(model, ids, 19, mask=mask)
    m.generate(model, ids, 4, mask=mask, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
    m.beam_search(model, ids, 3, mask=mask, num_beams=4, n_best=2, eos_ids=(1,))
    fixed.clear()
    m.show_running_softmax()
    for options in ({}, {"window": 4}, {"causal": False}, {"keep": torch.rand(2, 11) > 0.4}):
        x = [torch.randn(2, heads, n, 10, requires_grad=True) for heads, n in ((6, 7), (3, 11), (3, 11))]
        for name in ("naive", "tiled", "sdpa"):
            how = {"tile": 5} if name == "tiled" else {}
            m.ATTENTION[name](*x, **options, **how).sum().backward()
    m.race((1, 2, 1, 9, 8), ["naive"], torch.device("cpu"), torch.float32, 1)
    m.largest_errors(torch.device("cpu"), 4)


# script -> function(module, empty folder, dict of fixed letters) that reaches every line with a shape comment.
# Choose sizes that are pairwise different: with T == D a wrong transpose has the right shape.
def trace_lora_qlora(m, tmp_path, fixed):
    import torch

    fixed.update(C=24, H=6, D=10, F=50)
    small = dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=10, ffn_size=50, block_size=31, base_steps=2,
                 max_steps=2, eval_every=2, batch_size=97, device="cpu", rank=3, rope_factor=8.0)
    numbers = str(tmp_path / "numbers")
    m.main(m.Config(**small, merge=True, out=numbers))
    m.main(m.Config(load=numbers + "/lora", prompt="12=", beams=2, max_new_tokens=5, device="cpu"))
    model = m.build_model(m.Config(**{**small, "vocab_size": 83}))
    fixed["V"] = 83
    ids, mask = torch.randint(83, (5, 7)), torch.ones(5, 7, dtype=torch.bool)
    mask[0, :3] = False
    m.quantise_model(model, double_quant=False)
    m.add_lora(model, ["q_proj", "down_proj"], 3, 8.0, dora=True)
    with torch.no_grad():
        model(ids, mask)
        cache = m.KVCache(model.cfg, 5, 16, like=model.lm_head.weight)
        for piece in (ids[:, :3], ids[:, 3:]):
            model(piece, cache=cache)
    for adapter in m.adapters(model).values():
        adapter.merge()
    m.generate(model, ids, 4, mask=mask, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
    m.generate(model, ids, 29, mask=mask)
    m.beam_search(model, ids, 3, mask=mask, num_beams=4, n_best=2, eos_ids=(1,))
    text = torch.arange(83)
    m.text_rows(text, 11, 11)


def trace_dpo(m, tmp_path, fixed):
    import json

    import torch

    fixed.update(C=24, H=6, D=10, F=50)
    small = dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=10, ffn_size=50, block_size=31, sft_steps=2,
                 max_steps=2, eval_every=2, batch_size=13, sft_batch_size=97, device="cpu", rope_factor=8.0)
    right = m.sample_answers
    rng = m.random.Random(0)
    m.sample_answers = lambda model, tokenizer, numbers, *more: right(model, tokenizer, numbers[:7], *more) and [
        tokenizer.encode(m.misspell(m.number_to_words(n), rng, 0.3) + "\n") for n in numbers]
    numbers = str(tmp_path / "numbers")
    m.main(m.Config(**small, pairs=100, nll=0.1, out=numbers))
    m.main(m.Config(load=numbers, prompt="12=", beams=2, max_new_tokens=5, device="cpu"))
    batch = torch.randint(3, 76, (5, 2, 11)), torch.randint(3, 76, (5, 2, 11)), torch.zeros(5, 2)
    model = m.build_model(m.Config(**{**small, "vocab_size": 83}))
    for loss in m.LOSSES:
        m.preference_loss(model, batch, m.Config(loss=loss))
    m.sequence_logps(model(batch[0][:, 0]), batch[1][:, 0])
    fixed["V"] = 83
    ids, mask = torch.randint(83, (5, 7)), torch.ones(5, 7, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        model(ids, mask)
        cache = m.KVCache(model.cfg, 5, 16, like=model.lm_head.weight)
        for piece in (ids[:, :3], ids[:, 3:]):
            model(piece, cache=cache)
    m.generate(model, ids, 4, mask=mask, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
    m.generate(model, ids, 29, mask=mask)
    m.beam_search(model, ids, 3, mask=mask, num_beams=4, n_best=2, eos_ids=(1,))
    (tmp_path / "x.json").write_text(json.dumps([{"instruction": "x", "chosen": "y", "rejected": "z"}]))


def trace_ppo_grpo(m, tmp_path, fixed):
    import torch

    fixed.update(C=24, H=6, D=10, F=50)
    small = dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=10, ffn_size=50, block_size=31, max_steps=2,
                 eval_every=2, batch_size=97, device="cpu", rope_factor=8.0, prompts=5, group=3, samples=7,
                 grpo_updates=2, ppo_updates=2, reinforce_updates=2, kl_beta=0.1)
    m.find_reward = lambda spec: lambda prompt, answer: float(len(answer) % 3)
    m.score_answers.__globals__["exact_reward"] = None
    judge = m.score_answers
    m.score_answers = lambda reward, prompts, answers: judge(reward, prompts, [
        "x" * (i % 2 + (i < 6)) if i < 9 else "y" for i in range(len(prompts))])
    out = str(tmp_path / "numbers")
    for variant in ("grpo", "dapo", "dr_grpo"):
        m.main(m.Config(**small, variant=variant, method="all" if variant == "grpo" else "grpo", out=out))
    m.main(m.Config(load=out, prompt="12=", beams=2, max_new_tokens=5, device="cpu"))
    m.exact_reward = lambda prompt, answer: 0.0
    model = m.build_model(m.Config(**{**small, "vocab_size": 83}))
    fixed["V"] = 83
    ids, mask = torch.randint(83, (5, 7)), torch.ones(5, 7, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        model(ids, mask)
        cache = m.KVCache(model.cfg, 5, 16, like=model.lm_head.weight)
        for piece in (ids[:, :3], ids[:, 3:]):
            model(piece, cache=cache)
    m.generate(model, ids, 4, mask=mask, temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, eos_ids=(1,))
    m.generate(model, ids, 29, mask=mask)
    m.beam_search(model, ids, 3, mask=mask, num_beams=4, n_best=2, eos_ids=(1,))
    m.times(torch.randn(17, 24), torch.randn(31, 24))


SCENARIOS = {"decoder_only": trace_decoder_only, "encoder_only": trace_encoder_only,
             "encoder_decoder": trace_encoder_decoder, "llama3": trace_llama3, "qwen3_moe": trace_qwen3_moe,
             "kv_cache": trace_kv_cache, "flash_attention": trace_flash_attention, "toy_dataset": trace_toy_dataset,
             "lora_qlora": trace_lora_qlora, "dpo": trace_dpo,
             "ppo_grpo": trace_ppo_grpo}


# ---------------------------------------------------------------------------------------- a script on its own

TRAINED = "metrics.jsonl summary.json curve.png sample.txt ckpt.pt".split()
# script -> (arguments for a run of seconds, files promised below runs/<script>/). A file name with * is a pattern.
# In every metrics.jsonl that is promised the loss must fall; name stages one by one: "sft/metrics.jsonl".
ALONE = {
    "toy_dataset": ("", ["summary.json", "*.png"]),
    "bpe_tokenizer": ("--vocab-size 300", ["summary.json", "*.png"]),
    "encoder_only": ("--max-steps 30 --warmup-steps 5 --eval-every 15 --n-layer 1 --n-embd 32", TRAINED),
    "encoder_decoder": ("--max-steps 30 --warmup-steps 5 --eval-every 15 --n-layer 1 --n-embd 32",
                        [*TRAINED, "attention.png"]),
    "decoder_only": ("--max-steps 30 --eval-every 15 --data pydocs --n-layer 2 --n-embd 32 --n-head 2", TRAINED),
    "llama3": ("--max-steps 30 --eval-every 15 --data pydocs --n-layer 2 --n-embd 32 --n-head 2", TRAINED),
    "qwen3_moe": ("--max-steps 30 --eval-every 30 --data pydocs --n-layer 1 --n-embd 32 --n-head 2",
                  [*TRAINED, "expert_load.png"]),
    "kv_cache": ("--max-steps 30 --eval-every 15 --n-layer 1 --n-embd 32 --n-head 2 --rung gqa --contexts=", TRAINED),
    "flash_attention": ("--max-steps 30 --eval-every 15 --data pydocs --n-layer 1 --n-embd 32 --n-head 2 --lengths=",
                        TRAINED),
    "lora_qlora": ("--base-steps 30 --max-steps 30 --eval-every 15 --n-layer 1 --n-embd 32 --n-head 2",
                   [*(f"{stage}/{name}" for stage in ("base", "full", "lora", "qlora")
                      for name in ("metrics.jsonl", "ckpt.pt")), "lora/adapter_model.safetensors", "base/config.json",
                    "summary.json", "sample.txt", "curve.png", "comparison.png", "singular_values.png"]),
    "dpo": ("--sft-steps 400 --sft-batch-size 64 --max-steps 20 --eval-every 10 --pairs 150 --no-compare",
            ["sft/metrics.jsonl", "sft/ckpt.pt", "dpo/metrics.jsonl", "dpo/ckpt.pt", "dpo/preferences.jsonl",
             "summary.json", "sample.txt", "curve.png", "preferences.png"]),
    "ppo_grpo": ("--max-steps 250 --batch-size 64 --samples 40 --prompts 10 --group 4 --grpo-updates 3 --ppo-updates 3 "
                 "--reinforce-updates 3",
                 ["sft/metrics.jsonl", "sft/ckpt.pt", "ppo/ckpt.pt", "grpo/ckpt.pt", "reinforce/ckpt.pt",
                  "summary.json", "sample.txt", "curve.png", "learning.png"]),
}


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "tokens_per_second")} for row in rows]


def check_alone(script: Script, args: str, promised: list[str], tmp_path: Path, run_script) -> list[str]:
    """Copy the script into two empty folders, run it there, look at what it left and compare."""
    problems, numbers = [], []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        shutil.copy(script.path, folder / script.name)
        done = run_script(folder / script.name, *args.split(), cwd=folder)
        if done.returncode != 0:
            return [script.at(1, f"`python {script.name} {args}` exits {done.returncode}:\n{done.stderr[-2000:]}")]
        runs = folder / "runs" / script.stem
        strangers = {path.name for path in folder.iterdir()} - {script.name, "runs", "data"}
        if (folder / "runs").is_dir():
            strangers |= {f"runs/{path.name}" for path in (folder / "runs").iterdir()} - {f"runs/{script.stem}"}
        if strangers:
            problems.append(script.at(1, f"leaves {sorted(strangers)}: write below runs/{script.stem}/ only"))
        for pattern in promised:
            found = sorted(runs.glob(pattern))
            if not any(path.stat().st_size for path in found):
                problems.append(script.at(1, f"promises runs/{script.stem}/{pattern} and leaves none, or an empty one"))
            elif found[0].name == "metrics.jsonl":
                rows = [row for row in read_metrics(found[0]) if row.get("loss") is not None and "step" in row]
                if len(rows) < 2 or not rows[-1]["loss"] < rows[0]["loss"]:
                    falls = f"{[row['loss'] for row in rows]}"
                    problems.append(script.at(1, f"the loss in {pattern} does not fall: {falls}"))
        summary = runs / "summary.json"
        result = {str(path.relative_to(runs)): read_metrics(path) for path in sorted(runs.rglob("metrics.jsonl"))}
        result["val_loss"] = json.loads(summary.read_text()).get("val_loss") if summary.is_file() else None
        numbers.append(result)
    for key in numbers[0].keys() | numbers[1].keys():
        if numbers[0].get(key) != numbers[1].get(key):
            pair = f"\n    {str(numbers[0].get(key))[-300:]}\n    {str(numbers[1].get(key))[-300:]}"
            problems.append(script.at(1, f"{key}: the same seed gave other numbers in a second run{pair}"))
    return problems


# ---------------------------------------------------------------------------------------- comments, lines, words


def line_kinds(script: Script) -> list[str]:
    """For each line one of "blank", "comment" (a comment and nothing else), "doc" and "code"."""
    docs = set()
    for node in ast.walk(script.tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION)) and ast.get_docstring(node) is not None:
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    full = {line for line, comment in script.comments.items() if not comment.line[: comment.start[1]].strip()}
    return [
        "blank" if not text.strip() else "doc" if line in docs else "comment" if line in full else "code"
        for line, text in enumerate(script.lines, 1)
    ]


def check_comment_share(script: Script) -> list[str]:
    kinds, problems = line_kinds(script), []
    count = Counter(kinds)
    share = (count["comment"] + count["doc"]) / max(1, len(kinds) - count["blank"])
    if share < 0.30:
        problems.append(script.at(1, f"{share:.0%} of the lines are comments or docstrings, the floor is 30 %"))
    inside = set()
    for node in ast.walk(script.tree):
        if isinstance(node, FUNCTION):
            inside.update(range(node.lineno, node.end_lineno + 1))
    code = comment = 0
    for line, kind in enumerate([*kinds, "doc"], 1):
        if kind in ("comment", "doc"):
            if code > 25:
                problems.append(script.at(line - 1, f"{code} code lines without a comment end here: explain a step"))
            code = 0
        code += kind == "code"
        comment = comment + 1 if kind == "comment" and line in inside else 0
        if comment == 9:
            problems.append(script.at(line, "9 comment lines in a row inside a function: move them above it"))
    return problems


def check_lines_and_words(script: Script) -> list[str]:
    problems = []
    for line, text in enumerate(script.lines, 1):
        if len(text) > 120:
            problems.append(script.at(line, f"{len(text)} columns, 120 are allowed: break the line"))
        if re.search(r"(?<![\w.])(/home/|/Users/|/root/|[A-Za-z]:\\+Users)", text):
            problems.append(script.at(line, "a path of one machine: make it relative"))
    for node in ast.walk(script.tree):
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(s, (ast.Pass, ast.Continue)) or ast.unparse(s) == "..." for s in node.body)
            everything = node.type is not None and ast.unparse(node.type) in ("Exception", "BaseException")
            if node.type is None or everything and silent:
                problems.append(script.at(node.lineno, "swallows every error: name the exception you expect"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords):
                problems.append(script.at(node.lineno, "torch.load without weights_only=True runs code from the file"))
    allowed = TOP_LEVEL | OPTIONAL | set(sys.stdlib_module_names)
    allowed |= SIBLINGS if script.kind == "orchestrator" else set()
    for line, name in imports(script.tree, into_functions=False):
        if name.split(".")[0] not in allowed:
            problems.append(script.at(line, f"import {name} inside the function that uses it"))
    return problems


def check_import_is_silent(script: Script, folder: Path) -> list[str]:
    """Import the file in a fresh process, in an empty folder."""
    # A script run from the command line finds files beside it; orchestrators rely on that, hence sys.path.
    code = (
        "import sys, importlib.util; from pathlib import Path;"
        "p = Path(sys.argv[1]); sys.path.insert(0, str(p.parent));"
        "s = importlib.util.spec_from_file_location(p.stem, p); m = importlib.util.module_from_spec(s);"
        "sys.modules[p.stem] = m; s.loader.exec_module(m)"
    )
    command = [sys.executable, "-I", "-B", "-c", code, str(script.path.resolve())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    problems = []
    if done.returncode != 0:
        problems.append(script.at(1, f"cannot be imported:\n{done.stderr[-2000:]}"))
    if done.stdout:
        problems.append(script.at(1, f"importing it prints {done.stdout[:200]!r}: move the code into main"))
    if left := sorted(path.name for path in folder.iterdir()):
        problems.append(script.at(1, f"importing it writes {left}: move the code into main"))
    return problems


def check_questions(script: Script) -> list[str]:
    starts = [line.strip()[:4] for line in script.lines]
    return [
        script.at(line, "a question without an answer: `# A:` belongs within the next 4 lines")
        for line, start in enumerate(starts, 1)
        if start == "# Q:" and "# A:" not in starts[line : line + 4]
    ]


# ---------------------------------------------------------------------------------------- the tests


def test_no_sibling_imports(script):
    report(check_siblings(script))


def test_nothing_else_imports_an_orchestrator():
    problems = []
    for path in sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]):
        other = Script.read(path)
        problems += [p for p in check_siblings(other) if "imports the orchestrator" in p]
    report(problems)


def test_pep723(script):
    report(check_pep723(script) + check_header(script))


def test_banners(script):
    report(check_banners(script))


def test_same_name_same_text():
    report(check_same_text(SCRIPTS))


def test_shape_comments(script, tmp_path, monkeypatch):
    tracer = Tracer(script, UNTRACED.get(script.stem, ()))
    if not tracer.claims:
        return
    if script.stem not in SCENARIOS:
        advice = "shape comments, but no scenario: add one to SCENARIOS in tests/test_house.py"
        report([script.at(min(tracer.claims), advice)])
    monkeypatch.chdir(tmp_path)
    SCENARIOS[script.stem](tracer.load(), tmp_path, tracer.fixed)
    report(tracer.wrong + tracer.missed())


def test_alone(script, tmp_path, run_script):
    if script.kind == "orchestrator":
        return
    if script.stem not in ALONE:
        report([script.at(1, "never run on its own: add arguments and promised files to ALONE in tests/test_house.py")])
    report(check_alone(script, *ALONE[script.stem], tmp_path, run_script))


def test_comment_share(script):
    report(check_comment_share(script))


def test_lines_and_words(script):
    report(check_lines_and_words(script))


def test_import_is_silent(script, tmp_path):
    report(check_import_is_silent(script, tmp_path))


def test_questions(script):
    report(check_questions(script))


# ---------------------------------------------------------------------------------------- can every rule fail?

GOOD = '''\
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26"]
# ///
# SPDX-License-Identifier: MIT
"""
A LINE THROUGH POINTS                python mini.py

Paper    Legendre 1805
Idea     walk down the squared error of a line
Picture  x (B, C) -> x @ w -> error
Symbols  B batch   C features
New here everything
Not here a bias
Expect   loss 0
Asked    Why a mean and no sum?
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# --- 1. Config: two numbers -------------------------------------------------
@dataclass
class Config:
    steps: int = 5      # how often to walk
    seed: int = 0       # of the points

PRESETS = {}

def parse_config(cls, presets, argv=None):
    return cls()

# --- 2. Model: one vector ---------------------------------------------------
# The scale of w does not matter: the problem is convex.
def predict(w, x):
    y = x @ w                                               # (B,)
    return y                                                # (B,)

# --- 3. Objective: the mean squared error -----------------------------------
def error(w, x, y):
    return ((predict(w, x) - y) ** 2).mean()                # () a scalar

# --- 4. Data: points on a line ----------------------------------------------
def points(rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3))                          # (B, C)
    return x, x @ np.arange(3.0)                            # (B, C), (B,)

# --- 5. Training: by hand ---------------------------------------------------
def train(cfg, out):
    x, y = points(8, cfg.seed)                              # (B, C), (B,)
    w = np.zeros(3)                                         # (C,)
    lines = []
    for step in range(cfg.steps):
        # Q: Why divide by len(x)?
        # A: The step size then does not depend on the number of points.
        w -= 0.3 * x.T @ (predict(w, x) - y) / len(x)       # (C,)
        lines.append(json.dumps({"step": step, "loss": error(w, x, y), "seconds": id(w)}))
    (out / "metrics.jsonl").write_text("\\n".join(lines))
    return w                                                # (C,)

# --- 6. Decoding: nothing to decode -----------------------------------------

# --- 8. Main: run it --------------------------------------------------------
def main(cfg):
    out = Path("runs/mini")
    out.mkdir(parents=True, exist_ok=True)
    return train(cfg, out), cfg                             # (C,)

if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
'''


def mini(old: str = "", new: str = "", name: str = "mini.py") -> Script:
    assert old in GOOD
    return Script(Path(name), GOOD.replace(old, new, 1) if old else GOOD)


CODE, SAID = "    x = 1\n", "    # why\n"
LONG = "\ndef long():\n" + (CODE * 20 + SAID) * 9 + CODE
DAMAGES = [
    # (rule, text to replace, replacement, what the complaint must say)
    (check_siblings, "import json", "import toy_dataset", r"mini.py:\d+: .*sibling toy_dataset"),
    (check_siblings, "    out = Path(", "    import train_all\n    out = Path(", "orchestrator train_all"),
    (check_siblings, "    out = Path(", "    __import__('bpe_tokenizer')\n    out = Path(", "sibling bpe_tokenizer"),
    (check_siblings, "import json", "from . import json", "relative"),
    (check_pep723, "# /// script\n", "\n", "must begin"),
    (check_pep723, '["numpy>=1.26"]', '["numpy>=1.26"', "no TOML"),
    (check_pep723, ">=3.11", ">=3.10", "requires-python"),
    (check_pep723, "numpy>=1.26", "numpy==1.26", "lower bound"),
    (check_pep723, "numpy>=1.26", "numpy>=1.26,<3", "lower bound"),
    (check_pep723, "numpy>=1.26", "numpy @ https://example.org/numpy.whl", "lower bound"),
    (check_pep723, "# ///\n", "# [tool.uv]\n# index-url = 'x'\n# ///\n", "no index"),
    (check_pep723, '["numpy>=1.26"]', "[]", r"add \['numpy'\]"),
    (check_pep723, '"]', '", "torch>=2.11"]', r"remove \['torch'\]"),
    (check_pep723, "    out = Path(", "    from PIL import Image\n    out = Path(", r"add \['pillow'\]"),
    (check_pep723, "# SPDX-License-Identifier: MIT", "# free", "SPDX"),
    (check_header, "python mini.py", "", "run line"),
    *[(check_header, f"\n{label} ", f"\n {label} ", label) for label in LABELS],
    (check_header, "\nExpect   loss 0", "\nExpect   ", "Expect"),
    (check_header, '"""\nA LINE', 'X = """\nA LINE', "no module docstring"),
    (check_banners, "# --- 3. Objective: ", "# --- 3. Loss: ", r"mini.py:\d+: no banner"),
    (check_banners, "# --- 3. Objective: ", "# --- 4. Objective: ", "no banner"),
    (check_banners, "# --- 6. Decoding: ", "# --- 2. Model: ", "after 5"),
    (check_banners, "# --- 4. Data: ", "# 4. Data: ", "missing: `# --- 4. Data"),
    (check_banners, 'if __name__ == "__main__":', "if True:", "last statement"),
    (check_banners, "main(parse_config(Config, PRESETS))", "main(Config())", "belongs below it"),
    (check_comment_share, "\nif __name__", LONG + "\nif __name__", "30 %"),
    (check_comment_share, "    w = np.zeros(3)", CODE * 26 + "    w = np.zeros(3)", "code lines without"),
    (check_comment_share, "    w = np.zeros(3)", SAID * 9 + "    w = np.zeros(3)", "9 comment lines"),
    (check_lines_and_words, "# how often to walk", "# how often to walk" + "." * 90, "columns"),
    (check_lines_and_words, "runs/mini", "/home/me/mini", "one machine"),
    (check_lines_and_words, "    out = Path(", "    try: 1\n    except: raise\n    out = Path(", "swallows"),
    (check_lines_and_words, "    out = Path(", "    try: 1\n    except Exception: pass\n    out = Path(", "swallows"),
    (check_lines_and_words, "    out = Path(", "    torch.load('x', 'cpu')\n    out = Path(", "weights_only"),
    (check_lines_and_words, "import json", "import matplotlib.pyplot as plt", "inside the function"),
    (check_lines_and_words, "import json", "if True:\n    import requests", "inside the function"),
    (check_questions, "# A: The", "# The", r"mini.py:\d+: a question"),
]


def test_the_made_up_script_is_good():
    rules = {damage[0] for damage in DAMAGES}
    report([problem for rule in rules for problem in rule(mini())])
    # Fewer sections and labels are fine for a data script, imports of siblings for an orchestrator.
    short = mini("Paper    Legendre 1805\n", name="toy_dataset.py")
    report(check_banners(mini("# --- 6. Decoding", "# 6. Decoding", "toy_dataset.py")))
    assert [p for p in check_header(short) if "python toy_dataset.py" not in p] == []
    report(check_siblings(mini("import json", "import toy_dataset", "train_all.py")))


def test_each_rule_can_fail(damage):
    rule, old, new, words = damage
    problems = rule(mini(old, new))
    assert any(re.search(words, problem) for problem in problems), problems or "the rule did not notice"


def test_import_noise_is_noticed(tmp_path):
    for i, line in enumerate(["", "print('hello')\n", "open('x', 'w')\n", "1 / 0\n"]):
        (tmp_path / f"{i}.py").write_text(line)
        (tmp_path / f"folder{i}").mkdir()
        problems = check_import_is_silent(Script.read(tmp_path / f"{i}.py"), tmp_path / f"folder{i}")
        assert len(problems) == (i > 0)


def test_alone_can_fail(tmp_path, run_script):
    damages = [
        ("", "", None),
        ("range(cfg.steps)", "range(1 / 0)", "exits 1"),
        ("import json", "import json, torch_of_a_sibling", "exits 1"),
        ('Path("runs/mini")', 'Path("runs/other")', r"leaves \['runs/other'\]"),
        ("0.3 * x.T", "-0.3 * x.T", "does not fall"),
        ("default_rng(seed)", "default_rng()", "other numbers"),
        ('(out / "metrics.jsonl")', '(out / "log.txt")', "promises runs/mini/metrics.jsonl"),
    ]
    for i, (old, new, words) in enumerate(damages):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "mini.py").write_text(mini(old, new).text)
        problems = check_alone(Script.read(folder / "mini.py"), "", ["metrics.jsonl"], folder, run_script)
        assert bool(problems) == bool(words) and (not words or re.search(words, "\n".join(problems))), problems


# ---------------------------------------------------------------------------------------- tests of --fix

SHARED = "# --- 2. Model: x\n# Keep the scale.\n# Drop the mean.\n@cache\ndef norm(x):\n    return x\n"
MARKED = SHARED.replace("# Drop the mean.", "# differs from a.py: two returns").replace("return x", "return x, x")


def test_same_name_same_text_can_fail():
    a = Script(Path("a.py"), SHARED)
    assert check_same_text([a, Script(Path("b.py"), "import os\n" + SHARED.replace("2. Model", "3. Data"))]) == []
    assert check_same_text([a, Script(Path("b.py"), MARKED), Script(Path("c.py"), MARKED)]) == []
    changes = [("return x", "return -x"), ("Drop", "Forget"), ("@cache\n", ""), ("# Keep the scale.\n", "")]
    for old, new in changes:
        (problem,) = check_same_text([a, a, Script(Path("b.py"), SHARED.replace(old, new))])
        assert problem.startswith("b.py:2: norm ") and "--fix a.py:norm" in problem
        assert re.search(rf"\n    -.*{re.escape(old.strip())}", problem)
    # Copies with one marker are compared with each other; two different markers are two texts.
    other = MARKED.replace("x, x", "x, 0")
    assert len(check_same_text([a, Script(Path("b.py"), MARKED), Script(Path("c.py"), other)])) == 1
    assert check_same_text([a, Script(Path("b.py"), MARKED), Script(Path("c.py"), other.replace("two", "2"))]) == []
    # Constants count, exempt names and lower-case variables do not.
    assert len(check_same_text([Script(Path("a.py"), "LIMIT = 1\n"), Script(Path("b.py"), "LIMIT: int = 2\n")])) == 1
    for free in ("PRESETS", "limit"):
        assert check_same_text([Script(Path("a.py"), f"{free} = 1"), Script(Path("b.py"), f"{free} = 2")]) == []


def test_fix_pushes_one_text(tmp_path):
    changed = "# --- 4. Data: y\n# Old words.\ndef norm(x):\n    return 0\n\n\ndef rest():\n    pass"
    texts = {"a.py": SHARED, "b.py": changed, "c.py": MARKED, "d.py": MARKED.replace("x, x", "0"), "e.py": "x = 1\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "b.py").chmod(0o755)
    assert fix("a.py:norm", tmp_path) == ["b.py"]
    assert (tmp_path / "b.py").read_text() == SHARED.replace("2. Model: x", "4. Data: y") + "\n\ndef rest():\n    pass"
    assert (tmp_path / "b.py").stat().st_mode & 0o777 == 0o755
    # A marked source goes to the copies with its marker, and to no others.
    assert fix("c.py:norm", tmp_path) == ["d.py"] and (tmp_path / "d.py").read_text() == MARKED
    assert check_same_text([Script.read(path) for path in sorted(tmp_path.glob("*.py"))]) == []
    assert fix("a.py:norm", tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(texts)
    for unknown in ("a.py:nothing", "z.py:norm", "a.py"):
        try:
            fix(unknown, tmp_path)
        except SystemExit as error:
            assert str(error).startswith("error: ")
        else:
            raise AssertionError(f"{unknown} was accepted")


# ---------------------------------------------------------------------------------------- tests of the tracer


def traced(body: str, tmp_path: Path, **fixed) -> tuple[types.ModuleType, Tracer]:
    path = tmp_path / "made_up.py"
    path.write_text("import numpy as np\n" + body)
    tracer = Tracer(Script.read(path))
    tracer.fixed.update(fixed)
    return tracer.load(), tracer


def complaint(function, *args) -> str:
    """The message of the AssertionError that the call must raise."""
    try:
        function(*args)
    except AssertionError as error:
        return str(error)
    raise AssertionError("no complaint")


def test_tracer_on_the_made_up_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracer = Tracer(mini(), ())
    module = tracer.load()
    assert len(tracer.claims) == 10 and len(tracer.missed()) == 10
    module.main(module.Config())
    report(tracer.missed() + tracer.wrong)
    tracer.fixed["C"] = 4
    assert "an axis of 3 is claimed to be C, which is 4" in complaint(module.points, 8, 0) and tracer.wrong


def test_tracer_reads_comments():
    claims = {
        "# (B, H, T, D)": [["B", "H", "T", "D"]], "# (B, T), (B, 3 * C): (see, there)": [["B", "T"], ["B", "3*C"]],
        "# (B,)": [["B"]], "#(B)": [["B"]], "# ()": [[]], "# (..., C//H)": [["...", "C//H"]], "# (rows,)": [["rows"]],
        "# (B*(T-1), V) flat": [["B*(T-1)", "V"]], "# (k, 2)": [["k", "2"]], "# (B, T) (not, this)": [["B", "T"]],
        "# (optional)": [], "# (Vaswani et al. 2017, section 3)": [], "# prose (B, T)": [], "# (B, T": [],
    }
    assert {comment: parse_claim(comment) for comment in claims} == claims


def test_tracer_compares(tmp_path):
    source = """
def f(x):
    '''doc'''
    y = x.reshape(-1)      # (B*T,)
    return y               # (N,)

def g(x):
    z = x                  # (B, T)
    z = z[:, 1:]; z = z    # (B, T-1)
    w: object = (z[..., None]
                 + 0)      # (..., T-1, 1) the last line carries the comment
    w += 1                 # (B, T-1, 1)
    return w               # (B, U+1, 1)

def h(x):
    box = {}
    box["x"] = x           # (B, 5)
    mask = None            # (B, T)
    size = x.shape[0]      # (B,)
    return box["x"].T      # (T, B)
"""
    import numpy as np

    module, tracer = traced(source, tmp_path, C=7)
    x = np.zeros((2, 5))
    assert module.f.__doc__ == "doc" and module.__file__.endswith("made_up.py")
    assert re.search(r"made_up.py:5: claimed \(B\*T\), real shape \(10,\): .*'B'", complaint(module.f, x))
    assert "made_up.py:14:" in complaint(module.g, x) and "'U'" in tracer.wrong[-1]       # all before it holds
    module.h(x)
    assert "claimed (B, 5), real shape (5, 2): an axis of 2" in complaint(module.h, x.T)
    assert "2 axes are claimed" in complaint(module.h, x[0])
    # Nothing with a shape came by the two lines with None and an int.
    assert [problem.split(":")[1] for problem in tracer.missed()] == ["6", "19", "20"]


def test_tracer_binds_per_call_and_per_iteration(tmp_path):
    source = """
def grow(x, n):
    first = x                              # (B, P)
    for _ in range(n):
        x = np.concatenate([x, x], 1)      # (B, T)
        if n > 1:
            y = x[:, 1:]                   # (B, T-1)
    while n > 5:
        def inner(q):
            q = q                          # (T, B)
            return q                       # (T, B)
        x = inner(x)                       # (B, T)
        n = 0
    return first                           # (B, P)

def bad(x):
    for _ in range(2):
        x = x[1:]                          # (B, T)
        y = x[:, 1:]                       # (B, T)

def outer(x):
    x = x                                  # (B,)
    for _ in range(2):
        x = x[1:]                          # (B,)
"""
    import numpy as np

    module, tracer = traced(source, tmp_path)
    module.grow(np.zeros((2, 5)), 3)
    module.grow(np.zeros((3, 4)), 6)           # other sizes in another call
    report(tracer.wrong)
    assert "made_up.py:20: claimed (B, T)" in complaint(module.bad, np.zeros((4, 6)))     # equal inside an iteration
    assert "made_up.py:25: claimed (B)" in complaint(module.outer, np.zeros(6))           # B was bound before the loop


def test_tracer_walks_tuples(tmp_path):
    source = """
def split(x):
    q, (k, n), *v = x, (x, None), x    # (B, T)
    a, b = x, x.T                      # (B, T), (T, B)
    a, b = x, None                     # (B, T), (T, B)
    return x, x.T, 3                   # (B, T), (T, B)

def one(x):
    return x, x.T                      # (B, T)

def few(x):
    return x, x, x                     # (B, T), (B, T)

class Thing:
    def __init__(self, x):
        self.a, self.b = x, x          # (B, T)
        self.c = lambda: x
"""
    import numpy as np

    module, tracer = traced(source, tmp_path)
    x = np.zeros((2, 5))
    assert module.split(x)[2] == 3 and module.Thing(x).a is x
    assert "made_up.py:10:" in complaint(module.one, x)
    assert "2 shapes are claimed for 3 tensors" in complaint(module.few, x)
    assert [problem.split(":")[1] for problem in tracer.missed()] == ["13"]


def test_tracer_skips_named_functions(tmp_path):
    script = Script(tmp_path / "made_up.py", "def kernel(x):\n    return x  # (BLOCK, D)\n")
    assert len(Tracer(script).claims) == 1 and Tracer(script, {"kernel"}).claims == {}


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--fix":
        raise SystemExit("usage: python tests/test_house.py --fix llama3.py:RMSNorm")
    print("changed: " + (", ".join(fix(sys.argv[2])) or "nothing, all copies are equal"))
