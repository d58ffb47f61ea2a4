"""Images in tars: the same as in a folder, whatever the layout; what is damaged is named."""

import io
import os
import tarfile
import time

import numpy as np
import pytest
import torch
from commands import SCRIPTS
from conftest import losses, run_script, stopped
from PIL import Image
from torture import log

import common
import finetune
import shards

MAE = SCRIPTS["mae_mff.py"]


def picture(i):
    pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_tar(path, files):
    """files: {name: bytes}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def in_folders(n=40):
    return {f"set/class{i % 2}/{i:02}.png": picture(i) for i in range(n)}


def opened(data, *flags):
    flags = ["--data", str(data), "--weights", "none", "--mode", "knn", *flags]
    return common.open_data(common.parse_config(finetune.Config, finetune.presets, flags), "all")


def one_tar(root):
    return write_tar(root / "all.tar", {"set/": b"", "set/read.me": b"x"} | in_folders())


def webdataset(root):
    for start in (0, 20):
        files = {}
        for i in range(start, start + 20):
            files |= {f"{i:06}.png": picture(i), f"{i:06}.cls": b"%d\n" % (5 * (i % 2) + 5)}
        write_tar(root / f"train-{start:04}.tar", files)
    return root / "train-*.tar"


def tar_of_tars(root):
    inner = {f"class{kind}.tar": write_tar(root / f"{kind}/x", {
        f"class{kind}_{i:02}.png": picture(i) for i in range(kind, 40, 2)}).read_bytes() for kind in (0, 1)}
    return write_tar(root / "imagenet.tar", inner)


def folder_of_tars(root):
    for kind in (0, 1):
        files = {name: x for name, x in in_folders().items() if f"class{kind}" in name}
        write_tar(root / f"{kind}.tar", files)
    return root


@pytest.mark.parametrize("layout", [one_tar, webdataset, tar_of_tars, folder_of_tars])
def test_images_and_classes_of_every_layout(tmp_path, capsys, monkeypatch, layout):
    data = layout(tmp_path / "data")
    source = opened(data)
    assert len(source) == 40 and len(source.classes) == 2
    assert source.classes == (["5", "10"] if layout is webdataset else ["class0", "class1"])
    names = [source.name(i) for i in range(40)]
    assert len(set(names)) == 40 and all(".tar/" in name for name in names)
    for i, name in enumerate(names):
        number = int(name.rpartition("/")[2].split(".")[0].split("_")[-1])
        image, label = source.read(i)
        expected = common.decode_image(bytearray(picture(number)), "x.png", 3, True)
        assert torch.equal(image, expected) and label == number % 2
    assert ("2 other files" in capsys.readouterr().out) == (layout is one_tar)
    monkeypatch.setattr(shards, "build_index", None)  # the list is there
    assert opened(data).classes == source.classes


def test_the_list_is_made_anew_for_other_tars_and_needs_no_place(tmp_path):
    path = one_tar(tmp_path)
    assert len(opened(path)) == 40
    listing, = tmp_path.glob(".list_of_*.npz")
    listing.write_bytes(listing.read_bytes()[:500])  # damaged
    assert len(opened(path)) == 40
    write_tar(path, in_folders(20))
    os.utime(path, (time.time() + 9, time.time() + 9))
    assert len(opened(path)) == 20
    listing.unlink()
    listing.mkdir()  # may not be written
    assert len(opened(path)) == 20


def test_what_is_damaged_is_named_and_the_rest_is_read(tmp_path, capsys):
    whole = one_tar(tmp_path).read_bytes()
    last = whole.rindex(b"set/class1/39.png")  # its header
    cut, torn = tmp_path / "cut.tar", tmp_path / "torn.tar"
    cut.write_bytes(whole[: last + 700])  # inside of the last image
    torn.write_bytes(whole[:last] + b"\xff" * 512 + whole[last + 512 :])
    for path in (cut, torn):
        assert len(opened(path)) == 39 and f"{path} is damaged after" in capsys.readouterr().out
    spoiled = tmp_path / "spoiled.tar"
    spoiled.write_bytes(whole[: last + 512] + b"\xff" * 100 + whole[last + 612 :])
    source = opened(spoiled)
    with pytest.raises(Exception, match="."):
        source.read(39)
    samples = common.KeyedSamples(source, common.EvalCrop((8, 8)), 0, 2)
    (name, _), = samples[0, 39]["bad"]
    assert name == f"{spoiled}/set/class1/39.png"


def test_names_with_brackets_and_what_is_refused(tmp_path):
    assert len(opened(one_tar(tmp_path / "a[1]"))) == 40 and len(opened(tmp_path / "a[1]")) == 40
    (tmp_path / "a[1]/photo.png").write_bytes(picture(0))  # then the tar is a stray one
    assert len(opened(tmp_path / "a[1]")) == 1
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(common.UserError, match="compressed"):
        opened(tmp_path / "x.tar.gz")
    with pytest.raises(common.UserError, match="no image in"):
        opened(write_tar(tmp_path / "x.tar", {"read.me": b"x"}))


def test_training_on_tars_equals_training_on_the_folder_and_resumes(folder, tmp_path):
    names = sorted(folder.rglob("*.png"))
    write_tar(tmp_path / "tars/all.tar", {f"images/{x.relative_to(folder)}": x.read_bytes() for x in names})
    command = [*MAE, "--batch_size", 10, "--epochs", 2]
    run_script([*command, "--data", folder, "--out", "folder"], tmp_path)
    command += ["--data", "tars", "--out", "tar", "--workers", 2]
    stopped(tmp_path, command, "self.step == 4", processes=2)
    run_script([*command, "--resume"], tmp_path)
    assert losses(tmp_path / "folder") == pytest.approx(losses(tmp_path / "tar"), rel=1e-5)
    command = ["finetune.py", "--mode", "knn", "--weights", "tar/encoder.pth", "--val_split", 0.2, "--data"]
    run_script([*command, "tars/all.tar", "--out", "knn"], tmp_path)
    assert log(tmp_path / "knn")[-1]["eval/n"] == 8
