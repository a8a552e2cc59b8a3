#!/usr/bin/env bash
# Run the tests of an engine of others with that engine installed, each in an environment of its own:
#   bash scripts/test_engines.sh lmms|ray|vllm|all [arguments of pytest]
# The environments are in .venv-engines/; the ordinary suite skips these tests.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
engines="lmms ray vllm"

usage() {
    echo "usage: bash scripts/test_engines.sh lmms|ray|vllm|all [arguments of pytest]" >&2
    exit 2
}

# PyPI has torchvision, torchaudio and torchcodec for CUDA alone. Beside torch's CPU build, which vLLM for the CPU pins,
# their compiled parts do not load, and importing them fails. Nothing here uses those parts, so they go.
fit_to_cpu_torch() {
    local site
    site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -c "import torchvision" 2>/dev/null || : >"$site/torchvision/_meta_registrations.py"
    python -c "import torchaudio" 2>/dev/null || rm -rf "$site/torchaudio/lib"
    python -c "import torchcodec" 2>/dev/null || rm -rf "$site/torchcodec"
}

# Ray wants other releases of nothing, so its environment may find the packages of the suite's: that saves gigabytes.
build_upon_the_suite() {
    local suite=${VIRTUAL_ENV:-$root/.venv} site='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$suite/bin/python" -m venv "$root/.venv-engines/$1"
    "$suite/bin/python" -c "$site" >"$("$root/.venv-engines/$1/bin/python" -c "$site")/suite.pth"
}

test_engine() (
    if [ "$1" = ray ] && [ ! -e "$root/.venv-engines/$1" ] && [ -x "${VIRTUAL_ENV:-$root/.venv}/bin/python" ]; then
        build_upon_the_suite "$1"
    fi
    export VIRTUAL_ENV=$root/.venv-engines/$1
    if [ ! -x "$VIRTUAL_ENV/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$VIRTUAL_ENV"
    fi
    export PATH=$VIRTUAL_ENV/bin:$PATH VIDEO_LLAMA_REQUIREMENTS=$root/requirements/engines-$1.txt
    source "$root/scripts/setup_env.sh" ""
    if [ "$1" = vllm ]; then
        fit_to_cpu_torch
    fi
    cd "$root"
    echo "Testing the engine $1"
    OMP_NUM_THREADS=1 python -m pytest "tests/integrations/test_$2"*.py "${@:3}"
)

engine=${1:-}
[ $# -gt 0 ] && shift
case $engine in
lmms) test_engine lmms lmms_eval "$@" ;;
ray) test_engine ray ray "$@" ;;
vllm) test_engine vllm vllm "$@" ;;
all) for name in $engines; do bash "${BASH_SOURCE[0]}" "$name" "$@"; done ;;
*) usage ;;
esac
