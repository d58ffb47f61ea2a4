"""VQGAN's image tokenizer (Esser et al., Taming Transformers, arXiv 2012.09841), for table 10 of `cim.py`.

Written from the paper's appendix and the layout of its published files; names of parameters are theirs. A
stack of residual blocks halves an image four times, what is left of 16 x 16 pixels becomes the nearest of the
codebook's entries, and the decoder makes an image of these. `convert_dalle.py last.ckpt --out vqgan.pth`
takes out of `vqgan_imagenet_f16_1024` or `_16384` what is needed. CIM does not say which of the two it used.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import interpolate

MULTIPLES = (1, 1, 2, 2, 4)  # channels of the five resolutions, of `width`


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.conv1 = norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    """One head over all positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(y.unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """Half the size: padded on the right and below; or twice: each pixel copied."""

    def __init__(self, channels, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=int(up))

    def forward(self, x):
        return self.conv(interpolate(x, scale_factor=2) if self.up else F.pad(x, (0, 1, 0, 1)))


class Half(nn.Module):
    """Encoder (up False) or decoder: n_in -> n_out channels; attention in the middle and, after each block,
    at the coarsest resolution."""

    def __init__(self, n_in, n_out, width, up):
        super().__init__()
        channels = [width * multiple for multiple in MULTIPLES]
        order = list(reversed(range(5))) if up else range(5)
        at, top = (channels[-1] if up else width), channels[-1]
        self.conv_in, stages = nn.Conv2d(n_in, at, 3, padding=1), {}
        for i in order:
            blocks, attention = nn.ModuleList(), nn.ModuleList()
            for _ in range(3 if up else 2):
                blocks.append(ResidualBlock(at, channels[i]))
                at = channels[i]
                if i == 4:
                    attention.append(AttentionBlock(at))
            stages[i] = nn.ModuleDict({"block": blocks, "attn": attention})
            if i != (0 if up else 4):
                stages[i]["upsample" if up else "downsample"] = Resample(at, up)
        self.stages = [stages[i] for i in order]  # past nn.Module: their names are those below
        setattr(self, "up" if up else "down", nn.ModuleList(stages[i] for i in range(5)))
        self.mid = nn.ModuleDict({"block_1": ResidualBlock(top, top), "attn_1": AttentionBlock(top),
                                  "block_2": ResidualBlock(top, top)})
        self.is_decoder, self.norm_out = up, norm(at)
        self.conv_out = nn.Conv2d(at, n_out, 3, padding=1)

    def middle(self, x):
        for layer in self.mid.values():
            x = layer(x)
        return x

    def forward(self, x):
        x = self.conv_in(x)
        x = self.middle(x) if self.is_decoder else x
        for stage in self.stages:
            for i, block in enumerate(stage["block"]):
                x = block(x)
                x = stage["attn"][i](x) if len(stage["attn"]) else x
            for name in stage.keys() - {"block", "attn"}:
                x = stage[name](x)
        x = x if self.is_decoder else self.middle(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Images in [0, 1] <-> ids (B, L) on the grid (h, w), 16 x 16 pixels of an (16h, 16w) image each; what
    convert_dalle.DVAE offers."""

    def __init__(self, grid, vocab_size=1024, width=128, in_chans=3, channels=256):
        super().__init__()
        self.grid, self.vocab_size = grid, vocab_size
        self.encoder = Half(in_chans, channels, width, up=False)
        self.decoder = Half(channels, in_chans, width, up=True)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(vocab_size, channels)})
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.to(memory_format=torch.channels_last)

    def view(self, pixels):
        """(B, C, H, W) -> (B, C, 16h, 16w): what the encoder sees."""
        size = [16 * n for n in self.grid]
        if list(pixels.shape[2:]) == size:
            return pixels
        return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)

    @torch.no_grad()
    def ids(self, pixels):
        """(B, C, H, W) -> the nearest entries, (B, L) int64."""
        codes = self.quant_conv(self.encoder(2 * self.view(pixels) - 1))
        with torch.autocast(pixels.device.type, enabled=False):
            codes, entries = codes.float().flatten(2).transpose(1, 2), self.quantize["embedding"].weight
            return (entries.square().sum(1) - 2 * codes @ entries.T).argmin(-1)

    @torch.no_grad()
    def pixels(self, ids):
        """(B, L) -> (B, C, 16h, 16w) in [0, 1]."""
        codes = self.quantize["embedding"](ids).transpose(1, 2).unflatten(2, self.grid)
        return (self.decoder(self.post_quant_conv(codes)).float().clamp(-1, 1) + 1) / 2
