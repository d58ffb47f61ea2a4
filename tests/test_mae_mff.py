"""mae_mff.py: masking, targets, fusion and loss against slow versions; what the model is made of."""

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


@pytest.mark.parametrize("L, ratio", [(196, 0.75), (24, 0.6), (64, 0.75), (12, 0.9)])
def test_masking_hides_exactly_the_patches_with_the_largest_noise(L, ratio):
    noise = torch.rand(5, L)
    ids_keep, ids_restore, mask = mae_mff.random_masking(noise, ratio)
    len_keep = int(L * (1 - ratio))
    assert ids_keep.shape == (5, len_keep) and (mask.sum(1) == L - len_keep).all()
    for b in range(5):
        visible = sorted(range(L), key=lambda i: noise[b, i].item())[:len_keep]
        assert ids_keep[b].tolist() == visible
        assert mask[b].tolist() == [0.0 if i in visible else 1.0 for i in range(L)]
    ids_shuffle = noise.argsort(1)
    assert torch.equal(ids_shuffle.gather(1, ids_restore), torch.arange(L).expand(5, L))


def test_decoder_puts_every_visible_patch_back_in_its_place():
    model = build()
    ids_keep, ids_restore, mask = mae_mff.random_masking(torch.rand(3, 16), 0.75)
    model.decoder_pos_embed.data.zero_()
    model.decoder_embed = model.decoder_norm = model.decoder_pred = torch.nn.Identity()
    model.decoder_blocks = torch.nn.ModuleList()
    latent = torch.randn(3, 5, 128)
    out = model.decode(latent, ids_restore)
    for b in range(3):
        for j, patch in enumerate(ids_keep[b]):
            assert torch.equal(out[b, patch], latent[b, 1 + j])
    assert torch.equal(out[mask.bool()], model.mask_token[0].expand(36, -1))


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


def test_chain_continues_from_the_unprojected_output():
    """With the last block's share at 1, encoding is that of a plain ViT, whatever the projections are."""
    model, visible = build(fuse_layers=(0, 1, 2, 3)).eval(), torch.arange(16).expand(2, -1)
    model.fuse_weight.data = torch.tensor([-50.0, -50.0, -50.0, 50.0])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode(images, visible), common.ViT.forward(model, images))


def test_detaching_cuts_the_shortcuts_only():
    gradients = {}
    for detach in (False, True):
        torch.manual_seed(0)
        model = build(fuse_layers=(0, 3), detach_shallow=detach)
        outputs = {i: torch.randn(1, 5, 128, requires_grad=True) for i in (0, 3)}
        model.fuse(outputs).square().sum().backward()
        gradients[detach] = outputs[0].grad
        assert outputs[3].grad.any() and model.fuse_proj[0].weight.grad.any() and model.fuse_weight.grad.any()
    assert gradients[True] is None and gradients[False].any()


def test_default_layers_are_evenly_spaced_and_keep_the_ends():
    layers = {"base": (0, 2, 4, 6, 8, 11), "large": (0, 4, 9, 13, 18, 23), "nano": (0, 1, 2, 3)}
    assert {size: Config(model=size).fuse_layers for size in layers} == layers


def test_loss_is_the_mean_over_hidden_patches_and_reaches_no_visible_one():
    pred, target = torch.randn(2, 16, 12, requires_grad=True), torch.randn(2, 16, 12)
    mask = torch.zeros(2, 16)
    mask[0, :3] = mask[1, 7] = 1
    loss = mae_mff.masked_mse(pred, target, mask)
    hidden = [(0, 0), (0, 1), (0, 2), (1, 7)]
    expected = sum(((pred[b, j] - target[b, j]) ** 2).mean() for b, j in hidden) / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not pred.grad[~mask.bool()].any() and pred.grad[mask.bool()].all()


@pytest.mark.parametrize("target, img_size, in_chans",
                         [("mae", (32, 32), 3), ("raw", (32, 64), 1), ("pixmim", (64, 32), 5)])
def test_every_parameter_gets_a_gradient_at_any_shape(target, img_size, in_chans):
    model = build(target=target, img_size=img_size, in_chans=in_chans, mask_ratio=0.5)
    L = math.prod(model.grid)
    loss, terms = model(torch.randn(4, in_chans, *img_size), torch.rand(4, L))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any() if p.requires_grad else name.endswith("pos_embed"), name
    assert terms["loss"] == loss and sum(terms[f"fuse_weight/{i}"] for i in range(4)) == pytest.approx(1)


def test_parameter_counts():
    counts = []
    for layers in ((11,), (0, 2, 4, 6, 8, 11)):
        with torch.device("meta"):
            model = MaskedAutoencoder(Config(fuse_layers=layers))
        counts += [sum(p.numel() for p in model.parameters())]
    assert counts == [111_907_840, 111_907_840 + 2_952_966]
    assert counts[1] - sum(p.numel() for p in model.parameters() if p.requires_grad) == 197 * (768 + 512)


def test_plain_mae_has_exactly_the_official_names():
    modules = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    for block in ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "decoder_blocks.0"):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        modules += [f"{block}.{part}" for part in parts]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    names += ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"]
    assert sorted(build(fuse_layers=(3,)).state_dict()) == sorted(names)
    common.ViT("nano", (32, 32), 8).load_state_dict(build().trunk_state())  # strict: what is exported
