# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface-hub>=0.30", "matplotlib>=3.8", "safetensors>=0.4.3", "tokenizers>=0.20", "torch>=2.11",
#                 "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
BERT IN ONE FILE                                 python encoder_only.py             2 min on two CPU cores

Paper    Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers, arXiv 1810.04805
Idea     Hide some tokens of a text and guess them from both sides (a cloze). No mask hides the future, so every token
         sees all others, and each position ends as a vector that means "this token, here, in this text". Such vectors
         are what you classify, compare and search with; writing is not what an encoder is for.
Picture  ids, segments (B,T) -> word + position + segment -> LN (B,T,C) -> n_layer x [LN(x + attn(x)); LN(x + mlp(x))]
           -> at the M hidden positions only: dense, GELU, LN, word table -> (M,V)          which token was it?
           -> at [CLS] only: tanh(dense) -> (B,2)                                           do the two halves match?
Symbols  B batch   T time   C n_embd   H heads   D head size = C/H   V vocabulary   M hidden positions   G classes
         R rows of a data set   N numbers, 0 to 999,999
New here no causal mask, post-norm blocks, segments, heads at chosen positions, noise 80/10/10, WordPiece, filling in
         blanks. The training loop is decoder_only.py's, pasted unchanged; a test keeps it so.
Not here ModernBERT's parts (rotary positions, packing), ELECTRA, training of sentence vectors
Expect   99.9 % of the hidden tokens that only the other half can tell, and 99.9 % of the pairs judged right (3 seeds)
Asked    Why not always [MASK]?   Why only at the hidden positions?   Post-norm or pre-norm?   What is [CLS] for?
         Why can an encoder not simply write?   Why does the mean need the mask?   Two blanks at once?   (grep "# Q:")

    python encoder_only.py                                     numbers and their names: fill blanks, do they match?
    python encoder_only.py --load runs/encoder_only --prompt "4[MASK]215 [SEP] forty thousand two hundred fifteen"
    python encoder_only.py --preset sentences --data my.tsv --out runs/body   lines of sentence, tab, label 0, 1 ...:
    python encoder_only.py --preset classify --data my.tsv --load runs/body   pre-train on the text, then on the labels
    python encoder_only.py --load bert-base-uncased --prompt "Paris is the [MASK] of France."
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
from collections import Counter, namedtuple
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Config: every setting in one place ---------------------------------------------------------------------------
# A field is a flag (--n-layer 6) and its comment the help text. Each is explained where it is used.
@dataclasses.dataclass
class Config:
    data: str = "numbers"             # numbers | path of a UTF-8 file with a sentence, a tab and a label on each line
    out: str = "runs/encoder_only"    # folder for checkpoint, curve and summary
    seed: int = 1337                  # decides initial weights, batches, noise and dropout
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda | mps (check its losses against cpu)
    resume: bool = False              # continue the run in --out with its settings, bit for bit
    block_size: int = 64              # longest row in tokens; a number and its name need 18
    n_layer: int = 3                  # how many BertLayers
    n_head: int = 4                   # attention heads; each is n_embd / n_head wide
    n_embd: int = 64                  # width of every token's vector
    vocab_size: int = 0               # 0 = as many as the tokenizer has (sentences: at most 6,000)
    n_labels: int = 0                 # classes of the classifier; the data decides
    dropout: float = 0.0              # share of activations zeroed in training; needed when text is seen many times
    # Optimization. Post-norm needs a long warm-up (see BertLayer).
    mask_rate: float = 0.15           # share of the tokens that are hidden; 0 = train on the labels alone
    max_steps: int = 3400             # optimizer steps
    batch_size: int = 128             # rows per micro-step
    grad_accum: int = 1               # micro-steps per optimizer step
    lr: float = 2e-3                  # peak learning rate; small models take large ones (BERT: 1e-4)
    warmup_steps: int = 300           # steps of linear warm-up
    beta2: float = 0.98               # memory of Adam's second moment: 0.98 looks back about 50 steps
    eval_every: int = 400             # steps between evaluations on the validation split, each with a checkpoint
    # Filling in blanks
    load: str = ""                    # run folder, Hugging Face folder or repository (bert-base-uncased) to start from
    prompt: str = ""                  # text with [MASK]s (and [SEP] between two halves); with --load nothing is trained


PRESETS = {
    "laptop": {},  # the defaults above: numbers and their names
    # 40 % hidden: with a few thousand sentences, each of them seen a dozen times, more questions a pass help.
    "sentences": dict(n_layer=2, n_embd=128, dropout=0.1, mask_rate=0.4, max_steps=1200, batch_size=64, lr=1e-3,
                      warmup_steps=100, eval_every=200),
    # Fine-tuning: few steps with a low rate, to keep what pre-training learned. BERT: 2e-5 to 5e-5, 3 epochs.
    "classify": dict(mask_rate=0.0, dropout=0.1, max_steps=250, batch_size=64, lr=5e-4, warmup_steps=25, eval_every=50),
}


# --- 2. Model: from attention up to BERT -----------------------------------------------------------------------------
# Each token carries C numbers through n_layer layers. In every layer it looks at all tokens, left and right, and is
# then worked on alone. The norm comes after each sum (post-norm).
#
#     ids --word+position+segment--> LN --> x --+-----------> + --> LN --+---------> + --> LN --> ... --> x
#                                               |             ^          |           ^
#                                               +-> attention-+          +-> mlp ----+         (one of n_layer layers)
#
# The names are those of the published weights, bert.encoder.layer.0.attention.self.query.weight and so on. A ModuleDict
# is a dict of layers whose keys become those names.
def dense_and_norm(size_in, C):
    """A linear layer and a LayerNorm, to be applied in this order (with something in between)."""
    # eps = 1e-12 is BERT's own; PyTorch's 1e-5 gives other digits for loaded weights. Trap: 1e-12 is 0 in float16.
    return nn.ModuleDict({"dense": nn.Linear(size_in, C), "LayerNorm": nn.LayerNorm(C, eps=1e-12)})


class BertLayer(nn.Module):
    """One layer: x = LN(x + attention(x)), then LN(x + mlp(x)).   x (B, T, C) -> (B, T, C).

    LN(x) = (x - mean(x)) / sqrt(var(x) + 1e-12) * weight + bias, over the C numbers of one token.
    """

    # Q: Post-norm or pre-norm?
    # A: Post-norm (here, and in the 2017 paper) normalizes the sum, so every layer rescales what came before and the
    #    first layers get small gradients: it needs a long warm-up and stalls when deep. Pre-norm (GPT-2, Llama) leaves
    #    a path of plain additions. We keep post-norm to be BERT.
    def __init__(self, cfg):
        super().__init__()
        C, self.cfg = cfg.n_embd, cfg
        queries_keys_values = nn.ModuleDict({name: nn.Linear(C, C) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": queries_keys_values, "output": dense_and_norm(C, C)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(C, 4 * C)})  # 4: all published BERTs
        self.output = dense_and_norm(4 * C, C)

    def forward(self, x, mask=None):
        """mask bool (B, 1, 1, T), True = may be read, or None: everything."""
        B, T, C = x.shape
        H, D, rate = self.cfg.n_head, C // self.cfg.n_head, self.cfg.dropout if self.training else 0.0
        # Heads before time: each (row, head) is a T x D problem of its own.
        q, k, v = (f(x).view(B, T, H, D).transpose(1, 2) for f in self.attention["self"].values())  # (B, H, T, D) each
        # softmax(q k^T / sqrt(D)) v, every token over all T tokens. The one difference to a decoder: no triangle. The
        # mask hides padding only, as a column: all queries may see the same keys.
        y = F.scaled_dot_product_attention(q, k, v, mask, rate)                # (B, H, T, D)
        y = self.attention["output"]["dense"](y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        x = self.attention["output"]["LayerNorm"](x + F.dropout(y, rate))      # (B, T, C)
        # GELU(x) = x * P(N(0,1) < x), in its exact form with erf. Trap: GPT-2's tanh form differs by up to 5e-4 per
        # activation, enough that loaded weights disagree with the published model in digit 3.
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))        # (B, T, C)
        return self.output["LayerNorm"](x + F.dropout(y, rate))                # (B, T, C)


class BERT(nn.Module):
    """BERT with all its heads. model(ids, mask=None, segments=None) -> logits (B, T, V): which token is it?

    ids (B, T) int64; mask (B, T) bool, True = real token (pads on either side), None = all real; segments (B, T) 0 or
    1, None = all 0. bert-base with both pre-training heads: 110,106,428 parameters.
    """

    # Where they are, for bert-base (C = 768, V = 30,522), in millions:
    #     tables       V*C + 512*C + 2*C + norm            23.84     a fifth of the model is the table of words
    #     layers       12 * (12*C*C + 13*C)                85.05     attention 4*C*C, mlp 8*C*C, biases and norms 13*C
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
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(BertLayer(cfg) for _ in range(cfg.n_layer))}),
            "pooler": nn.ModuleDict({"dense": nn.Linear(C, C)})})
        # Between the encoder and the table of words stands one more layer: the vectors serve all purposes, the words'
        # vectors name words. The decoder is the word table again (tied), plus a bias per word.
        self.cls = nn.ModuleDict({"predictions": nn.ModuleDict({"transform": dense_and_norm(C, C)}),
                                  "seq_relationship": nn.Linear(C, 2)})
        self.cls["predictions"].register_parameter("bias", nn.Parameter(torch.zeros(cfg.vocab_size)))
        self.classifier = nn.Linear(C, cfg.n_labels) if cfg.n_labels else None
        # x @ W keeps the size of x if W has std 1/sqrt(C). BERT took 0.02 at width 768 (1/sqrt(768) = 0.036); at width
        # 64 (0.125) that would be six times too small, and all vectors would look alike at first.
        for name, p in self.named_parameters():
            if "LayerNorm" not in name:
                nn.init.normal_(p, std=C ** -0.5 if p.dim() == 2 else 0.0)  # biases start at 0

    def hidden(self, ids, mask=None, segments=None):
        """What the encoder makes of each token, (B, T, C)."""
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        # A row's first real token has position 0 wherever it stands, so padding on the left changes nothing either.
        #     mask 0 0 1 1 1  -- cumsum -->  0 0 1 2 3  -- -1, clamp -->  positions 0 0 0 1 2
        positions = (mask.cumsum(1) - 1).clamp(min=0)                          # (B, T)
        table = self.bert["embeddings"]
        # Q: What are segments for?
        # A: Positions run on through both halves, so after [SEP] nothing but the distance would say which half a token
        #    is in. Two extra vectors, added to all tokens of a half, say it directly. Models without pairs drop them.
        x = table["word_embeddings"](ids) + table["position_embeddings"](positions)  # (B, T, C)
        x = x + table["token_type_embeddings"](torch.zeros_like(ids) if segments is None else segments)  # (B, T, C)
        x = F.dropout(table["LayerNorm"](x), self.cfg.dropout, self.training)  # (B, T, C)
        for layer in self.bert["encoder"]["layer"]:
            x = layer(x, mask[:, None, None, :])                               # (B, T, C)
        return x

    def mlm(self, x):
        """Which token is it? x (..., C) -> logits (..., V)."""
        transform = self.cls["predictions"]["transform"]
        x = transform["LayerNorm"](F.gelu(transform["dense"](x)))
        return F.linear(x, self.bert["embeddings"]["word_embeddings"].weight, self.cls["predictions"].bias)

    def label(self, x, mask=None):
        """Of which class is the row? x (B, T, C) -> logits (B, G) of the classifier, or (B, 2): class 0 = halves match.

        Trap: 0 is yes. Whoever takes class 1 for "match" gets an accuracy near 0 and thinks that nothing was learned.
        """
        # Q: What is [CLS] for?
        # A: It opens every text and means nothing itself, so its vector is free to collect what concerns the whole.
        #    It does so only where training asks for it: without fine-tuning the mean over all tokens is the better
        #    sentence vector (Reimers & Gurevych 2019, arXiv 1908.10084).
        # The first REAL token: with padding on the left that is not column 0. argmax finds the first True.
        first = x[:, 0] if mask is None else x[torch.arange(len(x), device=x.device), mask.int().argmax(1)]  # (B, C)
        pooled = self.bert["pooler"]["dense"](first).tanh()                    # (B, C)
        head = self.classifier or self.cls["seq_relationship"]
        return head(F.dropout(pooled, self.cfg.dropout, self.training))        # (B, G)

    def forward(self, ids, mask=None, segments=None):
        return self.mlm(self.hidden(ids, mask, segments))                      # (B, T, V)


def mean_pool(x, mask):
    """A sentence vector, for your own use: the mean over real tokens.   x (B, T, C), mask (B, T) bool -> (B, C)."""
    # Q: Why does the mean need the mask?
    # A: x.mean(1) averages over padding too: the same sentence gets another vector when a longer one is in the batch.
    #    The symptom is a search engine whose ranking changes with the batch size.
    return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, C)


# --- 3. Objective: guess the hidden tokens; do the halves match? -----------------------------------------------------
#     text      [CLS]    4    0  [SEP]  forty  [SEP]
#     noisy     [CLS] [MASK]  0  [SEP]  forty  [SEP]      what the model reads
#     targets     0      4    -    -      -      -        what it is asked; - is IGNORE, column 0 holds the row's label
# A decoder gets a question out of every token, a cloze only out of the hidden ones, 15 % here. In return each question
# is asked with both sides in view. PAD is the id of the token that fills rows up, 0.

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


# differs from decoder_only.py: two questions, one about hidden tokens and one about the row
def compute_loss(model, ids, segments, targets):
    """ids, segments, targets (B, T) -> sum of losses in nats: each hidden token is a question, and so is each label."""
    mask = ids != PAD                                                          # (B, T)
    x = model.hidden(ids, mask, segments)                                      # (B, T, C)
    # Q: Why only at the hidden positions?
    # A: The others have no target, and the head is the expensive part: C*C + C*V multiplications a token, 24 M of
    #    bert-base's 109 M. At 15 % that is 3.6 M, and the logits of a batch take 15 % of the memory.
    # Trap: asking about every position. Most are unchanged, copying answers them, and the loss falls to nearly 0 while
    # the model learns nothing.
    chosen = F.pad(targets[:, 1:] != IGNORE, (1, 0))                           # (B, T)
    loss = F.cross_entropy(model.mlm(x[chosen]), targets[chosen], reduction="sum")
    return loss + F.cross_entropy(model.label(x, mask), targets[:, 0], ignore_index=IGNORE, reduction="sum")


# differs from toy_dataset.py: any vocabulary, and a generator that goes on
def mask_tokens(ids, share, mask_id, n_vocab, generator):
    """BERT's noise (Devlin et al. 2018, section 3.1). -> (noisy ids (B, T), targets (B, T), IGNORE where not chosen).

    Of the ordinary tokens (id > mask_id: no pads, no [CLS], [SEP]) this share is chosen; of those 80 % become [MASK],
    10 % a random ordinary token, 10 % stay as they are.
    """
    # Q: Why not always [MASK]?
    # A: [MASK] never occurs in use, and a model that has only ever answered at [MASK] may ignore all other positions.
    #    With 10 % random and 10 % unchanged tokens any position may be asked about, so each vector has to say what
    #    belongs there, and none may simply be copied.
    # Q: Why 15 %?
    # A: Fewer questions per pass waste passes; more leave less text to answer from. 15 % was BERT's guess; with the
    #    same number of steps 40 % trains large models better (Wettig et al. 2022, arXiv 2202.08005).
    dice = torch.rand(2, *ids.shape, generator=generator)                      # (2, B, T)
    chosen = (ids > mask_id) & (dice[0] < share)                               # (B, T)
    random_ids = torch.randint(mask_id + 1, n_vocab, ids.shape, generator=generator)  # (B, T)
    noisy = torch.where(dice[1] < 0.8, mask_id, torch.where(dice[1] < 0.9, random_ids, ids))  # (B, T)
    return torch.where(chosen, noisy, ids), ids.masked_fill(~chosen, IGNORE)


# --- 4. Data: text -> WordPiece -> rows of ids -----------------------------------------------------------------------
# A vocabulary of whole words has no entry for "unwatchable", and every [UNK] is information lost. WordPiece (Schuster &
# Nakajima 2012) keeps common words whole and spells the others: un ##watch ##able. "##" says "goes on from the piece
# before".
#
# Q: WordPiece or byte-level BPE?
# A: BPE (GPT-2) replays its merges, keeps every byte and gives the text back exactly. WordPiece matches the longest
#    piece, loses spaces (in uncased models case, too) and knows [UNK]. That hardly hurts reading, but would writing.
PAD, SPECIAL = 0, "[PAD] [UNK] [CLS] [SEP] [MASK]".split()  # ids 0 to 4; published vocabularies begin with [PAD], too


def word_pieces(word, ids):
    """One word -> ids, from {piece: id}: greedily the longest piece that fits; [UNK] if none does."""
    # unwatchable: is "unwatchable" a piece? "unwatchabl"? ... "un" is. Go on with "##watchable": "##watch"; "##able".
    found, mark = [], 0  # mark: the length of the ## in front
    while len(word) > mark:
        end = next((end for end in range(len(word), mark, -1) if word[:end] in ids), 0)
        if not end:
            return [ids["[UNK]"]]
        found.append(ids[word[:end]])
        word, mark = "##" + word[end:], 2
    return found


def split_words(text):
    """Words in lower case, digits and signs one by one: "Don't [MASK] 42" -> ["don", "'", "t", "[MASK]", "4", "2"]."""
    return [word if word in SPECIAL else word.lower() for word in re.findall(r"\[[A-Z]+\]|\d|[^\W\d]+|[^\w\s]", text)]


def learn_vocabulary(sentences, size):
    """-> pieces, one a line: the special tokens, all characters (alone and with ##), then the commonest words.

    (BERT's vocabulary was learned piece by piece, much as bpe_tokenizer.py learns; this one has no ##ing or ##able.)
    """
    count = Counter(word for sentence in sentences for word in split_words(sentence))
    letters = sorted(set("".join(count)))
    pieces = [*SPECIAL, *letters, *("##" + letter for letter in letters), *(word for word, _ in count.most_common())]
    return "\n".join(list(dict.fromkeys(pieces))[:size])  # each once


# differs from decoder_only.py: the id of [MASK] instead of that of the end. Ids above it are ordinary tokens
Tokenizer = namedtuple("Tokenizer", "spec encode decode n_vocab mask_id")


# differs from decoder_only.py: WordPiece with a list of pieces, or tokenizer.json
def make_tokenizer(kind, text):
    """kind pieces: text = the vocabulary, a piece a line (vocab.txt); json: text = a Hugging Face tokenizer.json."""
    if kind == "json":
        import tokenizers
        # Published files may say "pad to 128" or "cut at 128"; that is for batches, not for a text.
        inner = tokenizers.Tokenizer.from_str(json.dumps(json.loads(text) | dict(padding=None, truncation=None)))
        return Tokenizer((kind, text), lambda string: inner.encode(string, add_special_tokens=False).ids,
                         lambda row: inner.decode(row, skip_special_tokens=False), inner.get_vocab_size(),
                         inner.token_to_id("[MASK]"))
    pieces = text.split("\n")
    ids = {piece: i for i, piece in enumerate(pieces)}
    return Tokenizer((kind, text), lambda string: [i for word in split_words(string) for i in word_pieces(word, ids)],
                     lambda row: " ".join(pieces[i] for i in row).replace(" ##", ""), len(pieces), ids["[MASK]"])


# ids (R, T); labels (R), IGNORE where there is none; the share of tokens to hide; and the tokenizer that made them
Rows = namedtuple("Rows", "ids labels mask_rate tokenizer")


# The toy language: numbers and their English names, 40215 <-> forty thousand two hundred fifteen. A hidden digit can be
# read off the name and a hidden word off the digits, so what the model should reach is known (see toy_dataset.py).

UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_table(tokenizer):
    """-> (1_000_000, 18) uint8: row n is "[CLS] digits [SEP] name [SEP]", each half with pads up to its longest."""
    names = UNITS + [f"{ten} {unit}".removesuffix(" zero") for ten in TENS for unit in UNITS[:10]]
    names += [f"{unit} hundred {rest}".removesuffix(" zero") for unit in UNITS[1:10] for rest in names]
    # 1,000 encodings make all of them: a name is that of the thousands, "thousand" and that of the rest.
    zero, *small = [bytes(tokenizer.encode(name)) for name in names]
    thousand, cls, sep = (bytes(tokenizer.encode(word)) for word in ("thousand", "[CLS]", "[SEP]"))
    names = [zero, *small, *(name + thousand + rest for name in small for rest in (b"", *small))]
    digits = bytes.maketrans(b"0123456789", bytes(tokenizer.encode("0123456789")))
    rows = b"".join(cls + str(n).encode().translate(digits).ljust(6, b"\0") + sep + name.ljust(9, b"\0") + sep
                    for n, name in enumerate(names))
    return torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(-1, 18)   # (1000000, 18)


def number_data(cfg, tokenizer=None):
    """-> (train Rows, validation Rows, tokenizer, a text to try). Digits with their name, label 0, or with the name of
    another number, label 1."""
    tokenizer = tokenizer or make_tokenizer("pieces", "\n".join(
        [*SPECIAL, *"0123456789", *UNITS, *TENS, "hundred", "thousand"]))
    table, g = number_table(tokenizer), torch.Generator().manual_seed(cfg.seed)
    # One in ten is held out (as digits; its name may come up as a wrong one), whatever the seed, but none below 100:
    # too few to learn them from others. Trap: drawing evenly from 0 to 999,999 makes nine in ten six digits long, and
    # short numbers are never learned. With these weights each length is about as likely as any other.
    length, parts = table[:, 1:7].count_nonzero(1), []                         # (N)
    held = (torch.rand(len(table), generator=torch.Generator().manual_seed(0)) < 0.1) & (length > 2)  # (N)
    for size, chosen in ((240_000, ~held), (2_000, held)):
        n = torch.multinomial(chosen / 10.0 ** length, size, replacement=True, generator=g)  # (R)
        # Q: Was "next sentence prediction", BERT's own form of this task, a good idea?
        # A: BERT's wrong pairs came from another document, so the topic gave them away and little was learned; RoBERTa
        #    dropped the task and lost nothing. What matters is how hard the wrong pairs are. Ours have to be read digit
        #    by digit: the other number differs in one of them (and in those that a carry reaches).
        place = (torch.rand(size, generator=g) * length[n]).long()             # (R)
        other = (n + torch.randint(1, 10, (size,), generator=g) * 10 ** place) % 1_000_000  # (R)
        wrong = torch.rand(size, generator=g) < 0.5                            # (R)
        ids = torch.cat((table[n, :8], table[torch.where(wrong, other, n), 8:]), 1).long()  # (R, 18)
        parts.append(Rows(ids, wrong.long(), cfg.mask_rate, tokenizer))
    return *parts, tokenizer, "4[MASK]215 [SEP] forty [MASK] two hundred fifteen"


def sentence_data(cfg, tokenizer=None):
    """-> (train Rows, validation Rows, tokenizer, a text to try) of a file with sentence, tab, label 0, 1 ... a line.

    Pre-training (mask_rate above 0) does not look at the labels.
    """
    # Trap: splitlines() also cuts at U+2028, form feed and others, inside a sentence.
    lines = Path(cfg.data).read_bytes().decode("utf-8-sig").split("\n")
    found = [re.fullmatch(r"(.*\S.*)\t(\d+)\s*|\s*", line) for line in lines]  # a pair, or an empty line
    if None in found:
        raise ValueError(f"{cfg.data}, line {found.index(None) + 1}: not a sentence, a tab and a label 0, 1, 2 ...")
    pairs = [match.groups() for match in found if match[1]]
    # One sentence in ten is held out, by the hash of its text: one that occurs twice is never in both splits.
    held = torch.tensor([int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0 for text, _ in pairs])  # (R)
    if held.sum() == 0 or len(held) < 20:
        raise ValueError(f"{cfg.data} has {len(pairs)} sentences; a few dozen are needed")
    # The vocabulary is learned from the training sentences alone: what is held out may hold unknown words, as in use.
    tokenizer = tokenizer or make_tokenizer("pieces", learn_vocabulary(
        [text for (text, _), out in zip(pairs, held, strict=True) if not out], cfg.vocab_size or 6000))
    rows = [tokenizer.encode(f"[CLS] {text} [SEP]") for text, _ in pairs]
    print(f"{sum(len(row) > cfg.block_size for row in rows)} of {len(rows)} sentences are cut at --block-size")
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row[:-1][:cfg.block_size - 1] + row[-1:]) for row in rows], True, PAD)
    labels = torch.tensor([IGNORE if cfg.mask_rate else int(label) for _, label in pairs])  # (R)
    parts = [Rows(ids[held == out], labels[held == out], cfg.mask_rate, tokenizer) for out in (False, True)]
    return *parts, tokenizer, " ".join([*re.findall(r"\w{1,8}", pairs[0][0])[:cfg.block_size // 16], "[MASK]"])


def segments_of(ids, tokenizer):
    """0 up to the first [SEP], 1 behind it: which half a token is in.   ids (B, T) -> (B, T)."""
    return F.pad((ids == tokenizer.encode("[SEP]")[0]).cumsum(1)[:, :-1], (1, 0)).clamp(max=1)  # (B, T)


def hide(data, index, generator):
    """These rows with fresh noise -> (noisy ids, segments, targets), (B, T) each. Column 0 of targets is the label."""
    ids = data.ids[index]                                                      # (B, T)
    ids = ids[:, :int((ids != PAD).any(0).nonzero().max()) + 1]  # columns that are empty in all rows go
    noisy, targets = mask_tokens(ids, data.mask_rate, data.tokenizer.mask_id, data.tokenizer.n_vocab, generator)
    # Nothing is asked about the tokens of a wrong pair: the other half says something else, and asking would teach not
    # to trust it. Trap: hiding nothing there. A [MASK] then means "they match", and the label can be read off that.
    # (Noise can also hide where a pair differs, or make it differ: the loss on labels does not reach 0 in training.)
    targets[data.labels[index] == 1] = IGNORE
    targets[:, 0] = data.labels[index]  # [CLS] itself is never hidden
    return noisy, segments_of(noisy, data.tokenizer), targets


# differs from decoder_only.py: draws the noise, too
def get_batch(data, rows, seed, step):
    """-> (noisy ids, segments, targets) of one step, (rows, T) each: a pure function of (seed, step).

    New noise at every step: the same row asks other questions in every epoch ("dynamic masking", RoBERTa, Liu et al.
    2019, arXiv 1907.11692). Trap: drawing it once, when the data is made: every epoch then repeats the same questions.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return hide(data, torch.randint(len(data.ids), (rows,), generator=generator), generator)


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


# --- 6. Decoding: filling in blanks ----------------------------------------------------------------------------------
# Q: Why can an encoder not simply write?
# A: It was trained to fill a blank with everything around it in view. Behind the last word there is nothing on the
#    right, and a new token would change the vectors of all tokens before it: no cache, T passes over T tokens.
@torch.no_grad()
def fill_mask(model, ids, mask_id, segments=None, top_k=5):
    """ids (B, T) with M blanks -> (probabilities (M, K), tokens (M, K)): the K likeliest for each blank, best first."""
    # Q: Two blanks at once?
    # A: One pass gives each blank its own distribution, not the pair's. In "[MASK] [MASK] is a city" San may be the
    #    likeliest first and York the likeliest second: the winners make "San York". unmask() fills one at a time.
    return model.eval()(ids, ids != PAD, segments)[ids == mask_id].softmax(-1).topk(top_k)


@torch.no_grad()
def unmask(model, ids, mask_id, segments=None):
    """Fill the blanks of ids (B, T) one by one, in each row the one that the model is surest of. -> ids without blanks.

    Mask-predict (Ghazvininejad et al. 2019, arXiv 1904.09324) fills several in a pass and takes some back; diffusion
    language models write whole texts in this way.
    """
    # Why the surest first: what is filled helps with the rest, and what was filled wrongly misleads it.
    #     90617 [SEP] [MASK] [MASK]   [MASK] [MASK]  seventeen
    #     90617 [SEP] [MASK] thousand [MASK] [MASK]  seventeen
    #     90617 [SEP] ninety thousand [MASK] [MASK]  seventeen       and so on
    while (blank := ids == mask_id).any():
        logits = model.eval()(ids, ids != PAD, segments)                       # (B, T, V)
        logits[..., mask_id] = -math.inf  # "it is hidden" is no answer
        sure, token = logits.softmax(-1).max(-1)                               # (B, T)
        surest = sure.masked_fill(~blank, -1.0).argmax(1, keepdim=True)        # (B, 1)
        here = torch.arange(ids.size(1), device=ids.device) == surest          # (B, T)
        ids = torch.where(blank & here, token, ids)                            # (B, T)
    return ids


# --- 7. Interchange: published weights in and out --------------------------------------------------------------------
def hf_config(cfg):
    """The config.json of this model: what save_pretrained writes and from_pretrained demands."""
    return dict(model_type="bert", vocab_size=cfg.vocab_size, hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_layer,
                num_attention_heads=cfg.n_head, intermediate_size=4 * cfg.n_embd, type_vocab_size=2,
                max_position_embeddings=cfg.block_size, hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=PAD,
                position_embedding_type="absolute", problem_type="single_label_classification",
                tie_word_embeddings=True, id2label={str(i): f"LABEL_{i}" for i in range(cfg.n_labels or 2)})


# Fields of a config.json that do not change the arithmetic. Any other one that hf_config does not know is refused.
HARMLESS = ("architectures|.*_dropout(_prob)?|(bos|eos|cls|sep)_token_id|(torch_)?dtype|initializer_range|use_cache|"
            "transformers_version|_name_or_path|gradient_checkpointing|id2label|label2id|directionality|pooler_.*")


# Q: How do you know that published weights arrived right?
# A: Compare hidden states with the reference on the same ids, padding and segments included: within 1e-4 in float32.
#    Plausible words in the blanks prove little: without segments, or with the wrong GELU, they still look right.
def from_pretrained(name):
    """A folder in Hugging Face layout, or a repository ("bert-base-uncased") -> BERT in eval mode.

    Reads BertModel, ForMaskedLM, ForPreTraining and ForSequenceClassification; a head that the file lacks stays random,
    with a note. Raises OSError if it cannot be found, ValueError if it is not BERT as built here, RuntimeError for a
    missing, unknown or misshapen tensor. model.folder is where its files are.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    folder = Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Files of the bare encoder leave out "bert."; those from TensorFlow call a norm's vectors gamma and beta. Some keep
    # the numbers 0 1 2 ... (position_ids) and the word table once more (predictions.decoder).
    tensors = {re.sub(r"^(?!bert\.|cls\.|classifier\.)", "bert.", key).replace(".gamma", ".weight").replace(
                   ".beta", ".bias"): tensor for key, tensor in load_file(folder / "model.safetensors").items()
               if not re.search(r"position_ids|predictions\.decoder", key)}
    cfg = Config(data=str(name), block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"],
                 n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"], n_embd=hf["hidden_size"],
                 n_labels=len(tensors.get("classifier.bias", ())))
    for key, value in hf.items():
        # A wrong epsilon or GELU changes no shape: better refused than silently wrong. None and False mean "not used".
        if value not in (hf_config(cfg).get(key, False), None) and not re.fullmatch(HARMLESS, key):
            raise ValueError(f"config.json says {key} = {value!r}, which this file does not implement")
    model = BERT(cfg)
    # (A classifier without a pooler labels single tokens: that is another model, and its pooler is missed below.)
    heads = ["cls.predictions", "cls.seq_relationship"] + ["bert.pooler"] * (not cfg.n_labels)
    absent = tuple(head for head in heads if not any(key.startswith(head) for key in tensors))
    model.load_state_dict(tensors | {key: p for key, p in model.state_dict().items() if key.startswith(absent)})
    print("heads that the file lacks, so that they are random here:", ", ".join(absent) or "none")
    model.folder = folder
    return model.eval()


def save_pretrained(model, folder):
    """Write config.json and model.safetensors: each of transformers' four BERT classes takes the heads that it has.
    --load needs a tokenizer.json beside them."""
    from safetensors.torch import save_file
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in model.named_parameters()},
              Path(folder, "model.safetensors"), {"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(hf_config(model.cfg)), encoding="utf-8")


# --- 8. Main: train, ask, report -------------------------------------------------------------------------------------
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


@torch.no_grad()
def cloze(model, data, cfg):
    """Hide 15 % of one half's tokens, in pairs that match. -> dict of shares that the model (in eval mode) gets right.

    The other half is whole and tells everything, so a perfect reader has 1.0. Against that, "_alone": with the other
    half hidden, what a token's own half tells. Digits tell nothing of each other; of words, grammar tells some.
    """
    # Q: A model guesses 86 % of the hidden tokens. Is that good?
    # A: Ask what can be known. With 15 % hidden anywhere, a digit and its word are sometimes both gone: who knows the
    #    language by heart gets 87 %. So we hide where the answer can be known, and say what guessing gets.
    rows, words, results = data.ids[data.labels == 0], torch.arange(18) > 7, {}
    # Pads, [CLS] and [SEP] throw a 1: they are never hidden.
    dice = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)).masked_fill(rows < len(SPECIAL), 1)
    for name, half in (("digits", ~words), ("words", words)):
        asked = half & (dice < 0.15)                                           # (R, 18)
        for kind, hidden in (("", asked), ("_alone", asked | ~half & (dice < 1.0))):
            ids = rows.masked_fill(hidden, data.tokenizer.mask_id).to(cfg.device)  # (R, 18)
            guess = model(ids, ids != PAD, segments_of(ids, data.tokenizer)).argmax(-1).cpu()  # (R, 18)
            results[f"cloze_{name}{kind}"] = (guess == rows)[asked].float().mean().item()
    return results | dict(cloze_accuracy=(results["cloze_digits"] + results["cloze_words"]) / 2)


@torch.no_grad()
def label_accuracy(model, data, cfg):
    """Share of the rows whose label the model (in eval mode) gets right, with nothing hidden."""
    guesses = []
    for ids in data.ids.to(cfg.device).split(cfg.batch_size):
        x = model.hidden(ids, ids != PAD, segments_of(ids, data.tokenizer))    # (B, T, C)
        guesses.append(model.label(x, ids != PAD).argmax(-1).cpu())            # (B)
    return (torch.cat(guesses) == data.labels).float().mean().item()


def answer(model, tokenizer, cfg, prompt):
    """What the model (in eval mode) makes of a text: label, the likeliest tokens of each blank, all blanks filled."""
    ids = torch.tensor([tokenizer.encode(f"[CLS] {prompt} [SEP]")], device=cfg.device)  # (1, T)
    if ids.size(1) > cfg.block_size:
        raise ValueError(f"the prompt has {ids.size(1)} tokens, the model reads {cfg.block_size}")
    segments = segments_of(ids, tokenizer)                                     # (1, T)
    logits = model.label(model.hidden(ids, None, segments))[0]                 # (G)
    # Trap: softmax for a model with one output. It was trained to give a number (a rating), and softmax says 1.000.
    lines = [f"label logits {[round(z, 2) for z in logits.tolist()]}: class {logits.argmax()}"]
    for p, tokens in zip(*fill_mask(model, ids, tokenizer.mask_id, segments), strict=True):
        guesses = [f"{tokenizer.decode([token])} {q:.3f}" for token, q in zip(tokens.tolist(), p, strict=True)]
        lines.append("[MASK]: " + "  ".join(guesses))
    return "\n".join([*lines, tokenizer.decode(unmask(model, ids, tokenizer.mask_id, segments)[0].tolist())])


def load(cfg):
    """What --resume or --load names -> (model, tokenizer, checkpoint to resume or None). Raises ValueError if none."""
    path = Path(cfg.out if cfg.resume else cfg.load, "" if Path(cfg.load).is_file() and not cfg.resume else "ckpt.pt")
    try:
        if cfg.resume or path.is_file():
            # weights_only: a pickle may run any code when opened; this refuses everything but tensors and plain data.
            state = torch.load(path, map_location="cpu", weights_only=True)
            model = BERT(Config(**state["config"]))
            model.load_state_dict(state["model"])
            return model.eval().to(cfg.device), make_tokenizer(*state["tokenizer"]), state if cfg.resume else None
        model = from_pretrained(cfg.load).to(cfg.device)
        return model, make_tokenizer("json", (model.folder / "tokenizer.json").read_text(encoding="utf-8")), None
    except Exception as problem:  # files, zip, pickle and torch each have their own kinds; here all mean the same
        raise ValueError(f"{path.parent} holds no model of {Path(__file__).name}: {problem}") from problem


def main(cfg):
    """Train (or --resume, or start from --load) and report; with --load and --prompt only answer. -> the model."""
    if min(cfg.n_head, cfg.max_steps, cfg.batch_size, cfg.grad_accum, cfg.eval_every) < 1 or cfg.n_embd % cfg.n_head:
        raise ValueError("n_head must divide n_embd; heads, steps and batch sizes start at 1")
    model, tokenizer, state = load(cfg) if cfg.resume or cfg.load else (None, None, None)
    if cfg.resume:  # all settings as they were, except --out and --device
        cfg = dataclasses.replace(model.cfg, resume=True, out=cfg.out, device=cfg.device)
    elif cfg.load:  # the shape of what was loaded
        shape = {k: vars(model.cfg)[k] for k in "block_size n_layer n_head n_embd vocab_size n_labels".split()}
        cfg, model.cfg.dropout = dataclasses.replace(cfg, **shape), cfg.dropout
        if cfg.prompt or cfg.data == "numbers" != model.cfg.data:  # or nothing to train on
            print(answer(model, tokenizer, cfg, cfg.prompt))
            return model
    train_data, val_data, tokenizer, prompt = (number_data if cfg.data == "numbers" else sentence_data)(cfg, tokenizer)
    n_labels = cfg.n_labels if cfg.mask_rate else 1 + int(max(train_data.labels.max(), val_data.labels.max()))
    cfg = dataclasses.replace(cfg, vocab_size=max(cfg.vocab_size, tokenizer.n_vocab), n_labels=n_labels)
    torch.manual_seed(cfg.seed)
    model = (model or BERT(cfg)).to(cfg.device)
    if n_labels != model.cfg.n_labels:  # fine-tuning: a new head on the old body
        model.cfg.n_labels, model.classifier = n_labels, nn.Linear(cfg.n_embd, n_labels, device=cfg.device)
    # From here on as in every script: train, measure what the task is about, save, show.
    print(f"{cfg.data}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_data.ids):,} rows")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "ckpt.pt").is_file() and not cfg.resume:
        os.link(out / "ckpt.pt", kept := out / time.strftime("ckpt-%Y%m%d-%H%M%S.pt"))
        print(f"note: {out} holds a trained model, it is kept as {kept.name}")
    questions = hide(val_data, torch.arange(len(val_data.ids)), torch.Generator().manual_seed(0))  # always the same
    history = train(model, cfg, train_data, questions, tokenizer.spec, state)
    results = cloze(model, val_data, cfg) if cfg.data == "numbers" else {}
    if cfg.data == "numbers" or not cfg.mask_rate:
        results["match_accuracy" if cfg.data == "numbers" else "accuracy"] = label_accuracy(model, val_data, cfg)
    text = f"{prompt}\n{answer(model, tokenizer, cfg, prompt)}"
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=results, history=history, sample=text, **history[-1])))
    plot_curve(out / "curve.png", history, f"{Path(__file__).name} on {Path(cfg.data).name}".replace("$", r"\$"))
    print(f"\n{text}\n\nReached:", *(f"{k} {v:.4f}" for k, v in (history[-1] | results).items()),
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
