"""vision_electra_simmim.py: SimMIM against timm's blocks, verdicts against loops, who learns what, starts."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import losses, run_script
from test_beit import file_of_simmim, theirs  # noqa: F401  (fixtures)
from test_vision_electra import bce, gradients
from torchvision.models import SwinTransformer

import beit
import common
import mae_mff
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


def start(tmp_path, content, *fields, **values):
    """A model that starts from a file with this content, given to these fields."""
    torch.save(content, tmp_path / "file.pth")
    cfg = Config(**SMALL | values | dict.fromkeys(fields, str(tmp_path / "file.pth")))
    model = SimMIMElectra(cfg)
    script.load_initial(model, cfg)
    return model


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


def test_hidden_pixels_change_nothing_and_noise_only_what_is_predicted():
    model, images, noise = build(discriminator="none", noise=0.0)
    pred, mask, diversity = model.generate(images, noise)
    hidden = common.patches_to_pixels(mask[..., None], 8, model.grid)
    torch.testing.assert_close(model.generate(images + 9 * hidden, noise)[0], pred)
    assert not torch.allclose(model.generate(images + 9 * (1 - hidden), noise)[0], pred, atol=1e-2)
    model.cfg.noise = 0.1
    assert diversity < 1e-6 < model.generate(images, noise)[2]


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
    """vision_electra.py's, with an L1 reconstruction, on cells; every parameter learns."""
    model, images, noise = build(discriminator=discriminator)
    torch.manual_seed(7)
    loss, terms = model(images, noise, 0.2)
    assert None not in gradients(model, loss).values()
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


# ---- starts, runs, wrong input


def test_networks_start_from_every_sort_of_file(tmp_path, theirs, file_of_simmim, capsys):  # noqa: F811
    """SimMIM's, resized to this grid; our last.pth, with the heads, and encoder.pth; torchvision's Swin."""
    path = str(file_of_simmim)
    cfg = Config(**NANO | {"img_size": (48, 32), "generator_init": path, "discriminator_init": path})
    model = SimMIMElectra(cfg)
    script.load_initial(model, cfg)
    assert capsys.readouterr().out.count("4x4 -> 6x4, bicubic") == 2
    for network in (model.generator, model.discriminator):
        assert torch.equal(network.blocks[2].attn.qkv.weight, theirs.blocks[2].attn.qkv.weight)
    both, _, _ = build()
    names = {name: f"discriminator.{name}" for name in both.discriminator.trunk_state()}
    last = {"model": both.state_dict(), "encoder": names, "method": "vision_electra_simmim"}
    model = start(tmp_path, last, *Config.start_from)
    assert all(torch.equal(value, both.state_dict()[name]) for name, value in model.state_dict().items())
    encoder = {"model": both.discriminator.trunk_state(), "meta": {"method": "vision_electra_simmim"}}
    model = start(tmp_path, encoder, *Config.start_from)
    for network in (model.generator, model.discriminator):
        assert torch.equal(network.norm.weight, both.discriminator.norm.weight)
    width, depths, counts = swin.SIZES["nano"]
    official = SwinTransformer([1, 1], width, list(depths), list(counts), [2, 2]).state_dict()
    model = start(tmp_path, official, "discriminator_init", discriminator="swin")
    trunk = model.discriminator.trunk_state()
    assert all(torch.equal(value, official[name]) for name, value in trunk.items())


@pytest.mark.parametrize("field, discriminator", [("generator_init", "vit"), ("discriminator_init", "swin")])
def test_a_file_of_another_network_is_refused(tmp_path, field, discriminator):
    mae = mae_mff.MaskedAutoencoder(mae_mff.Config(model="nano", img_size=(32, 32), patch_size=4))
    with pytest.raises(common.UserError, match="does not fit"):
        start(tmp_path, {"model": mae.state_dict()}, field, discriminator=discriminator)


@pytest.mark.parametrize("discriminator", ["vit", "swin"])
def test_a_demo_in_two_processes_is_the_same(small_npz, tmp_path, discriminator):
    """Two processes accumulate. No noise, as that differs by process."""
    command = ["vision_electra_simmim.py", "--demo", "--data", small_npz, "--amp", "off", "--workers", 0,
               "--log_every", 1, "--batch_size", 20, "--epochs", 0.2, "--noise", 0, "--pictures", 0,
               "--generator_warmup_epochs", 0.1, "--save_minutes", 0, "--resume", "--discriminator",
               discriminator, "--out"]
    output = run_script([*command, "whole"], tmp_path)
    assert "whole/warmstart/last.pth: 57/57 tensors loaded" in output
    loaded = "whole/warmstart/encoder.pth: 54/58 tensors loaded; missing: heads" in output
    assert loaded == (discriminator == "vit")
    run_script([*command, "two", "--micro_batch", 5], tmp_path, processes=2)
    for folder in ("", "warmstart"):
        one, two = (losses(tmp_path / name / folder) for name in ("whole", "two"))
        assert one == pytest.approx(two, rel=1e-4) and len(one) >= 2
    encoder = torch.load(tmp_path / "whole/encoder.pth", weights_only=True)
    if discriminator == "vit":
        assert encoder["meta"]["model"] == "beit_nano"
        beit.RelPosViT("nano", (32, 32), 4).load_state_dict(encoder["model"])  # strict
    else:
        assert (encoder["meta"]["model"], encoder["meta"]["patch_size"]) == ("swin_nano", 1)
        swin.Swin("nano", 1, encoder["meta"]["swin_window"]).load_state_dict(encoder["model"])
