"""CIM whose generator has no tokens: an MAE that paints pixels, or random erasing.

Extends cim.py, whose enhancers, target, update and pictures it uses; read that first. Both generators are
ablations of the same paper, and worse there. The MAE (He et al., CVPR 2022, arXiv 2111.06377) is the
generator of vision_electra.py.

Idea. The enhancer restores the pixels of the true image, whatever has corrupted it. An MAE, trained
together with it, paints the hidden patches, or noise covers half of the image. Neither needs a tokenizer, and
neither serves RevDet.

Data flow, in the order of the code (source, then name and shape in the code)
--generator mae
    m     = 98 of 196 patches                            table 10                   mask (B, L), 1 = hidden
    q     = decoder(encoder(visible patches))            MAE 3; raw pixels: ours    pred (B, L, p*p*C)
    L_gen = mean over hidden patches of (q - x)^2        MAE 3                      generator_loss
    x^    = q + sigma e, e ~ N(0, 1), at m; x elsewhere  A.1; Gaussian: ours        corrupted (B, C, H, W)
    loss  = L_gen + 10 ResPix                            as there                   forward of cim.py
--generator erase
    m     = a box of half of an image's area             3.3; one box: ours         erased_boxes (B, 1, H, W)
    x^    = uniform noise at m; x elsewhere              3.3                        corrupted (B, C, H, W)
    loss  = 10 ResPix, means over m alone                3.3                        forward
encoder.pth is the enhancer, as there.

Ours: sigma = 0.1 of colours in [0, 1] (--rgb_std), which are cut to these; boxes of a log-uniform aspect.

    python cim_pixels.py --demo                                                        two minutes on a CPU
    torchrun --nproc_per_node 4 cim_pixels.py                                          table 10
    torchrun --nproc_per_node 4 cim_pixels.py --generator erase --enhancer resnet50    sec. 3.3
    torchrun --nproc_per_node 4 cim_pixels.py --generator_init mae_visualize_vit_base.pth \\
        --generator_target raw --freeze_generator                                      MAE's own file
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from cim import CorruptedImageModel, load_enhancer, pixel_statistics, save_pictures, train_step
from cim import presets as presets_of_cim
from common import (
    VIT_SIZES,
    Normalize,
    RandomResizedCrop,
    RunConfig,
    UserError,
    adamw,
    launch,
    load_weights,
    open_data,
    parameter_groups,
    patch_grid,
    patchify,
    read_file,
    set_lr,
    unpatchify,
    warmup_cosine,
)
from vision_electra import Generator, masked_mse


@dataclass
class Config(RunConfig):
    # model
    enhancer: Literal["vit", "resnet50"] = "vit"  # the network that is pre-trained
    model: Literal[*VIT_SIZES] | None = None  # ViT, generator's width; default base, with a ResNet small
    patch_size: int = 16  # pixels
    resnet_width: int = 64  # ResNet: channels of its stem; 64 is x1, 128 x2, 256 x4
    generator: Literal["mae", "erase"] = "mae"  # paints hidden patches (table 10); erases a box (sec. 3.3)
    generator_depth: int | None = None  # blocks of the MAE's encoder; default those of --model
    initial: Literal["beit", "mae"] = "beit"  # values of the ViT; mae: sine-cosine positions, for short runs
    # method
    num_masked: tuple[int, int] | None = None  # patches hidden from the MAE, one number; default half
    rgb_std: float = 0.1  # deviation of the MAE's colours, of values in [0, 1]
    pixel_norm: Literal["window", "patch", "none"] = "window"  # ResPix's target (table 6)
    window: int = 8  # pixels of a window's side; small patches want half of theirs, as the paper's 8 of 16
    window_per_channel: bool = False  # a window's mean and deviation per channel
    generator_init: str | None = None  # the MAE from one of raw pixels, ours (last.pth) or official
    generator_target: Literal["raw"] | None = None  # of a file that does not say what it predicts
    freeze_generator: bool = False  # and leave it as it is (A.1)
    # optimisation: table 13
    epochs: float = 300.0  # passes over the data
    batch_size: int = 2048  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of one process; default: the largest up to 256
    lr: float = 1.5e-3  # peak learning rate, absolute: not scaled with the batch
    min_lr: float = 1e-5  # where the cosine ends (BEiT's)
    warmup_epochs: float | None = None  # linear warm-up; default a fifth of the epochs, at most 10
    weight_decay: float = 0.05  # AdamW; none for positions and class tokens (BEiT's)
    betas: tuple[float, float] = (0.9, 0.98)  # AdamW
    clip_grad: float = 3.0  # largest gradient norm; 0 = no clipping
    # run
    init: str | None = None  # enhancer from these weights (ours, timm, torchvision); a fresh schedule
    draw: str | None = None  # draw what these weights (last.pth) predict, to --out X.png
    pictures: int = 8  # images drawn at each epoch's end; 0 = none

    start_from = ("init", "generator_init")
    objective, share, sampling = "respix", False, "colours"  # what is a flag in cim.py, and not here

    def __post_init__(self):
        super().__post_init__()
        self.model = self.model or ("base" if self.enhancer == "vit" else "small")
        self.grid = patch_grid(self.img_size, self.patch_size)
        depth, L = VIT_SIZES[self.model][1], math.prod(self.grid)
        self.generator_depth = self.generator_depth or depth
        self.warmup_epochs = min(10.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        low, high = self.num_masked = self.num_masked or (round(L / 2),) * 2
        if not 0 < low == high < L:
            raise ValueError(f"--num_masked {low},{high}: expected one number, 1 to {L - 1}, of {L} patches")
        if self.generator == "erase" and self.generator_init:
            raise ValueError("--generator erase has no network for --generator_init")
        if self.generator_depth > depth:
            raise ValueError(f"--generator_depth {self.generator_depth}: at most {depth}")
        if self.freeze_generator and not self.generator_init:
            raise ValueError("--freeze_generator needs --generator_init")
        if self.enhancer == "resnet50" and (any(n % 32 for n in self.img_size) or 32 % self.patch_size):
            raise ValueError("a ResNet needs an --img_size of n x 32 and a --patch_size that divides 32")


def presets(flags):
    return presets_of_cim(flags) | {"generator_depth": None, "num_masked": None}


# ---- an MAE that paints ------------------------------------------------------------------------------------


class PaintedImages(CorruptedImageModel):
    """Its generator is an MAE."""

    def __init__(self, cfg):
        generator = Generator(cfg)
        generator.blocks = generator.blocks[: cfg.generator_depth]
        super().__init__(cfg, generator)

    def corrupt(self, pixels, noise, k):
        """The k smallest of noise (B, L) are hidden, always as many. Returns what cim.py's `corrupt` does."""
        images, n, p = self.normalize(pixels), self.cfg.num_masked[0], self.cfg.patch_size
        order = noise.argsort(1)
        rank = order.argsort(1)
        mask = rank < n
        latent = self.generator.encode(images, order[:, n:])
        pred = self.generator.decode(latent, (rank - n) % rank.shape[1]).float()  # it puts visible ones first
        loss = masked_mse(pred, patchify(images, p), mask)
        colours = self.pixel_mean + self.pixel_std * unpatchify(pred.detach(), p, self.cfg.grid)
        sampled = (colours + self.cfg.rgb_std * torch.randn_like(colours)).clamp(0, 1)
        corrupted = torch.where(self.image_of(mask) > 0, sampled, pixels)
        return corrupted, mask, mask, loss, {"generator_loss": loss}


# ---- random erasing ----------------------------------------------------------------------------------------


def erased_boxes(noise, size, share=0.5):
    """Random erasing: (B, 1, H, W) bool, True in a box of this share of an image's area, of a log-uniform
    aspect in .3 to 1/.3 that fits. Of noise (B, L) the first three numbers place it."""
    (H, W), (u_aspect, u_top, u_left) = size, noise[:, :3, None].unbind(1)
    area = share * H * W
    low, high = math.log(max(0.3, area / W**2)), math.log(min(1 / 0.3, H**2 / area))
    root = (0.5 * (low + (high - low) * u_aspect)).exp()
    h, w = (math.sqrt(area) * root).round(), (math.sqrt(area) / root).round()
    top, left = (u_top * (H - h + 1)).floor(), (u_left * (W - w + 1)).floor()
    rows, columns = torch.arange(H, device=noise.device), torch.arange(W, device=noise.device)
    inside = (rows >= top) & (rows < top + h), (columns >= left) & (columns < left + w)
    return (inside[0][:, :, None] & inside[1][:, None])[:, None]


class ErasedImages(CorruptedImageModel):
    """The enhancer alone."""

    def __init__(self, cfg):
        super().__init__(cfg, None)

    def image_of(self, mask):
        return mask.float()

    def corrupt(self, pixels, noise, k):
        """Returns the corrupted image, and its erased pixels (B, 1, H, W) bool as mask and as replaced."""
        mask = erased_boxes(noise, pixels.shape[2:])
        return torch.where(mask, torch.rand_like(pixels), pixels), mask, mask

    def forward(self, pixels, noise, k):
        """Returns the loss and its terms; `replaced`: share of erased pixels."""
        corrupted, mask, _ = self.corrupt(pixels, noise, k)
        pred = self.enhancer(self.normalize(corrupted)).float()
        with torch.autocast(pixels.device.type, enabled=False):  # target and loss in float32
            images, share = self.normalize(pixels), mask.float().mean()
            mean, deviation = pixel_statistics(images, self.cfg)
            pred, target = pred * mask, (images - mean) / deviation * mask
            enhancer_loss = (F.l1_loss(pred, target) + F.mse_loss(pred, target)) / share
            loss = 10 * enhancer_loss
        return loss, {"loss": loss.detach(), "enhancer_loss": enhancer_loss.detach(), "replaced": share}


# ---- training ----------------------------------------------------------------------------------------------


def load_initial(model, cfg):
    """--init and --generator_init; UserError if that is not known to predict raw pixels."""
    load_enhancer(model, cfg)
    if path := cfg.generator_init:
        content = read_file(path)
        target = cfg.generator_target or content.get("config", {}).get("target")  # that of mae_mff.py
        raw = target == "raw" or content.get("method") == "cim_pixels"
        if not raw and getattr(content.get("args"), "norm_pix_loss", True):  # of MAE's own files
            raise UserError(f"{path} does not say that it predicts raw pixels: train it with mae_mff.py "
                            "--target raw; if you know that it does, --generator_target raw")
        load_weights(model.generator, path, prefix="generator.", content=content)


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    model = PaintedImages(cfg) if cfg.generator == "mae" else ErasedImages(cfg)
    load_initial(model, cfg)
    sample_noise = functools.partial(torch.rand, math.prod(cfg.grid))
    to_pixels = Normalize((0.0,) * cfg.in_chans, (1.0,) * cfg.in_chans, run.device)  # the model normalises
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures, to_pixels)
    run.fit_batch(source)
    run.start(len(source), f"lr {cfg.lr:.3g}, whatever the batch")
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay, ("pos_embed", "cls_token")), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    batches = run.batches(source, RandomResizedCrop(cfg.img_size, (0.08, 1.0)), sample_noise, to_pixels)
    examples = run.examples(source, sample_noise, to_pixels)
    name = cfg.model if cfg.enhancer == "vit" else "resnet50"

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples, run)
        if run.save_due():
            run.save(model.enhancer.trunk_state(), prefix="enhancer.", model=name)
    run.finish()


if __name__ == "__main__":
    launch(Config, presets, train, "cim_pixels")
