#!/usr/bin/env bash
# ProcessBench (Table 2, Figure 3): every reward model of stage2.sh on its four subsets. After stage2.sh and data.sh.
#
#   bash data/results/paper/processbench.sh                           # runs/paper/<method>/processbench_<kind>.jsonl
#   METHODS=step_consistency bash data/results/paper/processbench.sh  # of one method
#
# A PRM's prediction is the first step that it calls incorrect. An ORM names no step, so its line is outcome accuracy.
source "$(dirname "$0")/settings.sh"

# ours: one greedy judgement of at most 4,096 tokens, as in the released reward; the paper's are not published.
judge=(--data data/benchmarks/processbench/*.jsonl --votes 1 --max_new_tokens 4096)

for method in $methods; do
  [[ -f "$runs/$method/judged" ]] && continue
  # tokens: 3,400 cases x 4,096 = 13,926,400 by 14B for each model; no rate measured
  stage evaluate.py processbench "${judge[@]}" --kind orm --model "$runs/$method/orm" \
    --out "$runs/$method/processbench_orm.jsonl"
  stage evaluate.py processbench "${judge[@]}" --kind prm --model "$runs/$method/prm" \
    --out "$runs/$method/processbench_prm.jsonl"
  stage evaluate.py processbench "${judge[@]}" --kind prm_cot --model "$runs/$method/prm_cot" \
    --out "$runs/$method/processbench_prm_cot.jsonl"
  touch "$runs/$method/judged"
done
