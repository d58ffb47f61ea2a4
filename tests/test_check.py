"""Files as people have them: odd names, types and tags; what is left out is counted; --check_data says it."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image, PngImagePlugin
from torchvision.transforms import v2

import common
from common import UserError, read_image
from sources import open_part

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def open_data(data, split="pretrain", classes=None, **values):
    cfg = common.RunConfig(data=str(data), img_size=(32, 32), **values)
    return open_part(cfg, cfg.data, split, classes) if split != "pretrain" else common.open_data(cfg)


def save(path, image=IMAGE, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **how)


# ---- which files are read


@pytest.mark.parametrize("suffix", ["jpg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "ppm"])
def test_every_format_that_is_named_is_read(tmp_path, suffix):
    kind = {"jpe": "jpeg", "jfif": "jpeg", "tif": "tiff", "jpg": "jpeg"}.get(suffix, suffix)
    if kind.upper() not in Image.registered_extensions().values():
        pytest.skip(f"Pillow was built without {kind}")
    save(tmp_path / f"a.{suffix}", np.full((40, 56, 3), 85, np.uint8), format=kind)
    source = open_data(tmp_path)
    assert len(source) == 1
    image, _ = source.read(0)
    assert image.shape == (3, 40, 56) and (image.int() - 85).abs().max() <= 3


def test_what_cannot_be_read_under_an_images_name_is_named_with_the_reason(tmp_path):
    for name in ("a.png", "folder.jpg/b.png", "scans.jpg"):
        save(tmp_path / "set" / name, **{"progressive": True} if name == "scans.jpg" else {})
    os.mkfifo(tmp_path / "set/pipe.jpg")
    (tmp_path / "set/loop.jpg").symlink_to("loop.jpg")
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    (tmp_path / "set/program.jpg").write_bytes(drawing)  # Pillow would run one that draws it
    jpeg = (tmp_path / "set/scans.jpg").read_bytes()
    last = jpeg.rindex(b"\xff\xda")
    (tmp_path / "set/scans.jpg").write_bytes(jpeg[:last] + jpeg[last:-2] * 300 + jpeg[-2:])
    (tmp_path / "set").rename(tmp_path / "photos.jpg")  # a folder is a folder, whatever its name
    source = open_data(tmp_path / "photos.jpg")
    samples = common.KeyedSamples(source, common.EvalCrop((32, 32)), 0, tries=1)
    bad = {os.path.basename(path): why for i in range(len(source)) for path, why in samples[0, i]["bad"]}
    for name, why in (("loop.jpg", "symbolic links"), ("pipe.jpg", "no regular file"), ("scans.jpg", "scans"),
                      ("program.jpg", "cannot identify")):
        assert why in bad.pop(name)
    assert len(source) == 6 and not bad


def test_a_file_that_takes_too_long_is_given_up():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="0.1 seconds"), common.time_limit(0.1):
        time.sleep(5)
    with common.time_limit(0.1):
        pass
    time.sleep(0.2)  # nothing comes after the end
    assert signal.getsignal(signal.SIGALRM) == before


def test_text_and_tags_do_not_make_sound_pixels_unreadable(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    save(tmp_path / "text.png", pnginfo=text)
    save(tmp_path / "short.png", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    save(tmp_path / "none.webp", exif=b"Exif\0\0nonsense")
    save(tmp_path / "odd.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\0")
    for path in tmp_path.iterdir():
        assert read_image(str(path), 3).shape == (3, 40, 56)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_tags_are_applied_or_ignored(tmp_path, orientation):
    tags = Image.Exif()
    tags[274] = orientation
    for name in ("a.png", "a.tif"):
        save(tmp_path / name, exif=tags)
    save(tmp_path / "a.jpg", exif=tags, quality=100, subsampling=0)
    # By definition: where the stored first row and first column belong.
    turned = {1: IMAGE, 2: IMAGE[:, ::-1], 3: IMAGE[::-1, ::-1], 4: IMAGE[::-1], 5: IMAGE.swapaxes(0, 1),
              6: np.rot90(IMAGE, -1), 7: np.rot90(IMAGE, 2).swapaxes(0, 1), 8: np.rot90(IMAGE)}[orientation]
    for exif, expected in (("auto", turned), ("apply", turned), ("ignore", IMAGE)):
        source = open_data(tmp_path, exif=exif)
        for i in range(3):
            image, _ = source.read(i)
            difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
            assert difference.mean() <= (2 if source.name(i).endswith("jpg") else 0)


# ---- values


@pytest.mark.parametrize("dtype, low, high, good", [
    (np.int16, -1024, 3071, False), (np.int16, 0, 3071, True), (np.int32, 0, 65535, True),
    (np.int32, 0, 70000, False), (np.float32, -3, 5, True), (np.float32, 0, np.nan, False),
])
@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_one_rule_for_values_of_all_formats(tmp_path, dtype, low, high, good, suffix):
    array = np.linspace(low, high if np.isfinite(high) else 1, 12).reshape(3, 4).astype(dtype)
    array[-1, -1] = high
    path = str(tmp_path / f"a.{suffix}")
    if suffix == "npy":
        np.save(path, array)
    elif dtype == np.int16:  # Pillow reads signed TIFFs and writes none: SampleFormat 2 in a 16-bit one
        Image.fromarray(array.view(np.uint16)).save(path, tiffinfo={339: 2})
    else:
        Image.fromarray(array).save(path)
    if not good:
        with pytest.raises(ValueError, match="values of"):
            read_image(path, 1)
    else:
        expected = array / 65535 if array.dtype.kind == "i" else array
        np.testing.assert_allclose(read_image(path, 1)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(375, 500), (333, 500), (97, 41), (30, 31)])
def test_resizing_has_torchvisions_sizes_and_values(shape):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    found = common.resize_to_cover(image, (224, 224), v2.InterpolationMode.BICUBIC)
    assert torch.equal(found, v2.Resize(224, v2.InterpolationMode.BICUBIC)(image))
    _, h, w = common.resize_to_cover(image, (25, 40), v2.InterpolationMode.BICUBIC).shape
    assert (h == 25 and w >= 40) or (h >= 25 and w == 40)


# ---- labels, lists, folders


@pytest.mark.parametrize("values, classes", [
    ({"labels": np.array([[1], [0], [0], [1]])}, ["0", "1"]),
    ({"labels": np.array([b"b", b"a", b"a", b"b"])}, ["a", "b"]),
    ({"labels": np.array([1, 2, 0, 0])}, ["0", "1", "2"]),
    ({"labels": np.array([0, 1, -1, 0])}, None), ({"labels": np.array([0, 1, 2**40, 0])}, None),
    ({"labels": np.array([0.5, 1, 2, 3])}, None), ({"split": np.zeros(5, int)}, None),
])
def test_labels_of_an_npz_are_numbers_words_or_a_column(tmp_path, values, classes):
    marks = {"split": np.array([b"train", b"val", b"train", b"val"])} if classes else {}
    np.savez(tmp_path / "a.npz", images=np.stack([IMAGE] * 4), **marks | values)
    if classes is None:
        with pytest.raises(UserError, match="`(labels|split)`"):
            open_data(tmp_path / "a.npz", "train")
        return
    train, val = (open_data(tmp_path / "a.npz", split) for split in ("train", "val"))
    assert train.classes == val.classes == classes and len(train) == len(val) == 2
    assert [train.read(i)[1] for i in range(2)] == [1, 0]


def test_a_list_of_paths_ends_lines_at_newlines_alone(tmp_path):
    names = ["a\u2028b.png", "c\x0bd.png", os.fsdecode(b"\xff.png"), "e.png"]
    for name in names:
        save(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(b"\r\n".join(os.fsencode(name) for name in names) + b"\n\n")
    source = open_data(tmp_path / "list.txt")
    assert [os.path.basename(source.name(i)) for i in range(len(source))] == names
    assert all(source.read(i)[0].shape == (3, 40, 56) for i in range(4))


def test_what_is_left_out_is_counted(tmp_path, capsys):
    for name in ("train/a/1.png", "train/a/2.png", "train/b/1.png", "extra/1.png"):
        save(tmp_path / name)
    for name in ("train/a/x.heic", "train/a/y.HEIC", "train/b/noext", "train/b/._1.png"):
        (tmp_path / name).write_bytes(b"x")
    assert len(open_data(tmp_path, "train")) == 3
    output = capsys.readouterr().out
    assert all(part in output for part in ("also has extra", ".heic 2", "no suffix 1", "hidden 1"))
    save(tmp_path / "train/overview.png")
    with pytest.raises(UserError, match="train/overview.png is in no class's folder"):
        open_data(tmp_path, "train")
    assert len(open_data(tmp_path)) == 4  # pre-training needs no classes


# ---- --check_data


@pytest.fixture
def messy(tmp_path):
    tags = Image.Exif()
    tags[274] = 6
    for i in range(6):
        save(tmp_path / f"train/cat/{i}.png")
    save(tmp_path / "train/dog/turned.jpg", exif=tags)
    pages = [Image.fromarray(IMAGE), Image.fromarray(255 - IMAGE)]
    pages[0].save(tmp_path / "train/dog/pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "train/dog/deep.png")
    (tmp_path / "train/dog/broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "train/dog/phone.heic").write_bytes(b"x")
    save(tmp_path / "val/cat/0.png")
    return tmp_path


def test_check_data_says_what_a_person_would_want_to_know(messy):
    command = ["mae_mff.py", "--data", messy, "--check_data"]
    output = run_script(command, messy, processes=2)
    assert output.count("unreadable: 1") == 1  # one process looks
    for part in ("train: 10 images", "suffixes: .png 7, .jpg 2, .tif 1", "left out, by suffix: .heic 1",
                 "several pages or frames, of which the first is read: 1", "cat 6 (66.7%), dog 3 (33.3%)",
                 "56x40 7", "40x56 1", "(8 bit, 0 to 255) of 8 images: 0 to 255", "0.4578 to 0.4578",
                 "orientation 6: 1", "unreadable: 1", "broken.jpg", "val: 1 images",
                 "classes without images here: dog"):
        assert part in output, (part, output)
    assert not (messy / "runs").exists()
    for path in (messy / "train/dog").iterdir():  # then training could not use it
        path.write_bytes(b"x")
    output = run_script(command, messy, expect=2)
    assert "Traceback" not in output and output.splitlines()[-1].startswith("mae_mff: train: 1 classes")
