# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
WHICH ARCHITECTURE FOR WHAT?                     python compare_architectures.py    46 min on two CPU cores

Idea     Ask the question with equal means: the same number of parameters, rows, steps and tries at the learning rate
         for every architecture, several seeds, and each task put to each model in the form that is natural for it.
         Then let the numbers speak: every sentence of conclusion below a table is computed from the table.
Picture  task                     BERT                    GPT-2, Llama 3, Qwen3, Qwen3 MoE   T5
         translate 40215 -> ...   fill ten blanks         go on behind "40215="              read, then write
         match     right name?    class of [CLS]          token behind the last one          first token written
         review    liked?         class of [CLS]          token behind the last one          first token written
         text      bits per byte  has no such number      of every byte                      of each second half
         --ablate: from GPT-2 to Qwen3 MoE, one change at a time
Symbols  B batch   T time   S source time   C n_embd   H heads   K key/value heads   D head size   V vocabulary
         F feed-forward width   L layers   E experts   k experts per token   R rows
Not here pre-training and size, which decide most comparisons that one hears about: here all models are small and fresh
Expect   translate: Exact names: GPT-2 is best with 99.7%, level with it T5 99.7% and Qwen3 MoE 97.8%; behind Qwen3
         97.5%, Llama 3 96.7% and BERT 84.4%. match: Right verdicts: Qwen3 is best with 96.6%, level with it Llama 3
         95.9% and Qwen3 MoE 94.2%; behind T5 94.8%, BERT 88.8% and GPT-2 85.7%. review: Right verdicts: Qwen3 MoE is
         best with 75.1%, level with it Qwen3 75.0% and T5 71.0%; behind Llama 3 70.1%, GPT-2 69.8% and BERT 65.3%.
         text: Bits per byte: Qwen3 is best with 2.586; behind Qwen3 MoE 2.618, Llama 3 2.623 and GPT-2 2.726. ablate:
         Bits per byte: QK-norm (Qwen3) is best with 2.601, level with it SwiGLU (Llama 3) 2.626 and mixture (Qwen3 MoE)
         2.634; behind GQA 2.644, RoPE 2.655, GPT-2 2.722 and RMSNorm, no biases 2.736.
         (results/compare_architectures.json)
Asked    Why is a comparison without a search over learning rates none?   Equal parameters, work or time?
         Why has BERT no bits per byte?   When is a difference a difference?   Why are FLOPs no times?  (grep "# Q:")
"""
import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# The scripts that are compared, used as libraries: their models, data, training and decoding are what a reader has read
# there. Nothing of it is written again here; the copies would be compared, not the originals.
import decoder_only
import encoder_decoder
import encoder_only
import llama3
import qwen3_moe

# --- 1. Config: how much to compare ----------------------------------------------------------------------------------
#     python compare_architectures.py --quick              one seed, two rates, short runs: the whole way in minutes
#     python compare_architectures.py --tasks match        one question alone, as thoroughly as in the full run
#     python compare_architectures.py --ablate             also walk from GPT-2 to Qwen3 MoE, one change at a time
# The trainings that are done stay in --out, each with the settings that it was made with: the same command after an
# interruption goes on where it was, and a changed setting trains again what it changes.


@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    out: str = "runs/compare_architectures"  # folder for the trained models, one folder each
    results: str = "results"          # folder for tables (.json, .md) and pictures; a quick run's go to quick/ in it
    tasks: str = "translate,match,review,text"  # which questions to ask
    data: str = "auto"                # of text: auto | shakespeare | pydocs | path of a UTF-8 file
    rates: str = "2e-3,5e-3,1.2e-2"  # learning rates that every model tries first, on the first seed
    seeds: int = 3                    # seeds that every model gets at its best rate, the first included
    jobs: int = 2                     # trainings at once, one thread each
    quick: bool = False               # a tenth of the work: shorter, one seed, two rates; no reviews
    ablate: bool = False              # also measure the changes between GPT-2 and Qwen3 MoE, one by one

    def __post_init__(self):
        # What is wrong in the command should be said now and not after half an hour of training.
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        unknown = [task for task in self.tasks.split(",") if task not in TASKS]
        if unknown:
            raise ValueError(f"tasks must be some of {', '.join(TASKS)}, not {unknown[0]!r}")
        try:
            if not all(0 < float(rate) < math.inf for rate in self.rates.split(",")):
                raise ValueError
        except ValueError:
            raise ValueError(f"rates must be numbers above 0, as in 1e-3,4e-3, not {self.rates!r}") from None


PRESETS = {"default": {}}

# What is compared: name -> (script, what makes this model of it). One script holds the dense Qwen3 and its mixture. All
# are fresh: no model of this size has been published, and a pre-trained one would be compared for its training.
MODELS = {"BERT": (encoder_only, {}), "GPT-2": (decoder_only, {}), "T5": (encoder_decoder, {}),
          "Llama 3": (llama3, {}), "Qwen3": (qwen3_moe, {"n_experts": 0}),
          "Qwen3 MoE": (qwen3_moe, {"n_experts": 4, "experts_per_token": 2})}
# Sizes and budgets. Every model of a task gets these: rows of each step, steps, width and depth (T5 has two stacks, so
# it is narrower, see settings). max_steps is chosen so that no task is solved by all: were all at 100 %, nobody could
# be told apart. Equal rows are equal tokens read: a row holds the same text in every form. The small vocabularies put
# nearly all parameters into matrices, where architectures differ; in reviews, with 3,000 words, two thirds are the
# table, as in real models of this size.
TASKS = {
    "translate": dict(n_layer=2, n_embd=64, block_size=18, batch_size=128, max_steps=300, weight_decay=0.01),
    "match": dict(n_layer=2, n_embd=64, block_size=18, batch_size=128, max_steps=500, weight_decay=0.01),
    "review": dict(n_layer=2, n_embd=64, block_size=40, batch_size=64, max_steps=200, weight_decay=0.1, dropout=0.1),
    "text": dict(n_layer=3, n_embd=96, block_size=64, batch_size=16, max_steps=800, weight_decay=0.1),
}
QUICK = dict(translate=150, match=200, text=150)  # steps of a quick run
ASKED = {"translate": "Which writes the name of a number best?", "match": "Which sees that a name is wrong?",
         "review": "Which hears whether a film was liked?", "text": "Which predicts real text best?"}


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


# What one would expect, before anything is measured. Compare it with what comes out; where it differs, learn.
#     translate   A decoder reads "40215=" from the left, and has seen all digits when it writes the first word. T5 has
#    separate weights for reading and writing, half as many for each. BERT must agree with
#                 itself: ten blanks are guessed, and words that are likely alone need not fit together.
#     match       Comparing two halves is easiest when each sees the other in every layer: BERT. A decoder's second half
#                 sees the first, not the other way round, and one token has to sum up.
#     review      6,200 sentences are too few to learn English from: hardly any difference, all near a bag of words.
#     text        Rotary positions and SwiGLU help, grouped queries cost a little; a mixture has the same weights, but
#                 each token uses half of its experts.
#     speed       A decoder's cache makes a token cheap. BERT has none: ten rounds, each over the whole row.


# --- 2. Model: equal size, the sum of its work, and the walk between two architectures -------------------------------
# Q: Equal parameters, work or time?
# A: Each favours somebody. Equal parameters: mixtures do half the feed-forward work of a dense model, so they may lose
#    a little. Equal work: they usually win, with more weights. Equal time: whoever has the best kernels wins. What
#    limits you decides: memory (a phone), arithmetic (training), latency (a chat). Here parameters, steps and rows are
#    equal, work and time are shown.
def parameters(model):
    """-> (in embedding tables, in everything else). A head that is tied to a table is counted once, in the table."""
    # Told apart because they cost differently: a table is read a row per token, a matrix is multiplied with every
    # token. "124M" of GPT-2 are 39 million of table and 85 of matrices.
    tables = sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    return tables, sum(p.numel() for p in model.parameters()) - tables


def fit_width(build, target):
    """The F, a multiple of 8, with which build(F) comes nearest to `target` parameters. build: int -> nn.Module."""
    def count(F):
        with torch.device("meta"):  # shapes without memory or values
            return sum(parameters(build(F)))
    # The count is a straight line in F: two points give it. Multiples of 8 because kernels like them (a mixture's
    # grouped product insists): a step is about 3 % of a dense model's parameters here and 8 to 12 % of a mixture's.
    # main checks that what comes out is within 5 %.
    slope = (count(16) - count(8)) / 8
    return max(8, 8 * round((8 + (target - count(8)) / slope) / 8))


def settings(task, name, vocab, **more):
    """The Config of one model for one task, at the size that all models of the task have. -> cfg of its script."""
    # The scripts' presets are tuned for their own tasks. Here no model may have a better-tuned recipe than another, so
    # all get one, and the one number that matters most and differs most, the learning rate, is searched for.
    script, special = MODELS[name]
    budget = {"dropout": 0.0, **TASKS[task]}
    C = budget["n_embd"]
    # One recipe for all: warm-up over a tenth of the steps, half a cosine down to 0, weights drawn with 1/sqrt(C).
    wanted = dict(budget, n_head=4, n_kv_head=2, tie_weights=True, init_std=C ** -0.5, beta2=0.98, min_lr_ratio=0.0,
                  vocab_size=vocab, mask_id=encoder_only.mask_id_of(encoder_only.ToyTokenizer()), device="cpu",
                  data="numbers" if task == "translate" else task, **special) | more
    wanted |= dict(warmup_steps=wanted["max_steps"] // 10, eval_every=wanted["max_steps"],
                   save_every=wanted["max_steps"])
    if script is encoder_only:  # a head for blanks, or for two classes
        wanted |= dict(heads="mlm") if task == "translate" else dict(heads="classify", n_labels=2)
    if script is encoder_decoder:  # two stacks of n_layer blocks, the second with two attentions: a quarter narrower
        wanted |= dict(n_embd=C * 3 // 4)
    # A script takes what it has a field for: GPT-2 knows no n_kv_head, nobody but BERT knows n_labels.
    fields = {field.name for field in dataclasses.fields(script.Config)}

    def config(**sizes):
        return script.Config(**{key: value for key, value in (wanted | sizes).items() if key in fields})

    # GPT-2 sets the size; its F and BERT's are 4*C by definition. The others have an F that can be chosen.
    if script in (decoder_only, encoder_only):
        return config()
    goal = sum(parameters(decoder_only.build_model(settings(task, "GPT-2", vocab, **more))))
    key = "expert_size" if special.get("n_experts") else "ffn_size"
    return config(**{key: fit_width(lambda F: script.build_model(config(**{key: F})), goal)})


# Q: Why are FLOPs no times?
# A: They count multiplications and additions, not bytes moved, kernels launched or cores idle. Attention over 18 tokens
#    is a few per cent of the FLOPs and more of the time; a mixture does half the feed-forward work and need not be
#    faster, because it sorts rows. Counting is still worth it: it does not depend on the machine, and at large widths
#    products are all.
def row_shape(task, name):
    """-> (S source tokens, T tokens, M positions whose logits are wanted) of one full row."""
    # M matters: a head over V tokens is the largest matrix there is. Reading a review asks for one verdict at the end,
    # so the other 39 positions need no logits; a text asks for a prediction at each.
    block = TASKS[task]["block_size"]
    if name == "T5":
        return {"translate": (7, 10, 10), "text": (block // 2, block // 2, block // 2)}.get(task, (block, 1, 1))
    if name == "BERT":
        return (0, block, 10 if task == "translate" else 1)
    return {"translate": (0, 16, 16), "text": (0, block, block)}.get(task, (0, block, 1))


def row_flops(name, cfg, S, T, M):
    """Floating-point operations of one forward pass over one row, by formula. Norms, biases and softmax: left out."""
    C, L, V = cfg.n_embd, cfg.n_layer, cfg.vocab_size
    # A product of a vector with a matrix of `weights` numbers: a multiplication and an addition for each. Attention of
    # T queries with S keys of H*D numbers in all: scores, then the weighted mean, 2*T*S*H*D each.
    if name == "T5":
        I, F_ = cfg.n_head * cfg.head_size, cfg.ffn_size  # noqa: E741
        reads = S * 2 * L * (4 * C * I + 2 * C * F_) + L * 4 * S * S * I
        # A written token passes self-attention, cross-attention's q and o, the feed-forward layer and the head; the
        # source's keys and values for the cross-attention are made once per source token.
        writes = T * 2 * L * (6 * C * I + 2 * C * F_) + S * 2 * L * 2 * C * I + L * 4 * (T * T + T * S) * I
        return reads + writes + M * 2 * V * C
    # 12*C*C weights a layer: 4*C*C of attention (q, k, v, o), 8*C*C of the feed-forward layer (C -> 4C -> C).
    if name in ("BERT", "GPT-2"):
        head = {"classify": C * C + 2 * C, "mlm": C * C + V * C}[cfg.heads] if name == "BERT" else V * C
        return T * 2 * L * 12 * C * C + L * 4 * T * T * C + M * 2 * head
    # q and o are C x H*D, k and v only C x K*D: grouped queries save weights and work here, and the cache in use.
    inner, shared = cfg.n_head * cfg.head_size, cfg.n_kv_head * cfg.head_size
    mlp = 3 * C * cfg.ffn_size
    if name == "Qwen3 MoE":  # the k experts that a token visits, the router, and the weighted sum of the k
        mlp = 3 * C * cfg.expert_size * cfg.experts_per_token + C * cfg.n_experts + C * cfg.experts_per_token
    return T * 2 * L * (2 * C * inner + 2 * C * shared + mlp) + L * 4 * T * T * inner + M * 2 * V * C


# The walk. GPT-2 and Qwen3 MoE differ in six steps; to see what each is worth, take one at a time. No script can do
# that, so here is one model whose parts can be exchanged. With no change it is decoder_only.py's GPT, with the first
# four llama3.py's Llama (heads tied, as in its small sizes), with five Qwen3, with all its mixture: tests hold its
# logits to theirs (up to eps in the norms: 1e-6 here throughout, 1e-5 in GPT-2 and Llama).
#     rms      LayerNorm -> RMSNorm, and every bias goes      Zhang & Sennrich 2019      one vector fewer per norm
#     rope     learned positions -> rotations of q and k      Su et al. 2021             a table fewer
#     gqa      4 key/value heads -> 2                         Ainslie et al. 2023        half of the cache
#     swiglu   gelu(x W) -> silu(x W1) * (x W2)               Shazeer 2020               three matrices, each narrower
#     qk       RMSNorm on every q and k head                  Henry et al. 2020          bounded scores: against spikes
#     moe      one feed-forward layer -> 2 of 4 experts       Shazeer et al. 2017        half of the feed-forward work
# What such a walk cannot say: how changes work together in another order, at another size, after a thousand times as
# many tokens. Grouped queries and mixtures are made for sizes where memory and arithmetic are what one pays for.
WALK = {"GPT-2": (), "RMSNorm, no biases": ("rms",), "RoPE": ("rms", "rope"), "GQA": ("rms", "rope", "gqa"),
        "SwiGLU (Llama 3)": ("rms", "rope", "gqa", "swiglu"),
        "QK-norm (Qwen3)": ("rms", "rope", "gqa", "swiglu", "qk"),
        "mixture (Qwen3 MoE)": ("rms", "rope", "gqa", "swiglu", "qk", "moe")}


class WalkAttention(nn.Module):
    """GPT-2's causal attention; "gqa": shared keys and values, "rope": rotated, "qk": normed before that."""

    def __init__(self, cfg, changes):
        super().__init__()
        self.cfg, self.changes, C, D = cfg, changes, cfg.n_embd, cfg.head_size
        self.kv_heads = cfg.n_kv_head if "gqa" in changes else cfg.n_head
        self.q, self.k, self.v, self.o = (nn.Linear(C, size, bias="rms" not in changes) for size in (
            C, self.kv_heads * D, self.kv_heads * D, C))
        if "qk" in changes:
            self.q_norm, self.k_norm = (llama3.RMSNorm(D, cfg.norm_eps) for _ in range(2))

    def forward(self, x, rope):
        # (B, T, heads*D) -> (B, T, heads, D); K of k and v may be fewer than H of q.
        heads = (self.cfg.n_head, self.kv_heads, self.kv_heads)
        q, k, v = (part(x).unflatten(-1, (H, -1)) for part, H in zip((self.q, self.k, self.v), heads, strict=True))
        if "qk" in self.changes:  # before the rotation, each head by itself
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if "rope" in self.changes:
            q, k = llama3.apply_rope(q, *rope), llama3.apply_rope(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads < self.cfg.n_head)
        return self.o(y.transpose(1, 2).flatten(2))


class Walk(nn.Module):
    """A decoder between GPT-2 and Qwen3 MoE. model(ids (B, T)) -> logits (B, T, V). cfg: of qwen3_moe.py."""

    def __init__(self, cfg, changes):
        super().__init__()
        cfg.head_size = cfg.head_size or cfg.n_embd // cfg.n_head
        self.cfg, self.changes, C = cfg, changes, cfg.n_embd

        # LayerNorm subtracts a mean and has a bias; RMSNorm has neither, and with it all other biases go as well, as in
        # Llama: one change of taste, "no constants", tested as one.
        def norm():
            return llama3.RMSNorm(C, cfg.norm_eps) if "rms" in changes else nn.LayerNorm(C, eps=cfg.norm_eps)

        # Equal parameters for all: SwiGLU's third matrix is paid with a smaller F, the mixture's experts share it out.
        def mlp():
            if "moe" in changes:
                return qwen3_moe.MixtureOfExperts(cfg)
            if "swiglu" in changes:
                return llama3.SwiGLU(cfg)
            bias = "rms" not in changes
            return nn.Sequential(nn.Linear(C, cfg.ffn_size, bias), nn.GELU("tanh"), nn.Linear(cfg.ffn_size, C, bias))

        # Learned positions are a table of block_size rows. RoPE needs none: what it saves goes into F as well.
        self.tokens = nn.Embedding(cfg.vocab_size, C)
        self.positions = None if "rope" in changes else nn.Embedding(cfg.block_size, C)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm1": norm(), "attention": WalkAttention(cfg, changes), "norm2": norm(), "mlp": mlp()})
            for _ in range(cfg.n_layer))
        self.norm = norm()
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # the last matrix of each branch smaller, so that 2L sums do not grow the stream
                last = name.endswith(("attention.o.weight", "mlp.2.weight")) or "down_proj" in name
                nn.init.normal_(parameter, std=cfg.init_std / (math.sqrt(2 * cfg.n_layer) if last else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.speed = llama3.rope_frequencies(llama3.Config(n_embd=C, n_head=cfg.n_head, head_size=cfg.head_size))

    def forward(self, ids):
        # Training only, so no cache and no padding: what attention may see is the causal triangle, always.
        positions = torch.arange(ids.size(1), device=ids.device)
        rope = llama3.rope_angles(positions, self.speed)
        x = self.tokens(ids) + (0 if self.positions is None else self.positions(positions))
        for layer in self.layers:
            x = x + layer["attention"](layer["norm1"](x), rope)
            x = x + layer["mlp"](layer["norm2"](x))
        return F.linear(self.norm(x), self.tokens.weight)


def build_walk(changes, cfg):
    """-> (a fresh Walk as large as GPT-2 with cfg's shape, its cfg). The seed decides the weights."""
    # F is a dense layer's width, or one expert's: with four experts each is a quarter as wide, and a token visits two,
    # so a mixture does half the feed-forward work with the same weights.
    def config(F):
        size = {"expert_size": F} if "moe" in changes else {"ffn_size": F, "n_experts": 0}
        return dataclasses.replace(cfg, **size)

    def build(F):
        torch.manual_seed(cfg.seed)
        return Walk(config(F), changes)

    gpt = dataclasses.replace(cfg, ffn_size=4 * cfg.n_embd, n_experts=0)
    with torch.device("meta"):
        goal = sum(parameters(Walk(gpt, ())))
    model = build(fit_width(build, goal))
    return model, model.cfg


# --- 3. Objective: what the scripts do not have ----------------------------------------------------------------------
# Next token, masked token and target given source are the scripts' own. Two forms are missing there.
#
# A loss function gets the model, a batch and the settings, and returns a sum and a count, so that train() can divide
# once.
def unmask_loss(model, batch, cfg):
    """BERT as a writer: of the ten blanks of a row a random share is hidden, from none to all. -> (sum, how many, {}).

    batch = what encoder_only.prepare makes of (ids, segments, anything); segment 1 = the answer. Ghazvininejad et al.
    2019, arXiv 1904.09324: hide a random *number* of tokens, for at decoding time any number is hidden.
    """
    # Trap: 15 %, as in pre-training. The first round then sees ten blanks, which training never showed.
    # One die per row says how much of it is hidden; one per token, whether it is. No random tokens and none left as
    # they are: a writer is only ever asked at [MASK].
    ids, segments, _, dice = batch
    share = dice[:, :1, 1]
    chosen = (segments == 1) & (ids > 0) & (dice[..., 0] < share)
    logits, _ = model(ids.masked_fill(chosen, cfg.mask_id), ids > 0, segments, chosen)
    return F.cross_entropy(logits, ids[chosen], reduction="sum"), chosen.sum(), {}


# Q: An encoder or a decoder to classify texts?
# A: Small and fresh: see what comes out here. Pre-trained: an encoder of 0.1 billion weights does the work of a decoder
#    of many times that size, in milliseconds, for it was trained on nothing but understanding. A large decoder needs no
#    training for a new task at all: describe the classes in the prompt. Few texts and no labels: the decoder. Millions
#    of texts a day: the encoder, perhaps trained on what the decoder said.
def answer_loss(model, batch, cfg):
    """A decoder as a judge: the token behind a row's last one is the verdict. batch = (ids (B, T), verdict id (B))."""
    # The last token has seen the whole row, so it can say what [CLS] says in BERT. What the causal mask costs: "forty"
    # is read without knowing what follows, and cannot be read again. What it gains: the same model writes.
    ids, verdict = batch
    loss_sum = F.cross_entropy(verdict_logits(model, ids), verdict, reduction="sum")
    mixtures = [module for module in model.modules() if isinstance(module, qwen3_moe.MixtureOfExperts)]
    if model.training and mixtures:  # keep the experts equally busy; pads are routed, but do not count
        aux = [qwen3_moe.load_balancing_loss([m.logits], cfg.experts_per_token, ids != 0) for m in mixtures]
        loss_sum = loss_sum + cfg.aux_coef * sum(aux) / len(aux) * len(ids)
    return loss_sum, verdict.new_tensor(len(ids)), {}


def verdict_logits(model, ids):
    """What a decoder says behind the last real token of each row. ids (B, T), pads (0) on the right -> (B, V)."""
    # Trap: position -1. In a padded row that is a pad, and the answer depends on the longest row of the batch.
    # hidden() and the head apart: V logits for B positions and not for B*T, which in reviews is 40 times as many.
    last = (ids != 0).sum(1) - 1
    return model.lm_head(model.hidden(ids)[torch.arange(len(ids)), last])


# --- 4. Data: each task in each model's natural form -----------------------------------------------------------------
#                  BERT                             decoders                           T5: source -> target
#     translate    [CLS] 4 2 [SEP] [M] x 10         4 2 = forty two \n                 4 2 \n -> forty two \n
#                  -> forty two \n \n \n ...       (words and \n are asked)
#     match        [CLS] 4 2 [SEP] forty six [SEP]  the same, then <yes> or <no>       the same -> <yes> or <no>
#                  -> class 0 or 1
#     review       [CLS] a fine film [SEP]          the same, then <yes> or <no>       the same -> <yes> or <no>
#     text         -                                64 characters, the next behind each  32 characters -> the next 32
# The rows of a task hold the same text in all forms; none sees more of it than another.
#
# Held-out rows are split once more: by `choose` the best learning rate is found, on `test` the result is measured.
# Trap: doing both on the same rows. Who tries more rates then gets the better result, by luck alone.
@functools.cache
def training_numbers(count):
    """`count` numbers to train on, the same for all models and seeds."""
    return decoder_only.draw_numbers(count, 1337, False)


@functools.cache
def held_out_numbers():
    """-> (numbers to choose by, numbers to test on), none of them in training, none in both."""
    # Drawn as in training, then without repeats: each number is asked once. Short ones are few: the hash holds out none
    # of one digit and five of two.
    held = list(dict.fromkeys(decoder_only.draw_numbers(4_000, 8, True)))
    return held[:500], held[500:1500]


def blank_rows(numbers, tokenizer):
    """[CLS] 4 2 [SEP] forty two \\n \\n ...: ten places for every name, so the length has to be guessed too.

    -> (ids (R, 18), segments (R, 18), zeros (R)). To give BERT as many blanks as words would tell it half the answer.
    """
    # \n fills up: it says "nothing more", at every place behind the name, and has to be guessed like a word.
    rows = []
    for n in numbers:
        name = tokenizer.encode(decoder_only.number_to_words(n))
        row = tokenizer.encode(f"[CLS] {n} [SEP]") + name + [tokenizer.eos_ids[0]] * (10 - len(name))
        rows.append(row + [0] * (18 - len(row)))
    ids = torch.tensor(rows)
    return ids, encoder_only.second_half(ids, tokenizer), torch.zeros(len(ids), dtype=torch.long)


# Q: Why is writing with an encoder slow, when it fills all blanks at once?
# A: At once it fills them badly: "forty" and "four" may both be likely for the first place, "hundred" and "thousand"
#    for the second, and no blank knows what another took. Going one by one mends that and costs a pass over the whole
#    row each, since every token's vector depends on every blank: nothing can be cached. Ten words are ten passes over
#    18 tokens; a decoder's ten steps are passes over one token each, with the past in its cache.
def write_names(model, tokenizer, numbers, rounds=10):
    """BERT writes: ten blanks behind each number, filled in `rounds` passes, the surest first. -> [name]."""
    # A row per number, all of them at once, padded on the right; segment 1 marks the blanks, as in training.
    # Ten rounds for ten blanks: one at a time. Fewer rounds are faster and worse, since blanks that are filled in one
    # round do not know of each other.
    blank = tokenizer.encode("[MASK]") * 10
    rows = [tokenizer.encode(f"[CLS] {n} [SEP]") + blank for n in numbers]
    ids = encoder_decoder.pad_ids(rows)
    out = encoder_only.unmask(model, ids, rounds, ids > 0, encoder_only.second_half(ids, tokenizer)).tolist()
    names = [row[len(str(n)) + 2:len(str(n)) + 12] for row, n in zip(out, numbers, strict=True)]
    return [tokenizer.decode(name[:name.index(1)] if 1 in name else name) for name in names]


@functools.cache
def labelled(task):
    """-> (train, choose, test), each (ids, segments, label (R)) in BERT's form; and the size of the vocabulary."""
    if task == "match":
        tokenizer = encoder_only.ToyTokenizer()
        choose, test = held_out_numbers()
        # 240,000 pairs to train on. Held-out numbers come four times each, with fresh dice: 2,000 pairs to choose by
        # and 4,000 to test on. (A wrong name may be that of a number of another split; it is only ever wrong.)
        splits = (training_numbers(240_000), choose * 4, test * 4)
        return *(encoder_only.pair_rows(part, tokenizer, i) for i, part in enumerate(splits)), tokenizer.n_vocab
    # SST-2 as in encoder_only.py. Its dev set is kept for the end; a tenth of the training sentences, by the hash of
    # their text, is what rates are chosen by. Words are learned from the remaining ones alone.
    paths = [encoder_only.fetch(name, encoder_only.SST2_URL.format(split), sha)
             for split, (name, sha) in encoder_only.SST2.items()]
    (texts, labels), dev = map(encoder_only.read_labelled, paths)
    held = [int(encoder_only.sha256_of_text(text)[:8], 16) % 10 == 0 for text in texts]
    # Lists and no generators. Trap: (... for part in ...) runs later, when `side` has its last value: both splits are
    # then the held-out tenth, rates are chosen on the training rows, and nothing looks wrong but a tiny vocabulary.
    (texts, labels), choose = ([[x for x, h in zip(part, held, strict=True) if h == side] for part in (texts, labels)]
                               for side in (False, True))
    tokenizer = encoder_only.WordPiece(encoder_only.learn_vocabulary(texts, 3000))
    size = TASKS[task]["block_size"]
    return *(encoder_only.sentence_rows(*part, tokenizer, size) for part in ((texts, labels), choose, dev)), \
        tokenizer.n_vocab


@functools.cache
def bag_of_words(texts, labels, val_texts, val_labels):
    """Multinomial logistic regression on which words occur, with an L2 penalty of 1/2 |w|^2. -> validation accuracy.

    The least that a model which reads order must beat; on a few thousand sentences models trained from scratch lose.
    """
    bags, val_bags = ([sorted(set(re.findall(r"\w+|[^\w\s]", text.lower()))) for text in part]
                      for part in (texts, val_texts))
    ids = {word: i for i, word in enumerate(sorted({word for bag in bags for word in bag}))}
    weight = torch.zeros(len(ids), max(labels) + 1, requires_grad=True)        # (V, G)
    bias = torch.zeros(max(labels) + 1, requires_grad=True)                    # (G)

    def scores(bags):
        # embedding_bag sums the rows of weight that belong to a bag: a product with a 0/1 matrix that nobody builds.
        known = [[ids[word] for word in bag if word in ids] for bag in bags]
        offsets = torch.tensor([0, *map(len, known)]).cumsum(0)[:-1]           # (R)
        flat = torch.tensor([i for bag in known for i in bag], dtype=torch.long)
        return F.embedding_bag(flat, weight, offsets, mode="sum") + bias       # (R, G)

    # The loss is convex: one minimum, no luck, no learning rate. L-BFGS finds it from all rows at once.
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(scores(bags), torch.tensor(labels), reduction="sum") + 0.5 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (scores(val_bags).argmax(-1) == torch.tensor(val_labels)).float().mean().item()


def text_ids(data):
    """-> (train, choose, test ids, vocabulary size, bytes per token of test, name). Characters; id 0 is padding."""
    # The last tenth is held out in two pieces. Windows drawn at random would not do: neighbours share nearly all.
    text, name, _ = decoder_only.load_text(data)
    tokenizer = decoder_only.CharTokenizer("".join(sorted(set(text))))
    cuts = [int(share * len(text)) for share in (0, 0.9, 0.95, 1)]
    parts = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    ids = [torch.tensor(tokenizer.encode(part)) + 1 for part in parts]
    return *ids, tokenizer.n_vocab + 1, len(parts[2].encode()) / len(parts[2]), name


def half_rows(ids, T, stride):
    """ids (n,) -> (first halves (R, T/2), second halves (R, T/2)) of windows of T tokens: what T5 reads and writes."""
    windows = ids.unfold(0, T, stride)
    if stride == 1:
        # T5's get_batch draws rows that are neighbours, for sentences sorted by length. Neighbouring windows of a text
        # are nearly the same row, so 60,000 of them are put into random order first (a million would take 0.5 GB).
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:60_000]]
    return windows[:, :T // 2], windows[:, T // 2:]


@torch.no_grad()
def second_half_nats(model, ids, T, batch=256):
    """Nats per token that a decoder loses on the second half of each window of T tokens, given the first."""
    # The same tokens that T5 is scored on, with the same context: nothing from before the window.
    total, windows = 0.0, ids.unfold(0, T, T)
    for rows in windows.split(batch):
        logits = model(rows[:, :-1])[:, T // 2 - 1:]  # position T/2 - 1 predicts token T/2, the first of the half
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, T // 2:].flatten(), reduction="sum").item()
    return total / (len(windows) * (T - T // 2))


def prepare_task(task, name, data="auto"):
    """Everything about one task for one model. -> dict: train, choose (tuples of rows), vocab, tokens (per row), loss
    (a function as in the scripts), score(model, cfg) -> {figure: value}, what (the data's name).
    """
    script = MODELS[name][0]
    if task == "text":
        train, choose, test, vocab, size, what = text_ids(data)
        T = TASKS[task]["block_size"]
        rows = half_rows if name == "T5" else decoder_only.text_rows

        # Bits per byte and not nats per token: the unit that does not depend on how the text was cut into tokens. Here
        # they are nearly proportional (one character is one byte, but for a few), elsewhere they are not.
        def score(model, cfg):
            per_byte = 1 / (math.log(2) * size)  # nats per token -> bits per byte
            if name == "T5":
                nats = script.evaluate(model, half_rows(test, T, T), cfg, script.compute_loss)["val_loss"]
                return {"bits_second_half": nats * per_byte}
            every = script.evaluate(model, rows(test, T, T), cfg, script.compute_loss)["val_loss"]
            return {"bits_per_byte": every * per_byte, "bits_second_half": second_half_nats(model, test, T) * per_byte}
        return dict(train=rows(train, T, 1), choose=rows(choose, T, T), vocab=vocab, tokens=T,
                    loss=script.compute_loss, score=score, what=what)
    # The translation, in the three forms that toy_dataset.py shows: blanks, one line, source and target.
    if task == "translate":
        train, (choose, test) = training_numbers(60_000), held_out_numbers()
        tokenizer = script.ToyTokenizer()

        def rows(numbers):
            if name == "BERT":
                return blank_rows(numbers, tokenizer)
            if name == "T5":
                pairs = [(str(n), decoder_only.number_to_words(n)) for n in numbers]
                return script.sequence_rows(pairs, tokenizer, 16)
            return script.number_rows(numbers, tokenizer)

        def score(model, cfg):
            if name == "BERT":
                names = write_names(model, tokenizer, test)
                right = sum(a == decoder_only.number_to_words(n) for a, n in zip(names, test, strict=True)) / len(test)
            else:
                right = script.exact_match(model, tokenizer, test, *([cfg] if name == "T5" else []))
            return {"exact_match": right}
        tokens = sum(len(str(n)) + len(decoder_only.number_to_words(n).split()) for n in train) / len(train)
        return dict(train=rows(train), choose=rows(choose), vocab=tokenizer.n_vocab, tokens=tokens, what="numbers",
                    loss=unmask_loss if name == "BERT" else script.compute_loss, score=score)
    # The two verdicts are two more tokens, "yes" and "no", at the end of the vocabulary; BERT has classes instead.
    *splits, V = labelled(task)
    tokens = (splits[0][0] > 0).sum(1).float().mean().item()

    def rows(split):
        ids, _, label = split
        return split if name == "BERT" else (ids, V + label) if name != "T5" else (ids, V + label[:, None])

    @torch.no_grad()
    def score(model, cfg):
        model.eval()
        ids, segments, label = splits[2]
        if name == "BERT":
            return {"accuracy": encoder_only.accuracy(model, splits[2], model.classify)}
        right = 0
        for part, wanted in zip(ids.split(500), label.split(500), strict=True):
            logits = model(part, torch.zeros_like(part[:, :1]), part != 0)[:, 0] if name == "T5" else verdict_logits(
                model, part)
            right += (logits[:, V:].argmax(1) == wanted).sum().item()  # the likelier of the two verdicts
        return {"accuracy": right / len(label)}
    loss = {"BERT": encoder_only.classify_loss, "T5": script.compute_loss if name == "T5" else None}
    return dict(train=rows(splits[0]), choose=rows(splits[1]), vocab=V + 2, tokens=tokens, what=task,
                loss=loss.get(name, answer_loss), score=score)


# --- 5. Training: many small runs, each kept -------------------------------------------------------------------------
# Q: Why is a comparison without a search over learning rates none?
# A: The best rate differs between architectures (see the last column), and a wrong one can cost more than most
#    architectural changes bring. Whoever tunes the own model and takes the other's rate from a paper measures the
#    tuning. Here everybody tries the same rates, once; the best one by the `choose` rows gets the other seeds too.
def code_of(task, model):
    """A short hash of the model's own script and of this file's part in its training. A kept run knows its code.

    Comments, docstrings and layout do not count: who mends a comment need not train again. What both borrow from other
    scripts, and torch's version, are not in it: delete --out after changing those.
    """
    script, special = (qwen3_moe, WALK[model]) if task == "ablate" else MODELS[model]
    mine = (settings, fit_width, WalkAttention, Walk, build_walk, unmask_loss, answer_loss, verdict_logits, blank_rows,
            held_out_numbers, training_numbers, write_names, labelled, text_ids, half_rows, second_half_nats,
            prepare_task, run_cell)
    known = repr((special, TASKS["text" if task == "ablate" else task]))
    for part in (script, *mine):
        tree = ast.parse(inspect.getsource(part))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        known += ast.dump(tree)
    return encoder_only.sha256_of_text(known)[:16]


# A cell is one training: a dict of everything that decides its result, plain data, so that it can be sent to a worker,
# written into a file and compared with one that was written months ago. Equal dicts, equal results: nothing is trained
# twice. (Delete --out to train everything again, for instance to see that this is true.)
def finished(cell):
    """What run_cell left for exactly this cell in an earlier run, or None."""
    kept = Path(cell["out"]) / "cell.json"  # written last, and atomically: where it is, the training was completed
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {"cell": None}
    return found if found["cell"] == cell else None


def run_cell(cell):
    """Train one model of the comparison. -> {"cell", "tables", "rest", "choose", "score", "seconds", "what"}.

    cell: task, model, lr, seed, max_steps, data, out, code: all that decides the result. Runs in a process of its own,
    on one thread: a matrix of 64 x 64 is too little to share out, two runs side by side are nearly twice the work.
    """
    folder = Path(cell["out"])
    torch.set_num_threads(1)  # here and not in the environment: the worker is already running, its threads are not
    folder.mkdir(parents=True, exist_ok=True)
    # What the script prints goes to a file: two trainings at once would talk into each other.
    with (open(folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        wanted = {key: cell[key] for key in ("lr", "seed", "max_steps", "out")}
        if cell["task"] == "ablate":
            script, task = qwen3_moe, prepare_task("text", "Qwen3", cell["data"])
            cfg = settings("text", "Qwen3 MoE", task["vocab"], **wanted)
            model, cfg = build_walk(WALK[cell["model"]], cfg)
        else:
            script, task = MODELS[cell["model"]][0], prepare_task(cell["task"], cell["model"], cell["data"])
            cfg = settings(cell["task"], cell["model"], task["vocab"], **wanted)
            model = script.build_model(cfg)
        result = script.train(model, cfg, task["train"], task["choose"], task["loss"])
        tables, rest = parameters(model)
        row = {"cell": cell, "tables": tables, "rest": rest, "choose": result["val_loss"], "what": task["what"],
               "score": task["score"](model.eval(), cfg), "seconds": result["seconds"]}
    decoder_only.write_atomically(folder / "cell.json", lambda file: file.write(json.dumps(row, indent=1).encode()))
    return row


# Q: Why do architectures want different learning rates?
# A: A rate says how far a weight moves per step, and what that does to the output depends on the path behind it. With
#    the norm behind the sum (BERT's post-norm) gradients near the output are large at the start, and high rates throw
#    the model off (Xiong et al. 2020, arXiv 2002.04745); norms in front of each branch and on q and k bound what a step
#    can do, and such models often take higher ones. The left panel of each picture shows whether it is so here.
#
def slug(model):
    """A model's name as a folder's: "Qwen3 MoE" -> "qwen3-moe"."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower())


# Three waves. First every model at every rate, with one seed: a saving, not a proof; where seeds scatter as much as
# rates, the choice is partly luck. Then further rates for those whose best one is the lowest or the highest. Then the
# other seeds, at each model's best rate alone: 3 rates + 2 seeds are 5 trainings per model and task instead of 9.
def plan(cfg, task, models):
    """The first half of the work: every model at every rate, on the first seed. -> list of cells."""
    # A quick run keeps all but the number of steps, rates and seeds: the same code, the same sizes, weaker sentences.
    steps = TASKS["text" if task == "ablate" else task]["max_steps"]
    if cfg.quick:
        steps = QUICK.get(task, QUICK["text"])
    rates = list(dict.fromkeys(float(rate) for rate in cfg.rates.split(",")))
    rates = rates[:2] if cfg.quick else rates
    return [{"task": task, "model": model, "lr": rate, "seed": 1, "max_steps": steps,
             "data": cfg.data if task in ("text", "ablate") else task,
             "code": code_of(task, model),
             "out": str(Path(cfg.out, *["quick"] * cfg.quick, task, f"{slug(model)}-{rate:g}-1"))}
            for model in models for rate in rates]


def beyond_the_edge(rows):
    """Models whose best rate is the lowest or the highest that they tried: the next one there. -> list of cells.

    The same rule for all: an optimum counts when a lower and a higher rate did worse. The steps are factors of 2.4.
    """
    tried = {}
    for row in rows:
        tried.setdefault(row["cell"]["model"], {})[row["cell"]["lr"]] = row
    more = []
    for mine in tried.values():
        best = min(mine, key=lambda rate: mine[rate]["choose"])
        for edge, factor in ((min(mine), 1 / 2.4), (max(mine), 2.4)):
            if best == edge and len(mine) < 8:  # a model that likes every rate better than the last is not learning
                rate = float(f"{best * factor:.2g}")
                cell = mine[best]["cell"]
                more.append(cell | {"lr": rate, "out": re.sub(r"-[^-]+(?:e-\d+)?-1$", f"-{rate:g}-1", cell["out"])})
    return more


def with_seeds(rows, seeds):
    """The second half: each model at the rate that did best by `choose`, on the other seeds. -> list of cells."""
    # "Best" by the loss on `choose`, never by what is reported in the end.
    best = {}
    for row in rows:
        model = row["cell"]["model"]
        if model not in best or row["choose"] < best[model]["choose"]:
            best[model] = row
    return [row["cell"] | {"seed": seed, "out": row["cell"]["out"][:-1] + str(seed)}
            for row in best.values() for seed in range(2, seeds + 1)]


# Processes and not threads: PyTorch's global seed, OpenMP's threads and sys.stdout belong to a process, and two
# trainings in one would share them. A worker stays alive for all its cells, so torch is imported once per wave.
def train_all_cells(cfg, cells, bar):
    """Run the cells, cfg.jobs at once. -> their rows, in the cells' order. Ctrl-C keeps what is finished."""
    # spawn: a fresh Python per worker. Trap: fork copies a process whose threads (OpenMP's) are not copied, and hangs.
    pool = ProcessPoolExecutor(cfg.jobs, mp_context=multiprocessing.get_context("spawn"))
    rows = [finished(cell) for cell in cells]
    bar.update(len(cells) - rows.count(None))
    missing, running = [i for i, row in enumerate(rows) if row is None], {}
    try:
        while missing or running:
            # No more than cfg.jobs are handed out: what lies in a pool's queue would still be trained after Ctrl-C.
            while missing and len(running) < cfg.jobs:
                i = missing.pop(0)
                # From here on the folder belongs to the new training: an old one's numbers must not vouch for it.
                Path(cells[i]["out"], "cell.json").unlink(missing_ok=True)
                running[pool.submit(run_cell, cells[i])] = i
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                i = running.pop(future)
                try:
                    rows[i] = row = future.result()
                except SystemExit as problem:
                    # A rate at which a model diverges is an answer, not the end of the comparison: never chosen.
                    if "not finite" not in str(problem):
                        raise
                    rows[i] = row = {"cell": cells[i], "choose": math.inf, "score": {}, "seconds": 0.0, "what": "",
                                     "tables": None, "rest": None}
                bar.update()
                score = ", ".join(f"{key} {value:.3f}" for key, value in row["score"].items())
                tqdm.write(f"{row['cell']['task']:10} {row['cell']['model']:20} lr {row['cell']['lr']:g}, seed "
                           f"{row['cell']['seed']}: {score}   {row['seconds']:.0f} s")
    except BaseException as problem:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
        if isinstance(problem, KeyboardInterrupt) or getattr(problem, "code", None) == 130:
            print("interrupted: the trainings that are finished are kept; the same command goes on", file=sys.stderr)
            sys.exit(130)
        raise
    pool.shutdown()
    return rows


# --- 6. Decoding: what a trained model costs in use ------------------------------------------------------------------
THREADS = 2  # of all timings


# What a training step holds, in the order in which it grows: weights, AdamW's two averages (as large as the weights
# each; both are there before the step and not counted), activations of every layer until backward has used them, and
# gradients, which take their place. With 128 rows activations are far larger than the weights here; in a large model
# with short rows it is the other way round.
def training_memory(step):
    """Largest sum of tensors (bytes) that step() held at once, on top of what was there before."""
    # Within one operation only the change at its end is seen: scratch memory that a kernel takes and returns is not.
    # The profiler notes what every operation took and gave back. In the order of time the running sum has a maximum.
    # Trap: the process's peak (ru_maxrss). It never falls, and 300 MB of it are PyTorch itself.
    # (The profiler writes a line about itself to the error stream, below Python's own: hence the detour.)
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
    events = sorted((e.time_range.end, e.self_cpu_memory_usage) for e in profile.events() if e.self_cpu_memory_usage)
    total, peak = 0, 0
    for _, change in events:
        total += change
        peak = max(peak, total)
    return peak


def cache_per_token(name, model, ids):
    """-> (bytes that writing one more token adds to the cache, bytes per source token), from real caches; float32."""
    # Taken from a cache that was really made, not from the formula 2 * layers * kv_heads * head_size * bytes.
    # float32 here; in the bfloat16 of a server half of it. Llama's columns are half of GPT-2's: K = 2 of H = 4 heads.
    # T5 keeps the written tokens' columns, and for each layer the source's keys and values, which do not grow.
    script = MODELS[name][0]
    if name == "BERT":
        return 0, 0  # nothing is kept: every round reads the whole row again
    _, state = script.prefill(model, ids, None, ids.size(1) + 8)
    cache = state[0] if isinstance(state, tuple) else state
    # keys (L, B, heads, columns, D): a column is a token.
    column = 2 * cache.keys.element_size() * cache.keys.numel() // cache.keys.size(3)
    source = sum(2 * k.element_size() * k.numel() // k.size(2) for k, _ in getattr(cache, "memories", []))
    return column, source


def writing_times(task, name, model, prompts):
    """-> (seconds to the first token, seconds per further token, seconds for the whole answer): medians."""
    # Greedy, one row, no batching: each model writes by its own script's generate(), with its own cache.
    # Two numbers, because users feel two things: how long until something appears, and how fast it goes on. The first
    # grows with the prompt (it is read in one pass), the second with the model (each token reads all weights once).
    # At these sizes it is neither: a few dozen small kernels per token, started one by one.
    script, times = MODELS[name][0], []
    tokenizer = encoder_only.ToyTokenizer()
    for prompt in prompts:
        stamps = [time.perf_counter()]
        if task == "text":  # 32 characters, and as many again
            script.generate(model, prompt, prompt.size(1),
                            on_token=lambda _, stamps=stamps: stamps.append(time.perf_counter()))
        elif name == "BERT":
            # Ten rounds, the surest blank first. Nobody knows which word comes when, and any of them may be the first:
            # so the first word is there when all are.
            write_names(model, tokenizer, [prompt])
            stamps += [time.perf_counter()] * 10
        else:
            ids = torch.tensor([tokenizer.encode(f"{prompt}=" if name != "T5" else f"{prompt}\n")])
            script.generate(model, ids, 10, eos_ids=tokenizer.eos_ids,
                            on_token=lambda _, stamps=stamps: stamps.append(time.perf_counter()))
        whole = stamps[-1] - stamps[0]
        first, tokens = stamps[1] - stamps[0], len(stamps) - 1
        times.append((first, whole / tokens if name == "BERT" else (whole - first) / max(1, tokens - 1), whole))
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def judging_time(task, name, model, split):
    """Median seconds for one verdict on one row: a single pass, nothing is written one by one."""
    # One row at a time, not a batch: what one user waits for, padded to the task's length. In batches all are
    # much faster per row.
    times = []
    for i in range(20):
        row = tuple(part[i:i + 1] for part in split)
        start = time.perf_counter()
        with torch.no_grad():
            if name == "BERT":
                model(row[0], row[0] > 0, row[1])
            elif name == "T5":
                model(row[0], torch.zeros_like(row[0][:, :1]), row[0] != 0)
            else:
                verdict_logits(model, row[0])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def costs_of(cfg, task, rows):
    """Costs of the trained models of one task, all in this process and taking turns. rows: one per model.

    -> {model: {"flops_per_token", "train_tokens_per_second", "memory_mb", "first_ms", "token_ms", "answer_ms",
    "cache_bytes", "source_bytes"}}. Absolute times belong to this machine; ratios travel.
    """
    # A fixed number of threads, stated in the results; losses above came from one thread each.
    torch.set_num_threads(THREADS)
    out, steps, asked = {}, {}, {}
    for row in rows:
        name, cell = row["cell"]["model"], row["cell"]
        script = MODELS[name][0]
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            ready = prepare_task(task, name, cfg.data)
        wanted = {key: cell[key] for key in ("lr", "seed", "max_steps", "out")}
        config = settings(task, name, ready["vocab"], **wanted)
        model = script.build_model(config)
        script.load_checkpoint(Path(cell["out"]) / "ckpt.pt", model, None, config)
        # Work per token of a full row, a forward pass. (A training step costs three times that: backward is two
        # passes.)
        S, T, M = row_shape(task, name)
        out[name] = {"flops_per_token": row_flops(name, config, S, T, M) / (S + T)}
        twin = script.build_model(config)  # the steps that are timed train a twin: the trained model stays as it is
        optimizer = script.make_optimizer(twin, config)
        batch = script.prepare(script.get_batch(ready["train"], config.batch_size, 1, 0), script.seeded(1, 0))

        def step(twin=twin, optimizer=optimizer, batch=batch, config=config, loss=ready["loss"]):
            loss(twin, batch, config)[0].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps[name], asked[name] = step, (model, config, ready)
    # Turns: a machine that slows down for ten seconds slows down everybody. The median of 11 turns of three steps: a
    # mean would count the moment in which something else woke up.
    times = {name: [] for name in steps}
    for turn in range(3 if cfg.quick else 12):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(3):
                step()
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - start) / 3)
    for name, step in steps.items():
        model, config, ready = asked[name]
        out[name]["train_tokens_per_second"] = config.batch_size * ready["tokens"] / statistics.median(times[name])
        out[name]["memory_mb"] = training_memory(step) / 1e6
    # Use: one request at a time, models taking turns here as well, the first turn again for warming up.
    uses = {name: [] for name in steps}
    T = TASKS[task]["block_size"]
    for turn in range(3 if cfg.quick else 9):
        for name, (model, _, ready) in asked.items():
            model.eval()
            with torch.no_grad():
                if task == "text":
                    prompts = ready["choose"][0][turn:turn + 1, :T // 2]
                    use = writing_times(task, name, model, [prompts])
                elif task == "translate":
                    use = writing_times(task, name, model, held_out_numbers()[1][turn:turn + 5])
                else:
                    use = (judging_time(task, name, model, ready["choose"]),) * 3
            uses[name] += [use] if turn else []
    for name, (model, _, ready) in asked.items():
        first, token, answer = (1e3 * statistics.median(column) for column in zip(*uses[name], strict=True))
        out[name] |= {"first_ms": first, "token_ms": token if task in ("text", "translate") else None,
                      "answer_ms": answer}
        writes = task in ("text", "translate") and name != "BERT"
        out[name]["cache_bytes"], out[name]["source_bytes"] = (
            cache_per_token(name, model, ready["choose"][0][:1, :6]) if writes else (0, 0))
    return out


# --- 8. Main: tables, pictures, and conclusions that are computed ----------------------------------------------------
# Q: When is a difference a difference?
# A: When it is larger than what another seed does. Three seeds give no useful standard error; their range is honest:
#    two ranges that do not touch are called different here, two that do are called level. With three seeds each, equal
#    models part by luck once in ten times: a reason to look at the size of a difference too.
QUALITY = {"translate": "exact_match", "match": "accuracy", "review": "accuracy", "text": "bits_per_byte",
           "ablate": "bits_per_byte"}


def summarise(rows, key):
    """Rows of one task -> {model: {"lr", "values" (all seeds at the best rate), "by_rate" {rate: value}, sizes}}."""
    # The rate is chosen with the first seed's loss on `choose`; "values" are what `test` says about all seeds there.
    out = {}
    for row in rows:
        name, cell = row["cell"]["model"], row["cell"]
        entry = out.setdefault(name, {"by_rate": {}, "values": [], "second_half": []})
        entry |= {key: row[key] for key in ("tables", "rest") if row[key] is not None}
        if cell["seed"] == 1:
            entry["by_rate"][cell["lr"]] = (row["choose"], row["score"].get(key))
    for name, entry in out.items():
        entry["lr"] = min(entry["by_rate"], key=lambda rate: entry["by_rate"][rate][0])
        mine = [row["score"] for row in rows if (row["cell"]["model"], row["cell"]["lr"]) == (name, entry["lr"])]
        entry["values"] = [score[key] for score in mine if key in score]
        entry["second_half"] = [score["bits_second_half"] for score in mine if "bits_second_half" in score]
        entry["by_rate"] = {f"{rate:g}": value for rate, (_, value) in sorted(entry["by_rate"].items())}
    return out


def level(a, b):
    """True if the ranges of two lists of values touch: another seed could have turned the order round."""
    return min(a) <= max(b) and min(b) <= max(a)


# Plain means: of three seeds a median would be one of them, and the other two would not count.
def mean(values):
    return sum(values) / len(values)


def ranking(entries, key, higher, form):
    """One sentence: who is best, who is level with it, who follows. entries {model: {key: [values]}}."""
    # Who has no such number is not ranked. "Level" is meant with the best; those behind may be level with each other.
    known = {name: entry[key] for name, entry in entries.items() if entry[key]}
    order = sorted(known, key=lambda name: mean(known[name]), reverse=higher)
    best = order[0]  # by the mean over seeds
    tied = [name for name in order[1:] if level(known[name], known[best])]
    others = [f"{name} {form(mean(known[name]))}" for name in order[1:] if name not in tied]
    text = f"{best} is best with {form(mean(known[best]))}"
    text += f", level with it {listed([f'{n} {form(mean(known[n]))}' for n in tied])}" if tied else ""
    return text + (f"; behind {listed(others)}." if others else ".")


# "A", "A and B", "A, B and C".
def listed(words):
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# Q: A table says that A beats B. What do you ask before you believe it?
# A: Same parameters, same tokens, same search over rates for both? How many seeds, and do their ranges touch? Were
#    rates chosen on the rows that are reported? Is the task neither solved nor hopeless for both? Was the baseline run
#    here, or copied from a paper? And last: is the size at which it was measured the size at which you need it?
#
# A sentence that somebody typed is true until the next run. These are made anew with every run, by the same rules for
# every model: the order by the means, "level" by ranges that touch, and a warning where a rate lies at the edge.
def conclusions(task, entries, costs, cfg):
    """-> sentences about one task, computed from its numbers."""
    # Accuracies: more is better, written in per cent. Bits: fewer are better.
    higher = task not in ("text", "ablate")
    form = (lambda v: f"{v:.1%}") if higher else (lambda v: f"{v:.3f}")
    # No sentence below is typed: names, order, numbers and "level" all come from the runs.
    lonely = any(len(entry["values"]) == 1 for entry in entries.values())
    out = ["One seed each, so nobody knows which of these differences another seed would turn round."] if lonely else []
    tried = {name: [float(rate) for rate in entry["by_rate"]] for name, entry in entries.items()}
    edge = [name for name, rates in tried.items() if entries[name]["lr"] in (min(rates), max(rates))]
    if edge:  # an optimum at the edge is no optimum: the model may be better than it looks
        out.append(f"The best rate of {listed(edge)} is the lowest or highest that was tried: better ones may exist.")
    out += [f"{'Exact names' if task == 'translate' else 'Right verdicts' if higher else 'Bits per byte'}: "
           + ranking(entries, "values", higher, form)]
    if task == "text":
        out.append("Second half of each block, given the first: " + ranking(entries, "second_half", False, form))
    if task == "ablate":  # each step against the one before it: an effect here holds beside these other choices only
        names = list(entries)
        for before, after in zip(names, names[1:], strict=False):
            a, b = entries[before]["values"], entries[after]["values"]
            verdict = "no clear change" if level(a, b) else "lower" if mean(b) < mean(a) else "higher"
            out.append(f"{after}: {mean(a):.3f} -> {mean(b):.3f} bits, {verdict}.")
        return out
    # Speed by the clock, not by FLOPs. Trap: comparing times of different runs; these were taken in turns.
    fast = max(costs, key=lambda name: costs[name]["train_tokens_per_second"])
    slow = min(costs, key=lambda name: costs[name]["train_tokens_per_second"])
    ratio = costs[fast]["train_tokens_per_second"] / costs[slow]["train_tokens_per_second"]
    out.append(f"Training: {fast} is fastest, {ratio:.1f} times as fast as {slow}.")
    quick = min(costs, key=lambda name: costs[name]["answer_ms"])
    late = max(costs, key=lambda name: costs[name]["answer_ms"])
    out.append(f"One answer: {quick} needs {costs[quick]['answer_ms']:.1f} ms, {late} "
               f"{costs[late]['answer_ms'] / costs[quick]['answer_ms']:.1f} times as long.")
    return out


# Lowest to highest, in brackets: with three seeds that is all there is to say about luck.
def spread(values, form):
    """'97.1% (96.4% to 97.8%)', or '97.1%' with one seed; '-' without."""
    if not values:
        return "-"
    return form(mean(values)) + (f" ({form(min(values))} to {form(max(values))})" if len(values) > 1 else "")


# How to read the columns:
#     parameters        those in embedding tables + all others. Equal in sum, within 5 % of GPT-2's
#     kFLOPs per token  thousand operations of a forward pass over a full row, divided by its tokens. T5's are
#                       about half: a token passes through one of two stacks
#     training          tokens of the task's text per second, forward + backward + update; the same text for all, so
#                       these are ratios of steps per second
#     training step     memory that one step needs on top of weights and optimizer
#     first token       from the request to the first token of the answer, one request at a time
#     further token     each token after that: what a cache makes cheap
#     cache             bytes that one more token adds to what must be kept; T5 also keeps the source, once
#     quality           on rows that neither training nor the choice of the rate has seen: mean (lowest to highest seed)
#     best rate         the learning rate chosen for this model
def table(task, entries, costs):
    """-> rows of one task's table, list of lists of str, the head first."""
    # Costs first, quality last, where the eye ends. The walk has no costs: its parts are timed in their own scripts.
    higher = task not in ("text", "ablate")
    form = (lambda v: f"{v:.1%}") if higher else (lambda v: f"{v:.3f}")
    head = ["model", "parameters (tables + rest)"]
    head += ["kFLOPs per token", "training, tokens/s", "training step, MB", "first token, ms", "ms per further token",
             "cache, bytes per token"] if costs else []
    head += {"translate": ["exact match"], "match": ["accuracy"], "review": ["accuracy"],
             "text": ["bits per byte", "... of second halves"], "ablate": ["bits per byte"]}[task] + ["best rate"]
    out = [head]
    for name, entry in entries.items():
        line = [name, f"{entry['tables'] + entry['rest']:,} ({entry['tables']:,} + {entry['rest']:,})"]
        if costs:
            cost = costs[name]
            token = "-" if cost["token_ms"] is None else f"{cost['token_ms']:.2f}"
            cache = f"{cost['cache_bytes']:,}" + (f" + {cost['source_bytes']:,} per source token"
                                                  if cost["source_bytes"] else "")
            line += [f"{cost['flops_per_token'] / 1e3:,.0f}", f"{cost['train_tokens_per_second']:,.0f}",
                     f"{cost['memory_mb']:.1f}", f"{cost['first_ms']:.1f}", token, cache]
        line.append(spread(entry["values"], form))
        line += [spread(entry["second_half"], form)] if task == "text" else []
        out.append([*line, f"{entry['lr']:g}"])
    return out


# Q: Why has BERT no bits per byte?
# A: Bits need a probability of the text, and a text's probability is a product of p(token | those before it). BERT
#    gives p(token | both sides): each factor has seen the others, the product sums to no 1 over all texts. (A "pseudo"
#    perplexity from it ranks sentences; it cannot be compared with the others' bits.)
NOTES = {
    "translate": "BERT fills ten blanks in ten rounds and has no first word before the last round: its first token is "
                 "the whole answer, and its time per further token a tenth of the same.",
    "match": "One pass, one verdict: no further token and no cache.",
    "review": "No pre-training: 6,200 sentences are all that these models ever read. One pass, one verdict.",
    "text": "BERT has no bits per byte: it gives p(token | both sides), whose product over a text is no probability. "
            "T5 reads the first half of a block and writes the second, so it has the second column only; it is trained "
            "on 32 predictions per row, the others on 64: equal rows read, half as many answers to learn from.",
    "ablate": "Each row is the one above it and one change more, its feed-forward width fitted to the same size.",
}


def markdown(found, cfg):
    """All tables, with sentences, as Markdown."""
    # README.md takes this text as it is, between its markers: one source for terminal, file and page.
    lines = []
    for task, one in found.items():
        rows = one["table"]
        lines += [f"**{one['question']}** {one['budget']}", "", "| " + " | ".join(rows[0]) + " |",
                  "|" + "---|" * len(rows[0]), *("| " + " | ".join(row) + " |" for row in rows[1:]), "",
                  " ".join(one["conclusions"]), "", f"*{NOTES[task]}*", ""]
    return "\n".join(lines)


def in_columns(rows):
    """A table for the terminal."""
    # Every column as wide as its widest cell, numbers under their heads.
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def picture(path, task, one):
    """Left: what every rate gave. Right: what every seed gave at the best rate, against the time of one answer."""
    import matplotlib
    matplotlib.use("Agg")  # draws into files; no window, so it works on a server
    import matplotlib.pyplot as plt
    # Okabe & Ito's colours differ in brightness too; markers differ for whoever sees no colour.
    looks = list(zip(("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000"), "osD^vPX",
                     strict=True))
    # A model looks the same in all pictures, also where BERT does not take part.
    order = list(WALK if task == "ablate" else MODELS)
    label = {"exact_match": "names exactly right", "accuracy": "verdicts right",
             "bits_per_byte": "bits per byte (lower is better)"}[QUALITY[task]]
    # Left: is anybody's best rate at the edge? Are the curves flat enough for one seed to choose by? Right: quality
    # against the waiting time for one answer; the corner to be in is on the left, above (for bits: below).
    costs = one["costs"]
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=110)
    for name, entry in one["models"].items():
        color, marker = looks[order.index(name)]
        points = [(float(rate), value) for rate, value in entry["by_rate"].items() if value is not None]
        if points:
            axes[0].plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
        # One line per model, from its worst seed to its best: where lines overlap, nothing was shown.
        if costs and entry["values"]:
            axes[1].plot([costs[name]["answer_ms"]] * len(entry["values"]), entry["values"], color=color,
                         marker=marker, ls="-", lw=1, label=name)
        elif entry["values"]:
            axes[1].plot([list(one["models"]).index(name)] * len(entry["values"]), entry["values"], color=color,
                         marker=marker, ls="-", lw=1)
    axes[0].set(xscale="log", xlabel="peak learning rate", ylabel=label, title="rates tried, on the first seed")
    rates = sorted({float(rate) for entry in one["models"].values() for rate in entry["by_rate"]})
    axes[0].set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    if costs:
        axes[1].set(xscale="log", xlabel="ms for one answer", title="all seeds at the best rate")
        for which in (axes[1].xaxis.set_major_formatter, axes[1].xaxis.set_minor_formatter):
            which(plt.FormatStrFormatter("%g"))  # 6 and 10, not 6 x 10^0 and 10^1
        axes[1].tick_params(axis="x", which="both", labelsize=8)
    else:
        axes[1].set(title="one change at a time, all seeds at the best rate")
        axes[1].set_xticks(range(len(one["models"])), one["models"], rotation=30, ha="right", fontsize=8)
    fig.suptitle(one["question"])
    fig.tight_layout()
    decoder_only.write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def cpu_name():
    """The processor's name as the system gives it."""
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found[1] if found else platform.machine()
    return platform.processor() or platform.machine()


def main(cfg):
    """Train, measure, conclude. -> {task: {...}}, the content of compare_architectures.json."""
    start = time.perf_counter()
    tasks = [task for task in TASKS if task in cfg.tasks.split(",") and not (cfg.quick and task not in QUICK)]
    # A question whose data cannot be had is left out and named; the others are answered all the same.
    if "review" in tasks:
        try:
            labelled("review")
        except OSError as problem:
            print(f"review: SST-2 cannot be had, so this question is left out. ({str(problem)[:90]} ...)")
            tasks.remove("review")
    if "text" in tasks or cfg.ablate:
        # Settled now and not in forty workers; and a text that cannot be had, or is too short, should be said now.
        cfg = dataclasses.replace(cfg, data=text_ids(cfg.data)[5])
        if min(map(len, text_ids(cfg.data)[:3])) <= TASKS["text"]["block_size"]:
            sys.exit(f"error: --data {cfg.data}: too short; a twentieth of it has to hold a row of 65 characters")
    # Who takes part: everybody, but BERT where a probability of a text is asked for.
    members = {task: [name for name in MODELS if (task, name) != ("text", "BERT")] for task in tasks}
    members |= {"ablate": list(WALK)} if cfg.ablate else {}
    if not members:
        sys.exit("error: no question is left to ask")
    first = [cell for task, names in members.items() for cell in plan(cfg, task, names)]
    seeds = 1 if cfg.quick else cfg.seeds
    total = len(first) + (seeds - 1) * sum(map(len, members.values()))
    print(f"{total} trainings or a few more, {cfg.jobs} at a time, one thread each; what is done is in {cfg.out}/")
    # First every rate of every question, then the seeds: a model's best rate is known only when all its rates are.
    bar = tqdm(total=total, desc="trainings", mininterval=1)
    rows = train_all_cells(cfg, first, bar)
    # Second wave: further rates for those whose best is at the edge, until nobody's is. (A quick run leaves it at
    # that.)
    while not cfg.quick and (more := [cell for task in members for cell in beyond_the_edge(
            [row for row in rows if row["cell"]["task"] == task])]):
        bar.total += len(more)
        rows += train_all_cells(cfg, more, bar)
    # Third wave: the other seeds at each model's best rate.
    rest = [cell for task in members
            for cell in with_seeds([row for row in rows if row["cell"]["task"] == task], seeds)]
    rows += train_all_cells(cfg, rest, bar)
    bar.close()

    # Who reads the numbers must know where they come from: processor, threads, versions.
    environment = {"cpu": cpu_name(), "threads": THREADS, "jobs": cfg.jobs, "torch": torch.__version__,
                   "python": platform.python_version(), "system": platform.system()}
    # Everything is trained. Costs are measured now, in this one process, while nothing else runs.
    found = {}
    results = Path(cfg.results, "quick") if cfg.quick else Path(cfg.results)
    for task, names in members.items():
        own = [row for row in rows if row["cell"]["task"] == task]
        entries = {name: summarise(own, QUALITY[task])[name] for name in names}
        sizes = {name: entry["tables"] + entry["rest"] for name, entry in entries.items()}
        if any(abs(size / sizes["GPT-2"] - 1) > 0.05 for size in sizes.values()):
            sys.exit(f"error: {task}: more than 5 % away from GPT-2's size, no equal comparison: {sizes}")
        # The first seed's model at its best rate is the one that is timed and weighed. (Costs hardly depend on
        # weights.)
        print(f"measuring {task}: nothing else should run now")
        costs = {} if task == "ablate" else costs_of(cfg, task, [
            next(row for row in own if row["cell"]["model"] == name and row["cell"]["lr"] == entries[name]["lr"]
                 and row["cell"]["seed"] == 1) for name in names])
        cell = own[0]["cell"]
        budget = TASKS["text" if task == "ablate" else task]
        data = {"text": cell["data"], "ablate": cell["data"], "review": "SST-2"}.get(task, "the toy language")
        size = mean(list(sizes.values())) / 1e3
        found[task] = {
            "question": ASKED.get(task, "What does each change from GPT-2 to Qwen3 MoE bring?"),
            "budget": f"{cell['max_steps']:,} steps of {budget['batch_size']} rows of {data}, "
                      f"{size:,.0f} thousand parameters each, {seeds} seed{'s' if seeds > 1 else ''}.",
            "models": entries, "costs": costs, "table": table(task, entries, costs),
            "conclusions": conclusions(task, entries, costs, cfg), "environment": environment,
            "training_seconds": round(sum(row["seconds"] for row in own))}
        picture(results / f"compare_architectures_{task}.png", task, found[task])
    # What is new replaces its question's old answer; the other questions' answers stay, so that one question can be
    # asked again without the others. Written in one piece when all is known: an interrupted run changes no result.
    # The file as it was is read first; what it says of other questions is kept.
    path = results / "compare_architectures.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.is_file() else {}
    found = {task: (kept | found)[task] for task in (*TASKS, "ablate") if task in kept | found}
    whole = {"tasks": found}
    decoder_only.write_atomically(path, lambda file: file.write((json.dumps(whole, indent=1) + "\n").encode()))
    decoder_only.write_atomically(path.with_suffix(".md"), lambda file: file.write(markdown(found, cfg).encode()))
    for task in members:
        print(f"\n{found[task]['question']} {found[task]['budget']}\n{in_columns(found[task]['table'])}\n"
              + "\n".join(found[task]["conclusions"]) + f"\n({NOTES[task]})")
    print(f"\nTables, numbers and pictures: {results}/compare_architectures*. {time.perf_counter() - start:.0f} s."
          f"\nNext: README.md, where the questions that matter in interviews are collected.")
    return found


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
