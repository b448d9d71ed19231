# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "regex>=2023.12", "requests>=2.31", "tiktoken>=0.7"]
# ///
# SPDX-License-Identifier: MIT
# From "language models, one file each". Copy what you need; keep these two lines.
"""
BYTE-PAIR ENCODING IN ONE FILE                   python bpe_tokenizer.py            3 s on one CPU core

Paper    Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units, arXiv 1508.07909;
         on bytes: Radford et al. 2019 (GPT-2), section 2.2
Idea     Start with 256 tokens, the bytes. Count which two stand side by side most often, make that pair a new
         token, replace it everywhere, repeat. Frequent words become one token, rare ones a few, and nothing is ever
         unknown, because every text is bytes.
Picture  text -> pieces (a regex: words, numbers, spaces) -> bytes -> merges, lowest rank first -> ids
         " lower" -> _ l o w e r -> _ lo w e r -> _ low e r -> _low e r
Not here WordPiece, SentencePiece and its unigram model, normalization (NFC): BPE on bytes needs none
Expect   3,840 merges on Tiny Shakespeare in 0.7 s, 3.24 bytes per token on held-out text
Asked    Why bytes and not characters?   Why split before merging?   Why is a model bad at spelling and sums?
         Why is the fast trainer fast?   Larger vocabulary: what is gained, what is lost?   (grep "# Q:")

    python bpe_tokenizer.py                                            learn 4,096 tokens and look at them
    python bpe_tokenizer.py --data my.txt --vocab-size 16384           from your own text
    python bpe_tokenizer.py --load runs/bpe_tokenizer/tokenizer.json --sentence "Try this one."
"""
import argparse
import dataclasses
import hashlib
import heapq
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path


# --- 1. Config: what to learn from, how many tokens ------------------------------------------------------------------
@dataclasses.dataclass
class Config:
    data: str = "auto"               # auto | shakespeare | pydocs | path of a UTF-8 text file
    vocab_size: int = 4096           # tokens to end with: 256 bytes, the rest is learned
    pattern: str = "gpt4"            # how to split before merging: gpt2 | gpt4
    sentence: str = "The unhappiest of 1024 tokenizers: naïve, isn't it?"  # shown under several vocabularies
    load: str = ""                   # tokenizer.json (or GPT-2's vocab.bpe) to show --sentence under
    out: str = "runs/bpe_tokenizer"  # folder for tokenizer.json, summary.json and the picture


PRESETS = {"default": {}}


# --- 2. Model: from the definition to the fast form ------------------------------------------------------------------
# Q: Why bytes and not characters?
# A: There are 155,000 characters (Unicode 16) and 256 bytes. A vocabulary of characters is either huge or has an <unk>
#    for what it left out, and <unk> cannot be turned back into text. With bytes decode(encode(text)) == text.
#
# Q: Why split before merging?
# A: Without it "dog." "dog!" "dog?" and "dog " would all become tokens of their own: the most frequent neighbors are a
#    word's end and what follows it. The pattern cuts text into pieces (a word with its space, up to three digits, a run
#    of punctuation), and merges stay inside a piece.
#
# A space belongs to the word BEHIND it: " the" is one piece. Text is then a plain concatenation, with no rule for where
# spaces go. GPT-2's pattern is a list of alternatives, the first match wins (\p{L} letter, \p{N} digit, \s white space;
# ++ and ?+ take all and never give back, which changes nothing here but speed):
#     '(?:[sdmt]|ll|ve|re)       's 'd 'm 't 'll 've 're
#      ?\p{L}++ and  ?\p{N}++    letters; digits; each with at most one space before
#      ?[^\s\p{L}\p{N}]++        signs, with at most one space before
#     \s++$                      white space that ends the text
#     \s+(?!\S)                  white space but its last, which is left for the word after it: "a  b" -> "a" " " " b"
#     \s                         what is left, such as a single line end before a word
# GPT-4 (cl100k): contractions in capitals too; digits in groups of at most 3, so "1234567" is cut 123|456|7 and there
# are only 1,110 kinds of ASCII digit pieces; a sign may lead a word as a space does ("(word"); line ends join the signs
# or spaces before them.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
             r"|\s*[\r\n]|\s+(?!\S)|\s"),
}


def split(text, pattern="gpt4"):
    """-> the pieces of a text, which concatenate to the text. split("I'll go") == ["I", "'ll", " go"]."""
    import regex  # the standard library's re knows no \p{L} ("any letter of any script")
    return regex.findall(PATTERNS[pattern], text)


# Below, a token id is written as the character chr(id), a row of ids as a string; latin-1 turns the byte b into chr(b).
# Replacing a pair is then str.replace, at the speed of C and left to right, and comparing strings compares ids.
def pairs(word):
    """All neighbors in a word: "low" -> "lo", "ow"."""
    return map("".join, zip(word, word[1:], strict=False))


# The algorithm on four words, "low low lower slow" (pieces: low, _low, _lower, _slow; _ is the space):
#     counts   (l,o) 4   (o,w) 4   (_,l) 2   (w,e) 1 ...     a tie: (l,o) is smaller, since l = 108 and o = 111
#     merge 1  l + o -> lo         lo w    _ lo w    _ lo w e r    _ s lo w
#     merge 2  lo + w -> low       low     _ low     _ low e r     _ s low
#     merge 3  _ + low -> _low     low     _low      _low e r      _ s low      and no pair occurs twice any more
def train_slow(text, vocab_size, pattern="gpt4"):
    """The definition. -> merges, a list of pairs of ids: bytes are the ids 0..255, the i-th merge makes the id 256 + i.

    Counts are over the whole text; in "aaa" the pair (a, a) counts twice, though only one of them can be replaced.
    Of equally frequent pairs the smallest (id, id) wins. Stops early when no pair occurs twice: a merge of something
    unique would learn that one text by heart.
    """
    # Trap: comparing two trainers without fixing the rule for ties. From the first tie on every later merge may differ:
    # same quality, other ids.
    words, merges = [piece.encode().decode("latin-1") for piece in split(text, pattern)], []
    while 256 + len(merges) < vocab_size:
        # This line is the cost: it visits the whole text for every merge.
        counts = Counter(pair for word in words for pair in pairs(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default="")  # "": no pair at all, its count is 0
        if counts[best] < 2:
            break
        words = [word.replace(best, chr(256 + len(merges))) for word in words]
        merges.append((ord(best[0]), ord(best[1])))
    return merges


# Q: Why is the fast trainer fast?
# A: 1. Equal pieces are handled once: nine tenths of Tiny Shakespeare are 236,000 pieces, but only 14,000 different.
#    2. A merge changes only words that contain the pair, and there only the pair's neighbors: an index says which
#    words, and counts are corrected, not redone. 3. The most frequent pair comes from a heap, not from a full search.
def train_bpe(text, vocab_size, pattern="gpt4"):
    """The same merges as train_slow, far faster."""
    pieces = Counter(split(text, pattern))
    words = [piece.encode().decode("latin-1") for piece in pieces]
    weights = list(pieces.values())  # how often the text has each word
    counts, where = defaultdict(int), defaultdict(set)  # pair -> how often in the text; pair -> which words hold it
    for i, word in enumerate(words):
        for pair in pairs(word):
            counts[pair] += weights[i]
            where[pair].add(i)
    # heapq pops the smallest entry: the largest count and, among equals, the smallest pair. That is the rule for ties.
    heap = sorted((-count, pair) for pair, count in counts.items())  # a sorted list is a heap
    merges = []
    while heap and 256 + len(merges) < vocab_size:
        count, pair = heapq.heappop(heap)
        # A count that fell since it was pushed left its entry too high in the heap. Such an entry is put back at its
        # true place when it surfaces, and not before: most of them never do.
        if -count != counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if count > -2:  # the same early stop as in train_slow
            break
        new, grown = chr(256 + len(merges)), set()
        merges.append((ord(pair[0]), ord(pair[1])))
        for i in where.pop(pair):
            parts = words[i].split(pair)
            words[i] = new.join(parts)
            # Only pairs next to a replacement change. So shorten the parts between to their ends ("abcde" -> "ae"),
            # subtract all pairs from before and add those from after: what did not change cancels out. Without this, a
            # word of 300,000 letters would be counted from end to end for every merge.
            short = [part[:1] + part[-1:] for part in parts]
            for gone in pairs(pair.join(short)):
                counts[gone] -= weights[i]
            for came in pairs(new.join(short)):
                counts[came] += weights[i]
                if new in came:  # only pairs with the new token can have become more frequent
                    where[came].add(i)
                    grown.add(came)
        for came in grown:
            heapq.heappush(heap, (-counts[came], came))
    return merges


class BPE:
    """A byte-level tokenizer: merges, the pattern they were learned under, special tokens {text: id}.

    byte_order[i] is the byte with the id i; None means i itself (GPT-2 shuffled them, see read_gpt2).
    token_bytes: {id: bytes}. n_vocab: one more than the largest id.
    """

    def __init__(self, merges, pattern="gpt4", special_tokens=None, byte_order=None):
        self.merges, self.pattern, self.special_tokens = list(map(tuple, merges)), pattern, dict(special_tokens or {})
        self.byte_order = list(byte_order or range(256))
        self.to_id = {b: i for i, b in enumerate(self.byte_order)}
        self.token_bytes = {i: bytes([b]) for i, b in enumerate(self.byte_order)}
        # Pair, as two characters, -> id. Ids are given in the order of learning, so the id is also the rank of a merge.
        self.ranks, self.cache = {}, {}
        for i, (left, right) in enumerate(merges, 256):
            self.token_bytes[i] = self.token_bytes[left] + self.token_bytes[right]
            self.ranks[chr(left) + chr(right)] = i
        self.token_bytes |= {i: text.encode() for text, i in self.special_tokens.items()}
        self.n_vocab = max(self.token_bytes) + 1

    def encode_piece(self, piece):
        """One piece -> ids."""
        word = piece.encode().decode("latin-1").translate(self.to_id)
        # The definition: do to this text what training did to its own, every merge, in the order they were learned. It
        # takes n_vocab replacements, so only long pieces go this way.
        # Trap: the loop below for all pieces. A user who sends 25,000 letters without a space keeps a server busy.
        if len(word) > 500:
            for pair, new in self.ranks.items():
                word = word.replace(pair, chr(new))
        # The same for a short word: of the pairs that are there, merge the one that was learned first, until none is
        # left. A merge makes pairs with the new token only, which were learned later, so ranks only rise.
        while found := [pair for pair in pairs(word) if pair in self.ranks]:
            first = min(found, key=self.ranks.get)
            word = word.replace(first, chr(self.ranks[first]))
        return [ord(character) for character in word]

    def encode_ordinary(self, text):
        """Text -> ids; special tokens in it are text like any other. For everything that a user typed."""
        ids = []
        for piece in split(text, self.pattern):
            if piece not in self.cache:  # nine pieces in ten are known already (a server would limit this cache)
                self.cache[piece] = self.encode_piece(piece)
            ids += self.cache[piece]
        return ids

    def encode(self, text):
        """Text -> ids; special tokens in it become their ids. For templates that you wrote yourself."""
        # Trap: encoding user text with special tokens on. Whoever types <|endoftext|> then ends the document, or opens
        # a turn in the system's name: the SQL injection of language models.
        # Longest first: otherwise "<|end|>" would win inside "<|end|>of". "(?!)" matches nothing.
        names = sorted(self.special_tokens, key=len, reverse=True)
        # The parentheses make re.split keep the separators: "a<|x|>b" -> "a", "<|x|>", "b".
        parts = re.split("(" + ("|".join(map(re.escape, names)) or "(?!)") + ")", text)
        return [i for part in parts for i in
                ([self.special_tokens[part]] if part in self.special_tokens else self.encode_ordinary(part))]

    # Decoding needs no merges and no pattern, only the bytes of each id. It is many to one: "low" can be written as
    # l,o,w or lo,w or low, all decode alike, and a model that writes l,o,w makes ids that encode() never would.
    def decode(self, ids):
        """ids -> text. Bytes that are not valid UTF-8 (a slice that cuts a character in two) become U+FFFD."""
        # Trap: decoding token by token and joining the texts; "é" can be two tokens, and comes out as two U+FFFD.
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write everything as JSON. The merges say it all: tokens follow from them."""
        state = {name: getattr(self, name) for name in ("merges", "pattern", "special_tokens", "byte_order")}
        Path(path).write_text(json.dumps(state), encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read what save() wrote. Raises OSError or ValueError if it is something else."""
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.keys() != {"merges", "pattern", "special_tokens", "byte_order"}:
            raise ValueError(f"{path} is not a tokenizer.json of {Path(__file__).name}")
        return cls(**state)

    def to_tiktoken(self):
        """-> a tiktoken.Encoding in Rust with the same ids."""
        import tiktoken
        # tiktoken keeps bytes -> rank and no pairs: it merges any two neighbors whose bytes together are a token. Two
        # merges that give the same bytes ("ab"+"c" and "a"+"bc") are one entry there.
        ranks = {self.token_bytes[i]: i for i in range(256 + len(self.merges))}
        assert len(ranks) == 256 + len(self.merges), "two merges make the same bytes"
        return tiktoken.Encoding("bpe", pat_str=PATTERNS[self.pattern], mergeable_ranks=ranks,
                                 special_tokens=self.special_tokens)


def read_gpt2(path):
    """GPT-2's vocab.bpe -> BPE with the published ids (bytes 0..255, merges 256..50255, <|endoftext|> 50256)."""
    # The file is meant to be looked at, so each byte is written as a character that prints. Bytes that print stand for
    # themselves; the other 68 are moved up behind 255 in order. The space is the 33rd of them: hence "Ġ" = chr(288).
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in printable]
    # This is also the order of the first 256 ids: "!" is 0, and the byte 0 is 188. Trap: taking the id for the byte.
    ids = {chr(b): i for i, b in enumerate(printable)} | {chr(256 + i): 188 + i for i in range(68)}
    merges = []
    for line in Path(path).read_text(encoding="utf-8").splitlines()[1:]:  # the first line is a version
        left, right = line.split()
        merges.append((ids[left], ids[right]))
        ids[left + right] = 255 + len(merges)
    return BPE(merges, "gpt2", {"<|endoftext|>": 256 + len(merges)}, printable + hidden)


# --- 4. Data: real text ----------------------------------------------------------------------------------------------
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


# --- 8. Main: watch it learn, then look where it hurts ---------------------------------------------------------------
# Q: Why are language models bad at spelling and at sums?
# A: They see chunks, not letters or digits. " strawberry" is one id of GPT-2 (41236), its three r's are never seen;
#    GPT-2 cuts 1234 as 12|34 and 12345 as 123|45, so the same place value is in a different token each time.
# Trap: a prompt that ends in a space. " Paris" is one token with its space in front; after "in " the model has to start
# with a bare "Paris", which it rarely saw there. Symptom: worse answers from a prompt that looks the same. Strip it.
#
# Q: Why does the same sentence cost more in Hindi than in English?
# A: Twice over. UTF-8 needs three bytes for a Hindi letter and one for an English one, and merges learned on English
#    hardly apply. You pay per token, and the context fills several times faster.
TRICKY = ("I'll say: DON'T!", "7 77 777 7777 77777", "hello Hello HELLO", "a b  c   d", "She lives in ", "मनुष्य")


def show_tokens(bpe, text):
    """'The|_un|happ|iest': the tokens of a text, spaces as _, bytes that are no text alone as \\xe4."""
    tokens = (bpe.token_bytes[i].decode(errors="backslashreplace") for i in bpe.encode_ordinary(text))
    return "|".join(tokens).replace(" ", "_").replace("\n", "\\n")


def draw_sizes(path, table):
    """What a larger vocabulary buys. The gap between the curves is what was learned by heart."""
    from matplotlib.figure import Figure
    ax = (figure := Figure(layout="tight")).add_subplot(xlabel="vocabulary size", ylabel="bytes per token")
    sizes, seen, held_out = zip(*table, strict=True)
    ax.plot(sizes, seen, "o-", label="text it was trained on")
    ax.plot(sizes, held_out, "o-", label="held-out text")
    ax.set_xscale("log", base=2)
    ax.legend(title="What a larger vocabulary buys")
    figure.savefig(path)


def main(cfg):
    """Train on real text and show what was learned; with --load only show a sentence. -> BPE"""
    if cfg.load:
        bpe = read_gpt2(cfg.load) if cfg.load.endswith(".bpe") else BPE.load(cfg.load)
        print(f"{show_tokens(bpe, cfg.sentence)}\n{bpe.encode_ordinary(cfg.sentence)}")
        return bpe
    text, name = load_text(cfg.data)
    if len(text) < 20 or cfg.pattern not in PATTERNS or cfg.vocab_size < 256:
        raise ValueError("needs 20 characters of text, a pattern (gpt2 or gpt4), and a vocab_size of at least 256")
    # Compression on the training text itself would flatter.
    learn, held_out = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
    began = time.perf_counter()
    merges = train_bpe(learn, cfg.vocab_size, cfg.pattern)
    seconds = time.perf_counter() - began
    print(f"{name}, {len(text.encode()):,} bytes: {len(merges):,} merges in {seconds:.1f} s")
    bpe = BPE(merges, cfg.pattern, {"<|endoftext|>": 256 + len(merges)})

    # 1. The merges. First letters that follow each other, then syllables, then the words of this text. The parts of a
    # token are always learned earlier: a merge can only join tokens that exist.
    for i in [i for i in (0, 1, 2, 3, 4, 9, 19, 49, 99, 199, 499, 999, 1499, 1999, 2999, 9999) if i < len(merges)]:
        new, left, right = (bpe.token_bytes[token].decode(errors="replace") for token in (256 + i, *merges[i]))
        print(f"{i + 1:7,d}  {left!r:10} + {right!r:10} -> {new!r}")

    # 2. Does it do what it says? Text must survive the round trip, and a quite different implementation must agree.
    # Trap: testing the round trip only. Any wrong order of merges passes it, since the bytes come back all the same;
    # the ids are others, and a model trained on the right ones reads them as noise.
    ids = bpe.encode_ordinary(text)
    print(f"decode(encode(text)) == text: {bpe.decode(ids) == text}; "
          f"tiktoken, given our merges, finds the same ids: {bpe.to_tiktoken().encode_ordinary(text) == ids}\n")

    # 3. The first k merges of a training are the training for k merges.
    # Q: A larger vocabulary: what is gained, what is lost?
    # A: Gained: fewer tokens, so cheaper steps and a longer reach. Lost: each token is seen less often, and embedding
    #    and head grow with V: at width 768, each by 0.8 million parameters per 1,000 tokens (once if tied).
    table = []
    for size in sorted({*(2 ** k for k in range(8, 16) if 2 ** k < bpe.n_vocab), 256 + len(merges)}):
        one = BPE(merges[:size - 256], cfg.pattern)
        table.append((size, *(len(part.encode()) / len(one.encode_ordinary(part)) for part in (learn, held_out))))
        print(f"{size:,} tokens, {table[-1][2]:.2f} bytes per held-out token\n{show_tokens(one, cfg.sentence)}\n")

    # 4. Where it hurts. Left: what the pattern does before any merge; merges never cross these bars. Right: the tokens.
    for line in TRICKY:
        print(f"  {'|'.join(split(line, cfg.pattern))!r:28} {show_tokens(bpe, line)}")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    bpe.save(out / "tokenizer.json")
    draw_sizes(out / "bytes_per_token.png", table)
    results = dict(train_seconds=seconds, bytes_per_token={size: held_out for size, _, held_out in table})
    (out / "summary.json").write_text(json.dumps(dict(config=dataclasses.asdict(cfg), results=results)))
    print(f'\nNext: "{sys.executable}" "{__file__}" --load "{out / "tokenizer.json"}" --sentence "Try this one."')
    return bpe


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
