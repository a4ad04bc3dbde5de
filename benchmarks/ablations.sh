#!/usr/bin/env bash
# What makes the toy world's result: the paper's comparisons and today's variants of GRPO, each on several seeds.
#
#     bash benchmarks/ablations.sh            # SEEDS="0 1 2" RUNS=runs/ablations; 48 runs, two hours or more
#
# Every run is the README's toy run but for what its name says and its 100 steps; "short" ones take 40, of two updates
# each, so that there are ratios to clip. What is finished is not run again, what was interrupted is resumed; the table and
# the figure are made of what there is. Of the papers' variants these are the parts that their names are known for: "dapo"
# is the clip range and the groups left out, without refilling the batch; "gspo" keeps the mean over tokens.
set -euo pipefail
cd "$(dirname "$0")/.."
RUNS=${RUNS:-runs/ablations}

run() {  # name, then what differs from the toy preset; once for each seed
    local name=$1; shift
    for seed in ${SEEDS:-0 1 2}; do
        local folder=$RUNS/$name-$seed
        [ -e "$folder/final/config.json" ] && continue
        python ${TRAIN:-train.py} --seed "$seed" --toy_seed "$seed" --run_dir "$folder" --resume auto --eval_every 0 \
            --steps 100 --save_every 20 "${@//SEED/$seed}"
    done
}

data() {  # other training files (search-heavy-SEED.parquet, correct-SEED.jsonl), and the toy world's own beside them
    for seed in ${SEEDS:-0 1 2}; do
        python benchmarks/ablations.py data "$seed" "$RUNS"
    done
}

teach() {  # a model that knows other things than the student is trained as the student is, then asked its questions
    for seed in ${SEEDS:-0 1 2}; do
        python benchmarks/ablations.py teacher "$seed" "$RUNS"
    done
    local world=$RUNS/teacher-world-SEED
    run teacher --model "$world/model" --search_index "$world/world/search.sqlite" \
        --train_files "$world/world/train.parquet" --val_files "$world/world/val.parquet"
    for seed in ${SEEDS:-0 1 2}; do
        local out=$RUNS/taught-$seed.jsonl
        [ -e "$out" ] || python eval.py --seed "$seed" --toy_seed "$seed" --model "$RUNS/teacher-$seed/final" \
            --files "$RUNS/train-$seed.parquet" --eval_temperature 1 --out "$out"
    done
}

run grpo
run no-penalty --search_penalty 0
data
val="$RUNS/val-SEED.parquet"  # with training files of their own, runs have no others for validation
run search-heavy --train_files "$RUNS/search-heavy-SEED.parquet" --val_files "$val"
run supervised --loss sft --train_files "$RUNS/correct-SEED.jsonl" --val_files "$val" --prompts_per_step 112
teach
run taught --loss sft --train_files "$RUNS/taught-SEED.jsonl" --val_files "$val" --prompts_per_step 112
run taught-grpo --model "$RUNS/taught-SEED/final"
TRAIN="benchmarks/ablations.py failing 0.3"  # a connection that is lost; the paper's three in a row are rare in two calls
run failing
run failing-fatal --fatal_failures 1
run failing-left-out --leave_out failed_tools
TRAIN=
short() { local name=$1; shift; run "short-$name" --steps 40 --updates_per_step 2 "$@"; }
short grpo
short dr-grpo --advantage dr_grpo --loss_norm constant
short dapo --clip_high 0.28 --leave_out zero_variance
short gspo --ratio sequence --clip_low 0.0003 --clip_high 0.0004
short leave-one-out --advantage rloo
short no-truncated --leave_out truncated
for seed in ${SEEDS:-0 1 2}; do
    for mode in direct pipeline; do
        out=$RUNS/$mode-$seed.jsonl
        [ -e "$out" ] || python eval.py --toy_seed "$seed" --model "$RUNS/grpo-$seed/final" --mode "$mode" --out "$out"
    done
done
python benchmarks/ablations.py table "$RUNS"
