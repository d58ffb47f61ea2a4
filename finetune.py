"""Fine-tuning, linear probing, kNN and features of a pre-trained Vision Transformer, ResNet-50 or RevColV2.

finetune  the whole network, AdamW, layer-wise learning-rate decay, drop path, mixup / cutmix, RandAugment, random erasing,
          label smoothing, moving average. `--recipe` takes a paper's settings (RECIPES, docs/RECIPES.md; default: mff, table 3
          of the MFF appendix); flags beside it win. Head on the mean of the last block's patch tokens after a fresh LayerNorm
          (`--pool avg`, as MAE), or on the normalised class token (`--pool cls`).
linear    frozen network, BatchNorm without affine parameters + linear layer, LARS: MAE's protocol (MFF appendix, table 2). The
          network sees micro-batches, the head the whole batch at once, so memory and number of processes do not change the
          result. `--augment none` computes all features once, which makes the probe a matter of seconds.
knn       frozen network, vote of the k nearest training features (cosine, weights exp(similarity / temperature)).
features  what the two above see of each image, never masked: `--out feats.npy` (N, D) float32, and feats.txt, the names.

`--weights` takes encoder.pth or last.pth of any script here, official MAE files, timm's ViTs, torchvision's ResNet-50
(docs/WEIGHTS.md), `none` (the baseline to compare with). Model, size and normalisation come from the file where it says or
shows them. Number of classes: from the data, which needs train/ and val/ (or an .npz with `split`, or shapes, cifar10,
cifar100, stl10, cars). A ResNet is read out by the mean over its last map, without layer-wise decay (CIM table 15). A RevColV2
is fine-tuned on the mean of the top level of its last top-down column, without the units that this does not depend on (so such
a file serves no dense task), and probed on that of its last bottom-up column (RevColV2's supplement, 2.2).

Not in the papers (our choice): random erasing draws one box per image without retries; mixup and cutmix pair each image with
its neighbour in the batch; RandAugment's posterize keeps at least one bit, and the flip comes after it; the targets of
`--loss bce` are the mixed, smoothed labels, without a threshold; with `--repeats` the copies of an image share an update, and
all images come before one returns (elsewhere a pass sees 1/repeats of them).

    python finetune.py --demo --mode linear --weights runs/mae_mff/encoder.pth
    python finetune.py --recipe cim_resnet_300 --print_recipe
    torchrun --nproc_per_node 4 finetune.py --weights encoder.pth
    torchrun --nproc_per_node 4 finetune.py --weights encoder.pth --mode linear
    python finetune.py --weights encoder.pth --mode knn
    python finetune.py --weights encoder.pth --mode features --data PHOTOS --out feats.npy
"""

import copy
import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from common import (
    BESIDE_TRUNK,
    NETWORK,
    PARTS,
    EvalCrop,
    KeyedBatches,
    Normalise,
    RandomResizedCrop,
    Refused,
    ResNet50,
    RunConfig,
    Views,
    ViT,
    VitSize,
    adamw,
    autocast,
    batch_statistics,
    check_data,
    finish_update,
    gradient_sync,
    launch,
    load_weights,
    make_loader,
    make_plan,
    network_of,
    new_file,
    normalisation,
    open_data,
    opt,
    parameter_groups,
    patch_grid,
    read_file,
    remember_statistics,
    say,
    set_lr,
    warmup_cosine,
    weights_of,
    write_atomically,
)
from revcol_v2 import SIZES, RevColV2, cell_grid


@dataclass
class Config(RunConfig):
    # model
    mode: Literal["finetune", "linear", "knn", "features"] | None = opt(None, "default: the recipe's, else finetune")
    recipe: str | None = opt(None, "a paper's settings, by name: docs/RECIPES.md; flags beside it win")
    print_recipe: bool = opt(False, "print all settings with their sources, and end")
    weights: str | None = opt(None, "file of weights, or none for random ones")
    model: Literal[*get_args(VitSize), "resnet50", *(f"revcol_{size}" for size in SIZES)] = opt(
        "base", "ViT, resnet50 or RevColV2; default: what the file says")
    patch_size: int = opt(16, "pixels; likewise")
    resnet_width: int = opt(64, "ResNet: channels of its stem; likewise")
    columns: int = opt(2, "RevColV2: bottom-up, and as many top-down, columns; likewise")
    recompute: bool = opt(False, "RevColV2: compute a column's inside again in the backward pass: less memory, more time")
    pool: Literal["avg", "cls"] | None = opt(None, "patch mean or class token; default avg to fine-tune, cls to probe a ViT")
    drop_path: float = opt(0.1, "stochastic depth of the last block (fine-tuning)")
    head_init: float = opt(0.001, "the head's initial weights: this times N(0, .02)")
    # optimisation; here and below: the defaults of the recipe mff
    epochs: float = opt(100.0, "passes over the data")
    batch_size: int = opt(1024, "images per update, over all processes")
    micro_batch: int | None = opt(None, "images per forward pass of one process; default: the largest that divides, up to 256")
    base_lr: float | None = opt(None, "learning rate per 256 images; default: the recipe's, mff 1e-3")
    lr: float | None = opt(None, "learning rate whatever the batch, in place of --base_lr")
    loss: Literal["ce", "bce"] = opt("ce", "cross-entropy, or binary cross-entropy (mean over batch and classes)")
    min_lr: float = opt(1e-6, "where the cosine ends")
    warmup_epochs: float = opt(5.0, "linear warm-up")
    weight_decay: float = opt(0.05, "AdamW, LARS")
    betas: tuple[float, float] = opt((0.9, 0.999), "AdamW")
    layer_decay: float = opt(0.75, "learning rate of a block = that of the next one times this")
    clip_grad: float = opt(0.0, "largest gradient norm; 0 = no clipping")
    ema: float = opt(0.0, "weight of the old value in the moving average that is evaluated; 0 = none")
    # augmentation
    augment: Literal["none", "crop", "full"] = opt("full", "centre crop; random resized crop, flip; and RandAugment")
    randaug: float = opt(9.0, "RandAugment: mean of the magnitude, of 10; its deviation is 0.5")
    repeats: int = opt(1, "repeated augmentation: crops of the same image in an update")
    mixup: float = opt(0.8, "Beta parameter; 0 = off")
    cutmix: float = opt(1.0, "Beta parameter; 0 = off")
    smoothing: float = opt(0.1, "label smoothing")
    erasing: float = opt(0.25, "probability of random erasing")
    # evaluation
    test_size: tuple[int, int] | None = opt(None, "pixels at evaluation; default --img_size")
    test_crop: float | None = opt(None, "side of the centre crop / side resized to; default 0.875 from 128 to 224 px, else 1")
    k: int = opt(20, "neighbours (kNN)")
    temperature: float = opt(0.07, "of the vote (kNN)")
    eval_every: int = opt(1, "epochs between evaluations")

    def __post_init__(self):
        super().__post_init__()
        self.mode = self.mode or "finetune"
        if self.recipe and family(meant := recipe_of(self.recipe).get("model", (self.model, ""))[0]) != family(self.model):
            raise ValueError(f"--recipe {self.recipe} is for a {family(meant)}, not for {self.model}")
        if self.weights is None and not self.check_data and not self.print_recipe:
            raise ValueError("--weights FILE is needed; --weights none is the baseline with random weights")
        resnet, revcol = family(self.model) == "ResNet", family(self.model) == "RevColV2"
        if not resnet:
            (cell_grid if revcol else patch_grid)(self.img_size, self.patch_size)  # ValueError unless they fit
        no_cls = resnet or revcol
        self.pool = self.pool or ("avg" if self.mode == "finetune" or no_cls else "cls")
        if no_cls and self.pool == "cls":
            raise ValueError(f"--pool cls: {self.model} has no class token")
        if resnet and self.layer_decay != 1:
            raise ValueError("--layer_decay is for ViTs and RevColV2")
        H, W = self.eval_size
        if not no_cls and self.eval_size != self.img_size or min(H, W) <= 0:
            raise ValueError(f"--test_size {H},{W}: expected --img_size {self.img_size[0]},{self.img_size[1]}, for which a ViT "
                             "has positions; for a ResNet or RevColV2 any other above 0")
        if revcol:
            cell_grid(self.eval_size, self.patch_size)
        if self.test_crop is not None and not 0 < self.test_crop <= 1:
            raise ValueError(f"--test_crop {self.test_crop}, expected more than 0, at most 1")
        if self.mode == "linear" and self.augment == "none" and (self.mixup or self.cutmix or self.erasing):
            raise ValueError("--mixup, --cutmix and --erasing work on images: --augment none keeps only features")
        if self.repeats > 1 and self.batch_size < 2 * self.repeats:
            raise ValueError(f"--repeats {self.repeats}: expected a --batch_size of at least {2 * self.repeats}, two images")
        if not 0 <= self.randaug <= 10:
            raise ValueError(f"--randaug {self.randaug}, expected 0 to 10")
        if self.base_lr is not None and self.lr is not None:
            raise ValueError(f"--base_lr {self.base_lr} and --lr {self.lr}: give one of them")
        if self.base_lr is None and self.lr is None:
            self.base_lr = 1e-3
        if self.recompute and not revcol:
            raise ValueError(f"--recompute is for RevColV2, not {self.model}")
        if self.mode != "finetune" and (self.ema or self.loss != "ce" or self.repeats > 1):
            raise ValueError("--ema, --loss bce and --repeats are for --mode finetune")
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}, expected more than 0")
        if self.resume and self.mode in ("knn", "features"):
            raise ValueError(f"--mode {self.mode} has nothing to resume")
        if self.print_recipe and not self.recipe:
            raise ValueError(f"--mode {self.mode} has no recipe")

    @property
    def eval_size(self):
        return self.test_size or self.img_size

    @property
    def peak_lr(self):
        return self.lr if self.base_lr is None else self.base_lr * self.batch_size / 256


PLAIN = {"augment": "crop", "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "erasing": 0.0, "drop_path": 0.0}
# What the papers' tables take for granted: MAE's and BEiT's code agree on it. head_init: MAE's N(0, 2e-5), BEiT's .02 x .001.
CODE = {"pool": "avg", "loss": "ce", "betas": (0.9, 0.999), "min_lr": 1e-6, "clip_grad": 0.0, "ema": 0.0, "head_init": 0.001,
        "augment": "full", "repeats": 1, "erasing": 0.25, "test_size": None, "test_crop": None}
MIXES = {"randaug": 9.0, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1}
BEIT = CODE | MIXES
TABLE = MIXES | {"epochs": 100.0, "batch_size": 1024, "warmup_epochs": 5.0, "weight_decay": 0.05, "betas": (0.9, 0.999)}
MFF = TABLE | {"base_lr": 1e-3, "layer_decay": 0.75}
DDAE = {"epochs": 100.0, "batch_size": 1024, "warmup_epochs": 5.0, "weight_decay": 0.05}
CIM_VIT = TABLE | {"layer_decay": 0.8, "clip_grad": 0.0, "loss": "ce", "img_size": (224, 224), "test_crop": 0.95}
CIM_RESNET = {"model": "resnet50", "batch_size": 2048, "lr": 12e-3, "warmup_epochs": 5.0, "layer_decay": 1.0, "loss": "bce",
              "cutmix": 1.0, "img_size": (224, 224), "test_size": (224, 224), "test_crop": 0.95}
REVCOL = TABLE | {"model": "revcol_base", "head_init": 0.001}
RECIPES = {  # name: {source: values}, the later ones win; docs/RECIPES.md shows them side by side
    "mff": {"MAE's code": CODE, "MFF appendix, table 3": MFF},
    "mae": {"MAE's code": CODE | TABLE | {"base_lr": 5e-4, "layer_decay": 0.65}},
    "mae_l": {"MAE's code": CODE | MFF | {"model": "large", "epochs": 50.0, "drop_path": 0.2}},
    "ddae_s": {"BEiT's code": BEIT, "DDAE, appendix A": DDAE | {"model": "small", "lr": 1.6e-2, "layer_decay": 0.75}},
    "ddae_b": {"BEiT's code": BEIT, "DDAE, appendix A": DDAE | {"model": "base", "lr": 8e-3, "layer_decay": 0.65}},
    "cim_vit_s": {"BEiT's code": CODE, "CIM, table 14": CIM_VIT | {"model": "small", "lr": 3e-3, "epochs": 200.0}},
    "cim_vit_b_respix": {"BEiT's code": CODE, "CIM, table 14": CIM_VIT | {"model": "base", "lr": 3e-3}},
    "cim_vit_b_revdet": {"BEiT's code": CODE, "CIM, table 14": CIM_VIT | {"model": "base", "lr": 5e-3}},
    "cim_resnet_100": {"BEiT's code": CODE, "RSB": {"erasing": 0.0}, "CIM, table 15": CIM_RESNET | {
        "epochs": 100.0, "img_size": (160, 160), "weight_decay": 0.02, "repeats": 1, "randaug": 6.0, "mixup": 0.1,
        "smoothing": 0.1, "drop_path": 0.0}},
    "cim_resnet_300": {"BEiT's code": CODE, "RSB": {"erasing": 0.0, "repeats": 3}, "CIM, table 15": CIM_RESNET | {
        "epochs": 300.0, "weight_decay": 0.02, "randaug": 7.0, "mixup": 0.1, "smoothing": 0.0, "drop_path": 0.0}},
    "cim_resnet_600": {"BEiT's code": CODE, "RSB": {"erasing": 0.0, "repeats": 3}, "CIM, table 15": CIM_RESNET | {
        "epochs": 600.0, "weight_decay": 0.01, "randaug": 7.0, "mixup": 0.2, "smoothing": 0.1, "drop_path": 0.05}},
    "ve": {"BEiT's code": BEIT, "VE, supplement 0.1": {
        "model": "base", "epochs": 100.0, "warmup_epochs": 20.0, "weight_decay": 0.05, "betas": (0.9, 0.999),
        "drop_path": 0.1, "layer_decay": 0.9},
        "VE, supplement 0.1, read as 160 in all, 1.25e-3 per 512": {"batch_size": 160, "base_lr": 1.25e-3 / 2}},
    "revcol_in22k": {"MAE's code": CODE, "RevColV2 supplement, table 2": REVCOL | {
        "epochs": 90.0, "batch_size": 4096, "base_lr": 2.5e-4, "layer_decay": 0.8, "ema": 0.0}},
    "revcol_in1k_b": {"MAE's code": CODE, "RevColV2 supplement, table 3": REVCOL | {
        "base_lr": 5e-4, "layer_decay": 0.75, "ema": 0.9999}},
    "revcol_in1k_after22k": {"MAE's code": CODE, "RevColV2 supplement, table 4": REVCOL | {
        "epochs": 30.0, "batch_size": 512, "base_lr": 2.5e-5, "warmup_epochs": 0.0, "weight_decay": 0.01, "layer_decay": 0.9,
        "mixup": 0.0, "cutmix": 0.0, "ema": 0.9999}},
    "revcol_scratch": {"MAE's code": CODE, "MAE, table 11": MIXES | {
        "model": "revcol_base", "epochs": 300.0, "batch_size": 4096, "base_lr": 1e-4, "warmup_epochs": 20.0,
        "weight_decay": 0.3, "betas": (0.9, 0.95), "layer_decay": 1.0},
        "RevColV2 supplement, 2.1": {"weights": "none", "ema": 0.999}},
    "cifar_transfer": {"our choice": CODE | MFF | {"batch_size": 256, "img_size": (224, 224)}},  # MFF A.6 has no numbers
    "linear_mae": {"MAE's code": PLAIN | {"min_lr": 0.0, "head_init": 0.5, "test_size": None, "test_crop": None},
                   "MFF appendix, table 2": {"mode": "linear", "epochs": 90.0, "batch_size": 16384, "base_lr": 0.1,
                                             "warmup_epochs": 10.0, "weight_decay": 0.0, "augment": "crop"}},
    "demo": {"our choice": CODE | MFF | PLAIN | {"epochs": 2.0, "batch_size": 128, "base_lr": 2e-3, "warmup_epochs": 0.5}},
}
RECIPES["demo_linear"] = RECIPES["linear_mae"] | {"our choice": {
    "pool": "avg", "epochs": 30.0, "batch_size": 512, "augment": "none", "warmup_epochs": 3.0, "base_lr": 4.0}}


def large(name, source, **values):
    """The recipe for RevColV2-L, for which that table has these other values."""
    return RECIPES[name] | {source: RECIPES[name][source] | {"model": "revcol_large"} | values}


RECIPES |= {
    "revcol_in22k_l": large("revcol_in22k", "RevColV2 supplement, table 2", drop_path=0.2),
    "revcol_in1k_l": large("revcol_in1k_b", "RevColV2 supplement, table 3", epochs=50.0),
    "revcol_in1k_after22k_l": large("revcol_in1k_after22k", "RevColV2 supplement, table 4", drop_path=0.2),
    "revcol_scratch_l": large("revcol_scratch", "MAE, table 11", epochs=200.0, drop_path=0.2),
}
USUAL, DEMO = {"finetune": "mff", "linear": "linear_mae"}, {"finetune": "demo", "linear": "demo_linear"}


def recipe_of(name):
    """{field: (value, where it is from)}"""
    return {field: (value, source) for source, values in RECIPES[name].items() for field, value in values.items()}


def family(model):
    return "ResNet" if model == "resnet50" else "RevColV2" if model.startswith("revcol") else "ViT"


def presets(flags):
    """Defaults by --recipe, --mode and --demo, then by what the file of weights says."""
    if flags.recipe not in (None, *RECIPES):
        raise Refused(f"--recipe {flags.recipe} is none of: {', '.join(RECIPES)}")
    name = flags.recipe or (DEMO if flags.demo else USUAL).get(flags.mode or "finetune")
    recipe = {field: value for field, (value, _) in recipe_of(name).items()} if name else PLAIN
    mode = recipe.get("mode", "finetune") if name else flags.mode
    if flags.mode not in (None, mode):
        raise Refused(f"--recipe {name} is for --mode {mode}")
    values = {"recipe": name, "mode": mode} | recipe
    if flags.lr is not None or flags.base_lr is not None:
        values |= {"lr": None, "base_lr": None}
    if flags.demo:
        if {"model", "img_size"} & recipe.keys():
            raise Refused(f"--demo and --recipe {name} both set model or size: for a small trial give --data shapes, --model, "
                          "--patch_size, --img_size, --test_size, --epochs, --warmup_epochs and --batch_size beside the recipe")
        values |= {"data": "shapes", "img_size": (32, 32), "model": "nano", "patch_size": 4}
        values |= {"pool": "avg"} if mode in ("knn", "features") else {}
    if flags.weights not in (None, "none"):
        said = network_of(read_file(flags.weights))
        values |= {k: said[k] for k in (*NETWORK, "img_size") if k in said and not (k == "img_size" and k in recipe)}
    if "resnet50" in (flags.model, values.get("model")) and "model" not in recipe:
        values |= {"layer_decay": 1.0, "drop_path": 0.0}
    return values


def print_recipe(cfg):
    """All settings of the recipe, one per line, with the table each is from."""
    say(f"recipe {cfg.recipe}: {cfg.mode}")
    recipe = recipe_of(cfg.recipe)
    for field, now in vars(cfg).items():
        value, source = recipe.get(field, (None, None))
        if source:
            own = "" if now == value else f"a flag, the file or the network's kind; {value} in "
            say(f"  {field:14} {'-' if now is None else now!s:16} {own}{source}")
        elif field in ("lr", "base_lr", "model", "img_size", "patch_size") and now is not None:
            say(f"  {field:14} {now!s:16} " + ("a flag" if field.endswith("lr") else "a flag, the file or the default"))


# ---- model -----------------------------------------------------------------------------------------------------------


def make_head(features, num_classes, cfg):
    """The classifier; of a frozen network with BatchNorm without affine parameters in front of it (MAE's protocol)."""
    linear = nn.Linear(features, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.02 * cfg.head_init)
    nn.init.zeros_(linear.bias)
    return linear if cfg.mode == "finetune" else nn.Sequential(nn.BatchNorm1d(features, affine=False, eps=1e-6), linear)


class Classifier(ViT):
    """ViT with a linear head on one vector per image. `probe`: frozen, with the final LayerNorm it was trained with and
    BatchNorm in front of the head (MAE's protocol); else everything learns."""

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path)
        self.pool, self.probe = cfg.pool, cfg.mode != "finetune"
        self.init_weights()
        self.requires_grad_(not self.probe)
        self.head = make_head(self.embed_dim, num_classes, cfg)
        self.beside = []  # names in a file of weights that it has no use for
        self.fc_norm = nn.Identity()
        if self.pool == "avg" and not self.probe:
            self.norm_the_mean()

    def norm_the_mean(self):
        """Read out by LayerNorm of the mean, as MAE fine-tunes, in place of the mean of normalised tokens."""
        self.pool, self.beside = "avg", ["norm."]
        self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(self.embed_dim, eps=1e-6).requires_grad_(not self.probe)

    def features(self, images):
        """(B, C, H, W) -> (B, D): whole images, no masking, deterministic in eval mode."""
        x = super().forward(images)
        return self.fc_norm(x[:, 1:].mean(1) if self.pool == "avg" else x[:, 0])

    def layer(self, name):
        return layer_id(name, self.depth)

    def forward(self, images):
        return self.head(self.features(images))


class RevColClassifier(RevColV2):
    """RevColV2 with a linear head: to be fine-tuned, on the mean of the last column's top level after a LayerNorm; `probe`: on
    that of the last bottom-up column, frozen, with BatchNorm in front of the head."""

    def __init__(self, cfg, num_classes):
        probe = cfg.mode != "finetune"
        super().__init__(cfg.model.removeprefix("revcol_"), cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path,
                         cfg.columns, "column" if cfg.recompute else "plain", read="bottom_up" if probe else "top")
        self.requires_grad_(not probe)
        self.fc_norm = nn.Identity() if probe else nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head = make_head(self.embed_dim, num_classes, cfg)

    def features(self, images):
        """(B, C, H, W) -> (B, D)"""
        return self.fc_norm(super().features(images))

    def forward(self, images):
        return self.head(self.features(images))


class ResNetClassifier(ResNet50):
    """The same for a ResNet-50, under torchvision's names: `fc` on the mean over the last map's positions."""

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.resnet_width, cfg.in_chans, cfg.drop_path)
        self.requires_grad_(cfg.mode == "finetune")
        self.fc = make_head(self.embed_dim, num_classes, cfg)
        self.to(memory_format=torch.channels_last)
        self.beside = []

    @property
    def head(self):
        return self.fc

    def features(self, images):
        """(B, C, H, W) -> (B, D)"""
        return super().forward(images).mean((2, 3))

    def forward(self, images):
        return self.fc(self.features(images))


def layer_id(name, depth):
    """0: tokens, positions, patch embedding; k + 1: block k; depth + 1: the rest (MAE's and BEiT's numbering)."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as MAE's linear probe uses it.

    Matrices: g += weight_decay * p; g *= 0.001 * |p| / |g| (factor 1 if either norm is 0). Vectors: neither.
    Then m = 0.9 * m + g; p -= lr * m.
    """

    def __init__(self, params, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    p_norm, g_norm = p.norm(), g.norm()
                    ratio = group["trust"] * p_norm / g_norm
                    g = g * torch.where((p_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio))
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * m)


# ---- RandAugment, in the loader --------------------------------------------------------------------------------------


def affine(angle=0.0, shear=(0.0, 0.0), translate=(0.0, 0.0)):
    """Operation that turns, slants (about the corner) or shifts: at most by these degrees, slopes, shares of the side."""

    def apply(image, m, fill):
        slant = [math.degrees(math.atan(m * slope)) for slope in shear]
        shift = [m * share * side for share, side in zip(translate, image.size, strict=True)]
        corner = [0, 0] if any(shear) else None
        return TF.affine(image, m * angle, shift, 1.0, slant, InterpolationMode.BICUBIC, fill, corner)

    return apply


# Pillow image; m from -1 to 1, its sign ignored where it has no meaning; fill: level of each channel outside the image.
OPERATIONS = {
    "autocontrast": lambda image, m, fill: TF.autocontrast(image),
    "equalize": lambda image, m, fill: TF.equalize(image),
    "invert": lambda image, m, fill: TF.invert(image),
    "posterize": lambda image, m, fill: TF.posterize(image, max(1, 4 - int(4 * abs(m)))),
    "solarize": lambda image, m, fill: TF.solarize(image, 256 - int(256 * abs(m))),
    "solarize_add": lambda image, m, fill: image.point(lambda value: value + int(110 * abs(m)) if value < 128 else value),
    "color": lambda image, m, fill: TF.adjust_saturation(image, 1 + 0.9 * m),
    "contrast": lambda image, m, fill: TF.adjust_contrast(image, 1 + 0.9 * m),
    "brightness": lambda image, m, fill: TF.adjust_brightness(image, 1 + 0.9 * m),
    "sharpness": lambda image, m, fill: TF.adjust_sharpness(image, 1 + 0.9 * m),
    "rotate": affine(angle=30.0),
    "shear_x": affine(shear=(0.3, 0.0)),
    "shear_y": affine(shear=(0.0, 0.3)),
    "translate_x": affine(translate=(0.45, 0.0)),
    "translate_y": affine(translate=(0.0, 0.45)),
}


class RandAugment:
    """RandAug (magnitude, 0.5) of the papers (Cubuk et al. 2020, in the form of timm's `rand-mM-mstd0.5-inc1`): two of the
    operations, drawn with replacement, each applied half of the time, at a magnitude from N(`magnitude`, 0.5) of 10."""

    def __init__(self, magnitude, fill):
        self.magnitude, self.fill = magnitude, fill

    def __call__(self, image):
        """uint8 (C, H, W), one channel or three -> the same"""
        image = TF.to_pil_image(image)  # bicubic turns need it, and its sharpness is four times as fast
        for choice in torch.randint(len(OPERATIONS), (2,)).tolist():
            apply, negative = (torch.rand(2) < 0.5).tolist()
            m = min(max(self.magnitude + 0.5 * torch.randn(()).item(), 0.0), 10.0) / 10
            if apply:
                image = list(OPERATIONS.values())[choice](image, -m if negative else m, self.fill)
        return TF.pil_to_tensor(image)


# ---- augmentation on the device --------------------------------------------------------------------------------------


def random_erasing(images, probability):
    """Per image, with the given probability, fill a box of 2 to 33 % of the area and aspect 0.3 to 3.3 with N(0, 1) noise."""
    B, _, H, W = images.shape
    u = torch.rand(5, B, device=images.device)
    area, aspect = H * W * (0.02 + 0.31 * u[0]), torch.exp((2 * u[1] - 1) * math.log(3.3))
    h, w = (area * aspect).sqrt().clamp(max=H), (area / aspect).sqrt().clamp(max=W)
    top, left = u[2] * (H - h), u[3] * (W - w)
    rows, columns = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
    inside = ((rows >= top[:, None]) & (rows < (top + h)[:, None]))[:, :, None] & (
        (columns >= left[:, None]) & (columns < (left + w)[:, None]))[:, None, :]
    erased = (inside & (u[4] < probability)[:, None, None])[:, None]
    return torch.where(erased, torch.randn_like(images), images)


def mixer(cfg, num_classes):
    """Mixup or cutmix, each half of the time, one lambda per batch: (images, labels) -> (images, soft labels)."""
    kinds = [kind(alpha=alpha, num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, cfg.mixup), (v2.CutMix, cfg.cutmix)) if alpha > 0]
    return v2.RandomChoice(kinds) if kinds else None


# ---- evaluation ------------------------------------------------------------------------------------------------------


def own_share(n, run, batch=256):
    """Batches of keys that cover range(n) once over all processes: no padding, no sample counted twice."""
    indices = range(run.rank, n, run.world_size)
    return [[(0, i) for i in indices[start : start + batch]] for start in range(0, len(indices), batch)]


def eval_batches(source, cfg, run):
    """This process's share of a data set, centre-cropped."""
    views = Views(source, EvalCrop(cfg.eval_size, cfg.test_crop), cfg.seed, run.bad_files.allow(len(source)), flip=False)
    yield from run.timed(make_loader(views, own_share(len(source), run), run))
    run.bad_files.share()


@torch.inference_mode()
def evaluate(model, batches, to_inputs, run):
    """Accuracy over the batches of all processes: {"eval/top1": %, "eval/top5": %, "eval/n": images counted}.

    model: inputs -> scores (B, classes).
    """
    hits = torch.zeros(3, dtype=torch.float64, device=run.device)
    for batch in batches:
        labels = batch["label"].to(run.device)
        with autocast(run.device, run.amp_dtype):
            scores = model(to_inputs(batch)).float()
        hit = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        hits += torch.stack([hit[:, 0].sum(), hit.any(1).sum(), torch.tensor(len(labels), device=run.device)])
    if run.world_size > 1:
        dist.all_reduce(hits)
    top1, top5, n = hits.tolist()
    return {"eval/top1": round(100 * top1 / n, 3), "eval/top5": round(100 * top5 / n, 3), "eval/n": int(n)}


@torch.no_grad()  # not inference mode: a probe trains on what comes out
def extract(model, source, to_images, cfg, run):
    """features (N, D) float32 and labels (N,) of all of `source`, on every process."""
    model.eval()
    features = torch.zeros(len(source), model.embed_dim, device=run.device)
    labels = torch.zeros(len(source), dtype=torch.int64, device=run.device)
    for batch in eval_batches(source, cfg, run):
        index = batch["index"].to(run.device)
        with autocast(run.device, run.amp_dtype):
            features[index] = model.features(to_images(batch)).float()
        labels[index] = batch["label"].to(run.device)
    if run.world_size > 1:  # every row was filled by one process and is zero on the others
        dist.all_reduce(features)
        dist.all_reduce(labels)
    return features, labels


def knn_scores(queries, features, labels, num_classes, k, temperature):
    """Weighted vote of the k nearest training features by cosine similarity: (Q, num_classes).

    queries: (Q, D); features: (N, D), of length 1; labels: (N,).
    """
    with torch.autocast(queries.device.type, enabled=False):
        cosine = F.normalize(queries.float(), dim=1) @ features.T
    similarity, nearest = cosine.topk(min(k, len(features)), dim=1)
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest 1: nothing overflows, the order stays
    votes = F.one_hot(labels[nearest], num_classes) * weights[..., None]
    return votes.sum(1)


# ---- training --------------------------------------------------------------------------------------------------------


def train_transform(cfg, mean):
    """What the loader does to a training image; the flip follows on the device."""
    if cfg.augment == "none":
        return EvalCrop(cfg.img_size, cfg.test_crop)
    crop = RandomResizedCrop(cfg.img_size, scale=(0.08, 1.0))
    if cfg.augment == "crop":
        return crop
    if cfg.in_chans not in (1, 3):
        raise Refused(f"--augment full changes colours: it needs 1 or 3 channels, not {cfg.in_chans}; use --augment crop")
    fill = [round(255 * value) for value in mean]
    return v2.Compose([crop, v2.ToDtype(torch.uint8, scale=True), RandAugment(cfg.randaug, fill)])


def loss_of(scores, labels, cfg):
    """Mean loss of scores (B, classes) against labels, (B,) or mixed (B, classes), smoothed; `bce`: mean over classes too."""
    if cfg.loss == "ce":
        return F.cross_entropy(scores, labels, label_smoothing=cfg.smoothing)
    target = labels if labels.ndim == 2 else F.one_hot(labels, scores.shape[1])
    return F.binary_cross_entropy_with_logits(scores, target * (1 - cfg.smoothing) + cfg.smoothing / scores.shape[1])


def micro_batches(batches, to_inputs, mix, step, cfg, plan, run):
    """The micro-steps of one update: (inputs on the device, erased and mixed; labels, (B,) or (B, classes); sample numbers)."""
    for micro_step in range(plan.accum_steps):
        batch = next(batches)
        run.seed(step, micro_step)
        inputs, labels = to_inputs(batch), batch["label"].to(run.device, non_blocking=True)
        if cfg.erasing:
            inputs = random_erasing(inputs, cfg.erasing)
        yield *(mix(inputs, labels) if mix else (inputs, labels)), batch["index"].tolist()


def train_step(net, batches, to_inputs, mix, optimizer, scaler, step, cfg, plan, run):
    """One update from plan.accum_steps micro-batches; returns {name: float, mean over the update} and the sample numbers."""
    optimizer.zero_grad(set_to_none=True)
    total, samples = 0.0, []
    micro_steps = micro_batches(batches, to_inputs, mix, step, cfg, plan, run)
    for micro_step, (inputs, labels, indices) in enumerate(micro_steps):
        with gradient_sync(net, micro_step == plan.accum_steps - 1):
            with autocast(run.device, run.amp_dtype):
                scores = net(inputs)
            loss = loss_of(scores.float(), labels, cfg)
            scaler.scale(loss / plan.accum_steps).backward()
        total = total + loss.detach() / plan.accum_steps
        samples += indices
    return finish_update(run, optimizer, scaler, {"loss": total}, cfg.clip_grad), samples


def of_all(x, run):
    """Rows of all processes, on every process."""
    if run.world_size == 1:
        return x
    out = x.new_empty(run.world_size * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def probe_step(features_of, head, batches, to_inputs, mix, optimizer, scaler, step, cfg, plan, run):
    """The same for a linear probe: the frozen network in micro-batches, one step of the head on the whole batch.

    Every process has the rows of all: BatchNorm and gradients are those of the whole batch, so nothing is left for DDP to do.
    """
    optimizer.zero_grad(set_to_none=True)
    rows, samples = [], []
    for inputs, labels, indices in micro_batches(batches, to_inputs, mix, step, cfg, plan, run):
        with torch.no_grad(), autocast(run.device, run.amp_dtype):
            rows.append((features_of(inputs).float(), labels))
        samples += indices
    features, labels = (of_all(torch.cat(part), run) for part in zip(*rows, strict=True))
    with autocast(run.device, run.amp_dtype):
        scores = head(features)
    loss = loss_of(scores.float(), labels, cfg)
    scaler.scale(loss).backward()
    return finish_update(run, optimizer, scaler, {"loss": loss.detach()}, cfg.clip_grad), samples


def write_features(model, source, to_images, cfg, run):
    """--mode features: --out (N, D) float32 .npy, and beside it the images' names, one per line. What cannot be read is left
    out of both."""
    path = new_file(cfg.out or "features.npy", ".npy")
    names_path = new_file(path.with_suffix(".txt"), ".txt")
    run.join()
    features, _ = extract(model.to(run.device), source, to_images, cfg, run)
    good = [i for i in range(len(source)) if source.name(i) not in run.bad_files.known]
    if run.is_main:
        names = "".join(f"{source.name(i)}\n" for i in good)
        write_atomically(path, lambda file: np.save(file, features.cpu().numpy()[good]))
        write_atomically(names_path, lambda file: file.write(names.encode(errors="surrogateescape")))
    bad = f"; {len(source) - len(good)} unreadable ones left out, not replaced" if len(good) < len(source) else ""
    H, W = cfg.eval_size
    run.print(f"{path}: {len(good)} images x {model.embed_dim} ({H} x {W} px, pool {cfg.pool}), names in {names_path}{bad}")


def load_model(cfg, num_classes):
    torch.manual_seed(cfg.seed)
    classifier = {"ViT": Classifier, "ResNet": ResNetClassifier, "RevColV2": RevColClassifier}[family(cfg.model)]
    model = classifier(cfg, num_classes)
    if cfg.weights != "none":
        content = read_file(cfg.weights)
        ignore, names = {*BESIDE_TRUNK, *model.beside}, weights_of(content).keys()
        if cfg.mode != "finetune" and classifier is Classifier and "fc_norm.weight" in names and "norm.weight" not in names:
            model.norm_the_mean()  # a fine-tuned network is looked at through the norm it was fine-tuned with
            ignore -= {"fc_norm."}
        load_weights(model, cfg.weights, allow_missing=("head.", "fc_norm.", "fc."), ignore=ignore, part=PARTS, content=content)
    return model


def train(cfg, run):
    if cfg.print_recipe:
        return print_recipe(cfg)
    source = open_data(cfg, "all" if cfg.mode == "features" else "train")
    if cfg.check_data:
        return check_data(source, run.workers)
    mean, std = normalisation(cfg)
    to_images = Normalise(mean, std, run.device)
    if cfg.mode == "features":
        return write_features(load_model(cfg, 1), source, to_images, cfg, run)
    if not source.classes:
        raise Refused(f"--data {cfg.data} has no labels: expected a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or "
                      "an .npz with `labels`")
    held_out = open_data(cfg, "val", source.classes)
    plan = None if cfg.mode == "knn" else make_plan(len(source), cfg, run.world_size)
    if cfg.mode == "finetune" and plan.micro_batch < 2:
        raise Refused("mixup, cutmix and BatchNorm need two images per forward pass: raise --batch_size or --micro_batch")
    lr = cfg.peak_lr
    model = load_model(cfg, len(source.classes))
    scaled = "" if cfg.base_lr is None else f" = {cfg.base_lr:.3g} x {cfg.batch_size} / 256"
    sizes = " x ".join(map(str, cfg.img_size)) + (" px" if cfg.eval_size == cfg.img_size else
                                                  f" px, tested at {cfg.eval_size[0]} x {cfg.eval_size[1]}")
    run.start(plan, f"recipe {cfg.recipe}, {sizes}, lr {lr:.3g}{scaled}")
    if plan and cfg.warmup_epochs >= cfg.epochs:
        run.print(f"--warmup_epochs {cfg.warmup_epochs} of {cfg.epochs} --epochs: the learning rate only rises, to "
                  f"{lr * cfg.epochs / cfg.warmup_epochs:.3g}")
    model.to(run.device)

    def report(step, epoch, result):
        line = {"step": step, "epoch": epoch, **result, "train_images": len(source)}
        run.log(line)
        how = f"knn (k {min(cfg.k, len(source))}, temperature {cfg.temperature})" if cfg.mode == "knn" else cfg.mode
        run.print(f"{how} of {cfg.weights}: top-1 {result['eval/top1']:.2f} %, top-5 {result['eval/top5']:.2f} % on "
                  f"{result['eval/n']} images, {len(source)} training images")

    if cfg.mode == "knn":
        run.write_config()
        features, labels = extract(model, source, to_images, cfg, run)
        features = F.normalize(features, dim=1)

        def classify(images):
            return knn_scores(model.features(images), features, labels, len(source.classes), cfg.k, cfg.temperature)

        result = evaluate(classify, eval_batches(held_out, cfg, run), to_images, run)
        return report(0, 0, {**result, "k": cfg.k, "temperature": cfg.temperature})

    mix, flip = mixer(cfg, len(source.classes)), cfg.augment != "none"
    ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    net, to_inputs, val_batches = model, to_images, None
    if cfg.mode == "linear":
        model.eval()
        net = model.head if cfg.augment == "none" else model
        features_of = nn.Identity() if net is model.head else torch.compile(model.features) if cfg.compile else model.features
        optimizer = LARS(model.head.parameters(), cfg.weight_decay)
    else:
        groups = parameter_groups(model, cfg.weight_decay, ("pos_embed", "cls_token"),
                                  None if cfg.model == "resnet50" else model.layer, cfg.layer_decay)
        optimizer = adamw(groups, cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"ema": ema} if ema else {})
    start = run.load(state)
    keys = KeyedBatches(plan, cfg.seed, run, start, cfg.repeats)
    if net is model.head:  # no augmentation: every image's features once, then only the head runs
        with run.off_the_clock():
            features, labels = extract(model, source, to_images, cfg, run)
            held_features, held_labels = extract(model, held_out, to_images, cfg, run)
        train_rows = (torch.tensor([index for _, index in batch]) for batch in keys)
        val_rows = [torch.tensor([index for _, index in batch]) for batch in own_share(len(held_out), run)]
        batches = ({"image": features[i], "label": labels[i], "index": i} for i in train_rows)
        val_batches = [{"image": held_features[i], "label": held_labels[i]} for i in val_rows]

        def to_inputs(batch):
            return batch["image"]
    else:
        views = Views(source, train_transform(cfg, mean), cfg.seed, run.bad_files.allow(len(source)), flip=flip)
        batches = run.timed(make_loader(views, keys, run))
    if cfg.mode == "linear":
        update = functools.partial(probe_step, features_of, model.head)
    else:
        update = functools.partial(train_step, run.prepare(model))
    meta = {"method": "finetune", "weights": cfg.weights, "model": cfg.model, "img_size": cfg.img_size,
            "patch_size": cfg.patch_size, "resnet_width": cfg.resnet_width, "columns": cfg.columns, "in_chans": cfg.in_chans,
            "mean": mean, "std": std, "classes": list(source.classes), "pool": cfg.pool, "test_size": cfg.eval_size,
            "test_crop": cfg.test_crop, "recipe": cfg.recipe}

    learner = model.head if cfg.mode == "linear" else model
    learner.train()
    for step in range(start, plan.steps):
        now = warmup_cosine(plan.epoch(step), lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, now)
        restore_statistics = remember_statistics(learner)
        stats, samples = update(batches, to_inputs, mix, optimizer, scaler, step, cfg, plan, run)
        if stats["skipped"]:
            restore_statistics()
        elif ema:
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - cfg.ema)
                for averaged, now_is in zip(batch_statistics(ema), batch_statistics(model), strict=True):  # averages already
                    averaged.copy_(now_is)
        run.end_update(step + 1, stats, now, samples)
        epoch = plan.epoch(step + 1)
        with run.off_the_clock():
            if plan.ends_epoch(step + 1) and (int(epoch) % cfg.eval_every == 0 or step + 1 == plan.steps):
                judged = (ema or net).eval()
                run.share_statistics(judged)
                result = evaluate(judged, val_batches or eval_batches(held_out, cfg, run), to_inputs, run)
                learner.train()
                report(step + 1, epoch, result)
                if result["eval/top1"] > run.kept.get("best_top1", -1):
                    run.kept["best_top1"] = result["eval/top1"]
                    run.export("best.pth", (ema or model).state_dict(), {**meta, "epoch": epoch, **result})
            if run.save_due(step + 1):
                run.save(step + 1, state, {**meta, "epoch": epoch})
        if run.stopping:
            return run.print(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume carries on")
    run.print(f"done: {run.out}/best.pth ({run.kept['best_top1']:.2f} % top-1), last.pth, log.jsonl")


if __name__ == "__main__":
    launch(Config, presets, train, "finetune")
