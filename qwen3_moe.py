# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "safetensors>=0.4.3", "tiktoken>=0.7", "torch>=2.11",
#                 "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
QWEN3 (DENSE AND MIXTURE OF EXPERTS) IN ONE FILE python qwen3_moe.py                2 min on two CPU cores

Paper    Qwen Team 2025, Qwen3 Technical Report, arXiv 2505.09388; mixtures: Shazeer et al. 2017, arXiv 1701.06538, and
         Fedus et al. 2021, Switch Transformers, arXiv 2101.03961
Idea     Knowledge needs weights, but not every token needs all of them. Cut the feed-forward layer into E experts, let
         a small router send each token to k of them: the weights of a large model at the work of a small one.
Picture  x (N,C) -> router (N,E) -> top-k -> rows sorted by expert (N*k,C) -> grouped SwiGLU (N*k,I) -> (N*k,C) -> put
         back in order, weighed, added up (N,C)
Symbols  B batch   T time   P past (cached) tokens   S = P + T   C n_embd   H query heads   K key/value heads (beams in
         beam_search)   D head_size   F ffn_size   E experts   k experts per token   I expert_size   V vocabulary
         L layers   N = B*T tokens in a mixture, new tokens in generate   M candidates   R rows
New here QK-norm, router, load balancing by a loss or by a bias, grouped dispatch, expert loads, chat with and without
         thinking. The rest is llama3.py's (but its decode step is written out): diff llama3.py qwen3_moe.py
Not here shared experts, expert parallelism, capacity limits, stretched RoPE (llama3.py), quantised weights
Expect   validation loss 1.654 (1.642 to 1.664, 3 seeds) nats per character after 1,500 steps on Tiny Shakespeare; the
         dense model of the same work per token 1.663 (1.651 to 1.677, 3 seeds). The experts' loads vary by 0.16 (0.15
         to 0.17, 3 seeds) of their mean, with --balance bias 0.05, none 1.00 (one seed each) (results/qwen3_moe.json)
Asked    What is QK-norm for?   Why do experts need balancing?   Why normalise the k weights?   What does a mixture
         save, and what not?   Why may cached keys move?   Why is the balancing loss k at equal load?     (grep "# Q:")
"""
import argparse
import atexit
import contextlib
import copy
import dataclasses
import hashlib
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
# learn the fields by heart: each is explained where it is used. First reading: go on at section 2.
#     python qwen3_moe.py                                        train on Shakespeare (or on Python's docs when offline)
#     python qwen3_moe.py --n-experts 0                          the dense model of the same work per token
#     python qwen3_moe.py --balance none                         watch the router pick favourites
#     python qwen3_moe.py --data my.txt --max-steps 5000         on your own text
#     python qwen3_moe.py --preset numbers                       on the toy language: every answer can be checked
#     python qwen3_moe.py --load runs/qwen3_moe --prompt "ROMEO:" --temperature 0.5       let it talk
#     python qwen3_moe.py --load Qwen/Qwen3-0.6B --chat --no-thinking                     talk to a published one
#     python qwen3_moe.py --resume                               go on after Ctrl-C, a crash or a power cut
@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    data: str = "auto"                # auto | shakespeare | pydocs | numbers | path of a UTF-8 text file
    tokenizer: str = "char"           # char: one id per character | gpt2: 50,257 ids | folder of vocab.json
    out: str = "runs/qwen3_moe"       # folder for checkpoint, metrics, samples and pictures
    seed: int = 1337                  # decides initial weights, batches, dropout and samples
    device: str = "auto"              # auto (cuda if present, else cpu) | cpu | cuda | mps
    dtype: str = "auto"               # auto (float32; on cuda bfloat16 autocast) | float32 | bfloat16 | float64
    compile: bool = False             # torch.compile the model: a minute of waiting, then faster steps

    # Shape. llama3.py's work per token (2 experts of 192 are a feed-forward layer of 384) with 2.6 million weights.
    block_size: int = 64              # longest context in tokens
    n_layer: int = 4                  # layers
    n_head: int = 4                   # query heads
    n_kv_head: int = 2                # key/value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 128                 # width of the residual stream
    head_size: int = 0                # numbers per head; 0 = n_embd / n_head
    ffn_size: int = 384               # width of the feed-forward layer where it is dense
    n_experts: int = 8                # experts per layer; 0 = a dense model
    experts_per_token: int = 2        # how many of them a token visits
    expert_size: int = 192            # width of one expert
    norm_topk_prob: bool = True       # the weights of the visited experts sum to 1
    sparse_step: int = 1              # every how many-th layer is a mixture
    mlp_only_layers: str = ""         # numbers of layers that stay dense all the same, "0,3"
    balance: str = "aux"              # aux: a loss (Switch) | bias: on the choice (DeepSeek-V3) | none
    aux_coef: float = 0.01            # weight of that loss; Qwen3's large models take 0.001
    bias_speed: float = 0.001         # how far a bias moves per micro-step
    vocab_size: int = 0               # 0 takes the tokenizer's; more pads it
    tie_weights: bool = False         # one table for embedding and head
    rope_theta: float = 10_000.0      # base of the rotation periods; 1,000,000 in Qwen3
    norm_eps: float = 1e-6            # added to the mean square in RMSNorm
    dropout: float = 0.0              # share of each branch zeroed in training; Qwen3 has none, small data need it
    init_std: float = 0.088           # std of the initial weights, about 1/sqrt(n_embd)

    # Optimisation: llama3.py's, rate included.
    max_steps: int = 1500             # optimizer steps; a mixture's step takes longer than llama3.py's
    batch_size: int = 12              # rows per micro-step, over all ranks
    grad_accum: int = 1               # micro-steps per optimizer step
    lr: float = 3e-3                  # peak learning rate (large models: 3e-4 and less)
    min_lr_ratio: float = 0.1         # the last learning rate as a share of the peak
    warmup_steps: int = 100           # steps of linear warm-up
    weight_decay: float = 0.1         # on matrices and embeddings only
    beta2: float = 0.99               # memory of Adam's second moment: 0.99 looks back about 100 steps
    grad_clip: float = 1.0            # largest gradient norm
    eval_every: int = 500             # steps between passes over the whole validation split
    save_every: int = 500             # steps between checkpoints
    resume: bool = False              # continue the run in --out, bit for bit

    # Decoding.
    load: str = ""                    # run folder, checkpoint, Hugging Face folder or repository to start from
    prompt: str = ""                  # text to continue; together with --load nothing is trained
    chat: bool = False                # talk to the loaded model in the terminal
    thinking: bool = True             # in --chat: let it think aloud first (wants --max-new-tokens 4000)
    max_new_tokens: int = 400         # tokens to write
    temperature: float = 0.8          # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0                    # sample among the k likeliest only; 0 = all
    top_p: float = 1.0                # sample among the likeliest that together have probability p
    repetition_penalty: float = 1.0   # above 1: make tokens that were already there less likely
    beams: int = 1                    # above 1: beam search, without temperature, top-k, top-p, repetition penalty
    length_penalty: float = 1.0       # beam score = sum of log-probs / length ** this

    def __post_init__(self):
        # A bad value caught here costs a line; caught at step 500 it costs the run.
        for names, ok, rule in (
                ("block_size n_layer n_head n_kv_head n_embd ffn_size experts_per_token expert_size sparse_step "
                 "max_steps batch_size grad_accum eval_every save_every max_new_tokens beams",
                 lambda x: x >= 1, "at least 1"),
                # `0 <= x < inf` and not `x < 0 or ...`: every comparison with nan is false, so nan fails as well
                ("seed", lambda x: 0 <= x < 2 ** 31, "in [0, 2^31)"),
                ("vocab_size head_size n_experts aux_coef bias_speed warmup_steps weight_decay temperature top_k",
                 lambda x: 0 <= x < math.inf, "0 or more"),
                ("lr grad_clip init_std rope_theta norm_eps repetition_penalty", lambda x: 0 < x < math.inf, "above 0"),
                ("balance", ("aux", "bias", "none").__contains__, "aux, bias or none"),
                ("mlp_only_layers", lambda x: all(i.isdecimal() for i in x.split(",") if x), "numbers: 0,3"),
                ("length_penalty", math.isfinite, "a number"),
                ("dropout beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("min_lr_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
                ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
                ("tokenizer", bool, "char, gpt2 or a folder"),
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
        if any(str(int(i)) != i or int(i) >= self.n_layer for i in self.mlp_only_layers.split(",") if i):
            raise ValueError(f"mlp_only_layers {self.mlp_only_layers}: there are layers 0 to {self.n_layer - 1}")
        if self.n_experts and self.experts_per_token > self.n_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} of n_experts {self.n_experts}: too many")
        if self.n_experts and (self.n_embd % 8 or self.expert_size % 8):
            raise ValueError("n_embd and expert_size must be multiples of 8: grouped products want rows of 16 bytes")


# The published shapes (config.json of the hub): heads of 128 whatever the width, 151,936 rows, 151,669 in use.
# For training they need --tokenizer FOLDER with Qwen's vocab.json and merges.txt, and 36 trillion tokens.
QWEN3 = dict(tokenizer="gpt2", vocab_size=151936, block_size=40960, head_size=128, n_kv_head=8, rope_theta=1e6,
             init_std=0.02, n_experts=0, lr=3e-4, beta2=0.95, warmup_steps=2000, max_steps=1_000_000, batch_size=512,
             eval_every=2000, save_every=2000)
PRESETS = {
    "laptop": {},  # the defaults above
    # Lines such as "17=seventeen": short rows, many per step, and a rate that falls to 0 because answers are exact.
    "numbers": dict(data="numbers", n_layer=2, n_embd=64, ffn_size=192, expert_size=96, init_std=0.125, block_size=17,
                    batch_size=128, max_steps=900, lr=3e-3, min_lr_ratio=0.0, beta2=0.98, weight_decay=0.01,
                    eval_every=150, temperature=0.0),
    "qwen3-0.6b": dict(QWEN3, n_layer=28, n_embd=1024, n_head=16, ffn_size=3072, tie_weights=True),
    "qwen3-1.7b": dict(QWEN3, n_layer=28, n_embd=2048, n_head=16, ffn_size=6144, tie_weights=True),
    "qwen3-4b": dict(QWEN3, n_layer=36, n_embd=2560, n_head=32, ffn_size=9728, tie_weights=True),
    "qwen3-8b": dict(QWEN3, n_layer=36, n_embd=4096, n_head=32, ffn_size=12288),
    "qwen3-30b-a3b": dict(QWEN3, n_layer=48, n_embd=2048, n_head=32, n_kv_head=4, ffn_size=6144, n_experts=128,
                          experts_per_token=8, expert_size=768, aux_coef=0.001),
    "qwen3-235b-a22b": dict(QWEN3, n_layer=94, n_embd=4096, n_head=64, n_kv_head=4, ffn_size=12288, n_experts=128,
                            experts_per_token=8, expert_size=1536, aux_coef=0.001),
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


# --- 2. Model: from one expert up to Qwen3 ---------------------------------------------------------------------------
# Llama's stream with two changes. (1) Queries and keys are normed per head, before they are turned (QK-norm). (2) The
# feed-forward layer, two thirds of the weights, is replaced by E smaller ones, the experts; a token visits k of them:
#
#                            +-> expert 0
#     x --norm--+-> router --+-> expert 1  * 0.7 --+
#               |   (softmax,+-> expert 2          +--> + --> back to the stream
#               |    top-k)  +-> expert 3  * 0.3 --+
#               +-------------> x goes to the chosen ones only
#
# Weights grow with E, work per token with k. Qwen3-30B-A3B: 128 experts, 8 visited, 30.5 billion weights, 3.3 active.

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


# RoPE: a pair of numbers of q and of k is a point in a plane, turned by an angle that grows with the position; only the
# difference of two positions survives in q . k. llama3.py draws it. Qwen3 stretches nothing: theta is 1,000,000.
# differs from llama3.py: no stretching
def rope_frequencies(cfg):
    """-> (D/2) float32: radians per token of each plane, theta^(-2i/D)."""
    i = torch.arange(0, cfg.head_size, 2, dtype=torch.float32, device="cpu")   # (D/2)
    return cfg.rope_theta ** (-i / cfg.head_size)                              # (D/2)


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


class Qwen3Attention(nn.Module):
    """Grouped-query attention with RMSNorm on every query and key head. No biases (Qwen2 had them on q, k, v)."""

    # Q: What is QK-norm for?
    # A: q.k grows with the sizes of both, and in long trainings they grow until softmax is a hard maximum and the loss
    #    spikes. Normed heads have length sqrt(D), so scores stay within sqrt(D) times two learned gains (Henry et al.
    #    2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv 2302.05442). It replaced Qwen2's biases.
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C, D = cfg, cfg.n_embd, cfg.head_size
        self.q_proj = nn.Linear(C, cfg.n_head * D, bias=False)
        self.k_proj = nn.Linear(C, cfg.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, cfg.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * D, C, bias=False)  # H*D need not be C: 4,096 and 2,048 in 30B-A3B
        self.q_norm, self.k_norm = RMSNorm(D, cfg.norm_eps), RMSNorm(D, cfg.norm_eps)  # one for all heads

    def forward(self, x, rope, mask=None, cache=None, layer=0):
        """x (B, T, C), rope = (cos, sin) -> (B, T, C). mask bool (.., T, S), or None: causal when T = S."""
        B, T, _ = x.shape
        # Trap: norming behind the rotation, or over all heads at once. The first is nearly the same (a rotation keeps
        # lengths, the gains do not commute with it), the second has another shape only when it is looked at closely.
        q = self.q_norm(self.q_proj(x).view(B, T, self.cfg.n_head, -1)).transpose(1, 2)     # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, self.cfg.n_kv_head, -1)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.cfg.n_kv_head, -1).transpose(1, 2)  # (B, K, T, D)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)                      # (B, ..., T, D)
        if cache is not None:
            k, v = cache.update(layer, k, v)                                   # (B, K, S, D) each
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


# The mixture, twice: as one would say it, and as one would run it.
def experts_slow(x, chosen, weights, gate_up, down):
    """The specification: for every token, for every expert it chose, a SwiGLU; their weighted sum.

    x (N, C) tokens; chosen (N, k) expert numbers; weights (N, k); gate_up (E, 2*I, C) gate rows first; down (E, C, I).
    -> (N, C). Two Python loops: N*k small products, which is why nobody runs it.
    """
    out = []
    for token, experts, shares in zip(x, chosen, weights, strict=True):
        total = torch.zeros_like(token)                                        # (C)
        for e, share in zip(experts.tolist(), shares, strict=True):
            gate, up = (gate_up[e] @ token).chunk(2)                           # (I)
            total = total + share * (down[e] @ (F.silu(gate) * up))            # (C)
        out.append(total)
    return torch.stack(out)                                                    # (N, C)


# N = 3 tokens, k = 2, E = 3:                 chosen   0 2 | 2 1 | 0 1      6 (token, expert) pairs
#     sort the pairs by expert                order    0 4 | 3 5 | 1 2      pairs of expert 0, of expert 1, of expert 2
#     one product per expert                           2 rows, 2 rows, 2 rows
#     back to the order of the pairs          back     0 4 5 2 1 3          the inverse permutation
#     (N*k, C) -> (N, k, C), weigh, add up over k
# Pair p is choice p % k of token p // k, so order // k lists the tokens in the order of the queues.
class Dispatch(torch.autograd.Function):
    """Copy tokens x (N, C) into their experts' queues: x[order // k] -> (N*k, C). Backward: back in order, added up."""

    # Autograd does not know that `order` holds every pair once. For x[order // k] it would add rows up one by one,
    # sorted first on a GPU, elsewhere in an order that PyTorch does not promise. The inverse permutation makes it a
    # gather and a sum over k.
    @staticmethod
    def forward(ctx, x, order, back, k):
        ctx.save_for_backward(back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class Collect(torch.autograd.Function):
    """The way home: y[back], rows in the order of the pairs again. Backward: the other permutation."""

    @staticmethod
    def forward(ctx, y, order, back):
        ctx.save_for_backward(order)
        return y[back]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


@torch.compiler.disable  # the compiler can trace this kernel in bfloat16 only
def grouped_product(rows, weight, counts):
    """rows (M, in) sorted by expert, weight (E, out, in), counts (E) -> (M, out): each row times its own matrix."""
    if rows.dtype == torch.float64:  # the kernel below knows no doubles; this is what it does
        parts = zip(rows.split(counts.tolist()), weight, strict=True)
        return torch.cat([F.linear(part, w) for part, w in parts])
    if rows.is_cuda and torch.is_autocast_enabled("cuda"):  # autocast does not know this kernel
        rows, weight = rows.bfloat16(), weight.bfloat16()
    # offs[e] = how many rows the experts 0..e have together. In bfloat16 it stays on the GPU: nobody waits for it.
    return F.grouped_mm(rows, weight.mT, offs=counts.cumsum(0).int())


def experts_fast(x, chosen, weights, gate_up, down):
    """What experts_slow says, with the M = N*k rows sorted by expert. Same arguments -> (N, C).

    No capacity: however unequal the load, no token is dropped (Switch and GShard did, to have fixed shapes). Same
    input, same sums in the same order: deterministic on every device.
    """
    N, k = chosen.shape
    order = chosen.flatten().argsort(stable=True)                              # (M)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(N * k, device=x.device))  # (M)
    counts = torch.zeros(len(gate_up), dtype=torch.int64, device=x.device)     # (E)
    counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order))           # (E)
    rows = Dispatch.apply(x, order, back, k)                                   # (M, C)
    gate, up = grouped_product(rows, gate_up, counts).chunk(2, -1)             # (M, I)
    y = grouped_product(F.silu(gate) * up, down, counts)                       # (M, C)
    y = Collect.apply(y, order, back).view(N, k, -1)                           # (N, k, C)
    return (weights.to(y.dtype)[:, None, :] @ y)[:, 0]                         # (N, C)


# Q: Why do experts need balancing at all?
# A: The router is trained by what it chose. An expert that starts a little better is chosen more, learns more, is
#    chosen more: without a counterforce some experts do most of the work, the others are dead weights, and on many GPUs
#    all wait for the one that holds the favourite.
def load_balancing_loss(router_logits, k, mask=None):
    """E * sum_e f_e * P_e over all layers together (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6, as in transformers).

    router_logits: one (N, E) per layer; mask (B, T) bool, or None: pads do not count. f_e = assignments to e per token,
    P_e = mean probability of e. At equal load it is k (not 1), whatever P. The gradient flows through P: f only counts.
    """
    E = router_logits[0].size(1)
    probs = torch.cat([logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
                       for logits in router_logits])                           # (R, E)
    # Counted from the logits, not from a biased choice: what the loss pushes at is the router itself.
    chosen = F.one_hot(probs.topk(k).indices, E).sum(1).to(probs.dtype)        # (R, E)
    keep = torch.ones(len(probs), 1, device=probs.device, dtype=probs.dtype)   # (R, 1)
    if mask is not None:
        keep = mask.flatten().repeat(len(router_logits))[:, None].to(probs.dtype)  # (R, 1)
    f, P = (chosen * keep).sum(0) / keep.sum(), (probs * keep).sum(0) / keep.sum()  # (E)
    return E * (f * P).sum()


class MixtureOfExperts(nn.Module):
    """Router + E experts. Published weights have one SwiGLU per expert; here they are stacked, since a grouped product
    wants one tensor: gate_up_proj (E, 2*I, C), gate rows first, and down_proj (E, C, I).
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, E, width = cfg, cfg.n_experts, cfg.expert_size
        self.gate = nn.Linear(cfg.n_embd, E, bias=False)  # the router; "gate" is its published name
        self.experts = nn.ParameterDict({"gate_up_proj": torch.empty(E, 2 * width, cfg.n_embd),
                                         "down_proj": torch.empty(E, cfg.n_embd, width)})
        if cfg.balance == "bias":  # part of the state: it decides which experts are chosen
            self.gate.register_buffer("bias_of_choice", torch.zeros(E))

    def forward(self, x):
        """x (B, T, C) -> (B, T, C). Leaves what was routed where in self.logits (N, E) and self.chosen (N, k)."""
        rows = x.reshape(-1, x.size(-1))                                       # (N, C)
        logits = self.gate(rows)                                               # (N, E)
        # At least float32: a softmax in bfloat16 makes ties, and topk promises no order among equals.
        probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (N, E)
        wanted = probs if self.cfg.balance != "bias" else probs + self.gate.bias_of_choice  # (N, E)
        # topk has no gradient: the router learns through the weights alone, more weight for the expert that helped.
        chosen = wanted.topk(self.cfg.experts_per_token).indices               # (N, k)
        weights = probs.gather(1, chosen)                                      # (N, k)
        # Q: Why normalise the k weights?
        # A: The others' probability is lost otherwise: with 8 of 128 the layer would shrink its output by what the
        #    router is unsure about. Published models say so in config.json (norm_topk_prob); guessing wrong is silent.
        #    Trap: with k = 1 the normalised weight is always 1, and the router learns nothing from the loss: Switch
        #    (k = 1) leaves it as it is, --no-norm-topk-prob here.
        if self.cfg.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)                  # (N, k)
        if self.training and self.cfg.balance == "bias":
            # DeepSeek-V3 (arXiv 2412.19437, 2.1.2): no loss that disturbs the gradients (but a tiny one per sequence,
            # left out here). Experts with too much to do get a lower bias, the others a higher one; it acts on the
            # choice, never on the weights. (Their scores are sigmoids; ours stay softmax, so that only the balancing
            # differs.)
            load = F.one_hot(chosen, self.cfg.n_experts).sum((0, 1)).float()   # (E)
            if ranks()[1] > 1:  # all ranks count together, or their biases would part
                dist.all_reduce(load)
            with torch.no_grad():
                self.gate.bias_of_choice += self.cfg.bias_speed * (load.mean() - load).sign()
        self.logits, self.chosen = logits, chosen
        out = experts_fast(rows, chosen, weights.to(x.dtype), self.experts["gate_up_proj"], self.experts["down_proj"])
        return out.view_as(x).to(x.dtype)                                      # (B, T, C)


class Qwen3Layer(nn.Module):
    """Read through a norm, add to the stream: x + self_attn(norm(x)), then x + mlp(norm(x)), a SwiGLU or a mixture."""

    def __init__(self, cfg, index):
        super().__init__()
        self.cfg = cfg
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = Qwen3Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        # Every sparse_step-th layer is a mixture, but for those that are named as dense.
        sparse = cfg.n_experts > 0 and (index + 1) % cfg.sparse_step == 0
        sparse = sparse and str(index) not in cfg.mlp_only_layers.split(",")
        self.mlp = MixtureOfExperts(cfg) if sparse else SwiGLU(cfg)

    def forward(self, x, rope, mask=None, cache=None, layer=0):
        p, training = self.cfg.dropout, self.training
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache, layer), p, training)  # (B, T, C)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), p, training)  # (B, T, C)


class Qwen3(nn.Module):
    """Qwen3, dense (n_experts 0) and MoE. model(ids, mask=None, cache=None) -> logits (B, T, V).

    Parameters: V*C (twice if the head is not tied) + L * (2*C*H*D + 2*C*K*D + 2*D + 2*C + mlp) + C, where mlp is 3*C*F,
    or 3*C*I*E + C*E for a mixture, of which a token uses 3*C*I*k + C*E.
    """

    def __init__(self, cfg):
        super().__init__()
        cfg.head_size = cfg.head_size or cfg.n_embd // cfg.n_head  # from here on the number itself, for the checkpoint
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(Qwen3Layer(cfg, index) for index in range(cfg.n_layer)),
            norm=RMSNorm(cfg.n_embd, cfg.norm_eps)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_weights:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # The last matrix of each branch is drawn smaller, so that 2L sums do not grow the stream.
                shrink = math.sqrt(2 * cfg.n_layer) if "o_proj" in name or "down_proj" in name else 1.0
                nn.init.normal_(parameter, std=cfg.init_std / shrink)
        self.rope_speed = rope_frequencies(cfg)  # a plain tensor: no weight, not saved, not cast with the model

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
            raise ValueError(f"{S} tokens, but this model was made for {self.cfg.block_size} (block_size)")
        # keep (B, S): which of the tokens in sight are real. The cache remembers it for the past.
        keep = mask
        if cache is not None:
            if mask is not None:
                cache.mask[:, P:S], cache.padded = mask, True
            keep = cache.mask[:, :S] if cache.padded else None
        positions = torch.arange(P, S, device=ids.device)                      # (T)
        allowed = None  # the two common cases, training and decoding one token, need no mask tensor: the kernel knows
        if keep is not None:
            # A row's first real token has position 0 wherever it stands: count the real ones (see decoder_only.py).
            # RoPE alone would not need it: pads in front shift all positions alike, and only distances count. But the
            # cos and sin of shifted positions round differently, and a row would depend on its neighbours' length.
            positions = (keep.cumsum(1) - 1).clamp(min=0)[:, P:]               # (B, T)
            allowed = causal_mask(T, S, ids.device) & keep[:, None, None, :]   # (B, 1, T, S)
        elif P > 0 and T > 1:
            allowed = causal_mask(T, S, ids.device)                            # (T, S)
        if cache is not None:
            positions = positions + cache.dropped                              # (..., T)
        rope = rope_angles(positions, self.rope_speed)                         # (..., 1, T, D) each
        x = self.model.embed_tokens(ids)                                       # (B, T, C)
        for layer, block in enumerate(self.model.layers):
            x = block(x, rope, allowed, cache, layer)                          # (B, T, C)
        if cache is not None:
            cache.length = S
        return self.model.norm(x)                                              # (B, T, C)

    def forward(self, ids, mask=None, cache=None):
        """ids (B, T) int64, mask (B, T) bool True = real token or None -> logits (B, T, V): row t scores token t+1."""
        return self.lm_head(self.hidden(ids, mask, cache))                     # (B, T, V)

    def mixtures(self):
        """The MixtureOfExperts of all layers that have one."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]


def build_model(cfg):
    """A fresh model; its weights are a function of cfg alone, seed included."""
    torch.manual_seed(cfg.seed)
    return Qwen3(cfg)


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

    loss of a token = -ln p(target). In training the balancing loss is added, aux_coef times its value for each token:
    so the training loss is not comparable with the validation loss, which is cross-entropy alone.
    """
    inputs, targets = batch
    logits = model(inputs)                                                     # (B, T, V)
    loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    count = (targets != IGNORE).sum()
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if model.training and mixtures and cfg.balance == "aux":
        # Q: Why is the balancing loss k at equal load, and what does that mean for aux_coef?
        # A: f_e = k/E makes it E * k/E * sum of P_e = k, whatever P: a constant without gradient. aux_coef weighs how
        #    hard a deviation is pushed back. Too large, and tokens go where there is room instead of where they belong.
        #    f and P are those of this micro-step on this rank; Qwen3 counts f over the global batch.
        # The rows of the toy language end in padding (id 0), which is left out.
        mask = inputs != 0 if cfg.data == "numbers" else None                  # (B, T)
        # Trap: one loss over all layers together, which is what transformers computes. Layer 1 may then overload expert
        # 3 as long as layer 2 neglects it: at 2.00 of that loss the layers' own loads varied by 74 % (one run).
        aux = [load_balancing_loss([layer.logits], cfg.experts_per_token, mask) for layer in mixtures]
        loss_sum = loss_sum + cfg.aux_coef * sum(aux) / len(aux) * count
    return loss_sum, count, {}


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


class QwenTokenizer:
    """Qwen's vocab.json and merges.txt: byte-level BPE of 151,643 pieces, and 26 special tokens behind them.

    Through tiktoken, whose rank of a piece is its id: that works because the ids follow the merges, which is checked.
    spec carries the pieces, so that a checkpoint needs no file beside it.
    """

    # Llama 3's pattern but for \p{N}: digits come one by one, so that 12345 is always 1 2 3 4 5.
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
               "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> "
               "<|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
               "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>").split()

    def __init__(self, pieces):
        """pieces: the byte strings as latin-1 text, in the order of their ids (what from_files makes)."""
        import tiktoken
        ranks = {piece.encode("latin-1"): rank for rank, piece in enumerate(pieces)}
        self.special = {name: len(ranks) + i for i, name in enumerate(self.SPECIAL)}
        self.encoding = tiktoken.Encoding("qwen", pat_str=self.PATTERN, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        self.spec, self.n_vocab = {"kind": "qwen", "pieces": pieces}, self.encoding.n_vocab
        self.eos_ids = (self.special["<|im_end|>"], self.special["<|endoftext|>"])

    @classmethod
    def from_files(cls, folder):
        """A folder with vocab.json and merges.txt. Raises ValueError if ids and merges do not go together."""
        # GPT-2's files write bytes as printable letters: those that are printable as themselves, the other 68 (control
        # characters, space, ...) as U+0100 onwards. " the" is written "\u0120the".
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = {chr(b): b for b in printable}
        letters |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
        to_bytes = lambda piece: "".join(chr(letters[c]) for c in piece)  # noqa: E731
        vocab = json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8"))
        merges = (Path(folder) / "merges.txt").read_text(encoding="utf-8").splitlines()
        merged = [line.replace(" ", "") for line in merges if line and not line.startswith("#version")]
        pieces = sorted(vocab, key=vocab.get)
        if [vocab[piece] for piece in pieces] != list(range(len(pieces))) or pieces[256:] != merged:
            raise ValueError(f"{folder}: the ids of vocab.json do not follow merges.txt; tiktoken cannot read this")
        return cls([to_bytes(piece) for piece in pieces])

    def encode(self, text):
        # NFC: "e" + a combining accent becomes the one letter. The merges were learned on text in that form.
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i < self.n_vocab])

    # One message:  <|im_start|>user\nWhat is a router?<|im_end|>\n
    # A prompt ends behind "<|im_start|>assistant\n". Without thinking an empty thought is put into the model's mouth,
    # "<think>\n\n</think>\n\n", and it goes on as if it had thought already.
    def chat_ids(self, messages, thinking=True):
        """[{"role": "system" | "user" | "assistant", "content": text}], the user last -> ids for the answer to begin.

        Thoughts (<think> ... </think>) of earlier answers are left out, as Qwen3's template does: they would fill the
        context. Raises ValueError if the last message is not the user's.
        """
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the last message must be the user's: there is nothing to answer")
        ids, start, end = [], self.special["<|im_start|>"], self.special["<|im_end|>"]
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                if "</think>" not in content:  # a thought that was cut off is no answer
                    content = content.split("<think>")[0]
                content = content.split("</think>")[-1].lstrip("\n")
            # Only this function makes special ids: "<|im_end|>" typed by a user is text.
            ids += [start, *self.encode(f"{message['role']}\n{content}"), end, *self.encode("\n")]
        ids += [start, *self.encode("assistant\n")]
        if not thinking:
            ids += [self.special["<think>"], *self.encode("\n\n"), self.special["</think>"], *self.encode("\n\n")]
        return ids


# differs from decoder_only.py: Qwen's vocab.json and merges.txt are one more kind; given as a folder, or as the pieces
def make_tokenizer(spec):
    """The tokenizer that a spec describes: {"kind": "char", "chars": ...}, "numbers", "gpt2", "qwen" or a folder."""
    if spec["kind"] == "char":
        return CharTokenizer(spec["chars"])
    if spec["kind"] == "numbers":
        return ToyTokenizer()
    if spec["kind"] == "qwen" and "pieces" in spec:
        return QwenTokenizer(spec["pieces"])
    try:
        if spec["kind"] != "gpt2":
            return QwenTokenizer.from_files(spec["kind"])
        import tiktoken
        return BPETokenizer(tiktoken.get_encoding(spec["kind"]))
    except (OSError, ValueError, KeyError) as problem:
        sys.exit(f"error: the {spec['kind']} vocabulary cannot be read, found or fetched: {problem}")


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


# differs from decoder_only.py: K key/value heads instead of H, and tokens that leave the context are dropped
# While writing, the tokens of the past never change, and neither do their keys and values:
#
#     prefill      q k v of all T prompt tokens in one pass          k v --> columns 0 .. T-1 of the cache
#     one token    q k v of 1 token; q meets P+1 keys                k v --> column P
class KVCache:
    """Keys and values of the tokens seen so far, for all layers, in buffers that are allocated once.

    keys, values (L, B, K, max_len, D); mask (B, max_len) bool, True = real token; length = P, the columns in use;
    dropped: how many real tokens of each row have left, (B, 1); 0 before the first has.
    """

    # Q: What does the KV cache save, and what does it cost?
    # A: Without it, token n+1 recomputes all n tokens before it: n^2 work for n tokens. The cost is memory: 2 * L * K *
    #    D numbers a token. Llama-3.1-8B with its 131,072 tokens: 16 GiB in bfloat16, as much as the weights.
    def __init__(self, cfg, rows, max_len, like):
        shape = (cfg.n_layer, rows, cfg.n_kv_head, max_len, cfg.head_size)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.mask = torch.ones(rows, max_len, dtype=torch.bool, device=like.device)
        self.length, self.padded, self.dropped = 0, False, 0

    def update(self, layer, k, v):
        """Write k, v (B, K, T, D) behind the past of one layer. -> all keys and values so far, (B, K, S, D) each."""
        # Into place, not torch.cat: appending by copying moves the whole past for every new token.
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]    # (B, K, S, D)

    def drop_oldest(self, count):
        """Forget the first `count` columns; the others move to the front and keep their angles."""
        # Q: Why may cached keys move, when GPT-2 has to read its context again?
        # A: GPT-2's position is in the key, learned for exactly that place. A rotated key meets a rotated query, and
        #    only the difference of their angles counts: the columns move, the angles stay, distances stay right.
        #    It is not the same as reading the rest again: above the first layer, keys and values were made while the
        #    old tokens could still be seen. Trap: published models lean on their first tokens ("attention sinks", Xiao
        #    et al. 2023, arXiv 2309.17453) and get worse without them; StreamingLLM keeps the first four.
        self.dropped = self.dropped + self.mask[:, :count].sum(1, keepdim=True)  # (B, 1)
        for tensor in (self.keys, self.values):
            tensor[:, :, :, :-count] = tensor[:, :, :, count:].clone()
        self.mask[:, :-count] = self.mask[:, count:].clone()
        self.mask[:, -count:] = True
        self.length -= count


# generate() and beam_search() know no architecture. They ask for three things, which every model defines for itself:
# prefill (read the prompt), decode_step (append one token), reorder (choose rows); `state` is whatever those need.
def prefill(model, ids, mask, max_len):
    """Read the prompts in one pass. ids (B, T), mask (B, T) bool or None -> (logits (B, V) behind each end, cache).

    A prompt longer than the context keeps its last block_size tokens.
    """
    if ids.size(1) == 0:
        raise ValueError("an empty prompt: there is nothing that the next token could follow")
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is not None:
        # Move all pads to the left: then every row ends in its last real token, and new tokens join on there.
        order = mask.int().argsort(dim=1, stable=True)                         # (B, T)
        ids, mask = ids.gather(1, order), mask.gather(1, order)[:, -model.cfg.block_size:]
    ids = ids[:, -model.cfg.block_size:]
    cache = KVCache(model.cfg, len(ids), min(max_len, model.cfg.block_size), like=model.lm_head.weight)
    x = model.hidden(ids, mask, cache)[:, -1]                                  # (B, C)
    return model.lm_head(x), cache  # V logits for B positions and not for B*T


def decode_step(model, token, cache):
    """Append one token (B,) per row. -> (logits (B, V), cache). A full context forgets its older half first."""
    if cache.length == model.cfg.block_size:
        cache.drop_oldest((model.cfg.block_size + 1) // 2)
    return model(token[:, None], cache=cache)[:, -1], cache


def reorder(cache, rows):
    """-> the cache whose row i is the old row rows[i]. Beam search copies good rows over bad ones with it."""
    new = copy.copy(cache)
    new.keys, new.values = cache.keys.index_select(1, rows), cache.values.index_select(1, rows)
    new.mask = cache.mask[rows]
    new.dropped = cache.dropped[rows] if torch.is_tensor(cache.dropped) else 0
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
#     model.layers.0.self_attn.q_proj.weight (H*D, C)     .q_norm.weight (D)     model.layers.0.mlp.gate.weight (E, C)
#     model.layers.0.mlp.experts.0.gate_proj.weight (I, C)     .up_proj.weight (I, C)     .down_proj.weight (C, I)
# One thing differs from ours: the hub has every expert on its own, 128 * 3 tensors per layer; ours are stacked.
#     published: experts.e.gate_proj (I, C), experts.e.up_proj (I, C)  ->  experts.gate_up_proj[e] = gate above up
def config_from_hf(hf):
    """config.json (a dict) -> Config. Raises ValueError for a model that is not Qwen3 as built here."""
    # Each of these changes the arithmetic without changing a single shape: better refused than silently wrong.
    for key, expected in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
        if hf.get(key, expected) != expected:
            raise ValueError(f"config.json says {key} = {hf[key]!r}; this file implements {expected!r} only")
    if hf.get("model_type") not in ("qwen3", "qwen3_moe"):
        raise ValueError(f"config.json says model_type = {hf.get('model_type')!r}; this file reads qwen3 and qwen3_moe")
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0)} | (hf.get("rope_scaling") or {})
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"config.json says rope_type = {rope.get('rope_type')!r}; this file implements 'default' only")
    sparse = dict(n_experts=0)
    if hf["model_type"] == "qwen3_moe":
        # What config.json leaves out has transformers' default: norm_topk_prob is false there, and true in the models.
        # (transformers 5 writes num_local_experts, the hub's files say num_experts.)
        sparse = dict(n_experts=hf.get("num_experts", hf.get("num_local_experts", 128)),
                      experts_per_token=hf.get("num_experts_per_tok", 8), sparse_step=hf.get("decoder_sparse_step", 1),
                      expert_size=hf.get("moe_intermediate_size", 768), aux_coef=hf.get("router_aux_loss_coef", 0.001),
                      norm_topk_prob=hf.get("norm_topk_prob", False),
                      mlp_only_layers=",".join(map(str, hf.get("mlp_only_layers") or [])))
    return Config(block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"],
                  n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"], n_embd=hf["hidden_size"],
                  n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"],
                  head_size=hf.get("head_dim") or 0, ffn_size=hf["intermediate_size"],
                  rope_theta=float(rope.get("rope_theta", 10_000.0)), norm_eps=hf.get("rms_norm_eps", 1e-6),
                  tie_weights=hf.get("tie_word_embeddings", False), init_std=hf.get("initializer_range", 0.02),
                  **sparse)


def config_to_hf(cfg):
    """Config -> the dict of config.json that transformers' Qwen3ForCausalLM or Qwen3MoeForCausalLM expects."""
    kind = ("Qwen3Moe", "qwen3_moe") if cfg.n_experts else ("Qwen3", "qwen3")
    hf = {"architectures": [f"{kind[0]}ForCausalLM"], "model_type": kind[1], "hidden_act": "silu",
          "max_position_embeddings": cfg.block_size, "vocab_size": cfg.vocab_size, "hidden_size": cfg.n_embd,
          "intermediate_size": cfg.ffn_size, "num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head,
          "num_key_value_heads": cfg.n_kv_head, "head_dim": cfg.head_size, "rms_norm_eps": cfg.norm_eps,
          "attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
          "rope_theta": cfg.rope_theta, "use_sliding_window": False,
          # Trap: leaving these out. transformers then fills in ids that a model of characters lacks.
          "bos_token_id": 151643 if cfg.vocab_size == 151936 else None,
          "eos_token_id": [151645, 151643] if cfg.vocab_size == 151936 else None,
          "initializer_range": cfg.init_std, "tie_word_embeddings": cfg.tie_weights}
    if cfg.n_experts:
        hf |= {"num_experts": cfg.n_experts, "num_experts_per_tok": cfg.experts_per_token,
               "moe_intermediate_size": cfg.expert_size, "decoder_sparse_step": cfg.sparse_step,
               "norm_topk_prob": cfg.norm_topk_prob, "router_aux_loss_coef": cfg.aux_coef,
               "mlp_only_layers": [int(i) for i in cfg.mlp_only_layers.split(",") if i]}
    return hf


def import_weights(model, tensors):
    """Fill the model from published tensors {name: tensor}. A missing, unknown or misshapen one raises ValueError."""
    found, experts = {}, {}
    for name in list(tensors):
        part = re.fullmatch(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if part:  # popped, so that a tensor's memory is free once it is in the stack
            experts.setdefault(part[1], {})[int(part[2]), part[3]] = tensors.pop(name)
        else:
            found[name] = tensors[name]
    for prefix, parts in experts.items():  # one layer each
        for e in range(model.cfg.n_experts):
            for kind in ("gate", "up", "down"):
                if (e, kind) not in parts:
                    raise ValueError(f"the weights have no tensor {prefix}.{e}.{kind}_proj.weight")
        if len(parts) > 3 * model.cfg.n_experts:
            raise ValueError(f"{prefix}: more experts than the {model.cfg.n_experts} of config.json")
        # Gate above up: one product makes both, and chunk(2) parts them again.
        try:
            both = [torch.cat((parts[e, "gate"], parts[e, "up"])) for e in range(model.cfg.n_experts)]
            found[f"{prefix}.gate_up_proj"] = torch.stack(both)                # (E, 2*I, C)
            found[f"{prefix}.down_proj"] = torch.stack([parts[e, "down"] for e in range(model.cfg.n_experts)])
        except RuntimeError as problem:
            raise ValueError(f"{prefix}: the experts have different shapes ({problem})") from problem
        parts.clear()
    if model.cfg.tie_weights and "model.embed_tokens.weight" in found:  # a tied head may be stored once or twice
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
        if not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]):
            raise ValueError("config.json says that the head is tied, and lm_head.weight differs from the embedding")
    # What is missing, then what is unknown; the first one is what helps.
    wanted = model.state_dict()
    for name in sorted(wanted.keys() ^ found.keys(), key=lambda name: (name == "lm_head.weight", name)):
        raise ValueError(f"the weights have no tensor {name}" if name in wanted else f"Qwen3 has no tensor {name}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            turned = " (transposed?)" if tensor.dim() > 1 and tensor.mT.shape == wanted[name].shape else ""
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}{turned}")
    model.load_state_dict(found, assign=True)  # takes the tensors themselves: no second copy of the weights
    if model.cfg.tie_weights:
        model.lm_head.weight = model.model.embed_tokens.weight  # assigning made them two; one again


def export_weights(model):
    """-> {published name: tensor}: one tensor per expert and matrix, a tied head stored once.

    Raises ValueError for a model with biases on the choice: the published form has no place for them.
    """
    if any(layer.cfg.balance == "bias" for layer in model.mixtures()):
        raise ValueError("a model trained with --balance bias has no published form: its biases would be lost")
    out = {}
    for name, tensor in model.named_parameters():
        tensor = tensor.detach().cpu()
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for kind, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    out[name.replace("gate_up_proj", f"{e}.{kind}_proj.weight")] = half.contiguous()
        elif name.endswith("experts.down_proj"):
            out |= {name.replace("down_proj", f"{e}.down_proj.weight"): w.contiguous() for e, w in enumerate(tensor)}
        else:
            out[name] = tensor.contiguous()
    return out


# differs from decoder_only.py: large weights lie in several files (shards), and the tokenizer in two
def hub_folder(repo):
    """Fetch a Hugging Face repository into ./data: config, tokenizer, weights. -> the folder. Raises OSError.

    Gated repositories need the licence accepted on their page and a token of that account in $HF_TOKEN.
    """
    from urllib.parse import urljoin, urlsplit

    import requests
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise FileNotFoundError(f"there is no folder {repo}")
    base = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}/resolve/main"
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    target = f"{repo.replace('/', '--')}"

    roots = [Path(root) / target for root in (os.environ.get("LLM_DATA"), "data") if root]
    root = next((root for root in roots if (root / "config.json").is_file()), roots[-1])  # all files in one place

    def get(name):
        if (root / name).is_file():  # fetched before: no network needed
            return root / name
        # Large files are stored by content: before the hub redirects to its storage it announces their SHA-256.
        url, announced = f"{base}/{name}", ""
        for _ in range(5):
            door = headers if urlsplit(url).netloc == urlsplit(base).netloc else {}  # the token is for the hub alone
            answer = requests.head(url, timeout=(3, 30), headers=door)
            if answer.status_code in (401, 403):
                raise OSError(f"{repo} does not exist or is gated: accept its licence on its page and set HF_TOKEN")
            answer.raise_for_status()
            announced = answer.headers.get("x-linked-etag", "").strip('"')
            if announced or not answer.is_redirect:
                break
            url = urljoin(url, answer.headers["location"])
        return fetch(f"{target}/{name}", url, announced if len(announced) == 64 else "", door)

    folder = get("config.json").parent
    get("vocab.json")  # small, so before the weights
    get("merges.txt")
    if not (folder / "model.safetensors.index.json").is_file():
        with contextlib.suppress(requests.HTTPError):
            get("model.safetensors")  # one file ...
            return folder
    for name in sorted(set(json.loads(get("model.safetensors.index.json").read_text())["weight_map"].values())):
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(f"{repo}: {name!r} is no name of a file of weights")
        get(name)  # ... or an index that names the shards
    return folder


# differs from decoder_only.py: shards, and weights that stay in the dtype of the file
def from_pretrained(path_or_repo):
    """A folder in Hugging Face layout, or a repository name ("Qwen/Qwen3-0.6B").

    -> (model in eval mode, its Config). Raises OSError if it cannot be had, ValueError if it is not a Qwen3.
    """
    # Built on the meta device (shapes without memory), filled with the mapped files: its own size once, see llama3.py.
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = Path(path_or_repo) if Path(path_or_repo).is_dir() else hub_folder(path_or_repo)
    cfg = config_from_hf(json.loads((folder / "config.json").read_text()))
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
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


# differs from decoder_only.py: Qwen's vocab.json and merges.txt
def load_tokenizer(path):
    """The tokenizer of a folder or repository: tokenizer_spec.json (ours) or vocab.json with merges.txt (Qwen's)."""
    folder = Path(path) if Path(path).is_dir() else hub_folder(str(path))
    if (folder / "tokenizer_spec.json").is_file():
        return make_tokenizer(json.loads((folder / "tokenizer_spec.json").read_text()))
    return make_tokenizer({"kind": str(folder)})


# --- 8. Main: train, look, tell --------------------------------------------------------------------------------------
# Q: What fills the memory in training?
# A: 16 bytes per parameter with plain AdamW (weight, gradient, two moments; 2 GB for GPT-2 124M), and activations
#    that grow with batch x length (14.7 GB for 12 x 1,024 tokens, half of it logits). Halve batch_size and double
#    grad_accum: the same step, half of the second part.
# differs from decoder_only.py: every token's rows are kept k times, once per expert
def memory_gb(cfg, parameters):
    """{what: GB} that one process needs to train in float32, before any of it is allocated."""
    tokens, D = cfg.batch_size // ranks()[1] * cfg.block_size, cfg.head_size or cfg.n_embd // cfg.n_head
    # Kept for the backward pass, per token and layer: inputs and outputs of the two norms, q (before and behind norm
    # and rotation) and what attention returns, k and v, and in the mixture k times: row, gate (4), output.
    mlp = (2 * cfg.n_embd + 4 * cfg.expert_size) * cfg.experts_per_token if cfg.n_experts else 4 * cfg.ffn_size
    kept = 4 * cfg.n_embd + 4 * cfg.n_head * D + 4 * cfg.n_kv_head * D + mlp
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


# differs from decoder_only.py: other fields make the shape, and the tokenizer may be Qwen's
def load_any(cfg):
    """--load: our checkpoint (a file, or the run folder around it) or published weights. -> (model, cfg, tokenizer).

    The shape of the model comes from what is loaded, everything else from the command line.
    """
    # shape: what the weights were made with; another value does not fit them, or means something else. free: the rest.
    shape = set("block_size n_layer n_head n_kv_head n_embd head_size ffn_size n_experts experts_per_token expert_size "
                "norm_topk_prob sparse_step mlp_only_layers vocab_size tie_weights rope_theta norm_eps tokenizer "
                "init_std".split())
    free = {field.name for field in dataclasses.fields(cfg)} - shape
    path = Path(cfg.load)
    path = path / "ckpt.pt" if (path / "ckpt.pt").is_file() else path
    if path.is_file():
        state = read_checkpoint(path)
        # The biases on the choice are weights of a kind: a run has them or not, and a flag cannot change that.
        if "bias" in (state["config"]["balance"], cfg.balance):
            free -= {"balance"}
        cfg = recorded_config(cfg, state["config"], free)
        model = build_model(cfg)
        load_checkpoint(path, model, None, cfg)
        return model.eval(), cfg, make_tokenizer(state["extra"]["tokenizer"])
    try:
        model, theirs = from_pretrained(cfg.load)
        tokenizer = load_tokenizer(cfg.load)
    except Exception as problem:  # json, zip, safetensors, requests: a foreign file has many ways to be wrong
        sys.exit(f"error: --load {cfg.load}: no run, no checkpoint and no Qwen3 folder or repository "
                 f"({' '.join(str(problem).split())[:200]})")
    if "block_size" in getattr(cfg, "given", ()):  # RoPE has no table of positions: a shorter context always fits
        theirs.block_size = min(theirs.block_size, cfg.block_size)
    # Fewer tokens than rows is usual (padded tables); more would index behind the end.
    if tokenizer.n_vocab > theirs.vocab_size:
        sys.exit(f"error: --load {cfg.load}: {theirs.vocab_size} tokens in the weights, {tokenizer.n_vocab} in the "
                 f"{tokenizer.spec['kind']} tokenizer; they do not belong together")
    if cfg.balance == "bias" and theirs.n_experts:
        sys.exit("error: --balance bias: published routers have no bias on the choice; take aux or none")
    if "aux_coef" not in getattr(cfg, "given", ()):
        cfg.aux_coef = theirs.aux_coef
    theirs.tokenizer = "gpt2" if tokenizer.spec["kind"] == "gpt2" else "char"
    cfg = recorded_config(cfg, dataclasses.asdict(theirs), free)
    # All modules hold this one record.
    model.cfg.dropout = cfg.dropout
    model.cfg.balance = cfg.balance
    return model, cfg, tokenizer


# differs from llama3.py: Qwen's roles, with or without thinking
def chat(model, tokenizer, cfg):
    """Read lines, write answers, until an empty line, Ctrl-C or Ctrl-D. The whole conversation is the next prompt."""
    if not isinstance(tokenizer, QwenTokenizer):
        sys.exit("error: --chat needs a model with Qwen's tokenizer; this one knows no roles")
    messages, generator = [], torch.Generator(next(model.parameters()).device).manual_seed(cfg.seed)
    print("You speak first; an empty line ends the conversation.")
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        while line := input("> ").strip():
            messages.append({"role": "user", "content": line})
            ids = tokenizer.chat_ids(messages, cfg.thinking)
            ids = torch.tensor([ids], device=next(model.parameters()).device)  # (1, T)
            # Recommended: temperature 0.6, top-p 0.95, top-k 20 with thinking, 0.7 and 0.8 without; never greedy.
            out = generate(model, ids, cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k,
                           top_p=cfg.top_p, repetition_penalty=cfg.repetition_penalty, eos_ids=tokenizer.eos_ids,
                           generator=generator, on_token=stream(tokenizer))    # (1, N)
            answer = tokenizer.decode([i for i in out[0].tolist() if i not in tokenizer.eos_ids])
            messages.append({"role": "assistant", "content": answer})
            print()


# Q: What does a mixture save, and what not?
# A: Arithmetic: a token pays for k experts of E. Not memory: all E must be there, and in training each has a gradient
#    and two moments. And in decoding, bound by reading weights, it saves time for one user alone: 64 tokens
#    at a time touch nearly all experts. Mixtures pay off with one token per step, or with very many.
@torch.no_grad()
def expert_load(model, inputs, keep=None):
    """How many tokens of inputs (R, T) visit each expert -> (L, E) counts, a row per mixture. keep (R, T): not pads."""
    was_training = model.training
    model.eval()  # or the biases on the choice would move
    model.hidden(inputs)  # routing needs no logits
    model.train(was_training)
    real = slice(None) if keep is None else keep.flatten()
    loads = [F.one_hot(layer.chosen[real], layer.cfg.n_experts).sum((0, 1)) for layer in model.mixtures()]  # (E)
    return torch.stack(loads)                                                  # (L, E)


def load_cv(load):
    """Coefficient of variation of the loads (L, E): standard deviation / mean, averaged over layers. 0 = all equal."""
    return (load.float().std(-1, unbiased=False) / load.float().mean(-1)).mean().item()


def plot_load(path, looks, load):
    """Left: inequality of the load over the training (looks: [(step, cv)]). Right: who gets how much at the end."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=120)
    left.plot(*zip(*looks, strict=True), "o-", ms=4)
    left.axhline(0.2, ls="--", lw=0.8, color="tab:red", label="0.2: balanced enough")
    left.legend()
    left.set(xlabel="step", ylabel="standard deviation / mean of the loads", ylim=(0, None),
             title="how unequal are the experts' loads?")
    share = load / load.sum(1, keepdim=True)                                   # (L, E)
    image = right.imshow(share.cpu(), vmin=0, cmap="viridis", aspect="auto")
    for (layer, e), value in zip(((i, j) for i in range(len(share)) for j in range(share.size(1))),
                                 share.flatten().tolist(), strict=True):
        if share.size(1) <= 16:  # more would not be readable
            right.text(e, layer, f"{value:.0%}", ha="center", va="center", fontsize=7,
                       color="black" if value > 0.7 * share.max() else "white")
    right.set(xlabel="expert", ylabel="mixture", yticks=range(len(share)),
              title=f"share of the visits (equal: {1 / share.size(1):.1%})")
    fig.colorbar(image, ax=right)
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def main(cfg):
    """Train (or --resume, or start from --load) and report; with --load and --prompt only write. -> (model, cfg)."""
    # In this order: device, settings, data, memory, model. What can fail does so before anything is written.
    device = setup(cfg)
    rank, world = ranks()
    # Three ways in: --resume (model, optimizer, step), --load (model only, a new run), neither (random weights).
    model, tokenizer = None, None
    if cfg.resume:
        # What a run was made with is in its checkpoint; the command line need not repeat it and may not contradict it.
        state = read_checkpoint(Path(cfg.out) / "ckpt.pt")
        free = {"out", "device", "compile", "resume", "eval_every", "save_every", "load", "prompt", "chat",
                "thinking", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "beams",
                "length_penalty"}
        cfg, tokenizer = recorded_config(cfg, state["config"], free), make_tokenizer(state["extra"]["tokenizer"])
    elif cfg.load:
        model, cfg, tokenizer = load_any(cfg)
    # Talking needs no data and leaves no files. "auto" keeps the dtype of the file.
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}.get(cfg.dtype)
    if cfg.chat:
        if not cfg.load or cfg.resume or cfg.beams > 1 or cfg.prompt:
            sys.exit("error: --chat needs --load (a published Qwen3) and goes without --resume, --beams and --prompt")
        chat(model.to(device, dtype), tokenizer, cfg)
        return model, cfg
    if cfg.load and cfg.prompt and not cfg.resume:
        model.to(device, dtype)
        check_prompt(tokenizer, cfg.prompt)
        print(cfg.prompt, end="", flush=True)
        text = write_text(model, tokenizer, cfg, cfg.prompt, cfg.max_new_tokens, stream(tokenizer))
        print(text if cfg.beams > 1 else "")  # sampled text was streamed; the best beam is known at the end only
        return model, cfg

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
    # A model needs at least one token to read. "\n" means "a line begins"; "40215=" asks a question.
    prompt = cfg.prompt or ("40215=" if cfg.data == "numbers" else "\n")
    if not cfg.prompt and "\n" not in tokenizer.spec.get("chars", "\n"):
        prompt = tokenizer.spec["chars"][0]  # a text without line ends
    check_prompt(tokenizer, prompt)  # now, not behind an hour of training
    check_memory(cfg, device)
    out = out_folder(cfg)
    # Weights stay float32 under bfloat16 autocast: after 1 bfloat16 knows 1.0078 next, so updates below 0.4 % of a
    # weight would change nothing. Symptom: the loss stops falling as soon as the learning rate gets small.
    model = (model or build_model(cfg)).to(device, torch.float64 if cfg.dtype == "float64" else torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {parameters:,} parameters on {device}, {cfg.batch_size * cfg.grad_accum} rows of "
          f"{train_data[0].size(1)} tokens a step; everything goes to {out}/")

    # looks: (step, inequality of the loads) on the same validation rows each time: a function of the weights alone.
    extra = {"tokenizer": tokenizer.spec, "data": info}
    extra["looks"] = looks = [list(look) for look in state["extra"]["looks"]] if cfg.resume else []
    watched = val_data[0][:256].to(device)                                     # (R, T)
    keep = watched != 0 if cfg.data == "numbers" else None  # pads visit experts too, but nobody minds which  # (R, T)

    def show(step):
        if step % cfg.eval_every == 0 and rank == 0:  # watch it learn: noise, then spaces, then words, then names
            line = write_text(model, tokenizer, cfg, prompt, min(60, cfg.max_new_tokens))
            tqdm.write(f"            {(prompt.lstrip() + line)!r}")
        if model.mixtures() and (step % 100 == 0 or step == cfg.max_steps):
            looks.append([step, load_cv(expert_load(model, watched, keep))])

    if cfg.resume:  # the checkpoint of a step is written before that step is looked at
        load_checkpoint(Path(cfg.out) / "ckpt.pt", model, None, cfg)
        looked = state["step"] % 100 == 0 or state["step"] == cfg.max_steps
        if looked and state["step"] not in (look[0] for look in looks):
            show(state["step"])
    result = train(model, cfg, train_data, val_data, compute_loss, extra, show)
    if cfg.data == "numbers":
        results = {"exact_match": exact_match(model, tokenizer, sorted(set(draw_numbers(1000, cfg.seed + 1, True))))}
    else:
        # Loss per token depends on how long a token is; bits per byte do not. BPE at 3.5 nats and 3.5 bytes a token has
        # 3.5 / ln 2 / 3.5 = 1.44 bits per byte and beats characters at 1.7 nats (2.45), whose loss looks half as large.
        results = {"bits_per_byte": result["val_loss"] / math.log(2) / info["bytes_per_token"]}
    if model.mixtures():
        load = expert_load(model, watched, keep)                                     # (L, E)
        aux = [load_balancing_loss([layer.logits], cfg.experts_per_token, keep).item() for layer in model.mixtures()]
        results |= {"expert_load_cv": load_cv(load), "aux_loss": sum(aux) / len(aux)}
    if rank > 0:
        return model, cfg

    text = prompt + write_text(model, tokenizer, cfg, prompt, cfg.max_new_tokens)
    write_atomically(out / "sample.txt", lambda file: file.write(text.encode()))
    floor = 0.0 if cfg.data == "numbers" else None  # what a perfect model would reach; nobody knows it for real text
    uniform = math.log(cfg.vocab_size)
    plot_curve(out / "curve.png", result["history"], f"{Path(__file__).name} on {Path(cfg.data).name}",
               {f"uniform guess, ln V = {uniform:.2f}": uniform} | ({} if floor is None else {"floor 0": floor}))
    # One file that says what was run, on what, and what came out: enough to repeat the run and compare it.
    # tokens_per_second counts training steps alone; seconds is all of train(), evaluations and samples included;
    # val_loss is the last one, not the luckiest.
    summary = {"config": dataclasses.asdict(cfg), "params": parameters, "val_loss": result["val_loss"], "floor": floor,
               "tokens_per_second": result["tokens_per_second"], "seconds": result["seconds"],
               "peak_memory_mb": peak_memory_mb(device), "data": info, "device": str(device),
               "torch": torch.__version__, "figures": ["curve.png"], "results": results}
    if model.mixtures():
        plot_load(out / "expert_load.png", looks, load)
        summary |= {"figures": ["curve.png", "expert_load.png"], "expert_load": load.tolist(), "load_cv": looks}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it: one place, no second copy to go stale.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    print(f"\n{text.strip()}\n\nThe sample is in {out}/sample.txt, the curve in {out}/curve.png. Talk to it with\n"
          f"  python {Path(__file__).name} --load {out} --prompt {prompt.strip() or 'The'!r}"
          f"{'' if cfg.temperature == Config.temperature else f' --temperature {cfg.temperature:g}'}\n"
          f"{f'Loads of the experts: {out}/expert_load.png. ' if model.mixtures() else ''}"
          f"Next: diff llama3.py qwen3_moe.py\n"
          f"Expected: {expected}\n"
          f"Reached:  val loss {result['val_loss']:.4f}, {', '.join(f'{k} {v:.4f}' for k, v in results.items())}, "
          f"{result['seconds']:.0f} s (a uniform guess: {uniform:.2f}"
          f"{'' if floor is None else f', a perfect model: {floor:.2f}'})")
    return model, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
