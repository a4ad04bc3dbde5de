#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 10 minutes (15 with vLLM, which compiles): the tests marked gpu,
# with those of vLLM and flash-attn where these are installed, then training of 3B and 7B sizes. Needs torch 2.11 or
# later and transformers 5.17 or later.
#   bash benchmarks/gpu.sh [folder for gpu_train.json, by default runs]
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
python3 -m pytest tests/test_gpu.py -v -rs || echo "the tests failed; training is measured all the same"
mkdir -p "${1:-runs}"
python3 benchmarks/gpu_train.py "${1:-runs}/gpu_train.json"
