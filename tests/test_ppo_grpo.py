"""ppo_grpo.py against TRL's formulas, brute-force sums, and the wiring that reinforcement learning gets wrong.

    pytest tests/test_ppo_grpo.py --script my_rl.py      grade your own file
"""
import copy
import dataclasses
import json
import math
import random
import subprocess
import sys
import zlib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

VARIANTS = ["grpo", "dr_grpo", "dapo", "gspo"]


def config(m, **changes):
    """A model small enough for a test."""
    return m.Config(**{**dict(n_layer=2, n_head=3, n_embd=24, ffn_size=40, device="cpu", answers=16, group=4,
                              max_steps=2, sft_steps=2, rejection_answers=400, batch_size=8), **changes})


def small(m, seed=0, **changes):
    torch.manual_seed(seed)
    return m.SmallLlama(config(m, **changes)).eval()


def terms(seed, B=6, T=9):
    """logps, old, ref (B, T), advantages (B, 1), mask (B, T): a prompt of some columns, then an answer."""
    g = torch.Generator().manual_seed(seed)
    logps, ref = (-3 * torch.rand(B, T, generator=g, dtype=torch.float64) for _ in range(2))
    old = logps + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)
    starts, lengths = torch.randint(0, 3, (B, 1), generator=g), torch.randint(1, T - 2, (B, 1), generator=g)
    column = torch.arange(T)
    mask = ((column >= starts) & (column < starts + lengths)).double()
    return logps.requires_grad_(), old, ref, torch.randn(B, 1, generator=g, dtype=torch.float64), mask


# --- formulas --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_token_logps(m, seed):
    torch.manual_seed(seed)
    logits, tokens = torch.randn(3, 5, 43), torch.randint(43, (3, 5))
    wanted = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(m.token_logps(logits, tokens), wanted)


def test_answer_mask(m):
    targets = torch.tensor([[5, 2, 7, 1, 1, 1], [2, 1, 1, 1, 1, 1], [5, 6, 2, 7, 8, 9], [5, 2, 7, 8, 9, 1]])
    mask = m.answer_mask(targets, torch.tensor([3, 2, 4, 3]), 1)  # starts count ids, and targets begin at ids[1]
    assert mask.tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    # An eos token inside a prompt (there are chat templates with one) ends no answer.
    assert m.answer_mask(torch.tensor([[1, 2, 7, 1]]), torch.tensor([3]), 1).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_brute_force_sum(m, seed):
    rng = random.Random(seed)
    gamma, lam = rng.choice([1.0, 0.9]), rng.choice([0.0, 0.5, 0.95, 1.0])
    _, rewards, values, _, mask = terms(seed)
    advantages, returns = m.gae(rewards, values, mask, gamma, lam)  # whatever stands outside of the answers
    for row in range(len(mask)):
        where = mask[row].nonzero()[:, 0].tolist()
        v = [*values[row, where].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(where)]
        for t in range(mask.size(1)):
            i = where.index(t) if t in where else None
            wanted = 0.0 if i is None else sum((gamma * lam) ** k * delta[i + k] for k in range(len(where) - i))
            assert advantages[row, t].item() == pytest.approx(wanted, abs=1e-9)
            assert returns[row, t].item() == pytest.approx(0.0 if i is None else wanted + v[i], abs=1e-9)


def test_whiten(m):
    _, x, _, _, mask = terms(0)
    white = m.whiten(x, mask)
    real = white[mask.bool()]
    assert real.mean().abs() < 1e-9 and real.var(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert not white[mask == 0].any()
    torch.testing.assert_close(m.whiten(x.masked_fill(mask == 0, 1e6), mask), white)


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages(m, scale):
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0))
    ours = m.group_advantages(rewards, 4, scale)
    for g in range(6):
        r = rewards[4 * g:4 * g + 4].tolist()
        mean = sum(r) / 4
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / 3)
        for i in range(4):
            wanted = (r[i] - mean) / (std + 1e-4) if scale else r[i] - mean
            assert ours[4 * g + i].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert not m.group_advantages(torch.full((8,), 0.7), 4).any()  # equal rewards: nothing to learn


def trl_grpo(variant, logps, old, advantages, mask, low, high):
    """TRL's GRPOTrainer._compute_loss on these numbers."""
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=False)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None), beta=0.0,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        loss_type="grpo" if variant == "gspo" else variant, model=SimpleNamespace(training=True), accelerator=same,
        importance_sampling_level="sequence" if variant == "gspo" else "token",
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        epsilon_low=low, epsilon_high=high, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=mask.size(1), _entropy_bonus_enabled=False, _step=0,
        _metrics={"train": defaultdict(list)})
    inputs = {"prompt_ids": torch.zeros(len(mask), 1).long(), "prompt_mask": torch.ones(len(mask), 1).long(),
              "completion_ids": torch.zeros(mask.shape).long(), "completion_mask": mask,
              "advantages": advantages[:, 0], "old_per_token_logps": old, "num_items_in_batch": mask.sum()}
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_trl(m, variant, seed):
    logps, old, _, advantages, mask = terms(seed)
    if variant == "gspo":  # ratios within its narrow clip, at its ends and beyond
        old = logps.detach() + 3e-3 * (old - logps.detach())
    low, high = (3e-4, 4e-4) if variant == "gspo" else (0.2, 0.28 if variant == "dapo" else 0.2)
    wanted = trl_grpo(variant, logps, old, advantages, mask, low, high)
    wanted_gradient, = torch.autograd.grad(wanted, logps)
    loss, clipped = m.policy_loss(logps, old, advantages, mask, variant, 0.2)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], wanted_gradient, rtol=1e-6, atol=1e-9)
    assert 0 < clipped < 1
    if variant != "gspo":  # where the clip decides there is no gradient, and elsewhere there is
        ratio = (logps - old).exp()
        beyond = ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
        assert torch.equal(wanted_gradient != 0, ~beyond & (mask > 0))
        assert clipped.item() == pytest.approx(((beyond * mask).sum() / mask.sum()).item())


@pytest.mark.parametrize("seed", range(2))
def test_ppos_losses_are_the_reference_formulas(m, seed):
    """Written out for one token at a time, as in OpenAI's and TRL's trainers."""
    logps, old, old_values, _, mask = terms(seed)
    g = torch.Generator().manual_seed(seed + 10)
    advantages, returns, noise = (torch.randn(6, 9, generator=g, dtype=torch.float64) for _ in range(3))
    values = old_values + 0.4 * noise
    policy = critic = 0.0
    for i, t in mask.nonzero().tolist():
        ratio, A = math.exp((logps - old)[i, t].item()), advantages[i, t].item()
        policy += max(-A * ratio, -A * min(max(ratio, 0.8), 1.2))
        v, v_old, R = values[i, t].item(), old_values[i, t].item(), returns[i, t].item()
        critic += 0.5 * max((v - R) ** 2, (min(max(v, v_old - 0.3), v_old + 0.3) - R) ** 2)
    count = mask.sum().item()
    assert m.policy_loss(logps, old, advantages, mask, "ppo", 0.2)[0].item() == pytest.approx(policy / count)
    assert m.value_loss(values, old_values, returns, mask, 0.3).item() == pytest.approx(critic / count)


def test_the_gradient_at_ratio_one_is_reinforces(m):
    logps, _, _, advantages, mask = terms(0)
    for variant in (*VARIANTS, "ppo"):
        loss, clipped = m.policy_loss(logps, logps.detach(), advantages, mask, variant, 0.2)
        ours, = torch.autograd.grad(loss, logps)
        weight = mask / mask.sum(1, keepdim=True) / 6 if variant in ("grpo", "gspo") else (
            mask / mask.numel() if variant == "dr_grpo" else mask / mask.sum())
        torch.testing.assert_close(ours, -advantages * weight)
        assert clipped == 0


def test_token_rewards_stand_where_the_answer_ends(m):
    _, logps, ref, scores, mask = terms(0)
    rewards = m.token_rewards(scores[:, 0], logps, ref, mask, 0.1)
    for i in range(6):
        where = mask[i].nonzero()[:, 0].tolist()
        for t in range(9):
            wanted = -0.1 * (logps - ref)[i, t].item() * (t in where) + scores[i, 0].item() * (t == where[-1])
            assert rewards[i, t].item() == pytest.approx(wanted, abs=1e-9)


# --- rollouts and rewards --------------------------------------------------------------------------------------------
def test_rollouts_sample_the_models_distribution(m):
    """First tokens against softmax, greedy answers against a decoder without a cache, one row at a time."""
    model, prompts = small(m), [m.encode_toy("123="), m.encode_toy("456789=")]
    ids, starts = m.rollout(model, [prompt for prompt in prompts for _ in range(3000)], 10, m.EOS, 0.8,
                            torch.Generator().manual_seed(0))
    assert starts.tolist() == [4] * 3000 + [7] * 3000
    for i, prompt in enumerate(prompts):
        rows = ids[3000 * i:3000 * (i + 1)]
        assert (rows[:, :len(prompt)] == torch.tensor(prompt)).all()
        wanted = (model(torch.tensor([prompt]))[0, -1] / 0.8).softmax(-1)
        got = torch.bincount(rows[:, len(prompt)], minlength=43) / 3000
        assert (wanted - got).abs().max() < 0.03
    with torch.no_grad():
        model.head.weight[m.EOS] *= 3  # answers that end at all times
    prompts = [m.encode_toy(f"{n}=") for n in m.draw_numbers(40, 0, False)]
    ids, starts = m.rollout(model, prompts, 18, m.EOS, 0.0)
    lengths = []
    for row, prompt in zip(ids.tolist(), prompts, strict=True):
        wanted = list(prompt)
        while len(wanted) < 18 and (len(wanted) == len(prompt) or wanted[-1] != m.EOS):
            wanted.append(model(torch.tensor([wanted]))[0, -1].argmax().item())
        lengths.append(len(wanted) - len(prompt))
        assert row == (wanted + [m.EOS] * 18)[:18]
    assert min(lengths) < 3 and max(lengths) > 6


def test_cut_off_answers_never_score_better(m):
    """Case 17: a reward that is never above 0 must not make endless answers the best ones."""
    texts, ended = ["one", "one two", "one", "one two"], [True, True, False, False]
    errors = m.score_answers(lambda p, a: -len(a.split()), ["1="] * 4, texts, ended).tolist()
    assert errors == [-1, -2, -2, -2]
    assert m.score_answers(lambda p, a: len(a.split()), ["1="] * 4, texts, ended).tolist() == [1, 2, 0, 0]
    assert m.score_answers(m.exact_reward, ["1="] * 4, texts, ended).tolist() == [1, 0, 0, 0]
    assert m.exact_reward("40215=", "forty thousand two hundred") == 0.0


def test_collect_judges_what_was_written(m, monkeypatch):
    """Prompt and text of each answer, without its EOS or filling; inputs, targets and mask of one rollout."""
    rows = [m.encode_toy(text) for text in ("123=one two\n", "4567=six\n", "89=one one one one one one one one one")]
    ids = torch.tensor([(row + [m.EOS] * 12)[:12] for row in rows])
    monkeypatch.setattr(m, "rollout", lambda *args: (ids, torch.tensor([4, 5, 3])))
    seen = []
    inputs, targets, mask, rewards, ended, texts = m.collect(
        None, [123, 4567, 89], lambda p, a: seen.append((p, a)) or len(a), config(m, block_size=12), 0)
    assert texts == ["one two", "six", " ".join(["one"] * 9)]
    assert seen == list(zip(["123=", "4567=", "89="], texts, strict=True))
    assert torch.equal(inputs, ids[:, :-1]) and torch.equal(targets, ids[:, 1:])
    assert mask.sum(1).tolist() == [3, 2, 9] and rewards.tolist() == [7, 3, 0] and ended == pytest.approx(2 / 3)


def test_splits_and_hasty_labels(m):
    train, held_out = m.draw_prompts(3000, 0, False), m.draw_prompts(500, 0, True)
    assert len(train) == 3000 and not any(map(m.is_validation, train)) and all(map(m.is_validation, held_out))
    assert all(99 < n < 1_000_000 for n in train + held_out)
    inputs, targets = m.hasty_rows(train, config(m, right_share=0.3))
    whole = 0
    for n, row, read in zip(train, targets.tolist(), inputs.tolist(), strict=True):
        name, full = m.decode_toy([token for token in row if token != m.IGNORE]), m.number_to_words(n)
        whole += name == full
        assert name in (full, full.rsplit(" ", 1)[0]) and m.encode_toy(f"{n}=") == read[:len(str(n)) + 1]
        assert row[len(str(n)) - 1] == m.IGNORE != row[len(str(n))]
    assert whole / 3000 == pytest.approx(0.3, abs=0.04)


# --- wiring ----------------------------------------------------------------------------------------------------------
class Watch:
    """Replaces a function of the script by itself, and keeps arguments and results of all calls."""

    def __init__(self, m, monkeypatch, name, replace=None):
        self.calls, real = [], getattr(m, name)

        def spy(*args, **kwargs):
            result = (replace or real)(*args, **kwargs)
            self.calls.append((args, result))
            return result
        monkeypatch.setattr(m, name, spy)


def noisy(prompt, answer):
    """A reward that differs from answer to answer."""
    return zlib.crc32(f"{prompt}{answer}".encode()) % 97 / 97


@pytest.mark.parametrize("method, variant", [("reinforce", "dapo"), ("ppo", "dapo"), ("grpo", "dapo"),
                                             ("grpo", "dr_grpo")])
def test_an_update_uses_what_was_sampled(m, method, variant, monkeypatch):
    """Prompts of the training split, in groups; advantages of the paper; the first step at ratio 1, later ones not."""
    cfg = config(m, max_steps=1, epochs=3, lr=0.02, warmup_steps=1, variant=variant, kl_coef=0.5, lam=0.9, gamma=0.8)
    policy = small(m)
    before, looked = copy.deepcopy(policy), []
    collect, loss, draw = (Watch(m, monkeypatch, name) for name in ("collect", "policy_loss", "draw_prompts"))
    critic_loss, schedule = (Watch(m, monkeypatch, name) for name in ("value_loss", "lr_at"))
    looks = m.reinforce(policy, cfg, method, noisy, lambda one: looked.append(one) or {"sampled": 0.5})
    count, group = (16, 4) if method == "grpo" else (8, 1)
    assert draw.calls[0][0][0] == count // group and draw.calls[0][0][2] is False
    (one, numbers, _, _, _), (inputs, targets, mask, rewards, _, _) = collect.calls[0]
    assert one is policy and looked == [policy] and not any(map(m.is_validation, numbers))
    assert numbers == [n for n in draw.calls[0][1] for _ in range(group)] and len(rewards) == count
    old = m.token_logps(before(inputs), targets)
    steps = {"reinforce": 1, "ppo": 3, "grpo": 3}[method]
    assert len(loss.calls) == steps == max(1, len(critic_loss.calls)) * (3 if method == "grpo" else 1)
    advantages = loss.calls[0][0][2]
    for i, ((logps, old_logps, same, mask_, used, clip), _) in enumerate(loss.calls):
        assert same is advantages
        torch.testing.assert_close(old_logps, old, rtol=1e-4, atol=1e-4)
        assert torch.equal(mask_, mask) and torch.equal(logps, old_logps) == (i == 0) and clip == 0.2
        assert used == (variant if method == "grpo" else "ppo")
    if method == "grpo":
        torch.testing.assert_close(advantages[:, 0], m.group_advantages(rewards, 4, variant != "dr_grpo"))
    elif method == "reinforce":
        torch.testing.assert_close(advantages[:, 0], rewards - rewards.mean())
    else:  # the critic begins at 0, and at the first rollout policy and reference are one
        scores = torch.zeros_like(mask).scatter(1, (mask * torch.arange(17)).argmax(1, keepdim=True), rewards[:, None])
        torch.testing.assert_close(advantages, m.whiten(m.gae(scores, 0 * mask, mask, 0.8, 0.9)[0], mask))
    assert looks[-1]["answers"] == count and not torch.equal(policy.head.weight, before.head.weight)


def test_ppos_second_rollout_pays_for_distance(m, monkeypatch):
    """The reference is the imitator, KL has its sign, and the critic has learned by then, on a rate of its own."""
    cfg = config(m, max_steps=2, lr=0.02, value_lr=0.3, warmup_steps=1, kl_coef=0.5)
    policy = small(m)
    imitator = copy.deepcopy(policy)
    reward, advantage = Watch(m, monkeypatch, "token_rewards"), Watch(m, monkeypatch, "gae")
    values, collect = Watch(m, monkeypatch, "value_loss"), Watch(m, monkeypatch, "collect")
    m.reinforce(policy, cfg, "ppo", noisy, lambda one: {})
    (scores, logps, ref, mask, kl_coef), rewards = reward.calls[1]
    inputs, targets, mask_, rewards_, _, _ = collect.calls[1][1]
    torch.testing.assert_close(ref, m.token_logps(imitator(inputs), targets).detach(), rtol=1e-4, atol=1e-4)
    assert kl_coef == 0.5 and torch.equal(scores, rewards_) and torch.equal(mask, mask_)
    assert not torch.allclose(logps, ref, atol=1e-3)
    assert advantage.calls[1][0][0] is rewards and advantage.calls[1][0][1].abs().max() > 0.01
    assert not advantage.calls[0][0][1].any() and advantage.calls[1][0][3:] == (cfg.gamma, cfg.lam)
    # The critic's targets are GAE's returns, and its old values those of the rollout.
    assert values.calls[3][0][1] is advantage.calls[1][0][1] and values.calls[3][0][2] is advantage.calls[1][1][1]


def test_the_critic_does_not_bend_the_policy(m, monkeypatch):
    """With equal advantages of 0 only the critic learns."""
    policy = small(m)
    before = copy.deepcopy(policy.state_dict())
    monkeypatch.setattr(m, "whiten", lambda x, mask: 0 * x)
    monkeypatch.setattr(m, "make_optimizer", lambda model, cfg: torch.optim.SGD(model.parameters(), lr=1.0))
    values = Watch(m, monkeypatch, "value_loss")
    m.reinforce(policy, config(m, max_steps=1, warmup_steps=1), "ppo", noisy, lambda one: {})
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert values.calls[0][1].item() > 0 and values.calls[2][1].item() != values.calls[0][1].item()


def test_learning_rates_are_the_named_ones(m, monkeypatch):
    made, rates, real = [], [], torch.optim.AdamW

    class Adam(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def step(self, *args):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(*args)
    monkeypatch.setattr(torch.optim, "AdamW", Adam)
    cfg, policy = config(m, max_steps=4, warmup_steps=2, lr=1e-3, value_lr=5e-3, ppo_epochs=1), small(m)
    m.reinforce(policy, cfg, "ppo", noisy, lambda one: {})
    optimizer, = made
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(policy.parameters())), 2]
    assert rates == [pytest.approx([lr, 5 * lr]) for lr in (5e-4, 1e-3, 1e-3, 5e-4)]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("rounds", [1, 4])
def test_rejection_imitates_the_best_answers(m, rounds, monkeypatch):
    imitator, cfg = small(m), config(m)
    before, looked = copy.deepcopy(imitator.state_dict()), []
    collect, fit, draw = (Watch(m, monkeypatch, name) for name in ("collect", "fit", "draw_prompts"))
    policy, looks = m.reject(imitator, cfg, noisy, rounds, lambda one: looked.append(one) or {})
    assert [look["answers"] for look in looks] == [400 // rounds * (i + 1) for i in range(rounds)]
    assert all(torch.equal(before[name], tensor) for name, tensor in imitator.state_dict().items())
    assert policy is looked[-1] is not imitator and len(fit.calls) == rounds == len(collect.calls)
    assert all(args[2] is False for args, _ in draw.calls) and collect.calls[0][0][0] is imitator
    assert len({args[1] for args, _ in draw.calls}) == rounds
    wanted = []
    for i, ((_, numbers, *_), (inputs, targets, mask, rewards, _, _)) in enumerate(collect.calls):
        assert numbers == draw.calls[i][1] and len(numbers) == 400 // rounds
        best = rewards == rewards.max()
        assert 0 < best.sum() < len(best) / 2
        wanted.append((inputs[best], targets.masked_fill(mask == 0, m.IGNORE)[best]))
        (model, _, data, loss_fn, *_), _ = fit.calls[i]
        for ours, theirs in zip(data, zip(*wanted, strict=True), strict=True):
            assert torch.equal(ours, torch.cat(theirs)) and loss_fn is m.compute_loss
        assert model is looked[i] and (i + 1 == rounds or collect.calls[i + 1][0][0] is model)  # the better one samples


def test_a_round_in_which_all_are_equal_ends_nothing(m, monkeypatch):
    """When the policy is right everywhere there is nothing new to keep, and what was kept still counts."""
    rewards = iter([torch.tensor([1.0, 0, 0, 0] * 2), torch.ones(8)])
    real = m.collect
    monkeypatch.setattr(m, "collect", lambda *args: (*real(*args)[:3], next(rewards), 1.0, []))
    policy, looks = m.reject(small(m), config(m, rejection_answers=16), noisy, 2, lambda one: {})
    assert [look["answers"] for look in looks] == [8, 16]
    with pytest.raises(ValueError, match="nothing to keep"):
        monkeypatch.setattr(m, "collect", lambda *args: (*real(*args)[:3], torch.ones(8), 1.0, []))
        m.reject(small(m), config(m, rejection_answers=16), noisy, 2, lambda one: {})


def test_every_stage_begins_from_the_imitator(m, tmp_path, monkeypatch):
    """A whole run: one imitator, own copies of it, training on training numbers, looking at two held-out parts."""
    stages, looks = [], Watch(m, monkeypatch, "look_at")
    for name in ("reject", "reinforce"):
        real = getattr(m, name)

        def spy(policy, *args, name=name, real=real):
            stages.append((name, args[1] if name == "reinforce" else args[2], policy,
                           copy.deepcopy(policy.state_dict())))
            return real(policy, *args)
        monkeypatch.setattr(m, name, spy)
    fit, data = Watch(m, monkeypatch, "fit"), Watch(m, monkeypatch, "hasty_rows")
    cfg = config(m, out=str(tmp_path), seed=5, sft_lr=0.01, answers=128)
    monkeypatch.setattr(m, "exact_reward", noisy)
    policies = m.main(cfg)
    assert [stage[:2] for stage in stages] == [("reject", 1), ("reject", 4), ("reinforce", "reinforce"),
                                               ("reinforce", "ppo"), ("reinforce", "grpo")]
    imitator = policies["sft"].state_dict()
    for _, _, _, start in stages:
        assert all(torch.equal(tensor, start[name]) for name, tensor in imitator.items())
    assert list(policies) == ["sft", "rejection", "iterated", "reinforce", "ppo", "grpo"]
    assert len({id(policy) for policy in policies.values()}) == 6
    assert not any(torch.equal(policies["sft"].head.weight, one.head.weight) for one in list(policies.values())[1:])
    (numbers, _), _ = data.calls[0]
    assert not any(map(m.is_validation, numbers)) and len(data.calls) == 1
    assert fit.calls[0][0][2] is data.calls[0][1] and fit.calls[0][0][4:6] == (2, 0.01)
    way, final = looks.calls[0][0][2], looks.calls[-1][0][2]
    assert not set(way) & set(final) and all(map(m.is_validation, way + final)) and len(final) == 500
    assert [args[0] for args, _ in looks.calls[-6:]] == list(policies.values())
    assert all(args[1] is policies["sft"] for args, _ in looks.calls) and len(m.TOY_VOCAB) == cfg.vocab_size
    assert sum(n > 99_999 for n in final) > 100 < sum(n < 10_000 for n in final)  # as prompts are drawn
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["results"]["answers"] == dict(sft=0, rejection=400, iterated=400, reinforce=128, ppo=128, grpo=256)
    assert set(summary["results"]) == {"accuracy", "accuracy_greedy", "answers", "seconds", "kl", "ended"}
    assert summary["results"]["kl"]["sft"] == 0 and (tmp_path / "curve.png").stat().st_size > 10_000


def test_look_at_measures_its_own_samples(m):
    policy, other = small(m), small(m, 1)
    figures = m.look_at(policy, other, [123, 4567, 89_000] * 30, lambda p, a: len(a.split()), config(m))
    assert figures["kl"] > 1 and 0 <= figures["ended"] <= 1 and figures["sampled"] != figures["greedy"]
    assert m.look_at(policy, policy, [123], m.exact_reward, config(m))["kl"] == 0


def test_the_same_seed_gives_the_same_run(m):
    runs = [m.reinforce(small(m), config(m), "grpo", noisy, lambda one: dict(w=one.head.weight.sum().item()))
            for _ in range(2)]
    assert [{k: v for k, v in look.items() if k != "seconds"} for look in runs[0]] == [
        {k: v for k, v in look.items() if k != "seconds"} for look in runs[1]]


# --- rewards of one's own, and mistakes ------------------------------------------------------------------------------
REWARD = """from __future__ import annotations
import dataclasses
import neighbor


@dataclasses.dataclass
class Weights:
    word: float = neighbor.WORD


def words(prompt, answer):
    return len(answer.split()) * Weights().word + len(prompt) / 100


def fails(prompt, answer):
    raise KeyError("no such answer")


def nan(prompt, answer):
    return float("nan")


def same(prompt, answer):
    return 0.0


def leaves(prompt, answer):
    raise SystemExit
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "mine.py").write_text(REWARD)
    (folder / "neighbor.py").write_text("WORD = 0.1\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "neighbor", raising=False)
    monkeypatch.chdir(tmp_path)
    return "my rewards/mine.py"


def test_a_reward_of_ones_own(m, mine):
    """Case 18: dataclasses with postponed annotations, and an import of a neighbor, as `python mine.py` has them."""
    reward = m.find_reward(f"{mine}:words")
    assert reward("12=", "one two") == pytest.approx(0.23) and m.find_reward("exact") is m.exact_reward
    assert "mine" not in sys.modules


@pytest.mark.parametrize("change, words", [
    (dict(reward="{}:fails"), "KeyError"), (dict(reward="{}:nan"), "is nan"), (dict(reward="{}:gone"), "no attribute"),
    (dict(reward="no.py:f"), "--reward no.py:f"), (dict(reward="{}:same", methods="grpo"), "nothing to learn from"),
    (dict(reward="{}:same", methods="rejection"), "nothing to keep"), (dict(methods="magic"), "methods are"),
    (dict(variant="x"), "variant is one of"), (dict(group=1), "group at 2"), (dict(answers=12), "2 * group answers"),
    (dict(n_embd=25), "n_embd"), (dict(lr=0.0), "lr is above 0"), (dict(epochs=0), "start at 1"),
    (dict(rejection_answers=3), "at 4"), (dict(n_head=0), "n_head"), (dict(reward="mine.py"), "exact or FILE.py"),
    (dict(reward="{}:leaves"), "SystemExit")])
def test_mistakes_cost_one_line(m, mine, change, words):
    change = {key: value.format(mine) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=words.replace("*", r"\*")):
        m.main(config(m, **change))


def test_the_command_line(m, tmp_path):
    done = subprocess.run([sys.executable, m.__file__, "--reward", "no.py:f"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --reward no.py:f") and done.stderr.count("\n") == 1


def test_pieces_run_alone(m):
    """What readers paste: each with the few helpers that it names, and torch."""
    import inspect
    for names, call in ((("gae",), "gae(*torch.ones(3, 2, 3), 1.0, 0.9)"),
                        (("policy_loss", "group_advantages"), "policy_loss(*torch.zeros(2, 4, 3), group_advantages("
                         "torch.rand(4), 2)[:, None], torch.ones(4, 3), 'grpo', 0.2)")):
        space = {}
        exec("import torch\nimport torch.nn.functional as F\n" + "\n\n".join(
            inspect.getsource(getattr(m, name)) for name in names), space)
        eval(call, space)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1337, 1, 2, 3, 4])
def test_ppo_and_grpo_learn(m, seed, tmp_path):
    m.main(dataclasses.replace(m.Config(device="cpu"), seed=seed, out=str(tmp_path), methods="ppo,grpo"))
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert results["accuracy"]["sft"] <= 0.4
    for method in ("ppo", "grpo"):
        assert round(min(results["accuracy"][method], results["accuracy_greedy"][method]), 4) >= 0.95  # float32
        assert results["seconds"][method] <= 60


def scenario(m, tmp_path, fixed):
    """Every shape comment of the script, in one short run."""
    cfg, m.exact_reward = config(m, out=str(tmp_path), variant="gspo", answers=128), noisy
    fixed.update(C=24, D=8, V=43, G=4, F=40, H=3)
    m.main(cfg)
    m.find_reward("exact")
