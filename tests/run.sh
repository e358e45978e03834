#!/usr/bin/env bash
# All tests, on a fresh machine too: makes .venv as the CPU recipes do, checks style and layers, runs pytest.
#
#   bash tests/run.sh                       # everything, real trainings included
#   bash tests/run.sh --ignore=tests/e2e    # without the trainings; arguments go to pytest
#
# Hardware   no GPU; 2 cores, 24 GiB of memory
# Data       the tests make their own (tests/made_data.py). The same tests run on the real files, GSM8K and the paper's
#            evaluation sets, where VERL_HPT_TEST_DATA names their folder; a folder that lacks one is an error.
set -euo pipefail
CPU_EXTRAS=dev
# shellcheck source=recipes/cpu_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/cpu_env.sh"
cd "$repo"
cpu_install
export PATH=$venv/bin:$PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
ruff check .
ruff format --check .
lint-imports
python -m pytest -q --durations=15 "$@"
