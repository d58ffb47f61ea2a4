"""BEiT-v2 with DDAE's deep dynamic supervision (DDS): DDAE, table 2. --no-dds is BEiT-v2.

BEiT-v2  Peng et al., BEiT v2, arXiv 2208.06366, with the settings of its code for 300 epochs
DDAE     Chen et al., AAAI 2024: ddae.py, which has masks, distances and weights

Idea. A frozen tokenizer, VQ-KD, made to keep CLIP's features, gives each patch one of 8192 ids: what it shows
rather than its colours. BEiT-v2 predicts those of hidden patches. DDS asks for them at several depths, and
weighs each hidden patch by its distance to the nearest visible one, to a learned power.

Data flow, in the order of the papers (source, the paper's symbol; its name here and its shape on the right)
    BEiT-v2  M         75 of 196 patches, in blocks                       distance   (B, L), 0 = visible
    BEiT-v2  z         nearest entries of the codebook                    target     (B, n), n hidden patches
    BEiT-v2  x^M       patch embeddings, the mask token at M                         (B, 1 + L, D)
    BEiT-v2            the aggregation: two blocks on class token of block 12, patches of block 9
    BEiT-v2  p(z|x^M)  final norm and lm_head                             logits     (K + 1, B, n, V)
    DDAE (2) h_i       and over its maximum                               weight     (K, B, n)
    loss = sum_i lambda_i mean(weight_i CE_i) + mean(CE of the aggregation) + .5 sum_i sqrt(n) mean ||h_i||_2
i: blocks 3, 6, 9, 12; lambda_i: .75, last 1. BEiT-v2 has mean(CE_12) and the aggregation's. encoder.pth is
beit.py's network, layer scale multiplied into its layers.

Not in the papers, our choice (docs/ddae_beitv2.md has the reasons)
    levels       all through the final norm and head; the aggregation is none, so without weights
    masks        exactly 75, of rectangles of up to 60 (ddae.py's); BEiT's generator may stop short of 75
    --demo       its tokenizer is no network: an id is the nearest of 32 patches, as different as they come

    python ddae_beitv2.py --demo                                               two minutes on a CPU
    torchrun --nproc_per_node 4 ddae_beitv2.py --tokenizer vqkd.pth            table 2, on data/imagenet
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from beit import RelPosViT, from_beit
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
    load_pickled,
    load_weights,
    open_data,
    parameter_groups,
    patch_grid,
    patches_to_pixels,
    patchify,
    read_file,
    save_image_grid,
    set_lr,
    unpatchify,
    warmup_cosine,
)
from ddae import dynamic_weights, regulariser, sample_mask


@dataclass
class Config(RunConfig):
    # model
    model: Literal[*VIT_SIZES] = "base"  # encoder: width, depth and heads of that ViT
    patch_size: int = 16  # pixels
    layer_scale: float = 0.1  # initial factor of every branch; BEiT-v2's large model: 1e-5
    initial: Literal["beit", "mae"] = "beit"  # values of the other weights; mae: for small models, short runs
    tokenizer: str | None = None  # VQ-KD's file; --demo makes a small one
    # method
    mask_ratio: float = 0.383  # share of hidden patches: int(L * mask_ratio) of L
    mask: Literal["two_stage", "block", "random"] = "block"  # as in ddae.py
    dds: bool = True  # deep dynamic supervision; --no-dds is BEiT-v2 (DDAE, table 2)
    num_levels: int = 4  # K, supervised block outputs (DDAE, table 6)
    # optimisation: BEiT-v2's code for 300 epochs; DDAE's table 2 has 100
    epochs: float = 100.0  # passes over the data
    batch_size: int = 2048  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of one process; default: the largest up to 256
    lr: float = 1.5e-3  # peak learning rate, absolute: not scaled with the batch
    min_lr: float = 1e-5  # where the cosine ends
    warmup_epochs: float | None = None  # linear warm-up; default a tenth of the epochs, at most 10
    weight_decay: float = 0.05  # AdamW; none for the class token
    betas: tuple[float, float] = (0.9, 0.98)  # AdamW
    clip_grad: float = 3.0  # largest gradient norm; 0 = no clipping
    # run
    draw: str | None = None  # draw what these weights (last.pth) predict, to --out X.png
    pictures: int = 8  # images drawn at each epoch's end; 0 = none

    free_on_resume = RunConfig.free_on_resume | {"tokenizer"}  # by path; the digest must be the same

    def __post_init__(self):
        super().__post_init__()
        self.grid, depth = patch_grid(self.img_size, self.patch_size), VIT_SIZES[self.model][1]
        self.n_masked = int(math.prod(self.grid) * self.mask_ratio)
        self.warmup_epochs = min(10.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs
        if not 0 < self.n_masked < math.prod(self.grid):
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {self.grid} patches hides none or all")
        if depth % self.num_levels:
            raise ValueError(f"--num_levels {self.num_levels} does not divide the {depth} blocks")
        if not (self.tokenizer or self.demo or self.check_data):
            raise ValueError("--tokenizer FILE is needed, VQ-KD's: docs/ddae_beitv2.md says where it is")


# Grey: what colours an image has is easily predicted, and says little of its shapes.
DEMO = {"data": "shapes", "img_size": (25, 25), "in_chans": 1, "model": "nano", "patch_size": 5,
        "num_levels": 2, "layer_scale": 1.0, "initial": "mae", "epochs": 1.4, "batch_size": 16, "lr": 2e-3}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- tokenizer ---------------------------------------------------------------------------------------------


class Tokenizer(nn.Module):
    """VQ-KD's encoder and codebook, with its names. grid: patches (h, w); patch_size: its own, in pixels."""

    def __init__(self, size, grid, patch_size, in_chans=3, vocab_size=8192, code_dim=32):
        super().__init__()
        self.img_size, self.vocab_size = [n * patch_size for n in grid], vocab_size
        self.encoder = ViT(size, self.img_size, patch_size, in_chans)
        D = self.encoder.embed_dim
        self.encoder.fc_norm, self.encoder.norm = self.encoder.norm, nn.Identity()
        self.encode_task_layer = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, code_dim))
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(vocab_size, code_dim)})

    def codes(self, pixels):
        """(B, C, H, W) in [0, 1] -> (B, L, code_dim)"""
        if list(pixels.shape[2:]) != self.img_size:  # the student's patches have another size
            pixels = F.interpolate(pixels, self.img_size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.encode_task_layer(self.encoder.fc_norm(self.encoder(2 * pixels - 1)[:, 1:]))

    @torch.no_grad()
    def ids(self, pixels):
        """(B, C, H, W) in [0, 1] -> (B, L) int64: the entry of the largest cosine"""
        codes = self.codes(pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # bf16 cannot tell 8192 entries apart
            entries = F.normalize(self.quantize["embedding"].weight, dim=-1)
            return (F.normalize(codes.float(), dim=-1) @ entries.T).argmax(-1)


def load_tokenizer(path, cfg, device="cpu"):
    """Frozen tokenizer of VQ-KD's file, on cfg's grid, or of --demo's. `digest`: the file's SHA-256."""
    content = read_file(path, load_pickled)
    content = content.get("model", content)
    if "centres" not in content:
        tokenizer = vqkd(path, content, cfg)
    elif content["centres"].shape[1] != cfg.patch_size**2 * cfg.in_chans:
        raise UserError(f"--tokenizer {path} is of a demo with another --patch_size or --in_chans")
    else:
        tokenizer = PatchTokenizer(content["centres"], cfg.patch_size)
    tokenizer.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return tokenizer.to(device).eval().requires_grad_(False)


def vqkd(path, content, cfg):
    """Tokenizer of {name: tensor}, VQ-KD's"""
    parts = ("encoder.", "encode_task_layer.", "quantize.embedding.weight")  # others are of its training
    weights = {name: x for name, x in content.items() if name.startswith(parts)}
    names = "encoder.patch_embed.proj.weight", "encode_task_layer.2.weight", "quantize.embedding.weight"
    if missing := [name for name in names if name not in weights]:
        raise UserError(f"--tokenizer {path} lacks {missing[0]}: expected VQ-KD's file")
    (D, in_chans, p, _), (code_dim, _), (vocab_size, _) = (weights[name].shape for name in names)
    sizes = {width: name for name, (width, *_) in VIT_SIZES.items()}
    if D not in sizes or in_chans != cfg.in_chans:
        raise UserError(f"--tokenizer {path} has width {D} and {in_chans} channels; expected a width of "
                        f"{', '.join(map(str, sizes))} and --in_chans, {cfg.in_chans}")
    tokenizer = Tokenizer(sizes[D], cfg.grid, p, in_chans, vocab_size, code_dim)
    load_weights(tokenizer, path, content={"model": from_beit(weights)})
    return tokenizer


class PatchTokenizer(nn.Module):
    """--demo's, in place of VQ-KD: a patch's id is the nearest of `centres` (V, p*p*C), which are patches."""

    def __init__(self, centres, patch_size):
        super().__init__()
        self.register_buffer("centres", centres)
        self.patch_size, self.vocab_size = patch_size, len(centres)

    def ids(self, pixels):
        """(B, C, H, W) -> (B, L) int64"""
        return torch.cdist(normalized_patches(pixels, self.patch_size), self.centres).argmin(-1)


def normalized_patches(pixels, p):
    """(B, C, H, W) -> (B, L, p*p*C); each image gets mean 0 and deviation 1 before"""
    return patchify(F.layer_norm(pixels, pixels.shape[1:]), p)


def make_tokenizer(cfg, run, batches):
    """PatchTokenizer's file, for --demo: 32 patches of 3 batches, each the farthest from those before it."""
    images = torch.cat([batch[0] for _, batch in zip(range(3), batches, strict=False)])
    codes = normalized_patches(run.normalize.undo(images), cfg.patch_size).flatten(0, 1)
    centres = codes[:1]
    while len(centres) < 32:
        centres = torch.cat([centres, codes[torch.cdist(codes, centres).amin(1).argmax()][None]])
    run.export("tokenizer.pth", {"centres": centres}, {})
    run.gather(None)  # the others wait for it


# ---- student, losses ---------------------------------------------------------------------------------------


def token_loss(logits, target):
    """Cross-entropy of each hidden patch: logits (K, B, n, V), target (B, n) -> (K, B, n) float32"""
    ids = target.flatten().repeat(len(logits))
    return F.cross_entropy(logits.float().flatten(0, 2), ids, reduction="none").view(logits.shape[:3])


def sum_of_levels(error, weight):
    """DDAE's eq. (3) with cross-entropies: the mean of weight x error over hidden patches, summed over levels
    with lambda_i: .75, and 1 for the last. error, weight: (K, B, n)."""
    levels = (error * weight).mean((1, 2))
    return 0.75 * levels[:-1].sum() + levels[-1]


class ScaledBlock(Block):
    """With layer scale: a learned factor for each channel of both branches."""

    def __init__(self, dim, num_heads, scale):
        super().__init__(dim, num_heads)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), scale)) for _ in range(2))

    def forward(self, x, bias):
        x = x + self.gamma_1 * self.attn(self.norm1(x), bias)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class DeepDynamicBEiTv2(RelPosViT):
    """Encoder (trunk), aggregation, head, beta. `tokenizer` and `to_pixels` are set later: no submodules."""

    def __init__(self, cfg, vocab_size):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        self.cfg, depth, (D, _, heads) = cfg, self.depth, VIT_SIZES[cfg.model]
        K = cfg.num_levels if cfg.dds else 1
        self.levels = [depth * i // K for i in range(1, K + 1)]  # g_i, blocks counted from 1
        self.early = max(depth - 3, depth * 3 // 4)  # 9 of 12, 21 of 24
        self.blocks, self.cls_pt_layers = (
            nn.ModuleList(ScaledBlock(D, heads, cfg.layer_scale) for _ in range(n)) for n in (depth, 2))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.lm_head = nn.Linear(D, vocab_size)
        self.beta = nn.Parameter(torch.full((K,), -0.5 * cfg.dds), cfg.dds)  # 0: equal weights
        self.init_weights()

    def init_weights(self):
        """--initial: BEiT's, normal of deviation .02, cut there, branches of block l / sqrt(2 l); MAE's,
        with relative positions of deviation 2 (ours)."""
        if self.cfg.initial == "mae":
            nn.init.normal_(self.rel_pos_bias.relative_position_bias_table, std=2)  # from 0 it learns slowly
            return super().init_weights()
        linear = [module for module in self.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for tensor in (self.cls_token, self.mask_token, *(module.weight for module in linear)):
            nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)
        for module in linear:
            nn.init.zeros_(module.bias)
        for number, block in (*enumerate(self.blocks, 1), *enumerate(self.cls_pt_layers, self.early + 1)):
            for module in (block.attn.proj, block.mlp.fc2):
                module.weight.data.div_(math.sqrt(2 * number))

    def trunk_state(self):
        """What a RelPosViT loads: layer scale is multiplied in."""
        return from_beit(super().trunk_state())

    def predict(self, images, distance):
        """(B, C, H, W), (B, L) -> positions (B, n) of the hidden patches, and the logits there, of the levels
        and the aggregation: (K + 1, B, n, V)"""
        hidden = distance > 0
        positions = hidden.byte().argsort(dim=1, descending=True, stable=True)[:, : self.cfg.n_masked]
        x = self.embed(images)
        x = self.prepend_cls(torch.where(hidden[..., None], self.mask_token.to(x.dtype), x))
        bias, outputs = self.rel_pos_bias(), []
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x)
        x = torch.cat([x[:, :1], outputs[self.early - 1][:, 1:]], dim=1)
        for block in self.cls_pt_layers:
            x = block(x, bias)
        latent = [gather_tokens(y[:, 1:], positions) for y in (*(outputs[i - 1] for i in self.levels), x)]
        return positions, self.lm_head(self.norm(torch.stack(latent)))

    def forward(self, images, distance):
        """Returns the loss and its terms: sum over the levels, aggregation, eq. (6)'s norm, as added; of the
        last level alone the mean cross-entropy and the accuracy, comparable between runs; beta of each."""
        positions, logits = self.predict(images, distance)
        target = self.tokenizer.ids(self.to_pixels(images)).gather(1, positions)
        with torch.autocast(images.device.type, enabled=False):  # losses in float32
            error, (h, weight) = token_loss(logits, target), dynamic_weights(distance, self.beta)
            *_, last, aggregation = error.mean((1, 2))
            weight = weight.gather(2, positions.expand(len(h), -1, -1))
            terms = {"levels": sum_of_levels(error[:-1], weight), "aggregation": aggregation}
            if self.cfg.dds:
                terms["eq6_reg"] = 0.5 * regulariser(h, (distance > 0).float())
            loss = sum(terms.values())
            accuracy = (logits[-2].argmax(-1) == target).float().mean()
        terms |= {"loss": loss, "cross_entropy": last, "accuracy": accuracy}
        terms |= {f"beta/{i}": beta for i, beta in zip(self.levels, self.beta.unbind(), strict=True)}
        return loss, {name: value.detach() for name, value in terms.items()}


# ---- training ----------------------------------------------------------------------------------------------


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches; returns the loss's terms, means over it, as floats."""
    optimizer.zero_grad(set_to_none=True)
    total = {}
    for images, distance in run.micro_batches(model, batches):
        with run.autocast():
            loss, terms = model(images, distance)
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
    """PNG: original, masked, tokens, predicted ones, probability of the right one: levels, aggregation."""
    (images, distance), p, grid = examples, model.patch_size, model.grid
    original = run.normalize.undo(images)
    ids = model.tokenizer.ids(original)
    positions, logits = model.predict(images, distance)
    use = F.one_hot(ids.flatten(), logits.shape[-1]).float()  # (B * L, V)
    means = use.T @ patchify(original, p).flatten(0, 1) / use.sum(0).clamp(min=1)[:, None]
    tokens = ids, ids.scatter(1, positions, logits[-2].argmax(-1))
    right = (-token_loss(logits, ids.gather(1, positions))).exp()
    right = right.new_zeros(len(right), *ids.shape).scatter(2, positions.expand_as(right), right)
    hidden, *right = (patches_to_pixels(x[..., None], p, grid) for x in ((distance > 0).float(), *right))
    masked, shown = original * (1 - hidden) + 0.5 * hidden, (unpatchify(means[x], p, grid) for x in tokens)
    titles = "original", "masked", "tokens", "predicted", *(f"block {i}" for i in model.levels), "aggregated"
    save_image_grid(path, list(zip(original, masked, *shown, *right, strict=True)), titles,
                    "tokens: each as the mean of the patches that have it; predicted: by the last block; "
                    "then the right token's probability: black is 0, or a visible patch, white is 1")


def train(cfg, run):
    source = open_data(cfg)
    sample_noise, crop = functools.partial(sample_mask, cfg), RandomResizedCrop(cfg.img_size)
    if not cfg.draw:
        run.fit_batch(source)
        run.start(len(source), f"lr {cfg.lr:.3g}, whatever the batch")
    if not cfg.tokenizer:  # --demo
        cfg.tokenizer = f"{run.out}/tokenizer.pth"
        if not Path(cfg.tokenizer).exists():
            make_tokenizer(cfg, run, run.batches(source, crop, sample_noise))
    tokenizer = load_tokenizer(cfg.tokenizer, cfg, run.device)
    torch.manual_seed(cfg.seed)
    model = DeepDynamicBEiTv2(cfg, tokenizer.vocab_size)
    # Past nn.Module's __setattr__: a submodule would be saved, trained and synchronised; this one is frozen.
    model.__dict__.update(tokenizer=tokenizer, to_pixels=run.normalize.undo)
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures)
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay, ("cls_token",)), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.inputs = {"tokenizer_sha256": tokenizer.digest}
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    batches = run.batches(source, crop, sample_noise)
    examples = run.examples(source, sample_noise)

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples, run)
        if run.save_due():
            run.save(model.trunk_state(), prefix=None, model=f"beit_{cfg.model}")
    run.finish()


if __name__ == "__main__":
    launch(Config, presets, train, "ddae_beitv2")
