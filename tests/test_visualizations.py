"""The pictures by their content: what their axes hold, on models made in seconds and on numbers known beforehand."""
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script

SPEC = {"kind": "numbers"}
CHARS = {"kind": "char", "chars": "\n abcdefghijklmnopqrstuvwxyzRV"}


@pytest.fixture(scope="module")
def m(request):
    """visualizations.py, with the repository on sys.path: it imports the scripts by name."""
    named = request.config.getoption("--script")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield load_script(Path(named).resolve() if named else ROOT / "visualizations.py")


def finish_run(m, models, name, files=()):
    """Make models/<name> look like a finished run of the recipe: summary.json and the files. -> (folder, settings)."""
    _, settings, _, folder = models.recipe(name)
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in files:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"config": dataclasses.asdict(settings), "data": {"name": m.RECIPES[name][2]},
               "results": {"val_loss": {"full": 0.3, "lora": 0.4, "base": 6.0}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder, settings


LOOKS = [{"step": step, "cv": 0.1 * step, "load": [[10, 10, 8, 12], [5, 5, 5, 25]]} for step in (0, 10, 20)]
PAIRS = [{"step": step, "rewards/chosen": 0.1 * step, "rewards/rejected": -0.3 * step, "rewards/margins": 0.4 * step,
          "rewards/accuracies": 0.9, "logps/chosen": -2 - 0.1 * step, "logps/rejected": -4 - step} for step in (10, 20)]


@pytest.fixture(scope="module")
def models(m, tmp_path_factory):
    """A Models whose folders hold models as they are before training, and runs with known numbers."""
    models = m.Models(m.Config(out=str(tmp_path_factory.mktemp("pictures"))))
    for name, spec, vocabulary in (("decoder_only", SPEC, 46), ("decoder_text", CHARS, 30), ("encoder_only", SPEC, 46),
                                   ("encoder_decoder", SPEC, 46)):
        folder, settings = finish_run(m, models, name)
        settings = dataclasses.replace(settings, vocab_size=vocabulary)
        if name == "encoder_only":
            settings.mask_id = 5
        script = m.RECIPES[name][0]
        model = script.build_model(settings)
        script.save_checkpoint(folder / "ckpt.pt", model, script.make_optimizer(model, settings), 0, model.cfg,
                               {"tokenizer": spec})
    # A base, the base plus an update of rank 1, and an adapter whose B is no longer 0.
    folder, settings = finish_run(m, models, "lora_qlora")
    lora = m.lora_qlora
    base = lora.build_model(dataclasses.replace(settings, vocab_size=50, n_embd=64, ffn_size=96))
    lora.save_pretrained(base, base.cfg, folder / "base", lora.ToyTokenizer())
    lora.add_lora(base, settings.targets.split(","), settings.rank, settings.alpha)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    lora.save_adapter(base, settings, folder / "base", folder / "lora")
    full, cfg = lora.from_pretrained(folder / "base")
    for layer in full.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data += torch.outer(torch.ones(len(layer.weight)), torch.ones(layer.weight.size(1)))
    lora.save_pretrained(full, cfg, folder / "full", lora.ToyTokenizer())
    # Runs of which only the numbers are drawn.
    for name in ("experts_none", "experts_aux"):
        folder, _ = finish_run(m, models, name, [("ckpt.pt", [])])
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"looks": LOOKS}))
    finish_run(m, models, "dpo", [("dpo/preferences.jsonl", PAIRS)])
    rows = [{"update": i + 1, "reward": 0.2 + 0.05 * i, "kl": 0.1 * i} for i in range(10)]
    finish_run(m, models, "ppo_grpo", [(f"{way}/metrics.jsonl", rows) for way in ("reinforce", "grpo", "ppo")])
    return models


@pytest.fixture(scope="module")
def drawn(m, models):
    """name -> its figure, each drawn once."""
    figures = {}

    def draw(name):
        if name not in figures:
            options = {"steps": 2} if name == "gradients" else {}
            figures[name] = m.FIGURES[name](models, models.cfg, **options)
        return figures[name]
    return draw


def image(ax):
    """What an axes shows as an image."""
    return torch.tensor(ax.images[0].get_array().tolist(), dtype=torch.float64)


def panels(figure):
    """The axes that are no colour bars."""
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


NAMES = ("positions rope buckets masks attention architectures sampling beams schedule gradients embeddings experts "
         "cache softmax nf4 lora dpo reward").split()


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_says_what_it_shows(m, drawn, tmp_path, name):
    figure = drawn(name)
    title = figure.get_suptitle()
    assert len(title) > 30 and max(map(len, title.split("\n"))) < 125 and "nan" not in title
    for ax in panels(figure):
        assert name == "architectures" or ax.get_title() or ax.get_ylabel() or ax.get_xlabel()
    # Both files are whole: PNG's first and last chunk, an SVG with the picture's own text in it.
    png, svg = m.save_figure(figure, tmp_path, name)
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND" and len(content) > 10_000
    assert "<svg" in svg.read_text() and svg.read_text().rstrip().endswith("</svg>")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.png", f"{name}.svg"]
    # No text of the picture leaves it, and no two titles cover each other.
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    boxes = [ax.title.get_window_extent(renderer) for ax in panels(figure) if ax.get_title()]
    boxes.append(figure._suptitle.get_window_extent(renderer))
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), f"{one} covers {other}"
    assert all(box.x0 >= -1 and box.x1 <= figure.bbox.width + 1 for box in boxes)


def test_the_list_is_complete(m):
    assert list(m.FIGURES) == NAMES and all(name in m.__doc__ for name in NAMES)


def test_same_seed_same_file(m, models, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        m.save_figure(m.figure_rope(models, models.cfg), folder, "rope")
    for kind in ("png", "svg"):
        assert (first / f"rope.{kind}").read_bytes() == (second / f"rope.{kind}").read_bytes()


def test_positions(m, drawn, models):
    _, computed, learned = map(image, (ax for ax in panels(drawn("positions"))))
    assert computed.diagonal().min() > 0.999 and learned.diagonal().min() > 0.999
    # the sinusoids' similarity is a function of the distance, the learned table's is not
    assert all(computed.diagonal(d).std(unbiased=False) < 1e-5 for d in range(1, 10))
    assert any(learned.diagonal(d).std() > 0.01 for d in range(1, 10))
    table = models.load("decoder_only")[0].transformer.wpe.weight
    assert learned[2, 5].item() == pytest.approx(torch.cosine_similarity(table[2], table[5], dim=0).item(), abs=1e-5)


def test_rope(drawn):
    axes = panels(drawn("rope"))
    scores = next(image(ax) for ax in axes if ax.images)
    assert scores.shape == (24, 24) and scores.std() > 0.5
    assert all((scores.diagonal(d).max() - scores.diagonal(d).min()) < 1e-4 for d in range(-23, 24))
    # the curve holds all of them, one value per distance
    x, y = axes[-1].lines[0].get_data()
    by_distance = {}
    for d, value in zip(x, y, strict=True):
        by_distance.setdefault(int(d), []).append(value)
    assert len(by_distance) == 47 and all(max(v) - min(v) < 1e-4 for v in by_distance.values())
    # plane 0 turns by a radian per token: arrow 1 ends at (cos 1, sin 1)
    ends = [text.xy for text in axes[0].texts if hasattr(text, "xy")]
    assert len(ends) == 8 and ends[1] == pytest.approx((math.cos(1), math.sin(1)), abs=1e-5)


def test_buckets(m, drawn, models):
    ax, encoder, _ = panels(drawn("buckets"))
    (d, both), (_, past) = (line.get_data() for line in ax.lines)
    d, both, past = (list(map(int, part)) for part in (d, both, past))
    left = [b for x, b in zip(d, both, strict=True) if x <= 0]
    assert left == sorted(left, reverse=True) and set(both) <= set(range(32))  # further away: never a smaller bucket
    assert all(b >= 16 for x, b in zip(d, both, strict=True) if x > 0)
    assert past == sorted(past, reverse=True) and max(past) == 31 and past[d.index(-15)] == 15
    # the learned panel shows the table of the model
    table = models.load("encoder_decoder")[0].encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias
    steps, bias = encoder.lines[1].get_data()
    for step, value in zip(steps, bias, strict=True):
        bucket = m.encoder_decoder.relative_bucket(torch.tensor(int(step)), False)
        assert value == pytest.approx(table.weight[bucket, 1].item(), abs=1e-6)


def test_masks(m, drawn):
    masks = m.six_masks()
    assert all(mask.dtype == torch.bool for mask in masks.values()) and len(masks) == 6
    bidirectional, causal, padded, prefix, cross, window = masks.values()
    assert torch.equal(causal, torch.ones(8, 8, dtype=torch.bool).tril())
    assert not bidirectional[:, 6:].any() and bidirectional[:, :6].all()
    assert not padded[:, :2].any() and torch.equal(padded[2:, 2:], causal[2:, 2:])
    assert prefix[:, :4].all() and torch.equal(prefix[:, 4:], causal[:, 4:])
    assert cross.shape == (5, 8) and torch.equal(cross, bidirectional[:5])
    assert window[7].tolist() == [True, True, False, False, False, True, True, True] and not window.triu(1).any()
    for ax, mask in zip(panels(drawn("masks")), masks.values(), strict=True):
        assert torch.equal(image(ax).bool(), mask) and str(int(mask.sum())) in ax.get_title()


def test_attention(m, drawn, models):
    encoder, decoder, cross = panels(drawn("attention"))
    for ax in (encoder, decoder, cross):
        assert torch.allclose(image(ax).sum(1), torch.ones(1, dtype=torch.float64), atol=1e-5)
    assert not image(decoder).triu(1).any() and image(encoder).triu(1).any()
    labels = [tick.get_text() for tick in decoder.get_yticklabels()]
    assert labels == [*"40215", "=", "forty", "thousand", "two", "hundred", "fifteen"]
    assert [tick.get_text() for tick in cross.get_xticklabels()] == [*"40215", "end"]
    # what the hooks saw is what the model computes: weights @ v gives the layer's own output
    model = models.load("decoder_only")[0]
    ids = torch.tensor([[10, 6, 2, 38, 1]])
    q, k, v = m.queries_keys_values(model, ids)[0]
    weights = m.attention_weights(model, ids)[0]
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[:5]
    block = model.transformer.h[0]
    mine = block.attn.c_proj((weights @ v[0]).transpose(0, 1).reshape(1, 5, -1))
    assert torch.allclose(mine, block.attn(block.ln_1(x)), atol=1e-5)


def test_encoder_weights_are_those_of_the_model(m, models):
    # the same for the encoder, segments included: the second layer's output from its weights
    model = models.load("encoder_only")[0]
    ids = torch.tensor([[3, 10, 6, 4, 38, 20, 4]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    q, k, v = m.queries_keys_values(model, ids)[1]
    got = []
    dense = model.bert.encoder["layer"][1].attention["output"]["dense"]
    hook = dense.register_forward_pre_hook(lambda part, inputs: got.append(inputs[0]))
    model.hidden(ids, segments=segments)
    hook.remove()
    mine = (m.attention_weights(model, ids)[1] @ v[0]).transpose(0, 1).reshape(1, 7, -1)
    assert torch.allclose(mine, got[0], atol=1e-5)


def test_architectures(drawn, models):
    texts = " ".join(text.get_text() for text in drawn("architectures").axes[0].texts)
    title = drawn("architectures").get_suptitle()
    for name in ("encoder_only", "decoder_only", "encoder_decoder"):
        model = models.load(name)[0]
        assert f"{sum(p.numel() for p in model.parameters()):,}" in title
    for word in ("both ways", "causal", "CROSS-ATTENTION", "keys and values", "memory (B, S, 64)"):
        assert word in texts
    # the boxes of the two single stacks add up to the whole
    counts = [int(number.replace(",", "")) for number in re.findall(r"\b\d[\d,]{2,}\b", texts)]
    encoder, decoder = (sum(p.numel() for p in models.load(name)[0].parameters())
                        for name in ("encoder_only", "decoder_only"))
    assert sum(counts[:3]) == encoder and sum(counts[3:6]) == decoder


def test_sampling(m, drawn):
    axes = panels(drawn("sampling"))
    heights = {ax.get_title().split(" (")[0]: [bar.get_height() for bar in ax.patches] for ax in axes}
    assert heights["temperature 0: argmax"] == [1.0] + [0.0] * 13
    assert sum(h > 0 for h in heights["top-k 4"]) == 4
    top = [heights[f"temperature {t}"][0] for t in (0.5, 1, 2)]
    assert top[0] > top[1] > top[2]  # colder: more weight on the likeliest
    dots = axes[0].lines[0].get_ydata()
    assert list(dots) == sorted(dots, reverse=True)
    # top-p keeps the smallest set that reaches p
    needed = 1 + sum(total < 0.6 for total in itertools.accumulate(map(float, dots)))
    if needed <= 14:
        assert sum(h > 0 for h in heights["top-p 0.6"]) == needed
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    share = m.draw_frequencies(logits, torch.Generator().manual_seed(0), temperature=1.0, top_p=0.6)
    assert share[2:].sum() == 0 and share[0].item() == pytest.approx(0.625, abs=0.03)


def test_beams(m, drawn, models):
    model, _, tokenizer = models.load("decoder_text")
    ids = torch.tensor([tokenizer.encode("the ")])
    answer, score, levels, greedy, sums = m.watch_beams(model, ids, 5, 3)
    own, best = m.decoder_only.beam_search(model, ids, 5, num_beams=3)
    assert torch.equal(answer, own[0, 0]) and score == best[0, 0].item()
    # the last level's best leaf, traced back, is beam_search's own answer, with its score
    kept = [[one for one in level if one[3]] for level in levels]
    assert [len(level) for level in kept] == [3, 3, 3, 3, 1]
    place, path = 0, []
    for level in reversed(kept):
        path.append(level[place][1])
        place = level[place][2]
    assert path[::-1] == own[0, 0].tolist() and kept[-1][0][0] / 5 == pytest.approx(score, abs=1e-5)
    # kept = the three best of a level, and each is its parent plus something negative
    for before, level in itertools.pairwise(kept):
        assert all(one[0] < before[one[2]][0] for one in level)
    assert all([one[3] for one in level][:3] == [True] * 3 for level in levels[:-1])
    assert torch.equal(greedy, m.decoder_only.generate(model, ids, 5)[0]) and sums == sorted(sums, reverse=True)
    # the search is left as it was
    assert m.decoder_only.reorder.__name__ == "reorder" and m.decoder_only.decode_step.__name__ == "decode_step"
    texts = [text.get_text() for text in drawn("beams").axes[0].texts]
    assert "greedy" in texts and "winner" in [t.get_text() for t in drawn("beams").axes[0].get_legend().texts]


def test_schedule(m, drawn):
    small, large = panels(drawn("schedule"))
    script = m.decoder_only
    cfg = script.Config()
    steps, rates = small.lines[0].get_data()
    assert steps[0] == 1 and steps[-1] == cfg.max_steps and max(rates) == pytest.approx(cfg.lr, rel=0.01)
    assert rates[0] == pytest.approx(cfg.lr / cfg.warmup_steps) and rates[-1] == pytest.approx(0.1 * cfg.lr)
    gpt2 = large.lines[0].get_data()
    assert gpt2[0][-1] == 600_000 and max(gpt2[1]) == pytest.approx(6e-4, rel=0.05)


def test_gradients(m, drawn):
    at_start = {line.get_label(): list(line.get_ydata()) for line in panels(drawn("gradients"))[0].lines}
    assert all(len(norms) == 16 and min(norms) > 0 for norms in at_start.values())
    good, neither = at_start["residual, norm (GPT-2)"], at_start["neither"]
    assert 0.05 < good[0] / good[-1] < 50           # arrives whole
    assert neither[0] < 1e-10 * neither[-1]         # arrives not at all
    assert good[0] > neither[0]
    # depth is what does it: with two blocks there is little to lose
    shallow, _ = m.gradient_norms(False, False, 0, depth=2)
    assert shallow[0] > 1e-4 * shallow[-1]


def test_embeddings(m, drawn):
    ax = drawn("embeddings").axes[0]
    assert sorted(text.get_text() for text in ax.texts) == sorted(
        [*m.decoder_only.UNITS, *m.decoder_only.TENS, "hundred", "thousand"])
    assert [len(line.get_xdata()) for line in ax.lines] == [10, 10, 8, 2]
    # a table of two directions comes back whole, and the larger one first
    table = torch.zeros(46, 5)
    g = torch.Generator().manual_seed(0)
    table[:, 1], table[:, 3] = 3 * torch.randn(46, generator=g), torch.randn(46, generator=g)
    table[:, 4] = 50.0  # the same for all: it is taken off, or it would be the first direction
    words, flat, share = m.word_map(table)
    rows = [m.decoder_only.TOY_VOCAB.index(word) for word in words]
    assert sum(share) == pytest.approx(1) and share[0] > share[1]
    mine, exact = (torch.pdist(x) for x in (flat, table[rows]))
    assert torch.allclose(mine, exact, atol=1e-4)


def test_experts(drawn):
    none, aux, cv = panels(drawn("experts"))
    # layer 2 ends most unequal (25 of 40 visits to expert 3), so it is the one that is shown
    top = none.collections[3].get_paths()[0].vertices
    assert "layer 2" in none.get_ylabel() and len(none.collections) == 4
    assert min(y for x, y in top) == pytest.approx(15 / 40) and max(y for x, y in top) == pytest.approx(1)
    assert list(cv.lines[0].get_ydata()) == [0.0, 1.0, 2.0] and "62%" in drawn("experts").get_suptitle()


def test_experts_are_watched(m, tmp_path, monkeypatch):
    line = "--preset numbers --balance aux --max-steps 20 --batch-size 8 --n-layer 1 --n-embd 16 --expert-size 8"
    monkeypatch.setitem(m.RECIPES, "experts_aux", (m.qwen3_moe, line, "numbers", "ckpt.pt"))
    numbers = m.qwen3_moe.draw_numbers
    monkeypatch.setattr(m.qwen3_moe, "draw_numbers", lambda count, *rest: numbers(min(count, 600), *rest))
    looks = m.Models(m.Config(out=str(tmp_path))).summary("experts_aux")["looks"]
    assert [look["step"] for look in looks] == [0, 10, 20]
    assert len({sum(look["load"][0]) for look in looks}) == 1  # the same lines each time


def test_cache(m, drawn):
    lines = drawn("cache").axes[0].lines
    for label, (kind, cfg, size) in m.cache_kinds().items():
        cache = kind(cfg, 1, 40, like=torch.zeros(1))
        keys, values = cache.stores[0][:2]
        # bytes of the tensors, without the one column that is written by pads
        real = cfg.n_layer * sum(t[:, :, :40].nbytes for t in cache.stores[0][:4 if "int8" in label else 2])
        assert keys.shape == values.shape and real == 40 * size == m.measured_cache_bytes(kind, cfg, 40)
        line = next(line for line in lines if line.get_label().startswith(label + ":"))
        at = dict(zip(*line.get_data(), strict=True))
        most = cfg.sinks + cfg.window if "window" in label else math.inf
        assert at[32] == pytest.approx(32 * size / 1e6) and at[1024] == pytest.approx(size * min(1024, most) / 1e6)
    assert "differ by 0 bytes" in drawn("cache").get_suptitle()


def test_softmax(drawn):
    scores, z, exact = panels(drawn("softmax"))
    heights = torch.tensor([bar.get_height() for bar in scores.patches if hasattr(bar, "get_height")])
    assert len(heights) == 40
    ends, sofar = exact.lines[0].get_data()
    assert list(ends) == list(range(5, 41, 5))
    for end, value in zip(ends, sofar, strict=True):
        assert value == pytest.approx(heights[:int(end)].logsumexp(0).item(), abs=1e-4)
    assert sofar[-1] == pytest.approx(exact.lines[1].get_ydata()[0], abs=1e-4)


def test_nf4(m, drawn):
    levels, errors = panels(drawn("nf4"))
    nf4, even = ([path.vertices[0, 0] for path in lines.get_paths()] for lines in levels.collections)
    assert len(nf4) == len(even) == 16 and nf4[0] == even[0] == -1 and nf4[-1] == even[-1] == 1
    assert nf4 == sorted(nf4) and 0.0 in nf4 and nf4[8] - nf4[7] < even[8] - even[7] < nf4[-1] - nf4[-2]
    # on normal weights NF4 wins, by the error that brute force finds too
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    mine, other = m.four_bit_errors(weight)
    rows = weight.view(-1, 64)
    scale = rows.abs().amax(1, keepdim=True)
    for error, level in ((mine, m.lora_qlora.NF4), (other, torch.linspace(-1, 1, 16))):
        nearest = level[(rows[..., None] / scale[..., None] - level).abs().argmin(-1)] * scale
        assert error == pytest.approx(((nearest - rows).square().mean() / rows.square().mean()).sqrt().item(), rel=1e-3)
    assert mine < other


def test_lora(m, drawn, models):
    full, lora = panels(drawn("lora"))
    rank = models.recipe("lora_qlora")[1].rank
    # the full update was made of rank 1, the adapter has rank 4: what follows is rounding
    assert full.lines[0].get_ydata()[0] > 10 and max(full.lines[0].get_ydata()[1:]) < 1e-2
    values = lora.lines[0].get_ydata()
    assert values[rank - 1] > 0.1 and max(values[rank:]) < 1e-2
    assert "100% of the squared update" in full.get_title()


def test_dpo_and_reward(drawn):
    rewards, logps = panels(drawn("dpo"))
    shown = {line.get_label(): list(line.get_ydata()) for line in rewards.lines}
    assert shown["chosen"] == [1.0, 2.0] and shown["rejected"] == [-3.0, -6.0]
    assert shown["margin"] == [4.0, 8.0]
    assert list(logps.lines[1].get_ydata()) == [-14, -24]
    reward, kl = panels(drawn("reward"))
    lines = {line.get_label(): line for line in reward.lines}
    # means of five: 0.2 .. 0.4 and 0.45 .. 0.65; a rollout of GRPO has 512 answers, of PPO 256
    assert list(lines["PPO"].get_ydata()) == pytest.approx([0.3, 0.55])
    assert list(lines["PPO"].get_xdata()) == [1280, 2560] and list(lines["GRPO"].get_xdata()) == [2560, 5120]


def test_unknown_names_are_one_line(m, tmp_path, run_script, capsys):
    with pytest.raises(SystemExit) as stopped:
        m.parse_config(m.Config, m.PRESETS, ["--only", "rope,nonsense"])
    assert str(stopped.value).startswith("error:") and "\n" not in str(stopped.value)
    assert "'nonsense'" in str(stopped.value) and all(name in str(stopped.value) for name in NAMES)


def test_one_command_each(m, tmp_path, capsys):
    m.main(m.parse_config(m.Config, m.PRESETS, ["--only", "masks,schedule", "--out", str(tmp_path / "new")]))
    out = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        *(f"{name}.{kind}" for name in ("masks", "schedule") for kind in ("png", "svg")), "summary.json"]
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary["figures"] == ["masks.png", "schedule.png"] and summary["results"]["pictures"] == 2
    assert re.search(r"^masks .*masks\.png masks\.svg$", out, re.M) and "Next:" in out and "rope" not in out


def test_training_happens_once_and_only_whole_runs_count(m, tmp_path, monkeypatch, capsys):
    line = "--preset numbers --max-steps 2 --batch-size 8 --n-layer 1 --n-embd 16 --n-head 1"
    numbers, trained = m.decoder_only.draw_numbers, []
    monkeypatch.setattr(m.decoder_only, "draw_numbers", lambda count, *rest: numbers(min(count, 50), *rest))
    monkeypatch.setitem(m.RECIPES, "decoder_only", (m.decoder_only, line, "numbers", "ckpt.pt"))
    real = m.decoder_only.train
    monkeypatch.setattr(m.decoder_only, "train", lambda *a, **k: (trained.append(1), real(*a, **k))[1])
    cfg = m.Config(out=str(tmp_path))
    folder = m.Models(cfg).folder("decoder_only")
    assert len(trained) == 1 and "step     1" in (folder / "train.log").read_text()
    m.Models(cfg).load("decoder_only")
    assert len(trained) == 1                                   # found again
    m.Models(dataclasses.replace(cfg, seed=5)).folder("decoder_only")
    assert len(trained) == 2                                   # another seed is another model
    (folder / "summary.json").unlink()
    m.Models(dataclasses.replace(cfg, seed=5)).folder("decoder_only")
    assert len(trained) == 3                                   # a checkpoint alone is no finished run
    # stopped while it trains anew: the old summary must not vouch for what lies there now
    monkeypatch.setattr(m.decoder_only, "train", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        m.Models(dataclasses.replace(cfg, seed=6)).folder("decoder_only")
    assert not (folder / "summary.json").exists() and "next time" in capsys.readouterr().err


def test_runs_that_are_there_are_preferred(m, models, tmp_path):
    theirs = models.recipe("dpo")[3].parent
    cfg = m.Config(out=str(tmp_path), models=str(theirs), seed=99)
    assert m.Models(cfg).folder("dpo") == theirs / "dpo"
    # but not one of other data
    summary = json.loads((theirs / "dpo" / "summary.json").read_text())
    (tmp_path / "other" / "dpo" / "dpo").mkdir(parents=True)
    (tmp_path / "other" / "dpo" / "dpo" / "preferences.jsonl").write_text("")
    (tmp_path / "other" / "dpo" / "summary.json").write_text(json.dumps(summary | {"data": {"name": "preference"}}))
    assert not m.Models(cfg).finished("dpo", tmp_path / "other" / "dpo", exact=False)
