"""Tests of decoder_only.py, GPT-2 in one file; `pytest tests/test_decoder_only.py --script my_gpt.py` grades yours.

Expected values come from elsewhere: scaled_dot_product_attention and AdamW of torch, transformers for the whole model
and its decoding, slow loops written here, arithmetic by hand. Tokens of two implementations are compared in float64
with wide random weights: a small model in float32 has near-ties, and rounding would decide them.
"""
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

WORDS = "the cat sat on a mat and saw the dog run to café old tree while birds sang in morning light".split()
TINY = dict(n_layer=2, n_head=3, n_embd=24, block_size=12, batch_size=4, max_steps=20, warmup_steps=5, eval_every=5,
            device="cpu", max_new_tokens=5)


# --- helpers ---------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Each test in a folder of its own, without a network, with a text of 3,000 characters, Ctrl-C as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_DATA", raising=False)
    monkeypatch.setattr("requests.get", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    rng = random.Random(0)
    Path("text.txt").write_text("\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(80)), encoding="utf-8")
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def wide(m, seed, dtype=torch.float64, **changes):
    """A small model of random shape with wide random weights and vectors that are not 0 or 1."""
    rng = random.Random(seed)
    heads = rng.choice((2, 3, 4))
    torch.manual_seed(seed)
    model = m.GPT(m.Config(**{**dict(n_layer=rng.choice((1, 2)), n_head=heads, n_embd=heads * rng.choice((4, 6)),
                                     block_size=rng.choice((10, 13)), vocab_size=rng.choice((31, 43))), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.5 if p.dim() == 2 else 0.3))
    return model.to(dtype).eval()


def ids_of(seed, vocab, *shape):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hf():
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def theirs(m, hf, model, folder="hf"):
    """transformers' model with the weights of ours, through files."""
    m.save_pretrained(model, folder)
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype).eval()


def scenario(m, tmp_path, fixed):
    """For tests/test_house.py: reach every line with a shape comment."""
    fixed.update(C=24, H=3, D=8)
    rng = random.Random(0)
    (tmp_path / "t.txt").write_text("".join(rng.choices("abcdefgh \n", k=2000)))
    m.main(m.Config(**TINY | dict(data="t.txt", out="run", block_size=16, batch_size=5, max_steps=1)))
    model = m.GPT(m.Config(n_layer=1, n_head=3, n_embd=24, block_size=9, vocab_size=31)).eval()
    m.generate(model, ids_of(0, 31, 5, 7), 4, 0.8, 10, 0.9, eos=1)
    m.generate(model, ids_of(0, 31, 5, 7), 4)
    m.beam_search(model, ids_of(0, 31, 1, 7), 4, num_beams=4, eos=1)
    m.attention(*(torch.randn(5, 3, n, 8) for n in (7, 11, 11)), m.causal_mask(7, 11))


# --- model -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("T, S", [(7, 7), (3, 7), (1, 7)])
def test_attention_equals_sdpa_with_gradients(m, T, S):
    q, k, v = (torch.randn(2, 3, n, 5, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
    mask = torch.tensor([[s <= S - T + t for s in range(S)] for t in range(T)])
    assert torch.equal(m.causal_mask(T, S), mask)
    for a, b in zip(*([y, *torch.autograd.grad((y * y).sum(), (q, k, v))] for y in (
            m.attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(1, 1, 7), (7,), (1, 7), (2, 1, 7), (2, 3, 7)])
def test_linear_is_linear_with_gradients(m, shape):
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    for a, b in zip(*([y, *torch.autograd.grad((y * y).sum(), inputs)] for inputs, y in (
            (inputs, form(*inputs)) for form in (m.linear, F.linear)
            for inputs in [(x.clone().requires_grad_(), w.clone().requires_grad_())])), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seed", range(5))
def test_logits_equal_transformers_in_both_directions(m, hf, seed):
    model = wide(m, seed, torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.4)
    ids = ids_of(seed, model.cfg.vocab_size, 3, model.cfg.block_size)
    other = theirs(m, hf, model)
    ours, mine = model(ids), other(ids).logits
    assert (ours - mine).abs().max() < 1e-4 < ours.std()
    torch.manual_seed(seed)
    config = hf.GPT2Config(vocab_size=37, n_positions=11, n_embd=24, n_layer=2, n_head=4, initializer_range=0.2,
                           bos_token_id=1, eos_token_id=1)
    fresh = hf.GPT2LMHeadModel(config).eval()
    fresh.save_pretrained("theirs")
    loaded, ids = m.from_pretrained("theirs"), ids_of(seed, 37, 3, 11)
    assert not loaded.training and (loaded(ids) - fresh(ids).logits).abs().max() < 1e-4


def test_the_future_is_hidden_and_the_past_in_order(m):
    model = wide(m, 1, block_size=10)
    ids = ids_of(0, 31, 1, 10)
    changed, swapped = ids.clone(), ids[:, [1, 0, *range(2, 10)]]
    changed[0, 6] = (changed[0, 6] + 1) % 31
    a, b, c = model(ids), model(changed), model(swapped)
    assert torch.equal(a[:, :6], b[:, :6]) and (a[:, 6:] - b[:, 6:]).abs().amax(-1).min() > 1e-6
    assert (a[:, 9] - c[:, 9]).abs().max() > 1e-6
    with pytest.raises(RuntimeError):
        model(ids_of(0, 31, 1, 11))
    for wrong in (dict(n_head=3), dict(grad_accum=0), dict(max_steps=0), dict(n_head=0)):
        with pytest.raises(ValueError, match="n_head must divide"):
            m.main(m.Config(**wrong))


def test_dropout_acts_at_every_site_in_training_only(m, monkeypatch):
    model, seen = wide(m, 0, n_layer=2, dropout=0.3), []
    drop, sdpa = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True: (
        seen.append(p * training), drop(x, p, training))[1])
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, mask=None, p=0.0, **more: (
        seen.append(p), sdpa(q, k, v, mask, p, **more))[1])
    ids = ids_of(0, 31, 2, 8)
    for training, expected in ((True, [0.3] * 7), (False, [0.0] * 7)):  # embedding; weights, branch, MLP of two blocks
        seen.clear()
        model.train(training)
        assert torch.equal(model(ids), model(ids)) == (not training) and seen == expected * 2


def test_initial_weights_and_size(m):
    torch.manual_seed(0)
    model = m.GPT(m.Config(n_layer=3, n_embd=96, vocab_size=500))
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() * 96 ** 0.5 == pytest.approx(6 ** -0.5 if "c_proj" in name else 1, rel=0.05), name
        else:
            assert p.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
    loss = m.compute_loss(model, ids_of(0, 500, 4, 64), ids_of(1, 500, 4, 64)) / 256
    assert loss.item() == pytest.approx(math.log(500) + 0.5, abs=0.15)
    with torch.device("meta"):
        gpt2 = m.GPT(m.Config(**m.PRESETS["gpt2"] | dict(vocab_size=50257)))
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808


# --- decoding --------------------------------------------------------------------------------------------------------
def slow_greedy(model, prompt, count):
    """The definition: read everything again for each token; a full context drops to its newest half (and one)."""
    size, new = model.cfg.block_size, []
    context = list(prompt)[-size:]
    for _ in range(count):
        new.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        context = (context if len(context) < size else context[size - size // 2:]) + new[-1:]
    return new


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_transformers_and_the_uncached_loop(m, hf, seed):
    model = wide(m, seed)
    V, N = model.cfg.vocab_size, model.cfg.block_size - 4
    ids, other = ids_of(seed, V, 3, 4), theirs(m, hf, model)
    new = m.generate(model, ids, N)
    assert torch.equal(new, other.generate(ids, max_new_tokens=N, do_sample=False, eos_token_id=None)[:, 4:])
    long = m.generate(model, ids, 3 * N + 5)  # beyond block_size
    assert long.tolist() == [slow_greedy(model, row, 3 * N + 5) for row in ids.tolist()]
    assert m.generate(model, ids_of(9, V, 2, 30), 3).tolist() == [
        slow_greedy(model, row, 3) for row in ids_of(9, V, 2, 30).tolist()]
    eos, columns = int(long[0, 2]), []  # a row that has ended is filled up with eos; the others go on
    with_eos = m.generate(model, ids, N, eos=eos, on_token=columns.append)
    for got, free in zip(with_eos.tolist(), long.tolist(), strict=True):
        end = free.index(eos) + 1 if eos in free[:N] else N
        assert got == (free[:end] + [eos] * N)[:with_eos.size(1)]
    assert torch.equal(torch.stack(columns, 1), with_eos)


@torch.no_grad()
def test_a_prompt_in_pieces_equals_one_pass(m):
    model, ids = wide(m, 2, block_size=13), ids_of(0, 31, 2, 9)
    for pieces in ((5, 4), (1, 1, 7), (3, 1, 2, 3)):
        cache = m.KVCache(9)
        parts = torch.cat([model(part, cache) for part in ids.split(pieces, 1)], 1)
        torch.testing.assert_close(parts, model(ids))
        assert cache.length == 9 and {kv.size(3) for kv in cache.layers.values()} == {9}


@torch.no_grad()
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_beams_equal_transformers(m, hf, penalty, eos):
    for seed in range(3):
        model = wide(m, seed)
        ids, other = ids_of(seed, 31, 1, 4), theirs(m, hf, model)
        end = int(m.generate(model, ids, 3)[0, -1]) if eos else -1
        ours = m.beam_search(model, ids, 6, 4, penalty, end)
        found = other.generate(ids, max_new_tokens=6, num_beams=4, num_return_sequences=4, length_penalty=penalty,
                               eos_token_id=end if eos else None, pad_token_id=0, do_sample=False, early_stopping=False,
                               return_dict_in_generate=True, output_scores=True)
        assert [score for score, _ in ours] == pytest.approx(found.sequences_scores.tolist(), abs=1e-6)
        assert [row for _, row in ours] == [
            row[:(row + [end]).index(end) + 1] for row in found.sequences[:, 4:].tolist()]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_greedy_and_a_wide_one_the_optimum(m, seed):
    model, ids = wide(m, seed, vocab_size=5), ids_of(seed, 5, 1, 3)
    assert m.beam_search(model, ids, 7, 1)[0][1] == m.generate(model, ids, 7)[0].tolist()
    rows = list(itertools.product(range(5), repeat=3))
    logp = model(torch.cat((ids.expand(125, 3), torch.tensor(rows)), 1))[:, 2:-1].log_softmax(-1)
    best = max((logp[i, range(3), row].sum().item(), row) for i, row in enumerate(rows))
    score, row = m.beam_search(model, ids, 3, 25, 0.0)[0]
    assert tuple(row) == best[1] and score == pytest.approx(best[0])


def test_sampling(m):
    order = torch.tensor([2, 0, 3, 1])  # not sorted: column 2 is the likeliest
    logits = torch.empty(1, 4)
    logits[0, order] = torch.tensor([.5, .3, .15, .05]).log()

    def shares(*how):
        draws = m.sample_next(logits.expand(4000, 4), *how, torch.Generator().manual_seed(0))
        return torch.bincount(draws, minlength=4)[order] / 4000
    assert m.sample_next(logits, 0).tolist() == [2]
    for how, expected in (((1.0,), [.5, .3, .15, .05]), ((0.5,), [.68, .25, .06, .01]), ((2.0,), [.38, .29, .21, .12]),
                          ((1.0, 2), [.62, .38, 0, 0]), ((1.0, 9), [.5, .3, .15, .05]),
                          ((1.0, 0, .8), [.62, .38, 0, 0]),
                          ((1.0, 0, .81), [.53, .32, .16, 0]), ((1.0, 0, 0.0), [1, 0, 0, 0]),
                          ((1.0, 2, .6), [1, 0, 0, 0]),  # two, renormalized to .62 and .38: the first is enough
                          ((2.0, 0, .6), [.57, .43, 0, 0])):  # heat before the cut: .38 + .29 reach .6
        how += (0, 1.0)[len(how) - 1:] if len(how) < 3 else ()
        got, expected = shares(*how), torch.tensor(expected, dtype=torch.float32)
        assert torch.allclose(got, expected, atol=0.03) and torch.equal(got == 0, expected == 0)
    assert torch.equal(*(m.sample_next(logits.expand(99, 4), 1.0, generator=torch.Generator().manual_seed(7))
                         for _ in range(2)))
    two = m.sample_next(torch.tensor([[9., 0.], [0., 9.]]), 1.0)
    assert two.tolist() == [0, 1]


# --- objective, data -------------------------------------------------------------------------------------------------
def test_loss_is_the_sum_over_counted_targets(m):
    model, ids = wide(m, 0), ids_of(0, 31, 2, 8)
    targets = ids_of(1, 31, 2, 8)
    targets[0, 3:] = -100
    logp = model(ids).log_softmax(-1)
    by_hand = -sum(logp[b, t, targets[b, t]] for b in range(2) for t in range(8) if targets[b, t] >= 0)
    torch.testing.assert_close(m.compute_loss(model, ids, targets), by_hand)


def test_rows_and_batches(m):
    train, val = (m.text_rows(torch.arange(14), 4, stride) for stride in (1, 4))
    assert train[0].shape == (10, 4) and torch.equal(train[1], train[0] + 1) and train[0][9].tolist() == [9, 10, 11, 12]
    assert val[1].flatten().tolist() == list(range(1, 13))  # each once
    batch = m.get_batch(train, 5, 1, 5)
    assert torch.equal(batch[0], m.get_batch(train, 5, 1, 5)[0]) and torch.equal(batch[1], batch[0] + 1)
    others = [m.get_batch(train, 50, *key)[0] for key in ((1, 5), (2, 4), (1, 6), (2, 5))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(others, 2))


def test_data_from_a_file(m):
    Path("bom.txt").write_bytes("\ufeffzwölf\u2028\x85\r Boxkämpfer\n".encode() * 40)
    (inputs, _), (val, _), tokenizer, name, ratio = m.make_data(m.Config(data="bom.txt", block_size=4))
    text = Path("bom.txt").read_text(encoding="utf-8-sig")
    assert name == "bom.txt" and "\ufeff" in text and tokenizer.decode(inputs[0].tolist()) == "zwöl"
    cut = int(0.9 * len(text))
    assert tokenizer.decode(val.flatten().tolist()) == text[cut:][:val.numel()]
    assert ratio == len(text[cut:].encode()) / len(text[cut:])
    assert m.make_tokenizer(*tokenizer.spec).encode("zwölf") == tokenizer.encode("zwölf")
    with pytest.raises(ValueError, match="lacks .*Q"):
        tokenizer.encode("zwölf Q")


def test_gpt2s_vocabulary(m, tiktoken_cache, monkeypatch):
    tokenizer = m.make_tokenizer("gpt2")
    assert (tokenizer.n_vocab, tokenizer.eos) == (50257, 50256)
    assert tokenizer.encode("Hello <|endoftext|>")[0] == 15496 and 50256 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("naïve 🙂")) == "naïve 🙂"
    # The end of a text is no part of it, and neither is an id that only fills up a padded vocabulary.
    monkeypatch.setattr(m, "generate", lambda *_: torch.tensor([[15496, 50300, 50256]]))
    assert m.write_text(None, tokenizer, m.Config(device="cpu"), "a", 3) == "Hello"


def test_shakespeare_or_the_help_texts(m, monkeypatch, data_dir, capsys):
    assert m.load_text("auto")[1] == "pydocs" and "no network" in capsys.readouterr().out
    with pytest.raises(OSError, match="no network"):
        m.load_text("shakespeare")
    page = type("Reply", (), {"content": b"<html>log in first</html>"})
    monkeypatch.setattr("requests.get", lambda *_, **__: page)
    with pytest.raises(OSError, match="SHA-256"):
        m.load_text("shakespeare")
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    text, name = m.load_text("auto")
    assert name == "shakespeare" and text.startswith("First Citizen:") and len(text) == 1_115_394


# --- training --------------------------------------------------------------------------------------------------------
def setting(m, **changes):
    cfg = m.Config(**TINY | dict(out="run", vocab_size=31, lr=1e-2) | changes)
    Path(cfg.out).mkdir(exist_ok=True)
    torch.manual_seed(cfg.seed)
    ids = ids_of(3, 31, 400)
    return m.GPT(cfg), cfg, m.text_rows(ids, 12, 1), m.text_rows(ids[:60], 12, 12), ("char", "x")


def test_learning_rate(m):
    cfg = m.Config(lr=2.0, warmup_steps=4, max_steps=12)
    assert [m.lr_at(step, cfg) for step in (0, 1, 3, 4, 8)] == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.0])
    assert 0 < m.lr_at(11, cfg) < 0.1 and m.lr_at(0, m.Config(warmup_steps=0, max_steps=1, lr=2.0)) == 2.0


@pytest.mark.parametrize("batch_size, grad_accum", [(12, 1), (4, 3)])
def test_training_is_adamw_on_the_mean_loss_of_all_counted_tokens(m, batch_size, grad_accum):
    model, cfg, train, val, spec = setting(m, batch_size=batch_size, grad_accum=grad_accum, max_steps=6)
    targets = train[1].clone()
    targets[::3, 2:] = -100  # rows count different numbers of tokens
    twin, _, _, _, _ = setting(m, batch_size=12)
    model, twin = model.double(), twin.double()
    history = m.train(model, cfg, (train[0], targets), val, spec)
    optimizer = torch.optim.AdamW([{"params": [p for p in twin.parameters() if p.dim() == 2], "weight_decay": 0.1},
                                   {"params": [p for p in twin.parameters() if p.dim() == 1], "weight_decay": 0.0}],
                                  betas=(0.9, cfg.beta2))
    losses = []
    for step in range(1, 7):
        inputs, wanted = m.get_batch((train[0], targets), 12, cfg.seed, step)
        loss = F.cross_entropy(twin(inputs).flatten(0, 1), wanted.flatten())
        loss.backward()
        norm = sum(p.grad.square().sum() for p in twin.parameters()).sqrt()
        for p in twin.parameters():
            p.grad *= (1 / (norm + 1e-6)).clamp(max=1)
        for group in optimizer.param_groups:
            group["lr"] = m.lr_at(step - 1, cfg)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert history[0]["loss"] == pytest.approx(losses[0]) and history[1]["loss"] == pytest.approx(sum(losses[1:5]) / 4)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_evaluation_weighs_tokens_and_leaves_training_alone(m):
    model, cfg, train, (inputs, targets), spec = setting(m, dropout=0.5)
    targets = targets.clone()
    targets[0, 1:] = -100
    logp = model.eval()(inputs).log_softmax(-1).flatten(0, 1)
    kept = targets.flatten() >= 0
    by_hand = -logp[kept, targets.flatten()[kept]].mean().item()
    model.train()
    assert m.evaluate(model, (inputs, targets), cfg) == pytest.approx(by_hand)
    runs = []
    for every in (3, 20):
        model, cfg, train, val, spec = setting(m, eval_every=every, dropout=0.2)
        history = m.train(model, cfg, train, val, spec)
        runs.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert [row["step"] for row in history if "val_loss" in row] == [1, *range(every, 20, every), 20]
    assert torch.equal(*runs)


def test_a_step_without_counted_tokens_changes_no_loss(m):
    model, cfg, (inputs, targets), val, spec = setting(m)
    history = m.train(model, cfg, (inputs, torch.full_like(targets, -100)), val, spec)
    assert history[-1]["loss"] == 0 and math.isfinite(history[-1]["val_loss"])


def weights(path):
    return torch.load(path, weights_only=True)


def same_run(a, b):
    a, b = weights(a), weights(b)
    assert a["step"] == b["step"] and all(torch.equal(a["model"][name], b["model"][name]) for name in b["model"])
    for i, state in b["optimizer"]["state"].items():
        assert all(torch.equal(a["optimizer"]["state"][i][name], state[name]) for name in state)
    losses = [{row["step"]: row["val_loss"] for row in run["history"] if "val_loss" in row} for run in (a, b)]
    return losses[0] == losses[1]


def test_ctrl_c_finishes_the_step_and_resume_is_exact(m, monkeypatch):
    settings = TINY | dict(data="text.txt", dropout=0.2, grad_accum=2)
    m.main(m.Config(**settings, out="whole"))
    draw = m.get_batch
    monkeypatch.setattr(m, "get_batch", lambda data, rows, seed, step: (
        step == 13 and os.kill(os.getpid(), signal.SIGINT), draw(data, rows, seed, step))[1])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="step 13 is saved"):
        m.main(m.Config(**settings, out="cut"))
    assert weights("cut/ckpt.pt")["step"] == 13 and signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(m, "get_batch", draw)
    os.rename("cut", "moved run")  # neither the folder nor the text is where it was
    os.rename("text.txt", "moved text.txt")
    m.main(m.Config(out="moved run", data="moved text.txt", resume=True))
    assert same_run("moved run/ckpt.pt", "whole/ckpt.pt")
    m.main(m.Config(out="moved run", data="moved text.txt", resume=True))  # a finished run reports again
    assert same_run("moved run/ckpt.pt", "whole/ckpt.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_kill_at_any_moment_and_resume_is_exact(m):
    command = [sys.executable, m.__file__, *"--data text.txt --max-steps 60 --eval-every 1 --n-layer 1 --n-embd 16 "
               "--block-size 12 --batch-size 30 --max-new-tokens 1 --device cpu --out".split()]
    whole = subprocess.Popen([*command, "whole"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rng = random.Random(time.time())
    resume, steps = [*command[:2], "--resume", "--out", "cut"], 0
    for start in ([*command, "cut"], resume):
        run = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and not (Path("cut/ckpt.pt").exists() and weights("cut/ckpt.pt")["step"] > steps + 5):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.05)
        run.kill()
        run.wait()
        steps = weights("cut/ckpt.pt")["step"]  # a whole file, old or new
    assert 10 < steps < 60
    subprocess.run(resume, check=True, capture_output=True)
    assert whole.wait() == 0 and same_run("cut/ckpt.pt", "whole/ckpt.pt")


def test_what_is_not_finite_or_does_not_fit_keeps_the_checkpoint(m, monkeypatch):
    model, cfg, train, val, spec = setting(m)
    m.train(model, cfg, train, val, spec)
    kept, loss = Path("run/ckpt.pt").read_bytes(), m.compute_loss
    monkeypatch.setattr(m, "compute_loss", lambda *batch: loss(*batch) * math.nan)
    with pytest.raises(ValueError, match="not finite at step 1,"):
        m.train(model, cfg, train, val, spec)
    monkeypatch.setattr(m, "compute_loss", loss)
    with pytest.raises(ValueError, match="not finite at step 1,"):  # finite before the step, spoiled by it
        m.train(*setting(m, lr=1e35))
    if Path("/dev/full").exists():
        os.symlink("/dev/full", "run/ckpt.tmp")
        with pytest.raises(OSError, match="No space left"):
            m.train(*setting(m))
    assert Path("run/ckpt.pt").read_bytes() == kept


# --- published weights -----------------------------------------------------------------------------------------------
@pytest.fixture
def published(m, hf):
    """A folder "gpt" with a small GPT-2 and a tokenizer of its own -> its config.json as a dict, to change."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"])}
    inner = Tokenizer(models.BPE(vocab, [("t", "h")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=260, n_positions=16, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3,
                           bos_token_id=0, eos_token_id=0)
    hf.GPT2LMHeadModel(config).save_pretrained("gpt")
    inner.save("gpt/tokenizer.json")
    return json.loads(Path("gpt/config.json").read_text())


def test_a_model_with_its_own_tokenizer_writes_and_is_tuned(m, hf, published, capsys):
    cfg = m.parse_config("--load gpt --prompt this --temperature 0 --max-new-tokens 9".split())
    model = m.main(cfg)
    ids = [published["vocab_size"] - 3, *(i for i in m.make_tokenizer("json", Path(
        "gpt/tokenizer.json").read_text()).encode("is"))]
    other = hf.AutoModelForCausalLM.from_pretrained("gpt")
    new = other.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
    told = m.make_tokenizer("json", Path("gpt/tokenizer.json").read_text()).decode(new[0].tolist())
    assert capsys.readouterr().out.rstrip("\n") == told.rstrip("\n") and ids[0] == 257
    assert m.make_tokenizer("json", Path("gpt/tokenizer.json").read_text()).eos == 0
    tuned = m.main(m.Config(load="gpt", data="text.txt", dropout=0.1, **TINY | dict(max_steps=2)))
    assert tuned.cfg.dropout == 0.1 and not torch.equal(tuned.lm_head.weight, model.lm_head.weight)
    assert weights("runs/decoder_only/ckpt.pt")["tokenizer"][0] == "json"
    m.main(m.Config(load="runs/decoder_only", prompt="this", beams=2, max_new_tokens=3, device="cpu"))
    # From a run of one's own, too, training starts at step 1: weights only, not the optimizer or the step number.
    m.main(m.Config(load="runs/decoder_only/ckpt.pt", data="text.txt", out="again", **TINY | dict(max_steps=2)))
    assert [row["step"] for row in weights("again/ckpt.pt")["history"]] == [1, 2]
    Path("gpt/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json"):
        m.main(cfg)


@pytest.mark.parametrize("key, value", [
    ("activation_function", "gelu"), ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False), ("model_type", "opt"),
    ("scale_attn_by_inverse_layer_idx", True), ("tie_word_embeddings", False), ("add_cross_attention", True),
    ("n_inner", 50), ("quantization_config", {"bits": 4}), ("rope_theta", 10000.0), ("a_new_field", "x")])
def test_another_arithmetic_is_refused_by_name(m, published, key, value):
    Path("gpt/config.json").write_text(json.dumps(published | {key: value}))
    with pytest.raises(ValueError, match=key):
        m.from_pretrained("gpt")


def test_files_as_on_the_hub(m, published, monkeypatch):
    from safetensors.torch import load_file, save_file
    tensors, expected = load_file("gpt/model.safetensors"), m.from_pretrained("gpt")
    old = {name.removeprefix("transformer."): t.bfloat16() if t.dim() == 2 else t for name, t in tensors.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(old, "gpt/model.safetensors")
    Path("gpt/config.json").write_text(json.dumps({key: published[key] for key in published if "dropout" not in key}
                                                  | dict(n_ctx=16, summary_type="cls_index", output_past=True)))
    got = m.from_pretrained("gpt")
    for a, b in zip(got.parameters(), expected.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, atol=0.02)
    import huggingface_hub
    save = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", lambda *a: save(*a, max_shard_size="20KB"))
    m.save_pretrained(expected, "parts")
    assert len(list(Path("parts").glob("model-*.safetensors"))) > 1
    for a, b in zip(m.from_pretrained("parts").parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    wrong = {"h.1.ln_1.weight": None, "h.0.mlp.c_fc.weight": torch.ones(3, 3), "h.0.extra": torch.ones(1)}
    for name, change in wrong.items():
        save_file({k: t for k, t in {**old, name: change}.items() if t is not None}, "gpt/model.safetensors")
        with pytest.raises(RuntimeError, match=re.escape(name)):
            m.from_pretrained("gpt")


# --- the program -----------------------------------------------------------------------------------------------------
def shell(m, *flags, encoding="utf-8"):
    return subprocess.run([sys.executable, m.__file__, *flags], capture_output=True, text=True, errors="replace",
                          env=os.environ | {"PYTHONIOENCODING": encoding})


def test_a_run_from_a_shell(m, monkeypatch, capsys):
    folder = Path("a folder")
    folder.mkdir()
    monkeypatch.chdir(folder)
    os.rename("../text.txt", "../téxt.txt")  # a console that knows ASCII only prints a question mark for the é
    flags = ("--data ../téxt.txt --max-steps 6 --eval-every 3 --n-layer 1 --n-embd 16 --n-head 2 --block-size 8 "
             "--device cpu --out").split()
    m.main(m.parse_config([*flags, "my run"]))
    assert "ln V = 3.0" in (first := capsys.readouterr().out) and "note" not in first
    summary = json.loads(Path("my run/summary.json").read_text(encoding="utf-8"))
    assert summary["val_loss"] / math.log(2) == pytest.approx(summary["results"]["bits_per_byte"], rel=0.05)
    assert summary["config"]["data"] == "../téxt.txt" and Path("my run/curve.png").stat().st_size > 5000
    second = shell(m, *flags, "my run", encoding="ascii")
    assert second.returncode == 0 and "kept as ckpt-2" in second.stdout.split("step")[0], second.stderr
    (kept,) = Path("my run").glob("ckpt-*.pt")
    assert same_run("my run/ckpt.pt", kept)
    command = second.stdout.strip().splitlines()[-1].removeprefix("Next:")
    told = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert told.startswith(shlex.split(command)[-1].removeprefix("--prompt="))


class Evil:
    def __reduce__(self):  # what a pickle calls when it is opened
        return open, ("hacked", "w")


def test_user_errors_are_one_line(m):
    Path("binary").write_bytes(bytes(range(256)))
    Path("short").write_text("too short")
    Path("empty").write_text("")
    Path("half").mkdir()
    Path("half/ckpt.pt").write_bytes(b"PK\x03\x04 not really")
    torch.save({"config": {"n_kv_head": 2}}, "foreign.pt")
    Path("foreign").mkdir()
    os.rename("foreign.pt", "foreign/ckpt.pt")
    Path("evil").mkdir()
    torch.save({"config": {}, "model": Evil()}, "evil/ckpt.pt")
    for flags, words in {"--data binary": "utf-8", "--data short": "too short", "--data empty": "too short",
                         "--data nowhere": "nowhere", "--data half": "directory", "--load half --prompt x": "half",
                         "--load foreign --prompt x": "foreign", "--resume --out nowhere": "nowhere",
                         "--load evil --prompt x": "evil",
                         "--data text.txt --tokenizer x": "x", "--data text.txt --n-head 5": "n_head",
                         "--data text.txt --prompt Ω --max-steps 1": "lacks"}.items():
        with pytest.raises((OSError, ValueError), match=words):
            m.main(m.parse_config([*flags.split(), "--device", "cpu"]))
    assert not Path("hacked").exists() and not Path("runs").exists()  # no code ran, nothing was begun
    done = shell(m, "--load", "half", "--prompt", b"\xff\xfe".decode(errors="surrogateescape"))
    assert done.returncode == 1 and done.stderr.startswith("error: half") and len(done.stderr.splitlines()) == 1
    done = shell(m, "--help", encoding="cp932")
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(m.Config)]
    assert done.returncode == 0 and all(flag in done.stdout for flag in flags)


def test_odd_texts_train(m, capsys):
    Path("a $x_$.txt").write_text("a" * 900)  # a dollar in a title is no formula
    assert m.main(m.Config(data="a $x_$.txt", out="a", **TINY)).cfg.vocab_size == 1
    Path("quoted").write_text('"Who is there?" ' * 50)  # the suggested prompt is a word, whatever comes first
    m.main(m.Config(data="quoted", out="q", **TINY | dict(block_size=16, max_steps=1)))
    assert capsys.readouterr().out.rstrip().endswith('--prompt="Who"')


def test_command_line(m):
    cfg = m.parse_config("--preset gpt2 --n-layer 3 --no-resume --lr 0.5".split())
    assert (cfg.n_layer, cfg.n_embd, cfg.resume, cfg.lr, cfg.max_steps) == (3, 768, False, 0.5, 600_000)


@pytest.mark.slow
def test_shakespeare_in_2000_steps(m, data_dir, monkeypatch):
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    m.main(m.Config(data="shakespeare", out="run", device="cpu"))
    assert json.loads(Path("run/summary.json").read_text())["val_loss"] <= 1.74
