#!/usr/bin/env bash
# The paper's small model: Qwen2.5-Math-1.5B. As recipes/qwen2.5_math_7b.sh, with demonstrations weighted 0.3 times.
#
#   METHOD=hpt bash recipes/qwen2.5_math_1.5b.sh          # hpt | luffy | srft | grpo | sft | sft_then_grpo
#
# Hardware   8 GPUs of 80 GB, one node
# Time       not measured by us
# Versions   composed and validated in CI against verl 0.9.1; not yet run on GPUs by us
# Expect     The paper's figures (arXiv 2509.04419, one run each; the same average as for the 7B model), none of them
#            ours:  SFT 36.9 · GRPO 34.0 · LUFFY 34.7 · HPT 41.9. The paper has none for SRFT and SFT→GRPO.
# More       methods, settings, data: recipes/math.sh; what differs from the published code: README, "Deviations"
set -euo pipefail
name=qwen2.5_math_1.5b model=Qwen/Qwen2.5-Math-1.5B tensor_parallel=1
model_changes=(--rope-theta 40000 --max-position-embeddings 16384)  # the model's own 4,096 positions are too few
gate=0.0 demo_coef=0.03 official_coef=4.8
# shellcheck source=recipes/math.sh
source "$(dirname "${BASH_SOURCE[0]}")/math.sh"
