"""Define the schema of YAML configurations: of each key its type, default, choices and range.

Sections and keys are those of the original's files; new ones are marked. `video_llama.config` reads and writes files
of this form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "EVA_VIT_G_URL",
    "FREEZING_KEYS",
    "QFORMER_URL",
    "BuildInfo",
    "Config",
    "DatasetConfig",
    "FeaturesConfig",
    "LoraConfig",
    "ModelConfig",
    "ProcessorConfig",
    "ProcessorSplits",
    "RunConfig",
    "setting",
]

EVA_VIT_G_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
QFORMER_URL = (
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/blip2_pretrained_flant5xxl.pth"
)

# Families of the original's language models, and the names of `conversation.conv_templates`.
MODEL_TYPES = (
    *("pretrain_llama_v2", "pretrain_vicuna", "llama_v2", "vicuna", "tokenizer"),
    *("default", "v1", "vision", "video_vicuna", "instruct_vicuna", "llama_2", "video_llama_2"),
)
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FREEZING_KEYS: dict[str, str | None] = {
    "frame_encoder": "freeze_vit",
    "frame_qformer": "freeze_qformer",
    "video_qformer": "frozen_video_Qformer",
    "video_projection": "frozen_llama_proj",
    "audio_qformer": "frozen_audio_Qformer",
    "audio_projection": "frozen_audio_Qformer",
    "language_model": None,
}
"""The parts that can train, each with the original's key of the model section that freezes it."""
LORA_TARGETS = ("language_model", "qformers", "frame_encoder", "frame_qformer", "video_qformer", "audio_qformer")
SPLITS = {"instead": "datasets.NAME.build_info names the training split, valid_build_info a validation split"}


def setting(default: Any, *, choices: tuple[str, ...] = (), instead: str = "", **bounds: float) -> Any:
    """Return a dataclass field with what its values may be; null is allowed where the type allows it.

    Args:
        default: of the field.
        choices: the values there are, of a list those of its items; empty for all.
        instead: of a key that is accepted only so that the original's files load: what has its effect here.
        bounds: `at_least`, `more_than`, `at_most` or `less_than`, each with its number.
    """
    return field(default=default, metadata={"choices": choices, "instead": instead, "bounds": bounds})


@dataclass
class ModelConfig:
    """Which model to build, from which files, and what of it stays frozen.

    Args:
        model_type: the conversation template: a family of the original's, the name of a template, or "tokenizer" for
            the language model's own; null takes the one that belongs to the language model.
        llama_model: folder or hub id of the language model.
        imagebind_ckpt_path: `imagebind_huge.pth`, or its folder.
        llama_proj_model: MiniGPT-4 checkpoint whose projection starts stage 1.
        ckpt: checkpoint of the vision branch (`VL_*.pth`), the output folder of its training (its last epoch
            counts, or its best with `run.load_best_model_at_end`), or a folder written by `save_pretrained`.
        ckpt_2: checkpoint of the audio branch (`AL_*.pth`), or the output folder of its training.
        frame_encoder, audio_encoder, connector: parts of the model by name, each with its keys; the published ones by
            default (docs/parts.md; new).
        plugins: Python modules that register such parts (new).
        vit_ckpt: `eva_vit_g.pth`, a path or an address (new; the original's address is built in).
        q_former_model: BLIP-2 checkpoint, a path or an address.
        adapter: folder of a PEFT adapter, or of a run that trained one; it answers with the model, and goes on training
            in a run (new).
        unfreeze: the parts that train, in place of the original's keys (`freeze_vit` to `frozen_audio_Qformer`; new).
        max_txt_len: longest text of a training sample, in tokens.
        end_sym: what ends an answer.
        prompt_path: file of prompts, of which stage 1 takes the lines that contain `<ImageHere>`.
        prompt_template: text around such a prompt; `{}` is the prompt.
        low_resource: the language model in 8 bit, as `load_in_8bit`.
        dtype: auto, float32, bfloat16 or float16 (new).
        load_in_8bit, load_in_4bit: quantize the language model (new).
        device_map: how accelerate spreads the language model over devices, e.g. "auto" (new).
        attn_implementation: eager, sdpa or flash_attention_2 (new).
    """

    # Which files.
    arch: str = "video_llama"
    model_type: str | None = setting(None, choices=MODEL_TYPES)
    llama_model: str | None = None
    imagebind_ckpt_path: str | None = None
    llama_proj_model: str | None = None
    ckpt: str | None = None
    ckpt_2: str | None = None
    vit_ckpt: str | None = EVA_VIT_G_URL
    q_former_model: str | None = QFORMER_URL
    adapter: str | None = None

    # Other parts than the published ones.
    frame_encoder: dict[str, Any] = field(default_factory=dict)
    audio_encoder: dict[str, Any] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)

    # Sizes, and what stays frozen.
    vit_model: str = setting("eva_clip_g", choices=("eva_clip_g",))
    image_size: int = 224
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    vit_precision: str = setting("fp16", choices=("fp16", "bf16", "fp32"), instead="model.dtype sets the precision")
    freeze_vit: bool = True
    freeze_qformer: bool = True
    num_query_token: int = 32
    fusion_header_type: str = setting("seqTransf", choices=("seqTransf",))
    fusion_head_layers: int = 2
    max_frame_pos: int = 32
    num_video_query_token: int = 32
    num_audio_query_token: int = 8
    equip_audio_branch: bool = True
    frozen_llama_proj: bool = True
    frozen_video_Qformer: bool = True
    frozen_audio_Qformer: bool = True
    unfreeze: list[str] | None = field(default=None, metadata={"choices": tuple(FREEZING_KEYS)})

    # Text.
    max_txt_len: int = setting(32, at_least=1)
    end_sym: str = "\n"
    prompt_path: str | None = None
    prompt_template: str = ""

    # Precision and devices.
    low_resource: bool = False
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    device_map: str | None = None
    attn_implementation: str | None = setting(None, choices=ATTENTION)


@dataclass
class ProcessorConfig:
    """One processor by its registered name; null settings keep the processor's own defaults.

    Args:
        video_reader: what decodes frames: "pyav" or "decord" (new).
    """

    name: str | None = None
    n_frms: int | None = setting(None, at_least=1)
    image_size: int | None = setting(None, at_least=1)
    mean: list[float] | None = None
    std: list[float] | None = None
    min_scale: float | None = None
    max_scale: float | None = None
    video_reader: str | None = None
    prompt: str | None = None
    max_words: int | None = None


@dataclass
class ProcessorSplits:
    """Name the processors of training and of evaluation."""

    train: ProcessorConfig = field(default_factory=ProcessorConfig)
    eval: ProcessorConfig = field(default_factory=ProcessorConfig)


@dataclass
class BuildInfo:
    """Where a dataset is.

    Args:
        anno_dir: annotation file, or folder of annotation files.
        videos_dir: folder that the annotations' media paths are relative to.
        storage: folder of an image dataset, or pattern of its shards.
        media_column, text_column, question_column: columns of a table (new); usual names by default. With a question,
            the text is its answer.
        subset, split: of a Hugging Face dataset (new).
        streaming: read a Hugging Face dataset as it comes, without downloading it first (new).
        shuffle_buffer: rows of a stream that are shuffled at a time, and held in memory (new).
    """

    anno_dir: str | None = None
    videos_dir: str | None = None
    storage: str | None = None
    media_column: str | None = None
    text_column: str | None = None
    question_column: str | None = None
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    shuffle_buffer: int = setting(1000, at_least=1)


@dataclass
class DatasetConfig:
    """One dataset of the mixture.

    Args:
        data_type: "video", "images", or "audio" for the audio tracks of the files (new).
        build_info: where the training split is.
        valid_build_info: where a validation split is (new); none by default.
        sample_ratio: share of the batches relative to the other datasets; their size by default.
        num_video_query_token: placeholder tokens of one media item, for instruction data.
        model_type: template of dialogues, as `model.model_type`; one of the two keys is enough.
        clean_captions: whether `text_processor` cleans captions (new); by default as the original does: not those of
            `cc_sbu_align`.
        skip_silent: leave out samples whose audio is read from a file without audio track (new); by default they are
            bad samples.
    """

    data_type: str = setting("video", choices=("video", "images", "audio"))
    build_info: BuildInfo = field(default_factory=BuildInfo)
    valid_build_info: BuildInfo = field(default_factory=BuildInfo)
    vis_processor: ProcessorSplits = field(default_factory=ProcessorSplits)
    text_processor: ProcessorSplits = field(default_factory=ProcessorSplits)
    sample_ratio: float | None = None
    num_video_query_token: int | None = None
    tokenizer_name: str | None = setting(None, instead="all data takes the tokenizer of model.llama_model")
    model_type: str | None = None
    clean_captions: bool | None = None
    skip_silent: bool = False


@dataclass
class RunConfig:
    """How to train; steps, epochs and rates as in the original.

    Args:
        task: `video_text_pretrain` or `image_text_pretrain`; they train alike.
        max_epoch, iters_per_epoch: how long; an iteration is one batch of each process. With `iters_per_epoch: null`
            an epoch is one pass over the data: every sample of every dataset once.
        batch_size_train, batch_size_eval: of each process.
        accum_grad_iters: iterations whose gradients are summed for one step of the optimizer.
        group_by_length: batches of dialogues and captions of like length, so that less of them is padding (new).
        log_freq: iterations between two lines of the log.
        output_dir: where the log, checkpoints and the resolved configuration go.
        amp: mixed precision, in that of the frozen weights (`model.dtype`): by default bfloat16 where the device
            computes in it, float16 on other GPUs; none with float32.
        device: cpu or cuda; by default a GPU if there is one.
        resume_ckpt_path: a checkpoint folder to continue from; "auto" takes the newest of `output_dir`, if any.
        evaluate: only validate.
        world_size: if more than 1, the number of processes there must be.
        part_lr: the `init_lr` of single parts, by their names in `model.unfreeze` and `lora` for adapters; warm-up and
            `min_lr` change in the same proportion (new).
        max_grad_norm: clip the gradient to this norm; null does not (new).
        save_freq: iterations between two checkpoints within an epoch; 0 saves at the end of epochs only (new).
        keep_checkpoints: how many of them to keep (new).
        on_nan: "stop" at a loss that is not finite, or "skip" that step (new).
        max_bad_samples: share of unusable samples above which training stops (new).
        valid_freq: iterations between two validations within an epoch; 0 validates at the end of epochs only (new).
        max_valid_batches: batches of each process and dataset to validate on; of a larger dataset they are drawn by the
            seed, the same ones each time (new).
        num_generations: answers to generate and log at each validation (new).
        early_stopping_patience: validations without a lower loss after which the run stops; null never does (new).
        early_stopping_threshold: by how much a loss must be lower to count for that (new).
        load_best_model_at_end: the output folder, as a model, is its best checkpoint and not its last (new).
        trackers: of accelerate: "tensorboard", "wandb" (new).
        project, run_name: what trackers call the project and the run; by default the run has no name (new).
        deterministic: the same run on the same GPU gives the same bits, more slowly (new).
        compile: compile the language model's layers with `torch.compile` (new).
    """

    task: str = setting("video_text_pretrain", choices=("video_text_pretrain", "image_text_pretrain"))
    runner: str = setting("runner_base", choices=("runner_base",))
    # Rates; warm-up and schedule count iterations.
    lr_sched: str = "linear_warmup_cosine_lr"
    init_lr: float = setting(1e-4, at_least=0, less_than=math.inf)
    min_lr: float = setting(8e-5, at_least=0, less_than=math.inf)
    warmup_lr: float = -1.0
    warmup_steps: int = setting(0, at_least=0)
    lr_decay_rate: float = setting(1.0, at_least=0, less_than=math.inf)
    weight_decay: float = setting(0.05, at_least=0, less_than=math.inf)
    beta2: float = setting(0.999, at_least=0, less_than=1)
    # Amounts.
    max_epoch: int = setting(1, at_least=1)
    iters_per_epoch: int | None = setting(1000, at_least=1)
    batch_size_train: int = setting(32, at_least=1)
    batch_size_eval: int = setting(32, at_least=1)
    num_workers: int = setting(4, at_least=0)
    accum_grad_iters: int = setting(1, at_least=1)
    group_by_length: bool = False
    log_freq: int = setting(50, at_least=1)
    seed: int = setting(42, at_least=0)
    # Output, resuming, splits and processes.
    output_dir: str = "output"
    amp: bool = True
    resume_ckpt_path: str | None = None
    evaluate: bool = False
    train_splits: list[str] = field(default_factory=lambda: ["train"], metadata=SPLITS)
    valid_splits: list[str] = field(default_factory=list, metadata=SPLITS)
    test_splits: list[str] = field(default_factory=list, metadata=SPLITS)
    device: str | None = None
    world_size: int = setting(1, at_least=1)
    dist_url: str = setting("env://", instead="torchrun or accelerate launch set the rendezvous")
    distributed: bool = setting(True, instead="torchrun or accelerate launch make a run distributed")
    # New keys.
    part_lr: dict[str, float] = field(default_factory=dict)
    max_grad_norm: float | None = setting(None, more_than=0)
    save_freq: int = setting(0, at_least=0)
    keep_checkpoints: int = setting(3, at_least=1)
    on_nan: str = setting("stop", choices=("stop", "skip"))
    max_bad_samples: float = setting(0.01, at_least=0, at_most=1)
    valid_freq: int = setting(0, at_least=0)
    max_valid_batches: int = setting(50, at_least=1)
    num_generations: int = setting(4, at_least=0)
    early_stopping_patience: int | None = setting(None, at_least=1)
    early_stopping_threshold: float = setting(0.0, at_least=0, less_than=math.inf)
    load_best_model_at_end: bool = False
    trackers: list[str] = field(default_factory=list)
    project: str = "video_llama"
    run_name: str | None = None
    deterministic: bool = False
    compile: bool = False


@dataclass
class FeaturesConfig:
    """Outputs of the frozen encoders kept on disk, so that each file is encoded once (new).

    Args:
        dir: folder of the cache; null encodes every file each time. With it, media are read without random crops,
            since features of a crop serve only once.
        encoding: how features are stored: "float32", "bfloat16", or "int8" with a scale for each token.
    """

    dir: str | None = None
    encoding: str = setting("bfloat16", choices=("float32", "bfloat16", "int8"))


@dataclass
class LoraConfig:
    """Adapters of low rank (Hu et al. 2021) that train in place of the weights beside them, by PEFT (new).

    Args:
        target: the parts that get adapters; `qformers` are all Q-Formers of the model. None by default.
        r: rank.
        alpha: the product of the two matrices counts `alpha / r` times.
        dropout: of their input, while they train.
        modules: the linear layers that get adapters, by the end of their names, e.g. [q_proj, v_proj]; by default all
            of the target.
    """

    target: list[str] | None = field(default=None, metadata={"choices": LORA_TARGETS})
    r: int = setting(16, at_least=1)
    alpha: float = setting(32.0, more_than=0)
    dropout: float = setting(0.0, at_least=0, less_than=1)
    modules: list[str] | None = None


@dataclass
class Config:
    """A whole configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    run: RunConfig = field(default_factory=RunConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
