"""python -m toy: builds the world of the preset; train.py does this by itself."""

import sys

import toy
from config import parse, run_main
from toy.build import build


def main() -> None:
    cfg = parse(sys.argv[1:])
    print(build(toy.locate(cfg).folder, cfg).folder)


if __name__ == "__main__":
    run_main(main)
