"""The toy language: names and numbers, the split, the three framings, masks, floors. Expected values by hand."""
import json
import math
import random
from collections import Counter

import pytest
import torch

NAMES = {0: "zero", 7: "seven", 13: "thirteen", 20: "twenty", 42: "forty two", 100: "one hundred",
         110: "one hundred ten", 999: "nine hundred ninety nine", 1000: "one thousand", 1001: "one thousand one",
         12_000: "twelve thousand", 40_215: "forty thousand two hundred fifteen",
         100_000: "one hundred thousand", 700_007: "seven hundred thousand seven",
         999_999: "nine hundred ninety nine thousand nine hundred ninety nine"}


def scenario(m, tmp_path, fixed):
    """For tests/test_house.py: reach every line with a shape comment."""
    m.main(m.Config(out=str(tmp_path)))


def words(m, row):
    return [m.TOY_VOCAB[i] if i != m.IGNORE else "-" for i in row.tolist()]


def test_names(m):
    assert {n: m.number_to_words(n) for n in NAMES} == NAMES
    some = [*range(2000), *random.Random(0).sample(range(1_000_000), 20_000)]
    assert len({m.number_to_words(n) for n in some}) == len(set(some))  # no two numbers share a name
    assert len(m.TOY_VOCAB) == len(set(m.TOY_VOCAB)) == 46
    assert [m.TOY_VOCAB[i] for i in (m.PAD, m.EOS, m.EQUALS, m.CLS, m.SEP, m.MASK)] == [
        "<pad>", "\n", "=", "[CLS]", "[SEP]", "[MASK]"]
    assert m.encode_toy("40=forty\n") == [10, 6, 2, 38, 1]
    with pytest.raises(ValueError):
        m.encode_toy("forty=million")


def test_split_is_disjoint_and_a_tenth(m):
    held = [m.is_validation(n) for n in range(100_000)]
    assert 0.09 < sum(held) / len(held) < 0.11 and not any(held[:10]) and sum(held[10:100]) == 5
    train, val = (m.draw_numbers(5000, 3, validation) for validation in (False, True))
    assert not set(train) & set(val) and not any(map(m.is_validation, train)) and all(map(m.is_validation, val))
    lengths = Counter(len(str(n)) for n in train)  # uniform over lengths, not over numbers: about a sixth each
    assert set(lengths) == set(range(1, 7)) and min(lengths.values()) > 5000 / 6 * 0.85


def test_decoder_rows_by_hand(m):
    inputs, targets, mask = m.decoder_rows([42, 7])
    assert words(m, inputs[0]) == ["4", "2", "=", "forty", "two"]
    assert words(m, targets[0]) == ["-", "-", "forty", "two", "\n"]
    # the short row's EOS comes right behind its own last word, and the pad behind it is no target
    assert words(m, inputs[1]) == ["7", "=", "seven", "\n", "<pad>"]
    assert words(m, targets[1]) == ["-", "seven", "\n", "-", "-"]
    assert mask.tolist() == [[True] * 5, [True] * 4 + [False]]


def test_seq2seq_rows_by_hand(m):
    source, tgt, targets = m.seq2seq_rows([42, 7])
    assert [words(m, row) for row in source] == [["4", "2", "\n"], ["7", "\n", "<pad>"]]
    assert [words(m, row) for row in tgt] == [["<pad>", "forty", "two"], ["<pad>", "seven", "\n"]]
    assert [words(m, row) for row in targets] == [["forty", "two", "\n"], ["seven", "\n", "-"]]


def test_encoder_pairs(m):
    numbers = m.draw_numbers(2000, 0, False)
    rows = m.encoder_pairs(numbers, 1)
    for n, ids, mask, segments, match in zip(numbers, *rows, strict=True):
        text = words(m, ids[mask])
        first, second = " ".join(text).removeprefix("[CLS] ").removesuffix(" [SEP]").split(" [SEP] ")
        assert first.replace(" ", "") == str(n) and (second == m.number_to_words(n)) == bool(match)
        cut = text.index("[SEP]") + 1  # segments: 0 up to and with the first [SEP], 1 behind it
        assert segments[mask].tolist() == [0] * cut + [1] * (len(text) - cut)
    assert 0.45 < rows[3].float().mean() < 0.55


def test_near_miss_is_near_and_never_the_same(m):
    rng = random.Random(0)
    for n in [0, 5, 10, 99, 999_999, *m.draw_numbers(500, 0, False)]:
        other = m.near_miss(n, rng)
        changed = sum(x != y for x, y in zip(str(n), str(other).zfill(len(str(n))), strict=False))
        assert other != n and 0 <= other <= 999_999 and (abs(other - n) <= 20 or changed == 1)


def test_mask_tokens_shares(m):
    ids = torch.randint(6, 46, (400, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 20] = m.CLS, m.SEP
    mask = torch.arange(50).expand(400, 50) < 40
    noisy, targets = m.mask_tokens(ids, mask, 0)
    chosen = targets != m.IGNORE
    assert not chosen[:, [0, 20]].any() and not chosen[:, 40:].any()  # never special tokens or pads
    assert torch.equal(noisy[~chosen], ids[~chosen]) and torch.equal(targets[chosen], ids[chosen])
    assert 0.13 < chosen.sum() / (400 * 38) < 0.17
    masked, same = ((noisy[chosen] == other).float().mean() for other in (m.MASK, ids[chosen]))
    assert 0.76 < masked < 0.84 and 0.07 < same < 0.14  # 10 % kept, and 1 in 40 of the random ones is the same by luck
    assert (noisy[chosen] >= m.MASK).all()  # a random token is never a special one
    assert torch.equal(noisy, m.mask_tokens(ids, mask, 0)[0]) and not torch.equal(noisy, m.mask_tokens(ids, mask, 1)[0])


def test_masks_by_hand(m):
    ids, mask = m.pad_rows([[9], [9, 9, 9]])
    assert ids.tolist() == [[9, 0, 0], [9, 9, 9]]
    padding, causal, both = m.make_masks(mask)
    triangle = [[True, False, False], [True, True, False], [True] * 3]
    assert padding.tolist() == [[[True, False, False]], [[True] * 3]] and causal.tolist() == triangle
    assert both.tolist() == [[[True, False, False]] * 3, triangle]


def test_smoothing_floor_is_what_cross_entropy_reaches(m):
    # The best logits are the log of the smoothed target; torch's own label smoothing must give the floor there.
    for epsilon, V in ((0.1, 46), (0.3, 5)):
        target = torch.full((V,), epsilon / V, dtype=torch.float64)
        target[2] += 1 - epsilon
        reached = torch.nn.functional.cross_entropy(target.log()[None], torch.tensor([2]), label_smoothing=epsilon)
        assert m.smoothing_floor(epsilon, V) == pytest.approx(reached.item(), abs=1e-9)


def test_digit_floor_is_the_entropy_of_the_draw(m):
    # H(length) + H(number | length): the lengths' shares are counted in a draw, the numbers of a length in the split
    drawn = Counter(len(str(n)) for n in m.draw_numbers(40_000, 5, False))
    exist = Counter(len(str(n)) for n in range(1_000_000) if not m.is_validation(n))
    entropy = sum(count / 40_000 * (math.log(exist[d]) - math.log(count / 40_000)) for d, count in drawn.items())
    assert m.digit_floor() == pytest.approx(entropy, abs=0.02)


def test_run_and_written_lines(m, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    m.main(m.Config(out="run"))
    floors = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]["floors"]
    assert list(floors.values()) == pytest.approx([0, 0.98, 0.6927], abs=0.005)
    assert (tmp_path / "run" / "masks.png").stat().st_size > 10_000
    m.main(m.Config(write="my numbers.txt"))
    assert '--data "my numbers.txt"' in capsys.readouterr().out
    text = (tmp_path / "my numbers.txt").read_text()
    lines = text.splitlines()
    assert text.endswith("\n")
    assert all(m.number_to_words(int(n)) == name for n, name in (line.split("=") for line in lines))
    # What decoder_only.py trains on, the first nine tenths of the characters, holds no held-out number.
    trained = text[:int(0.9 * len(text))].splitlines()
    assert not any(m.is_validation(int(line.split("=")[0])) for line in trained[:-1])
    assert len(lines) > 23_000 and all(m.is_validation(int(line.split("=")[0])) for line in lines[len(trained):])
