"""What holds for every method: masks, who learns, what hidden pixels change, numbers of parameters."""

import math

import pytest
import test_ddae
import test_ddae_beitv2
import test_mae_mff
import test_mff_feature
import test_revcol_v2
import test_vision_electra
import test_vision_electra_simmim
import torch
from test_blocks import classifier

import common
import ddae
import mae_mff
import mff_feature
import revcol_v2
import vision_electra

BUILD = {
    "mae_mff": test_mae_mff.build,
    "mff_feature": test_mff_feature.build,
    "ddae": test_ddae.build,
    "ddae_beitv2": test_ddae_beitv2.build,
    "vision_electra": lambda **values: test_vision_electra.build(**values)[0],
    "vision_electra_simmim": lambda **values: test_vision_electra_simmim.build(**values)[0],
    "revcol_v2": lambda **values: test_revcol_v2.pretraining(),
}
VARIANTS = {
    "mae_mff": [{}, {"target": "raw", "img_size": (32, 64), "in_chans": 1},
                {"target": "pixmim", "img_size": (64, 32), "in_chans": 5, "mask_ratio": 0.5}],
    "mff_feature": [{"fuse_layers": (0, 3)}, {"target": "milan"}, {"target": "milan", "fuse_layers": (3,)}],
    "ddae": [
        {}, {"distill": False}, {"dynamic": False}, {"num_levels": 1}, {"decoder": "mae", "decoder_depth": 2},
        {"dds": "pixel"}, {"dds": "feature"}, {"dds": "none"}, {"learn_beta": False}, {"reg": "literal"},
        {"reg": "none"}, {"target": "raw"}, {"feature_norm": "none"}, {"mask": "random"},
        {"img_size": (32, 64), "in_chans": 1}, {"mask_ratio": 0.4}],
    "ddae_beitv2": [{}, {"dds": False}, {"num_levels": 1}, {"initial": "mae"},
                    {"img_size": (32, 64), "in_chans": 1}],
    "vision_electra": [{}, {"levels": "image"}, {"levels": "patch", "noise": 0.0}, {"paste": False},
                       {"in_chans": 1, "img_size": (32, 64), "mask_ratio": 0.95}],
    "vision_electra_simmim": [{}, {"discriminator": "swin"}],
    "revcol_v2": [{}],
}


def batch(model, n=4):
    """What the loader gives: images, and the noise of their masks, or distances."""
    cfg = model.cfg
    images = torch.randn(n, cfg.in_chans, *cfg.img_size)
    if hasattr(cfg, "n_masked"):
        return images, torch.stack([ddae.sample_mask(cfg) for _ in range(n)])
    return images, torch.rand(n, math.prod(model.grid))


@pytest.mark.parametrize("script", [mae_mff, vision_electra, revcol_v2])
@pytest.mark.parametrize("L, ratio", [(196, 0.75), (24, 0.6), (64, 0.75), (12, 0.9)])
def test_masking_hides_exactly_the_patches_with_the_largest_noise(script, L, ratio):
    noise = torch.rand(5, L)
    ids_keep, ids_restore, mask = script.random_masking(noise, ratio)
    len_keep = int(L * (1 - ratio))
    assert ids_keep.shape == (5, len_keep) and (mask.sum(1) == L - len_keep).all()
    for b in range(5):
        visible = sorted(range(L), key=lambda i: noise[b, i].item())[:len_keep]
        assert ids_keep[b].tolist() == visible
        assert mask[b].tolist() == [0.0 if i in visible else 1.0 for i in range(L)]
    ids_shuffle = noise.argsort(1)
    assert torch.equal(ids_shuffle.gather(1, ids_restore), torch.arange(L).expand(5, L))


@pytest.mark.parametrize("script, values", [
    (script, values) for script, variants in VARIANTS.items() for values in variants], ids=str)
def test_all_that_learns_gets_a_gradient(script, values):
    model = BUILD[script](**values)
    for weight in [(0.0,), (0.2,)] if "electra" in script else [()]:  # before and after its warm-up
        model.zero_grad()
        loss, terms = model(*batch(model), *weight)
        loss.backward()
        for name, p in model.named_parameters():
            frozen = name.startswith("teacher.") or name.endswith("pos_embed")
            fixed_beta = not getattr(model.cfg, "learn_beta", getattr(model.cfg, "dds", None))
            frozen |= name == "beta" and fixed_beta
            assert (p.grad is None) if frozen else p.grad.any(), name
        assert loss == terms["loss"]
        assert all(torch.isfinite(value) and not value.requires_grad for value in terms.values())
    unsaved = {"mff_feature": "teacher", "ddae_beitv2": "tokenizer"}.get(script)
    assert not unsaved or not any(name.startswith(unsaved) for name in model.state_dict())


PREDICTIONS = dict.fromkeys(BUILD, lambda model, *x: model.predict(*x)[0])
PREDICTIONS["ddae"] = lambda model, *x: model.encode(*x)[0]
PREDICTIONS["ddae_beitv2"] = lambda model, *x: model.predict(*x)[1]
PREDICTIONS |= dict.fromkeys(("vision_electra", "vision_electra_simmim"),
                             lambda model, *x: model.generate(*x)[0])


@torch.no_grad()
@pytest.mark.parametrize("script", BUILD)
def test_hidden_pixels_change_the_target_and_no_prediction(script):
    model = BUILD[script]().eval()
    model.cfg.noise = 0.0  # of Vision ELECTRA's latent
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    images, noise = batch(model)
    distances = hasattr(model.cfg, "n_masked")
    mask = (noise > 0).float() if distances else mae_mff.random_masking(noise, model.cfg.mask_ratio)[2]
    cell = model.cell if "electra" in script else model.patch_size
    hidden = common.patches_to_pixels(mask[..., None], cell, model.grid) > 0
    other, visible = (torch.where(where, torch.randn_like(images), images) for where in (hidden, ~hidden))
    expected, found, changed = (PREDICTIONS[script](model, x, noise) for x in (images, other, visible))
    assert torch.equal(found, expected) and not torch.allclose(changed, expected, atol=1e-3)
    weight = (0.0,) * ("electra" in script)
    assert model(images, noise, *weight)[0] != model(other, noise, *weight)[0]


@pytest.mark.parametrize("make, parameters", [
    (lambda: classifier(1000, model="small"), 22_050_664), (lambda: classifier(1000), 86_567_656),
    (lambda: mae_mff.MaskedAutoencoder(mae_mff.Config(fuse_layers=(11,))), 111_907_840),
    (lambda: mae_mff.MaskedAutoencoder(mae_mff.Config()), 111_907_840 + 2_952_966),
    (lambda: mff_feature.CLIPTower(mff_feature.Config(teacher="random"), "base", 512), 86_192_640)])
def test_numbers_of_parameters(make, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters
