"""Packaging of video_llama: ranges of what is known to work; requirements.txt holds one set of versions."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

INSTALL_REQUIRES = [
    "torch>=2.9",  # tensors, training
    "torchvision",  # image transforms; timm needs it too
    "torchaudio",  # Kaldi filter bank and resampling of sound
    "transformers>=5.20,<6",  # language models, Q-Former, saving, generation
    "timm>=1.0.20,<2",  # EVA ViT
    "decord2>=3.4,<4",  # `import decord`: frames of videos; the maintained distribution of decord
    "av>=16,<20",  # PyAV: sound tracks of videos, and a second video reader
    "soundfile>=0.13",  # plain sound files
    "pillow>=11",  # images
    "numpy>=2",  # what the decoders return
    "omegaconf>=2.3",  # YAML configurations with a schema
    "pyyaml>=6",  # YAML errors and values on the command line
    "accelerate>=1.15,<2",  # training on several devices, device_map
    "psutil>=5.9",  # how a run was launched
    "safetensors>=0.6",  # weights
    "huggingface_hub>=1,<3",  # downloads with resume
    "sentencepiece>=0.2.1",  # LLaMA's tokenizer
    "protobuf>=5",  # transformers reads sentencepiece models through it
    "einops>=0.8",  # tensor rearrangements in words
    "webdataset>=1.0.2,<2",  # training data in shards
    "gradio>=6.31,<7",  # the web demo
    "tqdm>=4.66",  # progress bars
]
EXTRAS_REQUIRE = {
    "quantization": ["bitsandbytes>=0.48"],
    "trackers": ["tensorboard>=2.18", "wandb>=0.19"],
    "metrics": ["pycocoevalcap>=1.2"],  # BLEU, ROUGE-L and CIDEr in scripts/evaluate.py
    "plots": ["matplotlib>=3.9"],  # scripts/plot_training.py
    "dev": [
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "pycocoevalcap>=1.2",
        "playwright>=1.50",  # drives Chromium in the tests of the page
        "pytest>=9",
        "pytest-xdist>=3.6",
        "hypothesis>=6.120",
        "ruff>=0.14",
        "mypy>=1.18",
        "types-PyYAML",
        "types-tqdm",
        "types-Pillow",
    ],
}


setup(
    name="video_llama",
    version="0.1.0",
    description="Train and run Video-LLaMA, the audio-visual language model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["video_llama", "video_llama.*"]),
    package_data={
        "video_llama": [
            "py.typed",
            "demo/samples/*",
            "demo/*.css",
            "demo/*.js",
            "models/*/*",
            "models/*/*/*",
        ]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
