# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "safetensors>=0.4.3", "tiktoken>=0.7", "torch>=2.11",
#                 "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
DECODING AT THE SPEED OF MEMORY                  python kv_cache.py                 2 min on two CPU cores

Paper    Pope et al. 2022, Efficiently Scaling Transformer Inference, arXiv 2211.05102; grouped keys: Ainslie et al.
         2023, arXiv 2305.13245; sinks: Xiao et al. 2023, arXiv 2309.17453; joining batches: Yu et al. 2022, Orca, OSDI
Idea     To write one token a model reads every weight and every cached key and value once, and does a few operations
         with each: so memory sets the pace, and the bound is bytes / bandwidth. A ladder of eight rungs climbs towards
         it, and then makes the bytes fewer. In float32 every exact rung writes the same tokens.
Picture  none: read all T tokens again --> growing: keep k, v, append by copying --> static: into place --> gqa: H/K
         query heads share what is read --> compiled: one pass over each matrix --> int8: a quarter of the bytes -->
         int8-cache: also of keys and values --> window: the newest W tokens and the first few, in a ring
Symbols  B batch   T new tokens   P past tokens   S columns in sight   C n_embd   H query heads   K key/value heads
         (beams in beam_search)   D head_size   F ffn_size   V vocabulary   L layers   W window   N tokens to write
New here the caches, decode steps compiled into single passes, int8 weights and caches, a ring with sinks, rows of
         different lengths, a queue of prompts, the ruler (bytes / bandwidth). The model is llama3.py's
Not here paged caches, speculative decoding, int4, several GPUs
Expect   tokens per second behind 128 others, 111 MB of weights: none 16, growing 50, gqa 59, compiled 163, int8 346.
         --preset 125m, 400 MB: none 4, growing 21, gqa 22, compiled 60, int8 153; compiled is 77% of the bandwidth of
         31 GB/s, gqa 29%. --preset text: perplexity 5.1338 exact, 5.1335 with int8 weights, 5.1335 with an int8 cache
         too, 5.136 with a window of 64 and 4 sinks (results/kv_cache.json)
Asked    Why is writing slow when reading is fast?   How fast can it be?   What does copying cost?   Why does compiling
         help at all?   What may be rounded?   Why keep the first tokens?   Why is a padded batch slow?   (grep "# Q:")
"""
import argparse
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import functools
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

# The model needs torch alone. matplotlib, requests, tiktoken and safetensors are imported where they are used.
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --- 1. Config: every knob in one place ------------------------------------------------------------------------------
# A field is a flag (--n-layer 6), its comment is the help text, and the whole record travels in the checkpoint. Do not
# learn the fields by heart: each is explained where it is used. First reading: section 6 is what this file is about;
# sections 2 to 5 are llama3.py's and train the model that writes there.
#     python kv_cache.py                                  learn the names of numbers, write them on every rung, measure
#     python kv_cache.py --preset text                    the same with real text: what does rounding cost?
#     python kv_cache.py --preset 125m                    measure a real shape with random weights (also 1b, 8b)
#     python kv_cache.py --checkpoint DIR                 measure a Llama checkpoint in Hugging Face's layout
#     python kv_cache.py --load runs/kv_cache --prompt "40215=" --rung int8         write, on a rung of your choice
#     python kv_cache.py --resume                         go on after Ctrl-C, a crash or a power cut
RUNG_NAMES = "none growing static gqa compiled int8 int8-cache window".split()


@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    data: str = "numbers"             # numbers | auto | shakespeare | pydocs | path of a text | random: train nothing
    tokenizer: str = "char"           # for text: char, one id per character | gpt2, 50,257 ids
    out: str = "runs/kv_cache"        # folder for checkpoint, metrics, samples and pictures
    seed: int = 1337                  # decides initial weights, batches, dropout and samples
    device: str = "auto"              # auto (cuda if present, else cpu) | cpu | cuda | mps
    dtype: str = "auto"               # auto (float32; on cuda bfloat16) | float32 | bfloat16 | float64
    compile: bool = False             # torch.compile the training too (rungs compile by themselves)

    # What is measured.
    rung: str = "compiled"            # how to write: none growing static gqa compiled int8 int8-cache window
    contexts: str = "128,1024,4096"   # tokens in the cache when a step is timed; "" measures nothing
    checkpoint: str = ""              # folder with a Llama in Hugging Face's layout: measure this one, train nothing
    window: int = 64                  # newest tokens that the rung `window` keeps, the present one among them
    sinks: int = 4                    # first tokens that it never forgets

    # Shape: 104,512 parameters, enough for the names of numbers.
    block_size: int = 17              # longest context in tokens
    n_layer: int = 2                  # layers
    n_head: int = 4                   # query heads
    n_kv_head: int = 2                # key/value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 64                  # width of the residual stream
    head_size: int = 0                # numbers per head; 0 = n_embd / n_head
    ffn_size: int = 192               # width of the feed-forward layer
    vocab_size: int = 0               # 0 takes the tokenizer's; more pads it
    tie_weights: bool = False         # one table for embedding and head
    rope_theta: float = 10_000.0      # base of the rotation periods; 500,000 in Llama 3, for contexts of 8,192 and more
    rope_factor: float = 0.0          # stretch slow rotations by this (8 in Llama 3.1, 32 in 3.2); 0 = leave them
    rope_original: int = 8192         # context of the training before the stretching
    norm_eps: float = 1e-5            # added to the mean square in RMSNorm
    dropout: float = 0.0              # share of each branch zeroed in training; Llama has none
    init_std: float = 0.125           # std of the initial weights, about 1/sqrt(n_embd)

    # Optimisation: llama3.py's for the toy language.
    max_steps: int = 900              # optimizer steps
    batch_size: int = 128             # rows per micro-step, over all ranks
    grad_accum: int = 1               # micro-steps per optimizer step
    lr: float = 3e-3                  # peak learning rate
    min_lr_ratio: float = 0.0         # the last learning rate as a share of the peak
    warmup_steps: int = 100           # steps of linear warm-up
    weight_decay: float = 0.01        # on matrices and embeddings only
    beta2: float = 0.98               # memory of Adam's second moment: 0.98 looks back about 50 steps
    grad_clip: float = 1.0            # largest gradient norm
    eval_every: int = 150             # steps between passes over the whole validation split
    save_every: int = 500             # steps between checkpoints
    resume: bool = False              # continue the run in --out, bit for bit

    # Decoding.
    load: str = ""                    # run folder, checkpoint or Hugging Face folder to start from
    prompt: str = ""                  # text to continue; together with --load nothing is trained
    max_new_tokens: int = 10          # tokens to write
    temperature: float = 0.0          # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0                    # sample among the k likeliest only; 0 = all
    top_p: float = 1.0                # sample among the likeliest that together have probability p
    repetition_penalty: float = 1.0   # above 1: make tokens that were already there less likely
    beams: int = 1                    # above 1: beam search, without temperature, top-k, top-p, repetition penalty
    length_penalty: float = 1.0       # beam score = sum of log-probs / length ** this

    def __post_init__(self):
        # A bad value caught here costs a line; caught at step 500 it costs the run.
        for names, ok, rule in (
                ("block_size n_layer n_head n_kv_head n_embd ffn_size rope_original max_steps batch_size grad_accum "
                 "eval_every save_every max_new_tokens beams window", lambda x: x >= 1, "at least 1"),
                # `0 <= x < inf` and not `x < 0 or ...`: every comparison with nan is false, so nan fails as well
                ("seed", lambda x: 0 <= x < 2 ** 31, "in [0, 2^31)"),
                ("vocab_size head_size warmup_steps weight_decay temperature top_k sinks",
                 lambda x: 0 <= x < math.inf, "0 or more"),
                ("lr grad_clip init_std rope_theta norm_eps repetition_penalty", lambda x: 0 < x < math.inf, "above 0"),
                ("rope_factor", lambda x: x == 0 or 1 <= x < math.inf, "0, or at least 1"),
                ("length_penalty", math.isfinite, "a number"),
                ("dropout beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("min_lr_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
                ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
                ("rung", RUNG_NAMES.__contains__, " | ".join(RUNG_NAMES)),
                ("contexts", lambda x: re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", x), "numbers such as 128,1024"),
                ("tokenizer", ("char", "gpt2").__contains__, "char or gpt2"),
                ("device", ("auto", "cpu", "cuda", "mps").__contains__, "auto, cpu, cuda or mps"),
                ("dtype", ("auto", "float32", "bfloat16", "float64").__contains__,
                 "auto, float32, bfloat16 or float64")):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")
        # What two fields say together.
        if not self.head_size and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} cannot be split over n_head {self.n_head} heads")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} cannot be shared out over n_kv_head {self.n_kv_head}")
        if (self.head_size or self.n_embd // self.n_head) % 2:
            raise ValueError("head_size must be even: RoPE turns pairs of numbers")


# Shapes to measure, with random weights: the time of a step does not depend on what the numbers are. Wide weights
# (std 2/sqrt(C)), so that near ties are rare: in float32 all exact rungs then agree (bfloat16 rounds logits to 8 bits).
SMALL = dict(data="random", block_size=8192, n_layer=8, n_head=8, n_kv_head=4, n_embd=512, ffn_size=1408,
             vocab_size=8192, init_std=0.088)  # 111 MB to read per token: more than a processor's own caches hold
PRESETS = {
    "laptop": {},  # the defaults above: learn the toy language, then measure SMALL
    # Real text, to see what int8 and the window cost in perplexity.
    "text": dict(data="auto", block_size=256, n_layer=4, n_embd=128, ffn_size=384, init_std=0.088, max_steps=1500,
                 batch_size=4, min_lr_ratio=0.1, weight_decay=0.1, beta2=0.99, eval_every=250, max_new_tokens=200,
                 temperature=0.8),
    "125m": dict(SMALL, n_layer=12, n_head=12, n_embd=768, ffn_size=2048, vocab_size=32000, init_std=0.072),
    # Llama 3.2 1B and Llama 3 8B, but for their contexts and the stretching of RoPE, which change no time.
    "1b": dict(SMALL, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, ffn_size=8192, vocab_size=128256,
               init_std=0.044, rope_theta=500_000.0, tie_weights=True),
    "8b": dict(SMALL, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, ffn_size=14336, vocab_size=128256,
               init_std=0.031, rope_theta=500_000.0, dtype="bfloat16"),
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

# --- 2. Model: Llama 3, as in llama3.py -------------------------------------------------------------------------------
# First reading: go on at section 6. What matters here is where keys and values come from (GroupedQueryAttention) and
# that a cache is asked twice: where do these tokens stand (Llama.hidden), and what is there to look at (update).

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


# RoPE (Su et al. 2021, arXiv 2104.09864) in one picture. Take two of the D numbers of a query as a point in a plane and
# turn it by an angle that grows with its position; turn the key's two numbers by the angle of *its* position.
#
#     query at m    turned by m*w        <turn(q, m*w), turn(k, n*w)> = <q, turn(k, (n-m)*w)>
#     key   at n    turned by n*w        absolute angles go in, and only the distance n - m comes out
#
# q.k is the sum of these products over the D/2 planes: a score made of D/2 functions of the distance alone.
# D/2 such planes with D/2 speeds w, like the hands of a clock: the fastest turns 1 radian per token and tells
# neighbours apart, the slowest (theta 500,000, D = 128) needs 2.6 million tokens for a round and tells chapters apart.
def rope_frequencies(cfg):
    """-> (D/2) float32: radians per token of each plane, theta^(-2i/D), stretched as Llama 3.1 does if rope_factor > 0.

    Stretching (Llama 3.1's "llama3" form): the model was trained with 8,192 tokens. A plane that turns often within
    them has seen all its angles, and stays; one whose period is longer has not, and is slowed down by the factor, so
    that factor * 8,192 tokens (65,536 for 8, 262,144 for 32) show it no new angle; in between the two are mixed.
    """
    # In float32, whatever the model is. Trap: a buffer. model.to(bfloat16) rounds the speeds to 3 digits, and at token
    # 10,000 a plane is off by whole turns.
    i = torch.arange(0, cfg.head_size, 2, dtype=torch.float32, device="cpu")   # (D/2)
    speed = cfg.rope_theta ** (-i / cfg.head_size)                             # (D/2)
    if cfg.rope_factor == 0:
        return speed
    # periods = how often a plane turns within the original context: 4 and more stay, 1 and fewer are slowed down.
    periods = cfg.rope_original * speed / (2 * math.pi)                        # (D/2)
    keep = ((periods - 1) / (4 - 1)).clamp(0, 1)                               # (D/2)
    return keep * speed + (1 - keep) * speed / cfg.rope_factor                 # (D/2)


def rope_angles(positions, speed):
    """positions (..., T), speed (D/2) -> cos, sin (..., 1, T, D), to be used for all heads and layers of this pass."""
    # In float32: position 100,000 times a speed near 1 has 17 bits before the point; bfloat16 keeps 8 in all.
    angle = positions[..., None, :, None].float() * speed.to(positions.device)  # (..., 1, T, D/2)
    # Twice: x[i] and x[i + D/2] are the two numbers of one plane, and turn by one angle.
    angle = torch.cat((angle, angle), -1)                                      # (..., 1, T, D)
    return angle.cos(), angle.sin()


# Q: Half-split or interleaved: which two numbers make a plane?
# A: The paper and Meta's code pair (0, 1), (2, 3), ...; Hugging Face's layout, and ours, (0, D/2), (1, D/2 + 1), ...
#    It is a convention of the weights: permuting the rows of W_q and W_k alike changes no q.k. Weights read with the
#    wrong one are the commonest RoPE bug. Position 0 is not turned at all, so a first look at it finds nothing.
def apply_rope(x, cos, sin):
    """Turn each plane (x[i], x[i + D/2]) of x (B, H, T, D) by its angle; cos, sin broadcast to it -> (B, H, T, D).

    (a, b) -> (a cos - b sin, b cos + a sin): a rotation, so lengths stay and values (which are not turned) too.
    """
    a, b = x.chunk(2, -1)                                                      # (..., D/2)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)      # (..., D)


# A picture of the mask for T = S = 4 (x = may attend). Row t is a training exercise of its own, "given tokens 0..t,
# what is t+1": without the mask row t would find its answer in column t+1 and the loss would fall to 0 by copying.
#     key     0 1 2 3
#     query 0 x . . .
#           1 x x . .
#           2 x x x .
#           3 x x x x
def causal_mask(T, S, device=None):
    """(T, S) bool, True = may attend: query t is the (S-T+t)-th token and sees keys 0 .. S-T+t.

    With a cache there are more keys (S) than queries (T), and the triangle is aligned at the bottom right:
    T=2, S=4 gives [[1,1,1,0],[1,1,1,1]].
    """
    # tril(k) keeps column <= row + k. With k = S - T even query 0 sees the S - T tokens before it.
    # Trap: aligning at the top left (what is_causal=True does when T < S): query t then sees keys 0..t only, and a
    # single new token nothing but the first one. Symptom: good text without a cache, nonsense with it.
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)       # (T, S)


class GroupedQueryAttention(nn.Module):
    """H query heads share K key/value heads, H/K to each (GQA: Ainslie et al. 2023, arXiv 2305.13245). No biases.

    K = H is GPT-2's multi-head attention, K = 1 multi-query attention (Shazeer 2019, arXiv 1911.02150).
    """

    # Q: Why fewer keys and values, but not fewer queries?
    # A: Queries are used once and forgotten; keys and values stay in the cache, and every written token reads all of
    #    them. Llama-3-8B (H 32, K 8) keeps 128 KiB per token in bfloat16 instead of 512: a context of 8,192 tokens is 1
    #    GiB instead of 4. The loss suffers little, since heads can share what they look *at* and differ in what *for*.
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C, D = cfg, cfg.n_embd, cfg.head_size
        self.q_proj = nn.Linear(C, cfg.n_head * D, bias=False)
        self.k_proj = nn.Linear(C, cfg.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, cfg.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * D, C, bias=False)

    def forward(self, x, rope, mask=None, cache=None, layer=0):
        """x (B, T, C), rope = (cos, sin) -> (B, T, C). mask bool (.., T, S), or None: causal when T = S."""
        B, T, _ = x.shape
        # view(B, T, H, D) cuts the outputs into heads, transpose puts heads before time (see decoder_only.py).
        q = self.q_proj(x).view(B, T, self.cfg.n_head, -1).transpose(1, 2)     # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.cfg.n_kv_head, -1).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.cfg.n_kv_head, -1).transpose(1, 2)  # (B, K, T, D)
        # Turned before they are cached: a key's position never changes, so it is turned once and not at every step.
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)                      # (B, ..., T, D)
        if cache is not None:
            k, v = cache.update(layer, k, v)                                   # (B, ..., S, D) each
        # enable_gqa: query head h reads key head h // (H/K): neighbours share. Trap: repeat() instead of
        # repeat_interleave() pairs h with h % K; shapes fit, published weights give nonsense.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=self.cfg.n_kv_head < self.cfg.n_head)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                       # (B, T, C)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): F detectors, each with a valve (Shazeer 2020, arXiv 2002.05202)."""

    # Q: Why three matrices, and why is F not 4*C?
    # A: One says how far to open, one what to let through, one writes it back: a product of two views of x, which a
    #    plain layer cannot make. At equal size F is 2/3 of GPT-2's 4*C: 8/3*C (here 3*C: GQA has saved C*C
    #    weights a layer). silu(x) = x * sigmoid(x): a smooth ReLU, near 0 for x < -5, near x for x > 5.
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.ffn_size, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.ffn_size, bias=False)
        self.down_proj = nn.Linear(cfg.ffn_size, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))     # (B, T, C)


class LlamaLayer(nn.Module):
    """Read through a norm, add to the stream: x + self_attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = GroupedQueryAttention(cfg)
        # The published name says where the norm stands (behind the attention), not what it norms (the MLP's input).
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = SwiGLU(cfg)

    def forward(self, x, rope, mask=None, cache=None, layer=0):
        p, training = self.cfg.dropout, self.training
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache, layer), p, training)  # (B, T, C)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), p, training)  # (B, T, C)

# differs from llama3.py: a cache says itself where new tokens stand and what they may see
class Llama(nn.Module):
    """Llama 3. model(ids, mask=None, cache=None) -> logits (B, T, V). Module names are those of the published weights.

    Parameters: V*C (twice if the head is not tied) + L * (2*C*H*D + 2*C*K*D + 3*C*F + 2*C) + C.
    """

    def __init__(self, cfg):
        super().__init__()
        cfg.head_size = cfg.head_size or cfg.n_embd // cfg.n_head  # from here on the number itself, for the checkpoint
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(LlamaLayer(cfg) for _ in range(cfg.n_layer)),
            norm=RMSNorm(cfg.n_embd, cfg.norm_eps)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_weights:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # The last matrix of each branch is drawn smaller, so that 2L sums do not grow the stream.
                shrink = math.sqrt(2 * cfg.n_layer) if name.endswith(("o_proj", "down_proj")) else 1.0
                nn.init.normal_(module.weight, std=cfg.init_std / shrink)
        self.rope_speed = rope_frequencies(cfg)  # a plain tensor: no weight, not saved, not cast with the model

    def hidden(self, ids, mask=None, cache=None):
        """The stream behind the last norm, (B, T, C). Raises ValueError for more than block_size tokens, or (with a
        cache) for more than it has room for.

        mask (B, T) bool: which ids are real tokens; pads (filler that makes rows equally long) stand on either side.
        cache holds the past and takes in these T tokens, so that a prompt may come in pieces (chunked prefill).
        """
        T = ids.size(1)
        if cache is not None:
            positions, allowed = cache.admit(T, mask)                          # (..., T), (..., S) or None
        elif T > self.cfg.block_size:
            raise ValueError(f"{T} tokens, but this model was made for {self.cfg.block_size} (block_size)")
        elif mask is None:
            positions, allowed = torch.arange(T, device=ids.device), None      # (T)
        else:
            # A row's first real token has position 0 wherever it stands: count the real ones.
            positions = (mask.cumsum(1) - 1).clamp(min=0)                      # (B, T)
            allowed = causal_mask(T, T, ids.device) & mask[:, None, None, :]   # (B, 1, T, T)
        rope = rope_angles(positions, self.rope_speed)                         # (..., 1, T, D) each
        x = self.model.embed_tokens(ids)                                       # (B, T, C)
        for layer, block in enumerate(self.model.layers):
            x = block(x, rope, allowed, cache, layer)                          # (B, T, C)
        return self.model.norm(x)                                              # (B, T, C)

    def forward(self, ids, mask=None, cache=None):
        """ids (B, T) int64, mask (B, T) bool True = real token or None -> logits (B, T, V): row t scores token t+1."""
        return self.lm_head(self.hidden(ids, mask, cache))                     # (B, T, V)


def build_model(cfg):
    """A fresh model; its weights are a function of cfg alone, seed included."""
    torch.manual_seed(cfg.seed)
    return Llama(cfg)


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
    #    variance s^2 add s^2/2 to it. Here s^2 = C * init_std^2 = 1 (the head's input has norm sqrt(C)), so
    #    the first loss is about 4.67; with GPT-2's 0.02 at width 768 s^2 is 0.3. A first loss far above that says: the
    #    logits start too large.
    # cross_entropy = -ln softmax(logits)[target] = ln(sum of exp(logits)) - logits[target]; ln makes the unit the nat.
    # Under bfloat16 autocast PyTorch runs this one function in float32: a sum of 128,256 exponentials needs the digits.
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

# --- 6. Decoding: a ladder, from reading everything again to the speed of memory -------------------------------------
# To write a token, a model gives a distribution and something outside it chooses. The choosing (sample_next, generate,
# beam_search) is the same in every script; it asks for three functions: prefill, decode_step, reorder. Those are what
# changes from rung to rung. A rung is exact if it writes what rung 1 writes; a column is one place of a cache, the key
# and the value of one token.
#
# Q: Why is writing slow when reading is fast?
# A: A prompt of 1,000 tokens goes through each weight once: read 4 bytes, do 2,000 operations. A new token needs the
#    same 4 bytes for 2 operations, and waits for them: a core that reads 15 GB/s gets 4 billion numbers a second and
#    could do some 100 billion operations (two vectors of 16 numbers at 3 GHz). Reading is bound by arithmetic, writing
#    by memory; a batch of B rows shares each read.
#
# Q: How fast can it be?
# A: bytes per token / bandwidth. A Llama of 125 million parameters in float32 streams 400 MB per token (the embedding
#    table is not streamed: one row of it is looked up) and 25 kB for each token of its past. At 30 GB/s that makes 13
#    ms a token, 75 tokens a second; 8 billion in bfloat16 on a GPU of 4,300 GB/s: 15 GB, 287 tokens a second. For one
#    row no program can be faster without reading fewer bytes: smaller numbers, fewer heads, a shorter past; or several
#    tokens per pass, guessed by a small model and checked by the large one (speculative decoding, not here).

# Q: What does the KV cache save, and what does it cost?
# A: Without it, token n+1 recomputes all n tokens before it: about N^2/2 passes of a token for a text of N. The cost is
#    memory: 2 * L * K * D numbers a token. Llama-3.1-8B with its 131,072 tokens: 16 GiB in bfloat16, as much as the
#    weights.
# It is exact, because under the causal mask nothing that comes later changes a token's stream: its keys and values are
# final once computed, and its query is used in its own row only. (In a model that also looks to the right, each new
# token would change every older key above layer 0.) Prompt a b c, two tokens d e to write:
#
#     prefill      enter a b c at positions 0 1 2    the cache holds a b c      the logits behind c give d
#     decode_step  enter d     at position  3        the cache holds a b c d    those behind d give e, never entered
#
# A cache answers two calls of the model (section 2):
#     admit(T, mask)          once per pass: room for T new tokens -> their positions, and what they may see
#     update(layer, k, v)     once per layer: take in their keys and values -> all that this layer may look at
class Recompute:
    """Rung 1, no cache: the ids are all that is remembered, and each new token has the whole text read again."""

    # Reading P tokens costs P times the work of one: a text of N tokens N^2/2 in all. It is the definition that all
    # other rungs are tested against.
    def __init__(self, ids, mask):
        self.ids, self.mask = ids, mask

    def append(self, token):
        self.ids = torch.cat((self.ids, token[:, None]), 1)                    # (B, S)
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=True)                   # (B, S)

    def choose(self, rows):
        return Recompute(self.ids[rows], None if self.mask is None else self.mask[rows])


class GrowingCache:
    """Rung 2: keys and values are kept, and every new one is appended by torch.cat. One copy per query head.

    What a first implementation looks like, and the default of some libraries ("dynamic cache").
    """

    # Q: What does copying cost?
    # A: torch.cat allocates a new tensor and moves the whole past into it, for every token and layer; repeating the
    #    keys for H/K query heads writes them out H/K times. At 4,096 tokens the cache of the 125M shape is 100 MB:
    #    cat reads and writes it, the repetition reads it and writes 300 MB, attention reads those. Short contexts hide
    #    it behind the 400 MB of weights.
    def __init__(self, cfg, rows, max_len, like):
        self.parts = [like.new_zeros(2, rows, cfg.n_kv_head, 0, cfg.head_size) for _ in range(cfg.n_layer)]
        self.mask = torch.ones(rows, 0, dtype=torch.bool, device=like.device)  # (B, S) True = real token
        self.padded, self.max_len, self.group = False, max_len, cfg.n_head // cfg.n_kv_head

    def admit(self, T, mask=None):
        """Room for T more columns, mask (B, T) True = real. -> positions (T) or (B, T), allowed bool or None."""
        P, S = self.mask.size(1), self.mask.size(1) + T
        if S > self.max_len:
            raise ValueError(f"{S} tokens, and this cache was made for {self.max_len}")
        self.padded = self.padded or mask is not None
        new = self.mask.new_ones(len(self.mask), T) if mask is None else mask  # (B, T)
        self.mask = torch.cat((self.mask, new), 1)                             # (B, S)
        if not self.padded:
            # One new token sees all: no mask needed. Several behind a past (chunked prefill): a causal corner.
            # Trap: no mask there either. Each token of the chunk then sees its own future; logits look plausible.
            allowed = None if P == 0 or T == 1 else causal_mask(T, S, self.mask.device)
            return torch.arange(P, S, device=self.mask.device), allowed
        # Pads keep their columns and are masked; a row's first real token has position 0 wherever it stands.
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, P:]              # (B, T)
        return positions, causal_mask(T, S, self.mask.device) & self.mask[:, None, None, :]  # (B, T), (B, 1, T, S)

    def update(self, layer, k, v):
        """Append k, v (B, K, T, D) to one layer. -> all keys and values, repeated for the query heads."""
        both = self.parts[layer] = torch.cat((self.parts[layer], torch.stack((k, v))), 3)  # (2, B, K, S, D)
        # tuple() of a tensor walks along axis 0: keys, values, as they were stacked.
        return tuple(both.repeat_interleave(self.group, 2))                    # (B, H, S, D)

    def choose(self, rows):
        new = copy.copy(self)
        new.parts, new.mask = [part[:, rows] for part in self.parts], self.mask[rows]
        return new


# Rows of a batch have different lengths. Two ways to hold that:
#
#     left-padded (GrowingCache)       per-row lengths (KVCache)
#     . . . a b c d                    a b c d . . .         length 4, the next token goes to column 4
#     e f g h i j k                    e f g h i j k         length 7, the next token goes to column 7
#
# With lengths no column is wasted on pads in front, "may be seen" is one comparison (column <= position), and a row
# that has ended can be replaced by another prompt at any time (serve, below).
# differs from llama3.py: rows have lengths of their own, and new tokens are written where each row ends
class KVCache:
    """Rung 4: keys and values in buffers that are allocated once, one per key/value head, written in place.

    stores[layer] = (keys, values), (B, K, max_len + 1, D) each; lengths (B) int64: real tokens of each row.
    """

    # Trap: buffers in float32 under a bfloat16 model: twice the bytes, and products of mixed dtypes. `like` decides.
    # Trap: a cache that lives on the module. Two conversations then share it, and a test sees what the last one left.
    def __init__(self, cfg, rows, max_len, like):
        # One column more than needed: pads have to be written somewhere, and nobody may ever look there.
        shape = (rows, cfg.n_kv_head, max_len + 1, cfg.head_size)
        self.stores = [self.allocate(shape, like) for _ in range(cfg.n_layer)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)  # (B)
        # What Python knows without asking the device (a question would wait for everything before it):
        # longest: tokens of the longest row; even: all rows are equally long, so most masks can be left out; max_len:
        # tokens that may enter; size: columns for them (fewer in a ring); shown: columns that a pass looks at (S).
        self.max_len, self.size, self.longest, self.shown, self.even, self.graphs = max_len, max_len, 0, 0, True, {}

    def admit(self, T, mask=None):
        """Room for T more tokens, mask (B, T) True = real. -> positions (B, T), allowed (B, 1, T, S) or None."""
        first, new, count, longest = self.longest == 0, None, T, self.longest + T
        if mask is not None:
            # cumsum counts the real tokens of the chunk: . . a b -> 0 0 1 2, so a is the row's next token and b the
            # one behind it, wherever the pads stand.
            new, count, self.even = mask.cumsum(1) - 1, mask.sum(1), False     # (B, T), (B)
            longest = int((self.lengths + count).max())
        if longest > self.max_len:
            raise ValueError(f"{longest} tokens, and this cache was made for {self.max_len}")
        new = torch.arange(T, device=self.lengths.device) if new is None else new  # (..., T)
        positions = (self.lengths[:, None] + new).clamp(min=0)                 # (B, T)
        self.place(positions, mask)
        self.lengths += count
        self.longest, self.shown = longest, min(longest, self.size)
        if self.even and (T == 1 or first):
            return positions, None  # one token sees everything; a first chunk is plainly causal
        # A query sees the columns up to its own. That is causality, the past, and "no pads" in one comparison.
        columns = torch.arange(self.shown, device=self.lengths.device)         # (S)
        return positions, columns <= self.last[:, None, :, None]               # (B, T), (B, 1, T, S)

    def place(self, positions, mask):
        """Decide where new tokens go, (B, T), and what they see; noted on the cache for the rest of this pass."""
        # last: the last column that each new token may see. where: what write() wants behind k and v.
        self.last = positions                                                  # (B, T)
        self.where = (positions if mask is None else positions.masked_fill(~mask, self.size),)

    def update(self, layer, k, v):
        """Take in k, v (B, K, T, D) of one layer. -> all keys and values so far, (B, K, S, D) each."""
        self.write(self.stores[layer], k, v, *self.where)
        return self.read(self.stores[layer], self.shown)

    # allocate, write and read are plain functions of tensors; the compiled step below uses the last two as well.
    @staticmethod
    def allocate(shape, like):
        """-> the buffers of one layer."""
        return like.new_zeros(shape), like.new_zeros(shape)

    @staticmethod
    def write(store, k, v, columns):
        """Put k, v (B, K, T, D) into the columns (B, T) of a store."""
        rows = torch.arange(len(k), device=k.device)[:, None]                  # (B, 1)
        for buffer, new in zip(store, (k, v), strict=True):
            # Indexed with (B, 1) and (B, T) on axes 0 and 2, a slice between: the common shape of the indices comes
            # first, then what is left of the axes: (B, T, K, D).
            buffer[rows, :, columns] = new.transpose(1, 2)

    @staticmethod
    def read(store, shown):
        """-> keys, values (B, K, S, D): views, nothing is copied."""
        return tuple(buffer[:, :, :shown] for buffer in store)                 # (B, K, S, D)

    def choose(self, rows):
        """-> the cache whose row i is the old row rows[i]."""
        new = copy.copy(self)
        new.stores = [tuple(buffer[rows] for buffer in store) for store in self.stores]
        new.lengths, new.graphs = self.lengths[rows], None  # recorded graphs know the old memory
        return new

    def adopt(self, row, other):
        """Replace one row by the only row of another cache."""
        for ours, theirs in zip(self.stores, other.stores, strict=True):
            for buffer, new in zip(ours, theirs, strict=True):
                buffer[row] = new[0]
        self.lengths[row] = other.lengths[0]
        self.longest, self.even = max(self.longest, other.longest), False

    def forget(self, row):
        """Make a row empty. It goes on being computed, for nobody: the shapes stay."""
        self.lengths[row] = 0
        self.longest, self.even = int(self.lengths.max()), False


# Rung 3 stands behind rung 4 because it is rung 4 with a copy more. Where the weights outweigh the cache, writing in
# place saves next to nothing: look at the far end of ladder.png.
class StaticCache(KVCache):
    """Rung 3: in place, but keys and values are still repeated for every query head, as if K were H."""

    # GroupedQueryAttention takes either: with H keys its groups have one member. K*S*D numbers are read and H*S*D
    # written and read again, at every step.
    def __init__(self, cfg, rows, max_len, like):
        super().__init__(cfg, rows, max_len, like)
        self.group = cfg.n_head // cfg.n_kv_head

    def update(self, layer, k, v):
        return tuple(x.repeat_interleave(self.group, 1) for x in super().update(layer, k, v))  # (B, H, S, D)


# Q: What may be rounded?
# A: Weights: 8 bits with one scale per row change a logit by a percent or so of its spread, because the errors of
#    hundreds of products average out. Keys and values: one scale per token and head, so that a token with large
#    values rounds nobody else's. Activations are another matter (in large models a few channels are a hundred times
#    larger than the rest, and would take the digits from all others), and they are not what is slow.
def to_int8(x):
    """x (..., n) -> (int8 of the same shape, scale (..., 1)): x is about int8 * scale. The largest |x| becomes 127."""
    # symmetric: 0 stays 0, no offset to carry. Trap: one scale for the whole matrix. A single large weight then costs
    # every row its digits: with std 1 and one weight of 20 a step is 0.16, and most weights are below 1.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # in bfloat16 x / scale would be rounded twice
    scale = (wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127).to(x.dtype)  # (..., 1)
    return (wide / scale).round().to(torch.int8), scale


class Int8Cache(KVCache):
    """Rung 7: keys and values in 8 bits, one scale per token and head: 1 + 4/D bytes a number instead of 4.

    (In bfloat16 1 + 2/D instead of 2.)
    """

    @staticmethod
    def allocate(shape, like):
        numbers = [like.new_zeros(shape, dtype=torch.int8) for _ in range(2)]
        return *numbers, *(like.new_zeros(*shape[:-1], 1) for _ in range(2))

    @staticmethod
    def write(store, k, v, columns):
        rows = torch.arange(len(k), device=k.device)[:, None]                  # (B, 1)
        for numbers, scales, new in zip(store[:2], store[2:], (k, v), strict=True):
            rounded, scale = to_int8(new)                                      # (B, K, T, D), (B, K, T, 1)
            numbers[rows, :, columns], scales[rows, :, columns] = rounded.transpose(1, 2), scale.transpose(1, 2)

    @staticmethod
    def read(store, shown):
        # In eager mode this writes out all keys in full width and gains nothing. Compiled, the multiplication happens
        # in the loop that reads: a quarter of the bytes arrives, and nothing else is ever stored.
        return tuple(numbers[:, :, :shown] * scales[:, :, :shown]              # (B, K, S, D)
                     for numbers, scales in zip(store[:2], store[2:], strict=True))


# Q: Why keep the first tokens?
# A: A softmax has to put its weight somewhere, also when nothing is worth looking at, and models learn to put it on the
#    first tokens, which everybody sees. A plain window drops them, and perplexity jumps when token 0 leaves it, though
#    its content hardly matters. Four "attention sinks" that stay cure it (Xiao et al. 2023, arXiv 2309.17453).
#
# sinks 2, window 4, after token 8:      column    0   1 | 2   3   4   5
#                                        token     0   1 | 6   7   8   5          9 will overwrite 5
# The order of columns does not matter: attention is a sum, and each key carries its position as an angle.
class WindowCache(KVCache):
    """Rung 8: a ring. The newest W tokens (the present one among them) and the first `sinks` ones, whatever the length.

    Exact as long as the text fits; afterwards a different model, which sees less, at constant cost.
    """

    def __init__(self, cfg, rows, max_len, like):
        self.sinks, self.window, self.speed = cfg.sinks, cfg.window, rope_frequencies(cfg).to(like.device)
        super().__init__(cfg, rows, cfg.sinks + cfg.window, like)
        self.max_len = math.inf  # a ring is never full
        # The sinks' keys once more, as they were first written, and a last column for what is no sink.
        self.stores = [(k, v, like.new_zeros(rows, cfg.n_kv_head, cfg.sinks + 1, cfg.head_size))
                       for k, v in self.stores]

    def place(self, positions, mask):
        # A chunk that overwrites the ring would destroy keys that its own first tokens still see. A single token never
        # does: what it overwrites has just left its window.
        if positions.size(1) > 1 and self.longest + positions.size(1) > self.size:
            raise ValueError(f"more than {self.size} tokens enter a ring one by one only")
        ring = self.sinks + (positions - self.sinks) % self.window             # (B, T)
        columns = torch.where(positions < self.sinks, positions, ring)         # (B, T)
        columns = columns if mask is None else columns.masked_fill(~mask, self.size)  # (B, T)
        self.last = positions.clamp(max=self.size - 1)                         # (B, T)
        # Trap: leaving the sinks their old angles. Their distance then grows with the text, beyond what the model was
        # trained on. They move along instead: once the ring is full, sink c always stands at distance size-1 - c.
        shift = (positions[:, -1:] - self.last[:, -1:])                        # (B, 1)
        self.where = (columns, *rope_angles(shift, self.speed))

    @staticmethod
    def write(store, k, v, columns, cos, sin):
        keys, values, sinks = store
        KVCache.write((keys, values), k, v, columns)
        end = sinks.size(2) - 1
        # Turned anew from the original at every step: turning the turned ones a bit further would add up roundings.
        # Angles add: the key of sink c, turned by c when it was made and by shift now, is a key at position c + shift.
        # What is no sink goes to column `end`, which nobody reads.
        rows = torch.arange(len(k), device=k.device)[:, None]                  # (B, 1)
        sinks[rows, :, columns.clamp(max=end)] = k.transpose(1, 2)
        keys[:, :, :end] = apply_rope(sinks[:, :, :end], cos, sin)

    @staticmethod
    def read(store, shown):
        return KVCache.read(store[:2], shown)


# name -> (cache, one compiled pass per layer, int8 weights). The first five are exact.
RUNGS = {"none": (Recompute, False, False), "growing": (GrowingCache, False, False),
         "static": (StaticCache, False, False), "gqa": (KVCache, False, False), "compiled": (KVCache, True, False),
         "int8": (KVCache, True, True), "int8-cache": (Int8Cache, True, True), "window": (WindowCache, True, False)}


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight (out, in) is int8 with one scale per row."""

    def __init__(self, linear):
        super().__init__()
        weight, scale = to_int8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])

    def forward(self, x):
        # Reading the prompt is bound by arithmetic: the full-width copy of one matrix costs little there. The scale
        # belongs to a row of W, so it can be applied to the output: `out` multiplications and not out*in.
        return F.linear(x, self.weight.to(x.dtype)) * self.scale               # (..., out)


def on_rung(model, rung):
    """-> a model that decodes on this rung. Weights are shared with `model`, except where they become int8."""
    # deepcopy with a memo that already holds the parameters: modules are copied, weights are not.
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo[id(model.cfg)] = dataclasses.replace(model.cfg, rung=rung)
    new = copy.deepcopy(model, memo).eval()
    if RUNGS[rung][2]:
        # The embedding stays as it is: one row per token is looked up, nobody streams it.
        for module in list(new.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
    return new


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


# Q: Why does compiling help at all, when a library does the products?
# A: For one row the library's routine leaves bandwidth unused (it is made for matrices): whole steps with it reach a
#    third of what a plain sum reads, compiled ones three quarters (125M shape, results/peers_kv_cache.json). Written as
#    (W * x).sum(-1) and compiled, W passes through the registers once, and conversion from int8, scale and gate join
#    that loop instead of making passes of their own. On a GPU a step is then replayed as one graph: for small models,
#    launching its few hundred kernels one by one takes longer than running them.
def product(x, weight):
    """x (B, in), weight (out, in) or the pair (int8 (out, in), scale (out)) -> x weight^T (B, out)."""
    weight, scale = weight if isinstance(weight, tuple) else (weight, None)
    # 8: a float32 copy of an int8 matrix moves 1 + 4 + 4 bytes a number (read, written, read again), a pass over it 1.
    if len(x) > (1 if scale is None else 8):
        # Several rows share each read, and arithmetic counts again: the library's ground.
        y = times(x, weight.to(x.dtype))                                       # (B, out)
    else:
        # Trap: without a compiler this line writes out W * x before it sums, and is many times slower than F.linear.
        wide = torch.promote_types(x.dtype, torch.float32)  # sums of hundreds of bfloat16 products need float32
        y = torch.stack([(weight.to(wide) * row).sum(-1) for row in x.to(wide)]).to(x.dtype)  # (B, out)
    return y if scale is None else y * scale.to(y.dtype)                       # (B, out)


# Rung 5: LlamaLayer once more, written out so that a compiler can fuse it. Rung 6: the same with int8 weights. A step
# takes bytes / bandwidth and some fixed time that no rounding shortens: a quarter of the bytes is not 4 x the speed.
def layer_step(x, weights, kind, store, where, last, columns, rope, eps):
    """LlamaLayer for one new token per row, as one function of tensors: x (B, C) -> (B, C).

    store, where: this layer's buffers and the place of the new token in them; kind: the cache class that can write and
    read them. last (B, 1): the last column that a row may see; columns = 0 .. S-1.
    """
    norm1, q, k, v, o, norm2, gate, up, down = weights
    B, K, D = len(x), store[0].size(1), store[0].size(3)
    h = norm1 * F.rms_norm(x, x.shape[-1:], eps=eps)                           # (B, C)
    q, k, v = (product(h, weight).view(B, -1, 1, D) for weight in (q, k, v))   # (B, ..., 1, D)
    H = q.size(1)
    q, k = apply_rope(torch.cat((q, k), 1), *rope).split((H, K), 1)            # (B, ..., 1, D) both turned in one go
    kind.write(store, k, v, *where)
    keys, values = kind.read(store, columns.size(0))                             # (B, K, S, D)
    # The H/K query heads of a group stand beside each other and read the same keys, without a copy of them. Sums again
    # and no products of the library, so that reading int8 and multiplying happen in one loop.
    q = q.reshape(B, K, -1, 1, D) / math.sqrt(D)                                 # (B, K, H/K, 1, D)
    scores = (q * keys[:, :, None]).sum(-1).masked_fill(columns > last[:, :, None, None], -math.inf)  # (B, K, H/K, S)
    y = (scores.softmax(-1)[..., None] * values[:, :, None]).sum(-2)           # (B, K, H/K, D)
    x = x + product(y.reshape(B, -1), o)                                       # (B, C)
    h = norm2 * F.rms_norm(x, x.shape[-1:], eps=eps)                           # (B, C)
    return x + product(F.silu(product(h, gate)) * product(h, up), down)        # (B, C)


def head_step(x, norm, head, eps):
    """The last norm and the head: x (B, C) -> logits (B, V)."""
    return product(norm * F.rms_norm(x, x.shape[-1:], eps=eps), head)          # (B, V)


@functools.cache
def compiled(function):
    """torch.compile(function); without a compiler None, and one line about it."""
    # One layer is compiled and called L times: seconds of waiting instead of a minute for the unrolled whole.
    if not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        print("no C++ compiler found: compiled rungs run uncompiled, at the speed of the rung gqa or below")
        return None
    # Each kind of cache, number of rows and dtype is a version of its own; after 8 of them torch would give up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Fusing may go too far: the norm would be worked out anew inside each row of the product that reads it. An
    # intermediate result with several inputs is to be stored. And shapes are checked when a version is chosen; once per
    # call is enough.
    return torch.compile(function, options={"realize_reads_threshold": 1, "size_asserts": False})


def weights_of(model):
    """-> the weights of each layer and of the head in the order in which a step uses them; int8 ones with scales."""
    def get(module):
        return (module.weight, module.scale) if isinstance(module, Int8Linear) else module.weight.detach()
    layers = [tuple(get(part) for part in (
        layer.input_layernorm, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
        layer.self_attn.o_proj, layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj,
        layer.mlp.down_proj)) for layer in model.model.layers]
    return layers, get(model.model.norm), get(model.lm_head)


def compiled_step(model, token, cache, shown=0):
    """One token (B) per row through the compiled layers. -> logits (B, V). shown: columns to look at, 0 = as needed."""
    layers, norm, head = cache.weights
    positions, _ = cache.admit(1)                                              # (B, 1), (B, 1, 1, S)
    rope = rope_angles(positions, model.rope_speed)                            # (B, 1, 1, D) each
    columns = torch.arange(shown or cache.shown, device=token.device)          # (S)
    if len(columns) > 1:
        torch._dynamo.mark_dynamic(columns, 0)  # it grows with every token: one version for all lengths
    x = model.model.embed_tokens(token).detach()                               # (B, C)
    for weights, store in zip(layers, cache.stores, strict=True):
        x = compiled(layer_step)(x, weights, type(cache), store, cache.where, cache.last, columns, rope,
                                 model.cfg.norm_eps)                           # (B, C)
    return compiled(head_step)(x, norm, head, model.cfg.norm_eps)              # (B, V)


def replayed_step(model, token, cache):
    """compiled_step on CUDA, recorded once as a graph and then replayed: one launch instead of hundreds."""
    # kernel: one loop started on the GPU by the CPU. graph: a recorded list of such starts, sent with one call.
    # A graph repeats the same kernels on the same memory. So the token goes into a fixed buffer, lengths are counted on
    # the device, and the number of columns is rounded up to 256: one graph serves until it is full.
    if cache.longest + 1 > cache.max_len:
        raise ValueError(f"{cache.longest + 1} tokens, and this cache was made for {cache.max_len}")
    shown = min(-(-(cache.longest + 1) // 256) * 256, cache.size)
    if shown not in cache.graphs:
        lengths, longest, buffer = cache.lengths.clone(), cache.longest, token.clone()
        compiled_step(model, buffer, cache, shown)  # compiles; what it wrote is written once more below
        cache.lengths.copy_(lengths)
        cache.longest, graph = longest, torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):  # records, runs nothing
            logits = compiled_step(model, buffer, cache, shown)                # (B, V)
        cache.longest = longest
        cache.graphs[shown] = graph, buffer, logits
    graph, buffer, logits = cache.graphs[shown]
    buffer.copy_(token)
    graph.replay()
    cache.longest += 1
    cache.shown = min(cache.longest, cache.size)
    return logits.clone()  # the next replay writes into the same memory


# generate() and beam_search() know no architecture. They ask for three things, which every model defines for itself:
# prefill (read the prompt), decode_step (append one token), reorder (choose rows); `state` is whatever those need.
def new_cache(model, rows, max_len):
    """An empty cache of the model's rung."""
    kind, one_pass, _ = RUNGS[model.cfg.rung]
    cache = kind(model.cfg, rows, max_len, like=model.model.norm.weight.detach())
    if one_pass:
        model.rope_speed = model.rope_speed.to(cache.lengths.device)  # a graph being recorded cannot copy from the CPU
        cache.weights = weights_of(model)  # looked up once; references, no copies
        for store in cache.stores:
            for buffer in store[:2]:
                torch._dynamo.mark_dynamic(buffer, 2)  # one version for all sizes
    return cache


def pieces(cache, T):
    """How T tokens may enter a cache: at once; into a ring only what fits, and the rest one by one. -> [(from, to)]"""
    if not isinstance(cache, WindowCache) or cache.longest + T <= cache.size:
        return [(0, T)]
    fits = max(0, cache.size - cache.longest)
    return [(0, fits)] * (fits > 0) + [(t, t + 1) for t in range(fits, T)]


@torch.no_grad()
def prefill(model, ids, mask, max_len):
    """Read the prompts. ids (B, T), mask (B, T) bool or None -> (logits (B, V) behind each row's last token, cache).

    Raises ValueError for an empty prompt, and when max_len is more than block_size and the rung is not `window`.
    """
    B, T = ids.shape
    if T == 0 or mask is not None and not bool(mask.any(1).all()):
        raise ValueError("an empty prompt: there is nothing that the next token could follow")
    if max_len > model.cfg.block_size and model.cfg.rung != "window":
        raise ValueError(f"{max_len} tokens, but this model was made for {model.cfg.block_size} (block_size); "
                         f"the rung `window` has no end")
    mask = None if mask is None or bool(mask.all()) else mask
    # Where each row ends. Trap: taking column T-1 of a batch that is padded on the right: the model then continues a
    # pad. Symptom: the longest row is fine, all others talk nonsense.
    last = ids.new_full((B,), T - 1) if mask is None else T - 1 - mask.flip(1).int().argmax(1)  # (B)
    if model.cfg.rung == "none":
        return decode_all(model, Recompute(ids, mask), last)
    cache, x, rows = new_cache(model, B, max_len), None, torch.arange(B, device=ids.device)
    for start, end in pieces(cache, T):
        hidden = model.hidden(ids[:, start:end], None if mask is None else mask[:, start:end], cache)  # (B, ..., C)
        here = hidden[rows, (last - start).clamp(0, end - start - 1)]          # (B, C)
        # A row's last token may be in any piece: take its stream from the piece that has it.
        x = here if x is None else torch.where((last >= start)[:, None] & (last < end)[:, None], here, x)  # (B, C)
    return model.lm_head(x), cache  # V logits for B positions and not for B*T


def decode_all(model, state, last):
    """Rung 1: the whole text through the model; row b's logits are those at column last[b]."""
    x = model.hidden(state.ids, state.mask)                                    # (B, S, C)
    return model.lm_head(x[torch.arange(len(x), device=x.device), last]), state


@torch.no_grad()
def decode_step(model, token, cache):
    """Append one token (B) per row. -> (logits (B, V), cache)."""
    if isinstance(cache, Recompute):
        cache.append(token)
        return decode_all(model, cache, torch.full_like(token, cache.ids.size(1) - 1))
    # With many rows each weight that arrives is used many times: arithmetic counts, and the library is good at it.
    if RUNGS[model.cfg.rung][1] and len(token) <= 16 and compiled(layer_step):
        if token.is_cuda and cache.graphs is not None:
            return replayed_step(model, token, cache), cache
        return compiled_step(model, token, cache), cache
    return model.lm_head(model.hidden(token[:, None], cache=cache)[:, -1]), cache


def reorder(cache, rows):
    """-> the cache whose row i is the old row rows[i]. Beam search copies good rows over bad ones with it."""
    return cache.choose(rows)


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


# Q: Why is a padded batch slow, although it shares every read of the weights?
# A: It runs until its longest row ends, and the finished rows are computed for nobody: with lengths drawn uniformly
#    up to N that is 3/8 of the work at 4 rows, towards half with more. Letting the next prompt into a free row at once
#    keeps all rows busy ("continuous batching": Yu et al. 2022, Orca, OSDI). Rows then have different ages, which is
#    why each has a length of its own.
@torch.no_grad()
def serve(model, prompts, max_new_tokens, *, slots=4, eos_ids=()):
    """Greedy answers to a queue of prompts (lists of ids), `slots` rows at a time. -> (lists of new ids, decode steps).

    An answer ends with an EOS or after max_new_tokens. The tokens are those of one prompt at a time. For rungs with
    per-row lengths (all but none and growing).
    """
    if slots < 1 or max_new_tokens < 1 or model.cfg.rung in ("none", "growing"):
        raise ValueError("a queue needs slots and max_new_tokens of 1 or more, and a rung with per-row lengths")
    if not prompts:
        return [], 0
    model.eval()
    waiting, answers, steps = list(range(len(prompts)))[::-1], [[] for _ in prompts], 0
    max_len = max(map(len, prompts)) + max_new_tokens
    device = next(model.parameters()).device
    cache, owner = new_cache(model, slots, max_len), [None] * slots
    token = torch.zeros(slots, dtype=torch.int64, device=device)               # (B)
    while True:
        for row in range(slots):
            while owner[row] is None and waiting:
                # The newcomer's prompt is read alone, into a cache of its own, which then becomes the row.
                owner[row] = waiting.pop()
                logits, alone = prefill(model, torch.tensor([prompts[owner[row]]], device=device), None, max_len)
                cache.adopt(row, alone)
                token[row] = logits[0].argmax()
                end_of_row(cache, row, int(token[row]), owner, answers, max_new_tokens, eos_ids)
        if all(name is None for name in owner):
            return answers, steps
        logits, cache = decode_step(model, token, cache)
        steps, token = steps + 1, logits.argmax(-1)                            # (B)
        for row, new in enumerate(token.tolist()):
            if owner[row] is None:
                cache.forget(row)  # an idle row would grow out of its buffer
            else:
                end_of_row(cache, row, new, owner, answers, max_new_tokens, eos_ids)


def end_of_row(cache, row, new, owner, answers, max_new_tokens, eos_ids):
    """Note a new token; if the answer ends with it, free the row."""
    answer = answers[owner[row]]
    answer.append(new)
    if new in eos_ids or len(answer) == max_new_tokens:
        owner[row] = None
        cache.forget(row)


# --- 7. Interchange: published weights in and out --------------------------------------------------------------------
#     model.embed_tokens.weight (V, C)      model.layers.0.self_attn.q_proj.weight (H*D, C)      .k_proj.weight (K*D, C)
#     model.layers.0.mlp.gate_proj.weight (F, C)     model.layers.0.input_layernorm.weight (C)     lm_head.weight (V, C)
# Our names are Hugging Face's.
def config_from_hf(hf):
    """config.json (a dict) -> Config. Raises ValueError for a model that is not Llama 3 as built here."""
    # Each of these changes the arithmetic without changing a single shape: better refused than silently wrong.
    for key, expected in (("model_type", "llama"), ("hidden_act", "silu"), ("attention_bias", False),
                          ("mlp_bias", False)):
        if hf.get(key, expected) != expected:
            raise ValueError(f"config.json says {key} = {hf[key]!r}; this file implements {expected!r} only")
    # Older files: rope_theta and rope_scaling; newer ones: both in rope_parameters.
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0)} | (hf.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json says rope_type = {kind!r}; this file implements 'default' and 'llama3'")
    if kind == "llama3" and (rope.get("low_freq_factor", 1), rope.get("high_freq_factor", 4)) != (1, 4):
        raise ValueError("config.json: this file implements low_freq_factor 1 and high_freq_factor 4 only")
    return Config(block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"],
                  n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"], n_embd=hf["hidden_size"],
                  n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"],
                  head_size=hf.get("head_dim") or 0, ffn_size=hf["intermediate_size"],
                  rope_theta=float(rope.get("rope_theta", 10_000.0)),
                  rope_factor=float(rope["factor"]) if kind == "llama3" else 0.0,
                  rope_original=rope.get("original_max_position_embeddings", 8192),
                  norm_eps=hf.get("rms_norm_eps", 1e-6),
                  tie_weights=hf.get("tie_word_embeddings", False), init_std=hf.get("initializer_range", 0.02),
                  tokenizer="char")


def config_to_hf(cfg):
    """Config -> the dict of config.json that transformers' LlamaForCausalLM expects."""
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_factor:
        rope |= {"rope_type": "llama3", "factor": cfg.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": cfg.rope_original}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "max_position_embeddings": cfg.block_size, "vocab_size": cfg.vocab_size, "hidden_size": cfg.n_embd,
            "intermediate_size": cfg.ffn_size, "num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head,
            "num_key_value_heads": cfg.n_kv_head, "head_dim": cfg.head_size, "rms_norm_eps": cfg.norm_eps,
            "attention_bias": False, "mlp_bias": False, "rope_parameters": rope, "rope_theta": cfg.rope_theta,
            # Trap: leaving these out. transformers then fills in 1 and 2, which are letters in a model of characters.
            "bos_token_id": 128000 if cfg.vocab_size == 128256 else None,
            "eos_token_id": [128001, 128008, 128009] if cfg.vocab_size == 128256 else None,
            "initializer_range": cfg.init_std, "tie_word_embeddings": cfg.tie_weights}


def import_weights(model, tensors):
    """Fill the model from published tensors {name: tensor}. A missing, unknown or misshapen one raises ValueError."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.cfg.tie_weights and "model.embed_tokens.weight" in found:  # a tied head may be stored once or twice
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
        if not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]):
            raise ValueError("config.json says that the head is tied, and lm_head.weight differs from the embedding")
    # What is missing, then what is unknown; the first one is what helps.
    wanted = model.state_dict()
    for name in sorted(wanted.keys() ^ found.keys(), key=lambda name: (name == "lm_head.weight", name)):
        raise ValueError(f"the weights have no tensor {name}" if name in wanted else f"Llama has no tensor {name}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            turned = " (transposed?)" if tensor.shape[::-1] == wanted[name].shape else ""
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}{turned}")
    model.load_state_dict(found, assign=True)  # takes the tensors themselves: no second copy of the weights
    if model.cfg.tie_weights:
        model.lm_head.weight = model.model.embed_tokens.weight  # assigning made them two; one again


def export_weights(model):
    """-> {published name: tensor}, a tied head stored once."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}


# differs from llama3.py: a folder in Hugging Face's layout only
def from_pretrained(path):
    """A folder with config.json and model.safetensors (or shards and their index) -> (model in eval mode, its Config).

    Raises OSError if a file is missing, ValueError if it is not a Llama.
    """
    # The model is built on the "meta" device (shapes without memory), the files are mapped, and assign=True puts the
    # mapped tensors into the model instead of copying them: the size of the weights once, not three times.
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = Path(path)
    cfg = config_from_hf(json.loads((folder / "config.json").read_text()))
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    try:
        tensors = {name: tensor for file in names for name, tensor in load_file(folder / file).items()}
    except SafetensorError as problem:
        raise ValueError(f"a file of weights in {folder} is damaged ({problem})") from problem
    with torch.device("meta"):
        model = build_model(cfg)
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


# differs from llama3.py: tokenizers of this file only; to measure, no tokenizer is needed
def load_tokenizer(path):
    """The tokenizer of a folder, from its tokenizer_spec.json."""
    if not (Path(path) / "tokenizer_spec.json").is_file():
        raise FileNotFoundError(f"{path} has no tokenizer_spec.json; --checkpoint measures a model without its words")
    return make_tokenizer(json.loads((Path(path) / "tokenizer_spec.json").read_text()))


# --- 8. Main: train, climb, measure ----------------------------------------------------------------------------------
# differs from llama3.py: random weights are only measured, once as they are and once in int8
def memory_gb(cfg, parameters):
    """{what: GB} that one process needs: to train in float32, or to measure random weights."""
    if cfg.data == "random":
        on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
        size = {"bfloat16": 2, "float32": 4, "float64": 8, "auto": 2 if on_gpu else 4}[cfg.dtype]
        longest = max(map(int, cfg.contexts.split(","))) if cfg.contexts else 0
        D = cfg.head_size or cfg.n_embd // cfg.n_head
        # All rungs are alive at once, so that they can take turns.
        caches = 2 * cfg.n_layer * D * longest * size * 6 * cfg.n_kv_head
        return {"weights": 1e-9 * parameters * size, "int8 copy": 1e-9 * parameters, "caches": 1e-9 * caches}
    tokens, D = cfg.batch_size // ranks()[1] * cfg.block_size, cfg.head_size or cfg.n_embd // cfg.n_head
    # Kept for the backward pass, per token and layer: input, normed and weighted output of the two norms, the turned q
    # and what attention returns, the turned k, v, and the four sides of the gate; three rows of V around the loss.
    kept = 6 * cfg.n_embd + 2 * cfg.n_head * D + 2 * cfg.n_kv_head * D + 4 * cfg.ffn_size
    kept = cfg.n_layer * kept + 3 * cfg.vocab_size
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


# differs from llama3.py: folders only, and this file's tokenizers
def load_any(cfg):
    """--load: our checkpoint (a file, or the run folder around it) or a Llama folder. -> (model, cfg, tokenizer).

    The shape of the model comes from what is loaded, everything else from the command line.
    """
    # shape: what the weights were made with; another value does not fit them, or means something else. free: the rest.
    shape = set("block_size n_layer n_head n_kv_head n_embd head_size ffn_size vocab_size tie_weights rope_theta "
                "rope_factor rope_original norm_eps tokenizer init_std".split())
    free = {field.name for field in dataclasses.fields(cfg)} - shape
    path = Path(cfg.load)
    path = path / "ckpt.pt" if (path / "ckpt.pt").is_file() else path
    if path.is_file():
        state = read_checkpoint(path)
        cfg = recorded_config(cfg, state["config"], free)
        model = build_model(cfg)
        load_checkpoint(path, model, None, cfg)
        return model.eval(), cfg, make_tokenizer(state["extra"]["tokenizer"])
    try:
        model, theirs = from_pretrained(cfg.load)
        tokenizer = load_tokenizer(cfg.load)
    except Exception as problem:  # json, zip, pickle, safetensors: a foreign file has many ways to be wrong
        sys.exit(f"error: --load {cfg.load}: no run, no checkpoint and no Llama folder with a tokenizer of ours "
                 f"({' '.join(str(problem).split())[:200]})")
    theirs.tokenizer = "gpt2" if tokenizer.spec["kind"] == "gpt2" else "char"
    cfg = recorded_config(cfg, dataclasses.asdict(theirs), free)
    # All modules hold this one record: what the command line chose has to reach it.
    model.cfg.dropout, model.cfg.window, model.cfg.sinks = cfg.dropout, cfg.window, cfg.sinks
    return model, cfg, tokenizer


def weight_bytes(model):
    """Bytes of weights that one token streams: all of them, but of the embedding table a single row."""
    head = [model.lm_head.weight] if isinstance(model.lm_head, nn.Linear) else list(model.lm_head.buffers())
    inner = [*model.model.layers.parameters(), *model.model.layers.buffers(), *model.model.norm.parameters(), *head]
    return sum(tensor.numel() * tensor.element_size() for tensor in inner)


def cache_bytes(cfg, itemsize):
    """{kind: bytes per token of the past} for this shape, if it had other heads or other numbers."""
    def of(heads, size, scale=0):
        return 2 * cfg.n_layer * heads * (cfg.head_size * size + scale)
    H, K = cfg.n_head, cfg.n_kv_head
    return {f"MHA ({H} key heads)": of(H, itemsize), f"GQA ({K})": of(K, itemsize), "MQA (1)": of(1, itemsize),
            f"GQA ({K}), int8": of(K, 1, itemsize)}


def streamed_bytes(model, context, itemsize):
    """The least that must be read to write one token behind `context` tokens on the model's rung."""
    # Bytes that MUST be read, whatever a rung really reads: one that copies shows a small fraction, not a large one.
    cfg = model.cfg
    names = list(cache_bytes(cfg, itemsize).values())
    past = min(context, cfg.sinks + cfg.window) if cfg.rung == "window" else context
    return weight_bytes(model) + past * (names[3] if cfg.rung == "int8-cache" else names[1])


def synchronize(device):
    """Wait until the device has done what it was told: without it only the telling is timed."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def read_bandwidth(buffer):
    """GB/s at which a plain sum reads a buffer that no processor cache can hold: the best of three, to be strict."""
    seconds = []
    for _ in range(3):
        synchronize(buffer.device)
        began = time.perf_counter()
        buffer.sum().item()
        seconds.append(time.perf_counter() - began)
    return buffer.numel() * buffer.element_size() / min(seconds) / 1e9


def filled_cache(model, context, room):
    """A cache that already holds `context` tokens. Their keys are zeros: a product with them takes as long as any."""
    cfg, like = model.cfg, model.model.norm.weight
    if cfg.rung == "none":
        return Recompute(torch.zeros(1, context, dtype=torch.int64, device=like.device), None)
    cache = new_cache(model, 1, context + room)
    for start, end in pieces(cache, context)[:1 + cfg.sinks + cfg.window]:  # a ring is full before all have passed
        cache.admit(end - start)
        zeros = like.new_zeros(1, cfg.n_kv_head, end - start, cfg.head_size)   # (1, K, T, D)
        for layer in range(cfg.n_layer):
            cache.update(layer, zeros, zeros)
    return cache


def memory_of(model, context, steps):
    """Bytes that decoding `steps` tokens behind `context` needs at most: weights, cache, copies on the way; None where
    the system does not say (it does on Linux and CUDA)."""
    device = model.model.norm.weight.device
    # All weights, the embedding too: it is not streamed, but it is held.
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))

    def decode():
        state = filled_cache(model, context, steps)
        for _ in range(steps):
            _, state = decode_step(model, torch.zeros(1, dtype=torch.int64, device=device), state)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        decode()
        return weights + torch.cuda.max_memory_allocated(device) - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None

    def resident(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    # Memory that was freed but not given back would be used again, and the process would not seem to grow.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak of the resident set
    before = resident("VmRSS")
    decode()
    return weights + max(0, resident("VmHWM") - before)


# The ladder is measured with all rungs taking turns, round by round, and the bandwidth in between: on a machine that
# does other things as well, neighbours in time have the same weather. Medians over the rounds.
def climb(model, contexts, prompt=128, new=16, rounds=5):
    """Time every rung behind contexts of these lengths. -> {rung: figures}, {context: bandwidth in GB/s}.

    memory_mb: weights and what decoding at the longest context needs on top, copies made on the way included.
    """
    device, itemsize = model.model.norm.weight.device, model.model.norm.weight.element_size()
    models = {}
    for rung, (_, _, int8) in RUNGS.items():
        models[rung] = on_rung(models.get("int8", model) if int8 else model, rung)  # rounded once, then shared
    buffer = torch.zeros(2 ** (30 if device.type == "cuda" else 26), device=device)
    prompt = min(prompt, model.cfg.block_size // 2)
    ids = torch.randint(model.cfg.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    figures = {rung: {"tokens_per_second": {}, "bandwidth_fraction": {}, "streamed_bytes": {}} for rung in RUNGS}
    bandwidths, reference = {}, None
    bar = tqdm(total=len(RUNGS) * (1 + len(contexts)), desc="climbing", leave=False)
    for rung, one in models.items():
        # The first call compiles; the second is timed. What it writes is compared with rung 1.
        for _ in range(2):
            synchronize(device)
            began = time.perf_counter()
            prefill(one, ids, None, prompt + new)[0].argmax(-1).item()
            figures[rung]["first_token_ms"] = 1e3 * (time.perf_counter() - began)
            tokens = generate(one, ids, new)                                   # (1, N)
        reference = tokens if reference is None else reference
        figures[rung]["same_tokens"] = bool(torch.equal(tokens, reference))
        bar.update()
    for context in contexts:
        states, seconds, reads = {}, {rung: [] for rung in RUNGS}, []
        for turn in range(rounds + 1):
            reads.append(read_bandwidth(buffer))
            for rung, one in models.items():
                # Reading everything again takes as long as it takes: one step of it is enough, and none far out.
                # The others go on growing: "128 tokens" are 128 + 6 * 16 at the end of the last round.
                steps = new if rung != "none" else 1
                if rung == "none" and seconds[rung] and (turn > 2 or seconds[rung][-1] > 2):
                    continue
                if turn == 0:
                    states[rung] = filled_cache(one, context, new * (rounds + 1))
                token, state = ids[:, 0], states[rung]
                synchronize(device)
                began = time.perf_counter()
                for _ in range(steps):
                    logits, state = decode_step(one, token, state)
                    token = logits.argmax(-1)                                  # (1)
                token.item()
                seconds[rung].append((time.perf_counter() - began) / steps)
                if turn == 0:
                    bar.update()
        reads = bandwidths[str(context)] = statistics.median(reads[1:])
        for rung, one in models.items():
            # Round 0 was for warming up.
            pace = 1 / statistics.median(seconds[rung][1:] or seconds[rung])
            size = streamed_bytes(one, context, itemsize)
            for name, value in (("tokens_per_second", pace), ("streamed_bytes", size),
                                ("bandwidth_fraction", pace * size / reads / 1e9)):
                figures[rung][name][str(context)] = value
    for rung, one in models.items():
        states.clear()
        held = memory_of(one, contexts[-1], 1 if rung == "none" else 4)
        figures[rung]["memory_mb"] = held and held / 1e6
    bar.close()
    return figures, bandwidths


def ladder_table(figures, context):
    """The ladder as text, at one context."""
    lines = [f"{'rung':<12}{'tokens/s':>10}{'ms/token':>10}{'of bandwidth':>14}{'first token':>13}{'memory':>10}"
             "  same tokens as none"]
    for rung, one in figures.items():
        pace, memory = one["tokens_per_second"][context], one["memory_mb"]
        same = ("yes" if one["same_tokens"] else "no: it forgets" if rung == "window" else
                "no: rounded" if RUNGS[rung][2] else "no: near ties")
        lines.append(f"{rung:<12}{pace:>10.1f}{1e3 / pace:>10.1f}{one['bandwidth_fraction'][context]:>14.0%}"
                     f"{one['first_token_ms']:>10.0f} ms{'-' if memory is None else f'{memory:.0f} MB':>10}  {same}")
    return "\n".join(lines)


def plot_ladder(path, figures, bounds, title):
    """Tokens per second against context for each rung; bounds {label: {context: tokens/s}} are what bytes allow."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7.5, 5), dpi=120)
    for rung, one in figures.items():
        paces = one["tokens_per_second"]
        ax.plot(list(map(int, paces)), list(paces.values()), "o-", ms=4, lw=1.2, label=rung)
    for style, (label, paces) in zip((":", "--"), bounds.items(), strict=True):
        ax.plot(list(map(int, paces)), list(paces.values()), style, color="black", lw=1, label=label)
    ax.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="tokens per second", title=title)
    ax.legend(fontsize=8, ncols=2)
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def plot_cache(path, kinds, window, weights, title):
    """Bytes of the cache against the length of the text, for each kind of heads and numbers, and for a window."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7.5, 4.5), dpi=120)
    lengths = [2 ** i for i in range(7, 18)]
    for kind, size in kinds.items():
        ax.plot(lengths, [size * n / 1e6 for n in lengths], "o-", ms=3, label=f"{kind}: {size / 1e3:.1f} kB a token")
    size = list(kinds.values())[1]
    ax.plot(lengths, [size * min(n, window) / 1e6 for n in lengths], "o-", ms=3, label=f"GQA, window of {window}")
    ax.axhline(weights / 1e6, ls="--", lw=0.8, color="tab:red")
    ax.text(lengths[0], weights / 1e6, "the weights, for comparison", va="bottom", fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="MB per row", title=title)
    ax.legend(fontsize=8)
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


@torch.no_grad()
def cost_of_rounding(model, data, rows=64):
    """Read validation rows through each rung's cache. -> {rung: {"loss", "perplexity", "logit_error"}}.

    loss: nats per counted token; logit_error: mean size of the difference to the exact logits, as a share of how much
    the exact logits spread around their mean.
    """
    device, out, exact = next(model.parameters()).device, {}, None
    # Rows from all over the split, always the same ones.
    index = torch.linspace(0, len(data[0]) - 1, min(rows, len(data[0]))).long()  # (R)
    inputs, targets = (part[index].to(device) for part in data)                # (R, T)
    for rung in ("gqa", "int8", "int8-cache", "window"):
        one = on_rung(model, rung)
        cache = new_cache(one, len(inputs), inputs.size(1))
        # The past is read from the cache as in writing; in two chunks, so that it is also used.
        half = inputs.size(1) // 2
        logits = torch.cat([one(part[:, start:end], cache=cache) for part in (inputs[:, :half], inputs[:, half:])
                            for start, end in pieces(cache, part.size(1))], 1).float()  # (R, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).item()
        exact = logits if exact is None else exact
        spread = (exact - exact.mean(-1, keepdim=True)).pow(2).mean().sqrt()
        out[rung] = {"loss": loss, "perplexity": math.exp(loss),
                     "logit_error": ((logits - exact).pow(2).mean().sqrt() / spread).item()}
    return out


def learn(cfg, device):
    """Train (or --resume) as llama3.py does. -> (model, tokenizer, validation data, summary so far, cfg, sample)."""
    rank, world = ranks()
    # Three ways in: --resume (model, optimizer, step), --load (model only, a new run), neither (random weights).
    model, tokenizer = None, None
    if cfg.resume:
        # What a run was made with is in its checkpoint; the command line need not repeat it and may not contradict it.
        state = read_checkpoint(Path(cfg.out) / "ckpt.pt")
        cfg, tokenizer = recorded_config(cfg, state["config"], FREE | {"eval_every", "save_every"}), make_tokenizer(
            state["extra"]["tokenizer"])
    elif cfg.load:
        model, cfg, tokenizer = load_any(cfg)
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
    check_prompt(tokenizer, prompt)  # now, not behind the training
    room = cfg.block_size - len(tokenizer.encode(prompt))
    if cfg.rung != "window" and cfg.max_new_tokens > room:
        sys.exit(f"error: --max-new-tokens {cfg.max_new_tokens}: behind this prompt there is room for {room} "
                 f"(--block-size {cfg.block_size}); the rung `window` has no end")
    check_memory(cfg, device)
    out = out_folder(cfg)
    model = (model or build_model(cfg)).to(device, torch.float64 if cfg.dtype == "float64" else torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {parameters:,} parameters on {device}, {cfg.batch_size * cfg.grad_accum} rows of "
          f"{train_data[0].size(1)} tokens a step; everything goes to {out}/")

    def show(step):
        if step % cfg.eval_every == 0 and rank == 0:
            # On the rung gqa: compiling is not worth the wait for a line.
            rung, count = ("gqa", min(60, room, cfg.max_new_tokens)) if room > 0 else ("window", 10)
            line = write_text(on_rung(model, rung), tokenizer, cfg, prompt, count)
            tqdm.write(f"            {(prompt.lstrip() + line)!r}")

    result = train(model, cfg, train_data, val_data, compute_loss, {"tokenizer": tokenizer.spec, "data": info}, show)
    return model.eval(), tokenizer, val_data, result | {"params": parameters, "data": info, "prompt": prompt}, cfg


# What a command line may change about a run that exists.
FREE = set("out device compile resume load prompt max_new_tokens temperature top_k top_p repetition_penalty beams "
           "length_penalty rung contexts checkpoint window sinks".split())


def dtype_of(cfg, device):
    """The dtype of weights that are only read."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)


def measure(model, cfg, device, out):
    """Climb the ladder with this model, print it, draw it. -> (results, names of the pictures)."""
    model = model.to(device, None if cfg.checkpoint and cfg.dtype == "auto" else dtype_of(cfg, device)).eval()
    contexts = [n for n in map(int, cfg.contexts.split(",")) if n + 128 <= model.cfg.block_size]
    if not contexts:
        sys.exit(f"error: --contexts {cfg.contexts}: none leaves room in a block_size of {model.cfg.block_size}")
    streamed, itemsize = weight_bytes(model), model.model.norm.weight.element_size()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\nmeasuring a Llama of {parameters / 1e6:.0f} million parameters on {device}, {torch.get_num_threads()} "
          f"threads: {streamed / 1e6:.0f} MB of weights stream by for every token")
    ladder, bandwidths = climb(model, contexts)
    kinds, at = cache_bytes(model.cfg, itemsize), str(contexts[0])
    # Near: weights are nearly all that is read, and rungs 2 to 4 hardly differ. Far: the cache weighs as well.
    for context in dict.fromkeys((at, str(contexts[-1]))):
        print(f"\n{int(context):,} tokens in the cache, memory is read at {bandwidths[context]:.1f} GB/s:\n\n"
              f"{ladder_table(ladder, context)}")
    print(f"\nfirst token: behind a prompt of up to 128 tokens, uncompiled (a ring takes in the rest one by one)"
          f"\nmemory: weights, cache and copies at {contexts[-1]:,} tokens (none: the activations of all of them)\n")
    # The bound falls with the context too: at some length the cache outweighs the weights.
    exact, rounded = ({n: bandwidths[n] * 1e9 / size for n, size in ladder[rung]["streamed_bytes"].items()}
                      for rung in ("gqa", "int8-cache"))
    plot_ladder(out / "ladder.png", ladder, {"bound, exact": exact, "bound, int8": rounded},
                f"One row, {streamed / 1e6:.0f} MB of weights, {bandwidths[at]:.0f} GB/s")
    plot_cache(out / "cache.png", kinds, model.cfg.sinks + model.cfg.window, streamed,
               f"One row: {model.cfg.n_layer} layers, D = {model.cfg.head_size}, {itemsize} bytes a number")
    return {"tokens_per_second": {rung: one["tokens_per_second"][at] for rung, one in ladder.items()},
            "bandwidth_fraction": {rung: one["bandwidth_fraction"][at] for rung, one in ladder.items()},
            "read_bandwidth_gb_s": bandwidths[at], "cache_bytes_per_token": kinds, "ladder": ladder,
            "bandwidths": bandwidths, "weight_bytes": streamed,
            "measured": dataclasses.asdict(model.cfg)}, ["ladder.png", "cache.png"]


def compare_words(model, tokenizer, val_data, cfg):
    """What the rungs write and what rounding costs, printed. -> results."""
    results = {}
    if cfg.data == "numbers":
        # The same held-out numbers on every rung: exact ones agree to the last word, the others may err more. About 170
        # of them: at 99 % the standard error is 0.8 points.
        numbers = sorted(set(draw_numbers(200, cfg.seed + 1, True)))
        results["exact_match"] = {rung: exact_match(on_rung(model, rung), tokenizer, numbers) for rung in RUNGS}
        print(f"names of {len(numbers)} unseen numbers that are right:\n  "
              + ", ".join(f"{rung} {share:.1%}" for rung, share in results["exact_match"].items()))
        # Four rows at a time: in batches that wait for their longest answer, or as a queue.
        ask, four = [tokenizer.encode(f"{n}=") for n in numbers], on_rung(model, "gqa")
        answers, steps = serve(four, ask, 10, slots=4, eos_ids=tokenizer.eos_ids)
        waiting = sum(max(map(len, answers[i:i + 4])) - 1 for i in range(0, len(answers), 4))
        results["steps"] = {"padded": waiting, "queue": steps}
        print(f"decode steps for all of them, four rows at a time: {waiting} in padded batches, {steps} as a queue")
    results["rounding"] = cost_of_rounding(model, val_data)
    print("\nwhat rounding and forgetting cost, on validation rows:")
    for rung, one in results["rounding"].items():
        print(f"  {rung:<12}loss {one['loss']:.5f}   perplexity {one['perplexity']:.4f}   "
              f"logits differ by {one['logit_error']:.2%} of their spread")
    return results


def unlearned(cfg, device):
    """The model of --checkpoint, or one with random weights."""
    if cfg.resume or cfg.load:
        sys.exit("error: --resume and --load go without --checkpoint and --data random, which train nothing")
    if not cfg.checkpoint:
        cfg.vocab_size = cfg.vocab_size or SMALL["vocab_size"]
        check_memory(cfg, device)
        # Drawn where they will live and in the dtype they will have: 8 billion in float32 on the way would be 32 GB.
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype_of(cfg, device))
        with device:
            model = build_model(cfg)
        torch.set_default_dtype(before)
        return model
    try:
        model, _ = from_pretrained(cfg.checkpoint)
    except Exception as problem:  # json, safetensors: a foreign folder has many ways to be wrong
        problem = " ".join(str(problem).split())[:200]
        sys.exit(f"error: --checkpoint {cfg.checkpoint}: no Llama folder ({problem})")
    model.cfg.window, model.cfg.sinks = cfg.window, cfg.sinks
    return model


def main(cfg):
    """Train, compare the rungs' words, measure; with --load and --prompt only write. -> (model, cfg)."""
    device = setup(cfg)
    if cfg.load and cfg.prompt and not cfg.resume:
        model, cfg, tokenizer = load_any(cfg)
        model.to(device, getattr(torch, cfg.dtype, None))  # "auto" keeps the dtype of the file
        check_prompt(tokenizer, cfg.prompt)
        print(cfg.prompt, end="", flush=True)
        try:
            text = write_text(on_rung(model, cfg.rung), tokenizer, cfg, cfg.prompt, cfg.max_new_tokens,
                              stream(tokenizer))
        except ValueError as problem:
            sys.exit(f"\nerror: {problem}")
        print(text if cfg.beams > 1 else "")  # sampled text was streamed; the best beam is known at the end only
        return model, cfg

    # Two kinds of runs: weights that nobody trained can only be measured; a trained model also has words to compare.
    results, figures, learned, floor, shape = {}, [], {}, None, None
    if cfg.checkpoint or cfg.data == "random":
        model = unlearned(cfg, device)
        out = out_folder(cfg)
    else:
        model, tokenizer, val_data, learned, cfg = learn(cfg, device)
        if ranks()[0] > 0:
            return model, cfg
        out, prompt, uniform = out_folder(cfg), learned["prompt"], math.log(cfg.vocab_size)
        text = prompt + write_text(on_rung(model, cfg.rung), tokenizer, cfg, prompt, cfg.max_new_tokens)
        write_atomically(out / "sample.txt", lambda file: file.write(text.encode()))
        print(f"\n{text.strip()}\n")
        floor = 0.0 if cfg.data == "numbers" else None  # what a perfect model would reach; unknown for real text
        plot_curve(out / "curve.png", learned["history"], f"{Path(__file__).name} on {Path(cfg.data).name}",
                   {f"uniform guess, ln V = {uniform:.2f}": uniform} | ({} if floor is None else {"floor 0": floor}))
        figures, results = ["curve.png"], compare_words(model, tokenizer, val_data, cfg)
        # What was trained is too small to be bound by memory: it fits into the processor's caches. So the ladder is
        # measured on a larger shape.
        shape = Config(**SMALL, seed=cfg.seed, window=cfg.window, sinks=cfg.sinks)
    if cfg.contexts:
        more, pictures = measure(build_model(shape) if shape else model, cfg, device, out)
        results, figures = results | more, figures + pictures
    # One file that says what was run, on what, and what came out: enough to repeat the run and compare it.
    # val_loss, seconds and tokens_per_second up here are the training's; the rungs' are in results.
    summary = {"config": dataclasses.asdict(cfg), "params": learned.get("params"), "val_loss": learned.get("val_loss"),
               "floor": floor, "tokens_per_second": learned.get("tokens_per_second"),
               "seconds": learned.get("seconds"), "peak_memory_mb": peak_memory_mb(device),
               "data": learned.get("data", {"name": cfg.checkpoint or "random weights"}), "device": str(device),
               "torch": torch.__version__, "figures": figures, "results": results}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    print(f"Everything is in {out}/: {', '.join(['summary.json', *figures])}.\n"
          f"Next: section 6 of {Path(__file__).name}, one rung after the other; flash_attention.py for long prompts.\n"
          f"Expected: {expected}")
    return model, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
