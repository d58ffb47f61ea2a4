"""Labelled data as people have it: folders of other names, lists, shares that are held out."""

import os
import shlex
import shutil

import numpy as np
import pytest
from conftest import run_script
from PIL import Image

from common import UserError, open_data
from finetune import Config
from sources import open_labelled


def config(data, **values):
    return Config(data=str(data), weights="none", img_size=(32, 32), **values)


def names(source):
    return [os.path.basename(source.name(i)) for i in range(len(source))]


@pytest.fixture
def photos(tmp_path):
    """photos/CLASS/n.png: cat 10, dog 5, fox 1; an image's grey level is its class's and number's."""
    for kind, n in (("cat", 10), ("dog", 5), ("fox", 1)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(n):
            image = np.full((40, 48, 3), 10 * i + (kind == "dog"), np.uint8)
            Image.fromarray(image).save(tmp_path / f"photos/{kind}/{i}.png")
    return tmp_path / "photos"


def test_a_share_of_each_class_is_held_out_the_same_in_every_run(photos, capsys):
    first = open_labelled(config(photos, val_split=0.2))
    held, trained = set(map(first["val"].name, range(3))), set(map(first["train"].name, range(13)))
    assert len(first["val"]) == 3 and len(first["train"]) == 13 and not held & trained
    assert sorted(first["val"].labels) == [0, 0, 1] and "1 classes have one image" in capsys.readouterr().out
    second = open_labelled(config(photos, val_split=0.2, seed=5))["val"]
    assert {second.name(i) for i in range(3)} == held
    image, label = first["val"].read(2)  # the label is the image's own
    assert label == 1 and image[0, 0, 0] % 10 == 1
    photos.rename(photos.parent / "moved")  # not where they are, but what they are called
    moved = open_labelled(config(photos.parent / "moved", val_split=0.2))["val"]
    assert names(moved) == names(first["val"])
    more = open_labelled(config(photos.parent / "moved", val_split=0.5))["val"]
    assert {more.name(i) for i in range(len(more))} > {moved.name(i) for i in range(3)}


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_held_out_folders_of_other_names(photos, tmp_path, name, capsys):
    root = tmp_path / "root"
    root.mkdir()
    photos.rename(root / "train")
    (root / name).mkdir()
    (root / "train/dog").rename(root / name / "dog")
    (root / "train/dog").symlink_to(root / name / "dog")
    sets = open_labelled(config(root))
    assert len(sets["train"]) == 16 and len(sets["val"]) == 5 and set(sets["val"].labels) == {1}
    assert sets["val"].classes == sets["train"].classes
    assert f"held out: {root / name}" in capsys.readouterr().out
    assert len(open_data(config(root))) == 16
    elsewhere = open_labelled(config(root / "train", val=str(root / name)))
    assert names(elsewhere["val"]) == names(sets["val"])


@pytest.mark.parametrize("file, text", [
    ("list.csv", "{0}cat/0.png,9\n{0}cat/1.png,9\n{0}dog/0.png,10\n{0}dog/1.png,10\n"),
    ("list.csv", "\ufefffile,extra,label\r\n{0}cat/0.png,7,cat\r\n{0}cat/1.png,7,cat\r\n"
                 "{0}dog/0.png,7,dog\r\n{0}dog/1.png,8,dog\r\n"),
    ("list.csv", "{0}cat/0.png; cat\n\"{0}cat/1.png\";cat\n{0}dog/0.png;dog\n{0}dog/1.png;dog\n"),
    ("list.txt", "{0}cat/0.png,cat\n{0}cat/1.png\tcat\n{0}dog/0.png,dog\n{0}dog/1.png,dog\n"
                 "{0}dog/1.png,dog\n"),
])
def test_lists_with_labels(photos, tmp_path, file, text):
    (tmp_path / file).write_text(text.format("photos/"))
    source = open_data(config(tmp_path / file))
    numbers = ",9" in text  # sorted as such
    assert source.classes == (["9", "10"] if numbers else ["cat", "dog"])
    assert source.labels.tolist() == [0, 0, 1, 1] and source.read(3)[0][0, 0, 0] == 11
    sets = open_labelled(config(tmp_path / file, val_split=0.5))
    assert sorted(sets["train"].labels) == sorted(sets["val"].labels) == [0, 1]
    (tmp_path / "val.csv").write_text(f"photos/dog/4.png,{10 if numbers else 'dog'}\n")
    other = open_labelled(config(tmp_path / file, val=str(tmp_path / "val.csv")))
    assert len(other["train"]) == 4 and other["val"].labels.tolist() == [1]


@pytest.mark.parametrize("data, flags, words", [
    ("photos", {}, "no train/.*--val_split"), ("photos/cat", {"val_split": 0.2}, "no labels"),
    ("4 paths, 3 with a label", {"val_split": 0.5}, "4 paths, 3 with a label"),
    ("two labels", {"val_split": 0.5}, "two labels"), ("0 paths", {"val_split": 0.5}, "0 paths"),
    ("bird", {"val": "photos"}, "is no class"), ("shapes", {"val_split": 0.5}, "itself"),
])
def test_what_has_no_labels_or_cannot_be_held_out(photos, tmp_path, monkeypatch, data, flags, words):
    monkeypatch.chdir(tmp_path)
    lists = {"4 paths, 3 with a label": "cat/0.png,cat\ncat/1.png,cat\ncat/2.png\ndog/0.png,dog\n",
             "two labels": "cat/0.png,cat\ncat/0.png,dog\n", "0 paths": "", "bird": "cat/0.png,bird\n"}
    if data in lists:
        (photos / f"{data}.csv").write_text(lists[data])
        data = photos / f"{data}.csv"
    with pytest.raises(UserError, match=words):
        open_labelled(config(data, **flags))


@pytest.mark.parametrize("kind", ["classes", "flat"])
def test_the_next_command_fits_the_data_and_can_be_pasted(photos, tmp_path, kind):
    """In a folder whose name has a blank and a quotation mark."""
    root = tmp_path / "it's mine"
    shutil.rmtree(photos / "fox")
    shutil.copytree(photos / "cat" if kind == "flat" else photos, root / "photos")
    words = ["mae_mff.py", "--data", root / "photos", "--out", root / "run"]
    words += shlex.split("--model nano --img_size 32 --patch_size 8 --epochs 3 --batch_size 5 --workers 0")
    output, again = run_script(words, tmp_path), run_script([*words, "--resume"], tmp_path)
    assert again.split("next:\n")[1] == output.split("next:\n")[1]  # of a run that is done
    commands = list(map(shlex.split, output.split("next:\n")[1].splitlines()))
    assert len(commands) == (2 if kind == "flat" else 1)
    extra = shlex.split("--epochs 1 --warmup_epochs 0 --batch_size 4 --workers 0") * (kind == "classes")
    for python, *command in commands:
        assert python == "python" and ("--val_split" in command) == (kind == "classes")
        run_script([*command, *extra], tmp_path)
    assert (root / "run_finetune/best.pth").exists() == (kind == "classes")
