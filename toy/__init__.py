"""The embedded default: a tiny world built from nothing, in which a model can learn on a laptop when to search.

Its 1,225 things are coloured shapes with a pattern on a coloured ground; each has a name and three facts (founder,
city, river). 24 are *known*: the base model is taught their names and facts. Of 941 others it is taught to say
`unknown`. 200 that it has never seen appear in training questions, another 60 only in validation questions. All are
asked about in the same words, so only recognising the picture, or not, tells whether a question needs a search:

    known name      what is it called?     answer at once
    known fact      who founded it?        answer at once
    unknown name    what is it called?     image search
    unknown fact    who founded it?        image search for the name, text search for the fact

The world of the preset `toy-crop`, where a picture may show four things, is in docs/toy.md.

`python -m toy` builds the world and prints its folder; train.py and eval.py do this by themselves. It holds questions,
a search index and two models: `base` sees and copies, knows the known things and says `unknown` of others; `model` has
also seen conversations of a scripted, sloppy policy whose searching has nothing to do with need.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from chat import agent_prompts
from config import PRESETS, Config, Options, as_dict, from_dict, need, option

ROOT = Path(__file__).parent.parent
VERSION = 7  # of the procedure: raise it when a change of the code makes another world
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Recipe(Options):
    """The toy world. All but toy_dir say which world it is, and so name its folder."""

    toy_dir: str = option("runs/toy-world", "where toy worlds are built and kept", marks="resume neutral")
    toy_seed: int = option(0, "seed of the world: names, facts, pictures, which things are known", "at least 0")
    toy_pretrain_steps: int = option(240, "steps that teach the toy model to see and to copy", "above 0")
    toy_teach_steps: int = option(120, "steps that teach it the known things", "above 0")
    toy_warmup_steps: int = option(240, "steps of supervised warm-up on scripted conversations", "above 0")
    toy_named: int = option(0, "things of which it is taught the name alone: a fifth kind of question", "at least 0")
    toy_crop: bool = option(False, "the world of the preset toy-crop: several things in a picture")
    toy_json: bool = option(False, "the world of the preset toy-json: the model calls tools in JSON")
    toy_backbone: str = option("qwen2_5_vl", "the family of the toy model", ("qwen2_5_vl", "qwen3_vl"))
    toy_beliefs: bool = option(True, "the scripted policy says what it believes before it acts")

    def __post_init__(self):
        super().__post_init__()
        need(self.toy_named <= 48, f"toy_named={self.toy_named}: at most 48, or too few things are left to be unknown")
        need(not (self.toy_named and self.toy_crop), "toy_named and toy_crop exclude each other")
        need(not (self.toy_json and self.toy_crop), "toy_json and toy_crop exclude each other")

    @property
    def preset(self) -> str:
        """The preset of the runs in it."""
        if self.toy_crop or self.toy_json:
            return "toy-crop" if self.toy_crop else "toy-json"
        return "toy-qwen3" if self.toy_backbone == "qwen3_vl" else "toy"


@dataclass(frozen=True)
class Toy:
    """Where the parts of a built world are."""

    folder: Path

    model = property(lambda self: self.folder / "model")
    base = property(lambda self: self.folder / "base")
    train = property(lambda self: self.folder / "world" / "train.parquet")
    val = property(lambda self: self.folder / "world" / "val.parquet")
    index = property(lambda self: self.folder / "world" / "search.sqlite")


def locate(recipe: Recipe) -> Toy:
    """The folder of the recipe's world, built or not: named by VERSION, the options and the prompts that make it."""
    options = as_dict(recipe)
    folder = Path(options.pop("toy_dir"))
    cfg = from_dict(Config, PRESETS[recipe.preset])
    prompts = [(ROOT / cfg.prompts / f"{name}.txt").read_text(encoding="utf-8") for name in sorted(agent_prompts(cfg))]
    content = json.dumps([VERSION, options, prompts])
    return Toy(folder / hashlib.sha256(content.encode()).hexdigest()[:10])


def ensure(recipe: Recipe, cfg: Config) -> Toy:
    """The recipe's world. If it is not there, rank 0 builds it in a process outside torchrun's group while the other
    ranks wait; all ranks must call this. Exits as that process does if it fails."""
    import torch.distributed as dist

    toy = locate(recipe)
    if dist.get_rank() == 0 and not toy.model.exists():
        print(f"building the toy world in {toy.folder} (once; a few minutes)", file=sys.stderr)
        environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        options = {**as_dict(recipe), "threads": cfg.threads, "device": cfg.device}
        command = [sys.executable, "-m", "toy", *(f"--{name}={value}" for name, value in options.items())]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
    dist.barrier()
    return toy


def answers_searches(cfg: Config) -> bool:
    """Whether searches are answered by the toy world's index: offline ones where the user gave no index. Raises
    InputError for another preset, which has to name one."""
    if cfg.search != "offline" or cfg.search_index:
        return False
    what = f"preset {cfg.preset} needs --search_index (`python -m search index` builds one), or another --search"
    need("model" not in PRESETS[cfg.preset], what)
    return True


def question_files(cfg: Config, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files of training and validation questions: the user's, or the toy world's without training files."""
    if cfg.train_files:
        return cfg.train_files, cfg.val_files
    world = locate(recipe)
    return (str(world.train),), cfg.val_files or (str(world.val),)
