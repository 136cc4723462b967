#!/usr/bin/env bash
# Run what only a GPU can show, in parts that each have a time limit and do not need each other.
#
#   bash bench/gpu.sh [PART ...]     without a PART: `first`
#
#   first        6 minutes, LIMIT_S (390) seconds at most: machine, warm-up beside tests, kernels, augment, step, train,
#                and vit in what is left
#   second       5 minutes and LEARN_S (200) seconds: loader, sweep, end-to-end, with STEP_ARMS step, learn, score
#
# Their parts, which can be named one by one and in any order:
#
#   machine      the GPU with its clocks and power, the processor, the packages
#   warm-up      in the background: compile the graphs of `step` and of configs/imagenette_resnet18.yaml into the cache,
#                and decode batches by DALI on the GPU. `quiet` waits for it until second 200; it and every part that
#                measures then end what still runs
#   tests        the tests that need a GPU, and those of the kernels, compiled; TESTS names further files, TESTS_K those
#                that run, as pytest's -k does
#   kernels      loss and update beside their baselines and a copy
#   augment      the augmentation beside its reference and a copy
#   step         the step beside the published one and stock PyTorch, with a table of all kernels; STEP_ARMS: its arms
#   train        60 steps of a ResNet-50 from shards
#   vit          the step of a ViT-S/16, as `step`; VIT_ARMS: its arms, those first that need no compiler
#   loader       three arms of the loader, each by itself
#   sweep        the loader by the share of the hardware decoder
#   end-to-end   loader and step together, by where images are decoded; with a table of all kernels. ARM: the step's arm
#   learn        LEARN_S seconds of configs/imagenette_resnet18.yaml with EPOCHS (100), with k-NN scores. SIGTERM ends
#                it with a checkpoint below LEARN_RUN, from which the same command goes on
#   score        k-NN of that checkpoint, and the teacher's backbone in float16, in pieces of 15 MiB
#
# Parts that take longer, or that ALSO="PART ..." adds to `first` and `second` after their step:
#
#   bring-up     tests and train
#   batches      the step in bf16, and with 256 and 64 images; STEP_ARMS: its arms
#   small        16 images a step, with and without a CUDA graph
#   norms        our batch norms beside torch's; norms-sweep: with other sizes of tiles and numbers of programs
#   convolutions each convolution of the step by itself
#   roofline     the three bounds
#   peers        the loader beside others
#   doctor       what `dino-fast doctor` says
#
# What it reads from the environment, beside those named above:
#
#   SHARDS       a folder of shards, else some are drawn; IMAGENETTE: one with train/ and val/, for learn and score
#   LIMIT_S      seconds for everything. A part that no longer fits is left out, with a line that says so
#   SLOWER       a factor of every part's limit, at which SIGINT stops it
#   OUT          the folder of the results (bench/results), which are there after each part: JSON lines, of which
#                `python -m bench.readme --print FOLDER` makes a table, and every log in NAME.tgz
#   DECODE       torch: end-to-end, train and learn without DALI; TRAIN_ARGS: further settings of train and learn
#   COMMIT       the commit that the records name, if this is a copy of another checkout
#   ENTER        a file that is sourced first where it exists (.gpu/enter.sh); it may set PYTHONPATH, SHARDS and so on
#   PYTHON       the interpreter, else that of .venv, else python3
#   DRY          1: the same commands with tiny sizes on a CPU; show: print the commands, and run none
#
# Needs python3 with torch >= 2.11, torchvision, DALI, jsonargparse, docstring-parser, typeshed-client, annotated-types,
# rich, pyyaml, tensorboard, pillow, pytest, pytest-timeout and hypothesis on PYTHONPATH; with pytest-xdist tests run
# eight at a time.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shopt -s nullglob
dry=${DRY:-}
out=${OUT:-bench/results}
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
python=${PYTHON:-$python}
call=${1:-first}
[ $# -gt 1 ] && call=parts
scratch=$(mktemp -d)
results=$scratch/$call
mkdir -p "$results"
running= # the command under way
chains=() # what runs in the background, each the leader of a session of its own
slower=${SLOWER:-1}
learn_run=${LEARN_RUN:-$scratch/learn}
enter=${ENTER:-.gpu/enter.sh}
STEP_ARMS_GIVEN=${STEP_ARMS:-}
STEP_ARMS=${STEP_ARMS:-published ours-fused-graphed stock-compiled ours-compiled stock}
unlimited=1000000
warm_until=200 # seconds from the start
case $call in
first) limit_s=${LIMIT_S:-390} warm_until=$((limit_s - 190)) ;; # what is timed takes that long
second) limit_s=${LIMIT_S:-$((300 + ${LEARN_S:-200}))} ;;
*) limit_s=${LIMIT_S:-$unlimited} ;;
esac
if [ -n "$dry" ]; then # no compiler: it takes minutes; and no GPU, whether there is one or not
    slower=10 limit_s=$unlimited warm_until=600
    export TORCHDYNAMO_DISABLE=1 CUDA_VISIBLE_DEVICES=
fi
# Compilers' caches, in one place each, so that every part finds what an earlier one compiled.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/dino-fast-$(id -u)/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/dino-fast-$(id -u)/triton}
export PYTHONUNBUFFERED=1

# ---- Running a command

run_limited() { # NAME LIMIT LEAST LINES COMMAND...: for at most LIMIT seconds; not if fewer than LEAST are left
    local name=$1 limit=$(($2 * slower)) least=$3 lines=$4 start=$SECONDS status left=$((limit_s - SECONDS - 5))
    shift 4
    [ "$dry" = show ] && echo "\$ $(quote "$@")" && return
    if [ "$left" -lt "$least" ]; then
        echo "== $name: left out, $left s are left of $limit_s"
        return 1
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    # A shell makes its background commands ignore SIGINT, and so may who started this script.
    timeout -s "${stop:-INT}" -k 15 "$limit" env --default-signal=INT "$@" >"$results/$name.log" 2>&1 &
    running=$!
    wait "$running"
    status=$?
    kill -KILL -- "-$running" 2>/dev/null # what it left behind
    running=
    grep -h '^left out' "$results/$name.log" | sort -u | cut -c1-200
    tail -n "$lines" "$results/$name.log" | cut -c1-200
    echo "== $name: status $status, $((SECONDS - start)) s of $limit; $(print_clock)"
    collect
    return "$status"
}
print_clock() {
    [ "$limit_s" -lt "$unlimited" ] && echo "$SECONDS s used, $((limit_s - SECONDS)) s left" || echo "$SECONDS s used"
}
run_bench() { # NAME LIMIT LEAST MODULE ARGUMENTS...: its records go to NAME-gpu.jsonl, or to those of `records`
    local name=$1 limit=$2 least=$3 module=$4 file=$results/${records:-$1}-gpu.jsonl
    shift 4
    end_background
    choose_sizes "$module"
    run_limited "$name" "$limit" "$least" 50 "$python" -m "bench.$module" "$@" "${tiny[@]}" --json "$file"
}
quote() {
    printf '%q ' "$@"
}
choose_sizes() { # COMMAND: set `tiny` to arguments that make it small; later arguments win
    tiny=()
    [ "$dry" = 1 ] || return 0
    local images=(--batch 4 --seconds 0.1)
    case $1 in
    step | end_to_end)
        tiny=(--backbone "${tiny_backbone:-resnet18}" --batch 2 --global_size 32 --local_size 24 --locals 2
            --prototypes 64 --rounds 1 --steps 1)
        ;;
    kernels) tiny=(--backbone resnet18 --batch 2 --prototypes 64 --iterations 1 --rounds 1) ;;
    augment) tiny=(--batch 2 --iterations 1 --rounds 1) ;;
    loader) tiny=("${images[@]}" --cores 1) ;;
    sweep) tiny=("${images[@]}" --decode_device cpu --threads 1) ;;
    norms | convolutions) tiny=(--backbone resnet18 --batch 1 --side 64 --iterations 1 --rounds 1) ;;
    roofline) tiny=(--precision fp32 --rounds 1) ;;
    tests) tiny=(--collect-only) ;;
    train | learn)
        tiny=(--device cpu --precision fp32 --backbone resnet18 --batch_size 4 --crops.global_size 32
            --crops.local_size 24 --crops.locals 2 --head.out_dim 64 --head.hidden_dim 32 --log_every 1)
        if [ "$1" = learn ]; then tiny+=(--knn.every 2 --knn.images 20); else tiny+=(--max_steps 2); fi
        ;;
    esac
}
collect() { # Copy the results to $out: everything in one archive, and so many files beside it that there are eight
    local file files=("$results"/*-gpu.jsonl)
    [ -n "${OUT:-}" ] && files=("${files[@]:0:5}")
    case $call in
    first) files=("$results"/{dali,kernels,augment,step,train}-gpu.jsonl "$results"/{step-kernels.jsonl,tests.log}) ;;
    second) files=("$results"/{loader,sweep,end-to-end,step,learn}-gpu.jsonl) ;; # and two pieces of the teacher
    esac
    mkdir -p "$out"
    tar czf "$out/$call.tgz" -C "$scratch" "$call"
    for file in "${files[@]}"; do
        if [ -s "$file" ]; then cp "$file" "$out/"; fi
    done
}

# ---- In the background

add_to_chain() { # CHAIN NAME COMMAND...: one more command of a chain, which runs when those before it are done
    local file=$scratch/chain-$1 name=$2
    shift 2
    [ "$dry" = show ] && echo "\$ $(quote "$@")" && return
    printf 'start=$SECONDS; %s >%q 2>&1; echo "%s: status $?, $((SECONDS - start)) s" >>%q\n' \
        "$(quote env --default-signal=INT "$@")" "$results/$name.log" "$name" "$results/beside.txt" >>"$file"
}
end_background() { # [SECOND]: wait for the background until this second, then end it
    [ ${#chains[@]} -gt 0 ] || return 0
    local leader log
    for leader in "${chains[@]}"; do
        while kill -0 "$leader" 2>/dev/null && [ "$SECONDS" -lt "${1:-0}" ]; do sleep 0.5; done
    done
    for leader in "${chains[@]}"; do end_process "$leader"; done
    chains=()
    cat "$results/beside.txt" 2>/dev/null # what is missing there was ended
    for log in "$results"/warm-*.log; do tail -n 1 "$log" | cut -c1-200; done
    echo "== quiet: $(print_clock)"
    collect
}
end_process() { # PROCESS: end it with its group and all its descendants
    local process processes
    processes=$(list_descendants "$1")
    # shellcheck disable=SC2086
    kill -KILL -- "-$1" $processes 2>/dev/null
    wait "$1" 2>/dev/null
    for process in $processes; do # at most 5 s: the GPU's memory is free when they are gone
        for _ in {1..50}; do
            grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$process/status" || break
            sleep 0.1
        done
    done
}
list_descendants() { # PROCESS
    local child
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
        echo "$child"
        list_descendants "$child"
    done
}

# ---- Images

draw_images() { # PER_CLASS: draw images once, and print their folder
    if [ ! -e "$scratch/drawn" ]; then
        "$python" -c 'import sys; from pathlib import Path; from dino_fast.demo.draw import draw_dataset
draw_dataset(Path(sys.argv[1]), per_class=int(sys.argv[2]), val_per_class=2, seed=0)' "$scratch/drawn" "$1" >&2
    fi
    echo "$scratch/drawn"
}
find_shards() { # Print the folder of shards
    local folder=$scratch/shards count=150
    [ -n "${SHARDS:-}" ] && echo "$SHARDS" && return
    [ "$dry" = show ] && echo SHARDS && return
    [ -n "$dry" ] && count=4
    [ -e "$folder" ] || "$python" -m shards pack "$(draw_images "$count")/train" "$folder" >&2
    echo "$folder"
}
find_imagenette() { # Print the folder of its two sets of shards, or nothing
    local folder=${IMAGENETTE:-}
    [ "$dry" = show ] && folder=${folder:-IMAGENETTE}
    if [ -z "$folder" ] && [ -n "$dry" ]; then
        folder=$scratch/imagenette
        if [ ! -e "$folder" ]; then
            "$python" -m shards pack "$(draw_images 4)/train" "$folder/train" >&2
            "$python" -m shards pack "$(draw_images 4)/val" "$folder/val" --classes "$folder/train/manifest.json" >&2
        fi
    fi
    echo "$folder"
}

# ---- The parts: a NAME, a LIMIT and the LEAST that makes sense, in seconds, and the command

machine() {
    [ "$dry" = show ] && return
    {
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        nvidia-smi
        nvidia-smi -q -d CLOCK,POWER
        lscpu
        free -g
        "$python" -m pip list
        git rev-parse HEAD || echo "commit ${COMMIT:-unknown}"
        date -u +%FT%TZ
    } >"$results/machine.txt" 2>&1
    head -n 1 "$results/machine.txt"
    echo "== machine: $(print_clock)"
}
warm_up() { # Two arms at a time: each holds some 20 GB of the GPU's memory
    local arm chain=0 dali=dali-gpu
    [ "$dry" = 1 ] && dali=dali-cpu
    choose_sizes loader
    add_to_chain dali dali "$python" -m bench.loader "$(find_shards)" --arm "$dali, crops alone" --cores "$(nproc)" \
        --batch 128 --seconds 2 "${tiny[@]}" --json "$results/dali-gpu.jsonl"
    choose_sizes step
    for arm in $STEP_ARMS; do
        case $arm in
        *compiled* | *graphed* | *aside*)
            add_to_chain "step-$((chain++ % 2))" "warm-$arm" TORCHINDUCTOR_COMPILE_THREADS=8 "$python" -m bench.step \
                --rounds 1 --steps 1 --only "$arm" "${tiny[@]}"
            ;;
        esac
    done
    choose_sizes train
    add_to_chain imagenette warm-imagenette TORCHINDUCTOR_COMPILE_THREADS=8 "$python" -m dino_fast train \
        --config configs/imagenette_resnet18.yaml --data.train "$(find_shards)" --max_steps 2 --output "$scratch/warm" \
        ${DECODE:+--data.decode "$DECODE"} ${TRAIN_ARGS:-} "${tiny[@]}"
    for chain in "$scratch"/chain-*; do
        setsid bash "$chain" </dev/null >/dev/null 2>&1 &
        chains+=("$!")
    done
}
tests() {
    local at_once=()
    "$python" -c 'import xdist' 2>/dev/null && at_once=(-n 8 --dist worksteal)
    choose_sizes tests
    # Warnings are errors here, but those of the packages of another machine should not hide what is to be seen.
    # shellcheck disable=SC2086
    run_limited tests 150 30 40 OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=2 "$python" -m pytest "${at_once[@]}" \
        -o addopts= --import-mode=importlib -p no:cacheprovider -q --tb=short -rfEsP -W default --timeout 90 \
        ${TESTS_K:+-k "$TESTS_K"} "${tiny[@]}" tests/test_gpu.py tests/pipelines/test_photometric_triton.py \
        tests/dino_fast/*/test_kernel_*.py ${TESTS:-}
}
kernels() {
    run_bench kernels 50 20 kernels --rounds 3
}
augment() { # torch.compile spends minutes on its many shapes
    run_bench augment 25 10 augment --only copy triton torch --rounds 3 --iterations 20
}
step() { # [LIMIT]: if a kernel takes the whole process with it, once more the arms that were ready before
    local status arms part=$results/step-gpu.jsonl.partial
    # shellcheck disable=SC2086
    run_bench step "${1:-160}" 50 step --rounds 3 --steps 8 --profile --kernels "$results/step-kernels.jsonl" \
        --only $STEP_ARMS
    status=$?
    [ "$status" -ne 0 ] && [ "$status" -ne 124 ] && [ -s "$part" ] || return "$status"
    arms=$("$python" -c 'import json, sys
print(*dict.fromkeys(row["arm"] for row in map(json.loads, open(sys.argv[1])) if row["arm"] != "probes"))' "$part")
    mv "$part" "$results/step-broken.jsonl"
    # shellcheck disable=SC2086
    records=step run_bench step-again 90 40 step --rounds 2 --steps 8 --profile \
        --kernels "$results/step-kernels.jsonl" --only $arms
}
train() { # As a user would start it
    end_background
    choose_sizes train
    run_limited train 60 35 12 "$python" -m dino_fast train --config configs/resnet50_100ep.yaml \
        --data.train "$(find_shards)" --crops.locals 6 --output "$scratch/run" --batch_size 128 --max_steps 60 --log_every 5 \
        --checkpoint.every "1000 steps" ${DECODE:+--data.decode "$DECODE"} ${TRAIN_ARGS:-} "${tiny[@]}"
    keep_file "$scratch/run/metrics.jsonl" train-gpu.jsonl
}
vit() {
    # shellcheck disable=SC2086
    tiny_backbone=vit_tiny_patch16 run_bench vit 150 40 step --backbone vit_small_patch16 --rounds 3 --steps 8 \
        --profile --kernels "$results/vit-kernels.jsonl" \
        --only ${VIT_ARMS:-published ours-fused-graphed stock stock-compiled ours-graphed}
}
loader() {
    local arm arms=(dali-split dali-gpu "DALI's own operators, GPU")
    [ "$dry" = 1 ] && arms=(dali-cpu torch "DALI's own operators")
    for arm in "${arms[@]}"; do
        records=loader run_bench "loader-${arm//[^a-zA-Z]/-}" 25 12 loader "$(find_shards)" --arm "$arm" \
            --cores "$(nproc)" --batch 128 --seconds 3
    done
}
sweep() {
    run_bench sweep 60 25 sweep "$(find_shards)" --decode dali --decode_device gpu --hw_decoder_load -1 0 0.2 0.6 0.8 1 \
        --batch 128 --seconds 2
}
end_to_end() {
    local where=(gpu split)
    [ "$dry" = 1 ] || [ "${DECODE:-}" = torch ] && where=(cpu)
    run_bench end-to-end 110 35 end_to_end "$(find_shards)" --rounds 2 --steps 20 --batch 128 ${ARM:+--arm "$ARM"} \
        --decode "${DECODE:-dali}" --decode_device "${where[@]}" --kernels "$results/fed-kernels.jsonl"
}
learn() {
    local images seconds=${LEARN_S:-200} left=$((limit_s - SECONDS - 45)) # for `score`
    images=$(find_imagenette)
    [ -n "$images" ] || { echo "== learn: left out, IMAGENETTE names no folder" && return 1; }
    [ -z "${LEARN_S:-}" ] && [ -n "${LIMIT_S:-}" ] && seconds=$left
    [ "$seconds" -gt "$left" ] && seconds=$left
    [ "$dry" = 1 ] && seconds=30
    local slower=1
    end_background
    choose_sizes learn
    stop=TERM run_limited learn "$seconds" 20 15 "$python" -m dino_fast train --config configs/imagenette_resnet18.yaml \
        --data.train "$images/train" --knn.train "$images/train" --knn.val "$images/val" --knn.every 15 \
        --knn.images 5000 --epochs "${EPOCHS:-100}" --output "$learn_run" \
        ${DECODE:+--data.decode "$DECODE"} ${TRAIN_ARGS:-} "${tiny[@]}"
    keep_file "$learn_run/metrics.jsonl" learn-gpu.jsonl
}
score() {
    local images
    images=$(find_imagenette)
    [ -n "$images" ] || { echo "== score: left out, IMAGENETTE names no folder" && return 1; }
    end_background
    run_limited score 30 10 6 "$python" -m dino_fast knn --checkpoint "$learn_run" --train "$images/train" \
        --val "$images/val" --resize 128 --crop 128
    run_limited teacher 15 5 2 "$python" -c 'import pathlib, sys, torch
newest = sorted(pathlib.Path(sys.argv[1]).glob("step-*.pt"))[-1]
state = torch.load(newest, map_location="cpu", weights_only=True)
teacher = {name: value.half() if value.is_floating_point() else value
           for name, value in state["model"]["teacher"].items() if name.startswith("backbone.")}
torch.save({"step": state["step"], "recipe": state["recipe"], "teacher": teacher}, sys.argv[2])
print(f"{newest.name}: {len(teacher)} tensors")' "$learn_run" "$scratch/teacher.pt"
    [ -s "$scratch/teacher.pt" ] && split -b 15M -d "$scratch/teacher.pt" "$out/teacher.pt."
}
keep_file() { # FILE NAME
    [ -s "$1" ] && cp "$1" "$results/$2" && collect
}
batches() {
    local size
    # shellcheck disable=SC2086
    run_bench step-bf16 150 40 step --precision bf16 --rounds 3 --steps 10 \
        --only ${STEP_ARMS_GIVEN:-stock-compiled ours-fused-graphed}
    for size in 256 64; do
        # shellcheck disable=SC2086
        run_bench "step-$size" 150 40 step --rounds 3 --steps 10 --batch "$size" \
            --only ${STEP_ARMS_GIVEN:-published stock-compiled ours-fused-graphed}
    done
}
small() {
    run_bench step-small 300 60 step --rounds 3 --steps 20 --batch 16 \
        --only stock-compiled ours ours-fused ours-fused-graphed ours-compiled ours-aside ours-graphed \
        ours-graphed-aside
}
norms() {
    run_bench norms 60 20 norms --rounds 3
}
norms_sweep() {
    run_bench norms-sweep 120 40 norms --rounds 2 --sweep
}
convolutions() {
    run_bench convolutions 60 20 convolutions --rounds 3
}
roofline() {
    run_bench roofline 60 10 roofline --rounds 10
}
peers() {
    run_bench peers 300 60 loader "$(find_shards)" --seconds 5 --rounds 2 --batch 128
}
doctor() {
    end_background
    choose_sizes train
    run_limited doctor 120 30 20 "$python" -m dino_fast doctor --data "$(find_shards)" \
        --config configs/resnet50_100ep.yaml --batch_size 128 "${tiny[@]}"
}

first() {
    machine
    warm_up
    tests
    end_background "$warm_until"
    kernels
    augment
    step
    also
    train
    vit
}
second() {
    loader
    sweep
    end_to_end
    [ -n "$STEP_ARMS_GIVEN" ] && step 90
    also
    learn
    score
}
also() {
    local name
    for name in ${ALSO:-}; do part "$name"; done
}
part() { # NAME
    case $1 in
    first | second | machine | tests | kernels | augment | step | train | vit | loader | sweep | learn | score) "$1" ;;
    batches | small | norms | convolutions | roofline | peers | doctor) "$1" ;;
    warm-up) warm_up ;;
    quiet) end_background "$warm_until" ;;
    end-to-end) end_to_end ;;
    norms-sweep) norms_sweep ;;
    bring-up) tests && train ;;
    *) echo "bench/gpu.sh: unknown PART $1: see its first lines" >&2 && exit 2 ;;
    esac
}

# ---- The run

finish() { # Also when a signal ends this script
    local status=$? leader waited
    trap - EXIT
    if [ -n "$running" ]; then
        kill -INT "$running" 2>/dev/null # `timeout` hands it on
        for waited in 1 2 3 4 5 6; do
            kill -0 "$running" 2>/dev/null && sleep 0.5
        done
        kill -KILL -- "-$running" 2>/dev/null
    fi
    for leader in "${chains[@]}"; do end_process "$leader"; done
    [ "$dry" = show ] || collect
    rm -rf "$scratch"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [ -z "$dry" ] && [ -f "$enter" ]; then
    # shellcheck disable=SC1090
    if ! . "$enter"; then
        echo "== $enter failed"
        machine
        exit 1
    fi
fi
for name in "${@:-first}"; do part "$name"; done
echo "== all: $SECONDS s"
exit 0
