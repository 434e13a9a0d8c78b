#!/usr/bin/env bash
# The whole path on real cells: prepare, pretrain on two ranks, stop, resume, export, embed,
# fine-tune, report. Usage: demo.sh FOLDER (new or empty). `make demo` calls it.
set -euo pipefail

out=${1:?usage: demo.sh FOLDER}
mkdir -p "$out"
if [ -n "$(ls -A "$out")" ]; then
    echo "error: $out is not empty; give another folder" >&2
    exit 2
fi

# Shows a command, keeps it for the report, runs it.
run() {
    echo "\$ $*" | tee -a "$out/commands.txt"
    "$@"
}

# Prints the last logged optimizer step of the run, 0 before the first.
last_step() {
    tail -n 1 "$out/run/metrics.jsonl" 2>/dev/null | grep -o '"step": [0-9]*' | grep -o '[0-9]*' || echo 0
}

run python -m eval.cells.demo_cells "$out/cells.h5ad"
run geneloom prepare "$out/cells.h5ad" --vocab build --total-column n_counts --obs cell_type \
    --heldout 0.1 --out "$out/shards"

pretrain=(geneloom launch local --ranks 2 --device cpu pretrain --config demo
    "data.shards=$out/shards" "run.out=$out/run" run.deepspeed=zero1)
echo "\$ ${pretrain[*]} &" | tee -a "$out/commands.txt"
"${pretrain[@]}" &
launcher=$!
stop_at=${DEMO_STOP_AT_STEP:-100}
while kill -0 "$launcher" 2>/dev/null && [ "$(last_step)" -lt "$stop_at" ]; do
    sleep 0.5
done
run kill -TERM "$launcher"
code=0
wait "$launcher" || code=$?
echo "# the launcher ended with exit code $code (75: stopped by a signal, resumable)" |
    tee -a "$out/commands.txt"
if [ "$code" -ne 75 ]; then
    echo "error: expected exit code 75 after the signal" >&2
    exit 1
fi
run "${pretrain[@]}" --resume

run geneloom export "$out/run" --out "$out/model"
run geneloom embed "$out/cells.h5ad" --model "$out/model" --out "$out/embedded.h5ad"
run geneloom finetune cells "$out/cells.h5ad" --model "$out/model" --label cell_type \
    --max-train-per-class 25 --epochs 1 --steps 75 --out "$out/scores"
run geneloom report "$out/run" --scores "$out/scores" --embedding "$out/embedded.h5ad" \
    --color cell_type --commands "$out/commands.txt" --out "$out/report.html"
