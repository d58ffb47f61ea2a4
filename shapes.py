"""Drawn images, so that everything runs without a download: `--data shapes`, and `--demo`, which implies it.

An image shows one to four of the ten SHAPE_KINDS on a textured background. Its class is the kind with the
largest visible area.
"""

import hashlib
import math
import struct

import numpy as np
import torch
from PIL import Image, ImageDraw


def ring(outer, inner, turns=1.0, points=28):
    """Polygon between two radii; two full circles joined by a cut make a ring."""
    angles = np.linspace(0, 2 * np.pi * turns, points)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([circle * outer, circle[::-1] * inner])


def star(points, inner):
    angles = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)[:, None]
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius


SHAPE_KINDS = {  # polygons of radius about 1
    "disc": ring(0.9, 0.0),
    "ring": ring(1.0, 0.55),
    "half disc": ring(1.0, 0.0, turns=0.5),
    "arc": ring(1.0, 0.6, turns=0.6),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "bar": [(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)],
    "triangle": star(3, 0.5),
    "star": star(5, 0.4),
    "cross": [(1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3),
              (-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3)],
    "corner": [(-0.9, -0.9), (0.9, -0.9), (0.9, -0.35), (-0.35, -0.35), (-0.35, 0.9), (-0.9, 0.9)],
}


def texture(side, rng):
    """Sum of five octaves of smooth noise, equalised to 0 ... 254: uint8 (side, side)."""
    total = np.zeros((side, side), np.float32)
    for cells in (2, 4, 8, 16, 32):
        noise = Image.fromarray(rng.random((cells, cells), dtype=np.float32) / math.sqrt(cells))
        total += np.asarray(noise.resize((side, side), Image.BICUBIC))
    return np.digitize(total, np.quantile(total, np.linspace(0, 1, 256)[1:-1])).astype(np.uint8)


class Shapes:
    """A source of images as common.open_data describes it. Image `i` is a function of (seed, split, i).

    What is drawn is kept if the whole set takes less than 256 MB (by each loader worker for itself:
    containers give little shared memory).
    """

    def __init__(self, size, in_chans, split="train", seed=0, n=None):
        self.n = n or {"train": 20000, "val": 2000}[split]
        self.size, self.in_chans, self.classes = size, in_chans, list(SHAPE_KINDS)
        self.key = (seed, 0 if split == "train" else 1)
        self.polygons = [np.asarray(polygon, np.float32) for polygon in SHAPE_KINDS.values()]
        rng = np.random.default_rng(0)  # the textures are the same in every run
        self.textures = [texture(2 * max(size), rng) for _ in range(16)]
        keeps = self.n * math.prod(size) * in_chans < 2**28
        self.cache = np.full((self.n, *size, in_chans), 0, np.uint8) if keeps else None
        self.labels = np.full(self.n, -1)

    def __len__(self):
        return self.n

    def name(self, index):
        return f"shapes[{index}]"

    def draw(self, index):
        """Image uint8 (H, W, C), map of shapes uint8 (H, W) (0 = background, i + 1 = shape i), kinds (n,)."""
        height, width = self.size
        key = hashlib.blake2b(struct.pack("3q", *self.key, index), digest_size=8).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little") >> 1))
        surface = self.textures[rng.integers(len(self.textures))]
        top, left = rng.integers(0, surface.shape[0] - np.array(self.size) + 1)
        # Light shapes on dark ground or the reverse.
        behind, before = (0, 128) if rng.random() < 0.5 else (128, 0)
        first, second = rng.integers(behind, behind + 128, (2, self.in_chans))
        ramp = np.linspace(0.25, 0.75, 256)[:, None]  # colour by texture value: (256, C)
        ramp = ((1 - ramp) * first + ramp * second).astype(np.uint8)
        image = ramp[surface[top : top + height, left : left + width]]
        instances = Image.new("L", (width, height))
        pen = ImageDraw.Draw(instances)
        n = rng.integers(1, 5)  # one large shape and up to three small ones, partly in front of it
        kinds, angles = rng.integers(len(self.polygons), size=n), rng.uniform(-0.35, 0.35, n)
        radii = np.append(0.26 + 0.14 * rng.random(), 0.08 + 0.1 * rng.random(n - 1)) * min(self.size)
        centres = np.append(0.3 + 0.4 * rng.random((1, 2)), 0.1 + 0.8 * rng.random((n - 1, 2)), axis=0)
        colours = rng.integers(before, before + 128, (n + 1, self.in_chans)).astype(np.uint8)
        for i in range(n):
            c, s = math.cos(angles[i]) * radii[i], math.sin(angles[i]) * radii[i]
            turn = np.array([[c, s], [-s, c]], np.float32)
            points = self.polygons[kinds[i]] @ turn + centres[i] * (width, height)
            pen.polygon(points.ravel().tolist(), fill=i + 1)
        instances = np.asarray(instances)
        image = np.where(instances[..., None] > 0, colours[instances], image)
        return image, instances, kinds

    def read(self, index):
        """(image uint8 (C, H, W), label)"""
        if self.cache is not None and self.labels[index] >= 0:
            return torch.from_numpy(self.cache[index]).permute(2, 0, 1), int(self.labels[index])
        image, instances, kinds = self.draw(index)
        label = int(kinds[np.bincount(instances.ravel(), minlength=len(kinds) + 1)[1:].argmax()])
        if self.cache is not None:
            self.cache[index], self.labels[index] = image, label
        return torch.from_numpy(image).permute(2, 0, 1), label
