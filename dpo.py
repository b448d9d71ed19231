# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "tiktoken>=0.7", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
DPO IN ONE FILE                                  python dpo.py                      69 s on two CPU cores

Paper    Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model,
         arXiv 2305.18290
Idea     People can rarely write the best answer down, but they can say which of two is better. Raise the
         log-probability of the chosen answer against that of the rejected one, each measured from where the model stood
         before, and the less, the further apart the two already are. No reward model, no sampling, no reinforcement
         learning: a loss on pairs.
Picture  prompt + chosen ---+                                                      loss = -ln sigmoid(beta * margin)
         prompt + rejected -+-> Llama -> sum of ln p of the answer's tokens, minus
                                         the same before training (stored) -> margin = chosen's - rejected's
Symbols  B batch (pairs)   T time   P past (cached) tokens   S = P + T   C n_embd   H query heads   K key/value heads
         (beams in beam_search)   D head_size   F ffn_size   V vocabulary   L layers   N new tokens   R rows
         M selected positions   in (P, 2, T): P pairs
New here sequence_logps, the losses of DPO, cDPO, IPO and SimPO, pairs sampled from the model itself, a control that
         only imitates, and the question which weights should carry the change
Not here reward models, on-policy methods (ppo_grpo.py), KTO, ORPO, pairs that differ in one token, chat templates
Expect   answers without a slip and with the right number 12.8% (11.8% to 14.3%, 5 seeds) before, 99.1% (98.3% to 99.4%,
         5 seeds) after 200 steps of DPO in 3 s (right number 98.1% (97.4% to 98.8%, 5 seeds) and 99.2% (98.3% to 99.7%,
         5 seeds)); imitating the chosen answers instead 35.6% (34.2% to 37.3%, 5 seeds); all weights as the carrier
         57.1% (27.5% to 74.9%, 5 seeds), adapters 31.7% (1.8% to 56.9%, 5 seeds). One seed each: IPO 98.9%, SimPO
         99.0%, all weights with --nll 0.2 77.0%; with 10 % of the labels swapped DPO 96.4%, cDPO 85.7%
         (results/dpo.json)
Asked    Why does the chosen answer become less likely too?   What is beta?   Why a sum of log-probs and not a mean?
         Why store the reference?   When cDPO, IPO, SimPO?   Which weights should carry the change?   (grep "# Q:")
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
import statistics
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

# The model needs torch alone. matplotlib, requests and tiktoken are imported where they are used.
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --- 1. Config: every knob in one place ------------------------------------------------------------------------------
# A field is a flag (--n-layer 6), its comment is the help text, and the whole record travels in the checkpoint. Do not
# learn the fields by heart: each is explained where it is used. First reading: section 3 is what this file is about;
# then the misspelling annotators in 4, preference_stage in 5 and section 8. The model and the training loop are
# llama3.py's.
#     python dpo.py                                     imitate sloppy annotators, then learn from pairs what they
#    prefer
#     python dpo.py --loss ipo                          another loss on the same pairs (dpo, cdpo, ipo, simpo)
#     python dpo.py --flip 0.1 --loss cdpo              one label in ten is wrong
#     python dpo.py --preset preference                 real instructions with two answers each
#     python dpo.py --load runs/dpo/dpo --prompt "40215="           let the trained model write
#     python dpo.py --resume                            go on after Ctrl-C, a crash or a power cut
LOSSES = ("dpo", "cdpo", "ipo", "simpo")
CARRIERS = ("head", "all", "lora")


@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    data: str = "numbers"             # numbers | preference | path of a .json: instruction, input, chosen, rejected
    out: str = "runs/dpo"             # folder for checkpoints, metrics, samples and pictures
    seed: int = 1337                  # decides initial weights, batches, dropout and samples
    device: str = "auto"              # auto (cuda if present, else cpu) | cpu | cuda | mps
    dtype: str = "auto"               # auto (float32; on cuda bfloat16 autocast) | float32 | bfloat16 | float64
    compile: bool = False             # torch.compile the training: a minute of waiting per stage, then faster steps

    # Preferences.
    loss: str = "dpo"                 # dpo | cdpo | ipo | simpo
    beta: float = 0.0                 # price of leaving the reference; 0 = 0.3, for ipo 0.03, for simpo 2
    label_smoothing: float = 0.1      # cdpo: the share of labels that are believed to be wrong
    gamma: float = 1.0                # simpo: the margin that a pair should reach
    nll: float = 0.0                  # weight of the chosen answer's own loss per token, added (Llama 3: 0.2)
    carrier: str = "head"             # which weights learn from pairs: head | all | lora (adapters beside all matrices)
    rank: int = 8                     # width of those adapters
    pairs: int = 4096                 # how many pairs to sample for the toy task
    flip: float = 0.0                 # toy task: share of pairs whose labels are swapped, to see who survives it
    slip: float = 0.3                 # the toy annotators misspell each word this often
    compare: bool = True              # toy task: also train the control and the other carriers, for the table

    # Shape: 108,352 parameters.
    block_size: int = 24              # longest context in tokens
    n_layer: int = 2                  # layers
    n_head: int = 4                   # query heads
    n_kv_head: int = 2                # key/value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 64                  # width of the residual stream
    head_size: int = 0                # numbers per head; 0 = n_embd / n_head
    ffn_size: int = 192               # width of the feed-forward layer
    vocab_size: int = 0               # 0 takes the tokenizer's; more pads it
    tie_weights: bool = False         # one table for embedding and head (the head can then not learn alone)
    rope_theta: float = 10_000.0      # base of the rotation periods; 500,000 in Llama 3, for contexts of 8,192 and more
    rope_factor: float = 0.0          # stretch slow rotations by this (8 in Llama 3.1, 32 in 3.2); 0 = leave them
    rope_original: int = 8192         # context of the training before the stretching
    norm_eps: float = 1e-5            # added to the mean square in RMSNorm
    dropout: float = 0.0              # share of each branch zeroed while imitating; pairs are always learned without
    init_std: float = 0.125           # std of the initial weights, about 1/sqrt(n_embd)

    # Optimisation.
    sft_steps: int = 1000             # optimizer steps of imitation (supervised fine-tuning)
    sft_lr: float = 2e-3              # its peak learning rate
    sft_batch_size: int = 128         # its rows per micro-step
    weight_decay: float = 0.01        # while imitating, on matrices and embeddings only; pairs are learned without
    max_steps: int = 200              # optimizer steps on pairs
    lr: float = 1e-3                  # peak learning rate on pairs, when the head carries the change
    body_lr: float = 1e-4             # when all weights do
    lora_lr: float = 1e-3             # when adapters do
    batch_size: int = 64              # pairs per micro-step, over all ranks
    grad_accum: int = 1               # micro-steps per optimizer step
    min_lr_ratio: float = 0.05        # the last learning rate as a share of the peak
    warmup_steps: int = 10            # steps of linear warm-up
    beta2: float = 0.95               # memory of Adam's second moment: 0.95 looks back about 20 steps
    grad_clip: float = 1.0            # largest gradient norm
    eval_every: int = 50              # steps between looks at held-out pairs and answers
    save_every: int = 200             # steps between checkpoints
    resume: bool = False              # continue the run in --out, bit for bit

    # Decoding.
    load: str = ""                    # run folder or checkpoint to write with, or to start from instead of imitation
    prompt: str = ""                  # what to continue; together with --load nothing is trained
    max_new_tokens: int = 60          # tokens to write
    temperature: float = 1.0          # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0                    # sample among the k likeliest only; 0 = all
    top_p: float = 1.0                # sample among the likeliest that together have probability p
    repetition_penalty: float = 1.0   # above 1: make tokens that were already there less likely
    beams: int = 1                    # above 1: beam search, without temperature, top-k, top-p, repetition penalty
    length_penalty: float = 1.0       # beam score = sum of log-probs / length ** this

    def __post_init__(self):
        # A bad value caught here costs a line; caught at step 500 it costs the run.
        for names, ok, rule in (
                ("block_size n_layer n_head n_kv_head n_embd ffn_size rope_original max_steps sft_steps batch_size "
                 "sft_batch_size grad_accum eval_every save_every max_new_tokens beams rank", lambda x: x >= 1,
                 "at least 1"),
                # `0 <= x < inf` and not `x < 0 or ...`: every comparison with nan is false, so nan fails as well
                ("seed", lambda x: 0 <= x < 2 ** 31, "in [0, 2^31)"),
                ("vocab_size head_size warmup_steps weight_decay temperature top_k beta gamma nll",
                 lambda x: 0 <= x < math.inf, "0 or more"),
                ("lr sft_lr body_lr lora_lr grad_clip init_std rope_theta norm_eps repetition_penalty",
                 lambda x: 0 < x < math.inf, "above 0"),
                ("rope_factor", lambda x: x == 0 or 1 <= x < math.inf, "0, or at least 1"),
                ("length_penalty", math.isfinite, "a number"),
                ("dropout beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("label_smoothing flip", lambda x: 0 <= x < 0.5, "in [0, 0.5): at one half a label says nothing"),
                ("slip", lambda x: 0 < x < 1, "in (0, 1): without slips there is nothing to prefer"),
                ("pairs", lambda x: x >= 100, "at least 100"),
                ("min_lr_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
                ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
                ("loss", LOSSES.__contains__, "dpo, cdpo, ipo or simpo"),
                ("carrier", CARRIERS.__contains__, "head, all or lora"),
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
        if self.data != "numbers" and not self.data.endswith(".json") and self.data != "preference":
            raise ValueError(f"data must be numbers, preference or the path of a .json file, not {self.data!r}")


PRESETS = {
    "laptop": {},  # the defaults above
    # 1,100 instructions with a polite and an impolite answer each; a model this small learns the tone, not the content.
    "preference": dict(data="preference", block_size=256, n_layer=4, n_embd=128, ffn_size=384, init_std=0.088,
                       sft_steps=300, sft_lr=2e-3, sft_batch_size=8, batch_size=8, max_steps=120, carrier="all",
                       beta=0.1, compare=False, eval_every=40, temperature=0.7),
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


# --- 2. Model: Llama 3, and which of its weights may learn ------------------------------------------------------------
# First reading: the model is llama3.py's; go on at choose_carrier, the end of this section.

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

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def sequence_logps(logits, targets):
    """logits (B, T, V), targets (B, T) with IGNORE where nothing counts -> (sum of ln p (B), counted tokens (B))."""
    # Q: Why a sum of log-probs and not a mean?
    # A: The probability of an answer is the product over its tokens, so its log is a sum; DPO's derivation is about
    #    that probability. Dividing by the length makes another loss: long answers then pull less per token than short
    #    ones. (IPO as its authors run it, and SimPO, do divide, and say so.)
    # ln p = logit - logsumexp, at the targets only. Trap: log_softmax first and gather then: it writes B*T*V numbers to
    # keep B*T of them, 4 GB for 16 answers of 512 tokens and V = 128,256.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))       # (B, T, V)
    # Trap: all this in bfloat16, whose steps near 8 are 0.03: as large as the differences that are learned from.
    # Trap: counting the prompt. It is the same on both sides and cancels in DPO; but not in means over tokens (IPO,
    # SimPO), and not in the NLL term.
    counts = targets != IGNORE                                                 # (B, T)
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]        # (B, T)
    logps = (chosen - logits.logsumexp(-1)) * counts                           # (B, T)
    return logps.sum(-1), counts.sum(-1)                                       # (B), (B)


class Policy(Llama):
    """Llama, which with targets scores answers instead of returning logits."""

    def forward(self, ids, mask=None, cache=None, targets=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> sequence_logps of them, (B) and (B)."""
        if targets is None:
            return super().forward(ids, mask, cache)
        # What sequence_logps(logits, targets) gives, but the head is asked at the answers' positions only, M of B*T:
        # prompts and padding have no target, and V logits each are, with GPT-2's vocabulary, most of a small model's
        # work. (A test holds the two together. In forward(), because DDP and torch.compile see a model through that.)
        counts = targets != IGNORE                                             # (B, T)
        logits = self.lm_head(self.hidden(ids, mask, cache)[counts])           # (M, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))   # (M, V)
        each = logits.gather(-1, targets[counts][:, None])[:, 0] - logits.logsumexp(-1)  # (M)
        logps = torch.zeros(targets.shape, device=ids.device, dtype=each.dtype).masked_scatter(counts, each)  # (B, T)
        return logps.sum(-1), counts.sum(-1)                                   # (B), (B)


class Detour(nn.Module):
    """A frozen linear layer and beside it a trained product of rank R: LoRA in short (lora_qlora.py has it in full)."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(base.weight.new_empty(rank, base.in_features).uniform_(-1, 1) / base.in_features ** 0.5)
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))  # zero: step 0 is the base exactly

    def forward(self, x):
        """x (..., I) -> (..., O): W x + 2 B A x; 2 is LoRA's scale, alpha / R."""
        return self.base(x) + 2 * F.linear(F.linear(x, self.A), self.B)        # (..., O)


# Q: Which weights should carry the change?
# A: Those that hold the difference and little else. Which spelling of a word is written is decided in the head, two
#    rows of which differ; which number is named is decided below it. Pairs of right answers never punish a wrong
#    number, so whatever in the body moves by accident is not put right again, and Adam moves all weights alike. The
#    table that this script prints has the numbers for the head, for all weights, and for adapters beside all matrices.
#    In large models the usual answer to the same danger is a small rate (5e-7 to 5e-6), an adapter, or the NLL term.
def choose_carrier(model, carrier, rank):
    """Freeze all but what is to learn from pairs, in place. -> the model. Raises ValueError for a tied head alone."""
    if carrier == "head" and model.cfg.tie_weights:
        raise ValueError("with tied weights the head is the embedding too: take another carrier")
    model.requires_grad_(carrier == "all")
    if carrier == "head":
        model.lm_head.requires_grad_(True)
    if carrier == "lora":
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and not isinstance(module, Detour):
                    setattr(module, name, Detour(child, rank))
    return model


def build_model(cfg):
    """A fresh model; its weights are a function of cfg alone, seed included."""
    torch.manual_seed(cfg.seed)
    return Policy(cfg)


# --- 3. Objective: the better of two answers -------------------------------------------------------------------------
# The reference is the model before this training; KL(policy || reference), the mean of ln policy/reference over the
# policy's own answers, says how far it has moved from there. Where DPO comes from, in five lines. Let a reward r(x, y)
# say how good the answer y to x is. Of all policies the one that earns most while staying close to a reference, max
# E[r] - beta * KL(policy || reference), is known in closed form:
#
#     policy(y|x) = reference(y|x) * exp(r(x,y) / beta) / Z(x)                                (Rafailov et al., eq. 4)
#
# Z(x) makes the probabilities add up to 1; it is a sum over all possible answers, so nobody can compute it. Read from
# right to left it gives the reward that a policy is best for: r = beta * ln(policy / reference) + beta * ln Z. If
# people prefer one answer to another with probability sigmoid(difference of the rewards) (Bradley & Terry 1952), Z(x)
# cancels, and the likelihood of the labels is a loss on the policy itself (eq. 7):
#
#     loss = -ln sigmoid(h)     h = beta * [ln policy(chosen) / reference(chosen) - the same of the rejected]
#
# Its gradient is -sigmoid(-h) * beta * (grad ln policy(chosen) - grad ln policy(rejected)): pairs that are ordered
# wrongly pull with nearly full strength, pairs that are well apart hardly at all.

def compute_loss(model, batch, cfg):
    """Imitation. batch = (inputs (B, T), targets (B, T)) -> (sum of losses in nats, how many targets, {})."""
    inputs, targets = batch
    logits = model(inputs)                                                     # (B, T, V)
    loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss_sum, (targets != IGNORE).sum(), {}


# The losses: log-probs of answers in, one loss per pair out. c and r are sums of ln p of the chosen and the rejected
# answer under the policy, ref_c and ref_r under the reference.
def dpo_loss(c, r, ref_c, ref_r, beta):
    """-ln sigmoid(beta * ((c - ref_c) - (r - ref_r))), each (B) -> (B). Rafailov et al. 2023, eq. 7."""
    # Q: What is beta?
    # A: The price of leaving the reference, in the derivation; in the loss, how far apart a pair has to be before it is
    #    left alone: the pull is sigmoid(-h), 0.5 at first, 0.25 at h = 1.1, 0.05 at 3, with h = beta * margin. Small
    #    beta: large margins, far away from the reference. 0.1 is usual; 0.3 here.
    # At the reference all margins are 0 and the loss is ln 2 = 0.6931 exactly, whatever the model. A first loss of
    # anything else says: dropout is on, the reference is another model, or rows are misaligned.
    return -F.logsigmoid(beta * ((c - ref_c) - (r - ref_r)))                   # (B)


def cdpo_loss(c, r, ref_c, ref_r, beta, epsilon):
    """Conservative DPO: a share epsilon of the labels is wrong (Mitchell 2023, "A note on DPO with noisy preferences").

    -(1 - epsilon) ln sigmoid(h) - epsilon ln sigmoid(-h), each (B) -> (B). One would use it when labels are noisy and
    the same pairs are seen for many epochs: its minimum is at the finite h = ln((1 - epsilon) / epsilon), so no pair is
    pulled apart without end.
    """
    h = beta * ((c - ref_c) - (r - ref_r))                                     # (B)
    return -(1 - epsilon) * F.logsigmoid(h) - epsilon * F.logsigmoid(-h)       # (B)


def ipo_loss(c, r, ref_c, ref_r, n_c, n_r, beta):
    """IPO: bring the margin *per token* to 1 / (2 beta), not to infinity (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    n_c, n_r (B): lengths of the answers. Each (B) -> (B). One would use it when preferences are nearly deterministic:
    DPO's margin then grows without end and its pull towards the reference is gone.
    """
    # The paper's formula has sums; its authors run it with means over tokens, as TRL does, so that beta means the same
    # for answers of all lengths.
    return ((c - ref_c) / n_c - (r - ref_r) / n_r - 1 / (2 * beta)) ** 2       # (B)


def simpo_loss(c, r, n_c, n_r, beta, gamma):
    """SimPO: no reference at all, log-probs per token, a margin (Meng et al. 2024, arXiv 2405.14734, eq. 6).

    -ln sigmoid(beta * (c / n_c - r / n_r) - gamma), each (B) -> (B). One would use it to save the reference, and
    because the mean ln p is what ranks answers in generation; nothing but the rate then keeps the policy near where it
    was.
    """
    return -F.logsigmoid(beta * (c / n_c - r / n_r) - gamma)                   # (B)


BETAS = {"dpo": 0.3, "cdpo": 0.3, "ipo": 0.03, "simpo": 2.0}


def preference_loss(model, batch, cfg):
    """batch = (inputs (B, 2, T), targets (B, 2, T), reference (B, 2)) -> (sum of losses, pairs, metrics).

    Index 0 of the second axis is the chosen answer, 1 the rejected. metrics: the names that TRL logs, means over pairs.
    """
    inputs, targets, reference = batch
    # Both answers in one forward pass: half as many calls, twice the rows in each; and under DDP one forward per
    # backward is what the wrapper expects.
    logps, lengths = model(inputs.flatten(0, 1), targets=targets.flatten(0, 1))  # (R), (R)
    (c, r), (n_c, n_r) = logps.view(-1, 2).unbind(1), lengths.view(-1, 2).unbind(1)  # (B) each
    # Q: Why store the reference?
    # A: It never changes, so its log-probs are computed once, before the training: no second model in memory, no second
    #    forward pass in every step. Per pair that is two numbers.
    ref_c, ref_r = reference.unbind(1)                                         # (B), (B)
    beta = cfg.beta or BETAS[cfg.loss]
    if cfg.loss == "dpo":
        losses = dpo_loss(c, r, ref_c, ref_r, beta)                            # (B)
    elif cfg.loss == "cdpo":
        losses = cdpo_loss(c, r, ref_c, ref_r, beta, cfg.label_smoothing)      # (B)
    elif cfg.loss == "ipo":
        losses = ipo_loss(c, r, ref_c, ref_r, n_c, n_r, beta)                  # (B)
    else:
        losses = simpo_loss(c, r, n_c, n_r, beta, cfg.gamma)                   # (B)
    # Q: Why does the chosen answer become less likely too?
    # A: The loss sees the difference only. Chosen and rejected share most of their tokens, so what pushes the rejected
    #    one down pushes the chosen one with it, and the probability goes to answers that no pair mentions ("likelihood
    #    displacement", Razin et al. 2024, arXiv 2410.08847). rewards/accuracies is 1.0 all the while: look at
    #    logps/chosen, and at samples. Llama 3 adds the chosen answer's own loss, nll 0.2, against it (section 4.1.4).
    if cfg.nll > 0:
        losses = losses - cfg.nll * c / n_c                                    # (B)
    with torch.no_grad():
        # reward = beta * ln(policy / reference): what the policy would be best for (DPO's reward, reported for every
        # loss so that they can be compared). Trap: leaving beta out.
        good, bad = beta * (c - ref_c), beta * (r - ref_r)                     # (B), (B)
        metrics = {"rewards/chosen": good.mean(), "rewards/rejected": bad.mean(),
                   "rewards/accuracies": (good > bad).float().mean(), "rewards/margins": (good - bad).mean(),
                   "logps/chosen": c.mean(), "logps/rejected": r.mean()}
    return losses.sum(), torch.tensor(len(losses), device=losses.device), metrics


# The control: what if one only imitated the better answers, with the same pairs, steps and carrier? They still contain
# slips, so that gives fewer slips, not none. What DPO gains beyond it comes from the comparison.
def imitation_loss(model, batch, cfg):
    """The loss of the chosen answers alone. batch as in preference_loss -> (sum in nats, tokens, {})."""
    return compute_loss(model, (batch[0][:, 0], batch[1][:, 0]), cfg)


# --- 4. Data: text or toy language -> rows of ids --------------------------------------------------------------------
# Every data set ends up as one thing: a tuple of tensors (inputs, targets) whose first axis is the row. A batch is then
# one gather, whatever the rows hold, and nothing below this section knows where they came from.
#
#     text  "First Citizen:\n..."   --tokenizer-->   ids [18, 47, 56, 57, 58, 1, ...]   --windows-->   rows (R, T)

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


# The toy language of all scripts: numbers and their English names. 40215 <-> forty thousand two hundred fifteen.
# Small enough to learn in less than a minute, and every answer can be checked: a model that is wrong is visibly wrong.
UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# The annotators of this file know all numbers and cannot spell: each number word has a second, misspelled token, and
# they use it with probability `slip`, word by word. A model that imitates them learns to misspell as often as they do,
# since that is what the data say. But the same annotators can tell which of two answers looks better. So preferences
# are *relative*: the better answer of a pair is often still flawed, and imitating it cannot give what the pairs could
# teach.
MISSPELLED = dict(zip(
    [*UNITS, *TENS, "hundred", "thousand"],
    ("zerro onne tow thre foor fife sicks sevn eigt nien tenn elevn twelv therteen fourten fiften sixten seventen "
     "eigteen nineten twenny thirdy fourty fivty sixy sevnty eigty ninty hunderd thosand").split(), strict=True))
CORRECTED = {wrong: right for right, wrong in MISSPELLED.items()}


# differs from decoder_only.py: every word has a misspelled twin
# Digits and words have ids of their own: "5" and "five" must be *learned* to mean the same. Index = id, <pad> = 0.
TOY_VOCAB = ["<pad>", "\n", "=", "[CLS]", "[SEP]", "[MASK]", *"0123456789", *UNITS, *TENS, "hundred", "thousand",
             *MISSPELLED.values()]


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


class BPETokenizer:
    """Byte-level BPE through tiktoken: frequent neighbours were merged again and again, so " the" is one id."""

    def __init__(self, encoding):
        self.encoding, self.n_vocab = encoding, encoding.n_vocab
        self.spec, self.eos_ids = {"kind": encoding.name}, (encoding.eot_token,)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)  # "<|endoftext|>" typed by a user is text here, not a command

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i < self.n_vocab])


# differs from decoder_only.py: two kinds
def make_tokenizer(spec):
    """The tokenizer that a spec describes: {"kind": "numbers"} or {"kind": "gpt2"}."""
    if spec["kind"] == "numbers":
        return ToyTokenizer()
    try:
        import tiktoken
        return BPETokenizer(tiktoken.get_encoding(spec["kind"]))
    except (OSError, ValueError) as problem:
        sys.exit(f"error: the {spec['kind']} vocabulary cannot be read, found or fetched: {problem}")


def misspell(name, rng, slip):
    """A number's name -> the same with each word misspelled with probability slip."""
    return " ".join(MISSPELLED[word] if rng.random() < slip else word for word in name.split())


def judge(n, text):
    """What an annotator sees in an answer about n -> (slips, right): misspelled words; is it the name of n, if
    corrected?

    "tow hunderd" for 200: (2, True). "two hundred one" for 200: (0, False).
    """
    words = text.split()
    right = " ".join(CORRECTED.get(word, word) for word in words) == number_to_words(n)
    return sum(word in CORRECTED for word in words), right


def answer_text(tokenizer, ids):
    """An answer up to its EOS, or "" if it never ends: an answer that had to be cut off is no answer."""
    end = next((i for i, token in enumerate(ids) if token in tokenizer.eos_ids), None)
    return "" if end is None else tokenizer.decode(ids[:end]).strip()


def sample_answers(model, tokenizer, numbers, seed, max_new_tokens=12):
    """-> one sampled answer per number, a list of lists of ids, each up to and with its EOS (or cut off)."""
    device, answers = next(model.parameters()).device, []
    generator = torch.Generator(device).manual_seed(seed)
    for start in range(0, len(numbers), 1000):
        prompts = [tokenizer.encode(f"{n}=") for n in numbers[start:start + 1000]]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (R, T), padded on the left
        # Temperature 1 and no cuts: the model's own distribution, which is what is being changed.
        out = generate(model, ids, max_new_tokens, mask=ids != 0, temperature=1.0, eos_ids=tokenizer.eos_ids,
                       generator=generator)                                    # (R, N)
        for row in out.tolist():
            end = next((i for i, token in enumerate(row) if token in tokenizer.eos_ids), len(row) - 1)
            answers.append(row[:end + 1])
    return answers


def number_pairs(model, tokenizer, count, seed, validation, flip=0.0):
    """Two answers of the model to one number, judged -> count triples (prompt ids, chosen ids, rejected ids), perfect.

    Both name the right number and one has fewer slips: that is the chosen one. perfect: share of chosen answers without
    any slip. flip: share of pairs whose labels are swapped. Raises ValueError if the model hardly ever names a number.
    """
    # Two samples of one model differ just where it is undecided, and that is where a preference can tell it something;
    # what it never says costs nothing. Pairs from elsewhere spend much of the training on answers that it would not
    # give (the preference preset does it all the same: its pairs come with the data).
    rng, pairs, perfect, drawn = random.Random(seed), [], 0, 0
    while len(pairs) < count:
        if drawn > 20 * count + 10_000:
            raise ValueError("the model's answers are almost never right, or all alike: no pairs can be made of them")
        numbers = draw_numbers(count, seed + drawn, validation)
        both = zip(*(sample_answers(model, tokenizer, numbers, seed + drawn + i) for i in (1, 2)), strict=True)
        drawn += count
        for n, answers in zip(numbers, both, strict=True):
            (slips_a, right_a), (slips_b, right_b) = (judge(n, answer_text(tokenizer, answer)) for answer in answers)
            if right_a and right_b and slips_a != slips_b and len(pairs) < count:
                chosen, rejected = answers if slips_a < slips_b else answers[::-1]
                perfect += min(slips_a, slips_b) == 0
                swap = rng.random() < flip
                pairs.append((tokenizer.encode(f"{n}="), *((rejected, chosen) if swap else (chosen, rejected))))
    return pairs, perfect / count


PREFERENCE = ("instruction-data-with-preference.json",
              "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/"
              "04_preference-tuning-with-dpo/instruction-data-with-preference.json",
              "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e")


def instruct_prompt(instruction, extra=""):
    """The Alpaca template (Taori et al. 2023): what the model reads before it answers."""
    # A chat model has a template of its own; a base model knows none, and learns any that is always the same.
    text = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{instruction}\n\n")
    return text + (f"### Input:\n{extra}\n\n" if extra else "") + "### Response:\n"


def read_preferences(path, tokenizer):
    """A JSON list of {"instruction", "input" (optional), "output" (optional), "chosen", "rejected"}.

    -> [(prompt ids, chosen ids, rejected ids)], [(prompt ids, output ids)]; answers end in EOS. Raises ValueError.
    """
    entries = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all(
            isinstance(e, dict) and all(isinstance(e.get(key), str) for key in ("instruction", "chosen", "rejected"))
            and all(isinstance(e.get(key, ""), str) for key in ("input", "output")) for e in entries):
        raise ValueError('it must be a list of {"instruction": ..., "chosen": ..., "rejected": ...}, all of them texts')
    # Encoded apart, so that the seam between prompt and answer is where it will be at inference; EOS behind every
    # answer, or the policy never learns to stop.
    end, pairs, outputs = list(tokenizer.eos_ids[:1]), [], []
    for e in entries:
        prompt = tokenizer.encode(instruct_prompt(e["instruction"], e.get("input", "")))
        pairs.append((prompt, *(tokenizer.encode(e[key]) + end for key in ("chosen", "rejected"))))
        outputs.append((prompt, tokenizer.encode(e.get("output", e["chosen"])) + end))
    return pairs, outputs


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


def pair_rows_of(pairs, block_size):
    """(prompt, chosen, rejected) ids -> (inputs (P, 2, T), targets (P, 2, T)). Too long prompts drop out."""
    fit = [pair for pair in pairs if len(pair[0]) < block_size]
    inputs, targets = answer_rows([(prompt, answer) for prompt, *both in fit for answer in both], block_size)
    return inputs.view(len(fit), 2, inputs.size(1)), targets.view(len(fit), 2, inputs.size(1))


def imitation_data(cfg, tokenizer):
    """What is imitated first: (train, validation rows), floor (nats per token), info, pairs of real data or None."""
    if cfg.data == "numbers":
        rng, rows = random.Random(cfg.seed), []
        train, val = draw_numbers(60_000, cfg.seed, False), sorted(set(draw_numbers(2_500, cfg.seed, True)))
        for numbers in (train, val):
            pairs = [(tokenizer.encode(f"{n}="), tokenizer.encode(misspell(number_to_words(n), rng, cfg.slip) + "\n"))
                     for n in numbers]
            rows.append(answer_rows(pairs, cfg.block_size))
        # A perfect imitator pays the entropy of slip-or-not for every word, and nothing for the newline.
        words = sum(len(number_to_words(n).split()) for n in val)
        entropy = -cfg.slip * math.log(cfg.slip) - (1 - cfg.slip) * math.log(1 - cfg.slip)
        info = {"name": "numbers", "sha256": hashlib.sha256(str((train, val, cfg.slip)).encode()).hexdigest()}
        print(f"data: {len(train):,} lines of annotators who misspell {cfg.slip:.0%} of their words, {len(val):,} to "
              f"validate")
        return rows, entropy * words / (words + len(val)), info, None
    try:
        path = fetch(*PREFERENCE) if cfg.data == "preference" else cfg.data
        pairs, outputs = read_preferences(path, tokenizer)
    except (OSError, ValueError) as problem:
        sys.exit(f"error: --data {cfg.data}: {problem}")
    cut = int(0.9 * len(pairs))  # the last tenth is held out
    parts = [pair_rows_of(part, cfg.block_size) for part in (pairs[:cut], pairs[cut:])]
    rows = [answer_rows(part, cfg.block_size) for part in (outputs[:cut], outputs[cut:])]
    if not all(len(part[0]) for part in (*parts, *rows)):
        sys.exit(f"error: --data {cfg.data}: too few entries, or no answer begins within --block-size {cfg.block_size}")
    print(f"data: {len(parts[0][0]):,} pairs to train, {len(parts[1][0]):,} others to validate")
    info = {"name": cfg.data, "sha256": hashlib.sha256(str((pairs, outputs)).encode()).hexdigest()}
    return rows, None, info, parts


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
    inputs, targets, *rest = batch
    used = int((targets != IGNORE).flatten(0, -2).any(0).nonzero().max()) + 1
    return inputs[..., :used], targets[..., :used], *rest


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


def autocast(cfg, device):
    """The precision that train() computes in, for what is measured beside it."""
    return torch.autocast(device.type, torch.bfloat16,
                          enabled=cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda"))


@torch.no_grad()
def reference_logps(model, data, cfg, training=True):
    """(inputs (P, 2, T), targets (P, 2, T)) -> the model's own log-probs of all answers (P, 2), dropout off."""
    # Trap: dropout on here, or in the policy. Policy and reference then differ before the first step, by noise.
    model.eval()
    device, found = next(model.parameters()).device, []
    for start in range(0, len(data[0]), cfg.batch_size):
        inputs, targets = (part[start:start + cfg.batch_size].to(device) for part in data)
        # In the precision of the policy's pass: a reference that rounds otherwise is another one. train() computes
        # under autocast, evaluate() does not.
        with autocast(cfg, device) if training else contextlib.nullcontext():
            logps, _ = model(inputs.flatten(0, 1), targets=targets.flatten(0, 1))  # (R), (R)
        found.append(logps.view(-1, 2).cpu())
    return torch.cat(found)                                                    # (P, 2)


def logged(loss_fn, log):
    """loss_fn that also keeps each training batch's metrics in `log`, unread: reading waits for the GPU."""
    def run(model, batch, cfg):
        loss_sum, count, metrics = loss_fn(model, batch, cfg)
        if model.training:
            log.append(metrics)
        return loss_sum, count, metrics
    return run


def preference_stage(policy, cfg, name, data, loss_fn, carrier, extra, look):
    """Learn from pairs with one carrier, in <out>/<name>. -> (rows of metrics per ten steps, looks, seconds).

    policy is changed in place; data = (train, val), each (inputs, targets, reference log-probs). look() -> a dict,
    asked before the first step and every eval_every steps.
    """
    device = next(policy.parameters()).device
    torch.manual_seed(cfg.seed)  # adapters begin at random, and after --resume at the same
    choose_carrier(policy, carrier, cfg.rank).to(device)
    policy.cfg.dropout = 0.0
    log, looks, lost = [], [{"step": 0} | look()], 0.0

    def after_step(step):
        nonlocal lost
        if step % cfg.eval_every == 0 or step == cfg.max_steps:
            began = time.perf_counter()
            looks.append({"step": step} | look())
            lost += time.perf_counter() - began
    guess = {"ipo": f"at the reference IPO's loss is 1 / (2 beta)^2 = {1 / (2 * (cfg.beta or BETAS['ipo'])) ** 2:.4f}",
             "simpo": "SimPO has no reference, so no first loss to compare with"}.get(
        cfg.loss, f"at the reference the loss is ln 2 = {math.log(2):.4f}") + (" (and nll)" if cfg.nll else "")
    extra = extra | {"log": log, "looks": looks}
    result = train_stage(policy, cfg, name, data, logged(loss_fn, log), extra, after_step,
                         guess if loss_fn is preference_loss else "per token of the chosen answers",
                         lr={"head": cfg.lr, "all": cfg.body_lr, "lora": cfg.lora_lr}[carrier], weight_decay=0.0)
    if looks[-1]["step"] != cfg.max_steps:  # a checkpoint is written before its step is looked at
        looks.append({"step": cfg.max_steps} | look())
    # log has an entry per micro-step (under torchrun: of this rank's pairs); a row is the mean over ten steps.
    rows, size = [], 10 * cfg.grad_accum
    for start in range(0, len(log), size):
        part = log[start:start + size]
        rows.append({"step": min(start // cfg.grad_accum + 10, cfg.max_steps)}
                    | {key: statistics.mean(float(one[key]) for one in part) for key in part[0]})
    return rows, looks, result["seconds"] - lost


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


# --- 8. Main: imitate, compare, prefer --------------------------------------------------------------------------------
# Q: What fills the memory in training?
# A: 16 bytes per parameter with plain AdamW (weight, gradient, two moments; 2 GB for GPT-2 124M), and activations
#    that grow with batch x length (14.7 GB for 12 x 1,024 tokens, half of it logits). Halve batch_size and double
#    grad_accum: the same step, half of the second part.
# differs from decoder_only.py: GQA keeps fewer keys and values, SwiGLU more sides of its product
def memory_gb(cfg, parameters):
    """{what: GB} that one process needs to train in float32, before any of it is allocated."""
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


def answer_rates(model, reference, tokenizer, numbers, seed):
    """Two sampled answers for each number -> {"preferred", "correct", "kl"}.

    preferred: no slip and the right number. correct: the right number, however it is spelled. kl: how far the model has
    gone, mean over its own answers of ln p_model - ln p_reference, in nats per answer.
    """
    numbers = [*numbers, *numbers]
    answers = sample_answers(model, tokenizer, numbers, seed)
    verdicts = [judge(n, answer_text(tokenizer, answer)) for n, answer in zip(numbers, answers, strict=True)]
    rows = answer_rows([(tokenizer.encode(f"{n}="), answer) for n, answer in zip(numbers, answers, strict=True)], 30)
    rows = [part.to(next(model.parameters()).device) for part in rows]
    with torch.no_grad():
        new, old = (one.eval()(rows[0], targets=rows[1])[0] for one in (model, reference))  # (R), (R)
    return {"preferred": sum(right and not slips for slips, right in verdicts) / len(verdicts),
            "correct": sum(right for _, right in verdicts) / len(verdicts), "kl": (new - old).mean().item()}


@torch.no_grad()
def pair_scores(model, data, cfg):
    """Metrics of preference_loss, averaged over all held-out pairs -> {"rewards/accuracies": ..., ...}."""
    totals, device = {}, next(model.parameters()).device
    model.eval()
    for start in range(0, len(data[0]), cfg.batch_size):
        batch = tuple(part[start:start + cfg.batch_size].to(device) for part in data)
        for key, value in preference_loss(model, batch, cfg)[2].items():
            totals[key] = totals.get(key, 0.0) + float(value) * len(batch[0]) / len(data[0])
    return totals


def plot_preferences(path, runs, title):
    """runs {label: (rows, looks)}. Left: what samples are like. Right: log-probs of both answers on training pairs.

    How to read it. Left, solid: samples without a slip; dotted: samples with the right number. Where solid rises and
    dotted falls, spelling was bought with wrong numbers. Right: both lines of a colour fall while the gap between them
    widens: likelihood displacement. In the table "pairs ordered" begins at 0, since before training every pair
    ties, and near 1.0 it does not say that samples are good: look left.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=120)
    colors = dict(zip(runs, ("tab:blue", "tab:gray", "tab:orange", "tab:green"), strict=False))
    measure = "preferred" if "preferred" in next(iter(runs.values()))[1][0] else "rewards/accuracies"
    for label, (rows, looks) in runs.items():
        left.plot([one["step"] for one in looks], [one[measure] for one in looks], "o-", ms=4, color=colors[label],
                  label=label)
        if "correct" in looks[0]:
            left.plot([one["step"] for one in looks], [one["correct"] for one in looks], ":", color=colors[label])
        # A control that imitates has no pairs to log: it is on the left only.
        if rows and "logps/chosen" in rows[0]:
            steps = [row["step"] for row in rows]
            right.plot(steps, [row["logps/chosen"] for row in rows], "-", color=colors[label], label=f"{label}: chosen")
            right.plot(steps, [row["logps/rejected"] for row in rows], "--", color=colors[label],
                       label=f"{label}: rejected")
    left.set(xlabel="step", ylim=(0, 1.02), title=title,
             ylabel={"preferred": "no slip, right number (dotted: right number)"}.get(measure, "pairs ordered"))
    right.set(xlabel="step", ylabel="mean ln p of an answer", title="the margin grows; where do both go?")
    for ax in (left, right):
        ax.legend(fontsize=7)
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


# differs from decoder_only.py: our own checkpoints only, of any stage
def load_any(cfg):
    """--load: our checkpoint, a file or the folder of a stage or run around it. -> (model, cfg, tokenizer).

    The shape of the model comes from what is loaded, everything else from the command line.
    """
    folder = Path(cfg.load)
    path = next((one for one in (folder / "ckpt.pt", folder / "dpo" / "ckpt.pt") if one.is_file()), folder)
    state = read_checkpoint(path)
    free = {field.name for field in dataclasses.fields(cfg)} - SHAPE - {"block_size"}
    cfg = recorded_config(cfg, state["config"], free)
    model = build_model(dataclasses.replace(cfg))
    if any(name.endswith(".base.weight") for name in state["model"]):  # adapters stand beside its matrices
        choose_carrier(model, "lora", next(t for name, t in state["model"].items() if name.endswith(".A")).size(0))
    load_checkpoint(path, model, None, cfg)
    for module in list(model.modules()):  # folded into the matrices: what follows finds a plain model
        for name, child in module.named_children():
            if isinstance(child, Detour):
                child.base.weight.data += 2 * child.B.data @ child.A.data
                setattr(module, name, child.base)
    return model.eval().requires_grad_(True), cfg, make_tokenizer(state["extra"]["tokenizer"])


# What the weights were made with; another value does not fit them, or means something else.
SHAPE = set("n_layer n_head n_kv_head n_embd head_size ffn_size vocab_size tie_weights rope_theta rope_factor "
            "rope_original norm_eps init_std".split())


def scores_table(columns):
    """{label: {measure: value}} as a table."""
    measures = {"preferred": "no slip, right number", "correct": "right number", "kl": "KL to the reference, nats",
                "rewards/accuracies": "held-out pairs ordered", "rewards/margins": "margin of rewards",
                "logps/chosen": "ln p of the chosen", "logps/rejected": "ln p of the rejected"}
    lines = [f"{'':<28}" + "".join(f"{label:>14}" for label in columns)]
    for key, words in measures.items():
        if any(key in column for column in columns.values()):
            lines.append(f"{words:<28}" + "".join(f"{column[key]:>14.3f}" if key in column else f"{'-':>14}"
                                                  for column in columns.values()))
    return "\n".join(lines)


def main(cfg):
    """Imitate, make pairs, learn from them, compare; with --load and --prompt only write. -> (model, cfg)."""
    # In this order: device, settings, data, memory, model. What can fail does so before anything is written.
    began, device = time.perf_counter(), setup(cfg)
    rank, world = ranks()
    # What may differ when a run goes on; everything else is as recorded.
    free = {"out", "device", "compile", "resume", "eval_every", "save_every", "prompt", "max_new_tokens", "temperature",
            "top_k", "top_p", "repetition_penalty", "beams", "length_penalty"}
    recorded, model, tokenizer = None, None, None
    if cfg.resume:
        recorded = read_run(cfg.out)
        cfg = recorded_config(cfg, recorded["config"], free)
    if cfg.load:
        model, cfg, tokenizer = load_any(cfg)
    # A loaded model is asked in the way that it has learned, whatever --data says.
    template = str if (tokenizer.spec["kind"] if tokenizer else cfg.data) == "numbers" else instruct_prompt
    if cfg.load and cfg.prompt and not cfg.resume:
        model.to(device)
        check_prompt(tokenizer, template(cfg.prompt))
        print(cfg.prompt, end="" if template is str else "\n", flush=True)
        text = write_text(model, tokenizer, cfg, template(cfg.prompt), cfg.max_new_tokens, stream(tokenizer))
        print(text if cfg.beams > 1 else "")  # sampled text was streamed; the best beam is known at the end only
        return model, cfg

    # --- data, and what can go wrong with it
    here, loaded = Path(cfg.out).resolve(), Path(cfg.load).resolve()
    if cfg.load and (loaded == here or here in loaded.parents) and loaded.relative_to(here).parts[:1] != ("sft",):
        sys.exit(f"error: --load {cfg.load}: this run would write over it; give it another --out")
    toy = cfg.data == "numbers"
    tokenizer = tokenizer or make_tokenizer({"kind": "numbers" if toy else "gpt2"})
    if (tokenizer.spec["kind"] == "numbers") != toy or (toy and cfg.block_size < 20):
        sys.exit("error: --data numbers needs --block-size 20 or more" if toy and cfg.block_size < 20 else
                 f"error: --load {cfg.load}: a model of another kind of data than --data {cfg.data}")
    # Combinations that make no sense, each told in one line.
    if cfg.flip and not toy:
        sys.exit("error: --flip is for the toy task: real pairs are taken as they are")
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or tokenizer.n_vocab)
    if cfg.vocab_size < tokenizer.n_vocab:
        sys.exit(f"error: --vocab-size {cfg.vocab_size} is less than the {tokenizer.n_vocab} tokens of the data")
    if cfg.tie_weights and (cfg.carrier == "head" or (cfg.compare and toy)):
        sys.exit("error: with --tie-weights the head is the embedding too and cannot learn alone: take another "
                 "--carrier and --no-compare")
    if world > 1 and rank > 0:
        dist.barrier()  # rank 0 goes first: it may have to download, and the others then find the file
    rows, floor, info, parts = imitation_data(cfg, tokenizer)
    if world > 1 and rank == 0:
        dist.barrier()
    if recorded and info["sha256"] != recorded["data"]["sha256"]:
        sys.exit(f"error: --resume: {info['name']} is not what this run was trained on (SHA-256 differs)")
    prompts = [cfg.prompt] if cfg.prompt else ["40215=", "77=", "118="] if toy else ["Name three colours."]
    for prompt in prompts:
        check_prompt(tokenizer, template(prompt))
    # A pair is two rows; imitation has its own number of them.
    check_memory(dataclasses.replace(cfg, batch_size=max(2 * cfg.batch_size, cfg.sft_batch_size)), device)
    out = out_folder(cfg)
    # identity: what a stage builds on, these settings and these data.
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in free}
    base = [str(t.sum().item()) for t in model.state_dict().values()] if model else []  # of --load: not only its path
    extra = {"tokenizer": tokenizer.spec, "data": info,
             "identity": hashlib.sha256(json.dumps([settings, info, base], sort_keys=True).encode()).hexdigest()}
    if rank == 0:
        content = json.dumps({"script": Path(__file__).stem, "config": dataclasses.asdict(cfg), "data": info}, indent=2)
        write_atomically(out / "run.json", lambda file: file.write(content.encode()))

    # --- imitate
    dtype = torch.float64 if cfg.dtype == "float64" else torch.float32
    history = []
    if model is None:
        model = build_model(dataclasses.replace(cfg)).to(device, dtype)
        size = sum(p.numel() for p in model.parameters())
        print(f"model: {size:,} parameters on {device}; everything goes to {out}/")
        result = train_stage(model, cfg, "sft", rows, compute_loss, extra, lr=cfg.sft_lr, max_steps=cfg.sft_steps,
                             batch_size=cfg.sft_batch_size, eval_every=max(cfg.eval_every, cfg.sft_steps // 4))
        history = result["history"]
    model.to(device, dtype)
    # Only to be looked at: training needs two numbers of it for each pair.
    reference = copy.deepcopy(model).requires_grad_(False).eval()

    # --- pairs, and what the reference says about them
    if toy:
        try:
            pairs, perfect = number_pairs(reference, tokenizer, cfg.pairs, cfg.seed, False, cfg.flip)
            held_out, _ = number_pairs(reference, tokenizer, 512, cfg.seed + 1, True)
        except ValueError as problem:
            sys.exit(f"error: {problem}")
        parts = [pair_rows_of(part, cfg.block_size) for part in (pairs, held_out)]
        print(f"\n{len(pairs):,} pairs of the model's own answers; {perfect:.0%} of the chosen ones are without a slip"
              f"{f'; {cfg.flip:.0%} of the labels are swapped' if cfg.flip else ''}")
    data = [(*part, reference_logps(reference, part, cfg, part is parts[0])) for part in parts]
    numbers = list(dict.fromkeys(draw_numbers(700, cfg.seed + 2, True)))[:500] if toy else []

    def look(policy, count=150):
        scores = pair_scores(policy, data[1], cfg)
        return scores | (answer_rates(policy, reference, tokenizer, numbers[::len(numbers) // count or 1], cfg.seed)
                         if toy else {})

    # --- learn from them: the method, then what it is compared with
    plan = {cfg.loss: (preference_loss, cfg.carrier)}
    if cfg.compare and toy:
        plan["control"] = (imitation_loss, cfg.carrier)
        plan |= {f"{cfg.loss}, {carrier}": (preference_loss, carrier) for carrier in CARRIERS if carrier != cfg.carrier}
    # Each begins from the same imitator, and is judged at the end on 500 numbers, two samples each.
    runs, columns, seconds = {}, {"before": look(reference, 500)}, {}
    for label, (loss_fn, carrier) in plan.items():
        policy, folder = copy.deepcopy(model), "dpo" if label == cfg.loss else label.replace(", ", "-")
        *runs[label], seconds[label] = preference_stage(policy, cfg, folder, data, loss_fn, carrier, extra,
                                                        lambda policy=policy: look(policy))
        columns[label] = look(policy, 500)
        if label == cfg.loss:
            trained = policy
    val_loss = evaluate(trained, data[1], cfg, preference_loss)["val_loss"]  # of the method, on held-out pairs
    if rank > 0:
        return trained, cfg

    # --- what came of it
    gap = "" if template is str else " -> "
    lines = [f"{name:<7} {prompt}{gap}{write_text(one, tokenizer, cfg, template(prompt), cfg.max_new_tokens).strip()}"
             for prompt in prompts for name, one in (("before", reference), (cfg.loss, trained))]
    text = "\n".join(lines)
    write_atomically(out / "sample.txt", lambda file: file.write(text.encode()))
    for label, (rows_of, _) in runs.items():
        if rows_of and len(rows_of[0]) > 1:  # the control has no pairs to tell of
            content = "".join(json.dumps(row) + "\n" for row in rows_of)
            name = "dpo" if label == cfg.loss else label.replace(", ", "-")
            write_atomically(out / name / "preferences.jsonl",
                             lambda file, content=content: file.write(content.encode()))
    # Pictures, then one file with all figures.
    uniform = math.log(cfg.vocab_size)
    if history:
        plot_curve(out / "curve.png", history, f"{Path(__file__).name}: imitation",
                   {f"uniform guess, ln V = {uniform:.2f}": uniform} | ({} if floor is None else
                                                                        {f"floor {floor:.3f}": floor}))
    plot_preferences(out / "preferences.png", runs, f"{cfg.loss} on {Path(cfg.data).name}")
    short = {"before": "before", cfg.loss: "after"}
    results = {name: {short.get(label, label): column.get(key) for label, column in columns.items()}
               for name, key in (("preferred_rate", "preferred"), ("correct_rate", "correct"), ("kl", "kl"),
                                 ("pair_accuracy", "rewards/accuracies"), ("logps_chosen", "logps/chosen"),
                                 ("logps_rejected", "logps/rejected"))}
    results["dpo_seconds"] = seconds[cfg.loss]
    # One file that says what was run, on what, and what came out: enough to repeat the run and compare it.
    # seconds: all of this run, comparisons included.
    total = time.perf_counter() - began
    summary = {"config": dataclasses.asdict(cfg), "params": sum(p.numel() for p in model.parameters()),
               "val_loss": val_loss, "floor": floor, "tokens_per_second": None, "seconds": total,
               "peak_memory_mb": peak_memory_mb(device), "data": info, "device": str(device),
               "torch": torch.__version__, "figures": (["curve.png"] if history else []) + ["preferences.png"],
               "results": results}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it: one place, no second copy to go stale.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    print(f"\n{text}\n\n{scores_table(columns)}\n\n"
          f"Pictures: {', '.join(summary['figures'])} in {out}/. Let it write with\n"
          f"  python {Path(__file__).name} --load {out / 'dpo'} --prompt {prompts[0]!r}\n"
          f"Next: ppo_grpo.py, where the model is told how good its answers are while it gives them.\n"
          f"Expected: {expected}\n"
          f"Reached:  held-out pairs ordered {columns[cfg.loss]['rewards/accuracies']:.3f}"
          f"{''.join(f', {key} {columns[cfg.loss][key]:.3f}' for key in ('preferred', 'correct') if toy)}, "
          f"{seconds[cfg.loss]:.0f} s on pairs, {total:.0f} s in all")
    return trained, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
