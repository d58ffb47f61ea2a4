"""Vision ELECTRA: adversarial masked image modelling with hierarchical discrimination, reconstructed from what is public.

VE       Vision ELECTRA: Adversarial Masked Image Modeling with Hierarchical Discriminator, submitted to ICLR 2024
         (openreview.net/forum?id=yKC6Jd0CsP). Its main text is not at hand: this follows the supplement (numbers of sections,
         tables and figures here are the supplement's), the abstract, and what reviews quote. What they leave open is marked
         "ours". It builds on MAE (arXiv 2111.06377), SimMIM (arXiv 2111.09886) and ELECTRA (arXiv 2003.10555).

Idea. A generator, MAE, fills in the hidden patches of an image. A discriminator, our aim, sees the original and the filled-in
image, and says of each image and of each patch whether it is original. Both learn at once: the discriminator to tell, the
generator to reconstruct and, a little, not to be told. Noise in its latent tokens keeps the generator's patches diverse.

Data flow, in the order of the code (what it is, where it is from; its name here and its shape on the right)
    h    = encoder(visible patches)               MAE ViT-B (0.1)               latent         (B, 1 + len_keep, D)
    h'   = h + sigma e, e ~ N(0, 1), per patch    abstract; place, sigma: ours  add_noise
    q    = decoder(h')                            MAE, raw pixels: ours         pred           (B, L, p*p*C)
    x^   = hidden patches of q, visible ones of x ours                          composite      (B, C, H, W)
    s, s_j = one logit per image, one per patch   abstract; heads: ours         verdicts       (B,), (B, L); > 0: original
    L_rec  = mean over hidden patches of (q - x)^2                       MAE    masked_mse
    L_adv  = bce(s(x^), 1) + mean over hidden j of bce(s_j(x^), 1)       ours   adversarial_loss
    L_D    = 1/2 [bce(s(x), 1) + bce(s(x^), 0)]                          ours   discriminator_loss, image level
           + 1/2 [mean_j bce(s_j(x), 1) + mean_j bce(s_j(x^), 1 - m_j)]  ours   patch level; m_j = 1 where hidden
    loss   = L_rec + 0.2 L_adv + L_D              weight 0.2: table 1; joint, as a review reports of the paper's eq. (5)
bce(s, y) is the binary cross-entropy of sigmoid(s) and y. L_adv goes through the discriminator with its parameters detached,
and L_D sees x^ detached: each network has its own aim, in one backward pass.
encoder.pth is the discriminator, a plain ViT; last.pth has the generator too.

What the supplement and the reviews try: --mask_ratio 0.6 ... 0.95 and --gan_weight 0.5 (table 1), --noise 0, and two starts
(0.2): from scratch, which often collapses, and continual, with a pre-trained discriminator: --discriminator_init,
--generator_init. --levels image|patch leaves out one level. The paper's discriminator starts from SimMIM's ViT-B, whose
relative positions and layer scale no ViT here has; any plain ViT does. Where its generator starts is unknown; an MAE that
predicts raw pixels is a natural one: mae_mff.py --fuse_layers 11 --target raw, or MAE's mae_visualize_vit_base.pth. Its
mae_pretrain_vit_base_full.pth learnt normalised pixels: with that, or with an encoder alone, add --generator_warmup_epochs.

Ours
    noise     sigma = 0.1 (1 would be the literal reading) on the encoder's normalised patch tokens; while pre-training only
    masks     uniform random; 16-px patches; fixed sine-cosine positions
    composite in normalised pixels, neither clipped nor rounded; --no-paste: the whole prediction, every patch of it generated
    heads     one linear layer on the class token, one on all patch tokens, after the final LayerNorm; levels weigh 1 : 1
    L_adv     non-saturating, both levels; --adversarial none: the generator learns from L_rec alone, as in ELECTRA and CIM
    warm-up   --generator_warmup_epochs: L_adv counts from then on only; L_D does from the start
    training  lr = base_lr x batch / 512 (the recipe looks like SimMIM's); one AdamW for both networks; no clipping
Not built: SimMIM as generator, Swin as discriminator. The paper's 83.43 % (ViT-B) is not above the 83.8 % that SimMIM's authors
report for their own ViT-B.

    python vision_electra.py --demo                                                    three minutes on a CPU
    torchrun --nproc_per_node 4 mae_mff.py --fuse_layers 11 --target raw               a start for both networks (ours), then
    torchrun --nproc_per_node 4 vision_electra.py --generator_init runs/mae_mff/last.pth \\
        --discriminator_init runs/mae_mff/encoder.pth                                  50 epochs
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

from common import (
    BESIDE_TRUNK,
    VIT_SIZES,
    Block,
    KeyedBatches,
    Normalise,
    RandomResizedCrop,
    Refused,
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
    save_pictures,
    say,
    set_lr,
    sincos_pos_embed,
    spread,
    take_tokens,
    unpatchify,
    warmup_cosine,
)

DECODERS = {  # width, blocks, heads: MAE sec. 4.1 for base to huge, the MFF authors' code for small, the others ours
    "nano": (128, 1, 4),
    "tiny": (192, 4, 6),
    "small": (384, 8, 12),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}
LEVELS = {"both": ("image", "patch"), "image": ("image",), "patch": ("patch",)}


@dataclass
class Config(RunConfig):
    # model
    model: VitSize = opt("base", "discriminator and generator's encoder: width, depth and heads of that ViT")
    patch_size: int | None = opt(None, "pixels; default 16, 14 for huge")
    # method
    mask_ratio: float = opt(0.75, "share of hidden patches (supplement, table 1)")
    noise: float = opt(0.1, "deviation of the noise on the generator's latent patch tokens")
    paste: bool = opt(True, "composite: visible patches are the original's; --no-paste: the whole prediction")
    levels: Literal["both", "image", "patch"] = opt("both", "what the discriminator judges")
    adversarial: Literal["nonsaturating", "none"] = opt("nonsaturating", "the generator's loss through the discriminator")
    gan_weight: float = opt(0.2, "weight of that loss (supplement, table 1)")
    generator_warmup_epochs: float = opt(0.0, "passes before that loss counts")
    generator_init: str | None = opt(None, "generator from an MAE of raw pixels, ours (last.pth) or official; a fresh schedule")
    discriminator_init: str | None = opt(None, "discriminator from these weights (ours, official MAE, timm); likewise")
    # optimisation: supplement, 0.1
    epochs: float = opt(50.0, "passes over the data")
    batch_size: int = opt(320, "images per update, over all processes")
    micro_batch: int | None = opt(None, "images per forward pass of one process; default: the largest that divides, up to 256")
    base_lr: float = opt(2e-5, "learning rate per 512 images")
    min_lr: float = opt(0.0, "where the cosine ends")
    warmup_epochs: float | None = opt(None, "linear warm-up; default a fifth of the epochs, at most the paper's 10")
    weight_decay: float = opt(0.05, "AdamW")
    betas: tuple[float, float] = opt((0.9, 0.999), "AdamW")
    clip_grad: float = opt(0.0, "largest gradient norm, of both networks together; 0 = no clipping")
    # run
    pictures: int = opt(8, "images drawn at each epoch's end; 0 = none")

    def __post_init__(self):
        super().__post_init__()
        self.patch_size = self.patch_size or (14 if self.model == "huge" else 16)
        self.warmup_epochs = min(10.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        L = math.prod(patch_grid(self.img_size, self.patch_size))
        if not 0 < int(L * (1 - self.mask_ratio)) < L:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {L} patches hides none or all of them")
        if min(self.noise, self.gan_weight, self.generator_warmup_epochs) < 0:
            raise ValueError("--noise, --gan_weight and --generator_warmup_epochs must not be negative")


# At this size a GAN weight of 0.2 lets the generator deceive and reconstruct worse, and the discriminator forgets. So: 0.005,
# once the discriminator is strong, which the supplement's 0.2 asks for. Raw pixels suit drawn, flat shapes.
DEMO = {"data": "shapes", "img_size": (32, 32), "model": "nano", "patch_size": 4, "gan_weight": 0.005, "epochs": 1.8,
        "generator_warmup_epochs": 1.2, "batch_size": 64, "base_lr": 8e-3, "warmup_epochs": 0.1, "log_every": 25}
WARMSTART = {"target": "raw", "epochs": 2.0, "batch_size": 128, "base_lr": 6e-3, "warmup_epochs": 0.5}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- masking, noise, losses ------------------------------------------------------------------------------------------


def random_masking(draw, mask_ratio):
    """Which patches stay visible: those with the smallest numbers.

    draw: (B, L). Returns ids_keep (B, len_keep), ids_restore (B, L), mask (B, L) float, 1 = hidden;
    len_keep = int(L * (1 - mask_ratio)).
    """
    len_keep = int(draw.shape[1] * (1 - mask_ratio))
    ids_shuffle = draw.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :len_keep], ids_restore, (ids_restore >= len_keep).float()


def add_noise(latent, scale):
    """h' = h + sigma e, e ~ N(0, 1), on patch tokens; the class token stays. latent: (B, 1 + len_keep, D); scale: sigma."""
    return torch.cat([latent[:, :1], latent[:, 1:] + scale * torch.randn_like(latent[:, 1:])], dim=1) if scale else latent


def masked_mse(pred, target, mask):
    """L_rec: squared error on the hidden patches (MAE sec. 3).

    pred, target: (B, L, p*p*C); mask: (B, L), 1 = hidden, at least one. Returns a scalar: mean over the values of a patch,
    then over all hidden patches of the batch.
    """
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def discriminator_loss(real, fake, generated):
    """L_D by level: {"image": scalar, "patch": scalar}, each 1/2 (mean over originals + mean over composites).

    real, fake: verdicts on originals and on composites, {"image": (B,), "patch": (B, L)}; generated: (B, L), 1 = generated
    patch; the others, a composite's visible patches, count as original. bce(s, 1) = softplus(-s), bce(s, 0) = softplus(s).
    """
    sign = {"image": 1.0, "patch": 2 * generated - 1}
    return {level: 0.5 * (F.softplus(-real[level]).mean() + F.softplus(fake[level] * sign[level]).mean()) for level in real}


def adversarial_loss(fake, generated):
    """L_adv, summed over the levels: what the generator pays for being told, non-saturating.

    fake: verdicts on composites, {"image": (B,), "patch": (B, L)}; generated: (B, L), 1 = generated: only these patches count.
    """
    made = {"image": torch.ones_like(generated[:, 0]), "patch": generated}
    return sum((F.softplus(-s) * made[level]).sum() / made[level].sum() for level, s in fake.items())


def accuracies(real, fake, generated):
    """{name: scalar}: share of right verdicts on what is original (a composite's visible patches too) and on what is not."""
    made, result = {"image": torch.ones_like(generated[:, 0]), "patch": generated}, {}
    for level, s in fake.items():
        hits = (real[level] > 0).sum() + ((s > 0) * (1 - made[level])).sum()
        result[f"{level}_accuracy_real"] = hits / (real[level].numel() + (1 - made[level]).sum())
        result[f"{level}_accuracy_fake"] = ((s <= 0) * made[level]).sum() / made[level].sum()
    return result


# ---- generator and discriminator -------------------------------------------------------------------------------------


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
        x = self.prepend_cls(take_tokens(self.embed(images), ids_keep))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent, ids_restore):
        """(B, 1 + len_keep, D) -> predicted patches (B, L, p*p*C)."""
        x = self.decoder_embed(latent)
        B, L = ids_restore.shape
        hidden = self.mask_token.to(x.dtype).expand(B, L - (x.shape[1] - 1), -1)
        patches = take_tokens(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)  # undo the shuffle
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


class Discriminator(ViT):
    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.heads = nn.ModuleDict({level: nn.Linear(self.embed_dim, 1) for level in LEVELS[cfg.levels]})
        self.init_weights()

    def forward(self, images):
        """(B, C, H, W) -> verdicts {"image": (B,), "patch": (B, L)} float32, logits: > 0 is original"""
        x = super().forward(images)
        tokens = {"image": x[:, 0], "patch": x[:, 1:]}
        return {level: head(tokens[level]).squeeze(-1).float() for level, head in self.heads.items()}


class VisionElectra(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.generator, self.discriminator = cfg, Generator(cfg), Discriminator(cfg)

    def generate(self, images, draw):
        """images (B, C, H, W), draw (B, L) -> pred (B, L, p*p*C) float32; mask (B, L), 1 = hidden; what `decode` was given."""
        ids_keep, ids_restore, mask = random_masking(draw, self.cfg.mask_ratio)
        latent = self.generator.encode(images, ids_keep)
        return self.generator.decode(add_noise(latent, self.cfg.noise), ids_restore).float(), mask, latent, ids_restore

    @torch.no_grad()
    def diversity(self, pred, mask, latent, ids_restore):
        """Root mean square between pred and what other noise makes, over hidden patches of the first eighth of the images."""
        few = slice(len(pred) // 8 or 1)
        other = self.generator.decode(add_noise(latent[few], self.cfg.noise), ids_restore[few]) if self.cfg.noise else pred[few]
        return masked_mse(other.float(), pred[few], mask[few]).sqrt()

    def compose(self, images, pred, mask):
        """x^: pred in the hidden patches, the image in the visible ones; and which patches are generated (B, L) float."""
        generated = mask if self.cfg.paste else torch.ones_like(mask)
        p, grid = self.discriminator.patch_size, self.discriminator.grid
        return torch.where(spread(generated[..., None], p, grid) > 0, unpatchify(pred, p, grid), images), generated

    def forward(self, images, draw, gan_weight):
        """Returns L_rec + gan_weight L_adv + L_D and its terms."""
        pred, mask, *source = self.generate(images, draw)
        reconstruction = masked_mse(pred, patchify(images, self.discriminator.patch_size), mask)
        composite, generated = self.compose(images, pred, mask)
        both = self.discriminator(torch.cat([images, composite.detach()]))
        real, fake = ({level: verdict.chunk(2)[i] for level, verdict in both.items()} for i in (0, 1))
        by_level = discriminator_loss(real, fake, generated)
        if gan_weight:  # once more, now with a gradient for the composite and none for the discriminator
            frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            adversarial = adversarial_loss(functional_call(self.discriminator, frozen, (composite,)), generated)
        else:
            adversarial = adversarial_loss({level: verdict.detach() for level, verdict in fake.items()}, generated)
        loss = reconstruction + gan_weight * adversarial + sum(by_level.values())
        # Diversity comes last: it would leave casts of the decoder's weights without gradient in autocast's cache.
        terms = {"loss": loss, "reconstruction_loss": reconstruction, "adversarial_loss": adversarial,
                 **{f"{level}_loss": value for level, value in by_level.items()}, **accuracies(real, fake, generated),
                 "generator_diversity": self.diversity(pred, mask, *source)}
        return loss, {name: value.detach() for name, value in terms.items()}


# ---- training --------------------------------------------------------------------------------------------------------


def gan_weight(epoch, cfg):
    """Weight of L_adv at a fractional epoch."""
    return cfg.gan_weight if cfg.adversarial != "none" and epoch >= cfg.generator_warmup_epochs else 0.0


def train_step(model, batches, to_images, weight, optimizer, scaler, step, cfg, plan, run):
    """One update of both networks from plan.accum_steps micro-batches; weight: of L_adv. Returns {name: float, mean over the
    update} and the sample numbers."""
    optimizer.zero_grad(set_to_none=True)
    total, samples = {}, []
    for micro_step in range(plan.accum_steps):
        batch = next(batches)
        run.seed(step, micro_step)
        images, draw = to_images(batch), batch["draw"].to(run.device, non_blocking=True)
        with gradient_sync(model, micro_step == plan.accum_steps - 1):
            with autocast(run.device, run.amp_dtype):
                loss, terms = model(images, draw, weight)
            scaler.scale(loss / plan.accum_steps).backward()
        total = {name: total.get(name, 0) + term / plan.accum_steps for name, term in terms.items()}
        samples += batch["index"].tolist()
    networks = getattr(model, "module", model)  # DDP's content
    norms = torch.stack([nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
                         for network in (networks.generator, networks.discriminator)])
    # Shares of the whole norm, as fp16's scale is still in the gradients: finish_update takes it out.
    shares = dict(zip(("grad_norm_generator", "grad_norm_discriminator"), norms / norms.norm(), strict=True))
    stats = finish_update(run, optimizer, scaler, total | shares, cfg.clip_grad)
    return stats | {name: stats[name] * stats["grad_norm"] for name in shares}, samples


def watch_for_collapse(run, stats, cfg):
    """Warn when the discriminator's accuracy (mean of real and fake, averaged over some hundred updates) comes to chance or to
    1, and again if that happens after it had left. Chance is the supplement's collapse (0.2); 1 leaves nothing to learn."""
    for level in LEVELS[cfg.levels] if not stats["skipped"] else ():
        accuracy = (stats[f"{level}_accuracy_real"] + stats[f"{level}_accuracy_fake"]) / 2
        average, state = run.kept.get(f"watch_{level}", (0.75, ""))
        average = 0.99 * average + 0.01 * accuracy
        if not state and not 0.53 < average < 0.995:
            state = "chance" if average < 0.75 else "1"
            run.print(f"warning: the discriminator's {level}-level accuracy has long been at {state} ({average:.3f}): " + (
                "it cannot tell original from generated, and learns nothing; lower --gan_weight"
                + ("" if cfg.discriminator_init else " or start it from pre-trained weights, --discriminator_init")
                if state == "chance" else "it has nothing left to learn; pictures/ show what gives the generator away"))
        elif 0.6 < average < 0.98:
            state = ""
        run.kept[f"watch_{level}"] = (average, state)


@torch.no_grad()
def draw_pictures(path, model, batch, to_images, cfg):
    """PNG with original, masked input, prediction, composite, and the discriminator's verdicts on original and composite."""
    images, draw = to_images(batch), batch["draw"].to(to_images.device)
    torch.manual_seed(cfg.seed)
    pred, mask, *_ = model.generate(images, draw)
    composite, _ = model.compose(images, pred, mask)
    p, grid = cfg.patch_size, model.discriminator.grid
    hidden = spread(mask[..., None], p, grid)
    columns = [to_images.undo(x) for x in (images, images, unpatchify(pred, p, grid), composite)]
    columns[1] = columns[1] * (1 - hidden) + 0.5 * hidden
    verdicts = [{level: s.sigmoid() for level, s in model.discriminator(x).items()} for x in (composite, images)]
    for verdict in verdicts:
        real = verdict["patch"] if "patch" in verdict else verdict["image"][:, None].expand_as(mask)
        heat = torch.stack([(2 - 2 * real).clamp(max=1), 1 - (2 * real - 1).abs(), (2 * real).clamp(max=1)], dim=-1)
        columns.append(spread(heat, p, grid))
    caption = f"{cfg.mask_ratio:.0%} hidden, noise {cfg.noise}; verdicts: blue original, white undecided, red generated"
    if "image" in verdicts[0]:
        seen = [verdict["image"].mean() for verdict in verdicts]
        caption += "; mean probability of being original, on the image level: composites {:.2f}, originals {:.2f}".format(*seen)
    titles = ["original", "masked", "generated", "composite", "verdict on composite", "verdict on original"]
    save_pictures(path, list(zip(*columns, strict=True)), titles, caption)


def load_initial(model, cfg):
    """--generator_init, refused where it is known not to predict raw pixels from its last block, and --discriminator_init."""
    if cfg.generator_init:
        content = read_file(cfg.generator_init)
        weights, config, arguments = content.get("model", content), content.get("config"), content.get("args")
        target = config.get("target", "raw") if isinstance(config, dict) else None
        fused, normalised = any("fuse_" in name for name in weights), getattr(arguments, "norm_pix_loss", False)
        if fused or normalised or target in ("mae", "pixmim"):
            raise Refused(f"{cfg.generator_init} is no plain MAE of raw pixels: give its encoder alone (the decoder then "
                          "starts anew), or train one, mae_mff.py --fuse_layers LAST_BLOCK --target raw")
        decoder = any("decoder" in name for name in weights)
        load_weights(model.generator, cfg.generator_init, allow_missing=() if decoder else ("decoder", "mask_token"),
                     ignore=("head.", "fc_norm."), part=("generator.",), content=content)
        if decoder and target is None:
            say(f"{cfg.generator_init} must predict raw pixels, which it does not say; if not: --generator_warmup_epochs")
    if cfg.discriminator_init:
        unused = {"heads.image", "heads.patch"} - {f"heads.{level}" for level in LEVELS[cfg.levels]}
        ignore = (*(name for name in BESIDE_TRUNK if name != "heads."), *unused)
        load_weights(model.discriminator, cfg.discriminator_init, allow_missing=("heads.",), ignore=ignore,
                     part=("discriminator.", "enhancer."))


def demo_mae(cfg, run, n):
    """The MAE that --demo's networks start from where no file is given: how it is trained, and with what."""
    try:
        import mae_mff  # the demo alone needs a second script
    except ModuleNotFoundError:
        raise Refused("--demo begins with an MAE: put mae_mff.py beside this script, or give both --..._init FILE") from None
    shared = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(RunConfig)}
    shared |= {name: getattr(cfg, name) for name in ("model", "patch_size", "mask_ratio", "pictures")}
    B = min(WARMSTART["batch_size"], n) // run.world_size * run.world_size
    return mae_mff.train, mae_mff.Config(**shared | WARMSTART | {
        "out": f"{run.out}/warmstart", "resume": True, "batch_size": B, "fuse_layers": (VIT_SIZES[cfg.model][1] - 1,)})


def train(cfg, run):
    source = open_data(cfg)
    if cfg.check_data:
        return check_data(source, run.workers)
    plan = make_plan(len(source), cfg, run.world_size)
    mean, std = normalisation(cfg)
    torch.manual_seed(cfg.seed)
    model = VisionElectra(cfg)
    load_initial(model, cfg)
    lr = cfg.base_lr * cfg.batch_size / 512
    needs_mae = cfg.demo and not (cfg.generator_init and cfg.discriminator_init)
    if needs_mae:
        train_mae, stage = demo_mae(cfg, run, len(source))
    run.start(plan, f"lr {lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 512")
    if needs_mae and not run.checkpoints():
        run.print(f"first an MAE, which both networks start from: {stage.out}/")
        stage_run = Run(stage, "mae_mff")
        train_mae(stage, stage_run)
        run.go_on_after(stage_run)
        if stage_run.stopping:
            return
        run.print("now Vision ELECTRA")
        cfg.generator_init = cfg.generator_init or f"{stage.out}/last.pth"
        cfg.discriminator_init = cfg.discriminator_init or f"{stage.out}/encoder.pth"
        load_initial(model, cfg)
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start = run.load(state)

    draw = functools.partial(torch.rand, math.prod(model.discriminator.grid))
    views = Views(source, RandomResizedCrop(cfg.img_size, scale=(0.67, 1.0)), cfg.seed, run.bad_files.allow(len(source)), draw)
    batches = run.timed(make_loader(views, KeyedBatches(plan, cfg.seed, run, start), run))
    to_images = Normalise(mean, std, run.device)
    fixed = picture_batch(source, cfg, draw)
    meta = {"method": "vision_electra", "model": cfg.model, "img_size": cfg.img_size, "patch_size": cfg.patch_size,
            "in_chans": cfg.in_chans, "mean": mean, "std": std}

    for step in range(start, plan.steps):
        now = warmup_cosine(plan.epoch(step), lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, now)
        weight = gan_weight(plan.epoch(step), cfg)
        stats, samples = train_step(ddp, batches, to_images, weight, optimizer, scaler, step, cfg, plan, run)
        if plan.epoch(step) >= cfg.warmup_epochs:
            watch_for_collapse(run, stats, cfg)
        run.end_update(step + 1, stats, now, samples)
        with run.off_the_clock():
            if path := run.picture_due(step + 1):
                draw_pictures(path, model, fixed, to_images, cfg)
            if run.save_due(step + 1):
                meta["epoch"] = plan.epoch(step + 1)
                run.export("encoder.pth", model.discriminator.trunk_state(), meta)
                run.save(step + 1, state, meta)
        if run.stopping:
            return run.print(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume carries on")
    demo = "--demo --mode linear" if cfg.demo else f"--data {cfg.data}"
    run.print(f"done: {run.out}/last.pth, encoder.pth, pictures/; next:\n"
              f"  python finetune.py {demo} --weights {run.out}/encoder.pth")


if __name__ == "__main__":
    launch(Config, presets, train, "vision_electra")
