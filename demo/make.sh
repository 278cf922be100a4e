#!/bin/sh
# Makes the demo model, from nothing to the archive in the package: about an hour on two cores.
#
#     demo/make.sh [FOLDER]
#
# Whatever stops it, the same command goes on: finished parts are kept, and training resumes bit for bit.
# COUNT, STEPS and PYTHON in the environment change the number of conversations, the length of training, and the
# interpreter.
set -eu
cd "$(dirname "$0")/.."
FOLDER=${1:-build/demo-model}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$FOLDER"

data() {  # FILE and what else demo.data is asked
    [ -e "$FOLDER/$1" ] || "$PYTHON" -m demo.data "$FOLDER/$@"
}

# Two devices of one thread each are faster than one of two threads. The settings of malloc keep freed memory, which
# the kernel would otherwise clear again for each step.
train() {  # CHECKPOINT DATA VALIDATION OUTPUT STEPS, and rates
    checkpoint=$1 data=$2 validation=$3 output=$4 steps=$5
    shift 5
    [ -e "$FOLDER/$output/checkpoint" ] || env \
        XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false" \
        MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 \
        GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
        "$PYTHON" -m gptoss_jax.finetune \
        --checkpoint "$FOLDER/$checkpoint" --data "$FOLDER/$data" --validation "$FOLDER/$validation" \
        --output "$FOLDER/$output" --steps "$steps" --method full --compact-vocabulary --seed 0 \
        --optimizer muon --weight-decay 0.1 --warmup 0.02 --decay-from 0.3 \
        --row-tokens 1024 --batch-rows 4 --mesh data=2 --log-every 10 "$@"
}

data data.jsonl --count "${COUNT:-300000}" --seed 0
data validation.jsonl --count 1000 --seed 1 --held-out
[ -e "$FOLDER/fresh" ] || "$PYTHON" -m demo.fresh "$FOLDER/fresh" --data "$FOLDER/data.jsonl" --seed 0
train fresh data.jsonl validation.jsonl run "${STEPS:-5000}" --learning-rate 0.003 --matrix-learning-rate 0.03 \
    --quantize-from 0.8 --evaluate-every 400 --save-every 400

# Then more of what is hardest, about half of the conversations, for a fifth as many steps at a third of the rates.
more() {  # PART BEFORE FAMILIES
    data "more-$1.jsonl" --count 60000 --seed $((2 * $1)) --more "$3"
    data "more-$1-validation.jsonl" --count 600 --seed $((2 * $1 + 1)) --held-out --more "$3"
    train "$2/checkpoint" "more-$1.jsonl" "more-$1-validation.jsonl" "more-$1" $((${STEPS:-5000} / 5)) \
        --learning-rate 0.001 --matrix-learning-rate 0.01 --quantize-from 0.5 --evaluate-every 250 --save-every 250
}
more 1 run sorting_numbers,sorting_words
more 2 more-1 sorting_numbers,reversing

[ -e "$FOLDER/sealed" ] || "$PYTHON" -m demo.seal "$FOLDER/more-2/checkpoint" "$FOLDER/sealed"
"$PYTHON" -m demo.evaluate "$FOLDER/sealed" --count 200 --out "$FOLDER/evaluation.json" --check
"$PYTHON" -m demo.pack "$FOLDER/sealed"
