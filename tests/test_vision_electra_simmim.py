"""vision_electra_simmim.py: SimMIM against timm's blocks, verdicts against loops, starts."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_beit import file_of_simmim, theirs  # noqa: F401  (fixtures)
from test_vision_electra import bce, start
from torchvision.models import SwinTransformer

import beit
import common
import swin
import vision_electra
import vision_electra_simmim as script
from vision_electra_simmim import Config, SimMIMElectra

NANO = {"model": "nano", "img_size": (32, 32), "patch_size": 8, "mask_ratio": 0.5}
SMALL = {"model": "nano", "img_size": (32, 48), "patch_size": 4, "swin_window": 2}


def build(n=3, **values):
    """A model whose discriminator has opinions, images, the noise of their masks."""
    cfg = Config(**(SMALL | values))
    torch.manual_seed(0)
    model = SimMIMElectra(cfg)
    for head in model.discriminator.heads.values() if model.discriminator else ():
        head.weight.data.normal_(0, 0.3)
        head.bias.data.normal_(0, 0.3)
    return model, torch.randn(n, cfg.in_chans, *cfg.img_size), torch.rand(n, math.prod(model.grid))


# ---- generator


def test_the_generator_is_simmim(theirs, file_of_simmim):  # noqa: F811
    """Its file as SimMIM's code uses it: timm's blocks on masked tokens, a sum over hidden pixels."""
    file, images = common.load_pickled(file_of_simmim)["model"], torch.randn(2, 3, 32, 32)
    cfg = Config(**NANO, noise=0.0, discriminator="none", generator_init=str(file_of_simmim))
    model = SimMIMElectra(cfg).eval()
    script.load_initial(model, cfg)
    noise = torch.rand(2, 4)
    mask = vision_electra.random_masking(noise, 0.5)[2].view(2, 2, 2)
    with torch.no_grad():
        x = theirs.patch_embed(images)
        for b in range(2):
            for j in range(16):
                if mask[b, j // 4 // 2, j % 4 // 2]:
                    x[b, j] = file["encoder.mask_token"][0, 0]
        x = torch.cat([theirs.cls_token.expand(2, -1, -1), x], dim=1)
        for block in theirs.blocks:
            x = block(x, shared_rel_pos_bias=theirs.rel_pos_bias())
        x = theirs.norm(x)[:, 1:].mT.reshape(2, 128, 4, 4)
        pred = F.pixel_shuffle(F.conv2d(x, file["decoder.0.weight"], file["decoder.0.bias"]), 8)
        pixels = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
        expected = ((pred - images).abs() * pixels).sum() / pixels.sum() / 3
        loss, _ = model(images, noise, 0.2)
        found, found_mask, _ = model.generate(images, noise)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found_mask, mask.flatten(1))
    torch.testing.assert_close(common.unpatchify(found, 16, (2, 2)), pred, atol=1e-4, rtol=1e-4)


# ---- discriminators


def test_verdicts_are_of_cells():
    """ViT: the head of the mean of a cell's four tokens; Swin: of a position of torchvision's last map."""
    model, images, _ = build()
    vit = model.discriminator
    tokens, found = beit.RelPosViT.forward(vit, images), vit(images)
    grid, heads = tokens[:, 1:].unflatten(1, (8, 12)), vit.heads
    for j in range(24):
        y, x = 2 * (j // 6), 2 * (j % 6)
        mean = (grid[:, y, x] + grid[:, y, x + 1] + grid[:, y + 1, x] + grid[:, y + 1, x + 1]) / 4
        torch.testing.assert_close(found["patch"][:, j], heads["patch"](mean)[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["image"], heads["image"](tokens[:, 0])[:, 0])
    model, images, _ = build(discriminator="swin")
    width, depths, counts = swin.SIZES["nano"]
    public = SwinTransformer([1, 1], width, list(depths), list(counts), [2, 2], stochastic_depth_prob=0.0)
    public.load_state_dict(model.discriminator.trunk_state(), strict=False)
    last, found = public.norm(public.features(images)), model.discriminator(images)
    heads = model.discriminator.heads
    torch.testing.assert_close(found["patch"], heads["patch"](last.flatten(1, 2))[..., 0])
    torch.testing.assert_close(found["image"], heads["image"](last.mean((1, 2)))[:, 0])


@pytest.mark.parametrize("discriminator", ["vit", "swin"])
def test_losses_against_loops(discriminator):
    """vision_electra.py's, with an L1 reconstruction, on cells."""
    model, images, noise = build(discriminator=discriminator)
    torch.manual_seed(7)
    _, terms = model(images, noise, 0.2)
    torch.manual_seed(7)
    with torch.no_grad():
        pred, mask, _ = model.generate(images, noise)
        composite, _ = model.compose(images, pred, mask)
        real, fake = (model.discriminator(x) for x in (images, composite))
    hidden = common.patches_to_pixels(mask[..., None], 8, (4, 6)).expand_as(images) > 0
    assert torch.equal(composite[~hidden], images[~hidden]) and mask.sum() == 3 * 18
    originals, composites = (x["patch"].flatten().tolist() for x in (real, fake))
    marks = mask.flatten().tolist()
    made = [s for s, m in zip(composites, marks, strict=True) if m]
    L_adv = sum(bce(s, True) for s in fake["image"].tolist()) / 3 + sum(bce(s, True) for s in made) / 54
    L_patch = sum(bce(s, True) for s in originals) / 144
    L_patch += sum(bce(s, not m) for s, m in zip(composites, marks, strict=True)) / 144
    expected = {"patch_loss": L_patch, "adversarial_loss": L_adv,
                "reconstruction_loss": (composite - images).abs()[hidden].mean().item()}
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)


# ---- starts


def test_networks_start_from_every_sort_of_file(tmp_path, theirs, file_of_simmim, capsys):  # noqa: F811
    """SimMIM's, resized to this grid; our last.pth, with the heads, and encoder.pth; torchvision's Swin."""
    path = str(file_of_simmim)
    cfg = Config(**NANO | {"img_size": (48, 32), "generator_init": path, "discriminator_init": path})
    model = SimMIMElectra(cfg)
    script.load_initial(model, cfg)
    assert capsys.readouterr().out.count("4x4 -> 6x4, bicubic") == 2
    for network in (model.generator, model.discriminator):
        assert torch.equal(network.blocks[2].attn.qkv.weight, theirs.blocks[2].attn.qkv.weight)
    both, small = build()[0], SMALL | {"script": script, "network": SimMIMElectra}
    names = {name: f"discriminator.{name}" for name in both.discriminator.trunk_state()}
    last = {"model": both.state_dict(), "encoder": names, "method": "vision_electra_simmim"}
    model = start(tmp_path, last, *Config.start_from, **small)
    assert all(torch.equal(value, both.state_dict()[name]) for name, value in model.state_dict().items())
    encoder = {"model": both.discriminator.trunk_state(), "meta": {"method": "vision_electra_simmim"}}
    model = start(tmp_path, encoder, *Config.start_from, **small)
    for network in (model.generator, model.discriminator):
        assert torch.equal(network.norm.weight, both.discriminator.norm.weight)
    width, depths, counts = swin.SIZES["nano"]
    official = SwinTransformer([1, 1], width, list(depths), list(counts), [2, 2]).state_dict()
    model = start(tmp_path, official, "discriminator_init", discriminator="swin", **small)
    trunk = model.discriminator.trunk_state()
    assert all(torch.equal(value, official[name]) for name, value in trunk.items())
