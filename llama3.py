# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface-hub>=0.30", "matplotlib>=3.8", "requests>=2.31", "safetensors>=0.4.3", "tiktoken>=0.7",
#                 "tokenizers>=0.21", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
LLAMA 3 IN ONE FILE                              python llama3.py                  100 s on two CPU cores

Paper    Llama Team 2024, The Llama 3 Herd of Models, arXiv 2407.21783; the block is LLaMA's, arXiv 2302.13971
Idea     GPT-2 after five years of use: task and loop stay; RMSNorm, RoPE, grouped queries and SwiGLU replace four
         parts; biases and dropout go, useless with much text. Read decoder_only.py, then diff decoder_only.py llama3.py
Picture  ids (B,T) -> embed_tokens (B,T,C) -> n_layer x [x + self_attn(norm(x)); x + mlp(norm(x))] -> norm -> lm_head
Symbols  B batch   T tokens   S = past + T   C n_embd   H heads   K key/value heads   D = C/H   F ffn_size   V vocab
New here RMSNorm, RoPE (in place of wpe) and Llama 3.1's stretch of it, GQA, SwiGLU, an untied head, chat
Not here beam search (decoder_only.py), QK-norm and experts (qwen3_moe.py), prompts of unequal length (kv_cache.py)
Expect   validation loss 1.64 nats per character after 2,000 steps on Tiny Shakespeare, 1.21 on Python's help texts
Asked    What does RMSNorm leave out?   Half-split or interleaved?   Why are q and k turned, but not v?   Why fewer keys
         and values, but not fewer queries?   Why three matrices?   How much memory does an 8B model take?

    python llama3.py                                           train on Shakespeare (offline: on Python's help texts)
    python llama3.py --data my.txt --max-steps 5000            on your own text
    python llama3.py --load runs/llama3 --prompt "ROMEO:"      let it write
    python llama3.py --load meta-llama/Llama-3.2-1B-Instruct --chat          talk to published weights
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
    out: str = "runs/llama3"          # folder for checkpoint, curve and summary
    seed: int = 1337                  # decides initial weights, batches and samples
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda | mps (check its losses against cpu)
    resume: bool = False              # continue the run in --out with its settings, bit for bit
    # Shape. The defaults are the size of nanoGPT's CPU run: 0.8 million parameters, a context of 64 characters.
    block_size: int = 64              # longest context in tokens
    n_layer: int = 4                  # blocks
    n_head: int = 4                   # attention heads; each is n_embd / n_head wide
    n_kv_head: int = 2                # heads of keys and values; each serves n_head / n_kv_head query heads (8B: 4)
    n_embd: int = 128                 # width of the residual stream
    ffn_size: int = 384               # width inside the MLP (8B: 14,336)
    vocab_size: int = 0               # 0 = as many as the tokenizer has; 50304 = 128 * 393 is faster on GPUs than 50257
    tie_weights: bool = False         # one table for embedding and head, as in the small models
    rope_theta: float = 10_000.0      # base of the rotation speeds; Llama 3, made for 8,192 tokens: 500,000
    rope_factor: float = 1.0          # stretch of the slow rotations: 8 in Llama 3.1, 32 in 3.2; 1 = none
    # Optimization. 2,000 steps x 12 rows x 64 characters = 1.5 million predictions: 1.5 passes over Shakespeare.
    max_steps: int = 2000             # optimizer steps
    batch_size: int = 12              # rows per micro-step
    lr: float = 3e-3                  # peak learning rate; small models take large ones (nanoGPT's 124M: 6e-4)
    warmup_steps: int = 100           # steps of linear warm-up
    grad_accum, beta2, norm_eps = 1, 0.99, 1e-5  # no types, so no flags: micro-steps, Adam's memory, norms' epsilon
    eval_every: int = 250             # steps between evaluations on the validation split, each with a checkpoint
    # Decoding. 0.8 is a common choice for small models: their unlikely tokens are mostly mistakes.
    load: str = ""                    # run folder, Hugging Face folder or repository to start from
    prompt: str = ""                  # text to continue; together with --load nothing is trained
    chat: bool = False                # talk to the Instruct model that --load names
    max_new_tokens: int = 400         # tokens to write
    temperature: float = 0.8          # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0                    # sample among the k likeliest only; 0 = all
    top_p: float = 1.0                # sample among the likeliest that together have probability p


PRESETS = {"laptop": {}}  # the defaults above


# --- 2. Model: from one attention head up to the whole ---------------------------------------------------------------
# Everything below reads from and adds to one tensor, the residual stream x (B, T, C): C numbers per token, which start
# as "what am I" and end as "what comes next".
#     ids --embed--> x ---+-------------------> + ---+-----------------> + --> ... --> norm --lm_head--> logits
#                         |                     ^    |                   ^
#                         +-> norm -> attention +    +-> norm -> mlp ----+        (one of n_layer blocks)

# RoPE (Su et al. 2021, arXiv 2104.09864). Take two of the D numbers of a query as a point in a plane and turn it by an
# angle that grows with its position m; turn the same two numbers of a key by the angle of *its* position n. Then
#     <turn(q, m*w), turn(k, n*w)>  =  <q, turn(k, (n-m)*w)>        places go in, only the distance n - m comes out
# q.k adds up D/2 planes with D/2 speeds w, like the hands of a clock: the fastest turns 1 radian per token and tells
# neighbors apart; the slowest of Llama 3 (theta 500,000, D = 128) takes 2.6 million tokens: it hardly sees places.
def rope_angles(positions, D, theta, factor):
    """positions (T) -> cos, sin (T, D) of the angles position * w, w = theta^(-2i/D) for plane i, in float32.

    factor is Llama 3.1's stretch. In the 8,192 tokens of pre-training a plane that turns 4 times or more has seen all
    its angles and stays; one that turns once or less is slowed down by the factor, so that factor * 8,192 tokens show
    it no new angle; in between the two are mixed.
    """
    w = 1 / theta ** (torch.arange(0, D, 2, device=positions.device) / D)      # (D/2)
    keep = ((8192 * w / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)              # (D/2)
    w = keep * w + (1 - keep) * w / factor                                     # (D/2)
    # Trap: this product in bfloat16, which cannot tell position 257 from 256.
    angle = positions[:, None] * torch.cat((w, w))                             # (T, D)
    return angle.cos(), angle.sin()


# Q: Half-split or interleaved: which two numbers make a plane?
# A: The paper and Meta's files pair (0, 1), (2, 3), ...; Hugging Face's files, and ours, (0, D/2), (1, D/2 + 1), ...
#    It is a convention of the weights: the rows of W_q and W_k are permuted alike. Reading weights with the wrong one
#    is the commonest RoPE bug; position 0, which is not turned at all, still looks right.
def apply_rope(x, cos, sin):
    """x (B, H, T, D), plane i = (a, b) = (x[i], x[i + D/2]) -> (a cos - b sin, b cos + a sin), (B, H, T, D)."""
    a, b = x.chunk(2, -1)                                                      # (B, H, T, D/2)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)      # (B, H, T, D)


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


class GroupedQueryAttention(nn.Module):
    """Each token asks (q) all tokens up to itself (k) and takes a weighted mean of what they carry (v).

    H heads do this side by side on D numbers each: one may look at the previous character while another looks
    for the speaker's name. One wide head could only take one weighted mean per token.
    """

    # Q: Why fewer keys and values, but not fewer queries (GQA: Ainslie et al. 2023, arXiv 2305.13245)?
    # A: Queries are used once; keys and values stay in the cache, and each written token reads all of them. Llama 3 8B
    #    (32 layers, K 8, D 128) keeps 128 KiB per token in bfloat16 instead of 512: 1 GiB for 8,192 tokens, not 4.
    #    Heads that share what they look at still differ in what they seek: the loss hardly suffers.
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.n_embd
        self.q_proj, self.o_proj = (nn.Linear(C, C, bias=False) for _ in "qo")
        self.k_proj, self.v_proj = (nn.Linear(C, C // cfg.n_head * cfg.n_kv_head, bias=False) for _ in "kv")

    def forward(self, x, rope, cache=None):
        B, T, C = x.shape
        H, K, D = self.cfg.n_head, self.cfg.n_kv_head, C // self.cfg.n_head
        q = linear(x, self.q_proj.weight).view(B, T, H, D).transpose(1, 2)     # (B, H, T, D)
        k = linear(x, self.k_proj.weight).view(B, T, K, D).transpose(1, 2)     # (B, K, T, D)
        v = linear(x, self.v_proj.weight).view(B, T, K, D).transpose(1, 2)     # (B, K, T, D)
        # Q: Why are q and k turned, but not v?
        # A: Positions decide who attends to whom, and that is q.k. The value is what is handed over; it means the same
        #    wherever it came from. Keys are cached turned: their place does not change.
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.append(self, k, v)                                    # (B, K, S, D) each
        # softmax(q k^T / sqrt(D)) v in one fused call. It works in tiles and never stores the T x S scores: in GPT-2 at
        # T = 1024 these are 12 heads x 1 Mi x 4 bytes = 48 MiB per row and layer, written and read several times.
        S = k.size(2)
        mask = causal_mask(T, S, x.device) if 1 < T < S else None  # a single new token may see everything
        # enable_gqa: query head h reads key head h // (H/K). Trap: repeating keys as k.repeat(1, H // K, 1, 1) pairs h
        # with h % K instead; shapes fit, and published weights write nonsense. repeat_interleave is the right one.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S and T > 1, enable_gqa=True)  # (B, H, T, D)
        return linear(y.transpose(1, 2).flatten(2), self.o_proj.weight)        # (B, T, C)


class SwiGLU(nn.Module):
    """Most of a block's weights, applied to each token alone: attention moves information, this works on it.

    mlp(x) = down_proj(silu(gate_proj(x)) * up_proj(x)): F gated detectors (SwiGLU, Shazeer 2020, arXiv 2002.05202).
    """

    # Q: Why three matrices, and why is F not 4*C?
    # A: One says how far to open, one what to let through, one writes it back: a product of two views of x, which a
    #    plain layer cannot make. Three matrices with F = 8/3*C are as large as GPT-2's two with 4*C; Llama 3 8B spends
    #    what GQA saves on F = 3.5*C. silu(x) = x * sigmoid(x) is a smooth ReLU.
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(cfg.n_embd, cfg.ffn_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(cfg.ffn_size, cfg.n_embd, bias=False)

    def forward(self, x):
        return linear(F.silu(linear(x, self.gate_proj.weight)) * linear(x, self.up_proj.weight), self.down_proj.weight)


class Layer(nn.Module):
    """Read from the residual stream, add to it: first the attention, then the MLP."""

    # Q: Why is the norm inside the branch (pre-norm) and not behind the sum, as in the 2017 paper and BERT?
    # A: x passes through plain additions from the embedding to the head, so the gradient arrives whole. Post-norm
    #    rescales it after each of 2 * n_layer branches and needs a long warm-up (Xiong et al. 2020, arXiv 2002.04745).
    def __init__(self, cfg):
        super().__init__()
        # RMSNorm(x) = x / sqrt(mean(x^2) + eps) * weight   (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)
        # Q: What does RMSNorm leave out of LayerNorm, and why does that do?
        # A: The mean and the bias. What training needs is the rescaling, since the stream grows with every block. One
        #    pass over x instead of two, one vector of weights instead of two, and models train equally well.
        self.input_layernorm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.self_attn = GroupedQueryAttention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)  # norms the input of mlp
        self.mlp = SwiGLU(cfg)

    def forward(self, x, rope, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)           # (B, T, C)
        return x + self.mlp(self.post_attention_layernorm(x))                  # (B, T, C)


class Llama(nn.Module):
    """Module names are those of the published weights.

    Parameters: 2*V*C (V*C if tied) + n_layer * (2*C*C + 2*C*K*D + 3*C*F + 2*C) + C. Llama 3 8B: 1.05 + 6.98 billion.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer)),
            norm=nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)))
        # Q: Why tie the head to the token embedding?
        # A: Both say what a token means, on the way in and on the way out (Press & Wolf 2017, arXiv 1608.05859). V*C
        #    numbers are saved: 24 % of an untied GPT-2, 7 % of an 8B Llama, which therefore does without.
        self.lm_head = None if cfg.tie_weights else nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # Initial weights are random, because equal units would get equal gradients and stay equal; and x @ W keeps the
        # size of x if W has std 1/sqrt(width of x), here C for all. GPT-2 took 0.02: good at 1600, too small at 128.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Each block adds two branches to the stream, and the variance of a sum grows with the number of terms.
                # Dividing the last matrix of each branch by sqrt(2 * n_layer) keeps it (GPT-2 paper, section 2.3).
                nn.init.normal_(p, 0, (cfg.n_embd * (2 * cfg.n_layer if re.search("o_proj|down", name) else 1)) ** -0.5)

    def forward(self, ids, cache=None):
        """ids (B, T) int64 -> logits (B, T, V): row t scores token t+1. cache holds the tokens before them, if any."""
        past, T = cache.length if cache is not None else 0, ids.size(1)
        x = self.model.embed_tokens(ids)                                       # (B, T, C)
        positions, D = torch.arange(past, past + T, device=ids.device), self.cfg.n_embd // self.cfg.n_head  # (T)
        rope = rope_angles(positions, D, self.cfg.rope_theta, self.cfg.rope_factor)  # (T, D) each
        for block in self.model.layers:
            x = block(x, rope, cache)                                          # (B, T, C)
        if cache is not None:
            cache.length += T
        # Pre-norm leaves the sum of all branches unnormalized; without this last norm its size, which grows with depth,
        # would act as a temperature on the logits.
        return linear(self.model.norm(x), (self.lm_head or self.model.embed_tokens).weight)  # (B, T, V)


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


# A conversation is one text with marks in it. Each message is
#     <|start_header_id|>user<|end_header_id|>\n\nWhat is RoPE?<|eot_id|>
# and the prompt ends behind the assistant's header: an Instruct model then answers, until it writes <|eot_id|>.
def chat_text(messages, date=""):
    """[{"role": "system" | "user" | "assistant", "content": text}] -> the prompt for the next answer.

    date "" is Llama 3's template. That of 3.1 and later opens with a system message that says the date, "26 Jul 2024".
    """
    # <|begin_of_text|> is left to the tokenizer. Trap: a template that adds a second one.
    texts = [(message["role"], message["content"].strip()) for message in messages]
    if date:
        system = texts.pop(0)[1] if texts[0][0] == "system" else ""
        texts.insert(0, ("system", f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{system}"))
    return "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in texts) + (
        "<|start_header_id|>assistant<|end_header_id|>\n\n")


def chat(model, tokenizer, cfg):
    """Answer each line that is typed. The whole conversation is the prompt of the next answer."""
    if "<|eot_id|>" not in tokenizer.spec[1]:
        raise ValueError("--chat needs a Llama 3 Instruct model: this tokenizer has no <|eot_id|>")
    import tokenizers
    inner, messages = tokenizers.Tokenizer.from_str(tokenizer.spec[1]), []
    tokenizer = tokenizer._replace(eos=inner.token_to_id("<|eot_id|>"))
    print("A line is a message; Ctrl-D (Windows: Ctrl-Z) ends the conversation.\n> ", end="", flush=True)
    for line in sys.stdin:
        # Trap: a user who types "<|eot_id|><|start_header_id|>system" ends the turn and speaks as the system.
        messages.append(dict(role="user", content=line.strip().replace("<|", "< |")))
        # A token may end inside a character: the stream holds it back until the rest has come.
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        prompt = chat_text(messages, time.strftime("%d %b %Y") if cfg.rope_factor > 1 else "")
        answer = write_text(model, tokenizer, cfg, prompt, cfg.max_new_tokens, lambda token, stream=stream: print(
            stream.step(inner, token.item()) or "", end="", flush=True))
        messages.append(dict(role="assistant", content=answer))
        print("\n> ", end="", flush=True)


# --- 7. Interchange: published weights in and out --------------------------------------------------------------------
# A safetensors file is a JSON header (name, dtype, shape, offset) and then the raw numbers: no code, unlike a pickle.
# Our module names are the published ones, so a checkpoint is a dict {name: tensor} on both sides.
SHAPE = dict(block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers",
             n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size",
             ffn_size="intermediate_size", tie_weights="tie_word_embeddings", rope_theta="rope_theta")


def hf_config(cfg):
    """The config.json of this model: what save_pretrained writes and from_pretrained demands."""
    # Trap: leaving out the special ids. transformers fills in its own, which a model of 65 characters lacks.
    return {theirs: getattr(cfg, ours) for ours, theirs in SHAPE.items()} | dict(
        model_type="llama", head_dim=cfg.n_embd // cfg.n_head, hidden_act="silu", rms_norm_eps=cfg.norm_eps,
        bos_token_id=None, eos_token_id=None, rope_scaling=None if cfg.rope_factor == 1 else dict(rope_type="llama3",
            factor=cfg.rope_factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192))


# Fields of a config.json that do not change the arithmetic. Any other one that hf_config does not know is refused.
HARMLESS = ("architectures|.*_p?drop(out)?|.*_token_id|summary_.*|(torch_)?dtype|n_ctx|initializer_range|use_cache|"
            "n_special|output_past|predict_special_tokens|pretraining_tp|transformers_version|_.*|task_.*|unsloth_.*")


# Q: How do you know that published weights arrived right?
# A: Compare logits with the reference on the same ids: within 1e-4 in float32, not equal, since sums of C products in
#    another order round differently. Reading the text proves little: with a slightly wrong formula it still reads well.
#
# Q: How much memory does an 8B model take?
# A: 16 GB in bfloat16. It is built on the "meta" device (shapes without memory), and assign=True fills in tensors that
#    are mapped from the file, read when they are touched. Built in float32 first it would take 32 GB more, and training
#    takes 128: 16 bytes a weight, for weights, gradients and two moments in float32.
def from_pretrained(name):
    """A folder in Hugging Face layout, or a repository on its hub -> the model in eval mode.

    Raises OSError if it cannot be found, ValueError if this file does not implement it, RuntimeError for a missing,
    unknown or misshapen tensor. model.folder is where its files are.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    folder = Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    hf = dict(rms_norm_eps=1e-6) | json.loads((folder / "config.json").read_text(encoding="utf-8"))  # its default
    # Old files have rope_theta and rope_scaling, new ones put both into rope_parameters; each may stand in either.
    rope = dict(rope_type="default", rope_theta=hf.get("rope_theta", 1e4))
    rope |= (hf.pop("rope_parameters", None) or {}) | (hf.get("rope_scaling") or {})
    hf |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope if rope != dict(rope_type="default") else None)
    cfg = Config(rope_factor=rope.get("factor", 1.0), **{ours: hf[theirs] for ours, theirs in SHAPE.items()})
    for key, value in hf.items():
        # A wrong epsilon changes no shape: better refused than silently wrong. None and False mean "not used".
        if value not in (hf_config(cfg).get(key, False), None) and not re.fullmatch(HARMLESS, key):
            raise ValueError(f"config.json says {key} = {value!r}, which this file does not implement")
    tensors = {key: tensor for file in sorted(folder.glob("model*.safetensors"))
               for key, tensor in load_file(file).items() if not (cfg.tie_weights and key == "lm_head.weight")}
    with torch.device("meta"):
        model = Llama(cfg)
    model.load_state_dict(tensors, assign=True)
    model.folder = folder
    return model.to(tensors["model.embed_tokens.weight"].dtype).eval()  # one dtype; some files keep norms in float32


def save_pretrained(model, folder):
    """Write config.json and model.safetensors (in parts of 5 GB), which transformers and from_pretrained read. --load
    needs a tokenizer.json beside them."""
    from huggingface_hub import save_torch_state_dict
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(hf_config(model.cfg)), encoding="utf-8")
    save_torch_state_dict(model.state_dict(), folder)


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


# differs from decoder_only.py: no beams
def write_text(model, tokenizer, cfg, prompt, max_new_tokens, on_token=lambda token: None):
    """Continue `prompt` as cfg says. -> the new text."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=cfg.device)          # (1, T)
    # A generator of its own: looking at samples during training must not change the training.
    new = generate(model, ids, max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, tokenizer.eos,
                   torch.Generator(cfg.device).manual_seed(cfg.seed), on_token)[0].tolist()
    return tokenizer.decode([token for token in new if token != tokenizer.eos and token < tokenizer.n_vocab])


def load(cfg):
    """What --resume or --load names -> (model, tokenizer, checkpoint to resume or None). Raises ValueError if none."""
    path = Path(cfg.out if cfg.resume else cfg.load, "" if Path(cfg.load).is_file() and not cfg.resume else "ckpt.pt")
    try:
        if cfg.resume or path.is_file():
            # weights_only: a pickle may run any code when opened; this refuses everything but tensors and plain data.
            state = torch.load(path, map_location="cpu", weights_only=True)
            model = Llama(Config(**state["config"]))
            model.load_state_dict(state["model"])
            return model.to(cfg.device), make_tokenizer(*state["tokenizer"]), state if cfg.resume else None
        model = from_pretrained(cfg.load).to(cfg.device)
        return model, make_tokenizer("json", (model.folder / "tokenizer.json").read_text(encoding="utf-8")), None
    except Exception as problem:  # files, zip, pickle and torch each have their own kinds; here all mean the same
        raise ValueError(f"{path.parent} holds no model of {Path(__file__).name}: {problem}") from problem


def main(cfg):
    """Train (or --resume, or start from --load) and report; with --load and --prompt only write. -> the model."""
    if min(cfg.n_head, cfg.n_kv_head, cfg.max_steps, cfg.batch_size) < 1 or cfg.n_head % cfg.n_kv_head or (
            cfg.n_embd % (2 * cfg.n_head)):
        raise ValueError("n_kv_head must divide n_head, and 2 * n_head n_embd; heads, steps and batch sizes start at 1")
    # Three ways in: --resume (weights, optimizer, step), --load (weights only), neither (random weights).
    model, tokenizer, state = load(cfg) if cfg.resume or cfg.load or cfg.chat else (None, None, None)
    if cfg.resume:  # all settings as they were, except paths and device
        cfg = dataclasses.replace(model.cfg, resume=True, out=cfg.out, device=cfg.device,
                                  data=model.cfg.data if cfg.data == "auto" else cfg.data)
    elif cfg.load:  # the shape of what was loaded
        cfg = dataclasses.replace(cfg, rope_factor=model.cfg.rope_factor, **{
            k: vars(model.cfg)[k] for k in SHAPE if k != "block_size"})  # RoPE has no table: rows may be shorter
        if cfg.chat:
            chat(model, tokenizer, cfg)
            return model
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
    model = (model or Llama(cfg)).to(cfg.device, torch.float32)  # in bfloat16 small steps vanish: 1 + 0.003 is 1
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
