# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface-hub>=0.30", "matplotlib>=3.8", "requests>=2.31", "safetensors>=0.4.3", "tiktoken>=0.7",
#                 "tokenizers>=0.21", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
GPT-2 IN ONE FILE                                python decoder_only.py             90 s on two CPU cores

Paper    Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2); the block is the decoder of
         Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762, with the norms moved in front (pre-norm)
Idea     Predict the next token, everywhere at once. A row of T tokens holds T exercises: from the first t tokens guess
         token t+1. A mask that hides the future lets one forward pass do all T of them, and the same weights then
         write text: guess, append the guess, guess again.
Picture  ids (B,T) -> wte + wpe (B,T,C) -> n_layer x [x + attn(ln_1(x)); x + mlp(ln_2(x))] -> ln_f -> lm_head (B,T,V)
Symbols  B batch   T tokens in a call   S = past + T   C n_embd   H heads   D head size = C/H   V vocabulary   K beams
New here everything: this is the parent of the family. Later models are read as a difference from this one.
Not here RoPE, RMSNorm, grouped queries (llama3.py), experts (qwen3_moe.py), prompts of unequal length (kv_cache.py)
Expect   validation loss 1.71 nats per character after 2,000 steps on Tiny Shakespeare, 1.25 on Python's help texts
Asked    Why divide by sqrt(D)?   What does the mask cost?   Why tie the head?   What does the KV cache save?
         Why is the first loss about ln V?   Why not average the micro-batches' means?   What is top-p?   (grep "# Q:")

    python decoder_only.py                                     train on Shakespeare (offline: on Python's help texts)
    python decoder_only.py --data my.txt --max-steps 5000      on your own text
    python decoder_only.py --load runs/decoder_only --prompt "ROMEO:"        let it write
    python decoder_only.py --load gpt2 --prompt "The meaning of life is"     with published weights
    python decoder_only.py --resume                            continue after Ctrl-C or a crash
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
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# --- 1. Config: every setting in one place ---------------------------------------------------------------------------
# A field is a flag (--n-layer 6) and its comment the help text. Each is explained where it is used.
@dataclasses.dataclass
class Config:
    data: str = "auto"                # auto | shakespeare | pydocs | path of a UTF-8 text file
    tokenizer: str = "char"           # char: one id per character of the text | gpt2, cl100k_base ...: tiktoken's BPE
    out: str = "runs/decoder_only"    # folder for checkpoint, curve and summary
    seed: int = 1337                  # decides initial weights, batches and samples
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda | mps (check its losses against cpu)
    resume: bool = False              # continue the run in --out with its settings, bit for bit
    # Shape. The defaults are the size of nanoGPT's CPU run: 0.8 million parameters, a context of 64 characters.
    block_size: int = 64              # longest context in tokens
    n_layer: int = 4                  # blocks
    n_head: int = 4                   # attention heads; each is n_embd / n_head wide
    n_embd: int = 128                 # width of the residual stream
    vocab_size: int = 0               # 0 = as many as the tokenizer has; 50304 = 128 * 393 is faster on GPUs than 50257
    dropout: float = 0.0              # share of activations zeroed in training; needed when text is seen many times
    # Optimization. 2,000 steps x 12 rows x 64 characters = 1.5 million predictions: 1.5 passes over Shakespeare.
    max_steps: int = 2000             # optimizer steps
    batch_size: int = 12              # rows per micro-step
    grad_accum: int = 1               # micro-steps per optimizer step
    lr: float = 3e-3                  # peak learning rate; small models take large ones (nanoGPT's 124M: 6e-4)
    warmup_steps: int = 100           # steps of linear warm-up
    beta2: float = 0.99               # memory of Adam's second moment: 0.99 looks back about 100 steps
    eval_every: int = 250             # steps between evaluations on the validation split, each with a checkpoint
    # Decoding. 0.8 is a common choice for small models: their unlikely tokens are mostly mistakes.
    load: str = ""                    # run folder, Hugging Face folder or repository to start from
    prompt: str = ""                  # text to continue; together with --load nothing is trained
    max_new_tokens: int = 400         # tokens to write
    temperature: float = 0.8          # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0                    # sample among the k likeliest only; 0 = all
    top_p: float = 1.0                # sample among the likeliest that together have probability p
    beams: int = 1                    # above 1: beam search, without temperature, top-k, top-p


PRESETS = {
    "laptop": {},  # the defaults above
    # nanoGPT's GPU run: 10.8 million parameters on 1 MB of text. It sees each character 80 times: hence the dropout.
    "shakespeare": dict(data="shakespeare", n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2,
                        max_steps=5000, lr=1e-3),
    # Half a million tokens a step. The paper does not give batch, rate and betas; these are nanoGPT's. Larger GPT-2s
    # differ in --n-layer, --n-head, --n-embd alone: medium 24 16 1024, large 36 20 1280, xl 48 25 1600.
    "gpt2": dict(tokenizer="gpt2", block_size=1024, n_layer=12, n_head=12, n_embd=768, batch_size=12, grad_accum=40,
                 max_steps=600_000, lr=6e-4, warmup_steps=2000, beta2=0.95, eval_every=2000),
}


# --- 2. Model: from one attention head up to the whole ---------------------------------------------------------------
# Everything below reads from and adds to one tensor, the residual stream x (B, T, C): C numbers per token, which start
# as "what am I" and end as "what comes next".
#     ids --embed--> x ---+-------------------> + ---+-----------------> + --> ... --> norm --lm_head--> logits
#                         |                     ^    |                   ^
#                         +-> norm -> attention +    +-> norm -> mlp ----+        (one of n_layer blocks)

# The mask for T = S = 4 (x = may attend). Row t is a training exercise of its own, "given tokens 0..t, what is t+1":
# without the mask row t would find its answer in column t+1, and the loss would fall to 0 by copying.
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
    # Trap: aligning at the top left (what is_causal=True does when T < S): query t then sees keys 0..t only, and a
    # single new token nothing but the first one. Symptom: good text without a cache, nonsense with it.
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)       # (T, S)


# Attention is a soft dictionary lookup. Each token makes three vectors: a query (what do I look for?), a key (what do I
# offer?) and a value (what do I hand over?). Query . key is a score, softmax turns a row of scores into weights that
# sum to 1, and the result is the weighted mean of the values. Scores (2, 0) give the weights (.88, .12).
def attention(q, k, v, mask):
    """Scaled dot-product attention, written out: softmax(q k^T / sqrt(D)) v   (Vaswani et al. 2017, eq. 1).

    q (B, H, T, D), k and v (B, H, S, D), mask bool, broadcastable to (B, H, T, S), True = may attend -> (B, H, T, D).
    This is the definition. The model calls F.scaled_dot_product_attention: the same numbers from one fused kernel.
    """
    # Q: Why divide by sqrt(D)?
    # A: q.k adds up D products of unit-variance numbers: variance D, so at D=64 scores of +-24 are only 3 sigma away.
    #    Softmax of those is a hard maximum whose gradient p(1-p) vanishes. The division brings the variance back to 1.
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                   # (B, H, T, S)
    # exp(-inf) = 0: a hidden key gets no weight. Trap: multiplying the *probabilities* by the mask instead. Rows then
    # sum to less than 1, and the future still acts through the denominator.
    scores = scores.masked_fill(~mask, -math.inf)                              # (B, H, T, S)
    # Q: What does the mask cost?
    # A: Half of the attention matmuls: T x S scores are computed, those above the diagonal thrown away. All scores are
    #    T / (6*C) of the block's other matmuls, 22 % in GPT-2 (1024/4608). flash_attention.py skips what is hidden.
    return scores.softmax(-1) @ v                                              # (B, H, T, D)


# CPU libraries leave the product of a single row, as in writing token by token, to one core, and it waits for the
# weights from memory. A second, equal row makes them use all cores: 2.3 times as fast for GPT-2's head on two cores.
def linear(x, weight):
    """x (..., in), weight (out, in) -> x weight^T (..., out)."""
    if x.numel() > weight.size(1):
        return F.linear(x, weight)
    return (weight @ x.view(1, -1).repeat(2, 1).t())[:, 0].view(*x.shape[:-1], -1)


class CausalSelfAttention(nn.Module):
    """Each token asks (q) all tokens up to itself (k) and takes a weighted mean of what they carry (v).

    H heads do this side by side on D numbers each: one may look at the previous character while another looks
    for the speaker's name. One wide head could only take one weighted mean per token.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)  # q, k and v in one product: one large matmul beats three
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)      # mixes the heads, which know nothing of each other so far

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H, D = self.cfg.n_head, C // self.cfg.n_head
        # c_attn's 3*C outputs are q, k and v side by side, each of them H heads side by side. The head axis goes before
        # time: matmul works on the last two axes, so each (batch, head) pair becomes its own T x D problem.
        # Trap: view(3, B, H, T, D) has the right shape and the wrong numbers: it cuts along time, not along heads.
        q, k, v = self.c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)    # (B, H, T, D) each
        # Q: Why q and k and not one vector for both?
        # A: One vector z for both would make the score z_i . z_j symmetric, but "a verb looks for its subject" is not.
        #    Two projections let what a token seeks differ from what it offers, for C*C more weights per layer.
        if cache is not None:
            k, v = cache.append(self, k, v)                                    # (B, H, S, D) each
        # softmax(q k^T / sqrt(D)) v in one fused call. It works in tiles and never stores the T x S scores: in GPT-2 at
        # T = 1024 these are 12 heads x 1 Mi x 4 bytes = 48 MiB per row and layer, written and read several times.
        S, rate = k.size(2), self.cfg.dropout if self.training else 0.0
        mask = causal_mask(T, S, x.device) if 1 < T < S else None  # a single new token may see everything
        y = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal=T == S and T > 1)  # (B, H, T, D)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), rate)  # (B, T, C)


class MLP(nn.Module):
    """Most of a block's weights, applied to each token alone: attention moves information, this works on it.

    mlp(x) = c_proj(GELU(c_fc(x))): 4*C detectors, each of which adds its own direction to the stream when it fires.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)    # 4 x: the 2017 paper's choice (512 -> 2048)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        # GELU(x) = x * P(N(0,1) < x), a ReLU without the corner (Hendrycks & Gimpel 2016, arXiv 1606.08415).
        # Trap: GPT-2 was trained with the tanh approximation; PyTorch's default is the exact erf form. They differ by
        # up to 5e-4 per activation: enough that loaded weights no longer agree with the published model in digit 3.
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.cfg.dropout, self.training)


class Block(nn.Module):
    """Read from the residual stream, add to it: first the attention, then the MLP."""

    # Q: Why is the norm inside the branch (pre-norm) and not behind the sum, as in the 2017 paper and BERT?
    # A: x passes through plain additions from the embedding to the head, so the gradient arrives whole. Post-norm
    #    rescales it after each of 2 * n_layer branches and needs a long warm-up (Xiong et al. 2020, arXiv 2002.04745).
    def __init__(self, cfg):
        super().__init__()
        # LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + 1e-5) * weight + bias over the C numbers of a token, var divided
        # by C (Ba et al. 2016, arXiv 1607.06450). The stream grows with depth; the norm lets each branch read one size.
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = CausalSelfAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)                                 # (B, T, C)
        return x + self.mlp(self.ln_2(x))                                      # (B, T, C)


class GPT(nn.Module):
    """Module names are those of the published weights.

    Parameters: V*C + block_size*C + n_layer * (12*C*C + 13*C) + 2*C. GPT-2: 38.60 + 0.79 + 85.05 = 124.44 million.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(cfg.vocab_size, cfg.n_embd),    # what the token is
            wpe=nn.Embedding(cfg.block_size, cfg.n_embd),    # where it stands: without it only the mask tells order
            h=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
            ln_f=nn.LayerNorm(cfg.n_embd)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # Q: Why tie the head to the token embedding?
        # A: Both say what a token means, on the way in and on the way out (Press & Wolf 2017, arXiv 1608.05859). V*C
        #    numbers are saved: 24 % of an untied GPT-2, 7 % of an 8B Llama, which therefore does without.
        self.lm_head.weight = self.transformer.wte.weight
        # Initial weights are random, because equal units would get equal gradients and stay equal; and x @ W keeps the
        # size of x if W has std 1/sqrt(width of x), here C for all. GPT-2 took 0.02: good at 1600, too small at 128.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Each block adds two branches to the stream, and the variance of a sum grows with the number of terms.
                # Dividing the last matrix of each branch by sqrt(2 * n_layer) keeps it (GPT-2 paper, section 2.3).
                nn.init.normal_(p, 0, (cfg.n_embd * (2 * cfg.n_layer if "c_proj" in name else 1)) ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, cache=None):
        """ids (B, T) int64 -> logits (B, T, V): row t scores token t+1. cache holds the tokens before them, if any."""
        past, T = cache.length if cache is not None else 0, ids.size(1)
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[past:past + T]  # (B, T, C)
        x = F.dropout(x, self.cfg.dropout, self.training)                      # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cache)                                                # (B, T, C)
        if cache is not None:
            cache.length += T
        # Pre-norm leaves the sum of all branches unnormalized; without this last norm its size, which grows with depth,
        # would act as a temperature on the logits.
        return linear(self.transformer.ln_f(x), self.lm_head.weight)           # (B, T, V)


# --- 3. Objective: the next token, T times per row -------------------------------------------------------------------
#     inputs    F  i  r  s  t     row t of the logits has seen inputs 0..t and is scored on targets[t].
#     targets   i  r  s  t  _     One shift, made once, in section 4. Trap: shifting in the data AND in the loss trains
#                                 the token after the next; the loss falls all the same, and the text is gibberish.
# The mean of this loss over a text is its cross-entropy. Other names for the same number, here for a loss of 1.7:
#     perplexity     exp(1.7) = 5.5      the model is as unsure as if it chose among 5.5 equally likely characters
#     bits per byte  1.7 / ln 2 = 2.45   a compressor that uses this model's guesses needs 2.45 bits a character, not 8

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def compute_loss(model, inputs, targets):
    """inputs, targets (B, T) -> sum of -ln p(target) over the targets that count, in nats."""
    # Q: Why is the first loss about ln V?
    # A: An untrained model gives each of V tokens about 1/V, and -ln(1/V) = ln V: 4.17 for 65 characters. Logits of
    #    variance s^2 add s^2/2 to it. Here s^2 = 1 (rows of the head have length 1, the last norm makes the variance
    #    1), so the first loss is about ln V + 0.5. Far above that, the logits start too large.
    logits = model(inputs)                                                     # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


# --- 4. Data: text -> rows of ids ------------------------------------------------------------------------------------
# The SHA-256 is checked: a proxy's error page or an edited copy would train as well, to a number that means nothing.
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def load_text(name):
    """-> (text, name of what was loaded). auto = Tiny Shakespeare in ./data (or $LLM_DATA), else downloaded, else
    Python's own help texts (pydocs). Raises OSError if there is no such file, ValueError if it is not UTF-8."""
    if name in ("auto", "shakespeare"):
        (url, sha256), path = SHAKESPEARE, Path(os.environ.get("LLM_DATA", "data"), "tinyshakespeare.txt")
        try:
            if not path.is_file():
                import requests
                content = requests.get(url, timeout=(3, 60)).content  # 3 s to connect: an offline laptop must not hang
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise OSError(f"{url} is not the expected file: its SHA-256 differs")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return path.read_text(encoding="utf-8"), "shakespeare"
        except OSError as problem:  # requests' exceptions are OSErrors too
            if name == "shakespeare":
                raise
            print(f"no Tiny Shakespeare, so Python's own help texts ({str(problem)[:100]})")
    if name in ("auto", "pydocs"):
        from pydoc_data.topics import topics
        return "\n\n".join(topics[key] for key in sorted(topics)), "pydocs"
    return Path(name).read_text(encoding="utf-8-sig"), name  # -sig: a byte-order mark is not a letter


# Q: Characters or byte-level BPE?
# A: Characters: a small table, nothing to learn in advance, but many tokens. GPT-2's BPE: each id covers about 3.3
#    characters of Shakespeare, so the same context reaches further; but the embedding has 50,257 * C weights.
#     text  "First Citizen:\n..."   --tokenizer-->   ids [18, 47, 56, 57, 58, 1, ...]   --windows-->   rows (R, T)
# encode: text -> list of ids; decode: back; eos: the id that ends a text, -1 = none; make_tokenizer(*spec) rebuilds it.
Tokenizer = namedtuple("Tokenizer", "spec encode decode n_vocab eos")


def make_tokenizer(kind, text=""):
    """kind char: text = all characters; json: text = a Hugging Face tokenizer.json; else a name that tiktoken knows.

    Raises ValueError for an unknown name; encode raises it for a character that the vocabulary lacks.
    """
    if kind == "char":
        ids = {character: i for i, character in enumerate(text)}

        def encode(string):
            if unknown := set(string) - set(ids):
                raise ValueError(f"the vocabulary of this model lacks {sorted(unknown)[:5]}")
            return [ids[character] for character in string]
        return Tokenizer((kind, text), encode, lambda row: "".join(text[i] for i in row), len(text), -1)
    if kind == "json":
        import tokenizers
        inner = tokenizers.Tokenizer.from_str(text)
        return Tokenizer((kind, text), lambda string: inner.encode(string).ids, inner.decode, inner.get_vocab_size(),
                         max(inner.get_vocab().get(eos, -1) for eos in ("<|endoftext|>", "<|end_of_text|>")))
    import tiktoken
    bpe = tiktoken.get_encoding(kind)
    return Tokenizer((kind, ""), bpe.encode_ordinary, bpe.decode, bpe.n_vocab, bpe.eot_token)


def text_rows(ids, block_size, stride):
    """ids (n,) -> (inputs, targets), each (rows, T): windows of one text that start every `stride` tokens.

    ids 0 1 2 3 4 5 6 with T = 3, stride 1:  inputs 012 123 234 345   targets 123 234 345 456
                               stride 3:     inputs 012 345           targets 123 456
    stride 1 to train: any start is a row. stride T to validate: every token is predicted once (not the first, nor a
    tail shorter than T)."""
    # unfold makes a view: a million windows that overlap share one text in memory instead of holding T copies of it.
    return ids[:-1].unfold(0, block_size, stride), ids[1:].unfold(0, block_size, stride)


def make_data(cfg, tokenizer=None):
    """-> (train rows, validation rows, tokenizer, name, bytes per validation token). tokenizer None: make cfg's."""
    text, name = load_text(cfg.data)
    tokenizer = tokenizer or make_tokenizer(cfg.tokenizer, "".join(sorted(set(text))))
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)               # (n)
    # The last tenth is held out in one piece. Random windows would not do: neighbors share all but one token.
    train, val = ids.tensor_split([int(0.9 * len(ids))])
    if len(val) <= cfg.block_size:
        raise ValueError(f"{name} is too short: a tenth of its {len(ids)} tokens is less than block_size + 1")
    return (text_rows(train, cfg.block_size, 1), text_rows(val, cfg.block_size, cfg.block_size), tokenizer, name,
            len(tokenizer.decode(val.tolist()).encode()) / len(val))


def get_batch(data, rows, seed, step):
    """-> (inputs, targets) of one step, (rows, T) each: a pure function of (seed, step), so a resume needs no state."""
    # Trap: seeding with seed + step. Seed 1 at step 5 is then seed 2 at step 4.
    index = torch.randint(len(data[0]), (rows,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    return tuple(part[index] for part in data)  # one gather per tensor, no Python loop over rows


# --- 5. Training: one loop, resumable bit for bit --------------------------------------------------------------------
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


# --- 6. Decoding: from distributions to text -------------------------------------------------------------------------
# A language model gives a distribution over the next token. What to do with it is decided outside the model:
#     greedy       take the likeliest. Good for exact answers; open text falls into loops
#     sampling     draw. temperature sharpens or flattens; top-k and top-p cut off the unlikely tokens: each is rare,
#                  but in 400 draws one comes up often enough to derail a text
#     beam search  keep several prefixes, to find a likelier whole than greedy does

# The cuts on the distribution [.50 .30 .15 .05]:
#     temperature 0.5   [.68 .25 .06 .01]   p^(1/0.5), renormalized      temperature 2   [.38 .29 .21 .12]
#     top_k 2           [.62 .38  0   0 ]   top_p 0.8 the same: .50 + .30 reach 0.8     top_p 0.81   [.53 .32 .16  0 ]
def sample_next(logits, temperature, top_k=0, top_p=1.0, generator=None):
    """logits (B, V) -> one token per row (B,). temperature 0 = the likeliest, exactly; top_k 0 and top_p 1 = no cut."""
    if temperature <= 0:  # Trap: dividing by it, or a "greedy" that is really temperature 0.1 and errs now and then
        return logits.argmax(-1)                                               # (B)
    # Temperature before the cuts: a hot distribution is flatter, so that more tokens are needed to reach p.
    probs, token = (logits / temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    probs[:, top_k or logits.size(-1):] = 0
    # Q: What is top-p (nucleus) sampling?
    # A: Keep the smallest set of tokens whose probability reaches p, and sample among those (Holtzman et al. 2019,
    #    arXiv 1904.09751). Unlike top-k the set adapts: 1 token after "New Yor", hundreds after "I saw a".
    # Drop a token when the ones BEFORE it already have p, but never the first. Trap: comparing the sum that includes
    # the token itself drops the one that crosses p.
    before = (probs.cumsum(-1) - probs)[:, 1:]                                 # (B, V-1)
    probs[:, 1:][before >= top_p * probs.sum(-1, keepdim=True)] = 0
    return token.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]  # (B)


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


@torch.inference_mode()  # like no_grad, and no version counters: a tenth faster
def next_logits(model, ids, cache):
    """Logits (B, V) for the token after ids (B, n). cache holds nothing, or all of ids but the last column."""
    size = model.cfg.block_size
    if cache.length == size:
        # The context is full. Keep its newer half and read it again from position 0: one prefill per block_size / 2
        # tokens. Old columns cannot just be dropped: the others know their positions (GPT-2) and what those had said.
        cache.length = 0
        ids = ids[:, -(size // 2 + 1):]
    return model(ids[:, -size:] if cache.length == 0 else ids[:, -1:], cache)[:, -1]  # (B, V)


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, eos=-1, generator=None,
             on_token=lambda token: None):
    """Continue every row of ids (B, T). -> the new ids only, (B, N), N <= max_new_tokens. eos fills a row that ended.

    on_token(token (B,)) is called for each new column, for streaming. Leaves the model in eval mode.
    """
    start, cache = ids.size(1), KVCache(min(model.cfg.block_size, ids.size(1) + max_new_tokens))
    model.eval()  # Trap: training mode left on; dropout, where there is any, then damages every sample
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)         # (B)
    # The first pass reads the whole prompt and is limited by arithmetic; each further one reads all weights for one
    # token per row and is limited by memory: a long answer costs more than a long question.
    for _ in range(max_new_tokens):
        token = sample_next(next_logits(model, ids, cache), temperature, top_k, top_p, generator).where(~ended, eos)
        ended = token == eos                                                   # (B)
        ids = torch.cat((ids, token[:, None]), 1)                              # (B, n)
        on_token(token)
        if ended.all():
            break
    return ids[:, start:]                                                      # (B, N)


# Probabilities multiply along a text, and 0.5^400 = 1e-120 is 0 in float32; log-probs add up instead. Keep the K best
# prefixes, try all V continuations of each, keep the K best of those K*V, and put texts that ended aside.
# K = 2 beams, log-probs added up along the path, the two best of all continuations kept at every step:
#
#     prompt --+-- a  -0.6 --+-- b -2.1
#              |             +-- c -2.3   cut: two others are better
#              +-- d  -0.9 --+-- e -1.0   the winner begins with the second-best first token: greedy would miss it
#                            +-- f -4.0   cut
@torch.no_grad()
def beam_search(model, ids, max_new_tokens, num_beams=4, length_penalty=1.0, eos=-1):
    """Continue ids (1, T). -> [(score, new ids)] of the num_beams best, best first.

    score = sum of log-probs / length ** length_penalty, the length counting the eos. The search ends when the best
    running beam, scored at its present length, is no better than the worst finished one (Hugging Face's rule).
    """
    # Q: Why is the most probable text often a poor one, and the search still used?
    # A: Open-ended text of highest probability is bland and repeats itself; people do not write likely words only. With
    #    one right answer (translation, numbers to words) the likeliest text is what you want, and greedy choice can
    #    lose it: a first word of 0.4 whose best sequel has 0.9 beats a first word of 0.6 with 0.5.
    start, K, finished = ids.size(1), num_beams, []
    cache = KVCache(min(model.cfg.block_size, start + max_new_tokens))
    model.eval()
    ids = ids.repeat(K, 1)                                                     # (K, T)
    # All K beams start as the same prompt, so all but the first start at -inf: otherwise step 1 would keep K copies of
    # its best token.
    scores = torch.tensor([0.0] + [-math.inf] * (K - 1), device=ids.device)    # (K)
    for n in range(1, max_new_tokens + 1):
        logp = next_logits(model, ids, cache).float().log_softmax(-1) + scores[:, None]  # (K, V)
        # Each beam offers at most one ending, so 2K candidates always hold K that go on.
        top, index = logp.flatten().topk(min(2 * K, logp.numel()))             # (2*K)
        beam, token = index // logp.size(1), index % logp.size(1)              # (2*K)
        ids = torch.cat((ids[beam], token[:, None]), 1)                        # (2*K, n)
        ends = (token == eos) | (n == max_new_tokens)                          # (2*K)
        # An ending counts only among the K best: at rank K+1 the prefix would have been cut, had it gone on.
        finished += [(top[i].item() / n ** length_penalty, ids[i, start:].tolist()) for i in range(K) if ends[i]]
        finished = sorted(finished, reverse=True)[:K]
        alive = (~ends).nonzero()[:K, 0]  # K indices, none in the last round
        if len(alive) == 0 or (len(finished) == K and top[alive[0]] / n ** length_penalty <= finished[-1][0]):
            break
        scores, ids = top[alive], ids[alive]
        # Row i of the cache becomes the old row beam[i]. The survivors may all stem from one beam.
        cache.layers = {layer: kv[:, beam[alive]] for layer, kv in cache.layers.items()}
    return finished


# --- 7. Interchange: published weights in and out --------------------------------------------------------------------
# A safetensors file is a JSON header (name, dtype, shape, offset) and then the raw numbers: no code, unlike a pickle.
# Our module names are the published ones, so a checkpoint is a dict {name: tensor} on both sides.
# One thing differs: OpenAI's code kept these four matrices as (in, out), in a layer called Conv1D; nn.Linear keeps
# (out, in). Trap: attn.c_proj is square, so a forgotten transpose passes every shape check; only the text is nonsense.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SHAPE = dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd")


def hf_config(cfg):
    """The config.json of this model: what save_pretrained writes and from_pretrained demands."""
    # Trap: leaving out the special ids. transformers fills in its own, which a model of 65 characters lacks.
    return {theirs: getattr(cfg, ours) for ours, theirs in SHAPE.items()} | dict(
        model_type="gpt2", n_inner=4 * cfg.n_embd, activation_function="gelu_new", layer_norm_epsilon=1e-5,
        scale_attn_weights=True, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=50256 if cfg.vocab_size > 50256 else None)


# Fields of a config.json that do not change the arithmetic. Any other one that hf_config does not know is refused.
HARMLESS = ("architectures|.*_p?drop(out)?|.*_token_id|summary_.*|(torch_)?dtype|n_ctx|initializer_range|use_cache|"
            "n_special|output_past|predict_special_tokens|pretraining_tp|transformers_version|_.*|task_.*|unsloth_.*")


# Q: How do you know that published weights arrived right?
# A: Compare logits with the reference on the same ids: within 1e-4 in float32, not equal, since sums of C products in
#    another order round differently. Reading the text proves little: with a slightly wrong formula it still reads well.
def from_pretrained(name):
    """A folder in Hugging Face layout, or a repository on its hub -> the model in eval mode.

    Raises OSError if it cannot be found, ValueError if this file does not implement it, RuntimeError for a missing,
    unknown or misshapen tensor. model.folder is where its files are.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    folder = Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cfg = Config(**{ours: hf[theirs] for ours, theirs in SHAPE.items()})
    for key, value in hf.items():
        # A wrong epsilon changes no shape: better refused than silently wrong. None and False mean "not used".
        if value not in (hf_config(cfg).get(key, False), None) and not re.fullmatch(HARMLESS, key):
            raise ValueError(f"config.json says {key} = {value!r}, which this file does not implement")
    # Some files call it transformer.wte.weight, some wte.weight; the tied head may be there or not; old files carry 12
    # causal masks, 50 of 548 MB.
    tensors = {key.removeprefix("transformer."): tensor.t() if key.endswith(TRANSPOSED) else tensor
               for file in sorted(folder.glob("model*.safetensors")) for key, tensor in load_file(file).items()
               if not key.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))}
    model = GPT(cfg)
    model.transformer.load_state_dict(tensors)  # into float32, whatever the file holds
    model.folder = folder
    return model.eval()


def save_pretrained(model, folder):
    """Write config.json and model.safetensors (in parts of 5 GB), which transformers and from_pretrained read. --load
    needs a tokenizer.json beside them."""
    from huggingface_hub import save_torch_state_dict
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(hf_config(model.cfg)), encoding="utf-8")
    # named_parameters() names a shared tensor once, state_dict() twice; safetensors refuses two names for one memory.
    save_torch_state_dict({name: (p.t() if name.endswith(TRANSPOSED) else p).detach()
                           for name, p in model.named_parameters()}, folder)


# --- 8. Main: train, look at the result, report ----------------------------------------------------------------------
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


def write_text(model, tokenizer, cfg, prompt, max_new_tokens, on_token=lambda token: None):
    """Continue `prompt` as cfg says. -> the new text."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=cfg.device)          # (1, T)
    # A generator of its own: looking at samples during training must not change the training.
    new = beam_search(model, ids, max_new_tokens, cfg.beams, eos=tokenizer.eos)[0][1] if cfg.beams > 1 else generate(
        model, ids, max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, tokenizer.eos,
        torch.Generator(cfg.device).manual_seed(cfg.seed), on_token)[0].tolist()
    return tokenizer.decode([token for token in new if token != tokenizer.eos and token < tokenizer.n_vocab])


def load(cfg):
    """What --resume or --load names -> (model, tokenizer, checkpoint to resume or None). Raises ValueError if none."""
    path = Path(cfg.out if cfg.resume else cfg.load, "" if Path(cfg.load).is_file() and not cfg.resume else "ckpt.pt")
    try:
        if cfg.resume or path.is_file():
            # weights_only: a pickle may run any code when opened; this refuses everything but tensors and plain data.
            state = torch.load(path, map_location="cpu", weights_only=True)
            model = GPT(Config(**state["config"]))
            model.load_state_dict(state["model"])
            return model.to(cfg.device), make_tokenizer(*state["tokenizer"]), state if cfg.resume else None
        model = from_pretrained(cfg.load).to(cfg.device)
        return model, make_tokenizer("json", (model.folder / "tokenizer.json").read_text(encoding="utf-8")), None
    except Exception as problem:  # files, zip, pickle and torch each have their own kinds; here all mean the same
        raise ValueError(f"{path.parent} holds no model of {Path(__file__).name}: {problem}") from problem


def main(cfg):
    """Train (or --resume, or start from --load) and report; with --load and --prompt only write. -> the model."""
    if min(cfg.n_head, cfg.max_steps, cfg.batch_size, cfg.grad_accum) < 1 or cfg.n_embd % cfg.n_head:
        raise ValueError("n_head must divide n_embd; heads, steps and batch sizes start at 1")
    # Three ways in: --resume (weights, optimizer, step), --load (weights only), neither (random weights).
    model, tokenizer, state = load(cfg) if cfg.resume or cfg.load else (None, None, None)
    if cfg.resume:  # all settings as they were, except paths and device
        cfg = dataclasses.replace(model.cfg, resume=True, out=cfg.out, device=cfg.device,
                                  data=model.cfg.data if cfg.data == "auto" else cfg.data)
    elif cfg.load:  # the shape of what was loaded
        cfg, model.cfg.dropout = dataclasses.replace(cfg, **{k: vars(model.cfg)[k] for k in SHAPE}), cfg.dropout
        if cfg.prompt:
            with tqdm(total=cfg.max_new_tokens, unit=" tokens") as bar:
                text = write_text(model, tokenizer, cfg, cfg.prompt, cfg.max_new_tokens, lambda token: bar.update())
                tqdm.write(cfg.prompt + text)
            return model

    train_data, val_data, tokenizer, name, bytes_per_token = make_data(cfg, tokenizer)
    cfg = dataclasses.replace(cfg, data=name, vocab_size=cfg.vocab_size or tokenizer.n_vocab)
    # A model needs something to start from: the first word of the text (max takes the first, if there is any).
    prompt = cfg.prompt or max(re.findall(r"\w+|\W", tokenizer.decode(train_data[0][0].tolist())), key=str.isalnum)
    tokenizer.encode(prompt)  # an unknown character is an error now and not after the training
    torch.manual_seed(cfg.seed)
    model = (model or GPT(cfg)).to(cfg.device)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, ln V = {math.log(cfg.vocab_size):.2f}")
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    if (out / "ckpt.pt").is_file() and not cfg.resume:
        os.link(out / "ckpt.pt", kept := out / time.strftime("ckpt-%Y%m%d-%H%M%S.pt"))
        print(f"note: {out} holds a trained model, it is kept as {kept.name}")
    # The samples show it learn: noise, then spaces, then words, then names.
    history = train(model, cfg, train_data, val_data, tokenizer.spec, state, lambda: tqdm.write(
        f"            {write_text(model, tokenizer, cfg, prompt, min(60, cfg.max_new_tokens))!r}"))
    # Loss per token depends on how long a token is; bits per byte do not. BPE at 3.5 nats and 3.5 bytes a token has
    # 3.5 / ln 2 / 3.5 = 1.44 bits per byte and beats characters at 1.7 nats (2.45), whose loss looks half as large.
    results = dict(bits_per_byte=history[-1]["val_loss"] / math.log(2) / bytes_per_token)
    text = prompt + write_text(model, tokenizer, cfg, prompt, cfg.max_new_tokens)
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=results, history=history, sample=text, **history[-1])))
    plot_curve(out / "curve.png", history, f"{Path(__file__).name} on {Path(name).name}".replace("$", r"\$"))
    print(f"\n{text.strip()}\n\nReached:", *(f"{k} {v:.4f}" for k, v in (history[-1] | results).items()),
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
