"""Semantic segmentation by masks: Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527).

Not pixels but queries have classes: each of Q learned vectors finds one class in an image, or none, and gives
its mask. In the order the data flows (B images, T classes in an image, D = --channels):

    four maps of the encoder           Segmenter.maps        as UperNet's; a ViT's at 4, 2, 1, 1/2 of its grid
    pixel decoder                      PixelDecoder          the three coarser ones attend to each other
                                                             (Deformable DETR, eq. 3); pixels (B, D, h, w)
    queries read these three in turn   DecoderLayer          where their last mask was 1/2 or more (eqs. 2, 3)
    classes; masks = query * pixel     Mask2FormerHead       after each layer and before the first
    a query for each class             match                 the cheapest one-to-one assignment
    2 class + 5 mask + 5 dice          losses                of each output, at --points places (sec. 3.3)
    softmax(class) * sigmoid(mask)     Mask2Former.scores    summed over the queries

The assignment is scipy's, on the CPU: a forward pass of the training waits once for the device, for the costs
of all outputs and images together.

Defaults are those of Mask2Former's code for ADE20K, but for --layer_decay (there the encoder has a tenth of
the rate), crops and colours (UperNet's). `--recipe revcol` is RevColV2's, supplement 1.4. From the code: a
query whose mask is nowhere 1/2 reads everything; pixels without a label belong to no mask. Our choice: a
ViT's maps; all outputs of a forward pass are matched at the same places.

    python transfer_mask2former.py --demo      on runs/mae_mff/encoder.pth: minutes on a CPU
    torchrun --nproc_per_node 4 transfer_mask2former.py --recipe revcol --weights encoder.pth --zero_is_ignore
"""

import functools
import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import Conv2dNormActivation

import transfer_data as data
import transfer_seg_det as transfer
from common import init_linear, launch, training_keys
from transfer_seg_det import resize

CLASS, MASK, DICE, NO_OBJECT = 2.0, 5.0, 5.0, 0.1  # weights of the losses, and of a query without target
HEADS, PLACES = 8, 4  # of attention; per head, level and token of the pixel decoder


@dataclass
class Config(transfer.Config):
    # what
    channels: int = 256  # width of both decoders, a multiple of 8
    queries: int = 100  # masks per image
    layers: int = 9  # of the decoder; the coarsest of three maps is read by the first, fourth, ...
    pixel_layers: int = 6  # of the pixel decoder
    points: int = 12_544  # places per mask in the losses and in the matching

    # Fixed: flags of transfer_seg_det.py for its heads and for detection.
    task: ClassVar[str] = "seg"
    head: ClassVar[str] = "mask2former"
    detector: ClassVar[str] = "mask_rcnn"
    window: ClassVar[int] = 0
    rois: ClassVar[int] = 0
    rpn_convs: ClassVar[int] = 0
    max_detections: ClassVar[int] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.channels % 8:
            raise ValueError(f"--channels {self.channels}, expected a multiple of 8")
        if self.compile:
            raise ValueError("--compile is not for Mask2Former, whose matching leaves the device")


DEFAULTS = {"m2f": {"out": "runs/transfer_m2f", "iters": 160_000, "power": 0.9, "warmup_iters": 0,
                    "layer_decay": 0.9, "drop_path": 0.3, "clip_grad": 0.01, "inference": "whole"}}


# ---- both decoders -----------------------------------------------------------------------------------------


def sine_positions(grid, dim, device):
    """DETR's fixed table (h*w, dim): rows in the first half of the channels, columns in the second, angles of
    (1 ... n) / n * 2 pi, sines and cosines in turn."""
    omega = 10000.0 ** (-torch.arange(0, dim // 2, 2, device=device) / (dim // 2))
    angles = [torch.arange(1, n + 1, device=device)[:, None] * (2 * math.pi / n) * omega for n in grid]
    rows, columns = (torch.stack([x.sin(), x.cos()], dim=2).flatten(1) for x in angles)  # (n, dim / 2)
    rows, columns = rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def feed_forward(dim, hidden):
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


class DeformableAttention(nn.Module):
    """Of each token, per head: the weighted mean of the values at PLACES near its own on each of the maps.
    A linear layer of the token says which places, another one their weights."""

    def __init__(self, dim, levels):
        super().__init__()
        self.levels = levels
        self.offsets = nn.Linear(dim, HEADS * levels * PLACES * 2)  # x, y in pixels of the map
        self.weights = nn.Linear(dim, HEADS * levels * PLACES)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def init_weights(self):
        """Before training head i looks 1, 2, 3 and 4 pixels away, in the i-th of eight directions."""
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        direction = torch.stack([angle.cos(), angle.sin()], dim=1)
        direction = direction / direction.abs().amax(1, keepdim=True)  # to the border of a square
        bias = direction[:, None, None] * torch.arange(1, PLACES + 1)[:, None]
        self.offsets.bias.data.copy_(bias.expand(-1, self.levels, -1, -1).flatten())

    def forward(self, query, x, centres, grids):
        """query, x (B, N, D): tokens of all maps, one after the other; centres (N, 2) of these, x and y in
        [0, 1]; grids: (h, w) of the maps -> (B, N, D)"""
        # (B*heads, N, ...), as grid_sample wants it; float32, as half precision would round places to pixels
        offsets, weights, value = (layer(y).float().unflatten(2, (HEADS, -1)).transpose(1, 2).flatten(0, 1)
                                   for layer, y in ((self.offsets, query), (self.weights, query),
                                                    (self.value, x)))
        offsets = offsets.unflatten(2, (self.levels, PLACES, 2))
        weights = weights.softmax(2).unflatten(2, (self.levels, PLACES))
        found = 0.0
        for level, value_map in enumerate(value.split([h * w for h, w in grids], dim=1)):
            (h, w), (right, down) = grids[level], offsets[:, :, level].unbind(-1)
            place = torch.stack([centres[:, :1] + right / w, centres[:, 1:] + down / h], dim=-1)
            values = F.grid_sample(value_map.mT.unflatten(2, (h, w)), 2 * place - 1, align_corners=False)
            found = found + (values * weights[:, None, :, level]).sum(3)  # (B*heads, d, N)
        return self.proj(found.unflatten(0, (-1, HEADS)).flatten(1, 2).mT)


class PixelLayer(nn.Module):
    def __init__(self, dim, levels):
        super().__init__()
        self.attention, self.mlp = DeformableAttention(dim, levels), feed_forward(dim, 4 * dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x, positions, centres, grids):
        x = self.norms[0](x + self.attention(x + positions, x, centres, grids))
        return self.norms[1](x + self.mlp(x))


class PixelDecoder(nn.Module):
    """Four maps, finest first -> pixels (B, D, h, w) on the finest grid; the others, coarsest first, as
    tokens (B, h*w, D); and their grids"""

    def __init__(self, channels, dim, layers):
        super().__init__()
        finest, *others = channels
        norm = functools.partial(nn.GroupNorm, dim // 8)  # 32 groups of 256 channels
        conv = functools.partial(Conv2dNormActivation, out_channels=dim, norm_layer=norm)
        self.project = nn.ModuleList(conv(c, kernel_size=1, activation_layer=None, bias=True)
                                     for c in reversed(others))
        self.level_embed = nn.Parameter(torch.randn(len(others), dim))
        self.layers = nn.ModuleList(PixelLayer(dim, len(others)) for _ in range(layers))
        self.lateral = conv(finest, kernel_size=1, activation_layer=None)
        self.smooth = conv(dim, kernel_size=3)
        self.pixels = nn.Conv2d(dim, dim, 1)

    def forward(self, maps):
        finest, *others = maps
        others = [project(x) for project, x in zip(self.project, reversed(others), strict=True)]
        grids, device = [x.shape[2:] for x in others], finest.device
        places = [torch.cartesian_prod(*((torch.arange(n, device=device) + 0.5) / n for n in grid)).flip(1)
                  for grid in grids]
        positions = [sine_positions(grid, x.shape[1], device) + level
                     for grid, x, level in zip(grids, others, self.level_embed, strict=True)]
        x = torch.cat([x.flatten(2) for x in others], dim=2).transpose(1, 2)  # (B, N, D)
        positions, places = torch.cat(positions), torch.cat(places)
        for layer in self.layers:
            x = layer(x, positions, places, grids)
        others = x.split([h * w for h, w in grids], dim=1)
        last = others[-1].transpose(1, 2).unflatten(2, grids[-1])
        lateral = self.lateral(finest)
        return self.pixels(self.smooth(lateral + resize(last, lateral.shape[2:]))), others, grids


class CrossAttention(nn.Module):
    """Attention of q (B, Q, D) to k and v (B, N, D), where `visible` (B, Q, N), if given, is true."""

    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, q, k, v, visible=None):
        q, k, v = (layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
                   for layer, x in ((self.q, q), (self.k, k), (self.v, v)))
        visible = None if visible is None else visible[:, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.proj(x.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Masked attention to one map, attention among the queries, MLP; LayerNorm behind each (figure 2)."""

    def __init__(self, dim):
        super().__init__()
        self.masked, self.own, self.mlp = CrossAttention(dim), CrossAttention(dim), feed_forward(dim, 8 * dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, query_embed, memory, positions, visible):
        x = self.norms[0](x + self.masked(x + query_embed, memory + positions, memory, visible))
        x = self.norms[1](x + self.own(x + query_embed, x + query_embed, x))
        return self.norms[2](x + self.mlp(x))


class Mask2FormerHead(nn.Module):
    """Four maps, finest first -> [(class logits (B, Q, classes + 1), whose last is "no object"; mask logits
    (B, Q, h, w) on the finest grid)]: of the queries before the first layer and after each"""

    def __init__(self, channels, cfg, classes):
        super().__init__()
        dim = cfg.channels
        self.pixel_decoder = PixelDecoder(channels, dim, cfg.pixel_layers)
        self.level_embed = nn.Parameter(torch.randn(len(channels) - 1, dim))
        self.query, self.query_embed = (nn.Parameter(torch.randn(cfg.queries, dim)) for _ in range(2))
        self.layers = nn.ModuleList(DecoderLayer(dim) for _ in range(cfg.layers))
        self.norm, self.classify = nn.LayerNorm(dim), nn.Linear(dim, classes + 1)
        self.embed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), *feed_forward(dim, dim))
        init_linear(self.pixel_decoder.layers)
        init_linear(self.layers)
        for layer in self.pixel_decoder.layers:
            layer.attention.init_weights()

    def forward(self, maps):
        pixels, memories, grids = self.pixel_decoder(maps)
        positions = [sine_positions(grid, pixels.shape[1], pixels.device) for grid in grids]
        x = self.query.expand(len(pixels), -1, -1)
        outputs = [self.read(x, pixels)]
        for i, layer in enumerate(self.layers):
            level = i % len(memories)
            visible = attended(outputs[-1][1].detach(), grids[level])
            memory = memories[level] + self.level_embed[level]
            x = layer(x, self.query_embed, memory, positions[level], visible)
            outputs.append(self.read(x, pixels))
        return outputs

    def read(self, x, pixels):
        x = self.norm(x)
        return self.classify(x), torch.einsum("bqd,bdhw->bqhw", self.embed(x), pixels)


def attended(logits, grid):
    """Mask logits (B, Q, h, w) -> (B, Q, N) bool: whether a query sees a place of the grid. Its mask there is
    1/2 or more; one whose mask is so nowhere sees all."""
    visible = resize(logits, grid).flatten(2) >= 0
    return visible | ~visible.any(2, keepdim=True)


# ---- losses ------------------------------------------------------------------------------------------------


def sample(x, places):
    """x (B, n, H, W) at places (B, P, 2), x and y in [0, 1] -> (B, n, P), bilinear"""
    return F.grid_sample(x, 2 * places[:, None] - 1, align_corners=False)[:, :, 0]


@torch.no_grad()
def match(outputs, masks, classes, points):
    """[(class logits, mask logits (B, Q, h, w))], masks (B, T, H, W), classes (B, T), -1: none -> (outputs,
    B, T) int64: the query of each class, Q where there is none. Costs are the losses' parts with their
    weights, with a class's probability in place of its logarithm, on random places that all share."""
    (B, T), Q = classes.shape, outputs[0][0].shape[1]
    places = torch.rand(B, points, 2, device=masks.device)
    truth, costs = sample(masks, places).mT, []  # (B, P, T)
    for logits, x in outputs:
        x = sample(x.float(), places)  # (B, Q, P)
        p = x.sigmoid()
        mask = (F.softplus(x).sum(2, keepdim=True) - x @ truth) / points
        dice = 1 - (2 * p @ truth + 1) / (p.sum(2, keepdim=True) + truth.sum(1, keepdim=True) + 1)
        chosen = logits.float().softmax(2).gather(2, classes[:, None].clamp(min=0).expand(-1, Q, -1))
        costs.append(MASK * mask + DICE * dice - CLASS * chosen)
    # What is no class costs more than any and the same everywhere. NaN: the update will be skipped.
    costs = torch.stack(costs).masked_fill(classes[:, None] < 0, 1e6).nan_to_num(1e6, 1e6, -1e6)
    costs = costs.flatten(0, 1).cpu().numpy()  # the one host synchronisation
    found = np.full((len(costs), T), Q)
    for row, cost in zip(found, costs, strict=True):
        queries, targets = linear_sum_assignment(cost)
        row[targets] = queries
    found = torch.from_numpy(found).view(-1, B, T)
    found = found.pin_memory() if masks.is_cuda else found
    return found.to(masks.device, non_blocking=True).masked_fill(classes < 0, Q)


@torch.no_grad()
def uncertain_places(logits, points):
    """PointRend's for masks (M, 1, h, w) -> (M, points, 2): three quarters are, of three times as many random
    places as asked for, those whose logit is nearest to 0; a quarter is random."""
    M, doubtful = len(logits), int(0.75 * points)
    places = torch.rand(M, 3 * points, 2, device=logits.device)
    nearest = sample(logits, places)[:, 0].abs().topk(doubtful, dim=1, largest=False).indices
    chosen = places.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(M, points - doubtful, 2, device=logits.device)], dim=1)


def losses(outputs, labels, classes, points):
    """outputs: Mask2FormerHead's; labels (B, H, W), classes (B, T), -1 where there are fewer -> (sum
    over them of 2 class + 5 mask + 5 dice, {name: of the last one}). Class: cross-entropy, mean over queries,
    weighted. Mask (cross-entropy at places), dice: mean over the classes in the images. The numbers that they
    are divided by are means over the processes."""
    B, Q, C = outputs[0][0].shape
    masks = (labels[:, None] == classes[..., None, None]).float()
    found, valid = match(outputs, masks, classes, points), (classes >= 0).flatten()
    masks, n = masks.flatten(0, 1)[:, None], valid.sum().float()
    if dist.is_initialized():
        dist.all_reduce(n)
        n = n / dist.get_world_size()
    weights, total = n + NO_OBJECT * (B * Q - n), 0.0
    n = n.clamp(min=1)
    for (logits, x), query in zip(outputs, found, strict=True):
        target = classes.new_full((B, Q + 1), C - 1).scatter(1, query, classes)[:, :Q]  # at Q: what is none
        class_loss = F.cross_entropy(logits.float().mT, target, reduction="none")
        class_loss = (class_loss * torch.where(target == C - 1, NO_OBJECT, 1.0)).sum() / weights
        query = query.clamp(max=Q - 1)[..., None, None].expand(-1, -1, *x.shape[2:])
        x = x.gather(1, query).flatten(0, 1)[:, None].float()  # (B*T, 1, h, w)
        places = uncertain_places(x, points)
        x, truth = sample(x, places)[:, 0], sample(masks, places)[:, 0]  # (B*T, P)
        p = x.sigmoid()
        mask = F.binary_cross_entropy_with_logits(x, truth, reduction="none").mean(1)
        dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
        mask, dice = (mask * valid).sum() / n, (dice * valid).sum() / n
        total = total + CLASS * class_loss + MASK * mask + DICE * dice
    return total, {"class": class_loss, "mask": mask, "dice": dice}


# ---- model, data -------------------------------------------------------------------------------------------


class Mask2Former(transfer.Segmenter):
    def __init__(self, cfg, classes):
        super().__init__(cfg, classes)
        self.head = Mask2FormerHead(self.encoder.channels, cfg, classes)

    def forward(self, images, targets):
        """images (B, C, H, W), targets: label maps (B, H, W) and the classes in them (B, T), -1 where there
        are fewer -> loss, {name: detached}"""
        outputs = self.head(self.maps(images))
        with torch.autocast(images.device.type, enabled=False):
            loss, terms = losses(outputs, *targets, self.cfg.points)
        return loss, {name: x.detach() for name, x in {"loss": loss, **terms}.items()}

    def scores(self, images):
        """(B, C, H, W) -> [(B, classes, H, W)]: how much a pixel is of a class, by all queries together"""
        logits, masks = (x.float() for x in self.head(self.maps(images))[-1])
        masks = resize(masks, images.shape[2:]).sigmoid()
        with torch.autocast(images.device.type, enabled=False):
            return [torch.einsum("bqc,bqhw->bchw", logits.softmax(2)[..., :-1], masks)]


def make_model(cfg, classes, masks=False):
    return Mask2Former(cfg, classes)


def collate_classes(samples):
    """As transfer_data.collate_scenes, with "classes" (B, T): those in each label map, filled up with -1."""
    batch = data.collate_scenes(samples)
    found = [torch.bincount(x.flatten(), minlength=data.IGNORE)[: data.IGNORE].nonzero()[:, 0]
             for x in batch["target"]]
    one = torch.zeros(1, dtype=torch.int64)  # T is at least 1
    return batch | {"classes": pad_sequence([*found, one], batch_first=True, padding_value=-1)[:-1]}


def training_batches(source, run):
    """(images, (label maps, classes)) on the device, sample numbers"""
    samples = data.Scenes(run.samples(source, functools.partial(data.segmentation_crop, cfg=run.cfg)))
    for batch in run.load_batches(samples, training_keys(run), collate_classes):
        targets = (batch[name].to(run.device, non_blocking=True).long() for name in ("target", "classes"))
        yield run.normalize(batch["image"]), tuple(targets), batch["index"]


presets = functools.partial(transfer.presets, script=sys.modules[__name__])
train = functools.partial(transfer.train, script=sys.modules[__name__])

if __name__ == "__main__":
    launch(Config, presets, train, "transfer_mask2former", transfer.open_both)
