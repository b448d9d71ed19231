"""flash_attention.py: exact attention, tile by tile, against float64, PyTorch and its own definitions."""

import json
import math
import os
import random
import subprocess
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run in numpy

import pytest
import torch
import torch.nn.functional as F

TRITON = pytest.mark.skipif(__import__("importlib.util").util.find_spec("triton") is None, reason="Triton is missing")


def case(seed, dtype=torch.float64, most=150, head_sizes=(16, 24, 64, 80, 128, 256)):
    """Random shapes and options: GQA, T != S, windows, padding on either side, rows that see nothing."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    K, D = rng.choice((1, 2, 3)), rng.choice(head_sizes)
    H, T, S = K * rng.choice((1, 2, 4)), rng.randint(1, most), rng.randint(1, most)
    B = rng.choice((1, 2))
    options = {"causal": rng.random() < 0.7}
    if options["causal"] and rng.random() < 0.4:
        options["window"] = rng.randint(1, most)
    if rng.random() < 0.4:
        options["keep"] = torch.rand(B, S, generator=generator) > rng.choice((0.2, 0.9, 1.1))
    scale = rng.choice((1.0, 1.0, 3.0))
    sizes = ((H, T, scale), (K, S, scale), (K, S, 1), (H, T, 1))
    q, k, v, g = (torch.randn(B, heads, length, D, generator=generator, dtype=torch.float64) * size
                  for heads, length, size in sizes)
    return [x.to(dtype) for x in (q, k, v, g)], options


def definition(q, k, v, causal=True, window=0, keep=None):
    """Pair by pair, from the words at the top of section 2; float64, a loop over queries."""
    q, k, v = (x.double() for x in (q, k, v))
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    rows = []
    for t in range(T):
        place = S - T + t
        seen = torch.ones(B, S, dtype=torch.bool)
        for s in range(S):
            if causal and s > place or window and s <= place - window:
                seen[:, s] = False
        if keep is not None:
            seen &= keep
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k) / math.sqrt(D)
        weights = torch.where(seen[:, None], scores, -math.inf)
        weights = torch.where(seen.any(1)[:, None, None], weights.nan_to_num(neginf=-math.inf).softmax(-1), 0.0)
        rows.append(torch.einsum("bhs,bhsd->bhd", weights.nan_to_num(), v))
    return torch.stack(rows, 2)


def gradients(function, q, k, v, g, **options):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), g)


# ------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("seed", range(25))
def test_naive_is_the_definition(m, seed):
    (q, k, v, _), options = case(seed, most=40, head_sizes=(16, 24))
    torch.testing.assert_close(m.naive_attention(q, k, v, **options), definition(q, k, v, **options))


@pytest.mark.parametrize("seed", range(60))
def test_all_rungs_agree_in_float64(m, seed):
    """Output and gradients, tiles of several sizes that do not divide the lengths."""
    (q, k, v, g), options = case(seed)
    expected = gradients(m.naive_attention, q, k, v, g, **options)
    tile = random.Random(seed).choice((16, 37, 128))
    for name, found in (("tiled", gradients(m.tiled_attention, q, k, v, g, tile=tile, **options)),
                        ("sdpa", gradients(m.sdpa_attention, q, k, v, g, **options))):
        for part, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert a.isfinite().all(), (name, part)
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda text, at=(name, part): f"{at} {text}")


def low_precision_errors(m, function, seed, dtype, most, **extra):
    """-> [(our error, PyTorch's error in the same dtype)] for out, dq, dk, dv; both against float64."""
    (q, k, v, g), options = case(seed, dtype, most)
    exact = gradients(m.naive_attention, *(x.double() for x in (q, k, v, g)), **options)
    theirs = gradients(m.naive_attention, q, k, v, g, **options)  # the written-out form, in this dtype
    ours = gradients(function, q, k, v, g, **extra, **options)
    assert all(x.dtype == dtype and x.isfinite().all() for x in ours)
    return [((a.double() - c).abs().max().item(), (b.double() - c).abs().max().item())
            for a, b, c in zip(ours, theirs, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(70))
def test_error_is_that_of_the_number_format(m, seed, dtype):
    """FlashAttention's own criterion: at most twice (gradients three times) PyTorch's error in the same dtype."""
    for i, (ours, theirs) in enumerate(low_precision_errors(m, m.tiled_attention, 1000 + seed, dtype, 150, tile=32)):
        assert ours <= (2 if i == 0 else 3) * theirs + 1e-5, ("out dq dk dv".split()[i], ours, theirs)


@pytest.mark.parametrize("options", [dict(), dict(causal=False), dict(window=3), dict(keep=True)], ids=str)
def test_gradcheck(m, options):
    """The hand-written derivative against finite differences."""
    torch.manual_seed(0)
    if "keep" in options:
        options = dict(keep=torch.tensor([[True, False, True, True, False, True, True], [False] * 7]))
    q, k, v = (torch.randn(2, heads, n, 4, dtype=torch.float64, requires_grad=True)
               for heads, n in ((4, 5), (2, 7), (2, 7)))
    assert torch.autograd.gradcheck(lambda *x: m.tiled_attention(*x, tile=3, **options), (q, k, v))


@TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_kernels_in_the_interpreter(m, seed, dtype):
    for i, (ours, theirs) in enumerate(low_precision_errors(m, m.triton_attention, 2000 + seed, dtype, 70)):
        assert ours <= (2 if i == 0 else 3) * theirs + 1e-5, ("out dq dk dv".split()[i], ours, theirs)


@TRITON
@pytest.mark.parametrize("options", [dict(causal=False), dict(), dict(window=1), dict(window=40), dict(keep=True),
                                     dict(causal=False, keep=True), dict(window=9, keep=True)], ids=str)
@pytest.mark.parametrize("T, S", [(1, 50), (40, 40), (33, 70), (70, 33)])
def test_kernels_know_every_feature(m, options, T, S):
    torch.manual_seed(T)
    q, k, v = torch.randn(2, 4, T, 24), torch.randn(2, 2, S, 24), torch.randn(2, 2, S, 24)
    if options.get("keep"):
        keep = torch.rand(2, S) > 0.5
        keep[1] = False
        options = options | dict(keep=keep)
    g = torch.randn_like(q)
    for a, b in zip(gradients(m.triton_attention, q, k, v, g, **options),
                    gradients(m.naive_attention, q, k, v, g, **options), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", ["naive", "tiled", "sdpa", pytest.param("triton", marks=TRITON)])
def test_large_logits(m, name):
    """Logits of some hundreds: unsafe_softmax gives NaN, all others do not."""
    torch.manual_seed(1)
    q, k, v, g = torch.randn(1, 2, 40, 16) * 30, torch.randn(1, 2, 40, 16) * 30, *torch.randn(2, 1, 2, 40, 16)
    assert m.unsafe_softmax(q[0, 0] @ k[0, 0].T).isnan().any()
    found = gradients(m.ATTENTION[name], q, k, v, g)
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found[0], definition(q, k, v).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["naive", "tiled", "sdpa", pytest.param("triton", marks=TRITON)])
def test_rows_that_see_nothing_are_zero(m, name):
    torch.manual_seed(2)
    q, k, v, g = torch.randn(2, 2, 9, 16), *torch.randn(2, 2, 2, 6, 16), torch.randn(2, 2, 9, 16)
    keep = torch.tensor([[True] * 6, [False] * 6])
    out, dq, dk, dv = gradients(m.ATTENTION[name], q, k, v, g, keep=keep)
    # T > S: the first three queries stand before the first key
    assert (out[0, :, :3] == 0).all() and (out[1] == 0).all() and (out[0, :, 3:].abs().amax(-1) > 0).all()
    assert (dq[0, :, :3] == 0).all() and all((x[1] == 0).all() for x in (dq, dk, dv)) and dk.isfinite().all()


@pytest.mark.parametrize("name", ["naive", "tiled", "sdpa", pytest.param("triton", marks=TRITON)])
def test_causality_and_window_by_perturbation(m, name):
    """T < S: query t stands at S - T + t; changing key s changes exactly the queries that may see it."""
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 2, 7, 16), torch.randn(1, 1, 11, 16), torch.randn(1, 1, 11, 16)
    before = m.ATTENTION[name](q, k, v, window=4)
    for s in range(11):
        changed = k.clone()
        changed[0, 0, s] += 3
        moved = ((m.ATTENTION[name](q, changed, v, window=4) - before).abs().amax((1, 3)) > 1e-6)[0]
        for t in range(7):
            sees, alone = 4 + t - 4 < s <= 4 + t, 4 + t == 0
            assert bool(moved[t]) == (sees and not alone), (s, t)


def test_softmax_three_ways(m):
    torch.manual_seed(4)
    scores, values = torch.randn(37) * 5, torch.randn(37, 8)
    expected = scores.softmax(0) @ values
    torch.testing.assert_close(m.unsafe_softmax(scores) @ values, expected)
    torch.testing.assert_close(m.safe_softmax(scores) @ values, expected)
    assert (m.safe_softmax(torch.full((3,), -math.inf)) == 0).all() and m.safe_softmax(scores * 1e6).isfinite().all()
    for tile in (1, 5, 64):
        out, history = m.running_softmax(scores * 40, values, tile)
        torch.testing.assert_close(out, (scores * 40).softmax(0) @ values, atol=1e-5, rtol=1e-5)
        assert [a <= b for (a, _), (b, _) in zip(history, history[1:], strict=False)] == [True] * (len(history) - 1)
        assert history[-1][0] == (scores * 40).max().item()
        assert history[-1][1] == pytest.approx((scores * 40 - (scores * 40).max()).exp().sum().item(), rel=1e-5)


def test_lse_is_the_log_of_the_sum(m):
    (q, k, v, _), _ = case(7)
    _, lse = m.tiled_forward(q, k, v, causal=False, tile=29)
    (B, H, T, D), K = q.shape, k.size(1)
    scores = q.view(B, K, H // K, T, D) @ k[:, :, None].transpose(-2, -1) / math.sqrt(D)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("causal, window", [(True, 0), (False, 0), (True, 20), (True, 1), (True, 300)])
def test_tiles_cover_exactly_what_is_visible(m, causal, window):
    """No visible pair is skipped, no tile without one is computed, and one without a mask is visible throughout."""
    T = S = 100
    for size in (7, 16, 100):
        for i in range(0, T, size):
            last = min(i + size, T) - 1
            visible = {(p, s) for p in range(i, last + 1) for s in range(S)
                       if (not causal or s <= p) and (not window or s > p - window)}
            covered = set()
            for j, end, cut in m.key_tiles(i, last, S, causal, window, size):
                tile = {(p, s) for p in range(i, last + 1) for s in range(j, end)}
                assert tile & visible and (cut or tile <= visible)
                covered |= tile
            assert visible <= covered
    tiles = [m.key_tiles(i * 16, i * 16 + 15, 256, True, 0, 16) for i in range(16)]
    assert sum(map(len, tiles)) == 16 * 17 // 2


def test_tile_size_changes_nothing(m):
    (q, k, v, g), options = case(11)
    results = [gradients(m.tiled_attention, q, k, v, g, tile=tile, **options) for tile in (1, 16, 50, 1000)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_memory_grows_with_the_length_and_not_with_its_square(m):
    device = torch.device("cpu")
    if m.peak_growth(lambda: None, device) is None:
        pytest.skip("this system does not tell a process its peak memory")

    def peak(name, T):
        def work():
            q, k, v, g = m.inputs_of((1, 1, 1, T, 64), device, torch.float32)
            torch.autograd.grad(m.ATTENTION[name](q, k, v), (q, k, v), g)
        work()
        return m.peak_growth(work, device)

    small, large = peak("tiled", 4096), peak("tiled", 8192)
    assert large < 3 * small + 8e6 and large < 80e6
    assert peak("naive", 4096) > 4 * 4096 ** 2 * 2


def test_wrong_shapes_are_named(m):
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 3, 5, 8)
    for wrong, word in (((q, k, k), "cannot be shared"), ((q, q, q[:, :, :3]), "q \\(B"), ((q[0], q, q), "q \\(B")):
        for name in ("naive", "tiled", "sdpa", "triton"):
            with pytest.raises(ValueError, match=word):
                m.ATTENTION[name](*wrong)
    with pytest.raises(ValueError, match="a window"):
        m.tiled_attention(q, q, q, causal=False, window=3)
    with pytest.raises(ValueError, match="keep is bool"):
        m.tiled_attention(q, q, q, keep=torch.ones(1, 5))


def test_autocast_changes_neither_pass(m):
    """Inside bfloat16 autocast the tiles still multiply in float32, in both passes."""
    (q, k, v, g), options = case(31, torch.bfloat16)
    expected = gradients(m.tiled_attention, q * 3, k * 3, v, g, **options)

    def inside(*x, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return m.tiled_attention(*x, **options)

    for a, b in zip(gradients(inside, q * 3, k * 3, v, g, **options), expected, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused(m):
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    grad = torch.autograd.grad(m.tiled_attention(q, k, v).sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        grad.sum().backward()


def test_an_error_of_nan_is_reported(m, monkeypatch):
    monkeypatch.setitem(m.ATTENTION, "tiled", lambda q, k, v, **o: m.naive_attention(q, k, v, **o) * math.nan)
    worst = m.largest_errors(torch.device("cpu"), cases=2)
    assert math.isnan(worst["tiled"]["out"]) and worst["naive"]["out"] < 1e-5


# ------------------------------------------------------------------------------------------------- the model


def config(m, **changes):
    sizes = dict(vocab_size=31, block_size=40, n_layer=2, n_head=3, n_embd=24, init_std=0.3, device="cpu", seed=1)
    return m.Config(**{**sizes, **changes})


@pytest.mark.parametrize("name", ["tiled", "sdpa", pytest.param("triton", marks=TRITON)])
def test_the_model_is_the_same_with_any_attention(m, name, monkeypatch):
    monkeypatch.setattr(m, "TILE", 16)
    ids = torch.randint(31, (3, 40), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :9], mask[1, 25:] = False, False
    models = [m.build_model(config(m, attention=attention)) for attention in ("naive", name)]
    for masked in (None, mask):
        logits = [model(ids, masked) for model in models]
        real = mask if masked is not None else torch.ones_like(mask)
        torch.testing.assert_close(logits[0][real], logits[1][real], atol=1e-4, rtol=1e-4)
    losses = [F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for model in models]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss, model in zip(losses, models, strict=True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["naive", "tiled", "sdpa"])
def test_decoding_with_any_attention(m, name):
    """Cached = uncached, prompts of different length, a prompt in pieces, beams; tokens as with the naive form."""
    model, plain = (m.build_model(config(m, attention=attention)).double().eval() for attention in (name, "naive"))
    ids = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(6))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4], mask[1, 6:] = False, False
    found = m.generate(model, ids, 20, mask=mask)
    assert torch.equal(found, m.generate(plain, ids, 20, mask=mask))
    assert torch.equal(found[0], m.generate(model, ids[:1, 4:], 20)[0])
    assert torch.equal(found[1], m.generate(model, ids[1:2, :6], 20)[0])
    text = ids[2:]
    with torch.no_grad():
        for _ in range(20):
            text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
        assert torch.equal(found[2], text[0, 9:])
        cache = m.KVCache(model.cfg, 1, 20, model.lm_head.weight)
        parts = torch.cat([model(text[:, a:b], cache=cache) for a, b in ((0, 3), (3, 4), (4, 20))], 1)
        torch.testing.assert_close(parts, model(text[:, :20]))
    ours, theirs = (m.beam_search(one, ids, 8, mask=mask, num_beams=3) for one in (model, plain))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(m.beam_search(model, ids, 8, num_beams=1)[0][:, 0], m.generate(model, ids, 8))


# ------------------------------------------------------------------------------------------------- command line


def run(m, cwd, *args, **environment):
    return subprocess.run([sys.executable, m.__file__, *args], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0", **environment})


SMALL = "--data pydocs --n-layer 1 --n-embd 16 --n-head 2 --block-size 150 --batch-size 2 --eval-every 20".split()


def test_the_same_curve_with_any_attention(m, tmp_path):
    curves = {}
    for name in ("naive", "tiled", "sdpa"):
        done = run(m, tmp_path, *SMALL, "--max-steps", "20", "--lengths=", "--attention", name, "--out", name)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [row["loss"] for row in rows if "loss" in row]
    assert curves["naive"][-1] < curves["naive"][0]
    for name in ("tiled", "sdpa"):
        assert curves[name] == pytest.approx(curves["naive"], abs=2e-4)


def test_measure_only_and_resume(m, tmp_path):
    done = run(m, tmp_path, "--max-steps", "0", "--lengths", "64,200")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/flash_attention/summary.json").read_text())
    results = summary["results"]
    assert summary["val_loss"] is None and set(results["milliseconds"]) == {"naive", "tiled", "sdpa"}
    assert all(set(column) == {"64", "200"} for column in results["milliseconds"].values())
    assert results["max_error"]["tiled"]["out"] < 1e-5 and "naive passes at" in done.stdout
    for figure in ("running_softmax.png", "lengths.png"):
        assert (tmp_path / "runs/flash_attention" / figure).stat().st_size > 10_000
    for out in "ab":
        done = run(m, tmp_path, *SMALL, "--max-steps", "40", "--save-every", "20", "--lengths=", "--out", out)
        assert done.returncode == 0, done.stderr
    again = run(m, tmp_path, "--resume", "--out", "b", "--lengths=")
    assert again.returncode == 0, again.stderr
    a, b = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True)["model"] for out in "ab")
    assert all(torch.equal(x, b[name]) for name, x in a.items())
    talk = run(m, tmp_path, "--load", "a", "--prompt", "The", "--max-new-tokens", "5", "--attention", "naive")
    assert talk.returncode == 0 and talk.stdout.startswith("The"), talk.stderr


@TRITON
def test_kernels_train_the_model(m, tmp_path):
    """In the interpreter: the same two steps as with the naive form."""
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    losses = {}
    for name in ("naive", "triton"):
        small = "--data text --n-layer 1 --n-embd 16 --n-head 1 --batch-size 2 --block-size 20 --max-steps 2 --lengths="
        done = run(m, tmp_path, *small.split(), "--attention", name, "--max-new-tokens", "2", "--out", name,
                   TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stderr
        losses[name] = json.loads((tmp_path / name / "summary.json").read_text())["val_loss"]
    assert losses["triton"] == pytest.approx(losses["naive"], abs=1e-4)


@pytest.mark.parametrize("args, words", [
    ("--attention fast", "naive, tiled"), ("--lengths 12,x", "auto or numbers"), ("--attention triton", "needs Triton"),
    ("--load nowhere --prompt x", "there is no checkpoint"), ("--max-steps -1", "0 or more"),
    ("--tiles 3", "unrecognized"),
    ("--data nowhere", "no such set"), ("--n-head 3", "cannot be split")])
def test_mistakes_cost_one_line(m, tmp_path, args, words):
    done = run(m, tmp_path, *args.split())
    assert done.returncode not in (0, 2) and words in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
