"""Builds a toy world: questions and search index, then the base model, then the model that training starts from."""

import os
import random
import shutil
from pathlib import Path

from config import PRESETS, Config, InputError, from_dict, lock
from policy import init_distributed
from toy import Recipe, Toy
from toy.lessons import make_base, warm_up
from toy.world import Thing, make_things, write_world


def build(folder: str | Path, cfg: Config, recipe: Recipe, things: list[Thing] | None = None) -> Toy:
    """Build the recipe's world in `folder`. Stages that are there are skipped; 2 to 4 minutes on 2 cores.

    Of cfg only threads and device are taken: a world depends on its recipe alone, not on the options of a run. things:
    instead of the recipe's.
    """
    options = PRESETS[recipe.preset] | dict(threads=cfg.threads, device=cfg.device, dtype="fp32")
    toy, cfg = Toy(Path(folder)), from_dict(Config, options)
    device = init_distributed(cfg)
    things = things or make_things(random.Random(f"world {recipe.toy_seed}"), recipe.toy_named, recipe.toy_crop)
    stages = {
        toy.folder / "world": lambda path: write_world(path, things, recipe),
        toy.base: lambda path: make_base(path, things, recipe, cfg, device),
        toy.model: lambda path: warm_up(path, toy, things, recipe, cfg, device),
    }
    if not all(path.exists() for path in stages):  # a world that is there needs no lock, and may be read-only
        with lock(toy.folder):
            for path in (path for path in stages if not path.exists()):
                temporary = Path(f"{path}.building")  # what bears its own name is whole
                shutil.rmtree(temporary, ignore_errors=True)
                try:
                    temporary.mkdir(parents=True)
                    stages[path](temporary)
                    os.replace(temporary, path)
                except OSError as error:
                    raise InputError(f"{temporary}: cannot write ({error.strerror or error})") from None
    return toy
