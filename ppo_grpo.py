# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
PPO AND GRPO IN ONE FILE                         python ppo_grpo.py                 2 min on two CPU cores

Paper    Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347; Shao et al. 2024, DeepSeekMath
         (GRPO), arXiv 2402.03300; Yu et al. 2025, DAPO, arXiv 2503.14476; Liu et al. 2025, Understanding R1-Zero-Like
         Training (Dr. GRPO), arXiv 2503.20783
Idea     Let the model answer, let a program say how good each answer was, make good answers likelier and bad ones less
         likely. REINFORCE is that sentence. PPO adds a critic and several careful steps on one batch of answers; GRPO
         drops the critic and compares answers to the same prompt with each other.
Picture  prompts -> rollout: G sampled answers each -> reward -> advantage (better or worse than expected, per token)
         -> loss = -mean(min(ratio * A, clip(ratio) * A)), ratio = p_now / p_when_sampled   -> update -> again
Symbols  B batch (answers)   T time   P past (cached) tokens   S = P + T   C n_embd   H query heads   K key/value heads
         (beams in beam_search)   D head_size   F ffn_size   V vocabulary   L layers   N new tokens   G group   R rows
New here rollout, group_advantages, gae, whiten, clipped_loss, aggregate, k3, the loop around them; a reward of your own
Not here reward models, several turns, truncated importance sampling, asynchronous rollouts, replay
Expect   names right on prompts that were looked at once: imitation 28.1% (25.8% to 31.6%, 5 seeds) sampled, 3.6% (1.0%
         to 6.4%, 5 seeds) greedy; REINFORCE 96.2% (95.2% to 97.0%, 5 seeds) sampled, 98.4% (98.0% to 99.4%, 5 seeds)
         greedy, in 15 s; GRPO 97.6% (96.8% to 98.4%, 5 seeds) sampled, 99.4% (98.6% to 100.0%, 5 seeds) greedy, in 39
         s; PPO 97.6% (96.4% to 98.2%, 5 seeds) sampled, 98.8% (97.8% to 99.8%, 5 seeds) greedy, in 25 s. KL to the
         imitator 1.22 (1.12 to 1.33, 5 seeds) nats with GRPO, the least for it 1.20 (results/ppo_grpo.json)
Asked    Why can imitation not do it?   The ratio is always 1: is the code dead?   What does the critic buy?   Why
         divide by the group's standard deviation?   Which average over tokens?   Why a KL to the reference?
         (grep "# Q:")
"""
import argparse
import atexit
import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
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
import zipfile
from dataclasses import dataclass
from pathlib import Path

# The model needs torch alone. matplotlib is imported where it is used.
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --- 1. Config: every knob in one place ------------------------------------------------------------------------------
# A field is a flag (--n-layer 6), its comment is the help text, and the whole record travels in the checkpoint. Do not
# learn the fields by heart: each is explained where it is used. First reading: section 3 (the formulas), the sloppy
# annotators in 4, collect and learn_from_reward in 5. The model and the imitation before it are llama3.py's.
#     python ppo_grpo.py                                imitate sloppy annotators, then learn from a reward, three ways
#     python ppo_grpo.py --method grpo --variant dapo   one way only
#     python ppo_grpo.py --reward mine.py:score         a function of yours: (prompt, answer) -> number
#     python ppo_grpo.py --load runs/ppo_grpo/grpo --prompt "40215="            let the trained model write
#     python ppo_grpo.py --resume                       go on after Ctrl-C, a crash or a power cut
WAYS = ("reinforce", "grpo", "ppo")
VARIANTS = ("grpo", "dapo", "dr_grpo")


@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    reward: str = "exact"             # exact: 1 for the right name, else 0 | FILE.py:function of (prompt, answer) texts
    out: str = "runs/ppo_grpo"        # folder for checkpoints, metrics, samples and pictures
    seed: int = 1337                  # decides initial weights, batches, dropout and samples
    device: str = "auto"              # auto (cuda if present, else cpu) | cpu | cuda | mps
    dtype: str = "auto"               # of the imitation: auto (float32; cuda: bfloat16) | float32 | bfloat16 | float64
    compile: bool = False             # torch.compile the imitation: a minute of waiting, then faster steps

    # The rollouts and what is learned from them.
    method: str = "all"               # reinforce | grpo | ppo | all, each from the same imitator
    variant: str = "grpo"             # grpo | dapo | dr_grpo: how GRPO weighs groups and tokens
    prompts: int = 64                 # prompts per rollout for GRPO
    group: int = 8                    # answers per prompt for GRPO
    samples: int = 256                # prompts per rollout for PPO and REINFORCE, one answer each
    grpo_updates: int = 140           # rollouts of GRPO
    ppo_updates: int = 90             # rollouts of PPO
    reinforce_updates: int = 100      # rollouts of REINFORCE
    grpo_epochs: int = 1              # optimizer steps per rollout for GRPO
    ppo_epochs: int = 3               # optimizer steps per rollout for PPO
    max_answer: int = 12              # tokens that an answer may have; longer ones are cut and earn nothing
    rollout_temperature: float = 1.0  # of the sampling, and of every log-prob in the loss
    lr: float = 3e-4                  # peak learning rate of the policy
    value_lr: float = 3e-3            # of PPO's critic
    clip: float = 0.2                 # beyond this relative change since the rollout a token is not pushed further
    clip_high: float = 0.28           # dapo: the same upwards
    kl_coef: float = 0.01             # PPO: what a nat of distance from the reference costs, token by token
    kl_beta: float = 0.0              # GRPO: weight of the k3 estimate of that distance in the loss
    gamma: float = 1.0                # PPO: a reward one token later is worth this share
    lam: float = 0.95                 # PPO: how far GAE trusts rewards over the critic
    value_clip: float = 0.2           # PPO: the same for a value, in units of reward
    value_coef: float = 0.1           # PPO: weight of the critic's loss (Adam divides it out; it acts in the clipping)
    right_share: float = 0.3          # the toy annotators write the whole name this often

    # Shape: 104,512 parameters.
    block_size: int = 24              # longest context in tokens
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
    dropout: float = 0.0              # share of each branch zeroed while imitating; rollouts and updates are without
    init_std: float = 0.125           # std of the initial weights, about 1/sqrt(n_embd)

    # Optimisation.
    max_steps: int = 800              # optimizer steps of imitation (supervised fine-tuning)
    sft_lr: float = 2e-3              # its peak learning rate
    batch_size: int = 128             # imitation's rows per micro-step
    grad_accum: int = 1               # imitation's micro-steps per optimizer step
    min_lr_ratio: float = 0.1         # imitation's last learning rate as a share of the peak; updates end at 0
    warmup_steps: int = 10            # steps of linear warm-up, of imitation and of each method
    weight_decay: float = 0.01        # while imitating, on matrices and embeddings only; a reward is learned without
    beta2: float = 0.99               # memory of Adam's second moment, in updates; imitation uses 0.95
    grad_clip: float = 1.0            # largest gradient norm
    eval_every: int = 20              # updates between looks at held-out prompts
    save_every: int = 400             # imitation's steps between checkpoints; afterwards every 20 rollouts
    resume: bool = False              # continue the run in --out, bit for bit

    # Decoding.
    load: str = ""                    # run folder or checkpoint to write with, or to start from instead of imitation
    prompt: str = ""                  # what to continue; together with --load nothing is trained
    max_new_tokens: int = 12          # tokens to write
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
                 "eval_every save_every max_new_tokens beams prompts grpo_updates ppo_updates reinforce_updates "
                 "grpo_epochs ppo_epochs max_answer", lambda x: x >= 1, "at least 1"),
                ("group samples", lambda x: x >= 2, "at least 2: one answer is neither better nor worse than others"),
                # `0 <= x < inf` and not `x < 0 or ...`: every comparison with nan is false, so nan fails as well
                ("seed", lambda x: 0 <= x < 2 ** 31, "in [0, 2^31)"),
                ("vocab_size head_size warmup_steps weight_decay temperature top_k kl_coef kl_beta value_coef",
                 lambda x: 0 <= x < math.inf, "0 or more"),
                ("lr sft_lr value_lr grad_clip init_std rope_theta norm_eps repetition_penalty rollout_temperature "
                 "value_clip", lambda x: 0 < x < math.inf, "above 0"),
                ("rope_factor", lambda x: x == 0 or 1 <= x < math.inf, "0, or at least 1"),
                ("length_penalty", math.isfinite, "a number"),
                ("dropout beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("clip clip_high right_share", lambda x: 0 < x < 1, "in (0, 1)"),
                ("min_lr_ratio gamma lam", lambda x: 0 <= x <= 1, "in [0, 1]"),
                ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
                ("method", ("all", *WAYS).__contains__, "all, reinforce, grpo or ppo"),
                ("variant", VARIANTS.__contains__, "grpo, dapo or dr_grpo"),
                ("reward", lambda x: x == "exact" or re.fullmatch(r".+\.py:\w+", x), "exact, or FILE.py:function"),
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
        if self.block_size < max(16, 7 + self.max_answer):
            raise ValueError(f"block_size must be 16 or more, and hold a prompt of 7 tokens and an answer of "
                             f"{self.max_answer}")


PRESETS = {
    "laptop": {},  # the defaults above
    # Two steps on each rollout: the ratio leaves 1 and the clip begins to matter.
    "grpo-clipped": dict(method="grpo", prompts=32, grpo_epochs=2, grpo_updates=120),
    "dapo": dict(method="grpo", variant="dapo", grpo_epochs=2, grpo_updates=100),
    "dr_grpo": dict(method="grpo", variant="dr_grpo"),
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


# --- 2. Model: Llama 3, and a critic ---------------------------------------------------------------------------------
# First reading: the model is llama3.py's; go on at Agent, the end of this section.

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

class Agent(nn.Module):
    """A policy (any model with hidden() and lm_head) and PPO's critic: one value per position, from the same stream."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        self.critic = nn.Linear(policy.cfg.n_embd, 1, device=policy.lm_head.weight.device,
                                dtype=policy.lm_head.weight.dtype)
        # Zero: before it has learned anything the critic says 0 everywhere; advantages are then discounted rewards.
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)

    def forward(self, batch, temperature):
        """Score answers. -> (ln p of each answer token (B, N), value before each of them (B, N))."""
        # Position start - 1 + n predicts answer token n: only those get logits, not the prompt.
        # Trap: start + n. The first answer token is then never trained, and the last row reads what follows the answer.
        x = self.policy.hidden(batch["inputs"])                                # (B, T, C)
        where = batch["starts"][:, None] - 1 + torch.arange(batch["tokens"].size(1), device=x.device)  # (B, N)
        x = x.gather(1, where.clamp(max=x.size(1) - 1)[..., None].expand(-1, -1, x.size(2)))  # (B, N, C)
        logps = token_logps(self.policy.lm_head(x), batch["tokens"], temperature)  # (B, N)
        # Detached: the critic reads the policy's stream and does not bend it. Its errors are large at first, and
        # through a shared trunk they would push the policy more than the rewards do.
        return logps, self.critic(x.detach())[..., 0]                          # (B, N), (B, N)


def build_model(cfg):
    """A fresh model; its weights are a function of cfg alone, seed included."""
    torch.manual_seed(cfg.seed)
    return Llama(cfg)


# --- 3. Objective: from a reward to a gradient -----------------------------------------------------------------------
# A policy is a model seen as what chooses tokens; a rollout is a batch of answers sampled from it; the reference is the
# frozen imitator it began as. The whole theory in four lines. We want a large E[r(y)] over the policy's own answers y.
# Sampling cannot be differentiated, but the expectation can:
#
#     grad E[r(y)] = E[ r(y) * grad ln p(y) ]      (REINFORCE, Williams 1992): what imitation does, weighted by reward
#     = E[ (r(y) - b) * grad ln p(y) ]             for any b that does not depend on y; b near E[r] means less noise
#     the factor A = r - b is the advantage        better than expected: up; worse: down
#     E_now[A] = E_old[ratio * A]                  ratio = p_now / p_old: an older policy's answers, reweighted
#
# Everything below is about choosing b (a batch mean, a group mean, a critic) and about the last line: several steps on
# one rollout are cheaper than a rollout for each, and the ratio is trusted only near 1 (the clip). (A mean over G
# answers contains r(y) itself; that only scales the gradient, by 1 - 1/G.) The details that make or break it are
# numbered.

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def compute_loss(model, batch, cfg):
    """Imitation. batch = (inputs (B, T), targets (B, T)) -> (sum of losses in nats, how many targets, {})."""
    inputs, targets = batch
    logits = model(inputs)                                                     # (B, T, V)
    loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss_sum, (targets != IGNORE).sum(), {}


def token_logps(logits, tokens, temperature=1.0):
    """logits (B, N, V), tokens (B, N) -> ln p of each token (B, N) under softmax(logits / temperature)."""
    # Detail 1. The temperature of the sampling belongs in EVERY log-prob. Trap: sampling at 0.7 and training on the
    # log-probs at 1: the ratio then compares two distributions, neither of which wrote the answers.
    # Detail 2. So do cuts: top-k or top-p in rollouts make samples of another distribution. There are none here.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (B, N, V)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)  # (B, N)


def masked_mean(x, mask):
    """Mean of x over the places where mask is 1."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x, mask):
    """x with mean 0 and variance 1 over the places where mask is 1; 0 elsewhere."""
    # Detail 3. Over real tokens only. Trap: PADs in mean and variance; short answers then change everybody's advantage.
    mean = masked_mean(x, mask)
    variance = ((x - mean).square() * mask).sum() / (mask.sum() - 1).clamp(min=1)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


# Q: Why divide by the group's standard deviation?
# A: So that a step has one size, whatever the scale of the rewards. It has a price: a prompt that 1 of 8 answers gets
#    right has std 0.35, one that half of them get right 0.53: hard and easy prompts count more (Dr. GRPO leaves the
#    division out for that reason). Sample std, divided by G - 1, as the published code has it.
def group_advantages(rewards, group, scale=True):
    """rewards (B), `group` neighbours answer the same prompt -> advantages (B): (r - mean) / (std + 1e-4) per group."""
    # Detail 4. Against the other answers to the SAME prompt: easy prompts earn more, and that says nothing about an
    # answer. A group of equal rewards has advantage 0: nothing to learn from it, whatever the rewards are.
    r = rewards.view(-1, group)                                                # (R, G)
    advantages = r - r.mean(1, keepdim=True)                                   # (R, G)
    if scale:
        advantages = advantages / (r.std(1, keepdim=True) + 1e-4)              # (R, G)
    return advantages.flatten()                                                # (B)


# Q: What does the critic buy?
# A: A guess of what an answer will earn, made at every token: an advantage then says where in the answer things went
#    better or worse than expected (credit). With one 0/1 reward at the end of ten tokens there is little to explain,
#    and the group mean does as well for half the machinery. GRPO's own argument is the cost: a critic as large as the
#    policy.
def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16). All (B, N) -> (A, returns).

    delta_t = r_t + gamma * V_{t+1} - V_t;   A_t = delta_t + gamma * lam * A_{t+1};   returns = A + V.
    lam 0 trusts the critic one token ahead, lam 1 the rewards to the end.
    """
    # Detail 5. V behind the last token is 0: the answer is over. PADs stand behind it, so they must be zeroed before
    # the sweep and not after it. Trap: the critic's opinion about a PAD leaks into the last real token.
    values = values * mask                                                     # (B, N)
    N, advantages, later = values.size(1), torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(N)):  # a recursion: each needs the one behind it
        ahead = values[:, t + 1] if t + 1 < N else 0.0
        delta = rewards[:, t] + gamma * ahead - values[:, t]                   # (B)
        later = (delta + gamma * lam * later) * mask[:, t]                     # (B)
        advantages[:, t] = later
    return advantages, (advantages + values) * mask                            # (B, N), (B, N)


def clipped_loss(logps, old_logps, advantages, low, high):
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) per token, all (B, N) (PPO, eq. 7). -> (losses, clipped).

    clipped: bool, where the clip decided and the token therefore gets no gradient.
    """
    # Q: On the first step on a rollout logps == old_logps, so the ratio is exactly 1 and the clip never fires. Is the
    #    code dead?
    # A: No: d(ratio) = ratio * d(logps), so the gradient is A * grad ln p: REINFORCE. The value of the loss is about 0
    #    because advantages sum to 0 (exactly 0 with the "grpo" mean); watch the reward, not the loss. The clip bites
    #    from the second step on.
    # Detail 6. min and not just the clipped term: where a step has gone the wrong way (a bad token became likelier),
    # the unclipped term is the smaller one and still pulls back. DAPO's high > low leaves unlikely tokens room to grow.
    ratio = (logps - old_logps).exp()                                          # (B, N)
    free, held = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages  # (B, N), (B, N)
    return -torch.min(free, held), held < free                                 # (B, N), (B, N)


# Q: Which average over tokens?
# A: "grpo": mean over the tokens of each answer, then over answers: in a long wrong answer each token is blamed less,
#    so wrong answers grow longer. "dapo": over all tokens of the batch: each token counts the same. "dr_grpo": the sum
#    divided by a constant, B * the longest possible answer: no length in it at all. GSPO (Zheng et al. 2025, arXiv
#    2507.18071) goes another way: one ratio per answer, exp of the mean log-ratio, since the reward is per answer too.
def aggregate(losses, mask, how, longest):
    """losses (B, N), mask (B, N) -> a number: "grpo", "dapo" or "dr_grpo", see above."""
    # Detail 7. PADs are in no denominator.
    if how == "grpo":
        return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()      # ()
    if how == "dapo":
        return masked_mean(losses, mask)                                       # ()
    return (losses * mask).sum() / (mask.size(0) * longest)                    # ()


def k3(logps, ref_logps):
    """exp(d) - d - 1 with d = ref - now, per token (B, N): an estimate of KL(now || ref), never negative."""
    # Its mean is the KL, with less noise than k1 = -d (Schulman 2020, "Approximating KL divergence"). As a loss it has
    # the gradient of KL(ref || now), the other direction; k1 in the reward, as PPO has it below, of KL(now || ref).
    d = ref_logps - logps                                                      # (B, N)
    return d.exp() - d - 1                                                     # (B, N)


def value_loss(values, old_values, returns, mask, clip):
    """0.5 * max((v - R)^2, (v clipped around old - R)^2), mean over real tokens (from OpenAI's PPO code)."""
    held = old_values + (values - old_values).clamp(-clip, clip)               # (B, N)
    return 0.5 * masked_mean(torch.max((values - returns).square(), (held - returns).square()), mask)  # ()


def token_rewards(scores, logps, ref_logps, mask, kl_coef):
    """PPO's rewards (B, N): -kl_coef * (ln p - ln p_ref) at every token, plus the score at the answer's last one."""
    # Q: Why a KL to the reference?
    # A: The reward sees little (here: exact match) and the reference knows the rest, the language. Without a price on
    #    leaving it, whatever the reward forgets to mention may be destroyed, and a reward model may be fooled.
    # Detail 8. The score stands at the answer's own last token (its EOS). Trap: at the last column, where most rows
    # have a PAD. Detail 9. k1 and detached: it is a reward, so no gradient flows through it.
    rewards = -kl_coef * (logps - ref_logps).detach() * mask                   # (B, N)
    last = mask.sum(1).long() - 1                                              # (B)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))  # (B, N)


# --- 4. Data: sloppy labels, prompts, rewards ------------------------------------------------------------------------
# Every data set ends up as one thing: a tuple of tensors (inputs, targets) whose first axis is the row. A batch is then
# one gather, whatever the rows hold, and nothing below this section knows where they came from.

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


# differs from decoder_only.py: the toy language only
def make_tokenizer(spec):
    """The tokenizer that a spec describes: {"kind": "numbers"}."""
    return ToyTokenizer()


def sha256_of(path):
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The annotators of this file are in a hurry: 70 % of their labels leave the last word of a name out ("40215" -> "forty
# thousand two hundred"). Rewards do not: an answer is right or not.
#
# Q: Why can imitation not do it?
# A: Cross-entropy's optimum is the distribution of the labels: the whole name 30 % of the time, the short one 70 %.
#    More steps only bring the model closer to that. Greedy decoding is worse still: it always takes the majority. A
#    reward says which of the two is meant. The model can do both already; it has to learn which to choose. The least
#    change for that is to give the right mode probability 1 instead of 0.3: KL = ln(1 / 0.3) = 1.20 nats per answer.
#    That is the dotted line in the picture.
def sloppy(name, rng, right_share):
    """A name -> the label that a sloppy annotator gives it: whole with probability right_share, else cut short."""
    return name if rng.random() < right_share else name.rsplit(" ", 1)[0]


def is_final(n):
    """Half of the held-out numbers are looked at once, at the very end; the other half while training.

    A split that one looks at while choosing rates and lengths cannot say how good the choice is.
    """
    return is_validation(n) and int(hashlib.sha256(f"final {n}".encode()).hexdigest(), 16) % 2 == 0


def draw_prompts(count, seed, split):
    """-> list of numbers of 3 to 6 digits (names of two words or more) from "train", "validation" or "final"."""
    rng, numbers = random.Random(seed), []
    while len(numbers) < count:
        digits = rng.randint(3, 6)
        n = rng.randrange(10 ** (digits - 1), 10 ** digits)
        held_out = is_validation(n)
        kind = "train" if not held_out else "final" if is_final(n) else "validation"
        if kind == split:
            numbers.append(n)
    return numbers


def sloppy_rows(numbers, tokenizer, seed, right_share):
    """Lines "40215=forty thousand two hundred\\n" -> (inputs, targets), each (R, T), padded on the right."""
    rng = random.Random(seed)
    rows = [(tokenizer.encode(f"{n}="), tokenizer.encode(sloppy(number_to_words(n), rng, right_share) + "\n"))
            for n in numbers]
    ids = torch.tensor([(prompt + answer + [0] * 17)[:17] for prompt, answer in rows])  # (R, 17)
    targets = ids[:, 1:].clone()                                               # (R, 16)
    for row, (prompt, answer) in zip(targets, rows, strict=True):
        row[:len(prompt) - 1] = IGNORE
        row[len(prompt) + len(answer) - 1:] = IGNORE
    return ids[:, :-1], targets


def exact_reward(prompt, answer):
    """1.0 if the answer is the whole name of the number in the prompt ("40215="), else 0.0."""
    return float(answer == number_to_words(int(prompt.rstrip("="))))


def find_reward(spec):
    """"exact" or "FILE.py:function" -> a function (prompt, answer) -> number. A bad file costs one line."""
    if spec == "exact":
        return exact_reward
    path, _, name = spec.rpartition(":")
    try:
        module_spec = importlib.util.spec_from_file_location("reward_of_the_user", path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as problem:  # it is somebody else's code: anything may happen in it
        sys.exit(f"error: --reward {spec}: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}")


def score_answers(reward, prompts, answers):
    """[prompt], [answer or None if it never ended] -> rewards (B). A failing or non-finite reward ends the program."""
    # Detail 10. An answer that had to be cut off earns nothing, whatever it says: otherwise models learn not to stop.
    # A bad reward stops the run before an update is made with it: one NaN in the advantages is a policy of NaNs.
    scores = []
    for prompt, answer in zip(prompts, answers, strict=True):
        try:
            score = 0.0 if answer is None else float(reward(prompt, answer))
        except Exception as problem:
            sys.exit(f"error: the reward failed on {prompt!r}, {answer!r}: {type(problem).__name__}: "
                     f"{' '.join(str(problem).split())[:200]}; the policy was not changed by it")
        if not math.isfinite(score):
            sys.exit(f"error: the reward of {prompt!r}, {answer!r} is {score}; the policy was not changed by it")
        scores.append(score)
    return torch.tensor(scores)                                                # (B)


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


# A reward instead of labels: collect answers, have them judged, learn from them.
def make_batch(prompts, tokens, eos_ids):
    """Prompts (lists of ids) and tokens (B, N) -> the batch that Agent reads, rows padded on the right.

    inputs (B, T) prompt and answer, starts (B) where the answer begins, tokens (B, N), mask (B, N): 1.0 for the
    answer's own tokens, its EOS among them, 0.0 behind.
    """
    ends = torch.isin(tokens, torch.tensor(list(eos_ids), device=tokens.device))  # (B, N)
    # Detail 12. The EOS is a token of the answer: it is rewarded, and so learned. Trap: pad id == eos id and masking by
    # value; the model is then never told to stop.
    mask = ((ends.cumsum(1) - ends.long()) == 0).float()                       # (B, N)
    starts = torch.tensor([len(prompt) for prompt in prompts])                 # (B)
    # Pads on the right need no attention mask: a causal model never looks there. (rollout() pads on the left instead,
    # so that all prompts end in one column; positions count real tokens and are the same.)
    width = int(starts.max()) + tokens.size(1)
    rows = [prompt + answer for prompt, answer in zip(prompts, tokens.tolist(), strict=True)]
    inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows])    # (B, T)
    return {"inputs": inputs[:, :-1].to(tokens.device), "starts": starts.to(tokens.device), "tokens": tokens,
            "mask": mask}


def collect(policy, tokenizer, reward, numbers, group, cfg, seed):
    """Sample answers to "n=" for each number, `group` each, and have them judged. -> (batch, rewards (B))."""
    device = next(policy.parameters()).device
    prompts = [tokenizer.encode(f"{n}=") for n in numbers]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (R, T), padded on the left
    tokens = rollout(policy, ids, ids != 0, group, cfg.max_answer, cfg.rollout_temperature, tokenizer.eos_ids,
                     torch.Generator(device).manual_seed(seed))                # (B, N)
    batch = make_batch([p for p in prompts for _ in range(group)], tokens, tokenizer.eos_ids)
    # The reward reads text up to the EOS, never padding.
    answers = []
    for row in tokens.tolist():
        end = next((i for i, token in enumerate(row) if token in tokenizer.eos_ids), None)
        answers.append(None if end is None else tokenizer.decode(row[:end]).strip())
    rewards = score_answers(reward, [f"{n}=" for n in numbers for _ in range(group)], answers)  # (B)
    return batch, rewards.to(device)


def grpo_loss(agent, batch, advantages, old_logps, ref_logps, cfg):
    """GRPO (Shao et al. 2024, eq. 3) and its variants, and REINFORCE, which is its first step. -> (loss, metrics)."""
    logps, _ = agent(batch, cfg.rollout_temperature)                           # (B, N)
    high = cfg.clip_high if cfg.variant == "dapo" else cfg.clip
    losses, clipped = clipped_loss(logps, old_logps, advantages[:, None], cfg.clip, high)  # (B, N), (B, N)
    if cfg.kl_beta > 0:
        losses = losses + cfg.kl_beta * k3(logps, ref_logps)                   # (B, N)
    loss = aggregate(losses, batch["mask"], cfg.variant, cfg.max_answer)
    return loss, {"clip_fraction": masked_mean(clipped.float(), batch["mask"])}


def ppo_loss(agent, batch, advantages, returns, old_logps, old_values, cfg):
    """PPO's clipped policy loss plus value_coef times the critic's clipped loss. -> (loss, metrics)."""
    logps, values = agent(batch, cfg.rollout_temperature)                      # (B, N), (B, N)
    mask = batch["mask"]
    losses, clipped = clipped_loss(logps, old_logps, advantages, cfg.clip, cfg.clip)  # (B, N), (B, N)
    critic = value_loss(values, old_values, returns, mask, cfg.value_clip)
    return masked_mean(losses, mask) + cfg.value_coef * critic, {
        "clip_fraction": masked_mean(clipped.float(), mask), "value_loss": critic}


def learn_from_reward(agent, reference, cfg, method, tokenizer, reward, extra, look):
    """Rollouts and updates with one method, in <out>/<method>. -> (rows of metrics, looks, seconds without the looks).

    agent is changed in place. reference: the imitator, frozen. look() -> a dict, asked every eval_every updates.
    """
    device = next(agent.parameters()).device
    path, agent.policy.cfg.dropout = Path(cfg.out) / method / "ckpt.pt", 0.0
    updates = {"reinforce": cfg.reinforce_updates, "grpo": cfg.grpo_updates, "ppo": cfg.ppo_updates}[method]
    epochs = {"reinforce": 1, "grpo": cfg.grpo_epochs, "ppo": cfg.ppo_epochs}[method]
    count, group = (cfg.prompts, cfg.group) if method == "grpo" else (cfg.samples, 1)
    rates = {"policy": cfg.lr, "critic": cfg.value_lr}
    groups = [{"params": getattr(agent, name).parameters(), "lr": lr} for name, lr in rates.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), weight_decay=0.0,
                                  fused=device.type in ("cpu", "cuda"))
    # --resume: as in train(), everything random is a function of (seed, update).
    step, rows, looks, spent = 0, [], [], 0.0
    if cfg.resume and path.is_file() and read_checkpoint(path)["extra"].get("identity") == extra["identity"]:
        step, saved = load_checkpoint(path, agent, optimizer, cfg)
        rows, looks, spent = saved["rows"], saved["looks"], saved["seconds"]
    looks = looks or [{"update": 0} | look()]
    print(f"\n{method}: {updates} rollouts of {count * group} answers, {epochs} step(s) on each"
          f"{', continued' if step else ''}")
    dull = 0
    bar = tqdm(total=updates, initial=step, desc=method, mininterval=0.5)
    with polite_interrupt() as stop:
        while step < updates:
            began = time.perf_counter()
            # DAPO's dynamic sampling: groups whose answers are all right or all wrong say nothing, so others are
            # sampled in their place, up to four times as many. What is told of the reward is the mean of everything
            # sampled.
            pool, seen, spread = [], [], None
            for attempt in range(4):
                seed = (cfg.seed * 1_000_003 + step) * 8 + attempt
                numbers = draw_prompts(count, seed, "train")
                batch, rewards = collect(agent.policy, tokenizer, reward, numbers, group, cfg, seed)
                spread = rewards.view(-1, group).amax(1) > rewards.view(-1, group).amin(1)  # (R)
                seen.append((rewards, spread))
                if method != "grpo" or cfg.variant != "dapo":
                    break
                keep = spread.repeat_interleave(group)                         # (B)
                pool.append(({key: value[keep] for key, value in batch.items()}, rewards[keep]))
                if sum(len(part[1]) for part in pool) >= count * group:
                    break
            if sum(len(part[1]) for part in pool):  # fewer than asked for, rather than groups without a signal
                batch, rewards = join_batches(pool, count * group)
            # Equal rewards everywhere (in every group): there is no better and no worse. An update would only be Adam's
            # momentum and, with a KL, a pull back to the reference, so none is made.
            equal = bool((rewards == rewards[0]).all())
            if group > 1:  # in all that was sampled, not only in the last attempt
                equal = not any(bool(mixed.any()) for _, mixed in seen)
            dull = dull + 1 if equal else 0
            metrics = {"reward": torch.cat([one for one, _ in seen]).mean().item(),
                       "mixed_groups": torch.cat([one for _, one in seen]).float().mean().item() if group > 1 else 1.0}
            if dull >= 10 and not any("kl" in row for row in rows):
                bar.close()
                sys.exit(f"error: in ten rollouts no two answers that are compared got different rewards (the last: "
                         f"{rewards[0].item():g}): nothing can be learned from a constant; the policy is as it was")
            if not dull:
                warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps)) * (1 - step / updates)  # up, then linearly to 0
                for param_group, lr in zip(optimizer.param_groups, rates.values(), strict=True):
                    param_group["lr"] = lr * warm
                metrics |= update(agent, reference, optimizer, batch, rewards, cfg, method, epochs, group)
            # What is told and kept, as in train().
            step += 1
            spent += time.perf_counter() - began
            rows.append({"update": step} | metrics)
            bar.update()
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", refresh=False)
            if step % cfg.eval_every == 0 or step == updates:
                looks.append({"update": step} | look())
                tqdm.write(f"update {step:4d}: reward {metrics['reward']:.3f}   " + "   ".join(
                    f"{key} {value:.3f}" for key, value in looks[-1].items() if key != "update"))
            if ranks()[0] == 0 and (step % 20 == 0 or step == updates or stop):
                kept = {**extra, "rows": rows, "looks": looks, "seconds": spent}
                save_checkpoint(path, agent, optimizer, step, cfg, kept)
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                write_atomically(path.with_name("metrics.jsonl"), lambda file, lines=lines: file.write(lines.encode()))
            if stop:
                bar.close()
                print(f"interrupted: update {step} is saved in {path}; --resume goes on from there", file=sys.stderr)
                sys.exit(130)
    bar.close()
    return rows, looks, spent


def join_batches(parts, count):
    """[(batch, rewards)] of several rollouts -> one of the first `count` answers, padded to one width."""
    width = max(part["inputs"].size(1) for part, _ in parts)
    joined = {key: torch.cat([F.pad(part[key], (0, width - part[key].size(1))) if key == "inputs" else part[key]
                              for part, _ in parts])[:count] for key in parts[0][0]}
    return joined, torch.cat([rewards for _, rewards in parts])[:count]


def update(agent, reference, optimizer, batch, rewards, cfg, method, epochs, group):
    """All optimizer steps on one rollout. -> metrics. A gradient that is not finite ends the program unused."""
    mask = batch["mask"]
    with torch.no_grad():
        # Log-probs under the policy that wrote the answers (old) and under the reference, scored once, by the code that
        # scores them in the loss. Trap: keeping the log-probs of the sampling loop: a cached, batched decode rounds
        # differently, and the ratio is not 1 where it should be.
        old_logps, old_values = agent(batch, cfg.rollout_temperature)          # (B, N), (B, N)
        ref_logps, _ = reference(batch, cfg.rollout_temperature)               # (B, N)
        if method == "ppo":
            scores = token_rewards(rewards, old_logps, ref_logps, mask, cfg.kl_coef)  # (B, N)
            advantages, returns = gae(scores, old_values, mask, cfg.gamma, cfg.lam)  # (B, N), (B, N)
            advantages = whiten(advantages, mask)                              # (B, N)
        elif method == "grpo":
            advantages = group_advantages(rewards, group, cfg.variant != "dr_grpo")  # (B)
        else:
            advantages = rewards - rewards.mean()                              # (B)
    plain = dataclasses.replace(cfg, variant="dapo", kl_beta=0.0) if method == "reinforce" else cfg
    # Nats per answer, of the policy that wrote them.
    metrics = {"kl": ((old_logps - ref_logps) * mask).sum(1).mean().item()}
    for epoch in range(epochs):
        if method == "ppo":
            loss, found = ppo_loss(agent, batch, advantages, returns, old_logps, old_values, cfg)
        else:
            loss, found = grpo_loss(agent, batch, advantages, old_logps, ref_logps, plain)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(agent.parameters(), cfg.grad_clip)
        if not bool(norm.isfinite()):
            sys.exit("error: the gradient is not finite; the last checkpoint is kept. A lower --lr may help")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if epoch == 0:
            metrics["first_loss"] = loss.item()
    return metrics | {key: value.item() for key, value in found.items()} | {"grad_norm": norm.item()}


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
    # For decode_step: the weights themselves, looked up once (references, no copies).
    cache.weights = [tuple(parameter.detach() for parameter in layer.parameters()) for layer in model.model.layers]
    return model.lm_head(x), cache  # V logits for B positions and not for B*T


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

@torch.inference_mode()
def decode_step(model, token, cache):
    """Append one token (B,) per row. -> (logits (B, V), cache). A full context forgets its older half first."""
    # What model(token[:, None], cache=cache) computes, written out for one token: 12*L + 4 calls of modules (76 for 6
    # layers) weigh beside the few products of a small model. A test holds the two together.
    cfg, P = model.cfg, cache.length
    if P == cfg.block_size:
        cache.drop_oldest((cfg.block_size + 1) // 2)
        P = cache.length
    positions, allowed = torch.full((1,), P, device=token.device), None        # (1)
    if cache.padded:  # count the real tokens, see Llama.hidden
        keep = cache.mask[:, :P + 1]                                           # (B, S)
        positions, allowed = keep.sum(1, keepdim=True) - 1, keep[:, None, None, :]  # (B, 1), (B, 1, 1, S)
    rope = rope_angles(positions + cache.dropped, model.rope_speed)            # (..., 1, 1, D) each

    def norm(x, weight):
        return weight * F.rms_norm(x, x.shape[-1:], eps=cfg.norm_eps)          # (B, C)

    x = model.model.embed_tokens(token)                                        # (B, C)
    for layer, (norm1, q, k, v, o, norm2, gate, up, down) in enumerate(cache.weights):
        h = norm(x, norm1)                                                     # (B, C)
        q, k, v = (times(h, w).view(len(x), -1, 1, cfg.head_size) for w in (q, k, v))  # (B, ..., 1, D)
        q, k = apply_rope(torch.cat((q, k), 1), *rope).split((cfg.n_head, cfg.n_kv_head), 1)  # both in one go
        k, v = cache.update(layer, k, v)                                       # (B, K, S, D) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed,
                                           enable_gqa=cfg.n_kv_head < cfg.n_head)  # (B, H, 1, D)
        x = x + times(y.flatten(1), o)                                         # (B, C)
        h = norm(x, norm2)                                                     # (B, C)
        x = x + times(F.silu(times(h, gate)) * times(h, up), down)             # (B, C)
    cache.length = P + 1
    return times(model.model.norm(x), model.lm_head.weight), cache


def reorder(cache, rows):
    """-> the cache whose row i is the old row rows[i]. Beam search copies good rows over bad ones with it."""
    new = copy.copy(cache)
    new.keys, new.values = cache.keys.index_select(1, rows), cache.values.index_select(1, rows)
    new.mask = cache.mask[rows]
    new.dropped = cache.dropped[rows] if torch.is_tensor(cache.dropped) else 0
    return new


@torch.no_grad()
def rollout(model, ids, mask, group, max_new_tokens, temperature, eos_ids, generator):
    """`group` sampled answers to each prompt ids (B, T), mask (B, T) -> tokens (R, N), R = B*G, 0 behind an EOS."""
    # The prompt is read once and its cache copied for the G answers, which are then written in one batch: reading
    # weights and calling kernels is what a token costs, and 512 rows share it. No top-k, no top-p: see detail 2.
    model.eval()  # Detail 11. Trap: dropout on here or in the update: the ratio is then not 1 on the first step
    logits, state = prefill(model, ids, mask, ids.size(1) + max_new_tokens)
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(group)  # (R)
    logits, state = logits[rows], reorder(state, rows)
    out = ids.new_zeros(len(rows), max_new_tokens)
    eos = torch.tensor(list(eos_ids), device=ids.device)
    # who: which answers are still being written. Answers end at different times; as soon as a quarter of the rows are
    # done they leave the batch, and the others go on without them.
    who, done = torch.arange(len(rows), device=ids.device), torch.zeros_like(rows, dtype=torch.bool)  # (R), (R)
    for n in range(max_new_tokens):
        token = sample_next(logits, temperature, generator=generator).masked_fill(done, 0)  # (M)
        out[who, n] = token
        done = done | torch.isin(token, eos)                                   # (M)
        left = int((~done).sum())
        if n + 1 == max_new_tokens or left == 0:
            break
        if left < 0.75 * len(done):
            stay = (~done).nonzero()[:, 0]
            who, token, done, state = who[stay], token[stay], done[stay], reorder(state, stay)
        logits, state = decode_step(model, token, state)
    return out                                                                 # (R, N)


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


# --- 8. Main: imitate, then learn from a reward ----------------------------------------------------------------------
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


def mean_reward(policy, tokenizer, reward, numbers, cfg, temperature, seed=0):
    """Mean reward of one answer per number at this temperature (0: greedy); exact: the share of right ones."""
    at = dataclasses.replace(cfg)
    at.rollout_temperature = temperature  # 0 is no temperature to train at, but one to look at
    _, rewards = collect(policy, tokenizer, reward, numbers, 1, at, seed)
    return rewards.mean().item()


def plot_learning(path, runs, least_kl, title):
    """runs {method: (rows, looks)}: held-out accuracy, KL, clip fraction and mixed groups against rollouts."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 2, figsize=(10, 7), dpi=120)
    colors = dict(zip(WAYS, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
    for method, (rows, looks) in runs.items():
        steps, color = [row["update"] for row in rows], colors[method]
        axes[0, 0].plot(steps, [row["reward"] for row in rows], lw=0.6, alpha=0.6, color=color)
        axes[0, 0].plot([one["update"] for one in looks], [one["sampled"] for one in looks], "o-", ms=3, color=color,
                        label=f"{method}, sampled")
        axes[0, 0].plot([one["update"] for one in looks], [one["greedy"] for one in looks], "--", color=color,
                        label=f"{method}, greedy")
        # KL and clipping exist for rollouts that led to an update, mixed groups for all.
        for ax, key in ((axes[0, 1], "kl"), (axes[1, 0], "clip_fraction")):
            ax.plot([row["update"] for row in rows if key in row], [row[key] for row in rows if key in row], lw=1,
                    color=color, label=method)
        if method == "grpo":
            axes[1, 1].plot(steps, [1 - row["mixed_groups"] for row in rows], lw=1, color=color, label=method)
    axes[0, 1].axhline(least_kl, ls=":", color="black", label=f"least needed, -ln(right share) = {least_kl:.2f}")
    for ax, label, name in ((axes[0, 0], "reward", "reward of rollouts (thin) and of held-out prompts"),
                            (axes[0, 1], "nats per answer", "distance from the imitator (KL)"),
                            (axes[1, 0], "share of tokens", "clipped tokens, last step on each rollout"),
                            (axes[1, 1], "share of groups", "groups whose answers all earn the same")):
        ax.set(xlabel="rollout", ylabel=label, title=name, **({} if label == "reward" else {"ylim": (0, None)}))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    fig.suptitle(title)
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


# differs from decoder_only.py: our own checkpoints only, of imitation or with a critic beside the policy
def load_any(cfg):
    """--load: our checkpoint, a file or the folder of a stage or run around it. -> (model, cfg, tokenizer, the file).

    The shape of the model comes from what is loaded, everything else from the command line.
    """
    folder = Path(cfg.load)
    path = next((folder / name / "ckpt.pt" for name in ("", "grpo", "ppo", "reinforce", "sft")
                 if (folder / name / "ckpt.pt").is_file()), folder)
    state = read_checkpoint(path)
    free = {field.name for field in dataclasses.fields(cfg)} - SHAPE - {"block_size"}
    cfg = recorded_config(cfg, state["config"], free)
    agent = Agent(build_model(dataclasses.replace(cfg)))
    with_critic = any(name.startswith("policy.") for name in state["model"])
    load_checkpoint(path, agent if with_critic else agent.policy, None, cfg)
    return agent.policy.eval(), cfg, make_tokenizer(state["extra"]["tokenizer"]), path


# What the weights were made with; another value does not fit them, or means something else.
SHAPE = set("n_layer n_head n_kv_head n_embd head_size ffn_size vocab_size tie_weights rope_theta rope_factor "
            "rope_original norm_eps init_std".split())


def main(cfg):
    """Imitate, then learn from a reward with each method; with --load and --prompt only write. -> (model, cfg)."""
    # In this order: device, settings, data, memory, model. What can fail does so before anything is written.
    began, device = time.perf_counter(), setup(cfg)
    if ranks()[1] > 1:
        sys.exit("error: rollouts run in one process: start this script without torchrun")
    # What may differ when a run goes on; everything else is as recorded.
    free = {"out", "device", "compile", "resume", "eval_every", "save_every", "prompt", "max_new_tokens", "temperature",
            "top_k", "top_p", "repetition_penalty", "beams", "length_penalty"}
    recorded, model, tokenizer = None, None, ToyTokenizer()
    if cfg.resume:
        recorded = read_run(cfg.out)
        cfg = recorded_config(cfg, recorded["config"], free)
    if cfg.load:
        model, cfg, tokenizer, start = load_any(cfg)
    if cfg.load and cfg.prompt and not cfg.resume:
        model.to(device)
        check_prompt(tokenizer, cfg.prompt)
        print(cfg.prompt, end="", flush=True)
        text = write_text(model, tokenizer, cfg, cfg.prompt, cfg.max_new_tokens, stream(tokenizer))
        print(text if cfg.beams > 1 else "")  # sampled text was streamed; the best beam is known at the end only
        return model, cfg
    # What can fail fails here, before anything is written.
    methods = WAYS if cfg.method == "all" else (cfg.method,)
    if cfg.load and any(start.resolve() == (Path(cfg.out) / name / "ckpt.pt").resolve() for name in methods):
        sys.exit(f"error: --load {cfg.load}: this run would write over {start}; give it another --out")
    reward = find_reward(cfg.reward)
    score_answers(reward, ["40215="], ["forty thousand two hundred fifteen"])  # a broken one should fail now
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or tokenizer.n_vocab)
    if cfg.vocab_size < tokenizer.n_vocab:
        sys.exit(f"error: --vocab-size {cfg.vocab_size} is less than the {tokenizer.n_vocab} tokens of the data")
    prompts = [cfg.prompt] if cfg.prompt else ["40215=", "777=", "1000="]
    for prompt in prompts:
        check_prompt(tokenizer, prompt)
    # The larger of the two: rows of imitation, or all answers of a rollout in one backward pass.
    answers = max(cfg.prompts * cfg.group, cfg.samples)
    check_memory(dataclasses.replace(cfg, batch_size=max(cfg.batch_size, answers)), device)

    # --- data: labels to imitate, prompts to look at while training, and prompts for the end
    train, val = draw_prompts(60_000, cfg.seed, "train"), sorted(set(draw_prompts(2_000, cfg.seed, "validation")))
    final = list(dict.fromkeys(draw_prompts(700, cfg.seed + 1, "final")))[:500]
    info = {"name": "numbers", "sha256": hashlib.sha256(str((train, val, cfg.right_share)).encode()).hexdigest()}
    rows = [sloppy_rows(part, tokenizer, cfg.seed, cfg.right_share) for part in (train, val)]
    entropy = -sum(p * math.log(p) for p in (cfg.right_share, 1 - cfg.right_share))
    floor = entropy * len(val) / int((rows[1][1] != IGNORE).sum())  # one unpredictable choice per line: its last word
    print(f"data: {len(train):,} labels, {cfg.right_share:.0%} of them whole names; {len(val):,} numbers to validate, "
          f"{len(final)} for the end")
    out = out_folder(cfg)
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in free}
    # What all stages build on: these settings, these data, and the contents of the files that were named.
    files = [sha256_of(path) for path in ([start] if cfg.load else [])]
    files += [sha256_of(cfg.reward.rpartition(":")[0])] if cfg.reward != "exact" else []
    extra = {"tokenizer": tokenizer.spec, "data": info,
             "identity": hashlib.sha256(json.dumps([settings, info, files], sort_keys=True).encode()).hexdigest()}
    content = json.dumps({"script": Path(__file__).stem, "config": dataclasses.asdict(cfg), "data": info}, indent=2)
    write_atomically(out / "run.json", lambda file: file.write(content.encode()))

    # --- imitate
    dtype, history = torch.float64 if cfg.dtype == "float64" else torch.float32, []
    if model is None:
        model = build_model(dataclasses.replace(cfg)).to(device, dtype)
        size = sum(p.numel() for p in model.parameters())
        print(f"model: {size:,} parameters on {device}; everything goes to {out}/")
        history = train_stage(model, cfg, "sft", rows, compute_loss, extra, lr=cfg.sft_lr, beta2=0.95,
                              eval_every=max(1, cfg.max_steps // 4))["history"]
    model.to(device, dtype)
    reference = Agent(copy.deepcopy(model)).requires_grad_(False).eval()
    looked_at = val[::max(1, len(val) // 200)]

    def look(policy, numbers=looked_at):
        return {"sampled": mean_reward(policy, tokenizer, reward, numbers, cfg, cfg.rollout_temperature),
                "greedy": mean_reward(policy, tokenizer, reward, numbers, cfg, 0.0)}

    # --- learn from the reward, each method from the same imitator
    runs, ends, seconds, trained = {}, {"sft": look(model, final)}, {}, None
    for method in methods:
        agent = Agent(copy.deepcopy(model)).to(device)
        *runs[method], seconds[method] = learn_from_reward(agent, reference, cfg, method, tokenizer, reward, extra,
                                                           lambda agent=agent: look(agent.policy))
        ends[method], trained = look(agent.policy, final), agent.policy

    # --- what came of it
    lines = [f"{name:<10}{prompt}{write_text(one, tokenizer, cfg, prompt, cfg.max_new_tokens).strip()}"
             for prompt in prompts for name, one in (("sft", model), (methods[-1], trained))]
    text = "\n".join(lines)
    write_atomically(out / "sample.txt", lambda file: file.write(text.encode()))
    uniform, least = math.log(cfg.vocab_size), -math.log(cfg.right_share)
    if history:
        plot_curve(out / "curve.png", history, f"{Path(__file__).name}: imitation",
                   {f"uniform guess, ln V = {uniform:.2f}": uniform, f"floor {floor:.3f}": floor})
    plot_learning(out / "learning.png", runs, least, "learning from a reward what labels cannot say")
    kl = {method: next((row["kl"] for row in reversed(rows_of) if "kl" in row), 0.0)
          for method, (rows_of, _) in runs.items()}
    table = [f"{'':<12}{'sampled':>10}{'greedy':>10}{'KL, nats':>10}{'seconds':>10}"]
    table += [f"{name:<12}{end['sampled']:>10.3f}{end['greedy']:>10.3f}"
              + (f"{kl[name]:>10.2f}{seconds[name]:>10.0f}" if name in kl else f"{'0':>10}{'-':>10}")
              for name, end in ends.items()]
    # One file that says what was run, on what, and what came out: enough to repeat the run and compare it.
    # val_loss is that of the imitation; accuracies are on the final prompts, looked at once.
    total = time.perf_counter() - began
    summary = {"config": dataclasses.asdict(cfg), "params": sum(p.numel() for p in model.parameters()),
               "val_loss": next((row["val_loss"] for row in reversed(history) if "val_loss" in row), None),
               "floor": floor, "tokens_per_second": None, "seconds": total, "peak_memory_mb": peak_memory_mb(device),
               "data": info, "device": str(device), "torch": torch.__version__,
               "figures": (["curve.png"] if history else []) + ["learning.png"],
               "results": {"accuracy": {name: end["sampled"] for name, end in ends.items()},
                           "accuracy_greedy": {name: end["greedy"] for name, end in ends.items()},
                           "kl": kl, "least_kl": least, "method_seconds": seconds}}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it: one place, no second copy to go stale.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    summary_table, words = "\n".join(table), ", ".join(f"{name} {end['sampled']:.3f}" for name, end in ends.items())
    print(f"\n{text}\n\n{summary_table}\n\nThe pictures are {out}/curve.png and {out}/learning.png. Let it write with\n"
          f"  python {Path(__file__).name} --load {out / methods[-1]} --prompt {prompts[0]!r}\n"
          f"Next: dpo.py, where people compare two answers instead of a program judging one.\n"
          f"Expected: {expected}\n"
          f"Reached:  sampled accuracy {words}, {total:.0f} s in all")
    return trained, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
