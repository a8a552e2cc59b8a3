"""Video-LLaMA as a model of vLLM: the package's branches, and any language model that vLLM knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from video_llama.integrations.vllm.inputs import (
    INPUTS,
    VideoLlamaDummyInputs,
    VideoLlamaInfo,
    VideoLlamaMultiModalProcessor,
)
from video_llama.model.audio_branch import AudioBranch
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.encoder_graph import CHUNK_SIZE
from video_llama.model.precision import kept_dtype
from video_llama.model.video_branch import build_video_branch
from video_llama.processor.collate import pad_items

__all__ = ["VideoLlamaForConditionalGeneration"]


@MULTIMODAL_REGISTRY.register_processor(
    VideoLlamaMultiModalProcessor, info=VideoLlamaInfo, dummy_inputs=VideoLlamaDummyInputs
)
class VideoLlamaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """Answer text about videos, images and audio."""

    # Layers that vLLM computes as one, by the names that quantizations and adapters know.
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # Adapters name the parts as they are in memory elsewhere; files of weights have the names used here.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.video_branch.": "video_branch.",
            "model.audio_branch.": "audio_branch.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return nothing: no text stands for media, the renderer writes the prompts."""
        return None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config: VideoLlamaConfig = vllm_config.model_config.hf_config
        self.config = config
        # vLLM leaves out what a server does not use: the branch of media that are limited to none.
        mark: Any = self
        with mark._mark_tower_model(vllm_config, {"image", "video"}):
            self.video_branch = _prepared(build_video_branch(config))
        self.audio_branch: nn.Module | None = None
        if config.use_audio:
            with mark._mark_tower_model(vllm_config, "audio"):
                self.audio_branch = _prepared(AudioBranch(config))
        with mark._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                hf_config=config.text_config,
                architectures=_architectures(config.text_config),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Return the language-model tokens of each media item, (tokens, width), of one kind after the other.

        Args:
            kwargs: by `INPUTS`, items of one length as one tensor, of several as a list.
        """
        branches: dict[str, Any] = {"image": self.video_branch, "video": self.video_branch, "audio": self.audio_branch}
        features: list[Tensor] = []
        for kind, name in INPUTS.items():
            if kwargs.get(name) is not None:
                items, mask = pad_items(list(kwargs[name]))
                features += branches[kind](items, mask).unbind()
        return features

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the layers of the language model; vLLM has put the features into `inputs_embeds`."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits of hidden states."""
        logits: Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a saved folder; an audio branch that is left out stays in its file, as in `from_pretrained`."""
        loader = AutoWeightsLoader(self, ignore_unexpected_prefixes=["audio_branch."])
        loaded: set[str] = loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        """Return which parts are what: adapters are those of the language model."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector=[], tower_model=["video_branch", "audio_branch"]
        )


def _prepared(branch: Any) -> Any:
    """Return a branch with its float32 parts; vLLM has built all of it in the precision of the model."""
    for name, parameter in branch.named_parameters():
        parameter.data = parameter.data.to(kept_dtype(name, parameter.dtype))
    # vLLM measures memory and records CUDA graphs itself; the branches must not do it, too.
    branch.chunk_size = CHUNK_SIZE
    return branch


def _architectures(text_config: Any) -> Sequence[str]:
    """Return the class of a language model, also where its configuration does not name it."""
    named: Sequence[str] | None = text_config.architectures
    return named or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]]
