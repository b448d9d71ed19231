"""dpo.py against TRL's formulas on the same tensors, and the bookkeeping that preference code gets wrong.

    pytest tests/test_dpo.py --script my_dpo.py      grade your own file
"""

import copy
import json
import math
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F


def config(m, **changes):
    """A model small enough for a test; sizes are pairwise different."""
    return m.Config(**{**dict(vocab_size=83, n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=10, ffn_size=40,
                              block_size=40, init_std=0.2, device="cpu"), **changes})


def small(m, seed=0, **changes):
    return m.build_model(config(m, seed=seed, **changes)).eval()


def scores(m, logits):
    """A model that has these logits for whatever it reads."""
    return lambda ids, targets: m.sequence_logps(logits, targets)


def random_batch(m, seed=0, B=5, T=11, V=83):
    """Pairs of rows with prompts and answers of many lengths, and reference log-probs."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    inputs = torch.randint(3, V, (B, 2, T), generator=generator)
    targets = torch.full((B, 2, T), m.IGNORE)
    for i in range(B):
        start = rng.randint(1, T - 4)
        for j in range(2):
            end = rng.randint(start + 1, T)
            targets[i, j, start:end] = torch.randint(3, V, (end - start,), generator=generator)
    return inputs, targets, -20 * torch.rand(B, 2, generator=generator)


# ---------------------------------------------------------------------------------------- formulas


def test_sequence_logps_are_sums_over_the_answer(m):
    torch.manual_seed(0)
    _, targets, _ = random_batch(m)
    targets = targets.flatten(0, 1)
    logits = torch.randn(10, 11, 83, requires_grad=True)
    logps, lengths = m.sequence_logps(logits, targets)
    for row in range(10):
        wanted = sum(logits[row, t].log_softmax(-1)[targets[row, t]] for t in range(11) if targets[row, t] != m.IGNORE)
        torch.testing.assert_close(logps[row], wanted)
        assert lengths[row] == (targets[row] != m.IGNORE).sum()
    # Prompts and pads get exactly no gradient, and what stands there changes nothing.
    logps.sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, targets != m.IGNORE)
    other = logits.detach().clone()
    other[targets == m.IGNORE] = 1e4
    assert torch.equal(m.sequence_logps(other, targets)[0], logps)


def test_log_probs_are_not_rounded(m):
    """bfloat16 logits are summed in float32, float64 ones in float64."""
    _, targets, _ = random_batch(m)
    logits = torch.randn(10, 11, 83)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        ours = m.sequence_logps(logits.to(dtype), targets.flatten(0, 1))[0]
        assert ours.dtype == wide
        exact = m.sequence_logps(logits.to(dtype).double(), targets.flatten(0, 1))[0]
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert small(m).double()(torch.randint(3, 83, (10, 11)), targets=targets.flatten(0, 1))[0].dtype == torch.float64


def test_the_head_is_asked_at_the_answers_only(m):
    inputs, targets, _ = random_batch(m)
    inputs, targets = inputs.flatten(0, 1), targets.flatten(0, 1)
    model, seen = small(m).double(), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    for ours, theirs in zip(model(inputs, targets=targets), m.sequence_logps(model(inputs), targets), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double())
    assert seen[0] == ((targets != m.IGNORE).sum(), 24)
    grads = []
    for logps in (model(inputs, targets=targets)[0], m.sequence_logps(model(inputs), targets)[0]):
        model.zero_grad()
        logps.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def trl_loss(m, batch, logits, kind, beta):
    """TRL's DPOTrainer._compute_loss on our logits. -> (loss, {name: value})."""
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DPOTrainer
    inputs, targets, reference = batch
    B, _, T = inputs.shape
    rows = torch.cat((inputs[:, 0], inputs[:, 1]))                             # TRL: all chosen, then all rejected
    wanted = torch.cat((targets[:, 0], targets[:, 1]))
    logits = torch.cat((logits.view(B, 2, T, -1)[:, 0], logits.view(B, 2, T, -1)[:, 1]))
    counts = wanted != m.IGNORE
    log_probs = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0] * counts
    zeros = torch.zeros(2 * B, T)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    from collections import defaultdict
    gather = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=gather, aux_loss_enabled=False, ld_alpha=None, beta=beta,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], _tp_size=1,
        use_weighting=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, label_smoothing=0.1)
    # One column more in front: TRL masks tokens, we mask what predicts them.
    mask = F.pad(counts.long(), (1, 0))
    batch = {"input_ids": F.pad(rows, (1, 0)), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
             "ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("kind, theirs, beta", [("dpo", "sigmoid", 0.3), ("dpo", "sigmoid", 0.05), ("ipo", "ipo", 0.1)])
@pytest.mark.parametrize("seed", range(3))
def test_losses_rewards_and_gradients_equal_trl(m, kind, theirs, beta, seed):
    batch = random_batch(m, seed)
    torch.manual_seed(seed)
    ours = torch.randn(10, 11, 83, requires_grad=True)
    copied = ours.detach().clone().requires_grad_(True)
    loss_sum, count, metrics = m.preference_loss(scores(m, ours), batch, config(m, loss=kind, beta=beta))
    wanted, logged = trl_loss(m, batch, copied, theirs, beta)
    torch.testing.assert_close(loss_sum / count, wanted, rtol=1e-6, atol=1e-6)
    (loss_sum / count).backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, copied.grad, rtol=1e-5, atol=1e-6)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(logged[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("seed", range(3))
def test_losses_without_an_oracle_are_the_papers_formulas(m, seed):
    torch.manual_seed(seed)
    c, r, ref_c, ref_r = (-10 * torch.rand(7, dtype=torch.float64) for _ in range(4))
    n_c, n_r = torch.randint(2, 9, (7,)), torch.randint(2, 9, (7,))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    ours = {"cdpo": m.cdpo_loss(c, r, ref_c, ref_r, 0.4, 0.2), "simpo": m.simpo_loss(c, r, n_c, n_r, 2.0, 0.7),
            "ipo": m.ipo_loss(c, r, ref_c, ref_r, n_c, n_r, 0.1), "dpo": m.dpo_loss(c, r, ref_c, ref_r, 0.4)}
    for i in range(7):
        margin = (c - ref_c - r + ref_r)[i].item()
        assert ours["dpo"][i].item() == pytest.approx(-math.log(sigmoid(0.4 * margin)))
        assert ours["cdpo"][i].item() == pytest.approx(
            -0.8 * math.log(sigmoid(0.4 * margin)) - 0.2 * math.log(sigmoid(-0.4 * margin)))
        per_token = (c[i] / n_c[i] - r[i] / n_r[i]).item()
        assert ours["simpo"][i].item() == pytest.approx(-math.log(sigmoid(2.0 * per_token - 0.7)))
        per_token = ((c - ref_c)[i] / n_c[i] - (r - ref_r)[i] / n_r[i]).item()
        assert ours["ipo"][i].item() == pytest.approx((per_token - 5.0) ** 2)
    # cDPO's minimum is where the policy believes as much as the labels deserve.
    h = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    losses = m.cdpo_loss(h, 0 * h, 0 * h, 0 * h, 1.0, 0.2)
    assert h[losses.argmin()].item() == pytest.approx(math.log(0.8 / 0.2), abs=0.01)


@pytest.mark.parametrize("kind", ["cdpo", "simpo"])
def test_the_named_loss_is_used(m, kind):
    batch = random_batch(m)
    torch.manual_seed(0)
    logits = torch.randn(10, 11, 83)
    cfg = config(m, loss=kind, beta=0.7, label_smoothing=0.3, gamma=0.4)
    loss_sum, count, _ = m.preference_loss(scores(m, logits), batch, cfg)
    logps, lengths = m.sequence_logps(logits, batch[1].flatten(0, 1))
    (c, r), (n_c, n_r), (ref_c, ref_r) = logps.view(5, 2).t(), lengths.view(5, 2).t(), batch[2].t()
    wanted = (m.cdpo_loss(c, r, ref_c, ref_r, 0.7, 0.3) if kind == "cdpo" else m.simpo_loss(c, r, n_c, n_r, 0.7, 0.4))
    assert count == 5
    torch.testing.assert_close(loss_sum, wanted.sum())
    # With the NLL term: the chosen answer's loss per token on top.
    more = m.preference_loss(scores(m, logits), batch, m.dataclasses.replace(cfg, nll=0.2))[0]
    torch.testing.assert_close(more - loss_sum, -0.2 * (c / n_c).sum())


# ---------------------------------------------------------------------------------------- bookkeeping


@pytest.mark.parametrize("carrier", ["head", "all", "lora"])
def test_the_first_loss_is_ln_2_with_dropout_configured(m, carrier, tmp_path, monkeypatch, capsys):
    model = small(m, dropout=0.3)
    inputs, targets, _ = random_batch(m)
    cfg = config(m, dropout=0.3, max_steps=1, batch_size=5, out=str(tmp_path), lr=1e-9, body_lr=1e-9, lora_lr=1e-9)
    data = (inputs, targets, m.reference_logps(copy.deepcopy(model), (inputs, targets), cfg))
    rows, looks, _ = m.preference_stage(model, cfg, "x", (data, data), m.preference_loss, carrier,
                                        {"identity": ""}, lambda: {})
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    first = json.loads((tmp_path / "x" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("carrier", ["head", "all", "lora"])
def test_the_carrier_and_nothing_else_learns(m, carrier):
    model = m.choose_carrier(small(m), carrier, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = random_batch(m)
    torch.testing.assert_close(model(batch[0][:, 0]), small(m)(batch[0][:, 0]))  # an adapter begins as nothing
    optimizer = m.make_optimizer(model, config(m, lr=0.01, weight_decay=0.0))
    for _ in range(2):
        m.preference_loss(model, batch, config(m))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        learns = {"head": name == "lm_head.weight", "all": True, "lora": name.endswith((".A", ".B"))}[carrier]
        assert torch.equal(tensor, before[name]) != learns, name
    with pytest.raises(ValueError, match="tied"):
        m.choose_carrier(small(m, tie_weights=True), "head", 3)


def test_pairs_and_their_order_stay_together(m):
    """Chosen and rejected in one forward pass equal two passes, one answer at a time, without padding."""
    model = small(m)
    pairs = [([5, 6, 7], [8, 9], [9, 8, 7, 1]), ([5], [4, 3, 2, 1], [1]), ([5, 6], [7], [9, 9])]
    inputs, targets = m.pair_rows_of(pairs, 20)
    assert inputs.shape == targets.shape == (3, 2, 6)
    reference = m.reference_logps(model, (inputs, targets), config(m, batch_size=2))
    for i, (prompt, *answers) in enumerate(pairs):
        for j, answer in enumerate(answers):
            logits = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
            wanted = sum(logits[len(prompt) + k - 1, token] for k, token in enumerate(answer))
            torch.testing.assert_close(reference[i, j], wanted.detach())
    # Padding on the right and trimmed columns change nothing.
    wide = tuple(F.pad(part, (0, 5), value=value) for part, value in ((inputs, 7), (targets, m.IGNORE)))
    torch.testing.assert_close(m.reference_logps(model, wide, config(m)), reference)
    cut = m.prepare((*wide, reference), None)
    assert torch.equal(cut[0], inputs) and torch.equal(cut[1], targets) and torch.equal(cut[2], reference)


def test_too_long_prompts_take_their_pair_along(m):
    inputs, _ = m.pair_rows_of([([5] * 12, [1], [2]), ([5], [6], [7]), ([5] * 9, [1], [2])], 10)
    assert len(inputs) == 2 and inputs[0, 0, 0] == 5


def test_annotators_and_judges(m):
    assert len(m.MISSPELLED) == 30 == len(set(m.MISSPELLED.values())) and not set(m.MISSPELLED) & set(m.CORRECTED)
    assert len(set(m.TOY_VOCAB)) == len(m.TOY_VOCAB) == m.ToyTokenizer.n_vocab == 76
    assert m.judge(200, "tow hunderd") == (2, True) and m.judge(200, "two hundred") == (0, True)
    assert m.judge(200, "two hundred one") == (0, False) and m.judge(200, "") == (0, False)
    rng = random.Random(0)
    words = " ".join(m.misspell(m.number_to_words(777777), rng, 0.3) for _ in range(500)).split()
    share = sum(word in m.CORRECTED for word in words) / len(words)
    assert share == pytest.approx(0.3, abs=0.03)
    tokenizer = m.ToyTokenizer()
    assert m.answer_text(tokenizer, tokenizer.encode("two tow\n")) == "two tow"
    assert m.answer_text(tokenizer, tokenizer.encode("two tow")) == ""  # cut off: no answer


def test_the_floor_is_the_entropy_of_the_slips(m):
    cfg = config(m, vocab_size=76, slip=0.3)
    rows, floor, info, parts = m.imitation_data(cfg, m.ToyTokenizer())
    inputs, targets = rows[1]
    newline, total = m.TOY_VOCAB.index("\n"), 0.0
    entropy = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    for row in targets.tolist():
        total += sum(entropy for token in row if token not in (m.IGNORE, newline))
    assert floor == pytest.approx(total / (targets != m.IGNORE).sum().item()) and parts is None


def test_pairs_are_judged(m, monkeypatch):
    """The chosen answer has fewer slips, both are right, the numbers come from the wanted split."""
    tokenizer, rng = m.ToyTokenizer(), random.Random(0)

    def answers(model, tokenizer, numbers, seed):
        texts = [m.misspell(m.number_to_words(n if rng.random() < 0.8 else n + 1), rng, 0.3) + "\n" for n in numbers]
        return [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(m, "sample_answers", answers)
    for validation in (False, True):
        pairs, perfect = m.number_pairs(None, tokenizer, 300, 5, validation)
        slips = []
        for prompt, chosen, rejected in pairs:
            n = int(tokenizer.decode(prompt).rstrip("="))
            (a, right_a), (b, right_b) = (m.judge(n, m.answer_text(tokenizer, one)) for one in (chosen, rejected))
            assert a < b and right_a and right_b and m.is_validation(n) == validation
            slips.append(a)
        assert perfect == pytest.approx(sum(a == 0 for a in slips) / 300)
    flipped, _ = m.number_pairs(None, tokenizer, 400, 5, False, flip=0.25)
    wrong = 0
    for prompt, chosen, rejected in flipped:
        n = int(tokenizer.decode(prompt).rstrip("="))
        wrong += m.judge(n, m.answer_text(tokenizer, chosen))[0] > m.judge(n, m.answer_text(tokenizer, rejected))[0]
    assert wrong / 400 == pytest.approx(0.25, abs=0.07)
    monkeypatch.setattr(m, "sample_answers", lambda model, tokenizer, numbers, seed: [[5, 1]] * len(numbers))
    with pytest.raises(ValueError, match="almost never right"):
        m.number_pairs(None, tokenizer, 10, 5, False)


def test_rates_and_kl_are_of_the_models_own_samples(m):
    model, tokenizer = small(m, vocab_size=76), m.ToyTokenizer()
    same = m.answer_rates(model, model, tokenizer, [1, 22, 333], 0)
    assert same["kl"] == 0 and 0 <= same["preferred"] <= same["correct"] <= 1
    other = m.answer_rates(model, small(m, seed=1, vocab_size=76), tokenizer, list(range(100, 160)), 0)
    assert other["kl"] > 1  # a mean of ln p - ln q under p: never negative but for chance


def test_real_preferences_are_read(m, data_dir, tiktoken_cache):
    tokenizer = m.make_tokenizer({"kind": "gpt2"})
    pairs, outputs = m.read_preferences(data_dir / "instruction-data-with-preference.json", tokenizer)
    assert len(pairs) == len(outputs) == 1100
    for prompt, chosen, rejected in pairs[:50]:
        assert chosen[-1] == rejected[-1] == tokenizer.eos_ids[0] and tokenizer.eos_ids[0] not in prompt
        assert tokenizer.decode(prompt).endswith("### Response:\n")


# ---------------------------------------------------------------------------------------- runs


SHORT = ("--sft-steps 350 --sft-batch-size 64 --max-steps 20 --eval-every 10 --save-every 10 "
         "--pairs 200").split()


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
    for key in ("preferred_rate", "correct_rate"):
        assert {"before", "after", "control"} <= set(summary["results"][key])
    assert summary["results"]["dpo_seconds"] > 0
    for name in summary["figures"]:
        assert (folder / "a" / name).stat().st_size > 10_000
    assert "ln 2 = 0.6931" in done.stdout and "right number" in done.stdout
    rows = [json.loads(line) for line in (folder / "a" / "dpo" / "preferences.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20]
    assert set(rows[0]) == {"step", *(f"{a}/{b}" for a in ("rewards", "logps") for b in ("chosen", "rejected")),
                            "rewards/accuracies", "rewards/margins"}
    assert rows[1]["rewards/margins"] > rows[0]["rewards/margins"]


def test_loading_and_starting_from_a_checkpoint(m, trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder)
    for stage in ("a", "a/sft/ckpt.pt", "a/dpo-lora", "a/dpo-all"):
        capsys.readouterr()
        model, _ = m.main(m.parse_config(m.Config, m.PRESETS, ["--load", stage, "--prompt", "24=", "--beams", "2"]))
        assert capsys.readouterr().out.startswith("24=")
    # Adapters are folded into the matrices: a plain model that computes the same.
    state = torch.load("a/dpo-lora/ckpt.pt", weights_only=True)
    folded, cfg, _ = m.load_any(m.Config(load="a/dpo-lora"))
    adapted = m.choose_carrier(m.build_model(cfg), "lora", 8)
    adapted.load_state_dict(state["model"])
    assert not any(isinstance(one, m.Detour) for one in folded.modules())
    ids = torch.tensor([[6, 7, 2]])
    torch.testing.assert_close(folded(ids), adapted(ids), rtol=1e-4, atol=1e-4)
    m.main(m.parse_config(m.Config, m.PRESETS, ["--load", "a/sft", "--no-compare", "--loss", "ipo", "--max-steps", "2",
                                                "--pairs", "100", "--out", "d"]))
    assert not (folder / "d" / "sft").exists() and (folder / "d" / "dpo" / "ckpt.pt").is_file()


def test_a_run_does_not_write_over_what_it_loads(m, trained, monkeypatch):
    folder, _ = trained
    monkeypatch.chdir(folder)
    for load in ("a", "a/dpo", "a/dpo-all/ckpt.pt"):
        with pytest.raises(SystemExit, match="would write over it; give it another --out"):
            m.main(m.parse_config(m.Config, m.PRESETS, ["--load", load, "--out", "a"]))


def test_resume_repeats_the_run(m, trained):
    folder, _ = trained
    process = subprocess.Popen([sys.executable, "-I", m.__file__, *SHORT, "--out", "b"], cwd=folder,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(3000):
        if (folder / "b" / "control" / "ckpt.pt").is_file():
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    stamp = (folder / "b" / "dpo" / "ckpt.pt").stat().st_mtime_ns
    done = run(m, folder, "--resume", "--out", "b")
    assert done.returncode == 0, done.stderr
    assert (folder / "b" / "dpo" / "ckpt.pt").stat().st_mtime_ns == stamp
    for name in ("sft", "dpo", "control", "dpo-all", "dpo-lora"):
        a, b = (torch.load(folder / which / name / "ckpt.pt", weights_only=True) for which in "ab")
        assert all(torch.equal(tensor, b["model"][key]) for key, tensor in a["model"].items())
    a, b = (json.loads((folder / which / "summary.json").read_text())["results"] for which in "ab")
    assert {k: v for k, v in a.items() if k != "dpo_seconds"} == {k: v for k, v in b.items() if k != "dpo_seconds"}
    assert (folder / "a" / "dpo" / "preferences.jsonl").read_text() == (
        folder / "b" / "dpo" / "preferences.jsonl").read_text()


def test_own_preferences_in_a_file(m, tmp_path, tiktoken_cache, monkeypatch, capsys):
    (tmp_path / "my.json").write_text(json.dumps(
        [{"instruction": f"Say {i}.", "chosen": f"Yes, {i}!", "rejected": "No."} for i in range(40)]))
    monkeypatch.chdir(tmp_path)
    m.main(m.parse_config(m.Config, m.PRESETS, [
        "--preset", "preference", "--data", "my.json", "--n-layer", "1", "--n-embd", "32", "--ffn-size", "48",
        "--sft-steps", "3", "--max-steps", "12", "--eval-every", "6", "--max-new-tokens", "3", "--block-size", "80"]))
    results = json.loads((tmp_path / "runs" / "dpo" / "summary.json").read_text())["results"]
    assert results["pair_accuracy"]["after"] >= 0.9 and results["preferred_rate"]["after"] is None
    # What was trained on instructions is asked with their template, whatever --data says.
    asked = []
    monkeypatch.setattr(m, "write_text", lambda model, tokenizer, cfg, prompt, *more: asked.append(prompt) or "x")
    m.main(m.parse_config(m.Config, m.PRESETS, ["--load", "runs/dpo", "--prompt", "Say 3."]))
    assert asked == [m.instruct_prompt("Say 3.")]
    (tmp_path / "one.json").write_text(json.dumps([{"instruction": "x", "chosen": "y", "rejected": "z"}]))
    for args, words in ((["--data", "one.json"], "too few entries"),
                        (["--data", "my.json", "--block-size", "20"], "too few"),
                        (["--data", "my.json", "--flip", "0.1"], "--flip is for the toy task"),
                        (["--load", "runs/dpo", "--data", "numbers", "--out", "other"], "another kind of data")):
        with pytest.raises(SystemExit, match=words):
            m.main(m.parse_config(m.Config, m.PRESETS, args))


@pytest.mark.parametrize("args, words", [
    (["--loss", "magic"], "loss must be"), (["--carrier", "neck"], "carrier must be"),
    (["--flip", "0.5"], "flip must be"),
    (["--slip", "0"], "slip must be"), (["--pairs", "3"], "pairs must be"), (["--beta", "-1"], "beta must be"),
    (["--tie-weights"], "cannot learn alone"), (["--block-size", "8"], "block-size 20"),
    (["--resume"], "there is no run"), (["--data", "words"], "data must be"), (["--data", "no.json"], "--data no.json"),
    (["--load", "no"], "no checkpoint"),
    (["--prompt", "hello"], "toy language has no"), (["--nonsense"], "unrecognized arguments")])
def test_mistakes_cost_one_line(m, tmp_path, monkeypatch, args, words, request):
    if "no.json" in args:
        request.getfixturevalue("tiktoken_cache")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        m.main(m.parse_config(m.Config, m.PRESETS, args))
    line = str(stop.value.code)
    assert line.startswith("error: ") and "\n" not in line and words in line and not list(tmp_path.iterdir())
