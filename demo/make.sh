#!/bin/sh
# Makes the demo model, from nothing to the archive in the package: about half an hour on two quiet cores.
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

[ -e "$FOLDER/data.jsonl" ] || "$PYTHON" -m demo.data "$FOLDER/data.jsonl" --count "${COUNT:-300000}" --seed 0
[ -e "$FOLDER/validation.jsonl" ] || "$PYTHON" -m demo.data "$FOLDER/validation.jsonl" --count 1000 --seed 1 --held-out
[ -e "$FOLDER/fresh" ] || "$PYTHON" -m demo.fresh "$FOLDER/fresh" --data "$FOLDER/data.jsonl" --seed 0

# Two devices of one thread each are faster than one of two threads. The settings of malloc keep freed memory, which
# the kernel would otherwise clear again for each step.
[ -e "$FOLDER/run/checkpoint" ] || env \
    XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false" \
    MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    "$PYTHON" -m gptoss_jax.finetune \
    --checkpoint "$FOLDER/fresh" --data "$FOLDER/data.jsonl" --validation "$FOLDER/validation.jsonl" \
    --output "$FOLDER/run" --method full --compact-vocabulary --steps "${STEPS:-3600}" --seed 0 \
    --optimizer muon --learning-rate 0.003 --matrix-learning-rate 0.03 --weight-decay 0.1 \
    --warmup 0.02 --decay-from 0.3 --quantize-from 0.8 --row-tokens 1024 --batch-rows 4 --mesh data=2 \
    --log-every 10 --evaluate-every 400 --save-every 400

[ -e "$FOLDER/sealed" ] || "$PYTHON" -m demo.seal "$FOLDER/run/checkpoint" "$FOLDER/sealed"
"$PYTHON" -m demo.evaluate "$FOLDER/sealed" --count 200 --out "$FOLDER/evaluation.json" --check
"$PYTHON" -m demo.pack "$FOLDER/sealed"
