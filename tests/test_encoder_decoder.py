"""Tests of encoder_decoder.py, T5 in one file; `pytest tests/test_encoder_decoder.py --script my_t5.py` grades yours.

Expected values come from elsewhere: transformers for models, buckets, weights, greedy and beam search, sacrebleu, slow
loops written here. Training loop and checkpoints are tested with decoder_only.py. Searches are compared in float64.
"""
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

TINY = dict(n_layer=1, n_head=2, n_embd=16, head_size=8, ffn_size=24, batch_size=8, max_steps=3, warmup_steps=2,
            eval_every=2, device="cpu", max_new_tokens=6)


# --- helpers ---------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test in a folder of its own, without a network, with a file of 60 pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_DATA", raising=False)
    monkeypatch.setattr("requests.get", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    rng = random.Random(0)
    words = [rng.choices("rot blau hund katze haus baum".split(), k=rng.randint(2, 6)) for _ in range(60)]
    Path("my.tsv").write_text("\n".join(f"{' '.join(row)}\t{' '.join(row[::-1])}" for row in words), encoding="utf-8")


def small(m, seed=0, dtype=torch.float64, **changes):
    """A small model of random shape, both versions, with wide random weights."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cfg = dict(n_layer=rng.choice((1, 2)), n_head=rng.choice((2, 3)), n_embd=rng.choice((12, 18)), ffn_size=20,
               head_size=rng.choice((5, 6)), gated=seed % 2 == 1, tie_weights=seed % 3 == 0,
               vocab_size=rng.choice((11, 37)))
    model = m.T5(m.Config(**cfg | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    return model.to(dtype).eval()


def sources(model, seed=0, rows=5, width=9):
    """src (B, S) of different lengths, padded on the right, one row on the left."""
    src = torch.randint(2, model.cfg.vocab_size, (rows, width), generator=torch.Generator().manual_seed(seed))
    for row in range(rows):
        src[row, width - row:] = 0
    src[1, :3] = 0
    return src


@pytest.fixture(scope="module")
def hf():
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def theirs(m, hf, model, folder="hf"):
    """transformers' model with the weights of ours, through files."""
    m.save_pretrained(model, folder)
    other = hf.T5ForConditionalGeneration.from_pretrained(folder)
    return other.to(next(model.parameters()).dtype).eval()


def until_end(row):
    return row[:row.index(1)] if 1 in row else row


def scenario(m, tmp_path, fixed):
    """For tests/test_house.py: reach every line with a shape comment."""
    fixed.update(C=16, H=2, D=8)
    for change in (dict(data="numbers"), dict(spans=True, block_size=24, data="my.tsv")):
        if change["data"] == "my.tsv":
            (tmp_path / "my.tsv").write_text("\n".join(f"a{i} b\tc{i} {'d e ' * 9}" for i in range(150)))
        m.main(m.Config(**TINY | change | dict(out=change["data"] + "-run", max_steps=1, batch_size=5)))
    model = small(m, 1, torch.float32, n_embd=16, n_head=2, head_size=8)
    m.beam_search(model, sources(model), 7, num_beams=3)


# --- model -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", (False, True))
def test_buckets_equal_transformers(m, hf, causal):
    from transformers.models.t5.modeling_t5 import T5Attention
    distance = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(distance, not causal, 32, 128)
    assert torch.equal(m.relative_bucket(distance, causal), expected)


@pytest.mark.parametrize("seed", range(6))
def test_logits_equal_transformers_in_both_directions(m, hf, seed):
    """v1.0 tied and not, gated and not, sources with padding; our file in their class and their file in ours."""
    model = small(m, seed, torch.float32)
    src, tgt = sources(model, seed), torch.randint(2, model.cfg.vocab_size, (5, 40))  # 40: beyond the exact buckets
    other = theirs(m, hf, model)
    fresh = hf.T5ForConditionalGeneration(copy.deepcopy(other.config)).eval()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    fresh.save_pretrained("theirs")
    for ours, reference in ((model, other), (m.from_pretrained("theirs"), fresh)):
        with torch.no_grad():
            one, two = ours(src, tgt), reference(src, (src != 0).long(), decoder_input_ids=tgt).logits
        assert (one - two).abs().max() < 1e-4 * max(1, two.std()) and one.std() > 0.1


def test_reads_old_files_and_names_what_is_wrong(m):
    """The table stored three times, a table that nobody reads, mixed types, a config with one key for tying."""
    from safetensors.torch import load_file, save_file
    for tied in (True, False):
        model = small(m, 1, torch.float32, tie_weights=tied)
        m.save_pretrained(model, "ours")
        tensors = load_file("ours/model.safetensors")
        old = {key: t.bfloat16() if "DenseReluDense" in key else t for key, t in tensors.items()}
        old |= {f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")}
        old["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 2)
        if tied:
            old["lm_head.weight"] = tensors["shared.weight"].clone()
        save_file(old, "ours/model.safetensors")
        config = json.loads(Path("ours/config.json").read_text())
        config.pop("scale_decoder_outputs")
        Path("ours/config.json").write_text(json.dumps(config))
        again = m.from_pretrained("ours")
        assert again.cfg.tie_weights == tied and next(again.parameters()).dtype == torch.float32
        src, tgt = sources(model), torch.randint(2, 11, (5, 4))
        assert (again(src, tgt) - model(src, tgt)).abs().max() < 0.2
    for change in (lambda t: t.pop("shared.weight"), lambda t: t.update(strange=torch.zeros(1)),
                   lambda t: t.update({"shared.weight": torch.zeros(3, 3)})):
        wrong = dict(tensors)
        change(wrong)
        save_file(wrong, "ours/model.safetensors")
        with pytest.raises((RuntimeError, KeyError), match="shared.weight|strange"):
            m.from_pretrained("ours")


@pytest.mark.parametrize("key, value", [
    ("model_type", "mt5"), ("layer_norm_epsilon", 1e-5), ("relative_attention_num_buckets", 16), ("pad_token_id", 3),
    ("num_decoder_layers", 7), ("relative_attention_max_distance", 64), ("feed_forward_proj", "gated-silu"),
    ("decoder_start_token_id", 2), ("something_new", 1)])
def test_refuses_other_arithmetic_by_name(m, key, value):
    m.save_pretrained(small(m), "ours")
    config = json.loads(Path("ours/config.json").read_text())
    Path("ours/config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key):
        m.from_pretrained("ours")


def test_published_size(m):
    with torch.device("meta"):
        model = m.T5(m.Config(n_layer=6, n_head=8, n_embd=512, head_size=64, ffn_size=2048, vocab_size=32128))
    assert sum(p.numel() for p in model.parameters()) == 60_506_624  # t5-small


def test_sees_all_of_the_source_and_nothing_of_the_future(m):
    model = small(m, 2)
    src, tgt = torch.randint(2, 11, (1, 7)), torch.randint(2, 11, (1, 6))
    before = model(src, tgt)
    for c in range(7):
        changed = src.clone()
        changed[0, c] = 2 + (src[0, c] - 1) % 9
        assert ((model(changed, tgt) - before).abs().amax(-1) > 1e-9).all()
    for t in range(6):
        changed = tgt.clone()
        changed[0, t] = 2 + (tgt[0, t] - 1) % 9
        different = (model(src, changed) - before).abs().amax(-1)[0] > 1e-9
        assert not different[:t].any() and different[t]


def test_padding_and_neighbors_change_nothing(m):
    model = small(m, 3)
    row, tgt = torch.randint(2, 11, (5,)), torch.randint(2, 11, (3, 6))
    src = torch.randint(2, 11, (3, 9))
    src[0], src[1] = F.pad(row, (0, 4)), F.pad(row, (4, 0))
    tgt[1] = tgt[0]
    alone = model(row[None], tgt[:1])[0]
    torch.testing.assert_close(model(src, tgt)[0], alone)
    torch.testing.assert_close(model(src, tgt)[1], alone)
    ids, scores = m.beam_search(model, src, 8)
    one, score = m.beam_search(model, row[None], 8)
    assert [until_end(x) for x in ids[0].tolist()] == [until_end(x) for x in ids[1].tolist()] == [
        until_end(x) for x in one[0].tolist()]
    torch.testing.assert_close(scores[:2], score.expand(2, -1))


def test_decoding_with_a_cache_equals_without(m):
    model = small(m, 5)
    src, tgt, cache = sources(model), torch.randint(2, 11, (5, 40)), {}
    memory = model.encoder(model.shared(src), src != 0, {})
    steps = [model.decode(part, memory, src != 0, cache) for part in tgt.split((1, 3, 1, 35), 1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(src, tgt))


def test_dropout_acts_at_every_site_in_training_only(m, monkeypatch):
    model, seen = small(m, 0, n_layer=2, dropout=0.3), []
    drop = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True: (
        seen.append(p if training else 0), drop(x, p, training))[1])
    # Per attention its weights and its output, per feed-forward its inside and its output, per stack both ends.
    for training, expected in ((True, 2 * (2 + 2) + 2 + 2 * (2 + 2 + 2) + 2), (False, 0)):
        model.train(training)
        seen.clear()
        model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
        assert seen.count(0.3) == expected


# --- objective -------------------------------------------------------------------------------------------------------
def test_loss_equals_transformers_and_smoothing_is_for_training(m, hf):
    model = small(m, 4, label_smoothing=0.2)
    src, targets = sources(model), torch.randint(2, 11, (5, 6))
    targets[1, 4:], targets[2, 2:] = m.IGNORE, m.IGNORE
    count = (targets != m.IGNORE).sum()
    other = theirs(m, hf, model.float())
    expected = other(src, (src != 0).long(), labels=targets).loss * count
    torch.testing.assert_close(m.compute_loss(model, src, targets), expected, rtol=1e-5, atol=1e-5)
    model.train()
    logp = model(src, F.pad(targets[:, :-1], (1, 0)).clamp(min=0)).log_softmax(-1)
    slow = sum(-0.8 * logp[r, t, targets[r, t]] - 0.2 * logp[r, t].mean() for r in range(5) for t in range(6)
               if targets[r, t] != m.IGNORE)
    torch.testing.assert_close(m.compute_loss(model, src, targets), slow)
    floor = -(0.9 + 0.1 / 4000) * math.log(0.9 + 0.1 / 4000) - 3999 * 0.1 / 4000 * math.log(0.1 / 4000)
    assert f"{floor:.2f}" == "1.15"  # the figure in compute_loss()


def test_spans_can_be_put_back(m):
    sentinels = torch.arange(1000, 1100)
    ids = torch.randint(10, 900, (40, 85))
    source, targets = m.corrupt_spans(ids, sentinels, torch.Generator().manual_seed(0))
    assert (source[:, -1] == 1).all() and (targets[:, -1] == 1).all()
    places = set()
    for row, a, b in zip(ids.tolist(), source.tolist(), targets.tolist(), strict=True):
        marks = [i for i in b[:-1] if i >= 1000]
        assert marks == list(range(1000, 1005)) and [i for i in a if i >= 1000] == marks[:4]
        holes = [list(part) for key, part in itertools.groupby(b[:-1], lambda i: i >= 1000) if not key]
        assert [len(hole) for hole in holes] == [3] * 4
        whole = [i for token in a[:-1] for i in (holes[token - 1000] if token >= 1000 else [token])]
        assert whole == row
        places.update(i for i, token in enumerate(a) if token >= 1000)
    assert len(places) > 30
    again = m.corrupt_spans(ids, sentinels, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], source)


# --- data ------------------------------------------------------------------------------------------------------------
def value(name):
    """The number that an English name says: an oracle from the other side."""
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


def test_numbers(m):
    train, val, stress = m.number_pairs(1)
    for part in (train[:3000], val, stress):
        assert all(value(name) == int(digits) and not re.search("zero .|. zero", name) for digits, name in part)
    assert not {pair[0] for pair in train} & {pair[0] for pair in val + stress}
    lengths = [sum(len(digits) == n for digits, _ in train) for n in range(1, 7)]
    assert min(lengths) > 14_000 and {str(n) for n in range(100)} < {digits for digits, _ in train}
    assert all(len(digits) > 4 and digits.count("0") > 2 for digits, _ in stress) and len(stress) > 700
    assert m.number_pairs(1) == (again := m.number_pairs(1)) and m.number_pairs(2)[2] == again[2]


def test_file_of_pairs(m):
    odd = ["a\u2028b\tc", "d\u0085e\tf", "g\x0ch\ti\r", "j\rk\tl"]
    Path("odd.tsv").write_bytes(("\ufeff" + "\n".join(odd + [f"x{i}\ty" for i in range(30)] + odd) + "\n").encode())
    train, val, test = m.file_pairs("odd.tsv")
    assert val == [["a\u2028b", "c"], ["d\u0085e", "f"], ["g\x0ch", "i"]] and val == test
    assert len(train) == 1 + 30 + 1 and all(pair[0] != "d\u0085e" for pair in train)  # what is held out stays out
    for text, line in (("a\tb\n" * 5 + "no tab\n" + "a\tb\n" * 30, 6), ("a\tb\n" * 5, 1), ("", 1)):
        Path("bad.tsv").write_text(text)
        with pytest.raises(ValueError, match=f"bad.tsv, line {line} "):
            m.file_pairs("bad.tsv")


def test_multi30k(m, data_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    train, val, test = m.multi30k_pairs()
    assert [len(part) for part in (train, val, test)] == [29_000, 1014, 1000]
    assert test[0] == ("Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt.",
                       "A man in an orange hat starring at something.")
    monkeypatch.setenv("LLM_DATA", str(tmp_path))
    for name in ("train.de", "train.en", "val.de", "val.en", "test.de", "test.en"):
        (tmp_path / f"multi30k.{name}").write_text("x\n")
    with pytest.raises(OSError, match="not the expected files"):
        m.multi30k_pairs()
    (tmp_path / "multi30k.val.en").unlink()
    with pytest.raises(OSError, match="no network"):
        m.multi30k_pairs()


def test_tokenizer(m):
    texts = ["Ein Mann, 42 Jahre", "A man of 42 years; he says: café"] * 20
    text = m.learn_tokenizer(texts, 300)
    assert text == m.learn_tokenizer(texts, 300)  # the same every time: a resumed run must find its own
    tokenizer = m.make_tokenizer(text)
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>", "<extra_id_0>")] == [0, 1, 2, 3]
    for string in texts[:2]:
        ids = m.encode(tokenizer, string)
        assert ids[-1] == 1 and tokenizer.decode(ids[:-1], skip_special_tokens=False) == string
    pieces = [tokenizer.id_to_token(i) for i in m.encode(tokenizer, "man, 42")]
    assert pieces[-2:] == ["2", "</s>"] and "," in pieces and "4" in pieces[-3]
    assert m.encode(tokenizer, "A man of 42", 3)[-1] == 1 and len(m.encode(tokenizer, "A man of 42", 3)) == 3
    holes = [tokenizer.id_to_token(i) for i in m.encode(tokenizer, "A <extra_id_0> of")]
    assert "<extra_id_0>" in holes


def test_published_tokenizer(m, hf):
    """A unigram model as T5's tokenizer.json has it, which says "pad" and "cut": the ids of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(100))]
    inner.train_from_iterator(["The cute dog walks in the green park"] * 9, trainers.UnigramTrainer(
        vocab_size=140, special_tokens=special, unk_token="<unk>", show_progress=False))
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    inner.enable_padding(length=32)
    inner.enable_truncation(20)
    inner.save("tokenizer.json")
    other = hf.PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", pad_token="<pad>", eos_token="</s>")
    tokenizer = m.make_tokenizer(Path("tokenizer.json").read_text())
    for text in ("The <extra_id_0> walks in <extra_id_1> park", "The dog", "unseen ÄÖ"):
        assert m.encode(tokenizer, text) == other(text, padding=False, truncation=False)["input_ids"]


def test_rows_and_batches(m):
    tokenizer = m.make_tokenizer(m.learn_tokenizer(["a b c d e f g h"] * 9, 130))
    pairs = [("a b", "c d e f"), ("a b c d e f g h", "c")]
    source, targets = m.make_rows(pairs, tokenizer, 6)
    assert source.shape == (2, 6) and source[0, 3:].tolist() == [0] * 3 and source[1, -1] == 1
    assert targets.shape == (2, 5) and targets[1].tolist()[2:] == [m.IGNORE] * 3 and targets[0, -1] == 1
    g = torch.Generator().manual_seed(0)
    lengths, row = torch.randint(1, 20, (500, 1), generator=g), torch.arange(500)[:, None] + 2
    data = tuple(torch.where(torch.arange(20) < lengths, row, pad) for pad in (0, m.IGNORE))
    one, same, other = (m.get_batch(data, 16, 3, step) for step in (5, 5, 6))
    assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1]) and one[0].shape != other[0].shape
    seen, waste = [], []
    for step in range(160):
        src, tgt = m.get_batch(data, 16, 3, step)
        assert torch.equal(src[:, 0], tgt[:, 0]) and len(src) == 16
        assert (src[:, -1] > 0).any() and (tgt[:, -1] > 0).any()
        seen += src[:, 0].tolist()
        waste.append((tgt < 0).float().mean().item())
    assert len(set(seen)) > 480 and sum(waste) / len(waste) < 0.3  # all rows come, and little padding with them
    ids, sentinels = torch.randint(10, 99, (30, 40)), torch.arange(100, 200)
    a, b = (m.get_batch((ids, sentinels), 4, 0, step)[0] for step in (1, 2))
    assert a.shape == (4, 40 - 6 + 2 + 1) and not torch.equal(a, b)


# --- decoding --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", range(10))
def test_search_equals_transformers(m, hf, block):
    """10 x 10 random models, greedy and 4 beams: the same tokens up to </s>, the same scores."""
    for seed in range(10 * block, 10 * block + 10):
        model = small(m, seed)
        other, src = theirs(m, hf, model), sources(model, seed, rows=3)
        penalty = (1.0, 0.6, 2.0)[seed % 3]
        for K in (1, 4):
            out = other.generate(input_ids=src, attention_mask=(src != 0).long(), num_beams=K, max_new_tokens=7,
                                 num_return_sequences=K, output_scores=True, return_dict_in_generate=True,
                                 do_sample=False, length_penalty=penalty)
            ids, scores = m.beam_search(model, src, 7, K, penalty)
            for a, b in zip(out.sequences[:, 1:].tolist(), ids.flatten(0, 1).tolist(), strict=True):
                assert until_end(a) == until_end(b)
            if K > 1:
                assert (out.sequences_scores - scores.flatten()).abs().max() < 1e-5


def test_search_with_more_beams_than_tokens_finds_the_best(m):
    """All texts of up to 3 tokens of a language of 5, scored one by one."""
    model = small(m, 1, vocab_size=5)
    src = torch.tensor([[2, 3, 4], [4, 4, 0]])
    ids, scores = m.beam_search(model, src, 3, num_beams=60)
    assert scores.isfinite().sum(1).min() > 20
    for r in range(2):
        best = []
        texts = [row + (1,) * (n < 3) for n in range(4) for row in itertools.product((0, 2, 3, 4), repeat=n)]
        texts += [row + (1,) for row in itertools.product((0, 2, 3, 4), repeat=2)]
        for text in set(texts):
            logp = model(src[r:r + 1], torch.tensor([[0, *text[:-1]]]))[0].log_softmax(-1)
            best.append((sum(logp[i, t].item() for i, t in enumerate(text)) / len(text), text))
        score, text = max(best)
        assert until_end(ids[r, 0].tolist()) == until_end(list(text)) and abs(scores[r, 0].item() - score) < 1e-6


def test_translate_keeps_the_order(m):
    tokenizer = m.make_tokenizer(m.learn_tokenizer(["a b c d"] * 9, 130))
    model = small(m, 2, torch.float32, vocab_size=tokenizer.get_vocab_size())
    cfg = m.Config(device="cpu", max_new_tokens=5)
    texts = [" ".join(random.Random(i).choices("abcd", k=1 + i % 9)) for i in range(120)]
    for beams in (1, 3):
        together = m.translate(model, tokenizer, texts, cfg, beams)
        assert together[::17] == [m.translate(model, tokenizer, [text], cfg, beams)[0] for text in texts[::17]]


# --- scores ----------------------------------------------------------------------------------------------------------
def test_bleu_equals_sacrebleu(m):
    import sacrebleu
    rng = random.Random(0)
    words = "a man, riding the bike. 3.14 2-3 \"x\" it's &quot;b&quot; &amp;lt; in-door (yes) 5, und! ".split()
    for size in (1, 2, 3, 30, 200):
        references = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(size)]
        ours = [" ".join(w for w in text.split() if rng.random() < 0.8) + rng.choice(("", " a", "."))
                for text in references]
        assert abs(m.bleu(ours, references) - sacrebleu.corpus_bleu(ours, [references]).score) < 1e-9
    for ours, theirs in ((["a b c d"], ["x y z w"]), ([""], ["a b"]), (["a"], ["a"]), (["a b c d e"], ["a b c d e"]),
                         (["a b c d x"], ["a b q c d"]), (["a x b y c"], ["a b c d e"]), (["a b c d e"], ["a b c d"])):
        assert abs(m.bleu(ours, theirs) - sacrebleu.corpus_bleu(ours, [theirs]).score) < 1e-9, ours


# --- the program -----------------------------------------------------------------------------------------------------
def test_main_trains_reports_and_resumes(m, capsys, monkeypatch):
    pairs = m.number_pairs(0)
    monkeypatch.setattr(m, "number_pairs", lambda seed: [part[:600] for part in pairs[:2]] + [pairs[2][:20]])
    straight = m.main(m.Config(**TINY | dict(out="one", max_steps=4, dropout=0.2)))
    summary = json.loads(Path("one/summary.json").read_text())
    assert set(summary["results"]) == {"exact_match", "exact_match_stress"}
    assert {"config", "val_loss", "seconds", "history", "sample"} < set(summary)
    assert Path("one/curve.png").is_file() and Path("one/attention.png").is_file()
    before = m.save_checkpoint

    def stop(path, **state):  # ends the run right after the checkpoint of step 2
        before(path, **state)
        if state["step"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(m, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        m.main(m.Config(**TINY | dict(out="two", max_steps=4, dropout=0.2)))
    monkeypatch.setattr(m, "save_checkpoint", before)
    resumed = m.main(m.Config(out="two", resume=True, device="cpu"))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    m.main(m.Config(**TINY | dict(out="two", max_steps=1)))
    assert "kept as" in capsys.readouterr().out and len(kept := list(Path("two").glob("ckpt-*.pt"))) == 1
    again, _, _ = m.load(m.Config(load=str(kept[0]), device="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="start at 1"):
        m.main(m.Config(**TINY | dict(out="two", batch_size=0)))
    m.main(m.Config(load="one", prompt="42", beams=2, device="cpu"))
    with pytest.raises(ValueError, match="holds no model"):
        m.main(m.Config(load="nowhere", prompt="42"))


def test_pairs_and_spans_of_a_file(m, capsys):
    m.main(m.Config(**TINY | dict(data="my.tsv", out="pairs", vocab_size=150, beams=2)))
    assert set(json.loads(Path("pairs/summary.json").read_text())["results"]) == {"bleu_greedy", "bleu_beam"}
    again = m.main(m.Config(**TINY | dict(data="my.tsv", out="more", load="pairs", n_embd=99, max_steps=1,
                                          label_smoothing=0.1, dropout=0.2)))
    assert again.cfg.n_embd == 16 and again.cfg.label_smoothing == 0.1 and again.cfg.dropout == 0.2
    Path("text.tsv").write_text("\n".join(f"{i}\t{i} und {'so weiter ' * 5}" for i in range(200)))
    m.main(m.Config(**TINY | dict(data="text.tsv", spans=True, block_size=40, out="spans", vocab_size=150)))
    assert json.loads(Path("spans/summary.json").read_text())["results"] == {}
    m.main(m.Config(load="spans", prompt="und <extra_id_0> so", device="cpu", max_new_tokens=4))


def test_learns_a_tiny_task(m):
    """Turn the words around: exact after some hundred steps on a few dozen pairs it has seen."""
    m.main(m.Config(**TINY | dict(data="my.tsv", max_steps=200, lr=1e-2, batch_size=32, eval_every=200, n_embd=32)))
    history = json.loads(Path("runs/encoder_decoder/summary.json").read_text())["history"]
    assert history[0]["loss"] > 3 and history[-1]["loss"] < 0.3


def test_published_folder(m, hf, capsys):
    config = hf.T5Config(vocab_size=150, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                         feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    hf.T5ForConditionalGeneration(config).save_pretrained("published")
    with pytest.raises(ValueError, match="tokenizer.json"):
        m.main(m.Config(load="published", prompt="a b", device="cpu"))
    Path("published/tokenizer.json").write_text(m.learn_tokenizer(["a b c rot blau hund katze haus baum"] * 9, 140))
    m.main(m.Config(load="published", prompt="a b", beams=3, device="cpu", max_new_tokens=4))
    tuned = m.main(m.Config(load="published", data="my.tsv", **TINY))
    assert tuned.cfg.vocab_size == 150 and tuned.cfg.gated


def test_alignment_is_of_weights_that_sum_to_one(m, tmp_path):
    tokenizer = m.make_tokenizer(m.learn_tokenizer(["a b c d"] * 9, 130))
    model = small(m, 2, torch.float32, vocab_size=tokenizer.get_vocab_size())
    m.plot_alignment(tmp_path / "a.png", model, tokenizer, m.Config(device="cpu"), "a b c d", "b $ c")
    weights = model.decoder.block[0]["layer"][1]["EncDecAttention"].weights
    assert list(weights.shape[2:]) == [len(m.encode(tokenizer, text)) for text in ("b $ c", "a b c d")]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", (1337, 1338, 1339))
def test_learns_the_toy_language(m, seed):
    m.main(m.Config(seed=seed))
    results = json.loads(Path("runs/encoder_decoder/summary.json").read_text())["results"]
    assert results["exact_match"] >= 0.999 and results["exact_match_stress"] >= 0.998


def test_config_has_a_note_for_every_field(m, capsys):
    with pytest.raises(SystemExit):
        m.parse_config(["--help"])
    said = capsys.readouterr().out
    assert all("--" + field.name.replace("_", "-") in said for field in dataclasses.fields(m.Config))


def test_digest_of_the_data(m, data_dir):
    content = b"".join((data_dir / f"multi30k.{name}").read_bytes() for name in (
        "train.de", "train.en", "val.de", "val.en", "test.de", "test.en"))
    assert hashlib.sha256(content).hexdigest() == m.MULTI30K[1]
