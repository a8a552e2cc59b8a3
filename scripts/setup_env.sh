# Sourced by the other scripts: enter a virtual environment and install the package there if it changed.
#   source scripts/setup_env.sh EXTRA      EXTRA is one of pyproject.toml's, e.g. dev, or "" for none. Always give it:
#                                          a sourced file without arguments sees those of the script.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=$1

fail() {
    echo "error: $1" >&2
    exit 1
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x "$root/.venv/bin/python" ]; then
        python=${PYTHON:-python3}
        command -v "$python" >/dev/null || fail "no $python found; install Python 3.10 or newer, or set PYTHON"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "$("$python" --version) is too old; install Python 3.10 or newer, or set PYTHON to one"
        echo "Creating a virtual environment in $root/.venv"
        "$python" -m venv "$root/.venv" || {
            rm -rf "$root/.venv"
            fail "no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv"
        }
    fi
    VIRTUAL_ENV=$root/.venv
    export VIRTUAL_ENV
    PATH=$VIRTUAL_ENV/bin:$PATH
fi

# What is installed is described by these files; their hash tells whether it is up to date.
requirements=${VIDEO_LLAMA_REQUIREMENTS:-$root/requirements.txt}
wanted=$(cat "$root/pyproject.toml" "$root/setup.py" "$requirements" | cksum)$root$extra
stamp=$VIRTUAL_ENV/.video_llama_installed_${extra:-base}
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing video_llama and what it needs (once; several GB, a few minutes)"
    python -m pip install --quiet --requirement "$requirements" --editable "$root${extra:+[$extra]}" ||
        fail "the installation failed; see pip's message above"
    echo "$wanted" >"$stamp"
fi

# A waiting OpenMP thread that spins makes token-by-token decoding several times slower on a busy machine.
export OMP_WAIT_POLICY=PASSIVE
export TOKENIZERS_PARALLELISM=false
