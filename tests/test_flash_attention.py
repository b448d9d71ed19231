"""flash_attention.py: exact attention, tile by tile, against float64, PyTorch's own kernel and its own definition."""
import ast
import itertools
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

TRITON = pytest.mark.skipif(__import__("importlib.util").util.find_spec("triton") is None, reason="Triton is missing")
FORMS = ["naive", "tiled", pytest.param("triton", marks=TRITON)]
SMALL = dict(data="pydocs", n_layer=1, n_head=4, n_kv_head=2, n_embd=32, ffn_size=40, block_size=150, batch_size=2,
             max_steps=12, warmup_steps=3, lengths="", device="cpu")


def scenario(m, tmp_path, fixed):
    """For tests/test_house.py: reach every line with a shape comment."""
    (tmp_path / "t.txt").write_text("".join(random.Random(0).choices("abcdefgh \n", k=4000)))
    fixed.update(D=64)
    m.main(m.Config(**SMALL | dict(data="t.txt", out="run", n_embd=256, max_steps=2, lengths="17")))
    m.running_softmax(torch.randn(7), torch.randn(7, 64))
    m.triton_attention(torch.randn(1, 4, 20, 64), *torch.randn(2, 1, 2, 30, 64))


def case(seed, T=0, S=0, dtype=torch.float32, most=150, **options):
    """Random shapes and options: grouped heads, T != S, windows, padding, queries that see nothing, odd D."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    K, D, B = rng.choice((1, 2, 3)), rng.choice((5, 16, 24, 37, 64, 80)), rng.choice((1, 2))
    H, T, S = K * rng.choice((1, 2, 4)), T or rng.randint(1, most), S or rng.randint(1, most)
    if not options:
        options = dict(causal=rng.random() < 0.7, window=rng.choice((0, 0, rng.randint(1, most))))
        if rng.random() < 0.4:
            options["keep"] = torch.rand(B, S, generator=generator) > rng.choice((0.2, 0.9, 1.1))
    q, k, v, g = (torch.randn(B, heads, n, D, generator=generator) * scale
                  for heads, n, scale in ((H, T, rng.choice((1, 3))), (K, S, 1), (K, S, 1), (H, T, 1)))
    return [x.to(dtype) for x in (q, k, v, g)], options


def seen_pairs(T, S, causal=True, window=0, keep=None):
    """(1 or B, 1, T, S) bool, pair by pair, from the words at the top of section 2."""
    seen = [[[(not causal or s <= S - T + t) and (not window or s > S - T + t - window) and (
        keep is None or bool(row[s])) for s in range(S)] for t in range(T)] for row in ([0] if keep is None else keep)]
    return torch.tensor(seen)[:, None]


def pytorch(q, k, v, **options):
    """PyTorch's own kernel with the mask written out and keys repeated."""
    G = q.size(1) // k.size(1)
    mask = seen_pairs(q.size(2), k.size(2), **options)
    out = F.scaled_dot_product_attention(q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1), mask)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def gradients(function, q, k, v, g, **options):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), g)


def check_errors(function, inputs, options, **extra):
    """FlashAttention's own criterion: at most twice (gradients: three times) PyTorch's error in the same dtype."""
    exact = gradients(pytorch, *(x.double() for x in inputs), **options)
    theirs, ours = gradients(pytorch, *inputs, **options), gradients(function, *inputs, **options, **extra)
    for name, factor, a, b, c in zip(("out", "dq", "dk", "dv"), (2, 3, 3, 3), ours, theirs, exact, strict=True):
        assert a.dtype == inputs[0].dtype and a.isfinite().all() and c.isfinite().all()
        mine, other = (a.double() - c).abs().max().item(), (b.double() - c).abs().max().item()
        assert mine <= factor * other + 1e-5, (name, mine, other)


# --- against float64 -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(200))
def test_error_is_that_of_the_number_format(m, seed, dtype):
    inputs, options = case(seed, dtype=dtype, most=70)
    check_errors(m.tiled_attention, inputs, options, tile=random.Random(seed).choice((16, 32, 37)))


EDGES = [(T, S) for T, S in itertools.product((1, 15, 16, 17, 31, 32, 33), repeat=2)] + [
    (T, T + more) for T in (5, 16, 40) for more in (14, 15, 16, 17)]


@pytest.mark.parametrize("window", [0, 1, 15, 16, 17])
def test_every_edge_of_a_tile(m, window):
    """T, S, S - T and windows of tile - 1, tile, tile + 1: a causal bound one key too far leaks the future."""
    for T, S in EDGES:
        for causal, keep in ((True, None), (False, None), (True, torch.rand(1, S) > 0.5)):
            options = dict(causal=causal, window=window) | ({} if keep is None else dict(keep=keep))
            (q, k, v, g), _ = case(T + 7 * S, T, S, torch.float64, **options)
            q, k, v, g = q[:1], k[:1], v[:1], g[:1]
            expected = gradients(pytorch, q, k, v, g, **options)
            for form in (m.naive_attention, lambda *x, **o: m.tiled_attention(*x, tile=16, **o)):
                for a, b in zip(gradients(form, q, k, v, g, **options), expected, strict=True):
                    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_the_usual_tile(m):
    """256, the default, at its own edges."""
    for T, S in itertools.product((255, 256, 257), repeat=2):
        inputs, options = case(T + S, T, S, window=(0, 255, 256, 257)[(T + S) % 4])
        check_errors(m.tiled_attention, inputs, options)


@pytest.mark.parametrize("options", [dict(), dict(causal=False), dict(window=3), dict(keep=True)], ids=str)
def test_gradcheck(m, options):
    """The hand-written derivative against finite differences."""
    torch.manual_seed(0)
    if "keep" in options:
        options = dict(keep=torch.tensor([[True, False, True, True, False, True, True], [False] * 7]))
    q, k, v = (torch.randn(2, heads, n, 4, dtype=torch.float64, requires_grad=True)
               for heads, n in ((4, 5), (2, 7), (2, 7)))
    assert torch.autograd.gradcheck(lambda *x: m.tiled_attention(*x, tile=3, **options), (q, k, v))


# --- the kernels, in the interpreter ---------------------------------------------------------------------------------
@TRITON
@pytest.mark.parametrize("seed", range(40))
def test_kernels_in_the_interpreter(m, seed):
    inputs, options = case(1000 + seed, dtype=torch.float16 if seed % 4 == 0 else torch.float32, most=75)
    check_errors(m.triton_attention, inputs, options)


@TRITON
@pytest.mark.parametrize("T, S", [(1, 40), (31, 31), (32, 32), (33, 33), (32, 63), (33, 63), (33, 65), (63, 32)])
def test_kernels_at_every_edge(m, T, S):
    """Tiles are 32 x 32 in float32."""
    keep = torch.rand(1, S, generator=torch.Generator().manual_seed(T)) > 0.5
    for options in (dict(), dict(causal=False), dict(window=1), dict(window=31), dict(window=32), dict(window=33),
                    dict(causal=False, window=32), dict(keep=keep), dict(causal=False, keep=keep, window=9)):
        (q, k, v, g), _ = case(T, T, S, **options)
        expected = gradients(pytorch, q[:1], k[:1], v[:1], g[:1], **options)
        for a, b in zip(gradients(m.triton_attention, q[:1], k[:1], v[:1], g[:1], **options), expected, strict=True):
            torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


@TRITON
def test_keys_behind_the_last_one_weigh_nothing(m):
    """All real scores far below 0, S no multiple of the tile: a padded key's score of 0 must not overflow."""
    q, k = torch.full((1, 1, 16, 16), 6.0), torch.full((1, 1, 40, 16), -6.0)
    v, g = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 16, 16)
    for options in (dict(causal=False), dict()):
        expected = gradients(pytorch, q, k, v, g, **options)
        for a, b in zip(gradients(m.triton_attention, q, k, v, g, **options), expected, strict=True):
            torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


@TRITON
def test_what_the_kernels_refuse(m, monkeypatch):
    q = torch.randn(1, 1, 4, 16)
    for dtype in (torch.bfloat16, torch.float64):  # bfloat16 in the interpreter: garbage, without a word
        with pytest.raises(ValueError, match=f"no Triton kernel for {dtype}"):
            m.triton_attention(*(q.to(dtype),) * 3)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="need a CUDA GPU"):
        m.triton_attention(q, q, q)


# --- properties ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FORMS)
def test_large_scores(m, name):
    """Scores of some hundreds: unsafe_softmax gives NaN, all others do not."""
    torch.manual_seed(1)
    q, k, v, g = torch.randn(1, 2, 40, 16) * 30, torch.randn(1, 2, 40, 16) * 30, *torch.randn(2, 1, 2, 40, 16)
    assert m.unsafe_softmax(q[0, 0] @ k[0, 0].T).isnan().any()
    found = gradients(m.ATTENTION[name], q, k, v, g)
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found[0], pytorch(q.double(), k.double(), v.double()).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_queries_that_see_nothing_get_zeros(m, name):
    torch.manual_seed(2)
    q, k, v, g = torch.randn(2, 2, 9, 16), *torch.randn(2, 2, 2, 6, 16), torch.randn(2, 2, 9, 16)
    keep = torch.tensor([[True] * 6, [False] * 6])
    out, dq, dk, dv = gradients(m.ATTENTION[name], q, k, v, g, keep=keep)
    # T > S: the first three queries stand before the first key
    assert (out[0, :, :3] == 0).all() and (out[1] == 0).all() and (out[0, :, 3:].abs().amax(-1) > 0).all()
    assert (dq[0, :, :3] == 0).all() and all((x[1] == 0).all() for x in (dq, dk, dv)) and dk.isfinite().all()


@pytest.mark.parametrize("name", FORMS)
def test_causality_and_window_by_perturbation(m, name):
    """T < S: query t stands at S - T + t; changing key s changes exactly the queries that may see it."""
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 2, 7, 16), torch.randn(1, 1, 11, 16), torch.randn(1, 1, 11, 16)
    before = m.ATTENTION[name](q, k, v, window=4)
    for s in range(11):
        changed = k.clone()
        changed[0, 0, s] += 3
        moved = ((m.ATTENTION[name](q, changed, v, window=4) - before).abs().amax((1, 3)) > 1e-6)[0]
        assert moved.tolist() == [t < s <= 4 + t for t in range(7)], s


def test_softmax_three_ways(m):
    torch.manual_seed(4)
    scores, values = torch.randn(37) * 5, torch.randn(37, 8)
    expected = scores.softmax(0) @ values
    torch.testing.assert_close(m.unsafe_softmax(scores) @ values, expected)
    torch.testing.assert_close(m.safe_softmax(scores) @ values, expected)
    assert m.unsafe_softmax(torch.tensor([89.0, 0])).isnan().any() and m.safe_softmax(scores * 1e6).isfinite().all()
    for tile in (1, 5, 64):
        torch.testing.assert_close(m.running_softmax(scores, values, tile), expected)
    hand = m.running_softmax(torch.tensor([0, math.log(3)]), torch.tensor([[8.0], [4.0]]))
    torch.testing.assert_close(hand, torch.tensor([5.0]))


def test_no_tile_is_computed_in_vain(m):
    """Causal, 16 tiles a side: 16 * 17 / 2 of them (53 %); a window of 2 tiles: at most 3 a row."""
    q = torch.randn(1, 1, 256, 4)
    for window, count in ((0, 136), (32, 16 * 3 - 3), (1, 16)):
        tiles = [keys for i in range(0, 256, 16) for keys, _ in m.tile_scores(q, q, i, 16, 256, True, window, None)]
        assert len(tiles) <= count and (window == 32 or len(tiles) == count)


def test_autocast_changes_neither_pass(m):
    (q, k, v, g), options = case(31, dtype=torch.bfloat16)
    expected = gradients(m.tiled_attention, q, k, v, g, **options)

    def inside(*x, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return m.tiled_attention(*x, **options)
    for a, b in zip(gradients(inside, q, k, v, g, **options), expected, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert m.naive_attention(q.float(), k.float(), v.float(), **options).isfinite().all()


def test_a_second_derivative_is_refused(m):
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    grad = torch.autograd.grad(m.tiled_attention(q, k, v).sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        grad.sum().backward()


def test_shapes_that_do_not_fit(m):
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 3, 5, 8)
    keep = torch.ones(1, 5, dtype=torch.bool)
    for attend in (m.tiled_attention, m.triton_attention):
        for wrong in ((q, k, k), (q, q, q[:, :, :3]), (q.expand(2, 4, 5, 8), q, q), (q, q, q, True, -1),
                      (q, q, q, True, 0, keep[:, :3])):
            with pytest.raises(AssertionError, match="K divides H"):
                attend(*wrong)
    keep[0, 2] = False  # numbers do for bool in the kernels, whatever their width
    torch.testing.assert_close(m.triton_attention(q, q, q, keep=keep.long()), m.naive_attention(q, q, q, keep=keep))


def test_tiled_attention_lifts_out(m, tmp_path):
    """Copied into an empty file, `tiled_attention` and what it calls are at most 60 lines, imports included."""
    wanted = {"visible", "to_rows", "to_heads", "tile_scores", "TiledAttention", "tiled_attention"}
    tree = ast.parse(open(m.__file__, encoding="utf-8").read())
    parts = [node for node in tree.body if getattr(node, "name", "") in wanted]
    for node in ast.walk(ast.Module(parts, [])):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            del node.body[0]
    source = "import math\nimport torch\n" + "\n".join(ast.unparse(node) for node in parts)
    assert len([line for line in source.split("\n") if line.strip()]) <= 60
    scope = {}
    exec(source, scope)
    (q, k, v, g), options = case(3)
    for a, b in zip(gradients(scope["tiled_attention"], q, k, v, g, **options),
                    gradients(m.tiled_attention, q, k, v, g, **options), strict=True):
        assert torch.equal(a, b)


# --- memory, time, training, command line ----------------------------------------------------------------------------
def test_memory_grows_with_the_length_and_not_with_its_square(m):
    """In a process of its own, whose memory no other test has used."""
    code = ("import sys\nimport importlib.util as u\n"
            "spec = u.spec_from_file_location('fa', sys.argv[1]); fa = u.module_from_spec(spec)\n"
            "sys.modules['fa'] = fa; spec.loader.exec_module(fa)\n"
            "cfg = fa.Config(device='cpu'); a = fa.measure(cfg, ['tiled'], 1536, 1)\n"
            "b = fa.measure(cfg, ['tiled', 'naive'], 3072, 1); print(a['tiled'][1], b['tiled'][1], b['naive'][1])")
    done = subprocess.run([sys.executable, "-c", code, m.__file__], capture_output=True, text=True)
    small, large, naive = map(float, done.stdout.split())
    if math.isnan(small):
        pytest.skip("this system does not tell a process its peak memory")
    assert 0 < large < 3 * small + 8 and naive > 2 * 3072 ** 2 * 4 / 1e6 and large < naive / 10


@pytest.mark.parametrize("name", ["tiled", "sdpa", pytest.param("triton", marks=TRITON)])
def test_the_model_is_the_same_with_any_attention(m, name):
    ids, found = torch.randint(31, (3, 40), generator=torch.Generator().manual_seed(5)), []
    for attention in ("naive", name):
        torch.manual_seed(1)
        model = m.TinyLlama(m.Config(**SMALL | dict(vocab_size=31, attention=attention)))
        loss = m.compute_loss(model, ids[:, :-1], ids[:, 1:])
        found.append([loss / 117, *torch.autograd.grad(loss / 117, list(model.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    changed = ids.clone()
    changed[:, 25] += 1
    moved = (model(ids) - model(changed % 31)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [t >= 25 for t in range(40)]
    # Distances count, not places: moving all tokens by 5 changes nothing, stretching their distances does.
    x, angle = torch.randn(1, 9, 32), torch.arange(40)[:, None] * torch.rand(4).repeat(2)
    out = [model.blocks[0](x, angle[places].cos(), angle[places].sin()) for places in (
        slice(0, 9), slice(5, 14), slice(0, 18, 2))]
    torch.testing.assert_close(out[0], out[1], atol=1e-5, rtol=1e-4)
    assert (out[0] - out[2]).abs().max() > 1e-2


def test_fit_returns_the_loss_of_every_step(m):
    torch.manual_seed(0)
    ids = torch.randint(9, (30, 21))
    data, cfg = (ids[:, :-1], ids[:, 1:]), m.Config(**SMALL | dict(vocab_size=9, attention="naive"))
    model, steps = m.TinyLlama(cfg), []
    first = m.compute_loss(model, *m.get_batch(data, cfg.batch_size, cfg.seed, 0)).item() / 40
    losses = m.fit(model, cfg, data, m.compute_loss, 30, 3e-3, steps.append)
    assert losses[0] == pytest.approx(first) and len(losses) == 30 == len(steps) and min(losses[-5:]) < first - 0.1
    with pytest.raises(ValueError, match="not finite"):
        m.fit(model, cfg, data, lambda *batch: m.compute_loss(*batch) * math.nan, 2, 3e-3)


def test_a_run_tells_what_it_measured(m, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    m.main(m.Config(**SMALL | dict(lengths="64,200")))
    summary = json.loads((tmp_path / "runs/flash_attention/summary.json").read_text())
    results = summary["results"]
    assert set(results["milliseconds"]) == {"naive", "tiled", "sdpa"} == set(results["peak_mb"])
    assert all(set(column) == {"64", "200"} for column in results["milliseconds"].values())
    assert summary["val_loss"] == results["val_loss"]["tiled"] == pytest.approx(results["val_loss"]["naive"], abs=1e-3)
    assert max(results["max_error"].values()) < 2e-5 and "the fastest at 200 tokens is" in capsys.readouterr().out
    # Steps fall: one of 12 with a loss near ln V would mean that nothing arrives.
    assert summary["val_loss"] < 4.3
    for picture in ("curve.png", "lengths.png"):
        assert (tmp_path / "runs/flash_attention" / picture).stat().st_size > 10_000


@pytest.mark.parametrize("args, words", [
    ("--attention fast", "attention is one of"), ("--lengths 12,x", "invalid literal"), ("--data nowhere", "nowhere"),
    ("--attention triton", "need a CUDA GPU"), ("--n-head 3", "must divide"), ("--lengths 0", "start at 1"),
    ("--tiles 3", "unrecognized")])
def test_mistakes_cost_one_line(m, tmp_path, args, words):
    done = subprocess.run([sys.executable, m.__file__, *args.split(), "--device", "cpu"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr, done.stderr
