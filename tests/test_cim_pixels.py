"""cim_pixels.py: its MAE is mae_mff.py's, boxes and their loss against loops; refusals; runs and starts."""

import math

import pytest
import torch
from conftest import killed, losses, run_script
from test_cim import QUICK, check_gradients, twice

import cim_pixels
import mae_mff

NANO = {"model": "nano", "img_size": (32, 64), "patch_size": 4}


def build(**values):
    cfg = cim_pixels.Config(**NANO | {"mean": (0.5,) * 3, "std": (0.5,) * 3} | values)
    model = cim_pixels.PaintedImages(cfg) if cfg.generator == "mae" else cim_pixels.ErasedImages(cfg)
    return model, (torch.rand(3, 3, 32, 64), torch.rand(3, math.prod(cfg.grid)), torch.tensor(64))


def test_the_mae_is_that_of_mae_mff_and_paints_around_its_prediction():
    model, (pixels, noise, k) = build(rgb_std=0.01)
    mae = mae_mff.MaskedAutoencoder(mae_mff.Config(**NANO, mask_ratio=0.5, fuse_layers=(3,), target="raw"))
    model.generator.load_state_dict(mae.state_dict())  # strict
    corrupted, mask, replaced, loss, _ = model.corrupt(pixels, noise, k)
    torch.testing.assert_close(loss, mae(pixels * 2 - 1, -noise)[0])  # it hides the largest
    pred, hidden = mae.predict(pixels * 2 - 1, -noise)
    assert torch.equal(mask, hidden > 0) and torch.equal(mask, replaced) and not corrupted.requires_grad
    visible = (model.image_of(~mask) > 0).expand_as(pixels)
    error = corrupted - torch.where(visible, pixels, (cim_pixels.unpatchify(pred, 4, (8, 16)) + 1) / 2)
    drawn = error[~visible & (corrupted > 0.1) & (corrupted < 0.9)]  # the others may have been cut to [0, 1]
    assert not error[visible].any() and len(drawn) > 4000 and drawn.mean().abs() < 1e-3
    assert drawn.std().item() == pytest.approx(0.01, rel=0.05)
    fixed = [name for name, p in model.generator.named_parameters() if not p.requires_grad]
    assert fixed == ["pos_embed", "decoder_pos_embed"]  # sine-cosine tables stay
    check_gradients(model, (pixels, noise, k))


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (224, 224)])
def test_boxes_against_a_loop(size):
    (H, W), noise, area = size, torch.rand(200, 64, dtype=torch.float64), math.prod(size) / 2
    low, high = max(0.3, area / W**2), min(1 / 0.3, H**2 / area)  # height over width of boxes that fit
    for mask, (u, v, w) in zip(cim_pixels.erased_boxes(noise, size), noise[:, :3].tolist(), strict=True):
        aspect, expected = low * (high / low) ** u, torch.zeros(1, H, W, dtype=torch.bool)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = int(v * (H - height + 1)), int(w * (W - width + 1))
        expected[:, top : top + height, left : left + width] = True
        assert torch.equal(mask, expected) and abs(mask.float().mean() - 0.5) < 0.05


def test_the_loss_is_that_of_the_erased_pixels():
    model, (pixels, *rest) = build(generator="erase")
    loss, _, (corrupted, mask, _) = twice(model, (pixels, *rest))
    assert torch.equal(corrupted != pixels, mask.expand_as(pixels))
    mean, deviation = cim_pixels.pixel_statistics(pixels * 2 - 1, model.cfg)
    error = model.enhancer(corrupted * 2 - 1) - (pixels * 2 - 1 - mean) / deviation
    expected = [abs(e) + e * e for e in error[mask.expand_as(pixels)].tolist()]
    assert loss.item() == pytest.approx(10 * sum(expected) / len(expected), rel=1e-4)
    check_gradients(model, (pixels, *rest))


def test_settings_that_cannot_be_are_refused():
    for values in ({"num_masked": (5, 6)}, {"num_masked": (128, 128)}, {"generator_depth": 9},
                   {"generator": "erase", "generator_init": "file"}, {"freeze_generator": True},
                   {"enhancer": "resnet50", "img_size": (40, 64)}):
        with pytest.raises(ValueError, match="--(num_masked|generator|freeze|img_size)"):
            build(**values)


def test_runs_start_from_an_mae_of_raw_pixels_and_go_on_where_they_were_killed(tmp_path, small_npz):
    command = [*QUICK, "--data", small_npz, "--out"]
    size = ["--img_size", 25, "--patch_size", 5, "--decoder_embed_dim", 128, "--decoder_num_heads", 4]
    run_script(["mae_mff.py", *command, "raw", *size, "--fuse_layers", 3], tmp_path)
    command, cut = ["cim_pixels.py", "--save_minutes", 0, *command], tmp_path / "cut"
    for out, flags in (("mae", ["--generator_init", "raw/last.pth", "--freeze_generator"]),
                       ("erase", ["--generator", "erase", "--enhancer", "resnet50"])):
        run_script([*command, out, *flags], tmp_path)
        killed(tmp_path, [*command, "cut", *flags], "self.step == 2")
        run_script([*command, "cut", *flags, "--resume", "--pictures", 2], tmp_path)
        assert len(losses(cut)) == 2 and losses(tmp_path / out) == losses(cut)
        first, second = (torch.load(path / "last.pth")["model"] for path in (tmp_path / out, cut))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        run_script([command[0], "--draw", "cut/last.pth", "--out", f"{out}.png"], tmp_path)
        assert (cut.rename(tmp_path / f"cut_{out}") / "pictures/epoch_0001.png").exists()
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pth")
    refused = run_script([*command, "no", "--generator_init", "other.pth"], tmp_path, expect=2)
    assert "does not say that it predicts raw pixels" in refused and refused.count("\n") == 1
