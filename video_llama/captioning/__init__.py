"""Caption a corpus: from files, folders, lists and shards to lines of JSON, in one pass that a kill does not undo."""

from video_llama.captioning.corpus import CorpusSettings, caption_corpus, default_workers
from video_llama.captioning.inputs import Clip, ShardMember, find_clips, take_shard
from video_llama.captioning.profile import RunProfile
from video_llama.captioning.records import CaptionFile, file_of_shard

__all__ = [
    "CaptionFile",
    "Clip",
    "CorpusSettings",
    "RunProfile",
    "ShardMember",
    "caption_corpus",
    "default_workers",
    "file_of_shard",
    "find_clips",
    "take_shard",
]
