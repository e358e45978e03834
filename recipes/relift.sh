#!/usr/bin/env bash
# ReLIFT (arXiv 2506.07527) on Qwen2.5-Math-7B: questions that no rollout solves wait until an SFT step is due.
#
#   bash recipes/relift.sh                           # 46k questions, each with a worked solution (made if missing)
#
# Hardware   8 GPUs of 80 GB, one node
# Time       not measured by us (days: 500 steps of 1,024 rollouts of up to 8,192 tokens)
# Versions   composed and validated in CI against verl 0.9.1; the method trained on a CPU; not yet run on GPUs by us
# Expect     nothing of ours. hpt/buffer/entries grows to 128, then hpt/optimizer_steps is one more
# Settings   128 demonstrations an SFT step, newest first, with the RL steps' own optimizer
# More       methods, settings, data: recipes/math.sh; what differs from the published code: README, "Deviations"
set -euo pipefail
METHOD=relift name=qwen2.5_math_7b model=Qwen/Qwen2.5-Math-7B tensor_parallel=2
model_changes=(--rope-theta 40000 --max-position-embeddings 16384)  # the model's own 4,096 positions are too few
gate=0.0 demo_coef=0.1 official_coef=16
# shellcheck source=recipes/math.sh
source "$(dirname "${BASH_SOURCE[0]}")/math.sh"
