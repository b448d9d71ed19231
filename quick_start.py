# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
THREE ARCHITECTURES IN A FEW MINUTES             python quick_start.py              95 s on two CPU cores

Idea     Train the three classic architectures, one after the other, on a language so small that you can check every
         answer: numbers and their English names. Look at what each of them does with it, and where they differ.
Picture  encoder          4 [MASK] 2 1 5 | forty thousand ...  ->  0                       reads both ways, fills gaps
         decoder          4 0 2 1 5 =                          ->  forty thousand ...      goes on, word by word
         encoder-decoder  4 0 2 1 5            (read first)    ->  forty thousand ...      then writes, looking back
Not here how they work: that is what encoder_only.py, decoder_only.py and encoder_decoder.py explain, line by line
Expect   names of unseen numbers exactly right after so short a training: encoder_only.py 89.2% in 45 s, decoder_only.py
         99.8% in 14 s, encoder_decoder.py 100.0% in 23 s; half-trained models err in ways worth looking at
         (results/quick_start.json)
Asked    What is a model, to begin with?   What does "loss" say?   Which of the three is ChatGPT?   (grep "# Q:")
"""
import argparse
import dataclasses
import inspect
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import decoder_only
import encoder_decoder
import encoder_only

# --- 1. Config: the few things to play with --------------------------------------------------------------------------
#     python quick_start.py                      the tour
#     python quick_start.py --number 777777      the same, with your number
#     python quick_start.py --effort 0.2         a fifth of the training: what do barely trained models get wrong?
# Sections have the same numbers in all scripts; this one has no use for the others.


@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    out: str = "runs/quick_start"     # folder for the three models and the pictures
    seed: int = 1337                  # decides initial weights, batches and which numbers are drawn
    number: int = 40215               # the number that the models are asked about
    effort: float = 1.0               # share of the training steps

    def __post_init__(self):
        if not 0 <= self.seed < 2 ** 31:
            raise ValueError(f"seed must be in [0, 2^31), not {self.seed}")
        if not 0 <= self.number <= 999_999:
            raise ValueError(f"number must be in 0..999999, not {self.number}")
        if not 0 < self.effort <= 10:
            raise ValueError(f"effort must be above 0 and at most 10, not {self.effort}")


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


# --- 5. Training: the same few lines for all three -------------------------------------------------------------------
# Q: What is a model, to begin with?
# A: A function with adjustable numbers, here 100,000 to 230,000 of them: tokens in, one score per possible token out.
#    Training adjusts the numbers, a little at each step, so that the right token's score rises. What differs between
#    the three is which tokens may look at which others, and what is asked of them.
#
# Q: What does "loss" say?
# A: How surprised the model is by the right answer: -ln p. Guessing among 46 tokens costs ln 46 = 3.83; 0.01 means that
#    it gives the right token 99 %. "train" is measured on what it learns from, "val" on numbers it never sees in
#    training. If only "train" fell, it would be learning by heart.
def train_one(script, cfg, loss_fn):
    """Make the data, build the model, train it, all with the script's own functions. -> (model, tokenizer, result)."""
    # Data first: what a tokenizer knows decides how many rows the model's table of tokens has.
    # train_data, val_data: tensors of token ids, a row per example. info: the data's name and hash, for the checkpoint.
    train_data, val_data, tokenizer, info, *_ = script.make_data(cfg)
    changes = {"vocab_size": tokenizer.n_vocab}
    if script is encoder_only:  # it has to know which id means "hidden"
        changes["mask_id"] = script.mask_id_of(tokenizer)
    cfg = dataclasses.replace(cfg, **changes)
    model = script.build_model(cfg)  # on the CPU: models this small would wait for a GPU rather than use it
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {parameters:,} numbers to adjust, {cfg.max_steps} steps of {cfg.batch_size} rows\n")
    # Before training, a guess among 46 tokens; the encoder also judges whether two halves match, a guess among two.
    guess = f"guessing costs ln {tokenizer.n_vocab} = {math.log(tokenizer.n_vocab):.2f} per token" + (
        ", ln 2 = 0.69 per pair" if script is encoder_only else "")
    result = script.train(model, cfg, train_data, val_data, loss_fn, {"tokenizer": tokenizer.spec, "data": info},
                          guess=guess)
    print()
    return model, tokenizer, result | {"parameters": parameters}


def shortened(script, preset, steps, cfg):
    """The script's own preset, shortened to `steps` (times --effort), in a folder of this tour. -> its Config."""
    # lr, width, batch and the rest stay what the script's author found to work. The warm-up and the fall of the
    # learning rate follow the number of steps: a cut-off schedule would end at a high rate, with noisy weights.
    steps = max(10, round(steps * cfg.effort))
    return script.Config(**script.PRESETS[preset] | dict(
        data="numbers", device="cpu", out=str(Path(cfg.out) / script.__name__), seed=cfg.seed, max_steps=steps,
        eval_every=max(1, steps // 3), save_every=steps, warmup_steps=steps // 10))


# --- 6. Decoding: what to ask each of them ---------------------------------------------------------------------------
def ask_encoder(model, tokenizer, cfg, name):
    """Hide each token of the pair in turn and let the encoder fill it in. -> lines to print."""
    # The pair as the encoder knows it from training: digits, then the name, each half closed by [SEP].
    words = tokenizer.encode(f"[CLS] {cfg.number} [SEP] {name} [SEP]")
    # Every token is asked about by itself, with all others in view: the encoder's own kind of question.
    ids = torch.tensor([words])
    segments = encoder_only.second_half(ids, tokenizer)
    lines, right, asked = [], 0, 0
    for column, true in enumerate(words):
        if true <= model.cfg.mask_id:  # [CLS] and [SEP] are punctuation
            continue
        hidden = ids.clone()
        hidden[0, column] = model.cfg.mask_id
        # probabilities and tokens, best first, for the one blank
        probs, tokens = encoder_only.fill_mask(model, hidden, None, segments, top_k=2)
        best, second = (f"{tokenizer.decode([tokens[0, i].item()])} {probs[0, i]:.1%}" for i in (0, 1))
        asked, right = asked + 1, right + (tokens[0, 0].item() == true)
        lines.append(f"  {tokenizer.decode(hidden[0].tolist()):62} -> {best:16} (then {second})")
    return [*lines, f"  {right} of {asked} blanks filled rightly."]


def ask_decoder(model, tokenizer, cfg):
    """Greedy and sampled continuations of "40215=". -> lines to print."""
    # It was trained on lines such as "42=forty two": whoever gives it "42=" gets the rest.
    # Trap: asking in another form than it was trained in, "=42". It has seen no such line, and goes on somehow.
    ids = torch.tensor([tokenizer.encode(f"{cfg.number}=")])
    lines = []
    for temperature in (0.0, 1.0, 2.0):
        # temperature 0 takes the likeliest token; 1 draws from the model's own distribution; 2 flattens it
        generator = torch.Generator().manual_seed(cfg.seed)
        out = decoder_only.generate(model, ids, 10, temperature=temperature, eos_ids=tokenizer.eos_ids,
                                    generator=generator)
        answer = tokenizer.decode(out[0].tolist()).strip()
        lines.append(f"  temperature {temperature:.0f}: {cfg.number}={answer}")
    return lines


def exact(script, model, tokenizer, cfg):
    """Share of 500 held-out numbers whose whole name is right, in the architecture's own way of writing."""
    # 500 draws (short numbers repeat): at 95 % right the standard error is one point, so two points mean nothing.
    numbers = decoder_only.draw_numbers(500, cfg.seed + 2, True)
    if script is encoder_only:  # told how many words there are, it fills them all, the surest first
        return script.written(model, tokenizer, numbers)
    return script.exact_match(model, tokenizer, numbers, *([model.cfg] if script is encoder_decoder else []))


# --- 8. Main: the tour -----------------------------------------------------------------------------------------------
# What is said about each before it is trained.
TEXTS = {
    encoder_only:
        "THE ENCODER (BERT) reads a whole text at once and sees every token from both sides. It is trained on gaps: "
        "some tokens are hidden and it guesses them. Good for understanding: search, classification.",
    decoder_only:
        "THE DECODER (GPT) sees only what stands to the left and guesses the next token; appending its guess and "
        "guessing again makes text. Good for writing, and with enough data for nearly everything.",
    encoder_decoder:
        "THE ENCODER-DECODER (T5) has both: one half reads the source from both sides, the other half writes and "
        "looks back at it with every word. Good where a source becomes a target: translation.",
}


# The terminal is as wide as it is; 100 columns fit nearly everywhere and can still be read without a ruler.
def fill(text, width=100):
    """A paragraph in lines of at most `width` characters."""
    return "\n".join(re.findall(rf".{{1,{width}}}(?:\s|$)", text))


def plot_losses(path, histories):
    """The three training losses against the seconds that they took."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    # Against seconds and not steps: a step of one model is not the work of a step of another. The losses are not of one
    # kind either (hidden tokens and pairs; words after "="; words of the target), so compare shapes, not heights.
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120)
    # Colours of Okabe & Ito, and lines that differ without colour too.
    for (name, history), color, style in zip(histories.items(), ("#0072B2", "#E69F00", "#009E73"), ("-", "--", "-."),
                                             strict=True):
        seen = [row for row in history if row["step"] > 1]
        ax.plot([row["seconds"] for row in seen], [row["loss"] for row in seen], style, color=color, label=name)
    ax.set(xlabel="seconds of training", ylabel="training loss, nats per question", yscale="log",
           title="Three architectures learn the names of numbers")
    ax.legend()
    fig.tight_layout()
    decoder_only.write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


# Q: Which of the three is ChatGPT?
# A: A decoder, as nearly all large language models are: one stack, one objective that every text on the internet
#    serves, and any task can be written as "go on". Encoders still sort and search, with a fraction of the work per
#    text; encoder-decoders live on in translation and speech recognition.
def main(cfg):
    """Train, ask, compare, draw. -> {name: results} as in summary.json."""
    start = time.perf_counter()
    out = decoder_only.out_folder(cfg)  # made first: a folder that cannot be made should end the tour before the work
    name = decoder_only.number_to_words(cfg.number)
    other = next(n for n in [*range(cfg.number, 1_000_000), *range(cfg.number)] if decoder_only.is_validation(n))
    seen = "is held out: no model sees it in training." if other == cfg.number else (
        f"is not, so it may occur in training; try --number {other} as well.")
    print(f"The language: {cfg.number} = {name}\n"
          f"One token per digit, one per word. One number in ten is held out for testing; {cfg.number} {seen}\n")
    # The presets are the scripts' own; only the number of steps is chosen so that the tour stays short.
    # The encoder comes first because its question is the easiest to see, a gap; it also needs the most steps.
    tour = ((encoder_only, "laptop", 1200), (decoder_only, "numbers", 600), (encoder_decoder, "laptop", 600))
    results, histories = {}, {}
    for script, preset, steps in tour:
        print(fill(TEXTS[script]))
        try:
            model, tokenizer, result = train_one(script, shortened(script, preset, steps, cfg), script.compute_loss)
        except SystemExit as stopped:  # the script has saved and said how to go on; a tour of minutes starts again
            if stopped.code == 130:
                print("(The tour has no --resume: start it again.)", file=sys.stderr)
            raise
        model.eval()
        if script is encoder_only:
            print(*ask_encoder(model, tokenizer, cfg, name), sep="\n")
        elif script is decoder_only:
            print(*ask_decoder(model, tokenizer, cfg), sep="\n")
        else:
            answer = script.translate(model, tokenizer, [str(cfg.number)], model.cfg, 1, 10)[0]
            print(f"  {cfg.number} -> {answer}")
            # Where it looked while it wrote: a row per word, a column per digit.
            script.plot_alignment(out / "attention.png", model, tokenizer, str(cfg.number), name)
        results[script.__name__] = {"parameters": result["parameters"], "seconds": result["seconds"],
                                    "exact_match": exact(script, model, tokenizer, cfg)}
        histories[script.__name__] = result["history"]
        print()
    plot_losses(out / "comparison.png", histories)

    # One question to all: the whole name of an unseen number. One wrong word makes an answer wrong.
    print("THE COMPARISON: 500 questions about held-out numbers, the whole name right or wrong\n")
    print(f"  {'':18}{'numbers adjusted':>17}{'training':>10}{'names right':>13}")
    for label, one in results.items():
        print(f"  {label:18}{one['parameters']:>17,}{one['seconds']:>8.0f} s{one['exact_match']:>13.1%}")
    top = max(one["exact_match"] for one in results.values())
    best = ", ".join(label for label, one in results.items() if one["exact_match"] >= top - 0.02)
    print(f"\nBest at writing names here: {best} (two points are luck). The encoder has the easier question: it is "
          f"told\nhow many words to fill. (A fair race, equal sizes, rates searched for each, several seeds: "
          f"compare_architectures.py.)")
    seconds = time.perf_counter() - start
    summary = {"config": dataclasses.asdict(cfg), "seconds": seconds, "results": results, "torch": torch.__version__,
               "figures": ["comparison.png", "attention.png"]}
    decoder_only.write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where a measured run wrote it.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    print(f"\nPictures: {out}/comparison.png, {out}/attention.png. It took {seconds:.0f} s."
          f"\nExpected: {expected}\n\nTalk to them:\n"
          f"  python encoder_only.py --load {out}/encoder_only --prompt \"4[MASK]215 [SEP] forty thousand two hundred "
          f"fifteen\"\n  python decoder_only.py --load {out}/decoder_only --prompt 1984= --temperature 0\n"
          f"  python encoder_decoder.py --load {out}/encoder_decoder --prompt 1984\n"
          f"What to read next: toy_dataset.py (what a batch is), then decoder_only.py from top to bottom; then "
          f"encoder_only.py\nand encoder_decoder.py, each a difference from it. README.md has paths of an hour, an "
          f"afternoon and a week.")
    return results


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
