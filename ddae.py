"""DDAE: deep dynamic supervision and deep self-distillation for masked image modelling.

DDAE     Chen et al., DDAE: Towards Deep Dynamic Vision BERT Pretraining, AAAI 2024, doi 10.1609/aaai.v38i2.27864
         Equations, tables and appendix are those of its first version, Deep Dynamic AutoEncoder for Vision BERT Pretraining
         (openreview.net/forum?id=k4p382L0bw). No code by the authors is known to us.
BootMAE  Dong et al., Bootstrapped Masked Autoencoders for Vision BERT Pretraining, ECCV 2022, arXiv 2207.07116: its basis

Idea. A hidden patch next to a visible one asks for local perception, one far from all of them for semantic reasoning. So
weigh the loss by that distance, let the network learn how (beta), and do so at several depths: every third block's output must
reconstruct the pixels, and what a slow copy of the encoder, which sees the whole image, has at that depth.

Data flow, in the order of the code (source, the paper's symbol; its name here and its shape on the right)
    sec. 4.1  m            BEiT's blocks, then single patches: 147 of 196      mask             (B, L), 1 = hidden
    sec. 3.2  D(m)         from a hidden patch to the nearest visible one      distance         (B, L), in patches, 0 = visible
    eq. (2)   h_i          exp(D^beta_i) / its sum over the hidden patches     h                (K, B, L)
    sec. 3.2               h_i / max h_i                                       weight           (K, B, L)
    sec. 3.2  f^(g_i)      encoder's output after block g_i = depth * i / K    latent           (K, B, 1 + len_keep, D)
    eq. (3)   d_p(f^(g_i)) each level against the pixels of x                  pixel_decoder    (K, B, L, p*p*C)
    eq. (5)   d_d(f^(g_i)) each level against the teacher's, of the whole x    feature_decoder  (K, B, L, D)
    eq. (6)   loss = sum_i lambda_i (eq. 3 + eq. 5)_i + 0.5 sum_i sqrt(n_masked) mean ||h_i||_2
    eq. (4)   theta' <- m theta' + (1 - m) theta                               update_teacher
lambda_i is .75, and 1 for the last level. encoder.pth is a plain ViT: the student, final LayerNorm included.

The paper's ablations (100 epochs; ViT-B in table 4, ViT-S in table 3)
    Table 2   DDS on MAE: --no-distill --decoder mae. (On BEiT-v2: not built.)
    Table 3   deep only, DS-MAE: the same with --no-dynamic; dynamic only, D-MAE: with --num_levels 1; plain MAE: with both
              (MAE's own masks: --mask random)
    Table 4   --dds both|pixel|feature|none: which loss is deep and dynamic
    Table 6   --num_levels 1|2|4|6
    Table 7   --beta_init 0 or -0.1,-0.3,-0.5,-0.7 ...; --no-learn_beta keeps it

Not in the paper, our choice or our reading
    mask      "blockwise" read as BootMAE's two stages (--mask two_stage) without its last step, which makes up to three blocked
              patches visible again (mean distance 2.1 in place of 1.94)
    weight    softmax and maximum per image; the maximum is held fixed in the gradient (through it all weights of a level
              shrink, and beta runs away); a level's loss is sum_j weight_j mse_j / n_masked, mse the mean squared error of a
              patch's values, so that uniform weights give exactly MAE's
    eq. (6)   on h, which sums to 1, not on the weights; times sqrt(n_masked), as the norm of one image hardly depends on beta
              (--reg literal)
    beta      one per level, for both losses, without weight decay, at the full learning rate
    --dds     the other loss is that of the last block, with uniform weights
    decoders  2 plain blocks each, visible patches with positions too, between a projection and a LayerNorm with a linear head;
              16 heads at width 512; the levels pass the encoder's one final LayerNorm before them; MAE's initial values
    targets   pixels normalised per patch and channel (BootMAE's; --target); features under a LayerNorm without parameters, on
              both sides (BootMAE's; --feature_norm none is eq. 5 to the letter)
    training  AdamW with betas .9, .95 for "Adam"; the appendix's momentum (not sec. 3.3's constant .9999), with BootMAE's
              corner at epoch 100; cosine down to 0, no ramp of the feature loss, ImageNet's mean and std (BootMAE: 1e-4,
              a quarter of the epochs, .5)

    python ddae.py --demo                                              two minutes on a CPU
    torchrun --nproc_per_node 4 ddae.py --epochs 800                   the paper's run, images in data/imagenet
    torchrun --nproc_per_node 4 ddae.py --epochs 100                   its short run, with 20 epochs of warm-up
    torchrun --nproc_per_node 4 ddae.py --epochs 800 --resume          carry on after a stop
    python ddae.py --data PHOTOS --init encoder.pth --epochs 100       own images, from pre-trained weights
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import nn

from common import (
    VIT_SIZES,
    Block,
    KeyedBatches,
    Normalise,
    RandomResizedCrop,
    RunConfig,
    Views,
    ViT,
    VitSize,
    adamw,
    autocast,
    check_data,
    fill_from_visible,
    finish_update,
    gradient_sync,
    launch,
    load_weights,
    make_loader,
    make_plan,
    normalisation,
    open_data,
    opt,
    parameter_groups,
    patch_grid,
    patchify,
    picture_batch,
    save_pictures,
    set_lr,
    sincos_pos_embed,
    spread,
    take_tokens,
    unpatchify,
    warmup_cosine,
)

LEVEL_WEIGHT = 0.75  # lambda_i of eqs. (3) and (5) for all levels but the last, which has 1
REG_WEIGHT = 0.5  # lambda of eq. (6)
DECODERS = {"nano": (128, 4), "tiny": (192, 6)}  # width, heads of the pixel decoder; the paper's sizes have (512, 16)


@dataclass
class Config(RunConfig):
    # model
    model: VitSize = opt("base", "encoder: width, depth and heads of that ViT; the paper has small and base")
    patch_size: int | None = opt(None, "pixels; default 16, 14 for huge")
    decoder: Literal["ddae", "mae"] = opt("ddae", "pixel decoder and its target: 2 blocks, or MAE's 8 (table 2)")
    decoder_embed_dim: int | None = opt(None, "pixel decoder's width; default 512, less for nano and tiny")
    decoder_depth: int | None = opt(None, "blocks of both decoders, default 2; with --decoder mae of the pixel decoder, 8")
    decoder_num_heads: int | None = opt(None, "its heads; default 16, less for nano and tiny")
    # method
    mask_ratio: float = opt(0.75, "share of hidden patches: int(L * mask_ratio) of L")
    mask: Literal["two_stage", "block", "random"] = opt("two_stage", "hide blocks then patches, blocks alone, patches alone")
    num_levels: int = opt(4, "K, supervised block outputs (table 6)")
    dynamic: bool = opt(True, "weigh hidden patches by eq. (2); --no-dynamic: all alike (table 3)")
    distill: bool = opt(True, "feature loss, eq. (5); --no-distill: pixels alone (table 2)")
    dds: Literal["both", "pixel", "feature", "none"] = opt("both", "which loss is deep and dynamic (table 4)")
    beta_init: tuple[float, ...] | None = opt(None, "beta per level, or one for all; default -0.5 (table 7)")
    learn_beta: bool = opt(True, "--no-learn_beta keeps beta as it is (table 7)")
    reg: Literal["sqrt", "literal", "none"] = opt("sqrt", "eq. (6): times sqrt(hidden patches), as printed, or left out")
    target: Literal["channel", "mae", "raw"] | None = opt(
        None, "pixels normalised per patch and channel, per patch, or not at all; default: channel, mae with --decoder mae")
    feature_norm: Literal["layer", "none"] = opt("layer", "LayerNorm without parameters on features and their target")
    momentum: tuple[float, float, float] = opt((0.999, 0.9999, 0.99999), "teacher's, at epochs 0, 100, 400; linear between")
    # optimisation: appendix A, but for min_lr, betas, clip_grad
    epochs: float = opt(800.0, "passes over the data")
    batch_size: int = opt(4096, "images per update, over all processes")
    micro_batch: int | None = opt(None, "images per forward pass of one process; default: the largest that divides, up to 256")
    base_lr: float = opt(1.5e-4, "learning rate per 256 images")
    min_lr: float = opt(0.0, "where the cosine ends")
    warmup_epochs: float | None = opt(None, "linear warm-up; default a fifth of the epochs, at most 40 (20 of 100, 40 of 800)")
    weight_decay: float = opt(0.05, "AdamW")
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW")
    clip_grad: float = opt(0.0, "largest gradient norm; 0 = no clipping")
    # run
    init: str | None = opt(None, "start from these weights (ours, official MAE, timm); a fresh schedule")
    pictures: int = opt(8, "images drawn at each epoch's end; 0 = none")

    def __post_init__(self):
        super().__post_init__()
        depth = VIT_SIZES[self.model][1]
        self.patch_size = self.patch_size or (14 if self.model == "huge" else 16)
        width, heads = DECODERS.get(self.model, (512, 16))
        self.decoder_embed_dim, self.decoder_num_heads = self.decoder_embed_dim or width, self.decoder_num_heads or heads
        self.decoder_depth = self.decoder_depth or {"ddae": 2, "mae": 8}[self.decoder]
        self.target = self.target or {"ddae": "channel", "mae": "mae"}[self.decoder]
        self.warmup_epochs = min(40.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        if depth % self.num_levels:
            raise ValueError(f"--num_levels {self.num_levels} does not divide the {depth} blocks of --model {self.model}")
        if self.beta_init and (self.dds == "none" or not self.dynamic):
            raise ValueError("--beta_init has no use without a dynamic loss (--no-dynamic, --dds none)")
        self.beta_init = self.beta_init or (-0.5,)
        if len(self.beta_init) == 1:
            self.beta_init *= self.num_levels
        if len(self.beta_init) != self.num_levels:
            raise ValueError(f"--beta_init has {len(self.beta_init)} values, --num_levels is {self.num_levels}")
        if self.dds == "feature" and not self.distill:
            raise ValueError("--dds feature needs the feature loss that --no-distill takes away")
        if self.decoder_embed_dim % 4 or self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(f"--decoder_embed_dim {self.decoder_embed_dim} must be a multiple of 4 and of "
                             f"--decoder_num_heads {self.decoder_num_heads}")
        L = math.prod(self.grid)
        if not 0 < self.n_masked < L:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {L} patches hides none or all of them")

    @property
    def grid(self):
        return patch_grid(self.img_size, self.patch_size)

    @property
    def n_masked(self):
        return int(math.prod(self.grid) * self.mask_ratio)


# Raw pixels in the demo: drawn shapes are flat, and a flat patch has nothing left once its mean and deviation are taken out.
# The teacher of a run of a thousand updates must follow faster than that of a quarter of a million.
DEMO = {"data": "shapes", "img_size": (32, 32), "model": "nano", "patch_size": 4, "target": "raw", "num_levels": 2,
        "decoder_depth": 1, "momentum": (0.99,) * 3, "epochs": 1.75, "batch_size": 32, "base_lr": 1.2e-2, "warmup_epochs": 0.5,
        "log_every": 25}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- masking, in the data workers ------------------------------------------------------------------------------------


def block_mask(grid, n_masked, n_block):
    """Hide rectangles, BEiT's way, until n_block patches are hidden, then single patches at random: n_masked in all.

    Returns (h, w) bool, True = hidden. Of a rectangle the area is uniform between 16/196 and 60/196 of the grid (at most what
    is left to hide), the aspect log-uniform between .3 and 1/.3; one that is as high or as wide as the grid, hides nothing
    new, or too much, is drawn again. In a grid too thin for them rectangles are cut to fit. Uses torch's default generator.
    """
    h, w = grid
    mask, left, numbers = np.zeros(grid, bool), n_block, []
    smallest, largest = h * w * 16 / 196, h * w * 60 / 196
    highest, widest = max(h - 1, 1), max(w - 1, 1)
    thin = round(math.sqrt(smallest)) > min(highest, widest)
    while left:
        numbers = numbers or torch.rand(32, 4).tolist()  # one call is as fast as one number
        u_area, u_aspect, u_top, u_left = numbers.pop()
        side = math.sqrt(smallest + (min(largest, left) - smallest) * u_area)
        stretch = 0.3 ** (u_aspect - 0.5)  # root of the aspect
        height, width = round(side * stretch), round(side / stretch)
        if thin:
            height, width = min(height, highest), min(width, widest)
        if not (0 < height <= highest and 0 < width <= widest):
            continue
        top, start = int(u_top * (h - height + 1)), int(u_left * (w - width + 1))
        block = mask[top : top + height, start : start + width]
        new = height * width - np.count_nonzero(block)
        if 0 < new <= left:
            block[:], left = True, left - new
    order = np.argpartition(torch.rand(h, w).numpy().ravel() - mask.ravel(), n_masked)  # what is hidden already comes first
    mask.ravel()[order[:n_masked]] = True
    return mask


def distance_map(mask):
    """D(m), sec. 3.2: (h, w), True = hidden -> float32 (L,), from each hidden patch to the nearest visible one, Euclidean, in
    patches: at least 1. 0 on visible ones, so that it says what is hidden too. At least one patch must be visible."""
    return torch.from_numpy(distance_transform_edt(mask).ravel()).float()


def draw_distance(grid, n_masked, n_block):
    """What the loader draws for a sample: the distance map of a new mask."""
    return distance_map(block_mask(grid, n_masked, n_block))


def mask_source(cfg):
    """The function that draws one sample's distance map under --mask and --mask_ratio."""
    n_block = {"two_stage": round(cfg.n_masked * 120 / 147), "block": cfg.n_masked, "random": 0}[cfg.mask]
    return functools.partial(draw_distance, cfg.grid, cfg.n_masked, n_block)


# ---- weights, targets, losses ----------------------------------------------------------------------------------------


def dynamic_weights(distance, beta):
    """h, eq. (2): distance (B, L), 0 = visible; beta (K,). Returns (K, B, L) float32: softmax of D^beta over an image's hidden
    patches, 0 on visible ones."""
    above_0 = distance.float().clamp(min=1)  # 1 where visible: 0^beta gives a NaN gradient even behind a mask
    scores = above_0.pow(beta.view(-1, 1, 1))
    return scores.masked_fill(distance == 0, -torch.inf).softmax(-1)  # softmax subtracts the largest: exp(11^5) overflows


def rescale(h):
    """Weights: h (K, B, L) divided by each image's maximum, which counts as a constant in the gradient; in [0, 1]."""
    return h / h.detach().amax(-1, keepdim=True)


def weighted_mse(pred, target, weight, mask):
    """Eqs. (3) and (5) per level: pred (K, B, L, values), target the same or without K, weight (K, B, L), mask (B, L).

    Returns (K,): weighted sum over patches of the mean over values, divided by the number of hidden patches in the batch.
    """
    return ((pred - target).square().mean(-1) * weight).sum((1, 2)) / mask.sum()


def regulariser(h, mask, literal=False):
    """Eq. (6)'s last term without its factor: sum over levels of the mean over images of ||h||_2, times the root of the number
    of an image's hidden patches unless `literal`. h (K, B, L), mask (B, L)."""
    norm = torch.linalg.vector_norm(h, dim=-1).mean(1).sum()
    return norm if literal else norm * mask[0].sum().sqrt()


def patch_statistics(patches, target, in_chans):
    """What a pixel target takes out of patches (B, L, p*p*C): mean and deviation, broadcastable to them. mae: over all values,
    unbiased, eps 1e-6; channel: over a channel's values, biased, eps 1e-5 (BootMAE's); raw: 0 and 1."""
    if target == "raw":
        return torch.zeros_like(patches[..., :1]), torch.ones_like(patches[..., :1])
    if target == "mae":
        return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    pixels = patches.unflatten(-1, (-1, in_chans))
    variance, mean = torch.var_mean(pixels, dim=2, correction=0)  # (B, L, C)
    return mean.repeat(1, 1, pixels.shape[2]), (variance + 1e-5).sqrt().repeat(1, 1, pixels.shape[2])


def pixel_target(images, patch_size, target):
    """(B, C, H, W) -> (B, L, p*p*C)"""
    patches = patchify(images, patch_size)
    mean, deviation = patch_statistics(patches, target, images.shape[1])
    return (patches - mean) / deviation


def momentum_at(epoch, values):
    """m of eq. (4) (appendix A, with BootMAE's corner at epoch 100): values at epochs 0, 100, 400, linear between."""
    return float(np.interp(epoch, (0, 100, 400), values))


# ---- model -----------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Encoder tokens of the visible patches -> a prediction for every patch: projection, mask tokens, blocks, norm, head."""

    def __init__(self, in_dim, width, depth, num_heads, out_dim, grid):
        super().__init__()
        self.embed = nn.Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, out_dim)

    def forward(self, latent, ids_restore):
        """(B, 1 + len_keep, in_dim), (B, L) -> (B, L, out_dim)"""
        x = self.embed(latent)
        B, L = ids_restore.shape
        hidden = self.mask_token.to(x.dtype).expand(B, L - (x.shape[1] - 1), -1)
        patches = take_tokens(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)  # every patch in its place
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, 1:]))


class DeepDynamicAutoEncoder(ViT):
    """The student's encoder (trunk), two decoders, the teacher (momentum encoder) and beta."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.cfg, K, D = cfg, cfg.num_levels, self.embed_dim
        self.levels = [self.depth * i // K for i in range(1, K + 1)]  # g_i, blocks counted from 1
        self.pixel_decoder = Decoder(D, cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads,
                                     cfg.patch_size**2 * cfg.in_chans, self.grid)
        if cfg.distill:
            depth = cfg.decoder_depth if cfg.decoder == "ddae" else 2
            self.feature_decoder = Decoder(D, D, depth, VIT_SIZES[cfg.model][2], D, self.grid)
            self.teacher = ViT(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans).requires_grad_(False)
        if cfg.dynamic and cfg.dds != "none":
            self.beta = nn.Parameter(torch.tensor(cfg.beta_init), requires_grad=cfg.learn_beta)
        self.register_buffer("level_weight", torch.tensor([LEVEL_WEIGHT] * (K - 1) + [1.0]), persistent=False)
        self.init_weights()
        self.update_teacher(0.0)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """Eq. (4); a momentum of 0 copies the student."""
        if self.cfg.distill:
            student = dict(self.named_parameters())
            torch._foreach_lerp_(list(self.teacher.parameters()),
                                 [student[name] for name, _ in self.teacher.named_parameters()], 1 - momentum)

    def outputs(self, encoder, x):
        """Tokens through the encoder's blocks: the levels' outputs, unnormalised (K, B, N, D)."""
        levels = []
        for i, block in enumerate(encoder.blocks, start=1):
            x = block(x)
            if i in self.levels:
                levels.append(x)
        return torch.stack(levels)

    def encode(self, images, distance):
        """Visible patches through the student: latent (K, B, 1 + len_keep, D), normalised; ids_restore (B, L)."""
        len_keep = distance.shape[1] - self.cfg.n_masked
        ids_shuffle = (distance > 0).byte().argsort(dim=1, stable=True)  # visible patches first
        x = self.prepend_cls(take_tokens(self.embed(images), ids_shuffle[:, :len_keep]))
        return self.norm(self.outputs(self, x)), ids_shuffle.argsort(dim=1)

    def decode(self, decoder, latent, ids_restore):
        """All levels as one batch: (K, B, 1 + len_keep, D) -> (K, B, L, values)"""
        K, B = latent.shape[:2]
        return decoder(latent.flatten(0, 1), ids_restore.repeat(K, 1)).unflatten(0, (K, B))

    @torch.no_grad()
    def feature_target(self, images):
        """Momentum encoder on the whole image: every level's patch tokens (K, B, L, D)."""
        return self.outputs(self.teacher, self.teacher.prepend_cls(self.teacher.embed(images)))[:, :, 1:]

    def predict(self, images, distance):
        """Images (B, C, H, W), distance (B, L) -> pixels predicted from the last level (B, L, p*p*C), in target units."""
        latent, ids_restore = self.encode(images, distance)
        return self.decode(self.pixel_decoder, latent[-1:], ids_restore)[0]

    def weights(self, distance):
        """h and weight of each level, (K, B, L); h None and all weights alike if the loss is not dynamic."""
        if not hasattr(self, "beta"):
            return None, (distance > 0).float().expand(self.cfg.num_levels, -1, -1)
        h = dynamic_weights(distance, self.beta)
        return h, rescale(h)

    def forward(self, images, distance):
        """Returns the loss, eq. (6), and its terms: eqs. (3), (5), (6) as added; the last level's plain mean squared error on
        hidden patches, for comparison with other runs; beta under its block's number."""
        cfg = self.cfg
        latent, ids_restore = self.encode(images, distance)
        pixels = self.decode(self.pixel_decoder, latent if cfg.dds in ("both", "pixel") else latent[-1:], ids_restore)
        if cfg.distill:
            features = self.decode(self.feature_decoder, latent if cfg.dds in ("both", "feature") else latent[-1:], ids_restore)
            teacher = self.feature_target(images)[-len(features):]
        with torch.autocast(images.device.type, enabled=False):  # targets and losses in float32
            mask = (distance > 0).float()
            h, weight = self.weights(distance)

            def level_loss(pred, target, name):
                deep = cfg.dds in ("both", name)
                per_level = weighted_mse(pred.float(), target, weight if deep else mask[None], mask)
                return (self.level_weight[-len(per_level):] * per_level).sum()

            target = pixel_target(images.float(), self.patch_size, cfg.target)
            terms = {"eq3_pixel": level_loss(pixels, target, "pixel")}
            if cfg.distill:
                if cfg.feature_norm == "layer":
                    features, teacher = (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) for x in (features, teacher))
                terms["eq5_distill"] = level_loss(features, teacher.float(), "feature")
            if h is not None and cfg.reg != "none":
                terms["eq6_reg"] = REG_WEIGHT * regulariser(h, mask, cfg.reg == "literal")
            loss = sum(terms.values())
            terms = {"loss": loss, **terms, "mse": weighted_mse(pixels[-1:].detach().float(), target, mask[None], mask)[0]}
        if h is not None:
            terms |= {f"beta/{i}": beta for i, beta in zip(self.levels, self.beta.unbind(), strict=True)}
        return loss, {name: value.detach() for name, value in terms.items()}


# ---- training --------------------------------------------------------------------------------------------------------


def train_step(model, student, batches, to_images, optimizer, scaler, step, cfg, plan, run):
    """One update of `student` (`model` in DDP's wrapper, or the same) from plan.accum_steps micro-batches, then of its teacher;
    returns {name: float, mean over the update} and the sample numbers."""
    optimizer.zero_grad(set_to_none=True)
    total, samples = {}, []
    for micro_step in range(plan.accum_steps):
        batch = next(batches)
        run.seed(step, micro_step)
        images, distance = to_images(batch), batch["draw"].to(run.device, non_blocking=True)
        with gradient_sync(model, micro_step == plan.accum_steps - 1):
            with autocast(run.device, run.amp_dtype):
                loss, terms = model(images, distance)
            scaler.scale(loss / plan.accum_steps).backward()
        total = {name: total.get(name, 0) + term / plan.accum_steps for name, term in terms.items()}
        samples += batch["index"].tolist()
    stats = finish_update(run, optimizer, scaler, total, cfg.clip_grad)
    if not stats["skipped"]:
        student.update_teacher(momentum_at(plan.epoch(step), cfg.momentum))
    return stats, samples


@torch.no_grad()
def draw_pictures(path, model, batch, to_images):
    """PNG with original, masked input, distance map, each level's weights, prediction, and the prediction in its place."""
    images, distance = to_images(batch), batch["draw"].to(to_images.device)
    p, grid, mask, cfg = model.patch_size, model.grid, (distance > 0).float(), model.cfg
    statistics = patch_statistics(patchify(images, p), cfg.target, cfg.in_chans)
    mean, deviation = (fill_from_visible(values, mask, grid) for values in statistics)
    pred = unpatchify(model.predict(images, distance) * deviation + mean, p, grid)
    _, weight = model.weights(distance)

    def shown(values):
        return spread(values[..., None], p, grid)

    hidden = shown(mask)
    columns = [to_images.undo(x) for x in (images, images, pred, pred * hidden + images * (1 - hidden))]
    columns[1] = columns[1] * (1 - hidden) + 0.5 * hidden
    columns[2:2] = [shown(1 - distance / distance.amax(1, keepdim=True)), *(shown(level) for level in weight)]
    titles = ["original", "masked", "distance", *(f"weight {i}" for i in model.levels), "prediction", "pasted"]
    betas = ", ".join(f"{value:.3f}" for value in model.beta.tolist()) if hasattr(model, "beta") else "none"
    units = "raw pixels" if cfg.target == "raw" else "un-normalised with the statistics of visible patches only"
    save_pictures(path, list(zip(*columns, strict=True)), titles,
                  "distance: darker is farther, white is visible; weights of the levels after these blocks: white is 1, black "
                  f"is visible; beta {betas}; target {cfg.target}, {cfg.mask_ratio:.0%} hidden; prediction {units}")


def train(cfg, run):
    source = open_data(cfg)
    if cfg.check_data:
        return check_data(source, run.workers)
    plan = make_plan(len(source), cfg, run.world_size)
    mean, std = normalisation(cfg)
    torch.manual_seed(cfg.seed)
    model = DeepDynamicAutoEncoder(cfg)
    if cfg.init:
        ignored = ("head.", "fc_norm.", "decoder", "mask_token", "fuse_", "teacher.", "beta")
        load_weights(model, cfg.init, allow_missing=("pixel_decoder.", "feature_decoder.", "teacher.", "beta"),
                     ignore=ignored if cfg.distill else (*ignored, "feature_decoder."))
        model.update_teacher(0.0)
    lr = cfg.base_lr * cfg.batch_size / 256
    run.start(plan, f"lr {lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 256")
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}  # the teacher is a part of the model
    start = run.load(state)

    draw = mask_source(cfg)
    views = Views(source, RandomResizedCrop(cfg.img_size), cfg.seed, run.bad_files.allow(len(source)), draw)
    batches = run.timed(make_loader(views, KeyedBatches(plan, cfg.seed, run, start), run))
    to_images = Normalise(mean, std, run.device)
    fixed = picture_batch(source, cfg, draw)
    meta = {"method": "ddae", "model": cfg.model, "img_size": cfg.img_size, "patch_size": cfg.patch_size,
            "in_chans": cfg.in_chans, "mean": mean, "std": std}

    for step in range(start, plan.steps):
        now = warmup_cosine(plan.epoch(step), lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, now)
        stats, samples = train_step(ddp, model, batches, to_images, optimizer, scaler, step, cfg, plan, run)
        run.end_update(step + 1, stats, now, samples)
        with run.off_the_clock():
            if path := run.picture_due(step + 1):
                draw_pictures(path, model, fixed, to_images)
            if run.save_due(step + 1):
                meta["epoch"] = plan.epoch(step + 1)
                run.export("encoder.pth", model.trunk_state(), meta)
                run.save(step + 1, state, meta)
        if run.stopping:
            return run.print(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume carries on")
    demo = "--demo --mode linear" if cfg.demo else f"--data {cfg.data}"
    run.print(f"done: {run.out}/last.pth, encoder.pth, pictures/; next:\n"
              f"  python finetune.py {demo} --weights {run.out}/encoder.pth")


if __name__ == "__main__":
    launch(Config, presets, train, "ddae")
