#!/usr/bin/env bash
# Everything here that only a GPU can show, in under 9 minutes: the `gpu` tests, then the
# benchmarks and 100 steps of ResNet-50 from shards.
#
#   bash bench/gpu.sh [SHARDS]      SHARDS: a folder that make-shards wrote; without it, pictures are drawn and packed
#
# Results go to $OUT, or to bench/results/. Needs python3 with torch >= 2.11, torchvision, DALI, jsonargparse,
# docstring-parser, typeshed-client, annotated-types, rich, pyyaml, tensorboard, pillow, pytest, pytest-timeout and
# hypothesis on PYTHONPATH.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-bench/results}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c 'import torch, torchvision, triton, numpy; print("torch", torch.__version__, "cuda", torch.version.cuda,
"torchvision", torchvision.__version__, "triton", triton.__version__, "numpy", numpy.__version__)'
    "$python" -c 'import nvidia.dali; print("dali", nvidia.dali.__version__)'
    git rev-parse HEAD 2>/dev/null
    date -u +%FT%TZ
} 2>&1 | tee "$out/gpu-machine.txt"

timeout 180 "$python" -m pytest -m gpu -o addopts= --import-mode=importlib -p no:cacheprovider -q -s tests 2>&1 |
    tee "$out/gpu-tests.txt" | tail -n 40

# On a GPU the kernel's own tests run compiled.
timeout 60 "$python" -m pytest -p no:cacheprovider -q tests/pipelines/test_photometric_triton.py 2>&1 |
    tee -a "$out/gpu-tests.txt" | tail -n 15
# Without torch.compile, which spends minutes on the reference's many shapes.
timeout 60 "$python" -m bench.augment --only copy triton torch --json "$out/augment-gpu.jsonl" 2>&1 | tail -n 15

shards=${1:-$scratch/shards}
if [ $# -eq 0 ]; then
    "$python" -c 'import sys; from pathlib import Path; from dino_fast.demo.draw import draw_dataset
draw_dataset(Path(sys.argv[1]), per_class=150, val_per_class=1, seed=0)' "$scratch/drawn"
    "$python" -m shards pack "$scratch/drawn/train" "$shards"
fi
timeout 110 "$python" -m bench.loader "$shards" --only dali-gpu "hybrid, torch" "hybrid, dali" torch --seconds 5 --rounds 1 \
    --batch 128 --json "$out/loader-gpu.jsonl" 2>&1 | tail -n 25
# Not a benchmark of the step (that is a later bench/step.py): whether the whole main job runs, and roughly how fast.
for decode_device in gpu cpu; do
    timeout 50 "$python" -m dino_fast train --config configs/resnet50_100ep.yaml --data.train "$shards" \
        --output "$scratch/run-$decode_device" --data.decode_device "$decode_device" --batch_size 64 --max_steps 100 \
        --epochs 100 --optim.warmup_epochs 1 --log_every 20 2>&1 | tail -n 15
    cp "$scratch/run-$decode_device/metrics.jsonl" "$out/gpu-train-decode-$decode_device.jsonl" || true
done
