"""llama3.py against transformers, PyTorch, jinja and its own definitions."""

import base64
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()


def config(m, seed=0, **changes):
    """Sizes that are pairwise different, weights wide enough that no two tokens are nearly as likely."""
    sizes = dict(vocab_size=97, block_size=64, n_layer=3, n_head=6, n_kv_head=2, n_embd=48, head_size=10, ffn_size=70,
                 init_std=0.2, rope_theta=10_000.0, device="cpu", seed=seed)
    return m.Config(**{**sizes, **changes})


def reference(m, model, tmp_path):
    """The same weights in transformers, through save_pretrained."""
    m.save_pretrained(model, model.cfg, tmp_path)
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()


SHAPES = [dict(), dict(n_kv_head=6), dict(n_kv_head=1, tie_weights=True), dict(n_head=4, n_kv_head=2, head_size=12),
          dict(rope_factor=8.0, rope_original=32, rope_theta=500_000.0, norm_eps=1e-6),
          dict(rope_factor=32.0, rope_original=16, rope_theta=500.0, tie_weights=True)]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_equal_transformers(m, tmp_path, changes):
    model = m.build_model(config(m, **changes)).eval()
    theirs = reference(m, model, tmp_path / "ours")
    ids = torch.randint(97, (5, 40))
    mask = torch.ones(5, 40, dtype=torch.bool)
    mask[0, :7], mask[1, 33:] = False, False
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
        torch.testing.assert_close(model(ids, mask)[mask], expected[mask], atol=1e-4, rtol=0)
    # and from there to here
    theirs.save_pretrained(tmp_path / "theirs")
    again, cfg = m.from_pretrained(tmp_path / "theirs")
    assert (cfg.n_kv_head, cfg.rope_factor, cfg.tie_weights) == (model.cfg.n_kv_head, model.cfg.rope_factor,
                                                                 model.cfg.tie_weights)
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rope_beyond_8192(m, tmp_path, factor):
    """The published numbers (theta 500,000, 8,192 tokens, D = 64), read 8,400 tokens far."""
    model = m.build_model(config(m, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, head_size=64, block_size=8400,
                                 rope_factor=factor, rope_original=8192, rope_theta=500_000.0)).eval()
    theirs = reference(m, model, tmp_path)
    ids = torch.randint(97, (1, 8400))
    with torch.no_grad():
        ours, expected = model(ids)[:, -200:], theirs(ids).logits[:, -200:]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    unscaled = m.build_model(config(m, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, head_size=64, block_size=8400,
                                    rope_theta=500_000.0)).eval()
    unscaled.load_state_dict(model.state_dict())
    with torch.no_grad():  # a test that cannot fail is none: without the stretching the logits differ
        assert (unscaled(ids)[:, -200:] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_greedy_and_beams_equal_generate(m, tmp_path, seed):
    changes = [dict(), dict(n_kv_head=6), dict(n_kv_head=1, tie_weights=True), dict(rope_factor=8.0, rope_original=16)]
    model = m.build_model(config(m, seed, block_size=128, **changes[seed])).double().eval()
    theirs = reference(m, model.float(), tmp_path).double()
    model.double()
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(seed))
    common = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    expected = theirs.generate(ids, max_new_tokens=64, eos_token_id=[1, 2], **common)[:, 9:]
    found = m.generate(model, ids, 64, eos_ids=(1, 2))
    assert torch.equal(found, expected)
    for beams, penalty in ((4, 1.0), (3, 2.0), (2, 0.6)):
        out = theirs.generate(ids, max_new_tokens=16, num_beams=beams, length_penalty=penalty, eos_token_id=[1, 2],
                              num_return_sequences=2, return_dict_in_generate=True, output_scores=True, **common)
        found, scores = m.beam_search(model, ids, 16, num_beams=beams, length_penalty=penalty, eos_ids=(1, 2), n_best=2,
                                      pad_id=1)  # transformers fills beams up with the first EOS
        assert torch.equal(found.flatten(0, 1), out.sequences[:, 9:])
        # transformers keeps its running scores in float32
        torch.testing.assert_close(scores.flatten().float(), out.sequences_scores.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", SHAPES[:3], ids=str)
def test_cached_equals_uncached(m, changes):
    model = m.build_model(config(m, **changes)).eval()
    ids = torch.randint(97, (2, 11))
    out = m.generate(model, ids, 30)
    text = ids
    with torch.no_grad():
        for _ in range(30):
            text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, text[:, 11:])


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_one_step_equals_the_modules(m, rows, padded):
    """decode_step is Llama.forward for one token, written out: few rows, many rows, with and without padding."""
    model = m.build_model(config(m)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    ids, mask = torch.randint(97, (rows, 9)), torch.ones(rows, 9, dtype=torch.bool)
    if padded:
        mask[0, :4] = False
    _, cache = m.prefill(model, ids, mask, 12)
    other = m.reorder(cache, torch.arange(rows))
    token = torch.randint(97, (rows,))
    logits, cache = m.decode_step(model, token, cache)
    with torch.no_grad():
        expected = model(token[:, None], cache=other)[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.keys, other.keys, atol=1e-5, rtol=1e-5)
    assert cache.length == other.length == 10


@pytest.mark.parametrize("padded", [True, False])
def test_chunked_prefill(m, padded):
    model = m.build_model(config(m)).eval()
    ids, mask = torch.randint(97, (3, 20)), torch.ones(3, 20, dtype=torch.bool)
    if padded:
        mask[0, :5], mask[1, :13] = False, False
    cache = m.KVCache(model.cfg, 3, 20, model.lm_head.weight)
    with torch.no_grad():
        whole = model(ids, mask)
        pieces = torch.cat([model(ids[:, a:b], mask[:, a:b] if padded else None, cache)
                            for a, b in ((0, 4), (4, 5), (5, 20))], 1)
    torch.testing.assert_close(pieces[mask], whole[mask], atol=1e-5, rtol=0)
    assert pieces.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_length_in_one_batch(m, side):
    model = m.build_model(config(m)).eval()
    prompts = [torch.randint(97, (n,)) for n in (3, 11, 7)]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        at = slice(11 - len(prompt), 11) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = prompt, True
    together = m.generate(model, ids, 20, mask=mask)
    beams, scores = m.beam_search(model, ids, 12, mask=mask, num_beams=3)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], m.generate(model, prompt[None], 20)[0])
        alone, score = m.beam_search(model, prompt[None], 12, num_beams=3)
        assert torch.equal(beams[row], alone[0])
        torch.testing.assert_close(scores[row], score[0], atol=1e-4, rtol=0)


def test_a_full_context_forgets_its_older_half(m):
    """With one layer a key depends on its own token alone: logits are then those of the rest read afresh."""
    model = m.build_model(config(m, n_layer=1, block_size=16)).double().eval()
    for masked in (False, True):
        ids = torch.randint(97, (2, 16))
        mask = torch.ones(2, 16, dtype=torch.bool)
        if masked:
            mask[0, :10] = False
        with torch.no_grad():
            logits, cache = m.prefill(model, ids, mask if masked else None, 40)
            text = ids
            for _ in range(20):
                token = logits.argmax(-1)
                text = torch.cat((text, token[:, None]), 1)
                mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.bool)), 1)
                logits, cache = m.decode_step(model, token, cache)
                seen = cache.length
                expected = model(text[:, -seen:], mask[:, -seen:])[:, -1]
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)  # angles are float32
    assert m.generate(model, ids, 100).shape == (2, 100)


# ------------------------------------------------------------------------------------------------------------ parts


def test_rope_depends_on_distance_alone(m):
    cfg = config(m, head_size=16)
    speed = m.rope_frequencies(cfg)
    q, k = torch.randn(2, 1, 1, 1, 16).double()
    def score(i, j):
        turned = [m.apply_rope(x, *m.rope_angles(torch.tensor([p]), speed)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()
    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    turned = m.apply_rope(q, *m.rope_angles(torch.tensor([5]), speed))
    assert turned.norm().item() == pytest.approx(q.norm().item()) and not torch.allclose(turned, q)
    # the definition with complex numbers: plane i is x[i] + 1j x[i + D/2], turned by e^(1j * angle)
    plane = torch.complex(q[..., :8], q[..., 8:]) * torch.polar(torch.ones(8).double(), 5 * speed.double())
    torch.testing.assert_close(turned, torch.cat((plane.real, plane.imag), -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor, theta, D", [(8.0, 500_000.0, 128), (32.0, 500_000.0, 64), (8.0, 10_000.0, 10)])
def test_stretched_frequencies_equal_transformers(m, factor, theta, D):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    cfg = config(m, head_size=D, rope_factor=factor, rope_theta=theta, rope_original=8192)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**{
        key: value for key, value in m.config_to_hf(cfg).items() if key != "architectures"}), device="cpu")
    torch.testing.assert_close(m.rope_frequencies(cfg), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("H, K", [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_query_head_h_reads_key_head_h_over_group(m, H, K):
    cfg = config(m, n_head=H, n_kv_head=K)
    part, x = m.GroupedQueryAttention(cfg), torch.randn(2, 7, 48)
    rope = m.rope_angles(torch.arange(7), m.rope_frequencies(cfg))
    q, k, v = (f(x).view(2, 7, -1, 10).transpose(1, 2) for f in (part.q_proj, part.k_proj, part.v_proj))
    q, k = m.apply_rope(q, *rope), m.apply_rope(k, *rope)
    k, v = (y.repeat_interleave(H // K, 1) for y in (k, v))
    scores = (q @ k.transpose(-2, -1) / math.sqrt(10)).masked_fill(~m.causal_mask(7, 7), -math.inf)
    expected = part.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(part(x, rope), expected, atol=1e-5, rtol=0)


def test_rms_norm(m):
    x, norm = torch.randn(3, 5, 48) * 3, m.RMSNorm(48, 1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(48, 1e-5).bfloat16()
    theirs.weight.data.copy_(norm.weight)
    norm.bfloat16()
    assert torch.equal(norm(x.bfloat16()), theirs(x.bfloat16()))  # float32 inside, rounded before the weight


def test_swiglu(m):
    part, x = m.SwiGLU(config(m)), torch.randn(2, 3, 48)
    gate, up, down = (w.weight for w in (part.gate_proj, part.up_proj, part.down_proj))
    torch.testing.assert_close(part(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_causality(m):
    model = m.build_model(config(m)).eval()
    ids = torch.randint(97, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 97
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :12], b[:, :12]) and all((a[:, t] - b[:, t]).abs().max() > 1e-6 for t in range(12, 20))


def test_parameter_count(m):
    for changes in SHAPES:
        cfg = config(m, **changes)
        model = m.build_model(cfg)
        V, C, L, H, K, D, width = (getattr(cfg, name) for name in
                                   "vocab_size n_embd n_layer n_head n_kv_head head_size ffn_size".split())
        expected = V * C * (1 if cfg.tie_weights else 2) + L * (2*C*H*D + 2*C*K*D + 3*C*width + 2*C) + C
        assert sum(p.numel() for p in model.parameters()) == expected
    assert sum(p.numel() for p in m.build_model(m.Config(vocab_size=65)).parameters()) == 804_224
    with torch.device("meta"):
        for preset, billions in (("llama3-8b", 8.03), ("llama3.1-8b", 8.03), ("llama3.2-1b", 1.236),
                                 ("llama3.2-3b", 3.213), ("llama3-70b", 70.55)):
            model = m.build_model(m.Config(**m.PRESETS[preset]))
            assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


def test_frequencies_survive_a_cast(m):
    model = m.build_model(config(m)).bfloat16()
    assert model.rope_speed.dtype == torch.float32
    assert model(torch.randint(97, (1, 5))).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------- weights in and out


def to_meta(m, model):
    """Our weights in Meta's names and order: plane i is rows 2i and 2i + 1 of a head."""
    names = {value: key for key, value in m.META.items()}
    out = {}
    for name, tensor in model.state_dict().items():
        part = name.removeprefix("model.").removesuffix(".weight")
        if part.startswith("layers."):
            _, layer, rest = part.split(".", 2)
            new = f"layers.{layer}.{names[rest]}.weight"
            if rest.endswith(("q_proj", "k_proj")):
                D, rows = model.cfg.head_size, []
                for head in tensor.split(D):
                    for i in range(D // 2):
                        rows += [head[i], head[i + D // 2]]
                tensor = torch.stack(rows)
        else:
            new = names[name.removesuffix(".weight")] + ".weight"
        out[new] = tensor.clone()
    return out


@pytest.mark.parametrize("scaled", [False, True])
def test_meta_layout(m, tmp_path, scaled):
    # Meta's files of tied models hold the head all the same: it is recognised by its numbers.
    extra = dict(rope_factor=8.0, rope_theta=500_000.0, tie_weights=True) if scaled else {}
    model = m.build_model(config(m, head_size=8, **extra)).eval()
    tensors = to_meta(m, model) | {"rope.freqs": torch.ones(4)}
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(dict(
        dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=97, multiple_of=1, norm_eps=1e-5,
        rope_theta=model.cfg.rope_theta, use_scaled_rope=scaled)))
    loaded, cfg = m.from_pretrained(tmp_path)
    assert cfg.tie_weights == scaled == (loaded.lm_head.weight is loaded.model.embed_tokens.weight)
    assert cfg.ffn_size == 70 and cfg.block_size == (131072 if scaled else 8192)
    ids = torch.randint(97, (2, 30))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    # Meta's own arithmetic: neighbours are a complex number
    wq, x = tensors["layers.0.attention.wq.weight"], torch.randn(9, 48)
    speed = m.rope_frequencies(cfg)
    q = (x @ wq.T).view(9, 6, 4, 2)
    turn = torch.polar(torch.ones(9, 4), torch.arange(9.0)[:, None] * speed)[:, None]
    theirs = torch.view_as_real(torch.view_as_complex(q) * turn)                            # (9, 6, 4, 2)
    ours = (x @ m.half_split(wq, 6).T).view(1, 9, 6, 8).transpose(1, 2)
    ours = m.apply_rope(ours, *m.rope_angles(torch.arange(9), speed))[0].transpose(0, 1)    # (9, 6, 8)
    torch.testing.assert_close(torch.stack(ours.chunk(2, -1), -1), theirs, atol=1e-5, rtol=0)


def test_shards_stay_in_their_dtype(m, tmp_path):
    model = m.build_model(config(m)).bfloat16()
    theirs = reference(m, model, tmp_path / "one").bfloat16()
    theirs.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    loaded, _ = m.from_pretrained(tmp_path / "many")
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("harm, word", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "no tensor model.layers.1.mlp.up_proj.weight"),
    (lambda t: t.update(extra=torch.ones(1)), "no tensor extra"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.contiguous()}),
     "transposed")])
def test_wrong_tensors_are_named(m, tmp_path, harm, word):
    from safetensors.torch import load_file, save_file
    model = m.build_model(config(m))
    m.save_pretrained(model, model.cfg, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    harm(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=word):
        m.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, word", [
    (dict(model_type="mistral"), "model_type"), (dict(attention_bias=True), "attention_bias"),
    (dict(hidden_act="gelu"), "hidden_act"), (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "yarn"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 2}), "low_freq")])
def test_other_architectures_are_refused(m, change, word):
    with pytest.raises(ValueError, match=word):
        m.config_from_hf(m.config_to_hf(config(m)) | change)


def test_older_config_files(m):
    """rope_theta and rope_scaling beside each other, no head_dim: how Llama 3.1's files were first published."""
    hf = {key: value for key, value in m.config_to_hf(config(m)).items() if key not in ("rope_parameters", "head_dim")}
    cfg = m.config_from_hf(hf | dict(rope_theta=500_000.0, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)))
    assert (cfg.rope_theta, cfg.rope_factor, cfg.rope_original) == (500_000.0, 8.0, 8192)


def test_a_repository_of_shards_is_fetched_once(m, monkeypatch, tmp_path):
    """A small hub: two shards behind an index, Meta's tokenizer; then the same again without any network."""
    import requests
    model = m.build_model(config(m))
    reference(m, model, tmp_path / "one").save_pretrained(tmp_path / "hub", max_shard_size="60KB")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_DATA", raising=False)
    asked = []

    def answer(url, **kw):
        name = url.split("/resolve/main/")[1]
        asked.append((name, kw.get("headers", {}).get("Authorization")))
        found = requests.Response()
        path = tmp_path / "hub" / name
        found.status_code = 200 if path.is_file() else 404
        found.raw = open(path, "rb") if path.is_file() else None
        found.url = url
        return found
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(requests, "head", answer)
    monkeypatch.setattr(requests, "get", lambda url, **kw: answer(url, **kw))
    loaded, _ = m.from_pretrained("someone/llama")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert all(token == "Bearer hf_secret" for _, token in asked)
    asked.clear()
    again, _ = m.from_pretrained("someone/llama")
    # Only what the repository does not have is asked for again.
    assert {name for name, _ in asked} <= {"original/tokenizer.model"}
    index = tmp_path / "data" / "someone--llama" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../evil.safetensors"}}))
    with pytest.raises(ValueError, match="evil"):
        m.from_pretrained("someone/llama")


def test_gated_repository_is_explained(m, monkeypatch, tmp_path):
    import requests
    answer = requests.Response()
    answer.status_code = 401
    sent = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(requests, "head", lambda url, **kw: sent.append(kw["headers"]) or answer)
    with pytest.raises(OSError, match="HF_TOKEN"):
        m.from_pretrained("meta-llama/Llama-3.2-1B")
    assert sent[0]["Authorization"] == "Bearer hf_secret"


# ---------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A small tokenizer.model: the 256 bytes and some merges."""
    pieces = [bytes([i]) for i in range(256)]
    for piece in ("he", "ll", "hell", "hello", " w", "or", " wor", "ld", " world", "er", "us", "user", "\n\n", "12",
                  "123"):
        pieces.append(piece.encode())
    path = tmp_path_factory.mktemp("tok") / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)))
    return path


# Llama 3's and (for conversations without tools) 3.1's chat_template from tokenizer_config.json of the hub.
LLAMA_3 = ("{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
           "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
           "{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}"
           "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
LLAMA_31 = ("{{- '<|begin_of_text|>' }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = "
            "messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}"
            "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
            "{{- 'Cutting Knowledge Date: December 2023\n' }}{{- 'Today Date: ' + date_string + '\n\n' }}"
            "{{- system_message }}{{- '<|eot_id|>' }}{%- for message in messages %}{{- '<|start_header_id|>' + "
            "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
            "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
CHATS = [[("user", "hello world")],
         [("system", " be short\n"), ("user", "hello 123"), ("assistant", "hi"), ("user", "\n a ")],
         [("user", "<|eot_id|> typed"), ("assistant", ""), ("user", "x")]]


@pytest.mark.parametrize("damage", [
    lambda lines: [*lines, "aGVsbG9oZWxsbw== 5"], lambda lines: lines[1:], lambda lines: [*lines[:-2], lines[-1]],
    lambda lines: ["hello world"]], ids=["twice", "no byte 0", "a gap", "no list"])
def test_a_wrong_tokenizer_file_is_one_line(m, model_file, tmp_path, damage):
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(damage(model_file.read_text().splitlines())) + "\n")
    with pytest.raises(SystemExit, match="error: "):
        m.make_tokenizer({"kind": str(path)})


@pytest.mark.parametrize("chat", CHATS, ids=range(3))
@pytest.mark.parametrize("date, template", [("", LLAMA_3), ("26 Jul 2024", LLAMA_31)], ids=["3", "3.1"])
def test_chat_ids_render_the_published_template(m, model_file, chat, date, template):
    import jinja2
    tokenizer = m.make_tokenizer({"kind": str(model_file)})
    messages = [dict(role=role, content=content) for role, content in chat]
    text = jinja2.Template(template).render(messages=messages, date_string=date)
    ids = tokenizer.chat_ids(messages, date)
    assert tokenizer.decode(ids) == text
    if "<|eot_id|> typed" not in text:  # typed by a user it is text for us; the template cannot tell the two apart
        assert ids == tokenizer.encoding.encode(text, allowed_special="all")
    else:
        assert ids.count(tokenizer.special["<|eot_id|>"]) == 3 + bool(date)


def test_special_tokens_have_their_published_numbers(m, model_file):
    tokenizer = m.make_tokenizer({"kind": str(model_file)})
    base = 271
    for name, at in dict(begin_of_text=0, end_of_text=1, finetune_right_pad_id=4, start_header_id=6, end_header_id=7,
                         eom_id=8, eot_id=9, python_tag=10, reserved_special_token_245=255).items():
        assert tokenizer.special[f"<|{name}|>"] == base + at
    assert tokenizer.n_vocab == base + 256 == len(tokenizer.special) + base
    assert tokenizer.eos_ids == (base + 1, base + 8, base + 9)
    again = m.make_tokenizer(json.loads(json.dumps(tokenizer.spec)))
    for text in ("hello world 12345", "a\n\n  b", "naïve 東京", "<|eot_id|>"):
        assert again.encode(text) == tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 2  # digits in groups of three
    with pytest.raises(ValueError):
        tokenizer.chat_ids([])


def test_chat_in_the_terminal(m, model_file, tmp_path):
    tokenizer = m.make_tokenizer({"kind": str(model_file)})
    model = m.build_model(config(m, vocab_size=tokenizer.n_vocab, block_size=256))
    m.save_pretrained(model, model.cfg, tmp_path, tokenizer)
    done = subprocess.run([sys.executable, m.__file__, "--load", str(tmp_path), "--chat", "--max-new-tokens", "5"],
                          input="hello\nworld\n", capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 3
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[1, 2")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    (tmp_path / "meta" / "consolidated.00.pth").write_bytes(b"half a file")
    for args, word in ((["--chat"], "--load"), (["--load", "nowhere", "--chat"], "nowhere"),
                       (["--load", str(tmp_path), "--chat", "--beams", "2"], "--beams"),
                       (["--load", str(tmp_path), "--chat", "--resume"], "ckpt.pt"),
                       (["--load", str(tmp_path / "broken"), "--prompt", "a"], "broken"),
                       (["--load", str(tmp_path / "meta"), "--prompt", "a"], "meta")):
        done = subprocess.run([sys.executable, m.__file__, *args], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and word in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------ config and runs


def test_a_shorter_context_fits_published_weights(m, tmp_path):
    model = m.build_model(config(m, vocab_size=len(m.TOY_VOCAB)))
    m.save_pretrained(model, model.cfg, tmp_path, m.ToyTokenizer())
    cfg = m.parse_config(m.Config, m.PRESETS, ["--load", str(tmp_path), "--block-size", "16"])
    assert m.load_any(cfg)[0].cfg.block_size == 16
    cfg = m.parse_config(m.Config, m.PRESETS, ["--load", str(tmp_path)])
    assert m.load_any(cfg)[0].cfg.block_size == 64


@pytest.mark.parametrize("changes", [
    dict(n_kv_head=4), dict(n_embd=50), dict(head_size=7), dict(rope_factor=0.5), dict(rope_theta=0.0),
    dict(norm_eps=math.nan), dict(tokenizer="words"), dict(ffn_size=0), dict(n_kv_head=0)])
def test_impossible_values(m, changes):
    with pytest.raises(ValueError):
        m.Config(**{**dict(n_head=6, n_embd=48, n_kv_head=2), **changes})


def test_numbers_are_learned(m, tmp_path, capsys):
    model, cfg = m.main(m.Config(**{**m.PRESETS["numbers"], "max_steps": 60, "eval_every": 60, "device": "cpu",
                                    "out": str(tmp_path)}))
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert {"exact_match"} == set(json.loads((tmp_path / "summary.json").read_text())["results"])
    out = m.Config(**{**vars(cfg), "load": str(tmp_path), "prompt": "17=", "max_new_tokens": 5})
    capsys.readouterr()
    m.main(out)
    assert capsys.readouterr().out.startswith("17=")


def test_resume_is_bit_for_bit(m, tmp_path):
    small = {**m.PRESETS["numbers"], "batch_size": 8, "eval_every": 1000, "save_every": 3, "device": "cpu",
             "max_steps": 6}
    whole, _ = m.main(m.Config(**small, out=str(tmp_path / "whole")))

    class Stop(Exception):
        pass
    saved = m.save_checkpoint
    def stop_behind_the_first(*args):
        saved(*args)
        raise Stop
    m.save_checkpoint = stop_behind_the_first
    try:
        with pytest.raises(Stop):
            m.main(m.Config(**small, out=str(tmp_path / "cut")))
    finally:
        m.save_checkpoint = saved
    resumed, _ = m.main(m.Config(**small, out=str(tmp_path / "cut"), resume=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
