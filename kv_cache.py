# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "requests>=2.31", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
DECODING AT THE SPEED OF MEMORY                  python kv_cache.py                 2 min on two CPU cores

Paper    Pope et al. 2022, Efficiently Scaling Transformer Inference, arXiv 2211.05102; speculation: Leviathan et al.
         2022, arXiv 2211.17192; sinks: Xiao et al. 2023, arXiv 2309.17453; the queue: Yu et al. 2022, Orca, OSDI
Idea     To write one token a model reads every weight and every cached key and value once, for next to no arithmetic:
         memory sets the pace, and the bound is bytes / bandwidth. Climb to it, then make the bytes fewer (int8, a
         window) or let several tokens share them (speculation, batches)
Picture  none: read all T tokens again -> growing: keep k and v, append by copying -> static: write into place ->
         compiled: one pass over each matrix -> int8: a quarter of the bytes -> window: a ring
Symbols  B batch   T new tokens   S columns in sight   C n_embd   H query heads   K key/value heads   D head size
         G = H/K   F ffn_size   V vocabulary   N tokens to write   R rows   O outputs   k proposals of the draft
New here three caches, a compiled step, int8 weights, a ring with sinks, speculative decoding, rows of unequal length, a
         queue of prompts, the ruler (bytes / bandwidth). The model is llama3.py's
Not here paged caches, int8 caches, int4, several GPUs, published weights (llama3.py)
Expect   125m shape, tokens per second behind 128 others: none 7, growing 47, static 47, compiled 64 (76 % of what is
         possible), int8 184. The small models: 43 % of the proposals accepted, 1.22 x as fast as plain writing; a queue
         2.5 x as fast as padded batches where answers differ tenfold, 0.92 x where they are alike (47 passes to 44)
Asked    Why is writing slow when reading is fast?   How fast can it be?   What does copying cost?   Why does compiling
         help?   What may be rounded?   Why is speculation exact?   Why is a padded batch slow?

    python kv_cache.py                                         train two small models, compare, climb the ladder
    python kv_cache.py --preset 125m                           the ladder of a real shape with random weights (8b)
    python kv_cache.py --contexts "" --proposals 8             no ladder; a bolder draft
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import statistics
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
    data: str = "auto"                # auto | shakespeare | pydocs | path of a UTF-8 text file
    out: str = "runs/kv_cache"        # folder for summary and picture
    seed: int = 1337                  # decides initial weights, batches and samples
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda
    proposals: int = 4                # tokens that the draft proposes at a time
    window: int = 64                  # newest tokens that the rung `window` keeps, the present one among them
    sinks: int = 4                    # first tokens that it never forgets
    slots: int = 4                    # rows of a batch, and of the queue
    contexts: str = "128,1024,4096"   # tokens in the cache when a step is timed; "" skips the ladder
    # Shape of the model that is trained; the ladder takes a larger one. 1.2 million parameters.
    block_size: int = 256             # tokens of a training row
    n_layer: int = 6                  # layers
    n_head: int = 4                   # query heads; each is n_embd / n_head wide
    n_kv_head: int = 2                # heads of keys and values, each shared by n_head / n_kv_head query heads
    n_embd: int = 128                 # width of the residual stream
    ffn_size: int = 384               # width inside the MLP
    vocab_size: int = 0               # for the ladder; a training takes as many as the text has characters
    # Optimization.
    max_steps: int = 500              # optimizer steps; 0 = climb the ladder only
    batch_size: int = 4               # rows per step
    lr: float = 3e-3                  # peak learning rate
    warmup_steps: int = 50            # steps of linear warm-up
    beta2 = 0.99                      # no type, so no flag: Adam's memory


# Shapes to climb with, random weights: one that outgrows most processors' caches, also in int8 (the default run takes
# it for the ladder); as many layers and weights as GPT-2 small; Llama 3 8B.
PRESETS = {"laptop": {},
    "46m": dict(max_steps=0, n_layer=12, n_head=8, n_kv_head=4, n_embd=512, ffn_size=1536, vocab_size=16_384),
    "125m": dict(max_steps=0, n_layer=12, n_head=12, n_kv_head=4, n_embd=768, ffn_size=2048, vocab_size=32_000),
    "8b": dict(max_steps=0, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, ffn_size=14_336, vocab_size=128_256)}


# --- 2. Model: caches, the product that waits for memory, and a Llama that uses them ---------------------------------
# Q: Why is writing slow when reading is fast?
# A: A prompt of 1,000 tokens goes through each weight once: 4 bytes are read for 2,000 operations. A new token needs
#    the same 4 bytes for 2, and waits for them: a core that reads 15 GB/s gets 4 billion numbers a second and could do
#    some 100 billion operations. Reading is bound by arithmetic, writing by memory. What helps is to read fewer bytes,
#    or to use each of them for more tokens.
#
# Q: How fast can it be?
# A: bandwidth / bytes per token. A Llama of 125 million parameters in float32 streams 400 MB per token (of the
#    embedding table one row) and 24 KiB for each token of its past: at 30 GB/s 75 tokens a second. 8 billion in
#    bfloat16 on a GPU of 4,300 GB/s: 15 GB, 287 tokens a second.

# One token of the 125M shape behind 1,024 others, float32, at 30 GB/s and 100 billion operations a second:
#     q, k, v, o      12 layers * 1.57 M weights  *  4 bytes   =   75 MB     2.5 ms
#     MLP             12 layers * 4.72 M weights  *  4 bytes   =  226 MB     7.5 ms
#     head            768 * 32,000 weights        *  4 bytes   =   98 MB     3.3 ms
#     keys, values    1,024 tokens * 24 KiB                    =   25 MB     0.8 ms
#     together                                                 =  425 MB    14 ms, 71 tokens a second
#     all arithmetic  2 operations per weight                                2 ms, hidden behind the reading
#
# Without a cache token n+1 computes all n tokens before it again. With one, only the new token passes through the
# layers, and its query meets keys and values that were kept. That is exact: nothing in a causal model looks ahead, so
# what a token left behind never changes. A store holds one layer's keys and values, (B, K, S, D) each.
class GrowingStore:
    """The first idea, and the default of some libraries ("dynamic cache"): append with torch.cat."""

    # Q: What does copying cost?
    # A: Every token copies the whole past of every layer. At 4,096 tokens the cache of the 125M shape is 100 MB: cat
    #    reads and writes it and attention reads it, 300 MB where 100 would do, next to 400 MB of weights.
    def __init__(self, cfg, rows, size, like):
        self.keys = self.values = like.new_zeros(rows, cfg.n_kv_head, 0, cfg.n_embd // cfg.n_head)

    def update(self, k, v, positions, S):
        """Take k, v (B, K, T, D) of the tokens at positions (B, T) -> all keys and all values, (B, K, S, D) each."""
        self.keys, self.values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        return self.keys, self.values                                          # (B, K, S, D)


# Rows of a batch may have different lengths. The rule that makes everything below simple: a row's length says what
# exists. What stands behind it is rubbish that nobody sees (a query sees columns up to its own position) and that is
# overwritten before anybody could. So a prompt may be padded on the right, tokens are taken back by lowering a number,
# and a finished row is free at once (all three in section 6).
#     a b c d . . .         length 4, the next token goes to column 4
#     e f g h i j k         length 7, the next token goes to column 7
#
# Q: How large does a cache get?
# A: 2 * layers * K * D numbers per token and row: 24 KiB for the 125M shape in float32, 128 KiB for Llama 3 8B in
#    bfloat16. 32 rows of 8,192 tokens are 32 GiB then, twice the weights. That is why K < H (grouped queries), why
#    windows, and why servers give out the columns in pages, as an operating system does (not here).
class StaticStore:
    """Room for `size` tokens, allocated once; new ones are written into place."""

    def __init__(self, cfg, rows, size, like):
        # One column more than asked for: if S were all of them, the view would be contiguous, and compiled once more.
        self.keys = like.new_zeros(rows, cfg.n_kv_head, size + 1, cfg.n_embd // cfg.n_head)
        self.values = torch.zeros_like(self.keys)

    def update(self, k, v, positions, S):
        rows = torch.arange(k.size(0), device=k.device)[:, None]               # (B, 1)
        # Indexed with (B, 1) and (B, T) on axes 0 and 2: the shape of the indices comes first, (B, T, K, D).
        self.keys[rows, :, positions] = k.transpose(1, 2)
        self.values[rows, :, positions] = v.transpose(1, 2)
        return self.keys[:, :, :S], self.values[:, :, :S]                      # (B, K, S, D)


# Q: Why keep the first tokens of a text?
# A: A softmax has to put its weight somewhere, also when nothing is worth looking at, and large models learn to put it
#    on the first tokens, which everybody sees. A plain window drops them, and perplexity explodes; four "attention
#    sinks" that stay cure it (Xiao et al. 2023, table 1). The small model here has no such habit. At equal size, with 4
#    sinks and without, it loses 1.831 and 1.832 nats in 64 columns, 1.845 and 1.839 in 32, 1.861 and 1.861 in 16; with
#    all 256 tokens in sight 1.838.
#     sinks 2, window 4, after token 8:      column    0   1 | 2   3   4   5
#                                            token     0   1 | 6   7   8   5        token 9 will overwrite 5
# The order of columns does not matter: attention is a sum, and each key carries its position as an angle.
class WindowStore(StaticStore):
    """A ring: the newest `window` tokens and the first `sinks`. Constant memory and time; exact while the text fits."""

    def __init__(self, cfg, rows, size, like):
        super().__init__(cfg, rows, cfg.sinks + cfg.window, like)
        self.sinks, self.window = cfg.sinks, cfg.window

    def update(self, k, v, positions, S):
        ring = self.sinks + (positions - self.sinks) % self.window             # (B, T)
        keys, values = super().update(k, v, torch.where(positions < self.sinks, positions, ring), S)  # (B, K, S, D)
        # Trap: leaving the sinks where they were. Their distance then grows with the text, beyond all that the model
        # has seen. They move along, right in front of the window: angles add, so turning a key once more is enough.
        moved = (positions[:, -1:] - (self.sinks + self.window - 1)).clamp(min=0)
        sinks = apply_rope(keys[:, :, :self.sinks], *rotation(moved, k.size(3)))
        return torch.cat((sinks, keys[:, :, self.sinks:]), 2), values          # (B, K, S, D)


# What a model carries from pass to pass. It is an object of its own, made for one piece of writing. Trap: a cache that
# lives on the model: two conversations then share it, and a test sees what the last one left.
class Cache:
    """A store for each layer; lengths (B): tokens that each row holds; longest, an int: no row holds more."""

    # Trap: asking lengths.max() in every step. A GPU would have to finish its work before Python may go on.
    def __init__(self, model, kind, rows, size):
        like = model.model.embed_tokens.weight.detach()
        self.layers = [kind(model.cfg, rows, size, like) for _ in model.model.layers]
        self.lengths, self.longest = torch.zeros(rows, dtype=torch.int64, device=like.device), 0
        self.size = model.cfg.sinks + model.cfg.window if kind is WindowStore else size + 1


# The slow part of everything: a matrix times one token.
#
# Q: Why does compiling help, when a library does the products?
# A: The library's routine for one row is made for matrices and leaves most of the bandwidth unused. Written as
#    (W * x).sum(-1) and compiled, W passes through the registers once, on all cores, and the conversion from int8, the
#    activation and the norm join that loop instead of making passes of their own over memory.
class Projection(nn.Linear):
    """x (B, T, in) -> x W^T (B, T, out), W (out, in), or int8 with one scale per row of W."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("scale", None)

    def forward(self, x):
        rows = x.shape[:-1].numel()
        if torch.compiler.is_compiling() and rows == 1:
            # Trap: without a compiler this line writes out W * x before it sums, and is many times slower.
            y = (self.weight.to(x.dtype) * x.flatten()).sum(-1).view(*x.shape[:-1], -1)  # (B, T, O)
        elif rows < 8 and x.device.type == "cpu":
            # CPU libraries split a product along the rows of its first factor, and a few rows are too few to split. The
            # same product the other way round, W x^T, has thousands: 2.4 times as fast for 1 row, 4.3 for 2, 1.7 for 5
            # (results/peers_kv_cache.json). A single row is doubled: for one column the library has a slow routine.
            columns = x.reshape(rows, -1).repeat(1 + (rows == 1), 1).t()
            y = (self.weight.to(x.dtype) @ columns)[:, :rows].t().reshape(*x.shape[:-1], -1)  # (B, T, O)
        else:
            y = F.linear(x, self.weight.to(x.dtype))                           # (B, T, O)
        return y if self.scale is None else y * self.scale

    # Q: What may be rounded?
    # A: Weights: 8 bits with one scale per row move the loss of the small model here in the fourth digit (1.8845 to
    #    1.8844). Activations not so easily: in large models a few channels are a hundred times larger than the rest and
    #    would take the digits from all others (Dettmers et al. 2022, arXiv 2208.07339). And they are not what is slow.
    def to_int8(self):
        """W ~ int8 * scale, scale = max|row| / 127 (symmetric: 0 stays 0)."""
        # Trap: one scale for the whole matrix. A single large weight then costs every row its digits.
        scale = (self.weight.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-12)  # (O, 1)
        rounded = (self.weight / scale).round().to(torch.int8)                 # (O, C)
        # y = (int8 * scale) x = scale * (int8 x): the scale is applied to O outputs and not to O*C weights.
        self.scale, self.weight = scale[:, 0].to(self.weight.dtype), nn.Parameter(rounded, requires_grad=False)


def rotation(positions, D):
    """RoPE: positions (B, T) -> cos, sin (B, 1, T, D) of the angles position * 10000^(-2i/D), in float32."""
    w = 10_000.0 ** (torch.arange(0, D, 2, device=positions.device) / -D)  # D/2 speeds, one per plane
    angle = (positions[..., None] * torch.cat((w, w)))[:, None]                # (B, 1, T, D)
    return angle.cos(), angle.sin()


# Q: Half-split or interleaved: which two numbers make a plane?
# A: The paper and Meta's files pair (0, 1), (2, 3), ...; Hugging Face's files, and ours, (0, D/2), (1, D/2 + 1), ...
#    It is a convention of the weights: the rows of W_q and W_k are permuted alike. Reading weights with the wrong one
#    is the commonest RoPE bug; position 0, which is not turned at all, still looks right.
def apply_rope(x, cos, sin):
    """x (B, H, T, D), plane i = (a, b) = (x[i], x[i + D/2]) -> (a cos - b sin, b cos + a sin), (B, H, T, D)."""
    a, b = x.chunk(2, -1)                                                      # (B, H, T, D/2)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)      # (B, H, T, D)


# A query of one token and 4,096 keys is a matrix times a vector once more: 2 operations per number read.
def attend(q, k, v, allowed):
    """q (B, H, T, D), k and v (B, K, S, D), allowed (B, 1, T, S) or None (causal, T = S) -> (B, H, T, D)."""
    if not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=allowed is None, enable_gqa=True)
    # One token: sums again, so that nothing is written in between. G = H/K query heads read the same keys.
    B, H, _, D = q.shape
    q = q.reshape(B, k.size(1), -1, 1, D) / math.sqrt(D)                       # (B, K, G, 1, D)
    scores = (q * k[:, :, None]).sum(-1).masked_fill(~allowed, -math.inf)      # (B, K, G, S)
    return (scores.softmax(-1)[..., None] * v[:, :, None]).sum(-2).view(B, H, 1, D)  # (B, H, 1, D)


# differs from llama3.py: attention goes through a store, and every matrix is a Projection
class Layer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)); llama3.py explains each part."""

    def __init__(self, cfg):
        super().__init__()
        C, inner, narrow = cfg.n_embd, cfg.ffn_size, cfg.n_embd // cfg.n_head * cfg.n_kv_head
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
        self.self_attn = nn.ModuleDict(dict(q_proj=Projection(C, C), k_proj=Projection(C, narrow),
                                            v_proj=Projection(C, narrow), o_proj=Projection(C, C)))
        self.mlp = nn.ModuleDict(dict(gate_proj=Projection(C, inner), up_proj=Projection(C, inner),
                                      down_proj=Projection(inner, C)))
        self.D = C // cfg.n_head

    def forward(self, x, cos, sin, store, positions, allowed):
        B, T, C = x.shape
        a, m, h = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (part(h).view(B, T, -1, self.D).transpose(1, 2) for part in (a.q_proj, a.k_proj, a.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if store is not None:
            k, v = store.update(k, v, positions, allowed.size(-1))             # (B, K, S, D) each
        x = x + a.o_proj(attend(q, k, v, allowed).transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        h = self.post_attention_layernorm(x)                                   # (B, T, C)
        return x + m.down_proj(F.silu(m.gate_proj(h)) * m.up_proj(h))          # (B, T, C)


# differs from llama3.py: rows have lengths of their own, and a layer may be compiled
class Llama(nn.Module):
    """Module names are those of the published weights."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer)), norm=nn.RMSNorm(cfg.n_embd, eps=1e-5)))
        self.lm_head = Projection(cfg.n_embd, cfg.vocab_size)
        # std 1/sqrt(width); the last matrix of each branch is smaller, so that the sum of all branches keeps its size.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, (cfg.n_embd * (2 * cfg.n_layer if re.search("o_proj|down", name) else 1)) ** -0.5)

    def hidden(self, ids, cache=None):
        """ids (B, T) -> (B, T, C), normed. They continue what the cache holds; the caller raises its lengths."""
        T, allowed, stores = ids.size(1), None, cache.layers if cache else [None] * self.cfg.n_layer
        positions = torch.arange(T, device=ids.device)[None]                   # (1, T)
        if cache:
            positions = cache.lengths[:, None] + positions                     # (B, T)
            columns = torch.arange(min(cache.longest + T, cache.size), device=ids.device)  # (S)
            # Causality, the past and "no pads" in one comparison.
            allowed = (columns <= positions[:, :, None])[:, None]              # (B, 1, T, S)
        x, (cos, sin) = self.model.embed_tokens(ids), rotation(positions, self.cfg.n_embd // self.cfg.n_head)
        for layer, store in zip(self.model.layers, stores, strict=True):
            # layer(...) may be compiled, which is for single tokens; layer.forward never is.
            x = (layer if T == 1 else layer.forward)(x, cos, sin, store, positions, allowed)  # (B, T, C)
        return self.model.norm(x)                                              # (B, T, C)

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V)."""
        return self.lm_head.forward(self.hidden(ids, cache))                   # (B, T, V)


def twin(model, int8=False, compiled=False):
    """-> the same model for decoding, sharing its weights, except where they become int8."""
    with torch.device("meta"):  # shapes without memory
        new = Llama(model.cfg).requires_grad_(False)
    new.load_state_dict(model.state_dict(), assign=True)
    for part in new.modules():
        if int8 and isinstance(part, Projection):
            part.to_int8()  # the embedding stays: one row of it is looked up, nobody streams it
    # What a compiler does here: it sees the operations of a layer as one program and writes new loops for them, in C++
    # (Triton on a GPU), in which results go from one operation to the next in registers.
    # One layer is compiled and serves all: seconds of waiting instead of a minute for the unrolled whole. dynamic: one
    # version for all lengths. realize_reads_threshold: what is read more than once is stored; else the norm would be
    # worked out anew for each row of the matrix that reads it. size_asserts: shapes are checked once, not in each call.
    if compiled and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        print("no C++ compiler was found: the compiled rungs run as they are, and not faster")
        compiled = False
    for part in (*new.model.layers, new.lm_head) if compiled else ():
        part.compile(dynamic=True, options={"realize_reads_threshold": 1, "size_asserts": False})
    return new.eval()


# --- 3. Objective: the next token, T times per row -------------------------------------------------------------------
IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def compute_loss(model, inputs, targets):
    """inputs, targets (B, T) -> sum of -ln p(target) over the targets that count, in nats."""
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


def text_rows(ids, block_size, stride):
    """ids (n,) -> (inputs, targets), each (rows, T): windows of one text that start every `stride` tokens.

    ids 0 1 2 3 4 5 6 with T = 3, stride 1:  inputs 012 123 234 345   targets 123 234 345 456
                               stride 3:     inputs 012 345           targets 123 456
    stride 1 to train: any start is a row. stride T to validate: every token is predicted once (not the first, nor a
    tail shorter than T)."""
    # unfold makes a view: a million windows that overlap share one text in memory instead of holding T copies of it.
    return ids[:-1].unfold(0, block_size, stride), ids[1:].unfold(0, block_size, stride)


def make_data(cfg):
    """-> (train rows, validation rows, all characters, name). One id per character."""
    text, name = load_text(cfg.data)
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    train, val = torch.tensor([ids[character] for character in text]).tensor_split([int(0.9 * len(text))])
    if len(val) <= cfg.block_size:
        raise ValueError(f"{name} is too short: a tenth of its {len(text)} characters is less than block_size + 1")
    return text_rows(train, cfg.block_size, 1), text_rows(val, cfg.block_size, cfg.block_size), list(ids), name


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


# --- 6. Decoding: one row, a draft and a judge, many rows ------------------------------------------------------------
# Prompt a b c, two tokens d e to write. The newest token is always one that no model has read yet:
#     prefill       read a b c at positions 0 1 2    the cache holds a b c      the logits behind c give d
#     one token     read d     at position  3        the cache holds a b c d    those behind d give e, never read

# Q: Why do greedy and sampled writing need the same machinery here?
# A: Speculation compares two distributions. Greedy is the case that all probability lies on one token: a proposal is
#    then kept if and only if it is the target's own choice, and the formulas need no second version.
def distribution(logits, temperature):
    """logits (..., V) -> probabilities (..., V). Temperature 0: all on the likeliest, so greedy is a special case."""
    if temperature <= 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)  # (..., V)
    return (logits / temperature).softmax(-1)


# Q: What do temperature 0.5 and 2 make of [.50 .30 .15 .05]?
# A: [.68 .25 .06 .01] and [.38 .29 .21 .12]: p^(1/temperature), normalized. decoder_only.py adds top-k and top-p.
def draw(probs, generator):
    """probs (B, V) -> one token per row (B)."""
    return torch.multinomial(probs, 1, generator=generator)[:, 0]              # (B)


# Pad on the right: the rule of lengths hides what stands behind a row, and the row's tokens keep their positions.
# Trap: padding on the left without moving the positions; each row is then read as if it began with blanks.
def pad(prompts, device):
    """Lists of ids -> ids (B, T), padded on the right, and their lengths (B)."""
    counts = torch.tensor([len(prompt) for prompt in prompts])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)  # (B, T)
    return ids.to(device), counts.to(device)


@torch.no_grad()
def read(model, ids, cache, counts):
    """Read ids (B, T), of which counts (B) are real, into the cache. -> logits (B, V) behind each row's last token."""
    if ids.size(1) > 1 and cache.longest + ids.size(1) > cache.size:
        # A full ring loses a token with each new one: a chunk would overwrite what its own first tokens still see.
        return [read(model, one, cache, torch.ones_like(counts)) for one in ids.split(1, 1)][-1]
    x = model.hidden(ids, cache)                                               # (B, T, C)
    cache.lengths += counts
    cache.longest += ids.size(1)
    last = x[torch.arange(len(x), device=x.device), counts - 1]                # (B, C)
    return model.lm_head(last[:, None])[:, 0]                                  # (B, V)


# Q: Why does a long answer cost more than a long question?
# A: A prompt of 1,000 tokens is one pass: each weight is read once for all of them. 1,000 new tokens are 1,000 passes,
#    because each token must be known before the next can be computed. Speculation is the way around that "must".
@torch.no_grad()
def write(model, prompts, max_new_tokens, kind=StaticStore, temperature=0.0, generator=None):
    """Continue prompts (lists of ids, of any lengths) -> new ids (B, N). kind: the store; None = no cache."""
    text, counts = pad(prompts, model.model.embed_tokens.weight.device)        # text (B, T), counts (B)
    B, T = text.shape
    rows, text = torch.arange(B, device=text.device), F.pad(text, (0, max_new_tokens))
    cache = kind and Cache(model, kind, B, T + max_new_tokens)
    if kind in (GrowingStore, WindowStore) and len(set(map(len, prompts))) > 1:
        raise ValueError("a growing store and a ring give all rows the same column: prompts must be of equal length")
    out = []
    for step in range(max_new_tokens):
        if cache is None:  # rung 1: all of the text again
            x = model.hidden(text[:, :T + step])[rows, counts - 1]             # (B, C)
            logits = model.lm_head(x[:, None])[:, 0]                           # (B, V)
        elif step == 0:  # prefill: the whole prompt in one pass, limited by arithmetic
            logits = read(model, text[:, :T], cache, counts)                   # (B, V)
        else:  # one token per row in one pass, limited by memory
            logits = read(model, out[-1][:, None], cache, torch.ones_like(counts))  # (B, V)
        out.append(draw(distribution(logits, temperature), generator))
        text[rows, counts] = out[-1]
        counts = counts + 1
    return torch.stack(out, 1)                                                 # (B, N)


# Speculative decoding. A pass over five tokens costs hardly more than a pass over one: the weights are read once. So a
# small model, the draft, proposes k tokens one by one, and the large one, the target, reads all of them in one pass and
# keeps as many as it would have written itself.
#     text so far   The cat
#     draft         The cat [sat] [on] [a] [mat]     four cheap passes
#     target        agrees with sat and on, would have written "the" for "a"; "mat" followed from "a" and goes too
#     written       The cat sat on the               three tokens for one pass of the target
#
# Q: Why is speculation exact, if the draft is a poor model?
# A: A token x that the draft drew with probability q(x) is kept with probability min(1, p(x) / q(x)), p the target's.
#    If it is refused, x is drawn from max(0, p - q), normalized. So x comes out with probability
#        q(x) * min(1, p(x) / q(x))  +  P(refused) * max(0, p(x) - q(x)) / P(refused)  =  min(p, q) + max(0, p - q)  = p
#    since P(refused) = 1 - sum of min(p, q) = sum of max(0, p - q). A poor draft costs time and changes nothing.
#    (Leviathan et al. 2022, algorithm 1 and appendix A.1.)
# By hand: p = (.5, .3, .2), q = (.2, .6, .2). Token 1 is proposed too often: kept with .3/.6 = 1/2, so .3 of all
# proposals are refused, and max(0, p - q) = (.3, 0, 0) gives all of those to token 0, which gets .2 + .3 = .5.
# If each proposal is kept with probability a, a round of k proposals writes (1 - a^(k+1)) / (1 - a) tokens:
# 3.4 for a = 0.8, k = 4. It costs k passes of the draft and one of the target.
@torch.no_grad()
def speculate(target, draft, prompt, max_new_tokens, proposals=4, temperature=0.0, generator=None):
    """Continue prompt (list of ids) -> (new ids, share of the proposals that were accepted). proposals: 1 or more."""
    device, text, accepted, rounds = target.model.embed_tokens.weight.device, list(prompt), 0, 0
    start, end = len(prompt), len(prompt) + max_new_tokens
    caches = [Cache(model, StaticStore, 1, end + proposals + 1) for model in (target, draft)]

    def judge(model, cache, tokens):
        """Read the tokens that the cache lacks, in one pass -> what the model would write after each (n, V)."""
        ids = torch.tensor([tokens[cache.longest:]], device=device)            # (1, T)
        logits = model(ids, cache)                                             # (1, T, V)
        cache.longest = len(tokens)
        cache.lengths.fill_(cache.longest)
        return distribution(logits[0], temperature)

    # Each round writes at least one token, the target's own: never fewer per pass than without a draft.
    while len(text) < end:
        n, guess, q = len(text), list(text), []
        for _ in range(proposals):
            q.append(judge(draft, caches[1], guess)[-1])
            guess.append(draw(q[-1][None], generator).item())
        p = judge(target, caches[0], guess)[-1 - proposals:]  # (k+1, V): after text, and after each guess
        # The first refusal ends the round: what was proposed after it followed from a token that is not there.
        for i, token in enumerate(guess[n:]):
            # Kept with probability p/q. 1 - rand is never 0, so what the target excludes (p = 0) is always refused.
            if (1 - torch.rand((), generator=generator, device=device)) * q[i][token] > p[i][token]:
                rest = (p[i] - q[i]).clamp(min=0)                              # (V)
                break
        else:  # all accepted, and the pass has told what comes after them
            i, rest = proposals, p[-1]
        text = guess[:n + i] + [draw(rest[None], generator).item()]
        accepted, rounds = accepted + i, rounds + 1
        # Roll back: what was read beyond the accepted tokens does not exist any more. (If all were accepted, the draft
        # lags by one token, the last proposal, which it never read: the next round reads two.)
        for cache in caches:
            cache.longest = min(cache.longest, n + i)
            cache.lengths.fill_(cache.longest)
    return text[start:end], accepted / (rounds * proposals)


# Q: Why is a padded batch slow, although its rows share each read of the weights?
# A: It runs until its longest row ends, and the rows that have ended are computed for nobody. Letting the next prompt
#    into a free row at once keeps all rows busy ("continuous batching"). The price: each newcomer's prompt is a pass of
#    its own, during which the others wait. With answers of about equal length it is not worth it.
#     time ->           batches                       queue (a .. f are answers, . is computed for nobody; the three
#     row 0             a a a a a a a a d d d d       a a a a a a a a        passes that read the prompts of d, e
#     row 1             b b . . . . . . e e e .       b b e e e f f .        and f are not drawn)
#     row 2             c . . . . . . . f f . .       c d d d d . . .
@torch.no_grad()
def serve(model, prompts, budgets, slots=4, eos=-1):
    """Greedy answers to a queue of prompts, `slots` rows at a time -> (lists of new ids, number of passes).

    Answer i ends with eos or after budgets[i] tokens. Up to rounding the tokens are those of one prompt at a time.
    """
    device, size = model.model.embed_tokens.weight.device, max(map(len, prompts)) + max(budgets)
    cache, waiting = Cache(model, StaticStore, slots, size), list(range(len(prompts)))
    owner, answers, passes = [None] * slots, [[] for _ in prompts], 0
    token = torch.zeros(slots, dtype=torch.int64, device=device)               # (B)
    while True:
        rows = [row for row in range(slots) if owner[row] is None][:len(waiting)]
        if rows:
            # Newcomers: their prompts are read together, into a cache of their own, whose rows replace the free ones.
            for row in rows:
                owner[row] = waiting.pop(0)
            ids, counts = pad([prompts[owner[row]] for row in rows], device)   # ids (R, T), counts (R)
            fresh = Cache(model, StaticStore, len(rows), size)
            token[rows] = read(model, ids, fresh, counts).argmax(-1)
            for old, new in zip(cache.layers, fresh.layers, strict=True):
                old.keys[rows], old.values[rows] = new.keys, new.values
            cache.lengths[rows] = counts
            cache.longest = int(cache.lengths.max())
        elif rows := [row for row in range(slots) if owner[row] is not None]:
            # One token for every row; the length of an idle row does not move, so its rubbish stays in one column.
            busy = torch.tensor([prompt is not None for prompt in owner], device=device).long()  # (B)
            token = read(model, token[:, None], cache, busy).argmax(-1)        # (B)
        else:
            return answers, passes
        passes += 1
        for row, new in zip(rows, token[rows].tolist(), strict=True):
            answer = answers[owner[row]]
            answer.append(new)
            if new == eos or len(answer) == budgets[owner[row]]:
                owner[row] = None


# --- 8. Main: train, compare, climb the ladder -----------------------------------------------------------------------
# What forgetting costs. Only the second half of each row counts, where the smaller windows have long been full.
@torch.no_grad()
def window_loss(model, data, window, sinks):
    """Nats per token in the second half of each row, read token by token through a ring."""
    one = twin(model)
    one.cfg = dataclasses.replace(model.cfg, window=window, sinks=sinks)
    inputs, targets = (part[:32].to(model.model.norm.weight.device) for part in data)  # (R, T) each
    cache, losses = Cache(one, WindowStore, len(inputs), 0), []
    for t in range(inputs.size(1)):
        logits = read(one, inputs[:, t:t + 1], cache, torch.ones_like(cache.lengths))  # (R, V)
        losses.append(F.cross_entropy(logits, targets[:, t]))
    return torch.stack(losses[len(losses) // 2:]).mean().item()


def seconds_each(works, rounds, device):
    """{name: function} -> {name: median seconds}. They take turns, so that whatever else the machine does hits all."""
    taken = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()  # without it only the launch is timed
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}  # round 0 warms up


# The draft is trained on the same text: acceptance depends on how alike the two distributions are, not on size alone.
def compare(target, draft, val_data, cfg):
    """What rounding, forgetting, guessing and queueing do to the small model. -> results."""
    loss = {name: evaluate(model, val_data, cfg) for name, model in (
        ("float32", target), ("int8", twin(target, int8=True)), ("draft", draft))}
    print("loss in nats per character:", *(f"{name} {value:.4f}" for name, value in loss.items()))
    ring = {f"{window} + {sinks}": window_loss(target, val_data, window, sinks)
            for window, sinks in ((cfg.block_size, 0), (64, 0), (60, 4), (32, 0), (28, 4), (16, 0), (12, 4))}
    print("through a ring of window + sinks:", *(f"{name}: {value:.3f}" for name, value in ring.items()))

    prompts, N, rates = [row[:32].tolist() for row in val_data[0][:4]], 64, []
    exact = all(speculate(target, draft, prompt, N, cfg.proposals)[0] == write(target, [prompt], N)[0].tolist()
                for prompt in prompts)

    # Plain and guessed writing take turns over the same prompts.
    seconds = seconds_each(dict(
        plain=lambda: [write(target, [prompt], N, temperature=1.0) for prompt in prompts],
        speculation=lambda: rates.extend(speculate(target, draft, prompt, N, cfg.proposals, 1.0)[1]
                                         for prompt in prompts)), 3, cfg.device)
    speed, acceptance = {name: len(prompts) * N / value for name, value in seconds.items()}, statistics.mean(rates)
    print(f"speculation, {cfg.proposals} proposals at temperature 1: {acceptance:.0%} accepted, "
          f"{speed['speculation']:.0f} tokens/s, plain {speed['plain']:.0f}; greedy tokens equal: {exact}")

    # tenfold: short prompts, every fourth answer 100 tokens and the others 10. alike: long prompts, 9 to 11 tokens.
    queue = {}
    for label, length, answer in (("tenfold", 16, lambda i: 10 if i % 4 else 100), ("alike", 128, lambda i: 9 + i % 3)):
        prompts, answers = [row[:length - i % 4].tolist() for i, row in enumerate(val_data[0][:16])], {}
        budgets = [answer(i) for i in range(len(prompts))]

        # The usual way: the next batch begins when the longest answer of this one has ended.
        def batches(prompts=prompts, budgets=budgets, answers=answers):
            answers["batches"] = []
            for i in range(0, len(prompts), cfg.slots):
                part = budgets[i:i + cfg.slots]
                rows = write(target, prompts[i:i + cfg.slots], max(part)).tolist()
                answers["batches"] += [row[:budget] for row, budget in zip(rows, part, strict=True)]

        def queued(prompts=prompts, budgets=budgets, answers=answers):
            answers["queue"], answers["passes"] = serve(target, prompts, budgets, cfg.slots)
        seconds = seconds_each(dict(batches=batches, queue=queued), 3, cfg.device)
        passes = sum(max(budgets[i:i + cfg.slots]) for i in range(0, len(budgets), cfg.slots))
        queue[label] = seconds | dict(passes_batches=passes, passes_queue=answers["passes"],
                                      same=answers["batches"] == answers["queue"])
        print(f"{len(prompts)} prompts, answers {label}: batches {passes} passes, {seconds['batches']:.2f} s; queue "
              f"{answers['passes']} passes, {seconds['queue']:.2f} s; same answers: {queue[label]['same']}")
    return dict(val_loss=loss, window_loss=ring, acceptance=acceptance, speculation_tokens_per_second=speed,
                speculation_exact=exact, queue=queue)


def streamed_bytes(model, context, kind):
    """The least that one token must read behind `context` others: all weights but the embedding, and the cache."""
    weights = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if "embed" not in name)
    cfg, like = model.cfg, model.model.norm.weight
    past = min(context, cfg.window + cfg.sinks) if kind is WindowStore else context
    return weights + past * 2 * cfg.n_layer * cfg.n_kv_head * (cfg.n_embd // cfg.n_head) * like.element_size()


# Q: What does "x % of the bandwidth" leave out?
# A: Everything read twice or written in between: a rung that copies shows a low share, since only the bytes that must
#    be read are counted. 100 % would be a plain sum over the same bytes.
def stepper(model, kind, context, room):
    """A function that writes one token behind `context` others, whose keys and values are zeros."""
    like = model.model.norm.weight
    ids, one = torch.zeros(1, context, dtype=torch.int64, device=like.device), torch.ones(1, 1).long().to(like.device)
    if kind is None:
        return lambda: model.lm_head(model.hidden(ids)[:, -1:])
    cache = Cache(model, kind, 1, context + room)
    zeros = like.new_zeros(1, model.cfg.n_kv_head, context, model.cfg.n_embd // model.cfg.n_head)  # (B, K, T, D)
    for store in cache.layers:
        store.update(zeros, zeros, torch.arange(context, device=like.device)[None], context)
    cache.lengths += context
    cache.longest = context
    return lambda: read(model, one, cache, one[0])


# The ladder, 125M shape, two cores, tokens per second behind 128 and 4,096 others (results/kv_cache.json):
#     none        7.0   0.16      everything again
#     growing      47     29      copies the past
#     static       47     33      copies nothing
#     compiled     64     42      one pass over each matrix
#     int8        184     76      a quarter of the bytes
#     window       65     62      forgets: the length of the text does not matter
# On a GPU the calls from Python set the pace: the 8B shape in bfloat16 on an H200 writes 42 growing and 126 compiled,
# 46 % of what 4,157 GB/s allow, and int8 gains nothing. Replaying a recorded graph of the calls is the cure (not here).
#
# Q: Why is int8 not four times as fast?
# A: A step takes bytes / bandwidth and a fixed time besides (calls, norms, softmax), and the cache is not rounded:
#    behind 4,096 tokens of the 125M shape it is 100 MB, as much as all int8 weights together.
@torch.no_grad()
def climb(cfg, contexts):
    """Time all rungs with random weights of this shape. -> results."""
    torch.manual_seed(cfg.seed)
    dtype, N = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32, 8
    # Trap on GPUs: cuDNN's attention makes a new plan for every length, that is, for every token that is written. The
    # 8B shape wrote 18 tokens a second with it and 38 without (H200, static).
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.device(cfg.device):
        model = Llama(cfg).to(dtype).requires_grad_(False)
    # The rungs differ in two things: how the model computes, and what keeps its keys and values.
    fast, rounded = twin(model, compiled=True), twin(model, int8=True, compiled=True)
    rungs = {"none": (model, None), "growing": (model, GrowingStore), "static": (model, StaticStore),
             "compiled": (fast, StaticStore), "int8": (rounded, StaticStore), "window": (fast, WindowStore)}
    # Read by a plain sum, larger than the caches: what memory really gives, not what its label says.
    buffer = torch.ones(2 ** (30 if cfg.device.startswith("cuda") else 26), device=cfg.device)  # 256 MiB, 4 GiB
    prompt, tokens = torch.randint(cfg.vocab_size, (1, 32)).tolist(), {}
    results = dict(read_bandwidth_gb_s={}, same_tokens={}, **{key: {rung: {} for rung in rungs} for key in (
        "tokens_per_second", "bandwidth_fraction")})
    for rung, (one, kind) in tqdm(rungs.items(), "compile"):
        tokens[rung] = write(one, prompt, 16, kind)
        results["same_tokens"][rung] = bool(torch.equal(tokens[rung], tokens["none"]))
    print(f"{streamed_bytes(model, 0, None) / 1e6:.0f} MB of weights; tokens/s and share of what memory allows behind")
    for context in tqdm(contexts, "measure"):
        # Reading everything again takes so long that once is enough; the others take turns, and memory with them.
        steps = {rung: stepper(one, kind, context, 6 * N) for rung, (one, kind) in rungs.items()}
        began = time.perf_counter()
        steps.pop("none")()
        seconds = {"none": time.perf_counter() - began}
        works = {rung: lambda step=step: [step() for _ in range(N)] for rung, step in steps.items()}
        timed = seconds_each(works | {"memory": buffer.sum}, 5, cfg.device)
        bandwidth = results["read_bandwidth_gb_s"][context] = buffer.numel() * 4 / timed.pop("memory") / 1e9
        # Share = bytes that must be read * tokens per second / bandwidth, measured in the same minute.
        for rung, (one, kind) in rungs.items():
            rate = 1 / seconds.get(rung, timed.get(rung, 0) / N)
            results["tokens_per_second"][rung][context] = rate
            results["bandwidth_fraction"][rung][context] = rate * streamed_bytes(one, context, kind) / bandwidth / 1e9
        tqdm.write(f"{context:6,} tokens ({bandwidth:.0f} GB/s):  " + "  ".join(
            f"{rung} {rates[context]:.1f} ({results['bandwidth_fraction'][rung][context]:.0%})"
            for rung, rates in results["tokens_per_second"].items()))
    print("same tokens as none:", *(rung for rung, same in results["same_tokens"].items() if same))
    bandwidth = 1e9 * statistics.median(results["read_bandwidth_gb_s"].values())
    return results, {context: bandwidth / streamed_bytes(model, context, StaticStore) for context in contexts}


def plot_ladder(path, lines, title):
    """lines: {label: {context: tokens per second}}."""
    from matplotlib.figure import Figure  # without pyplot: no window, so it works on a server
    ax = (figure := Figure(figsize=(7, 4.5), layout="tight")).add_subplot(
        xlabel="tokens in the cache", ylabel="tokens per second", title=title, xscale="log", yscale="log")
    for label, rates in lines.items():
        ax.plot(list(rates), list(rates.values()), "k--" if "memory" in label else "o-", label=label)
    ax.set_xticks(list(rates), map(str, rates))
    ax.minorticks_off()
    ax.legend(fontsize=8)
    figure.savefig(path)


def main(cfg):
    """Train a target and a draft, compare ways of writing with them, climb the ladder. -> the target, or None."""
    contexts, began, results, target = [int(n) for n in cfg.contexts.split(",") if n], time.perf_counter(), {}, None
    if min(cfg.proposals, cfg.window, cfg.slots, cfg.batch_size, cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.sinks + 1,
           *contexts) < 1 or cfg.n_head % cfg.n_kv_head or cfg.n_embd % (2 * cfg.n_head):
        raise ValueError("n_kv_head must divide n_head, 2 * n_head n_embd; sinks start at 0, other numbers at 1")
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    if cfg.max_steps:
        train_data, val_data, characters, name = make_data(cfg)
        cfg = dataclasses.replace(cfg, data=name, vocab_size=len(characters))
        # The draft: a sixth of the depth, half the width.
        small = dataclasses.replace(cfg, n_layer=1, n_head=2, n_kv_head=1, n_embd=64, ffn_size=192)
        torch.manual_seed(cfg.seed)
        target, draft = Llama(cfg).to(cfg.device), Llama(small).to(cfg.device)
        for model in (target, draft):
            fit(model, model.cfg, train_data, compute_loss, cfg.max_steps, cfg.lr)
        results |= compare(target.eval(), draft.eval(), val_data, cfg)
        prompt = val_data[0][0, :32].tolist()
        text = prompt + speculate(target, draft, prompt, 200, cfg.proposals, 0.8,
                                  torch.Generator(cfg.device).manual_seed(cfg.seed))[0]
        print("".join(characters[i] for i in text))
    if contexts:
        # Only with weights that outgrow the caches can be seen what memory does.
        shape = PRESETS["46m"] if target or not cfg.vocab_size else {}
        ladder, bound = climb(dataclasses.replace(cfg, **shape), contexts)
        results |= ladder
        # Six lines are as many as can be told apart; the window's, which is flat, is in the table.
        plot_ladder(out / "ladder.png", {rung: ladder["tokens_per_second"][rung] for rung in (
            "int8", "compiled", "static", "growing", "none")} | {"what memory allows without int8": bound},
            f"one row, {cfg.device}, weights larger than the caches")
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=results, seconds=time.perf_counter() - began)))
    print(f"see {out}")
    return target


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
