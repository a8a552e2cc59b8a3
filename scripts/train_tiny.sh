#!/usr/bin/env bash
# Make the small model of the package from nothing: generated corpus, pretrained parts, both stages of both branches,
# one folder of safetensors, evaluation on clips from another seed. What is done already is skipped, and what was
# interrupted goes on.
#   bash scripts/train_tiny.sh [FOLDER]      # output/tiny
#   TINY_SCALE=smoke bash scripts/train_tiny.sh /tmp/smoke      # a few minutes, only to see that it runs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ""

out=${1:-output/tiny}
scale=${TINY_SCALE:-full}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
run() { python "$root/$1" "${@:2}"; }

clips=6000 test_clips=500 options=()
if [ "$scale" = smoke ]; then
    clips=160 test_clips=12
    options=(run.iters_per_epoch=5 run.batch_size_train=4 run.warmup_steps=2 run.max_valid_batches=1)
fi

[ -e "$out/corpus/corpus.json" ] ||
    { rm -rf "$out/corpus"; run scripts/make_clipworld.py --out "$out/corpus" --clips $clips --seed 1 --splits 96 4 0 --workers 2; }
[ -e "$out/test/corpus.json" ] ||
    { rm -rf "$out/test"; run scripts/make_clipworld.py --out "$out/test" --clips $test_clips --seed 7 --splits 0 0 1 --workers 2; }

# The frame encoder takes as long as the language model and the sound encoder together; two cores do both at once.
if [ ! -e "$out/pretrained/config.json" ]; then
    parts=(scripts/pretrain_tiny.py --corpus "$out/corpus" --work "$out/parts" --scale "$scale" --parts)
    run "${parts[@]}" # the tokenizer, which all share
    run "${parts[@]}" language sound >>"$out/language_and_sound.log" 2>&1 &
    beside=$!
    trap 'kill $beside 2>/dev/null || true' EXIT
    run "${parts[@]}" vision
    echo "waiting for the language model and the sound encoder ($out/language_and_sound.log)"
    wait $beside
    trap - EXIT
    run "${parts[@]}" qformer --output "$out/pretrained"
fi

stage() { # NAME LAST_CHECKPOINT [OPTION...]
    if [ ! -e "$out/$1/$2" ]; then
        sed "s|output/tiny|$out|g" "$root/configs/train/tiny_$1.yaml" >"$out/$1.yaml"
        run train.py --cfg-path "$out/$1.yaml" ${options[@]+--options "${options[@]}"}
    fi
}
both() { # STAGE LAST_CHECKPOINT LAST_CHECKPOINT_OF_AUDIO: its vision and its audio branch at the same time
    stage "audiobranch_$1" "checkpoint_$3.pth" >>"$out/audiobranch_$1.log" 2>&1 &
    beside=$!
    trap 'kill $beside 2>/dev/null || true' EXIT
    stage "visionbranch_$1" "checkpoint_$2.pth"
    echo "waiting for the audio branch ($out/audiobranch_$1.log)"
    wait $beside
    trap - EXIT
}
both stage1_pretrain 1 0
both stage2_finetune 7 0

save() { # FOLDER VISION AUDIO
    [ ! -e "$out/$1/config.json" ] || return 0
    rm -rf "$out/original_$1" "$out/$1"
    mkdir "$out/original_$1"
    cp -R "$out/pretrained/." "$out/original_$1"
    cp "$out/$2" "$out/original_$1/VL_tiny.pth"
    cp "$out/$3" "$out/original_$1/AL_tiny.pth"
    run scripts/convert_checkpoint.py "$out/original_$1" "$out/$1" --conv-template video_llama_2 --dtype bfloat16
}
save stage1 visionbranch_stage1_pretrain/checkpoint_1.pth audiobranch_stage1_pretrain/checkpoint_0.pth
save video-llama-tiny visionbranch_stage2_finetune/checkpoint_7.pth audiobranch_stage2_finetune/checkpoint_0.pth

# Two at a time, one on each core; the figures of both stages and of what each part does lie beside the models.
evaluate() { # FIGURES MODEL [OPTION...]
    [ -e "$out/$1.json" ] || run scripts/evaluate.py --model "$out/$2" --data "$out/test" --json "$out/$1.json" "${@:3}"
}
evaluate stage1 stage1 >"$out/stage1.log" 2>&1 &
beside=$!
evaluate video-llama-tiny video-llama-tiny
wait $beside
for pair in "frame_positions video_qformer" "audio_qformer audio" "shuffle_frames swap_audio"; do
    evaluate "without_${pair#* }" video-llama-tiny --limit 100 --ablate "${pair#* }" >"$out/without_${pair#* }.log" 2>&1 &
    beside=$!
    evaluate "without_${pair% *}" video-llama-tiny --limit 100 --ablate "${pair% *}"
    wait $beside
done
echo "done in $((SECONDS / 60)) minutes: $out/video-llama-tiny, its figures in $out/video-llama-tiny.json"
