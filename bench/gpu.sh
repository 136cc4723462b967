#!/usr/bin/env bash
# Everything here that only a GPU can show, in about 9 minutes at the most: the `gpu` tests, the kernels' own tests compiled, then the
# benchmarks and some steps of ResNet-50 from shards.
#
#   bash bench/gpu.sh [SHARDS]               SHARDS: a folder that make-shards wrote; without it, pictures are drawn
#   PARTS="step kernels" bash bench/gpu.sh   these alone, of: tests data kernels step train
#   PARTS=small bash bench/gpu.sh            once more as long: 16 images a step, with and without a graph; bf16 beside fp16
#
# Each part is stopped at its limit, in seconds, of which SLOWER=2 gives it twice as many. Results go to $OUT, or to
# bench/results/. Needs python3 with torch >= 2.11, torchvision, DALI, jsonargparse, docstring-parser, typeshed-client,
# annotated-types, rich, pyyaml, tensorboard, pillow, pytest, pytest-timeout and hypothesis on PYTHONPATH.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-bench/results}
parts=" ${PARTS:-tests data kernels step train} "
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

within() { # SECONDS COMMAND...
    local limit=$(($1 * ${SLOWER:-1}))
    shift
    timeout "$limit" "$@" || echo "-- status $? within $limit s: $*"
}
wanted() { [[ $parts == *" $1 "* ]]; }

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c 'import torch, torchvision, triton, numpy; print("torch", torch.__version__, "cuda", torch.version.cuda,
"torchvision", torchvision.__version__, "triton", triton.__version__, "numpy", numpy.__version__)'
    "$python" -c 'import nvidia.dali; print("dali", nvidia.dali.__version__)'
    git rev-parse HEAD 2>/dev/null
    date -u +%FT%TZ
} 2>&1 | tee "$out/gpu-machine.txt"

shards=${1:-$scratch/shards}
if [ $# -eq 0 ]; then
    "$python" -c 'import sys; from pathlib import Path; from dino_fast.demo.draw import draw_dataset
draw_dataset(Path(sys.argv[1]), per_class=150, val_per_class=1, seed=0)' "$scratch/drawn"
    "$python" -m shards pack "$scratch/drawn/train" "$shards" | tail -n 1
fi

if wanted tests; then
    within 110 "$python" -m pytest -m gpu -o addopts= --import-mode=importlib -p no:cacheprovider -q -s tests 2>&1 |
        tee "$out/gpu-tests.txt" | tail -n 40
    # On a GPU these run compiled.
    within 45 "$python" -m pytest -p no:cacheprovider -q tests/pipelines/test_photometric_triton.py \
        tests/dino_fast/test_kernel_dino_loss.py tests/dino_fast/test_kernel_update.py 2>&1 |
        tee -a "$out/gpu-tests.txt" | tail -n 15
fi
if wanted data; then
    # Without torch.compile, which spends minutes on the reference's many shapes.
    within 30 "$python" -m bench.augment --only copy triton torch --json "$out/augment-gpu.jsonl" 2>&1 | tail -n 15
    within 60 "$python" -m bench.loader "$shards" --only dali-gpu "hybrid, torch" "hybrid, dali" torch --seconds 4 \
        --rounds 1 --batch 128 --json "$out/loader-gpu.jsonl" 2>&1 | tail -n 25
fi
if wanted kernels; then
    within 30 "$python" -m bench.kernels --rounds 3 --json "$out/kernels-gpu.jsonl" 2>&1 | tail -n 30
fi
if wanted step; then
    # Compiling takes most of it; nothing is written before all arms are done.
    within 200 "$python" -m bench.step --rounds 3 --steps 10 --profile \
        --only published stock stock-compiled ours ours-compiled ours-aside ours-graphed --json "$out/step-gpu.jsonl" 2>&1 | tail -n 60
    within 45 "$python" -m bench.end_to_end "$shards" --rounds 2 --steps 20 --batch 128 \
        --json "$out/end-to-end-gpu.jsonl" 2>&1 | tail -n 15
fi
if wanted small; then
    within 240 "$python" -m bench.step --batch 16 --rounds 3 --steps 20 --json "$out/step-small-gpu.jsonl" \
        --only stock-compiled ours ours-compiled ours-aside ours-graphed ours-graphed-aside 2>&1 | tail -n 40
    within 120 "$python" -m bench.step --precision bf16 --rounds 3 --steps 10 --json "$out/step-bf16-gpu.jsonl" \
        --only stock-compiled ours-compiled 2>&1 | tail -n 20
fi
if wanted train; then
    # Whether the whole main job runs, as a user would start it; its graphs are those that bench.step has compiled.
    within 50 "$python" -m dino_fast train --config configs/resnet50_100ep.yaml --data.train "$shards" \
        --crops.locals 6 --output "$scratch/run" --batch_size 128 --max_steps 60 --epochs 100 --optim.warmup_epochs 1 --log_every 20 2>&1 |
        tail -n 15
    cp "$scratch/run/metrics.jsonl" "$out/gpu-train.jsonl"
fi
