#!/usr/bin/env bash
# Run the tests of an engine of others with that engine installed, each in an environment of its own:
#   bash scripts/test_engines.sh lmms|all [arguments of pytest]
# The environments are in .venv-engines/; the ordinary suite skips these tests.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
engines="lmms"

usage() {
    echo "usage: bash scripts/test_engines.sh lmms|all [arguments of pytest]" >&2
    exit 2
}

test_engine() (
    export VIRTUAL_ENV=$root/.venv-engines/$1
    if [ ! -x "$VIRTUAL_ENV/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$VIRTUAL_ENV"
    fi
    export PATH=$VIRTUAL_ENV/bin:$PATH VIDEO_LLAMA_REQUIREMENTS=$root/requirements/engines-$1.txt
    source "$root/scripts/setup_env.sh" ""
    cd "$root"
    echo "Testing the engine $1"
    OMP_NUM_THREADS=1 python -m pytest "tests/integrations/test_$2.py" "${@:3}"
)

engine=${1:-}
[ $# -gt 0 ] && shift
case $engine in
lmms) test_engine lmms lmms_eval "$@" ;;
all) for name in $engines; do bash "${BASH_SOURCE[0]}" "$name" "$@"; done ;;
*) usage ;;
esac
