"""Tests of qwen3_moe.py; `pytest tests/test_qwen3_moe.py --script my_moe.py` grades yours.

What it shares with decoder_only.py or llama3.py word for word is tested there. Here: the mixture against its
definition, the model, its weights, its balancing loss and its chats against transformers, and small runs of the whole.
"""
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

TINY = dict(n_layer=1, n_head=4, n_kv_head=2, head_size=6, n_embd=16, ffn_size=20, n_experts=4, block_size=12,
            batch_size=4, max_steps=6, device="cpu", max_new_tokens=5)
# Widths that no power of two divides; all router options; dense ones; tied and not.
SHAPES = [dict(), dict(n_experts=0, tie_weights=True), dict(n_experts=0, n_kv_head=6), dict(norm_topk_prob=False),
          dict(n_experts=16, experts_per_token=1, norm_topk_prob=False, rope_theta=1e6), dict(experts_per_token=5),
          dict(n_kv_head=1, tie_weights=True, ffn_size=32, n_embd=64, n_experts=8)]


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


def wide(m, seed=0, dtype=torch.float32, **changes):
    """A small model with wide random weights and norms that are not 1: no two tokens or experts nearly as likely."""
    torch.manual_seed(seed)
    model = m.Qwen3(m.Config(**dict(n_layer=3, n_head=6, n_kv_head=2, head_size=10, n_embd=44, ffn_size=37, n_experts=5,
                                    experts_per_token=3, block_size=48, vocab_size=97) | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return model.to(dtype).eval()


def ids_of(seed, *shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def theirs(m, hf, model, folder="hf"):
    """transformers' model with the weights of ours, through files."""
    m.save_pretrained(model, folder)
    # eager: its grouped product takes neither odd widths nor float64.
    how = dict(experts_implementation="eager") if model.cfg.n_experts else {}
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype, **how).eval()


def scenario(m, tmp_path, fixed):
    """For tests/test_house.py: reach every line with a shape comment."""
    fixed.update(E=5, D=6)
    rng = random.Random(0)
    (tmp_path / "t.txt").write_text("".join(rng.choices("abcdefgh \n", k=2000)))
    settings = TINY | dict(data="t.txt", out="run", n_layer=2, n_experts=5, experts_per_token=3, block_size=16)
    m.main(m.Config(**settings))
    model = m.Qwen3(m.Config(**TINY | dict(vocab_size=31, n_experts=5, block_size=9))).eval()
    m.generate(model, torch.randint(31, (5, 7)), 4, 0.8, 10, 0.9, eos=1)
    m.generate(model, torch.randint(31, (5, 7)), 4)
    m.causal_mask(7, 11)
    mixture = model.model.layers[0].mlp
    x, chosen, weights = torch.randn(13, 16), torch.randint(5, (13, 3)), torch.rand(13, 3)
    m.experts_slow(x, chosen, weights, mixture.experts)


# --- the mixture -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("N, C, width, E, k", [
    (13, 24, 16, 5, 2), (1, 7, 9, 7, 3), (40, 10, 3, 3, 3), (6, 8, 8, 64, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dispatch_equals_the_double_loop(m, N, C, width, E, k, dtype):
    """Forward and all gradients; experts that nobody visits included."""
    g, results = torch.Generator().manual_seed(N), []
    torch.manual_seed(0)
    experts = torch.nn.ModuleList(m.SwiGLU(m.Config(n_embd=C, ffn_size=width)) for _ in range(E)).to(dtype)
    x, weights = torch.randn(N, C, generator=g, dtype=dtype), torch.rand(N, k, generator=g, dtype=dtype)
    chosen = torch.rand(N, E, generator=g).topk(k).indices
    for form in (m.experts_slow, m.experts_fast):
        inputs = [t.clone().requires_grad_() for t in (x, weights)]
        experts.zero_grad()
        out = form(inputs[0], chosen, inputs[1], experts)
        out.square().sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in experts.parameters()]
        results.append([out, *(t.grad for t in inputs), *grads])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    chosen.zero_()  # all on one expert: nobody is dropped
    out = m.experts_fast(x, chosen, weights, experts)
    torch.testing.assert_close(out, experts[0](x) * weights.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_router(m):
    for normed in (True, False):
        part = wide(m, dtype=torch.float64, norm_topk_prob=normed).model.layers[0].mlp
        x, expected = torch.randn(1, 9, 44, dtype=torch.float64), torch.zeros(9, 44, dtype=torch.float64)
        probs = (x[0] @ part.gate.weight.T).softmax(-1)
        for n in range(9):
            best = probs[n].argsort(descending=True)[:3]
            for e in best:
                expected[n] += probs[n][e] / (probs[n][best].sum() if normed else 1) * part.experts[e](x[0, n])
        torch.testing.assert_close(part(x)[0], expected, atol=1e-6, rtol=0)  # probabilities have float32's digits
    half = wide(m, dtype=torch.bfloat16).model.layers[0].mlp
    assert half(x.bfloat16()).dtype == torch.bfloat16
    kept, cast = [], torch.Tensor.softmax
    torch.Tensor.softmax = lambda self, *a, **k: (kept.append(cast(self, *a, **k)), kept[-1])[1]
    try:
        half(x.bfloat16())
    finally:
        torch.Tensor.softmax = cast
    assert kept[0].dtype == torch.float32


def test_balancing_loss_is_k_at_equal_load_and_pushes_a_favorite_down(m):
    E, k = 6, 2
    logits = torch.zeros(E, E)
    for n in range(E):  # token n prefers experts n and n + 1 (mod E)
        logits[n, n], logits[n, (n + 1) % E] = 2.0, 1.0
    assert m.load_balancing_loss(logits, k).item() == pytest.approx(k, abs=1e-6)
    logits[:, 0] += 3.0
    unequal = logits.clone().requires_grad_()
    loss = m.load_balancing_loss(unequal, k)
    loss.backward()
    assert loss.item() > k + 0.1 and (unequal.grad[:, 0] > 0).all()


@pytest.mark.parametrize("balance", ["loss", "none", "bias"])
def test_what_the_loss_contains(m, balance):
    model, inputs, targets = wide(m, balance=balance).train(), ids_of(0, 2, 9), ids_of(1, 2, 9)
    targets[0, :4] = -100
    total, alone = m.compute_loss(model, inputs, targets), m.compute_loss(model.eval(), inputs, targets)
    aux = sum(m.load_balancing_loss(layer.mlp.logits, 3) for layer in model.model.layers) / 3
    expected = alone + 0.01 * aux * 14 if balance == "loss" else alone
    assert total.item() == pytest.approx(expected.item(), rel=1e-6 if balance != "bias" else 1e-2)
    logp = model(inputs).log_softmax(-1)
    by_hand = -sum(logp[b, t, targets[b, t]] for b in range(2) for t in range(9) if targets[b, t] >= 0)
    torch.testing.assert_close(alone, by_hand)


def test_bias_moves_the_choice_and_not_the_weights(m):
    part, x = wide(m, balance="bias").model.layers[0].mlp, torch.randn(3, 8, 44)
    part.bias[3] = 10.0
    plain = wide(m).model.layers[0].mlp
    plain.load_state_dict({k: v for k, v in part.state_dict().items() if k != "bias"})
    before, out = part.bias.clone(), part(x)
    assert part.load[3] == 24 and torch.equal(before, part.bias)  # all visit it; in eval mode nothing is learned
    probs = part.logits.softmax(-1)
    chosen = (probs + before).topk(3).indices
    weights = probs.gather(1, chosen)
    slow = m.experts_slow(x.flatten(0, 1), chosen, weights / weights.sum(-1, keepdim=True), part.experts)
    torch.testing.assert_close(out.flatten(0, 1), slow, atol=1e-5, rtol=1e-4)
    part.train()(x)
    assert torch.equal(part.bias - before, (0.001 * (part.load.mean() - part.load).sign() + before) - before)
    part.bias.zero_()
    torch.testing.assert_close(part.eval()(x), plain(x))


# --- the whole -------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_and_balancing_loss_equal_transformers_in_both_directions(m, hf, changes):
    model, ids = wide(m, **changes), ids_of(0, 3, 48)
    other = theirs(m, hf, model)
    assert type(other).__name__ == ("Qwen3MoeForCausalLM" if model.cfg.n_experts else "Qwen3ForCausalLM")
    mine = other(ids, **({"output_router_logits": True} if model.cfg.n_experts else {}))
    ours = model(ids)
    assert (ours - mine.logits).abs().max() < 1e-4 < 0.1 < ours.std()
    if model.cfg.n_experts:
        aux = m.load_balancing_loss(torch.cat([layer.mlp.logits for layer in model.model.layers]),
                                    model.cfg.experts_per_token)
        assert aux.item() == pytest.approx(mine.aux_loss.item(), abs=1e-6)
    other.save_pretrained("theirs", max_shard_size="40KB")
    assert len(list(Path("theirs").glob("model-*.safetensors"))) > 1
    again = m.from_pretrained("theirs")
    assert not again.training and (again(ids) - mine.logits).abs().max() < 1e-4
    names = set(m.SHAPE) - (set() if model.cfg.n_experts else {"experts_per_token", "norm_topk_prob"})
    assert all(vars(again.cfg)[name] == vars(model.cfg)[name] for name in names)


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES[:4], ids=str)
def test_greedy_equals_transformers_and_the_uncached_loop(m, hf, changes):
    model = wide(m, 3, torch.float64, **changes)
    ids, other = ids_of(2, 3, 4), theirs(m, hf, model)
    new, text = m.generate(model, ids, 40), ids
    assert torch.equal(new, other.generate(ids, max_new_tokens=40, do_sample=False)[:, 4:])
    for _ in range(40):
        text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(new, text[:, 4:])


def test_qk_norm_is_per_head_and_before_the_rotation(m):
    model, x = wide(m, dtype=torch.float64), torch.randn(2, 7, 44, dtype=torch.float64)
    part, rope = model.model.layers[0].self_attn, m.rope_angles(torch.arange(7), 10, 1e4)
    q, k, v = (f(x).view(2, 7, -1, 10).transpose(1, 2) for f in (part.q_proj, part.k_proj, part.v_proj))
    q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for y, norm in ((q, part.q_norm), (k, part.k_norm)))
    k, v = (y.repeat_interleave(3, 1) for y in (m.apply_rope(k, *rope), v))
    scores = (m.apply_rope(q, *rope) @ k.transpose(-2, -1) / math.sqrt(10)).masked_fill(~m.causal_mask(7, 7), -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ part.o_proj.weight.T
    torch.testing.assert_close(part(x, rope), expected)


@torch.no_grad()
def test_the_future_is_hidden_and_nothing_is_dropped(m):
    model, ids = wide(m, dtype=torch.float64), ids_of(0, 1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 97
    a, b = model(ids), model.train()(changed)
    torch.testing.assert_close(a[:, :12], b[:, :12], atol=1e-12, rtol=0)  # other neighbors, other roundings
    assert (a[:, 12:] - b[:, 12:]).abs().amax(-1).min() > 1e-6 and torch.equal(a, model(ids))
    cache = m.KVCache(20)
    torch.testing.assert_close(torch.cat([model(part, cache) for part in ids.split((8, 1, 11), 1)], 1), a)


def test_initial_weights_and_sizes(m):
    torch.manual_seed(0)
    model = m.Qwen3(m.Config(n_layer=3, n_embd=96, vocab_size=500))
    for name, p in model.named_parameters():
        last = "o_proj" in name or "down_proj" in name
        assert p.dim() == 1 and p.eq(1).all() or p.std().item() * 96 ** 0.5 == pytest.approx(
            6 ** -0.5 if last else 1, rel=0.06), name
    assert sum(p.numel() for p in m.Qwen3(m.Config(vocab_size=65)).parameters()) == 2_578_048
    with torch.device("meta"):
        for C, L, H, K, width, E, k, tied, count in ((1024, 28, 16, 8, 3072, 0, 0, True, 596_049_920),
                                                     (2048, 48, 32, 4, 768, 128, 8, False, 30_532_122_624)):
            D, V, layers = 128, 151936, 1
            model = m.Qwen3(m.Config(vocab_size=V, n_embd=C, n_layer=layers, n_head=H, n_kv_head=K, head_size=D,
                                     ffn_size=width, n_experts=E, experts_per_token=k, tie_weights=tied))
            table, block = (2 - tied) * V * C + C, (2 * C * H * D + 2 * C * K * D + 2 * D + 2 * C + (
                E * (3 * C * width + C) if E else 3 * C * width))
            assert sum(p.numel() for p in model.parameters()) == table + block and table + L * block == count


# --- published weights -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, word", [
    (dict(model_type="qwen2_moe"), "model_type"), (dict(attention_bias=True), "attention_bias"),
    (dict(use_sliding_window=True), "sliding"), (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_scaling"),
    (dict(decoder_sparse_step=2), "decoder_sparse_step"), (dict(mlp_only_layers=[1]), "mlp_only_layers"),
    (dict(rms_norm_eps=1e-5), "rms_norm_eps"), (dict(layer_types=["sliding_attention"] * 3), "layer_types"),
    (dict(shared_expert_intermediate_size=8), "shared_expert"), (dict(moe_intermediate_size=8), None),
    (dict(num_experts_per_tok=2), None)], ids=str)
def test_another_arithmetic_is_refused_by_name(m, change, word):
    m.save_pretrained(wide(m), "hf")
    hf = json.loads(Path("hf/config.json").read_text())
    Path("hf/config.json").write_text(json.dumps(hf | change))
    if word is None:  # a width that the tensors do not have; a number of experts per token that fits any tensor
        if "moe_intermediate_size" in change:
            with pytest.raises(RuntimeError, match="gate_proj"):
                m.from_pretrained("hf")
        else:
            assert m.from_pretrained("hf").cfg.experts_per_token == 2
    else:
        with pytest.raises(ValueError, match=word):
            m.from_pretrained("hf")


def test_what_config_json_leaves_out_is_transformers_default(m, hf):
    model = wide(m, norm_topk_prob=False, experts_per_token=3)
    m.save_pretrained(model, "hf")
    config = json.loads(Path("hf/config.json").read_text())
    default = hf.Qwen3MoeConfig()
    assert (default.norm_topk_prob, default.num_experts_per_tok) == (False, 8)
    Path("hf/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "norm_topk_prob"} | dict(
        max_window_layers=28, router_aux_loss_coef=0.001, output_router_logits=False, sliding_window=None,
        use_sliding_window=False, torch_dtype="bfloat16", attention_dropout=0.0, use_cache=True)))
    assert m.from_pretrained("hf").cfg.norm_topk_prob is False


@torch.no_grad()
def test_a_bfloat16_file_with_a_float32_router_is_one_model(m):
    from safetensors.torch import load_file, save_file
    m.save_pretrained(wide(m), "hf")
    tensors = {name: t if "norm" in name or ".gate.w" in name else t.bfloat16()
               for name, t in load_file("hf/model.safetensors").items()}
    save_file(tensors, "hf/model.safetensors")
    model = m.from_pretrained("hf")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model(ids_of(0, 2, 9)).isfinite().all()
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, "hf/model.safetensors")
    with pytest.raises(RuntimeError, match="model.layers.1.mlp.experts.2.up_proj.weight"):
        m.from_pretrained("hf")


# --- chat ------------------------------------------------------------------------------------------------------------
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
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
CHATS = [[("user", "the fox")], [("system", "be short"), ("user", " a "), ("assistant", "\nhi\n"), ("user", "b\n")],
         [("user", "x"), ("assistant", "<think>\nhm\n</think>\n\nthe </think>\n answer"), ("user", "</think> and?")]]


@pytest.fixture
def instruct(m, hf):
    """A folder "chat" with a small Qwen3 and a tokenizer.json as Qwen3's: NFC, bytes, special tokens, <think>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab | {"he": 256, "th": 257}, [("h", "e"), ("t", "h")]))
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    inner.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    m.save_pretrained(wide(m, vocab_size=270, block_size=600, n_layer=1), "chat")
    inner.save("chat/tokenizer.json")
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("chat", CHATS, ids=range(3))
@pytest.mark.parametrize("thinking", [True, False])
def test_chats_equal_the_published_template(m, instruct, chat, thinking):
    messages = [dict(role=role, content=content) for role, content in chat]
    ids = instruct.apply_chat_template(messages, chat_template=TEMPLATE, enable_thinking=thinking, tokenize=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    tokenizer = m.make_tokenizer("json", Path("chat/tokenizer.json").read_text())
    assert tokenizer.encode(m.chat_text(messages, thinking)) == ids and tokenizer.eos == 258
    messages[0] = dict(role="assistant", content="<think>\ncut off in the middle of")  # is no answer at all
    assert "cut" not in m.chat_text(messages)


@pytest.mark.parametrize("chat", ["think", "direct"])
def test_a_conversation(m, instruct, monkeypatch, capsys, chat):
    prompts, write, sample = [], m.write_text, m.sample_next

    def written(model, tokenizer, cfg, prompt, count, on_token):
        prompts.append(prompt)
        answer = [*tokenizer.encode("<think>hm</think>\n\nné"), tokenizer.encode("<|im_end|>")[0]]
        monkeypatch.setattr(m, "sample_next", lambda *_: torch.tensor([answer.pop(0)]))
        return write(model, tokenizer, cfg, prompt, count, on_token)
    monkeypatch.setattr(m, "write_text", written)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n<|im_end|>\n"))
    m.main(m.Config(load="chat", chat=chat, max_new_tokens=20, device="cpu"))
    assert capsys.readouterr().out.split("> ")[-2:] == ["<think>hm</think>\n\nné\n", ""]
    head = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    thought = "" if chat == "think" else "<think>\n\n</think>\n\n"
    assert prompts == [head + thought, head + "né<|im_end|>\n<|im_start|>user\n< |im_end|><|im_end|>\n"
                       "<|im_start|>assistant\n" + thought]
    monkeypatch.setattr(m, "write_text", write)
    monkeypatch.setattr(m, "sample_next", sample)
    m.main(m.Config(data="text.txt", out="run", **TINY))
    with pytest.raises(ValueError, match="knows conversations"):
        m.main(m.Config(load="run", chat=chat, device="cpu"))


# --- the program -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_run_learns_is_interrupted_and_resumes_exactly(m, monkeypatch, balance):
    monkeypatch.setattr(m.Config, "eval_every", 5)
    settings = TINY | dict(data="text.txt", max_steps=20, balance=balance)
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
    assert losses[-1] < losses[0] and Path("cut/expert_load.png").stat().st_size > 5000
    summary = json.loads(Path("cut/summary.json").read_text())
    assert summary["val_loss"] / math.log(2) == pytest.approx(summary["results"]["bits_per_byte"])
    assert 0 < summary["results"]["expert_load_cv"] < 2
    # A run goes on with the balancing it was made with, whatever the flag says; its biases come along.
    model = m.main(m.Config(load="cut", out="more", data="text.txt", **TINY | dict(max_steps=1)))
    assert torch.load("more/ckpt.pt", weights_only=True)["config"]["balance"] == balance == model.cfg.balance
    assert balance == "loss" or model.model.layers[0].mlp.bias.abs().sum() > 0


def test_loads_are_counted_by_hand_and_a_dense_model_has_none(m):
    model = m.main(m.Config(data="text.txt", out="run", **TINY))
    part, rows = model.model.layers[0].mlp, m.make_data(model.cfg)[1][0]
    model(rows)
    load = F.one_hot(part.logits.topk(2).indices, 4).sum((0, 1)).float()
    got = json.loads(Path("run/summary.json").read_text())["results"]["expert_load_cv"]
    assert got == pytest.approx((load.std(unbiased=False) / load.mean()).item(), rel=1e-5)
    m.main(m.Config(data="text.txt", out="dense", **TINY | dict(n_experts=0)))
    assert set(json.loads(Path("dense/summary.json").read_text())["results"]) == {"bits_per_byte"}
    for wrong in (dict(n_kv_head=3), dict(n_kv_head=0), dict(max_steps=0), dict(n_head=0), dict(balance="luck"),
                  dict(n_experts=1)):
        with pytest.raises(ValueError, match="must divide"):
            m.main(m.Config(**TINY | wrong))


def test_samples_are_cut_as_recommended(m, monkeypatch):
    asked = []
    monkeypatch.setattr(m, "generate", lambda model, ids, count, *how: (asked.append(how), torch.tensor([[1]]))[1])
    assert m.write_text(None, m.make_tokenizer("char", "ab"), m.Config(device="cpu", temperature=0.6), "a", 3) == "b"
    assert asked[0][:4] == (0.6, 20, 0.95, -1)


def test_shakespeare_or_the_help_texts(m, monkeypatch, data_dir):
    monkeypatch.delenv("LLM_DATA", raising=False)
    assert m.load_text("auto")[1] == "pydocs"
    with pytest.raises(OSError):
        m.load_text("shakespeare")
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    assert m.load_text("auto")[0].startswith("First Citizen:") and m.load_text("auto")[1] == "shakespeare"


def test_published_weights_write_and_are_tuned(m, hf, instruct, capsys):
    m.main(m.parse_config("--load chat --prompt hello --temperature 0 --max-new-tokens 9 --device cpu".split()))
    ids = instruct("hello", return_tensors="pt").input_ids
    other = hf.AutoModelForCausalLM.from_pretrained("chat", experts_implementation="eager")
    new = other.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.size(1):]
    assert capsys.readouterr().out.strip() == "hello" + instruct.decode(
        [i for i in new.tolist() if i < 263], skip_special_tokens=True).rstrip()
    m.save_pretrained(m.from_pretrained("chat").bfloat16(), "chat")
    tuned = m.main(m.Config(load="chat", data="text.txt", out="tuned", **TINY))
    state = torch.load("tuned/ckpt.pt", weights_only=True)
    assert tuned.lm_head.weight.dtype == torch.float32
    assert (state["config"]["block_size"], state["config"]["n_embd"], state["config"]["n_experts"]) == (12, 44, 5)


@pytest.mark.slow
def test_shakespeare_in_1500_steps(m, data_dir, monkeypatch):
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    m.main(m.Config(data="shakespeare", out="run", device="cpu"))
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["val_loss"] <= 1.68 and summary["results"]["expert_load_cv"] <= 0.2
