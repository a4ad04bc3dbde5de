"""The mathematics: parity with plain-Python loops, and the properties that a wrong sign or denominator would break."""

import math
import random
import statistics

import pytest
import torch

import grpo

CLIP = {"clip_low": 0.2, "clip_high": 0.3}  # unequal, so that mixing them up shows


def floats(values):
    return torch.tensor(values, dtype=torch.float32)


def close(tensor, expected, rel=1e-5, abs=1e-6):
    return tensor.tolist() == pytest.approx(expected, rel=rel, abs=abs)


def gradient(loss_of, values):
    """d loss_of(x).sum() / dx at x = values, as a list."""
    leaf = floats(values).requires_grad_()
    loss_of(leaf).sum().backward()
    return leaf.grad.tolist()


def tokens(seed, size=60, sequences=7):
    """Random log-probs, some of them far apart, advantages of both signs and 0, and sequence ids in no order."""
    rng = random.Random(seed)
    old = [-5 * rng.random() for _ in range(size)]
    logp = [o + rng.gauss(0, rng.choice([0.01, 0.3, 3.0, 40.0])) for o in old]
    advantages = [rng.choice([0.0, rng.gauss(0, 1), rng.gauss(0, 1)]) for _ in range(size)]
    ids = [rng.randrange(sequences) * 13 - 40 for _ in range(size)]
    # rounded to float32, so that loops and tensors start from the same numbers
    return *(floats(values).tolist() for values in (logp, old, advantages)), ids


# --- advantages -----------------------------------------------------------------------------------------------------


def loop_advantages(rewards, groups, normalize=True):
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        peers = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        if len(peers) == 1 or max(peers) == min(peers):
            out.append(0.0)
        else:
            centred = reward - statistics.fmean(peers)
            out.append(centred / (statistics.stdev(peers) + 1e-6) if normalize else centred)
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_advantages_against_a_loop(seed, normalize):
    rng = random.Random(seed)
    draw = [lambda: rng.choice([0, 0.1, 0.81, 0.9, 0.91, 1.0]), lambda: rng.gauss(0, 1), lambda: 1e6 * rng.random()]
    rewards = [draw[seed % 3]() for _ in range(40)]
    groups = [rng.choice([3, 900, -2, 7, 8, 10**12, rng.randrange(10**6)]) for _ in range(40)]
    got = grpo.group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), normalize)
    assert got.dtype == torch.float32 and got.shape == (40,)
    assert close(got, loop_advantages(rewards, groups, normalize))


def test_advantages_worked_example():
    assert close(
        grpo.group_advantages(floats([1.0, 0.1, 0.5, 0.5]), torch.tensor([7, 7, 3, 3])), [0.7071, -0.7071, 0, 0], 1e-4
    )
    assert close(grpo.group_advantages([1.0, 0.91, 0.1], [1, 1, 1]), [0.6657, 0.4842, -1.1499], 1e-4)
    # std + 1e-6, not max(std, 1e-6) and not sqrt(variance + 1e-6): shows where the spread is tiny
    assert close(grpo.group_advantages([0.0, 2e-6], [1, 1]), [-1 / (2**0.5 + 1), 1 / (2**0.5 + 1)], 1e-4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 0.81, 0.91, 1 / 3, -2.3, 1e8])
def test_equal_rewards_give_exactly_zero(value, normalize):
    for size in (1, 2, 3, 5, 6, 7, 8, 11, 64):  # the mean of 0.1 three times is not 0.1
        for rewards in ([value] * size, floats([value] * size)):
            assert grpo.group_advantages(rewards, [4] * size, normalize).tolist() == [0.0] * size
    mixed = grpo.group_advantages([value] * 3 + [value + 1, value], [0, 0, 0, 1, 1], normalize)
    assert mixed[:3].tolist() == [0.0] * 3 and mixed[3] > 0 > mixed[4]


def test_advantages_sum_to_zero_in_each_group_and_have_unit_spread():
    rng = random.Random(1)
    rewards, groups = [rng.random() for _ in range(64)], [n % 8 for n in range(64)]
    advantages = grpo.group_advantages(rewards, groups)
    for group in range(8):
        assert abs(advantages[group::8].sum()) < 1e-5
        assert statistics.stdev(advantages[group::8].tolist()) == pytest.approx(1.0, abs=1e-4)


def test_advantages_follow_their_episodes():
    """Order and names of groups do not matter, nor a shift and a scale of the rewards; more reward, more advantage."""
    rng = random.Random(2)
    rewards, groups = [rng.random() for _ in range(30)], [rng.randrange(6) for _ in range(30)]
    base = grpo.group_advantages(rewards, groups)
    order = rng.sample(range(30), 30)
    shuffled = grpo.group_advantages([rewards[i] for i in order], [groups[i] for i in order])
    assert close(shuffled, base[order].tolist())
    assert close(grpo.group_advantages(rewards, [100 - 7 * g for g in groups]), base.tolist())
    assert close(grpo.group_advantages([5 + 3 * r for r in rewards], groups), base.tolist(), 1e-4)
    for group in set(groups):
        members = sorted((rewards[i], base[i].item()) for i in range(30) if groups[i] == group)
        assert [a for _, a in members] == sorted(a for _, a in members)


def test_advantages_of_nothing_and_of_misshapen_input():
    assert grpo.group_advantages([], []).shape == (0,)
    for rewards, groups in ((torch.zeros(3), torch.zeros(2)), (torch.zeros(3, 1), torch.zeros(3)), (0.5, 1)):
        with pytest.raises(ValueError, match="rewards"):
            grpo.group_advantages(rewards, groups)


# --- the clipped loss -----------------------------------------------------------------------------------------------


def loop_loss(logp, old, advantages, ids=None):
    """The loss of each token and the sums, one token at a time."""
    losses = []
    sums = dict.fromkeys(("tokens", "ratio", "clip_high", "clip_low", "approx_kl"), 0.0)
    for i, advantage in enumerate(advantages):
        mine = [i] if ids is None else [j for j in range(len(ids)) if ids[j] == ids[i]]
        log_ratio = sum(logp[j] - old[j] for j in mine) / len(mine)
        ratio = math.exp(max(-20, min(20, log_ratio)))
        losses.append(-min(ratio * advantage, max(0.8, min(1.3, ratio)) * advantage))
        d = max(-20, min(20, logp[i] - old[i]))
        sums["tokens"] += 1
        sums["ratio"] += ratio
        sums["clip_high"] += advantage > 0 and ratio > 1.3
        sums["clip_low"] += advantage < 0 and ratio < 0.8
        sums["approx_kl"] += math.exp(d) - d - 1
    return losses, sums


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_loss_and_sums_against_a_loop(seed, by_sequence):
    logp, old, advantages, ids = tokens(seed)
    leaf = floats(logp).requires_grad_()
    loss, stats = grpo.policy_loss(
        leaf, floats(old), floats(advantages), **CLIP, sequence_ids=torch.tensor(ids) if by_sequence else None
    )
    expected, sums = loop_loss(logp, old, advantages, ids if by_sequence else None)
    assert close(loss, expected, 1e-4)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(sums, rel=1e-4, abs=1e-5)
    assert all(value.shape == () and not value.requires_grad for value in stats.values())


def test_random_tokens_reach_every_case():
    """The loop tests would be empty if nothing were clipped."""
    for by_sequence in (False, True):
        sums = [loop_loss(*tokens(seed)[:3], tokens(seed)[3] if by_sequence else None)[1] for seed in range(8)]
        assert all(sum(s[name] for s in sums) > 3 for name in ("clip_low", "clip_high"))


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope, clipped",
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.0, -2.0, 2.0, 2.0, None),
        (1.2, 2.0, -2.4, -2.4, None),
        (1.5, 2.0, -2.6, 0.0, "clip_high"),
        (0.5, 2.0, -1.0, -1.0, None),  # the pessimistic side is never clipped
        (0.9, -2.0, 1.8, 1.8, None),
        (0.5, -2.0, 1.6, 0.0, "clip_low"),
        (1.5, -2.0, 3.0, 3.0, None),
        (1.5, 0.0, 0.0, 0.0, None),
        (0.5, 0.0, 0.0, 0.0, None),
    ],
)
def test_one_token_by_hand(ratio, advantage, loss, slope, clipped):
    for ids in (None, torch.tensor([5])):
        leaf = floats([math.log(ratio) - 3]).requires_grad_()
        got, stats = grpo.policy_loss(leaf, floats([-3.0]), floats([advantage]), **CLIP, sequence_ids=ids)
        got.sum().backward()
        assert close(got, [loss]) and close(leaf.grad, [slope])
        assert [name for name in ("clip_low", "clip_high") if stats[name]] == ([clipped] if clipped else [])


@pytest.mark.parametrize("clip", [{"clip_low": 0.0, "clip_high": 0.0}, CLIP])
def test_at_ratio_one_the_gradient_is_reinforce(clip):
    """Through the softmax of a tiny policy, with logp itself as old_logp; also where the clip range is empty."""
    torch.manual_seed(0)
    advantages, chosen = torch.randn(12), torch.randint(5, (12, 1))
    logits = torch.randn(12, 5, requires_grad=True)
    logp = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
    (reinforce,) = torch.autograd.grad(-(advantages * logp).sum(), logits, retain_graph=True)
    ppo, stats = grpo.policy_loss(logp, logp, advantages, **clip)
    (got,) = torch.autograd.grad(ppo.sum(), logits)
    assert torch.allclose(got, reinforce, atol=1e-6)
    assert close(ppo, (-advantages).tolist())
    assert stats["ratio"] == 12 and stats["clip_low"] == stats["clip_high"] == stats["approx_kl"] == 0


def test_no_gradient_to_old_logp():
    old = floats([-1.0, -2.0]).requires_grad_()
    logp = floats([-1.1, -2.1]).requires_grad_()
    for ids in (None, torch.tensor([0, 0])):
        grpo.policy_loss(logp, old, floats([1.0, -1.0]), **CLIP, sequence_ids=ids)[0].sum().backward()
    assert old.grad is None and logp.grad is not None


def test_a_token_moves_its_own_loss_only():
    logp, old, advantages, ids = (torch.tensor(values) for values in tokens(3))
    advantages[17] = 1.0
    moved = logp.clone()
    moved[17] = old[17] - 0.1  # inside of the clip range
    before, after = (grpo.policy_loss(x, old, advantages, **CLIP)[0] for x in (logp, moved))
    assert (before != after).nonzero().flatten().tolist() == [17]
    by_sequence = [grpo.policy_loss(x, old, advantages, **CLIP, sequence_ids=ids)[0] for x in (logp, moved)]
    others = ids != ids[17]
    assert torch.equal(by_sequence[0][others], by_sequence[1][others])


def test_sequence_ratio_by_hand():
    """Log-ratios .1 and -.3 make a ratio of exp(-.1) for both tokens, and each gets half of the gradient of the sum."""
    old, advantages, ids = floats([-1.0, -5.0, -2.0]), floats([2.0, 9.0, 2.0]), torch.tensor([8, 1, 8])
    leaf = floats([-0.9, -5.0, -2.3]).requires_grad_()
    loss, _ = grpo.policy_loss(leaf, old, advantages, **CLIP, sequence_ids=ids)
    ratio = math.exp(-0.1)
    assert close(loss, [-2 * ratio, -9.0, -2 * ratio])
    loss[0].backward(retain_graph=True)
    assert close(leaf.grad, [-ratio, 0.0, -ratio])  # 2 · ratio / |y|, through the mean, also to the other token
    leaf.grad = None
    loss.sum().backward()
    assert close(leaf.grad, [-2 * ratio, -9.0, -2 * ratio])


def test_sequence_ratio_with_sequence_weights_is_gspo():
    """The mean over sequences of min(s·A, clip(s)·A), with one s and one A for each sequence."""
    rng = random.Random(5)
    ids = [rng.randrange(6) for _ in range(50)]
    old = [-3 * rng.random() for _ in ids]
    logp = [o + rng.gauss(0, 0.4) for o in old]
    advantage = [rng.gauss(0, 1) for _ in range(6)]
    loss, _ = grpo.policy_loss(
        floats(logp), floats(old), floats([advantage[i] for i in ids]), **CLIP, sequence_ids=torch.tensor(ids)
    )
    weights, count = grpo.token_weights(torch.tensor(ids), "sequence")
    expected = []
    for i in range(6):
        s = math.exp(statistics.fmean(logp[t] - old[t] for t in range(50) if ids[t] == i))
        expected.append(-min(s * advantage[i], max(0.8, min(1.3, s)) * advantage[i]))
    assert ((loss * weights).sum() / count).item() == pytest.approx(statistics.fmean(expected), rel=1e-5)


@pytest.mark.parametrize("gap", [25.0, 89.0, 1e4, 1e30, math.inf])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_huge_log_ratios_stay_finite(gap, by_sequence):
    ids = torch.tensor([0, 1, 2, 3]) if by_sequence else None
    logp = floats([0.0, 0.0, -gap, -gap]).requires_grad_()
    old = floats([-gap, -gap, 0.0, 0.0])
    loss, stats = grpo.policy_loss(logp, old, floats([1.0, -1.0, 1.0, -1.0]), **CLIP, sequence_ids=ids)
    loss.sum().backward()
    assert close(loss, [-1.3, math.exp(20), -math.exp(-20), 0.8])
    assert logp.grad.tolist() == [0.0] * 4
    assert all(value.isfinite() for value in stats.values())
    assert stats["clip_high"] == 1 and stats["clip_low"] == 1


def test_the_guard_is_at_twenty():
    loss, _ = grpo.policy_loss(floats([0.0, 0.0]), floats([-19.0, -21.0]), floats([-1.0, -1.0]), **CLIP)
    assert close(loss, [math.exp(19), math.exp(20)])


# --- KL -------------------------------------------------------------------------------------------------------------


def test_kl_against_a_loop():
    logp, ref, _, _ = tokens(11, size=200)
    d = [r - p for p, r in zip(logp, ref, strict=True)]
    expected = {
        "k1": [-x for x in d],
        "k2": [x * x / 2 for x in d],
        "k3": [min(10.0, math.exp(x) - x - 1) if x < 20 else 10.0 for x in d],
    }
    for kind, values in expected.items():
        assert close(grpo.kl_penalty(floats(logp), floats(ref), kind), values, 1e-4), kind
    assert 10.0 in expected["k3"] and min(expected["k3"]) < 1e-3  # both ends were reached
    for kind in ("k2", "k3"):
        assert (grpo.kl_penalty(floats(logp), floats(ref), kind) >= 0).all()
        assert grpo.kl_penalty(floats(logp), floats(logp), kind).tolist() == [0.0] * 200


def test_k3_keeps_its_digits_where_the_policies_nearly_agree():
    for d in (1e-2, 1e-3, 1e-4, -1e-4, 1e-5):
        expected = d * d / 2 + d**3 / 6 + d**4 / 24
        assert close(grpo.kl_penalty(floats([0.0]), floats([d]), "k3"), [expected], 2e-3, 0), d


@pytest.mark.parametrize("gap", [3.0, 25.0, 100.0, 1e30, math.inf])
def test_k3_is_clamped_and_its_gradient_finite(gap):
    logp = floats([-gap, -gap]).requires_grad_()
    kl = grpo.kl_penalty(logp, floats([0.0, 5.0]), "k3")
    kl.sum().backward()
    assert kl.tolist() == [10.0, 10.0] and logp.grad.tolist() == [0.0, 0.0]
    below = grpo.kl_penalty(floats([0.0]), floats([-12 - gap]), "k3")
    assert below.tolist() == [10.0]


def test_kl_gradients_by_hand():
    def slope(kind, d):
        return gradient(lambda logp: grpo.kl_penalty(logp, floats([-2.0 + d]), kind), [-2.0])

    for d in (-1.0, -0.1, 0.0, 0.1, 1.0):
        assert slope("k1", d) == pytest.approx([1.0])
        assert slope("k2", d) == pytest.approx([-d], abs=1e-6)
        assert slope("k3", d) == pytest.approx([1 - math.exp(d)], abs=1e-6)
    ref = floats([-1.0]).requires_grad_()
    for kind in ("k1", "k2", "k3"):
        grpo.kl_penalty(floats([-2.0]).requires_grad_(), ref, kind).sum().backward()
    assert ref.grad is None


def test_kl_estimators_on_average():
    """Exact expectations over a vocabulary of 6: what is unbiased, and which KL each kind's gradient pushes down."""
    torch.manual_seed(0)
    logits, ref = torch.randn(6, requires_grad=True), torch.randn(6).log_softmax(-1)
    logp = logits.log_softmax(-1)
    policy = logp.detach().exp()
    forward, reverse = (policy * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    # the policy's weight on each token is fixed: it is how often the token is sampled
    average = {kind: (policy * grpo.kl_penalty(logp, ref, kind)).sum() for kind in ("k1", "k2", "k3")}

    # the value of KL(policy || ref) is forward's, its gradient is through policy as well
    exact = (logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - ref)).sum()

    def grad(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    assert average["k1"].item() == pytest.approx(forward.item(), rel=1e-5)
    assert average["k3"].item() == pytest.approx(forward.item(), rel=1e-5)
    assert torch.allclose(grad(average["k1"]), torch.zeros(6), atol=1e-6)
    assert torch.allclose(grad(average["k2"]), grad(exact), atol=1e-6)
    assert torch.allclose(grad(average["k3"]), grad(reverse), atol=1e-6)


def test_unknown_kinds_are_refused():
    for kind in ("k4", "K3", "", None):
        with pytest.raises(KeyError):
            grpo.kl_penalty(torch.zeros(2), torch.zeros(2), kind)
        with pytest.raises(ValueError, match="tokens, sequence or constant"):
            grpo.token_weights(torch.zeros(2), kind)


# --- weights --------------------------------------------------------------------------------------------------------


def test_token_weights_worked_example():
    ids = torch.tensor([5, 5, 5, 8])
    for kind, expected, total in (("tokens", [1, 1, 1, 1], 4), ("sequence", [1 / 3, 1 / 3, 1 / 3, 1], 2)):
        weights, count = grpo.token_weights(ids, kind)
        assert close(weights, expected) and count == total
        assert weights.dtype == count.dtype == torch.float32 and count.shape == ()


@pytest.mark.parametrize("kind", ["tokens", "sequence"])
def test_normalised_loss_against_a_loop(kind):
    values, _, _, ids = tokens(4)
    weights, count = grpo.token_weights(torch.tensor(ids), kind)
    by_sequence = [[v for v, i in zip(values, ids, strict=True) if i == name] for name in set(ids)]
    expected = statistics.fmean(values if kind == "tokens" else [statistics.fmean(s) for s in by_sequence])
    assert ((floats(values) * weights).sum() / count).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "sequence"])
def test_micro_batches_do_not_matter(kind, by_sequence):
    """Whole sequences spread over micro-batches, an empty one included: same gradient, same sums, one denominator."""
    logp, old, advantages, ids = (torch.tensor(values) for values in tokens(6))
    gradients, sums = [], []
    for parts in (1, 2, 3, 20):
        leaf = logp.clone().requires_grad_()
        total, stats_sum = 0.0, {}
        for part in range(parts):
            chosen = (ids % parts == part).nonzero().flatten()  # a sequence stays whole
            mine = ids[chosen]
            args = leaf[chosen], old[chosen], advantages[chosen]
            loss, stats = grpo.policy_loss(*args, **CLIP, sequence_ids=mine if by_sequence else None)
            loss = loss + 0.1 * grpo.kl_penalty(leaf[chosen], old[chosen] - 0.2, "k3")
            weights, count = grpo.token_weights(mine, kind)
            (loss * weights).sum().backward()
            total += count
            stats |= grpo.mismatch(leaf[chosen], old[chosen])
            stats_sum = {name: value + stats_sum.get(name, 0.0) for name, value in stats.items()}
        assert total == (len(ids) if kind == "tokens" else len(set(ids.tolist())))
        gradients.append(leaf.grad / total)
        sums.append({name: float(value) for name, value in stats_sum.items()})
    for other, other_sums in zip(gradients[1:], sums[1:], strict=True):
        assert torch.allclose(other, gradients[0], rtol=1e-5, atol=1e-7)
        assert other_sums == pytest.approx(sums[0], rel=1e-5)


def test_an_empty_rank_takes_part():
    empty = torch.zeros(0, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long)
    for kind in ("tokens", "sequence"):
        weights, count = grpo.token_weights(ids, kind)
        assert weights.shape == (0,) and count == 0
    for sequence_ids in (None, ids):
        loss, stats = grpo.policy_loss(empty, empty, empty, **CLIP, sequence_ids=sequence_ids)
        ((loss + grpo.kl_penalty(empty, empty, "k3")) * weights).sum().backward()
        assert all(value == 0 for value in stats.values())
    assert all(value == 0 for value in grpo.mismatch(empty, empty).values())


# --- sampler against trainer ----------------------------------------------------------------------------------------


def test_mismatch_against_a_loop():
    logp, sampler, _, _ = tokens(9)
    gaps = [p - s for p, s in zip(logp, sampler, strict=True)]
    stats = grpo.mismatch(floats(logp).requires_grad_(), floats(sampler))
    bounded = [max(-20, min(20, gap)) for gap in gaps]
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "mismatch/mean": sum(abs(gap) for gap in gaps),
            "mismatch/k3": sum(math.exp(gap) - gap - 1 for gap in bounded),
        },
        rel=1e-4,
    )
    assert all(value.shape == () and not value.requires_grad for value in stats.values())


def test_mismatch_by_hand():
    stats = grpo.mismatch(floats([-1.0, -2.0, -1.0]), floats([-1.5, -1.0, -1.0]))
    assert stats["mismatch/mean"] == 1.5
    # the ratio is trainer over sampler: exp(.5) - .5 - 1 and exp(-1) + 1 - 1
    assert stats["mismatch/k3"].item() == pytest.approx(math.exp(0.5) - 1.5 + math.exp(-1), rel=1e-5)


def test_misshapen_input_is_refused():
    """[S] against [S, 1] would broadcast to [S, S] without a word."""
    good = torch.zeros(3)
    for bad in (torch.zeros(3, 1), torch.zeros(2), torch.zeros(1), torch.zeros(())):
        calls = [
            lambda bad=bad: grpo.policy_loss(bad, good, good, **CLIP),
            lambda bad=bad: grpo.policy_loss(good, bad, good, **CLIP),
            lambda bad=bad: grpo.policy_loss(good, good, bad, **CLIP),
            lambda bad=bad: grpo.policy_loss(good, good, good, **CLIP, sequence_ids=bad),
            lambda bad=bad: grpo.kl_penalty(bad, good, "k3"),
            lambda bad=bad: grpo.mismatch(good, bad),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="one axis"):
                call()


# --- what people use beside plain GRPO -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("normalize", [False, True])
def test_leave_one_out_compares_with_the_others(seed, normalize):
    rng = random.Random(seed)
    groups = [rng.randrange(5) for _ in range(20)]
    rewards = [rng.choice([0.0, 0.1, 0.9, 1.0]) for _ in groups]
    expected = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        others = [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and j != i]
        equal = not others or len({reward, *others}) == 1
        std = statistics.stdev([reward, *others]) if others else 0.0
        expected.append(0.0 if equal else (reward - statistics.fmean(others)) / (std + 1e-6 if normalize else 1.0))
    assert close(grpo.group_advantages(rewards, groups, normalize, leave_one_out=True), expected)


def loop_decoupled(accuracy, economy, right, groups, weight):
    out = []
    for i, advantage in enumerate(loop_advantages(accuracy, groups)):
        peers = [economy[j] for j in range(len(groups)) if groups[j] == groups[i] and right[j]]
        if right[i] and len(peers) > 1 and max(peers) > min(peers):
            advantage += weight * (economy[i] - statistics.fmean(peers)) / (statistics.stdev(peers) + 1e-6)
        out.append(advantage)
    return out


@pytest.mark.parametrize("seed", range(10))
def test_decoupled_advantages_against_a_loop(seed):
    rng = random.Random(seed)
    groups = [rng.choice([4, 9, -3, 10**9, rng.randrange(100)]) for _ in range(40)]
    right = [rng.random() < (0.1, 0.5, 0.9)[seed % 3] for _ in groups]
    accuracy = [0.9 * r + 0.1 * (rng.random() < 0.8) for r in right]
    economy = [rng.choice([1.0, 0.9, 0.81]) for _ in groups]
    got = grpo.decoupled_advantages(accuracy, torch.tensor(economy), right, groups, 0.3)
    assert got.dtype == torch.float32 and close(got, loop_decoupled(accuracy, economy, right, groups, 0.3), 1e-3)
    # what wrong answers did is neither compared nor a measure for the right ones
    other = torch.tensor([e if r else 1000.0 for e, r in zip(economy, right, strict=True)])
    assert torch.equal(grpo.decoupled_advantages(accuracy, other, right, groups, 0.3), got)
    wrong = ~torch.tensor(right)
    assert torch.equal(got[wrong], grpo.group_advantages(accuracy, groups)[wrong])


def test_decoupled_advantages_worked_example():
    accuracy, right, group = floats([1, 1, 1, 0]), [True, True, True, False], [7] * 4
    got = grpo.decoupled_advantages(accuracy, floats([1.0, 0.9, 0.9, 1.0]), right, group, 0.5)
    assert close(got, [1.0773, 0.2113, 0.2113, -1.5], 1e-3)
    # a cost does not drown, however small it is, and one of nothing is no signal
    small = grpo.decoupled_advantages(accuracy, floats([1.0, 0.999, 0.999, 1.0]), right, group, 0.5)
    assert close(small, got.tolist(), 1e-2)
    none = grpo.decoupled_advantages(accuracy, floats([1.0] * 4), right, group, 0.5)
    assert torch.equal(none, grpo.group_advantages(accuracy, group))
    alone = grpo.decoupled_advantages(floats([1, 0, 0]), floats([0.9, 1, 1]), [True, False, False], [7] * 3, 0.5)
    assert torch.equal(alone, grpo.group_advantages([1, 0, 0], [7] * 3))
    assert grpo.decoupled_advantages(floats([]), floats([]), torch.zeros(0, dtype=bool), [], 0.5).shape == (0,)


@pytest.mark.parametrize("seed", range(5))
def test_mastered_groups_against_a_loop(seed):
    rng = random.Random(seed)
    groups = [rng.choice([-3, 5, 10**9, rng.randrange(9)]) for _ in range(30)]
    right = [rng.random() < 0.9 for _ in groups]
    expected = [all(r for r, g in zip(right, groups, strict=True) if g == group) for group in groups]
    assert grpo.mastered(torch.tensor(right), groups).tolist() == expected and {*expected} == {True, False}


def test_a_constant_normaliser_weighs_every_token_alike():
    ids = torch.tensor([5, 5, 8, 5])
    weights, count = grpo.token_weights(ids, "constant", budget=64)
    assert weights.tolist() == [1 / 64] * 4 and count == 2
    weights, count = grpo.token_weights(ids, "constant", torch.tensor([True, False, False, True]), 64)
    assert weights.tolist() == [1 / 64, 0, 0, 1 / 64] and count == 1


# --- corrections for another program's samples ----------------------------------------------------------------------


def test_truncated_importance_is_the_capped_ratio():
    old, sampler = [-1.0, -1.0, -3.0, 0.0, -2.0], [-1.0, -2.0, -1.0, -90.0, -2.5]
    expected = [min(math.exp(min(o - s, 50)), 2.0) for o, s in zip(old, sampler, strict=True)]
    weights = grpo.truncated_importance(floats(old).requires_grad_(), floats(sampler), 2.0)
    assert close(weights, expected) and not weights.requires_grad and weights.max() == 2.0


@pytest.mark.parametrize("seed", range(5))
def test_trusted_sequences_have_a_geometric_mean_ratio_near_one(seed):
    old, sampler, _, ids = tokens(seed)
    bound, gaps = 1.5, {}
    for o, s, i in zip(old, sampler, ids, strict=True):
        gaps.setdefault(i, []).append(o - s)
    trusted = {i: 1 / bound <= math.exp(statistics.fmean(gap)) <= bound for i, gap in gaps.items()}
    keep = grpo.trusted_sequences(floats(old), floats(sampler), torch.tensor(ids), bound)
    assert keep.tolist() == [trusted[i] for i in ids]


def test_both_sides_of_the_bound_are_masked():
    old, ids = floats([0.1, 0.3, -0.5, 0.0]), torch.tensor([1, 1, 2, 3])
    assert grpo.trusted_sequences(old, floats([0.0] * 4), ids, 1.3).tolist() == [True, True, False, True]
    assert grpo.trusted_sequences(-old, floats([0.0] * 4), ids, 1.2).tolist() == [False, False, False, True]


@pytest.mark.parametrize("kind", ["tokens", "sequence"])
def test_what_is_masked_is_as_if_it_were_not_there(kind):
    ids, keep = torch.tensor([5, 8, 5, 5, 8, 9]), torch.tensor([True, True, False, True, True, False])
    weights, count = grpo.token_weights(ids, kind, keep)
    without, as_many = grpo.token_weights(ids[keep], kind)
    assert torch.equal(weights[keep], without) and not weights[~keep].any() and count == as_many
    assert grpo.token_weights(ids, kind, torch.zeros(6, dtype=torch.bool))[1] == 0
