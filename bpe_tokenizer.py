# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "regex>=2023.12", "requests>=2.31", "tiktoken>=0.7", "tqdm>=4.66"]
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
         "low lower" -> "low", " lower" -> l o w, _ l o w e r -> lo w -> low ...
Not here WordPiece, SentencePiece and its unigram model, normalisation (NFC): BPE on bytes needs none
Expect   3,840 merges on Tiny Shakespeare in 0.4 s, 3.24 bytes per token on held-out text with 4,096 tokens
         (results/bpe_tokenizer.json)
Asked    Why bytes and not characters?   Why split before merging?   Why is a model bad at spelling and sums?
         Why is the fast trainer fast?   Larger vocabulary: what is gained, what is lost?   (grep "# Q:")
"""
import argparse
import dataclasses
import hashlib
import heapq
import inspect
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


# --- 1. Config: what to learn from, how many tokens ------------------------------------------------------------------
# Sections have the same numbers in all scripts; this one has no use for the others.
@dataclass
class Config:
    """All settings. Raises ValueError for impossible values."""

    data: str = "auto"               # auto | shakespeare | pydocs | path of a UTF-8 text file
    vocab_size: int = 4096           # tokens to end with: 256 bytes, the rest is learned
    pattern: str = "gpt4"            # how to split before merging: gpt2 | gpt4 | llama3
    sentence: str = "The unhappiest of 1024 tokenizers: naïve, isn't it?"  # shown under several vocabularies
    load: str = ""                   # tokenizer.json of an earlier run: show --sentence under it, train nothing
    out: str = "runs/bpe_tokenizer"  # folder for tokenizer.json, summary.json and the picture

    def __post_init__(self):
        if self.vocab_size < 256:
            raise ValueError(f"vocab_size must be at least 256, one for each byte, not {self.vocab_size}")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be {', '.join(PATTERNS)}, not {self.pattern!r}")


PRESETS = {"default": {}, "small": dict(vocab_size=512), "large": dict(vocab_size=16384)}


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


# --- 2. Model: from the definition to the fast form ------------------------------------------------------------------
# Q: Why bytes and not characters?
# A: There are 155,000 characters (Unicode 16) and 256 bytes. A vocabulary of characters is either huge or has an <unk>
#    for what it left out, and <unk> (one id for everything unknown) cannot be turned back into text. With bytes
#    decode(encode(text)) == text for every text.
#
# Q: Why split before merging?
# A: Without it "dog." "dog!" "dog?" and "dog " would all become tokens of their own: the most frequent neighbours are a
#    word's end and what follows it. The pattern cuts text into pieces (a word with its space, up to three digits, a run
#    of punctuation), and merges stay inside a piece.
#
# A space belongs to the word BEHIND it: " the" is one piece. Text is then a plain concatenation, with no rule for where
# spaces go. ++ and ?+ are possessive: take all and never give back. They change nothing here but speed.
# Read the patterns as alternatives, first match wins (\p{L} letter, \p{N} digit, \s white space):
#     '(?:[sdmt]|ll|ve|re)       's 'd 'm 't 'll 've 're
#      ?\p{L}++ and  ?\p{N}++    letters; digits; each with at most one space before
#      ?[^\s\p{L}\p{N}]++        signs, with at most one space before
#     \s++$                      white space that ends the text
#     \s+(?!\S)                  white space but its last, which is left for the word after it: "a  b" -> "a" " " " b"
#     \s                         what is left, such as a single line end before a word
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-4 (cl100k): contractions in capitals too; digits in groups of at most 3, so "1234567" is cut 123|456|7 and there
# are only 1,110 kinds of digit pieces; a sign may lead a word as a space does ("(word"); line ends get their own
# pieces.
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
                r"|\s*[\r\n]|\s+(?!\S)|\s")
# Llama 3 took GPT-4's pattern in its older spelling. The pieces are the same, but for white space at the very end of a
# text, which \s++$ above keeps whole.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "llama3": LLAMA3_PATTERN}


def split(text, pattern):
    """-> the pieces of a text, which concatenate to the text. split("I'll go", GPT4_PATTERN) == ["I", "'ll", " go"]."""
    import regex  # the standard library's re knows no \p{L} ("any letter of any script")
    return regex.findall(pattern, text)


def replace_pair(ids, pair, new):
    """[1, 2, 3, 1, 2] with pair (1, 2) -> [new, 3, new]. Left to right: [1, 1, 1] with (1, 1) -> [new, 1]."""
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


# The algorithm on four words, "low low lower slow" (pieces: low, _low, _lower, _slow; _ is the space):
#     counts   (l,o) 4   (o,w) 4   (_,l) 2   (w,e) 1 ...     a tie: (l,o) is smaller, since l = 108 and o = 111
#     merge 1  l + o -> lo         lo w    _ lo w    _ lo w e r    _ s lo w
#     merge 2  lo + w -> low       low     _ low     _ low e r     _ s low
#     merge 3  _ + low -> _low     low     _low      _low e r      _ s low      and no pair occurs twice any more
def train_slow(text, vocab_size, pattern=GPT4_PATTERN):
    """The definition. -> merges, a list of pairs of ids: bytes are the ids 0..255, the i-th merge makes the id 256 + i.

    Counts are over the whole text; in "aaa" the pair (a, a) counts twice, though only one of them can be replaced.
    Tie rule: of equally frequent pairs the smallest (id, id) wins. Stops early when no pair occurs twice: a merge of
    something unique would learn that one text by heart. Raises ValueError for a vocabulary below 256.
    """
    # Trap: comparing two trainers without fixing the tie rule. In the first nine tenths of Tiny Shakespeare the first
    # tie is at merge 139, and from then on every later merge may differ: same quality, other ids.
    if vocab_size < 256:
        raise ValueError(f"a vocabulary of {vocab_size} does not hold the 256 bytes")
    pieces, merges = [list(piece.encode()) for piece in split(text, pattern)], []
    while 256 + len(merges) < vocab_size:
        # This line is the cost: it visits the whole text for every merge.
        counts = Counter(pair for ids in pieces for pair in zip(ids, ids[1:], strict=False))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        pieces = [replace_pair(ids, best, 256 + len(merges)) for ids in pieces]
        merges.append(best)
    return merges


def train_bpe(text, vocab_size, pattern=GPT4_PATTERN, on_merge=None):
    """The same merges as train_slow, far faster. on_merge(index, pair, token bytes, count) watches."""
    if vocab_size < 256:
        raise ValueError(f"a vocabulary of {vocab_size} does not hold the 256 bytes")
    # Q: Why is the fast trainer fast?
    # A: 1. Equal pieces are handled once: nine tenths of Tiny Shakespeare are 236,000 pieces, but only 14,000 different
    #    ones. 2. A merge changes only pieces that contain the pair; an index says which, and counts are corrected, not
    #    redone. 3. The most frequent pair comes from a heap instead of a search through all pairs.
    pieces = Counter(split(text, pattern))
    # The fourth reason: a token id is written as the character chr(id), a piece as a string, a pair as two characters.
    # Replacing a pair is then str.replace, at the speed of C and left to right, and comparing strings compares ids.
    words = [piece.encode().decode("latin-1") for piece in pieces]  # latin-1: the byte b becomes the character chr(b)
    weights = list(pieces.values())
    counts, where = defaultdict(int), defaultdict(set)  # pair -> how often in the text; pair -> which words hold it
    # "low" -> zip("low", "ow") -> "lo", "ow": all neighbours of a word. weights[i]: how often the text has the word.
    for i, word in enumerate(words):
        for pair in map("".join, zip(word, word[1:], strict=False)):
            counts[pair] += weights[i]
            where[pair].add(i)
    # heapq pops the smallest entry: the largest count and, among equals, the smallest pair. That is the tie rule.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    # One round of this loop is one merge. Early merges touch thousands of words, late ones a handful.
    merges, tokens = [], [bytes([b]) for b in range(256)]
    while heap and 256 + len(merges) < vocab_size:
        claimed, pair = heapq.heappop(heap)
        # A count that fell since it was pushed left its entry too high in the heap. Such an entry is put back at its
        # true place when it surfaces, and not before: most of them never do.
        if -claimed != counts[pair]:
            if counts[pair] > 1:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        if claimed > -2:  # fewer than two: the same early stop as in train_slow
            break
        new, grown = chr(256 + len(merges)), set()
        left, right = map(ord, pair)
        merges.append((left, right))
        tokens.append(tokens[left] + tokens[right])
        if on_merge is not None:
            on_merge(len(merges) - 1, merges[-1], tokens[-1], -claimed)
        for i in where.pop(pair):
            before = words[i]
            after = before.replace(pair, new)
            if after == before:  # an earlier merge took the pair out of this word; the index is not cleaned up
                continue
            words[i] = after
            # Take all pairs of the old word out of the counts and put all of the new one in. Words are short: finding
            # out which pairs really changed would cost more than it saves.
            for gone in map("".join, zip(before, before[1:], strict=False)):
                counts[gone] -= weights[i]
            for came in map("".join, zip(after, after[1:], strict=False)):
                counts[came] += weights[i]
                if new in came:  # only pairs with the new token can have become more frequent
                    where[came].add(i)
                    grown.add(came)
        for came in grown:
            heapq.heappush(heap, (-counts[came], came))
    return merges


WALL = "\U0010ffff"  # a character that is no token: vocabularies end long before the id 1,114,111


class BPE:
    """A byte-level tokenizer: merges, the pattern they were learned under, special tokens {text: id}.

    byte_order: 256 bytes, the ids 0..255 in order; None is 0, 1, 2 ... (GPT-2 shuffled them, see read_gpt2).
    token_bytes: {id: bytes}. n_vocab: one more than the largest id.
    """

    def __init__(self, merges, pattern=GPT4_PATTERN, special_tokens=None, byte_order=None):
        self.merges, self.pattern, self.special_tokens = [tuple(m) for m in merges], pattern, dict(special_tokens or {})
        self.byte_order = bytes(byte_order or range(256))
        # bytes.translate wants, for each byte, the byte to write instead: the inverse of byte_order
        self.to_id = bytes(self.byte_order.index(b) for b in range(256))
        self.token_bytes = {i: bytes([b]) for i, b in enumerate(self.byte_order)}
        for i, (left, right) in enumerate(self.merges, 256):
            self.token_bytes[i] = self.token_bytes[left] + self.token_bytes[right]
        self.token_bytes |= {i: text.encode() for text, i in self.special_tokens.items()}
        self.n_vocab = max(self.token_bytes) + 1
        # Pair of ids -> id of the merged token. Ids are given in the order of learning, so the id is also the rank.
        self.ranks = {pair: i for i, pair in enumerate(self.merges, 256)}
        self.cache = {}

    def encode_slow(self, text):
        """The definition: do to this text what training did to its own, every merge, in the order they were learned."""
        # All pieces at once, held apart by a character that is no token, so that one replace serves the whole text.
        word = WALL.join(piece.encode().translate(self.to_id).decode("latin-1") for piece in split(text, self.pattern))
        for (left, right), new in self.ranks.items():
            word = word.replace(chr(left) + chr(right), chr(new))  # ids as characters, as in train_bpe()
        return [ord(c) for c in word if c != WALL]

    def encode_piece(self, piece):
        """One piece -> ids, in n log n steps: the lowest-ranked pair merges, leftmost first, until none is left."""
        # Why this gives what replaying all merges gives: a merge makes pairs with the new token only, and those were
        # learned later, so they have higher ranks. The lowest rank present never goes back.
        ids = list(piece.encode().translate(self.to_id))
        # A linked list: merging i with its right neighbour makes that one disappear without moving all behind it.
        #     ids 10 11 12, merge 0 with 1:  ids 20 None 12   right[0] = 2   left[2] = 0. None: swallowed.
        right, left = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap = [(self.ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:], strict=False)) if pair in self.ranks]
        heapq.heapify(heap)
        while heap:
            new, i = heapq.heappop(heap)
            j = right[i]
            # The entry is stale if one of the two has merged with somebody else since it was written.
            if ids[i] is None or j == len(ids) or self.ranks.get((ids[i], ids[j])) != new:
                continue
            ids[i], ids[j], right[i] = new, None, right[j]
            if right[j] < len(ids):
                left[right[j]] = i
            # Two pairs are new: with the neighbour on the left and with the one on the right.
            for a, b in ((left[i], i), (i, right[i])):
                if a >= 0 and b < len(ids) and (ids[a], ids[b]) in self.ranks:
                    heapq.heappush(heap, (self.ranks[ids[a], ids[b]], a))
        # Trap: searching the whole piece for its best pair after every merge. Words are short and nobody notices; a
        # user who sends 25,000 letters without a space keeps such a server busy.
        return [i for i in ids if i is not None]

    def encode_ordinary(self, text):
        """Text -> ids; special tokens in it are text like any other. For everything that a user typed."""
        ids = []
        for piece in split(text, self.pattern):
            if piece not in self.cache:  # language repeats itself: nine pieces in ten are known already
                self.cache[piece] = self.encode_piece(piece)
            ids += self.cache[piece]
        return ids

    def encode(self, text):
        """Text -> ids; special tokens in it become their ids. For templates that you wrote yourself."""
        # Trap: encoding user text with special tokens on. Whoever types <|endoftext|> then ends the document, or opens
        # a turn in the system's name: the SQL injection of language models.
        if not self.special_tokens:
            return self.encode_ordinary(text)
        # Longest first: otherwise "<|end|>" would win inside "<|end|>of".
        names = sorted(self.special_tokens, key=len, reverse=True)
        # The brackets make re.split keep the separators: "a<|x|>b" -> "a", "<|x|>", "b".
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return [i for part in parts for i in
                ([self.special_tokens[part]] if part in self.special_tokens else self.encode_ordinary(part))]

    # Decoding needs no merges and no pattern, only the bytes of each id. It is many to one: "low" can be written as
    # l,o,w or lo,w or low, all decode alike, and a model that writes l,o,w makes ids that encode() never would.
    def decode_bytes(self, ids):
        """ids -> bytes, exactly."""
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids):
        """ids -> text. Bytes that are not valid UTF-8 (a slice that cuts a character in two) become U+FFFD."""
        # Trap: decoding token by token and joining the texts; "é" can be two tokens, and comes out as two U+FFFD.
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write everything as JSON. The merges say it all: tokens follow from them."""
        state = {"merges": self.merges, "pattern": self.pattern, "special_tokens": self.special_tokens,
                 "byte_order": list(self.byte_order)}
        write_atomically(path, lambda file: file.write(json.dumps(state).encode()))

    @classmethod
    def load(cls, path):
        """Read what save() wrote. Raises OSError, ValueError, KeyError or TypeError if it is something else."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def to_tiktoken(self, name="ours"):
        """-> a tiktoken.Encoding in Rust with the same ids, for merges that were trained (hand-made ones may differ).

        Raises ValueError when two merges make the same bytes.
        """
        import tiktoken

        # tiktoken keeps bytes -> rank and no pairs: it merges any two neighbours whose bytes together are a token. Two
        # merges that give the same bytes ("ab"+"c" and "a"+"bc") are one entry there.
        ranks = {self.token_bytes[i]: i for i in range(256 + len(self.merges))}
        if len(ranks) < 256 + len(self.merges):
            raise ValueError("two merges make the same bytes; tiktoken cannot tell them apart")
        return tiktoken.Encoding(name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens)


# --- 4. Data: real text ----------------------------------------------------------------------------------------------
# A file that is fetched is named with its SHA-256. A download that broke off, a proxy's error page or a silently edited
# copy would train just as well, and the number at the end would mean something else.
SHAKESPEARE = ("tinyshakespeare.txt",
               "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def sha256_of(path):
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(filename, url, sha256="", login=None):
    """-> Path of a file from $LLM_DATA, ./data, or else downloaded to ./data. Raises OSError when it cannot be had.

    A broken download continues where it stopped; only a complete file (with the right SHA-256, where it is known) gets
    the name. login: headers that open a door, {"Authorization": "Bearer ..."}.
    """
    import requests
    for folder in (os.environ.get("LLM_DATA"), "data"):
        path = Path(folder or "data") / filename
        if path.is_file():
            if sha256 and sha256_of(path) != sha256:
                raise OSError(f"{path} is not the expected file (SHA-256 differs); delete it to fetch it again")
            return path
    # path is now ./data/filename. Bytes arrive under another name, so a half file is never taken for a whole one.
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if sha256 and part.exists() else 0  # without a hash nobody could tell if the ends fit
    # identity: sizes and ranges are those of the file and not of a compressed form of it.
    headers = {"Accept-Encoding": "identity", **(login or {})} | ({"Range": f"bytes={have}-"} if have else {})
    # Two timeouts: 3 s to get a connection (an offline laptop should not hang), 30 s between two pieces of data.
    with requests.get(url, stream=True, timeout=(3, 30), headers=headers) as answer:
        if answer.status_code != 416:  # 416: nothing lies behind what we have, so we have it all
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0  # 200: the server ignored the range and sends everything
            size = have + int(answer.headers.get("Content-Length", 0))
            with (open(part, "ab" if have else "wb") as file,
                  tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=filename) as bar):
                for piece in answer.iter_content(1 << 16):
                    bar.update(file.write(piece))
            if size > have and part.stat().st_size != size:
                raise OSError(f"{url}: the download broke off")
    if sha256 and sha256_of(part) != sha256:
        part.unlink()
        raise OSError(f"{url}: the download is damaged (SHA-256 differs); it was removed")
    os.replace(part, path)
    return path


def load_text(name):
    """-> (text, its real name, one line about it). name: auto, shakespeare, pydocs, or a path of a UTF-8 file.

    auto = Tiny Shakespeare if it is there or can be fetched, else pydocs: the help texts that ship with every Python,
    real English that needs no network. A set named outright that cannot be had ends the program with one line.
    """
    if name in ("auto", "shakespeare"):
        try:
            path = fetch(*SHAKESPEARE)
            return path.read_text(encoding="utf-8"), "shakespeare", f"Tiny Shakespeare ({path})"
        except OSError as problem:  # requests' own exceptions are OSErrors too
            if name == "shakespeare":
                sys.exit(f"error: --data shakespeare: {problem}")
            print(f"Tiny Shakespeare cannot be had: taking Python's own help texts instead. ({str(problem)[:90]} ...)")
    if name in ("auto", "pydocs"):
        from pydoc_data.topics import topics
        return "\n\n".join(topics[key] for key in sorted(topics)), "pydocs", "Python's own help texts (pydoc_data)"
    try:
        return Path(name).read_text(encoding="utf-8"), name, f"the file {name}"
    except (OSError, UnicodeDecodeError) as problem:
        sys.exit(f"error: --data {name}: no such set, and no readable UTF-8 file ({problem})")


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


# --- 7. Interchange: GPT-2's merges in, tiktoken out -----------------------------------------------------------------
def read_gpt2(path):
    """GPT-2's vocab.bpe -> BPE with the published ids (bytes 0..255, merges 256..50255, <|endoftext|> 50256)."""
    # The file is meant to be looked at, so each byte is written as a character that prints. Bytes that print stand for
    # themselves; the other 68 are moved up behind 255 in order. The space is the 33rd of them: hence "Ġ" = chr(288).
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in printable]
    # This is also the order of the first 256 ids: "!" is 0, and the byte 0 is 188. Trap: taking the id for the byte.
    byte_order = printable + hidden
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]
    ids, merges = {c: i for i, c in enumerate(characters)}, []
    for line in Path(path).read_text(encoding="utf-8").splitlines()[1:]:  # the first line is a version
        left, right = line.split()
        merges.append((ids[left], ids[right]))
        ids[left + right] = 255 + len(merges)
    return BPE(merges, GPT2_PATTERN, {"<|endoftext|>": 256 + len(merges)}, byte_order)


def gpt2_file():
    """-> Path of vocab.bpe in tiktoken's cache, fetched by tiktoken if it is not there. None if it cannot be had."""
    import tempfile

    import tiktoken
    try:
        tiktoken.get_encoding("gpt2")
    except OSError:
        return None
    # tiktoken names its files after the SHA-1 of the address they came from.
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    path = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache") / hashlib.sha1(url.encode()).hexdigest()
    return path if path.is_file() else None  # an empty $TIKTOKEN_CACHE_DIR means: keep no cache


# --- 8. Main: watch it learn, then look where it hurts ---------------------------------------------------------------
TRICKY = ("I'll say: DON'T!", "in 1984, 1234567", "x = [1,2];\n\n    return x", "two  spaces ", "naïve 你好 🙂")

# Article 1 of the Universal Declaration of Human Rights: what a tokenizer charges for a language it saw little of.
# Q: Why does the same sentence cost more in Hindi than in English?
# A: Twice over. UTF-8 needs 106 bytes for its 40 characters (English 41 for 41), and merges learned on English hardly
#    apply. You pay per token, and the context fills seven times faster.
LANGUAGES = {"English": "All human beings are born free and equal.",
             "German": "Alle Menschen sind frei und gleich geboren.",
             "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι.",
             "Hindi": "सभी मनुष्य जन्म से स्वतंत्र और समान हैं।",
             "Chinese": "人人生而自由,一律平等。"}


def show_tokens(bpe, text):
    """'The|_un|happ|iest': the tokens of a text, spaces as _, bytes that are no text alone as <e4>."""
    def readable(token):
        try:
            return token.decode().replace(" ", "_").replace("\n", "\\n")
        except UnicodeDecodeError:
            return "".join(f"<{b:02x}>" for b in token)
    return "|".join(readable(bpe.token_bytes[i]) for i in bpe.encode_ordinary(text))


def bytes_per_token(bpe, text):
    """How much text a token stands for on average: the compression, and how far a context of T tokens reaches."""
    # At 3.2 bytes per token a context of 64 holds about 200 characters: six lines of verse instead of two.
    return len(text.encode()) / len(bpe.encode_ordinary(text))


def draw_vocabularies(path, sizes, seen, held_out, sentences):
    """Left: bytes per token against vocabulary size. Right: a sentence cut by each vocabulary {name: [token text]}."""
    import matplotlib
    matplotlib.use("Agg")  # draws into files; no window, so it works on a server
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 4), dpi=120, width_ratios=(2, 3))
    left.plot(sizes, seen, "o-", ms=4, color="tab:gray", label="text it was trained on")
    left.plot(sizes, held_out, "o-", ms=4, color="tab:blue", label="held-out text")
    left.set(xscale="log", xlabel="vocabulary size", ylabel="bytes per token", title="What a larger vocabulary buys")
    left.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
    left.minorticks_off()
    left.legend()
    # One box per token, side by side, in two shades. A monospaced letter of this size is 0.0165 of the width.
    letter = min(0.0165, 1 / max(1, *(sum(map(len, tokens)) for tokens in sentences.values())))
    right.set(xlim=(0, 1), ylim=(len(sentences), 0), title="The same sentence, token by token")
    right.axis("off")
    for row, (name, tokens) in enumerate(sentences.items()):
        right.text(0, row + 0.2, f"{name}: {len(tokens)} tokens", fontsize=9, va="center")
        x = 0.0
        for i, token in enumerate(tokens):
            width = letter * max(1, len(token))
            right.add_patch(plt.Rectangle((x, row + 0.38), width, 0.42, color=("#cfe2f3", "#f9e2c4")[i % 2]))
            right.text(x + width / 2, row + 0.6, token, fontsize=8, family="monospace", ha="center", va="center")
            x += width
    fig.tight_layout()
    write_atomically(path, lambda file: fig.savefig(file, format="png"))
    plt.close(fig)


def main(cfg):
    """Train on real text and show what was learned; with --load only show a sentence. -> (BPE, cfg)."""
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a letter prints "?" instead of ending the program
        sys.stdout.reconfigure(errors="replace")
    if cfg.load:
        try:
            bpe = BPE.load(cfg.load)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            sys.exit(f"error: --load {cfg.load}: no tokenizer.json of this script ({problem})")
        print(f"{cfg.sentence}\n{show_tokens(bpe, cfg.sentence)}\n{bpe.encode_ordinary(cfg.sentence)}")
        return bpe, cfg
    started, out, pattern = time.perf_counter(), out_folder(cfg), PATTERNS[cfg.pattern]
    text, name, about = load_text(cfg.data)
    cut = int(0.9 * len(text))  # compression on the training text itself would flatter
    learn, held_out = text[:cut], text[cut:]
    if not learn:
        sys.exit(f"error: --data {cfg.data}: the file is too short")
    print(f"data: {about}, {len(text.encode()):,} bytes; the last tenth is held out\n")

    # A tokenizer is trained once, before the model, and then fixed for ever: embedding row 1234 means token 1234.
    # Changing one merge afterwards renumbers all that follow, and the model reads noise.

    # 1. The merges as they happen. First letters that follow each other, then syllables, then the words of this text.
    # A merge can only join tokens that exist, so the parts of a token always stand higher in this list.
    print("merge   new token       from                    occurs")

    def watch(index, pair, token, count):
        # every merge at first, then ever fewer: 1 2 3 ... 10, 20 ... 100, 200 ...
        if (index + 1) % 10 ** max(0, int(math.log10(index + 1))) == 0:
            left, right = (repr(tokens[i].decode(errors="replace")) for i in pair)
            print(f"{index + 1:5d}   {token.decode(errors='replace')!r:15} {left + ' + ' + right:23} {count:6,d}")
        tokens.append(token)
    tokens = [bytes([b]) for b in range(256)]
    began = time.perf_counter()
    merges = train_bpe(learn, cfg.vocab_size, pattern, watch)
    seconds = time.perf_counter() - began
    bpe = BPE(merges, pattern, {"<|endoftext|>": 256 + len(merges)})
    print(f"{len(merges):,} merges in {seconds:.1f} s"
          + ("" if 256 + len(merges) == cfg.vocab_size else "; it stopped early: no pair is left that occurs twice"))

    # 2. Does it do what it says? Text must survive the round trip, the fast form must equal the definition (the slow
    # one), and a quite different implementation must agree.
    # Trap: testing the round trip only. Any wrong order of merges passes it, since the bytes come back all the same;
    # the ids are others, and a model trained on the right ones reads them as noise.
    sample = held_out[:100_000]
    fast = bpe.encode_ordinary(sample)
    encoding = bpe.to_tiktoken()
    began = time.perf_counter()
    theirs = encoding.encode_ordinary(text)
    rate = len(text.encode()) / (time.perf_counter() - began) / 1e6
    for what, same in (("decode(encode(text)) == text", bpe.decode(fast) == sample),
                       ("fast encode == the definition", fast == bpe.encode_slow(sample)),
                       (f"tiktoken with our merges, {rate:.0f} MB/s, == ours", theirs == bpe.encode_ordinary(text))):
        print(f"  {'yes' if same else 'NO '}  {what}")

    # 3. What the pattern does before any merge. GPT-2 keeps any run of digits in one piece, so how a number is cut
    # depends on which ones were frequent; GPT-4 never takes more than three. In code GPT-4 keeps line ends in one piece
    # with the sign before them. Llama 3 cuts these lines as GPT-4 does.
    print("\nPieces: merges never cross the bars")
    for line in TRICKY:
        for label, one in PATTERNS.items():
            pieces = "|".join(split(line, one)).replace("\n", "\\n").replace(" ", "_")
            print(f"  {label:6} {pieces}")

    # 4. One sentence under growing vocabularies. The first k merges of a training are the training for k merges.
    print(f"\n{cfg.sentence}")
    known = {f"{size:,}": BPE(merges[:size - 256], pattern) for size in (256, 512, 4096) if size - 256 <= len(merges)}
    known.setdefault(f"{256 + len(merges):,}", bpe)
    if (file := gpt2_file()) is not None:
        known["GPT-2's 50,257"] = read_gpt2(file)
    else:
        print("  (GPT-2's vocabulary is neither in $TIKTOKEN_CACHE_DIR nor to be fetched: its rows are left out)")
    for label, one in known.items():
        print(f"  {label:>15} {len(one.encode_ordinary(cfg.sentence)):3d} tokens   {show_tokens(one, cfg.sentence)}")

    # Q: A larger vocabulary: what is gained, what is lost?
    # A: Gained: 3.2 times fewer tokens than bytes at 4,096, so cheaper steps and a longer reach. Lost: each token is
    #    seen less often, and embedding and head grow with V: at width 768, 0.8 million parameters per 1,000 tokens.
    sizes = [size for size in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768) if size - 256 < len(merges)]
    sizes.append(256 + len(merges))
    smaller = [BPE(merges[:size - 256], pattern) for size in sizes]
    seen, unseen = ([bytes_per_token(one, part) for one in smaller] for part in (learn, held_out))
    print("\nBytes per token on held-out text")
    for size, value in zip(sizes, unseen, strict=True):
        print(f"  {size:7,d} {value:5.2f} {'#' * round(10 * value)}")

    # 5. Where tokenisation hurts.
    # Q: Why are language models bad at spelling and at sums?
    # A: They see chunks, not letters or digits. " strawberry" is one id of GPT-2 (41236), its r's are hearsay; 1234 is
    #    cut as 12|34 and 12345 as 123|45, so the digit that a carry goes to is in another token each time.
    # Trap: a prompt that ends in a space. " 4" is one token with its space in front; after "is " the model has to start
    # with a bare "4", which it rarely saw there. Symptom: worse answers from a prompt that looks the same. Strip it.
    name_of_last, last = list(known.items())[-1]
    print(f"\nWhere it hurts ({name_of_last})")
    for label, line in (("numbers", "7 77 777 7777 77777 777777"), ("one more digit", "1234 12345 123456"),
                        ("case", "hello Hello HELLO"), ("spaces", "a b  c   d"),
                        ("trailing space", "The answer is "), ("rare words", "defenestration")):
        print(f"  {label:15} {show_tokens(last, line)}")
    for label, line in LANGUAGES.items():
        count = len(last.encode_ordinary(line))
        print(f"  {label:15} {count:3d} tokens for {len(line)} characters")

    bpe.save(out / "tokenizer.json")
    cut_up = {label: [one.token_bytes[i].decode(errors="replace").replace(" ", "·") for i in
                      one.encode_ordinary(cfg.sentence)] for label, one in known.items()}
    # In the picture the gap of gray (training text) above blue (held-out text) is what was learned by heart.
    draw_vocabularies(out / "bytes_per_token.png", sizes, seen, unseen, cut_up)
    # bytes per token is the figure to compare tokenizers by, and bits per BYTE the one for models on top of them: loss
    # per token falls when tokens get shorter, with no model being any better.
    results = {"train_seconds": seconds, "merges": len(merges),
               "bytes_per_token": {str(size): value for size, value in zip(sizes, unseen, strict=True)}}
    summary = {"config": dataclasses.asdict(cfg), "seconds": time.perf_counter() - started,
               "figures": ["bytes_per_token.png"],
               "data": {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}, "results": results}
    write_atomically(out / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    # The expectation is printed from the header, where measured runs write it: one place, no second copy to go stale.
    expected = " ".join(re.search(r"^Expect +(.+(?:\n {9}.+)*)", __doc__, re.M)[1].split())
    print(f"\nThe picture is {out}/bytes_per_token.png. Try your own sentence:\n"
          f"  python {Path(__file__).name} --load {out}/tokenizer.json --sentence \"...\"\n"
          f"Next: decoder_only.py --tokenizer gpt2 trains on such tokens.\nExpected: {expected}\n"
          f"Reached:  {len(merges):,} merges in {seconds:.1f} s, {unseen[-1]:.2f} bytes per token on held-out text")
    return bpe, cfg


if __name__ == "__main__":
    main(parse_config(Config, PRESETS))
