"""What every method script takes as given. Four chapters: blocks, data, precision, run.

Nothing here belongs to one paper: masking, targets, losses and training loops are in the scripts. Importing
this file changes nothing but a limit of Pillow's. To take a method elsewhere, copy its script together with
this file. Shapes: B images, C channels, H x W pixels, patches of p x p pixels on a grid (h, w), L = h * w
patches, width D. `mask` is 1 where a patch is hidden, everywhere.
"""

import argparse
import atexit
import ctypes
import dataclasses
import difflib
import errno
import faulthandler
import functools
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import secrets
import shlex
import signal
import socket
import stat
import sys
import textwrap
import threading
import time
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, PngImagePlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import Bottleneck
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither, and not all signals
    fcntl = resource = None

# Save and stop: Ctrl-C, a scheduler's two, a closed terminal, a limit on CPU time.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU")
                if hasattr(signal, name)]


class UserError(Exception):
    """The user can fix this: shown as one line, exit code `code` (2 = wrong input, 3 = training diverged)."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def first_line(error):
    """Of an error's text, without addresses and places in C++ code."""
    text = re.sub(r"\[enforce fail at [^\]]*\][ .]*| <\S+ object at 0x\w+>", "", str(error)) or repr(error)
    return text.splitlines()[0][:200]


def print0(text):
    """Print on rank 0 only. File names that are not valid UTF-8 can be printed too. A closed terminal or a
    full disk is no reason to end a run: further output is dropped."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(text.encode(errors="backslashreplace").decode(), flush=True)
        except (OSError, ValueError):
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)


def exit_with(method, error):
    """Print the error in one line and exit with its code."""
    rank, place = os.environ.get("RANK", "0"), ""
    if rank != "0":  # most errors hit all ranks: rank 0 says so, and its exit ends the others as they wait
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(6)
        place = f"[process {rank}] "
    with suppress(OSError, ValueError):
        print(f"{method}: {place}{error}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(error.code)  # at once: an orderly exit could wait for processes that will never answer
    sys.exit(error.code)


# ==== Blocks: the ViT with timm's and MAE's parameter names, ResNet-50 with torchvision's, files of weights

VIT_SIZES = {  # embed_dim, depth, num_heads
    "nano": (128, 4, 4),  # our choice, for --demo and tests
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def patch_grid(img_size, patch_size):
    """(h, w) patches of an image of (H, W) pixels; ValueError unless the patches tile it."""
    height, width = img_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"--img_size {height},{width} is not a multiple of --patch_size {patch_size}")
    return height // patch_size, width // patch_size


def patchify(images, p):
    """(B, C, H, W) -> (B, L, p*p*C): patches row by row, inside a patch ordered (row, column, channel)."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches, p, grid):
    """(B, L, p*p*C) -> (B, C, h*p, w*p): undoes `patchify`."""
    (h, w), C = grid, patches.shape[2] // (p * p)
    x = patches.reshape(len(patches), h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), C, h * p, w * p)


def patches_to_pixels(values, p, grid):
    """(B, L, S) -> (B, S, h*p, w*p): each pixel gets the values of its patch."""
    return F.interpolate(values.transpose(1, 2).unflatten(2, grid), scale_factor=p)


def sincos_pos_embed(dim, grid):
    """Fixed 2-D sine-cosine table (1, 1 + L, dim), row 0 (class token) zero. The first half of the channels
    encodes the column, the second the row (MAE; MoCo v3 has it transposed), each [sin | cos]."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (columns, rows)]  # each (L, dim / 4)
    table = torch.cat([values for angle in angles for values in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), table.float()]).unsqueeze(0)


def interpolate(x, *size, **how):
    """F.interpolate in the dtype of x: autocast would leave float32 behind, twice the bytes."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, *size, **how)


def resize_pos_embed(table, old_grid, new_grid):
    """(1, 1 + L, D) -> (1, 1 + L', D): bicubic in float32, class-token row unchanged."""
    patches = table[:, 1:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def gather_tokens(x, ids):
    """(B, N, D), (B, n) int64 -> (B, n, D): token ids[b, j] of image b."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, L, D): one linear map per patch, written as a convolution."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v for (B, heads, N, d). No mask, and mostly no bias (heads, N, N): they
    rule out the fast kernels."""
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The bf16 backward pass of torch's fused CPU kernel is two to five times slower than these products.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, bias=None):  # (B, N, D); bias: see attend
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, bias).transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU


def drop_path(x, rate, training):
    """Stochastic depth: zero a branch per sample with probability `rate`, divide the rest by 1 - rate."""
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

    def forward(self, x, bias=None):
        x = x + drop_path(self.attn(self.norm1(x), bias), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


def init_linear(network):
    """MAE's initial values of all linear layers: Xavier-uniform, bias 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision Transformer without head. drop_path: rate of the last block, rising linearly from 0."""

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
        """The state dict without what a subclass adds: what a plain ViT loads."""
        trunk = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
        return {name: value for name, value in self.state_dict().items() if name.startswith(trunk)}

    def init_weights(self):
        """MAE's: Xavier-uniform for linear layers and the patch embedding, N(0, .02) for tokens."""
        init_linear(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        for name, parameter in self.named_parameters():
            if name.endswith(("cls_token", "mask_token")):
                nn.init.normal_(parameter, std=0.02)

    def layer_id(self, name):
        """For layer-wise decay: 0 tokens and patch embedding, k + 1 block k, depth + 1 the rest."""
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.depth + 1

    def embed(self, images):
        """(B, C, H, W) -> patch tokens with positions (B, L, D), no class token yet."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def prepend_cls(self, x):
        """(B, N, D) -> (B, 1 + N, D)"""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def forward(self, images):
        """(B, C, H, W) -> normalised tokens (B, 1 + L, D), nothing hidden."""
        x = self.prepend_cls(self.embed(images))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ResNet50(nn.Module):
    """torchvision's ResNet-50 without classifier. width: 64, or 128 and 256 for SimCLR's x2 and x4."""

    def __init__(self, width=64, in_chans=3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1, channels = nn.BatchNorm2d(width), width
        for i, blocks in enumerate((3, 4, 6, 3)):
            inner, stride = width * 2**i, 1 if i == 0 else 2
            shortcut = nn.Conv2d(channels, 4 * inner, 1, stride, bias=False)
            stage = [Bottleneck(channels, inner, stride, nn.Sequential(shortcut, nn.BatchNorm2d(4 * inner)))]
            stage += [Bottleneck(4 * inner, inner) for _ in range(blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            channels = 4 * inner
        self.embed_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def trunk_state(self):
        """The state dict without what a subclass adds."""
        trunk = ("conv1", "bn1", "layer")
        return {name: value for name, value in self.state_dict().items() if name.startswith(trunk)}

    def forward(self, images):
        """(B, C, H, W) -> (B, 32 * width, H / 32, W / 32)"""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def fill_from_visible(values, mask, grid):
    """For pictures: estimate a statistic of each patch, values (B, L, S), from the visible patches near it,
    weighted by exp(-distance^2 / 2). mask (B, L), 1 = hidden."""
    axes = [torch.arange(n, dtype=torch.float32, device=values.device) for n in grid]
    position = torch.cartesian_prod(*axes)
    score = -torch.cdist(position, position).square() / 2
    return score.masked_fill(mask[:, None].bool(), -torch.inf).softmax(-1) @ values


def load_pickled(path):
    """Content of a torch.save file. Opened here: torch would judge a path by its suffix."""
    plain = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]  # MAE's arguments, SimMIM's settings
    with open(path, "rb") as file, torch.serialization.safe_globals(plain):
        return dict(torch.load(file, map_location="cpu", weights_only=True))


def read_file(path, load=None):
    """Content of a file of weights (tensors, plain values, MAE's and SimMIM's settings: nothing else is
    unpickled), or what load(path) reads. Files from elsewhere, and transformers' folders, are turned into the
    form of ours. UserError, in one line, if it cannot be read."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        archive = zipfile.ZipFile(path) if path.is_file() and zipfile.is_zipfile(path) else None
        if archive and (broken := archive.testzip()):  # torch.load does not look at the checksums
            raise ValueError(f"{broken} in it is damaged")
        if load:
            return load(path)
        if archive and not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise ValueError("it is a zip archive, but not one of torch.save")
        content = load_pickled(path) if archive else {}
        meta = content.get("meta")
        if "encoder" in content or isinstance(meta, dict) and "method" in meta:  # ours
            return content
        from weights import adopt, read_other  # a script that is copied elsewhere runs without it

        return adopt(content if archive else read_other(path), path)
    except ImportError as error:
        raise UserError(f"reading {path} needs {error.name}: install it, or copy {error.name}.py") from None
    except UserError:
        raise
    except Exception as error:  # by kind of damage; torch's own message is how to run code from the file
        pickled = isinstance(error, pickle.UnpicklingError) and not load
        why = "damaged, or more than model.state_dict()" if pickled else first_line(error)
        raise UserError(f"cannot read {path}: {why}") from None


# What a file of weights says of its network and of the images that it was trained on.
NETWORK = ("model", "patch_size", "resnet_width", "columns", "swin_window", "in_chans", "mean", "std")


def weights_of(content, prefix=None):
    """{name: tensor} of what read_file gave. prefix None: of a checkpoint of ours its encoder alone; else the
    names that start with it, without it; all if none does, and for ""."""
    weights = content["model"]
    if prefix is None and content.get("encoder"):
        return {name: weights[place] for name, place in content["encoder"].items()}
    prefix = prefix or ""
    chosen = {name: value for name, value in weights.items() if name.startswith(prefix)} or weights
    return {name.removeprefix(prefix): value for name, value in chosen.items()}


def network_of(content):
    """{field: value} of a file's network and images; {} if it shows nothing."""
    return content["meta"] if "model" in content.get("meta", {}) else {}


def not_finite(weights):
    """What is wrong with {name: tensor}: the first tensor with values that are not finite, or are beyond what
    training can repair; None if all is good."""
    floats = {name: value for name, value in weights.items() if value.is_floating_point() and value.numel()}
    largest = torch.stack([value.abs().max().float() for value in floats.values()]).tolist() if floats else []
    bad = ((name, value) for name, value in zip(floats, largest, strict=True) if not value < 1e15)
    return next((f"{name} has values of {value:.3g}" for name, value in bad), None)


def load_weights(model, path, allow_missing=(), ignore=(), prefix=None, content=None):
    """Copy weights into `model` by name (`prefix`: see weights_of), position tables resized to its grid.
    UserError if a shape differs, if a name has no place in it and starts with no prefix in `ignore`, or if it
    lacks one that starts with no prefix in `allow_missing`. content: what read_file(path) gave."""
    content = content or read_file(path)
    meta, weights = network_of(content), weights_of(content, prefix)
    if bad := not_finite(weights):
        raise UserError(f"{path} is of a training that diverged: {bad}")
    ignored = {name for name in weights if name.startswith(tuple(ignore))}
    weights = {name: value for name, value in weights.items() if name not in ignored}
    for name in model.state_dict().keys() & weights.keys():
        if name.endswith("pos_embed"):
            L = weights[name].shape[1] - 1
            side = math.isqrt(L)
            old = patch_grid(meta["img_size"], meta["patch_size"]) if "img_size" in meta else (side, side)
            if math.prod(old) != L:
                raise UserError(f"{path}: {name} has {L} patches, and the file does not say on what grid")
            new = getattr(model.get_submodule(name.rpartition(".")[0]), "grid", None) or model.grid
            if old != new:
                weights[name] = resize_pos_embed(weights[name], old, new)
                print0(f"{name} {old[0]}x{old[1]} -> {new[0]}x{new[1]}, bicubic")
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        shapes = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not fit --model, --patch_size: {shapes}") from None
    wrong = unexpected + [name for name in missing if not name.startswith(tuple(allow_missing))]
    if wrong:
        raise UserError(f"{path} does not fit: {len(wrong)} tensors missing or unexpected, as {wrong[0]}")
    missing, ignored = (", ".join(sorted({name.split(".")[0] for name in names})) or "none"
                        for names in (missing, ignored))
    print0(f"{path}: {len(weights)}/{len(model.state_dict())} tensors loaded; missing: {missing}; "
           f"ignored: {ignored}")


# ==== Data: sources of images, transforms, a loader whose randomness depends on (seed, epoch, sample) alone

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
              ".ppm", ".pgm", ".npy")
# Pillow would run other programs on an EPS that is named .jpg. AVIF: if it was built with that.
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
           if name in Image.registered_extensions().values()]
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes of prompts or colour profiles that a PNG may have
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # EXIF orientation -> Pillow's name of what undoes it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# torchvision 0.29 announces the end of its decoders: Pillow then reads JPEG too, with the same result.
decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)


def stable_seed(*numbers):
    """A 64-bit seed from integers, the same on every machine and in every process."""
    digest = hashlib.blake2b(np.array(numbers, np.int64), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def as_image(array, in_chans):
    """(H, W) or (H, W, C) array -> tensor (in_chans, H, W): uint8, or float32. Integers but for uint8 count
    as 16 bit and come out in [0, 1]. Grey turns into RGB and RGB into grey. ValueError for another number of
    channels, and for values that are not finite or beyond 16 bit."""
    if array.dtype != np.uint8:
        kind, low, high = array.dtype.kind, array.min(), array.max()
        array = array.astype(np.float32)
        if not (kind == "f" and np.isfinite(array).all() or kind in "iu" and low >= 0 and high <= 65535):
            raise ValueError(f"values of {low} to {high}; expected whole ones of 0 to 65535, or finite ones")
        array = array if kind == "f" else array / np.float32(65535)
    image = torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)
    if len(image) == 1 and in_chans == 3:
        return image.expand(3, -1, -1)
    if len(image) == 3 and in_chans == 1:
        return TF.rgb_to_grayscale(image)
    if len(image) != in_chans:
        raise ValueError(f"{len(image)} channels where --in_chans is {in_chans}")
    return image


def orientation(image):
    """EXIF's, 1 to 8, of a Pillow image; 1 where the block cannot be read: its pixels can."""
    try:
        return image.getexif().get(274, 1)
    except Exception:  # the block's parser raises nearly anything
        return 1


@contextmanager
def time_limit(seconds):
    """TimeoutError in what takes longer; in the main thread alone, as the signal reaches no other."""

    def stop(*_):
        raise TimeoutError(f"not read within {seconds} seconds")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return (yield)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_image(path, in_chans, turn=True):
    """Decode one file to (in_chans, H, W), as `as_image`; turn: as its EXIF says."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > 2**31:  # reading a pipe would never end
        raise ValueError("no regular file, or one of more than 2 GB")
    with open(path, "rb", buffering=0) as file:
        file.readinto(buffer := bytearray(status.st_size))
    return decode_image(buffer, path, in_chans, turn)


def decode_image(buffer, name, in_chans, turn):
    """read_image for a file's content, a bytearray. JPEG goes through torchvision, which is faster; its PNG
    decoder can crash on a damaged file, where Pillow raises."""
    if name.lower().endswith(".npy"):
        return as_image(np.load(io.BytesIO(buffer), allow_pickle=False), in_chans)
    if buffer[:2] == b"\xff\xd8":  # a JPEG
        data = np.frombuffer(buffer, np.uint8)
        if np.count_nonzero((data[:-1] == 0xFF) & (data[1:] == 0xDA)) > 100:  # starts of scans
            raise ValueError("a JPEG of more than 100 scans, which would take minutes")
        if decode_jpeg and in_chans in (1, 3) and 0 < jpeg_pixels(buffer) <= Image.MAX_IMAGE_PIXELS:
            mode = "RGB" if in_chans == 3 else "GRAY"
            return decode_jpeg(torch.from_numpy(data), mode=mode, apply_exif_orientation=turn)
    with Image.open(io.BytesIO(buffer), formats=FORMATS) as image:  # refuses decompression bombs
        return decode_with_pillow(image, in_chans, turn)


def jpeg_pixels(buffer):
    """Height times width as the header says, 0 if it is unusual: Pillow's look at it costs a tenth of the
    decoding."""
    place = 2
    while buffer[place : place + 1] == b"\xff" and place + 8 < len(buffer):
        if buffer[place + 1] in (0xC0, 0xC1, 0xC2):  # start of frame
            return math.prod(int.from_bytes(buffer[i : i + 2], "big") for i in (place + 5, place + 7))
        place += 2 + int.from_bytes(buffer[place + 2 : place + 4], "big")  # the length of this segment
    return 0


@time_limit(60)
def decode_with_pillow(image, in_chans, turn):
    tag = orientation(image)
    if image.format == "TIFF":  # Pillow turns these itself: turn back if that is not wanted
        turn, tag = not turn, {6: 8, 8: 6}.get(tag, tag)
    if turn and tag in TURNS:
        image = image.transpose(Image.Transpose[TURNS[tag]])
    if in_chans in (1, 3) and image.mode[0] not in "IF":  # these are more than 8 bit
        image = image.convert("RGB" if in_chans == 3 else "L")
    return as_image(np.array(image), in_chans)


class ImageFiles:
    """Images in files. labels: class index of each, or -1. turn: see read_image."""

    def __init__(self, paths, labels, classes, in_chans, turn=True):
        # Arrays: the workers would copy a list of a million strings as its reference counts change.
        self.paths, self.labels = np.array([os.fsencode(path) for path in paths]), np.asarray(labels)
        self.classes, self.in_chans, self.turn = classes, in_chans, turn

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return os.fsdecode(self.paths[index].item())

    def read(self, index):
        return read_image(self.name(index), self.in_chans, self.turn), int(self.labels[index])


class ImageArray(ImageFiles):
    """Images in memory, uint8 (N, H, W, C)."""

    def __init__(self, images, names, labels, classes, in_chans):
        super().__init__(names, labels, classes, in_chans)
        self.images = images

    def read(self, index):
        return as_image(self.images[index], self.in_chans), int(self.labels[index])


def list_images(root):
    """Sorted paths of the images below `root`; links are followed. Prints what is left out, by suffix."""

    def fail(error):  # os.walk would pass over a folder that it may not read
        raise error

    found, others, visited = [], Counter(), set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        if os.path.realpath(folder) in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        for name in files:
            suffix = "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower()
            if suffix in EXTENSIONS:
                found.append(os.path.join(folder, name))
            else:
                others[suffix or "no suffix"] += 1
        others["hidden folders"] += len([name for name in folders if name.startswith(".")])
        folders[:] = [name for name in folders if not name.startswith(".")]
    left_out = ", ".join(f"{suffix} {n}" for suffix, n in others.most_common(12) if n)
    if not found:
        raise UserError(f"no image under {root}, only: {left_out or 'nothing'}; expected one of "
                        f"{' '.join(EXTENSIONS)}")
    if left_out:
        print0(f"{root}: {len(found)} images; left out, by suffix: {left_out}")
    return sorted(found)


def open_folder(root, in_chans, turn=True):
    """ImageFiles below `root`; classes: the first-level folders, if all images are in one. Or, if there are
    tars instead, Shards."""
    try:
        paths = list_images(root)
    except UserError:
        if not any(Path(root).glob("*.tar")):
            raise
        from shards import find_shards, open_shards  # a script that is copied elsewhere runs without it

        return open_shards(find_shards(root), in_chans, turn)
    inside = [os.path.relpath(path, root) for path in paths]
    if any(os.sep not in name for name in inside):
        return ImageFiles(paths, [-1] * len(paths), None, in_chans, turn)
    folders = [name.split(os.sep)[0] for name in inside]
    classes = sorted(set(folders))
    index = {name: i for i, name in enumerate(classes)}
    return ImageFiles(paths, [index[folder] for folder in folders], classes, in_chans, turn)


def tell_others(part, held_out=None):
    """Print what of a data set is not read."""
    others = sorted(path.name for path in part.parent.iterdir() if path not in (part, held_out))
    if others:
        print0(f"{part} is read; {part.parent} also has {', '.join(others[:8])}{' ...' * (len(others) > 8)}")


def data_path(data):
    """The path that --data names, from here or from the scripts' folder; None if there is none."""
    return next((path for path in (Path(data), Path(__file__).parent / data) if path.exists()), None)


def open_data(cfg, split="pretrain"):
    """The images of --data, for which labels are not needed: an object with len(), read(i) -> (tensor (C, H,
    W), label or -1), name(i), in_chans, and classes or None. split: "all", or "pretrain", which of a folder
    with train/ is that alone."""
    if cfg.data == "shapes":
        from shapes import Shapes  # a script that is copied elsewhere runs without it

        return Shapes(cfg.img_size, cfg.in_chans)
    root = data_path(cfg.data)
    try:
        if root is None or root.is_file():
            from sources import open_source  # likewise: for a folder of images

            return open_source(cfg, root, split)
        part = root / "train" if split == "pretrain" and (root / "train").is_dir() else root
        if part != root:
            tell_others(part)
        return open_folder(part, cfg.in_chans, cfg.exif != "ignore")
    except ImportError:
        raise UserError(f"--data {cfg.data} is no folder; other data need sources.py here") from None
    except OSError as error:
        raise UserError(f"--data {cfg.data}: {first_line(error)}") from None


def resize_to_cover(image, size, interpolation):
    """Resize (C, H, W), keeping the aspect ratio, until it just covers `size`; the other side is rounded
    down, as in torchvision. Of a strip, which would become huge, the centre is taken, 4 times `size` long."""
    scale = max(size[0] / image.shape[1], size[1] / image.shape[2])
    image = TF.center_crop(image, [min(old, math.ceil(4 * side / scale))
                                   for side, old in zip(size, image.shape[1:], strict=True)])
    _, H, W = image.shape
    h, w = size
    new = (h, max(w, h * W // H)) if h * W >= w * H else (max(h, w * H // W), w)
    return TF.resize(image, new, interpolation, antialias=True)


class RandomResizedCrop:
    """torchvision's, in less than half of its time: one call of `rand`, and pixels laid out for the fast
    8-bit kernel. A box of a share of the area within `scale` and an aspect of 3/4 to 4/3 (log-uniform), of
    ten tries or else the largest centred one, is resized, bicubic. scale: MAE's; fine-tuning has (.08, 1)."""

    def __init__(self, size, scale=(0.2, 1.0)):
        self.size, self.scale, self.log_ratio = size, scale, math.log(4 / 3)

    def box(self, height, width):
        """top, left, height, width"""
        low, high = self.scale
        for u_area, u_ratio, u_top, u_left in torch.rand(10, 4).tolist():
            area = height * width * (low + (high - low) * u_area)
            root = math.exp(self.log_ratio * (u_ratio - 0.5))  # of the aspect
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
    """The centre of an image: short side to size / ratio, `size` cut out. Default ratio: 224/256 from 128 to
    224 px, else 1 (above, as is usual; below, our choice: small images have no margin to spare)."""

    def __init__(self, size, ratio=None):
        self.size, self.ratio = size, ratio or (224 / 256 if 128 <= min(size) <= 224 else 1.0)

    def __call__(self, image):
        size = [int(side / self.ratio) for side in self.size]
        return TF.center_crop(resize_to_cover(image, size, InterpolationMode.BICUBIC), self.size)


class KeyedSamples(torch.utils.data.Dataset):
    """Turns a key (epoch, index) into a sample, with randomness from (seed, epoch, index) alone. A file that
    cannot be read is replaced by the next, of `tries`; `bad` lists (path, reason). sample_noise(): a tensor
    that the method needs per sample, such as masking noise."""

    def __init__(self, source, transform, seed, tries, sample_noise=None, flip=True):
        self.source, self.transform, self.seed, self.tries = source, transform, seed, tries
        self.sample_noise, self.flip = sample_noise, flip

    def read(self, index):
        bad = []
        for i in range(min(self.tries, len(self.source))):
            here = (index + i) % len(self.source)
            try:
                return *self.source.read(here), bad
            except Exception as error:  # decoders raise nearly anything
                bad.append((self.source.name(here), first_line(error)))
        # More bad files than --max_bad allows: the run stops before it uses this blank.
        return torch.zeros(self.source.in_chans, 64, 64, dtype=torch.uint8), -1, bad

    def __getitem__(self, key):
        epoch, index = key
        image, label, bad = self.read(index)
        torch.default_generator.manual_seed(stable_seed(self.seed, epoch, index))
        flip = torch.rand(()).item() < 0.5 and self.flip
        noise = {"noise": self.sample_noise()} if self.sample_noise else {}
        image = self.transform(image)
        image = image.flip(-1) if flip else image
        return {"index": index, "label": label, "bad": bad, **noise, "image": image}


def collate(samples):
    """List of samples -> batch of tensors, images channels-last in memory, as decoders and crops leave them;
    8-bit images become float only where a 16-bit one sits in the same batch."""
    mixed = len({sample["image"].dtype for sample in samples}) > 1
    bad = [entry for sample in samples for entry in sample.pop("bad")]
    for sample in samples:
        image = sample["image"].permute(1, 2, 0)
        sample["image"] = image / 255 if mixed and image.dtype == torch.uint8 else image
    batch = torch.utils.data.default_collate(samples)
    return {**batch, "image": batch["image"].permute(0, 3, 1, 2), "bad": bad}


def split_batch(batch_size, micro_batch, world_size):
    """(micro_batch, accum_steps): batch_size = processes x micro_batch x accum_steps. micro_batch None: the
    largest that divides, up to 256."""
    unit = world_size * (micro_batch or 1)
    if batch_size % unit:
        near = [n for n in (batch_size // unit * unit, batch_size // unit * unit + unit) if n]
        raise UserError(f"--batch_size {batch_size} is not a multiple of {unit} (processes x --micro_batch): "
                        f"use {' or '.join(map(str, near))}")
    share = batch_size // world_size
    micro_batch = micro_batch or next(m for m in range(min(256, share), 0, -1) if share % m == 0)
    return micro_batch, share // micro_batch


@functools.lru_cache(maxsize=4)
def names_digest(source):
    """(number of images, checksum of their names below what the first and the last share)"""
    n, digest = len(source), hashlib.blake2b(digest_size=4)
    shared = len(os.path.commonprefix([source.name(0), source.name(n - 1)])) if n else 0
    for i in range(n):
        digest.update(os.fsencode(source.name(i)[shared:] + "\n"))
    return n, digest.hexdigest()


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """permutation(seed, epoch) of range(n): the order of one pass, whatever the number of processes."""
    numbers = np.arange(n, dtype=np.uint32)  # half the memory of what permutation(n) gives, and the same
    return np.random.Generator(np.random.Philox(key=stable_seed(seed, epoch))).permutation(numbers)


def training_keys(run):
    """This process's micro-batches, lists of (epoch, index), from update run.step on. An update takes the
    next `batch_size` samples of an endless sequence of passes: an epoch's end drops and pads nothing."""
    for micro_step in range(run.step * run.accum_steps, run.steps * run.accum_steps):
        first = (micro_step * run.world_size + run.rank) * run.micro_batch
        places = (divmod(position, run.n) for position in range(first, first + run.micro_batch))
        yield [(epoch, int(epoch_order(run.n, run.cfg.seed, epoch)[i])) for epoch, i in places]


def eval_keys(n, run, batch=256):
    """Batches of keys that cover range(n) once over all processes: no padding, no sample counted twice."""
    indices = range(run.rank, n, run.world_size)
    return [[(0, i) for i in indices[start : start + batch]] for start in range(0, len(indices), batch)]


def init_worker(_):
    for number in STOP_SIGNALS:  # these reach the workers too, but the main process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def end_workers():
    # At exit Python ends such children with SIGTERM, which they ignore, and would wait for them for ever.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a worker's death for an error
    for child in multiprocessing.active_children():
        child.kill()


class Normalize:
    """Images from the loader -> (B, C, H, W) float32 on the device, scaled to [0, 1] and normalised."""

    def __init__(self, mean, std, device):
        self.mean, self.std = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std))

    def __call__(self, images):
        images = images.to(self.mean.device, non_blocking=True)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std

    def undo(self, images):
        """Back to [0, 1]"""
        return (images * self.std + self.mean).clamp(0, 1)


# ==== Precision: parameter groups, the learning rate, what a skipped update must restore ====================


def amp_dtype(amp, device):
    """For --amp; None is float32. auto: bf16 where the hardware multiplies in it, else fp16 on CUDA. Apple's
    MPS stays with float32."""
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs CUDA; use --amp bf16 or --amp off")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto" and device.type != "cpu":
        amp = "bf16" if device.type == "xpu" else "off"
    elif amp == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # younger than torch 2.11
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # unless forbidden
        amp = "bf16" if wide and (cpu.get("avx512_bf16") or cpu.get("amx_bf16")) else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def parameter_groups(model, weight_decay, no_decay=(), layer_id=None, layer_decay=1.0):
    """AdamW groups: no weight decay for tensors of fewer than two dimensions or with a last name in
    `no_decay`; with `layer_id` (name -> 0 ... last), `lr_scale` = layer_decay ** (last - id)."""
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
    try:
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    except RuntimeError as error:  # not on this device
        print0(f"AdamW is not fused, and slower: {first_line(error)}")
        return torch.optim.AdamW(groups, lr=0.0, betas=betas)


def warmup_cosine(epoch, lr, min_lr, warmup_epochs, epochs):
    """Learning rate at a fractional epoch: linear warm-up from 0, then half a cosine down to min_lr."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def batch_statistics(model):
    """BatchNorm's running statistics; other buffers are constants."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def remember_statistics(model):
    """A function that puts BatchNorm's statistics back as they are now: for an update that is skipped."""
    now = batch_statistics(model)
    groups = [[x for x in now if x.dtype == dtype] for dtype in {x.dtype for x in now}]
    before = [[torch.empty_like(x) for x in group] for group in groups]
    for old, group in zip(before, groups, strict=True):
        torch._foreach_copy_(old, group)  # one kernel, not one for each

    def restore():
        for old, group in zip(before, groups, strict=True):
            torch._foreach_copy_(group, old)

    return restore


# ==== Run: command line, process group, one update, log, pictures, checkpoint ===============================


@dataclasses.dataclass
class RunConfig:
    """The fields that every script's command line has. The comment behind a field is its help text."""

    # data
    data: str = "data/imagenet"  # folder of images, .txt list, .npz, or shapes|cifar10|cifar100|stl10|cars
    download: bool = False  # let torchvision fetch cifar10, cifar100 or stl10 into data/
    img_size: tuple[int, int] = (224, 224)  # pixels, H or H,W
    in_chans: int = 3  # channels of the images
    mean: tuple[float, ...] | None = None  # per channel, of values in [0, 1]; default: the data's, ImageNet's
    std: tuple[float, ...] | None = None  # likewise
    exif: Literal["auto", "apply", "ignore"] = "auto"  # rotation tags of photographs
    workers: int | None = None  # loader processes per process; default: its share of the cores less one
    max_bad: float = 0.01  # share of files that may be unreadable; five may always, unless it is 0
    check_data: bool = False  # read all images, report, and exit
    # run
    out: str | None = None  # folder to write into; default runs/SCRIPT. A file: --draw, --mode features
    resume: bool = False  # continue the run in --out, or start it if there is no checkpoint
    seed: int = 0  # of everything random
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # mixed precision; auto: where it is fast
    compile: bool = False  # compile the model with torch.compile
    deterministic: bool = False  # on a GPU: only kernels that give the same bits again, which are slower
    save_minutes: float = 10.0  # minutes between checkpoints; also at each epoch's end, on SIGTERM
    log_every: int = 20  # updates between two log lines
    tensorboard: bool = False  # write the log for TensorBoard, too
    demo: bool = False  # drawn shapes, a tiny model: two minutes on two CPU cores

    # {field: (least, most)}; other whole numbers are at least 1, other real ones at least 0.
    ranges = {"seed": (0, 2**62), "workers": (0, 256), "pictures": (0, 1000), "max_bad": (0, 1),
              "mean": (-1e6, 1e6), "std": (1e-6, 1e6), "img_size": (1, 2**14), "epochs": (1e-6, 1e6),
              "lr": (1e-12, 1e3), "base_lr": (1e-12, 1e3), "betas": (0, 0.999999), "mask_ratio": (0, 1)}
    given = frozenset({"batch_size"})  # fields set by a flag; a Config made in code keeps its batch
    start_from = ()  # fields that name the weights a new run begins with; free when it is resumed
    # What may differ when a run is resumed, because it does not change what is computed ...
    free_on_resume = {"data", "download", "workers", "max_bad", "check_data", "out", "resume", "compile",
                      "save_minutes", "log_every", "demo", "tensorboard", "micro_batch", "pictures", "draw"}
    # ... and what may differ after non-finite updates, to get past them.
    free_after_nan = {"amp", "precision", "clip_grad", "base_lr", "lr"}

    def __post_init__(self):
        for name, value in vars(self).items():
            for x in value if type(value) is tuple else (value,):
                low, high = self.ranges.get(name, (1 if type(x) is int else 0, 2**40))
                if type(x) in (int, float) and not low <= x <= high:  # NaN is nowhere
                    raise ValueError(f"--{name} {x}, expected {low:g} to {high:g}")
        cifar = self.data in ("cifar10", "cifar100")
        mean, std = (CIFAR_MEAN, CIFAR_STD) if cifar else (IMAGENET_MEAN, IMAGENET_STD)
        if self.in_chans != 3:  # not in any paper: the grey level for every channel
            mean, std = (sum(mean) / 3,) * self.in_chans, (sum(std) / 3,) * self.in_chans
        self.mean, self.std = tuple(self.mean or mean), tuple(self.std or std)
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(f"--mean {self.mean} and --std {self.std}, but --in_chans {self.in_chans}")


def tuple_of(element, *rest):
    """A converter of text, 1,2,3, to a tuple; of a fixed length, one number may stand for all."""

    def numbers(text):
        values = tuple(element(word) for word in text.split(","))
        if rest == (...,) or len(values) == 1 + len(rest):
            return values
        if len(values) > 1:
            raise ValueError  # argparse quotes the text
        return values * (1 + len(rest))

    return numbers


class Help(argparse.HelpFormatter):
    """One line per flag."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=200)

    def _format_action_invocation(self, action):
        return action.option_strings[-1 if action.default is True else 0] + " X" * (action.nargs != 0)


@functools.cache
def commented_lines(cls):
    """(heading, "", "") and ("", field, comment) of a dataclass's source, in its order."""
    line = re.compile(r"^    (?:# (.*)|(\w+): [^#\n]*# *(.*))$", re.MULTILINE)
    return line.findall(inspect.getsource(cls))


def make_parser(config_type, defaults=True):
    """A parser with a flag for each field; its help is the comment behind it, its group that above."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=sys.modules[config_type.__module__].__doc__.split("\n\n")[0],
        epilog="Equations, departures from the paper, examples: the head of %(prog)s, and docs/.",
        formatter_class=Help, allow_abbrev=False)
    parser.error = lambda message: exit_with(parser.prog, UserError(message))
    types, groups = get_type_hints(config_type), {"data": parser.add_argument_group("data")}
    comments, title = {}, ""
    for cls in config_type.__mro__[:-1]:  # the script's own flags first
        for heading, name, text in commented_lines(cls):
            title = re.split("[;:]", heading)[0] or title
            comments.setdefault(name, (title, text))
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    for name, (title, text) in comments.items():
        if name not in fields:  # a heading
            continue
        kind, field = types[name], fields.pop(name)
        if type(None) in get_args(kind):  # ... | None
            kind = get_args(kind)[0]
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            how, choices = {"choices": get_args(kind)}, "|".join(get_args(kind))
            text = f"{choices}: {text}" if len(choices) < 60 else text
        else:
            how = {"type": tuple_of(*get_args(kind)) if get_origin(kind) is tuple else kind}
        if field.default is not None and kind is not bool:
            default = field.default if type(field.default) is not tuple else ",".join(map(str, field.default))
            text += f" (default {default})"
        how["default"] = field.default if defaults else argparse.SUPPRESS
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        group.add_argument(f"--{name}", help=text.replace("%", "%%"), **how)
    assert not fields, f"without a comment: {list(fields)}"
    return parser


def flag_words(argv):
    """Flags may be spelled with - for _; numbers may be negative."""
    words = [re.sub("^--(no[_-])?[^=]+", lambda m: (m[1] and "--no-" or "--")
                    + m[0].removeprefix(f"--{m[1] or ''}").replace("-", "_"), word) for word in argv]
    return [f" {word}" if re.match(r"-[.\d]", word) else word for word in words]


def read_recipe(config_type, name):
    """{field: value} of recipes/NAME.txt: the flags of a paper, each with its source behind #."""
    path = Path(__file__).parent / f"recipes/{name}.txt"
    if not path.exists():
        names = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt")))
        raise UserError(f"--recipe {name}: there is no {path}, only {names or 'nothing'}")
    words = [word for line in path.read_text().splitlines() for word in line.split("#")[0].split()]
    return vars(make_parser(config_type, defaults=False).parse_args(words))


def parse_config(config_type, presets=lambda flags: {}, argv=None):
    """Command line -> config_type(...). `presets(flags)` may turn flags such as --demo into other defaults,
    which flags given next to them override. Anything wrong: one line, exit code 2."""
    parser, argv = make_parser(config_type), sys.argv[1:] if argv is None else argv
    words = flag_words(argv)
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        names = [f"--{field.name}" for field in dataclasses.fields(config_type)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags; --resume takes no file"
        parser.error(f"unknown argument {unknown[0]}; {hint}")
    try:
        if getattr(flags, "draw", None):
            from draw import settings_of  # a script that is copied elsewhere runs without it

            parser.set_defaults(**settings_of(flags.draw, config_type))
        else:
            parser.set_defaults(**presets(flags))
        cfg = config_type(**vars(parser.parse_args(words)))
        cfg.given = vars(make_parser(config_type, defaults=False).parse_args(words)).keys()
        return cfg
    except (ValueError, OSError, UserError) as error:
        parser.error(str(error))


def new_file(path, suffix):
    """--out as the path of one file, its folder made; UserError if it is there already."""
    path = Path(path)
    if path.suffix != suffix or path.exists():
        raise UserError(f"--out {path}: expected the name of a new file, NAME{suffix}; move an old one away")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(path, save, previous=None):
    """save(open file) next to `path`, then rename over it: a kill or a full disk leaves the old file whole,
    or, between the two renames, at `previous`, the path that it is moved to."""
    temporary, whole = f"{path}.{secrets.token_hex(4)}.tmp", False
    # torch raises an error wherever we are when a loader worker dies: here it would pass for the disk's.
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    if main:
        on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with open(temporary, "xb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        whole = True
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error  # torch reports a full disk as a wrong position in the file
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if not whole:
            with suppress(OSError):
                os.unlink(temporary)
        if not cause:
            raise
        kept = f"; its new content is {temporary}" if whole else ""
        raise UserError(f"cannot write {path} ({first_line(cause)}){kept}", code=1) from None
    finally:
        if main:
            signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)


def alive(pid):
    if os.name == "nt":  # where os.kill(pid, 0) would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid not in (0, os.getpid())


def lock(file):
    """OSError if another process has done so."""
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(2**20)  # what it says of the holder stays readable
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def hold_folder(out):
    """Keep other runs out of `out` until this process ends: their files would mix. UserError names the
    holder. By a POSIX lock on out/.lock; where there are none, by what that file says. Returns the open file.
    """
    path, host = out / ".lock", socket.gethostname()
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    file = os.fdopen(os.open(path, flags, 0o644), "r+", errors="replace")
    found = re.match(r"process (\d+) on (\S+) since (\S+)$", file.read())
    pid, where, since = found.groups() if found else (0, host, "?")
    try:
        lock(file)
        held = False
    except OSError as error:  # held; or there are no locks here, but a process of this host can be looked for
        held = error.errno in (errno.EACCES, errno.EAGAIN) or where != host or alive(int(pid))
    if held:
        raise UserError(f"{out} is in use by process {pid} on {where} since {since}: wait, or end it "
                        f"(kill {pid}; kill -9 {pid} if it is stopped), or choose another --out; if it has "
                        f"ended, rm {path}")
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {host} since {time.strftime('%Y-%m-%dT%H:%M:%S')}")
    file.flush()
    return file


def results(out):
    """Names in a run's folder but for what a start that failed leaves: what a new run would overwrite."""
    empty = {path.name for path in (out / "pictures", out / "log.jsonl")
             if path.exists() and not (any(path.iterdir()) if path.is_dir() else path.stat().st_size)}
    names = {path.name for path in out.iterdir() if path.suffix != ".tmp"}
    return sorted(names - empty - {".lock", ".unsaved", "config.json"})


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors. It returns blocks of more than 32 MB to the system and gets
    them back page by page: on a CPU up to half of an update's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap shrinks only by 2 GB


def read_environment():
    """(rank, world_size) as torchrun sets them; (0, 1) without it. UserError if they are there in part."""
    least = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1}
    given = {name: os.environ.get(name, "") for name in ("MASTER_ADDR", *least)}
    if not given["RANK"] and not given["WORLD_SIZE"]:
        return 0, 1
    whole = all(given[name].isdecimal() and int(given[name]) >= low for name, low in least.items())
    if not (given["MASTER_ADDR"] and whole and int(given["RANK"]) < int(given["WORLD_SIZE"])):
        values = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"the environment has {values}: start with torchrun, which sets all, or unset RANK "
                        "and WORLD_SIZE to run one process")
    return int(given["RANK"]), int(given["WORLD_SIZE"])


def logged_step(line):
    """The step of a line that `Run.log` wrote, infinite if a kill cut it; 0 of a line of somebody else's."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        step = math.inf if line.startswith(b'{"step"') else 0
    return step if isinstance(step, int | float) else 0


class Run:
    """One run of one script: its process, folder, log, and place in the data. n: images; steps: updates in
    all; step: updates done; stopping: all processes have agreed to stop. saved: plain values that travel in
    the checkpoint; inputs: values that a resumed run must have again."""

    version = 2  # of the checkpoint's content

    def __init__(self, cfg, method):
        self.cfg, self.method, self.out = cfg, method, Path(cfg.out or f"runs/{method}")
        self.rank, self.world_size = read_environment()
        self.is_main, found = self.rank == 0, torch.accelerator.current_accelerator(check_available=True)
        self.gpu, self.device = found is not None, torch.device("cpu")
        if self.gpu:  # cuda, xpu, mps: what they lack falls back to what they have
            self.device = torch.device(found.type, int(os.environ.get("LOCAL_RANK", 0)))
            if self.device.index >= (n := torch.accelerator.device_count()):
                raise UserError(f"LOCAL_RANK {self.device.index}, but this machine shows {n} {found.type} "
                                f"devices: start at most {n} processes here (torchrun --nproc_per_node {n})")
        self.amp_dtype = amp_dtype(cfg.amp, self.device)
        self.normalize = Normalize(cfg.mean, cfg.std, self.device)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.workers = max(1, share - 1) if cfg.workers is None else cfg.workers
        self.step, self.stop_requested, self.stopping, self.skipped = 0, False, False, ""
        self.bad_files, self.new_bad_files, self.bad_limit = {}, {}, 0  # {path: reason}
        self.saved = {"skipped_nonfinite": 0, "skipped_overflow": 0, "in_a_row": 0, "window": []}
        self.inputs, self.launcher = {}, os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.updates, self.seconds, self.waited = 0, 0.0, 0.0  # since the last log line
        self.board, self.is_stage = None, False  # TensorBoard's; a part of another run
        self.windows = 0  # log lines so far
        if not self.gpu:
            keep_freed_memory()

    # ---- start

    def start(self, n, settings="", steps=None, warmup=None):
        """Plan `steps` updates (default: epochs * n / batch_size) for n images, join the other processes,
        make the folder, catch signals. n None: no training. settings: words to print. warmup: updates."""
        self.n = n
        if n:
            B, epochs = self.cfg.batch_size, self.cfg.epochs
            self.steps = steps or int(epochs * n // B)
            self.micro_batch, self.accum_steps = split_batch(B, self.cfg.micro_batch, self.world_size)
            if n < B:
                raise UserError(f"{n} images are fewer than one batch: --batch_size is {B}, use at most {n}")
            if self.steps < 1:
                raise UserError(f"--epochs {epochs} of {n} images: less than one update of --batch_size {B}")
        self.join()
        if self.is_main:
            self.claim_folder(n)
        if dist.is_initialized():
            dist.barrier()
        name = self.device.type if self.gpu else f"CPU, {torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name() if name == "cuda" else name
        print0(f"torch {torch.__version__}, {self.world_size} x {name}, {self.amp_dtype or torch.float32}, "
               f"{self.workers} loader workers, writing to {self.out}/")
        if n:
            self.catch_signals()
            split = f"{self.world_size} processes x {self.micro_batch} x {self.accum_steps}"
            print0(f"{n} images, {self.steps} updates; batch {B} = {split}; {settings}")
            warmup = int(getattr(self.cfg, "warmup_epochs", 0) * n / B) if warmup is None else warmup
            if self.steps < 50 or warmup >= self.steps:
                print0(f"warning: {self.steps} updates are few to learn from, with a warm-up of {warmup}: "
                       "train longer, or with a smaller --batch_size or a shorter warm-up")

    def fit_batch(self, source, least=16, power=0.5):
        """Small data: unless --batch_size is given, lower it to the largest power of two (per process) of
        which n images have 8, and to `least` at least. The learning rate changes with this power of the
        batch: its root suits Adam, 0 LARS (our choice)."""
        cfg, old, n, self.source = self.cfg, self.cfg.batch_size, len(source), source
        share = max(1, max(least, n // 8) // self.world_size)
        batch = self.world_size << (share.bit_length() - 1)
        if "batch_size" in cfg.given or batch >= old:
            return
        cfg.batch_size, scale, also = batch, (batch / old) ** power, ""
        cfg.micro_batch = cfg.micro_batch and math.gcd(cfg.micro_batch, batch // self.world_size)
        name = "lr" if getattr(cfg, "base_lr", None) is None else "base_lr"
        scale *= old / batch if name == "base_lr" else 1  # which is multiplied with the batch later
        if name not in cfg.given and scale != 1:
            before = getattr(cfg, name)
            setattr(cfg, name, before * scale)
            also = f"; --{name} {before * scale:.3g} instead of {before:.3g}"
        print0(f"{n} images: batch {batch} instead of the paper's {old}; --batch_size sets it{also}")

    def claim_folder(self, n):
        """Make --out, lock it, and refuse to lose what is in it. Until a first checkpoint .unsaved says whose
        run it is: one with results and no checkpoint has lost that, and would begin anew."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock, unsaved = hold_folder(self.out), self.out / ".unsaved"
        found, saved = results(self.out), self.checkpoints()
        ours = unsaved.exists() and unsaved.read_text() == self.method
        if found and not self.cfg.resume:
            raise UserError(f"{self.out} is not empty: choose another --out, or --resume the run in it")
        if found and not saved and not ours:
            raise UserError(f"--resume: {self.out} has no last.pth, but {', '.join(found[:5])}: choose "
                            "another --out, or move these away")
        if n and not saved:
            unsaved.write_text(self.method)
        (self.out / "pictures").mkdir(exist_ok=True)

    def join(self):
        """Device and, under torchrun, process group."""
        if self.gpu:
            if self.device.type != "mps":  # there is one
                torch.accelerator.set_device_index(self.device.index)
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = not self.cfg.deterministic
        if self.cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)  # some have no such kernel
        if "RANK" in os.environ and not dist.is_initialized():
            limit = timedelta(minutes=10)
            store, *_ = next(dist.rendezvous("env://", timeout=limit))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one node; several count their restarts separately
                # torchrun's store outlives a restart: under the same names, new processes would take the
                # addresses of dead ones for each other's, and wait.
                store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            backend = dist.get_default_backend_for_device(self.device)  # nccl, xccl, gloo
            device = self.device if self.gpu else None
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size,
                                    timeout=limit, device_id=device)
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR2, file=2)  # kill -USR2: where does it hang?

    def catch_signals(self):
        """From now on this run is the one that STOP_SIGNALS stop."""

        def request_stop(number, _):
            if self.stop_requested and number == signal.SIGINT:  # Ctrl-C twice: now
                raise KeyboardInterrupt
            self.stop_requested = True

        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, request_stop)

    def run_stage(self, train, cfg, method):
        """train(cfg, ...) as a part of this run, in a folder of its own; returns whether it was completed."""
        stage = Run(cfg, method)
        stage.is_stage = True
        train(cfg, stage)
        self.catch_signals()
        self.stop_requested |= stage.stop_requested
        if dist.is_initialized():
            dist.barrier()
        return not stage.stopping

    def prepare(self, model):
        """Move to the device, compile in place (names stay clean), wrap in DDP under torchrun."""
        model.to(self.device)
        if self.cfg.compile:
            model.compile()
        if not dist.is_initialized():
            return model
        # No broadcast of buffers at each step: they are constants, or BatchNorm's, each process's own.
        names = inspect.signature(DistributedDataParallel).parameters  # newer torch renames the argument
        name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        how = {name: False, "gradient_as_bucket_view": True}  # the latter saves a copy of all gradients
        return DistributedDataParallel(model, [self.device] if self.gpu else None, **how)

    def gather(self, value):
        """A plain value of every process, in a list."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    # ---- data

    def bad_allowed(self, n):
        """How many of n files may be unreadable: the share --max_bad, and always five unless that is 0."""
        return min(max(5, int(self.cfg.max_bad * n)) if self.cfg.max_bad else 0, n - 1)

    def samples(self, source, transform, sample_noise=None, flip=True):
        """KeyedSamples of `source`, which must be the same on all processes."""
        seen = self.gather(names_digest(source) if self.world_size > 1 else None)
        if len(set(seen)) > 1:
            listing = "; ".join(f"process {i}: {n} files, {digest}" for i, (n, digest) in enumerate(seen))
            raise UserError(f"the processes see other images, by number and names' checksum: {listing}")
        self.bad_limit = max(self.bad_limit, self.bad_allowed(len(source)))
        return KeyedSamples(source, transform, self.cfg.seed, self.bad_limit + 1, sample_noise, flip)

    def load_batches(self, samples, keys, collate=collate):
        """Batches of KeyedSamples as they leave the workers, which live as long as the iterator."""
        atexit.register(end_workers)
        loader = torch.utils.data.DataLoader(
            samples, batch_sampler=keys, num_workers=self.workers, collate_fn=collate,
            pin_memory=self.device.type in ("cuda", "xpu"), worker_init_fn=init_worker,
            prefetch_factor=4 if self.workers else None)
        for batch in loader:
            self.new_bad_files |= {path: why for path, why in batch["bad"] if path not in self.bad_files}
            yield batch

    def command(self, script, **flags):
        """A line for a shell; what the data need is repeated."""
        flags |= {name: getattr(self.cfg, name) for name in ("exif", "max_bad") if name in self.cfg.given}
        words = (f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None)
        return " ".join(["python", shlex.quote(os.path.join(os.path.dirname(sys.argv[0]), script)), *words])

    def batches(self, source, transform, sample_noise, normalize=None):
        """Training micro-batches from `step` on: normalised images, noise (on the device), sample numbers."""
        normalize = normalize or self.normalize
        for batch in self.load_batches(self.samples(source, transform, sample_noise), training_keys(self)):
            yield normalize(batch["image"]), batch["noise"].to(self.device, non_blocking=True), batch["index"]

    def examples(self, source, sample_noise, normalize=None):
        """For pictures: --pictures evenly spaced images and their noise, always the same; None for 0."""
        n, crop = min(self.cfg.pictures, len(source)), EvalCrop(self.cfg.img_size)
        samples = KeyedSamples(source, crop, self.cfg.seed, len(source), sample_noise, flip=False)
        batch = collate([samples[-1, i * len(source) // n] for i in range(n)]) if n else {"bad": ()}
        self.new_bad_files |= {path: why for path, why in batch["bad"] if path not in self.bad_files}
        return n and ((normalize or self.normalize)(batch["image"]), batch["noise"].to(self.device))

    def draw(self, *arguments):
        """--draw"""
        from draw import draw_file  # a script that is copied elsewhere runs without it

        draw_file(self, *arguments)

    def share_bad_files(self):
        """On all processes, when one has met a new one: name each once; UserError above the limit."""
        found = {path: why for files in self.gather(self.new_bad_files) for path, why in files.items()}
        for path, why in sorted(found.items()):
            print0(f"unreadable: {path}: {why}")
        self.bad_files, self.new_bad_files = self.bad_files | found, {}
        if len(self.bad_files) > self.bad_limit:
            raise UserError(f"more than {self.bad_limit} unreadable files: repair or remove them, or raise "
                            f"--max_bad, the share that is allowed, now {self.cfg.max_bad:g}", code=1)

    # ---- one update

    @property
    def epoch(self):
        """Passes over the data so far, a fraction."""
        return self.step * self.cfg.batch_size / self.n

    def autocast(self):
        """The one mixed-precision context; does nothing for float32."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def micro_batches(self, model, batches):
        """The micro-batches of one update. Generators are seeded at each, so that a resumed run needs no
        stored generator state; DDP averages the gradients in the last one only."""
        self.began, self.sample_numbers = time.monotonic(), []
        for micro_step in range(self.accum_steps):
            begin = time.monotonic()
            *batch, numbers = next(batches)
            self.waited += time.monotonic() - begin
            self.sample_numbers += numbers.tolist()
            # As DDP's no_sync() does; on a bare model it has no effect.
            model.require_backward_grad_sync = micro_step == self.accum_steps - 1
            self.seed(micro_step)
            yield batch

    def seed(self, micro_step):
        torch.manual_seed(stable_seed(self.cfg.seed, self.step, micro_step, self.rank))

    def agree(self, terms, grad_norm):
        """({name: mean over the processes; own values if skipped}, whether all are finite), for terms,
        {name: detached scalar}, with `loss`. Sets stopping, skipped. The one host synchronisation."""
        values = {**terms, "grad_norm": grad_norm}
        flags = [~terms["loss"].isfinite(), ~grad_norm.isfinite()]
        if self.launcher and os.getppid() != self.launcher:  # torchrun was killed: nobody watches over us
            self.stop_requested = True
        # full_like: no copy from the host, so no synchronisation
        flags += [torch.full_like(grad_norm, x) for x in (self.stop_requested, len(self.new_bad_files))]
        own = torch.stack([x.float() for x in (*values.values(), *flags)])
        packed = own.clone()
        if self.world_size > 1:
            dist.all_reduce(packed)
        *numbers, bad_loss, bad_gradient, stop, bad_files = packed.tolist()
        self.stopping, self.skipped = stop > 0, ""
        if bad_files:
            self.share_bad_files()
        if bad_loss or bad_gradient:
            overflow = self.amp_dtype == torch.float16 and not bad_loss
            self.skipped = "overflow" if overflow else "nonfinite"
        numbers = own.tolist() if self.skipped else [number / self.world_size for number in numbers]
        return dict(zip(values, numbers, strict=False)), not self.skipped  # `own` has the flags behind

    def end_update(self, terms, lr):
        """Count the update; a log line every --log_every."""
        self.step, self.updates = self.step + 1, self.updates + 1
        self.seconds += time.monotonic() - self.began
        if self.skipped:
            self.count_skipped(terms, lr)
        else:
            self.saved["in_a_row"] = 0
            self.saved["window"].append(terms)
        if self.step % self.cfg.log_every == 0 or self.step == self.steps:
            self.log_window(lr)

    def count_skipped(self, terms, lr):
        """nonfinite_STEP.json of a skipped update; exit code 3 after ten in a row (3 points each), or
        thirty overflows (1 point): the fp16 scale starts high and is halved."""
        step, saved, file = self.step, self.saved, f"nonfinite_{self.step}.json"
        saved[f"skipped_{self.skipped}"] += 1
        saved["in_a_row"] += 1 if self.skipped == "overflow" else 3
        if self.skipped == "overflow" and saved["in_a_row"] < 30:
            return print0(f"step {step}: fp16 overflow, update skipped, loss scale lowered: harmless if rare")
        terms = {name: str(value) for name, value in terms.items()}
        ranks = self.gather({"rank": self.rank, "samples": self.sample_numbers, "terms": terms})
        self.write(file, json.dumps({"step": step, "lr": lr, "ranks": ranks}, indent=1))
        print0(f"step {step}: non-finite loss or gradient, update skipped on all processes; see {file}")
        if saved["in_a_row"] >= 30:
            good = next(iter(self.checkpoints()), "none yet")
            raise UserError(f"ten such updates in a row (or thirty overflows); last good checkpoint: {good}; "
                            "--resume with --amp off, --clip_grad 1 or half the learning rate", code=3)

    def log_window(self, lr):
        """A line on the updates since the last one."""
        step, saved, window = self.step, self.saved, self.saved["window"]
        means = {k: sum(terms[k] for terms in window) / len(window) for k in (window[0] if window else ())}
        grad_norm = means.pop("grad_norm", None)
        rate, wait = self.updates * self.cfg.batch_size / self.seconds, self.waited / self.seconds
        left = timedelta(seconds=round((self.steps - step) * self.cfg.batch_size / rate))
        self.windows += 1
        if self.windows == 2 and wait > 0.2:  # the first one has the start of the workers
            print0(f"waiting for images {wait:.0%} of the time: more --workers (now {self.workers}), or "
                   "shrink the images to a short side of 256 (RUNNING.md)")
        print0(f"epoch {self.epoch:.2f} step {step}/{self.steps} loss {means.get('loss', math.nan):.4f} "
               f"lr {lr:.2e} data_wait {wait:.0%} {rate:,.{0 if rate >= 10 else 2}f} images/s, {left} left")
        self.log({"step": step, "epoch": round(self.epoch, 4), **{f"train/{k}": v for k, v in means.items()},
                  "lr": lr, "grad_norm": grad_norm, "images_per_second": round(rate, 3),
                  "data_wait": round(wait, 4), "peak_memory": self.peak_memory(),
                  **{name: count for name, count in saved.items() if name.startswith("skipped")}})
        saved["window"], self.updates, self.seconds, self.waited = [], 0, 0.0, 0.0

    def peak_memory(self):
        """GiB: of the GPU, else of this process; 0 where that cannot be asked."""
        if self.device.type in ("cuda", "xpu"):
            used = getattr(torch, self.device.type).max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0
        return round(used / 2**30, 3)

    def log(self, line):
        """Append one JSON object to log.jsonl."""
        line = {**line, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        if self.is_main:
            for name, value in line.items() if self.board else ():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, line["step"])
            try:
                with open(self.out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                print0(f"log.jsonl lacks step {line['step']}: {first_line(error)}")

    def write(self, name, text):
        if self.is_main:
            write_atomically(self.out / name, lambda file: file.write(text.encode()))

    # ---- pictures and files

    def ends_epoch(self):
        """Whether the last update has completed a pass, or the run."""
        return self.step == self.steps or self.step * self.cfg.batch_size % self.n < self.cfg.batch_size

    def picture_due(self):
        """Path of the picture to draw now; None if none is due, or if another process draws it."""
        if self.is_main and self.cfg.pictures and self.ends_epoch():
            number = (self.step - 1) * self.cfg.batch_size // self.n + 1  # of the pass the update began in
            return self.out / f"pictures/epoch_{number:04}.png"

    def save_due(self):
        """Whether a pass has just ended, --save_minutes have passed, or the run stops here."""
        seconds = time.monotonic() - self.last_save
        return self.ends_epoch() or self.stopping or seconds > 60 * self.cfg.save_minutes

    def meta(self, **more):
        """What a file of weights says of itself."""
        fields = {name: value for name, value in vars(self.cfg).items() if name in (*NETWORK, "img_size")}
        return {"method": self.method, **fields, "epoch": self.epoch, **more}

    def export(self, name, weights, meta):
        """Write weights for use elsewhere: {"model": {name: tensor}, "meta": plain values}."""
        if self.is_main:
            content = {"model": {key: value.detach().cpu() for key, value in weights.items()}, "meta": meta}
            write_atomically(self.out / name, lambda file: torch.save(content, file))

    def save(self, encoder=None, prefix="", **meta):
        """Write the encoder's tensors (whose names in the model have `prefix`) to encoder.pth, and last.pth,
        keeping the one before as previous.pth. prefix None: the model has none of them under any name. meta:
        what the files say in place of the configuration."""
        self.last_save, meta = time.monotonic(), self.meta(**meta)
        for state in self.state.values():
            if isinstance(state, nn.Module) and (bad := not_finite(state.state_dict())):
                good = next(iter(self.checkpoints()), "none")
                self.write(f"nonfinite_{self.step}.json", json.dumps({"step": self.step, "weights": bad}))
                raise UserError(f"the weights have diverged ({bad}) and are not saved; last good checkpoint: "
                                f"{good}; --resume with --clip_grad 1 or half the learning rate", code=3)
        if encoder:
            self.export("encoder.pth", encoder, meta)
        if self.is_main:
            content = {name: value.state_dict() for name, value in self.state.items()} | {
                "version": self.version, "method": self.method, "config": dataclasses.asdict(self.cfg),
                "inputs": self.inputs, "step": self.step, "saved": self.saved, "bad_files": self.bad_files,
                "meta": meta,
                "encoder": {name: prefix + name for name in encoder or () if prefix is not None}}
            last, previous = self.out / "last.pth", self.out / "previous.pth"
            write_atomically(last, lambda file: torch.save(content, file), previous)
            for path in (self.out / ".unsaved", *self.out.glob("*.tmp")):  # of a killed run: it is safe now
                path.unlink(missing_ok=True)
            self.draw_curves()

    def draw_curves(self):
        """curves.png"""
        with suppress(ImportError, OSError, UserError):  # a script that is copied elsewhere runs without it
            from draw import save_curves

            save_curves(self.out)

    def checkpoints(self):
        """Paths of what --resume can go on from, newest first."""
        return [path for path in (self.out / "last.pth", self.out / "previous.pth") if path.exists()]

    def load(self, **state):
        """Name the objects whose state_dict() is saved; --resume: restore them, and `step`, from --out."""
        self.state, self.last_save = state, time.monotonic()
        self.inputs = {**self.inputs, "images": self.n, "precision": str(self.amp_dtype)}
        if self.cfg.resume and self.checkpoints():
            self.restore(*self.checkpoints())
        steps = self.gather(self.step)
        if len(set(steps)) > 1:
            raise UserError(f"--resume: the processes are at steps {steps}: all nodes must share --out")
        log = self.out / "log.jsonl"
        if self.is_main and log.exists():  # drop what a killed run logged after its last checkpoint
            kept = [x + b"\n" for x in log.read_bytes().split(b"\n") if x and logged_step(x) <= self.step]
            write_atomically(log, lambda file: file.write(b"".join(kept)))
        if self.cfg.tensorboard and self.is_main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs it: pip install tensorboard") from None
            self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.step + 1)
        config = {"script": self.method, **dataclasses.asdict(self.cfg)}
        self.write("config.json", json.dumps(config, indent=1))

    def evaluations(self):
        """{step: line} of the log's lines with scores, on all processes: what a resumed run does not owe."""
        path = self.out / "log.jsonl"
        lines = path.read_bytes().split(b"\n") if self.is_main and path.exists() else ()
        lines = [json.loads(line) for line in lines if 0 < logged_step(line) < math.inf]
        return self.gather({line["step"]: line for line in lines if any("eval/" in key for key in line)})[0]

    def restore(self, path, *others):
        try:
            content = self.read_checkpoint(path)
        except UserError as error:
            hint = ""
            for other in others:
                with suppress(UserError):
                    self.read_checkpoint(other)
                    hint = f"; {other} is good: mv it over {path}, then --resume"
            raise UserError(f"--resume: {error}{hint}") from None
        for name, value in self.state.items():
            if content[name]:  # a scaler's is empty unless it scaled
                value.load_state_dict(content[name])
        self.bad_files, self.step = content["bad_files"], content["step"]
        self.saved |= content["saved"]
        print0(f"resumed from {path}: step {self.step}, epoch {self.epoch:.2f}")

    def read_checkpoint(self, path):
        """What `save` wrote; UserError if the file is damaged, or of a run with other settings."""
        content = read_file(path)
        way_out = " or ".join(f"a new run with --{name}" for name in self.cfg.start_from) or "another --out"
        if content.get("method") != self.method:
            raise UserError(f"{path} is of {content.get('method', 'another program')}, not of {self.method}")
        if content.get("version") != self.version:
            raise UserError(f"{path} is of an older version: end the run with that, or {way_out}")
        defaults = {field.name: field.default for field in dataclasses.fields(self.cfg)}  # of younger flags
        then = defaults | content["config"] | content["inputs"]
        now = dataclasses.asdict(self.cfg) | self.inputs
        free = self.cfg.free_on_resume | set(self.cfg.start_from)
        if any(self.out.glob("nonfinite_*.json")):
            free = free | self.cfg.free_after_nan
        changed = sorted(name for name in now.keys() - free if then.get(name) != now[name])
        if changed:
            listing = "; ".join(f"{name} {then.get(name)}, not {now[name]}" for name in changed)
            raise UserError(f"{path} has {listing}: repeat its flags, or {way_out}")
        return content

    def share_statistics(self, model):
        """BatchNorm's, of the first process, to all: all evaluate with the statistics that are saved."""
        for buffer in batch_statistics(model) if self.world_size > 1 else ():
            dist.broadcast(buffer, 0)

    def finish(self, files="last.pth, encoder.pth, pictures/, curves.png", steps=None):
        """The last lines: what is there, and the commands to type next; steps: default those after
        pre-training."""
        if self.step < self.steps:
            return print0(f"stopped after step {self.step} of {self.steps}; carry on with --resume")
        if self.is_main:
            self.draw_curves()
        print0(f"done: {self.out}/{files}")
        if self.is_stage:
            return
        with suppress(ImportError):  # a script that is copied elsewhere runs without it
            from sources import next_steps

            steps = next_steps(self) if steps is None else steps
        print0("\n  ".join(["next:", *steps]) if steps else "")


def save_image_grid(path, rows, titles, caption):
    """PNG: rows of images (C, H, W) in [0, 1] under column titles, a caption below. Three channels are shown
    in colour, other counts by their first channel; small images are enlarged by whole factors."""
    factor, line = max(1, 128 // max(rows[0][0].shape[1:])), 16
    images = torch.stack([x if len(x) == 3 else x[:1].expand(3, -1, -1) for row in rows for x in row])
    images = images.float().cpu().clamp(0, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = TF.to_pil_image(torchvision.utils.make_grid(images, nrow=len(titles), padding=4, pad_value=1.0))
    caption = textwrap.wrap(caption, grid.width // 6)  # the built-in font is about 6 px wide
    canvas = Image.new("RGB", (grid.width, line + grid.height + line * len(caption)), "white")
    canvas.paste(grid, (0, line))
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        pen.text((4 + column * (grid.width - 4) // len(titles), 2), title, fill="black")
    pen.text((4, line + grid.height), "\n".join(caption), fill="black")
    write_atomically(path, lambda file: canvas.save(file, "png"))


def launch(config_type, presets, train, method, open_sets=None):
    """A script's main: parse, train(cfg, run), end the process group; a UserError becomes one line.
    open_sets(cfg): {part: images} that --check_data looks at; default: training images, held-out ones."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a stream that was closed: the next file to be opened would get its number, and its output
    os.close(descriptor)
    cfg, run = parse_config(config_type, presets), None
    try:
        run = Run(cfg, method)
        if cfg.check_data:
            from check import check_data  # a script that is copied elsewhere runs without it

            if run.is_main:
                check_data(open_sets, run)
        else:
            train(cfg, run)
    except UserError as error:
        exit_with(method, error)
    except OSError as error:  # a path that cannot be written; after the first update, a disk or folder lost
        exit_with(method, UserError(f"cannot read or write: {first_line(error)}", code=1 if run.step else 2))
    except KeyboardInterrupt:  # in training: the second one
        exit_with(method, UserError("interrupted", code=130))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            now = getattr(run, "micro_batch", cfg.batch_size)
            exit_with(method, UserError(f"out of memory: lower --micro_batch, now {now}", code=1))
        lost = "Connection (closed|reset) by peer|Timed out waiting"
        if not isinstance(error, dist.DistError) and not re.search(lost, str(error)):
            raise
        exit_with(method, UserError(f"another process has ended or hangs: {first_line(error)}", code=1))
    if dist.is_initialized():
        dist.destroy_process_group()
