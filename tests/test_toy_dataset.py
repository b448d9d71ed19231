"""The toy language: names and numbers, the split, the three framings, masks, floors. Expected values by hand."""
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


@pytest.mark.parametrize("n", NAMES)
def test_names_by_hand(m, n):
    assert m.number_to_words(n) == NAMES[n]
    assert m.words_to_number(NAMES[n]) == n


def test_names_are_a_bijection(m):
    numbers = [*range(2000), *random.Random(0).sample(range(1_000_000), 20_000)]
    assert all(m.words_to_number(m.number_to_words(n)) == n for n in numbers)


@pytest.mark.parametrize("text", ["", "two twenty", "hundred", "hundred hundred", "one thousand zero", "five five",
                                  "one thousand thousand", "twenty ten", "forty-two", "one hundred and two", "zero one",
                                  "one million"])
def test_what_is_no_name_is_refused(m, text):
    with pytest.raises(ValueError):
        m.words_to_number(text)


def test_split_is_disjoint_and_a_tenth(m):
    held = [m.is_validation(n) for n in range(100_000)]
    assert 0.09 < sum(held) / len(held) < 0.11
    assert not m.is_validation(0)
    train, val = (m.draw_numbers(5000, 3, validation) for validation in (False, True))
    assert not set(train) & set(val)
    # uniform over lengths, not over numbers: about a sixth each
    lengths = Counter(len(str(n)) for n in train)
    assert set(lengths) == set(range(1, 7)) and min(lengths.values()) > 5000 / 6 * 0.85


def test_vocabulary_is_one_id_space(m):
    assert len(m.TOY_VOCAB) == len(set(m.TOY_VOCAB)) == 46
    assert [m.TOY_VOCAB[i] for i in (m.PAD, m.EOS, m.EQUALS, m.CLS, m.SEP, m.MASK)] == [
        "<pad>", "\n", "=", "[CLS]", "[SEP]", "[MASK]"]
    with pytest.raises(ValueError):
        m.encode_words("forty=million")


def words(m, row):
    return [m.TOY_VOCAB[i] if i != m.IGNORE else "-" for i in row.tolist()]


def test_decoder_lines_by_hand(m):
    batch = m.decoder_lines([42, 7])
    assert words(m, batch["inputs"][0]) == ["4", "2", "=", "forty", "two"]
    assert words(m, batch["targets"][0]) == ["-", "-", "forty", "two", "\n"]
    # the short row's EOS comes right behind its own last word, and the pad behind it is no target
    assert words(m, batch["inputs"][1]) == ["7", "=", "seven", "\n", "<pad>"]
    assert words(m, batch["targets"][1]) == ["-", "seven", "\n", "-", "-"]
    assert batch["mask"].tolist() == [[True] * 5, [True] * 4 + [False]]


def test_seq2seq_pairs_by_hand(m):
    batch = m.seq2seq_pairs([42, 7])
    assert words(m, batch["source"][1]) == ["7", "\n", "<pad>"]
    assert words(m, batch["tgt"][0]) == ["<pad>", "forty", "two"]
    assert words(m, batch["targets"][0]) == ["forty", "two", "\n"]
    assert words(m, batch["targets"][1]) == ["seven", "\n", "-"]
    assert batch["source_mask"].tolist() == [[True] * 3, [True, True, False]]


def test_encoder_pairs(m):
    numbers = m.draw_numbers(2000, 0, False)
    batch = m.encoder_pairs(numbers, 1)
    for n, ids, mask, segments, match in zip(numbers, *batch.values(), strict=True):
        text = words(m, ids[mask])
        first, second = " ".join(text).removeprefix("[CLS] ").removesuffix(" [SEP]").split(" [SEP] ")
        assert first.replace(" ", "") == str(n)
        assert (m.words_to_number(second) == n) == bool(match)
        # segments: 0 up to and with the first [SEP], 1 behind it
        cut = text.index("[SEP]") + 1
        assert segments[mask].tolist() == [0] * cut + [1] * (len(text) - cut)
    assert 0.45 < batch["match"].float().mean() < 0.55


def test_near_miss_is_near_and_never_the_same(m):
    rng = random.Random(0)
    for n in [0, 5, 10, 99, 999_999, *m.draw_numbers(500, 0, False)]:
        other = m.near_miss(n, rng)
        a, b = str(n), str(other).zfill(len(str(n)))
        assert other != n and 0 <= other <= 999_999
        assert abs(other - n) <= 20 or (len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1)


def test_mask_tokens_shares(m):
    ids = torch.randint(6, 46, (400, 50))
    ids[:, 0], ids[:, 20] = m.CLS, m.SEP
    mask = torch.ones(400, 50, dtype=torch.bool)
    mask[:, 40:] = False
    noisy, targets = m.mask_tokens(ids, mask, 0)
    chosen = targets != m.IGNORE
    assert not chosen[:, [0, 20]].any() and not chosen[:, 40:].any()  # never special tokens or pads
    assert torch.equal(noisy[~chosen], ids[~chosen]) and torch.equal(targets[chosen], ids[chosen])
    assert 0.13 < chosen.sum() / (400 * 38) < 0.17
    masked = (noisy[chosen] == m.MASK).float().mean()
    same = (noisy[chosen] == ids[chosen]).float().mean()
    assert 0.76 < masked < 0.84 and 0.07 < same < 0.14  # 10 % kept, and 1 in 40 of the random ones is the same by luck
    again = m.mask_tokens(ids, mask, 0)
    assert torch.equal(noisy, again[0]) and not torch.equal(noisy, m.mask_tokens(ids, mask, 1)[0])


def test_masks_by_hand(m):
    ids, mask = m.pad_rows([[9], [9, 9, 9]])
    assert ids.tolist() == [[9, 0, 0], [9, 9, 9]]
    assert m.padding_mask(mask)[0].tolist() == [[True, False, False]]
    assert m.causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert m.both_masks(mask)[0].tolist() == [[True, False, False]] * 3
    assert m.both_masks(mask)[1].tolist() == [[True, False, False], [True, True, False], [True] * 3]
    left, mask = m.pad_rows([[9], [9, 9, 9]], side="left")
    assert left.tolist() == [[0, 0, 9], [9, 9, 9]] and mask[0].tolist() == [False, False, True]


def test_batches_lose_no_row(m):
    data = {"a": torch.arange(11), "b": torch.arange(11) * 2}
    seen = list(m.batches(data, 4, 0))
    assert [len(batch["a"]) for batch in seen] == [4, 4, 3]
    assert sorted(torch.cat([batch["a"] for batch in seen]).tolist()) == list(range(11))
    assert all(torch.equal(batch["b"], batch["a"] * 2) for batch in seen)


def test_smoothing_floor_is_what_cross_entropy_reaches(m):
    # The best logits are the log of the smoothed target; torch's own label smoothing must give the floor there.
    for epsilon, V in ((0.1, 46), (0.3, 5), (0.0, 7)):
        target = torch.full((V,), epsilon / V, dtype=torch.float64)
        target[2] += 1 - epsilon
        reached = torch.nn.functional.cross_entropy(target.clamp(min=1e-300).log()[None], torch.tensor([2]),
                                                    label_smoothing=epsilon).item()
        assert math.isclose(m.smoothing_floor(epsilon, V), reached, abs_tol=1e-9)


def test_digit_floor_is_the_entropy_of_the_draw(m):
    # H(length) + H(number | length): the lengths' shares are counted in a draw, the numbers of a length in the split
    for validation in (False, True):
        drawn = Counter(len(str(n)) for n in m.draw_numbers(40_000, 5, validation))
        exist = Counter(len(str(n)) for n in range(1_000_000) if m.is_validation(n) == validation)
        share = {d: count / 40_000 for d, count in drawn.items()}
        entropy = sum(p * (math.log(exist[d]) - math.log(p)) for d, p in share.items())
        assert abs(m.digit_floor(validation) - entropy) < 0.05


def test_run_writes_floors_and_picture(m, tmp_path):
    import json
    m.main(m.Config(out=str(tmp_path)))
    floors = json.loads((tmp_path / "summary.json").read_text())["results"]["floors"]
    assert any("smoothing" in task for task in floors) and all(floor >= 0 for floor in floors.values())
    assert (tmp_path / "masks.png").stat().st_size > 10_000
