"""kv_cache.py: every way of writing gives the tokens of transformers, or exactly the distribution of its model."""
import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

SMALL = dict(data="pydocs", n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_size=40, block_size=40, batch_size=2,
             max_steps=8, warmup_steps=3, contexts="", device="cpu", window=6, sinks=2)
SHAPE = dict(vocab_size=31, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_size=40, device="cpu", window=6, sinks=2)


def scenario(m, tmp_path, fixed):
    """For tests/test_house.py: reach every line with a shape comment."""
    fixed.update(D=32)
    (tmp_path / "t.txt").write_text("".join(random.Random(0).choices("abcdefgh \n", k=2500)))
    m.main(m.Config(**SMALL | dict(data="t.txt", out="run", n_embd=128, max_steps=2)))
    small = build(m, n_embd=128)
    for kind in (None, m.GrowingStore):
        m.write(small, [[1, 2, 3]], 3, kind)
    m.write(m.twin(small, compiled=True), [[1, 2, 3]], 3)
    m.stepper(small, m.StaticStore, 9, 4)()


def build(m, seed=0, **changes):
    """A model with random weights, in float64: ties between logits, which would make tokens differ, do not happen."""
    torch.manual_seed(seed)
    return m.Llama(m.Config(**SHAPE | changes)).double().eval().requires_grad_(False)


def prompts_of(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(31, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def hf(m):
    transformers = pytest.importorskip("transformers")

    def twin(model):
        cfg = model.cfg
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.n_embd, intermediate_size=cfg.ffn_size, rms_norm_eps=1e-5,
            num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head,
            rope_theta=10_000.0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)).double().eval()
        other.load_state_dict(model.state_dict())  # the names are the published ones
        return other
    return twin


@pytest.fixture(scope="module")
def compiled(m):
    """One model, compiled once for all tests."""
    return m.twin(build(m), compiled=True)


def by_transformers(other, prompt, n):
    ids = torch.tensor([prompt])
    return other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                          do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()


# --- the same tokens on every rung -----------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=4), dict(n_kv_head=1), dict(n_layer=1, n_embd=24)], ids=str)
def test_logits_equal_transformers(m, hf, changes):
    model, ids = build(m, **changes), torch.tensor(prompts_of(1, 50, 50))
    with torch.no_grad():
        expected = hf(model)(ids).logits
        torch.testing.assert_close(model(ids), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(model.float()(ids), expected.float(), atol=1e-4, rtol=1e-4)


def test_every_exact_rung_writes_transformers_tokens(m, hf, compiled):
    model, prompt = build(m), prompts_of(2, 9)
    expected = by_transformers(hf(model), prompt[0], 25)
    wide = m.twin(model)
    wide.cfg = dataclasses.replace(model.cfg, window=40)
    for one, kind in ((model, None), (model, m.GrowingStore), (model, m.StaticStore), (compiled, m.StaticStore),
                      (wide, m.WindowStore)):
        assert m.write(one, prompt, 25, kind)[0].tolist() == expected, kind
    assert m.speculate(model, build(m, 5, n_layer=1), prompt[0], 25)[0] == expected


def test_compiled_logits_are_those_of_the_plain_layers(m, compiled):
    model, ids = build(m), torch.tensor(prompts_of(14, 7))
    cache, one = m.Cache(compiled, m.StaticStore, 1, 9), torch.ones(1, dtype=torch.long)
    for t in range(7):
        found = m.read(compiled, ids[:, t:t + 1], cache, one)
    torch.testing.assert_close(found, model(ids)[:, -1], atol=1e-6, rtol=1e-6)
    # Nothing was left to the plain interpreter: a line that the compiler cannot follow would cost speed in silence.
    # (test_house.py's shape checks, which call eval, are not the script's.)
    assert not [reason for reason in torch._dynamo.utils.counters["graph_break"] if "`eval`" not in reason]


def test_rows_of_unequal_length_do_not_know_each_other(m, hf, compiled):
    """Case 26: up to the last column of the cache, each row is written as if it were alone."""
    model, prompts = build(m), prompts_of(3, 3, 17, 1, 9)
    other = hf(model)
    expected = [by_transformers(other, prompt, 30) for prompt in prompts]
    for one, kind in ((model, None), (model, m.StaticStore), (compiled, m.StaticStore)):
        assert m.write(one, prompts, 30, kind).tolist() == expected
    for kind in (m.GrowingStore, m.WindowStore):
        with pytest.raises(ValueError, match="equal length"):
            m.write(model, prompts, 5, kind)


def test_a_prompt_may_come_in_pieces(m):
    model, ids = build(m), torch.tensor(prompts_of(4, 20, 20))
    expected = model(ids)
    for kind in (m.GrowingStore, m.StaticStore):
        cache, parts = m.Cache(model, kind, 2, 20), []
        for start, end in ((0, 7), (7, 8), (8, 20)):
            parts.append(model(ids[:, start:end], cache))
            cache.lengths += end - start
            cache.longest = end
        torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_what_stands_behind_a_row_is_never_seen(m):
    """The rule of lengths: NaN behind them changes nothing (and NaN anywhere in sight would)."""
    model = build(m)
    cache = m.Cache(model, m.StaticStore, 2, 30)
    ids, counts = m.pad(prompts_of(5, 4, 9), "cpu")
    expected = m.read(model, ids, cache, counts).argmax(-1)
    for store in cache.layers:
        for row, n in enumerate((4, 9)):
            store.keys[row, :, n:] = 100.0
            store.values[row, :, n:] = -50.0
    found = m.read(model, expected[:, None], cache, torch.ones(2, dtype=torch.long))
    for row, prompt in enumerate(prompts_of(5, 4, 9)):
        alone = model(torch.tensor([[*prompt, expected[row].item()]]))[0, -1]
        torch.testing.assert_close(found[row], alone)


def test_a_full_cache_is_never_silently_wrong(m):
    """Made for 6 tokens, with a column to spare: the seventh is right, and the eighth an error."""
    model, ids = build(m), torch.tensor(prompts_of(15, 8))
    cache, one = m.Cache(model, m.StaticStore, 1, 6), torch.ones(1, dtype=torch.long)
    for t in range(7):
        torch.testing.assert_close(m.read(model, ids[:, t:t + 1], cache, one), model(ids[:, :t + 1])[:, -1])
    with pytest.raises(IndexError):
        m.read(model, ids[:, 7:], cache, one)


def test_greedy_and_sampling(m):
    logits = torch.tensor([[0.0, math.log(3.0), -1e9]]).repeat(2, 1)
    assert m.distribution(logits, 0).tolist() == [[0, 1, 0]] * 2
    torch.testing.assert_close(m.distribution(logits, 1.0)[0], torch.tensor([0.25, 0.75, 0.0]))
    torch.testing.assert_close(m.distribution(logits, 0.5)[0], torch.tensor([0.1, 0.9, 0.0]))
    draws = m.draw(m.distribution(logits[:1], 1.0).repeat(2500, 1), torch.Generator().manual_seed(0))
    assert abs(draws.float().mean().item() - 0.75) < 0.03


# --- int8 ------------------------------------------------------------------------------------------------------------
def test_int8_rounds_weights_and_nothing_else(m):
    model = build(m)
    rounded = m.twin(model, int8=True)
    W, part = model.lm_head.weight, rounded.lm_head
    assert part.weight.dtype == torch.int8 and model.lm_head.weight.dtype == torch.float64
    assert ((part.weight * part.scale[:, None] - W).abs() <= part.scale[:, None] / 2 + 1e-9).all()
    assert (part.weight.abs().amax(1) == 127).all()  # the largest of each row
    assert rounded.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    ids = torch.tensor(prompts_of(6, 30))
    error, logits = rounded(ids) - model(ids), model(ids)
    assert 0 < error.pow(2).mean().sqrt() < 0.03 * logits.std()
    # One token at a time uses the other product: same numbers.
    cache = m.Cache(rounded, m.StaticStore, 1, 30)
    for t in range(30):
        last = m.read(rounded, ids[:, t:t + 1], cache, torch.ones(1, dtype=torch.long))
    torch.testing.assert_close(last, rounded(ids)[:, -1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 40])
def test_a_projection_is_a_linear_layer(m, rows):
    part, x = m.Projection(24, 37).double(), torch.randn(rows, 1, 24, dtype=torch.float64)
    torch.testing.assert_close(part(x), F.linear(x, part.weight))
    torch.testing.assert_close(part(x.transpose(0, 1)), F.linear(x, part.weight).transpose(0, 1))


def test_compiled_int8_is_int8(m):
    rounded = m.twin(build(m), int8=True)
    fast = m.twin(build(m), int8=True, compiled=True)
    prompt = prompts_of(7, 8)
    assert torch.equal(m.write(fast, prompt, 12), m.write(rounded, prompt, 12))


def test_without_a_compiler_the_rungs_still_run(m, monkeypatch, capsys):
    monkeypatch.setattr(m.shutil, "which", lambda name: None)
    plain = m.twin(build(m), compiled=True)
    assert "no C++ compiler" in capsys.readouterr().out
    assert all(layer._compiled_call_impl is None for layer in plain.model.layers)


# --- the ring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window, sinks", [(6, 0), (6, 2), (1, 0), (3, 4)])
def test_a_ring_is_attention_to_the_newest_and_the_first(m, window, sinks):
    """Token t sees itself, window - 1 before it, and the sinks, whose keys are turned so that they stand right before
    the window: the definition, written out for one layer with a mask."""
    model = build(m, n_layer=1, window=window, sinks=sinks)
    prompt, layer = prompts_of(8, 25)[0], model.model.layers[0]
    cache, ids = m.Cache(model, m.WindowStore, 1, 0), torch.tensor([prompt])
    x = layer.input_layernorm(model.model.embed_tokens(ids))
    q, k, v = (part(x).view(1, 25, -1, 8).transpose(1, 2) for part in (
        layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    for t in range(25):
        found = m.read(model, ids[:, t:t + 1], cache, torch.ones(1, dtype=torch.long))
        inside = [s for s in range(t + 1) if s < sinks or s > t - window]
        places = [s if s > t - window or t < window + sinks else s + t - (window + sinks) + 1 for s in inside]

        def turn(x, places):
            cos, sin = m.rotation(torch.tensor([places]), 8)
            return m.apply_rope(x, cos.double(), sin.double())
        scores = turn(q[:, :, t:t + 1], [t]) @ turn(k[:, :, inside], places).transpose(2, 3) / math.sqrt(8)
        y = (scores.softmax(-1) @ v[:, :, inside]).transpose(1, 2).flatten(2)
        h = model.model.embed_tokens(ids[:, t:t + 1]) + layer.self_attn.o_proj(y)
        g = layer.post_attention_layernorm(h)
        h = h + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(g)) * layer.mlp.up_proj(g))
        torch.testing.assert_close(found, model.lm_head(model.model.norm(h))[:, 0], atol=1e-6, rtol=1e-5)


def test_a_long_prompt_enters_a_ring_token_by_token(m):
    model, prompt = build(m), prompts_of(9, 30)
    cache = m.Cache(model, m.WindowStore, 1, 0)
    for t in range(30):
        logits = m.read(model, torch.tensor(prompt)[:, t:t + 1], cache, torch.ones(1, dtype=torch.long))
    first = logits.argmax(-1).item()
    assert m.write(model, prompt, 1, m.WindowStore)[0].tolist() == [first]
    whole = m.read(model, torch.tensor(prompt), m.Cache(model, m.WindowStore, 1, 0), torch.tensor([30]))
    torch.testing.assert_close(whole, logits)
    assert cache.layers[0].keys.size(2) == 6 + 2 + 1  # constant memory


# --- speculation -----------------------------------------------------------------------------------------------------
def test_speculation_keeps_the_distribution(m):
    """Two tokens of a vocabulary of 5, 2,500 times: chi-square against what the target says, with a poor draft."""
    target, draft = build(m, 1, vocab_size=5), build(m, 2, vocab_size=5, n_layer=1)
    for model in (target, draft):
        model.lm_head.weight.mul_(1.5)
    prompt, count, generator = [1, 2], torch.zeros(5, 5), torch.Generator().manual_seed(0)
    rates = []
    for _ in range(2500):
        (a, b), rate = m.speculate(target, draft, prompt, 2, 2, 1.0, generator)
        count[a, b] += 1
        rates.append(rate)
    first = target(torch.tensor([prompt]))[0, -1].softmax(-1)
    expected = 2500 * torch.stack([first[a] * target(torch.tensor([[*prompt, a]]))[0, -1].softmax(-1)
                                   for a in range(5)])
    other = draft(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert 0.3 < sum(rates) / 2500 < 0.95 and (first - other).abs().sum() > 0.2  # neither all nor nothing
    large = expected > 4
    statistic = ((count - expected).pow(2) / expected)[large].sum().item()
    degrees = int(large.sum()) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees), (statistic, degrees)
    # The test can fail: the draft's own distribution is far away.
    assert ((count.sum(1) - 2500 * other).pow(2) / (2500 * other)).sum() > 60


@pytest.mark.parametrize("proposals", [1, 3, 7])
def test_a_draft_that_is_the_target_is_always_right(m, proposals):
    model, prompt = build(m), prompts_of(10, 5)[0]
    for temperature in (0.0, 1.0):
        new, rate = m.speculate(model, model, prompt, 20, proposals, temperature, torch.Generator().manual_seed(1))
        assert rate == 1.0 and len(new) == 20
    assert m.speculate(model, model, prompt, 20, proposals)[0] == m.write(model, [prompt], 20)[0].tolist()


def test_the_target_reads_once_per_round(m, monkeypatch):
    """The point of it: 20 tokens of an ever accepting target take 4 passes of 5 tokens."""
    model, passes = build(m), []
    draft = m.twin(model)
    hidden = m.Llama.hidden
    monkeypatch.setattr(m.Llama, "hidden", lambda self, ids, cache=None: (
        passes.append(ids.size(1)) if self is model else None, hidden(self, ids, cache))[1])
    m.speculate(model, draft, prompts_of(11, 6)[0], 20, 4)
    assert passes == [6 + 4, 5, 5, 5]


# --- the queue -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_the_queue_answers_as_one_prompt_at_a_time(m, slots):
    model, rng = build(m), random.Random(slots)
    prompts = prompts_of(12, *(rng.randint(1, 12) for _ in range(7)))
    budgets = [rng.randint(1, 15) for _ in prompts]
    alone = [m.write(model, [prompt], n)[0].tolist() for prompt, n in zip(prompts, budgets, strict=True)]
    answers, passes = m.serve(model, prompts, budgets, slots)
    assert answers == alone
    if slots == 1:
        assert passes == sum(budgets)  # a prefill is a pass and gives the first token
    if slots == 9:
        assert passes == max(budgets)
    eos = alone[2][min(3, len(alone[2]) - 1)]
    cut = [row[:row.index(eos) + 1] if eos in row else row for row in alone]
    assert m.serve(model, prompts, budgets, slots, eos)[0] == cut


def test_passes_are_all_counted(m, monkeypatch):
    """Prefills too: the number of passes is the number of times that the model was called."""
    model, calls, hidden = build(m), [], m.Llama.hidden
    monkeypatch.setattr(m.Llama, "hidden", lambda self, ids, cache=None: (calls.append(1), hidden(self, ids, cache))[1])
    _, passes = m.serve(model, prompts_of(13, 4, 4, 4, 4, 4), [2, 9, 3, 3, 4], 2)
    assert passes == len(calls) == 9 + 3


# --- the ruler -------------------------------------------------------------------------------------------------------
def test_bytes_are_counted(m):
    model = build(m).float()
    D, layer = 8, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40 + 2 * 32
    weights = 4 * (2 * layer + 32 + 31 * 32)  # layers, last norm, head; not the embedding
    assert m.streamed_bytes(model, 0, m.StaticStore) == weights
    past = 2 * 2 * 2 * D * 4  # keys and values, layers, key heads, head size, float32
    assert m.streamed_bytes(model, 100, m.StaticStore) == weights + 100 * past
    assert m.streamed_bytes(model, 100, m.WindowStore) == weights + 8 * past
    rounded = m.twin(model, int8=True)
    matrices = 2 * (layer - 64) + 31 * 32
    scales = 4 * (2 * (32 + 16 + 16 + 32 + 40 + 40 + 32) + 31)
    assert m.streamed_bytes(rounded, 0, m.StaticStore) == matrices + scales + 4 * (2 * 64 + 32)


def test_seconds_are_medians_in_turns(m):
    order = []

    def work(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds if len(order) != 3 else 0.2)  # one slow round must not count
        return run
    found = m.seconds_each(dict(a=work("a", 0.01), b=work("b", 0.03)), 5, "cpu")
    assert order == ["a", "b"] * 6 and 0.009 < found["a"] < 0.02 and 0.029 < found["b"] < 0.05


def test_a_step_is_one_token_behind_the_context(m, monkeypatch):
    model, seen, attend = build(m), [], m.attend

    def watched(q, k, v, allowed):
        seen.append((q.size(2), k.size(2) if allowed is None else int(allowed.sum())))
        return attend(q, k, v, allowed)
    monkeypatch.setattr(m, "attend", watched)
    for kind, expected in ((m.StaticStore, [(1, 21), (1, 22)]), (m.GrowingStore, [(1, 21), (1, 22)]),
                           (m.WindowStore, [(1, 8), (1, 8)]), (None, [(20, 20), (20, 20)])):
        step = m.stepper(model, kind, 20, 5)
        seen.clear()
        step(), step()
        assert seen[::2] == expected, kind


def test_the_ladder_is_consistent(m, tmp_path, monkeypatch):
    """Fractions are tokens per second * bytes / bandwidth. (Without the compiler, which other tests wait for.)"""
    twin = m.twin
    monkeypatch.setattr(m, "twin", lambda model, int8=False, compiled=False: twin(model, int8))

    def eight_tenths(works, rounds, device):
        assert all(len(work()) == 8 for name, work in works.items() if name != "memory")  # tokens in each turn
        return dict.fromkeys(works, 0.8)
    with monkeypatch.context() as patch:
        patch.setattr(m, "seconds_each", eight_tenths)
        results, _ = m.climb(m.Config(**SHAPE), [16])
        assert results["tokens_per_second"]["static"][16] == pytest.approx(10.0)
        assert results["read_bandwidth_gb_s"][16] == pytest.approx(4 * 2 ** 26 / 0.8e9)
    results, bound = m.climb(m.Config(**SHAPE), [16, 40])
    for rung, context in itertools.product(("none", "growing", "static", "compiled", "int8", "window"), (16, 40)):
        size = m.streamed_bytes(m.twin(build(m).float(), int8=rung == "int8"), context,
                                m.WindowStore if rung == "window" else m.StaticStore)
        share = results["tokens_per_second"][rung][context] * size / results["read_bandwidth_gb_s"][context] / 1e9
        assert results["bandwidth_fraction"][rung][context] == pytest.approx(share) and 0 < share < 1
    assert all(results["same_tokens"][rung] for rung in ("none", "growing", "static", "compiled"))
    assert bound[16] > bound[40] > results["tokens_per_second"]["static"][40]
    m.plot_ladder(tmp_path / "ladder.png", results["tokens_per_second"] | {"what memory allows": bound}, "title")
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


# --- a run -----------------------------------------------------------------------------------------------------------
def test_a_run_tells_what_it_measured(m, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = m.main(m.Config(**SMALL | dict(n_layer=1)))
    results = json.loads((tmp_path / "runs/kv_cache/summary.json").read_text())["results"]
    assert results["speculation_exact"] and all(part["same"] for part in results["queue"].values())
    assert results["queue"]["tenfold"]["passes_queue"] < results["queue"]["tenfold"]["passes_batches"] == 400
    assert 0 < results["acceptance"] < 1 and 0 < results["val_loss"]["float32"] < 6
    assert results["val_loss"]["int8"] == pytest.approx(results["val_loss"]["float32"], abs=0.02)
    # A ring that holds all of the row is no ring: the loss of the second half of these rows.
    rows = m.make_data(model.cfg)[1]
    inputs, targets = (part[:32] for part in rows)
    expected = F.cross_entropy(model(inputs)[:, 20:].flatten(0, 1), targets[:, 20:].flatten()).item()
    assert results["window_loss"]["40 + 0"] == pytest.approx(expected, abs=1e-4)
    assert "accepted" in capsys.readouterr().out


@pytest.mark.parametrize("args, words", [
    ("--n-head 3", "must divide"), ("--contexts 12,x", "invalid literal"), ("--data nowhere", "nowhere"),
    ("--n-head 0", "numbers at 1"), ("--proposals 0", "numbers at 1"), ("--contexts 0", "numbers at 1"),
    ("--rung 3", "unrecognized")])
def test_mistakes_cost_one_line(m, tmp_path, args, words):
    done = subprocess.run([sys.executable, m.__file__, *args.split(), "--device", "cpu"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ)
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr, done.stderr
