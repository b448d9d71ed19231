# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
FLASH ATTENTION IN ONE FILE                      python flash_attention.py           2 min on two CPU cores

Paper    Dao et al. 2022, FlashAttention, arXiv 2205.14135; Dao 2023, FlashAttention-2, arXiv 2307.08691; the running
         softmax: Milakov & Gimelshein 2018, arXiv 1805.02867
Idea     Attention makes a T x S matrix of scores only to take weighted means with it. Make it tile by tile, keep the
         largest score and the sum so far, and the matrix never exists: memory grows with T, not with T * S, and the
         result is exact. The backward pass computes each tile again instead of having kept it
Picture  q tile (n,D) stays;  for each k, v tile (c,D):  scores (n,c) -> new maximum -> shrink what was summed -> add;
         at the end divide by the sum; keep the output (T,D) and the log of the sum (T)
Symbols  B batch   T queries   S keys   C n_embd   H query heads   K key/value heads   D head size   G = H/K
         R = T*G rows   n, c tile sizes   W window   F ffn_size   V vocabulary
New here softmax three ways, tiled attention forward and backward, the same as Triton kernels
Not here dropout on attention weights, ALiBi, FP8, FlashAttention-3; writing text (decoder_only.py, kv_cache.py)
Expect   PyTorch's own kernel is the fastest on a CPU. Forward + backward of 8,192 tokens, two heads: tiles take 0.29 of
         naive's time (PyTorch 0.18) and 32 MB (naive: 1,714); at 2,048 0.43 (0.25). A training at 1,024 ends at a loss
         of 2.3793 either way. Triton kernels on an H200: forward 1.20 to 1.36 x PyTorch's FlashAttention-2, backward
         0.87 to 1.16 x
Asked    Why can the maximum change afterwards?   What does causality save?   What does the backward pass keep?
         Why is it faster, if it computes more?   Is it an approximation?   When is it no help?

    python flash_attention.py                                  train with tiles and without, then measure both
    python flash_attention.py --max-steps 0                    measure only
    python flash_attention.py --lengths 4096,16384             other lengths
    TRITON_INTERPRET=1 python flash_attention.py --attention triton --max-steps 0 --lengths 64    kernels without a GPU
"""
import argparse
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Config: every setting in one place ---------------------------------------------------------------------------
# A field is a flag (--n-layer 6) and its comment the help text. Each is explained where it is used.
@dataclasses.dataclass
class Config:
    data: str = "auto"                # auto | shakespeare | pydocs | path of a UTF-8 text file
    out: str = "runs/flash_attention"  # folder for the summary and the two pictures
    seed: int = 1337                  # decides initial weights and batches
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda
    attention: str = "triton" if torch.cuda.is_available() else "tiled"  # trained beside naive: tiled | triton | sdpa
    lengths: str = "1024,2048,4096,8192"  # numbers of tokens at which each form is timed
    # Shape: small, with a context of four tiles of keys. 0.8 million parameters.
    block_size: int = 1024            # context in tokens
    n_layer: int = 4                  # layers
    n_head: int = 4                   # query heads; each is n_embd / n_head wide
    n_kv_head: int = 2                # heads of keys and values
    n_embd: int = 128                 # width of the residual stream
    ffn_size: int = 384               # width inside the MLP
    vocab_size: int = 0               # 0 = as many as the text has characters
    # Optimization. 150 steps x 1,024 characters: a seventh of Shakespeare, enough to see two curves fall together.
    max_steps: int = 150              # optimizer steps; 0 = measure only
    batch_size: int = 1               # rows per step
    lr: float = 3e-3                  # peak learning rate
    warmup_steps: int = 20            # steps of linear warm-up
    beta2 = 0.99                      # no type, so no flag: Adam's memory


PRESETS = {"laptop": {}}  # the defaults above


# --- 2. Model: softmax three ways, attention in tiles, the same on a GPU, and a small Llama --------------------------
# Attention is softmax(q k^T / sqrt(D)) v. Everything here computes this, from the same arguments:
#     q (B, H, T, D), k and v (B, K, S, D)     query head h reads key head h // (H/K): grouped queries
#     causal     query t is the (S-T+t)-th token and sees keys 0 .. S-T+t
#     window W   and of these the newest W, itself among them; 0 = all
#     keep       (B, S) bool, True = a real token, False = padding
# A query that may see nothing gets zeros.

# Softmax, first way: as it is written in papers. exp(89) is infinity in float32, and inf / inf is NaN.
# Symptom: a model trains for a day, one score grows past 88, and from then on the loss is nan.
def unsafe_softmax(scores):
    """exp(x) / sum(exp(x)) over the last axis, right while scores stay below 88."""
    weights = scores.exp()
    return weights / weights.sum(-1, keepdim=True)


# Second way: every score may be shifted by the same number, exp(x - m) / sum(exp(x - m)) is the same fraction. With
# m = the largest score the largest exponential is 1, so nothing overflows. This is what torch.softmax does; it needs
# three passes over the row: the maximum, the sum, the division.
def safe_softmax(scores):
    """The same with the maximum of the row taken off first."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


# Third way: the maximum is known only at the end of the row. Take the largest so far, and correct later:
#     after some keys      m = largest score so far     z = sum of exp(score - m)     acc = sum of exp(score - m) * v
#     a larger score m'    all exponentials so far used the wrong m, and are wrong by one common factor, exp(m - m'):
#                          z *= exp(m - m'), acc *= exp(m - m'), go on
#     at the end           acc / z
# By hand: scores 0 and ln 3, values 8 and 4. First key: m = 0, z = 1, acc = 8. The second raises m to ln 3: the factor
# is 1/3, z = 1/3 + 1 = 4/3, acc = 8/3 + 4 = 20/3, and acc / z = 5, the same as (1*8 + 3*4) / (1 + 3).
#
# Q: Why can the maximum change afterwards?
# A: Because it cancels: acc and z both carry exp(-m), whatever m is, and the quotient stays. It only keeps the numbers
#    in range.
def running_softmax(scores, values, tile=1):
    """scores (S), values (S, D) -> their weighted mean (D), in one pass that holds `tile` scores at a time."""
    m, z, acc = scores.new_tensor(-math.inf), 0.0, 0.0
    for s, v in zip(scores.split(tile), values.split(tile), strict=True):
        new = torch.maximum(m, s.max())
        p, shrink = (s - new).exp(), (m - new).exp()  # m = -inf at first: exp gives 0, there was nothing before
        m, z, acc = new, z * shrink + p.sum(), acc * shrink + p @ v
    return acc / z                                                             # (D)


def visible(place, column, causal, window, keep):
    """May the query at `place` (n, 1) see the key in `column` (c)? keep (B, c) or None -> bool, broadcasts to
    (B, heads, n, c)."""
    seen = ((column <= place) | (not causal)) & ((column > place - window) | (not window))
    return seen if keep is None else seen & keep[:, None, None]


# What is wrong with it? Not the arithmetic, 4*T*S*D operations a head. At T = S = 8,192 the scores of one head are 256
# MiB, written by the product, read and written by the mask and again by softmax, read by the product with v; and of
# every layer autograd keeps the weights until the backward pass.
def naive_attention(q, k, v, causal=True, window=0, keep=None):
    """The whole T x S matrix at once: the definition that all others are tested against. -> (B, H, T, D)"""
    T, S, G = q.size(2), k.size(2), q.size(1) // k.size(1)
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)                # (B, H, S, D) each
    seen = visible(torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device),
                   causal, window, keep)                                       # (..., T, S)
    # Hidden scores become the lowest number there is: exp gives exactly 0. (With -inf a row that sees nothing is NaN.)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                   # (B, H, T, S)
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)  # (B, H, T, S)
    return (weights @ v).masked_fill(~seen.any(-1, keepdim=True), 0.0)         # (B, H, T, D)


# Grouped queries as more rows: the G query heads of one key head take turns, row t*G + g, and all meet their keys in
# one product, without a copy of k for each of them.
def to_rows(x, K):
    """(B, H, T, D) -> (B, K, T*G, D)"""
    return x.unflatten(1, (K, -1)).transpose(2, 3).flatten(2, 3)               # (B, K, R, D)


def to_heads(x, T):
    """(B, K, T*G, D) -> (B, H, T, D)"""
    return x.unflatten(2, (T, -1)).transpose(2, 3).flatten(1, 2)               # (B, H, T, D)


# Tile by tile. Which tiles are there to compute? Causal, T = S, 4 tiles a side; on the right with a window of 2 tiles:
#     keys       0 1 2 3        0 1 2 3
#     queries 0  / . . .        / . . .        # all pairs are visible: no mask needed
#             1  # / . .        # / . .        / some are: mask it
#             2  # # / .        / # / .        . none is: do not even look
#             3  # # # /        . / # /
#
# Q: What does causality save?
# A: With n tiles a side n(n+1)/2 of n^2 are computed, 53 % at n = 16. Masking after the product saves nothing at all.
def tile_scores(q, k, i, tile, T, causal, window, keep):
    """Rows i .. i+tile-1 of q (B, K, R, D) against the tiles of k (B, K, S, D) of which they may see something.

    Yields (slice of N keys, scores (B, K, n, N), -inf where hidden). Row r is query r // (R/T).
    """
    rows, S, G = q[:, :, i:i + tile], k.size(2), q.size(2) // T
    place = S - T + torch.arange(i, i + rows.size(2), device=q.device)[:, None] // G  # (n, 1)
    first, last = S - T + i // G, S - T + (i + rows.size(2) - 1) // G  # its ends, without asking the device
    for j in range(max(0, first - window + 1) if window else 0, min(S, last + 1) if causal else S, tile):
        keys = slice(j, min(j + tile, S))
        s = rows @ k[:, :, keys].transpose(-2, -1)                             # (B, K, n, N)
        # Trap: one key too generous, `keys.stop - 1 > first + 1`, skips the mask of a tile whose last key is ahead of
        # its first query: that query sees the future, and no loss looks wrong.
        if causal and keys.stop - 1 > first or window and j <= last - window or keep is not None:
            column = torch.arange(j, keys.stop, device=q.device)               # (N)
            s.masked_fill_(~visible(place, column, causal, window, None if keep is None else keep[:, keys]), -math.inf)
        yield keys, s


# The cost of T x S: 16,384 tokens, one head, float32: 1 GiB for the scores, as much for the weights, and both again in
# the backward pass; for 32 heads 32 times that. Tiles need q, k, v, out and the gradients, 4 MiB each at D = 64.
#
# Q: What did FlashAttention-2 change in FlashAttention?
# A: The order of the loops. The first kept a tile of keys and let the queries pass by, so that each output was read,
#    corrected and written once per tile of keys. With the queries outside an output is written once, and each tile of
#    queries is a job of its own: a long text fills a GPU even with one head. And z divides once, at the end.
class TiledAttention(torch.autograd.Function):
    """The forward pass with its own derivative. Autograd alone would keep every tile: T x S again."""

    @staticmethod
    def forward(ctx, q, k, v, tile, *options):
        out, lse = torch.empty_like(q), torch.empty_like(q[..., :1])           # out (B, K, R, D), lse (B, K, R, 1)
        for i in range(0, q.size(2), tile):
            # A tile of queries stays, in a GPU's shared memory, here in the cache of a core, and the keys pass by.
            rows = q[:, :, i:i + tile]                                         # (B, K, n, D)
            # Trap: starting at -inf. While nothing is visible -inf - -inf is NaN, and stays; -1e30 - -1e30 is 0.
            m = torch.full_like(rows[..., :1], -1e30)                          # (B, K, n, 1)
            z, acc = torch.zeros_like(m), torch.zeros_like(rows)               # z (B, K, n, 1), acc (B, K, n, D)
            for keys, s in tile_scores(q, k, i, tile, *options):
                # Trap: new = the maximum of this tile alone. shrink could then be above 1, and overflow.
                new = torch.maximum(m, s.amax(-1, keepdim=True))               # (B, K, n, 1)
                p, shrink = s.sub_(new).exp_(), (m - new).exp_()               # p (B, K, n, N), shrink (B, K, n, 1)
                m, z = new, z * shrink + p.sum(-1, keepdim=True)               # (B, K, n, 1) each
                # Not divided by z here: once at the end is enough (FlashAttention-2, section 3.1).
                acc = (acc * shrink).add_(p @ v[:, :, keys])                   # (B, K, n, D)
            # z is at least 1, since the largest score adds exp(0), or 0 for a query that saw nothing, whose acc is 0.
            out[:, :, i:i + tile] = acc / z.clamp(min=1.0)
            # exp(s - m) / z = exp(s - (m + ln z)): maximum and sum in one. Scores 0, ln 3: lse = ln 4, p = 1/4, 3/4.
            lse[:, :, i:i + tile] = m + z.clamp(min=1.0).log()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = tile, *options
        return out                                                             # (B, K, R, D)

    # Q: What does the backward pass keep?
    # A: q, k, v, out and one number per query, the lse. They make any tile of weights again, p = exp(s - lse): the
    #    final maximum and sum are known now, so nothing is running any more. The naive form keeps the T x S weights.
    #
    # With p = softmax(s), out = p v, and g = the gradient that arrives at out:
    #     dv = p^T g        dp = g v^T        ds = p * (dp - delta)        dq = ds k        dk = ds^T q
    # (q comes scaled by 1/sqrt(D); dq still lacks this factor: autograd multiplies by it where q was scaled.)
    # delta = rowsum(p * dp), softmax's own term, seems to need a whole row. But it is g . (sum of p_j v_j) = g . out,
    # which is there already (FlashAttention, appendix B.2). Why: raise score j by a little e. Weight j grows by e * p_j
    # and all shrink by the factor 1 - e * p_j: out moves by e * p_j * (v_j - out), and per e and times g that is
    # p_j * (g.v_j - g.out).
    # By hand: p = (1/4, 3/4), v = (8, 4), out = 5, g = 1: dp = (8, 4), delta = 5, ds = (3/4, -3/4).
    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative would take lse for a constant
    def backward(ctx, g):
        (q, k, v, out, lse), (tile, *options) = ctx.saved_tensors, ctx.options
        delta = (g * out).sum(-1, keepdim=True)                                # (B, K, R, 1)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for i in range(0, q.size(2), tile):
            here = slice(i, i + tile)
            for keys, s in tile_scores(q, k, i, tile, *options):
                p = s.sub_(lse[:, :, here]).exp_()                             # (B, K, n, N) rows sum to 1 now
                # Many tiles of queries add to one tile of keys: += and not =.
                dv[:, :, keys] += p.transpose(-2, -1) @ g[:, :, here]
                ds = (g[:, :, here] @ v[:, :, keys].transpose(-2, -1)).sub_(delta[:, :, here]).mul_(p)  # (B, K, n, N)
                dq[:, :, here] += ds @ k[:, :, keys]
                dk[:, :, keys] += ds.transpose(-2, -1) @ q[:, :, here]
        return dq, dk, dv, None, None, None, None, None


# 256 x 256 float32 scores of a head are 256 KiB and stay in a core's cache (1 MiB here); 1024 x 1024 are 4 MiB and do
# not. Smaller tiles read k and v more often, R/tile times, and in Python every tile costs its calls.
def tiled_attention(q, k, v, causal=True, window=0, keep=None, tile=256):
    """q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D), in memory that grows with T and S, not with T * S.

    causal, window, keep: see the top of this section. The result is exact (FlashAttention-2, algorithms 1 and 2).
    """
    assert q.shape[::3] == k.shape[::3] and k.shape == v.shape and q.size(1) % k.size(1) == 0 and window >= 0 and (
        keep is None or keep.shape == k.shape[::2]), "q (B, H, T, D), k and v (B, K, S, D), K divides H, keep (B, S)"
    # Sums are float32 at least: the 8 bits of a bfloat16 would be used up after 256 terms.
    T, wide = q.size(2), torch.promote_types(q.dtype, torch.float32)
    rows = to_rows(q.to(wide), k.size(1)) / math.sqrt(q.size(-1))              # (B, K, R, D)
    # Trap: autocast would round the products to bfloat16 again, in forward and not in backward: the weights that
    # backward makes again would then not be those that forward used.
    with torch.autocast(q.device.type, enabled=False):
        out = TiledAttention.apply(rows, k.to(wide), v.to(wide), tile, T, causal, window, keep)  # (B, K, R, D)
    return to_heads(out, T).to(q.dtype)                                        # (B, H, T, D)


# The same on a GPU. A Triton kernel is a program that runs many times at once, once per tile of queries (or keys) and
# head: kernel[grid](...) starts grid[0] * grid[1] of them, and tl.program_id tells each one which it is. tl.load brings
# a block of numbers from the GPU's memory onto the chip, tl.dot multiplies two blocks on the tensor cores, and what
# lies in between never leaves the chip.
#
# Q: Why is it faster, if it computes more?
# A: An H200 does 990 TFLOP/s in bfloat16 and reads 4.8 TB/s (data sheet): 200 operations in the time of one byte.
#    The naive form writes and reads the T x S matrix for mask and softmax, about one operation per byte; tiles do not.
#    They pay with 5 products in the backward pass instead of 4.
# Measured on an H200 (bfloat16, causal, 1,024 to 16,384 tokens, D 64 and 128): forward 283 to 441 TFLOP/s, 1.2 to 1.4 x
# PyTorch's FlashAttention-2; backward 135 to 361, 0.87 to 1.16 x (results/peers_flash_attention.json).
#
# Q: How large should a tile be?
# A: n queries do 4*n*D operations with the k and v of one key, 4*D bytes in bfloat16: n operations per byte. With n = 1
#    memory sets the pace; with some 100, or fewer if neighbors find k and v in the L2 cache, arithmetic does. But a
#    tile must fit into the shared memory (228 KiB on an H200) and registers of a multiprocessor, and two small ones can
#    hide each other's waiting. Which is best differs from GPU to GPU: it is measured.
try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: everything else works
    triton = None

if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x * log2 e): the hardware has 2^x

    # tl.constexpr: known when the kernel is compiled, so an option that is off leaves no trace in it.
    @triton.jit
    def tile_mask(place, column, S, keep, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEEP: tl.constexpr):
        """`visible` for one tile; place and column broadcast against each other."""
        # Trap: leaving this out. Keys behind S are loaded as zeros: their score is 0, not -inf, and exp(0) = 1 counts.
        seen = column < S
        if CAUSAL:
            seen = seen & (column <= place)
        if WINDOW > 0:
            seen = seen & (column > place - WINDOW)
        if KEEP:
            seen = seen & (tl.load(keep + column, mask=column < S, other=0) != 0)
        return seen

    @triton.jit
    def forward_kernel(q, k, v, keep, out, lse, scale, T, S, H, K, D: tl.constexpr, CAUSAL: tl.constexpr,
                       WINDOW: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """BM queries of one head against all keys that they may see."""
        # Which of the many am I? (tile; row of the batch and head). Late tiles see most keys and begin first: a long
        # one that began last would leave the rest of the chip idle.
        i, bh = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM, tl.program_id(1).to(tl.int64)
        b, h = bh // H, bh % H
        kv = b * K + h // (H // K)
        # q is an address, q + a block of offsets is a block of addresses. Head bh begins at bh*T*D; in int64, since an
        # int32 turns negative beyond 2^31 numbers (batch 64 x 16 heads x 16,384 tokens x 128).
        row, dim = i + tl.arange(0, BM)[:, None], tl.arange(0, D)[None, :]     # BM x 1, 1 x D
        here = bh * T * D + row * D + dim                                      # BM x D
        rows = tl.load(q + here, mask=row < T, other=0.0)                      # BM x D
        m, z = tl.full((BM, 1), -1e30, tl.float32), tl.zeros((BM, 1), tl.float32)
        acc = tl.zeros((BM, D), tl.float32)
        # Keys start .. stop are visited. Tiles that begin before `whole` are visible to all these queries and need no
        # mask: they end within S, and causally at the first query's place at the latest, j + BN - 1 <= S - T + i.
        start, stop, whole = 0, S, S // BN * BN
        if CAUSAL:
            stop, whole = tl.minimum(S, S - T + i + BM), tl.minimum(whole, S - T + i + 2 - BN)
        if WINDOW > 0:
            start = tl.maximum(0, S - T + i - WINDOW + 1)
        if WINDOW > 0 or KEEP:
            whole = 0
        for j in range(start, stop, BN):
            column = j + tl.arange(0, BN)                                      # BN
            at = kv * S * D + column[:, None] * D + dim                        # BN x D
            keys = tl.load(k + at, mask=column[:, None] < S, other=0.0)        # BN x D
            # "ieee": float32 inputs are multiplied in float32, not in TF32, which keeps 3 digits.
            s = tl.dot(rows, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)  # BM x BN
            if j >= whole:
                s = tl.where(tile_mask(S - T + row, column[None, :], S, keep + b * S, CAUSAL, WINDOW, KEEP), s,
                             float("-inf"))                                    # BM x BN
            new = tl.maximum(m, tl.max(s, 1, keep_dims=True))                  # BM x 1
            p, shrink = tl.exp2(s - new), tl.exp2(m - new)                     # BM x BN, BM x 1
            m, z = new, z * shrink + tl.sum(p, 1, keep_dims=True)              # BM x 1, BM x 1
            values = tl.load(v + at, mask=column[:, None] < S, other=0.0)      # BN x D
            # p in the dtype of v, so that the tensor cores take it; the sum stays float32.
            acc = tl.dot(p.to(values.dtype), values, acc * shrink, input_precision="ieee")  # BM x D
        z = tl.maximum(z, 1.0)                                                 # BM x 1
        tl.store(out + here, (acc / z).to(out.dtype.element_ty), mask=row < T)
        tl.store(lse + bh * T + row, m + tl.log2(z), mask=row < T)  # in units of log2, like the scores

    @triton.jit
    def backward_kernel(q, k, v, keep, grad, lse, delta, dq, dk, dv, scale, T, S, H, K, D: tl.constexpr,
                        CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr,
                        BN: tl.constexpr):
        """BN keys stay, and the queries of all heads of their group pass by: dk, dv, and what these keys add to dq."""
        j, bk = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
        b, group = bk // K, H // K
        column, dim = j + tl.arange(0, BN)[:, None], tl.arange(0, D)[None, :]  # BN x 1, 1 x D
        here = bk * S * D + column * D + dim                                   # BN x D
        keys = tl.load(k + here, mask=column < S, other=0.0)                   # BN x D
        values = tl.load(v + here, mask=column < S, other=0.0)                 # BN x D
        key_sum, value_sum = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
        # Queries start .. stop may see some of these keys: from the one at the first key's own place to W - 1 behind
        # the last key. Tiles that begin at `whole` or later see all of them and need no mask. Trap: no mask for keys
        # behind S, whose sums nobody stores. Their score of 0 can be far above all real ones: exp2 overflows, and
        # inf * 0 is NaN in dq.
        start, stop, whole = 0, T, tl.where(j + BN > S, T, 0)
        if CAUSAL:
            start, whole = tl.maximum(0, j - (S - T)), j + BN - 1 - (S - T)
        if WINDOW > 0:
            stop = tl.minimum(T, j + BN - 1 + WINDOW - (S - T))
        if WINDOW > 0 or KEEP:
            whole = T
        for member in range(group):
            bh = bk * group + member
            for i in range(start, stop, BM):
                row = i + tl.arange(0, BM)                                         # BM
                at = bh * T * D + row[:, None] * D + dim                           # BM x D
                rows = tl.load(q + at, mask=row[:, None] < T, other=0.0)           # BM x D
                g = tl.load(grad + at, mask=row[:, None] < T, other=0.0)           # BM x D
                total = tl.load(lse + bh * T + row, mask=row < T, other=0.0)   # BM; behind T g is 0, and so is all else
                own = tl.load(delta + bh * T + row, mask=row < T, other=0.0)       # BM
                # Transposed, (BN, BM): p^T and ds^T are then what the products below want first.
                p = tl.exp2(tl.dot(keys, tl.trans(rows), input_precision="ieee") * (scale * LOG2E) - total[None, :])
                if i < whole:
                    p = tl.where(tile_mask(S - T + row[None, :], column, S, keep + b * S, CAUSAL, WINDOW, KEEP), p, 0.0)
                value_sum = tl.dot(p.to(g.dtype), g, value_sum, input_precision="ieee")  # BN x D
                ds = p * (tl.dot(values, tl.trans(g), input_precision="ieee") - own[None, :])  # BN x BM
                key_sum = tl.dot(ds.to(rows.dtype), rows, key_sum, input_precision="ieee")  # BN x D
                # Programs of other keys add to the same dq. An atomic add loses nothing, but the order is not fixed:
                # last digits differ from run to run, as in PyTorch's kernel. A second kernel with the loops the other
                # way round would be reproducible, for 7 products instead of 5.
                part = tl.dot(tl.trans(ds.to(keys.dtype)), keys, input_precision="ieee") * scale  # BM x D
                tl.atomic_add(dq + at, part, mask=row[:, None] < T, sem="relaxed")
        tl.store(dk + here, (key_sum * scale).to(dk.dtype.element_ty), mask=column < S)
        tl.store(dv + here, value_sum.to(dv.dtype.element_ty), mask=column < S)


class TritonAttention(torch.autograd.Function):
    """The two kernels as a function with a derivative."""

    @staticmethod
    def forward(ctx, q, k, v, causal, window, keep, scale):
        q, k, v = (x.contiguous() for x in (q, k, v))
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
        # Tile sizes and warps (32 threads each): the fastest of those tried on an H200 for D 64 and 128 in bfloat16.
        # num_stages: how many tiles ahead memory is asked for. float32 and wider heads need small tiles to fit.
        ctx.small = q.dtype == torch.float32 or D > 128
        ctx.args = scale, T, S, H, K, D, causal, window, keep is not None
        sizes = dict(BM=32, BN=32) if ctx.small else dict(BM=64, BN=64, num_warps=4, num_stages=3)
        # A kernel takes addresses: bool as bytes, and without a mask any address, since it is not read.
        kept = q if keep is None else keep.to(torch.int8).contiguous()
        forward_kernel[triton.cdiv(T, sizes["BM"]), B * H](q, k, v, kept, out, lse, *ctx.args, **sizes)
        ctx.save_for_backward(q, k, v, kept, out, lse)
        return out                                                             # (B, H, T, D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, kept, out, lse = ctx.saved_tensors
        grad, delta = grad.contiguous(), (grad.float() * out.float()).sum(-1)
        # dq in float32: many programs add to it, and each addition in bfloat16 would round.
        dq, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
        sizes = dict(BM=32, BN=32) if ctx.small else dict(BM=64, BN=128, num_warps=8, num_stages=3)
        backward_kernel[triton.cdiv(k.size(2), sizes["BN"]), k.size(0) * k.size(1)](
            q, k, v, kept, grad, lse, delta, dq, dk, dv, *ctx.args, **sizes)
        return dq.to(q.dtype), dk, dv, None, None, None, None


def triton_attention(q, k, v, causal=True, window=0, keep=None):
    """As tiled_attention, on a CUDA GPU; with TRITON_INTERPRET=1 on any processor, slowly, for tests.

    Raises ValueError where it cannot run, and for bfloat16 in the interpreter, which returns garbage in silence.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if triton is None or not (q.is_cuda or interpreted):
        raise ValueError("the Triton kernels need a CUDA GPU (or TRITON_INTERPRET=1 and patience)")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or (q.dtype == torch.bfloat16 and interpreted):
        raise ValueError(f"no Triton kernel for {q.dtype} here: float32, float16 or (on a GPU alone) bfloat16")
    assert q.shape[::3] == k.shape[::3] and k.shape == v.shape and q.size(1) % k.size(1) == 0 and window >= 0 and (
        keep is None or keep.shape == k.shape[::2]), "q (B, H, T, D), k and v (B, K, S, D), K divides H, keep (B, S)"
    # tl.arange and tl.dot want powers of 2, and at least 16: zeros are added to D, which change no product.
    D = q.size(-1)
    if more := max(16, triton.next_power_of_2(D)) - D:
        q, k, v = (F.pad(x, (0, more)) for x in (q, k, v))
    return TritonAttention.apply(q, k, v, causal, window, keep, D ** -0.5)[..., :D]  # (B, H, T, D)


# What to use. PyTorch's scaled_dot_product_attention has FlashAttention-2 inside (on a CPU a kernel of the same kind);
# torch.nn.attention.flex_attention makes a Triton kernel from a Python function that changes a score.
#
# Q: Is it an approximation?
# A: No. Sums are taken in another order, so last digits differ, as they do between two GPUs.
# Q: When is it no help?
# A: When one token is written: T = 1, there is no T x S matrix, and all work is reading the cache (kv_cache.py).
def sdpa_attention(q, k, v):
    """PyTorch's own kernel: causal, T = S."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, D)


ATTENTION = {"naive": naive_attention, "tiled": tiled_attention, "triton": triton_attention, "sdpa": sdpa_attention}


# A small Llama that attends as told; llama3.py explains its parts. Attention is the only place where tokens meet, so it
# is the only part whose cost per token grows with the text: 4*T*C operations a layer, if nothing is skipped, next to 2
# for each weight. Here both are equal at T = 768, in Llama 3 8B at 26,624.

# Q: Half-split or interleaved: which two numbers make a plane?
# A: The paper and Meta's files pair (0, 1), (2, 3), ...; Hugging Face's files, and ours, (0, D/2), (1, D/2 + 1), ...
#    It is a convention of the weights: the rows of W_q and W_k are permuted alike. Reading weights with the wrong one
#    is the commonest RoPE bug; position 0, which is not turned at all, still looks right.
def apply_rope(x, cos, sin):
    """x (B, H, T, D), plane i = (a, b) = (x[i], x[i + D/2]) -> (a cos - b sin, b cos + a sin), (B, H, T, D)."""
    a, b = x.chunk(2, -1)                                                      # (B, H, T, D/2)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)      # (B, H, T, D)


# Two matrices where llama3.py has five: q, k and v come from one product, gate and up from another. Fewer, larger
# products are faster; the numbers are the same.
class TinyBlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, cfg):
        super().__init__()
        C, D, self.cfg = cfg.n_embd, cfg.n_embd // cfg.n_head, cfg
        self.norm1, self.norm2 = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
        self.qkv, self.o = nn.Linear(C, C + 2 * D * cfg.n_kv_head, bias=False), nn.Linear(C, C, bias=False)
        self.gate_up, self.down = nn.Linear(C, 2 * cfg.ffn_size, bias=False), nn.Linear(cfg.ffn_size, C, bias=False)

    def forward(self, x, cos, sin):
        H, K = self.cfg.n_head, self.cfg.n_kv_head
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (H + 2 * K, -1)).transpose(1, 2).split((H, K, K), 1)
        y = ATTENTION[self.cfg.attention](apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)  # (B, H, T, D)
        x = x + self.o(y.transpose(1, 2).flatten(2))                           # (B, T, C)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)                    # (B, T, F) each
        return x + self.down(F.silu(gate) * up)                                # (B, T, C)


class TinyLlama(nn.Module):
    """ids (B, T) -> logits (B, T, V)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.embed = cfg, nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(TinyBlock(cfg) for _ in range(cfg.n_layer))
        self.norm, self.head = nn.RMSNorm(cfg.n_embd, eps=1e-5), nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # std 1/sqrt(width); the last matrix of each branch is smaller, so that the sum of all branches keeps its size.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, (cfg.n_embd * (2 * cfg.n_layer if re.search(r"\.o\.|down", name) else 1)) ** -0.5)

    def forward(self, ids):
        T, D = ids.size(1), self.cfg.n_embd // self.cfg.n_head
        w = 10_000.0 ** (torch.arange(0, D, 2, device=ids.device) / -D)        # D/2 speeds, one per plane
        angle = torch.arange(T, device=ids.device)[:, None] * torch.cat((w, w))  # (T, D)
        x, cos, sin = self.embed(ids), angle.cos(), angle.sin()                # x (B, T, C), the others (T, D)
        for block in self.blocks:
            x = block(x, cos, sin)                                             # (B, T, C)
        return self.head(self.norm(x))                                         # (B, T, V)


# --- 3. Objective: the next token, T times per row -------------------------------------------------------------------
IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def compute_loss(model, inputs, targets):
    """inputs, targets (B, T) -> sum of -ln p(target) over the targets that count, in nats."""
    logits = model(inputs)                                                     # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


# --- 4. Data: text -> rows of ids ------------------------------------------------------------------------------------
# The SHA-256 is checked: a proxy's error page or an edited copy would train as well, to a number that means nothing.
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def load_text(name):
    """-> (text, name of what was loaded). auto = Tiny Shakespeare in ./data (or $LLM_DATA), else downloaded, else
    Python's own help texts (pydocs). Raises OSError if there is no such file, ValueError if it is not UTF-8."""
    if name in ("auto", "shakespeare"):
        (url, sha256), path = SHAKESPEARE, Path(os.environ.get("LLM_DATA", "data"), "tinyshakespeare.txt")
        try:
            if not path.is_file():
                import requests
                content = requests.get(url, timeout=(3, 60)).content  # 3 s to connect: an offline laptop must not hang
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise OSError(f"{url} is not the expected file: its SHA-256 differs")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return path.read_text(encoding="utf-8"), "shakespeare"
        except OSError as problem:  # requests' exceptions are OSErrors too
            if name == "shakespeare":
                raise
            print(f"no Tiny Shakespeare, so Python's own help texts ({str(problem)[:100]})")
    if name in ("auto", "pydocs"):
        from pydoc_data.topics import topics
        return "\n\n".join(topics[key] for key in sorted(topics)), "pydocs"
    return Path(name).read_text(encoding="utf-8-sig"), name  # -sig: a byte-order mark is not a letter


def text_rows(ids, block_size, stride):
    """ids (n,) -> (inputs, targets), each (rows, T): windows of one text that start every `stride` tokens.

    ids 0 1 2 3 4 5 6 with T = 3, stride 1:  inputs 012 123 234 345   targets 123 234 345 456
                               stride 3:     inputs 012 345           targets 123 456
    stride 1 to train: any start is a row. stride T to validate: every token is predicted once (not the first, nor a
    tail shorter than T)."""
    # unfold makes a view: a million windows that overlap share one text in memory instead of holding T copies of it.
    return ids[:-1].unfold(0, block_size, stride), ids[1:].unfold(0, block_size, stride)


def make_data(cfg):
    """-> (train rows, validation rows, number of characters, name)."""
    text, name = load_text(cfg.data)
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    train, val = torch.tensor([ids[character] for character in text]).tensor_split([int(0.9 * len(text))])
    if len(val) <= cfg.block_size:
        raise ValueError(f"{name} is too short: a tenth of its {len(text)} characters is less than block_size + 1")
    return text_rows(train, cfg.block_size, 1), text_rows(val, cfg.block_size, cfg.block_size), len(ids), name


def get_batch(data, rows, seed, step):
    """-> (inputs, targets) of one step, (rows, T) each: a pure function of (seed, step), so a resume needs no state."""
    # Trap: seeding with seed + step. Seed 1 at step 5 is then seed 2 at step 4.
    index = torch.randint(len(data[0]), (rows,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    return tuple(part[index] for part in data)  # one gather per tensor, no Python loop over rows


# --- 5. Training: a plain loop ---------------------------------------------------------------------------------------
#     lr |     ______
#        |    /      `-.            warm-up: the first gradients are unreliable, keep steps small
#        |   /          `.          top of the cosine: large steps, fast progress
#        |  /             `-._      descent: ever smaller steps average out the noise of single batches
#        +--------------------- step
def lr_at(step, cfg):
    """Learning rate of update number `step` (from 0): linear warm-up, then half a cosine down to 0."""
    # Adam's first update is m_hat / sqrt(v_hat) = g / |g| = +-1: every weight moves by the full lr, in a direction that
    # a single batch chose. Warm-up divides that first move by warmup_steps.
    # step + 1: update 0 already moves. Trap: step / warmup_steps makes the first update a no-op.
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, cfg):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101).

    m = b1*m + (1-b1)*g;  v = b2*v + (1-b2)*g^2;  w -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)
    m_hat = m / (1 - b1^t) and v_hat likewise make up for the start at 0.
    """
    # Q: Why Adam and not plain gradient descent?
    # A: Gradients of different weights differ by orders of magnitude: a frequent token's row and a rare one's, the
    #    first layer's and the last's. Dividing by sqrt(v), a weight's own typical gradient, gives all of them steps of
    #    size lr. The price is memory: m and v are 8 bytes per parameter in float32, twice the weights.
    # Decay pulls weights towards 0. That suits matrices, not gains, which belong near 1, nor biases: both are vectors.
    # 0.1 is GPT-3's value. Trap: adding decay to the gradient (Adam with L2): it is then divided by sqrt(v) as well,
    # and weights with large gradients hardly decay: the W in AdamW.
    groups = [dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)]
    # fused: one kernel for the whole update instead of a dozen small operations per parameter.
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=cfg.device != "mps")


@torch.no_grad()
def evaluate(model, data, cfg):
    """-> mean loss in nats per counted target over the WHOLE split. Leaves the model in eval mode."""
    # Trap: estimating on 20 random batches, as often seen: the figure jumps, and the lowest of many was partly luck.
    model.eval()  # dropout, where there is any, is off
    batches = zip(*(part.split(cfg.batch_size) for part in data), strict=True)
    loss_sum = sum(compute_loss(model, *(t.to(cfg.device) for t in batch)).item() for batch in batches)
    return loss_sum / (data[-1] != IGNORE).sum().clamp(min=1).item()


# The whole of a training step without what keeps a long run safe (checkpoints, resumption: decoder_only.py has them).
def fit(model, cfg, data, loss_fn, steps, lr, after_step=lambda step: None):
    """Train for `steps` steps, lr at its peak. -> the loss of each step, the mean over what counts.

    loss_fn(model, *batch) -> a sum over what counts: entries of batch[-1] other than IGNORE. Raises ValueError if a
    loss is not finite.
    """
    cfg = dataclasses.replace(cfg, max_steps=steps, lr=lr)
    optimizer, losses = make_optimizer(model, cfg), []
    for step in tqdm(range(steps), "fit", mininterval=0.5):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
        batch = [part.to(cfg.device) for part in get_batch(data, cfg.batch_size, cfg.seed, step)]
        # Products in bfloat16 on a GPU; weights, sums and the optimizer stay in float32.
        with torch.autocast("cuda", torch.bfloat16, enabled=cfg.device.startswith("cuda")):
            loss = loss_fn(model, *batch) / (batch[-1] != IGNORE).sum().clamp(min=1)
        loss.backward()
        # g *= min(1, 1 / |g|), |g| over all weights together: one odd batch must not spoil Adam's averages.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        after_step(step)
    losses = torch.stack(losses).tolist()  # reading a loss waits for the GPU: once, at the end
    if not all(map(math.isfinite, losses)):
        raise ValueError("the loss is not finite: try a lower --lr")
    return losses


# --- 8. Main: errors, training, time and memory against length -------------------------------------------------------
# Memory is measured and not computed: a formula would leave out what autograd keeps, and that is the point.
def peak_growth(work, device):
    """Run work() and say by how many MB its memory grew at the most (Linux or CUDA; elsewhere nan)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return math.nan

    def resident(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    # Memory that was freed but not given back would be used again, and the process would not seem to grow.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: forget the highest resident set so far
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


# Forward and backward together, since that is what training pays, and since the forward pass alone could throw away the
# weights and look as lean as tiles.
def measure(cfg, forms, T, rounds=5):
    """Forward + backward of one layer: 2 heads of 64, T tokens (CUDA: 16 in bfloat16). -> {form: (ms, peak MB)}."""
    cuda, figures = cfg.device.startswith("cuda"), {form: [] for form in forms}
    shape, dtype = (1, 16 if cuda else 2, T, 64), torch.bfloat16 if cuda else torch.float32
    q, k, v, g = (torch.randn(shape, device=cfg.device, dtype=dtype, requires_grad=True) for _ in range(4))

    def work(form):
        torch.autograd.grad(ATTENTION[form](q, k, v), (q, k, v), g)
        if cuda:
            torch.cuda.synchronize()  # without it only the launch is timed
    memory = {form: max(peak_growth(lambda form=form: work(form), cfg.device) for _ in range(2)) for form in forms}
    for _ in range(rounds):  # in turns: whatever else the machine does, neighbors in time suffer alike
        for form in forms:
            began = time.perf_counter()
            work(form)
            figures[form].append(1e3 * (time.perf_counter() - began))
    return {form: (statistics.median(times), memory[form]) for form, times in figures.items()}


# Q: How do you know that a kernel is right, if its digits differ from the definition's?
# A: Compare both with float64. The kernel may be as wrong as the written-out form in the same dtype, here by some 1e-6,
#    and not many times as wrong (FlashAttention's own tests allow twice, three times for gradients). A fixed tolerance
#    hides bugs when it is loose, and fails good code when it is tight.
def max_error(form, device, cases=5):
    """The largest difference to the naive form in float64, output and gradients, of float32 inputs with variance 1."""
    worst = 0.0
    for case in range(cases):
        generator = torch.Generator().manual_seed(case)
        inputs = [torch.randn(1, heads, 300, 64, generator=generator) for heads in (4, 2, 2, 4)]
        found = []
        for attend, dtype in ((ATTENTION[form], torch.float32), (naive_attention, torch.float64)):
            q, k, v, g = (x.to(device, dtype).requires_grad_() for x in inputs)
            out = attend(q, k, v)                                              # (B, H, T, D)
            found.append([out, *torch.autograd.grad(out, (q, k, v), g)])
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*found, strict=True)))
    return worst


# On logarithmic axes a cost that grows with T is a line of slope 1, one that grows with T^2 a line of slope 2.
def plot(path, panels):
    """panels: {title: (xlabel, ylabel, {line: (x, y)})}; "tokens" get logarithmic axes."""
    from matplotlib.figure import Figure  # without pyplot: no window, so it works on a server
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="tight")
    for i, (title, (xlabel, ylabel, lines)) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(1, len(panels), i, xlabel=xlabel, ylabel=ylabel, title=title)
        for (label, (x, y)), style in zip(lines.items(), ("o-", "s--", "^:", "d-."), strict=False):
            ax.plot(x, y, style, label=label, markersize=5, markevery=max(1, len(x) // 10))
        if xlabel == "tokens":
            ticks = max((x for x, _ in lines.values()), key=len)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(ticks, map(str, ticks))
        ax.legend()
    figure.savefig(path)


def main(cfg):
    """Measure errors, train with and without the matrix, measure time and memory. -> the second model, or None."""
    lengths, began, model = [int(n) for n in cfg.lengths.split(",") if n], time.perf_counter(), None
    if min(cfg.n_head, cfg.n_kv_head, cfg.batch_size, cfg.block_size, cfg.max_steps + 1, *lengths) < 1 or (
            cfg.n_head % cfg.n_kv_head or cfg.n_embd % (2 * cfg.n_head) or cfg.attention not in ATTENTION):
        raise ValueError(f"n_kv_head must divide n_head, and 2 * n_head n_embd; numbers start at 1, max_steps at 0; "
                         f"attention is one of {', '.join(ATTENTION)}")
    forms = list(dict.fromkeys(["naive", cfg.attention, "tiled", "sdpa"]))
    results = dict(max_error={form: max_error(form, cfg.device) for form in forms}, val_loss={}, training_seconds={},
                   milliseconds={form: {} for form in forms}, peak_mb={form: {} for form in forms})
    print("largest error in float32:", *(f"{form} {error:.1e}" for form, error in results["max_error"].items()))
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    if cfg.max_steps:
        train_data, val_data, V, name = make_data(cfg)
        cfg, curves = dataclasses.replace(cfg, data=name, vocab_size=cfg.vocab_size or V), {}
        # Same first weights, same batches, another attention: the curves must lie on each other.
        for form in dict.fromkeys(("naive", cfg.attention)):
            torch.manual_seed(cfg.seed)
            one, start = dataclasses.replace(cfg, attention=form), time.perf_counter()
            model = TinyLlama(one).to(cfg.device)
            losses = fit(model, one, train_data, compute_loss, cfg.max_steps, cfg.lr)
            results["training_seconds"][form] = time.perf_counter() - start
            results["val_loss"][form] = evaluate(model, val_data, one)
            curves[form] = list(range(1, 1 + len(losses))), losses
            print(f"{form}: validation loss {results['val_loss'][form]:.4f} nats per character of {name} after "
                  f"{cfg.max_steps} steps of {cfg.block_size} tokens, {results['training_seconds'][form]:.0f} s")
        plot(out / "curve.png", {f"the same training with and without the matrix, {name}": (
            "step", "loss, nats per character", curves)})
    # How to read the figures: on two cores tiles win because the matrices of two heads do not fit into the processor's
    # caches. On an H200, where a tile takes less time than its call, tiles in Python lose to the matrix (of 128: 754 ms
    # against 22 at 8,192 tokens of 16 heads), and the kernels win (2.4 ms).
    for T in tqdm(lengths, "measure"):
        # 8,192 tokens of two heads are 0.5 GiB a matrix, and naive holds three to four of them.
        for form, (ms, mb) in measure(cfg, [f for f in forms if f != "naive" or T <= 8192], T).items():
            results["milliseconds"][form][T], results["peak_mb"][form][T] = ms, mb
            tqdm.write(f"{T:7,} tokens, forward + backward: {form:7}{ms:8.1f} ms{mb:8.0f} MB")
    if lengths:
        last = {form: times[lengths[-1]] for form, times in results["milliseconds"].items() if lengths[-1] in times}
        print(f"the fastest at {lengths[-1]:,} tokens is {min(last, key=last.get)}")
        time_lines, memory_lines = ({form: (list(figures), list(figures.values())) for form, figures in values.items()}
                                    for values in (results["milliseconds"], results["peak_mb"]))
        plot(out / "lengths.png", {"time, forward + backward": ("tokens", "milliseconds", time_lines),
                                   "memory above the inputs": ("tokens", "MB", memory_lines)})
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=results, seconds=time.perf_counter() - began,
        val_loss=results["val_loss"].get(cfg.attention))))
    print(f"see {out}")
    return model


def parse_config(argv=None):
    """Command line -> Config. Explicit flags win over --preset NAME, which wins over the defaults."""
    # Help texts are read from the source: a comment and a help string that say the same would drift apart.
    notes = dict(re.findall(r"^ {4}(\w+): \w+ = .*  # (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default=next(iter(PRESETS)), help="a set of defaults")
    for field in dataclasses.fields(Config):
        # Trap: type=bool makes "--resume False" true, because bool("False") is True. Booleans get --x and --no-x.
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=f"{notes[field.name]} [{field.default}]".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    return Config(**{**PRESETS[given.pop("preset")], **given})


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter prints "?" instead of a traceback
    try:
        main(parse_config())
    except (OSError, ValueError) as problem:  # wrong flags, files, network: one line, and nothing was overwritten
        sys.exit("error: " + " ".join(str(problem).split()))
