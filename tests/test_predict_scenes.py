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
from test_transfer import RGB, config, scenes, target_of  # noqa: F401  (a fixture)
from torchvision.ops import box_iou
from torture import log

import coco
import common
import predict_scenes
import transfer_data as data
import transfer_seg_det as transfer


def write_model(folder, task, source, *flags):
    """A model.pth with fresh weights, as a run on `source` would leave it."""
    small = "--weights none --model nano --img_size 64 --patch_size 16 --channels 16 --data x"
    cfg = config(*small.split(), "--task", task, *flags)
    masks = task == "det" and source.masks
    model = transfer.make_model(cfg, len(source.classes), masks)
    run = types.SimpleNamespace(cfg=cfg, method="transfer_seg_det", epoch=1.0)
    meta = common.Run.meta(run, **transfer.about(cfg, source))
    torch.save({"model": model.state_dict(), "meta": meta}, folder / "model.pth")
    return folder / "model.pth"


def go(folder, command, **how):
    words = ["transfer_seg_det.py", *command.split(), "--amp", "off", "--workers", "0"]
    return run_script(words, folder, **how)


@pytest.mark.parametrize("layout", ["zero_is_ignore", "colours"])
def test_predicted_maps_have_the_miou_of_the_evaluation(scenes, tmp_path, layout):  # noqa: F811
    shutil.copytree(scenes / "ade", tmp_path / "ade")
    flags = "--zero_is_ignore" if layout == "zero_is_ignore" else ""
    if layout == "colours":
        names = (tmp_path / "ade/classes.txt").read_text().splitlines()
        colours = np.random.default_rng(0).integers(0, 256, (len(names), 3), dtype=np.uint8)
        lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(names, colours, strict=True)]
        (tmp_path / "ade/classes.txt").write_text("\n".join(lines))
        for path in (tmp_path / "ade/annotations").rglob("*.png"):
            Image.fromarray(colours[np.array(Image.open(path))]).save(path)
    cfg = types.SimpleNamespace(**vars(RGB) | {"zero_is_ignore": bool(flags)})
    source = data.LabelMaps(tmp_path / "ade", "val", cfg)
    write_model(tmp_path, "seg", source, *flags.split())
    output = go(tmp_path, "--mode evaluate --weights model.pth --data ade")
    scores = log(tmp_path / "runs/transfer_seg_evaluate")[-1]
    matrix = np.genfromtxt(tmp_path / "runs/transfer_seg_evaluate/confusion.csv", delimiter=",")[1:, 1:]
    assert transfer.seg_scores(torch.from_numpy(matrix), source.classes)["eval/miou"] == pytest.approx(
        scores["eval/miou"], abs=1e-3), output
    go(tmp_path, "--predict ade/images/validation --weights model.pth", processes=2)
    shutil.rmtree(tmp_path / "ade/annotations/validation")
    shutil.copytree(tmp_path / "predictions/labels", tmp_path / "ade/annotations/validation")
    predicted, total = data.LabelMaps(tmp_path / "ade", "val", cfg), 0
    truth = data.LabelMaps(scenes / "ade", "val", cfg)
    for i in range(len(truth)):
        answer = predicted.read(i)[1].long()
        total = total + transfer.confusion(answer, truth.read(i)[1], len(truth.classes))
    miou = transfer.seg_scores(total, truth.classes)["eval/miou"]
    assert miou == pytest.approx(scores["eval/miou"], abs=1e-3)
    sizes = [Image.open(path).size for path in (tmp_path / "predictions/pictures").rglob("*.png")]
    assert len(sizes) == len(source) and min(min(size) for size in sizes) >= 256


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
    path = tmp_path / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    for image in content["images"]:  # ids as COCO has them: the files' numbers
        old, image["id"] = image["id"], int(image["file_name"].removesuffix(".png")) + 1000
        (tmp_path / "coco/images/val2017" / image["file_name"]).rename(
            tmp_path / f"coco/images/val2017/{image['id']:012}.png")
        image["file_name"] = f"{image['id']:012}.png"
        for entry in content["annotations"]:
            entry["image_id"] = image["id"] if entry["image_id"] == old else entry["image_id"]
    if not masks:
        for entry in content["annotations"]:
            entry.pop("segmentation")
    path.write_text(json.dumps(content))
    source = coco.CocoScenes(tmp_path / "coco", "val", RGB)
    assert source.masks == masks
    answers = {int(image.sum()): nearly(target, i) for i, (image, target) in
               enumerate(source.read(i) for i in range(len(source)))}
    monkeypatch.setattr(transfer, "predict", lambda model, batch, run: answers[int(batch["image"].sum())])
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path, "det", source)
    common_flags = ["--weights", "model.pth", "--amp", "off", "--workers", 0]
    for flags in (["--mode", "evaluate", "--data", "coco"], ["--predict", "coco/images/val2017"]):
        cfg = config(*flags, *common_flags)
        transfer.train(cfg, common.Run(cfg, "transfer_seg_det"))
    scores = log(tmp_path / "runs/transfer_det_evaluate")[-1]
    results = json.loads((tmp_path / "predictions/results.json").read_text())
    found = coco.average_precision(coco.coco_truth(source), results, source.ids)
    assert 5 < scores["eval/box_ap"] < 95 and ("eval/mask_ap" in scores) == masks
    for name, value in found.items():
        assert value == pytest.approx(scores[name], abs=1e-3)
    listed = json.loads((tmp_path / "predictions/images.json").read_text())
    assert {image["id"] for image in listed["images"]} == set(source.ids)
    assert {entry["category_id"] for entry in results} <= {entry["id"] for entry in listed["categories"]}
    if masks:
        assert rle.decode(results[0]["segmentation"]).any()


@pytest.mark.parametrize("detector, masks", [("mask_rcnn", False), ("cascade", True)])
def test_detectors_train_evaluate_and_predict(scenes, tmp_path, detector, masks):  # noqa: F811
    shutil.copytree(scenes / "coco", tmp_path / "coco")
    for path in () if masks else (tmp_path / "coco/annotations").glob("*.json"):
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry.pop("segmentation")
        path.write_text(json.dumps(content))
    flags = ("--task det --data coco --weights none --model nano --img_size 64 --patch_size 16 --channels 16 "
             "--iters 2 --batch_size 2 --warmup_iters 1 --pictures 2 --out run")
    output = go(tmp_path, f"{flags} --detector {detector}")
    assert ("boxes alone" in output) != masks
    scores = log(tmp_path / "run")[-1]
    assert "eval/box_ap" in scores and ("eval/mask_ap" in scores) == masks
    go(tmp_path, "--mode evaluate --weights run/model.pth --data coco --out again")
    assert {name: x for name, x in log(tmp_path / "again")[-1].items() if "eval/" in name} == {
        name: x for name, x in scores.items() if "eval/" in name}
    (tmp_path / "coco/images/val2017/broken.jpg").write_bytes(b"x")
    output = go(tmp_path, "--predict coco/images/val2017 --weights run/model.pth")
    assert "broken.jpg" in output and "left out: 1" in output
    assert len(list((tmp_path / "predictions/pictures").glob("*.png"))) == 5


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
    assert "expected a finished model.pth" in go(tmp_path, "--predict x.png --weights e.pth", expect=2)


def test_names_and_ids():
    names = [*map(str, predict_scenes.names_of(Names("p/a/7.jpg", "p/a/7.png", "p/9.webp", "p/x.npz[3]")))]
    assert names[0] == "a/7.png" and names[2:] == ["9.png", "x.npz[3].png"] and len(set(names)) == 4
    assert predict_scenes.image_ids(Names("a/0012.jpg", "b/7.jpg")) == [12, 7]
    assert predict_scenes.image_ids(Names("a/7.jpg", "b/7.jpg")) == [1, 2]
    assert predict_scenes.image_ids(Names("a/x.jpg", "b/7.jpg")) == [1, 2]


class Names:
    def __init__(self, *names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]
