"""Tests of decoder_only.py, GPT-2 in one file; `pytest tests/test_decoder_only.py --script my_gpt.py` grades yours.

Expected values come from elsewhere: torch.nn and scaled_dot_product_attention for the parts, transformers for the whole
model and its decoding, slow loops written here for what no library does, arithmetic by hand for the rest.
Tokens of two implementations are compared in float64 with wide random weights: a small model in float32 has near-ties,
and rounding would decide them.

    1 attention and masks      2 the whole model, published weights     3 decoding
    4 objective and data       5 training, checkpoints, resume          6 the program from outside (processes, signals)
    7 memory estimate, task score
"""

import dataclasses
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
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

SEEDS = (0, 1, 2)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and fork")


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


def shape(seed):
    """Random sizes that are pairwise different, so that a swapped axis cannot go unnoticed."""
    rng = random.Random(seed)
    heads = rng.choice((3, 4))
    return dict(n_layer=rng.choice((1, 2)), n_head=heads, n_embd=heads * rng.choice((5, 6, 7)),
                block_size=rng.choice((10, 11, 12, 13)), vocab_size=rng.choice((37, 41, 43, 53)))


def small(m, seed=0, **changes):
    """A small Config with random sizes; wide weights, so that the logits are far from uniform."""
    return m.Config(**{**shape(seed), "seed": seed, "init_std": 0.5, **changes})


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


def random_ids(seed, vocab, *size, lowest=0):
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


@torch.no_grad()
def next_logits(model, context):
    """The logits behind a list of ids, by one plain pass without any cache."""
    return model(torch.tensor([context]))[0, -1]


def slow_greedy(model, prompt, count, block_size):
    """The definition of greedy decoding: read everything again for each token.

    A full context (block_size tokens) drops to its newest block_size // 2 before the next token is appended.
    """
    context, new = list(prompt)[-block_size:], []
    while True:
        new.append(int(next_logits(model, context).argmax()))
        if len(new) == count:
            return new
        if len(context) == block_size:
            context = context[-(block_size // 2):] if block_size > 1 else []
        context.append(new[-1])


def log_prob(model, prompt, new):
    """Sum of log-probabilities of `new` behind `prompt`, within the context."""
    ids = torch.tensor([[*prompt, *new]])
    with torch.no_grad():
        table = model(ids)[0].double().log_softmax(-1)
    return sum(float(table[len(prompt) + i - 1, token]) for i, token in enumerate(new))


def up_to(row, eos):
    """A row of new ids up to and with its first EOS."""
    row = list(row)
    ends = [i for i, token in enumerate(row) if token in eos]
    return row[:ends[0] + 1] if ends else row


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


WORDS = "the cat sat on a mat and saw the dog run to café old tree while birds sang in morning light".split()


def toy_text(length=6000, seed=0):
    """Lines of a few words, with one character of two bytes."""
    rng, lines = random.Random(seed), []
    while sum(map(len, lines)) + len(lines) < length:
        lines.append(" ".join(rng.choices(WORDS, k=8)))
    return "\n".join(lines)[:length]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(toy_text(), encoding="utf-8")
    return path


def rows_of(seed, vocab, rows, length):
    """Random rows (inputs, targets) in the form that train() takes."""
    ids = random_ids(seed, vocab, rows, length + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def learnable(vocab, rows, length):
    """Rows that count upwards from a random start: the next token is always this one plus 1."""
    ids = (random_ids(5, vocab, rows, 1) + torch.arange(length + 1)) % vocab
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def training(m, tmp_path, name="run", **changes):
    """A Config for a few quick steps on rows of 12 tokens out of 31."""
    return m.Config(**{**dict(out=str(tmp_path / name), device="cpu", n_layer=2, n_head=3, n_embd=18, block_size=12,
                              vocab_size=31, batch_size=4, max_steps=20, warmup_steps=5, eval_every=10, save_every=10,
                              lr=1e-2, init_std=0.1), **changes})


# --- 1. Attention, masks, positions ----------------------------------------------------------------------------------
def test_causal_mask_is_aligned_at_the_bottom_right(m):
    rows = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert m.causal_mask(3, 3).tolist() == [[bool(x) for x in row] for row in rows]
    rows = [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert m.causal_mask(2, 4).tolist() == [[bool(x) for x in row] for row in rows]
    assert m.causal_mask(1, 5).tolist() == [[True] * 5]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["full", "causal", "cached", "padding"])
def test_attention_equals_sdpa_with_gradients(m, seed, kind):
    B, H, T, S, D = [(2, 3, 5, 7, 4), (3, 2, 4, 6, 5), (5, 4, 6, 9, 3)][seed]
    if kind == "causal":
        S = T
    torch.manual_seed(seed)
    ours = [torch.randn(B, H, n, D, dtype=torch.float64, requires_grad=True) for n in (T, S, S)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    mask = {"full": torch.ones(T, S), "causal": torch.ones(T, T).tril(), "cached": torch.ones(T, S).tril(S - T),
            "padding": torch.arange(S).expand(B, 1, 1, S) < torch.randint(1, S + 1, (B, 1, 1, 1))}[kind].bool()
    y = m.attention(*ours, mask)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=mask)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-12, rtol=1e-12)


def test_attention_divides_by_sqrt_d(m):
    # One query of length 4 along the first of two keys, D = 16: the scores are 4 * 4 / sqrt(16) = 4 and 0.
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 2, 16)
    q[..., 0], k[0, 0, 0, 0] = 4, 4
    v = torch.tensor([[[[1.0], [0.0]]]])
    y = m.attention(q, k, v, torch.ones(1, 2, dtype=torch.bool))
    assert y.item() == pytest.approx(math.exp(4) / (math.exp(4) + 1), abs=1e-6)


def test_a_row_that_sees_nothing_gives_zeros_and_no_nan(m):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, :, :, :3] = False  # left padding: the first three queries of row 1 see nothing at all
    y = m.attention(q, k, v, mask)
    assert (y[1, :, :3] == 0).all() and y.isfinite().all() and (y[1, :, 3:] != 0).all()
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert (v.grad[1, :, :3] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_self_attention_equals_torch_multihead_attention(m, seed):
    cfg = small(m, seed)
    torch.manual_seed(seed)
    ours = m.CausalSelfAttention(cfg).double().eval()
    theirs = nn.MultiheadAttention(cfg.n_embd, cfg.n_head, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({"in_proj_weight": ours.c_attn.weight, "in_proj_bias": ours.c_attn.bias,
                            "out_proj.weight": ours.c_proj.weight, "out_proj.bias": ours.c_proj.bias})
    x = torch.randn(2, 9, cfg.n_embd, dtype=torch.float64)
    hidden = torch.ones(9, 9).triu(1).bool()
    expected = theirs(x, x, x, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(ours(x), expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(ours(x, m.causal_mask(9, 9)), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_model_attention_equals_the_plain_one(m, seed):
    """The fused call inside the model and attention() written out are the same function, padding included."""
    cfg = small(m, seed)
    torch.manual_seed(seed)
    layer = m.CausalSelfAttention(cfg).double().eval()
    B, T, H, D = 3, 8, cfg.n_head, cfg.n_embd // cfg.n_head
    x = torch.randn(B, T, cfg.n_embd, dtype=torch.float64)
    keep = torch.arange(T) >= torch.tensor([0, 2, 5])[:, None]
    mask = torch.ones(T, T).tril().bool() & keep[:, None, None, :]
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in layer.c_attn(x).chunk(3, -1))
    expected = layer.c_proj(m.attention(q, k, v, mask).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask)[keep], expected[keep], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_equals_torch_pre_norm_layer(m, seed):
    """Pre-norm, residual sums, LayerNorm's eps and variance, the tanh form of GELU: all in torch's own layer."""
    cfg = small(m, seed)
    torch.manual_seed(seed)
    ours = shaken(m.Block(cfg), seed).double().eval()
    theirs = nn.TransformerEncoderLayer(cfg.n_embd, cfg.n_head, 4 * cfg.n_embd, dropout=0.0, batch_first=True,
                                        activation=lambda x: F.gelu(x, approximate="tanh"), norm_first=True,
                                        dtype=torch.float64)
    pairs = {"self_attn.in_proj_": ours.attn.c_attn, "self_attn.out_proj.": ours.attn.c_proj, "norm1.": ours.ln_1,
             "norm2.": ours.ln_2, "linear1.": ours.mlp.c_fc, "linear2.": ours.mlp.c_proj}
    theirs.load_state_dict({name + kind: getattr(part, kind) for name, part in pairs.items()
                            for kind in ("weight", "bias")})
    x = 2 * torch.randn(3, 7, cfg.n_embd, dtype=torch.float64)
    hidden = torch.ones(7, 7).triu(1).bool()
    torch.testing.assert_close(ours(x), theirs(x, src_mask=hidden), atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_causality_by_perturbation(m, seed):
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    ids = random_ids(seed, cfg.vocab_size, 2, 10)
    with torch.no_grad():
        before = model(ids)
        for t in range(10):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % cfg.vocab_size
            after = model(changed)
            torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-12, rtol=1e-12)
            # Every later position looks back at t: all of them move.
            assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-9).all()


def test_order_of_earlier_tokens_matters(m):
    cfg = small(m, 1)
    model = wide_model(m, cfg)
    ids = torch.tensor([[3, 9, 4, 7, 2, 5]])
    with torch.no_grad():
        difference = model(ids)[0, -1] - model(ids[:, [2, 1, 0, 3, 4, 5]])[0, -1]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", SEEDS)
def test_padding_changes_nothing(m, seed, side):
    """Logits of real tokens are those of the row alone, whatever stands in the pads, and nothing is NaN."""
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    prompts = [random_ids(seed * 10 + n, cfg.vocab_size, n) for n in (3, 8, 1, 5)]
    with torch.no_grad():
        for width in (8, 10):
            ids, mask = padded(prompts, side, width=width)
            logits = model(ids, mask)
            assert logits.isfinite().all()
            for row, prompt in enumerate(prompts):
                torch.testing.assert_close(logits[row, mask[row]], model(prompt[None])[0], atol=1e-11, rtol=1e-10)
            noise = torch.where(mask, ids, random_ids(seed + 77, cfg.vocab_size, *ids.shape))
            torch.testing.assert_close(model(noise, mask)[mask], logits[mask], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_with_padding_equal_those_without(m, side):
    cfg = small(m, 2)
    prompts = [random_ids(n, cfg.vocab_size, n) for n in (4, 9, 6)]

    def gradients(run):
        model = wide_model(m, cfg)
        run(model).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    def together(model):
        ids, mask = padded(prompts, side)
        # Logits of real tokens only: what a pad computes is nobody's business.
        return model(ids, mask)[mask].square().sum()

    mine = gradients(together)
    alone = gradients(lambda model: sum(model(prompt[None]).square().sum() for prompt in prompts))
    for name, gradient in mine.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, alone[name], atol=1e-8, rtol=1e-8)


def test_mask_of_ones_is_no_mask(m):
    cfg = small(m, 0)
    model = wide_model(m, cfg)
    ids = random_ids(0, cfg.vocab_size, 3, 7)
    torch.testing.assert_close(model(ids, torch.ones(3, 7, dtype=torch.bool)), model(ids), atol=1e-12, rtol=1e-12)


def test_more_tokens_than_positions_are_refused(m):
    cfg = small(m, 0)
    with pytest.raises(ValueError, match=str(cfg.block_size)):
        m.build_model(cfg)(torch.zeros(1, cfg.block_size + 1, dtype=torch.long))


def test_dropout_is_on_in_training_and_off_in_eval(m):
    cfg = small(m, 0, dropout=0.5)
    model = m.build_model(cfg)
    ids = random_ids(0, cfg.vocab_size, 2, 9)
    model.train()
    assert not torch.equal(model(ids), model(ids))
    # In each of the three places: behind the embedding, behind attention, behind the MLP.
    for part in (model.transformer.h[0].attn, model.transformer.h[0].mlp):
        x = torch.randn(2, 9, cfg.n_embd)
        assert (part(x) == 0).float().mean() > 0.3
    model.eval()
    assert torch.equal(model(ids), model(ids))


# --- 2. The whole model against transformers, published weights ------------------------------------------------------
@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


def published(hf, seed, std=0.3, **changes):
    """A GPT2LMHeadModel with random weights, biases and gains included."""
    sizes = shape(seed) | changes
    sizes["n_positions"] = sizes.pop("block_size")
    torch.manual_seed(seed)
    config = hf.GPT2Config(**sizes, initializer_range=std, bos_token_id=None, eos_token_id=None, resid_pdrop=0.0,
                           embd_pdrop=0.0, attn_pdrop=0.0)
    return shaken(hf.GPT2LMHeadModel(config), seed).eval()


def hf_logits(model, ids, mask=None):
    """Their logits; with padding they want the position ids from outside."""
    with torch.no_grad():
        if mask is None:
            return model(ids).logits
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        return model(ids, attention_mask=mask.long(), position_ids=positions).logits


def tensors_of(model):
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("seed", range(5))
def test_we_load_their_weights(m, hf, tmp_path, seed):
    theirs = published(hf, seed)
    theirs.save_pretrained(tmp_path / "hf")
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    assert not ours.training
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size, cfg.vocab_size) == tuple(
        shape(seed)[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))
    ids = random_ids(seed, cfg.vocab_size, 3, cfg.block_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
        ids, mask = padded([random_ids(n, cfg.vocab_size, n) for n in (2, 9, 5)], "left")
        torch.testing.assert_close(ours(ids, mask)[mask], hf_logits(theirs, ids, mask)[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_they_load_our_weights(m, hf, tmp_path, seed):
    cfg = small(m, seed, init_std=0.3)
    ours = wide_model(m, cfg, torch.float32)
    m.save_pretrained(ours, cfg, tmp_path / "ours")
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    ids = random_ids(seed, cfg.vocab_size, 3, cfg.block_size)
    with torch.no_grad():
        torch.testing.assert_close(hf_logits(theirs, ids), ours(ids), atol=1e-4, rtol=0)
        ids, mask = padded([random_ids(n, cfg.vocab_size, n) for n in (2, 9, 5)], "left")
        torch.testing.assert_close(hf_logits(theirs, ids, mask)[mask], ours(ids, mask)[mask], atol=1e-4, rtol=0)
    again, cfg2 = m.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    assert cfg2.n_head == cfg.n_head


def rewrite(folder, tensors):
    from safetensors.torch import save_file
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_files_as_on_the_hub_load(m, hf, tmp_path):
    """OpenAI's files: no `transformer.` in front, the causal mask stored as a buffer, no lm_head."""
    theirs = published(hf, 3)
    theirs.save_pretrained(tmp_path / "hf")
    n = theirs.config.n_positions
    tensors = {name.removeprefix("transformer."): t for name, t in tensors_of(theirs).items() if "lm_head" not in name}
    for layer in range(theirs.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    rewrite(tmp_path / "hf", tensors)
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    ids = random_ids(3, cfg.vocab_size, 2, 9)
    torch.testing.assert_close(ours(ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
    # The head is the embedding, not a copy of it: 124M parameters and not 163M.
    assert ours.lm_head.weight is ours.transformer.wte.weight


def test_half_precision_files_load_as_float32(m, hf, tmp_path):
    theirs = published(hf, 2).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf")
    ours, _ = m.from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


C_ATTN = "transformer.h.0.attn.c_attn.weight"
BAD_TENSORS = {
    "missing": ("transformer.h.0.mlp.c_fc.bias", lambda t: t.pop("transformer.h.0.mlp.c_fc.bias")),
    "missing matrix": (C_ATTN, lambda t: t.pop(C_ATTN)),
    "missing embedding": ("wte", lambda t: t.pop("transformer.wte.weight")),
    "missing embedding and head": ("wte", lambda t: [t.pop("transformer.wte.weight"), t.pop("lm_head.weight")]),
    "unknown": ("extra_head", lambda t: t.update({"transformer.extra_head.weight": torch.zeros(3)})),
    "one layer too many": ("h.9.ln_1.weight", lambda t: t.update({"transformer.h.9.ln_1.weight": torch.zeros(3)})),
    "misshapen": ("transformer.ln_f.bias", lambda t: t.update({"transformer.ln_f.bias": torch.zeros(5)})),
    "too short": ("wpe", lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"][:-1].clone()})),
    "transposed": (C_ATTN, lambda t: t.update({C_ATTN: t[C_ATTN].t().contiguous()})),
    # OpenAI's own TensorFlow files hold these matrices as (1, in, out).
    "three axes": (C_ATTN, lambda t: t.update({C_ATTN: t[C_ATTN][None].contiguous()})),
    "untied head": ("lm_head", lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_wrong_tensors_are_refused_by_name(m, hf, tmp_path, name):
    theirs = published(hf, 1)
    theirs.save_pretrained(tmp_path / "hf")
    tensors = tensors_of(theirs)
    named, spoil = BAD_TENSORS[name]
    spoil(tensors)
    rewrite(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=re.escape(named)):
        m.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("key, value", [
    ("activation_function", "gelu"), ("activation_function", "relu"), ("tie_word_embeddings", False),
    ("model_type", "llama"), ("layer_norm_epsilon", 1e-6), ("n_inner", 40), ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True)])
def test_another_arithmetic_is_refused_by_name(m, hf, tmp_path, key, value):
    """None of these changes a shape, so only config.json can tell."""
    published(hf, 1).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=key):
        m.from_pretrained(tmp_path / "hf")


def test_a_damaged_published_folder_is_one_line(m, hf, tmp_path, capsys):
    published(hf, 1).save_pretrained(tmp_path / "hf")
    whole = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    assert "hf" in complaint(m, capsys, "--load", tmp_path / "hf", "--prompt", "x")
    (tmp_path / "hf" / "config.json").write_text("{")
    assert "hf" in complaint(m, capsys, "--load", tmp_path / "hf", "--prompt", "x")


@pytest.mark.parametrize("preset, vocab, expected", [
    ("laptop", 65, 809_856), ("gpt2", 50257, 124_439_808), ("gpt2-medium", 50257, 354_823_168),
    ("gpt2-large", 50257, 774_030_080), ("gpt2-xl", 50257, 1_557_611_200)])
def test_parameter_counts(m, preset, vocab, expected):
    """The published figures; counted on the meta device, where a model has shapes and no memory."""
    cfg = m.Config(**{**m.PRESETS[preset], "vocab_size": vocab})
    with torch.device("meta"):
        model = m.GPT(cfg)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_presets_have_the_shapes_of_the_papers(m):
    shapes = {"gpt2": (12, 12, 768, 1024), "gpt2-medium": (24, 16, 1024, 1024), "gpt2-large": (36, 20, 1280, 1024),
              "gpt2-xl": (48, 25, 1600, 1024), "laptop": (4, 4, 128, 64), "shakespeare": (6, 6, 384, 256)}
    for name, expected in shapes.items():
        cfg = m.Config(**m.PRESETS[name])
        assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size) == expected, name


def test_initial_weights(m):
    cfg = m.Config(n_layer=3, n_head=4, n_embd=128, vocab_size=500, block_size=64, init_std=0.05)
    model = m.build_model(cfg)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            # The two matrices that write into the residual stream: 2 per layer, 6 summands.
            expected = 0.05 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.05
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 0.01 * 0.5
        else:
            assert (p == (1.0 if ".ln_" in name and name.endswith("weight") else 0.0)).all(), name


def test_weights_are_a_function_of_the_seed(m):
    first, second = m.build_model(small(m, 3)), m.build_model(small(m, 3))
    other = m.build_model(dataclasses.replace(small(m, 3), seed=4))
    assert same(first.state_dict(), second.state_dict())
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)


def test_head_is_tied(m):
    model = m.build_model(small(m, 0))
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = random_ids(0, 37, 2, 5)
    model(ids).sum().backward()
    # Token 36 is not among the inputs: its row of the embedding gets a gradient through the head alone.
    unused = next(t for t in range(37) if t not in ids)
    assert model.transformer.wte.weight.grad[unused].abs().sum() > 0


# --- 3. Decoding -----------------------------------------------------------------------------------------------------
def hf_pair(m, hf, tmp_path, seed, std=0.5, **changes):
    """The same random model twice, in float64: theirs and ours."""
    theirs = published(hf, seed, std, **changes)
    theirs.save_pretrained(tmp_path / "hf")
    ours, cfg = m.from_pretrained(tmp_path / "hf")
    return theirs.double(), ours.double(), cfg


def hf_generate(model, ids, mask, count, eos=None, **options):
    return model.generate(ids, attention_mask=mask.long(), max_new_tokens=count, do_sample=False, pad_token_id=0,
                          eos_token_id=eos, return_dict_in_generate=True, output_scores=True, **options)


def widened(ids, count, pad=0):
    """Both sides may stop early; compare at full width."""
    return F.pad(ids, (0, count - ids.size(-1)), value=pad)


def texts(ids, eos):
    """Rows up to their first EOS: behind it the beam search of transformers may repeat the EOS instead of padding."""
    return [up_to(row, eos or ()) for row in ids.flatten(0, -2).tolist()]


def frequent_eos(theirs, ids, mask, count):
    """Two tokens that greedy decoding really writes, so that rows do end early."""
    free = theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=count, do_sample=False, pad_token_id=0,
                           eos_token_id=None)[:, ids.size(1):]
    return [int(free[0, 1]), int(free[-1, 2])]


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_equals_transformers(m, hf, tmp_path, seed):
    theirs, ours, cfg = hf_pair(m, hf, tmp_path, seed, block_size=16)
    ids, mask = padded([random_ids(seed + n, cfg.vocab_size, n, lowest=1) for n in (3, 6, 1, 5)], "left")
    for eos in (None, frequent_eos(theirs, ids, mask, 9)):
        expected = hf_generate(theirs, ids, mask, 9, eos).sequences[:, 6:]
        mine = m.generate(ours, ids, 9, mask=mask, eos_ids=eos or ())
        assert torch.equal(widened(mine, 9), widened(expected, 9))


@pytest.mark.parametrize("with_eos", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_beam_search_equals_transformers(m, hf, tmp_path, penalty, with_eos):
    ended_early = 0
    for seed in range(4):
        theirs, ours, cfg = hf_pair(m, hf, tmp_path, seed, block_size=16)
        ids, mask = padded([random_ids(9 * seed + n, cfg.vocab_size, n, lowest=1) for n in (4, 6, 2)], "left")
        eos = frequent_eos(theirs, ids, mask, 8) if with_eos else None
        expected = hf_generate(theirs, ids, mask, 8, eos, num_beams=4, num_return_sequences=3, length_penalty=penalty)
        mine, scores = m.beam_search(ours, ids, 8, mask=mask, num_beams=4, length_penalty=penalty, n_best=3,
                                     eos_ids=eos or ())
        assert mine.shape[:2] == (3, 3) and scores.shape == (3, 3)
        theirs_new = texts(expected.sequences[:, 6:], eos)
        assert texts(mine, eos) == theirs_new
        torch.testing.assert_close(scores.flatten().float(), expected.sequences_scores.float(), atol=1e-4, rtol=0)
        ended_early += sum(len(row) < 8 for row in theirs_new)
    assert (ended_early > 0) == with_eos  # the case with EOS is really about EOS


@pytest.mark.parametrize("num_beams, n_best", [(2, 1), (5, 5)])
def test_other_beam_widths_equal_transformers(m, hf, tmp_path, num_beams, n_best):
    theirs, ours, cfg = hf_pair(m, hf, tmp_path, 7, block_size=16)
    ids, mask = padded([random_ids(n, cfg.vocab_size, n, lowest=1) for n in (4, 6)], "left")
    eos = frequent_eos(theirs, ids, mask, 8)[:1]
    expected = hf_generate(theirs, ids, mask, 8, eos, num_beams=num_beams, num_return_sequences=n_best)
    mine, scores = m.beam_search(ours, ids, 8, mask=mask, num_beams=num_beams, n_best=n_best, eos_ids=eos)
    assert texts(mine, eos) == texts(expected.sequences[:, 6:], eos)
    torch.testing.assert_close(scores.flatten().float(), expected.sequences_scores.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_repetition_penalty_equals_transformers(m, hf, tmp_path, seed):
    theirs, ours, cfg = hf_pair(m, hf, tmp_path, seed, block_size=16)
    ids = random_ids(seed, cfg.vocab_size, 2, 5, lowest=1)
    plain = hf_generate(theirs, ids, torch.ones_like(ids), 10).sequences[:, 5:]
    expected = hf_generate(theirs, ids, torch.ones_like(ids), 10, repetition_penalty=1.7).sequences[:, 5:]
    assert torch.equal(m.generate(ours, ids, 10, repetition_penalty=1.7), expected)
    assert not torch.equal(plain, expected)


def constant_model(m, logits):
    """A model that gives these logits behind any context."""
    cfg = m.Config(n_layer=1, n_head=1, n_embd=2, block_size=9, vocab_size=len(logits))
    model = m.build_model(cfg)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0.0]))
        model.transformer.wte.weight[:, 0] = torch.tensor(logits)
    return model


def test_repetition_penalty_by_hand(m):
    # Weaker is towards -inf, so a negative logit is multiplied: token 0 falls from -1 to -1.7, below -1.5; then token 2
    # falls to -2.55, and -1.7 is the best of all for good.
    model = constant_model(m, [-1.0, -2.0, -1.5, -3.0])
    assert m.generate(model, torch.tensor([[0, 0]]), 4, repetition_penalty=1.7).tolist() == [[2, 0, 0, 0]]
    # Positive ones are divided: 3, then 2, then 3 / 1.7 = 1.76 is the best again. A token counts once, not per visit.
    model = constant_model(m, [1.0, 2.0, 1.5, 3.0])
    assert m.generate(model, torch.tensor([[0]]), 4, repetition_penalty=1.7).tolist() == [[3, 1, 3, 3]]
    assert m.generate(model, torch.tensor([[0]]), 2).tolist() == [[3, 3]]


def test_padding_does_not_count_as_repeated(m):
    cfg = small(m, 1, block_size=13)
    model = wide_model(m, cfg)
    prompts = [random_ids(n, cfg.vocab_size, n, lowest=1) for n in (2, 6)]
    alone = [m.generate(model, prompt[None], 6, repetition_penalty=3.0)[0] for prompt in prompts]
    for fill in (int(alone[0][0]), 0):  # pads that look like the token to come
        ids, mask = padded(prompts, "left", fill)
        assert torch.equal(m.generate(model, ids, 6, mask=mask, repetition_penalty=3.0), torch.stack(alone))


@pytest.mark.parametrize("seed", SEEDS)
def test_cached_equals_uncached(m, seed):
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    for length in (1, 4):
        prompt = random_ids(seed, cfg.vocab_size, length).tolist()
        count = cfg.block_size - length + 1  # the last new token needs no position of its own
        mine = m.generate(model, torch.tensor([prompt]), count)
        assert mine.tolist() == [slow_greedy(model, prompt, count, cfg.block_size)]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("pieces", [(5, 4), (1, 1, 7), (3, 1, 2, 3), (9,)])
def test_chunked_prefill_equals_one_pass(m, side, pieces):
    cfg = small(m, len(pieces))
    model = wide_model(m, cfg)
    ids, mask = random_ids(1, cfg.vocab_size, 3, 9), None
    if side != "none":
        ids, mask = padded([random_ids(n, cfg.vocab_size, n) for n in (9, 4, 7)], side)
    with torch.no_grad():
        expected = model(ids, mask)
        cache = m.KVCache(cfg, 3, 9, like=model.lm_head.weight)
        start, parts = 0, []
        for piece in pieces:
            part = slice(start, start + piece)
            parts.append(model(ids[:, part], None if mask is None else mask[:, part], cache=cache))
            start += piece
    keep = torch.ones(3, 9, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(torch.cat(parts, 1)[keep], expected[keep], atol=1e-11, rtol=1e-10)


def test_an_early_token_reaches_a_late_output_through_the_cache(m):
    cfg = small(m, 2)
    model = wide_model(m, cfg)
    results = []
    for first in (3, 4):
        _, state = m.prefill(model, torch.tensor([[first, 8, 9, 10]]), None, 8)
        with torch.no_grad():
            results.append(m.decode_step(model, torch.tensor([5]), state)[0])
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_cache_keeps_the_type_of_the_model(m):
    cfg = small(m, 0)
    model = m.build_model(cfg).to(torch.bfloat16)
    out = m.generate(model, random_ids(0, cfg.vocab_size, 2, 3), 4)
    assert out.shape == (2, 4)
    cache = m.KVCache(cfg, 2, 5, like=model.lm_head.weight)
    assert cache.keys.dtype == torch.bfloat16 and cache.values.dtype == torch.bfloat16


def test_reorder_moves_rows(m):
    cfg = small(m, 1)
    model = wide_model(m, cfg)
    ids, mask = padded([random_ids(n, cfg.vocab_size, n) for n in (5, 2, 4)], "left")
    rows = torch.tensor([2, 0, 0, 1])
    token = torch.tensor([3, 1, 4, 6])
    with torch.no_grad():
        _, state = m.prefill(model, ids, mask, 9)
        moved, _ = m.decode_step(model, token, m.reorder(state, rows))
        _, state = m.prefill(model, ids[rows], mask[rows], 9)
        expected, _ = m.decode_step(model, token, state)
    torch.testing.assert_close(moved, expected, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_of_different_prompts_equals_each_alone(m, seed, side):
    cfg = small(m, seed, block_size=14)
    model = wide_model(m, cfg)
    prompts = [random_ids(7 * seed + n, cfg.vocab_size, n, lowest=1) for n in (3, 7, 1, 5)]
    ids, mask = padded(prompts, side)
    eos = (int(m.generate(model, prompts[0][None], 3)[0, -1]),)
    for options in ({}, {"eos_ids": eos}, {"repetition_penalty": 1.5}):
        together = m.generate(model, ids, 7, mask=mask, **options)
        for row, prompt in enumerate(prompts):
            alone = m.generate(model, prompt[None], 7, **options)
            assert torch.equal(widened(together, 7)[row], widened(alone, 7)[0])
    together, scores = m.beam_search(model, ids, 5, mask=mask, num_beams=3, eos_ids=eos, n_best=2)
    for row, prompt in enumerate(prompts):
        alone, score = m.beam_search(model, prompt[None], 5, num_beams=3, eos_ids=eos, n_best=2)
        assert torch.equal(widened(together, 5)[row], widened(alone, 5)[0])
        torch.testing.assert_close(scores[row], score[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("block_size", [1, 2, 7, 10])
def test_beyond_block_size_equals_the_slow_reference(m, block_size):
    cfg = small(m, block_size, block_size=block_size)
    model = wide_model(m, cfg)
    for length in (1, block_size, block_size + 3, 3 * block_size):  # the longer ones keep their last block_size tokens
        prompt = random_ids(length, cfg.vocab_size, length).tolist()
        mine = m.generate(model, torch.tensor([prompt]), 25)
        assert mine.tolist() == [slow_greedy(model, prompt, 25, block_size)], length


@pytest.mark.parametrize("side", ["left", "right"])
def test_short_prompts_beside_one_longer_than_the_context(m, side):
    """The context is the last block_size tokens of each row: cutting columns would cut a short row's own tokens."""
    cfg = small(m, 3, block_size=10)
    model = wide_model(m, cfg)
    prompts = [random_ids(n, cfg.vocab_size, n) for n in (3, 17, 9, 12)]
    ids, mask = padded(prompts, side)
    together = m.generate(model, ids, 1, mask=mask)[:, 0].tolist()
    assert together == [int(next_logits(model, prompt.tolist()[-10:]).argmax()) for prompt in prompts]


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_generation_with_padding_stays_sound(m, side):
    """Rows of different length beyond the context: never a crash, valid ids, and the longest row as if alone."""
    cfg = small(m, 5, block_size=10)
    model = wide_model(m, cfg)
    prompts = [random_ids(n, cfg.vocab_size, n) for n in (2, 8, 5)]
    ids, mask = padded(prompts, side)
    out = m.generate(model, ids, 30, mask=mask)
    assert out.shape == (3, 30) and out.min() >= 0 and out.max() < cfg.vocab_size
    assert out[1].tolist() == slow_greedy(model, prompts[1].tolist(), 30, 10)


def test_beam_search_beyond_block_size(m):
    cfg = small(m, 6, block_size=7)
    model = wide_model(m, cfg)
    prompt = random_ids(6, cfg.vocab_size, 1, 5)
    one, _ = m.beam_search(model, prompt, 20, num_beams=1)
    assert torch.equal(one[:, 0], m.generate(model, prompt, 20))
    ids, scores = m.beam_search(model, prompt, 20, num_beams=3, length_penalty=0.0)
    # The score is what the slow way of reading gives to these tokens.
    context, total = prompt[0].tolist(), 0.0
    for token in ids[0, 0].tolist():
        total += float(next_logits(model, context).log_softmax(-1)[token])
        context = [*(context[-3:] if len(context) == 7 else context), token]
    assert scores.item() == pytest.approx(total, abs=1e-3)


def test_rows_stop_at_their_own_eos(m):
    cfg = small(m, 4, block_size=13)
    model = wide_model(m, cfg)
    ids = random_ids(4, cfg.vocab_size, 6, 3)
    free = m.generate(model, ids, 9)
    eos = (int(free[0, 2]), int(free[3, 5]))
    out = m.generate(model, ids, 9, eos_ids=eos, pad_id=36)
    lengths = [len(up_to(row, eos)) for row in free.tolist()]
    assert out.size(1) == max(lengths) and len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert torch.equal(out[row, :length], free[row, :length])
        assert (out[row, length:] == 36).all()


def test_generation_ends_when_all_rows_have_ended(m):
    cfg = small(m, 4)
    model = wide_model(m, cfg)
    ids = random_ids(4, cfg.vocab_size, 1, 3)
    free = m.generate(model, ids, 6)[0].tolist()
    assert m.generate(model, ids, 6, eos_ids=(free[0],)).tolist() == [free[:1]]


@pytest.mark.parametrize("count", [0, 1])
def test_zero_or_one_new_token(m, count):
    cfg = small(m, 0)
    model = wide_model(m, cfg)
    ids = random_ids(0, cfg.vocab_size, 2, 4)
    out = m.generate(model, ids, count)
    assert out.shape == (2, count) and out.dtype == torch.int64
    if count:
        assert torch.equal(out[:, 0], model(ids)[:, -1].argmax(-1))
        beams, scores = m.beam_search(model, ids, 1, num_beams=3, n_best=3)
        best = model(ids)[:, -1].log_softmax(-1).topk(3)
        assert torch.equal(beams[:, :, 0], best.indices)
        torch.testing.assert_close(scores.double(), best.values, atol=1e-5, rtol=0)


def test_train_mode_and_dropout_do_not_touch_generation(m):
    cfg = small(m, 0, dropout=0.5)
    model = wide_model(m, cfg)
    ids = random_ids(0, cfg.vocab_size, 2, 4)
    expected = m.generate(model, ids, 8)
    beams, _ = m.beam_search(model, ids, 8)
    model.train()
    assert torch.equal(m.generate(model, ids, 8), expected)
    model.train()
    assert torch.equal(m.beam_search(model, ids, 8)[0], beams)


def test_streaming_gets_every_column(m):
    cfg = small(m, 4)
    model = wide_model(m, cfg)
    ids = random_ids(4, cfg.vocab_size, 3, 3)
    eos = (int(m.generate(model, ids, 4)[0, 1]),)
    columns = []
    out = m.generate(model, ids, 7, eos_ids=eos, on_token=lambda token: columns.append(token.clone()))
    assert torch.equal(torch.stack(columns, 1), out)


def test_sampling_is_a_function_of_the_generator(m):
    cfg = small(m, 4)
    model = wide_model(m, cfg)
    ids = random_ids(4, cfg.vocab_size, 3, 3)

    def draw(seed):
        return m.generate(model, ids, 8, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator belongs to training


def draws(m, probabilities, count, dtype=torch.float32, **options):
    """Frequencies of `count` samples from one distribution."""
    logits = torch.tensor(probabilities, dtype=dtype).log().expand(count, -1)
    options = {"temperature": 1.0, **options}
    tokens = m.sample_next(logits, generator=torch.Generator().manual_seed(0), **options)
    assert tokens.shape == (count,)
    return torch.bincount(tokens, minlength=len(probabilities)) / count


def test_temperature_zero_is_argmax(m):
    logits = torch.randn(500, 37, generator=torch.Generator().manual_seed(0)) * 1e-3
    for options in ({}, {"top_k": 5}, {"top_p": 0.3}):
        assert torch.equal(m.sample_next(logits, 0.0, **options), logits.argmax(-1))


# 0.5 + 0.3 reaches 0.8 exactly in float32; in float64 rounding decides, so p stays clear of the sum there.
@pytest.mark.parametrize("dtype, top_p", [(torch.float32, 0.8), (torch.float32, 0.79), (torch.float64, 0.79)])
def test_top_p_keeps_the_token_that_crosses_p_and_no_more(m, dtype, top_p):
    p = [0.5, 0.3, 0.15, 0.05]
    found = draws(m, p, 2000, dtype, top_p=top_p)
    assert found[0] > 0 and found[1] > 0 and (found[2:] == 0).all()
    found = draws(m, p, 2000, dtype, top_p=0.6)  # 0.5 is not yet 0.6, so the next token belongs to the set
    assert found[1] > 0 and (found[2:] == 0).all()
    assert draws(m, p, 2000, dtype, top_p=0.1).tolist() == [1, 0, 0, 0]  # never an empty set
    assert (draws(m, p, 2000, dtype, top_p=0.97) > 0).all()
    # The order of the tokens has nothing to say, and what is left is renormalised.
    found = draws(m, [0.05, 0.3, 0.15, 0.5], 20_000, dtype, top_p=0.75)
    assert found.tolist() == pytest.approx([0, 0.375, 0, 0.625], abs=0.015)


def test_top_k_keeps_k_tokens(m):
    p = [0.1, 0.4, 0.2, 0.3]
    assert draws(m, p, 2000, top_k=1).tolist() == [0, 1, 0, 0]
    assert draws(m, p, 20_000, top_k=2).tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.015)
    assert draws(m, p, 20_000, top_k=99).tolist() == pytest.approx(p, abs=0.015)  # more than there are: no cut


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_empirical_distribution_at_a_temperature(m, temperature):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    expected = p ** (1 / temperature)
    found = draws(m, p.tolist(), 40_000, temperature=temperature)
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.01, rtol=0)


def test_temperature_comes_before_top_p(m):
    # At temperature 2 the four probabilities are .35 .29 .20 .11 (and .05): 0.7 now takes three tokens, not two.
    p = [0.5, 0.33, 0.11, 0.05, 0.01]
    hot = torch.tensor(p).sqrt() / torch.tensor(p).sqrt().sum()
    assert hot[0] + hot[1] < 0.7 < hot[:3].sum()
    found = draws(m, p, 5000, temperature=2.0, top_p=0.7)
    assert (found[:3] > 0).all() and (found[3:] == 0).all()


def test_rows_are_sampled_independently(m):
    logits = torch.full((2, 5), -math.inf)
    logits[0, 3] = logits[1, 1] = 0.0
    assert m.sample_next(logits, 1.0).tolist() == [3, 1]
    logits = torch.zeros(4000, 2)
    tokens = m.sample_next(logits, 1.0, generator=torch.Generator().manual_seed(1))
    assert 0.45 < tokens.float().mean() < 0.55


def test_generate_samples_from_the_models_distribution(m):
    cfg = small(m, 2, init_std=0.2)
    model = wide_model(m, cfg)
    prompt = [4, 9, 2]
    expected = next_logits(model, prompt).softmax(-1)
    tokens = m.generate(model, torch.tensor([prompt]).expand(20_000, -1), 1, temperature=1.0,
                        generator=torch.Generator().manual_seed(3))[:, 0]
    found = torch.bincount(tokens, minlength=cfg.vocab_size) / 20_000
    assert (found - expected).abs().max() < 0.015


@pytest.mark.parametrize("seed", SEEDS)
def test_one_beam_is_greedy(m, seed):
    cfg = small(m, seed, block_size=13)
    model = wide_model(m, cfg)
    ids = random_ids(seed, cfg.vocab_size, 5, 4)
    free = m.generate(model, ids, 8)
    for eos in ((), (int(free[0, 1]), int(free[2, 3]))):
        for penalty in (0.0, 1.0, 2.0):
            out, _ = m.beam_search(model, ids, 8, num_beams=1, eos_ids=eos, length_penalty=penalty)
            assert torch.equal(widened(out[:, 0], 8), widened(m.generate(model, ids, 8, eos_ids=eos), 8))


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_as_wide_as_the_tree_finds_the_optimum(m, seed, penalty):
    """V = 4 and 3 tokens: 64 leaves, scored one by one with EOS = 2 ending a sequence wherever it stands."""
    cfg = small(m, seed, vocab_size=4)
    model = wide_model(m, cfg)
    prompt = [1, 3, 0]
    sequences = {tuple(up_to(leaf, {2})) for leaf in itertools.product(range(4), repeat=3)}
    table = {new: log_prob(model, prompt, new) / len(new) ** penalty for new in sequences}
    ids, scores = m.beam_search(model, torch.tensor([prompt]), 3, num_beams=64, length_penalty=penalty, eos_ids=(2,),
                                n_best=len(table))
    # Not the optimum alone: the whole ranking, each sequence once and with its own score.
    found = {tuple(up_to(row, {2})): score for row, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True)}
    assert found == pytest.approx(table, abs=1e-4)
    assert list(found) == sorted(found, key=found.get, reverse=True)
    assert list(found)[0] == max(table, key=table.get)


def test_a_hundred_random_models(m):
    """Never a crash; scores ordered and true; pads behind an EOS; beams win against greedy on average."""
    rng, gain = random.Random(0), []
    for trial in range(100):
        K = rng.randint(1, 6)
        heads = rng.choice((1, 2, 3))
        cfg = m.Config(n_layer=rng.choice((1, 2)), n_head=heads, n_embd=4 * heads, block_size=rng.randint(6, 12),
                       vocab_size=rng.randint(3, 11), init_std=0.7, seed=trial)
        model = wide_model(m, cfg)
        V, N, pad = cfg.vocab_size, rng.randint(1, 9), 0
        eos = tuple(rng.sample(range(1, V), rng.randint(0, min(2, V - 2))))
        prompts = [random_ids(trial + n, V, n) for n in rng.sample(range(1, 6), rng.randint(1, 3))]
        ids, mask = padded(prompts, rng.choice(("left", "right")))
        n_best, penalty = rng.randint(1, min(K, V)), rng.choice((0.0, 0.6, 1.0, 2.0))
        out, scores = m.beam_search(model, ids, N, mask=mask, num_beams=K, n_best=n_best, length_penalty=penalty,
                                    eos_ids=eos, pad_id=pad)
        assert out.shape[:2] == scores.shape == (len(prompts), n_best) and 1 <= out.size(2) <= N
        assert out.min() >= 0 and out.max() < V and (scores[:, :-1] >= scores[:, 1:]).all()
        for row, prompt in enumerate(prompts):
            for new, score in zip(out[row].tolist(), scores[row].tolist(), strict=True):
                real = up_to(new, eos)
                assert set(new[len(real):]) <= {pad}
                if ids.size(1) + N <= cfg.block_size and math.isfinite(score):
                    expected = log_prob(model, prompt.tolist(), real) / len(real) ** penalty
                    assert score == pytest.approx(expected, abs=1e-4)
        if ids.size(1) + N <= cfg.block_size:
            free, raw = m.beam_search(model, ids, N, mask=mask, num_beams=K, length_penalty=0.0)
            greedy = m.generate(model, ids, N, mask=mask)
            gain += [float(raw[row, 0]) - log_prob(model, prompt.tolist(), greedy[row].tolist())
                     for row, prompt in enumerate(prompts)]
    assert len(gain) > 50 and sum(gain) / len(gain) > 0.01  # one case may lose: pruning is greedy too


def test_more_answers_than_beams_are_refused(m):
    cfg = small(m, 0)
    with pytest.raises(ValueError):
        m.beam_search(m.build_model(cfg), torch.tensor([[1, 2]]), 3, num_beams=2, n_best=3)


# --- 4. Objective and data -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", SEEDS)
def test_loss_is_the_sum_of_cross_entropies_over_counted_tokens(m, seed):
    cfg = small(m, seed)
    model = wide_model(m, cfg)
    inputs, targets = rows_of(seed, cfg.vocab_size, 5, 9)
    targets = targets.masked_fill(torch.rand(5, 9, generator=torch.Generator().manual_seed(seed)) < 0.4, m.IGNORE)
    total, count, metrics = m.compute_loss(model, (inputs, targets), cfg)
    keep = targets != m.IGNORE
    expected = F.cross_entropy(model(inputs)[keep], targets[keep], reduction="sum")
    torch.testing.assert_close(total, expected, atol=1e-10, rtol=1e-10)
    assert int(count) == int(keep.sum()) and metrics == {}
    assert total.requires_grad
    # What stands in the inputs behind the last counted target cannot matter.
    inputs2, targets2 = inputs.clone(), targets.clone()
    targets2[:, 6:] = m.IGNORE
    inputs2[:, 6:] = 0
    again = [m.compute_loss(model, (rows, targets2), cfg)[0] for rows in (inputs, inputs2)]
    torch.testing.assert_close(again[0], again[1], atol=1e-10, rtol=1e-10)


def test_first_loss_is_ln_v_for_small_weights(m):
    cfg = m.Config(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=97, init_std=0.02)
    total, count, _ = m.compute_loss(m.build_model(cfg), rows_of(0, 97, 50, 16), cfg)
    assert total.item() / int(count) == pytest.approx(math.log(97), abs=0.02)


NAMES = {0: "zero", 7: "seven", 10: "ten", 12: "twelve", 19: "nineteen", 20: "twenty", 45: "forty five",
         90: "ninety", 100: "one hundred", 101: "one hundred one", 110: "one hundred ten",
         999: "nine hundred ninety nine",
         1000: "one thousand", 1001: "one thousand one", 10_000: "ten thousand", 11_011: "eleven thousand eleven",
         40_215: "forty thousand two hundred fifteen", 100_000: "one hundred thousand",
         300_070: "three hundred thousand seventy",
         999_999: "nine hundred ninety nine thousand nine hundred ninety nine"}


@pytest.mark.parametrize("n", NAMES)
def test_number_to_words_by_hand(m, n):
    assert m.number_to_words(n) == NAMES[n]


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


def test_number_to_words_of_many(m):
    rng = random.Random(1)
    many = [*range(3000), *(rng.randrange(10 ** 6) for _ in range(5000)), *range(999_000, 10 ** 6)]
    for n in many:
        assert m.number_to_words(n) == words_of(n)
    assert len({m.number_to_words(n) for n in set(many)}) == len(set(many))


def test_validation_numbers(m):
    held_out = [n for n in range(50_000) if m.is_validation(n)]
    expected = [n for n in range(1, 50_000) if int.from_bytes(hashlib.sha256(b"%d" % n).digest(), "big") % 10 == 0]
    assert held_out == expected and not m.is_validation(0)
    assert 0.09 < len(held_out) / 50_000 < 0.11


def test_splits_are_disjoint(m):
    train, val = m.draw_numbers(30_000, 0, False), m.draw_numbers(3000, 0, True)
    assert len(train) == 30_000 and len(val) == 3000
    assert not set(train) & set(val) and 0 in train and 0 not in val
    # Uniform over the number of digits, not over the numbers.
    for numbers in (train, val):
        assert min(numbers) >= 0 and max(numbers) < 10 ** 6
    lengths = torch.bincount(torch.tensor([len(str(n)) for n in train]))[1:] / 30_000
    assert lengths.tolist() == pytest.approx([1 / 6] * 6, abs=0.02)
    assert m.draw_numbers(50, 3, False) == m.draw_numbers(50, 3, False) != m.draw_numbers(50, 4, False)


def test_toy_tokenizer(m):
    tokenizer = m.ToyTokenizer()
    assert tokenizer.n_vocab == len(m.TOY_VOCAB) == len(set(m.TOY_VOCAB))
    for n in [*NAMES, *m.draw_numbers(300, 0, False)]:
        line = f"{n}={m.number_to_words(n)}\n"
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == line
        # One token per digit and per word: "5" and "five" are different ids, and nobody's id is the padding.
        assert len(ids) == len(str(n)) + 1 + len(m.number_to_words(n).split()) + 1 and 0 not in ids
        assert tokenizer.decode([0, *ids, 0, 0]) == line
    assert not set(tokenizer.encode("0123456789")) & set(tokenizer.encode(" ".join(map(m.number_to_words, range(10)))))
    assert tokenizer.eos_ids == (tokenizer.encode("\n")[0],)
    with pytest.raises(ValueError, match="eleventy"):
        tokenizer.encode("5=eleventy")


def test_char_tokenizer(m):
    text = "héllo wörld\n 東京"
    tokenizer = m.CharTokenizer("".join(sorted(set(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text) and tokenizer.n_vocab == len(set(text))
    assert sorted(set(tokenizer.encode(text))) == list(range(tokenizer.n_vocab))
    with pytest.raises(ValueError, match="Q"):
        tokenizer.encode("hQ")


def test_bpe_tokenizer(m, tiktoken_cache):
    tiktoken = pytest.importorskip("tiktoken")
    reference = tiktoken.get_encoding("gpt2")
    tokenizer = m.make_tokenizer({"kind": "gpt2"})
    assert tokenizer.n_vocab == 50257 and tokenizer.eos_ids == (50256,)
    for text in ("Hello, world", " naïve café 東京 🙂\n\n  x", "<|endoftext|>"):
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode([15496, 50300, 995]) == "Hello world"  # ids of a padded vocabulary stand for nothing


def test_a_spec_rebuilds_its_tokenizer(m, tiktoken_cache):
    for tokenizer, text in ((m.CharTokenizer(" abé"), "baé "), (m.ToyTokenizer(), "12=twelve\n"),
                            (m.make_tokenizer({"kind": "gpt2"}), "Hello")):
        again = m.make_tokenizer(json.loads(json.dumps(tokenizer.spec)))
        assert again.encode(text) == tokenizer.encode(text) and again.decode(tokenizer.encode(text)) == text
        assert (again.n_vocab, again.eos_ids) == (tokenizer.n_vocab, tokenizer.eos_ids)


@pytest.mark.parametrize("n, T", [(41, 8), (45, 8), (9, 8), (50, 7)])
def test_validation_rows_predict_every_token_once(m, n, T):
    ids = torch.arange(n)  # the value of a token is its place
    inputs, targets = m.text_rows(ids, T, T)
    assert inputs.shape == targets.shape == ((n - 1) // T, T)
    assert torch.equal(targets, inputs + 1)
    predicted = targets.flatten().tolist()
    assert predicted == list(range(1, 1 + T * ((n - 1) // T)))  # once each, but for a tail shorter than one row


def test_training_rows_start_anywhere(m):
    inputs, targets = m.text_rows(torch.arange(20), 6, 1)
    assert inputs[:, 0].tolist() == list(range(14)) and torch.equal(targets, inputs + 1)


def test_number_rows(m):
    tokenizer = m.ToyTokenizer()
    numbers = [40_215, 7, 777_777, 10]
    inputs, targets = m.number_rows(numbers, tokenizer)
    assert inputs.shape == targets.shape == (4, 16)
    for n, row, target in zip(numbers, inputs, targets, strict=True):
        counted = target != m.IGNORE
        # Only the name and the newline right behind it are learned: no digit, no "=", no padding.
        assert target[counted].tolist() == tokenizer.encode(m.number_to_words(n) + "\n")
        assert tokenizer.decode(row.tolist()).startswith(f"{n}={m.number_to_words(n)}")
        # Each target is the token that follows its input, and the first one is predicted from "=".
        places = counted.nonzero()[:, 0].tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert int(row[places[0]]) == tokenizer.encode("=")[0]
        assert torch.equal(row[places[0] + 1:places[-1] + 1], target[places[0]:places[-1]])
        assert (row[len(tokenizer.encode(f"{n}={m.number_to_words(n)}\n")):] == 0).all()


def test_get_batch_is_a_function_of_seed_and_step(m):
    data = (torch.arange(1000).view(200, 5), torch.arange(1000).view(200, 5) + 1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = m.get_batch(data, 16, 3, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(first, m.get_batch(data, 16, 3, 7))
    others = [m.get_batch(data, 16, seed, step) for seed, step in ((3, 8), (4, 7), (7, 3))]
    assert all(not torch.equal(first[0], other[0]) for other in others)
    assert first[0].shape == (16, 5) and torch.equal(first[1], first[0] + 1)  # the same rows of both tensors
    many = torch.cat([m.get_batch(data, 16, 0, step)[0][:, 0] // 5 for step in range(200)])
    assert (torch.bincount(many, minlength=200) > 0).all()  # each row has its chance


def test_make_data_from_a_file(m, text_file):
    cfg = m.Config(data=str(text_file), block_size=16)
    train, val, tokenizer, info = m.make_data(cfg)
    text = toy_text()
    cut = int(0.9 * len(text))
    assert tokenizer.decode(val[0].flatten().tolist()) == text[cut:cut + val[0].numel()]
    assert val[0].numel() > len(text) - cut - 17
    assert tokenizer.decode(train[0][123].tolist()) == text[123:139]
    assert tokenizer.decode(train[1][123].tolist()) == text[124:140]
    assert len(train[0]) == cut - 16  # no training row reaches into the validation part
    assert info["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert info["name"] == str(text_file)
    assert info["bytes_per_token"] == pytest.approx(len(text[cut:].encode()) / len(text[cut:]))


def test_make_data_numbers(m):
    train, val, tokenizer, info = m.make_data(m.Config(data="numbers"))
    names = [{tokenizer.decode(row.tolist()) for row in split[0]} for split in (train, val)]
    assert not names[0] & names[1] and len(train[0]) > 10_000 and len(val[0]) > 1000
    assert info["name"] == "numbers"
    again = m.make_data(m.Config(data="numbers"))
    assert same(train, again[0]) and same(val, again[1]) and info == again[3]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; breaks off the first `cuts` answers in the middle; honours Range if `ranges`."""

    content, cuts, ranges = b"", 0, True

    def do_GET(self):
        cls, header = type(self), self.headers.get("Range")
        cls.asked.append(header)
        start = int(re.match(r"bytes=(\d+)-", header)[1]) if header and cls.ranges else 0
        if self.path != "/file.bin":
            self.send_error(404)
            return
        if start >= len(cls.content):
            self.send_error(416)
            return
        body = cls.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(cls.content) - 1}/{len(cls.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.cuts:
            cls.cuts -= 1
            body = body[:len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """-> (handler class, address). The class records the Range header of every request in `asked`."""
    pytest.importorskip("requests")
    handler = type("Handler", (Server,), {"content": random.Random(0).randbytes(300_000), "asked": []})
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{service.server_port}/file.bin"
    service.shutdown()
    service.server_close()
    thread.join()


def digest(content):
    return hashlib.sha256(content).hexdigest()


def test_fetch_downloads_once(m, server, tmp_path):
    handler, url = server
    path = m.fetch("file.bin", url, digest(handler.content))
    assert path.resolve() == tmp_path / "data" / "file.bin" and path.read_bytes() == handler.content
    assert m.fetch("file.bin", url, digest(handler.content)) == path and len(handler.asked) == 1
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_continues_a_broken_download(m, server, tmp_path, ranges):
    handler, url = server
    handler.cuts, handler.ranges = 1, ranges
    with pytest.raises(OSError):
        m.fetch("file.bin", url, digest(handler.content))
    assert not (tmp_path / "data" / "file.bin").exists()  # the final name is for complete files
    path = m.fetch("file.bin", url, digest(handler.content))
    assert path.read_bytes() == handler.content
    assert handler.asked[0] is None and re.fullmatch(r"bytes=[1-9]\d*-", handler.asked[1])
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("kind", ["whole", "too long", "other bytes"])
def test_fetch_recovers_from_a_strange_part(m, server, tmp_path, kind):
    """Killed just before the rename, or left by another version: the second attempt, at the latest, succeeds."""
    handler, url = server
    (tmp_path / "data").mkdir()
    left = {"whole": handler.content, "too long": handler.content + b"x", "other bytes": b"x" * 300}[kind]
    (tmp_path / "data" / "file.bin.part").write_bytes(left)
    try:
        path = m.fetch("file.bin", url, digest(handler.content))
    except OSError:
        path = m.fetch("file.bin", url, digest(handler.content))
    assert path.read_bytes() == handler.content


def test_fetch_refuses_a_wrong_hash(m, server, tmp_path):
    handler, url = server
    with pytest.raises(OSError, match="(?i)sha"):
        m.fetch("file.bin", url, digest(b"something else"))
    assert not list((tmp_path / "data").iterdir())
    (tmp_path / "data" / "file.bin").write_bytes(b"damaged")
    with pytest.raises(OSError, match="file.bin"):
        m.fetch("file.bin", url, digest(handler.content))


def test_fetch_refuses_a_missing_page(m, server, tmp_path):
    with pytest.raises(OSError):
        m.fetch("file.bin", server[1] + ".old", "")
    assert not list((tmp_path / "data").iterdir())  # an error page is no file, nor the beginning of one


def test_fetch_looks_into_llm_data_first(m, tmp_path, monkeypatch):
    for folder in ("mine", "data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file.txt").write_text(folder)
    assert m.fetch("file.txt", "http://127.0.0.1:9/", "").read_text() == "data"
    monkeypatch.setenv("LLM_DATA", str(tmp_path / "mine"))
    assert m.fetch("file.txt", "http://127.0.0.1:9/", "").read_text() == "mine"


@pytest.fixture
def offline(monkeypatch):
    requests = pytest.importorskip("requests")

    def refuse(*_, **__):
        raise requests.ConnectionError("no network")

    for name in ("get", "head"):
        monkeypatch.setattr(requests, name, refuse)


def test_auto_takes_shakespeare_when_it_is_there(m, data_dir, monkeypatch, offline):
    if not (data_dir / "tinyshakespeare.txt").is_file():
        pytest.skip("no tinyshakespeare.txt in the data folder")
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    for name in ("auto", "shakespeare"):
        text, real_name, _ = m.load_text(name)
        assert real_name == "shakespeare" and text.startswith("First Citizen:") and len(text) == 1_115_394


def test_auto_falls_back_to_the_python_docs(m, offline):
    text, name, _ = m.load_text("auto")
    assert name == "pydocs" and len(text) > 300_000 and "exception" in text
    assert m.load_text("pydocs")[0] == text
    with pytest.raises(SystemExit) as stop:
        m.load_text("shakespeare")  # named, so nothing else will do
    assert str(stop.value.code).startswith("error: ")


# --- 5. Training, checkpoints, resume --------------------------------------------------------------------------------
def test_learning_rate(m):
    cfg = m.Config(lr=2.0, warmup_steps=10, max_steps=111, min_lr_ratio=0.1)
    assert m.lr_at(0, cfg) == pytest.approx(0.2)  # update 0 moves already, and not at full rate
    assert m.lr_at(4, cfg) == pytest.approx(1.0)
    assert m.lr_at(9, cfg) == pytest.approx(2.0)
    assert m.lr_at(110, cfg) == pytest.approx(0.2)
    assert m.lr_at(60, cfg) == pytest.approx(1.1, abs=0.02)  # half of a cosine: halfway in the middle
    assert m.lr_at(35, cfg) > 1.65  # and slow at its start
    rates = [m.lr_at(step, cfg) for step in range(111)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    flat = m.Config(lr=2.0, warmup_steps=0, max_steps=5, min_lr_ratio=0.0)
    assert m.lr_at(0, flat) == pytest.approx(2.0) and m.lr_at(4, flat) == pytest.approx(0.0, abs=1e-12)
    assert all(0 < m.lr_at(step, m.Config(warmup_steps=50, max_steps=20)) for step in range(20))


def test_decay_pulls_matrices_and_leaves_vectors(m):
    cfg = small(m, 0, weight_decay=0.5, lr=0.1)
    model = shaken(m.build_model(cfg))
    optimizer = m.make_optimizer(model, cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        # AdamW with zero gradients: what is left is the decay, lr * weight_decay of the value; the tied head once.
        expected = before[name] * (1 - 0.1 * 0.5) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(p.detach(), expected)


def test_frozen_parameters_are_left_alone(m, tmp_path):
    cfg = training(m, tmp_path, max_steps=4)
    model = m.build_model(cfg)
    model.transformer.h[0].requires_grad_(False)
    frozen = {id(p) for p in model.transformer.h[0].parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = m.make_optimizer(model, cfg)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not frozen & set(map(id, held)) and len(held) == len(list(model.parameters())) - len(frozen)
    data = learnable(31, 64, 12)
    m.train(model, cfg, data, data, m.compute_loss)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("transformer.h.0."), name


def test_evaluate_counts_the_whole_split(m):
    numbers = m.draw_numbers(37, 0, True)  # rows of unequal length, and 37 is no multiple of 8
    data = m.number_rows(numbers, m.ToyTokenizer())
    cfg = m.Config(n_layer=1, n_head=2, n_embd=14, block_size=16, vocab_size=len(m.TOY_VOCAB), batch_size=8,
                   dropout=0.3, init_std=0.5)
    model = m.build_model(cfg).double()
    model.train()
    found = m.evaluate(model, data, cfg, m.compute_loss)["val_loss"]
    model.eval()
    expected = F.cross_entropy(model(data[0]).flatten(0, 1), data[1].flatten(), ignore_index=m.IGNORE)
    assert found == pytest.approx(expected.item(), abs=1e-5)
    # One row in the last, short batch counts as any other.
    data[1][36, :] = m.IGNORE
    assert m.evaluate(model, data, cfg, m.compute_loss)["val_loss"] != pytest.approx(found, abs=1e-7)


def test_looking_more_often_does_not_change_training(m, tmp_path):
    results = []
    for every in (1, 1000):
        cfg = training(m, tmp_path, f"every{every}", dropout=0.2, max_steps=12, eval_every=every)
        model, data = m.build_model(cfg), learnable(31, 64, 12)

        def look(step, model=model, every=every):
            if every == 1:  # sampling on the way, as the program itself does
                m.generate(model, torch.tensor([[step]]), 3, temperature=1.0)

        m.train(model, cfg, data, data, m.compute_loss, after_step=look)
        results.append(model.state_dict())
    assert same(*results)


@pytest.mark.parametrize("batch_size, grad_accum", [(6, 4), (2, 12), (24, 1)])
def test_accumulation_equals_one_big_batch(m, tmp_path, batch_size, grad_accum):
    """24 rows a step, however they are split. Long and short names make the micro-batches count unequal tokens."""
    numbers = m.draw_numbers(200, 1, False)
    data = m.number_rows(numbers, m.ToyTokenizer())

    def run(name, batch_size, grad_accum):
        cfg = training(m, tmp_path, name, vocab_size=len(m.TOY_VOCAB), block_size=16, batch_size=batch_size,
                       grad_accum=grad_accum, max_steps=6, grad_clip=0.5)
        model = m.build_model(cfg).double()
        m.train(model, cfg, data, data, m.compute_loss)
        return model

    one, other = run("one", 24, 1), run("other", batch_size, grad_accum)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-9, name


def test_the_step_is_that_of_adamw_on_the_mean_loss(m, tmp_path):
    """Three steps by hand, with torch's own loss, clipping and optimizer, give the same weights."""
    cfg = training(m, tmp_path, max_steps=3, grad_clip=0.7, weight_decay=0.2, batch_size=5)
    data = learnable(31, 64, 12)
    model, mine = m.build_model(cfg).double(), m.build_model(cfg).double()
    history = m.train(model, cfg, data, data, m.compute_loss)["history"]
    params = list(mine.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.2},
         {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}], betas=(0.9, cfg.beta2))
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (step + 1) / 5
        inputs, targets = m.get_batch(data, 5, cfg.seed, step)
        optimizer.zero_grad()
        F.cross_entropy(mine(inputs).flatten(0, 1), targets.flatten()).backward()
        norm = nn.utils.clip_grad_norm_(params, 0.7)
        assert norm > 0.7  # clipping is at work
        optimizer.step()
    # Adam forgives a gradient of the wrong scale; its norm does not. (It is the norm before clipping.)
    assert history[-1]["step"] == 3 and history[-1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), mine.named_parameters(), strict=True):
        # 1e-6: the divisor may be a float32 number.
        assert (a - b[1]).abs().max() < 1e-6, name


def test_loss_falls_and_metrics_tell(m, tmp_path):
    cfg = training(m, tmp_path, max_steps=45, eval_every=15)
    model, data = m.build_model(cfg), learnable(31, 64, 12)
    total, count, _ = m.compute_loss(model, m.get_batch(data, 4, cfg.seed, 0), cfg)
    first_loss = total.item() / int(count)
    result = m.train(model, cfg, data, data, m.compute_loss)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == json.loads(json.dumps(result["history"]))
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and {10, 15, 20, 30, 40, 45} <= set(steps)
    for row in rows:
        assert {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} <= row.keys()
        assert ("val_loss" in row) == (row["step"] in (15, 30, 45))
        assert row["tokens"] == row["step"] * 4 * 12
        assert row["lr"] == pytest.approx(m.lr_at(row["step"] - 1, cfg))
        assert row["grad_norm"] > 0
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    if steps[0] == 1:
        assert rows[0]["loss"] == pytest.approx(first_loss, abs=1e-5)
    assert rows[-1]["loss"] < 0.7 * first_loss and rows[-1]["val_loss"] < 0.7 * first_loss
    assert result["val_loss"] == rows[-1]["val_loss"]
    assert result["val_loss"] == pytest.approx(m.evaluate(model, data, cfg, m.compute_loss)["val_loss"], abs=1e-6)
    assert result["tokens_per_second"] > 0 and result["seconds"] > 0


def test_after_step_sees_every_step(m, tmp_path):
    cfg, steps = training(m, tmp_path, max_steps=7), []
    data = learnable(31, 64, 12)
    m.train(m.build_model(cfg), cfg, data, data, m.compute_loss, after_step=steps.append)
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_dropout_is_on_in_every_step(m, tmp_path):
    """Evaluations and samples switch the model to eval mode; the next step switches it back."""
    cfg, modes = training(m, tmp_path, max_steps=6, grad_accum=2, eval_every=2), []
    model, data = m.build_model(cfg), learnable(31, 4, 12)

    def loss_fn(model, batch, cfg):
        modes.append(model.training)
        return m.compute_loss(model, batch, cfg)

    m.train(model, cfg, data, data, loss_fn, after_step=lambda step: m.generate(model, torch.tensor([[step]]), 2))
    two_steps = [True] * 4 + [False]  # 2 micro-steps each, then the one batch of the validation split
    assert modes == two_steps * 3


class Stop(Exception):
    pass


def straight_and_resumed(m, tmp_path, stop_at=13, **changes):
    """20 steps at once; and the same with a break behind step `stop_at`, continued from the checkpoint of step 10."""
    data = learnable(31, 64, 12)

    def stop(step):
        if step == stop_at:
            raise Stop

    def run(name, resume=False, after_step=None):
        cfg = training(m, tmp_path, name, resume=resume, **changes)
        # Another seed in between: a resumed process knows nothing of the first one's random state.
        torch.manual_seed(random.Random(name + str(resume)).randrange(10 ** 6))
        return m.train(m.build_model(cfg), cfg, data, data, m.compute_loss, {"tokenizer": "mine"}, after_step)

    run("straight")
    with pytest.raises(Stop):
        run("broken", after_step=stop)
    result = run("broken", resume=True)
    return contents(tmp_path / "straight" / "ckpt.pt"), contents(tmp_path / "broken" / "ckpt.pt"), result


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"grad_accum": 3, "dropout": 0.1}], ids=str)
def test_resume_is_exact(m, tmp_path, changes):
    straight, resumed, result = straight_and_resumed(m, tmp_path, **changes)
    assert straight["step"] == resumed["step"] == 20
    assert same(straight["model"], resumed["model"])
    assert same(straight["optimizer"], resumed["optimizer"])
    # Step 13 was not saved, so its rows are gone; no step is told twice, and what is told is the same.
    rows = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    known = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in known]
    for row, other in zip(rows, known, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert result["history"][-1]["step"] == 20


def test_resume_may_happen_twice_and_at_the_end(m, tmp_path):
    straight, _, _ = straight_and_resumed(m, tmp_path, save_every=4, stop_at=6)
    data = learnable(31, 64, 12)
    cfg = training(m, tmp_path, "broken", resume=True, save_every=4)
    result = m.train(m.build_model(cfg), cfg, data, data, m.compute_loss)
    again = contents(tmp_path / "broken" / "ckpt.pt")
    assert again["step"] == 20 and same(again["model"], straight["model"])
    assert result["val_loss"] == pytest.approx(result["history"][-1]["val_loss"])
    assert again["extra"]["tokenizer"] == "mine"  # what travels in the checkpoint survives


def test_checkpoint_round_trip(m, tmp_path):
    cfg = training(m, tmp_path)
    model, data = m.build_model(cfg), learnable(31, 64, 12)
    optimizer = m.make_optimizer(model, cfg)
    m.compute_loss(model, data, cfg)[0].backward()
    optimizer.step()
    path = tmp_path / "deep" / "er" / "ckpt.pt"
    m.save_checkpoint(path, model, optimizer, 7, cfg, {"tokenizer": {"kind": "char", "chars": "ab"}})
    other = m.build_model(dataclasses.replace(cfg, seed=5))
    fresh = m.make_optimizer(other, cfg)
    step, extra = m.load_checkpoint(path, other, fresh, cfg)
    assert step == 7 and extra["tokenizer"] == {"kind": "char", "chars": "ab"}
    assert same(model.state_dict(), other.state_dict()) and same(optimizer.state_dict(), fresh.state_dict())
    assert other.lm_head.weight is other.transformer.wte.weight
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]
    wrong = m.build_model(dataclasses.replace(cfg, n_embd=24))
    with pytest.raises(SystemExit) as stop:
        m.load_checkpoint(path, wrong, None, cfg)
    text = str(stop.value.code)
    assert text.startswith("error: ") and "ckpt.pt" in text and len(text.splitlines()) == 1


def test_a_failed_write_leaves_the_old_file(m, tmp_path):
    path = tmp_path / "a" / "file"
    m.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise Stop

    with pytest.raises(Stop):
        m.write_atomically(path, fail)
    assert files_of(tmp_path / "a") == {"file": b"old"}
    m.write_atomically(path, lambda file: file.write(b"new"))
    assert files_of(tmp_path / "a") == {"file": b"new"}


@pytest.mark.parametrize("compiler", [True, False])
def test_compile_saves_plain_names(m, tmp_path, monkeypatch, compiler):
    """A stand-in for torch.compile: a wrapper that keeps the model under _orig_mod, as the real one does."""
    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model
            used.append(self)

        def forward(self, *args, **named):
            return self._orig_mod(*args, **named)

    used = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: Compiled(model))
    monkeypatch.setattr("shutil.which", lambda *_: "/usr/bin/c++" if compiler else None)
    cfg = training(m, tmp_path, compile=True, max_steps=3)
    data = learnable(31, 64, 12)
    model = m.build_model(cfg)
    m.train(model, cfg, data, data, m.compute_loss)
    saved = contents(tmp_path / "run" / "ckpt.pt")["model"]
    assert saved.keys() == model.state_dict().keys() and bool(used) == compiler
    plain = m.build_model(cfg)
    m.train(plain, dataclasses.replace(cfg, compile=False), data, data, m.compute_loss)
    assert same(plain.state_dict(), model.state_dict())


def poisoned(m, at, value=math.nan):
    """A loss function whose `at`-th training call is not finite."""
    calls = []

    def loss_fn(model, batch, cfg):
        total, count, metrics = m.compute_loss(model, batch, cfg)
        if model.training:
            calls.append(1)
            if len(calls) == at:
                total = total * value
        return total, count, metrics

    return loss_fn


@pytest.mark.parametrize("at, value", [(13, math.nan), (15, math.inf), (11, math.nan), (20, math.nan)])
def test_a_loss_that_is_not_finite_stops_the_run(m, tmp_path, at, value):
    cfg, kept = training(m, tmp_path, max_steps=40, save_every=10, eval_every=7), []
    data = learnable(31, 64, 12)

    def remember(step):
        if step == 10:
            kept.append(files_of(cfg.out))

    with pytest.raises(SystemExit) as stop:
        m.train(m.build_model(cfg), cfg, data, data, poisoned(m, at, value), after_step=remember)
    text = str(stop.value.code)
    assert text.startswith("error: ") and re.search(rf"\bstep {at}\b", text) and len(text.splitlines()) == 1
    assert files_of(cfg.out) == kept[0]
    assert contents(Path(cfg.out) / "ckpt.pt")["step"] == 10


@pytest.mark.parametrize("end", ["finished", "not finite", "exception"])
def test_ctrl_c_belongs_to_the_caller_again(m, tmp_path, end):
    """In a notebook the process outlives the run, and a stop button that does nothing is a nuisance."""
    def die(step):
        raise Stop

    before = signal.getsignal(signal.SIGINT)
    cfg, data = training(m, tmp_path, max_steps=2), learnable(31, 64, 12)
    try:
        m.train(m.build_model(cfg), cfg, data, data, poisoned(m, 1) if end == "not finite" else m.compute_loss,
                after_step=die if end == "exception" else None)
    except (SystemExit, Stop):
        assert end != "finished"
    assert signal.getsignal(signal.SIGINT) is before


@posix_only
def test_ctrl_c_finishes_the_step_and_saves(m, tmp_path):
    """In this process: the signal at step 7 of 20, then the rest; equal to 20 steps without a break."""
    data, before = learnable(31, 64, 12), signal.getsignal(signal.SIGINT)

    def run(name, resume=False, after_step=None):
        cfg = training(m, tmp_path, name, dropout=0.1, resume=resume)
        m.train(m.build_model(cfg), cfg, data, data, m.compute_loss, after_step=after_step)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            run("broken", after_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 7 else None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert contents(tmp_path / "broken" / "ckpt.pt")["step"] in (7, 8)
    run("broken", resume=True)
    run("straight")
    a, b = (contents(tmp_path / name / "ckpt.pt") for name in ("broken", "straight"))
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])


def test_training_works_outside_the_main_thread(m, tmp_path):
    """Signals belong to the main thread; a notebook server may train in another one."""
    cfg, data, results = training(m, tmp_path, max_steps=3), learnable(31, 64, 12), []
    model = m.build_model(cfg)
    thread = threading.Thread(target=lambda: results.append(m.train(model, cfg, data, data, m.compute_loss)))
    thread.start()
    thread.join()
    assert results and results[0]["history"]


FLAGS = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4, max_steps=300, warmup_steps=10, dropout=0.1,
             eval_every=100, save_every=50, max_new_tokens=20, device="cpu")


def as_flags(**settings):
    """{"n_layer": 1, "resume": True} -> ["--n-layer", "1", "--resume"]"""
    flags = []
    for name, value in settings.items():
        flags += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return flags


@pytest.fixture(scope="module")
def finished_run(m, tmp_path_factory):
    """A short run of the real program in a process of its own. -> its folder, with text.txt and run/ in it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(toy_text(), encoding="utf-8")
    done = subprocess.run([sys.executable, "-I", m.__file__, *as_flags(data="text.txt", out="run", **FLAGS)],
                          cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the finished run that a test may spoil; the test stands beside it."""
    for path in [finished_run / "text.txt", *(finished_run / "run").iterdir()]:
        target = tmp_path / path.relative_to(finished_run)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "run"


def test_files_of_a_run(finished_run):
    run = finished_run / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"ckpt.pt", "metrics.jsonl", "summary.json", "curve.png", "sample.txt"}
    assert not [name for name in names if name.endswith(".tmp")]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "sample.txt").read_text(encoding="utf-8")) >= 20
    assert {path.name for path in finished_run.iterdir()} == {"run", "text.txt", "stdout.txt"}  # nothing outside --out


def test_summary(m, finished_run):
    summary = json.loads((finished_run / "run" / "summary.json").read_text())
    assert summary.keys() >= {"config", "params", "val_loss", "floor", "tokens_per_second", "seconds", "peak_memory_mb",
                              "data", "device", "torch", "figures", "results"}
    for name, value in FLAGS.items():
        assert summary["config"][name] == value
    text = toy_text()
    held_out = text[int(0.9 * len(text)):]
    assert summary["floor"] is None and summary["data"]["name"] == "text.txt"
    assert digest(text.encode()) in summary["data"].values()
    # Nats per character -> bits per byte; the text has characters of two bytes.
    expected = summary["val_loss"] / math.log(2) * len(held_out) / len(held_out.encode())
    assert summary["results"]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert len(held_out.encode()) > len(held_out)
    V, C, T = len(set(text)), 16, 8
    assert summary["params"] == V * C + T * C + 12 * C * C + 13 * C + 2 * C
    assert summary["val_loss"] < 0.9 * math.log(V)
    assert summary["torch"] == torch.__version__ and summary["device"] == "cpu" and summary["tokens_per_second"] > 0
    assert all((finished_run / "run" / name).is_file() for name in summary["figures"])


def test_output_tells_what_was_expected_and_reached(finished_run):
    out = (finished_run / "stdout.txt").read_text(encoding="utf-8")
    assert f"{math.log(len(set(toy_text()))):.2f}" in out  # ln V, what a uniform guess costs
    val_loss = json.loads((finished_run / "run" / "summary.json").read_text())["val_loss"]
    assert f"{val_loss:.2f}" in out


def test_the_checkpoint_opens_with_weights_only_and_plain_names(m, finished_run):
    state = contents(finished_run / "run" / "ckpt.pt")
    cfg = m.Config(**FLAGS, vocab_size=len(set(toy_text())))
    assert state["step"] == 300 and state["model"].keys() == m.GPT(cfg).state_dict().keys()


def test_main_from_a_notebook_equals_the_program(m, finished_run, text_file):
    model, cfg = m.main(m.Config(**FLAGS, data="text.txt", out="here"))
    assert cfg.vocab_size == len(set(toy_text())) and isinstance(model, m.GPT)
    assert same(contents("here/ckpt.pt")["model"], contents(finished_run / "run" / "ckpt.pt")["model"])


def test_numbers_end_to_end(m, tmp_path):
    """The toy language through main: exact match in the summary, a floor of 0, and a loss far below chance."""
    flags = as_flags(preset="numbers", n_layer=1, n_embd=32, batch_size=32, max_steps=60, warmup_steps=10, out="run",
                     device="cpu")
    model, cfg = m.main(m.parse_config(m.Config, m.PRESETS, flags))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["floor"] == 0 and 0 <= summary["results"]["exact_match"] <= 1
    assert summary["val_loss"] < 0.6 * math.log(len(m.TOY_VOCAB)) and summary["data"]["name"] == "numbers"
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("40215=")


@pytest.mark.slow
def test_numbers_preset_learns_the_language(m, tmp_path):
    flags = as_flags(preset="numbers", out="run", device="cpu")
    m.main(m.parse_config(m.Config, m.PRESETS, flags))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["results"]["exact_match"] > 0.9 and summary["val_loss"] < 0.05


@pytest.mark.parametrize("field", [{"lr": 0.001}, {"max_steps": 400}, {"n_layer": 2}, {"dropout": 0.2},
                                   {"batch_size": 8}, {"seed": 5}, {"data": "pydocs"}], ids=str)
def test_resume_refuses_a_changed_setting(m, capsys, copied_run, field):
    before = files_of(copied_run)
    name = next(iter(field)).replace("_", "[-_]")
    assert re.search(name, complaint(m, capsys, "--resume", *as_flags(**{**field, "out": "run"})))
    assert files_of(copied_run) == before


def test_resume_needs_no_flags(m, copied_run):
    """--resume takes all settings from the checkpoint; this run is already at its end."""
    before = contents(copied_run / "ckpt.pt")
    m.main(m.Config(out="run", resume=True))
    after = contents(copied_run / "ckpt.pt")
    assert after["step"] == 300 and same(before["model"], after["model"])
    summary = json.loads((copied_run / "summary.json").read_text())
    assert summary["config"]["n_embd"] == 16


@pytest.mark.parametrize("how", ["same characters", "another character"])
def test_resume_refuses_a_changed_text(m, capsys, copied_run, tmp_path, how):
    text, before = toy_text(), files_of(copied_run)
    changed = text[100:] + text[:100] if how == "same characters" else "Ω" + text
    (tmp_path / "text.txt").write_text(changed, encoding="utf-8")
    assert "text" in complaint(m, capsys, "--resume", "--out", "run")
    assert files_of(copied_run) == before


def test_resume_keeps_the_text_that_auto_found(m, tmp_path, data_dir, monkeypatch, offline):
    """Begun offline on the Python docs; Shakespeare turns up later; the run goes on with the docs."""
    flags = {**FLAGS, "max_steps": 2, "out": "run"}
    m.main(m.Config(**flags))
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    _, cfg = m.main(m.Config(out="run", resume=True))
    assert cfg.data == "pydocs"


def spoil(path, how, m):
    raw = path.read_bytes()
    if how == "truncated":
        path.write_bytes(raw[:len(raw) // 2])
    elif how == "cut short by one byte":
        path.write_bytes(raw[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit in a weight":
        weight = contents(path)["model"]["transformer.wte.weight"]
        where = raw.index(weight.numpy().tobytes()) + 37
        path.write_bytes(raw[:where] + bytes([raw[where] ^ 4]) + raw[where + 1:])
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "other tensors":
        torch.save({"a": torch.ones(3)}, path)
    elif how == "a list":
        torch.save([1, 2], path)
    elif how == "a whole module":  # a pickle that would run code: common on the web
        torch.save(nn.Linear(2, 3), path)
    elif how == "another script's":
        state = contents(path)
        torch.save({**state, "script": "llama3"}, path)
    elif how == "missing":
        path.unlink()


DAMAGE = ["truncated", "cut short by one byte", "empty", "one bit in a weight", "text", "other tensors", "a list",
          "a whole module", "another script's", "missing"]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("flags", [("--resume", "--out", "run"), ("--load", "run/ckpt.pt", "--prompt", "the")], ids=str)
def test_damaged_checkpoints_are_refused_by_name(m, capsys, copied_run, how, flags):
    spoil(copied_run / "ckpt.pt", how, m)
    before = files_of(copied_run)
    assert "ckpt.pt" in complaint(m, capsys, *flags)
    assert files_of(copied_run) == before


def test_a_flipped_byte_anywhere_is_refused_or_harmless(m, copied_run, tmp_path):
    """Many places in the file: the loaded weights are the true ones, or there are none."""
    path, rng, refused = copied_run / "ckpt.pt", random.Random(0), 0
    raw, truth = path.read_bytes(), m.read_checkpoint(path)
    for _ in range(60):
        where = rng.randrange(len(raw))
        path.write_bytes(raw[:where] + bytes([raw[where] ^ 1 << rng.randrange(8)]) + raw[where + 1:])
        try:
            assert same(m.read_checkpoint(path), truth), where
        except SystemExit as stop:
            assert str(stop.code).startswith("error: ") and len(str(stop.code).splitlines()) == 1
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("lr", [1e9, 1e30])
def test_a_run_that_explodes_leaves_the_earlier_files_alone(m, copied_run, tmp_path, capsys, lr):
    """No --resume, the same folder: the good run's files are replaced when the new ones exist, and they never do."""
    before = files_of(copied_run)
    # A second moment that forgets at once and no warm-up: nothing dampens the rate.
    cfg = m.Config(**{**FLAGS, "warmup_steps": 0, "save_every": 1000, "eval_every": 1000}, lr=lr, data="text.txt",
                   out="run", weight_decay=1.0)
    with pytest.raises(SystemExit) as stop:
        m.main(cfg)
    assert re.match(r"error: .*\bstep \d+", str(stop.value.code))
    assert files_of(copied_run) == before


def test_a_run_that_dies_before_its_first_save_leaves_the_earlier_files_alone(m, copied_run):
    def die(step):
        if step == 15:
            raise Stop

    before = files_of(copied_run)
    cfg = m.Config(**{**FLAGS, "eval_every": 10}, vocab_size=31, out="run")
    data = learnable(31, 64, 8)
    with pytest.raises(Stop):
        m.train(m.build_model(cfg), cfg, data, data, m.compute_loss, after_step=die)
    assert files_of(copied_run) == before


# --- 6. The program from outside -------------------------------------------------------------------------------------
BAD = {
    "heads": ("--n-head", "3"),
    "not a number": ("--lr", "nonsense"),
    "not an integer": ("--n-layer", "2.5"),
    "not a number at all": ("--lr", "nan"),
    "negative": ("--dropout", "-0.1"),
    "all dropped": ("--dropout", "1"),
    "zero layers": ("--n-layer", "0"),
    "no such flag": ("--nonsense",),
    "abbreviation": ("--n-lay", "2"),
    "value for a switch": ("--resume", "False"),
    "no such preset": ("--preset", "nonsense"),
    "no such device": ("--device", "nonsense"),
    "no such tokenizer": ("--tokenizer", "nonsense"),
    "top-p": ("--top-p", "0"),
    "temperature": ("--temperature", "-1"),
    "missing text": ("--data", "missing.txt"),
    "folder as text": ("--data", "."),
    "binary as text": ("--data", "binary.bin"),
    "empty text": ("--data", "empty.txt"),
    "short text": ("--data", "short.txt"),
    "missing model": ("--load", "missing", "--prompt", "x"),
    "missing run": ("--resume",),
    "vocabulary too small": ("--data", "text.txt", "--vocab-size", "3"),
    "prompt": ("--data", "text.txt", "--prompt", "Ω"),
    "short context for numbers": ("--data", "numbers", "--block-size", "8"),
    "prompt for numbers": ("--data", "numbers", "--prompt", "eleventy="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(m, capsys, text_file, tmp_path, name):
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc" * 50)
    complaint(m, capsys, *BAD[name], *(["--max-steps", "1"] if "--max-steps" not in BAD[name] else []))
    assert not (tmp_path / "runs").exists()


def test_bad_input_from_a_shell(m, text_file, tmp_path):
    """The same through a real process: exit status, one line on stderr, no traceback, nothing written."""
    chosen = ("no such flag", "missing text", "missing run")
    running = {name: subprocess.Popen([sys.executable, "-I", m.__file__, *BAD[name]], cwd=tmp_path, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in chosen}
    for name, process in running.items():
        _, err = process.communicate(timeout=120)
        assert process.returncode not in (0, None), name
        assert err.startswith("error: ") and len(err.splitlines()) == 1, (name, err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_one_line(m, capsys, text_file):
    assert "cuda" in complaint(m, capsys, "--device", "cuda", "--data", "text.txt")


def test_what_cannot_fit_is_refused_before_it_is_allocated(m, capsys, text_file):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (text_file.parent / "long.txt").write_text(toy_text(30_000), encoding="utf-8")
    text = complaint(m, capsys, "--preset", "gpt2-xl", "--batch-size", "512", "--tokenizer", "char", "--data",
                     "long.txt", "--device", "cpu")
    for part in ("GB", "weights", "gradients", "optimizer", "activations"):
        assert part in text
    # The weights alone would be 6 GB.
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1e9 if sys.platform == "darwin" else 1e6)
    assert grown < 2


def test_a_text_of_one_line_is_enough(m, tmp_path):
    """Nobody asked for a prompt, so none that the text does not know may get in the way."""
    (tmp_path / "line.txt").write_text(toy_text(3000).replace("\n", " "), encoding="utf-8")
    m.main(m.Config(**{**FLAGS, "max_steps": 2}, data="line.txt", out="run"))
    assert (tmp_path / "run" / "sample.txt").is_file()


def test_help_names_every_flag(m, capsys):
    with pytest.raises(SystemExit) as stop:
        m.parse_config(m.Config, m.PRESETS, ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code in (0, None)
    for field in dataclasses.fields(m.Config):
        assert "--" + field.name.replace("_", "-") in out


def test_command_line(m):
    def parse(*flags):
        return m.parse_config(m.Config, m.PRESETS, list(flags))

    assert parse() == m.Config()
    cfg = parse("--preset", "shakespeare", "--n-layer", "3", "--lr", "5e-4", "--compile")
    assert (cfg.n_layer, cfg.n_embd, cfg.lr, cfg.compile, cfg.data) == (3, 384, 5e-4, True, "shakespeare")
    assert parse("--n-layer", "5", "--preset", "gpt2").n_layer == 5  # explicit flags win, in any order
    assert parse("--no-compile").compile is False and parse("--resume").resume is True
    assert parse("--data", "my file.txt").data == "my file.txt"


@pytest.mark.parametrize("values", [
    {"n_embd": 30, "n_head": 4}, {"n_layer": 0}, {"lr": 0.0}, {"lr": math.nan}, {"dropout": 1.0}, {"top_p": 0.0},
    {"top_p": 1.5}, {"beams": 0}, {"grad_accum": 0}, {"repetition_penalty": 0.0}, {"warmup_steps": -1},
    {"beta2": 1.0}, {"min_lr_ratio": 2.0}, {"dtype": "float16"}, {"init_std": 0.0}, {"save_every": 0}], ids=str)
def test_impossible_settings_raise(m, values):
    with pytest.raises(ValueError):
        m.Config(**values)


def test_all_presets_are_possible(m):
    for name in ("laptop", "shakespeare", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        assert m.parse_config(m.Config, m.PRESETS, ["--preset", name])


def test_talking_to_a_run(m, finished_run, run_script, capsys):
    done = run_script(m.__file__, "--load", "run", "--prompt", "the cat", "--max-new-tokens", "30", cwd=finished_run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat") and len(done.stdout.strip()) > 20
    os.chdir(finished_run)
    spoken = set()
    for flags in (("--load", "run"), ("--load", "run/ckpt.pt"), ("--load", "run", "--temperature", "0"),
                  ("--load", "run", "--seed", "5")):
        capsys.readouterr()
        m.main(m.parse_config(m.Config, m.PRESETS, [*flags, "--prompt", "the cat", "--max-new-tokens", "30"]))
        spoken.add(capsys.readouterr().out)
    # The folder and the file in it say the same, which is what the other process said; the rest differ.
    assert done.stdout in spoken and len(spoken) == 3
    assert {path.name for path in finished_run.iterdir()} == {"run", "text.txt", "stdout.txt"}


def test_greedy_talk_and_beams_are_those_of_the_functions(m, copied_run, capsys):
    state = contents(copied_run / "ckpt.pt")
    chars = "".join(sorted(set(toy_text())))
    model = m.GPT(m.Config(**FLAGS, vocab_size=len(chars)))
    model.load_state_dict(state["model"])
    ids = torch.tensor([[chars.index(c) for c in "the"]])

    def say(*flags):
        capsys.readouterr()
        known = ["--load", "run", "--prompt", "the", "--max-new-tokens", "25"]
        m.main(m.parse_config(m.Config, m.PRESETS, [*known, *flags]))
        return capsys.readouterr().out.removesuffix("\n")

    def decoded(row):
        return "the" + "".join(chars[i] for i in row.tolist())

    assert say("--temperature", "0") == decoded(m.generate(model, ids, 25)[0])
    assert say("--beams", "3") == decoded(m.beam_search(model, ids, 25, num_beams=3)[0][0, 0])
    assert say("--temperature", "0", "--repetition-penalty", "2") == decoded(
        m.generate(model, ids, 25, repetition_penalty=2.0)[0])
    assert say("--top-k", "1") == say("--temperature", "0")


def test_an_unknown_character_in_the_prompt_is_one_line(m, copied_run, capsys):
    assert "Ω" in complaint(m, capsys, "--load", "run", "--prompt", "the Ω")


def test_training_goes_on_from_loaded_weights(m, copied_run, capsys):
    """--load without --prompt fine-tunes: a step 0 as good as the loaded model, into another folder."""
    before = files_of(copied_run)
    flags = as_flags(load="run", data="text.txt", out="tuned", max_steps=3, lr=1e-6, warmup_steps=0, batch_size=4)
    model, cfg = m.main(m.parse_config(m.Config, m.PRESETS, [*flags, "--device", "cpu", "--max-new-tokens", "5"]))
    assert cfg.n_embd == 16 and files_of(copied_run) == before
    tuned = json.loads(Path("tuned/summary.json").read_text())["val_loss"]
    assert tuned == pytest.approx(json.loads(before["summary.json"])["val_loss"], abs=0.02)


def test_save_pretrained_keeps_our_tokenizer(m, copied_run, capsys):
    pytest.importorskip("safetensors")
    capsys.readouterr()
    model, cfg = m.main(m.Config(load="run", prompt="the cat", temperature=0.0, max_new_tokens=20))
    first = capsys.readouterr().out
    tokenizer = m.make_tokenizer(contents("run/ckpt.pt")["extra"]["tokenizer"])
    m.save_pretrained(model, cfg, Path("published"), tokenizer)
    assert m.load_tokenizer(Path("published")).encode("the cat") == tokenizer.encode("the cat")
    m.main(m.Config(load="published", prompt="the cat", temperature=0.0, max_new_tokens=20))
    assert capsys.readouterr().out == first


@pytest.fixture
def small_gpt2(hf, tmp_path, tiktoken_cache):
    """A published-style folder with GPT-2's vocabulary."""
    model = published(hf, 0, n_embd=16, n_head=2, n_layer=1, vocab_size=50257, block_size=24)
    model.save_pretrained(tmp_path / "gpt2-tiny")
    return model


def test_talking_to_published_weights(m, small_gpt2, run_script, tmp_path, capsys):
    tiktoken = pytest.importorskip("tiktoken")
    done = run_script(m.__file__, "--load", "gpt2-tiny", "--prompt", "Hello world", "--max-new-tokens", "6",
                      "--temperature", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    encoding = tiktoken.get_encoding("gpt2")
    ids = torch.tensor([encoding.encode("Hello world")])
    expected = small_gpt2.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                                   pad_token_id=0, eos_token_id=50256)[0].tolist()
    text = encoding.decode(expected[:expected.index(50256)] if 50256 in expected else expected)
    assert done.stdout.replace("\ufffd", "").startswith("Hello world")
    assert done.stdout.strip() == text.strip() or "\ufffd" in text  # a text may end inside a character
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2-tiny"]


def test_fine_tuning_published_weights_can_be_talked_to(m, small_gpt2, text_file, capsys):
    """Published weights, two steps on our text, and the result is a run like any other."""
    flags = as_flags(load="gpt2-tiny", data="text.txt", out="tuned", max_steps=2, batch_size=2, device="cpu",
                     max_new_tokens=3, warmup_steps=1)
    _, cfg = m.main(m.parse_config(m.Config, m.PRESETS, flags))
    assert cfg.vocab_size == 50257 and cfg.block_size == 24
    capsys.readouterr()
    m.main(m.Config(load="tuned", prompt="Hello", max_new_tokens=3, device="cpu"))
    assert capsys.readouterr().out.startswith("Hello")
    m.main(m.Config(out="tuned", resume=True, device="cpu"))
    assert contents("tuned/ckpt.pt")["step"] == 2


def test_published_weights_with_another_vocabulary_are_one_line(m, hf, tmp_path, tiktoken_cache, capsys):
    """53 tokens and no tokenizer of ours beside them: these are not GPT-2's 50,257, so nobody can read a prompt."""
    published(hf, 1).save_pretrained(tmp_path / "other")
    complaint(m, capsys, "--load", "other", "--prompt", "Hello world")


def start(m, folder, **settings):
    """The real program in the background, on the text and settings of finished_run."""
    (folder / "text.txt").write_text(toy_text(), encoding="utf-8")
    flags = as_flags(**{**FLAGS, "data": "text.txt", "out": "run", **settings})
    return subprocess.Popen([sys.executable, "-I", m.__file__, *flags], cwd=folder, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(path, process, seconds=120):
    """Until the file is there (or newer than it was, for a path that existed)."""
    seen = path.stat().st_mtime_ns if path.exists() else 0
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns > seen:
            return
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1]
    pytest.fail(f"no {path.name} within {seconds} s")


def finish(m, run_script, folder, **settings):
    done = run_script(m.__file__, *as_flags(resume=True, out="run", **settings), cwd=folder)
    assert done.returncode == 0, done.stderr


@posix_only
def test_sigint_saves_and_resume_is_exact(m, finished_run, run_script, tmp_path):
    process = start(m, tmp_path, save_every=1)
    path = tmp_path / "run" / "ckpt.pt"
    wait_for(path, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    state = contents(path)
    assert 1 <= state["step"] < 300
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == state["step"]
    finish(m, run_script, tmp_path)
    straight, resumed = contents(finished_run / "run" / "ckpt.pt"), contents(path)
    assert resumed["step"] == 300 and same(straight["model"], resumed["model"])
    assert same(straight["optimizer"], resumed["optimizer"])


@posix_only
def test_sigkill_while_saving_and_resume_is_exact(m, finished_run, run_script, tmp_path):
    """kill -9 at random moments of a run that saves after every step; the file on disk is always a whole one."""
    rng, path, step = random.Random(time.time()), tmp_path / "run" / "ckpt.pt", 0
    for round_ in range(3):
        process = start(m, tmp_path, save_every=1, **({"resume": True} if round_ else {}))
        wait_for(path, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        state = contents(path)
        assert step < state["step"] <= 300  # the old one or a new one
        step = state["step"]
        left = {p.name for p in (tmp_path / "run").iterdir() if not p.name.endswith(".tmp")}
        assert left <= {"ckpt.pt", "metrics.jsonl"}
    finish(m, run_script, tmp_path, save_every=1000)
    straight, resumed = contents(finished_run / "run" / "ckpt.pt"), contents(path)
    assert resumed["step"] == 300 and same(straight["model"], resumed["model"])
    assert same(straight["optimizer"], resumed["optimizer"])


SAVER = """
import importlib.util, os, random, signal, sys, time, zipfile
import torch
spec = importlib.util.spec_from_file_location("decoder_only", sys.argv[1])
m = importlib.util.module_from_spec(spec)
sys.modules["decoder_only"] = m
spec.loader.exec_module(m)
torch.set_num_threads(1)
cfg = m.Config(n_layer=2, n_head=2, n_embd=128, vocab_size=300)
model = m.build_model(cfg)
optimizer = m.make_optimizer(model, cfg)
path = sys.argv[2]

def save(number):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(number)
    m.save_checkpoint(path, model, optimizer, number, cfg, {"number": number})

save(1)
rng, oldest, torn = random.Random(time.time()), 1, 0
for _ in range(30):
    child = os.fork()
    if child == 0:
        number = oldest
        while True:
            number += 1
            save(number)
    time.sleep(rng.uniform(0.01, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert zipfile.ZipFile(path).testzip() is None
    state = torch.load(path, weights_only=True)
    assert state["step"] == state["extra"]["number"] >= oldest
    assert all(bool((tensor == state["step"]).all()) for tensor in state["model"].values())
    oldest = state["step"]
print("saved", oldest)
"""


@posix_only
def test_sigkill_in_the_middle_of_writing(m, tmp_path):
    """A child that does nothing but save a 2 MB checkpoint, killed thirty times: never a torn or mixed file."""
    done = subprocess.run([sys.executable, "-I", "-c", SAVER, m.__file__, str(tmp_path / "ckpt.pt")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30  # there was a lot of saving to be killed in


@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun as used here need POSIX")
def test_two_ranks_equal_one_process(m, tmp_path):
    """Data-parallel training is the same training. Names of unequal length: the ranks count different tokens."""
    settings = dict(data="numbers", n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=6, grad_accum=2,
                    max_steps=5, warmup_steps=2, dtype="float64", device="cpu", eval_every=5, max_new_tokens=3, lr=0.01)
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
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    assert [(row["step"], row["tokens"]) for row in rows[0]] == [(row["step"], row["tokens"]) for row in rows[1]]


# --- 7. Memory estimate, task score ----------------------------------------------------------------------------------
def kept_for_backward(m, cfg):
    """Bytes that autograd really keeps: every storage once, the parameters themselves not counted."""
    model = m.build_model(cfg)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding the tensor keeps its address from being reused
        return tensor

    batch = rows_of(0, cfg.vocab_size, cfg.batch_size, cfg.block_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total, _, _ = m.compute_loss(model, batch, cfg)
    del total
    return sum(size for address, (size, _) in kept.items() if address not in parameters)


@pytest.mark.parametrize("changes", [{"n_layer": 4, "n_embd": 64, "vocab_size": 101},
                                     {"n_layer": 2, "n_embd": 96, "vocab_size": 65},
                                     {"n_layer": 6, "n_embd": 48, "vocab_size": 31}], ids=str)
def test_activation_estimate(m, changes):
    cfg = m.Config(n_head=4, block_size=32, batch_size=8, **changes)
    estimate = m.memory_gb(cfg, 1000)
    assert estimate["activations"] * 1e9 == pytest.approx(kept_for_backward(m, cfg), rel=0.25)


def test_activation_estimate_grows_with_the_vocabulary(m):
    """One to three rows of V numbers per token are alive at once: logits, log-probabilities, their gradient."""
    small_v, large_v = (m.memory_gb(m.Config(vocab_size=v, batch_size=3, block_size=50), 1) for v in (100, 1100))
    rows = (large_v["activations"] - small_v["activations"]) * 1e9 / (4 * 1000 * 3 * 50)
    assert 1 <= rows <= 3.001


def test_memory_of_weights_and_optimizer(m):
    """float32: 4 bytes a weight, as many for its gradient, twice as many for Adam's two moments."""
    estimate = m.memory_gb(m.Config(vocab_size=65), 10 ** 9)
    assert estimate["weights"] == pytest.approx(4) and estimate["gradients"] == pytest.approx(4)
    assert estimate["optimizer"] == pytest.approx(8)


def test_exact_match(m, monkeypatch):
    """A stub that knows the names of even numbers and forgets the last word of odd ones."""
    tokenizer, asked = m.ToyTokenizer(), []

    def answer(model, ids, max_new_tokens, *, mask=None, eos_ids=(), **_):
        rows = []
        for row, keep in zip(ids, mask, strict=True):
            n = int(tokenizer.decode(row[keep].tolist()).removesuffix("="))
            asked.append(n)
            words = words_of(n).split()
            text = " ".join(words if n % 2 == 0 else words[:-1]) + "\n"
            rows.append(tokenizer.encode(text))
        assert max(map(len, rows)) <= max_new_tokens and tuple(eos_ids) == tokenizer.eos_ids
        return padded([torch.tensor(row) for row in rows], "right")[0]

    monkeypatch.setattr(m, "generate", answer)
    numbers = [0, 2, 40_216, 777_778, 11, 13, 999_999, 8, 1200, 100_000]
    found = m.exact_match(nn.Linear(1, 1), tokenizer, numbers)
    assert found == pytest.approx(0.7) and sorted(asked) == sorted(numbers)


def test_exact_match_of_real_models(m):
    """A model without training knows nothing; the score is a number between 0 and 1."""
    cfg = m.Config(n_layer=1, n_head=2, n_embd=16, block_size=18, vocab_size=len(m.TOY_VOCAB))
    assert m.exact_match(m.build_model(cfg), m.ToyTokenizer(), list(range(1, 30))) < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_gelu_by_hand_equals_torch(m, seed):
    """The derivative too: against autograd through F.gelu in float64, at both tails and around 0."""
    g = torch.Generator().manual_seed(seed)
    tails = torch.tensor([[-40.0, -8, -1e-3, 0, 1e-3, 8, 40] + [0.5] * 43])
    x = torch.cat((torch.randn(3, 50, generator=g) * 3, tails))
    up = torch.randn(x.shape, generator=g)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, z = m.FastGELU.apply(mine), F.gelu(theirs, approximate="tanh")
    y.backward(up)
    z.backward(up.double())
    assert y.isfinite().all() and mine.grad.isfinite().all()
    assert torch.allclose(y.double(), z, atol=1e-5, rtol=1e-5)
    assert torch.allclose(mine.grad.double(), theirs.grad, atol=2e-5, rtol=1e-5)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub in small: "tiny" is "org/tiny" now; weights lie in a storage, announced with their SHA-256."""

    files, asked, lie = {}, [], False

    def do_GET(self):
        self.asked.append((self.command, self.path))
        name = self.path.rsplit("/", 1)[-1]
        if self.path.startswith("/tiny/"):
            return self.go(307, "/org" + self.path)  # relative, and without a hash
        if self.path.startswith("/org/tiny/") and name == "model.safetensors":
            digest = hashlib.sha256(self.files[name]).hexdigest()
            return self.go(302, f"http://{self.headers['Host']}/storage/{name}", "0" * 64 if self.lie else digest)
        if name not in self.files or not self.path.startswith(("/org/tiny/", "/storage/")):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.files[name])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.files[name])

    do_HEAD = do_GET

    def go(self, status, place, digest=None):
        self.send_response(status)
        self.send_header("Location", place)
        if digest:
            self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(m, hf, tmp_path, monkeypatch):
    """-> (handler class, their model). The working directory is empty and $HF_ENDPOINT names the hub."""
    pytest.importorskip("requests")
    theirs = published(hf, 1)
    theirs.save_pretrained(tmp_path / "source")
    handler = type("Handler", (Hub,), {"asked": [], "files": {
        name: (tmp_path / "source" / name).read_bytes() for name in ("config.json", "model.safetensors")}})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("LLM_DATA", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        yield handler, theirs
        running.shutdown()


@pytest.mark.parametrize("repo", ["tiny", "org/tiny"])
def test_a_repository_is_fetched_once_and_agrees(m, hub, repo):
    """Through both redirects; the second time nobody is asked, so it works without a network."""
    handler, theirs = hub
    model, cfg = m.from_pretrained(repo)
    ids = torch.randint(cfg.vocab_size, (2, 5))
    assert torch.allclose(model(ids), hf_logits(theirs, ids), atol=1e-4)
    before = len(handler.asked)
    m.from_pretrained(repo)
    assert before and len(handler.asked) == before


@pytest.mark.parametrize("repo", ["tiny", "org/tiny"])
def test_weights_that_differ_from_the_announced_hash_are_refused(m, hub, repo):
    """The hash comes with the last redirect but one: a renamed repository must not lose it."""
    handler, _ = hub
    handler.lie = True
    with pytest.raises(OSError, match="SHA-256"):
        m.from_pretrained(repo)
    assert not list(Path("data").rglob("model.safetensors"))


def test_a_repository_that_does_not_exist_is_one_line(m, hub, capsys):
    assert "org/none" in complaint(m, capsys, "--load", "org/none", "--prompt", "x")
