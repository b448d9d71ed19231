# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "regex>=2023.12", "requests>=2.31", "safetensors>=0.4.3", "tiktoken>=0.7",
#                 "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
T5 IN ONE FILE                                   python encoder_decoder.py          42 s on two CPU cores

Paper    Raffel et al. 2019, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, arXiv
         1910.10683; the shape is that of Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762
Idea     Read first, then write. An encoder turns the source into one vector per token, each aware of all others; a
         decoder writes the target token by token, and in every layer looks back at those vectors (cross-attention).
         Translation, summary, question and answer: whatever has an input and an output is a pair of texts.
Picture  src (B,S) -> shared -> n_layer x [x + attn(norm(x)); x + mlp(norm(x))] -> norm -> memory (B,S,C)
           tgt (B,T) -> shared -> n_layer x [x + causal attn; x + cross-attn(memory); x + mlp] -> norm -> head (B,T,V)
Words    teacher forcing: in training the decoder reads the right target so far, not its own guesses   memory: what the
         encoder hands over   bucket: distances that share one learned number   logits: scores before softmax
Symbols  B batch   S source time   T target time   P cached tokens   C n_embd   H heads   D head size   F feed-forward
         width   V vocabulary   L layers per stack   K beams   M candidates   N new tokens   R rows
New here cross-attention, relative position buckets, RMSNorm, gated feed-forward, label smoothing, span corruption,
         BLEU. Search and training loop are decoder_only.py's, pasted unchanged.
Not here Adafactor, sentencepiece training, multi-task mixtures
Expect   100.00% (3 of 3 seeds) of unseen numbers exactly right, of those of 5 or 6 digits with three or more zeros
         100.00% (3 of 3 seeds). --preset multi30k, 16 min: BLEU 35.5 greedy, 37.5 with 4 beams on the test set of 2016
         (results/encoder_decoder.json)
Asked    What does cross-attention cache?   Does T5 really leave out the 1/sqrt(D)?   Why buckets?   Encoder-decoder or
         decoder-only?   What does label smoothing buy?   What is span corruption?   What does BLEU count? (grep "# Q:")
"""
import argparse
import atexit
import contextlib
import copy
import dataclasses
import hashlib
import heapq
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

# The model needs torch alone. matplotlib, regex, requests and safetensors are imported where they are used.
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Config: every knob in one place ------------------------------------------------------------------------------
# One flat record: a field is a flag (--n-layer 6), its comment is the help text, and the whole record travels in the
# checkpoint. Do not learn it by heart; each field is explained where it is used. First reading: go on at section 2.
#     python encoder_decoder.py                                          digits -> words: every answer can be checked
#     python encoder_decoder.py --load runs/encoder_decoder --prompt 40215
#     python encoder_decoder.py --preset multi30k                        German -> English, 29,000 real sentences
#     python encoder_decoder.py --preset multi30k --data my.tsv          your own pairs: source, tab, target
#     python encoder_decoder.py --preset span                            no pairs: mend a text that has holes
#     python encoder_decoder.py --load google/flan-t5-small --prompt "translate English to German: How old are you?"
@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    data: str = "numbers"             # numbers | multi30k | PATH (source, tab, target); span: auto | shakespeare | PATH
    objective: str = "pairs"          # pairs: source -> target | span: a text with holes -> what stood in them
    out: str = "runs/encoder_decoder"  # folder for checkpoint, metrics, samples and pictures
    seed: int = 1337                  # decides initial weights, batches, dropout and samples
    device: str = "auto"              # auto (cuda if present, else cpu) | cpu | cuda | mps
    dtype: str = "auto"               # auto (float32; on cuda bfloat16 autocast) | float32 | bfloat16 | float64
    compile: bool = False             # torch.compile the model: a minute of waiting, then faster steps

    # Shape: two stacks of n_layer blocks each
    block_size: int = 16              # longest source or target in tokens, in training
    n_layer: int = 2                  # blocks in the encoder, and as many in the decoder
    n_head: int = 4                   # attention heads
    n_embd: int = 64                  # width of the residual stream
    head_size: int = 0                # numbers per head; 0 = n_embd / n_head
    ffn_size: int = 0                 # width inside the feed-forward layer; 0 = 4 * n_embd
    gated: bool = False               # feed-forward: ReLU (T5 v1.0) | gated GELU (v1.1, Flan)
    tie_weights: bool = True          # one table for embedding and head (v1.0) | a head of its own (v1.1, Flan)
    positions: str = "relative"       # relative: T5's buckets | sinusoidal: added to the embedding (the 2017 paper)
    vocab_size: int = 0               # 0 takes the tokenizer's (numbers), or learns a BPE of 4,000 tokens
    dropout: float = 0.0              # share of activations zeroed in training; needed once epochs repeat
    label_smoothing: float = 0.0      # share of the target probability that is spread over all tokens

    # Optimisation
    max_steps: int = 1000             # optimizer steps
    batch_size: int = 128             # rows per micro-step, over all ranks
    grad_accum: int = 1               # micro-steps per optimizer step
    lr: float = 3e-3                  # peak learning rate
    schedule: str = "cosine"          # cosine: down to min_lr_ratio | rsqrt: inverse square root of the step (2017)
    min_lr_ratio: float = 0.0         # cosine: the last learning rate as a share of the peak
    warmup_steps: int = 100           # steps of linear warm-up
    weight_decay: float = 0.01        # on matrices and embeddings only
    beta2: float = 0.98               # memory of Adam's second moment: 0.98 looks back about 50 steps
    grad_clip: float = 1.0            # largest gradient norm
    eval_every: int = 200             # steps between passes over the whole validation split
    save_every: int = 500             # steps between checkpoints
    resume: bool = False              # continue the run in --out, bit for bit

    # Decoding. There is a right answer, so the likeliest is wanted: no sampling by default.
    load: str = ""                    # run folder, checkpoint, Hugging Face folder or repository to start from
    prompt: str = ""                  # the source text; together with --load nothing is trained
    max_new_tokens: int = 64          # longest answer in tokens
    temperature: float = 0.0          # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0                    # sample among the k likeliest only; 0 = all
    top_p: float = 1.0                # sample among the likeliest that together have probability p
    beams: int = 1                    # above 1: beam search, without temperature, top-k, top-p
    n_best: int = 1                   # how many of the beams to show
    length_penalty: float = 1.0       # beam score = sum of log-probs / length ** this
    gnmt: bool = False                # ... / ((5 + length) / 6) ** length_penalty instead (Wu et al. 2016)

    def __post_init__(self):
        # A bad value caught here costs a line; caught at step 500 it costs the run.
        for names, ok, rule in (
                ("block_size n_layer n_head n_embd max_steps batch_size grad_accum eval_every save_every "
                 "max_new_tokens beams n_best", lambda x: x >= 1, "at least 1"),
                # `0 <= x < inf` and not `x < 0 or ...`: every comparison with nan is false, so nan fails as well
                ("seed", lambda x: 0 <= x < 2 ** 31, "in [0, 2^31)"),
                ("head_size ffn_size vocab_size warmup_steps weight_decay temperature top_k",
                 lambda x: 0 <= x < math.inf, "0 or more"),
                ("lr grad_clip", lambda x: 0 < x < math.inf, "above 0"),
                ("length_penalty", math.isfinite, "a number"),
                ("dropout beta2 label_smoothing", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("min_lr_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
                ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
                ("objective", ("pairs", "span").__contains__, "pairs or span"),
                ("positions", ("relative", "sinusoidal").__contains__, "relative or sinusoidal"),
                ("schedule", ("cosine", "rsqrt").__contains__, "cosine or rsqrt"),
                ("device", ("auto", "cpu", "cuda", "mps").__contains__, "auto, cpu, cuda or mps"),
                ("dtype", ("auto", "float32", "bfloat16", "float64").__contains__,
                 "auto, float32, bfloat16 or float64")):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")
        if not self.head_size and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} cannot be split over n_head {self.n_head} heads")
        if self.positions == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoids come in pairs of sine and cosine: n_embd {self.n_embd} is odd")
        if self.n_best > self.beams:
            raise ValueError(f"n_best {self.n_best} is more than beams {self.beams}")
        if self.schedule == "rsqrt" and self.warmup_steps < 1:
            raise ValueError("schedule rsqrt falls from the end of the warm-up: warmup_steps must be at least 1")


# T5 v1.1 as published: heads of 64 numbers whatever the width, gated GELU, a head of its own. The paper pre-trains on
# 2^16 tokens a step for 2^19 steps, dropout 0, Adafactor with the rate 1/sqrt(step).
T5_SIZE = dict(objective="span", data="auto", gated=True, tie_weights=False, head_size=64, vocab_size=32128,
               block_size=512, batch_size=128, max_steps=524_288, lr=1e-2, schedule="rsqrt", warmup_steps=10_000,
               eval_every=10_000, save_every=10_000)
PRESETS = {
    "laptop": {},  # the defaults above
    "multi30k": dict(data="multi30k", n_layer=3, n_embd=192, ffn_size=512, block_size=64, dropout=0.1,
                     label_smoothing=0.1, batch_size=64, max_steps=2700, lr=3e-3, warmup_steps=400, eval_every=300,
                     save_every=300, beams=4),
    "span": dict(objective="span", data="auto", n_layer=2, n_embd=128, block_size=96, batch_size=32, max_steps=600,
                 lr=2e-3, vocab_size=1000, eval_every=100),
    "t5-small": dict(T5_SIZE, n_layer=8, n_head=6, n_embd=512, ffn_size=1024),
    "t5-base": dict(T5_SIZE, n_layer=12, n_head=12, n_embd=768, ffn_size=2048),
    "t5-large": dict(T5_SIZE, n_layer=24, n_head=16, n_embd=1024, ffn_size=2816),
}


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


# --- 2. Model: from one norm up to T5 --------------------------------------------------------------------------------
#     source: 4 0 2 1 5 </s>                                   target so far: <pad> forty thousand
#       |                                                        |
#     shared * sqrt(C) --> x --> L encoder blocks --> norm     shared * sqrt(C) --> x --> L decoder blocks --> norm
#                                (self, mlp)           |                                  (self, cross, mlp)    |
#                                                    memory -------- keys, values ----------------^           head
#                                                                                                    "two" is next
# Every block adds to a stream x (.., C), and reads it through a norm (pre-norm): the way from the loss to the embedding
# is a chain of additions, so gradients arrive whole at any depth. The 2017 paper normalised behind each sum (post-norm)
# and needed 4,000 steps of warm-up for it.

class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight   (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).   x (..., size)."""

    # Q: What does RMSNorm leave out of LayerNorm, and why does that do?
    # A: The mean and the bias. What training needs is the rescaling: a stream whose size does not grow with depth. One
    #    statistic instead of two, one vector of weights instead of two, and models train as well.
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        # Trap: the mean of squares in bfloat16 has 8 bits. F.rms_norm works in float32 inside and rounds its result;
        # the weight is multiplied behind that, in the dtype of x, which is how the published models were trained.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def relative_bucket(distance, causal):
    """distance = key position - query position (any shape, int64) -> bucket 0..31 (T5, section 2.1; HF's numbers).

    An encoder spends 16 buckets on each side, a causal decoder all 32 on the past. Half of a side's buckets are exact,
    the others grow by equal factors up to 128; beyond that everything is one bucket.
        causal:  0 | 1 | 2 | ... | 15 | 16-18 | 19-20 | 21-23 | ... | 113 and more
    """
    # Q: Why buckets and not one number per distance?
    # A: "3 back" and "4 back" are different, "103 back" and "104 back" are not, and long distances are rare in
    #    training. 32 numbers per head, whatever the length: nothing breaks at token 513, as with learned positions.
    n, offset = 32, torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp(min=0)  # keys ahead of the query are masked anyway
    else:
        n = 16
        offset, distance = (distance > 0) * n, distance.abs()
    exact = n // 2
    # log_b(distance / exact), with b such that 128 lands on the last bucket. clamp: log(0) would be -inf.
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(128 / exact) * (n - exact)
    return offset + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=n - 1))


# Added to a score, it leaves a weight of exp(-1e9) = 0. Why not -inf: a row that may look at nothing (a source that is
# all padding) would be -inf everywhere, 0/0 = NaN, and one NaN reaches every row in the next layer. So it becomes some
# mean over pads, which nobody reads.
NOT_ALLOWED = -1e9


def sinusoids(positions, C):
    """positions (..., T) -> (..., T, C): sines in the first half, cosines in the second (Vaswani et al. 2017, 3.5).

    Wavelengths from 2*pi to 10,000 * 2*pi, in equal factors: like the digits of a clock, each turns slower.
    """
    # A shift by s turns every (sine, cosine) pair by a fixed angle: "s back" is a linear map, learnable by q and k.
    # Positions 0 and 1 differ by 57 degrees in the fastest pair and by 1/10,000 of a radian in the slowest.
    # (The paper interleaves sines and cosines; the order of columns means nothing to a matrix that is learned.)
    speed = 10_000 ** (-torch.arange(0, C, 2, device=positions.device) / C)
    angle = positions[..., None] * speed
    return torch.cat((angle.sin(), angle.cos()), -1)                           # (..., C)


# Attention is a soft dictionary. Each token makes a query (what do I look for?), a key (what do I offer?) and a value
# (what do I hand over?). Query . key is a score, softmax turns a row of scores into weights that sum to 1, the result
# is the weighted mean of the values. Three uses of one thing:
#     encoder self     queries, keys, values from the source       all see all
#     decoder self     all from the target                         nobody sees the future
#     cross            queries from the target, keys and values from the source: the only place where the two meet
class T5Attention(nn.Module):
    """Queries from one sequence, keys and values from the same (self) or from another one (cross). No biases."""

    def __init__(self, cfg, relative=False):
        super().__init__()
        inner = cfg.n_head * cfg.head_size  # need not be C: t5-small v1.1 has 6 heads of 64 at width 512
        self.cfg = cfg
        self.q, self.k, self.v = (nn.Linear(cfg.n_embd, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, cfg.n_embd, bias=False)
        if relative:  # (32, H): one number per bucket and head
            self.relative_attention_bias = nn.Embedding(32, cfg.n_head)

    def heads(self, y):
        """(B, T, H*D) -> (B, H, T, D): heads before time, each (row, head) is a problem of its own."""
        return y.unflatten(-1, (self.cfg.n_head, -1)).transpose(1, 2)          # (B, H, T, D)

    def keys_values(self, y):
        """What a sequence y (B, S, C) offers: keys and values, (B, H, S, D) each. Kept apart so that it can be kept."""
        return self.heads(self.k(y)), self.heads(self.v(y))                    # (B, H, S, D)

    def forward(self, x, k, v, bias):
        """x (B, T, C) asks; k, v (B, H, S, D) answer; bias (.., T, S) is added to the scores -> (B, T, C)."""
        # Q: Does T5 really leave out the 1/sqrt(D)?
        # A: Its code does: T5's q starts 1/sqrt(D) as large as its k, so the scores start at variance 1 all the same.
        #    We keep q at k's size and divide: the same function, and loading a checkpoint multiplies q by sqrt(D). But
        #    Adam moves a weight by about lr whatever its size, so a small q learns sqrt(D) times as fast as a large
        #    one. That suited Adafactor, whose steps are relative; with Adam German -> English was at a loss of 3.6
        #    after 500 steps, and in this form at 3.1 (one run each).
        # softmax(q k^T / sqrt(D) + bias) v in one call. The bias says both "how near" (a learned number per bucket) and
        # "not allowed" (-1e9): one tensor, one addition.
        p = self.cfg.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(self.heads(self.q(x)), k, v, attn_mask=bias, dropout_p=p)  # (B, H, T, D)
        return self.o(y.transpose(1, 2).flatten(2))                            # (B, T, C)

    def weights(self, x, k, bias):
        """The attention weights themselves, for pictures: (B, H, T, S). Each row sums to 1."""
        scores = self.heads(self.q(x)) @ k.transpose(-2, -1) / math.sqrt(self.cfg.head_size)  # (B, H, T, S)
        return (scores + bias).softmax(-1)                                     # (B, H, T, S)


# Attention moves information between tokens; this works on each token alone. F detectors look at the C numbers, and
# each that fires adds its own direction to the stream.
class FeedForward(nn.Module):
    """wo(relu(wi x)) in T5 v1.0; wo(gelu(wi_0 x) * wi_1 x) in v1.1 (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        for name in ("wi_0", "wi_1") if cfg.gated else ("wi",):
            setattr(self, name, nn.Linear(cfg.n_embd, cfg.ffn_size, bias=False))
        self.wo = nn.Linear(cfg.ffn_size, cfg.n_embd, bias=False)

    def forward(self, x):
        # Q: What does the gate buy?
        # A: A product of two views of x: one says what, the other how much. At equal parameters (F shrinks by 2/3) the
        #    loss is a little lower. Shazeer's explanation: "divine benevolence".
        if self.cfg.gated:
            x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)        # (B, T, F)
        else:
            x = F.relu(self.wi(x))                                             # (B, T, F)
        return self.wo(F.dropout(x, self.cfg.dropout, self.training))          # (B, T, C)


class T5Block(nn.Module):
    """x + self-attention, x + cross-attention (decoder only), x + feed-forward; each reads through a norm."""

    def __init__(self, cfg, decoder, first):
        super().__init__()
        self.cfg = cfg
        parts = {"SelfAttention": T5Attention(cfg, relative=first and cfg.positions == "relative")}
        parts |= {"EncDecAttention": T5Attention(cfg)} if decoder else {}
        parts |= {"DenseReluDense": FeedForward(cfg)}
        # Published names: layer.0.SelfAttention, layer.0.layer_norm, layer.1.EncDecAttention ...
        self.layer = nn.ModuleList(nn.ModuleDict({name: part, "layer_norm": RMSNorm(cfg.n_embd)})
                                   for name, part in parts.items())

    def forward(self, x, bias, memory=None, memory_bias=None):
        """x (B, T, C); bias of the self-attention; memory = (k, v) of the source for this layer -> (B, T, C)."""
        def add(x, y):
            return x + F.dropout(y, self.cfg.dropout, self.training)           # (B, T, C)

        part = self.layer[0]
        h = part["layer_norm"](x)                                              # (B, T, C)
        k, v = part["SelfAttention"].keys_values(h)                            # (B, H, T, D)
        x = add(x, part["SelfAttention"](h, k, v, bias))                       # (B, T, C)
        if memory is not None:
            part = self.layer[1]
            x = add(x, part["EncDecAttention"](part["layer_norm"](x), *memory, memory_bias))  # (B, T, C)
        part = self.layer[-1]
        return add(x, part["DenseReluDense"](part["layer_norm"](x)))           # (B, T, C)


class T5(nn.Module):
    """T5. model(src, tgt, src_mask=None) -> logits (B, T, V). Module names are those of the published weights.

    src (B, S) int64, src_mask (B, S) bool True = real token (pads on either side); tgt (B, T) is what the decoder
    reads: the target moved one to the right behind a <pad>. Parameters without the norms: V*C (twice if untied), 64*H
    for distances, and per layer 4*C*H*D (encoder), 8*C*H*D (decoder), 2*C*F (3*C*F if gated) in each of the two.
    """

    # t5-small (C = 512, F = 2,048, H = 8, D = 64, L = 6, V = 32,128), in millions: table 16.4, encoder 6 * 3.15,
    # decoder 6 * 4.20, together 60.5. A quarter is the list of pieces; the cross-attention makes a decoder layer a
    # third larger.
    def __init__(self, cfg):
        super().__init__()
        # 0 stands for the usual sizes; from here on the numbers themselves, so that the checkpoint holds them.
        cfg.head_size = cfg.head_size or cfg.n_embd // cfg.n_head
        cfg.ffn_size = cfg.ffn_size or 4 * cfg.n_embd
        self.cfg, C = cfg, cfg.n_embd
        self.shared = nn.Embedding(cfg.vocab_size, C)  # one table for source and target
        self.encoder, self.decoder = (
            nn.ModuleDict({"block": nn.ModuleList(T5Block(cfg, decoder, i == 0) for i in range(cfg.n_layer)),
                           "final_layer_norm": RMSNorm(C)}) for decoder in (False, True))
        self.lm_head = nn.Linear(C, cfg.vocab_size, bias=False)
        # Every product keeps the size of what it multiplies: std = 1/sqrt(fan-in), C but for these two.
        fan_in = {"o": cfg.n_head * cfg.head_size, "wo": cfg.ffn_size}
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=fan_in.get(name.split(".")[-2], C) ** -0.5)
        if cfg.tie_weights:
            self.lm_head.weight = self.shared.weight

    def embed(self, ids, start=0, mask=None):
        """ids (B, T) -> (B, T, C). start: position of the first column; mask (B, T): positions count real tokens."""
        # Q: Why multiply the embedding by sqrt(C)?
        # A: As a head the table wants std 1/sqrt(C), so that logits start at variance 1; as an input it wants numbers
        #    of size 1, next to sinusoids of size 1 and to what the blocks add. T5 keeps it at std 1 and divides the
        #    head's input by sqrt(C): the same function. But Adam moves a weight by about lr whatever its size, and a
        #    table 1/14 the size learns 14 times as fast: a loss of 3.5 instead of 4.3 after 500 steps (one run).
        #    (T5's Adafactor takes steps relative to the weights; there it makes no difference.)
        x = self.shared(ids) * math.sqrt(self.cfg.n_embd)                      # (B, T, C)
        if self.cfg.positions == "sinusoidal":
            positions = torch.arange(start, start + ids.size(1), device=ids.device)  # (T)
            if mask is not None:  # padding on the left must not move the text
                positions = (mask.cumsum(1) - 1).clamp(min=0)                  # (B, T)
            x = x + sinusoids(positions, self.cfg.n_embd).to(x.dtype)          # (B, T, C)
        return F.dropout(x, self.cfg.dropout, self.training)                   # (B, T, C)

    def distance_bias(self, stack, T, causal):
        """What the positions add to the self-attention scores of T tokens, (1, H, T, T), the causal mask included."""
        near = self.shared.weight.new_zeros(1, 1, T, T)                        # (1, 1, T, T)
        if self.cfg.positions == "relative":
            # Only block 0 of a stack holds the table; all its layers use it. (Cross-attention has none: "3 back" means
            # nothing between two languages.)
            steps = torch.arange(T, device=near.device)                        # (T)
            bucket = relative_bucket(steps[None, :] - steps[:, None], causal)  # (T, T)
            table = stack["block"][0].layer[0]["SelfAttention"].relative_attention_bias
            near = table(bucket).permute(2, 0, 1)[None]                        # (1, H, T, T)
        if causal:
            hidden = torch.ones(T, T, dtype=torch.bool, device=near.device).triu(1)  # (T, T)
            near = near.masked_fill(hidden, NOT_ALLOWED)                       # (1, ..., T, T)
        return near

    def padding_bias(self, mask):
        """mask (B, S) bool -> (B, 1, 1, S): 0 for real tokens, NOT_ALLOWED for pads; None stays None."""
        if mask is None:
            return None
        bias = self.shared.weight.new_zeros(mask.shape).masked_fill(~mask, NOT_ALLOWED)  # (B, S)
        return bias[:, None, None, :]                                          # (B, 1, 1, S)

    def encode(self, src, mask=None):
        """src (B, S) -> memory (B, S, C): what the decoder will look at."""
        bias = self.distance_bias(self.encoder, src.size(1), causal=False)     # (1, ..., S, S)
        if mask is not None:
            bias = bias + self.padding_bias(mask)  # nearness and padding in one tensor  # (B, ..., S, S)
        x = self.embed(src, mask=mask)                                         # (B, S, C)
        for block in self.encoder["block"]:
            x = block(x, bias)                                                 # (B, S, C)
        return F.dropout(self.encoder["final_layer_norm"](x), self.cfg.dropout, self.training)  # (B, S, C)

    def memories(self, memory):
        """memory (B, S, C) -> [(k, v)] of every decoder layer's cross-attention, (B, H, S, D) each."""
        # Q: What does cross-attention cache?
        # A: Keys and values of the source do not depend on what is written: computed once per source, 2*L*H*D numbers
        #    per source token, and never touched again. The self-attention's grow by one column per written token.
        return [block.layer[1]["EncDecAttention"].keys_values(memory) for block in self.decoder["block"]]

    def decode(self, tgt, memories, memory_bias=None):
        """tgt (B, T) -> the decoder's stream behind its last norm (B, T, C). (decode_step: the same for one token.)"""
        bias = self.distance_bias(self.decoder, tgt.size(1), causal=True)      # (1, ..., T, T)
        x = self.embed(tgt)                                                    # (B, T, C)
        for block, memory in zip(self.decoder["block"], memories, strict=True):
            x = block(x, bias, memory, memory_bias)                            # (B, T, C)
        return F.dropout(self.decoder["final_layer_norm"](x), self.cfg.dropout, self.training)  # (B, T, C)

    def forward(self, src, tgt, src_mask=None):
        """src (B, S), tgt (B, T), src_mask (B, S) bool or None -> logits (B, T, V): row t scores target token t."""
        # Trap: the source mask in training but not in generation, or the other way round: it fits in tests without
        # padding, and the model reads pads as words in production. Here both go through the same two lines.
        memories = self.memories(self.encode(src, src_mask))
        return self.lm_head(self.decode(tgt, memories, self.padding_bias(src_mask)))  # (B, T, V)


def build_model(cfg):
    """A fresh model; its weights are a function of cfg alone, seed included."""
    torch.manual_seed(cfg.seed)
    return T5(cfg)


# --- 3. Objective: the target, given the source ----------------------------------------------------------------------
#     source    4  0  2  1  5  </s>                       all of it in view
#     tgt       <pad>  forty    thousand two  hundred     what the decoder reads: the target moved one to the right
#     targets   forty  thousand two hundred  </s>         what it is scored on
# Q: Encoder-decoder or decoder-only?
# A: A decoder-only model reads the source with a causal mask: "4" is read before anybody knows how many digits follow.
#    An encoder reads both ways, and source and target have weights of their own. The price: a token passes through half
#    of the weights only, two stacks to build, and text without a clear source has no place. At scale one stack won.

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def compute_loss(model, batch, cfg):
    """batch = (source (B, S), targets (B, T)), padded with 0 -> (sum of losses in nats, how many tokens counted, {}).

    Label smoothing applies in training alone, so that validation losses stay comparable: nats per target token.
    """
    source, targets = batch
    # Teacher forcing: every position reads the right answer so far, so all T of them train in one pass.
    # Trap: at decoding time it reads its own words instead, and was never shown how to go on from a mistake.
    tgt = F.pad(targets[:, :-1], (1, 0))  # T5 starts with <pad> = 0: it is there anyway  # (B, T)
    logits = model(source, tgt, source != 0)                                   # (B, T, V)
    # Q: What does label smoothing buy?
    # A: The target becomes 1 - eps on the right token plus eps/V everywhere (Szegedy et al. 2015), so no logit is
    #    driven to infinity. Perplexity gets worse, BLEU better (Vaswani et al. 2017, section 5.4). The training loss
    #    can no longer reach 0: with eps 0.1 and 46 tokens its floor is 0.69.
    # No mask for the targets' padding: it stands on the right, and a causal decoder never looks right.
    loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(targets == 0, IGNORE).flatten(),
                               ignore_index=IGNORE, reduction="sum",
                               label_smoothing=cfg.label_smoothing if model.training else 0.0)
    return loss_sum, (targets != 0).sum(), {}


# Q: What is span corruption?
# A: T5's objective for text without pairs: cut 15 % out in pieces of 3 tokens, mark each hole with a token of its own
#    (a sentinel), and write down what is missing. The target is short, so a step costs half of copying everything.
#     text      Thank you for inviting me to your party last week
#     source    Thank you <0> me to your party <1>
#     target    <0> for inviting <1> last week
def corrupt_spans(ids, generator, rate=0.15, length=3.0):
    """ids (B, T) -> (source (B, S), target (B, T')), each with </s>: the same number of holes and tokens in every row.

    Spans as in T5's code: pieces of text and of holes in turns, text first, a hole last, both cut at random places.
    """
    B, T = ids.shape
    missing = min(max(round(T * rate), 1), T - 1)
    holes = min(max(round(missing / length), 1), missing, T - missing, SENTINELS)

    def cuts(total):
        """How many tokens each of `holes` pieces of a stretch of `total` tokens gets, at least 1: (B, holes)."""
        # Choose holes - 1 of the total - 1 gaps between tokens, sorted; differences are the lengths.
        dice = torch.rand(B, total - 1, generator=generator)
        chosen = dice.argsort(1)[:, :holes - 1].sort(1).values + 1
        edges = F.pad(F.pad(chosen, (1, 0)), (0, 1), value=total)
        return edges.diff(dim=1)

    # T = 96: 14 tokens go, in 5 holes, so every source has 96 - 14 + 5 tokens and every target 14 + 5, and </s> each.
    # Equal lengths in all rows: no padding, and one tensor operation for the whole batch.
    # Interleave: text 0, hole 0, text 1, hole 1 ...; a token's piece number is how many pieces end before it.
    lengths = torch.stack((cuts(T - missing), cuts(missing)), 2).flatten(1)
    ends = lengths.cumsum(1)
    piece = (torch.arange(T)[None, :, None] >= ends[:, None, :]).sum(2)        # (B, T)
    first = F.pad(piece[:, 1:] != piece[:, :-1], (1, 0), value=True)           # (B, T)
    hole, sentinel = piece % 2 == 1, 2 + piece // 2                            # (B, T), (B, T)
    # A hole becomes its sentinel in the source; the text before a hole becomes the same sentinel in the target.
    source = torch.where(hole, sentinel, ids)[~hole | first].view(B, -1)
    target = torch.where(hole, ids, sentinel)[hole | first].view(B, -1)
    return F.pad(source, (0, 1), value=1), F.pad(target, (0, 1), value=1)


def prepare(batch, generator):
    """Pairs: trim to the longest source and target. Text (one tensor, not two): cut holes into it, anew each step."""
    if len(batch) == 1:
        return corrupt_spans(batch[0], generator)
    # Attention is quadratic and padding is work: a batch of short sentences should cost what short sentences cost.
    return tuple(part[:, :max(1, int((part != 0).sum(1).max()))] for part in batch)


# --- 4. Data: pairs of texts, or one text -> rows of ids -------------------------------------------------------------
# Every data set ends up as a tuple of tensors whose first axis is the row: (source, targets), padded on the right with
# 0, or (ids,) for a text that gets its holes later. A batch is one gather, wherever the rows came from.

# A file that is fetched is named with its SHA-256. A download that broke off, a proxy's error page or a silently edited
# copy would train just as well, and the number at the end would mean something else.
SHAKESPEARE = ("tinyshakespeare.txt",
               "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
# Multi30k (Elliott et al. 2016, arXiv 1605.00459): captions of photographs, German and English, 29,000 pairs to train.
MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{}.gz"
MULTI30K = {
    "train.de": ("train.de", "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
    "train.en": ("train.en", "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
    "val.de": ("val.de", "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
    "val.en": ("val.en", "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
    "test.de": ("test_2016_flickr.de", "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"),
    "test.en": ("test_2016_flickr.en", "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182")}


def sha256_of(path):
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(filename, url, sha256="", login=None):
    """-> Path of a file from $LLM_DATA, ./data, or else downloaded to ./data. Raises OSError when it cannot be had.

    A broken download continues where it stopped; only a complete file (with the right SHA-256, where it is known) gets
    the name. login: headers that open a door, {"Authorization": "Bearer ..."}.
    """
    import requests
    for folder in (os.environ.get("LLM_DATA"), "data"):
        path = Path(folder or "data") / filename
        if path.is_file():
            if sha256 and sha256_of(path) != sha256:
                raise OSError(f"{path} is not the expected file (SHA-256 differs); delete it to fetch it again")
            return path
    # path is now ./data/filename. Bytes arrive under another name, so a half file is never taken for a whole one.
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if sha256 and part.exists() else 0  # without a hash nobody could tell if the ends fit
    # identity: sizes and ranges are those of the file and not of a compressed form of it.
    headers = {"Accept-Encoding": "identity", **(login or {})} | ({"Range": f"bytes={have}-"} if have else {})
    # Two timeouts: 3 s to get a connection (an offline laptop should not hang), 30 s between two pieces of data.
    with requests.get(url, stream=True, timeout=(3, 30), headers=headers) as answer:
        if answer.status_code != 416:  # 416: nothing lies behind what we have, so we have it all
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0  # 200: the server ignored the range and sends everything
            size = have + int(answer.headers.get("Content-Length", 0))
            with (open(part, "ab" if have else "wb") as file,
                  tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=filename) as bar):
                for piece in answer.iter_content(1 << 16):
                    bar.update(file.write(piece))
            if size > have and part.stat().st_size != size:
                raise OSError(f"{url}: the download broke off")
    if sha256 and sha256_of(part) != sha256:
        part.unlink()
        raise OSError(f"{url}: the download is damaged (SHA-256 differs); it was removed")
    os.replace(part, path)
    return path


def load_text(name):
    """-> (text, its real name, one line about it). name: auto, shakespeare, pydocs, or a path of a UTF-8 file.

    auto = Tiny Shakespeare if it is there or can be fetched, else pydocs: the help texts that ship with every Python,
    real English that needs no network. A set named outright that cannot be had ends the program with one line.
    """
    if name in ("auto", "shakespeare"):
        try:
            path = fetch(*SHAKESPEARE)
            return path.read_text(encoding="utf-8"), "shakespeare", f"Tiny Shakespeare ({path})"
        except OSError as problem:  # requests' own exceptions are OSErrors too
            if name == "shakespeare":
                sys.exit(f"error: --data shakespeare: {problem}")
            print(f"Tiny Shakespeare cannot be had: taking Python's own help texts instead. ({str(problem)[:90]} ...)")
    if name in ("auto", "pydocs"):
        from pydoc_data.topics import topics
        return "\n\n".join(topics[key] for key in sorted(topics)), "pydocs", "Python's own help texts (pydoc_data)"
    try:
        return Path(name).read_text(encoding="utf-8"), name, f"the file {name}"
    except (OSError, UnicodeDecodeError) as problem:
        sys.exit(f"error: --data {name}: no such set, and no readable UTF-8 file ({problem})")


# The toy language of all scripts: numbers and their English names. 40215 <-> forty thousand two hundred fifteen.
# Small enough to learn in less than a minute, and every answer can be checked: a model that is wrong is visibly wrong.
UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# Digits and words have ids of their own: "5" and "five" must be *learned* to mean the same. Index = id, <pad> = 0.
TOY_VOCAB = ["<pad>", "\n", "=", "[CLS]", "[SEP]", "[MASK]", *"0123456789", *UNITS, *TENS, "hundred", "thousand"]


def number_to_words(n):
    """0 <= n <= 999,999 -> its English name without "and" or hyphens: 40215 -> forty thousand two hundred fifteen."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = " " + number_to_words(n % size) if n % size else ""
            return f"{number_to_words(n // size)} {name}{rest}"
    if n < 20:
        return UNITS[n]
    return TENS[n // 10 - 2] + (" " + UNITS[n % 10] if n % 10 else "")


# Q: Why hold out by hash and not the last 10 % of a shuffled list?
# A: A number's split depends on the number alone. However many are drawn, in whatever script and with whatever seed,
#    none is trained on here and tested there. In one published toy set 36 % of validation rows were also trained on.
def is_validation(n):
    """One number in ten is held out, by hash: the same in every script and run, and none is ever in both splits."""
    # 0 always trains: "zero" is the name of nothing else, so nothing else could teach it.
    return n != 0 and int(hashlib.sha256(str(n).encode()).hexdigest(), 16) % 10 == 0


def draw_numbers(count, seed, validation):
    """-> list of numbers from one split, with repeats. Each length of 1 to 6 digits is proposed equally often.

    The hash holds out no one-digit number and 5 of the 90 two-digit ones: validation hardly tests short numbers.
    """
    # Trap: drawing n uniformly from 0..999,999 makes nine in ten six digits long; short numbers are then never learned.
    rng, numbers = random.Random(seed), []
    while len(numbers) < count:
        digits = rng.randint(1, 6)
        n = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10 ** digits)
        if is_validation(n) == validation:
            numbers.append(n)
    return numbers


class ToyTokenizer:
    """The toy language: one id per digit and one per word (TOY_VOCAB)."""

    spec, n_vocab, eos_ids = {"kind": "numbers"}, len(TOY_VOCAB), (TOY_VOCAB.index("\n"),)

    def encode(self, text):
        pieces = re.findall(r"\d|\n|=|[^\s\d=]+", text)
        unknown = [piece for piece in pieces if piece not in TOY_VOCAB]
        if unknown:
            raise ValueError(f"the toy language has no {unknown[0]!r}")
        return [TOY_VOCAB.index(piece) for piece in pieces]

    def decode(self, ids):
        text = " ".join(TOY_VOCAB[i] for i in ids if 0 < i < self.n_vocab)  # spaces between words, not between digits
        return re.sub(r"(?<=\d) (?=\d)| ?([=\n]) ?", lambda found: found[1] or "", text)


# A vocabulary for any text: start from the 256 bytes, make the most frequent pair of neighbours a token, repeat.
# bpe_tokenizer.py is about nothing else; these are its fast trainer and its encoder, pasted.

# GPT-4 (cl100k): contractions in capitals too; digits in groups of at most 3, so "1234567" is cut 123|456|7 and there
# are only 1,110 kinds of digit pieces; a sign may lead a word as a space does ("(word"); line ends get their own
# pieces.
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
                r"|\s*[\r\n]|\s+(?!\S)|\s")


def split(text, pattern):
    """-> the pieces of a text, which concatenate to the text. split("I'll go", GPT4_PATTERN) == ["I", "'ll", " go"]."""
    import regex  # the standard library's re knows no \p{L} ("any letter of any script")
    return regex.findall(pattern, text)


def train_bpe(text, vocab_size, pattern=GPT4_PATTERN, on_merge=None):
    """The same merges as train_slow, far faster. on_merge(index, pair, token bytes, count) watches."""
    if vocab_size < 256:
        raise ValueError(f"a vocabulary of {vocab_size} does not hold the 256 bytes")
    # Q: Why is the fast trainer fast?
    # A: 1. Equal pieces are handled once: nine tenths of Tiny Shakespeare are 236,000 pieces, but only 14,000 different
    #    ones. 2. A merge changes only pieces that contain the pair; an index says which, and counts are corrected, not
    #    redone. 3. The most frequent pair comes from a heap instead of a search through all pairs.
    pieces = Counter(split(text, pattern))
    # The fourth reason: a token id is written as the character chr(id), a piece as a string, a pair as two characters.
    # Replacing a pair is then str.replace, at the speed of C and left to right, and comparing strings compares ids.
    words = [piece.encode().decode("latin-1") for piece in pieces]  # latin-1: the byte b becomes the character chr(b)
    weights = list(pieces.values())
    counts, where = defaultdict(int), defaultdict(set)  # pair -> how often in the text; pair -> which words hold it
    # "low" -> zip("low", "ow") -> "lo", "ow": all neighbours of a word. weights[i]: how often the text has the word.
    for i, word in enumerate(words):
        for pair in map("".join, zip(word, word[1:], strict=False)):
            counts[pair] += weights[i]
            where[pair].add(i)
    # heapq pops the smallest entry: the largest count and, among equals, the smallest pair. That is the tie rule.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    # One round of this loop is one merge. Early merges touch thousands of words, late ones a handful.
    merges, tokens = [], [bytes([b]) for b in range(256)]
    while heap and 256 + len(merges) < vocab_size:
        claimed, pair = heapq.heappop(heap)
        # A count that fell since it was pushed left its entry too high in the heap. Such an entry is put back at its
        # true place when it surfaces, and not before: most of them never do.
        if -claimed != counts[pair]:
            if counts[pair] > 1:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        if claimed > -2:  # fewer than two: the same early stop as in train_slow
            break
        new, grown = chr(256 + len(merges)), set()
        left, right = map(ord, pair)
        merges.append((left, right))
        tokens.append(tokens[left] + tokens[right])
        if on_merge is not None:
            on_merge(len(merges) - 1, merges[-1], tokens[-1], -claimed)
        for i in where.pop(pair):
            before = words[i]
            after = before.replace(pair, new)
            if after == before:  # an earlier merge took the pair out of this word; the index is not cleaned up
                continue
            words[i] = after
            # Take all pairs of the old word out of the counts and put all of the new one in. Words are short: finding
            # out which pairs really changed would cost more than it saves.
            for gone in map("".join, zip(before, before[1:], strict=False)):
                counts[gone] -= weights[i]
            for came in map("".join, zip(after, after[1:], strict=False)):
                counts[came] += weights[i]
                if new in came:  # only pairs with the new token can have become more frequent
                    where[came].add(i)
                    grown.add(came)
        for came in grown:
            heapq.heappush(heap, (-counts[came], came))
    return merges
WALL = "\U0010ffff"  # a character that is no token: vocabularies end long before the id 1,114,111


class BPE:
    """A byte-level tokenizer: merges, the pattern they were learned under, special tokens {text: id}.

    byte_order: 256 bytes, the ids 0..255 in order; None is 0, 1, 2 ... (GPT-2 shuffled them, see read_gpt2).
    token_bytes: {id: bytes}. n_vocab: one more than the largest id.
    """

    def __init__(self, merges, pattern=GPT4_PATTERN, special_tokens=None, byte_order=None):
        self.merges, self.pattern, self.special_tokens = [tuple(m) for m in merges], pattern, dict(special_tokens or {})
        self.byte_order = bytes(byte_order or range(256))
        # bytes.translate wants, for each byte, the byte to write instead: the inverse of byte_order
        self.to_id = bytes(self.byte_order.index(b) for b in range(256))
        self.token_bytes = {i: bytes([b]) for i, b in enumerate(self.byte_order)}
        for i, (left, right) in enumerate(self.merges, 256):
            self.token_bytes[i] = self.token_bytes[left] + self.token_bytes[right]
        self.token_bytes |= {i: text.encode() for text, i in self.special_tokens.items()}
        self.n_vocab = max(self.token_bytes) + 1
        # Pair of ids -> id of the merged token. Ids are given in the order of learning, so the id is also the rank.
        self.ranks = {pair: i for i, pair in enumerate(self.merges, 256)}
        self.cache = {}

    def encode_slow(self, text):
        """The definition: do to this text what training did to its own, every merge, in the order they were learned."""
        # All pieces at once, held apart by a character that is no token, so that one replace serves the whole text.
        word = WALL.join(piece.encode().translate(self.to_id).decode("latin-1") for piece in split(text, self.pattern))
        for (left, right), new in self.ranks.items():
            word = word.replace(chr(left) + chr(right), chr(new))  # ids as characters, as in train_bpe()
        return [ord(c) for c in word if c != WALL]

    def encode_piece(self, piece):
        """One piece -> ids, in n log n steps: the lowest-ranked pair merges, leftmost first, until none is left."""
        # Why this gives what replaying all merges gives: a merge makes pairs with the new token only, and those were
        # learned later, so they have higher ranks. The lowest rank present never goes back.
        ids = list(piece.encode().translate(self.to_id))
        # A linked list: merging i with its right neighbour makes that one disappear without moving all behind it.
        #     ids 10 11 12, merge 0 with 1:  ids 20 None 12   right[0] = 2   left[2] = 0. None: swallowed.
        right, left = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap = [(self.ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:], strict=False)) if pair in self.ranks]
        heapq.heapify(heap)
        while heap:
            new, i = heapq.heappop(heap)
            j = right[i]
            # The entry is stale if one of the two has merged with somebody else since it was written.
            if ids[i] is None or j == len(ids) or self.ranks.get((ids[i], ids[j])) != new:
                continue
            ids[i], ids[j], right[i] = new, None, right[j]
            if right[j] < len(ids):
                left[right[j]] = i
            # Two pairs are new: with the neighbour on the left and with the one on the right.
            for a, b in ((left[i], i), (i, right[i])):
                if a >= 0 and b < len(ids) and (ids[a], ids[b]) in self.ranks:
                    heapq.heappush(heap, (self.ranks[ids[a], ids[b]], a))
        # Trap: searching the whole piece for its best pair after every merge. Words are short and nobody notices; a
        # user who sends 25,000 letters without a space keeps such a server busy.
        return [i for i in ids if i is not None]

    def encode_ordinary(self, text):
        """Text -> ids; special tokens in it are text like any other. For everything that a user typed."""
        ids = []
        for piece in split(text, self.pattern):
            if piece not in self.cache:  # language repeats itself: nine pieces in ten are known already
                self.cache[piece] = self.encode_piece(piece)
            ids += self.cache[piece]
        return ids

    def encode(self, text):
        """Text -> ids; special tokens in it become their ids. For templates that you wrote yourself."""
        # Trap: encoding user text with special tokens on. Whoever types <|endoftext|> then ends the document, or opens
        # a turn in the system's name: the SQL injection of language models.
        if not self.special_tokens:
            return self.encode_ordinary(text)
        # Longest first: otherwise "<|end|>" would win inside "<|end|>of".
        names = sorted(self.special_tokens, key=len, reverse=True)
        # The brackets make re.split keep the separators: "a<|x|>b" -> "a", "<|x|>", "b".
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return [i for part in parts for i in
                ([self.special_tokens[part]] if part in self.special_tokens else self.encode_ordinary(part))]

    # Decoding needs no merges and no pattern, only the bytes of each id. It is many to one: "low" can be written as
    # l,o,w or lo,w or low, all decode alike, and a model that writes l,o,w makes ids that encode() never would.
    def decode_bytes(self, ids):
        """ids -> bytes, exactly."""
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids):
        """ids -> text. Bytes that are not valid UTF-8 (a slice that cuts a character in two) become U+FFFD."""
        # Trap: decoding token by token and joining the texts; "é" can be two tokens, and comes out as two U+FFFD.
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write everything as JSON. The merges say it all: tokens follow from them."""
        state = {"merges": self.merges, "pattern": self.pattern, "special_tokens": self.special_tokens,
                 "byte_order": list(self.byte_order)}
        write_atomically(path, lambda file: file.write(json.dumps(state).encode()))

    @classmethod
    def load(cls, path):
        """Read what save() wrote. Raises OSError, ValueError, KeyError or TypeError if it is something else."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def to_tiktoken(self, name="ours"):
        """-> a tiktoken.Encoding in Rust with the same ids, for merges that were trained (hand-made ones may differ).

        Raises ValueError when two merges make the same bytes.
        """
        import tiktoken

        # tiktoken keeps bytes -> rank and no pairs: it merges any two neighbours whose bytes together are a token. Two
        # merges that give the same bytes ("ab"+"c" and "a"+"bc") are one entry there.
        ranks = {self.token_bytes[i]: i for i in range(256 + len(self.merges))}
        if len(ranks) < 256 + len(self.merges):
            raise ValueError("two merges make the same bytes; tiktoken cannot tell them apart")
        return tiktoken.Encoding(name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens)


# Q: One vocabulary for two languages, or one each?
# A: One. Names, numbers and cognates (Hand, Ball) are shared, and so is the table: half the parameters, and the head
#    can be tied. The price: German compounds and English words compete for 4,000 places.
SENTINELS = 32  # tokens that mark a hole; T5 has 100, at the other end of its vocabulary


class TextTokenizer:
    """Our byte-level BPE behind T5's special tokens: 0 <pad>, 1 </s>, 2..33 the sentinels, then the BPE's ids + 34."""

    eos_ids, first = (1,), 2 + SENTINELS

    def __init__(self, merges):
        self.bpe = BPE(merges)
        self.spec, self.n_vocab = {"kind": "bpe", "merges": [list(m) for m in merges]}, self.first + self.bpe.n_vocab

    def encode(self, text):
        # A space in front: "Ein" at the start and " Ein" inside a sentence are then the same token.
        return [i + self.first for i in self.bpe.encode_ordinary(" " + text)]

    def decode(self, ids):
        # Runs of ordinary tokens are decoded together (a character may span two), sentinels shown by number.
        out = []
        for i in ids:
            if i >= self.first:
                if not out or isinstance(out[-1], str):
                    out.append([])
                out[-1] += [i - self.first] if i < self.n_vocab else []
            elif i > 1:
                out.append(f" <{i - 2}>")
        return "".join(part if isinstance(part, str) else self.bpe.decode(part) for part in out).strip()


class Unigram:
    """The tokenizer of published T5 checkpoints: of all ways to cut a word into known pieces the most probable one.

    pieces: [(piece, log-probability)], index = id. A space is written as ▁ in front of a word. (Kudo 2018, arXiv
    1804.10959.) Normalisation is approximated: Unicode's NFKC and single spaces. Published files carry a table of their
    own that differs from it in rare characters.
    """

    eos_ids = (1,)

    def __init__(self, pieces, unk_id=2):
        self.spec, self.n_vocab = {"kind": "unigram", "pieces": pieces, "unk_id": unk_id}, len(pieces)
        self.pieces, self.unk = [piece for piece, _ in pieces], unk_id
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.scores = [score for _, score in pieces]
        self.longest = max(map(len, self.pieces))
        self.worst = min(self.scores) - 10  # what an unknown character costs, in sentencepiece
        self.cache = {}

    def cut(self, word):
        """The best cut of one word, by dynamic programming (Viterbi): best[j] = max over i of best[i] + score(i..j)."""
        # "▁hugs" with ▁h -3, ug -2, s -2, ▁hug -3.5, gs -4: ▁hug+s = -5.5 beats ▁h+ug+s = -7.
        best, back = [0.0] + [-math.inf] * len(word), [None] * (len(word) + 1)
        for j in range(1, len(word) + 1):
            for i in range(max(0, j - self.longest), j):
                piece = self.ids.get(word[i:j])
                # A single character that is no piece may still be stepped over, as <unk>, at a price.
                score = self.scores[piece] if piece is not None else self.worst if j == i + 1 else -math.inf
                if best[i] + score > best[j]:
                    best[j], back[j] = best[i] + score, (i, self.unk if piece is None else piece)
        out, j = [], len(word)
        while j:
            j, piece = back[j]
            if not (piece == self.unk and out and out[-1] == self.unk):  # a run of unknown characters is one <unk>
                out.append(piece)
        return out[::-1]

    def encode(self, text):
        ids = []
        for word in unicodedata.normalize("NFKC", text).split():
            if word not in self.cache:
                self.cache[word] = self.cut("\u2581" + word)
            ids += self.cache[word]
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids if 2 < i < self.n_vocab).replace("\u2581", " ").strip()


# differs from encoder_only.py: other kinds
def tokenizer_from(spec):
    """The tokenizer that a spec describes: kind "numbers", "bpe" (merges) or "unigram" (pieces, unk_id)."""
    if spec["kind"] == "numbers":
        return ToyTokenizer()
    return TextTokenizer(spec["merges"]) if spec["kind"] == "bpe" else Unigram(spec["pieces"], spec["unk_id"])


def pad_ids(rows):
    """Lists of ids of different lengths -> (R, longest), padded with 0 on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def sequence_rows(pairs, tokenizer, block_size):
    """[(source text, target text)] -> (source (R, S), targets (R, T)), each with </s> behind its last token.

    Texts longer than block_size are cut, </s> included: a source without its end looks like any other source.
    """
    # </s> stands at the row's own length, before the padding. Trap: padding first; the model then never learns to stop.
    ids = [[(tokenizer.encode(text)[:block_size - 1] + [1]) for text in pair] for pair in pairs]
    return tuple(pad_ids([pair[side] for pair in ids]) for side in (0, 1))


def read_pairs(cfg):
    """--data multi30k or a file of pairs -> (train, validation, test) lists of (source, target)."""
    if cfg.data == "multi30k":
        try:
            side = {name: gunzipped(f"multi30k.{name}", MULTI30K_URL.format(remote), sha)
                    for name, (remote, sha) in MULTI30K.items()}
        except OSError as problem:
            sys.exit(f"error: --data multi30k: {problem}")
        return [list(zip(side[f"{split}.de"], side[f"{split}.en"], strict=True)) for split in ("train", "val", "test")]
    try:
        lines = Path(cfg.data).read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split("\t")) for line in lines if line.strip()]
        if len(pairs) < 20 or any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs):
            raise ValueError("needs at least 20 lines of source, one tab, target")
    except (OSError, UnicodeDecodeError, ValueError) as problem:
        sys.exit(f"error: --data {cfg.data}: {problem}")
    # Every source is in one split, decided by its own text: repeated lines cannot be on both sides.
    def split(pair):
        return int(hashlib.sha256(pair[0].encode()).hexdigest(), 16) % 10
    parts = [[pair for pair in pairs if (split(pair) == 0, split(pair) == 1) == which]
             for which in ((False, False), (True, False), (False, True))]
    if not all(parts):
        sys.exit(f"error: --data {cfg.data}: too few different sources to hold out two lines in ten")
    return parts


def gunzipped(filename, url, sha):
    """The lines of a file that is stored as it is and downloaded as .gz. Raises OSError when it cannot be had."""
    import gzip
    import zlib
    for folder in filter(None, (os.environ.get("LLM_DATA"), "data")):
        if (Path(folder) / filename).is_file():
            return fetch(filename, url, sha).read_text(encoding="utf-8").splitlines()
    # The published hash is that of the content, so the compressed file is checked by what comes out of it.
    packed = fetch(filename + ".gz", url)
    try:
        content = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error):  # a proxy's error page, half a file: the hash below says so
        content = b""
    if hashlib.sha256(content).hexdigest() != sha:
        packed.unlink()
        raise OSError(f"{url}: the download is damaged (SHA-256 differs); it was removed")
    write_atomically(packed.with_name(filename), lambda file: file.write(content))
    packed.unlink()
    return content.decode("utf-8").splitlines()


# differs from decoder_only.py: rows are pairs, or texts that get holes
def make_data(cfg, tokenizer=None):
    """-> (train rows, validation rows, tokenizer, info, test). tokenizer: keep this one (--load); None: make cfg's.

    test: numbers or pairs that are decoded at the end. Rows of sentences are sorted by length, see get_batch.
    """
    info, test = {"name": cfg.data}, None
    if cfg.objective == "span":
        text, info["name"], about = load_text(cfg.data)
        cut = int(0.9 * len(text))
        tokenizer = tokenizer or TextTokenizer(train_bpe(text[:cut], max(300, cfg.vocab_size or 4000)
                                                         - TextTokenizer.first))
        train, val = (torch.tensor(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
        if min(len(train), len(val)) < cfg.block_size:
            sys.exit(f"error: --data {cfg.data}: too short for --block-size {cfg.block_size}")
        print(f"data: {about}, {len(train):,} + {len(val):,} tokens of {tokenizer.n_vocab:,} kinds")
        info["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return ((train.unfold(0, cfg.block_size, 1),), (val.unfold(0, cfg.block_size, cfg.block_size),), tokenizer,
                info, test)
    if cfg.data == "numbers":
        tokenizer = tokenizer or ToyTokenizer()
        if tokenizer.spec != ToyTokenizer.spec or cfg.block_size < 10:
            sys.exit("error: --data numbers needs --block-size 10 or more, and with --load a model of the toy language")
        # 0 as often as other short numbers: "zero" occurs nowhere else, so only itself can teach it.
        train, val = draw_numbers(120_000, cfg.seed, False), sorted(set(draw_numbers(2_500, cfg.seed, True)))
        test = draw_numbers(2_000, cfg.seed + 1, True)
        splits = [[(str(n), number_to_words(n)) for n in part] for part in (train, val)]
    else:
        *splits, test = read_pairs(cfg)
        if tokenizer is None:
            # One vocabulary for both languages: names and numbers are shared, and so is the table. Held-out text stays
            # out of it.
            text = "\n".join(f" {side}" for pair in splits[0] for side in pair)
            tokenizer = TextTokenizer(train_bpe(text, max(300, cfg.vocab_size or 4000) - TextTokenizer.first))
    train, val = (sequence_rows(part, tokenizer, cfg.block_size) for part in splits)
    print(f"data: {cfg.data}, {len(train[0]):,} pairs to train, {len(val[0]):,} others to validate, "
          f"{(train[0] != 0).sum(1).float().mean():.0f} -> {(train[1] != 0).sum(1).float().mean():.0f} of "
          f"{tokenizer.n_vocab:,} tokens each")
    info["sha256"] = hashlib.sha256(str((splits, test)).encode()).hexdigest()
    if cfg.data != "numbers":
        order = ((train[0] != 0).sum(1) * 1000 + (train[1] != 0).sum(1)).argsort(stable=True)  # (R)
        train = tuple(part[order] for part in train)
    return train, val, tokenizer, info, test


def seeded(seed, step):
    """A random generator that is a function of (seed, step) alone."""
    # Trap: seed + step. Seed 1 at step 5 is then seed 2 at step 4. The factor keeps seeds a million steps apart.
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# differs from decoder_only.py: rows of similar length go together, so that little of a batch is padding
def get_batch(data, rows, seed, step):
    """-> the global batch of one step, a tuple of (rows, ...) tensors: a pure function of (seed, step).

    rows out of a window of 8 * rows neighbours that starts anywhere. Where the data set is sorted by length, such rows
    are about equally long; where it is not, this is a draw like any other. Every row is as likely as any other.
    """
    # Captions have 4 to 64 tokens, 17 on average: 64 of them drawn at random are padded to the longest, 36 on average,
    # so half of the work would be padding; this way to 20. Taking neighbours alone would always show the same sentences
    # together; a window of 8 batches mixes them. (index modulo the number of rows: the window that runs over the end
    # goes on with the shortest.)
    g, n = seeded(seed, step), len(data[0])
    start = torch.randint(n, (1,), generator=g)
    index = (start + torch.randperm(max(rows, min(n, 8 * rows)), generator=g)[:rows]) % n
    return tuple(part[index] for part in data)


# --- 5. Training: one loop, resumable bit for bit --------------------------------------------------------------------
# One optimizer step:
#     global batch (batch_size * grad_accum rows, a function of seed and step)
#       -> grad_accum micro-steps, each dealt out over the ranks      activations of one micro-step are alive at a time
#       -> sum of token losses, backward() adds up gradients          divide by the number of tokens, once
#       -> clip the norm, AdamW update
# Nothing random is kept between steps. Batches, dropout and noise are functions of (seed, step), so weights + optimizer
# + step number are the whole state of a run, and a resumed run equals one that was never stopped, to the last bit
# (on the CPU; GPU kernels that add with atomics may differ in the last digits).
#
# Rank = one of several equal processes, one per GPU, started by `torchrun --nproc-per-node 2 SCRIPT.py`.
# all_reduce adds a tensor up over all of them. Alone you are rank 0 of 1: at first reading skip every line that says
# rank or world.
def ranks():
    """(rank, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def setup(cfg):
    """-> the device of this process. Joins the process group under torchrun, where only rank 0 goes on printing."""
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a letter prints "?" instead of ending the program
        sys.stdout.reconfigure(errors="replace")
    kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        sys.exit(f"error: --device {kind}: PyTorch sees no such device here")
    if kind == "mps":
        print("warning: mps has trained wrongly in silence before; compare the first losses with --device cpu")
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it: 10 mantissa bits, several times faster
    if "RANK" not in os.environ:
        return torch.device(kind)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)


# differs from decoder_only.py: two schedules, the cosine and the one of the 2017 paper
def lr_at(step, cfg):
    """Learning rate of the update number `step` (from 0): linear warm-up, then half a cosine or 1/sqrt(step).

    rsqrt: lr * min((step+1) / warmup, sqrt(warmup / (step+1)))   (Vaswani et al. 2017, eq. 3, scaled to the peak lr)
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    # 1/sqrt(step) needs no last step: such a run can be stopped, looked at and continued. A schedule that ends at 0
    # averages more noise away: exact answers (numbers) need it.
    if cfg.schedule == "rsqrt":
        return cfg.lr * math.sqrt(cfg.warmup_steps / (step + 1))
    done = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - 1 - cfg.warmup_steps))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model, cfg):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) over the parameters that ask for gradients.

    m = b1*m + (1-b1)*g;  v = b2*v + (1-b2)*g^2;  w -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)
    m and v start at 0, so they are too small at first: m_hat = m / (1 - b1^t) takes that out, v_hat likewise. b1 = 0.9
    averages about 10 gradients; eps = 1e-8 only prevents 0/0.
    """
    # Q: Why Adam and not plain gradient descent?
    # A: Gradients of different weights differ by orders of magnitude: a frequent character's row and a rare one's, the
    #    first layer's and the last's. Dividing by sqrt(v), a weight's own typical gradient, gives all of them steps of
    #    size lr. The price is memory: m and v are 8 bytes per parameter in float32, twice the weights.
    params = [p for p in model.parameters() if p.requires_grad]
    # Decay pulls weights towards 0. That suits matrices, whose scale is free; a norm's gain belongs near 1 and a bias
    # has nothing to shrink. Both are vectors: the number of axes tells them apart.
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    # lr 3e-3 and weight_decay 0.1 take 3e-4 of a weight per step at most; over 2,000 steps of a cosine decay alone
    # shrinks it to 0.72 of its size.
    # Trap: adding the decay to the gradient (Adam with L2). It is then divided by sqrt(v) too, and the weights with
    # large gradients hardly decay: the W in AdamW.
    # fused: one kernel for the whole update instead of a dozen small operations per parameter, on CPU as well.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(0.9, cfg.beta2), fused=fused)


@torch.no_grad()
def evaluate(model, data, cfg, loss_fn):
    """-> {"val_loss": nats per counted token over the WHOLE split}. Draws nothing from the training's randomness."""
    # Trap: estimating on 20 random batches, as often seen: the figure jumps, and the lowest of many such looks is a
    # lucky one. Trap: taking the batches from the training generator: looking more often changes the training.
    rank, world = ranks()
    device = next(model.parameters()).device
    model.eval()  # dropout off
    # Rank r takes batches r, r + world, ... A training step costs about three forward passes, so 146 validation batches
    # every 250 steps (decoder_only.py's default) add a fifth to the run. Sums and counts travel, not means: the last
    # batch is smaller. Outside train()'s autocast: validation runs in the dtype of the weights.
    totals = torch.zeros(2, device=device)
    for start in range(rank * cfg.batch_size, len(data[0]), world * cfg.batch_size):
        batch = prepare(tuple(part[start:start + cfg.batch_size] for part in data), seeded(0, start))
        loss_sum, count, _ = loss_fn(model, tuple(part.to(device) for part in batch), cfg)
        totals += torch.stack((loss_sum, count))                               # (2)
    if world > 1:
        dist.all_reduce(totals)
    return {"val_loss": (totals[0] / totals[1]).item()}


# Q: A program can be killed at any moment, also in the middle of writing its checkpoint. What is on the disk then?
# A: With open(path, "w"), half a file, and the previous good one is gone. With the function below always a whole one.
def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, then rename it: one operation for the file system."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # always the same name: a killed run leaves one behind at most
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # first the bytes on the disk, then the name: a power cut may come in between
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def out_folder(cfg):
    """-> Path of --out, made now: a folder that cannot be made should end the run before the work, not behind it."""
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        sys.exit(f"error: --out {cfg.out}: {problem}")
    return Path(cfg.out)


def save_checkpoint(path, model, optimizer, step, cfg, extra):
    """Everything that decides how training goes on. extra: plain data kept with it (tokenizer, data hash, metrics)."""
    # `model` is the plain module, never the wrapper of DDP or torch.compile: their prefixes ("module.", "_orig_mod.")
    # would end up in the names, and the file would load nowhere else.
    state = {"script": Path(__file__).stem, "step": step, "config": dataclasses.asdict(cfg), "extra": extra,
             "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path):
    """-> the dict that save_checkpoint wrote. A missing, damaged or foreign file ends the program and is named."""
    try:
        # torch.load reads flipped bits in a weight without complaint. Its file is a zip archive, and zip keeps a CRC-32
        # of every member: testzip() compares them all and returns the name of the first bad one.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("checksum differs")
        # weights_only: a pickle may run any code when opened; this refuses everything but tensors and plain data.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"error: there is no checkpoint {path}")
    except Exception as problem:  # zip, pickle and torch each have their own kinds; all of them mean the same here
        sys.exit(f"error: {path} is damaged or not a checkpoint ({' '.join(str(problem).split())[:200]})")
    if not isinstance(state, dict) or state.get("script") != Path(__file__).stem:
        sys.exit(f"error: {path} was not written by {Path(__file__).name}")
    return state


def load_checkpoint(path, model, optimizer, cfg):
    """Fill model and optimizer (None: the model alone) from a file. -> (step, extra). Wrong shapes are named."""
    state = read_checkpoint(path)
    try:
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as problem:
        sys.exit(f"error: {path} does not fit this model: {' '.join(str(problem).split())}")
    return state["step"], state["extra"]


def recorded_config(cfg, recorded, free):
    """cfg with all but the `free` fields as recorded (a dict). A field that was set to something else is refused."""
    if set(recorded) != {field.name for field in dataclasses.fields(cfg)}:
        sys.exit("error: the checkpoint was made by another version of this script: its settings have other names")
    for field in dataclasses.fields(cfg):
        mine, theirs = getattr(cfg, field.name), recorded[field.name]
        # "auto" asks for nothing in particular: it takes what the run found.
        asked = mine != "auto" and (mine != field.default or field.name in getattr(cfg, "given", ()))
        if field.name not in free and asked and mine != theirs:
            sys.exit(f"error: the checkpoint was made with {field.name} = {theirs!r}, not {mine!r}; "
                     f"leave the flag out, or start a new run")
    return dataclasses.replace(cfg, **{name: value for name, value in recorded.items() if name not in free})


@contextlib.contextmanager
def polite_interrupt():
    """-> a list that is empty until Ctrl-C is pressed. A second Ctrl-C ends the program at once, as ever."""
    pressed = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), signal.signal(signal.SIGINT, before)))
    try:
        yield pressed
    finally:  # whatever ended the run: in a notebook the process lives on, and its stop button should work
        signal.signal(signal.SIGINT, before)


# Q: How much arithmetic is one training step?
# A: About 6 operations per parameter and token: 2 forward, 4 backward. 0.8 M parameters and 768 tokens: 4 GFLOP; GPT-2
#    124M with 0.49 M tokens a step 367 TFLOP, about 3 s on a GPU that really reaches 125 TFLOP/s.
def train(model, cfg, train_data, val_data, loss_fn, extra=None, after_step=None, guess=None):
    """Train for cfg.max_steps optimizer steps. -> {"val_loss", "history", "seconds", "tokens_per_second"}.

    extra goes into the checkpoint; after_step(step) is called after every step; guess says what an untrained model
    loses (None: ln V). Ctrl-C finishes the step (torchrun: up to ten steps), saves, and exits with 130. A loss that is
    not finite ends the run, names the step, and leaves the last good checkpoint alone.
    """
    rank, world = ranks()
    device = next(model.parameters()).device
    if cfg.batch_size % world:
        sys.exit(f"error: --batch-size {cfg.batch_size} cannot be dealt out to {world} processes")
    # --- get ready: optimizer, state of an earlier run, wrappers
    # batch_size counts the rows of all ranks: 64 rows on 8 GPUs are 8 each, the same step and the same lr.
    path, extra, share = Path(cfg.out) / "ckpt.pt", extra or {}, cfg.batch_size // world
    optimizer = make_optimizer(model, cfg)
    params = [p for p in model.parameters() if p.requires_grad]
    step, history = 0, []
    if cfg.resume:
        # Trap: saving weights without the optimizer. Symptom: the loss jumps after every resume, since Adam's averages
        # start empty while the learning rate does not.
        step, saved = load_checkpoint(path, model, optimizer, cfg)
        history, extra = saved["history"], saved | (extra or {})  # what the caller goes on filling stays his object
    net = model  # net is what runs, model is what is saved and evaluated; both hold the same weights
    if cfg.compile:
        if device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            net = torch.compile(net)
        else:
            print("--compile: no C++ compiler found; going on without")
    # Q: What does data parallel training share, and when?
    # A: Each rank holds all weights and takes 1/world of the rows. During backward() the gradients are averaged, so
    #    every optimizer makes the same update and the weights stay equal without ever being sent.
    if world > 1:  # DDP averages gradients over the ranks while backward() is still running
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)  # buffers are constants here
    # Q: Why is there no GradScaler?
    # A: bfloat16 has float32's 8 exponent bits, so small gradients survive; it pays with precision, 2-3 digits. float16
    #    is the one that needs scaling: below 6e-5 it loses digits, below 6e-8 everything.
    amp = torch.autocast(device.type, torch.bfloat16,
                         enabled=cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda"))
    before = history[-1] if history else {"seconds": 0.0, "tokens": 0}
    began, busy, tokens, recent = time.perf_counter(), 0.0, 0, []
    bar = tqdm(total=cfg.max_steps, initial=step, disable=None if rank == 0 else True, desc="train", mininterval=0.5)

    # --- the loop: everything up to bar.update() is training, what follows is looking, telling and saving
    with polite_interrupt() as stop:
        while step < cfg.max_steps:
            clock = time.perf_counter()
            # Set, not stepped: a scheduler object would be one more state to save and to get wrong on resume.
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, cfg)
            # Dropout draws from the global generator. Seeding that per step (and rank: other rows, other noise) makes
            # dropout a function of the step as well.
            torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)
            batch = get_batch(train_data, cfg.batch_size * cfg.grad_accum, cfg.seed, step)
            batch = prepare(batch, seeded(cfg.seed + 1, step))
            if not model.training:  # evaluate() and generate() switch to eval mode
                net.train()
            # GPT-2 124M: 40 micro-steps of 12 rows of 1,024 tokens. All 480 rows at once would give the same gradient
            # and need 40 times the activations, about 590 GB.
            totals = torch.zeros(2, device=device)
            for micro in range(cfg.grad_accum):
                first = micro * cfg.batch_size + rank * share  # this rank's rows of this micro-step
                part = tuple(t[first:first + share].to(device, non_blocking=True) for t in batch)
                # Ranks need each other's gradients once per step, after the last micro-step, not after each: for GPT-2
                # 124M an exchange is 0.5 GB, and 39 of 40 are saved.
                last = micro == cfg.grad_accum - 1
                with contextlib.nullcontext() if world == 1 or last else net.no_sync():
                    with amp:
                        loss_sum, count, _ = loss_fn(net, part, cfg)
                    loss_sum.backward()
                totals += torch.stack((loss_sum.detach(), count))                  # (2)
            if world > 1:
                dist.all_reduce(totals)
            # Q: Why not average the micro-batches' mean losses?
            # A: With padding they count different numbers of tokens: of two rows with 10 and 90, a mean of means weighs
            #    the short one's tokens 9 times as much. Here each backward() added a SUM of token losses into .grad;
            #    dividing by the tokens of the whole step gives the gradient of the mean over all of them, however they
            #    were split. (x world: DDP has divided by the number of ranks.)
            grads = [p.grad for p in params if p.grad is not None]
            mean = world / totals[1]
            norm = nn.utils.get_total_norm(grads) * mean
            # Clipping: g *= min(1, grad_clip / |g|), |g| over all weights together. Adam bounds the step anyway; what
            # one huge gradient would spoil is v, and with it the next 1 / (1 - beta2) = 100 updates.
            # Division and clipping in one multiplication, one pass over the gradients instead of two.
            torch._foreach_mul_(grads, mean * (cfg.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # None and not zeros: saves two passes over memory
            step, tokens = step + 1, tokens + batch[0].numel()
            recent.append(torch.stack((totals[0], totals[1], norm)))               # (3)
            bar.update()

            # final: the last step. seen: a step with evaluation. look: a step whose numbers are read. done: Ctrl-C.
            # Reading a number means waiting until the GPU has computed it: we look every 10 steps, not at each.
            final, seen = step == cfg.max_steps, step % cfg.eval_every == 0 or step == cfg.max_steps
            look = step % 10 == 0 or step == 1 or seen or step % cfg.save_every == 0
            done = bool(stop) and world == 1
            if world > 1 and look:  # ranks must leave the loop after the same step, or the others wait forever: vote
                votes = torch.tensor(float(bool(stop)), device=device)
                dist.all_reduce(votes)
                done = bool(votes > 0)
            if look or done:
                sums = torch.stack(recent).cpu()                                   # (R, 3)
                # One row per step since the last look; the first that is not finite has already spoiled the weights, so
                # stop, and do not save over the good checkpoint.
                bad = (~sums.isfinite().all(1)).nonzero()
                if len(bad):
                    worst = step - len(recent) + int(bad[0]) + 1
                    sys.exit(f"error: loss or gradient is not finite at step {worst}; the last checkpoint is kept. "
                             f"A lower --lr or --grad-clip may help")
                # What the columns tell. loss: training loss over the steps since the last line. grad_norm: before
                # clipping; a sudden tenfold is the first sign of a run about to diverge. lr: what the last update used.
                # tokens: seen in all. seconds: wall time in all, with evaluations, over all resumes. val_loss: on
                # evaluation steps.
                row = {"step": step, "loss": (sums[:, 0].sum() / sums[:, 1].sum()).item(), "lr": lr_at(step - 1, cfg),
                       "grad_norm": sums[-1, 2].item(), "tokens": before["tokens"] + tokens}
                recent = []
            busy += time.perf_counter() - clock  # time in steps alone; evaluations and checkpoints are not counted
            if look or done:
                if step == 1:
                    V = cfg.vocab_size
                    uniform = guess or f"a uniform guess over {V:,} tokens costs ln V = {math.log(V):.4f}"
                    tqdm.write(f"step     1: train {row['loss']:.4f}   {uniform}")
                if seen:
                    row |= evaluate(model, val_data, cfg, loss_fn)
                    if not math.isfinite(row["val_loss"]):
                        sys.exit(f"error: the validation loss at step {step} is not finite; the checkpoint is kept")
                    tqdm.write(f"step {step:5d}: train {row['loss']:.4f}   val {row['val_loss']:.4f}   "
                               f"{tokens / busy:,.0f} tokens/s")
                history.append(row | {"seconds": round(before["seconds"] + time.perf_counter() - began, 3)})
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            # Weights, m and v: 12 bytes per parameter, 9.7 MB for 0.8 million, 1.5 GB for 124. Rank 0 alone writes.
            if rank == 0 and (final or done or step % cfg.save_every == 0):
                save_checkpoint(path, model, optimizer, step, cfg, {**extra, "history": history})
                # The history in the checkpoint is the true one; this file is a copy of it for people and plots. Were it
                # appended to line by line, a killed run would leave lines that no checkpoint knows.
                lines = "".join(json.dumps(row) + "\n" for row in history)
                write_atomically(path.with_name("metrics.jsonl"), lambda file, lines=lines: file.write(lines.encode()))
            if done:
                bar.close()
                print(f"interrupted: step {step} is saved in {path}; --resume goes on from there", file=sys.stderr)
                sys.exit(130)  # what a shell expects of a program that Ctrl-C ended
            if after_step:
                after_step(step)
    bar.close()
    return {"val_loss": next(row["val_loss"] for row in reversed(history) if "val_loss" in row), "history": history,
            "seconds": before["seconds"] + time.perf_counter() - began,
            "tokens_per_second": tokens / busy if busy else None}


# --- 6. Decoding: from source to target ------------------------------------------------------------------------------
# The encoder runs once. Then every step reads one token, with two kinds of keys and values in store:
#
#     cross-attention   of the source, computed once, never changed        one per source, whatever the number of beams
#     self-attention    of what was written, one column more per step      one per row: beams write different texts

# A language model gives a distribution over the next token. What to do with it is a choice made outside the model:
#     greedy       take the likeliest. Exact answers (numbers); open text falls into loops
#     sampling     draw. temperature sharpens or flattens, top-k and top-p cut the unlikely tail that, drawn from 400
#                  times, is hit often enough to derail a text
#     beam search  keep several prefixes, to find a likelier whole than greedy does
#
# The cuts on the distribution [.50 .30 .15 .05]:
#     temperature 0.5   [.68 .25 .06 .01]   p^(1/0.5), renormalised      temperature 2   [.38 .29 .21 .12]
#     top_k 2           [.62 .38  0   0 ]   top_p 0.8 the same: .50 + .30 reach 0.8     top_p 0.81   [.53 .32 .16  0 ]
def sample_next(logits, temperature, top_k=0, top_p=1.0, generator=None):
    """logits (B, V) -> one token per row (B,). temperature 0 = the likeliest, exactly; top_k 0 and top_p 1 = no cut."""
    # 0 means argmax. Trap: dividing by it, or "greedy" that is really temperature 0.1 and errs now and then.
    if temperature == 0:
        return logits.argmax(-1)                                               # (B)
    # Dividing before the cut matters for top-p: a hot distribution is flatter, so more tokens are needed to reach p.
    logits = logits / temperature                                              # (B, V)
    if top_k > 0:
        # Tokens that tie with the k-th stay too: more than k may survive, and no order decides among equals.
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]          # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)                   # (B, V)
    if top_p < 1.0:
        # Q: What is top-p (nucleus) sampling?
        # A: Keep the smallest set of tokens whose probability reaches p, and sample among those (Holtzman et al. 2019,
        #    arXiv 1904.09751). Unlike top-k the set adapts: 1 token after "New Yor", hundreds after "I saw a".
        probs, order = logits.softmax(-1).sort(-1, descending=True)            # (B, V)
        # Drop a token when the ones BEFORE it already have p. Trap: comparing the sum that includes the token itself
        # drops the one that crosses p, and with p = 0.1 possibly all of them.
        drop = F.pad(probs.cumsum(-1)[:, :-1], (1, 0)) >= top_p                # (B, V)
        # drop is in sorted order; order says which token each column is: scatter writes it back to the token's column.
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)  # (B, V)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # (B)


class T5Cache:
    """What writing keeps: the source's keys and values per layer, those of the P tokens written so far.

    memories: [(k, v)] per layer, (B, H, S, D); keys, values (L, rows, H, max_len, D), rows = B * beams.
    """

    # Q: What does decoding cost, compared with reading?
    # A: Reading S tokens is one pass; writing T tokens is T passes, each over all decoder weights for one token per
    #    row: bound by memory, not by arithmetic. Long sources are cheap, long targets are not. (Deep encoder, shallow
    #    decoder is a common trade: Kasai et al. 2020, arXiv 2006.10369.)
    def __init__(self, model, memories, memory_bias, rows, max_len):
        shape = (model.cfg.n_layer, rows, model.cfg.n_head, max_len, model.cfg.head_size)
        self.keys, self.values = (model.shared.weight.new_zeros(shape) for _ in range(2))
        self.spare = None  # a second pair of buffers, see reorder
        self.memories, self.memory_bias, self.length = memories, memory_bias, 0
        # The distances between max_len positions, worked out once; step P needs row P of it.
        self.bias = model.distance_bias(model.decoder, max_len, causal=True)   # (1, ..., N, N)
        self.weights = [matrices(block) for block in model.decoder["block"]]


def matrices(block):
    """What decode_step needs of a decoder block: three norms, q|k|v, o, the cross-attention's q, o, and wi.., wo."""
    own, cross, mlp = (part[name] for part, name in
                       zip(block.layer, ("SelfAttention", "EncDecAttention", "DenseReluDense"), strict=True))
    # q, k and v read the same x: one matrix instead of three, joined once per prefill and not once per token.
    qkv = torch.cat((own.q.weight, own.k.weight, own.v.weight)).detach()       # (3*H*D, C)
    first = (mlp.wi_0.weight, mlp.wi_1.weight) if block.cfg.gated else (mlp.wi.weight,)
    norms = [part["layer_norm"].weight for part in block.layer]
    return norms, qkv, own.o.weight, cross.q.weight, cross.o.weight, first, mlp.wo.weight


def times(x, weight):
    """x (R, in) and weight (out, in) -> x weight^T (R, out): nn.Linear for the few rows of decoding."""
    # CPU libraries split a product along the rows of its first factor, and 1 row or 4 beams are too few to split.
    # (W x^T)^T is the same product with W in that place. It wants a matrix: a lone row is doubled, which costs little,
    # since reading W is what takes time.
    rows = len(x)
    if rows <= 16 and x.device.type == "cpu":
        columns = torch.cat((x, x)) if rows == 1 else x
        return (weight @ columns.t())[:, :rows].t().contiguous()               # (R, out)
    return F.linear(x, weight)                                                 # (R, out)


# generate() and beam_search() are decoder_only.py's, to the letter: a search needs to know nothing about the model but
# three functions. "ids" is the source here, and what they return is the target, as new ids always are. They ask for
# three things, which every model defines for itself: prefill (read the source, write nothing yet), decode_step (append
# one token), reorder (choose rows).
def prefill(model, ids, mask, max_len):
    """Read the sources ids (B, S). -> (logits (B, V) for the first target token, state). max_len = S + new tokens."""
    if ids.size(1) == 0:
        raise ValueError("an empty source: there is nothing to answer")
    memories = model.memories(model.encode(ids, mask))
    state = T5Cache(model, memories, model.padding_bias(mask), len(ids), max(1, max_len - ids.size(1)))
    return decode_step(model, ids.new_zeros(len(ids)), state)  # <pad> = 0 begins every target


@torch.inference_mode()
def decode_step(model, token, state):
    """Append one token (rows,) per row. -> (logits (rows, V), state). The blocks of T5.decode for one token each."""
    # Why written out again: a step on 4 rows of a 10M model (4 + 4 layers) is 25 million products, so little that
    # calling 60 modules one by one weighs beside it. Here is what they compute, nothing else, held to it by a test.
    cfg, P, rows = model.cfg, state.length, len(token)

    def norm(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)                       # (R, C)

    bias = state.bias[:, :, P:P + 1, :P + 1]  # how far the new token is from each one so far
    x = model.embed(token[:, None], P)[:, 0]                                   # (R, C)
    for layer, (k, v) in enumerate(state.memories):
        norms, qkv, o, cross_q, cross_o, first, wo = state.weights[layer]
        keys, values = state.keys[layer, :, :, :P + 1], state.values[layer, :, :, :P + 1]  # (R, H, ..., D)
        h = times(norm(x, norms[0]), qkv).view(rows, 3, cfg.n_head, -1)        # (R, 3, H, D)
        q, keys[:, :, P], values[:, :, P] = h.unbind(1)                        # (R, H, D)
        y = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=bias)  # (R, H, 1, D)
        x = x + times(y.flatten(1), o)                                         # (R, C)
        # The K beams of a source are neighbours. To attention they are K queries to the same keys: so the source's
        # keys are kept once and not K times.
        h = times(norm(x, norms[1]), cross_q).view(len(k), -1, cfg.n_head, cfg.head_size)  # (B, K, H, D)
        q = h.transpose(1, 2)                                                  # (B, H, K, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=state.memory_bias)  # (B, H, K, D)
        x = x + times(y.transpose(1, 2).reshape(rows, -1), cross_o)            # (R, C)
        h = norm(x, norms[2])                                                  # (R, C)
        h = [times(h, wi) for wi in first]                                     # [(R, F)]
        h = F.gelu(h[0], approximate="tanh") * h[1] if cfg.gated else F.relu(h[0])  # (R, F)
        x = x + times(h, wo)                                                   # (R, C)
    state.length = P + 1
    return times(model.decoder["final_layer_norm"](x), model.lm_head.weight), state


def reorder(state, rows):
    """-> the state whose row i is the old row rows[i]. The rows of one source must stay together, as beams do.

    Only what was written is copied. The source's keys stay where they are: all its beams share them. The old state's
    buffers serve again at the next call: go on with the new state alone.
    """
    new, P = copy.copy(state), state.length
    # Two pairs of buffers take turns. Fresh memory at every step costs more than the copy: the system has to clear it.
    pair = state.spare
    if pair is None or pair[0].size(1) != len(rows):
        shape = (len(state.keys), len(rows), *state.keys.shape[2:])
        pair = tuple(state.keys.new_zeros(shape) for _ in range(2))
    for old, fresh in zip((state.keys, state.values), pair, strict=True):
        torch.index_select(old[:, :, :, :P], 1, rows, out=fresh[:, :, :, :P])
    new.keys, new.values, new.spare = *pair, (state.keys, state.values)
    return new


@torch.no_grad()
def generate(model, ids, max_new_tokens, *, mask=None, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
             eos_ids=(), pad_id=0, generator=None, on_token=None):
    """Continue every row of ids (B, T). -> the new ids only, (B, N) with N <= max_new_tokens, pad_id behind an EOS.

    mask (B, T) bool, True = real token: prompts of different length in one batch, padded on either side.
    on_token(token (B,)) is called for each new column, for streaming. Puts the model into eval mode.
    """
    model.eval()  # Trap: dropout left on; every sample is then drawn from a slightly damaged model
    # Two speeds: prefill reads the whole prompt in one pass and is bound by arithmetic; each decode_step reads all
    # weights for one token per row and is bound by memory. That is why a long answer costs more than a long question.
    logits, state = prefill(model, ids, mask, ids.size(1) + max_new_tokens)
    B, V = logits.shape
    out = ids.new_full((B, max_new_tokens), pad_id)
    done = torch.zeros(B, dtype=torch.bool, device=ids.device)                 # (B)
    eos = torch.tensor(list(eos_ids), device=ids.device, dtype=ids.dtype)
    seen = None
    if repetition_penalty != 1.0:  # which tokens each row has met so far; padding does not count as met
        seen = torch.zeros(B, V, dtype=torch.int, device=ids.device)           # (B, V)
        # scatter_add and not scatter: a pad adds 0, and cannot undo the 1 of a real token that has the same id.
        seen.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.int) if mask is None else mask.int())
    length = 0
    while length < max_new_tokens:
        if seen is not None:
            # A logit has no fixed zero: "weaker" is towards -inf, so positive ones are divided and negative ones
            # multiplied (Keskar et al. 2019, arXiv 1909.05858, with the sign case that its formula forgot).
            weaker = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)  # (B, V)
            logits = torch.where(seen > 0, weaker, logits)                     # (B, V)
        token = sample_next(logits, temperature, top_k, top_p, generator)      # (B)
        # A finished row keeps its place in the batch and gets pads; the others go on.
        token = token.masked_fill(done, pad_id)                                # (B)
        out[:, length] = token
        length += 1
        if on_token is not None:
            on_token(token)
        if len(eos):
            done = done | torch.isin(token, eos)                               # (B)
            if bool(done.all()):
                break
        if seen is not None:
            seen.scatter_(1, token[:, None], 1)
        if length < max_new_tokens:  # nobody asks what follows the last token
            logits, state = decode_step(model, token, state)
    return out[:, :length]


# Probabilities multiply along a text, and 0.5^400 = 1e-120 is 0 in float32; log-probs add up instead. Keep the K best
# prefixes, try all V sequels of each, keep the K best of those K*V, and put texts that ended aside.
# K = 2 beams, log-probs added up along the path, the two best of all continuations kept at every step:
#
#     prompt --+-- a  -0.6 --+-- b -2.1
#              |             +-- c -2.3   cut: two others are better
#              +-- d  -0.9 --+-- e -1.0   the winner begins with the second-best first token: greedy would miss it
#                            +-- f -4.0   cut
@torch.no_grad()
def beam_search(model, ids, max_new_tokens, *, mask=None, num_beams=4, length_penalty=1.0, gnmt=False, eos_ids=(),
                pad_id=0, n_best=1):
    """Keep the num_beams best prefixes at every step. -> (ids (B, n_best, N), scores (B, n_best)), best first.

    score = sum of log-probs / length ** length_penalty, the length counting the EOS. gnmt: / ((5 + length) / 6) ** ...
    instead, which favours length less among short texts (Wu et al. 2016, arXiv 1609.08144, eq. 14). A row stops when
    its best running beam, scored at its present length, is no better than its worst finished one (Hugging Face's
    default rule). Raises ValueError if n_best > num_beams.
    """
    # Q: Why is the most probable text often a poor one, and the search still used?
    # A: Open-ended text of highest probability is bland and repeats itself; people do not write likely words only. With
    #    one right answer (translation, numbers to words) the likeliest text is what you want, and greedy choice can
    #    lose it: a first word of 0.4 whose best sequel has 0.9 beats a first word of 0.6 with 0.5.
    if n_best > num_beams:
        raise ValueError(f"n_best {n_best} is more than num_beams {num_beams}")
    model.eval()
    logits, state = prefill(model, ids, mask, ids.size(1) + max_new_tokens)
    (B, V), K, N = logits.shape, num_beams, max_new_tokens
    # running = the sum of log-probs of each beam. All K beams of a row start as the same prompt, so all but the first
    # start at -inf: otherwise step 1 would keep K copies of its best token.
    running = torch.full((B, K), -math.inf, device=ids.device)                 # (B, K)
    running[:, 0] = 0.0
    # Beam k of row b lives in batch row b*K + k.
    rows = torch.arange(B, device=ids.device).repeat_interleave(K)             # (B*K)
    logits, state = logits[rows], reorder(state, rows)
    tokens = ids.new_full((B, K, N), pad_id)                                   # (B, K, N)
    # Finished texts wait in a pool of their own, sorted, best first; -inf marks an empty place.
    finished, best = torch.full_like(running, -math.inf), tokens.clone()
    active = torch.ones(B, dtype=torch.bool, device=ids.device)                # (B)
    eos = torch.tensor(list(eos_ids), device=ids.device, dtype=ids.dtype)
    # Each beam can offer at most len(eos) endings, so (1 + len(eos)) * K candidates always hold K that go on.
    # (At least 2*K, also without an EOS: Hugging Face takes as many, so that results can be compared one to one.)
    wanted, n = min(max(2, 1 + len(eos)) * K, K * V), -1
    for n in range(N):
        norm = ((5 + n + 1) / 6 if gnmt else n + 1) ** length_penalty
        logp = logits.float().log_softmax(-1).view(B, K, V)                    # (B, K, V)
        # The continuations of all beams of a row compete for M places. No beam can win more than M, so each sends its
        # best W = min(M, V) into the final: a list of K*W instead of K*V. The index tells beam and token of a winner.
        score, token = logp.topk(min(wanted, V))                               # (B, K, W)
        score, index = (score + running[:, :, None]).flatten(1).topk(wanted)   # (B, M)
        beam, token = index // token.size(2), token.flatten(1).gather(1, index)  # (B, M)
        longer = tokens.gather(1, beam[:, :, None].expand(-1, -1, N))          # (B, M, N)
        longer[:, :, n] = token
        ends = torch.isin(token, eos) | (n == N - 1)                           # (B, M)
        # An ending counts only among the K best: at rank K+1 the prefix would have been cut, had it gone on.
        final = (score / norm).masked_fill(~(ends & active[:, None]), -math.inf)  # (B, M)
        final[:, K:] = -math.inf
        # The K finished so far and the M new endings compete for K places: pick says who stays, gather fetches them.
        finished, pick = torch.cat((finished, final), 1).topk(K)               # (B, K)
        best = torch.cat((best, longer), 1).gather(1, pick[:, :, None].expand(-1, -1, N))  # (B, K, N)
        running, pick = score.masked_fill(ends, -math.inf).topk(K)             # (B, K)
        # Log-probs are negative and add up: the sum only falls. But dividing by a growing length can raise the mean,
        # so with length_penalty > 0 this stop is a heuristic, and the published one.
        active = active & (running[:, 0] / norm > finished[:, -1])             # (B)
        if n == N - 1 or not bool(active.any()):
            break
        tokens = longer.gather(1, pick[:, :, None].expand(-1, -1, N))          # (B, K, N)
        # The surviving beams may all stem from one: their caches are copied from the beam that they continue.
        rows = beam.gather(1, pick) + torch.arange(B, device=ids.device)[:, None] * K  # (B, K)
        logits, state = decode_step(model, token.gather(1, pick).flatten(), reorder(state, rows.flatten()))
    return best[:, :n_best, :n + 1], finished[:, :n_best]


# --- 7. Interchange: published weights in and out --------------------------------------------------------------------
#     shared.weight (V, C)   encoder.block.0.layer.0.SelfAttention.q.weight (H*D, C)   lm_head.weight (V, C) if untied
# The names are ours too. What differs is where two scales stand (why: see T5Attention.forward and T5.embed):
#                     published                                          ours
#     all             scores = q k^T                                     Q' = Q sqrt(D):  scores = q' k^T / sqrt(D)
#     v1.0, tied      x = E,  logits = (h / sqrt(C)) E^T                 E' = E / sqrt(C):  x = E' sqrt(C),  h E'^T
#     v1.1, untied    x = E,  logits = h W^T                             E' = E / sqrt(C);  W as it is
# Trap: config.json's tie_word_embeddings does not tell the two apart any more. Recent transformers write true for both
# and a second key, scale_decoder_outputs, that says what is meant; older files have the first key alone.
def config_from_hf(hf):
    """config.json (a dict) -> Config. Raises ValueError for a model that is not T5 as built here."""
    # Each of these changes the arithmetic without changing a single shape: better refused than silently wrong.
    for key, expected in (("model_type", "t5"), ("layer_norm_epsilon", 1e-6), ("relative_attention_num_buckets", 32),
                          ("relative_attention_max_distance", 128), ("decoder_start_token_id", 0), ("pad_token_id", 0),
                          ("num_decoder_layers", hf.get("num_layers"))):
        if hf.get(key) is not None and hf[key] != expected:
            raise ValueError(f"config.json says {key} = {hf[key]!r}; this file implements {expected!r} only")
    for key in ("vocab_size", "num_layers", "num_heads", "d_model", "d_kv", "d_ff"):
        if key not in hf:
            raise ValueError(f"config.json has no {key}")
    if hf.get("feed_forward_proj", "relu") not in ("relu", "gated-gelu"):
        raise ValueError(f"config.json says feed_forward_proj = {hf['feed_forward_proj']!r}, not relu or gated-gelu")
    return Config(objective="span", data="auto", vocab_size=hf["vocab_size"], n_layer=hf["num_layers"],
                  n_head=hf["num_heads"], n_embd=hf["d_model"], head_size=hf["d_kv"], ffn_size=hf["d_ff"],
                  gated=hf.get("feed_forward_proj") == "gated-gelu", dropout=hf.get("dropout_rate", 0.1),
                  tie_weights=hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True)), block_size=512)


def config_to_hf(cfg):
    """Config -> the dict of config.json that transformers' T5ForConditionalGeneration expects."""
    if cfg.positions != "relative":
        raise ValueError("T5 has relative positions; a model with sinusoids has no published form")
    return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
            "vocab_size": cfg.vocab_size, "num_layers": cfg.n_layer, "num_decoder_layers": cfg.n_layer,
            "num_heads": cfg.n_head, "d_model": cfg.n_embd, "d_kv": cfg.head_size, "d_ff": cfg.ffn_size,
            "feed_forward_proj": "gated-gelu" if cfg.gated else "relu", "dropout_rate": cfg.dropout,
            "tie_word_embeddings": cfg.tie_weights, "scale_decoder_outputs": cfg.tie_weights,
            "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dtype": "float32"}


def import_weights(model, tensors):
    """Fill the model from published tensors {name: tensor}. A missing, unknown or misshapen one raises ValueError."""
    found = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    for stack in ("encoder", "decoder"):  # old files hold the shared table three times
        copy_of = found.pop(f"{stack}.embed_tokens.weight", None)
        if copy_of is not None and not torch.equal(copy_of, found.setdefault("shared.weight", copy_of)):
            raise ValueError(f"{stack}.embed_tokens.weight differs from shared.weight; this file has one table")
    # Some old decoders carry a bias table for cross-attention that no code ever read.
    found.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)
    for name in found:
        if name.endswith(".q.weight"):
            found[name] = found[name] * math.sqrt(model.cfg.head_size)
    if "shared.weight" in found:
        table = found["shared.weight"]
        head = found.pop("lm_head.weight", table)
        if model.cfg.tie_weights and not torch.equal(head, table):
            raise ValueError("lm_head.weight differs from shared.weight, and config.json says that they are tied")
        found["shared.weight"] = table / math.sqrt(model.cfg.n_embd)
        found["lm_head.weight"] = found["shared.weight"] if model.cfg.tie_weights else head
    wanted = model.state_dict()
    # load_state_dict would name these too, in one block of text for all of them. The first one is what helps.
    for name in sorted(wanted.keys() ^ found.keys(), key=lambda name: (name == "lm_head.weight", name)):
        raise ValueError(f"the weights have no tensor {name}" if name in wanted else f"T5 has no tensor {name}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            turned = " (transposed?)" if tensor.shape[::-1] == wanted[name].shape else ""
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}{turned}")
    model.load_state_dict(found, assign=True)  # takes the tensors themselves: no second copy of the weights
    if model.cfg.tie_weights:  # assigning made them two; one again
        model.lm_head.weight = model.shared.weight


def export_weights(model):
    """-> {published name: tensor}: the table and the queries at T5's scale, a tied head not stored."""
    D, C = model.cfg.head_size, model.cfg.n_embd
    scale = {name: D ** -0.5 if name.endswith(".q.weight") else C ** 0.5 if name == "shared.weight" else 1.0
             for name, _ in model.named_parameters()}
    return {name: (tensor.detach() * scale[name]).cpu().contiguous() for name, tensor in model.named_parameters()}


def hub_folder(repo, names=("config.json", "model.safetensors")):
    """Fetch these files of a Hugging Face repository into ./data. -> the folder. Raises OSError."""
    from urllib.parse import urljoin

    import requests
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise FileNotFoundError(f"there is no folder {repo}")
    base = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}/resolve/main"
    for root in filter(None, (os.environ.get("LLM_DATA"), "data")):
        folder = Path(root) / repo.replace("/", "--")
        if all((folder / name).is_file() for name in names):  # fetched before: no network needed
            return folder
    for name in names:
        # Large files are stored by content: before the hub redirects to its storage it announces their SHA-256. A
        # repository that was renamed (gpt2 is openai-community/gpt2 today) costs one more redirect before that.
        url, announced = f"{base}/{name}", ""
        for _ in range(5):
            answer = requests.head(url, timeout=(3, 30))
            answer.raise_for_status()
            announced = answer.headers.get("x-linked-etag", "").strip('"')
            if announced or not answer.is_redirect:
                break
            url = urljoin(url, answer.headers["location"])
        # Small files have no announced hash; a wrong config is caught by config_from_hf or by the shapes.
        path = fetch(f"{folder.name}/{name}", url, announced if len(announced) == 64 else "")
    return path.parent


def from_pretrained(path_or_repo):
    """A folder in Hugging Face layout, or a repository name ("gpt2", "openai-community/gpt2-large").

    -> (model in eval mode, its Config). Raises OSError if it cannot be had, ValueError if it is not a GPT-2.
    """
    # Three steps, the same for every architecture: config.json says what to build, the names say what goes where, and a
    # test says that the logits agree with the reference implementation (within 1e-4 in float32; here they do).
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = Path(path_or_repo) if Path(path_or_repo).is_dir() else hub_folder(path_or_repo)
    cfg = config_from_hf(json.loads((folder / "config.json").read_text()))
    # On the meta device a model has shapes and no memory: nothing is allocated or drawn that would be replaced at once.
    with torch.device("meta"):
        model = build_model(cfg)
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as problem:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged ({problem})") from problem
    import_weights(model, tensors)
    return model.eval(), cfg


def save_pretrained(model, cfg, path, tokenizer=None):
    """Write config.json and model.safetensors (and our tokenizer's description): transformers and --load read it."""
    from safetensors.torch import save
    files = {"model.safetensors": save(export_weights(model), metadata={"format": "pt"}),  # transformers asks for "pt"
             "config.json": json.dumps(config_to_hf(cfg), indent=2).encode()}
    if tokenizer is not None:
        files["tokenizer_spec.json"] = json.dumps(tokenizer.spec).encode()
    for name, content in files.items():
        write_atomically(Path(path) / name, lambda file, content=content: file.write(content))


# differs from decoder_only.py: T5's pieces and their probabilities are read from tokenizer.json
def load_tokenizer(path):
    """The tokenizer of a folder or repository: what tokenizer_spec.json (ours) says, else T5's tokenizer.json."""
    folder = Path(path) if Path(path).is_dir() else hub_folder(str(path), ("tokenizer.json",))
    spec = folder / "tokenizer_spec.json"
    if spec.is_file():
        return tokenizer_from(json.loads(spec.read_text()))
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model.get("type", "Unigram") != "Unigram":
        raise ValueError(f"tokenizer.json holds a {model['type']} model; T5's is Unigram")
    return Unigram([(piece, score) for piece, score in model["vocab"]], model["unk_id"])


# --- 8. Main: train, look, tell --------------------------------------------------------------------------------------
# Q: What fills the memory in training?
# A: 16 bytes per parameter with plain AdamW (weight, gradient, two moments), and what is kept for backward: about 40*C
#    numbers per pair of tokens and layer, the T x S scores, and three rows of V per target token.
# differs from decoder_only.py: two stacks, and scores that are kept because a learned bias is added to them
def memory_gb(cfg, parameters):
    """{what: GB} that one process needs to train in float32, before any of it is allocated."""
    rows, T, C = cfg.batch_size // ranks()[1], cfg.block_size, cfg.n_embd
    inner, ffn = cfg.n_head * (cfg.head_size or C // cfg.n_head), cfg.ffn_size or 4 * C
    # Encoder and decoder layer together. Per token: five norms' inputs and outputs 2*C each, three attentions 4*H*D,
    # two feed-forwards 2 to 3*F; per pair of positions and head: scores and weights of three attentions.
    kept = cfg.n_layer * (10 * C + 12 * inner + (6 if cfg.gated else 4) * ffn + 6 * cfg.n_head * T) + 3 * cfg.vocab_size
    return {"weights": 4e-9 * parameters, "gradients": 4e-9 * parameters, "optimizer": 8e-9 * parameters,
            "activations": 4e-9 * rows * T * kept}


def check_memory(cfg, device):
    """Refuse, with the estimate, what cannot fit on this machine: trying would make it swap and freeze instead."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(cfg).parameters())
    need, have = memory_gb(cfg, parameters), math.inf
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[1] / 1e9  # [1]: all, not the free part; refuse only what can never fit
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # Linux and macOS; Windows does not say
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if sum(need.values()) > have:
        parts = ", ".join(f"{name} {size:.1f}" for name, size in need.items())
        sys.exit(f"error: this needs about {sum(need.values()):.1f} GB ({parts}) and the machine has {have:.1f} GB; "
                 f"take a smaller --preset, --batch-size or --block-size")


def peak_memory_mb(device):
    """The most memory this process ever held: of the GPU there, of the machine elsewhere. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return None
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # macOS counts bytes, Linux kilobytes


# How to read the curve. Both fall together: train longer or larger. Train falls, validation turns up: the model learns
# the text by heart; more data, more dropout or fewer steps. Stuck at ln V: nothing arrives (a rate of 0, shuffled
# targets). Stuck at the entropy of the characters, 3.3 for English: the context is ignored, see mask and positions.
def plot_curve(path, history, title, lines, unit="nats per token"):
    """Training and validation loss against steps; lines = {label: height} are drawn across (ln V, the floor)."""
    import matplotlib
    matplotlib.use("Agg")  # draws into files; no window, so it works on a server
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120)
    ax.plot([row["step"] for row in history], [row["loss"] for row in history], lw=1, color="tab:gray", label="train")
    looks = [row for row in history if "val_loss" in row]
    ax.plot([row["step"] for row in looks], [row["val_loss"] for row in looks], "o-", ms=4, color="tab:blue",
            label="validation, whole split")
    for label, height in lines.items():
        ax.axhline(height, ls="--", lw=0.8, color="tab:red")
        ax.text(0.5, height, label, transform=ax.get_yaxis_transform(), ha="center", va="bottom", fontsize=8)
    ax.set(xlabel="step", ylabel=f"loss, {unit}", title=title)
    ax.legend()
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def translate(model, tokenizer, texts, cfg, beams, max_new_tokens):
    """Source texts -> target texts, in their order, greedily (beams 1) or by beam search."""
    device, out = next(model.parameters()).device, [None] * len(texts)
    ids = [tokenizer.encode(text)[:cfg.block_size - 1] + [1] for text in texts]
    # Sorted by length, so that a batch holds little padding; 100 sources with 4 beams are 400 rows.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), 100):
        part = order[start:start + 100]
        source = pad_ids([ids[i] for i in part]).to(device)                    # (B, S)
        options = dict(mask=source != 0, eos_ids=tokenizer.eos_ids)
        if beams > 1:
            options |= dict(length_penalty=cfg.length_penalty, gnmt=cfg.gnmt)
            rows = beam_search(model, source, max_new_tokens, num_beams=beams, **options)[0][:, 0]  # (B, N)
        else:
            rows = generate(model, source, max_new_tokens, **options)          # (B, N)
        for i, row in zip(part, rows.tolist(), strict=True):
            out[i] = tokenizer.decode(row[:row.index(1)] if 1 in row else row).strip()
    return out


# differs from decoder_only.py: the number is the source, its name the whole answer
def exact_match(model, tokenizer, numbers, cfg):
    """Share of numbers whose whole name comes out right, greedily. No credit for nearly: "sixty" for "sixteen" is 0."""
    # 10 = nine words and the end, the longest name. Trap: 9; the longest ones then never count as right.
    names = translate(model, tokenizer, [str(n) for n in numbers], cfg, 1, 10)
    return sum(name == number_to_words(n) for name, n in zip(names, numbers, strict=True)) / len(numbers)


def stress_numbers():
    """All held-out numbers of 5 or 6 digits with three or more zeros: rare in training, and where models go wrong."""
    # "forty thousand six": most words of the pattern are missing, so their places must be counted, not remembered. The
    # draws for exact_match hold few of these; a model can have 1.000 there and .93 here.
    return [n for n in range(10_000, 1_000_000) if str(n).count("0") >= 3 and is_validation(n)]


def bleu(hypotheses, references):
    """Corpus BLEU in percent (Papineni et al. 2002), equal to sacrebleu's default: 13a tokens, exponential smoothing.

    BLEU = exp(min(0, 1 - r/c)) * (p1 p2 p3 p4)^(1/4), p_n = share of our n-grams that are in the reference.
    """
    # Q: What does BLEU count?
    # A: Words, pairs, triples and quadruples of words that also stand in the reference, each at most as often as there
    #    (otherwise "the the the" is perfect), summed over the whole corpus. No recall: instead, output that is shorter
    #    than the reference (c < r) is punished. A good translation in other words scores low, so compare systems on one
    #    test set, and name the tokenizer: lower-casing alone is worth a point or two.
    def words(text):
        """The part of mteval-v13a that matters for Western text: punctuation becomes words of its own."""
        for sign, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
            text = text.replace(sign, char)
        text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {text} ")
        text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)  # a point or comma, but not inside 3.14
        text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
        return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()

    right, total, c, r = [0] * 4, [0] * 4, 0, 0
    for ours, theirs in zip(map(words, hypotheses), map(words, references), strict=True):
        c, r = c + len(ours), r + len(theirs)
        for n in range(4):
            a, b = (Counter(tuple(side[i:i + n + 1]) for i in range(len(side) - n)) for side in (ours, theirs))
            right[n] += sum((a & b).values())  # & keeps the smaller count
            total[n] += sum(a.values())
    if right[0] == 0:  # not one word right; with no words at all nothing is left to divide by, either
        return 0.0
    logs, halves = 0.0, 1.0
    for hit, all_ in zip(right, total, strict=True):
        if all_ == 0:
            return 0.0
        # No 4-gram right at all would make the product 0; the first such order counts as 1/2 a hit, the next 1/4 ...
        if hit == 0:
            halves /= 2
        logs += math.log((hit or halves) / all_) / 4
    return 100 * math.exp(min(0.0, 1 - r / c) + logs)


@torch.no_grad()
def alignment(model, tokenizer, source, target):
    """Cross-attention weights while `target` is written: (L, H, T, S), each row of S numbers sums to 1."""
    model.eval()
    device = next(model.parameters()).device
    src, tgt = (torch.tensor([tokenizer.encode(text) + [1]], device=device) for text in (source, target))
    seen = []
    # A hook is called with what goes into a layer: the queries' x, and the source's keys.
    hooks = [block.layer[1]["EncDecAttention"].register_forward_pre_hook(
        lambda part, inputs: seen.append(part.weights(inputs[0], inputs[1], 0)[0])) for block in model.decoder["block"]]
    model(src, F.pad(tgt[:, :-1], (1, 0)))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)                                                   # (L, H, T, S)


# Q: Do attention weights explain what the model does?
# A: Only roughly. They say where a head looked, not what it took from there, and the vectors it looks at have already
#    mixed with their neighbours in the encoder. As a check that source and target are aligned they are good.
# How to read it: row = the word that is being written, column = the source token that is looked at. A decoder layer
# that translates looks like a staircase: word by word, from left to right. Other layers count, or look at the end.
def plot_alignment(path, model, tokenizer, source, target):
    """One panel per decoder layer: where its heads look, on average."""
    import matplotlib
    matplotlib.use("Agg")  # draws into files; no window, so it works on a server
    import matplotlib.pyplot as plt
    weights = alignment(model, tokenizer, source, target).mean(1).cpu()        # (L, T, S)
    columns, rows = ([tokenizer.decode([i]).strip() or "</s>" for i in tokenizer.encode(text) + [1]]
                     for text in (source, target))
    fig, axes = plt.subplots(1, len(weights), figsize=(1.5 + 3.4 * len(weights), 1.2 + 0.36 * len(rows)), dpi=120,
                             squeeze=False, sharey=True)
    for layer, (ax, image) in enumerate(zip(axes[0], weights, strict=True), 1):
        ax.imshow(image, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        slant = {} if tokenizer.n_vocab < 100 else dict(rotation=60, ha="right", rotation_mode="anchor")
        ax.set_xticks(range(len(columns)), columns, **slant)
        ax.set_yticks(range(len(rows)), rows)
        ax.set_title(f"decoder layer {layer}", fontsize=9)
    fig.suptitle("cross-attention: row = word being written, column = source", fontsize=9)
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def stream(tokenizer):
    """-> an on_token callback that prints the first row's text while it is written."""
    ids, shown = [], 0

    def on_token(token):
        nonlocal shown
        if int(token[0]) in tokenizer.eos_ids:
            return
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a BPE token may end inside a UTF-8 character: wait for the rest of it
            print(text[shown:], end="", flush=True)
            shown = len(text)
    return on_token


def check_prompt(tokenizer, prompt):
    """End the program with one line if this tokenizer cannot read the prompt."""
    try:
        if not tokenizer.encode(prompt):
            sys.exit("error: --prompt: there is nothing in it that this tokenizer can read")
    except ValueError as problem:
        sys.exit(f"error: --prompt: {problem}")


# differs from decoder_only.py: the prompt is the source; what comes out is the whole answer
def write_text(model, tokenizer, cfg, prompt, on_token=None):
    """Answer `prompt` as cfg says (beams and n_best, or temperature / top-k / top-p). -> text, a line per answer."""
    ids = torch.tensor([tokenizer.encode(prompt) + [1]], device=next(model.parameters()).device)  # (1, S)
    scores = None
    if cfg.beams > 1:
        rows, scores = beam_search(model, ids, cfg.max_new_tokens, num_beams=cfg.beams, n_best=cfg.n_best,
                                   length_penalty=cfg.length_penalty, gnmt=cfg.gnmt, eos_ids=tokenizer.eos_ids)
        rows, scores = rows[0], scores[0].tolist()
    else:
        rows = generate(model, ids, cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                        eos_ids=tokenizer.eos_ids, on_token=on_token,
                        generator=torch.Generator(ids.device).manual_seed(cfg.seed))
    # </s> = 1 ends the answer and is no part of it; what follows is padding.
    texts = [tokenizer.decode(row[:row.index(1)] if 1 in row else row).strip() for row in rows.tolist()]
    if cfg.n_best > 1:
        texts = [f"{score:8.4f}  {text}" for score, text in zip(scores, texts, strict=True)]
    return "\n".join(texts)


# differs from decoder_only.py: other fields make the shape, and T5 brings its own tokenizer
def load_any(cfg):
    """--load: our checkpoint (a file, or the run folder around it) or published weights. -> (model, cfg, tokenizer).

    The shape of the model comes from what is loaded, everything else from the command line.
    """
    shape = {"n_layer", "n_head", "n_embd", "head_size", "ffn_size", "gated", "tie_weights", "positions", "vocab_size"}
    free = {field.name for field in dataclasses.fields(cfg)} - shape
    # A preset's shape is a wish of the preset, not of the user: only what was typed can contradict the weights.
    for name in shape - cfg.given if hasattr(cfg, "given") else ():
        setattr(cfg, name, getattr(Config, name))
    path = Path(cfg.load)
    path = path / "ckpt.pt" if (path / "ckpt.pt").is_file() else path
    if path.is_file():
        state = read_checkpoint(path)
        cfg = recorded_config(cfg, state["config"], free)
        model = build_model(cfg)
        load_checkpoint(path, model, None, cfg)
        return model.eval(), cfg, tokenizer_from(state["extra"]["tokenizer"])
    try:
        model, theirs = from_pretrained(cfg.load)
        tokenizer = load_tokenizer(cfg.load)
    except (OSError, ValueError, KeyError) as problem:
        sys.exit(f"error: --load {cfg.load}: no run, no checkpoint and no T5 folder or repository ({problem})")
    if tokenizer.n_vocab > theirs.vocab_size:
        sys.exit(f"error: --load {cfg.load}: {theirs.vocab_size} tokens in the weights, {tokenizer.n_vocab} in the "
                 f"tokenizer; they do not belong together")
    cfg = recorded_config(cfg, dataclasses.asdict(theirs), free)
    model.cfg.dropout = cfg.dropout  # all modules hold this one record
    return model, cfg, tokenizer


def main(cfg):
    """Train (or --resume, or start from --load) and report; with --load and --prompt only answer. -> (model, cfg)."""
    # In this order: device, settings, data, memory, model. What can fail does so before anything is written.
    device = setup(cfg)
    rank, world = ranks()
    model, tokenizer = None, None
    if cfg.resume:
        # What a run was made with is in its checkpoint; the command line need not repeat it and may not contradict it.
        state = read_checkpoint(Path(cfg.out) / "ckpt.pt")
        # How to search may change, but only when asked for: BLEU with other beams would be another figure.
        search = {"prompt", "max_new_tokens", "temperature", "top_k", "top_p", "beams", "n_best", "length_penalty",
                  "gnmt"}
        free = {"out", "device", "compile", "resume", "eval_every", "save_every", "load"}
        free |= search & getattr(cfg, "given", search)
        cfg, tokenizer = recorded_config(cfg, state["config"], free), tokenizer_from(state["extra"]["tokenizer"])
    elif cfg.load:
        model, cfg, tokenizer = load_any(cfg)
    if cfg.load and cfg.prompt and not cfg.resume:
        model.to(device)
        check_prompt(tokenizer, cfg.prompt)
        text = write_text(model, tokenizer, cfg, cfg.prompt, stream(tokenizer))
        print(text if cfg.beams > 1 else "")  # sampled text was streamed; the best beam is known at the end only
        return model, cfg

    if (cfg.objective == "span") != (cfg.data in ("auto", "shakespeare", "pydocs") or cfg.objective == "span"):
        sys.exit(f"error: --data {cfg.data} is text without pairs: it needs --objective span (or --preset span)")
    if cfg.objective == "span" and cfg.data in ("numbers", "multi30k"):
        sys.exit(f"error: --objective span cuts holes into a text; --data {cfg.data} is pairs")
    if world > 1 and rank > 0:
        dist.barrier()  # rank 0 goes first: it may have to download, and the others then find the file
    train_data, val_data, tokenizer, info, test = make_data(cfg, tokenizer)
    if world > 1 and rank == 0:
        dist.barrier()
    if cfg.resume and info["sha256"] != state["extra"]["data"]["sha256"]:
        sys.exit(f"error: --resume: {info['name']} is not the data that this run was trained on (SHA-256 differs)")
    # A learned vocabulary may stay smaller than --vocab-size asked for: merges stop when no pair occurs twice.
    # "auto" becomes the name of what was found: a resumed run must not find something else.
    cfg = dataclasses.replace(cfg, data=info["name"], vocab_size=cfg.vocab_size if cfg.load else tokenizer.n_vocab)
    # toy: every answer can be checked; span: a text that gets holes; neither: sentences, judged by BLEU.
    toy, span = cfg.data == "numbers", cfg.objective == "span"
    # What to ask while it learns: a number or a sentence.
    prompt = cfg.prompt or ("40215" if toy else "" if span else test[0][0])
    if prompt:
        check_prompt(tokenizer, prompt)
    check_memory(cfg, device)
    out = out_folder(cfg)
    # Weights stay float32 under bfloat16 autocast: after 1 bfloat16 knows 1.0078 next, so small updates would be lost.
    model = (model or build_model(cfg)).to(device, torch.float64 if cfg.dtype == "float64" else torch.float32)
    cfg = dataclasses.replace(cfg, head_size=model.cfg.head_size, ffn_size=model.cfg.ffn_size)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {parameters:,} parameters on {device}, {cfg.batch_size * cfg.grad_accum} rows a step; "
          f"everything goes to {out}/")
    def show(step):
        if step % cfg.eval_every == 0 and rank == 0 and prompt:
            quick = dataclasses.replace(cfg, beams=1, n_best=1)
            tqdm.write(f"            {prompt} -> {write_text(model, tokenizer, quick, prompt)!r}")

    result = train(model, cfg, train_data, val_data, compute_loss, {"tokenizer": tokenizer.spec, "data": info}, show)
    if rank > 0:
        return model, cfg
    figures, uniform, floor = ["curve.png"], math.log(cfg.vocab_size), 0.0 if toy else None
    # 2,000 draws of all lengths, and the rare kind where models fail first: a mean over the draws hides those.
    if toy:
        results = {"exact_match": exact_match(model, tokenizer, test, cfg),
                   "exact_match_stress": exact_match(model, tokenizer, stress_numbers(), cfg)}
        text = "\n".join(f"{n} -> {write_text(model, tokenizer, cfg, str(n))}" for n in (40215, 7, 300_004, 777_777))
        pictured = ("40215", number_to_words(40215))
    elif span:
        # One row of the validation text with holes, what stood in them, and what the model writes there.
        source, target = corrupt_spans(val_data[0][:1], seeded(cfg.seed, 0))
        rows = generate(model, source.to(device), cfg.max_new_tokens, eos_ids=tokenizer.eos_ids)
        text = "\n".join(f"{what}: {tokenizer.decode(row)}" for what, row in
                         (("text", source[0].tolist()), ("holes", target[0].tolist()), ("model", rows[0].tolist())))
        results, pictured = {}, None
    else:
        # Real sentences: every test source is translated twice, and BLEU compares with what people wrote.
        sources, references = map(list, zip(*test, strict=True))
        print(f"translating {len(sources):,} test sentences, greedily and with {max(2, cfg.beams)} beams ...",
              flush=True)
        greedy = translate(model, tokenizer, sources, cfg, 1, cfg.max_new_tokens)
        beam = translate(model, tokenizer, sources, cfg, max(2, cfg.beams), cfg.max_new_tokens)
        results = {"bleu_greedy": bleu(greedy, references), "bleu_beam": bleu(beam, references)}
        for name, lines in (("test.greedy", greedy), ("test.beam", beam), ("test.reference", references)):
            write_atomically(out / f"{name}.txt", lambda file, lines=lines: file.write("\n".join(lines).encode()))
        text = "\n\n".join(f"source     {s}\nreference  {r}\nmodel      {h}" for s, r, h in
                           list(zip(sources, references, beam, strict=True))[:5])
        pictured = (sources[0], beam[0])
    write_atomically(out / "sample.txt", lambda file: file.write((text + "\n").encode()))
    plot_curve(out / "curve.png", result["history"], f"{Path(__file__).name} on {Path(cfg.data).name}",
               {f"uniform guess, ln V = {uniform:.2f}": uniform} | ({} if floor is None else {"floor 0": floor}))
    if pictured:
        plot_alignment(out / "attention.png", model, tokenizer, *pictured)
        figures.append("attention.png")
    # One file that says what was run, on what, and what came out: enough to repeat the run and compare it.
    summary = {"config": dataclasses.asdict(cfg), "params": parameters, "val_loss": result["val_loss"], "floor": floor,
               "tokens_per_second": result["tokens_per_second"], "seconds": result["seconds"],
               "peak_memory_mb": peak_memory_mb(device), "data": info, "device": str(device),
               "torch": torch.__version__, "figures": figures, "results": results}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it: one place, no second copy to go stale.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    print(f"\n{text}\n\nThe sample is in {out}/sample.txt, the pictures beside it. Ask it yourself with\n"
          f"  python {Path(__file__).name} --load {out} --prompt {prompt or '...'!r}\n"
          f"Next: read attention.png beside section 2; decoder_only.py does the same task with one stack.\n"
          f"Expected: {expected}\n"
          f"Reached:  val loss {result['val_loss']:.4f}, {', '.join(f'{k} {v:.4f}' for k, v in results.items())}, "
          f"{result['seconds']:.0f} s (a uniform guess: {uniform:.2f}"
          f"{'' if floor is None else f', a perfect model: {floor:.2f}'})")
    return model, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
