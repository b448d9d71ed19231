"""dpo.py against TRL's formulas on the same tensors, and the wiring that preference code gets wrong.

    pytest tests/test_dpo.py --script my_dpo.py      grade your own file
"""
import copy
import inspect
import json
import math
import random
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F


def config(m, **changes):
    """A model small enough for a test."""
    return m.Config(**{**dict(vocab_size=83, n_layer=2, n_head=3, n_embd=24, ffn_size=40, device="cpu", sft_steps=2,
                              max_steps=3, batch_size=5, pairs=12), **changes})


def small(m, seed=0, **changes):
    torch.manual_seed(seed)
    return m.SmallLlama(config(m, **changes)).eval()


def scores(logits, cfg):
    """A model that has these logits for whatever it reads."""
    return type("Fixed", (), dict(cfg=cfg, hidden=lambda self, ids: logits, head=lambda self, x: x))()


def random_batch(m, seed=0, B=5, T=11, V=83):
    """Pairs of rows with prompts and answers of many lengths, and reference log-probs."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    inputs = torch.randint(3, V, (B, 2, T), generator=g)
    targets = torch.full((B, 2, T), m.IGNORE)
    for i in range(B):
        start = rng.randint(1, T - 4)
        for j in range(2):
            end = rng.randint(start + 1, T)
            targets[i, j, start:end] = torch.randint(3, V, (end - start,), generator=g)
    return inputs, targets, *(-20 * torch.rand(2, B, generator=g))


# --- formulas --------------------------------------------------------------------------------------------------------
def test_sequence_logps_are_sums_over_the_answer(m):
    torch.manual_seed(0)
    targets = random_batch(m)[1].flatten(0, 1)
    logits = torch.randn(10, 11, 83, requires_grad=True)
    logps, lengths = m.sequence_logps(logits, targets)
    for row in range(10):
        wanted = sum(logits[row, t].log_softmax(-1)[targets[row, t]] for t in range(11) if targets[row, t] != m.IGNORE)
        torch.testing.assert_close(logps[row], wanted)
        assert lengths[row] == (targets[row] != m.IGNORE).sum()
    # Prompts and pads get exactly no gradient, and what stands there changes nothing.
    logps.sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, targets != m.IGNORE)
    other = logits.detach().masked_fill((targets == m.IGNORE)[..., None], 1e4)
    assert torch.equal(m.sequence_logps(other, targets)[0], logps)


def trl_loss(m, batch, logits, kind, beta):
    """TRL's DPOTrainer._compute_loss on our logits. -> (loss, {name: value})."""
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DPOTrainer
    inputs, targets, ref_c, ref_r = batch
    B, _, T = inputs.shape
    rows, wanted = (torch.cat((part[:, 0], part[:, 1])) for part in (inputs, targets))  # all chosen, then all rejected
    logits = torch.cat((logits.view(B, 2, T, -1)[:, 0], logits.view(B, 2, T, -1)[:, 1]))
    counts = wanted != m.IGNORE
    log_probs = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0] * counts
    zeros = torch.zeros(2 * B, T)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    gather = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=gather, aux_loss_enabled=False, ld_alpha=None, beta=beta,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], _tp_size=1,
        use_weighting=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, label_smoothing=0.1)
    # One column more in front: TRL masks tokens, we mask what predicts them.
    mask = F.pad(counts.long(), (1, 0))
    batch = {"input_ids": F.pad(rows, (1, 0)), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
             "ref_chosen_logps": ref_c, "ref_rejected_logps": ref_r}
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)


@pytest.mark.parametrize("kind, theirs, beta", [("dpo", "sigmoid", 0.3), ("dpo", "sigmoid", 0.05), ("ipo", "ipo", 0.1)])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_equal_trl(m, kind, theirs, beta, seed):
    batch = random_batch(m, seed)
    torch.manual_seed(seed)
    ours = torch.randn(10, 11, 83, requires_grad=True)
    copied = ours.detach().clone().requires_grad_()
    loss = m.preference_loss(scores(ours, config(m, loss=kind, beta=beta, nll=0.0)), *batch) / 5
    wanted = trl_loss(m, batch, copied, theirs, beta)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, copied.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_the_papers_formulas(m, seed):
    torch.manual_seed(seed)
    c, r, ref_c, ref_r = (-10 * torch.rand(7, dtype=torch.float64) for _ in range(4))
    n_c, n_r = torch.randint(2, 9, (7,)), torch.randint(2, 9, (7,))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))
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


@pytest.mark.parametrize("kind", ["dpo", "cdpo", "ipo", "simpo"])
def test_the_named_loss_is_used(m, kind):
    inputs, targets, ref_c, ref_r = batch = random_batch(m)
    torch.manual_seed(0)
    logits = torch.randn(10, 11, 83)
    cfg = config(m, loss=kind, beta=0.7, epsilon=0.3, gamma=0.4, nll=0.0)
    logps, lengths = m.sequence_logps(logits, targets.flatten(0, 1))
    (c, r), (n_c, n_r) = logps.view(5, 2).t(), lengths.view(5, 2).t()
    wanted = {"dpo": lambda beta: m.dpo_loss(c, r, ref_c, ref_r, beta),
              "cdpo": lambda beta: m.cdpo_loss(c, r, ref_c, ref_r, beta, 0.3),
              "ipo": lambda beta: m.ipo_loss(c, r, ref_c, ref_r, n_c, n_r, beta),
              "simpo": lambda beta: m.simpo_loss(c, r, n_c, n_r, beta, 0.4)}[kind]
    torch.testing.assert_close(m.preference_loss(scores(logits, cfg), *batch), wanted(0.7).sum())
    usual = m.dataclasses.replace(cfg, beta=0.0)
    torch.testing.assert_close(m.preference_loss(scores(logits, usual), *batch), wanted(m.BETA[kind]).sum())
    # With the NLL term: the chosen answer's loss per token on top, and the control is that alone.
    more = m.preference_loss(scores(logits, m.dataclasses.replace(cfg, nll=0.2)), *batch)
    torch.testing.assert_close(more - wanted(0.7).sum(), -0.2 * (c / n_c).sum())


def test_the_control_imitates_the_chosen(m):
    batch, model = random_batch(m), small(m)
    c = m.sequence_logps(model(batch[0][:, 0]), batch[1][:, 0])
    torch.testing.assert_close(m.imitation_loss(model, *batch), -(c[0] / c[1]).sum())


def test_the_pieces_run_alone(m):
    space = {}
    exec("import torch\nimport torch.nn.functional as F\nIGNORE = -100\n" + "\n\n".join(
        inspect.getsource(f) for f in (m.sequence_logps, m.dpo_loss)), space)
    logps, _ = space["sequence_logps"](torch.randn(4, 5, 7), torch.randint(7, (4, 5)))
    assert space["dpo_loss"](*logps, 0.1) > 0


# --- pairs -----------------------------------------------------------------------------------------------------------
def test_pairs_and_their_order_stay_together(m):
    """Chosen and rejected in one forward pass equal two passes, one answer at a time, without padding."""
    model = small(m)
    pairs = [([5, 6, 7], [8, 9], [9, 8, 7, 1]), ([5], [4, 3, 2, 1], [1]), ([5, 6], [7], [9, 9])]
    inputs, targets = m.pair_rows(pairs)
    assert inputs.shape == targets.shape == (3, 2, 6)
    logps = m.pair_logps(model, inputs, targets, config(m))
    for i, (prompt, *answers) in enumerate(pairs):
        for j, answer in enumerate(answers):
            wanted = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
            wanted = sum(wanted[len(prompt) + k - 1, token] for k, token in enumerate(answer))
            torch.testing.assert_close(logps[i, j], wanted.detach())
    wide = tuple(F.pad(part, (0, 5), value=value) for part, value in ((inputs, 7), (targets, m.IGNORE)))
    torch.testing.assert_close(m.pair_logps(model, *wide, config(m)), logps)  # padding on the right changes nothing


def test_annotators_and_judges(m):
    assert len(m.MISSPELLED) == 30 == len(set(m.MISSPELLED.values())) and not set(m.MISSPELLED) & set(m.CORRECTED)
    assert len(set(m.TOY_VOCAB)) == len(m.TOY_VOCAB) == 73 and m.TOY_VOCAB[m.EOS] == "\n"
    assert m.judge(200, "tow hunderd") == (True, -2) and m.judge(200, "two hundred") == (True, 0)
    assert m.judge(200, "two hundred one") == (False, 0) and m.judge(200, None) == (False, 0)
    rng = random.Random(0)
    words = " ".join(m.misspell(m.number_to_words(777777), rng, 0.3) for _ in range(500)).split()
    assert sum(word in m.CORRECTED for word in words) / len(words) == pytest.approx(0.3, abs=0.03)
    assert m.decode_toy(m.encode_toy("two tow\n") + [5]) == "two tow"
    assert m.decode_toy(m.encode_toy("two tow")) is None  # cut off: no answer


@pytest.mark.parametrize("validation", [False, True])
def test_pairs_are_judged(m, monkeypatch, validation):
    """The chosen answer is right, and better; numbers come from the wanted split; two samples of each."""
    rng, asked = random.Random(0), []

    def answers(model, numbers, cfg, seed):
        asked.append(numbers)
        texts = [m.misspell(m.number_to_words(n if rng.random() < 0.8 else n + 1), rng, 0.3) for n in numbers]
        return [text if rng.random() < 0.9 else None for text in texts]
    monkeypatch.setattr(m, "sample_answers", answers)
    pairs, kinds = m.own_pairs(None, config(m), 300, 5, validation), set()
    assert len(pairs) == 300 and asked[0][:300] == asked[0][300:] and asked[0] != asked[1]
    for prompt, chosen, rejected in pairs:
        n = int("".join(m.TOY_VOCAB[i] for i in prompt[:-1]))
        better, worse = (m.judge(n, m.decode_toy(ids)) for ids in (chosen, rejected))
        assert better > worse and better[0] and m.is_validation(n) == validation
        assert chosen[-1] == rejected[-1] == m.EOS
        kinds.add((worse[0], better[1] < 0))
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
    monkeypatch.setattr(m, "sample_answers", lambda model, numbers, cfg, seed: ["six"] * len(numbers))
    with pytest.raises(ValueError, match="hardly ever right"):
        m.own_pairs(None, config(m), 10, 5, False)


def test_sampled_answers_belong_to_their_numbers(m):
    model, cfg = small(m, vocab_size=73), config(m, vocab_size=73)
    texts = m.sample_answers(model, [5, 123456, 77] * 60, cfg, 3)
    ids, starts = m.rollout(model, [m.encode_toy(f"{n}=") for n in [5, 123456, 77] * 60], 20, m.EOS, 1.0,
                            torch.Generator().manual_seed(3))
    for row, start, text in zip(ids.tolist(), starts.tolist(), texts, strict=True):
        assert text == m.decode_toy(row[start:])
    assert None in texts and len(set(texts)) > 30


def test_rates_and_kl_are_of_the_models_own_samples(m, monkeypatch):
    cfg, numbers = config(m, vocab_size=73), list(range(100, 160))
    model, other = small(m, vocab_size=73), small(m, seed=1, vocab_size=73)
    assert m.answer_rates(model, model, numbers, cfg, 0)["kl"] == pytest.approx(0, abs=1e-5)
    assert m.answer_rates(model, other, numbers, cfg, 0)["kl"] > 1  # a mean of ln p - ln q under p
    texts = ["two hundred", "tow hundred", "two hundred one", None]
    monkeypatch.setattr(m, "sample_answers", lambda *args: texts)
    rates = m.answer_rates(model, other, [200] * 4, cfg, 0)
    assert (rates["preferred"], rates["correct"]) == (0.25, 0.5)
    texts[:] = [None] * 4
    assert math.isnan(m.answer_rates(model, other, [200] * 4, cfg, 0)["kl"])  # nothing ended


# --- wiring ----------------------------------------------------------------------------------------------------------
def test_a_whole_run(m, tmp_path, monkeypatch):
    """Imitation on training numbers; pairs of the model's own; the reference is the imitator, without dropout or
    training; control and policy begin from it and see the same pairs; only held-out numbers are looked at."""
    fits, made, looks, draws = [], [], [], []
    fit, rates, draw = m.fit, m.answer_rates, m.draw_numbers

    def spy_fit(model, cfg, data, loss_fn, steps, lr, *after):
        fits.append((model, data, loss_fn, steps, lr, cfg.batch_size, copy.deepcopy(model.state_dict())))
        losses = fit(model, cfg, data, loss_fn, steps, lr, *after)
        fits[-1] += (losses,)
        return losses

    def spy_pairs(model, cfg, count, seed, validation):
        pairs = [([3, 4, 2], [20, 21, 1], [22, 23, 24, 1])] * count
        made.append((model, count, seed, validation))
        return pairs
    monkeypatch.setattr(m, "fit", spy_fit)
    monkeypatch.setattr(m, "own_pairs", spy_pairs)
    monkeypatch.setattr(m, "answer_rates", lambda *args: looks.append(args) or rates(*args))
    monkeypatch.setattr(m, "draw_numbers", lambda *args: draws.append(args) or draw(*args))
    cfg = config(m, vocab_size=0, out=str(tmp_path), sft_lr=0.01, lr=0.02, seed=3, nll=0.0)
    policy = m.main(cfg)
    sft, control, dpo = fits
    assert [one[3:6] for one in fits] == [(2, 0.01, 10), (3, 0.02, 5), (3, 0.02, 5)]
    assert [one[2] for one in fits] == [m.compute_loss, m.imitation_loss, m.preference_loss]
    assert len({id(one[0]) for one in fits}) == 3 and dpo[0] is policy and control[1] is dpo[1]
    for name, tensor in sft[0].state_dict().items():
        assert torch.equal(tensor, control[6][name]) and torch.equal(tensor, dpo[6][name])
    assert not torch.equal(policy.head.weight, sft[0].head.weight)
    # The pairs: of the imitator, to train from training numbers, to look from held-out ones; chosen first.
    reference = made[0][0]
    assert [one[1:] for one in made] == [(12, 3, False), (500, 3, True)] and reference is made[1][0]
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in sft[0].state_dict().items())
    inputs, targets, ref_c, ref_r = dpo[1]
    assert inputs.shape == (12, 2, 6) and targets[0, 0].tolist() == [m.IGNORE] * 2 + [20, 21, 1, m.IGNORE]
    torch.testing.assert_close(torch.stack((ref_c, ref_r), 1), m.pair_logps(reference, inputs, targets, cfg))
    # The first loss is ln 2 exactly, and that of the control the chosen answers' loss per token.
    assert dpo[7][0] == pytest.approx(math.log(2), abs=1e-6) and dpo[7][-1] < dpo[7][0]
    assert control[7][0] == pytest.approx(-ref_c[0].item() / 3, abs=1e-4)
    assert {args[1] for args in looks} == {reference} and {args[0] for args in looks} == {reference, control[0], policy}
    assert all(args[2] == looks[0][2] and all(map(m.is_validation, args[2])) for args in looks)
    assert [args[2] for args in draws] == [False, True, True] and draws[0][0] == 60_000
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    for key in ("preferred_rate", "correct_rate", "kl", "pair_accuracy", "logps_chosen", "logps_rejected"):
        assert set(results[key]) == {"before", "after", "control"}
    assert results["pair_accuracy"]["before"] == 0.5 and results["pair_accuracy"]["after"] == 1
    assert results["kl"]["before"] == pytest.approx(0, abs=1e-5) and results["kl"]["after"] > 0
    last = m.pair_logps(policy, *m.pair_rows([([3, 4, 2], [20, 21, 1], [22, 23, 24, 1])]), cfg)[0]
    assert [results[f"logps_{side}"]["after"] for side in ("chosen", "rejected")] == pytest.approx(last.tolist())


def test_examples_are_misspelled_and_split(m, monkeypatch):
    train, val, pairs, V = m.make_data(config(m, slip=0.3))
    assert pairs is None and V == 73 and (len(train[0]), len(val[0])) == (60_000, 2000)
    for rows, validation in ((train, False), (val, True)):
        slips = words = 0
        for inputs, targets in zip(*(part[:400].tolist() for part in rows), strict=True):
            n = int("".join(m.TOY_VOCAB[i] for i in inputs[:inputs.index(2)]))
            right, minus = m.judge(n, m.decode_toy([token for token in targets if token != m.IGNORE]))
            assert right and m.is_validation(n) == validation
            slips, words = slips - minus, words + len(m.number_to_words(n).split())
        assert slips / words == pytest.approx(0.3, abs=0.05)


def test_the_same_seed_gives_the_same_policy(m, tmp_path):
    rows = m.pair_rows([([3, 4, 2], [20, 21, 1], [22, 23, 24, 1]), ([5, 2], [30, 1], [31, 1])])
    policies = []
    for _ in range(2):
        policy = small(m)
        data = (*rows, *m.pair_logps(policy, *rows, config(m)).unbind(1))
        m.fit(policy, config(m), data, m.preference_loss, 3, 0.01)
        policies.append(policy.state_dict())
    assert all(torch.equal(tensor, policies[1][name]) for name, tensor in policies[0].items())


# --- own data, and mistakes ------------------------------------------------------------------------------------------
def test_own_preferences_in_a_file(m, tmp_path, tiktoken_cache, capsys):
    """Cases 8 and 9: a byte-order mark, entries that are too long or say nothing are counted aloud."""
    entries = [dict(instruction=f"Say {i}.", input="x" * (i % 2), chosen=f"Yes, {i}!", rejected="No.")
               for i in range(30)]
    entries += [dict(instruction="word " * 300, chosen="a", rejected="b"),
                dict(instruction="x", chosen="a", rejected="a")]
    (tmp_path / "my.json").write_text("\ufeff" + json.dumps(entries), encoding="utf-8")
    cfg = m.parse_config(["--preset", "pairs", "--data", str(tmp_path / "my.json"), "--out", str(tmp_path / "o"),
                          "--n-layer", "1", "--sft-steps", "2", "--max-steps", "12", "--lr", "0.01"])
    pairs, V = m.read_pairs(cfg)
    assert "2 of 32 pairs dropped" in capsys.readouterr().out and len(pairs) == 30 and V == 50257
    train, held_out = m.make_data(cfg)[2]
    assert (len(train), len(held_out)) == (27, 3) and not [pair for pair in train if pair in held_out]
    import tiktoken
    gpt2 = tiktoken.get_encoding("gpt2")
    assert gpt2.decode(pairs[3][0]).endswith("### Instruction:\nSay 3.\n\n### Input:\nx\n\n### Response:\n")
    assert gpt2.decode(pairs[3][1]) == "Yes, 3!<|endoftext|>" and gpt2.decode(pairs[3][2]) == "No.<|endoftext|>"
    m.main(cfg)
    results = json.loads((tmp_path / "o" / "summary.json").read_text())["results"]
    assert results["pair_accuracy"]["after"] >= 0.6 and results["preferred_rate"]["after"] is None


@pytest.mark.parametrize("content, words", [
    ("{}", "entry 0"), ('[{"instruction": "x", "chosen": "y"}]', "entry 0"), ("[1]", "entry 0"), ("[]", "too few"),
    ('[{"instruction": "x", "chosen": "y", "rejected": 3}]', "entry 0"), ("nonsense", "Expecting value")])
def test_files_of_another_form(m, tmp_path, tiktoken_cache, content, words):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        m.main(config(m, data=str(tmp_path / "bad.json"), out=str(tmp_path / "o")))


@pytest.mark.parametrize("change, words", [
    (dict(loss="magic"), "dpo, cdpo, ipo, simpo"), (dict(n_embd=25), "n_embd"), (dict(pairs=0), "start at 1"),
    (dict(max_steps=0), "start at 1"), (dict(block_size=10), "block_size at 18"), (dict(), "vocab_size is 73")])
def test_mistakes_cost_one_line(m, change, words):
    with pytest.raises(ValueError, match=words):
        m.main(config(m, **change))


def test_the_command_line(m, tmp_path):
    done = subprocess.run([sys.executable, m.__file__, "--data", "no.json"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_preferences_are_learned(m, tmp_path):
    """Five seeds, all weights, on average."""
    found = []
    for seed in (1337, 1, 2, 3, 4):
        m.main(m.Config(device="cpu", seed=seed, out=str(tmp_path)))
        found.append(json.loads((tmp_path / "summary.json").read_text())["results"])
    preferred, correct = ([{k: one[key][k] for k in ("before", "after", "control")} for one in found]
                          for key in ("preferred_rate", "correct_rate"))
    assert max(one["before"] for one in preferred) <= 0.25 and max(one["control"] for one in preferred) < 0.6
    assert sum(one["after"] for one in preferred) / 5 >= 0.90
    assert sum(one["after"] / one["before"] for one in correct) / 5 >= 0.97


def scenario(m, tmp_path, fixed):
    """Every shape comment of the script, in short runs."""
    fixed.update(C=24, D=8, H=3, F=40)
    m.own_pairs = lambda model, cfg, count, *_: [([3, 2], [20, 1], [21, 22, 1])] * count
    m.main(config(m, vocab_size=0, out=str(tmp_path), loss="dpo"))
    for loss in ("cdpo", "ipo", "simpo"):
        model, ids, zeros = m.SmallLlama(config(m, loss=loss)), torch.randint(3, 40, (4, 2, 6)), torch.zeros(4)
        m.preference_loss(model, ids, ids, zeros, zeros)
    m.rollout(m.SmallLlama(config(m)), [[3, 2]], 6, m.EOS, 0.0)
