"""Vision ELECTRA with SimMIM as its generator, and SimMIM's ViT or a Swin Transformer as its discriminator.

Extends vision_electra.py, whose losses, levels, update and pictures it uses; read that first. The abstract
names MAE and SimMIM as generators, ViT and Swin as discriminators; a review says that the discriminator
started from SimMIM's ViT-B. SimMIM: Xie et al., CVPR 2022, arXiv 2111.09886.

Idea. SimMIM hides cells of 32 x 32 pixels, each 2 x 2 patches of a ViT and one position of a Swin's last
map. Its encoder sees all tokens, a learned one in place of those that are hidden; one linear layer predicts
the pixels. So masks, predictions and verdicts are all of cells.

Data flow, in the order of the code (source, then name and shape in the code); n cells, L = 4 n patches
    h      = encoder(patches, mask token where hidden)   SimMIM 3.2            encode    (B, 1 + L, D)
    h'     = h + sigma e, e ~ N(0, 1), per patch         abstract; place: ours add_noise
    q      = pixel shuffle of a 1 x 1 convolution of h'  SimMIM 3.3            decode    (B, n, c*c*C)
    x^     = hidden cells of q, visible of x             as there              composite (B, C, H, W)
    s, s_j = a logit per image, one per cell             ours                  verdicts  (B,), (B, n)
    L_rec  = mean over hidden pixels, channels |q - x|   SimMIM eq. 1          masked_l1
    loss   = L_rec + 0.2 L_adv + L_D                     as there
The ViT (beit.py) has relative positions only, one table for all blocks; layer scale is folded into weights.
Its s comes from the class token, s_j from the mean of the cell's four tokens (ours). Swin (swin.py,
torchvision's): s from the mean of the last map, s_j from its positions (ours). encoder.pth is the
discriminator: timm's names and beit_SIZE, or torchvision's and swin_SIZE.

Ours: the generator is SimMIM's ViT whatever the discriminator; sigma, heads, weights of the levels, learning
rate and no clipping as in vision_electra.py; mask ratio 0.75 (SimMIM's is 0.6), as nothing says that it
differs; no drop path, as the discriminator has none there (SimMIM's ViT has 0.1).

    python vision_electra_simmim.py --demo                                      three minutes on a CPU
    torchrun --nproc_per_node 4 vision_electra_simmim.py --generator_init simmim_vit_base.pth \\
        --discriminator_init simmim_vit_base.pth                                SimMIM's own file, 50 epochs
    torchrun --nproc_per_node 4 vision_electra_simmim.py --discriminator none --mask_ratio 0.6   SimMIM alone
    torchrun --nproc_per_node 4 vision_electra_simmim.py --discriminator swin \\
        --generator_init simmim_vit_base.pth                                    192 px
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from beit import PRETRAINING, TABLE, RelPosViT
from common import (
    VIT_SIZES,
    RandomResizedCrop,
    RunConfig,
    adamw,
    launch,
    load_weights,
    open_data,
    parameter_groups,
    patch_grid,
    patches_to_pixels,
    patchify,
    read_file,
    set_lr,
    warmup_cosine,
    weights_of,
)
from swin import SIZES, Swin
from vision_electra import (
    VisionElectra,
    load_discriminator,
    save_pictures,
    train_step,
    train_warm_start,
    watch_for_collapse,
)


@dataclass
class Config(RunConfig):
    # model
    model: Literal[*VIT_SIZES] = "base"  # of both networks: the size of that ViT, or of that Swin
    discriminator: Literal["vit", "swin", "none"] = "vit"  # SimMIM's ViT, Swin, or SimMIM alone
    patch_size: int = 16  # pixels of a ViT's patch; Swin's is a quarter of it, a cell twice
    swin_window: int = 6  # Swin: side of its attention windows; 6 at 192 px, 7 at 224
    # method
    mask_ratio: float = 0.75  # share of hidden cells
    noise: float = 0.1  # deviation of the noise on the generator's output map
    gan_weight: float = 0.2  # weight of the generator's second loss (supplement, table 1)
    generator_warmup_epochs: float = 0.0  # passes before that loss counts
    generator_init: str | None = None  # generator from SimMIM's ViT, ours (last.pth) or official
    discriminator_init: str | None = None  # discriminator from these: SimMIM, BEiT, ours; Swin: torchvision's
    # optimisation: supplement, 0.1; min_lr, clip_grad: ours
    epochs: float = 50.0  # passes over the data
    batch_size: int = 320  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of one process; default: up to 256
    base_lr: float = 2e-5  # learning rate per 512 images
    min_lr: float = 0.0  # where the cosine ends
    warmup_epochs: float | None = None  # linear warm-up; default a fifth, at most the paper's 10
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm, of both networks together; 0 = no clipping
    # run
    draw: str | None = None  # draw what these weights (last.pth) predict, to --out X.png
    pictures: int = 8  # images drawn at each epoch's end; 0 = none

    start_from = ("generator_init", "discriminator_init")
    # What is a flag in vision_electra.py, and not here.
    paste, gan_ratio, generator_waits = True, 0.0, False
    adversarial, adversarial_levels = "nonsaturating", "both"

    def __post_init__(self):
        super().__post_init__()
        self.warmup_epochs = min(10.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        n = math.prod(cell_grid(self.img_size, self.patch_size))
        if not 0 < int(n * (1 - self.mask_ratio)) < n:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {n} cells hides none or all of them")
        if self.discriminator == "none" and self.discriminator_init:
            raise ValueError("--discriminator none, but --discriminator_init")
        if self.discriminator == "swin" and (self.model not in SIZES or self.patch_size % 4):
            raise ValueError(f"--discriminator swin: --model {self.model}, --patch_size {self.patch_size}; "
                             f"expected one of {', '.join(SIZES)}, and a multiple of 4")

    @property
    def levels(self):
        return "none" if self.discriminator == "none" else "both"


# As vision_electra.py's: a GAN weight of 0.2 is too much for networks of this size.
DEMO = {"data": "shapes", "img_size": (24, 24), "model": "nano", "patch_size": 4, "swin_window": 3,
        "epochs": 0.25, "gan_weight": 0.005, "generator_warmup_epochs": 0.17, "batch_size": 16,
        "base_lr": 2.4e-2, "warmup_epochs": 0.03, "log_every": 25}
WARMSTART = {"discriminator": "none", "noise": 0.0, "mask_ratio": 0.6, "epochs": 0.6, "batch_size": 16,
             "base_lr": 3.2e-2, "warmup_epochs": 0.15}


def presets(flags):
    return DEMO if flags.demo else {"img_size": (192, 192)} if flags.discriminator == "swin" else {}


# ---- cells -------------------------------------------------------------------------------------------------


def cell_grid(img_size, patch_size):
    """(h, w) cells, of 2 x 2 patches, of an image; ValueError unless they tile it."""
    patch_grid(img_size, patch_size)
    if any(side % (2 * patch_size) for side in img_size):
        raise ValueError(f"--img_size {img_size[0]},{img_size[1]} is no multiple of {2 * patch_size}, the "
                         "side of a cell")
    return patch_grid(img_size, 2 * patch_size)


def masked_l1(pred, target, mask):
    """L_rec: mean absolute error over the pixels and channels of hidden cells (SimMIM eq. 1).

    pred, target: (B, n, c*c*C); mask: (B, n), 1 = hidden, at least one. Returns a scalar.
    """
    return ((pred - target).abs().mean(-1) * mask).sum() / mask.sum()


# ---- generator and discriminators --------------------------------------------------------------------------


class SimMIM(RelPosViT):
    """The generator. Names of its parameters: timm's, `mask_token`, and SimMIM's `decoder.0`."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        p = cfg.patch_size
        self.cells = cell_grid(cfg.img_size, p)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.decoder = nn.Sequential(nn.Conv2d(self.embed_dim, p * p * cfg.in_chans, 1), nn.PixelShuffle(p))
        self.init_weights()

    def encode(self, images, ids_keep):
        """All patches, those outside of the cells ids_keep (B, len_keep) hidden -> tokens (B, 1 + L, D)."""
        mask = torch.ones(len(images), math.prod(self.cells), device=images.device).scatter(1, ids_keep, 0.0)
        hidden = patches_to_pixels(mask[..., None], 2, self.cells).flatten(2).transpose(1, 2)  # (B, L, 1)
        x = self.embed(images)
        return self.run_blocks(torch.where(hidden > 0, self.mask_token.to(x.dtype), x))

    def decode(self, latent, ids_restore):
        """(B, 1 + L, D) -> predicted cells (B, n, c*c*C); nothing was shuffled, so nothing is restored."""
        x = latent[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        return patchify(self.decoder(x), 2 * self.patch_size)


def make_heads(D):
    return nn.ModuleDict({level: nn.Linear(D, 1) for level in ("image", "patch")})


def verdicts(heads, image, cells):
    """(B, D), (B, n, D) -> {"image": (B,), "patch": (B, n)} float32, logits: > 0 is original."""
    tokens = {"image": image, "patch": cells}
    return {level: head(tokens[level]).squeeze(-1).float() for level, head in heads.items()}


class ViTDiscriminator(RelPosViT):
    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.heads = make_heads(self.embed_dim)
        self.init_weights()

    def forward(self, images):
        """(B, C, H, W) -> verdicts"""
        x = super().forward(images)
        cells = F.avg_pool2d(x[:, 1:].transpose(1, 2).unflatten(2, self.grid), 2)
        return verdicts(self.heads, x[:, 0], cells.flatten(2).transpose(1, 2))


class SwinDiscriminator(Swin):
    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.patch_size // 4, cfg.swin_window, cfg.in_chans)
        self.heads = make_heads(self.embed_dim)

    def forward(self, images):
        """(B, C, H, W) -> verdicts"""
        x = self.last_map(images)
        return verdicts(self.heads, x.mean((1, 2)), x.flatten(1, 2))


class SimMIMElectra(VisionElectra):
    """VisionElectra with these networks, cells and L1."""

    reconstruction_loss = staticmethod(masked_l1)

    def __init__(self, cfg):
        nn.Module.__init__(self)  # without the networks of vision_electra.py
        self.cfg, self.generator = cfg, SimMIM(cfg)
        make = {"vit": ViTDiscriminator, "swin": SwinDiscriminator}.get(cfg.discriminator)
        self.discriminator = make(cfg) if make else None
        self.cell, self.grid = 2 * cfg.patch_size, self.generator.cells


# ---- training ----------------------------------------------------------------------------------------------


def load_initial(model, cfg):
    """--generator_init and --discriminator_init"""
    if path := cfg.generator_init:
        content = read_file(path)
        decoder = any("decoder" in name for name in weights_of(content, "generator."))
        load_weights(model.generator, path, allow_missing=() if decoder else ("decoder", "mask_token"),
                     ignore=("head.", "fc_norm.", *PRETRAINING), prefix="generator.", content=content)
    load_discriminator(model, cfg, PRETRAINING)


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    model = SimMIMElectra(cfg)
    sample_noise = functools.partial(torch.rand, math.prod(model.grid))
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures)
    load_initial(model, cfg)
    run.fit_batch(source)
    peak_lr = cfg.base_lr * cfg.batch_size / 512
    run.start(len(source), f"lr {peak_lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 512")
    given = cfg.generator_init and (cfg.discriminator_init or cfg.discriminator == "swin")
    if cfg.demo and cfg.discriminator != "none" and not given and not run.checkpoints():
        own = cfg.discriminator_init
        if not train_warm_start(cfg, run, len(source), train, WARMSTART):
            return
        if cfg.discriminator == "swin":
            cfg.discriminator_init = own  # it cannot start from a ViT
        load_initial(model, cfg)
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay, (TABLE,)), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    crop = RandomResizedCrop(cfg.img_size, scale=(0.67, 1.0))
    batches, examples = run.batches(source, crop, sample_noise), run.examples(source, sample_noise)
    encoder, meta = "discriminator", {"model": f"beit_{cfg.model}"}
    if cfg.discriminator == "none":
        encoder = "generator"
    elif cfg.discriminator == "swin":
        meta = {"model": f"swin_{cfg.model}", "patch_size": cfg.patch_size // 4}

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        watch_for_collapse(terms, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples, run)
        if run.save_due():
            run.save(getattr(model, encoder).trunk_state(), prefix=f"{encoder}.", **meta)
    run.finish()


if __name__ == "__main__":
    launch(Config, presets, train, "vision_electra_simmim")
