"""lora_qlora.py against peft, bitsandbytes, transformers, and the formulas themselves.

    pytest tests/test_lora_qlora.py --script my_lora.py      grade your own file
"""

import copy
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj".split(",")


def config(m, **changes):
    """A model small enough for a test; sizes are pairwise different."""
    return m.Config(**{**dict(vocab_size=83, n_layer=2, n_head=6, n_kv_head=2, n_embd=48, head_size=10, ffn_size=80,
                              block_size=40, init_std=0.2, device="cpu", data="numbers"), **changes})


def small(m, seed=0, **changes):
    return m.build_model(config(m, seed=seed, **changes)).eval()


def disturb(model, seed=0):
    """Give the adapters values that they could have after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data = parameter.data * (1 + 0.2 * noise) if "magnitude" in name else 0.2 * noise
    return model


def ids_of(seed=0, rows=3, length=9, V=83):
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("seed", range(4))
def test_the_detour_is_a_matrix_of_rank_r(m, seed):
    torch.manual_seed(seed)
    M, size, out, R, scale = 7, 11 + seed, 13, 1 + seed, 0.7
    x, W, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True)
                  for shape in ((M, size), (out, size), (R, size), (out, R)))
    y = m.lora_linear(x, x @ W.t(), A, B, scale)
    torch.testing.assert_close(y, x @ (W + scale * B @ A).t())
    assert torch.autograd.gradcheck(lambda x, A, B: m.lora_linear(x, x @ W.detach().t(), A, B, scale), (x, A, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(m, dora, dtype):
    base, ids = small(m).to(dtype), ids_of()
    before = base(ids)
    adapted = m.add_lora(base, TARGETS, 3, 8.0, dora=dora)
    if dora:  # m / |W| is 1 up to the last digit
        torch.testing.assert_close(adapted(ids), before, rtol=0, atol=1e-5)
    else:
        assert torch.equal(adapted(ids), before)
    kinds = {parameter.dtype for name, parameter in adapted.named_parameters() if "lora_" in name}
    assert kinds == {dtype}


def test_scales_and_beginnings(m):
    linear = nn.Linear(400, 300, bias=False)
    plain, root = m.LoRALinear(linear, 16, 8.0), m.LoRALinear(linear, 16, 8.0, rslora=True)
    assert plain.scale == 0.5 and root.scale == 2.0
    A = plain.lora_A.weight
    assert A.abs().max() <= 1 / 20 and A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    assert not plain.lora_B.weight.any()
    with pytest.raises(ValueError, match="rank of at least 1"):
        m.LoRALinear(linear, 0, 8.0)


def test_dropout_is_on_the_detour_only(m):
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False)
    layer = disturb(nn.ModuleDict({"x": m.LoRALinear(linear, 4, 8.0, dropout=0.5)}))["x"].train()
    x = torch.randn(500, 64)
    frozen, whole = linear(x), layer.eval()(x)
    outputs = torch.stack([layer.train()(x) for _ in range(300)])
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
    # The mean over many masks is the output without dropout: kept inputs are scaled up by 1 / (1 - p).
    assert ((outputs.mean(0) - whole).abs().mean() / (whole - frozen).abs().mean()) < 0.15
    layer.dropout = 1 - 1e-9
    torch.testing.assert_close(layer(x), frozen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_merged_equals_unmerged_and_back(m, dora, quantised):
    base = m.quantise_model(small(m).double()) if quantised else small(m).double()
    model, ids = disturb(m.add_lora(base, TARGETS, 3, 8.0, dora=dora)).eval(), ids_of()
    before = model(ids)
    first = next(iter(m.adapters(model).values()))
    assert len(m.adapters(model)) == 14
    with pytest.raises(RuntimeError, match="not merged"):
        first.unmerge()
    for adapter in m.adapters(model).values():
        adapter.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        first.merge()
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-10)
    assert not torch.equal(first.merged, first.base_layer.weight)
    with pytest.raises(RuntimeError, match="nothing here can learn"):
        model.train()(ids)
    model.eval()
    for adapter in m.adapters(model).values():
        adapter.unmerge()
    assert torch.equal(model(ids), before)
    plain = m.merge_adapters(model)
    assert not m.adapters(plain) and not any(isinstance(one, m.NF4Linear) for one in plain.modules())
    torch.testing.assert_close(plain(ids), before, rtol=0, atol=1e-10)


def test_a_bfloat16_weight_is_rounded_once(m):
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False).bfloat16()
    layer = m.LoRALinear(linear, 4, 8.0)
    layer.lora_B.weight.data = 0.002 * torch.randn(64, 4)
    assert layer.lora_A.weight.dtype == torch.float32
    exact = linear.weight.float() + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.equal(layer.merged_weight(), exact.bfloat16())
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, linear.weight)


def test_dora_rescales_rows(m):
    torch.manual_seed(0)
    linear = nn.Linear(20, 12, bias=False).double()
    layer = m.LoRALinear(linear, 3, 6.0, dora=True)
    disturb(nn.ModuleDict({"x": layer}))
    total = linear.weight + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer.row_norms(), total.norm(dim=1).detach())
    x, magnitude = torch.randn(5, 20, dtype=torch.float64), layer.lora_magnitude_vector
    wanted = x @ (magnitude[:, None] * total / total.norm(dim=1, keepdim=True)).t()
    torch.testing.assert_close(layer(x), wanted)
    # The norm is a constant in backward: the gradient of B is that of the formula with the norm detached.
    ours, = torch.autograd.grad(layer(x).square().sum(), layer.lora_B.weight)
    held = x @ (magnitude[:, None] * total / total.norm(dim=1, keepdim=True).detach()).t()
    theirs, = torch.autograd.grad(held.square().sum(), layer.lora_B.weight)
    torch.testing.assert_close(ours, theirs)


def test_only_adapters_learn(m):
    for quantised in (False, True):
        model = small(m)
        if quantised:
            m.quantise_model(model)
        m.add_lora(model, ["q_proj", "mlp.down_proj"], 3, 8.0)
        # whole paths and endings of paths both name layers; L * R * (in + out) numbers each
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * (48 + 60 + 80 + 48)
        assert m.parameter_count(model) == m.parameter_count(small(m)) + 2 * 3 * (48 + 60 + 80 + 48)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = m.make_optimizer(model, config(m, lr=0.1))
        for step in range(2):
            m.compute_loss(model, (ids_of(step), ids_of(step + 1)), model.cfg)[0].backward()
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
            optimizer.step()
            optimizer.zero_grad()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) != ("lora_" in name), name


def test_unknown_targets_are_named(m):
    with pytest.raises(ValueError, match=r"no linear layer is called 'query'; there are down_proj, gate_proj.*q_proj"):
        m.add_lora(small(m), ["q_proj", "query"], 3, 8.0)
    with pytest.raises(ValueError, match="no linear layer is called 'proj'"):  # whole names, not ends of names
        m.add_lora(small(m), ["proj"], 3, 8.0)


# ---------------------------------------------------------------------------------------- four bits


def test_the_table_follows_from_the_normal_distribution(m):
    p = 1 - (1 / 30 + 1 / 32) / 2
    quantile = torch.special.ndtri
    negative = quantile(torch.linspace(p, 0.5, 9, dtype=torch.float64)[:-1])
    positive = quantile(torch.linspace(p, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat((positive, torch.zeros(1, dtype=torch.float64), -negative)).sort().values
    # the larger half has eight values: as published, on the positive side
    table = torch.cat((-positive, torch.zeros(1, dtype=torch.float64), negative)).sort().values
    torch.testing.assert_close(m.NF4, (table / table.max()).float(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_bits_equal_bitsandbytes(m, seed, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = (rng.randint(1, 300), 64 * rng.randint(1, 9))
    weight = torch.randn(shape) * 10 ** rng.uniform(-4, 2)
    if seed % 3 == 0:  # rows without anything, rows alike, outliers
        weight[: shape[0] // 3] = 0
        weight[-1, 0] = 1000.0
    elif seed % 3 == 1:
        weight = weight[0].expand(shape).contiguous() * (1 + torch.rand(shape[0], 1))
    if seed % 4 == 3:
        weight = weight.bfloat16()
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    ours = m.quantise_nf4(weight, double)
    assert torch.equal(ours["codes"], codes.flatten())
    assert torch.equal(ours["absmax"], state.absmax)
    if double:
        assert torch.equal(ours["nested_absmax"], state.state2.absmax) and torch.equal(ours["offset"], state.offset)
    theirs = functional.dequantize_4bit(codes, state)
    assert torch.equal(m.dequantise_nf4(shape, **ours, dtype=weight.dtype), theirs)
    # and they are the nearest: no value of the table is nearer than half the widest gap
    block = weight.float().abs().view(-1, 64).amax(1).repeat_interleave(64).view(shape)
    if not double and weight.dtype == torch.float32:
        assert ((theirs - weight).abs() <= block * 0.5 * 0.31).all()


def test_the_dynamic_map_is_the_published_one(m):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(m.dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 64), (100, 33)])
def test_any_shape_can_be_stored(m, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for double in (False, True):
        back = m.dequantise_nf4(shape, **m.quantise_nf4(weight, double))
        assert back.shape == weight.shape and (back - weight).abs().max() < 0.2 * weight.abs().max()


def test_resident_bytes(m):
    linear = nn.Linear(2048, 2048, bias=False)
    for double, bits in ((True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)):
        layer = m.NF4Linear(linear, double)
        held = m.bytes_of([*layer.parameters(), *layer.buffers()])
        assert 8 * held / 2 ** 22 == pytest.approx(bits, rel=0.01)
        # no other tensor hangs on the module
        assert not [value for value in vars(layer).values() if torch.is_tensor(value)]
    assert 4 + 8 / 64 + 32 / (64 * 256) == pytest.approx(4.127, abs=1e-3)


def test_the_product_and_its_gradient(m):
    torch.manual_seed(0)
    layer = m.NF4Linear(nn.Linear(128, 96, bias=False))
    x = torch.randn(2, 5, 128, requires_grad=True)
    dense = layer.weight
    assert not dense.requires_grad and (dense - dense.round()).abs().max() > 0
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, dense))
    gradient = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, gradient)[0], gradient @ dense)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert m.NF4Linear(nn.Linear(64, 3, bias=False).bfloat16())(x[..., :64].bfloat16()).dtype == torch.bfloat16


def test_no_dequantised_copy_stays_alive(m, monkeypatch):
    """Not between forward and backward, and not after it."""
    model = m.add_lora(m.quantise_model(small(m)), TARGETS, 3, 8.0)
    seen, make = [], m.dequantise_nf4

    def watched(*args, **kwargs):
        weight = make(*args, **kwargs)
        seen.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(m, "dequantise_nf4", watched)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = m.compute_loss(model, (ids_of(), ids_of(1)), model.cfg)[0]
    gc.collect()
    assert len(seen) == 14 and not any(ref() is not None for ref in seen)
    shapes = {(layer.out_features, layer.in_features) for layer in m.adapters(model).values()}
    assert kept and not any({tuple(shape), tuple(shape[::-1])} & shapes for shape in kept)
    loss.backward()
    gc.collect()
    # 14 in forward; in backward all but q, k and v of the first layer, below which nothing learns
    assert len(seen) == 14 + 11 and not any(ref() is not None for ref in seen)


def test_what_is_quantised(m):
    model = m.quantise_model(small(m))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert sum(kind == "NF4Linear" for kind in kinds.values()) == 14
    assert kinds["lm_head"] == "Linear" and kinds["model.embed_tokens"] == "Embedding"
    assert model.model.norm.weight.dtype == torch.float32
    full, small_one = m.bytes_of(small(m).parameters()), m.bytes_of([*model.parameters(), *model.buffers()])
    matrices = 2 * (2 * 48 * 60 + 2 * 48 * 20 + 3 * 48 * 80)
    # small matrices pay for a whole group of 256 scales: a little more than 4.127 bits
    assert full - 4 * matrices < small_one < full - 4 * matrices + matrices * 4.6 / 8


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("changes", [dict(), dict(rslora=True), dict(dora=True), dict(targets="q_proj,v_proj", rank=7)])
def test_peft_loads_ours_and_we_load_its(m, tmp_path, changes):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    cfg = config(m, **{**dict(rank=5, alpha=12.0), **changes})
    base, ids = m.build_model(cfg).eval(), ids_of()
    m.save_pretrained(base, base.cfg, tmp_path / "base")
    load = transformers.LlamaForCausalLM.from_pretrained
    plain = base(ids)
    ours = disturb(m.add_lora(base, cfg.targets.split(","), cfg.rank, cfg.alpha, rslora=cfg.rslora, dora=cfg.dora), 3)
    m.save_adapter(ours, cfg, tmp_path / "base", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids), theirs(ids).logits, rtol=0, atol=1e-5)
        assert (ours(ids) - plain).abs().max() > 0.01

    # The other way round, with values of its own.
    settings = peft.LoraConfig(r=cfg.rank, lora_alpha=int(cfg.alpha), target_modules=cfg.targets.split(","),
                               use_rslora=cfg.rslora, use_dora=cfg.dora, task_type="CAUSAL_LM")
    theirs = disturb(peft.get_peft_model(load(tmp_path / "base"), settings), 4).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = m.from_pretrained(tmp_path / "base")
    found = m.load_adapter(again, tmp_path / "theirs")
    assert found["r"] == cfg.rank
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids), theirs(ids).logits, rtol=0, atol=1e-5)
        # Merged, it is a Llama again, which transformers reads.
        merged = m.merge_adapters(again)
        m.save_pretrained(merged, merged.cfg, tmp_path / "merged")
        whole = load(tmp_path / "merged").eval()(ids).logits
        torch.testing.assert_close(whole, theirs(ids).logits, rtol=0, atol=1e-4)


def test_writing_with_an_adapter_equals_peft(m, tmp_path):
    """Greedy and beams, in float64, prompts of different length; merged and not."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    cfg = config(m, rank=5)
    base = m.build_model(cfg).eval().double()
    m.save_pretrained(base, base.cfg, tmp_path / "base")
    ours = disturb(m.add_lora(base, TARGETS, cfg.rank, cfg.alpha), 3).eval()
    m.save_adapter(ours, cfg, tmp_path / "base", tmp_path / "adapter")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval().double()
    ids, mask = ids_of(), torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = False
    for options in (dict(), dict(num_beams=3)):
        with torch.no_grad():
            wanted = theirs.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=8, do_sample=False,
                                     pad_token_id=0, eos_token_id=None, **options)[:, 9:]
        for merged in (False, True):
            for adapter in m.adapters(ours).values():
                adapter.merge() if merged else None
            if options:
                found = m.beam_search(ours, ids, 8, mask=mask, num_beams=3)[0][:, 0]
            else:
                found = m.generate(ours, ids, 8, mask=mask)
            assert torch.equal(found, wanted)
        for adapter in m.adapters(ours).values():
            adapter.unmerge()


@pytest.mark.parametrize("damage, words", [
    (dict(peft_type="IA3"), "peft_type"), (dict(bias="all"), "bias"), (dict(fan_in_fan_out=True), "fan_in_fan_out"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"), (dict(rank_pattern={"q_proj": 3}), "rank_pattern"),
    (dict(init_lora_weights="pissa"), "pissa"), (dict(r=4), "was made for another one"),
    (dict(use_dora=True), "has no tensor .*lora_magnitude_vector")])
def test_foreign_adapters_are_refused(m, tmp_path, damage, words):
    cfg = config(m, rank=5)
    model = m.add_lora(m.build_model(cfg), TARGETS, 5, 8.0)
    m.save_adapter(model, cfg, "base", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=words):
        m.load_adapter(m.build_model(cfg), tmp_path)


def test_an_adapter_for_other_shapes_is_refused(m, tmp_path):
    cfg = config(m, rank=5)
    m.save_adapter(m.add_lora(m.build_model(cfg), TARGETS, 5, 8.0), cfg, "base", tmp_path)
    with pytest.raises(ValueError, match=r"down_proj.lora_B.weight has the shape \(48, 5\), this base needs \(56, 5\)"):
        m.load_adapter(small(m, n_embd=56), tmp_path)
    with pytest.raises(ValueError, match="no linear layer is called 'model.layers.1"):
        m.load_adapter(small(m, n_layer=1), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged"):
        m.load_adapter(m.build_model(cfg), tmp_path)


def test_merging_some_adapters_leaves_no_four_bits(m, tmp_path):
    model = disturb(m.add_lora(m.quantise_model(small(m)), ["q_proj", "v_proj"], 3, 8.0))
    before = model(ids_of())
    m.save_pretrained(m.merge_adapters(model), model.cfg, tmp_path)
    torch.testing.assert_close(m.from_pretrained(tmp_path)[0](ids_of()), before, rtol=0, atol=1e-4)
    assert m.energy_within(m.update_spectra(small(m), m.add_lora(disturb(small(m)), ["q_proj"], 3, 8.0)) | {
        "x": torch.tensor([2.0, 1.0, 0.0])}, 1) == pytest.approx(0.8)


def test_a_bfloat16_base_without_autocast(m):
    model = m.add_lora(small(m).bfloat16(), TARGETS, 3, 8.0)
    assert model(ids_of()).dtype == torch.bfloat16
    model(ids_of()).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_checkpoints_hold_what_is_trained(m, tmp_path):
    model = disturb(m.add_lora(m.quantise_model(small(m)), TARGETS, 3, 8.0))
    optimizer = m.make_optimizer(model, model.cfg)
    m.save_checkpoint(tmp_path / "ckpt.pt", model, optimizer, 7, model.cfg, {})
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(state["model"]) == {name for name, _ in model.named_parameters() if "lora_" in name}
    other = m.add_lora(m.quantise_model(small(m)), TARGETS, 3, 8.0)
    assert m.load_checkpoint(tmp_path / "ckpt.pt", other, None, model.cfg)[0] == 7
    assert torch.equal(other(ids_of()), model(ids_of()))
    with pytest.raises(SystemExit, match="does not fit this model"):
        m.load_checkpoint(tmp_path / "ckpt.pt", m.add_lora(small(m), ["q_proj"], 3, 8.0), None, model.cfg)
    with pytest.raises(SystemExit, match="does not fit this model"):
        m.load_checkpoint(tmp_path / "ckpt.pt", m.add_lora(small(m), TARGETS, 4, 8.0), None, model.cfg)


# ---------------------------------------------------------------------------------------- data


def test_the_old_form(m):
    assert m.old_names(24) == ["four and twenty"] and m.old_names(0) == ["zero"] and m.old_names(40) == ["forty"]
    assert m.old_names(40215) == ["forty thousand two hundred fifteen", "forty thousand two hundred and fifteen"]
    assert set(m.old_names(1001)) == {"one thousand one", "one thousand and one"}
    assert m.old_names(100) == ["one hundred"] and m.old_names(2000) == ["two thousand"]
    longest = max((name for name in m.old_names(777777)), key=len)
    assert longest == ("seven hundred and seven and seventy thousand "
                       "seven hundred and seven and seventy") and len(longest.split()) == 13
    for n in random.Random(0).sample(range(1_000_000), 300):
        names = m.old_names(n)
        assert len(set(names)) == len(names) and len(names) in (1, 2, 4)
        # without "and", and with tens before units again, every name is the modern one
        for name in names:
            words = name.split()
            for i in range(1, len(words) - 1):
                if words[i] == "and" and words[i - 1] in m.UNITS[1:10] and words[i + 1] in m.TENS:
                    words[i - 1:i + 2] = [words[i + 1], words[i - 1], ""]
            assert [word for word in words if word not in ("and", "")] == m.number_to_words(n).split()


def test_the_floor_is_the_entropy_of_the_choices(m):
    cfg = config(m, vocab_size=48)
    tokenizer = m.ToyTokenizer()
    _, (inputs, targets), info = m.adapt_data(cfg, tokenizer)
    total = 0.0
    for row in inputs.tolist():
        n = int("".join(m.TOY_VOCAB[i] for i in row if m.TOY_VOCAB[i].isdigit()))
        total += math.log(len(m.old_names(n)))
    assert info["floor"] == pytest.approx(total / (targets != m.IGNORE).sum().item())
    numbers = {tokenizer.decode(row).split("=")[0].removeprefix("old ") for row in inputs.tolist()}
    assert all(m.is_validation(int(n)) for n in numbers)


def test_pairs_become_rows(m):
    inputs, targets = m.answer_rows([([5, 6, 7], [8, 0, 9]), ([5], [6, 2]), ([1] * 9, [3])], 6)
    I = m.IGNORE  # noqa: E741
    assert inputs.tolist() == [[5, 6, 7, 8, 0], [5, 6, 2, 0, 0]]
    assert targets.tolist() == [[I, I, 8, 0, 9], [6, 2, I, I, I]]
    # too long: cut behind block_size inputs; a pair whose prompt fills the row is dropped
    inputs, targets = m.answer_rows([([5, 6, 7], [8, 0, 9]), ([1] * 5, [3])], 4)
    assert inputs.tolist() == [[5, 6, 7, 8]] and targets.tolist() == [[I, I, 8, 0]]


def test_batches_lose_their_padding_and_nothing_else(m):
    inputs, targets = m.answer_rows([([5, 6, 7], [8, 0, 9]), ([5], [6, 2]), ([5], [6, 2, 4])], 30)
    short = m.prepare((inputs[1:], targets[1:]), None)
    assert short[0].shape == (2, 3)
    model = small(m)
    whole = m.compute_loss(model, (inputs[1:], targets[1:]), model.cfg)
    cut = m.compute_loss(model, short, model.cfg)
    torch.testing.assert_close(whole[0], cut[0])
    assert whole[1] == cut[1] == 5


def test_prompts_and_pads_get_no_gradient(m):
    inputs, targets = m.answer_rows([([5, 6, 7], [8, 4, 9]), ([5], [6, 2])], 30)
    logits = torch.randn(2, inputs.size(1), 83, requires_grad=True)
    m.compute_loss(lambda ids: logits, (inputs, targets), config(m))[0].backward()
    assert logits.grad[0].abs().sum(-1).bool().tolist() == [False, False, True, True, True]
    assert logits.grad[1].abs().sum(-1).bool().tolist() == [True, True, False, False, False]


def test_instructions_are_read(m, tmp_path):
    path = tmp_path / "my.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"},
                                {"instruction": "Hello?", "output": "Hi."}]))
    (first, answer), (second, _) = m.read_instructions(path)
    assert first.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n") and answer == "3"
    assert "### Input" not in second
    for wrong in ("{}", "[1]", '[{"instruction": "x"}]', "nonsense"):
        path.write_text(wrong)
        with pytest.raises(ValueError):
            m.read_instructions(path)


# ---------------------------------------------------------------------------------------- measures


def test_steps_are_measured_and_teach_nothing(m):
    base = small(m, vocab_size=48)
    models = {method: m.make_ready(copy.deepcopy(base), method, config(m, rank=3)) for method in m.METHODS}
    before = {method: {k: v.clone() for k, v in model.state_dict().items()} for method, model in models.items()}
    rows = m.number_rows(m.draw_numbers(100, 0, False), m.ToyTokenizer())
    figures = m.measure_steps(models, rows, config(m, batch_size=5), rounds=2)
    for method, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert all(torch.equal(tensor, before[method][name]) for name, tensor in model.state_dict().items())
        assert figures[method]["gradients"] == 4 * trained
        # two moments, and a step counter per tensor
        assert 8 * trained < figures[method]["optimizer"] < 8 * trained + 8 * len(list(model.parameters()))
        assert figures[method]["ms"] > 0
    assert figures["qlora"]["weights"] < figures["full"]["weights"] < figures["lora"]["weights"]


def test_spectra(m):
    base = small(m)
    adapted = disturb(m.add_lora(small(m), TARGETS, 3, 8.0))
    spectra = m.update_spectra(base, adapted)
    assert len(spectra) == 14
    for s in spectra.values():
        assert (s[:3] > 1e-3).all() and (s[3:] < 1e-4 * s[0]).all()
    assert m.energy_within(spectra, 3) == pytest.approx(1.0)
    other = small(m, seed=1)
    full = m.update_spectra(base, other)
    name = "0.mlp.up_proj"
    change = other.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(full[name], torch.linalg.svdvals(change))
    assert 0 < m.energy_within(full, 3) < m.energy_within(full, 9) < 1


def test_the_memory_estimate_knows_what_is_frozen(m):
    need = {method: m.memory_gb(config(m, method=method, head_size=8), 10**9) for method in ("full", "lora", "qlora")}
    assert need["full"]["optimizer"] == pytest.approx(8.0) and need["lora"]["optimizer"] < 0.01
    assert need["qlora"]["weights"] < need["lora"]["weights"] + 0.01


# ---------------------------------------------------------------------------------------- runs


SHORT = ("--n-layer 1 --n-embd 32 --n-head 2 --n-kv-head 1 --ffn-size 64 --base-steps 30 --max-steps 20 "
         "--eval-every 10 --save-every 10 --batch-size 16 --rank 2").split()


def run(m, cwd, *args, timeout=300):
    return subprocess.run([sys.executable, "-I", m.__file__, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout)


@pytest.fixture(scope="module")
def trained(m, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = run(m, folder, *SHORT, "--out", "a")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_reports(m, trained):
    folder, done = trained
    summary = json.loads((folder / "a" / "summary.json").read_text())
    for key in ("val_loss", "exact_match", "trainable_parameters", "weight_bytes", "step_ms"):
        assert set(summary["results"][key]) == {"base", "full", "lora", "qlora"}, key
    for name in summary["figures"]:
        assert (folder / "a" / name).stat().st_size > 10_000
    assert "right, old form" in done.stdout and "ms per step" in done.stdout
    losses = summary["results"]["val_loss"]
    assert max(losses["full"], losses["lora"], losses["qlora"]) < losses["base"]


def test_loading_writes_what_the_run_wrote(m, trained, monkeypatch, capsys):
    folder, _ = trained
    sample = (folder / "a" / "sample.txt").read_text().splitlines()
    monkeypatch.chdir(folder)

    def write(*args):
        capsys.readouterr()
        model, _ = m.main(m.parse_config(m.Config, m.PRESETS, ["--prompt", "old 24=", *args]))
        assert bool(m.adapters(model)) == ("--merge" not in args and "lora" in args[1])
        return capsys.readouterr().out.strip()
    for method in ("base", "full", "lora", "qlora"):
        wanted = next(line for line in sample if line.startswith(f"{method:<6}old 24=")).split("old 24=")[1]
        for extra in ([], ["--merge"]):
            assert write("--load", f"a/{method}", *extra,
                         *(["--method", "qlora"] if method == "qlora" else [])) == f"old 24={wanted}".strip()
    for options in (["--beams", "3"], ["--temperature", "1", "--top-k", "5"]):
        assert write("--load", "a/lora", *options).startswith("old 24=")


def test_resume_repeats_the_run(m, trained):
    """Killed in the middle of the second adaptation: what was finished is not repeated, the rest comes out equal."""
    folder, _ = trained
    process = subprocess.Popen([sys.executable, "-I", m.__file__, *SHORT, "--out", "b"], cwd=folder,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(2000):
        if (folder / "b" / "lora" / "ckpt.pt").is_file():
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    stamp = (folder / "b" / "full" / "ckpt.pt").stat().st_mtime_ns
    done = run(m, folder, "--resume", "--out", "b")
    assert done.returncode == 0, done.stderr
    assert (folder / "b" / "full" / "ckpt.pt").stat().st_mtime_ns == stamp
    for name in ("base", "full", "lora", "qlora"):
        a, b = (torch.load(folder / which / name / "ckpt.pt", weights_only=True) for which in "ab")
        assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
        assert all(torch.equal(tensor, b["model"][key]) for key, tensor in a["model"].items())
    drop = ("seconds", "step_ms")
    a, b = (json.loads((folder / which / "summary.json").read_text())["results"] for which in "ab")
    assert {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}


def test_a_stage_on_another_base_is_not_continued(m, trained, monkeypatch, capsys):
    """A foreign checkpoint of the base, and adapters that stand on another one: both begin anew."""
    folder, _ = trained
    monkeypatch.chdir(folder)

    def go(*args):
        m.main(m.parse_config(m.Config, m.PRESETS, [*args, "--out", "c"]))
        return torch.load(folder / "c" / "lora" / "ckpt.pt", weights_only=True)
    first = go(*SHORT, "--method", "lora", "--seed", "1")
    (folder / "c" / "base" / "ckpt.pt").write_bytes((folder / "a" / "base" / "ckpt.pt").read_bytes())
    (folder / "c" / "lora" / "ckpt.pt").write_bytes((folder / "a" / "lora" / "ckpt.pt").read_bytes())
    again = go("--resume")
    assert all(torch.equal(tensor, again["model"][key]) for key, tensor in first["model"].items())
    # What only looks at the result may differ, and the stages are still taken as they are.
    stamps = [(folder / "c" / name / "ckpt.pt").stat().st_mtime_ns for name in ("base", "lora")]
    go("--resume", "--prompt", "24=", "--temperature", "0.5", "--merge")
    assert stamps == [(folder / "c" / name / "ckpt.pt").stat().st_mtime_ns for name in ("base", "lora")]
    assert (folder / "c" / "lora" / "merged" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def llama(m, tmp_path_factory):
    """A base from elsewhere: transformers' own folder, and a tokenizer of characters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    chars = "".join(sorted(set(map(chr, range(32, 127))) | {"\n"}))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048))
    model.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer_spec.json").write_text(json.dumps({"kind": "char", "chars": chars}))
    (folder / "my.json").write_text(json.dumps(
        [{"instruction": f"Say {i}.", "output": f"{i}!"} for i in range(60)]))
    (folder / "my.txt").write_text("so many words about nothing at all, " * 200)
    return folder


@pytest.mark.parametrize("data", ["my.json", "my.txt"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_checkpoint_is_adapted(m, llama, data, method, monkeypatch, capsys):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    monkeypatch.chdir(llama)
    out = f"{method}-{data}"

    def call(*args):
        return m.main(m.parse_config(m.Config, m.PRESETS, [*args, "--max-new-tokens", "5", "--data", data]))
    call("--checkpoint", "base", "--method", method, "--max-steps", "12", "--eval-every", "6", "--batch-size", "4",
         "--lr", "0.01", "--full-lr", "0.003", "--out", out, "--block-size", "200", "--merge")
    rows = [json.loads(line) for line in (llama / out / method / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] < rows[0]["loss"]
    load, ids = transformers.LlamaForCausalLM.from_pretrained, ids_of()
    capsys.readouterr()
    call("--load", f"{out}/{method}", "--prompt", "Say 7.")
    assert capsys.readouterr().out.startswith("Say 7.")
    # Finished, it is not trained again, although temperature and the rest have other defaults here than in the toy run.
    stamp = (llama / out / method / "ckpt.pt").stat().st_mtime_ns
    m.main(m.parse_config(m.Config, m.PRESETS, ["--resume", "--out", out]))
    assert (llama / out / method / "ckpt.pt").stat().st_mtime_ns == stamp
    if method == "lora":  # what was saved merged is what PEFT computes with base and adapter
        theirs = peft.PeftModel.from_pretrained(load(llama / "base"), llama / out / method).eval()
        whole = load(llama / out / method / "merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, whole(ids).logits, rtol=0, atol=2e-5)
            assert (whole(ids).logits - load(llama / "base").eval()(ids).logits).abs().max() > 1e-3


def fails(m, monkeypatch, capsys, folder, *args):
    """The line that a command line costs, run within this process."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        m.main(m.parse_config(m.Config, m.PRESETS, [*map(str, args)]))
    line = str(stop.value.code)
    assert line.startswith("error: ") and "\n" not in line
    return line


@pytest.mark.parametrize("args, words", [
    (["--rank", "0"], "rank must be at least 1"), (["--targets", "query,q_proj"], "no linear layer is called 'query'"),
    (["--targets", "q_proj,"], "targets must be"), (["--method", "magic"], "method must be"),
    (["--alpha", "nan"], "alpha must be above 0"), (["--data", "shakespeare"], "need --checkpoint"),
    (["--checkpoint", "nowhere"], "--checkpoint nowhere"), (["--load", "nowhere", "--prompt", "x"], "--load nowhere"),
    (["--load", "nowhere"], "needs --prompt"), (["--resume"], "there is no run in"),
    (["--block-size", "8"], "block-size 23"), (["--lora-dropout", "1"], "lora_dropout must be in"),
    (["--nonsense"], "unrecognized arguments")])
def test_mistakes_cost_one_line(m, tmp_path, monkeypatch, capsys, args, words):
    assert words in fails(m, monkeypatch, capsys, tmp_path, *args)
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_in_a_terminal_too(m, tmp_path):
    done = run(m, tmp_path, "--rank", "0")
    assert done.returncode == 1 and done.stderr.strip() == "error: rank must be at least 1, not 0"


def test_mistakes_about_adapters_cost_one_line(m, trained, llama, monkeypatch, capsys):
    folder, _ = trained
    for args, words in ((["--load", folder / "a" / "lora", "--checkpoint", llama / "base", "--prompt", "x"], "--load"),
                        (["--checkpoint", llama / "base", "--data", llama / "base" / "config.json"], "must be a list"),
                        (["--checkpoint", llama / "base", "--n-layer", "3"], "n_layer"),
                        (["--checkpoint", llama / "base", "--data", "numbers"], "base of the toy language")):
        assert words in fails(m, monkeypatch, capsys, folder, *args)
