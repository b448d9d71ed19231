"""Run a script as a reader would and keep what it reached in results/NAME.json, until train_all.py is rebuilt.

    python benchmarks/record.py decoder_only shakespeare --data shakespeare        --seeds 1337 1338 1339
    python benchmarks/record.py decoder_only pydocs      --data pydocs             --seeds 1337
    python benchmarks/record.py toy_dataset  default                               --seeds 1337

A run is kept with its arguments and a hash of the code that made it. Its pictures become results/NAME[_RUN]_*.png.
"""
import argparse
import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_hash(path):
    """SHA-256 of a script without comments and docstrings: words may change, a run's code may not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=2)
    args, flags = parser.parse_known_args()
    script, kept = ROOT / f"{args.name}.py", []
    for seed in args.seeds or [None]:
        with tempfile.TemporaryDirectory() as out:
            arguments = [*flags, *([] if seed is None else ["--seed", str(seed)])]
            subprocess.run([sys.executable, str(script), *arguments, "--out", out], check=True, cwd=out,
                           env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
            summary = json.loads(Path(out, "summary.json").read_text(encoding="utf-8"))
            summary["config"].pop("out")
            # Rows with an evaluation are enough for a curve. Technique scripts keep few: {method: rows}.
            if isinstance(summary.get("history", []), list):
                summary["history"] = [row for row in summary.get("history", []) if "val_loss" in row]
            kept.append(summary | {"arguments": arguments, "code": code_hash(script)})
            for picture in Path(out).glob("*.png") if len(kept) == 1 else ():
                middle = "" if args.run in ("default", "shakespeare", "numbers") else f"_{args.run}"
                shutil.copy(picture, ROOT / "results" / f"{args.name}{middle}_{picture.name}")
    path = ROOT / "results" / f"{args.name}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    results["runs"][args.run] = kept
    results["environment"] = {"cores": os.cpu_count(), "threads": args.threads, "python": platform.python_version(),
                              "system": platform.system()}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {args.run} {[run.get('val_loss') for run in kept]}")


if __name__ == "__main__":
    main()
