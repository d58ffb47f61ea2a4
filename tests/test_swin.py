"""torchvision's Swin as an encoder: read-outs, layers of the decay, fine-tuning, dense tasks."""

import pytest
import torch
from conftest import run_script
from test_transfer import scenes  # noqa: F401  (a fixture)
from torchvision.models import SwinTransformer
from torture import log

import backbones
import common
import finetune
import swin
import transfer_seg_det as transfer


@pytest.fixture(scope="module")
def theirs():
    width, depths, heads = swin.SIZES["nano"]
    return SwinTransformer([4, 4], width, list(depths), list(heads), [2, 2], num_classes=5).eval()


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    """As vision_electra_simmim.py writes it."""
    path = tmp_path_factory.mktemp("swin") / "encoder.pth"
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("head.")}
    meta = {"method": "vision_electra_simmim", "model": "swin_nano", "patch_size": 4, "swin_window": 2,
            "in_chans": 3, "img_size": (32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    torch.save({"model": weights, "meta": meta}, path)
    return path


def parsed(script, *words):
    return common.parse_config(script.Config, script.presets, [*map(str, words)])


def test_a_classifier_is_torchvisions(theirs, file, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    words = ["--data", "shapes", "--weights", file, "--mode"]
    cfg = parsed(finetune, *words, "finetune", "--drop_path", 0)
    model = finetune.load_model(cfg, 5).eval()
    assert model.state_dict().keys() == theirs.state_dict().keys()
    model.load_state_dict(theirs.state_dict())
    for size in (32, 40):  # windows do not tile the second
        images = torch.randn(2, 3, size, size)
        torch.testing.assert_close(model(images), theirs(images))
    assert finetune.load_model(parsed(finetune, *words, "knn"), 5).head(images) is images


def test_layers_of_the_decay_are_simmims():
    model = swin.Swin("base", 4, 6)
    depths, expected = (2, 2, 18, 2), {"features.0.0.weight": 0, "norm.weight": 25}
    for stage, depth in enumerate(depths):
        before = sum(depths[:stage])
        for block in range(depth):
            expected[f"features.{2 * stage + 1}.{block}.attn.qkv.weight"] = before + block + 1
        if stage < 3:
            expected[f"features.{2 * stage + 2}.reduction.weight"] = before + depth
    names = model.state_dict().keys()
    assert expected.keys() <= names and {name: model.layer_id(name) for name in expected} == expected


def test_finetune_takes_it_and_predicts(file, small_npz, folder, tmp_path):
    words = ["--data", small_npz, "--weights", file, "--epochs", 0.2, "--batch_size", 25, "--out", "run"]
    assert "top-1" in run_script(["finetune.py", *words, "--warmup_epochs", 0], tmp_path)
    again = ["finetune.py", "--predict", folder, "--weights", "run/best.pth", "--out", "p.csv"]
    assert "p.csv: 40 images, seen at 32 x 32" in run_script(again, tmp_path)


@pytest.mark.parametrize("task", ["seg", "det"])
def test_dense_tasks_read_the_stages(task, file, scenes, tmp_path):  # noqa: F811
    """Four maps, each after a LayerNorm that is new; a short run and the use of its file."""
    cfg = transfer.Config(task=task, model="swin_nano", patch_size=4, swin_window=2, img_size=(64, 64),
                          weights="none")
    encoder = backbones.make_encoder(cfg).eval()
    with torch.no_grad():
        for norm in encoder.norms:
            norm.weight.uniform_(0.5, 2)
    images = torch.randn(1, 3, 72, 64)
    x, found = images, encoder(images)
    for i, stage in enumerate(encoder.features):
        x = stage(x)
        if i % 2:
            stride, width = encoder.strides[i // 2], encoder.channels[i // 2]
            torch.testing.assert_close(found[i // 2], encoder.norms[i // 2](x).permute(0, 3, 1, 2))
            assert found[i // 2].shape == (1, width, -(-72 // stride), -(-64 // stride))
    words = ["--task", task, "--demo", "--amp", "off", "--workers", 0, "--weights", file, "--iters", 2,
             "--batch_size", 2, "--warmup_iters", 0, "--channels", 8, "--pictures", 0, "--eval_every", 2]
    words += ["--data", scenes / "ade"] if task == "seg" else ["--data", scenes / "coco", "--rois", 8]
    output = run_script(["transfer_seg_det.py", *words, "--out", "run"], tmp_path)
    assert "tensors loaded; missing: norms" in output
    assert ("eval/miou" if task == "seg" else "eval/box_ap") in str(log(tmp_path / "run")[-1])
