"""Run the scripts as a user would, keep what they reached, and write it where it is quoted.

    python benchmarks/record.py decoder_only bpe_tokenizer toy_dataset     run, write results/<script>.json and pictures
    python benchmarks/record.py encoder_decoder:numbers                    one kind of runs again, the others stay
    python benchmarks/record.py --readme                                   no runs: only refresh what quotes the results

Measured numbers are never typed: results/*.json come from runs, the `Expect` paragraph and the time in a script's
header and the README's tables between <!-- begin X --> and <!-- end X --> come from results/*.json. A test checks that
they agree.
"""
import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
# script -> {what: (arguments, seeds)}. Three seeds where a figure is quoted, since one may be lucky.
RUNS = {
    "decoder_only": {"shakespeare": ("--data shakespeare", (1337, 1, 2)),
                     "pydocs": ("--data pydocs", (1337,)),
                     "numbers": ("--preset numbers", (1337, 1, 2))},
    "encoder_only": {"numbers": ("", (1337, 1, 2)), "sst2": ("--preset sst2", (1337,))},
    "encoder_decoder": {"numbers": ("", (1337, 1, 2)), "multi30k": ("--preset multi30k", (1337,)),
                        "span": ("--preset span", (1337,))},
    "llama3": {"shakespeare": ("--data shakespeare", (1337, 1, 2)), "numbers": ("--preset numbers", (1337, 1, 2))},
    "qwen3_moe": {"shakespeare": ("--data shakespeare", (1337, 1, 2)),
                  "dense": ("--data shakespeare --n-experts 0", (1337, 1, 2)),
                  "bias": ("--data shakespeare --balance bias", (1337,)),
                  "none": ("--data shakespeare --balance none", (1337,)),
                  "numbers": ("--preset numbers", (1337,))},
    "kv_cache": {"numbers": ("", (1337,)), "125m": ("--preset 125m", (1337,)),
                 "text": ("--preset text --data shakespeare --contexts=", (1337,))},
    "flash_attention": {"shakespeare": ("--data shakespeare", (1337,)),
                        "naive": ("--data shakespeare --attention naive --lengths=", (1337,))},
    "lora_qlora": {"numbers": ("", (1337, 1, 2)), "all": ("--examples 0", (1337,)),
                   "lower": ("--lr 5e-3 --full-lr 2e-3", (1337,)), "higher": ("--lr 2e-2 --full-lr 8e-3", (1337,))},
    "dpo": {"numbers": ("", (1337, 1, 2, 3, 4)), "ipo": ("--loss ipo --no-compare", (1337,)),
            "simpo": ("--loss simpo --no-compare", (1337,)), "flipped": ("--flip 0.1 --no-compare", (1337,)),
            "flipped-cdpo": ("--flip 0.1 --loss cdpo --no-compare", (1337,)),
            "nll": ("--carrier all --nll 0.2 --no-compare", (1337,))},
    "ppo_grpo": {"numbers": ("", (1337, 1, 2, 3, 4))},
    "bpe_tokenizer": {"shakespeare": ("--data shakespeare", (None,))},
    "toy_dataset": {"default": ("", (1337,))},
}
THREADS = 2


def write(path, text):
    """Atomically, so that an interrupted run leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def cpu_name():
    """The processor's name as the system gives it."""
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found[1] if found else platform.machine()
    return platform.processor() or platform.machine()


def run(script, arguments, seed, folder):
    """One run through the command line. -> (its summary.json, what it printed, the folder with its files)."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments.split(), "--out", str(folder)]
    command += [] if seed is None else ["--seed", str(seed)]
    print(f"  {script}.py {arguments} --seed {seed}", flush=True)
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}, capture_output=True, text=True,
                          cwd=folder.parent)
    if done.returncode:
        sys.exit(f"error: {script}.py {arguments} failed:\n{done.stderr[-2000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    if (folder / "test.beam.txt").is_file():  # translations: the library's BLEU beside the script's own
        import sacrebleu
        lines = {kind: (folder / f"test.{kind}.txt").read_text(encoding="utf-8").split("\n")
                 for kind in ("greedy", "beam", "reference")}
        for kind in ("greedy", "beam"):
            score = sacrebleu.corpus_bleu(lines[kind], [lines["reference"]]).score
            summary["results"][f"sacrebleu_{kind}"] = score
            if abs(score - summary["results"][f"bleu_{kind}"]) > 1e-6:
                sys.exit(f"error: {script}.py's BLEU and sacrebleu's differ: {summary['results']}")
    return summary, done.stdout


def record(script, only=""):
    """All runs of one script (or one kind of them, the others stay) -> results/<script>.json and its pictures."""
    RESULTS.mkdir(exist_ok=True)
    kept = {"environment": {"cpu": cpu_name(), "threads": THREADS, "python": platform.python_version(),
                            "system": platform.system()}, "runs": {}}
    if only:
        kept["runs"] = {what: runs for what, runs in (results(script) or {}).items() if what != only}
    with tempfile.TemporaryDirectory() as scratch:
        for what, (arguments, seeds) in RUNS[script].items():
            if only not in ("", what):
                continue
            for seed in seeds:
                folder = Path(scratch) / f"{what}-{seed}"
                summary, printed = run(script, arguments, seed, folder)
                kept["environment"]["torch"] = summary.pop("torch", kept["environment"].get("torch"))
                summary["config"].pop("out", None)
                # The first seed's pictures and its output are the ones that are shown.
                if seed == seeds[0]:
                    for figure in summary["figures"]:
                        name = "" if what == next(iter(RUNS[script])) else f"_{what}"
                        shutil.copy(folder / figure, RESULTS / f"{script}{name}_{figure.replace('/', '_')}")
                    # Where the data lay on this machine is nobody's business.
                    summary["printed"] = re.sub(r" \(/[^)]*\)", "", printed).replace(str(folder), f"runs/{script}")
                kept["runs"].setdefault(what, []).append(summary)
    RESULTS.mkdir(exist_ok=True)
    write(RESULTS / f"{script}.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    if script == "qwen3_moe" and {"shakespeare", "bias", "none"} <= set(kept["runs"]):
        balance_picture(kept["runs"])


def balance_picture(runs):
    """How unequal the experts' loads are during training, with and without balancing, in one figure."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120)
    for what, label in (("none", "--balance none"), ("bias", "--balance bias (DeepSeek-V3)"),
                        ("shakespeare", "--balance aux (Switch), the default")):
        looks = runs[what][0]["load_cv"]
        ax.plot(*zip(*looks, strict=True), "o-", ms=3, label=f"{label}: val loss {runs[what][0]['val_loss']:.3f}")
    ax.axhline(0.2, ls="--", lw=0.8, color="tab:red")
    ax.set(xlabel="step", ylabel="standard deviation / mean of the loads", ylim=(0, None),
           title="qwen3_moe.py: who balances the experts?")
    ax.legend()
    fig.tight_layout()
    fig.savefig(RESULTS / "qwen3_moe_balance.png")
    plt.close(fig)


# --- what quotes the results -----------------------------------------------------------------------------------------
def results(script):
    """-> {what: [summaries]} of a script, or None before it was measured."""
    path = RESULTS / f"{script}.json"
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else None


def spread(runs, get, form="{:.3f}"):
    """'1.705 (1.699 to 1.711, 3 seeds)' or, with one run, '1.705'."""
    values = sorted(map(get, runs))
    mean = form.format(sum(values) / len(values))
    if len(values) == 1 or form.format(values[0]) == form.format(values[-1]):
        return mean + (f" ({len(values)} of {len(values)} seeds)" if len(values) > 1 else "")
    return f"{mean} ({form.format(values[0])} to {form.format(values[-1])}, {len(values)} seeds)"


def minutes(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def expectation(script, runs):
    """-> (time for the title line, the Expect paragraph)."""
    if script == "decoder_only":
        text = runs["shakespeare"]
        steps = text[0]["config"]["max_steps"]
        seconds = max(one["seconds"] for one in text)
        return (f"{minutes(seconds)} on two CPU cores",
                f"validation loss {spread(text, lambda r: r['val_loss'])} nats per character after {steps:,} steps on "
                f"Tiny Shakespeare, {runs['pydocs'][0]['val_loss']:.2f} on the Python docs. --preset numbers: "
                f"{spread(runs['numbers'], lambda r: r['results']['exact_match'], '{:.1%}')} of unseen numbers exactly "
                f"right in {minutes(max(r['seconds'] for r in runs['numbers']))}")
    if script == "encoder_only":
        text, real = runs["numbers"], runs["sst2"]
        share = "{:.1%}".format
        return (f"{minutes(max(one['seconds'] for one in text))} on two CPU cores",
                f"of the tokens that can be known from the other half only "
                f"{spread(text, lambda r: r['results']['cloze_accuracy_digits'], '{:.1%}')} digits and "
                f"{spread(text, lambda r: r['results']['cloze_accuracy_words'], '{:.1%}')} words are guessed right "
                f"(from one half {share(text[0]['results']['one_half_reader'])}; of all hidden tokens "
                f"{share(text[0]['results']['all_hidden_tokens'])}, ceiling "
                f"{share(text[0]['results']['all_hidden_ceiling'])}), and "
                f"{spread(text, lambda r: r['results']['match_accuracy'], '{:.1%}')} of the pairs are judged right. "
                f"--preset sst2, from scratch: "
                f"{spread(real, lambda r: r['results']['sst2_accuracy'], '{:.1%}')}, a bag of words "
                f"{share(real[0]['results']['bag_of_words_accuracy'])}")
    if script == "encoder_decoder":
        text, real = runs["numbers"], runs["multi30k"][0]
        return (f"{minutes(max(one['seconds'] for one in text))} on two CPU cores",
                f"{spread(text, lambda r: r['results']['exact_match'], '{:.2%}')} of unseen numbers exactly right, of "
                f"those of 5 or 6 digits with three or more zeros "
                f"{spread(text, lambda r: r['results']['exact_match_stress'], '{:.2%}')}. --preset multi30k, "
                f"{minutes(real['seconds'])}: BLEU {real['results']['bleu_greedy']:.1f} greedy, "
                f"{real['results']['bleu_beam']:.1f} with {real['config']['beams']} beams on the test set of 2016")
    if script == "llama3":
        text, search = runs["shakespeare"], json.loads((RESULTS / "lr_search.json").read_text())["scripts"]
        return (f"{minutes(max(one['seconds'] for one in text))} on two CPU cores",
                f"validation loss {spread(text, lambda r: r['val_loss'])} nats per character after "
                f"{text[0]['config']['max_steps']:,} steps on Tiny Shakespeare. After one search over learning rates "
                f"for both (one seed): "
                f"{search['llama3']['best']:.3f} here, {search['decoder_only']['best']:.3f} in decoder_only.py "
                f"(results/lr_search.json). --preset numbers: "
                f"{spread(runs['numbers'], lambda r: r['results']['exact_match'], '{:.1%}')} of unseen numbers exactly "
                f"right in {minutes(max(r['seconds'] for r in runs['numbers']))}")
    if script == "qwen3_moe":
        text = runs["shakespeare"]
        cv = lambda what: f"{runs[what][0]['results']['expert_load_cv']:.2f}"  # noqa: E731
        return (f"{minutes(max(one['seconds'] for one in text))} on two CPU cores",
                f"validation loss {spread(text, lambda r: r['val_loss'])} nats per character after "
                f"{text[0]['config']['max_steps']:,} steps on Tiny Shakespeare; the dense model of the same work per "
                f"token {spread(runs['dense'], lambda r: r['val_loss'])}. The experts' loads vary by "
                f"{spread(text, lambda r: r['results']['expert_load_cv'], '{:.2f}')} of their mean, with --balance "
                f"bias {cv('bias')}, none {cv('none')} (one seed each)")
    if script == "kv_cache":
        small, large = (runs[what][0]["results"] for what in ("numbers", "125m"))
        text, window = runs["text"][0]["results"]["rounding"], runs["text"][0]["config"]
        first = next(iter(small["ladder"]["gqa"]["tokens_per_second"]))

        def paces(got):
            return ", ".join(f"{rung} {got['tokens_per_second'][rung]:.0f}" for rung in
                             ("none", "growing", "gqa", "compiled", "int8"))
        return ("2 min on two CPU cores",
                f"tokens per second behind {first} others, {small['weight_bytes'] / 1e6:.0f} MB of weights: "
                f"{paces(small)}. --preset 125m, {large['weight_bytes'] / 1e6:.0f} MB: {paces(large)}; compiled is "
                f"{large['bandwidth_fraction']['compiled']:.0%} of the bandwidth of {large['read_bandwidth_gb_s']:.0f} "
                f"GB/s, gqa {large['bandwidth_fraction']['gqa']:.0%}. --preset text: perplexity "
                f"{text['gqa']['perplexity']:.4f} exact, {text['int8']['perplexity']:.4f} with int8 weights, "
                f"{text['int8-cache']['perplexity']:.4f} with an int8 cache too, "
                f"{text['window']['perplexity']:.3f} with a window of {window['window']} and {window['sinks']} sinks")
    if script == "flash_attention":
        got, naive = runs["shakespeare"][0], runs["naive"][0]
        times, peaks = got["results"]["milliseconds"], got["results"]["peak_mb"]
        limit = got["results"]["in_2_gib"]
        slower = [int(n) for n, naive_ms in times["naive"].items() if times["tiled"][n] >= naive_ms]
        faster = min(int(n) for n in times["naive"] if int(n) > max(slower, default=0))
        return ("2 to 3 min on two CPU cores",
                f"forward + backward of 8,192 tokens, two heads, in {peaks['tiled']['8192']:.0f} MB (naive: "
                f"{peaks['naive']['8192']:,.0f}), 16,384 in {peaks['tiled']['16384']:.0f}; at 2,048 tokens in "
                f"{times['tiled']['2048'] / times['naive']['2048']:.2f} of naive's time (PyTorch's own kernel: "
                f"{times['sdpa']['2048'] / times['naive']['2048']:.2f}), faster from {faster:,} on. "
                f"With 2 GiB naive fails at "
                f"{limit['naive']['fails']:,} tokens, tiled passes. Training ends at a validation loss of "
                f"{got['val_loss']:.4f}, with naive attention at {naive['val_loss']:.4f}")
    if script == "lora_qlora":
        got, many = runs["numbers"], runs["all"][0]["results"]

        def loss(method, some=got):
            return spread(some, lambda r: r["results"]["val_loss"][method], "{:.3f}")

        def share(key, method):
            return spread(got, lambda r: r["results"][key][method], "{:.0%}")
        first = got[0]["results"]
        part = first["trainable_parameters"]["lora"] / first["trainable_parameters"]["full"]
        return (f"{minutes(max(one['seconds'] for one in got))} on two CPU cores",
                f"validation loss after {got[0]['config']['examples']:,} lines of the old form: full fine-tuning "
                f"{loss('full')}, LoRA with {part:.1%} of the parameters {loss('lora')}, QLoRA on four bits "
                f"{loss('qlora')}; old names right {share('exact_match', 'full')}, {share('exact_match', 'lora')}, "
                f"{share('exact_match', 'qlora')}; modern names still right {share('exact_match_modern', 'full')}, "
                f"{share('exact_match_modern', 'lora')}, {share('exact_match_modern', 'qlora')} (base "
                f"{share('exact_match_modern', 'base')}). With all 60,000 lines full fine-tuning is ahead: "
                f"{many['val_loss']['full']:.3f}, LoRA {many['val_loss']['lora']:.3f}. Of the squared full update "
                f"{spread(got, lambda r: r['results']['full_update_within_rank'], '{:.0%}')} lies within rank "
                f"{got[0]['config']['rank']}")
    if script == "dpo":
        got = runs["numbers"]

        def rate(key, label, some=got):
            return spread(some, lambda r: r["results"][key][label], "{:.1%}")

        def other(what):
            return f"{runs[what][0]['results']['preferred_rate']['after']:.1%}"
        return (f"{minutes(max(one['seconds'] for one in got))} on two CPU cores",
                f"answers without a slip and with the right number {rate('preferred_rate', 'before')} before, "
                f"{rate('preferred_rate', 'after')} after {got[0]['config']['max_steps']} steps of DPO in "
                f"{max(one['results']['dpo_seconds'] for one in got):.0f} s (right number "
                f"{rate('correct_rate', 'before')} and {rate('correct_rate', 'after')}); imitating the chosen answers "
                f"instead {rate('preferred_rate', 'control')}; all weights as the carrier "
                f"{rate('preferred_rate', 'dpo, all')}, adapters {rate('preferred_rate', 'dpo, lora')}. One "
                f"seed each: IPO {other('ipo')}, SimPO {other('simpo')}, all weights with --nll 0.2 {other('nll')}; "
                f"with 10 % of the labels swapped DPO "
                f"{other('flipped')}, cDPO {other('flipped-cdpo')}")
    if script == "ppo_grpo":
        got = runs["numbers"]

        def both(name):
            return (f"{spread(got, lambda r: r['results']['accuracy'][name], '{:.1%}')} sampled, "
                    f"{spread(got, lambda r: r['results']['accuracy_greedy'][name], '{:.1%}')} greedy")

        def slowest(name):
            return f"{max(run['results']['method_seconds'][name] for run in got):.0f} s"
        return (f"{minutes(max(one['seconds'] for one in got))} on two CPU cores",
                f"names right on prompts that were looked at once: imitation {both('sft')}; REINFORCE "
                f"{both('reinforce')}, in {slowest('reinforce')}; GRPO {both('grpo')}, in {slowest('grpo')}; PPO "
                f"{both('ppo')}, in {slowest('ppo')}. KL to the imitator "
                f"{spread(got, lambda r: r['results']['kl']['grpo'], '{:.2f}')} nats with GRPO, the least for it "
                f"{got[0]['results']['least_kl']:.2f}")
    if script == "bpe_tokenizer":
        one = runs["shakespeare"][0]["results"]
        last = max(one["bytes_per_token"], key=int)
        return (f"{minutes(runs['shakespeare'][0]['seconds'])} on one CPU core",
                f"{one['merges']:,} merges on Tiny Shakespeare in {one['train_seconds']:.1f} s, "
                f"{one['bytes_per_token'][last]:.2f} bytes per token on held-out text with {int(last):,} tokens")
    floors = runs["default"][0]["results"]["floors"]
    return ("seconds on a laptop CPU",
            "floors, in nats per token: " + "; ".join(f"{floor:.2f} {task}" for task, floor in floors.items()))


def refresh_header(source, script, runs):
    """The script's text with its time and its Expect paragraph as measured."""
    took, expect = expectation(script, runs)
    source = re.sub(rf"^(.+python {script}\.py +).+$", lambda found: found[1] + took, source, count=1, flags=re.M)
    paragraph = textwrap.fill(f"{expect} (results/{script}.json)", 120, initial_indent="Expect   ",
                              subsequent_indent=" " * 9, break_on_hyphens=False)
    return re.sub(r"^Expect .+(?:\n {9}.+)*", lambda _: paragraph, source, count=1, flags=re.M)


def table():
    """The README's table of scripts: the idea, the paper, how long it is, what it reaches."""
    rows = ["| script | idea | paper | lines | reaches |", "|---|---|---|---|---|"]
    for path in sorted(ROOT.glob("*.py"), key=lambda p: list(RUNS).index(p.stem) if p.stem in RUNS else 99):
        source = path.read_text(encoding="utf-8")
        idea = " ".join(re.search(r"^Idea +(.+(?:\n {9}.+)*)", source, re.M)[1].split())
        expect = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", source, re.M)[1].split())
        paper = re.search(r"^Paper +([^,]+),", source, re.M)
        rows.append(f"| [`{path.name}`]({path.name}) | {' '.join(re.split(r'(?<=[.!?]) ', idea)[:2])} "
                    f"| {paper[1] if paper else 'none'} | {len(source.splitlines()):,} | {expect} |")
    return "\n".join(rows)


def questions():
    """The interview index: every `# Q:` of every script, with its line; those of shared blocks once."""
    out, known = [], set()
    for path in sorted(ROOT.glob("*.py"), key=lambda p: list(RUNS).index(p.stem) if p.stem in RUNS else 99):
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


def printed():
    """What the default run prints, in short."""
    if (runs := results("decoder_only")) is None:
        return ""
    lines = runs["shakespeare"][0]["printed"].splitlines()
    first = [line for line in lines if line.startswith(("data:", "model:", "step     1"))]
    steps = [i for i, line in enumerate(lines) if re.match(r"step +\d\d+:", line)]
    some = [line for i in (steps[0], steps[len(steps) // 2], steps[-1]) for line in lines[i:i + 2]]
    return "\n".join(["```", "$ python decoder_only.py", *first, *some, "```"])


def peers():
    """Ratios against the usual alternatives, from results/peers_*.json."""
    rows = ["| work | against | result |", "|---|---|---|"]
    if (path := RESULTS / "peers_decoder_only.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]
        step, made = got["training_step"], got["generation"]
        rows += [f"| training step, laptop preset | nanoGPT's loop | "
                 f"{step['time_ratio_ours_to_nanogpt']:.2f} of its time |",
                 f"| greedy generation, 256 tokens | nanoGPT's `generate`, no cache | "
                 f"{made['times_faster_than_nanogpt']:.1f} times as fast |",
                 f"| the same | `transformers` `generate`, cached | "
                 f"{made['times_faster_than_transformers']:.1f} times as fast |"]
    if (path := RESULTS / "peers_encoder_only.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]["training_step"]
        rows += [f"| masked-token training step, vocabulary {got['vocabulary']:,}, 4 layers x 256, "
                 f"{got['batch']} x {got['tokens']} | `transformers` `BertForMaskedLM` | "
                 f"{got['time_ratio_ours_to_transformers']:.2f} of its time |"]
    if (path := RESULTS / "peers_encoder_decoder.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]
        rows += [f"| beam search, 4 beams, {one['label']}, {one['sources']} "
                 f"source{'s' if one['sources'] > 1 else ''} at a time, same output | `transformers` `generate` | "
                 f"{one['times_faster_than_transformers']:.1f} times as fast |" for one in got["beam_search"]]
        rows += [f"| encoder-decoder training step, 32 x (32 -> 32) | `transformers` T5 | "
                 f"{got['training_step']['time_ratio_ours_to_transformers']:.2f} of its time |"]
    if (path := RESULTS / "peers_llama3.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]["decoding"]
        rows += [f"| cached greedy generation, Llama of {one['parameters'] / 1e6:.0f} M parameters, "
                 f"{one['rows']} row{'s' if one['rows'] > 1 else ''}, same tokens | `transformers` `generate` | "
                 f"{one['times_faster_than_transformers']:.1f} times as fast |" for one in got]
    if (path := RESULTS / "peers_qwen3_moe.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]["step"]
        rows += [f"| forward + backward, 64 experts, 8 per token, {one['tokens']:,} tokens | `transformers`, eager and "
                 f"grouped | {one['time_ratio_to_eager']:.2f} and {one['time_ratio_to_grouped']:.2f} of its time |"
                 for one in got]
    if (path := RESULTS / "peers_kv_cache.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]
        rows += [f"| one token at a time, Llama of {got['parameters'] / 1e6:.0f} M parameters, rung {rung} | "
                 f"`transformers` `generate` | {one['times_faster_than_transformers']:.1f} times as fast, "
                 f"{one['bandwidth_fraction']:.0%} of the read bandwidth"
                 f"{', same tokens' if one['same_tokens'] else ''} |" for rung, one in got["rungs"].items()]
    if (path := RESULTS / "peers_lora_qlora.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]["step"]
        for one in got:
            where = f"{one['tokens']:,} tokens, {one['layers']} layers x {one['width']}, rank {one['rank']}"
            rows += [f"| LoRA step, {where} | full fine-tuning, and `peft`'s LoRA | {one['lora_to_full']:.2f} and "
                     f"{one['lora_to_peft']:.2f} of its time |",
                     f"| QLoRA step, the same | full fine-tuning | {one['qlora_to_full']:.2f} of its time |"]
    if (path := RESULTS / "peers_dpo.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]
        rows += [f"| DPO step, {got['parameters'] / 1e6:.1f} M parameters, {got['pairs']} pairs of {got['tokens']} "
                 f"tokens | two models, a forward pass for each answer | {got['time_ratio']:.2f} of its time |"]
    if (path := RESULTS / "peers_ppo_grpo.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]
        rows += [f"| rollout, {got['rows']} answers of {got['new_tokens']:.0f} tokens, {got['parameters'] / 1e6:.1f} "
                 f"M parameters | `transformers` `generate` | "
                 f"{got['times_faster_than_transformers']:.1f} times as fast |"]
    if (path := RESULTS / "peers_bpe_tokenizer.json").is_file():
        got = json.loads(path.read_text(encoding="utf-8"))["results"]
        small, large, speed = got["train_512"], got["train_4096_merges"], got["encode"]["megabytes_per_second"]
        rows += [f"| BPE training, 200 kB to 512 tokens | minbpe's algorithm | "
                 f"{small['times_faster_than_minbpe']:.0f} times as fast |",
                 f"| BPE training, 1.1 MB, 4,096 merges, pure Python | Hugging Face `tokenizers`, Rust | "
                 f"{large['time_ratio_ours_to_tokenizers']:.1f} of its time ({large['seconds']['ours']:.1f} s) |",
                 f"| encoding with our merges | tiktoken, Rust | {speed['ours']:.1f} MB/s in Python, "
                 f"{speed['tiktoken']:.0f} MB/s handed to tiktoken |"]
    return "\n".join(rows)


def refresh_readme(source):
    """The README with everything between its markers as it follows from results and scripts."""
    for name, make in (("TABLE", table), ("OUTPUT", printed), ("PEERS", peers), ("QUESTIONS", questions)):
        source = re.sub(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)",
                        lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", source, flags=re.S)
    return source


def refresh():
    """Headers first: the README's table quotes them."""
    for script in RUNS:
        path = ROOT / f"{script}.py"
        if (runs := results(script)) and set(runs) == set(RUNS[script]):
            write(path, refresh_header(path.read_text(encoding="utf-8"), script, runs))
    write(ROOT / "README.md", refresh_readme((ROOT / "README.md").read_text(encoding="utf-8")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help=f"which to run: {', '.join(RUNS)}")
    parser.add_argument("--readme", action="store_true", help="run nothing, refresh headers and README")
    args = parser.parse_args()
    wanted = [(script, only) for script, _, only in (name.partition(":") for name in args.scripts)]
    for script, only in wanted:
        if script not in RUNS or only not in ("", *RUNS[script]):
            parser.error(f"{script}:{only} is none of {', '.join(RUNS)}, or it has no such run")
    for script, only in [] if args.readme else wanted:
        record(script, only)
    refresh()


if __name__ == "__main__":
    main()
