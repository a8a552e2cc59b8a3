#!/usr/bin/env bash
# Ask about a file: bash scripts/demo.sh [FILE [QUESTION]] [options of demo_video.py]
# VIDEO_LLAMA_MODEL names the checkpoint folder or hub id; without it a tiny model with random weights answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ""

file=$root/video_llama/demo/samples/ball.mp4
question="What do you see and hear?"
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    file=$1
    shift
fi
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    question=$1
    shift
fi

model=${VIDEO_LLAMA_MODEL:-}
if [ -z "$model" ]; then
    model=$root/output/random-tiny
    [ -e "$model/config.json" ] || python "$root/scripts/make_random_checkpoint.py" --size tiny --layout hf --output "$model"
    echo "No VIDEO_LLAMA_MODEL is set: a tiny model with random weights answers, so its words mean nothing." >&2
fi
python "$root/demo_video.py" --model "$model" --input "$file" --question "$question" --max-new-tokens 64 "$@"
