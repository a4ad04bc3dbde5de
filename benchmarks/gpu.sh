#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests marked gpu, training of 3B and 7B sizes, a toy run on the
# device. Needs torch 2.11 or later and transformers 5.17 or later; neither vllm nor flash-attn.
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
python -m pytest -m gpu -v
python benchmarks/gpu_train.py runs/gpu_train.json
python train.py --run_dir runs/gpu --overwrite --steps 20
