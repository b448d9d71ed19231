"""kv_cache.py: every exact rung writes what transformers writes, the others err within stated bounds."""

import itertools
import json
import math
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

EXACT = ("none", "growing", "static", "gqa", "compiled")
CACHED = ("growing", "static", "gqa", "compiled", "int8", "int8-cache", "window")


@pytest.fixture(autouse=True)
def uncompiled(m, monkeypatch, request):
    """A compiled function is the same function: most tests run it as it is, those with `really` compile it."""
    if "really" not in request.node.name:
        monkeypatch.setattr(m, "compiled", lambda function: function)


def config(m, seed=0, **changes):
    """Sizes that are pairwise different, weights wide enough that no two tokens are nearly as likely."""
    sizes = dict(vocab_size=97, block_size=64, n_layer=3, n_head=6, n_kv_head=2, n_embd=48, head_size=10, ffn_size=70,
                 init_std=0.2, rope_theta=10_000.0, device="cpu", seed=seed, window=64, sinks=0)
    return m.Config(**{**sizes, **changes})


def reference(m, model, tmp_path):
    """The same weights in transformers, through save_pretrained."""
    m.save_pretrained(model, model.cfg, tmp_path)
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()


def ragged(lengths, side, seed=0):
    """-> prompts, and the same as one padded batch (ids, mask)."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 97, (n,), generator=generator) for n in lengths]
    ids = torch.full((len(lengths), max(lengths)), 7)                          # pads are an ordinary id here
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        at = slice(ids.size(1) - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = prompt, True
    return prompts, ids, mask


# ------------------------------------------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("changes", [dict(), dict(n_kv_head=6), dict(n_kv_head=1, tie_weights=True),
                                     dict(rope_factor=8.0, rope_original=32)], ids=str)
def test_logits_equal_transformers(m, tmp_path, changes):
    model = m.build_model(config(m, **changes)).eval()
    theirs = reference(m, model, tmp_path)
    _, ids, mask = ragged((40, 33, 12), "left")
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        expected = theirs(ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(model(ids, mask)[mask], expected[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed, changes", list(enumerate([
    dict(), dict(n_kv_head=6), dict(n_kv_head=1, tie_weights=True)])))
def test_exact_rungs_write_what_transformers_writes(m, tmp_path, seed, changes):
    """One row and several of unequal length, padded on either side; float64, so that rounding decides nothing."""
    model = m.build_model(config(m, seed, **changes)).eval()
    theirs = reference(m, model, tmp_path).double()
    model.double()
    prompts, left, left_mask = ragged((3, 11, 7, 1), "left", seed)
    _, right, right_mask = ragged((3, 11, 7, 1), "right", seed)
    expected = theirs.generate(left, attention_mask=left_mask.long(), max_new_tokens=40, do_sample=False,
                               eos_token_id=[1, 2], pad_token_id=0)[:, 11:]
    assert len({tuple(row) for row in expected.tolist()}) == 4
    for rung in (*EXACT, "window"):  # a window that is wide enough is exact
        one = m.on_rung(model, rung)
        assert torch.equal(m.generate(one, left, 40, mask=left_mask, eos_ids=(1, 2)), expected), rung
        assert torch.equal(m.generate(one, right, 40, mask=right_mask, eos_ids=(1, 2)), expected), rung
        for row, prompt in enumerate(prompts):
            alone = m.generate(one, prompt[None], 40, eos_ids=(1, 2))[0]
            assert torch.equal(alone, expected[row, :len(alone)]), rung


@pytest.mark.parametrize("rung", [*EXACT, "window"])
def test_beams_equal_transformers(m, tmp_path, rung):
    model = m.build_model(config(m, 3)).eval()
    theirs = reference(m, model, tmp_path).double()
    one = m.on_rung(model.double(), rung)
    _, ids, mask = ragged((4, 9), "left")
    out = theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=14, num_beams=3, length_penalty=1.0,
                          do_sample=False, eos_token_id=[1, 2], pad_token_id=0, num_return_sequences=2,
                          return_dict_in_generate=True, output_scores=True)
    found, scores = m.beam_search(one, ids, 14, mask=mask, num_beams=3, eos_ids=(1, 2), n_best=2, pad_id=1)
    assert torch.equal(found.flatten(0, 1), out.sequences[:, 9:])
    torch.testing.assert_close(scores.flatten().float(), out.sequences_scores.float(), atol=1e-4, rtol=0)
    assert torch.equal(m.beam_search(one, ids, 9, mask=mask, num_beams=1)[0][:, 0], m.generate(one, ids, 9, mask=mask))


@pytest.mark.parametrize("rung", ["gqa", "compiled", "int8-cache"])
def test_a_beam_as_wide_as_the_tree_finds_the_best(m, rung):
    model = m.on_rung(m.build_model(config(m, vocab_size=5, n_layer=2)).double(), rung)
    ids = torch.tensor([[1, 2, 3]])
    found, score = m.beam_search(model, ids, 3, num_beams=125)
    best, winner = -math.inf, None
    with torch.no_grad():
        for text in itertools.product(range(5), repeat=3):
            cache = m.new_cache(model, 1, 6)
            logp = model(torch.cat((ids, torch.tensor([text])), 1), cache=cache).log_softmax(-1)[0]
            total = sum(logp[2 + i, token].item() for i, token in enumerate(text))
            if total > best:
                best, winner = total, text
    assert tuple(found[0, 0].tolist()) == winner and score[0, 0].item() == pytest.approx(best / 3, abs=1e-5)


def test_beam_search_on_a_hundred_random_models(m):
    """Nothing crashes when beams finish early, and four beams find likelier texts than one on average."""
    gain = []
    for seed in range(100):
        model = m.on_rung(m.build_model(config(m, seed, vocab_size=11, n_layer=1, init_std=0.6)).double(), "compiled")
        ids = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(seed))
        for eos, penalty in (((), 1.0), ((3, 4, 5), 1.5)):
            found, scores = m.beam_search(model, ids, 6, num_beams=4, eos_ids=eos, length_penalty=penalty, n_best=4)
            assert found.shape[:2] == (2, 4) and scores[:, 0].isfinite().all()
            assert (scores[:, :-1] >= scores[:, 1:]).all()
        # without an EOS all texts are equally long, so the scores can be compared
        (text, wide), (_, narrow) = (m.beam_search(model, ids, 6, num_beams=beams) for beams in (4, 1))
        gain.append(wide.mean().item() - narrow.mean().item())
        # the score is what the model gives to this very text, read at once: no beam took another one's cache
        with torch.no_grad():
            logp = model(torch.cat((ids, text[:, 0]), 1)).log_softmax(-1)[:, 3:-1]
        total = logp.gather(2, text[:, 0, :, None]).sum((1, 2)) / 6
        torch.testing.assert_close(wide[:, 0], total.float(), atol=1e-4, rtol=0, check_dtype=False)
    assert sum(gain) / 100 > 0.01 and sum(g > 1e-9 for g in gain) > 30


def test_finished_rows_write_pads(m):
    model = m.on_rung(m.build_model(config(m)), "compiled")
    _, ids, mask = ragged((4, 9, 6), "right")
    free = m.generate(model, ids, 30, mask=mask)
    eos = tuple({int(free[0, 3]), int(free[1, 8])})
    out = m.generate(model, ids, 30, mask=mask, eos_ids=eos, pad_id=96)
    for row, text in zip(free.tolist(), out.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos), 30)
        assert text[:end] == row[:end][:len(text)] and set(text[end:]) <= {96}


# ------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("rung", CACHED)
@pytest.mark.parametrize("padded", [False, "left", "right"])
def test_chunked_prefill(m, rung, padded):
    """A prompt in pieces gives the logits of the prompt at once; on rounded rungs those of the same rung."""
    model = m.on_rung(m.build_model(config(m)), rung)
    _, ids, mask = ragged((20, 15, 7), padded or "left")
    mask = mask if padded else None
    with torch.no_grad():
        whole = model(ids, mask, m.new_cache(model, 3, 20))
        if rung not in ("int8", "int8-cache"):
            real = mask if padded else torch.ones_like(ids, dtype=torch.bool)
            torch.testing.assert_close(whole[real], m.on_rung(model, "gqa")(ids, mask)[real], atol=1e-5, rtol=0)
        cache, parts = m.new_cache(model, 3, 20), []
        for a, b in ((0, 4), (4, 5), (5, 13), (13, 20)):
            parts.append(model(ids[:, a:b], None if mask is None else mask[:, a:b], cache))
        parts = torch.cat(parts, 1)
    real = mask if padded else torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(parts[real], whole[real], atol=1e-4 if "int8" in rung else 1e-5, rtol=0)
    assert parts.isfinite().all()


@pytest.mark.parametrize("rung", CACHED)
def test_a_chunk_sees_its_past_and_not_its_future(m, rung):
    model = m.on_rung(m.build_model(config(m)), rung)
    ids = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(1))

    def logits(ids):
        cache = m.new_cache(model, 1, 12)
        with torch.no_grad():
            return torch.cat([model(ids[:, a:b], cache=cache) for a, b in ((0, 4), (4, 9), (9, 12))], 1)

    before = logits(ids)
    for t in (1, 6, 10):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 97
        after = logits(changed)
        assert torch.equal(before[:, :t], after[:, :t]), t
        assert ((before[:, t:] - after[:, t:]).abs().amax((0, 2)) > 1e-6).all(), t


@pytest.mark.parametrize("rung", ["static", "gqa", "compiled", "int8", "int8-cache", "window"])
def test_nobody_looks_at_the_column_of_the_pads(m, rung):
    model = m.on_rung(m.build_model(config(m)), rung)
    _, ids, mask = ragged((3, 9, 5), "left")
    texts = []
    for poison in (0.0, math.nan):
        logits, cache = m.prefill(model, ids, mask, 20)
        for store in cache.stores:
            for buffer in store:
                if buffer.is_floating_point() and buffer.size(2) == cache.size + 1:
                    buffer[:, :, -1] = poison
                    for row, length in enumerate(cache.lengths.tolist()):
                        buffer[row, :, length:cache.size] = 0.0 if poison == 0 else 1e30
        for _ in range(10):
            logits, cache = m.decode_step(model, logits.argmax(-1), cache)
        texts.append(logits)
    assert texts[0].isfinite().all() and torch.equal(*texts)


@pytest.mark.parametrize("rung", CACHED)
def test_conversations_do_not_share_state(m, rung):
    """Two caches on one model, taking turns, and each again alone."""
    model = m.on_rung(m.build_model(config(m)), rung)
    prompts = [torch.randint(97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 8)]
    alone = [m.generate(model, prompt, 12) for prompt in prompts]
    states = [m.prefill(model, prompt, None, 20) for prompt in prompts]
    texts = [[], []]
    for _ in range(12):
        for i, (logits, cache) in enumerate(states):
            texts[i].append(logits.argmax(-1))
            states[i] = m.decode_step(model, texts[i][-1], cache)
    for text, expected in zip(texts, alone, strict=True):
        assert torch.equal(torch.stack(text, 1), expected)


@pytest.mark.parametrize("rung", [name for name in CACHED if name != "growing"])
def test_buffers_are_written_in_place_and_in_the_dtype_of_the_model(m, rung):
    model = m.on_rung(m.build_model(config(m)).bfloat16(), rung)
    logits, cache = m.prefill(model, torch.randint(97, (2, 9)), None, 20)
    places = [buffer.data_ptr() for store in cache.stores for buffer in store]
    for _ in range(8):
        logits, cache = m.decode_step(model, logits.argmax(-1), cache)
    assert places == [buffer.data_ptr() for store in cache.stores for buffer in store]
    assert {buffer.dtype for store in cache.stores for buffer in store} <= {torch.bfloat16, torch.int8}
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_gqa_reads_without_copies_and_static_repeats(m):
    model = m.build_model(config(m)).eval()
    for rung, heads in (("static", 6), ("gqa", 2), ("growing", 6)):
        cache = m.new_cache(m.on_rung(model, rung), 2, 9)
        cache.admit(4)
        k, v = torch.randn(2, 2, 2, 4, 10)
        keys, values = cache.update(0, k, v)
        assert keys.shape == (2, heads, 4, 10)
        for seen, new in ((keys, k), (values, v)):
            assert torch.equal(seen, new.repeat_interleave(heads // 2, 1))
        assert (rung == "gqa") == (keys.untyped_storage().data_ptr() in [
            buffer.untyped_storage().data_ptr() for store in getattr(cache, "stores", []) for buffer in store])


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("rung", ["compiled", "int8", "int8-cache", "window"])
def test_the_written_out_step_equals_the_modules(m, rung, rows):
    model = m.build_model(config(m, sinks=3, window=8))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model = m.on_rung(model, rung)
    _, ids, mask = ragged([3 + 2 * (i % 4) for i in range(rows)], "left")
    _, cache = m.prefill(model, ids, mask, 20)
    other = cache.choose(torch.arange(rows))
    for _ in range(6):
        token = torch.randint(97, (rows,))
        logits, cache = m.decode_step(model, token, cache)
        with torch.no_grad():
            expected = model(token[:, None], cache=other)[:, -1]
        torch.testing.assert_close(logits, expected, atol=2e-4 if "int8" in rung else 2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- int8


def test_to_int8(m):
    x = torch.randn(5, 7, 33) * torch.rand(5, 7, 1) * 10
    x[0, 0], x[1, 1, 4] = 0.0, 1000.0
    numbers, scale = m.to_int8(x)
    assert numbers.dtype == torch.int8 and scale.shape == (5, 7, 1) and numbers.abs().max() == 127
    assert ((numbers * scale - x).abs() <= scale / 2 * 1.0001).all() and (numbers[0, 0] == 0).all()
    others = torch.ones(5, 7, dtype=torch.bool)
    others[0, 0] = others[1, 1] = False  # an outlier costs its own row digits and no other
    error = ((numbers * scale - x).pow(2).mean(-1) / x.pow(2).mean(-1)).sqrt()
    assert (error[others] < 0.02).all()


def test_int8_weights_are_small_and_nearly_right(m):
    model = m.build_model(config(m)).eval()
    one = m.on_rung(model, "int8")
    matrices = [p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rows = sum(p.size(0) for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert m.weight_bytes(model) == 4 * (sum(matrices) + norms)
    assert m.weight_bytes(one) == sum(matrices) + 4 * rows + 4 * norms
    ids = torch.randint(97, (2, 30))
    with torch.no_grad():
        exact = model(ids)
        for rung, low, high in (("int8", 1e-4, 0.05), ("int8-cache", 1e-4, 0.06)):
            one = m.on_rung(model, rung)
            error = (one(ids, cache=m.new_cache(one, 2, 30)) - exact).pow(2).mean().sqrt() / exact.std()
            assert low < error < high, rung
    # the original stays what it was, and what is not rounded is shared
    assert type(model.lm_head) is torch.nn.Linear and model.cfg.rung == "compiled"
    assert one.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert m.on_rung(model, "gqa").lm_head.weight is model.lm_head.weight


def test_int8_keys_keep_a_token_with_large_values(m):
    """One scale per token and head: an outlier token does not round its neighbours away."""
    cfg = config(m)
    cache = m.Int8Cache(cfg, 1, 6, torch.zeros(1))
    k = torch.randn(1, 2, 6, 10)
    k[0, 0, 3] *= 1000
    cache.admit(6)
    keys, _ = cache.update(0, k, k)
    error = (keys - k).abs().amax(-1) / k.abs().amax(-1)
    assert (error <= 0.5 / 127 * 1.001).all()
    assert sum(x.numel() * x.element_size() for x in cache.stores[0]) == 2 * 7 * 2 * (10 + 4)


def test_product_in_all_its_forms(m):
    for rows in (1, 2, 8, 9, 17):
        x, w = torch.randn(rows, 33), torch.randn(21, 33)
        torch.testing.assert_close(m.product(x, w), x @ w.T, atol=1e-4, rtol=1e-4)
        numbers, scale = m.to_int8(w)
        torch.testing.assert_close(m.product(x, (numbers, scale[:, 0])), x @ (numbers * scale).T, atol=1e-4, rtol=1e-4)
        # bfloat16 weights are summed in float32: 4,096 ones are 4,096, and not the 256 where bfloat16 stops counting
        ones = torch.ones(rows, 4096, dtype=torch.bfloat16)
        assert (m.product(ones, torch.ones(3, 4096, dtype=torch.bfloat16)) == 4096).all()
    # and products are not rounded before they are summed: 1.0078^2 - 1.0078 * 1.0156 in bfloat16 would be -1/128
    w = torch.full((1, 2), 1.0078125, dtype=torch.bfloat16)
    x = torch.tensor([[1.0078125, -1.015625]], dtype=torch.bfloat16)
    assert m.product(x, w).item() == pytest.approx(1.0078125 * (1.0078125 - 1.015625), rel=1e-3)


def test_int8_rounds_once_in_bfloat16(m):
    x = (torch.randn(50, 400) * 3).bfloat16()
    numbers, scale = m.to_int8(x)
    assert scale.dtype == torch.bfloat16
    assert ((numbers.double() * scale.double() - x.double()).abs() <= 0.5001 * scale.double()).all()


def test_an_int8_cache_is_never_held_at_full_width(m, monkeypatch):
    made = []
    like = torch.zeros(1)
    monkeypatch.setattr(type(like), "new_zeros", lambda self, *a, _f=torch.Tensor.new_zeros, **k: made.append(
        _f(self, *a, **k)) or made[-1])
    m.Int8Cache(config(m), 1, 500, like)
    assert all(x.dtype == torch.int8 or x.size(-1) == 1 for x in made) and len(made) == 12


# ------------------------------------------------------------------------------------------------- window


@pytest.mark.parametrize("sinks, window", [(0, 5), (3, 5), (2, 1), (4, 9)])
@pytest.mark.parametrize("rows", [1, 3])
def test_window_sees_the_sinks_and_the_newest(m, sinks, window, rows):
    """With one layer a key depends on its own token alone: logits are those of the text that is still seen, read afresh
    with positions 0, 1, 2 ... (distances inside the cache). Far beyond block_size."""
    model = m.on_rung(m.build_model(config(m, n_layer=1, block_size=16, sinks=sinks, window=window)).double(), "window")
    prompts, ids, mask = ragged((3, 12, 7)[:rows], "left")
    texts = [prompt.tolist() for prompt in prompts]
    logits, cache = m.prefill(model, ids, mask, 100)
    for _ in range(40):
        for row, text in enumerate(texts):
            seen = text if len(text) <= sinks + window else text[:sinks] + text[-window:]
            with torch.no_grad():
                expected = model(torch.tensor([seen]))[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)  # angles are float32
        token = logits.argmax(-1)
        for row, text in enumerate(texts):
            text.append(int(token[row]))
        logits, cache = m.decode_step(model, token, cache)
    assert cache.stores[0][0].size(2) == sinks + window + 1


def test_window_forgets(m):
    """One layer: what has left the window has no say, a sink always has, and the window counts the token itself."""
    model = m.on_rung(m.build_model(config(m, n_layer=1, sinks=2, window=6)), "window")
    ids = torch.randint(97, (1, 30), generator=torch.Generator().manual_seed(2))
    before = m.prefill(model, ids, None, 40)[0]
    for t, seen in ((0, True), (1, True), (2, False), (23, False), (24, True), (29, True)):  # 6 newest: 24 .. 29
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 97
        assert (m.prefill(model, changed, None, 40)[0] - before).abs().max().item() > 1e-5 or not seen, t
        assert torch.equal(m.prefill(model, changed, None, 40)[0], before) != seen, t


def test_rows_that_end_in_different_pieces(m):
    """Padded on the right, longer than the ring: each row's logits come from the piece that holds its last token."""
    model = m.on_rung(m.build_model(config(m, sinks=2, window=4)), "window")
    prompts, ids, mask = ragged((3, 12, 8), "right")
    logits, cache = m.prefill(model, ids, mask, 40)
    for row, prompt in enumerate(prompts):
        alone, other = m.prefill(model, prompt[None], None, 40)
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=0)
    token = logits.argmax(-1)
    after = m.decode_step(model, token, cache)[0][-1]
    torch.testing.assert_close(after, m.decode_step(model, token[-1:], other)[0][0], atol=1e-5, rtol=0)


def test_adopted_rows_see_their_own_past_only(m):
    """Rows of a queue are of different ages from the first step on."""
    model = m.on_rung(m.build_model(config(m)), "gqa")
    prompts = ragged((9, 3), "left")[0]
    cache, expected = m.new_cache(model, 2, 20), []
    for row, prompt in enumerate(prompts):
        logits, alone = m.prefill(model, prompt[None], None, 20)
        cache.adopt(row, alone)
        expected.append(m.decode_step(model, torch.tensor([5]), alone)[0][0])
    found, _ = m.decode_step(model, torch.tensor([5, 5]), cache)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_ring_refuses_a_chunk_that_would_overwrite_itself(m):
    model = m.on_rung(m.build_model(config(m, sinks=1, window=5)), "window")
    cache = m.new_cache(model, 1, 0)
    assert m.pieces(cache, 8) == [(0, 6), (6, 7), (7, 8)] and m.pieces(cache, 6) == [(0, 6)]
    with pytest.raises(ValueError, match="one by one"):
        model(torch.zeros(1, 7, dtype=torch.long), cache=cache)


# ------------------------------------------------------------------------------------------------- queue, limits


@pytest.mark.parametrize("rung", ["static", "gqa", "compiled", "int8", "int8-cache", "window"])
def test_a_queue_gets_the_answers_of_one_prompt_at_a_time(m, rung):
    model = m.on_rung(m.build_model(config(m, window=12, sinks=2)).double(), rung)
    prompts = [prompt.tolist() for prompt in ragged((3, 11, 7, 1, 5, 9, 2), "left")[0]]
    first = m.generate(model, torch.tensor([prompts[1]]), 15)[0].tolist()
    eos = (first[4], 50)
    expected = []
    for prompt in prompts:
        row = m.generate(model, torch.tensor([prompt]), 15, eos_ids=eos)[0].tolist()
        expected.append(row)
    for slots in (1, 3, 10):
        answers, steps = m.serve(model, prompts, 15, slots=slots, eos_ids=eos)
        assert answers == expected
        # every answer's first token comes from its prompt, each further one from a step that all rows share
        work = [len(row) - 1 for row in expected]
        assert max(work) <= steps <= sum(work) and steps >= sum(work) / slots
        assert slots > 1 or steps == sum(work)
    assert m.serve(model, [], 5) == ([], 0)
    for wrong in (dict(slots=0), dict(max_new_tokens=0)):
        with pytest.raises(ValueError, match="a queue needs"):
            m.serve(model, prompts, **{"max_new_tokens": 5, **wrong})
    assert m.serve(model, prompts, 1, slots=2)[0] == [row[:1] for row in (m.serve(model, prompts, 2, slots=2)[0])]


def test_the_queue_beats_padded_batches(m):
    """Rows that finish early make room: fewer steps than batches that wait for their longest row."""
    model = m.on_rung(m.build_model(config(m)), "gqa")
    prompts = [prompt.tolist() for prompt in ragged([random.Random(i).randint(2, 12) for i in range(12)], "left")[0]]
    full = [m.generate(model, torch.tensor([prompt]), 30)[0].tolist() for prompt in prompts]
    eos = tuple({row[(7 * i) % 29] for i, row in enumerate(full)})[:4]
    lengths = [len(m.generate(model, torch.tensor([prompt]), 30, eos_ids=eos)[0]) for prompt in prompts]
    batches = sum(max(lengths[i:i + 3]) - 1 for i in range(0, 12, 3))
    assert len(set(lengths)) > 2 and m.serve(model, prompts, 30, slots=3, eos_ids=eos)[1] < batches


def test_limits_are_named(m):
    model = m.build_model(config(m, block_size=16)).eval()
    for rung in (*EXACT, "int8-cache"):
        with pytest.raises(ValueError, match="17 tokens, but this model was made for 16"):
            m.generate(m.on_rung(model, rung), torch.zeros(1, 8, dtype=torch.long), 9)
    for rung in ("growing", "gqa"):
        cache = m.new_cache(m.on_rung(model, rung), 1, 5)
        with pytest.raises(ValueError, match="6 tokens, and this cache was made for 5"):
            model(torch.zeros(1, 6, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="empty prompt"):
        m.generate(model, torch.zeros(2, 0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="empty prompt"):
        m.generate(model, torch.zeros(2, 3, dtype=torch.long), 3, mask=torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match="17 tokens"):
        model(torch.zeros(1, 17, dtype=torch.long))


# ------------------------------------------------------------------------------------------------- really compiled


@pytest.mark.parametrize("rung", ["compiled", "int8", "int8-cache", "window"])
def test_really_compiled_steps_equal_the_modules(m, rung):
    """Through the compiler, over lengths that grow, one row and three; tokens and logits as uncompiled."""
    if m.compiled(m.layer_step) is None:
        pytest.skip("no C++ compiler")
    model = m.on_rung(m.build_model(config(m, sinks=2, window=6)), rung)
    for rows in (1, 3):
        _, ids, mask = ragged((5, 3, 7)[:rows], "left")
        logits, cache = m.prefill(model, ids, mask, 20)
        other = cache.choose(torch.arange(rows))
        for _ in range(10):
            token = logits.argmax(-1)
            logits, cache = m.decode_step(model, token, cache)
            with torch.no_grad():
                expected = model(token[:, None], cache=other)[:, -1]
            torch.testing.assert_close(logits, expected, atol=1e-3 if "int8" in rung else 1e-4, rtol=1e-4)


def test_without_a_compiler_the_rungs_still_write_really(m, monkeypatch, capsys):
    model = m.build_model(config(m)).double().eval()
    ids = torch.randint(97, (2, 9))
    expected = m.generate(m.on_rung(model, "gqa"), ids, 12)
    m.compiled.cache_clear()
    monkeypatch.setattr(m.shutil, "which", lambda name: None)
    try:
        assert torch.equal(m.generate(m.on_rung(model, "compiled"), ids, 12), expected)
        assert "no C++ compiler" in capsys.readouterr().out
    finally:
        m.compiled.cache_clear()


# ------------------------------------------------------------------------------------------------- the ruler


def test_bytes_are_counted(m):
    """The figure that issue and README use: 400 MB a token for the 125M shape, 24,576 bytes of cache."""
    cfg = m.Config(**m.PRESETS["125m"])
    with torch.device("meta"):
        model = m.build_model(cfg)
    assert m.weight_bytes(model) == pytest.approx(400.4e6, rel=1e-3)
    kinds = m.cache_bytes(cfg, 4)
    assert list(kinds.values()) == [3 * 24576, 24576, 6144, 12 * 2 * 4 * (64 + 4)]
    cfg.rung = "gqa"
    assert m.streamed_bytes(model, 1000, 4) == m.weight_bytes(model) + 1000 * 24576
    cfg.rung = "window"
    assert m.streamed_bytes(model, 1000, 4) == m.weight_bytes(model) + 68 * 24576
    # what a real cache of each kind occupies for one more token
    small = config(m)
    for kind, size in ((m.KVCache, 4), (m.Int8Cache, 1)):
        a, b = (sum(x.numel() * x.element_size() for store in kind(small, 1, n, torch.zeros(1)).stores for x in store)
                for n in (10, 11))
        assert b - a == list(m.cache_bytes(small, 4).values())[1 if size == 4 else 3]


def test_presets_have_the_published_sizes(m):
    with torch.device("meta"):
        for preset, millions in (("125m", 124.7), ("1b", 1235.8), ("8b", 8030.3)):
            model = m.build_model(m.Config(**m.PRESETS[preset]))
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.3)


def test_climbing_measures_every_rung(m):
    model = m.build_model(config(m, block_size=256)).eval()
    figures, bandwidths = m.climb(model, [32, 64], prompt=16, new=4, rounds=2)
    assert list(figures) == list(m.RUNGS) == list(m.RUNG_NAMES)
    assert set(bandwidths) == {"32", "64"} and min(bandwidths.values()) > 0.1
    for rung, one in figures.items():
        assert set(one["tokens_per_second"]) == {"32", "64"} and min(one["bandwidth_fraction"].values()) > 0
        assert one["same_tokens"] or "int8" in rung
    lines = m.ladder_table(figures, "32").splitlines()
    assert len(lines) == 9 and all(line.startswith(rung) for line, rung in zip(lines[1:], m.RUNGS, strict=True))


def test_rounding_is_measured_against_the_exact_logits(m):
    model = m.build_model(config(m, window=4, sinks=1)).eval()
    ids = torch.randint(97, (20, 17))
    cost = m.cost_of_rounding(model, (ids[:, :-1], ids[:, 1:]))
    assert cost["gqa"]["logit_error"] == 0 and 0 < cost["int8"]["logit_error"] < 0.1
    assert cost["int8-cache"]["logit_error"] < 0.1 < cost["window"]["logit_error"]
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert cost["gqa"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert cost["gqa"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


# ------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def trained(m, tmp_path_factory):
    """A short run that measures nothing."""
    out = tmp_path_factory.mktemp("run")
    done = run(m, out, "--max-steps", "150", "--eval-every", "75", "--save-every", "50", "--contexts", "",
               "--rung", "gqa", "--out", str(out / "a"))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def run(m, cwd, *args):
    return subprocess.run([sys.executable, m.__file__, *args], cwd=cwd, capture_output=True, text=True)


def test_a_run_reports_and_can_be_loaded(m, trained):
    out, printed = trained
    summary = json.loads((out / "a" / "summary.json").read_text())
    assert summary["floor"] == 0.0 and set(summary["results"]["exact_match"]) == set(m.RUNGS)
    exact = {summary["results"]["exact_match"][rung] for rung in (*EXACT, "window")}
    assert len(exact) == 1 and "what rounding" in printed
    words = {rung: run(m, out, "--load", "a", "--prompt", "40215=", "--rung", rung).stdout for rung in EXACT[:4]}
    assert len(set(words.values())) == 1 and words["gqa"].startswith("40215=")
    beams = run(m, out, "--load", "a", "--prompt", "7=", "--beams", "3", "--rung", "window", "--max-new-tokens", "30")
    assert beams.returncode == 0, beams.stderr


def test_resume_repeats_the_run(m, trained):
    out, _ = trained
    done = run(m, out, "--max-steps", "150", "--eval-every", "75", "--save-every", "50", "--contexts", "",
               "--rung", "gqa", "--out", "b")
    assert done.returncode == 0
    a, b = (torch.load(out / name / "ckpt.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(x, b["model"][name]) for name, x in a["model"].items())
    again = run(m, out, "--resume", "--out", "b", "--contexts", "")
    assert again.returncode == 0, again.stderr
    c = torch.load(out / "b" / "ckpt.pt", weights_only=True)
    assert all(torch.equal(x, c["model"][name]) for name, x in a["model"].items())


def test_a_checkpoint_folder_is_measured(m, tmp_path):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=70, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256))
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="60KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    done = run(m, tmp_path, "--checkpoint", "llama", "--contexts", "24,48", "--window", "8")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/kv_cache/summary.json").read_text())
    got = summary["results"]
    assert set(got["tokens_per_second"]) == set(got["bandwidth_fraction"]) == set(m.RUNGS)
    assert got["read_bandwidth_gb_s"] > 0 and got["measured"]["n_kv_head"] == 2 and got["measured"]["window"] == 8
    for figure in ("ladder.png", "cache.png"):
        assert (tmp_path / "runs/kv_cache" / figure).stat().st_size > 10_000
    assert all(rung in done.stdout for rung in m.RUNGS)


@pytest.mark.parametrize("args, words", [
    ("--rung fast", "none | growing"), ("--contexts 12,x", "numbers such as"), ("--window 0", "window must be"),
    ("--checkpoint nowhere", "no Llama folder"), ("--load nowhere --prompt 1=", "no run, no checkpoint"),
    ("--max-new-tokens 12", "room for 11"), ("--data random --resume", "go without"), ("--data nowhere", "no such set"),
    ("--data random --contexts 9000", "none leaves room"), ("--n-kv-head 3", "cannot be shared"),
    ("--preset 8b --dtype float64", "this needs about"), ("--rungs x", "unrecognized")])
def test_mistakes_cost_one_line(m, tmp_path, args, words):
    done = run(m, tmp_path, *args.split())
    assert done.returncode not in (0, 2) and words in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
