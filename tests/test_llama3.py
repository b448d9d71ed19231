"""Tests of llama3.py; `pytest tests/test_llama3.py --script my_llama.py` grades yours.

What it shares with decoder_only.py word for word (data, training, sampling, cache) is tested there. Here: the model,
its decoding, weights and chats against transformers, and small runs of the whole. Tokens are compared in float64.
"""
import functools
import io
import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

TINY = dict(n_layer=1, n_head=4, n_kv_head=2, n_embd=16, ffn_size=20, block_size=12, batch_size=4, max_steps=6,
            warmup_steps=2, eval_every=3, device="cpu", max_new_tokens=5)
# Widths that no power of two divides; K = H, K < H, K = 1; tied and not; without and with the stretch.
SHAPES = [dict(), dict(n_kv_head=6, tie_weights=True), dict(n_kv_head=1, rope_theta=500.0),
          dict(rope_factor=8.0, rope_theta=1e6), dict(rope_factor=32.0, rope_theta=1e7, n_kv_head=3)]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    Path("text.txt").write_text("".join(rng.choices("abcdefgh \n", k=2000)))
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def hf():
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def wide(m, seed=0, dtype=torch.float32, scale=1.0, **changes):
    """A small model with wide random weights and norms that are not 1; scale makes its residual stream small."""
    torch.manual_seed(seed)
    model = m.Llama(m.Config(**dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=60, ffn_size=37, block_size=48,
                                    vocab_size=97) | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
        model.model.embed_tokens.weight.mul_(scale)
    return model.to(dtype).eval()


def ids_of(seed, *shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def theirs(m, hf, model, folder="hf"):
    """transformers' model with the weights of ours, through files."""
    m.save_pretrained(model, folder)
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype).eval()


def scenario(m, tmp_path, fixed):
    """For tests/test_house.py: reach every line with a shape comment."""
    fixed.update(C=24, D=4)
    rng = random.Random(0)
    (tmp_path / "t.txt").write_text("".join(rng.choices("abcdefgh \n", k=2000)))
    m.main(m.Config(**TINY | dict(data="t.txt", out="run", n_embd=24, n_head=6, block_size=16, batch_size=5)))
    model = m.Llama(m.Config(n_layer=1, n_head=6, n_kv_head=3, n_embd=24, block_size=9, vocab_size=31)).eval()
    m.generate(model, torch.randint(31, (5, 7)), 4, 0.8, 10, 0.9, eos=1)
    m.generate(model, torch.randint(31, (5, 7)), 4)
    m.attention(*(torch.randn(5, 3, n, 4) for n in (7, 11, 11)), m.causal_mask(7, 11))


# --- the model -------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_equal_transformers_in_both_directions(m, hf, changes):
    model, ids = wide(m, **changes), ids_of(0, 3, 48)
    other = theirs(m, hf, model)
    ours, mine = model(ids), other(ids).logits
    assert (ours - mine).abs().max() < 1e-4 < 0.1 < ours.std()
    other.save_pretrained("theirs")
    again = m.from_pretrained("theirs")
    assert not again.training and (again(ids) - mine).abs().max() < 1e-4
    assert all(vars(again.cfg)[name] == vars(model.cfg)[name] for name in [*m.SHAPE, "rope_factor"])
    if model.cfg.rope_factor > 1:  # a test that cannot fail is none: the stretch can be seen
        model.cfg.rope_factor = 1.0
        assert (model(ids) - mine).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_epsilon_of_every_norm(m, hf, scale):
    """A stream of the size of sqrt(1e-5): the epsilons, that of the last norm too, then decide."""
    model, ids = wide(m, scale=scale, tie_weights=False), ids_of(1, 2, 20)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.mul_(scale)
        block.mlp.down_proj.weight.mul_(scale)
    other = theirs(m, hf, model)
    assert (model(ids) - other(ids).logits).abs().max() < 1e-4
    model.model.norm.eps = 1e-6
    assert (model(ids) - other(ids).logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_published_rotations_beyond_8192_tokens(m, hf, factor):
    model = wide(m, n_layer=1, n_head=2, n_kv_head=1, n_embd=128, block_size=8400, rope_theta=5e5, rope_factor=factor)
    other, ids = theirs(m, hf, model), ids_of(0, 1, 8400)
    mine = other(ids).logits[:, -50:]
    assert (model(ids)[:, -50:] - mine).abs().max() < 1e-4
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    speed, _ = ROPE_INIT_FUNCTIONS["llama3"](other.config, device="cpu")
    cos, sin = m.rope_angles(torch.tensor([0, 1]), 64, 5e5, factor)
    torch.testing.assert_close(torch.atan2(sin[1], cos[1]), torch.cat((speed, speed)))
    assert cos[0].eq(1).all() and sin[0].eq(0).all()


def test_scores_depend_on_the_distance_alone(m):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        return (m.apply_rope(q, *m.rope_angles(torch.tensor([i]), 16, 1e4, 1.0))
                * m.apply_rope(k, *m.rope_angles(torch.tensor([j]), 16, 1e4, 1.0))).sum().item()
    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-3) and abs(score(7, 3) - score(7, 4)) > 1e-2
    turned = m.apply_rope(q, *m.rope_angles(torch.tensor([5]), 16, 1e4, 1.0))  # the definition, with complex numbers
    speed = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    plane = torch.complex(q[..., :8], q[..., 8:]) * torch.polar(torch.ones(8, dtype=torch.float64), 5 * speed)
    torch.testing.assert_close(turned, torch.cat((plane.real, plane.imag), -1), atol=1e-5, rtol=0)


def test_parts_are_what_their_comments_say(m):
    model, x = wide(m, dtype=torch.float64), torch.randn(2, 7, 60, dtype=torch.float64)
    block = model.model.layers[0]
    norm, mlp, attn = block.input_layernorm, block.mlp, block.self_attn
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)
    gate, up, down = (part.weight for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    torch.testing.assert_close(mlp(x), ((x @ gate.T) * (x @ gate.T).sigmoid() * (x @ up.T)) @ down.T)
    rope = m.rope_angles(torch.arange(7), 10, 1e4, 1.0)
    q, k, v = (part(x).view(2, 7, -1, 10).transpose(1, 2) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    k, v = (part.repeat_interleave(3, 1) for part in (m.apply_rope(k, *rope), v))  # head h reads key head h // (H/K)
    y = m.attention(m.apply_rope(q, *rope), k, v, m.causal_mask(7, 7))
    torch.testing.assert_close(attn(x, rope), y.transpose(1, 2).flatten(2) @ attn.o_proj.weight.T)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(m.apply_rope(q, *rope), k, v, is_causal=True))


@torch.no_grad()
def test_the_future_is_hidden_and_nothing_is_dropped(m):
    model, ids = wide(m, dtype=torch.float64), ids_of(0, 1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 97
    a, b = model(ids), model.train()(changed)
    assert torch.equal(a[:, :12], b[:, :12]) and (a[:, 12:] - b[:, 12:]).abs().amax(-1).min() > 1e-6
    assert torch.equal(a, model(ids)) and not any("bias" in name for name, _ in model.named_parameters())


def test_initial_weights_and_sizes(m):
    torch.manual_seed(0)
    model = m.Llama(m.Config(n_layer=3, n_embd=96, n_head=4, n_kv_head=2, ffn_size=256, vocab_size=500))
    for name, p in model.named_parameters():
        last = "o_proj" in name or "down_proj" in name
        assert p.dim() == 1 and p.eq(1).all() or p.std().item() * 96 ** 0.5 == pytest.approx(
            6 ** -0.5 if last else 1, rel=0.05), name
    loss = m.compute_loss(model, torch.randint(500, (4, 64)), torch.randint(500, (4, 64))) / 256
    assert loss.item() == pytest.approx(math.log(500) + 0.5, abs=0.15)
    assert sum(p.numel() for p in m.Llama(m.Config(vocab_size=65)).parameters()) == 804_224
    with torch.device("meta"):
        for C, L, H, K, ffn, tied, count in ((4096, 32, 32, 8, 14336, False, 8_030_261_248),
                                             (2048, 16, 32, 8, 8192, True, 1_235_814_400)):
            model = m.Llama(m.Config(vocab_size=128256, n_embd=C, n_layer=L, n_head=H, n_kv_head=K, ffn_size=ffn,
                                     tie_weights=tied))
            D, V = C // H, 128256
            assert sum(p.numel() for p in model.parameters()) == count == (
                (2 - tied) * V * C + L * (2 * C * C + 2 * C * K * D + 3 * C * ffn + 2 * C) + C)


# --- decoding --------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_greedy_equals_transformers_and_the_uncached_loop(m, hf, monkeypatch, changes):
    model = wide(m, 3, torch.float64, **changes)
    ids, other = ids_of(2, 3, 4), theirs(m, hf, model)
    new = m.generate(model, ids, 44)
    assert torch.equal(new, other.generate(ids, max_new_tokens=44, do_sample=False)[:, 4:])
    text, size = ids, 48
    for _ in range(60):  # beyond block_size the newer half (and one) is read again from position 0
        context = text if text.size(1) <= size else text[:, -(size // 2 + 1 + (text.size(1) - size - 1) % (size // 2)):]
        text = torch.cat((text, model(context)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(m.generate(model, ids, 60), text[:, 4:])
    sizes, cache = [], m.KVCache
    monkeypatch.setattr(m, "KVCache", lambda size: (sizes.append(size), cache(size))[1])
    assert torch.equal(m.generate(model, ids, 9), new[:, :9]) and sizes == [13]  # no more places than needed


@torch.no_grad()
def test_a_prompt_in_pieces_equals_one_pass(m):
    model, ids = wide(m, 2, torch.float64), ids_of(0, 2, 20)
    for pieces in ((8, 12), (1, 1, 18), (3, 1, 10, 6)):
        cache = m.KVCache(20)
        torch.testing.assert_close(torch.cat([model(part, cache) for part in ids.split(pieces, 1)], 1), model(ids))


# --- published weights -----------------------------------------------------------------------------------------------
def test_shards_in_both_directions(m, hf, monkeypatch):
    import huggingface_hub
    model = wide(m).bfloat16()
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", functools.partial(
        huggingface_hub.save_torch_state_dict, max_shard_size="20KB"))
    other = theirs(m, hf, model)
    other.save_pretrained("theirs", max_shard_size="20KB")
    for folder in ("hf", "theirs"):
        assert len(list(Path(folder).glob("model-*.safetensors"))) > 2
        loaded = m.from_pretrained(folder)
        assert all(p.dtype == torch.bfloat16 and torch.equal(p, q)
                   for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    next(Path("hf").glob("model-*.safetensors")).unlink()
    with pytest.raises(RuntimeError, match="Missing key"):
        m.from_pretrained("hf")


@torch.no_grad()
def test_a_file_of_two_dtypes_is_one_model(m, hf):
    from safetensors.torch import load_file, save_file
    model, ids = wide(m, tie_weights=True), ids_of(0, 2, 20)
    m.save_pretrained(model, "hf")
    tensors = {name: t if t.dim() == 1 else t.bfloat16() for name, t in load_file("hf/model.safetensors").items()}
    # Some files store a tied head a second time.
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, "hf/model.safetensors")
    loaded = m.from_pretrained("hf")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded(ids).dtype == torch.bfloat16
    other = hf.AutoModelForCausalLM.from_pretrained("hf", dtype=torch.bfloat16)
    ours, mine = (((logits - model(ids)).abs().mean() / model(ids).std()).item() for logits in (
        loaded(ids), other(ids).logits))
    assert ours < 1.2 * mine < 0.05  # as near to float32 as transformers


@pytest.mark.parametrize("change, theta, factor", [
    (dict(rope_theta=5e5), 5e5, 1.0), ({}, 1e4, 1.0),
    (dict(rope_theta=5e5, rope_parameters=dict(rope_type="default")), 5e5, 1.0),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=3e5), rope_theta=1e4), 3e5, 1.0),
    (dict(rope_theta=5e5, rope_scaling="llama3"), 5e5, 8.0), (dict(rope_parameters="llama3", rope_theta=5e5), 5e5, 8.0),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), rope_scaling="llama3"), 5e5, 8.0)], ids=str)
def test_rotation_settings_may_stand_in_either_place(m, change, theta, factor):
    m.save_pretrained(wide(m), "hf")
    hf = json.loads(Path("hf/config.json").read_text())
    del hf["rope_theta"], hf["rope_scaling"]
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=8192)
    Path("hf/config.json").write_text(json.dumps(hf | {k: llama3 if v == "llama3" else v for k, v in change.items()}))
    cfg = m.from_pretrained("hf").cfg
    assert (cfg.rope_theta, cfg.rope_factor) == (theta, factor)


@pytest.mark.parametrize("change, word", [
    (dict(model_type="mistral"), "model_type"), (dict(attention_bias=True), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias"), (dict(hidden_act="gelu"), "hidden_act"), (dict(head_dim=16), "head_dim"),
    (dict(rms_norm_eps=1e-6), "rms_norm_eps"), (dict(rms_norm_eps=...), "rms_norm_eps"),
    (dict(sliding_window=4096), "sliding_window"),
    (dict(quantization_config={"bits": 4}), "quantization_config"), (dict(rope_scaling=dict(
        rope_type="yarn", factor=8.0)), "rope_scaling"), (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=4.0,
                            original_max_position_embeddings=8192)), "rope_scaling")], ids=str)
def test_another_arithmetic_is_refused_by_name(m, change, word):
    m.save_pretrained(wide(m), "hf")
    hf = json.loads(Path("hf/config.json").read_text())
    Path("hf/config.json").write_text(json.dumps({k: v for k, v in (hf | change).items() if v is not ...}))
    with pytest.raises(ValueError, match=word):
        m.from_pretrained("hf")


def test_published_fields_are_no_obstacle_and_wrong_tensors_are_named(m):
    from safetensors.torch import load_file, save_file
    m.save_pretrained(wide(m), "hf")
    hf = json.loads(Path("hf/config.json").read_text())
    Path("hf/config.json").write_text(json.dumps(hf | dict(  # of Llama 3.2's file, and of a mirror of it
        architectures=["LlamaForCausalLM"], attention_dropout=0.0, attention_bias=False, mlp_bias=False, use_cache=True,
        bos_token_id=128000, eos_token_id=[128001, 128008], initializer_range=0.02, pretraining_tp=1,
        unsloth_fixed=True, torch_dtype="bfloat16", transformers_version="4.45.0.dev0", pad_token_id=128004)))
    tensors = load_file("hf/model.safetensors")
    assert torch.equal(m.from_pretrained("hf").lm_head.weight, tensors["lm_head.weight"])
    for name, change in {"model.layers.1.mlp.up_proj.weight": None, "model.norm.weight": torch.ones(3),
                         "model.layers.0.extra": torch.ones(1)}.items():
        save_file({k: t for k, t in {**tensors, name: change}.items() if t is not None}, "hf/model.safetensors")
        with pytest.raises(RuntimeError, match=name):
            m.from_pretrained("hf")


# --- chat ------------------------------------------------------------------------------------------------------------
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
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
         [("system", " be short\n"), ("user", "hello 123"), ("assistant", "hi"), ("user", "\na ")],
         [("user", "naïve 🙂"), ("assistant", ""), ("user", "x")]]


@pytest.fixture
def instruct(m, hf):
    """A folder "chat" with a small Llama and a tokenizer.json as Llama 3's: bytes, special tokens, one put in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab | {"he": 256, "ll": 257, "hell": 258}, [("h", "e"), ("l", "l"), ("he", "ll")]))
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", inner.token_to_id("<|begin_of_text|>"))])
    m.save_pretrained(wide(m, vocab_size=270, block_size=600, n_layer=1, rope_factor=8.0), "chat")
    inner.save("chat/tokenizer.json")
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("chat", CHATS, ids=range(3))
@pytest.mark.parametrize("date, template", [("", LLAMA_3), ("26 Jul 2024", LLAMA_31)], ids=["3", "3.1"])
def test_chats_equal_the_published_template(m, instruct, chat, date, template):
    messages = [dict(role=role, content=content) for role, content in chat]
    kept = json.dumps(messages)
    ids = instruct.apply_chat_template(messages, chat_template=template, date_string=date, tokenize=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    tokenizer = m.make_tokenizer("json", Path("chat/tokenizer.json").read_text())
    assert tokenizer.encode(m.chat_text(messages, date)) == ids and json.dumps(messages) == kept
    assert instruct.decode(ids) == "<|begin_of_text|>" + m.chat_text(messages, date)
    assert tokenizer.eos == ids[0] + 1 == 260 and tokenizer.n_vocab == 264


def test_a_conversation(m, instruct, monkeypatch, capsys):
    prompts, write, sample = [], m.write_text, m.sample_next

    def written(model, tokenizer, cfg, prompt, count, on_token):
        prompts.append(prompt)
        answer = [*tokenizer.encode("né")[1:], tokenizer.encode("<|eot_id|>")[1]]
        monkeypatch.setattr(m, "sample_next", lambda *_: torch.tensor([answer.pop(0)]))
        return write(model, tokenizer, cfg, prompt, count, on_token)
    monkeypatch.setattr(m, "write_text", written)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n<|eot_id|><|start_header_id|>system\n"))
    m.main(m.Config(load="chat", chat=True, max_new_tokens=9, device="cpu"))
    assert capsys.readouterr().out.split("> ")[1:] == ["né\n", "né\n", ""]  # é has two tokens: no half letter is shown
    head = m.chat_text([dict(role="user", content="hello")], m.time.strftime("%d %b %Y"))
    assert prompts[0] == head and prompts[1].startswith(head + "né<|eot_id|>")
    assert prompts[1].count("<|eot_id|>") == 4  # what a user types ends nobody's turn
    monkeypatch.setattr(m, "write_text", write)
    monkeypatch.setattr(m, "sample_next", sample)
    m.main(m.Config(data="text.txt", out="run", **TINY))
    with pytest.raises(ValueError, match="needs a Llama 3 Instruct model"):
        m.main(m.Config(load="run", chat=True, device="cpu"))
    with pytest.raises(ValueError, match="holds no model"):  # and does not train
        m.main(m.Config(chat=True, device="cpu"))


# --- the program -----------------------------------------------------------------------------------------------------
def test_published_weights_write_and_are_tuned(m, hf, instruct, capsys):
    m.main(m.parse_config("--load chat --prompt hello --temperature 0 --max-new-tokens 9 --device cpu".split()))
    ids = instruct("hello", return_tensors="pt").input_ids
    other = hf.AutoModelForCausalLM.from_pretrained("chat")
    new = other.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.size(1):]
    assert ids[0, 0] == 259 and capsys.readouterr().out.strip() == "hello" + instruct.decode(
        [i for i in new.tolist() if i < 264], skip_special_tokens=True).rstrip()
    model = m.from_pretrained("chat").bfloat16()
    m.save_pretrained(model, "chat")  # tuned in float32, in rows as long as --block-size says
    tuned = m.main(m.Config(load="chat", data="text.txt", out="tuned", **TINY))
    state = torch.load("tuned/ckpt.pt", weights_only=True)
    assert tuned.lm_head.weight.dtype == torch.float32 and not torch.equal(tuned.lm_head.weight, model.lm_head.weight)
    kept = [state["config"][name] for name in ("block_size", "n_embd", "vocab_size", "rope_factor")]
    assert kept == [12, 60, 270, 8.0]
    m.main(m.Config(load="tuned", prompt="hello", device="cpu", max_new_tokens=3))


def test_a_run_learns_is_interrupted_and_resumes_exactly(m, monkeypatch):
    settings = TINY | dict(data="text.txt", tie_weights=True, max_steps=20)
    m.main(m.Config(**settings, out="whole"))
    draw = m.get_batch
    monkeypatch.setattr(m, "get_batch", lambda data, rows, seed, step: (
        step == 13 and os.kill(os.getpid(), signal.SIGINT), draw(data, rows, seed, step))[1])
    with pytest.raises(SystemExit, match="step 13 is saved"):
        m.main(m.Config(**settings, out="cut"))
    monkeypatch.setattr(m, "get_batch", draw)
    m.main(m.Config(out="cut", resume=True))
    whole, cut = (torch.load(f"{out}/ckpt.pt", weights_only=True) for out in ("whole", "cut"))
    assert all(torch.equal(t, cut["model"][name]) for name, t in whole["model"].items()) and cut["step"] == 20
    losses = [row["val_loss"] for row in cut["history"] if "val_loss" in row]
    assert losses[-1] < losses[0] and Path("cut/curve.png").stat().st_size > 5000
    summary = json.loads(Path("cut/summary.json").read_text())
    assert summary["val_loss"] / math.log(2) == pytest.approx(summary["results"]["bits_per_byte"])
    for wrong in (dict(n_head=3, n_kv_head=1), dict(n_kv_head=3), dict(n_kv_head=0), dict(max_steps=0), dict(n_head=0),
                  dict(n_embd=12)):
        with pytest.raises(ValueError, match="must divide"):
            m.main(m.Config(**TINY | wrong))


@pytest.mark.slow
def test_shakespeare_in_2000_steps(m, data_dir, monkeypatch):
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    m.main(m.Config(data="shakespeare", out="run", device="cpu"))
    assert json.loads(Path("run/summary.json").read_text())["val_loss"] <= 1.66
