#!/usr/bin/env python
"""Pack a dataset into webdataset tar shards, which a cluster's file system reads faster than many small files.

    python scripts/make_shards.py --dataset webvid --anno data/webvid/annotations --media data/webvid/videos --out data/webvid_shards
    python scripts/make_shards.py --dataset cc_sbu_align --storage data/cc_sbu_align --out data/cc_sbu_align_shards
    python scripts/make_shards.py --cfg-path configs/train/visionbranch_stage2_finetune.yaml --dataset llava_instruct --out data/llava_shards

Media are copied byte for byte, annotations stay complete. The same files and limits give the same shards. After a stop,
run it again to continue. Train on the result as the dataset `shards` (docs/data.md).
"""  # noqa: E501

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from video_llama.config import Config, DatasetConfig, load_config
from video_llama.data.datasets import build_examples
from video_llama.data.examples import Example
from video_llama.data.packing import pack_examples
from video_llama.errors import ConfigError, VideoLlamaError

# Of each dataset, unless --data-type is given.
DATA_TYPES = {
    "webvid": "video",
    "webvid_instruct": "video",
    "webvid_instruct_zh": "video",
    "messages": "video",
    "cc_sbu_align": "images",
    "cc_sbu": "images",
    "laion": "images",
    "llava_instruct": "images",
    "audio_caption": "audio",
}
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size_in_bytes(text: str) -> int:
    """Return `500M` as a number."""
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 500M or 2G")
    return int(found[1]) * UNITS[found[2]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a dataset's name, as configurations have it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    where = parser.add_argument_group("place of the dataset")
    where.add_argument("--cfg-path", metavar="FILE", help="a training configuration with a section of that name")
    where.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the YAML")
    where.add_argument("--split", choices=["train", "validation"], default="train", help="of the YAML (train)")
    where.add_argument("--anno", metavar="PATH", help="annotation file or folder (build_info.anno_dir)")
    where.add_argument("--media", metavar="DIR", help="folder of the media (build_info.videos_dir)")
    where.add_argument("--storage", metavar="PATH", help="folder or shards of an image dataset (build_info.storage)")
    where.add_argument("--data-type", choices=["video", "images", "audio"], help="of the media, if not the usual one")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--max-count", type=int, default=1000, metavar="N", help="most examples of a shard (1000)")
    shards.add_argument("--max-size", type=size_in_bytes, default="1G", metavar="SIZE", help="most bytes of one (1G)")
    shards.add_argument("--skip-absent", action="store_true", help="leave out examples whose files are absent")
    return parser


def read_examples(arguments: argparse.Namespace) -> tuple[Sequence[Example], str]:
    """Return the examples to pack, and their data type.

    Raises:
        ConfigError, DatasetError: there is no such dataset.
    """
    name = arguments.dataset
    config = Config() if arguments.cfg_path is None else load_config(arguments.cfg_path, arguments.options)
    if arguments.cfg_path is not None and name not in config.datasets:
        raise ConfigError(f"{arguments.cfg_path}: no dataset {name!r} (it has {', '.join(config.datasets) or 'none'})")
    section = config.datasets.get(name) or DatasetConfig(data_type=DATA_TYPES.get(name.partition(":")[0], "video"))
    info = section.build_info if arguments.split == "train" else section.valid_build_info
    given = {"anno_dir": arguments.anno, "videos_dir": arguments.media, "storage": arguments.storage}
    # The other keys of the section, such as names of columns, hold for its files wherever they are.
    info = dataclasses.replace(info, **{key: value for key, value in given.items() if value})
    if info.streaming:
        raise ConfigError(f"datasets.{name}: a stream cannot be packed; leave build_info.streaming out")
    section.data_type = arguments.data_type or section.data_type
    return build_examples(name, section, info), section.data_type


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        examples, data_type = read_examples(arguments)
        with tqdm(total=len(examples), unit="example", desc="packing") as bar:
            packed = pack_examples(
                examples,
                arguments.out,
                max_count=arguments.max_count,
                max_bytes=arguments.max_size,
                skip_absent=arguments.skip_absent,
                advance=bar.update,
            )
    except VideoLlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {arguments.out}: {packed.num_examples} examples in {len(packed.shards)} shards")
    if packed.absent:
        print(f"left out: {len(packed.absent)} examples without their files (absent.jsonl)")
    name = arguments.dataset.replace(":", "_")
    section = f"data_type: {data_type}\n    build_info: {{storage: {arguments.out}}}"
    print(f"in a configuration:\n  shards:{name}:\n    {section}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
