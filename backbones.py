"""The pre-trained networks as those need them who use them: with a classifier, or as encoders with maps.

finetune.py takes `make_classifier`, transfer_seg_det.py and transfer_mask2former.py take `make_encoder`; both
choose by cfg.model, one of MODELS. Weights are loaded by name, and names are those of the pre-trained file.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from beit import BEIT_SIZES, RelPosViT
from common import VIT_SIZES, Attention, ResNet50, ViT, drop_path, patch_grid, resize_pos_embed
from revcol_v2 import SIZES, RevColV2
from swin import SWIN_SIZES, Swin

MODELS = (*VIT_SIZES, *BEIT_SIZES, *SWIN_SIZES, "resnet50", *(f"revcol_{size}" for size in SIZES))


def family(model):
    kinds = {"resnet50": "ResNet", "revcol": "RevColV2", "swin": "Swin"}
    return kinds.get(model.split("_")[0], "ViT")


# ---- classifiers -------------------------------------------------------------------------------------------
# Each has: features(images (B, C, H, W)) -> one vector per image (B, D); forward(images) -> scores
# (B, classes), `head` of that; layer_id(name) for layer-wise decay; unused_names: first parts of names of
# weights that it has no use for.


def make_head(features, num_classes, cfg):
    """The classifier; for a frozen network after BatchNorm without affine parameters (MAE's protocol)."""
    if cfg.mode in ("knn", "layers", "features"):
        return nn.Identity()
    linear = nn.Linear(features, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.02 * cfg.head_init)
    nn.init.zeros_(linear.bias)
    if cfg.mode == "finetune":
        return linear
    return nn.Sequential(nn.BatchNorm1d(features, affine=False, eps=1e-6), linear)


def classify(model, images):
    """(B, C, H, W) -> scores (B, classes)"""
    return model.head(model.features(images))


class Classifier(ViT):
    """ViT with a linear head on one vector per image."""

    unused_names = ()

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path)
        self.pool = cfg.pool
        self.init_weights()
        self.head = make_head(self.embed_dim, num_classes, cfg)
        self.fc_norm = nn.Identity()
        if cfg.pool == "avg" and cfg.mode == "finetune":
            self.norm_the_mean()

    def norm_the_mean(self):
        """Read out by the LayerNorm of the mean, as MAE fine-tunes, not the mean of normalised tokens."""
        self.pool, self.unused_names = "avg", ("norm.",)
        self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(self.embed_dim, eps=1e-6)

    def features(self, images):
        """(B, C, H, W) -> (B, D): whole images, no masking, deterministic in eval mode."""
        x = super().forward(images)
        return self.fc_norm(x[:, 1:].mean(1) if self.pool == "avg" else x[:, 0])

    forward = classify


class BeitClassifier(Classifier, RelPosViT):
    """The same for a ViT with relative positions."""


class RevColClassifier(RevColV2):
    """The same for RevColV2: on the last column after a fresh LayerNorm, or the last bottom-up one."""

    def __init__(self, cfg, num_classes):
        finetune, memory = cfg.mode == "finetune", "column" if cfg.recompute else "plain"
        super().__init__(cfg.model.removeprefix("revcol_"), cfg.img_size, cfg.patch_size, cfg.in_chans,
                         cfg.drop_path, cfg.columns, memory, "top" if finetune else "bottom_up")
        self.fc_norm = nn.LayerNorm(self.embed_dim, eps=1e-6) if finetune else nn.Identity()
        self.head = make_head(self.embed_dim, num_classes, cfg)

    def features(self, images):
        """(B, C, H, W) -> (B, D)"""
        return self.fc_norm(super().features(images))

    forward = classify


class SwinClassifier(Swin):
    """The same for Swin, under torchvision's names: `head` on the mean of the last map."""

    unused_names = ()

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.model, cfg.patch_size, cfg.swin_window, cfg.in_chans, cfg.drop_path)
        self.head = make_head(self.embed_dim, num_classes, cfg)

    def features(self, images):
        """(B, C, H, W) -> (B, D)"""
        return self.last_map(images).mean((1, 2))

    forward = classify


class ResNetClassifier(ResNet50):
    """The same for ResNet-50, under torchvision's names: `fc` on the mean of the last map."""

    unused_names, layer_id = (), None  # no layer-wise decay

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.resnet_width, cfg.in_chans)
        self.fc = make_head(self.embed_dim, num_classes, cfg)
        self.to(memory_format=torch.channels_last)
        ends = [module for name, module in self.named_modules() if name.endswith("bn3")]  # of the branches
        for i, norm in enumerate(ends):
            rate = cfg.drop_path * i / (len(ends) - 1)
            norm.register_forward_hook(lambda norm, _, x, rate=rate: drop_path(x, rate, norm.training))

    @property
    def head(self):
        return self.fc

    def features(self, images):
        """(B, C, H, W) -> (B, D)"""
        return super().forward(images).mean((2, 3))

    forward = classify


def make_classifier(cfg, num_classes):
    classifiers = {"ViT": Classifier, "ResNet": ResNetClassifier, "RevColV2": RevColClassifier,
                   "Swin": SwinClassifier}
    classifier = BeitClassifier if cfg.model in BEIT_SIZES else classifiers[family(cfg.model)]
    return classifier(cfg, num_classes)


# ---- encoders ----------------------------------------------------------------------------------------------
# Each has: forward(images (B, C, H, W)) -> its maps, finest first; channels and strides, one per map;
# layer_id and unused_names as above.


class ViTEncoder(ViT):
    """A ViT for images of any size that its patches tile. UperNet takes four of its maps, not normalised."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path)
        det, self.recompute, self.unused_names = cfg.task == "det", cfg.recompute, []
        quarters = [self.depth * i // 4 for i in (1, 2, 3, 4)]  # numbers of blocks, from 1
        uper = [round(self.depth * share) for share in (1 / 3, 1 / 2, 2 / 3, 1)]  # BEiT's, MAE's
        self.taps = uper if cfg.head != "linear" and not det else [self.depth]
        self.channels, self.strides = [self.embed_dim] * len(self.taps), [self.patch_size] * len(self.taps)
        for number, block in enumerate(self.blocks, start=1):
            if det and cfg.window and number not in quarters:
                block.attn = WindowAttention(self.embed_dim, block.attn.num_heads, self.grid, cfg.window)
        self.init_weights()
        self.requires_grad_()  # positions, too
        if cfg.head != "linear":
            self.norm, self.unused_names = nn.Identity(), ["norm."]
        if det:
            self.cls_token, self.unused_names = None, ["norm.", "cls_token"]

    def tokens(self, images, grid):
        pos_embed = self.pos_embed if grid == self.grid else resize_pos_embed(self.pos_embed, self.grid, grid)
        x = self.patch_embed(images) + pos_embed[:, 1:]
        if self.cls_token is None:
            return x
        return torch.cat([(self.cls_token + pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def biases(self, grid):
        return [None] * self.depth

    def forward(self, images):
        h, w = grid = patch_grid(images.shape[2:], self.patch_size)
        x, maps, again = self.tokens(images, grid), [], self.recompute and self.training
        for number, (block, bias) in enumerate(zip(self.blocks, self.biases(grid), strict=True), start=1):
            x = checkpoint(block, x, bias, use_reentrant=False) if again else block(x, bias)
            if number in self.taps:
                maps.append(self.norm(x)[:, -h * w :].transpose(1, 2).unflatten(2, grid))  # (B, D, h, w)
        return maps


class WindowAttention(Attention):
    """Attention inside windows of side x side patches of a grid, without class token."""

    def __init__(self, dim, num_heads, grid, side):
        super().__init__(dim, num_heads)
        self.grid, self.side = grid, side

    def forward(self, x, bias=None):  # (B, h*w, D); bias of a window: see attend
        (h, w), side, D = self.grid, self.side, x.shape[-1]
        x = F.pad(x.unflatten(1, (h, w)), (0, 0, 0, -w % side, 0, -h % side))  # zeros on the right and below
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # B, rows, columns, s, s, D
        x = super().forward(x.reshape(-1, side * side, D), bias).view(x.shape)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1, 2)


class BeitEncoder(ViTEncoder, RelPosViT):
    """The same with relative positions; a window has those of an image of its size."""

    def tokens(self, images, grid):
        x = self.patch_embed(images)
        return x if self.cls_token is None else self.prepend_cls(x)

    def biases(self, grid):
        first = 1 if self.cls_token is None else 0
        grids = [(block.attn.side,) * 2 if hasattr(block.attn, "side") else grid for block in self.blocks]
        tables = {grid: self.rel_pos_bias(grid)[:, first:, first:] for grid in dict.fromkeys(grids)}
        return [tables[grid] for grid in grids]


class ResNetEncoder(ResNet50):
    """The ends of the four stages. FCN: the last two stay on the second one's grid, with dilations 2 and 4
    (the first block of each: 1 and 2, mmsegmentation's "contracted" dilation)."""

    unused_names = ()

    def __init__(self, cfg):
        super().__init__(cfg.resnet_width, cfg.in_chans)
        self.channels, self.strides = [4 * cfg.resnet_width * 2**i for i in range(4)], [4, 8, 16, 32]
        if cfg.head == "fcn":
            self.strides[2:] = [8, 8]
            for stage, dilation in ((self.layer3, 2), (self.layer4, 4)):
                stage[0].downsample[0].stride = (1, 1)
                for i, block in enumerate(stage):
                    d = dilation if i else dilation // 2
                    block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (d, d), (d, d)
        self.to(memory_format=torch.channels_last)

    def layer_id(self, name):
        return 0

    def forward(self, images):
        x, maps = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class SwinEncoder(Swin):
    """The ends of the four stages, each after a LayerNorm of its own, as Swin's authors have it."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.patch_size, cfg.swin_window, cfg.in_chans, cfg.drop_path)
        self.channels = [self.embed_dim // 8 * 2**i for i in range(4)]
        self.strides = [cfg.patch_size * 2**i for i in range(4)]
        self.norm, self.unused_names = nn.Identity(), ["norm."]
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)

    def forward(self, images):
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, self.maps(images), strict=True)]


class RevColEncoder(RevColV2):
    """The four maps of RevColV2's last column, the top one pooled once more."""

    def __init__(self, cfg):
        size, memory = cfg.model.removeprefix("revcol_"), "column" if cfg.recompute else "plain"
        super().__init__(size, cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path, cfg.columns, memory)
        self.strides = [self.patch_size * s // 4 for s in (1, 2, 4, 8)]

    def forward(self, images):
        return self.maps(images)


def make_encoder(cfg):
    encoders = {"resnet50": ResNetEncoder, "revcol": RevColEncoder, "beit": BeitEncoder, "swin": SwinEncoder}
    return encoders.get(cfg.model.split("_")[0], ViTEncoder)(cfg)
