# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "torch>=2.11"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
THE TOY LANGUAGE IN ONE FILE                     python toy_dataset.py              4 s on a laptop CPU

Idea     Numbers and their English names, 40215 <-> forty thousand two hundred fifteen. Small enough to learn in a
         minute, hard enough to get wrong: order matters, zeros are silent, "thousand" must come at the right place.
         Every answer can be checked and the best possible loss is known, so a bug has nowhere to hide.
Picture  40215 --+-- encoder-only      [CLS] 4 0 2 1 5 [SEP] forty [MASK] two ... [SEP]     fill in; do they match?
                 +-- decoder-only      4 0 2 1 5 = forty thousand two hundred fifteen \\n    one line, left to right
                 +-- encoder-decoder   4 0 2 1 5 \\n  ->  forty thousand two hundred fifteen \\n  read, then write
Symbols  B batch   T time (columns)   S source
Not here models: encoder_only.py and encoder_decoder.py learn this language, decoder_only.py a file of its lines
Expect   floors (the best possible losses, nats per token): 0 for words after digits, 0.98 for all tokens of a line
Asked    Where does EOS go?   Why shift?   Which mask hides what?   What loss would a perfect model have?
         Why hold out by hash?   What does label smoothing do to the loss?                 (grep "# Q:")

    python toy_dataset.py                                      show batches, masks and floors
    python toy_dataset.py --write numbers.txt                  lines of text for: decoder_only.py --data numbers.txt
"""
import argparse
import dataclasses
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch


# --- 1. Config: how much to show -------------------------------------------------------------------------------------
@dataclasses.dataclass
class Config:
    out: str = "runs/toy_dataset"   # folder for the picture and summary.json
    seed: int = 1337                # decides which numbers are drawn and which tokens are hidden
    write: str = ""                 # file to write lines "42=forty two" to, for decoder_only.py --data


PRESETS = {"default": {}}


# --- 4. Data: from a number to a batch -------------------------------------------------------------------------------
UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# Digits and words have ids of their own: "5" and "five" must be *learned* to mean the same. Index = id.
TOY_VOCAB = ["<pad>", "\n", "=", "[CLS]", "[SEP]", "[MASK]", *"0123456789", *UNITS, *TENS, "hundred", "thousand"]
# <pad> fills rows up and means nothing; "\n" ends a text (EOS). They must be two tokens.
# Trap: pad id = EOS id, with pads left out of the loss. EOS is then left out too, and the model never stops writing.
PAD, EOS, EQUALS, CLS, SEP, MASK = range(6)
IGNORE = -100  # a target that does not count: padding, prompts. The value is F.cross_entropy's own default.


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


def toy_line(n):
    """The text of one number, 42 -> "42=forty two\\n"."""
    return f"{n}={number_to_words(n)}\n"


def pad_rows(rows):
    """Lists of different length -> (ids (B, T), mask (B, T)), T the longest, mask True = real token."""
    width, lengths = max(map(len, rows)), torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])   # (B, T)
    return ids, torch.arange(width) < lengths[:, None]                         # (B, T)


# Q: Which mask hides what?
# A: Padding: columns without content, from everybody. Causal: columns to the right, in a decoder. A decoder with pads
#    on the left needs both; on the right, causal is enough for its real rows. Cross-attention takes the SOURCE's
#    padding and no triangle. Scores have a head axis: padding[:, None] is (B, 1, 1, T).
def make_masks(mask):
    """mask (B, T), True = real token -> masks for padding (B, 1, T), causal (T, T), both (B, T, T): [query, key].

    True = may attend (may read that column). The opposite convention is as common: always say which.
    """
    T = mask.size(1)
    padding = mask[:, None, :]                                                 # (B, 1, T)
    causal = torch.ones(T, T, dtype=torch.bool).tril()                         # (T, T)
    return padding, causal, padding & causal


# Three framings of the same pairs. First BERT's, which asks two things: what is hidden, and do the sides match?
def near_miss(n, rng):
    """A number that is easily taken for n: one digit changed, or at most 20 away. Never n itself."""
    # A random number would mostly give itself away by its length. These have to be read digit by digit. (8 % of those
    # of a training number are held out: their names are then seen in training, as wrong ones.)
    other = n
    while other == n:
        digits = list(str(n))
        digits[rng.randrange(len(digits))] = rng.choice("0123456789")
        other = int("".join(digits)) if rng.random() < 0.5 else min(999_999, max(0, n + rng.randint(-20, 20)))
    return other


def encoder_pairs(numbers, seed):
    """BERT's form: "[CLS] digits [SEP] words [SEP]" in two segments. -> ids, mask, segments (B, T), match (B).

    Half of the rows get the name of another number, one that is easily taken for theirs; match is 0 there.
    """
    rng, rows, segments, match = random.Random(seed), [], [], []
    for n in numbers:
        named = n if rng.random() < 0.5 else near_miss(n, rng)
        first, second = [CLS] + encode_toy(str(n)) + [SEP], encode_toy(number_to_words(named)) + [SEP]
        rows.append(first + second)
        # Positions are numbered straight through; the segment says which side a token is on.
        segments.append([0] * len(first) + [1] * len(second))
        match.append(int(named == n))
    return *pad_rows(rows), pad_rows(segments)[0], torch.tensor(match)


def mask_tokens(ids, mask, seed, share=0.15):
    """BERT's noise (Devlin et al. 2018, arXiv 1810.04805, section 3.1). -> (noisy ids, targets), IGNORE if not chosen.

    Of the real, non-special tokens `share` are chosen; of those 80 % become [MASK], 10 % a random token, 10 % stay.
    """
    # Trap: a short row may have no chosen token, and a mean over none is 0/0: divide by max(1, count).
    # Q: Why not always [MASK]?
    # A: [MASK] never occurs when the model is used. With 10 % random and 10 % unchanged tokens no position can be
    #    trusted or ignored, so a good representation is needed everywhere.
    g = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=g) < share) & mask & (ids != CLS) & (ids != SEP)  # (B, T)
    dice = torch.rand(ids.shape, generator=g)                                  # (B, T)
    random_ids = torch.randint(MASK + 1, len(TOY_VOCAB), ids.shape, generator=g)  # (B, T)
    noisy = torch.where(dice < 0.8, MASK, torch.where(dice < 0.9, random_ids, ids))  # (B, T)
    return torch.where(chosen, noisy, ids), ids.masked_fill(~chosen, IGNORE)


def decoder_rows(numbers):
    """GPT's form: one line "digits=words\\n". -> inputs, targets, mask (B, T): targets[t] is what follows inputs[t].

    Only words and newline are targets: the digits are drawn at random, nobody can predict them.
    """
    ids, mask = pad_rows([encode_toy(toy_line(n)) for n in numbers])
    # Q: Why shift?
    # A: Position t has read inputs 0..t and is asked for the next token. Inputs drop the last token, targets the first.
    #    Without the shift the answer stands in the question: the loss falls to 0 and the model has learned to copy.
    inputs, targets = ids[:, :-1], ids[:, 1:]                                  # (B, T) each
    # Q: Where does EOS go?
    # A: At the row's own length, before the padding (toy_line, then pad_rows). Trap: padding first, EOS at the end of
    #    the rectangle: it must then be predicted from a pad, and the model never learns where to stop.
    answered = (inputs == EQUALS).cumsum(1).bool()                             # (B, T)
    return inputs, targets.masked_fill(~answered | ~mask[:, 1:], IGNORE), mask[:, :-1]


def seq2seq_rows(numbers):
    """T5's form. -> source (B, S), tgt (B, T) what the decoder reads, targets (B, T) what it should write.

    Teacher forcing: while training, the decoder reads the right answer so far and not its own guesses.
    """
    # tgt is the answer moved one to the right, with a start token in front. T5 starts with <pad>: it is there anyway.
    #     tgt      <pad>  forty  two      Trap: the padding mask tgt != PAD hides this start token. None is needed:
    #     targets  forty  two    \n       pads are on the right, and a causal decoder never looks there.
    source, _ = pad_rows([encode_toy(str(n)) + [EOS] for n in numbers])
    targets, mask = pad_rows([encode_toy(number_to_words(n)) + [EOS] for n in numbers])
    tgt = torch.cat((torch.full_like(targets[:, :1], PAD), targets[:, :-1]), 1)  # (B, T)
    return source, tgt, targets.masked_fill(~mask, IGNORE)


# Floors: the loss of a model that knows everything there is to know.
# Q: What loss would a perfect model have?
# A: The entropy of what nobody can know. A translation is determined by its source: 0. Random digits are not: about
#    ln 10 = 2.3 nats each, and about ln 6 = 1.8 for how many there are; digit_floor() has the exact sum.
def digit_floor():
    """Entropy of a drawn training number, in nats: what nobody can know about its digits, however good the model.

    draw_numbers picks a length, then a number of that length, and keeps it if it is in the split. So with N(d) numbers
    of length d in the split, P(d) ~ N(d) / (all numbers of length d), and the entropy is H(P) + sum P(d) ln N(d).
    """
    count = Counter(len(str(n)) for n in range(1_000_000) if not is_validation(n))
    share = {d: count[d] / (10 if d == 1 else 9 * 10 ** (d - 1)) for d in count}
    P = {d: share[d] / sum(share.values()) for d in share}
    return sum(P[d] * (math.log(count[d]) - math.log(P[d])) for d in P)


def smoothing_floor(epsilon, V):
    """The least loss under label smoothing, in nats per token, for a target that is certain.

    The target becomes 1 - epsilon + epsilon/V on the right token and epsilon/V on each other; no distribution does
    better than the target itself, and its entropy is the floor (Szegedy et al. 2015, arXiv 1512.00567, section 7).
    """
    # Q: What does label smoothing do to the loss?
    # A: It lifts the floor from 0 to what this returns: 0.6927 for epsilon 0.1 and 46 tokens (not ln 2). A loss that
    #    "sticks at 0.69" is then a perfect one. Judge by exact match, or report the loss without smoothing.
    right, other = 1 - epsilon + epsilon / V, epsilon / V
    return -right * math.log(right) - (V - 1) * other * math.log(other)


def toy_text(seed):
    """-> 24,000 lines of text: training numbers first, held-out ones in the last tenth of its characters."""
    train = "".join(toy_line(n) for n in draw_numbers(22_000, seed, False))
    held_out = "".join(toy_line(n) for n in draw_numbers(2_500, seed, True))[:len(train) // 9]
    # decoder_only.py validates on the last tenth of a file. No held-out line may begin before that.
    return train + held_out[:held_out.rfind("\n") + 1]


# --- 8. Main: show it ------------------------------------------------------------------------------------------------
def show(name, tensor):
    """Print a tensor of ids as tokens. A dot is <pad>, a dash a target that does not count."""
    short = {IGNORE: "-", PAD: ".", EOS: "\\n"}
    print(f"  {name} {tuple(tensor.shape)}")
    for row in tensor.tolist():
        print("    " + " ".join(short.get(i) or TOY_VOCAB[i] for i in row))


def draw_masks(path, ids, mask):
    """What each mask lets the row with the most padding see, as a picture."""
    from matplotlib.figure import Figure
    row, T = int(mask.sum(1).argmin()), ids.size(1)
    names = [TOY_VOCAB[i].replace("\n", "\\n") for i in ids[row].tolist()]
    titles = "padding mask: no pads", "causal mask: no future", "both together"
    figure = Figure(figsize=(13, 4.8), layout="tight")
    for ax, title, allowed in zip(figure.subplots(1, 3), titles, make_masks(mask[row:row + 1]), strict=True):
        ax.imshow(allowed.expand(1, T, T)[0].tolist(), cmap="Greens", vmin=0, vmax=1.4)
        ax.set(title=title, xlabel="key: is read", ylabel="query: reads")
        ax.set_xticks(range(T), names, rotation=90)
        ax.set_yticks(range(T), names)
    figure.savefig(path)


def main(cfg):
    """Print real batches of the three framings and the floors, draw the masks; or write lines of text to a file."""
    if cfg.write:
        text = toy_text(cfg.seed)
        Path(cfg.write).write_text(text, encoding="utf-8", newline="\n")
        # In characters, as decoder_only.py counts. A row that begins inside a line lacks its digits, so even a perfect
        # model that sees 64 characters stays above this.
        floor = text.count("\n") * digit_floor() / len(text)
        print(f"A perfect model that sees whole lines pays about {floor:.2f} nats per character of {cfg.write}\n"
              f'Next: "{sys.executable}" "{Path(__file__).with_name("decoder_only.py")}" --data "{cfg.write}"')
        return
    print(f"{len(TOY_VOCAB)} tokens, one id space for digits and words: {' '.join(map(repr, TOY_VOCAB))}\n")
    for n in (0, 7, 13, 42, 100, 999, 1000, 40215, 700007, 999999):
        print(f"  {n:>7,} {'held out' if is_validation(n) else 'train   '} {number_to_words(n)}")
    numbers = draw_numbers(5, cfg.seed, True)
    ids, mask, segments, match = encoder_pairs(numbers, cfg.seed)
    print("\nEncoder-only: fill in what is hidden, and say whether the two sides are the same number (match)")
    for name, tensor in zip(("ids", "targets"), mask_tokens(ids, mask, cfg.seed), strict=True):
        show(name, tensor)
    print(f"  segments, row 0: {segments[0].tolist()}   match: {match.tolist()}")
    inputs, targets, mask = decoder_rows(numbers)
    print("\nDecoder-only: every word from everything on its left")
    show("inputs", inputs)
    show("targets", targets)
    print("\nEncoder-decoder: read the digits whole, then write the words")
    for name, tensor in zip(("source", "tgt", "targets"), seq2seq_rows(numbers), strict=True):
        show(name, tensor)

    # (With 15 % of the tokens hidden, a digit and its word sometimes both are: BERT's own objective stays above 0.)
    length = sum(len(encode_toy(toy_line(n))) for n in draw_numbers(20_000, cfg.seed, False)) / 20_000
    floors = {"words after digits; one hidden token of a matching pair; match, with nothing hidden": 0.0,
              "all tokens of a line, digits included": digit_floor() / length,
              "words after digits, label smoothing 0.1": smoothing_floor(0.1, len(TOY_VOCAB))}
    # Trap: calling a loss near its floor "stuck". Compare with this table before you change the model.
    print(f"\nWhat a perfect model pays, in nats per token (a uniform guess: ln V = {math.log(len(TOY_VOCAB)):.2f})")
    for task, floor in floors.items():
        print(f"  {floor:.4f}  {task}")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_masks(out / "masks.png", inputs, mask)
    (out / "summary.json").write_text(encoding="utf-8", data=json.dumps(dict(
        config=dataclasses.asdict(cfg), results=dict(floors=floors))))
    print(f"\nThe masks of a padded batch are drawn in {out / 'masks.png'}")


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
