"""The pictures by their content: what their axes hold, on models that have had one or two steps of training."""
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script

NAMES = ("architectures positions rope buckets attention scale softmax gradients embeddings nf4 sampling "
         "cache").split()


@pytest.fixture(scope="module")
def m(request):
    """visualizations.py, with the repository on sys.path: it imports the scripts by name."""
    named = request.config.getoption("--script")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield load_script(Path(named).resolve() if named else ROOT / "visualizations.py")


@pytest.fixture(scope="module")
def cfg(m, tmp_path_factory):
    return m.Config(out=str(tmp_path_factory.mktemp("pictures")), steps_share=0.003)


@pytest.fixture(scope="module")
def drawn(m, cfg):
    """name -> its figure, each drawn once."""
    figures = {}

    def draw(name):
        if name not in figures:
            figures[name] = m.PICTURES[name](cfg)
        return figures[name]
    return draw


def numbers(figure):
    """The numbers in the sentence above a picture, as they are written there."""
    return re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?%?", figure.get_suptitle())


def image(ax):
    return torch.tensor(ax.images[0].get_array().tolist())


def panels(figure):
    """The axes that are no color bars."""
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def y_of(line):
    return [float(y) for y in line.get_ydata()]


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_can_be_read(drawn, name):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    figure = drawn(name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    sentence, renderer = figure.get_suptitle(), canvas.get_renderer()
    assert len(sentence) > 40 and "nan" not in sentence and numbers(figure)
    for ax in panels(figure):
        assert name == "architectures" or ax.get_ylabel() or ax.get_yticklabels() and ax.get_xlabel()
        # A legend must not cover what it explains. (Curves of half-trained models lie elsewhere: looked at by hand.)
        if ax.get_legend() and name != "gradients":
            box = ax.get_legend().get_window_extent(renderer)
            for line in ax.lines:
                points = ax.transData.transform(line.get_xydata())
                assert not any(box.contains(x, y) for x, y in points), (name, line.get_label())
    # Letters of 8 points and more; no title or label leaves the picture.
    assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text))
    labels = [label for ax in figure.axes for label in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    for box in (text.get_window_extent(renderer) for text in (figure._suptitle, *labels) if text.get_text()):
        assert box.x0 > -2 < box.y0 and box.x1 < figure.bbox.width + 2 and box.y1 < figure.bbox.height + 2, box


def test_the_list_is_complete(m):
    assert list(m.PICTURES) == NAMES and all(re.search(rf"\b{name}\b", m.__doc__) for name in NAMES)


def test_architectures_counts(m, cfg, drawn):
    models = [m.build(cfg, name)[1] for name in ("encoder", "decoder", "translator")]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert numbers(drawn("architectures")) == ["64", *(f"{size:,}" for size in sizes)]
    # Embeddings, layers and heads of the encoder together are all of it.
    boxes = [text.get_text() for text in drawn("architectures").axes[0].texts if text.get_text()]
    parts = [int(box.split("\n")[-1].replace(",", "")) for box in boxes[1:6] if re.search(r"\n[\d,]+$", box)]
    assert sum(parts) == sizes[0] and len(parts) == 3


def test_positions(m, drawn):
    table, sines, learned = map(image, panels(drawn("positions")))
    # The paper's formula: sin(pos / 10000^(2i/C)), here all sines first.
    assert abs(table[7, 5] - torch.sin(torch.tensor(7 / 10_000 ** (10 / 128)))) < 1e-5
    assert abs(table[7, 64 + 5] - torch.cos(torch.tensor(7 / 10_000 ** (10 / 128)))) < 1e-5
    for matrix in (sines, learned):
        assert torch.allclose(matrix.diagonal(), torch.ones(64)) and torch.allclose(matrix, matrix.T, atol=1e-6)
    found = numbers(drawn("positions"))
    assert found[1:3] == [f"{sines.diagonal(d).mean():.2f}" for d in (1, 32)]
    assert found[-1] == f"{learned.diagonal(1).max() - learned.diagonal(1).min():.2f}" and float(found[-2]) < 1e-5


def test_rope(drawn):
    _, _, ax = panels(drawn("rope"))
    x, y = (torch.tensor(values.tolist()) for values in (ax.lines[1].get_xdata(), ax.lines[1].get_ydata()))
    spreads = [(y[x == d].max() - y[x == d].min()).item() for d in x.unique()]
    assert len(spreads) == 47 and max(spreads) < 1e-4 < y.std()
    assert numbers(drawn("rope"))[0] == f"{y.abs().max():.1f}"


def test_buckets(drawn):
    ax = drawn("buckets").axes[0]
    assert numbers(drawn("buckets"))[-4:] == ["7", "91", "15", "113"]
    # The encoder's bands, then the decoder's: all of 32 buckets (16 would be "0 ahead"), no gap between two bands.
    assert sorted(int(text.get_text()) for text in ax.texts) == sorted([*range(16), *range(17, 32), *range(32)])
    edges = [tuple(band.get_paths()[0].get_extents().intervalx) for band in ax.collections]
    for row, end in ((edges[:31], 160.5), (edges[31:], 0.5)):
        assert all(a[1] == b[0] for a, b in zip(sorted(row), sorted(row)[1:], strict=False))
        assert (min(row)[0], max(row)[1]) == (-160.5, end)


def test_attention_maps(m, cfg, drawn):
    encoder, decoder, cross = panels(drawn("attention"))
    for ax in (encoder, decoder, cross):
        assert torch.allclose(image(ax).sum(1), torch.ones(len(image(ax))), atol=1e-5)
    assert image(decoder).triu(1).abs().max() == 0 < image(encoder).min()
    rows = [label.get_text() for label in decoder.get_yticklabels()]
    assert rows[5:7] == ["= → forty", "forty → thousand"] and rows[-1] == "fifteen → end"
    # The share in the sentence is what the picture shows: forty at 4, two at 2, fifteen at 1 and 5.
    for i, (ax, row, first) in enumerate(((encoder, 7, 1), (decoder, 5, 0), (cross, 0, 0))):
        w = image(ax)[row:, first:]
        assert numbers(drawn("attention"))[2 * i] == f"{(w[0, 0] + w[2, 2] + w[4, 3] + w[4, 4]) / 3:.0%}"


def test_attention_weights_are_the_models_own(m, cfg):
    _, model, _ = m.build(cfg, "decoder")
    real, ids = torch.nn.functional.scaled_dot_product_attention, torch.tensor([[5, 9, 2, 38]])
    weights = m.attention_weights(model, ids)
    block, x = model.transformer.h[0], model.transformer.wte(ids) + model.transformer.wpe.weight[:4]
    q, k, _ = block.attn.c_attn(block.ln_1(x)).split(64, -1)
    scores = (q[0, :, 16:32] @ k[0, :, 16:32].T / 4).masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf)
    assert torch.allclose(weights[0, 1], scores.softmax(-1), atol=1e-6)
    with pytest.raises(IndexError):
        m.attention_weights(model, torch.tensor([[99]]))
    assert torch.nn.functional.scaled_dot_product_attention is real  # put back, also behind an error


def test_scale(drawn):
    divided, undivided, even = drawn("scale").axes[0].lines
    assert numbers(drawn("scale"))[2:4] == [f"{y_of(divided)[5]:.0%}", f"{y_of(undivided)[5]:.0%}"]
    assert max(y_of(divided)) < 0.25 and y_of(undivided)[-1] > 0.9 and y_of(even)[0] == 1 / 64


def test_softmax(drawn):
    top, bottom = panels(drawn("softmax"))
    scores = torch.tensor([float(bar.get_height()) for bar in top.patches if hasattr(bar, "get_height")][:40])
    old, new = ([float(bar.get_height()) for bar in group] for group in bottom.containers)
    # What is carried over and what is added are the tile's sum in units of exp(maximum so far).
    for i in range(8):
        seen = scores[:5 * (i + 1)]
        assert abs(old[i] + new[i] - (seen - seen.max()).exp().sum()) < 1e-4
        assert abs(new[i] - (scores[5 * i:5 * i + 5] - seen.max()).exp().sum()) < 1e-4
    rises = sum(scores[:n + 5].max() > scores[:n].max() for n in range(5, 40, 5))
    assert numbers(drawn("softmax"))[2] == str(int(rises))


def test_gradients(m, drawn):
    left, right = panels(drawn("gradients"))
    found = numbers(drawn("gradients"))[1:]
    for i in range(3):
        now, first = y_of(left.lines[2 * i]), y_of(left.lines[2 * i + 1])
        assert len(now) == len(first) == 16 and now != first
        assert found[2 * i:2 * i + 2] == [f"{now[0] / now[-1]:.2g}", f"{y_of(right.lines[i])[-1]:.2f}"]
    # The first wiring is decoder_only.py's own block.
    _, model, _ = m.build(m.Config(), "decoder")
    block, x = model.transformer.h[0], torch.randn(1, 5, 64)
    outputs = [wiring(block, x) for wiring in m.WIRINGS.values()]
    assert torch.equal(outputs[0], block(x)) and not torch.allclose(outputs[1], outputs[2])


def test_embeddings(m, cfg, drawn):
    ax = drawn("embeddings").axes[0]
    assert [text.get_text() for text in ax.texts] == [word for group, _, _ in m.GROUPS.values() for word in group]
    table = m.trained(cfg, "decoder").transformer.wte.weight.detach()
    x = table[[m.toy_dataset.TOY_VOCAB.index(text.get_text()) for text in ax.texts]]
    # On the map distances can only shrink; and it is the flattest of all maps: its spread is what the labels say.
    places = torch.tensor([text.xy for text in ax.texts])
    assert (torch.cdist(places, places) <= torch.cdist(x, x) + 1e-3).all()
    assert places.mean(0).abs().max() < 1e-5  # the mean is taken off
    share = places.square().sum(0) / (x - x.mean(0)).square().sum()
    assert f"({share[0]:.0%} of" in ax.get_xlabel() and f"({share[1]:.0%})" in ax.get_ylabel()


def test_nf4(m, cfg, drawn):
    ax = drawn("nf4").axes[0]
    combs = [torch.tensor([path.vertices[0, 0] for path in comb.get_paths()]) for comb in ax.collections]
    weights = [part.weight.detach().view(-1, 64) for part in m.trained(cfg, "text").transformer.h.modules()
               if isinstance(part, torch.nn.Linear)]
    # Each weight of a block goes to the nearest tooth; NF4's scales are 8-bit numbers, which changes the last digit.
    blocks = torch.cat(weights)
    scale = blocks.abs().amax(1, keepdim=True)
    for said, comb in zip(numbers(drawn("nf4"))[2:5:2], combs, strict=True):
        off = ((blocks / scale)[..., None] - comb.float()).abs().amin(-1) * scale
        assert len(comb) == 16 and abs(float(said[:-1]) - 100 * off.norm() / blocks.norm()) < 0.11


def test_sampling(drawn):
    for ax in panels(drawn("sampling")):
        kinds, share = int(re.search(r": (\d+) of", ax.get_title())[1]), [bar.get_height() for bar in ax.patches]
        model = torch.tensor(y_of(ax.lines[0]))
        if "top-k 4" in ax.get_title():
            assert kinds == 4 and (torch.tensor(share[:4]) - model[:4] / model[:4].sum()).abs().max() < 0.03
        if ax.get_title().startswith("temperature 1:"):
            assert (torch.tensor(share) - model).abs().max() < 0.03
        if "argmax" in ax.get_title():
            assert kinds == 1 and share[0] == 1.0
    assert "4 with top-k 4" in drawn("sampling").get_suptitle()


def test_cache(drawn):
    ax = drawn("cache").axes[0]
    curves = [line for line in ax.lines if len(line.get_xdata()) > 1]
    at = {int(x): [y_of(curve)[i] for curve in curves] for i, x in enumerate(curves[0].get_xdata())}
    # 2 * 32 layers * 8 heads * 128 numbers * 2 bytes = 128 KiB a token; 4 times that with 32 key heads.
    assert at[2 ** 17] == [64.0, 16.0, 1028 * 128 / 2 ** 20] and at[16] == [2 ** -7, 2 ** -9, 2 ** -9]
    for dot in (line for line in ax.lines if len(line.get_xdata()) == 1):
        assert any(abs(dot.get_ydata()[0] - y) < 1e-12 for y in at[int(dot.get_xdata()[0])])
    assert numbers(drawn("cache"))[-3:] == ["64", "16", "0.13"]


def test_a_model_is_trained_once(m, tmp_path, monkeypatch):
    calls, real = [], m.decoder_only.train
    monkeypatch.setattr(m.decoder_only, "train", lambda *arguments: calls.append(arguments[5]) or real(*arguments))
    cfg = m.Config(out=str(tmp_path), steps_share=0.005)  # 3 steps
    first = m.trained(cfg, "decoder").state_dict()
    again = m.trained(cfg, "decoder").state_dict()
    assert calls == [None] and all(torch.equal(first[name], again[name]) for name in first)
    # One that was stopped goes on, to the same end; one with other settings is not taken for this.
    path = tmp_path / "models/decoder/ckpt.pt"
    whole = torch.load(path, weights_only=True)
    script, model, settings = m.build(cfg, "decoder")
    optimizer = m.decoder_only.make_optimizer(model, settings)
    m.decoder_only.save_checkpoint(path, **whole | dict(
        step=0, history=[], model=model.state_dict(), optimizer=optimizer.state_dict()))
    resumed = m.trained(cfg, "decoder").state_dict()
    assert len(calls) == 2 and calls[1]["step"] == 0 and all(torch.equal(first[name], resumed[name]) for name in first)
    m.trained(dataclasses.replace(cfg, seed=1), "decoder")
    assert len(calls) == 3 and calls[2] is None


def test_main(m, tmp_path, capsys):
    cfg = m.Config(only="rope, scale", out=str(tmp_path / "new" / "folder"))
    results = m.main(cfg)
    summary = json.loads((tmp_path / "new/folder/summary.json").read_text())
    assert list(results) == ["rope", "scale"] and summary["results"] == results and summary["seconds"] > 0
    assert summary["config"] == dataclasses.asdict(cfg)
    assert {path.name for path in Path(cfg.out).iterdir()} == {"rope.png", "scale.png", "summary.json"}
    assert (Path(cfg.out) / "rope.png").read_bytes()[:4] == b"\x89PNG" and results["rope"] in capsys.readouterr().out
    with pytest.raises(ValueError, match="no picture masks; there are architectures"):
        m.main(m.Config(only="positions,masks", out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()  # before anything is trained


def test_a_wrong_name_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "visualizations.py", "--only", "masks"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"error: there is no picture masks; .*\n", done.stderr)
    assert not list(tmp_path.iterdir())
