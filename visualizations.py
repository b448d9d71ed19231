# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "safetensors>=0.4.3", "tiktoken>=0.7", "torch>=2.11",
#                 "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
THE IDEAS AS PICTURES                            python visualizations.py           4 min on two CPU cores

Idea     A picture of an idea is only worth looking at if it shows the thing itself. Each of these calls the functions
         of the script that it is about, or opens a model that was trained for it; nothing is sketched, and the sentence
         above a picture is computed from the numbers in it.
Picture  scripts ----functions----------------------------+
             |                                            +--> figure --> NAME.png, NAME.svg and one line of text
             +--short training--> <out>/models/NAME ------+
Symbols  B batch   T time   S source time   C n_embd   H heads   D head size   V vocabulary
Use      python visualizations.py                        all of them; trains what is missing, once
         python visualizations.py --only rope            one: positions rope buckets masks attention architectures
         python visualizations.py --only rope,masks      sampling beams schedule gradients embeddings experts cache
                                                         softmax nf4 lora dpo reward
         python visualizations.py --models runs          prefer runs that are there: runs/dpo, runs/lora_qlora ...
Not here loss curves and timings: every script draws its own, compare_architectures.py compares
Expect   18 pictures. The models behind them are small, and most are trained for a part of their usual steps (each
         picture says how many): read shapes and orders of magnitude, not last digits (results/visualizations.json)
Asked    Do attention maps explain a model?   Why does RoPE see distances only?   Why not one number per distance?
         Does a wider beam find better text?   Why do deep plain networks not learn?   Do neighbours in a flat map mean
         neighbours in the model?   What does a window forget?   Is LoRA a low-rank copy of the full update?
                                                                                                  (grep "# Q:")
"""
import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import re
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# The scripts themselves. They know nothing of this file; importing one does nothing but define what is in it.
import torch
import torch.nn as nn

import decoder_only
import dpo
import encoder_decoder
import encoder_only
import flash_attention
import kv_cache
import llama3
import lora_qlora
import ppo_grpo
import qwen3_moe
import toy_dataset


# --- 1. Config: which pictures, and where from -----------------------------------------------------------------------
@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    only: str = ""                      # names with commas between them; empty = all
    out: str = "runs/visualizations"    # folder for the pictures, and for the models trained for them
    models: str = ""                    # folder of finished runs to prefer, such as runs
    seed: int = 1337                    # decides initial weights, batches, samples and random vectors

    def __post_init__(self):
        unknown = [name for name in self.only.split(",") if name and name not in FIGURES]
        if self.models and not Path(self.models).is_dir():
            raise ValueError(f"models: there is no folder {self.models!r}")
        if unknown:
            raise ValueError(f"only: there is no picture {unknown[0]!r}; there are {', '.join(FIGURES)}")
        if not 0 <= self.seed < 2 ** 31:
            raise ValueError(f"seed must be in [0, 2^31), not {self.seed}")


PRESETS = {"default": {}}


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


# --- 5. Training: what is missing, once ------------------------------------------------------------------------------
# name -> (script, its command line, the data it has to have seen, files that a finished run leaves). Shortened until
# all of them together take a few minutes, and not further: each picture still shows what it is about.
RECIPES = {
    "decoder_only": (decoder_only, "--preset numbers --max-steps 600 --eval-every 600", "numbers", "ckpt.pt"),
    "decoder_text": (decoder_only, "--data pydocs --n-layer 2 --max-steps 400 --eval-every 400", "pydocs", "ckpt.pt"),
    "encoder_only": (encoder_only, "--max-steps 900 --warmup-steps 150 --eval-every 900", "numbers", "ckpt.pt"),
    "encoder_decoder": (encoder_decoder, "--max-steps 500 --eval-every 500", "numbers", "ckpt.pt"),
    "lora_qlora": (lora_qlora, "--base-steps 300 --max-steps 100 --eval-every 100", "numbers",
                   "lora/adapter_model.safetensors full/model.safetensors"),
    "dpo": (dpo, "--sft-steps 500 --pairs 1024 --max-steps 80 --eval-every 80 --no-compare", "numbers",
            "dpo/preferences.jsonl"),
    "ppo_grpo": (ppo_grpo, "--max-steps 400 --grpo-updates 40 --ppo-updates 40 --reinforce-updates 40 --eval-every 10",
                 "numbers", "reinforce/metrics.jsonl grpo/metrics.jsonl ppo/metrics.jsonl"),
    "experts_none": (qwen3_moe, "--preset numbers --balance none --max-steps 200", "numbers", "ckpt.pt"),
    "experts_aux": (qwen3_moe, "--preset numbers --balance aux --max-steps 200", "numbers", "ckpt.pt"),
}


# A picture of a trained model needs one. Each recipe is a line that a reader can type; it is run in this process, so
# that a picture costs no second start of Python, and its files are the same as if it had been typed.
# Interrupted? Finished trainings stay, the one that was stopped begins anew: a few dozen seconds at most are lost, and
# nothing has to be known about how far it got. (Whoever changes a script's code deletes the folder models/ to see it.)
class Models:
    """Trained models by the names of RECIPES: found, or trained now.

    folder(name) -> where its run is; load(name) -> the model itself; summary(name) -> what the run wrote about itself;
    about(name) -> one line for the foot of a picture. A model is loaded once, however many pictures show it.
    """

    def __init__(self, cfg):
        self.cfg, self.loaded, self.places = cfg, {}, {}

    def recipe(self, name):
        """-> (script, the settings of its run, those of its preset alone, where it goes)."""
        # The script's own parse_config reads the line: presets, defaults and errors are those of the command line, and
        # `given` knows which settings the recipe really asks for.
        script, line, _, _ = RECIPES[name]
        folder = Path(self.cfg.out) / "models" / name
        arguments = [*line.split(), "--seed", str(self.cfg.seed), "--out", str(folder)]
        preset = line.split()[1] if line.startswith("--preset") else next(iter(script.PRESETS))
        return (script, script.parse_config(script.Config, script.PRESETS, arguments),
                script.Config(**script.PRESETS[preset]), folder)

    def finished(self, name, folder, exact):
        """Is there a whole run in this folder, of the right data and (exact) with the settings of the recipe?"""
        # Every script writes summary.json last, so its being there means that the run came to its end. A checkpoint
        # says nothing: those are also written halfway.
        try:
            summary = json.loads((folder / "summary.json").read_text())
            _, settings, _, _ = self.recipe(name)
            same = all(summary["config"][key] == getattr(settings, key) for key in settings.given - {"out"})
            # A run of somebody's own may have left methods out, or have been made with another loss.
            files = all((folder / file).is_file() for file in RECIPES[name][3].split())
            loss = summary["config"].get("loss") == getattr(settings, "loss", None)
            return summary["data"]["name"] == RECIPES[name][2] and files and loss and (same or not exact)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def folder(self, name):
        """-> the folder of a finished run; trains it first if there is none."""
        if name in self.places:
            return self.places[name]
        script, settings, _, place = self.recipe(name)
        theirs = Path(self.cfg.models) / name
        if self.cfg.models and self.finished(name, theirs, exact=False):
            place = theirs
        elif not self.finished(name, place, exact=True):
            # Trap: leaving the old summary there. If this training is interrupted, it would vouch for half a model.
            (place / "summary.json").unlink(missing_ok=True)
            place.mkdir(parents=True, exist_ok=True)
            print(f"training {name}: python {Path(script.__file__).name} {RECIPES[name][1]}", flush=True)
            try:  # what the script tells goes to a file: this program's own lines are to stay readable
                with (open(place / "train.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log),
                      contextlib.redirect_stderr(log)):
                    watch_experts(settings) if script is qwen3_moe else script.main(settings)
            except (SystemExit, KeyboardInterrupt):
                print(f"stopped while training {name} (see {place}/train.log); next time it begins anew",
                      file=sys.stderr)
                raise
        self.places[name] = place
        return place

    def load(self, name):
        """-> (model in eval mode on the CPU, its settings, its tokenizer), through the script's own load_any."""
        if name not in self.loaded:
            script, settings = RECIPES[name][0], {"load": str(self.folder(name)), "device": "cpu"}
            self.loaded[name] = script.load_any(script.Config(**settings))[:3]
        return self.loaded[name]

    def summary(self, name):
        """-> what the run wrote about itself."""
        return json.loads((self.folder(name) / "summary.json").read_text())

    def about(self, name):
        """One line for the foot of a picture: script, seed, and how far it was trained of how far it usually is."""
        script, _, usual, _ = self.recipe(name)
        made = self.summary(name)["config"]
        steps = ", ".join(f"{key.replace('_', ' ')} {made[key]:,} of {getattr(usual, key):,}" for key in made
                          if re.fullmatch(r"\w*(steps|updates)", key) and "warmup" not in key and "finetune" not in key)
        steps += f", balance {made['balance']}" if "balance" in made else ""
        return f"{Path(script.__file__).name} on {self.summary(name)['data']['name']}, {steps}, seed {made['seed']}"


def watch_experts(cfg):
    """Train qwen3_moe.py as its main does, but count every 10 steps who visits which expert. Writes summary.json."""
    # Its own run looks every 100 steps; the collapse is over by then.
    train_data, val_data, tokenizer, info = qwen3_moe.make_data(cfg)
    cfg = dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    model, watched, looks = qwen3_moe.build_model(cfg), val_data[0][:256], []

    def look(step):
        if step % 10 == 0:
            load = qwen3_moe.expert_load(model, watched, watched != 0)
            looks.append({"step": step, "load": load.tolist(), "cv": qwen3_moe.load_cv(load)})
    # The same 256 held-out lines each time, pads left out: what changes is the router, not the question.
    look(0)
    result = qwen3_moe.train(model, cfg, train_data, val_data, qwen3_moe.compute_loss,
                             {"tokenizer": tokenizer.spec, "data": info}, look)
    summary = {"config": dataclasses.asdict(cfg), "data": info, "val_loss": result["val_loss"], "looks": looks}
    decoder_only.write_atomically(Path(cfg.out) / "summary.json",
                                  lambda file: file.write(json.dumps(summary, indent=2).encode()))


# --- 8. Main: the pictures -------------------------------------------------------------------------------------------
# Okabe and Ito's eight colours, which people with any kind of colour vision can tell apart. What a colour says is said
# a second time by a marker, a line style or a label: pictures are also printed in grey.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
GREY = "#8C8C8C"


def canvas(layout, height, **options):
    """An empty figure, 10 inches wide: its letters stay readable at 800 pixels. -> (figure, {name: axes}).

    layout: rows of names, subplot_mosaic's form; a name twice in a row is an axes twice as wide. height in inches.
    """
    # "constrained" moves axes apart until no label, title or colour bar covers another.
    # Figure and not pyplot: no window, no global list of open figures, nothing to close.
    from matplotlib.figure import Figure
    fig = Figure(figsize=(10, height), dpi=110, layout="constrained")
    return fig, fig.subplot_mosaic(layout, **options)


def finish(fig, sentence, models=None, *names):
    """Above the picture one computed sentence, below it which models it shows. -> the figure."""
    # The sentence is also what main prints: whoever cannot see the picture gets its result all the same.
    fig.suptitle(sentence, fontsize=12)
    if names:
        fig.supxlabel("\n".join(models.about(name) for name in names), fontsize=8, color="#555555")
    return fig


def heat(ax, values, **options):
    """A matrix as an image; its rows go down, as they do on paper."""
    # "nearest": a cell stays a square of one colour. Smoothed, a mask or an attention map would show cells that do not
    # exist.
    return ax.imshow(values.tolist() if isinstance(values, torch.Tensor) else values, interpolation="nearest",
                     aspect="auto", **options)


def tokens_of(tokenizer, ids):
    """Ids -> labels for an axis; what cannot be seen gets a name."""
    # Not tokenizer.decode: the toy one leaves out pads and spaces, and an axis has to show every token.
    names = [decoder_only.TOY_VOCAB[i] if tokenizer.spec["kind"] == "numbers" else tokenizer.decode([i]) for i in ids]
    return [{"\n": "\\n", " ": "␣"}.get(name, name) for name in names]


# Attention alone is blind to order: shuffle the tokens and each still gets the same mean. Something has to say where a
# token stands. The 2017 paper adds sines and cosines (section 3.5), computed once and for ever; GPT-2 adds a table that
# is learned like any weight.
# What people get wrong: sinusoids do not "encode the position as a number". What matters is how alike two positions
# are, and that depends on their distance alone. A learned table has to find that out, has no row for position
# block_size, and its rows that never occur in training stay as random as they began.
# How to read it. Left: a row is a position's vector; fast columns flicker, slow ones hardly move within 17 positions.
# Middle: stripes along the diagonal = only the distance counts. Right: no stripes. In high dimensions random vectors
# are nearly at right angles, so a table that merely has to tell positions apart stays close to 0 off the diagonal.
def figure_positions(models, cfg):
    """Sinusoids, and how alike two positions are: computed (2017) beside learned (GPT-2)."""
    table = models.load("decoder_only")[0].transformer.wpe.weight.detach()
    T, C = table.shape
    sines = encoder_decoder.sinusoids(torch.arange(T), C)
    alike = [nn.functional.cosine_similarity(x[:, None], x[None], dim=-1) for x in (sines, table)]
    fig, axes = canvas([["table", "computed", "learned"]], 4.1, width_ratios=[1.15, 1, 1])
    heat(axes["table"], sines, cmap="PuOr", vmin=-1, vmax=1)
    axes["table"].set(title="sinusoids: the table", xlabel=f"column (left half sines)  0..{C - 1}", ylabel="position")
    # One scale for all three, so that one colour bar serves.
    for name, title, image in zip(("computed", "learned"), ("sinusoids", "learned"), alike, strict=True):
        shown = heat(axes[name], image, cmap="PuOr", vmin=-1, vmax=1)
        axes[name].set(title=f"similarity, {title}", xlabel="position", ylabel="position")
    fig.colorbar(shown, ax=axes["learned"], label="cosine similarity")
    # Constant along a diagonal = a function of the distance alone: the spread there says how far that is true.
    spread = [max((image.diagonal(d).max() - image.diagonal(d).min()).item() for d in range(1, T // 2))
              for image in alike]
    far = [image[0, 1:T - 1].tolist() for image in alike]
    return finish(fig, f"Sinusoids know distances from the start: similarity is {far[0][0]:.2f} one apart, "
                       f"everywhere (spread {spread[0]:.0e}).\nA learned table finds its own: {far[1][0]:.2f} between "
                       f"positions 0 and 1, and pairs equally far apart differ by up to {spread[1]:.2f}.",
                  models, "decoder_only")


# RoPE (Su et al. 2021, arXiv 2104.09864, section 3.2) adds nothing to the token. It turns q and k, plane by plane, by
# an angle that grows with their position; each plane has its own speed.
# Q: Why does RoPE see distances only, when absolute positions go in?
# A: Turning q by m*w and k by n*w and taking the dot product is turning one of them by (n - m)*w: rotations undo each
#    other. The third panel has every pair (m, n) in it, 24 * 24 of them, and shows 47 values.
# What people get wrong: values are not turned, the embedding is not turned, and position 0 is not turned at all, so a
# test at position 0 finds nothing.
# How to read it. Top: the same unit vector at positions 0 to 7; the fastest plane goes round in about 6 tokens and
# tells neighbours apart, slow ones tell "near" from "far". Bottom left: walk along a diagonal and the colour stays.
# Bottom right: each dot is up to 24 dots on top of each other. The curve itself is that of one random q and k; training
# decides what it looks like, rotation decides that it is a curve at all.
def figure_rope(models, cfg):
    """Planes of q at positions 0..7 as llama3.py turns them, and <R_m q, R_n k> for all m and n."""
    shape = llama3.Config()
    speed = llama3.rope_frequencies(dataclasses.replace(shape, head_size=shape.n_embd // shape.n_head))
    D, T = 2 * len(speed), 24
    cos, sin = llama3.rope_angles(torch.arange(T)[None], speed)
    fig, axes = canvas([["p0", "p3", "p6"], ["scores", "curve", "curve"]], 6.6)
    # Half-split layout: plane i is made of numbers i and i + D/2. A unit vector along the first of them is turned.
    for plane in (0, 3, 6):
        start = torch.zeros(1, 1, T, D)
        start[..., plane] = 1.0
        turned = llama3.apply_rope(start, cos, sin)[0, 0]
        ax = axes[f"p{plane}"]
        for m in range(8):
            a, b = turned[m, plane].item(), turned[m, plane + D // 2].item()
            ax.annotate("", (a, b), (0, 0), arrowprops=dict(arrowstyle="-|>", color=BLUE, alpha=0.35 + 0.08 * m))
            # Slow planes crowd their arrows: label the ends only.
            if plane == 0 or m in (0, 7):
                ax.text(1.17 * a, 1.17 * b, str(m), ha="center", va="center", fontsize=9)
        ax.set(title=f"plane {plane}: {speed[plane]:.3g} radians a token", xlim=(-1.35, 1.35), ylim=(-1.35, 1.35),
               xticks=[], yticks=[], xlabel="arrows: positions 0 to 7", aspect="equal")
    # One q and one k, standing at every pair of positions: row m holds R_m q against all keys. apply_rope is called as
    # attention calls it, on (batch, heads, tokens, head size).
    q, k = torch.randn(2, D, generator=torch.Generator().manual_seed(cfg.seed))
    scores = (llama3.apply_rope(q.expand(1, 1, T, D), cos, sin)[0, 0]
              @ llama3.apply_rope(k.expand(1, 1, T, D), cos, sin)[0, 0].T)
    limit = scores.abs().max().item()
    image = heat(axes["scores"], scores, cmap="PuOr", vmin=-limit, vmax=limit)
    axes["scores"].set(title="score: stripes along diagonals", xlabel="n, position of k", ylabel="m, position of q")
    fig.colorbar(image, ax=axes["scores"])
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    axes["curve"].plot(distance.flatten(), scores.flatten(), "o", ms=4, color=BLUE, alpha=0.3)
    axes["curve"].axhline(0, color=GREY, lw=0.8)
    axes["curve"].set(title=f"the same {T * T} scores over m - n: one value per distance", xlabel="m - n, tokens",
                      ylabel="score")
    off = max((scores.diagonal(d).max() - scores.diagonal(d).min()).item() for d in range(-T + 1, T))
    return finish(fig, f"RoPE turns each plane of q and k at its own speed; their score depends on m - n only\n"
                       f"(scores up to {limit:.1f}; equal distances differ by at most {off:.0e}, which is rounding)")


# T5 (Raffel et al. 2019, arXiv 1910.10683, section 2.1) puts no position into the token at all: it adds a learned
# number to the score of each pair, and pairs share that number by distance.
# Q: Why not one number per distance?
# A: Nobody needs to tell 103 tokens back from 104, and long distances are rare in training. Near ones get a bucket
#    each, far ones share, by equal factors up to 128: 32 numbers per head serve any length.
# What people get wrong: an encoder needs to know the side as well (16 buckets each), a decoder spends all 32 on the
# past; with the encoder's table in the decoder half of the buckets would never be used.
# How to read it. Left: one step = one bucket; steps get wider with the distance, equally on a logarithmic scale, up to
# 128. Middle and right: what is added to a score before softmax; +0.7 doubles a weight, since exp(0.7) = 2. Distances
# that never occur in training keep their random start, so only those that occur are drawn.
def figure_buckets(models, cfg):
    """The bucket of every distance, and what a trained model has learned to add for near ones."""
    model = models.load("encoder_decoder")[0]
    distance = torch.arange(-140, 141)
    fig, axes = canvas([["buckets", "encoder", "decoder"]], 4.0, width_ratios=[1.3, 1, 1])
    ax = axes["buckets"]
    for causal, color, style, label in ((False, BLUE, "-", "encoder: both sides"), (True, RED, "--", "decoder: past")):
        ax.step(distance, encoder_decoder.relative_bucket(distance, causal), color=color, ls=style, label=label,
                where="mid")
    ax.set(title="fine near, coarse far", xlabel="key position - query position, tokens", ylabel="bucket",
           ylim=(-1, 40))
    ax.legend(loc="upper right", fontsize=9)
    # Only distances that occur in training: 6 digits and an end to read, 10 tokens at most to write.
    for name, stack, causal, T in (("encoder", model.encoder, False, 7), ("decoder", model.decoder, True, 10)):
        bias = model.distance_bias(stack, T, causal)[0].detach()
        # The last query of a decoder sees all distances; in an encoder the first looks right and the last looks left.
        steps = range(-T + 1, 1) if causal else range(-T + 1, T)
        at = [(T - 1, T - 1 + d) if d <= 0 else (0, d) for d in steps]
        for h, (color, marker) in enumerate(zip((BLUE, RED, GREEN, PURPLE), "os^D", strict=True)):
            axes[name].plot(steps, [bias[h, i, j].item() for i, j in at], marker=marker, ms=4, color=color,
                            label=f"head {h}")
        axes[name].axhline(0, color=GREY, lw=0.8)
        axes[name].set(title=f"learned, {name}", xlabel="distance, tokens", ylabel="added to the score")
    axes["decoder"].legend(fontsize=9)
    low, high = (encoder_decoder.relative_bucket(torch.tensor(d), True).item() for d in (-15, -128))
    return finish(fig, f"T5's buckets: a decoder tells distances 0 to 15 apart (bucket {low} = exactly 15 back), from "
                       f"128 on all are one (bucket {high}).\nEach head learns its own preference for a distance.",
                  models, "encoder_decoder")


# A mask is the only difference between "reads both ways" and "writes": the same attention, other cells allowed. Here
# True = may attend, everywhere; PyTorch's own layers and half of the internet use the opposite.
# What people get wrong: a decoder with padding needs two masks at once, and with pads on the left the first rows may
# look at nothing at all, where a plain softmax gives NaN. In cross-attention there is no triangle: the target may read
# the whole source, minus ITS padding.
def six_masks(T=8):
    """{title: (rows, columns) bool, True = may attend}, from the scripts' functions where they have one."""
    real = torch.ones(1, T, dtype=torch.bool)
    right, left = real.clone(), real.clone()
    right[:, -2:], left[:, :2] = False, False
    causal = decoder_only.causal_mask(T, T)
    model = types.SimpleNamespace(shared=types.SimpleNamespace(weight=torch.zeros(1)))  # all that padding_bias asks for
    source = encoder_decoder.T5.padding_bias(model, right) == 0
    # A window of 3, itself among them, and kv_cache.py's sinks: the first 2 tokens are never forgotten.
    window = flash_attention.who_sees_whom((0, T), (0, T), True, 3, None, torch.device("cpu"))
    return {"bidirectional (encoder)\n2 pads on the right": toy_dataset.padding_mask(right)[0].expand(T, T),
            "causal (decoder)": causal,
            "causal, 2 pads on the left": toy_dataset.both_masks(left)[0],
            # No script has a prefix LM (T5's paper, 3.2.1): the question both ways, the answer causally.
            "prefix LM: 4 tokens\nboth ways, then causal": causal | (torch.arange(T) < 4),
            "cross: 5 target rows,\nsource with 2 pads": source[0, 0].expand(5, T),
            "window of 3 and 2 sinks": window | (causal & (torch.arange(T) < 2))}


def figure_masks(models, cfg):
    """Who may look at whom: six masks."""
    masks = six_masks()
    fig, axes = canvas([[0, 1, 2], [3, 4, 5]], 7.0)
    for i, (title, mask) in enumerate(masks.items()):
        axes[i].imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        # White lines between the cells, so that they can be counted.
        axes[i].set_xticks([x - 0.5 for x in range(1, mask.size(1))], minor=True)
        axes[i].set_yticks([y - 0.5 for y in range(1, mask.size(0))], minor=True)
        axes[i].grid(which="minor", color="#BBBBBB", lw=0.8)
        axes[i].tick_params(which="minor", length=0)
        axes[i].set(xlabel="key: is looked at", ylabel="query: looks", xticks=range(mask.size(1)),
                    yticks=range(mask.size(0)))
        axes[i].set_title(f"{title}: {int(mask.sum())} of {mask.numel()} cells", fontsize=10)
    empty = int((~masks["causal, 2 pads on the left"].any(1)).sum())
    return finish(fig, f"Dark = may attend. With pads on the left {empty} rows may look at nothing: attention has to "
                       f"define what they get")


def queries_keys_values(model, ids):
    """What every layer's heads ask, offer and hand over while a decoder or encoder reads ids. -> [(q, k, v)]."""
    # A hook is called with what goes into a layer; the projections are then made once more, from the same weights.
    # Running the model and looking beats rebuilding its forward pass here: a rebuilt one could differ.
    seen, H = [], model.cfg.n_head
    if isinstance(model, encoder_only.BERT):
        parts = [layer for layer in model.bert.encoder["layer"]]
    else:
        parts = [block.attn for block in model.transformer.h]
    hooks = [part.register_forward_pre_hook(lambda part, inputs: seen.append((part, inputs[0]))) for part in parts]
    with torch.no_grad():
        # BERT numbers its halves: everything behind the first [SEP] is the second segment.
        if isinstance(model, encoder_only.BERT):
            behind = (ids == toy_dataset.SEP).cumsum(1) - (ids == toy_dataset.SEP).int()
            model.hidden(ids, segments=behind.clamp(max=1))
        else:
            model.hidden(ids)
        for hook in hooks:
            hook.remove()
        out = []
        for part, x in seen:
            many = ([part.attention["self"][name](x) for name in ("query", "key", "value")]
                    if isinstance(model, encoder_only.BERT) else part.c_attn(x).split(x.size(-1), 2))
            out.append(tuple(y.view(*y.shape[:2], H, -1).transpose(1, 2) for y in many))
    return out


def attention_weights(model, ids):
    """-> (L, H, T, T): who looks at whom in every layer and head. Each row sums to 1.

    The fused kernel that the models call never has these numbers in memory; that is why it is fast, and why looking
    means computing them once more.
    """
    T = ids.size(1)
    mask = (torch.ones(T, T, dtype=torch.bool) if isinstance(model, encoder_only.BERT)
            else decoder_only.causal_mask(T, T))
    # weights @ v with the identity as v is weights: the script's own definition of attention hands them out.
    return torch.stack([decoder_only.attention(q, k, torch.eye(T).expand(*q.shape[:2], T, T), mask)[0]
                        for q, k, _ in queries_keys_values(model, ids)])


# Attention maps of three models that know the names of numbers. Rows ask, columns answer, a row sums to 1.
# Q: Do attention maps explain a model?
# A: They say where a head looked, not what it took, and after layer 1 the vectors have already mixed: a column is "what
#    this place holds by now", not "this token" (Jain & Wallace 2019, arXiv 1902.10186). They do show whether a model
#    aligns: cross-attention should walk along the digits.
# What people get wrong: picking a pretty head by hand. Here a rule picks it: the one whose words look hardest at a
# single digit.
# How to read it. Encoder: words find their digits and digits their words, across [SEP], in both directions.
# Decoder: the upper right is empty, nobody looks ahead; a row is labelled with the token that was READ, and its output
# predicts the next one, so the row "forty" is about to write "thousand".
# Cross: a staircase from the upper left to the lower right is a translation in order, word by word. Rows that look at
# no single place ("hundred" has no digit of its own) are as telling as those that do.
def figure_attention(models, cfg):
    """One head each of a trained encoder, decoder and cross-attention, on the same number."""
    number = 40215
    name = decoder_only.number_to_words(number)
    encoder, _, reading = models.load("encoder_only")
    decoder, _, writing = models.load("decoder_only")
    both, _, translating = models.load("encoder_decoder")
    read = torch.tensor([reading.encode(f"[CLS] {number} [SEP] {name} [SEP]")])
    written = torch.tensor([writing.encode(f"{number}={name}")])
    cross = encoder_decoder.alignment(both, translating, str(number), name)
    # (title, weights (L, H, T, S), column labels, row labels, the rows that are words, the columns that are digits)
    labels = [tokens_of(reading, read[0].tolist()), tokens_of(writing, written[0].tolist()),
              [*str(number), "end"], [*name.split(), "end"]]
    panels = {"encoder": (attention_weights(encoder, read), labels[0], labels[0], slice(7, 12), slice(1, 6)),
              "decoder": (attention_weights(decoder, written), labels[1], labels[1], slice(5, 10), slice(0, 5)),
              "cross": (cross, labels[2], labels[3], slice(0, 5), slice(0, 5))}
    fig, axes = canvas([list(panels)], 4.9, width_ratios=[1.25, 1.1, 0.8])
    said = []
    for panel, (weights, columns, rows, words, digits) in panels.items():
        hardest = weights[..., words, digits].amax(-1).mean(-1)
        layer, head = divmod(int(hardest.argmax()), weights.size(1))
        image = heat(axes[panel], weights[layer, head], cmap="Blues", vmin=0, vmax=1)
        axes[panel].set_xticks(range(len(columns)), columns, rotation=90)
        axes[panel].set_yticks(range(len(rows)), rows)
        axes[panel].set_title({"cross": "cross-attention"}.get(panel, panel) + f"\nlayer {layer + 1}, head {head + 1}")
        axes[panel].set(xlabel="is looked at")
        said.append(f"{panel} {hardest.max():.2f}")
    axes["encoder"].set(ylabel="looks")
    fig.colorbar(image, ax=axes["cross"], label="weight")
    return finish(fig, f"{number} = {name}: the head of each model whose words look hardest at one digit\n"
                       f"(mean of their largest weight on a digit: {', '.join(said)})",
                  models, "encoder_only", "decoder_only", "encoder_decoder")


# Three ways to stack the same block. An encoder reads everything at once and answers in place; a decoder reads its own
# output; an encoder-decoder does both, and the two meet in cross-attention only.
# What people get wrong: "encoder-decoder = two models". The decoder asks the encoder's output for keys and values in
# every layer, and all of it is trained by one loss.
# How to read it. Bottom up, as the data flow; a number is a count of parameters, a shape what comes in or goes out.
# The blue boxes are nearly the same thing: what differs is the mask, and the cross-attention that makes a decoder's
# layer a third larger. The head costs nothing where it is the token table once more.
def figure_architectures(models, cfg):
    """The three architectures as boxes, with the shapes and parameters of the trained models."""
    encoder, decoder, both = (models.load(name)[0] for name in ("encoder_only", "decoder_only", "encoder_decoder"))

    def count(*parts):
        return f"{sum(p.numel() for part in parts for p in part.parameters()):,}"
    # Columns from the left: x, then boxes from the bottom up as (text, colour, height). Sizes come from the models.
    C, V, bert, gpt = decoder.cfg.n_embd, decoder.cfg.vocab_size, encoder.bert, decoder.transformer
    # What is neither table nor layer in BERT. (parameters() lists a tied table once.)
    rest = sum(p.numel() for p in encoder.parameters()) - sum(
        p.numel() for part in (bert["embeddings"], bert["encoder"]) for p in part.parameters())
    columns = {
        ("encoder-only (BERT)", 0.0): [
            ("ids (B, T)", "white", 0.6),
            (f"tokens + positions + halves\n{count(bert['embeddings'])}", YELLOW, 0.9),
            (f"{encoder.cfg.n_layer} x [ attention, both ways\n+ MLP ]\n{count(bert['encoder'])}", SKY, 1.4),
            (f"pooler + two heads\n{rest:,}", ORANGE, 0.9),
            (f"every token (B, T, {V})\nand match? (B, 2)", "white", 0.8)],
        # The head has no weights of its own: it is the token table, read the other way round.
        ("decoder-only (GPT-2)", 2.6): [
            ("ids (B, T)", "white", 0.6), (f"tokens + positions\n{count(gpt['wte'], gpt['wpe'])}", YELLOW, 0.9),
            (f"{decoder.cfg.n_layer} x [ attention, causal\n+ MLP ]\n{count(gpt['h'])}", SKY, 1.4),
            (f"head: the token table again\n{count(gpt['ln_f'])} (norm)", ORANGE, 0.9),
            (f"next token (B, T, {V})", "white", 0.8)],
        ("encoder-decoder (T5)", 5.2): [
            ("source ids (B, S)", "white", 0.6), (f"tokens (one table)\n{count(both.shared)}", YELLOW, 0.9),
            (f"{both.cfg.n_layer} x [ attention, both ways\n+ MLP ]\n{count(both.encoder)}", SKY, 1.4),
            (f"memory (B, S, {C})", "white", 0.6)],
        ("", 7.8): [
            ("target so far (B, T)", "white", 0.6), ("the same table", YELLOW, 0.9),
            (f"{both.cfg.n_layer} x [ attention, causal\n+ CROSS-ATTENTION\n+ MLP ]\n{count(both.decoder)}", SKY, 1.4),
            ("head: the token table again", ORANGE, 0.9), (f"next token (B, T, {V})", "white", 0.8)]}
    # Boxes grow upwards from y = 0, all of a column in the order of the list.
    fig, axes = canvas([["all"]], 5.6)
    ax, tops = axes["all"], {}
    from matplotlib.patches import FancyBboxPatch
    for (title, x), boxes in columns.items():
        y = 0.0
        for i, (text, color, height) in enumerate(boxes):
            ax.add_patch(FancyBboxPatch((x, y), 2.2, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=color,
                                        ec=BLACK, lw=0.9))
            ax.text(x + 1.1, y + height / 2, text, ha="center", va="center", fontsize=9)
            # An arrow from the box below: everything flows upwards.
            if i:
                ax.annotate("", (x + 1.1, y - 0.02), (x + 1.1, y - 0.26), arrowprops=dict(arrowstyle="-|>", lw=1))
            tops[x, i], y = y + height / 2, y + height + 0.28
        ax.text(x + 1.1 + (1.3 if "T5" in title else 0), 5.85, title, ha="center", fontsize=12, weight="bold")
    # Where the two stacks meet: memory -> keys and values of the cross-attention.
    ax.annotate("", (7.78, tops[7.8, 2]), (7.42, tops[5.2, 3]),
                arrowprops=dict(arrowstyle="-|>", lw=2.2, color=RED, connectionstyle="arc3,rad=-0.15"))
    ax.text(6.3, tops[5.2, 3] + 0.48, "keys and values for every layer", color=RED, ha="center", fontsize=9)
    ax.set(xlim=(-0.1, 10.1), ylim=(-0.1, 6.2))
    ax.axis("off")
    sizes = ", ".join(f"{label} {count(model)}" for label, model in (
        ("encoder-only", encoder), ("decoder-only", decoder), ("encoder-decoder", both)))
    return finish(fig, f"The same block stacked in three ways, C = {C}. The two stacks of T5 meet in cross-attention "
                       f"only.\nParameters: {sizes}",
                  models, "encoder_only", "decoder_only", "encoder_decoder")


# A language model ends in a distribution; what to do with it is a choice made outside. Temperature T makes p^(1/T) of
# every p; top-k keeps the k likeliest; top-p the smallest set that reaches p (Holtzman et al. 2019, arXiv 1904.09751).
# What people get wrong: temperature 0 is not "divide by a tiny number" but argmax; the token that CROSSES p stays; and
# none of the three makes a model know more, they only cut where it is unsure.
DRAWS = 4000


def draw_frequencies(logits, generator, **how):
    """How often sample_next returns each token, as shares of DRAWS draws. logits (V) -> (V). how: its own arguments."""
    # DRAWS rows of the same logits are one call: rows of a batch are drawn independently.
    drawn = decoder_only.sample_next(logits.expand(DRAWS, -1), generator=generator, **how)
    return torch.bincount(drawn, minlength=len(logits)) / DRAWS


# How to read it. Dots are the model's own distribution, the same in all six panels; bars are what was drawn. Bars below
# the dots on the right and above on the left: sharpened. Bars missing on the right: cut, and what was cut is shared out
# among the rest. The title counts kinds: how long a tail the drawing can fall into.
def figure_sampling(models, cfg):
    """Six ways to draw from one real distribution: bars = what sample_next drew, dots = the model."""
    # Drawn and not computed: the picture then shows what the script does, mistakes included. 4,000 draws have a
    # standard error of at most sqrt(0.25 / 4000) = 0.8 points.
    model, _, tokenizer = models.load("decoder_text")
    prompt = "the object is a "
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(prompt)]))[0, -1]
    probs = logits.softmax(-1)
    order = probs.argsort(descending=True)[:14]
    ways = {"temperature 0: argmax": dict(temperature=0.0), "temperature 0.5": dict(temperature=0.5),
            "temperature 1": dict(temperature=1.0), "temperature 2": dict(temperature=2.0),
            "top-k 4": dict(temperature=1.0, top_k=4), "top-p 0.6": dict(temperature=1.0, top_p=0.6)}
    fig, axes = canvas([[0, 1, 2], [3, 4, 5]], 5.6, sharey=True)
    kinds = {}
    for i, (title, how) in enumerate(ways.items()):
        share = draw_frequencies(logits, torch.Generator().manual_seed(cfg.seed), **how)
        kinds[title] = int((share > 0).sum())
        axes[i].bar(range(len(order)), share[order].tolist(), color=SKY, edgecolor=BLUE, label="drawn")
        axes[i].plot(range(len(order)), probs[order].tolist(), "o", ms=4, color=BLACK, label="model")
        axes[i].set_xticks(range(len(order)), tokens_of(tokenizer, order.tolist()))
        axes[i].set_title(f"{title} ({kinds[title]} of {len(probs)} kinds)", fontsize=10.5)
        axes[i].set(ylim=(0, 1.02), **({"ylabel": "share of draws"} if i % 3 == 0 else {}))
    axes[0].legend(fontsize=9)
    return finish(fig, f"What follows {prompt!r}? {DRAWS:,} draws each. Temperature changes all of it, cuts remove the "
                       f"tail:\n{kinds['temperature 2']} kinds of character at temperature 2, "
                       f"{kinds['temperature 1']} at 1, {kinds['top-k 4']} with top-k 4, "
                       f"{kinds['top-p 0.6']} with top-p 0.6", models, "decoder_text")


def watch_beams(model, ids, steps, beams):
    """One real beam_search, watched. -> (its answer (N), its score, levels, greedy (N), greedy's running sums).

    The score is what beam_search returns: the sum of log-probs over the length, here equal for all.

    levels[n] = [(score, token, parent, kept)], best first, over all candidates of step n; parent is a place among the
    kept of the level before (0 = the prompt).
    """
    # beam_search asks for three things of the model, so whoever stands in their place sees what it does: the logits it
    # got, the rows it kept, the tokens it put behind them. The search itself is the script's, unchanged.
    logits, chosen = [], []
    prefill, step = decoder_only.prefill, decoder_only.decode_step

    def seen_prefill(*inputs):
        first, state = prefill(*inputs)
        logits.append(first[:1])
        return first, state

    def seen_step(model, token, state):
        chosen[-1].append(token)
        more, state = step(model, token, state)
        logits.append(more)
        return more, state
    # reorder is called once before the first step (all beams are the prompt), then before each step.
    real_reorder = decoder_only.reorder
    with (mock.patch.object(decoder_only, "prefill", seen_prefill),
          mock.patch.object(decoder_only, "decode_step", seen_step),
          mock.patch.object(decoder_only, "reorder",
                            lambda state, rows: (chosen.append([rows]), real_reorder(state, rows))[1])):
        out, scores = decoder_only.beam_search(model, ids, steps, num_beams=beams)
    # What was seen is put together: row b of one step's logits belongs to the b-th prefix that was kept before it.
    # Sums of log-probs along every path: parents from the rows that were kept, children from the logits.
    levels, running = [], torch.zeros(1)
    for n, (one, kept) in enumerate(zip(logits, [*chosen[1:], None], strict=True)):
        total = running[:, None] + one.float().log_softmax(-1)
        pairs = set(zip(kept[0].tolist(), kept[1].tolist(), strict=True)) if kept else {
            divmod(int(total.argmax()), total.size(1))}
        if n == 0:  # all rows are copies of the one prompt
            pairs = {(0, token) for _, token in pairs}
        best = total.flatten().topk(3 * beams)
        levels.append([(score, index % total.size(1), index // total.size(1),
                        (index // total.size(1), index % total.size(1)) in pairs)
                       for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)])
        if kept:
            running = torch.stack([total[0 if n == 0 else row, token] for row, token in zip(*kept, strict=True)])
    # Beside it the greedy path, one token at a time, and what it adds up to.
    greedy = decoder_only.generate(model, ids, steps)[0]
    with torch.no_grad():
        logp = model(torch.cat((ids[0], greedy))[None])[0, ids.size(1) - 1:-1].log_softmax(-1)
    return out[0, 0], scores[0, 0].item(), levels, greedy, logp.gather(1, greedy[:, None])[:, 0].cumsum(0).tolist()


# Greedy takes the likeliest next token and cannot go back. Beam search keeps the K best prefixes at every step, so a
# slightly worse beginning with a much better sequel survives (figure: the tree of decoder_only.py's comment, real).
# Q: Does a wider beam find better text?
# A: Likelier text, on average; not better. In open text the likeliest is bland and repeats itself (Holtzman et al.
#    2019). And it is no guarantee in a single case: what is cut early never comes back, so even a wider beam may lose
#    to a narrower one.
# What people get wrong: beams are not K samples. There is no chance in it.
BEAM_PROMPTS = ("the ", "an ", "object", "return", "method ", "class ", "string ", "in the s", "of a ", "this ")


# How to read it. A column holds the candidates of one step, best at the top; the three best are kept, whoever their
# parents are. The number is ln p of the text up to there, so it can only fall. Follow the thick line: it need not begin
# at the top. Follow the rings: greedy's text is a candidate as good as any until three others are better.
def figure_beams(models, cfg):
    """Every candidate of one beam search with 3 beams: kept, cut, the winner, and where greedy went."""
    model, _, tokenizer = models.load("decoder_text")
    # Ten beginnings, 8 characters each: a tree that still fits on a page.
    # A case where the two part, the clearest of a few prompts: where they agree there is nothing to see.
    runs = {prompt: watch_beams(model, torch.tensor([tokenizer.encode(prompt)]), 8, 3) for prompt in BEAM_PROMPTS}
    prompt = max(runs, key=lambda one: runs[one][1] * 8 - runs[one][4][-1])
    answer, score, levels, greedy, sums = runs[prompt]
    # Trace the winner back: which of the kept prefixes of each level lies on its path. In order of their scores the
    # kept candidates are the beams, as beam_search sorts them too.
    kept = [[one for one in level if one[3]] for level in levels]
    path, place = [], 0
    for level in reversed(kept):
        path.append(place)
        place = level[place][2]
    path.reverse()
    fig, axes = canvas([["tree"]], 5.4)
    ax, rows, height = axes["tree"], 6, {}
    texts = [[""]]
    for n, level in enumerate(levels):
        # A column per step, best at the top. Kept candidates in their order, then the best of those that were cut.
        shown = [*kept[n], *[one for one in level if not one[3]][:rows - len(kept[n])]]
        texts.append([texts[-1][one[2]] + tokenizer.decode([one[1]]) for one in kept[n]])
        for y, (total, token, parent, stays) in enumerate(shown):
            wins = stays and path[n] == y
            color, width = (RED, 3) if wins else (BLUE, 1.4) if stays else ("#B5B5B5", 0.8)
            start = (n - 0.78, -height[n - 1, parent]) if n else (-0.75, 0)
            ax.plot([start[0], n - 0.22], [start[1], -y], color=color, lw=width, zorder=1,
                    ls="-" if stays else ":")
            ax.text(n, -y + 0.06, tokens_of(tokenizer, [token])[0], ha="center", va="bottom", fontsize=14, zorder=3,
                    color=color if stays else GREY, weight="bold" if wins else "normal")
            ax.text(n, -y - 0.03, f"{total:.2f}", ha="center", va="top", fontsize=8.5, color=color if stays else GREY)
            height[n, y] = y
    # Greedy in a lane of its own below; a ring where the search still holds its prefix.
    text = tokenizer.decode(greedy.tolist())
    for n, (token, total) in enumerate(zip(greedy.tolist(), sums, strict=True)):
        ax.text(n, -rows - 0.64, tokens_of(tokenizer, [token])[0], ha="center", va="bottom", fontsize=14, color=GREEN)
        ax.text(n, -rows - 0.74, f"{total:.2f}", ha="center", va="top", fontsize=8.5, color=GREEN)
        for y, prefix in enumerate(texts[n + 1]):
            if prefix == text[:n + 1]:
                ax.plot(n, -y + 0.02, "o", ms=34, mfc="none", mec=GREEN, mew=1.6)
    lost = next((n + 1 for n in range(8) if text[:n + 1] not in texts[n + 1]), None)
    ax.text(-0.8, 0, repr(prompt), ha="right", va="center", fontsize=12)
    ax.text(-0.8, -rows - 0.6, "greedy", ha="right", va="center", fontsize=11, color=GREEN)
    ax.set(xlim=(-2.1, 7.6), ylim=(-rows - 1.2, 0.7), xlabel="token written", xticks=range(8), yticks=[])
    ax.set_xticklabels(range(1, 9))
    ax.spines[["left", "right", "top"]].set_visible(False)
    # A legend for lines that are drawn one by one.
    for color, width, style, label in ((RED, 3, "-", "winner"), (BLUE, 1.4, "-", "kept"), ("#B5B5B5", 0.8, ":", "cut"),
                                       (GREEN, 1.6, "-", "greedy (ring: still among the beams)")):
        ax.plot([], [], color=color, lw=width, ls=style, label=label)
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.22), frameon=False, fontsize=9)
    tail = f"the greedy prefix is cut at token {lost}" if lost else "the greedy prefix is never cut"
    return finish(fig, f"3 beams write {tokenizer.decode(answer.tolist())!r} (ln p = {score * 8:.2f}), greedy {text!r} "
                       f"({sums[-1]:.2f});\n{tail}. Of {len(runs)} prompts the one where they differ most; numbers: "
                       f"ln p so far", models, "decoder_text")


# The learning rate over a run, from the presets that the scripts really use. Warm-up, because Adam's first steps are of
# full size in a direction that one batch chose; then down, because noise averages out at small rates only.
# What people get wrong: off by one. Update 0 must move (step + 1), and the last one should run at the promised minimum.
# A schedule is a function of max_steps: stopping a cosine run early is not the same as a shorter cosine run.
# How to read it. Left, linear axes: GPT-2 and BERT peak far higher here than in their published sizes on the right,
# since small models bear larger steps. Right, logarithmic axes: a straight line up is the warm-up, a straight line down
# 1/sqrt(step) (Vaswani et al. 2017, eq. 3), and a cosine is flat nearly to the end, because the second half of a run is
# a narrow strip at the far right. T5's rate is large because Adafactor's steps are relative to the weights.
# The shapes are our scripts': T5 itself holds its rate for the first 10,000 steps, BERT's falls along a straight line,
# and GPT-2's paper names no rate (6e-4 is nanoGPT's).
def figure_schedule(models, cfg):
    """lr_at over its own presets: the laptop runs, and the published sizes."""
    small = {"GPT-2 (text)": (decoder_only, "laptop"), "GPT-2 (numbers)": (decoder_only, "numbers"),
             "BERT (numbers)": (encoder_only, "laptop"), "T5 (numbers)": (encoder_decoder, "laptop")}
    large = {"gpt2": (decoder_only, "gpt2"), "bert-base": (encoder_only, "bert-base"),
             "t5-base, 1/sqrt(step)": (encoder_decoder, "t5-base")}
    fig, axes = canvas([["small", "large"]], 4.2)
    ends = []
    for name, group in (("small", small), ("large", large)):
        styles = zip((BLUE, RED, GREEN, PURPLE), ("-", "--", "-.", ":"), strict=True)
        for (label, (script, preset)), (color, style) in zip(group.items(), styles, strict=False):
            settings = script.Config(**script.PRESETS[preset])
            last = settings.max_steps - 1
            # 600 looks: evenly spaced, or by equal factors where the axis is logarithmic (both ends always among them).
            steps = sorted({round(last * i / 600) if name == "small" else round((last + 1) ** (i / 600)) - 1
                            for i in range(601)})
            axes[name].plot([step + 1 for step in steps], [script.lr_at(step, settings) for step in steps],
                            color=color, ls=style, label=f"{label}: {settings.max_steps:,} steps")
            ends.append(script.lr_at(last, settings) / settings.lr)
    axes["small"].set(title="what trains here", xlabel="update", ylabel="learning rate", ylim=(0, None))
    axes["large"].set(title="presets of published sizes (axes logarithmic)", xlabel="update", ylabel="learning rate",
                      xscale="log", yscale="log", ylim=(1e-7, 1))
    axes["small"].legend(fontsize=9)
    axes["large"].legend(fontsize=9, loc="upper left")
    return finish(fig, f"Up linearly, down along a cosine, or along 1/sqrt(step), which needs no last step:\nafter its "
                       f"last update t5-base still runs at {ends[-1]:.0%} of its peak, gpt2 at {ends[4]:.0%}")


# Sixteen blocks of decoder_only.py, and the same with a part taken out: residual connections, norms, or both.
# Q: Why do deep plain networks not learn?
# A: Backward multiplies by every layer on the way down, and 16 factors below 1 leave nothing. A residual makes each
#    factor 1 + something: the gradient arrives whole by the "1", whatever the branch does (He et al. 2015, arXiv
#    1512.03385).
# What people get wrong: "norms are against vanishing gradients". At the start they do keep its size without residuals
# (left); a few updates later it is gone (right). Attention without skips also makes all tokens alike, layer by layer
# (Dong et al. 2021, arXiv 2103.03404).
def gradient_norms(residual, norm, seed, depth=16, steps=0):
    """-> (norm of the gradient in each block, loss) of a deep small GPT after `steps` updates on the toy language.

    residual False: each block is mlp(ln_2(attn(ln_1(x)))) and adds nothing to what it read. norm False: ln_1 and ln_2
    hand through what they get. Everything else, initial weights included, is decoder_only.py's.
    """
    # init_std 0.125 = 1/sqrt(64): a product keeps the size of what it multiplies, so depth alone is to blame.
    cfg = decoder_only.Config(n_layer=depth, n_head=4, n_embd=64, init_std=0.125, block_size=17, vocab_size=46,
                              seed=seed, lr=1e-3)
    model = decoder_only.build_model(cfg)

    def plain(self, x, mask=None, cache=None, layer=0):
        return self.mlp(self.ln_2(self.attn(self.ln_1(x), mask, cache, layer)))
    for block in model.transformer.h:
        if not norm:  # the last norm, in front of the head, stays: without it the logits alone would decide
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
        if not residual:
            block.forward = types.MethodType(plain, block)
    rows = decoder_only.number_rows(decoder_only.draw_numbers(2000, seed, False), decoder_only.ToyTokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    # The loss of the last batch is looked at before its update would be made.
    for step in range(steps + 1):
        loss, count, _ = decoder_only.compute_loss(model, decoder_only.get_batch(rows, 16, seed, step), cfg)
        optimizer.zero_grad()
        (loss / count).backward()
        if step < steps:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    # All weights of a block in one number: sqrt of the sum of their squares.
    # In float64: the square of 1e-23 is 0 in float32.
    norms = [nn.utils.get_total_norm([p.grad.double() for p in block.parameters()]).item()
             for block in model.transformer.h]
    return norms, (loss / count).item()


def figure_gradients(models, cfg, steps=30):
    """Gradient per block, with and without residuals and norms, at initialisation and after some updates."""
    kinds = {"residual, norm (GPT-2)": (True, True, BLUE, "o-"), "residual, no norm": (True, False, GREEN, "s--"),
             "no residual, norm": (False, True, ORANGE, "^-."), "neither": (False, False, RED, "x:")}
    fig, axes = canvas([["first", "later"]], 4.4, sharey=True)
    ratio, losses = {}, {}
    for name, count, title in (("first", 0, "at initialisation"), ("later", steps, f"after {steps} updates")):
        for label, (residual, norm, color, style) in kinds.items():
            norms, losses[label] = gradient_norms(residual, norm, cfg.seed, steps=count)
            legend = label if count == 0 else f"{label}: loss {losses[label]:.2f}"
            axes[name].plot(range(1, 17), norms, style, color=color, ms=5, label=legend)
            ratio[label, name] = norms[0] / norms[-1]
        axes[name].set(title=title, xlabel="block (1 = next to the embedding)", yscale="log", xticks=range(1, 17, 3))
        axes[name].legend(fontsize=9)
    axes["first"].set(ylabel="norm of the block's gradient")
    first, plain = ({part: ratio[label, part] for part in axes} for label in ("residual, norm (GPT-2)",
                                                                             "no residual, norm"))
    return finish(fig, f"First block's gradient over the last block's: with residuals {first['first']:.2g} at the "
                       f"start, {first['later']:.2g} after {steps} updates;\nwith norms alone {plain['first']:.2g}, "
                       f"then {plain['later']:.0e} (decoder_only.py's blocks, 16 of width 64, seed {cfg.seed})")


# Each token has a vector, and training moves tokens that are used alike close to each other. The toy language never
# says that "three" and "seven" are both digits, or that "thirteen" belongs with "seventeen": it has to be found out.
# Q: Do neighbours in a flat map mean neighbours in the model?
# A: Only if the two axes carry most of the variance; the axes say how much. What is far apart here is far apart there,
#    what is close may be separated along the axes that you do not see. t-SNE maps are worse: distances between their
#    clusters mean nothing at all.
WORD_GROUPS = {"units 0-9": (decoder_only.UNITS[:10], BLUE, "o"), "10-19": (decoder_only.UNITS[10:], RED, "s"),
               "tens": (decoder_only.TENS, GREEN, "^"), "multipliers": (["hundred", "thousand"], PURPLE, "D")}


def word_map(table):
    """Rows of the number words -> (words, their two largest principal components (n, 2), shares of variance).

    PCA in one call: x - mean = U diag(s) V^T. The rows of V^T are directions, the first the one along which the points
    spread most; U * s are the points in those directions; s^2 is each direction's share of the variance.
    """
    # Trap: leaving the mean in. The first direction then points from 0 to the middle of the cloud and says nothing.
    words = [word for group, _, _ in WORD_GROUPS.values() for word in group]
    x = table[[decoder_only.TOY_VOCAB.index(word) for word in words]]
    U, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    flat = (U * s)[:, :2]
    # A component's sign is arbitrary: fix it, or the map may be mirrored on another machine.
    flat = flat * flat.gather(0, flat.abs().argmax(0)[None]).sign()
    return words, flat, (s.square() / s.square().sum())[:2].tolist()


# How to read it. Colour and marker are ours, the places are the model's. Kinds that play different parts in a name come
# apart: after "twenty" a unit may follow, after "thirteen" none. "zero" is a unit by its name and stands alone by its
# use: it follows nothing and nothing follows it.
def figure_embeddings(models, cfg):
    """The number words of a trained decoder, by principal components."""
    table = models.load("decoder_only")[0].transformer.wte.weight.detach()
    words, flat, share = word_map(table)
    fig, axes = canvas([["map"]], 5.6)
    ax, start, groups = axes["map"], 0, []
    for label, (group, color, marker) in WORD_GROUPS.items():
        part = flat[start:start + len(group)]
        ax.plot(part[:, 0].tolist(), part[:, 1].tolist(), marker, color=color, ms=7, label=label)
        groups += [label] * len(group)
        start += len(group)
    place_labels(ax, flat, words, [WORD_GROUPS[label][1] for label in groups])
    # In all dimensions, not in the flat ones: whose nearest neighbour is of its own kind?
    rows = table[[decoder_only.TOY_VOCAB.index(word) for word in words]]
    nearest = torch.cdist(rows, rows).fill_diagonal_(math.inf).argmin(1).tolist()
    own = sum(groups[i] == groups[j] for i, j in enumerate(nearest))
    ax.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
    ax.margins(0.09)
    ax.legend(fontsize=9)
    return finish(fig, f"Nobody told it which words are alike: {own} of {len(words)} number words have a nearest "
                       f"neighbour of their own kind\n(in all {table.size(1)} dimensions; by chance about "
                       f"{sum(len(g) * (len(g) - 1) for g, _, _ in WORD_GROUPS.values()) / (len(words) - 1):.0f})",
                  models, "decoder_only")


def place_labels(ax, points, labels, colors):
    """Write each label beside its point, in the first of eight places where it covers no other point or label.

    points (n, 2). Greedy: a label that has its place keeps it; one that finds none free takes where it covers least.
    """
    # Sizes in shares of the axes' span: a letter is about 1.05 % wide and 3.4 % high in a 10 x 5.6 inch picture.
    span = points.amax(0) - points.amin(0)
    taken = [(x - 0.008, y - 0.012, x + 0.008, y + 0.012) for x, y in (points / span).tolist()]
    for (x, y), label, color in zip((points / span).tolist(), labels, colors, strict=True):
        wide, high = 0.0108 * len(label), 0.034
        # Right, left, above, below, and the four corners: where to begin, and how high.
        places = [(0.012, 0), (-0.012 - wide, 0), (-wide / 2, 0.034), (-wide / 2, -0.034),
                  (0.01, 0.03), (0.01, -0.03), (-wide - 0.01, 0.03), (-wide - 0.01, -0.03)]
        boxes = [(x + dx, y + dy - high / 2, x + dx + wide, y + dy + high / 2) for dx, dy in places]
        # Overlap of rectangles: not (left of, right of, above or below).
        hits = [sum(not (a[2] <= b[0] or a[0] >= b[2] or a[3] <= b[1] or a[1] >= b[3]) for b in taken) for a in boxes]
        best = hits.index(min(hits))
        taken.append(boxes[best])
        ax.text((x + places[best][0]) * span[0].item(), (y + places[best][1]) * span[1].item(), label, fontsize=9,
                color=color, ha="left", va="center")


# A mixture of experts routes each token to 2 of 8 feed-forward layers. The router learns through the experts it picked,
# so who is picked gets better and is picked more: without care a few do all the work.
# Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, section 2.2) adds a loss that is smallest at equal shares.
# What people get wrong: balance is not the goal but the price of capacity; forcing it too hard makes experts alike.
# And a balanced mean says little: look at shares per expert and per layer.
# How to read it. A band is an expert, its height the share of all visits that it gets; 8 equal bands would be perfect
# balance. Left, bands that die are experts that have been paid for and do nothing. The line on the right puts a layer
# into one number, 0 for equal loads, and takes the mean over layers. Both runs begin from the same weights.
def figure_experts(models, cfg):
    """Shares of the visits per expert over a short training, without and with the balancing loss."""
    looks = {name: models.summary(f"experts_{name}")["looks"] for name in ("none", "aux")}
    E = len(looks["aux"][0]["load"][0])
    # One layer is shown, the same in both: the one that ends most unequal when it is left alone.
    layer = int(torch.tensor(looks["none"][-1]["load"]).amax(1).argmax())
    fig, axes = canvas([["none", "aux", "cv"]], 4.3, width_ratios=[1, 1, 0.95])
    for name, title in (("none", "no balancing"), ("aux", "auxiliary loss, 0.01")):
        steps = [look["step"] for look in looks[name]]
        load = torch.tensor([look["load"][layer] for look in looks[name]], dtype=torch.float32)
        share = load / load.sum(1, keepdim=True)
        bands = [SKY, ORANGE, GREEN, YELLOW, BLUE, RED, PURPLE, GREY]
        axes[name].stackplot(steps, share.T.tolist(), colors=bands, edgecolor="white", lw=0.8)
        # Each band's number inside it, where it is high enough to hold one.
        middle = share.cumsum(1) - share / 2
        for e in range(E):
            if share[-1, e] > 0.04:
                axes[name].text(steps[-1] * 0.94, middle[-1, e].item(), str(e), va="center", fontsize=9,
                                color="white" if bands[e] in (BLUE, RED) else BLACK)
        axes[name].set(title=title, xlabel="step", ylim=(0, 1), xlim=(0, steps[-1]))
    axes["none"].set(ylabel=f"share of the visits, layer {layer + 1}, a band per expert")
    for name, color, style, label in (("none", RED, "s--", "no balancing"), ("aux", BLUE, "o-", "auxiliary loss")):
        axes["cv"].plot([look["step"] for look in looks[name]], [look["cv"] for look in looks[name]], style,
                        color=color, ms=4, label=label)
    axes["cv"].set(title="inequality, mean of layers", xlabel="step", ylabel="standard deviation / mean of the loads",
                   ylim=(0, None))
    axes["cv"].legend(fontsize=9)
    most = {name: max(look[-1]["load"][layer]) / sum(look[-1]["load"][layer]) for name, look in looks.items()}
    return finish(fig, f"Left alone, layer {layer + 1}'s busiest of {E} experts ends with {most['none']:.0%} of the "
                       f"visits, with the balancing loss {most['aux']:.0%} (equal: {1 / E:.1%});\ninequality ends at "
                       f"{looks['none'][-1]['cv']:.2f} and {looks['aux'][-1]['cv']:.2f}",
                  models, "experts_none", "experts_aux")


# Keys and values of the past are kept, so that writing token n + 1 does not read all n again. That grows with the text:
# bytes = 2 * layers * key heads * head size * bytes per number, for every token of every row.
# Q: What does a window forget?
# A: Not quite what lies outside it: layer 2 looks at layer 1's vectors, which saw W tokens further back, so L layers
#    reach about L * W. What is lost is exact recall beyond W, and, without the first few tokens ("sinks", Xiao et al.
#    2023, arXiv 2309.17453), the model's balance.
# What people get wrong: GQA saves memory and reading, not arithmetic; and int8 needs scales, so it is not a quarter.
def measured_cache_bytes(kind, cfg, length):
    """Bytes that a real cache of kv_cache.py holds for one row of `length` tokens: its buffers, asked.

    kind: one of kv_cache.py's cache classes; cfg: the shape, whose n_kv_head decides between MHA, GQA and MQA.
    """
    cache = kind(cfg, 1, length, like=torch.zeros(1))
    columns = min(length, cfg.sinks + cfg.window) if kind is kv_cache.WindowCache else length
    # The last column of a buffer is where pads are written; a ring also holds its few sinks twice. Neither counts here.
    buffers = [buffer for store in cache.stores for buffer in (store[:2] if kind is kv_cache.WindowCache else store)]
    return sum(buffer[:, :, :columns].numel() * buffer.element_size() for buffer in buffers)


def cache_kinds():
    """{label: (kind of cache, its settings, bytes per token by kv_cache.py's formula)}, at the size of preset 125m."""
    base = kv_cache.Config(**kv_cache.PRESETS["125m"])
    base.head_size = base.n_embd // base.n_head
    bytes_per_token = kv_cache.cache_bytes(base, 4)
    kinds = (kv_cache.KVCache, kv_cache.KVCache, kv_cache.KVCache, kv_cache.Int8Cache)
    heads = (base.n_head, base.n_kv_head, 1, base.n_kv_head)
    out = {label: (kind, dataclasses.replace(base, n_kv_head=K), size) for (label, size), kind, K in zip(
        bytes_per_token.items(), kinds, heads, strict=True)}
    return out | {f"GQA ({base.n_kv_head}), window {base.window} + {base.sinks} sinks": (
        kv_cache.WindowCache, base, list(bytes_per_token.values())[1])}


# How to read it. Both axes are logarithmic: a straight line of slope 1 is "so many bytes per token", and lines one
# above the other differ by a factor. Only the window is flat. Markers are tensors that were really allocated: if they
# lay off their line, the formula or the cache would be wrong.
def figure_cache(models, cfg):
    """Bytes of the KV cache against length: the formula as a line, real caches as markers."""
    fig, axes = canvas([["all"]], 4.9)
    ax, wrong, sizes = axes["all"], 0, {}
    styles = zip((RED, BLUE, GREEN, ORANGE, PURPLE), "os^Dv", ("-", "-", "-", "--", "-."), strict=True)
    for (label, (kind, shape, size)), (color, marker, style) in zip(cache_kinds().items(), styles, strict=True):
        lengths = [2 ** i for i in range(4, 18)]
        most = shape.sinks + shape.window if kind is kv_cache.WindowCache else math.inf
        ax.plot(lengths, [size * min(n, most) / 1e6 for n in lengths], style, color=color,
                label=f"{label}: {size / 1e3:.1f} kB a token{' up to the window' if most < math.inf else ''}")
        # Real caches up to 1,024 tokens; longer ones are the same tensor with more columns.
        for n in (16, 64, 256, 1024):
            real = measured_cache_bytes(kind, shape, n)
            wrong = max(wrong, abs(real - size * min(n, most)))
            ax.plot(n, real / 1e6, marker, color=color, ms=7)
        sizes[label] = size * min(lengths[-1], most)
    ax.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="MB per row, float32")
    ax.legend(fontsize=9, title="lines: formula, markers: a real cache's tensors")
    full, grouped, *_, window = sizes.values()
    return finish(fig, f"{lengths[-1]:,} tokens take {full / 1e9:.1f} GB with a key head per query head, "
                       f"{grouped / 1e9:.1f} GB with GQA, {window / 1e6:.1f} MB in a window\n(kv_cache.py's "
                       f"preset 125m; formula and real tensors differ by {wrong} bytes)")


# Softmax needs the maximum of a row before it can begin. Flash attention (Dao et al. 2022, arXiv 2205.14135, section
# 3.1) sees a tile at a time: it takes the maximum so far, and when a larger one comes, everything summed up is shrunk
# by exp(old - new). No row is ever held as a whole, which is why there is no T x T matrix.
# What people get wrong: it is not an approximation. The maximum cancels; it serves the number range alone.
# How to read it. Top: a new maximum in a tile lifts the red line. Middle: there the sum so far gets a smaller unit's
# worth, so it drops by exp(old - new), then the tile's own terms are added; where the maximum stays it only grows.
# Bottom: the same in units that do not change; it only rises, and ends on the line of the ordinary softmax.
def figure_softmax(models, cfg):
    """running_softmax over one real row of scores: maximum, sum, and what they add up to."""
    model, _, tokenizer = models.load("decoder_text")
    ids = torch.tensor([tokenizer.encode("Return the value of the named attribute of object"[:40])])
    # Of all heads the one whose maximum rises most often: there the correction has the most to do.
    rows = [(q[0, h, -1] @ k[0, h].T / math.sqrt(q.size(-1)), v[0, h])
            for q, k, v in queries_keys_values(model, ids) for h in range(q.size(1))]
    runs = [(scores, values, *flash_attention.running_softmax(scores, values, 5)) for scores, values in rows]
    scores, values, out, history = max(runs, key=lambda run: len({m for m, _ in run[3]}))
    ends = [5 * (i + 1) for i in range(len(history))]
    fig, axes = canvas([["scores"], ["sum"], ["exact"]], 6.4, sharex=True)
    axes["scores"].bar([i + 0.5 for i in range(len(scores))], scores.tolist(), color=SKY, label="score q.k / sqrt(D)")
    axes["scores"].stairs([m for m, _ in history], [0, *ends], color=RED, lw=2, baseline=None, label="maximum m so far")
    axes["scores"].set(ylabel="score")
    axes["sum"].stairs([z for _, z in history], [0, *ends], color=BLUE, lw=2, baseline=None,
                       label="sum z so far, in units of exp(m)")
    axes["sum"].set(ylabel="z")
    # m + ln z means the same whatever m is: the logarithm of the sum of all exponentials so far.
    exact = scores.logsumexp(0).item()
    sofar = [m + math.log(z) for m, z in history]
    axes["exact"].plot(ends, sofar, "o-", color=GREEN, label="m + ln z")
    axes["exact"].axhline(exact, color=BLACK, ls="--", lw=1, label="of the whole row at once")
    axes["exact"].set(ylabel="ln of the sum", xlabel="keys read, in tiles of 5")
    for ax in axes.values():
        for end in ends:
            ax.axvline(end, color=GREY, lw=0.5, ls=":")
        ax.legend(fontsize=9, loc="upper left" if ax is axes["sum"] else "lower right", ncols=2)
    axes["sum"].margins(y=0.2)
    shrunk = sum(a[0] < b[0] for a, b in zip(history, history[1:], strict=False))
    off = (out - flash_attention.safe_softmax(scores) @ values).abs().max().item()
    return finish(fig, f"One row of {len(scores)} scores, 5 at a time: {shrunk} times the maximum rises and the sum "
                       f"so far shrinks; the end is exact\n(ln of the sum off by "
                       f"{abs(sofar[-1] - exact):.0e}, the weighted mean of the values by {off:.0e})",
                  models, "decoder_text")


# Four bits name one of 16 levels. Where should they lie? Trained weights, divided by the largest of their block of 64,
# crowd around 0, so NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3) puts more levels there: quantiles of a
# normal distribution instead of equal steps.
# What people get wrong: NF4 is no 4-bit float and has no arithmetic; a weight is looked up and multiplied in full
# precision. And the gain over equal steps is a matter of percent: blocks do more than levels.
def four_bit_errors(weight):
    """Relative rms error of a matrix in NF4 and in 16 evenly spaced levels, with the same blocks of 64.

    rms error / rms weight: 0.1 says that a weight is off by a tenth of the usual size of a weight. The scales are kept
    in full precision here (no double quantisation), so that the levels alone make the difference.
    """
    # int4 in practice uses 15 of the 16 (-7 .. 7) to keep an exact 0; with all 16 it gets the better chance here.
    nf4 = lora_qlora.dequantise_nf4(weight.shape, **lora_qlora.quantise_nf4(weight, double_quant=False))
    rows, absmax = lora_qlora.blocks_of(weight, 64)
    even = torch.linspace(-1, 1, 16)
    nearest = even[torch.bucketize(rows / absmax[:, None], (even[1:] + even[:-1]) / 2)] * absmax[:, None]
    even_error = (nearest - rows).flatten()[:weight.numel()]
    return [(error.square().mean() / weight.square().mean()).sqrt().item() for error in (nf4 - weight, even_error)]


# How to read it. Left: the two bars at -1 and 1 are no outliers, but the largest weight of each block, which is +-1 by
# definition; both codes therefore keep those levels. In between NF4's teeth stand where the histogram is high. Right:
# a marker below the dashed line is a matrix that NF4 keeps more exactly.
def figure_nf4(models, cfg):
    """NF4's levels over the histogram of real weights, and the error of every matrix beside even levels."""
    base, _ = lora_qlora.from_pretrained(models.folder("lora_qlora") / "base")
    matrices = {name: module.weight.detach().clone() for name, module in base.model.layers.named_modules()
                if isinstance(module, nn.Linear)}
    scaled = torch.cat([(rows / absmax[:, None]).flatten() for rows, absmax in
                        (lora_qlora.blocks_of(weight, 64) for weight in matrices.values())])
    fig, axes = canvas([["levels", "errors"]], 4.6, width_ratios=[1.9, 1])
    ax = axes["levels"]
    heights, edges = torch.histogram(scaled, 80, range=(-1.0, 1.0), density=True)
    ax.stairs(heights.tolist(), edges.tolist(), fill=True, color=SKY, label=f"{len(scaled):,} weights / block maximum")
    top = heights.max().item()
    # Two combs below the histogram: same number of teeth, other places. Between two teeth a weight goes to the nearer
    # one, so where teeth are close the error is small.
    ax.vlines(lora_qlora.NF4.tolist(), -0.12 * top, -0.02 * top, color=RED, lw=2, label="the 16 NF4 levels")
    ax.vlines(torch.linspace(-1, 1, 16).tolist(), -0.26 * top, -0.16 * top, color=BLACK, lw=2,
              label="16 even levels (int4)")
    ax.set(title="levels where the weights are", xlabel="weight / largest of its block of 64", ylabel="density",
           xlim=(-1.05, 1.05), ylim=(-0.32 * top, 1.45 * top))
    ax.legend(fontsize=9, loc="upper left")
    errors = {name: four_bit_errors(weight) for name, weight in matrices.items()}
    for part, color, marker in (("self_attn", BLUE, "o"), ("mlp", ORANGE, "^")):
        chosen = [error for name, error in errors.items() if part in name]
        axes["errors"].plot([100 * even for _, even in chosen], [100 * nf4 for nf4, _ in chosen], marker, color=color,
                            label={"self_attn": "attention", "mlp": "feed-forward"}[part])
    low, high = (f(100 * x for pair in errors.values() for x in pair) for f in (min, max))
    axes["errors"].plot([low, high], [low, high], color=GREY, ls="--", lw=1, label="equal")
    axes["errors"].set(title="error of each matrix", xlabel="even levels: rms error, % of rms weight",
                       ylabel="NF4: rms error, %")
    axes["errors"].legend(fontsize=9)
    nf4, even = (sum(pair[i] for pair in errors.values()) / len(errors) for i in (0, 1))
    return finish(fig, f"Trained weights crowd around 0, and so do NF4's levels: rms error {nf4:.1%} of the weights, "
                       f"with even levels {even:.1%}\n(mean of {len(errors)} matrices; NF4 is better in "
                       f"{sum(a < b for a, b in errors.values())} of them)", models, "lora_qlora")


# LoRA (Hu et al. 2021, arXiv 2106.09685) learns a change of rank R beside each frozen matrix, on the bet that the
# change which full fine-tuning would make is of low rank anyway.
# Q: Is LoRA a low-rank copy of the full update?
# A: No. It often works as well, but by another update: full fine-tuning spreads over many directions, LoRA has R, and
#    its updated matrices get large singular vectors that those of full fine-tuning do not have ("intruder dimensions",
#    Shuttleworth et al. 2024, arXiv 2410.21228).
# How to read it: right of the dotted line an adapter of that rank has nothing (what rounding leaves lies below the
# axis). Both axes are logarithmic; a line is a matrix, and a line that falls slowly is an update of many directions.
# LoRA's few values are larger than those of the full update: what it may not spread over many directions it puts into
# few. A higher rank need not help: see whether the validation losses in the title differ at all before paying for one.
def figure_lora(models, cfg):
    """Singular values of what full fine-tuning and LoRA changed, each matrix a line."""
    folder, rank = models.folder("lora_qlora"), models.summary("lora_qlora")["config"]["rank"]
    base, full, lora = (lora_qlora.from_pretrained(folder / name)[0] for name in ("base", "full", "base"))
    lora_qlora.load_adapter(lora, folder / "lora")
    spectra = {"full": lora_qlora.update_spectra(base, full), "lora": lora_qlora.update_spectra(base, lora)}
    fig, axes = canvas([["full", "lora"]], 4.6, sharey=True)
    within = {name: lora_qlora.energy_within(one, rank) for name, one in spectra.items()}
    for name, title in (("full", "full fine-tuning"), ("lora", f"LoRA, rank {rank}")):
        for matrix, values in spectra[name].items():
            attention = "self_attn" in matrix
            axes[name].plot(range(1, len(values) + 1), values.clamp(min=1e-8).tolist(), "-" if attention else "--",
                            lw=1.2, color=BLUE if attention else ORANGE)
        axes[name].axvline(rank + 0.5, color=BLACK, ls=":", lw=1.2)
        axes[name].text(rank + 0.8, 0.94, f"rank {rank}", transform=axes[name].get_xaxis_transform())
        axes[name].set(title=f"{title}: {within[name]:.0%} of the squared update within rank {rank}", yscale="log",
                       xscale="log", xlabel="singular value number")
        axes[name].title.set_fontsize(10.5)
    axes["full"].set(ylabel="singular value of the update", ylim=(1e-3, None))
    # One entry for each kind of line, not one for each of the matrices.
    for color, style, label in ((BLUE, "-", "attention matrices"), (ORANGE, "--", "feed-forward matrices")):
        axes["full"].plot([], [], style, color=color, label=label)
    axes["full"].legend(fontsize=9, loc="lower left")
    loss = models.summary("lora_qlora")["results"]["val_loss"]
    return finish(fig, f"LoRA is no copy of the full update, of which {within['full']:.0%} lies within rank {rank}.\n"
                       f"Validation losses: full {loss['full']:.3f}, LoRA {loss['lora']:.3f}, "
                       f"before {loss['base']:.2f}",
                  models, "lora_qlora")


def read_lines(path):
    """A .jsonl file, one JSON object per line, as training loops write them -> [dict]."""
    # Such a file can be appended to and read while it grows: half a list in one JSON value would be no JSON at all.
    return [json.loads(line) for line in path.read_text().splitlines()]


# DPO (Rafailov et al. 2023, arXiv 2305.18290, section 4) learns from pairs: reward = beta * ln(policy / reference), and
# the chosen answer's should be larger than the rejected one's.
# What people get wrong: the loss sees the margin only. It may grow because the chosen answer gets likelier, or because
# both get less likely and the rejected one faster ("likelihood displacement", Razin et al. 2024, arXiv 2410.08847). So
# plot the two log-probs, not only the margin.
# How to read it. Left: the margin is what the loss sees. Right: the same in log-probs, without beta and reference. If
# the blue line falls as well, the policy moves away from BOTH answers of a pair, to texts that nobody has compared.
def figure_dpo(models, cfg):
    """Rewards, margin and log-probs of the chosen and the rejected answers while pairs are learned."""
    rows = read_lines(models.folder("dpo") / "dpo" / "preferences.jsonl")
    steps = [row["step"] for row in rows]
    fig, axes = canvas([["rewards", "logps"]], 4.4)
    for label, color, style in (("chosen", BLUE, "o-"), ("rejected", RED, "s--")):
        for name in ("rewards", "logps"):
            axes[name].plot(steps, [row[f"{name}/{label}"] for row in rows], style, color=color, ms=5, label=label)
    axes["rewards"].plot(steps, [row["rewards/margins"] for row in rows], "^-.", color=BLACK, ms=5,
                         label="margin")
    axes["rewards"].axhline(0, color=GREY, lw=0.8)
    axes["rewards"].set(title="implicit reward, beta * ln(policy / reference)", xlabel="step", ylabel="reward")
    axes["logps"].set(title="where does the margin come from?", xlabel="step", ylabel="mean ln p of an answer, nats")
    axes["rewards"].legend(fontsize=9, loc="lower left")  # the margin is the distance between the two others
    axes["logps"].legend(fontsize=9)
    first, last = rows[0], rows[-1]
    moved = [last[f"logps/{kind}"] - first[f"logps/{kind}"] for kind in ("chosen", "rejected")]
    return finish(fig, f"The margin grows to {last['rewards/margins']:.1f}; {last['rewards/accuracies']:.0%} of the "
                       f"pairs are in order at the end.\nFrom the first line to the last ln p of the chosen answers "
                       f"moves by {moved[0]:+.1f} nats, of the rejected ones by {moved[1]:+.1f}", models, "dpo")


# Learning from a reward alone: the model answers, a program says right or wrong. REINFORCE (Williams 1992) pushes up
# what was rewarded; GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1) compares the answers to one prompt with each
# other; PPO (Schulman et al. 2017, arXiv 1707.06347) asks a critic what was to be expected, and takes several careful
# steps on each batch of answers.
# What people get wrong: comparing per update. A rollout of GRPO has twice the answers of the others here, and PPO makes
# three steps on each; so the axis counts answers.
# How to read it. Left: it starts at the imitator's rate, since it learned from annotators who write the whole name only
# some of the time. Right: what that costs in distance; to do always what one did with probability p costs -ln p nats.
# A method that climbs as high on a shorter way has changed less of what it was.
def figure_reward(models, cfg):
    """Reward of the three methods, and how far each went from where it began."""
    folder, made = models.folder("ppo_grpo"), models.summary("ppo_grpo")["config"]
    fig, axes = canvas([["reward", "kl"]], 4.4)
    ends = {}
    for method, color, style, label in (("reinforce", GREEN, "^-", "REINFORCE"), ("grpo", ORANGE, "s--", "GRPO"),
                                        ("ppo", BLUE, "o-.", "PPO")):
        rows = read_lines(folder / method / "metrics.jsonl")
        size = made["prompts"] * made["group"] if method == "grpo" else made["samples"]
        answers = [row["update"] * size for row in rows]
        axes["reward"].plot(answers, [row["reward"] for row in rows], lw=0.7, alpha=0.5, color=color)
        # Thin: every rollout, as noisy as it is. Marked: the same numbers, averaged over five.
        groups = [slice(i, i + 5) for i in range(0, len(rows), 5)]
        mean = [sum(row["reward"] for row in rows[group]) / len(rows[group]) for group in groups]
        axes["reward"].plot([answers[group][-1] for group in groups], mean, style, color=color, ms=5, label=label)
        axes["kl"].plot([a for a, row in zip(answers, rows, strict=True) if "kl" in row],
                        [row["kl"] for row in rows if "kl" in row], style, color=color, ms=4, markevery=5, label=label)
        ends[label] = (mean[0], mean[-1])
    axes["reward"].set(title="reward (thin: a rollout, marked: mean of five)", xlabel="answers sampled",
                       ylabel="share of right answers", ylim=(0, 1))
    axes["kl"].set(title="distance from the imitator", xlabel="answers sampled", ylabel="KL, nats per answer",
                   ylim=(0, None))
    for ax in axes.values():
        ax.legend(fontsize=9)
    return finish(fig, "Right or wrong is all they are told. Reward from the first five rollouts to the last:\n"
                       + ", ".join(f"{label} {a:.2f} to {b:.2f}" for label, (a, b) in ends.items()), models, "ppo_grpo")


# name -> the function that draws it; --only takes these names. In the order in which they are worth looking at.
FIGURES = {"positions": figure_positions, "rope": figure_rope, "buckets": figure_buckets, "masks": figure_masks,
           "attention": figure_attention, "architectures": figure_architectures, "sampling": figure_sampling,
           "beams": figure_beams, "schedule": figure_schedule, "gradients": figure_gradients,
           "embeddings": figure_embeddings, "experts": figure_experts, "cache": figure_cache, "softmax": figure_softmax,
           "nf4": figure_nf4, "lora": figure_lora, "dpo": figure_dpo, "reward": figure_reward}


def save_figure(fig, out, name):
    """Write NAME.png and NAME.svg, each whole or not at all. -> their paths.

    PNG for a page on a screen, SVG for one that is printed or enlarged: its lines stay lines.
    """
    import matplotlib
    # The same numbers give the same files, so that a changed picture shows up as a changed file.
    # An SVG holds the date and random names for its parts; without both the same picture is the same file.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for kind, options in (("png", {}), ("svg", {"metadata": {"Date": None}})):
            decoder_only.write_atomically(out / f"{name}.{kind}",
                                          lambda file, kind=kind, options=options: fig.savefig(file, format=kind,
                                                                                               **options))
    return [out / f"{name}.{kind}" for kind in ("png", "svg")]


def main(cfg):
    """Draw what --only names, or everything. -> ({name: figure}, cfg).

    Pictures are written one by one: after Ctrl-C those that were finished are there, and so are the models behind them.
    """
    out, models, figures = decoder_only.out_folder(cfg), Models(cfg), {}
    began = time.perf_counter()
    for name in [name for name in cfg.only.split(",") if name] or FIGURES:
        figures[name] = FIGURES[name](models, cfg)
        png, svg = save_figure(figures[name], out, name)
        print(f"{name:<14}{png} {svg.name}\n    {' '.join(figures[name].get_suptitle().split())}", flush=True)
    # The same file as every script leaves, so that train_all.py can keep and quote it.
    seconds = time.perf_counter() - began
    summary = {"config": dataclasses.asdict(cfg), "seconds": seconds, "torch": torch.__version__,
               "figures": [f"{name}.png" for name in figures],
               "results": {"pictures": len(figures),
                           "sentences": {name: " ".join(fig.get_suptitle().split()) for name, fig in figures.items()}}}
    decoder_only.write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    print(f"\n{len(figures)} pictures in {out}/, {seconds:.0f} s. The comment above each "
          f"figure_NAME in {Path(__file__).name} says what to look for and what people get wrong.\n"
          f"Next: the script that a picture is about, from its top; compare_architectures.py for which of them is good "
          f"at what.")
    return figures, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
