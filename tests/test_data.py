"""Data chapter of common.py: what is read, and that randomness depends on (seed, epoch, sample) alone."""

import os
import struct
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from test_check import open_data
from torchvision.transforms import v2

import common
import transfer_data
import transfer_seg_det
from common import UserError
from mae_mff import Config, presets
from shapes import Shapes


def run_of(n, epochs=3, rank=0, world_size=1, workers=0, **values):
    """A Run that has been planned for n images."""
    run = common.Run(Config(epochs=epochs, workers=workers, **values), "test")
    run.rank, run.world_size, run.n = rank, world_size, n
    run.steps = int(epochs * n // run.cfg.batch_size)
    run.micro_batch, run.accum_steps = common.split_batch(run.cfg.batch_size, run.cfg.micro_batch, world_size)
    return run


# ---- order and randomness


@pytest.mark.parametrize("world_size, micro_batch", [(1, 12), (1, 3), (2, 6), (3, 2)])
def test_every_split_of_the_batch_sees_the_same_samples(world_size, micro_batch):
    runs = [run_of(50, rank=rank, world_size=world_size, batch_size=12, micro_batch=micro_batch)
            for rank in range(world_size)]
    steps, accum = runs[0].steps, runs[0].accum_steps
    per_rank = [list(common.training_keys(run)) for run in runs]
    assert all(len(batches) == steps * accum for batches in per_rank)
    for step in range(steps):
        own = slice(step * accum, (step + 1) * accum)
        keys = [key for batches in per_rank for micro in batches[own] for key in micro]
        places = [divmod(position, 50) for position in range(step * 12, step * 12 + 12)]
        assert sorted(keys) == sorted((epoch, common.epoch_order(50, 0, epoch)[i]) for epoch, i in places)


def test_passes_are_whole_permutations_and_resume_starts_inside_one():
    run = run_of(50, epochs=6, batch_size=12, seed=7)
    keys = sum(common.training_keys(run), [])
    for epoch in range(run.steps * 12 // 50):
        assert sorted(index for e, index in keys if e == epoch) == list(range(50))
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]
    run.step = 9
    assert sum(common.training_keys(run), []) == keys[9 * 12 :]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_shares_out_every_sample_once(world_size):
    for n in (0, 4, 1030):
        ranks = [types.SimpleNamespace(rank=rank, world_size=world_size) for rank in range(world_size)]
        keys = [key for run in ranks for batch in common.eval_keys(n, run) for key in batch]
        assert sorted(keys) == [(0, i) for i in range(n)]


def test_samples_do_not_depend_on_the_number_of_workers(folder):
    alone, three = [], []
    for batches, workers in ((alone, 0), (three, 3)):
        run = run_of(40, batch_size=10, workers=workers)
        samples = run.samples(open_data(folder), common.RandomResizedCrop((16, 16)), lambda: torch.rand(4))
        batches += run.load_batches(samples, common.training_keys(run))
    assert len(alone) == len(three) == 12
    for a, b in zip(alone, three, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("image", "noise", "index", "label"))
    first, second = ({int(i): batch["noise"][j] for batch in part for j, i in enumerate(batch["index"])}
                     for part in (alone[:4], alone[4:8]))
    assert all(not torch.equal(first[i], second[i]) for i in range(40))


def test_about_half_of_the_training_samples_are_mirrored(folder):
    source, crop = open_data(folder), common.EvalCrop((32, 32))
    training = run_of(40).samples(source, crop)
    plain = run_of(40).samples(source, crop, flip=False)
    pairs = [(training[epoch, i]["image"], plain[epoch, i]["image"]) for epoch in range(3) for i in range(40)]
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in pairs)
    assert 40 < sum(torch.equal(a, b) for a, b in pairs) < 80


def test_normalize_undoes_itself():
    normalize = common.Normalize((0.4, 0.5, 0.6), (0.1, 0.2, 0.3), torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    torch.testing.assert_close(normalize.undo(normalize(images)), images / 255)
    torch.testing.assert_close(normalize(images)[:, 2], (images[:, 2] / 255 - 0.6) / 0.3)


@pytest.mark.parametrize("batch_size, world_size, micro",
                         [(4096, 4, 256), (4096, 1, 256), (320, 4, 80), (1000, 2, 250), (514, 2, 1)])
def test_default_micro_batch_is_the_largest_divisor_up_to_256(batch_size, world_size, micro):
    assert common.split_batch(batch_size, None, world_size) == (micro, batch_size // micro // world_size)
    run, ends = run_of(50000, epochs=2.0, world_size=world_size, batch_size=batch_size), []
    while run.step < run.steps:
        run.step += 1
        ends += [run.step] if run.ends_epoch() else []
    assert ends == [-(-50000 // batch_size), run.steps]
    with pytest.raises(UserError, match="use 96 or 128"):
        common.split_batch(100, 16, 2)


# ---- sources


def test_folder_flat_nested_list_and_train_val(folder, tmp_path):
    nested = open_data(folder)
    assert len(nested) == 40 and nested.classes == ["class0", "class1"] and nested.read(39)[1] == 1
    assert open_data(folder / "class0").classes == ["nested"]
    flat = open_data(folder / "class0/nested")
    assert len(flat) == 20 and flat.classes is None and flat.read(0)[1] == -1
    listing = tmp_path / "list.txt"
    listing.write_text(f"images/class0/nested/00.png\n{folder}/class1/nested/01.png\n\n")
    listed = open_data(listing)
    assert len(listed) == 2 and torch.equal(listed.read(0)[0], nested.read(0)[0])
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(folder)
    with pytest.raises(UserError, match="no val/"):
        open_data(root, "val")
    os.makedirs(root / "val/class1")
    os.symlink(folder / "class1/nested/01.png", root / "val/class1/a.PNG")
    assert len(open_data(root)) == 40
    held_out = open_data(root, "val", nested.classes)
    assert held_out.read(0)[1] == 1  # numbered by the training classes, not by its own
    (folder / "class0/again").symlink_to(folder)  # in a circle
    (folder / "class0/._00.png").write_bytes(b"hidden")
    assert common.list_images(folder) == [nested.name(i) for i in range(40)]


@pytest.mark.parametrize("name, content, words", [
    ("notes/notes.md", b"x", "no image under"), ("empty.txt", b"", "empty"),
    ("broken.npz", b"PK", "broken.npz")])
def test_what_is_no_data_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_data(path if path.parent == tmp_path else path.parent)


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_shapes_are_functions_of_their_number(in_chans):
    shapes, again, val = (Shapes((48, 64), in_chans, split) for split in ("train", "train", "val"))
    for i in range(30):
        image, label = shapes.read(i)
        drawn, instances, kinds = again.draw(i)
        visible = [(instances == k + 1).sum() for k in range(len(kinds))]
        assert image.shape == (in_chans, 48, 64) and np.array_equal(image.permute(1, 2, 0), drawn)
        assert label == kinds[np.argmax(visible)] and torch.equal(shapes.read(i)[0], image)
    assert len(val) == 2000 and not torch.equal(val.read(0)[0], shapes.read(0)[0])
    counts = np.bincount([shapes.read(i)[1] for i in range(300)], minlength=10)
    assert len(counts) == 10 and counts.min() > 5


# ---- decoding


@pytest.mark.parametrize("in_chans", [3, 1])
def test_sixteen_bit_and_float_files_keep_their_values(tmp_path, in_chans):
    values = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)  # 12 bits in 16
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "b.tif")
    np.save(tmp_path / "c.npy", values)
    np.save(tmp_path / "d.npy", (values / 65535).astype(np.float32))
    np.save(tmp_path / "e.npy", values.astype(">u2"))
    for i in range(5):
        image, _ = open_data(tmp_path, in_chans=in_chans).read(i)
        assert image.shape == (in_chans, 20, 30) and image.dtype == torch.float32
        torch.testing.assert_close(image[0], torch.from_numpy(values / 65535).float())


def test_five_channels_and_mismatches(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 5), np.uint8))
    assert open_data(tmp_path, in_chans=5).read(0)[0].shape == (5, 8, 8)
    with pytest.raises(ValueError, match="5 channels .* --in_chans is 3"):
        open_data(tmp_path).read(0)
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        open_data(tmp_path).read(0)


def test_a_batch_may_mix_8_and_16_bit():
    image, white = {"index": 0, "label": 0}, torch.ones(3, 4, 4)
    batch = common.collate([image | {"image": x, "bad": []} for x in (white, (255 * white).byte())])
    assert (batch["image"] == 1.0).all()


def test_unreadable_files_are_replaced_by_the_next_and_named(folder):
    for i in (4, 6):
        (folder / f"class0/nested/{i:02}.png").write_bytes(b"not an image")
    samples = run_of(40, max_bad=0.05).samples(open_data(folder), common.EvalCrop((16, 16)), flip=False)
    bad, good = samples[0, 2], samples[0, 4]  # sorted: 00 02 04 06 08 ...
    assert [path.split("/")[-1] for path, _ in bad["bad"]] == ["04.png", "06.png"] and bad["index"] == 2
    assert torch.equal(bad["image"], good["image"]) and good["bad"] == []


@pytest.mark.parametrize("mode, more", [("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})])
def test_jpegs_of_every_kind_are_read_as_pillow_reads_them(tmp_path, mode, more):
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    smooth, path = Image.fromarray(noise).resize((48, 32)), tmp_path / "a.jpg"
    smooth.convert(mode).save(path, quality=95, subsampling=0, **more)
    with Image.open(path) as image:
        pillow = torch.from_numpy(np.array(image.convert("RGB")))
    ours = common.read_image(str(path), 3)
    torch.testing.assert_close(ours.permute(1, 2, 0).float(), pillow.float(), atol=2, rtol=0)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises((OSError, RuntimeError)):
        common.read_image(str(path), 3)


def test_a_jpeg_whose_header_promises_too_much_is_refused_before_it_is_decoded(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    before, after = struct.pack(">HH", 480, 640), struct.pack(">HH", 65500, 65500)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes().replace(before, after, 1))
    with pytest.raises(Image.DecompressionBombError):
        common.read_image(str(tmp_path / "a.jpg"), 3)


def test_random_resized_crop_is_torchvisions():
    ours = common.RandomResizedCrop((24, 32))
    theirs = v2.RandomResizedCrop((24, 32), (0.2, 1.0), interpolation=3)
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    names = ("top", "left", "height", "width")
    boxes = np.array([ours.box(90, 70) for _ in range(3000)])
    expected = [theirs.make_params([image]) for _ in range(3000)]
    expected = np.array([[params[name] for name in names] for params in expected])
    for a, b in zip(*(np.column_stack([box, box[:, 2] * box[:, 3], box[:, 3] / box[:, 2]]).T
                      for box in (boxes, expected)), strict=True):  # place, size, area, aspect
        assert stats.ks_2samp(a, b).pvalue > 0.01
    for box in boxes[:20]:
        ours.box = lambda *_, box=box: box
        crop = v2.functional.resized_crop(image, *box.tolist(), (24, 32), v2.InterpolationMode.BICUBIC)
        assert torch.equal(ours(image), crop)
    for shape in ((3, 50, 400), (3, 400, 50)):  # no box of the whole area fits: the largest centred one
        params = v2.RandomResizedCrop((24, 32), (1.0, 1.0)).make_params([torch.zeros(shape)])
        box = common.RandomResizedCrop((24, 32), (1.0, 1.0)).box(*shape[1:])
        assert box == tuple(params[name] for name in names)
    for size in ((32, 32), (64, 96), (96, 64), (224, 224)):
        assert common.EvalCrop(size)(image).shape == common.RandomResizedCrop(size)(image).shape == (3, *size)


@pytest.mark.parametrize("n, world_size, flags, batch", [
    (353, 1, "", 32), (200, 1, "", 16), (15, 1, "", 16), (1024, 1, "", 128), (32768, 1, "", 4096),
    (32767, 1, "", 2048), (353, 2, "", 32), (353, 3, "", 24), (353, 1, "--batch_size 4096", 4096),
    (353, 1, "--micro_batch 48", 32)])
def test_few_images_make_the_batch_smaller_and_the_rate_by_its_root(n, world_size, flags, batch, capsys):
    cfg = common.parse_config(Config, presets, ["--data", "x", *flags.split()])
    run = common.Run(cfg, "test")
    run.world_size = world_size
    run.fit_batch(range(n))
    assert cfg.batch_size == batch and batch % world_size == 0
    rate = cfg.base_lr * cfg.batch_size / 256
    assert rate == pytest.approx(1.5e-4 * 16 * (batch / 4096) ** 0.5)
    output = capsys.readouterr().out
    assert (f"{n} images: batch {batch} instead of the paper's 4096" in output) == (batch < 4096)
    common.split_batch(cfg.batch_size, cfg.micro_batch, world_size)


def test_real_photographs_are_read_as_pillow_reads_them():
    """And ADE20K's label maps, with the labels that its own numbers say."""
    if not (folder := os.environ.get("MINMIM_TEST_DATA")):
        pytest.skip("MINMIM_TEST_DATA is not set: no real images to test with")
    paths = sorted(Path(folder, "imagenet_sample").rglob("*.jpg"))[::5]
    assert len(paths) == 40
    for path in paths:
        ours = common.read_image(str(path), 3).numpy().transpose(1, 2, 0).astype(float)
        with Image.open(path) as image:
            theirs = np.asarray(image.convert("RGB")).astype(float)
        assert np.abs(ours - theirs).mean() < 0.5
    words = ["--weights", "none", "--zero_is_ignore"]
    cfg = common.parse_config(transfer_seg_det.Config, transfer_seg_det.presets, words)
    for split, number in (("train", 5), ("val", 3)):
        source = transfer_data.LabelMaps(Path(folder, "ade20k"), split, cfg)
        assert len(source) == number and len(source.classes) == 150
        for i in range(number):
            image, labels = source.read(i)
            with Image.open(source.map_of(source.name(i))) as file:
                numbers = np.asarray(file).astype(int)
            assert image.shape[1:] == labels.shape
            assert (labels.numpy() == np.where(numbers == 0, transfer_data.IGNORE, numbers - 1)).all()
