"""RevColV2: reversible bottom-up and top-down columns, pre-trained by masked image modelling. A labelled reconstruction.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling, NeurIPS 2023, arXiv 2309.01005

The authors' code, announced in 2023, has not been published. Known here are the supplement (training settings, parameters and
multiply-adds, linear probing), the abstract and the caption of figure 2; the unit and its scale come from RevCol (Cai et al.,
ICLR 2023). What none of them says is our choice, marked (ours).

Idea. A decoder that is thrown away after pre-training leaves the encoder's last layers with a mixture of detail and semantics.
Here both are one network of columns, kept whole: bottom-up columns take the visible patches, top-down columns what comes out of
them, with mask tokens, and the lowest level of the last column predicts the hidden pixels. A column changes each level of the
one before it by an invertible unit: nothing is lost on the way, and semantics (top) and detail (bottom) come apart.

Data flow; n = len_keep visible cells of L, each of p x p pixels; levels l = 0 ... 3 with k = 16, 4, 1, 1 tokens in a cell
    S                     linear on p/4 x p/4 pixels, + positions                              stem         (B, n * 16, C_0)
    x_l^i = F_l^i(x_{l-1}^i, x_{l+1}^{i-1}) + a_l^i x_l^{i-1}     bottom-up, x_{-1} = S        Unit         (B, n * k, C_l)
    x_l^1 = F_l^1(x_{l-1}^1)                                      in the first column
    x_l   <- mask token of the level in hidden cells, + positions in all                       fill         (B, L * k, C_l)
    x_l^i = F_l^i(x_{l+1}^i, x_{l-1}^{i-1}) + a_l^i x_l^{i-1}     top-down, from l = 3         Unit         (B, L * k, C_l)
    p     = linear(LN(x_0)) of the last column                                                 pixel_head   (B, L, p*p*C)
    t     = (cell - mean) / sqrt(var + 1e-6)                                                   cell_target  (B, L, p*p*C)
    loss  = mean over hidden cells of mean over values of (p - t)^2                            masked_mse
F: what the neighbours send, each through a linear layer and LayerNorm, summed; then blocks. a: per channel, starts at 0.5,
never closer to 0 than 0.001 (0 counts as positive: ours), no weight decay (ours). Inverse, from the top level:
x_l^{i-1} = (x_l^i - F_l^i(...)) / a_l^i (Unit.inverse).

Ours: 2 + 2 columns; strides p/4, p/2, p, p; channels and blocks (SIZES) that meet the supplement's 88 M / 19 G and 327 M / 67 G
(table 5) within 3 %; ViT blocks across cells at stride p, MLP blocks without mixing at the finer levels, so that nothing leaks
into a hidden cell; 2 x 2 neighbours joined on the way up, copies on the way down; 75 % of the cells hidden; MAE's target; a
mask token per level; fixed sine-cosine positions on each level's own grid, computed anew for other sizes; no class token; the
LayerNorm in front of the pixel head; MAE's initial values, size of crops, and flip; no losses on columns half-way, which RevCol
has. Layer-wise decay counts 1 + depth in a column + column, as RevCol's.

Read-outs. Fine-tuning: mean of the top level of the last top-down column, without the units that it does not depend on (10 M of
Base); linear probe, kNN: that of the last bottom-up column (supplement 2.2); dense tasks: all maps of the last column, the top
one pooled once more (a file fine-tuned for classification lacks units for them). --memory column computes a column's inside
again in the backward pass and stores only its maps, which is what RevCol's code stores. Not built: Cascade R-CNN, Mask2Former,
the runs with an extra teacher.

    python revcol_v2.py --demo                                            three minutes on two CPU cores
    torchrun --nproc_per_node 8 revcol_v2.py --model base                 supplement, table 1; images in data/imagenet
    torchrun --nproc_per_node 8 finetune.py --weights runs/revcol_v2/encoder.pth --base_lr 5e-4 --ema 0.9999      table 3, Base
    python finetune.py --weights runs/revcol_v2/encoder.pth --mode linear
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import (
    MLP,
    Block,
    KeyedBatches,
    Normalise,
    RandomResizedCrop,
    RunConfig,
    Views,
    adamw,
    autocast,
    check_data,
    drop_path,
    fill_from_visible,
    finish_update,
    gradient_sync,
    init_linear,
    launch,
    load_weights,
    make_loader,
    make_plan,
    normalisation,
    open_data,
    opt,
    parameter_groups,
    patch_grid,
    picture_batch,
    save_pictures,
    set_lr,
    sincos_pos_embed,
    spread,
    take_tokens,
    warmup_cosine,
)

SIZES = {  # channels and blocks of the four levels, channels of a head (ours)
    "nano": ((16, 32, 128, 128), (1, 1, 1, 2), 32),
    "tiny": ((32, 64, 128, 128), (1, 1, 2, 3), 32),
    "base": ((48, 96, 448, 448), (1, 1, 4, 5), 64),
    "large": ((64, 128, 768, 768), (1, 1, 5, 6), 64),
}
PER_CELL = (16, 4, 1, 1)  # tokens of a level in a cell
TOP = 3


@dataclass
class Config(RunConfig):
    # model
    model: Literal[*SIZES] = opt("base", "channels and blocks")
    patch_size: int = opt(16, "side of a cell in pixels, a multiple of 4")
    columns: int = opt(2, "bottom-up columns, and as many top-down ones")
    memory: Literal["column", "plain"] = opt("column", "store only the columns' maps for the backward pass, or everything")
    # method
    mask_ratio: float = opt(0.75, "share of hidden cells")
    norm_pix_loss: bool = opt(True, "target normalised per cell")
    # optimisation: supplement, table 1
    epochs: float = opt(1600.0, "passes over the data")
    batch_size: int = opt(4096, "images per update, over all processes")
    micro_batch: int | None = opt(None, "images per forward pass of one process; default: the largest that divides, up to 256")
    base_lr: float = opt(1.5e-4, "learning rate per 256 images")
    min_lr: float = opt(0.0, "where the cosine ends")
    warmup_epochs: float | None = opt(None, "linear warm-up; default a fifth of the epochs, at most the paper's 40")
    weight_decay: float = opt(0.05, "AdamW")
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW")
    clip_grad: float = opt(0.0, "largest gradient norm; 0 = no clipping")
    # run
    init: str | None = opt(None, "start from these weights of ours; a fresh schedule")
    pictures: int = opt(8, "images drawn at each epoch's end; 0 = none")

    def __post_init__(self):
        super().__post_init__()
        self.warmup_epochs = min(40.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        L = math.prod(cell_grid(self.img_size, self.patch_size))
        if not 0 < int(L * (1 - self.mask_ratio)) < L:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {L} cells hides none or all of them")


# Raw pixels in the demo: drawn shapes are flat, and a flat cell has nothing left once its mean and deviation are taken out.
DEMO = {"data": "shapes", "img_size": (32, 32), "model": "nano", "patch_size": 4, "norm_pix_loss": False, "epochs": 1.6,
        "batch_size": 32, "base_lr": 1.6e-2, "warmup_epochs": 0.3, "log_every": 25, "memory": "plain"}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- cells, masking and target -------------------------------------------------------------------------------------------


def cell_grid(img_size, patch_size):
    """(h, w) cells of an image; ValueError unless they tile it and have 4 x 4 positions."""
    if patch_size % 4:
        raise ValueError(f"--patch_size {patch_size} is no multiple of 4: RevColV2 has 4 x 4 positions in a cell")
    return patch_grid(img_size, patch_size)


def to_cells(images, p):
    """(B, C, H, W) -> (B, L, p*p*C): cells row by row; inside, quarters, their quarters, pixels, channels, each row by row."""
    B, C, H, W = images.shape
    q = p // 4
    x = images.reshape(B, C, H // p, 2, 2, q, W // p, 2, 2, q)  # b c h i1 i0 y w j1 j0 x
    return x.permute(0, 2, 6, 3, 7, 4, 8, 5, 9, 1).reshape(B, (H // p) * (W // p), p * p * C)


def from_cells(cells, p, grid):
    """Undoes `to_cells`."""
    B, q, (h, w) = len(cells), p // 4, grid
    x = cells.reshape(B, h, w, 2, 2, 2, 2, q, q, -1).permute(0, 9, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(B, -1, h * p, w * p)


def to_map(x, level, grid):
    """Tokens of a level (B, L * k, C), cell by cell -> map (B, C, h, w) of its own grid"""
    side = math.isqrt(PER_CELL[level])
    halves = int(math.log2(side))
    h, w = grid
    x = x.reshape(len(x), h, w, *(2,) * (2 * halves), x.shape[-1])
    rows, columns = [1, *range(3, 3 + 2 * halves, 2)], [2, *range(4, 4 + 2 * halves, 2)]
    return x.permute(0, x.ndim - 1, *rows, *columns).reshape(len(x), -1, h * side, w * side)


def level_pos_embed(channels, level, grid):
    """Sine-cosine table (1, L * k, C) of a level's own grid, in the order of its tokens."""
    side = math.isqrt(PER_CELL[level])
    table = sincos_pos_embed(channels, (grid[0] * side, grid[1] * side))[:, 1:]
    image = table.transpose(1, 2).unflatten(2, (grid[0] * side, grid[1] * side))
    cells = image.repeat_interleave(4 // side, 2).repeat_interleave(4 // side, 3)  # so that `to_cells` can order it
    return to_cells(cells, 4).unflatten(2, (16, channels))[:, :, :: 16 // PER_CELL[level]].flatten(1, 2)


def join(x, k):
    """Tokens (B, L * k, C) -> cells (B, L, k * C)"""
    return x.unflatten(1, (-1, k)).flatten(2)


def part(x, k):
    """Undoes `join`."""
    return x.unflatten(2, (k, -1)).flatten(1, 2)


def random_masking(noise, mask_ratio):
    """Which cells stay visible: those with the smallest noise.

    noise: (B, L). Returns ids_keep (B, len_keep), ids_restore (B, L), mask (B, L) float, 1 = hidden; len_keep = int(L * (1 -
    mask_ratio)).
    """
    len_keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :len_keep], ids_restore, (ids_restore >= len_keep).float()


def cell_target(images, p, normalised):
    """(B, C, H, W) -> (B, L, p*p*C): pixels, normalised per cell over all its values (unbiased variance, eps 1e-6)."""
    target = to_cells(images, p)
    if not normalised:
        return target
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_mse(pred, target, mask):
    """Mean squared error on the hidden cells: mean over the values of a cell, then over all hidden cells of the batch.

    pred, target: (B, L, p*p*C); mask: (B, L), 1 = hidden, at least one.
    """
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


# ---- model ---------------------------------------------------------------------------------------------------------------


class MLPBlock(nn.Module):
    """A ViT block without attention: positions do not mix."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.norm, self.mlp, self.drop_path = nn.LayerNorm(dim, eps=1e-6), MLP(dim, 4 * dim), drop_path

    def forward(self, x):
        return x + drop_path(self.mlp(self.norm(x)), self.drop_path, self.training)


class Down(nn.Module):
    """To the next coarser level: the four neighbours inside a cell joined (or the one token), linear, LayerNorm."""

    def __init__(self, level, channels):
        super().__init__()
        self.ratio = PER_CELL[level - 1] // PER_CELL[level]
        self.proj = nn.Linear(self.ratio * channels[level - 1], channels[level])
        self.norm = nn.LayerNorm(channels[level], eps=1e-6)

    def forward(self, x):
        return self.norm(self.proj(join(x, self.ratio))).to(self.norm.weight.dtype)  # a CPU's autocast leaves bf16


class Up(nn.Module):
    """To the next finer level: linear, LayerNorm, copied to the four positions (or the one)."""

    def __init__(self, level, channels):
        super().__init__()
        self.ratio = PER_CELL[level] // PER_CELL[level + 1]
        self.proj = nn.Linear(channels[level + 1], channels[level])
        self.norm = nn.LayerNorm(channels[level], eps=1e-6)

    def forward(self, x):
        return self.norm(self.proj(x)).to(self.norm.weight.dtype).repeat_interleave(self.ratio, dim=1)


class Unit(nn.Module):
    """x_l^i = F(lower, upper) + a x_l^{i-1}. The stem is taken as it is."""

    def __init__(self, level, channels, heads, rates, has_lower, has_upper, has_before):
        super().__init__()
        dim = channels[level]
        self.down = (Down(level, channels) if level else nn.Identity()) if has_lower else None
        self.up = Up(level, channels) if has_upper else None
        self.blocks = nn.Sequential(*(Block(dim, heads, drop_path=rate) if PER_CELL[level] == 1 else MLPBlock(dim, rate)
                                      for rate in rates))
        self.a = nn.Parameter(torch.full((dim,), 0.5)) if has_before else None

    def transform(self, lower, upper):
        """F"""
        sent = [module(x) for module, x in ((self.down, lower), (self.up, upper)) if module is not None]
        return self.blocks(functools.reduce(torch.add, sent))

    def forward(self, lower, upper, before):
        """Neighbours' tokens, or None; tokens of this level in the column before, or None in the first one"""
        x = self.transform(lower, upper)
        return x if self.a is None else x + self.a * before

    def inverse(self, x, lower, upper):
        """The tokens of the column before: what `forward` had as `before`. A forward pass of the network keeps a from 0."""
        return (x - self.transform(lower, upper)) / self.a


class Column(nn.Module):
    """One column. Bottom-up: levels 0 to 3, each from the one below and, in the column before, the one above. Top-down:
    mirrored, down to `lowest`."""

    def __init__(self, size, rate, top_down, first=False, lowest=0):
        super().__init__()
        channels, depths, head = SIZES[size]
        self.top_down, self.lowest = top_down, lowest
        levels = range(TOP, -1, -1) if top_down else range(TOP + 1)
        self.order = [level for level in levels if level >= lowest]
        rates = [rate * i / (sum(depths) - 1) for i in range(sum(depths))]  # linear in the order of traversal
        self.units = nn.ModuleDict()
        for level in levels:
            own, rates = rates[: depths[level]], rates[depths[level] :]
            if level in self.order:
                neighbours = level > 0 or not top_down, level < TOP and not first
                self.units[str(level)] = Unit(level, channels, channels[level] // head, own, *neighbours, has_before=not first)

    def forward(self, stem, *before):
        """stem: (B, n * 16, C_0), None in a top-down column; before: the four levels of the column before, or nothing. Returns
        four levels, None below `lowest`."""
        x = [None] * (TOP + 1)
        before = before or x
        for level in self.order:
            above, below = (x, before) if self.top_down else (before, x)  # the columns of both neighbours
            upper = above[level + 1] if level < TOP else None
            lower = below[level - 1] if level else stem
            x[level] = self.units[str(level)](lower, upper, before[level])
        return tuple(x)


class RevColV2(nn.Module):
    """The network without heads. read: "dense" (all of it), "top" (what the top level of the last column depends on),
    "bottom_up" (these columns alone)."""

    def __init__(self, size, img_size, patch_size, in_chans=3, drop_path=0.0, columns=2, memory="column", read="dense"):
        super().__init__()
        self.channels, self.depths, _ = SIZES[size]
        self.patch_size, self.grid, self.embed_dim = patch_size, cell_grid(img_size, patch_size), self.channels[TOP]
        self.memory = memory
        for level in range(TOP + 1):  # of the usual size; others are computed when they are met
            table = level_pos_embed(self.channels[level], level, self.grid)
            self.register_buffer(f"pos_embed_{level}", table, persistent=False)
        self.stem = nn.Linear((patch_size // 4) ** 2 * in_chans, self.channels[0])
        self.bottom_up = nn.ModuleList(Column(size, drop_path, top_down=False, first=i == 0) for i in range(columns))
        lowest = [max(0, TOP - i) if read == "top" else 0 for i in reversed(range(columns))]
        lowest = [] if read == "bottom_up" else lowest
        self.top_down = nn.ModuleList(Column(size, drop_path, top_down=True, lowest=low) for low in lowest)
        self.last_layer = 1 + max(self.layer(name) for name, _ in self.named_parameters())
        init_linear(self)

    @torch.no_grad()
    def keep_invertible(self):
        """Every a at least 0.001 away from 0, with its sign; 0 counts as positive."""
        for unit in self.modules():
            if isinstance(unit, Unit) and unit.a is not None:
                # .data: values that were fit stay the same, so an earlier graph that holds them remains right
                unit.a.data.copy_(torch.where(unit.a < 0, unit.a.clamp(max=-1e-3), unit.a.clamp(min=1e-3)))

    def pos_embed(self, level, grid):
        if grid == self.grid:
            return getattr(self, f"pos_embed_{level}")
        return level_pos_embed(self.channels[level], level, grid).to(self.stem.weight.device)

    def through(self, column, *inputs):
        again = self.memory == "column" and torch.is_grad_enabled()
        return checkpoint(column, *inputs, use_reentrant=False) if again else column(*inputs)

    def encode(self, images, ids_keep=None):
        """(B, C, H, W) -> the four levels of the last bottom-up column, of the visible cells ids_keep (B, n), or of all."""
        self.keep_invertible()
        grid = patch_grid(images.shape[2:], self.patch_size)
        cells, table = to_cells(images, self.patch_size), join(self.pos_embed(0, grid), PER_CELL[0])
        if ids_keep is not None:
            cells, table = take_tokens(cells, ids_keep), take_tokens(table.expand(len(cells), -1, -1), ids_keep)
        stem = self.stem(part(cells, PER_CELL[0])) + part(table, PER_CELL[0])
        x = ()
        for column in self.bottom_up:
            x = self.through(column, stem, *x)
        return x

    def fill(self, x, ids_restore, grid):
        """Levels of the visible cells -> of all: mask tokens in the hidden ones, positions on all. ids_restore None: none is
        hidden. None for levels that the first top-down column does not read."""
        filled = [None] * (TOP + 1)
        for level in range(max(0, self.top_down[0].lowest - 1), TOP + 1):
            tokens = x[level]
            if ids_restore is not None:
                k, (B, L) = PER_CELL[level], ids_restore.shape
                cells = join(tokens, k)
                hidden = self.mask_tokens[level].to(cells.dtype).expand(B, L - cells.shape[1], k, -1).flatten(2)
                tokens = part(take_tokens(torch.cat([cells, hidden], dim=1), ids_restore), k)
            filled[level] = tokens + self.pos_embed(level, grid)
        return filled

    def levels(self, images, ids_keep=None, ids_restore=None):
        """(B, C, H, W) -> the four levels of the last column (top-down if there are any), None where not computed."""
        x = self.encode(images, ids_keep)
        if len(self.top_down):
            x = self.fill(x, ids_restore, patch_grid(images.shape[2:], self.patch_size))
            for column in self.top_down:
                x = self.through(column, None, *x)
        return x

    def features(self, images):
        """(B, C, H, W) -> (B, D): mean of the top level of the last column; nothing hidden."""
        return self.levels(images)[TOP].mean(1)

    def maps(self, images):
        """(B, C, H, W) -> maps of the four levels at strides p/4, p/2, p and, pooled once more, 2 p"""
        grid = patch_grid(images.shape[2:], self.patch_size)
        maps = [to_map(x, level, grid) for level, x in enumerate(self.levels(images))]
        return [*maps[:TOP], F.max_pool2d(maps[TOP], 2, ceil_mode=True)]

    def layer(self, name):
        """For layer-wise decay: 0 the stem; 1 + block's depth in its column's order + column; an `a` its column's first; what
        is none of it (a head) last_layer."""
        if name.startswith("stem"):
            return 0
        if not name.startswith(("bottom_up", "top_down")):
            return self.last_layer
        way, number, _, level, rest = name.split(".", 4)
        column = int(number) + (len(self.bottom_up) if way == "top_down" else 0)
        if rest == "a":
            return 1 + column
        before = self.depths[int(level) + 1 :] if way == "top_down" else self.depths[: int(level)]
        block = int(rest.split(".")[1]) if rest.startswith("blocks.") else 0
        return 1 + sum(before) + block + column

    @property
    def beside(self):
        """Names in a file of ours that this read-out has no use for."""
        if not len(self.top_down):
            return ["top_down."]
        return [f"top_down.{i}.units.{level}." for i, column in enumerate(self.top_down) for level in range(column.lowest)]


class MaskedRevCol(RevColV2):
    """RevColV2 with mask tokens and a head to pixels."""

    def __init__(self, cfg):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, columns=cfg.columns, memory=cfg.memory)
        self.cfg = cfg
        self.mask_tokens = nn.ParameterList(nn.init.normal_(torch.empty(1, 1, 1, c), std=0.02) for c in self.channels)
        values = (cfg.patch_size // 4) ** 2 * cfg.in_chans
        self.pixel_head = nn.Sequential(nn.LayerNorm(self.channels[0], eps=1e-6), nn.Linear(self.channels[0], values))
        init_linear(self.pixel_head)

    def trunk_state(self):
        """What is kept: all but mask tokens and pixel head."""
        beside = ("mask_tokens", "pixel_head")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(beside)}

    def predict(self, images, noise):
        """(B, C, H, W), noise (B, L) -> pred (B, L, p*p*C) in the order of `to_cells`, mask (B, L), 1 = hidden."""
        ids_keep, ids_restore, mask = random_masking(noise, self.cfg.mask_ratio)
        x = self.levels(images, ids_keep, ids_restore)[0]
        return join(self.pixel_head(x), PER_CELL[0]), mask

    def forward(self, images, noise):
        """Returns the loss and its terms."""
        pred, mask = self.predict(images, noise)
        with torch.autocast(images.device.type, enabled=False):  # target and loss in float32
            target = cell_target(images.float(), self.patch_size, self.cfg.norm_pix_loss)
            loss = masked_mse(pred.float(), target, mask)
        return loss, {"loss": loss.detach()}


# ---- training ------------------------------------------------------------------------------------------------------------


def train_step(model, batches, to_images, optimizer, scaler, step, cfg, plan, run):
    """One update from plan.accum_steps micro-batches; returns {name: float, mean over the update} and the sample numbers."""
    optimizer.zero_grad(set_to_none=True)
    total, samples = {}, []
    for micro_step in range(plan.accum_steps):
        batch = next(batches)
        run.seed(step, micro_step)
        images, noise = to_images(batch), batch["draw"].to(run.device, non_blocking=True)
        with gradient_sync(model, micro_step == plan.accum_steps - 1):
            with autocast(run.device, run.amp_dtype):
                loss, terms = model(images, noise)
            scaler.scale(loss / plan.accum_steps).backward()
        total = {name: total.get(name, 0) + term / plan.accum_steps for name, term in terms.items()}
        samples += batch["index"].tolist()
    return finish_update(run, optimizer, scaler, total, cfg.clip_grad), samples


@torch.no_grad()
def draw_pictures(path, model, batch, to_images, cfg):
    """PNG with original, masked input, prediction, and the prediction pasted into the visible cells."""
    images, noise = to_images(batch), batch["draw"].to(to_images.device)
    pred, mask = model.predict(images, noise)
    if cfg.norm_pix_loss:
        cells = to_cells(images, cfg.patch_size)
        mean, deviation = (fill_from_visible(f(-1, keepdim=True), mask, model.grid) for f in (cells.mean, cells.std))
        pred = pred * deviation + mean
    pred, hidden = from_cells(pred, cfg.patch_size, model.grid), spread(mask[..., None], cfg.patch_size, model.grid)
    columns = [to_images.undo(x) for x in (images, images, pred, pred * hidden + images * (1 - hidden))]
    columns[1] = columns[1] * (1 - hidden) + 0.5 * hidden
    statistics = "un-normalised with the statistics of visible cells only" if cfg.norm_pix_loss else "raw pixels"
    save_pictures(path, list(zip(*columns, strict=True)), ["original", "masked", "prediction", "pasted"],
                  f"{cfg.mask_ratio:.0%} hidden; prediction {statistics}")


def train(cfg, run):
    source = open_data(cfg)
    if cfg.check_data:
        return check_data(source, run.workers)
    plan = make_plan(len(source), cfg, run.world_size)
    mean, std = normalisation(cfg)
    torch.manual_seed(cfg.seed)
    model = MaskedRevCol(cfg)
    if cfg.init:
        load_weights(model, cfg.init, allow_missing=("mask_tokens", "pixel_head"), ignore=("head.", "fc_norm."))
    lr = cfg.base_lr * cfg.batch_size / 256
    run.start(plan, f"lr {lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 256")
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start = run.load(state)

    noise = functools.partial(torch.rand, math.prod(model.grid))
    views = Views(source, RandomResizedCrop(cfg.img_size), cfg.seed, run.bad_files.allow(len(source)), noise)
    batches = run.timed(make_loader(views, KeyedBatches(plan, cfg.seed, run, start), run))
    to_images = Normalise(mean, std, run.device)
    fixed = picture_batch(source, cfg, noise)
    meta = {"method": "revcol_v2", "model": f"revcol_{cfg.model}", "columns": cfg.columns, "img_size": cfg.img_size,
            "patch_size": cfg.patch_size, "in_chans": cfg.in_chans, "mean": mean, "std": std}

    for step in range(start, plan.steps):
        now = warmup_cosine(plan.epoch(step), lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, now)
        stats, samples = train_step(ddp, batches, to_images, optimizer, scaler, step, cfg, plan, run)
        run.end_update(step + 1, stats, now, samples)
        with run.off_the_clock():
            if path := run.picture_due(step + 1):
                draw_pictures(path, model, fixed, to_images, cfg)
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
    launch(Config, presets, train, "revcol_v2")
