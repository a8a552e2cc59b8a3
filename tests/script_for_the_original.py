# ruff: noqa
"""A script as users of the original write them: what `test_user_script.py` runs with other paths in its two path lines.

It makes every call and every check that the script of the users' own README makes.
"""

import torch
from video_llama.constants import *
from video_llama.conversation import conv_templates, SeparatorStyle
from video_llama.inference.load import load_pretrained_model
from video_llama.utils.utils import disable_torch_init
from video_llama.processor import load_processor, process_images, process_video, process_audio


def load(path):
    disable_torch_init()
    where = torch.device("cuda") if torch.cuda.is_available() else "cpu"
    loaded = load_pretrained_model(
        model_path=path, model_base=None, model_name="video_llama", device=where, half=True, verbose=True
    )
    return loaded, load_processor(), where


model_path = "checkpoints/Video-LLaMA-2-7B-Finetuned"
model, vis_processor, device = load(model_path)

conv = conv_templates["v1"].copy()
conv.messages = []

video_path = "clip.mp4"
prompt = "What happens in the video?"

if video_path.endswith((".mp4", ".avi", ".mov")):
    imgs, audio = process_video(video_path, vis_processor, device)
    audio_flag = True if audio is not None else False
    if len(imgs) > 0:
        conv.append_message(conv.roles[0], prompt)
        conv.append_message(conv.roles[1], "Let me think...")
        output = model.generate(imgs, audio if audio_flag else None, conv, temperature=0.7 if audio_flag else 0.2)
        conv.messages[-1][-1] = output
        print(f"Assistant: {output}")
elif video_path.endswith((".jpg", ".png")):
    image = process_images(video_path, vis_processor, device)
    if image is not None:
        conv.append_message(conv.roles[0], prompt)
        conv.append_message(conv.roles[1], "Let me think...")
        output = model.generate(image, None, conv, temperature=0.2)
        conv.messages[-1][-1] = output
        print(f"Assistant: {output}")
else:
    print("This format is not supported!")
