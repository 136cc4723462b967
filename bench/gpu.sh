#!/usr/bin/env bash
# Everything here that only a GPU can show, in parts of under 9 minutes each.
#
#   bash bench/gpu.sh [PART ...]     without a PART: `quick`
#
#   quick        the tests, then something of all the others but `learn`: whether it runs, and first figures
#   bring-up     the machine, the `gpu` tests, the kernels' own tests compiled, 60 steps of a run from shards
#   kernels      loss, update and augmentation beside their baselines and a copy; the three bounds
#   step         the step beside the published one and stock PyTorch, by kernel class; memory by batch
#   small        16 images a step, with and without a graph; bf16 beside fp16
#   loader       the loader beside others, and by its settings
#   end-to-end   loader and step together at three batches, beside the published pair; what `doctor` says
#   learn        LEARN_MINUTES (8) of configs/imagenette_resnet18.yaml, with k-NN scores; the same command goes on
#
# SHARDS=FOLDER: shards to read, else some are drawn. IMAGENETTE=FOLDER: `learn`'s, with train/ and val/ in it.
# Every command is stopped at its limit, in seconds, of which SLOWER=2 gives it twice as many. Results go to $OUT, or to
# bench/results/. Needs python3 with torch >= 2.11, torchvision, DALI, jsonargparse, docstring-parser, typeshed-client,
# annotated-types, rich, pyyaml, tensorboard, pillow, pytest, pytest-timeout and hypothesis on PYTHONPATH.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-bench/results}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

within() { # SECONDS LINES COMMAND...: the last LINES of what it prints
    local limit=$(($1 * ${SLOWER:-1})) lines=$2
    shift 2
    echo "-- $*"
    timeout "$limit" "$@" 2>&1 | tail -n "$lines"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || echo "-- status $status within $limit s"
}
bench() { # SECONDS MODULE RESULT ARGUMENTS...
    within "$1" 60 "$python" -m "bench.$2" --json "$out/$3-gpu.jsonl" "${@:4}"
}

machine() {
    {
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        "$python" -c 'import torch, torchvision, triton, numpy; print("torch", torch.__version__, "cuda", torch.version.cuda,
"torchvision", torchvision.__version__, "triton", triton.__version__, "numpy", numpy.__version__)'
        "$python" -c 'import nvidia.dali; print("dali", nvidia.dali.__version__)'
        git rev-parse HEAD 2>/dev/null
        date -u +%FT%TZ
    } 2>&1 | tee "$out/gpu-machine.txt"
}
shards() { # where they are
    local folder=${SHARDS:-$scratch/shards}
    if [ ! -e "$folder" ]; then
        "$python" -c 'import sys; from pathlib import Path; from dino_fast.demo.draw import draw_dataset
draw_dataset(Path(sys.argv[1]), per_class=150, val_per_class=1, seed=0)' "$scratch/drawn" >&2
        "$python" -m shards pack "$scratch/drawn/train" "$folder" >&2
    fi
    echo "$folder"
}
tests() {
    within 110 40 "$python" -m pytest -m gpu -o addopts= --import-mode=importlib -p no:cacheprovider -q -s tests |
        tee "$out/gpu-tests.txt"
    # On a GPU these run compiled.
    within 45 15 "$python" -m pytest -p no:cacheprovider -q tests/pipelines/test_photometric_triton.py \
        tests/dino_fast/test_kernel_dino_loss.py tests/dino_fast/test_kernel_update.py | tee -a "$out/gpu-tests.txt"
}
train() { # Whether the whole main job runs, as a user would start it.
    within 50 15 "$python" -m dino_fast train --config configs/resnet50_100ep.yaml --data.train "$(shards)" \
        --crops.locals 6 --output "$scratch/run" --batch_size 128 --max_steps 60 --epochs 100 --optim.warmup_epochs 1 \
        --log_every 20
    cp "$scratch/run/metrics.jsonl" "$out/gpu-train.jsonl"
}

quick() {
    tests
    bench 30 augment augment --only copy triton torch
    bench 60 loader loader "$(shards)" --only dali-gpu "hybrid, torch" "hybrid, dali" torch --seconds 4 --rounds 1 \
        --batch 128
    bench 30 kernels kernels --rounds 3
    # Compiling takes most of it; nothing is written before all arms are done.
    bench 190 step step --rounds 3 --steps 10 --profile --only published stock stock-compiled ours ours-compiled \
        ours-graphed
    bench 35 end_to_end end-to-end "$(shards)" --rounds 2 --steps 20 --batch 128
    train # its graphs are those that bench.step has compiled
}
bring_up() {
    SLOWER=$((2 * ${SLOWER:-1})) tests
    train
}
kernels() {
    bench 120 kernels kernels --rounds 10
    bench 60 augment augment --only copy triton torch --rounds 5 # torch.compile spends minutes on its many shapes
    bench 60 roofline roofline --rounds 10
}
step() {
    bench 260 step step --rounds 5 --steps 20 --profile
    for batch in 64 256; do
        bench 120 step "step-$batch" --batch "$batch" --rounds 3 --steps 10 --only published stock-compiled ours-compiled
    done
}
small() {
    bench 300 step step-small --batch 16 --rounds 3 --steps 20 \
        --only stock-compiled ours ours-compiled ours-aside ours-graphed ours-graphed-aside
    bench 120 step step-bf16 --precision bf16 --rounds 3 --steps 10 --only stock-compiled ours-compiled
}
loader() {
    bench 240 loader loader "$(shards)" --seconds 5 --rounds 2 --batch 128
    bench 160 sweep sweep-gpu-decoder "$(shards)" --decode dali --decode_device gpu --threads 4 8 16 --prefetch 2 3 \
        --hw_decoder_load 0 0.2 0.4 0.6 --batch 128 --seconds 2
    bench 80 sweep sweep-cpu-decoder "$(shards)" --decode torch dali --decode_device cpu --threads 8 16 --prefetch 2 3 \
        --batch 128 --seconds 2
}
end_to_end() {
    for batch in 64 128 256; do
        bench 130 end_to_end "end-to-end-$batch" "$(shards)" --batch "$batch" --rounds 3 --steps 50 --published
    done
    within 90 20 "$python" -m dino_fast doctor --data "$(shards)" --config configs/resnet50_100ep.yaml --batch_size 128 |
        tee "$out/gpu-doctor.txt"
}
learn() { # A signal ends it with a checkpoint, from which the next call goes on.
    local run=${LEARN_RUN:-$scratch/learn} pictures=${IMAGENETTE:?a folder with the shards train/ and val/}
    timeout -s TERM $((60 * ${LEARN_MINUTES:-8})) "$python" -m dino_fast train --config configs/imagenette_resnet18.yaml \
        --data.train "$pictures/train" --knn.train "$pictures/train" --knn.val "$pictures/val" --knn.every 20 \
        --knn.pictures 10000 --output "$run" 2>&1 | tail -n 40
    cp "$run/metrics.jsonl" "$out/gpu-learn.jsonl"
    within 60 10 "$python" -m dino_fast knn --checkpoint "$run" --train "$pictures/train" --val "$pictures/val" \
        --resize 128 --crop 128 | tee "$out/gpu-learn-knn.txt"
}

machine
for part in "${@:-quick}"; do
    case $part in
    quick | kernels | step | small | loader | learn) "$part" ;;
    bring-up) bring_up ;;
    end-to-end) end_to_end ;;
    *) echo "bench/gpu.sh: unknown PART $part: see its first lines" >&2 && exit 2 ;;
    esac
done
"$python" -m bench.readme --print "$out"
