"""The trainer against transformers' own model: packing, positions, log-probs, gradients; steps that depend neither on
packing nor on the number of ranks; checkpoints and exports.

Run as a script, this file is one of the ranks of the tests with two processes."""

import importlib.util
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import both_families, picture, question, replace
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import backbone
import checkpoint
import config
import policy
from chat import Chat, Episode
from config import InputError
from data import Call, Hit, Question, Result, decode_image
from engines import Reply
from grpo import token_weights
from toy import model as toy_model

# ------------------------------------------------------------------------------------------ what to compare with


def save_sharp_model(folder, path):
    """A model that forgives nothing: grouped heads, its own head, no norm at 1 and no bias at 0, far from uniform."""
    shutil.copytree(folder, path)
    shape = backbone.read_model(folder, empty=True).config
    shape.text_config.num_key_value_heads = 2
    shape.tie_word_embeddings = False
    torch.manual_seed(1)
    model = backbone.model_class(shape)(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sharp(folder, tmp_path_factory):
    return save_sharp_model(folder, tmp_path_factory.mktemp("sharp") / "model")


class Plain:
    """transformers' own forward, one conversation at a time: its own image processing, positions and attention."""

    def __init__(self, folder, cfg, dtype=torch.float32):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        self.processors = {
            thumbnail: Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=low, max_pixels=high)
            for thumbnail, low, high in (
                (False, cfg.min_pixels, cfg.max_pixels),
                (True, cfg.thumb_min_pixels, cfg.thumb_max_pixels),
            )
        }
        names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
        self.banned = [self.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
        self.banned += range(len(self.tokenizer), self.model.config.text_config.vocab_size)

    def logits(self, episode):
        """[T, V]"""
        images = [self.processors[p.thumbnail]([decode_image(p.data)], return_tensors="pt") for p in episode.images]
        ids = torch.tensor([episode.tokens])
        pictures = {key: torch.cat([image[key] for image in images]) for key in (images[0] if images else ())}
        is_image = (ids == self.model.config.image_token_id).int()
        return self.model(ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=is_image, **pictures).logits[0]

    def logp(self, episode, temperature=1.0):
        """[sampled, V]: log of the distribution that each sampled token was drawn from."""
        where = torch.tensor(episode.sampled).nonzero()[:, 0]
        logits = self.logits(episode)[where - 1].float() / temperature
        logits[:, self.banned] = -torch.inf
        return logits.log_softmax(-1)

    def sampled_logp(self, episode, temperature=1.0):
        return self.logp(episode, temperature).gather(1, sampled_tokens(episode)[:, None])[:, 0]


def sampled_tokens(episode):
    return torch.tensor([t for t, s in zip(episode.tokens, episode.sampled, strict=True) if s])


# Pictures of several sizes. The two questions' pictures have equally many vision tokens in different grids.
SIZES = {"wide": (112, 56), "high": (56, 112), "small": (30, 30), "large": (120, 90)}
PICTURES = {name: picture(10 + i, *size) for i, (name, size) in enumerate(SIZES.items())}


def wide_range(cfg):
    """Pictures and thumbnails of various grids; room for them."""
    pixels = dict(min_pixels=28 * 28, max_pixels=112 * 112, thumb_min_pixels=28 * 28, thumb_max_pixels=56 * 84)
    return replace(cfg, **pixels, max_tokens=400, max_tokens_per_batch=1000)


def conversation(chat, number, images=("wide",), turns=((5, ("small",)), (3, ()))):
    """An episode about `images`; turns: (how many random tokens the policy says, thumbnails of the result after it). A
    turn without thumbnails is the last, or its result is text."""
    draw = torch.Generator().manual_seed(number)
    about = Question(f"q{number}", "what is it called?", tuple(PICTURES[name] for name in images), ("bako",))
    episode = Episode.start(about, chat)
    for index, (length, thumbnails) in enumerate(turns):
        ids = torch.randint(300, 500, (length - 1,), generator=draw).tolist() + [chat.im_end]
        logprobs = (-torch.rand(length, generator=draw)).tolist()
        episode.add_reply(Reply("", ids, logprobs, "stop", 0))
        if index + 1 < len(turns):
            hits = tuple(Hit(f"page {n}", image=PICTURES[name]) for n, name in enumerate(thumbnails))
            assert episode.add_result(Call("image_search"), Result("ok", hits or (Hit("a page", text="about it"),)))
    return episode


def some_episodes(chat):
    """Six conversations: two about one picture, several grids, text only, several pictures, one without a sampled
    token."""
    return [
        conversation(chat, 0),
        conversation(chat, 1, turns=((2, ("large", "small", "wide")), (4, ()), (3, ()))),
        conversation(chat, 2, images=(), turns=((7, ()),)),
        conversation(chat, 3, images=("high", "small"), turns=((1, ("high", "large")), (2, ()))),
        conversation(chat, 4, images=("large",), turns=((9, ()), (2, ()))),
        conversation(chat, 5, images=("small",), turns=()),
    ]


ADVANTAGES = [1.0, -0.5, 2.0, 0.3, -1.2, 0.7]


def reinforce(kind):
    """The loss of a REINFORCE step."""

    def batch_loss(batch, logp, entropy):
        weights, count = token_weights(batch.sequence, kind)
        return -(logp * batch.advantage * weights).sum(), count, {"tokens": logp.numel()}

    return batch_loss


def gradients(model):
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g.clone()  # noqa: E731
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def assert_same(new, old, rel=1e-5):
    """Named tensors are equal, relative to the largest number of each."""
    assert set(new) == set(old)
    largest = {name: value.detach().abs().max().clamp(min=1e-30) for name, value in old.items()}
    gaps = {name: ((new[name] - old[name]).detach().abs().max() / largest[name]).item() for name in old}
    worst = max(gaps, key=gaps.get)
    assert gaps[worst] < rel, (worst, gaps[worst])


def step(model, episodes, chat, cfg, device, kind="tokens", packed=range(6), lr=1.0):
    """One SGD step; (what update returned, gradients). packed: the numbers of the episodes, for their advantages."""
    advantages = [ADVANTAGES[number] for number in packed][: len(episodes)]
    batches = policy.pack(episodes, chat, model, cfg.max_tokens_per_batch, advantages)
    batches = policy.equal_counts(batches, chat, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    return policy.update(model, optimizer, batches, reinforce(kind), cfg, device), gradients(model)


@pytest.fixture
def wide(cfg):
    return wide_range(cfg)


@pytest.fixture
def sharp_chat(sharp, wide):
    return Chat(sharp, wide)


@pytest.fixture
def sharp_model(sharp, sharp_chat, wide, device):
    return policy.load_policy(sharp, sharp_chat, wide, device)


@pytest.fixture
def plain(sharp, wide):
    return Plain(sharp, wide)


@pytest.fixture
def episodes(sharp_chat):
    return some_episodes(sharp_chat)


# ----------------------------------------------------------------------------------------------------------- packing


def test_the_example_at_the_top_of_the_file(model, chat):
    thumbnail = chat.picture(PICTURES["small"], thumbnail=True)
    u, i, x = 300, chat.image_pad, 400
    first = Episode(question(0), chat, 0, [u, i, x, x + 1], [False, False, True, True], [0, 0, -1, -2], [thumbnail])
    second = Episode(question(0), chat, 1, [u, i, x + 2], [False, False, True], [0, 0, -3], [thumbnail])
    (batch,) = policy.pack([first, second], chat, model, 5)
    assert batch.ids.tolist() == [u, i, x, x + 1, x + 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 5] and batch.longest == (4, 4)
    assert batch.keys.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert batch.cu_keys.tolist() == [0, 4, 7]
    assert batch.predict.tolist() == [1, 2, 1]
    assert batch.target.tolist() == [x, x + 1, x + 2]
    assert batch.sequence.tolist() == [0, 0, 1]
    assert batch.sampler_logp.tolist() == [-1, -2, -3]
    assert batch.pixels.shape[0] == 4 and batch.grids.tolist() == [[1, 2, 2]]
    assert batch.vision_rows.tolist() == [0] and batch.vision_positions.tolist() == [1]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]] * 3
    assert [len(b.ids) for b in policy.pack([first, second], chat, model, 4)] == [4, 3]


def group(chat):
    """Conversations of one question, and one of another question with the same picture. What they share ends in the
    prompt, in what was said, within a tool's picture; all of it is shared, or nothing."""
    episodes = []

    def converse(name, *replies, found="small"):
        about = Question(name, "what is it called?", (PICTURES["wide"],), ("bako",))
        episodes.append(Episode.start(about, chat, sample=len(episodes)))
        for turn, ids in enumerate(replies):
            if turn:
                page = Hit("a page", image=PICTURES.get(found) or picture(99, *SIZES["small"]))
                assert episodes[-1].add_result(Call("image_search"), Result("ok", (page,)))
            logprobs = [-0.1 * n for n in range(len(ids) + 1)]
            episodes[-1].add_reply(Reply("", [*ids, chat.im_end], logprobs, "stop", 0))

    converse("q0", [301, 302, 303], [304])
    converse("q0", [301, 302], [305, 306])
    converse("q0", [301, 302, 303], [304], found="another of this size")
    converse("q0", range(310, 390))
    converse("q0", [301, 302, 303], [304])  # the first again
    converse("q0", [301, 302, 303])  # its beginning
    converse("q1", [301, 302, 303], [307])
    converse("q0")  # nothing is said
    converse("q0", [308], found="large")
    return episodes


def apart(episode, seen):
    """policy.rows without sharing."""
    first = len(seen)
    seen.update((first + number, None) for number in range(len(episode.tokens)))
    return list(range(first, len(seen)))


def told_apart(episode, n):
    """What tells the first n tokens of a conversation from others."""
    shown = episode.tokens[:n].count(episode.chat.image_pad)
    keys = [picture.key for picture in episode.images for _ in range(picture.tokens)]
    return episode.question.id, tuple(episode.tokens[:n]), tuple(keys[:shown])


def test_what_conversations_of_a_question_share_stands_once(sharp_model, sharp_chat):
    episodes = group(sharp_chat)
    (batch,) = policy.pack(episodes, sharp_chat, sharp_model, 10000)
    distinct = {told_apart(e, n + 1) for e in episodes for n in range(len(e.tokens))}
    assert len(batch.ids) == len(distinct) < 0.6 * sum(len(e.tokens) for e in episodes)
    assert len(batch.cu_seqlens) == len(batch.cu_keys) == 1 + len(episodes) - 3  # the same, a beginning, a prompt
    assert batch.cu_seqlens[-1] == len(batch.ids) and batch.cu_keys[-1] == len(batch.keys)
    segments = [e.tokens for n, e in enumerate(episodes) if n not in (4, 5, 7)]
    assert batch.ids[batch.keys].tolist() == sum(segments, [])
    said = [t for e in episodes for t in sampled_tokens(e).tolist()]
    assert batch.target.tolist() == said and len(batch.predict) > len(batch.predict.unique())
    assert batch.vision_positions.tolist() == (batch.ids == sharp_chat.image_pad).nonzero()[:, 0].tolist()
    budget = len(batch.ids) - 1
    sizes = [len(part.ids) for part in policy.pack(episodes, sharp_chat, sharp_model, budget)]
    assert len(sizes) == 2 and max(sizes) <= budget


@both_families
@pytest.mark.parametrize("blocks", [256, 7])
def test_shared_beginnings_change_neither_logprobs_nor_gradients(
    sharp_model, sharp_chat, plain, wide, device, monkeypatch, blocks
):
    """Beside transformers' own forward of each conversation."""
    monkeypatch.setattr(backbone.lower_right_attention, "__defaults__", (blocks,))
    episodes, advantages = group(sharp_chat), [1.0, -0.5, 2.0, 0.3, -1.2, 0.7, 0.4, 1.0, -0.8]
    batches = policy.pack(episodes, sharp_chat, sharp_model, 10000, advantages)
    separate = torch.cat([plain.sampled_logp(e) for e in episodes])
    torch.testing.assert_close(policy.logprobs(sharp_model, batches, 1.0, device)[0], separate, atol=1e-5, rtol=1e-5)
    loose = replace(wide, max_grad_norm=1e9)
    sums = policy.update(
        sharp_model, torch.optim.SGD(sharp_model.parameters(), 0.0), batches, reinforce("tokens"), loose, device
    )
    plain.model.double()  # in float32 the reference is 1.3e-5 from this on some CPUs, twice as far as what is tested
    for episode, advantage in zip(episodes, advantages, strict=True):
        (-(plain.sampled_logp(episode) * advantage).sum() / sums["count"]).backward()
    assert sums["count"] == sum(sum(e.sampled) for e in episodes)
    assert_same(gradients(sharp_model), gradients(plain.model))


@both_families
def test_adapters_learn_the_same_from_shared_beginnings(sharp, sharp_chat, wide, device, monkeypatch):
    found = []
    for rows in (policy.rows, apart):
        monkeypatch.setattr(policy, "rows", rows)
        cfg = replace(wide, lora_rank=4, max_grad_norm=1e9, max_tokens=1000, max_tokens_per_batch=2000)
        model = policy.load_policy(sharp, sharp_chat, cfg, device)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(parameter.numel()))
        batches = policy.pack(group(sharp_chat), sharp_chat, model, 2000, [0.1 * n - 0.4 for n in range(9)])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
        policy.update(model, optimizer, batches, reinforce("sequence"), cfg, device)
        found.append((len(batches[0].ids), *policy.logprobs(model, batches, 1.0, device), gradients(model)))
    (few, logp, grads), (many, plain_logp, plain_grads) = found
    assert few < many
    torch.testing.assert_close(logp, plain_logp, atol=1e-5, rtol=1e-5)
    assert_same(grads, plain_grads)


@pytest.mark.parametrize("budget", [130, 200, 100000])
def test_packing_loses_and_pads_nothing(sharp_model, sharp_chat, episodes, budget):
    batches = policy.pack(episodes, sharp_chat, sharp_model, budget, ADVANTAGES)
    advantages = dict(zip([e.name for e in episodes], ADVANTAGES, strict=True))
    assert [e.name for batch in batches for e in batch.episodes] == [e.name for e in episodes]
    assert len(batches) == {130: 4, 200: 2, 100000: 1}[budget]
    for batch in batches:
        mine = batch.episodes
        assert len(batch.ids) <= budget
        assert batch.ids.tolist() == [t for e in mine for t in e.tokens]
        assert batch.cu_seqlens.diff().tolist() == [len(e.tokens) for e in mine]
        assert batch.target.tolist() == [t for e in mine for t in sampled_tokens(e).tolist()]
        assert batch.ids[batch.predict + 1].tolist() == batch.target.tolist()
        sampled = torch.zeros(len(batch.ids), dtype=torch.bool).index_fill(0, batch.predict + 1, True)
        assert sampled.tolist() == [s for e in mine for s in e.sampled]
        assert batch.sampler_logp.tolist() == pytest.approx(
            [p for e in mine for p, s in zip(e.logprobs, e.sampled, strict=True) if s]
        )
        assert batch.sequence.tolist() == [n for n, e in enumerate(mine) for _ in range(sum(e.sampled))]
        said = [e.name for e in mine for _ in range(sum(e.sampled))]
        assert batch.advantage.tolist() == pytest.approx([advantages[name] for name in said])
        sizes = [p.grid[0] * p.grid[1] // 4 for e in mine for p in e.images]
        assert sum(sizes) == len(batch.vision_rows) == (batch.ids == sharp_chat.image_pad).sum()
        assert batch.vision_positions.tolist() == (batch.ids == sharp_chat.image_pad).nonzero()[:, 0].tolist()


def test_an_episode_longer_than_a_batch_is_refused(model, chat, cfg):
    episode = conversation(chat, 0)
    assert len(policy.pack([episode], chat, model, len(episode.tokens))) == 1
    with pytest.raises(ValueError, match="does not fit"):
        policy.pack([episode], chat, model, len(episode.tokens) - 1)


def test_placeholders_that_do_not_match_the_pictures_are_refused(model, chat):
    episode = conversation(chat, 0)
    episode.images.pop()
    with pytest.raises(ValueError, match="placeholders"):
        policy.pack([episode], chat, model, 1000)


@both_families
def test_positions_are_those_of_the_padded_batch(sharp_model, sharp_chat, episodes, plain):
    longest = max(len(e.tokens) for e in episodes)
    ids = torch.tensor([e.tokens + [0] * (longest - len(e.tokens)) for e in episodes])
    mask = torch.tensor([[1] * len(e.tokens) + [0] * (longest - len(e.tokens)) for e in episodes])
    grids = torch.tensor([[1, *p.grid] for e in episodes for p in e.images])
    is_image = (ids == sharp_chat.image_pad).int()
    padded, _ = plain.model.model.get_rope_index(ids, is_image, image_grid_thw=grids, attention_mask=mask)
    (batch,) = policy.pack(episodes, sharp_chat, sharp_model, 100000)
    bounds = batch.cu_seqlens.tolist()
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        assert torch.equal(batch.positions[:, start:end], padded[:, n, : end - start])
    assert not torch.equal(batch.positions[1], batch.positions[2])  # the pictures are not of one column


def test_positions_tell_a_wide_picture_from_a_tall_one(sharp_model, sharp_chat):
    """They are remembered by layout, of which the grids are a part."""
    tokens = [sharp_chat.vision_start, *[sharp_chat.image_pad] * 8, sharp_chat.im_end]
    wide, tall = (
        backbone.rope_positions(tokens, [SimpleNamespace(grid=grid)], sharp_chat, sharp_model)
        for grid in ((4, 8), (8, 4))
    )
    extent = lambda positions: positions[:, 1:9].amax(1).tolist()  # noqa: E731
    assert extent(wide) == [1, 2, 4] and extent(tall) == [1, 4, 2]


# ------------------------------------------------------------------------------------------------------- log-probs


@both_families
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [130, 100000])
def test_packed_logprobs_are_those_of_separate_plain_forwards(
    sharp_model, sharp_chat, episodes, plain, device, budget, temperature
):
    batches = policy.pack(episodes, sharp_chat, sharp_model, budget)
    packed = torch.cat(policy.logprobs(sharp_model, batches, temperature, device))
    with torch.no_grad():
        separate = torch.cat([plain.sampled_logp(e, temperature) for e in episodes])
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-5)


@both_families
def test_gradients_are_those_of_separate_plain_forwards(sharp_model, sharp_chat, episodes, plain, wide, device):
    wide = replace(wide, temperature=0.7, max_grad_norm=1e9)
    sums, new = step(sharp_model, episodes, sharp_chat, wide, device)
    count, loss = sum(len(sampled_tokens(e)) for e in episodes), 0.0
    for episode, advantage in zip(episodes, ADVANTAGES, strict=True):
        part = -(plain.sampled_logp(episode, 0.7) * advantage).sum()
        (part / count).backward()
        loss += part.item()
    assert sums["count"] == count and sums["loss"] == pytest.approx(loss, rel=1e-5)
    assert_same(new, gradients(plain.model))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_entropy_is_that_of_the_sampling_distribution(sharp_model, sharp_chat, episodes, plain, temperature):
    (batch,) = policy.pack(episodes, sharp_chat, sharp_model, 100000)
    entropy = sharp_model.packed_logprobs(batch, temperature, True)[1]
    expected = []
    for episode in episodes:
        p = plain.logp(episode, temperature).double().softmax(-1)
        expected.append(-(p * p.clamp(min=1e-300).log()).sum(-1).float())
    torch.testing.assert_close(entropy, torch.cat(expected), atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(entropy), generator=torch.Generator().manual_seed(0))
    (entropy * weights).sum().backward()
    (torch.cat(expected) * weights).sum().backward()
    assert_same(gradients(sharp_model), gradients(plain.model), 1e-4)
    assert not sharp_model.packed_logprobs(batch, temperature)[1].requires_grad


def test_banned_ids_are_outside_of_the_distribution(sharp_model, sharp_chat, episodes, plain, device):
    (batch,) = policy.pack(episodes, sharp_chat, sharp_model, 100000)
    before = policy.logprobs(sharp_model, [batch], 1.0, device)[0]
    with torch.no_grad():
        sharp_model.lm_head.weight[plain.banned] = 100.0
    assert torch.equal(policy.logprobs(sharp_model, [batch], 1.0, device)[0], before)


def test_a_change_in_one_episode_does_not_reach_another(sharp_model, sharp_chat, episodes, device):
    (batch,) = policy.pack(episodes, sharp_chat, sharp_model, 100000)
    before = policy.logprobs(sharp_model, [batch], 1.0, device)[0]
    for number, episode in enumerate(episodes[:5]):
        token = episode.tokens.index(sharp_chat.im_end) - 1  # of the prompt: everything of this episode depends on it
        old, episode.tokens[token] = episode.tokens[token], 333
        (batch,) = policy.pack(episodes, sharp_chat, sharp_model, 100000)
        changed = (policy.logprobs(sharp_model, [batch], 1.0, device)[0] - before).abs() > 2e-6
        assert torch.equal(changed, batch.sequence == number)
        episode.tokens[token] = old


@both_families
def test_a_change_in_one_picture_does_not_reach_another(sharp_model, sharp_chat, episodes, device):
    (batch,) = policy.pack(episodes, sharp_chat, sharp_model, 100000)
    before = policy.logprobs(sharp_model, [batch], 1.0, device)[0]
    keys = list(dict.fromkeys(p.key for e in episodes for p in e.images))
    ends = (batch.grids[:, 1] * batch.grids[:, 2]).cumsum(0).tolist()
    for key, start, end in zip(keys, [0, *ends], ends, strict=False):
        pixels = batch.pixels.clone()
        batch.pixels[start:end] += 1.0
        changed = (policy.logprobs(sharp_model, [batch], 1.0, device)[0] - before).abs() > 2e-6
        shows = torch.tensor([any(p.key == key for p in e.images) for e in episodes])[batch.sequence]
        assert not (changed & ~shows).any() and bool(changed.any()) == bool(shows.any())
        batch.pixels = pixels


def test_chunks_of_the_head_change_nothing(sharp_model, sharp_chat, episodes, device, monkeypatch):
    (batch,) = policy.pack(episodes, sharp_chat, sharp_model, 100000)
    results, distributions = [], policy.distributions
    for chunk in (1024, 3):
        monkeypatch.setitem(policy.HEAD_LOGITS, "cpu", chunk * len(sharp_model.banned_ids))
        sizes = []
        spy = lambda hidden, *rest, sizes=sizes: sizes.append(len(hidden)) or distributions(hidden, *rest)  # noqa: E731
        monkeypatch.setattr(policy, "distributions", spy)
        sharp_model.zero_grad()
        logp, entropy, _ = sharp_model.packed_logprobs(batch, 0.8, True)
        (logp.sum() + 0.1 * entropy.sum()).backward()
        results.append((logp, entropy, gradients(sharp_model), max(sizes)))
    (logp, entropy, grads, largest), (logp3, entropy3, grads3, largest3) = results
    torch.testing.assert_close(logp3, logp, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy3, entropy, atol=1e-6, rtol=1e-6)
    assert_same(grads3, grads)
    assert largest == len(batch.target) and largest3 == 3


def test_the_vision_tower_runs_once_for_each_distinct_picture(sharp_model, sharp_chat, episodes):
    patches = []
    sharp_model.model.visual.register_forward_pre_hook(lambda _, args: patches.append(args[0].shape[0]))
    twice = [*episodes, *episodes]
    (batch,) = policy.pack(twice, sharp_chat, sharp_model, 100000)
    sharp_model.packed_logprobs(batch, 1.0)
    distinct = {p.key: p.grid[0] * p.grid[1] for e in twice for p in e.images}
    assert patches == [sum(distinct.values())]
    assert sum(p.grid[0] * p.grid[1] for e in twice for p in e.images) > 2 * sum(distinct.values())


@both_families
@pytest.mark.parametrize("of", ["text only", "empty"])
def test_the_vision_tower_and_the_head_take_part_in_every_backward(sharp_model, sharp_chat, episodes, of):
    """With FSDP, a rank that leaves a module out makes the others wait for ever."""
    batch = (
        policy.pack_batch([], [], [], sharp_chat, sharp_model)
        if of == "empty"
        else policy.pack([episodes[2]], sharp_chat, sharp_model, 99)[0]
    )
    patches = []
    sharp_model.model.visual.register_forward_pre_hook(lambda _, args: patches.append(args[0].shape[0]))
    logp, entropy, zero = sharp_model.packed_logprobs(batch, 1.0)
    assert patches == [4]
    assert zero.item() == 0 and len(logp) == len(entropy) == len(batch.target)
    zero.backward()
    assert all(p.grad is not None and not p.grad.any() for p in sharp_model.parameters())


# ------------------------------------------------------------------------------------------------------- attention


SHARES = [  # tokens of each segment; the row of each of its keys
    ([5], [[0, 1, 2, 3, 4]]),
    ([3, 3, 3], [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
    ([4, 1, 7, 4, 2], [range(4), range(4, 5), range(5, 12), range(12, 16), range(16, 18)]),
    (
        [6, 1, 5, 2, 1, 3],
        [range(6), [0, 1, 2, 3, 6], [0, 1, *range(7, 12)], [*range(5), 12, 13], [0, 14], range(15, 18)],
    ),
]


def by_hand(query, key, value, lengths, key_rows, causal, scaling):
    """Attention query by query: query [1, heads, T, D] to [1, T, heads, D]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    outs, row = [], 0
    for length, keys in zip(lengths, map(list, key_rows), strict=True):
        for number in range(length):
            seen = keys[: len(keys) - length + number + 1] if causal else keys
            weights = (query[0, :, row, None] * key[0, :, seen]).sum(-1).mul(scaling).softmax(-1)  # [heads, seen]
            outs.append((weights[..., None] * value[0, :, seen]).sum(1))
            row += 1
    return torch.stack(outs)[None]


def attention_options(lengths, key_rows, causal):
    keys = [row for rows in key_rows for row in rows]
    bounds = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, [len(rows) for rows in key_rows])]
    return dict(
        scaling=0.3, is_causal=causal, cu_seq_lens_q=bounds[0], cu_seq_lens_k=bounds[1], max_length_q=max(lengths),
        max_length_k=max(map(len, key_rows)), key_rows=torch.tensor(keys) if len(keys) > sum(lengths) else None,
    )  # fmt: skip


def attention_cases(test):
    """Segments of the packed batch with their keys; without a causal mask (the vision tower) nothing is shared."""
    cases = [(*shares, causal) for shares in SHARES for causal in (True, False) if causal or shares is not SHARES[-1]]
    test = pytest.mark.parametrize("lengths, key_rows, causal", cases)(test)
    return pytest.mark.parametrize("kv_heads", [4, 2])(test)


@attention_cases
@pytest.mark.parametrize("block", [256, 2])
def test_packed_attention_is_attention_by_hand(monkeypatch, lengths, key_rows, causal, kv_heads, block):
    monkeypatch.setattr(backbone.lower_right_attention, "__defaults__", (block,))
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(lengths), 8)
    key, value = torch.randn(2, 1, kv_heads, sum(lengths), 8).unbind(0)
    expected = by_hand(query, key, value, lengths, key_rows, causal, 0.3)
    options = attention_options(lengths, key_rows, causal)
    out, _ = backbone.packed_attention(torch.nn.Module(), query, key, value, **options)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_the_head_s_logits_are_fp32(monkeypatch):
    """Of bf16 factors: what a GPU's product into fp32 gives, and not the nearest bf16."""
    hidden, weight = (3 * torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (5, 300))
    expected = (hidden.double() @ weight.double().T).float()
    torch.testing.assert_close(policy.head_logits(hidden, weight), expected, atol=1e-4, rtol=1e-5)
    none = torch.tensor([], dtype=torch.long)
    logp, _ = policy.distributions(hidden, weight, none, 1.0)
    torch.testing.assert_close(logp, expected.log_softmax(-1), atol=1e-4, rtol=1e-5)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype: a.to(out_dtype) @ b.to(out_dtype))  # CUDA only
    torch.testing.assert_close(policy.head_logits(hidden, weight), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("offload, threads", [("all", 3), ("reference", 1), ("none", 1)])
def test_an_optimiser_on_the_cpu_has_its_threads(monkeypatch, device, offload, threads):
    """On a GPU, where torchrun has set OMP_NUM_THREADS to 1, and vLLM resets what it is not told to leave."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        policy.init_distributed(config.Config(device="cuda", offload=offload, threads=3))
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (threads, str(threads))
    finally:
        torch.set_num_threads(1)
        torch.backends.cuda.enable_cudnn_sdp(True)


@both_families
def test_patches_are_embedded_as_by_the_convolution(sharp_model):
    embed = sharp_model.model.visual.patch_embed
    pixels = torch.randn(12, embed.proj.weight[0].numel())
    expected = type(embed).forward(embed, pixels)
    embed.proj.forward = None  # the convolution itself must not run
    try:
        torch.testing.assert_close(embed(pixels), expected, atol=1e-5, rtol=1e-5)
    finally:
        del embed.proj.forward


def test_offloaded_weights_are_pinned_where_twice_their_memory_is_there(monkeypatch, model):
    count = sum(p.numel() for p in model.parameters())

    def fits(bytes, copies=1.0):
        monkeypatch.setattr(os, "sysconf", dict(SC_PHYS_PAGES=int(bytes / 0.9), SC_PAGE_SIZE=1).get)
        return policy.room_to_pin(model, copies)

    assert fits(24 * count + 10) and not fits(24 * count - 10)  # twice weights and gradients, the state once
    assert fits(6 * count + 10, 0.25) and not fits(6 * count - 10, 0.25)
    model.requires_grad_(False)  # a reference
    assert fits(8 * count + 10) and not fits(8 * count - 10)


def as_documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal, scale):
    """What the variable-length kernels compute (they need CUDA), query by query: [T, heads, D], keys [K, heads, D].
    The causal mask is aligned to the lower right: in flash-attn from 2.1 on, whose kernel is torch's, too."""
    counts, key_counts = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max_q, max_k) == (max(counts), max(key_counts)) and type(max_q) is type(max_k) is int
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) and all(
        x.is_contiguous() for x in (query, key, value)
    )
    rows = torch.arange(len(key)).split(key_counts)
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    return by_hand(*heads_first, counts, rows, causal, scale)[0]


def old_torch(query, key, *rest, scale, window_size):
    """torch 2.11's varlen_attn, which has no grouped heads."""
    assert query.shape[1] == key.shape[1]
    return as_documented(query, key, *rest, window_size == (-1, 0), scale)


def new_torch(query, key, *rest, scale, window_size, enable_gqa=False):
    """torch 2.12's, which refuses fewer key heads unless it is told."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return as_documented(query, key, *rest, window_size == (-1, 0), scale)


def flash_attn(query, key, *rest, softmax_scale, causal):
    return as_documented(query, key, *rest, causal, softmax_scale)


@attention_cases
@pytest.mark.parametrize("kernel", [old_torch, new_torch, flash_attn])
def test_variable_length_kernels_get_what_they_take(monkeypatch, kernel, lengths, key_rows, causal, kv_heads):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=kernel))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(backbone, "varlen_groups_heads", backbone.varlen_groups_heads.__wrapped__)  # not what is cached
    monkeypatch.setattr(backbone, "pick_attention", lambda kind, query: kind)
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(lengths), 8)
    key, value = torch.randn(2, 1, kv_heads, sum(lengths), 8).unbind(0)
    kind, options = "flash" if kernel is flash_attn else "varlen", attention_options(lengths, key_rows, causal)
    fast, slow = (backbone.packed_attention(None, query, key, value, kind=k, **options)[0] for k in (kind, "segments"))
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)


def test_a_packed_batch_gives_variable_length_kernels_what_they_take(sharp_model, sharp_chat, device, monkeypatch):
    batches = policy.pack(group(sharp_chat), sharp_chat, sharp_model, 10000)
    expected = policy.logprobs(sharp_model, batches, 1.0, device)[0]
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn))
    monkeypatch.setattr(backbone, "pick_attention", lambda kind, query: "flash")
    torch.testing.assert_close(policy.logprobs(sharp_model, batches, 1.0, device)[0], expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ steps


@both_families
@pytest.mark.parametrize("kind", ["tokens", "sequence"])
def test_a_step_does_not_depend_on_packing(sharp, sharp_chat, episodes, wide, device, kind):
    wide = replace(wide, max_grad_norm=0.5)  # clipping must see the whole gradient
    alone = None
    for budget, order in [(100000, range(6)), (130, range(6)), (200, [4, 2, 0, 5, 1, 3])]:
        model = policy.load_policy(sharp, sharp_chat, wide, device)
        cfg = replace(wide, max_tokens=100, max_prompt_tokens=90, max_tokens_per_batch=budget)
        sums, grads = step(model, [episodes[i] for i in order], sharp_chat, cfg, device, kind, order)
        weights = dict(policy.full_weights(model))
        assert sums["tokens"] == sum(sum(e.sampled) for e in episodes)
        assert sums["count"] == {"tokens": sums["tokens"], "sequence": 5}[kind]  # one has nothing sampled
        if alone is None:
            alone = sums, grads, weights
        assert sums["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-5) and sums["grad_norm"] > 0.5
        assert torch.nn.utils.get_total_norm(grads.values()).item() == pytest.approx(0.5, rel=1e-4)
        assert_same(grads, alone[1])
        assert_same(weights, alone[2])


def test_masked_tokens_cannot_move_the_loss(sharp_model, sharp_chat, wide, device):
    """A tool's turn is no target, and behind the last sampled token nothing is a cause either."""
    episode = conversation(sharp_chat, 1, turns=((4, ("small",)), (3, ())))
    assert episode.add_result(Call("text_search"), Result("ok", (Hit("a page", text="about it"),)))
    sums, grads = step(sharp_model, [episode], sharp_chat, wide, device, lr=0.0)
    for offset, sampled in enumerate(episode.sampled):
        if not sampled:
            episode.logprobs[offset] = float("nan")
            if offset > episode.turns[-1].end:
                episode.tokens[offset] = 300 + offset
    again, grads_again = step(sharp_model, [episode], sharp_chat, wide, device, lr=0.0)
    assert again == pytest.approx(sums, rel=1e-6) and sums["tokens"] == 7
    assert_same(grads_again, grads)


def test_a_frozen_vision_tower_stays_as_it_is(sharp, sharp_chat, sharp_model, episodes, wide, device):
    frozen = policy.load_policy(sharp, sharp_chat, replace(wide, freeze_vision=True), device)
    before = {name: value.clone() for name, value in policy.full_weights(frozen)}
    wide = replace(wide, max_grad_norm=1e9)
    _, grads = step(frozen, episodes, sharp_chat, wide, device)
    _, all_grads = step(sharp_model, episodes, sharp_chat, wide, device)
    after = dict(policy.full_weights(frozen))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(grads) == {name for name in before if "visual" not in name}
    assert_same(grads, {name: all_grads[name] for name in grads})


@both_families
def test_gradient_checkpointing_changes_nothing_but_memory(sharp, sharp_chat, sharp_model, episodes, wide, device):
    saving = policy.load_policy(sharp, sharp_chat, replace(wide, gradient_checkpointing=True), device)
    runs = []
    saving.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append("text"))
    saving.model.visual.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append("vision"))
    _, grads = step(saving, episodes[:2], sharp_chat, wide, device)
    assert sorted(runs) == ["text", "text", "vision", "vision"]  # once forward, once again in backward
    assert_same(grads, step(sharp_model, episodes[:2], sharp_chat, wide, device)[1])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_step(sharp_model, sharp_chat, episodes, wide, device, what):
    optimizer = torch.optim.AdamW(sharp_model.parameters(), 1e-3)
    batches = policy.pack(episodes, sharp_chat, sharp_model, 130, ADVANTAGES)
    good = reinforce("tokens")
    policy.update(sharp_model, optimizer, batches, good, wide, device)
    before = [p.clone() for p in sharp_model.parameters()]
    state = [value.clone() for s in optimizer.state.values() for value in s.values()]

    def broken(batch, logp, entropy):
        loss, count, stats = good(batch, logp, entropy)
        if batch.episodes == batches[1].episodes:  # a gradient of 0 * inf
            loss = loss * float("nan") if what == "loss" else loss + (logp - logp.detach()).abs().sqrt().sum()
        return loss, count, stats

    with pytest.raises(policy.NonFinite, match="gradient norm nan") as caught:
        policy.update(sharp_model, optimizer, batches, broken, wide, device)
    suspects = [e.name for e in (batches[1].episodes if what == "loss" else episodes)]  # a gradient is everybody's
    assert str(caught.value).endswith(f", gradient norm nan ({', '.join(suspects)})")
    assert all(torch.equal(p, b) for p, b in zip(sharp_model.parameters(), before, strict=True))
    assert all(map(torch.equal, [v for s in optimizer.state.values() for v in s.values()], state))
    assert all(p.grad is None for p in sharp_model.parameters())


def test_a_step_without_conversations_changes_nothing(sharp_model, sharp_chat, episodes, wide, device):
    """All were aborted: even the momentum of earlier steps must not move the weights."""
    optimizer = torch.optim.AdamW(sharp_model.parameters(), 1e-2)
    batches = policy.pack(episodes, sharp_chat, sharp_model, 1000, ADVANTAGES)
    policy.update(sharp_model, optimizer, batches, reinforce("tokens"), wide, device)
    before = [p.clone() for p in sharp_model.parameters()]
    batches = policy.equal_counts(policy.pack([], sharp_chat, sharp_model, 1000), sharp_chat, sharp_model)
    assert len(batches) == 1
    sums = policy.update(sharp_model, optimizer, batches, reinforce("tokens"), wide, device)
    assert sums == {"loss": 0.0, "count": 0.0, "tokens": 0.0, "grad_norm": 0.0}
    assert all(torch.equal(p, b) for p, b in zip(sharp_model.parameters(), before, strict=True))


@both_families
def test_bf16_with_fp32_masters(sharp, sharp_chat, sharp_model, episodes, wide, device, monkeypatch):
    half = policy.load_policy(sharp, sharp_chat, replace(wide, dtype="bf16"), device)
    cosines = []
    half.model.visual.blocks[0].attn.register_forward_pre_hook(
        lambda _, __, kwargs: cosines.append(kwargs["position_embeddings"][0].dtype), with_kwargs=True
    )
    batches = policy.pack(episodes, sharp_chat, half, 130)
    logps = policy.logprobs(half, batches, 1.0, device)
    assert set(cosines) == {torch.float32}
    # between forward and backward, FSDP lets parameters() show bf16 copies: what is handed on must be the masters
    masters = {name: value.clone() for name, value in policy.full_weights(half)}
    gather, gathered = DTensor.full_tensor, []
    monkeypatch.setattr(DTensor, "full_tensor", lambda shard: gathered.append(shard.dtype) or gather(shard))
    sent = dict(policy.full_weights(half, torch.bfloat16))
    assert set(gathered) == {torch.bfloat16} and all(torch.equal(v, masters[n].bfloat16()) for n, v in sent.items())
    assert_same(masters, dict(sharp_model.named_parameters()), 1e-12)
    exact = policy.logprobs(sharp_model, batches, 1.0, device)
    gap = (torch.cat(logps) - torch.cat(exact)).abs()
    assert 1e-4 < gap.mean() < 0.1 and all(logp.dtype == torch.float32 for logp in logps)
    sums, grads = step(half, episodes, sharp_chat, wide, device, lr=1e-6)  # steps that bf16 would swallow
    after = dict(policy.full_weights(half))
    assert {g.dtype for g in grads.values()} == {v.dtype for v in after.values()} == {torch.float32}
    moved = [n for n in after if not torch.equal(after[n], masters[n])]
    assert len(moved) > len(after) // 2
    assert sums["grad_norm"] == pytest.approx(
        step(sharp_model, episodes, sharp_chat, wide, device)[0]["grad_norm"], rel=0.1
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_reference_is_the_policy_s_copy_and_not_read_again(sharp, sharp_chat, episodes, wide, device, dtype):
    cfg = replace(wide, dtype=dtype)
    first = policy.load_policy(sharp, sharp_chat, cfg, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", None)
        reference = policy.load_policy(sharp, sharp_chat, cfg, device, trainable=False, like=first)
    batches = policy.pack(episodes, sharp_chat, first, 1000)
    before = policy.logprobs(reference, batches, 1.0, device)
    assert all(map(torch.equal, before, policy.logprobs(first, batches, 1.0, device)))
    step(first, episodes, sharp_chat, cfg, device, lr=1e-2)
    assert all(map(torch.equal, before, policy.logprobs(reference, batches, 1.0, device)))  # it is a copy


def test_ranks_get_equally_many_batches(chat, model, device, monkeypatch):
    monkeypatch.setattr(policy, "all_gather", lambda items: [*items, 3])
    batch = policy.pack_batch([], [], [], chat, model)
    batches = policy.equal_counts([batch], chat, model)
    assert len(batches) == 3 and batches[0] is batch
    assert all(len(b.target) == 0 and b.episodes == [] for b in batches[1:])


# ------------------------------------------------------------------------------------------------------ checkpoints


def train_once(model, optimizer, chat, cfg, device):
    batches = policy.pack(some_episodes(chat)[:2], chat, model, cfg.max_tokens_per_batch, ADVANTAGES[:2])
    policy.update(model, optimizer, batches, reinforce("tokens"), cfg, device)


def everything(model, optimizer):
    return [p.detach().clone() for p in model.parameters()] + [
        v.clone() for p in model.parameters() if p in optimizer.state for _, v in sorted(optimizer.state[p].items())
    ]


def same_bits(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("changes", [{}, {"freeze_vision": True}, {"dtype": "bf16"}], ids=str)
def test_a_checkpoint_goes_on_to_the_bit(folder, wide, device, tmp_path, changes):
    wide = replace(wide, **changes)
    chat = Chat(folder, wide)
    runs = []
    for resumed in (False, True):
        model = policy.load_policy(folder, chat, wide, device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.1)
        if resumed:
            torch.manual_seed(99)
            state = checkpoint.load_state(tmp_path / "step-000001", model, optimizer)
            assert state["step"] == 1 and state["best"] == {"accuracy": 0.5}
        else:
            train_once(model, optimizer, chat, wide, device)
            torch.manual_seed(7)
            checkpoint.save_state(tmp_path / "step-000001", model, optimizer, {"step": 1, "best": {"accuracy": 0.5}})
        noise = torch.rand(5)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3
        train_once(model, optimizer, chat, wide, device)
        runs.append([*everything(model, optimizer), noise])
    assert same_bits(*runs)
    assert len(runs[0]) > 2 * len(list(model.parameters()))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.fixture
def saved(model, tmp_path):
    """(model, its optimiser, the path of a checkpoint of them)"""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.save_state(tmp_path / "saved", model, optimizer, {"step": 1})
    return model, optimizer, tmp_path / "saved"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("moment", ["save", "dumps", "replace", "second replace", "rmtree"])
def test_a_kill_leaves_no_half_checkpoint(saved, tmp_path, monkeypatch, moment, old):
    import torch.distributed.checkpoint as dcp

    model, optimizer, path = saved
    path = path if old else tmp_path / "new"
    calls = []

    def kill(*args, **_):
        calls.append(args)
        if moment == "second replace" and len(calls) == 1:
            return os.rename(*args)
        if moment == "rmtree":  # in the middle of it
            if not Path(args[0]).exists():
                return
            (Path(args[0]) / "__0_0.distcp").unlink()
        raise Killed

    where = {"save": dcp, "dumps": json, "rmtree": shutil}.get(moment, os)
    with monkeypatch.context() as patch:
        patch.setattr(where, moment.split()[-1], kill)
        try:
            checkpoint.save_state(path, model, optimizer, {"step": 2})
        except Killed:
            pass
    assert calls
    if path.exists():
        assert checkpoint.load_state(path, model, optimizer)["step"] in ((1, 2) if old else (2,))
    checkpoint.save_state(path, model, optimizer, {"step": 3})  # what was left behind is in nobody's way
    assert checkpoint.load_state(path, model, optimizer)["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "saved") == ([] if old else ["new"])


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '"x"', '{"step": 1}', b"\xff"], ids=repr)
def test_what_is_no_checkpoint_is_refused(model, tmp_path, content):
    path = tmp_path / "step-000001"
    path.mkdir()
    if content is not None:
        (path / "state.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="not a checkpoint") as error:
        checkpoint.load_state(path, model, torch.optim.AdamW(model.parameters()))
    assert str(path) in str(error.value) and one_line(error)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "folder", *range(8)])
def test_a_damaged_checkpoint_is_refused(saved, name, damage, capfd):
    """Numbers: one bit is flipped, somewhere."""
    model, optimizer, path = saved
    file, content = path / name, bytearray((path / name).read_bytes())
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "longer":
        file.write_bytes(content + b"{}")
    elif damage != "missing":
        content[random.Random(damage).randrange(len(content))] ^= 1 << damage
        file.write_bytes(content)
    before = everything(model, optimizer)
    with pytest.raises(InputError, match="not a (whole )?checkpoint") as error:
        checkpoint.load_state(path, model, optimizer)
    assert str(path) in str(error.value) and one_line(error)
    assert same_bits(before, everything(model, optimizer)) and capfd.readouterr().err == ""


@pytest.mark.parametrize("known", [True, False], ids=["known before", "found out while writing"])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(saved, tmp_path, monkeypatch, known):
    model, optimizer, path = saved
    before = everything(model, optimizer)
    with monkeypatch.context() as patch:
        if known:
            usage = SimpleNamespace(free=10_000)
            patch.setattr(shutil, "disk_usage", lambda _: usage)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if known else 50_000, limits[1]))
        try:
            with pytest.raises(InputError, match="10,000 are free" if known else "cannot write [0-9,]+ bytes") as error:
                checkpoint.save_state(path, model, optimizer, {"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    size = sum(file.stat().st_size for file in path.glob("*.distcp"))
    said = int(re.search(r"([0-9,]{6,}) bytes", str(error.value))[1].replace(",", ""))
    assert str(path) in str(error.value) and one_line(error) and 0.9 < said / size < 1.1
    assert checkpoint.load_state(path, model, optimizer)["step"] == 1
    assert same_bits(before, everything(model, optimizer))


def test_a_checkpoint_of_another_model_is_refused(saved, sharp_model):
    with pytest.raises(InputError, match="another model") as error:
        checkpoint.load_state(saved[2], sharp_model, torch.optim.AdamW(sharp_model.parameters()))
    assert one_line(error)


# ----------------------------------------------------------------------------------------------- folders, of all kinds


@both_families
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_a_plain_folder(request, folder, wide, device, tmp_path, tied):
    """Hub names, no trace of this code, and the same log-probs in transformers."""
    folder = folder if tied else request.getfixturevalue("sharp")
    chat = Chat(folder, wide)
    model = policy.load_policy(folder, chat, wide, device)
    episodes = some_episodes(chat)
    step(model, episodes, chat, wide, device, lr=0.1)
    ends = model.generation_config.eos_token_id = [chat.im_end, 0]  # as Qwen's file says; its configuration has one
    for _ in range(2):  # over an earlier one too
        checkpoint.export_hf(tmp_path / "best", model, chat)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]

    from safetensors.torch import load_file

    assert json.loads((tmp_path / "best" / "generation_config.json").read_text())["eos_token_id"] == ends
    keys = set(load_file(tmp_path / "best" / "model.safetensors"))
    assert keys == set(load_file(folder / "model.safetensors"))
    text, vision = ("model.language_model", "model.visual") if "deepstack" in str(model.config) else ("model", "visual")
    assert {f"{text}.embed_tokens.weight", f"{text}.norm.weight", f"{vision}.patch_embed.proj.weight"} <= keys
    assert tied == ("lm_head.weight" not in keys)
    texts = [(tmp_path / "best" / name).read_text() for name in ("config.json", "generation_config.json")]
    assert not any(word in text for text in texts for word in (backbone.ATTENTION, "flash", "attn_implementation"))
    assert json.loads(texts[0])["use_cache"] and json.loads(texts[0])["model_type"] == model.config.model_type

    exported, again = Plain(tmp_path / "best", wide), Chat(tmp_path / "best", wide)
    assert again.tokenizer.get_vocab() == chat.tokenizer.get_vocab()
    assert some_episodes(again)[3].tokens == episodes[3].tokens
    batches = policy.pack(episodes, chat, model, 100000)
    with torch.no_grad():
        separate = torch.cat([exported.sampled_logp(e) for e in episodes])
    torch.testing.assert_close(policy.logprobs(model, batches, 1.0, device)[0], separate, atol=1e-5, rtol=1e-5)


def test_an_export_in_bf16_says_so(model, chat, tmp_path):
    checkpoint.export_hf(tmp_path / "half", model, chat, dtype=torch.bfloat16)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path / "half", dtype="auto")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())


UNKNOWN = ["llama", "qwen3_vl_moe", "qwen3_5"]


def broken_folder(path, kind):
    if kind == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif kind == "absent":
        shutil.rmtree(path)
    elif kind in UNKNOWN:
        (path / "config.json").write_text(json.dumps({"model_type": kind}))
    elif kind == "not json":
        (path / "config.json").write_text("{")
    elif kind == "wrong type":
        config = json.loads((path / "config.json").read_text())
        config["text_config"]["hidden_size"] = "many"
        (path / "config.json").write_text(json.dumps(config))
    elif kind == "broken":
        (path / "model.safetensors").write_bytes(b"x" * 1000)
    elif kind == "cut":
        os.truncate(path / "model.safetensors", 200000)
    elif kind == "no weights":
        (path / "model.safetensors").unlink()
    else:
        from safetensors.torch import load_file, save_file

        weights = load_file(path / "model.safetensors")
        if kind == "one missing":
            del weights["visual.patch_embed.proj.weight"]
        elif "head" in kind:  # the config ties it to the embeddings
            (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
            weights["lm_head.weight"] = weights[name] + (kind == "another head")
            if kind == "only the head":
                del weights[name]
        else:
            weights["visual.merger.mlp.2.bias"] = torch.zeros(3)
        save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "kind",
    "empty,absent,not json,wrong type,broken,cut,no weights,one missing,other shape,another head".split(",") + UNKNOWN,
)
def test_a_broken_model_folder_is_refused_in_one_line(folder, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    broken_folder(path, kind)
    with pytest.raises(InputError) as error:
        backbone.read_model(path)
    assert str(path) in str(error.value) and one_line(error)
    expected = f"unsupported architecture '{kind}', expected one of qwen2_5_vl, qwen3_vl"
    assert kind not in UNKNOWN or expected in str(error.value)
    assert kind != "another head" or "remove lm_head.weight" in str(error.value)


@pytest.mark.parametrize("kind", ["the head again", "only the head"])
def test_a_tied_head_is_tied_whatever_the_file_calls_it(folder, tmp_path, kind):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    broken_folder(path, kind)
    model = backbone.read_model(path)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert [n for n, _ in model.named_parameters()] == backbone.parameter_names(backbone.read_config(path))


def test_an_image_processor_of_another_family_is_refused(folder, chat, cfg):
    chat.sizes = [16, 2, 2]
    with pytest.raises(InputError, match=r"the image processor's sizes are \[16, 2, 2\], the model's \[14, 2, 2\]"):
        policy.prepare(backbone.read_model(folder, empty=True), chat, cfg)


def test_a_tokenizer_larger_than_the_model_is_refused(folder, chat, cfg):
    model = backbone.read_model(folder)
    model.config.text_config.vocab_size = len(chat.tokenizer) - 1
    with pytest.raises(InputError, match="tokenizer has"):
        policy.prepare(model, chat, cfg)


def test_another_package_s_flash_attn_folder_is_not_flash_attn(tmp_path, monkeypatch):
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("flash_attn") and not backbone.has_flash_attn.__wrapped__()


def test_flash_attention_that_is_not_there_is_refused(folder, chat, cfg, monkeypatch):
    monkeypatch.setattr(backbone, "has_flash_attn", lambda: False)
    with pytest.raises(InputError, match="flash-attn is not installed"):
        policy.prepare(backbone.read_model(folder, empty=True), chat, replace(cfg, attention="flash"))


@pytest.mark.parametrize(
    "version, good",
    [("5.2.9", True), ("5.3.0", False), ("5.4.1", False), ("5.5.3", False), ("5.5.4", True), ("5.19.0", True)],
)
def test_versions_with_wrong_positions_are_refused(folder, monkeypatch, version, good):
    monkeypatch.setattr("transformers.__version__", version)
    if good:
        return backbone.check_versions()
    with pytest.raises(InputError, match="M-RoPE"):
        backbone.read_model(folder)


# --------------------------------------------------------------------------------------------------- two processes

# (name, settings, the numbers of the episodes of each rank)
SCENARIOS = [
    ("sharded", {}, ([0, 1, 2, 4, 5], [3])),
    ("one idle", {"loss_norm": "sequence"}, ([0, 1, 2, 3, 4, 5], [])),
    ("hsdp", {"shard_size": 1}, ([1, 2], [0, 3, 4, 5])),
    ("qwen3-vl", {}, ([0, 1, 3, 4, 5], [2])),  # the second has no picture
    ("frozen", {"freeze_vision": True, "gradient_checkpointing": True}, ([2], [0, 1, 3, 4, 5])),
    ("adapters", {"lora_rank": 1}, ([0, 1, 2, 4, 5], [3])),  # one of two shards of A is empty
    ("decoder's", {"lora_rank": 4, "freeze_vision": True, "shard_size": 1}, ([0, 1, 2, 3, 4, 5], [])),
]


def world_cfg(**changes):
    """max_tokens_per_batch: so small that the ranks have unequal numbers of batches."""
    cfg = wide_range(config.Config(threads=1, max_grad_norm=0.5))
    return replace(cfg, max_tokens=130, max_tokens_per_batch=130, **changes)


def run_scenario(folder, settings, mine, device):
    """One update with this rank's episodes: all that must not depend on the number of ranks."""
    cfg = world_cfg(**settings)
    chat = Chat(folder, replace(cfg, max_tokens=400, max_tokens_per_batch=1000))
    model = policy.load_policy(folder, chat, cfg, device)
    chosen = [some_episodes(chat)[i] for i in mine]
    if cfg.lora_rank:  # before it, A has no gradient
        step(model, chosen, chat, cfg, device, cfg.loss_norm, mine, lr=0.1)
    sums, grads = step(model, chosen, chat, cfg, device, cfg.loss_norm, mine)
    batches = policy.equal_counts(policy.pack(chosen, chat, model, 130), chat, model)
    policy.logprobs(model, batches, 1.0, device)  # leaves nothing behind that full_weights would trip over
    return {"sums": sums, "grads": grads, "weights": dict(policy.full_weights(model))}


def worker(folder, out):
    """One rank: the scenarios, a step with a NaN on rank 1, and a checkpoint."""
    rank = int(os.environ["RANK"])
    device = policy.init_distributed(config.Config(threads=1))
    folders = {"qwen3-vl": out / "qwen3-vl"}
    results = {
        name: run_scenario(folders.get(name, folder), settings, ranks[rank], device)
        for name, settings, ranks in SCENARIOS
    }

    cfg = replace(world_cfg(), max_tokens=400, max_tokens_per_batch=1000)
    chat = Chat(folder, cfg)
    model = policy.load_policy(folder, chat, cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batches = policy.pack(some_episodes(chat)[rank::2], chat, model, 1000, ADVANTAGES[rank::2])
    good = reinforce("tokens")
    policy.update(model, optimizer, batches, good, cfg, device)

    def broken(batch, logp, entropy):
        loss, count, stats = good(batch, logp, entropy)
        return loss + (float("nan") if rank else 0.0), count, stats  # the gradient is finite on both

    try:
        policy.update(model, optimizer, batches, broken, cfg, device)
    except policy.NonFinite as error:
        results["nan"] = [None, None]
        dist.all_gather_object(results["nan"], str(error))
    checkpoint.save_state(out / "checkpoint", model, optimizer, {"step": 1})
    checkpoint.export_hf(out / "export", model, chat)
    results["final"] = dict(policy.full_weights(model))
    reference = policy.load_policy(folder, chat, cfg, device, trainable=False, like=model)
    results["reference"] = dict(policy.full_weights(reference))
    results["moments"] = [optimizer.state[p]["exp_avg"].full_tensor() for p in model.parameters()]
    adapted = policy.load_policy(folder, chat, replace(cfg, lora_rank=1), device)
    optimizer = policy.adamw(adapted, cfg, device)
    policy.update(adapted, optimizer, batches, good, cfg, device)
    checkpoint.save_state(out / "adapters", adapted, optimizer, {"step": 1})
    results["merged"] = dict(policy.full_weights(adapted))
    if rank == 0:
        torch.save(results, out / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    """What two processes made of it; see `worker`."""
    out = tmp_path_factory.mktemp("ranks")
    toy_model.save_random_model(out / "qwen3-vl", 0, backbone="qwen3_vl")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(out)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-3000:]
    return torch.load(out / "results.pt"), out


@pytest.mark.parametrize("name, settings, ranks", SCENARIOS, ids=[s[0] for s in SCENARIOS])
def test_two_ranks_are_one(two_ranks, folder, device, name, settings, ranks):
    folder = two_ranks[1] / "qwen3-vl" if name == "qwen3-vl" else folder
    alone = run_scenario(folder, {**settings, "shard_size": 0}, [i for mine in ranks for i in mine], device)
    together = two_ranks[0][name]
    assert together["sums"] == pytest.approx(alone["sums"], rel=1e-5) and alone["sums"]["grad_norm"] > 0.5
    assert_same(together["grads"], alone["grads"])
    assert_same(together["weights"], alone["weights"])


def test_a_nan_on_one_rank_stops_all(two_ranks):
    suspects = ", ".join(f"q{n} of step 0, sample 0" for n in (1, 3, 5))
    assert all(said.endswith(f" ({suspects})") for said in two_ranks[0]["nan"])  # both know whose it was


def test_a_checkpoint_of_two_ranks_loads_on_one(two_ranks, model):
    results, out = two_ranks
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    assert checkpoint.load_state(out / "checkpoint", model, optimizer)["step"] == 1
    assert all(torch.equal(value, results["final"][name]) for name, value in policy.full_weights(model))
    assert same_bits([optimizer.state[p]["exp_avg"] for p in model.parameters()], results["moments"])
    assert all(torch.equal(value, results["final"][name]) for name, value in results["reference"].items())
    exported = backbone.read_model(out / "export")
    assert all(torch.equal(value, results["final"][name]) for name, value in exported.named_parameters())


def test_adapters_of_two_ranks_load_on_one(two_ranks, folder, chat, cfg, device):
    (results, out), cfg = two_ranks, replace(cfg, lora_rank=1)
    model = policy.load_policy(folder, chat, cfg, device)
    optimizer = policy.adamw(model, cfg, device)
    assert checkpoint.load_state(out / "adapters", model, optimizer)["step"] == 1
    assert all(torch.equal(value, results["merged"][name]) for name, value in policy.full_weights(model))
    assert len(optimizer.state) == 2 * len(policy.adapted_layers(model))
    q = "model.language_model.layers.0.self_attn.q_proj"
    assert not torch.equal(results["merged"][f"{q}.weight"], model.get_submodule(q).weight)  # they have learned


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
