"""What every method script takes as given. Four chapters: blocks, data, precision, run.

Nothing here belongs to one paper: masking, targets, losses and training loops are in the scripts. Importing
this file has no side effects. To take a method elsewhere, copy its script together with this file.
Shapes: B images, C channels, H x W pixels, patches of p x p pixels on a grid (h, w), L = h * w patches, width D.
`mask` is 1 where a patch is hidden, everywhere.
"""

import argparse
import atexit
import ctypes
import dataclasses
import difflib
import faulthandler
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import textwrap
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import Bottleneck
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces the end of its decoders; Pillow then reads JPEG too, with the same result
    decode_jpeg = None
try:
    import resource
except ImportError:  # Windows: no peak memory in the log
    resource = None


class Refused(Exception):
    """A mistake the user can mend: shown as one line, exit code `code` (2 = wrong input, 3 = training diverged)."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def reason(error):
    """First line of what an exception says, for a one-line message."""
    return (str(error) or repr(error)).splitlines()[0][:200]


def say(text, everywhere=False, **how):
    """Print, on the first process only (file names that are not valid UTF-8 too)."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(text.encode(errors="backslashreplace").decode(), flush=True, **how)


def refuse(method, error):
    """Say what is wrong in one line and end with the error's code.

    What is wrong usually is so for all processes: the others let the first one say it, whose end brings them down too, and
    speak if they are still there after that.
    """
    text, rank = f"{method}: {error}", os.environ.get("RANK", "0")
    if rank != "0":
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(6)
        text = f"{method}: [process {rank}] {error}"
    say(("\r\033[K" if sys.stderr.isatty() else "") + text, everywhere=True, file=sys.stderr)
    if dist.is_initialized():
        os._exit(error.code)  # at once: an orderly end could wait for processes that will never answer
    sys.exit(error.code)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks: the Vision Transformer, with timm's and MAE's parameter names, and ResNet-50, with torchvision's, so that released
# weights map one to one
# ----------------------------------------------------------------------------------------------------------------------

VIT_SIZES = {  # embed_dim, depth, num_heads
    "nano": (128, 4, 4),  # ours, for --demo and tests
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
VitSize = Literal["nano", "tiny", "small", "base", "large", "huge"]


def patch_grid(img_size, patch_size):
    """(h, w) patches of an image of (H, W) pixels; ValueError unless the patches tile it."""
    height, width = img_size
    if height % patch_size or width % patch_size or min(img_size) < patch_size:
        raise ValueError(f"--img_size {height},{width} is not a multiple of --patch_size {patch_size}")
    return height // patch_size, width // patch_size


def patchify(images, p):
    """(B, C, H, W) -> (B, L, p*p*C): patches row by row, inside a patch ordered (row, column, channel)."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches, p, grid):
    """(B, L, p*p*C) -> (B, C, h*p, w*p): undoes `patchify`."""
    B, _, values = patches.shape
    h, w = grid
    x = patches.reshape(B, h, w, p, p, values // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, values // (p * p), h * p, w * p)


def spread(values, p, grid):
    """(B, L, S) -> (B, S, h*p, w*p): what holds for a patch, at each of its pixels."""
    return F.interpolate(values.transpose(1, 2).unflatten(2, grid), scale_factor=p)


def sincos_pos_embed(dim, grid):
    """Fixed 2-D sine-cosine table (1, 1 + L, dim), row 0 (class token) zero.

    The first half of the channels encodes the column, the second the row (MAE's order; MoCo v3 and BEiT-style code
    have it transposed, so tables must not be mixed with weights of the other kind). Each half is [sin | cos]
    with frequencies 10000^(-k / (dim / 4)).
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (columns, rows)]  # each (L, dim / 4)
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), table.float()]).unsqueeze(0)


def resize_pos_embed(table, old_grid, new_grid):
    """(1, 1 + L, D) -> (1, 1 + L', D): bicubic in float32, class-token row kept."""
    cls_row, patches = table[:, :1], table[:, 1:]
    patches = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([cls_row, patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def take_tokens(x, ids):
    """(B, N, D), (B, n) int64 -> (B, n, D): token ids[b, j] of image b."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, L, D): one linear map per patch, written as a convolution."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d); no mask argument, as a mask rules out the fast kernels."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Torch's fused kernel for the CPU has a bf16 backward pass two to five times slower than these two products. The
        # softmax sums in float32 and rounds to bf16 at its end.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D)
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU


def drop_path(x, rate, training):
    """Stochastic depth: zero a residual branch per sample with probability `rate`, rescale the rest by 1 / (1 - rate)."""
    if rate == 0.0 or not training:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * keep / (1 - rate)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x):
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


def init_linear(network):
    """MAE's initial values of all linear layers: Xavier-uniform, bias 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision Transformer trunk: patch embedding, fixed sine-cosine positions, class token, blocks, final LayerNorm; no head.

    `size` is a key of VIT_SIZES. `drop_path` is the rate of the last block; it grows linearly from 0 at the first.
    """

    def __init__(self, size, img_size, patch_size, in_chans=3, drop_path=0.0):
        super().__init__()
        self.embed_dim, self.depth, num_heads = VIT_SIZES[size]
        self.patch_size, self.grid = patch_size, patch_grid(img_size, patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, self.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        # A parameter, as in the released files, but fixed: fine-tuning turns its gradient on.
        self.pos_embed = nn.Parameter(sincos_pos_embed(self.embed_dim, self.grid), requires_grad=False)
        rates = [drop_path * i / (self.depth - 1) for i in range(self.depth)]
        self.blocks = nn.ModuleList(Block(self.embed_dim, num_heads, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)

    def trunk_state(self):
        """The trunk's part of the state dict, whatever a subclass adds: what a plain ViT loads."""
        trunk = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
        return {name: value for name, value in self.state_dict().items() if name.startswith(trunk)}

    def init_weights(self):
        """MAE's initial values: Xavier-uniform for every linear layer and the patch embedding, N(0, .02) for tokens."""
        init_linear(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        for name, parameter in self.named_parameters():
            if name.endswith(("cls_token", "mask_token")):
                nn.init.normal_(parameter, std=0.02)

    def embed(self, images):
        """(B, C, H, W) -> patch tokens with positions (B, L, D), no class token yet."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def prepend_cls(self, x):
        """(B, N, D) -> (B, 1 + N, D)"""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def forward(self, images):
        """(B, C, H, W) -> normalised tokens (B, 1 + L, D) of the whole image: no masking, deterministic in eval mode."""
        x = self.prepend_cls(self.embed(images))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class LastNorm(nn.BatchNorm2d):
    """The BatchNorm that ends a residual branch, with drop path behind it."""

    def __init__(self, channels, drop_path):
        super().__init__(channels)
        self.drop_path = drop_path

    def forward(self, x):
        return drop_path(super().forward(x), self.drop_path, self.training)


class ResNet50(nn.Module):
    """torchvision's ResNet-50 without its classifier, of any width: 64 is the plain one, with torchvision's names, initial
    values and outputs; 128 and 256 are the x2 and x4 of SimCLR, whose every layer is wider; in_chans as the images have.
    `drop_path` is the rate of the last block; it grows linearly from 0 at the first."""

    def __init__(self, width=64, in_chans=3, drop_path=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels, rates = width, iter([drop_path * i / 15 for i in range(16)])
        for i, blocks in enumerate((3, 4, 6, 3)):
            inner, stride = width * 2**i, 1 if i == 0 else 2
            shortcut = nn.Sequential(nn.Conv2d(channels, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))
            stage = [Bottleneck(channels, inner, stride, shortcut)]
            stage += [Bottleneck(4 * inner, inner) for _ in range(blocks - 1)]
            for block in stage:
                block.bn3 = LastNorm(4 * inner, next(rates))
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            channels = 4 * inner
        self.embed_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def trunk_state(self):
        """The state dict without what a subclass adds."""
        return {name: value for name, value in self.state_dict().items() if name.startswith(("conv1", "bn1", "layer"))}

    def forward(self, images):
        """(B, C, H, W) -> (B, 32 * width, H / 32, W / 32)"""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def check_file(path):
    """The path as a Path; Refused if nothing is there, or if it is a folder, a download log or a web page."""
    path = Path(path)
    if path.is_dir():
        raise Refused(f"{path} is a folder, not a file of weights; to continue the run in it: --resume --out {path}")
    if not path.exists():
        raise Refused(f"{path} does not exist")
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except OSError as error:
        raise Refused(f"cannot read {path}: {error}") from None
    if head.startswith((b"--", b"<")):
        raise Refused(f"{path} is a download log or a web page, not weights: fetch it again (wget -O, not -o)")
    return path


def read_file(path):
    """A .pth with weights_only=True (Namespace allowed, as in MAE's files) or a .safetensors; Refused if it is neither."""
    path = check_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # optional: only files from elsewhere need it

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:
        raise Refused(f"reading {path} needs: pip install safetensors") from None
    except Exception as error:  # zip, pickle and storage errors, by kind of damage
        telling = [line for line in str(error).splitlines() if "Unsupported" in line or "not an allowed" in line]
        what = f"{telling[0].strip()[:200]}; save model.state_dict(), not the object" if telling else reason(error)
        raise Refused(f"cannot read {path} safely, as a .pth or .safetensors of weights: {what}") from None


# First names of what our scripts, and others' classifiers, keep beside the network that is taken elsewhere.
BESIDE_TRUNK = ("decoder", "mask_token", "fuse_", "pixel_decoder", "feature_decoder", "teacher", "beta", "generator.", "head.",
                "heads.", "fc_norm.", "fc.", "pixel_head.")
PARTS = ("enhancer.", "discriminator.")  # first names of that network where a script's checkpoint holds two


# What a file of weights says of its network and of the images that it was trained on.
NETWORK = ("model", "patch_size", "resnet_width", "columns", "in_chans", "mean", "std")


def weights_of(content):
    """The named tensors of what read_file gave, without the prefixes of torch.compile and DDP."""
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise Refused("this file holds no tensors under names: expected a state dict, alone or as `model` or `state_dict`")
    return {re.sub(r"\b(_orig_mod|module)\.", "", name): value for name, value in weights.items()}


def network_of(content):
    """What a file says of its network and images: our `meta`, or what the names and shapes of timm's, official MAE's and
    torchvision's ResNet-50 files show; {} if they show nothing."""
    if isinstance(content.get("meta"), dict) and "model" in content["meta"]:
        return content["meta"]
    weights = weights_of(content)
    if {"patch_embed.proj.weight", "pos_embed"} <= weights.keys() and weights["patch_embed.proj.weight"].ndim == 4:
        D, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        known = [size for size, (dim, blocks, _) in VIT_SIZES.items() if (dim, blocks) == (D, depth)]
        side = math.isqrt(weights["pos_embed"].shape[1] - 1)
        if known and side**2 == weights["pos_embed"].shape[1] - 1:
            return {"model": known[0], "patch_size": patch_size, "img_size": (side * patch_size,) * 2, "in_chans": in_chans}
    if {"conv1.weight", "layer4.2.conv3.weight"} <= weights.keys():
        width, in_chans, *_ = weights["conv1.weight"].shape
        return {"model": "resnet50", "resnet_width": width, "in_chans": in_chans}
    return {}


def load_weights(model, path, allow_missing=(), ignore=(), part=(), content=None):
    """Copy weights into `model` by name (ours, official MAE, timm, torchvision).

    If names in the file start with a prefix in `part`, only these count, without it. Names that start with a prefix in
    `ignore` are left out; position tables are resized to the model's grid.
    Refused if a name has no place in the model, if the model lacks one that starts with no prefix in `allow_missing`, or if
    shapes differ. Prints what was done. content: what read_file(path) gave, if it has been read already.
    """
    content = content or read_file(path)
    meta, weights = network_of(content), weights_of(content)
    parts = {name.removeprefix(prefix): weights[name] for prefix in part for name in weights if name.startswith(prefix)}
    weights, own = parts or weights, model.state_dict()
    for name in [name for name in weights if name.endswith("pos_embed") and name in own]:
        L, patch_size, size = weights[name].shape[1] - 1, meta.get("patch_size"), meta.get("img_size")
        old = patch_grid(size, patch_size) if size else (math.isqrt(L),) * 2
        if weights[name].shape[-1] == own[name].shape[-1] and old != model.grid:
            if math.prod(old) != L:
                raise Refused(f"{path}: {name} has {L} patches, which is no square, and the file does not say its grid")
            weights[name] = resize_pos_embed(weights[name], old, model.grid)
            say(f"{name} {old[0]}x{old[1]} -> {model.grid[0]}x{model.grid[1]}, bicubic")
    ignored = [name for name in weights if name.startswith(tuple(ignore))]
    weights = {name: value for name, value in weights.items() if name not in ignored}
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    report = {"missing": missing, "unexpected": unexpected, "ignored": ignored}
    say(f"{path}: {len(own) - len(missing)}/{len(own)} tensors loaded; " + "; ".join(
        f"{kind}: {', '.join(dict.fromkeys(n.split('.')[0] for n in names)) or 'none'}" for kind, names in report.items()))
    wrong = unexpected + [name for name in missing if not name.startswith(tuple(allow_missing))]
    if wrong:
        raise Refused(f"{path} is not for this model: {len(unexpected)} unexpected tensors, {len(missing)} missing, "
                      f"{wrong[0]} for one")
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise Refused(f"{path}: {name} is {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}: "
                          "check --model, --patch_size, --in_chans and what else sets the model's sizes")
    model.load_state_dict(weights, strict=False)


# ----------------------------------------------------------------------------------------------------------------------
# Data: sources of images, transforms, and a loader whose randomness depends on (seed, epoch, sample) alone
# ----------------------------------------------------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def stable_seed(*numbers):
    """A 64-bit seed from integers, the same on every machine and in every process."""
    packed = struct.pack(f"{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def as_image(array, path):
    """(H, W) or (H, W, C) numpy array -> tensor (C, H, W): uint8 as it is, 16 bit and float as float32 in [0, 1]."""
    array = array[..., None] if array.ndim == 2 else array
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # 16-bit TIFF is often big-endian
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"an image array must be (H, W) or (H, W, C), got {array.shape} in {path}")
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535
    elif array.dtype != np.uint8:
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"expected uint8, uint16 or finite float values in [0, 1], got {array.dtype} in {path}")
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def to_channels(image, in_chans, path):
    """Grey to RGB and back; any other mismatch is an error."""
    if image.shape[0] == in_chans:
        return image
    if image.shape[0] == 1 and in_chans == 3:
        return image.expand(3, -1, -1)
    if image.shape[0] == 3 and in_chans == 1:
        return TF.rgb_to_grayscale(image)
    raise ValueError(f"{image.shape[0]} channels in {path}, but --in_chans is {in_chans}")


def jpeg_pixels(data):
    """Number of pixels that the header of a JPEG file announces; 0 if the header is damaged."""
    i = 2
    while i + 8 < len(data) and data[i] == 0xFF:
        if 0xC0 <= data[i + 1] <= 0xCF and data[i + 1] not in (0xC4, 0xC8, 0xCC):  # a frame header; these three are tables
            return int.from_bytes(data[i + 5 : i + 7]) * int.from_bytes(data[i + 7 : i + 9])
        i += 2 + int.from_bytes(data[i + 2 : i + 4])
    return 0


def read_image(path, in_chans):
    """Decode one file to (in_chans, H, W), uint8 or, from 16-bit and float files, float32 in [0, 1]; EXIF rotation applied.

    JPEG goes through libjpeg-turbo in torchvision; everything else through Pillow, not for its formats alone:
    torchvision's PNG decoder can take the whole process down on a damaged file, Pillow raises.
    """
    if path.lower().endswith(".npy"):
        return to_channels(as_image(np.load(path, allow_pickle=False), path), in_chans, path)
    if decode_jpeg and in_chans in (1, 3):
        with open(path, "rb", buffering=0) as file:
            data = file.read(2)
            data = bytearray(data + file.read()) if data == b"\xff\xd8" else b""
        if 0 < jpeg_pixels(data) < Image.MAX_IMAGE_PIXELS:  # no decompression bomb
            mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
            return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=mode, apply_exif_orientation=True)
    with Image.open(path) as image:  # refuses decompression bombs
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            array = np.asarray(image)
            if image.mode == "I":  # Pillow's 32-bit mode: what it reads 16-bit files into when it must
                array = array.clip(0, 65535).astype(np.uint16)
            return to_channels(as_image(array, path), in_chans, path)
        if in_chans in (1, 3):
            image = image.convert("RGB" if in_chans == 3 else "L")
        return to_channels(as_image(np.array(image), path), in_chans, path)


class ImageFiles:
    """Images in files. labels: class index of each, or -1. Paths are kept in one buffer: a list of a million strings would be
    copied into every loader worker, page by page, as its reference counts change."""

    def __init__(self, paths, labels, classes, in_chans):
        encoded = [os.fsencode(path) for path in paths]
        self.ends, self.buffer = np.cumsum([len(path) for path in encoded]), np.frombuffer(b"".join(encoded), np.uint8)
        self.labels, self.classes, self.in_chans = np.asarray(labels), classes, in_chans

    def __len__(self):
        return len(self.ends)

    def name(self, index):
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.buffer[start : self.ends[index]].tobytes())

    def read(self, index):
        return read_image(self.name(index), self.in_chans), int(self.labels[index])


class ImageArray:
    """Images in memory, uint8 (N, H, W, C); numbers: what each is called in `title`, where that has more."""

    def __init__(self, images, labels, classes, in_chans, title, numbers=None):
        self.images, self.labels, self.classes, self.in_chans, self.title = images, labels, classes, in_chans, title
        self.numbers = range(len(images)) if numbers is None else numbers

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"{self.title}[{self.numbers[index]}]"

    def read(self, index):
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1)
        return to_channels(image, self.in_chans, self.name(index)), int(self.labels[index])


def _ring(outer, inner, turns=1.0, points=28):
    """Polygon between two radii; two full circles joined by a cut make a ring."""
    angles = np.linspace(0, 2 * np.pi * turns, points)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([circle * outer, circle[::-1] * inner])


def _star(points, inner):
    angles = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)[:, None]
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius


SHAPE_KINDS = {  # polygons of radius about 1
    "disc": _ring(0.9, 0.0),
    "ring": _ring(1.0, 0.55),
    "half disc": _ring(1.0, 0.0, turns=0.5),
    "arc": _ring(1.0, 0.6, turns=0.6),
    "square": np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    "bar": np.array([(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)]),
    "triangle": _star(3, 0.5),
    "star": _star(5, 0.4),
    "cross": np.array([(1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3),
                       (-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3)]),
    "corner": np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, -0.35), (-0.35, -0.35), (-0.35, 0.9), (-0.9, 0.9)]),
}


class Shapes:
    """Drawn images, so that everything runs with no download: 1 to 4 of the ten SHAPE_KINDS on a textured background.

    Image `i` is a function of (seed, split, i). Its class is the kind with the largest visible area. What is drawn is kept, if
    the whole set takes less than 256 MB (by each worker for itself: containers give little shared memory).
    """

    def __init__(self, size, in_chans, split="train", seed=0, n=None):
        self.n = n or {"train": 20000, "val": 2000}[split]
        self.size, self.in_chans, self.classes = size, in_chans, list(SHAPE_KINDS)
        self.key = (seed, 0 if split == "train" else 1)
        self.polygons = [np.asarray(polygon, np.float32) for polygon in SHAPE_KINDS.values()]
        rng = np.random.default_rng(0)  # the textures are the same in every run
        self.textures = [self._texture(2 * max(size), rng) for _ in range(16)]
        keeps = self.n * math.prod(size) * in_chans < 2**28
        self.cache = np.full((self.n, *size, in_chans), 0, np.uint8) if keeps else None
        self.labels = np.full(self.n, -1)

    @staticmethod
    def _texture(side, rng):
        """Sum of five octaves of smooth noise, equalised to 0 ... 254: uint8 (side, side)."""
        total = np.zeros((side, side), np.float32)
        for cells in (2, 4, 8, 16, 32):
            noise = Image.fromarray(rng.random((cells, cells), dtype=np.float32) / math.sqrt(cells))
            total += np.asarray(noise.resize((side, side), Image.BICUBIC))
        return np.digitize(total, np.quantile(total, np.linspace(0, 1, 256)[1:-1])).astype(np.uint8)

    def __len__(self):
        return self.n

    def name(self, index):
        return f"shapes[{index}]"

    def draw(self, index):
        """Returns image uint8 (H, W, C), instance map uint8 (H, W) (0 = background, i + 1 = shape i), kinds (n,)."""
        height, width = self.size
        rng = np.random.Generator(np.random.Philox(key=stable_seed(*self.key, index)))
        texture = self.textures[rng.integers(len(self.textures))]
        top, left = rng.integers(0, texture.shape[0] - np.array(self.size) + 1)
        behind, before = (0, 128) if rng.random() < 0.5 else (128, 0)  # light shapes on dark ground or the reverse
        first, second = rng.integers(behind, behind + 128, (2, self.in_chans))
        ramp = np.linspace(0.25, 0.75, 256)[:, None]  # colour by texture value: (256, C)
        image = ((1 - ramp) * first + ramp * second).astype(np.uint8)[texture[top : top + height, left : left + width]]
        instances = Image.new("L", (width, height))
        pen = ImageDraw.Draw(instances)
        n = rng.integers(1, 5)  # one large shape and up to three small ones, partly in front of it
        kinds, angles = rng.integers(len(self.polygons), size=n), rng.uniform(-0.35, 0.35, n)
        radii = np.append(0.26 + 0.14 * rng.random(), 0.08 + 0.1 * rng.random(n - 1)) * min(self.size)
        centres = np.append(0.3 + 0.4 * rng.random((1, 2)), 0.1 + 0.8 * rng.random((n - 1, 2)), axis=0) * (width, height)
        colours = rng.integers(before, before + 128, (n + 1, self.in_chans)).astype(np.uint8)
        for i in range(n):
            c, s = math.cos(angles[i]) * radii[i], math.sin(angles[i]) * radii[i]
            points = self.polygons[kinds[i]] @ np.array([[c, s], [-s, c]], np.float32) + centres[i]
            pen.polygon(points.ravel().tolist(), fill=i + 1)
        instances = np.asarray(instances)
        image = np.where(instances[..., None] > 0, colours[instances], image)
        return image, instances, kinds

    @staticmethod
    def visible_areas(instances, n):
        return np.bincount(instances.ravel(), minlength=n + 1)[1 : n + 1]

    def read(self, index):
        if self.cache is not None and self.labels[index] >= 0:
            return torch.from_numpy(self.cache[index]).permute(2, 0, 1), int(self.labels[index])
        image, instances, kinds = self.draw(index)
        label = int(kinds[self.visible_areas(instances, len(kinds)).argmax()])
        if self.cache is not None:
            self.cache[index], self.labels[index] = image, label
        return torch.from_numpy(image).permute(2, 0, 1), label

    def annotations(self, index):
        """Same drawing: label map (H, W) int64 with 0 = background and kind + 1, instance boxes (n, 4) float x1 y1 x2 y2,
        masks (n, H, W) bool, kinds (n,) int64; shapes hidden entirely are left out."""
        _, instances, kinds = self.draw(index)
        seen = np.flatnonzero(self.visible_areas(instances, len(kinds)))
        masks = torch.from_numpy(instances[None] == (seen + 1)[:, None, None])
        boxes = torch.stack([self._box(mask) for mask in masks])
        label_map = torch.from_numpy(np.concatenate([[0], kinds + 1])[instances])
        return label_map, boxes, masks, torch.from_numpy(kinds[seen])

    @staticmethod
    def _box(mask):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).flatten().float()


def list_images(root):
    """Sorted paths of the images below `root` (nested or flat; links followed, hidden names skipped)."""
    found, others, stack, visited = [], [], [str(root)], set()
    while stack:
        folder = stack.pop()
        identity = os.stat(folder)
        if (identity.st_dev, identity.st_ino) in visited:  # a link that leads back up
            continue
        visited.add((identity.st_dev, identity.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(EXTENSIONS):
                    found.append(entry.path)
                elif entry.is_dir():
                    stack.append(entry.path)
                else:
                    others.append(entry.path)
    if not found:
        first = f"the first is {min(others)}" if others else "none at all"
        raise Refused(f"no image under {root}: it holds {len(others)} other files, {first}; "
                      f"read are {' '.join(EXTENSIONS)}")
    return sorted(found)


def open_folder(root, in_chans, classes=None):
    """ImageFiles below `root`; its classes are the given ones, or its first-level folders if every image lies in one."""
    paths = list_images(root)
    first = [os.path.relpath(path, root).split(os.sep)[:-1] for path in paths]
    if not all(first):
        return ImageFiles(paths, [-1] * len(paths), None, in_chans)
    names = sorted({folders[0] for folders in first})
    classes = classes or names
    if unknown := set(names) - set(classes):
        raise Refused(f"{root}/{min(unknown)} is no class of the training images")
    index = {name: i for i, name in enumerate(classes)}
    return ImageFiles(paths, [index[folders[0]] for folders in first], classes, in_chans)


def open_list(path, in_chans, split):
    """A text file with one path per line, relative to it or absolute; no labels."""
    paths = [os.path.join(path.parent, line.strip()) for line in path.read_text().splitlines() if line.strip()]
    if not paths or split not in ("pretrain", "all"):
        raise Refused(f"--data {path}: a list of paths is for pre-training, it has no labels" if paths else f"{path} is empty")
    return ImageFiles(paths, [-1] * len(paths), None, in_chans)


def open_npz(path, in_chans, split):
    """One .npz: `images` uint8 (N, H, W, C) or (N, H, W), optional `labels` (N,), `split` (N,): 0 or "train", else held out."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    images = arrays.get("images", np.empty(0))
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8:
        raise Refused(f"{path} has {sorted(arrays)}; expected `images` uint8 (N, H, W, C), got {images.dtype} {images.shape}")
    part = arrays.get("split", np.zeros(len(images), np.int64))
    held_out = (part != "train") if part.dtype.kind in "US" else (part != 0)
    chosen = held_out if split == "val" else ~held_out | (split == "all")
    if not chosen.any():
        raise Refused(f"{path} has no image for {split}: mark them in an array `split` (N,), 0 = train, 1 = val")
    labels = arrays.get("labels")
    classes = None if labels is None else [str(i) for i in range(int(labels.max()) + 1)]
    labels = np.full(chosen.sum(), -1) if labels is None else labels[chosen]
    images = images if chosen.all() else images[chosen]
    return ImageArray(images, labels, classes, in_chans, path.name, np.flatnonzero(chosen))


def open_torchvision(name, in_chans, split, download):
    """cifar10, cifar100, stl10, cars under data/; the first three are fetched with --download."""
    from torchvision import datasets

    if download and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise Refused("--download: fetch the data with one process first (python, not torchrun)")
    part = "train" if split != "val" else "test"
    try:
        if name == "cars":  # its `loader` hands over paths in place of decoded images
            data = datasets.StanfordCars("data", split=part, loader=str)
            return ImageFiles(*zip(*((path, label) for path, label in data), strict=True), data.classes, in_chans)
        if name == "stl10":
            data = datasets.STL10("data", split="train+unlabeled" if split == "pretrain" else part, download=download)
            return ImageArray(data.data.transpose(0, 2, 3, 1), data.labels, data.classes, in_chans, name)
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        data = kind("data", train=split != "val", download=download)
        return ImageArray(data.data, data.targets, data.classes, in_chans, name)
    except (OSError, RuntimeError, ValueError) as error:
        hint = "torchvision's page on StanfordCars shows its layout" if name == "cars" else "add --download to fetch it"
        raise Refused(f"--data {name} is not in data/ ({str(error).splitlines()[0]}): {hint}") from None


def data_path(data):
    """The path that --data names, from here or from the scripts' folder; None if there is none."""
    return next((path for path in (Path(data), Path(__file__).parent / data) if path.exists()), None)


def open_data(cfg, split="pretrain", classes=None):
    """The images of `--data`: an object with len(), read(i) -> (tensor (C, H, W), label or -1), name(i), classes or None.

    split: "pretrain" (labels are not needed), "train", "val", or "all". Of a folder, "val" is its `val/`, with labels numbered
    by the training `classes`; "all" all of it; the others its `train/` if there is one. Of named data "all" is "train".
    """
    if cfg.data == "shapes":
        return Shapes(cfg.img_size, cfg.in_chans, "val" if split == "val" else "train")
    if cfg.data in ("cifar10", "cifar100", "stl10", "cars"):
        return open_torchvision(cfg.data, cfg.in_chans, split, cfg.download)
    root = data_path(cfg.data)
    if root is None:
        default = cfg.data == RunConfig.data
        raise Refused(f"--data {cfg.data} does not exist: " + (
            "link ImageNet there, give --data PATH (any folder of images), or try --demo" if default else
            "give a folder, a .txt list of paths, an .npz, or shapes|cifar10|cifar100|stl10|cars"))
    try:
        if root.suffix == ".npz":
            return open_npz(root, cfg.in_chans, split)
        if root.suffix.lower() in EXTENSIONS:
            raise Refused(f"--data {root} is one image: give its folder")
        if root.is_file():
            return open_list(root, cfg.in_chans, split)
        if split != "val":
            return open_folder(root / "train" if split != "all" and (root / "train").is_dir() else root, cfg.in_chans)
        if (root / "val").is_dir():
            return open_folder(root / "val", cfg.in_chans, classes)
    except (OSError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise Refused(f"--data {root}: {error}") from None
    raise Refused(f"--data {root} has no val/: expected {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg")


def normalisation(cfg):
    """(mean, std), a value per channel in [0, 1] units: --mean/--std, else the data set's, else ImageNet's."""
    mean, std = (CIFAR_MEAN, CIFAR_STD) if cfg.data in ("cifar10", "cifar100") else (IMAGENET_MEAN, IMAGENET_STD)
    if cfg.in_chans != 3:  # not in any paper: ImageNet's grey level for every channel
        mean, std = (sum(mean) / 3,) * cfg.in_chans, (sum(std) / 3,) * cfg.in_chans
    mean, std = cfg.mean or mean, cfg.std or std
    if len(mean) != cfg.in_chans or len(std) != cfg.in_chans:
        raise Refused(f"--mean has {len(mean)} and --std {len(std)} values, --in_chans is {cfg.in_chans}")
    return tuple(mean), tuple(std)


def cover(image, size, interpolation):
    """Resize (C, H, W), keeping the aspect ratio, until it just covers `size`."""
    scale = max(size[0] / image.shape[1], size[1] / image.shape[2])
    new = [max(side, round(scale * old)) for side, old in zip(size, image.shape[1:], strict=True)]
    return TF.resize(image, new, interpolation, antialias=True)


class RandomResizedCrop:
    """A box of a share of the area within `scale` and an aspect of 3/4 to 4/3 (log-uniform), anywhere in the image, resized,
    bicubic: MAE's pre-training crop; fine-tuning uses scale (.08, 1). If ten boxes do not fit, the largest centred one.

    Distribution and pixels are those of torchvision's class, in less than half of its time: one draw, and pixels laid out
    as its fast 8-bit kernel wants them.
    """

    def __init__(self, size, scale=(0.2, 1.0)):
        self.size, self.scale, self.log_ratio = size, scale, math.log(4 / 3)

    def box(self, height, width):
        """top, left, height, width"""
        low, high = self.scale
        for u_area, u_ratio, u_top, u_left in torch.rand(10, 4).tolist():
            area, root = height * width * (low + (high - low) * u_area), math.exp(self.log_ratio * (u_ratio - 0.5))
            h, w = round(math.sqrt(area) / root), round(math.sqrt(area) * root)
            if 0 < h <= height and 0 < w <= width:
                return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image):
        top, left, h, w = self.box(*image.shape[1:])
        crop = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
        return F.interpolate(crop, self.size, mode="bicubic", antialias=True)[0]


class EvalCrop:
    """The centre of an image: short side to size / ratio, `size` cut out. Default ratio: 224/256, as is usual at 128 to
    224 px; at other sizes 1 (above: usual; below: our choice, small images have no margin to spare)."""

    def __init__(self, size, ratio=None):
        self.size = size
        self.ratio = ratio or (224 / 256 if 128 <= min(size) <= 224 else 1.0)

    def __call__(self, image):
        image = cover(image, [int(side / self.ratio) for side in self.size], InterpolationMode.BICUBIC)
        return TF.center_crop(image, self.size)


class BadFiles:
    """The unreadable files that a run has met: `known` on all processes, {path: reason}, and `new` on this one."""

    def __init__(self, max_bad, world_size):
        self.max_bad, self.world_size, self.limit, self.known, self.new = max_bad, world_size, 1, {}, {}

    def allow(self, n):
        """Of n files, a share of `max_bad` may be unreadable, at least one; returns how many to try before giving up."""
        self.limit = max(self.limit, int(self.max_bad * n))
        return self.limit + 1

    def note(self, entries):
        self.new.update(entry for entry in entries if entry[0] not in self.known)

    def share(self):
        """Called on all processes as soon as one has met something new: name each file once; Refused above the limit."""
        found = [self.new] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, self.new)
        for path, why in sorted({path: why for part in found for path, why in part.items()}.items()):
            self.known[path] = why
            say(f"unreadable, replaced by the next file: {path}: {why}")
        self.new = {}
        if len(self.known) > self.limit:
            listing = "".join(f"\n  {path}: {why}" for path, why in self.known.items())
            raise Refused(f"{len(self.known)} unreadable files, --max_bad {self.max_bad} allows {self.limit}:{listing}", code=1)


class Views(torch.utils.data.Dataset):
    """Turns a key (epoch, index) into a sample. All its randomness is drawn from (seed, epoch, index), never from the worker
    or the process. `draw()` gives what the method draws per sample (masking noise, ...), as a tensor or None.

    A file that cannot be read is replaced by the next one that can; `bad` lists (path, reason).
    """

    def __init__(self, source, transform, seed, tries, draw=None, flip=True):
        self.source, self.transform, self.seed, self.tries = source, transform, seed, tries
        self.draw, self.flip = draw, flip

    def read(self, index):
        bad = []
        for i in range(min(self.tries, len(self.source))):
            here = (index + i) % len(self.source)
            try:
                return *self.source.read(here), bad
            except Exception as error:  # decoders raise nearly anything
                bad.append((self.source.name(here), reason(error)))
        # More bad files than --max_bad allows: the run stops before it uses this blank.
        return torch.zeros(self.source.in_chans, 64, 64, dtype=torch.uint8), -1, bad

    def __getitem__(self, key):
        epoch, index = key
        image, label, bad = self.read(index)
        torch.default_generator.manual_seed(stable_seed(self.seed, epoch, index))
        sample = {"index": index, "label": label, "bad": bad, "flip": torch.rand(()).item() < 0.5 and self.flip}
        if self.draw is not None:
            sample["draw"] = self.draw()
        return {**sample, "image": self.transform(image)}


def collate(samples):
    """List of samples -> batch of tensors, images channels-last in memory, as decoders and crops leave them; 8-bit images
    become float only where a 16-bit one sits in the same batch."""
    mixed = len({sample["image"].dtype for sample in samples}) > 1
    bad = [entry for sample in samples for entry in sample.pop("bad")]
    for sample in samples:
        image = sample["image"].permute(1, 2, 0)
        sample["image"] = image / 255 if mixed and image.dtype == torch.uint8 else image
    batch = torch.utils.data.default_collate(samples)
    return {**batch, "image": batch["image"].permute(0, 3, 1, 2), "bad": bad}


def picture_batch(source, cfg, draw):
    """--pictures images, evenly spaced, cropped as for evaluation, with the same `draw()` every time; None for 0."""
    views = Views(source, EvalCrop(cfg.img_size), cfg.seed, len(source), draw, flip=False)
    return collate([views[-1, i * len(source) // cfg.pictures] for i in range(cfg.pictures)]) if cfg.pictures else None


@dataclasses.dataclass
class Plan:
    """One run in numbers: n images, `batch_size` per update over all processes, `steps` updates."""

    n: int
    batch_size: int
    micro_batch: int
    accum_steps: int
    steps: int

    def epoch(self, step):
        """Fractional epoch after `step` updates."""
        return step * self.batch_size / self.n

    def passes(self, step):
        """Whole passes completed after `step` updates."""
        return step * self.batch_size // self.n

    def ends_epoch(self, step):
        """Whether the `step`-th update completes a pass, or the run."""
        return step == self.steps or self.passes(step) > self.passes(step - 1)


def make_plan(n, cfg, world_size, steps=None):
    """Split the global batch: batch_size = processes x micro_batch x accum_steps; `steps` updates, else floor(epochs * n /
    batch_size)."""
    B, share = cfg.batch_size, cfg.batch_size // world_size
    micro = cfg.micro_batch or next(m for m in range(min(256, max(share, 1)), 0, -1) if share % m == 0)
    unit = world_size * micro
    if B % unit:
        unit = unit if cfg.micro_batch else world_size  # a derived micro-batch fits any multiple of the processes
        near = [m for m in (B // unit * unit, B // unit * unit + unit) if m]
        raise Refused(f"--batch_size {B} is not {world_size} processes x {cfg.micro_batch or 'any'} (--micro_batch) x a whole "
                      f"number: use {' or '.join(map(str, near))}")
    if n < B:
        raise Refused(f"{n} images are fewer than one batch: --batch_size is {B}, use at most {n}")
    steps = steps or int(cfg.epochs * n // B)
    if steps < 1:
        raise Refused(f"--epochs {cfg.epochs} of {n} images is less than one update of --batch_size {B}")
    return Plan(n, B, micro, B // unit, steps)


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """permutation(seed, epoch) of range(n): the order of one pass, whatever the number of processes."""
    return np.random.Generator(np.random.Philox(key=stable_seed(seed, epoch))).permutation(n)


class KeyedBatches:
    """Yields this process's micro-batches, lists of (epoch, index), from update `start` on. An update takes the next
    `batch_size` samples of the endless sequence of passes; windows cross epoch ends, nothing is dropped or padded.

    repeats: copies of each image in an update, each with its own (epoch * repeats + copy, index), so its own crop. They lie
    batch_size / repeats apart, so that mixup, which mixes neighbours, does not mix an image with itself; an update takes as
    many images fewer from the sequence of passes.
    """

    def __init__(self, plan, seed, run, start, repeats=1):
        self.plan, self.seed, self.rank, self.world_size, self.start = plan, seed, run.rank, run.world_size, start
        self.repeats, self.images = repeats, -(-plan.batch_size // repeats)

    def __len__(self):
        return (self.plan.steps - self.start) * self.plan.accum_steps

    def __iter__(self):
        plan = self.plan
        for micro_step in range(self.start * plan.accum_steps, plan.steps * plan.accum_steps):
            first = (micro_step * self.world_size + self.rank) * plan.micro_batch
            yield [self.key(position) for position in range(first, first + plan.micro_batch)]

    def key(self, position):
        update, place = divmod(position, self.plan.batch_size)
        copy, image = divmod(place, self.images)
        epoch, i = divmod(update * self.images + image, self.plan.n)
        return epoch * self.repeats + copy, int(epoch_order(self.plan.n, self.seed, epoch)[i])


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def _loader_worker(_):
    # Ctrl-C and a cluster's SIGTERM reach the workers too; the main process decides when to stop, they only serve it.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_workers():
    # At exit Python ends such children with SIGTERM, which they ignore, and would then wait for them for ever.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a worker's death for an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def make_loader(views, batches, run, collate=collate):
    """DataLoader over batches of keys; one iterator serves the whole run, so its workers live as long as the run."""
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    return torch.utils.data.DataLoader(
        views, batch_sampler=batches, num_workers=run.workers, collate_fn=collate, pin_memory=run.device.type == "cuda",
        worker_init_fn=_loader_worker, prefetch_factor=4 if run.workers else None)


class Normalise:
    """Batch from the loader -> images (B, C, H, W) float32 on the device: scaled to [0, 1], flipped if the batch says which,
    normalised."""

    def __init__(self, mean, std, device):
        self.device = device
        self.mean, self.std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))

    def __call__(self, batch):
        images = batch["image"].to(self.device, non_blocking=True)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        if "flip" in batch:
            flip = batch["flip"].to(self.device, non_blocking=True)
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        return (images - self.mean) / self.std

    def undo(self, images):
        """Back to [0, 1]"""
        return (images * self.std + self.mean).clamp(0, 1)


def check_data(source, workers):
    """Read every image as training would; print counts by extension, size and mode, three paths and what cannot be read."""

    def look(index):
        name = source.name(index)
        suffix = next((end for end in EXTENSIONS if name.lower().endswith(end)), "in memory")
        try:
            image, _ = source.read(index)
            with nullcontext() if suffix in (".npy", "in memory") else Image.open(name) as file:
                mode = file.mode if file else f"{len(image)} channels {image.dtype}"
            return suffix, f"{image.shape[2]}x{image.shape[1]}", mode, None
        except Exception as error:
            return suffix, None, None, f"\n  {name}: {reason(error)}"

    with ThreadPoolExecutor(max(1, workers)) as pool:  # decoding runs outside Python's lock
        *columns, errors = zip(*pool.map(look, range(len(source))), strict=True)
    say(f"{len(source)} images, {len(source.classes) if source.classes else 'no'} classes")
    for title, values in zip(("extension", "width x height", "mode"), columns, strict=True):
        counts = Counter(value for value in values if value).most_common()
        rest = f", {len(counts) - 8} others" if len(counts) > 8 else ""
        say(f"{title}: " + ", ".join(f"{value} {n}" for value, n in counts[:8]) + rest)
    say("for example: " + ", ".join(source.name(i) for i in sorted({0, len(source) // 2, len(source) - 1})))
    bad = [error for error in errors if error]
    say(f"unreadable: {len(bad)}" + "".join(bad))


# ----------------------------------------------------------------------------------------------------------------------
# Precision: autocast, parameter groups, the learning rate, and the end of an update
# ----------------------------------------------------------------------------------------------------------------------


def amp_dtype(amp, device):
    """torch.bfloat16, torch.float16 or None (float32) for --amp; auto: bf16 where the hardware multiplies in it, else fp16 on
    CUDA, else float32."""
    if amp != "auto":
        if amp == "fp16" and device.type != "cuda":
            raise Refused("--amp fp16 needs CUDA; use --amp bf16 or --amp off")
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else None


def autocast(device, dtype):
    """The one mixed-precision context; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def parameter_groups(model, weight_decay, no_decay=(), layer_id=None, layer_decay=1.0):
    """AdamW groups: no weight decay for tensors of fewer than two dimensions or with a last name in `no_decay`; with `layer_id`
    (name -> 0 ... last), `lr_scale` = layer_decay ** (last - id)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ids = [layer_id(name) if layer_id else 0 for name, _ in named]
    groups = {}
    for (name, parameter), layer in zip(named, ids, strict=True):
        decay = 0.0 if parameter.ndim < 2 or name.rsplit(".", 1)[-1] in no_decay else weight_decay
        scale = layer_decay ** (max(ids) - layer)
        group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def adamw(groups, betas):
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def gradient_sync(model, now):
    """Context for a micro-step: DDP averages gradients over the processes only in an update's last one."""
    return nullcontext() if now or not isinstance(model, DistributedDataParallel) else model.no_sync()


def warmup_cosine(epoch, lr, min_lr, warmup_epochs, epochs):
    """Learning rate at a fractional epoch: linear from 0 during the warm-up, then half a cosine down to min_lr."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def batch_statistics(model):
    """BatchNorm's running statistics; other buffers are constants."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def remember_statistics(model):
    """Returns a function that puts BatchNorm's statistics back as they are now: the forward pass of an update that is skipped
    has put what was not finite into them."""
    statistics = batch_statistics(model)
    before = [buffer.clone() for buffer in statistics]

    def restore():
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)

    return restore


def finish_update(run, optimizer, scaler, terms, clip_grad=0.0):
    """Unscale, measure and clip the gradients, let all processes agree, then step, or skip the update on every one of them.

    terms: {name: detached scalar}, `loss` among them, this process's means over the update. Returns floats averaged over the
    processes, with `grad_norm` and `skipped` ("", "nonfinite" or "overflow", the fp16 scaler's own affair); of a skipped update
    this process's own values. This is the update's one host synchronisation: one all-reduce of a few numbers carries the
    flags and the values for the log.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    if any(gradient is None for gradient in gradients):
        raise RuntimeError("a parameter received no gradient: DDP would hang on it")
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    values = {**terms, "grad_norm": grad_norm}
    bad_loss, bad_gradient = ((~torch.isfinite(x)).float() for x in (terms["loss"], grad_norm))
    flags = [grad_norm.new_full((), number) for number in (float(run.stop_requested), float(len(run.bad_files.new)))]  # no sync
    own = torch.stack([bad_loss, bad_gradient, *(value.float() for value in values.values()), *flags])
    packed = own.clone()
    if run.world_size > 1:
        dist.all_reduce(packed)
    bad_loss, bad_gradient, *numbers, stop, bad_files = packed.tolist()
    run.stopping = stop > 0
    if bad_files:
        run.bad_files.share()
    result = {name: number / run.world_size for name, number in zip(values, numbers, strict=True)}
    if bad_loss or bad_gradient:
        overflow = scaler.is_enabled() and not bad_loss
        scaler.update()
        return dict(zip(values, own[2:].tolist(), strict=False)) | {"skipped": "overflow" if overflow else "nonfinite"}
    if clip_grad:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    scaler.step(optimizer)
    scaler.update()
    return {**result, "skipped": ""}


# ----------------------------------------------------------------------------------------------------------------------
# Run: command line, process group, checkpoint, log, pictures
# ----------------------------------------------------------------------------------------------------------------------


def opt(default, text):
    """A Config field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class RunConfig:
    """What every script's command line has beside its method's fields."""

    data: str = opt("data/imagenet", "folder of images, .txt list of paths, .npz, or shapes|cifar10|cifar100|stl10|cars")
    download: bool = opt(False, "let torchvision fetch cifar10, cifar100 or stl10 into data/")
    img_size: tuple[int, int] = opt((224, 224), "pixels, H or H,W")
    in_chans: int = opt(3, "channels of the images")
    mean: tuple[float, ...] | None = opt(None, "per channel, of values in [0, 1]; default: the data set's or ImageNet's")
    std: tuple[float, ...] | None = opt(None, "likewise")
    workers: int | None = opt(None, "loader processes per training process; default: its share of the cores, at most 8")
    max_bad: float = opt(0.001, "share of unreadable files (at least one file) above which the run stops")
    check_data: bool = opt(False, "read all images, report, and exit")
    out: str | None = opt(None, "folder to write into; default runs/SCRIPT. A file: --draw, --mode features")
    resume: bool = opt(False, "continue the run in --out exactly where its checkpoint is; start it if there is none")
    seed: int = opt(0, "seed of everything random")
    amp: Literal["auto", "bf16", "fp16", "off"] = opt("auto", "mixed precision; auto: bf16 or fp16 where that is fast")
    compile: bool = opt(False, "compile the model with torch.compile")
    save_minutes: float = opt(10.0, "minutes between checkpoints (also written at each epoch's end and on SIGTERM)")
    log_every: int = opt(20, "updates between two log lines")
    demo: bool = opt(False, "small values for everything: drawn shapes, a tiny model, a few minutes on two CPU cores")

    may_be_0 = {"seed", "workers", "pictures"}  # of the whole numbers

    def __post_init__(self):
        for name, value in vars(self).items():
            whole = isinstance(value, int) and not isinstance(value, bool) and name not in self.may_be_0
            if (whole or name == "epochs" and value is not None) and value <= 0:
                raise ValueError(f"--{name} is {value}, expected more than 0")
        if min(self.img_size) <= 0 or (self.workers or 0) < 0:
            raise ValueError("--img_size must be positive, --workers not negative")


# What may differ when a run is resumed, because it does not change what is computed.
STARTS = ("init", "generator_init", "discriminator_init", "weights")  # what a new run begins with
FREE_ON_RESUME = {"data", "download", "workers", "max_bad", "check_data", "out", "resume", "compile", "save_minutes",
                  "log_every", "demo", "micro_batch", "tokenizer", "pictures", "recompute", "memory", "recipe", "print_recipe",
                  "draw", *STARTS}
# What may differ after non-finite updates as well, to get past them.
FREE_AFTER_NAN = {"amp", "precision", "clip_grad", "base_lr", "lr"}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        refuse(self.prog, Refused(message))


def _converter(annotation):
    """(text -> value, choices) for a field's type; a tuple is written 1,2,3, one number standing for all of a fixed length."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(t for t in get_args(annotation) if t is not type(None))
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    if get_origin(annotation) is not tuple:
        return annotation, None
    element, *rest = get_args(annotation)

    def convert(text):
        values = tuple(element(part) for part in text.split(","))
        if rest != [...] and len(values) not in (1, 1 + len(rest)):
            raise ValueError
        return values * (1 + len(rest)) if rest != [...] and len(values) == 1 else values

    convert.__name__ = f"{element.__name__},..."  # argparse quotes it
    return convert, None


def start_flags(names):
    """The flags among `names` that take a file to start from, for messages."""
    return " or ".join(f"--{name} FILE" for name in STARTS if name in names)


def parse_config(config_type, presets=lambda flags: {}, argv=None):
    """Command line -> config_type(...). Flags are the field names, with `_` or `-`; `presets(flags)` may turn flags such as
    --demo into other defaults, which flags given beside them override. Anything wrong: one line, exit code 2."""
    types = get_type_hints(config_type)
    parser = OneLineParser(description=sys.modules[config_type.__module__].__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_type):
        text = field.metadata["help"] + ("" if field.default is None else f" (default {field.default})")
        how = {"default": field.default, "help": text.replace("%", "%%")}
        if types[field.name] is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **how)
        else:
            convert, choices = _converter(types[field.name])
            how["help"] += f" [{', '.join(choices)}]" if choices else ""
            parser.add_argument(f"--{field.name}", type=convert, choices=choices, metavar=field.name.upper(), **how)
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--"):
            flag, *value = word[2:].split("=", 1)
            flag = flag.replace("-", "_")
            flag = f"no-{flag[3:]}" if flag.startswith("no_") and flag not in types else flag
            words.append("=".join([f"--{flag}", *value]))
        elif words and re.match(r"-[\d.]", word) and words[-1][2:] in types:  # a negative value, no flag
            words[-1] += f"={word}"
        else:
            words.append(word)
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), types, 1)
        if not unknown[0].startswith("-") and flags.resume:
            parser.error(f"--resume takes no file ({unknown[0]}): it continues the run in --out; for weights use "
                         + start_flags(types))
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean --{near[0]}?" if near else "; --help lists them"))
    try:
        parser.set_defaults(**presets(flags))
        return config_type(**vars(parser.parse_args(words)))
    except (ValueError, Refused) as error:
        parser.error(str(error))


def new_file(path, suffix):
    """--out as the path of one file, its folder made; Refused if it is there already."""
    path = Path(path)
    if path.suffix != suffix or path.is_dir():
        raise Refused(f"--out {path}: expected the name of a new file, NAME{suffix}")
    if path.exists():
        raise Refused(f"--out {path} is there already: move it away or choose another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot write --out {path}: {error}") from None
    return path


def write_atomically(path, save, keep=None):
    """save(open file) beside `path`, then rename over it: a kill or a full disk leaves what was there as it was. `keep`: a path
    for the file that was there (a kill between the two renames leaves it under that name)."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        while error.__context__:  # torch reports a full disk as a wrong position in the file
            error = error.__context__
        raise Refused(f"cannot write {path} ({reason(error)}); what was there before is untouched", code=1) from None


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next ones (elsewhere nothing happens). By default it returns blocks of
    more than 32 MB to the system at once and gets them back page by page: on a CPU up to half of an update's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap shrinks only by 2 GB


class Run:
    """One run of one script: its process, its folder, its log. It holds no loop; the scripts do.

    Attributes: rank, world_size, is_main, device, amp_dtype, workers, out (Path), stopping (all processes have agreed to stop),
    kept (plain values that travel in the checkpoint), inputs ({name: value} that must be the same when the run is resumed).
    """

    def __init__(self, cfg, method):
        self.cfg, self.method = cfg, method
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        self.amp_dtype = amp_dtype(cfg.amp, self.device)
        if not cuda:
            keep_freed_memory()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.workers = min(8, share) if cfg.workers is None else cfg.workers
        self.out = Path(cfg.out or f"runs/{method}")
        self.stop_requested = self.stopping = False
        self.bad_files = BadFiles(cfg.max_bad, self.world_size)
        self.inputs = {}
        self.kept = {"skipped_nonfinite": 0, "skipped_overflow": 0, "in_a_row": 0, "window": []}
        self.live = sys.stdout.isatty()
        self.last_save = self.window_start = time.monotonic()
        self.counted, self.waited = 0, 0.0

    def start(self, plan, lr_line):
        """Process group (only under torchrun), signals, the folder: Refused if --out holds another run. plan: None if there
        is no training to do."""
        self.plan = plan
        self.join()
        if plan:
            self.catch_signals()
        try:
            if self.out.exists() and any(self.out.iterdir()) and not self.cfg.resume:
                way = "continue the run in it with --resume, or choose another --out" if plan else "choose another --out"
                raise Refused(f"{self.out} is not empty: {way}")
            if dist.is_initialized():
                dist.barrier()  # all have looked before the first one writes
            if self.is_main:
                (self.out / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"cannot write into --out {self.out}: {error}") from None
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        self.print(f"torch {torch.__version__}, {self.world_size} x {name}, {self.amp_dtype or torch.float32}, "
                   f"{self.workers} loader workers, writing to {self.out}/")
        if plan:
            self.print(f"{plan.n} images, {plan.steps} updates; batch {plan.batch_size} = {self.world_size} processes x "
                       f"{plan.micro_batch} x {plan.accum_steps}; {lr_line}")

    def join(self):
        """Device and, under torchrun, process group."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if "RANK" in os.environ and not dist.is_initialized():
            backend, bound = ("nccl", self.device) if self.device.type == "cuda" else ("gloo", None)
            limit = timedelta(minutes=10)
            store, *_ = next(dist.rendezvous("env://", timeout=limit))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one node (several count their restarts separately)
                # torchrun keeps its store when it restarts: without a name of their own, new processes would take the
                # addresses of the dead ones for each other's, and wait.
                store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=limit,
                                    device_id=bound)
        if hasattr(faulthandler, "register"):  # kill -USR2: where does it hang?
            faulthandler.register(signal.SIGUSR2, file=sys.__stderr__)

    def catch_signals(self):
        """From now on this run is the one that SIGTERM, SIGINT and SIGUSR1 stop."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def go_on_after(self, stage):
        """After the run `stage`, a part of this one: all processes wait for each other; signals stop this run again."""
        self.catch_signals()
        self.stop_requested |= stage.stop_requested
        if dist.is_initialized():
            dist.barrier()

    def _on_signal(self, number, _):
        if self.stop_requested and number == signal.SIGINT:  # Ctrl-C twice: now
            raise KeyboardInterrupt
        self.stop_requested = True

    def print(self, text, **how):
        say(("\r\033[K" if self.live else "") + text, **how)

    def prepare(self, model):
        """Move to the device, compile in place (names stay clean), wrap in DDP under torchrun."""
        model.to(self.device)
        if self.cfg.compile:
            model.compile()
        if not dist.is_initialized():
            return model
        # Buffers are constants, or BatchNorm statistics, which stay each process's own: no broadcast in every step.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # new name, old name
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, **{name: False})

    def share_statistics(self, model):
        """BatchNorm's, of the first process, to all: every process evaluates with the statistics that are saved."""
        for buffer in batch_statistics(model) if self.world_size > 1 else ():
            dist.broadcast(buffer, 0)

    def seed(self, step, micro_step):
        """Re-seed the generators at a micro-step's start, so that a resumed run needs no stored generator state."""
        torch.manual_seed(stable_seed(self.cfg.seed, step, micro_step, self.rank))

    def timed(self, loader):
        """Iterate over batches: the time spent waiting is counted, unreadable files are noted."""
        iterator = iter(loader)
        while True:
            begin = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - begin
            if batch is None:
                return
            self.bad_files.note(batch["bad"])
            yield batch

    @contextmanager
    def off_the_clock(self):
        """Evaluation, pictures, saving: not counted in images_per_second and data_wait."""
        begin, waited = time.monotonic(), self.waited
        yield
        self.window_start, self.waited = self.window_start + time.monotonic() - begin, waited

    def end_update(self, step, stats, lr, samples):
        """Account for the `step`-th update: a log line every --log_every, a dump for a skipped one, exit code 3 after ten."""
        skipped, kept = stats.pop("skipped"), self.kept
        self.counted += 1
        # Ten non-finite updates in a row end the run, or thirty overflows: the fp16 scale starts high and is halved each time.
        kept["in_a_row"] += {"": -kept["in_a_row"], "overflow": 1, "nonfinite": 3}[skipped]
        if skipped:
            kept[f"skipped_{skipped}"] += 1
        else:
            kept["window"].append(stats)
        if skipped == "overflow":
            self.print(f"step {step}: fp16 overflow, update skipped by the loss scaler (it lowers its scale; harmless if rare)")
        if skipped == "nonfinite" or kept["in_a_row"] >= 30:
            self._dump(step, lr, samples, stats)
        if kept["in_a_row"] >= 30:
            good = next((path for path in self.checkpoints()), "none yet")
            raise Refused(f"ten non-finite updates (or thirty overflows) in a row up to step {step}, lr {lr:.2g}; last good "
                          f"checkpoint: {good}; see nonfinite_{step}.json; --resume with --amp off, --clip_grad 1 or half the "
                          "learning rate may get past this", code=3)
        if step % self.cfg.log_every and step < self.plan.steps:
            return self._show(step, stats["loss"]) if self.live else None
        elapsed, window = time.monotonic() - self.window_start, kept["window"]
        means = {name: sum(stats[name] for stats in window) / len(window) for name in (window[0] if window else ())}
        grad_norm = means.pop("grad_norm", None)
        skips = {name: count for name, count in kept.items() if name.startswith("skipped")}
        rate = self.counted * self.plan.batch_size / elapsed
        self.log({"step": step, "epoch": round(self.plan.epoch(step), 4), **{f"train/{k}": v for k, v in means.items()},
                  "lr": lr, "grad_norm": grad_norm, "images_per_second": round(rate, 3),
                  "data_wait": round(self.waited / elapsed, 4), "peak_memory": self.peak_memory(), **skips})
        self._show(step, means.get("loss", math.nan), f" lr {lr:.2e} data_wait {self.waited / elapsed:.0%}")
        kept["window"], self.counted, self.waited, self.window_start = [], 0, 0.0, time.monotonic()

    def peak_memory(self):
        """GiB: of the CUDA device, else of this process."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated() / 2**30, 3)
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3) if resource else None

    def _show(self, step, loss, more=""):
        rate = self.counted * self.plan.batch_size / (time.monotonic() - self.window_start)
        left = timedelta(seconds=round((self.plan.steps - step) * self.plan.batch_size / rate))
        self.print(f"epoch {self.plan.epoch(step):.2f} step {step}/{self.plan.steps} loss {loss:.4f}{more} "
                   f"{rate:,.{0 if rate >= 10 else 2}f} images/s, {left} left", end="" if self.live else "\n")

    def _dump(self, step, lr, samples, stats):
        record = {"rank": self.rank, "samples": samples, "terms": {name: str(value) for name, value in stats.items()}}
        records = [record] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(records, record)
        self._write(f"nonfinite_{step}.json", json.dumps({"step": step, "lr": lr, "ranks": records}, indent=1))
        self.print(f"step {step}: non-finite loss or gradient, update skipped on all processes; see nonfinite_{step}.json")

    def log(self, line):
        """Append one JSON object to log.jsonl."""
        if self.is_main:
            try:
                with open(self.out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise Refused(f"cannot write {self.out}/log.jsonl: {error}", code=1) from None

    def write_config(self):
        """All settings to config.json."""
        self._write("config.json", json.dumps({"script": self.method, **dataclasses.asdict(self.cfg)}, indent=1))

    def _write(self, name, text):
        if self.is_main:
            write_atomically(self.out / name, lambda file: file.write(text.encode()))

    def _cut_log(self, step):
        """Drop what a killed run logged after its last checkpoint: it will be logged again."""
        path = self.out / "log.jsonl"
        if self.is_main and path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            self._write(path.name, "".join(line for line in whole if json.loads(line)["step"] <= step))

    def save_due(self, step):
        """After the `step`-th update: whether a pass has just ended, --save_minutes are over, or the run stops here."""
        late = time.monotonic() - self.last_save > 60 * self.cfg.save_minutes
        return self.plan.ends_epoch(step) or late or self.stopping

    def picture_due(self, step):
        """Path of the picture to draw after the `step`-th update; None if none is due, or if another process draws it."""
        if not (self.is_main and self.cfg.pictures and self.plan.ends_epoch(step)):
            return None
        passes = self.plan.passes(step)
        number = passes + (passes == self.plan.passes(step - 1))  # a last partial pass counts
        return self.out / f"pictures/epoch_{number:04}.png"

    def checkpoints(self):
        """Paths of what --resume can go on from, newest first."""
        return [path for path in (self.out / "last.pth", self.out / "previous.pth") if path.exists()]

    def save(self, step, state, meta):
        """Write last.pth; the one before becomes previous.pth. state: {name: object with state_dict()}; meta: plain values."""
        self.last_save = time.monotonic()
        if not self.is_main:
            return
        content = {name: value.state_dict() for name, value in state.items()}
        content |= {"meta": meta, "method": self.method, "config": dataclasses.asdict(self.cfg), "n": self.plan.n, "step": step,
                    "epoch": self.plan.passes(step), "precision": str(self.amp_dtype), "bad_files": self.bad_files.known,
                    "kept": self.kept, "inputs": self.inputs}
        write_atomically(self.out / "last.pth", lambda file: torch.save(content, file), keep=self.out / "previous.pth")

    def load(self, state):
        """--resume: restore `state` from --out and return the step it stands at; 0 if there is nothing to resume."""
        paths = self.checkpoints() if self.cfg.resume else []
        step = self._restore(paths, state) if paths else 0
        steps = [step] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise Refused(f"--resume: the processes stand at steps {steps}: --out must be one folder that all nodes share")
        self._cut_log(step)
        self.write_config()
        self.last_save = self.window_start = time.monotonic()
        return step

    def _restore(self, paths, state):
        path, *others = paths
        content, wrong = self._read_checkpoint(path)
        if wrong:
            good = [other for other in others if not self._read_checkpoint(other)[1]]
            hint = f"{good[0]} is good: mv it over {path} and --resume again" if good else "there is no other good checkpoint"
            raise Refused(f"--resume: {wrong}; {hint}")
        for name, value in state.items():
            value.load_state_dict(content[name])
        self.bad_files.known, step = content["bad_files"], content["step"]
        self.kept |= content["kept"]
        self.print(f"resumed from {path}: step {step}, epoch {self.plan.epoch(step):.2f}, "
                   f"sample {step * self.plan.batch_size % self.plan.n} of the pass")
        return step

    def _read_checkpoint(self, path):
        """(content, what is wrong with it for this run, or "")"""
        try:
            content = read_file(path)
        except Refused as error:
            return None, str(error)
        if content.get("method") != self.method:
            return None, f"{path} is no checkpoint of {self.method} but of {content.get('method', 'something else')}"
        before = content["config"] | {"images": content["n"], "precision": content["precision"]} | content.get("inputs", {})
        now = dataclasses.asdict(self.cfg) | {"images": self.plan.n, "precision": str(self.amp_dtype)} | self.inputs
        before = {field.name: field.default for field in dataclasses.fields(self.cfg)} | before  # flags younger than the run
        changed = {key for key in now.keys() - FREE_ON_RESUME if before.get(key) != now[key]}
        if any(self.out.glob("nonfinite_*.json")):
            changed -= FREE_AFTER_NAN
        listing = "; ".join(f"{key} {before.get(key)}, not {now[key]}" for key in sorted(changed))
        return content, listing and (f"the run in {path} has {listing}: repeat its flags, or start from its weights with "
                                     f"{start_flags(now)} and another --out")

    def export(self, name, weights, meta):
        """Write weights for use elsewhere: {"model": timm's names, "meta": plain values}."""
        if self.is_main:
            content = {"model": {key: value.detach().cpu() for key, value in weights.items()}, "meta": meta}
            write_atomically(self.out / name, lambda file: torch.save(content, file))


def fill_from_visible(values, mask, grid):
    """A statistic of each patch (B, L, S) -> what the visible patches around suggest for it, weighted by exp(-distance^2 / 2):
    un-normalises predictions with no look at what is hidden. mask (B, L), 1 = hidden."""
    position = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32, device=values.device) for n in grid))
    score = -torch.cdist(position, position).square() / 2
    weight = score.masked_fill(mask[:, None].bool(), -torch.inf).softmax(-1)  # (B, L, L), from visible patches only
    return weight @ values


def save_pictures(path, rows, titles, caption):
    """PNG grid: rows of images (C, H, W) in [0, 1] under column titles, a caption below. Three channels are shown in colour,
    other counts by their first channel; small images are enlarged by whole factors."""
    height, width = rows[0][0].shape[1:]
    factor, gap, line = max(1, 128 // max(height, width)), 4, 16
    cell_h, cell_w = height * factor + gap, width * factor + gap
    caption = textwrap.wrap(caption, cell_w * len(titles) // 6)  # the built-in font is about 6 px wide
    canvas = Image.new("RGB", (cell_w * len(titles), line + cell_h * len(rows) + line * len(caption)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        pen.text((column * cell_w + 2, 2), title, fill="black")
        for row, images in enumerate(rows):
            image = images[column].cpu() if len(images[column]) == 3 else images[column][:1].cpu().expand(3, -1, -1)
            picture = TF.to_pil_image(image.float().clamp(0, 1)).resize((width * factor, height * factor), Image.NEAREST)
            canvas.paste(picture, (column * cell_w, line + row * cell_h))
    for i, text in enumerate(caption):
        pen.text((2, canvas.height - line * (len(caption) - i) + 2), text, fill="black")
    write_atomically(path, lambda file: canvas.save(file, "png"))


def launch(config_type, presets, train, method):
    """A script's main: parse, train(cfg, run), end the process group. A user's mistake ends in one line and its exit code."""
    cfg = parse_config(config_type, presets)
    try:
        run = Run(cfg, method)
        train(cfg, run)
    except Refused as error:
        refuse(method, error)
    except KeyboardInterrupt:  # in training: the second one
        refuse(method, Refused("interrupted", code=130))
    except RuntimeError as error:
        if not re.search("Connection (closed|reset) by peer|Timed out waiting", str(error)):
            raise
        message = f"another process of this run has ended or does not answer; see its message ({reason(error)})"
        refuse(method, Refused(message, code=1))
    if dist.is_initialized():
        dist.destroy_process_group()
