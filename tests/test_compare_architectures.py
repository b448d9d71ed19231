"""compare_architectures.py: equal sizes, true costs, models that are what they are called, sentences that follow."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TASKS = ("translate", "match", "review", "text")
NAMES = ("BERT", "GPT-2", "T5", "Llama 3", "Qwen3", "Qwen3 MoE")
PAIRS = [(task, name) for task in TASKS for name in NAMES if (task, name) != ("text", "BERT")]
VOCAB = {"translate": 46, "match": 48, "review": 3002, "text": 66}


@pytest.fixture(scope="module")
def m():
    sys.path.insert(0, str(ROOT))  # an orchestrator finds the scripts beside it
    yield load_script(ROOT / "compare_architectures.py")
    sys.path.remove(str(ROOT))


def made(m, task, name, **more):
    cfg = m.settings(task, name, VOCAB[task], **{"lr": 1e-3, "seed": 1, "max_steps": 10, "out": "x"} | more)
    return m.MODELS[name][0].build_model(cfg), cfg


# --- equal size, true costs

@pytest.mark.parametrize("task", TASKS)
def test_sizes_are_within_five_percent(m, task):
    sizes = {name: sum(p.numel() for p in made(m, task, name)[0].parameters()) for name in NAMES
             if (task, name) in PAIRS}
    assert all(abs(size / sizes["GPT-2"] - 1) <= 0.05 for size in sizes.values()), sizes
    for name in sizes:
        model = made(m, task, name)[0]
        tables, rest = m.parameters(model)
        assert tables + rest == sizes[name]
        assert tables >= VOCAB[task] * (48 if name == "T5" and task != "text" else 64)


@pytest.mark.parametrize("task, name", PAIRS)
def test_flops_are_those_of_the_counter(m, task, name):
    model, cfg = made(m, task, name)
    model = model.double().eval()  # doubles: the mixture's grouped product is then counted too
    S, T, M = m.row_shape(task, name)
    ids, source = torch.randint(6, 40, (1, T)), torch.randint(6, 40, (1, S))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        if name == "T5":
            model(source, ids)
        elif name == "BERT" and task == "translate":
            model(ids, None, None, torch.arange(T)[None] < M)
        elif name != "BERT" and M == 1:
            m.verdict_logits(model, ids)
        else:
            model(ids)
    assert m.row_flops(name, cfg, S, T, M) == counter.get_total_flops()


def test_fit_width_finds_the_width():
    m = sys.modules["compare_architectures"]
    def build(F):
        return torch.nn.Sequential(torch.nn.Linear(64, F), torch.nn.Linear(F, 64))
    for width in (8, 40, 256):
        assert m.fit_width(build, sum(m.parameters(build(width)))) == width
    assert m.fit_width(build, 10) == 8  # smaller is not possible


def test_memory_counts_what_is_held_at_once(m):
    def step():
        x = torch.empty(1000, 1000)  # 4 MB, held to the end
        for _ in range(3):
            y = x + 1  # the new one exists before the old one goes: 3 tensors at once from the second round on
        return y
    assert m.training_memory(step) == pytest.approx(12e6, rel=0.01)


@pytest.mark.parametrize("task", ["translate", "text"])
def test_cache_bytes_by_hand(m, task):
    ids = torch.randint(6, 40, (1, 5))
    L, C = m.TASKS[task]["n_layer"], m.TASKS[task]["n_embd"]
    column = 2 * L * C * 4
    for name, wanted in (("GPT-2", (column, 0)), ("Llama 3", (column // 2, 0)), ("Qwen3 MoE", (column // 2, 0)),
                         ("T5", (column * 3 // 4, column * 3 // 4)), ("BERT", (0, 0))):
        if (task, name) in PAIRS:
            assert m.cache_per_token(name, made(m, task, name)[0].eval(), ids) == wanted, name


# --- the walk: with all changes up to a published model it is that model

def walked(m, changes, **more):
    cfg = m.settings("text", "Qwen3 MoE", 66, lr=1e-3, seed=1, max_steps=10, out="x")
    cfg = m.dataclasses.replace(cfg, norm_eps=1e-5, **more)
    torch.manual_seed(3)
    walk = m.Walk(cfg, changes).double().eval()
    for parameter in walk.parameters():  # biases and gains too: all zeros and ones would hide a missing one
        torch.nn.init.normal_(parameter, std=0.3)
    return walk, cfg


def copied(walk, model, names):
    """Fill model's parameters from the walk's by name; every parameter must be met, with its shape."""
    state, filled = dict(walk.state_dict()), {}
    for name, tensor in model.state_dict().items():
        source = names(name, state)
        assert source.shape == tensor.shape, name
        filled[name] = source
    model.load_state_dict(filled)
    return model


def test_walk_begins_as_gpt2(m):
    walk, cfg = walked(m, (), ffn_size=4 * 96, n_experts=0)
    gpt = m.decoder_only.GPT(m.decoder_only.Config(n_layer=3, n_head=4, n_embd=96, vocab_size=66, block_size=64)
                             ).double().eval()

    def names(name, state):
        if "wte" in name or "lm_head" in name:
            return state["tokens.weight"]
        if "wpe" in name:
            return state["positions.weight"]
        if "ln_f" in name:
            return state[name.replace("transformer.ln_f", "norm")]
        prefix, part = name.split(".h.")[1].split(".", 1)
        base, kind = f"layers.{prefix}.", part.rsplit(".", 1)[1]
        if "c_attn" in part:
            return torch.cat([state[f"{base}attention.{q}.{kind}"] for q in "qkv"])
        new = {"attn.c_proj": "attention.o", "mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2", "ln_1": "norm1",
               "ln_2": "norm2"}[part.rsplit(".", 1)[0]]
        return state[f"{base}{new}.{kind}"]
    copied(walk, gpt, names)
    ids = torch.randint(66, (2, 40))
    torch.testing.assert_close(walk(ids), gpt(ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", ["SwiGLU (Llama 3)", "QK-norm (Qwen3)", "mixture (Qwen3 MoE)"])
def test_walk_passes_through_the_published_models(m, step):
    mixture = step.startswith("mixture")
    walk, cfg = walked(m, m.WALK[step], n_experts=4 if mixture else 0, ffn_size=40, expert_size=24)
    shape = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=96, vocab_size=66, block_size=64, ffn_size=40,
                 tie_weights=True, norm_eps=1e-5)
    if "Llama" in step:
        model = m.llama3.Llama(m.llama3.Config(**shape))
    else:
        model = m.qwen3_moe.Qwen3(m.qwen3_moe.Config(**shape, n_experts=cfg.n_experts, expert_size=24,
                                                     experts_per_token=2))

    def names(name, state):
        if "embed_tokens" in name or "lm_head" in name:
            return state["tokens.weight"]
        if name == "model.norm.weight":
            return state["norm.weight"]
        name = name.removeprefix("model.").replace("input_layernorm", "norm1").replace("self_attn", "attention")
        return state[name.replace("post_attention_layernorm", "norm2").replace("_proj", "")
                     if "attention" in name else name]
    copied(walk, model.double().eval(), names)
    ids = torch.randint(66, (2, 40))
    torch.testing.assert_close(walk(ids), model(ids), rtol=1e-9, atol=1e-9)


def test_walk_steps_are_equal_in_size_and_each_adds_one(m):
    cfg = m.settings("text", "Qwen3 MoE", 66, lr=1e-3, seed=1, max_steps=10, out="x")
    models = {name: m.build_walk(changes, cfg) for name, changes in m.WALK.items()}
    sizes = [sum(m.parameters(model)) for model, _ in models.values()]
    assert all(abs(size / sizes[0] - 1) <= 0.05 for size in sizes)
    steps = list(m.WALK.values())
    assert all(after[:-1] == before for before, after in zip(steps, steps[1:], strict=False))
    for (_name, changes), (model, _) in zip(m.WALK.items(), models.values(), strict=True):
        assert (model.positions is None) == ("rope" in changes)
        assert any("bias" in name for name, _ in model.named_parameters()) == ("rms" not in changes)
    for model, _ in models.values():  # causal: changing token 5 changes nothing before it
        ids = torch.randint(66, (1, 12))
        other = ids.clone()
        other[0, 5] = (ids[0, 5] + 1) % 66
        a, b = model.eval()(ids), model(other)
        assert torch.allclose(a[:, :5], b[:, :5], atol=1e-5) and not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


# --- tasks and objectives

def test_numbers_to_train_choose_and_test_are_apart(m):
    choose, test = m.held_out_numbers()
    assert len(choose) == 500 and len(test) == 1000 and len({*choose, *test}) == 1500
    assert all(m.decoder_only.is_validation(n) for n in (*choose, *test))
    assert not any(m.decoder_only.is_validation(n) for n in m.training_numbers(60_000)[:3000])


def test_blank_rows_have_ten_places(m):
    tokenizer = m.encoder_only.ToyTokenizer()
    ids, segments, zeros = m.blank_rows([42, 777_777], tokenizer)
    assert ids.shape == segments.shape == (2, 18) and not zeros.any()
    words = [[m.encoder_only.TOY_VOCAB[i] for i in row] for row in ids.tolist()]
    assert words[0] == ["[CLS]", "4", "2", "[SEP]", "forty", "two", *["\n"] * 8, *["<pad>"] * 4]
    assert words[1][8:] == "seven hundred seventy seven thousand seven hundred seventy seven \n".split(" ")
    assert ((segments == 1) & (ids > 0)).sum(1).tolist() == [10, 10]


def test_unmask_loss_asks_for_hidden_answers_only(m):
    tokenizer = m.encoder_only.ToyTokenizer()
    rows = m.blank_rows(m.training_numbers(60_000)[:400], tokenizer)
    batch = m.encoder_only.prepare(rows, torch.Generator().manual_seed(0))
    cfg = m.settings("translate", "BERT", 46, lr=1e-3, seed=1, max_steps=10, out="x")
    seen = {}

    def model(noisy, mask, segments, chosen):
        seen.update(noisy=noisy, chosen=chosen)
        return torch.zeros(int(chosen.sum()), 46), None
    loss, count, _ = m.unmask_loss(model, batch, cfg)
    ids, segments = batch[:2]
    hidden = seen["noisy"] != ids
    assert torch.equal(hidden, seen["chosen"]) and (seen["noisy"][hidden] == cfg.mask_id).all()
    assert not (hidden & (segments == 0)).any() and not (hidden & (ids == 0)).any()
    assert count == hidden.sum() and loss == pytest.approx(count.item() * math.log(46), rel=1e-5)
    share = hidden.sum(1) / 10  # uniform from none to all, not 15 %
    assert share.mean().item() == pytest.approx(0.5, abs=0.05) and (share >= 0.9).float().mean() > 0.05


def test_write_names_reads_ten_blanks(m):
    tokenizer, V = m.encoder_only.ToyTokenizer(), 46

    class Knows(torch.nn.Module):
        """Knows every name, and is surer of later blanks, so that the order of filling is from the back."""
        cfg = m.settings("translate", "BERT", V, lr=1e-3, seed=1, max_steps=10, out="x")

        def forward(self, ids, mask, segments):
            logits = torch.zeros(*ids.shape, V)
            for i, row in enumerate(ids.tolist()):
                digits = tokenizer.decode(row[1:row.index(tokenizer.encode("[SEP]")[0])])
                right = m.blank_rows([int(digits)], tokenizer)[0][0, :len(row)]
                logits[i, torch.arange(len(right)), right] = 5 + torch.arange(len(right)) * 0.1
            return logits
    numbers = [7, 42, 40_215, 777_777]
    assert m.write_names(Knows(), tokenizer, numbers) == [m.decoder_only.number_to_words(n) for n in numbers]


@pytest.mark.parametrize("name", ["GPT-2", "Llama 3", "Qwen3 MoE"])
def test_verdicts_do_not_depend_on_padding(m, name):
    model = made(m, "match", name)[0].eval()
    ids = torch.randint(6, 40, (3, 12))
    ids[1, 7:] = 0
    short = m.verdict_logits(model, ids)
    torch.testing.assert_close(m.verdict_logits(model, F.pad(ids, (0, 5))), short, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(short[1], model(ids)[1, -1], atol=1e-3)  # the last column is a pad there


def test_answer_loss_balances_experts_in_training_alone(m):
    model, cfg = made(m, "match", "Qwen3 MoE")
    batch = torch.randint(6, 40, (4, 9)), torch.tensor([46, 47, 46, 47])
    plain = F.cross_entropy(m.verdict_logits(model.eval(), batch[0]), batch[1], reduction="sum").item()
    assert m.answer_loss(model, batch, cfg)[0].item() == pytest.approx(plain, rel=1e-5)
    assert m.answer_loss(model.train(), batch, cfg)[0].item() > plain + 0.9 * cfg.aux_coef * 2 * len(batch[0])


def test_halves_of_windows(m):
    ids = torch.arange(1, 1001)
    first, second = m.half_rows(ids, 10, 10)
    assert torch.equal(torch.cat((first, second), 1), ids.view(100, 10))
    first, second = m.half_rows(ids, 10, 1)  # in random order, each window once
    assert torch.equal(first[:, -1] + 1, second[:, 0]) and len(set(first[:, 0].tolist())) == len(first) == 991
    assert first[:8, 0].tolist() != list(range(1, 9))


def test_second_half_by_brute_force(m):
    model = made(m, "text", "GPT-2")[0].eval()
    ids = torch.randint(1, 66, (150,))
    total = 0.0
    for start in (0, 64):  # 22 tokens are left over
        for t in range(32, 64):
            logits = model(ids[None, start:start + t])[0, -1]
            total += F.cross_entropy(logits, ids[start + t]).item()
    assert m.second_half_nats(model, ids, 64) == pytest.approx(total / 64, rel=1e-4)


def test_text_is_split_in_three(m):
    train, choose, test, vocab, size, name = m.text_ids("pydocs")
    assert name == "pydocs" and len(train) > 15 * len(choose) and abs(len(choose) - len(test)) <= 1
    assert min(train.min(), choose.min(), test.min()) >= 1 and train.max() < vocab and size >= 1


def test_reviews_are_in_three_disjoint_splits(m, data_dir, monkeypatch):
    monkeypatch.setenv("LLM_DATA", str(data_dir))
    train, choose, test, vocab = m.labelled("review")
    sizes = [len(split[0]) for split in (train, choose, test)]
    assert sizes[0] > 6000 and 600 < sizes[1] < 800 and sizes[2] == 872 and vocab == 3000
    rows = [{tuple(i for i in row if i) for row in split[0].tolist()} for split in (train, choose)]
    assert len(rows[0] & rows[1]) < 10  # different texts that are equal after cutting and unknown words, at most


# --- sentences follow from numbers

def entry(*values, lr=4e-3, by_rate=None):
    return {"values": list(values), "second_half": [], "lr": lr,
            "by_rate": by_rate or {"0.002": 1, "0.004": 1, "0.008": 1},
            "tables": 10, "rest": 90}


COST = {"train_tokens_per_second": 100.0, "answer_ms": 2.0, "first_ms": 1.0, "token_ms": 0.1, "memory_mb": 1.0,
        "cache_bytes": 8, "source_bytes": 0, "flops_per_token": 1e3}


def test_conclusions_follow_from_the_numbers(m):
    entries = {"A": entry(0.90, 0.92), "B": entry(0.91, 0.95), "C": entry(0.5, 0.6, lr=8e-3)}
    costs = {"A": COST, "B": COST | {"train_tokens_per_second": 50.0, "answer_ms": 5.0}, "C": COST | {"answer_ms": 4.0}}
    said = " ".join(m.conclusions("match", entries, costs, None))
    assert "B is best with 93.0%, level with it A 91.0%; behind C 55.0%." in said
    assert "A is fastest, 2.0 times as fast as B" in said and "A needs 2.0 ms, B 2.5 times as long" in said
    assert "The best rate of C is the lowest or highest that was tried" in said and "One seed" not in said
    entries["A"] = entry(0.97, 0.98)
    assert "A is best with 97.5%; behind B 93.0% and C 55.0%." in " ".join(m.conclusions("match", entries, costs, None))
    alone = {name: entry(one["values"][0]) for name, one in entries.items()}
    assert m.conclusions("match", alone, costs, None)[0].startswith("One seed each")


def test_fewer_bits_are_better(m):
    walk = {"GPT-2": entry(2.0, 2.1), "RoPE": entry(1.8, 1.9), "GQA": entry(1.85, 1.95), "mixture": entry(2.2, 2.3)}
    said = m.conclusions("ablate", walk, {}, None)
    assert "RoPE is best with 1.850, level with it GQA 1.900; behind GPT-2 2.050 and mixture 2.250." in said[0]
    assert said[1:] == ["RoPE: 2.050 -> 1.850 bits, lower.", "GQA: 1.850 -> 1.900 bits, no clear change.",
                        "mixture: 1.900 -> 2.250 bits, higher."]


def row(model, lr, seed, choose, value):
    return {"cell": {"model": model, "lr": lr, "seed": seed}, "choose": choose, "tables": 1, "rest": 2,
            "score": {"accuracy": value}}


def test_rates_are_chosen_without_the_test_rows(m):
    rows = [row("A", 1e-3, 1, 0.5, 0.99), row("A", 4e-3, 1, 0.4, 0.90), row("A", 4e-3, 2, 0.4, 0.92)]
    one = m.summarise(rows, "accuracy")["A"]
    assert one["lr"] == 4e-3 and one["values"] == [0.90, 0.92] and one["by_rate"] == {"0.001": 0.99, "0.004": 0.90}
    cells = m.with_seeds([r | {"cell": r["cell"] | {"out": "x-1"}} for r in rows[:2]], 3)
    assert [(c["lr"], c["seed"], c["out"]) for c in cells] == [(4e-3, 2, "x-2"), (4e-3, 3, "x-3")]


def test_the_search_goes_on_at_the_edge(m):
    def tried(model, **losses):
        return [{"cell": {"model": model, "lr": float(rate), "seed": 1, "out": f"x/qwen3-moe-{float(rate):g}-1"},
                 "choose": loss} for rate, loss in losses.items()]
    low, high = tried("A", **{"2e-3": 1, "5e-3": 2, "1e-2": 3}), tried("B", **{"2e-3": 3, "5e-3": 2, "1e-2": 1})
    inside = tried("C", **{"2e-3": 3, "5e-3": 2, "1e-2": 3})
    more = m.beyond_the_edge(low + high + inside)
    assert [(cell["model"], cell["lr"], cell["out"]) for cell in more] == [
        ("A", 0.00083, "x/qwen3-moe-0.00083-1"), ("B", 0.024, "x/qwen3-moe-0.024-1")]
    again = m.beyond_the_edge(tried("A", **{"8e-5": 1, "2e-4": 2}))
    assert [(cell["lr"], cell["out"]) for cell in again] == [(3.3e-05, "x/qwen3-moe-3.3e-05-1")]
    assert m.beyond_the_edge([{"cell": again[0], "choose": 0}])[0]["out"] == "x/qwen3-moe-1.4e-05-1"
    assert m.beyond_the_edge(tried("A", **{f"{i}e-3": i for i in range(1, 9)})) == []  # it has to end


# --- the run

def test_code_of_knows_what_matters(m, monkeypatch):
    before = {task: m.code_of(task, "GPT-2") for task in ("match", "ablate")}
    assert before["match"] != before["ablate"] and before["match"] == m.code_of("match", "GPT-2")
    assert before["match"] != m.code_of("match", "Llama 3")
    monkeypatch.setitem(m.TASKS, "match", m.TASKS["match"] | {"batch_size": 64})
    assert m.code_of("match", "GPT-2") != before["match"] and m.code_of("ablate", "GPT-2") == before["ablate"]


@pytest.mark.parametrize("args, words", [
    (["--tasks", "dance"], "tasks must be some of translate"), (["--rates", "fast"], "rates must be numbers"),
    (["--rates", "0"], "rates must be numbers"), (["--seeds", "0"], "seeds must be at least 1"),
    (["--jobs", "0"], "jobs must be at least 1"), (["--nonsense"], "unrecognized")])
def test_wrong_settings_are_one_line(m, args, words):
    with pytest.raises(SystemExit, match=words) as stop:
        m.parse_config(m.Config, m.PRESETS, args)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)


@pytest.fixture(scope="module")
def ran(m, tmp_path_factory):
    """A whole comparison with two steps per training."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "QUICK", {"translate": 2, "text": 2})
        patch.setattr(m, "WALK", {name: m.WALK[name] for name in ("GPT-2", "mixture (Qwen3 MoE)")})
        cfg = m.Config(out=str(folder / "runs"), results=str(folder / "results"), tasks="translate,text", data="pydocs",
                       rates="4e-3", quick=True, ablate=True)
        yield cfg, folder, m.main(cfg)


def test_a_run_leaves_tables_and_pictures(m, ran):
    cfg, folder, found = ran
    results = folder / "results" / "quick"
    kept = json.loads((results / "compare_architectures.json").read_text())
    assert list(kept["tasks"]) == ["translate", "text", "ablate"] and kept["tasks"] == json.loads(json.dumps(found))
    text = (results / "compare_architectures.md").read_text()
    for task in kept["tasks"]:
        assert (results / f"compare_architectures_{task}.png").stat().st_size > 10_000
        one = kept["tasks"][task]
        assert {"cpu", "threads", "torch", "python", "system", "jobs"} <= set(one["environment"])
        assert all(len(line) == len(one["table"][0]) for line in one["table"])
        assert [line[0] for line in one["table"][1:]] == list(one["models"])
        assert " ".join(one["conclusions"]) in text and one["conclusions"][0].startswith("One seed each")
    costs = kept["tasks"]["text"]["costs"]
    assert set(costs) == set(NAMES) - {"BERT"}
    for one in costs.values():
        assert min(one[key] for key in ("train_tokens_per_second", "first_ms", "token_ms", "answer_ms", "memory_mb",
                                        "cache_bytes", "flops_per_token")) > 0
        assert one["answer_ms"] > one["first_ms"]
    assert kept["tasks"]["text"]["models"]["T5"]["values"] == []  # no bits of every byte for it
    # Two steps teach nothing: bits near those of a uniform guess over the characters.
    guess = math.log2(kept["tasks"]["text"]["models"]["GPT-2"]["tables"] / 96 - 64)
    assert all(value < guess + 1 for one in kept["tasks"]["text"]["models"].values() for value in one["values"])


def test_nothing_that_is_finished_is_trained_again(m, ran, capsys):
    cfg, folder, found = ran
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("runs/quick/*/*/cell.json")}
    assert len(stamps) == 6 + 5 + 2
    gone = random.Random(0).choice(sorted(stamps))
    gone.unlink()
    again = m.main(m.dataclasses.replace(cfg, tasks=gone.parent.parent.name if gone.parent.parent.name != "ablate"
                                         else "text", ablate=gone.parent.parent.name == "ablate"))
    changed = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == [gone]
    # The same training gives the same numbers, and the questions that were not asked again keep their answers.
    for task in again:
        assert again[task]["models"] == json.loads(json.dumps(found[task]["models"]))
    assert list(again) == ["translate", "text", "ablate"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import compare_architectures as c\n"
            "if __name__ == '__main__':\n"
            "    c.QUICK.update(translate=5000)\n"
            "    c.main(c.Config(tasks='translate', quick=True, rates='4e-3', jobs=1, results='results'))\n")
    (tmp_path / "go.py").write_text(code)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "go.py"], cwd=tmp_path, stdout=log, stderr=log,
                                   start_new_session=True)
        try:
            deadline = time.time() + 90
            logs = list(tmp_path.glob("runs/*/translate/*/log.txt"))
            while not any("step     1" in path.read_text() for path in logs) and time.time() < deadline:
                time.sleep(0.2)
                logs = list(tmp_path.glob("runs/*/translate/*/log.txt"))
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    said = (tmp_path / "log").read_text()
    assert "the same command goes on" in said and "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/translate/*/cell.json")) and not (tmp_path / "results").exists()
