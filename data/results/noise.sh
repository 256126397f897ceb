#!/usr/bin/env bash
# How noisy may labels be? The labels of claims.sh with a share of them turned over, the PRM-CoT that learns from these, and
# GRPO with it as the reward; after claims.sh, whose runs are those with nothing turned over. About eight minutes a run on
# one core.
#
#   bash data/results/noise.sh                  # runs/noise/<seed>/<share>/..., then data/results/noise*.jsonl, table, figure
#   python -m data.results.noise                # the table from data/results/noise.jsonl
#
# SEEDS="0 1" and SHARES="10 50" limit it; what is there isn't made again.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

for seed in ${SEEDS:-0 1 2}; do
  for share in ${SHARES:-10 25 50}; do
    out=runs/noise/$seed/$share
    [[ -f $out/benchmark.jsonl ]] && continue
    python -m data.results.noise --turn "$share" --seed "$seed" --out "$out/labels.jsonl" \
      --labels "runs/claims/$seed/verify/labels_step_consistency.jsonl"
    python train_prm.py --seed "$seed" --labels "$out/labels.jsonl" --out "$out/prm_cot"
    python evaluate.py processbench --seed "$seed" --model "$out/prm_cot" --out "$out/processbench.jsonl"
    python grpo.py --seed "$seed" --steps 60 --heldout_every 10 --prm "$out/prm_cot" --out "$out/process_aware"
    python evaluate.py benchmark --greedy --seed "$seed" --model "$out/process_aware" --out "$out/benchmark.jsonl"
  done
done
python -m data.results.noise --collect
python evaluate.py plot --runs data/results/noise_curves.jsonl --out data/results/noise.png
