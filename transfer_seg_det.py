"""Segmentation and detection with a pre-trained encoder: UperNet and Mask R-CNN.

--task seg   a class for every pixel; mIoU, mAcc and aAcc over all held-out images
    --head uper    UperNet (Xiao et al., ECCV 2018) with an auxiliary FCN on the third map, weight 0.4. Maps:
                   a ViT's at 1/3, 1/2, 2/3, 3/3 of its depth, at 4, 2, 1, 1/2 times its grid; others' own
    --head linear  one linear layer on a ViT's normalised last map; --head fcn: FCN on a ResNet-50 with its
                   last two stages dilated (both: CIM sec. 3.2)
--task det   boxes and masks; AP by pycocotools
    torchvision's Mask R-CNN with ViTDet's heads (Li et al., ECCV 2022) on large-scale jitter; --detector
    cascade: three box heads, cascade.py. A ViT without class token, in windows but for four blocks, with a
    simple feature pyramid; others: an FPN on their maps

--weights takes encoder.pth or last.pth of any script here, official MAE files, timm's ViTs, torchvision's
ResNet-50, or `none`. Layout of --data, memory, use of the result: docs/TRANSFER.md.

Not in the papers, our choice: relative positions only of a file that has them, no layer scale; positions,
class token and vectors do not decay; torch's initial convolutions; losses are means over pixels that count; a
ResNet's BatchNorm learns in detection; heads have LayerNorm where MIMDet's have SyncBatchNorm. As in
torchvision: RoIAlign without the half-pixel shift, box losses quadratic below 1/9, no antialiasing in tests.

    python transfer_seg_det.py --demo       on runs/mae_mff/encoder.pth: minutes on a CPU; --task det likewise
    torchrun --nproc_per_node 4 transfer_seg_det.py --recipe mff --weights encoder.pth --zero_is_ignore
"""

import functools
import math
import sys
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms.v2.functional import to_dtype

import overlay
import transfer_data as data
from backbones import MODELS, make_encoder
from beit import BEIT_SIZES, PRETRAINING, TABLE
from coco import CocoScenes, DrawnScenes, average_precision, coco_results, coco_truth
from common import (
    NETWORK,
    VIT_SIZES,
    RunConfig,
    UserError,
    ViT,
    adamw,
    data_path,
    eval_keys,
    interpolate,
    launch,
    load_weights,
    network_of,
    parameter_groups,
    patch_grid,
    print0,
    read_file,
    read_recipe,
    remember_statistics,
    save_image_grid,
    set_lr,
    split_batch,
    training_keys,
)
from revcol_v2 import cell_grid
from swin import SWIN_SIZES


@dataclass
class Config(RunConfig):
    # what
    mode: Literal["train", "evaluate"] = "train"  # evaluate: scores of a finished --weights model.pth
    predict: str | None = None  # an image, folder or list: what a finished --weights model.pth says of it
    task: Literal["seg", "det"] = "seg"  # segmentation or detection
    recipe: str | None = None  # a paper's settings, recipes/NAME_TASK.txt; flags next to it win
    head: Literal["uper", "linear", "fcn"] = "uper"  # segmentation: the decoder
    weights: str | None = None  # file of the encoder's weights, or none for random ones
    model: Literal[*MODELS] = "base"  # a ViT's SIZE, beit_, swin_, revcol_SIZE, resnet50; default: file's
    patch_size: int = 16  # pixels; likewise
    resnet_width: int = 64  # ResNet: channels of its stem; likewise
    columns: int = 2  # RevColV2: bottom-up, and as many top-down, columns; likewise
    swin_window: int = 6  # Swin: side of its attention windows; likewise
    drop_path: float = 0.1  # ViT, Swin, RevColV2: stochastic depth of the last block
    detector: Literal["mask_rcnn", "cascade"] = "mask_rcnn"  # detection: one box head, or three in a row
    window: int = 14  # detection, ViT: side of its attention windows in patches; 0 = global attention
    recompute: bool = False  # ViT, RevColV2: compute activations again in the backward pass
    channels: int | None = None  # width of the decoder; default: UperNet on a ViT 768, else 512; det 256
    rois: int = 512  # detection: boxes per image that the heads learn from
    rpn_convs: int = 2  # detection: convolutions before the proposals; ViTDet's 2, MIMDet's 1
    max_detections: int = 100  # detection: most boxes per image, found and counted
    # data; from here on the defaults are those of --task seg, and det has its own in DEFAULTS
    data: str = "data/ade20k"  # folder laid out as ADE20K (seg) or COCO (det), or shapes
    img_size: tuple[int, int] = (512, 512)  # pixels of a training crop, H or H,W; detection: one number
    jitter: tuple[float, float] = (0.5, 2.0)  # range of scales in training
    zero_is_ignore: bool = False  # label maps: 0 is no class, 1 the first (ADE20K)
    # optimisation
    iters: int | None = None  # updates
    epochs: float | None = None  # passes over the data, in place of --iters
    batch_size: int = 16  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of one process; default: the largest <= 256
    optimizer: Literal["adamw", "sgd"] = "adamw"  # AdamW, or SGD with momentum
    lr: float = 1e-4  # peak learning rate, whatever the batch
    min_lr: float = 0.0  # where the schedule ends (poly, cosine)
    schedule: Literal["poly", "cosine", "step"] = "poly"  # step: a tenth at 8/9 and 26/27 of the run
    power: float = 1.0  # poly: the exponent; 1 = linear
    warmup_iters: int = 1500  # linear warm-up
    weight_decay: float = 0.05  # AdamW, SGD
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW; SGD: the first is the momentum
    layer_decay: float = 0.65  # ViT, Swin, RevColV2: learning rate of a block = the next one's times this
    clip_grad: float = 0.0  # largest gradient norm; 0 = no clipping
    # evaluation
    inference: Literal["slide", "whole"] = "slide"  # segmentation: windows of --img_size, or the whole image
    eval_every: int = 16_000  # updates between evaluations (and at the end)
    pictures: int = 8  # held-out images drawn at each evaluation; 0 = none

    ranges = RunConfig.ranges | {
        "warmup_iters": (0, 2**40), "window": (0, 2**14), "jitter": (0.01, 100), "drop_path": (0, 0.999),
        "layer_decay": (1e-6, 1)}
    start_from = ("weights",)
    free_on_resume = RunConfig.free_on_resume | {"recipe", "recompute"}

    def __post_init__(self):
        super().__post_init__()
        (H, W), seg, vit = self.img_size, self.task == "seg", self.model in (*VIT_SIZES, *BEIT_SIZES)
        resnet, uper, swin = self.model == "resnet50", self.head == "uper", self.model in SWIN_SIZES
        grid_of = patch_grid if vit or swin else cell_grid
        self.channels = self.channels or (256 if not seg else 768 if vit and uper else 512)
        errors = {
            "--weights FILE is needed; none is the baseline with random weights":
                self.weights is None and not self.check_data,
            f"--head {self.head} is not for {self.model}: linear is for ViTs, fcn for resnet50":
                seg and not {"linear": vit, "fcn": resnet}.get(self.head, True),
            "--head and --compile are for --task seg": not seg and (not uper or self.compile),
            "--detector is for --task det": seg and self.detector != "mask_rcnn",
            f"--img_size {H},{W}: --task det wants one number, a multiple of 32":
                not seg and (H != W or H % 32 > 0),
            f"--task det needs a --patch_size of 4, 8, 16 or 32, not {self.patch_size}":
                not seg and not resnet and self.patch_size not in (4, 8, 16, 32),
            "--layer_decay, --drop_path and --recompute are for ViTs and RevColV2, Swin has the first two":
                resnet and (self.layer_decay != 1 or self.drop_path > 0)
                or (resnet or swin) and self.recompute,
            f"--img_size is one --patch_size of {self.patch_size}: at least two are needed":
                not resnet and min(grid_of(self.img_size, self.patch_size)) < 2,
        }
        if wrong := [message for message, holds in errors.items() if holds]:
            raise ValueError(wrong[0])


DEFAULTS = {
    "seg": {"out": "runs/transfer_seg", "iters": 160_000},  # and those of Config: MAE's for UperNet
    "det": {"out": "runs/transfer_det", "data": "data/coco", "img_size": (1024, 1024), "jitter": (0.1, 2.0),
            "epochs": 100.0, "batch_size": 64, "schedule": "step", "warmup_iters": 250, "weight_decay": 0.1,
            "layer_decay": 0.7, "eval_every": 10_000},  # ViTDet's
}


# What a finished model says of itself, so that it can be used without its flags.
MODEL = ("task", "head", "channels", "detector", "window", "rpn_convs", "inference", "max_detections",
         "zero_is_ignore", "queries", "layers", "pixel_layers")


def presets(flags, script=sys.modules[__name__]):
    """Defaults by --task, --recipe and --demo, then by what the file of weights says of its network. script:
    whose Config and DEFAULTS; transfer_mask2former.py, which has no --task, gives itself."""
    task = getattr(flags, "task", "m2f")
    if flags.predict or flags.mode == "evaluate":
        meta = network_of(read_file(flags.weights)) if flags.weights else {}
        task = "m2f" if meta.get("head") == "mask2former" else meta.get("task")
        if "classes" not in meta or task not in script.DEFAULTS:
            other = f", not a file of {meta['method']}.py" if "method" in meta else ""
            raise UserError(f"--weights {flags.weights}: expected a finished model.pth of this script{other}")
        known = {field.name: meta[field.name] for field in fields(script.Config) if field.name in meta}
        out = "predictions" if flags.predict else f"runs/transfer_{task}_evaluate"
        resnet = {"layer_decay": 1.0, "drop_path": 0.0} if meta["model"] == "resnet50" else {}
        return script.DEFAULTS[task] | resnet | known | {"out": out}
    if flags.iters and flags.epochs:
        raise UserError(f"--iters {flags.iters} and --epochs {flags.epochs}: give one of them")
    values = dict(script.DEFAULTS[task])
    for recipe in filter(None, (flags.recipe, "demo" if flags.demo else None)):
        chosen = read_recipe(script.Config, f"{recipe}_{task}")
        values |= {"epochs": None} | chosen if "iters" in chosen else chosen
    if flags.demo and getattr(flags, "detector", None) == "cascade":
        values["iters"] = 180  # three heads take longer: as many minutes as with one
    weights = flags.weights or values.get("weights", "none")
    if weights != "none":
        try:
            meta = network_of(read_file(weights))
        except UserError as error:
            hint = "" if flags.weights else ": python mae_mff.py --demo makes it; or --weights none"
            raise UserError(f"{error}{hint}") from None
        values |= {name: meta[name] for name in NETWORK if name in meta}
    if "resnet50" in (flags.model, values.get("model")):
        values |= {"layer_decay": 1.0, "drop_path": 0.0}
    return values | ({"epochs": None} if flags.iters else {"iters": None} if flags.epochs else {})


# ---- segmentation ------------------------------------------------------------------------------------------


def resize(x, size):
    return interpolate(x, size, mode="bilinear")


def classifier(inputs, classes, dropout=0.1):
    """Dropout of whole channels and a linear layer per pixel, N(0, .01)."""
    layer = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)


def four_scales(D, half, quarter, norm):
    """Modules that bring maps of width D to 4, 2, 1 and 1/2 times their grid; width after one, two doublings:
    `half`, `quarter`."""
    four_times = [nn.ConvTranspose2d(D, half, 2, 2), norm(half), nn.GELU(),
                  nn.ConvTranspose2d(half, quarter, 2, 2)]
    twice = nn.ConvTranspose2d(D, half, 2, 2)
    return nn.ModuleList([nn.Sequential(*four_times), twice, nn.Identity(), nn.MaxPool2d(2)])


class UperHead(nn.Module):
    """Four maps, finest first -> scores (B, classes, h, w) on the finest grid."""

    def __init__(self, channels, width, classes):
        super().__init__()
        *finer, top = channels
        conv = Conv2dNormActivation  # with BatchNorm and ReLU, same size
        pools = (nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(top, width, 1)) for n in (1, 2, 3, 6))
        self.pools = nn.ModuleList(pools)
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
        finest = finer[0].shape[2:]
        return self.classify(self.join(torch.cat([resize(x, finest) for x in reversed(levels)], dim=1)))


class FCNHead(nn.Module):
    """`depth` 3 x 3 convolutions; with `joined`, one more on their input and output together."""

    def __init__(self, inputs, width, classes, depth=1, joined=False):
        super().__init__()
        conv = Conv2dNormActivation
        self.convs = nn.Sequential(*(conv(width if i else inputs, width, 3) for i in range(depth)))
        self.join = conv(inputs + width, width, 3) if joined else None
        self.classify = classifier(width, classes)

    def forward(self, x):
        y = self.convs(x)
        return self.classify(self.join(torch.cat([x, y], dim=1)) if self.join else y)


class Segmenter(nn.Module):
    def __init__(self, cfg, classes):
        super().__init__()
        self.cfg, self.encoder = cfg, make_encoder(cfg)
        channels, D, self.neck = self.encoder.channels, self.encoder.channels[0], None
        if cfg.head != "linear" and isinstance(self.encoder, ViT):  # BEiT's, MAE's
            self.neck = nn.ModuleDict({"scales": four_scales(D, D, D, nn.BatchNorm2d)})
        if cfg.head == "uper":
            self.head = UperHead(channels, cfg.channels, classes)
        elif cfg.head == "fcn":
            self.head = FCNHead(channels[-1], cfg.channels, classes, depth=2, joined=True)
        elif cfg.head == "linear":
            self.head = classifier(channels[-1], classes, dropout=0.0)
        self.auxiliary = FCNHead(channels[2], 256, classes) if cfg.head in ("uper", "fcn") else None

    def maps(self, images):
        """(B, C, H, W) -> maps, finest first"""
        maps = self.encoder(images)
        return [scale(x) for scale, x in zip(self.neck["scales"], maps, strict=True)] if self.neck else maps

    def scores(self, images):
        """(B, C, H, W) -> [scores (B, classes, h, w) float32]: the head's, and in training the auxiliary
        one's"""
        maps = self.maps(images)
        scores = [self.head(maps if self.cfg.head == "uper" else maps[-1])]
        if self.auxiliary and self.training:
            scores.append(self.auxiliary(maps[2]))
        return [x.float() for x in scores]

    def forward(self, images, labels):
        """images (B, C, H, W), labels (B, H, W) int64 -> loss, {name: detached}: cross-entropy, mean over the
        pixels that count; the auxiliary head's with weight 0.4"""
        counts, size = (labels != data.IGNORE).sum().clamp(min=1), labels.shape[1:]
        losses = [F.cross_entropy(resize(x, size), labels, ignore_index=data.IGNORE, reduction="sum") / counts
                  for x in self.scores(images)]
        loss = losses[0] + 0.4 * sum(losses[1:])
        terms = zip(("loss", "main_head", "auxiliary_head"), (loss, *losses), strict=False)
        return loss, {name: x.detach() for name, x in terms}

    def predict(self, images):
        """(1, C, H, W) -> class scores (classes, H, W): of the whole, or the mean over windows of
        --img_size. What is smaller than a window, or no multiple of the patch, is filled up on the right and
        below with 0."""
        cfg, (H, W) = self.cfg, images.shape[2:]
        unit = cfg.patch_size if cfg.model != "resnet50" else 1
        whole = [max(2, math.ceil(side / unit)) * unit for side in (H, W)]
        h, w = cfg.img_size if cfg.inference == "slide" else whole
        images = F.pad(images[0], (0, max(w - W, 0), 0, max(h - H, 0)))
        rows, columns = window_starts(images.shape[1], h), window_starts(images.shape[2], w)
        corners = [(y, x) for y in rows for x in columns]
        parts = self.scores(torch.stack([images[:, y : y + h, x : x + w] for y, x in corners]))[0]
        total, count = parts.new_zeros(parts.shape[1], *images.shape[1:]), parts.new_zeros(images.shape[1:])
        for (y, x), part in zip(corners, resize(parts, (h, w)), strict=True):
            total[:, y : y + h, x : x + w] += part
            count[y : y + h, x : x + w] += 1
        return (total / count)[:, :H, :W]


def window_starts(length, side):
    """First pixels of windows that cover `length`: every two thirds of a side, the last at the border."""
    return sorted({min(start, max(length - side, 0)) for start in range(0, length, max(1, side * 2 // 3))})


def confusion(prediction, labels, classes):
    """(classes, classes) int64: how many pixels of class i (row) are predicted as j, without IGNORE."""
    counts = labels != data.IGNORE
    pairs = labels[counts].long() * classes + prediction[counts]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def seg_scores(matrix, classes):
    """Per cent: mIoU over classes in labels or predictions, mAcc over those in labels, aAcc over pixels."""
    matrix = matrix.double()
    hit, truth, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = 100 * hit / (truth + predicted - hit), 100 * hit / truth  # nan where there is nothing
    scores = {"miou": iou.nanmean(), "macc": accuracy.nanmean(), "aacc": 100 * hit.sum() / truth.sum()}
    scores |= {f"iou/{name}": x for name, x in zip(classes, iou, strict=True) if not x.isnan()}
    return {f"eval/{name}": x.item() for name, x in scores.items()}


# ---- detection ---------------------------------------------------------------------------------------------

norm = functools.partial(LayerNorm2d, eps=1e-6)  # detectron2's


def simple_pyramid(D, width):
    """ViTDet's: modules that each turn a map (B, D, h, w) into one at 4, 2, 1 or 1/2 times its grid."""
    scales = zip(four_scales(D, D // 2, D // 4, norm), (D // 4, D // 2, D, D), strict=True)
    levels = (nn.Sequential(scale, nn.Conv2d(c, width, 1, bias=False), norm(width),
                            nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width))
              for scale, c in scales)
    return nn.ModuleDict({"levels": nn.ModuleList(levels)})


class Backbone(nn.Module):
    """images -> {name: map}, finest first, and a coarser one for the proposals alone (torchvision's form)."""

    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.out_channels = make_encoder(cfg), cfg.channels
        channels, self.strides = self.encoder.channels, self.encoder.strides
        if len(channels) == 1:
            self.pyramid = simple_pyramid(channels[0], cfg.channels)
            self.strides = [self.strides[0] * s // 4 for s in (1, 2, 4, 8)]
        else:
            self.pyramid = FeaturePyramidNetwork(channels, cfg.channels)

    def forward(self, images):
        maps = self.encoder(images)
        if isinstance(self.pyramid, nn.ModuleDict):
            maps = [level(maps[0]) for level in self.pyramid["levels"]]
        else:
            maps = self.pyramid({str(i): x for i, x in enumerate(maps)}).values()
        maps = OrderedDict((str(i), x.float()) for i, x in enumerate(maps))  # RoIAlign wants one precision
        maps["pool"] = F.max_pool2d(maps["3"], 1, stride=2)
        return maps


def roi_align(side, strides):
    """torchvision's pooling of boxes from maps of these strides. Left alone, it infers them from the first
    image that it meets, and wrongly if that one was filled up."""
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], side, 2)
    pool.scales = [1 / stride for stride in strides]
    levels = [round(math.log2(stride)) for stride in (strides[0], strides[-1])]
    pool.map_levels = initLevelMapper(*levels, pool.canonical_scale, pool.canonical_level)
    return pool


def in_float32(output):
    """A tensor, or tensors in lists: in half precision torchvision would round boxes to pixels and more."""
    return output.float() if isinstance(output, torch.Tensor) else type(output)(in_float32(x) for x in output)


class Detector(nn.Module):
    """torchvision's Mask R-CNN with ViTDet's heads (proposals: --rpn_convs; boxes: four convolutions and a
    linear layer; masks: four; LayerNorm), without masks its Faster R-CNN. It resizes images to fit
    --img_size, fills them up to that square with 0."""

    def __init__(self, cfg, classes, masks=True):
        super().__init__()
        backbone, width, side = Backbone(cfg), cfg.channels, cfg.img_size[0]
        box_head = functools.partial(FastRCNNConvFCHead, (width, 7, 7), [width] * 4, [1024], norm_layer=norm)
        strides = (*backbone.strides, 2 * backbone.strides[-1])
        anchors = AnchorGenerator(tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * 5)
        self.model = MaskRCNN(
            backbone, min_size=side, max_size=side, size_divisible=side,
            _skip_resize=True,  # in training: crops have the size
            image_mean=[0.0] * cfg.in_chans, image_std=[1.0] * cfg.in_chans,  # run.normalize has done it
            rpn_anchor_generator=anchors, rpn_head=RPNHead(width, 3, cfg.rpn_convs),
            rpn_post_nms_top_n_train=1000, box_batch_size_per_image=cfg.rois,
            box_detections_per_img=cfg.max_detections,
            box_roi_pool=roi_align(7, backbone.strides), mask_roi_pool=roi_align(14, backbone.strides),
            box_head=box_head(), mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm),
            box_predictor=FastRCNNPredictor(1024, classes + 1),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1))
        self.model.transform.normalize = lambda image: image  # done: no copies of mean and deviation
        if cfg.detector == "cascade":
            from cascade import CascadeHeads  # only this one needs it

            self.model.roi_heads = CascadeHeads(self.model.roi_heads, box_head)
        heads = self.model.roi_heads
        if not masks:
            heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None
        for head in filter(None, (self.model.rpn.head, heads.box_predictor, heads.mask_predictor)):
            head.register_forward_hook(lambda *call: in_float32(call[-1]))

    @property
    def encoder(self):
        return self.model.backbone.encoder

    def forward(self, images, targets):
        """images (B, C, S, S), targets: [{"boxes" (n, 4), "labels" (n,), "masks" (n, S, S)}] -> loss, {name:
        detached}: the sum of torchvision's five (without masks, four; a cascade's stages add theirs), means
        over the batch's sampled boxes (masks: over pixels)"""
        terms = self.model(list(images), targets)
        terms = {"loss": sum(terms.values()), **terms}
        return terms["loss"], {name.removeprefix("loss_"): value.detach() for name, value in terms.items()}

    def predict(self, images):
        """(1, C, H, W) -> {"boxes" in the image's pixels, "labels" from 1, "scores", "masks" (n, 1, H, W),
        probabilities, if it learned any}"""
        return self.model(list(images))[0]


# ---- evaluation --------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, samples, truth, run):
    """Scores over all held-out images, each once over all processes; what cannot be read does not count. {}
    on all processes but the first. And segmentation's pixels (classes, classes) by label and answer. truth:
    coco_truth's, for detection."""
    source, seen, results = samples.samples.source, [], []
    matrix = torch.zeros(len(source.classes), len(source.classes), dtype=torch.int64, device=run.device)
    for batch in run.load_batches(samples, eval_keys(len(source), run, batch=1), data.collate_scenes):
        if batch["bad"]:
            continue
        output = predict(model, batch, run)
        if run.cfg.task == "seg":
            matrix += confusion(output, batch["target"][0].to(run.device), len(source.classes))
        else:
            seen.append(source.ids[batch["index"].item()])
            results += coco_results(seen[-1], output, source.categories)
    run.share_bad_files()
    found = [(results, seen)] * run.world_size
    if run.world_size > 1:
        dist.all_reduce(matrix)
        dist.all_gather_object(found, found[0])
    if not run.is_main:
        return {}, matrix
    if run.cfg.task == "seg":
        scores = seg_scores(matrix.cpu(), source.classes)
    else:
        results, seen = (sum(lists, []) for lists in zip(*found, strict=True))
        scores = average_precision(truth, results, seen, run.cfg.max_detections, source.classes)
    return {name: round(value, 3) for name, value in scores.items()}, matrix.cpu()


def predict(model, batch, run):
    """A batch of one test image -> its label map or dict of detections, in the image's pixels."""
    with run.autocast():
        output = model.predict(run.normalize(batch["image"]))
    return output if run.cfg.task == "det" else resize(output[None], batch["target"].shape[-2:])[0].argmax(0)


@torch.inference_mode()
def save_pictures(path, model, samples, run):
    """PNG: image, truth and prediction of --pictures held-out images, evenly spaced, the same every time."""
    source, rows = samples.samples.source, []
    for i in np.linspace(0, len(source), min(run.cfg.pictures, len(source)), endpoint=False, dtype=int):
        batch = data.collate_scenes([samples[0, int(i)]])
        image, truth = to_dtype(batch["image"][0], torch.uint8, scale=True), batch["target"][0]
        found = predict(model, batch, run)
        if run.cfg.task == "seg":
            truth, found = overlay.regions(truth, image), overlay.regions(found.cpu(), image)
        else:
            found = overlay.sure(found, least=len(truth["labels"]))
        row = [overlay.show(image), overlay.show(image, truth), overlay.show(image, found)]
        rows.append([x / 255 for x in (*row, overlay.legend([truth, found], source.classes))])
    caption = f"step {run.step}"
    if run.cfg.task == "det":
        caption += "; prediction: objects of a score above 0.5, and at least as many as there are"
    save_image_grid(path, rows, ["image", "truth", "prediction", "classes"], caption)


# ---- training ----------------------------------------------------------------------------------------------


def learning_rate(step, cfg, steps):
    """Of the update after `step` of `steps`: the schedule's value times the warm-up's."""
    done = step / steps
    lr = {
        "poly": cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 - done) ** cfg.power,
        "cosine": cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done)),
        "step": cfg.lr * 0.1 ** ((done >= 8 / 9) + (done >= 26 / 27)),
    }[cfg.schedule]
    begin = 1e-6 if cfg.task == "seg" else 1e-3
    return lr * (begin + (1 - begin) * step / cfg.warmup_iters if step < cfg.warmup_iters else 1.0)


def make_optimizer(model, cfg):
    """With layer-wise decay inside the encoder; the decoder learns at the full rate."""
    groups = parameter_groups(
        model, cfg.weight_decay, ("pos_embed", "cls_token", TABLE),
        lambda name: model.encoder.layer_id(name.split("encoder.", 1)[-1]),  # outside: after its last block
        cfg.layer_decay)
    sgd = cfg.optimizer == "sgd"
    return torch.optim.SGD(groups, 0.0, cfg.betas[0]) if sgd else adamw(groups, cfg.betas)


def training_batches(source, run):
    """(images, label maps or list of targets) on the device, sample numbers"""
    seg, to_device = run.cfg.task == "seg", {"device": run.device, "non_blocking": True}
    transform = data.segmentation_crop if seg else data.large_scale_jitter
    samples = data.Scenes(run.samples(source, functools.partial(transform, cfg=run.cfg)))
    for batch in run.load_batches(samples, training_keys(run), data.collate_scenes):
        if seg:
            targets = batch["target"].to(**to_device).long()
        else:
            targets = [{name: x.to(**to_device) for name, x in target.items()} for target in batch["target"]]
            targets = [target | {"masks": data.unpack(target["masks"])} if "masks" in target else target
                       for target in targets]
        yield run.normalize(batch["image"]), targets, batch["index"]


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches; returns the loss's terms, means over it, as floats."""
    optimizer.zero_grad(set_to_none=True)
    restore_statistics = remember_statistics(model)
    total = {}
    for images, targets in run.micro_batches(model, batches):
        with run.autocast():
            loss, terms = model(images, targets)
        scaler.scale(loss / run.accum_steps).backward()
        total = {name: total.get(name, 0) + term / run.accum_steps for name, term in terms.items()}
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.cfg.clip_grad or math.inf)
    terms, finite = run.agree(total, grad_norm)  # the one host synchronisation
    if finite:
        scaler.step(optimizer)
    else:
        restore_statistics()
    scaler.update()
    return terms


def open_scenes(cfg, split):
    """The images and targets of --data for --task; split: "train" or "val"."""
    if cfg.data == "shapes":
        return DrawnScenes(cfg, split)
    root, layout = data_path(cfg.data), "ADE20K" if cfg.task == "seg" else "COCO"
    if root is None or not root.is_dir():
        raise UserError(f"--data {cfg.data} is no folder: expected one laid out as {layout}, or shapes")
    return (data.LabelMaps if cfg.task == "seg" else CocoScenes)(root, split, cfg)


def open_both(cfg):
    """{"train": images, "val": held-out ones}; UserError if their classes differ."""
    if cfg.predict:
        raise UserError("--check_data reads what is trained and evaluated on: leave out --predict")
    source, held_out = open_scenes(cfg, "train"), open_scenes(cfg, "val")
    if held_out.classes != source.classes:
        raise UserError(f"--data {cfg.data}: the categories of the two annotation files differ")
    return {"train": source, "val": held_out}


def report(scores, held_out, run):
    """Print and log scores."""
    means = ", ".join(f"{k[5:]} {v:.2f}" for k, v in scores.items() if k.count("/") == 1)
    when = f"step {run.step}" if run.n else run.cfg.weights
    print0(f"{when}, {len(held_out)} held-out images: {means}")
    run.log({"step": run.step, "epoch": run.epoch if run.n else 0, **scores})


def about(cfg, source):
    """What a file of weights says of itself, besides the network; of classes also how the data write them."""
    own = {"codes": source.codes} if cfg.task == "seg" else {"categories": list(source.categories),
                                                             "masks": source.masks}
    known = {name: getattr(cfg, name) for name in MODEL if hasattr(cfg, name)}
    return known | {"classes": list(source.classes)} | own


def make_model(cfg, classes, masks):
    """masks: of detection, whether it learns or has learned any."""
    return Segmenter(cfg, classes) if cfg.task == "seg" else Detector(cfg, classes, masks)


def train(cfg, run, script=sys.modules[__name__]):
    """script: whose make_model and training_batches"""
    if cfg.predict or cfg.mode == "evaluate":
        import predict_scenes  # only these two need it

        job = predict_scenes.predict_scenes if cfg.predict else predict_scenes.evaluate_file
        return job(cfg, run, sys.modules[__name__], script.make_model)
    source, held_out = open_both(cfg).values()
    classes = source.classes
    truth = coco_truth(held_out) if cfg.task == "det" and run.is_main else None
    run.fit_batch(source, least=4)
    steps = cfg.iters or int(cfg.epochs * len(source) // cfg.batch_size)
    if cfg.warmup_iters > steps // 2 and "warmup_iters" not in cfg.given:
        cfg.warmup_iters = steps // 10
        print0(f"{steps} updates: a warm-up of {cfg.warmup_iters}; --warmup_iters sets it")
    processes = run.world_size if run.gpu else 1  # whose images SyncBatchNorm averages over
    images = split_batch(cfg.batch_size, cfg.micro_batch, run.world_size)[0] * processes
    if cfg.task == "seg" and cfg.head == "uper" and images < 2:
        raise UserError("BatchNorm after UperNet's pooling to one pixel needs two images per forward pass: "
                        "raise --batch_size or --micro_batch")
    torch.manual_seed(cfg.seed)
    model = script.make_model(cfg, len(classes), cfg.task == "det" and source.masks)
    if cfg.weights != "none":
        content = read_file(cfg.weights)
        prefix = {"seg": "encoder.", "det": "model.backbone.encoder."}.get(network_of(content).get("task"))
        others = ("head.", "fc_norm.", "fc.", "decoder", "mask_token", *PRETRAINING)
        load_weights(model.encoder, cfg.weights, ("norms.",), (*others, *model.encoder.unused_names), prefix,
                     content)
    run.start(len(source), f"lr {cfg.lr:.3g}", steps, cfg.warmup_iters)
    if cfg.task == "det" and held_out.most > cfg.max_detections:
        print0(f"an image to evaluate has {held_out.most} objects, more than --max_detections "
               f"{cfg.max_detections}")
    if run.gpu and run.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.backends.cudnn.benchmark = False  # it would try kernels for every size of a held-out image
    ddp = run.prepare(model)
    optimizer = make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    checksum = zlib.crc32(repr(classes).encode())
    run.inputs = {"list of classes": f"{len(classes)} names, checksum {checksum:08x}"}
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    batches, samples = script.training_batches(source, run), data.Scenes(run.samples(held_out, data.Fit(cfg)))
    meta = about(cfg, source)

    evaluated = run.evaluations().keys()

    def evaluation_due():
        return run.step % cfg.eval_every == 0 or run.step == run.steps

    def evaluate_if_due():
        """After the checkpoint, which a kill leaves whole. The line of the log comes last: it says "done"."""
        if not evaluation_due() or run.step in {0, *evaluated}:
            return
        model.eval()
        run.share_statistics(model)
        scores, _ = evaluate(model, samples, truth, run)
        if run.is_main:
            if cfg.pictures:
                save_pictures(run.out / f"pictures/step_{run.step:07}.png", model, samples, run)
            report(scores, held_out, run)
        model.train()

    model.train()
    evaluate_if_due()  # a run that was killed inside its evaluation
    while run.step < run.steps and not run.stopping:
        lr = learning_rate(run.step, cfg, run.steps)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        seconds = time.monotonic() - run.last_save
        if evaluation_due() or run.stopping or seconds > 60 * cfg.save_minutes:
            run.save(**meta)
        evaluate_if_due()
    if run.step == run.steps:
        run.export("model.pth", model.state_dict(), run.meta(**meta))
    folder = getattr(held_out, "images", None) or getattr(held_out, "folder", None)  # not of drawn ones
    predict = {"predict": folder, "weights": f"{run.out}/model.pth", "out": f"{run.out}_predictions"}
    steps = [run.command(f"{run.method}.py", **predict)] if folder else []
    run.finish("model.pth, last.pth, log.jsonl, pictures/, curves.png", steps)


if __name__ == "__main__":
    launch(Config, presets, train, "transfer_seg_det", open_both)
