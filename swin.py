"""torchvision's Swin Transformer as an encoder without head, under torchvision's names.

Swin (Liu et al., arXiv 2103.14030). Files call such a network swin_SIZE. Four stages at 1, 2, 4 and 8 times
the patch's side, whose attention stays in windows of `window` x `window` positions; torchvision fills up what
these do not tile.
"""

from torch import nn
from torchvision.models import SwinTransformer

SIZES = {  # width of the first stage, blocks of the four, heads; nano: our choice, for --demo and tests
    "nano": (32, (1, 1, 2, 1), (1, 2, 4, 8)),
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
SWIN_SIZES = [f"swin_{size}" for size in SIZES]


class Swin(SwinTransformer):
    """size: SIZE or swin_SIZE; patch_size: of the first stage, 4 in the paper. drop_path: rate of the last
    block, rising linearly from 0."""

    def __init__(self, size, patch_size, window, in_chans=3, drop_path=0.0):
        width, depths, heads = SIZES[size.removeprefix("swin_")]
        sizes = [patch_size] * 2, width, list(depths), list(heads), [window] * 2
        super().__init__(*sizes, stochastic_depth_prob=drop_path, num_classes=1)
        self.depths, self.embed_dim, self.head = depths, 8 * width, nn.Identity()
        self.stages = list(self._modules["features"])  # a subclass may have a method of that name
        if in_chans != 3:
            self.stages[0][0] = nn.Conv2d(in_chans, width, patch_size, patch_size)

    def trunk_state(self):
        """The state dict without what a subclass adds."""
        trunk = ("features.", "norm.")
        return {name: value for name, value in self.state_dict().items() if name.startswith(trunk)}

    def layer_id(self, name):
        """For layer-wise decay, as in SimMIM's code: 0 the patch embedding, k + 1 block k, what merges
        patches with the block before it, depth + 1 the rest."""
        part, *place = name.split(".")
        if part != "features":
            return sum(self.depths) + 1
        layer = int(place[0])
        before = sum(self.depths[: layer // 2])
        return before + int(place[1]) + 1 if layer % 2 else before

    def maps(self, images):
        """(B, C, H, W) -> the four stages' ends, (B, h, w, D) each, finest first, not normalised"""
        x, maps = images, []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i % 2:  # the others embed and merge patches
                maps.append(x)
        return maps

    def last_map(self, images):
        """(B, C, H, W) -> (B, h, w, D), normalised"""
        return self.norm(self.maps(images)[-1])
