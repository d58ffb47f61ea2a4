"""The ViT of BEiT and SimMIM: common's ViT with relative positions in place of absolute ones.

BEiT (Bao et al., arXiv 2106.08254), SimMIM (Xie et al., arXiv 2111.09886). Every head adds to its scores a
number that depends on where the other token lies; one table of these serves all blocks (timm's
`use_shared_rel_pos_bias`). Files call such a network beit_SIZE. The names are timm's, but that queries, keys
and values have one bias, `attn.qkv.bias`, with 0 for the keys: a bias of theirs changes no softmax. Layer
scale needs no module: it is a factor of the linear layer before it (from_beit).

On another grid than the trained one, the table is resized, bicubic: our choice. BEiT fine-tunes with a copy
of the table in every block; here one table goes on serving all: our choice, too.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from common import VIT_SIZES, UserError, ViT, interpolate, print0

TABLE = "relative_position_bias_table"
BEIT_SIZES = [f"beit_{size}" for size in VIT_SIZES]
PRETRAINING = ("lm_head.", "cls_pt_layers.")  # how names start of what BEiT and BEiT-v2 only pre-train with


def relative_index(grid):
    """(1 + L, 1 + L) int64: the table's row for the token that looks (row) and the one that is seen (column).
    The table: distances row by row, (2h - 1)(2w - 1) of them, then class token to patch, patch to class
    token, class token to itself."""
    h, w = grid
    row, column = (x.flatten() for x in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    last = (2 * h - 1) * (2 * w - 1)
    index = torch.full((1 + h * w, 1 + h * w), last + 2)
    index[0, 1:], index[1:, 0] = last, last + 1
    index[1:, 1:] = (row[:, None] - row + h - 1) * (2 * w - 1) + column[:, None] - column + w - 1
    return index


def table_side(table):
    """Patches of a side of the square grid that a table is for; None if it is for no such grid."""
    side = (math.isqrt(len(table) - 3) + 1) // 2
    return side if (2 * side - 1) ** 2 == len(table) - 3 else None


def resize_table(table, old_grid, new_grid):
    """((2h - 1)(2w - 1) + 3, heads) -> that of another grid: bicubic in float32; rows of the class token
    unchanged."""
    (h, w), (new_h, new_w) = old_grid, new_grid
    distances = table[:-3].T.reshape(1, -1, 2 * h - 1, 2 * w - 1).float()
    distances = interpolate(distances, (2 * new_h - 1, 2 * new_w - 1), mode="bicubic", align_corners=False)
    return torch.cat([distances.flatten(2)[0].T.to(table.dtype), table[-3:]])


class RelPosBias(nn.Module):
    """Loads tables of other square grids, resized."""

    def __init__(self, grid, num_heads):
        super().__init__()
        self.grid = tuple(grid)
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.register_buffer("index", relative_index(grid), persistent=False)
        self.register_load_state_dict_pre_hook(self.fit)

    def fit(self, module, state, prefix, *_):
        table = state.get(prefix + TABLE, self.relative_position_bias_table)
        side = table_side(table)
        if side and len(table) != len(self.relative_position_bias_table):
            state[prefix + TABLE] = resize_table(table, (side, side), self.grid)
            print0(f"{TABLE} {side}x{side} -> {self.grid[0]}x{self.grid[1]}, bicubic")

    def forward(self, grid=None):
        """(heads, 1 + L, 1 + L) for images or windows of `grid` patches, default those of the table: what is
        added to the scores of the token that looks (row) and the one that is seen (column)."""
        table, index = self.relative_position_bias_table, self.index
        if grid not in (None, self.grid):
            table = resize_table(table, self.grid, grid)
            index = relative_index(grid).to(table.device)
        return F.embedding(index, table).permute(2, 0, 1)  # its gradient, unlike indexing's, is deterministic


class RelPosViT(ViT):
    """ViT without head; `size` may be called beit_SIZE. Arguments as ViT's."""

    def __init__(self, size, img_size, patch_size, in_chans=3, drop_path=0.0):
        super().__init__(size.removeprefix("beit_"), img_size, patch_size, in_chans, drop_path)
        self.pos_embed = None
        self.rel_pos_bias = RelPosBias(self.grid, self.blocks[0].attn.num_heads)

    def trunk_state(self):
        name = f"rel_pos_bias.{TABLE}"
        return super().trunk_state() | {name: self.state_dict()[name]}

    def embed(self, images):
        return self.patch_embed(images)

    def prepend_cls(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

    def run_blocks(self, x):
        """Patch tokens (B, L, D) -> normalised tokens (B, 1 + L, D)"""
        x, bias = self.prepend_cls(x), self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def forward(self, images):
        return self.run_blocks(self.embed(images))


def from_beit(weights):
    """{name: tensor} of a network of BEiT's or SimMIM's, without prefix -> under RelPosViT's names: biases of
    queries and values joined, layer scale multiplied into what it scales. Other names stay.
    UserError for tables in the blocks, which BEiT has when it is fine-tuned."""
    if any(re.fullmatch(rf"blocks\.\d+\.attn\.{TABLE}", name) for name in weights):
        raise UserError("it has a table of relative positions in every block, as a fine-tuned BEiT: expected "
                        "one that all blocks share, as pre-trained")
    weights = {name: x for name, x in weights.items() if name != "rel_pos_bias.relative_position_index"}
    for part in [name.removesuffix("q_bias") for name in weights if name.endswith("attn.q_bias")]:
        q, v = weights.pop(f"{part}q_bias"), weights.pop(f"{part}v_bias")
        weights.pop(f"{part}k_bias", None)
        weights[f"{part}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    for gamma, layer in (("gamma_1", "attn.proj"), ("gamma_2", "mlp.fc2")):
        for part in [name.removesuffix(gamma) for name in weights if name.endswith(gamma)]:
            scale = weights.pop(part + gamma)
            weights[f"{part}{layer}.weight"] = scale[:, None] * weights[f"{part}{layer}.weight"]
            weights[f"{part}{layer}.bias"] = scale * weights[f"{part}{layer}.bias"]
    return weights
