#!/usr/bin/env bash
# CHORD-μ (arXiv 2508.11408) on Qwen2.5-Math-7B: a stream of demonstrations beside GRPO, its weight fading.
#
#   bash recipes/chord.sh                            # the stream is the training file
#   STREAM_FILE=experts.parquet bash recipes/chord.sh
#
# Hardware   8 GPUs of 80 GB, one node
# Time       not measured by us (days: 500 steps of 1,024 rollouts of up to 8,192 tokens)
# Versions   composed and validated in CI against verl 0.9.1; the method trained on a CPU; not yet run on GPUs by us
# Expect     nothing of ours. μ is hpt/demo_coef: 0.9 → 0.05 over 200 steps; rollouts weigh 1 − μ
# Settings   256 demonstrations beside 1,024 rollouts, the paper's 1 to 4; METHOD=chord_phi is set by ++hpt.method
# More       methods, settings, data: recipes/math.sh; what differs from the published code: README, "Deviations"
set -euo pipefail
METHOD=chord_mu name=qwen2.5_math_7b model=Qwen/Qwen2.5-Math-7B tensor_parallel=2
model_changes=(--rope-theta 40000 --max-position-embeddings 16384)  # the model's own 4,096 positions are too few
gate=0.0 demo_coef=0.1 official_coef=16
# shellcheck source=recipes/math.sh
source "$(dirname "${BASH_SOURCE[0]}")/math.sh"
