# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "safetensors>=0.4.3", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
BERT IN ONE FILE                                 python encoder_only.py             2 min on two CPU cores

Paper    Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers, arXiv 1810.04805
Idea     Hide some tokens of a text and guess them from both sides (a cloze). No mask hides the future, so every token
         sees all others, and each position ends as a vector that means "this token, here, in this text". Such vectors
         are what you classify, tag, compare and search with; writing is not what an encoder is for.
Picture  ids, segments (B,T) -> word + position + segment -> LN (B,T,C) -> n_layer x [LN(x + attn(x)); LN(x + mlp(x))]
           -> at the M hidden positions only: dense, GELU, LN, tied decoder -> (M,V)        which token was it?
           -> at [CLS] only: tanh(dense) -> (B,2)                                           do the two halves match?
Words    [CLS] opens a text, its vector stands for the whole; [SEP] ends a half; [MASK] hides a token; segment 0 or 1:
         which half a token is in   logits: scores before softmax   head: a small network on top for one purpose
Symbols  B batch   T time   C n_embd   H heads   D head size = C/H   V vocabulary   M hidden positions   G labels
         L layers   K beams or answers   R rows   N numbers
New here no causal mask, post-norm blocks, segments, heads on gathered positions, masking 80/10/10, WordPiece, filling
         in blanks. The training loop is decoder_only.py's, pasted unchanged; a test keeps it so.
Not here ModernBERT's parts (rotary positions, packing), ELECTRA, sentence-embedding training
Expect   of the tokens that can be known from the other half only 99.9% (99.8% to 100.0%, 3 seeds) digits and 99.9%
         (99.9% to 100.0%, 3 seeds) words are guessed right (from one half 15.4%; of all hidden tokens 88.4%, ceiling
         88.5%), and 100.0% (99.9% to 100.0%, 3 seeds) of the pairs are judged right. --preset sst2, from scratch:
         71.4%, a bag of words 79.2% (results/encoder_only.json)
Asked    Why not always [MASK]?   Why only at the hidden positions?   Post-norm or pre-norm?   What is [CLS] for?
         Why can an encoder not simply write?   Why does the mean need the mask?   Two blanks at once?   (grep "# Q:")
"""
import argparse
import atexit
import collections
import contextlib
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

# The model needs torch alone. matplotlib, requests and safetensors are imported where they are used.
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Config: every knob in one place ------------------------------------------------------------------------------
# One flat record: a field is a flag (--n-layer 6), its comment is the help text, and the whole record travels in the
# checkpoint. Do not learn it by heart; each field is explained where it is used. First reading: go on at section 2.
#     python encoder_only.py                                            numbers and their names: fill blanks, match
#     python encoder_only.py --load runs/encoder_only --prompt "4[MASK]215 [SEP] forty thousand two hundred fifteen"
#     python encoder_only.py --preset sst2                              real sentences: pre-train, then classify
#     python encoder_only.py --preset sst2 --data my.tsv                your own: sentence, tab, label 0, 1, 2 ...
#     python encoder_only.py --preset sst2 --load FOLDER                fine-tune a published BERT instead
#     python encoder_only.py --load bert-base-uncased --prompt "Paris is the [MASK] of France."
@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    data: str = "numbers"             # numbers | sst2 | path of a file with a sentence, a tab and a label on each line
    out: str = "runs/encoder_only"    # folder for checkpoint, metrics, samples and pictures
    seed: int = 1337                  # decides initial weights, batches, masks and dropout
    device: str = "auto"              # auto (cuda if present, else cpu) | cpu | cuda | mps
    dtype: str = "auto"               # auto (float32; on cuda bfloat16 autocast) | float32 | bfloat16 | float64
    compile: bool = False             # torch.compile the model: a minute of waiting, then faster steps

    # Shape. Three layers: to compare two halves takes about one to align them, one to compare, one to sum up.
    block_size: int = 18              # longest row in tokens; the toy language needs 18
    n_layer: int = 3                  # blocks
    n_head: int = 4                   # attention heads; each is n_embd / n_head wide
    n_embd: int = 64                  # width of every token's vector
    vocab_size: int = 0               # 0 takes the tokenizer's
    mask_id: int = 0                  # id of [MASK]; ids above it are ordinary tokens; 0 takes the tokenizer's
    heads: str = "mlm+match"          # mlm+match | mlm | pool | classify | tag: what stands on top of the encoder
    n_labels: int = 0                 # classes of a classify or tag head; the data decides
    dropout: float = 0.0              # share of activations zeroed in training; needed once epochs repeat
    # BERT writes 0.02, right at width 768 (about 1/sqrt(768) = 0.036). At width 64 that is six times too quiet: all
    # vectors look alike, and the match head sits at a loss of ln 2 for hundreds of steps. 0.1 is about 1/sqrt(64).
    init_std: float = 0.1             # std of the initial weights, about 1/sqrt(n_embd)

    # Optimisation
    mask_rate: float = 0.15           # share of tokens that are hidden
    max_steps: int = 3400             # optimizer steps (of pre-training)
    batch_size: int = 128             # rows per micro-step, over all ranks
    grad_accum: int = 1               # micro-steps per optimizer step
    lr: float = 2e-3                  # peak learning rate; small models take large ones (BERT: 1e-4)
    min_lr_ratio: float = 0.0         # the last learning rate as a share of the peak
    warmup_steps: int = 300           # steps of linear warm-up: post-norm needs a long one
    weight_decay: float = 0.01        # on matrices and embeddings only
    beta2: float = 0.98               # memory of Adam's second moment: 0.98 looks back about 50 steps
    grad_clip: float = 1.0            # largest gradient norm
    finetune_steps: int = 250         # steps of the second stage, classification (not for numbers)
    finetune_lr: float = 5e-4         # its peak learning rate: lower, to keep what pre-training learned
    eval_every: int = 400             # steps between passes over the whole validation split
    save_every: int = 400             # steps between checkpoints
    resume: bool = False              # continue the run in --out, bit for bit

    # Filling in blanks
    load: str = ""                    # run folder, checkpoint, Hugging Face folder or repository to start from
    prompt: str = ""                  # text with [MASK]s (and [SEP] between two halves); with --load nothing is trained
    top_k: int = 5                    # answers to show for a blank
    beams: int = 1                    # above 1: fill several blanks jointly, by beam search
    rounds: int = 0                   # above 0: fill all blanks by iterative unmasking in this many rounds

    def __post_init__(self):
        # A bad value caught here costs a line; caught at step 500 it costs the run.
        for names, ok, rule in (
                ("block_size n_layer n_head n_embd max_steps batch_size grad_accum finetune_steps eval_every "
                 "save_every top_k beams", lambda x: x >= 1, "at least 1"),
                # `0 <= x < inf` and not `x < 0 or ...`: every comparison with nan is false, so nan fails as well
                ("seed", lambda x: 0 <= x < 2 ** 31, "in [0, 2^31)"),
                ("vocab_size mask_id n_labels warmup_steps weight_decay rounds",
                 lambda x: 0 <= x < math.inf, "0 or more"),
                ("lr finetune_lr grad_clip init_std", lambda x: 0 < x < math.inf, "above 0"),
                ("mask_rate", lambda x: 0 < x <= 1, "in (0, 1]"),
                ("dropout beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
                ("min_lr_ratio", lambda x: 0 <= x <= 1, "in [0, 1]"),
                ("heads", HEADS.__contains__, f"one of {', '.join(HEADS)}"),
                ("device", ("auto", "cpu", "cuda", "mps").__contains__, "auto, cpu, cuda or mps"),
                ("dtype", ("auto", "float32", "bfloat16", "float64").__contains__,
                 "auto, float32, bfloat16 or float64")):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} cannot be split over n_head {self.n_head} heads")
        if (self.n_labels > 0) != (self.heads in ("classify", "tag")):
            raise ValueError(f"n_labels {self.n_labels} does not go with the head {self.heads!r}")


# What can stand on top of the encoder, and what transformers calls the combination. Only the parts that are listed
# exist: a parameter without gradient would stop data-parallel training, and an unused one would be saved as if trained.
HEADS = {"mlm+match": "BertForPreTraining", "mlm": "BertForMaskedLM", "pool": "BertModel",
         "classify": "BertForSequenceClassification", "tag": "BertForTokenClassification"}

# The published sizes. The paper trains 1 M steps of 256 rows, nine tenths of them with 128 tokens, 4 days on 16 TPUs.
BERT_SIZE = dict(heads="mlm+match", vocab_size=30522, mask_id=103, block_size=512, init_std=0.02, dropout=0.1, lr=1e-4,
                 warmup_steps=10_000, max_steps=1_000_000, batch_size=256, beta2=0.999, eval_every=10_000,
                 save_every=10_000, data="sst2")
PRESETS = {
    "laptop": {},  # the defaults above
    # 6,900 sentences are little: small width, dropout, and 40 % hidden, so that every pass asks other questions
    # (Wettig et al. 2022, arXiv 2202.08005, found 40 % better than 15 % for large models as well).
    "sst2": dict(data="sst2", heads="mlm", block_size=40, n_layer=2, n_embd=128, init_std=0.088, dropout=0.1,
                 mask_rate=0.4, max_steps=1200, batch_size=64, lr=1e-3, warmup_steps=100, finetune_steps=300,
                 eval_every=100, save_every=500),
    "bert-base": dict(BERT_SIZE, n_layer=12, n_head=12, n_embd=768),
    "bert-large": dict(BERT_SIZE, n_layer=24, n_head=16, n_embd=1024),
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


# --- 2. Model: from one layer up to BERT -----------------------------------------------------------------------------
# Each token carries C numbers through L layers. In every layer it looks at all tokens, left and right, and then thinks
# for itself; after the sum the norm (post-norm), so the numbers on the way always have mean 0 and variance 1.
#
#     ids --word+position+segment--> LN --> x --+-----------> + --> LN --+---------> + --> LN --> ... --> x
#                                               |             ^          |           ^
#                                               +-> attention-+          +-> mlp ----+         (one of L layers)
#
# The names are those of the published weights: bert.encoder.layer.0.attention.self.query.weight and so on. A ModuleDict
# is a dict of layers whose keys become those names.
#
# Attention is a soft dictionary. Each token makes three vectors: a query (what do I look for?), a key (what do I
# offer?) and a value (what do I hand over?). Query . key is a score, softmax turns a row of scores into weights that
# sum to 1, and the result is the weighted mean of the values. The H heads do this side by side on D = C/H numbers each:
# here one may look at the digit of the same place in the other half, while another looks for the word "thousand".
# The scores are divided by sqrt(D): a sum of D products of unit variance has variance D, and softmax of scores that
# large is a hard maximum without gradient (Vaswani et al. 2017, section 3.2.1).
#
# LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the C numbers of one token (Ba et al. 2016,
# arXiv 1607.06450). The mlp works on each token alone: 4*C detectors, each of which adds its own direction when it
# fires. Attention moves information between tokens, the mlp, with two thirds of a layer's weights, works on it.
class BertLayer(nn.Module):
    """One layer: x = LN(x + attention(x)), then LN(x + mlp(x)).   x (B, T, C) -> (B, T, C)."""

    # Q: Post-norm or pre-norm?
    # A: Post-norm (here, and in the 2017 paper) normalises the sum, so every layer rescales what came before and the
    #    first layers get small gradients: it needs a long warm-up and stalls when deep. Pre-norm (GPT-2 and all later
    #    ones) leaves a path of plain additions. We keep post-norm to be BERT; at 3 layers 300 steps of warm-up do.
    def __init__(self, cfg):
        super().__init__()
        C, F4 = cfg.n_embd, 4 * cfg.n_embd  # 4: all published BERTs
        self.cfg = cfg
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(C, C) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": nn.LayerNorm(C, eps=1e-12)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(C, F4)})
        # eps = 1e-12 is BERT's own; PyTorch's 1e-5 gives other digits for loaded weights. Trap: 1e-12 is 0 in float16.
        self.output = nn.ModuleDict({"dense": nn.Linear(F4, C), "LayerNorm": nn.LayerNorm(C, eps=1e-12)})

    def forward(self, x, mask=None):
        """mask bool (B, 1, 1, T), True = may be looked at, or None: everything."""
        B, T, C = x.shape
        H, D, p = self.cfg.n_head, C // self.cfg.n_head, self.cfg.dropout
        # Heads before time: each (row, head) is a T x D problem of its own.
        q, k, v = (self.attention["self"][name](x).view(B, T, H, D).transpose(1, 2)
                   for name in ("query", "key", "value"))                      # (B, H, T, D) each
        # softmax(q k^T / sqrt(D)) v, every token over all T tokens. The one difference to a decoder: no triangle. The
        # mask hides padding only, as a column: all queries may see the same keys.
        y = F.scaled_dot_product_attention(q, k, v, mask, p if self.training else 0.0)  # (B, H, T, D)
        y = self.attention["output"]["dense"](y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        x = self.attention["output"]["LayerNorm"](x + F.dropout(y, p, self.training))  # (B, T, C)
        # GELU(x) = x * P(N(0,1) < x), in its exact form with erf. Trap: GPT-2's tanh form differs by up to 5e-4 per
        # activation, enough that loaded weights disagree with the published model in digit 3.
        y = F.gelu(self.intermediate["dense"](x))                              # (B, T, 4*C)
        y = self.output["dense"](y)                                            # (B, T, C)
        return self.output["LayerNorm"](x + F.dropout(y, p, self.training))    # (B, T, C)


class BERT(nn.Module):
    """BERT. model(ids, mask=None, segments=None) -> logits (B, T, V); further heads are methods on hidden().

    ids (B, T) int64; mask (B, T) bool, True = real token (pads on either side), None = all real; segments (B, T) 0 or
    1, None = all 0. cfg.heads says which heads exist. bert-base with both pre-training heads: 110,106,428 parameters.
    """

    # Where they are, for bert-base (C = 768, L = 12, V = 30,522), in millions:
    #     tables       V*C + 512*C + 2*C + norm            23.84     a fifth of the model is the list of words
    #     layers       L * (12*C*C + 13*C)                 85.05     attention 4*C*C, mlp 8*C*C, biases and norms 13*C
    #     pooler       C*C + C                              0.59
    #     heads        C*C + C + norm + V   and  2*C + 2    0.62     the decoder's V*C are the word table again (tied)

    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.n_embd
        self.bert = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "word_embeddings": nn.Embedding(cfg.vocab_size, C),       # what the token is
                "position_embeddings": nn.Embedding(cfg.block_size, C),   # where it stands: attention is blind to order
                "token_type_embeddings": nn.Embedding(2, C),              # which half it is in (the "segment")
                "LayerNorm": nn.LayerNorm(C, eps=1e-12)}),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(BertLayer(cfg) for _ in range(cfg.n_layer))})})
        if cfg.heads in ("mlm+match", "pool", "classify"):
            self.bert["pooler"] = nn.ModuleDict({"dense": nn.Linear(C, C)})
        if cfg.heads in ("mlm+match", "mlm"):
            # Between the encoder and the table of words stands one more layer: the vectors are for all purposes, the
            # words' vectors for naming words. The decoder itself is the word table again (tied), plus a bias per word.
            predictions = nn.ModuleDict({
                "transform": nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": nn.LayerNorm(C, eps=1e-12)}),
                "decoder": nn.Linear(C, cfg.vocab_size)})
            predictions["decoder"].weight = self.bert["embeddings"]["word_embeddings"].weight
            self.cls = nn.ModuleDict({"predictions": predictions})
        if cfg.heads == "mlm+match":
            self.cls["seq_relationship"] = nn.Linear(C, 2)
        if cfg.n_labels:
            self.classifier = nn.Linear(C, cfg.n_labels)
        # Weights small and random, biases 0, norms 1. The tied table is met twice and drawn twice, with the same std.
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=cfg.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def hidden(self, ids, mask=None, segments=None):
        """What the encoder makes of each token, (B, T, C). Raises ValueError for rows longer than block_size."""
        T = ids.size(1)
        if T > self.cfg.block_size:
            raise ValueError(f"{T} tokens, but this model has only {self.cfg.block_size} positions (block_size)")
        positions = torch.arange(T, device=ids.device)                         # (T)
        if mask is not None:
            # A row's first real token has position 0 wherever it stands, so padding on the left changes nothing either.
            #     mask 0 0 1 1 1  -- cumsum -->  0 0 1 2 3  -- -1, clamp -->  positions 0 0 0 1 2
            positions = (mask.cumsum(1) - 1).clamp(min=0)                      # (B, T)
            mask = mask[:, None, None, :]                                      # (B, 1, 1, T)
        table = self.bert["embeddings"]
        # Q: What are segments for?
        # A: Positions run on through both halves, so after [SEP] nothing but the distance would say which half a token
        #    is in. Two extra vectors, added to all tokens of a half, say it directly. Models without pairs drop them.
        x = table["word_embeddings"](ids) + table["position_embeddings"](positions)  # (B, T, C)
        x = x + table["token_type_embeddings"](torch.zeros_like(ids) if segments is None else segments)  # (B, T, C)
        x = F.dropout(table["LayerNorm"](x), self.cfg.dropout, self.training)  # (B, T, C)
        for layer in self.bert["encoder"]["layer"]:
            x = layer(x, mask)                                                 # (B, T, C)
        return x

    # The heads. Each takes what hidden() returned (or rows of it) and is a line or two: the work was done below.
    def mlm(self, x):
        """Which token is it? x (..., C) -> logits (..., V)."""
        transform = self.cls["predictions"]["transform"]
        x = transform["LayerNorm"](F.gelu(transform["dense"](x)))              # (..., C)
        return self.cls["predictions"]["decoder"](x)                           # (..., V)

    def pool(self, x, mask=None):
        """One vector per row, made for the match and classify heads: tanh(W x_first).   x (B, T, C) -> (B, C)."""
        # Q: What is [CLS] for?
        # A: It opens every text and means nothing itself, so its vector is free to collect what concerns the whole.
        #    It does so only where training asks for it: without fine-tuning the mean over all tokens is the better
        #    sentence vector (Reimers & Gurevych 2019, arXiv 1908.10084).
        # The first REAL token: with padding on the left that is not column 0. argmax finds the first True.
        first = x[:, 0] if mask is None else x[torch.arange(len(x), device=x.device), mask.int().argmax(1)]  # (B, C)
        return self.bert["pooler"]["dense"](first).tanh()                      # (B, C)

    def match(self, x, mask=None):
        """Do the two halves belong together? (B, T, C) -> logits (B, 2); as published, class 0 = yes, class 1 = no."""
        # Q: Was "next sentence prediction" a good idea?
        # A: BERT's wrong pairs came from another document, so the topic gave them away and little was learned; RoBERTa
        #    dropped the task and lost nothing. ALBERT swapped two sentences of one text instead, which has to be read.
        #    What matters is how hard the wrong pairs are: ours differ in one digit.
        # Trap: 0 is yes. Whoever takes class 1 for "match" gets an accuracy near 0 and thinks that nothing was learned.
        return self.cls["seq_relationship"](self.pool(x, mask))                # (B, 2)

    def classify(self, x, mask=None):
        """Which class is the row? (B, T, C) -> logits (B, G)."""
        return self.classifier(F.dropout(self.pool(x, mask), self.cfg.dropout, self.training))  # (B, G)

    def tag(self, x):
        """Which class is each token, a name, a verb? (B, T, C) -> logits (B, T, G)."""
        # A word of several pieces has several vectors; by convention the first piece's class is the word's.
        return self.classifier(F.dropout(x, self.cfg.dropout, self.training))  # (B, T, G)

    def forward(self, ids, mask=None, segments=None, chosen=None):
        """-> the logits of the head that cfg.heads names first: (B, T, V), classify (B, G), tag (B, T, G), pool (B, C).

        chosen (B, T) bool, for training: -> (logits (M, V) at these M positions only, match logits (B, 2) or None).
        """
        # One entry for all of it: DDP and torch.compile see only what goes through forward().
        x = self.hidden(ids, mask, segments)                                   # (B, T, C)
        if chosen is not None:
            # Q: Why only at the hidden positions?
            # A: The others have no target, and the head is the dear part: per token C*C + C*V multiplications, 24 M of
            #    bert-base's 109 M. At 15 % that is 3.6 M, and the logits of a batch take 15 % of the memory. In a small
            #    model with a real vocabulary (4 layers, width 256, V 30,522) the head is seven tenths of all the work.
            # (A boolean index has to count first: on a GPU this waits once per step.)
            return self.mlm(x[chosen]), self.match(x, mask) if self.cfg.heads == "mlm+match" else None
        if self.cfg.heads == "pool":
            return self.pool(x, mask)                                          # (B, C)
        if self.cfg.heads == "classify":
            return self.classify(x, mask)                                      # (B, G)
        return self.tag(x) if self.cfg.heads == "tag" else self.mlm(x)


def mean_pool(x, mask):
    """Mean of the real tokens' vectors: a sentence vector.   x (B, T, C), mask (B, T) bool -> (B, C).

    Sentence-transformers compare such vectors by their cosine. A row without real tokens gives zeros.
    """
    # Q: Why does the mean need the mask?
    # A: x.mean(1) averages over padding too: the same sentence gets another vector when a longer one is in the batch.
    #    The symptom is a search engine whose ranking changes with the batch size.
    total = (x * mask[:, :, None]).sum(1)                                      # (B, C)
    return total / mask.sum(1, keepdim=True).clamp(min=1)                      # (B, C)


def build_model(cfg):
    """A fresh model; its weights are a function of cfg alone, seed included."""
    torch.manual_seed(cfg.seed)
    return BERT(cfg)


# --- 3. Objective: guess the hidden tokens; do the halves match? -----------------------------------------------------
#     text      [CLS]  4  0  [SEP]  forty  [SEP]
#     noisy     [CLS]  4 [MASK] [SEP] forty [SEP]       what the model reads
#     targets     -    -  0    -      -     -           what it is asked; - is IGNORE
# A decoder gets a question out of every token, a cloze only out of the hidden ones: 15 % here. In return each question
# is asked with both sides in view.
#
# Q: Why 15 %?
# A: Fewer questions per pass waste passes; more leave less text to answer from. 15 % was BERT's guess; with the same
#    number of steps 40 % trains large models better (Wettig et al. 2022, arXiv 2202.08005), since more questions are
#    worth more than easier ones. In a row of 12 tokens 15 % hides one or two, and 14 % of the rows hide none.

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


# differs from toy_dataset.py: the dice are handed in, thrown before the batch is dealt out to ranks
def mask_tokens(ids, dice, mask_id, vocab_size, rate=0.15):
    """BERT's noise (Devlin et al. 2018, section 3.1). -> (noisy ids (B, T), targets (B, T), IGNORE where not chosen).

    dice (B, T, 2): uniform random numbers in [0, 1). Of the ordinary tokens (id > mask_id: no pads, no [CLS], [SEP])
    the share `rate` is chosen; of those 80 % become [MASK], 10 % a random ordinary token, 10 % stay as they are.
    """
    # Q: Why not always [MASK]?
    # A: [MASK] never occurs in use, and a model that has only ever answered at [MASK] may ignore all other positions.
    #    With 10 % random and 10 % unchanged tokens any position may be asked about, so each vector has to say what
    #    belongs there, and none may simply be copied.
    u, which = dice[..., 0], dice[..., 1]                                      # (B, T), (B, T)
    ordinary = ids > mask_id                                                   # (B, T)
    noisy = ids.masked_fill(ordinary & (u < 0.8 * rate), mask_id)              # (B, T)
    other = mask_id + 1 + (which * (vocab_size - mask_id - 1)).long()          # (B, T)
    noisy = torch.where(ordinary & (u >= 0.8 * rate) & (u < 0.9 * rate), other, noisy)  # (B, T)
    return noisy, ids.masked_fill(~(ordinary & (u < rate)), IGNORE)


def compute_loss(model, batch, cfg):
    """batch = (ids (B, T), segments (B, T), label (B), dice (B, T, 2)) -> (sum of losses in nats, how many, {}).

    Every hidden token is a question, and so is every pair, if there is a match head: the mean runs over all of them.
    Rows are padded with id 0; label: 0 = the halves match, 1 = they do not (hidden tokens are not asked there).
    """
    ids, segments, label, dice = batch
    noisy, targets = mask_tokens(ids, dice, cfg.mask_id, cfg.vocab_size, cfg.mask_rate)  # (B, T) each
    chosen = targets != IGNORE                                                 # (B, T)
    if cfg.heads == "mlm+match":
        # BERT asks in wrong pairs too: its halves are whole sentences and can be guessed alone. Here a hidden digit is
        # known from the other half only, and in a wrong pair that half lies. Asking there anyway teaches not to trust
        # it, and the pairs suffer too: 0.97 of them right after 1,200 steps of one run, instead of 0.99.
        chosen = chosen & (label == 0)[:, None]                                # (B, T)
    logits, match = model(noisy, ids > 0, segments, chosen)
    # Trap: asking about every position. Most are unchanged, copying answers them, and the loss falls to nearly 0 while
    # the model learns nothing.
    loss_sum, count = F.cross_entropy(logits, targets[chosen], reduction="sum"), chosen.sum()
    if match is not None:
        loss_sum, count = loss_sum + F.cross_entropy(match, label, reduction="sum"), count + len(label)
    return loss_sum, count, {}


def classify_loss(model, batch, cfg):
    """The second stage: which class is each row? Nothing is hidden. -> (sum of losses in nats, rows, {})."""
    ids, segments, label, _ = batch
    logits = model(ids, ids > 0, segments)                                     # (B, G)
    return F.cross_entropy(logits, label, reduction="sum"), label.new_tensor(len(label)), {}


def prepare(batch, generator):
    """(ids, segments, label) -> the same, trimmed to the longest row, and the dice that decide what is hidden.

    The dice are thrown here, for the whole batch and before it is dealt out to ranks: all of them see one noise.
    """
    # One throw per token decides whether and how it is hidden, a second one picks the random token.
    # New dice at every step: the same row asks other questions in every epoch ("dynamic masking", RoBERTa, Liu et al.
    # 2019, arXiv 1907.11692). Trap: masking once, when the data is made. 40 epochs then repeat the same few questions.
    ids, segments, label = batch
    width = int((ids > 0).sum(1).max())  # rows are padded on the right: columns that are empty in all rows go
    dice = torch.rand(len(ids), width, 2, generator=generator)                 # (B, T, 2)
    return ids[:, :width], segments[:, :width], label, dice


# --- 4. Data: pairs of the toy language, or sentences -> rows of ids -------------------------------------------------
# Every data set ends up as one tuple of tensors (ids, segments, label) whose first axis is the row, padded on the right
# with id 0. A batch is one gather, and nothing below this section knows where the rows came from.

# A file that is fetched is named with its SHA-256: a broken download would train just as well, and the number at the
# end would mean something else. SST-2: sentences from film reviews, liked (1) or not (0) (Socher et al. 2013).
SST2 = {"train": ("sst2.train.tsv", "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920"),
        "dev": ("sst2.dev.tsv", "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359")}
SST2_URL = "https://raw.githubusercontent.com/clairett/pytorch-sentiment-classification/master/data/SST2/{}.tsv"


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


# Three framings of the same pairs. Each returns a dict of (R, ...) tensors: a collate function.
def near_miss(n, rng):
    """A number that is easily taken for n: one digit changed, or at most 20 away. Never n itself."""
    # An easy negative (any other number) is spotted by its length alone. These have to be read digit by digit.
    other = n
    while other == n:
        if rng.random() < 0.5:
            digits = list(str(n))
            digits[rng.randrange(len(digits))] = rng.choice("0123456789")
            other = int("".join(digits))
        else:
            other = min(999_999, max(0, n + rng.randint(-20, 20)))
    return other


def pair_rows(numbers, tokenizer, seed):
    """Numbers -> (ids (R, 18), segments (R, 18), label (R)): [CLS] digits [SEP] words [SEP]; half of the pairs wrong.

    A wrong pair names a number that is easily taken for the right one (near_miss). label: 0 = match, 1 = no match.
    """
    #     ids        [CLS]   4   2  [SEP]  forty  two  [SEP]  pad pad ...
    #     segments     0     0   0    0      1     1     1     0   0  ...       label 0
    #     ids        [CLS]   4   2  [SEP]  forty  six  [SEP]  pad pad ...       label 1: one digit differs
    # A wrong name at random would be spotted by its length: the head would count words and never read them.
    rng, rows, segments, labels = random.Random(seed), [], [], []
    for n in numbers:
        wrong = rng.random() < 0.5
        first = tokenizer.encode(f"[CLS] {n} [SEP]")
        second = tokenizer.encode(f"{number_to_words(near_miss(n, rng) if wrong else n)} [SEP]")
        rows.append(first + second)
        segments.append([0] * len(first) + [1] * len(second))
        labels.append(int(wrong))
    # 18 = the longest: [CLS], 6 digits, [SEP], 9 words (777777), [SEP].
    ids, halves = (torch.tensor([row + [0] * (18 - len(row)) for row in part]) for part in (rows, segments))
    return ids, halves, torch.tensor(labels)


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


# Words or pieces of words? A vocabulary of whole words has no entry for "unwatchable", and every [UNK] is information
# lost. WordPiece (Schuster & Nakajima 2012) keeps frequent words whole and spells the others: un ##watch ##able. "##"
# says "goes on from the piece before": so words can be put together again.
#
# Q: WordPiece or byte-level BPE?
# A: BPE (GPT-2) replays its merges, keeps every byte and gives the text back exactly. WordPiece matches the longest
#    piece, throws away case, accents and double spaces, and knows [UNK]. For reading that loses little; for writing it
#    would lose the text. "##" marks going on where BPE marks a space: it assumes that words are separated by spaces.
class WordPiece:
    """BERT's tokenizer: lower case, split at spaces and punctuation, then the longest known piece first.

    vocab: list of pieces, index = id, with [PAD] = 0, [UNK], [CLS], [SEP], [MASK]. encode() reads special tokens that
    are written out in the text; wrap(text) adds [CLS] and [SEP]. The ids of `transformers` for uncased checkpoints.
    """

    def __init__(self, vocab, lower=True):
        self.vocab, self.lower, self.ids = vocab, lower, {piece: i for i, piece in enumerate(vocab)}
        self.spec, self.n_vocab = {"kind": "wordpiece", "vocab": vocab, "lower": lower}, len(vocab)
        self.specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        self.cache = {}

    def words(self, text):
        """"Don't, naïve" -> ["don", "'", "t", ",", "naive"]: punctuation apart, accents off, in lower case."""
        if self.lower:
            # NFD writes é as e and a combining accent (category Mn), which then goes.
            lower = "".join(c.lower() for c in text)  # one by one: "ΟΔΟΣ".lower() ends in another letter, ς
            text = "".join(c for c in unicodedata.normalize("NFD", lower) if unicodedata.category(c) != "Mn")
        out = []
        for c in text:
            kind = unicodedata.category(c)
            # Chinese characters stand without spaces: each is a word. Signs such as $ + ~ count as punctuation too.
            chinese = ord(c) >= 0x3400 and unicodedata.name(c, "").startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEO"))
            alone = kind[0] == "P" or c in "$+<=>^`|~" or chinese
            # Control characters (Cc, Cf) and U+FFFD vanish; \t and \n are Cc too and still separate words.
            if (kind not in ("Cc", "Cf") and c != "\ufffd") or c in "\t\n\r":
                out.append(f" {c} " if alone else c)
        return "".join(out).split()

    def pieces(self, word):
        """One word -> ids: greedily the longest piece that fits. No piece fits, or 100 letters: the word is [UNK]."""
        # "unwatchable": is "unwatchable" known? "unwatchabl"? ... "un". Then from there on with ## in front.
        ids, start = [], 0
        while start < len(word) <= 100:
            end = len(word)
            while end > start and ("##" if start else "") + word[start:end] not in self.ids:
                end -= 1
            if end == start:
                break
            ids.append(self.ids[("##" if start else "") + word[start:end]])
            start = end
        return ids if start == len(word) else [self.ids["[UNK]"]]

    def encode(self, text):
        ids = []
        for part in re.split(r"(\[PAD\]|\[UNK\]|\[CLS\]|\[SEP\]|\[MASK\])", text):
            if part in self.specials:
                ids.append(self.ids[part])
                continue
            for word in self.words(part):
                if word not in self.cache:  # language repeats itself
                    self.cache[word] = self.pieces(word)
                ids += self.cache[word]
        return ids

    def decode(self, ids):
        return " ".join(self.vocab[i] for i in ids if 0 < i < self.n_vocab).replace(" ##", "")


def learn_vocabulary(sentences, size):
    """-> the vocabulary of a WordPiece for these sentences: special tokens, all characters, then the commonest words.

    Rare words are spelled with characters. (BERT's own pieces were learned by merging, as in bpe_tokenizer.py; for a
    small corpus the commonest words do as well, and it is three lines.)
    """
    split = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    count = collections.Counter(word for sentence in sentences for word in split.words(sentence))
    letters = sorted({c for word in count for c in word})
    start = [*split.vocab, *letters, *("##" + c for c in letters)]
    # most_common() leaves ties in the order of first appearance; sorted by (-count, word) they depend on nothing.
    common = [w for w, n in sorted(count.items(), key=lambda item: (-item[1], item[0])) if n > 1 and len(w) > 1]
    return start + common[:max(0, size - len(start))]


def tokenizer_from(spec):
    """The tokenizer that a spec describes: kind "numbers", or "wordpiece" with its vocab (a list) and lower (bool)."""
    return ToyTokenizer() if spec["kind"] == "numbers" else WordPiece(spec["vocab"], spec["lower"])


def mask_id_of(tokenizer):
    """The id of [MASK]: in all our vocabularies the last special token, so ids above it are ordinary."""
    return tokenizer.encode("[MASK]")[0]


def read_labelled(path):
    """A file with a sentence, a tab and a label 0, 1, 2 ... on each line -> (sentences, labels)."""
    try:
        rows = [line.rsplit("\t", 1) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
        return [row[0] for row in rows], [int(row[1]) for row in rows]
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as problem:
        sys.exit(f"error: --data {path}: not a UTF-8 file with sentence, tab, whole number on each line ({problem})")


def sentence_rows(sentences, labels, tokenizer, block_size):
    """-> (ids (R, T), segments (R, T) all 0, label (R)): [CLS] sentence [SEP], cut at block_size tokens."""
    rows = [tokenizer.encode("[CLS] " + s)[:block_size - 1] + tokenizer.encode("[SEP]") for s in sentences]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])       # (R, T)
    return ids, torch.zeros_like(ids), torch.tensor(labels)


# differs from decoder_only.py: rows are pairs of halves, or sentences with a label
def make_data(cfg, tokenizer=None):
    """-> (train rows, validation rows, tokenizer, info). tokenizer: keep this one (--load); None: make cfg's.

    info: name and sha256 for the checkpoint; for sentences also the texts, for the bag of words.
    """
    if cfg.data == "numbers":
        tokenizer = tokenizer or ToyTokenizer()
        if cfg.block_size < 18 or tokenizer.spec != ToyTokenizer.spec:
            sys.exit("error: --data numbers needs --block-size 18 or more, and with --load a model of the toy language")
        train, val = draw_numbers(240_000, cfg.seed, False), sorted(set(draw_numbers(2_500, cfg.seed, True)))
        print(f"data: the toy language, {len(train):,} pairs to train, {len(val):,} other numbers to validate")
        info = {"name": "numbers", "sha256": hashlib.sha256(str((train, val)).encode()).hexdigest()}
        return pair_rows(train, tokenizer, cfg.seed), pair_rows(val, tokenizer, cfg.seed + 1), tokenizer, info, None
    if cfg.data == "sst2":
        try:
            paths = [fetch(name, SST2_URL.format(split), sha) for split, (name, sha) in SST2.items()]
        except OSError as problem:
            sys.exit(f"error: --data sst2: {problem}")
        (texts, labels), (val_texts, val_labels) = map(read_labelled, paths)
    else:
        texts, labels = read_labelled(cfg.data)
        # One line in ten is held out, by the hash of its text: a sentence that occurs twice is never in both splits.
        held = [int(sha256_of_text(text)[:8], 16) % 10 == 0 for text in texts]
        val_texts, val_labels = ([x for x, h in zip(part, held, strict=True) if h] for part in (texts, labels))
        texts, labels = ([x for x, h in zip(part, held, strict=True) if not h] for part in (texts, labels))
    if not texts or not val_texts or min(labels + val_labels) < 0 or max(labels) < 1 or max(val_labels) > max(labels):
        sys.exit(f"error: --data {cfg.data}: needs a few dozen lines, with labels 0, 1, 2 ...")
    # The vocabulary is learned from the training sentences alone: what is held out may hold unknown words, as in use.
    tokenizer = tokenizer or WordPiece(learn_vocabulary(texts, cfg.vocab_size or 6000))
    train, val = (sentence_rows(*part, tokenizer, cfg.block_size)
                  for part in ((texts, labels), (val_texts, val_labels)))
    print(f"data: {cfg.data}, {len(texts):,} + {len(val_texts):,} sentences, {max(labels) + 1} classes, "
          f"{(train[0] > 0).sum(1).float().mean():.0f} of {tokenizer.n_vocab:,} tokens each")
    info = {"name": cfg.data, "sha256": sha256_of_text(str((texts, labels, val_texts, val_labels)))}
    return train, val, tokenizer, info, (texts, labels, val_texts, val_labels)


def sha256_of_text(text):
    """Hex SHA-256 of a string."""
    return hashlib.sha256(text.encode()).hexdigest()


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


# --- 6. Decoding: filling in blanks ----------------------------------------------------------------------------------
# Q: Why can an encoder not simply write?
# A: Nothing stops you from appending a [MASK] and filling it, again and again. But each token's vector depends on the
#    tokens to its right, so nothing can be cached: every new token costs a pass over the whole text. And it was trained
#    to repair texts that are mostly there, not to go on from a prefix.
# Three ways to fill M blanks:
#     fill_mask    one pass, each blank by itself                         M = 1, or blanks that do not depend on another
#     fill_beam    M passes over K rows, each blank knows those before    the likeliest combination
#     unmask       a few passes, the surest blanks first                  long stretches; generation
@torch.no_grad()
def fill_mask(model, ids, mask=None, segments=None, top_k=5):
    """ids (B, T) with [MASK]s -> (probabilities (M, K), tokens (M, K)): the K likeliest for each blank, best first."""
    # Q: Two blanks at once?
    # A: One pass gives each blank its own distribution, not the pair's. "[MASK] [MASK] is a city" may put San and New
    #    first, York and Francisco second, and reading off the winners makes "San York".
    model.eval()
    x = model.hidden(ids, mask, segments)[ids == model.cfg.mask_id]            # (M, C)
    probs = model.mlm(x).float().softmax(-1)                                   # (M, V)
    return probs.topk(min(top_k, probs.size(-1)))


@torch.no_grad()
def fill_beam(model, ids, num_beams=4, mask=None, segments=None):
    """Fill all blanks of ONE row ids (1, T), from left to right, keeping the best combinations so far.

    -> (rows (K, T), scores (K)), best first: score = sum of ln p(blank | text, blanks filled before it).
    """
    # 90617 = [MASK] thousand [MASK] hundred ..., K = 2: after the first blank {ninety -0.1, nine -3}, after the second
    # {ninety six -0.2, ninety sixty -4}: "nine" is out, beaten by two continuations of "ninety".
    # The chain rule: p(a, b) = p(a) * p(b | a). Any order of the blanks would do; left to right is as good as another,
    # though for a trained model the products differ a little: nothing forced its conditionals to agree.
    model.eval()
    rows, scores = ids, torch.zeros(1, device=ids.device)
    for column in (ids[0] == model.cfg.mask_id).nonzero()[:, 0].tolist():
        K = len(rows)
        x = model.hidden(rows, *(None if t is None else t.expand(K, -1) for t in (mask, segments)))[:, column]  # (K, C)
        logp = model.mlm(x).float().log_softmax(-1)                            # (K, V)
        V = logp.size(-1)
        # All continuations of all rows compete in one list; the index tells row and token of a winner.
        scores, index = (scores[:, None] + logp).flatten().topk(min(num_beams, K * V))
        rows = rows[index // V]
        rows[:, column] = index % V
    return rows, scores


@torch.no_grad()
def unmask(model, ids, rounds, mask=None, segments=None):
    """Fill all blanks of ids (B, T) in `rounds` passes, in each the ones it is surest of. -> ids (B, T) without blanks.

    Mask-predict (Ghazvininejad et al. 2019, arXiv 1904.09324), without its second thoughts: what is filled stays.
    rounds = 1 fills all at once, like fill_mask; rounds = the number of blanks fills one at a time.
    """
    # Why the surest first: what is filled helps with the rest, and what was filled wrongly misleads it.
    #     90617 [SEP] [MASK]  [MASK]   [MASK] [MASK]  [MASK]         5 blanks, 3 rounds: 2, then 2, then 1
    #     90617 [SEP] ninety  thousand [MASK] [MASK]  [MASK]
    #     90617 [SEP] ninety  thousand [MASK] hundred seventeen
    #     90617 [SEP] ninety  thousand six    hundred seventeen
    model.eval()
    for left in range(rounds, 0, -1):
        blank = ids == model.cfg.mask_id                                       # (B, T)
        logits = model(ids, mask, segments)                                    # (B, T, V)
        logits[..., model.cfg.mask_id] = -math.inf  # "it is hidden" is no answer
        sure, token = logits.softmax(-1).max(-1)                               # (B, T)
        # Rank the blanks of each row by how sure they are: the second argsort turns an order into ranks.
        rank = sure.masked_fill(~blank, -1.0).argsort(-1, descending=True).argsort(-1)  # (B, T)
        quota = (blank.sum(1, keepdim=True) + left - 1) // left  # blanks / passes left, rounded up
        ids = torch.where(blank & (rank < quota), token, ids)                  # (B, T)
    return ids


# --- 7. Interchange: published weights in and out --------------------------------------------------------------------
#     bert.embeddings.word_embeddings.weight (V, C)   bert.encoder.layer.0.attention.self.query.weight (C, C)   ...
# Our module names are the published ones. What differs between files is small, old, and has cost many people an hour:
#     LayerNorm.gamma, .beta         .weight, .bias in files from 2018 that were written by TensorFlow
#     embeddings.word_embeddings...  without "bert." in front when only the encoder was saved (BertModel)
#     cls.predictions.bias           the decoder's bias under a second name; files hold either or both
#     position_ids                   the numbers 0 .. 511; not a weight
# Q: How do you know that published weights arrived right?
# A: Compare logits with the reference on the same ids, padding and segments included: within 1e-4 in float32, not
#    equal, since sums of 768 products in another order round differently. Reading the answers proves little: with the
#    wrong GELU or with eps 1e-5 they still read well.
def heads_in(names):
    """Which of HEADS a file holds, from the names of its tensors. Raises ValueError when it is no BERT."""
    if any(name.startswith("cls.predictions.") for name in names):
        return "mlm+match" if "cls.seq_relationship.weight" in names else "mlm"
    pooler = any(name.endswith("pooler.dense.weight") for name in names)
    if "classifier.weight" in names:
        return "classify" if pooler else "tag"
    if not pooler:
        raise ValueError("the file holds neither a pooler nor a head of BERT")
    return "pool"


def config_from_hf(hf):
    """config.json (a dict) -> Config, heads not yet known. Raises ValueError for a model that is not BERT as built."""
    for key in ("hidden_size", "max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads"):
        if hf.get("model_type", "bert") == "bert" and key not in hf:
            raise ValueError(f"config.json has no {key}")
    # Each of these changes the arithmetic without changing a single shape: better refused than silently wrong.
    for key, expected in (("model_type", "bert"), ("hidden_act", "gelu"), ("layer_norm_eps", 1e-12),
                          ("position_embedding_type", "absolute"), ("is_decoder", False), ("type_vocab_size", 2),
                          ("tie_word_embeddings", True), ("intermediate_size", 4 * hf.get("hidden_size", 0))):
        if hf.get(key, expected) != expected:
            raise ValueError(f"config.json says {key} = {hf[key]!r}; this file implements {expected!r} only")
    return Config(data="sst2", block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"], mask_id=103,
                  n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"], n_embd=hf["hidden_size"],
                  init_std=hf.get("initializer_range", 0.02), dropout=hf.get("hidden_dropout_prob", 0.1))


def config_to_hf(cfg):
    """Config -> the dict of config.json that transformers' BERT classes expect."""
    return {"architectures": [HEADS[cfg.heads]], "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12,
            "hidden_size": cfg.n_embd, "intermediate_size": 4 * cfg.n_embd, "num_hidden_layers": cfg.n_layer,
            "num_attention_heads": cfg.n_head, "max_position_embeddings": cfg.block_size, "type_vocab_size": 2,
            "vocab_size": cfg.vocab_size, "initializer_range": cfg.init_std, "hidden_dropout_prob": cfg.dropout,
            "attention_probs_dropout_prob": cfg.dropout, "pad_token_id": 0, "tie_word_embeddings": True,
            "dtype": "float32"} | ({"id2label": {str(i): f"LABEL_{i}" for i in range(cfg.n_labels)}} if cfg.n_labels
                                   else {})


def import_weights(model, tensors):
    """Fill the model from published tensors {name: tensor}. A missing, unknown or misshapen one raises ValueError."""
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = name if name.startswith(("bert.", "cls.", "classifier.")) else "bert." + name
        if name == "cls.predictions.bias":
            name = "cls.predictions.decoder.bias"
        # A masked-language-model file may carry a pooler that no head of it uses.
        if name.endswith("position_ids") or (model.cfg.heads == "mlm" and ".pooler." in name):
            continue
        if name in found and not torch.equal(found[name], tensor.float()):
            raise ValueError(f"{name} is there twice, with different values")
        found[name] = tensor.float().contiguous()
    wanted, words = model.state_dict(), "bert.embeddings.word_embeddings.weight"
    tied = "cls.predictions.decoder.weight"
    if tied in wanted and words in found:
        if not torch.equal(found.setdefault(tied, found[words]), found[words]):
            raise ValueError(f"{tied} differs from {words}; this file implements a tied decoder only")
    # load_state_dict would name these too, in one block of text for all of them. The first one is what helps.
    for name in sorted(wanted.keys() ^ found.keys(), key=lambda name: (name == tied, name)):
        raise ValueError(f"the weights have no tensor {name}" if name in wanted else f"BERT has no tensor {name}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            turned = " (transposed?)" if tensor.shape[::-1] == wanted[name].shape else ""
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}{turned}")
    model.load_state_dict(found, assign=True)  # takes the tensors themselves: no second copy of the weights
    if tied in wanted:  # assigning made them two; one again
        model.cls["predictions"]["decoder"].weight = model.bert["embeddings"]["word_embeddings"].weight


def export_weights(model):
    """-> {published name: tensor}, the tied table stored once."""
    names = {name: name.replace("predictions.decoder.bias", "predictions.bias") for name, _ in model.named_parameters()}
    if model.cfg.heads == "pool":  # BertModel alone is saved without the prefix
        names = {name: new.removeprefix("bert.") for name, new in names.items()}
    return {names[name]: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}


def hub_folder(repo, names=("config.json", "model.safetensors")):
    """Fetch these files of a Hugging Face repository into ./data. -> the folder. Raises OSError."""
    from urllib.parse import urljoin

    import requests
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise FileNotFoundError(f"there is no folder {repo}")
    base = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}/resolve/main"
    for root in filter(None, (os.environ.get("LLM_DATA"), "data")):
        folder = Path(root) / repo.replace("/", "--")
        if all((folder / name).is_file() for name in names):  # fetched before: no network needed
            return folder
    for name in names:
        # Large files are stored by content: before the hub redirects to its storage it announces their SHA-256. A
        # repository that was renamed (gpt2 is openai-community/gpt2 today) costs one more redirect before that.
        url, announced = f"{base}/{name}", ""
        for _ in range(5):
            answer = requests.head(url, timeout=(3, 30))
            answer.raise_for_status()
            announced = answer.headers.get("x-linked-etag", "").strip('"')
            if announced or not answer.is_redirect:
                break
            url = urljoin(url, answer.headers["location"])
        # Small files have no announced hash; a wrong config is caught by config_from_hf or by the shapes.
        path = fetch(f"{folder.name}/{name}", url, announced if len(announced) == 64 else "")
    return path.parent


# differs from decoder_only.py: which heads to build is read off the tensors' names, since config.json often is wrong
def from_pretrained(path_or_repo):
    """A folder in Hugging Face layout, or a repository name ("bert-base-uncased"). -> (model in eval mode, its Config).

    BertForPreTraining, BertForMaskedLM, BertModel and the two classifiers; cfg.heads says which it was. Raises OSError
    if it cannot be had, ValueError if it is not a BERT.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    files = ("config.json", "vocab.txt", "model.safetensors")
    folder = Path(path_or_repo) if Path(path_or_repo).is_dir() else hub_folder(path_or_repo, files)
    cfg = config_from_hf(json.loads((folder / "config.json").read_text()))
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as problem:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged ({problem})") from problem
    heads, labels = heads_in(tensors), tensors.get("classifier.weight", ())
    cfg = dataclasses.replace(cfg, heads=heads, n_labels=len(labels))
    if (folder / "vocab.txt").is_file() or (folder / "tokenizer_spec.json").is_file():
        cfg.mask_id = mask_id_of(load_tokenizer(folder))
    # On the meta device a model has shapes and no memory: nothing is allocated or drawn that would be replaced at once.
    with torch.device("meta"):
        model = build_model(cfg)
    import_weights(model, tensors)
    return model.eval(), cfg


# differs from decoder_only.py: a WordPiece vocabulary is a file of its own, one piece per line, line = id
def save_pretrained(model, cfg, path, tokenizer=None):
    """Write config.json, model.safetensors and the vocabulary: transformers and --load read it."""
    from safetensors.torch import save
    files = {"model.safetensors": save(export_weights(model), metadata={"format": "pt"}),  # transformers asks for "pt"
             "config.json": json.dumps(config_to_hf(cfg), indent=2).encode()}
    if tokenizer is not None:
        files["tokenizer_spec.json"] = json.dumps(tokenizer.spec).encode()
    if tokenizer is not None and "vocab" in tokenizer.spec:
        files["vocab.txt"] = "".join(piece + "\n" for piece in tokenizer.spec["vocab"]).encode()
    for name, content in files.items():
        write_atomically(Path(path) / name, lambda file, content=content: file.write(content))


# differs from decoder_only.py: vocab.txt instead of merges
def load_tokenizer(path):
    """The tokenizer of a folder: what tokenizer_spec.json (ours) says, else vocab.txt. OSError without either."""
    folder = Path(path) if Path(path).is_dir() else Path(hub_folder(str(path), ("vocab.txt",)))
    spec, options = folder / "tokenizer_spec.json", folder / "tokenizer_config.json"
    if spec.is_file():
        return tokenizer_from(json.loads(spec.read_text()))
    lower = json.loads(options.read_text()).get("do_lower_case", True) if options.is_file() else True
    # Trap: splitlines() also cuts at U+2028 and other signs that are pieces here, and all later ids shift by one.
    return WordPiece((folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n"), lower)


# --- 8. Main: train, look, tell --------------------------------------------------------------------------------------
# Q: What fills the memory in training?
# A: 16 bytes per parameter with plain AdamW (weight, gradient, two moments) and what is kept for backward: 19*C numbers
#    per token and layer, and three rows of V per hidden token. Predicting all tokens would take 7 times the latter.
# differs from decoder_only.py: logits at the hidden positions only
def memory_gb(cfg, parameters):
    """{what: GB} that one process needs to train in float32, before any of it is allocated."""
    tokens = cfg.batch_size // ranks()[1] * cfg.block_size
    # Per token and layer: q k v 3, attention 1, its output 1, two sums and norms 4, both sides of the GELU 8, output 1.
    kept = 18 * cfg.n_layer * cfg.n_embd + 3 * cfg.mask_rate * cfg.vocab_size
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


# Q: Is 88 % good?
# A: Ask what can be known. With a digit and its word both hidden, nobody can. So we ask somebody who knows the language
#    by heart: he goes through all 1,000,000 numbers, keeps those that agree with what is visible, and counts. His share
#    of right guesses is the ceiling, his loss the floor; and he tells us which tokens can be known at all.
def all_forms():
    """-> (table (15, 1000000) uint8, prior (1000000)): every number's 6 digits and 9 words as ids, 0 where it has none.

    prior: how often draw_numbers proposes a number; every length is as likely, so short numbers weigh more.
    """
    # A name below a million is name + "thousand" + name of numbers below 1,000: 1,000 encodings make all of them.
    word = {w: TOY_VOCAB.index(w) for w in TOY_VOCAB}
    small = [b"", *(bytes(word[w] for w in number_to_words(n).split()) for n in range(1, 1000))]
    thousands = [b"", *(small[n] + bytes([word["thousand"]]) for n in range(1, 1000))]
    names = b"".join((a + b).ljust(9, b"\0") for a in thousands for b in small)
    names = bytes([word["zero"]]).ljust(9, b"\0") + names[9:]
    # str gives ASCII digits; translate turns them into our ids.
    to_id = bytes.maketrans(b"0123456789", bytes(word[d] for d in "0123456789"))
    digits = b"".join(str(n).encode().translate(to_id).ljust(6, b"\0") for n in range(1_000_000))
    table = torch.cat([torch.frombuffer(bytearray(part), dtype=torch.uint8).view(1_000_000, -1).t()
                       for part in (digits, names)]).contiguous()              # (15, 1000000)
    length = (table[:6] > 0).sum(0)                                            # (1000000)
    return table, 1.0 / torch.bincount(length, minlength=7)[length].double()


def cloze_accuracy(model, tokenizer, numbers, cfg):
    """Held-out pairs that match, with mask_rate of the tokens hidden: how many are guessed? -> dict of shares.

    all_hidden_ceiling, all_hidden_nats: accuracy and loss per hidden token of a reader who knows the whole language.
    recoverable: every number that agrees with what is visible has this token here, and the visible part of its own
    half alone leaves more than one choice: such a token can be known, and only by reading the other half.
    """
    table, prior = all_forms()
    where = {}  # by column and token: the numbers that have it there

    def agreeing(row, columns, filled):
        """Indices of all numbers with row's tokens in these columns, and some token in each of the `filled` ones."""
        lists = []
        for c in columns:
            if (c, row[c]) not in where:
                where[c, row[c]] = (table[c] == row[c]).nonzero()[:, 0]
            lists.append((len(where[c, row[c]]), c))
        first, *others = sorted(lists)  # begin with the rarest token: thousands of candidates instead of a million
        index = where[first[1], row[first[1]]]
        for _, c in others:
            index = index[table[c, index] == row[c]]
        for c in filled:  # a blank says that a token is there: "two hundred [MASK]" is not 200
            index = index[table[c, index] > 0]
        return index

    def chances(index, column):
        """What a reader who knows this much expects in a column: probability of each token, (V)."""
        p = torch.bincount(table[column, index].int(), prior[index], minlength=len(TOY_VOCAB))  # (V)
        return p / p.sum()

    # One row of the table per number, and which of its 15 columns are hidden. Empty columns stay visible: everybody
    # sees how long the halves are.
    g = torch.Generator().manual_seed(cfg.seed)
    rows = table[:, torch.tensor(numbers)].t()                                 # (R, 15)
    hidden = (torch.rand(rows.shape, generator=g) < cfg.mask_rate) & (rows > 0)  # (R, 15)
    guess = guesses(model, rows.long(), hidden, tokenizer)                     # (R, 15)
    count = collections.Counter()
    for row, hide, answer in zip(rows.tolist(), hidden.tolist(), guess.tolist(), strict=True):
        blanks = [c for c in range(15) if hide[c]]
        if not blanks:
            continue
        seen, gone = ([[c for c in half if hide[c] == what] for half in (range(6), range(6, 15))]
                      for what in (False, True))
        # `both` is everything that can be known; `own` is what the blank's own half tells. (A half always has a column
        # in view: hiding all six digits or all nine words leaves nothing to start from, and happens once in 90,000.)
        both = agreeing(row, seen[0] + seen[1], blanks)
        own = [agreeing(row, seen[half], gone[half]) if seen[half] else torch.arange(1_000_000) for half in (0, 1)]
        for c in blanks:
            p, alone = chances(both, c), chances(own[c >= 6], c)               # (V), (V)
            count["all"] += 1
            count["all right"] += answer[c] == row[c]
            count["ceiling"] += float(p.max())
            count["nats"] -= math.log(p[row[c]])
            if p.max() > 0.999999 and alone.max() < 0.999999:
                kind = "words" if c >= 6 else "digits"
                count[kind] += 1
                count[kind + " right"] += answer[c] == row[c]
                count[kind + " one half"] += int(alone.argmax()) == row[c]
    both = count["digits"] + count["words"]
    right = count["digits right"] + count["words right"]
    return {"cloze_accuracy": right / both,
            "cloze_accuracy_digits": count["digits right"] / count["digits"],
            "cloze_accuracy_words": count["words right"] / count["words"],
            "one_half_reader": (count["digits one half"] + count["words one half"]) / both,
            "recoverable_share": both / count["all"],
            "all_hidden_tokens": count["all right"] / count["all"],
            "all_hidden_ceiling": count["ceiling"] / count["all"],
            "all_hidden_nats": count["nats"] / count["all"]}


@torch.no_grad()
def guesses(model, rows, hidden, tokenizer):
    """The model's answers for rows of the table (R, 15), where hidden. -> (R, 15)."""
    model.eval()
    device = next(model.parameters()).device
    cls, sep, blank = tokenizer.encode("[CLS] [SEP] [MASK]")
    # One forward pass with all hidden tokens of a row hidden at once, as in training.
    # The table has gaps behind short halves; the model gets [CLS] digits [SEP] words [SEP] with pads where gaps were.
    # Padding in the middle is padding like any other: the mask hides it, and positions count real tokens.
    shown = rows.masked_fill(hidden, blank)                                    # (R, 15)
    edge = shown.new_ones(len(rows), 1)                                        # (R, 1)
    ids = torch.cat((edge * cls, shown[:, :6], edge * sep, shown[:, 6:], edge * sep), 1).to(device)  # (R, 18)
    segments = torch.tensor([0] * 8 + [1] * 10, device=device).expand_as(ids)  # (R, 18)
    answer = torch.cat([model(i, i > 0, s).argmax(-1) for i, s in
                        zip(ids.split(500), segments.split(500), strict=True)])  # (R, 18)
    return torch.cat((answer[:, 1:7], answer[:, 8:17]), 1).cpu()               # (R, 15)


@torch.no_grad()
def accuracy(model, data, head):
    """Share of rows whose class a head gets right. head(x, mask) -> (B, G); nothing is hidden."""
    # Trap: measuring the match head on masked pairs, as it is trained. When the digit that differs is hidden, nobody
    # can know; such a figure mixes the model's mistakes with missing information.
    model.eval()
    device, right = next(model.parameters()).device, 0
    for ids, segments, label in zip(*(part.to(device).split(500) for part in data), strict=True):
        right += (head(model.hidden(ids, ids > 0, segments), ids > 0).argmax(-1) == label).sum().item()
    return right / len(data[0])


def second_half(ids, tokenizer):
    """ids (R, T) -> segments (R, T): 1 behind the first [SEP], 0 up to and with it."""
    sep = ids == tokenizer.encode("[SEP]")[0]                                  # (R, T)
    return (sep.cumsum(1) - sep.int() > 0).long()                              # (R, T)


def written(model, tokenizer, numbers):
    """Share of numbers whose whole name comes out right when all its words are blanks, the surest filled first."""
    rows, names = [], [number_to_words(n) for n in numbers]
    for n, name in zip(numbers, names, strict=True):
        row = tokenizer.encode(f"[CLS] {n} [SEP] {'[MASK] ' * len(name.split())}[SEP]")
        rows.append(row + [0] * (18 - len(row)))
    ids = torch.tensor(rows, device=next(model.parameters()).device)           # (R, 18)
    segments = second_half(ids, tokenizer)                                     # (R, 18)
    out = unmask(model, ids, 9, ids > 0, segments)                             # (R, 18)
    return sum(f"[SEP] {name} [SEP]" in tokenizer.decode(row)
               for row, name in zip(out.tolist(), names, strict=True)) / len(numbers)


# How good is the encoder on sentences? As good as it is better than the simplest thing that could work: one weight per
# word and class, word order ignored. On a few thousand sentences that is hard to beat: "not" is one word among twenty,
# and an encoder from scratch has to learn English first. A published encoder has read billions of words (--load).
def bag_of_words(texts, labels, val_texts, val_labels):
    """Multinomial logistic regression on which words occur, with an L2 penalty of 1/2 |w|^2. -> validation accuracy."""
    split = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    bags = [sorted(set(split.words(text))) for text in texts]
    ids = {word: i for i, word in enumerate(sorted({word for bag in bags for word in bag}))}
    weight = torch.zeros(len(ids), max(labels) + 1, requires_grad=True)        # (V, G)
    bias = torch.zeros(max(labels) + 1, requires_grad=True)                    # (G)

    def scores(bags):
        # embedding_bag sums the rows of weight that belong to a bag: a product with a 0/1 matrix that nobody builds.
        known = [[ids[word] for word in bag if word in ids] for bag in bags]
        offsets = torch.tensor([0, *map(len, known)]).cumsum(0)[:-1]           # (R)
        flat = torch.tensor([i for bag in known for i in bag], dtype=torch.long)
        return F.embedding_bag(flat, weight, offsets, mode="sum") + bias       # (R, G)

    # The loss is convex: one minimum, no luck, no learning rate. L-BFGS finds it from all rows at once.
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    target = torch.tensor(labels)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(scores(bags), target, reduction="sum") + 0.5 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        guess = scores([sorted(set(split.words(text))) for text in val_texts]).argmax(-1)  # (R)
    return (guess == torch.tensor(val_labels)).float().mean().item()


def question(tokenizer, prompt):
    """A prompt -> ids with [CLS] in front and [SEP] at the end, whether they were typed or not."""
    return tokenizer.encode(f"[CLS] {prompt.strip().removeprefix('[CLS]').removesuffix('[SEP]')} [SEP]")


@torch.no_grad()
def answer(model, tokenizer, cfg, prompt):
    """What the model says about a prompt: classes, blanks filled, or whether two halves match. -> text."""
    model.eval()
    device = next(model.parameters()).device
    row = question(tokenizer, prompt)
    ids = torch.tensor([row], device=device)                                   # (1, T)
    segments = second_half(ids, tokenizer)  # with a single half there is nothing behind its [SEP]  # (1, T)
    if cfg.heads == "classify":
        p = model(ids, None, segments).softmax(-1)[0].tolist()
        return f"{prompt}\n    " + "   ".join(f"class {i}: {value:.3f}" for i, value in enumerate(p))
    if cfg.mask_id not in row:
        p = model.match(model.hidden(ids, None, segments)).softmax(-1)[0, 0].item()
        return f"{prompt}\n    the halves match: {p:.3f}"
    if cfg.rounds:
        return f"{prompt}\n    {tokenizer.decode(unmask(model, ids, cfg.rounds, None, segments)[0].tolist())}"
    if cfg.beams > 1:
        rows, scores = fill_beam(model, ids, cfg.beams, None, segments)
        return "\n    ".join([prompt, *(f"{math.exp(score):.3f}  {tokenizer.decode(row)}" for row, score in
                                        zip(rows.tolist(), scores.tolist(), strict=True))])
    probs, tokens = fill_mask(model, ids, None, segments, cfg.top_k)
    return "\n    ".join([prompt, *("   ".join(f"{tokenizer.decode([t])} {p:.3f}" for p, t in zip(*pair, strict=True))
                                    for pair in zip(probs.tolist(), tokens.tolist(), strict=True))])


# differs from decoder_only.py: a question to an encoder has blanks, two halves, or a class
def check_prompt(cfg, tokenizer):
    """End the program with one line if this model cannot answer the prompt."""
    try:
        row = question(tokenizer, cfg.prompt)
    except ValueError as problem:
        sys.exit(f"error: --prompt: {problem}")
    if len(row) > cfg.block_size:
        sys.exit(f"error: --prompt: {len(row)} tokens, and the model has {cfg.block_size} positions")
    blanks, halves = row.count(cfg.mask_id), row.count(tokenizer.encode("[SEP]")[0]) - 1
    if cfg.heads in ("pool", "tag") or (blanks and "mlm" not in cfg.heads):
        sys.exit(f"error: --prompt: this model has the head {cfg.heads!r} and cannot fill in blanks")
    if not blanks and "mlm" in cfg.heads and (halves != 1 or cfg.heads == "mlm"):
        sys.exit("error: --prompt: put [MASK] where a token is to be guessed"
                 + (", or [SEP] between two halves to match" if cfg.heads == "mlm+match" else ""))


# differs from decoder_only.py: the heads come with the weights, and a run with two stages keeps two checkpoints
def load_any(cfg):
    """--load: our checkpoint (a file, or the run folder around it) or published weights. -> (model, cfg, tokenizer).

    The shape of the model comes from what is loaded, everything else from the command line.
    """
    shape = {"block_size", "n_layer", "n_head", "n_embd", "vocab_size", "mask_id", "heads", "n_labels", "init_std"}
    free = {field.name for field in dataclasses.fields(cfg)} - shape
    # A preset's shape is a wish of the preset, not of the user: only what was typed can contradict the weights.
    for name in shape - cfg.given if hasattr(cfg, "given") else ():
        setattr(cfg, name, getattr(Config, name))
    path = next((p for p in (Path(cfg.load, "ckpt.pt"), Path(cfg.load, "finetune", "ckpt.pt"),
                             Path(cfg.load, "pretrain", "ckpt.pt")) if p.is_file()), Path(cfg.load))
    if path.is_file():
        state = read_checkpoint(path)
        cfg = recorded_config(cfg, state["config"], free)
        model = build_model(cfg)
        load_checkpoint(path, model, None, cfg)
        return model.eval(), cfg, tokenizer_from(state["extra"]["tokenizer"])
    try:
        model, theirs = from_pretrained(cfg.load)
        tokenizer = load_tokenizer(cfg.load)
    except (OSError, ValueError, KeyError) as problem:
        sys.exit(f"error: --load {cfg.load}: no run, no checkpoint and no BERT folder or repository ({problem})")
    if tokenizer.n_vocab > theirs.vocab_size:
        sys.exit(f"error: --load {cfg.load}: {theirs.vocab_size} tokens in the weights, {tokenizer.n_vocab} in the "
                 f"vocabulary; they do not belong together")
    cfg = recorded_config(cfg, dataclasses.asdict(theirs), free)
    model.cfg.dropout = cfg.dropout  # all modules hold this one record
    return model, cfg, tokenizer


# What a trained model is asked: a blank that the other half answers, two blanks that only agree together, a whole name
# in blanks, and three pairs to match.
EXAMPLES = ("4[MASK]215 [SEP] forty thousand two hundred fifteen",
            "40215 [SEP] forty thousand two [MASK] fifteen",
            "7[MASK]04 [SEP] seven thousand [MASK] hundred four",
            "90617 [SEP] [MASK] [MASK] [MASK] [MASK] [MASK]",
            "40215 [SEP] forty thousand two hundred fifteen", "40215 [SEP] forty thousand two hundred sixteen",
            "40215 [SEP] forty two thousand two hundred fifteen")


# Q: What is fine-tuning, exactly?
# A: Training goes on, on another question. The encoder keeps its weights, the old head goes, a new one (C*G weights)
#    comes, and all of it learns, a few passes, at a lower rate. Trap: the full rate. The fresh head's large first
#    gradients then run through the encoder and wash out what it knew ("catastrophic forgetting").
def stage_config(cfg, stage, classes=0):
    """The settings of one stage of a run on sentences: a folder of its own and, for fine-tuning, its own schedule."""
    changes = dict(out=str(Path(cfg.out) / stage))
    if stage == "finetune":
        changes |= dict(heads="classify", n_labels=classes, max_steps=cfg.finetune_steps, lr=cfg.finetune_lr,
                        warmup_steps=cfg.finetune_steps // 10)
    return dataclasses.replace(cfg, **changes)


def with_classifier(model, cfg):
    """A classifier around a trained encoder: same layers, fresh pooler (unless there is one) and fresh head."""
    new = build_model(cfg)
    # Every tensor of the old encoder has its place in the new one; a name that did not fit would raise here.
    old = model.bert.state_dict()
    new.bert.load_state_dict(new.bert.state_dict() | {name: tensor.cpu() for name, tensor in old.items()})
    return new


def main(cfg):
    """Train (or --resume, or start from --load) and report; with --load and --prompt only answer. -> (model, cfg)."""
    # In this order: device, settings, data, memory, model. What can fail does so before anything is written.
    device = setup(cfg)
    rank, world = ranks()
    model, tokenizer, state = None, None, None
    if cfg.resume:
        # What a run was made with is in its checkpoint; the command line need not repeat it and may not contradict it.
        # The newest checkpoint is that of the run which was interrupted; an older one beside it may be another run's.
        path = max((p for p in (Path(cfg.out, stage, "ckpt.pt") for stage in ("pretrain", "finetune")) if p.is_file()),
                   key=lambda p: p.stat().st_mtime_ns, default=Path(cfg.out, "ckpt.pt"))
        if Path(cfg.out, "ckpt.pt").is_file() and Path(cfg.out, "ckpt.pt").stat().st_mtime_ns > path.stat().st_mtime_ns:
            path = Path(cfg.out, "ckpt.pt")
        state = read_checkpoint(path)
        free = {"out", "device", "compile", "resume", "eval_every", "save_every", "load", "prompt", "top_k", "beams",
                "rounds"}
        staged = {"heads", "n_labels", "max_steps", "lr", "warmup_steps"} if path.parent.name == "finetune" else set()
        cfg = recorded_config(cfg, state["config"], free | staged)
        tokenizer = tokenizer_from(state["extra"]["tokenizer"])
    elif cfg.load:
        model, cfg, tokenizer = load_any(cfg)
    if cfg.load and cfg.prompt and not cfg.resume:
        check_prompt(cfg, tokenizer)
        print(answer(model.to(device), tokenizer, cfg, cfg.prompt))
        return model, cfg

    # From here on it is a training run: settings that mean nothing for it are refused, not ignored.
    if cfg.prompt:
        sys.exit("error: --prompt is a question to a trained model: name one with --load")
    toy = cfg.data == "numbers"
    if toy and {"finetune_steps", "finetune_lr"} & getattr(cfg, "given", frozenset()):
        sys.exit("error: --finetune-steps and --finetune-lr belong to sentences; --data numbers has one stage")
    if world > 1 and rank > 0:
        dist.barrier()  # rank 0 goes first: it may have to download, and the others then find the file
    train_data, val_data, tokenizer, info, texts = make_data(cfg, tokenizer)
    if world > 1 and rank == 0:
        dist.barrier()
    if cfg.resume and info["sha256"] != state["extra"]["data"]["sha256"]:
        sys.exit(f"error: --resume: {info['name']} is not the data that this run was trained on (SHA-256 differs)")
    if not cfg.load and not cfg.resume:
        # A learned vocabulary has the size that was asked for, or less; the toy language's may be padded.
        size = cfg.vocab_size or tokenizer.n_vocab if toy else tokenizer.n_vocab
        if size < tokenizer.n_vocab:
            sys.exit(f"error: --vocab-size {size} is less than the {tokenizer.n_vocab} tokens of the data")
        cfg = dataclasses.replace(cfg, vocab_size=size, mask_id=mask_id_of(tokenizer))
    # The data decides what is trained: pairs have two halves to match, sentences do not.
    if cfg.heads != ("mlm+match" if toy else "mlm") and not cfg.load and not cfg.resume:
        sys.exit(f"error: --heads {cfg.heads}: --data {cfg.data} trains {'mlm+match' if toy else 'mlm'}"
                 + ("" if toy else " (a single sentence has no second half; --preset sst2 sets all this)"))
    if toy and cfg.heads != "mlm+match":
        sys.exit(f"error: --load {cfg.load}: it has the head {cfg.heads!r}, and --data numbers trains mlm+match")
    check_memory(cfg, device)
    out, extra = out_folder(cfg), {"tokenizer": tokenizer.spec, "data": info}
    # Weights stay float32 under bfloat16 autocast: after 1 bfloat16 knows 1.0078 next, so small updates would be lost.
    dtype = torch.float64 if cfg.dtype == "float64" else torch.float32

    # What an untrained model loses: ln V for each hidden token, ln 2 for each pair. asked: hidden tokens per pair.
    asked = cfg.mask_rate * ((train_data[0] > cfg.mask_id).sum(1) * (train_data[2] == 0)).float().mean().item()
    uniform, ln_v = math.log(cfg.vocab_size), math.log(cfg.vocab_size)
    guess = f"a uniform guess over {cfg.vocab_size:,} tokens costs ln V = {ln_v:.4f}"
    if toy:
        uniform = (asked * ln_v + math.log(2)) / (asked + 1)
        guess = (f"guessing costs ln {cfg.vocab_size} = {ln_v:.2f} per hidden token and ln 2 = 0.69 per pair, "
                 f"{uniform:.2f} on average")

    # One stage for the toy language: hidden tokens and matching together, on the same rows.
    if toy:
        model = (model or build_model(cfg)).to(device, dtype)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {parameters:,} parameters on {device}, {cfg.batch_size * cfg.grad_accum} pairs a step; "
              f"everything goes to {out}/")

        def show(step):
            if step % cfg.eval_every == 0 and rank == 0:  # watch it learn
                tqdm.write("            " + answer(model, tokenizer, cfg, EXAMPLES[0]).split("\n")[1].strip()
                           + f"   match {accuracy(model, val_data, model.match):.3f}")

        result = train(model, cfg, train_data, val_data, compute_loss, extra, show, guess)
        stages, earlier = {".": result}, 0.0
        if rank > 0:
            return model, cfg
        # Held-out numbers of all lengths, in no training pair.
        test = draw_numbers(2000, cfg.seed + 2, True)
        results = cloze_accuracy(model, tokenizer, test, cfg)
        results["match_accuracy"] = accuracy(model, pair_rows(test, tokenizer, cfg.seed + 3), model.match)
        results["written_exactly"] = written(model, tokenizer, test)
        # The floor: the reader who knows the language, told which tokens are noise and whether the pair matches, still
        # does not know what is hidden on both sides (the 10 % that were chosen and left alone he does know).
        floor = 0.9 * asked * results["all_hidden_nats"] / (asked + 1)
        examples = EXAMPLES
    else:
        # Stage 1: read the sentences, labels unseen. Left out when --load brings an encoder that has read more.
        stages, second = {}, cfg.resume and path.parent.name == "finetune"
        earlier = state["extra"]["earlier_seconds"] if second else 0.0
        pretrain = stage_config(cfg, "pretrain")
        classes = int(max(train_data[2].max(), val_data[2].max())) + 1
        if not cfg.load and not second:
            model = build_model(cfg).to(device, dtype)
            print(f"stage 1, pre-training: {sum(p.numel() for p in model.parameters()):,} parameters on {device}, "
                  f"{cfg.mask_rate:.0%} of the tokens hidden; everything goes to {out}/")
            stages["pretrain"] = train(model, pretrain, train_data, val_data, compute_loss, extra, None, guess)
            earlier = stages["pretrain"]["seconds"]
        # Stage 2: the same encoder, a fresh head, every weight goes on learning, at a lower rate.
        finetune = dataclasses.replace(stage_config(cfg, "finetune", classes), resume=second)
        model = (with_classifier(model, finetune) if model else build_model(finetune)).to(device, dtype)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"stage 2, fine-tuning: {parameters:,} parameters, {classes} classes")

        def show(step):
            # A look at the held-out sentences, to watch; nothing is decided by it.
            if step % cfg.eval_every == 0 and rank == 0:
                tqdm.write(f"            accuracy on held-out sentences "
                           f"{accuracy(model, val_data, model.classify):.3f}")

        stages["finetune"] = result = train(model, finetune, train_data, val_data, classify_loss,
                                            {**extra, "earlier_seconds": earlier}, show,
                                            f"guessing among {classes} classes costs {math.log(classes):.4f}")
        cfg, uniform, floor = finetune, math.log(classes), None
        if rank > 0:
            return model, cfg
        # The last step counts, not the best look at the held-out sentences: choosing by them would be training on them.
        mine, theirs = accuracy(model, val_data, model.classify), bag_of_words(*texts)
        results = {"sst2_accuracy" if info["name"] == "sst2" else "accuracy": mine, "bag_of_words_accuracy": theirs}
        print(f"this encoder {mine:.3f}, a bag of words {theirs:.3f}: "
              f"{'the encoder wins' if mine > theirs else 'the bag of words wins' if mine < theirs else 'a draw'}")
        examples = texts[2][:5]

    # Everything below is written by rank 0 alone: answers, pictures, summary.
    text = "\n".join(answer(model, tokenizer, cfg, example) for example in examples)
    write_atomically(out / "sample.txt", lambda file: file.write((text + "\n").encode()))
    for stage, each in stages.items():
        lines = {f"guessing = {uniform:.2f}": uniform} if each is result else {f"guessing = {ln_v:.2f}": ln_v}
        lines |= {} if floor is None else {f"floor = {floor:.2f}": floor}
        plot_curve(out / stage / "curve.png", each["history"], f"{Path(__file__).name} on {Path(cfg.data).name}"
                   + ("" if toy else f", {stage}"), lines, "nats per question")
    # One file that says what was run, on what, and what came out: enough to repeat the run and compare it.
    summary = {"config": dataclasses.asdict(cfg), "params": parameters, "val_loss": result["val_loss"], "floor": floor,
               "tokens_per_second": result["tokens_per_second"], "seconds": earlier + result["seconds"],
               "peak_memory_mb": peak_memory_mb(device), "data": info, "device": str(device),
               "torch": torch.__version__, "figures": [str(Path(stage) / "curve.png") for stage in stages],
               "results": results}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it: one place, no second copy to go stale.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    ask = "4[MASK]215 [SEP] forty thousand two hundred fifteen" if toy else examples[0]
    print(f"\n{text}\n\nThe answers are in {out}/sample.txt, the curves beside it. Ask it yourself with\n"
          f"  python {Path(__file__).name} --load {Path(cfg.load or out) if toy else out} --prompt {ask!r}\n"
          f"Next: encoder_decoder.py, where an encoder reads and a decoder writes.\n"
          f"Expected: {expected}\n"
          f"Reached:  val loss {result['val_loss']:.4f}, {', '.join(f'{k} {v:.4f}' for k, v in results.items())}, "
          f"{summary['seconds']:.0f} s (guessing: {uniform:.2f}{'' if floor is None else f', floor: {floor:.2f}'})")
    return model, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
