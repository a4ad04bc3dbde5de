"""Shared fixtures: a tiny random model in a folder, pictures, and a toy world built in a few steps."""

import dataclasses
import io
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import policy
import toy
from chat import Chat
from data import Question
from toy import build as toy_build
from toy import model as toy_model
from toy.lessons import ScriptedEngine

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent
SHORT_WORLD = ["--toy_pretrain_steps=3", "--toy_teach_steps=2", "--toy_warmup_steps=8"]
SHORT_RUN = [
    "--prompts_per_step=3", "--samples_per_prompt=3", "--max_tokens_per_turn=12", "--val_limit=3", "--eval_every=2",
    "--save_every=1", "--keep_last=2", "--threads=1", "--max_turns=2",
    "--entropy_coef=0.01",  # a model that can do nothing earns nothing: without it nothing would be learned
]  # fmt: skip


@pytest.fixture(scope="session")
def device():
    """The process group of one rank, as train.py makes it."""
    return policy.init_distributed(config.Config(threads=1))


both_families = pytest.mark.parametrize("folder", ["qwen2.5-vl", "qwen3-vl"], indirect=True)


@pytest.fixture(scope="session")
def folder(request, tmp_path_factory):
    """A random Qwen2.5-VL of the toy's size, with tokenizer and image processor; in tests of `both_families` also a
    Qwen3-VL."""
    path = tmp_path_factory.mktemp("model")
    if getattr(request, "param", "") == "qwen3-vl":
        toy_model.save_random_model(path, seed=0, backbone="qwen3_vl")
    else:
        toy_model.save_random_model(path, seed=0)
    return path


@pytest.fixture
def cfg():
    """The toy configuration without its entropy bonus; `dataclasses.replace(cfg, ...)` changes it."""
    return config.Config(threads=1, entropy_coef=0.0)


@pytest.fixture
def chat(folder, cfg):
    return Chat(folder, cfg)


@pytest.fixture
def model(folder, chat, cfg, device):
    """The random model, prepared as the trainer uses it (one process: not sharded)."""
    torch.manual_seed(0)
    return policy.load_policy(folder, chat, cfg, device)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world whose model has hardly learned anything (for all but the learning itself), and a run's options."""
    argv = [*SHORT_WORLD, "--threads=1", f"--toy_dir={tmp_path_factory.mktemp('toy')}"]
    cfg, recipe = config.parse(argv, config.Config, toy.Recipe)
    device = policy.init_distributed(cfg)
    assert device.type == "cpu" or torch.cuda.is_available()
    return toy_build.build(toy.locate(recipe).folder, cfg, recipe), cfg, recipe


def picture(seed: int, width: int = 60, height: int = 50, format: str = "PNG") -> bytes:
    """A picture of smooth noise, encoded."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, format)
    return file.getvalue()


def question(seed: int = 0, text: str = "what is it called?", images: int = 1, answer: str = "bako") -> Question:
    """A question about `images` different pictures."""
    pictures = tuple(picture(100 * seed + i) for i in range(images))
    return Question(id=f"q{seed}", text=text, images=pictures, answers=(answer,))


def replace(cfg, **changes):
    return dataclasses.replace(cfg, **changes)


def on_two_ranks(worker, folder, tmp_path) -> list[tuple]:
    """worker(rank, path of a store, model folder, queue) in two processes; what each put into the queue, by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "store"), str(folder), results)
    ranks = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    parts = sorted(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return parts


def guesser(chat, questions):
    """An engine for toy questions that, by the throw of a die, searches or not and is right or not; the more it has
    found the oftener right. It does what it is told where no search is offered."""
    asked = {chat.picture(q.images[0]).key: q for q in questions}

    def script(prompt, images, sampling):
        q, found = asked[images[0].key], prompt.count("<information>")
        die = random.Random(f"{images[0].key} {sampling.seed}")
        if found < 2 and die.random() < 0.5 and "think, answer." not in prompt:
            action = f"<text_search> {q.answers[0]}</text_search>" if found else "<search><img></search>"
            return f"<reason> hm.</reason>{action}"
        answer = q.answers[0] if die.random() < 0.3 + 0.3 * found else "unknown"
        return f"<reason> well.</reason><answer> {answer}</answer>"

    return ScriptedEngine(chat, script)
