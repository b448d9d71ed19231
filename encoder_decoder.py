# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface-hub>=0.30", "matplotlib>=3.8", "requests>=2.31", "safetensors>=0.4.3",
#                 "tokenizers>=0.20", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
T5 IN ONE FILE                                   python encoder_decoder.py          1 min on two CPU cores

Paper    Raffel et al. 2019, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, arXiv
         1910.10683; the shape is that of Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762
Idea     Read first, then write. An encoder turns the source into one vector per token, each aware of all others; a
         decoder writes the target token by token, and in every layer looks back at those vectors (cross-attention).
         Translation, summary, question and answer: whatever has an input and an output is a pair of texts.
Picture  src (B,S) -> shared -> n_layer x [x + attn(norm(x)); x + mlp(norm(x))] -> norm -> memory (B,S,C)
           tgt (B,T) -> shared -> n_layer x [x + causal attn; x + cross-attn(memory); x + mlp] -> norm -> head (B,T,V)
Symbols  B batch   S source time   T target time   C n_embd   H heads   D head size   F feed-forward width
         V vocabulary   K beams   M candidates   N new tokens   R rows of a data set   P past + T   L so far
New here cross-attention, relative position buckets, RMSNorm, gated feed-forward, label smoothing, span corruption,
         decoding in batches of sources with padding, BLEU. The training loop is decoder_only.py's, pasted unchanged.
Not here sampling (decoder_only.py), Adafactor, the 2017 paper's sinusoids, mixtures of tasks
Expect   100.0 % of unseen numbers written out exactly right. --preset multi30k, 15 min: BLEU 37 greedy, 39 with 4 beams
Asked    What does cross-attention cache?   Does T5 really leave out the 1/sqrt(D)?   Why buckets?   Encoder-decoder or
         decoder-only?   What does label smoothing buy?   What is span corruption?   What does BLEU count? (grep "# Q:")

    python encoder_decoder.py                                          digits -> words: every answer can be checked
    python encoder_decoder.py --load runs/encoder_decoder --prompt 40215
    python encoder_decoder.py --preset multi30k                        German -> English, 29,000 real sentences
    python encoder_decoder.py --preset multi30k --data my.tsv          your own pairs: source, tab, target
    python encoder_decoder.py --preset spans                           no pairs: fill holes in a text
    python encoder_decoder.py --load google/flan-t5-small --prompt "translate English to German: How old are you?"
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Config: every setting in one place ---------------------------------------------------------------------------
# A field is a flag (--n-layer 6) and its comment the help text. Each is explained where it is used.
@dataclasses.dataclass
class Config:
    data: str = "numbers"             # numbers | multi30k | path of a UTF-8 file with source, tab, target on each line
    spans: bool = False               # join all targets to one text, cut holes into it, fill them (block_size >= 20)
    out: str = "runs/encoder_decoder"  # folder for checkpoint, pictures and summary
    seed: int = 1337                  # decides initial weights, batches, holes and dropout
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda | mps (check its losses against cpu)
    resume: bool = False              # continue the run in --out with its settings, bit for bit
    # Shape: two stacks of n_layer blocks each
    block_size: int = 16              # longest source or target in tokens, in training
    n_layer: int = 2                  # blocks in the encoder, and as many in the decoder
    n_head: int = 4                   # attention heads
    n_embd: int = 64                  # width of the residual stream
    head_size: int = 16               # numbers per head; need not be n_embd / n_head
    ffn_size: int = 256               # width inside the feed-forward layer
    gated: bool = False               # feed-forward: ReLU (T5 v1.0) | gated GELU (v1.1, Flan)
    tie_weights: bool = True          # one table for embedding and head (v1.0) | a head of its own (v1.1, Flan)
    vocab_size: int = 4000            # most tokens that the tokenizer learns
    dropout: float = 0.0              # share of activations zeroed in training; needed when text is seen many times
    label_smoothing: float = 0.0      # share of the target probability that is spread over all tokens
    # Optimization
    max_steps: int = 1600             # optimizer steps
    batch_size: int = 128             # rows per micro-step
    grad_accum: int = 1               # micro-steps per optimizer step
    lr: float = 3e-3                  # peak learning rate
    warmup_steps: int = 100           # steps of linear warm-up
    beta2: float = 0.98               # memory of Adam's second moment: 0.98 looks back about 50 steps
    eval_every: int = 400             # steps between evaluations on the validation split, each with a checkpoint
    # Decoding. There is a right answer, so the likeliest is wanted: no sampling here.
    load: str = ""                    # run folder, Hugging Face folder or repository ("t5-small") to start from
    prompt: str = ""                  # a source; together with --load nothing is trained
    max_new_tokens: int = 64          # longest answer in tokens
    beams: int = 1                    # above 1: beam search


PRESETS = {
    "laptop": {},  # the defaults above: numbers and their names
    "multi30k": dict(data="multi30k", n_layer=3, n_embd=192, head_size=48, ffn_size=512, block_size=64, dropout=0.1,
                     label_smoothing=0.1, batch_size=64, max_steps=2700, warmup_steps=400, eval_every=300, beams=4),
    "spans": dict(data="multi30k", spans=True, n_embd=128, ffn_size=512, block_size=80, batch_size=32, max_steps=800),
}


PAD, EOS = 0, 1  # the ids of <pad> and </s>, in all T5s


# --- 2. Model: from one attention up to T5 ---------------------------------------------------------------------------
#     source: 4 0 2 0 0 </s>                                   target so far: <pad> forty thousand
#       |                                                        |
#     shared * sqrt(C) --> x --> encoder blocks --> norm       shared * sqrt(C) --> x --> decoder blocks --> norm
#                                (self, mlp)         |                                    (self, cross, mlp)  |
#                                                  memory --------- keys, values ----------------^          head
#                                                                                                    "two" is next
# Every block adds to a stream x and reads it through a norm (pre-norm). The norm is RMSNorm (Zhang & Sennrich 2019,
# arXiv 1910.07467, eq. 4): y = x / sqrt(mean(x^2) + 1e-6) * weight, over the C numbers of one token.
#
# Q: What does RMSNorm leave out of LayerNorm, and why does that do?
# A: The mean and the bias. What training needs is the rescaling: a stream whose size does not grow with depth. One
#    statistic instead of two, one vector of weights instead of two, and models train as well.
def relative_bucket(distance, causal):
    """distance = key position - query position (any shape, int64) -> bucket 0..31 (T5 paper, section 2.1, and code).

    An encoder spends 16 buckets on each side, a causal decoder all 32 on the past. Half of a side's buckets are exact,
    the others grow by equal factors; from 113 on (encoder: 91) everything is one bucket.
        causal:  0 | 1 | 2 | ... | 15 | 16-18 | 19-20 | 21-23 | ... | 113 and more
    """
    # Q: Why buckets and not one number per distance?
    # A: "3 back" and "4 back" are different, "103 back" and "104 back" are not, and long distances are rare in
    #    training. 32 numbers per head, whatever the length: no limit at token 512, unlike learned positions.
    n, offset = (32, 0) if causal else (16, (distance > 0) * 16)
    distance = (-distance).clamp(min=0) if causal else distance.abs()  # keys ahead of a causal query are masked anyway
    # log_b(distance / exact), with b such that 128 lands on the last bucket. clamp: log(0) would be -inf.
    exact = n // 2
    far = exact + (torch.log(distance.clamp(min=1) / exact) / math.log(128 / exact) * (n - exact)).long()
    return offset + torch.where(distance < exact, distance, far.clamp(max=n - 1))


# Attention is a soft dictionary. Each token makes a query (what do I look for?), a key (what do I offer?) and a value
# (what do I hand over?). Query . key is a score, softmax turns a row of scores into weights that sum to 1, the result
# is the weighted mean of the values. Three uses of one thing:
#     encoder self     queries, keys, values from the source       all see all
#     decoder self     all from the target                         nobody sees the future
#     cross            queries from the target, keys and values from the source: the only place where the two meet
class T5Attention(nn.Module):
    """Queries from one sequence, keys and values from the same (self) or from another one (cross). No biases."""

    def __init__(self, cfg):
        super().__init__()
        inner = cfg.n_head * cfg.head_size  # need not be C: t5-small v1.1 has 6 heads of 64 at width 512
        self.cfg = cfg
        self.q, self.k, self.v = (nn.Linear(cfg.n_embd, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, cfg.n_embd, bias=False)

    def forward(self, x, bias, cache, memory=None):
        """x (B, T, C) asks; itself or memory (B, S, C) answers; bias is added to the scores (B, H, T, S) -> (B, T, C).

        cache {module: (2, B, H, S, D)} holds keys and values of what was read before, and takes the new ones.
        """
        # The beams of a source ask it together: memory has one row for them all, so x (B*K, 1, C) becomes (B, K, C).
        shape, x = x.shape, x if memory is None else x.view(len(memory), -1, x.size(2))
        B, H, D, rate = len(x), self.cfg.n_head, self.cfg.head_size, self.cfg.dropout if self.training else 0.0
        # Heads before time: each (row, head) is a T x D problem of its own.
        q = self.q(x).view(B, -1, H, D).transpose(1, 2)                        # (B, H, T, D)
        # Q: What does cross-attention cache?
        # A: Keys and values of the source do not depend on what is written: computed once per source, 2*H*D numbers
        #    per layer and source token. The self-attention's grow by one column per written token.
        kv, y = cache.get(self), x if memory is None else memory
        if kv is None or memory is None:
            new = torch.stack([f(y).view(B, -1, H, D).transpose(1, 2) for f in (self.k, self.v)])  # (2, B, H, N, D)
            kv = new if kv is None else torch.cat((kv, new), 3)                # (2, B, H, S, D)
        cache[self] = kv
        # Q: Does T5 really leave out the 1/sqrt(D)?
        # A: Its code does: T5's q starts 1/sqrt(D) as large as its k, so the scores start at variance 1 all the same.
        #    We keep q at k's size and divide: the same function, and loading a checkpoint multiplies q by sqrt(D). The
        #    reason is Adam, which moves a weight by about lr whatever its size: T5's small q would change sqrt(D) times
        #    as fast as its k. (T5 was trained with Adafactor, whose steps are relative to the weights.)
        weights = (q @ kv[0].transpose(-2, -1) / math.sqrt(D) + bias).softmax(-1)  # (B, H, T, S)
        self.weights = weights.detach()  # for the picture of what looks where
        y = F.dropout(weights, rate) @ kv[1]                                   # (B, H, T, D)
        return F.dropout(self.o(y.transpose(1, 2).flatten(2)), rate).view(shape)


class FeedForward(nn.Module):
    """wo(relu(wi x)) in T5 v1.0; wo(gelu(wi_0 x) * wi_1 x) in v1.1 (Shazeer 2020, arXiv 2002.05202)."""

    # Q: What does the gate buy?
    # A: A product of two views of x: one says what, the other how much. At equal parameters (F shrinks to 2/3) the
    #    loss is a little lower. Shazeer's explanation: "divine benevolence".
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        for name in ("wi_0", "wi_1") if cfg.gated else ("wi",):
            setattr(self, name, nn.Linear(cfg.n_embd, cfg.ffn_size, bias=False))
        self.wo = nn.Linear(cfg.ffn_size, cfg.n_embd, bias=False)

    def forward(self, x):
        x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.cfg.gated else F.relu(self.wi(x))
        return F.dropout(self.wo(F.dropout(x, self.cfg.dropout, self.training)), self.cfg.dropout, self.training)


class T5Stack(nn.Module):
    """The blocks of one side: x + self-attention, x + cross-attention (decoder only), x + feed-forward, and so on."""

    def __init__(self, cfg, decoder):
        super().__init__()
        self.cfg, self.decoder, self.block = cfg, decoder, nn.ModuleList()
        kinds = {"SelfAttention": T5Attention, "EncDecAttention": T5Attention, "DenseReluDense": FeedForward}
        for _ in range(cfg.n_layer):
            # Published names: block.0.layer.0.SelfAttention, layer.0.layer_norm, layer.1.EncDecAttention ...
            layer = [nn.ModuleDict({name: kind(cfg), "layer_norm": nn.RMSNorm(cfg.n_embd, 1e-6)})
                     for name, kind in kinds.items() if decoder or name != "EncDecAttention"]
            self.block.append(nn.ModuleDict({"layer": nn.ModuleList(layer)}))
        # One number per bucket and head. Only block 0 holds the table; all layers of the stack use it. Cross-attention
        # has none: "3 back" means nothing between two languages.
        self.block[0]["layer"][0]["SelfAttention"].relative_attention_bias = nn.Embedding(32, cfg.n_head)
        self.final_layer_norm = nn.RMSNorm(cfg.n_embd, 1e-6)

    def forward(self, x, mask, cache, memory=None):
        """x (B, T, C) -> (B, T, C). mask (B, S): where the source, x itself or memory, has tokens. Pads anywhere."""
        attention = self.block[0]["layer"][0]["SelfAttention"]
        past = cache[attention].size(3) if cache else 0
        steps = torch.arange(past + x.size(1), device=x.device)  # as many as keys: with a cache more than queries
        distance = steps[None] - steps[past:, None]                            # (T, P)
        # The bias says both "how near" (a learned number per bucket) and "not allowed": one addition. exp(-1e9) is 0;
        # with -inf a source of nothing but pads would be NaN (0/0) in the softmax.
        bias = attention.relative_attention_bias(relative_bucket(distance, self.decoder)).permute(2, 0, 1)  # (H, T, P)
        padding = x.new_zeros(mask.shape).masked_fill(~mask, -1e9)[:, None, None]
        bias = bias.masked_fill(distance > 0, -1e9) if self.decoder else bias + padding
        # Q: Why multiply the embedding by sqrt(C)?
        # A: As a head the table wants std 1/sqrt(C), so that logits start at variance 1; as an input it wants numbers
        #    of size 1, like what the blocks add. T5 stores it at std 1 and divides the head's input by sqrt(C): the
        #    same function. Under Adam our small table learns sqrt(C) times as fast, and here that is what one wants: it
        #    has to learn what each word means, rare ones from a few uses.
        x = F.dropout(x * math.sqrt(self.cfg.n_embd), self.cfg.dropout, self.training)  # (B, T, C)
        for block in self.block:
            first, *middle, last = block["layer"]
            x = x + first["SelfAttention"](first["layer_norm"](x), bias, cache)  # (B, T, C)
            for part in middle:
                x = x + part["EncDecAttention"](part["layer_norm"](x), padding, cache, memory)  # (B, T, C)
            x = x + last["DenseReluDense"](last["layer_norm"](x))              # (B, T, C)
        return F.dropout(self.final_layer_norm(x), self.cfg.dropout, self.training)  # (B, T, C)


class T5(nn.Module):
    """T5. model(src, tgt) -> logits (B, T, V). Module names are those of the published weights.

    src (B, S) int64, pads (0) on either side; tgt (B, T) is what the decoder reads: the target moved one to the right
    behind a <pad>. Parameters without the norms: V*C (twice if untied), 64*H for distances, and per layer 4*C*H*D
    (encoder), 8*C*H*D (decoder), 2*C*F (3*C*F if gated) in each of the two.
    """

    # t5-small (C = 512, F = 2,048, H = 8, D = 64, 6 layers, V = 32,128), in millions: table 16.4, encoder 6 * 3.15,
    # decoder 6 * 4.19, together 60.5. A quarter is the list of pieces; the cross-attention makes a decoder layer a
    # third larger.
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.n_embd
        self.shared = nn.Embedding(cfg.vocab_size, C)  # one table for source and target
        self.encoder, self.decoder = T5Stack(cfg, False), T5Stack(cfg, True)
        self.lm_head = None if cfg.tie_weights else nn.Linear(C, cfg.vocab_size, bias=False)
        # Every product keeps the size of what it multiplies: std = 1/sqrt(numbers added up). (The tables of distances
        # start with it, too: 1/sqrt(H).)
        for p in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(p, std=p.size(1) ** -0.5)

    def decode(self, tgt, memory, mask, cache):
        """tgt (B, T), memory (B, S, C), mask (B, S) -> logits (B, T, V). cache: of what was read before tgt, or {}."""
        x, table = self.decoder(self.shared(tgt), mask, cache, memory), (self.lm_head or self.shared).weight
        # A few rows times a large table: this way round it takes a third of the time (measured, on a CPU).
        return F.linear(x, table) if x.size(1) > 1 else (table @ x[:, 0].t()).t()[:, None]

    def forward(self, src, tgt):
        return self.decode(tgt, self.encoder(self.shared(src), src != PAD, {}), src != PAD, {})  # (B, T, V)


# --- 3. Objective: the target, given the source ----------------------------------------------------------------------
#     source    4  0  2  0  0  </s>                       all of it in view
#     tgt       <pad>  forty    thousand two  hundred     what the decoder reads: the target moved one to the right
#     targets   forty  thousand two hundred  </s>         what it is scored on
# Q: Encoder-decoder or decoder-only?
# A: A decoder-only model reads the source with a causal mask: "4" is read before anybody knows how many digits follow.
#    An encoder reads both ways, and source and target have weights of their own. The price: a token passes through half
#    of the weights only, two stacks to build, and text without a clear source has no place. Most large models of today
#    have one stack: everything is text to go on with, and all weights work on every token.

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


# differs from decoder_only.py: a source, and label smoothing in training
def compute_loss(model, src, targets):
    """src (B, S), targets (B, T) -> sum of losses over the targets that count, in nats. Evaluated without smoothing."""
    # Teacher forcing: every position reads the right answer so far, so all T of them train in one pass.
    # Trap: at decoding time it reads its own words instead, and was never shown how to go on from a mistake.
    # T5 starts with <pad> = 0. Pads in tgt need no mask: they are on the right, and a causal decoder never looks there.
    tgt = F.pad(targets[:, :-1], (1, 0)).clamp(min=PAD)                        # (B, T)
    # Q: What does label smoothing buy?
    # A: The target becomes 1 - eps on the right token plus eps/V everywhere (Szegedy et al. 2015), so no logit is
    #    driven to infinity. Perplexity gets worse, BLEU better (Vaswani et al. 2017, section 5.4). The training loss
    #    can no longer reach 0: with eps 0.1 and 4,000 tokens its floor is 1.15.
    return F.cross_entropy(model(src, tgt).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum",
                           label_smoothing=model.cfg.label_smoothing if model.training else 0.0)


# Q: What is span corruption?
# A: T5's objective for text without pairs: cut 15 % out in pieces of 3 tokens, mark each hole with a token of its own
#    (a sentinel), and write down what is missing: 17 tokens to write for every 80, instead of all of them.
#     text      Thank you for inviting me to your party last week         (holes shortened)
#     source    Thank you <0> me to your party <1> week
#     target    <0> for inviting <1> last <2>
def corrupt_spans(ids, sentinels, generator):
    """ids (B, T) -> (source (B, S), targets (B, N)), each with </s>: one hole of 3 tokens in every 20.

    T5 draws lengths and places freely. Here all rows get equally many holes, so no row needs padding.
    """
    B, T = ids.shape
    start = torch.arange(T // 20) * 20 + torch.randint(1, 17, (B, T // 20), generator=generator)  # (B, holes)
    hole = ((torch.arange(T) - start[:, :, None]) // 3 == 0).any(1)            # (B, T)
    sides = []
    for gone in (hole, ~hole):  # the source lacks the holes, the target the text between them
        first = gone & ~F.pad(gone[:, :-1], (1, 0))                            # (B, T)
        marked = torch.where(first, sentinels[first.cumsum(1) - 1], ids)       # (B, T)
        sides.append(F.pad(marked[~gone | first].view(B, -1), (0, 1), value=EOS))
    return tuple(sides)


# --- 4. Data: pairs of texts, or one text -> rows of ids -------------------------------------------------------------
# Q: One vocabulary for two languages, or one each?
# A: One. Names, numbers and cognates (Hand, Ball) are shared, and so is the table: half the parameters, and the head
#    can be tied. The price: German compounds and English words compete for its places.
def learn_tokenizer(texts, size):
    """Byte-pair encoding of these texts -> the text of a tokenizer.json. (T5's own is a unigram model, read alike.)"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    # A space becomes a mark in front of the word; digits and signs stand alone: "Ball." -> _Ball .
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)])
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(100))]
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    return inner.to_str()


# differs from decoder_only.py: always a tokenizer.json
def make_tokenizer(text):
    """The text of a tokenizer.json, ours or a published one -> tokenizers.Tokenizer. Raises Exception if it is none."""
    from tokenizers import Tokenizer
    # Published files may say "pad to 128" or "cut at 128"; that is for batches, not for a text.
    return Tokenizer.from_str(json.dumps(json.loads(text) | dict(padding=None, truncation=None)))


def encode(tokenizer, text, block_size=1 << 30):
    """Text -> ids with </s> behind the last token, at most block_size."""
    # Trap: padding first and </s> at the end of the rectangle; the model then never learns where to stop.
    return tokenizer.encode(text, add_special_tokens=False).ids[:block_size - 1] + [EOS]


# The toy language: numbers and their English names (see toy_dataset.py). Every answer can be checked.

UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_pairs(seed):
    """-> training, validation and stress pairs (digits, name) of numbers below a million."""
    names = UNITS + [f"{ten} {unit}".removesuffix(" zero") for ten in TENS for unit in UNITS[:10]]
    names += [f"{unit} hundred {rest}".removesuffix(" zero") for unit in UNITS[1:10] for rest in names]
    names += [f"{many} thousand {rest}".removesuffix(" zero") for many in names[1:] for rest in names]
    length, g = torch.tensor([len(str(n)) for n in range(len(names))]), torch.Generator().manual_seed(seed)  # (R)
    # One in ten is held out, whatever the seed, but no number below 100: there are too few of those to learn them from
    # others. Trap: drawing evenly from 0 to 999,999 makes nine in ten six digits long, and short numbers are never
    # learned. With these weights each length is about as likely as any other.
    held = (torch.rand(len(names), generator=torch.Generator().manual_seed(0)) < 0.1) & (length > 2)  # (R)
    train, val = (torch.multinomial(chosen / 10.0 ** length, size, True, generator=g).tolist()
                  for chosen, size in ((~held, 100_000), (held, 1000)))
    # Stress: 5 or 6 digits, three or more zeros. "forty thousand six": most words of the pattern are missing, so their
    # places must be counted, not remembered. A model can have 1.000 on random numbers and .995 here.
    stress = [n for n in held.nonzero()[:, 0].tolist() if n > 9999 and str(n).count("0") > 2]
    return [[(str(n), names[n]) for n in part] for part in (train, val, stress)]


# Multi30k (Elliott et al. 2016, arXiv 1605.00459): captions of photographs, German and English, 29,000 pairs to train.
MULTI30K = ("https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{}.gz",
            "f7335c4d6d8b04840c9f2e5295f49d2a11784a3ba5b80690d7478935d4d88e6f")


def multi30k_pairs():
    """-> training, validation and test pairs (German, English), from $LLM_DATA, ./data or else downloaded."""
    import gzip
    sides, check = [], hashlib.sha256()
    for name in ("train.de", "train.en", "val.de", "val.en", "test.de", "test.en"):
        path = Path(os.environ.get("LLM_DATA", "data"), f"multi30k.{name}")
        if not path.is_file():
            import requests
            path.parent.mkdir(parents=True, exist_ok=True)
            url = MULTI30K[0].format(name.replace("test", "test_2016_flickr"))
            path.write_bytes(gzip.decompress(requests.get(url, timeout=(3, 60)).content))
        check.update(path.read_bytes())
        sides.append(path.read_bytes().decode().rstrip("\n").split("\n"))
    if check.hexdigest() != MULTI30K[1]:
        raise OSError(f"{path.parent}/multi30k.* are not the expected files; delete them to fetch them again")
    return [list(zip(*sides[i:i + 2], strict=True)) for i in (0, 2, 4)]


def file_pairs(path):
    """A file with source, tab, target on each line -> training, validation and test pairs; the first tenth is held out.
    Raises OSError if there is no such file, ValueError with the number of a line that is not such a pair."""
    # Trap: splitlines() also cuts at U+2028, form feed and others, inside a sentence.
    lines = [line.rstrip("\r").split("\t") for line in Path(path).read_bytes().decode("utf-8-sig").strip().split("\n")]
    for i, parts in enumerate(lines, 1):
        if len(parts) != 2 or len(lines) < 20:
            raise ValueError(f"{path}, line {i} of {len(lines)}: 20 lines or more of source, tab, target are needed")
    held = lines[:len(lines) // 10]
    return [pair for seen in [dict(held)] for pair in lines if pair[0] not in seen], held, held


def make_rows(pairs, tokenizer, block_size):
    """-> (source (R, S), targets (R, T)), padded on the right: sources with PAD, targets with IGNORE."""
    sides = [[torch.tensor(encode(tokenizer, text, block_size)) for text in side] for side in zip(*pairs, strict=True)]
    return tuple(nn.utils.rnn.pad_sequence(side, True, pad) for side, pad in zip(sides, (PAD, IGNORE), strict=True))


# differs from decoder_only.py: rows of two sides
def make_data(cfg, tokenizer=None):
    """-> (train rows, validation rows, tokenizer, tests: [(name of the figure, beams, pairs)], a source to show)."""
    if cfg.data == "numbers":
        train, val, test = number_pairs(cfg.seed)
        tests = [("exact_match", 1, val), ("exact_match_stress", 1, test)]
    else:
        train, val, test = multi30k_pairs() if cfg.data == "multi30k" else file_pairs(cfg.data)
        tests = [("bleu_greedy", 1, test), ("bleu_beam", max(4, cfg.beams), test)]
    tokenizer = tokenizer or make_tokenizer(learn_tokenizer((text for pair in train for text in pair), cfg.vocab_size))
    train, val = (make_rows(part, tokenizer, cfg.block_size) for part in (train, val))
    if not cfg.spans:
        # The text to show is part of a suggested command later: no signs that a shell would read.
        return train, val, tokenizer, tests, "40215" if cfg.data == "numbers" else re.sub(r'["$`\\]', "", test[0][0])
    # The targets in one piece, windows of it as rows. Validation has the same holes every time.
    train, val = (rows[1][rows[1] != IGNORE].unfold(0, cfg.block_size, cfg.block_size) for rows in (train, val))
    sentinels = torch.tensor([tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(100)])
    return (train, sentinels), corrupt_spans(val, sentinels, torch.Generator()), tokenizer, [], "A <extra_id_0> bike."


# differs from decoder_only.py: rows of similar length, or holes in a text
def get_batch(data, rows, seed, step):
    """-> (source, targets) of one step: a pure function of (seed, step), so a resume needs no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = torch.randint(len(data[0]), (8 * rows,), generator=generator)
    if data[1].dim() == 1:  # windows of a text, and the sentinels: other holes at every step
        return corrupt_spans(data[0][index[:rows]], data[1], generator)
    # Padding is work for nothing: of 64 captions drawn at random the longest is twice as long as the average. So 8
    # batches are drawn and cut into 8 of similar length; this step takes one of them, and only the columns it needs.
    index = index[sum((part[index] > PAD).sum(1) for part in data).argsort()].view(8, rows)[step % 8]  # (rows)
    return tuple(part[index, :int((part[index] > PAD).sum(1).max())] for part in data)


# --- 5. Training: one loop, resumable bit for bit --------------------------------------------------------------------
# Batches and dropout are functions of (seed, step), so weights + optimizer + step number are the whole state of a run,
# and a resumed run equals one that was never stopped, to the last bit (on a CPU).

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


def save_checkpoint(path, **state):
    """Write beside `path`, then rename: if killed or out of disk, `path` still is a complete file, old or new."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(state, file)
    os.replace(path.with_suffix(".tmp"), path)


# All that is drawn is a function of (seed, step), so weights + optimizer + step number are the whole state of a run,
# and a resumed run equals one that was never stopped, to the last bit (on a CPU).
# Q: How much arithmetic is one training step?
# A: About 6 operations per parameter and token (2 forward, 4 backward), attention scores not counted. GPT-2 124M with
#    0.49 M tokens a step: 367 TFLOP, about 3 s on a GPU that really reaches 125 TFLOP/s.
def train(model, cfg, train_data, val_data, spec, state=None, after_save=lambda: None):
    """Train to cfg.max_steps, from `state` (a checkpoint) on if given. -> history, a list of dicts.

    spec: what rebuilds the tokenizer, kept in the checkpoint. Ctrl-C finishes the step, saves and exits. Raises
    ValueError if the loss is not finite; the last checkpoint is then kept.
    """
    optimizer, done, history = make_optimizer(model, cfg), 0, []
    if state:
        # Trap: saving weights without the optimizer. Symptom: the loss jumps after every resume, since Adam's averages
        # start empty while the learning rate does not.
        optimizer.load_state_dict(state["optimizer"])
        done, history = state["step"], state["history"]
    stop = []  # Ctrl-C only leaves a mark here, so that no step is cut in half; a second Ctrl-C ends at once
    before = signal.signal(signal.SIGINT, lambda *_: (stop.append(True), signal.signal(signal.SIGINT, before)))
    began, recent = time.perf_counter() - (history[-1]["seconds"] if history else 0), []
    bar = tqdm(range(done + 1, cfg.max_steps + 1), "train", cfg.max_steps, initial=done, mininterval=0.5)
    for step in bar:
        model.train()  # evaluate and after_save switch dropout off
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step - 1, cfg)  # set, not stepped: a scheduler would be one more state to save
        torch.manual_seed(cfg.seed * 1_000_003 + step)  # dropout, where there is any, is a function of the step too
        batch = get_batch(train_data, cfg.batch_size * cfg.grad_accum, cfg.seed, step)
        # Q: Why divide sums of losses by the tokens of the whole step, and not average the micro-batches' means?
        # A: With padding they count different numbers of tokens: of two rows with 10 and 90, a mean of means weighs
        #    the short one's tokens 9 times as much. Symptom: trading batch_size for grad_accum changes the loss.
        count, loss = (batch[-1] != IGNORE).sum().clamp(min=1), 0.0
        for micro in zip(*(t.split(cfg.batch_size) for t in batch), strict=True):
            # Q: Why is there no GradScaler?
            # A: bfloat16 has float32's 8 exponent bits, so small gradients survive; it pays with precision, 2-3 digits.
            #    float16 is the one that needs scaling: below 6e-5 it loses digits, below 6e-8 everything.
            with torch.autocast("cuda", torch.bfloat16, enabled=cfg.device.startswith("cuda")):
                share = compute_loss(model, *(t.to(cfg.device) for t in micro)) / count
            share.backward()  # adds into .grad: the micro-steps' gradients add up
            loss += share.detach()
        # Clipping: g *= min(1, 1 / |g|), |g| over all weights together. Adam bounds the step anyway; what one huge
        # gradient would spoil is v, and with it about the next 1 / (1 - beta2) updates.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss)
        # Reading a number waits until the GPU has computed it, so it is done at every 10th step only.
        evaluating = step % cfg.eval_every == 0 or step in (1, cfg.max_steps)
        if not (evaluating or stop or step % 10 == 0):
            continue
        row = dict(step=step, loss=torch.stack(recent).mean().item(), seconds=time.perf_counter() - began)
        recent = []
        if evaluating:
            row["val_loss"] = evaluate(model, val_data, cfg)
            tqdm.write(f"step {step:5d}: train {row['loss']:.4f}   val {row['val_loss']:.4f}")
        if not math.isfinite(row["loss"] + norm.item() + row.get("val_loss", 0)):
            raise ValueError(f"the loss is not finite at step {step}, try a lower --lr; the checkpoint is kept")
        history.append(row)
        if evaluating or stop:
            save_checkpoint(Path(cfg.out, "ckpt.pt"), config=dataclasses.asdict(cfg), tokenizer=spec, step=step,
                            history=history, model=model.state_dict(), optimizer=optimizer.state_dict())
            after_save()
        if stop:
            sys.exit(f"interrupted: step {step} is saved, --resume continues from there")
    signal.signal(signal.SIGINT, before)
    return history


# --- 6. Decoding: many sources at once -------------------------------------------------------------------------------
# differs from decoder_only.py: all sources of a batch at once, in tensors of (B, K)
@torch.inference_mode()  # like no_grad, and without version counters
def beam_search(model, src, max_new_tokens, num_beams=4, length_penalty=1.0):
    """Keep the K best prefixes of every source, src (B, S). -> (ids (B, K, N), scores (B, K)), best first.

    One beam is greedy decoding: when </s> is the likeliest token, the runner-up is behind, and the row stops.
    score = sum of log-probs / length ** length_penalty, the length counting the </s>. A row stops when its best running
    beam, scored at its present length, is no better than its worst finished one (Hugging Face's rule).
    """
    B, K, N = len(src), num_beams, max_new_tokens
    # All K beams of a source start equal, so all but the first start at -inf: otherwise step 1 would keep K copies of
    # its best token.
    running = torch.full((B, K), -math.inf, device=src.device).index_fill(1, src.new_zeros(1), 0.0)  # (B, K)
    # Beam k of source b lives in row b*K + k.
    mask, cache = src != PAD, {}                                               # (B, S)
    memory = model.eval().encoder(model.shared(src), mask, {})                 # (B, S, C)
    ids, first_row = src.new_full((B * K, 1), PAD), torch.arange(0, B * K, K, device=src.device)[:, None]
    finished, texts = torch.full_like(running, -math.inf), src.new_full((B, K, N), PAD)
    stopped = torch.zeros(B, 1, dtype=torch.bool, device=src.device)           # (B, 1)
    for n in range(1, N + 1):
        logp = model.decode(ids[:, -1:], memory, mask, cache)[:, -1].float().log_softmax(-1)  # (B*K, V)
        # All continuations of a source's beams compete. Each beam offers at most one ending, so 2K candidates always
        # hold K that go on.
        score, index = (running.view(-1, 1) + logp).view(B, -1).topk(2 * K)   # (B, M)
        rows, token = first_row + index // logp.size(1), index % logp.size(1)  # (B, M)
        longer = torch.cat((ids[rows], token[:, :, None]), 2)                  # (B, M, L)
        # An ending counts only among the K best: a text that goes on would be dropped at rank K+1, too.
        ends = (token == EOS) | (n == N)                                       # (B, M)
        final = (score / n ** length_penalty).masked_fill(~ends | stopped, -math.inf)[:, :K]  # (B, K)
        # The K finished so far and the new endings compete for K places.
        finished, pick = torch.cat((finished, final), 1).topk(K)               # (B, K)
        texts = torch.cat((texts, F.pad(longer[:, :K, 1:], (0, N - n))), 1).gather(1, pick[..., None].expand(-1, -1, N))
        running, pick = score.masked_fill(ends, -math.inf).topk(K)             # (B, K)
        stopped = stopped | (running[:, :1] / n ** length_penalty <= finished[:, -1:])  # (B, 1)
        if n == N or stopped.all():
            break
        # The survivors may all stem from one beam: what they have read is copied from the beam that they continue.
        rows = rows.gather(1, pick).flatten()                                  # (B*K)
        ids = torch.cat((ids[rows], token.gather(1, pick).view(-1, 1)), 1)     # (B*K, L)
        # The source's keys and values, one row for all beams, stay.
        cache = {part: kv if kv.size(1) < len(rows) else kv.index_select(1, rows) for part, kv in cache.items()}
    return texts[:, :, :n], finished


def translate(model, tokenizer, texts, cfg, beams):
    """Source texts -> target texts, in their order: greedily (beams 1) or by beam search."""
    ids, out = [torch.tensor(encode(tokenizer, text)) for text in texts], [""] * len(texts)
    # Sorted by length, so that a batch holds little padding; 100 sources with 4 beams are 400 rows.
    for part in torch.tensor([len(row) for row in ids]).argsort().split(100):
        src = nn.utils.rnn.pad_sequence([ids[i] for i in part], True, PAD).to(cfg.device)  # (B, S)
        new = beam_search(model, src, cfg.max_new_tokens, beams)[0][:, 0]      # (B, N)
        for i, row in zip(part.tolist(), new.tolist(), strict=True):
            out[i] = tokenizer.decode(row[:[*row, EOS].index(EOS)], skip_special_tokens=False).strip()
    return out


# --- 7. Interchange: published weights in and out --------------------------------------------------------------------
#     shared.weight (V, C)   encoder.block.0.layer.0.SelfAttention.q.weight (H*D, C)   lm_head.weight (V, C) if untied
# The names are ours too. What differs is where two scales stand (why: see T5Attention.forward and T5Stack.forward):
#                     published                                          ours
#     all             scores = q k^T                                     Q' = Q sqrt(D):  scores = q' k^T / sqrt(D)
#     v1.0, tied      x = E,  logits = (h / sqrt(C)) E^T                 E' = E / sqrt(C):  x = E' sqrt(C),  h E'^T
#     v1.1, untied    x = E,  logits = h W^T                             E' = E / sqrt(C);  W as it is
def scale_of(key, cfg):
    """What a published tensor is multiplied by to become ours."""
    return cfg.head_size ** 0.5 if key.endswith(".q.weight") else cfg.n_embd ** -0.5 if key == "shared.weight" else 1.0


def hf_config(cfg):
    """The config.json of this model: what save_pretrained writes and from_pretrained demands."""
    return dict(model_type="t5", is_encoder_decoder=True, vocab_size=cfg.vocab_size, num_layers=cfg.n_layer,
                num_decoder_layers=cfg.n_layer, num_heads=cfg.n_head, d_model=cfg.n_embd, d_kv=cfg.head_size,
                d_ff=cfg.ffn_size, feed_forward_proj="gated-gelu" if cfg.gated else "relu",
                tie_word_embeddings=cfg.tie_weights, scale_decoder_outputs=cfg.tie_weights, layer_norm_epsilon=1e-6,
                relative_attention_num_buckets=32, relative_attention_max_distance=128, pad_token_id=PAD,
                eos_token_id=EOS, decoder_start_token_id=PAD)


# Fields of a config.json that do not change the arithmetic. Any other one that hf_config does not know is refused.
HARMLESS = ("architectures|dropout_rate|classifier_dropout|initializer_factor|(torch_)?dtype|use_cache|output_past|"
            "n_positions|transformers_version|_name_or_path|task_specific_params|is_gated_act|dense_act_fn|tie_word_.*")


def from_pretrained(name):
    """A folder in Hugging Face layout, or a repository ("t5-small", "google/flan-t5-small") -> T5 in eval mode.

    Raises OSError if it cannot be found, ValueError if it is not T5 as built here, RuntimeError or KeyError for a
    missing, unknown or misshapen tensor. model.folder is where its files are.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    folder = Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Trap: tie_word_embeddings does not tell v1.0 and v1.1 apart any more. Recent transformers write true for both and
    # a second key, scale_decoder_outputs, that says what is meant; older files have the first key alone.
    cfg = Config(vocab_size=hf["vocab_size"], n_layer=hf["num_layers"], n_head=hf["num_heads"], n_embd=hf["d_model"],
                 head_size=hf["d_kv"], ffn_size=hf["d_ff"], gated=hf.get("feed_forward_proj") == "gated-gelu",
                 tie_weights=hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True)))
    for key, value in hf.items():
        # A wrong epsilon or activation changes no shape: better refused than silently wrong. None, False: "not used".
        if value not in (hf_config(cfg).get(key, False), None) and not re.fullmatch(HARMLESS, key):
            raise ValueError(f"config.json says {key} = {value!r}, which this file does not implement")
    # Old files hold the shared table three times, and a table of distances for cross-attention that no code ever read.
    # Recent ones leave out a head that equals the table, although v1.1 does not scale it.
    tensors = load_file(folder / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    model = T5(cfg)
    model.load_state_dict({key: tensor.float() * scale_of(key, cfg) for key, tensor in tensors.items()
                           if not re.search(r"embed_tokens|EncDecAttention\.rel" + "|lm_head" * cfg.tie_weights, key)})
    model.folder = folder
    return model.eval()


def save_pretrained(model, folder):
    """Write config.json and model.safetensors, which transformers and from_pretrained read. --load needs a
    tokenizer.json beside them."""
    from safetensors.torch import save_file
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({k: (p.detach() / scale_of(k, model.cfg)).cpu().contiguous() for k, p in model.named_parameters()},
              Path(folder, "model.safetensors"), {"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(hf_config(model.cfg)), encoding="utf-8")


# --- 8. Main: train, translate, report -------------------------------------------------------------------------------
# How to read the curve. Both fall together: train longer or larger. Validation turns up: the model learns the text by
# heart; more data or fewer steps. Stuck at chance, ln V for tokens: nothing arrives (a rate of 0, shuffled targets).
# Stuck at the entropy of single tokens: the context is ignored, check mask and positions.
def plot_curve(path, history, title):
    from matplotlib.figure import Figure  # without pyplot: no window, so it works on a server
    ax = (figure := Figure(layout="tight")).add_subplot(xlabel="step", ylabel="loss, nats per target", title=title)
    for key, style, label in (("loss", "-", "training batches"), ("val_loss", "o-", "validation, whole split")):
        rows = [row for row in history if key in row]
        ax.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=label)
    ax.legend()
    figure.savefig(path)


def plot_alignment(path, model, tokenizer, cfg, source, target):
    """Which source tokens the decoder looks at while it writes: cross-attention, mean over layers and heads."""
    from matplotlib.figure import Figure
    src, tgt = (encode(tokenizer, text) for text in (source, target))
    model(torch.tensor([src], device=cfg.device), torch.tensor([[PAD] + tgt[:-1]], device=cfg.device))
    ax = (figure := Figure(layout="tight")).add_subplot(xlabel="source: is read", ylabel="target: is written")
    ax.imshow(torch.cat([b["layer"][1]["EncDecAttention"].weights[0] for b in model.decoder.block]).mean(0).tolist())
    for axis, ids, angle in ((ax.xaxis, src, 90), (ax.yaxis, tgt, 0)):
        axis.set_ticks(range(len(ids)), [tokenizer.id_to_token(i).replace("$", r"\$") for i in ids], rotation=angle)
    figure.savefig(path)


def bleu(hypotheses, references):
    """Corpus BLEU in percent (Papineni et al. 2002), equal to sacrebleu's default: 13a tokens, exponential smoothing.

    BLEU = exp(min(0, 1 - r/c)) * (p1 p2 p3 p4)^(1/4), p_n = share of our n-grams that are in the reference, c and r the
    lengths of ours and of the references in words.
    """
    # Q: What does BLEU count?
    # A: Words, pairs, triples and quadruples of words that also stand in the reference, each at most as often as there
    #    (otherwise "the the the" is perfect), summed over the whole corpus. No recall: instead, output that is shorter
    #    than the reference (c < r) is punished. A good translation in other words scores low, so compare systems on one
    #    test set, and name the tokenizer: lower-casing alone is worth a point or two.
    words = []
    for text in (*hypotheses, *references):  # 13a: punctuation becomes words of its own, but not inside 3.14
        text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {text} ")
        text = re.sub(r"([\.,])([^0-9])", r" \1 \2", re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text))
        words.append(re.sub(r"([0-9])(-)", r"\1 \2 ", text).split())
    ours, theirs, log, halves = words[:len(hypotheses)], words[len(hypotheses):], 0.0, 1.0
    for n in range(1, 5):
        grams = [[Counter(zip(*(row[i:] for i in range(n)), strict=False)) for row in side] for side in (ours, theirs)]
        # a & b keeps the smaller of two counts.
        right, total = sum((a & b).total() for a, b in zip(*grams, strict=True)), sum(a.total() for a in grams[0])
        if total == 0 or n == 1 > right:  # nothing of four words, or not one word right
            return 0.0
        # An order without a single hit would make the product 0: the first such counts as 1/2 a hit, the next as 1/4.
        halves = halves if right else halves / 2
        log += math.log((right or halves) / total) / 4
    c, r = (sum(map(len, side)) for side in (ours, theirs))
    return 100 * math.exp(min(0.0, 1 - r / c) + log)


def load(cfg):
    """What --resume or --load names -> (model, tokenizer, checkpoint to resume or None). Raises ValueError if none."""
    path = Path(cfg.out if cfg.resume else cfg.load, "" if Path(cfg.load).is_file() and not cfg.resume else "ckpt.pt")
    try:
        if cfg.resume or path.is_file():
            # weights_only: a pickle may run any code when opened; this refuses everything but tensors and plain data.
            state = torch.load(path, map_location="cpu", weights_only=True)
            model = T5(Config(**state["config"]))
            model.load_state_dict(state["model"])
            return model.to(cfg.device), make_tokenizer(*state["tokenizer"]), state if cfg.resume else None
        model = from_pretrained(cfg.load).to(cfg.device)
        return model, make_tokenizer((model.folder / "tokenizer.json").read_text(encoding="utf-8")), None
    except Exception as problem:  # files, zip, pickle and torch each have their own kinds; here all mean the same
        raise ValueError(f"{path.parent} holds no model of {Path(__file__).name}: {problem}") from problem


def main(cfg):
    """Train (or --resume, or start from --load) and report; with --load and --prompt only translate. -> the model."""
    if min(cfg.n_head, cfg.n_layer, cfg.max_steps, cfg.batch_size, cfg.eval_every, cfg.beams, cfg.max_new_tokens) < 1:
        raise ValueError("heads, layers, steps, batch sizes, beams and new tokens start at 1")
    model, tokenizer, state = load(cfg) if cfg.resume or cfg.load else (None, None, None)
    if cfg.resume:  # all settings as they were, except --out and --device
        cfg = dataclasses.replace(model.cfg, resume=True, out=cfg.out, device=cfg.device)
    elif cfg.load:  # the shape of what was loaded
        names = "n_layer n_head n_embd head_size ffn_size gated tie_weights vocab_size".split()
        cfg = dataclasses.replace(cfg, **{k: vars(model.cfg)[k] for k in names})
        vars(model.cfg).update(dropout=cfg.dropout, label_smoothing=cfg.label_smoothing)
        if cfg.prompt:
            print(translate(model, tokenizer, [cfg.prompt], cfg, cfg.beams)[0])
            return model
    train_data, val_data, tokenizer, tests, prompt = make_data(cfg, tokenizer)
    cfg = dataclasses.replace(cfg, vocab_size=model.cfg.vocab_size if model else tokenizer.get_vocab_size())
    torch.manual_seed(cfg.seed)
    model = (model or T5(cfg)).to(cfg.device)
    # From here on as in every script: train, measure what the task is about, save, show.
    out, results = Path(cfg.out), {}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "ckpt.pt").is_file() and not cfg.resume:
        os.link(out / "ckpt.pt", kept := out / time.strftime("ckpt-%Y%m%d-%H%M%S.pt"))
        print(f"note: {out} holds a trained model, it is kept as {kept.name}")
    history = train(model, cfg, train_data, val_data, (tokenizer.to_str(),), state, lambda: tqdm.write(
        f"            {prompt} -> {translate(model, tokenizer, [prompt], cfg, 1)[0]}"))
    for name, beams, pairs in tests:
        ours, references = translate(model, tokenizer, [s for s, _ in pairs], cfg, beams), [t for _, t in pairs]
        results[name] = bleu(ours, references) if "bleu" in name else sum(map(str.__eq__, ours, references)) / len(ours)
    text = translate(model, tokenizer, [prompt], cfg, cfg.beams)[0]
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=results, history=history, sample=f"{prompt} -> {text}", **history[-1])))
    title = f"{Path(__file__).name} on {Path(cfg.data).name}, label smoothing {cfg.label_smoothing} in training"
    plot_curve(out / "curve.png", history, title.replace("$", r"\$"))
    plot_alignment(out / "attention.png", model, tokenizer, cfg, prompt, text)
    print(f"\n{prompt} -> {text}\n\nReached:", *(f"{k} {v:.4f}" for k, v in (history[-1] | results).items()),
          f'\nsee {out}\nNext:    "{sys.executable}" "{__file__}" --load "{out}" --prompt="{prompt}"')
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
