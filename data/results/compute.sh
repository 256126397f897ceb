#!/usr/bin/env bash
# Label accuracy, and F1 of the PRM-CoTs, against what the labels cost: voting over 1 to 32 verifications, and one to three
# rounds of critique; and against the verifier's noise, its temperature. On the tiny world, five seeds (of noise three), after
# claims.sh and methods.sh. About twenty-five minutes a seed on one core.
#
#   bash data/results/compute.sh                # runs/compute/<seed>/..., then data/results/compute*.jsonl, tables, figure
#   python -m data.results.compute              # the tables from data/results/compute.jsonl
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
  for temperature in 0.4 1.2; do  # claims.sh has 0.8
    [[ $seed -gt 2 ]] && continue
    python verify.py --seed "$seed" --solutions "$claims/solutions.jsonl" --temperature $temperature --out "runs/compute/$seed/temperature-$temperature"
  done
  for votes in 2 4 8 32; do  # methods.sh has 1, claims.sh 16
    out=runs/compute/$seed/votes-$votes
    [[ -f $out/processbench.jsonl ]] && continue
    python verify.py --seed "$seed" --solutions "$claims/solutions.jsonl" --num_verifications $votes --out "$out"
    python train_prm.py --seed "$seed" --labels "$out/labels_step_consistency.jsonl" --out "$out/prm_cot"
    python evaluate.py processbench --seed "$seed" --model "$out/prm_cot" --out "$out/processbench.jsonl"
  done
done
python -m data.results.compute --collect
python evaluate.py plot --runs data/results/compute_curves.jsonl --out data/results/compute.png
