# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "safetensors>=0.4.3", "tiktoken>=0.7", "torch>=2.11",
#                 "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
LORA AND QLORA IN ONE FILE                       python lora_qlora.py               96 s on two CPU cores

Paper    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; Dettmers et al. 2023,
         QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314
Idea     To teach a trained model something new, leave its weights alone and learn a narrow detour beside each matrix: a
         product of two thin ones, a few percent of the numbers. What never changes need not be stored so that it could
         change: four bits a weight will do.
Picture  x -> W (O, I), frozen, 4 bits or 32 ---------> + -> y        y = x W^T + alpha/R * (x A^T) B^T
           -> A (R, I) -> B (O, R) -> * alpha/R -------->              trained: A and B alone
Symbols  B batch   T time   P past (cached) tokens   S = P + T   C n_embd   H query heads   K key/value heads (beams in
         beam_search)   D head_size   F ffn_size   V vocabulary   L layers   N new tokens   M rows of a product
         I, O inputs and outputs of a layer   R rank of an adapter (in sections 4 to 6: rows)   A, B its two matrices
         s = alpha / R   in quantise_nf4: N blocks of 64 weights, G groups of 256 blocks
New here LoRALinear (rsLoRA, DoRA, merging), NF4 codes with double quantisation, NF4Product, adapters in PEFT's files,
         instruction data with masked prompts. The base is llama3.py's.
Not here 8-bit Adam, paged optimizers (they need CUDA's unified memory), prefix and prompt tuning, training in several
         adapters at once
Expect   validation loss after 1,000 lines of the old form: full fine-tuning 0.332 (0.326 to 0.344, 3 seeds), LoRA with
         4.8% of the parameters 0.261 (0.244 to 0.273, 3 seeds), QLoRA on four bits 0.257 (0.227 to 0.276, 3 seeds); old
         names right 81% (77% to 85%, 3 seeds), 80% (78% to 83%, 3 seeds), 84% (80% to 89%, 3 seeds); modern names still
         right 4% (2% to 7%, 3 seeds), 5% (3% to 6%, 3 seeds), 6% (5% to 8%, 3 seeds) (base 100% (99% to 100%, 3
         seeds)). With all lines full fine-tuning 0.120, LoRA 0.159. Of the squared full update 39% (38% to 40%, 3
         seeds) lies within rank 4 (results/lora_qlora.json)
Asked    Why should an update of rank 16 be enough?   Why does B begin at 0?   What is alpha for?   Which layers?
         What has to be kept for the backward pass, when W is frozen?   What does an adapter cost at inference?
         What do the frozen weights still cost?  (grep "# Q:")
"""
import argparse
import atexit
import base64
import contextlib
import copy
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
# learn the fields by heart: each is explained where it is used. First reading: the picture of LoRA in section 2 to the
# end of that section; old_names to adapt_data in 4; train_stage, measure_steps in 5; section 8. The rest: llama3.py's.
#     python lora_qlora.py                                       pre-train a small base, adapt it in three ways, compare
#     python lora_qlora.py --method lora --rank 1                one way only, one number per row and column
#     python lora_qlora.py --load runs/lora_qlora/lora --prompt "old 40215="        let the adapted model write
#     python lora_qlora.py --checkpoint DIR --data my.json       adapt a Llama in Hugging Face's layout to instructions
#     python lora_qlora.py --checkpoint DIR --data my.txt --method qlora       or to a text, on weights of four bits
#     python lora_qlora.py --resume                              go on after Ctrl-C, a crash or a power cut
METHODS = ("full", "lora", "qlora")


@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    data: str = "auto"                # numbers | instruct | a .json or text | auto: numbers, with --checkpoint instruct
    checkpoint: str = ""              # folder with a Llama in Hugging Face's layout: adapt this one, pre-train nothing
    method: str = "auto"              # full | lora | qlora | all, in turn | auto (all; with --checkpoint lora)
    examples: int = 1000              # how many lines, entries or windows of a text to adapt with; 0 = all
    out: str = "runs/lora_qlora"      # folder for checkpoints, adapters, metrics, samples and pictures
    seed: int = 1337                  # decides initial weights, batches, dropout and samples
    device: str = "auto"              # auto (cuda if present, else cpu) | cpu | cuda | mps
    dtype: str = "auto"               # auto (float32; on cuda bfloat16 autocast) | float32 | bfloat16 | float64
    compile: bool = False             # torch.compile the training: a minute of waiting per stage, then faster steps

    # The adapter.
    rank: int = 4                     # width of the detour beside each matrix
    alpha: float = 16.0               # the detour counts alpha / rank times
    lora_dropout: float = 0.0         # share of the detour's inputs zeroed in training
    targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # layers that get one, by name
    rslora: bool = False              # alpha / sqrt(rank) instead: for ranks above 32
    dora: bool = False                # learn the length of each row apart from its direction
    double_quant: bool = True         # qlora: store the scales of the 4-bit blocks in 8 bits
    merge: bool = False               # write with the adapter added into the weights; a run saves that model as well

    # Shape of the base that is pre-trained here: 406,144 parameters.
    block_size: int = 32              # longest context in tokens
    n_layer: int = 2                  # layers
    n_head: int = 4                   # query heads
    n_kv_head: int = 2                # key/value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 128                 # width of the residual stream
    head_size: int = 0                # numbers per head; 0 = n_embd / n_head
    ffn_size: int = 384               # width of the feed-forward layer
    vocab_size: int = 0               # 0 takes the tokenizer's; more pads it
    tie_weights: bool = False         # one table for embedding and head
    rope_theta: float = 10_000.0      # base of the rotation periods; 500,000 in Llama 3, for contexts of 8,192 and more
    rope_factor: float = 0.0          # stretch slow rotations by this (8 in Llama 3.1, 32 in 3.2); 0 = leave them
    rope_original: int = 8192         # context of the training before the stretching
    norm_eps: float = 1e-5            # added to the mean square in RMSNorm
    dropout: float = 0.0              # share of each branch zeroed in training; Llama has none
    init_std: float = 0.088           # std of the initial weights, about 1/sqrt(n_embd)

    # Optimisation.
    base_steps: int = 700             # optimizer steps of the pre-training
    base_lr: float = 3e-3             # its peak learning rate
    max_steps: int = 400              # optimizer steps of each adaptation
    lr: float = 0.01                  # peak learning rate of adapters
    full_lr: float = 4e-3             # peak learning rate of full fine-tuning
    batch_size: int = 64              # rows per micro-step, over all ranks
    grad_accum: int = 1               # micro-steps per optimizer step
    min_lr_ratio: float = 0.0         # the last learning rate as a share of the peak
    warmup_steps: int = 20            # steps of linear warm-up
    weight_decay: float = 0.01        # on matrices and embeddings only
    beta2: float = 0.98               # memory of Adam's second moment: 0.98 looks back about 50 steps
    grad_clip: float = 1.0            # largest gradient norm
    eval_every: int = 50              # steps between passes over the whole validation split
    save_every: int = 200             # steps between checkpoints
    resume: bool = False              # continue the run in --out, bit for bit

    # Decoding.
    load: str = ""                    # folder with an adapter (its base is named in it), or with a whole Llama
    prompt: str = ""                  # what to continue; with instruction data an instruction. --load writes and stops
    max_new_tokens: int = 64          # tokens to write
    temperature: float = 0.0          # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0                    # sample among the k likeliest only; 0 = all
    top_p: float = 1.0                # sample among the likeliest that together have probability p
    repetition_penalty: float = 1.0   # above 1: make tokens that were already there less likely
    beams: int = 1                    # above 1: beam search, without temperature, top-k, top-p, repetition penalty
    length_penalty: float = 1.0       # beam score = sum of log-probs / length ** this

    def __post_init__(self):
        # A bad value caught here costs a line; caught at step 500 it costs the run.
        for names, ok, rule in (
                ("block_size n_layer n_head n_kv_head n_embd ffn_size rope_original max_steps base_steps batch_size "
                 "grad_accum eval_every save_every max_new_tokens beams rank", lambda x: x >= 1, "at least 1"),
                # `0 <= x < inf` and not `x < 0 or ...`: every comparison with nan is false, so nan fails as well
                ("seed", lambda x: 0 <= x < 2 ** 31, "in [0, 2^31)"),
                ("vocab_size head_size warmup_steps weight_decay temperature top_k examples",
                 lambda x: 0 <= x < math.inf, "0 or more"),
                ("lr full_lr base_lr grad_clip init_std rope_theta norm_eps repetition_penalty alpha",
                 lambda x: 0 < x < math.inf, "above 0"),
                ("rope_factor", lambda x: x == 0 or 1 <= x < math.inf, "0, or at least 1"),
                ("length_penalty", math.isfinite, "a number"),
                ("dropout lora_dropout beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("min_lr_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
                ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
                ("targets", lambda x: all(x.split(",")), "names with commas between them"),
                ("method", ("auto", "all", *METHODS).__contains__, "auto, all, full, lora or qlora"),
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


# Q: How do I choose rank, alpha and the rate?
# A: Fix alpha (16 here and in QLoRA's paper), take R between 8 and 64 (small data, small R), and search over the rate
#    alone: adapters want a larger one than full fine-tuning, about ten times in large models ("LoRA without regret").
#    If the training loss stalls above that of full fine-tuning, double R. The rates above are the best of three each,
#    a factor of two apart (runs `lower` and `higher` in results/lora_qlora.json).
#
# Defaults for a base from elsewhere (--checkpoint): fields at their default above take these values. The rate is
# that of QLoRA's paper, for full fine-tuning a tenth of it. Published models want small steps: they have more to lose.
CHECKPOINT = dict(rank=16, lora_dropout=0.05, lr=2e-4, full_lr=2e-5, beta2=0.999, max_steps=300,
                  batch_size=8, block_size=512, weight_decay=0.0, eval_every=100, examples=0, temperature=0.7)
PRESETS = {
    "laptop": {},  # the defaults above
    # Dettmers et al. 2023, appendix B.2, for models of up to 13 billion parameters; 1,875 steps of 16 rows.
    "qlora": dict(method="qlora", rank=64, alpha=16.0, lora_dropout=0.1, lr=2e-4, min_lr_ratio=1.0, beta2=0.999,
                  grad_clip=0.3, batch_size=16, max_steps=1875, block_size=512, weight_decay=0.0, examples=0),
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


# --- 2. Model: Llama 3, then the detour beside its matrices -----------------------------------------------------------
# First reading: the model is llama3.py's; go on at LoRALinear. What matters here: every product with a learned
# matrix is an nn.Linear, seven per layer, and whatever else computes y from x can stand in its place.

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


class Llama(nn.Module):
    """Llama 3. model(ids, mask=None, cache=None) -> logits (B, T, V). Module names are those of the published weights.

    Parameters: V*C (twice if the head is not tied) + L * (2*C*H*D + 2*C*K*D + 3*C*F + 2*C) + C. Llama-3-8B: 1.05
    billion for the two tables of V = 128,256 and 32 * 218 million: 8.03 billion.
    """

    def __init__(self, cfg):
        super().__init__()
        cfg.head_size = cfg.head_size or cfg.n_embd // cfg.n_head  # from here on the number itself, for the checkpoint
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(LlamaLayer(cfg) for _ in range(cfg.n_layer)),
            norm=RMSNorm(cfg.n_embd, cfg.norm_eps)))
        # Untied in the large models, where 525 million of 8 billion hardly matter; tied in the 1B and 3B.
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

# LoRA, low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), in one picture. The weight stays, a narrow detour beside
# it learns:
#
#     x (M, I) ---> W (O, I), frozen -------------> + ---> y (M, O)          y = x W^T + s * (x A^T) B^T
#         |                                             ^
#         +-------> A (R, I) ---> B (O, R) ---> * s -+                          s = alpha / R
#
# W has I * O numbers, the detour R * (I + O): for 4,096 x 4,096 and R = 16 that is 0.8 % of them. Gradients and
# Adam's two moments exist for A and B alone, and those were three quarters of the memory of full fine-tuning.
#
# B A has rank R: it is a sum of R products column * row, where a full update may need 4,096 of them.
#
# Q: Why should an update of rank 16 be enough for a matrix of rank 4,096?
# A: Nothing promises it. The idea is that the model has the features already and a task weighs them anew, in a few
#    directions. Look at the picture that this script draws: the update that full fine-tuning finds is NOT of low rank,
#    and yet one of rank 4 does the task as well with 1,000 lines (many updates solve it, and fewer degrees of freedom
#    learn less by heart). With 60,000 lines the full update is better. The header has the numbers.
#
# Q: Full fine-tuning, LoRA or QLoRA?
# A: Full: much data or really new knowledge, and 16 bytes a parameter to spend. LoRA: new behaviour from little data,
#    or many adapters beside one base, which can be taken off again. QLoRA: when even the base does not fit otherwise.
def lora_linear(x, y, A, B, scale):
    """y + scale * (x A^T) B^T for x (M, I), y = x W^T (M, O), A (R, I), B (O, R) -> (M, O), written over y."""
    # Narrow first: M*R*(I + O) multiplications. Trap: x @ (B @ A)^T builds an O x I matrix and multiplies by it,
    # which costs as much as W itself.
    # addmm_ scales, multiplies and adds in one pass. Written as y + scale * (...) the product, its multiple and the sum
    # are M*O numbers each, to be written and read again. In place is allowed: backward of a product needs its inputs,
    # not its output. (.to: y may be narrower than the float32 of A and B.)
    return y.addmm_(F.linear(x.to(A.dtype), A).to(y.dtype), B.t().to(y.dtype), alpha=scale)  # (M, O)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained detour of rank R beside it. Names inside are those of PEFT's files.

    (PEFT is Hugging Face's library of adapters.) rslora, rank-stabilised, scales by alpha / sqrt(R) instead
    (Kalajdzievski 2023, arXiv 2312.03732). dora, weight-decomposed: see row_norms.
    """

    # Q: Why does B begin at 0 and A at random, and not both at random, or both at 0?
    # A: B A = 0: step 0 is the base exactly, nothing is lost by adding the adapter. With both at 0 nothing would ever
    #    move: the gradient of B is a product with A, and the other way round. With A at random B has a gradient in step
    #    1, A from step 2 on. (B at random and A at 0 would do as well; this way round is the custom.)
    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, dora=False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"an adapter needs a rank of at least 1, not {rank}")
        like = base.like if isinstance(base, NF4Linear) else base.weight  # an NF4Linear (below) has no weight to ask
        self.base_layer, self.dropout = base, dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        # Adapters are float32 whatever the base is: an update of 1e-5 beside a weight of 0.1 is lost in bfloat16.
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=like.device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=like.device, dtype=dtype)
        bound = 1 / math.sqrt(base.in_features)  # nn.Linear's own default, as in the paper's code
        nn.init.uniform_(self.lora_A.weight, -bound, bound)
        nn.init.zeros_(self.lora_B.weight)
        # Q: What is alpha for, if the learning rate could do its work?
        # A: For changing R alone. B A is a sum of R products; in the first steps they all point the same way, and
        #    alpha / R keeps their sum of one size: a rate found at R = 8 is about right at R = 64. Later they do not,
        #    the sum grows like sqrt(R) only, and for large R alpha / R is too small: hence rslora.
        #    Trap: scaling by alpha. Symptom: with R = 16 the run needs a sixteenth of everybody else's rate.
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.lora_magnitude_vector = None
        if dora:
            self.register_buffer("squared", base.weight.detach().to(dtype).square().sum(1), persistent=False)  # (O)
            self.lora_magnitude_vector = nn.Parameter(self.squared.sqrt())     # (O)
        self.register_buffer("merged", None, persistent=False)

    def forward(self, x):
        """x (..., I) -> (..., O)."""
        if self.merged is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("the adapter is merged: nothing here can learn; call unmerge() before training")
            return F.linear(x, self.merged)                                    # (..., O)
        flat = x.flatten(0, -2)                                                # (M, I)
        y = self.base_layer(flat)                                              # (M, O)
        # Dropout on the way into the detour only: the frozen path needs no regularisation, it does not learn.
        y = lora_linear(F.dropout(flat, self.dropout, self.training), y, self.lora_A.weight, self.lora_B.weight,
                        self.scale)                                            # (M, O)
        if self.lora_magnitude_vector is not None:
            y = y * (self.lora_magnitude_vector / self.row_norms())            # (M, O)
        return y.view(*x.shape[:-1], self.out_features)                        # (..., O)

    # DoRA (Liu et al. 2024, arXiv 2402.09353): each row of W + s B A is a direction and a length; give the length a
    # parameter of its own, W' = m * (W + s B A) / |W + s B A|. Full updates often turn rows and keep their length, or
    # the reverse; with B A alone a row can hardly turn without changing its length.
    @torch.no_grad()  # section 4.3 of the paper: the norm counts as a constant in backward; cheaper, and as good
    def row_norms(self):
        """|W + s B A| of each row, (O), without building that matrix: |w + u|^2 = |w|^2 + 2 w.u + |u|^2."""
        # w and u are a row of W and of s B A. base_layer(A) takes A's rows for inputs: A W^T, also from four bits.
        A, B, s = self.lora_A.weight, self.lora_B.weight, self.scale
        wu = (self.base_layer(A).t() * B).sum(1)                               # (O)
        uu = (B @ (A @ A.t()) * B).sum(1)                                      # (O)
        return (self.squared + 2 * s * wu + s * s * uu).clamp(min=0).sqrt()    # (O)

    # Q: What does an adapter cost at inference?
    # A: Unmerged two thin products per layer, and hundreds of adapters can share one base in memory. Merged nothing:
    #    W + s B A is a matrix like any other (of full precision: a base of four bits grows eightfold by it).
    @torch.no_grad()
    def merged_weight(self):
        """W + s B A (DoRA: rescaled rows), (O, I), in the dtype of W; from 4 bits it comes out in full precision."""
        # Added up in float32 and rounded once, at the end. Trap: merging into the 4-bit codes: an update smaller than
        # half a step of the code is rounded away, and with it what was learned. (bfloat16 weights lose some of it too.)
        weight = self.base_layer.weight                                        # (O, I)
        total = self.scale * (self.lora_B.weight @ self.lora_A.weight)         # (O, I)
        total = total + weight.to(total.dtype)                                 # (O, I)
        if self.lora_magnitude_vector is not None:
            total = total * (self.lora_magnitude_vector / self.row_norms())[:, None]  # (O, I)
        return total.to(weight.dtype)                                          # (O, I)

    def merge(self):
        """Compute with one matrix from now on, until unmerge(). Raises RuntimeError if that is so already."""
        # W is kept beside the sum: twice the memory. For good, and for files, there is merge_adapters(). The classic
        # accident is W += s B A twice: the model then overdoes what it learned, and nothing complains.
        if self.merged is not None:
            raise RuntimeError("the adapter is merged already")
        self.merged = self.merged_weight()

    def unmerge(self):
        """Back to base and detour, exactly: W itself was kept. Raises RuntimeError if nothing is merged."""
        # Trap: adding into W in place and subtracting later. In bfloat16 (W + u) - u is not W: every round trip rounds.
        if self.merged is None:
            raise RuntimeError("the adapter is not merged")
        self.merged = None


def add_lora(model, targets, rank, alpha, dropout=0.0, rslora=False, dora=False):
    """Freeze the model and put an adapter beside every linear layer whose name ends in one of `targets`, in place.

    targets: names such as ["q_proj", "v_proj"], or whole paths. Raises ValueError for a name that no layer has.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, NF4Linear))}
    # Q: Which layers?
    # A: All linear ones of the blocks. The paper adapted attention alone; two thirds of an adapter for all layers are
    #    beside the feed-forward matrices, and leaving those out costs the most (Schulman et al. 2025, "LoRA without
    #    regret"). Not the norms (vectors), and not the two tables, most of whose rows belong to rare tokens.
    chosen = {target: [name for name in layers if name == target or name.endswith("." + target)] for target in targets}
    for target, found in chosen.items():
        if not found:
            raise ValueError(f"no linear layer is called {target!r}; there are "
                             f"{', '.join(sorted({name.split('.')[-1] for name in layers}))}")
    model.requires_grad_(False)  # Trap: forgetting it. All weights train, the memory is that of full fine-tuning
    for name in (name for found in chosen.values() for name in found):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(layers[name], rank, alpha, dropout, rslora, dora))
    return model


def adapters(model):
    """-> {path: LoRALinear} of all adapters in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# QLoRA (Dettmers et al. 2023, arXiv 2305.14314) is LoRA beside a quantised base: each weight is replaced by the nearest
# of a few values, and its number is stored. If W never changes, it need not be stored in a form that can change. Four
# bits name one of 16 values; where should those lie? Trained weights are about normally distributed, so put them where
# each is about equally often the nearest: at quantiles of the normal distribution (NF4 = 4-bit NormalFloat). With Q(p)
# for the number below which a share p of a standard normal lies:
#
#     p = 1 - (1/30 + 1/32) / 2 = 0.9677   half a share from the end, of 15 and of 16 equal shares, in the mean: Q(1) is
#                                          infinite
#     8 positive values   Q(p), ... in 8 equal steps of probability down to (not including) Q(1/2) = 0
#     7 negative ones     -Q(p), ... in 7 steps likewise; and 0 itself, so that zeros stay zeros: 8 + 7 + 1 = 16
#     all divided by Q(p) = 1.848, so that they span -1 .. 1
#
# "About": a block of 64 weights is divided by its own maximum, which is not always 1.848 deviations away. The published
# constants, from that computation in single precision (a test derives them again):
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
# The nearest of 16 sorted values = how many of the 15 midpoints between neighbours lie below.
NF4_MIDPOINTS = (NF4[1:] + NF4[:-1]) / 2


# Each block of 64 weights is divided by its largest magnitude first, so that it fills -1 .. 1: one outlier spoils the
# precision of 63 neighbours and not of a whole matrix. The price is a scale per block, 32 / 64 = half a bit a weight.
# The scales are numbers too: double quantisation stores them in 8 bits each, in blocks of 256 with a float32 scale.
#
#     one weight    4 + 32/64           = 4.5   bits           65 billion parameters: 36.6 GB
#     doubly        4 + 8/64 + 32/(64*256) = 4.127 bits                                33.5 GB, bfloat16: 130 GB
#
# The 8-bit code is a small floating-point format: 7 decades, the largest with 64 values of each sign, every smaller one
# with half as many. Scales minus their mean crowd around 0, and a few are far away (Dettmers 2015, arXiv 1511.04561).
def dynamic_map():
    """The 256 values of the signed 8-bit dynamic code, ascending, (256)."""
    values = [0.0, 1.0]
    for i in range(7):  # decade 10^(i-6) holds 2^i values of each sign, the midpoints of equal parts of 0.1 .. 1
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        middle = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += middle.tolist() + (-middle).tolist()
    return torch.tensor(sorted(values))                                        # (256)


@functools.cache
def tables(device):
    """-> (the two values of each byte as one 8-byte item (256), the 8-bit code's values (256)) on that device."""
    pairs = torch.stack((NF4.repeat_interleave(16), NF4.repeat(16)), 1)        # (256, 2): high nibble first
    # int64 is a container of 8 bytes here, no number: what is looked up is turned back into two float32.
    return pairs.to(device).view(torch.int64)[:, 0], dynamic_map().to(device)  # (256), (256)


def blocks_of(x, size):
    """x, any shape -> (its numbers in rows of `size`, the last one filled up with 0; the largest magnitude of each)."""
    rows = F.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)           # (N, size)
    return rows, rows.abs().amax(1)


def quantise_nf4(weight, double_quant=True):
    """weight (O, I) -> {"codes": uint8, two per byte, "absmax": one scale per block of 64, ...}. Pure.

    The same bits as quantize_4bit of bitsandbytes (the library of QLoRA's authors) on a CPU. With double_quant absmax
    is uint8, and "nested_absmax" (float32, one per 256 of them) and "offset" (their mean) are there too. W is read as
    one long row: a block may hold the end of one row and the beginning of the next.
    """
    x, absmax = blocks_of(weight.float(), 64)                                  # (N, 64), (N)
    # clamp: a block of zeros has no scale. 0 * 1e38 is 0 all the same.
    scaled = x * (1 / absmax.clamp(min=1e-38))[:, None]                        # (N, 64)
    # bucketize counts the midpoints below each number. Comparing with all 16 values would take 16 times the memory.
    codes = torch.bucketize(scaled, NF4_MIDPOINTS.to(x.device), out_int32=True).to(torch.uint8).flatten()  # (64*N)
    packed = codes[::2] << 4 | codes[1::2]                                     # (32*N): the first in the high nibble
    if not double_quant:
        return {"codes": packed, "absmax": absmax}
    # Scales are positive: without taking their mean off, half of a signed code would lie idle.
    offset = absmax.mean()                                                     # ()
    y, nested = blocks_of(absmax - offset, 256)                                # (G, 256), (G)
    # -1 .. 1 becomes one of 65,536 steps first, and that the nearest value: the library's CPU code behaves as if it had
    # a table of so many entries. Without this a scale near the middle of two values may get the other one (tests tell).
    steps = ((y / nested.clamp(min=1e-38)[:, None] + 1) * 32767.5 + 0.5).int()  # (G, 256)
    values = tables(x.device)[1]                                               # (256)
    bytes_ = torch.bucketize(steps / 32767.5 - 1, (values[1:] + values[:-1]) / 2, out_int32=True)  # (G, 256)
    return {"codes": packed, "absmax": bytes_.to(torch.uint8).flatten()[:len(absmax)], "nested_absmax": nested,
            "offset": offset}


def dequantise_nf4(shape, codes, absmax, nested_absmax=None, offset=None, dtype=torch.float32):
    """What quantise_nf4 made -> the weight of that shape, (O, I), each number the nearest of 16. Pure."""
    pairs, values = tables(codes.device)                                       # (256), (256)
    if nested_absmax is not None:
        scale = values[absmax.int()]                                           # (N)
        absmax = scale * nested_absmax.repeat_interleave(256)[:len(scale)] + offset  # (N)
    # One lookup per byte fetches both values, as one 8-byte item: index_select is fast for plain vectors. Splitting the
    # nibbles first and looking each up takes many times as long.
    x = pairs.index_select(0, codes.int()).view(torch.float32).view(-1, 64)    # (N, 64)
    x = x.mul_(absmax[:, None]).flatten()[:math.prod(shape)].view(shape)       # (O, I)
    return x.to(dtype)                                                         # (O, I)


# Q: What has to be kept for the backward pass of y = x W^T, when W is frozen?
# A: W, for dx = dy W; not x, which dW = dy^T x would need. (The detour does keep x, for dA: activations hardly shrink.)
#    Left to itself autograd would keep the dequantised W of every layer alive until backward: 32 bits a weight after
#    all, for the whole model. So W is dequantised again. That takes as long for one row as for 1,024: a small share of
#    a training step (README: QLoRA beside LoRA), and more than the product itself when single tokens are written. Fast
#    inference needs a kernel that multiplies with the codes.
class NF4Product(torch.autograd.Function):
    """x W^T with W in 4 bits, dequantised once in forward and once more in backward, and never kept."""

    @staticmethod
    def forward(ctx, x, layer):
        """x (..., I), layer: an NF4Linear -> (..., O)."""
        ctx.layer = layer  # the codes. Trap: ctx.save_for_backward(W), which is what this class exists to avoid
        return F.linear(x, layer.dequantised(x.dtype))                         # (..., O)

    @staticmethod
    def backward(ctx, gradient):
        """dy (..., O) -> dx (..., I), and None for the second argument: frozen codes have no gradient."""
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight takes 4.127 bits a number (4.5 without double quantisation)."""

    def __init__(self, linear, double_quant=True):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        # Buffers, not parameters: they move and are saved with the model, and no optimizer ever sees them.
        for name, tensor in quantise_nf4(linear.weight.detach(), double_quant).items():
            self.register_buffer(name, tensor)
        self.register_buffer("like", linear.weight.new_zeros(0), persistent=False)  # remembers device and dtype

    def dequantised(self, dtype):
        """The weight, (O, I), made anew in each call."""
        kept = {name: buffer for name, buffer in self.named_buffers() if name != "like"}
        return dequantise_nf4((self.out_features, self.in_features), **kept, dtype=dtype)

    @property
    def weight(self):
        """The weight as a tensor in full precision, (O, I): for merging and for looking at it."""
        return self.dequantised(self.like.dtype)

    def forward(self, x):
        """x (..., I) -> (..., O)."""
        # A function of one's own is unknown to autocast: it has to ask for the dtype itself.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return NF4Product.apply(x, self)                                       # (..., O)


def quantise_model(model, double_quant=True):
    """Replace every linear layer inside the blocks by its 4-bit form, in place. -> the model."""
    # What stays as it is, and why. Norms: vectors, 0.003 % of an 8B Llama, and every number of the stream is multiplied
    # by one. The embedding: a lookup, not a product; its rows are the input itself. The head: its errors go straight
    # into the logits, no later layer can make up for them. The two tables are 13 % of an 8B Llama.
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, NF4Linear(child, double_quant))
    return model


def merge_adapters(model):
    """Replace every adapter, and every layer of four bits, by one plain linear layer, in place. -> a Llama again."""
    merged = {name: module.merged_weight() for name, module in adapters(model).items()}
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear) and not name.endswith(".base_layer"):
            merged[name] = module.weight
    for name, weight in merged.items():
        parent, _, last = name.rpartition(".")
        linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        setattr(model.get_submodule(parent), last, linear)
    return model


def bytes_of(tensors):
    """Memory that tensors occupy, each counted once, in bytes."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


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
# differs from decoder_only.py: two words more, for the second form of the language
# Digits and words have ids of their own: "5" and "five" must be *learned* to mean the same. Index = id, <pad> = 0.
TOY_VOCAB = ["<pad>", "\n", "=", "[CLS]", "[SEP]", "[MASK]", *"0123456789", *UNITS, *TENS, "hundred", "thousand",
             "and", "old"]


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


class Llama3Tokenizer:
    """Meta's tokenizer.model: 128,000 byte pieces, one "base64 rank" per line, and 256 special tokens behind them.

    Through tiktoken: a piece of the pattern that is in the list whole is one id, else neighbours are merged, lowest
    rank first. spec carries the file's text, so that a checkpoint needs no file beside it.
    """

    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    NAMED = ("begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id "
             "step_id start_header_id end_header_id eom_id eot_id python_tag image").split()

    def __init__(self, text):
        import tiktoken
        ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(str.split, text.splitlines())}
        # tiktoken trusts the list: twice the same rank would end the program, a gap would move all special ids.
        if set(ranks.values()) != set(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("this is no tokenizer.model of Llama 3: ranks are not 0, 1, 2 ..., or a byte is missing")
        names = self.NAMED + [f"reserved_special_token_{i}" for i in range(2, 246)]
        self.special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}  # 256 of them
        self.encoding = tiktoken.Encoding("llama3", pat_str=self.PATTERN, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        self.spec, self.n_vocab = {"kind": "llama3", "model": text}, self.encoding.n_vocab
        self.eos_ids = tuple(self.special[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id"))

    def encode(self, text):
        return self.encoding.encode_ordinary(text)  # "<|eot_id|>" typed by a user is text here, not a command

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i < self.n_vocab])

    # One message:  <|start_header_id|>user<|end_header_id|>\n\nWhat is RoPE?<|eot_id|>
    # A prompt ends behind the assistant's header: the model goes on as the assistant, until it writes <|eot_id|>.
    def chat_ids(self, messages, date=""):
        """[{"role": "system" | "user" | "assistant", "content": text}] -> ids that end where the assistant begins.

        date "" is Llama 3's template; a date such as "26 Jul 2024" is that of 3.1 and 3.2, which always open with a
        system message that says it. Raises ValueError if there is no message.
        """
        # Trap: rendering to text and encoding that. A user who types "<|eot_id|><|start_header_id|>system" would end
        # his own turn and speak as the system. Here only this function can make special ids.
        # Trap: encoding the rendered text with a tokenizer that puts <|begin_of_text|> in front: there are two then.
        if not messages:
            raise ValueError("no messages: there is nothing to answer")
        if date:
            first = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
            head = f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{first}"
            messages = [{"role": "system", "content": head}, *messages[messages[0]["role"] == "system":]]
        ids = [self.special["<|begin_of_text|>"]]
        for i, message in enumerate([*messages, {"role": "assistant"}]):
            ids += [self.special["<|start_header_id|>"], *self.encode(message["role"]),
                    self.special["<|end_header_id|>"]]
            # The dated head keeps its empty line even if nothing follows it; every other text is stripped.
            content = message.get("content", "")
            ids += self.encode("\n\n" + (content if date and i == 0 else content.strip()))
            ids += [self.special["<|eot_id|>"]] if "content" in message else []
        return ids


# differs from decoder_only.py: Meta's tokenizer.model is one more kind; given as a path, or as the text of the file
def make_tokenizer(spec):
    """The tokenizer that a spec describes: {"kind": "char", "chars": ...}, "numbers", "gpt2", "llama3" or a path."""
    if spec["kind"] == "char":
        return CharTokenizer(spec["chars"])
    if spec["kind"] == "numbers":
        return ToyTokenizer()
    if spec["kind"] == "llama3":
        return Llama3Tokenizer(spec["model"])
    try:
        if spec["kind"].endswith(".model"):
            return Llama3Tokenizer(Path(spec["kind"]).read_text())
        import tiktoken
        return BPETokenizer(tiktoken.get_encoding(spec["kind"]))
    except (OSError, ValueError) as problem:
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


# The second form of the toy language: English as it was counted two centuries ago, "four and twenty blackbirds". Units
# stand before tens, and people were free to say "and" behind hundred and thousand, or not:
#
#     24  = four and twenty              40215 = forty thousand two hundred fifteen
#                                              | forty thousand two hundred and fifteen
#
# Two new words ("and", and the "old" that asks for it), a new order, and a choice that nobody can predict: that is what
# fine-tuning data look like.
def old_names(n):
    """0 <= n <= 999,999 -> all names of the old form; the data draw each of them equally often."""
    if n >= 100:
        size, word = (1000, "thousand") if n >= 1000 else (100, "hundred")
        rest = old_names(n % size) if n % size else []
        ends = [f" {name}" for name in rest] if rest else [""]
        if n % size < 100:  # "and" only before what is left of tens and units
            ends += [f" and {name}" for name in rest]
        return [f"{head} {word}{end}" for head in old_names(n // size) for end in ends]
    if n < 20 or n % 10 == 0:
        return [number_to_words(n)]
    return [f"{UNITS[n % 10]} and {TENS[n // 10 - 2]}"]


def encode_prompt(tokenizer, text):
    """Ids of a prompt: published Llamas have never seen a text without <|begin_of_text|> in front."""
    start = [tokenizer.special["<|begin_of_text|>"]] if isinstance(tokenizer, Llama3Tokenizer) else []
    return start + tokenizer.encode(text)


def answer_rows(pairs, block_size):
    """(prompt ids, answer ids) pairs -> (inputs, targets), each (rows, T): only the answers are targets.

    Padded on the right with 0, cut at block_size; pairs of which no answer token is left are dropped.
    """
    # Q: Why mask the prompt?
    # A: At inference it is always given, so learning to write it is wasted capacity; and in instruction data the
    #    prompts are of a kind (one template, again and again): their easy tokens would make up most of the loss, and
    #    the falling curve would say nothing about the answers.
    # Trap: encoding prompt + answer as one text and cutting at the prompt's length. BPE may merge across the seam, and
    # the mask then starts one token early or late. Encoded apart, prompts in training are what they are at inference.
    rows = [(prompt + answer, len(prompt)) for prompt, answer in pairs if len(prompt) < block_size + 1]
    width = min(block_size + 1, max((len(ids) for ids, _ in rows), default=0))
    ids = torch.tensor([(row + [0] * width)[:width] for row, _ in rows], dtype=torch.int64).view(len(rows), width)
    targets = ids[:, 1:].clone()                                               # (R, T)
    for row, (full, start) in zip(targets, rows, strict=True):
        # targets[i] is token i + 1: the first answer token is the target of the prompt's last.
        row[:start - 1] = IGNORE
        row[len(full) - 1:] = IGNORE  # by length and not by value: 0 is padding here and a letter elsewhere
    return ids[:, :-1], targets


INSTRUCT = ("instruction-data.json", "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/"
            "01_main-chapter-code/instruction-data.json",
            "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944")


def instruct_prompt(instruction, extra=""):
    """The Alpaca template (Taori et al. 2023): what the model reads before it answers."""
    # A chat model has a template of its own; a base model knows none, and learns any that is always the same.
    text = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{instruction}\n\n")
    return text + (f"### Input:\n{extra}\n\n" if extra else "") + "### Response:\n"


def read_instructions(path):
    """A JSON list of {"instruction", "input" (may be missing), "output"} -> [(prompt, answer)]. Raises ValueError."""
    entries = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all(
            isinstance(e, dict) and all(isinstance(e.get(key, default), str) for key, default in
                                        (("instruction", None), ("input", ""), ("output", None))) for e in entries):
        raise ValueError('it must be a list of {"instruction": ..., "input": ..., "output": ...}, all of them texts')
    return [(instruct_prompt(e["instruction"], e.get("input", "")), e["output"]) for e in entries]


def base_data(cfg, tokenizer):
    """What the base is pre-trained on, modern English names: (train rows, validation rows)."""
    # 60,000 draws hold about 25,500 different numbers, 3 % of the 900,000: by heart is not enough for the others.
    train, val = draw_numbers(60_000, cfg.seed, False), sorted(set(draw_numbers(2_500, cfg.seed, True)))
    print(f"base: {len(train):,} lines such as 24=twenty four to train, {len(val):,} other numbers to validate")
    return number_rows(train, tokenizer), number_rows(val, tokenizer)


def adapt_data(cfg, tokenizer):
    """What the base is adapted to: (train rows, validation rows, info). info: name, sha256, floor in nats per token."""
    # The toy language: lines of the old form, in the same split as the modern ones, so that no number that is tested
    # was ever trained on, in either form.
    if cfg.data == "numbers":
        # 23 = the 8 tokens of "old 777777=" and the 15 that name_match lets a model write
        if tokenizer.spec != ToyTokenizer.spec or cfg.block_size < 23:
            sys.exit("error: --data numbers needs a base of the toy language, and --block-size 23 or more")
        rng, val = random.Random(cfg.seed), sorted(set(draw_numbers(2_500, cfg.seed, True)))
        train = draw_numbers(cfg.examples or 60_000, cfg.seed + 2, False)
        lines = [[(f"old {n}=", f"{rng.choice(old_names(n))}\n") for n in part] for part in (train, val)]
        # A perfect model knows all names and that each is equally likely: it pays ln(number of names) for a line, the
        # entropy of the draw, and no training gets below that.
        choices = sum(math.log(len(old_names(n))) for n in val)
        floor = choices / sum(len(tokenizer.encode(answer)) for _, answer in lines[1])
        about = "lines of the old form, such as old 24=four and twenty"
    # Instructions with answers, from a file or the 1,100 of Raschka's book.
    elif cfg.data == "instruct" or cfg.data.endswith(".json"):
        try:
            entries = read_instructions(fetch(*INSTRUCT) if cfg.data == "instruct" else cfg.data)
        except (OSError, ValueError) as problem:
            sys.exit(f"error: --data {cfg.data}: {problem}")
        cut = int(0.9 * len(entries))  # the last tenth is held out
        lines, floor, about = [entries[:cut][:cfg.examples or cut], entries[cut:]], None, "instructions with answers"
    # Any other text: windows of it, every token a target.
    else:
        text, name, about = load_text(cfg.data)
        cut = int(0.9 * len(text))
        try:
            train, val = (torch.tensor(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
        except ValueError as problem:
            sys.exit(f"error: --data {cfg.data}: {problem}")
        T = cfg.block_size
        if min(len(train), len(val)) <= T:
            sys.exit(f"error: --data {cfg.data}: too short; the held-out tenth has {len(val)} tokens and one row needs "
                     f"{T + 1} (a smaller --block-size helps)")
        train = text_rows(train, T, 1)
        train = tuple(part[:cfg.examples or None] for part in train)
        print(f"data: {about}, {len(train[0]):,} windows to train")
        return train, text_rows(val, T, T), {"name": name, "floor": None,
                                             "sha256": hashlib.sha256(text.encode()).hexdigest()}
    if not lines[0] or not lines[1]:
        sys.exit(f"error: --data {cfg.data}: too few entries; one in ten is held out")
    # Behind every answer its end. Trap: leaving it out; the adapted model never stops. (A tokenizer of single
    # characters has no such token: models of running text never end.)
    end = [] if cfg.data == "numbers" else list(tokenizer.eos_ids[:1])
    try:
        rows = [answer_rows([(encode_prompt(tokenizer, prompt), tokenizer.encode(answer) + end)
                             for prompt, answer in part], cfg.block_size) for part in lines]
    except ValueError as problem:
        sys.exit(f"error: --data {cfg.data}: {problem}")
    if not all(len(part[0]) and bool((part[1] != IGNORE).any()) for part in rows):
        sys.exit(f"error: --data {cfg.data}: no answer begins within --block-size {cfg.block_size} tokens")
    print(f"data: {len(rows[0][0]):,} {about} to train, {len(rows[1][0]):,} others to validate")
    info = {"name": cfg.data, "sha256": hashlib.sha256(str(lines).encode()).hexdigest(), "floor": floor}
    return rows[0], rows[1], info


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
    """Cut off the columns behind the batch's last target: a batch of short rows is a small one. (Nothing is drawn.)"""
    inputs, targets = batch
    used = int((targets != IGNORE).any(0).nonzero().max()) + 1
    return inputs[:, :used], targets[:, :used]


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


# differs from decoder_only.py: what is frozen has a file of its own; a checkpoint holds what is trained
def save_checkpoint(path, model, optimizer, step, cfg, extra):
    """Everything that decides how training goes on. extra: plain data kept with it (tokenizer, data hash, metrics)."""
    # For an 8B model and rank 16 that is 0.5 GB (adapter and two moments) instead of 96.
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {"script": Path(__file__).stem, "step": step, "config": dataclasses.asdict(cfg), "extra": extra,
             "model": trained, "optimizer": optimizer.state_dict()}
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


# differs from decoder_only.py: only what is trained is in the file, the frozen rest is there already
def load_checkpoint(path, model, optimizer, cfg):
    """Fill model and optimizer (None: the model alone) from a file. -> (step, extra). Wrong shapes are named."""
    state = read_checkpoint(path)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        for name in sorted(wanted ^ state["model"].keys()):
            raise ValueError(f"{name} is {'missing' if name in wanted else 'not trained here'}")
        model.load_state_dict(state["model"], strict=False)
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

def weights_hash(model):
    """SHA-256 over all weights: an adapter that was trained on other ones is worth nothing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_run(folder):
    """--resume: what the newest run in a folder was made with, {"config", "data"}, from its run.json."""
    # The command line need not repeat it and may not contradict it. Every stage has a checkpoint of its own besides.
    path = Path(folder) / "run.json"
    try:
        recorded = json.loads(path.read_text())
        if recorded["script"] != Path(__file__).stem:
            sys.exit(f"error: {path} was not written by {Path(__file__).name}")
    except FileNotFoundError:
        sys.exit(f"error: --resume: there is no run in {folder} ({path.name} is missing)")
    except (ValueError, KeyError, TypeError) as problem:
        sys.exit(f"error: {path} is damaged ({problem})")
    return recorded


def train_stage(model, cfg, name, data, loss_fn, extra, after_step=None, guess=None, **changes):
    """One training of several, in a folder of its own, <out>/<name>. -> train()'s result.

    extra["identity"] says what it builds on (settings, data, base). With --resume a stage that was begun or finished on
    the same is continued, and lists in extra go on from what its checkpoint holds; any other begins anew.
    """
    stage = dataclasses.replace(cfg, out=str(Path(cfg.out) / name), resume=False, **changes)
    path = Path(stage.out) / "ckpt.pt"
    if cfg.resume and path.is_file():
        saved = read_checkpoint(path)["extra"]
        stage.resume = saved.get("identity") == extra["identity"]
        for key, value in extra.items():
            if stage.resume and isinstance(value, list):
                value[:] = saved[key]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{name}: {trained:,} parameters are trained, {stage.max_steps} steps at {stage.lr:g}"
          f"{', continued' if stage.resume else ''}")
    return train(model, stage, *data, loss_fn, extra, after_step, guess)


def parameter_count(model):
    """Numbers in all weights, those in four bits included, adapters too."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    return sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in packed)


def autocast(cfg, device):
    """The precision that train() computes in, for what is measured beside it."""
    return torch.autocast(device.type, torch.bfloat16,
                          enabled=cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda"))


def synchronize(device):
    """Wait until the device has done what it was told: without it only the telling is timed."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


# Q: What do the frozen weights still cost?
# A: Their memory, and two thirds of the arithmetic: forward (2 operations per weight and token) and the gradient that
#    passes through them to the layers below (2 more); their own gradient (2) is what is saved. So LoRA saves a third of
#    the time at best, and of 16 bytes a parameter the 12 of gradient and moments. Activations stay; QLoRA adds the
#    dequantising, twice a step.
def measure_steps(models, data, cfg, rounds=12):
    """{method: model} -> {method: {"ms", "weights", "gradients", "optimizer"}}: median time and bytes of one step.

    The methods take turns, so that all meet the same load on a shared machine; round 0 warms up and is dropped. Nothing
    is learned: the rate is 0.
    """
    device = next(next(iter(models.values())).parameters()).device
    batch = prepare(get_batch(data, cfg.batch_size, cfg.seed, 0), None)
    batch = tuple(part.to(device) for part in batch)
    # A rate of 0 moves no weight (decay is multiplied by the rate too), and takes as long as any other.
    optimizers = {name: make_optimizer(model.train(), cfg) for name, model in models.items()}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    times, found = {name: [] for name in models}, {}
    for turn in range(rounds + 1):
        for name, model in models.items():
            synchronize(device)
            began = time.perf_counter()
            with autocast(cfg, device):
                loss_sum, count, _ = compute_loss(model, batch, cfg)
            (loss_sum / count).backward()
            optimizers[name].step()
            synchronize(device)
            times[name].append(time.perf_counter() - began)
            if turn == 0:
                state = [t for one in optimizers[name].state.values() for t in one.values() if torch.is_tensor(t)]
                found[name] = {"weights": bytes_of([*model.parameters(), *model.buffers()]),
                               "gradients": bytes_of([p.grad for p in model.parameters() if p.grad is not None]),
                               "optimizer": bytes_of(state)}
            optimizers[name].zero_grad(set_to_none=True)
    return {name: found[name] | {"ms": 1e3 * statistics.median(times[name][1:])} for name in models}


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
    cache = KVCache(model.cfg, len(ids), min(max_len, model.cfg.block_size), like=model.model.embed_tokens.weight)
    return model.lm_head(model.hidden(ids, mask, cache)[:, -1]), cache  # V logits for B positions and not for B*T


@torch.inference_mode()
def decode_step(model, token, cache):
    """Append one token (B,) per row. -> (logits (B, V), cache). A full context forgets its older half first."""
    # Through the modules, whatever they are: plain layers, layers with a detour, layers in four bits.
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


# --- 7. Interchange: published weights in, adapters in and out --------------------------------------------------------
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
                  tie_weights=hf.get("tie_word_embeddings", False), init_std=hf.get("initializer_range", 0.02))


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


# An adapter in PEFT's layout: adapter_config.json says rank and alpha, adapter_model.safetensors holds
#     base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (R, I)     ... .lora_B.weight (O, R)
# and, for DoRA, ... .lora_magnitude_vector (O). "base_model.model." is where PEFT keeps the model that it wraps.
PEFT = "base_model.model."


def save_adapter(model, cfg, base, path):
    """Write the adapters of a model as PEFT does: adapter_config.json and adapter_model.safetensors.

    base: path of the folder that the adapter belongs to; PEFT and --load look for it there.
    """
    from safetensors.torch import save
    tensors = {PEFT + name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()
               if ".lora_" in name}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": cfg.rank,
              "lora_alpha": cfg.alpha, "lora_dropout": cfg.lora_dropout, "use_rslora": cfg.rslora,
              "use_dora": cfg.dora, "target_modules": cfg.targets.split(","), "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}  # fan_in_fan_out: GPT-2's transposed matrices
    for name, content in {"adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
                          "adapter_config.json": json.dumps(config, indent=2).encode()}.items():
        write_atomically(Path(path) / name, lambda file, content=content: file.write(content))


def load_adapter(model, path):
    """Put the adapter of a folder (ours or PEFT's) beside the layers of its base, in place. -> its config (a dict).

    Raises OSError if a file is missing, ValueError if it is no LoRA adapter or was made for other shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    # Each of these changes the arithmetic, and the tensors alone would not tell.
    for key, expected in (("peft_type", "LORA"), ("bias", "none"), ("fan_in_fan_out", False), ("rank_pattern", {}),
                          ("alpha_pattern", {}), ("modules_to_save", None), ("lora_bias", False)):
        if (config.get(key) or expected) != expected:
            raise ValueError(f"adapter_config.json says {key} = {config[key]!r}; this file knows {expected!r} only")
    if isinstance(config.get("init_lora_weights"), str) and config["init_lora_weights"] != "gaussian":
        raise ValueError(f"adapter_config.json says init_lora_weights = {config['init_lora_weights']!r}: such adapters "
                         f"may change their base too")
    try:
        tensors = load_file(Path(path) / "adapter_model.safetensors")
    except SafetensorError as problem:
        raise ValueError(f"the adapter in {path} is damaged ({problem})") from problem
    # Which layers have one is read off the names in the file: target_modules may also be a pattern.
    found = {name.removeprefix(PEFT): tensor for name, tensor in tensors.items()}
    targets = sorted({name.rpartition(".lora_")[0] for name in found})
    if not targets or "" in targets:
        raise ValueError("there are no tensors called ...lora_A.weight in it")
    add_lora(model, targets, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0),
             bool(config.get("use_rslora")), bool(config.get("use_dora")))
    wanted = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for name in sorted(wanted.keys() ^ found.keys()):
        raise ValueError(f"the adapter has no tensor {name}" if name in wanted else f"no layer wants the tensor {name}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"the adapter's {name} has the shape {tuple(tensor.shape)}, this base needs "
                             f"{tuple(wanted[name].shape)}: it was made for another one")
        wanted[name].data.copy_(tensor)
    return config


# differs from llama3.py: a folder only
def load_tokenizer(path):
    """The tokenizer of a folder: tokenizer_spec.json, ours, or Meta's tokenizer.model."""
    folder = Path(path)
    if (folder / "tokenizer_spec.json").is_file():
        return make_tokenizer(json.loads((folder / "tokenizer_spec.json").read_text()))
    for name in ("tokenizer.model", "original/tokenizer.model"):
        if (folder / name).is_file():
            return make_tokenizer({"kind": str(folder / name)})
    raise FileNotFoundError(f"{path} has no tokenizer.model (nor original/tokenizer.model, nor tokenizer_spec.json)")


# --- 8. Main: a base, three adaptations, one table -------------------------------------------------------------------
# Q: What fills the memory in training?
# A: 16 bytes per parameter with plain AdamW (weight, gradient, two moments; 2 GB for GPT-2 124M), and activations
#    that grow with batch x length (14.7 GB for 12 x 1,024 tokens, half of it logits). Halve batch_size and double
#    grad_accum: the same step, half of the second part.
# differs from decoder_only.py: frozen weights have no gradient and no moments, and may have four bits
def memory_gb(cfg, parameters):
    """{what: GB} that one process needs to train in float32, before any of it is allocated."""
    D = cfg.head_size or cfg.n_embd // cfg.n_head
    C, HD, KD, FF, L = cfg.n_embd, cfg.n_head * D, cfg.n_kv_head * D, cfg.ffn_size, cfg.n_layer
    tokens = cfg.batch_size // ranks()[1] * cfg.block_size
    matrices = L * (2 * C * HD + 2 * C * KD + 3 * C * FF)
    trained = parameters if cfg.method in ("full", "all") else L * cfg.rank * (7 * C + 2 * HD + 2 * KD + 3 * FF)
    weights = 4 * parameters if cfg.method != "qlora" else 4.127 / 8 * matrices + 4 * (parameters - matrices)
    weights += 4 * trained * (cfg.method != "full")
    # --method all keeps the base and three models beside each other, to compare them; a single one adapts in place.
    copies = 4 if cfg.method == "all" else 1
    # Kept for the backward pass, per token and layer, as in llama3.py; the detours add little.
    kept = L * (6 * C + 2 * HD + 2 * KD + 4 * FF) + 3 * cfg.vocab_size
    return {"weights": 1e-9 * weights * copies, "gradients": 4e-9 * trained,
            "optimizer": 8e-9 * trained, "activations": 4e-9 * tokens * kept}


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
# A: Errors multiply: 99 % of tokens right is 0.99^10 = 90 % of names of ten tokens. A name counts when it is one of
#    those that people use, whichever; nearly right is wrong.
def name_match(model, tokenizer, numbers, before, names):
    """Share of numbers n for which `before` + "n=" is continued, greedily, with one of names(n)."""
    device, right = next(model.parameters()).device, 0
    for start in range(0, len(numbers), 500):
        part = numbers[start:start + 500]
        # Prompts of 2 to 8 tokens in one batch: padded on the left, so that all of them end in the same column.
        prompts = [tokenizer.encode(f"{before}{n}=") for n in part]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (R, T)
        # The longest name has 13 words, seven hundred and seven and seventy thousand, then the same again without the
        # thousand; with the newline 14 tokens, and one to spare.
        out = generate(model, ids, 15, mask=ids != 0, eos_ids=tokenizer.eos_ids)  # (R, N)
        right += sum(tokenizer.decode(row) in {f"{name}\n" for name in names(n)}
                     for row, n in zip(out.tolist(), part, strict=True))
    return right / len(numbers)


@torch.no_grad()
def update_spectra(base, tuned):
    """{path: singular values of (tuned weight - base weight), descending} for every matrix of the blocks."""
    # Through plain layers and adapters alike: an adapter's weight is what it would merge into.
    def weights(model):
        return {name: (module.merged_weight() if isinstance(module, LoRALinear) else module.weight).float()
                for name, module in model.model.layers.named_modules()
                if isinstance(module, LoRALinear) or (isinstance(module, nn.Linear) and "lora_" not in name
                                                      and "base_layer" not in name)}
    before, after = weights(base), weights(tuned)
    return {name: torch.linalg.svdvals(after[name] - before[name]) for name in before}


def energy_within(spectra, rank):
    """Mean share of the squared update that its best approximation of that rank holds (Eckart & Young 1936).

    Singular values say how large each of the products column * row is that make up the update: if they drop fast, the
    first few hold nearly all of it. In the picture, what lies right of the red line no adapter of that rank can do.
    """
    return statistics.mean((s[:rank].square().sum() / s.square().sum()).item() for s in spectra.values() if s[0] > 0)


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


def plot_comparison(path, histories, figures, floor, title):
    """Validation loss of each method against steps, and what a step keeps in memory."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=120)
    for name, marker in zip(METHODS, "os^", strict=True):
        if name in histories:
            looks = [row for row in histories[name] if "val_loss" in row]
            left.plot([row["step"] for row in looks], [row["val_loss"] for row in looks], marker + "-", ms=4,
                      label=name)
    if floor is not None:
        left.axhline(floor, ls="--", lw=0.8, color="tab:red")
        left.text(0.5, floor, f"floor {floor:.3f}", transform=left.get_yaxis_transform(), ha="center", va="bottom",
                  fontsize=8)
    left.set(xlabel="step", ylabel="validation loss, nats per token", title=title, ylim=(0, None))
    left.legend()
    # Bars in layers: weights at the bottom, what only training needs on top.
    names, bottom = list(figures), [0.0] * len(figures)
    for what, color in (("weights", "tab:blue"), ("gradients", "tab:orange"), ("optimizer", "tab:green")):
        sizes = [figures[name][what] / 1e6 for name in names]
        right.bar(names, sizes, bottom=bottom, label=what, color=color)
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    right.set(ylabel="MB", title="what a step keeps beside activations")
    right.legend()
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def plot_spectra(path, full, lora, rank):
    """Singular values of the updates, each matrix a line: what full fine-tuning changed, what the adapter could."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=120, sharey=True)
    for ax, spectra, title in ((axes[0], full, "full fine-tuning"), (axes[1], lora, f"LoRA, rank {rank}")):
        for name, s in spectra.items():
            ax.plot(range(1, len(s) + 1), s.clamp(min=1e-4).tolist(), lw=1,
                    color="tab:orange" if "mlp" in name else "tab:blue")
        ax.axvline(rank + 0.5, ls="--", lw=0.8, color="tab:red")
        share = f"{title}: {energy_within(spectra, rank):.0%} of the squared update within rank {rank}"
        ax.set(xlabel="singular value number", yscale="log")
        ax.set_title(share, fontsize=9)
    axes[0].set(ylabel="singular value of the update", ylim=(1e-3, None))
    for color, label in (("tab:blue", "attention"), ("tab:orange", "feed-forward")):
        axes[0].plot([], [], color=color, label=label)
    axes[0].legend()
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


# differs from decoder_only.py: prompts are encoded as in training, with Meta's <|begin_of_text|>
def write_text(model, tokenizer, cfg, prompt, max_new_tokens, on_token=None):
    """Continue `prompt` as cfg says (beams, or temperature / top-k / top-p). -> the new text."""
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=next(model.parameters()).device)  # (1, T)
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


# What the weights were made with; another value does not fit them, or means something else.
SHAPE = set("n_layer n_head n_kv_head n_embd head_size ffn_size vocab_size tie_weights rope_theta rope_factor "
            "rope_original norm_eps init_std".split())


# differs from llama3.py: an adapter has a base somewhere else
def load_any(cfg):
    """The base: --checkpoint, or else the one that the adapter in --load names, or else --load itself.

    -> (model, cfg, tokenizer). The shape comes from what is loaded, everything else from the command line.
    """
    flag, base = ("--load", cfg.load) if cfg.load else ("--checkpoint", cfg.checkpoint)
    try:
        if cfg.load and (Path(cfg.load) / "adapter_config.json").is_file():
            config = json.loads((Path(cfg.load) / "adapter_config.json").read_text())
            base = cfg.checkpoint or config["base_model_name_or_path"]
            if not (Path(base) / "config.json").is_file():
                raise FileNotFoundError(f"its base {base} is not there; name the folder with --checkpoint")
        model, theirs = from_pretrained(base)
        tokenizer = load_tokenizer(base)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        sys.exit(f"error: {flag} {getattr(cfg, flag[2:])}: {' '.join(str(problem).split())[:300]}")
    if tokenizer.n_vocab > theirs.vocab_size:
        sys.exit(f"error: {base}: {theirs.vocab_size} tokens in the weights, {tokenizer.n_vocab} in the "
                 f"{tokenizer.spec['kind']} tokenizer; they do not belong together")
    free = {field.name for field in dataclasses.fields(cfg)} - SHAPE
    cfg = recorded_config(cfg, dataclasses.asdict(theirs), free)
    model.cfg.dropout = cfg.dropout  # all modules hold this one record
    return model, cfg, tokenizer


def talk(cfg, device):
    """--load and --prompt: let a model write. -> (model, cfg)."""
    if not cfg.prompt:
        sys.exit("error: --load lets a model write and needs --prompt; --resume continues a training")
    model, cfg, tokenizer = load_any(cfg)
    if cfg.method == "qlora":
        quantise_model(model, cfg.double_quant)
    if (Path(cfg.load) / "adapter_config.json").is_file():
        try:
            load_adapter(model, cfg.load)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            sys.exit(f"error: --load {cfg.load}: {' '.join(str(problem).split())[:300]}")
    if cfg.merge:
        merge_adapters(model)
    # "auto" keeps the dtype of the file.
    model.to(device, {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}.get(cfg.dtype))
    prompt = instruct_prompt(cfg.prompt) if cfg.data == "instruct" or cfg.data.endswith(".json") else cfg.prompt
    check_prompt(tokenizer, prompt)
    print(cfg.prompt, end="", flush=True)
    text = write_text(model, tokenizer, cfg, prompt, cfg.max_new_tokens, stream(tokenizer))
    print(text if cfg.beams > 1 else "")  # sampled text was streamed; the best beam is known at the end only
    return model, cfg


def make_ready(model, method, cfg):
    """Prepare a base, in place, for one of the methods. -> the model. Raises ValueError for unknown targets."""
    torch.manual_seed(cfg.seed)  # A is drawn at random
    if method == "qlora":
        quantise_model(model, cfg.double_quant)
    if method == "full":
        model.requires_grad_(True)
    else:
        add_lora(model, cfg.targets.split(","), cfg.rank, cfg.alpha, cfg.lora_dropout, cfg.rslora, cfg.dora)
    return model


def comparison(reports):
    """The table of all methods as text."""
    def row(label, key, form):
        return f"{label:<26}" + "".join(f"{'-' if one.get(key) is None else form(one[key]):>12}"
                                        for one in reports.values())
    lines = [f"{'':<26}" + "".join(f"{name:>12}" for name in reports),
             row("validation loss", "val_loss", "{:.4f}".format)]
    if "old" in reports["base"]:
        lines += [row("right, old form", "old", "{:.1%}".format),
                  row("right, modern form", "modern", "{:.1%}".format)]
    lines += [row("trained parameters", "trained", "{:,}".format)]
    lines += [row(f"{what}, MB", what, lambda size: f"{size / 1e6:.3f}")
              for what in ("weights", "gradients", "optimizer")]
    return "\n".join([*lines, row("ms per step", "ms", "{:.1f}".format)])


def main(cfg):
    """Pre-train a base (or take --checkpoint), adapt it, report; with --load only write. -> (model, cfg).

    The model is the last adapted one.
    """
    # In this order: device, settings, base, data, memory. What can fail does so before anything is written.
    began, device = time.perf_counter(), setup(cfg)
    (rank, world), given = ranks(), getattr(cfg, "given", ())
    if cfg.load:
        return talk(cfg, device)
    # What may differ when a run goes on; everything else is as recorded.
    free = {"out", "device", "compile", "resume", "eval_every", "save_every", "load", "prompt", "max_new_tokens",
            "temperature", "top_k", "top_p", "repetition_penalty", "beams", "length_penalty", "merge"}
    recorded = None
    if cfg.resume:
        recorded = read_run(cfg.out)
        cfg = recorded_config(cfg, recorded["config"], free)
    if cfg.checkpoint:
        asked = {name for name in CHECKPOINT if name in given or getattr(cfg, name) != getattr(Config, name)}
        asked |= set() if recorded is None else CHECKPOINT.keys() - free
        cfg = dataclasses.replace(cfg, **{name: CHECKPOINT[name] for name in CHECKPOINT.keys() - asked})
    toy, out = not cfg.checkpoint, Path(cfg.out)
    cfg = dataclasses.replace(cfg, method=cfg.method if cfg.method != "auto" else "all" if toy else "lora",
                              data=cfg.data if cfg.data != "auto" else "numbers" if toy else "instruct")
    if toy:
        tokenizer = ToyTokenizer()
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or tokenizer.n_vocab)
        if cfg.data != "numbers" or cfg.vocab_size < tokenizer.n_vocab or cfg.block_size < 23:
            sys.exit("error: the base of this run knows the toy language only: it takes --data numbers, --vocab-size "
                     f"{tokenizer.n_vocab} or more and --block-size 23 or more. Other data need --checkpoint DIR")
    else:
        base, cfg, tokenizer = load_any(cfg)
        cfg = dataclasses.replace(cfg, block_size=min(cfg.block_size, base.cfg.block_size))
    methods = METHODS if cfg.method == "all" else (cfg.method,)
    # Without comparison the base itself is adapted: no copy of it is kept.
    alone = not toy and len(methods) == 1
    try:  # on a model without memory: a wrong name should not show behind the pre-training
        with torch.device("meta"):
            make_ready(build_model(dataclasses.replace(cfg)), "lora", cfg)
    except ValueError as problem:
        sys.exit(f"error: --targets {cfg.targets}: {problem}")

    # The data: what the base is to learn, and what is asked in the end.
    if world > 1 and rank > 0:
        dist.barrier()  # rank 0 goes first: it may have to download, and the others then find the file
    train_data, val_data, info = adapt_data(cfg, tokenizer)
    if world > 1 and rank == 0:
        dist.barrier()
    if recorded and info["sha256"] != recorded["data"]["sha256"]:
        sys.exit(f"error: --resume: {info['name']} is not what this run was trained on (SHA-256 differs)")
    template = instruct_prompt if cfg.data == "instruct" or cfg.data.endswith(".json") else str
    numbers = ["24=", "old 24=", "40215=", "old 40215="] if cfg.data == "numbers" else []
    text = tokenizer.decode(val_data[0][0].tolist())[:20]  # from held-out text, so this tokenizer can read it
    usual = numbers or ["Name three colours." if template is instruct_prompt else text]
    prompts = [cfg.prompt] if cfg.prompt else usual
    for prompt in prompts:
        check_prompt(tokenizer, template(prompt))

    # Before the first file is written: does it fit?
    check_memory(cfg, device)
    out_folder(cfg)
    # identity: what a stage builds on, these settings, these data (and later the weights of this base).
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in free}
    extra = {"tokenizer": tokenizer.spec, "data": info,
             "identity": hashlib.sha256(json.dumps([settings, info], sort_keys=True).encode()).hexdigest()}
    if rank == 0:
        content = json.dumps({"script": Path(__file__).stem, "config": dataclasses.asdict(cfg), "data": info}, indent=2)
        write_atomically(out / "run.json", lambda file: file.write(content.encode()))

    # --- the base
    histories, models = {}, {}
    if toy:
        base = build_model(dataclasses.replace(cfg))
    elif alone and methods[0] == "qlora":  # layer by layer, while the weights are still pages of a file
        quantise_model(base, cfg.double_quant)
    base.to(device, torch.float64 if cfg.dtype == "float64" else torch.float32)
    size = parameter_count(base)
    print(f"model: {size:,} parameters on {device}; everything goes to {out}/")
    if toy:
        result = train_stage(base, cfg, "base", base_data(cfg, tokenizer), compute_loss, extra,
                             max_steps=cfg.base_steps, lr=cfg.base_lr)
        histories["base"] = result["history"]
        if rank == 0:
            save_pretrained(base, base.cfg, out / "base", tokenizer)
    # From here on the weights of the base belong to what a stage builds on: another base, and --resume begins it anew.
    extra["identity"] += weights_hash(base)
    reports = {"base": {"val_loss": evaluate(base, val_data, cfg, compute_loss)["val_loss"], "trained": 0,
                        "weights": bytes_of([*base.parameters(), *base.buffers()])}}
    models |= {} if alone else {"base": base}

    # --- the adaptations: same base, same data, same steps
    for method in methods:
        model = make_ready(base if alone else copy.deepcopy(base), method, cfg)
        result = train_stage(model, cfg, method, (train_data, val_data), compute_loss, extra,
                             lr=cfg.full_lr if method == "full" else cfg.lr)
        histories[method], models[method] = result["history"], model
        reports[method] = {"val_loss": result["val_loss"],
                           "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        if rank == 0 and method != "full":
            save_adapter(model, cfg, cfg.checkpoint or out / "base", out / method)
        if rank == 0 and (method == "full" or cfg.merge):
            whole = model if method == "full" else merge_adapters(copy.deepcopy(model))
            save_pretrained(whole, base.cfg, out / method if method == "full" else out / method / "merged", tokenizer)
    if rank > 0:
        return model, cfg

    # --- what came of it
    tuned = {method: models[method] for method in methods}
    figures = measure_steps(tuned, train_data, cfg)
    for method in methods:
        reports[method] |= figures[method]
    pictures, extras = ["curve.png", "comparison.png"], {}
    if cfg.data == "numbers":
        numbers = sorted(set(draw_numbers(1000, cfg.seed + 1, True)))
        for name, one in models.items():
            reports[name]["old"] = name_match(one, tokenizer, numbers, "old ", old_names)
            reports[name]["modern"] = name_match(one, tokenizer, numbers, "", lambda n: [number_to_words(n)])
    if "full" in tuned and "lora" in tuned:
        full, lora = update_spectra(base, tuned["full"]), update_spectra(base, tuned["lora"])
        plot_spectra(out / "singular_values.png", full, lora, cfg.rank)
        pictures.append("singular_values.png")
        extras = {"full_update_within_rank": energy_within(full, cfg.rank)}
    plot_comparison(out / "comparison.png", histories, {"base": {**reports["base"], "gradients": 0, "optimizer": 0},
                                                        **figures}, info["floor"], f"adapting to {Path(cfg.data).name}")
    uniform, first = math.log(cfg.vocab_size), "base" if toy else methods[0]
    plot_curve(out / "curve.png", histories[first], f"{Path(__file__).name}: {first}",
               {f"uniform guess, ln V = {uniform:.2f}": uniform})
    # What they write: the same questions to every model.
    lines = [f"{name:<6}{prompt}{write_text(one, tokenizer, cfg, template(prompt), cfg.max_new_tokens).strip()}"
             for prompt in prompts for name, one in models.items()]
    text = "\n".join(lines)
    write_atomically(out / "sample.txt", lambda file: file.write(text.encode()))
    # results: one dict per measure, with a value for each model.
    names = {"val_loss": "val_loss", "trainable_parameters": "trained", "weight_bytes": "weights", "step_ms": "ms",
             "gradient_bytes": "gradients", "optimizer_bytes": "optimizer", "exact_match": "old",
             "exact_match_modern": "modern"}
    results = {name: {model: one.get(key) for model, one in reports.items()} for name, key in names.items()} | extras
    # One file that says what was run, on what, and what came out: enough to repeat the run and compare it.
    # val_loss is that of the last method; seconds is all of this run, measuring included.
    seconds = time.perf_counter() - began
    summary = {"config": dataclasses.asdict(cfg), "params": size, "val_loss": result["val_loss"],
               "floor": info["floor"], "tokens_per_second": result["tokens_per_second"], "seconds": seconds,
               "peak_memory_mb": peak_memory_mb(device), "data": info, "device": str(device),
               "torch": torch.__version__, "figures": pictures, "results": results}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it: one place, no second copy to go stale.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    also = " --method qlora" if methods[-1] == "qlora" else ""  # what an adapter's file does not say of its base
    also += f" --data {cfg.data}" if template is instruct_prompt else ""
    reached, floor = ", ".join(f"{name} {one['val_loss']:.4f}" for name, one in reports.items()), info["floor"]
    print(f"\n{text}\n\n{comparison(reports)}\n\n"
          f"Pictures, adapters and samples are in {out}/. Let an adapted model write with\n"
          f"  python {Path(__file__).name} --load {out / methods[-1]} --prompt {prompts[-1]!r}{also}\n"
          f"Next: `diff llama3.py lora_qlora.py`: the model is the same, only its linear layers were exchanged.\n"
          f"Expected: {expected if toy else 'nothing to compare with: this is your own base'}\n"
          f"Reached:  val loss {reached}{'' if floor is None else f', a perfect model: {floor:.4f}'}, {seconds:.0f} s")
    return model, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
