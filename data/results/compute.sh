#!/usr/bin/env bash
# Label accuracy against what the labels cost: voting over 1 to 16 verifications, and one to three rounds of critique, on the
# tiny world, five seeds, after claims.sh. About five minutes a seed on one core.
#
#   bash data/results/compute.sh                # runs/compute/<seed>/..., then data/results/compute.jsonl, tables, figure
#   python -m data.results.compute              # the tables and data/results/compute.png from data/results/compute.jsonl
#
# SEEDS="0 1" limits it; what is there isn't made again.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

for seed in ${SEEDS:-0 1 2 3 4}; do
  claims=runs/claims/$seed
  for rounds in 1 2 3; do
    out=runs/compute/$seed/rounds-$rounds
    [[ -f $out/labels_meta_critique.jsonl ]] && continue
    mkdir -p "$out"
    cp "$claims"/verify/verifications.jsonl{,.args.json} "$out/"  # the first of each is what the critique is about
    python verify.py --seed "$seed" --solutions "$claims/solutions.jsonl" --method meta_critique --critique_rounds $rounds --out "$out"
  done
done
python -m data.results.compute --collect
