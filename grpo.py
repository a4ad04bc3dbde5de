"""The mathematics of group-relative policy optimisation, on plain tensors.

GRPO (arXiv 2402.03300, eq. 3) as MMSearch-R1 (arXiv 2506.20670) uses it. For one sampled token:

    loss = -min(r · A, clip(r, 1 - low, 1 + high) · A)  +  β · KL        r = exp(logp - old_logp)

where A compares the conversation's reward with those of the other conversations about the same question. Nothing here
knows of models, episodes or ranks. Functions return one value a token, or sums over tokens, never means: only the
caller knows the global denominator (all micro-batches of all ranks). They raise ValueError where tensors of one axis
differ in shape. A training step puts them together as

    per_token, stats = policy_loss(logp, old_logp, advantages, clip_low=0.2, clip_high=0.2)
    weights, count = token_weights(sequence_ids, "tokens")
    ((per_token + beta * kl_penalty(logp, ref_logp, "k3")) * weights).sum().backward()
    # then scale the gradients once, by 1 / (the sum of `count` over micro-batches and ranks)

Aborted conversations are not handed in at all, neither here nor to `group_advantages`: they have no reward.

Axes:  N  episodes (conversations) of a step
       G  groups: the distinct questions among them
       S  sampled tokens of a micro-batch, one after another; prompts and tool results are not among them
       B  sequences (episodes) of a micro-batch that hold at least one of those tokens
"""

import math

import torch
from torch import Tensor

STD_EPSILON = 1e-6
MAX_LOG_RATIO = 20.0  # exp(20) = 5e8 is far outside of any clip range, and far from overflow
MAX_KL = 10.0


def group_advantages(rewards: Tensor, groups: Tensor, normalize: bool = True, leave_one_out: bool = False) -> Tensor:
    """How much better each episode did than its group (arXiv 2402.03300, section 4.1.2): (r - mean) / (std + 1e-6).

    rewards[N]: float; groups[N]: integers, equal for the episodes of one question, in any order. Lists will do.
    normalize: False only subtracts the mean (Dr. GRPO, arXiv 2503.20783, with the "constant" `token_weights`).
    leave_one_out: the mean is that of the others (RLOO, arXiv 2402.14740, eq. 8): no episode moves its own bar.
    Returns float32 [N]. The standard deviation has Bessel's correction. An episode alone in its group, or in a group of
    equal rewards, gets exactly 0: rounding of the mean must not become a signal.

        rewards 1.0 0.1 0.5 1.0       mean of group 7: 0.55, std 0.6364       group 3: equal rewards
        groups  7   7   3   3    ->   0.7071 -0.7071 0 0
        with [1.0, 0.91, 0.1] in one group: mean 0.67, std 0.4957 -> 0.6657 0.4842 -1.1499
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    groups = torch.as_tensor(groups, device=rewards.device)
    _check_shapes(rewards=rewards, groups=groups)
    index, size = _segments(groups)
    mean = _segment_sum(rewards, index, size) / size  # [G]
    centred = advantages = rewards - mean.index_select(0, index)  # [N]
    if leave_one_out:  # r - (sum - r) / (n - 1)
        advantages = advantages * (size / (size - 1).clamp(min=1)).index_select(0, index)
    if normalize:
        variance = _segment_sum(centred.square(), index, size) / (size - 1).clamp(min=1)  # [G]
        advantages = advantages / (variance.sqrt().index_select(0, index) + STD_EPSILON)
    lowest, highest = (mean.scatter_reduce(0, index, rewards, e, include_self=False) for e in ("amin", "amax"))  # [G]
    all_equal = (lowest == highest).index_select(0, index)  # [N]
    return advantages.masked_fill(all_equal, 0.0).float()


def decoupled_advantages(accuracy: Tensor, economy: Tensor, right: Tensor, groups: Tensor, weight: float) -> Tensor:
    """Accuracy compared within the whole group, economy among its right answers alone (HDPO, arXiv 2604.08545):
    A = A_accuracy + weight · A_economy, each divided by its own standard deviation. A wrong answer has no A_economy,
    nor has the only right one of a group: a search that was needed is never compared with a wrong guess.

    accuracy[N], economy[N]: float; right[N]: bool, the answers whose economy is compared (all right ones, or only those
    in `mastered` groups); groups[N] as in `group_advantages`. Returns float32 [N].

        one group   accuracy 1 1 1 0   economy 1.0 0.9 0.9 1.0    A_accuracy  0.5    0.5    0.5  -1.5
                    right    1 1 1 0   weight 0.5                 A_economy   1.155 -0.577 -0.577 0
                                                                  A           1.077  0.211  0.211 -1.5
    """
    right, groups = torch.as_tensor(right), torch.as_tensor(groups)
    advantages = group_advantages(accuracy, groups)
    advantages[right] += weight * group_advantages(economy[right], groups[right])
    return advantages


def mastered(right: Tensor, groups: Tensor) -> Tensor:
    """bool [N]: whether every answer of the episode's group is right. right[N]: bool or 0 and 1; groups[N] as above."""
    index, size = _segments(torch.as_tensor(groups))
    return (_segment_sum(torch.as_tensor(right).long(), index, size) == size).index_select(0, index)


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, sequence_ids=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of each sampled token (arXiv 2402.03300, eq. 3): -min(r·A, clip(r, 1 - low, 1 + high)·A).

    logp[S], old_logp[S]: float32, under the policy in training and under the one held fixed for this batch. No gradient
    flows into old_logp, so `policy_loss(logp, logp, ...)` is a batch's first update. advantages[S]: float32.
    sequence_ids[S]: integers naming each token's sequence, in any order. With them r is the geometric mean of the
    sequence's ratios and the gradient flows through that mean: with the "sequence" `token_weights` this is GSPO (arXiv
    2507.18071, eq. 5 and 7; its clip ranges are much smaller, 3e-4). A sequence must lie whole in the call.

    Returns the loss [S] and sums over the tokens, 0-d and detached, to be added up and divided by `tokens`:
        tokens     S
        ratio      r (the sequence's, where sequence_ids are given)
        clip_high  tokens that lost their gradient to the clip with A > 0 (r > 1 + high) ...
        clip_low   ... and with A < 0 (r < 1 - low)
        approx_kl  k3 estimate of KL(old || new), of single tokens even where sequence_ids are given
    Log-ratios are clamped to [-20, 20]; a token beyond has a finite loss and no gradient.

        clip 0.2:   r    A    loss   gradient to logp
                    1.0  2.0  -2.0   -2.0      on-policy: REINFORCE
                    1.5  2.0  -2.4    0        clipped (clip_high): already likelier by more than a fifth
                    0.5  2.0  -1.0   -1.0      the pessimistic side is never clipped
                    0.5 -2.0   1.6    0        clipped (clip_low)
    """
    _check_shapes(logp=logp, old_logp=old_logp, advantages=advantages, sequence_ids=sequence_ids)
    token_log_ratio = log_ratio = logp - old_logp.detach()  # [S]
    if sequence_ids is not None:
        index, length = _segments(sequence_ids)
        log_ratio = (_segment_sum(token_log_ratio, index, length) / length).index_select(0, index)  # [B] -> [S]
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        stats = {
            "tokens": _count(logp),
            "ratio": ratio.sum(),
            "clip_low": ((advantages < 0) & (ratio < 1 - clip_low)).sum().float(),
            "clip_high": ((advantages > 0) & (ratio > 1 + clip_high)).sum().float(),
            "approx_kl": _k3(token_log_ratio).sum(),
        }
    return loss, stats


def kl_penalty(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """An estimate of KL(policy || reference) at each sampled token, from d = ref_logp - logp. No gradient to ref_logp.

        kind   value            unbiased   expected gradient on-policy, where it stands in a loss
        k1     -d               yes        zero! no penalty at all
        k2     d² / 2           no         that of KL(policy || reference)
        k3     exp(d) - d - 1   yes        that of KL(reference || policy)       (arXiv 2402.03300, eq. 4)

    k1's gradient is grad logp, whose expectation over the policy's own tokens is zero: in a loss it only adds noise.
    k3's value is clamped to [-10, 10]; a token beyond (d > 2.6 or d < -11) has no gradient.
    logp[S], ref_logp[S]: float32. Returns [S].
    """
    _check_shapes(logp=logp, ref_logp=ref_logp)
    d = ref_logp.detach() - logp
    return {"k1": -d, "k2": 0.5 * d.square(), "k3": _k3(d).clamp(-MAX_KL, MAX_KL)}[kind]


def token_weights(sequence_ids: Tensor, kind: str, keep: Tensor | None = None, budget=1) -> tuple[Tensor, Tensor]:
    """What each token's loss is multiplied by, and what this micro-batch adds to the global denominator.

    sequence_ids[S]: integers, in any order. A sequence must lie whole in the call; one without a sampled token is not
    counted. keep[S]: bool; a token without it has weight 0 and is not counted, either. kind: the loss is
        tokens    the mean over all tokens of all sequences
        sequence  the mean over sequences of the mean over a sequence's tokens (arXiv 2402.03300, eq. 3)
        constant  the mean over sequences of the sum of tokens over `budget`, the tokens a sequence may have: a long
                  wrong answer does not weigh less a token (Dr. GRPO, arXiv 2503.20783, section 3.2)
    Returns weights float32 [S] and count float32 0-d.

        sequence_ids  5 5 5 8          "tokens"    weights 1   1   1   1    count 4
                                       "sequence"  weights 1/3 1/3 1/3 1    count 2
        with keep     1 0 1 0          "sequence"  weights 1/2 0   1/2 0    count 1
    """
    if keep is not None:
        _check_shapes(sequence_ids=sequence_ids, keep=keep)
        weights, count = token_weights(sequence_ids[keep], kind, budget=budget)
        return weights.new_zeros(len(keep)).masked_scatter(keep, weights), count
    if kind == "tokens":
        return torch.ones_like(sequence_ids, dtype=torch.float32), _count(sequence_ids)
    if kind == "sequence":
        index, length = _segments(sequence_ids)
        return (1.0 / length).index_select(0, index), _count(length)
    if kind == "constant":
        return torch.full(sequence_ids.shape, 1.0 / budget, device=sequence_ids.device), _count(sequence_ids.unique())
    raise ValueError(f"normalisation must be tokens, sequence or constant, not {kind!r}")


@torch.no_grad()
def truncated_importance(old_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """What a token's loss is multiplied by because another program sampled it: min(exp(old_logp - sampler_logp), cap)
    (truncated importance sampling; fengyao.notion.site/off-policy-rl; a cap of 2 is usual).

    old_logp[S], sampler_logp[S]: float32, of the same weights, by the trainer and as the sampler reported. Returns [S].

    With --carry_over some tokens were drawn with the weights of an earlier step, and sampler_logp is of those weights.
    For these tokens alone, with w = exp(old_logp - sampler_logp) and r = exp(logp - sampler_logp),

        loss = -min(w, cap) / w · min(r·A, clip(r, 1 - low, 1 + high)·A)

    whose gradient at a step's first update (r = w) is -min(r, cap)·A·grad logp, or 0 where clipped; A < 0 needs the
    cap. Other tokens are off by rounding only, no reason to clip. TRL's AsyncGRPOTrainer clips all tokens around the
    sampler, without a cap; AReaL (arXiv 2505.24298) multiplies by w and clips around the trainer's recent weights.
    """
    _check_shapes(old_logp=old_logp, sampler_logp=sampler_logp)
    return (old_logp - sampler_logp).clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


@torch.no_grad()
def trusted_sequences(old_logp: Tensor, sampler_logp: Tensor, sequence_ids: Tensor, bound: float) -> Tensor:
    """bool [S]: whether the geometric mean of exp(old_logp - sampler_logp) over the token's sequence is in
    [1 / bound, bound]. What is outside was drawn from too different a distribution to learn from; hand it to
    `token_weights` as `keep`. A sequence must lie whole in the call. Arguments as in `truncated_importance`.

        gaps 0.1 0.3 | -0.5      mean 0.2, -0.5     bound 1.3 (log 0.26): True True | False
    """
    _check_shapes(old_logp=old_logp, sampler_logp=sampler_logp, sequence_ids=sequence_ids)
    index, length = _segments(sequence_ids)
    mean = _segment_sum(old_logp - sampler_logp, index, length) / length  # [B]
    return (mean.abs() <= math.log(bound)).index_select(0, index)


@torch.no_grad()
def mismatch(logp: Tensor, sampler_logp: Tensor) -> dict[str, Tensor]:
    """How far the trainer's log-probabilities of the sampled tokens are from those the sampler reported.

    logp[S], sampler_logp[S]: float32. Returns sums, 0-d, to be added up and divided by the number of tokens:
        mismatch/mean  |logp - sampler_logp|
        mismatch/k3    k3 estimate of KL(sampler || trainer)
    """
    _check_shapes(logp=logp, sampler_logp=sampler_logp)
    gap = logp - sampler_logp
    return {"mismatch/mean": gap.abs().sum(), "mismatch/k3": _k3(gap).sum()}


def _k3(d: Tensor) -> Tensor:
    """exp(d) - d - 1 for any d, and to full precision: with exp(d) - 1, a d of 1e-4 would give 0 in float32. The clamp
    comes first: after it, an infinite exp would meet a zero gradient in backward and make NaN."""
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d


def _segments(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids, numbered: each element's number, and the size of each segment. 9 4 9 -> 1 0 1 and 1 2"""
    _, index, length = torch.unique(ids, return_inverse=True, return_counts=True)
    return index, length


def _segment_sum(values: Tensor, index: Tensor, length: Tensor) -> Tensor:
    # index_add and index_select rather than values[index]: the backward of the latter is not reproducible.
    return values.new_zeros(len(length)).index_add(0, index, values)


def _count(values: Tensor) -> Tensor:
    return torch.tensor(float(values.numel()), device=values.device)


def _check_shapes(**tensors: Tensor | None) -> None:
    """[S] against [S, 1] would broadcast to [S, S] and train on nonsense."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"expected one axis of one length, got {shapes}")
