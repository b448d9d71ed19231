# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "tokenizers>=0.21", "torch>=2.11", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
THREE ARCHITECTURES IN A FEW MINUTES             python quick_start.py              75 s on two CPU cores

Idea     Train the three classic architectures, one after the other, on a language so small that you can check every
         answer: numbers and their English names. Ask each what it has learned, and see where they differ.
Picture  encoder          4 [MASK] 2 1 5 [SEP] forty thousand ...  ->  0                   reads both ways, fills gaps
         decoder          4 0 2 1 5 =                              ->  forty thousand ...  goes on, word by word
         encoder-decoder  4 0 2 1 5                (read first)    ->  forty thousand ...  then writes, looking back
Not here how they work: encoder_only.py, decoder_only.py, encoder_decoder.py; a fair race: compare_architectures.py
Expect   names of unseen numbers exactly right after so short a training: encoder 96 %, decoder 100 %, encoder-decoder
         100 %
Asked    What is a model, to begin with?   What does "loss" say?   Why ask about numbers that it was not trained on?
         Which of the three is ChatGPT?                                                     (grep "# Q:")

    python quick_start.py                      the tour
    python quick_start.py --number 777777      the same, with your number
    python quick_start.py --effort 0.2         a fifth of the training: what do barely trained models get wrong?
"""
import argparse
import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset as toy


# --- 1. Config: the few things to play with --------------------------------------------------------------------------
@dataclasses.dataclass
class Config:
    out: str = "runs/quick_start"   # folder for the picture, summary.json and the three models
    seed: int = 1337                # decides initial weights, batches and which numbers are drawn
    number: int = 40215             # the number that the models are asked about, 0 to 999999
    effort: float = 1.0             # share of the training steps


PRESETS = {"default": {}}


# --- 4. Data: the same numbers for all three -------------------------------------------------------------------------
# Models read ids, not letters. In this language each digit and each word is one token, and its id is its place in
# toy_dataset.py's list of 46:   40215 = forty ...  ->  10 6 8 7 11 2 38 ...
def toy_tokenizer():
    """The list of tokens as the text of a tokenizer.json, which all three scripts can read."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    # The line's end gets the name by which decoder_only.py knows the end of a text. A word that is not in the list
    # becomes <pad>, which means nothing.
    ids = {token.replace("\n", "<|endoftext|>"): i for i, token in enumerate(toy.TOY_VOCAB)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\[[A-Z]+\]|\d|=|[a-z]+"), "removed", invert=True)
    return inner.to_str()


# Q: Why ask about numbers that it was not trained on?
# A: What it was trained on it may know by heart. A right name for a number that it never met shows that it has found
#    the rule. One number in ten is set aside for that, and so is the one that you ask about.
def choose_numbers(cfg):
    """-> (numbers to train on, 500 held-out numbers to ask about). cfg.number is in neither."""
    train, held_out = toy.draw_numbers(50_000, cfg.seed, False), toy.draw_numbers(700, cfg.seed, True)
    # Each held-out number once. There are few short ones, and repeats would make one error count many times.
    return [n for n in train if n != cfg.number], [n for n in dict.fromkeys(held_out) if n != cfg.number][:500]


# --- 5. Training: the same few lines for all three -------------------------------------------------------------------
# Q: What is a model, to begin with?
# A: A function with adjustable numbers, here 100,000 to 250,000 of them: tokens in, one score per possible token out.
#    Training adjusts the numbers a little at every step, so that the right token's score rises. The three differ in
#    which tokens may look at which others, and in what they are asked.
#
# Q: What does "loss" say?
# A: How surprised the model is by the right answer: -ln p. Guessing among 46 tokens costs ln 46 = 3.83; 0.01 means that
#    it gives the right token 99 %. "train" is measured on what it learns from, "val" on held-out numbers. If only
#    "train" falls, it learns by heart.
def train_one(cfg, script, kind, steps, rows, spec, write, **settings):
    """Build a model (kind: script.BERT, GPT or T5), train it with the script's own loop, test it. -> (model, result).
    rows: (train, validation, held-out numbers); write(model, numbers) -> names; settings: other than the defaults."""
    steps = max(10, round(steps * cfg.effort))
    # On the CPU: models this small would wait for a GPU rather than use it. The learning rate rises for a tenth of the
    # steps and falls to 0 until the last; a long schedule that is cut off would end with large steps and noisy weights.
    own = script.Config(out=str(Path(cfg.out, kind.__name__)), seed=cfg.seed, device="cpu", vocab_size=46,
                        max_steps=steps, warmup_steps=steps // 10, eval_every=math.ceil(steps / 3), **settings)
    Path(own.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    model, held_out = kind(own), rows[2]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"It has {parameters:,} numbers to adjust, in {steps} steps of {own.batch_size} rows.")
    try:
        history = script.train(model, own, *rows[:2], spec, None, lambda: tqdm.write(
            f"            {cfg.number} -> {write(model, [cfg.number])[0]}"))
    except SystemExit:  # Ctrl-C: the loop has saved and would recommend its --resume
        sys.exit("interrupted: the tour has no --resume, start it again")
    # The same question to all: the whole name of a held-out number. One wrong word makes an answer wrong. At 95 % right
    # the standard error of 500 answers is one point: a difference of two points means nothing.
    wrong = [f"{n} -> {answer}" for n, answer in zip(held_out, write(model, held_out), strict=True)
             if answer != toy.number_to_words(n)]
    exact = 1 - len(wrong) / len(held_out)
    print(f"Of {len(held_out)} held-out numbers it names {exact:.1%} rightly.", *wrong[:3], sep="\n  wrong: ")
    return model, dict(exact_match=exact, seconds=history[-1]["seconds"], parameters=parameters, history=history)


# --- 6. Decoding: what to ask each of them ---------------------------------------------------------------------------
# Each stop of the tour gets (numbers to train on, held-out numbers), trains its model and asks it. toy_dataset.py makes
# the rows, in each architecture's own form. The docstrings are what the tour prints.
def words_of(ids):
    """Ids up to the end of the line -> text."""
    return " ".join(toy.TOY_VOCAB[i] for i in ids[:[*ids, toy.EOS].index(toy.EOS)])


def meet_encoder_only(cfg, spec, numbers):
    """THE ENCODER (BERT) reads a whole text at once and sees every token from both sides. It is trained on gaps: some
    tokens are hidden, and it guesses them. Good for understanding: search, sorting, tagging."""
    tokenizer = encoder_only.make_tokenizer("json", spec)
    # Half of these pairs have a wrong name, for BERT's second question (do the two match?), which the tour leaves out.
    train_rows, val_rows = (encoder_only.Rows(ids[match == 1], match[match == 1] * encoder_only.IGNORE, 0.15, tokenizer)
                            for ids, _, _, match in (toy.encoder_pairs(part, cfg.seed) for part in numbers))
    # Training hides other tokens at every step; validation always the same, so that its losses can be compared.
    val_rows = encoder_only.hide(val_rows, torch.arange(len(val_rows.ids)), torch.Generator().manual_seed(0))

    # To make an encoder write, the whole name becomes gaps: so it is told how many words there are, which the other
    # two have to find out. It fills the gap that it is surest of, looks again, fills the next.
    def write(model, asked):
        texts = [f"[CLS] {n} [SEP] {re.sub('[a-z]+', '[MASK]', toy.number_to_words(n))} [SEP]" for n in asked]
        ids, _ = toy.pad_rows(list(map(tokenizer.encode, texts)))
        filled = encoder_only.unmask(model, ids, toy.MASK, encoder_only.segments_of(ids, tokenizer))
        return [words_of(row[gaps].tolist()) for row, gaps in zip(filled, ids == toy.MASK, strict=True)]
    model, result = train_one(cfg, encoder_only, encoder_only.BERT, 1200, (train_rows, val_rows, numbers[1]),
                              ("json", spec), write)
    # Its own kind of question: hide each token of a pair in turn. For every gap the two likeliest tokens.
    pair = torch.tensor(tokenizer.encode(f"[CLS] {cfg.number} [SEP] {toy.number_to_words(cfg.number)} [SEP]"))
    places = (pair > toy.MASK).nonzero()[:, 0]  # digits and words, not [CLS] and [SEP]
    ids = pair.repeat(len(places), 1)
    ids[range(len(places)), places] = toy.MASK
    probs, tokens = encoder_only.fill_mask(model, ids, toy.MASK, encoder_only.segments_of(ids, tokenizer), 2)
    for row, p, best in zip(ids, probs, tokens, strict=True):
        first, second = (f"{toy.TOY_VOCAB[i]} {q:.1%}" for i, q in zip(best, p, strict=True))
        print(f"  {tokenizer.decode(row[1:-1].tolist()):70} -> {first}, then {second}")
    print(f"  {(tokens[:, 0] == pair[places]).sum()} of {len(places)} gaps filled rightly.")
    return result


def meet_decoder_only(cfg, spec, numbers):
    """THE DECODER (GPT) sees only what stands to the left and guesses the next token. It appends its guess and guesses
    again: that makes a text. Good for writing, and with enough data for nearly everything."""
    # It is trained on lines such as "42=forty two": whoever gives it "42=" gets the rest.
    # Trap: asking in another form than the one it was trained in, "=42". It has seen no such line, and goes on somehow.
    def write(model, asked, temperature=0.0):
        names = {}
        # All rows of one call must be equally long: first the numbers of one digit, then those of two, and so on.
        for length in {len(str(n)) for n in asked}:
            same = [n for n in dict.fromkeys(asked) if len(str(n)) == length]
            new = decoder_only.generate(model, torch.tensor([toy.encode_toy(f"{n}=") for n in same]), 10, temperature,
                                        eos=toy.EOS, generator=torch.Generator().manual_seed(cfg.seed))
            names |= zip(same, map(words_of, new.tolist()), strict=True)
        return [names[n] for n in asked]
    # The script's own defaults are for prose. These lines have at most 17 tokens, and there are only 46 different ones.
    rows = (toy.decoder_rows(part)[:2] for part in numbers)
    model, result = train_one(cfg, decoder_only, decoder_only.GPT, 600, (*rows, numbers[1]), ("json", spec), write,
                              block_size=20, n_layer=2, n_embd=64, batch_size=128, beta2=0.98)
    # Temperature 0 takes the likeliest token, 1 draws from the model's own distribution, 3 from a much flatter one.
    for temperature in (0.0, 1.0, 3.0):
        print(f"  temperature {temperature:.0f}: {cfg.number}={write(model, [cfg.number], temperature)[0]}")
    return result


def meet_encoder_decoder(cfg, spec, numbers):
    """THE ENCODER-DECODER (T5) has both: one half reads the source from both sides, the other half writes, and looks
    back at the source with every word. Good where one text becomes another: translation."""
    tokenizer = encoder_decoder.make_tokenizer(spec)
    rows = (toy.seq2seq_rows(part)[::2] for part in numbers)  # source and targets

    # It reads "40215" and writes "forty thousand two hundred fifteen": that is what it was trained on, so just ask.
    def write(model, asked):
        return encoder_decoder.translate(model, tokenizer, list(map(str, asked)), model.cfg, 1)
    return train_one(cfg, encoder_decoder, encoder_decoder.T5, 600, (*rows, numbers[1]), (spec,), write,
                     max_new_tokens=10)[1]


# --- 8. Main: the tour -----------------------------------------------------------------------------------------------
def plot_losses(path, results):
    """The three training losses against the seconds that they took."""
    from matplotlib.figure import Figure
    ax = (figure := Figure(figsize=(8, 4.8), dpi=120, layout="tight")).add_subplot(
        yscale="log", xlabel="seconds of training", ylabel="loss: surprise at the right answer, in nats",
        title="Three architectures learn the names of numbers\n"
              "(encoder: a digit and its word are sometimes both hidden, so its loss stays above 0)")
    # Against seconds and not steps: a step of one model is not the work of a step of another.
    for (name, one), look in zip(results.items(), ("-", "--", "-."), strict=True):
        ax.plot([row["seconds"] for row in one["history"]], [row["loss"] for row in one["history"]], look,
                label=f"{name}: {one['exact_match']:.1%} of unseen names right")
    ax.axhline(math.log(len(toy.TOY_VOCAB)), color="gray", linestyle=":", label="guessing one of 46 tokens")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend()
    figure.savefig(path)


# Q: Which of the three is ChatGPT?
# A: A decoder, as nearly all large language models are: one stack, one objective that every text on the internet
#    serves, and any task can be written as "go on". Encoders still sort and search, with a fraction of the work per
#    text; encoder-decoders live on in translation and speech recognition.
def main(cfg):
    """Train, ask, compare, draw. -> {script: results} as in summary.json."""
    if not (0 <= cfg.number <= 999_999 and 0 < cfg.effort <= 10 and 0 <= cfg.seed < 2 ** 31):
        raise ValueError("number goes from 0 to 999999, effort from above 0 to 10, seed from 0 to 2147483647")
    began, out, results = time.perf_counter(), Path(cfg.out), {}
    name, spec, numbers = toy.number_to_words(cfg.number), toy_tokenizer(), choose_numbers(cfg)
    print(f"The language: {cfg.number} = {name}. (All three are asked about {cfg.number}, and none is trained on it.)")
    for meet in (meet_encoder_only, meet_decoder_only, meet_encoder_decoder):
        print("\n" + re.sub("\n +", "\n", meet.__doc__))
        results[meet.__name__.removeprefix("meet_")] = meet(cfg, spec, numbers)
    plot_losses(out / "comparison.png", results)
    print("\nTHE COMPARISON: held-out numbers named rightly (the encoder is told how many words; the others find out)")
    for label, one in results.items():
        del one["history"]
        print(f"  {label:16}{one['exact_match']:6.1%} after {one['seconds']:.0f} s of training")
    seconds = time.perf_counter() - began
    (out / "summary.json").write_text(json.dumps(dict(config=vars(cfg), seconds=seconds, results=results)))
    print(f"\nIt took {seconds:.0f} s; see {out / 'comparison.png'}. Ask them (the encoder's label is untrained):")
    for label, ask in zip(results, (f'BERT" --prompt="[MASK]{str(cfg.number)[1:]} [SEP] {name}"',
                                    'GPT" --temperature 0 --prompt="1984="', 'T5" --prompt="1984"'), strict=True):
        print(f'  "{sys.executable}" "{Path(__file__).with_name(label)}.py" --load "{out}/{ask}')
    print("Read next: toy_dataset.py (what a batch is), then decoder_only.py from top to bottom, then the other two.")
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
