"""Segmentation and detection with a pre-trained encoder: UperNet and Mask R-CNN in torch, torchvision and pycocotools alone.

--task seg   a class for every pixel; mIoU, mAcc and aAcc over the whole set
    --head uper    UperNet (Xiao et al., ECCV 2018): pyramid pooling at 1, 2, 3, 6, top-down path, all maps joined; an auxiliary
                   FCN on the third map, weight 0.4. A ViT gives the outputs of its blocks at 1/4, 1/2, 3/4 and 4/4 of the
                   depth, at 4, 2, 1 and 1/2 times its grid (BEiT's, MAE's); other encoders their own four maps
    --head linear  one linear layer on a ViT's normalised last map (CIM sec. 3.2)
    --head fcn     FCN on a ResNet-50 with its last two stages dilated (CIM sec. 3.2)
    Training: resized to 0.5 to 2 times a short side of --img_size, a crop with at most 75 % of one class, distorted colours,
    flip. Test: the image at a short side of --img_size, in windows that overlap by a third, or whole.
--task det   boxes and masks; AP by pycocotools
    torchvision's Mask R-CNN on large-scale jitter (0.1 to 2.0), with ViTDet's heads (Li et al., ECCV 2022). A ViT's last map
    becomes four (ViTDet's simple feature pyramid); its attention is in windows but for the last block of each quarter, and it
    has no class token. Other encoders: an FPN on their own maps. Defaults: ViTDet's.

UperNet on ViT-B at 512 px with 150 classes has 163,286,828 parameters. Width D = 768: encoder without final norm 86,433,024, of
which the table of 1 + 32 x 32 positions has 787,200; three up-convolutions with a BatchNorm 3 (4 D^2 + D) + 2 D = 7,081,728;
pooling 4 (D^2 + 2 D), bottleneck 45 D^2 + 2 D, laterals 3 (D^2 + 2 D), smoothing 3 (9 D^2 + 2 D), joining 36 D^2 + 2 D,
classifier 150 (D + 1), together 67,963,542; auxiliary 256 (9 D + 2) + 150 x 257 = 1,808,534.

--weights takes encoder.pth or last.pth of any script here (of this one: its encoder), official MAE files, timm's ViTs,
torchvision's ResNet-50, `none`. Model, patch size and normalisation come from the file where it says them. Data: folders laid
out as ADE20K or COCO, or the drawn `shapes`; docs/TRANSFER.md goes through it step by step.

Not in the papers, our choice: no relative positions and no layer scale, which BEiT's, MAE's and ViTDet's code adds; positions,
class token, vectors (so all of a BatchNorm) do not decay; convolutions start with torch's values; losses are means over the
pixels that count; a ResNet's BatchNorm keeps learning in detection; detection heads have LayerNorm where MIMDet's have
SyncBatchNorm. As torchvision has it: RoIAlign without the half-pixel shift, box losses quadratic below 1/9, test images shrunk
without antialiasing. Not built: Mask2Former, Cascade Mask R-CNN (RevColV2), MIMDet's own architecture, several test scales.

    python transfer_seg_det.py --demo         on runs/mae_mff/encoder.pth: minutes on a CPU; --task det likewise
    torchrun --nproc_per_node 4 transfer_seg_det.py --recipe mff --weights encoder.pth --data data/ade20k --zero_is_ignore
    torchrun --nproc_per_node 4 transfer_seg_det.py --recipe mff --task det --weights encoder.pth --data data/coco
"""

import math
import zlib
from collections import OrderedDict
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from common import (
    BESIDE_TRUNK,
    NETWORK,
    PARTS,
    Attention,
    KeyedBatches,
    Normalise,
    Plan,
    Refused,
    ResNet50,
    RunConfig,
    ViT,
    VitSize,
    adamw,
    autocast,
    check_data,
    finish_update,
    gradient_sync,
    launch,
    load_weights,
    make_loader,
    make_plan,
    network_of,
    normalisation,
    opt,
    parameter_groups,
    patch_grid,
    read_file,
    remember_statistics,
    resize_pos_embed,
    set_lr,
)
from finetune import layer_id, own_share
from revcol_v2 import SIZES, RevColV2, cell_grid
from transfer_data import (
    IGNORE,
    Fit,
    LargeScaleJitter,
    Scenes,
    SegmentationCrop,
    collate_scenes,
    open_scenes,
    save_scenes,
    show_labels,
    show_objects,
    unpack,
)


@dataclass
class Config(RunConfig):
    # what
    task: Literal["seg", "det"] = opt("seg", "segmentation or detection")
    recipe: str | None = opt(None, "a paper's settings, see RECIPES; flags override them")
    head: Literal["uper", "linear", "fcn"] = opt("uper", "segmentation: the decoder")
    weights: str | None = opt(None, "file of the encoder's weights, or none for random ones")
    model: Literal[*get_args(VitSize), "resnet50", *(f"revcol_{size}" for size in SIZES)] = opt(
        "base", "ViT, resnet50 or RevColV2; default: what the file says")
    patch_size: int = opt(16, "pixels; likewise")
    resnet_width: int = opt(64, "ResNet: channels of its stem; likewise")
    columns: int = opt(2, "RevColV2: bottom-up, and as many top-down, columns; likewise")
    drop_path: float = opt(0.1, "ViT, RevColV2: stochastic depth of the last block")
    window: int = opt(14, "detection with a ViT: side of its attention windows in patches; 0 = global attention everywhere")
    recompute: bool = opt(False, "ViT, RevColV2: compute activations again in the backward pass: less memory, more time")
    channels: int | None = opt(None, "width of the decoder; default: UperNet on a ViT 768, else 512; detection 256")
    rois: int = opt(512, "detection: boxes per image that the heads learn from")
    # data; this and what follows: the defaults of --task seg; those of det: DET
    data: str = opt("data/ade20k", "folder laid out as ADE20K (seg) or COCO (det), see docs/TRANSFER.md, or shapes")
    img_size: tuple[int, int] = opt((512, 512), "pixels of a training crop, H or H,W; detection: one number, the image fits in")
    jitter: tuple[float, float] = opt((0.5, 2.0), "range of scales in training; detection 0.1,2")
    zero_is_ignore: bool = opt(False, "label maps: 0 is no class, 1 the first (ADE20K)")
    # optimisation
    iters: int | None = opt(None, "updates; default: segmentation 160000")
    epochs: float | None = opt(None, "passes over the data, in place of --iters; default: detection 100")
    batch_size: int = opt(16, "images per update, over all processes")
    micro_batch: int | None = opt(None, "images per forward pass of one process; default: the largest that divides, up to 256")
    optimizer: Literal["adamw", "sgd"] = opt("adamw", "AdamW, or SGD with momentum")
    lr: float = opt(1e-4, "peak learning rate, whatever the batch")
    min_lr: float = opt(0.0, "where the schedule ends (poly, cosine)")
    schedule: Literal["poly", "cosine", "step"] = opt("poly", "step: a tenth at 8/9 and 26/27 of the run")
    power: float = opt(1.0, "poly: the exponent; 1 = linear")
    warmup_iters: int = opt(1500, "linear warm-up")
    weight_decay: float = opt(0.05, "AdamW, SGD")
    betas: tuple[float, float] = opt((0.9, 0.999), "AdamW; SGD: the first is the momentum")
    layer_decay: float = opt(0.65, "ViT, RevColV2: learning rate of a block = that of the next one times this")
    clip_grad: float = opt(0.0, "largest gradient norm; 0 = no clipping")
    # evaluation
    inference: Literal["slide", "whole"] = opt("slide", "segmentation: windows of --img_size, or the whole image at once")
    eval_every: int = opt(16_000, "updates between evaluations (and at the end)")
    pictures: int = opt(8, "held-out images drawn at each evaluation; 0 = none")

    may_be_0 = RunConfig.may_be_0 | {"warmup_iters", "window"}

    def __post_init__(self):
        super().__post_init__()
        resnet, seg = self.model == "resnet50", self.task == "seg"
        if min(self.warmup_iters, self.window) < 0:
            raise ValueError("--warmup_iters and --window must not be negative")
        if self.weights is None and not self.check_data:
            raise ValueError("--weights FILE is needed; --weights none is the baseline with random weights")
        if seg and (self.head == "fcn" and not resnet or self.head == "linear" and self.model not in get_args(VitSize)):
            raise ValueError(f"--head {self.head} is not for {self.model}: linear is for ViTs, fcn for resnet50, uper for all")
        if not seg and (self.head != "uper" or self.compile):
            raise ValueError("--head and --compile are for --task seg")
        if not seg and (self.img_size[0] != self.img_size[1] or self.img_size[0] % 32):
            raise ValueError(f"--img_size {self.img_size[0]},{self.img_size[1]}: --task det wants one number, a multiple of 32")
        if not seg and not resnet and self.patch_size not in (4, 8, 16, 32):
            raise ValueError(f"--task det needs a --patch_size of 4, 8, 16 or 32, not {self.patch_size}")
        if not resnet:
            grid = cell_grid if self.model.startswith("revcol") else patch_grid
            if min(grid(self.img_size, self.patch_size)) < 2:  # ValueError unless they fit
                raise ValueError(f"--img_size is one --patch_size of {self.patch_size}: at least two are needed")
        elif self.layer_decay != 1 or self.drop_path or self.recompute:
            raise ValueError("--layer_decay, --drop_path and --recompute are for ViTs and RevColV2")
        wide = self.model in get_args(VitSize) and self.head == "uper"
        self.channels = self.channels or (256 if not seg else 768 if wide else 512)


# Numbers of the papers' text, with their place; what a paper leaves to the code it names (BEiT, MAE, mmsegmentation, MIMDet,
# ViTDet) is that code's.
SEG = {"iters": 160_000}  # with the defaults above: MAE's for UperNet
DET = {"data": "data/coco", "img_size": (1024, 1024), "jitter": (0.1, 2.0), "epochs": 100.0, "batch_size": 64, "lr": 1e-4,
       "schedule": "step", "warmup_iters": 250, "weight_decay": 0.1, "layer_decay": 0.7, "eval_every": 10_000}  # ViTDet's
MIMDET = {"lr": 8e-5, "schedule": "cosine", "warmup_iters": 461, "layer_decay": 1.0, "window": 16}  # its plain ViTs
FCN = {"head": "fcn", "model": "resnet50", "optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4, "power": 0.9, "min_lr": 1e-4,
       "warmup_iters": 0, "inference": "whole"}  # CIM sec. 3.2: SGD 0.9, poly, batch 16, 512 px; the rest mmsegmentation's
RECIPES = {
    "mff": {"seg": {"iters": 160_000, "batch_size": 16},  # MFF A.4; it prints 16k, read as 160k
            "det": {**MIMDET, "epochs": 25.0}},  # MFF A.3
    "ddae": {"seg": {"iters": 160_000, "batch_size": 16, "lr": 4e-4, "weight_decay": 0.05, "warmup_iters": 1500, "power": 1.0,
                     "layer_decay": 0.65, "clip_grad": 3.0}},  # DDAE A and sec. 4.4; clipping: BootMAE's
    "cim_linear": {"seg": {"head": "linear", "lr": 3e-4, "layer_decay": 0.8, "img_size": (512, 512)}},  # CIM sec. 3.2
    "cim_fcn_80k": {"seg": {**FCN, "iters": 80_000}},  # CIM table 3
    "cim_fcn_160k": {"seg": {**FCN, "iters": 160_000}},
    "ve": {"seg": {"iters": 160_000, "batch_size": 8, "lr": 1e-4, "weight_decay": 0.05},  # supplement, which prints 16K and 2:
           # read as 160k, and 2 on each of its 4 GPUs
           "det": {**MIMDET, "epochs": 100.0, "batch_size": 64, "weight_decay": 0.1, "img_size": (768, 768)}},
    "revcol": {"seg": {"iters": 160_000, "batch_size": 16, "lr": 4e-5, "layer_decay": 0.65, "drop_path": 0.1},  # supplement 1.4
               "det": {"epochs": 50.0, "batch_size": 32, "lr": 1e-4, "drop_path": 0.2, "layer_decay": 0.9}},  # 1.5; Large: 0.3
}
DEMO = {
    "seg": {"img_size": (32, 32), "iters": 600, "batch_size": 32, "lr": 2e-3, "warmup_iters": 50, "eval_every": 300},
    "det": {"img_size": (64, 64), "iters": 400, "epochs": None, "batch_size": 8, "lr": 1e-3, "warmup_iters": 50,
            "eval_every": 200, "window": 8, "jitter": (0.5, 1.5), "channels": 32, "rois": 32},
}
ENCODER = "runs/mae_mff/encoder.pth"  # what `python mae_mff.py --demo` leaves


def presets(flags):
    """Defaults by --task, --recipe and --demo, then by what the file of weights says."""
    values = {"out": f"runs/transfer_{flags.task}"} | (SEG if flags.task == "seg" else DET)
    if flags.recipe:
        known = [name for name in RECIPES if flags.task in RECIPES[name]]
        if flags.recipe not in known:
            raise Refused(f"--recipe {flags.recipe} is none of --task {flags.task}: {', '.join(known)}")
        values |= RECIPES[flags.recipe][flags.task]
    if flags.iters and flags.epochs:
        raise Refused(f"--iters {flags.iters} and --epochs {flags.epochs}: give one of them")
    if flags.demo:
        small = {"data": "shapes", "model": "nano", "patch_size": 4, "channels": 64, "layer_decay": 0.75, "log_every": 50}
        values |= small | DEMO[flags.task] | {"weights": flags.weights or ENCODER}
    weights = flags.weights or values.get("weights", "none")
    if weights != "none":
        try:
            meta = network_of(read_file(weights))
        except Refused as error:
            hint = ": python mae_mff.py --demo makes it; or --weights none" if weights == ENCODER else ""
            raise Refused(f"{error}{hint}") from None
        if meta.get("method") == "finetune" and str(meta.get("model")).startswith("revcol"):
            raise Refused(f"--weights {weights} was fine-tuned for classification, without the units that maps need: use the "
                          "encoder.pth of revcol_v2.py")
        values |= {k: meta[k] for k in NETWORK if k in meta}
    if "resnet50" in (flags.model, values.get("model")):
        values |= {"layer_decay": 1.0, "drop_path": 0.0}
    return values | ({"epochs": None} if flags.iters else {"iters": None} if flags.epochs else {})


# ---- encoders ------------------------------------------------------------------------------------------------------------
# What every encoder has: forward(images (B, C, H, W)) -> its maps, finest first; channels and strides, one per map;
# layer(name) -> 0 ... last_layer for layer-wise decay; beside: names in a file of weights that it has no use for.


class ViTEncoder(ViT):
    """A ViT for images of any size that its patches tile. UperNet takes four of its maps (not normalised), others the last."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path)
        det, self.last_layer, self.recompute = cfg.task == "det", self.depth + 1, cfg.recompute
        quarters = [self.depth * i // 4 for i in (1, 2, 3, 4)]  # numbers of blocks, from 1
        self.taps = quarters[-1:] if det or cfg.head == "linear" else quarters
        if det and cfg.window:
            for number, block in enumerate(self.blocks, start=1):
                if number not in quarters:
                    block.attn = WindowAttention(self.embed_dim, block.attn.num_heads, self.grid, cfg.window)
        self.channels, self.strides = [self.embed_dim] * len(self.taps), [self.patch_size] * len(self.taps)
        self.init_weights()
        self.pos_embed.requires_grad_()
        self.beside = []
        if det or cfg.head == "uper":
            self.norm, self.beside = nn.Identity(), ["norm."]
        if det:
            self.cls_token, self.beside = None, ["norm.", "cls_token"]

    def layer(self, name):
        return layer_id(name, self.depth)

    def forward(self, images):
        h, w = grid = patch_grid(images.shape[2:], self.patch_size)
        pos_embed = self.pos_embed if grid == self.grid else resize_pos_embed(self.pos_embed, self.grid, grid)
        x = self.patch_embed(images) + pos_embed[:, 1:]
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token + pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        maps = []
        for number, block in enumerate(self.blocks, start=1):
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
            if number in self.taps:
                maps.append(self.norm(x)[:, -h * w :].transpose(1, 2).unflatten(2, grid))  # (B, D, h, w)
        return maps


def to_windows(x, grid, side):
    """(B, h*w, D) -> (B * windows, side*side, D), filled up with zeros on the right and below"""
    h, w = grid
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, -w % side, 0, -h % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # B, rows, side, columns, side, D
    return x.transpose(2, 3).reshape(-1, side * side, x.shape[-1])


def from_windows(x, grid, side):
    """Undoes `to_windows`."""
    h, w = grid
    x = x.reshape(-1, math.ceil(h / side), math.ceil(w / side), side, side, x.shape[-1])
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1, 2)


class WindowAttention(Attention):
    """Attention inside windows of side x side patches of a grid; parameters and names of `Attention`; no class token."""

    def __init__(self, dim, num_heads, grid, side):
        super().__init__(dim, num_heads)
        self.grid, self.side = grid, side

    def forward(self, x):
        return from_windows(super().forward(to_windows(x, self.grid, self.side)), self.grid, self.side)


class ResNetEncoder(ResNet50):
    """The ends of the four stages. FCN: the last two keep the second one's grid, with dilations 2 and 4 (the first block of
    each: 1 and 2, mmsegmentation's "contracted" dilation)."""

    def __init__(self, cfg):
        super().__init__(cfg.resnet_width, cfg.in_chans)
        self.channels, self.strides = [4 * cfg.resnet_width * 2**i for i in range(4)], [4, 8, 16, 32]
        self.beside, self.last_layer = [], 0
        if cfg.task == "seg" and cfg.head == "fcn":
            self.strides[2:] = [8, 8]
            for stage, dilation in ((self.layer3, 2), (self.layer4, 4)):
                stage[0].downsample[0].stride = (1, 1)
                for i, block in enumerate(stage):
                    d = dilation if i else dilation // 2
                    block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (d, d), (d, d)
        self.to(memory_format=torch.channels_last)

    def layer(self, _):
        return 0

    def forward(self, images):
        x, maps = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class RevColEncoder(RevColV2):
    """The four maps of RevColV2's last column, the top one pooled once more."""

    def __init__(self, cfg):
        size = cfg.model.removeprefix("revcol_")
        super().__init__(size, cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path, cfg.columns,
                         "column" if cfg.recompute else "plain")
        self.strides = [self.patch_size * s // 4 for s in (1, 2, 4, 8)]

    def forward(self, images):
        return self.maps(images)


def make_encoder(cfg):
    kinds = {"resnet50": ResNetEncoder, "revcol": RevColEncoder}
    return kinds.get(cfg.model.split("_")[0], ViTEncoder)(cfg)


# ---- segmentation --------------------------------------------------------------------------------------------------------


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def classifier(inputs, classes, dropout=0.1):
    """Dropout of whole channels and a linear layer per pixel, N(0, .01)."""
    layer = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)


class ViTNeck(nn.Module):
    """Four maps of one grid -> 4, 2, 1 and 1/2 times that grid, same width (BEiT's, MAE's)."""

    def __init__(self, D):
        super().__init__()
        up = [nn.ConvTranspose2d(D, D, 2, 2) for _ in range(3)]
        self.scales = nn.ModuleList([nn.Sequential(up[0], nn.BatchNorm2d(D), nn.GELU(), up[1]), up[2], nn.Identity(),
                                     nn.MaxPool2d(2)])

    def forward(self, maps):
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class UperHead(nn.Module):
    """Four maps, finest first -> scores (B, classes, h, w) on the finest grid."""

    def __init__(self, channels, width, classes):
        super().__init__()
        *finer, top = channels
        conv = Conv2dNormActivation  # with BatchNorm and ReLU, same size
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(top, width, 1)) for n in (1, 2, 3, 6))
        self.bottleneck = conv(top + 4 * width, width, 3)
        self.laterals = nn.ModuleList(conv(c, width, 1) for c in finer)
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in finer)
        self.join = conv(4 * width, width, 3)
        self.classify = classifier(width, classes)

    def forward(self, maps):
        *finer, top = maps
        pooled = [resize(pool(top), top.shape[2:]) for pool in self.pools]
        x = self.bottleneck(torch.cat([top, *pooled], dim=1))
        levels = [x]
        for i in (2, 1, 0):  # top-down
            x = self.laterals[i](finer[i]) + resize(x, finer[i].shape[2:])
            levels.append(self.smooth[i](x))
        return self.classify(self.join(torch.cat([resize(x, finer[0].shape[2:]) for x in reversed(levels)], dim=1)))


class FCNHead(nn.Module):
    """`depth` 3 x 3 convolutions; with `joined`, one more on their input and output together."""

    def __init__(self, inputs, width, classes, depth=1, joined=False):
        super().__init__()
        self.convs = nn.Sequential(*(Conv2dNormActivation(width if i else inputs, width, 3) for i in range(depth)))
        self.join = Conv2dNormActivation(inputs + width, width, 3) if joined else None
        self.classify = classifier(width, classes)

    def forward(self, x):
        y = self.convs(x)
        return self.classify(self.join(torch.cat([x, y], dim=1)) if self.join else y)


class Segmenter(nn.Module):
    def __init__(self, cfg, classes):
        super().__init__()
        self.encoder = make_encoder(cfg)
        channels, self.uper = self.encoder.channels, cfg.head == "uper"
        one_grid = self.uper and len(set(self.encoder.strides)) == 1
        self.neck = ViTNeck(channels[0]) if one_grid else nn.Identity()
        if self.uper:
            self.head = UperHead(channels, cfg.channels, classes)
        elif cfg.head == "fcn":
            self.head = FCNHead(channels[-1], cfg.channels, classes, depth=2, joined=True)
        else:
            self.head = classifier(channels[-1], classes, dropout=0.0)
        self.auxiliary = FCNHead(channels[2], 256, classes) if cfg.head != "linear" else None

    def scores(self, images):
        """(B, C, H, W) -> list of class scores (B, classes, h, w) float32: the head's, and in training the auxiliary one's"""
        maps = self.neck(self.encoder(images))
        scores = [self.head(maps if self.uper else maps[-1])]
        if self.auxiliary and self.training:
            scores.append(self.auxiliary(maps[2]))
        return [x.float() for x in scores]

    def forward(self, images, labels):
        """images (B, C, H, W), labels (B, H, W) int64 -> loss, {name: detached}: cross-entropy, mean over the pixels that
        count; the auxiliary head's with weight 0.4"""
        counts = (labels != IGNORE).sum().clamp(min=1)
        losses = [F.cross_entropy(resize(x, labels.shape[1:]), labels, ignore_index=IGNORE, reduction="sum") / counts
                  for x in self.scores(images)]
        loss = losses[0] + 0.4 * sum(losses[1:])
        terms = zip(("loss", "main_head", "auxiliary_head"), (loss, *losses), strict=False)
        return loss, {name: x.detach() for name, x in terms}


def window_starts(length, side):
    """First pixels of windows of `side` that cover `length`: every two thirds of a side, the last at the border."""
    return sorted({min(start, max(length - side, 0)) for start in range(0, length, max(1, side * 2 // 3))})


def predict_scores(model, images, cfg):
    """(1, C, H, W) -> class scores (classes, H, W): whole, or the mean over windows of --img_size. What is smaller than a
    window, or no multiple of the patch, is filled up on the right and below with the mean colour, 0."""
    H, W = images.shape[2:]
    unit = cfg.patch_size if cfg.model != "resnet50" else 1
    h, w = cfg.img_size if cfg.inference == "slide" else (max(2, math.ceil(side / unit)) * unit for side in (H, W))
    images = F.pad(images[0], (0, max(w - W, 0), 0, max(h - H, 0)))
    corners = [(top, left) for top in window_starts(images.shape[1], h) for left in window_starts(images.shape[2], w)]
    parts = model.scores(torch.stack([images[:, top : top + h, left : left + w] for top, left in corners]))[0]
    total, count = parts.new_zeros(parts.shape[1], *images.shape[1:]), parts.new_zeros(images.shape[1:])
    for (top, left), part in zip(corners, resize(parts, (h, w)), strict=True):
        total[:, top : top + h, left : left + w] += part
        count[top : top + h, left : left + w] += 1
    return (total / count)[:, :H, :W]


def confusion(prediction, labels, classes):
    """(classes, classes) int64: how many pixels of class i (row) were called j; those labelled IGNORE do not count."""
    counts = labels != IGNORE
    return torch.bincount(labels[counts] * classes + prediction[counts], minlength=classes**2).view(classes, classes)


def seg_scores(matrix, classes):
    """Per cent: mIoU over the classes in labels or predictions, mAcc over those in labels, aAcc over pixels; IoU of a class."""
    matrix = matrix.double()
    hit, truth, called = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = 100 * hit / (truth + called - hit), 100 * hit / truth  # nan where there is nothing
    return {"eval/miou": iou.nanmean().item(), "eval/macc": accuracy.nanmean().item(),
            "eval/aacc": (100 * hit.sum() / truth.sum()).item()} | {
                f"eval/iou/{name}": x for name, x in zip(classes, iou.tolist(), strict=True) if not math.isnan(x)}


# ---- detection -----------------------------------------------------------------------------------------------------------


class SimplePyramid(nn.Module):
    """ViTDet's: one map (B, D, h, w) -> 4, 2, 1 and 1/2 times its grid, `width` channels each; takes and gives {name: map}."""

    def __init__(self, D, width):
        super().__init__()
        up = nn.Sequential(nn.ConvTranspose2d(D, D // 2, 2, 2), LayerNorm2d(D // 2), nn.GELU(),
                           nn.ConvTranspose2d(D // 2, D // 4, 2, 2))
        scales = [(up, D // 4), (nn.ConvTranspose2d(D, D // 2, 2, 2), D // 2), (nn.Identity(), D), (nn.MaxPool2d(2), D)]
        self.levels = nn.ModuleList(
            nn.Sequential(scale, nn.Conv2d(c, width, 1, bias=False), LayerNorm2d(width),
                          nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)) for scale, c in scales)

    def forward(self, maps):
        return {str(i): level(maps["0"]) for i, level in enumerate(self.levels)}


class Backbone(nn.Module):
    """What torchvision's detectors take: images -> {name: map}, finest first, and a coarser one for the proposals alone."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.out_channels = make_encoder(cfg), cfg.channels
        channels, self.strides = self.encoder.channels, self.encoder.strides
        if len(channels) == 1:
            self.pyramid = SimplePyramid(channels[0], cfg.channels)
            self.strides = [self.strides[0] * s // 4 for s in (1, 2, 4, 8)]
        else:
            self.pyramid = FeaturePyramidNetwork(channels, cfg.channels)

    def forward(self, images):
        maps = self.pyramid(OrderedDict((str(i), x) for i, x in enumerate(self.encoder(images))))
        maps = OrderedDict((name, x.float()) for name, x in maps.items())  # torchvision's RoIAlign wants one precision
        maps["pool"] = F.max_pool2d(maps["3"], 1, stride=2)
        return maps


def roi_align(side, strides):
    """torchvision's pooling of boxes from maps of these strides. It would else infer them from the first image that it meets,
    which may have been filled up."""
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], side, 2)
    pool.scales = [1 / stride for stride in strides]
    levels = [round(math.log2(stride)) for stride in (strides[0], strides[-1])]
    pool.map_levels = initLevelMapper(*levels, pool.canonical_scale, pool.canonical_level)
    return pool


def in_float32(output):
    """A tensor, or tensors in lists: in half precision torchvision would round boxes to whole pixels and more."""
    return output.float() if isinstance(output, torch.Tensor) else type(output)(in_float32(x) for x in output)


class Detector(nn.Module):
    """torchvision's Mask R-CNN with ViTDet's heads (proposals: two convolutions; boxes: four and a linear layer; masks: four;
    LayerNorm). It resizes images to fit --img_size, and fills them up to that square with the mean colour."""

    def __init__(self, cfg, classes):
        super().__init__()
        backbone, width, side = Backbone(cfg), cfg.channels, cfg.img_size[0]
        sides = [8 * stride for stride in (*backbone.strides, 2 * backbone.strides[-1])]  # 32 to 512 px on strides 4 to 64
        anchors = AnchorGenerator(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * 5)
        self.model = MaskRCNN(
            backbone, min_size=side, max_size=side, size_divisible=side, _skip_resize=True,  # in training crops have the size
            image_mean=[0.0] * cfg.in_chans, image_std=[1.0] * cfg.in_chans,  # Normalise has done it
            rpn_anchor_generator=anchors, rpn_head=RPNHead(width, 3, conv_depth=2), rpn_post_nms_top_n_train=1000,
            box_batch_size_per_image=cfg.rois,
            box_roi_pool=roi_align(7, backbone.strides), mask_roi_pool=roi_align(14, backbone.strides),
            box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [1024], norm_layer=LayerNorm2d),
            mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=LayerNorm2d),
            box_predictor=FastRCNNPredictor(1024, classes + 1), mask_predictor=MaskRCNNPredictor(width, width, classes + 1))
        for head in (self.model.rpn.head, self.model.roi_heads.box_predictor, self.model.roi_heads.mask_predictor):
            head.register_forward_hook(lambda *call: in_float32(call[-1]))

    @property
    def encoder(self):
        return self.model.backbone.encoder

    def forward(self, images, targets):
        """images (B, C, S, S), targets: [{"boxes" (n, 4), "labels" (n,), "masks" (n, S, S)}] -> loss, {name: detached}: the sum
        of torchvision's five, each a mean over the batch's sampled boxes (masks: over the pixels of the positive ones)"""
        terms = self.model(list(images), targets)
        loss = sum(terms.values())
        return loss, {name.removeprefix("loss_"): value.detach() for name, value in {"loss": loss, **terms}.items()}


def coco_results(image_id, output, categories):
    """torchvision's detections in one image -> COCO's result format: boxes x, y, w, h; masks as run lengths."""
    results, masks = [], (output["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
    boxes, kinds, scores = (output[name].tolist() for name in ("boxes", "labels", "scores"))
    for (x1, y1, x2, y2), kind, score, mask in zip(boxes, kinds, scores, masks, strict=True):
        results.append({"image_id": image_id, "category_id": categories[kind - 1], "score": score,
                        "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": rle.encode(np.asfortranarray(mask))})
    return results


def average_precision(truth, results, image_ids):
    """Per cent, by pycocotools: AP over the overlaps 0.5 to 0.95, and AP at 0.5, of boxes and of masks in the images given. No
    results: 0."""
    scores = {f"eval/{name}": 0.0 for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50")}
    if not results:
        return scores
    with redirect_stdout(None):
        found = truth.loadRes(results)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with redirect_stdout(None):
            judge = COCOeval(truth, found, kind)
            judge.params.imgIds = sorted(image_ids)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        ap, ap50 = (max(0.0, 100 * float(x)) for x in judge.stats[:2])  # -1: nothing to find
        scores |= {f"eval/{name}_ap": ap, f"eval/{name}_ap50": ap50}
    return scores


# ---- evaluation ----------------------------------------------------------------------------------------------------------


def predict(model, images, cfg, run):
    """A test image (1, C, H, W) -> class scores (classes, H, W), or torchvision's dict of detections, in the image's pixels."""
    with autocast(run.device, run.amp_dtype):
        return predict_scores(model, images, cfg) if cfg.task == "seg" else model.model(list(images))[0]


def scene_batches(source, keys, transform, cfg, run):
    views = Scenes(source, transform, cfg.seed, run.bad_files.allow(len(source)))
    return run.timed(make_loader(views, keys, run, collate_scenes))


@torch.inference_mode()
def evaluate(model, source, truth, to_images, cfg, run):
    """Scores over the whole of `source`, every image once over all processes; what cannot be read does not count. {} but on the
    first process."""
    classes, results, seen = len(source.classes), [], []
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=run.device)
    for batch in scene_batches(source, own_share(len(source), run, batch=1), Fit(cfg.img_size, cfg.task), cfg, run):
        if batch["bad"]:
            continue
        output = predict(model, to_images(batch), cfg, run)
        if cfg.task == "seg":
            labels = batch["labels"][0].to(run.device).long()
            matrix += confusion(resize(output[None], labels.shape)[0].argmax(0), labels, classes)
        else:
            seen.append(source.ids[batch["index"].item()])
            results += coco_results(seen[-1], output, source.categories)
    run.bad_files.share()
    parts = [(results, seen)]
    if run.world_size > 1:
        dist.all_reduce(matrix)
        parts = [None] * run.world_size
        dist.all_gather_object(parts, (results, seen))
    if not run.is_main:
        return {}
    if cfg.task == "seg":
        scores = seg_scores(matrix.cpu(), source.classes)
    else:
        scores = average_precision(truth, *(sum(lists, []) for lists in zip(*parts, strict=True)))
    return {name: round(value, 3) for name, value in scores.items()}


@torch.inference_mode()
def draw_pictures(path, model, source, to_images, cfg, run):
    """PNG: image, truth and prediction of --pictures held-out images, evenly spaced, the same every time."""
    views, rows, seen = Scenes(source, Fit(cfg.img_size, cfg.task), cfg.seed, len(source)), [], set()
    n = min(cfg.pictures, len(source))
    for i in range(n):
        batch = collate_scenes([views[0, i * len(source) // n]])
        images = to_images(batch)
        output = predict(model, images, cfg, run)
        image = (255 * to_images.undo(images)).round().to(torch.uint8)[0].cpu()
        image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
        if cfg.task == "seg":
            labels = batch["labels"][0]
            called = resize(output[None], labels.shape)[0].argmax(0).cpu()
            seen |= {*labels.unique().tolist(), *called.unique().tolist()} - {IGNORE}
            image = resize(image[None].float(), labels.shape)[0].to(torch.uint8)
            rows.append([image, show_labels(labels), show_labels(called)])
        else:
            keep = output["scores"] > 0.5
            output = {name: value[keep].cpu() for name, value in output.items()}
            output["masks"] = output["masks"][:, 0] > 0.5
            nothing = {"boxes": []}
            rows.append([show_objects(image, shown, source.classes) for shown in (nothing, batch["target"][0], output)])
    save_scenes(path, rows, ["image", "truth", "prediction"], [(i, source.classes[i]) for i in sorted(seen)])


# ---- training ------------------------------------------------------------------------------------------------------------


@dataclass
class Iterations(Plan):
    """A plan whose checkpoints come with its evaluations, not with passes over the data: those of few images are short."""

    every: int = 1

    def ends_epoch(self, step):
        return step == self.steps or step % self.every == 0


def learning_rate(step, cfg, steps):
    """Of the update after `step` of `steps`: the schedule's value times the warm-up's, which begins with nearly nothing."""
    done = step / steps
    if cfg.schedule == "step":
        lr = cfg.lr * 0.1 ** ((done >= 8 / 9) + (done >= 26 / 27))
    else:
        left = 0.5 * (1 + math.cos(math.pi * done)) if cfg.schedule == "cosine" else (1 - done) ** cfg.power
        lr = cfg.min_lr + (cfg.lr - cfg.min_lr) * left
    begin = 1e-6 if cfg.task == "seg" else 1e-3
    return lr * (begin + (1 - begin) * step / cfg.warmup_iters if step < cfg.warmup_iters else 1.0)


def parameter_groups_of(model, cfg):
    """Layer-wise decay inside the encoder; the decoder learns at the full rate."""
    encoder = model.encoder

    def layer(name):
        return encoder.layer(name.split("encoder.", 1)[1]) if "encoder." in name else encoder.last_layer

    return parameter_groups(model, cfg.weight_decay, ("pos_embed", "cls_token"), layer, cfg.layer_decay)


def train_step(net, batches, to_inputs, optimizer, scaler, step, cfg, plan, run):
    """One update from plan.accum_steps micro-batches; returns {name: float, mean over the update} and the sample numbers."""
    optimizer.zero_grad(set_to_none=True)
    total, samples = {}, []
    for micro_step in range(plan.accum_steps):
        batch = next(batches)
        run.seed(step, micro_step)
        inputs = to_inputs(batch)
        with gradient_sync(net, micro_step == plan.accum_steps - 1):
            with autocast(run.device, run.amp_dtype):
                loss, terms = net(*inputs)
            scaler.scale(loss / plan.accum_steps).backward()
        total = {name: total.get(name, 0) + term / plan.accum_steps for name, term in terms.items()}
        samples += batch["index"].tolist()
    return finish_update(run, optimizer, scaler, total, cfg.clip_grad), samples


def train(cfg, run):
    source, held_out = open_scenes(cfg, "train"), open_scenes(cfg, "val")
    for name, scenes in (("training", source), ("held-out", held_out)):
        if scenes.dropped:
            run.print(f"{scenes.dropped} degenerate boxes (under a pixel, or without a mask) dropped from the {name} images")
    if held_out.classes != source.classes:
        raise Refused(f"--data {cfg.data}: the categories of the two annotation files differ ({len(source.classes)} training, "
                      f"{len(held_out.classes)} held out): write the same list into both")
    truth = held_out.truth() if cfg.task == "det" and run.is_main else None
    if cfg.check_data:
        for name, scenes in (("training", source), ("held-out", held_out)):
            run.print(f"{name} images:")
            check_data(scenes, run.workers)
        return
    mean, std = normalisation(cfg)
    to_images = Normalise(mean, std, run.device)
    plan = make_plan(len(source), cfg, run.world_size, cfg.iters)
    plan = Iterations(**vars(plan), every=cfg.eval_every)
    together = run.world_size if run.device.type == "cuda" else 1  # whose images SyncBatchNorm averages over
    if cfg.task == "seg" and cfg.head == "uper" and plan.micro_batch * together < 2:
        raise Refused("UperNet pools to one pixel, whose BatchNorm needs two images per forward pass: raise --batch_size or "
                      "--micro_batch")
    torch.manual_seed(cfg.seed)
    model = Segmenter(cfg, len(source.classes)) if cfg.task == "seg" else Detector(cfg, len(source.classes))
    if cfg.weights != "none":
        load_weights(model.encoder, cfg.weights, ignore=(*BESIDE_TRUNK, *model.encoder.beside),
                     part=(*PARTS, "encoder.", "model.backbone.encoder."))
    run.start(plan, f"lr {cfg.lr:.3g}")
    if run.world_size > 1 and run.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = run.prepare(model)

    groups, sgd = parameter_groups_of(model, cfg), cfg.optimizer == "sgd"
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=cfg.betas[0]) if sgd else adamw(groups, cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run.inputs = {"list of classes": f"{len(source.classes)} names, checksum {zlib.crc32(repr(source.classes).encode()):08x}"}
    start = run.load(state)
    transform = (SegmentationCrop if cfg.task == "seg" else LargeScaleJitter)(cfg.img_size, cfg.jitter, mean)
    batches = scene_batches(source, KeyedBatches(plan, cfg.seed, run, start), transform, cfg, run)

    def to_inputs(batch):
        if cfg.task == "seg":
            return to_images(batch), batch["labels"].to(run.device, non_blocking=True).long()
        targets = [{name: x.to(run.device, non_blocking=True) for name, x in target.items()} for target in batch["target"]]
        return to_images(batch), [target | {"masks": unpack(target["masks"])} for target in targets]

    meta = {"method": "transfer_seg_det", "task": cfg.task, "head": cfg.head, "model": cfg.model, "img_size": cfg.img_size,
            "patch_size": cfg.patch_size, "resnet_width": cfg.resnet_width, "columns": cfg.columns, "in_chans": cfg.in_chans,
            "mean": mean, "std": std, "classes": list(source.classes)}
    model.train()
    for step in range(start, plan.steps):
        now = learning_rate(step, cfg, plan.steps)
        set_lr(optimizer, now)
        restore_statistics = remember_statistics(model)
        stats, samples = train_step(net, batches, to_inputs, optimizer, scaler, step, cfg, plan, run)
        if stats["skipped"]:
            restore_statistics()
        run.end_update(step + 1, stats, now, samples)
        with run.off_the_clock():
            if plan.ends_epoch(step + 1):
                if run.stopping:  # a whole evaluation may be more than the time that is left
                    run.save(step + 1, state, {**meta, "epoch": plan.epoch(step + 1)})
                model.eval()
                run.share_statistics(model)
                result = evaluate(model, held_out, truth, to_images, cfg, run)
                if run.is_main:
                    run.log({"step": step + 1, "epoch": plan.epoch(step + 1), **result})
                    run.print(f"step {step + 1}, {len(held_out)} held-out images: " + ", ".join(
                        f"{name[5:]} {value:.2f}" for name, value in result.items() if name.count("/") == 1))
                    if cfg.pictures:
                        draw_pictures(run.out / f"pictures/step_{step + 1:07}.png", model, held_out, to_images, cfg, run)
                model.train()
            if run.save_due(step + 1):
                run.save(step + 1, state, {**meta, "epoch": plan.epoch(step + 1)})
        if run.stopping:
            return run.print(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume carries on")
    run.export("model.pth", model.state_dict(), meta)
    run.print(f"done: {run.out}/model.pth, last.pth, log.jsonl, pictures/")


if __name__ == "__main__":
    launch(Config, presets, train, "transfer_seg_det")
