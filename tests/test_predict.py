"""Finished files: --predict agrees with --mode evaluate, and that with the evaluation in training."""

import csv
import os

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image
from torchvision.models import resnet50
from torture import log

from backbones import make_classifier
from common import UserError, parse_config
from finetune import Config, presets
from predict import load_finished, open_evaluated
from shapes import Shapes


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def go(folder, command, **how):
    return run_script(command.split(), folder, **how)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """photos/CLASS/n.png, 15 of each of six classes, and what a run on them with --val_split 0.2 leaves."""
    root, source = tmp_path_factory.mktemp("predict"), Shapes((40, 48), 3, n=400)
    for i in range(len(source)):
        image, label = source.read(i)
        folder = root / "photos" / source.classes[label]
        if label < 6 and len(os.listdir(folder) if folder.exists() else []) < 15:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    flags = "--model nano --img_size 32 --patch_size 8 --epochs 3 --warmup_epochs 1 --amp off --workers 1"
    data = "--weights none --data photos --val_split 0.2"
    run_script(["finetune.py", *data.split(), *flags.split()], root)
    return root


def test_evaluate_gives_the_scores_of_the_training_and_predict_the_same_answers(photos):
    best = torch.load(photos / "runs/finetune/best.pth")["meta"]
    evaluation = "finetune.py --mode evaluate --weights runs/finetune/best.pth --data photos --amp off"
    output = go(photos, f"{evaluation} --val_split 0.2")
    out = photos / "runs/finetune_evaluate"
    scores = log(out)[-1]
    for name in ("eval/top1", "eval/top5", "eval/macc", "eval/n"):
        assert scores[name] == best[name], output
    classes, confusion = table(out / "per_class.csv"), table(out / "confusion.csv")
    right = sum(int(line["right"]) for line in classes)
    assert round(100 * right / scores["eval/n"], 3) == scores["eval/top1"]
    for line, row in zip(classes, confusion, strict=True):
        assert row["class"] == line["class"] and int(row[line["class"]]) == int(line["right"])
        assert sum(int(n) for name, n in row.items() if name != "class") == int(line["images"])
    whole = go(photos, f"{evaluation} --out all", processes=2)
    (photos / "photos/broken.jpg").write_bytes(b"x")
    go(photos, "finetune.py --predict photos --weights runs/finetune/best.pth --amp off")
    lines = table(photos / "predictions.csv")
    hits = [os.path.basename(os.path.dirname(line["file"])) == line["class"] for line in lines]
    assert round(100 * np.mean(hits), 3) == log(photos / "all")[-1]["eval/top1"], whole
    for line in lines:
        shares = [float(line[name]) for name in line if name.startswith("probability")]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 1.001
    (photos / "photos/broken.jpg").unlink()


def test_predict_takes_an_image_and_a_list_and_names_what_it_cannot_read(photos):
    good = sorted((photos / "photos").rglob("*.png"))[:3]
    (photos / "broken.jpg").write_bytes(b"x")
    (photos / "list.txt").write_text("\n".join(map(str, [*good, "broken.jpg"])))
    encoder = torch.load(photos / "runs/finetune/best.pth")
    encoder["model"] = {name: x for name, x in encoder["model"].items() if not name.startswith("head.")}
    torch.save(encoder, photos / "encoder.pth")
    command = "finetune.py --weights runs/finetune/best.pth --predict"
    go(photos, f"{command} {good[0]} --out one.csv")
    output = go(photos, f"{command} list.txt --out list.csv")
    assert "unreadable: broken.jpg" in output and "left out: 1" in output
    one, several = table(photos / "one.csv"), table(photos / "list.csv")
    assert len(several) == 3 and list(one[0].values())[1:3] == list(several[0].values())[1:3]
    for more, words in (("list.txt --out list.csv", "new file"), ("broken.jpg --out none.csv", "can be read"),
                        ("list.txt --weights encoder.pth --out x.csv", "no classifier")):
        assert words in go(photos, f"{command} {more}", expect=2)


@pytest.mark.parametrize("kind", ["official", "token", "resnet", "probe"])
def test_classifiers_of_other_code_give_their_own_answers(kind, tmp_path):
    meta = {}
    if kind == "resnet":
        theirs = resnet50(num_classes=7)
    elif kind == "probe":
        flags = "--mode linear --weights none --model tiny --img_size 64"
        theirs = make_classifier(parse_config(Config, presets, flags.split()), 7)
        theirs.head[0].running_mean.normal_()
        meta = {"method": "finetune", "model": "tiny", "patch_size": 16, "img_size": (64, 64), "pool": "cls",
                "in_chans": 3, "classes": list("abcdefg")}
    else:
        timm = pytest.importorskip("timm")
        how = {"global_pool": "avg", "fc_norm": True} if kind == "official" else {"global_pool": "token"}
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, **how)
        torch.nn.init.normal_(theirs.head.weight)
    wrapped = {"model": theirs.state_dict()} | ({"meta": meta} if meta else {})
    torch.save(wrapped if kind in ("official", "probe") else theirs.state_dict(), tmp_path / "a.pth")
    flags = ["--mode", "evaluate", "--weights", str(tmp_path / "a.pth"), "--img_size", "64"]
    ours, classes, named = load_finished(parse_config(Config, presets, flags))
    assert len(classes) == 7 and named == (kind == "probe")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_classes_that_do_not_fit_are_refused(photos):
    flags = f"--mode evaluate --weights {photos}/runs/finetune/best.pth --data {photos}/photos"
    cfg = parse_config(Config, presets, flags.split())
    with pytest.raises(UserError, match="has 10; --data .* has 6"):
        open_evaluated(cfg, [str(i) for i in range(10)], named=False)
    with pytest.raises(UserError, match="is no class of"):
        open_evaluated(cfg, ["disc", "bird"], named=True)
