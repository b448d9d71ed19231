"""qwen3_moe.py against transformers, PyTorch, jinja and its own slow form."""

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
    sizes = dict(vocab_size=97, block_size=64, n_layer=4, n_head=6, n_kv_head=2, n_embd=48, head_size=10, ffn_size=72,
                 n_experts=5, experts_per_token=3, expert_size=16, init_std=0.2, device="cpu", seed=seed)
    return m.Config(**{**sizes, **changes})


def reference(m, model, tmp_path):
    m.save_pretrained(model, model.cfg, tmp_path)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()


SHAPES = [dict(), dict(n_experts=0), dict(n_experts=0, n_kv_head=6, tie_weights=True), dict(norm_topk_prob=False),
          dict(sparse_step=2, n_kv_head=1), dict(mlp_only_layers="0,2", tie_weights=True),
          dict(n_experts=16, experts_per_token=1, rope_theta=1e6), dict(experts_per_token=5)]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_and_balancing_loss_equal_transformers(m, tmp_path, changes):
    model = m.build_model(config(m, **changes)).eval()
    for parameter in model.parameters():  # the norms' gains too: at 1 they hide where they stand
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    theirs = reference(m, model, tmp_path / "ours")
    assert type(theirs).__name__ == ("Qwen3MoeForCausalLM" if model.cfg.n_experts else "Qwen3ForCausalLM")
    ids, mask = torch.randint(97, (5, 40)), torch.ones(5, 40, dtype=torch.bool)
    mask[0, :7], mask[1, 33:] = False, False
    routers = {"output_router_logits": True} if model.cfg.n_experts else {}
    with torch.no_grad():
        expected = theirs(ids, **routers)
        torch.testing.assert_close(model(ids), expected.logits, atol=1e-4, rtol=0)
        if routers:
            ours = m.load_balancing_loss([layer.logits for layer in model.mixtures()], model.cfg.experts_per_token)
            assert ours.item() == pytest.approx(expected.aux_loss.item(), abs=1e-6)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(ids, attention_mask=mask.long(), position_ids=positions, **routers)
        torch.testing.assert_close(model(ids, mask)[mask], expected.logits[mask], atol=1e-4, rtol=0)
        if routers:
            # On the same router logits, so that what pads see (nobody says) makes no difference.
            ours = m.load_balancing_loss(list(expected.router_logits), model.cfg.experts_per_token, mask)
            assert ours.item() == pytest.approx(expected.aux_loss.item(), abs=1e-6)
            unmasked = m.load_balancing_loss(list(expected.router_logits), model.cfg.experts_per_token)
            assert model.cfg.experts_per_token == 5 or abs(unmasked - ours) > 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    again, cfg = m.from_pretrained(tmp_path / "theirs")
    for name in ("n_experts", "sparse_step", "mlp_only_layers", "tie_weights"):
        assert getattr(cfg, name) == getattr(model.cfg, name)
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("seed, changes", list(enumerate(SHAPES[:5])), ids=str)
def test_greedy_and_beams_equal_generate(m, tmp_path, seed, changes):
    model = m.build_model(config(m, seed, block_size=128, **changes)).eval()
    theirs = reference(m, model, tmp_path)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(seed))
    common = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    expected = theirs.generate(ids, max_new_tokens=64, eos_token_id=[1, 2], **common)[:, 9:]
    assert torch.equal(m.generate(model, ids, 64, eos_ids=(1, 2)), expected)
    out = theirs.generate(ids, max_new_tokens=12, num_beams=4, eos_token_id=[1, 2], return_dict_in_generate=True,
                          output_scores=True, **common)
    found, scores = m.beam_search(model, ids, 12, num_beams=4, eos_ids=(1, 2), pad_id=1)
    assert torch.equal(found[:, 0], out.sequences[:, 9:])
    torch.testing.assert_close(scores[:, 0], out.sequences_scores, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------- the mixture


def problem(N, C, I, E, k, seed=0, dtype=torch.float32):  # noqa: E741
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(N, E, generator=g).topk(k).indices
    tensors = [torch.randn(*shape, generator=g).to(dtype) for shape in ((N, C), (N, k), (E, 2 * I, C), (E, C, I))]
    return tensors[0], chosen, tensors[1], tensors[2] * 0.2, tensors[3] * 0.2


@pytest.mark.parametrize("N, C, I, E, k", [(13, 24, 16, 5, 2), (1, 8, 24, 7, 3), (40, 16, 8, 3, 3), (6, 8, 8, 64, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_equals_slow(m, N, C, I, E, k, dtype):  # noqa: E741
    """Forward and all four gradients; experts without a token included."""
    x, chosen, *rest = problem(N, C, I, E, k, dtype=dtype)
    results = []
    for form in (m.experts_slow, m.experts_fast):
        inputs = [t.clone().requires_grad_() for t in (x, *rest)]
        out = form(inputs[0], chosen, *inputs[1:])
        out.square().sum().backward()
        results.append([out, *(t.grad for t in inputs)])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_fast_is_deterministic_and_all_on_one_expert_works(m):
    x, chosen, weights, gate_up, down = problem(50, 16, 8, 4, 1)
    chosen.zero_()
    out = m.experts_fast(x, chosen, weights, gate_up, down)
    gate, up = (x @ gate_up[0].T).chunk(2, -1)
    torch.testing.assert_close(out, weights * ((F.silu(gate) * up) @ down[0].T), atol=1e-5, rtol=1e-4)
    assert torch.equal(out, m.experts_fast(x, chosen, weights, gate_up, down))


def test_reductions(m):
    """One expert is its SwiGLU; equal experts with normalised weights are one expert."""
    x = torch.randn(2, 7, 48)
    for changes in (dict(n_experts=1, experts_per_token=1), dict(n_experts=5, experts_per_token=3)):
        part = m.MixtureOfExperts(config(m, **changes))
        for tensor in part.experts.values():
            torch.nn.init.normal_(tensor[0].data, std=0.2)
            tensor.data[:] = tensor.data[0]
        dense = m.SwiGLU(config(m, ffn_size=16))
        gate, up = part.experts["gate_up_proj"][0].chunk(2)
        dense.gate_proj.weight.data, dense.up_proj.weight.data = gate.data, up.data
        dense.down_proj.weight.data = part.experts["down_proj"][0].data
        torch.testing.assert_close(part(x), dense(x), atol=1e-5, rtol=1e-4)


def test_router(m):
    cfg = config(m)
    for normed in (True, False):
        cfg.norm_topk_prob = normed
        part, x = m.MixtureOfExperts(cfg), torch.randn(1, 9, 48)
        for tensor in part.parameters():
            torch.nn.init.normal_(tensor, std=0.3)
        probs = (x[0] @ part.gate.weight.T).softmax(-1)
        expected = torch.zeros(9, 48)
        for n in range(9):
            best = probs[n].argsort(descending=True)[:3]
            shares = probs[n][best] / (probs[n][best].sum() if normed else 1)
            for e, share in zip(best, shares, strict=True):
                gate, up = (part.experts["gate_up_proj"][e] @ x[0, n]).chunk(2)
                expected[n] += share * (part.experts["down_proj"][e] @ (F.silu(gate) * up))
        torch.testing.assert_close(part(x)[0], expected, atol=1e-5, rtol=1e-4)


def test_balancing_loss_is_k_at_equal_load_and_more_elsewhere(m):
    E, k = 6, 2
    # token n prefers experts n and n + 1 (mod E): everyone gets as much, every expert has the same mean probability
    logits = torch.zeros(E, E)
    for n in range(E):
        logits[n, n], logits[n, (n + 1) % E] = 2.0, 1.0
    assert m.load_balancing_loss([logits], k).item() == pytest.approx(k, abs=1e-6)
    logits[:, 0] += 3.0
    unequal = logits.clone().requires_grad_()
    loss = m.load_balancing_loss([unequal], k)
    loss.backward()
    assert loss.item() > k + 0.1 and (unequal.grad[:, 0] > 0).all()  # the favourite is pushed down


def test_bias_moves_the_choice_and_not_the_weights(m):
    part, x = m.MixtureOfExperts(config(m, balance="bias", bias_speed=0.5)), torch.randn(3, 8, 48)
    for tensor in part.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    part.gate.bias_of_choice[3] = 10.0
    part.eval()(x)
    assert (part.chosen == 3).any(1).all()
    before = part.gate.bias_of_choice.clone()
    probs = part.logits.softmax(-1).gather(1, part.chosen)
    out = m.experts_slow(x.view(-1, 48), part.chosen, probs / probs.sum(-1, keepdim=True),
                         part.experts["gate_up_proj"], part.experts["down_proj"])
    torch.testing.assert_close(part(x).view(-1, 48), out, atol=1e-5, rtol=1e-4)
    assert torch.equal(before, part.gate.bias_of_choice)  # eval mode learns nothing
    part.train()(x)
    load = F.one_hot(part.chosen, 5).sum((0, 1)).float()
    assert torch.equal(part.gate.bias_of_choice - before, 0.5 * (load.mean() - load).sign())


@pytest.mark.parametrize("balance", ["aux", "none", "bias"])
def test_what_the_loss_contains(m, balance):
    cfg = config(m, balance=balance, aux_coef=0.5)
    model, batch = m.build_model(cfg), (torch.randint(97, (2, 9)), torch.randint(97, (2, 9)))
    total, count, _ = m.compute_loss(model, batch, cfg)
    aux = sum(m.load_balancing_loss([layer.logits], 3) for layer in model.mixtures()) / 4
    alone, _, _ = m.compute_loss(model.eval(), batch, cfg)
    extra = 0.5 * aux * count if balance == "aux" else 0.0
    assert total.item() == pytest.approx((alone + extra).item(), rel=1e-3 if balance == "bias" else 1e-5)


def test_load_cv(m):
    assert m.load_cv(torch.tensor([[5, 5, 5], [2, 2, 2]])) == 0
    assert m.load_cv(torch.tensor([[1, 3]])) == pytest.approx(0.5)
    model = m.build_model(config(m))
    load = m.expert_load(model, torch.randint(97, (3, 11)))
    assert load.shape == (4, 5) and (load.sum(1) == 3 * 11 * 3).all() and model.training
    keep = torch.ones(3, 11, dtype=torch.bool)
    keep[0, 4:] = False
    assert (m.expert_load(model, torch.randint(97, (3, 11)), keep).sum(1) == 26 * 3).all()


# ------------------------------------------------------------------------------------------------- cache and parts


@pytest.mark.parametrize("changes", SHAPES[:3], ids=str)
def test_cached_equals_uncached(m, changes):
    model = m.build_model(config(m, **changes)).eval()
    text = ids = torch.randint(97, (2, 11))
    out = m.generate(model, ids, 30)
    with torch.no_grad():
        for _ in range(30):
            text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, text[:, 11:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_length_in_one_batch(m, side):
    model = m.build_model(config(m)).eval()
    prompts = [torch.randint(97, (n,)) for n in (3, 11, 7)]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        at = slice(11 - len(prompt), 11) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = prompt, True
    together = m.generate(model, ids, 20, mask=mask)
    beams, _ = m.beam_search(model, ids, 12, mask=mask, num_beams=3)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], m.generate(model, prompt[None], 20)[0])
        assert torch.equal(beams[row], m.beam_search(model, prompt[None], 12, num_beams=3)[0][0])


def test_qk_norm_is_per_head_and_before_the_rotation(m):
    cfg = config(m)
    part, x = m.Qwen3Attention(cfg), torch.randn(2, 7, 48)
    for norm in (part.q_norm, part.k_norm):
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.5)
    rope = m.rope_angles(torch.arange(7), m.rope_frequencies(cfg))
    q, k, v = (f(x).view(2, 7, -1, 10).transpose(1, 2) for f in (part.q_proj, part.k_proj, part.v_proj))
    q, k = (y / (y.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * norm.weight
            for y, norm in ((q, part.q_norm), (k, part.k_norm)))
    q, k = m.apply_rope(q, *rope), m.apply_rope(k, *rope)
    k, v = (y.repeat_interleave(3, 1) for y in (k, v))
    scores = (q @ k.transpose(-2, -1) / math.sqrt(10)).masked_fill(~m.causal_mask(7, 7), -math.inf)
    expected = part.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(part(x, rope), expected, atol=1e-5, rtol=0)


def test_causality(m):
    model = m.build_model(config(m)).eval()
    ids = torch.randint(97, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 97
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :12], b[:, :12], atol=1e-5, rtol=0)  # other neighbours, other roundings
    assert all((a[:, t] - b[:, t]).abs().max() > 1e-4 for t in range(12, 20))


def test_parameter_count(m):
    for changes in SHAPES:
        cfg = config(m, **changes)
        model = m.build_model(cfg)
        V, C, H, K, D, E, width = (getattr(cfg, name) for name in
                                   "vocab_size n_embd n_head n_kv_head head_size n_experts expert_size".split())
        sparse = len(model.mixtures())
        mlps = sparse * (3*C*width*E + C*E) + (cfg.n_layer - sparse) * 3*C*cfg.ffn_size
        expected = V*C * (1 if cfg.tie_weights else 2) + cfg.n_layer * (2*C*H*D + 2*C*K*D + 2*D + 2*C) + mlps + C
        assert sum(p.numel() for p in model.parameters()) == expected
    with torch.device("meta"):
        for preset, billions in (("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.721), ("qwen3-4b", 4.022),
                                 ("qwen3-8b", 8.191), ("qwen3-30b-a3b", 30.532), ("qwen3-235b-a22b", 235.094)):
            model = m.build_model(m.Config(**m.PRESETS[preset]))
            assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)


def test_layers_that_stay_dense(m):
    for changes, expected in ((dict(sparse_step=2), [1, 3]), (dict(mlp_only_layers="0,3"), [1, 2]),
                              (dict(n_experts=0), [])):
        model = m.build_model(config(m, **changes))
        mixtures = [isinstance(layer.mlp, m.MixtureOfExperts) for layer in model.model.layers]
        assert [i for i, sparse in enumerate(mixtures) if sparse] == expected


# ------------------------------------------------------------------------------------------- weights in and out


@pytest.mark.parametrize("harm, word", [
    (lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"), "no tensor model.layers.1.mlp.experts.2.up_proj"),
    (lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"), "no tensor model.layers.1.self_attn.q_norm"),
    (lambda t: t.update(extra=torch.ones(1)), "no tensor extra"),
    (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(3)}), "q_norm.weight has the shape"),
    (lambda t: t.update({"model.layers.0.mlp.experts.9.up_proj.weight": torch.ones(16, 48)}), "more experts"),
    (lambda t: t.update({"model.layers.0.mlp.gate.weight": t["model.layers.0.mlp.gate.weight"].T.contiguous()}),
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


def test_stacked_tensors_load_as_well(m):
    model = m.build_model(config(m))
    other = m.build_model(config(m, 1))
    m.import_weights(other, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_shards(m, tmp_path):
    model = m.build_model(config(m))
    reference(m, model, tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    loaded, _ = m.from_pretrained(tmp_path / "many")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("change, word", [
    (dict(model_type="qwen2_moe"), "model_type"), (dict(attention_bias=True), "attention_bias"),
    (dict(use_sliding_window=True), "sliding"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "yarn")])
def test_other_architectures_are_refused(m, change, word):
    with pytest.raises(ValueError, match=word):
        m.config_from_hf(m.config_to_hf(config(m)) | change)


def test_what_config_json_leaves_out_is_transformers_default(m):
    hf = m.config_to_hf(config(m))
    del hf["norm_topk_prob"], hf["num_experts_per_tok"], hf["decoder_sparse_step"]
    cfg = m.config_from_hf(hf | {"num_experts": 8})
    theirs = transformers.Qwen3MoeConfig()
    assert (cfg.norm_topk_prob, cfg.experts_per_token, cfg.sparse_step) == (
        theirs.norm_topk_prob, theirs.num_experts_per_tok, theirs.decoder_sparse_step)


# ---------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """A small vocab.json and merges.txt, trained by the reference library, and that library's tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tok")
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.normalizer = tokenizers.normalizers.NFC()
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator(["the quick brown fox thinks about the theory of thirteen foxes"] * 3, trainer)
    theirs.model.save(str(folder))
    # Qwen's first 256 ids are the bytes in the order of the byte map, as GPT-2's are; the trainer sorts them otherwise.
    return folder, theirs


def test_tokenizer_equals_the_library(m, tokenizer_files):
    folder, theirs = tokenizer_files
    ours = m.make_tokenizer({"kind": str(folder)})
    again = m.make_tokenizer(json.loads(json.dumps(ours.spec)))
    for text in ("the fox thinks", "12345 foxes", "caf\u00e9 cafe\u0301", "a\n\n  b\r\n", "東京 🙂", "don't  DON'T",
                 "<|im_end|>"):
        expected = theirs.encode(text).ids
        assert ours.encode(text) == again.encode(text) == expected, text
    assert ours.encode("caf\u00e9") == ours.encode("cafe\u0301")
    import regex
    assert regex.findall(m.QwenTokenizer.PATTERN, "12345 ab") == ["1", "2", "3", "4", "5", " ab"]
    base = len(json.loads((folder / "vocab.json").read_text()))
    for name, at in (("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2), ("<think>", 24), ("</think>", 25)):
        assert ours.special[name] == base + at  # 151643, 151644, 151645, 151667, 151668 in Qwen3
    assert ours.eos_ids == (base + 2, base)


def test_ids_that_do_not_follow_the_merges_are_refused(m, tokenizer_files, tmp_path):
    folder, _ = tokenizer_files
    vocab = json.loads((folder / "vocab.json").read_text())
    last, before = sorted(vocab, key=vocab.get)[-1:-3:-1]
    vocab[last], vocab[before] = vocab[before], vocab[last]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text((folder / "merges.txt").read_text())
    with pytest.raises(ValueError, match="merges"):
        m.QwenTokenizer.from_files(tmp_path)


# The part of Qwen3's chat_template (tokenizer_config.json of the hub) that conversations without tools reach.
TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi_step_tool and message.role == 'user' %}{%- set ns.multi_step_tool = false %}"
    "{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set content = message.content %}{%- set reasoning_content = '' %}"
    "{%- if '</think>' in message.content %}{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- endif %}{%- if loop.index0 > ns.last_query_index %}"
    "{%- if loop.last or (not loop.last and reasoning_content) %}"
    "{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + "
    "content.lstrip('\n') }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}")
CHATS = [[("user", "the fox")], [("system", "be short"), ("user", " a "), ("assistant", "hi\n"), ("user", "b\n")],
         [("user", "x"), ("assistant", "<think>\nhm\n</think>\n\nthe answer"), ("user", "and?")]]


def test_a_thought_that_was_cut_off_is_left_out(m, tokenizer_files):
    tokenizer = m.make_tokenizer({"kind": str(tokenizer_files[0])})
    messages = [dict(role="user", content="x"), dict(role="assistant", content="<think>\nwell, "),
                dict(role="user", content="y")]
    assert "well" not in tokenizer.decode(tokenizer.chat_ids(messages))


@pytest.mark.parametrize("chat", CHATS, ids=range(3))
@pytest.mark.parametrize("thinking", [True, False])
def test_chat_ids_render_the_published_template(m, tokenizer_files, chat, thinking):
    import jinja2
    tokenizer = m.make_tokenizer({"kind": str(tokenizer_files[0])})
    messages = [dict(role=role, content=content) for role, content in chat]
    text = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(messages=messages, enable_thinking=thinking)
    ids = tokenizer.chat_ids(messages, thinking)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encoding.encode(text, allowed_special="all")
    with pytest.raises(ValueError):
        tokenizer.chat_ids([*messages, dict(role="assistant", content="x")])


def test_chat_in_the_terminal(m, tokenizer_files, tmp_path):
    tokenizer = m.make_tokenizer({"kind": str(tokenizer_files[0])})
    model = m.build_model(config(m, vocab_size=tokenizer.n_vocab, block_size=256))
    m.save_pretrained(model, model.cfg, tmp_path, tokenizer)
    done = subprocess.run([sys.executable, m.__file__, "--load", str(tmp_path), "--chat", "--max-new-tokens", "5"],
                          input="hello\nworld\n", capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("> ") == 3, done.stderr


# ------------------------------------------------------------------------------------------------ config and runs


@pytest.mark.parametrize("changes", [
    dict(experts_per_token=6), dict(n_embd=44), dict(expert_size=12), dict(balance="luck"), dict(mlp_only_layers="a"),
    dict(aux_coef=-1.0), dict(head_size=7), dict(n_kv_head=4), dict(tokenizer=""), dict(mlp_only_layers="0,4"),
    dict(mlp_only_layers="00")])
def test_impossible_values(m, changes):
    with pytest.raises(ValueError):
        config(m, **changes)


@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_resume_is_bit_for_bit(m, tmp_path, balance):
    small = {**m.PRESETS["numbers"], "batch_size": 8, "eval_every": 200, "save_every": 100, "device": "cpu",
             "max_steps": 200, "balance": balance}
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
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    assert balance != "bias" or whole.mixtures()[0].gate.bias_of_choice.abs().sum() > 0
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")]
    assert summaries[0]["load_cv"] == summaries[1]["load_cv"] and len(summaries[0]["load_cv"]) == 2
    assert summaries[0]["expert_load"] == summaries[1]["expert_load"]
    assert {"exact_match", "expert_load_cv", "aux_loss"} == set(summaries[0]["results"])
    assert (tmp_path / "cut" / "expert_load.png").stat().st_size > 10_000


def test_looks_survive_two_resumes(m, tmp_path):
    small = {**m.PRESETS["numbers"], "batch_size": 4, "eval_every": 1000, "save_every": 100, "device": "cpu",
             "out": str(tmp_path), "max_steps": 300}

    class Stop(Exception):
        pass
    saved = m.save_checkpoint

    def stop(*args):
        saved(*args)
        raise Stop
    for resume in (False, True, True):
        m.save_checkpoint = stop if step_of(tmp_path, m) < 200 else saved
        try:
            m.main(m.Config(**small, resume=resume))
        except Stop:
            pass
        finally:
            m.save_checkpoint = saved
    looks = json.loads((tmp_path / "summary.json").read_text())["load_cv"]
    assert [step for step, _ in looks] == [100, 200, 300]


def step_of(folder, m):
    """The step of the checkpoint in a folder; 0 where there is none."""
    return m.read_checkpoint(folder / "ckpt.pt")["step"] if (folder / "ckpt.pt").is_file() else 0


def test_biases_stay_with_their_run(m, tmp_path):
    small = {**m.PRESETS["numbers"], "batch_size": 4, "max_steps": 2, "device": "cpu"}
    for balance in ("bias", "aux"):
        m.main(m.Config(**small, balance=balance, out=str(tmp_path / balance)))
    model, cfg, _ = m.load_any(m.parse_config(m.Config, m.PRESETS, ["--load", str(tmp_path / "bias")]))
    assert cfg.balance == "bias" and model.mixtures()[0].gate.bias_of_choice.abs().sum() > 0
    with pytest.raises(ValueError, match="no published form"):
        m.save_pretrained(model, cfg, tmp_path / "out")
    with pytest.raises(SystemExit, match="balance"):
        m.load_any(m.parse_config(m.Config, m.PRESETS, ["--load", str(tmp_path / "aux"), "--balance", "bias"]))


def test_numbers_are_learned_also_dense(m, tmp_path):
    for experts in (4, 0):
        out = tmp_path / str(experts)
        m.main(m.Config(**{**m.PRESETS["numbers"], "max_steps": 60, "eval_every": 60, "device": "cpu",
                           "n_experts": experts, "out": str(out)}))
        history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert history[-1]["loss"] < 0.6 * history[0]["loss"]
