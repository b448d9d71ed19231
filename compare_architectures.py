# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
WHICH ARCHITECTURE FOR WHAT?                     python compare_architectures.py    an hour on two CPU cores

Idea     Ask with equal means: the same number of parameters, the same rows and steps, the same search over learning
         rates for every architecture, several seeds, and each task in the form that is natural for the model. A
         difference is claimed only where a test over seeds leaves one; sentences are computed from the tables.
Picture  task      asked                       BERT               GPT-2, Llama 3, Qwen3, MoE      T5
         names     40215 -> forty thousand ... ten blanks         go on behind "40215="           read, then write
         match     is it this number's name?   class of [CLS]     token behind the last one       first token written
         review    was the film liked?         class of [CLS]     token behind the last one       first token written
         text      next character              -                  from GPT-2 to Qwen3 MoE, one change at a time
Symbols  B batch   T time   C n_embd   H heads   K key/value heads   V vocabulary   F feed-forward width   L layers
Not here pre-training and size, which decide most comparisons one hears of: here all models are small and fresh
Expect   steps until 95 % of the names are right: T5 200, GPT-2 465, Llama 3 560, BERT 1360. Reviews: bag of words 78.8
         %, T5 76.9 %, BERT 75.1 %. Text, bits per byte: GPT-2 2.90, Llama 3 2.75, Qwen3 2.73. Which differences are
         certain: docs/results.md
Asked    Equal parameters, work or time?   Why search rates for all?   When is a difference a difference?   Why has BERT
         no bits per byte?   What do you ask before you believe a table?   Why are FLOPs no times?   (grep "# Q:")

    python compare_architectures.py                       all four: 225 trainings, counted as they are planned
    python compare_architectures.py --quick               names and text, shortened: minutes
    python compare_architectures.py --tasks match         one question
"""
import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
import llama3
import qwen3_moe
import toy_dataset


# --- 1. Config: how much to compare ----------------------------------------------------------------------------------
@dataclasses.dataclass
class Config:
    tasks: str = "names,match,review,text"      # which questions to ask
    data: str = "auto"                          # of text: auto | shakespeare | pydocs | path of a UTF-8 file
    rates: str = "1e-3,2.4e-3,5.8e-3"           # learning rates to begin the search with, a factor of 2.4 apart
    seeds: int = 5                              # seeds that are reported, at each model's best rate
    jobs: int = 2                               # trainings at once, one thread each
    quick: bool = False                         # names and text, a part of the steps, fewer rates and seeds
    out: str = "runs/compare_architectures"     # folder for tables, pictures and what each training reached


PRESETS = {"default": {}}
# All are fresh: no model of this size has been published, and a pre-trained one would win by its training. One
# script holds the dense Qwen3 and its mixture (4 experts, of which a token visits 2).
MODELS = ("BERT", "GPT-2", "T5", "Llama 3", "Qwen3", "Qwen3 MoE")
# All models of a task get these. Equal rows are equal tokens read: a row holds the same text in every form. The small
# vocabularies put nearly all parameters into matrices, where architectures differ; in reviews, with 3,000 words, two
# thirds are the table, as in real models of this size.
# wanted: the toy tasks are learned by everybody in the end, so the question is how soon: steps until this share of
# held-out answers is right. (A comparison at the ceiling tells nobody apart.) The others are read after all steps.
TASKS = {
    "names": dict(n_layer=2, n_embd=64, block_size=20, rows=64, steps=1500, wanted=0.95),
    "match": dict(n_layer=2, n_embd=64, block_size=20, rows=64, steps=2500, wanted=0.95),
    "review": dict(n_layer=2, n_embd=64, block_size=40, rows=64, steps=300),
    "text": dict(n_layer=3, n_embd=96, block_size=64, rows=16, steps=500),
}
SHORT = dict(names=dict(steps=800), text=dict(steps=100))
SEARCH_SEED = 101  # never one of those that are reported
SST2 = "https://github.com/clairett/pytorch-sentiment-classification (data/SST2, train.tsv and dev.tsv)"


# What one would expect before anything is measured. Compare it with what comes out.
#     names     A decoder reads "40215=" from the left, and has seen all digits when it writes the first word. T5 has
#               separate weights for reading and writing, half as many for each. BERT must agree with itself: ten blanks
#               are guessed, and words that are likely alone need not fit together.
#     match     Comparing two halves is easiest when each sees the other in every layer: BERT. A decoder's second half
#               sees the first, not the other way round, and one token has to sum up.
#     review    6,200 sentences are too few to learn English from: hardly any difference, all near a bag of words.
#     text      Rotary positions and SwiGLU help; grouped queries cost a little; a mixture has as many weights, but each
#               token uses half of its experts.


# --- 2. Model: equal size, and the walk between two architectures ----------------------------------------------------
# Q: Equal parameters, work or time?
# A: Each favours somebody. Equal parameters: a mixture does half of the feed-forward work, so it may lose a little.
#    Equal work: it usually wins, with more weights. Equal time: who has the best kernels wins. What limits you decides:
#    memory (a phone), arithmetic (training), latency (a chat). Here parameters, rows and steps are equal; work and time
#    are shown.
def parameters(model, task=""):
    """How many numbers are trained. BERT has heads for words and for classes; a task uses one of them."""
    unused = re.compile({"": "-", "names": "pooler|seq_relationship|classifier"}.get(task, "predictions|seq_rel"))
    return sum(p.numel() for name, p in model.named_parameters() if not unused.search(name))


# GPT-2 sets the size. Its feed-forward width and BERT's are 4*C by definition; the others have a width that can be
# chosen. Multiples of 8 because kernels like them; a step is 1 to 3 % of the parameters here. Within 5 % is equal.
def fit_width(build, target):
    """The F, a multiple of 8, with which build(F) comes nearest to `target` parameters."""
    with torch.device("meta"):  # shapes without memory
        small, large = (parameters(build(width)) for width in (8, 16))
    return max(8, 8 * round(1 + (target - small) / (large - small)))  # the count is a straight line in F


def make_model(name, shape):
    """A fresh model of one architecture with about as many parameters as GPT-2 of this shape (a dict of settings)."""
    C, shape = shape["n_embd"], dict(n_head=4, device="cpu", **shape)
    gpt = decoder_only.GPT(decoder_only.Config(**shape))
    if name in ("GPT-2", "BERT"):  # F is 4*C by definition, in both
        return gpt if name == "GPT-2" else encoder_only.BERT(encoder_only.Config(**shape, n_labels=2))
    changes = WALK.get(name, STEPS if name == "Qwen3 MoE" else ())
    modern = dict(shape, n_kv_head=2, tie_weights=True)  # one table for embedding and head, as in GPT-2 and T5

    def build(width):
        if name == "T5":  # two stacks of L blocks, the second with two attentions: a quarter narrower
            return encoder_decoder.T5(encoder_decoder.Config(**shape | dict(
                n_embd=C * 3 // 4, head_size=C // 4, ffn_size=width)))
        if name == "Llama 3":
            return llama3.Llama(llama3.Config(**modern, ffn_size=width))
        cfg = qwen3_moe.Config(**modern, head_size=C // 4, ffn_size=width, n_experts=4 if "moe" in changes else 0)
        return Walk(cfg, changes) if name in WALK else qwen3_moe.Qwen3(cfg)
    # Up to "swiglu" the walk has GPT-2's feed-forward layer, whose width is no choice.
    return build(8 if name in WALK and "swiglu" not in changes else fit_width(build, parameters(gpt)))


# The walk. From GPT-2 to Qwen3 MoE in six steps; biases go with their part, eps is 1e-5 throughout. The parts are those
# of the scripts: the first model is decoder_only.py's GPT itself, what stands after "gqa" is llama3.py's Llama (tied,
# as in its small sizes), after "qk" Qwen3, after "moe" its mixture.
#     rope     learned positions -> rotations of q and k     Su et al. 2021           and attention loses its biases
#     rms      LayerNorm -> RMSNorm                          Zhang & Sennrich 2019    one vector fewer per norm
#     swiglu   gelu(x W) -> silu(x W1) * (x W2)              Shazeer 2020             three matrices, each narrower
#     gqa      4 key/value heads -> 2                        Ainslie et al. 2023      half of the cache
#     qk       RMSNorm on every q and k head                 Henry et al. 2020        bounded scores: against spikes
#     moe      one feed-forward layer -> 2 of 4 experts      Shazeer et al. 2017      half of the feed-forward work
# Equal parameters here too: SwiGLU's third matrix is paid with a smaller F, and what grouped queries save goes into F;
# the experts share it out. Only the first three have GPT-2's layer, 4*C wide.
# What a walk cannot say: how changes work in another order, at another size, after a thousand times as many tokens.
# Grouped queries and mixtures are made for sizes where memory and arithmetic are what one pays for.
STEPS = ("rope", "rms", "swiglu", "gqa", "qk", "moe")
WALK = dict(zip(("GPT-2", "+ RoPE", "+ RMSNorm", "+ SwiGLU", "+ GQA = Llama 3", "+ QK-norm = Qwen3",
                 "+ experts = Qwen3 MoE"), (STEPS[:i] for i in range(7)), strict=True))


class Walk(nn.Module):
    """A decoder between GPT-2 and Qwen3 MoE: it has RoPE, and of the other changes those that are named.
    model(ids (B, T)) -> logits (B, T, V). cfg: a qwen3_moe.Config.
    """

    def __init__(self, cfg, changes):
        super().__init__()
        self.cfg = cfg = dataclasses.replace(cfg, n_kv_head=2 if "gqa" in changes else cfg.n_head)
        cfg.dropout, C = 0.0, cfg.n_embd  # dropout: GPT-2's feed-forward layer asks for it

        def norm():
            return nn.RMSNorm(C, eps=1e-5) if "rms" in changes else nn.LayerNorm(C)
        # Each step replaces the part of the one before it.
        attention = qwen3_moe.Qwen3Attention if "qk" in changes else llama3.GroupedQueryAttention
        mlp = (qwen3_moe.MixtureOfExperts if "moe" in changes else llama3.SwiGLU
               if "swiglu" in changes else decoder_only.MLP)
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, C),
            layers=nn.ModuleList(nn.ModuleDict(dict(norm1=norm(), attn=attention(cfg), norm2=norm(), mlp=mlp(cfg)))
                                 for _ in range(cfg.n_layer)),
            norm=norm()))
        # Initial weights as in the scripts: the last matrix of each branch smaller, so that 2L sums do not grow.
        for name, p in self.named_parameters():
            last = re.search("c_proj|o_proj|down_proj", name)
            if p.dim() == 2:
                nn.init.normal_(p, 0, (C * (2 * cfg.n_layer if last else 1)) ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids):
        # Training only, so no cache and no padding: what attention may see is the causal triangle, always.
        x = self.model.embed_tokens(ids)                                       # (B, T, C)
        rope = llama3.rope_angles(torch.arange(ids.size(1)), self.cfg.head_size, self.cfg.rope_theta, 1)  # (T, D) each
        for layer in self.model.layers:
            x = x + layer.attn(layer.norm1(x), rope)                           # (B, T, C)
            x = x + layer.mlp(layer.norm2(x))                                  # (B, T, C)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)    # (B, T, V)


# --- 3. Objective: right or wrong, in each model's own form ----------------------------------------------------------
# Every script's own compute_loss trains its models: the next token, the hidden ones, the target given the source; the
# mixture with its balancing loss. What follows is the question of the comparison: what share of the
# held-out answers is right?
SCRIPTS = {"BERT": encoder_only, "T5": encoder_decoder, "GPT-2": decoder_only, "Llama 3": llama3}


@torch.no_grad()
def share_right(name, task, model, data):
    """Share of rows that are right as a whole. data: what prepare() holds out."""
    model.eval()
    if name == "BERT" and task == "names":
        # Q: Why is writing with an encoder slow, when it fills all blanks at once?
        # A: At once it fills them badly: "forty" and "four" may both be likely in the first place, and no blank knows
        #    what another took. Going one by one mends that and costs a pass over the whole row each: every token's
        #    vector depends on every blank, so nothing can be cached. A decoder's ten steps are passes over one token.
        ids, segments, targets = data
        blank = ids.masked_fill(segments == 1, toy_dataset.MASK)               # (R, T)
        guess = encoder_only.unmask(model, blank, toy_dataset.MASK, segments)  # (R, T)
        return (guess == ids).all(1).float().mean().item()
    if name == "BERT":
        ids, _, targets = data
        guess = model.label(model.hidden(ids, ids != 0), ids != 0).argmax(-1)  # (R)
        return (guess == targets[:, 0]).float().mean().item()
    # What is right must be right as a whole: a name with one wrong word is a wrong number.
    # Greedy decoding writes the whole answer rightly exactly if each token is the likeliest behind the right ones
    # before it. So one pass over the right answer tells, and nothing has to be written token by token.
    inputs, targets = data
    tgt = [F.pad(targets[:, :-1], (1, 0)).clamp(min=0)] if name == "T5" else []  # what T5's decoder reads
    guess = model(inputs, *tgt).argmax(-1)                                     # (R, T)
    return ((guess == targets) | (targets == toy_dataset.IGNORE)).all(1).float().mean().item()


# Q: An encoder or a decoder to classify texts?
# A: Small and fresh: see what comes out here. Pre-trained: an encoder of 0.1 billion weights does the work of a decoder
#    many times its size, for it was trained on nothing but understanding. A large decoder needs no training for a new
#    task: describe the classes in the prompt. Few texts and no labels: the decoder. Millions a day: the encoder.


# --- 4. Data: one task in three forms --------------------------------------------------------------------------------
#              BERT                                 decoders                          T5: source -> target
#     names    [CLS] 4 2 [SEP] [M] x 10             4 2 = forty two \n                4 2 \n -> forty two \n
#     match    [CLS] 4 2 [SEP] forty six [SEP]      the same, then yes or no          the same -> yes or no
#     review   [CLS] a fine film [SEP]              the same, then yes or no          the same -> yes or no
# The rows of a task hold the same content in all forms. Held-out rows are split once more: by `choose` the rate is
# found, on `test` the result is measured. Trap: doing both on the same rows. Who tries more rates wins, by luck alone.
# Which tokens a task needs: the toy language has 46; judges get two more, "no" and "yes", at the end of the vocabulary.
def names_rows(name, numbers):
    """Numbers and their names -> tensors as the model's compute_loss wants them."""
    if name == "T5":
        source, _, targets = toy_dataset.seq2seq_rows(numbers)
        return source, targets
    if name != "BERT":
        return toy_dataset.decoder_rows(numbers)[:2]
    # Ten places for every name, so that its length has to be guessed too: \n says "nothing more".
    heads = [[toy_dataset.CLS, *toy_dataset.encode_toy(str(n)), toy_dataset.SEP] for n in numbers]
    answers = [toy_dataset.encode_toy(toy_dataset.number_to_words(n)) for n in numbers]
    rows = [head + answer + [toy_dataset.EOS] * (10 - len(answer))
            for head, answer in zip(heads, answers, strict=True)]
    ids, mask = toy_dataset.pad_rows(rows)
    behind = torch.arange(ids.size(1)) >= torch.tensor([len(head) for head in heads])[:, None]  # (R, T)
    return ids, (behind & mask).long(), torch.full_like(ids, toy_dataset.IGNORE)


# What the causal mask costs a judge: "forty" is read without knowing what follows, and cannot be read again. What it
# gains: the same model writes. (T5 judges with one written token; its decoder's self-attention, an eighth of its
# weights, then has nothing to choose from.)
def judge_rows(name, ids, yes, V):
    """Texts ids (R, T), padded with 0, and a verdict `yes` (R) of 0 or 1. Verdicts are the tokens V and V + 1."""
    targets = torch.full_like(ids, toy_dataset.IGNORE)                                     # (R, T)
    if name == "BERT":  # class 0 is yes
        targets[:, 0] = 1 - yes
        return ids, torch.zeros_like(ids), targets
    if name == "T5":
        return ids, V + yes[:, None]
    # Trap: asking at position -1. In a padded row that is a pad, and the answer depends on the longest row.
    targets[torch.arange(len(ids)), (ids != 0).sum(1) - 1] = V + yes
    return ids, targets


@functools.cache
def toy_numbers():
    """-> numbers to train on, to choose rates by, to test on: no held-out one in training, none in both others."""
    held = list(dict.fromkeys(toy_dataset.draw_numbers(4_000, 8, True)))
    return toy_dataset.draw_numbers(60_000, 1337, False), held[:500], held[500:1000]


# SST-2's dev set is kept for the end. A tenth of the training sentences, by the hash of their text, is what rates are
# chosen by; words are learned from the remaining ones alone.
@functools.cache
def reviews():
    """SST-2: sentences of film reviews, 0 or 1 -> three lists of (text, label): train, choose, test; and the pieces."""
    files = [Path(os.environ.get("LLM_DATA", "data"), f"sst2.{split}.tsv") for split in ("train", "dev")]
    train, test = ([(text, int(label)) for text, _, label in (
        line.rpartition("\t") for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip())]
        for file in files)
    held = [int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0 for text, _ in train]
    train, choose = ([row for row, out in zip(train, held, strict=True) if out == side] for side in (False, True))
    return train, choose, test, encoder_only.make_tokenizer(
        "pieces", encoder_only.learn_vocabulary([text for text, _ in train], 3000))


def bag_of_words():
    """Share of SST-2's test reviews judged rightly by logistic regression on which words occur, order ignored.
    The baseline that a model which reads order must beat. Wang & Manning 2012, "Baselines and bigrams".
    """
    train, _, test, _ = reviews()
    words = {word for text, _ in train for word in encoder_only.split_words(text)}
    ids = {word: i for i, word in enumerate(sorted(words), 1)}
    # A bag is a list of word ids; 0 is in every bag, its weight is the bias.
    bags = [[[0, *{ids[word] for word in encoder_only.split_words(text) if word in ids}] for text, _ in part]
            for part in (train, test)]
    y, y_test = (torch.tensor([label for _, label in part]) for part in (train, test))
    weight = torch.zeros(len(ids) + 1, 2, requires_grad=True)

    def scores(bags):  # the sum of a bag's weights, in one call for all bags
        starts = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]             # (R)
        return F.embedding_bag(torch.tensor([i for bag in bags for i in bag]), weight, starts, mode="sum")  # (R, 2)

    # The loss is convex: one minimum, no luck, no learning rate. Penalty 1/2 |w|^2. L-BFGS takes all rows at once.
    def closure():
        weight.grad = None
        loss = F.cross_entropy(scores(bags[0]), y, reduction="sum") + 0.5 * weight.square().sum()
        loss.backward()
        return loss
    torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe").step(closure)
    return (scores(bags[1]).argmax(1) == y_test).float().mean().item()


@functools.cache
def prepare(task, name, data):
    """-> (train, choose, test) tensors as the model's compute_loss takes them, vocabulary size, bytes per token.
    Cached, so that a worker makes a task's rows once for all its trainings.
    """
    if task == "text":
        text, _ = decoder_only.load_text(data)
        tokenizer = decoder_only.make_tokenizer("char", "".join(sorted(set(text))))
        ids, T = torch.tensor(tokenizer.encode(text)), TASKS["text"]["block_size"]
        # The last tenth is held out, in two pieces. Random windows would not do: neighbors share nearly all.
        train, choose, test = ids.tensor_split([int(0.9 * len(ids)), int(0.95 * len(ids))])
        rows = [decoder_only.text_rows(part, T, 1 if part is train else T) for part in (train, choose, test)]
        return rows, tokenizer.n_vocab, len(text.encode()) / len(text)
    if task == "review":
        *parts, tokenizer = reviews()
        rows = [(nn.utils.rnn.pad_sequence([torch.tensor(tokenizer.encode(f"[CLS] {text}")[:39]) for text, _ in part],
                                           batch_first=True), torch.tensor([label for _, label in part]))
                for part in parts]
        return [judge_rows(name, ids, yes, tokenizer.n_vocab) for ids, yes in rows], tokenizer.n_vocab + 2, 1
    V, numbers = len(toy_dataset.TOY_VOCAB), toy_numbers()
    if task == "names":
        return [names_rows(name, part) for part in numbers], V, 1
    # Half of the pairs have the name of another number, one that is easily taken for theirs.
    rows = [toy_dataset.encoder_pairs(part, seed) for seed, part in enumerate(numbers)]
    return [judge_rows(name, ids, match, V) for ids, _, _, match in rows], V + 2, 1


# --- 5. Training: many small runs, each kept -------------------------------------------------------------------------
# The scripts' recipes are tuned for their own tasks. Here no model may have a better-tuned one than another, so all get
# the same, and the one number that matters most and differs most, the learning rate, is searched for each.
def draw_batch(task, name, data, rows, seed, step):
    """decoder_only.py's batch, and for BERT as a writer fresh blanks: a random share of the ten, from none to all.

    Trap: 15 %, as in pre-training. The first pass then sees ten blanks, which training never showed (Ghazvininejad et
    al. 2019, arXiv 1904.09324, section 3).
    """
    batch = decoder_only.get_batch(data, rows, seed, step)
    if (task, name) != ("names", "BERT"):
        return batch
    ids, segments, targets = batch
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    share = torch.rand(len(ids), 1, generator=generator)                       # (B, 1)
    hidden = (segments == 1) & (torch.rand(ids.shape, generator=generator) < share)  # (B, T)
    return ids.masked_fill(hidden, toy_dataset.MASK), segments, torch.where(hidden, ids, targets)


@torch.no_grad()
def quality(task, name, model, rows, bytes_per_token):
    """What a task reports, on held-out rows: bits per byte of a text, the share of right answers elsewhere."""
    if task != "text":
        return share_right(name, task, model, rows)
    model.eval()
    loss = sum(qwen3_moe.compute_loss(model, *part).item() for part in zip(*(r.split(256) for r in rows), strict=True))
    # Bits per byte and not nats per token: the unit that does not depend on how the text was cut into tokens.
    return loss / rows[1].numel() / math.log(2) / bytes_per_token


# What a finished training leaves is one number; its model is thrown away.
def begin(task, name, seed, data):
    """-> (fresh model of the task's size, the loss of its script)."""
    shape = {key: TASKS[task][key] for key in ("n_layer", "n_embd", "block_size")}
    torch.manual_seed(seed)
    model = make_model(name, shape | dict(vocab_size=prepare(task, name, data)[1]))
    return model, SCRIPTS.get(name, qwen3_moe).compute_loss


def train_cell(cell):
    """One training, called a cell: a dict of all settings that decide its result. -> what is reported.

    Toy tasks: the step at which the wanted share was right for the first time, looked at every 25 steps; the constant
    learning rate makes steps comparable. Other tasks: the measure after all steps, the rate having fallen to 0.
    """
    torch.set_num_threads(1)  # a matrix of 64 x 64 is too little to share out; two runs side by side are twice the work
    task, name, seed, steps = cell["task"], cell["model"], cell["seed"], cell["steps"]
    (train, *held), _, bytes_per_token = prepare(task, name, cell["data"])
    wanted = TASKS[task].get("wanted")
    rows = held[cell["split"] == "test"]
    model, loss_fn = begin(task, name, seed, cell["data"])
    # Seed and step decide weights and batches, so that under one seed all models see the same rows in the same order.
    # One recipe for all: AdamW, clipping at 1, warm-up over 50 steps, then constant or half a cosine down to 0.
    cfg = decoder_only.Config(lr=cell["lr"], warmup_steps=50, max_steps=10 ** 9 if wanted else steps, device="cpu")
    optimizer = decoder_only.make_optimizer(model, cfg)
    for step in range(1, steps + 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = decoder_only.lr_at(step - 1, cfg)
        batch = draw_batch(task, name, train, TASKS[task]["rows"], seed, step)
        loss = loss_fn(model, *batch) / (batch[-1] != toy_dataset.IGNORE).sum().clamp(min=1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if wanted and step % 25 == 0 and quality(task, name, model, rows, 1) >= wanted:
            return step
    value = steps if wanted else quality(task, name, model, rows, bytes_per_token)
    return value if math.isfinite(value) else 99.0  # a rate at which a model diverges is never chosen


# A cell is one training: a dict of everything that decides its result, plain data, so that it can be sent to a worker,
# written into a file, and compared with one that was written months ago. Equal dicts, equal results: nothing is trained
# twice.
#
# The scripts' code is part of it: what an older script trained is trained again. After a change in this file, empty the
# folder trainings/ by hand.
@functools.cache
def scripts_hash():
    """SHA-256 of the scripts that are compared, without comments and docstrings."""
    import ast
    modules = (*SCRIPTS.values(), qwen3_moe, toy_dataset)
    trees = [ast.parse(Path(module.__file__).read_text(encoding="utf-8")) for module in modules]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()


# Processes and not threads: a seed, OpenMP's threads and the interpreter's lock belong to a process. spawn and not
# fork: fork copies a process whose threads are not copied, and the copy waits for them for ever.
def start_worker():
    """In each worker: Ctrl-C is the parent's business, and when the parent is gone nobody needs the result."""
    import multiprocessing
    import signal
    import threading
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def train_cells(cells, cfg, pool, bar):
    """-> values of the cells. What was trained before, with the same settings and code, is read from cfg.out.
    Waits for all of them; each is written down as soon as it is there, so that Ctrl-C loses what is under way alone.
    """
    folder = Path(cfg.out, "trainings")
    paths = [folder / (hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:24] + ".json")
             for cell in cells]
    missing = {pool.submit(train_cell, cell): (cell, path) for cell, path in zip(cells, paths, strict=True)
               if not path.is_file()}
    bar.total += len(missing)
    for future in concurrent.futures.as_completed(missing):
        cell, path = missing[future]
        # Whole or not at all: renaming is one operation for the file system.
        path.with_suffix(".tmp").write_text(json.dumps(cell | dict(value=future.result())))
        os.replace(path.with_suffix(".tmp"), path)
        bar.set_postfix_str(f"{cell['task']}: {cell['model']} lr {cell['lr']:g} -> {future.result():.4g}")
        bar.update()
    return [json.loads(path.read_text())["value"] for path in paths]


# Trap: choosing the rate by the result that is reported. Somebody who tries ten rates on the test rows reports the
# luckiest of ten.
#
# Q: Why do architectures want different learning rates?
# A: A rate says how far a weight moves per step; what that does to the output depends on the path behind it. With the
#    norm behind the sum (BERT's post-norm) gradients near the output are large at the start, and high rates throw the
#    model off (Xiong et al. 2020, arXiv 2002.04745). Norms in front of each branch, and on q and k, bound what a step
#    can do, and such models often take higher rates.
#
# Q: Why search rates for all?
# A: The best rate differs between architectures, and a wrong one can cost more than most architectural changes bring.
#    Whoever tunes the own model and takes the other's rate from a paper measures the tuning. Here everybody tries the
#    same rates, on a seed and rows that are not reported; an optimum counts when a lower and a higher rate did worse.
def search(cell, lower, cfg, pool, bar):
    """-> ({rate: what it reached}, the best). While the best is at an edge the search goes on, up to 8 rates."""
    rates, found = [float(rate) for rate in cfg.rates.split(",")][:2 if cfg.quick else None], {}
    while rates:
        values = train_cells([cell | dict(lr=rate, seed=SEARCH_SEED, split="choose") for rate in rates], cfg, pool, bar)
        found.update(zip(rates, values, strict=True))
        best = (min if lower else max)(found, key=found.get)
        edge = {min(found): 1 / 2.4, max(found): 2.4}.get(best)
        rates = [float(f"{best * edge:.2g}")] if edge and not cfg.quick and len(found) < 8 else []
    return dict(sorted(found.items())), best


def compare_model(task, name, cfg, pool, bar):
    """One model's part in one task: its search, then the reported seeds. -> {"rates", "lr", "values"}."""
    budget = TASKS[task] | (SHORT.get(task, {}) if cfg.quick else {})
    cell = budget | dict(task=task, model=name, data=cfg.data if task == "text" else task, code=scripts_hash())
    rates, best = search(cell, task != "review", cfg, pool, bar)
    values = train_cells([cell | dict(lr=best, seed=seed, split="test") for seed in range(1, cfg.seeds + 1)],
                         cfg, pool, bar)
    return dict(rates=rates, lr=best, values=values)


# --- 6. Decoding: what a model costs ---------------------------------------------------------------------------------
# Q: Why are FLOPs no times?
# A: They count multiplications and additions, not bytes moved, kernels started or cores idle. A mixture does half of
#    the feed-forward work and need not be faster, because it sorts rows. Counting is still worth it: it does not depend
#    on the machine, and at large widths products are nearly all there is.
def costs(task, names, data):
    """-> {name: (parameters, MFLOP of a forward pass per row, ms of a forward and backward pass)}, on two threads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    torch.set_num_threads(2)
    ready, flops, times = {}, {}, {name: [] for name in names}
    for name in names:
        model, loss_fn = begin(task, name, 1, data)
        ready[name] = model, loss_fn, draw_batch(task, name, prepare(task, name, data)[0][0], TASKS[task]["rows"], 1, 1)
        # torch counts by itself; attention only in its plain form. As trained here: a decoder that judges computes
        # logits at every position and uses one, BERT and T5 compute the one.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            loss_fn(model, *ready[name][2])
        flops[name] = counter.get_total_flops() / TASKS[task]["rows"] / 1e6
    # Turns: a machine that slows down for ten seconds slows everybody down. The first turn warms up, and of the other
    # ten the sixth in order is shown: a mean would count the moment in which something else woke up.
    for _ in range(11):
        for name, (model, loss_fn, batch) in ready.items():
            start = time.perf_counter()
            loss_fn(model, *batch).backward()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (parameters(ready[name][0], task), flops[name], sorted(times[name][1:])[5]) for name in names}


# Q: When is a difference a difference?
# A: When it is larger than what another seed does. All models see the same batches under one seed, so differences are
#    taken seed by seed, and a t test asks whether their mean could be 0. Six models make 15 pairs, of which one in 20
#    looks different by luck, hence Holm's correction: the smallest p must be below 0.05 / 15, the next 0.05 / 14 ...
#    Trap: calling models level whose ranges over seeds touch. More seeds then find fewer differences.
def p_value(differences):
    """Two-sided p of a t test on n paired differences (Student 1908)."""
    n, mean = len(differences), sum(differences) / len(differences)
    # Without any spread a difference counts as certain, unless it is 0. Two limits: steps are read every 25, so with
    # few seeds equal differences can be chance; and a seed that stopped at the last step would have needed more.
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n) or 1e-300
    # The share of Student's density beyond t. With x = sqrt(n-1) tan(angle) it is an integral of cos(angle)^(n-2).
    angle = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    density, t = angle.cos() ** (n - 2), abs(mean) / spread
    return (density[angle >= math.atan(t / math.sqrt(n - 1))].sum() / density.sum()).item()


# Holm asks the pairs in the order of their p. In the walk only neighbors are asked, 6 pairs and not 21: with fewer
# questions the correction is weaker, and more can be found.
def certain(values, pairs):
    """The pairs whose difference is left after Holm's correction (Holm 1979) at 5 %. values: {name: one per seed}."""
    p = {(a, b): p_value([x - y for x, y in zip(values[a], values[b], strict=True)]) for a, b in pairs}
    left = set()
    for i, pair in enumerate(sorted(p, key=p.get)):
        if p[pair] > 0.05 / (len(p) - i):
            break  # the first that fails takes all larger ones with it
        left.add(pair)
    return left


# Q: A table says that A beats B. What do you ask before you believe it?
# A: Same parameters, same tokens, same search over rates for both? How many seeds, and what is left after the test?
#    Were rates chosen on the rows and seeds that are reported? Is a simple baseline in the table? And last: is the size
#    at which it was measured the size at which you need it?
#
# A sentence that somebody typed is true until the next run. These follow from the numbers by one rule for all models.
def conclude(task, values):
    """Sentences that follow from values {name: [one per seed]}."""
    form, names = ASKED[task][2], list(values)
    mean = {name: sum(values[name]) / len(values[name]) for name in names}
    if len(values[names[0]]) < 2:
        return "One seed each: no difference is certain."
    if task == "text":  # each step against the one before it
        pairs = list(zip(names, names[1:], strict=False))
        left = certain(values, pairs)
        return " ".join(f"{b}: {mean[a]:{form}} -> {mean[b]:{form}}, " + (
            "no certain change." if (a, b) not in left else "lower." if mean[b] < mean[a] else "higher.")
            for a, b in pairs)
    order = sorted(names, key=mean.get, reverse=task == "review")
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1:]]
    left = certain(values, pairs)
    claims = [f"{a} is ahead of {', '.join(b for b in order if (a, b) in left)}." for a in order
              if any(first == a for first, _ in left)]
    return " ".join(claims + ["No other difference is certain."] * (len(left) < len(pairs)))


# --- 8. Main: tables, a picture, and sentences that follow -----------------------------------------------------------
# Q: Why has BERT no bits per byte?
# A: Bits need a probability of the text, a product of p(token | those before it). BERT gives p(token | both sides):
#    each factor has seen the others, and such products do not sum to 1 over all texts.
ASKED = {  # task: the question, what is reported, its format
    "names": ("Who learns soonest to write the names of numbers?", "steps until 95 % of unseen ones are right", ".0f"),
    "match": ("Who learns soonest to see that a name is wrong?", "steps until 95 % of unseen pairs are right", ".0f"),
    "review": ("Who hears whether a film was liked?", "share of SST-2's test reviews judged right", ".1%"),
    "text": ("What does each change to GPT-2 bring?", "bits per byte of unseen text", ".3f")}


# How to read the columns:
#     parameters            those that the task trains. Equal, within 5 % of GPT-2's
#     MFLOP per row         million operations of a forward pass over one row. T5's are about half: a token passes
#                           through one of two stacks
#     ms per step           forward and backward of one batch; the update is the same for all
#     mean of seeds         on rows that neither training nor the choice of the rate has seen
#     rate                  the learning rate that was best for this model
# Compare within a table: a row of names has some 16 tokens, a row of text 64.
def markdown(task, found, prices, steps):
    """One task's table. A seed that never got there is counted with the last step, and named."""
    question, unit, form = ASKED[task]
    lines = [f"**{question}** {unit[0].upper() + unit[1:]}; at most {steps:,} steps of {TASKS[task]['rows']} rows.", "",
             "| model | parameters | MFLOP per row | ms per step | mean of seeds (least to largest) | rate |",
             "|---|---|---|---|---|---|"]
    for name, one in found.items():
        # The baseline has no price: it is trained in seconds, whatever it counts as parameters.
        price = "{:,} | {:.2f} | {:.0f}".format(*prices[name]) if name in prices else "- | - | -"
        got = one["values"]
        never = f", {got.count(steps)} of {len(got)} at the last step or never" if steps in got else ""
        lines.append(f"| {name} | {price} | {sum(got) / len(got):{form}} ({min(got):{form}} to {max(got):{form}}"
                     f"{never}) | {one['lr'] or '-'} |")
    return "\n".join(lines)


def draw_seeds(tasks, path):
    """A panel per task, a line per model, a dot per seed. Where dots of two models overlap, look at the sentences."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 3.4 * ((len(tasks) + 1) // 2)), layout="constrained")
    for i, (task, found) in enumerate(tasks.items(), 1):
        ax = figure.add_subplot((len(tasks) + 1) // 2, min(2, len(tasks)), i)
        # No bars from 0 and no mean with whiskers: five dots say all there is.
        for y, one in enumerate(found.values()):
            ax.plot(one["values"], [y] * len(one["values"]), "o", color="C0", alpha=0.6)
        ax.set_yticks(range(len(found)), found)
        ax.set(title=ASKED[task][0], ylim=(len(found) - 0.5, -0.5),
               xlabel=f"{ASKED[task][1]} ({'more' if task == 'review' else 'less'} is better)")
    figure.savefig(path, dpi=90)


def main(cfg):
    """Train, measure, conclude. -> {task: {model: {"values", "lr", "rates"}}}."""
    import multiprocessing
    start, tasks = time.perf_counter(), [task for task in TASKS if task in cfg.tasks.split(",")]
    # Quick: the same code and sizes, fewer steps, rates and seeds, so fewer differences are certain.
    if cfg.quick:
        tasks, cfg = [task for task in tasks if task in SHORT], dataclasses.replace(cfg, seeds=min(3, cfg.seeds))
    # A question whose data cannot be had is left out and named; the others are answered all the same.
    if "review" in tasks and len(list(Path(os.environ.get("LLM_DATA", "data")).glob("sst2.*.tsv"))) < 2:
        print(f"review is left out: there is no sst2.train.tsv and sst2.dev.tsv in $LLM_DATA or data/; source: {SST2}")
        tasks.remove("review")
    # What is wrong in the command should be said now and not after half an hour of training.
    if not tasks or cfg.seeds < 1 or set(cfg.tasks.split(",")) - set(TASKS):
        raise ValueError(f"--seeds starts at 1, --tasks are some of {', '.join(TASKS)}; here no question is left")
    if "text" in tasks:  # a text that cannot be had is known now, and not in forty workers
        cfg = dataclasses.replace(cfg, data=decoder_only.load_text(cfg.data)[1])
    Path(cfg.out, "trainings").mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=0, unit=" trainings", bar_format="{n}/{total} [{elapsed}] {postfix}")
    pool = concurrent.futures.ProcessPoolExecutor(cfg.jobs, multiprocessing.get_context("spawn"), start_worker)
    # A thread for each model waits for its trainings, so that the workers always have something to do.
    threads, waiting = concurrent.futures.ThreadPoolExecutor(32), {}
    try:
        for task in tasks:
            for name in WALK if task == "text" else MODELS:
                waiting[task, name] = threads.submit(compare_model, task, name, cfg, pool, bar)
        for one in concurrent.futures.as_completed(waiting.values()):
            one.result()  # raises what went wrong in a training, as soon as it does
        found = {task: {name: one.result() for (t, name), one in waiting.items() if t == task} for task in tasks}
    except BaseException as problem:  # a failed training too: the others would go on for nobody
        for worker in multiprocessing.active_children():
            worker.kill()
        stopped = isinstance(problem, KeyboardInterrupt)
        print("\ninterrupted" if stopped else f"\nerror: {problem}", "(what is finished is kept)", file=sys.stderr)
        os._exit(130 if stopped else 1)
    bar.close()
    # Everything is trained. Costs are measured now, in this one process, while nothing else runs; they hardly depend on
    # what the weights are, so fresh models do.
    tables, sentences = "", {}
    for task in tasks:
        print(f"measuring {task}: nothing else should run now", flush=True)
        prices = costs(task, list(found[task]), cfg.data if task == "text" else task)
        if task == "review":
            found[task]["bag of words"] = dict(values=[bag_of_words()] * cfg.seeds, lr=0, rates={})
        sentences[task] = conclude(task, {name: one["values"] for name, one in found[task].items()})
        steps = (TASKS[task] | (SHORT[task] if cfg.quick else {}))["steps"]
        tables += f"{markdown(task, found[task], prices, steps)}\n\n{sentences[task]}\n\n"
    # Nothing below depends on this machine but the times.
    # Tables, sentences and picture are made from the numbers that are kept beside them.
    draw_seeds(found, Path(cfg.out, "comparison.png"))
    seconds = time.perf_counter() - start
    Path(cfg.out, "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), seconds=seconds, results=found, conclusions=sentences, markdown=tables)))
    print(f"\n{tables}{seconds:.0f} s; picture and numbers: {cfg.out}")
    return found


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
