# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "torch>=2.11"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
THE TOY LANGUAGE IN ONE FILE                     python toy_dataset.py              seconds on a laptop CPU

Idea     Numbers and their English names, 40215 <-> forty thousand two hundred fifteen. Small enough to learn in a
         minute, rich enough to fail on: order matters, zeros are silent, "thousand" must come at the right place.
         Every answer can be checked, and the best reachable loss is known, so a bug has nowhere to hide.
Picture  40215 --+-- encoder-only      [CLS] 4 0 2 1 5 [SEP] forty [MASK] two ... [SEP]     fill in; do they match?
                 +-- decoder-only      4 0 2 1 5 = forty thousand two hundred fifteen \\n    one line, left to right
                 +-- encoder-decoder   4 0 2 1 5 \\n  ->  forty thousand two hundred fifteen \\n  read, then write
Symbols  B batch   T time (columns)   S source time   R rows   V vocabulary
Not here models: decoder_only.py holds one, with the decoder's part of this data pasted in
Expect   floors, in nats per token: 0.00 words after digits (decoder-only, encoder-decoder); 0.00 one hidden token of a
         full pair (encoder-only); 0.00 match or no match, per row (encoder-only); 0.98 all tokens of a line
         (decoder-only); 0.69 words after digits, label smoothing 0.1 (results/toy_dataset.json)
Asked    Where does EOS go?   Why shift?   Which mask hides what?   What loss would a perfect model have?
         Why hold out by hash?   What does label smoothing do to the loss?                 (grep "# Q:")
"""
import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F


# --- 1. Config: how much to show -------------------------------------------------------------------------------------
# Sections have the same numbers in all scripts; this one has no use for the others.
@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    out: str = "runs/toy_dataset"   # folder for summary.json and the picture
    seed: int = 1337                # decides which numbers are drawn and which tokens are masked
    batch_size: int = 5             # rows of the batches that are printed and drawn
    label_smoothing: float = 0.1    # share of the target spread over all tokens; main shows what it does to the floor

    def __post_init__(self):
        if not 1 <= self.batch_size <= 100:
            raise ValueError(f"batch_size must be in 1..100, not {self.batch_size}")
        if self.seed < 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError("seed must be 0 or more and label_smoothing in [0, 1)")


PRESETS = {"default": {}}


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


# --- 4. Data: from a number to a batch -------------------------------------------------------------------------------
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


def words_to_number(words):
    """The inverse: "forty thousand two hundred fifteen" -> 40215. Raises ValueError for what is no number's name."""
    total = current = 0
    for word in words.split():
        if word == "thousand":        # everything so far was thousands
            total, current = current * 1000, 0
        elif word == "hundred":
            current *= 100
        elif word in UNITS:
            current += UNITS.index(word)
        elif word in TENS:
            current += 10 * TENS.index(word) + 20
        else:
            raise ValueError(f"{word!r} is not a number word")
    # "two twenty" and "hundred hundred" pass the loop, as 22 and 0. This comparison catches every such text: a number
    # has exactly one name.
    if total + current > 999_999 or number_to_words(total + current) != words:
        raise ValueError(f"{words!r} is not the name of a number from 0 to 999,999")
    return total + current


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


def encode_words(text):
    """Text of the toy language -> ids: "40=forty\\n" -> [10, 6, 2, 38, 1]. Raises ValueError for unknown words."""
    pieces = re.findall(r"\d|\n|=|[^\s\d=]+", text)
    return [TOY_VOCAB.index(piece) for piece in pieces]


# The special tokens, by name. <pad> fills rows up and means nothing; "\n" ends a text (EOS). They must be two tokens.
# Trap: pad_id = eos_id, with pads left out of the loss. EOS is then left out too, and the model never stops writing.
PAD, EOS, EQUALS, CLS, SEP, MASK = range(6)

IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


def pad_rows(rows, side="right", value=PAD):
    """Lists of different length -> (ids (R, T), mask (R, T)), T the longest, mask True = real token."""
    # Every tensor is a rectangle and texts are not. Padding is the price; the mask remembers what is real.
    width = max(map(len, rows))
    pads = [[value] * (width - len(row)) for row in rows]
    full = [row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])                         # (R)
    columns = torch.arange(width)                                              # (T)
    mask = columns < lengths[:, None] if side == "right" else columns >= width - lengths[:, None]  # (R, T)
    return torch.tensor(full), mask


# The three masks. True = may attend (may read from that column); the other convention is as common: always say which.
# Q: Which mask hides what?
# A: Padding: columns without content, from everybody. Causal: columns to the right, in a decoder. A padded decoder
#    needs both. Cross-attention takes the SOURCE's padding and no triangle. With heads: mask[:, None], (B, 1, T, S).
def padding_mask(mask):
    """(B, T) real tokens -> (B, 1, T): nobody looks at a pad. For an encoder: all real tokens see each other."""
    return mask[:, None, :]                                                    # (B, 1, T)


# A picture of the mask for T = S = 4 (x = may attend). Row t is a training exercise of its own, "given tokens 0..t,
# what is t+1": without the mask row t would find its answer in column t+1 and the loss would fall to 0 by copying.
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
    # tril(k) keeps column <= row + k. With k = S - T even query 0 sees the S - T tokens before it.
    # Trap: aligning at the top left (what is_causal=True does when T < S): query t then sees keys 0..t only, and a
    # single new token nothing but the first one. Symptom: good text without a cache, nonsense with it.
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)       # (T, S)


def both_masks(mask):
    """(B, T) real tokens -> (B, T, T): no pads and no future. For a decoder whose rows are padded."""
    T = mask.size(1)
    # Trap: with pads on the left, row 0 may now attend to nothing at all. Softmax over nothing is 0/0 = NaN, and one
    # NaN reaches every row in the next layer: attention has to define such a row (decoder_only.py sets it to 0).
    return padding_mask(mask) & causal_mask(T, T, mask.device)                 # (B, T, T)


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


def encoder_pairs(numbers, seed):
    """BERT's form: "[CLS] digits [SEP] words [SEP]" in two segments. -> ids, mask, segments (R, T), match (R).

    Half of the rows get the name of another number, one that is easily taken for theirs; match is 0 there.
    """
    rng, rows, segments, match = random.Random(seed), [], [], []
    for n in numbers:
        named = n if rng.random() < 0.5 else near_miss(n, rng)
        first, second = [CLS] + encode_words(str(n)) + [SEP], encode_words(number_to_words(named)) + [SEP]
        rows.append(first + second)
        # segments say which side a token is on: BERT adds an embedding of it, since positions are numbered straight
        # through both sides.
        segments.append([0] * len(first) + [1] * len(second))
        match.append(int(named == n))
    ids, mask = pad_rows(rows)                                                 # (R, T) each
    return {"ids": ids, "mask": mask, "segments": pad_rows(segments)[0], "match": torch.tensor(match)}


def mask_tokens(ids, mask, seed, share=0.15):
    """BERT's noise (Devlin et al. 2018, arXiv 1810.04805, section 3.1). -> (noisy ids, targets), IGNORE where unchosen.

    Of the real, non-special tokens `share` are chosen; of those 80 % become [MASK], 10 % a random token, 10 % stay.
    """
    # Q: Why not always [MASK]?
    # A: [MASK] never occurs when the model is used. With 10 % random and 10 % unchanged tokens no position can be
    #    trusted or ignored, so a good representation is needed everywhere.
    g = torch.Generator().manual_seed(seed)
    special = (ids == CLS) | (ids == SEP) | ~mask                              # (R, T)
    chosen = (torch.rand(ids.shape, generator=g) < share) & ~special           # (R, T)
    dice = torch.rand(ids.shape, generator=g)                                  # (R, T)
    noisy = ids.masked_fill(chosen & (dice < 0.8), MASK)                       # (R, T)
    random_ids = torch.randint(MASK + 1, len(TOY_VOCAB), ids.shape, generator=g)  # (R, T)
    noisy = torch.where(chosen & (dice >= 0.9), random_ids, noisy)             # (R, T)
    return noisy, ids.masked_fill(~chosen, IGNORE)


def decoder_lines(numbers):
    """GPT's form: one line "digits=words\\n". -> inputs, targets (R, T): targets[t] is what follows inputs[t].

    Only words and newline are targets: the digits are drawn at random, nobody can predict them.
    """
    # Q: Why shift?
    # A: Position t has read inputs 0..t and is asked for the next token. Inputs drop the last token, targets the first.
    #    Without the shift the answer stands in the question: the loss falls to 0 and the model learned to copy.
    rows = [encode_words(f"{n}={number_to_words(n)}\n") for n in numbers]
    ids, mask = pad_rows(rows)
    # Q: Where does EOS go?
    # A: At the row's own length, before the padding. Trap: padding first and putting EOS at the end of the rectangle:
    #    in one repository 81 % of the EOS labels had to be predicted from a pad, and the model never learned where to
    #    stop.
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()                          # (R, T) each
    answered = (inputs == EQUALS).cumsum(1).bool()                             # (R, T)
    targets[~answered | ~mask[:, 1:]] = IGNORE
    return {"inputs": inputs, "targets": targets, "mask": mask[:, :-1]}


def seq2seq_pairs(numbers):
    """T5's form. -> source (R, S) and its mask, tgt (R, T) what the decoder reads, targets (R, T) what it should write.

    Teacher forcing: while training, the decoder reads the right answer so far and not its own guesses.
    """
    # tgt is the answer moved one to the right, with a start token in front. T5 starts with <pad>: it is there anyway.
    #     tgt      <pad>  forty  two
    #     targets  forty  two    \n
    source, source_mask = pad_rows([encode_words(str(n)) + [EOS] for n in numbers])
    targets, mask = pad_rows([encode_words(number_to_words(n)) + [EOS] for n in numbers])
    # (1, 0): one column in front, none at the end.
    tgt = F.pad(targets[:, :-1], (1, 0), value=PAD)                            # (R, T)
    return {"source": source, "source_mask": source_mask, "tgt": tgt, "targets": targets.masked_fill(~mask, IGNORE)}


def batches(data, batch_size, seed):
    """Every row once, in shuffled order: dicts of (B, ...) tensors. The last batch may be smaller; none is dropped."""
    order = torch.randperm(len(next(iter(data.values()))), generator=torch.Generator().manual_seed(seed))  # (R)
    for index in order.split(batch_size):
        yield {name: tensor[index] for name, tensor in data.items()}


# Floors: the loss of a model that knows everything there is to know.
# Q: What loss would a perfect model have?
# A: The entropy of what nobody can know. A translation is determined by its source: 0. Random digits are not: about
#    ln 10 = 2.3 nats each, and their number costs a little too; digit_floor() has the exact sum. Some toy sets of
#    random symbols promise a loss below 1 that no model can reach, because nobody computed the floor.
def digit_floor(validation=False):
    """Entropy of a drawn number, in nats: what nobody can know about its digits, however good the model.

    draw_numbers picks a length, then a number of that length, and keeps it if it is in the split. So with N(d) numbers
    of length d in the split, P(d) ~ N(d) / (all numbers of length d), and the entropy is H(P) + sum P(d) ln N(d).
    """
    # Of the drawn numbers of length d only the share in this split is kept, so lengths with few such numbers get rarer.
    # Exact, by asking the hash a million times: about a second.
    count = Counter(len(str(n)) for n in range(1_000_000) if is_validation(n) == validation)
    share = {d: count[d] / (10 if d == 1 else 9 * 10 ** (d - 1)) for d in count}
    P = {d: share[d] / sum(share.values()) for d in share}
    return sum(P[d] * (math.log(count[d]) - math.log(P[d])) for d in P)


def all_tokens_floor(numbers):
    """Floor of lines "digits=words\\n" in one running text, when ALL tokens count, in nats per token.

    The digits' entropy is spread over the whole line: words, "=" and newline are certain and cost nothing.
    """
    length = sum(len(encode_words(f"{n}={number_to_words(n)}\n")) for n in numbers) / len(numbers)
    return digit_floor() / length


def smoothing_floor(epsilon, V):
    """The least loss under label smoothing, in nats per token, for a target that is certain.

    The target becomes 1 - epsilon + epsilon/V on the right token and epsilon/V on each other; no distribution does
    better than the target itself, and its entropy is the floor (Szegedy et al. 2015, arXiv 1512.00567, section 7).
    """
    # Q: What does label smoothing do to the loss?
    # A: It lifts the floor from 0 to what this returns: 0.6927 for epsilon 0.1 and 46 tokens (not ln 2). A loss that
    #    "sticks at 0.69" is then a perfect one. Judge by exact match, or report the loss without smoothing.
    right, other = 1 - epsilon + epsilon / V, epsilon / V
    return -right * math.log(right) - (V - 1) * (other * math.log(other) if other else 0.0)


# --- 8. Main: show it ------------------------------------------------------------------------------------------------
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


def show(name, tensor):
    """Print a tensor of ids as tokens, with its shape: what the model gets, in the words that it stands for."""
    short = {"<pad>": ".", "\n": "\\n"}
    print(f"  {name} {tuple(tensor.shape)}")
    for row in tensor.tolist():
        print("    " + " ".join("-" if i == IGNORE else short.get(TOY_VOCAB[i], TOY_VOCAB[i]) for i in row))


def draw_masks(path, ids, mask):
    """One padded batch and what each mask lets its shortest row see, as a picture."""
    import matplotlib
    matplotlib.use("Agg")  # draws into files; no window, so it works on a server
    import matplotlib.pyplot as plt
    B, T = ids.shape
    fig, axes = plt.subplots(1, 4, figsize=(17, 4.6), dpi=110, width_ratios=(1.9, 1, 1, 1))
    names = [[TOY_VOCAB[i].replace("\n", "\\n").replace("<pad>", "") for i in row] for row in ids.tolist()]
    axes[0].imshow(mask.tolist(), cmap="Blues", vmin=-0.2, vmax=2.2, aspect="auto")
    for b in range(B):
        for t in range(T):
            axes[0].text(t, b, names[b][t], ha="center", va="center", fontsize=6, rotation=30)
    axes[0].set(title="a batch, padded on the right", xlabel="time", ylabel="row", yticks=range(B))
    # The shortest row shows most: it has the most padding.
    row = int(mask.sum(1).argmin())
    for ax, (title, allowed) in zip(axes[1:], (("padding: no pads", padding_mask(mask)[row].expand(T, T)),
                                               ("causal: no future", causal_mask(T, T)),
                                               ("both: for a padded decoder", both_masks(mask)[row])), strict=True):
        ax.imshow(allowed.tolist(), cmap="Greens", vmin=0, vmax=1.4)
        ax.set(title=f"{title} (row {row})", xlabel="key: is looked at", ylabel="query: looks")
        ax.set_xticks(range(T), names[row], rotation=90, fontsize=6)
        ax.set_yticks(range(T), names[row], fontsize=6)
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def main(cfg):
    """Print real batches of the three framings, the floors, and draw a batch with its masks. -> (None, cfg)."""
    out = out_folder(cfg)
    print(f"Vocabulary: {len(TOY_VOCAB)} tokens, one id space for digits and words\n  "
          + " ".join(f"{i}:{token!r}" for i, token in enumerate(TOY_VOCAB)) + "\n")
    for n in (0, 7, 13, 42, 100, 999, 1000, 40215, 700007, 999999):
        print(f"  {n:>7,} {'validation' if is_validation(n) else 'train     '} {number_to_words(n)}")

    # 1. The split, and why the draw is over lengths.
    train, held_out = draw_numbers(20_000, cfg.seed, False), draw_numbers(2_000, cfg.seed, True)
    lengths = Counter(len(str(n)) for n in train)
    print(f"\nDrawn: {len(train):,} to train, {len(held_out):,} to validate, in common: "
          f"{len(set(train) & set(held_out))}. Digits: "
          + ", ".join(f"{d}: {lengths[d] / len(train):.0%}" for d in range(1, 7)))

    # 2. A few held-out numbers in three forms. A dot is padding, a dash is a target that does not count.
    # No number here has one digit: the hash holds out none of those.
    numbers = held_out[:cfg.batch_size]
    bert = encoder_pairs(numbers, cfg.seed)
    noisy, wanted = mask_tokens(bert["ids"], bert["mask"], cfg.seed)
    print("\nEncoder-only: fill in what is hidden, and say whether the two sides are the same number")
    show("ids", noisy)
    show("targets", wanted)
    print(f"  segments {tuple(bert['segments'].shape)}, first row: {bert['segments'][0].tolist()}\n"
          f"  match {tuple(bert['match'].shape)} {bert['match'].tolist()}")
    # segments: 0 = digits' side, 1 = words' side. match: 1 = the same number, 0 = the name of a near miss.
    gpt = decoder_lines(numbers)
    print("\nDecoder-only: every word from everything on its left")
    show("inputs", gpt["inputs"])
    show("targets", gpt["targets"])
    t5 = seq2seq_pairs(numbers)
    print("\nEncoder-decoder: read the digits whole, then write the words")
    for name in ("source", "tgt", "targets"):
        show(name, t5[name])

    # 3. A last look at what training would see. Padding is computed like anything else and thrown away. Sorting rows by
    # length before cutting would save most of it, at the price of batches that are less random.
    data = decoder_lines(train[:1000])
    sizes = [len(batch["inputs"]) for batch in batches(data, 64, cfg.seed)]
    used = data["mask"].float().mean().item()
    print(f"\n1,000 lines in batches of 64: {len(sizes)} batches, the last one of {sizes[-1]} rows; "
          f"{1 - used:.0%} of the tokens are padding")

    # Digits and name determine each other: three of the tasks can be solved completely. That is a claim about the
    # language, so it is checked. (With 15 % of the tokens hidden at once, a digit and its word sometimes both are, and
    # masked-language modelling as BERT trains it stays above 0.)
    assert all(words_to_number(number_to_words(n)) == n for n in held_out)
    floors = {"words after digits (decoder-only, encoder-decoder)": 0.0,
              "one hidden token of a full pair (encoder-only)": 0.0,
              "match or no match, per row (encoder-only)": 0.0,
              "all tokens of a line (decoder-only)": all_tokens_floor(train),
              f"words after digits, label smoothing {cfg.label_smoothing}":
                  smoothing_floor(cfg.label_smoothing, len(TOY_VOCAB))}
    # Trap: calling a loss near its floor "stuck". Compare with this table before you change the model.
    print(f"\nFloors: what a perfect model pays, in nats per token (a uniform guess: ln {len(TOY_VOCAB)} = "
          f"{math.log(len(TOY_VOCAB)):.2f})")
    for task, floor in floors.items():
        print(f"  {floor:.4f}  {task}")
    draw_masks(out / "masks.png", decoder_lines(numbers)["inputs"], decoder_lines(numbers)["mask"])
    summary = {"config": dataclasses.asdict(cfg), "figures": ["masks.png"], "torch": torch.__version__,
               "results": {"floors": floors}}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    print(f"\nThe picture of a padded batch and its masks is {out}/masks.png.\n"
          f"Next: python decoder_only.py --preset numbers learns these names in less than a minute.")
    return None, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
