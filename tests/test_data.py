"""Data chapter of common.py: what is read, and that randomness depends on (seed, epoch, sample) alone."""

import os
import struct
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from torchvision.transforms import v2

import common
from common import Refused


def config(data, **values):
    defaults = {"data": str(data), "img_size": (32, 32), "in_chans": 3, "download": False, "mean": None, "std": None}
    return types.SimpleNamespace(**(defaults | values))


def run_of(rank=0, world_size=1, workers=0):
    return types.SimpleNamespace(rank=rank, world_size=world_size, workers=workers, device=torch.device("cpu"))


def plan_of(n, batch_size, micro_batch, accum_steps, epochs=3):
    return common.Plan(n, batch_size, micro_batch, accum_steps, epochs * n // batch_size)


# ---- order and randomness


@pytest.mark.parametrize("world_size, micro_batch", [(1, 12), (1, 3), (2, 6), (3, 2)])
def test_every_split_of_the_batch_sees_the_same_samples(world_size, micro_batch):
    n, batch_size = 50, 12
    plan = plan_of(n, batch_size, micro_batch, batch_size // (world_size * micro_batch))
    per_rank = [list(common.KeyedBatches(plan, 0, run_of(rank, world_size), 0)) for rank in range(world_size)]
    assert all(len(batches) == plan.steps * plan.accum_steps for batches in per_rank)
    for step in range(plan.steps):
        own = slice(step * plan.accum_steps, (step + 1) * plan.accum_steps)
        keys = {key for batches in per_rank for micro in batches[own] for key in micro}
        positions = range(step * batch_size, (step + 1) * batch_size)
        expected = {(i // n, int(common.epoch_order(n, 0, i // n)[i % n])) for i in positions}
        assert keys == expected and len(keys) == batch_size


def test_passes_are_whole_permutations_and_resume_starts_inside_one():
    plan = plan_of(50, 12, 12, 1, epochs=6)
    keys = [key for batch in common.KeyedBatches(plan, 7, run_of(), 0) for key in batch]
    for epoch in range(plan.steps * 12 // 50):
        assert sorted(index for e, index in keys if e == epoch) == list(range(50))
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]
    resumed = [key for batch in common.KeyedBatches(plan, 7, run_of(), 9) for key in batch]
    assert resumed == keys[9 * 12 :]


def batches_of(folder, workers):
    source = common.open_data(config(folder))
    views = common.Views(source, common.RandomResizedCrop((16, 16)), 0, 2, lambda: torch.rand(4))
    keys = common.KeyedBatches(plan_of(40, 10, 10, 1), 0, run_of(), 0)
    return list(common.make_loader(views, keys, run_of(workers=workers)))


def test_samples_do_not_depend_on_the_number_of_workers(folder):
    alone, three = batches_of(folder, 0), batches_of(folder, 3)
    assert len(alone) == len(three) == 12
    for a, b in zip(alone, three, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("image", "draw", "flip", "index", "label"))
    first_pass, second_pass = ({int(i): batch["draw"][j] for batch in part for j, i in enumerate(batch["index"])}
                               for part in (alone[:4], alone[4:8]))
    assert all(not torch.equal(first_pass[i], second_pass[i]) for i in range(40))


def test_normalise_flips_on_the_device_and_undoes_itself():
    normalise = common.Normalise(common.IMAGENET_MEAN, common.IMAGENET_STD, torch.device("cpu"))
    image = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    out = normalise({"image": image, "flip": torch.tensor([False, True])})
    pixels = image / 255
    torch.testing.assert_close(normalise.undo(out)[0], pixels[0])
    torch.testing.assert_close(normalise.undo(out)[1], pixels[1].flip(-1))
    mean = torch.tensor(common.IMAGENET_MEAN)
    torch.testing.assert_close(out[0, :, 0, 0], (pixels[0, :, 0, 0] - mean) / torch.tensor(common.IMAGENET_STD))


# ---- plan


def test_plan_prints_what_to_do_about_a_batch_that_does_not_divide():
    cfg = types.SimpleNamespace(batch_size=100, micro_batch=16, epochs=1.0)
    with pytest.raises(Refused, match="use 96 or 128"):
        common.make_plan(1000, cfg, 2)
    cfg.micro_batch = None
    with pytest.raises(Refused, match="use 99 or 102"):
        common.make_plan(1000, cfg, 3)
    with pytest.raises(Refused, match="fewer than one batch"):
        common.make_plan(50, types.SimpleNamespace(batch_size=64, micro_batch=None, epochs=1.0), 1)
    with pytest.raises(Refused, match="less than one update"):
        common.make_plan(100, types.SimpleNamespace(batch_size=64, micro_batch=None, epochs=0.5), 1)


@pytest.mark.parametrize("batch_size, world_size, micro",
                         [(4096, 4, 256), (4096, 1, 256), (320, 4, 80), (1000, 2, 250), (514, 2, 1)])
def test_default_micro_batch_is_the_largest_divisor_up_to_256(batch_size, world_size, micro):
    plan = common.make_plan(50000, types.SimpleNamespace(batch_size=batch_size, micro_batch=None, epochs=2.0), world_size)
    assert plan.micro_batch == micro and plan.micro_batch * plan.accum_steps * world_size == batch_size
    assert plan.steps == 2 * 50000 // batch_size
    ends = [step for step in range(1, plan.steps + 1) if plan.ends_epoch(step)]
    first_end = next(step for step in range(plan.steps) if step * batch_size >= 50000)
    assert ends == [first_end, plan.steps]


# ---- sources


def test_folder_flat_nested_list_and_train_val(folder, tmp_path):
    nested = common.open_data(config(folder))
    assert len(nested) == 40 and nested.classes == ["class0", "class1"] and nested.read(39)[1] == 1
    assert common.open_data(config(folder / "class0")).classes == ["nested"]
    flat = common.open_data(config(folder / "class0/nested"))
    assert len(flat) == 20 and flat.classes is None and flat.read(0)[1] == -1
    listing = tmp_path / "list.txt"
    listing.write_text("images/class0/nested/00.png\n" + str(folder / "class1/nested/01.png") + "\n\n")
    listed = common.open_data(config(listing))
    assert len(listed) == 2 and torch.equal(listed.read(0)[0], nested.read(0)[0])
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(folder)
    with pytest.raises(Refused, match="no val/"):
        common.open_data(config(root), "val")
    os.makedirs(root / "val/class1")
    os.symlink(folder / "class1/nested/01.png", root / "val/class1/a.PNG")
    assert len(common.open_data(config(root))) == 40
    held_out = common.open_data(config(root), "val", nested.classes)
    assert held_out.read(0)[1] == 1  # numbered by the training classes, not by its own


def test_links_that_lead_in_circles_and_hidden_files(folder):
    (folder / "class0/again").symlink_to(folder)
    (folder / "class0/._00.png").write_bytes(b"junk")
    assert len(common.list_images(folder)) == 40


def test_no_image_says_what_is_there(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(Refused, match=r"1 other files, the first is .*notes.md; read are .jpg"):
        common.open_data(config(tmp_path))
    with pytest.raises(Refused, match="link ImageNet there, give --data PATH .*--demo"):
        common.open_data(config("data/imagenet"))


def test_npz_with_split_and_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    for split in (np.arange(10) >= 7, np.array(["train"] * 7 + ["val"] * 3)):
        np.savez(tmp_path / "set.npz", images=images, labels=np.arange(10) % 3, split=split)
        train, val = (common.open_data(config(tmp_path / "set.npz"), part) for part in ("train", "val"))
        assert (len(train), len(val), train.classes) == (7, 3, ["0", "1", "2"])
        image, label = val.read(1)
        assert torch.equal(image, torch.from_numpy(images[8]).permute(2, 0, 1)) and label == 2
    np.savez(tmp_path / "other.npz", x=images)
    with pytest.raises(Refused, match="expected `images` uint8"):
        common.open_data(config(tmp_path / "other.npz"))


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_shapes_agree_with_their_annotations(in_chans):
    shapes, again = (common.Shapes((48, 64), in_chans) for _ in range(2))
    for i in range(30):
        image, label = shapes.read(i)
        label_map, boxes, masks, kinds = again.annotations(i)
        assert image.shape == (in_chans, 48, 64) and torch.equal(image, again.read(i)[0])
        assert label == kinds[masks.flatten(1).sum(1).argmax()]
        assert torch.equal((label_map > 0), masks.any(0)) and len(boxes) == len(masks) == len(kinds)
        for box, mask, kind in zip(boxes.long(), masks, kinds, strict=True):
            inside = mask[box[1] : box[3], box[0] : box[2]]
            assert inside.sum() == mask.sum() and inside[0].any() and inside[:, -1].any()
            assert (label_map[mask] == kind + 1).all()
    val = common.Shapes((48, 64), in_chans, "val")
    assert len(val) == 2000 and not torch.equal(val.read(0)[0], shapes.read(0)[0])
    counts = np.bincount([shapes.read(i)[1] for i in range(300)], minlength=10)
    assert len(counts) == 10 and counts.min() > 5


# ---- decoding


@pytest.mark.parametrize("in_chans, shape", [(3, (3, 20, 30)), (1, (1, 20, 30))])
def test_sixteen_bit_and_float_files_keep_their_values(tmp_path, in_chans, shape):
    values = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)  # 12 bits in 16, as scanners write
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "b.tif")
    np.save(tmp_path / "c.npy", values)
    np.save(tmp_path / "d.npy", (values / 65535).astype(np.float32))
    np.save(tmp_path / "e.npy", values.astype(">u2"))
    for i in range(5):
        image, _ = common.open_data(config(tmp_path, in_chans=in_chans)).read(i)
        assert image.shape == shape and image.dtype == torch.float32
        torch.testing.assert_close(image[0], torch.from_numpy(values / 65535).float())


def test_five_channels_and_mismatches(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 5), np.uint8))
    assert common.open_data(config(tmp_path, in_chans=5)).read(0)[0].shape == (5, 8, 8)
    with pytest.raises(ValueError, match="5 channels .* --in_chans is 3"):
        common.open_data(config(tmp_path)).read(0)
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        common.open_data(config(tmp_path)).read(0)


def test_a_batch_may_mix_8_and_16_bit(tmp_path):
    Image.fromarray(np.full((16, 16), 65535, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "b.png")
    views = common.Views(common.open_data(config(tmp_path)), common.EvalCrop((16, 16)), 0, 2)
    assert (common.collate([views[0, 0], views[0, 1]])["image"] == 1.0).all()


def test_unreadable_files_are_replaced_by_the_next_and_named(folder):
    for i in (4, 6):
        (folder / f"class0/nested/{i:02}.png").write_bytes(b"not an image")
    source = common.open_data(config(folder))
    views = common.Views(source, common.EvalCrop((16, 16)), 0, 3)
    bad, good = views[0, 2], views[0, 4]  # sorted: 00 02 04 06 08 ...
    assert [path.split("/")[-1] for path, _ in bad["bad"]] == ["04.png", "06.png"] and bad["index"] == 2
    assert torch.equal(bad["image"], good["image"]) and good["bad"] == []


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_awkward_files(real_data, monkeypatch, decoder):
    if decoder == "pillow":
        monkeypatch.setattr(common, "decode_jpeg", None)
    robustness = real_data / "robustness"
    readable, refused = {}, []
    for path in common.list_images(robustness):
        try:
            readable[os.path.basename(path)] = common.read_image(path, 3)
        except Exception:
            refused.append(os.path.basename(path))
    assert set(refused) == {"truncated_jpeg.jpg", "truncated_image.png", "broken_data_stream.png", "broken.png",
                            "decompression_bomb.gif", "png_decompression_dos.png"}
    assert all(image.shape[0] == 3 for image in readable.values())
    upright, turned = readable["exif_landscape_1.jpg"], readable["exif_landscape_6.jpg"]
    assert upright.shape == turned.shape and (upright.float() - turned.float()).abs().mean() < 5
    for name in ("hopper.jpg", "hopper_gray.jpg", "pil_sample_cmyk.jpg", "hopper_orientation_6.jpg"):
        with Image.open(robustness / name) as image:
            pillow = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        torch.testing.assert_close(readable[name].permute(1, 2, 0).float(), torch.from_numpy(pillow).float(), atol=2, rtol=0)


def test_jpeg_header_gives_the_size_and_stops_bombs(real_data, tmp_path):
    paths = [path for path in common.list_images(real_data) if path.endswith(".jpg")]
    assert len(paths) > 200
    for path in paths:
        with Image.open(path) as image:
            assert common.jpeg_pixels(Path(path).read_bytes()) == image.width * image.height
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    place = data.index(struct.pack(">HH", 480, 640))
    (tmp_path / "a.jpg").write_bytes(data[:place] + struct.pack(">HH", 65500, 65500) + data[place + 4 :])
    with pytest.raises(Image.DecompressionBombError):
        common.read_image(str(tmp_path / "a.jpg"), 3)
    for length in range(2, place):  # cut anywhere: no answer, no crash
        assert common.jpeg_pixels(data[:length]) == 0


def test_random_resized_crop_is_torchvisions():
    ours, theirs = common.RandomResizedCrop((24, 32)), v2.RandomResizedCrop((24, 32), (0.2, 1.0), interpolation=3)
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    names = ("top", "left", "height", "width")
    boxes = np.array([ours.box(90, 70) for _ in range(3000)])
    expected = np.array([[params[name] for name in names] for params in (theirs.make_params([image]) for _ in range(3000))])
    for statistic in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert stats.ks_2samp(statistic(boxes), statistic(expected)).pvalue > 0.01
    for top, left, height, width in boxes[:20]:
        ours.box = lambda *_, box=(top, left, height, width): box
        crop = v2.functional.resized_crop(image, top, left, height, width, (24, 32), v2.InterpolationMode.BICUBIC)
        assert torch.equal(ours(image), crop)
    for shape in ((3, 50, 400), (3, 400, 50)):  # no box of the whole area fits: the largest centred one
        params = v2.RandomResizedCrop((24, 32), (1.0, 1.0)).make_params([torch.zeros(shape)])
        assert common.RandomResizedCrop((24, 32), (1.0, 1.0)).box(*shape[1:]) == tuple(params[name] for name in names)


def test_check_data_counts_and_lists(real_data, capsys):
    source = common.open_data(config(real_data / "robustness"))
    common.check_data(source, 0)
    out = capsys.readouterr().out
    assert f"{len(source)} images" in out and "unreadable: 6" in out and "truncated_jpeg.jpg" in out and "CMYK 1" in out


def test_crops_cover_rectangles():
    image = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)
    for size in ((32, 32), (64, 96), (96, 64), (224, 224)):
        assert common.EvalCrop(size)(image).shape == common.RandomResizedCrop(size)(image).shape == (3, *size)


def test_one_image_is_no_data_set(folder):
    with pytest.raises(common.Refused, match="is one image: give its folder"):
        common.open_data(common.RunConfig(data=str(folder / "class0/nested/00.png")))
