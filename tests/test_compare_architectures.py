"""compare_architectures.py: equal sizes, models that are what they are called, honest statistics and sentences."""
import concurrent.futures
import importlib
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

TOY = ("names", "match")


@pytest.fixture(autouse=True)
def few(m, monkeypatch):
    """Numbers to train on are few here: making 60,000 rows takes seconds."""
    all_numbers = m.toy_numbers
    monkeypatch.setattr(m, "toy_numbers", lambda: (all_numbers()[0][:2000], *all_numbers()[1:]))
    m.prepare.cache_clear()
    threads = torch.get_num_threads()
    yield all_numbers
    torch.set_num_threads(threads)  # costs() takes two; whatever is tested next in this process should not


def made(m, task, name):
    return m.begin(task, name, 1, "pydocs")[0]


def scenario(m, tmp_path, fixed):
    numbers = [7, 42, 40215, 999999]
    m.toy_numbers = lambda: (numbers, numbers, numbers)
    for name in ("BERT", "T5", "Llama 3"):
        data = m.names_rows(name, numbers)
        m.share_right(name, "names", made(m, "names", name), data)
        ids, mask, _, match = m.toy_dataset.encoder_pairs(numbers, 1)
        m.share_right(name, "match", made(m, "match", name), m.judge_rows(name, ids, match, 46))
    m.draw_batch("names", "BERT", m.names_rows("BERT", numbers), 2, 1, 1)
    for name in ("+ RoPE", "+ experts = Qwen3 MoE"):
        model = m.make_model(name, dict(n_layer=1, n_embd=32, block_size=8, vocab_size=20))
        model(torch.randint(20, (2, 5)))
    reviews(m, tmp_path)


def reviews(m, tmp_path):
    """A small SST-2: "good" is 1, "bad" is 0, and other words mean nothing. -> share that the baseline gets."""
    rng = random.Random(0)
    for split, size in (("train", 80), ("dev", 40)):
        rows = [f"{' '.join(rng.choices(['film', 'plot', 'actor'], k=4))} {['bad', 'good'][i % 2]}\t{i % 2}\n"
                for i in range(size)]
        (tmp_path / f"sst2.{split}.tsv").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_DATA", str(tmp_path))
        m.reviews.cache_clear()
        share = m.bag_of_words()
        m.prepare("review", "T5", "review")
    m.prepare.cache_clear()
    m.reviews.cache_clear()
    return share


# --- equal size ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["names", "match", "text"])
def test_sizes_are_within_five_percent(m, task):
    names = m.WALK if task == "text" else m.MODELS
    sizes = {name: m.parameters(made(m, task, name), task) for name in names}
    assert all(abs(size / sizes["GPT-2"] - 1) <= 0.05 for size in sizes.values()), sizes
    # What is counted is what the task trains: gradients reach it, and nothing that is left out.
    # (T5 judges with one written token: its decoder's self-attention has nothing to choose from there.)
    for name in ("BERT", "GPT-2") if task != "text" else ():
        model, loss_fn = m.begin(task, name, 1, "pydocs")
        (train, *_), _, _ = m.prepare(task, name, task)
        loss_fn(model, *m.draw_batch(task, name, train, 64, 1, 1)).backward()
        trained = sum(p.numel() for p in model.parameters() if p.grad is not None and p.grad.any())
        assert 0.95 * m.parameters(model, task) < trained <= m.parameters(model, task)


def test_fit_width_finds_the_width(m):
    def build(width):
        return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Linear(width, 64))
    for width in (8, 40, 256):
        assert m.fit_width(build, m.parameters(build(width))) == width
    assert m.fit_width(build, 10) == 8  # smaller is not possible


# --- the walk passes through the scripts' models ---------------------------------------------------------------------
@pytest.mark.parametrize("step, script, model", [
    ("+ GQA = Llama 3", "llama3", "Llama"), ("+ QK-norm = Qwen3", "qwen3_moe", "Qwen3"),
    ("+ experts = Qwen3 MoE", "qwen3_moe", "Qwen3")])
def test_walk_passes_through_the_published_models(m, step, script, model):
    shape = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=20)
    modern = dict(n_kv_head=2, ffn_size=40, tie_weights=True)
    if script == "qwen3_moe":
        modern |= dict(head_size=8, n_experts=4 if "experts" in step else 0)
    cfg = m.qwen3_moe.Config(**shape, n_kv_head=2, head_size=8, ffn_size=40, n_experts=4 if "experts" in step else 0)
    walk = m.Walk(cfg, m.WALK[step])
    theirs = getattr(getattr(m, script), model)(getattr(m, script).Config(**shape, **modern))
    for p in walk.parameters():  # biases and gains too: zeros and ones would hide a missing one
        torch.nn.init.normal_(p, std=0.3)
    wanted = [name for name in theirs.state_dict() if name != "lm_head.weight"]
    assert len(wanted) == len(walk.state_dict())
    theirs.load_state_dict(dict(zip(wanted, matched(wanted, walk), strict=True)), strict=False)
    for norm in (part for part in theirs.modules() if isinstance(part, (torch.nn.RMSNorm, torch.nn.LayerNorm))):
        norm.eps = 1e-5
    for norm in (part for part in walk.modules() if isinstance(part, (torch.nn.RMSNorm, torch.nn.LayerNorm))):
        norm.eps = 1e-5
    ids = torch.randint(20, (3, 16))
    torch.testing.assert_close(walk.double()(ids), theirs.double()(ids), rtol=1e-9, atol=1e-9)


def matched(wanted, walk):
    """The walk's tensors in the order of another model's names."""
    own = dict(walk.state_dict())
    out = []
    for name in wanted:
        for theirs, ours in (("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2"),
                             ("self_attn", "attn")):
            name = name.replace(theirs, ours)
        out.append(own[name])
    return out


def test_walk_changes_one_thing_at_a_time_and_is_causal(m):
    assert isinstance(made(m, "text", "GPT-2"), m.decoder_only.GPT)
    steps = list(m.WALK.values())
    assert all(after[:-1] == before for before, after in zip(steps, steps[1:], strict=False)) and steps[-1] == m.STEPS
    for name in m.WALK:
        model = m.make_model(name, dict(n_layer=2, n_embd=32, block_size=16, vocab_size=20)).eval()
        ids = torch.randint(20, (1, 12))
        other = ids.clone()
        other[0, 5] = (ids[0, 5] + 1) % 20
        a, b = model(ids), model(other)
        assert torch.allclose(a[:, :5], b[:, :5], atol=1e-5) and not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


# --- tasks -----------------------------------------------------------------------------------------------------------
def test_numbers_to_train_choose_and_test_are_apart(m, few):
    train, choose, test = few()
    assert len(choose) == len(test) == 500 and not {*choose} & {*test}
    assert all(m.toy_dataset.is_validation(n) for n in (*choose[:100], *test[:100]))
    assert not {*train} & {*choose, *test}


class Knows(torch.nn.Module):
    """Stands in for a model: gives the answers of `right`, which a test fills in."""

    def __init__(self, right, V):
        super().__init__()
        self.right, self.V = right, V

    def forward(self, *_):
        return F.one_hot(self.right.clamp(min=0), self.V).float()


@pytest.mark.parametrize("name", ["GPT-2", "T5"])
@pytest.mark.parametrize("task", TOY)
def test_share_right_counts_whole_answers(m, task, name):
    numbers = [42, 40215, 700, 13]
    if task == "names":
        data, V = m.names_rows(name, numbers), 46
    else:
        ids, _, _, match = m.toy_dataset.encoder_pairs(numbers, 3)
        data, V = m.judge_rows(name, ids, match, 46), 48
    right = data[-1].clone()
    assert m.share_right(name, task, Knows(right, V), data) == 1.0
    right[1] = (right[1] + 1) % V  # one token of one row is enough
    assert m.share_right(name, task, Knows(right, V), data) == 0.75


def test_bert_writes_blank_by_blank_and_judges_with_its_label(m):
    ids, segments, targets = m.names_rows("BERT", [42, 40215])
    assert (targets == m.toy_dataset.IGNORE).all() and segments.sum(1).tolist() == [10, 10]
    words = [m.toy_dataset.TOY_VOCAB[i] for i in ids[0].tolist()]
    assert words[:6] == ["[CLS]", "4", "2", "[SEP]", "forty", "two"] and words[6:14] == ["\n"] * 8

    class Answers(Knows):
        def label(self, x, mask):
            return F.one_hot(self.right[:, 0], 2).float()

        def hidden(self, ids, mask):
            return ids
    assert m.share_right("BERT", "names", Answers(ids, 46), (ids, segments, targets)) == 1.0
    wrong = ids.clone()
    wrong[1, -1] = 7
    assert m.share_right("BERT", "names", Answers(wrong, 46), (ids, segments, targets)) == 0.5
    pairs, _, _, match = m.toy_dataset.encoder_pairs([5, 6, 7, 8], 1)
    data = m.judge_rows("BERT", pairs, match, 46)
    assert data[2][:, 0].tolist() == (1 - match).tolist()  # class 0 is yes
    assert m.share_right("BERT", "match", Answers(data[2], 2), data) == 1.0


def test_blanks_are_a_random_number_of_the_ten_and_a_function_of_the_step(m):
    data = m.names_rows("BERT", [40215] * 400)
    noisy, segments, targets = m.draw_batch("names", "BERT", data, 400, 1, 1)
    hidden = noisy == m.toy_dataset.MASK
    assert (hidden <= (segments == 1)).all() and torch.equal(hidden, targets != m.toy_dataset.IGNORE)
    counts = hidden.sum(1)
    assert counts.min() <= 1 and counts.max() >= 9 and 4 < counts.float().mean() < 6
    again = m.draw_batch("names", "BERT", data, 400, 1, 1)[0]
    assert torch.equal(noisy, again) and not torch.equal(noisy, m.draw_batch("names", "BERT", data, 400, 1, 2)[0])


def test_verdicts_stand_behind_the_last_real_token(m):
    ids, yes = torch.tensor([[3, 9, 4, 0, 0], [3, 9, 9, 9, 4]]), torch.tensor([1, 0])
    inputs, targets = m.judge_rows("Qwen3", ids, yes, 46)
    assert targets[0].tolist() == [-100, -100, 47, -100, -100] and targets[1].tolist() == [-100] * 4 + [46]
    assert m.judge_rows("T5", ids, yes, 46)[1].tolist() == [[47], [46]]


def test_bag_of_words_is_logistic_regression(m, tmp_path):
    assert reviews(m, tmp_path) == 1.0


# --- statistics ------------------------------------------------------------------------------------------------------
def test_p_value_is_the_t_test(m):
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(1)
    for n in (2, 3, 5, 9):
        for shift in (0.0, 0.7, 3.0):
            d = [rng.gauss(shift, 1) for _ in range(n)]
            assert m.p_value(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=1e-3, abs=1e-4)
    assert m.p_value([2.0, 2.0, 2.0]) < 1e-9 and m.p_value([0.0, 0.0, 0.0]) == pytest.approx(1)
    # By hand, without scipy: df = 1 is Cauchy, P(|t| > 1) = 1/2.
    assert m.p_value([0.0, 1.0]) == pytest.approx(0.5, abs=1e-3)


def test_holm_by_hand_and_equal_models_are_rarely_told_apart(m):
    ps = {("a", "b"): 0.01, ("a", "c"): 0.02, ("b", "c"): 0.06}
    values = {name: [0.0, 0.0] for name in "abc"}
    with pytest.MonkeyPatch.context() as patch:
        order = iter(ps.values())
        patch.setattr(m, "p_value", lambda differences: next(order))
        assert m.certain(values, list(ps)) == {("a", "b"), ("a", "c")}  # 0.01 < 0.05/3, 0.02 < 0.05/2, 0.06 > 0.05
        order = iter([0.03, 0.001, 0.04])
        assert m.certain(values, list(ps)) == {("a", "c")}  # 0.03 > 0.05/2, and it takes 0.04 with it
    rng, claims = random.Random(0), 0
    for _ in range(200):
        equal = {name: [rng.gauss(0, 1) for _ in range(5)] for name in "abcdef"}
        claims += bool(m.certain(equal, [(a, b) for a in "abcdef" for b in "abcdef" if a < b]))
    assert claims <= 20  # 5 % of 200 is 10; by touching ranges it would be about 100


def test_sentences_follow_from_the_numbers(m):
    values = {"A": [100, 102, 101, 99, 100], "B": [200, 210, 190, 205, 195], "C": [198, 212, 189, 206, 197]}
    assert m.conclude("names", values) == "A is ahead of B, C. No other difference is certain."
    assert m.conclude("review", {k: [v / 300 for v in vs] for k, vs in values.items()}) == (
        "C is ahead of A. B is ahead of A. No other difference is certain.")
    walk = {"GPT-2": [2.7, 2.71, 2.7], "+ RoPE": [2.5, 2.51, 2.5], "+ RMSNorm": [2.5, 2.49, 2.51]}
    assert m.conclude("text", walk) == ("+ RoPE: 2.703 -> 2.503, lower. + RMSNorm: 2.503 -> 2.500, no certain change.")
    assert m.conclude("names", {"A": [1], "B": [2]}) == "One seed each: no difference is certain."
    found = {"A": dict(values=values["A"], lr=0.001), "base": dict(values=[7] * 5, lr=0)}
    table = m.markdown("names", found, {"A": (1234, 1.5, 9.6)}, 800)
    assert "(99 to 102, 1 of 5 at the last step or never)" in m.markdown("names", found, {}, 102)
    assert "| A | 1,234 | 1.50 | 10 | 100 (99 to 102) | 0.001 |" in table
    assert "| base | - | - | - | 7 (7 to 7) | - |" in table


# --- search and runs -------------------------------------------------------------------------------------------------
class Bar:
    total = 0

    def update(self):
        pass

    set_postfix_str = staticmethod(lambda text: None)


def test_the_search_goes_on_until_the_best_rate_has_neighbours_on_both_sides(m, tmp_path, monkeypatch):
    asked = []

    def fake(cells, cfg, pool, bar):
        asked.extend(cells)
        return [abs(math.log(cell["lr"] / 2e-2)) for cell in cells]
    monkeypatch.setattr(m, "train_cells", fake)
    found, best = m.search(dict(task="names"), True, m.Config(), None, None)
    assert min(found) < best < max(found) and best == pytest.approx(1.4e-2) and list(found) == sorted(found)
    assert {cell["seed"] for cell in asked} == {m.SEARCH_SEED} and {cell["split"] for cell in asked} == {"choose"}
    assert len(m.search({}, True, m.Config(quick=True), None, None)[0]) == 2
    monkeypatch.setattr(m, "train_cells", lambda cells, *_: [cell["lr"] for cell in cells])
    assert len(m.search({}, False, m.Config(), None, None)[0]) == 8  # a model that likes every rate better is given up


def test_what_is_trained_is_kept_and_read_again(m, tmp_path, monkeypatch):
    cfg, calls = m.Config(out=str(tmp_path)), []
    (tmp_path / "trainings").mkdir()
    monkeypatch.setattr(m, "train_cell", lambda cell: calls.append(cell) or cell["lr"] * 100)
    cells = [dict(task="names", model="T5", lr=lr) for lr in (0.01, 0.02)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert m.train_cells(cells, cfg, pool, Bar()) == [1.0, 2.0] and len(calls) == 2
        assert m.train_cells(cells[::-1], cfg, pool, Bar()) == [2.0, 1.0] and len(calls) == 2
        assert m.train_cells([cells[0] | dict(seed=2)], cfg, pool, Bar()) == [1.0] and len(calls) == 3


@pytest.mark.parametrize("task, name", [("names", "T5"), ("match", "BERT"), ("text", "+ RoPE"), ("names", "Qwen3 MoE")])
def test_one_training_is_a_function_of_its_cell(m, task, name, monkeypatch):
    monkeypatch.setitem(m.TASKS, task, m.TASKS[task] | dict(rows=8))
    (train, *held), V, size = m.prepare(task, name, "pydocs" if task == "text" else task)
    small = [tuple(part[:16] for part in rows) for rows in (train, *held)], V, size
    monkeypatch.setattr(m, "prepare", lambda *_: small)
    cell = dict(task=task, model=name, data="pydocs", lr=1e-3, seed=1, split="test", steps=2)
    value = m.train_cell(cell)
    assert value == (2 if task != "text" else value) and m.train_cell(cell) == value
    if task == "text":
        assert m.train_cell(cell | dict(seed=2)) != value and 4 < value < 12
        assert m.train_cell(cell | dict(lr=1e9)) > value
        assert m.train_cell(cell | dict(split="choose")) != value
    else:
        monkeypatch.setattr(m, "share_right", lambda *_: 1.0)
        assert m.train_cell(cell | dict(steps=60)) == 25  # the first look at which enough are right


def test_a_whole_comparison_in_small(m, tmp_path, monkeypatch, capsys):
    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, jobs, context, start):
            super().__init__(jobs)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(m, "train_cell", lambda cell: len(cell["model"]) + cell["seed"] / 10 + abs(cell["lr"] - 3e-3))
    monkeypatch.setattr(m, "costs", lambda task, names, data: {name: (1, 1.0, 1.0) for name in names})
    found = m.main(m.Config(tasks="names,text", data="pydocs", out=str(tmp_path), seeds=3))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(found) == ["names", "text"] and list(found["names"]) == list(m.MODELS)
    assert all(len(one["values"]) == 3 for task in found.values() for one in task.values())
    assert summary["conclusions"]["names"].startswith("T5 is ahead of BERT") and "| Qwen3 MoE |" in summary["markdown"]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000 and "MFLOP" in capsys.readouterr().out
    for wrong in (dict(tasks="nims"), dict(seeds=0), dict(tasks="match", quick=True)):
        with pytest.raises(ValueError, match="some of names, match, review, text"):
            m.main(m.Config(out=str(tmp_path), **wrong))


def test_flops_of_gpt2_by_hand(m):
    (_, mflop, _), = m.costs("names", ["GPT-2"], "names").values()
    T = m.prepare("names", "GPT-2", "names")[0][0][0].size(1)
    C, V, L = 64, 46, 2
    by_hand = T * 2 * (L * 12 * C * C + C * V) + L * 4 * T * T * C
    assert mflop * 1e6 == by_hand


def test_imports_of_scripts_are_the_scripts(m):
    assert m.decoder_only.__file__ == importlib.import_module("decoder_only").__file__
