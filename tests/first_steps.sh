#!/usr/bin/env bash
# A newcomer's first steps with the installed package, outside the checkout: train with the default evaluation, alone and under DeepSpeed,
# predict, ensemble, compare, plan. Fails on any status but 0 and on any traceback. `lst-scale` and `deepspeed` are the first on PATH.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export HF_HUB_OFFLINE=1 PYTHONPATH=
steps=(training.max_steps=4 training.global_batch_size=8 training.evaluate_every=4 data.max_eval_rows=16 data.max_train_rows=64)
package=$(python -c 'import lst_scale, pathlib; print(pathlib.Path(lst_scale.__file__).parent)')

try() {
    printf '$ %s\n' "$*"
    if ! "$@" >out.txt 2>&1 || grep -q Traceback out.txt; then
        cat out.txt
        echo "first steps: this failed: $*" >&2
        exit 1
    fi
    tail -n 2 out.txt
}

python - <<'PY'
from importlib.metadata import version
names = ("torch", "transformers", "deepspeed", "bitsandbytes", "datasets", "evaluate", "submitit", "peft", "safetensors", "pydantic", "typer")
print("versions:", ", ".join(f"{name} {version(name)}" for name in names))
PY
try lst-scale recipes
for seed in 0 1; do
    try lst-scale train --recipe quickstart name=first "${steps[@]}" seed=$seed
done
try deepspeed ${FIRST_STEPS_LAUNCH-} --master_port "${PORT:-29541}" "$package/train.py" --recipe quickstart name=two "${steps[@]}"
try lst-scale train --recipe quickstart name=lora "${steps[@]}" 'method={name: lora, rank: 4}'
try lst-scale train --recipe quickstart name=likely "${steps[@]}" evaluation.method=likelihood cache.enabled=true cache.folder=taps
head -n 8 "$package/embedded/wordnet/test.jsonl" >new.jsonl
try lst-scale predict runs/first-wordnet-kind-seed0 new.jsonl --output answers.jsonl
try lst-scale predict runs/first-wordnet-kind-seed0 new.jsonl --with runs/first-wordnet-kind-seed1 --output together.jsonl --num-beams 2
test "$(wc -l <answers.jsonl)" = 8
test "$(wc -l <together.jsonl)" = 8
try lst-scale ensemble runs/first-wordnet-kind-seed0 runs/first-wordnet-kind-seed1
try lst-scale compare runs --plot plot.png
try lst-scale plan --recipe t5-base
test -s plot.png
echo "first steps: all done"
