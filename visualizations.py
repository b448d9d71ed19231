# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "torch>=2.11"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
THE IDEAS AS PICTURES                            python visualizations.py           85 s on two CPU cores

Idea     A picture of an idea should show the thing itself. Each of these calls the functions of the script that it is
         about, or looks into a model that was trained for it. The sentence above it is computed from its numbers.
Picture  scripts --functions--------------------------+
            |                                         +--> figure --> <out>/NAME.png and one sentence
            +--a short training--> <out>/models/NAME--+
Not here loss curves, timings, masks, expert loads: the scripts draw their own. A beam search: see decoder_only.py
Expect   12 pictures. The models behind them are small and trained for seconds: read shapes and orders of magnitude
Asked    Which architecture for which task?   Why does RoPE see distances only?   Why not one number per distance?
         Do attention maps explain a model?   Why divide by sqrt(D)?   Is online softmax an approximation?
         Why do deep plain networks not learn?   Do neighbors in a flat map mean neighbors in the model?
         Why blocks of 64?   Top-k or top-p?   What do grouped queries save?                  (grep "# Q:")

    python visualizations.py                                   all; models are trained once and kept
    python visualizations.py --only rope,softmax               some: architectures positions rope buckets attention
        scale softmax gradients embeddings nf4 sampling cache
    python visualizations.py --steps-share 0.05                a quick look at barely trained models
"""
import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import torch

import decoder_only
import encoder_decoder
import encoder_only
import flash_attention
import kv_cache
import llama3
import lora_qlora
import toy_dataset


# --- 1. Config: which pictures, and where to -------------------------------------------------------------------------
@dataclasses.dataclass
class Config:
    only: str = ""                    # names of pictures with commas between them; "" = all
    out: str = "runs/visualizations"  # folder for the pictures, summary.json and the models trained for them
    seed: int = 1337                  # decides initial weights, batches, samples and random vectors
    steps_share: float = 1.0          # share of the training steps below; 0.05 for a quick look


PRESETS = {"default": {}}


# --- 2. Model: what is in one, and the small ones that are looked into -----------------------------------------------
# A picture is a function picture_NAME(cfg) -> figure, whose title is a sentence with numbers taken from what is drawn.
# It shows the thing itself: a function of a script at work, or a model behind its own training. So if a script is
# changed and no longer does what it says, its picture changes too.
#
# Three architectures learn the same task, numbers and their names in toy_dataset.py's vocabulary (46 tokens); "text" is
# a GPT of characters that reads Python's own help texts, which come with Python. Each is trained until it shows what
# its pictures are about, and no longer: a fifth to a third of the steps that the scripts take by default.
RECIPES = {  # name: (script, class of the model, settings other than the script's own)
    "encoder": (encoder_only, encoder_only.BERT, dict(max_steps=900, warmup_steps=150)),
    "decoder": (decoder_only, decoder_only.GPT, dict(max_steps=600, n_layer=2, n_embd=64, block_size=16,
                                                     batch_size=64)),
    "translator": (encoder_decoder, encoder_decoder.T5, dict(max_steps=500)),
    "text": (decoder_only, decoder_only.GPT, dict(max_steps=400, n_layer=2, data="pydocs"))}


def build(cfg, name):
    """A model of RECIPES before its training. -> (script, model, settings)."""
    script, kind, changes = RECIPES[name]
    settings = script.Config(out=f"{cfg.out}/models/{name}", seed=cfg.seed, device="cpu", **changes)
    # One evaluation, at the end; each also writes a checkpoint.
    settings.max_steps = settings.eval_every = max(1, round(cfg.steps_share * settings.max_steps))
    settings.vocab_size = text_tokenizer().n_vocab if name == "text" else len(toy_dataset.TOY_VOCAB)
    torch.manual_seed(cfg.seed)
    return script, kind(settings), settings


def text_tokenizer():
    """The characters of Python's help texts."""
    return decoder_only.make_tokenizer("char", "".join(sorted(set(decoder_only.load_text("pydocs")[0]))))


def rows_for(name, settings):
    """-> (training rows, validation rows), each as the script of that model wants them."""
    if name == "text":
        return decoder_only.make_data(settings)[:2]
    # No more numbers than will be seen.
    train = toy_dataset.draw_numbers(min(40_000, settings.max_steps * settings.batch_size), settings.seed, False)
    val = toy_dataset.draw_numbers(500, settings.seed, True)
    if name == "decoder":
        return [toy_dataset.decoder_rows(numbers)[:2] for numbers in (train, val)]
    if name == "translator":
        # The model makes its own decoder input from the targets, so the one in the middle is left out.
        return [toy_dataset.seq2seq_rows(numbers)[::2] for numbers in (train, val)]
    # BERT's rows carry the tokenizer, since new noise is drawn for every batch: it says which id is [MASK].
    tokenizer = encoder_only.Tokenizer((), toy_dataset.encode_toy, None, settings.vocab_size, toy_dataset.MASK)
    rows = []
    for numbers in (train, val):
        ids, _, _, match = toy_dataset.encoder_pairs(numbers, settings.seed)
        rows.append(encoder_only.Rows(ids, 1 - match, settings.mask_rate, tokenizer))  # 0 is "they match" in BERT
    return rows[0], encoder_only.hide(rows[1], torch.arange(500), torch.Generator().manual_seed(0))


def trained(cfg, name):
    """A model of RECIPES, trained, in eval mode. Trains it if no earlier call has."""
    script, model, settings = build(cfg, name)
    path = Path(settings.out, "ckpt.pt")
    state = torch.load(path, weights_only=True) if path.is_file() else None
    # Trap: taking a model for the right one because its file is there. It may have another seed or fewer steps; and
    # train() also saves before the end. What has these settings goes on from its step, which may be the last one.
    # (Whoever changes a script's code deletes the folder models/.)
    if state and state["config"] == dataclasses.asdict(settings):
        model.load_state_dict(state["model"])
    else:
        state = None
    if not state or state["step"] < settings.max_steps:
        print(f"training {name} of {Path(script.__file__).name}, {settings.max_steps} steps", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        script.train(model, settings, *rows_for(name, settings), (), state)
    return model.eval()


# Okabe and Ito's colors, which people with any kind of color vision can tell apart. What a color says is said again by
# a marker, a line style or a label: pictures are also printed in grey.
BLUE, RED, GREEN, ORANGE, SKY, PURPLE, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#8C8C8C")


def canvas(rows, columns, height, **options):
    """-> (an empty figure 10 inches wide, its axes in one list). The letters stay readable at 800 pixels."""
    from matplotlib.figure import Figure  # without pyplot: no window, so it works on a server
    # "constrained" moves axes apart until no label, title or color bar covers another.
    figure = Figure(figsize=(10, height), dpi=110, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def heat(ax, values, colors, limits, **labels):
    """A matrix (rows, columns) as an image, row 0 at the top, a cell one color. -> the image, for a color bar."""
    ax.set(**labels)
    # "nearest": smoothed, a map of weights would show cells that do not exist.
    low, high = limits
    return ax.imshow(values.numpy(), cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


# Three ways to stack the same block. An encoder reads everything at once and answers in place; a decoder reads its own
# output; an encoder-decoder does both, and the two meet in cross-attention only.
# Q: Which of the three for which task?
# A: Text in, a label or a vector out: an encoder, where every token sees both sides. Text out: mostly a decoder, one
#    objective and one cache for everything. An encoder-decoder reads the source both ways, and once: it pays where
#    source and target are two things, as in translation and speech.
# How to read it: bottom up, as the data flow. A number is a count of parameters, a shape what comes in or goes out. The
# blue boxes are nearly the same thing: what differs is the mask, and the cross-attention, which makes a decoder layer a
# third larger.
# What people get wrong: "encoder-decoder = two models". The decoder asks the encoder's output for keys and values in
# every layer, and one loss trains all of it.
def picture_architectures(cfg):
    """Encoder-only, decoder-only and encoder-decoder as boxes, with shapes and parameters of the models used here."""
    encoder, decoder, both = (build(cfg, name)[1] for name in ("encoder", "decoder", "translator"))
    bert, gpt, layers, V = encoder.bert, decoder.transformer, both.cfg.n_layer, len(toy_dataset.TOY_VOCAB)

    def count(*parts):
        return f"{sum(p.numel() for part in parts for p in part.parameters()):,}"
    # Boxes from the bottom up. A tied head has no weights of its own: it is the token table, read the other way round.
    columns = {
        "encoder-only\n(BERT)": [
            "ids (B, T)", f"tokens + positions + halves\n{count(bert['embeddings'])}",
            f"{encoder.cfg.n_layer} x [attention, both ways\n+ MLP]\n{count(bert['encoder'])}",
            f"pooler, two heads\n{count(bert['pooler'], encoder.cls)}", f"each token (B, T, {V})\nmatch? (B, 2)"],
        "decoder-only\n(GPT-2)": [
            "ids (B, T)", f"tokens + positions\n{count(gpt['wte'], gpt['wpe'])}",
            f"{decoder.cfg.n_layer} x [attention, causal\n+ MLP]\n{count(gpt['h'])}",
            "head: the token table again", f"next token (B, T, {V})"],
        # T5 takes two columns, and its decoder three parts in a layer.
        "encoder-decoder (T5):\nits encoder": [
            "source ids (B, S)", f"tokens\n{count(both.shared)}",
            f"{layers} x [attention, both ways\n+ MLP]\n{count(both.encoder)}", f"memory (B, S, {both.cfg.n_embd})"],
        "encoder-decoder (T5):\nits decoder": [
            "target so far (B, T)", "the same table",
            f"{layers} x [attention, causal\n+ CROSS-ATTENTION\n+ MLP]\n{count(both.decoder)}",
            "head: the token table again", f"next token (B, T, {V})"]}
    figure, (ax,) = canvas(1, 1, 5.8)
    for x, (title, boxes) in enumerate(columns.items()):
        ax.text(x, 4.7, title, ha="center", va="center", fontsize=11, weight="bold")
        top = 0
        for y, text in enumerate(boxes):
            color = "white" if "(B, " in text else ("", "#F0E442", SKY, ORANGE)[y]
            ax.text(x, y, text, ha="center", va="center", fontsize=9,
                    bbox=dict(boxstyle="round,pad=0.6", fc=color, ec="black"))
            # An arrow from the box below: a line of text is 0.18 high, a box has 0.1 around its text.
            half = 0.1 + 0.09 * len(text.split("\n"))
            if y:
                ax.annotate("", (x, y - half), (x, top), arrowprops=dict(arrowstyle="-|>"))
            top = y + half
    # Where the two stacks meet.
    ax.annotate("", (2.67, 2.1), (2.3, 3), arrowprops=dict(arrowstyle="-|>", lw=2, color=RED))
    ax.text(2, 3.5, "keys and values\nfor every decoder layer", color=RED, ha="center", va="center")
    ax.set(xlim=(-0.55, 3.55), ylim=(-0.4, 5))
    ax.axis("off")
    figure.suptitle(f"The same block stacked in three ways, width {both.cfg.n_embd}. Parameters: encoder-only "
                    f"{count(encoder)},\ndecoder-only {count(decoder)}, encoder-decoder {count(both)}")
    return figure


# An encoder's attention is blind to order: shuffle the tokens and each gets the same mean. Something has to say where a
# token stands. The 2017 paper adds sines and cosines (section 3.5), computed once and for ever; GPT-2 adds a table that
# is learned like any weight.
# Why so many speeds? Like the digits of a number: fast columns count tokens, slow ones hundreds. With width 128 the
# slowest goes round in some 50,000 tokens, so no two positions of a text look alike.
# How to read it. Left: a row is one position's vector; fast columns flicker, slow ones hardly move. Middle: stripes
# along the diagonal, only the distance counts. Right: what training made of random rows; color beside the diagonal
# means that neighbors have become alike.
# What people get wrong: sinusoids do not "encode the position as a number". What matters is how alike two positions
# are. A learned table has to find that out, and it has no row for position block_size.
def picture_positions(cfg):
    """Sinusoids, and how alike two positions are: computed (2017) beside learned (GPT-2)."""
    learned = trained(cfg, "text").transformer.wpe.weight.detach()
    T, C = learned.shape
    # RoPE turns by the same angles, position * 10000^(-2i/C), that the paper takes sines and cosines of.
    cos, sin = (part[:, :C // 2] for part in llama3.rope_angles(torch.arange(T), C, 10_000.0, 1.0))
    sines = torch.cat((sin, cos), 1)
    alike = [torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1) for table in (sines, learned)]
    figure, axes = canvas(1, 3, 4.2)
    titles = "sinusoids: the table", "sinusoids: similarity", "learned table: similarity"
    for ax, title, values in zip(axes, titles, (sines, *alike), strict=True):
        image = heat(ax, values, "PuOr", (-1, 1), title=title, xlabel="position", ylabel="position")
    axes[0].set(xlabel="column: sines, then cosines")
    figure.colorbar(image, ax=axes, label="entry (left), cosine similarity", shrink=0.9)
    # Constant along a diagonal = a function of the distance alone. The spread there says how far that is true.
    next_to = [values.diagonal(1) for values in alike]
    far = [values.diagonal(T // 2).mean() for values in alike]
    spread = [(values.max() - values.min()).item() for values in next_to]
    figure.suptitle(
        f"Similarity of neighbors and of positions {T // 2} apart: sinusoids {next_to[0].mean():.2f} and {far[0]:.2f}, "
        f"a learned table {next_to[1].mean():.2f} and {far[1]:.2f};\nbetween pairs of neighbors it varies by "
        f"{spread[0]:.0e} (sinusoids: rounding) and by {spread[1]:.2f} (learned)")
    return figure


# RoPE (Su et al. 2021, arXiv 2104.09864, section 3.2) adds nothing to the token. It turns q and k, plane by plane, by
# an angle that grows with their position; each plane has its own speed.
# Q: Why does RoPE see distances only, when absolute positions go in?
# A: Turning q by m*w and k by n*w and taking the dot product is turning one of them by (n - m)*w: rotations undo each
#    other. The third panel holds the scores of 24 * 24 pairs (m, n), and only 47 different values.
# How to read it. Left and middle: one vector at positions 0 to 7. The fastest plane goes round in about 6 tokens and
# tells neighbors apart, a slow one tells near from far. Right: each dot is up to 24 dots on top of each other. Here
# q and k are random: training decides what the curve looks like, rotation that it is a curve at all.
# What people get wrong: values are not turned, nor is the token's vector; and position 0 is not turned, so a test there
# finds nothing.
def picture_rope(cfg):
    """Two planes at positions 0..7 as llama3.py turns them, and the scores of one q and k at all pairs of positions."""
    shape, T = llama3.Config(), 24
    D = shape.n_embd // shape.n_head
    cos, sin = llama3.rope_angles(torch.arange(T), D, shape.rope_theta, shape.rope_factor)
    figure, axes = canvas(1, 3, 4.2)
    for ax, plane in zip(axes, (0, D // 16), strict=False):
        # Half-split layout: plane i is made of numbers i and i + D/2. A unit vector along the first of them is turned.
        start = torch.zeros(1, 1, T, D)
        start[..., plane] = 1.0
        turned = llama3.apply_rope(start, cos, sin)[0, 0, :8]
        a, b = turned[:, plane], turned[:, plane + D // 2]
        ax.quiver([0] * 8, [0] * 8, a, b, angles="xy", scale_units="xy", scale=1, color=BLUE, width=0.01)
        for m in range(8):
            ax.text(1.2 * a[m], 1.2 * b[m], str(m), ha="center", va="center")
        # One token further is one speed further, so the angle at position 1 is the speed.
        ax.set(title=f"plane {plane}: {torch.atan2(b[1], a[1]):.3g} radians a token", xlim=(-1.5, 1.5),
               ylim=(-1.5, 1.5), aspect="equal", xlabel=f"number {plane} of q", ylabel=f"number {plane + D // 2} of q")
    # One q and one k, standing at every pair of positions: row m of the scores holds R_m q against all keys.
    q, k = torch.randn(2, 1, 1, 1, D, generator=torch.Generator().manual_seed(cfg.seed)).expand(2, 1, 1, T, D)
    scores = (llama3.apply_rope(q, cos, sin) @ llama3.apply_rope(k, cos, sin).mT)[0, 0]
    distance = torch.arange(T)[:, None] - torch.arange(T)  # m - n at [m, n]
    # A diagonal of the scores holds the pairs of one distance.
    lines = [scores.diagonal(-d) for d in range(1 - T, T)]
    axes[2].plot(range(1 - T, T), [line.mean() for line in lines], color=GREY, lw=1)
    axes[2].plot(distance.flatten(), scores.flatten(), "o", ms=4, color=BLUE)
    axes[2].set(title=f"one q and one k, {T * T} pairs", xlabel="distance m - n, tokens", ylabel="score q.k")
    axes[2].set_box_aspect(1)
    off = max((line.max() - line.min()).item() for line in lines)
    figure.suptitle(f"RoPE turns each plane of q and k at its own speed; then their score depends on the distance "
                    f"alone\n(scores reach {scores.abs().max():.1f}; at equal distances they differ by at most "
                    f"{off:.0e}, which is rounding)")
    return figure


# T5 (Raffel et al. 2019, arXiv 1910.10683, section 2.1) puts no position into the token at all: it adds a learned
# number to the score of each pair, and pairs share that number by distance.
# Q: Why not one number per distance?
# A: Nobody needs to tell 103 tokens back from 104, and long distances are rare in training. Near ones get a bucket
#    each, far ones share: 32 numbers per head serve any length.
# How to read it: a band is a bucket, with its number. Up to a distance of 20 the axis is linear, so a token has one
# width; beyond it is logarithmic, so a factor has one width. All pairs that fall into a band get the same number added
# to their score, one for each head; +0.7 doubles a weight against the others, since exp(0.7) = 2.
# What people get wrong: an encoder has to know the side as well (16 buckets each), a decoder spends all 32 on the past.
# With the encoder's rule in the decoder half of the buckets would never be used. And 128, the "maximal distance" of
# T5's config, is no limit: what is further away shares the last bucket.
def picture_buckets(cfg):
    """The bucket of every distance, in an encoder and in a decoder."""
    figure, (ax,) = canvas(1, 1, 4.0)
    facts = []
    for y, (name, causal) in enumerate((("encoder", False), ("decoder", True))):
        distance = torch.arange(-160, 1 if causal else 161)
        bucket = encoder_decoder.relative_bucket(distance, causal)
        for b in bucket.unique().tolist():
            low, high = distance[bucket == b].min().item() - 0.5, distance[bucket == b].max().item() + 0.5
            ax.broken_barh([(low, high - low)], (y - 0.4, 0.8), color=(SKY, "white")[b % 2], ec="black", lw=0.5)
            # The middle of a band as the eye sees it: of its ends, or of their logarithms where the axis has those.
            middle = (low + high) / 2 if min(abs(low), abs(high)) < 20 else (low > 0 or -1) * (low * high) ** 0.5
            ax.text(middle, y, str(b), ha="center", va="center", fontsize=9, rotation=90)
        # How many distances back have a bucket of their own, and where does the last bucket begin?
        past = encoder_decoder.relative_bucket(-torch.arange(1000), causal)
        alone = int((past.unique(return_counts=True)[1] == 1).sum())
        facts.append(f"{name}: distances up to {alone - 1} have one each, all from {int(past.argmax())} on share one")
    ticks = [-100, -50, -20, -15, -10, -5, 0, 5, 10, 15, 20, 50, 100]
    ax.set_xscale("symlog", linthresh=20)
    ax.set_xticks(ticks, ticks)
    ax.set_yticks((0, 1), ("encoder", "decoder"))
    ax.set(xlim=(-160, 160), xlabel="key position - query position, tokens (negative: the key stands before the query)")
    figure.suptitle("The past in T5's 32 buckets. " + ";\n".join(facts))
    return figure


@torch.no_grad()
def attention_weights(model, *inputs):
    """The weights that GPT or BERT computes in model(*inputs) -> (layers, H, T, S), each row a sum of 1.

    The fused kernel never has these numbers in memory; that is why it is fast, and why looking means computing them
    once more, with decoder_only.py's own definition.
    """
    library, found = torch.nn.functional, []
    real = library.scaled_dot_product_attention

    def watching(q, k, v, mask=None, rate=0.0, is_causal=False):
        T, S = q.size(2), k.size(2)
        if mask is None:
            mask = decoder_only.causal_mask(T, S) if is_causal else torch.ones(T, S, dtype=torch.bool)
        # weights @ v is what attention returns; with the identity as v these are the weights.
        found.append(decoder_only.attention(q, k, torch.eye(S).expand(*k.shape[:2], S, S), mask)[0])
        return real(q, k, v, mask, rate)

    # Where each model calls the kernel: CausalSelfAttention.forward and BertLayer.forward. T5 keeps its weights itself.
    # The function is replaced for one pass. Watching it at work beats rebuilding the model's way to it: what is rebuilt
    # could differ.
    library.scaled_dot_product_attention = watching
    try:
        model(*inputs)
    finally:
        library.scaled_dot_product_attention = real
    return torch.stack(found)


# Where three models look that know the names of numbers. A row asks, columns answer, a row sums to 1.
# Q: Do attention maps explain a model?
# A: They say where a head looked, not what it took from there, and behind layer 1 a column is "what this place holds by
#    now", not "this token" (Jain & Wallace 2019, arXiv 1902.10186). They do show whether a model aligns two sides.
# How to read it. Encoder: every token asks every other; the row to watch is [MASK], which has to be filled in. Decoder:
# nobody looks ahead, so the upper right is empty; a row is labeled with the token READ and, behind the arrow, the one
# to be written next. Cross-attention: labeled alike; steps from the upper left to the lower right are a translation in
# order. "thousand" and "hundred" have no digit of their own, and their rows may look anywhere.
# What people get wrong: picking a pretty head by hand. Here a rule picks it: the one in which the words that name a
# digit look at it the most. And a decoder's row is read one to the left: "forty" is written in the row of "=".
def picture_attention(cfg):
    """One head each of a trained encoder, decoder and cross-attention, at the same number."""
    encoder, decoder, both = (trained(cfg, name) for name in ("encoder", "decoder", "translator"))
    digits, words, encode = list("40215"), toy_dataset.number_to_words(40215).split(), toy_dataset.encode_toy
    # What each model reads. The encoder gets a blank for "two"; a <pad> starts T5's decoder.
    asked = ["[CLS]", *digits, "[SEP]", *words[:2], "[MASK]", *words[3:], "[SEP]"]
    line = [*digits, "=", *words]
    with torch.no_grad():
        both(torch.tensor([encode("40215\n")]), torch.tensor([[toy_dataset.PAD, *encode(" ".join(words))]]))
    cross = [block["layer"][1]["EncDecAttention"].weights[0] for block in both.decoder.block]
    written = [*words, "end"]
    # title: (weights, what is looked at, who looks, the row that stands for the first word, the first digit's column)
    panels = {
        "encoder": (attention_weights(encoder, torch.tensor([encode(" ".join(asked))]), None,
                                      torch.tensor([[0] * 7 + [1] * 6])), asked, asked, 7, 1),
        "decoder": (attention_weights(decoder, torch.tensor([encode(" ".join(line))])), line,
                    [*digits, *(f"{a} → {b}" for a, b in zip(line[5:], written, strict=True))], 5, 0),
        "cross-attention": (torch.stack(cross), [*digits, "end"],
                            [f"{a} → {b}" for a, b in zip(["start", *words], written, strict=True)], 0, 0)}
    # The best head is compared with the mean of all: picked by hand, any pattern can be found somewhere.
    figure, axes = canvas(1, 3, 5.2, width_ratios=[1.2, 1, 0.7])
    facts = []
    for ax, (title, (weights, columns, rows, row, first)) in zip(axes, panels.items(), strict=True):
        # forty names digit 0, two digit 2, fifteen digits 3 and 4: how much of those rows' weight lies there?
        pairs = [row, row + 2, row + 4, row + 4], [first, first + 2, first + 3, first + 4]
        right = weights[:, :, *pairs].sum(-1) / 3
        layer, head = divmod(int(right.argmax()), right.size(1))
        image = heat(ax, weights[layer, head], "Blues", (0, 1), title=f"{title}\nlayer {layer + 1}, head {head + 1}",
                     xlabel="is looked at", ylabel="looks" if columns == rows else "reads → will write")
        ax.set_xticks(range(len(columns)), columns, rotation=90)
        ax.set_yticks(range(len(rows)), rows)
        facts.append(f"{title} {right.max():.0%} ({right.mean():.0%})")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.7)
    figure.suptitle("Weight that forty, two and fifteen put on their own digits, best head (mean of all heads):\n"
                    + ", ".join(facts))
    return figure


# A score q.k adds up D products. If the entries of q and k are independent and have variance 1, so has each product,
# and the variance of the sum is D (Vaswani et al. 2017, footnote 4).
# Q: Why divide by sqrt(D)?
# A: Without it scores of a head with D = 64 have a standard deviation of 8, and e^8 = 3,000: softmax becomes a hard
#    maximum. Where a weight p is 0 or 1 its gradient p (1 - p) is 0, and nothing is learned.
# How to read it: how much of a query's weight goes to a single key, the mean of 64 random queries over 64 random keys.
# The dotted line is an even share. A flat line means that a head of any size starts equally undecided.
# What people get wrong: the division is for the start of training. A trained head may well look at one token alone; it
# gets there by larger weights in W_q and W_k, with gradients all the way.
def picture_scale(cfg):
    """How hard a maximum the softmax of untrained heads is, with and without the division by sqrt(D)."""
    sizes, largest = [2 ** i for i in range(1, 11)], {"divided by sqrt(D)": [], "not divided": []}
    for D in sizes:
        q, k = torch.randn(2, 1, 1, 64, D, generator=torch.Generator().manual_seed(cfg.seed))
        # attention() divides, so a query sqrt(D) times as long undoes it. The identity as values hands the weights out.
        for label, factor in zip(largest, (1.0, D ** 0.5), strict=True):
            weights = decoder_only.attention(q * factor, k, torch.eye(64)[None, None], torch.tensor(True))
            largest[label].append(weights.amax(-1).mean().item())
    figure, (ax,) = canvas(1, 1, 4.6)
    for (label, values), color, style in zip(largest.items(), (BLUE, RED), ("o-", "s--"), strict=True):
        ax.plot(sizes, values, style, color=color, label=label)
    ax.axhline(1 / 64, color="black", ls=":", label="an even share, 1/64")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, sizes)
    ax.set(xlabel="head size D", ylabel="largest of the 64 weights of a query (mean)", ylim=(0, 1.03))
    ax.legend(loc="upper left")
    divided, undivided = largest.values()
    at = sizes.index(64)
    figure.suptitle(f"At D = 64 the largest of a query's 64 weights is {divided[at]:.0%}, without the division "
                    f"{undivided[at]:.0%}.\nFrom D = 2 to 1024 it is between {min(divided):.0%} and "
                    f"{max(divided):.0%}; undivided it grows from {undivided[0]:.0%} to {undivided[-1]:.0%}")
    return figure


# Softmax needs the maximum of a row before it can begin. Flash attention (Dao et al. 2022, arXiv 2205.14135, section
# 3.1) sees a tile at a time: it works with the maximum so far, and when a larger one comes, all that was added up is
# multiplied by exp(old - new). No row is ever held as a whole, which is why there is no T x T matrix.
# Q: Is online softmax an approximation?
# A: No. Numerator and denominator both carry exp(-m), so m cancels: it only keeps the numbers in range.
# By hand, scores 0 and ln 3 in tiles of one: m = 0, z = 1. Then m = ln 3, and z = 1 * exp(0 - ln 3) + 1 = 4/3. All at
# once: exp(0 - ln 3) + exp(ln 3 - ln 3), the same.
# How to read it. Top: one row of scores; a new maximum in a tile lifts the red line. Bottom: the sum z after each tile,
# in units of exp(m). Grey is what the old sum is worth in the new unit, blue what the tile adds. Where the line rises,
# grey is lower than the whole bar before, by the factor written there; where it stays, grey is that bar.
# What people get wrong: that each new maximum costs a pass over the past. It costs one multiplication of z and one of
# the D numbers added up so far. And the sum need not get smaller at a new maximum: the new tile adds at least 1 to it.
def picture_softmax(cfg):
    """A real row of scores through flash_attention.running_softmax: maximum, sum, and the correction between tiles."""
    model, tile = trained(cfg, "text"), 5
    ids = torch.tensor([text_tokenizer().encode("Return the value of the named attribute of object"[:40])])
    # The last query sees all 40 keys. ln(weight) is its score but for a constant, which softmax does not notice. Of all
    # heads the one whose maximum rises most often.
    rows = attention_weights(model, ids)[:, :, -1].flatten(0, 1).log()
    ends = range(tile, 41, tile)
    scores = max(rows - rows[:, :1], key=lambda row: len({row[:end].max().item() for end in ends}))
    # The largest weight is exp(m - m) / z, so z = 1 / that. The identity as values hands the weights out.
    m = [scores[:end].max().item() for end in ends]
    z = [1 / flash_attention.running_softmax(scores[:end], torch.eye(end), tile).max().item() for end in ends]
    factors = [0.0, *(torch.tensor(m[:-1]) - torch.tensor(m[1:])).exp().tolist()]
    kept = [factor * old for factor, old in zip(factors, [0.0, *z[:-1]], strict=True)]
    # Above the scores and their maximum, below what the sum is made of after each tile.
    figure, (top, bottom) = canvas(2, 1, 6.4, sharex=True)
    top.bar([i + 0.5 for i in range(40)], scores.tolist(), color=SKY, label="score (the first key's = 0)")
    top.stairs(m, [0, *ends], color=RED, lw=2, baseline=None, label="maximum m so far")
    middle = [end - tile / 2 for end in ends]
    bottom.bar(middle, kept, 0.9 * tile, color=GREY, label="the sum before, times exp(old m - m)")
    bottom.bar(middle, [a - b for a, b in zip(z, kept, strict=True)], 0.9 * tile, kept, color=BLUE,
               label="the tile's own terms: sum of exp(score - m)")
    for x, total, factor in zip(middle[1:], z[1:], factors[1:], strict=True):
        bottom.text(x, total, f"old x {factor:.2g}", ha="center", va="bottom")
    # Room for the legends above the data.
    top.set(ylabel="score, nats", ymargin=0.35)
    bottom.set(xlabel=f"keys read, in tiles of {tile}", ylabel="sum z, in units of exp(m)", ymargin=0.45,
               xticks=[0, *ends])
    top.legend(loc="upper left", ncols=2)
    bottom.legend(loc="upper left")
    # The check that matters: the weighted mean of some values, in tiles and all at once.
    values = torch.randn(40, 16, generator=torch.Generator().manual_seed(cfg.seed))
    off = flash_attention.running_softmax(scores, values, tile) - flash_attention.safe_softmax(scores) @ values
    rises = sum(factor < 1 for factor in factors[1:])
    figure.suptitle(f"A row of 40 scores, {tile} at a time: {rises} times the maximum rises and the old sum is scaled "
                    f"down.\nThe result equals the ordinary softmax's to {off.abs().max():.0e}")
    return figure


# --- 5. Training: gradients, and what was learned --------------------------------------------------------------------
# Sixteen blocks of decoder_only.py with equal initial weights, put together in three ways.
# Q: Why do deep plain networks not learn?
# A: Backward multiplies by every layer on the way down. A residual makes each factor 1 + something, and the gradient
#    arrives by the "1", whatever the branch does (He et al. 2015, arXiv 1512.03385).
# Q: Why did the norm move in front of the branch (pre-norm)?
# A: Behind the sum (post-norm) it rescales the "1" as well, 32 times here. Such a model trains with a warm-up and less
#    depth, as BERT did, or with smaller branches; one rate from the first step on is too much for it.
# How to read it. Left: a flat line is a gradient that reaches the first block as strong as the last. The thin dotted
# lines are the same before training. Right: the entropy of single words is 2.83 nats. A loss that stays there is that
# of a model that has learned how often each word occurs, and nothing of what it reads.
# What people get wrong: "norms are against vanishing gradients", and "it looks healthy at initialization". All three do
# at the start; a few dozen updates later two of them pass nothing down.
WIRINGS = {
    "pre-norm (GPT-2)": lambda block, x: (x := x + block.attn(block.ln_1(x))) + block.mlp(block.ln_2(x)),
    "post-norm (2017, BERT)": lambda block, x: block.ln_2((x := block.ln_1(x + block.attn(x))) + block.mlp(x)),
    "norm, no residual": lambda block, x: block.mlp(block.ln_2(block.attn(block.ln_1(x))))}


def train_deep(wiring, seed, steps):
    """16 blocks wired like that, on the toy language. -> ([norm of each block's gradient] at every step, losses)."""
    settings = decoder_only.Config(n_layer=16, n_embd=64, block_size=16, vocab_size=46, lr=1e-3, device="cpu")
    torch.manual_seed(seed)
    model, norms, losses = decoder_only.GPT(settings), [], []
    for block in model.transformer.h:
        block.forward = lambda x, cache, block=block: wiring(block, x)
        # decoder_only.py makes branches smaller by sqrt(2 * n_layer), for pre-norm. Here all have the full size.
        for branch in (block.attn, block.mlp):
            branch.c_proj.weight.data *= (2 * settings.n_layer) ** 0.5
    rows = toy_dataset.decoder_rows(toy_dataset.draw_numbers(2000, seed, False))[:2]
    optimizer = decoder_only.make_optimizer(model, settings)
    for step in range(steps):
        batch = decoder_only.get_batch(rows, 16, seed, step)
        loss = decoder_only.compute_loss(model, *batch) / (batch[-1] != decoder_only.IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        # All weights of a block in one number, before clipping: the root of the sum of their squares.
        norms.append([torch.nn.utils.get_total_norm([p.grad for p in block.parameters()]).item()
                      for block in model.transformer.h])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return norms, losses


def picture_gradients(cfg):
    """The gradient of each of 16 blocks before and after some updates, and the loss, for three ways of wiring them."""
    figure, (left, right) = canvas(1, 2, 4.8)
    steps, facts = max(2, round(80 * cfg.steps_share)), []
    for (label, wiring), color, style in zip(WIRINGS.items(), (BLUE, GREEN, RED), ("o-", "s--", "^-."), strict=True):
        norms, losses = train_deep(wiring, cfg.seed, steps)
        left.plot(range(1, 17), norms[-1], style, color=color, label=label)
        left.plot(range(1, 17), norms[0], ":", color=color, lw=1)
        right.plot(range(1, steps + 1), losses, style[1:], color=color, label=label)
        facts.append(f"{label.split(' (')[0]} {norms[-1][0] / norms[-1][-1]:.2g} and {losses[-1]:.2f}")
    left.set(title=f"at update {steps} (dotted: at the first)", xlabel="block (1 = next to the embedding)",
             ylabel="norm of the block's gradient", yscale="log", xticks=range(1, 17, 3))
    right.set(title="no warm-up, rate 0.001", xlabel="update", ylabel="loss, nats per token")
    left.legend()
    right.legend()
    figure.suptitle(f"Gradient of the first block over the last's, and the loss, at update {steps}:\n"
                    + "; ".join(facts))
    return figure


# Each token has a vector, and training moves tokens that are used alike close to each other. Nobody says that "three"
# and "seven" are both digits, or that "thirteen" belongs with "seventeen": it has to be found out.
# (The head is tied: a vector is also what a prediction is compared with. Words that are predicted in the same places
# come together for that reason, too.)
# Q: Do neighbors in a flat map mean neighbors in the model?
# A: Only as far as the two axes carry the variance; they say how much. What is far apart here is far apart there; what
#    is close may be apart along directions that you do not see. (Distances between t-SNE's clusters mean less still.)
# How to read it. Color and marker are ours, the places are the model's. Words that play different parts come apart:
# behind "twenty" a unit may follow, behind "thirteen" none. "zero" is a unit by its name and stands alone by its use.
# What people get wrong: leaving the mean in. The first direction then points from 0 to the middle of the cloud.
GROUPS = {"units 0-9": (toy_dataset.UNITS[:10], BLUE, "o"), "10-19": (toy_dataset.UNITS[10:], RED, "s"),
          "tens": (toy_dataset.TENS, GREEN, "^"), "multipliers": (["hundred", "thousand"], PURPLE, "D")}


def picture_embeddings(cfg):
    """The number words of a trained decoder on a map, by principal components."""
    words = [word for group, _, _ in GROUPS.values() for word in group]
    kinds = [kind for kind, (group, _, _) in GROUPS.items() for _ in group]
    x = trained(cfg, "decoder").transformer.wte.weight.detach()[toy_dataset.encode_toy(" ".join(words))]
    # PCA: x - mean = U diag(s) V^T. The rows of V^T are directions, the first the one along which the points spread
    # most; U * s are the points in those directions, s^2 a direction's share of the variance.
    U, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    flat, share = (U * s)[:, :2], s.square() / s.square().sum()
    figure, (ax,) = canvas(1, 1, 7.2)
    # Labels are moved away from the other points, of which near ones push most, as charges would.
    apart = flat[:, None] - flat
    push = (apart / torch.cdist(flat, flat).fill_diagonal_(1.0)[..., None] ** 3).sum(1).sign()
    for kind, (_, color, marker) in GROUPS.items():
        own = [i for i, other in enumerate(kinds) if other == kind]
        ax.plot(flat[own, 0], flat[own, 1], marker, color=color, ms=7, label=kind)
        for i in own:
            dx, dy = push[i].tolist()
            ax.annotate(words[i], flat[i].tolist(), (10 * dx, 5 * dy), textcoords="offset points", color=color,
                        fontsize=9, ha="center", va="bottom" if dy > 0 else "top")
    ax.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
    ax.margins(0.1)
    ax.legend()
    # How good a map is has to be asked off the map: in all dimensions, whose nearest neighbor is of its own kind? By
    # chance it is one of the n - 1 others.
    nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).argmin(1).tolist()
    same = sum(kinds[i] == kinds[j] for i, j in enumerate(nearest))
    chance = sum(kinds.count(kind) - 1 for kind in kinds) / (len(words) - 1)
    figure.suptitle(f"Nobody told it which words are alike: {same} of {len(words)} number words have a nearest "
                    f"neighbor of their own kind\n(in all {x.size(1)} dimensions; by chance about {chance:.0f})")
    return figure


# Four bits name one of 16 levels. Where should they lie? Weights, divided by the largest of their block of 64, crowd
# around 0, so NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3) puts more levels there: quantiles of a normal
# distribution instead of equal steps.
# Q: Why blocks of 64?
# A: One outlier stretches the levels of all weights that share its scale: here of 63 and not of a whole matrix. Smaller
#    blocks cost more scales; at 64, with scales in 8 bits, they take 0.127 bits a weight.
# How to read it: under the histogram stand two combs with 16 teeth each; between two teeth a weight goes to the nearer
# one. Where the histogram is high, NF4's teeth are close, so most weights move little; the price is paid by the few
# large ones. The bars at -1 and 1 are no outliers but the largest weight of each block, which is +-1 by definition.
# What people get wrong: NF4 is no 4-bit float and has no arithmetic; a weight is looked up and multiplied in full
# precision. And the gain over equal steps is a matter of percent: blocks do more than levels.
def picture_nf4(cfg):
    """NF4's levels and 16 even ones under the histogram of real weights."""
    blocks = torch.cat([layer.weight.detach().view(-1, 64) for layer in trained(cfg, "text").transformer.h.modules()
                        if isinstance(layer, torch.nn.Linear)])
    scale, even = blocks.abs().amax(1, keepdim=True), torch.linspace(-1, 1, 16)
    heights, edges = torch.histogram(blocks / scale, 80, range=(-1.0, 1.0), density=True)
    top = heights.max().item()
    figure, (ax,) = canvas(1, 1, 4.8)
    ax.stairs(heights, edges, fill=True, color=SKY, label=f"{blocks.numel():,} weights of a small trained GPT")
    ax.vlines(lora_qlora.NF4, -0.12 * top, -0.02 * top, color=RED, lw=2, label="the 16 levels of NF4")
    ax.vlines(even, -0.26 * top, -0.16 * top, color="black", lw=2, label="16 even levels")
    ax.set(xlabel="weight / largest of its block of 64", ylabel="density", ylim=(-0.32 * top, 1.05 * top))
    ax.legend(loc="upper left")
    # The even levels get exact scales here, NF4 its own 8-bit ones: a small advantage for the even ones.
    # Both combs have the same blocks, so the places of the levels alone make the difference.
    nf4 = lora_qlora.dequantize_nf4(blocks.shape, *lora_qlora.quantize_nf4(blocks))
    nearest = even[torch.bucketize(blocks / scale, (even[1:] + even[:-1]) / 2)] * scale
    errors = [(other - blocks).norm() / blocks.norm() for other in (nf4, nearest)]
    figure.suptitle(f"Weights crowd around 0, and so do NF4's levels: its rms error is {errors[0]:.1%} of the rms "
                    f"weight,\nthat of 16 even levels {errors[1]:.1%}")
    return figure


# --- 6. Decoding: sampling, and what the past costs ------------------------------------------------------------------
# A language model ends in a distribution; what to do with it is decided outside. Temperature t makes p^(1/t) of every
# p; top-k keeps the k likeliest; top-p the smallest set that reaches p (Holtzman et al. 2019, arXiv 1904.09751).
# Q: Top-k or top-p?
# A: k is one number for all places: too many where one token is certain, too few where hundreds fit. p adapts to how
#    sure the model is. See how few of its hundred characters either leaves here.
# How to read it. Dots are the model's own distribution, the same in all panels; bars are what was drawn. Bars above the
# dots on the left and below on the right: sharpened. Bars missing on the right: cut, and the rest shares what was cut.
# What people get wrong: temperature 0 is argmax, not a division by a tiny number; the token that CROSSES p stays; and
# nothing here makes a model know more.
def picture_sampling(cfg):
    """Six ways to draw from one real distribution: bars = what sample_next drew, dots = the model."""
    model, tokenizer, prompt, draws = trained(cfg, "text"), text_tokenizer(), "the object is a ", 4000
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(prompt)]))[0, -1]
    order = logits.argsort(descending=True)[:14]
    # (temperature, top_k, top_p) of sample_next; 0 and 1.0 cut nothing.
    ways = {"temperature 0 (argmax)": (0.0, 0, 1.0), "temperature 0.5": (0.5, 0, 1.0), "temperature 1": (1.0, 0, 1.0),
            "temperature 2": (2.0, 0, 1.0), "top-k 4": (1.0, 4, 1.0), "top-p 0.6": (1.0, 0, 0.6)}
    figure, axes = canvas(2, 3, 6.0, sharey=True)
    kinds = {}
    for ax, (title, way) in zip(axes, ways.items(), strict=True):
        # Drawn and not computed: the picture shows what the script does. 4,000 draws have a standard error of at most
        # sqrt(0.25 / 4000) = 0.8 points.
        drawn = decoder_only.sample_next(logits.expand(draws, -1), *way, torch.Generator().manual_seed(cfg.seed))
        share = torch.bincount(drawn, minlength=len(logits)) / draws
        kinds[title] = int((share > 0).sum())
        ax.bar(range(14), share[order].tolist(), color=SKY, edgecolor=BLUE, label="drawn")
        ax.plot(range(14), logits.softmax(-1)[order], "o", ms=4, color="black", label="model")
        ax.set_xticks(range(14), tokenizer.decode(order.tolist()).replace(" ", "␣").replace("\n", "¶"))
        ax.set(title=f"{title}: {kinds[title]} of {len(logits)} kinds", ylim=(0, 1.05), ylabel="share",
               xlabel="next character, likeliest first")
        ax.legend()
    figure.suptitle(f"What follows {prompt!r}? {draws:,} draws: temperature reshapes the whole, cuts remove the tail.\n"
                    f"Kinds of character drawn: {kinds['temperature 2']} at temperature 2, {kinds['temperature 1']} at "
                    f"1, {kinds['top-k 4']} with top-k 4, {kinds['top-p 0.6']} with top-p 0.6")
    return figure


# Keys and values of the past are kept, so that writing token n + 1 does not read all n again. That grows with the text:
# bytes = 2 * layers * key heads * head size * bytes per number, for every token of every row.
# Llama 3 8B in bfloat16: 2 * 32 * 8 * 128 * 2 bytes are 128 KiB a token; 131,072 tokens take 16 GiB, its weights 15.
# Q: What do grouped queries save?
# A: H/K times the cache and its reading for every token: 4 times in Llama 3. The model hardly gets worse, since the
#    queries stay as many as they were (Ainslie et al. 2023, arXiv 2305.13245).
# Q: What does a window forget?
# A: Not quite what lies outside it: layer 2 looks at layer 1's vectors, which saw W tokens further back, so L layers
#    reach about L * W. What is lost is exact recall beyond W.
# How to read it. Both axes are logarithmic: a straight line is "so many bytes per token", and lines above each other
# differ by a factor. The window alone is flat. Markers are what a store of kv_cache.py really holds; if they lay off
# their line, the formula or the store would be wrong.
# What people get wrong: grouped queries save memory and reading, hardly any arithmetic. And the weights are read once
# for all rows of a batch, the cache of each row for it alone: with many users the cache is the larger part.
def picture_cache(cfg):
    """Bytes of the KV cache against length for a Llama of 8 billion weights: formula as a line, real stores as dots."""
    shape = kv_cache.Config(**kv_cache.PRESETS["8b"], window=1024)
    D, most = shape.n_embd // shape.n_head, shape.window + shape.sinks
    figure, (ax,) = canvas(1, 1, 5.2)
    lengths, final = [2 ** i for i in range(4, 18)], []
    for label, K, kind, style, color in (
            ("a key head for each query head", shape.n_head, kv_cache.StaticStore, "o-", RED),
            ("grouped queries, as in Llama 3", shape.n_kv_head, kv_cache.StaticStore, "s--", BLUE),
            (f"grouped, a window of {shape.window:,}", shape.n_kv_head, kv_cache.WindowStore, "D-.", GREEN)):
        per_token, limit = 2 * shape.n_layer * K * D * 2, most if kind is kv_cache.WindowStore else lengths[-1]
        line = [per_token * min(n, limit) / 2 ** 30 for n in lengths]
        ax.plot(lengths, line, style[1:], color=color)
        ax.plot([], [], style, color=color, label=f"{label}: {K} key heads, {per_token // 1024} KiB a token")
        final.append(line[-1])
        # One layer's store takes n tokens, and what it hands to attention is weighed. (A window is given the last ones
        # only: those before would be overwritten.)
        for n in (16, 128, 1024, 4096):
            store = kind(dataclasses.replace(shape, n_kv_head=K), 1, n, torch.zeros(1, dtype=torch.bfloat16))
            new = torch.zeros(1, K, min(n, limit), D, dtype=torch.bfloat16)
            held = store.update(new, new, torch.arange(n - new.size(2), n)[None], min(n, limit))
            real = shape.n_layer * sum(part.numel() * part.element_size() for part in held)
            ax.plot(n, real / 2 ** 30, style[0], color=color, ms=7)
    ax.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="GiB for one row, bfloat16",
           ylim=(1e-3, 1e3))
    ax.legend(loc="upper left", title="lines: formula, markers: real stores of kv_cache.py")
    figure.suptitle(f"Llama 3 8B with {lengths[-1]:,} tokens in its cache: {final[0]:.0f} GiB with a key head for each "
                    f"query head,\n{final[1]:.0f} GiB with grouped queries, {final[2]:.2f} GiB in a window")
    return figure


# --- 8. Main: draw them ----------------------------------------------------------------------------------------------
# --only takes these names. In the order in which they are worth looking at.
PICTURES = {function.__name__.removeprefix("picture_"): function for function in (
    picture_architectures, picture_positions, picture_rope, picture_buckets, picture_attention, picture_scale,
    picture_softmax, picture_gradients, picture_embeddings, picture_nf4, picture_sampling, picture_cache)}


def main(cfg):
    """Draw what --only names, or everything. -> {name: the sentence above the picture}."""
    names = [name.strip() for name in cfg.only.split(",") if name.strip()] or list(PICTURES)
    if unknown := [name for name in names if name not in PICTURES]:
        raise ValueError(f"there is no picture {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    began, results, out = time.perf_counter(), {}, Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    # One by one: after Ctrl-C the pictures so far are there, and so are the models behind them.
    for name in names:
        figure = PICTURES[name](cfg)
        figure.savefig(out / f"{name}.png")
        # Whoever cannot see the picture gets its result all the same.
        results[name] = " ".join(figure.get_suptitle().split())
        print(f"{out / name}.png\n    {results[name]}", flush=True)
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), seconds=time.perf_counter() - began, results=results)))
    print(f"\n{len(results)} pictures in {out}. The comment above picture_NAME in {Path(__file__).name} says how to "
          f"read each, and what people get wrong.")
    return results


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
