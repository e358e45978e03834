#!/usr/bin/env bash
# The paper's main experiment: Qwen2.5-Math-7B on 46k competition questions, each with a worked solution.
#
#   METHOD=hpt bash recipes/qwen2.5_math_7b.sh            # hpt | luffy | srft | grpo | sft | sft_then_grpo
#   OFFICIAL=1 METHOD=hpt bash recipes/qwen2.5_math_7b.sh # as the published code does it: README, "Deviations"
#
# Hardware   8 GPUs of 80 GB, one node
# Time       not measured by us (days: 500 steps of 1,024 rollouts of up to 8,192 tokens)
# Versions   composed and validated in CI against verl 0.9.1; not yet run on GPUs by us
# Expect     The paper's figures (arXiv 2509.04419, one run each; average of AIME24, AIME25, AMC, MATH-500, Minerva and
#            Olympiad), none of them ours:  SFT 44.5 · GRPO 43.1 · SFT→GRPO 46.5 · LUFFY 49.8 · SRFT 44.2 · HPT 52.7.
#            A later study (arXiv 2604.23747, three seeds) reaches 57.0 ± 0.3 with SFT→RL: try METHOD=sft_then_grpo too.
# More       methods, settings, data: recipes/math.sh; what differs from the published code: README, "Deviations"
set -euo pipefail
name=qwen2.5_math_7b model=Qwen/Qwen2.5-Math-7B tensor_parallel=2
model_changes=(--rope-theta 40000 --max-position-embeddings 16384)  # the model's own 4,096 positions are too few
gate=0.0 demo_coef=0.1 official_coef=16
# shellcheck source=recipes/math.sh
source "$(dirname "${BASH_SOURCE[0]}")/math.sh"
