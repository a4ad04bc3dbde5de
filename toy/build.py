"""toy/build.py"""

import os
import random
import shutil
from pathlib import Path

from config import Config, InputError
from policy import init_distributed
from toy import Toy
from toy.lessons import make_base, warm_up
from toy.world import make_things, write_world


def build(folder: str | Path, cfg: Config | None = None) -> Toy:
    """Build the world in `folder`: three stages, each written under a temporary name and renamed, each skipped if it is
    there. About 7 minutes on 2 slow cores."""
    toy, cfg = Toy(Path(folder)), cfg or Config()
    device = init_distributed(cfg)
    rng = random.Random(f"world {cfg.toy_seed}")
    things = make_things(rng, cfg.toy_named)
    _stage(toy.folder / "world", lambda path: write_world(path, things, cfg))
    _stage(toy.base, lambda path: make_base(path, toy, things, cfg, device))
    _stage(toy.model, lambda path: warm_up(path, toy, things, cfg, device))
    return toy


def _stage(path, make):
    if path.exists():
        return
    temporary = Path(f"{path}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{temporary}: cannot write ({error.strerror})") from None
    make(temporary)
    os.replace(temporary, path)
