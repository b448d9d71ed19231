"""Tests of encoder_decoder.py, T5 in one file; `pytest tests/test_encoder_decoder.py --script my_t5.py` grades yours.

Expected values come from elsewhere: torch.nn for the parts, transformers for the whole model and its decoding,
tokenizers and sacrebleu for tokens and BLEU, slow loops and exhaustive search written here for what no library does,
arithmetic by hand for the rest. Tokens of two implementations are compared in float64: a small model in float32 has
near-ties, and rounding would decide them.

    1 the whole model, published weights      2 parts: norm, buckets, sinusoids, attention, masks
    3 objective: loss, span corruption        4 data: rows, splits, batches, tokenizers, download, learning rate
    5 decoding                                6 task scores: BLEU, exact match, alignment
    7 training and the program from outside
"""

import dataclasses
import gzip
import hashlib
import http.server
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

SEEDS = (0, 1, 2)
KINDS = ("v1.0", "v1.1", "v1.1 tied")  # the last: what transformers builds from a config of v1.1


# --- helpers ---------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def tidy(monkeypatch, tmp_path):
    """Each test in a folder of its own, without the variables of a data folder or of torchrun, Ctrl-C as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("LLM_DATA", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # Nothing leaves this machine: the hub is a closed port, and a proxy in the environment stays out of it.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def offline(monkeypatch):
    requests = pytest.importorskip("requests")

    def refuse(*_, **__):
        raise requests.ConnectionError("no network")

    for name in ("get", "head"):
        monkeypatch.setattr(requests, name, refuse)
    monkeypatch.setattr(requests.Session, "request", refuse)


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def shape(seed):
    """Random sizes that are pairwise different, so that a swapped axis cannot go unnoticed; heads * head size != C."""
    rng = random.Random(seed)
    return dict(n_layer=rng.choice((1, 2)), n_head=3, n_embd=rng.choice((14, 16, 20)), head_size=rng.choice((4, 5, 7)),
                ffn_size=rng.choice((22, 26, 34)), vocab_size=rng.choice((37, 41, 43)))


def small(m, seed=0, **changes):
    """A small Config with random sizes; even seeds are T5 v1.0, odd ones v1.1."""
    return m.Config(**{**shape(seed), "seed": seed, "gated": bool(seed % 2), "tie_weights": seed % 2 == 0, **changes})


def shaken(model, seed=0):
    """Fresh gains are 1, which hides mistakes with them; and distances should matter: move both."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() == 1:
                parameter += 0.3 * noise
            elif "relative_attention_bias" in name:
                parameter += noise
    return model


def wide_model(m, cfg, dtype=torch.float64):
    """Large weights in the blocks, so that what they do is not drowned by the embedding."""
    model = shaken(m.build_model(cfg), cfg.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "block" in name and "relative" not in name:
                parameter *= 1.6
    return model.to(dtype).eval()


def random_ids(seed, vocab, *size, lowest=2):
    return torch.randint(lowest, vocab, size, generator=torch.Generator().manual_seed(seed))


def padded(rows, side="right", fill=0, width=None):
    """List of 1-D id tensors -> (ids, mask), padded on the left or on the right."""
    width = width or max(map(len, rows))
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.as_tensor(row), True
    return ids, mask


def sources_of(seed, vocab, lengths=(4, 9, 1, 6)):
    return [random_ids(seed * 100 + n, vocab, n) for n in lengths]


@torch.no_grad()
def next_logits(model, source, written):
    """The logits behind `written`, by one plain pass over one source without any cache."""
    return model(torch.as_tensor(source)[None], torch.tensor([[0, *written]]))[0, -1]


def slow_greedy(model, source, count, eos=1):
    """The definition of greedy decoding: read everything again for each token."""
    new = []
    while len(new) < count and not (new and new[-1] == eos):
        new.append(int(next_logits(model, source, new).argmax()))
    return new


@torch.no_grad()
def log_prob(model, source, new):
    """Sum of log-probabilities of the target `new`."""
    logits = model(torch.as_tensor(source)[None], torch.tensor([[0, *new[:-1]]]))[0]
    return float(logits.double().log_softmax(-1)[torch.arange(len(new)), torch.tensor(new)].sum())


def same(a, b):
    """Equality of nested dicts and lists with tensors in them, bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def contents(path):
    """What a checkpoint holds. weights_only: a file that needs more than that to be opened is a defect."""
    return torch.load(path, weights_only=True)


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def run(m, *flags):
    """The program, in this process."""
    return m.main(m.parse_config(m.Config, m.PRESETS, [str(flag) for flag in flags]))


def complaint(m, capsys, *flags):
    """Run the program in this process with flags that it must refuse. -> its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(m, *flags)
    code, err = stop.value.code, capsys.readouterr().err
    assert code not in (None, 0)
    text = err + (code if isinstance(code, str) else "")  # sys.exit("text") prints the text and exits with 1
    assert text.startswith("error: ") and len(text.strip().splitlines()) == 1, text
    return text.strip()


def as_flags(**settings):
    """{"n_layer": 1, "resume": True} -> ["--n-layer", "1", "--resume"]"""
    flags = []
    for name, value in settings.items():
        flags += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return flags


WORDS = "the cat sat on a mat and saw the dog run to café old tree while birds sang in morning light".split()


def toy_text(length=6000, seed=0):
    """Lines of a few words, with one character of two bytes."""
    rng, lines = random.Random(seed), []
    while sum(map(len, lines)) + len(lines) < length:
        lines.append(" ".join(rng.choices(WORDS, k=8)))
    return "\n".join(lines)[:length]


def toy_pairs(count=150, seed=0):
    """A language in which every word is spelled backwards and the order is kept."""
    rng = random.Random(seed)
    lines = [rng.choices(WORDS, k=rng.randint(1, 4)) for _ in range(count)]
    return [(" ".join(words), " ".join(word[::-1] for word in words)) for words in lines]


def write_pairs(path, pairs):
    Path(path).write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")


@pytest.fixture
def pairs_file(tmp_path):
    write_pairs(tmp_path / "pairs.tsv", toy_pairs())
    return tmp_path / "pairs.tsv"


# --- 1. The whole model against transformers -------------------------------------------------------------------------
def published(hf, seed, kind, width=1.0, **changes):
    """A random T5 of transformers. width: how much larger than fresh the weights inside the blocks are."""
    sizes = {**shape(seed), **changes}
    config = hf.T5Config(vocab_size=sizes["vocab_size"], d_model=sizes["n_embd"], d_kv=sizes["head_size"],
                         d_ff=sizes["ffn_size"], num_layers=sizes["n_layer"], num_heads=sizes["n_head"],
                         feed_forward_proj="relu" if kind == "v1.0" else "gated-gelu", dropout_rate=0.0,
                         tie_word_embeddings=kind == "v1.0", decoder_start_token_id=0)
    torch.manual_seed(seed)
    model = hf.T5ForConditionalGeneration(config)
    if kind == "v1.1":
        model.lm_head.weight = nn.Parameter(torch.randn(sizes["vocab_size"], sizes["n_embd"]) / 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "block" in name:
                parameter *= width
    return shaken(model, seed).eval()


def hf_logits(model, src, tgt, mask=None):
    with torch.no_grad():
        mask = None if mask is None else mask.long()
        return model(input_ids=src, attention_mask=mask, decoder_input_ids=tgt).logits


def assert_equal_functions(ours, theirs, vocab, seed, atol=1e-4):
    src, tgt = random_ids(seed, vocab, 4, 23, lowest=0), random_ids(seed + 1, vocab, 4, 19, lowest=0)
    rows, short = sources_of(seed, vocab), random_ids(seed + 2, vocab, 4, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours(src, tgt), hf_logits(theirs, src, tgt), atol=atol, rtol=0)
        for side in ("left", "right"):
            ids, mask = padded(rows, side, width=11)
            torch.testing.assert_close(ours(ids, short, mask), hf_logits(theirs, ids, short, mask), atol=atol, rtol=0)
        # Far beyond the last bucket: 128 and more.
        src, tgt = random_ids(seed, vocab, 1, 150), random_ids(seed + 1, vocab, 1, 140)
        torch.testing.assert_close(ours(src, tgt), hf_logits(theirs, src, tgt), atol=atol, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_we_load_their_weights(m, hf, tmp_path, seed, kind):
    theirs = published(hf, seed, kind)
    theirs.save_pretrained(tmp_path / "hf")
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert not ours.training and all(p.dtype == torch.float32 for p in ours.parameters())
    assert all(getattr(cfg, name) == value for name, value in shape(seed).items())
    assert cfg.gated == (kind != "v1.0")
    assert_equal_functions(ours, theirs, cfg.vocab_size, seed)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_they_load_our_weights(m, hf, tmp_path, seed, gated, tied):
    cfg = small(m, seed, gated=gated, tie_weights=tied)
    ours = wide_model(m, cfg, torch.float32)
    m.save_pretrained(ours, cfg, tmp_path / "ours")
    theirs = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs).__name__ == "T5ForConditionalGeneration"
    assert_equal_functions(ours, theirs, cfg.vocab_size, seed)
    again, cfg2 = m.from_pretrained(tmp_path / "ours")
    for (name, a), b in zip(again.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=name)
    assert (cfg2.gated, cfg2.tie_weights, cfg2.head_size) == (gated, tied, cfg.head_size)


def test_sinusoids_have_no_published_form(m, tmp_path):
    cfg = small(m, 0, positions="sinusoidal")
    with pytest.raises(ValueError, match="(?i)sinus|position"):
        m.save_pretrained(m.build_model(cfg), cfg, tmp_path / "ours")


def rewrite(folder, change, name="config.json"):
    """Change config.json, a dict, or the tensors of a published folder."""
    from safetensors.torch import load_file, save_file
    if name == "config.json":
        known = json.loads((folder / name).read_text())
        change(known)
        (folder / name).write_text(json.dumps(known))
    else:
        known = load_file(folder / name)
        change(known)
        save_file(known, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("kind, known", [
    ("v1.0", {}), ("v1.0", {"tie_word_embeddings": True}), ("v1.1", {"tie_word_embeddings": False}),
    ("v1.1", {"tie_word_embeddings": True, "scale_decoder_outputs": False}),
    ("v1.0", {"tie_word_embeddings": True, "scale_decoder_outputs": True})], ids=str)
def test_every_way_to_say_tied_or_not(m, hf, tmp_path, kind, known):
    """Old files have one key or none, new ones two. What transformers makes of each is right."""
    theirs = published(hf, 1, kind)
    theirs.save_pretrained(tmp_path / "hf")

    def change(config):
        for name in ("tie_word_embeddings", "scale_decoder_outputs"):
            config.pop(name, None)
        config.update(known)

    rewrite(tmp_path / "hf", change)
    again = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert_equal_functions(ours, again, cfg.vocab_size, 1)
    assert_equal_functions(ours, theirs, cfg.vocab_size, 1)


def test_old_files_with_copies_load(m, hf, tmp_path):
    """The table three times, a tied head stored, and a bias table for cross-attention that nobody reads."""
    theirs = published(hf, 3, "v1.0")
    theirs.save_pretrained(tmp_path / "hf")

    def change(tensors):
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors["shared.weight"].clone()
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(32, 3)

    rewrite(tmp_path / "hf", change, "model.safetensors")
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert_equal_functions(ours, theirs, cfg.vocab_size, 3)
    assert ours.lm_head.weight is ours.shared.weight


def test_half_precision_files_load_as_float32(m, hf, tmp_path):
    theirs = published(hf, 2, "v1.1").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf")
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_equal_functions(ours, theirs.float(), cfg.vocab_size, 2)


Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
CROSS = "decoder.block.0.layer.1.EncDecAttention.k.weight"
BIAS = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
WI = "decoder.block.0.layer.2.DenseReluDense.wi_1.weight"
NORM = "encoder.final_layer_norm.weight"
BAD_TENSORS = {
    "missing query": (Q, lambda t: t.pop(Q)),
    "missing norm": (NORM, lambda t: t.pop(NORM)),
    "missing distances": (BIAS, lambda t: t.pop(BIAS)),
    "missing table": ("shared.weight", lambda t: t.pop("shared.weight")),
    "unknown": ("encoder.extra.weight", lambda t: t.update({"encoder.extra.weight": torch.zeros(3)})),
    "of v1.0": ("DenseReluDense.wi.weight", lambda t: t.update({WI.replace("wi_1", "wi"): torch.zeros(3)})),
    "one layer too many": ("block.9.layer.0", lambda t: t.update(
        {"encoder.block.9.layer.0.layer_norm.weight": torch.zeros(14)})),
    "a bias where T5 has none": ("SelfAttention.q.bias", lambda t: t.update(
        {Q.replace("weight", "bias"): torch.zeros(3)})),
    "misshapen norm": (NORM, lambda t: t.update({NORM: torch.zeros(5)})),
    "misshapen distances": (BIAS, lambda t: t.update({BIAS: torch.zeros(31, 3)})),
    "transposed query": (Q, lambda t: t.update({Q: t[Q].t().contiguous()})),
    "transposed cross-attention": (CROSS, lambda t: t.update({CROSS: t[CROSS].t().contiguous()})),
    "transposed feed-forward": (WI, lambda t: t.update({WI: t[WI].t().contiguous()})),
    "head too short": ("lm_head", lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].clone()})),
    "another table in the encoder": ("encoder.embed_tokens", lambda t: t.update(
        {"encoder.embed_tokens.weight": t["shared.weight"] + 1})),
    "another table in the decoder": ("decoder.embed_tokens", lambda t: t.update(
        {"decoder.embed_tokens.weight": t["shared.weight"] * 2})),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_wrong_tensors_are_refused_by_name(m, hf, tmp_path, name):
    published(hf, 1, "v1.1", head_size=5, n_embd=14).save_pretrained(tmp_path / "hf")
    named, spoil = BAD_TENSORS[name]
    rewrite(tmp_path / "hf", spoil, "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(named)):
        m.from_pretrained(tmp_path / "hf")


def test_another_head_in_a_tied_model_is_refused(m, hf, tmp_path):
    published(hf, 1, "v1.0").save_pretrained(tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["shared.weight"] + 1}), "model.safetensors")
    with pytest.raises(ValueError, match="lm_head"):
        m.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("key, value", [
    ("model_type", "bart"), ("layer_norm_epsilon", 1e-5), ("relative_attention_num_buckets", 64),
    ("relative_attention_max_distance", 256), ("decoder_start_token_id", 2), ("pad_token_id", 1),
    ("num_decoder_layers", 7), ("feed_forward_proj", "gelu"), ("feed_forward_proj", "gated-silu"),
    ("feed_forward_proj", "gated-relu")])
def test_another_arithmetic_is_refused_by_name(m, hf, tmp_path, key, value):
    """Most of these change no shape, so only config.json can tell."""
    published(hf, 1, "v1.1").save_pretrained(tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda config: config.update({key: value}))
    with pytest.raises(ValueError, match=key):
        m.from_pretrained(tmp_path / "hf")


def test_a_model_that_is_no_t5_is_refused_by_its_name(m, tmp_path):
    """GPT-2's config.json has none of T5's keys; what is wrong with it is model_type."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8, "n_layer": 1}))
    with pytest.raises(ValueError, match="model_type"):
        m.from_pretrained(tmp_path / "hf")


def test_a_damaged_published_folder_is_one_line(m, hf, tmp_path, capsys):
    published(hf, 1, "v1.0").save_pretrained(tmp_path / "hf")
    whole = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    assert "hf" in complaint(m, capsys, "--load", tmp_path / "hf", "--prompt", "x")
    for text in ("{", "{}"):
        (tmp_path / "hf" / "config.json").write_text(text)
        assert "hf" in complaint(m, capsys, "--load", tmp_path / "hf", "--prompt", "x")


# Counted once from the published files: t5-v1_1-small, -base, -large (and Flan-T5, which has their shape).
@pytest.mark.parametrize("preset, expected", [
    ("t5-small", 76_961_152), ("t5-base", 247_577_856), ("t5-large", 783_150_080)])
def test_parameter_counts_of_published_models(m, preset, expected):
    """Counted on the meta device, where a model has shapes and no memory."""
    with torch.device("meta"):
        model = m.T5(m.Config(**m.PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters()) == expected


# --- 2. Parts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])  # 1e-4: there eps decides
def test_rms_norm(m, scale):
    torch.manual_seed(0)
    norm = m.RMSNorm(7).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(7))
    x = scale * torch.randn(2, 3, 7, dtype=torch.float64) + scale  # a mean that must not be taken out
    expected = x / (x.pow(2).sum(-1, keepdim=True) / 7 + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (7,), norm.weight, 1e-6), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_transformers(m, hf, causal):
    from transformers.models.t5.modeling_t5 import T5Attention
    distance = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(distance, bidirectional=not causal)
    assert m.relative_bucket(distance, causal).tolist() == expected.tolist()
    grid = distance[:20, None] + 4 * distance[None, 295:305]  # any shape
    assert m.relative_bucket(grid, causal).shape == grid.shape


def test_buckets_by_hand(m):
    def bucket(distance, causal):
        return int(m.relative_bucket(torch.tensor([distance]), causal)[0])

    # Causal: 16 exact ones, then 16 + floor(16 * log(n/16) / log(8)). 2^(3/16 * 1) * 16 = 18.2: 19 begins bucket 17.
    assert [bucket(-n, True) for n in (0, 1, 15, 16, 18, 19, 127, 128, 5000)] == [0, 1, 15, 16, 16, 17, 31, 31, 31]
    assert bucket(3, True) == 0  # the future is masked; its bucket is that of distance 0
    # Both ways: 8 exact ones on a side, then 8 + floor(8 * log(n/8) / log(16)); sqrt(2) * 8 = 11.3.
    assert [bucket(-n, False) for n in (0, 1, 7, 8, 11, 12, 127, 5000)] == [0, 1, 7, 8, 8, 9, 15, 15]
    assert [bucket(n, False) for n in (1, 7, 8, 11, 12, 127, 5000)] == [17, 23, 24, 24, 25, 31, 31]


def test_sinusoids_by_a_slow_loop(m):
    C, positions = 10, [0, 1, 2, 7, 63]
    found = m.sinusoids(torch.tensor(positions), C)
    assert found.shape == (5, C)
    for row, position in zip(found.tolist(), positions, strict=True):
        angles = [position / 10_000 ** (2 * i / C) for i in range(C // 2)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=2e-5)
    rows = torch.tensor([[3, 0, 5], [1, 9, 2]])
    torch.testing.assert_close(m.sinusoids(rows, C)[1, 1], m.sinusoids(torch.tensor([9]), C)[0])


def test_a_shift_turns_every_pair_by_a_fixed_angle(m):
    C, shift = 12, 5
    table = m.sinusoids(torch.arange(60), C).double()
    speed = [10_000 ** (-2 * i / C) for i in range(C // 2)]
    for i, w in enumerate(speed):
        turn = torch.tensor([[math.cos(shift * w), math.sin(shift * w)], [-math.sin(shift * w), math.cos(shift * w)]],
                            dtype=torch.float64)
        pairs = table[:, [i, C // 2 + i]]
        torch.testing.assert_close(pairs[:-shift] @ turn.T, pairs[shift:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_attention_equals_torch_multihead_attention(m, seed, cross):
    H, D, T = 3, (4, 5, 6)[seed], 7
    S = 9 if cross else T
    cfg = m.Config(n_head=H, n_embd=H * D, head_size=D, ffn_size=20, vocab_size=11)
    torch.manual_seed(seed)
    ours = m.T5Attention(cfg).double().eval()
    theirs = nn.MultiheadAttention(H * D, H, bias=False, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({"in_proj_weight": torch.cat((ours.q.weight, ours.k.weight, ours.v.weight)),
                            "out_proj.weight": ours.o.weight})
    x = torch.randn(2, T, H * D, dtype=torch.float64)
    y = torch.randn(2, S, H * D, dtype=torch.float64) if cross else x
    bias = torch.randn(1, H, T, S, dtype=torch.float64)
    k, v = ours.keys_values(y)
    assert k.shape == v.shape == (2, H, S, D)
    expected, weights = theirs(x, y, y, attn_mask=bias.repeat(2, 1, 1, 1).flatten(0, 1), average_attn_weights=False)
    torch.testing.assert_close(ours(x, k, v, bias), expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(ours.weights(x, k, bias), weights, atol=1e-12, rtol=1e-10)


def test_attention_whose_heads_do_not_add_up_to_the_width(m):
    """Head by head, with matrices cut by hand: H * D = 15, C = 14."""
    H, D, C, T, S = 3, 5, 14, 4, 6
    torch.manual_seed(0)
    ours = m.T5Attention(m.Config(n_head=H, n_embd=C, head_size=D, ffn_size=20, vocab_size=11)).double().eval()
    x, y = torch.randn(2, T, C, dtype=torch.float64), torch.randn(2, S, C, dtype=torch.float64)
    bias = torch.randn(1, H, T, S, dtype=torch.float64)
    parts = []
    for h in range(H):
        q, k, v = (part @ matrix.weight[h * D:(h + 1) * D].T
                   for part, matrix in ((x, ours.q), (y, ours.k), (y, ours.v)))
        parts.append((q @ k.mT / math.sqrt(D) + bias[:, h]).softmax(-1) @ v)
    expected = torch.cat(parts, -1) @ ours.o.weight.T
    torch.testing.assert_close(ours(x, *ours.keys_values(y), bias), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_by_hand(m, gated):
    torch.manual_seed(0)
    layer = m.FeedForward(m.Config(n_head=2, n_embd=14, ffn_size=22, vocab_size=11, gated=gated)).double().eval()
    x = torch.randn(2, 3, 14, dtype=torch.float64)
    if gated:
        a, b = x @ layer.wi_0.weight.T, x @ layer.wi_1.weight.T
        hidden = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3))) * b
    else:
        hidden = (x @ layer.wi.weight.T).clamp(min=0)
    torch.testing.assert_close(layer(x), hidden @ layer.wo.weight.T, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
@pytest.mark.parametrize("seed", SEEDS)
def test_decoder_causality_by_perturbation(m, seed, positions):
    cfg = small(m, seed, positions=positions)
    model = wide_model(m, cfg)
    src, tgt = random_ids(seed, cfg.vocab_size, 2, 6), random_ids(seed + 9, cfg.vocab_size, 2, 10)
    with torch.no_grad():
        before = model(src, tgt)
        assert before.shape == (2, 10, cfg.vocab_size)
        for t in range(10):
            changed = tgt.clone()
            changed[:, t] = (changed[:, t] + 1) % cfg.vocab_size
            after = model(src, changed)
            torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-12, rtol=1e-12)
            # Every later position looks back at t: all of them move.
            assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
def test_the_encoder_sees_both_sides_and_the_decoder_all_of_it(m, positions):
    cfg = small(m, 1, positions=positions)
    model = wide_model(m, cfg)
    src, tgt = random_ids(1, cfg.vocab_size, 2, 8), random_ids(2, cfg.vocab_size, 2, 6)
    with torch.no_grad():
        memory, before = model.encode(src), model(src, tgt)
        assert memory.shape == (2, 8, cfg.n_embd)
        for s in range(8):
            changed = src.clone()
            changed[:, s] = (changed[:, s] + 1) % cfg.vocab_size
            assert ((model.encode(changed) - memory).abs().amax(-1) > 1e-9).all()
            assert ((model(changed, tgt) - before).abs().amax(-1) > 1e-9).all()
            alone = src.clone()  # row 0 does not see row 1
            alone[1, s] = (alone[1, s] + 1) % cfg.vocab_size
            torch.testing.assert_close(model(alone, tgt)[0], before[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
def test_order_matters_on_both_sides(m, positions):
    cfg = small(m, 3, positions=positions)
    model = wide_model(m, cfg)
    src, tgt = torch.tensor([[3, 9, 4, 7, 2, 5]]), torch.tensor([[0, 9, 4, 7, 2, 5]])
    order = [2, 1, 0, 3, 4, 5]
    with torch.no_grad():
        before = model(src, tgt)[0, -1]
        assert (model(src[:, order], tgt)[0, -1] - before).abs().max() > 1e-3
        assert (model(src, tgt[:, order])[0, -1] - before).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
@pytest.mark.parametrize("seed", SEEDS)
def test_padding_changes_nothing(m, seed, positions, side):
    """Logits are those of the row alone, whatever stands in the pads, and nothing is NaN."""
    cfg = small(m, seed, positions=positions)
    model = wide_model(m, cfg)
    rows, tgt = sources_of(seed, cfg.vocab_size), random_ids(seed, cfg.vocab_size, 4, 7)
    with torch.no_grad():
        for width in (9, 12):
            ids, mask = padded(rows, side, width=width)
            logits = model(ids, tgt, mask)
            assert logits.isfinite().all()
            for i, row in enumerate(rows):
                torch.testing.assert_close(logits[i], model(row[None], tgt[i:i + 1])[0], atol=1e-11, rtol=1e-10)
            noise = torch.where(mask, ids, random_ids(seed + 77, cfg.vocab_size, *ids.shape))
            torch.testing.assert_close(model(noise, tgt, mask), logits, atol=1e-12, rtol=1e-12)
        # Holes in the middle, for which a sinusoid has to count real tokens, are padding like any other.
        mask = torch.tensor([[True, True, False, True, False, True]])
        ids = random_ids(5, cfg.vocab_size, 1, 6)
        if positions == "sinusoidal":
            expected = model(ids[mask][None], tgt[:1])
            torch.testing.assert_close(model(ids, tgt[:1], mask), expected, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_with_padding_equal_those_without(m, side):
    cfg = small(m, 1)
    rows, tgt = sources_of(1, cfg.vocab_size), random_ids(1, cfg.vocab_size, 4, 7)
    one, other = wide_model(m, cfg), wide_model(m, cfg)
    ids, mask = padded(rows, side, width=11)
    one(ids, tgt, mask).log_softmax(-1)[..., 3].sum().backward()
    for i, row in enumerate(rows):
        other(row[None], tgt[i:i + 1]).log_softmax(-1)[..., 3].sum().backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-8, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
def test_a_source_of_padding_alone_gives_no_nan(m, positions, dtype):
    cfg = small(m, 1, positions=positions)
    model = wide_model(m, cfg, dtype)
    ids, tgt = random_ids(1, cfg.vocab_size, 2, 5), random_ids(2, cfg.vocab_size, 2, 4)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    logits = model(ids, tgt, mask)
    assert logits.isfinite().all()
    if dtype == torch.float64:
        torch.testing.assert_close(logits[0], model(ids[:1], tgt[:1])[0], atol=1e-11, rtol=1e-10)
    logits.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_only_block_0_of_each_stack_holds_distances(m):
    names = {name: tuple(t.shape) for name, t in m.T5(small(m, 1, n_layer=3)).state_dict().items()}
    tables = {name: size for name, size in names.items() if "relative" in name or "position" in name}
    assert tables == {f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 3)
                      for stack in ("encoder", "decoder")}
    assert not [name for name in names if name.endswith(".bias")]  # T5 has no additive biases at all
    names = m.T5(small(m, 1, n_layer=3, positions="sinusoidal")).state_dict()
    assert not [name for name in names if "relative" in name or "position" in name]


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_table_of_distances_serves_every_layer(m, stack):
    """Silence what block 0's own attention writes: the table still acts through block 1, and not the other stack's."""
    cfg = small(m, 1, n_layer=2)
    model = wide_model(m, cfg)
    src, tgt = random_ids(1, cfg.vocab_size, 1, 8), random_ids(2, cfg.vocab_size, 1, 8)
    part = getattr(model, stack)["block"][0].layer[0]["SelfAttention"]
    with torch.no_grad():
        part.o.weight.zero_()
        memory, before = model.encode(src), model(src, tgt)
        part.relative_attention_bias.weight.add_(torch.randn(32, 3))
        assert (model(src, tgt) - before).abs().max() > 1e-4
        assert ((model.encode(src) - memory).abs().max() > 1e-4) == (stack == "encoder")


def test_a_tied_head_is_one_tensor(m):
    model = m.build_model(small(m, 0, tie_weights=True))
    assert model.lm_head.weight is model.shared.weight
    assert len([p for p in model.parameters() if p.shape == model.shared.weight.shape]) == 1
    model = m.build_model(small(m, 0, tie_weights=False))
    assert model.lm_head.weight is not model.shared.weight
    assert not torch.equal(model.lm_head.weight, model.shared.weight)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_parameter_formula(m, seed, gated, tied):
    """V*C (twice if untied), 64*H; 4*C*H*D and 8*C*H*D for attention; 2 or 3 times C*F in each stack; the norms."""
    rng = random.Random(seed)
    L, H, C, D, F_, V = (rng.randint(1, 5), rng.randint(1, 7), rng.randint(8, 40), rng.randint(2, 9),
                         rng.randint(5, 50), rng.randint(20, 99))
    model = m.T5(m.Config(n_layer=L, n_head=H, n_embd=C, head_size=D, ffn_size=F_, vocab_size=V, gated=gated,
                          tie_weights=tied))
    matrices = V * C * (1 if tied else 2) + 64 * H + L * (12 * C * H * D + 2 * (3 if gated else 2) * C * F_)
    norms = L * 5 * C + 2 * C
    assert sum(p.numel() for p in model.parameters()) == matrices + norms
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == matrices


@pytest.mark.parametrize("changes", [{}, {"gated": True, "tie_weights": False}, {"positions": "sinusoidal"}], ids=str)
def test_all_parameters_get_gradients(m, changes):
    cfg = small(m, 0, n_layer=2, **changes)
    model = m.build_model(cfg)
    src, targets = random_ids(0, cfg.vocab_size, 3, 9), random_ids(1, cfg.vocab_size, 3, 8)
    m.compute_loss(model, (src, targets), cfg)[0].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("C", [64, 192])
def test_a_fresh_model_starts_near_a_uniform_guess(m, C, tied):
    """Logits of about variance 1, whatever the width. (A tied one guesses that every token is repeated: a bit more.)"""
    cfg = m.Config(n_layer=2, n_head=4, n_embd=C, vocab_size=500, tie_weights=tied)
    model = m.build_model(cfg).eval()
    src, targets = random_ids(0, 500, 16, 12), random_ids(1, 500, 16, 11)
    with torch.no_grad():
        logits = model(src, targets)
        loss, count, _ = m.compute_loss(model, (src, targets), cfg)
    assert 0.7 < logits.std() < 1.4
    assert math.log(500) < loss / count < math.log(500) + 2


def test_the_seed_decides_the_weights(m):
    a, b, c = (m.build_model(m.Config(seed=seed, vocab_size=11)).state_dict() for seed in (4, 4, 5))
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
def test_dropout_acts_in_training_only(m, positions):
    cfg = small(m, 1, dropout=0.3, positions=positions)
    model = m.build_model(cfg)
    src, tgt = random_ids(1, cfg.vocab_size, 2, 5), random_ids(2, cfg.vocab_size, 2, 4)
    model.train()
    assert not torch.equal(model(src, tgt), model(src, tgt))
    model.eval()
    assert torch.equal(model(src, tgt), model(src, tgt))


# --- 3. Objective ----------------------------------------------------------------------------------------------------
def batch_of(seed, vocab, sources=(4, 9, 1, 6), targets=(7, 2, 10, 1)):
    return (padded([random_ids(seed * 100 + n, vocab, n) for n in sources])[0],
            padded([random_ids(seed * 100 + 50 + n, vocab, n, lowest=1) for n in targets])[0])


@torch.no_grad()
def slow_losses(model, batch):
    """[(log-probs (V,) of a position, its right token)], row by row without any padding."""
    found = []
    for source, target in zip(*(part.tolist() for part in batch), strict=True):
        source, target = [i for i in source if i], [i for i in target if i]
        logits = model(torch.tensor([source]), torch.tensor([[0, *target[:-1]]]))[0]
        found += [(row.log_softmax(-1), token) for row, token in zip(logits, target, strict=True)]
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_is_the_sum_over_the_tokens_of_the_targets(m, seed):
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    batch = batch_of(seed, cfg.vocab_size)
    loss, count, metrics = m.compute_loss(model, batch, cfg)
    known = slow_losses(model, batch)
    assert int(count) == len(known) == 20 and isinstance(metrics, dict)
    assert loss.item() == pytest.approx(-sum(float(table[token]) for table, token in known), rel=1e-10)
    wider = tuple(F.pad(part, (0, 3)) for part in batch)
    again, count, _ = m.compute_loss(model, wider, cfg)
    assert again.item() == pytest.approx(loss.item(), rel=1e-10) and int(count) == 20


@pytest.mark.parametrize("eps", [0.1, 0.35])
def test_label_smoothing_in_training_only(m, eps):
    """1 - eps on the right token plus eps / V on every token, pads not counted."""
    cfg = small(m, 1, label_smoothing=eps)
    model = wide_model(m, cfg)
    batch = batch_of(1, cfg.vocab_size)
    known = slow_losses(model, batch)
    plain = -sum(float(table[token]) for table, token in known)
    smooth = -sum(float((1 - eps) * table[token] + eps / cfg.vocab_size * table.sum()) for table, token in known)
    assert m.compute_loss(model.train(), batch, cfg)[0].item() == pytest.approx(smooth, rel=1e-10)
    assert m.compute_loss(model.eval(), batch, cfg)[0].item() == pytest.approx(plain, rel=1e-10)
    assert abs(smooth - plain) > 0.1


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_halves_add_up(m, eps):
    cfg = small(m, 2, label_smoothing=eps)
    model = wide_model(m, cfg).train()
    batch = batch_of(2, cfg.vocab_size)
    whole, count, _ = m.compute_loss(model, batch, cfg)
    parts = [m.compute_loss(model, tuple(t[half] for t in batch), cfg) for half in (slice(0, 1), slice(1, 4))]
    assert sum(part[0].item() for part in parts) == pytest.approx(whole.item(), rel=1e-10)
    assert sum(int(part[1]) for part in parts) == int(count)


def test_prepare_trims_the_padding(m):
    cfg = small(m, 1)
    model = wide_model(m, cfg)
    batch = batch_of(1, cfg.vocab_size)
    wide = tuple(F.pad(part, (0, 5)) for part in batch)
    trimmed = m.prepare(wide, torch.Generator().manual_seed(0))
    assert same(tuple(trimmed), batch)
    assert m.compute_loss(model, trimmed, cfg)[0].item() == pytest.approx(
        m.compute_loss(model, wide, cfg)[0].item(), rel=1e-10)


def holes_of(source, target, sentinels):
    """Put what the target says into the source's holes. -> (the text, [length of each hole]); asserts the form."""
    assert source[-1] == 1 and target[-1] == 1 and 1 not in source[:-1] + target[:-1]
    source, target, text, lengths = source[:-1], target[:-1], [], []
    order = [i for i in source if i in sentinels]
    assert order == [i for i in target if i in sentinels] == list(sentinels)[:len(order)]
    assert source[0] not in sentinels and source[-1] in sentinels and target[0] in sentinels
    for token in source:
        if token in sentinels:
            at = target.index(token) + 1
            piece = list(itertools.takewhile(lambda i: i not in sentinels, target[at:]))
            assert piece  # no empty hole
            lengths.append(len(piece))
            text += piece
        else:
            text.append(token)
    # No two holes touch: between two sentinels of the source stands text.
    assert not any(a in sentinels and b in sentinels for a, b in zip(source, source[1:], strict=False))
    return text, lengths


# T, tokens missing = 15 %, holes = a third of them; at least one of each, and not more than there are sentinels.
@pytest.mark.parametrize("T, missing, holes", [(2, 1, 1), (3, 1, 1), (7, 1, 1), (20, 3, 1), (48, 7, 2), (96, 14, 5),
                                               (230, 34, 11), (1000, 150, 32)])
def test_corrupted_spans_give_the_text_back(m, T, missing, holes):
    sentinels = range(2, 34)
    ids = random_ids(T, 300, 17, T, lowest=34)
    source, target = m.corrupt_spans(ids, torch.Generator().manual_seed(T))
    assert source.shape == (17, T - missing + holes + 1) and target.shape == (17, missing + holes + 1)
    assert source.dtype == target.dtype == torch.int64
    for row, left, right in zip(ids.tolist(), source.tolist(), target.tolist(), strict=True):
        text, lengths = holes_of(left, right, sentinels)
        assert text == row and len(lengths) == holes and sum(lengths) == missing


def test_corruption_is_a_function_of_the_generator(m):
    ids = random_ids(0, 300, 5, 60, lowest=34)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = m.corrupt_spans(ids, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert same(first, m.corrupt_spans(ids, torch.Generator().manual_seed(3)))
    assert same(first, tuple(m.prepare((ids,), torch.Generator().manual_seed(3))))
    other = m.corrupt_spans(ids, torch.Generator().manual_seed(4))
    assert not torch.equal(first[0], other[0])
    # Rows of one draw differ in their holes too.
    same_rows = m.corrupt_spans(ids[:1].repeat(8, 1), torch.Generator().manual_seed(0))[0]
    assert len({tuple(row) for row in same_rows.tolist()}) >= 7


def test_every_position_is_sometimes_in_a_hole(m):
    """Away from the ends about 15 % each; the first token never, the last one always."""
    T, R = 96, 6000
    ids = (torch.arange(T) + 34).repeat(R, 1)
    _, target = m.corrupt_spans(ids, torch.Generator().manual_seed(0))
    rates = (torch.bincount(target[target >= 34] - 34, minlength=T) / R).tolist()
    assert rates[0] == 0 and rates[-1] == 1 and sum(rates) == pytest.approx(14)
    assert all(0.09 < rate < 0.20 for rate in rates[8:-12])


def test_all_ways_to_cut_are_equally_likely(m):
    """8 tokens, half of them missing in 2 holes: text and holes are each split 1+3, 2+2 or 3+1; nine cases."""
    ids = (torch.arange(8) + 34).repeat(9000, 1)
    source, target = m.corrupt_spans(ids, torch.Generator().manual_seed(0), rate=0.5, length=2.0)
    counts = {}
    for left, right in zip(source.tolist(), target.tolist(), strict=True):
        _, lengths = holes_of(left, right, range(2, 34))
        key = (left.index(2), lengths[0])
        counts[key] = counts.get(key, 0) + 1
    assert set(counts) == set(itertools.product((1, 2, 3), (1, 2, 3)))
    assert all(850 < count < 1150 for count in counts.values())


@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
def test_a_few_pairs_can_be_learned_by_heart(m, positions):
    """The target is no function of its own past: without the source it cannot be known."""
    cfg = m.Config(n_layer=1, n_head=2, n_embd=32, vocab_size=23, positions=positions)
    model = m.build_model(cfg)
    batch = batch_of(3, 23, sources=(3, 5, 6, 7, 4, 8), targets=(4, 6, 3, 7, 5, 8))
    batch[1][:, 0] = 7
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss, count, _ = m.compute_loss(model, batch, cfg)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    assert loss / count < 0.05
    out = m.generate(model, batch[0], 8, mask=batch[0] != 0)
    for row, target in zip(out.tolist(), batch[1].tolist(), strict=True):
        target = [i for i in target if i]
        assert row[:len(target)] == target


# --- 4. Data ---------------------------------------------------------------------------------------------------------
def test_rows_end_with_eos_directly_behind_the_text(m):
    tokenizer = m.ToyTokenizer()
    pairs = [("40215", "forty thousand two hundred fifteen"), ("7", "seven"), ("123456", "nine"), ("88", "ten ten ten")]
    source, targets = m.sequence_rows(pairs, tokenizer, 16)
    assert source.dtype == targets.dtype == torch.int64 and len(source) == len(targets) == 4
    for rows, side in ((source, 0), (targets, 1)):
        for row, pair in zip(rows.tolist(), pairs, strict=True):
            ids = tokenizer.encode(pair[side])
            assert row == ids + [1] + [0] * (len(row) - len(ids) - 1)
    assert source.size(1) == 7 and targets.size(1) == 6  # no wider than needed


def test_rows_that_are_too_long_are_cut_and_still_end(m):
    tokenizer = m.ToyTokenizer()
    pairs = [("123456", "one two three four five six seven"), ("1234", "one two three four"), ("12345", "one")]
    source, targets = m.sequence_rows(pairs, tokenizer, 5)
    one = tokenizer.encode("1")[0]
    assert source.tolist() == [[one, one + 1, one + 2, one + 3, 1]] * 3
    known = tokenizer.encode("one two three four") + [1]
    assert targets.tolist() == [known, known, tokenizer.encode("one") + [1, 0, 0, 0]]


def texts_of(tokenizer, rows):
    return [tokenizer.decode([i for i in row if i > 1]) for row in rows.tolist()]


def words_of(n):
    """English names by another road than the script's: three digits at a time."""
    units = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
             "seventeen eighteen nineteen").split()
    tens = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()

    def below_1000(k):
        words = [units[k // 100], "hundred"] if k >= 100 else []
        k %= 100
        if k >= 20:
            words.append(tens[k // 10])
            k %= 10
        return words + ([units[k]] if k else [])

    words = below_1000(n // 1000) + ["thousand"] if n >= 1000 else []
    return " ".join(words + below_1000(n % 1000)) or "zero"


def held_out(n):
    return n != 0 and int(hashlib.sha256(str(n).encode()).hexdigest(), 16) % 10 == 0


def test_make_data_numbers(m):
    train, val, tokenizer, info, test = m.make_data(m.Config())
    sources = [set(map(int, texts_of(tokenizer, part[0]))) for part in (train, val)]
    assert not any(map(held_out, sources[0])) and all(map(held_out, sources[1])) and all(map(held_out, test))
    assert 0 in sources[0] and len(train[0]) > 10_000 and len(val[0]) > 1000 and len(test) > 500
    for part in (train, val):
        for n, name in list(zip(texts_of(tokenizer, part[0]), texts_of(tokenizer, part[1]), strict=True))[:500]:
            assert name == words_of(int(n))
    assert info["name"] == "numbers"
    again = m.make_data(m.Config())
    assert same(train, again[0]) and same(val, again[1]) and info == again[3] and test == again[4]


def test_splits_of_a_file_are_disjoint(m, tmp_path):
    """Lines that occur several times, also with several targets, are on one side; every line is used once."""
    pairs = toy_pairs(120) * 2 + [(a, b + " again") for a, b in toy_pairs(120)]
    random.Random(0).shuffle(pairs)
    write_pairs(tmp_path / "pairs.tsv", pairs)
    train, val, tokenizer, info, test = m.make_data(m.Config(data="pairs.tsv", block_size=64, vocab_size=400))
    splits = [list(zip(*(texts_of(tokenizer, side) for side in part), strict=True)) for part in (train, val)] + [test]
    assert sorted(tuple(pair) for part in splits for pair in part) == sorted(pairs)
    sources = [{pair[0] for pair in part} for part in splits]
    assert all(sources) and not any(a & b for a, b in itertools.combinations(sources, 2))
    assert info["name"] == "pairs.tsv" and re.fullmatch("[0-9a-f]{64}", info["sha256"])
    # Sorted by length, so that neighbours need little padding.
    lengths = (train[0] != 0).sum(1).tolist()
    assert lengths == sorted(lengths)
    write_pairs(tmp_path / "pairs.tsv", [*pairs, ("one more", "line")])
    assert m.make_data(m.Config(data="pairs.tsv", block_size=64))[3]["sha256"] != info["sha256"]


def test_held_out_text_stays_out_of_the_vocabulary(m, tmp_path):
    """A word that only held-out lines have, and have often, must not become a token."""
    pairs = [(f"line {i}", "same words in all of them") for i in range(200)]
    _, val, _, _, test = m.make_data(m.Config(data=write_pairs(tmp_path / "a.tsv", pairs) or "a.tsv", block_size=64))
    hidden = {pair[0] for pair in test}
    write_pairs(tmp_path / "b.tsv", [(a, "xylophone " * 3 if a in hidden else b) for a, b in pairs])
    tokenizer = m.make_data(m.Config(data="b.tsv", block_size=64))[2]
    assert len(hidden) > 5 and len(tokenizer.encode("xylophone")) >= 9 > len(tokenizer.encode("same words in all"))


def test_make_data_span(m, tmp_path):
    text = toy_text(20_000)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    cfg = m.Config(objective="span", data="text.txt", block_size=24, vocab_size=320)
    train, val, tokenizer, info, test = m.make_data(cfg)
    assert len(train) == len(val) == 1 and train[0].size(1) == val[0].size(1) == 24 and test is None
    assert tokenizer.n_vocab <= 320 and train[0].min() >= 34 and train[0].max() < tokenizer.n_vocab
    assert tokenizer.decode(train[0][7].tolist()) in text[:18_000]
    assert tokenizer.decode(val[0].flatten().tolist()) in text[18_000:]
    assert torch.equal(train[0][0, 1:], train[0][1, :-1])  # every start is a row
    assert torch.equal(val[0][:-1, -1], val[0].flatten()[23:-24:24])  # and to validate, no token twice
    assert info["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    source, target = m.prepare((val[0],), torch.Generator().manual_seed(0))
    assert "<0>" in tokenizer.decode(source[0].tolist()) and "<0>" in tokenizer.decode(target[0].tolist())


def test_get_batch_is_a_function_of_seed_and_step(m):
    data = (torch.arange(1000).view(200, 5), torch.arange(1000).view(200, 5) + 1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = m.get_batch(data, 16, 3, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(first, m.get_batch(data, 16, 3, 7))
    others = [m.get_batch(data, 16, seed, step) for seed, step in ((3, 8), (4, 7), (7, 3), (2, 8))]
    assert all(not torch.equal(first[0], other[0]) for other in others)
    assert first[0].shape == (16, 5) and torch.equal(first[1], first[0] + 1)  # the same rows of both tensors
    assert len(set(first[0][:, 0].tolist())) == 16


@pytest.mark.parametrize("n, rows", [(200, 4), (200, 16), (61, 30)])
def test_every_row_is_about_equally_likely(m, n, rows):
    data, steps = (torch.arange(n)[:, None],), 4000
    drawn = torch.cat([m.get_batch(data, rows, 0, step)[0][:, 0] for step in range(steps)])
    counts = torch.bincount(drawn, minlength=n)
    mean = steps * rows / n
    assert counts.sum() == steps * rows
    assert counts.min() > mean - 6 * math.sqrt(mean) and counts.max() < mean + 6 * math.sqrt(mean)


def test_rows_of_a_batch_are_neighbours_but_not_always_the_same_ones(m):
    data = (torch.arange(4000)[:, None],)
    batches = [m.get_batch(data, 10, 1, step)[0][:, 0] for step in range(300)]
    # On a ring: the widest gap between rows of a batch is nearly the whole ring when they are neighbours.
    for batch in batches:
        edges = batch.sort().values
        gaps = torch.cat((edges.diff(), edges[:1] + 4000 - edges[-1:]))
        assert gaps.max() > 4000 - 400
    spread = [int(batch.max() - batch.min()) for batch in batches]
    assert sorted(spread)[150] > 20  # mixed, not ten rows in a row
    assert len({tuple(batch.tolist()) for batch in batches}) == 300


def test_a_batch_larger_than_the_data_set_trains(m, tmp_path):
    data = batch_of(0, 23)
    cfg = m.Config(out=str(tmp_path / "run"), n_layer=1, n_head=2, n_embd=16, vocab_size=23, batch_size=16,
                   grad_accum=2, max_steps=3, warmup_steps=1, eval_every=3, device="cpu")
    result = m.train(m.build_model(cfg), cfg, data, data, m.compute_loss)
    assert all(math.isfinite(row["loss"]) for row in result["history"]) and math.isfinite(result["val_loss"])


def test_cosine_learning_rate(m):
    cfg = m.Config(lr=2.0, warmup_steps=10, max_steps=111, min_lr_ratio=0.1)
    rates = [m.lr_at(step, cfg) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9] == pytest.approx(2.0) and max(rates) == pytest.approx(2.0)
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)  # half-way between steps 10 and 110
    assert rates[110] == pytest.approx(0.2)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert m.lr_at(0, m.Config(lr=2.0, warmup_steps=0)) == pytest.approx(2.0)
    assert m.lr_at(99, m.Config(lr=2.0, warmup_steps=0, max_steps=100)) == pytest.approx(0.0, abs=1e-12)


def test_inverse_square_root_learning_rate(m):
    """Equation 3 of the 2017 paper with s = step + 1, scaled so that the peak is lr."""
    cfg = m.Config(lr=2.0, warmup_steps=16, max_steps=100, schedule="rsqrt")
    rates = [m.lr_at(step, cfg) for step in range(100)]
    for step, rate in enumerate(rates):
        s = step + 1
        assert rate == pytest.approx(2.0 * 16 ** 0.5 * min(s ** -0.5, s * 16 ** -1.5))
    assert rates[0] == pytest.approx(0.125) and rates[15] == pytest.approx(2.0) == max(rates)
    assert rates[63] == pytest.approx(1.0) and rates[99] == pytest.approx(0.8)
    assert rates[:16] == sorted(rates[:16]) and rates[15:] == sorted(rates[15:], reverse=True)


def random_unicode(rng, length):
    blocks = ((32, 126), (161, 591), (0x400, 0x4FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (0x600, 0x6FF), (9, 13))
    return "".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(length))


def test_text_tokenizer_round_trip(m):
    merges = m.train_bpe(toy_text(8000), 300)
    tokenizer, rng = m.TextTokenizer(merges), random.Random(0)
    assert tokenizer.n_vocab == 34 + 256 + len(merges) and tuple(tokenizer.eos_ids) == (1,)
    texts = [random_unicode(rng, rng.randint(1, 40)).strip() or "x" for _ in range(200)] + ["", "a", "  b".strip()]
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(34 <= i < tokenizer.n_vocab for i in ids)  # never a special token
        assert tokenizer.decode(ids) == text
    ids = tokenizer.encode("the cat sat")
    # A word is the same tokens at the start and inside.
    assert len(ids) < 8 and ids == [i for word in ("the", "cat", "sat") for i in tokenizer.encode(word)]
    assert tokenizer.decode([*ids, 1, 0, 0]) == "the cat sat"
    assert m.tokenizer_from(tokenizer.spec).encode(texts[0]) == tokenizer.encode(texts[0])
    assert m.tokenizer_from(json.loads(json.dumps(tokenizer.spec))).encode("the cat") == tokenizer.encode("the cat")


def test_toy_tokenizer(m):
    tokenizer = m.ToyTokenizer()
    for n in (0, 7, 13, 90, 40_215, 300_004, 999_999):
        assert tokenizer.decode(tokenizer.encode(str(n))) == str(n)
        assert tokenizer.decode(tokenizer.encode(words_of(n))) == words_of(n) == m.number_to_words(n)
        assert not set(tokenizer.encode(str(n))) & set(tokenizer.encode(words_of(n)))
        assert min(tokenizer.encode(str(n)) + tokenizer.encode(words_of(n))) > 1
    assert tuple(tokenizer.eos_ids) == (1,) and tokenizer.n_vocab == 46
    with pytest.raises(ValueError, match="eleventy"):
        tokenizer.encode("eleventy")


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    """-> (folder with tokenizer.json, the library's tokenizer), as T5's: NFKC, words at white space, ▁ in front."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.Unigram())
    library.normalizer = tokenizers.normalizers.NFKC()
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()])
    library.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"],
                                                 unk_token="<unk>", show_progress=False)
    library.train_from_iterator(toy_text(20_000).splitlines(), trainer)
    folder = tmp_path_factory.mktemp("unigram")
    library.save(str(folder / "tokenizer.json"))
    return folder, library


def test_unigram_equals_the_library(m, unigram):
    folder, library = unigram
    ours, rng, unknown = m.load_tokenizer(folder), random.Random(0), 0
    assert ours.n_vocab == library.get_vocab_size() and tuple(ours.eos_ids) == (1,)
    texts = [toy_text(200, seed).replace("\n", " ") for seed in range(1, 6)]
    texts += ["".join(rng.choices("abcdeghilmnorstuw éxyzßΩ ", k=60)) for _ in range(150)]
    texts += ["the  cat   sat", " the cat ", "xyz the q", "QQQQ", "ﬁne ½ ｃａｔ", "", "cat\tsat\nmat"]
    texts += ["日本 cat日sat本"]
    for text in texts:
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, text
        assert ours.decode(expected).strip() == library.decode(expected).strip(), text
        unknown += 2 in expected
    assert unknown > 50
    for text in (toy_text(100, 9).replace("\n", " "), "the cat sat"):
        assert ours.decode(ours.encode(text)) == text
        assert ours.decode([*ours.encode(text), 1, 0]) == text


@pytest.mark.parametrize("scores, word, expected", [
    # The example of the paper's kind: ▁hug+s = -5.5 beats ▁h+ug+s = -7 and ▁hu+gs = -6.
    ({"▁h": -3, "ug": -2, "s": -2, "▁hug": -3.5, "▁hu": -2, "gs": -4}, "hugs", ["▁hug", "s"]),
    # The longest piece first would take ▁ab and then pay for c and d.
    ({"▁ab": -1, "▁a": -2, "bcd": -2, "c": -4, "d": -4, "b": -4}, "abcd", ["▁a", "bcd"]),
    ({"▁": -1, "a": -1}, "aqqa", ["▁", "a", "<unk>", "a"]),
    # An unknown character costs 10 more than the worst piece, here 24: with "a" and "bc" 26 together.
    ({"▁": -1, "a": -1, "bc": -1, "aqb": -14, "c": -11}, "aqbc", ["▁", "aqb", "c"]),
    ({"▁": -1, "a": -1, "bc": -1, "aqb": -14, "c": -13}, "aqbc", ["▁", "a", "<unk>", "bc"])])
def test_unigram_by_hand(m, scores, word, expected):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scores.items()]
    names = [piece for piece, _ in pieces]
    assert [names[i] for i in m.Unigram(pieces).encode(word)] == expected


def test_a_tokenizer_of_another_kind_is_refused(m, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    with pytest.raises(ValueError, match="BPE"):
        m.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["numbers", "bpe", "unigram"])
def test_save_pretrained_keeps_our_tokenizer(m, tmp_path, unigram, kind):
    tokenizer = {"numbers": m.ToyTokenizer, "bpe": lambda: m.TextTokenizer(m.train_bpe(toy_text(), 280)),
                 "unigram": lambda: m.load_tokenizer(unigram[0])}[kind]()
    cfg = small(m, 1, vocab_size=tokenizer.n_vocab)
    m.save_pretrained(m.build_model(cfg), cfg, tmp_path / "ours", tokenizer)
    text = "forty two" if kind == "numbers" else "the cat sat"
    again = m.load_tokenizer(tmp_path / "ours")
    assert again.encode(text) == tokenizer.encode(text) and again.n_vocab == tokenizer.n_vocab


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` under /file.gz and counts."""

    content, asked = b"", []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path != "/file.gz":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """-> (handler class, address)."""
    pytest.importorskip("requests")
    handler = type("Handler", (Server,), {"content": gzip.compress("eins\nzwei ü\n".encode()), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield handler, f"http://127.0.0.1:{service.server_port}/file.gz"
        service.shutdown()
        thread.join()


GOOD = hashlib.sha256("eins\nzwei ü\n".encode()).hexdigest()


def test_a_packed_file_is_fetched_once_and_kept_unpacked(m, server, tmp_path):
    handler, url = server
    assert m.gunzipped("file.txt", url, GOOD) == ["eins", "zwei ü"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["file.txt"]
    assert m.gunzipped("file.txt", url, GOOD) == ["eins", "zwei ü"] and len(handler.asked) == 1


@pytest.mark.parametrize("content", [gzip.compress(b"another text"), b"<html>no gzip at all</html>", b"",
                                     gzip.compress(b"eins\nzwei" * 500)[:-20]], ids=["other", "html", "empty", "cut"])
def test_a_packed_file_that_is_another_is_refused(m, server, tmp_path, content):
    handler, url = server
    good, handler.content = handler.content, content
    with pytest.raises(OSError):
        m.gunzipped("file.txt", url, GOOD)
    handler.content = good  # the server is well again: nothing of the bad file may be in the way
    assert m.gunzipped("file.txt", url, GOOD) == ["eins", "zwei ü"]


def test_a_packed_file_is_looked_for_in_llm_data_first(m, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_bytes("eins\nzwei ü\n".encode())
    monkeypatch.setenv("LLM_DATA", str(tmp_path / "mine"))
    assert m.gunzipped("file.txt", "http://127.0.0.1:9/file.gz", GOOD) == ["eins", "zwei ü"]
    (tmp_path / "mine" / "file.txt").write_bytes(b"damaged")
    with pytest.raises(OSError, match="file.txt"):
        m.gunzipped("file.txt", "http://127.0.0.1:9/file.gz", GOOD)
    with pytest.raises(OSError):
        m.gunzipped("none.txt", "http://127.0.0.1:9/none.gz", GOOD)


def test_multi30k_as_published(m, data_dir, monkeypatch):
    """29,000 / 1,014 / 1,000 pairs, and no line is lost or moved to another partner."""
    if not (data_dir / "multi30k.train.de").is_file():
        pytest.skip("Multi30k is not in the data folder")
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    train, val, tokenizer, info, test = m.make_data(m.Config(data="multi30k", block_size=64, vocab_size=600))
    assert (len(train[0]), len(train[1]), len(val[0]), len(val[1]), len(test)) == (29_000, 29_000, 1014, 1014, 1000)
    assert info["name"] == "multi30k" and tokenizer.n_vocab == 600
    lines = {name: (data_dir / f"multi30k.{name}").read_text(encoding="utf-8").splitlines()
             for name in ("train.de", "train.en", "val.de", "val.en", "test.de", "test.en")}
    assert list(map(tuple, test)) == list(zip(lines["test.de"], lines["test.en"], strict=True))
    for part, name in ((train, "train"), (val, "val")):
        known = set(zip(lines[f"{name}.de"], lines[f"{name}.en"], strict=True))
        rows = random.Random(0).sample(range(len(part[0])), 300)
        whole = [row for row in rows if (part[0][row] != 0).sum() < 64 and (part[1][row] != 0).sum() < 64]
        texts = zip(*(texts_of(tokenizer, side[whole]) for side in part), strict=True)
        stripped = {(a.strip(), b.strip()) for a, b in known}
        assert len(whole) > 200 and all(pair in stripped for pair in texts)


# --- 5. Decoding -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
@pytest.mark.parametrize("seed", SEEDS)
def test_cached_steps_equal_the_full_pass(m, seed, positions):
    """Logits of every step, on a batch of padded sources, past the last exact bucket."""
    cfg = small(m, seed, positions=positions)
    model = wide_model(m, cfg)
    src, mask = padded(sources_of(seed, cfg.vocab_size), "left" if seed % 2 else "right")
    tgt = F.pad(random_ids(seed, cfg.vocab_size, 4, 24), (1, 0))
    with torch.no_grad():
        full = model(src, tgt, mask)
        logits, state = m.prefill(model, src, mask, src.size(1) + 25)
        for t in range(25):
            torch.testing.assert_close(logits, full[:, t], atol=1e-11, rtol=1e-10)
            if t < 24:
                logits, state = m.decode_step(model, tgt[:, t + 1], state)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
@pytest.mark.parametrize("seed", SEEDS)
def test_generate_equals_the_slow_loop(m, seed, positions, side):
    """Rows of a padded batch equal each alone, read again in full for every token; pads stand behind an EOS."""
    cfg = small(m, seed, positions=positions)
    model, ended = wide_model(m, cfg), 0
    rows = sources_of(seed, cfg.vocab_size)
    ids, mask = padded(rows, side, width=11)
    for eos in (1, int(slow_greedy(model, rows[0], 4)[-1])):  # an EOS that row 0 does meet
        out = m.generate(model, ids, 12, mask=mask, eos_ids=(eos,)).tolist()
        for row, source in zip(out, rows, strict=True):
            expected = slow_greedy(model, source, 12, eos)
            assert row == expected + [0] * (len(out[0]) - len(expected))
            ended += expected[-1] == eos
        assert len(out[0]) == max(len(slow_greedy(model, source, 12, eos)) for source in rows)
    assert ended


def test_wrong_calls_are_refused(m):
    model = m.build_model(small(m, 0))
    with pytest.raises(ValueError):
        m.beam_search(model, torch.tensor([[3, 4]]), 3, num_beams=2, n_best=3)
    with pytest.raises(ValueError):
        m.generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize("count", [0, 1])
def test_zero_or_one_new_token(m, count):
    model = wide_model(m, small(m, 1))
    ids = random_ids(1, 37, 2, 5)
    out = m.generate(model, ids, count)
    assert out.shape == (2, count)
    if count:
        assert out[:, 0].tolist() == [slow_greedy(model, row, 1)[0] for row in ids]


def test_train_mode_and_dropout_do_not_touch_generation(m):
    cfg = small(m, 1, dropout=0.5)
    model = wide_model(m, cfg)
    ids = random_ids(1, cfg.vocab_size, 2, 5)
    expected, beams = m.generate(model, ids, 8), m.beam_search(model, ids, 8, num_beams=3)
    assert torch.equal(m.generate(model.train(), ids, 8), expected)
    assert same(tuple(m.beam_search(model.train(), ids, 8, num_beams=3)), tuple(beams))


def test_streaming_gets_every_column(m):
    cfg = small(m, 1)
    model, seen = wide_model(m, cfg), []
    ids = random_ids(1, cfg.vocab_size, 3, 5)
    out = m.generate(model, ids, 6, on_token=lambda token: seen.append(token.clone()))
    assert torch.equal(torch.stack(seen, 1), out)


def test_sampling(m):
    """A function of the generator; its first token follows the model's own distribution, cut by top-k."""
    cfg = small(m, 1, vocab_size=11)
    model = wide_model(m, cfg)
    source = random_ids(1, 11, 5)
    with torch.no_grad():
        probs = next_logits(model, source, []).softmax(-1)
    ids = source.repeat(4000, 1)

    def draw(seed, **options):
        return m.generate(model, ids, 1, temperature=1.0, generator=torch.Generator().manual_seed(seed), **options)

    first = draw(3)
    assert torch.equal(first, draw(3)) and not torch.equal(first, draw(4))
    assert (torch.bincount(first[:, 0], minlength=11) / 4000 - probs).abs().max() < 0.04
    assert set(draw(5, top_k=2)[:, 0].tolist()) == set(probs.topk(2).indices.tolist())
    assert m.generate(model, ids[:2], 7, temperature=1.0, top_k=1).equal(m.generate(model, ids[:2], 7))


def hf_generate(theirs, ids, mask, count, **options):
    return theirs.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=count, do_sample=False,
                           pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, return_dict_in_generate=True,
                           **options)


def to_width(rows, width):
    """With 0 behind the first EOS, whatever stood there: transformers' beams fill up with EOS if the pad is 0."""
    behind = ((rows == 1).cumsum(1) - (rows == 1).int()) > 0
    return F.pad(rows.masked_fill(behind, 0), (0, width - rows.size(1)))


def test_greedy_and_beams_equal_transformers_on_a_hundred_models(m, hf, tmp_path):
    """Tokens and scores, padded sources in batches, all three kinds; each setting of the search meets 25 models."""
    met, ends, winners = {}, 0, 0
    for trial in range(100):
        rng = random.Random(trial)
        kind = KINDS[trial % 3]
        V, N = rng.randint(9, 14), rng.choice((6, 9))
        theirs = published(hf, trial, kind, width=2.0, n_layer=1 + trial % 2, vocab_size=V)
        with torch.no_grad():
            theirs.shared.weight *= 0.5  # a tied model would repeat its own input for ever
        theirs.save_pretrained(tmp_path / "hf")
        ours = m.from_pretrained(tmp_path / "hf")[0].double()
        theirs = theirs.double()
        ids, mask = padded([random_ids(trial * 10 + n, V, n) for n in rng.sample(range(1, 8), 3)],
                           rng.choice(("left", "right")))
        greedy = hf_generate(theirs, ids, mask, N, num_beams=1).sequences[:, 1:]
        mine = m.generate(ours, ids, N, mask=mask, eos_ids=(1,))
        assert torch.equal(to_width(mine, N), to_width(greedy, N)), trial
        for turn in (0, 1):
            penalty, n_best = ((0.6, 1.0, 2.0)[(trial // 3 + turn) % 3], (1, 4)[(trial + turn) % 2])
            expected = hf_generate(theirs, ids, mask, N, num_beams=4, num_return_sequences=n_best,
                                   length_penalty=penalty, output_scores=True)
            out, scores = m.beam_search(ours, ids, N, mask=mask, num_beams=4, n_best=n_best, length_penalty=penalty,
                                        eos_ids=(1,))
            assert out.shape[:2] == scores.shape == (3, n_best)
            assert torch.equal(to_width(out.flatten(0, 1), N), to_width(expected.sequences[:, 1:], N)), (trial, turn)
            torch.testing.assert_close(scores.flatten().float(), expected.sequences_scores, atol=1e-4, rtol=0)
            met[kind, penalty, n_best] = met.get((kind, penalty, n_best), 0) + 1
            ends += int((out == 1).any(-1).sum())
            winners += int((to_width(out[:, 0], N) != to_width(greedy, N)).any(1).sum())
    assert len(met) == 18 and min(sum(count for key, count in met.items() if key[i] == value)
                                  for i, value in ((1, 0.6), (1, 1.0), (1, 2.0), (2, 1), (2, 4))) >= 25
    assert ends > 200 and winners > 100  # texts did end early, and beams did find others than greedy


def all_targets(V, N, eos):
    """Every target of at most N tokens: it ends with its first EOS, or is full."""
    for length in range(1, N + 1):
        for new in itertools.product(range(V), repeat=length):
            if eos not in new[:-1] and (new[-1] == eos or length == N):
                yield list(new)


@pytest.mark.parametrize("gnmt", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_as_wide_as_the_tree_finds_the_optimum(m, penalty, gnmt):
    V, N = 4, 3
    cfg = small(m, 1, vocab_size=V, positions="sinusoidal" if penalty == 0.6 else "relative")
    model = wide_model(m, cfg)
    rows = sources_of(2, V, (3, 5))
    ids, mask = padded(rows, "left")
    out, scores = m.beam_search(model, ids, N, mask=mask, num_beams=V ** N, n_best=5, length_penalty=penalty,
                                gnmt=gnmt, eos_ids=(1,))
    for i, source in enumerate(rows):
        table = []
        for new in all_targets(V, N, 1):
            norm = ((5 + len(new)) / 6) ** penalty if gnmt else len(new) ** penalty
            table.append((log_prob(model, source, new) / norm, new + [0] * (N - len(new))))
        table.sort(reverse=True)
        assert [row for _, row in table[:5]] == out[i].tolist()
        assert scores[i].tolist() == pytest.approx([score for score, _ in table[:5]], abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_beam_is_greedy(m, seed):
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    rows = sources_of(seed, cfg.vocab_size)
    ids, mask = padded(rows)
    out, scores = m.beam_search(model, ids, 7, mask=mask, num_beams=1)
    assert torch.equal(out[:, 0], m.generate(model, ids, 7, mask=mask))
    for source, new, score in zip(rows, out[:, 0].tolist(), scores[:, 0].tolist(), strict=True):
        assert score == pytest.approx(log_prob(model, source, new) / 7, abs=1e-4)


@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
def test_beams_of_padded_sources_equal_each_alone(m, positions):
    """Scores are true: the full pass over the text found, without cache and padding, gives the same."""
    cfg = small(m, 1, vocab_size=13, positions=positions)
    model = wide_model(m, cfg)
    rows = sources_of(1, 13)
    ids, mask = padded(rows, "left", width=11)
    out, scores = m.beam_search(model, ids, 8, mask=mask, num_beams=4, n_best=3, length_penalty=0.6, eos_ids=(1,))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    for i, source in enumerate(rows):
        alone, known = m.beam_search(model, source[None], 8, num_beams=4, n_best=3, length_penalty=0.6, eos_ids=(1,))
        assert torch.equal(to_width(alone[0], 8), to_width(out[i], 8))
        torch.testing.assert_close(known[0], scores[i], atol=1e-5, rtol=0)
        for new, score in zip(out[i].tolist(), scores[i].tolist(), strict=True):
            new = new[:new.index(1) + 1] if 1 in new else new
            assert score == pytest.approx(log_prob(model, source, new) / len(new) ** 0.6, abs=1e-4)


@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
def test_reorder_moves_what_was_written(m, positions):
    """Two sources with three rows each; rows swap and multiply among their own, and go on from the right past."""
    cfg = small(m, 1, positions=positions)
    model = wide_model(m, cfg)
    rows = sources_of(1, cfg.vocab_size, (4, 7))
    ids, mask = padded(rows)
    spread, first, second = torch.tensor([0, 0, 0, 1, 1, 1]), [5, 9, 7, 3, 8, 4], [6, 6, 2, 9, 10, 11]
    picked = torch.tensor([2, 0, 0, 4, 5, 3])
    with torch.no_grad():
        _, state = m.prefill(model, ids, mask, ids.size(1) + 5)
        state = m.reorder(state, spread)
        _, state = m.decode_step(model, torch.tensor(first), state)
        logits, state = m.decode_step(model, torch.tensor(second), m.reorder(state, picked))
        for i, old in enumerate(picked.tolist()):
            expected = next_logits(model, rows[i // 3], [first[old], second[i]])
            torch.testing.assert_close(logits[i], expected, atol=1e-11, rtol=1e-10)


def tensors_in(thing, depth=4):
    if torch.is_tensor(thing):
        yield thing
    elif depth and isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_in(part, depth - 1)
    elif depth and isinstance(thing, dict):
        yield from tensors_in(list(thing.values()), depth)
    elif depth and hasattr(thing, "__dict__") and not isinstance(thing, nn.Module):
        yield from tensors_in(list(vars(thing).values()), depth)


@pytest.mark.parametrize("beams", [1, 5])
def test_beams_share_the_keys_of_their_source(m, monkeypatch, beams):
    """The source is 13 long: whatever is kept of its length has 2 rows, those of the batch, however many beams."""
    cfg = small(m, 1, n_layer=2)
    model, original, seen = wide_model(m, cfg), m.decode_step, []

    def watched(model, token, state):
        seen.append([tuple(t.shape) for t in tensors_in(state) if t.dim() == 4 and 13 in t.shape])
        return original(model, token, state)

    monkeypatch.setattr(m, "decode_step", watched)
    m.beam_search(model, random_ids(1, cfg.vocab_size, 2, 13), 7, num_beams=beams)
    assert len(seen) >= 6
    for shapes in seen:
        assert len([size for size in shapes if size[:2] == (2, 3)]) == 4  # keys and values of two layers
        assert all(size[0] <= 2 for size in shapes)


def test_the_encoder_runs_once(m, monkeypatch):
    model, calls = wide_model(m, small(m, 1)), []
    model.encoder["final_layer_norm"].register_forward_hook(lambda *_: calls.append(1))
    m.generate(model, random_ids(1, 37, 2, 5), 6)
    m.beam_search(model, random_ids(1, 37, 2, 5), 6, num_beams=3)
    assert len(calls) == 2


# --- 6. Task scores --------------------------------------------------------------------------------------------------
REFERENCES = [
    "A man in an orange hat is starring at something.",
    "A Boston Terrier is running on lush green grass, in front of a white fence.",
    'She said: "No, it\'s 3.14 - not 22/7!"',
    "People are fixing the roof of a house (1,000 sq. ft.).",
    "A well-known co-worker paid $5.99 & 10% in the 1990s.",
    "Five people wearing winter jackets and helmets stand.",
    "Tom's dog barks; the cat ... sleeps?",
    "a < b and b > c, e-mail me@x.org [1] {2} #3 *4* ~5 ^6 |7| `8` \\9",
    "Ein Mann über 30 isst 2-mal Würstchen für 4,50 €.",
    "The end"]


def spoiled(rng, text):
    """A hypothesis in which words are dropped, doubled, swapped or replaced."""
    words = text.split()
    for _ in range(rng.randint(0, 4)):
        if words:
            i = rng.randrange(len(words))
            words[i:i + 1] = rng.choice(([], [words[i]] * 2, [rng.choice(words)], ["the"]))
    return " ".join(words)


def entities(text):
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def test_bleu_equals_sacrebleu(m):
    sacrebleu = pytest.importorskip("sacrebleu")
    corpora = [(REFERENCES, REFERENCES), ([entities(text) for text in REFERENCES], REFERENCES),
               ([text.lower() for text in REFERENCES], REFERENCES), (["", *REFERENCES[1:]], REFERENCES),
               ([" ".join(text.split()[:4]) for text in REFERENCES], REFERENCES),  # too short
               ([text + " and so on and on" for text in REFERENCES], REFERENCES),  # too long
               (["the cat sat on it"], ["a cat sat in there"])]  # no triple right
    for seed in range(60):
        rng = random.Random(seed)
        references = rng.sample(REFERENCES, rng.randint(1, 10))
        corpora.append(([spoiled(rng, text) for text in references], references))
        symbols = "aB9 .,-'\"&;:!?()/%$ 3.1 5-6 " + ("é€" if seed % 2 else "")
        lines = ["".join(rng.choices(symbols, k=rng.randint(8, 40))) for _ in range(5)]
        corpora.append(([spoiled(rng, line) for line in lines], lines))
        words = ["".join(rng.choices("ab", k=1)) for _ in range(40)]
        corpora.append(([" ".join(rng.sample(words, 12))], [" ".join(rng.sample(words, 14))]))
    scores = []
    for hypotheses, references in corpora:
        expected = sacrebleu.corpus_bleu(hypotheses, [references]).score
        assert m.bleu(hypotheses, references) == pytest.approx(expected, abs=1e-6), (hypotheses, references)
        scores.append(expected)
    assert scores[0] == pytest.approx(100) and len({round(score, 3) for score in scores}) > 120


@pytest.mark.parametrize("hypotheses, references", [
    (["", ""], ["a b c d", "e f g h"]), (["a b"], ["a b"]), (["x y z w v"], ["a b c d e"]), (["x"], ["a b c d e"])],
    ids=["empty", "two words", "nothing right", "one wrong word"])
def test_bleu_of_hopeless_output_equals_sacrebleu(m, hypotheses, references):
    sacrebleu = pytest.importorskip("sacrebleu")
    assert m.bleu(hypotheses, references) == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score)


def test_bleu_by_hand(m):
    # 5 of 6 words ("the" counts once), 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; as long as the reference.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert m.bleu(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx(expected)
    # All right but shorter, 5 of 7 words: the brevity penalty alone.
    assert m.bleu(["a b c d e"], ["a b c d e f g"]) == pytest.approx(100 * math.exp(1 - 7 / 5))
    assert m.bleu(["a b c d e f g"], ["a b c d e f g"]) == pytest.approx(100)
    # Counts are summed over the corpus before the division: two sentences are not the mean of two scores.
    assert m.bleu(["a b c d e", "a b c d x"], ["a b c d e", "a b y d x"]) == pytest.approx(
        100 * (9 / 10 * 6 / 8 * 3 / 6 * 2 / 4) ** 0.25)
    # No quadruple right: its count of 0 becomes 1/2.
    assert m.bleu(["a b c x d"], ["a b c y d"]) == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2) ** 0.25)


def test_exact_match(m, monkeypatch):
    """A stub that knows the names of even numbers and forgets the last word of odd ones."""
    tokenizer, asked = m.ToyTokenizer(), []

    def answer(model, ids, max_new_tokens, *, mask=None, eos_ids=(), **_):
        rows = []
        for row, keep in zip(ids, mask, strict=True):
            assert row[keep][-1] == 1  # a source ends with </s>, in use as in training
            n = int(tokenizer.decode(row[keep][:-1].tolist()))
            asked.append(n)
            words = words_of(n).split()
            rows.append(torch.tensor(tokenizer.encode(" ".join(words if n % 2 == 0 else words[:-1])) + [1]))
        assert max(map(len, rows)) <= max_new_tokens and tuple(eos_ids) == (1,)
        return padded(rows)[0]

    monkeypatch.setattr(m, "generate", answer)
    numbers = [0, 2, 40_216, 777_778, 11, 13, 999_999, 8, 1200, 100_000] + [777_774] * 240
    found = m.exact_match(nn.Linear(1, 1), tokenizer, numbers, m.Config())
    assert found == pytest.approx(247 / 250) and sorted(asked) == sorted(numbers)


def test_exact_match_of_a_fresh_model(m):
    cfg = m.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=46)
    assert m.exact_match(m.build_model(cfg), m.ToyTokenizer(), list(range(1, 30)), cfg) < 0.2


def test_stress_numbers(m):
    expected = [n for n in range(10_000, 1_000_000) if str(n).count("0") >= 3 and held_out(n)]
    assert sorted(m.stress_numbers()) == expected and len(expected) > 500


def test_translate_keeps_the_order(m):
    """250 sources of mixed length, several batches, greedy and beams: each answer belongs to its own source."""
    tokenizer = m.ToyTokenizer()
    cfg = m.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=46)
    model = wide_model(m, cfg)
    texts = [str(random.Random(seed).randrange(10 ** random.Random(-seed).randint(1, 6))) for seed in range(250)]
    greedy = m.translate(model, tokenizer, texts, cfg, 1, 5)
    beams = m.translate(model, tokenizer, texts, cfg, 3, 5)
    assert len(greedy) == len(beams) == 250 and greedy != beams
    for i in range(0, 250, 9):
        ids = torch.tensor([tokenizer.encode(texts[i]) + [1]])
        for found, row in ((greedy[i], m.generate(model, ids, 5, eos_ids=(1,))[0]),
                           (beams[i], m.beam_search(model, ids, 5, num_beams=3, eos_ids=(1,))[0][0, 0])):
            row = row.tolist()
            assert found == tokenizer.decode(row[:row.index(1)] if 1 in row else row).strip()


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_alignment_equals_the_attentions_of_transformers(m, hf, tmp_path, kind):
    theirs = published(hf, 1, kind, width=2.0, n_layer=2, vocab_size=46)
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path / "hf")
    ours, _ = m.from_pretrained(tmp_path / "hf")
    tokenizer = m.ToyTokenizer()
    found = m.alignment(ours, tokenizer, "40215", "forty thousand two hundred fifteen")
    source = torch.tensor([tokenizer.encode("40215") + [1]])
    target = torch.tensor([[0, *tokenizer.encode("forty thousand two hundred fifteen")]])
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=target, output_attentions=True).cross_attentions
    assert found.shape == (2, 3, 6, 6) == (len(expected), *expected[0].shape[1:])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 6), atol=1e-5, rtol=0)
    assert found.std(-1).min() > 0.01
    # Looking leaves nothing behind: no hook makes the next pass slower or fills a list for ever.
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in ours.modules())


# --- 7. Training and the program from outside ------------------------------------------------------------------------
FLAGS = dict(n_layer=1, n_head=2, n_embd=16, batch_size=8, max_steps=20, warmup_steps=3, eval_every=10, save_every=10,
             device="cpu", max_new_tokens=6, lr=0.01)
TASKS = {"numbers": dict(data="numbers"), "pairs": dict(data="pairs.tsv", block_size=24, vocab_size=300),
         "span": dict(objective="span", data="text.txt", block_size=24, vocab_size=300)}


class Stop(Exception):
    pass


@pytest.fixture
def quick(m, monkeypatch, pairs_file, tmp_path):
    """Less of everything: 600 numbers to train, 25 to test. pairs.tsv and text.txt lie in the working directory."""
    (tmp_path / "text.txt").write_text(toy_text(), encoding="utf-8")
    original = m.draw_numbers
    monkeypatch.setattr(m, "draw_numbers", lambda count, *rest, **named: original(
        600 if count > 10_000 else 25, *rest, **named))
    monkeypatch.setattr(m, "stress_numbers", lambda: [10_003, 300_004])


@pytest.fixture(scope="module")
def finished_run(m, tmp_path_factory):
    """A short run of the real program on pairs, in a process of its own. -> its folder, pairs.tsv and run/ in it."""
    folder = tmp_path_factory.mktemp("finished")
    write_pairs(folder / "pairs.tsv", toy_pairs())
    flags = as_flags(**{**FLAGS, **TASKS["pairs"], "max_steps": 60, "out": "run"})
    done = subprocess.run([sys.executable, "-I", m.__file__, *flags], cwd=folder, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the finished run that a test may spoil; the test stands beside it."""
    for path in [finished_run / "pairs.tsv", *(finished_run / "run").iterdir()]:
        target = tmp_path / path.relative_to(finished_run)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "run"


def test_a_run_leaves_what_it_promised(finished_run):
    run, summary = finished_run / "run", json.loads((finished_run / "run" / "summary.json").read_text())
    names = {path.name for path in run.iterdir()}
    assert names >= {"ckpt.pt", "metrics.jsonl", "summary.json", "curve.png", "sample.txt", "attention.png"}
    assert not [name for name in names if name.endswith(".tmp")]
    assert {path.name for path in finished_run.iterdir()} == {"run", "pairs.tsv", "stdout.txt"}  # nothing outside --out
    assert summary.keys() >= {"config", "params", "val_loss", "floor", "tokens_per_second", "seconds", "peak_memory_mb",
                              "data", "device", "torch", "figures", "results"}
    assert summary["results"].keys() >= {"bleu_greedy", "bleu_beam"} and summary["floor"] is None
    assert all(0 <= summary["results"][name] <= 100 for name in ("bleu_greedy", "bleu_beam"))
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in summary["figures"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = rows[0]["loss"]
    assert rows[-1]["loss"] < 0.8 * first and summary["val_loss"] == rows[-1]["val_loss"] < 0.9 * first
    assert contents(run / "ckpt.pt")["step"] == 60
    V = summary["config"]["vocab_size"]
    assert summary["params"] == V * 16 + 64 * 2 + 12 * 16 * 16 + 4 * 16 * 64 + 7 * 16
    out = (finished_run / "stdout.txt").read_text(encoding="utf-8")
    assert f"{math.log(V):.2f}" in out and f"{summary['val_loss']:.2f}" in out


def test_evaluate_counts_the_whole_split(m):
    cfg = small(m, 1, batch_size=3, dropout=0.3, label_smoothing=0.2)
    model = wide_model(m, cfg).train()
    data = batch_of(1, cfg.vocab_size)  # four rows: the last batch has one
    found = m.evaluate(model, data, cfg, m.compute_loss)["val_loss"]
    known = slow_losses(model.eval(), data)
    assert found == pytest.approx(-sum(float(table[token]) for table, token in known) / len(known), abs=1e-5)


def test_numbers_end_to_end(m, quick, tmp_path):
    """The toy language through main: both scores in the summary, a floor of 0, and a loss far below chance."""
    settings = {**FLAGS, "n_embd": 32, "batch_size": 32, "max_steps": 120, "warmup_steps": 10}
    model, cfg = m.main(m.Config(**settings, out="run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["floor"] == 0 and summary["val_loss"] < 0.5 * math.log(46) and summary["data"]["name"] == "numbers"
    assert all(0 <= summary["results"][name] <= 1 for name in ("exact_match", "exact_match_stress"))
    assert cfg.vocab_size == 46 and isinstance(model, m.T5)
    assert "40215" in (tmp_path / "run" / "sample.txt").read_text()
    # The same seed, the same numbers; another one, others.
    m.main(m.Config(**settings, out="again"))
    m.main(m.Config(**{**settings, "max_steps": 2}, out="other", seed=5))
    a, b, c = (contents(tmp_path / name / "ckpt.pt")["model"] for name in ("run", "again", "other"))
    assert same(a, b) and not same(a, c)
    other = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary["val_loss"] == other["val_loss"] and summary["results"] == other["results"]


@pytest.mark.slow
def test_the_default_learns_the_language(m, tmp_path):
    run(m, "--device", "cpu", "--out", "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["results"]["exact_match"] > 0.9 and summary["val_loss"] < 0.05


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "grad_accum": 2, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_resume_is_exact(m, quick, monkeypatch, tmp_path, task, changes):
    """20 steps at once equal a run that dies behind step 13 and goes on from its checkpoint of step 10."""
    settings = {**FLAGS, **TASKS[task], **changes}
    m.main(m.Config(**settings, out="straight"))
    original = m.get_batch

    def dying(data, rows, seed, step):
        if step == 13:
            raise Stop
        return original(data, rows, seed, step)

    torch.manual_seed(77)  # a resumed process knows nothing of the first one's random state
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(m, "get_batch", dying)
        m.main(m.Config(**settings, out="broken"))
    torch.manual_seed(99)
    m.main(m.Config(out="broken", resume=True, max_new_tokens=FLAGS["max_new_tokens"]))
    one, other = (contents(tmp_path / name / "ckpt.pt") for name in ("straight", "broken"))
    assert one["step"] == other["step"] == 20
    assert same(one["model"], other["model"]) and same(one["optimizer"], other["optimizer"])
    rows, known = ([{**json.loads(line), "seconds": 0} for line in (tmp_path / name / "metrics.jsonl").open()]
                   for name in ("broken", "straight"))
    assert rows == known
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "broken")]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"] and summaries[0]["results"] == summaries[1]["results"]


def test_resume_refuses_what_contradicts_the_run(m, capsys, copied_run, tmp_path):
    before = files_of(copied_run)
    for name, value in (("lr", 0.5), ("n_layer", 2), ("positions", "sinusoidal"), ("label_smoothing", 0.3),
                        ("data", "numbers"), ("seed", 4)):
        assert re.search(name.replace("_", "[-_]"), complaint(m, capsys, "--resume", "--out", "run",
                                                              *as_flags(**{name: value})))
    write_pairs(tmp_path / "pairs.tsv", toy_pairs()[1:])
    assert "pairs.tsv" in complaint(m, capsys, "--resume", "--out", "run")
    assert files_of(copied_run) == before


def spoil(path, how):
    raw = path.read_bytes()
    if how == "truncated":
        path.write_bytes(raw[:len(raw) // 2])
    elif how == "one bit in a weight":
        weight = contents(path)["model"]["shared.weight"]
        where = raw.index(weight.numpy().tobytes()) + 37
        path.write_bytes(raw[:where] + bytes([raw[where] ^ 4]) + raw[where + 1:])
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "a whole module":  # a pickle that would run code: common on the web
        torch.save(nn.Linear(2, 3), path)
    elif how == "another script's":
        torch.save({**contents(path), "script": "llama3"}, path)
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "one bit in a weight", "text", "a whole module", "another script's",
                                 "missing"])
@pytest.mark.parametrize("flags", [("--resume", "--out", "run"), ("--load", "run/ckpt.pt", "--prompt", "the")], ids=str)
def test_damaged_checkpoints_are_refused_by_name(m, capsys, copied_run, how, flags):
    spoil(copied_run / "ckpt.pt", how)
    before = files_of(copied_run)
    assert "ckpt.pt" in complaint(m, capsys, *flags)
    assert files_of(copied_run) == before


BAD = {
    "heads": ("--n-head", "3"),
    "not a number": ("--lr", "nonsense"),
    "not a number at all": ("--lr", "nan"),
    "zero layers": ("--n-layer", "0"),
    "no such flag": ("--nonsense",),
    "abbreviation": ("--n-lay", "2"),
    "value for a switch": ("--gated", "False"),
    "no such preset": ("--preset", "nonsense"),
    "no such positions": ("--positions", "rotary"),
    "no such schedule": ("--schedule", "linear"),
    "no such objective": ("--objective", "mlm"),
    "no warm-up to fall from": ("--schedule", "rsqrt", "--warmup-steps", "0"),
    "all smoothed": ("--label-smoothing", "1"),
    "odd sinusoids": ("--positions", "sinusoidal", "--n-embd", "15", "--n-head", "3"),
    "more answers than beams": ("--beams", "2", "--n-best", "3"),
    "more answers than greedy has": ("--n-best", "2"),
    "beams": ("--beams", "0"),
    "length penalty": ("--length-penalty", "nan"),
    "multi30k without a network": ("--data", "multi30k"),
    "the preset too": ("--preset", "multi30k"),
    "span of numbers": ("--preset", "span", "--data", "numbers"),
    "span of pairs": ("--preset", "span", "--data", "multi30k"),
    "shakespeare has no pairs": ("--data", "shakespeare"),
    "auto has no pairs": ("--data", "auto"),
    "shakespeare without a network": ("--preset", "span", "--data", "shakespeare"),
    "missing pairs": ("--data", "missing.tsv"),
    "folder as pairs": ("--data", "."),
    "binary as pairs": ("--data", "binary.bin"),
    "empty": ("--data", "empty.txt"),
    "no tabs": ("--data", "text.txt"),
    "two tabs": ("--data", "wide.tsv"),
    "empty target": ("--data", "hole.tsv"),
    "few pairs": ("--data", "few.tsv"),
    "one source": ("--data", "one.tsv"),
    "missing text": ("--preset", "span", "--data", "missing.txt"),
    "short text": ("--preset", "span", "--data", "short.txt"),
    "missing model": ("--load", "missing", "--prompt", "x"),
    "missing run": ("--resume",),
    "short context for numbers": ("--block-size", "8"),
    "prompt for numbers": ("--prompt", "eleventy"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(m, capsys, offline, quick, tmp_path, name):
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc" * 50)
    pairs = toy_pairs(40)
    write_pairs("few.tsv", pairs[:7])
    write_pairs("one.tsv", [("same", target) for _, target in pairs])
    write_pairs("hole.tsv", [*pairs, ("source", " ")])
    write_pairs("wide.tsv", [*pairs, ("source", "target\tmore")])
    before = {path.name for path in tmp_path.iterdir()}
    complaint(m, capsys, *BAD[name], "--max-steps", "1")
    # fetch() may have made ./data for the file that did not come; nothing may be in it.
    assert {path.name for path in tmp_path.iterdir()} - {"data"} == before
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_bad_input_from_a_shell(m, tmp_path):
    """The same through a real process: exit status, one line on stderr, no traceback, nothing written."""
    chosen = ("more answers than beams", "missing pairs")
    running = {name: subprocess.Popen([sys.executable, "-I", m.__file__, *BAD[name]], cwd=tmp_path, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in chosen}
    for name, process in running.items():
        _, err = process.communicate(timeout=120)
        assert process.returncode not in (0, None), name
        assert err.startswith("error: ") and len(err.splitlines()) == 1, (name, err)
    assert not list(tmp_path.iterdir())


def test_what_cannot_fit_is_refused_before_it_is_allocated(m, capsys, quick):
    text = complaint(m, capsys, "--preset", "t5-large", "--data", "text.txt", "--batch-size", "8192", "--block-size",
                     "64", "--device", "cpu")
    for part in ("GB", "weights", "gradients", "optimizer", "activations"):
        assert part in text


@pytest.mark.parametrize("values", [
    {"n_embd": 30, "n_head": 4}, {"n_layer": 0}, {"lr": 0.0}, {"dropout": 1.0}, {"top_p": 0.0}, {"beams": 0},
    {"n_best": 2}, {"grad_accum": 0}, {"beta2": 1.0}, {"min_lr_ratio": 2.0}, {"dtype": "float16"}, {"save_every": 0},
    {"positions": "learned"}, {"objective": "mlm"}, {"label_smoothing": 1.0}, {"length_penalty": math.inf},
    {"seed": -1}], ids=str)
def test_impossible_settings_raise(m, values):
    with pytest.raises(ValueError):
        m.Config(**values)


def test_command_line(m, capsys):
    def parse(*flags):
        return m.parse_config(m.Config, m.PRESETS, list(flags))

    assert parse() == m.Config() and all(parse("--preset", name) for name in m.PRESETS)
    cfg = parse("--preset", "multi30k", "--n-layer", "5", "--no-tie-weights", "--gnmt", "--length-penalty", "0.6")
    assert (cfg.n_layer, cfg.tie_weights, cfg.gnmt, cfg.length_penalty, cfg.data) == (5, False, True, 0.6, "multi30k")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out = capsys.readouterr().out
    assert stop.value.code in (0, None)
    for field in dataclasses.fields(m.Config):
        assert "--" + field.name.replace("_", "-") in out


def say(m, capsys, *flags):
    capsys.readouterr()
    run(m, *flags)
    return capsys.readouterr().out.removesuffix("\n")


def test_talking_to_a_run(m, copied_run, capsys):
    """Greedy, beams, several answers, sampling: what the program prints is what the functions give."""
    state = contents(copied_run / "ckpt.pt")
    tokenizer = m.tokenizer_from(state["extra"]["tokenizer"])
    model = m.T5(m.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.n_vocab))
    model.load_state_dict(state["model"])
    ids = torch.tensor([tokenizer.encode("the cat sat") + [1]])

    def decoded(row):
        row = row.tolist()
        return tokenizer.decode(row[:row.index(1)] if 1 in row else row).strip()

    def ask(*flags, load="run"):
        return say(m, capsys, "--load", load, "--prompt", "the cat sat", "--max-new-tokens", "9", *flags)

    greedy = decoded(m.generate(model, ids, 9, eos_ids=(1,))[0])
    for found in (ask(), ask(load="run/ckpt.pt"), ask("--top-k", "1", "--temperature", "1")):
        assert found.strip() == greedy
    found, _ = m.beam_search(model, ids, 9, num_beams=3, eos_ids=(1,), length_penalty=0.5)
    assert ask("--beams", "3", "--length-penalty", "0.5") == decoded(found[0, 0])
    found, scores = m.beam_search(model, ids, 9, num_beams=4, n_best=3, eos_ids=(1,), gnmt=True, length_penalty=2.0)
    lines = ask("--beams", "4", "--n-best", "3", "--gnmt", "--length-penalty", "2").splitlines()
    assert len(lines) == 3
    for line, row, score in zip(lines, found[0], scores[0].tolist(), strict=True):
        number, _, text = line.strip().partition(" ")
        assert text.strip() == decoded(row) and float(number) == pytest.approx(score, abs=1e-3)
    hot = [ask("--temperature", "3", "--seed", str(seed)) for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1] and len(set(hot)) > 1


def test_streaming_writes_whole_characters(m, copied_run, capsys, monkeypatch):
    """A character of two tokens appears when it is whole."""
    tokenizer = m.TextTokenizer([])  # bytes alone
    ids = [*tokenizer.encode("café dog"), 1, 0]
    on_token = m.stream(tokenizer)
    capsys.readouterr()
    for token in ids[:-1]:
        on_token(torch.tensor([token]))
    assert capsys.readouterr().out.strip() == "café dog"


def test_training_goes_on_from_a_loaded_run(m, copied_run, tmp_path):
    before = contents(copied_run / "ckpt.pt")
    model, cfg = run(m, "--load", "run", *as_flags(**{**FLAGS, **TASKS["pairs"], "out": "more", "max_steps": 2,
                                                      "lr": 1e-12, "weight_decay": 0}))
    after = contents(tmp_path / "more" / "ckpt.pt")
    assert after["step"] == 2 and after["extra"]["tokenizer"] == before["extra"]["tokenizer"]
    for name, tensor in before["model"].items():
        torch.testing.assert_close(after["model"][name], tensor, atol=1e-6, rtol=0, msg=name)


@pytest.fixture
def published_folder(hf, unigram, tmp_path):
    theirs = published(hf, 1, "v1.1", vocab_size=unigram[1].get_vocab_size() + 5)  # tables are padded in real files
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((unigram[0] / "tokenizer.json").read_bytes())
    return tmp_path / "hf"


def test_talking_to_published_weights(m, published_folder, unigram, capsys):
    library = unigram[1]
    model, _ = m.from_pretrained(published_folder)
    ids = torch.tensor([library.encode("the cat sat", add_special_tokens=False).ids + [1]])
    found = say(m, capsys, "--load", "hf", "--prompt", "the cat sat", "--max-new-tokens", "7").strip()
    row = m.generate(model, ids, 7, eos_ids=(1,))[0].tolist()
    assert found == library.decode([i for i in row if 2 < i < library.get_vocab_size()]).strip()
    lines = say(m, capsys, "--load", "hf", "--prompt", "the cat sat", "--beams", "3", "--n-best", "3").splitlines()
    assert len(lines) == 3


def test_fine_tuning_published_weights_can_be_talked_to(m, published_folder, pairs_file, capsys, tmp_path):
    flags = dict(load="hf", data="pairs.tsv", block_size=24, max_steps=2, warmup_steps=1, batch_size=4, out="run",
                 device="cpu", max_new_tokens=3)
    model, cfg = run(m, *as_flags(**flags))
    assert cfg.gated and not cfg.tie_weights and cfg.head_size == model.cfg.head_size
    assert contents("run/ckpt.pt")["step"] == 2
    say(m, capsys, "--load", "run", "--prompt", "the cat", "--max-new-tokens", "3")


def test_a_tokenizer_larger_than_the_table_is_one_line(m, hf, unigram, tmp_path, capsys):
    published(hf, 1, "v1.1", vocab_size=unigram[1].get_vocab_size() - 1).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((unigram[0] / "tokenizer.json").read_bytes())
    assert "tokenizer" in complaint(m, capsys, "--load", "hf", "--prompt", "the")


@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun as used here need POSIX")
def test_two_ranks_equal_one_process(m, pairs_file, tmp_path):
    """Data-parallel training is the same training. Targets of unequal length: the ranks count different tokens."""
    settings = {**FLAGS, **TASKS["pairs"], "batch_size": 6, "grad_accum": 2, "max_steps": 5, "eval_every": 5,
                "dtype": "float64", "max_new_tokens": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", m.__file__]
    done = subprocess.run([*command, *as_flags(**settings, out="two")], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode and re.search(r"gloo.*(interface|address|resolve|not available)", done.stderr, re.I | re.S):
        pytest.skip("gloo finds no network interface here")
    assert done.returncode == 0, done.stderr[-3000:]
    m.main(m.Config(**settings, out="one"))
    one, two = (contents(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    assert one["step"] == two["step"] == 5 and one["model"].keys() == two["model"].keys()
    for name, tensor in one["model"].items():
        assert tensor.dtype == torch.float64
        assert (tensor - two["model"][name]).abs().max() < 1e-9, name
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["val_loss"] == pytest.approx(summaries[1]["val_loss"], abs=1e-5)


def test_multi30k_run_writes_bleu(m, data_dir, monkeypatch, tmp_path):
    """Three steps on a part of the real sentences: the whole way from files to the BLEU of two searches."""
    if not (data_dir / "multi30k.train.de").is_file():
        pytest.skip("Multi30k is not in the data folder")
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    original = m.read_pairs
    monkeypatch.setattr(m, "read_pairs", lambda cfg: [part[:size] for part, size in
                                                      zip(original(cfg), (300, 20, 12), strict=True)])
    run(m, "--preset", "multi30k", *as_flags(**{**FLAGS, "max_steps": 3, "vocab_size": 400, "block_size": 32,
                                                "out": "run"}))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["results"].keys() == {"bleu_greedy", "bleu_beam"} and summary["data"]["name"] == "multi30k"
    assert len((tmp_path / "run" / "test.beam.txt").read_text(encoding="utf-8").split("\n")) == 12
