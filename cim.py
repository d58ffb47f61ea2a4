"""CIM: corrupted image modelling, one objective for Vision Transformers and for ResNets.

Fang et al., Corrupted Image Modeling for Self-Supervised Visual Pre-Training, ICLR 2023, arXiv 2202.03382.
The authors' code is not known to us. CIM builds on BEiT (2106.08254) and DALL-E's tokenizer (2102.12092).

Idea. A ResNet cannot see [MASK] tokens, and a ViT will not once it is fine-tuned. So a small BEiT, the
generator, fills the hidden patches with plausible visual tokens, and a frozen decoder makes an image of all
tokens. The enhancer, our aim, sees this corrupted image and restores the true one's pixels (ResPix), or says
which tokens were replaced (RevDet). Both learn together; the enhancer's gradient never reaches the generator.

Data flow, in the order of the code (source, the paper's symbol; its name here and its shape on the right)
    A.3      g            argmax of the tokenizer's encoder at (8h, 8w) px    golden     (B, L) ids
    eq. (1)  m            k different positions, k = 100 to 120 of 196        mask       (B, L), 1 = hidden
    eq. (1)  x^masked     patch embeddings, [MASK] at m                                  (B, L, D)
    A.3      p_BEiT       generator at the hidden positions                   logits     (B, n, vocabulary)
             L_gen        -log p_BEiT(g | x^masked), mean over all hidden     generator_loss
    eq. (2)  x^sampled    one draw from p_BEiT per hidden position            sample
    eq. (2)  x^corrupted  golden ids, the sampled ones at m                   ids        (B, L)
    A.3      I^corrupted  tokenizer's decoder, resized (ours)                 corrupted  (B, C, H, W)
    2.2      ResPix       pixels, normalised in the 8 x 8 window around each  pixel_statistics
    2.2      RevDet       ids != g, at every position                         replaced   (B, L), 1 = replaced
    Table 13 loss = L_gen + w L_enh, w = 10 for ResPix, 1 for RevDet
encoder.pth is the enhancer: a plain ViT, or a ResNet-50 under torchvision's names, without classifier.
Tables 4 to 10 and A.1: the flags that name them. cim_pixels.py: the generators without tokens.

Not in the paper, our choice or BEiT's: one k for all images of an update, positions without repetition; the
tokenizer sees the crop at 8 px per token (bicubic), its image comes back bilinear; learnable positions, crops
of .08 to 1, lr not scaled with the batch; ResPix adds mean |e| and mean e^2; windows cover offsets -3 to +4,
reflected at borders, all channels together; a ResNet's head is a 1 x 1 convolution and a pixel shuffle;
BatchNorm's statistics are each process's own; --initial mae.

    python cim.py --demo                                                 a few minutes on a CPU
    python convert_dalle.py encoder.pkl decoder.pkl --out dalle.pth      OpenAI's tokenizer, once
    python convert_dalle.py --train --data PHOTOS --out runs/tokenizer   or one of your own
    torchrun --nproc_per_node 4 cim.py --tokenizer dalle.pth             the paper's run, on data/imagenet
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    VIT_SIZES,
    Normalize,
    RandomResizedCrop,
    ResNet50,
    RunConfig,
    UserError,
    ViT,
    adamw,
    gather_tokens,
    launch,
    load_weights,
    open_data,
    parameter_groups,
    patch_grid,
    patches_to_pixels,
    patchify,
    read_file,
    remember_statistics,
    save_image_grid,
    set_lr,
    stable_seed,
    unpatchify,
    warmup_cosine,
)
from convert_dalle import DEMO as DEMO_TOKENIZER
from convert_dalle import load_tokenizer, train_tokenizer


@dataclass
class Config(RunConfig):
    # model
    enhancer: Literal["vit", "resnet50"] = "vit"  # the network that is pre-trained (tables 8 and 9)
    model: Literal[*VIT_SIZES] | None = None  # ViT, generator's width; default base, with a ResNet small
    patch_size: int = 16  # pixels
    resnet_width: int = 64  # ResNet: channels of its stem; 64 is x1, 128 x2, 256 x4 (table 8)
    generator_depth: int | None = None  # the generator's blocks; default 4 (table 5)
    share: bool = True  # patch embedding and two blocks, between ViTs that start together (table 5)
    initial: Literal["beit", "mae"] = "beit"  # values of ViTs; mae: sine-cosine positions, for short runs
    tokenizer: str | None = None  # file of convert_dalle.py: DALL-E's, or VQGAN's (table 10)
    # method
    objective: Literal["respix", "revdet", "none"] = "respix"  # restore pixels, detect tokens, none (A.1)
    num_masked: tuple[int, int] | None = None  # least, most hidden; default 100,120 of 196
    mask: Literal["random", "block"] = "random"  # hide single patches or BEiT's blocks (table 4)
    sampling: Literal["softmax", "argmax", "uniform"] = "softmax"  # how hidden tokens are drawn (table 7)
    pixel_norm: Literal["window", "patch", "none"] = "window"  # ResPix's target (table 6)
    window: int = 8  # pixels of a window's side; small patches want half of theirs, as the paper's 8 of 16
    window_per_channel: bool = False  # a window's mean and deviation per channel
    generator_init: str | None = None  # generator from last.pth of --objective none (A.1)
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
    free_on_resume = RunConfig.free_on_resume | {"tokenizer"}  # by path; the digest must be the same

    def __post_init__(self):
        super().__post_init__()
        self.model = self.model or ("base" if self.enhancer == "vit" else "small")
        self.grid = patch_grid(self.img_size, self.patch_size)
        depth, L = VIT_SIZES[self.model][1], math.prod(self.grid)
        self.generator_depth = self.generator_depth or min(4, depth)
        self.share &= self.enhancer == "vit" and self.objective != "none" and not self.generator_init
        self.warmup_epochs = min(10.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        low, high = self.num_masked = self.num_masked or tuple(round(n * L / 196) for n in (100, 120))
        if not 0 < low <= high < L:
            raise ValueError(f"--num_masked {low},{high} does not lie between 1 and {L - 1}, of {L} patches")
        if not 1 + self.share <= self.generator_depth <= depth:
            raise ValueError(f"--generator_depth {self.generator_depth}: 2 to {depth}, or 1 and --no-share")
        if self.freeze_generator and not self.generator_init:
            raise ValueError("--freeze_generator needs --generator_init")
        if self.objective == "none" and (self.generator_init or self.init):
            raise ValueError("--objective none goes with neither --generator_init nor --init")
        if self.enhancer == "resnet50" and (any(n % 32 for n in self.img_size) or 32 % self.patch_size):
            raise ValueError("a ResNet needs an --img_size of n x 32 and a --patch_size that divides 32")
        if not (self.tokenizer or self.check_data or self.demo and not self.generator_init):
            raise ValueError("--tokenizer FILE is needed: `python convert_dalle.py --help` shows how")


# Grey: tokens of few updates are poor in colour. Windows of 8 px, a ResNet's 8-px patches and 38 to 42 hidden
# ones (the paper's share is 33 to 39): as in docs/RESULTS.md.
DEMO = {"data": "shapes", "img_size": (25, 25), "in_chans": 1, "model": "nano", "patch_size": 5,
        "resnet_width": 16, "generator_depth": 2, "initial": "mae", "epochs": 0.75, "batch_size": 16,
        "lr": 2e-3, "warmup_epochs": 0.1, "log_every": 25}


def presets(flags):
    resnet = {"img_size": (64, 64), "patch_size": 8, "num_masked": (38, 42)}
    return DEMO | (resnet if flags.enhancer == "resnet50" else {}) if flags.demo else {}


# ---- masking, sampling, targets ----------------------------------------------------------------------------


def block_order(grid, n):
    """BEiT's blocks, for --mask block: (L,) whose k smallest values hide blocks, for any k <= n.

    Blocks of 16/196 of the grid up to what is still to be covered, aspect .3 to 1/.3 (log-uniform), are laid
    until that is n positions. A value is the number of the position's first block, plus its place in the grid
    as a fraction.
    """
    h, w = grid
    place, number = torch.arange(h * w).view(grid) / (h * w), 0
    order = place + h * w  # not covered: last
    while (left_over := n - (order < h * w).sum().item()) > 0:
        area, aspect, top, left = torch.rand(4).tolist()
        smallest = h * w * 16 / 196
        area = smallest + area * max(0, left_over - smallest)
        aspect = math.exp(math.log(0.3) * (1 - 2 * aspect))
        height = min(h, max(1, round(math.sqrt(area * aspect))))
        width = min(w, max(1, round(math.sqrt(area / aspect))))
        top, left = int(top * (h - height + 1)), int(left * (w - width + 1))
        box = (slice(top, top + height), slice(left, left + width))
        order[box] = order[box].minimum(min(number, h * w - 1) + place[box])
        number += 1
    return order.flatten()


def sample_num_masked(step, cfg):
    """k of eq. (1): uniform between both --num_masked, the same in all processes and micro-steps."""
    low, high = cfg.num_masked
    return low + stable_seed(cfg.seed, step) % (high - low + 1)


def sample(logits, sampling):
    """x^sampled of eq. (2), at temperature 1: logits (..., V) float32 -> ids (...)."""
    if sampling == "uniform":
        return torch.randint(logits.shape[-1], logits.shape[:-1], device=logits.device)
    if sampling == "softmax":
        # Gumbel noise: torch.multinomial would raise on NaN, before the update can be skipped.
        logits = logits - torch.empty_like(logits).exponential_().log()
    return logits.argmax(-1)


def window_statistics(images, per_channel=False, size=8):
    """Mean and deviation (B, 1 or C, H, W) float32 of the size x size window around each pixel, over all
    channels or each: offsets -3 to +4 for a size of 8, reflected at the borders, eps 1e-6."""
    before = (size - 1) // 2
    # float64, the image's mean off: where an area is nearly flat, E[x^2] - E[x]^2 cancels nearly all digits.
    wide = torch.float32 if images.device.type == "mps" else torch.float64  # which MPS lacks
    centre = images.mean((1, 2, 3), keepdim=True)
    x = F.pad(images.to(wide) - centre, (before, size - 1 - before) * 2, mode="reflect")
    moments = [values if per_channel else values.mean(1, keepdim=True) for values in (x, x.square())]
    mean, square = (F.avg_pool2d(moment, size, stride=1) for moment in moments)
    return mean.float() + centre, ((square - mean.square()).clamp(min=0) + 1e-6).sqrt().float()


def pixel_statistics(images, cfg):
    """Mean and deviation, for images (B, C, H, W), that --pixel_norm takes out of ResPix's target."""
    if cfg.pixel_norm == "window":
        return window_statistics(images, cfg.window_per_channel, cfg.window)
    if cfg.pixel_norm == "none":
        return torch.zeros_like(images), torch.ones_like(images)
    variance, mean = torch.var_mean(patchify(images, cfg.patch_size), -1, keepdim=True)  # unbiased, as MAE's
    return (patches_to_pixels(x, cfg.patch_size, cfg.grid) for x in (mean, (variance + 1e-6).sqrt()))


def revdet_scores(verdict, replaced, loss):
    """What RevDet has learned, {name: scalar}: AUC, the probability that a replaced token's verdict (B, L) is
    above an original one's; and gain, the entropy of the labels (B, L) minus the loss: 0 for their mean."""
    share, n, ones = replaced.mean(), replaced.numel(), replaced.sum()
    ranks = verdict.flatten().argsort().argsort() + 1.0
    auc = ((ranks * replaced.flatten()).sum() - ones * (ones + 1) / 2) / (ones * (n - ones))
    entropy = F.binary_cross_entropy(share, share)
    return {"revdet_auc": auc, "revdet_gain": entropy - loss}


# ---- generator and enhancer --------------------------------------------------------------------------------


def init_weights(model, cfg):
    """--initial: MAE's; or BEiT's, normal of deviation .02, cut there, branches of block l over sqrt(2 l)."""
    if cfg.initial == "mae":
        return model.init_weights()
    normal = functools.partial(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            normal(module.weight)
            nn.init.zeros_(module.bias)
    for name in ("cls_token", "mask_token", "pos_embed"):
        if hasattr(model, name):
            normal(getattr(model, name))
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
        return self.head(self.norm(gather_tokens(x[:, 1:], positions)))


class ViTEnhancer(ViT):
    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.pos_embed.requires_grad_()
        values = cfg.patch_size**2 * cfg.in_chans if cfg.objective == "respix" else 1
        self.head = nn.Linear(self.embed_dim, values)
        init_weights(self, cfg)

    def forward(self, corrupted):
        """(B, C, H, W) -> an image (B, C, H, W) or logits (B, 1, h, w): a linear layer on each patch token"""
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
    """Generator and enhancer. `tokenizer` is set later, and is no submodule."""

    def __init__(self, cfg, generator):
        super().__init__()
        self.cfg = cfg
        for name, values in (("pixel_mean", cfg.mean), ("pixel_std", cfg.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.generator = generator
        if cfg.freeze_generator:
            generator.requires_grad_(False)
        if cfg.objective != "none":
            self.enhancer = ViTEnhancer(cfg) if cfg.enhancer == "vit" else ResNetEnhancer(cfg)
        if cfg.share:
            self.generator.patch_embed = self.enhancer.patch_embed
            for i in (0, 1):
                self.generator.blocks[i] = self.enhancer.blocks[i]

    def normalize(self, pixels):
        return (pixels - self.pixel_mean) / self.pixel_std

    def image_of(self, values):
        """(B, L) -> (B, 1, H, W)"""
        return patches_to_pixels(values[..., None].float(), self.cfg.patch_size, self.cfg.grid)

    def corrupt(self, pixels, noise, k):
        """Eqs. (1) and (2), for pixels (B, C, H, W) in [0, 1]; the k smallest of noise (B, L) are hidden.

        Returns the corrupted image in [0, 1], no gradient; mask and replaced, (B, L) bool; L_gen; its terms.
        """
        images, n = self.normalize(pixels), self.cfg.num_masked[1]
        order = noise.argsort(1)
        mask = order.argsort(1) < k
        golden, positions = self.tokenizer.ids(pixels), order[:, :n]  # n positions whatever k: static shapes
        logits = self.generator(images, mask, positions).float()
        targets, counts = golden.gather(1, positions), torch.arange(n, device=noise.device) < k
        token_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (token_loss.view_as(targets) * counts).sum() / (len(golden) * k)
        with torch.no_grad():
            correct = ((logits.argmax(-1) == targets) * counts).sum() / (len(golden) * k)
            terms = {"generator_loss": loss, "generator_accuracy": correct}
            if self.cfg.objective == "none" and self.training:
                return None, mask, None, loss, terms
            sampled = torch.where(counts, sample(logits, self.cfg.sampling), targets)
            ids = golden.scatter(1, positions, sampled)
            corrupted = F.interpolate(self.tokenizer.pixels(ids), pixels.shape[2:], mode="bilinear")
        return corrupted, mask, ids != golden, loss, terms

    def forward(self, pixels, noise, k):
        """Returns the loss (table 13) and its terms; `replaced`: share of replaced tokens."""
        corrupted, _, replaced, loss, terms = self.corrupt(pixels, noise, k)
        if self.cfg.objective != "none":
            pred = self.enhancer(self.normalize(corrupted)).float()
            with torch.autocast(pixels.device.type, enabled=False):  # target and loss in float32
                if self.cfg.objective == "respix":
                    images = self.normalize(pixels)
                    mean, deviation = pixel_statistics(images, self.cfg)
                    target, weight = (images - mean) / deviation, 10
                    enhancer_loss = F.l1_loss(pred, target) + F.mse_loss(pred, target)
                else:
                    verdict, weight = pred.flatten(1), 1
                    enhancer_loss = F.binary_cross_entropy_with_logits(verdict, replaced.float())
                    terms |= revdet_scores(verdict.detach(), replaced.float(), enhancer_loss)
            loss = weight * enhancer_loss + (0 if self.cfg.freeze_generator else loss)
            terms |= {"enhancer_loss": enhancer_loss, "replaced": replaced.float().mean()}
        return loss, {name: value.detach() for name, value in {"loss": loss, **terms}.items()}


# ---- training ----------------------------------------------------------------------------------------------


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches; returns the loss's terms, means over it, as floats."""
    optimizer.zero_grad(set_to_none=True)
    total, restore_statistics = {}, remember_statistics(model)
    k = torch.full((), sample_num_masked(run.step, run.cfg), device=run.device)  # a tensor: no recompilation
    for pixels, noise in run.micro_batches(model, batches):
        with run.autocast():
            loss, terms = model(pixels, noise, k)
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


@torch.no_grad()
def save_pictures(path, model, examples, run):
    """PNG as figs. 2 to 4: original, masked, four samples; template and output, or replaced and verdict."""
    (pixels, noise), cfg = examples, model.cfg
    k = torch.tensor(sum(cfg.num_masked) // 2, device=noise.device)
    torch.manual_seed(cfg.seed)
    model.eval()
    samples = [model.corrupt(pixels, noise, k)[:3] for _ in range(4)]
    corrupted, mask, replaced = samples[0]
    columns = {"original": pixels, "masked": torch.where(model.image_of(mask) > 0, 0.5, pixels)}
    columns |= {f"corrupted {i}": image for i, (image, *_) in enumerate(samples, start=1)}
    caption = f"sampling {cfg.sampling}"
    if cfg.objective != "none":
        pred = model.enhancer(model.normalize(corrupted)).float()
    if cfg.objective == "respix":
        images = model.normalize(pixels)
        mean, deviation = pixel_statistics(images, cfg)
        template, _ = window_statistics(images, cfg.window_per_channel, cfg.window)
        restored = {"template": template, "output": pred * deviation + mean}
        columns |= {name: run.normalize.undo(image) for name, image in restored.items()}
        caption += "; template: the window's mean (fig. 4); output: for corrupted 1"
        caption += "" if cfg.pixel_norm == "none" else ", un-normalised with the original's statistics (A.2)"
    if cfg.objective == "revdet":
        verdict = pred.sigmoid().flatten(1)
        columns |= {"replaced": model.image_of(replaced), "verdict": model.image_of(verdict)}
        caption += "; white: tokens of corrupted 1 that differ from the original's, and their probability"
    model.train()
    save_image_grid(path, list(zip(*columns.values(), strict=True)), list(columns), caption)


def load_enhancer(model, cfg):
    """--init"""
    if cfg.init:
        ignore = ("head.", "fc_norm.", "fc.", "decoder", "mask_token")
        load_weights(model.enhancer, cfg.init, allow_missing=("head.",), ignore=ignore)


def load_generator(generator, cfg, tokenizer):
    """--generator_init; UserError if it predicts another tokenizer's tokens."""
    content = read_file(cfg.generator_init)
    if content.get("inputs", {}).get("tokenizer_sha256") not in (tokenizer.digest, None):
        raise UserError(f"{cfg.generator_init} was trained with another tokenizer than {cfg.tokenizer}")
    load_weights(generator, cfg.generator_init, prefix="generator.", content=content)


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.grid, cfg.in_chans, run.device) if cfg.tokenizer else None
    vocab_size = tokenizer.vocab_size if tokenizer else DEMO_TOKENIZER["vocab_size"]
    model = CorruptedImageModel(cfg, BEiTGenerator(cfg, vocab_size))
    # Past nn.Module's __setattr__: a submodule would be saved, trained and synchronised; this one is frozen.
    model.__dict__["tokenizer"] = tokenizer
    load_enhancer(model, cfg)
    if cfg.generator_init:
        load_generator(model.generator, cfg, tokenizer)
    sample_noise = functools.partial(torch.rand, math.prod(cfg.grid))
    if cfg.mask == "block":
        sample_noise = functools.partial(block_order, cfg.grid, cfg.num_masked[1])
    to_pixels = Normalize((0.0,) * cfg.in_chans, (1.0,) * cfg.in_chans, run.device)  # the model normalises
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures, to_pixels)
    run.fit_batch(source)
    run.start(len(source), f"lr {cfg.lr:.3g}, whatever the batch")
    if not tokenizer:  # --demo
        cfg.tokenizer = f"{run.out}/tokenizer/tokenizer.pth"
        if not run.checkpoints() and not train_tokenizer(cfg, run):
            return
        tokenizer = load_tokenizer(cfg.tokenizer, cfg.grid, cfg.in_chans, run.device)
        model.__dict__["tokenizer"] = tokenizer
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay, ("pos_embed", "cls_token")), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.inputs = {"tokenizer_sha256": tokenizer.digest}
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    batches = run.batches(source, RandomResizedCrop(cfg.img_size, (0.08, 1.0)), sample_noise, to_pixels)
    examples = run.examples(source, sample_noise, to_pixels)

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples, run)
        if run.save_due():
            encoder = None if cfg.objective == "none" else model.enhancer.trunk_state()
            run.save(encoder, prefix="enhancer.", model=cfg.model if cfg.enhancer == "vit" else "resnet50")
    run.finish(*(("last.pth, pictures/, curves.png", []) if cfg.objective == "none" else ()))


if __name__ == "__main__":
    launch(Config, presets, train, "cim")
