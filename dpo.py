# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "tiktoken>=0.7", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
DPO IN ONE FILE                                  python dpo.py                      3 min on two CPU cores

Paper    Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model,
         arXiv 2305.18290
Idea     It is hard to write the best answer and easy to say which of two is better. Make the chosen answer likelier and
         the rejected one less likely, both measured from where the model stood before; pairs that are well apart are
         left alone. No reward model, no sampling while training: a loss on pairs
Picture  prompt + chosen ---+
         prompt + rejected -+-> model -> sum of ln p of the answer's tokens, minus the sum before training (stored)
         -> margin = the chosen answer's - the rejected one's -> loss = -ln sigmoid(beta * margin)
Symbols  B batch (pairs)   P pairs   R rows   T time   S past + new   C n_embd   H heads   D head size   F ffn_size
         V vocabulary
New here sequence_logps, the losses of DPO, cDPO, IPO and SimPO, pairs from the model's own answers, a stored reference,
         a control that only imitates
Not here reward models, sampling while training (ppo_grpo.py), KTO, ORPO, chat templates, adapters (lora_qlora.py)
Expect   answers without a slip and with the right number, mean of 5 seeds: 20 % before, 91 % (89 % to 94 %) after 800
         steps on pairs, all weights; imitating the chosen answers instead gives 42 %. Right numbers 99 % -> 97 %, ln p
         of the chosen -2.8 -> -4.6. One seed each: without NLL 77 % and 79 % right, IPO 83 % and 85 %, SimPO 95 % and
         97 %
Asked    Why does the chosen answer become less likely too?   What is beta?   Why a sum of log-probs and not a mean?
         Why store the reference?   Is it more than imitating the better answers?   When cDPO, IPO, SimPO?

    python dpo.py                                     imitate, make pairs, learn from them; and the control
    python dpo.py --loss ipo                          another loss on the same pairs: dpo, cdpo, ipo, simpo
    python dpo.py --nll 0                             the loss alone: watch the right numbers go, too
    python dpo.py --preset pairs --data my.json       your own pairs: [{"instruction", "chosen", "rejected"}, ...]
"""
import argparse
import copy
import dataclasses
import hashlib
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
    data: str = "numbers"             # numbers | path of a .json with your own pairs
    out: str = "runs/dpo"             # folder for the summary and the picture
    seed: int = 1337                  # decides initial weights, batches and samples
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda
    # Preferences. beta and nll: see dpo_loss and preference_loss.
    loss: str = "dpo"                 # dpo | cdpo | ipo | simpo
    beta: float = 0.0                 # how hard the reference holds; 0 = the loss's own, see BETA
    nll: float = 0.2                  # weight of the chosen answer's own loss per token, added
    epsilon: float = 0.1              # cdpo: share of labels that are believed to be wrong
    gamma: float = 1.0                # simpo: the margin that is asked for
    pairs: int = 4096                 # pairs to make of the model's own answers (numbers)
    slip: float = 0.3                 # how often the annotators misspell a word (numbers)
    # Shape: 0.1 million parameters.
    block_size: int = 20              # longest prompt and answer, in tokens
    n_layer: int = 2                  # layers
    n_head: int = 4                   # heads, n_embd / n_head wide each
    n_embd: int = 64                  # width of the residual stream
    ffn_size: int = 192               # width inside the MLP
    vocab_size: int = 0               # 0 = as many as the data has tokens, and no other
    # Optimization: first imitation, then preferences, of all weights.
    sft_steps: int = 1200             # steps of imitation (supervised fine-tuning)
    sft_lr: float = 3e-3              # its peak learning rate
    max_steps: int = 800              # steps of preference training
    lr: float = 1e-4                  # its peak learning rate
    batch_size: int = 64              # pairs per step; imitation takes twice as many rows
    warmup_steps: int = 20            # steps of linear warm-up, of both
    beta2 = 0.99                      # no type, so no flag: Adam's memory


PRESETS = {"numbers": {},  # the defaults above
           # Texts of some hundred tokens with GPT-2's vocabulary: 6.5 million parameters, nearly all of them tables.
           "pairs": dict(data="my.json", block_size=256, sft_steps=200, max_steps=60, batch_size=4)}


# --- 2. Model: the policy (a model that writes answers): log-probs of its answers, losses on them, then the model ----
# Where DPO comes from. Let r(x, y) say how good answer y to prompt x is. Of all policies the one that earns most while
# it stays close to a reference, max E[r] - beta * KL(policy || reference), has a closed form:
#
#     policy(y|x) = reference(y|x) * exp(r(x,y) / beta) / Z(x)                                (Rafailov et al., eq. 4)
#
# Z(x), a sum over all answers, makes the probabilities add up to 1: nobody can compute it. Read from right to left it
# is the reward for which a policy is optimal: r = beta * ln(policy / reference) + beta * ln Z. If one answer is
# preferred to another with probability sigmoid(difference of rewards) (Bradley & Terry 1952), Z(x) cancels, and the
# likelihood of the labels becomes a loss on the policy itself (eq. 7):
#
#     loss = -ln sigmoid(h)        h = beta * [ln policy(chosen)/reference(chosen) - ln policy(rejected)/reference(...)]
#
# Its gradient is sigmoid(-h) * beta * (grad ln policy(rejected) - grad ln policy(chosen)): a pair in the wrong order
# pulls with nearly full strength, one that is well apart hardly at all.

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


# Q: Why a sum of log-probs and not a mean?
# A: The sum is ln p of the whole answer, which the derivation is about. A mean makes h smaller by the length, so that
#    beta means another thing for each answer. IPO and SimPO divide by the length on purpose.
def sequence_logps(logits, targets):
    """logits (R, T, V), targets (R, T) -> (ln p of each row's answer (R), its length (R)). IGNORE is not counted."""
    counted = targets != IGNORE                                                # (R, T)
    # ln softmax at one token = its logit - logsumexp. log_softmax would write V numbers a position to use one of them.
    picked = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]        # (R, T)
    # Trap: pads in the sum: their ln p depends on the answer before them. Prompts cancel in a sum, not in a mean.
    return ((picked - logits.logsumexp(-1)) * counted).sum(-1), counted.sum(-1)  # (R) each


# The losses: log-probs of answers in, one loss per pair out. c and r: ln p of the chosen and the rejected answer under
# the policy; ref_c and ref_r: under the reference; n_c and n_r: lengths. Each (B).
def dpo_loss(c, r, ref_c, ref_r, beta):
    """-ln sigmoid(h), h = beta * ((c - ref_c) - (r - ref_r)), each (B) -> (B). Rafailov et al. 2023, eq. 7."""
    # Q: What is beta?
    # A: In the derivation the price of leaving the reference; in the loss it says how far apart is far enough: the pull
    #    is sigmoid(-h), 0.5 at first, 0.25 at h = 1.1, 0.05 at 3. With beta 0.1, the usual value, 0.05 is reached when
    #    the odds of the pair have changed by e^30, with 0.5, as here, by e^6. Small beta: far away from the reference.
    # At the reference all margins are 0 and this loss (without the NLL term below) is ln 2 = 0.6931 for every model. If
    # it is not: dropout is on, the reference is another model, or rows are shifted.
    return -F.logsigmoid(beta * ((c - ref_c) - (r - ref_r)))                   # (B)


# Q: When cDPO, IPO, SimPO?
# A: cDPO when labels are wrong now and then and the same pairs are seen often: its minimum is at a finite h, so no pair
#    is pulled apart without end. IPO for the same reason, from another derivation: a fixed distance per token. SimPO
#    saves the reference; only the learning rate keeps it near the start.
def cdpo_loss(c, r, ref_c, ref_r, beta, epsilon):
    """A share epsilon of the labels is wrong: -(1 - epsilon) ln sigmoid(h) - epsilon ln sigmoid(-h), each (B) -> (B).

    Mitchell 2023, "A note on DPO with noisy preferences". The minimum is at h = ln((1 - epsilon) / epsilon).
    """
    h = beta * ((c - ref_c) - (r - ref_r))                                     # (B)
    return -(1 - epsilon) * F.logsigmoid(h) - epsilon * F.logsigmoid(-h)       # (B)


def ipo_loss(c, r, ref_c, ref_r, n_c, n_r, beta):
    """(margin per token - 1 / (2 beta))^2, each (B) -> (B). Azar et al. 2023, arXiv 2310.12036, eq. 17."""
    # The paper has sums; its authors run it with means over tokens, and so does TRL. Trap: DPO's beta. 0.1 asks for a
    # margin of 5 nats a token, 50 for ten tokens.
    return ((c - ref_c) / n_c - (r - ref_r) / n_r - 1 / (2 * beta)) ** 2       # (B)


def simpo_loss(c, r, n_c, n_r, beta, gamma):
    """-ln sigmoid(beta * (c / n_c - r / n_r) - gamma), each (B) -> (B). Meng et al. 2024, arXiv 2405.14734, eq. 6."""
    return -F.logsigmoid(beta * (c / n_c - r / n_r) - gamma)                   # (B)


def preference_loss(model, inputs, targets, ref_c, ref_r):
    """inputs, targets (B, 2, T): chosen, rejected; ref_c, ref_r (B): ln p before training -> sum over pairs."""
    cfg = model.cfg
    # Both answers in one forward pass: one call for 2B rows is faster than two for B. Pairs stay neighbors.
    inputs, targets = inputs.flatten(0, 1), targets.flatten(0, 1)              # (R, T) each
    # The head is the largest product of a small model: not for the columns in which all rows still read their prompts.
    first = int((targets != IGNORE).any(0).nonzero()[0])
    logits = model.head(model.hidden(inputs)[:, first:])
    logps, lengths = sequence_logps(logits, targets[:, first:])                # (R) each
    c, r = logps.view(-1, 2).unbind(1)                                         # (B) each
    n_c, n_r = lengths.view(-1, 2).unbind(1)                                   # (B) each
    beta = cfg.beta or BETA[cfg.loss]
    if cfg.loss == "dpo":
        losses = dpo_loss(c, r, ref_c, ref_r, beta)                            # (B)
    elif cfg.loss == "cdpo":
        losses = cdpo_loss(c, r, ref_c, ref_r, beta, cfg.epsilon)              # (B)
    elif cfg.loss == "ipo":
        losses = ipo_loss(c, r, ref_c, ref_r, n_c, n_r, beta)                  # (B)
    else:
        losses = simpo_loss(c, r, n_c, n_r, beta, cfg.gamma)                   # (B)
    # Q: Why does the chosen answer become less likely too?
    # A: The loss sees the difference only. Both answers share most of their tokens, so what pushes the rejected one
    #    down takes the chosen one along, and the probability goes to answers that no pair mentions, wrong numbers here
    #    ("likelihood displacement", Razin et al. 2024, arXiv 2410.08847). The share of ordered pairs stays near 1
    #    all the while. Look at ln p of the chosen, and at samples.
    # What helps, if not completely: some of the chosen answer's own loss per token, 0.2 as for Llama 3 (section 4.1.4).
    return (losses - cfg.nll * c / n_c).sum()  # fit divides by the number of pairs


BETA = {"dpo": 0.5, "cdpo": 0.5, "ipo": 0.3, "simpo": 2.0}


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


# --- 3. Objective: imitation, which comes first, and the control -----------------------------------------------------
def compute_loss(model, inputs, targets):
    """Imitation. inputs, targets (R, T) -> sum of -ln p(target) over the targets that count, in nats."""
    logits = model(inputs)                                                     # (R, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


# Q: Is it more than imitating the better answers?
# A: That is what the control asks: the same pairs, steps and rate, and the loss of the chosen answers alone. Half of
#    them have slips, too, only fewer; imitation's best is to slip as often as they do. A comparison says which way is
#    better, and one can go on beyond the best example.
def imitation_loss(model, inputs, targets, ref_c, ref_r):
    """The control: -ln p per token of the chosen answers alone, summed over pairs. Arguments as in preference_loss."""
    logps, lengths = sequence_logps(model(inputs[:, 0]), targets[:, 0])        # (B) each
    return -(logps / lengths).sum()


# --- 4. Data: sloppy annotators, the model's own answers, a judge ----------------------------------------------------
# The toy language: numbers and their English names (see toy_dataset.py).

UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# Every word has a misspelled twin, a token of its own: to the model "fourty" is just another word.
MISSPELLED = dict(zip(
    [*UNITS, *TENS, "hundred", "thousand"],
    ("zerro onne tow thre foor fife sicks sevn eigt nien tenn elevn twelv therteen fourten fiften sixten seventen "
     "eigteen nineten twenny thirdy fourty fivty sixy sevnty eigty ninty hunderd thosand").split(), strict=True))
CORRECTED = {wrong: right for right, wrong in MISSPELLED.items()}
# differs from toy_dataset.py: misspelled words, no tokens of BERT
TOY_VOCAB = ["<pad>", "\n", "=", *"0123456789", *MISSPELLED, *CORRECTED]
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


# The annotators write names of numbers and misspell each word with probability 0.3: a model that imitates them writes
# one held-out name in five without a slip. Nobody writes better examples; but a judge can say which of two answers is
# better.
def misspell(name, rng, slip):
    """A number's name -> the same with each word misspelled with probability slip."""
    return " ".join(MISSPELLED[word] if rng.random() < slip else word for word in name.split())


def judge(n, text):
    """An answer about n, or None if it never ended -> (right: is it the name of n, once corrected?, -misspelled words).

    The better of two answers is the greater: "tow hunderd" for 200 is (True, -2), "two hundred one" (False, 0).
    """
    words = (text or "").split()
    right = " ".join(CORRECTED.get(word, word) for word in words) == number_to_words(n)
    return right, -sum(word in CORRECTED for word in words)


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


def pair_rows(pairs):
    """(prompt, chosen, rejected) ids -> (inputs, targets), each (P, 2, T)."""
    rows = answer_rows([(prompt, answer) for prompt, *both in pairs for answer in both])
    return tuple(part.view(-1, 2, part.size(1)) for part in rows)


def sample_answers(model, numbers, cfg, seed):
    """-> one sampled answer per number, as text; None where it did not end within block_size."""
    # Temperature 1 and no cuts: the model's own distribution, which is what training changes.
    ids, starts = rollout(model, [encode_toy(f"{n}=") for n in numbers], cfg.block_size, EOS, 1.0,
                          torch.Generator(cfg.device).manual_seed(seed))
    return [decode_toy(row[start:]) for row, start in zip(ids.tolist(), starts.tolist(), strict=True)]


# Two samples of one model differ where it is undecided, so the preference tells it something. Pairs from elsewhere are
# often answers that it would never give.
def own_pairs(model, cfg, count, seed, validation):
    """Two answers to one number, judged -> `count` triples (prompt, chosen, rejected) of ids. The chosen one names the
    number, mostly with slips; the rejected one has more, or names another. Raises ValueError if too few are right."""
    pairs = []
    for attempt in range(20):
        seeds = seed * 1_000_003 + attempt
        numbers = draw_numbers(count, seeds, validation)
        answers = sample_answers(model, numbers * 2, cfg, seeds)
        for n, *both in zip(numbers, answers[:count], answers[count:], strict=True):
            rejected, chosen = sorted(both, key=lambda text: judge(n, text))
            if judge(n, chosen)[0] and judge(n, chosen) > judge(n, rejected) and rejected is not None:
                pairs.append([encode_toy(text) for text in (f"{n}=", f"{chosen}\n", f"{rejected}\n")])
        if len(pairs) >= count:
            return pairs[:count]
    raise ValueError("the model's answers are hardly ever right, or all alike: no pairs can be made of them")


def instruct_prompt(entry):
    """The Alpaca template (Taori et al. 2023): what the model reads before it answers an instruction."""
    # A chat model has a template of its own; a base model knows none, and learns any that is always the same.
    extra = f"### Input:\n{entry['input']}\n\n" if entry.get("input") else ""
    return ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{entry['instruction']}\n\n{extra}### Response:\n")


def read_pairs(cfg):
    """A JSON list of {"instruction", "input" (optional), "chosen", "rejected"} -> (triples of ids, number of tokens).
    Raises OSError, or ValueError for a file of another form."""
    import tiktoken
    entries, gpt2 = json.loads(Path(cfg.data).read_text(encoding="utf-8-sig")), tiktoken.get_encoding("gpt2")
    pairs, keys = [], ("instruction", "chosen", "rejected")
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            raise ValueError(f"{cfg.data}, entry {i}: not a text each for {', '.join(keys)}")
        # eos behind every answer, or the policy never learns to stop.
        pairs.append([gpt2.encode_ordinary(instruct_prompt(entry)),
                      *(gpt2.encode_ordinary(entry[key]) + [gpt2.eot_token] for key in keys[1:])])
    kept = [pair for pair in pairs if len(pair[0]) + max(map(len, pair[1:])) <= cfg.block_size and pair[1] != pair[2]]
    print(f"{cfg.data}: {len(pairs) - len(kept)} of {len(pairs)} pairs dropped, longer than --block-size "
          f"{cfg.block_size} or two equal answers")
    if len(kept) < 20:
        raise ValueError(f"{cfg.data}: {len(kept)} pairs are too few")
    return kept, gpt2.n_vocab


def make_data(cfg):
    """-> (examples to imitate, validation examples, pairs to train and held-out pairs, or None, number of tokens)."""
    if cfg.data != "numbers":
        pairs, V = read_pairs(cfg)
        parts = pairs[len(pairs) // 10:], pairs[:len(pairs) // 10]  # the first tenth is held out
        return *(answer_rows([(prompt, chosen) for prompt, chosen, _ in part]) for part in parts), parts, V
    rng, rows = random.Random(cfg.seed), []
    for count, validation in ((60_000, False), (2000, True)):
        names = [(n, misspell(number_to_words(n), rng, cfg.slip)) for n in draw_numbers(count, cfg.seed, validation)]
        rows.append(answer_rows([(encode_toy(f"{n}="), encode_toy(f"{name}\n")) for n, name in names]))
    return *rows, None, len(TOY_VOCAB)


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


# --- 8. Main: imitate, make pairs, learn from them -------------------------------------------------------------------
@torch.no_grad()
def pair_logps(model, inputs, targets, cfg):
    """inputs, targets (P, 2, T) -> ln p of both answers of each pair, (P, 2)."""
    # Q: Why store the reference?
    # A: It never changes, so its log-probs are computed once, before training: no second model in memory (here one is
    #    kept, to measure the KL) and no second forward pass in every step, at the price of two numbers a pair.
    model.eval()
    # Computed as the training computes: with other rounding the first margins would not be 0.
    with torch.autocast("cuda", torch.bfloat16, enabled=cfg.device.startswith("cuda")):
        logps = [sequence_logps(model(i.to(cfg.device)), t.to(cfg.device))[0] for i, t in zip(
            *(part.flatten(0, 1).split(2 * cfg.batch_size) for part in (inputs, targets)), strict=True)]
    return torch.cat(logps).view(-1, 2).cpu()                                  # (P, 2)


def with_reference(pairs, reference, cfg):
    """(prompt, chosen, rejected) ids -> what is trained on: inputs, targets (P, 2, T), ref_c, ref_r (P)."""
    rows = pair_rows(pairs)
    return *rows, *pair_logps(reference, *rows, cfg).unbind(1)


def answer_rates(model, reference, numbers, cfg, seed):
    """-> shares of sampled answers without a slip and with the right number, and KL(model || reference) in nats."""
    answers = sample_answers(model, numbers, cfg, seed)
    judged = [judge(n, text) for n, text in zip(numbers, answers, strict=True)]
    ended = [(encode_toy(f"{n}="), encode_toy(f"{text}\n")) for n, text in zip(numbers, answers, strict=True)
             if text is not None]
    kl = torch.tensor(math.nan)
    if ended:  # the mean of ln model/reference over the model's own answers
        inputs, targets = (part.to(cfg.device) for part in answer_rows(ended))
        with torch.no_grad():
            kl = sequence_logps(model(inputs), targets)[0] - sequence_logps(reference(inputs), targets)[0]  # (R)
    return dict(preferred=judged.count((True, 0)) / len(numbers),
                correct=sum(right for right, _ in judged) / len(numbers), kl=kl.mean().item())


ROWS = dict(preferred="no slip, right number", correct="right number", kl="KL to the reference, nats",
            ordered="held-out pairs in order", chosen="ln p of the chosen", rejected="ln p of the rejected")


def plot_looks(path, looks):
    """looks {stage: [{step, figures}]}: the figures against steps, shares on the left, ln p on the right."""
    from matplotlib.figure import Figure  # without pyplot: no window, so it works on a server
    figure = Figure(figsize=(11, 4.5), layout="tight")
    axes = figure.subplots(1, 2)
    for (stage, rows), style in zip(looks.items(), ("-", "--"), strict=False):
        for color, key in enumerate(ROWS):
            if key in rows[0] and key != "kl":
                axes[int(key in ("chosen", "rejected"))].plot([row["step"] for row in rows], [row[key] for row in rows],
                                                         style, color=f"C{color}", label=f"{stage}: {ROWS[key]}")
    for ax, title, ylabel in zip(axes, ("what the model writes", "likelihood displacement: held-out answers"),
                                 ("share", "ln p, nats per answer"), strict=True):
        ax.set(title=title, xlabel="step", ylabel=ylabel)
        ax.legend(fontsize=8)
    figure.savefig(path)


def main(cfg):
    """Imitate, make pairs, learn from them; the control likewise. -> the model that learned from pairs."""
    if min(cfg.n_head, cfg.batch_size, cfg.sft_steps, cfg.max_steps, cfg.pairs, cfg.block_size - 17) < 1 or (
            cfg.loss not in BETA or cfg.n_embd % (2 * cfg.n_head)):
        raise ValueError(f"2 * n_head must divide n_embd, steps and sizes start at 1, block_size at 18, loss is one of "
                         f"{', '.join(BETA)}")
    began, toy, (examples, sft_val, pairs, V) = time.perf_counter(), cfg.data == "numbers", make_data(cfg)
    if cfg.vocab_size not in (0, V):
        raise ValueError(f"vocab_size is {V} for these data")
    cfg = dataclasses.replace(cfg, vocab_size=V)
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    model = SmallLlama(cfg).to(cfg.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters imitate {len(examples[0]):,} answers")
    fit(model, dataclasses.replace(cfg, batch_size=2 * cfg.batch_size), examples, compute_loss, cfg.sft_steps,
        cfg.sft_lr)
    val_loss = evaluate(model, sft_val, cfg)

    # The imitator is the reference, and stays as it is: what learns from pairs are copies of it.
    reference = model.eval()
    if toy:
        pairs = own_pairs(reference, cfg, cfg.pairs, cfg.seed, False), own_pairs(reference, cfg, 500, cfg.seed, True)
        perfect = sum(CORRECTED.keys().isdisjoint(decode_toy(chosen).split()) for _, chosen, _ in pairs[0])
        print(f"{cfg.pairs:,} pairs of its own answers, {perfect / cfg.pairs:.0%} of the chosen ones without a slip")
    data, held_out = (with_reference(part, reference, cfg) for part in pairs)
    numbers = draw_numbers(500, cfg.seed + 1, True)

    def look(policy, step):
        logps = pair_logps(policy, *held_out[:2], cfg)                         # (P, 2)
        margins = (logps - torch.stack(held_out[2:], 1)) @ torch.tensor([1.0, -1.0])  # (P)
        figures = dict(step=step, ordered=(margins.sign() / 2 + 0.5).mean().item(),  # a tie is half in order
                       chosen=logps[:, 0].mean().item(), rejected=logps[:, 1].mean().item())
        return figures | (answer_rates(policy, reference, numbers, cfg, cfg.seed) if toy else {})

    # Both begin from the same imitator, with the same pairs in the same order.
    looks, losses, every = {}, {}, max(1, cfg.max_steps // 10)
    for stage, loss_fn in (("control", imitation_loss), (cfg.loss, preference_loss)):
        policy, looks[stage] = copy.deepcopy(reference), [look(reference, 0)]

        def after_step(step, policy=policy, rows=looks[stage]):
            if (step + 1) % every == 0 or step + 1 == cfg.max_steps:
                rows.append(look(policy, step + 1))
        losses[stage] = fit(policy, cfg, data, loss_fn, cfg.max_steps, cfg.lr, after_step)
    first, nll = losses[cfg.loss][0], losses["control"][0]  # of the same batch, at the same weights
    print(f"first loss {first:.4f} = {first - cfg.nll * nll:.4f} for the pairs + {cfg.nll} * {nll:.4f} (NLL)")

    # How to read the table: the control shows what imitation gives; what dpo has beyond it, the comparison gave. If the
    # right numbers fall, or ln p of the chosen much, the price was too high: more nll, a larger beta, fewer steps.
    table = dict(before=looks["control"][0], after=looks[cfg.loss][-1], control=looks["control"][-1])
    print(f"\n{'':<28}" + "".join(f"{column:>10}" for column in table))
    for key, words in ROWS.items():
        if key in table["before"]:
            print(f"{words:<28}" + "".join(f"{column[key]:>10.3f}" for column in table.values()))
    if toy:
        for name, one in (("before", reference), ("after", policy)):
            print(f"{name:<8}" + "   ".join(map(str, sample_answers(one, [40215, 77, 118], cfg, cfg.seed))))
    results = {name: {stage: column.get(key) for stage, column in table.items()} for name, key in (
        ("preferred_rate", "preferred"), ("correct_rate", "correct"), ("kl", "kl"), ("pair_accuracy", "ordered"),
        ("logps_chosen", "chosen"), ("logps_rejected", "rejected"))}
    plot_looks(out / "curve.png", looks)
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=results, history=looks, val_loss=val_loss,
        seconds=time.perf_counter() - began)))
    print(f"\nsee {out}")
    return policy


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
