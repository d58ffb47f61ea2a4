"""CIM: corrupted image modelling, one objective for Vision Transformers and for ResNets.

CIM      Fang et al., Corrupted Image Modeling for Self-Supervised Visual Pre-Training, ICLR 2023, arXiv 2202.03382. No code by
         the authors is known to us. It builds on BEiT (arXiv 2106.08254) and the tokenizer of DALL-E (arXiv 2102.12092).

Idea. A ResNet cannot see [MASK] tokens, and a ViT will not once it is fine-tuned. So let a small BEiT, the generator, fill the
hidden patches with plausible visual tokens, and a frozen decoder make an image of them all. The enhancer, our aim, sees this
corrupted image and restores the true one's pixels (ResPix), or says which tokens were replaced (RevDet). Both networks learn
together; the enhancer's gradient never reaches the generator.

Data flow, in the order of the code (source, the paper's symbol; its name here and its shape on the right)
    A.3      g               tokenizer's encoder on the image at (8h, 8w) px, argmax    golden     (B, L) ids
    eq. (1)  m               k positions without replacement, 100 <= k <= 120 of 196    mask       (B, L), 1 = hidden
    eq. (1)  x^masked        patch embeddings, [MASK] at m                                          (B, L, D)
    A.3      p_BEiT          generator at the hidden positions                          logits     (B, n, vocabulary)
             L_gen           -log p_BEiT(g | x^masked), mean over hidden positions      generator_loss
    eq. (2)  x^sampled       one draw from p_BEiT per hidden position                   sample
    eq. (2)  x^corrupted     golden ids, the sampled ones at m                          ids        (B, L)
    A.3      I^corrupted     tokenizer's decoder, resized, normalised                   corrupted  (B, C, H, W)
    2.2      ResPix          every pixel, normalised in the 8 x 8 window around it      pixel_statistics
    2.2      RevDet          ids != g, at every position                                replaced   (B, L), 1 = replaced
    Table 13 loss = L_gen + w L_enh, w = 10 for ResPix, 1 for RevDet
encoder.pth is the enhancer: a plain ViT, or a ResNet-50 under torchvision's names, without classifier.

The paper's ablations (300 epochs; ResPix and ViT-B but for table 8)
    Table 4   --mask block; --num_masked 78, 98 or 118: 40, 50 and 60 % of 196
    Table 5   --generator_depth 4 ... 8, --no-share
    Table 6   --pixel_norm none|patch|window
    Table 7   --sampling uniform|argmax|softmax
    Table 8   --objective revdet --enhancer resnet50 --resnet_width 128 (x2), 256 (x4); table 9: --model large
    Table 10  --generator mae; not built: the VQGAN tokenizer, and the random erasing of sec. 3.3
    A.1       --objective none (the generator alone), then --generator_init FILE --freeze_generator

Not in the paper, our choice or our reading
    k         the same for all images of an update, drawn from (seed, step); on other grids the same shares
    images    the tokenizer sees the network's view of the crop, resized (bicubic, antialiased), and its own image is resized
              bilinearly to that size; crops of 8 to 100 % of the area and flips (BEiT's)
    ResPix    mean |e| + mean e^2; windows at offsets -3 ... +4, reflected at borders, all channels together, biased variance,
              eps 1e-6 (--pixel_norm patch: MAE's, unbiased)
    ResNet    1 x 1 convolution and pixel shuffle to tokens or pixels; BatchNorm's statistics: each process's own (BEiT's code)
    training  absolute learning rate, down to 1e-5; BEiT's initial values; no weight decay for positions and class tokens;
              --initial mae spares short runs the hundreds of updates that it takes to learn which patches are near
    Table 10  an MAE hides exactly half; its RGB is drawn from a Gaussian of deviation --rgb_std around its prediction

    python cim.py --demo [--objective revdet --enhancer resnet50]       three minutes on a CPU, tokenizer included
    python convert_dalle.py encoder.pkl decoder.pkl --out dalle.pth     OpenAI's tokenizer, once
    torchrun --nproc_per_node 4 cim.py --tokenizer dalle.pth            the paper's run, images in data/imagenet
    torchrun --nproc_per_node 4 cim.py --train_tokenizer --out runs/tokenizer     or one of your own
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    BESIDE_TRUNK,
    VIT_SIZES,
    Block,
    KeyedBatches,
    Normalise,
    RandomResizedCrop,
    Refused,
    ResNet50,
    Run,
    RunConfig,
    Views,
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
    normalisation,
    open_data,
    opt,
    parameter_groups,
    patch_grid,
    patchify,
    picture_batch,
    read_file,
    remember_statistics,
    save_pictures,
    set_lr,
    sincos_pos_embed,
    spread,
    stable_seed,
    take_tokens,
    unpatchify,
    warmup_cosine,
)
from convert_dalle import DVAE, draw_tokenizer, load_tokenizer, schedule


@dataclass
class Config(RunConfig):
    # model
    enhancer: Literal["vit", "resnet50"] = opt("vit", "the network that is pre-trained")
    model: VitSize | None = opt(None, "ViT enhancer, and the generator's width; default base, with a ResNet small (384)")
    patch_size: int = opt(16, "pixels")
    resnet_width: int = opt(64, "ResNet: channels of its stem; 64 is x1, 128 x2, 256 x4, less is narrow")
    generator: Literal["beit", "mae"] = opt("beit", "what fills the hidden patches: visual tokens or pixels (table 10)")
    generator_depth: int | None = opt(None, "its blocks (table 5); default 4, of an MAE those of --model")
    share: bool = opt(True, "patch embedding and two blocks serve both networks (table 5), if two ViTs start together")
    initial: Literal["beit", "mae"] = opt("beit", "initial values of ViTs; mae: sine-cosine positions, Xavier, for short runs")
    tokenizer: str | None = opt(None, "file of convert_dalle.py or --train_tokenizer; --demo trains its own")
    # method
    objective: Literal["respix", "revdet", "none"] = opt("respix", "restore pixels, detect tokens, or train no enhancer")
    num_masked: tuple[int, int] | None = opt(None, "fewest, most hidden patches; default 100,120 of 196, an MAE's 98")
    mask: Literal["random", "block"] = opt("random", "hide single patches or BEiT's blocks (table 4)")
    sampling: Literal["softmax", "argmax", "uniform"] = opt("softmax", "how hidden tokens are drawn (table 7)")
    pixel_norm: Literal["window", "patch", "none"] = opt("window", "ResPix's target (table 6)")
    window_per_channel: bool = opt(False, "a window's mean and deviation per channel")
    rgb_std: float = opt(0.1, "deviation of an MAE's colours, of values in [0, 1]")
    generator_init: str | None = opt(None, "generator from last.pth of --objective none or of a raw-pixel MAE; not shared")
    freeze_generator: bool = opt(False, "and leave it as it is (A.1)")
    # training a tokenizer
    train_tokenizer: bool = opt(False, "train a tokenizer on --data, write tokenizer.pth and stop")
    vocab_size: int = opt(1024, "its visual tokens; DALL-E's has 8192")
    tokenizer_width: int = opt(64, "its channels at full resolution; DALL-E's has 256")
    kl_weight: float = opt(6.6, "of the KL divergence from uniform use of the tokens; more keeps more of them in use")
    # optimisation: table 13
    epochs: float = opt(300.0, "passes over the data")
    batch_size: int = opt(2048, "images per update, over all processes")
    micro_batch: int | None = opt(None, "images per forward pass of one process; default: the largest that divides, up to 256")
    lr: float = opt(1.5e-3, "peak learning rate, absolute: not scaled with the batch")
    min_lr: float = opt(1e-5, "where the cosine ends")
    warmup_epochs: float | None = opt(None, "linear warm-up; default a fifth of the epochs, at most the paper's 10")
    weight_decay: float = opt(0.05, "AdamW")
    betas: tuple[float, float] = opt((0.9, 0.98), "AdamW")
    clip_grad: float = opt(3.0, "largest gradient norm; 0 = no clipping")
    # run
    init: str | None = opt(None, "enhancer from these weights (ours, timm, torchvision); a fresh schedule")
    pictures: int = opt(8, "images drawn at each epoch's end; 0 = none")

    def __post_init__(self):
        super().__post_init__()
        self.model = self.model or ("base" if self.enhancer == "vit" else "small")
        mae, depth = self.generator == "mae", VIT_SIZES[self.model][1]
        self.generator_depth = self.generator_depth or (depth if mae else min(4, depth))
        self.share &= not (mae or self.generator_init) and self.enhancer == "vit" and self.objective != "none"
        self.warmup_epochs = min(10.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        L = math.prod(self.grid)
        self.num_masked = self.num_masked or tuple(round(n * L / 196) for n in ((98, 98) if mae else (100, 120)))
        low, high = self.num_masked
        if not 0 < low <= high < L:
            raise ValueError(f"--num_masked {low},{high} does not lie between 1 and {L - 1}, of {L} patches")
        if mae and (low != high or self.objective == "revdet" or self.sampling != "softmax"):
            raise ValueError("--generator mae has no tokens: one --num_masked, no --objective revdet, no --sampling")
        if not 1 + self.share <= self.generator_depth <= depth:
            raise ValueError(f"--generator_depth {self.generator_depth} must be 2 to {depth}, or from 1: --no-share")
        if self.freeze_generator > bool(self.generator_init) or self.objective == "none" and (self.generator_init or self.init):
            raise ValueError("--freeze_generator needs --generator_init; --objective none goes with neither this nor --init")
        if self.enhancer == "resnet50" and (any(n % 32 for n in self.img_size) or 32 % self.patch_size):
            raise ValueError("a ResNet needs an --img_size that 32 divides and a --patch_size that divides 32")
        if not (self.tokenizer or mae or self.train_tokenizer or self.demo > bool(self.generator_init) or self.check_data):
            raise ValueError("--tokenizer FILE is needed: `python convert_dalle.py --help` makes one of OpenAI's files, "
                             "--train_tokenizer one of your images; --demo alone needs none")

    @property
    def grid(self):
        return patch_grid(self.img_size, self.patch_size)


TOKENIZER = {"epochs": 30.0, "batch_size": 256, "lr": 1e-3, "weight_decay": 1e-4, "betas": (0.9, 0.999)}
# Grey, as visual tokens of few updates are poor in colour; raw pixels, as drawn shapes are flat: normalised, they leave noise.
DEMO = {"data": "shapes", "img_size": (32, 32), "in_chans": 1, "model": "nano", "patch_size": 4, "resnet_width": 16, "lr": 2e-3,
        "generator_depth": 2, "initial": "mae", "num_masked": (46, 50), "pixel_norm": "none", "log_every": 25,
        "vocab_size": 128, "tokenizer_width": 16, "kl_weight": 2.0, "epochs": 2.0, "batch_size": 32, "warmup_epochs": 0.2}
DEMO_MAE = {"generator_depth": 4, "num_masked": (32, 32)}
DEMO_RESNET = {"img_size": (64, 64), "patch_size": 8}
DEMO_TOKENIZER = {"epochs": 0.55, "batch_size": 16, "lr": 4e-3, "warmup_epochs": 0.05}


def presets(flags):
    demo = DEMO | (DEMO_RESNET if flags.enhancer == "resnet50" else {}) | (DEMO_MAE if flags.generator == "mae" else {})
    return (demo if flags.demo else {}) | (TOKENIZER | (DEMO_TOKENIZER if flags.demo else {}) if flags.train_tokenizer else {})


# ---- masking, sampling, targets, losses ------------------------------------------------------------------------------


def block_order(grid, n):
    """BEiT's blocks, for --mask block: (L,) in which the positions of the k smallest values are hidden blocks, for any k <= n.

    Blocks of 16/196 to 60/196 of the grid, aspect .3 to 1/.3 (log-uniform), are laid until n positions are covered; the value
    is the number of a position's first block, plus its place in the grid as a fraction. Uses torch's default generator.
    """
    h, w = grid
    place, number = torch.arange(h * w).view(grid) / (h * w), 0
    order = place + h * w  # not covered: last
    while (order < h * w).sum() < n:
        area, aspect, top, left = torch.rand(4).tolist()
        area, aspect = h * w * (16 + 44 * area) / 196, math.exp(math.log(0.3) * (1 - 2 * aspect))
        height, width = min(h, max(1, round(math.sqrt(area * aspect)))), min(w, max(1, round(math.sqrt(area / aspect))))
        top, left = int(top * (h - height + 1)), int(left * (w - width + 1))
        box = (slice(top, top + height), slice(left, left + width))
        order[box] = order[box].minimum(min(number, h * w - 1) + place[box])
        number += 1
    return order.flatten()


def draw_num_masked(step, cfg):
    """k of eq. (1): uniform between both --num_masked, the same in all processes and micro-steps."""
    return cfg.num_masked[0] + stable_seed(cfg.seed, step) % (cfg.num_masked[1] - cfg.num_masked[0] + 1)


def sample(logits, sampling):
    """x^sampled of eq. (2): logits (..., V) float32 -> ids (...). softmax: at temperature 1, as argmax of logits + Gumbel noise
    (torch.multinomial stops on NaN, before the update can be skipped); uniform: from the whole vocabulary."""
    if sampling == "uniform":
        return torch.randint(logits.shape[-1], logits.shape[:-1], device=logits.device)
    if sampling == "softmax":
        logits = logits - torch.empty_like(logits).exponential_().log()
    return logits.argmax(-1)


def window_statistics(images, per_channel=False, size=8):
    """Mean and deviation (B, 1 or C, H, W) float32 of the size x size window around each pixel, eps 1e-6: offsets -3 ... +4,
    reflected at the borders; over all channels together, or each."""
    offset = images.mean((1, 2, 3), keepdim=True)  # E[x^2] - E[x]^2 would cancel too much without
    before = size // 2 - 1
    x = F.pad(images - offset, (before, size - 1 - before) * 2, mode="reflect")
    moments = [moment if per_channel else moment.mean(1, keepdim=True) for moment in (x, x.square())]
    mean, square = (F.avg_pool2d(moment, size, stride=1) for moment in moments)
    return mean + offset, ((square - mean.square()).clamp(min=0) + 1e-6).sqrt()


def pixel_statistics(images, cfg):
    """Mean and deviation that --pixel_norm takes out of ResPix's target, broadcastable to images (B, C, H, W)."""
    if cfg.pixel_norm == "window":
        return window_statistics(images, cfg.window_per_channel)
    if cfg.pixel_norm == "none":
        return torch.zeros_like(images), torch.ones_like(images)
    patches = patchify(images, cfg.patch_size)
    mean, deviation = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (unpatchify(x.expand_as(patches), cfg.patch_size, cfg.grid) for x in (mean, deviation))


# ---- generator and enhancer ------------------------------------------------------------------------------------------


def init_weights(model, cfg):
    """--initial: BEiT's, normal of deviation .02, cut at that, branches of block l (from 1) divided by sqrt(2 l); or MAE's."""
    if cfg.initial == "mae":
        return model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
            nn.init.zeros_(module.bias)
    for token in (getattr(model, name, None) for name in ("cls_token", "mask_token", "pos_embed")):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    for number, block in enumerate(model.blocks, start=1):
        for linear in (block.attn.proj, block.mlp.fc2):
            linear.weight.data.div_(math.sqrt(2 * number))


class BEiTGenerator(ViT):
    """The small BEiT: mask tokens for hidden patches, logits of visual tokens."""

    def __init__(self, cfg, vocab_size):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.blocks = self.blocks[: cfg.generator_depth]
        self.pos_embed.requires_grad_()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.head = nn.Linear(self.embed_dim, vocab_size)
        init_weights(self, cfg)

    def forward(self, images, mask, positions):
        """(B, C, H, W), mask (B, L) bool, positions (B, n) -> logits (B, n, V) there"""
        x = self.patch_embed(images)
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = self.prepend_cls(x + self.pos_embed[:, 1:])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(take_tokens(x[:, 1:], positions)))


class MAEGenerator(ViT):
    """Table 10: an MAE, with its names and decoder, that predicts raw pixels. Its encoder sees visible patches only."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.blocks = self.blocks[: cfg.generator_depth]
        width, depth, heads = {"nano": (128, 1, 4), "tiny": (192, 4, 6), "small": (384, 8, 12)}.get(cfg.model, (512, 8, 16))
        self.decoder_embed, self.mask_token = nn.Linear(self.embed_dim, width), nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(width, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, cfg.patch_size**2 * cfg.in_chans)
        self.init_weights()

    def forward(self, images, order, n_masked):
        """order (B, L): positions, hidden ones first -> predicted patches (B, L, p*p*C)"""
        x = self.prepend_cls(take_tokens(self.embed(images), order[:, n_masked:]))
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        hidden = self.mask_token.to(x.dtype).expand(len(x), n_masked, -1)
        x = torch.cat([x[:, :1], take_tokens(torch.cat([hidden, x[:, 1:]], 1), order.argsort(1))], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))


class ViTEnhancer(ViT):
    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.pos_embed.requires_grad_()
        self.head = nn.Linear(self.embed_dim, cfg.patch_size**2 * cfg.in_chans if cfg.objective == "respix" else 1)
        init_weights(self, cfg)

    def forward(self, corrupted):
        """(B, C, H, W) -> an image (B, C, H, W) or logits (B, 1, h, w): one linear layer on every patch token"""
        pred = self.head(super().forward(corrupted)[:, 1:])
        return unpatchify(pred, self.patch_size if pred.shape[-1] > 1 else 1, self.grid)


class ResNetEnhancer(ResNet50):
    def __init__(self, cfg):
        super().__init__(cfg.resnet_width, cfg.in_chans)
        self.scale, channels = (32, cfg.in_chans) if cfg.objective == "respix" else (32 // cfg.patch_size, 1)
        self.head = nn.Conv2d(self.embed_dim, channels * self.scale**2, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, corrupted):
        """(B, C, H, W) -> an image (B, C, H, W) or logits (B, 1, h, w)"""
        return F.pixel_shuffle(self.head(super().forward(corrupted)), self.scale)


class CorruptedImageModel(nn.Module):
    """Generator and enhancer. The tokenizer is frozen and no part of it: it comes with every call."""

    def __init__(self, cfg, vocab_size, mean, std):
        super().__init__()
        self.cfg = cfg
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.generator = MAEGenerator(cfg) if cfg.generator == "mae" else BEiTGenerator(cfg, vocab_size)
        self.generator.requires_grad_(not cfg.freeze_generator)
        if cfg.objective != "none":
            self.enhancer = ViTEnhancer(cfg) if cfg.enhancer == "vit" else ResNetEnhancer(cfg)
        if cfg.share:
            self.generator.patch_embed = self.enhancer.patch_embed
            self.generator.blocks[0], self.generator.blocks[1] = self.enhancer.blocks[0], self.enhancer.blocks[1]

    def normalise(self, pixels):
        return (pixels - self.pixel_mean) / self.pixel_std

    def corrupt(self, pixels, noise, n_masked, tokenizer):
        """Eqs. (1) and (2). pixels (B, C, H, W) in [0, 1]; noise (B, L): smallest are hidden; n_masked: k, a scalar tensor.
        Returns the corrupted image in [0, 1], no gradient; mask and replaced (B, L) bool; the generator's loss and terms."""
        images, n = self.normalise(pixels), self.cfg.num_masked[1]
        order = noise.argsort(1)
        mask = order.argsort(1) < n_masked
        if self.cfg.generator == "mae":
            pred, target = self.generator(images, order, n).float(), patchify(images, self.cfg.patch_size)
            loss = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
            colours = self.pixel_mean + self.pixel_std * unpatchify(pred.detach(), self.cfg.patch_size, self.cfg.grid)
            sampled = (colours + self.cfg.rgb_std * torch.randn_like(colours)).clamp(0, 1)
            hidden = spread(mask[..., None].float(), self.cfg.patch_size, self.cfg.grid)
            return torch.where(hidden > 0, sampled, pixels), mask, mask, loss, {"generator_loss": loss}
        golden, positions = tokenizer.ids(pixels), order[:, :n]  # as many positions whatever k, so that shapes are static
        logits = self.generator(images, mask, positions).float()
        targets, counts = golden.gather(1, positions), torch.arange(n, device=noise.device) < n_masked
        token_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        loss = (token_loss * counts).sum() / (len(golden) * n_masked)
        with torch.no_grad():
            correct = ((logits.argmax(-1) == targets) * counts).sum() / (len(golden) * n_masked)
            terms = {"generator_loss": loss, "generator_accuracy": correct}
            if self.cfg.objective == "none" and self.training:
                return None, mask, None, loss, terms
            ids = golden.scatter(1, positions, torch.where(counts, sample(logits, self.cfg.sampling), targets))
            corrupted = F.interpolate(tokenizer.pixels(ids), pixels.shape[2:], mode="bilinear")
        return corrupted, mask, ids != golden, loss, terms

    def forward(self, pixels, noise, n_masked, tokenizer):
        """Returns the loss (table 13) and its terms; `replaced`: share of replaced tokens."""
        corrupted, _, replaced, loss, terms = self.corrupt(pixels, noise, n_masked, tokenizer)
        if self.cfg.objective != "none":
            pred = self.enhancer(self.normalise(corrupted))
            with torch.autocast(pixels.device.type, enabled=False):  # target and loss in float32
                if self.cfg.objective == "respix":
                    images = self.normalise(pixels)
                    mean, deviation = pixel_statistics(images, self.cfg)
                    target, weight = (images - mean) / deviation, 10
                    enhancer_loss = F.l1_loss(pred.float(), target) + F.mse_loss(pred.float(), target)
                else:
                    verdict, truth, weight = pred.float().flatten(1), replaced.float(), 1
                    enhancer_loss = F.binary_cross_entropy_with_logits(verdict, truth)
                    terms["revdet_accuracy"] = ((verdict > 0) == replaced).float().mean()
            loss = weight * enhancer_loss + (0 if self.cfg.freeze_generator else loss)
            terms |= {"enhancer_loss": enhancer_loss, "replaced": replaced.float().mean()}
        return loss, {name: value.detach() for name, value in {"loss": loss, **terms}.items()}


# ---- training --------------------------------------------------------------------------------------------------------


def train_step(model, batches, to_pixels, settings, optimizer, scaler, step, cfg, plan, run):
    """One update; `settings`: what else `model` is called with. Returns {name: mean over the update} and the sample numbers."""
    optimizer.zero_grad(set_to_none=True)
    total, samples = {}, []
    restore_statistics = remember_statistics(model)
    for micro_step in range(plan.accum_steps):
        batch = next(batches)
        run.seed(step, micro_step)
        pixels, noise = to_pixels(batch), batch["draw"].to(run.device, non_blocking=True)
        with gradient_sync(model, micro_step == plan.accum_steps - 1):
            with autocast(run.device, run.amp_dtype):
                loss, terms = model(pixels, noise, **settings)
            scaler.scale(loss / plan.accum_steps).backward()
        total = {name: total.get(name, 0) + term / plan.accum_steps for name, term in terms.items()}
        samples += batch["index"].tolist()
    stats = finish_update(run, optimizer, scaler, total, cfg.clip_grad)
    if stats["skipped"]:
        restore_statistics()
    return stats, samples


@torch.no_grad()
def draw_pictures(path, model, batch, to_pixels, tokenizer):
    """PNG as the paper's figs. 2 to 4: original, masked, four samples; ResPix: template, output; RevDet: replaced, verdict."""
    cfg, pixels, noise = model.cfg, to_pixels(batch), batch["draw"].to(to_pixels.device)
    n_masked = torch.tensor(sum(cfg.num_masked) // 2, device=noise.device)
    torch.manual_seed(cfg.seed)
    model.eval()
    samples = [model.corrupt(pixels, noise, n_masked, tokenizer)[:3] for _ in range(4)]
    corrupted, mask, replaced = samples[0]

    def shown(values):
        return spread(values[..., None].float(), cfg.patch_size, cfg.grid)

    columns = [pixels, torch.where(shown(mask) > 0, 0.5, pixels), *(image for image, *_ in samples)]
    titles, caption = ["original", "masked", *(f"corrupted {i}" for i in range(1, 5))], f"sampling {cfg.sampling}"
    if cfg.objective == "respix":
        images, output = model.normalise(pixels), model.enhancer(model.normalise(corrupted)).float()
        template, (mean, deviation) = window_statistics(images, cfg.window_per_channel)[0], pixel_statistics(images, cfg)
        columns += [x * model.pixel_std + model.pixel_mean for x in (template.expand_as(images), output * deviation + mean)]
        titles += ["template", "output"]
        caption += "; template: mean of the window around each pixel (fig. 4); output: the enhancer's for corrupted 1"
        if cfg.pixel_norm != "none":
            caption += f", normalised by {cfg.pixel_norm}, shown with the original's own means and deviations (the paper's A.2)"
    elif cfg.objective == "revdet":
        columns += [shown(replaced), shown(model.enhancer(model.normalise(corrupted)).float().sigmoid().flatten(1))]
        titles += ["replaced", "verdict"]
        caption += "; white: tokens of corrupted 1 that differ from the original's, and the enhancer's probability of that"
    model.train()
    save_pictures(path, list(zip(*columns, strict=True)), titles, caption)


def train_demo_tokenizer(cfg, run):
    """--demo without --tokenizer: train one into OUT/tokenizer, unless it has served this run already; None if stopped."""
    out, values = f"{run.out}/tokenizer", TOKENIZER | DEMO_TOKENIZER | {"batch_size": 16 // run.world_size * run.world_size}
    cfg.tokenizer = f"{out}/tokenizer.pth"
    if not run.checkpoints():
        stage = dataclasses.replace(cfg, train_tokenizer=True, resume=True, out=out, micro_batch=None, **values)
        stage_run = Run(stage, "cim")
        train(stage, stage_run)
        run.go_on_after(stage_run)
        if stage_run.stopping:
            return None
    return load_tokenizer(cfg.tokenizer, cfg.grid, cfg.in_chans, run.device)


def load_generator(generator, cfg, tokenizer):
    """--generator_init: refused if it speaks another tokenizer's language, or predicts something else than raw pixels."""
    content = read_file(cfg.generator_init)
    if tokenizer and content.get("inputs", {}).get("tokenizer_sha256") not in (tokenizer.digest, None):
        raise Refused(f"{cfg.generator_init} was trained with another tokenizer than {cfg.tokenizer}")
    if content.get("config", {}).get("target", "raw") != "raw":
        raise Refused(f"{cfg.generator_init} predicts normalised pixels: train it with --target raw")
    load_weights(generator, cfg.generator_init, ignore=("enhancer.",), part=("generator.",), content=content)


def train(cfg, run):
    source = open_data(cfg)
    if cfg.check_data:
        return check_data(source, run.workers)
    plan = make_plan(len(source), cfg, run.world_size)
    mean, std = normalisation(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.train_tokenizer:
        model, tokenizer = DVAE(cfg.grid, cfg.vocab_size, cfg.tokenizer_width, cfg.in_chans), None
        name, exported = "tokenizer.pth", model.state_dict
    else:
        tokenizer = load_tokenizer(cfg.tokenizer, cfg.grid, cfg.in_chans, run.device) if cfg.tokenizer else None
        model = CorruptedImageModel(cfg, tokenizer.vocab_size if tokenizer else cfg.vocab_size, mean, std)
        name, exported = "encoder.pth", model.enhancer.trunk_state if cfg.objective != "none" else None
        if cfg.init:
            load_weights(model.enhancer, cfg.init, allow_missing=("head.",), ignore=BESIDE_TRUNK, part=("enhancer.",))
        if cfg.generator_init:
            load_generator(model.generator, cfg, tokenizer)
    run.start(plan, f"lr {cfg.lr:.3g}, whatever the batch")
    needed = not (cfg.train_tokenizer or tokenizer or cfg.generator == "mae")
    if needed and not (tokenizer := train_demo_tokenizer(cfg, run)):
        return
    draw = draw_tokenizer if cfg.train_tokenizer else functools.partial(draw_pictures, tokenizer=tokenizer)
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay, ("pos_embed", "cls_token")), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run.inputs = {"tokenizer_sha256": tokenizer.digest} if tokenizer else {}
    start = run.load(state)

    masks = {"random": (torch.rand, math.prod(cfg.grid)), "block": (block_order, cfg.grid, cfg.num_masked[1])}
    noise = functools.partial(*masks[cfg.mask])
    views = Views(source, RandomResizedCrop(cfg.img_size, scale=(0.08, 1.0)), cfg.seed, run.bad_files.allow(len(source)), noise)
    batches = run.timed(make_loader(views, KeyedBatches(plan, cfg.seed, run, start), run))
    to_pixels = Normalise((0.0,) * cfg.in_chans, (1.0,) * cfg.in_chans, run.device)  # the model normalises
    fixed = picture_batch(source, cfg, noise)
    meta = {"method": "cim", "model": cfg.model if cfg.enhancer == "vit" else "resnet50", "resnet_width": cfg.resnet_width,
            "img_size": cfg.img_size, "patch_size": cfg.patch_size, "in_chans": cfg.in_chans, "mean": mean, "std": std}

    for step in range(start, plan.steps):
        now = warmup_cosine(plan.epoch(step), cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, now)
        if cfg.train_tokenizer:
            settings = schedule(step / plan.steps, cfg.kl_weight, run.device)
        else:
            settings = {"n_masked": torch.full((), draw_num_masked(step, cfg), device=run.device), "tokenizer": tokenizer}
        stats, samples = train_step(ddp, batches, to_pixels, settings, optimizer, scaler, step, cfg, plan, run)
        run.end_update(step + 1, stats, now, samples)
        with run.off_the_clock():
            if path := run.picture_due(step + 1):
                draw(path, model, fixed, to_pixels)
            if run.save_due(step + 1):
                meta["epoch"] = plan.epoch(step + 1)
                if exported:
                    run.export(name, exported(), meta)
                run.save(step + 1, state, meta)
        if run.stopping:
            return run.print(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume carries on")
    run.print(f"done: {run.out}/last.pth, pictures/" + (f", {name}" if exported else ""))
    if name == "encoder.pth" and exported:
        run.print(f"next:\n  python finetune.py {'--demo --mode linear' if cfg.demo else f'--data {cfg.data}'} "
                  f"--weights {run.out}/encoder.pth")


if __name__ == "__main__":
    launch(Config, presets, train, "cim")
