"""vision_electra.py with an R1 penalty (Mescheder et al., ICML 2018), an arm of readings.py.

The squared gradient of the verdicts on originals by the image, here from a finite difference (our choice):
noise of deviation 0.1, of 1 for the whole data, and what it changes in the verdicts. Its weight, 1, is ours.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vision_electra  # noqa: E402  (found through the line above)
from common import launch  # noqa: E402

STEP = 0.1


class VisionElectraR1(vision_electra.VisionElectra):
    def forward(self, images, noise, gan_weight):
        loss, terms = super().forward(images, noise, gan_weight)
        verdicts = self.discriminator(images), self.discriminator(images + STEP * torch.randn_like(images))
        penalty = sum(((a - b) / STEP).square().mean()
                      for a, b in zip(*(v.values() for v in verdicts), strict=True))
        return loss + penalty / 2, terms | {"r1": penalty.detach()}


if __name__ == "__main__":
    vision_electra.VisionElectra = VisionElectraR1
    launch(vision_electra.Config, vision_electra.presets, vision_electra.train, "vision_electra")
