#!/usr/bin/env bash
# The paper's table of verification methods, with the rows it left out, on the tiny world: six ways to labels x four kinds
# of reward model, over five seeds. About half an hour a seed on one core.
#
#   bash data/results/methods.sh                # runs/methods/<seed>/..., then data/results/methods.jsonl
#   python -m data.results.methods              # the table from data/results/methods.jsonl
#
# SEEDS="0 1" limits it; what is there isn't made again.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

for seed in ${SEEDS:-0 1 2 3 4}; do
  out=runs/methods/$seed
  python generate.py --seed "$seed" --limit 100 --out "$out/solutions.jsonl"
  judge=(python verify.py --seed "$seed" --solutions "$out/solutions.jsonl")
  labels=()
  for method in single outcome_consistency step_consistency meta_critique hybrid; do
    "${judge[@]}" --method "$method" --out "$out/verify"
    labels+=("$out/verify/labels_$method.jsonl")
  done
  "${judge[@]}" --method reference_guided --answers data/tiny/gold.jsonl --num_verifications 1 --out "$out/verify"
  python evaluate.py labels --seed "$seed" --verifications "$out/verify/verifications.jsonl" \
    --labels "${labels[@]}" "$out/verify/labels_reference_guided.jsonl" --out "$out/labels.json"
  for method in single outcome_consistency step_consistency meta_critique hybrid reference_guided; do
    for kind in orm prm prm_cot disc_prm; do
      [[ -f "$out/$method-$kind.jsonl" ]] && continue
      python train_prm.py --seed "$seed" --kind "$kind" --labels "$out/verify/labels_$method.jsonl" --out "$out/model"
      python evaluate.py processbench --seed "$seed" --kind "$kind" --model "$out/model" --out "$out/$method-$kind.jsonl"
      rm -r "$out/model"
    done
  done
done
python -m data.results.methods --collect
