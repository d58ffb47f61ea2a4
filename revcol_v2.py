"""RevColV2: reversible bottom-up and top-down columns, masked image modelling. A labelled reconstruction.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling, NeurIPS 2023, arXiv 2309.01005

The authors' code is not published. Known are the supplement, the abstract and figure 2's caption; the unit
and its scale come from RevCol (Cai et al., ICLR 2023). What none of them says is our choice, marked (ours).

Idea. A decoder that is thrown away after pre-training leaves the encoder's last layers with a mixture of
detail and semantics. Here both stay, as one network of columns: bottom-up columns take the visible patches,
top-down columns their outputs and mask tokens, and the lowest level of the last column predicts the hidden
pixels. A column changes each level of the one before by an invertible unit: nothing is lost, and semantics
(top) and detail (bottom) separate.

Data flow; n = len_keep visible cells of L, of p x p pixels; levels l = 0 to 3 with k = 16, 4, 1, 1 tokens
    S     = linear(p/4 x p/4 pixels) + positions                            encode       (B, n * 16, C_0)
    x_l^i = F_l^i(x_{l-1}^i, x_{l+1}^{i-1}) + a_l^i x_l^{i-1}               bottom-up    (B, n * k, C_l)
    x_l   <- mask token of the level in hidden cells, + positions in all    fill         (B, L * k, C_l)
    x_l^i = F_l^i(x_{l+1}^i, x_{l-1}^{i-1}) + a_l^i x_l^{i-1}               top-down     (B, L * k, C_l)
    p     = linear(LN(x_0)) of the last column                              pixel_head   (B, L, p*p*C)
    t     = (cell - mean) / sqrt(var + 1e-6)                                cell_target  (B, L, p*p*C)
    loss  = mean over hidden cells of mean over values of (p - t)^2         masked_mse
x_{-1} = S; x_l^1 = F_l^1(x_{l-1}^1). F: each neighbour through a linear layer and LayerNorm, summed, then
blocks. a: per channel, starts at 0.5, stays 0.001 away from 0 (0 counts as positive: ours), no weight decay
(ours). Inverse (Unit.inverse), from the top level: x_l^{i-1} = (x_l^i - F_l^i(...)) / a_l^i.

Ours: 2 + 2 columns; strides p/4, p/2, p, p; SIZES, which meet the supplement's 88 M / 19 G and 327 M / 67 G
(table 5) within 3 %; ViT blocks at stride p, at finer levels MLP blocks that do not mix positions, so that
nothing leaks into a hidden cell; sizes *_flat have all levels at stride p, to see what the pyramid gives; a
mask token per level; sine-cosine positions on each level's grid; MAE's masking, target, crop, flip and
initial values; no losses on inner columns.

Read-outs. Fine-tuning: mean of the last column's top level; units that it does not depend on stay as they
were, for dense tasks. Probe, kNN: that of the last bottom-up column. Dense tasks: all maps of the last
column, the top one pooled again.

    python revcol_v2.py --demo                                            three minutes on two CPU cores
    torchrun --nproc_per_node 8 revcol_v2.py --model base                 supplement, table 1; data/imagenet
    torchrun --nproc_per_node 8 finetune.py --recipe revcol_in1k_b --weights runs/revcol_v2/encoder.pth
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
    RandomResizedCrop,
    RunConfig,
    adamw,
    drop_path,
    fill_from_visible,
    gather_tokens,
    init_linear,
    launch,
    load_weights,
    open_data,
    parameter_groups,
    patch_grid,
    patches_to_pixels,
    save_image_grid,
    set_lr,
    sincos_pos_embed,
    warmup_cosine,
)

PYRAMID, FLAT = (16, 4, 1, 1), (1, 1, 1, 1)  # tokens of a level in a cell
SIZES = {  # channels and blocks of the four levels, channels of a head, tokens in a cell (ours)
    "nano": ((16, 32, 64, 64), (1, 1, 1, 2), 32, PYRAMID),
    "tiny": ((32, 64, 128, 128), (1, 1, 2, 3), 32, PYRAMID),
    "base": ((48, 96, 448, 448), (1, 1, 4, 5), 64, PYRAMID),
    "large": ((64, 128, 768, 768), (1, 1, 5, 6), 64, PYRAMID),
    "nano_flat": ((60,) * 4, (1, 1, 1, 2), 30, FLAT),
    "tiny_flat": ((96,) * 4, (3, 3, 3, 3), 32, FLAT),
    "base_flat": ((384,) * 4, (3, 3, 3, 3), 64, FLAT),
}
TOP = 3


@dataclass
class Config(RunConfig):
    # model
    model: Literal[*SIZES] = "base"  # channels and blocks
    patch_size: int = 16  # side of a cell in pixels, a multiple of 4
    columns: int = 2  # bottom-up columns, and as many top-down ones
    memory: Literal["column", "plain"] = "column"  # what is stored: a column's maps, or everything
    # method
    mask_ratio: float = 0.75  # share of hidden cells
    norm_pix_loss: bool = True  # target normalised per cell
    # optimisation: supplement, table 1
    epochs: float = 1600.0  # passes over the data
    batch_size: int = 4096  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of one process; default: at most 256
    base_lr: float = 1.5e-4  # learning rate per 256 images
    min_lr: float = 0.0  # where the cosine ends
    warmup_epochs: float | None = None  # linear warm-up; default a fifth of the epochs, at most 40
    weight_decay: float = 0.05  # AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    clip_grad: float = 0.0  # largest gradient norm; 0 = no clipping
    # run
    init: str | None = None  # start from these weights of ours; a fresh schedule
    draw: str | None = None  # draw what these weights (last.pth) predict, to --out X.png
    pictures: int = 8  # images drawn at each epoch's end; 0 = none

    start_from = ("init",)
    free_on_resume = RunConfig.free_on_resume | {"memory"}

    def __post_init__(self):
        super().__post_init__()
        self.warmup_epochs = min(40.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs
        L = math.prod(cell_grid(self.img_size, self.patch_size))
        if not 0 < int(L * (1 - self.mask_ratio)) < L:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {L} cells hides none or all of them")


# Raw pixels in the demo: drawn shapes are flat, and a flat cell minus its mean leaves nothing to predict.
DEMO = {"data": "shapes", "img_size": (24, 24), "model": "nano", "patch_size": 4, "norm_pix_loss": False,
        "epochs": 1.0, "batch_size": 32, "base_lr": 1.6e-2, "warmup_epochs": 0.2, "log_every": 25,
        "memory": "plain"}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- cells, masking and target -----------------------------------------------------------------------------


def cell_grid(img_size, patch_size):
    """(h, w) cells of an image; ValueError unless they tile it and have 4 x 4 positions."""
    if patch_size % 4:
        raise ValueError(f"--patch_size {patch_size} is no multiple of 4: a cell has 4 x 4 positions")
    return patch_grid(img_size, patch_size)


def to_cells(images, p):
    """(B, C, H, W) -> (B, L, p*p*C): cells row by row; in them quarters, their quarters, pixels, channels,
    each row by row. So every four tokens are 2 x 2 neighbours."""
    B, C, H, W = images.shape
    q = p // 4
    x = images.reshape(B, C, H // p, 2, 2, q, W // p, 2, 2, q)  # b c h i1 i0 y w j1 j0 x
    return x.permute(0, 2, 6, 3, 7, 4, 8, 5, 9, 1).reshape(B, (H // p) * (W // p), p * p * C)


def from_cells(cells, p, grid):
    """Undoes `to_cells`."""
    B, q, (h, w) = len(cells), p // 4, grid
    x = cells.reshape(B, h, w, 2, 2, 2, 2, q, q, -1).permute(0, 9, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(B, -1, h * p, w * p)


def to_map(x, k, grid):
    """Tokens of a level (B, L * k, C), cell by cell -> map (B, C, h, w) of its own grid"""
    x = x.unflatten(1, (*grid, k)).permute(0, 4, 1, 2, 3)
    while x.shape[4] > 1:  # quarters of cells become cells
        x = x.unflatten(4, (2, 2, -1)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return x.squeeze(4)


def level_pos_embed(channels, k, grid):
    """Sine-cosine table (1, L * k, C) of a level's own grid, in the order of its tokens."""
    numbers = to_map(torch.arange(math.prod(grid) * k).view(1, -1, 1), k, grid)
    return sincos_pos_embed(channels, numbers.shape[2:])[:, 1:][:, numbers.flatten().argsort()]


def join_cells(x, k):
    """Tokens (B, L * k, C) -> cells (B, L, k * C)"""
    return x.unflatten(1, (-1, k)).flatten(2)


def split_cells(x, k):
    """Undoes `join_cells`."""
    return x.unflatten(2, (k, -1)).flatten(1, 2)


def random_masking(noise, mask_ratio):
    """Which cells stay visible: those with the smallest noise.

    noise: (B, L). Returns ids_keep (B, len_keep), ids_restore (B, L), mask (B, L) float, 1 = hidden;
    len_keep = int(L * (1 - mask_ratio)). Equal noise gives equal masks.
    """
    len_keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :len_keep], ids_restore, (ids_restore >= len_keep).float()


def cell_target(images, p, normalised):
    """(B, C, H, W) -> (B, L, p*p*C): pixels, normalised per cell over all its values (unbiased variance)."""
    target = to_cells(images, p)
    if not normalised:
        return target
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_mse(pred, target, mask):
    """Mean squared error of pred and target, both (B, L, p*p*C), on the hidden cells, where mask (B, L) is 1.
    Returns a scalar: mean over the values of a cell, then over all hidden cells of the batch."""
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


# ---- model -------------------------------------------------------------------------------------------------


class MLPBlock(nn.Module):
    """A ViT block without attention: positions do not mix."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.norm, self.mlp, self.drop_path = nn.LayerNorm(dim, eps=1e-6), MLP(dim, 4 * dim), drop_path

    def forward(self, x):
        return x + drop_path(self.mlp(self.norm(x)), self.drop_path, self.training)


class Link(nn.Module):
    """What a neighbouring level sends: linear, LayerNorm. To a coarser level, four neighbours inside a cell
    are joined first; to a finer one, the result is copied to its four positions."""

    def __init__(self, source, level, channels, per_cell):
        super().__init__()
        self.joined = max(1, per_cell[source] // per_cell[level])
        self.copies = max(1, per_cell[level] // per_cell[source])
        self.proj = nn.Linear(self.joined * channels[source], channels[level])
        self.norm = nn.LayerNorm(channels[level], eps=1e-6)

    def forward(self, x):
        x = self.norm(self.proj(join_cells(x, self.joined)))
        x = x.to(self.norm.weight.dtype)  # a CPU's autocast leaves bf16
        return x.unsqueeze(2).expand(-1, -1, self.copies, -1).flatten(1, 2)


class Unit(nn.Module):
    """x_l^i = F(lower, upper) + a x_l^{i-1}. The stem enters F without a layer of its own."""

    def __init__(self, size, level, rates, top_down, first):
        super().__init__()
        channels, _, head, per_cell = SIZES[size]
        dim, stem = channels[level], None if top_down else nn.Identity()
        self.down = Link(level - 1, level, channels, per_cell) if level else stem
        self.up = None if first or level == TOP else Link(level + 1, level, channels, per_cell)
        block = functools.partial(Block, num_heads=dim // head) if per_cell[level] == 1 else MLPBlock
        self.blocks = nn.Sequential(*(block(dim, drop_path=rate) for rate in rates))
        self.a = None if first else nn.Parameter(torch.full((dim,), 0.5))

    def transform(self, lower, upper):
        """F"""
        sent = [module(x) for module, x in ((self.down, lower), (self.up, upper)) if module is not None]
        return self.blocks(functools.reduce(torch.add, sent))

    def forward(self, lower, upper, before):
        """Neighbours' tokens, or None; tokens of this level in the column before, or None in the first one"""
        x = self.transform(lower, upper)
        return x if self.a is None else x + self.a * before

    def inverse(self, x, lower, upper):
        """What `forward` had as `before`. Every forward pass of the network keeps a away from 0."""
        return (x - self.transform(lower, upper)) / self.a


class Column(nn.Module):
    """One column. Bottom-up: levels 0 to 3, each from the one below and, in the column before, the one above.
    Top-down: mirrored, computed down to `lowest`. rate: drop path of the last block, from 0 at the first."""

    def __init__(self, size, rate, top_down, first=False, lowest=0):
        super().__init__()
        depths = SIZES[size][1]
        self.top_down = top_down
        levels = range(TOP, -1, -1) if top_down else range(TOP + 1)
        self.order = [level for level in levels if level >= lowest]
        rates = iter([rate * i / (sum(depths) - 1) for i in range(sum(depths))])
        self.units = nn.ModuleDict()
        for level in levels:
            own = [next(rates) for _ in range(depths[level])]
            self.units[str(level)] = Unit(size, level, own, top_down, first)

    def forward(self, stem, *before):
        """stem: (B, n * 16, C_0), None in a top-down column; before: the four levels of the column before, or
        nothing. Returns four levels, None below `lowest`."""
        x = [None] * (TOP + 1)
        before = before or x
        above, below = (x, before) if self.top_down else (before, x)  # the columns of both neighbours
        for level in self.order:
            upper = above[level + 1] if level < TOP else None
            lower = below[level - 1] if level else stem
            x[level] = self.units[str(level)](lower, upper, before[level])
        return tuple(x)


class RevColV2(nn.Module):
    """The network without heads. read: "dense" (all of it), "top" (all, but what the last column's top level
    does not depend on is neither computed nor learned), "bottom_up" (these columns alone)."""

    def __init__(self, size, img_size, patch_size, in_chans=3, drop_path=0.0, columns=2, memory="column",
                 read="dense"):
        super().__init__()
        self.channels, self.depths, _, self.per_cell = SIZES[size]
        self.patch_size, self.grid, self.memory = patch_size, cell_grid(img_size, patch_size), memory
        self.embed_dim = self.channels[TOP]
        for level in range(TOP + 1):
            table = level_pos_embed(self.channels[level], self.per_cell[level], self.grid)
            self.register_buffer(f"pos_embed_{level}", table, persistent=False)
        self.stem = nn.Linear(patch_size**2 * in_chans // self.per_cell[0], self.channels[0])
        self.bottom_up = nn.ModuleList(Column(size, drop_path, False, first=i == 0) for i in range(columns))
        lowest = [{"dense": 0, "top": max(0, TOP - i), "bottom_up": TOP + 1}[read] for i in range(columns)]
        lowest.reverse()
        self.top_down = nn.ModuleList(Column(size, drop_path, True, lowest=n) for n in lowest if n <= TOP)
        # How the names start that a file of the whole network has and this read-out has not.
        self.unused_names = ["top_down."] if read == "bottom_up" else []
        # ... and of what it has and does not compute.
        self.idle_names = [f"top_down.{i}.units.{level}." for i, column in enumerate(self.top_down)
                           for level in range(TOP + 1) if level not in column.order]
        self.last_layer = 1 + max(self.layer_id(name) for name, _ in self.named_parameters())
        init_linear(self)
        self.requires_grad_()

    def requires_grad_(self, requires_grad=True):
        """Of what is computed; the rest stays as it is."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.named_parameters():
            if name.startswith(tuple(self.idle_names)):
                parameter.requires_grad_(False)
        return self

    @torch.no_grad()
    def keep_invertible(self):
        """Every a at least 0.001 away from 0, with its sign; 0 counts as positive."""
        for unit in self.modules():
            if isinstance(unit, Unit) and unit.a is not None:
                # .data: values that were fit stay the same, so an earlier graph that holds them remains right
                unit.a.data.copy_(torch.where(unit.a < 0, unit.a.clamp(max=-1e-3), unit.a.clamp(min=1e-3)))

    def pos_embed(self, level, grid):
        """(1, L * k, C); computed anew for other image sizes."""
        if grid == self.grid:
            return getattr(self, f"pos_embed_{level}")
        return level_pos_embed(self.channels[level], self.per_cell[level], grid).to(self.stem.weight.device)

    def run_column(self, column, *inputs):
        again = self.memory == "column" and torch.is_grad_enabled()
        return checkpoint(column, *inputs, use_reentrant=False) if again else column(*inputs)

    def encode(self, images, ids_keep=None):
        """(B, C, H, W) -> levels of the last bottom-up column, of the cells ids_keep (B, n) or of all."""
        self.keep_invertible()
        grid = patch_grid(images.shape[2:], self.patch_size)
        k = self.per_cell[0]
        cells, table = to_cells(images, self.patch_size), join_cells(self.pos_embed(0, grid), k)
        if ids_keep is not None:
            cells = gather_tokens(cells, ids_keep)
            table = gather_tokens(table.expand(len(cells), -1, -1), ids_keep)
        stem = self.stem(split_cells(cells, k)) + split_cells(table, k)
        x = ()
        for column in self.bottom_up:
            x = self.run_column(column, stem, *x)
        return x

    def fill(self, x, ids_restore, grid):
        """Levels of the visible cells -> of all: mask tokens in the hidden ones, positions on all.
        ids_restore None: no cell is hidden."""
        filled = []
        for level, tokens in enumerate(x):
            if ids_restore is not None:
                k, (B, L) = self.per_cell[level], ids_restore.shape
                cells, token = join_cells(tokens, k), self.mask_tokens[level].to(tokens.dtype)
                hidden = token.expand(B, L - cells.shape[1], k, -1).flatten(2)
                tokens = split_cells(gather_tokens(torch.cat([cells, hidden], dim=1), ids_restore), k)
            filled.append(tokens + self.pos_embed(level, grid))
        return filled

    def levels(self, images, ids_keep=None, ids_restore=None):
        """(B, C, H, W) -> four levels of the last column, None where not computed."""
        x = self.encode(images, ids_keep)
        if len(self.top_down):
            x = self.fill(x, ids_restore, patch_grid(images.shape[2:], self.patch_size))
        for column in self.top_down:
            x = self.run_column(column, None, *x)
        return x

    def features(self, images):
        """(B, C, H, W) -> (B, D): mean of the top level of the last column; nothing hidden."""
        return self.levels(images)[TOP].mean(1)

    def maps(self, images):
        """(B, C, H, W) -> maps of the four levels at strides p/4, p/2, p and, pooled once more, 2 p; what a
        flat layout lacks of the fine ones, its pixels repeat"""
        grid, maps = patch_grid(images.shape[2:], self.patch_size), []
        for x, k, wanted in zip(self.levels(images), self.per_cell, PYRAMID, strict=True):
            x, side = to_map(x, k, grid), math.isqrt(wanted // k)
            maps.append(F.interpolate(x, scale_factor=side) if side > 1 else x)
        return [*maps[:TOP], F.max_pool2d(maps[TOP], 2, ceil_mode=True)]

    def layer_id(self, name):
        """For layer-wise decay, as in RevCol's code: 0 the stem; 1 + column + block's depth in its column
        (of an `a`: 0); last_layer a head."""
        if name.startswith("stem"):
            return 0
        if not name.startswith(("bottom_up", "top_down")):
            return self.last_layer
        way, column, _, level, *rest = name.split(".")
        column, level = int(column) + (len(self.bottom_up) if way == "top_down" else 0), int(level)
        before = self.depths[level + 1 :] if way == "top_down" else self.depths[:level]
        block = int(rest[1]) if rest[0] == "blocks" else 0
        return 1 + column + (0 if rest == ["a"] else sum(before) + block)


class MaskedRevCol(RevColV2):
    """RevColV2 with mask tokens and a head to pixels."""

    def __init__(self, cfg):
        size = (cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans)
        super().__init__(*size, columns=cfg.columns, memory=cfg.memory)
        self.cfg = cfg
        tokens = [nn.init.normal_(torch.empty(1, 1, 1, c), std=0.02) for c in self.channels]
        self.mask_tokens = nn.ParameterList(tokens)
        C, values = self.channels[0], cfg.patch_size**2 * cfg.in_chans // self.per_cell[0]
        self.pixel_head = nn.Sequential(nn.LayerNorm(C, eps=1e-6), nn.Linear(C, values))
        init_linear(self.pixel_head)

    def trunk_state(self):
        """The state dict without mask tokens and pixel head: what RevColV2 loads."""
        added = ("mask_tokens", "pixel_head")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(added)}

    def predict(self, images, noise):
        """(B, C, H, W), noise (B, L) -> pred (B, L, p*p*C), ordered as in `to_cells`, mask (B, L)"""
        ids_keep, ids_restore, mask = random_masking(noise, self.cfg.mask_ratio)
        x = self.levels(images, ids_keep, ids_restore)[0]
        return join_cells(self.pixel_head(x), self.per_cell[0]), mask

    def forward(self, images, noise):
        """Returns the loss and its terms."""
        pred, mask = self.predict(images, noise)
        with torch.autocast(images.device.type, enabled=False):  # target and loss in float32
            target = cell_target(images.float(), self.patch_size, self.cfg.norm_pix_loss)
            loss = masked_mse(pred.float(), target, mask)
        return loss, {"loss": loss.detach()}


# ---- training ----------------------------------------------------------------------------------------------


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches; returns the loss's terms as floats, means over it."""
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
    """PNG with original, masked input, prediction, and the prediction pasted into the visible cells."""
    (images, noise), p, grid, cfg = examples, model.patch_size, model.grid, model.cfg
    pred, mask = model.predict(images, noise)
    if cfg.norm_pix_loss:
        cells = to_cells(images, p)
        mean, std = (fill_from_visible(f(-1, keepdim=True), mask, grid) for f in (cells.mean, cells.std))
        pred = pred * std + mean
    pred, hidden = from_cells(pred, p, grid), patches_to_pixels(mask[..., None], p, grid)
    columns = [run.normalize.undo(x) for x in (images, images, pred, pred * hidden + images * (1 - hidden))]
    columns[1] = columns[1] * (1 - hidden) + 0.5 * hidden
    statistics = "un-normalised with statistics of visible cells" if cfg.norm_pix_loss else "raw pixels"
    save_image_grid(path, list(zip(*columns, strict=True)), ["original", "masked", "prediction", "pasted"],
                    f"{cfg.mask_ratio:.0%} hidden; prediction {statistics}")


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    model = MaskedRevCol(cfg)
    sample_noise = functools.partial(torch.rand, math.prod(model.grid))
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures)
    if cfg.init:
        missing = ("mask_tokens", "pixel_head")
        load_weights(model, cfg.init, allow_missing=missing, ignore=("head.", "fc_norm."), prefix="")
    run.fit_batch(source)
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    run.start(len(source), f"lr {peak_lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 256")
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    crop = RandomResizedCrop(cfg.img_size)
    batches, examples = run.batches(source, crop, sample_noise), run.examples(source, sample_noise)

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples, run)
        if run.save_due():
            run.save(model.trunk_state(), model=f"revcol_{cfg.model}")
    run.finish()


if __name__ == "__main__":
    launch(Config, presets, train, "revcol_v2")
