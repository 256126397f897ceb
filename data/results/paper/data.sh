#!/usr/bin/env bash
# The problems that are labelled, those of RL, and the benchmarks. Minutes on a CPU; needs the network and pyarrow.
# tokens: none
#
#   bash data/results/paper/data.sh     # into data/train and data/benchmarks
source "$(dirname "$0")/settings.sh"

python -m data.prepare skywork --out data/train
python -m data.prepare math500 --out data/benchmarks
python -m data.prepare aime24 --out data/benchmarks
python -m data.prepare aime25 --out data/benchmarks
python -m data.prepare amc23 --out data/benchmarks
python -m data.prepare olympiadbench --out data/benchmarks
python -m data.prepare minerva --out data/benchmarks
python -m data.prepare processbench --out data/benchmarks

# ours: the problems of all benchmarks are left out, and the order of a shuffled file chooses. How the paper chose its
# 8,000 problems, "of mixed difficulty", and its 17,000, and whether they overlap, is not published. A problem that the
# set has twice may be in both halves.
python -m data.prepare overlap --train data/train/skywork.jsonl --out data/train/clean.jsonl \
  --benchmarks data/benchmarks/*.jsonl data/benchmarks/processbench/*.jsonl
shuf --random-source=data/train/clean.jsonl data/train/clean.jsonl > data/train/problems.jsonl
head -n 8000 data/train/problems.jsonl > data/train/labelled.jsonl
tail -n +8001 data/train/problems.jsonl > data/train/rl.jsonl # grpo.sh takes the first 17,000
