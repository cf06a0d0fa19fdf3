#!/usr/bin/env bash
# What there is to see on one GPU, a stage at a time; a stage that fails or takes too long does not stop the next one.
#
#     bash benchmarks/gpu.sh RESULTS WEIGHTS STAGE...
#
# RESULTS gets a log a stage, WEIGHTS the made checkpoints (fastest in memory: /dev/shm/lst). Stages: env, weights, tests, suite, train,
# steps, rivals, reuse, paper, streamed.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$1 weights=$2
shift 2
mkdir -p "$results" "$weights"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD:${PYTHONPATH:-}" XDG_CACHE_HOME="$weights/cache" LC_ALL=C.UTF-8

TASK='task={name: kind, kind: classification, train: "embedded:wordnet/train.jsonl", validation: "embedded:wordnet/validation.jsonl", source: [word, definition], target: kind}'
PAPER="--batch 100 --source 128 --target 8 --layers 23 --warmup 3 --repeat 10 --together --folder $weights"

limited() { timeout -k 5 "$@"; }
make_weights() { [ -e "$weights/$1/config.json" ] || limited 120 python3 benchmarks/make_checkpoint.py "google-t5/$1" "$weights/$1" --device cuda; }
train() { # NAME override...
    local name=$1
    shift
    limited 120 python3 -m lst_scale.train --recipe t5-3b "name=$name" "backbone.checkpoint=$weights/t5-3b" "$TASK" "output_dir=$weights/runs" \
        evaluation.method=likelihood data.max_eval_rows=100 --overwrite "$@"
}

stage_env() { nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader && python3 -c '
import importlib.metadata as m, sys
print("python", sys.version.split()[0], *(f"{n} {m.version(n)}" for n in ("torch", "transformers", "deepspeed", "bitsandbytes", "peft", "datasets")))
import lst_scale; from lst_scale import LadderModel; import deepspeed, bitsandbytes'; }
stage_weights() { make_weights t5-3b; }
stage_tests() { limited 150 python3 -m pytest -q -p no:cacheprovider tests/test_gpu.py; }
stage_suite() { limited 120 python3 -m pytest -q -p no:cacheprovider -n 12 -m "not slow and not gpu" tests; }
stage_train() {
    train live training.max_steps=14 'logging.profile_steps=[10, 13]' &&
        python3 benchmarks/trace.py "$weights"/runs/live-*/profile/*.trace.json --steps 4
    train cached training.epochs=3 data.max_train_rows=1000 cache.enabled=true "cache.folder=$weights/taps" 'logging.profile_steps=[24, 27]' &&
        python3 benchmarks/trace.py "$weights"/runs/cached-*/profile/*.trace.json --steps 4
}
stage_steps() {
    limited 200 python3 benchmarks/steps.py "$weights/t5-3b" $PAPER --json "$results/steps.json" --cases forward:bf16 lst:bf16 lst-plain:bf16 \
        forward:int8 lst:int8 forward:nf4 lst:nf4 lst-cached:bf16
}
stage_rivals() {
    limited 200 python3 benchmarks/steps.py "$weights/t5-3b" $PAPER --json "$results/rivals.json" --cases forward:bf16 lst:bf16 lora:bf16 \
        lora-checkpointed:bf16 qlora-checkpointed:nf4 qlora-checkpointed:int8 lst-plain:int8 lst-plain:nf4
}
stage_reuse() {
    limited 150 python3 benchmarks/steps.py "$weights/t5-3b" $PAPER --json "$results/reuse.json" --cases lst:bf16 lst-cached:bf16 \
        lst-cached-cold:bf16 lst-8-members:bf16 lst-32-members:bf16 lst-cached-8-members:bf16 lst-cached-32-members:bf16
}
stage_paper() { # memory alone, so the recipes may run beside each other
    local recipe
    for recipe in t5-base-full t5-base-adapters t5-base-lora t5-base-bitfit t5-base-prompt t5-base-lst t5-base-lst-all-layers t5-large-lst t5-3b-lst; do
        limited 150 python3 benchmarks/planned.py --batches 100 --recipes $recipe --set data.max_source_length=128 training.deepspeed=zero0 \
            >"$results/paper-$recipe.log" 2>&1 &
    done
    wait
    cat "$results"/paper-*.log | grep '^| t5'
    rm "$results"/paper-*.log
}
stage_streamed() {
    make_weights t5-11b
    limited 240 python3 benchmarks/steps.py "$weights/t5-11b" --batch 32 --source 128 --target 8 --layers 23 --warmup 2 --repeat 4 --together \
        --json "$results/streamed.json" --cases transfer:nf4 lst-streamed:nf4 lst-streamed:int8
}

for stage; do
    began=$SECONDS
    "stage_$stage" >"$results/$stage.log" 2>&1
    echo "== $stage: exit $?, $((SECONDS - began)) s"
    grep -vE 'it/s|s/it' "$results/$stage.log" | tail -n 25
done
