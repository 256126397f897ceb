#!/usr/bin/env bash
# How a policy games its reward, and what stops it: the tiny world, three seeds. About an hour on two cores.
#
#   bash data/results/hacking.sh                # runs/hacking/<seed>/..., then data/results/hacking*.jsonl, table, figure
#   python -m data.results.hacking              # the table from data/results/hacking.jsonl
#
# Labels and PRM-CoT are those of claims.sh. SEEDS="0 1" limits it; what is there isn't made again. Three starts: `weak`
# and `able` are the tiny policy after it has imitated its own solutions, a quarter of them gamed (one step only, a step
# three times, another solution appended), so that RL has hacks to choose from: at a learning rate that costs it most of
# its ability, and at a lower one. `plain` is the tiny policy itself, as claims.sh has trained it. The judge is the
# PRM-CoT of Stage II; `lenient` is one that has learnt to overlook errors when a right solution of another problem follows.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

grpo() {  # name, policy, reward model, steps, further flags
  local name=$1 policy=$2 prm=$3 steps=$4
  shift 4
  [[ -f "$out/$name/training/step_$(printf %07d "$steps")/.metadata" ]] && return
  python grpo.py --seed "$seed" --policy "$policy" --prm "$prm" --out "$out/$name" --steps "$steps" \
    --problems data/tiny/problems.jsonl --heldout data/tiny/heldout.jsonl --heldout_temperature 1 \
    --gold data/tiny/gold.jsonl \
    --batch_size 16 --group_size 8 --lr 1.5e-4 --max_new_tokens 160 --prm_max_new_tokens 260 --min_steps 1 \
    --max_steps 20 --sample_every 1000 "$@"
}

common=runs/hacking
if [[ ! -f $common/lenient/model.safetensors ]]; then
  python generate.py --seed 7 --model data/tiny/policy --problems data/tiny/problems.jsonl --out $common/own.jsonl \
    --num_samples 6 --temperature 1 --top_p 1 --max_new_tokens 120 --slots 256
  python -m data.results.hacking --make $common --solutions $common/own.jsonl \
    --labels runs/claims/0/verify/labels_step_consistency.jsonl
  imitate=(python train_prm.py --model data/tiny/policy --labels $common/gamed.jsonl --kind policy --epochs 1)
  "${imitate[@]}" --lr 4e-5 --out $common/able
  "${imitate[@]}" --lr 2e-4 --out $common/weak
  python train_prm.py --model data/tiny/base --labels $common/lenient.jsonl --out $common/lenient \
    --lr 2e-4 --epochs 3 --batch_size 32
fi

for seed in ${SEEDS:-0 1 2}; do
  out=$common/$seed
  judge=runs/claims/$seed/prm_cot
  for constraints in none paper strict; do
    grpo "weak-$constraints" $common/weak "$judge" 40 --format_constraints $constraints
  done
  grpo weak-step_augmented $common/weak "$judge" 40 --reward step_augmented
  grpo weak-global_step $common/weak "$judge" 40 --reward global_step
  grpo weak-global_step-bounded $common/weak "$judge" 40 --reward global_step --min_steps 3
  for constraints in none paper; do
    grpo "lenient-$constraints" $common/weak $common/lenient 20 --format_constraints $constraints
  done
  grpo able-paper $common/able "$judge" 40
  python -m data.results.hacking --seed "$seed" --rescore
done
python -m data.results.hacking --collect
python evaluate.py plot --runs data/results/hacking_curves.jsonl --out data/results/hacking.png
