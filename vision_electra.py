"""Vision ELECTRA: adversarial masked image modelling with a hierarchical discriminator.

Submitted to ICLR 2024, openreview.net/forum?id=yKC6Jd0CsP. The main text is not at hand: reconstructed from
the supplement (whose sections and tables are cited), the abstract, and reviews; what is not there is "ours".

Idea. A generator, MAE (arXiv 2111.06377), fills in the hidden patches of an image. A discriminator, our aim,
sees the original and the filled-in image, and says of each image and each patch whether it is original. Both
learn at once: the discriminator to tell, the generator to reconstruct and, a little, to deceive.

Data flow, in the order of the code (source, then name and shape in the code)
    h      = encoder(visible patches)             MAE ViT-B (0.1)               latent    (B, 1 + len_keep, D)
    h'     = h + sigma e, e ~ N(0, 1), per patch  abstract; place, sigma: ours  add_noise
    q      = decoder(h')                          MAE; raw pixels: ours         pred      (B, L, p*p*C)
    x^     = hidden patches of q, visible of x    ours                          composite (B, C, H, W)
    s, s_j = a logit per image, one per patch     abstract; heads: ours         verdicts  (B,), (B, L)
    L_rec  = mean over hidden patches of (q - x)^2                       MAE    masked_mse
    L_adv  = bce(s(x^), 1) + mean over hidden j of bce(s_j(x^), 1)       ours   adversarial_loss
    L_D    = 1/2 [bce(s(x), 1) + bce(s(x^), 0)]                          ours   discriminator_loss, image
           + 1/2 [mean_j bce(s_j(x), 1) + mean_j bce(s_j(x^), 1 - m_j)]  ours   patch; m_j = 1 where hidden
    loss   = L_rec + 0.2 L_adv + L_D              0.2: table 1; joint: a review, of the paper's eq. (5)
bce(s, y) is the binary cross-entropy of sigmoid(s) and y; s > 0 says original. One backward pass, two aims:
L_adv sees the discriminator's parameters detached, L_D sees x^ detached.
encoder.pth is the discriminator, a plain ViT; last.pth has the generator too.

From scratch, training often collapses (0.2). The paper's discriminator starts from SimMIM's ViT-B, which only
vision_electra_simmim.py has; here from any plain ViT. The generator must predict raw pixels from its start,
as mae_mff.py --target raw and MAE's mae_visualize_vit_base.pth do (others: --generator_warmup_epochs).
Ours: sigma = 0.1, on the encoder's normalised tokens; one linear layer per head; levels weigh 1 : 1; L_adv
does not saturate; composites not clipped; lr = base_lr x batch / 512, as SimMIM's, down to 0 (SimMIM: to 5e-6
per 512 images); no clipping of gradients (SimMIM: 5); one AdamW for both.

    python vision_electra.py --demo                                         three minutes on a CPU
    torchrun --nproc_per_node 4 mae_mff.py --fuse_layers 11 --target raw    a start for both networks, then
    torchrun --nproc_per_node 4 vision_electra.py --generator_init runs/mae_mff/last.pth \\
        --discriminator_init runs/mae_mff/encoder.pth                       50 epochs
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.transforms.v2.functional import gaussian_blur

from common import (
    VIT_SIZES,
    Block,
    RandomResizedCrop,
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
    print0,
    read_file,
    save_image_grid,
    set_lr,
    sincos_pos_embed,
    unpatchify,
    warmup_cosine,
    weights_of,
)

# Width, blocks and heads: MAE sec. 4.1 from base on, the MFF authors' code for small, the others ours.
DECODERS = {"nano": (128, 1, 4), "tiny": (192, 4, 6), "small": (384, 8, 12)}
DECODERS |= dict.fromkeys(("base", "large", "huge"), (512, 8, 16))
LEVELS = {"both": ("image", "patch"), "image": ("image",), "patch": ("patch",), "none": ()}


@dataclass
class Config(RunConfig):
    # model
    model: Literal[*VIT_SIZES] = "base"  # discriminator and generator's encoder: the size of that ViT
    patch_size: int | None = None  # pixels; default 16, 14 for huge
    # method
    mask_ratio: float = 0.75  # share of hidden patches (supplement, table 1)
    noise: float = 0.1  # deviation of the noise on the generator's latent patch tokens
    paste: bool = True  # composite: visible patches are the original's; --no-paste: the whole prediction
    levels: Literal[*LEVELS] = "both"  # of the verdicts; none: no discriminator, an MAE of raw pixels
    adversarial: Literal["nonsaturating", "none"] = "nonsaturating"  # the generator's second loss
    gan_weight: float = 0.2  # weight of that loss (supplement, table 1)
    gan_ratio: float = 0.0  # or: its gradient on the decoder's last layer, as a share of L_rec's; 0 = off
    adversarial_levels: Literal["both", "image", "patch"] = "both"  # of the verdicts that it deceives
    blur: float = 0.0  # deviation in pixels of a Gaussian blur of all that the discriminator sees
    generator_warmup_epochs: float = 0.0  # passes before that loss counts
    generator_waits: bool = False  # in these passes the generator learns nothing at all
    generator_lr_scale: float = 1.0  # its learning rate = the discriminator's times this
    generator_init: str | None = None  # generator from an MAE of raw pixels, ours (last.pth) or official
    discriminator_init: str | None = None  # discriminator from these weights (ours, official MAE, timm)
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

    def __post_init__(self):
        super().__post_init__()
        self.patch_size = self.patch_size or (14 if self.model == "huge" else 16)
        self.warmup_epochs = min(10.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        L = math.prod(patch_grid(self.img_size, self.patch_size))
        if not 0 < int(L * (1 - self.mask_ratio)) < L:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {L} patches hides none or all of them")
        if self.levels == "none" and self.discriminator_init:
            raise ValueError("--levels none has no discriminator for --discriminator_init")
        if self.levels != "none" and not set(LEVELS[self.adversarial_levels]) & set(LEVELS[self.levels]):
            raise ValueError(f"--adversarial_levels {self.adversarial_levels}, but --levels {self.levels}")
        if self.gan_ratio and self.compile:
            raise ValueError("--gan_ratio takes gradients inside the forward pass: not with --compile")


# With a GAN weight of 0.2 a generator of this size deceives and reconstructs worse: hence 0.005, once the
# discriminator is strong. Both networks start from a generator trained alone, with WARMSTART.
DEMO = {"data": "shapes", "img_size": (24, 24), "model": "nano", "patch_size": 4, "epochs": 0.25,
        "gan_weight": 0.005, "generator_warmup_epochs": 0.17, "batch_size": 16, "base_lr": 2.4e-2,
        "warmup_epochs": 0.03, "log_every": 25}
WARMSTART = {"levels": "none", "noise": 0.0, "epochs": 0.6, "batch_size": 16, "base_lr": 3.2e-2,
             "warmup_epochs": 0.15, "betas": (0.9, 0.95)}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- masking, noise, losses --------------------------------------------------------------------------------


def random_masking(noise, mask_ratio):
    """Which patches stay visible: those with the smallest noise.

    noise: (B, L). Returns ids_keep (B, len_keep), ids_restore (B, L), mask (B, L) float, 1 = hidden;
    len_keep = int(L * (1 - mask_ratio)). Equal noise gives equal masks.
    """
    len_keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :len_keep], ids_restore, (ids_restore >= len_keep).float()


def add_noise(latent, sigma):
    """h' = h + sigma e, e ~ N(0, 1), on patch tokens; the class token stays. latent: (B, 1 + len_keep, D)."""
    return torch.cat([latent[:, :1], latent[:, 1:] + sigma * torch.randn_like(latent[:, 1:])], dim=1)


def masked_mse(pred, target, mask):
    """L_rec: mean squared error on the hidden patches (MAE sec. 3).

    pred, target: (B, L, p*p*C); mask: (B, L), 1 = hidden, at least one. Returns a scalar: mean over the
    values of a patch, then over all hidden patches of the batch.
    """
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def discriminator_loss(real, fake, generated):
    """L_D by level, {"image": scalar, "patch": scalar}: 1/2 (mean over originals + mean over composites).

    real, fake: verdicts on originals and on composites; generated: 1 where a composite is generated, else 0;
    each {"image": (B,), "patch": (B, L)}. bce(s, 1) = softplus(-s), bce(s, 0) = softplus(s).
    """
    return {level: 0.5 * (F.softplus(-real[level]).mean() + F.softplus(s * (2 * generated[level] - 1)).mean())
            for level, s in fake.items()}


def adversarial_loss(fake, generated):
    """L_adv, a scalar: mean over what is generated, summed over the levels. Arguments as above."""
    return sum((F.softplus(-s) * generated[level]).sum() / generated[level].sum()
               for level, s in fake.items())


def accuracies(real, fake, generated):
    """{name: scalar}: share of right verdicts on what is original, in composites too, and on what is not."""
    result = {}
    for level, s in fake.items():
        made = generated[level]
        hits = (real[level] > 0).sum() + ((s > 0) * (1 - made)).sum()
        result[f"{level}_accuracy_real"] = hits / (real[level].numel() + (1 - made).sum())
        result[f"{level}_accuracy_fake"] = ((s <= 0) * made).sum() / made.sum()
    return result


# ---- generator and discriminator ---------------------------------------------------------------------------


class Generator(ViT):
    """MAE: encoder of the visible patches, decoder of all, raw pixels. Names of its parameters are MAE's."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        width, depth, heads = DECODERS[cfg.model]
        self.decoder_embed = nn.Linear(self.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(width, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, cfg.patch_size**2 * cfg.in_chans)
        self.init_weights()

    def encode(self, images, ids_keep):
        """Visible patches through all blocks: normalised tokens (B, 1 + len_keep, D)."""
        x = self.prepend_cls(gather_tokens(self.embed(images), ids_keep))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

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


class Discriminator(ViT):
    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.blur = cfg.blur
        self.heads = nn.ModuleDict({level: nn.Linear(self.embed_dim, 1) for level in LEVELS[cfg.levels]})
        self.init_weights()

    def forward(self, images):
        """(B, C, H, W) -> verdicts {"image": (B,), "patch": (B, L)} float32, logits: > 0 is original."""
        if self.blur:
            images = gaussian_blur(images, [2 * math.ceil(2 * self.blur) + 1] * 2, [self.blur] * 2)
        x = super().forward(images)
        tokens = {"image": x[:, 0], "patch": x[:, 1:]}
        return {level: head(tokens[level]).squeeze(-1).float() for level, head in self.heads.items()}


class VisionElectra(nn.Module):
    """cell: side in pixels of what is hidden and judged, on a grid; reconstruction_loss: L_rec."""

    reconstruction_loss = staticmethod(masked_mse)

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.generator = cfg, Generator(cfg)
        self.discriminator = None if cfg.levels == "none" else Discriminator(cfg)
        self.cell, self.grid = cfg.patch_size, self.generator.grid

    def generate(self, images, noise):
        """(B, C, H, W), noise (B, L) -> pred (B, L, p*p*C) float32; mask (B, L), 1 = hidden; diversity, a
        scalar: root mean square of what other noise in the latent changes in an eighth of the images."""
        ids_keep, ids_restore, mask = random_masking(noise, self.cfg.mask_ratio)
        latent = self.generator.encode(images, ids_keep)
        pred = self.generator.decode(add_noise(latent, self.cfg.noise), ids_restore).float()
        few = slice(len(pred) // 8 or 1)
        with torch.no_grad():  # only now: autocast would remember casts of weights that have no gradient
            other = self.generator.decode(add_noise(latent[few], self.cfg.noise), ids_restore[few]).float()
            return pred, mask, masked_mse(other, pred[few], mask[few]).sqrt()

    def compose(self, images, pred, mask):
        """x^ (B, C, H, W), and what of it is generated, {"image": (B,), "patch": (B, L)}, 0 or 1."""
        generated = mask if self.cfg.paste else torch.ones_like(mask)
        where = patches_to_pixels(generated[..., None], self.cell, self.grid) > 0
        composite = torch.where(where, unpatchify(pred, self.cell, self.grid), images)
        return composite, {"image": torch.ones_like(mask[:, 0]), "patch": generated}

    def balanced_weight(self, reconstruction, adversarial):
        """The weight at which L_adv's gradient on the decoder's last layer is --gan_ratio times L_rec's
        (VQGAN's adaptive weight)."""
        last, losses = self.generator.decoder_pred.weight, (reconstruction, adversarial)
        wanted, own = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses)
        return self.cfg.gan_ratio * wanted / (own + 1e-8)

    def forward(self, images, noise, gan_weight):
        """Returns L_rec + gan_weight L_adv + L_D and its terms; without a discriminator L_rec alone."""
        pred, mask, diversity = self.generate(images, noise)
        reconstruction = self.reconstruction_loss(pred, patchify(images, self.cell), mask)
        if self.discriminator is None:
            return reconstruction, {"loss": reconstruction.detach()}
        composite, generated = self.compose(images, pred, mask)
        both = self.discriminator(torch.cat([images, composite.detach()]))
        real, fake = ({level: verdict.chunk(2)[i] for level, verdict in both.items()} for i in (0, 1))
        by_level = discriminator_loss(real, fake, generated)
        terms = {f"{level}_loss": value for level, value in by_level.items()}
        terms |= accuracies(real, fake, generated)
        adversarial = adversarial_loss(fake, generated).detach()
        if gan_weight:  # once more, now with a gradient for the composite and none for the discriminator
            frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            fake = functional_call(self.discriminator, frozen, (composite,))
            fake = {level: s for level, s in fake.items() if level in LEVELS[self.cfg.adversarial_levels]}
            adversarial = adversarial_loss(fake, generated)
            if self.cfg.gan_ratio:
                gan_weight = self.balanced_weight(reconstruction, adversarial)
                terms["gan_weight"] = gan_weight
        loss = reconstruction + gan_weight * adversarial + sum(by_level.values())
        terms |= {"loss": loss, "reconstruction_loss": reconstruction, "adversarial_loss": adversarial,
                  "generator_diversity": diversity}
        return loss, {name: value.detach() for name, value in terms.items()}


# ---- training ----------------------------------------------------------------------------------------------


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches; returns the loss's terms, their means as floats."""
    optimizer.zero_grad(set_to_none=True)
    total, cfg = {}, run.cfg
    deceive = cfg.adversarial != "none" and run.epoch >= cfg.generator_warmup_epochs
    for images, noise in run.micro_batches(model, batches):
        with run.autocast():
            loss, terms = model(images, noise, cfg.gan_weight if deceive else 0.0)
        scaler.scale(loss / run.accum_steps).backward()
        total = {name: total.get(name, 0) + term / run.accum_steps for name, term in terms.items()}
    scaler.unscale_(optimizer)
    if cfg.generator_waits and run.epoch < cfg.generator_warmup_epochs:
        getattr(model, "module", model).generator.zero_grad(set_to_none=True)  # AdamW passes over it
    for name, network in getattr(model, "module", model).named_children():  # DDP's content
        total[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(network.parameters(), math.inf)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
    terms, finite = run.agree(total, grad_norm)  # the one host synchronisation
    if finite:
        scaler.step(optimizer)
    scaler.update()
    return terms


def watch_for_collapse(terms, run):
    """After the warm-up, warn when a moving average of the discriminator's accuracy comes to chance, the
    supplement's collapse (0.2), or to 1; again if that happens after it had left."""
    if run.skipped or run.epoch < run.cfg.warmup_epochs:
        return
    for level in LEVELS[run.cfg.levels]:
        accuracy = (terms[f"{level}_accuracy_real"] + terms[f"{level}_accuracy_fake"]) / 2
        before, warned = run.saved.get(f"watch_{level}", (0.75, False))
        average = 0.99 * before + 0.01 * accuracy
        if not warned and not 0.53 < average < 0.995:
            warned = True
            print0(f"warning: the discriminator's {level}-level accuracy is long at {average:.2f}: " + (
                "it learns nothing; lower --gan_weight, or try --discriminator_init" if average < 0.75 else
                "nothing is left to learn; pictures/ may show what gives the generator away"))
        elif 0.6 < average < 0.98:
            warned = False
        run.saved[f"watch_{level}"] = average, warned


@torch.no_grad()
def save_pictures(path, model, examples, run):
    """PNG with original, masked input, prediction, composite, and the verdicts on original and composite."""
    (images, noise), cfg, p, grid = examples, model.cfg, model.cell, model.grid
    torch.manual_seed(cfg.seed)
    pred, mask, *_ = model.generate(images, noise)
    composite, _ = model.compose(images, pred, mask)
    original, generated, pasted = map(run.normalize.undo, (images, unpatchify(pred, p, grid), composite))
    masked = torch.where(patches_to_pixels(mask[..., None], p, grid) > 0, 0.5, original)
    columns = {"original": original, "masked": masked, "generated": generated, "composite": pasted}
    caption = f"{cfg.mask_ratio:.0%} hidden, noise {cfg.noise}; verdicts: blue original, red generated"
    for title, x in (("composite", composite), ("original", images)) if model.discriminator else ():
        verdict = {level: s.sigmoid() for level, s in model.discriminator(x).items()}
        real = verdict["patch"] if "patch" in verdict else verdict["image"][:, None].expand_as(mask)
        red, blue = 2 * (1 - real), 2 * real
        heat = torch.stack([red, torch.minimum(red, blue), blue], dim=-1).clamp(max=1)
        columns[f"verdict on {title}"] = patches_to_pixels(heat, p, grid)
        if "image" in verdict:
            caption += f"; mean probability that {title}s are original {verdict['image'].mean():.2f}"
    save_image_grid(path, list(zip(*columns.values(), strict=True)), list(columns), caption)


def load_initial(model, cfg):
    """--generator_init, refused where it is known not to predict raw pixels, and --discriminator_init"""
    if cfg.generator_init:
        path, content = cfg.generator_init, read_file(cfg.generator_init)
        names, config = weights_of(content, "generator.").keys(), content.get("config")
        target = config.get("target", "raw") if isinstance(config, dict) else None
        normalised = target in ("mae", "pixmim") or getattr(content.get("args"), "norm_pix_loss", False)
        if normalised or any("fuse_" in name for name in names):
            raise UserError(f"{path} is no plain MAE of raw pixels: train one, mae_mff.py --target raw "
                            "--fuse_layers LAST_BLOCK, or give its encoder.pth to start the decoder anew")
        decoder = any("decoder" in name for name in names)
        load_weights(model.generator, path, allow_missing=() if decoder else ("decoder", "mask_token"),
                     ignore=("head.", "fc_norm."), prefix="generator.", content=content)
        if decoder and target is None:
            print0(f"{path} does not say whether it predicts raw pixels; if not: --generator_warmup_epochs")
    load_discriminator(model, cfg)


def load_discriminator(model, cfg, others=()):
    """--discriminator_init; others: how names start of more weights that it has no use for."""
    if cfg.discriminator_init:
        content = read_file(cfg.discriminator_init)
        own = "discriminator.norm.weight" in weights_of(content, "")  # our last.pth: with the heads
        unused = [f"heads.{level}" for level in LEVELS["both"] if level not in LEVELS[cfg.levels]]
        load_weights(model.discriminator, cfg.discriminator_init, allow_missing=("heads.",),
                     ignore=("decoder", "mask_token", "head.", "fc_norm.", *others, *unused),
                     prefix="discriminator." if own else None, content=content)


def train_warm_start(cfg, run, n, train, values):
    """--demo: train the generator alone, in a folder of its own, with these values of flags; where no file
    was given, start from it. Returns whether that run was completed."""
    out = f"{run.out}/warmstart"
    print0(f"first the generator alone, which both networks start from: {out}/")
    batch_size = min(values["batch_size"], n) // run.world_size * run.world_size
    own = {"out": out, "resume": True, "batch_size": batch_size, "micro_batch": None}
    own |= dict.fromkeys(cfg.start_from)
    ended = run.run_stage(train, dataclasses.replace(cfg, **values | own), run.method)
    cfg.generator_init = cfg.generator_init or f"{out}/last.pth"
    cfg.discriminator_init = cfg.discriminator_init or f"{out}/encoder.pth"
    return ended


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    model = VisionElectra(cfg)
    sample_noise = functools.partial(torch.rand, math.prod(model.generator.grid))
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures)
    load_initial(model, cfg)
    run.fit_batch(source)
    peak_lr = cfg.base_lr * cfg.batch_size / 512
    run.start(len(source), f"lr {peak_lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 512")
    given = cfg.levels == "none" or (cfg.generator_init and cfg.discriminator_init)
    if cfg.demo and not given and not run.checkpoints():
        if not train_warm_start(cfg, run, len(source), train, WARMSTART):
            return
        load_initial(model, cfg)
    ddp = run.prepare(model)
    scaled = (lambda name: int("discriminator." in name)) if cfg.generator_lr_scale != 1 else None
    groups = parameter_groups(model, cfg.weight_decay, (), scaled, cfg.generator_lr_scale)
    optimizer = adamw(groups, cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    crop = RandomResizedCrop(cfg.img_size, scale=(0.67, 1.0))
    batches, examples = run.batches(source, crop, sample_noise), run.examples(source, sample_noise)
    encoder = "discriminator" if model.discriminator else "generator"

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        watch_for_collapse(terms, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples, run)
        if run.save_due():
            run.save(getattr(model, encoder).trunk_state(), prefix=f"{encoder}.")
    run.finish()


if __name__ == "__main__":
    launch(Config, presets, train, "vision_electra")
