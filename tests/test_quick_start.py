"""quick_start.py: the tour runs from end to end, says what is so, and leaves models that the scripts can load."""
import json
import sys

import pytest
import torch
from conftest import ROOT, load_script


@pytest.fixture(scope="module")
def m():
    sys.path.insert(0, str(ROOT))  # an orchestrator finds the scripts beside it
    yield load_script(ROOT / "quick_start.py")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def tour(m, tmp_path_factory):
    out = tmp_path_factory.mktemp("tour")
    return out, m.main(m.parse_config(m.Config, m.PRESETS, ["--effort", "0.03", "--out", str(out)]))


def test_the_tour_leaves_what_it_promises(m, tour, capsys):
    out, results = tour
    summary = json.loads((out / "summary.json").read_text())
    assert summary["results"] == results and list(results) == ["encoder_only", "decoder_only", "encoder_decoder"]
    for name in ("comparison.png", "attention.png"):
        assert (out / name).stat().st_size > 5_000
    for name, one in results.items():
        assert 0 <= one["exact_match"] <= 1 and one["parameters"] > 50_000 and (out / name / "ckpt.pt").is_file()
    # Each model can be talked to with its own script, as the last lines say.
    for script, prompt, more in ((m.encoder_only, "4[MASK]215 [SEP] forty thousand two hundred fifteen", []),
                                 (m.decoder_only, "1984=", ["--temperature", "0", "--max-new-tokens", "3"]),
                                 (m.encoder_decoder, "1984", ["--max-new-tokens", "3"])):
        cfg = script.parse_config(script.Config, script.PRESETS,
                                  ["--load", str(out / script.__name__), "--prompt", prompt, *more])
        model, _ = script.main(cfg)
        assert sum(p.numel() for p in model.parameters()) == results[script.__name__]["parameters"]
    assert capsys.readouterr().out.strip()


def test_the_same_seed_gives_the_same_tour(m, tour, tmp_path):
    cfg = m.Config(effort=0.03, out=str(tmp_path))
    script, preset, steps = m.decoder_only, "numbers", 600
    model, _, result = m.train_one(script, m.shortened(script, preset, steps, cfg), script.compute_loss)
    kept = torch.load(tour[0] / "decoder_only" / "ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    assert result["history"][0]["loss"] > result["history"][-1]["loss"]


def test_settings_are_the_scripts_own_but_for_the_steps(m):
    short, long = (m.shortened(m.decoder_only, "numbers", 600, m.Config(effort=e)) for e in (0.1, 1.0))
    assert (short.max_steps, long.max_steps) == (60, 600)
    preset = m.decoder_only.Config(**m.decoder_only.PRESETS["numbers"])
    assert all(getattr(long, name) == getattr(preset, name) for name in ("n_layer", "n_embd", "lr", "batch_size"))


def test_every_token_is_asked_once(m):
    tokenizer, cfg = m.encoder_only.ToyTokenizer(), m.Config(number=42)
    torch.manual_seed(0)
    model = m.encoder_only.BERT(m.encoder_only.Config(vocab_size=46, mask_id=5))

    def knows(hidden, *_):  # the right answer at every blank
        logits = torch.zeros(*hidden.shape, 46)
        logits[0, torch.arange(hidden.size(1)), torch.tensor(tokenizer.encode("[CLS] 42 [SEP] forty two [SEP]"))] = 9.0
        return logits
    model.hidden, model.mlm = knows, lambda x: x
    lines = m.ask_encoder(model, tokenizer, cfg, "forty two")
    assert len(lines) == 5 and lines[-1].strip() == "4 of 4 blanks filled rightly."
    assert "[CLS] [MASK] 2 [SEP] forty two [SEP]" in lines[0] and "-> 4 " in lines[0]
    model.hidden = lambda hidden, *_: -knows(hidden)
    assert m.ask_encoder(model, tokenizer, cfg, "forty two")[-1].strip() == "0 of 4 blanks filled rightly."


@pytest.mark.parametrize("args, words", [(["--number", "1000000"], "number must be in"),
                                         (["--effort", "0"], "effort must be"), (["--seed", "-1"], "seed must be"),
                                         (["--wat"], "unrecognized")])
def test_wrong_settings_are_one_line(m, args, words):
    with pytest.raises(SystemExit, match=words) as stop:
        m.parse_config(m.Config, m.PRESETS, args)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
