"""The embedded default: a tiny world built from nothing, in which knowing when to search can be learned on a laptop.

The world has 1,225 things. A thing is a coloured shape with a pattern on a coloured ground, has a name and three facts
(founder, city, river). 24 of them are *known*: the base model is taught their names and facts; of 941 others it is
taught to say `unknown`. 200 that it has never seen appear in training questions, another 60 only in validation
questions. Everybody is asked about in the same words, so whether a question needs a search can only be told by
recognising the picture or not:

    known name      what is it called?     answer at once
    known fact      who founded it?        answer at once
    unknown name    what is it called?     image search
    unknown fact    who founded it?        image search for the name, text search for the fact

`build` leaves a folder with the tokenizer, questions (veRL parquet), a search index, and a model in three stages:
`base` sees and copies, knows the known things and says `unknown` of others; `model` has also seen conversations of a
scripted, sloppy policy whose searching has nothing to do with need. From there, `train.py` is on its own.

    python toy.py            # builds the world of the preset; train.py does this by itself
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from chat import PROMPT_FILES
from config import Config

ROOT = Path(__file__).parent.parent
VERSION = 1  # of the recipe: rises when a change here makes another world
KNOBS = "toy_seed toy_pretrain_steps toy_teach_steps toy_warmup_steps toy_named toy_beliefs".split()  # make a world


@dataclass(frozen=True)
class Toy:
    """Where the parts of a built world are."""

    folder: Path

    model = property(lambda self: self.folder / "model")
    base = property(lambda self: self.folder / "base")
    train = property(lambda self: self.folder / "world" / "train.parquet")
    val = property(lambda self: self.folder / "world" / "val.parquet")
    index = property(lambda self: self.folder / "world" / "search.sqlite")


def locate(cfg: Config) -> Toy:
    """The folder of the world that this configuration and this version of the file describe."""
    knobs = [getattr(cfg, name) for name in KNOBS]
    folder = ROOT / "prompts" / "toy"
    prompts = [(folder / f"{name}.txt").read_text() for name in sorted(PROMPT_FILES)]  # those the world is made with
    recipe = json.dumps([VERSION, knobs, prompts])
    return Toy(Path(cfg.toy_dir) / hashlib.sha256(recipe.encode()).hexdigest()[:10])


def ensure(cfg: Config) -> Toy:
    """The world of this configuration, built first if it is not there: by rank 0, in a process of its own, with all
    cores, while the other ranks wait."""
    toy = locate(cfg)
    if dist.get_rank() == 0 and not toy.model.exists():
        print(f"building the toy world in {toy.folder} (once; a few minutes)", file=sys.stderr)
        here = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
        alone = {**here, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        args = [f"--{name}={getattr(cfg, name)}" for name in (*KNOBS, "toy_dir", "threads", "device")]
        done = subprocess.run([sys.executable, "-m", "toy", *args], env=alone, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
    dist.barrier()
    return toy


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def question_files(cfg: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files of training and of validation questions: the user's, or the toy world's."""
    world = locate(cfg)
    train = cfg.train_files or (str(world.train),)
    return train, cfg.val_files or (() if cfg.train_files else (str(world.val),))
