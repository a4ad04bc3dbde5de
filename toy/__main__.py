"""python -m toy [--key value ...]: builds the recipe's world, if it is not there, and prints its folder."""

import toy
from config import Config, parse, run_main
from toy.build import build


def main() -> None:
    cfg, recipe = parse(None, Config, toy.Recipe)
    print(build(toy.locate(recipe).folder, cfg, recipe).folder)


if __name__ == "__main__":
    run_main(main)
