# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
PPO AND GRPO IN ONE FILE                         python ppo_grpo.py                 150 s on two CPU cores

Paper    Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347; Shao et al. 2024, DeepSeekMath
         (GRPO), arXiv 2402.03300; Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783; Yu et al. 2025 (DAPO), arXiv
         2503.14476; Zheng et al. 2025 (GSPO), arXiv 2507.18071
Idea     Let the model answer, let a program say how good each answer is, make good answers likelier and bad ones less
         likely. REINFORCE is that sentence. PPO adds a critic and takes several careful steps on one batch of answers;
         GRPO drops the critic and compares the answers to one prompt with each other
Picture  prompts -> rollout: sampled answers -> reward -> advantage A (better or worse than expected)
         -> loss = -mean(min(ratio * A, clip(ratio) * A)), ratio = p_now / p_when_sampled -> update -> again
Symbols  B batch (answers)   R rows   T time   S past + new   C n_embd   H heads   D head size   F ffn_size
         V vocabulary   G group
New here rollout, answer_mask, gae, whiten, group_advantages, policy_loss with its five variants, a reward of your own,
         rejection sampling as the control
Not here reward models, several turns, DAPO's resampling and length penalty, truncated importance sampling, replay
Expect   right names, sampled / greedy, mean of 5 seeds, and answers judged: imitation 4 % / 0 %; one round of rejection
         sampling 83 % / 85 % from 2,560; four rounds 94 % / 95 % from 2,560; REINFORCE 95 % / 96 % from 51,200; PPO 98
         % / 98 % from 51,200; GRPO 97 % / 98 % from 102,400
Asked    Why can imitation not do it?   The ratio is always 1: is the code dead?   What does the critic buy?   Why
         divide by the group's standard deviation?   Which mean over tokens?   Why a KL to the reference?   When is
         rejection sampling enough?

    python ppo_grpo.py                                imitation, rejection sampling, REINFORCE, PPO, GRPO: one table
    python ppo_grpo.py --methods grpo --variant gspo --epochs 2       one of grpo, dr_grpo, dapo, gspo
    python ppo_grpo.py --methods grpo --reward mine.py:score          your function: (prompt, answer) -> number
"""
import argparse
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import random
import re
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
    reward: str = "exact"             # exact: 1 for the right name, else 0 | FILE.py:function of (prompt, answer)
    methods: str = "rejection,iterated,reinforce,ppo,grpo"  # what to compare, from one imitator
    out: str = "runs/ppo_grpo"        # folder for the summary and the picture
    seed: int = 1337                  # decides initial weights, batches and samples
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda
    # Rollouts and what is learned from them.
    variant: str = "grpo"             # of GRPO: grpo | dr_grpo | dapo | gspo, see policy_loss
    group: int = 8                    # GRPO: answers per prompt
    answers: int = 512                # GRPO: answers per update; the others, one answer per prompt, take half
    rejection_answers: int = 2560     # answers for rejection sampling, once or in 4 rounds
    max_steps: int = 200              # rollouts of reinforce, ppo, grpo
    epochs: int = 1                   # GRPO: optimizer steps per rollout
    ppo_epochs: int = 3               # PPO: the same
    lr: float = 1e-3                  # peak learning rate of the policy
    value_lr: float = 3e-3            # PPO: of the critic
    clip: float = 0.2                 # a token is not pushed beyond this relative change (not for gspo)
    kl_coef: float = 0.01             # PPO: price of a nat of distance from the reference
    gamma: float = 1.0                # PPO: a reward one token later is worth this share
    lam: float = 0.95                 # PPO: how far GAE trusts rewards over the critic
    right_share: float = 0.05         # the annotators write the whole name this often
    # Shape: 0.1 million parameters.
    block_size: int = 18              # longest prompt and answer, in tokens; longer answers are cut off
    n_layer: int = 2                  # layers
    n_head: int = 4                   # heads, n_embd / n_head wide each
    n_embd: int = 64                  # width of the residual stream
    ffn_size: int = 192               # width inside the MLP
    # Optimization of the imitation.
    sft_steps: int = 800              # steps of imitation (supervised fine-tuning)
    sft_lr: float = 3e-3              # its peak learning rate
    batch_size: int = 128             # its rows per step
    warmup_steps: int = 20            # steps of linear warm-up, of imitation and of each method
    beta2 = 0.99                      # no type, so no flag: Adam's memory
    vocab_size = 43                   # no type, either: tokens of the toy language


PRESETS = {"laptop": {}}  # the defaults above


# --- 2. Model: the policy (a model that writes answers): from a reward to a gradient, then the model itself ----------
# A rollout is a batch of answers sampled from the policy. The whole theory in four lines: we want a large mean reward
# E[r(y)] over the policy's own answers y. Sampling has no derivative, but the mean has:
#
#     grad E[r(y)] = E[ r(y) * grad ln p(y) ]      (REINFORCE, Williams 1992): imitation, weighted by reward
#     = E[ (r(y) - b) * grad ln p(y) ]             for any b that does not depend on y; b near E[r] means less noise
#     A = r - b is the advantage                   better than expected: up; worse: down
#     E_now[A] = E_old[ratio * A]                  ratio = p_now / p_old of the answer: an older policy's, reweighted
#
# The price of not differentiating: one number per answer for all its tokens. Imitation says for each token which would
# have been right; a reward only says that the whole was good. That is why it needs so many answers.
#
# All that follows is about b (a batch's mean, a group's, a critic; a mean that includes y only shrinks the step by
# 1 - 1/G) and about the last line: several steps on one rollout are cheaper than a rollout for each. PPO takes each
# token's ratio instead of the answer's, and trusts it only near 1 (the clip).
def token_logps(logits, tokens):
    """logits (B, T, V), tokens (B, T) -> ln p of each token (B, T)."""
    # Trap: sampling at temperature 0.7, or with top-p, and training on the log-probs at 1: the ratio then compares two
    # distributions of which neither wrote the answers. Here both are at 1, without cuts.
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)  # (B, T)


def answer_mask(targets, starts, eos):
    """targets (B, T) = the rollout's ids from column 1, starts (B): where answers begin -> (B, T), 1.0 for the
    answer's own tokens, its eos among them, 0.0 for prompt and filling."""
    columns = torch.arange(1, 1 + targets.size(1), device=targets.device)      # (T)
    answer = columns >= starts[:, None]                                        # (B, T)
    # The eos is a token of the answer: it is rewarded, and so learned. Trap: pad id = eos id and a mask by value; the
    # model is then never told to stop, and answers grow until they are cut off.
    ends = answer & (targets == eos)                                           # (B, T)
    return (answer & (ends.cumsum(1) - ends.long() == 0)).float()              # (B, T)


# Trap: x.mean() over a padded batch. Short answers then count less, and the loss changes with the width of the batch.
def masked_mean(x, mask):
    """Mean of x over the places where mask is 1."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


# Q: Why divide by the group's standard deviation?
# A: So that a step has one size, whatever the scale of the rewards. The price: a prompt that 1 of 8 answers gets right
#    has std 0.35, one that half of them get right 0.53: hard and easy prompts gain weight against those in between
#    (mean |A| is 0.66 of theirs instead of 0.44). Dr. GRPO leaves the division out for that reason.
def group_advantages(rewards, group, scale=True):
    """rewards (B), each `group` neighbors answer one prompt -> advantages (B): (r - mean) / (std + 1e-4) per group."""
    # Against the other answers to the SAME prompt: easy prompts earn more, and that says nothing about an answer. A
    # group of equal rewards has advantage 0, whatever they are: nothing to learn.
    r = rewards.view(-1, group)                                                # (R, G)
    advantages = r - r.mean(1, keepdim=True)                                   # (R, G)
    if scale:  # the sample's std, divided by G - 1, as in published code
        advantages = advantages / (r.std(1, keepdim=True) + 1e-4)              # (R, G)
    return advantages.flatten()                                                # (B)


# Q: What does the critic buy?
# A: A guess of what the answer will earn, made at every token: the advantage then says where in an answer things went
#    better or worse than expected. With one 0/1 reward at the end of ten tokens there is little to explain, and a
#    group's mean does about as well for half the machinery; a published critic is as large as the policy.
def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16). All (B, T) -> (A, returns).

    delta_t = r_t + gamma * V_{t+1} - V_t;   A_t = delta_t + gamma * lam * A_{t+1};   returns = A + V.
    lam 0 trusts the critic one token ahead, lam 1 the rewards to the end.
    """
    # V behind the last token is 0: the answer is over. Trap: the critic's opinion about the filling behind the answer
    # leaks into its last real token.
    values = values * mask                                                     # (B, T)
    ahead = F.pad(values[:, 1:], (0, 1))                                       # (B, T)
    deltas, later = (rewards + gamma * ahead - values) * mask, torch.zeros_like(values[:, 0])
    advantages = torch.empty_like(values)                                      # (B, T)
    for t in reversed(range(values.size(1))):  # a recursion: each needs the one behind it
        advantages[:, t] = later = deltas[:, t] + gamma * lam * later          # (B)
    return advantages * mask, (advantages + values) * mask                     # (B, T) each


def whiten(x, mask):
    """x with mean 0 and variance 1 over the places where mask is 1; 0 elsewhere."""
    x = x - masked_mean(x, mask)                                               # (B, T)
    return x * (masked_mean(x.square(), mask) + 1e-8).rsqrt() * mask           # (B, T)


def token_rewards(scores, logps, ref_logps, mask, kl_coef):
    """PPO's rewards (B, T): -kl_coef * (ln p - ln p_ref) at every token, and the answer's score (B) at its last one."""
    # Q: Why a KL to the reference?
    # A: The reward sees little (here: exact match), and the reference knows the rest, the language. Without a price,
    #    whatever the reward forgets may be destroyed, and a learned reward is soon fooled. With a program as the judge
    #    many do without (DAPO, Dr. GRPO), as GRPO does here.
    rewards = -kl_coef * (logps - ref_logps) * mask                            # (B, T)
    # Trap: the score in the last column, where most rows have filling.
    last = mask.size(1) - 1 - mask.flip(1).argmax(1, keepdim=True)             # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None])                       # (B, T)


# The variants: four small switches on one formula.
#     grpo      mean over the tokens of each answer, then over answers
#     dr_grpo   sum over all tokens / (B * a constant, here the length of a row); advantages without the std
#     dapo      mean over all tokens of the batch; the clip is wider upwards: rare tokens have room to grow
#     gspo      grpo with one ratio per answer, exp(mean of its tokens' log-ratios), and a much narrower clip of its own
# With one step per rollout (--epochs 1) all ratios are 1: gspo is grpo then, and no clip acts.
# Left out: GRPO's paper adds beta * k3 to the loss, k3 = exp(d) - d - 1 with d = ln p_ref - ln p, an estimate of the KL
# that is never negative; most recipes of today set beta to 0. DAPO also samples until each group has right and wrong
# answers: in a group of equal rewards all advantages are 0, and early and late in a run most groups are like that.
#
# Q: Which mean over tokens?
# A: grpo's blames each token of a long wrong answer less than one of a short wrong answer, so wrong answers grow
#    longer. With dapo's every token counts the same, and dr_grpo's has no length in it at all. gspo says: the reward
#    is per answer, so the ratio should be, too; single tokens' ratios are noise that a long answer piles up.
def policy_loss(logps, old_logps, advantages, mask, variant, clip):
    """-min(ratio * A, clip(ratio) * A) (PPO, eq. 7), averaged. logps, old_logps, mask (B, T); advantages (B, 1) or
    (B, T); variant: ppo (as dapo, without the wider clip), grpo, dr_grpo, dapo, gspo. -> (loss, share of clipped)."""
    # Q: On the first step on a rollout logps == old_logps, so the ratio is exactly 1. Is the code dead?
    # A: No: d(ratio) = ratio * d(logps), so the gradient is A * grad ln p, REINFORCE. The loss itself is about 0, since
    #    advantages sum to about 0: watch the reward. The clip bites from the second step on one rollout on.
    log_ratio = logps - old_logps                                              # (B, T)
    low, high = (1 - clip, 1 + clip + 0.08) if variant == "dapo" else (1 - clip, 1 + clip)
    if variant == "gspo":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)  # (B, 1)
        low, high = 1 - 3e-4, 1 + 4e-4  # the paper's, section 5.1
    ratio = log_ratio.exp()
    # min and not just the clipped term: where a step went the wrong way (a bad token became likelier) the free term is
    # the smaller one, and still pulls back.
    free, held = ratio * advantages, ratio.clamp(low, high) * advantages
    losses, clipped = -torch.min(free, held) * mask, (held < free) * mask      # (B, T), (B, T)
    if variant in ("grpo", "gspo"):
        loss = (losses.sum(1) / mask.sum(1)).mean()
    elif variant == "dr_grpo":
        loss = losses.sum() / mask.numel()
    else:
        loss = losses.sum() / mask.sum()
    return loss, clipped.sum() / mask.sum()


def value_loss(values, old_values, returns, mask, clip):
    """0.5 * max((v - R)^2, (v clipped around old - R)^2), mean over the answers' tokens (OpenAI's PPO code)."""
    held = old_values + (values - old_values).clamp(-clip, clip)               # (B, T)
    return 0.5 * masked_mean(torch.max((values - returns).square(), (held - returns).square()), mask)


# The model: a small Llama; llama3.py explains its parts.

# Q: Half-split or interleaved: which two numbers make a plane?
# A: The paper and Meta's files pair (0, 1), (2, 3), ...; Hugging Face's files, and ours, (0, D/2), (1, D/2 + 1), ...
#    It is a convention of the weights: the rows of W_q and W_k are permuted alike. Reading weights with the wrong one
#    is the commonest RoPE bug; position 0, which is not turned at all, still looks right.
def apply_rope(x, cos, sin):
    """x (B, H, T, D), plane i = (a, b) = (x[i], x[i + D/2]) -> (a cos - b sin, b cos + a sin), (B, H, T, D)."""
    a, b = x.chunk(2, -1)                                                      # (B, H, T, D/2)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)      # (B, H, T, D)


# q, k and v come from one product, gate and up from another: fewer, larger products are faster.
class SmallBlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, cfg):
        super().__init__()
        C, self.n_head = cfg.n_embd, cfg.n_head
        self.norm1, self.norm2 = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
        self.qkv, self.o = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.gate_up, self.down = nn.Linear(C, 2 * cfg.ffn_size, bias=False), nn.Linear(cfg.ffn_size, C, bias=False)

    def forward(self, x, cos, sin, cache=None):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)                # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(self, k, v)                                    # (B, H, S, D) each
        # Causal while a prompt is read; a single new token may see everything.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)   # (B, H, T, D)
        x = x + self.o(y.transpose(1, 2).flatten(2))                           # (B, T, C)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)                    # (B, T, F) each
        return x + self.down(F.silu(gate) * up)                                # (B, T, C)


class SmallLlama(nn.Module):
    """ids (B, T) -> logits (B, T, V). cache holds the tokens before them, if any."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.embed = cfg, nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(SmallBlock(cfg) for _ in range(cfg.n_layer))
        self.norm, self.head = nn.RMSNorm(cfg.n_embd, eps=1e-5), nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # std 1/sqrt(width); the last matrix of each branch is smaller, so that the sum of all branches keeps its size.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, (cfg.n_embd * (2 * cfg.n_layer if re.search(r"\.o\.|down", name) else 1)) ** -0.5)

    def hidden(self, ids, cache=None):
        """-> the residual stream before the head, (B, T, C)."""
        past, D = cache.length if cache is not None else 0, self.cfg.n_embd // self.cfg.n_head
        w = 10_000.0 ** (torch.arange(0, D, 2, device=ids.device) / -D)        # D/2 speeds, one per plane
        angle = torch.arange(past, past + ids.size(1), device=ids.device)[:, None] * torch.cat((w, w))  # (T, D)
        x, cos, sin = self.embed(ids), angle.cos(), angle.sin()                # x (B, T, C), the others (T, D)
        for block in self.blocks:
            x = block(x, cos, sin, cache)                                      # (B, T, C)
        if cache is not None:
            cache.length += ids.size(1)
        return self.norm(x)                                                    # (B, T, C)

    def forward(self, ids, cache=None):
        return self.head(self.hidden(ids, cache))                              # (B, T, V)


# --- 3. Objective: imitation, which comes first ----------------------------------------------------------------------
IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def compute_loss(model, inputs, targets):
    """Imitation. inputs, targets (R, T) -> sum of -ln p(target) over the targets that count, in nats."""
    logits = model(inputs)                                                     # (R, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


# --- 4. Data: hasty annotators, prompts, rewards ---------------------------------------------------------------------
# The toy language: numbers and their English names (see toy_dataset.py).

UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# differs from toy_dataset.py: no tokens of BERT
TOY_VOCAB = ["<pad>", "\n", "=", *"0123456789", *UNITS, *TENS, "hundred", "thousand"]
EOS = 1  # "\n" ends an answer


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
#    none is trained on here and tested there.
def is_validation(n):
    """One number in ten is held out, by hash: the same in every script and run, and none is ever in both splits."""
    return int(hashlib.sha256(str(n).encode()).hexdigest(), 16) % 10 == 0


def draw_numbers(count, seed, validation):
    """-> list of numbers from one split, with repeats. Each length of 1 to 6 digits is proposed equally often.

    The hash holds out no one-digit number and 5 of the 90 two-digit ones: validation hardly tests short numbers."""
    # Trap: drawing n uniformly from 0..999,999 makes nine in ten six digits long; short numbers are then never learned.
    rng, numbers = random.Random(seed), []
    while len(numbers) < count:
        digits = rng.randint(1, 6)
        n = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10 ** digits)
        if is_validation(n) == validation:
            numbers.append(n)
    return numbers


def encode_toy(text):
    """Text of the toy language -> ids, one for each digit, word, "=" and newline. Raises ValueError for other words."""
    return [TOY_VOCAB.index(piece) for piece in re.findall(r"\d|\n|=|[^\s\d=]+", text)]


def decode_toy(ids):
    """The ids of an answer -> its text, without EOS; None without an EOS: what was cut off is no answer."""
    return " ".join(TOY_VOCAB[i] for i in ids[:ids.index(EOS)]) if EOS in ids else None


def answer_rows(pairs):
    """(prompt ids, answer ids) pairs -> (inputs, targets), (R, T) each: only answers are targets. Padded on the right.

        prompt 4 0 =, answer forty \\n       inputs  4 0 =     forty       targets  _ _ forty \\n
    """
    # Q: Why mask the prompt?
    # A: It is always given, so learning to write it is wasted; and prompts of one template are easy: they would make up
    #    most of the loss, and its fall would say nothing about answers.
    # Trap: encoding prompt + answer as one text and cutting at the prompt's length. BPE may merge across the seam.
    # Pads on the right need no mask: a causal model never looks there.
    inputs = [torch.tensor((prompt + answer)[:-1]) for prompt, answer in pairs]
    targets = [torch.tensor([IGNORE] * (len(prompt) - 1) + answer) for prompt, answer in pairs]
    return tuple(nn.utils.rnn.pad_sequence(side, True, pad) for side, pad in ((inputs, 0), (targets, IGNORE)))


def get_batch(data, rows, seed, step):
    """-> (inputs, targets) of one step, (rows, T) each: a pure function of (seed, step), so a resume needs no state."""
    # Trap: seeding with seed + step. Seed 1 at step 5 is then seed 2 at step 4.
    index = torch.randint(len(data[0]), (rows,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    return tuple(part[index] for part in data)  # one gather per tensor, no Python loop over rows


# The annotators of this file are in a hurry: 19 names in 20 lack their last word ("40215" -> "forty thousand two
# hundred"). A reward is not: an answer is right or it is not.
#
# Q: Why can imitation not do it?
# A: Cross-entropy's optimum is the distribution of the labels: the whole name one time in twenty. More steps bring the
#    model closer to that, and greedy decoding, which takes the majority, is hardly ever right. The reward says which of
#    the two is wanted. The smallest change is to give the whole name probability 1 instead of 0.05: KL = ln 20 = 3.0
#    nats per answer.
def hasty_rows(numbers, cfg):
    """Numbers -> rows to imitate: a name is whole with probability right_share, else it lacks its last word."""
    rng, pairs = random.Random(cfg.seed), []
    for n in numbers:
        name = number_to_words(n)
        label = name if rng.random() < cfg.right_share else name.rsplit(" ", 1)[0]
        pairs.append((encode_toy(f"{n}="), encode_toy(f"{label}\n")))
    return answer_rows(pairs)


def draw_prompts(count, seed, validation):
    """-> numbers of 3 to 6 digits: their names have two words or more, so there is one to leave out."""
    return [n for n in draw_numbers(2 * count + 20, seed, validation) if n > 99][:count]


def exact_reward(prompt, answer):
    """1.0 if the answer is the whole name of the number in the prompt ("40215="), else 0.0."""
    return float(answer == number_to_words(int(prompt.rstrip("="))))


def find_reward(spec):
    """"exact" or "FILE.py:function" -> a function (prompt, answer) -> number. Raises ValueError for a bad file."""
    if spec == "exact":
        return exact_reward
    if not re.fullmatch(r".+\.py:\w+", spec):
        raise ValueError(f"--reward is exact or FILE.py:function, not {spec!r}")
    path, _, name = spec.rpartition(":")
    try:
        # As `python mine.py` would have it: it finds its neighbors, and dataclasses find their module by name.
        sys.path.insert(0, str(Path(path).resolve().parent))
        module_spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
        module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return getattr(module, name)
    except (Exception, SystemExit) as problem:  # somebody else's code: anything may happen in it
        raise ValueError(f"--reward {spec}: {type(problem).__name__}: {problem}") from problem


def score_answers(reward, prompts, answers, ended):
    """Texts of prompts and answers, ended (B) bools -> rewards (B). Raises ValueError for a reward that fails or is
    not finite: one NaN among the advantages makes a policy of NaNs."""
    scores = []
    for prompt, answer in zip(prompts, answers, strict=True):
        try:
            scores.append(float(reward(prompt, answer)))
        except (Exception, SystemExit) as problem:
            raise ValueError(f"the reward failed on {prompt!r}, {answer!r}: {type(problem).__name__}: {problem}"
                             ) from problem
        if not math.isfinite(scores[-1]):
            raise ValueError(f"the reward of {prompt!r}, {answer!r} is {scores[-1]}")
    # An answer that was cut off earns nothing, or the least there is. Trap: 0 when all other rewards are negative (the
    # number of errors, with a minus): the best answer is then one that never ends, and soon none ends.
    least = min(0.0, *scores)
    return torch.tensor([score if end else least for score, end in zip(scores, ended, strict=True)])  # (B)


# --- 5. Training: a plain loop, then rollouts and updates ------------------------------------------------------------
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


def collect(policy, numbers, reward, cfg, seed, temperature=1.0):
    """Sample one answer to "n=" for each number and have it judged.

    -> inputs, targets, mask (B, T), rewards (B), share of answers that ended, the answers as texts.
    """
    prompts = [f"{n}=" for n in numbers]
    ids, starts = rollout(policy, [encode_toy(prompt) for prompt in prompts], cfg.block_size, EOS, temperature,
                          torch.Generator(cfg.device).manual_seed(seed))
    # The reward reads text up to the EOS, without what fills the row.
    texts = [decode_toy(row[start:] + [EOS]) for row, start in zip(ids.tolist(), starts.tolist(), strict=True)]
    mask = answer_mask(ids[:, 1:], starts, EOS)                                # (B, T)
    ended = ((ids[:, 1:] == EOS) * mask).sum(1) > 0                            # (B)
    rewards = score_answers(reward, prompts, texts, ended.tolist()).to(cfg.device)     # (B)
    return ids[:, :-1], ids[:, 1:], mask, rewards, ended.float().mean().item(), texts


# Q: When is rejection sampling enough?
# A: When right answers turn up and a judge can tell: keep the right ones and imitate them (rounds = 1). Repeated with
#    the better policy (expert iteration, Anthony et al. 2017, arXiv 1705.08439; STaR) it comes far with few answers,
#    since each kept one is trained on many times, where REINFORCE uses an answer once. It learns nothing from wrong
#    answers, and where right ones are rare, as here, one round finds too few.
def reject(imitator, cfg, reward, rounds, look):
    """Rounds of: sample, keep the best, train the imitator on what was kept so far. -> (policy, [{answers, ...}])."""
    policy, kept, looks, spent = imitator, [], [], 0.0
    for i in range(rounds):
        began, seed = time.perf_counter(), cfg.seed * 1_000_003 + i
        inputs, targets, mask, rewards, *_ = collect(
            policy, draw_prompts(cfg.rejection_answers // rounds, seed, False), reward, cfg, seed)
        # The right ones, as the reward is 0 or 1. Trap: the same with a graded reward keeps answers to easy prompts;
        # then take several answers to each prompt, and keep the best of those.
        best = rewards == rewards.max()                                        # (B)
        if i == 0 and best.all():
            raise ValueError(f"the {len(best)} answers all earn {rewards[0].item():g}: there is nothing to keep")
        kept.append((inputs[best].cpu(), targets.masked_fill(mask == 0, IGNORE)[best].cpu()))
        policy = copy.deepcopy(imitator)
        fit(policy, cfg, [torch.cat(parts) for parts in zip(*kept, strict=True)], compute_loss, 150, cfg.lr)
        spent += time.perf_counter() - began
        looks.append(dict(answers=len(best) * (i + 1), seconds=spent, **look(policy)))
    return policy, looks


def reinforce(policy, cfg, method, reward, look):
    """Rollouts and updates of the policy, in place. method: reinforce, ppo or grpo. -> looks [{answers, ...}]."""
    cfg = dataclasses.replace(cfg, batch_size=cfg.answers if method == "grpo" else cfg.answers // 2)
    group = cfg.group if method == "grpo" else 1
    epochs = {"reinforce": 1, "ppo": cfg.ppo_epochs, "grpo": cfg.epochs}[method]
    reference, critic, looks = copy.deepcopy(policy), nn.Linear(cfg.n_embd, 1).to(cfg.device), []
    nn.init.zeros_(critic.weight)
    nn.init.zeros_(critic.bias)
    # Without weight decay: nothing should move but by the reward.
    optimizer, spent = torch.optim.AdamW([dict(params=one.parameters()) for one in (policy, critic)],
                                         betas=(0.9, cfg.beta2), weight_decay=0.0, fused=True), 0.0
    for step in tqdm(range(cfg.max_steps), method, mininterval=0.5):
        began = time.perf_counter()
        for param_group, peak in zip(optimizer.param_groups, (cfg.lr, cfg.value_lr), strict=True):
            param_group["lr"] = peak * lr_at(step, cfg) / cfg.lr
        seed = cfg.seed * 1_000_003 + step
        numbers = [n for n in draw_prompts(cfg.batch_size // group, seed, False) for _ in range(group)]
        inputs, targets, mask, rewards, *_ = collect(policy, numbers, reward, cfg, seed)
        if step == 0 and rewards.min() == rewards.max():
            raise ValueError(f"the first {len(rewards)} answers all earn {rewards[0].item():g}: nothing to learn from")
        with torch.no_grad():
            # Log-probs under the policy that wrote the answers, scored once, by the code that scores them in the loss.
            # Trap: keeping those of the rollout; a cached step rounds differently, and the ratio does not start at 1.
            x = policy.hidden(inputs)                                          # (B, T, C)
            old_logps, old_values = token_logps(policy.head(x), targets), critic(x)[..., 0]  # (B, T) each
        if method == "ppo":
            with torch.no_grad():
                ref_logps = token_logps(reference(inputs), targets)            # (B, T)
            scores = token_rewards(rewards, old_logps, ref_logps, mask, cfg.kl_coef)  # (B, T)
            advantages, returns = gae(scores, old_values, mask, cfg.gamma, cfg.lam)  # (B, T) each
            advantages = whiten(advantages, mask)                              # (B, T)
        elif method == "grpo":
            advantages = group_advantages(rewards, group, cfg.variant != "dr_grpo")[:, None]  # (B, 1)
        else:
            advantages = (rewards - rewards.mean())[:, None]                   # (B, 1)
        for _ in range(epochs):
            x = policy.hidden(inputs)                                          # (B, T, C)
            logps = token_logps(policy.head(x), targets)                       # (B, T)
            loss, clipped = policy_loss(logps, old_logps, advantages, mask,
                                        cfg.variant if method == "grpo" else "ppo", cfg.clip)
            if method == "ppo":
                # Detached: the critic reads the policy's stream and does not bend it. Its errors are large at first.
                loss = loss + value_loss(critic(x.detach())[..., 0], old_values, returns, mask, cfg.clip)
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        spent += time.perf_counter() - began
        if (step + 1) % 10 == 0 or step + 1 == cfg.max_steps:
            looks.append(dict(answers=cfg.batch_size * (step + 1), seconds=spent, clipped=clipped.item(),
                              **look(policy)))
    return looks


# --- 6. Decoding: answers to many prompts at once --------------------------------------------------------------------
# Nothing looks ahead, so keys and values of past tokens never change and can be kept:
#     prefill      q k v of all T prompt tokens in one pass          k v --> columns 0 .. T-1 of the cache
#     one token    q k v of 1 token; q meets all keys so far         k v --> one column more
class KVCache:
    """Keys and values of the tokens so far: {attention module: (2, B, key heads, size, D)}, `length` of them set."""

    # Q: What does the KV cache save, and what does it cost?
    # A: Without it, token n+1 recomputes all n tokens before it: n^2 / 2 token passes for n tokens. It costs
    #    2*D numbers per layer and key head: in GPT-2 124M 2 * 12 * 768, 36 KiB a token in bfloat16, 36 MiB for 1,024.
    def __init__(self, size):
        self.layers, self.length, self.size = {}, 0, size

    def append(self, layer, k, v):
        """k, v (B, H, T, D) of the new tokens, H key heads -> both of all tokens, (2, B, H, S, D)."""
        if layer not in self.layers:  # room for all tokens: growing with torch.cat would copy the past every time
            self.layers[layer] = k.new_empty(2, *k.shape[:2], self.size, k.size(3))
        kv, end = self.layers[layer], self.length + k.size(2)
        kv[0, :, :, self.length:end], kv[1, :, :, self.length:end] = k, v
        return kv[:, :, :, :end]                                               # (2, B, H, S, D)


# Prompts of different lengths share a batch without padding: all rows begin in column 0, and where a longer prompt goes
# on while others are answered already, the prompt's own token is taken instead of the sampled one. (So does Meta's
# generate for Llama.) Positions are right, and nobody needs a mask.
@torch.no_grad()
def rollout(model, prompts, columns, eos, temperature=1.0, generator=None):
    """Sample an answer to each prompt (a list of ids). -> (ids (B, T), T = columns; starts (B): where answers begin).

    eos ends an answer and fills the rest of its row; an answer without one was cut off. temperature 0 = the likeliest
    token. Leaves the model in eval mode.
    """
    device = next(model.parameters()).device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B)
    ids = torch.tensor([(prompt + [eos] * columns)[:columns] for prompt in prompts], device=device)  # (B, T)
    rows, cache, first = torch.arange(len(ids), device=device), KVCache(columns), min(map(len, prompts))
    model.eval()
    for t in range(first, columns):
        logits = model(ids[rows, :t] if t == first else ids[rows, t - 1:t], cache)[:, -1]  # (R, V)
        # The whole distribution, without top-k or top-p: what is trained must be what was sampled from.
        if temperature == 0:
            token = logits.argmax(-1)                                          # (R)
        else:  # where a random number falls in the running sum of the probabilities: one per row, not one per token
            sums = (logits / temperature).softmax(-1).cumsum(-1)               # (R, V)
            token = (torch.rand(len(rows), 1, device=device, generator=generator) * sums[:, -1:] >= sums).sum(-1)  # (R)
        over = (t > starts[rows]) & (ids[rows, t - 1] == eos)                  # (R)
        ids[rows, t] = torch.where(t < starts[rows], ids[rows, t], token.where(~over, eos))
        going = (t < starts[rows]) | (ids[rows, t] != eos)                     # (R)
        if not going.any():
            break
        # Rows that have ended leave the batch and the cache, but not one by one: the cache is copied every time.
        if going.sum() < 0.9 * len(rows):
            rows, cache.layers = rows[going], {layer: kv[:, going] for layer, kv in cache.layers.items()}
    return ids, starts


# --- 8. Main: imitate, then learn from the reward in each way ---------------------------------------------------------
METHODS, VARIANTS = ("rejection", "iterated", "reinforce", "ppo", "grpo"), ("grpo", "dr_grpo", "dapo", "gspo")


@torch.no_grad()
def look_at(policy, imitator, numbers, reward, cfg):
    """-> mean reward of one answer per number, sampled and greedy (exact: the share of right answers); of the sampled
    answers the share that ended, and KL(policy || imitator) in nats per answer."""
    _, _, _, rewards, *_ = collect(policy, numbers, reward, cfg, 0, 0.0)
    greedy = rewards.mean().item()
    inputs, targets, mask, rewards, ended, _ = collect(policy, numbers, reward, cfg, 0)
    distance = token_logps(policy(inputs), targets) - token_logps(imitator(inputs), targets)  # (B, T)
    return dict(sampled=rewards.mean().item(), greedy=greedy, ended=ended, kl=(distance * mask).sum(1).mean().item())


def plot_runs(path, runs):
    """runs {method: looks}: the reward of held-out prompts against answers and against seconds."""
    from matplotlib.figure import Figure  # without pyplot: no window, so it works on a server
    figure = Figure(figsize=(11, 4.5), layout="tight")
    for ax, key, xlabel in zip(figure.subplots(1, 2), ("answers", "seconds"), (
            "answers that were judged", "seconds of sampling and training"), strict=True):
        for (method, looks), style in zip(runs.items(), ("D", "s--", "^-.", "v:", "o-"), strict=False):
            ax.plot([look[key] for look in looks], [look["sampled"] for look in looks], style, label=method,
                    markersize=4)
        ax.set(xlabel=xlabel, ylabel="mean reward, sampled, held-out prompts", title=f"what a reward costs in {key}")
        ax.legend()
        if key == "answers":
            ax.set_xscale("log")
    figure.savefig(path)


def main(cfg):
    """Imitate, then learn from the reward with each method, all from the same imitator. -> {method: policy}."""
    methods = cfg.methods.split(",")
    if not set(methods) <= set(METHODS) or cfg.variant not in VARIANTS:
        raise ValueError(f"methods are of {', '.join(METHODS)}; variant is one of {', '.join(VARIANTS)}")
    if min(cfg.n_head, cfg.n_embd, cfg.group - 1, cfg.max_steps, cfg.sft_steps, cfg.epochs, cfg.ppo_epochs, cfg.answers,
           cfg.batch_size, cfg.rejection_answers // 4, cfg.block_size - 8) < 1 or not 0 < cfg.lr < 1 or (
            cfg.n_embd % (2 * cfg.n_head) or cfg.answers % (2 * cfg.group)):
        raise ValueError("2 * n_head must divide n_embd, 2 * group answers; sizes, steps and answers start at 1, group "
                         "at 2, rejection_answers at 4, block_size at 9; lr is above 0")
    began, reward = time.perf_counter(), find_reward(cfg.reward)
    score_answers(reward, ["40215="], ["forty thousand two hundred fifteen"], [True])  # a broken one fails now
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    imitator = SmallLlama(cfg).to(cfg.device)
    examples = hasty_rows(draw_prompts(60_000, cfg.seed, False), cfg)
    print(f"{sum(p.numel() for p in imitator.parameters()):,} parameters imitate {len(examples[0]):,} answers, "
          f"{cfg.right_share:.0%} of them right")
    fit(imitator, cfg, examples, compute_loss, cfg.sft_steps, cfg.sft_lr)

    # Two parts of the held-out numbers: one is looked at on the way, the other once, at the end. If you tune on the
    # first, report the second. (fromkeys: each once, and in the order in which they were drawn.)
    held_out = list(dict.fromkeys(draw_prompts(2000, cfg.seed, True)))
    numbers, final = held_out[:300], held_out[300:800]
    policies, runs, table = {"sft": imitator}, {}, {"sft": dict(answers=0, seconds=0.0)}

    def look(policy):
        return look_at(policy, imitator, numbers, reward, cfg)
    for method in methods:
        if method in ("rejection", "iterated"):
            policies[method], runs[method] = reject(imitator, cfg, reward, 1 if method == "rejection" else 4, look)
        else:
            policies[method] = copy.deepcopy(imitator)
            runs[method] = reinforce(policies[method], cfg, method, reward, look)
        table[method] = runs[method][-1]
    for method, policy in policies.items():
        table[method] |= look_at(policy, imitator, final, reward, cfg)

    # How to read the table. answers: how often the reward was asked, the price where a judge is slow or human. sampled
    # below greedy: the policy is not sure yet. ended below 1: answers are being cut off, look at the reward. kl: to be
    # always right costs at least -ln(what sft has sampled), about 3; what is above that changed more than it had to.
    columns = ("answers", "sampled", "greedy", "ended", "kl", "seconds")
    print(f"\n{'mean reward of':<14}" + "".join(f"{column:>10}" for column in columns))
    for method, row in table.items():
        print(f"{method:<14}{row['answers']:>10,}" + "".join(f"{row[column]:>10.3f}" for column in columns[1:-1])
              + f"{row['seconds']:>10.0f}")
    for method, policy in policies.items():
        *_, texts = collect(policy, [40215, 777, 1000], reward, cfg, cfg.seed, 0.0)
        print(f"{method:<14}40215={texts[0]}   777={texts[1]}")
    plot_runs(out / "curve.png", runs)
    results = {dict(sampled="accuracy", greedy="accuracy_greedy").get(column, column): {
        method: row[column] for method, row in table.items()} for column in columns}
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=results, history=runs, seconds=time.perf_counter() - began)))
    print(f"\nsee {out}")
    return policies


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
