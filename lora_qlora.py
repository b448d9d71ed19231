# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface_hub>=0.26", "matplotlib>=3.8", "safetensors>=0.4.3", "tokenizers>=0.20", "torch>=2.11",
#                 "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
LORA AND QLORA IN ONE FILE                       python lora_qlora.py               1 min on two CPU cores

Paper    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; Dettmers et al. 2023,
         QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314
Idea     To teach a trained model something new, leave its weights alone and train a small addition to each matrix: a
         product of two thin ones, a few percent of the numbers. Frozen weights need little precision: four bits will do
Picture  x -> W (O, I), frozen, 32 bits or 4 ---------------> + -> y        y = x W^T + alpha/R * (x A^T) B^T
           -> A (R, I) -> B (O, R) -> * alpha/R ------------->              trained: A and B alone
Symbols  B batch   T time   C hidden_size   H query heads   K key/value heads   D head size   F intermediate_size
         V vocabulary   M rows of a product   I, O inputs and outputs of a layer   N blocks of 64 weights
         in an adapter: R rank, A (R, I) and B (O, R) its matrices
New here LoRALinear, add_lora, quantize_nf4, dequantize_nf4, NF4Linear, PEFT's files, instruction data
Not here DoRA (its formula is at LoRALinear), 8-bit Adam, paged optimizers, prefix tuning, several adapters at once
Expect   validation loss after 1,000 lines of the old form, mean of 3 seeds: full fine-tuning 0.281, LoRA 0.237 with 4.8
         % of the parameters (in one seed of three it is worse than full), QLoRA 0.217; old names right 81 %, 83 %, 89
         %; modern names still right 6 %, 6 %, 5 %, 99 % before; weights 1.62 MB, with QLoRA 0.33
Asked    Why should an update of rank 16 be enough?   Why does B begin at 0?   What is alpha for?   Which layers?
         What has to be kept for the backward pass, when W is frozen?   What does an adapter cost at inference?
         What do the frozen weights still cost?   How do I choose rank, alpha and the rate?

    python lora_qlora.py                                        train a small base, adapt it in three ways, compare
    python lora_qlora.py --checkpoint DIR --data my.json        adapt a Llama in Hugging Face's layout to instructions
    python lora_qlora.py --checkpoint DIR --data my.json --adapter runs/lora_qlora/lora --out runs/more    go on with it
"""
import argparse
import copy
import dataclasses
import functools
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
# A field is a flag (--rank 8) and its comment the help text. Each is explained where it is used.
@dataclasses.dataclass
class Config:
    data: str = "numbers"             # numbers | a .json list of {"instruction", "input", "output"}, with --checkpoint
    checkpoint: str = ""              # a Llama: folder in Hugging Face's layout, or repository; "" = train a small one
    adapter: str = ""                 # with --checkpoint: PEFT's folder to start from, with its own rank and alpha
    methods: str = ""                 # "" = full,lora,qlora; with --checkpoint lora (full: see llama3.py --load)
    out: str = "runs/lora_qlora"      # folder for the adapters, the summary and the picture
    seed: int = 1337                  # decides initial weights and batches
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu | cuda
    # The adapter.
    rank: int = 0                     # width of the addition to each matrix; 0 = 4, with --checkpoint 16
    alpha: float = 16.0               # the addition is multiplied by alpha / rank
    rslora: bool = False              # by alpha / sqrt(rank) instead, for ranks above 32
    dropout: float = 0.0              # share of the adapter's inputs that is zeroed in training
    targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # layers that get one, by name
    # Optimization.
    examples: int = 1000              # lines of the old form to adapt with
    block_size: int = 512             # longest instruction and answer in tokens, with --checkpoint
    base_steps: int = 700             # steps that train the small base
    max_steps: int = 0                # steps of each adaptation; 0 = 400, with --checkpoint 300
    lr: float = 0.0                   # peak learning rate of adapters; 0 = 0.01, with --checkpoint 2e-4
    full_lr: float = 4e-3             # peak learning rate of full fine-tuning
    batch_size: int = 0               # rows per step; 0 = 64, with --checkpoint 8
    warmup_steps: int = 20            # steps of linear warm-up
    beta2 = 0.99                      # no type, so no flag: Adam's memory


# Q: How do I choose rank, alpha and the rate?
# A: Fix alpha (16 here and in QLoRA's paper), take R between 8 and 64 (little data, small R) and search over the rate
#    alone: in large models adapters want about ten times that of full fine-tuning ("LoRA without regret", Schulman et
#    al. 2025). If more steps no longer help, double R. (The toy task is tiny: rank 4 and 2.5 times the rate do.)
SMALL = dict(methods="full,lora,qlora", rank=4, max_steps=400, lr=0.01, batch_size=64)
PUBLISHED = dict(methods="lora", rank=16, max_steps=300, lr=2e-4, batch_size=8)
PRESETS = {"laptop": {}}  # the defaults above


# --- 2. Model: the adapter, four bits, then the Llama that they are put into -----------------------------------------
# LoRA, low-rank adaptation. The weight stays; a narrow way around it learns:
#
#     x (M, I) ---> W (O, I), frozen -------------> + ---> y (M, O)          y = x W^T + s * (x A^T) B^T
#         |                                         ^
#         +-------> A (R, I) ---> B (O, R) ---> * s +                          s = alpha / R
#
# W has I * O numbers, the adapter R * (I + O): for 4,096 x 4,096 and R = 16 that is 0.8 %. Gradients and Adam's two
# moments, three quarters of the memory of full fine-tuning, exist for A and B alone.
#
# Q: Why should an update of rank 16 be enough for a matrix of rank 4,096?
# A: Nothing promises it. The idea is that the model has the features already, and a task reweights them, in a few
#    directions. The update that full fine-tuning finds is not of low rank; one of low rank often does as well, and with
#    little data better, since it can memorize less. Really new knowledge from much data: full fine-tuning wins.
#
# Q: Full fine-tuning, LoRA or QLoRA?
# A: Full: much data, and 16 bytes a parameter to spend (weight, gradient, two moments). LoRA: new behavior from little
#    data, or many adapters beside one base, which can be taken off again. QLoRA: when even the base does not fit.
class LoRALinear(nn.Module):
    """A frozen linear layer and a trained addition of rank R. Names inside are those of PEFT, Hugging Face's library.

    rslora, rank-stabilized, scales by alpha / sqrt(R) (Kalajdzievski 2023, arXiv 2312.03732). Not here: DoRA (Liu et
    al. 2024, arXiv 2402.09353), W' = m * (W + s B A) / |W + s B A|, the norm per row, m trained too.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False):
        super().__init__()
        self.base_layer, self.dropout, self.original = base.requires_grad_(False), dropout, None
        # In float32 whatever the base is: an update of 1e-5 next to a weight of 0.1 is lost in bfloat16.
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        # Q: Why does B begin at 0 and A at random, and not both at random, or both at 0?
        # A: B A = 0: the model begins as the base exactly. With both at 0 nothing ever moves: the gradient of B is a
        #    product with A and the other way round. With A at random B moves in the first step, A from the second on.
        # (A keeps nn.Linear's own beginning, uniform in +-1/sqrt(I), as in the paper's code.)
        nn.init.zeros_(self.lora_B.weight)
        # Q: What is alpha for, if the learning rate could do its work?
        # A: For changing R. B A is a sum of R products; at first each lowers the loss alike, and alpha / R keeps their
        #    joint effect of one size, so that a rate found at R = 8 is about right at 64. For large R that is too
        #    little: hence rslora. Trap: scaling by alpha alone; at R = 16 the update is 16 times too large.
        self.scale = alpha / (rank ** 0.5 if rslora else rank)

    def forward(self, x):
        """x (..., M, I) -> (..., M, O)."""
        y, A, B = self.base_layer(x), self.lora_A.weight, self.lora_B.weight
        if self.original is not None:  # merged
            return y
        # Narrow first: M*R*(I + O) multiplications. Trap: x @ (B @ A)^T, which builds an O x I matrix and costs as much
        # as W does. Dropout on the adapter's input only: the frozen path does not learn.
        narrow = F.linear(F.dropout(x, self.dropout, self.training).to(A.dtype), A).flatten(0, -2)  # (M, R)
        # addmm_ scales, multiplies and adds in one pass, over y: y + scale * product would write M*O numbers twice
        # more. In place is allowed, since the backward pass of a product needs its inputs and not its output.
        return y.flatten(0, -2).addmm_(narrow.to(y.dtype), B.t().to(y.dtype), alpha=self.scale).view_as(y)

    # Q: What does an adapter cost at inference?
    # A: Unmerged two thin products per layer, and hundreds of adapters can share one base in memory. Merged nothing.
    def merge(self):
        """Add s B A to the weight of an nn.Linear, until unmerge(). A bias stays as it is."""
        # Trap: merging twice. The model then overdoes what it learned, and nothing complains.
        assert isinstance(self.base_layer, nn.Linear), "only an nn.Linear can take the addition, no codes of 4 bits"
        assert self.original is None, "merged already"
        self.original = W, = (self.base_layer.weight,)  # a tuple, or nn.Module would count W as one more parameter
        total = W.data.float() + self.scale * self.lora_B.weight.data @ self.lora_A.weight.data  # (O, I)
        # A new Parameter: W may be shared. Trap: in bfloat16 most of a small update is rounded away here.
        self.base_layer.weight = nn.Parameter(total.to(W.dtype), requires_grad=False)

    def unmerge(self):
        """Back to the base and the addition, exactly: W itself was kept."""
        # Trap: adding in place and subtracting later. In bfloat16 (W + u) - u is not W: every round trip rounds.
        assert self.original is not None, "not merged"
        (self.base_layer.weight,), self.original = self.original, None


def add_lora(model, targets, rank, alpha, dropout=0.0, rslora=False):
    """Freeze the model and add to each linear layer named in targets, in place: ["q_proj", ...], or whole paths.

    Raises ValueError for a name that no layer has, or if there are adapters already.
    """
    # Q: Which layers?
    # A: All linear ones of the blocks. The paper adapted attention alone; leaving out the MLP, where most weights are,
    #    costs the most ("LoRA without regret"). Not norms (vectors), nor the tables of tokens.
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, NF4Linear))}
    model.requires_grad_(False)  # Trap: forgetting it. All weights train, and the memory is that of full fine-tuning
    for target in targets:
        found = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"no linear layer is called {target!r}; there are "
                             f"{', '.join(sorted({name.split('.')[-1] for name in layers}))}")
        for name in found:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoRALinear(layers[name], rank, alpha, dropout, rslora))
    return model


# QLoRA is LoRA on a quantized base: each weight is replaced by the nearest of 16 values, and its number is stored in
# four bits. Where should the 16 lie? Trained weights are about normally distributed: put them at quantiles of the
# normal distribution, dense where weights are dense (NF4, 4-bit NormalFloat). With Q(p) for the number below which a
# share p of a standard normal lies:
#     p = 1 - (1/30 + 1/32) / 2 = 0.9677   the outermost place, since Q(1) is infinite
#     8 positive values   Q(p), ... in 8 equal steps of probability down to, not including, Q(1/2) = 0
#     7 negative ones     -Q(p), ... in 7 steps likewise; and 0 itself, so that zeros stay zeros: 16
#     all divided by Q(p) = 1.848, so that they span -1 .. 1
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


# Each block of 64 weights is first divided by its largest magnitude: one outlier spoils the precision of 63 neighbors
# and not of a whole matrix. The price is a scale per block. The scales are numbers, too: double quantization stores
# them in 8 bits, in groups of 256 with a float32 scale.
#     one weight    4 + 32/64              = 4.5   bits        65 billion parameters: 36.6 GB
#     doubly        4 + 8/64 + 32/(64*256) = 4.127             33.5 GB; in bfloat16 130
# The price: blocks whose weights are far smaller than those of their group come back with a wrong size.
# The 8-bit code is a small floating-point format: 7 decades of each sign, the largest with 64 values, every smaller one
# with half as many. Scales minus their mean crowd around 0 and a few are far away (Dettmers 2015, arXiv 1511.04561).
@functools.cache
def lookup_tables(device):
    """-> (the two values of each byte as one item of 8 bytes (256), the values of the 8-bit code, ascending, (256))."""
    values = [0.0, 1.0]
    for i in range(7):  # decade 10^(i-6) holds 2^i values of each sign, the midpoints of equal parts of 0.1 .. 1
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        middle = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += middle.tolist() + (-middle).tolist()
    pairs = torch.stack((NF4.repeat_interleave(16), NF4.repeat(16)), 1)        # (256, 2): high nibble first
    # int64 is a container here and no number: what is looked up is turned back into two float32.
    return pairs.view(torch.int64)[:, 0].to(device), torch.tensor(sorted(values), device=device)


def quantize_nf4(weight):
    """weight, any shape -> codes (uint8, two per byte), scales (N) uint8, group scales float32, offset float32.

    The same bits as quantize_4bit of bitsandbytes (the library of QLoRA's authors) on a CPU. The weight is read as one
    long row: a block may hold the end of one row of W and the beginning of the next.
    """
    x = F.pad(weight.float().flatten(), (0, -weight.numel() % 64)).view(-1, 64)  # (N, 64)
    largest = x.abs().amax(1)                                                  # (N)
    # The nearest of 16 sorted values = how many of the 15 midpoints between them lie below. (clamp: a block of zeros.)
    middle = ((NF4[1:] + NF4[:-1]) / 2).to(x.device)
    codes = torch.bucketize(x * (1 / largest.clamp(min=1e-38))[:, None], middle).to(torch.uint8).flatten()  # (64*N)
    packed = codes[::2] << 4 | codes[1::2]                                     # (32*N): the first in the high nibble
    # Scales are positive: without taking their mean off half of a signed code would lie idle.
    offset = largest.mean()
    y = F.pad(largest - offset, (0, -len(largest) % 256)).view(-1, 256)        # (groups, 256)
    group = y.abs().amax(1)
    # First one of 65,536 steps, then the nearest value: so does bitsandbytes, and here every bit is to be as there.
    steps = ((y / group.clamp(min=1e-38)[:, None] + 1) * 32767.5 + 0.5).int()
    values = lookup_tables(x.device)[1]                                        # (256)
    scales = torch.bucketize(steps / 32767.5 - 1, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return packed, scales.flatten()[:len(largest)], group, offset


def dequantize_nf4(shape, codes, scales, group, offset):
    """What quantize_nf4 made -> the weight of that shape in float32, each number its code's value times a scale."""
    pairs, values = lookup_tables(codes.device)                                # (256) each
    scale = values[scales.int()] * group.repeat_interleave(256)[:len(scales)] + offset  # (N)
    # One lookup per byte fetches both of its values. Splitting nibbles and looking each up takes three times as long.
    x = pairs.index_select(0, codes.int()).view(torch.float32).view(-1, 64)    # (N, 64)
    return x.mul_(scale[:, None]).flatten()[:math.prod(shape)].view(shape)     # (O, I)


# Q: What has to be kept for the backward pass of y = x W^T, when W is frozen?
# A: W, for dx = dy W; not x, which dW = dy^T x would need. But each adapter keeps x for dA: with dropout, or in float32
#    beside a bfloat16 base, a copy of its own, and activations even grow. Left to itself autograd would keep the
#    dequantized W of every layer, 32 bits a weight after all. So W is made again, which takes as long for one row as
#    for 1,024: little beside a training step, more than the product itself when single tokens are written. Fast
#    inference needs a kernel that multiplies with the codes.
class NF4Product(torch.autograd.Function):
    """x W^T with W in 4 bits, dequantized once in the forward pass and once in the backward pass, and never kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer  # the codes. Trap: ctx.save_for_backward(W), which this class exists to avoid
        return F.linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantized().to(grad.dtype), None  # codes have no gradient


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight takes 4.127 bits a number. Its bias, if any, stays as it is."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        # Buffers and not parameters: they move and are saved with the model, and no optimizer ever sees them.
        for name, tensor in zip(("codes", "scales", "group", "offset"), quantize_nf4(linear.weight.data), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.data)

    def dequantized(self):
        """The weight (O, I) in float32, made anew in each call."""
        return dequantize_nf4((self.out_features, self.in_features), self.codes, self.scales, self.group, self.offset)

    def forward(self, x):
        """x (..., I) -> (..., O)."""
        y = NF4Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_model(model):
    """Replace every nn.Linear but the head by an NF4Linear, in place. -> the model."""
    # The head and the embedding stay, as in QLoRA: errors in logits are errors in the output.
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, NF4Linear(module))
    return model


# The base: Llama 3, with the published names; llama3.py explains its parts. Its shape is a dict with the fields of
# config.json; this is the shape of the small base, 0.4 million parameters.
BASE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=45, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_theta=10_000.0, rope_factor=1.0)

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


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)); H query heads share K key/value heads."""

    def __init__(self, shape):
        super().__init__()
        C, self.H, self.K = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
        KD, ffn_size = C // self.H * self.K, shape["intermediate_size"]
        linear = functools.partial(nn.Linear, bias=False)
        self.self_attn = nn.ModuleDict(dict(
            q_proj=linear(C, C), k_proj=linear(C, KD), v_proj=linear(C, KD), o_proj=linear(C, C)))
        self.mlp = nn.ModuleDict(dict(
            gate_proj=linear(C, ffn_size), up_proj=linear(C, ffn_size), down_proj=linear(ffn_size, C)))
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(C, eps=shape["rms_norm_eps"]) for _ in range(2))

    def forward(self, x, rope):
        # Each layer is called as a module: whatever else makes (..., O) from (..., I) can stand in its place.
        attn, mlp, h = self.self_attn, self.mlp, self.input_layernorm(x)       # h (B, T, C)
        q = attn.q_proj(h).unflatten(-1, (self.H, -1)).transpose(1, 2)         # (B, H, T, D)
        k, v = (layer(h).unflatten(-1, (self.K, -1)).transpose(1, 2) for layer in (attn.k_proj, attn.v_proj))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, D)
        x = x + attn.o_proj(y.transpose(1, 2).flatten(2))                      # (B, T, C)
        h = self.post_attention_layernorm(x)                                   # (B, T, C)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))    # (B, T, C)


# differs from llama3.py: the shape is a config.json, and layers are modules that can be replaced
class Llama(nn.Module):
    """ids (B, T) -> logits (B, T, V)."""

    def __init__(self, shape):
        super().__init__()
        C, V, layers, self.shape = shape["hidden_size"], shape["vocab_size"], shape["num_hidden_layers"], shape
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(V, C), layers=nn.ModuleList(LlamaLayer(shape) for _ in range(layers)),
            norm=nn.RMSNorm(C, eps=shape["rms_norm_eps"])))
        self.lm_head = None if shape["tie_word_embeddings"] else nn.Linear(C, V, bias=False)
        # std 1/sqrt(width); the last matrix of each branch is smaller, so that the sum of all branches keeps its size.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, (C * (2 * layers if re.search("o_proj|down", name) else 1)) ** -0.5)

    def forward(self, ids):
        x, shape = self.model.embed_tokens(ids), self.shape                    # x (B, T, C)
        rope = rope_angles(torch.arange(ids.size(1), device=ids.device), shape["hidden_size"] // shape[
            "num_attention_heads"], shape["rope_theta"], shape["rope_factor"])  # (T, D) each
        for layer in self.model.layers:
            x = layer(x, rope)                                                 # (B, T, C)
        x = self.model.norm(x)                                                 # (B, T, C)
        return self.lm_head(x) if self.lm_head is not None else F.linear(x, self.model.embed_tokens.weight)  # (B, T, V)


# --- 3. Objective: the next token ------------------------------------------------------------------------------------
IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def compute_loss(model, inputs, targets):
    """inputs, targets (B, T) -> sum of -ln p(target) over the targets that count, in nats."""
    logits = model(inputs).float()                                             # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


# --- 4. Data: names of numbers, modern and old; instructions ---------------------------------------------------------
# The toy language: numbers and their English names (see toy_dataset.py).

UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# differs from toy_dataset.py: two more words, no tokens of BERT
TOY_VOCAB = ["<pad>", "\n", "=", *"0123456789", *UNITS, *TENS, "hundred", "thousand", "and", "old"]
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


# The second form of the toy language: English as it was counted two centuries ago, "four and twenty blackbirds". Units
# stand before tens, and people were free to say "and" after hundred and thousand, or not:
#     24 = four and twenty           40215 = forty thousand two hundred [and] fifteen
# Two new words ("and", and the "old" that asks for it), a new order, and a choice that nobody can predict: that is what
# fine-tuning data look like.
def old_names(n):
    """0 <= n <= 999,999 -> all names of the old form; the data draw each of them equally often."""
    if n >= 100:
        size, word = (1000, "thousand") if n >= 1000 else (100, "hundred")
        rest = old_names(n % size) if n % size else []
        ends = [f" {name}" for name in rest] if rest else [""]
        if n % size < 100:  # "and" only before what is left of tens and units
            ends += [f" and {name}" for name in rest]
        return [f"{head} {word}{end}" for head in old_names(n // size) for end in ends]
    return [f"{UNITS[n % 10]} and {TENS[n // 10 - 2]}" if n >= 20 and n % 10 else number_to_words(n)]


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


def instruct_prompt(entry):
    """The Alpaca template (Taori et al. 2023): what the model reads before it answers an instruction."""
    # A chat model has a template of its own; a base model knows none, and learns any that is always the same.
    extra = f"### Input:\n{entry['input']}\n\n" if entry.get("input") else ""
    return ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{entry['instruction']}\n\n{extra}### Response:\n")


def number_rows(numbers, old, seed):
    """Numbers -> rows "24=twenty four", or of the old form "old 24=four and twenty", which has a choice."""
    rng = random.Random(seed)
    return answer_rows([(encode_toy(f"old {n}="), encode_toy(f"{rng.choice(old_names(n))}\n")) if old else
                        (encode_toy(f"{n}="), encode_toy(f"{number_to_words(n)}\n")) for n in numbers])


def instruction_rows(cfg, tokenizer, eos):
    """A JSON list of {"instruction", "input" (may be missing), "output"} -> (train rows, validation rows: a tenth).

    Raises OSError, or ValueError for a file of another form.
    """
    entries, rows = json.loads(Path(cfg.data).read_text(encoding="utf-8-sig")), []
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("instruction", "output")):
            raise ValueError(f"{cfg.data}, entry {i}: not a text each for instruction, output")
        # Prompt with <|begin_of_text|>, answer with an end: without that the model never stops.
        rows.append((tokenizer.encode(instruct_prompt(entry)).ids,
                     tokenizer.encode(entry["output"], add_special_tokens=False).ids + [eos]))
    kept = [row for row in rows if sum(map(len, row)) <= cfg.block_size]
    print(f"{cfg.data}: {len(rows) - len(kept)} of {len(rows)} entries dropped, longer than --block-size "
          f"{cfg.block_size}")
    if len(kept) < 10:
        raise ValueError(f"{cfg.data}: {len(kept)} entries are too few")
    return answer_rows(kept[len(kept) // 10:]), answer_rows(kept[:len(kept) // 10])


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


# Q: What do the frozen weights still cost?
# A: Their memory, and two thirds of the arithmetic: forward (2 operations per weight and token) and the gradient that
#    passes through them to the layers below (2 more); their own gradient (2) is what is saved. So LoRA saves a third of
#    the time at best, and of 16 bytes a parameter the 12 of gradient and moments. Activations do not shrink. In a model
#    as small as this the adapters' many little products take back what is saved; from a width of 512 on it is a gain.
def measure_steps(models, data, cfg, rounds=11):
    """{method: model} -> {method: ms of one training step}. The methods take turns, so that all meet the same load; the
    rate is 0: nothing is learned."""
    batch = [part.to(cfg.device) for part in get_batch(data, cfg.batch_size, cfg.seed, 0)]
    optimizers = {name: make_optimizer(model.train(), dataclasses.replace(cfg, lr=0.0))
                  for name, model in models.items()}
    times = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            began = time.perf_counter()
            (compute_loss(model, *batch) / batch[0].numel()).backward()
            optimizers[name].step()
            if cfg.device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - began))
            optimizers[name].zero_grad(set_to_none=True)
    return {name: sorted(taken)[rounds // 2] for name, taken in times.items()}


def bytes_of(tensors):
    """Bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- 6. Decoding: greedy, without a cache ----------------------------------------------------------------------------
# Each new token reads the whole text again: enough for a sample. kv_cache.py does it fast; the file that section 7
# writes is read by PEFT, vLLM and others.
@torch.no_grad()
def complete(model, ids, max_new_tokens, eos):
    """Continue a list of ids with the likeliest tokens, to the first eos. -> the new ids, eos among them."""
    start, device = len(ids), next(model.parameters()).device
    while len(ids) < start + max_new_tokens and ids[start:][-1:] != [eos]:
        ids = ids + [model.eval()(torch.tensor([ids], device=device))[0, -1].argmax().item()]
    return ids[start:]


# Q: Why exact match and not the share of right tokens?
# A: Errors multiply: 99 % of tokens right is 0.99^10 = 90 % of names of ten tokens. A name counts when it is one of
#    those that people use, whichever; nearly right is wrong.
@torch.no_grad()
def exact_match(model, numbers, old, device):
    """Share of numbers that greedy decoding answers with one of their names."""
    rows = [(n, encode_toy(f"old {n}=" if old else f"{n}="), encode_toy(f"{name}\n"))
            for n in set(numbers) for name in (old_names(n) if old else [number_to_words(n)])]
    inputs, targets = (part.to(device) for part in answer_rows([row[1:] for row in rows]))
    # Greedy decoding writes a name exactly if each of its tokens is the likeliest behind those before it: one pass over
    # all names tells, without writing.
    right = ((model.eval()(inputs).argmax(-1) == targets) | (targets == IGNORE)).all(1)  # (R)
    return len({row[0] for row, hit in zip(rows, right.tolist(), strict=True) if hit}) / len(set(numbers))


# --- 7. Interchange: a published Llama in, adapters in and out -------------------------------------------------------
# Fields of config files that do not change the arithmetic. Any other one that is not known here is refused.
HARMLESS = ("architectures|.*_p?drop(out)?|.*_token_id|(torch_)?dtype|initializer_range|use_cache|pretraining_tp|"
            "transformers_version|_.*|task_.*|unsloth_.*|max_position_embeddings|"
            "base_model.*|revision|inference_mode|auto_mapping|peft_version|target_modules|exclude_modules|"
            "r|lora_alpha|use_rslora|layers_(to_transform|pattern)|megatron_core|qalora_group_size|loftq_config")


def check_config(config, known, file):
    """Raise ValueError for a field that is neither as in `known`, nor empty, nor harmless."""
    for key, value in config.items():
        # What changes no shape is better refused than silently wrong. None, False, {} and [] mean "not used".
        if value and value != known.get(key) and not re.fullmatch(HARMLESS, key):
            raise ValueError(f"{file} says {key} = {value!r}, which this file does not implement")


def from_pretrained(name):
    """A Llama: folder in Hugging Face's layout, or repository on its hub -> (model in eval mode, folder).

    Raises OSError if it cannot be found, ValueError if this file does not implement it, RuntimeError for a missing,
    unknown or misshapen tensor.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    folder = Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    hf = dict(rms_norm_eps=1e-6, tie_word_embeddings=False) | json.loads((folder / "config.json").read_text("utf-8"))
    # Old files have rope_theta and rope_scaling, new ones put both into rope_parameters; each may stand in either.
    rope = dict(rope_type="default", rope_theta=hf.pop("rope_theta", 1e4))
    rope |= (hf.pop("rope_parameters", None) or {}) | (hf.pop("rope_scaling", None) or {})
    shape = {key: hf[key] for key in BASE if key in hf} | dict(
        rope_theta=rope.pop("rope_theta"), rope_factor=rope.get("factor", 1.0))
    check_config(hf, shape | dict(model_type="llama", hidden_act="silu", head_dim=shape["hidden_size"] // shape[
        "num_attention_heads"]), "config.json")
    if rope != dict(rope_type="default"):
        check_config(rope, dict(rope_type="llama3", factor=shape["rope_factor"], low_freq_factor=1.0,
                                high_freq_factor=4.0, original_max_position_embeddings=8192), "rope_scaling")
    tensors = {key: tensor for file in sorted(folder.glob("model*.safetensors")) for key, tensor in load_file(
        file).items() if not (shape["tie_word_embeddings"] and key == "lm_head.weight")}
    with torch.device("meta"):  # shapes without memory: the tensors are taken as they are in the file
        model = Llama(shape)
    model.load_state_dict(tensors, assign=True)
    model.eos = hf["eos_token_id"][0] if isinstance(hf["eos_token_id"], list) else int(hf["eos_token_id"])
    return model.to(tensors["model.embed_tokens.weight"].dtype).eval(), folder


def save_adapter(model, base_name, folder):
    """Write the adapters as PEFT does: adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    first = next(iter(layers.values()))
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters()
               if ".lora_" in name}, Path(folder, "adapter_model.safetensors"))
    Path(folder, "adapter_config.json").write_text(encoding="utf-8", data=json.dumps(dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base_name, r=first.lora_A.out_features,
        # alpha = scale * r, whatever the scale was made of: PEFT divides by r again.
        lora_alpha=first.scale * first.lora_A.out_features, lora_dropout=first.dropout, bias="none",
        target_modules=sorted({name.split(".")[-1] for name in layers}))))


@torch.no_grad()
def load_adapter(model, folder, dropout=0.0):
    """Put the adapter of a folder (ours or PEFT's) beside the layers of its base, in place.

    Raises OSError if a file is missing, ValueError if this file does not implement it or its shapes are another base's.
    """
    from safetensors.torch import load_file
    config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    # init_lora_weights: some ways to initialize an adapter change the base, too; True is the usual one.
    check_config(config, dict(peft_type="LORA", bias="none", init_lora_weights=True), "adapter_config.json")
    # Which layers have one is read off the names in the file: target_modules may also be a pattern.
    tensors = {name.removeprefix("base_model.model."): tensor
               for name, tensor in load_file(Path(folder, "adapter_model.safetensors")).items()}
    if model.lm_head is None and any(name.startswith("lm_head") for name in tensors):
        raise ValueError("the adapter is for lm_head, which is the embedding in this base: one table cannot be both")
    add_lora(model, sorted({name.split(".lora_")[0] for name in tensors if ".lora_" in name}), config["r"],
             config["lora_alpha"], dropout, bool(config.get("use_rslora")))
    known = model.state_dict()
    for name in {name for name in known if ".lora_" in name} | tensors.keys():
        # PEFT copies lm_head's base_layer into the file when it adapts it. An equal one says nothing new.
        if name not in known or name not in tensors or known[name].shape != tensors[name].shape or (
                ".lora_" not in name and not torch.equal(known[name].cpu(), tensors[name])):
            raise ValueError(f"{name}: the adapter's file does not fit this base")
        known[name].copy_(tensors[name])


# --- 8. Main: a base, three adaptations, one table -------------------------------------------------------------------
def plot_adaptation(path, curves):
    """curves {method: [(step, validation loss)]}."""
    from matplotlib.figure import Figure  # without pyplot: no window, so it works on a server
    ax = (figure := Figure(layout="tight")).add_subplot(
        xlabel="step", ylabel="validation loss, nats per token", title="adapting the same base", yscale="log")
    for (method, points), style in zip(curves.items(), ("o-", "s--", "^-."), strict=False):
        ax.plot(*zip(*points, strict=True), style, label=method)
    ax.legend()
    figure.savefig(path)


def small_base(cfg):
    """-> (a base that has learned modern names, rows of old names to train and to validate, decode, eos)."""
    modern = number_rows(draw_numbers(60_000, cfg.seed, False), False, cfg.seed)
    train = number_rows(draw_numbers(cfg.examples, cfg.seed + 1, False), True, cfg.seed)
    val = number_rows(draw_numbers(1000, cfg.seed + 1, True), True, cfg.seed)
    base = Llama(BASE).to(cfg.device)
    print(f"{sum(p.numel() for p in base.parameters()):,} parameters learn modern names")
    fit(base, cfg, modern, compute_loss, cfg.base_steps, 3e-3)
    return base, train, val, lambda ids: " ".join(TOY_VOCAB[i] for i in ids), EOS


def published_base(cfg):
    """-> (the Llama of --checkpoint, rows of instructions to train and to validate, decode, eos)."""
    from tokenizers import Tokenizer
    try:
        base, folder = from_pretrained(cfg.checkpoint)
        # Published files may say "pad to 128" or "cut at 128"; that is for batches, not for a text.
        text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | dict(padding=None, truncation=None)
        tokenizer = Tokenizer.from_str(json.dumps(text))
    except Exception as problem:  # files, safetensors and torch each have their own kinds; here all mean the same
        raise ValueError(f"--checkpoint {cfg.checkpoint}: {type(problem).__name__}: {problem}") from problem
    return base.to(cfg.device), *instruction_rows(cfg, tokenizer, base.eos), tokenizer.decode, base.eos


def make_ready(base, method, cfg):
    """A model to train by that method: for full a copy of the base, else one that shares the base's weights."""
    if method == "full":
        return copy.deepcopy(base).requires_grad_(True)
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # a memo: what is in it is not copied
    if method == "qlora":
        quantize_model(model)
    torch.manual_seed(cfg.seed)  # A is drawn at random
    if cfg.adapter:
        load_adapter(model, cfg.adapter, cfg.dropout)
    else:
        add_lora(model, cfg.targets.split(","), cfg.rank, cfg.alpha, cfg.dropout, cfg.rslora)
    return model.to(cfg.device)


def tabulate(models, curves, train, cfg):
    """{name: model}, the base among them -> {figure: {name: value}}, printed as a table."""
    results = dict(
        val_loss={"base": next(iter(curves.values()))[0][1]} | {name: points[-1][1] for name, points in curves.items()},
        trainable_parameters={name: sum(p.numel() for p in models[name].parameters() if p.requires_grad)
                              for name in curves},
        weight_bytes={name: bytes_of([*model.parameters(), *model.buffers()]) for name, model in models.items()},
        step_ms=measure_steps({name: models[name] for name in curves}, train, cfg))
    if not cfg.checkpoint:
        numbers = draw_numbers(500, cfg.seed + 2, True)
        results |= {key: {name: exact_match(model, numbers, old, cfg.device) for name, model in models.items()}
                    for key, old in (("exact_match", True), ("exact_match_modern", False))}
    # How to read it. weight_bytes: with qlora matrices have 4 bits, tables 32; the adapter is counted. Training takes
    # 12 bytes more for each trained parameter, gradient and two moments. exact_match_modern: what is left of the modern
    # names when the old form was learned; take the adapter off, and the base is as it was.
    print(f"\n{'':<22}" + "".join(f"{name:>10}" for name in models))
    for key, row in results.items():
        form = ",.0f" if "bytes" in key or "para" in key else ".3f"
        print(f"{key:<22}" + "".join(f"{format(row[name], form) if name in row else '-':>10}" for name in models))
    return results


def main(cfg):
    """Train a small base or take --checkpoint, adapt it with each method, compare. -> {method: model}."""
    cfg = dataclasses.replace(cfg, **{key: getattr(cfg, key) or value for key, value in (
        PUBLISHED if cfg.checkpoint else SMALL).items()})
    methods = cfg.methods.split(",")
    if not set(methods) <= {"lora", "qlora", "lora" if cfg.checkpoint else "full"} or min(
            cfg.rank, cfg.max_steps, cfg.base_steps, cfg.batch_size) < 1:
        raise ValueError("methods are full (without --checkpoint), lora, qlora; rank, steps, batch_size start at 1")
    if bool(cfg.checkpoint) == (cfg.data == "numbers") or cfg.adapter and not cfg.checkpoint:
        raise ValueError("--checkpoint goes with --data FILE.json; without it there are the numbers alone")
    began, curves, models = time.perf_counter(), {}, {}
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    base, train, val, decode, eos = published_base(cfg) if cfg.checkpoint else small_base(cfg)
    before = evaluate(base, val, cfg)

    # Same base, same rows in the same order, same number of steps.
    for method in methods:
        model = models[method] = make_ready(base, method, cfg)
        curves[method] = [(0, before)]

        def after_step(step, method=method, model=model):
            if (step + 1) % max(1, cfg.max_steps // 10) == 0 or step + 1 == cfg.max_steps:
                curves[method].append((step + 1, evaluate(model, val, cfg)))
                if not math.isfinite(curves[method][-1][1]):
                    raise ValueError(f"the loss is not finite at step {step + 1}: try a lower --lr")
                if cfg.checkpoint:
                    save_adapter(model, cfg.checkpoint, out / method)
        fit(model, cfg, train, compute_loss, cfg.max_steps, cfg.full_lr if method == "full" else cfg.lr, after_step)
    models = {"base": base} | models
    results = tabulate(models, curves, train, cfg)
    for name, model in models.items():
        prompt = val[0][0][:int((val[1][0] != IGNORE).nonzero()[0]) + 1].tolist()
        print(f"{name:<6}{decode(prompt + complete(model, prompt, 40, eos))!r}")
    plot_adaptation(out / "curve.png", curves)
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=results, val_loss=curves[methods[-1]][-1][1], history=curves,
        seconds=time.perf_counter() - began)))
    print(f"\nsee {out}")
    return models


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
