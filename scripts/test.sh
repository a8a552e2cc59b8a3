#!/usr/bin/env bash
# Lint, types and tests. Further arguments go to pytest: bash scripts/test.sh tests/model -k cache
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev
cd "$root"

ruff check .
ruff format --check .
mypy
# Two workers with one thread each: small models gain nothing from more threads.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@"
