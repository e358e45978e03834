#!/usr/bin/env bash
# Prefix-RFT (arXiv 2507.01679) on Qwen2.5-Math-7B: one of eight rollouts continues the beginning of a demonstration.
#
#   bash recipes/prefix_rft.sh                       # 46k questions, each with a worked solution (made if missing)
#
# Hardware   8 GPUs of 80 GB, one node
# Time       not measured by us (days: 500 steps of 1,024 rollouts of up to 8,192 tokens)
# Versions   composed and validated in CI against verl 0.9.1; the method trained on a CPU; not yet run on GPUs by us
# Expect     nothing of ours. Long demonstrations leave little room: watch hpt/start/cut and hpt/start/missed, and that
#            hpt/start/solve_rate lies above hpt/solve_rate (verl's own critic/score/mean counts both)
# Settings   start share from U(0.95 → 0 in 300 steps, 0.95); the 20% of its tokens with most entropy learn
# More       methods, settings, data: recipes/math.sh; what differs from the published code: README, "Deviations"
set -euo pipefail
METHOD=prefix_rft name=qwen2.5_math_7b model=Qwen/Qwen2.5-Math-7B tensor_parallel=2
model_changes=(--rope-theta 40000 --max-position-embeddings 16384)  # the model's own 4,096 positions are too few
gate=0.0 demo_coef=0.1 official_coef=16
# shellcheck source=recipes/math.sh
source "$(dirname "${BASH_SOURCE[0]}")/math.sh"
