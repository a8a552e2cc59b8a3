#!/usr/bin/env bash
# Ask about a file: bash scripts/demo.sh [FILE [QUESTION]] [options of demo_video.py]
# Without arguments it asks about a bundled clip. VIDEO_LLAMA_MODEL names a checkpoint folder or hub id; without it the
# small model of the package answers, which knows a generated world of moving shapes and sounds and nothing else.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ""

file=$root/video_llama/demo/samples/stars.mp4
questions=("What happens in the video?" "And which way does it go?" "And what did you hear?")
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    file=$1
    questions=("What happens in the video?")
    shift
fi
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    questions=("$1")
    shift
fi

model=${VIDEO_LLAMA_MODEL:-video-llama-tiny}
if [ "$model" = video-llama-tiny ]; then
    echo "The small model answers: it was trained on generated clips and knows nothing of the world." >&2
fi
python "$root/demo_video.py" --model "$model" --input "$file" --question "${questions[@]}" --max-new-tokens 64 "$@"
