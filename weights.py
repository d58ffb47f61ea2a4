"""Weights from elsewhere, by what is in the file: timm, torchvision, MAE, DINO, transformers, DDP, Lightning.

common.read_file comes here with every file that is not one of ours, and gets back the form of ours:
{"model": {name: tensor}, "meta": what the tensors show of their network}.
"""

import argparse
import functools
import json
import math
import re

import torch

from beit import TABLE, from_beit, table_side
from common import VIT_SIZES, UserError, load_pickled, print0

# transformers' names of ViT and ViTMAE, in the order they are replaced; those of version 5 behind the "|".
RENAMED = (
    (r"\bvit\.", ""),
    (r"\bembeddings\.cls_token", "cls_token"),
    (r"\bembeddings\.position_embeddings", "pos_embed"),
    (r"\bembeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"\bdecoder\.decoder_(encoder\.layer|layers)\.", "decoder_blocks."),
    (r"\bdecoder\.(decoder_|mask_token)", r"\1"),
    (r"\b(encoder\.layer|layers)\.(\d+)", r"blocks.\2"),
    (r"attention\.(attention\.query|q_proj)", "attn.0"),
    (r"attention\.(attention\.key|k_proj)", "attn.1"),
    (r"attention\.(attention\.value|v_proj)", "attn.2"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"\boutput\.dense", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"\blayernorm\.", "norm."),
    (r"\bclassifier\.", "head."),
)
PLACES = ("model", "state_dict", "model_state_dict", "teacher", "model_ema", "state_dict_ema", "student")


@functools.cache
def tell(text):
    print0(text)


def read_other(path):
    """{name: tensor, ...} of a file or of a transformers folder; ValueError says what it is instead."""
    if path.is_dir():
        return read_folder(path)
    with open(path, "rb") as file:
        head = file.read(400)
    if head.startswith(b"version https://git-lfs"):
        size = int((re.findall(rb"size (\d+)", head) or [b"0"])[0]) / 1e6
        raise ValueError(f"it is a Git LFS pointer to a file of {size:.0f} MB: git lfs pull fetches that")
    if head.lstrip().startswith(b"<") or head.startswith(b"--"):
        raise ValueError("it is a web page or a download log: fetch it again (wget -O, not -o)")
    if not head:
        raise ValueError("it is empty")
    if head.startswith(b"\x1f\x8b"):
        raise ValueError("it is compressed: gunzip it")
    if head.startswith(b"\x89HDF"):
        raise ValueError("it is HDF5, as Keras writes")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        from safetensors.torch import load_file  # optional: only files from elsewhere need it

        return load_file(path)
    return load_pickled(path)


def read_folder(path):
    """Of a folder that transformers' save_pretrained wrote, in one file or in shards."""
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError("it is a folder, not transformers' (to continue a run: --resume --out FOLDER)")
    for index in path.glob("*.index.json"):
        missing = set(json.loads(index.read_text())["weight_map"].values()) - {file.name for file in files}
        if missing:
            raise ValueError(f"it lacks {min(missing)}, which its {index.name} names")
    config = path / "config.json"
    fields = json.loads(config.read_text()) if config.exists() else {}
    weights = {name: value for file in files for name, value in read_other(file).items()}
    target = {"norm_pix_loss": fields["norm_pix_loss"]} if "norm_pix_loss" in fields else {}
    return {"model": weights, "args": argparse.Namespace(**target)}


def is_state(value):
    return isinstance(value, dict) and any(isinstance(x, torch.Tensor) for x in value.values())


def from_transformers(weights):
    """timm's names for transformers' ViT and ViTMAE: queries, keys and values become one tensor."""
    for pattern, name in RENAMED:
        weights = {re.sub(pattern, name, old): value for old, value in weights.items()}
    for part in [name for name in weights if ".attn.0." in name]:
        values = [weights.pop(part.replace(".attn.0.", f".attn.{i}.")) for i in range(3)]
        weights[part.replace(".attn.0.", ".attn.qkv.")] = torch.cat(values)
    return weights


def network_shown(weights):
    """{field: value} of the ViT (timm's, MAE's, BEiT's) or ResNet-50 (torchvision's) that tensors show; {} of
    others."""
    kernel = weights.get("patch_embed.proj.weight", torch.empty(0))
    table = weights.get(f"rel_pos_bias.{TABLE}")
    if kernel.ndim == 4 and (table is not None or "pos_embed" in weights):
        D, in_chans, patch_size, _ = kernel.shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        L = weights["pos_embed"].shape[1] - 1 if table is None else (table_side(table) or 0) ** 2
        side, prefix = math.isqrt(L), "" if table is None else "beit_"
        # As pre-trained: BEiT on images normalised by 0.5, BEiT-v2, which has an aggregation, by ImageNet's.
        beit = "lm_head.weight" in weights and "cls_pt_layers.0.norm1.weight" not in weights
        colours = dict.fromkeys(("mean", "std"), (0.5,) * 3) if beit else {}
        for size, (dim, blocks, _) in VIT_SIZES.items():
            if (dim, blocks, side**2) == (D, depth, L):
                img_size = (side * patch_size, side * patch_size)
                return {"model": prefix + size, "patch_size": patch_size, "img_size": img_size,
                        "in_chans": in_chans, **colours}
    if {"conv1.weight", "layer4.2.conv3.weight"} <= weights.keys():
        width, in_chans, *_ = weights["conv1.weight"].shape
        return {"model": "resnet50", "resnet_width": width, "in_chans": in_chans}
    return {}


def adopt(content, path):
    """What a file from elsewhere holds, in the form of ours: the network inside wrappers, under our names."""
    place = next((name for name in PLACES if is_state(content.get(name))), None)
    weights = content[place] if place else content
    if not (is_state(weights) and all(isinstance(name, str) for name in weights)):
        raise UserError(f"{path} holds no tensors under names: save model.state_dict()")
    weights = {re.sub(r"\b(_orig_mod|module)\.", "", name): value for name, value in weights.items()
               if isinstance(value, torch.Tensor)}
    if any("embeddings.patch_embeddings.projection" in name for name in weights):
        weights = from_transformers(weights)
    # Where the network is: in front of the first layer's name. The teacher is what DINO is evaluated with.
    prefixes = [name.removesuffix(end) for end in ("patch_embed.proj.weight", "layer4.2.conv3.weight")
                for name in weights if name.endswith(end)]
    prefixes.sort(key=lambda x: ("student" in x or "momentum" in x, "teacher" not in x, len(x)))
    prefix = "" if "" in prefixes or not prefixes else prefixes[0]
    if prefix or place not in (None, "model", "state_dict", "model_state_dict"):
        rest = [name for name in PLACES if name != place and is_state(content.get(name))] + prefixes[1:]
        tell(f"{path}: the network is taken from {place or 'the file'}{f' ({prefix})' if prefix else ''}; "
             f"the file also holds: {', '.join(rest) or 'nothing'}")
    decoder = "decoder.0." if prefix == "encoder." else prefix  # SimMIM's has a prefix of its own
    weights = {name.removeprefix(prefix): value for name, value in weights.items()
               if name.startswith((prefix, decoder))}
    try:
        weights = from_beit(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    plain = {name: value for name, value in content.items() if not is_state(value) and name != "meta"}
    return {**plain, "model": weights, "meta": network_shown(weights)}
