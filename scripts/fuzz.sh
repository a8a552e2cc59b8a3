#!/usr/bin/env bash
# Broken media, checkpoints, annotations and configurations for some minutes; a table, and what failed is kept.
#   bash scripts/fuzz.sh --minutes 20 --seed 1 [--keep FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev
cd "$root"
exec python -m tests.fuzz.run "$@"
