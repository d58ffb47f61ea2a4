"""A finished model.pth: what --predict writes gives the scores of --mode evaluate; boxes without masks."""

import json
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image
from pycocotools import mask as rle
from test_transfer import RGB, scenes, scores_of, target_of  # noqa: F401  (a fixture)
from torchvision.ops import box_iou

import coco
import common
import predict_scenes
import transfer_data as data
import transfer_mask2former as m2f
import transfer_seg_det as transfer


def write_model(folder, source, script, *flags):
    """A model.pth with fresh weights, as a run on `source` would leave it."""
    small = "--weights none --model nano --img_size 64 --patch_size 16 --channels 32 --data x"
    cfg = common.parse_config(script.Config, script.presets, [*small.split(), *flags])
    model = script.make_model(cfg, len(source.classes), source.det and source.masks)
    run = types.SimpleNamespace(cfg=cfg, method=script.__name__, epoch=1.0)
    meta = common.Run.meta(run, **transfer.about(cfg, source))
    torch.save({"model": model.state_dict(), "meta": meta}, folder / "model.pth")


@pytest.mark.parametrize("script, layout", [
    (transfer, "zero_is_ignore"), (transfer, "colours"), (m2f, "colours")])
def test_predicted_maps_have_the_miou_of_the_evaluation(scenes, tmp_path, script, layout):  # noqa: F811
    shutil.copytree(scenes / "ade", tmp_path / "ade")
    flags = ["--zero_is_ignore"] if layout == "zero_is_ignore" else []
    if layout == "colours":
        names = (tmp_path / "ade/classes.txt").read_text().splitlines()
        colours = np.random.default_rng(0).integers(0, 256, (len(names), 3), dtype=np.uint8)
        lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(names, colours, strict=True)]
        (tmp_path / "ade/classes.txt").write_text("\n".join(lines))
        for path in (tmp_path / "ade/annotations").rglob("*.png"):
            Image.fromarray(colours[np.array(Image.open(path))]).save(path)
    cfg = types.SimpleNamespace(**vars(RGB) | {"zero_is_ignore": bool(flags)})
    source = data.LabelMaps(tmp_path / "ade", "val", cfg)
    write_model(tmp_path, source, script, *flags)
    command = [f"{script.__name__}.py", "--amp", "off", "--workers", 0, "--weights", "model.pth"]
    run_script([*command, "--mode", "evaluate", "--data", "ade", "--out", "run"], tmp_path)
    matrix = np.genfromtxt(tmp_path / "run/confusion.csv", delimiter=",")[1:, 1:]
    (tmp_path / "ade/images/validation/broken.jpg").write_bytes(b"x")
    output = run_script([*command, "--predict", "ade/images/validation"], tmp_path, processes=2)
    assert "broken.jpg" in output and "left out: 1" in output
    assert len(list((tmp_path / "predictions/pictures").rglob("*.png"))) == len(source)
    (tmp_path / "ade/images/validation/broken.jpg").unlink()
    shutil.rmtree(tmp_path / "ade/annotations/validation")
    shutil.copytree(tmp_path / "predictions/labels", tmp_path / "ade/annotations/validation")
    predicted, truth = (data.LabelMaps(root / "ade", "val", cfg) for root in (tmp_path, scenes))
    total = sum(transfer.confusion(predicted.read(i)[1].long(), truth.read(i)[1], len(truth.classes))
                for i in range(len(truth)))
    for counts in (torch.from_numpy(matrix), total):
        miou = transfer.seg_scores(counts, truth.classes)["eval/miou"]
        assert miou == pytest.approx(scores_of(tmp_path / "run")["eval/miou"], abs=1e-3)


def remove_masks(folder):
    for path in (folder / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry.pop("segmentation")
        path.write_text(json.dumps(content))


def nearly(target, seed):
    """Detections that are a few pixels off, one in five of another class."""
    rng = torch.Generator().manual_seed(seed)
    n = len(target["boxes"])
    boxes = (target["boxes"] + 4 * torch.rand(n, 4, generator=rng)).clamp(min=0)
    labels = torch.where(torch.rand(n, generator=rng) < 0.2, 1, target["labels"])
    return {"boxes": boxes, "labels": labels, "scores": torch.rand(n, generator=rng),
            **({"masks": target["masks"][:, None].float()} if "masks" in target else {})}


@pytest.mark.parametrize("masks", [True, False])
def test_written_results_have_the_ap_of_the_evaluation(scenes, tmp_path, monkeypatch, masks):  # noqa: F811
    shutil.copytree(scenes / "coco", tmp_path / "coco")
    if not masks:
        remove_masks(tmp_path / "coco")
    source = coco.CocoScenes(tmp_path / "coco", "val", RGB)
    answers = {int(image.sum()): nearly(target, i) for i, (image, target) in
               enumerate(source.read(i) for i in range(len(source)))}
    monkeypatch.setattr(transfer, "predict", lambda model, batch, run: answers[int(batch["image"].sum())])
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path, source, transfer, "--task", "det")
    for flags in ("--mode evaluate --data coco --out run", "--predict coco/images/val2017"):
        flags += " --weights model.pth --amp off --workers 0"
        cfg = common.parse_config(transfer.Config, transfer.presets, flags.split())
        transfer.train(cfg, common.Run(cfg, "transfer_seg_det"))
    scores = scores_of(tmp_path / "run")
    results = json.loads((tmp_path / "predictions/results.json").read_text())
    found = coco.average_precision(coco.coco_truth(source), results, source.ids)
    assert 5 < scores["eval/box_ap"] < 95 and ("eval/mask_ap" in scores) == masks
    assert found == {name: pytest.approx(scores[name], abs=1e-3) for name in found}
    listed = json.loads((tmp_path / "predictions/images.json").read_text())
    assert {image["id"] for image in listed["images"]} == set(source.ids)
    assert {entry["category_id"] for entry in results} <= {entry["id"] for entry in listed["categories"]}
    if masks:
        assert rle.decode(results[0]["segmentation"]).any()


def test_a_detector_learns_from_boxes_alone(scenes, tmp_path):  # noqa: F811
    shutil.copytree(scenes / "coco", tmp_path / "coco")
    remove_masks(tmp_path / "coco")
    flags = ("--task det --data coco --weights none --model nano --img_size 64 --patch_size 16 --channels 16 "
             "--iters 2 --batch_size 2 --pictures 2 --amp off --workers 0 --out run")
    assert "boxes alone" in run_script(["transfer_seg_det.py", *flags.split()], tmp_path)
    assert {"eval/box_ap", "eval/mask_ap"} & scores_of(tmp_path / "run").keys() == {"eval/box_ap"}


def test_boxes_follow_their_image_as_masks_do():
    """On rectangles whose masks are exact, boxes_left and the way over masks agree to a pixel's rounding."""
    cfg = types.SimpleNamespace(img_size=(64, 64), jitter=(0.5, 2.0), mean=(0.5,) * 3)
    target = target_of([[8, 4, 40, 30], [50, 20, 58, 44]], [1, 2], (48, 64))
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    for seed in range(50):
        torch.manual_seed(seed)
        _, by_mask = data.large_scale_jitter(image, target, cfg)
        torch.manual_seed(seed)
        _, by_box = data.large_scale_jitter(image, {k: x for k, x in target.items() if k != "masks"}, cfg)
        for kind in by_box["labels"].tolist():
            one, two = (t["boxes"][t["labels"] == kind] for t in (by_mask, by_box))
            assert (one - two).abs().max() <= 1.01 and box_iou(one, two).max() > 0.3
        assert set(by_box["labels"].tolist()) <= set(by_mask["labels"].tolist())


def test_a_file_that_is_no_finished_model_is_refused(tmp_path):
    meta = {"method": "mae_mff", "model": "nano"}
    torch.save({"model": {"x": torch.zeros(1)}, "meta": meta}, tmp_path / "e.pth")
    command = ["transfer_seg_det.py", "--predict", "x.png", "--weights", "e.pth"]
    assert "model.pth of this script, not a file of mae_mff.py" in run_script(command, tmp_path, expect=2)


def test_names_and_ids():
    def source(*names):
        return common.ImageFiles(names, [-1] * len(names), None, 3)

    names = predict_scenes.names_of(source("p/a/7.jpg", "p/a/7.png", "p/9.webp"))
    assert [*map(str, names)] == ["a/7.png", "a/7.png.png", "9.png"]
    for names, ids in ((("a/0012.jpg", "b/7.jpg"), [12, 7]), (("a/7.jpg", "b/7.jpg"), [1, 2])):
        assert predict_scenes.image_ids(source(*names)) == ids
