"""lora_qlora.py against peft, bitsandbytes, transformers, and the formulas themselves.

    pytest tests/test_lora_qlora.py --script my_lora.py      grade your own file
"""
import copy
import gc
import inspect
import json
import math
import random
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj".split(",")


def config(m, **changes):
    return m.Config(**{**dict(device="cpu", base_steps=2, max_steps=3, batch_size=8, examples=20, rank=3), **changes})


def small(m, seed=0, **changes):
    """A model small enough for a test; sizes are pairwise different."""
    torch.manual_seed(seed)
    return m.Llama(m.BASE | dict(hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2,
                                 vocab_size=83) | changes).eval()


def disturb(model, seed=0):
    """Give the adapters values that they could have after training."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=g).to(p)
    return model


def ids_of(seed=0, rows=3, length=9, V=83):
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def bases(m):
    """Frozen layers an adapter may stand beside: with and without a bias, in other dtypes, in four bits."""
    torch.manual_seed(0)
    return [nn.Linear(64, 40), nn.Linear(64, 40, bias=False), nn.Linear(64, 40).double(), nn.Linear(64, 40).bfloat16(),
            m.NF4Linear(nn.Linear(64, 40)), m.NF4Linear(nn.Linear(64, 40, bias=False).bfloat16())]


# --- the adapter -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("which", range(6))
def test_the_layer_is_base_plus_s_b_a(m, which):
    base = bases(m)[which]
    x = torch.randn(2, 5, 64).to(base.weight.dtype if which < 4 else torch.float32).requires_grad_()
    before = base(x)
    layer = m.LoRALinear(base, 3, 6.0)
    assert torch.equal(layer(x), before)  # a new adapter changes nothing
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A.weight", "lora_B.weight"]
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    layer.lora_B.weight.data = torch.randn(40, 3)
    y, A, B = layer(x), layer.lora_A.weight, layer.lora_B.weight
    wanted = before + (2.0 * (x.float() @ A.t()) @ B.t()).to(before.dtype)
    ours = torch.autograd.grad(y.float().square().sum(), (A, B, x))
    theirs = torch.autograd.grad(wanted.float().square().sum(), (A, B, x))
    for a, b in zip((y, *ours), (wanted, *theirs), strict=True):
        assert (a - b).norm() < (0.03 if which == 3 else 1e-5) * b.norm()


def test_scales_and_beginnings(m):
    plain = m.LoRALinear(nn.Linear(400, 300), 16, 8.0)
    assert plain.scale == 0.5 and m.LoRALinear(nn.Linear(400, 300), 16, 8.0, rslora=True).scale == 2.0
    A = plain.lora_A.weight
    assert A.abs().max() <= 1 / 20 and A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    assert not plain.lora_B.weight.any()


def test_dropout_is_on_the_adapter_only(m):
    torch.manual_seed(0)
    linear = nn.Linear(64, 8)
    layer, x = m.LoRALinear(linear, 4, 8.0, dropout=0.5), torch.randn(500, 64)
    layer.lora_B.weight.data.normal_()
    frozen, whole = linear(x), layer.eval()(x)
    outputs = torch.stack([layer.train()(x) for _ in range(300)])
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
    # The mean over many masks is the output without dropout: kept inputs are scaled up by 1 / (1 - p).
    assert (outputs.mean(0) - whole).abs().mean() / (whole - frozen).abs().mean() < 0.15
    layer.dropout = 1 - 1e-9
    torch.testing.assert_close(layer(x), frozen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", range(4))
def test_merge_and_unmerge(m, which):
    """Case 6: a bias survives. Merged equals unmerged, and back is exact."""
    base = bases(m)[which]
    weight, layer = base.weight.data.clone(), m.LoRALinear(base, 3, 6.0).eval()
    layer.lora_B.weight.data.normal_()
    x = torch.randn(4, 64).to(weight.dtype)
    before = layer(x)
    with pytest.raises(AssertionError, match="not merged"):
        layer.unmerge()
    layer.merge()
    tolerance = dict(rtol=0.05, atol=0.05) if which == 3 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), before, **tolerance)
    assert [name for name, _ in layer.named_parameters()][-1] == "lora_B.weight" and len(list(layer.parameters())) < 5
    exact = weight.float() + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.equal(base.weight, exact.to(weight.dtype))  # rounded once
    with pytest.raises(AssertionError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(base.weight, weight) and torch.equal(layer(x), before)


def test_merging_leaves_other_adapters_of_one_base_alone(m):
    base = small(m)
    one, two = (disturb(m.make_ready(base, "lora", config(m, rank=3)), seed).eval() for seed in (1, 2))
    plain, before = base(ids_of()), two(ids_of())
    for layer in one.modules():
        if isinstance(layer, m.LoRALinear):
            layer.merge()
    assert torch.equal(base(ids_of()), plain) and torch.equal(two(ids_of()), before)
    assert one.model.embed_tokens.weight is base.model.embed_tokens.weight  # shared, not copied
    with pytest.raises(ValueError, match="adapters already"):
        m.add_lora(one, ["q_proj"], 2, 2.0)


def test_codes_refuse_to_merge(m):
    with pytest.raises(AssertionError, match="only an nn.Linear"):
        m.LoRALinear(bases(m)[4], 3, 6.0).merge()


def test_the_layer_needs_nothing_else(m):
    """Pasted into an empty file, beside any nn.Linear; quantize and dequantize with the table and the map."""
    space = {}
    imports = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n"
    exec(imports + inspect.getsource(m.LoRALinear), space)
    layer = space["LoRALinear"](nn.Linear(5, 4), 2, 2.0)
    layer(torch.randn(3, 5)).sum().backward()
    layer.merge()
    space = {"NF4": m.NF4}
    exec("import functools, math, torch\nimport torch.nn.functional as F\n" + "\n\n".join(
        inspect.getsource(f) for f in (m.lookup_tables, m.quantize_nf4, m.dequantize_nf4)), space)
    weight = torch.randn(8, 16)
    back = space["dequantize_nf4"]((8, 16), *space["quantize_nf4"](weight))
    assert torch.equal(back, m.dequantize_nf4((8, 16), *m.quantize_nf4(weight)))


def test_only_adapters_learn(m):
    for quantized in (False, True):
        model = m.quantize_model(small(m)) if quantized else small(m)
        m.add_lora(model, ["q_proj", "mlp.down_proj", "model.layers.1.self_attn.k_proj"], 3, 8.0)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (2 * (96 + 128) + 48 + 16)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = m.make_optimizer(model, config(m, lr=0.1))
        for step in range(2):
            m.compute_loss(model, ids_of(step), ids_of(step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) != ("lora_" in name), name


def test_unknown_targets_are_named(m):
    for target in ("query", "proj"):  # whole names, not ends of names
        with pytest.raises(ValueError, match=rf"no linear layer is called '{target}'; there are down_proj, gate_proj"):
            m.add_lora(small(m), ["q_proj", target], 3, 8.0)


# --- four bits -------------------------------------------------------------------------------------------------------
def test_the_table_follows_from_the_normal_distribution(m):
    p, quantile = 1 - (1 / 30 + 1 / 32) / 2, torch.special.ndtri
    positive = quantile(torch.linspace(p, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(p, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    torch.testing.assert_close(m.NF4, (table / table.max()).float(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("seed", range(12))
def test_bits_equal_bitsandbytes(m, seed):
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = (rng.randint(1, 300), 64 * rng.randint(1, 9))
    weight = torch.randn(shape) * 10 ** rng.uniform(-4, 2)
    if seed % 3 == 0:  # rows without anything, outliers
        weight[: shape[0] // 3] = 0
        weight[-1, 0] = 1000.0
    elif seed % 3 == 1:  # rows alike
        weight = weight[0].expand(shape).contiguous() * (1 + torch.rand(shape[0], 1))
    if seed % 4 == 3:
        weight = weight.bfloat16()
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, scales, group, offset = m.quantize_nf4(weight)
    assert torch.equal(codes, theirs.flatten()) and torch.equal(scales, state.absmax)
    assert torch.equal(group, state.state2.absmax) and torch.equal(offset, state.offset)
    back = m.dequantize_nf4(shape, codes, scales, group, offset)
    assert torch.equal(back.to(weight.dtype), functional.dequantize_4bit(theirs, state))


def test_the_dynamic_map_is_the_published_one(m):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(m.lookup_tables("cpu")[1], functional.create_dynamic_map())


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 64), (100, 33)])
def test_any_shape_can_be_stored(m, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    back = m.dequantize_nf4(shape, *m.quantize_nf4(weight))
    assert back.shape == weight.shape and (back - weight).abs().max() < 0.2 * weight.abs().max()


def test_resident_bytes(m):
    layer = m.NF4Linear(nn.Linear(2048, 2048, bias=False))
    bits = 8 * m.bytes_of([*layer.parameters(), *layer.buffers()]) / 2 ** 22
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=0.001) and bits < 4.2
    assert not [value for value in vars(layer).values() if torch.is_tensor(value)]  # nothing else hangs on the module


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_and_its_gradient(m, bias):
    """Case 6: with a bias, too."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, bias=bias)
    layer, x = m.NF4Linear(linear), torch.randn(2, 5, 128, requires_grad=True)
    dense = layer.dequantized()
    torch.testing.assert_close(layer(x), F.linear(x, dense, linear.bias))
    assert (dense - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()
    grad = torch.randn(2, 5, 96)
    torch.testing.assert_close(torch.autograd.grad(layer(x), x, grad)[0], grad @ dense)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert m.LoRALinear(layer, 3, 6.0)(x.bfloat16()).dtype == torch.bfloat16


def test_no_dequantized_copy_stays_alive(m, monkeypatch):
    """Not between forward and backward, and not after it."""
    model = m.add_lora(m.quantize_model(small(m)), TARGETS, 3, 8.0)
    seen, kept, make = [], [], m.dequantize_nf4

    def watched(*args):
        weight = make(*args)
        seen.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(m, "dequantize_nf4", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        loss = m.compute_loss(model, ids_of(), ids_of(1))
    gc.collect()
    assert len(seen) == 14 and not any(ref() is not None for ref in seen)
    shapes = {(layer.out_features, layer.in_features) for layer in model.modules() if isinstance(layer, m.NF4Linear)}
    assert kept and not any({shape, shape[::-1]} & shapes for shape in kept)
    loss.backward()
    gc.collect()
    # 14 in forward; in backward all but q, k and v of the first layer, below which nothing learns.
    assert len(seen) == 14 + 11 and not any(ref() is not None for ref in seen)


def test_what_is_quantized(m):
    model = m.quantize_model(small(m))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert sum(kind == "NF4Linear" for kind in kinds.values()) == 14
    assert kinds["lm_head"] == "Linear" and kinds["model.embed_tokens"] == "Embedding"


# --- files -----------------------------------------------------------------------------------------------------------
def save_base(m, folder, **changes):
    """A Llama of transformers, random, in a folder. -> that folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cfg = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
               vocab_size=83, eos_token_id=1, bos_token_id=None, initializer_range=0.2) | changes
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**cfg)).save_pretrained(folder)
    return folder


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5,
              original_max_position_embeddings=8192)


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(rope_parameters=LLAMA3)])
def test_logits_equal_transformers(m, tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model, _ = m.from_pretrained(str(save_base(m, tmp_path, **changes)))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(ids_of()), theirs(ids_of()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change, words", [
    (dict(attention_bias=True), "attention_bias"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(head_dim=16), "head_dim"), (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type"),
    (dict(rope_scaling=dict(LLAMA3, low_freq_factor=2.0)), "low_freq_factor"),
    (dict(sliding_window=9), "sliding_window"), (dict(model_type="mistral"), "model_type")])
def test_other_arithmetic_is_refused_by_name(m, tmp_path, change, words):
    path = save_base(m, tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        m.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("changes", [dict(), dict(rslora=True), dict(targets=["q_proj", "v_proj"], rank=7)])
def test_peft_loads_ours_and_we_load_its(m, tmp_path, changes):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    cfg = dict(rank=5, rslora=False, targets=TARGETS) | changes
    base, _ = m.from_pretrained(str(save_base(m, tmp_path / "base")))
    plain = base(ids_of())
    ours = disturb(m.add_lora(base, cfg["targets"], cfg["rank"], 12.0, 0.0, cfg["rslora"]), 3)
    m.save_adapter(ours, str(tmp_path / "base"), tmp_path / "adapter")
    load = transformers.LlamaForCausalLM.from_pretrained
    theirs = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(ids_of()), theirs.double()(ids_of()).logits, rtol=0, atol=1e-5)
        assert (ours(ids_of()) - plain).abs().max() > 0.01
    # The other way round, with values of its own, and again through our file.
    settings = peft.LoraConfig(r=cfg["rank"], lora_alpha=12, target_modules=cfg["targets"], use_rslora=cfg["rslora"],
                               task_type="CAUSAL_LM")
    theirs = disturb(peft.get_peft_model(load(tmp_path / "base"), settings), 4).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = m.from_pretrained(str(tmp_path / "base"))
    m.load_adapter(again, tmp_path / "theirs", dropout=0.1)
    m.save_adapter(again, "x", tmp_path / "copy")
    third, _ = m.from_pretrained(str(tmp_path / "base"))
    m.load_adapter(third, tmp_path / "copy")
    with torch.no_grad():
        for one in (again, third):
            both = one.eval().double()(ids_of()), theirs.double()(ids_of()).logits
            torch.testing.assert_close(*both, rtol=0, atol=1e-4)
    assert not [name for name, p in again.named_parameters() if p.requires_grad and "lora_" not in name]


def test_adapters_that_mean_something_else_are_refused(m, tmp_path):
    """Case 5, and what else would be silently wrong."""
    peft = pytest.importorskip("peft")
    base = save_base(m, tmp_path / "base")
    tied = save_base(m, tmp_path / "tied", tie_word_embeddings=True)
    transformers = pytest.importorskip("transformers")

    def adapter(of=base, **changes):
        model = transformers.LlamaForCausalLM.from_pretrained(of)
        settings = dict(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM") | changes
        peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "a")
        return tmp_path / "a"
    for changes, words in ((dict(use_dora=True), "use_dora"), (dict(lora_bias=True), "lora_bias"),
                           (dict(alora_invocation_tokens=[5, 6]), "alora_invocation_tokens"),
                           (dict(rank_pattern={"layers.1.self_attn.q_proj": 3}), "rank_pattern"),
                           (dict(modules_to_save=["norm"]), "modules_to_save"), (dict(bias="all"), "bias")):
        with pytest.raises(ValueError, match=words):
            m.load_adapter(m.from_pretrained(str(base))[0], adapter(**changes))
    with pytest.raises(ValueError, match="one table cannot be both"):
        m.load_adapter(m.from_pretrained(str(tied))[0], adapter(tied, target_modules=["q_proj", "lm_head"]))
    # On a base with a head of its own it is right, although PEFT's file holds that head once more.
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    theirs = disturb(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))).eval()
    theirs.save_pretrained(tmp_path / "head", save_embedding_layers=True)
    ours, _ = m.from_pretrained(str(base))
    m.load_adapter(ours, tmp_path / "head")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_of()), theirs(ids_of()).logits, rtol=1e-4, atol=1e-5)
    other, _ = m.from_pretrained(str(save_base(m, tmp_path / "other", hidden_size=24, intermediate_size=40)))
    with pytest.raises(ValueError, match="does not fit this base|no linear layer"):
        m.load_adapter(other, adapter())


# --- data ------------------------------------------------------------------------------------------------------------
def test_old_names(m):
    assert m.old_names(24) == ["four and twenty"] and m.old_names(7) == ["seven"] and m.old_names(40) == ["forty"]
    assert m.old_names(215) == ["two hundred fifteen", "two hundred and fifteen"]
    assert m.old_names(40_000) == ["forty thousand"] and len(m.old_names(101_101)) == 4
    assert m.old_names(24_021) == [f"four and twenty thousand {rest}one and twenty" for rest in ("", "and ")]
    for n in range(0, 1_000_000, 9973):
        m.encode_toy(f"old {n}=" + "".join(f" {name}" for name in m.old_names(n)))


def test_rows(m):
    inputs, targets = m.number_rows([24, 7], True, 0)
    assert inputs[0].tolist() == m.encode_toy("old 24=four and twenty")
    assert targets[0].tolist() == [m.IGNORE] * 3 + m.encode_toy("four and twenty\n")
    assert targets[1].tolist() == [m.IGNORE] * 2 + m.encode_toy("seven\n") + [m.IGNORE] * 3
    inputs, _ = m.number_rows([215] * 50, True, 0)  # each of its names now and then
    assert len({tuple(row) for row in inputs.tolist()}) == 2
    inputs, targets = m.number_rows([24], False, 0)
    assert inputs[0].tolist() == m.encode_toy("24=twenty four")


def test_exact_match_is_what_greedy_decoding_writes(m):
    torch.manual_seed(0)
    model, cfg = m.Llama(m.BASE), config(m, batch_size=64)
    m.fit(model, cfg, m.number_rows(list(range(100, 160)), True, 0), m.compute_loss, 150, 5e-3)
    numbers, right = list(range(100, 180)), 0
    for n in numbers:
        prompt = m.encode_toy(f"old {n}=")
        text = m.complete(model, prompt, 20, m.EOS)
        right += any(text == m.encode_toy(f"{name}\n") for name in m.old_names(n))
    assert 0 < right < 80 and m.exact_match(model, numbers + numbers[:9], True, "cpu") == pytest.approx(right / 80)


@pytest.fixture
def published(m, tmp_path):
    """A tiny Llama with a tokenizer in Hugging Face's layout, and instructions. -> (folder, path of the JSON)."""
    tokenizers = pytest.importorskip("tokenizers")
    texts = [dict(instruction=f"Say {i}.", input="" if i % 2 else "please", output=f"Yes {i}!" if i else "")
             for i in range(30)]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "</s>", "<s>"],
                                             show_progress=False)
    inner.train_from_iterator([m.instruct_prompt(text) + text["output"] for text in texts], trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    folder = save_base(m, tmp_path / "llama", vocab_size=inner.get_vocab_size())
    inner.enable_truncation(20)  # published files may say so: it is not for texts
    inner.save(str(folder / "tokenizer.json"))
    long = dict(instruction="word " * 600, output="no")
    (tmp_path / "my.json").write_text("\ufeff" + json.dumps([*texts, long]), encoding="utf-8")
    return str(folder), str(tmp_path / "my.json")


def test_instructions_become_rows(m, published, capsys):
    import tokenizers
    folder, path = published
    inner = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    inner.no_truncation()
    train, val = m.instruction_rows(config(m, data=path), inner, 1)
    assert "1 of 31 entries dropped" in capsys.readouterr().out and (len(train[0]), len(val[0])) == (27, 3)
    for row, inputs in zip(val[1], val[0], strict=True):
        start = int((row != m.IGNORE).nonzero()[0])
        assert inputs[0] == 2 and 2 not in inputs[1:].tolist()  # <s> in front, and nowhere else
        assert inner.decode(inputs[:start + 1].tolist()).rstrip().endswith("### Response:")
        answer = [token for token in row.tolist() if token != m.IGNORE]
        assert answer[-1] == 1 and 1 not in answer[:-1]
    # Case 7: an empty answer still counts its end.
    assert (val[1] != m.IGNORE).sum(1).min() == 1


def test_a_published_llama_is_adapted(m, published, tmp_path, capsys):
    """lora and qlora, the file of PEFT, and going on from it."""
    folder, path = published
    cfg = config(m, checkpoint=folder, data=path, methods="lora,qlora", out=str(tmp_path / "o"), lr=0.02, max_steps=30)
    models = m.main(cfg)
    results = json.loads((tmp_path / "o" / "summary.json").read_text())["results"]
    assert results["val_loss"]["lora"] < 0.9 * results["val_loss"]["base"] > 1.1 * results["val_loss"]["qlora"]
    assert results["weight_bytes"]["qlora"] < results["weight_bytes"]["base"] < results["weight_bytes"]["lora"]
    assert set(models) == {"base", "lora", "qlora"} and "exact_match" not in results
    assert "0 of 31" not in capsys.readouterr().out  # nothing was cut: the long entry is still too long
    again, _ = m.from_pretrained(folder)
    m.load_adapter(again, tmp_path / "o" / "lora")
    torch.testing.assert_close(again(ids_of()), models["lora"].eval()(ids_of()), rtol=1e-4, atol=1e-4)
    # The base was shared and not touched.
    plain, _ = m.from_pretrained(folder)
    assert torch.equal(plain(ids_of()), models["base"](ids_of()))
    more = m.main(config(m, checkpoint=folder, data=path, adapter=str(tmp_path / "o/lora"), out=str(tmp_path / "p"),
                         max_steps=1, warmup_steps=1, rank=7, lr=1e-9))
    torch.testing.assert_close(more["lora"].eval()(ids_of()), models["lora"](ids_of()), rtol=1e-3, atol=1e-3)
    assert json.loads((tmp_path / "p/lora/adapter_config.json").read_text())["r"] == 3


def test_defaults_for_a_published_model_are_gentle(m, published, tmp_path, monkeypatch):
    folder, path = published
    seen = []
    monkeypatch.setattr(m, "fit", lambda model, cfg, data, loss, steps, lr, after: (
        seen.append((cfg, lr)), after(steps - 1)))
    monkeypatch.setattr(m, "measure_steps", lambda models, *args: dict.fromkeys(models, 0))
    m.main(m.Config(device="cpu", checkpoint=folder, data=path, out=str(tmp_path / "o"), batch_size=4))
    (cfg, lr), = seen
    assert (cfg.rank, cfg.batch_size, lr) == (16, 4, 2e-4)


# --- the experiment --------------------------------------------------------------------------------------------------
def test_the_methods_share_base_data_and_steps(m, tmp_path, monkeypatch):
    fits, real = [], m.fit

    def spy(model, cfg, data, loss_fn, steps, lr, *after):
        fits.append((model, data, steps, lr, {n: p.requires_grad for n, p in model.named_parameters()},
                     model(ids_of(V=40)).detach(), copy.deepcopy(model.state_dict())))
        return real(model, cfg, data, loss_fn, steps, lr, *after)
    monkeypatch.setattr(m, "fit", spy)
    seen, evaluate = [], m.evaluate
    monkeypatch.setattr(m, "evaluate", lambda model, rows, cfg: seen.append(rows) or evaluate(model, rows, cfg))
    draws, draw = [], m.draw_numbers
    monkeypatch.setattr(m, "draw_numbers", lambda *args: draws.append(args) or draw(*args))
    models = m.main(config(m, out=str(tmp_path), base_steps=30, lr=0.02, full_lr=0.01, seed=4))
    base, full, lora, qlora = fits
    assert [one[2:4] for one in fits] == [(30, 3e-3), (3, 0.01), (3, 0.02), (3, 0.02)]
    assert full[1] is lora[1] is qlora[1] is not base[1] and base[0] is models["base"]
    assert len(full[1][0]) == 20 and len(base[1][0]) == 60_000
    assert [args[0] for args in draws] == [60_000, 20, 1000, 500] and len({args[1] for args in draws}) == 3
    assert [args[2] for args in draws] == [False, False, True, True]
    assert torch.equal(full[5], lora[5]) and not torch.equal(lora[5], qlora[5])  # all begin as the base, one rounded
    assert all(full[4].values()) and all(learns == ("lora_" in name) for name, learns in lora[4].items())
    assert torch.equal(models["base"](ids_of(V=40)), full[5])  # the base is as it was
    for name, tensor in lora[6].items():  # A is drawn alike for both
        assert "lora_A" not in name or torch.equal(tensor, qlora[6][name])
    old = m.TOY_VOCAB.index("old")
    assert seen and all((rows[0][:, 0] == old).all() and len(rows[0]) == 1000 for rows in seen)
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert results["trainable_parameters"]["lora"] < 0.05 * results["trainable_parameters"]["full"]
    assert results["weight_bytes"]["qlora"] < 0.25 * results["weight_bytes"]["base"]
    for key in ("val_loss", "exact_match", "exact_match_modern"):
        assert set(results[key]) == {"base", "full", "lora", "qlora"}


def test_measured_steps_change_nothing(m):
    models = {"full": small(m), "lora": m.add_lora(small(m), TARGETS, 3, 8.0)}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    figures = m.measure_steps(models, (ids_of(), ids_of(1)), config(m), rounds=2)
    for name, model in models.items():
        assert all(torch.equal(before[name][key], tensor) for key, tensor in model.state_dict().items())
        assert figures[name] > 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("change, words", [
    (dict(methods="dora"), "methods are full"), (dict(rank=-1), "start at 1"),
    (dict(data="my.json"), "--checkpoint goes with"), (dict(checkpoint="x"), "--checkpoint goes with"),
    (dict(adapter="x"), "--checkpoint goes with"), (dict(targets="query"), "no linear layer is called 'query'"),
    (dict(checkpoint="x", data="y.json", methods="full,qlora"), "methods are full")])
def test_mistakes_cost_one_line(m, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        m.main(config(m, **{"methods": "lora", **change}))


@pytest.mark.parametrize("file, content", [
    ("model.safetensors", b"version https://git-lfs"), ("tokenizer.json", b"{}"), ("config.json", b'{"n_embd": 3}'),
    ("config.json", b"[]")])
def test_a_damaged_checkpoint_costs_one_line(m, published, tmp_path, file, content):
    (tmp_path / "llama" / file).write_bytes(content)
    with pytest.raises(ValueError, match="--checkpoint"):
        m.main(config(m, checkpoint=published[0], data=published[1], out=str(tmp_path / "o")))


def test_a_run_that_diverges_keeps_the_last_good_adapter(m, published, tmp_path, monkeypatch):
    folder, path = published
    cfg = config(m, checkpoint=folder, data=path, out=str(tmp_path / "o"), max_steps=10)
    losses = iter([3.0, 2.0, math.nan])
    monkeypatch.setattr(m, "evaluate", lambda *args: next(losses))
    saved = []
    monkeypatch.setattr(m, "save_adapter", lambda *args: saved.append(args))
    with pytest.raises(ValueError, match="not finite at step 2"):
        m.main(cfg)
    assert len(saved) == 1


@pytest.mark.parametrize("content, words", [
    ("{}", "entry 0"), ('[{"instruction": "x"}]', "entry 0"), ("[1]", "entry 0"), ("[]", "too few"),
    ("nonsense", "Expecting value")])
def test_files_of_another_form(m, published, tmp_path, content, words):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        m.main(config(m, checkpoint=published[0], data=str(tmp_path / "bad.json"), out=str(tmp_path / "o")))


def test_the_command_line(m, tmp_path):
    done = subprocess.run([sys.executable, m.__file__, "--rank", "-1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_few_parameters_do_as_well(m, tmp_path):
    """Three seeds, on average: from one to the next the ratio is 0.6 to 1.1."""
    ratios = []
    for seed in (1337, 1, 2):
        m.main(m.Config(device="cpu", seed=seed, out=str(tmp_path)))
        results = json.loads((tmp_path / "summary.json").read_text())["results"]
        assert results["trainable_parameters"]["lora"] <= 0.05 * results["trainable_parameters"]["full"]
        ratios.append([results["val_loss"][method] / results["val_loss"]["full"] for method in ("lora", "qlora")])
    assert sum(lora for lora, _ in ratios) / 3 <= 1.02 and sum(qlora for _, qlora in ratios) / 3 <= 1.04


def scenario(m, tmp_path, fixed):
    """Every shape comment of the script, in one short run."""
    fixed.update(C=128, D=32, V=45, F=384)
    m.main(config(m, out=str(tmp_path)))
    layer = m.LoRALinear(nn.Linear(6, 4), 3, 3.0)
    layer(torch.randn(5, 6))
    layer.merge()
