"""bpe_tokenizer.py against the definition of byte-pair encoding, against tiktoken, and against GPT-2's own vocabulary.

The oracle recounts every pair of the whole text before every merge, on lists of ids. Rules that it fixes: among equal
counts the smallest pair of ids merges; "aaa" holds (a, a) twice, and one replacement; a pair that occurs once is not
merged; no merge crosses a piece of the split pattern.
"""
import json
import random
import time
import unicodedata
from collections import Counter

import pytest

MIXED = """Straße, naïve café, Ünïcödé wörds. "don't", “don’t”, I'LL, we'Ve Привет, мир! 你好，世界。你好吗？ 안녕
مرحبا 🙂🙃🙂 👩‍👩‍👧‍👦 🇩🇪 e\u0301 nbsp\u00a0here, 𝒳𝒴𝒵 ½ ² Ⅷ 1234567 12 345,67 $9.99
def f(x):\n\tif x == 1:\n\t\treturn   x  # tabs\n\r\n   \n
    y = {"a": [1, 2, 3]}\n\n\n\ttail ...  !!??  --"""


def replaced(ids, pair, new):
    out, i = [], 0
    while i < len(ids):
        match = tuple(ids[i:i + 2]) == pair
        out.append(new if match else ids[i])
        i += 2 if match else 1
    return out


def oracle_train(m, text, vocab_size, pattern="gpt4"):
    pieces, merges = [list(piece.encode()) for piece in m.split(text, pattern)], []
    while 256 + len(merges) < vocab_size:
        counts = Counter(pair for ids in pieces for pair in zip(ids, ids[1:], strict=False))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if counts[best] < 2:
            break
        pieces = [replaced(ids, best, 256 + len(merges)) for ids in pieces]
        merges.append(best)
    return merges


def oracle_encode(m, text, merges, pattern="gpt4"):
    out = []
    for piece in m.split(text, pattern):
        ids = list(piece.encode())
        for i, pair in enumerate(merges):
            ids = replaced(ids, pair, 256 + i)
        out += ids
    return out


def docs(length=20_000):
    from pydoc_data.topics import topics
    return "\n\n".join(topics[key] for key in sorted(topics))[:length]


def random_text(rng, length):
    """Words, spaces and line ends, with characters of any kind between them that every Unicode version knows."""
    parts = ["the", " the", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "12", "3456", "é", "你好", "🙂", "...", "aaaa"]
    odd = [chr(c) for c in rng.sample(range(0x110000), 400) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    return "".join(rng.choice(parts) if rng.random() < 0.85 else rng.choice(odd) for _ in range(length))


@pytest.fixture(scope="module")
def bpe(m):
    return m.BPE(m.train_bpe(docs(60_000) + 3 * MIXED, 600))


# --- training --------------------------------------------------------------------------------------------------------
def test_the_example_in_the_file(m):
    pairs = [(108, 111), (256, 119), (32, 257)]  # l+o, lo+w, _+low
    assert m.train_bpe("low low lower slow", 999) == m.train_slow("low low lower slow", 999) == pairs


@pytest.mark.parametrize("seed", range(6))
def test_training_equals_the_oracle_on_ties_and_runs(m, seed):
    rng = random.Random(seed)
    for _ in range(40):
        alphabet = rng.choice(["a", "ab", "abc", "ab ", "ab c\n", "aé", "a \n\t", "01 a"])
        text = "".join(rng.choice(alphabet) * rng.choice([1, 1, 1, 2, 3, 4, 7]) for _ in range(rng.randrange(80)))
        expected = oracle_train(m, text, 290)
        assert m.train_bpe(text, 290) == m.train_slow(text, 290) == expected


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_training_equals_the_oracle_on_text(m, pattern):
    text = docs() + 3 * MIXED
    assert m.train_bpe(text, 400, pattern) == m.train_slow(text, 400, pattern) == oracle_train(m, text, 400, pattern)
    assert m.train_bpe(text, 330, pattern) == m.train_bpe(text, 400, pattern)[:330 - 256]


def test_a_word_of_300_000_letters_is_quick(m):
    word = "".join(random.Random(0).choices("abcdefgh", k=300_000))
    began = time.perf_counter()
    merges = m.train_bpe(word, 256 + 100)
    assert (time.perf_counter() - began) / 100 < 0.03  # 0.24 s when every merge recounts the word
    assert m.train_bpe(word[:3000], 300) == oracle_train(m, word[:3000], 300) and len(merges) == 100
    bpe = m.BPE(merges)
    began = time.perf_counter()
    assert bpe.decode(bpe.encode_ordinary(word)) == word and time.perf_counter() - began < 2
    assert bpe.encode_ordinary(word[:3000]) == oracle_encode(m, word[:3000], merges)


# --- encoding --------------------------------------------------------------------------------------------------------
def test_encoding_equals_the_definition_and_survives_the_round_trip(m, bpe):
    rng = random.Random(1)
    for text in ["", "a", docs(3000), MIXED, *(random_text(rng, 60) for _ in range(15)), "".join(map(chr, range(256)))]:
        ids = bpe.encode_ordinary(text)
        assert bpe.decode(ids) == text and ids == oracle_encode(m, text, bpe.merges)
    assert len(bpe.encode_ordinary(docs(3000))) < 2000
    assert bpe.decode(bpe.encode_ordinary("é")[:1]) == "\ufffd" or len(bpe.encode_ordinary("é")) == 1
    assert m.BPE([]).encode_ordinary("é") == [0xc3, 0xa9] and bpe.n_vocab == 600


def test_special_tokens(m, bpe):
    special = m.BPE(bpe.merges, "gpt4", {"<|end|>": 600, "<|end|>of": 601, "[a.c]": 602})
    assert special.n_vocab == 603 and bpe.encode_piece("x\n  y") != (two_pieces := bpe.encode_ordinary("x\n  y"))
    assert special.encode("x\n  y<|end|>of[a.c]") == [*two_pieces, 601, 602]
    assert special.encode_ordinary("hi<|end|>") == bpe.encode("hi<|end|>") and 600 not in bpe.encode("hi<|end|>")
    assert special.decode([600, 104, 601]) == "<|end|>h<|end|>of" and special.encode("[abc]") == bpe.encode("[abc]")


def test_save_and_load(m, bpe, tmp_path):
    special = m.BPE(bpe.merges, "gpt2", {"<|x|>": 600}, reversed(range(256)))
    special.save(tmp_path / "t.json")
    loaded = m.BPE.load(tmp_path / "t.json")
    assert vars(loaded) == vars(special) and loaded.encode(MIXED + "<|x|>") == special.encode(MIXED + "<|x|>")
    (tmp_path / "other.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(ValueError, match="other.json"):
        m.BPE.load(tmp_path / "other.json")


def test_patterns_by_hand(m):
    for text, gpt2, gpt4 in (
            ("I'll GO", "I|'ll| GO", "I|'ll| GO"), ("DON'T", "DON|'|T", "DON|'T"), ("a  b", "a| | b", "a| | b"),
            ("1234567", "1234567", "123|456|7"), ("(word", "(|word", "(word"), ("a.\nb", "a|.|\n|b", "a|.\n|b"),
            ("x  \n", "x|  \n", "x|  \n")):
        assert "|".join(m.split(text, "gpt2")) == gpt2 and "|".join(m.split(text, "gpt4")) == gpt4
        assert m.split(text) == gpt4.split("|")


# --- tiktoken, GPT-2 -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_tiktoken_given_our_merges_finds_the_same_ids(m, pattern):
    rng, bpe = random.Random(2), m.BPE(m.train_bpe(docs(40_000) + MIXED, 500, pattern), pattern, {"<|end|>": 500})
    encoding = bpe.to_tiktoken()
    for text in (docs(30_000), MIXED, *(random_text(rng, 100) for _ in range(20))):
        assert encoding.encode_ordinary(text) == bpe.encode_ordinary(text)
    assert encoding.encode("a<|end|>", allowed_special="all") == bpe.encode("a<|end|>")
    with pytest.raises(AssertionError):
        m.BPE([(97, 98), (98, 99), (256, 99), (97, 257)]).to_tiktoken()  # "abc" twice


def test_gpt2s_ids_equal_tiktokens(m, tiktoken_cache, data_dir):
    import tiktoken
    gpt2 = m.read_gpt2(tiktoken_cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")  # the cache's name for vocab.bpe
    theirs = tiktoken.get_encoding("gpt2")
    assert gpt2.n_vocab == theirs.n_vocab == 50257
    assert all(gpt2.token_bytes[i] == theirs.decode_single_token_bytes(i) for i in range(50257))
    text = (data_dir / "tinyshakespeare.txt").read_text()[:150_000] + MIXED
    assert gpt2.encode_ordinary(text) == theirs.encode_ordinary(text)
    assert gpt2.encode("a<|endoftext|>") == [64, 50256] and gpt2.encode(" strawberry") == [41236]
    for text, cut in (("1234", "12|34"), ("12345", "123|45")):
        assert m.show_tokens(gpt2, text) == cut


# --- the program -----------------------------------------------------------------------------------------------------
def test_a_run(m, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(docs(), encoding="utf-8")
    bpe = m.main(m.parse_config("--data t.txt --vocab-size 400 --out run".split()))
    out, summary = capsys.readouterr().out, json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "== text: True" in out and "same ids: True" in out and "1,000" not in out
    ratio = summary["results"]["bytes_per_token"]
    assert list(ratio) == ["256", "400"] and ratio["256"] == 1.0 < ratio["400"]
    assert (tmp_path / "run" / "bytes_per_token.png").stat().st_size > 5000
    m.main(m.Config(load="run/tokenizer.json", sentence="naïve the"))
    assert capsys.readouterr().out.splitlines()[1] == str(bpe.encode_ordinary("naïve the"))
    (tmp_path / "short").write_text("too short")
    for flags in ("--data short", "--data nowhere", "--data t.txt --pattern gpt3", "--data t.txt --vocab-size 9",
                  "--load t.txt"):
        with pytest.raises((OSError, ValueError)):
            m.main(m.parse_config(flags.split()))
