"""The same search over learning rates for several scripts, so that a comparison is not one of tuned against untuned.

    python benchmarks/lr_search.py decoder_only llama3                 Tiny Shakespeare, the laptop preset of each
    python benchmarks/lr_search.py decoder_only llama3 --rates 1e-3 3e-3 --steps 200

Every run has one thread and --jobs of them go side by side: losses do not depend on that, times do, and none is quoted.
Writes results/lr_search.json and lr_search.png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RATES = (1e-3, 2e-3, 3e-3, 4e-3, 6e-3)


def run(script, rate, steps, seed):
    """-> (validation loss on the whole split, parameters) of one run."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / f"{script}.py"), "--data", "shakespeare", "--lr", str(rate),
                   "--max-steps", str(steps), "--eval-every", str(steps), "--seed", str(seed), "--device", "cpu",
                   "--out", out]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        summary = json.loads((Path(out) / "summary.json").read_text())
    print(f"{script:14} lr {rate:g}: {summary['val_loss']:.4f}", flush=True)
    return summary["val_loss"], summary["params"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    pairs = [(script, rate) for rate in args.rates for script in args.scripts]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda pair: run(*pair, args.steps, args.seed), pairs))
    result = {"data": "Tiny Shakespeare, whole validation split, nats per character", "steps": args.steps,
              "seed": args.seed, "scripts": {}}
    for (script, rate), (loss, parameters) in zip(pairs, found, strict=True):
        entry = result["scripts"].setdefault(script, {"parameters": parameters, "val_loss": {}})
        entry["val_loss"][f"{rate:g}"] = round(loss, 4)
    for script, entry in result["scripts"].items():
        entry["best_rate"], entry["best"] = min(entry["val_loss"].items(), key=lambda item: item[1])
        print(f"{script}: best {entry['best']:.4f} at lr {entry['best_rate']}")
    (ROOT / "results" / "lr_search.json").write_text(json.dumps(result, indent=2) + "\n")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4), dpi=120)
    for script, entry in result["scripts"].items():
        rates = [float(rate) for rate in entry["val_loss"]]
        ax.plot(rates, list(entry["val_loss"].values()), "o-", label=f"{script}.py, {entry['parameters']:,} parameters")
    ax.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss, nats per character",
           title=f"Tiny Shakespeare, {args.steps:,} steps: the same search for all")
    ax.set_xticks(sorted(args.rates), [f"{rate:g}" for rate in sorted(args.rates)])
    ax.minorticks_off()
    ax.legend()
    fig.tight_layout()
    fig.savefig(ROOT / "results" / "lr_search.png")


if __name__ == "__main__":
    main()
