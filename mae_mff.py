"""MAE and its multi-level feature fusion (MFF), with the PixMIM target.

MAE     He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv 2111.06377
MFF     Liu et al., Improving Pixel-based MIM by Reducing Wasted Modeling Capability, ICCV 2023, 2308.00261
PixMIM  Liu et al., Rethinking Pixel Reconstruction in Masked Image Modeling, arXiv 2303.02416

Idea. Hide 75 % of an image's patches, encode the visible ones, let a small decoder fill in the hidden ones.
A pixel target pulls low-level detail into the last block; MFF hands the decoder that detail from shallow
blocks instead, so that the last block is free for semantics. PixMIM takes the finest detail from the target.

Data flow, in the order of the code (its names and shapes on the right)
    x                 visible patches + positions, class token first         latent   (B, 1 + len_keep, D)
    x_i = block_i(x_{i-1})                    output of block i, unnormalised
    y_i = W_i x_i + b_i   for each fused i but the last; y_last = x_last     fuse_proj
    z = sum_i softmax(w)_i y_i                w starts at ones               fuse_weight
    p = decoder([LN(z), mask tokens, positions])                             pred     (B, L, p*p*C)
    t = (patch - mean) / sqrt(var + 1e-6)     per patch, unbiased variance   target   (B, L, p*p*C)
    loss = mean over hidden patches of mean over values of (p - t)^2         masked_mse
Only pre-training fuses: encoder.pth is a plain ViT, final LayerNorm included.
--fuse_layers 11 (the last block alone): MAE. --target pixmim: MFF_PixMIM.

Our choice: no weight decay for w; decoders of sizes that the papers do not train (DECODERS); six fused
blocks, evenly spaced, in encoders of another depth than 12; the low-pass radius scaled with the image side.
From the released code: the low-pass disc is centred between bins; the loss is a mean over the whole batch.

    python mae_mff.py --demo                                          two minutes on a CPU
    torchrun --nproc_per_node 4 mae_mff.py --epochs 800               the paper's run, images in data/imagenet
    torchrun --nproc_per_node 4 mae_mff.py --epochs 800 --resume      carry on after a stop
    python mae_mff.py --data PHOTOS --init encoder.pth --epochs 100   own images, from pre-trained weights
    python mae_mff.py --data PHOTOS --draw last.pth --out photos.png  what it fills in
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

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
    resize_to_cover,
    save_image_grid,
    set_lr,
    sincos_pos_embed,
    unpatchify,
    warmup_cosine,
)

# Width, blocks and heads: MAE sec. 4.1 from base on, the MFF authors' code for small, the others ours.
DECODERS = {"nano": (128, 1, 4), "tiny": (192, 4, 6), "small": (384, 8, 12)}
DECODERS |= dict.fromkeys(("base", "large", "huge"), (512, 8, 16))


@dataclass
class Config(RunConfig):
    # model
    model: Literal[*VIT_SIZES] = "base"  # encoder: width, depth and heads of that ViT
    patch_size: int | None = None  # pixels; default 16, 14 for huge
    decoder_embed_dim: int | None = None  # decoder width; default matches the encoder
    decoder_depth: int | None = None  # decoder blocks; likewise
    decoder_num_heads: int | None = None  # decoder heads; likewise
    # method
    mask_ratio: float = 0.75  # share of hidden patches
    fuse_layers: tuple[int, ...] | None = None  # blocks to fuse, from 0; default 0,2,4,6,8,11 (MFF table 4)
    detach_shallow: bool = False  # no gradient through the shallow shortcuts (MFF sec. A.8)
    target: Literal["mae", "raw", "pixmim"] = "mae"  # normalised, raw or low-pass pixels
    crop: Literal["rrc", "src"] | None = None  # random resized crop, or PixMIM's simple one
    # optimisation: MFF appendix, table 1 (MAE's)
    epochs: float = 800.0  # passes over the data
    batch_size: int = 4096  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of one process; default: up to 256
    base_lr: float = 1.5e-4  # learning rate per 256 images
    min_lr: float = 0.0  # where the cosine ends
    warmup_epochs: float | None = None  # linear warm-up; default a fifth, at most the papers' 40
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 = no clipping
    # run
    init: str | None = None  # start from these weights (ours, official MAE, timm); a fresh schedule
    draw: str | None = None  # draw what these weights (last.pth, official MAE's) fill in, to --out X.png
    pictures: int = 8  # images drawn at each epoch's end; 0 = none

    ranges = RunConfig.ranges | {"fuse_layers": (0, 100)}
    start_from = ("init",)

    def __post_init__(self):
        super().__post_init__()
        depth = VIT_SIZES[self.model][1]
        width, blocks, heads = DECODERS[self.model]
        self.patch_size = self.patch_size or (14 if self.model == "huge" else 16)
        self.decoder_embed_dim = self.decoder_embed_dim or width
        self.decoder_depth = self.decoder_depth or blocks
        self.decoder_num_heads = self.decoder_num_heads or heads
        self.fuse_layers = self.fuse_layers or tuple(sorted({i * (depth - 1) // 5 for i in range(6)}))
        self.warmup_epochs = min(40.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        self.crop = self.crop or ("src" if self.target == "pixmim" else "rrc")
        layers = list(self.fuse_layers)
        if layers != sorted(set(layers)) or layers[-1] != depth - 1:
            raise ValueError(f"--fuse_layers {layers} must rise and end with the last block, {depth - 1}")
        if self.decoder_embed_dim % 4 or self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(f"--decoder_embed_dim {self.decoder_embed_dim} must be a multiple of 4 and of "
                             f"--decoder_num_heads {self.decoder_num_heads}")
        L = math.prod(patch_grid(self.img_size, self.patch_size))
        if not 0 < int(L * (1 - self.mask_ratio)) < L:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {L} patches hides none or all of them")


# Raw pixels in the demo: drawn shapes are flat, and a flat patch minus its mean leaves nothing to predict.
DEMO = {"data": "shapes", "img_size": (32, 32), "model": "nano", "patch_size": 4, "target": "raw",
        "decoder_embed_dim": 64, "decoder_num_heads": 2, "epochs": 1.3, "batch_size": 32, "base_lr": 1.6e-2,
        "warmup_epochs": 0.25, "log_every": 25}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- masking and targets -----------------------------------------------------------------------------------


def random_masking(noise, mask_ratio):
    """Which patches stay visible: those with the smallest noise.

    noise: (B, L). Returns ids_keep (B, len_keep), ids_restore (B, L), mask (B, L) float, 1 = hidden;
    len_keep = int(L * (1 - mask_ratio)). Equal noise gives equal masks.
    """
    len_keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :len_keep], ids_restore, (ids_restore >= len_keep).float()


def low_pass(images, radius=40.0 / 224):
    """PixMIM's target filter on images (B, C, H, W) in [0, 1]: keep the frequencies within `radius` (a share
    of the side) of the spectrum's centre. As in the released code this is (n - 1) / 2, half a bin off the
    zero frequency, so the inverse transform is not real: returns its magnitude."""
    rows, columns = (torch.arange(n, device=images.device) - (n - 1) / 2 for n in images.shape[-2:])
    disc = (rows / (radius * len(rows)))[:, None] ** 2 + (columns / (radius * len(columns))) ** 2 <= 1
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * disc, dim=(-2, -1))).abs()


def patch_target(images, patch_size, normalised=True):
    """(B, C, H, W) -> (B, L, p*p*C): pixels, normalised per patch over all values (unbiased, eps 1e-6)."""
    target = patchify(images, patch_size)
    if not normalised:
        return target
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_mse(pred, target, mask):
    """Mean squared error on the hidden patches (MAE sec. 3).

    pred, target: (B, L, p*p*C); mask: (B, L), 1 = hidden, at least one. Returns a scalar: mean over the
    values of a patch, then over all hidden patches of the batch.
    """
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


# ---- model -------------------------------------------------------------------------------------------------


class MaskedAutoencoder(ViT):
    """Encoder, fusion and decoder. Names of the encoder's and decoder's parameters are MAE's."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.cfg, self.fuse_layers = cfg, cfg.fuse_layers
        D, width = self.embed_dim, cfg.decoder_embed_dim
        if len(self.fuse_layers) > 1:
            self.fuse_proj = nn.ModuleList(nn.Linear(D, D) for _ in self.fuse_layers[:-1])
            self.fuse_weight = nn.Parameter(torch.ones(len(self.fuse_layers)))
        self.decoder_embed = nn.Linear(D, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(width, self.grid), requires_grad=False)
        blocks = (Block(width, cfg.decoder_num_heads) for _ in range(cfg.decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, cfg.patch_size**2 * cfg.in_chans)
        for name, values in (("pixel_mean", cfg.mean), ("pixel_std", cfg.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.init_weights()

    def encode(self, images, ids_keep):
        """Visible patches through all blocks: fused, normalised tokens (B, 1 + len_keep, D)."""
        x = self.embed(images)
        x = self.prepend_cls(gather_tokens(x, ids_keep))
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = block(x)  # the chain goes on from x, never from a projection
            if i in self.fuse_layers:
                outputs[i] = x
        return self.norm(self.fuse(outputs))

    def fuse(self, outputs):
        """z = sum_i softmax(w)_i y_i; y_i = Linear_i(x_i), the last block unprojected. outputs: {i: x_i}."""
        *shallow, last = outputs.values()
        if not shallow:
            return last
        if self.cfg.detach_shallow:
            shallow = [x.detach() for x in shallow]
        y = [linear(x) for linear, x in zip(self.fuse_proj, shallow, strict=True)] + [last]
        return sum(w * y_i for w, y_i in zip(self.fuse_weight.softmax(0), y, strict=True))

    def fuse_shares(self):
        """softmax(w) under the layers' numbers, {name: detached scalar}; {} without fusion."""
        if len(self.fuse_layers) == 1:
            return {}
        shares = self.fuse_weight.detach().softmax(0).unbind()
        return {f"fuse_weight/{i}": share for i, share in zip(self.fuse_layers, shares, strict=True)}

    def decode(self, latent, ids_restore):
        """(B, 1 + len_keep, D) -> predicted patches (B, L, p*p*C)."""
        x = self.decoder_embed(latent)
        B, L = ids_restore.shape
        hidden = self.mask_token.to(x.dtype).expand(B, L - (x.shape[1] - 1), -1)
        patches = gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)  # undo the shuffle
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def target(self, images):
        """What is to be predicted for normalised images: (B, L, p*p*C)."""
        if self.cfg.target == "pixmim":
            pixels = images * self.pixel_std + self.pixel_mean
            images = (low_pass(pixels) - self.pixel_mean) / self.pixel_std
        return patch_target(images, self.patch_size, normalised=self.cfg.target != "raw")

    def predict(self, images, noise):
        """(B, C, H, W), noise (B, L) -> pred (B, L, p*p*C), mask (B, L), 1 = hidden."""
        ids_keep, ids_restore, mask = random_masking(noise, self.cfg.mask_ratio)
        return self.decode(self.encode(images, ids_keep), ids_restore), mask

    def forward(self, images, noise):
        """Returns the loss and its terms: the loss, and softmax(w) under the layers' numbers (MFF fig. 1)."""
        pred, mask = self.predict(images, noise)
        with torch.autocast(images.device.type, enabled=False):  # target and loss in float32
            loss = masked_mse(pred.float(), self.target(images.float()), mask)
        return loss, {"loss": loss.detach()} | self.fuse_shares()


# ---- training ----------------------------------------------------------------------------------------------


class SimpleResizedCrop:
    """PixMIM's crop: short side to the image size, bilinear, then a random crop with a border of 4 px."""

    def __init__(self, size):
        self.size, self.crop = size, v2.RandomCrop(size, padding=4, padding_mode="reflect")

    def __call__(self, image):
        return self.crop(resize_to_cover(image, self.size, InterpolationMode.BILINEAR))


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches; returns the loss's terms, their means as floats."""
    optimizer.zero_grad(set_to_none=True)
    total = {}
    for images, noise in run.micro_batches(model, batches):
        with run.autocast():
            loss, terms = model(images, noise)
        scaler.scale(loss / run.accum_steps).backward()
        total = {name: total.get(name, 0) + term / run.accum_steps for name, term in terms.items()}
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.cfg.clip_grad or math.inf)
    terms, finite = run.agree(total, grad_norm)  # the one host synchronisation
    if finite:
        scaler.step(optimizer)
    scaler.update()
    return terms


@torch.no_grad()
def save_pictures(path, model, examples, run):
    """PNG with original, masked input, prediction, and the prediction pasted into the visible patches."""
    (images, noise), p, grid, cfg = examples, model.patch_size, model.grid, model.cfg
    pred, mask = model.predict(images, noise)
    caption = f"target {cfg.target}, {cfg.mask_ratio:.0%} hidden"
    if cfg.target != "raw":
        statistics = torch.std_mean(patchify(images, p), -1, keepdim=True)
        std, mean = (fill_from_visible(values, mask, grid) for values in statistics)
        pred = pred * std + mean
        caption += "; un-normalised with the statistics of visible patches only"
    original, pred = run.normalize.undo(images), run.normalize.undo(unpatchify(pred, p, grid))
    hidden = patches_to_pixels(mask[..., None], p, grid) > 0
    columns = original, torch.where(hidden, 0.5, original), pred, torch.where(hidden, pred, original)
    titles = ["original", "masked", "prediction", "pasted"]
    save_image_grid(path, list(zip(*columns, strict=True)), titles, caption)


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    model = MaskedAutoencoder(cfg)
    sample_noise = functools.partial(torch.rand, math.prod(model.grid))
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures)
    if cfg.init:
        missing = ("decoder", "mask_token", "fuse_")
        load_weights(model, cfg.init, allow_missing=missing, ignore=("head.", "fc_norm."), prefix="")
    run.fit_batch(source)
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    run.start(len(source), f"lr {peak_lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 256")
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    crop = SimpleResizedCrop(cfg.img_size) if cfg.crop == "src" else RandomResizedCrop(cfg.img_size)
    batches, examples = run.batches(source, crop, sample_noise), run.examples(source, sample_noise)

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
    launch(Config, presets, train, "mae_mff")
