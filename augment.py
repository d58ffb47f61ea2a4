"""Augmentation of finetune.py: of an image in the loader, of a batch on the device, and `--repeats`.

Our choice: mixup and cutmix pair an image with its neighbour in the batch; posterize leaves at least one bit;
the flip follows RandAugment; with --repeats the copies of an image share an update, and all images come
before one returns (elsewhere a pass sees 1/repeats of them).
"""

import math

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from common import EvalCrop, RandomResizedCrop, epoch_order

# ---- in the loader -----------------------------------------------------------------------------------------


def affine(angle=0.0, shear=(0.0, 0.0), translate=(0.0, 0.0)):
    """Operation that turns, slants (about a corner) or shifts; limits: degrees, slopes, shares of sides."""

    def apply(image, m, fill):
        slant = [math.degrees(math.atan(m * slope)) for slope in shear]
        shift = [m * share * side for share, side in zip(translate, image.size, strict=True)]
        corner = [0, 0] if any(shear) else None
        return TF.affine(image, m * angle, shift, 1.0, slant, InterpolationMode.BICUBIC, fill, corner)

    return apply


# image: Pillow's; m: -1 to 1, the sign is ignored where it has no meaning; fill: levels outside the image.
OPERATIONS = {
    "autocontrast": lambda image, m, fill: TF.autocontrast(image),
    "equalize": lambda image, m, fill: TF.equalize(image),
    "invert": lambda image, m, fill: TF.invert(image),
    "posterize": lambda image, m, fill: TF.posterize(image, max(1, 4 - int(4 * abs(m)))),
    "solarize": lambda image, m, fill: TF.solarize(image, 256 - int(256 * abs(m))),
    "solarize_add": lambda image, m, fill: image.point(lambda x: x + int(110 * abs(m)) if x < 128 else x),
    "color": lambda image, m, fill: TF.adjust_saturation(image, 1 + 0.9 * m),
    "contrast": lambda image, m, fill: TF.adjust_contrast(image, 1 + 0.9 * m),
    "brightness": lambda image, m, fill: TF.adjust_brightness(image, 1 + 0.9 * m),
    "sharpness": lambda image, m, fill: TF.adjust_sharpness(image, 1 + 0.9 * m),
    "rotate": affine(angle=30.0),
    "shear_x": affine(shear=(0.3, 0.0)),
    "shear_y": affine(shear=(0.0, 0.3)),
    "translate_x": affine(translate=(0.45, 0.0)),
    "translate_y": affine(translate=(0.0, 0.45)),
}


class RandAugment:
    """RandAug (M, 0.5) of the papers (Cubuk et al. 2020; timm's `rand-mM-mstd0.5-inc1`): two operations,
    drawn with replacement, each applied half of the time, at a magnitude from N(M, 0.5) of 10."""

    def __init__(self, magnitude, fill):
        self.magnitude, self.fill = magnitude, fill

    def __call__(self, image):
        """uint8 (C, H, W), one channel or three -> the same"""
        image = TF.to_pil_image(image)  # bicubic turns need it, and its sharpness is four times as fast
        for choice in torch.randint(len(OPERATIONS), (2,)).tolist():
            apply, negative = (torch.rand(2) < 0.5).tolist()
            m = min(max(self.magnitude + 0.5 * torch.randn(()).item(), 0.0), 10.0) / 10
            if apply:
                image = list(OPERATIONS.values())[choice](image, -m if negative else m, self.fill)
        return TF.pil_to_tensor(image)


class OneBoxCrop(RandomResizedCrop):
    """The crop of MAE's linear probe: one box, its sides cut to the image's, where RandomResizedCrop draws up
    to ten until one fits. So boxes are larger: of a 375 x 500 image .52 on average, not .43."""

    def box(self, height, width):
        low, high = self.scale
        u_area, u_ratio, u_top, u_left = torch.rand(4).tolist()
        side = math.sqrt(height * width * (low + (high - low) * u_area))
        root = math.exp(self.log_ratio * (u_ratio - 0.5))  # of the aspect
        h, w = max(1, min(height, round(side / root))), max(1, min(width, round(side * root)))
        return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w


def train_transform(cfg):
    """What the loader does to a training image before the flip."""
    if cfg.augment == "none":
        return EvalCrop(cfg.img_size, cfg.test_crop)
    kind = OneBoxCrop if cfg.mode == "linear" else RandomResizedCrop
    crop = kind(cfg.img_size, scale=(0.08, 1.0))
    if cfg.augment == "crop":
        return crop
    fill = [round(255 * value) for value in cfg.mean]
    return v2.Compose([crop, v2.ToDtype(torch.uint8, scale=True), RandAugment(cfg.randaug, fill)])


# ---- on the device -----------------------------------------------------------------------------------------


def random_erasing(images, probability):
    """timm's, in mode `pixel`: with this probability, N(0, 1) fills a box of an image: 2 to 33.3 % of its
    area, aspect .3 to 1 / .3 (log-uniform), the first of ten draws that is smaller than it, if one is."""
    B, _, H, W = images.shape
    u_area, u_aspect = torch.rand(2, 10, B, device=images.device)
    area, aspect = H * W * (0.02 + (1 / 3 - 0.02) * u_area), torch.exp((2 * u_aspect - 1) * math.log(1 / 0.3))
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < H) & (w < W)
    first = fits.int().argmax(0, keepdim=True)
    h, w, fits = (x.gather(0, first)[0] for x in (h, w, fits))
    u_top, u_left, u = torch.rand(3, B, device=images.device)
    top, left = (u_top * (H - h + 1)).floor(), (u_left * (W - w + 1)).floor()
    rows, columns = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
    inside = ((rows >= top[:, None]) & (rows < (top + h)[:, None]))[:, :, None] & (
        (columns >= left[:, None]) & (columns < (left + w)[:, None]))[:, None, :]
    erased = (inside & (fits & (u < probability))[:, None, None])[:, None]
    return torch.where(erased, torch.randn_like(images), images)


def erase_and_mix(images, labels, cfg):
    """Random erasing, then mixup or cutmix, each half of the time, one lambda per micro-batch. labels: (B,),
    or one-hot (B, classes) if they are to be mixed."""
    if cfg.erasing:
        images = random_erasing(images, cfg.erasing)
    pairs = (v2.MixUp, cfg.mixup), (v2.CutMix, cfg.cutmix)
    kinds = [kind(alpha=alpha) for kind, alpha in pairs if alpha]
    return v2.RandomChoice(kinds)(images, labels) if kinds else (images, labels)


# ---- batches -----------------------------------------------------------------------------------------------


def repeated_keys(run):
    """common.training_keys with --repeats copies of each image in an update, each with its own key
    (epoch * repeats + copy, index), so its own crop. Copies lie batch_size / repeats apart: mixup of
    neighbours does not mix an image with itself."""
    repeats, B = run.cfg.repeats, run.cfg.batch_size
    images = math.ceil(B / repeats)
    for micro_step in range(run.step * run.accum_steps, run.steps * run.accum_steps):
        first, keys = (micro_step * run.world_size + run.rank) * run.micro_batch, []
        for position in range(first, first + run.micro_batch):
            update, place = divmod(position, B)
            copy, image = divmod(place, images)
            epoch, i = divmod(update * images + image, run.n)
            keys.append((epoch * repeats + copy, int(epoch_order(run.n, run.cfg.seed, epoch)[i])))
        yield keys


def training_batches(source, run):
    """Micro-batches: images (B, C, H, W) normalised, on the device; labels (B,), one-hot if they are to be
    mixed; sample numbers."""
    cfg = run.cfg
    samples = run.samples(source, train_transform(cfg), flip=cfg.augment != "none")
    for batch in run.load_batches(samples, repeated_keys(run)):
        labels = batch["label"].to(run.device, non_blocking=True)
        if cfg.mixup or cfg.cutmix:
            labels = F.one_hot(labels, len(source.classes))
        yield run.normalize(batch["image"]), labels, batch["index"]
