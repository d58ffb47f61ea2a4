"""DDAE: deep dynamic supervision and deep self-distillation for masked image modelling.

DDAE     Chen et al., DDAE: Towards Deep Dynamic Vision BERT Pretraining, AAAI 2024,
         doi 10.1609/aaai.v38i2.27864. Equations, tables and appendix are numbered as in its first version,
         openreview.net/forum?id=k4p382L0bw. We know of no code by the authors.
BootMAE  Dong et al., Bootstrapped Masked Autoencoders for Vision BERT Pretraining, ECCV 2022,
         arXiv 2207.07116: its basis, whose masks, targets and momentum's corner we follow

Idea. A hidden patch next to a visible one asks for local perception, one far from all visible ones for
semantic reasoning. So weigh the loss by that distance to a learned power beta (below 0: near patches weigh
more), and do so at several depths: every third block's output must predict the pixels, and the features that
the teacher, a slow copy which sees the whole image, has there.

Data flow, in the order of an update (source, the paper's symbol; its name here and its shape on the right)
    sec. 4.1  m             blocks, then single patches: 147 of 196   mask             (B, L), 1 = hidden
    sec. 3.2  D(m)          distance to the nearest visible patch     distance         (B, L), 0 = visible
    eq. (2)   h_i           exp(D^beta_i) / its sum over the hidden   h                (K, B, L)
    sec. 3.2                h_i / max h_i                             weight           (K, B, L)
    sec. 3.2  f^(g_i)       block g_i = depth * i / K; final norm     latent           (K, B, 1 + len_keep, D)
    eq. (3)   d_p(f^(g_i))  each level against the pixels of x        pixel_decoder    (K, B, L, p*p*C)
    eq. (5)   d_d(f^(g_i))  each level against feature_target         feature_decoder  (K, B, L, D)
    eq. (6)   loss = eq. (3) + eq. (5) + 0.5 sum_i sqrt(n_masked) mean ||h_i||_2
    eq. (4)   theta' <- m theta' + (1 - m) theta, m the momentum      update_teacher
In eqs. (3) and (5) level i counts lambda_i: .75, the last one 1. encoder.pth is a plain ViT: the student,
final LayerNorm included. Tables 2 to 4, 6, 7: the flags that name them. DDS-MAE (table 2): --no-distill
--decoder mae; table 3's D-MAE: the same with --num_levels 1, its DS-MAE: with --no-dynamic. A loss that --dds
does not name is that of the last block alone, with equal weights.

Not in the paper, our choice or our reading (docs/ddae.md has the reasons and all others)
    masks     BootMAE's two stages, without its last step, in which up to three patches are revealed again
    weights   softmax and maximum per image; no gradient through the maximum: with it beta diverges
    eqs. 3, 5 mean squared errors of a patch's values; the final LayerNorm before the decoders, at every level
    eq. (6)   the norm of h before rescaling, times sqrt(n_masked): otherwise it hardly depends on beta
    targets   pixels normalised per patch and channel; features under a LayerNorm without parameters
    teacher   momentum of appendix A (sec. 3.3: .9999 throughout), linear between epochs 0, 100, 400

    python ddae.py --demo                                            two minutes on a CPU
    torchrun --nproc_per_node 4 ddae.py --epochs 800                 the paper's run, images in data/imagenet
    torchrun --nproc_per_node 4 ddae.py --epochs 800 --resume        carry on after a stop
    python ddae.py --data PHOTOS --init encoder.pth --epochs 100     own images, from pre-trained weights
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
    RandomResizedCrop,
    RunConfig,
    ViT,
    adamw,
    fill_from_visible,
    gather_tokens,
    launch,
    load_weights,
    open_data,
    parameter_groups,
    patch_grid,
    patches_to_pixels,
    patchify,
    print0,
    save_image_grid,
    set_lr,
    sincos_pos_embed,
    unpatchify,
    warmup_cosine,
)

DECODERS = {"nano": (128, 4), "tiny": (192, 6)}  # width and heads of the pixel decoder; all others (512, 16)


@dataclass
class Config(RunConfig):
    # model
    model: Literal[*VIT_SIZES] = "base"  # encoder: width, depth and heads of that ViT; paper: small, base
    patch_size: int | None = None  # pixels; default 16, 14 for huge
    decoder: Literal["ddae", "mae"] = "ddae"  # pixel decoder and its target: 2 blocks, or MAE's 8 (table 2)
    decoder_embed_dim: int | None = None  # pixel decoder's width; default 512, less for nano and tiny
    decoder_depth: int | None = None  # blocks of a decoder: 2; --decoder mae: 8 for pixels
    decoder_num_heads: int | None = None  # pixel decoder's heads; default 16, less for nano and tiny
    # method
    mask_ratio: float = 0.75  # share of hidden patches: int(L * mask_ratio) of L
    mask: Literal["two_stage", "block", "random"] = "two_stage"  # blocks, then patches; blocks; patches
    num_levels: int = 4  # K, supervised block outputs (table 6)
    dynamic: bool = True  # weigh hidden patches by eq. (2); --no-dynamic: all alike (table 3)
    distill: bool = True  # feature loss, eq. (5); --no-distill: pixels alone (table 2)
    dds: Literal["both", "pixel", "feature", "none"] = "both"  # which loss is deep and dynamic (table 4)
    beta_init: tuple[float, ...] | None = None  # beta per level, or one for all; default -0.5 (table 7)
    learn_beta: bool = True  # --no-learn_beta fixes beta (table 7)
    reg: Literal["sqrt", "literal", "none"] = "sqrt"  # eq. (6)'s last term: scaled, as printed, none
    target: Literal["channel", "mae", "raw"] | None = None  # pixels: per patch and channel, per patch, raw
    feature_norm: Literal["layer", "instance", "channel", "none"] = "layer"  # see normalize_features
    feature_ramp: float = 0.0  # share of the run in which the feature loss grows from 0 (BootMAE: 0.25)
    momentum: tuple[float, float, float] = (0.999, 0.9999, 0.99999)  # teacher's, at epochs 0, 100, 400
    # optimisation: appendix A; min_lr, betas, clip_grad: MAE's
    epochs: float = 800.0  # passes over the data
    batch_size: int = 4096  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of one process; default: largest divisor <= 256
    base_lr: float = 1.5e-4  # learning rate per 256 images
    min_lr: float = 0.0  # where the cosine ends
    warmup_epochs: float | None = None  # linear warm-up; default a fifth of the epochs, at most 40
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 = no clipping
    # run
    init: str | None = None  # start from these weights (ours, official MAE, timm); a fresh schedule
    draw: str | None = None  # draw what these weights (last.pth) predict, to --out X.png
    pictures: int = 8  # images drawn at each epoch's end; 0 = none

    ranges = RunConfig.ranges | {"beta_init": (-100, 100), "momentum": (0, 1), "feature_ramp": (0, 1)}
    start_from = ("init",)

    def __post_init__(self):
        super().__post_init__()
        depth = VIT_SIZES[self.model][1]
        width, heads = DECODERS.get(self.model, (512, 16))
        self.patch_size = self.patch_size or (14 if self.model == "huge" else 16)
        self.decoder_embed_dim = width = self.decoder_embed_dim or width
        self.decoder_num_heads = heads = self.decoder_num_heads or heads
        self.decoder_depth = self.decoder_depth or {"ddae": 2, "mae": 8}[self.decoder]
        self.target = self.target or {"ddae": "channel", "mae": "mae"}[self.decoder]
        self.warmup_epochs = min(40.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        if depth % self.num_levels:
            raise ValueError(f"--num_levels {self.num_levels} does not divide the {depth} blocks")
        if self.dds == "none" or not self.dynamic:  # equal weights: beta is 0, stays 0, and needs no eq. (6)
            if self.beta_init and any(self.beta_init):
                raise ValueError("--beta_init has no use without a dynamic loss (--no-dynamic, --dds none)")
            self.beta_init, self.learn_beta, self.reg = (0.0,), False, "none"
        beta = self.beta_init or (-0.5,)
        self.beta_init = beta * self.num_levels if len(beta) == 1 else beta
        if len(self.beta_init) != self.num_levels:
            raise ValueError(f"--beta_init has {len(beta)} values, --num_levels is {self.num_levels}")
        if self.dds == "feature" and not self.distill:
            raise ValueError("--dds feature needs the feature loss that --no-distill takes away")
        if width % 4 or width % heads:
            raise ValueError(f"--decoder_embed_dim {width}: not divisible by 4, --decoder_num_heads {heads}")
        self.grid = patch_grid(self.img_size, self.patch_size)
        L = math.prod(self.grid)
        self.n_masked = int(L * self.mask_ratio)
        if not 0 < self.n_masked < L:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {L} patches hides none or all of them")


# Raw pixels in the demo: drawn shapes are flat, and a flat patch minus its mean leaves nothing to predict.
# The teacher of a run of a thousand updates must follow faster than that of a quarter of a million.
DEMO = {"data": "shapes", "img_size": (25, 25), "model": "nano", "patch_size": 5, "target": "raw",
        "num_levels": 2, "decoder_depth": 1, "decoder_embed_dim": 64, "decoder_num_heads": 2,
        "momentum": (0.99,) * 3, "epochs": 1.4, "batch_size": 32, "base_lr": 1.2e-2, "warmup_epochs": 0.3,
        "log_every": 25}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- masks, weights, targets, losses -----------------------------------------------------------------------


def block_mask(grid, n_masked, n_block):
    """Hide rectangles, BootMAE's way, until n_block patches are hidden, then single patches: n_masked in all.

    Returns (h, w) bool, True = hidden. A rectangle's area is uniform between 16/196 of the grid and 60/196,
    or what remains to hide; its aspect is log-uniform between .3 and 1/.3. It is drawn again if it is as high
    or as wide as the grid (in a grid too thin for any it is cut), hides nothing new, or too much.
    """
    h, w = grid
    mask, remaining, numbers = np.zeros(grid, bool), n_block, []
    smallest, largest = h * w * 16 / 196, h * w * 60 / 196
    highest, widest = max(h - 1, 1), max(w - 1, 1)
    thin = round(math.sqrt(smallest)) > min(highest, widest)
    while remaining:
        numbers = numbers or torch.rand(32, 4).tolist()  # one call is as fast as one number
        u_area, u_aspect, u_row, u_column = numbers.pop()
        side = math.sqrt(smallest + (min(largest, remaining) - smallest) * u_area)
        stretch = 0.3 ** (u_aspect - 0.5)  # root of the aspect
        height, width = round(side * stretch), round(side / stretch)
        if thin:
            height, width = min(height, highest), min(width, widest)
        if not (0 < height <= highest and 0 < width <= widest):
            continue
        row, column = int(u_row * (h - height + 1)), int(u_column * (w - width + 1))
        block = mask[row : row + height, column : column + width]
        new = height * width - np.count_nonzero(block)
        if 0 < new <= remaining:
            block[:], remaining = True, remaining - new
    order = np.argpartition(torch.rand(h, w).numpy().ravel() - mask.ravel(), n_masked)  # rectangles first
    mask.ravel()[order[:n_masked]] = True
    return mask


def distance_map(mask):
    """D(m), sec. 3.2: (h, w), True = hidden -> float32 (L,), Euclidean distance to the nearest visible patch,
    in patches: at least 1 on hidden ones, 0 on visible ones, so that it says what is hidden too."""
    return torch.from_numpy(distance_transform_edt(mask).ravel()).float()


def sample_mask(cfg):
    """What the loader draws for a sample: the distance map (L,) of a new mask."""
    two_stage = round(cfg.n_masked * 120 / 147)  # BootMAE's numbers, of 196 patches
    n_block = {"two_stage": two_stage, "block": cfg.n_masked, "random": 0}[cfg.mask]
    return distance_map(block_mask(cfg.grid, cfg.n_masked, n_block))


def dynamic_weights(distance, beta):
    """h, eq. (2): softmax of D^beta over an image's hidden patches; and weight, h over its maximum.
    distance: (B, L), 0 = visible; beta: (K,). Returns both as (K, B, L) float32, 0 on visible patches."""
    at_least_1 = distance.float().clamp(min=1)  # on visible patches too: 0^beta has NaN gradients
    scores = at_least_1.pow(beta.view(-1, 1, 1))
    h = scores.masked_fill(distance == 0, -torch.inf).softmax(-1)  # exp(11^5) would overflow
    return h, h / h.detach().amax(-1, keepdim=True)  # sec. 3.2; detached, or beta diverges


def weighted_mse(pred, target, weight, mask):
    """Eq. (3) or (5), summed over levels with lambda_i: .75, and 1 for the last. The error of a level is the
    weighted sum over patches of the mean over values, divided by the number of hidden patches: MAE's loss if
    all weights are equal. pred: (K or 1, B, L, values); target: the same, or (B, L, values); weight: (K or 1,
    B, L); mask: (B, L)."""
    error = ((pred - target).square().mean(-1) * weight).sum((1, 2)) / mask.sum()  # (K,)
    return 0.75 * error[:-1].sum() + error[-1]


def regulariser(h, mask, literal=False):
    """Eq. (6)'s last term without its factor: sum over levels of the mean over images of ||h||_2, times the
    root of an image's number of hidden patches unless `literal`. h: (K, B, L); mask: (B, L)."""
    norm = torch.linalg.vector_norm(h, dim=-1).mean(1).sum()
    return norm if literal else norm * mask[0].sum().sqrt()


def pixel_target(images, patch_size, kind):
    """(B, C, H, W) -> normalised patches (B, L, p*p*C), and the mean and deviation used (broadcastable).
    kind: mae: of all values, unbiased, eps 1e-6; channel: per channel, biased, eps 1e-5; raw: 0 and 1."""
    patches = patchify(images, patch_size)
    if kind == "raw":
        mean, deviation = torch.zeros_like(patches[..., :1]), torch.ones_like(patches[..., :1])
    elif kind == "mae":
        mean, deviation = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    else:
        variance, mean = torch.var_mean(patches.unflatten(-1, (-1, images.shape[1])), dim=2, correction=0)
        mean, deviation = (x.repeat(1, 1, patch_size**2) for x in (mean, (variance + 1e-5).sqrt()))
    return (patches - mean) / deviation, mean, deviation


def normalize_features(features, wanted, kind):
    """What eq. (5) compares, from predictions and the teacher's features (K or 1, B, L, D). layer: both under
    a LayerNorm without parameters; instance: the same, the image's mean token subtracted from the target
    before; channel: the target's channels of deviation 1 over all tokens of the micro-batch; none. All but
    layer are experiments of ours: an untrained teacher's features are nearly one vector."""
    if kind == "channel":
        deviation, mean = torch.std_mean(wanted, (1, 2), keepdim=True)
        return features, (wanted - mean) / (deviation + 1e-5)
    if kind == "instance":
        wanted = wanted - wanted.mean(2, keepdim=True)
    if kind == "none":
        return features, wanted
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in (features, wanted))


def shares_of_target(wanted):
    """How much of a target's (B, L, D) mean square is explained by one vector for all tokens; beyond that, by
    one vector per position, and by one per image: {name: share}. For the log."""
    total = wanted.square().mean()
    constant, position, image = (wanted.mean(axes).square().mean() / total for axes in ((0, 1), 0, 1))
    return {"target/constant": constant, "target/position": position - constant,
            "target/image": image - constant}


# ---- model -------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Tokens of the visible patches -> predictions for all: projection, mask tokens, blocks, norm, head."""

    def __init__(self, in_dim, width, depth, num_heads, out_dim, grid):
        super().__init__()
        self.embed = nn.Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, grid), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, out_dim)

    def forward(self, latent, ids_restore):
        """All levels as one batch: (K, B, 1 + len_keep, in_dim), (B, L) -> (K, B, L, out_dim)"""
        K, B, L = len(latent), *ids_restore.shape
        x = self.embed(latent.flatten(0, 1))
        hidden = self.mask_token.to(x.dtype).expand(K * B, L - (x.shape[1] - 1), -1)
        patches = gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), ids_restore.repeat(K, 1))  # unshuffled
        x = self.blocks(torch.cat([x[:, :1], patches], dim=1) + self.pos_embed)
        return self.pred(self.norm(x[:, 1:])).unflatten(0, (K, B))


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
        self.beta = nn.Parameter(torch.tensor(cfg.beta_init), requires_grad=cfg.learn_beta)
        self.init_weights()
        self.update_teacher(0.0)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """Eq. (4); a momentum of 0 copies the student."""
        if self.cfg.distill:
            student = [self.get_parameter(name) for name, _ in self.teacher.named_parameters()]
            torch._foreach_lerp_(list(self.teacher.parameters()), student, 1 - momentum)

    def outputs(self, encoder, x):
        """Tokens through the encoder's blocks: the levels' outputs, unnormalised (K, B, N, D)."""
        outputs = []
        for i, block in enumerate(encoder.blocks, start=1):
            x = block(x)
            if i in self.levels:
                outputs.append(x)
        return torch.stack(outputs)

    def encode(self, images, distance):
        """Visible patches through the student: latent (K, B, 1 + len_keep, D), normed; ids_restore (B, L)."""
        len_keep = distance.shape[1] - self.cfg.n_masked
        ids_shuffle = (distance > 0).byte().argsort(dim=1, stable=True)  # visible patches first
        x = self.prepend_cls(gather_tokens(self.embed(images), ids_shuffle[:, :len_keep]))
        return self.norm(self.outputs(self, x)), ids_shuffle.argsort(dim=1)

    @torch.no_grad()
    def feature_target(self, images):
        """Momentum encoder on the whole image: every level's patch tokens (K, B, L, D)."""
        return self.outputs(self.teacher, self.teacher.prepend_cls(self.teacher.embed(images)))[:, :, 1:]

    def forward(self, images, distance, ramp=1.0):
        """Returns the loss, eq. (6), and its terms: eqs. (3), (5), (6) as added; mse, the last level's mean
        squared error on hidden patches, comparable between runs of one --target; beta under its block's
        number. ramp: the weight of eq. (5)."""
        cfg = self.cfg
        deep_pixel, deep_feature = (cfg.dds in ("both", kind) for kind in ("pixel", "feature"))
        latent, ids_restore = self.encode(images, distance)
        pred = self.pixel_decoder(latent if deep_pixel else latent[-1:], ids_restore)
        if cfg.distill:
            features = self.feature_decoder(latent if deep_feature else latent[-1:], ids_restore)
            wanted = self.feature_target(images)[-len(features):]
        with torch.autocast(images.device.type, enabled=False):  # targets and losses in float32
            mask = (distance > 0).float()
            h, weight = dynamic_weights(distance, self.beta)
            pred = pred.float()
            target, *_ = pixel_target(images.float(), self.patch_size, cfg.target)
            terms = {"eq3_pixel": weighted_mse(pred, target, weight if deep_pixel else mask[None], mask)}
            if cfg.distill:
                features, wanted = normalize_features(features.float(), wanted.float(), cfg.feature_norm)
                weight = weight if deep_feature else mask[None]
                terms["eq5_distill"] = ramp * weighted_mse(features, wanted, weight, mask)
            if cfg.reg != "none":
                terms["eq6_reg"] = 0.5 * regulariser(h, mask, cfg.reg == "literal")
            loss = sum(terms.values())
            terms |= shares_of_target(wanted[-1]) if cfg.distill else {}
            terms |= {"loss": loss, "mse": weighted_mse(pred[-1:].detach(), target, mask[None], mask)}
        terms |= {f"beta/{i}": beta for i, beta in zip(self.levels, self.beta.unbind(), strict=True)}
        return loss, {name: value.detach() for name, value in terms.items()}


# ---- training ----------------------------------------------------------------------------------------------


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches, and of the teacher; returns the loss's terms as floats."""
    optimizer.zero_grad(set_to_none=True)
    total = {}
    done = min(1.0, run.step / run.steps / run.cfg.feature_ramp) if run.cfg.feature_ramp else 1.0
    ramp = torch.full((), done, device=run.device)  # a tensor: no recompilation
    for images, distance in run.micro_batches(model, batches):
        with run.autocast():
            loss, terms = model(images, distance, ramp)
        scaler.scale(loss / run.accum_steps).backward()
        total = {name: total.get(name, 0) + term / run.accum_steps for name, term in terms.items()}
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.cfg.clip_grad or math.inf)
    terms, finite = run.agree(total, grad_norm)  # the one host synchronisation
    if finite:
        scaler.step(optimizer)
        momentum = np.interp(run.epoch, (0, 100, 400), run.cfg.momentum)  # appendix A: linear between
        getattr(model, "module", model).update_teacher(momentum)  # `module`: the model in DDP's wrapper
    scaler.update()
    return terms


@torch.no_grad()
def save_pictures(path, model, examples, run):
    """PNG: original, masked input, distance map, weights of each level, prediction, and it pasted in."""
    (images, distance), p, grid, cfg = examples, model.patch_size, model.grid, model.cfg
    mask, (_, weight) = (distance > 0).float(), dynamic_weights(distance, model.beta)
    _, *statistics = pixel_target(images, p, cfg.target)
    mean, deviation = (fill_from_visible(values, mask, grid) for values in statistics)
    latent, ids_restore = model.encode(images, distance)
    pred = unpatchify(model.pixel_decoder(latent[-1:], ids_restore)[0] * deviation + mean, p, grid)
    original, pred = run.normalize.undo(images), run.normalize.undo(pred)
    nearness = 1 - distance / distance.amax(1, keepdim=True)
    hidden, *maps = (patches_to_pixels(x[..., None], p, grid) for x in (mask, nearness, *weight))
    masked, pasted = torch.where(hidden > 0, 0.5, original), torch.where(hidden > 0, pred, original)
    titles = "original", "masked", "distance", *(f"weight {i}" for i in model.levels), "prediction", "pasted"
    rows = list(zip(original, masked, *maps, pred, pasted, strict=True))
    betas = ", ".join(f"{beta:.3f}" for beta in model.beta.tolist())
    units = "raw pixels" if cfg.target == "raw" else "un-normalised with the statistics of visible patches"
    save_image_grid(path, rows, titles,
                    "distance: white is visible, darker is farther; weights of levels, by their last block: "
                    f"black is visible, white is 1; beta {betas}; target {cfg.target}, {cfg.mask_ratio:.0%} "
                    f"hidden; prediction {units}")


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    model = DeepDynamicAutoEncoder(cfg)
    if cfg.init:
        missing = ("pixel_decoder.", "feature_decoder.", "teacher.", "beta")
        ignore = ("head.", "fc_norm.", "decoder", "mask_token", "fuse_", "teacher.", "beta")
        ignore += () if cfg.distill else ("feature_decoder.",)
        load_weights(model, cfg.init, allow_missing=missing, ignore=ignore, prefix="")
        model.update_teacher(0.0)
    sample_noise = functools.partial(sample_mask, cfg)  # the loader's "noise" is the distance map
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures)
    run.fit_batch(source)  # small data: a smaller batch, another base_lr
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    run.start(len(source), f"lr {peak_lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 256")
    first, last = 1 / (1 - np.interp((0, cfg.epochs), (0, 100, 400), cfg.momentum)).clip(1e-9)
    if cfg.distill and (first > run.steps / 3 or last > run.steps):
        print0(f"warning: the teacher averages up to {max(first, last):.0f} updates, of {run.steps}: lower "
               "--momentum")
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler)  # what is saved; the teacher is in the model
    batches = run.batches(source, RandomResizedCrop(cfg.img_size), sample_noise)
    examples = run.examples(source, sample_noise)

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples, run)
        if run.save_due():
            run.save(model.trunk_state())
    run.finish()


if __name__ == "__main__":
    launch(Config, presets, train, "ddae")
