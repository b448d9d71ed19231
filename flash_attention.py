# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "tiktoken>=0.7", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
FLASH ATTENTION IN ONE FILE                      python flash_attention.py           2 min on two CPU cores

Paper    Dao et al. 2022, FlashAttention, arXiv 2205.14135; Dao 2023, FlashAttention-2, arXiv 2307.08691; the running
         softmax: Milakov & Gimelshein 2018, arXiv 1805.02867; Rabe & Staats 2021, arXiv 2112.05682
Idea     Attention needs the T x S matrix of scores only to take weighted means with it, tile by tile. Carry the largest
         score and the sum so far from tile to tile, and the matrix never exists: memory grows with T, not with T * S,
         and the answer is exact. Backward computes each tile again instead of having kept it.
Picture  q tile (n,D) stays;  for each k, v tile (c,D):  scores (n,c) -> new maximum -> shrink what was summed -> add;
         at the end divide by the sum, keep output (T,D) and log of the sum (T)
Symbols  B batch   T queries   S keys   C n_embd   H query heads   K key/value heads (beams in beam_search)   D head
         size   V vocabulary   L layers   N new tokens   M candidates   R rows   W window   G = H/K   n, c tile sizes
New here softmax three ways, tiled attention forward and backward, the same as Triton kernels for GPUs. The model that
         uses them is decoder_only.py's
Not here dropout on attention weights, ALiBi, FP8, warp specialisation (FlashAttention-3)
Expect   forward + backward of 8,192 tokens, two heads, in 36 MB (naive: 1,703), 16,384 in 70; at 2,048 tokens in 0.42
         of naive's time (PyTorch's own kernel: 0.22), faster from 1,024 on. With 2 GiB naive fails at 16,384 tokens,
         tiled passes. Training ends at a validation loss of 2.4146, with naive attention at 2.4146
         (results/flash_attention.json)
Asked    Why can the maximum change afterwards?   What does causality save?   What does backward keep?
         Why is it faster, if it computes more?   Is it an approximation?   When is it no help?   (grep "# Q:")
"""
import argparse
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Attention and model need torch alone (rung 6 Triton as well). matplotlib, requests and tiktoken are imported where
# they are used.
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Config: every knob in one place ------------------------------------------------------------------------------
# A field is a flag (--n-layer 6), its comment is the help text, and the whole record travels in the checkpoint. Do not
# learn the fields by heart: each is explained where it is used. First reading: section 2 up to CausalSelfAttention is
# what this file is about, and the functions of section 8 that measure it; the rest is decoder_only.py's.
#     python flash_attention.py                                  train a small GPT on tiled attention, then measure
#     python flash_attention.py --attention naive                the same curve, more memory
#     python flash_attention.py --lengths 1024,4096,16384        measure other lengths
#     python flash_attention.py --max-steps 0                    measure only
#     TRITON_INTERPRET=1 python flash_attention.py --attention triton --max-steps 2 --lengths=     kernels without a GPU
#     python flash_attention.py --load runs/flash_attention --prompt "ROMEO:"       let it talk
@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    data: str = "auto"                # auto | shakespeare | pydocs | numbers | path of a UTF-8 text file
    tokenizer: str = "char"           # char: one id per character of the corpus | gpt2: byte-level BPE, 50,257 ids
    out: str = "runs/flash_attention"  # folder for checkpoint, metrics, samples and pictures
    seed: int = 1337                  # decides initial weights, batches, dropout and samples
    device: str = "auto"              # auto (cuda if present, else cpu) | cpu | cuda | mps
    dtype: str = "auto"               # auto (float32; on cuda bfloat16 autocast) | float32 | bfloat16 | float64
    compile: bool = False             # torch.compile the model: a minute of waiting, then faster steps

    # Attention.
    attention: str = "tiled"          # how the model attends: naive | tiled | triton | sdpa
    lengths: str = "auto"             # tokens at which attention is measured, "512,2048"; "" measures nothing

    # Shape: decoder_only.py's, with a context of several tiles.
    block_size: int = 256             # longest context in tokens; tiles are 128 wide
    n_layer: int = 4                  # blocks
    n_head: int = 4                   # attention heads; each is n_embd / n_head wide
    n_embd: int = 128                 # width of the residual stream
    vocab_size: int = 0               # 0 takes the tokenizer's; more pads it
    dropout: float = 0.0              # share of activations zeroed in training (not inside attention)
    init_std: float = 0.088           # std of the initial weights, about 1/sqrt(n_embd)

    # Optimisation.
    max_steps: int = 500              # optimizer steps; 0 trains nothing
    batch_size: int = 4               # rows per micro-step, over all ranks
    grad_accum: int = 1               # micro-steps per optimizer step
    lr: float = 3e-3                  # peak learning rate
    min_lr_ratio: float = 0.1         # the last learning rate as a share of the peak
    warmup_steps: int = 100           # steps of linear warm-up
    weight_decay: float = 0.1         # on matrices and embeddings only
    beta2: float = 0.99               # memory of Adam's second moment: 0.99 looks back about 100 steps
    grad_clip: float = 1.0            # largest gradient norm
    eval_every: int = 250             # steps between passes over the whole validation split
    save_every: int = 500             # steps between checkpoints
    resume: bool = False              # continue the run in --out, bit for bit

    # Decoding.
    load: str = ""                    # run folder or checkpoint to start from
    prompt: str = ""                  # text to continue; together with --load nothing is trained
    max_new_tokens: int = 200         # tokens to write
    temperature: float = 0.8          # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0                    # sample among the k likeliest only; 0 = all
    top_p: float = 1.0                # sample among the likeliest that together have probability p
    repetition_penalty: float = 1.0   # above 1: make tokens that were already there less likely
    beams: int = 1                    # above 1: beam search, without temperature, top-k, top-p, repetition penalty
    length_penalty: float = 1.0       # beam score = sum of log-probs / length ** this

    def __post_init__(self):
        # A bad value caught here costs a line; caught at step 500 it costs the run.
        for names, ok, rule in (
                ("block_size n_layer n_head n_embd batch_size grad_accum eval_every save_every "
                 "max_new_tokens beams", lambda x: x >= 1, "at least 1"),
                # `0 <= x < inf` and not `x < 0 or ...`: every comparison with nan is false, so nan fails as well
                ("seed", lambda x: 0 <= x < 2 ** 31, "in [0, 2^31)"),
                ("max_steps vocab_size warmup_steps weight_decay temperature top_k",
                 lambda x: 0 <= x < math.inf, "0 or more"),
                ("lr grad_clip init_std repetition_penalty", lambda x: 0 < x < math.inf, "above 0"),
                ("length_penalty", math.isfinite, "a number"),
                ("dropout beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("min_lr_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
                ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
                ("attention", ("naive", "tiled", "triton", "sdpa").__contains__, "naive, tiled, triton or sdpa"),
                ("lengths", lambda x: re.fullmatch(r"auto|([1-9]\d*(,[1-9]\d*)*)?", x), "auto or numbers: 512,2048"),
                ("tokenizer", ("char", "gpt2").__contains__, "char or gpt2"),
                ("device", ("auto", "cpu", "cuda", "mps").__contains__, "auto, cpu, cuda or mps"),
                ("dtype", ("auto", "float32", "bfloat16", "float64").__contains__,
                 "auto, float32, bfloat16 or float64")):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} cannot be split over n_head {self.n_head} heads")


PRESETS = {
    "laptop": {},  # the defaults above
    # Lines such as "17=seventeen": short rows, many per step, and a rate that falls to 0 because answers are exact.
    "numbers": dict(data="numbers", n_layer=2, n_embd=64, init_std=0.125, block_size=17, batch_size=128, max_steps=900,
                    lr=3e-3, min_lr_ratio=0.0, beta2=0.98, weight_decay=0.01, eval_every=150, temperature=0.0),
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


# --- 2. Model: attention on seven rungs, and a GPT that uses them ----------------------------------------------------
# The ladder:
#
#     1 unsafe_softmax   2 safe_softmax, naive_attention   3 running_softmax (one row)   4 tiled_forward
#     5 tiled_backward   6 the same two in Triton, for a GPU   7 sdpa_attention, PyTorch's own
#
# What says attention computes softmax(q k^T / sqrt(D)) v, with the same options and the same numbers:
#
#     q (B, H, T, D), k and v (B, K, S, D); query head h reads key head h // (H/K) (grouped-query attention)
#     causal    query t is the (S-T+t)-th token and sees keys 0 .. S-T+t: aligned at the bottom right
#     window W  and of these the newest W only, itself among them; 0 = no window
#     keep      (B, S) bool, True = real token: padding, on either side, or whatever else nobody should see
#
# A query that may see nothing gets zeros.
#
# Rung 1: as it is written in every paper. exp(89) is infinity in float32, and infinity / infinity is NaN.
# Symptom: a model trains for a day, one logit grows past 88, and the loss is nan from there on.
def unsafe_softmax(scores):
    """exp(x) / sum(exp(x)) over the last axis. Right while scores stay within about +-85."""
    weights = scores.exp()
    return weights / weights.sum(-1, keepdim=True)


# Rung 2: every score may be shifted by the same number: exp(x - m) / sum(exp(x - m)) is the same fraction. With m = the
# largest score the largest exponential is 1, so nothing overflows, and the sum is at least 1 (if not all are -inf).
def safe_softmax(scores):
    """The same with the row's maximum taken off first. A row of -inf alone gives zeros."""
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest.masked_fill(largest == -math.inf, 0.0)).exp()  # -inf - -inf would be NaN
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


# Rung 3. The maximum is known at the end of the row only. Or is it needed? Take it as a guess that is corrected:
#
#     after keys 0..j      m = largest score so far     z = sum of exp(score - m)     acc = sum of exp(score - m) * v
#     a larger score m'    all exponentials were taken with the wrong m; they differ from the right ones by one factor,
#                          exp(m - m'), the same for all: z *= exp(m - m'), acc *= exp(m - m'), go on
#     at the end           acc / z
#
# By hand: scores 0 and ln 3, values 8 and 4. First key: m = 0, z = 1, acc = 8. The second raises m to ln 3: shrink is
# 1/3, z = 1/3 + 1 = 4/3, acc = 8/3 + 4 = 20/3, and acc / z = 5, the same as (1*8 + 3*4) / (1 + 3).
#
# Q: Why can the maximum change afterwards?
# A: Because m cancels: acc and z both carry the factor exp(-m), whatever m is. Changing it multiplies both, and the
#    quotient stays. It is there for the number range alone.
def running_softmax(scores, values, tile=1):
    """One row: scores (S), values (S, D) -> (weighted mean (D), [(m, z) after each tile]), in one pass."""
    m, z = torch.tensor(-math.inf), torch.tensor(0.0)
    acc, history = torch.zeros(values.size(1)), []
    for s, v in zip(scores.split(tile), values.split(tile), strict=True):
        new = torch.maximum(m, s.max())
        p = (s - new).exp()
        shrink = (m - new).exp()  # exp(-inf) = 0 for the first tile: there was nothing before
        m, z, acc = new, z * shrink + p.sum(), acc * shrink + p @ v
        history.append((m.item(), z.item()))
    return acc / z, history


def who_sees_whom(queries, keys, causal, window, keep, device):
    """queries = (from, to) as places in the text, keys = (from, to) -> bool (..., to-from, to-from), True = may see."""
    place = torch.arange(*queries, device=device)[:, None]
    column = torch.arange(*keys, device=device)
    seen = column <= place if causal else torch.ones(len(place), len(column), dtype=torch.bool, device=device)
    if window:
        seen = seen & (column > place - window)
    if keep is not None:
        seen = seen & keep[:, None, None, None, keys[0]:keys[1]]
    return seen


def check(q, k, v, causal, window, keep):
    """Raise ValueError for shapes and options that do not go together."""
    if q.dim() != 4 or k.shape != v.shape or q.size(0) != k.size(0) or q.size(3) != k.size(3):
        raise ValueError(f"q (B, H, T, D), k and v (B, K, S, D), not {tuple(q.shape)}, {tuple(k.shape)}, "
                         f"{tuple(v.shape)}")
    if q.size(1) % k.size(1):
        raise ValueError(f"{q.size(1)} query heads cannot be shared out over {k.size(1)} key heads")
    if window < 0 or window and not causal:
        raise ValueError("a window counts backwards from the query: it is 0 or more, and causal")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (k.size(0), k.size(2))):
        raise ValueError(f"keep is bool ({k.size(0)}, {k.size(2)}), not {keep.dtype} {tuple(keep.shape)}")


def naive_attention(q, k, v, causal=True, window=0, keep=None):
    """The whole T x S matrix at once (rung 2). What the others are tested against."""
    check(q, k, v, causal, window, keep)
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    q = q.reshape(B, K, H // K, T, D)
    scores = q @ k[:, :, None].transpose(-2, -1) / math.sqrt(D)                # (B, K, ..., T, S)
    if causal or keep is not None:
        seen = who_sees_whom((S - T, S), (0, S), causal, window, keep, q.device)
        scores = scores.masked_fill(~seen, -math.inf)                          # (B, K, ..., T, S)
    # safe_softmax in one call; the second fill turns NaN rows (nothing to see) into zeros.
    weights = scores.softmax(-1)                                               # (B, K, ..., T, S)
    # T > S: the first T - S queries stand before the first key (T = 3, S = 1: places -2, -1, 0) and see nothing.
    if causal and T > S or keep is not None:
        weights = weights.masked_fill(~seen, 0.0)                              # (B, K, ..., T, S)
    return (weights @ v[:, :, None]).reshape(B, H, T, D)                       # (B, H, T, D)


# Rung 4, tile by tile. Which tiles are there to compute? Causal, T = S, 4 tiles a side, no window / one of 2 tiles:
#
#     keys       0 1 2 3        0 1 2 3
#     queries 0  / . . .        / . . .        # all pairs are visible: no mask needed
#             1  # / . .        # / . .        / some are: mask it
#             2  # # / .        / # / .        . none is: skip it, do not even look
#             3  # # # /        . / # /
#
# Q: What does causality save?
# A: With n tiles a side n(n+1)/2 of n^2 are computed: 53 % at 16 (2,048 tokens). Masking after the
#    product saves nothing at all.
# key_tiles(128, 255, 512, True, 0, 128) -> [(0, 128, False), (128, 256, True)]: first and last are inclusive, `to` not.
def key_tiles(first, last, S, causal, window, size):
    """The tiles of keys that queries at places first..last may see -> [(from, to, does it need a mask)]."""
    start = max(0, first - window + 1) // size * size if window else 0
    stop = min(S, last + 1) if causal else S
    return [(j, min(j + size, S),
             causal and min(j + size, S) - 1 > first or bool(window) and j <= last - window)
            for j in range(start, stop, size)]


# 128 x 128 float32 scores are 64 KiB and stay in a core's cache; 1024 x 1024 are 4 MiB and leave many. Smaller tiles
# pass over k and v more often, T/128 times each, and in Python every tile costs its calls.
TILE = 128


def tile_scores(q, k, places, keys, cut, causal, window, keep):
    """Scores of one tile: q (B, K, G, n, D), already scaled, k (B, K, c, D) -> (B, K, G*n, c), -inf where hidden."""
    B, K, G, n, D = q.shape
    # The G query heads of a group stand below each other and meet their key head in one product: no copies of k.
    scores = q.reshape(B, K, G * n, D) @ k.transpose(-2, -1)                   # (B, K, ..., c)
    if cut or keep is not None:
        seen = who_sees_whom(places, keys, causal, window, keep, q.device)
        scores.view(B, K, G, n, -1).masked_fill_(~seen, -math.inf)
    return scores


def tiled_forward(q, k, v, causal=True, window=0, keep=None, tile=TILE):
    """-> (out (B, H, T, D), lse (B, K, H/K, T)): attention, and log(sum of exp(scores)) of each query (eq. in section
    3.1 of FlashAttention-2; -inf for a query that sees nothing).
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    # bfloat16 products are summed in float32, and so are the running sums: 8 bits would be used up after 256 terms.
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(B, K, H // K, T, D)
    out, lse = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:-1], dtype=wide)
    for i in range(0, T, tile):
        # One tile of queries at a time. It stays where it is (in a GPU's shared memory, here in the cache), and the
        # keys pass by. FlashAttention-1 had it the other way round, and wrote each output once per tile of keys.
        rows = grouped[:, :, :, i:i + tile].to(wide) / math.sqrt(D)            # (B, K, G, n, D)
        first, n = S - T + i, rows.size(3)
        m = rows.new_full((B, K, rows.size(2) * n, 1), -math.inf)              # (B, K, G*n, 1)
        z, acc = torch.zeros_like(m), rows.new_zeros(*m.shape[:-1], D)         # (B, K, G*n, 1), (B, K, G*n, D)
        for j, end, cut in key_tiles(first, first + n - 1, S, causal, window, tile):
            keys, values = k[:, :, j:end].to(wide), v[:, :, j:end].to(wide)    # (B, K, c, D)
            s = tile_scores(rows, keys, (first, first + n), (j, end), cut, causal, window, keep)  # (B, K, G*n, c)
            # Trap: m = the maximum of this tile alone. shrink = exp(m - new) could then be above 1, and overflow. As it
            # is shrink <= 1; if m jumps by more than 104 it is 0 in float32: what came before weighs nothing anyway.
            new = torch.maximum(m, s.amax(-1, keepdim=True))                   # (B, K, G*n, 1)
            # Trap: new = -inf while nothing was visible yet. -inf - -inf is NaN and stays NaN; 0 in its place is as
            # good as any number, since all exponentials are 0.
            base = new.masked_fill(new == -math.inf, 0.0)
            p, shrink = s.sub_(base).exp_(), (m - base).exp_()                 # (B, K, G*n, c), (B, K, G*n, 1)
            z = z * shrink + p.sum(-1, keepdim=True)                           # (B, K, G*n, 1)
            # Not divided by z here: once at the end is enough (FlashAttention-2, section 3.1).
            acc, m = (acc * shrink).add_(p @ values), new                      # (B, K, G*n, D), (B, K, G*n, 1)
        shape = rows.shape[:-1]
        out[:, :, :, i:i + tile] = (acc / z.masked_fill(z == 0, 1.0)).view(*shape, D)
        # exp(s - m) / z = exp(s - (m + log z)): maximum and sum in one. Scores 0, ln 3: lse = ln 4, p = 1/4, 3/4.
        lse[:, :, :, i:i + tile] = (m + z.log()).view(shape)
    return out.view(B, H, T, D), lse


# Q: What does backward keep?
# A: q, k, v, out (for delta, below) and one number per query, the lse. From those any tile of weights can be made
#    again, p = exp(s - lse): the final maximum and sum are known now, so there is no running anything. The naive way
#    keeps the T x S weights.
#
# Rung 5. With p = softmax(s), out = p v, and g = the gradient that arrives at out:
#
#     dv = p^T g        dp = g v^T        ds = p * (dp - delta)        dq = ds k * scale        dk = ds^T q * scale
#
# delta = rowsum(dp * p), the softmax's own term, looks as if it needed a whole row. But rowsum(dp * p) =
# g . (sum of p_j v_j) = g . out: one number per query, from what is there already (FlashAttention, appendix B.2).
# Why: raise score j by a little e. Weight j grows by e * p_j, then all shrink by that share: out moves by
# e * p_j * (v_j - out), and times g that is ds_j = p_j * (g.v_j - g.out). By hand, p = (1/4, 3/4), v = (8, 4), out = 5,
# g = 1: dp = (8, 4), delta = 5, ds = (3/4, -3/4). Every row of ds sums to 0: a shift of all scores changes nothing.
def tiled_backward(grad, q, k, v, out, lse, causal=True, window=0, keep=None, tile=TILE):
    """-> (dq, dk, dv), in the shapes of q, k, v."""
    (B, H, T, D), (K, S), wide = q.shape, k.shape[1:3], lse.dtype
    grouped, g_all, o_all = (x.reshape(B, K, H // K, T, D) for x in (q, grad, out))  # (B, K, G, T, D) each
    dq = grouped.new_empty(grouped.shape, dtype=wide)                          # (B, K, G, T, D)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))                # (B, K, S, D) each
    # A query that sees nothing has s = -inf and lse = -inf, and -inf - -inf is NaN; with 0 instead, p = exp(-inf) = 0.
    base = lse.masked_fill(lse == -math.inf, 0.0)                              # (B, K, G, T)
    for i in range(0, T, tile):
        rows = grouped[:, :, :, i:i + tile].to(wide) / math.sqrt(D)            # (B, K, G, n, D)
        first, n = S - T + i, rows.size(3)
        flat = (B, K, rows.size(2) * n, -1)
        g = g_all[:, :, :, i:i + tile].to(wide).reshape(flat)                  # (B, K, G*n, D)
        delta = (g * o_all[:, :, :, i:i + tile].to(wide).reshape(flat)).sum(-1, keepdim=True)  # (B, K, G*n, 1)
        total, d = base[:, :, :, i:i + tile].reshape(flat), torch.zeros_like(g)  # (B, K, G*n, 1), (B, K, G*n, D)
        for j, end, cut in key_tiles(first, first + n - 1, S, causal, window, tile):
            keys, values = k[:, :, j:end].to(wide), v[:, :, j:end].to(wide)    # (B, K, c, D)
            s = tile_scores(rows, keys, (first, first + n), (j, end), cut, causal, window, keep)  # (B, K, G*n, c)
            # Trap: two p. Here the finished weights, rows sum to 1; in tiled_forward exp(s - m), not yet divided by z.
            p = s.sub_(total).exp_()                                           # (B, K, G*n, c)
            # Several query tiles and all heads of a group add to one tile of keys: += and not =.
            dv[:, :, j:end] += p.transpose(-2, -1) @ g
            ds = (g @ values.transpose(-2, -1)).sub_(delta).mul_(p)            # (B, K, G*n, c)
            d += ds @ keys                                                     # (B, K, G*n, D)
            dk[:, :, j:end] += ds.transpose(-2, -1) @ rows.reshape(flat)  # rows are scaled: dk needs no scale again
        dq[:, :, :, i:i + tile] = d.view(rows.shape) / math.sqrt(D)
    return dq.view(q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# The cost of T x S: 16,384 tokens, one head, float32: 1 GiB for the scores, as much for the weights, and both again in
# the backward pass; for 32 heads 32 times that. What the tiles need: q, k, v, out and the gradients, 4 MiB each at
# D = 64, and a few tiles of 128 x 128.
class TiledAttention(torch.autograd.Function):
    """tiled_forward with tiled_backward as its derivative. Autograd alone would keep every tile: T x S again."""

    @staticmethod
    def forward(ctx, q, k, v, causal, window, keep, tile):
        out, lse = tiled_forward(q, k, v, causal, window, keep, tile)
        ctx.save_for_backward(q, k, v, out, lse, keep)
        ctx.options = causal, window
        ctx.tile = tile
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative would take lse for a constant
    def backward(ctx, grad):
        q, k, v, out, lse, keep = ctx.saved_tensors
        return *tiled_backward(grad, q, k, v, out, lse, *ctx.options, keep, ctx.tile), None, None, None, None


def tiled_attention(q, k, v, causal=True, window=0, keep=None, tile=TILE):
    """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D), in memory that grows with T and S and not with T * S.

    The options are at the top of this section. Raises ValueError for shapes that do not fit.
    """
    check(q, k, v, causal, window, keep)
    # Trap: under autocast `float32 @ float32` is rounded to bfloat16 again, in forward and not in backward: the weights
    # that backward makes again would then not be the ones that forward used.
    with torch.autocast(q.device.type, enabled=False):
        return TiledAttention.apply(q, k, v, causal, window, keep, tile)


# Rung 6: the same tiles as Triton kernels. A kernel is a program that many workers run at once, each on its own tile;
# tl.load brings a block of numbers from the GPU's memory into registers, tl.dot multiplies two blocks on the tensor
# cores, and what is in between never leaves the chip.
#
# Q: Why is it faster, if it computes more?
# A: An H200 multiplies 16-bit matrices at 990 TFLOP/s (data sheet, without sparsity) and reads memory at 4.8 TB/s: 200
#    operations in the time of one byte. Between its products the naive way writes and reads the T x S matrix for mask
#    and softmax at about one operation per byte; the tiled way never does. It pays with 7 products instead of 4 in the
#    backward pass (q k^T and g v^T in each of two kernels; FlashAttention-2 does it with 5).
# n queries do 4*n*D operations with one key's k and v, 4*D bytes in bfloat16: n operations per byte. With n = 1 memory
# sets the pace, with n = 128 nearly the arithmetic. So a tile must be large, and no larger than what fits on the chip.
#
# TRITON_INTERPRET=1 runs the kernels in numpy on any CPU: slow, for tests. Without Triton (macOS, Windows) this rung is
# missing, and everything else works.
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x * log2 e): the hardware has 2^x

    @triton.jit
    def tile_mask(place, column, S, keep, b, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEEP: tl.constexpr):
        """Which pairs of place (BM) and column (BN) may meet -> (BM, BN)."""
        # tl.constexpr: known when the kernel is compiled, so an option that is off leaves no trace in it.
        # Trap: leaving this out. Keys behind S are loaded as zeros: their score is 0, not -inf, and exp(0) = 1 counts.
        seen = column[None, :] < S
        if CAUSAL:
            seen = seen & (column[None, :] <= place[:, None])
        if WINDOW > 0:
            seen = seen & (column[None, :] > place[:, None] - WINDOW)
        if KEEP:
            kept = tl.load(keep + b * S + column, mask=column < S, other=0)
            seen = seen & (kept[None, :] != 0)
        return seen

    @triton.jit
    def forward_kernel(q, k, v, keep, out, lse, scale, T, S, H, K, size, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                       KEEP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """One worker: BM queries of one head against all keys that they may see. size: for the tuner alone."""
        # Which worker am I? (tile of queries, head of a row.) T = 300, BM = 128, B*H = 6: a grid of 3 x 6 workers.
        # q is an address; plus a block of offsets (BM, BD) it is a block of addresses, which tl.load reads at once.
        i, bh = tl.program_id(0) * BM, tl.program_id(1)
        b, h = bh // H, bh % H
        # Heads and rows of the batch lie one behind the other: (b*H + h)*T*D is where this head's queries begin.
        # int64: beyond 2^31 numbers (64 rows x 16 heads x 16,384 tokens x 128) an int32 offset turns negative.
        q_at, k_at = bh.to(tl.int64) * T * D, (b * K + h // (H // K)).to(tl.int64) * S * D
        row, dim = i + tl.arange(0, BM), tl.arange(0, BD)
        # Sizes that are no power of 2, and the last tile, are filled up with zeros: the mask of the load.
        here, real = row[:, None] * D + dim[None, :], (row[:, None] < T) & (dim[None, :] < D)
        rows = tl.load(q + q_at + here, mask=real, other=0.0)
        place = S - T + row
        m = tl.full((BM,), float("-inf"), tl.float32)
        z, acc = tl.zeros((BM,), tl.float32), tl.zeros((BM, BD), tl.float32)
        # key_tiles() once more: what lies wholly behind the window or ahead of the last query is not even loaded. Two
        # loops from one text: first tiles that everybody sees (no mask), then the others. static_range is unrolled when
        # the kernel is compiled, so CUT is known there. With a window or padding every tile is masked.
        start, stop, whole = 0, S, 0
        if WINDOW > 0:
            start = tl.maximum(0, S - T + i - WINDOW + 1) // BN * BN
        if CAUSAL:
            stop = tl.minimum(S, S - T + i + BM)
        if WINDOW == 0 and not KEEP:
            whole = S // BN * BN
            if CAUSAL:
                whole = tl.maximum(0, tl.minimum(S, S - T + i + 1)) // BN * BN
        for CUT in tl.static_range(2):
            low, high = start, whole
            if CUT == 1:
                low, high = tl.maximum(start, whole), stop
            for j in range(low, high, BN):
                column = j + tl.arange(0, BN)
                inside = (column[:, None] < S) & (dim[None, :] < D)
                keys = tl.load(k + k_at + column[:, None] * D + dim[None, :], mask=inside, other=0.0)
                # "ieee": float32 inputs are multiplied in float32, not in TF32. Scores are kept in units of log2.
                s = tl.dot(rows, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
                if CUT == 1:
                    s = tl.where(tile_mask(place, column, S, keep, b, CAUSAL, WINDOW, KEEP), s, float("-inf"))
                new = tl.maximum(m, tl.max(s, 1))
                base = tl.where(new == float("-inf"), 0.0, new)
                p, shrink = tl.exp2(s - base[:, None]), tl.exp2(m - base)
                values = tl.load(v + k_at + column[:, None] * D + dim[None, :], mask=inside, other=0.0)
                z = z * shrink + tl.sum(p, 1)
                # p in the dtype of v, so that the tensor cores take it; the sum stays float32.
                acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
                m = new
        acc = acc / tl.where(z == 0, 1.0, z)[:, None]
        tl.store(out + q_at + here, acc.to(out.dtype.element_ty), mask=real)
        # log2, like the scores; 0 for a query that saw nothing, whose weights are made 0 by the mask again.
        tl.store(lse + bh.to(tl.int64) * T + row, tl.where(z == 0, 0.0, m + tl.log2(tl.where(z == 0, 1.0, z))),
                 mask=row < T)

    # Why two kernels: dq sums over keys, dk and dv sum over queries, and a worker can keep only one kind of sum to
    # itself. Both make s and dp: 3 + 4 = 7 products. tiled_backward makes 5, naive, which kept the weights, 4.
    @triton.jit
    def query_kernel(q, k, v, keep, out, grad, lse, delta, dq, scale, T, S, H, K, size, CAUSAL: tl.constexpr,
                     WINDOW: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):
        """Backward, one worker: dq of BM queries; the keys pass by."""
        i, bh = tl.program_id(0) * BM, tl.program_id(1)
        b, h = bh // H, bh % H
        q_at, k_at = bh.to(tl.int64) * T * D, (b * K + h // (H // K)).to(tl.int64) * S * D
        row, dim = i + tl.arange(0, BM), tl.arange(0, BD)
        here, real = row[:, None] * D + dim[None, :], (row[:, None] < T) & (dim[None, :] < D)
        rows = tl.load(q + q_at + here, mask=real, other=0.0)
        g = tl.load(grad + q_at + here, mask=real, other=0.0)
        # One number each per query: the log of its sum, and its delta, which key_kernel will want as well.
        total = tl.load(lse + bh.to(tl.int64) * T + row, mask=row < T, other=0.0)
        answer = tl.load(out + q_at + here, mask=real, other=0.0)
        own = tl.sum(g.to(tl.float32) * answer.to(tl.float32), 1)
        tl.store(delta + bh.to(tl.int64) * T + row, own, mask=row < T)
        place, acc = S - T + row, tl.zeros((BM, BD), tl.float32)
        start, stop, whole = 0, S, 0
        if WINDOW > 0:
            start = tl.maximum(0, S - T + i - WINDOW + 1) // BN * BN
        if CAUSAL:
            stop = tl.minimum(S, S - T + i + BM)
        if WINDOW == 0 and not KEEP:
            whole = S // BN * BN
            if CAUSAL:
                whole = tl.maximum(0, tl.minimum(S, S - T + i + 1)) // BN * BN
        # Tiles without a mask and tiles with one, as in forward_kernel.
        for CUT in tl.static_range(2):
            low, high = start, whole
            if CUT == 1:
                low, high = tl.maximum(start, whole), stop
            for j in range(low, high, BN):
                column = j + tl.arange(0, BN)
                inside = (column[:, None] < S) & (dim[None, :] < D)
                keys = tl.load(k + k_at + column[:, None] * D + dim[None, :], mask=inside, other=0.0)
                values = tl.load(v + k_at + column[:, None] * D + dim[None, :], mask=inside, other=0.0)
                s = tl.dot(rows, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
                # The weights again, with the final maximum and sum. where(), not -inf: a row that saw nothing has no
                # lse.
                p = tl.exp2(s - total[:, None])
                if CUT == 1:
                    p = tl.where(tile_mask(place, column, S, keep, b, CAUSAL, WINDOW, KEEP), p, 0.0)
                ds = p * (tl.dot(g, tl.trans(values), input_precision="ieee") - own[:, None])
                acc += tl.dot(ds.to(keys.dtype), keys, input_precision="ieee")
        tl.store(dq + q_at + here, (acc * scale).to(dq.dtype.element_ty), mask=real)

    @triton.jit
    def key_kernel(q, k, v, keep, grad, lse, delta, dk, dv, scale, T, S, H, K, size, CAUSAL: tl.constexpr,
                   WINDOW: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr):
        """Backward, one worker: dk and dv of BN keys; the queries of all heads of the group pass by.

        No two workers write to the same place, so nothing has to be added atomically, and results are reproducible.
        """
        j, bk = tl.program_id(0) * BN, tl.program_id(1)
        b, group = bk // K, H // K
        k_at = bk.to(tl.int64) * S * D
        column, dim = j + tl.arange(0, BN), tl.arange(0, BD)
        here, real = column[:, None] * D + dim[None, :], (column[:, None] < S) & (dim[None, :] < D)
        keys, values = tl.load(k + k_at + here, mask=real, other=0.0), tl.load(v + k_at + here, mask=real, other=0.0)
        key_sum, value_sum = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
        # The other way round as in the forward pass: keys stay, queries pass by.
        # The queries that may see these keys: from the one at the first key's own place, to W places behind the last.
        start, stop = 0, T
        if CAUSAL:
            start = tl.maximum(0, j - (S - T)) // BM * BM
        if WINDOW > 0:
            stop = tl.minimum(T, j + BN - 1 + WINDOW - (S - T))
        for member in range(group):
            bh = (b * H + (bk % K) * group + member).to(tl.int64)
            for i in range(start, stop, BM):
                row = i + tl.arange(0, BM)
                at, there = row[:, None] * D + dim[None, :], (row[:, None] < T) & (dim[None, :] < D)
                rows = tl.load(q + bh * T * D + at, mask=there, other=0.0)
                g = tl.load(grad + bh * T * D + at, mask=there, other=0.0)
                total = tl.load(lse + bh * T + row, mask=row < T, other=0.0)
                own = tl.load(delta + bh * T + row, mask=row < T, other=0.0)
                # Transposed, (BN, BM): p^T and ds^T are then where the products that need them want them.
                s = tl.dot(keys, tl.trans(rows), input_precision="ieee") * (scale * LOG2E)
                seen = tile_mask(S - T + row, column, S, keep, b, CAUSAL, WINDOW, KEEP) & (row[:, None] < T)
                p = tl.where(tl.trans(seen), tl.exp2(s - total[None, :]), 0.0)
                # Pairs that do not exist have p = 0 and ds = 0, so rows and g need no mask of their own.
                value_sum += tl.dot(p.to(g.dtype), g, input_precision="ieee")
                ds = p * (tl.dot(values, tl.trans(g), input_precision="ieee") - own[None, :])
                key_sum += tl.dot(ds.to(rows.dtype), rows, input_precision="ieee")
        tl.store(dk + k_at + here, (key_sum * scale).to(dk.dtype.element_ty), mask=real)
        tl.store(dv + k_at + here, value_sum.to(dv.dtype.element_ty), mask=real)


@functools.cache
def kernels():
    """The three kernels; on a GPU with the best of several tile sizes, tried out once per head size, dtype, options and
    class of length."""
    found = (forward_kernel, query_kernel, key_kernel)
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return [lambda grid, *a, kernel=kernel, **k: kernel[grid(dict(BM=32, BN=32))](*a, BM=32, BN=32, **k)
                for kernel in found]

    # float32 has no tensor cores here ("ieee"): a search would compile for minutes, so it gets the small tile alone.
    def worth_trying(configs, arguments, **options):
        return configs[-1:] if arguments["q"].dtype == torch.float32 else configs

    # Larger tiles read k and v less often and need more registers; warps: groups of 32 threads that share a tile;
    # stages: how many tiles ahead memory is asked for. Which is best depends on D, T and the GPU: measure.
    tuned = []
    for kernel, sizes in ((forward_kernel, ((128, 128, 8), (128, 64, 4), (128, 64, 8), (64, 64, 4), (128, 32, 4))),
                          (query_kernel, ((128, 64, 8), (64, 64, 4), (128, 32, 4), (64, 32, 4))),
                          (key_kernel, ((64, 128, 8), (64, 64, 4), (32, 128, 4), (32, 64, 4)))):
        configs = [triton.Config(dict(BM=m, BN=n), num_warps=warps, num_stages=stages)
                   for m, n, warps in sizes for stages in (2, 3, 4)]
        configs.append(triton.Config(dict(BM=32, BN=32), num_warps=4, num_stages=1))  # fits where the others do not
        tuner = triton.autotune(configs, key=["D", "CAUSAL", "WINDOW", "KEEP", "size"],
                                prune_configs_by=dict(early_config_prune=worth_trying))(kernel)
        tuned.append(lambda grid, *a, tuner=tuner, **k: tuner[grid](*a, **k))
    return tuned


class TritonAttention(torch.autograd.Function):
    """The kernels as a function with a derivative."""

    @staticmethod
    def forward(ctx, q, k, v, causal, window, keep):
        q, k, v = (x.contiguous() for x in (q, k, v))
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
        # A kernel takes pointers: bool as bytes, and where there is no mask any pointer, which is not read.
        kept = keep.contiguous().view(torch.int8) if keep is not None else q
        # The grid: one worker per tile of queries and head of a row. tl.dot wants at least 16 in each direction.
        ctx.shape = (T, S, H, K, min(8192, max(16, triton.next_power_of_2(T))))
        ctx.options = dict(CAUSAL=causal, WINDOW=window, KEEP=keep is not None, D=D,
                           BD=max(16, triton.next_power_of_2(D)))
        kernels()[0](lambda how: (triton.cdiv(T, how["BM"]), B * H), q, k, v, kept, out, lse, D ** -0.5, *ctx.shape,
                     **ctx.options)
        ctx.save_for_backward(q, k, v, kept, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, kept, out, lse = ctx.saved_tensors
        (B, H, T, D), (K, S), grad = q.shape, k.shape[1:3], grad.contiguous()
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        kernels()[1](lambda how: (triton.cdiv(T, how["BM"]), B * H), q, k, v, kept, out, grad, lse, delta, dq,
                     D ** -0.5, *ctx.shape, **ctx.options)
        kernels()[2](lambda how: (triton.cdiv(S, how["BN"]), B * K), q, k, v, kept, grad, lse, delta, dk, dv, D ** -0.5,
                     *ctx.shape, **ctx.options)
        return dq, dk, dv, None, None, None


def triton_attention(q, k, v, causal=True, window=0, keep=None):
    """As tiled_attention, on a GPU (or, with TRITON_INTERPRET=1, anywhere). Raises RuntimeError where it cannot run."""
    check(q, k, v, causal, window, keep)
    if triton is None or not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the Triton kernels need a CUDA GPU (TRITON_INTERPRET=1 runs them on a CPU, slowly)")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"the kernels take float32, bfloat16 or float16, all alike, not {q.dtype}, {k.dtype}")
    return TritonAttention.apply(q, k, v, causal, window, keep)


# Rung 7, for use. PyTorch's scaled_dot_product_attention has FlashAttention-2 inside (and on a CPU a kernel of the same
# kind); torch.nn.attention.flex_attention compiles a Triton kernel from a Python function that changes a score, for
# windows, documents, biases. FlashAttention-3, for H100 and H200, is a package of its own.
#
# Q: Is it an approximation?
# A: No. The sums are taken in another order, so the last digits differ, as they do between two GPUs. (In bfloat16 the
#    weights are rounded before they meet v, in the written-out form as well.)
# Q: When is it no help?
# A: When one token is written: T = 1, there is no T x S matrix, and reading the cache is all the work (kv_cache.py).
#    And for short texts: 256 tokens are two tiles a side, of which three in four are computed.
def sdpa_attention(q, k, v, causal=True, window=0, keep=None):
    """PyTorch's own. Options that its kernels do not know become a mask: T x S bytes, and as many numbers inside."""
    check(q, k, v, causal, window, keep)
    T, S = q.size(2), k.size(2)
    # Trap: is_causal with T < S. PyTorch aligns at the top left: one new query with 5 keys would see key 0 only.
    plain = keep is None and not window and (not causal or T == S)
    mask = None if plain else who_sees_whom((S - T, S), (0, S), causal, window, keep, q.device)  # (..., T, S)
    if keep is not None:
        mask = mask[:, :, 0]                                                   # (B, 1, T, S)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain and causal,
                                         enable_gqa=q.size(1) != k.size(1))    # (B, H, T, D)
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # (B, H, T, D)


ATTENTION = {"naive": naive_attention, "tiled": tiled_attention, "triton": triton_attention, "sdpa": sdpa_attention}


# differs from decoder_only.py: which implementation attends is a setting, and padding arrives as keep (B, S)
class CausalSelfAttention(nn.Module):
    """Each token asks (q) all tokens up to itself (k) and takes a weighted mean of what they carry (v)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)  # q, k and v in one product: one large matmul beats three
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)      # mixes the heads, which know nothing of each other so far

    def forward(self, x, keep=None, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C). keep (B, S) bool, True = real token, or None: all are."""
        B, T, C = x.shape
        H, D = self.cfg.n_head, C // self.cfg.n_head
        # Trap: view(B, H, T, D) has the right shape and the wrong numbers: it cuts along time, not along heads.
        q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in self.c_attn(x).split(C, 2))  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update(layer, k, v)                                   # (B, H, S, D) each
        # Bottom-right causal alignment makes one call right for training (T = S), for a prompt in pieces (T < S) and
        # for one new token (T = 1, sees everything).
        y = ATTENTION[self.cfg.attention](q, k, v, causal=True, keep=keep)     # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)                                 # (B, T, C)
        return F.dropout(self.c_proj(y), self.cfg.dropout, self.training)      # (B, T, C)


class FastGELU(torch.autograd.Function):
    """x (any shape, float32) -> GELU(x) in GPT-2's tanh form; the derivative by hand.

    GELU(x) = x * P(N(0,1) < x), a ReLU without the corner (Hendrycks & Gimpel 2016, arXiv 1606.08415), which they
    approximate by 0.5 * x * (1 + tanh(z)) with z = sqrt(2/pi) * (x + 0.044715 * x^3).
    """

    # Since 0.5 * (1 + tanh(z)) = sigmoid(2*z): y = x*s with s = sigmoid(x * (A + A*K * x^2)), A = 2*sqrt(2/pi) and
    # K = 0.044715. Product rule, and sigmoid' = s*(1-s): dy/dx = s + x * s*(1-s) * (A + 3*A*K * x^2).
    A, K = math.sqrt(8 / math.pi), 0.044715

    @staticmethod
    def forward(ctx, x):
        A, AK = x.new_tensor(FastGELU.A), FastGELU.A * FastGELU.K
        s = torch.addcmul(A, x, x, value=AK).mul_(x).sigmoid_()  # addcmul(a, b, c, value=k) = a + k*b*c, in one pass
        # Everything that backward needs is known now. Keeping the derivative costs one tensor, as keeping x would.
        slope = torch.addcmul(A, x, x, value=3 * AK).mul_(x)
        slope.addcmul_(slope, s, value=-1)
        ctx.save_for_backward(torch.addcmul(s, slope, s))
        return x * s

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]  # chain rule: what arrives times what was kept


class MLP(nn.Module):
    """Two thirds of a block's weights, applied to each token alone: attention moves information, this works on it.

    mlp(x) = c_proj(GELU(c_fc(x))): 4*C detectors, each of which adds its own direction to the stream when it fires.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)    # 4 x: the 2017 paper's choice (512 -> 2048)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        # Trap: GPT-2 was trained with the tanh approximation; PyTorch's default is the exact erf form. They differ by
        # up to 5e-4 per activation: enough that loaded weights no longer agree with the published model in digit 3.
        x = self.c_fc(x)                                                       # (B, T, 4*C)
        # On a CPU PyTorch's tanh kernel takes about 6 % of a training step, the form above a little over half of that.
        by_hand = (x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled()
                   and not torch.compiler.is_compiling())
        x = FastGELU.apply(x) if by_hand else F.gelu(x, approximate="tanh")    # (B, T, 4*C)
        return F.dropout(self.c_proj(x), self.cfg.dropout, self.training)          # (B, T, C)


class Block(nn.Module):
    """Read from the residual stream, add to it: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    # Q: Why is the norm inside the branch (pre-norm) and not behind the sum, as in the 2017 paper and BERT?
    # A: x passes through plain additions from the head down to the embedding, so its gradient arrives whole at any
    #    depth. Post-norm rescales it after each of the 2L branches and needs a long warm-up
    #    (Xiong et al. 2020, arXiv 2002.04745).
    def __init__(self, cfg):
        super().__init__()
        # Why a norm at all: every block adds to the stream, so it grows with depth. Each branch reads it at mean 0 and
        # variance 1, and layer 12 gets inputs of the same size as layer 1.
        # LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + 1e-5) * weight + bias, over the C numbers of one token
        # (Ba et al. 2016, arXiv 1607.06450). var divides by C, not C-1, and 1e-5 stands inside the root.
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = CausalSelfAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)

    def forward(self, x, mask=None, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), mask, cache, layer)                    # (B, T, C)
        return x + self.mlp(self.ln_2(x))                                      # (B, T, C)


# differs from decoder_only.py: attention makes its own masks, tile by tile; here only padding is worked out
class GPT(nn.Module):
    """GPT-2. model(ids, mask=None, cache=None) -> logits (B, T, V). Module names are those of the published weights.

    Parameters: V*C + block_size*C + L * (12*C*C + 13*C) + 2*C. At GPT-2's size: 38.60 + 0.79 + 85.05 = 124.44 million.
    Per block: attention 4*C*C + 4*C, MLP 8*C*C + 5*C, two norms 4*C.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(cfg.vocab_size, cfg.n_embd),    # what the token is
            wpe=nn.Embedding(cfg.block_size, cfg.n_embd),    # where it stands: attention alone is blind to order
            h=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
            ln_f=nn.LayerNorm(cfg.n_embd)))
        # "The head": C numbers -> V logits. Not to be confused with the H attention heads.
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # Q: Why is the head tied to the token embedding?
        # A: Both say what a token means, one on the way in, one on the way out. Tying saves V*C numbers, 38.6 of 163
        #    million at GPT-2's size, and a rare token's row learns from every prediction instead of its own few uses
        #    (Press & Wolf 2017, arXiv 1608.05859).
        self.lm_head.weight = self.transformer.wte.weight
        # Initial weights: small and random. All zero would make every unit of a layer equal, and equal they would stay,
        # since they would get equal gradients; large ones saturate softmax and start far above ln V.
        # The loop meets the tied tensor twice, as wte and as lm_head. Both draws have the same std, so the second does
        # no harm. Trap: two different stds there; the later one wins, and nobody sees it.
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # Each block adds two branches to the stream: 2L sums, whose variance would grow 2L times. Shrinking
                # the last matrix of each branch by sqrt(2L) keeps it (GPT-2 paper, section 2.3).
                shrink = math.sqrt(2 * cfg.n_layer) if name.endswith("c_proj") else 1.0
                nn.init.normal_(module.weight, std=cfg.init_std / shrink)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, ids, mask=None, cache=None):
        """The stream behind the last norm, (B, T, C). Raises ValueError when the context is longer than block_size.

        mask (B, T) bool: which ids are real tokens; pads (filler that makes rows equally long) stand on either side.
        cache holds the P tokens before and takes in these T, so that a prompt may come in pieces (chunked prefill).
        """
        # P past + T new = S tokens in sight. Training: P = 0, S = T. Writing one token: T = 1, S = P + 1.
        T = ids.size(1)
        P = cache.length if cache is not None else 0
        S = P + T
        if S > self.cfg.block_size:
            raise ValueError(f"{S} tokens, but this model has only {self.cfg.block_size} positions (block_size)")
        # keep (B, S): which of the tokens in sight are real. The cache remembers it for the past.
        keep = mask
        if cache is not None:
            if mask is not None:
                cache.mask[:, P:S], cache.padded = mask, True
            keep = cache.mask[:, :S] if cache.padded else None
        positions = torch.arange(P, S, device=ids.device)                      # (T)
        if keep is not None:
            # A row's first real token has position 0 wherever it stands: count the real ones. Without this a prompt
            # gives another answer when a longer neighbour pads it. What pads get does not matter: nobody looks at them.
            #     keep 0 0 1 1 1  -- cumsum -->  0 0 1 2 3  -- -1, clamp -->  positions 0 0 0 1 2
            positions = (keep.cumsum(1) - 1).clamp(min=0)[:, P:]               # (B, T)
        x = self.transformer.wte(ids) + self.transformer.wpe(positions)        # (B, T, C)
        x = F.dropout(x, self.cfg.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, keep, cache, layer)                                   # (B, T, C)
        if cache is not None:
            cache.length = S
        # Pre-norm leaves the sum of all branches unnormalised; without ln_f its size, which grows with depth, would
        # act as a temperature on the logits.
        return self.transformer.ln_f(x)                                        # (B, T, C)

    def forward(self, ids, mask=None, cache=None):
        """ids (B, T) int64, mask (B, T) bool True = real token or None -> logits (B, T, V): row t scores token t+1."""
        return self.lm_head(self.hidden(ids, mask, cache))                     # (B, T, V)


def build_model(cfg):
    """A fresh model; its weights are a function of cfg alone, seed included."""
    torch.manual_seed(cfg.seed)
    return GPT(cfg)


# --- 3. Objective: the next token, T times per row -------------------------------------------------------------------
#     inputs    F  i  r  s  t     row t of the logits has seen inputs 0..t and is scored on targets[t].
#     targets   i  r  s  t  _     One shift, made once, in section 4. Trap: shifting in the data AND in the loss trains
#                                 the token after the next; the loss falls all the same, and the text is gibberish.
# The mean of this loss over a text is its cross-entropy. Other names for the same number, here for a loss of 1.7:
#     perplexity     exp(1.7) = 5.5      the model is as unsure as if it chose among 5.5 equally likely characters
#     bits per byte  1.7 / ln 2 = 2.45   an arithmetic coder that asks this model needs 2.45 bits per character, not 8

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def compute_loss(model, batch, cfg):
    """batch = (inputs (B, T), targets (B, T) = the same rows one token later) -> (sum of losses in nats, how many, {}).

    loss of a token = -ln p(target): 0 when the model was certain, ln V when it had no idea. A sum; train() divides.
    """
    inputs, targets = batch
    logits = model(inputs)                                                     # (B, T, V)
    # Q: Why is the first loss about ln V?
    # A: An untrained model gives each of V tokens about 1/V, and -ln(1/V) = ln V: 4.17 for 65 characters. Logits of
    #    variance s^2 add s^2/2 to it. Here s^2 = C * init_std^2 = 1 (the head is tied, its input has norm sqrt(C)), so
    #    the first loss is about 4.67; with GPT-2's 0.02 at width 768 s^2 is 0.3. A first loss far above that says: the
    #    logits start too large.
    # cross_entropy = -ln softmax(logits)[target] = ln(sum of exp(logits)) - logits[target]; ln makes the unit the nat.
    # Under bfloat16 autocast PyTorch runs this one function in float32: a sum of 50,257 exponentials needs the digits.
    loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss_sum, (targets != IGNORE).sum(), {}


# --- 4. Data: text or toy language -> rows of ids --------------------------------------------------------------------
# Every data set ends up as one thing: a tuple of tensors (inputs, targets) whose first axis is the row. A batch is then
# one gather, whatever the rows hold, and nothing below this section knows where they came from.
#
#     text  "First Citizen:\n..."   --tokenizer-->   ids [18, 47, 56, 57, 58, 1, ...]   --windows-->   rows (R, T)

# A file that is fetched is named with its SHA-256. A download that broke off, a proxy's error page or a silently edited
# copy would train just as well, and the number at the end would mean something else.
SHAKESPEARE = ("tinyshakespeare.txt",
               "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


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


# Tokenizers have one interface: encode, decode, n_vocab, eos_ids, and spec, the plain dict that rebuilds it. The spec
# travels in the checkpoint, since weights without their tokenizer are numbers about unknown symbols.
#
# Q: Characters or byte-level BPE?
# A: Characters: 65 ids, a tiny head, nothing to learn about words in advance; a context of 64 tokens is two lines of
#    verse. BPE: 50,257 ids, each worth 3.3 characters of Shakespeare, so the same context reaches further and a step
#    covers more text; but at width 128 its embedding alone has 6.4 million parameters, 8 times the rest of GPT-2 here.
class CharTokenizer:
    """One id per character of the corpus. No rules and no surprises; the price is length: 1 token per character."""

    eos_ids = ()  # running text never ends

    def __init__(self, chars):
        self.spec, self.n_vocab = {"kind": "char", "chars": chars}, len(chars)
        self.chars, self.ids = chars, {c: i for i, c in enumerate(chars)}

    def encode(self, text):
        unknown = sorted(set(text) - set(self.chars))
        if unknown:
            raise ValueError(f"the corpus has no {' '.join(map(repr, unknown[:5]))}: this model cannot read that")
        return [self.ids[c] for c in text]

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids if i < self.n_vocab)  # a padded vocabulary has ids without character


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


class BPETokenizer:
    """Byte-level BPE through tiktoken: frequent neighbours were merged again and again, so " the" is one id."""

    def __init__(self, encoding):
        self.encoding, self.n_vocab = encoding, encoding.n_vocab
        self.spec, self.eos_ids = {"kind": encoding.name}, (encoding.eot_token,)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)  # "<|endoftext|>" typed by a user is text here, not a command

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i < self.n_vocab])


def make_tokenizer(spec):
    """The tokenizer that a spec describes: {"kind": "char", "chars": ...}, {"kind": "numbers"} or {"kind": "gpt2"}."""
    if spec["kind"] == "char":
        return CharTokenizer(spec["chars"])
    if spec["kind"] == "numbers":
        return ToyTokenizer()
    import tiktoken
    try:
        return BPETokenizer(tiktoken.get_encoding(spec["kind"]))
    except (OSError, ValueError) as problem:
        sys.exit(f"error: the {spec['kind']} vocabulary is neither in $TIKTOKEN_CACHE_DIR nor to be fetched: {problem}")


def text_rows(ids, block_size, stride):
    """ids (n,) -> (inputs, targets), each (rows, T): windows of one text that start every `stride` tokens.

    ids 0 1 2 3 4 5 6 with T = 3, stride 1:  inputs 012 123 234 345   targets 123 234 345 456
                               stride 3:     inputs 012 345           targets 123 456
    stride 1 to train: any start is a row. stride T to validate: windows that touch but do not overlap, so that every
    token behind the first is predicted exactly once (but for a tail shorter than T).
    """
    # unfold makes a view: a million windows that overlap share one text in memory instead of holding 64 copies of it.
    return ids[:-1].unfold(0, block_size, stride), ids[1:].unfold(0, block_size, stride)


def number_rows(numbers, tokenizer):
    """Lines "40215=forty thousand two hundred fifteen\\n" -> (inputs, targets), each (rows, 16), padded on the right.

    Only the words and the newline are targets. The digits are drawn at random, so no model can guess them, and a loss
    that contains them stops at their entropy: 0.8 nats a token in these rows, whose first digit is never a target
    (0.98 in running text, see toy_dataset.py). Without them the floor is 0.
    """
    # 17 = the longest line: 6 digits, "=", 9 words (777777), newline.
    # One row, "42=forty two\n", shortened to 8 columns:
    #     inputs     4   2   =      forty  two  \n  pad pad
    #     targets    -   -   forty  two    \n   -   -   -        - is IGNORE
    lines = [tokenizer.encode(f"{n}={number_to_words(n)}\n") for n in numbers]
    ids = torch.tensor([line + [0] * (17 - len(line)) for line in lines])      # (R, 17)
    targets = ids[:, 1:].clone()                                               # (R, 16)
    # The newline stands right behind the row's own last word: it is how the model learns to stop.
    # Trap: putting it behind the padding instead; it is then predicted from a pad, and generation never ends.
    # cumsum counts the "=" so far: 4 2 = forty two \n -> 0 0 1 1 1 1. From the "=" on, the next token counts.
    after_equals = (ids == TOY_VOCAB.index("=")).cumsum(1)[:, :-1].bool()      # (R, 16)
    targets[~after_equals | (targets == 0)] = IGNORE
    # No padding mask is needed: pads stand on the right, and a causal model never looks right.
    return ids[:, :-1], targets


def make_data(cfg, tokenizer=None):
    """-> (train rows, validation rows, tokenizer, info). tokenizer: keep this one (fine-tuning); None: make cfg's.

    info: name and sha256 for the checkpoint and, for text, bytes per token of the validation split.
    """
    if cfg.data == "numbers":
        tokenizer = tokenizer or ToyTokenizer()
        # 60,000 draws hold about 25,500 different numbers, 3 % of the 900,000: by heart is not enough for the others.
        train, val = draw_numbers(60_000, cfg.seed, False), sorted(set(draw_numbers(2_500, cfg.seed, True)))
        if cfg.block_size < 16 or tokenizer.spec != ToyTokenizer.spec:
            sys.exit("error: --data numbers needs --block-size 16 or more, and with --load a model of the toy language")
        print(f"data: the toy language, {len(train):,} lines to train, {len(val):,} other numbers to validate")
        info = {"name": "numbers", "sha256": hashlib.sha256(str((train, val)).encode()).hexdigest()}
        return number_rows(train, tokenizer), number_rows(val, tokenizer), tokenizer, info
    text, name, about = load_text(cfg.data)
    # The last tenth is held out in one piece. Random windows would not do: neighbours share all but one token.
    cut = int(0.9 * len(text))
    if tokenizer is None:
        # The character set includes the held-out tenth's: a tokenizer may know a letter, the model has to learn it.
        tokenizer = make_tokenizer({"kind": cfg.tokenizer, "chars": "".join(sorted(set(text)))})
    try:
        train, val = (torch.tensor(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
    except ValueError as problem:
        sys.exit(f"error: --data {cfg.data}: {problem}")
    if min(len(train), len(val)) <= cfg.block_size:  # zero rows would be a mean over nothing: nan, much later
        sys.exit(f"error: --data {cfg.data}: too short; the held-out tenth has {len(val)} tokens and one row needs "
                 f"{cfg.block_size + 1} (a smaller --block-size helps)")
    print(f"data: {about}, {len(text):,} characters -> {len(train):,} + {len(val):,} tokens of "
          f"{tokenizer.n_vocab:,} kinds")
    info = {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "bytes_per_token": len(text[cut:].encode()) / len(val)}
    return text_rows(train, cfg.block_size, 1), text_rows(val, cfg.block_size, cfg.block_size), tokenizer, info


def seeded(seed, step):
    """A random generator that is a function of (seed, step) alone."""
    # Trap: seed + step. Seed 1 at step 5 is then seed 2 at step 4. The factor keeps seeds a million steps apart.
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def get_batch(data, rows, seed, step):
    """-> the global batch of one step, a tuple of (rows, ...) tensors: a pure function of (seed, step).

    There is no iterator whose position would have to be saved: step 1,234 draws the same rows in a fresh run, after a
    resume, and on each of eight GPUs.
    """
    # Q: Random windows, or epochs without repetition?
    # A: Random starts that amount to 1.5 passes leave about e^-1.5 = 22 % of the text unread and read other parts three
    #    times. Epochs avoid that and need a permutation and a position in it to be saved; random starts need neither.
    index = torch.randint(len(data[0]), (rows,), generator=seeded(seed, step))
    return tuple(part[index] for part in data)  # one gather per tensor, no Python loop over rows


def prepare(batch, generator):
    """What an objective does to a batch before it is dealt out to ranks. A decoder's rows are finished: nothing to do.

    An encoder hides tokens here, with the generator that it is handed, so that all ranks see the same noise.
    """
    return batch


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


#     lr |     ______
#        |    /      `-.            warm-up: the first steps are guesses, keep them small
#        |   /          `.          plateau of the cosine: get far
#        |  /             `-._      descent: average the noise away
#        +--------------------- step
def lr_at(step, cfg):
    """Learning rate of the update number `step` (from 0): linear warm-up, then half a cosine down to min_lr_ratio."""
    # Adam's first update is m_hat / sqrt(v_hat) = g / |g| = +-1: every weight moves by the full lr, whatever its
    # gradient. At lr 3e-3 that is 3 % of weights of std 0.1, in a direction that one batch chose. With 100 steps of
    # warm-up the first one is 3e-5.
    # step + 1: update 0 already moves. Trap: step / warmup_steps makes the first update a no-op.
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    # Late in training the noise of single batches dominates, and a small rate averages over it. The last update runs at
    # lr * min_lr_ratio, provided that max_steps > warmup_steps + 1.
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


# --- 6. Decoding: from distributions to text -------------------------------------------------------------------------
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


# While writing, the tokens of the past never change, and neither do their keys and values:
#
#     prefill      q k v of all T prompt tokens in one pass          k v --> columns 0 .. T-1 of the cache
#     one token    q k v of 1 token; q meets P+1 keys                k v --> column P
#
# The queries of the past are not kept: nobody will ask their questions again.
class KVCache:
    """Keys and values of the tokens seen so far, for all layers, in buffers that are allocated once.

    keys, values (L, B, H, max_len, D); mask (B, max_len) bool, True = real token; length = P, the columns in use.
    """

    # Q: What does the KV cache save, and what does it cost?
    # A: Without it, token n+1 recomputes all n tokens before it: n^2 work for n tokens. The past's keys and values
    #    never change (nothing looks ahead), so they can be kept: 2 * L * C numbers a token, 18,432 for GPT-2 124M, that
    #    is 36 KiB in bf16: 36 MiB for a full context of 1,024 tokens, per row of the batch. The scores stay n^2/2.
    def __init__(self, cfg, rows, max_len, like):
        shape = (cfg.n_layer, rows, cfg.n_head, max_len, cfg.n_embd // cfg.n_head)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.mask = torch.ones(rows, max_len, dtype=torch.bool, device=like.device)
        self.length, self.padded = 0, False

    def update(self, layer, k, v):
        """Write k, v (B, H, T, D) behind the past of one layer. -> all keys and values so far, (B, H, S, D) each."""
        # Into place, not torch.cat: appending by copying moves the whole past for every new token.
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]    # (B, H, S, D)


# generate() and beam_search() know no architecture. They ask for three things, which every model defines for itself:
# prefill (read the prompt), decode_step (append one token), reorder (choose rows); `state` is whatever those need.
def prefill(model, ids, mask, max_len):
    """Read the prompts in one pass. ids (B, T), mask (B, T) bool or None -> (logits (B, V) behind each end, state).

    A prompt longer than the context keeps its last block_size tokens. state = (cache, the ids in it).
    """
    if ids.size(1) == 0:
        raise ValueError("an empty prompt: there is nothing that the next token could follow")
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is not None:
        # Move all pads to the left: then every row ends in its last real token, and new tokens join on there.
        #     mask 1 1 1 0 0  -- argsort -->  3 4 0 1 2: False sorts before True, and stable keeps the words in order
        # Trap: reading the last column of right-padded rows; it says what follows a pad.
        order = mask.int().argsort(dim=1, stable=True)                         # (B, T)
        ids, mask = ids.gather(1, order), mask.gather(1, order)[:, -model.cfg.block_size:]
    ids = ids[:, -model.cfg.block_size:]
    cache = KVCache(model.cfg, len(ids), min(max_len, model.cfg.block_size), like=model.lm_head.weight)
    x = model.hidden(ids, mask, cache)[:, -1]                                  # (B, C)
    return model.lm_head(x), (cache, ids)  # V logits for B positions and not for B*T: the head is 30 % of GPT-2's work


def decode_step(model, token, state):
    """Append one token (B,) per row. -> (logits (B, V), state)."""
    cache, ids = state
    ids = torch.cat((ids, token[:, None]), 1)                                  # (B, S)
    if cache.length < model.cfg.block_size:
        return model(token[:, None], cache=cache)[:, -1], (cache, ids)
    # All positions are used, and wpe has no row for the next one. Keep the newer half of the context and read it again
    # from position 0. That is one prefill per block_size / 2 tokens; dropping just the oldest token would be one per
    # token, since learned positions are baked into every cached key.
    # (With rotary positions cached keys stay valid: the oldest can be dropped without reading again.)
    # half + 1: the newer half and the token that has just been written, which the cache has not seen yet.
    half = model.cfg.block_size // 2
    mask = torch.cat((cache.mask, torch.ones_like(cache.mask[:, :1])), 1)[:, -half - 1:] if cache.padded else None
    return prefill(model, ids[:, -half - 1:], mask, model.cfg.block_size)


def reorder(state, rows):
    """-> the state whose row i is the old row rows[i]. Beam search copies good rows over bad ones with it."""
    cache, ids = state
    new = copy.copy(cache)
    new.keys, new.values = cache.keys.index_select(1, rows), cache.values.index_select(1, rows)
    new.mask = cache.mask[rows]
    return new, ids[rows]


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


# --- 8. Main: train, measure, tell -----------------------------------------------------------------------------------
# Q: What fills the memory in training?
# A: 16 bytes per parameter with plain AdamW (weight, gradient, two moments; 2 GB for GPT-2 124M), and activations
#    that grow with batch x length (14.7 GB for 12 x 1,024 tokens, half of it logits). Halve batch_size and double
#    grad_accum: the same step, half of the second part.
def memory_gb(cfg, parameters):
    """{what: GB} that one process needs to train in float32, before any of it is allocated."""
    tokens = cfg.batch_size // ranks()[1] * cfg.block_size
    # Kept for the backward pass, per token and layer: 16*C numbers (inputs and outputs of the two norms 4, qkv 3,
    # attention 1, both sides of the GELU 8), and three rows of V around the loss: logits, log-probs, their gradient.
    kept = 16 * cfg.n_layer * cfg.n_embd + 3 * cfg.vocab_size
    return {"weights": 4e-9 * parameters, "gradients": 4e-9 * parameters, "optimizer": 8e-9 * parameters,
            "activations": 4e-9 * tokens * kept}


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


# Q: Why exact match and not the share of right tokens?
# A: Errors multiply: 99 % of tokens right is 0.99^10 = 90 % of names of ten tokens. On about 730 different numbers at
#    99 % the standard error is 0.4 points, so 99.0 and 99.3 are the same result.
def exact_match(model, tokenizer, numbers):
    """Share of numbers whose whole name comes out right, greedily. No credit for nearly: "sixty" for "sixteen" is 0."""
    device, right = next(model.parameters()).device, 0
    for start in range(0, len(numbers), 500):
        part = numbers[start:start + 500]
        # Prompts of 2 to 7 tokens in one batch: padded on the left, so that all of them end in the same column.
        prompts = [tokenizer.encode(f"{n}=") for n in part]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (R, T)
        # 10 = nine words and the newline, the longest name. Trap: 9; the longest ones then never count as right.
        out = generate(model, ids, 10, mask=ids != 0, eos_ids=tokenizer.eos_ids)  # (R, N)
        right += sum(tokenizer.decode(row) == number_to_words(n) + "\n"
                     for row, n in zip(out.tolist(), part, strict=True))
    return right / len(numbers)


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


def write_text(model, tokenizer, cfg, prompt, max_new_tokens, on_token=None):
    """Continue `prompt` as cfg says (beams, or temperature / top-k / top-p). -> the new text."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=next(model.parameters()).device)  # (1, T)
    if cfg.beams > 1:
        out = beam_search(model, ids, max_new_tokens, num_beams=cfg.beams, length_penalty=cfg.length_penalty,
                          eos_ids=tokenizer.eos_ids)[0][0]                     # (1, N)
    else:
        # A generator of its own: looking at samples during training must not change the training.
        out = generate(model, ids, max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                       repetition_penalty=cfg.repetition_penalty, eos_ids=tokenizer.eos_ids, on_token=on_token,
                       generator=torch.Generator(ids.device).manual_seed(cfg.seed))  # (1, N)
    # EOS ends the text and is no part of it; what follows is padding, and GPT-2's id 0 would print as "!".
    row = out[0].tolist()
    return tokenizer.decode(row[:next((i for i, token in enumerate(row) if token in tokenizer.eos_ids), len(row))])


# differs from decoder_only.py: our own checkpoints only
def load_any(cfg):
    """--load: our checkpoint, a file or the run folder around it. -> (model, cfg, tokenizer).

    The shape of the model comes from what is loaded, everything else from the command line.
    """
    shape = {"block_size", "n_layer", "n_head", "n_embd", "vocab_size", "tokenizer", "init_std"}
    path = Path(cfg.load) / "ckpt.pt" if Path(cfg.load).is_dir() else Path(cfg.load)
    state = read_checkpoint(path)
    cfg = recorded_config(cfg, state["config"], {field.name for field in dataclasses.fields(cfg)} - shape)
    model = build_model(cfg)
    load_checkpoint(path, model, None, cfg)
    return model.eval(), cfg, make_tokenizer(state["extra"]["tokenizer"])


def synchronize(device):
    """Wait until the device has done what it was told: without it only the telling is timed."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def inputs_of(shape, device, dtype, seed=0):
    """-> q, k, v that ask for gradients, and a gradient for the output."""
    B, H, K, T, D = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v, g = (torch.randn(B, heads, T, D, generator=generator).to(device, dtype) for heads in (H, K, K, H))
    return *(x.requires_grad_() for x in (q, k, v)), g


def peak_growth(work, device):
    """Bytes by which memory grew at most while work() ran; None where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if not os.access("/proc/self/clear_refs", os.W_OK):  # Linux
        return None

    def resident(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    # Memory that was freed but not given back would be used again, and the process would not seem to grow.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak of the resident set
    before = resident("VmRSS")
    work()
    return max(0, resident("VmHWM") - before)


def fits(work, limit):
    """True if work() gets by with `limit` more bytes of address space, a bound on memory; None off Linux: not tried."""
    if not sys.platform.startswith("linux"):
        return None
    import resource
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    caps = [cap for cap in (now + limit, soft, hard) if cap != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(caps), hard))
    try:
        work()
        return True
    except (RuntimeError, MemoryError):  # torch's allocator raises the first
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def flops(shape, causal=True):
    """Operations of (forward, backward) by which attention is rated: 4*B*H*T*T*D, half if causal, and 2.5 times that.

    Two products forward; backward four, and q k^T again. What a kernel computes beyond that is not counted.
    """
    B, H, _, T, D = shape
    # All are credited with the same work, so TFLOP/s ranks as time does. What is really done differs: naive multiplies
    # the hidden half as well, triton makes 7 products backward and is credited with 5.
    forward = 4 * B * H * T * T * D / (2 if causal else 1)
    return forward, 2.5 * forward


# Contenders take turns, so that they share the machine's moods; medians over the rounds, the first is thrown away.
def race(shape, names, device, dtype, rounds=5):
    """Seconds of (forward, forward + backward) of each implementation -> {name: (seconds, seconds)}."""
    q, k, v, g = inputs_of(shape, device, dtype)
    # On a GPU a single call is shorter than starting it: many calls between two looks at the clock.
    calls = min(50, max(1, int(2e13 / flops(shape)[0]))) if device.type == "cuda" else 1
    taken = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in names:
            synchronize(device)
            began = time.perf_counter()
            for _ in range(calls):
                out = ATTENTION[name](q, k, v)                                 # (B, H, T, D)
            synchronize(device)
            forward = time.perf_counter() - began
            for _ in range(calls):
                torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
            synchronize(device)
            taken[name].append((forward / calls, (time.perf_counter() - began) / calls))
    return {name: tuple(statistics.median(part) for part in zip(*times[1:], strict=True))
            for name, times in taken.items()}


def largest_errors(device, cases=12):
    """Random shapes and options against naive attention in float64 -> {name: {"out", "grad"}: largest error}.

    sdpa's column is what float32 can do.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # not TF32, whose 10 bits would be all that one sees
    rng, worst = random.Random(0), {}
    names = [name for name in ATTENTION if name != "triton" or device.type == "cuda" and triton is not None]
    for case in range(cases):
        D, K, T = rng.choice((16, 40, 64)), rng.choice((1, 2)), rng.randint(1, 300)
        q, k, v, g = inputs_of((2, K * rng.choice((1, 3)), K, T, D), device, torch.float32, case)
        options = dict(causal=True, window=rng.choice((0, 0, 50)), keep=None)
        if case % 3 == 0:
            options["keep"] = torch.rand(2, T, generator=torch.Generator().manual_seed(case)).to(device) > 0.3
        exact = naive_attention(*(x.double() for x in (q, k, v)), **options)   # (B, H, T, D)
        grads = torch.autograd.grad(exact, (q, k, v), g.double())
        for name in names:
            out = ATTENTION[name](q, k, v, **options)                          # (B, H, T, D)
            ours = torch.autograd.grad(out, (q, k, v), g)
            # Trap: Python's max(0.0, nan) is 0.0, a check that cannot fail; torch's maximum keeps the nan.
            found = torch.stack([(out - exact).abs().max(), torch.stack([
                (a - b).abs().max() for a, b in zip(ours, grads, strict=True)]).max()])  # (2)
            worst[name] = torch.maximum(worst.get(name, torch.zeros_like(found)), found)  # (2)
    torch.set_float32_matmul_precision(precision)
    return {name: dict(zip(("out", "grad"), pair.tolist(), strict=True)) for name, pair in worst.items()}


def show_running_softmax():
    """Rung 3 on one row, printed."""
    scores = torch.tensor([1.0, 0.5, 4.0, 2.0, -1.0, 6.0, 3.0, 0.0])
    values = torch.arange(8.0)[:, None]                                        # (S, 1)
    out, history = running_softmax(scores, values, tile=2)
    print("one row of scores, two keys at a time: the maximum may change, the answer does not\n"
          "   scores         maximum so far   sum so far, in units of exp(maximum)")
    # The sum falls from 1.61 to 1.22 as the maximum goes from 1 to 4: its unit, exp(maximum), grew 20-fold.
    for i, (m, total) in enumerate(history):
        print(f"   {scores[2 * i]:4.1f} {scores[2 * i + 1]:4.1f} {m:14.1f} {total:14.4f}")
    print(f"   weighted mean of the values 0..7: {out.item():.6f}, with the whole row at once "
          f"{(safe_softmax(scores) @ values).item():.6f}\n")
    return scores, history


def plot_running_softmax(path, scores, history):
    """The running maximum and sum of one row, and which tiles a causal mask leaves, in one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=120)
    # Left: where the red line steps up, everything summed so far shrinks by exp(old maximum - new maximum).
    left.bar(range(len(scores)), scores.tolist(), color="tab:gray", width=0.6, label="score")
    ends = [len(scores) // len(history) * (i + 1) - 0.5 for i in range(len(history))]
    left.step([-0.5, *ends], [history[0][0], *(m for m, _ in history)], where="pre", color="tab:red",
              label="maximum so far")
    for end, (_, total) in zip(ends, history, strict=True):
        left.text(end, max(scores.tolist()) + 0.4, f"sum {total:.2f}", ha="right", fontsize=8)
    left.set(xlabel="key", title="one row, two keys at a time", ylim=(None, max(scores.tolist()) + 1.2))
    left.legend(fontsize=8, loc="lower left")
    # 8 x 8 tiles: 2 = computed without a mask, 1 = with a mask, 0 = skipped.
    n, size = 8, 16
    grid = torch.zeros(n, n)
    for i in range(n):
        for j, _, cut in key_tiles(i * size, (i + 1) * size - 1, n * size, True, 0, size):
            grid[i, j // size] = 1 if cut else 2
    right.imshow(grid, cmap="Blues", vmin=0, vmax=2.6)
    right.set(xlabel="tile of keys", ylabel="tile of queries",
              title=f"causal: {int((grid == 2).sum())} tiles whole, {int((grid == 1).sum())} masked, "
                    f"{int((grid == 0).sum())} skipped")
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def plot_measurements(path, milliseconds, peaks, title):
    """Time and memory against length, a line for each rung."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=120)
    labels = ("ms, forward + backward", "peak memory, MB")
    for ax, table, label in zip(axes, (milliseconds, peaks), labels, strict=True):
        for name, column in table.items():
            ax.plot(list(map(int, column)), list(column.values()), "o-", ms=4, lw=1.2, label=name)
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        ax.legend(fontsize=8)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


LIMIT = 2 * 2 ** 30  # bytes: how long may a text be, if attention gets 2 GiB?


def measure_lengths(cfg, device, out):
    """Time and memory of the rungs against length, printed and drawn. -> (results, names of the pictures)."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    lengths = cfg.lengths if cfg.lengths != "auto" else "1024,2048,4096,8192,16384"
    lengths = list(map(int, lengths.split(",")))
    B, H, D = (4, 16, 128) if gpu else (1, 2, 64)
    names = [name for name in ATTENTION if name != "triton" or gpu and triton is not None]
    errors = largest_errors(device)
    print("largest error against float64, random shapes, windows and padding (output / gradients):\n   "
          + ", ".join(f"{name} {one['out']:.1e} / {one['grad']:.1e}" for name, one in errors.items()))
    print(f"\nattention alone, forward + backward, causal, {B} x {H} heads of {D}, {dtype}, on {device}, "
          f"{torch.get_num_threads()} threads:\n{'tokens':>8}" + "".join(f"{name:>24}" for name in names))
    milliseconds, peaks, tflops = ({name: {} for name in names} for _ in range(3))
    for T in lengths:
        shape, line = (B, H, H, T, D), ""
        # The naive way is left out where its matrices (about five of T x T in flight) would not fit comfortably.
        room = 0.5 * torch.cuda.mem_get_info(device)[0] if gpu else 6e9
        able = [name for name in names if name != "naive" or 5 * dtype.itemsize * B * H * T * T < room]
        times = race(shape, able, device, dtype, rounds=1 if T > 4096 and not gpu else 5)
        for name in names:
            if name not in able:
                line += f"{'-':>24}"
                continue

            def once(name=name, shape=shape):
                q, k, v, g = inputs_of(shape, device, dtype)
                torch.autograd.grad(ATTENTION[name](q, k, v), (q, k, v), g)

            # Time and memory in runs of their own: looking at memory takes time.
            peak = peak_growth(once, device)
            milliseconds[name][str(T)] = 1e3 * times[name][1]
            work = flops(shape)
            tflops[name][str(T)] = [work[0] / times[name][0] / 1e12,
                                    work[1] / (times[name][1] - times[name][0]) / 1e12]
            if peak is not None:
                peaks[name][str(T)] = peak / 1e6
            line += f"{1e3 * times[name][1]:>11.1f} ms{'' if peak is None else f'{peak / 1e6:>7.0f} MB':>10}"
        print(f"{T:>8}{line}")
    figures = ["running_softmax.png", "lengths.png"]
    plot_running_softmax(out / figures[0], *show_running_softmax())
    plot_measurements(out / figures[1], milliseconds, peaks, f"causal attention, {B} x {H} heads of {D}, {dtype}")
    results = {"max_error": errors, "milliseconds": milliseconds, "peak_mb": peaks, "tflops": tflops}
    if gpu:
        # Peaks on data sheets are not reached by anything; a large product is the honest ceiling.
        results["matmul_tflops"] = matmul_tflops(device)
        print(f"a 8192 x 8192 product in bfloat16 runs at {results['matmul_tflops']:.0f} TFLOP/s; of that, forward and "
              f"backward:")
        for name, column in tflops.items():
            print(f"   {name:<8}" + ", ".join(f"{T}: {a:.0f} and {b:.0f} TFLOP/s ({a / results['matmul_tflops']:.0%}, "
                                              f"{b / results['matmul_tflops']:.0%})" for T, (a, b) in column.items()))
        return results, figures
    if sys.platform.startswith("linux"):  # elsewhere nobody can say: print nothing rather than "passes"
        results["in_2_gib"] = in_two_gib(D, device, dtype)
        print("one head, with 2 GiB to spare: " + "; ".join(
            f"{name} passes at {one['passes']:,} tokens" + (f" and fails at {one['fails']:,}" if one["fails"] else "")
            for name, one in results["in_2_gib"].items()))
    return results, figures


def in_two_gib(D, device, dtype):
    """-> {name: {"passes", "fails"}}: the longest text of 4,096 .. that one head can attend to with 2 GiB more."""
    found = {}
    for name in ("naive", "tiled"):
        found[name] = {"passes": 0, "fails": 0}
        for T in (4096, 8192, 16384):  # tiled would pass at many times that, and take its time
            q, k, v, g = inputs_of((1, 1, 1, T, D), device, dtype)

            def work(q=q, k=k, v=v, g=g, name=name):
                torch.autograd.grad(ATTENTION[name](q, k, v), (q, k, v), g)

            if fits(work, LIMIT) is False:
                found[name]["fails"] = T
                break
            found[name]["passes"] = T
    return found


def matmul_tflops(device):
    """What this GPU really reaches on a large product in bfloat16: the ceiling for any kernel."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    synchronize(device)
    began = time.perf_counter()
    for _ in range(20):
        a @ a
    synchronize(device)
    return 20 * 2 * 8192 ** 3 / (time.perf_counter() - began) / 1e12


def main(cfg):
    """Train (or --resume, or start from --load), measure; with --load and --prompt only write. -> (model, cfg)."""
    # In this order: device, settings, data, memory, model. What can fail does so before anything is written.
    device = setup(cfg)
    rank, world = ranks()
    if cfg.attention == "triton" and (triton is None or device.type != "cuda"
                                      and os.environ.get("TRITON_INTERPRET") != "1"):
        sys.exit("error: --attention triton needs Triton and a CUDA GPU (or TRITON_INTERPRET=1, slowly)")
    if cfg.attention == "triton" and cfg.dtype == "float64":
        sys.exit("error: --attention triton sums in float32: --dtype float64 would have no effect there")
    # Three ways in: --resume (model, optimizer, step), --load (model only, a new run), neither (random weights).
    model, tokenizer = None, None
    if cfg.resume:
        # What a run was made with is in its checkpoint; the command line need not repeat it and may not contradict it.
        state = read_checkpoint(Path(cfg.out) / "ckpt.pt")
        free = {"out", "device", "compile", "resume", "eval_every", "save_every", "load", "prompt", "max_new_tokens",
                "temperature", "top_k", "top_p", "repetition_penalty", "beams", "length_penalty", "lengths"}
        cfg, tokenizer = recorded_config(cfg, state["config"], free), make_tokenizer(state["extra"]["tokenizer"])
    elif cfg.load:
        model, cfg, tokenizer = load_any(cfg)
    if cfg.load and cfg.prompt and not cfg.resume:
        model.to(device)
        check_prompt(tokenizer, cfg.prompt)
        print(cfg.prompt, end="", flush=True)
        text = write_text(model, tokenizer, cfg, cfg.prompt, cfg.max_new_tokens, stream(tokenizer))
        print(text if cfg.beams > 1 else "")  # sampled text was streamed; the best beam is known at the end only
        return model, cfg

    # The training of decoder_only.py, with another attention. --max-steps 0 leaves it out.
    results, figures, learned, floor = {}, [], {}, None
    if cfg.max_steps:
        if world > 1 and rank > 0:
            dist.barrier()  # rank 0 goes first: it may have to download, and the others then find the file
        train_data, val_data, tokenizer, info = make_data(cfg, tokenizer)
        if world > 1 and rank == 0:
            dist.barrier()
        if cfg.resume and info["sha256"] != state["extra"]["data"]["sha256"]:
            sys.exit(f"error: --resume: {info['name']} is not the text that this run was trained on (SHA-256 differs)")
        # "auto" becomes the name of what was found: a resumed run must not find something else.
        cfg = dataclasses.replace(cfg, data=info["name"], vocab_size=cfg.vocab_size or tokenizer.n_vocab)
        if cfg.vocab_size < tokenizer.n_vocab:
            sys.exit(f"error: --vocab-size {cfg.vocab_size} is less than the {tokenizer.n_vocab} tokens of the data")
        prompt = cfg.prompt or ("40215=" if cfg.data == "numbers" else "\n")
        if not cfg.prompt and "\n" not in tokenizer.spec.get("chars", "\n"):
            prompt = tokenizer.spec["chars"][0]  # a text without line ends
        check_prompt(tokenizer, prompt)  # now, not behind an hour of training
        check_memory(cfg, device)
        out = out_folder(cfg)
        model = (model or build_model(cfg)).to(device, torch.float64 if cfg.dtype == "float64" else torch.float32)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {parameters:,} parameters on {device}, attention: {cfg.attention}, "
              f"{cfg.batch_size * cfg.grad_accum} rows of {train_data[0].size(1)} tokens a step; all goes to {out}/")

        def show(step):
            if step % cfg.eval_every == 0 and rank == 0:  # watch it learn: noise, then spaces, then words, then names
                line = write_text(model, tokenizer, cfg, prompt, min(60, cfg.max_new_tokens))
                tqdm.write(f"            {(prompt.lstrip() + line)!r}")

        learned = train(model, cfg, train_data, val_data, compute_loss, {"tokenizer": tokenizer.spec, "data": info},
                        show) | {"params": parameters, "data": info}
        if cfg.data == "numbers":
            results["exact_match"] = exact_match(model, tokenizer, sorted(set(draw_numbers(1000, cfg.seed + 1, True))))
        else:
            results["bits_per_byte"] = learned["val_loss"] / math.log(2) / info["bytes_per_token"]
        if rank > 0:
            return model, cfg
        # Sampling goes through the same attention: T = 1 query, S keys.
        text = prompt + write_text(model, tokenizer, cfg, prompt, cfg.max_new_tokens)
        write_atomically(out / "sample.txt", lambda file: file.write(text.encode()))
        floor = 0.0 if cfg.data == "numbers" else None  # what a perfect model would reach; unknown for real text
        uniform = math.log(cfg.vocab_size)
        plot_curve(out / "curve.png", learned["history"], f"{Path(__file__).name} on {Path(cfg.data).name}",
                   {f"uniform guess, ln V = {uniform:.2f}": uniform} | ({} if floor is None else {"floor 0": floor}))
        figures.append("curve.png")
        print(f"\n{text.strip()}\n")
    out, peak = out_folder(cfg), peak_memory_mb(device)  # the training's peak: measuring sets the counter back
    if cfg.lengths:
        more, pictures = measure_lengths(cfg, device, out)
        results, figures = results | more, figures + pictures
    # One file that says what was run, on what, and what came out: enough to repeat the run and compare it.
    # tokens_per_second and seconds are the training's.
    summary = {"config": dataclasses.asdict(cfg), "params": learned.get("params"), "val_loss": learned.get("val_loss"),
               "floor": floor, "tokens_per_second": learned.get("tokens_per_second"),
               "seconds": learned.get("seconds"), "peak_memory_mb": peak, "data": learned.get("data"),
               "device": str(device), "torch": torch.__version__, "figures": figures, "results": results}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it: one place, no second copy to go stale.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    print(f"Everything is in {out}/: {', '.join(['summary.json', *figures])}.\n"
          f"Next: section 2 of {Path(__file__).name}, one rung after the other.\nExpected: {expected}")
    return model, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
