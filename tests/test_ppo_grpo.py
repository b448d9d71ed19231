"""ppo_grpo.py against TRL's formulas, brute-force sums, and the bookkeeping that reinforcement learning gets wrong.

    pytest tests/test_ppo_grpo.py --script my_rl.py      grade your own file
"""

import copy
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch


def config(m, **changes):
    """A model small enough for a test; sizes are pairwise different."""
    return m.Config(**{**dict(vocab_size=46, n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=10, ffn_size=40,
                              block_size=24, init_std=0.2, device="cpu"), **changes})


def agent_of(m, seed=0, **changes):
    agent = m.Agent(m.build_model(config(m, seed=seed, **changes)))
    torch.manual_seed(seed)
    torch.nn.init.normal_(agent.critic.weight)
    return agent.eval()


def some_batch(m, seed=0, B=6, group=2):
    """A real rollout of an untrained model: answers of many lengths, most of them cut off."""
    policy, tokenizer = agent_of(m, seed).policy, m.ToyTokenizer()
    with torch.no_grad():
        policy.lm_head.weight[m.TOY_VOCAB.index("\n")] += 0.3 * torch.randn(24)
    numbers = m.draw_prompts(B // group, seed, "train")
    batch, _ = m.collect(policy, tokenizer, lambda prompt, answer: len(answer), numbers, group, config(m), seed)
    torch.manual_seed(seed)
    for row in range(B):  # answers of all lengths, each with its EOS
        end = 1 + (seed + 3 * row) % 11
        batch["tokens"][row, end] = m.TOY_VOCAB.index("\n")
        batch["tokens"][row, :end][batch["tokens"][row, :end] == m.TOY_VOCAB.index("\n")] = 20
    prompts = [row[:start].tolist() for row, start in zip(batch["inputs"], batch["starts"].tolist(), strict=True)]
    return m.make_batch(prompts, batch["tokens"], tokenizer.eos_ids)


def random_terms(seed, B=6, N=9):
    """logps, old, ref (B, N), advantages (B), mask (B, N) with rows of many lengths."""
    generator = torch.Generator().manual_seed(seed)
    logps, old, ref = (-3 * torch.rand(B, N, generator=generator, dtype=torch.float64) for _ in range(3))
    old = logps + 0.4 * torch.randn(B, N, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, N + 1, (B, 1), generator=generator)
    mask = (torch.arange(N) < lengths).double()
    return logps.requires_grad_(True), old, ref, torch.randn(B, generator=generator, dtype=torch.float64), mask


# ---------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("seed", range(3))
def test_token_logps(m, seed):
    torch.manual_seed(seed)
    logits, tokens = torch.randn(3, 5, 46), torch.randint(46, (3, 5))
    for temperature in (1.0, 0.7):
        wanted = (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        torch.testing.assert_close(m.token_logps(logits, tokens, temperature), wanted)


@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_brute_force_sum(m, seed):
    rng = random.Random(seed)
    gamma, lam = rng.choice([1.0, 0.9]), rng.choice([0.0, 0.5, 0.95, 1.0])
    _, rewards, values, _, mask = random_terms(seed)
    advantages, returns = m.gae(rewards, values, mask, gamma, lam)  # whatever stands behind the ends
    for row in range(len(mask)):
        n = int(mask[row].sum())
        v = [*values[row, :n].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(mask.size(1)):
            wanted = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) if t < n else 0.0
            assert advantages[row, t].item() == pytest.approx(wanted, abs=1e-9)
            assert returns[row, t].item() == pytest.approx(wanted + v[t] if t < n else 0.0, abs=1e-9)
    # lam 1, gamma 1: the return is the sum of the rewards to the end.
    _, returns = m.gae(rewards * mask, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns[:, 0], (rewards * mask).sum(1))


def test_whiten(m):
    _, x, _, _, mask = random_terms(0)
    white = m.whiten(x, mask)
    real = white[mask.bool()]
    assert real.mean().abs() < 1e-9 and real.var().item() == pytest.approx(1, rel=1e-5) and not white[mask == 0].any()
    other = x.clone()
    other[mask == 0] = 1e6
    torch.testing.assert_close(m.whiten(other, mask), white)


@pytest.mark.parametrize("seed", range(3))
def test_group_advantages(m, seed):
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(seed))
    for scale in (True, False):
        ours = m.group_advantages(rewards, 4, scale)
        for g in range(6):
            r = rewards[4 * g:4 * g + 4].tolist()
            mean = sum(r) / 4
            std = math.sqrt(sum((x - mean) ** 2 for x in r) / 3)  # divided by G - 1
            for i in range(4):
                wanted = (r[i] - mean) / (std + 1e-4) if scale else r[i] - mean
                assert ours[4 * g + i].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    # A constant added to one group's rewards changes nothing; equal rewards give zero.
    torch.testing.assert_close(m.group_advantages(rewards + torch.arange(6).repeat_interleave(4), 4),
                               m.group_advantages(rewards, 4), rtol=1e-3, atol=1e-4)
    assert not m.group_advantages(torch.full((8,), 0.7), 4).any()


def trl_grpo(loss_type, logps, old, ref, advantages, mask, beta, low, high, longest):
    """TRL's GRPOTrainer._compute_loss on these numbers."""
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=False)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None), beta=beta,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, loss_type=loss_type,
        importance_sampling_level="token", args=SimpleNamespace(use_bias_correction_kl=False, delta=None,
                                                                steps_per_generation=1),
        epsilon_low=low, epsilon_high=high, use_vllm=False, model=SimpleNamespace(training=True), accelerator=same,
        current_gradient_accumulation_steps=1, max_completion_length=longest, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)}, _step=0)
    inputs = {"prompt_ids": torch.zeros(len(mask), 1).long(), "prompt_mask": torch.ones(len(mask), 1).long(),
              "completion_ids": torch.zeros(mask.shape).long(), "completion_mask": mask, "advantages": advantages,
              "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()}
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo"])
def test_losses_and_gradients_equal_trl(m, variant, beta, seed):
    logps, old, ref, advantages, mask = random_terms(seed)
    high = 0.28 if variant == "dapo" else 0.2
    wanted = trl_grpo(variant, logps, old, ref, advantages, mask, beta, 0.2, high, 12)
    wanted_gradient, = torch.autograd.grad(wanted, logps)
    cfg = config(m, variant=variant, kl_beta=beta, clip=0.2, clip_high=0.28, max_answer=12)
    loss, found = m.grpo_loss(lambda batch, temperature: (logps, None), {"mask": mask}, advantages, old, ref, cfg)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], wanted_gradient, rtol=1e-6, atol=1e-7)
    assert 0 < found["clip_fraction"] < 1
    if beta == 0:  # where the clip decides there is no gradient, and elsewhere there is
        ratio = (logps - old).exp()
        beyond = ((ratio > 1 + high) & (advantages[:, None] > 0)) | ((ratio < 0.8) & (advantages[:, None] < 0))
        assert torch.equal(wanted_gradient != 0, ~beyond & (mask > 0))


@pytest.mark.parametrize("seed", range(3))
def test_ppos_loss_is_the_reference_formula(m, seed):
    """Written out for one token at a time, as in OpenAI's and TRL's trainers."""
    logps, old, old_values, _, mask = random_terms(seed)
    generator = torch.Generator().manual_seed(seed + 10)
    advantages, returns, noise = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    values = (old_values + 0.4 * noise).requires_grad_(True)
    cfg = config(m, clip=0.2, value_clip=0.3, value_coef=0.7)
    loss, _ = m.ppo_loss(lambda batch, temperature: (logps, values), {"mask": mask}, advantages, returns, old,
                         old_values, cfg)
    policy = critic = 0.0
    for i, t in mask.nonzero().tolist():
        ratio, A = math.exp((logps - old)[i, t].item()), advantages[i, t].item()
        policy += max(-A * ratio, -A * min(max(ratio, 0.8), 1.2))
        v, v_old, R = values[i, t].item(), old_values[i, t].item(), returns[i, t].item()
        critic += 0.5 * max((v - R) ** 2, (min(max(v, v_old - 0.3), v_old + 0.3) - R) ** 2)
    assert loss.item() == pytest.approx((policy + 0.7 * critic) / mask.sum().item())


def test_token_rewards_stand_where_the_answer_ends(m):
    _, logps, ref, scores, mask = random_terms(0)
    rewards = m.token_rewards(scores, logps, ref, mask, 0.1)
    for i in range(6):
        n = int(mask[i].sum())
        for t in range(9):
            wanted = -0.1 * (logps - ref)[i, t].item() * (t < n) + scores[i].item() * (t == n - 1)
            assert rewards[i, t].item() == pytest.approx(wanted, abs=1e-9)


def test_k3_is_an_unbiased_kl_and_never_negative(m):
    torch.manual_seed(0)
    p, q = torch.randn(7).log_softmax(-1).double(), torch.randn(7).log_softmax(-1).double()
    each = m.k3(p, q)
    assert (each >= 0).all()
    assert (p.exp() * each).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-6)


# ---------------------------------------------------------------------------------------- bookkeeping


def test_scores_are_those_of_the_answers_tokens(m):
    """One row at a time, without padding, position by position."""
    agent, batch = agent_of(m), some_batch(m)
    for temperature in (1.0, 0.6):
        logps, values = agent(batch, temperature)
        for i in range(6):
            n, start = int(batch["mask"][i].sum()), int(batch["starts"][i])
            row = batch["inputs"][i, :start].tolist() + batch["tokens"][i, :n].tolist()
            hidden = agent.policy.hidden(torch.tensor([row]))
            wanted = (agent.policy.lm_head(hidden)[0] / temperature).log_softmax(-1)
            for t in range(n):
                torch.testing.assert_close(logps[i, t], wanted[start - 1 + t, row[start + t]], rtol=1e-4, atol=1e-4)
                value = agent.critic(hidden)[0, start - 1 + t, 0]
                torch.testing.assert_close(values[i, t], value, rtol=1e-4, atol=1e-4)


def test_masks_end_with_the_eos(m):
    eos = m.TOY_VOCAB.index("\n")
    tokens = torch.tensor([[5, 6, eos, 0, 0], [eos, 0, 0, 0, 0], [5, 6, 7, 8, 9], [5, 6, 7, 8, eos]])
    batch = m.make_batch([[2], [3, 4], [2], [3]], tokens, (eos,))
    assert batch["mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1] * 5, [1] * 5]
    assert batch["starts"].tolist() == [1, 2, 1, 1] and batch["inputs"].shape == (4, 6)
    assert batch["inputs"][1].tolist() == [3, 4, eos, 0, 0, 0]


def losses_of(m, agent, batch, method, rewards, old=None):
    cfg = config(m, variant="grpo", kl_beta=0.05)
    with torch.no_grad():
        now, values = agent(batch, 1.0)
    old = now if old is None else old
    ref, mask = now - 0.3, batch["mask"]
    if method == "ppo":
        advantages, returns = m.gae(m.token_rewards(rewards, old, ref, mask, 0.01), values, mask, 1.0, 0.95)
        return m.ppo_loss(agent, batch, m.whiten(advantages, mask), returns, old, values, cfg)[0]
    return m.grpo_loss(agent, batch, m.group_advantages(rewards, 2), old, ref, cfg)[0]


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_what_pads_contain_changes_nothing(m, method):
    agent, batch, rewards = agent_of(m), some_batch(m), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    found = []
    for fill in (0, 17):
        other = {key: value.clone() for key, value in batch.items()}
        other["tokens"][batch["mask"] == 0] = fill
        for i in range(6):
            other["inputs"][i, int(batch["starts"][i]) + int(batch["mask"][i].sum()):] = fill
        agent.zero_grad()
        loss = losses_of(m, agent, other, method, rewards)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in agent.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_gradient_at_ratio_one_is_reinforces(m):
    agent, batch = agent_of(m), some_batch(m)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    cfg = config(m, variant="dapo", kl_beta=0.0)
    advantages = rewards - rewards.mean()
    with torch.no_grad():
        old, _ = agent(batch, 1.0)
    loss, found = m.grpo_loss(agent, batch, advantages, old, old, cfg)
    assert found["clip_fraction"] == 0
    ours = torch.autograd.grad(loss, agent.policy.lm_head.weight)[0]
    logps, _ = agent(batch, 1.0)
    assert torch.equal(logps.detach(), old)  # the ratio is exactly 1, and the approximate KL exactly 0
    theirs = -(advantages[:, None] * logps * batch["mask"]).sum() / batch["mask"].sum()
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, agent.policy.lm_head.weight)[0])


@pytest.mark.parametrize("method", ["reinforce", "grpo", "ppo"])
def test_the_first_step_on_a_rollout_is_on_policy(m, method, monkeypatch):
    """Inside update(): ratio exactly 1 and no clipping on the first of several steps, other ratios later."""
    agent, reference, batch = agent_of(m), agent_of(m, 1), some_batch(m)
    ratios, clip = [], m.clipped_loss

    def watch(logps, old_logps, *args):
        ratios.append((logps - old_logps).detach().exp())
        return clip(logps, old_logps, *args)
    monkeypatch.setattr(m, "clipped_loss", watch)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-2)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    found = m.update(agent, reference, optimizer, batch, rewards, config(m), method, 3, 2)
    assert (ratios[0] == 1).all() and not (ratios[1] == 1).all()
    assert found["kl"] != 0 and found["clip_fraction"] > 0
    if method != "ppo":
        critic = agent_of(m).critic.weight
        assert torch.equal(agent.critic.weight, critic)  # nobody but PPO trains the critic


def test_the_critic_does_not_bend_the_policy(m):
    agent, batch = agent_of(m), some_batch(m)
    _, values = agent(batch, 1.0)
    values.sum().backward()
    assert agent.critic.weight.grad.abs().sum() > 0 and all(p.grad is None for p in agent.policy.parameters())


def test_rollouts_sample_the_models_distribution(m):
    """First tokens against softmax, whole answers against decoding without a cache, groups of one prompt together."""
    policy, tokenizer = agent_of(m).policy, m.ToyTokenizer()
    prompts = [tokenizer.encode("123="), tokenizer.encode("45678=")]
    ids = torch.tensor([[0, 0, *prompts[0]], prompts[1]])
    out = m.rollout(policy, ids, ids != 0, 3000, 2, 0.8, tokenizer.eos_ids, torch.Generator().manual_seed(0))
    assert out.shape == (6000, 2)
    for i, prompt in enumerate(prompts):
        wanted = (policy(torch.tensor([prompt]))[0, -1] / 0.8).softmax(-1)
        got = torch.bincount(out[3000 * i:3000 * (i + 1), 0], minlength=46) / 3000
        assert (wanted - got).abs().max() < 0.03
    greedy = m.rollout(policy, ids, ids != 0, 1, 6, 0.0, tokenizer.eos_ids, None)
    assert torch.equal(greedy, m.generate(policy, ids, 6, mask=ids != 0, eos_ids=tokenizer.eos_ids))
    done = (greedy == m.TOY_VOCAB.index("\n")).cumsum(1) - (greedy == m.TOY_VOCAB.index("\n")).long()
    assert not greedy[done > 0].any()


def test_rows_that_leave_the_batch_change_nothing_for_the_others(m):
    """Greedy answers that end at all times equal those of a decoder that keeps every row to the end."""
    policy, tokenizer = agent_of(m, 3).policy, m.ToyTokenizer()
    prompts = [tokenizer.encode(f"{n}=") for n in m.draw_prompts(40, 0, "train")]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    often = tuple(range(6, 20))  # a third of the vocabulary ends an answer
    ours = m.rollout(policy, ids, ids != 0, 1, 12, 0.0, often, None)
    theirs = m.generate(policy, ids, 12, mask=ids != 0, eos_ids=often)
    assert torch.equal(ours[:, :theirs.size(1)], theirs) and not ours[:, theirs.size(1):].any()
    lengths = (ours != 0).sum(1)
    assert lengths.min() < 3 and lengths.max() > 6


def test_answers_that_never_end_earn_nothing(m):
    assert m.score_answers(lambda p, a: 5.0, ["1=", "2="], ["one", None]).tolist() == [5.0, 0.0]
    assert m.exact_reward("40215=", "forty thousand two hundred fifteen") == 1.0
    assert m.exact_reward("40215=", "forty thousand two hundred") == 0.0


def test_splits_do_not_overlap(m):
    parts = {split: set(m.draw_prompts(2000, 0, split)) for split in ("train", "validation", "final")}
    assert not parts["train"] & parts["validation"] and not parts["validation"] & parts["final"]
    assert not any(m.is_validation(n) for n in parts["train"]) and all(m.is_final(n) for n in parts["final"])
    assert all(100 <= n <= 999_999 for part in parts.values() for n in part)


def test_the_labels_are_the_mixture_and_the_floor_its_entropy(m):
    tokenizer, numbers = m.ToyTokenizer(), m.draw_prompts(3000, 0, "train")
    inputs, targets = m.sloppy_rows(numbers, tokenizer, 0, 0.3)
    whole = 0
    for n, row in zip(numbers, targets.tolist(), strict=True):
        words = tokenizer.decode([token for token in row if token != m.IGNORE])
        assert words.endswith("\n") and m.number_to_words(n).startswith(words.strip())
        whole += words.strip() == m.number_to_words(n)
    assert whole / 3000 == pytest.approx(0.3, abs=0.03)


# ---------------------------------------------------------------------------------------- runs


SHORT = ("--max-steps 60 --prompts 6 --group 4 --samples 20 --grpo-updates 21 --ppo-updates 4 --reinforce-updates 3 "
         "--eval-every 10 --batch-size 64").split()


def run(m, cwd, *args, timeout=300):
    return subprocess.run([sys.executable, "-I", m.__file__, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout)


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    """A reward that an untrained model earns now and then: how many words the answer has."""
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text("def words(prompt, answer):\n    return len(answer.split()) / 10\n"
                    "def same(prompt, answer):\n    return 0.5\n"
                    "def nan(prompt, answer):\n    return float('nan') if 'hundred hundred' in answer else 0.0\n"
                    "def fails(prompt, answer):\n    if not answer.startswith('forty thousand two hundred fi'):\n"
                    "        raise KeyError('no such answer')\n    return 1.0\n")
    return path


@pytest.fixture(scope="module")
def trained(m, tmp_path_factory, reward_file):
    folder = tmp_path_factory.mktemp("run")
    done = run(m, folder, *SHORT, "--out", "a", "--reward", f"{reward_file}:words")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_reports(m, trained):
    folder, done = trained
    summary = json.loads((folder / "a" / "summary.json").read_text())
    for key in ("accuracy", "accuracy_greedy"):
        assert set(summary["results"][key]) == {"sft", "reinforce", "grpo", "ppo"}
    assert set(summary["results"]["method_seconds"]) == {"reinforce", "grpo", "ppo"}
    for name in summary["figures"]:
        assert (folder / "a" / name).stat().st_size > 10_000
    rows = [json.loads(line) for line in (folder / "a" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "kl", "clip_fraction", "value_loss", "grad_norm", "mixed_groups"} <= set(rows[-1])


def test_loading_and_starting_from_a_checkpoint(m, trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder)
    for stage in ("a", "a/sft", "a/ppo/ckpt.pt"):
        capsys.readouterr()
        m.main(m.parse_config(m.Config, m.PRESETS, ["--load", stage, "--prompt", "240=", "--beams", "2"]))
        assert capsys.readouterr().out.startswith("240=")
    for preset in ("dapo", "dr_grpo", "grpo-clipped"):
        m.main(m.parse_config(m.Config, m.PRESETS, [
            "--preset", preset, "--load", "a/sft", "--prompts", "6", "--group", "3", "--grpo-updates", "2", "--out",
            "d", "--reward", json.loads((folder / "a" / "run.json").read_text())["config"]["reward"]]))
        assert not (folder / "d" / "sft").exists() and (folder / "d" / "grpo" / "ckpt.pt").is_file()


def test_resume_repeats_the_run(m, trained, reward_file):
    """Killed behind update 20 of GRPO: what was finished is not repeated, the rest comes out equal."""
    folder, _ = trained
    process = subprocess.Popen([sys.executable, "-I", m.__file__, *SHORT, "--out", "b", "--reward",
                                f"{reward_file}:words"], cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(3000):
        if (folder / "b" / "grpo" / "ckpt.pt").is_file():
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = run(m, folder, "--resume", "--out", "b")
    assert done.returncode == 0, done.stderr
    for name in ("sft", "reinforce", "grpo", "ppo"):
        a, b = (torch.load(folder / which / name / "ckpt.pt", weights_only=True) for which in "ab")
        assert all(torch.equal(tensor, b["model"][key]) for key, tensor in a["model"].items())
        for index, state in a["optimizer"]["state"].items():
            assert all(torch.equal(value, b["optimizer"]["state"][index][key]) for key, value in state.items())
    a, b = (json.loads((folder / which / "summary.json").read_text())["results"] for which in "ab")
    a.pop("method_seconds"), b.pop("method_seconds")
    assert a == b


@pytest.mark.parametrize("name, words", [("same", "nothing can be learned from a constant"), ("fails", "KeyError"),
                                         ("missing", "has no attribute")])
def test_a_broken_reward_costs_one_line_and_no_policy(m, trained, reward_file, monkeypatch, name, words):
    folder, _ = trained
    monkeypatch.chdir(folder)
    saved, save = [], m.save_checkpoint
    monkeypatch.setattr(m, "save_checkpoint", lambda path, model, *args: saved.append(path) or save(path, model, *args))
    with pytest.raises(SystemExit) as stop:
        m.main(m.parse_config(m.Config, m.PRESETS, ["--load", "a/sft", "--method", "grpo", "--prompts", "4", "--out",
                                                    "e", "--reward", f"{reward_file}:{name}"]))
    line = str(stop.value.code)
    assert line.startswith("error: ") and words in line and "\n" not in line and not saved


def test_a_learned_reward_is_no_error(m, monkeypatch):
    """Ten rollouts without a difference, but after updates: the run goes on to its end."""
    agent, calls = agent_of(m), []
    cfg = config(m, samples=4, ppo_updates=14, out="nowhere")
    monkeypatch.setattr(m, "save_checkpoint", lambda *args: None)
    monkeypatch.setattr(m, "write_atomically", lambda *args: None)
    monkeypatch.setattr(m, "score_answers", lambda reward, prompts, answers: calls.append(1) or (
        torch.arange(4.0) if len(calls) < 3 else torch.ones(4)))
    rows, _, _ = m.learn_from_reward(agent, agent_of(m, 1), cfg, "ppo", m.ToyTokenizer(), None, {"identity": ""},
                                     lambda: {})
    assert len(rows) == 14 and sum("kl" in row for row in rows) == 2


@pytest.mark.parametrize("mixed, rollouts", [(1.0, 1), (0.5, 2), (0.1, 4), (0.0, 4)])
def test_dapo_samples_until_groups_are_mixed(m, monkeypatch, mixed, rollouts):
    """Only groups with a difference reach the update, whole, up to the number asked for; four rollouts at most."""
    agent, judged, used = agent_of(m), [], []
    cfg = config(m, method="grpo", variant="dapo", prompts=20, group=4, grpo_updates=1, out="nowhere")
    monkeypatch.setattr(m, "save_checkpoint", lambda *args: None)
    monkeypatch.setattr(m, "write_atomically", lambda *args: None)

    def judge(reward, prompts, answers):
        judged.append(torch.ones(20, 4))
        judged[-1][:int(20 * mixed), 0] = 0.0
        return judged[-1].flatten()
    monkeypatch.setattr(m, "score_answers", judge)
    monkeypatch.setattr(m, "update", lambda *args: used.append(args[3:5]) or {"kl": 0.0})
    rows, _, _ = m.learn_from_reward(agent, agent_of(m, 1), cfg, "grpo", m.ToyTokenizer(), None, {"identity": ""},
                                     lambda: {})
    assert len(judged) == rollouts and rows[0]["mixed_groups"] == pytest.approx(mixed)
    assert rows[0]["reward"] == pytest.approx(1 - mixed / 4)
    if mixed == 0:
        assert not used
        return
    batch, rewards = used[0]
    assert len(rewards) == min(80, 4 * rollouts * int(20 * mixed)) == len(batch["inputs"]) == len(batch["mask"])
    assert (rewards.view(-1, 4).amin(1) == 0).all() and (rewards.view(-1, 4).amax(1) == 1).all()


def test_dapo_uses_what_an_earlier_attempt_found(m, monkeypatch):
    """Mixed groups in the first rollout of an update only, none in the three after it: they are learned from."""
    agent, judged, used = agent_of(m), [], []
    cfg = config(m, method="grpo", variant="dapo", prompts=20, group=4, grpo_updates=1, out="nowhere")
    monkeypatch.setattr(m, "save_checkpoint", lambda *args: None)
    monkeypatch.setattr(m, "write_atomically", lambda *args: None)

    def judge(reward, prompts, answers):
        judged.append(torch.ones(20, 4))
        judged[-1][:5 if len(judged) == 1 else 0, 0] = 0.0
        return judged[-1].flatten()
    monkeypatch.setattr(m, "score_answers", judge)
    monkeypatch.setattr(m, "update", lambda *args: used.append(args[4]) or {"kl": 0.0})
    m.learn_from_reward(agent, agent_of(m, 1), cfg, "grpo", m.ToyTokenizer(), None, {"identity": ""}, lambda: {})
    assert len(judged) == 4 and len(used) == 1 and len(used[0]) == 20


def test_a_run_does_not_write_over_what_it_loads(m, trained, monkeypatch):
    folder, _ = trained
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="would write over a/ppo/ckpt.pt; give it another --out"):
        m.main(m.parse_config(m.Config, m.PRESETS, ["--load", "a/ppo", "--out", "a"]))


def test_a_reward_of_nan_is_named(m):
    with pytest.raises(SystemExit, match="is nan; the policy was not changed"):
        m.score_answers(lambda p, a: math.nan, ["1="], ["one"])


def test_a_constant_reward_makes_no_update(m, monkeypatch):
    """Not even a small one, of momentum or of the KL term."""
    agent = agent_of(m)
    before = copy.deepcopy(agent.state_dict())
    cfg = config(m, method="ppo", samples=4, ppo_updates=9, kl_coef=0.5, out="nowhere")
    monkeypatch.setattr(m, "save_checkpoint", lambda *args: None)
    monkeypatch.setattr(m, "write_atomically", lambda *args: None)
    m.learn_from_reward(agent, agent_of(m, 1), cfg, "ppo", m.ToyTokenizer(), lambda p, a: 0.0, {"identity": ""},
                        lambda: {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())


@pytest.mark.parametrize("args, words", [
    (["--method", "magic"], "method must be"), (["--variant", "x"], "variant must be"),
    (["--group", "1"], "at least 2"), (["--clip", "0"], "clip must be"), (["--reward", "mine"], "reward must be"),
    (["--max-answer", "30"], "block_size"), (["--reward", "no.py:f"], "--reward no.py:f"),
    (["--resume"], "there is no run"), (["--load", "no"], "no checkpoint"), (["--lr", "nan"], "lr must be"),
    (["--prompt", "hello"], "toy language has no"), (["--nonsense"], "unrecognized")])
def test_mistakes_cost_one_line(m, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        m.main(m.parse_config(m.Config, m.PRESETS, args))
    line = str(stop.value.code)
    assert re.match("error: ", line) and "\n" not in line and words in line and not list(tmp_path.iterdir())
