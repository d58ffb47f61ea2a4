"""mae_mff.py: targets, fusion and loss against slow versions; what the model is made of."""

import cmath
import itertools
import math

import pytest
import torch

import common
import mae_mff
from mae_mff import Config, MaskedAutoencoder


def build(**values):
    return MaskedAutoencoder(Config(**({"model": "nano", "img_size": (32, 32), "patch_size": 8} | values)))


def test_patch_target_uses_the_unbiased_variance_of_all_values_of_a_patch():
    images = torch.randn(2, 3, 16, 16) * 4 + 1
    target = mae_mff.patch_target(images, 8)
    patch = images[1, :, 8:, :8]  # third patch: second row, first column
    mean = patch.sum() / patch.numel()
    variance = ((patch - mean) ** 2).sum() / (patch.numel() - 1)
    expected = ((patch - mean) / (variance + 1e-6).sqrt()).permute(1, 2, 0).flatten()
    torch.testing.assert_close(target[1, 2], expected)
    assert torch.equal(mae_mff.patch_target(images, 8, normalised=False), common.patchify(images, 8))
    assert torch.isfinite(mae_mff.patch_target(torch.ones(1, 3, 16, 16), 8)).all()  # a constant image


def test_low_pass_filter_against_a_direct_transform(height=8, width=14):
    """PixMIM as released: a frequency, counted from the centre of the shifted spectrum, stays in the disc."""
    image, radius = torch.rand(1, 1, height, width, dtype=torch.float64), 40 / 224 * 1.5
    kept = torch.zeros(height, width, dtype=torch.complex128)
    places = list(itertools.product(range(height), range(width)))
    for i, j in places:
        dy, dx = (i - (height - 1) / 2) / (radius * height), (j - (width - 1) / 2) / (radius * width)
        if dy**2 + dx**2 > 1:
            continue
        u, v = (i - height // 2) / height, (j - width // 2) / width
        value = sum(image[0, 0, y, x].item() * cmath.exp(-2j * math.pi * (u * y + v * x)) for y, x in places)
        for y, x in places:
            kept[y, x] += value / (height * width) * cmath.exp(2j * math.pi * (u * y + v * x))
    torch.testing.assert_close(mae_mff.low_pass(image, radius)[0, 0], kept.abs(), atol=1e-9, rtol=0)
    impulse = torch.zeros(1, 1, 224, 224, dtype=torch.float64)
    impulse[..., 0, 0] = 1  # a white spectrum: by Parseval one per frequency, of which PixMIM keeps 5024
    assert round((mae_mff.low_pass(impulse) ** 2).sum().item() * 224**2) == 5024


def test_fusion_against_a_loop():
    model = build(fuse_layers=(0, 2, 3))
    model.fuse_weight.data = torch.tensor([0.3, -1.0, 0.7])
    outputs = {i: torch.randn(2, 5, 128) for i in (0, 2, 3)}
    share = [math.exp(w) / sum(math.exp(v) for v in (0.3, -1.0, 0.7)) for w in (0.3, -1.0, 0.7)]
    expected = share[2] * outputs[3]
    for k, (linear, i) in enumerate(zip(model.fuse_proj, (0, 2), strict=True)):
        expected = expected + share[k] * (outputs[i] @ linear.weight.T + linear.bias)
    torch.testing.assert_close(model.fuse(outputs), expected, atol=1e-5, rtol=1e-5)
    assert list(model.fuse_shares()) == ["fuse_weight/0", "fuse_weight/2", "fuse_weight/3"]
    assert [value.item() for value in model.fuse_shares().values()] == pytest.approx(share)


def test_chain_continues_from_the_unprojected_output():
    """With the last block's share at 1, encoding is that of a plain ViT, whatever the projections are."""
    model, visible = build(fuse_layers=(0, 1, 2, 3)).eval(), torch.arange(16).expand(2, -1)
    model.fuse_weight.data = torch.tensor([-50.0, -50.0, -50.0, 50.0])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode(images, visible), common.ViT.forward(model, images))


@pytest.mark.parametrize("detach", [False, True])
def test_detaching_cuts_the_shortcuts_only(detach):
    model = build(fuse_layers=(0, 3), detach_shallow=detach)
    outputs = {i: torch.randn(1, 5, 128, requires_grad=True) for i in (0, 3)}
    model.fuse(outputs).square().sum().backward()
    assert outputs[3].grad.any() and model.fuse_proj[0].weight.grad.any() and model.fuse_weight.grad.any()
    assert (outputs[0].grad is None) == detach


def test_default_layers_are_evenly_spaced_and_keep_the_ends():
    layers = {"base": (0, 2, 4, 6, 8, 11), "large": (0, 4, 9, 13, 18, 23), "nano": (0, 1, 2, 3)}
    assert {size: Config(model=size).fuse_layers for size in layers} == layers


def test_loss_is_the_mean_over_hidden_patches():
    pred, target, mask = torch.randn(2, 16, 12), torch.randn(2, 16, 12), torch.zeros(2, 16)
    mask[0, :3] = mask[1, 7] = 1
    hidden = [(0, 0), (0, 1), (0, 2), (1, 7)]
    expected = sum(((pred[b, j] - target[b, j]) ** 2).mean() for b, j in hidden) / 4
    torch.testing.assert_close(mae_mff.masked_mse(pred, target, mask), expected)


def test_plain_mae_has_exactly_the_official_names():
    modules = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    for block in ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "decoder_blocks.0"):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        modules += [f"{block}.{part}" for part in parts]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    names += ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"]
    assert sorted(build(fuse_layers=(3,)).state_dict()) == sorted(names)
    common.ViT("nano", (32, 32), 8).load_state_dict(build().trunk_state())  # strict: what is exported
