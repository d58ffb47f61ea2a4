"""transfer_seg_det.py and transfer_data.py: against other libraries' networks, slow counts, and values worked out by hand."""

import json
import math
import re
import shutil
import signal
import subprocess
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Started, run_command, run_script, sabotaged
from PIL import Image
from torch import nn
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import masks_to_boxes
from torture import log, same, state

import common
import transfer_data as data
import transfer_seg_det as transfer

SMALL = ["--demo", "--amp", "off", "--workers", 0, "--warmup_iters", 2, "--log_every", 2, "--save_minutes", 0,
         "--weights", "none"]
SEG = ["transfer_seg_det.py", *SMALL, "--channels", 16, "--batch_size", 4, "--iters", 8, "--eval_every", 4, "--pictures", 2]
DET = ["transfer_seg_det.py", *SMALL, "--task", "det", "--channels", 8, "--rois", 8, "--batch_size", 2, "--iters", 6,
       "--eval_every", 3, "--pictures", 2]


def config(*words):
    return common.parse_config(transfer.Config, transfer.presets, [*map(str, words)])


def small(task, *words):
    return config("--demo", "--weights", "none", "--task", task, *words)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Folders in ADE20K's and in COCO's layout, 12 + 5 drawn images each; classes of odd numbers, one crowd, one image without
    objects."""
    root = tmp_path_factory.mktemp("scenes")
    for split, names, n in (("train", ("training", "train2017"), 12), ("val", ("validation", "val2017"), 5)):
        shapes, images, objects = common.Shapes((40, 48), 3, split), [], []
        for folder in (f"ade/images/{names[0]}", f"ade/annotations/{names[0]}", f"coco/images/{names[1]}", "coco/annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture = Image.fromarray(shapes.draw(i)[0])
            labels, boxes, masks, kinds = shapes.annotations(i)
            picture.save(root / f"ade/images/{names[0]}/{i}.png")
            Image.fromarray(labels.numpy().astype(np.uint8)).save(root / f"ade/annotations/{names[0]}/{i}.png")
            picture.save(root / f"coco/images/{names[1]}/{i}.png")
            images.append({"id": 7 * i, "file_name": f"{i}.png", "height": 40, "width": 48})
            for box, mask, kind in zip(boxes.tolist() if i else [], masks, kinds.tolist(), strict=False):
                x1, y1, x2, y2 = box
                objects.append({"id": len(objects) + 1, "image_id": 7 * i, "category_id": 3 * kind + 5, "area": int(mask.sum()),
                                "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(i == 1),
                                "segmentation": {"size": [40, 48], "counts": run_lengths(mask)}})
        categories = [{"id": 3 * i + 5, "name": name} for i, name in enumerate(shapes.classes)]
        (root / f"coco/annotations/instances_{names[1]}.json").write_text(
            json.dumps({"images": images, "annotations": objects, "categories": categories[::-1]}))
    (root / "ade/classes.txt").write_text("ground\n" + "\n".join(shapes.classes) + "\n")
    return root


def run_lengths(mask):
    """COCO's uncompressed run lengths: of zeros and ones in turn, column by column."""
    counts, value = [0], 0
    for pixel in mask.T.flatten().int().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


# ---- encoders


def test_vit_maps_equal_timms(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4).eval()
    nn.init.normal_(theirs.cls_token)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    images = torch.randn(2, 3, 32, 32)
    expected = theirs.forward_intermediates(images, indices=[0, 1, 2, 3], norm=False, intermediates_only=True)
    for head, norm in (("uper", False), ("linear", True)):
        encoder = transfer.ViTEncoder(small("seg", "--head", head)).eval()
        common.load_weights(encoder, tmp_path / "timm.pth", ignore=(*common.BESIDE_TRUNK, *encoder.beside))
        maps = encoder(images)
        if norm:
            expected = theirs.forward_intermediates(images, indices=[3], norm=True, intermediates_only=True)
        assert len(maps) == len(expected) == len(encoder.channels) == len(encoder.strides)
        for found, right in zip(maps, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task, head, dilate", [("seg", "fcn", True), ("seg", "uper", False), ("det", "uper", False)])
def test_resnet_maps_equal_torchvisions(tmp_path, task, head, dilate):
    theirs = resnet50(replace_stride_with_dilation=[False, dilate, dilate]).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    ours = transfer.ResNetEncoder(small(task, "--model", "resnet50", "--head", head)).eval()
    common.load_weights(ours, tmp_path / "resnet.pth", ignore=common.BESIDE_TRUNK)
    images = torch.randn(1, 3, 64, 64)
    expected = create_feature_extractor(theirs, [f"layer{i}" for i in range(1, 5)])(images).values()
    for x, right, channels, stride in zip(ours(images), expected, ours.channels, ours.strides, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-3, atol=1e-3)
        assert x.shape == (1, channels, 64 // stride, 64 // stride)


@pytest.mark.parametrize("grid, side", [((8, 8), 4), ((7, 5), 3), ((3, 9), 4), ((2, 2), 5)])
def test_windows_hold_neighbours_and_are_undone(grid, side):
    h, w = grid
    x = torch.arange(1.0, 1 + 2 * h * w).view(2, h * w, 1).expand(-1, -1, 3)
    windows = transfer.to_windows(x, grid, side)
    assert windows.shape[1:] == (side * side, 3)
    for window in windows[..., 0]:
        numbers = [int(n) - 1 for n in window.tolist() if n]
        rows, columns = {n % (h * w) // w for n in numbers}, {n % w for n in numbers}
        assert max(rows) - min(rows) < side and max(columns) - min(columns) < side and len({n // (h * w) for n in numbers}) == 1
    assert torch.equal(transfer.from_windows(windows, grid, side), x)


def test_attention_in_windows():
    """A window of the whole grid changes nothing; in smaller ones a patch is seen by its own window alone, but in the last
    block of each quarter."""
    cfg = small("det", "--model", "tiny", "--img_size", 32, "--window", 8)  # 12 blocks
    whole = transfer.ViTEncoder(cfg).eval()
    kinds = [type(block.attn) for block in whole.blocks]
    assert kinds == 4 * [transfer.WindowAttention, transfer.WindowAttention, common.Attention]
    plain = transfer.ViTEncoder(small("det", "--model", "tiny", "--img_size", 32, "--window", 0)).eval()
    plain.load_state_dict(whole.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert {type(block.attn) for block in plain.blocks} == {common.Attention}
    torch.testing.assert_close(whole(images)[0], plain(images)[0], rtol=1e-4, atol=1e-4)
    encoder = transfer.ViTEncoder(small("det", "--model", "tiny", "--img_size", 32, "--window", 4)).eval()
    other = images.clone()
    other[:, :, 5, 20] += 1  # the window above on the right
    assert (encoder(images)[0] != encoder(other)[0]).any(1).all()
    for i in (2, 5, 8, 11):
        encoder.blocks[i] = nn.Identity()
    changed = (encoder(images)[0] != encoder(other)[0]).any(1)[0]
    assert changed[:4, 4:].all() and changed.sum() == 16


def test_quarters_of_the_sizes():
    for size, quarters in (("base", [3, 6, 9, 12]), ("large", [6, 12, 18, 24]), ("nano", [1, 2, 3, 4])):
        assert transfer.ViTEncoder(small("seg", "--model", size)).taps == quarters
        assert transfer.ViTEncoder(small("det", "--model", size)).taps == quarters[-1:]


@pytest.mark.parametrize("task", ["seg", "det"])
def test_recomputing_activations_changes_no_gradient(task):
    gradients = []
    for recompute in ("--no-recompute", "--recompute"):
        torch.manual_seed(0)
        encoder = transfer.ViTEncoder(small(task, recompute, "--drop_path", 0.5)).train()
        encoder(torch.randn(3, 3, 32, 32))[-1].square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_positions_follow_the_image_size():
    encoder = transfer.ViTEncoder(small("seg")).eval()
    assert [tuple(x.shape) for x in encoder(torch.randn(2, 3, 24, 40))] == [(2, 128, 6, 10)] * 4
    encoder = transfer.make_encoder(small("seg", "--model", "revcol_nano")).eval()
    assert [tuple(x.shape[2:]) for x in encoder(torch.randn(2, 3, 24, 40))] == [(24, 40), (12, 20), (6, 10), (3, 5)]


@pytest.mark.parametrize("model, task", [("nano", "seg"), ("nano", "det"), ("resnet50", "seg"), ("revcol_nano", "seg"),
                                         ("revcol_nano", "det")])
def test_layer_decay_and_weight_decay(model, task):
    cfg = small(task, "--model", model, "--resnet_width", 8)
    net = transfer.Segmenter(cfg, 5) if task == "seg" else transfer.Detector(cfg, 5)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = transfer.parameter_groups_of(net, cfg)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    prefix = "encoder." if task == "seg" else "model.backbone.encoder."
    for name, group in found.items():
        inner = name.removeprefix(prefix)
        layer = 5 if inner == name else 0 if not inner.startswith("blocks.") else int(inner.split(".")[1]) + 1
        if model == "revcol_nano":  # five blocks in each of four columns, so 1 to 5 + 3; the head is 9
            layer = 5 if inner == name else net.get_submodule(prefix[:-1]).layer(inner) - 4
        assert group["lr_scale"] == pytest.approx(1.0 if model == "resnet50" else 0.75 ** (5 - layer)), name
        vector = net.get_parameter(name).ndim == 1 or name.endswith(("pos_embed", "cls_token"))
        assert group["weight_decay"] == (0.0 if vector else cfg.weight_decay), name


# ---- segmentation


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_upernet_on_vit_base_has_the_parameters_that_the_docstring_derives():
    cfg = config("--weights", "none", "--drop_path", 0)
    model, D, C = transfer.Segmenter(cfg, 150), 768, 150
    blocks = 12 * (2 * 2 * D + D * 3 * D + 3 * D + D * D + D + 2 * D * 4 * D + 4 * D + D)
    encoder = 16 * 16 * 3 * D + D + D + (1 + 32 * 32) * D + blocks
    neck = 3 * (4 * D * D + D) + 2 * D
    head = 7 * (D**2 + 2 * D) + 45 * D**2 + 2 * D + 3 * (9 * D**2 + 2 * D) + 36 * D**2 + 2 * D + C * (D + 1)
    auxiliary = 256 * (9 * D + 2) + C * 257
    derived = [encoder + neck + head + auxiliary, encoder, neck, head, auxiliary]
    assert [parameters(x) for x in (model, model.encoder, model.neck, model.head, model.auxiliary)] == derived
    text = transfer.__doc__.replace(",", "")
    assert all(re.search(rf"\b{number}\b", text) for number in derived)


def test_upernet_equals_that_of_transformers():
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    from transformers import UperNetConfig

    channels, width, classes = [24, 48, 96, 192], 32, 7
    settings = UperNetConfig()
    settings.hidden_size, settings.pool_scales, settings.num_labels = width, [1, 2, 3, 6], classes
    theirs = upernet.UperNetHead(settings, in_channels=channels).eval()
    ours = transfer.UperHead(channels, width, classes).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2), nn.init.uniform_(module.weight)
    pairs = [(ours.bottleneck, theirs.bottleneck), (ours.join, theirs.fpn_bottleneck),
             *zip(ours.laterals, theirs.lateral_convs, strict=True), *zip(ours.smooth, theirs.fpn_convs, strict=True),
             *((pool[1], block.layers[1]) for pool, block in zip(ours.pools, theirs.psp_modules.blocks, strict=True))]
    for mine, other in pairs:
        mine[0].load_state_dict(other.conv.state_dict())
        mine[1].load_state_dict(other.batch_norm.state_dict())
    ours.classify[1].load_state_dict(theirs.classifier.state_dict())
    maps = [torch.randn(2, c, 40 // 2**i, 24 // 2**i) for i, c in enumerate(channels)]
    torch.testing.assert_close(ours(maps), theirs(maps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model, head, grid", [("nano", "uper", 32), ("nano", "linear", 8), ("resnet50", "fcn", 4),
                                               ("resnet50", "uper", 8), ("revcol_tiny", "uper", 32)])
def test_segmenter_shapes_loss_and_gradients(model, head, grid):
    model = transfer.Segmenter(small("seg", "--model", model, "--head", head, "--resnet_width", 8), 11).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 11, (2, 32, 32))
    labels[:, 20:] = data.IGNORE
    before = torch.get_rng_state()
    loss, terms = model(images, labels)
    torch.set_rng_state(before)  # the same dropout
    scores = model.scores(images)
    assert scores[0].shape == (2, 11, grid, grid) and len(scores) == (1 if head == "linear" else 2)
    losses = []
    for x in scores:
        x = F.interpolate(x, (32, 32), mode="bilinear").log_softmax(1)
        counted = [-x[b, labels[b, i, j], i, j] for b in range(2) for i in range(20) for j in range(32)]
        losses.append(torch.stack(counted).mean())
    torch.testing.assert_close(loss, losses[0] + 0.4 * sum(losses[1:]), rtol=1e-4, atol=1e-5)
    assert terms["loss"].item() == loss.item() and ("auxiliary_head" in terms) == (head != "linear")
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    assert len(model.scores(images)) == 1  # no auxiliary head in tests


def test_labels_that_are_all_ignored_give_a_finite_loss():
    model = transfer.Segmenter(small("seg"), 3).train()
    loss, _ = model(torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), data.IGNORE))
    loss.backward()
    assert loss.item() == 0


class PerPixel:
    """Scores that depend on the pixel alone: windows must not matter."""

    def __init__(self, stride=1):
        self.stride, self.shapes = stride, []

    def scores(self, images):
        self.shapes.append(tuple(images.shape))
        return [torch.cat([images, -images], dim=1)[..., :: self.stride, :: self.stride]]


@pytest.mark.parametrize("height, width", [(512, 683), (300, 517), (511, 513), (512, 512), (37, 1030), (1, 1)])
@pytest.mark.parametrize("inference", ["slide", "whole"])
def test_windows_cover_every_pixel_of_an_odd_size_once_averaged(height, width, inference):
    cfg = types.SimpleNamespace(img_size=(512, 512), inference=inference, model="base", patch_size=16)
    images, model = torch.randn(1, 3, height, width), PerPixel()
    torch.testing.assert_close(transfer.predict_scores(model, images, cfg), torch.cat([images, -images], dim=1)[0])
    (n, _, h, w), = model.shapes
    if inference == "slide":
        assert (h, w) == (512, 512) and n == math.prod(1 + math.ceil(max(side - 512, 0) / 341) for side in (height, width))
    else:
        assert (n, h, w) == (1, max(32, 16 * math.ceil(height / 16)), max(32, 16 * math.ceil(width / 16)))


def test_window_starts_are_those_of_the_protocol():
    """Windows of 512 at steps of 341, moved back to the border (as mmsegmentation)."""
    for length in [*range(512, 3000, 37), 853, 854]:
        steps = max(length - 512 + 341 - 1, 0) // 341 + 1
        assert transfer.window_starts(length, 512) == [min(341 * i, length - 512) for i in range(steps)]


def test_sliding_equals_whole_inference_where_the_window_is_the_image():
    model = transfer.Segmenter(small("seg"), 5).eval()
    images = torch.randn(1, 3, 32, 32)
    slide, whole = (transfer.predict_scores(model, images, small("seg", "--inference", how)) for how in ("slide", "whole"))
    assert torch.equal(slide, whole)
    torch.testing.assert_close(slide, F.interpolate(model.scores(images)[0], (32, 32), mode="bilinear")[0])


def test_miou_against_a_loop_over_pixels():
    classes = 6
    matrix, counts = torch.zeros(classes, classes, dtype=torch.int64), {}
    for _ in range(3):
        labels, called = torch.randint(0, 4, (9, 7)), torch.randint(1, 5, (9, 7))  # class 5 does not occur at all
        labels[torch.rand(9, 7) < 0.2] = data.IGNORE
        matrix += transfer.confusion(called, labels, classes)
        for truth, guess in zip(labels.flatten().tolist(), called.flatten().tolist(), strict=True):
            if truth != data.IGNORE:
                counts[truth, guess] = counts.get((truth, guess), 0) + 1
    iou, accuracy = {}, {}
    for c in range(classes):
        hit = counts.get((c, c), 0)
        truth = sum(n for (t, _), n in counts.items() if t == c)
        union = truth + sum(n for (_, g), n in counts.items() if g == c) - hit
        if union:
            iou[c] = 100 * hit / union
        if truth:
            accuracy[c] = 100 * hit / truth
    scores = transfer.seg_scores(matrix, [f"c{i}" for i in range(classes)])
    assert scores["eval/miou"] == pytest.approx(np.mean([*iou.values()])) and len(iou) == 5
    assert scores["eval/macc"] == pytest.approx(np.mean([*accuracy.values()])) and len(accuracy) == 4
    assert scores["eval/aacc"] == pytest.approx(100 * sum(counts.get((c, c), 0) for c in range(6)) / sum(counts.values()))
    assert {name: x for name, x in scores.items() if "iou/" in name} == pytest.approx(
        {f"eval/iou/c{c}": x for c, x in iou.items()})


# ---- detection


def target_of(boxes, kinds, size):
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(kinds, dtype=torch.int64),
            "masks": masks}


def as_output(target, scores=None):
    n = len(target["boxes"])
    return {"boxes": target["boxes"], "labels": target["labels"], "masks": target["masks"][:, None].float(),
            "scores": torch.ones(n) if scores is None else scores}


def test_perfect_detections_have_an_ap_of_100(scenes):
    for source in (data.CocoScenes(scenes / "coco", "val", 3), data.DrawnScenes(small("det"), "val")):
        truth, results = source.truth(), []
        for i in range(len(source)):
            results += transfer.coco_results(source.ids[i], as_output(source.read(i)[1]), source.categories)
        assert transfer.average_precision(truth, results, source.ids) == pytest.approx(
            {"eval/box_ap": 100, "eval/box_ap50": 100, "eval/mask_ap": 100, "eval/mask_ap50": 100})


@pytest.mark.parametrize("shift, ap, ap50", [(0, 100, 100), (10, 70, 100), (40, 0, 0), (30, 10, 100)])
def test_ap_of_a_shifted_box_by_hand(tmp_path, shift, ap, ap50):
    """100 x 100 moved by s overlaps by (100 - s) / (100 + s): .818 passes .50 to .80, seven of ten; .538 one; .429 none."""
    size, box = (200, 200), [20, 30, 120, 130]
    truth = coco_file(tmp_path, size, [(box, 0)])
    moved = target_of([[box[0] + shift, box[1], box[2] + shift, box[3]]], [1], size)
    scores = transfer.average_precision(truth, transfer.coco_results(1, as_output(moved), [1]), [1])
    assert scores == pytest.approx({"eval/box_ap": ap, "eval/box_ap50": ap50, "eval/mask_ap": ap, "eval/mask_ap50": ap50})


def coco_file(folder, size, boxes):
    """One image, 1.png, with boxes [(x1 y1 x2 y2, iscrowd)]"""
    for name in ("images/train", "images/val", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    objects = []
    for i, ((x1, y1, x2, y2), crowd) in enumerate(boxes):
        mask = torch.zeros(size)
        mask[max(y1, 0) : y2, max(x1, 0) : x2] = 1
        objects.append({"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": crowd,
                        "area": float(mask.sum()), "segmentation": {"size": list(size), "counts": run_lengths(mask)}})
    content = {"images": [{"id": 1, "file_name": "1.png", "height": size[0], "width": size[1]}], "annotations": objects,
               "categories": [{"id": 1, "name": "thing"}]}
    for split in ("train", "val"):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(folder / f"images/{split}/1.png")
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return data.CocoScenes(folder, "val", 3).truth()


def test_detections_in_a_crowd_count_neither_way_and_a_crowd_is_no_target(tmp_path):
    truth = coco_file(tmp_path, (100, 100), [([10, 10, 40, 40], 0), ([50, 50, 100, 100], 1)])
    _, target = data.CocoScenes(tmp_path, "train", 3).read(0)
    assert target["boxes"].tolist() == [[10, 10, 40, 40]] and target["masks"].sum() == 900
    found = target_of([[10, 10, 40, 40], [55, 55, 70, 70], [80, 60, 95, 90]], [1, 1, 1], (100, 100))
    results = transfer.coco_results(1, as_output(found, torch.tensor([0.5, 0.9, 0.8])), [1])
    assert transfer.average_precision(truth, results, [1])["eval/box_ap"] == pytest.approx(100)
    truth = coco_file(tmp_path / "other", (100, 100), [([10, 10, 40, 40], 0)])  # without the crowd they are two false alarms
    assert transfer.average_precision(truth, results, [1])["eval/box_ap"] == pytest.approx(100 / 3, abs=1)


def test_no_detections_have_an_ap_of_0(scenes):
    source = data.CocoScenes(scenes / "coco", "val", 3)
    assert set(transfer.average_precision(source.truth(), [], source.ids).values()) == {0.0}


def test_images_that_could_not_be_read_do_not_count(scenes):
    source, results = data.CocoScenes(scenes / "coco", "val", 3), []
    for i in (2, 3):
        results += transfer.coco_results(source.ids[i], as_output(source.read(i)[1]), source.categories)
    truth, seen = source.truth(), [source.ids[i] for i in (2, 3)]
    assert transfer.average_precision(truth, results, seen)["eval/box_ap"] == pytest.approx(100)
    assert transfer.average_precision(truth, results, source.ids)["eval/box_ap"] < 99


def test_half_precision_does_not_round_boxes():
    """torchvision decodes boxes in the precision of the heads' outputs: bf16 has whole pixels up to 256, fours above 512."""
    model = transfer.Detector(small("det", "--img_size", 256, "--patch_size", 16), 3).eval()
    model.model.roi_heads.score_thresh = 0.0
    nn.init.zeros_(model.model.roi_heads.box_predictor.bbox_pred.weight)
    image = torch.randn(3, 256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        boxes = model.model([image])[0]["boxes"]
    assert boxes.dtype == torch.float32 and (boxes != boxes.bfloat16().float()).float().mean() > 0.5


def test_boxes_are_pooled_from_the_right_maps_whatever_the_first_image():
    cfg = small("det", "--img_size", 128, "--patch_size", 8)
    model = transfer.Detector(cfg, 3).eval()
    model.model([torch.randn(3, 60, 128)])  # filled up: its maps look twice as high as it is
    for pool in (model.model.roi_heads.box_roi_pool, model.model.roi_heads.mask_roi_pool):
        assert pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
        fresh = type(pool)(pool.featmap_names, pool.output_size, pool.sampling_ratio)
        maps = {str(i): torch.randn(1, 4, 64 // 2**i, 64 // 2**i) for i in range(4)}
        boxes = [torch.tensor([[0.0, 0, 10, 10], [5, 5, 120, 100], [0, 0, 128, 128]])]
        torch.testing.assert_close(pool(maps, boxes, [(128, 128)]), fresh(maps, boxes, [(128, 128)]))


@pytest.mark.parametrize("model", ["nano", "resnet50", "revcol_tiny"])
@pytest.mark.parametrize("objects", [0, 1])
def test_detector_trains_with_and_without_objects(model, objects):
    cfg = small("det", "--model", model, "--resnet_width", 8)
    model = transfer.Detector(cfg, 3).train()
    targets = [target_of([[5, 5, 30, 40]], [2], (64, 64)) if i < objects else target_of([], [], (64, 64)) for i in range(2)]
    loss, terms = model(torch.randn(2, 3, 64, 64), targets)
    assert terms.keys() == {"loss", "classifier", "box_reg", "mask", "objectness", "rpn_box_reg"}
    assert (terms["mask"] > 0) == (objects > 0) and torch.isfinite(loss)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # or DDP would hang
    output = model.eval().model([torch.randn(3, 40, 64)])[0]
    assert output["masks"].shape[1:] == (1, 40, 64)


def test_simple_pyramid_and_anchors_have_the_strides_of_a_resnet():
    for model in ("small", "resnet50"):
        cfg = config("--weights", "none", "--task", "det", "--img_size", 256, "--model", model)
        detector = transfer.Detector(cfg, 3).eval().model
        maps = detector.backbone(torch.randn(1, 3, 256, 256))
        assert [tuple(x.shape[1:]) for x in maps.values()] == [(256, n, n) for n in (64, 32, 16, 8, 4)]
        assert detector.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))


# ---- transforms


def test_jitter_keeps_boxes_masks_labels_and_pixels_together():
    """Each object has its own colour: after the jitter a mask covers exactly its colour, a box its mask, a label its object."""
    gone = flips = smaller = 0
    for seed in range(60):
        torch.manual_seed(seed)
        boxes = [[4, 6, 30, 20], [40, 10, 60, 50], [10, 30, 20, 45]]
        target = target_of(boxes, [1, 2, 3], (56, 70))
        image = torch.zeros(3, 56, 70, dtype=torch.uint8)
        for i in range(3):
            image[i][target["masks"][i].bool()] = 255
        target = data.scene(image, boxes, [1, 2, 3], target["masks"])
        image, target = data.LargeScaleJitter((64, 64), (0.1, 2.0), (0.0, 0.0, 0.0))(image, target)
        assert image.shape == (3, 64, 64) and all(type(x) is torch.Tensor for x in target.values())
        masks = data.unpack(target["masks"]).bool()
        gone += len(target["boxes"]) < 3
        for box, kind, mask in zip(target["boxes"], target["labels"], masks, strict=True):
            colour = image[kind - 1] > 127
            assert (colour & mask).sum() / (colour | mask).sum() > 0.85 or mask.sum() < 60  # borders: half a pixel
            assert torch.equal(masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1]), box)
        centres = {int(kind): (box[0] + box[2]) / 2 for kind, box in zip(target["labels"], target["boxes"], strict=True)}
        flips += {1, 2} <= centres.keys() and centres[1] > centres[2]
        smaller += bool((image[:, :, -8:] == 0).all() and (image[:, -8:] == 0).all())
    assert gone > 5 and flips > 5 and smaller > 5  # all of it has happened


def test_jitter_without_objects():
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    _, target = data.LargeScaleJitter((32, 32), (0.1, 2.0), (0.5, 0.5, 0.5))(image, data.scene(image, [], [], []))
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    assert data.unpack(target["masks"]).shape == (0, 32, 32)


def test_masks_are_packed_and_unpacked():
    for n in (0, 1, 5):
        masks = torch.randint(0, 2, (n, 12, 32), dtype=torch.uint8)
        packed = data.pack(masks)
        assert packed.shape == (n, 12, 4) and torch.equal(data.unpack(packed), masks)
        assert data.unpack(packed).dtype == torch.uint8  # a byte per pixel


def test_segmentation_crop_keeps_pixels_and_labels_together(monkeypatch):
    monkeypatch.setattr(data, "distort", lambda image: image)
    ignored = shares = 0
    for seed in range(60):
        torch.manual_seed(seed)
        labels = torch.zeros(60, 90, dtype=torch.int64)
        labels[:, 30:] = 1
        labels[20:50, 50:80] = 2
        image = (100 * labels + 10)[None].expand(3, -1, -1).to(torch.uint8)
        image, target = data.SegmentationCrop((32, 48), (0.5, 2.0), (0.0, 0.0, 0.0))(image, {"labels": labels.to(torch.uint8)})
        assert target["labels"].dtype == torch.uint8  # what travels from the workers
        labels = target["labels"].long()
        assert image.shape == (3, 32, 48) and labels.shape == (32, 48) and type(labels) is torch.Tensor
        counts = labels != data.IGNORE
        assert (image[:, ~counts] == 0).all()  # the mean colour
        right = (image[0].float() - (100 * labels + 10)).abs() < 50
        assert right[counts].float().mean() > 0.93  # all but interpolated borders
        ignored += bool((~counts).any())
        shares += float(torch.bincount(labels[counts]).max() / counts.sum()) < 0.75
    assert ignored > 5 and shares > 55


def test_crop_of_one_class_gives_up_after_ten_tries():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    labels = {"labels": torch.full((64, 64), 3, dtype=torch.uint8)}
    _, target = data.SegmentationCrop((32, 32), (1.0, 1.0), (0, 0, 0))(image, labels)
    assert (target["labels"] == 3).all()


def test_distortion_by_its_definition(monkeypatch):
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    decided = torch.ones(5)
    real = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size: decided if size == (5,) else real(*size))
    assert torch.equal(data.distort(image), image)  # nothing happens
    for bits, change in ((0, lambda x, u: x + (64 * u - 32) / 255), (1, lambda x, u: x * (0.5 + u))):
        decided = torch.ones(5)
        decided[bits] = 0.0
        torch.manual_seed(3)
        found = data.distort(image)
        torch.manual_seed(3)
        expected = (255 * change(image / 255, real(()))).clamp(0, 255)
        assert (found.float() - expected).abs().max() <= 1.01
    decided = torch.tensor([1.0, 1, 0, 1, 1])  # saturation leaves grey as it is
    grey = image[:1].expand(3, -1, -1)
    assert (data.distort(grey).int() - grey.int()).abs().max() <= 1
    for channels in (1, 4):
        assert data.distort(torch.rand(channels, 8, 8)).shape == (channels, 8, 8)  # other channels, 16-bit images


def test_fit():
    for (h, w), new in (((300, 400), [64, 85]), ((400, 300), [85, 64]), ((100, 1000), [26, 256])):
        labels = {"labels": torch.zeros(h, w)}
        image, target = data.Fit((64, 64), "seg")(torch.zeros(3, h, w, dtype=torch.uint8), labels)
        assert list(image.shape[1:]) == new and target["labels"].shape == (h, w)


# ---- data


def test_sources_agree_on_the_same_drawings(scenes):
    drawn = common.Shapes((40, 48), 3, "train")
    ade, coco = data.LabelMaps(scenes / "ade", "train", 3, False), data.CocoScenes(scenes / "coco", "train", 3)
    assert ade.classes[1:] == coco.classes == drawn.classes and coco.categories == [5 + 3 * i for i in range(10)]
    for i in range(12):
        name = int(ade.name(i).rsplit("/", 1)[1].removesuffix(".png"))
        labels = drawn.annotations(name)[0]
        image, target = ade.read(i)
        assert torch.equal(target["labels"], labels) and (image.permute(1, 2, 0).numpy() == drawn.draw(name)[0]).all()
        _, boxes, masks, kinds = drawn.annotations(i)
        image, target = coco.read(i)
        keep = slice(0, 0) if i in (0, 1) else slice(None)  # no objects; crowds
        assert torch.equal(target["boxes"], boxes[keep]) and torch.equal(target["labels"], kinds[keep] + 1)
        assert torch.equal(target["masks"].bool(), masks[keep])


def test_zero_is_ignore(scenes):
    kept, shifted = (data.LabelMaps(scenes / "ade", "val", 3, flag).read(0)[1]["labels"] for flag in (False, True))
    assert torch.equal(shifted[kept > 0], kept[kept > 0] - 1) and (shifted[kept == 0] == data.IGNORE).all()


def test_real_ade20k_and_coco(real_data):
    ade = data.LabelMaps(real_data / "ade20k", "train", 3, True)
    assert (len(ade), len(ade.classes), ade.classes[0], ade.classes[149]) == (5, 150, "wall", "flag")
    for i in range(5):
        image, target = ade.read(i)
        stored = np.asarray(Image.open(ade.map_of(ade.name(i)))).astype(int)
        assert ((target["labels"].long().numpy() + 1) % 256 == stored).all() and image.shape[1:] == target["labels"].shape
    coco = data.CocoScenes(real_data / "coco", "train", 3)
    assert len(coco) == 26 and len(coco.classes) == 80
    truth = coco.truth()
    for i, image_id in enumerate(coco.ids):
        image, target = coco.read(i)
        entries = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"] and min(a["bbox"][2:]) >= 1]
        assert len(image) == 3 and len(target["labels"]) == len(entries)
        for entry, box, kind, mask in zip(entries, *(target[name] for name in ("boxes", "labels", "masks")), strict=True):
            assert coco.categories[kind - 1] == entry["category_id"] and (mask.numpy() == truth.annToMask(entry)).all()
            x, y, w, h = entry["bbox"]
            assert box.tolist() == pytest.approx([x, y, x + w, y + h], abs=1e-3)


def test_degenerate_boxes_are_dropped_with_a_count(tmp_path):
    coco_file(tmp_path, (64, 64), [([10, 10, 40, 40], 0), ([5, 5, 5, 30], 0), ([7, 7, 20, 7], 0)])
    source = data.CocoScenes(tmp_path, "train", 3)
    assert source.dropped == 2 and source.read(0)[1]["boxes"].tolist() == [[10, 10, 40, 40]]
    assert len(source.truth().anns) == 1
    output = run_script([*DET, "--data", tmp_path, "--batch_size", 1, "--iters", 1], tmp_path)
    assert output.count("2 degenerate boxes (under a pixel, or without a mask) dropped from the training images") == 1


@pytest.mark.parametrize("task, wrong, words", [
    ("seg", "rm -r images/training", "none of the folders images/training/, images/train/, images/train2017/ is there"),
    ("seg", "rm annotations/training/3.png", "1 of the 12 images in .* have no label map"),
    ("seg", "rm classes.txt", "has no classes.txt: expected a name per line"),
    ("seg", "head -n 4 classes.txt > x; mv x classes.txt", r"number \d+, 4 classes are listed from 0 on; list the background"),
    ("seg", "cp images/training/*.png annotations/training/", r"the label map is \(40, 48, 3\), the image \(40, 48\)"),
    ("det", "rm annotations/*", "cannot read .*instances_train2017.json: .*No such file"),
    ("det", "echo '{' > annotations/instances_train2017.json", "is not in COCO's format, see its top level: "),
    ("det", "echo '{}' > annotations/instances_train2017.json", "COCO's format, see its top level: KeyError 'categories'"),
    ("det", "sed -i 's/\"bbox\"/\"box\"/' annotations/instances_train2017.json", "see annotation 1: KeyError 'bbox'"),
    ("det", "sed -i 's/ations\": .*\\], \"cat/ations\": [], \"cat/' annotations/instances_val2017.json",
     "has no object to learn: of 0 annotations 0 are degenerate"),
    ("det", "sed -i 's/crowd\": 0/crowd\": 1/g' annotations/instances_train2017.json", "has no object to learn"),
    ("det", "sed -i 's/category_id\": 5,/category_id\": 6,/' annotations/instances_train2017.json", "no category 6, or"),
    ("seg", "mv classes.txt objectInfo150.txt", "is ADE20K, whose class numbers begin with 1: add --zero_is_ignore"),
    ("det", "rm images/train2017/*", "unreadable"),
])
def test_wrong_data_is_refused_in_one_line(scenes, tmp_path, task, wrong, words):
    folder = tmp_path / "data"
    shutil.copytree(scenes / {"seg": "ade", "det": "coco"}[task], folder)
    subprocess.run(wrong, shell=True, cwd=folder, check=True)
    code, output = Started([*(SEG if task == "seg" else DET), "--data", folder, "--out", "run"], tmp_path).wait()
    assert code in (1, 2) and "Traceback" not in output and re.search(words, output), output


def test_an_unreadable_image_is_named_and_does_not_count(scenes, tmp_path):
    for task, command in (("ade", SEG), ("coco", DET)):
        shutil.copytree(scenes / task, tmp_path / task)
        (image,) = (tmp_path / task / "images").glob("val*/3.png")
        image.write_bytes(b"no image")
        output = run_script([*command, "--data", tmp_path / task, "--out", f"{task}_run"], tmp_path)
        assert output.count("unreadable, replaced by the next file") == 1 and "3.png" in output


# ---- recipes and schedules


PAPERS = {  # what the papers' text prints
    ("mff", "seg"): {"batch_size": 16, "iters": 160_000}, ("mff", "det"): {"epochs": 25.0, "iters": None},
    ("ddae", "seg"): {"iters": 160_000, "head": "uper", "lr": 4e-4, "weight_decay": 0.05, "batch_size": 16,
                      "warmup_iters": 1500, "schedule": "poly", "power": 1.0, "layer_decay": 0.65, "img_size": (512, 512)},
    ("cim_linear", "seg"): {"lr": 3e-4, "layer_decay": 0.8, "head": "linear", "img_size": (512, 512)},
    ("cim_fcn_80k", "seg"): {"iters": 80_000, "optimizer": "sgd", "betas": (0.9, 0.999), "schedule": "poly", "batch_size": 16,
                             "img_size": (512, 512), "head": "fcn", "model": "resnet50"},
    ("cim_fcn_160k", "seg"): {"iters": 160_000},
    ("ve", "seg"): {"lr": 1e-4, "weight_decay": 0.05, "betas": (0.9, 0.999), "img_size": (512, 512), "optimizer": "adamw"},
    ("ve", "det"): {"epochs": 100.0, "batch_size": 64, "lr": 8e-5, "weight_decay": 0.1, "betas": (0.9, 0.999),
                    "img_size": (768, 768)},
    ("revcol", "seg"): {"iters": 160_000, "lr": 4e-5, "batch_size": 16, "layer_decay": 0.65, "drop_path": 0.1},
    ("revcol", "det"): {"epochs": 50.0, "batch_size": 32, "lr": 1e-4, "jitter": (0.1, 2.0), "drop_path": 0.2,
                        "layer_decay": 0.9},
}


@pytest.mark.parametrize("recipe, task", PAPERS)
def test_recipes_hold_the_papers_numbers(recipe, task):
    cfg = config("--recipe", recipe, "--task", task, "--weights", "none")
    assert {name: getattr(cfg, name) for name in PAPERS[recipe, task]} == PAPERS[recipe, task]
    assert config("--recipe", recipe, "--task", task, "--weights", "none", "--lr", 1, "--iters", 7).iters == 7


def test_annotations_as_labelling_tools_write_them(tmp_path):
    """A crowd without a mask, an area of null, a mask of another size: nothing reaches pycocotools that it fails on."""
    coco_file(tmp_path, (64, 64), [([10, 10, 40, 40], 0), ([5, 5, 30, 30], 1), ([7, 7, 20, 20], 0)])
    path = tmp_path / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]
    content["annotations"][2]["area"] = None
    path.write_text(json.dumps(content))
    source = data.CocoScenes(tmp_path, "val", 3)
    assert source.dropped == 1
    results = transfer.coco_results(1, as_output(source.read(0)[1]), [1])
    assert transfer.average_precision(source.truth(), results, [1])["eval/mask_ap"] == pytest.approx(100)
    content["annotations"][0]["segmentation"]["size"] = [32, 128]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="run lengths of a mask are those of 32 x 128 pixels, not 64 x 64"):
        data.CocoScenes(tmp_path, "val", 3).read(0)


def test_other_classes_are_refused_on_resume(scenes, tmp_path):
    shutil.copytree(scenes / "ade", tmp_path / "ade")
    command = [*SEG, "--data", tmp_path / "ade", "--head", "linear", "--out", "run"]
    run_script([*command, "--iters", 1], tmp_path)
    names = (tmp_path / "ade/classes.txt").read_text().split("\n")
    (tmp_path / "ade/classes.txt").write_text("\n".join([names[1], names[0], *names[2:]]))
    assert "has list of classes 11 names" in run_script([*command, "--iters", 1, "--resume"], tmp_path, expect=2)
    command = [*SEG, "--data", scenes / "ade", "--weights", "run/last.pth", "--iters", 1, "--out", "next"]
    output = run_script(command, tmp_path)
    assert re.search(r"run/last\.pth: (\d+)/\1 tensors loaded", output)  # the encoder of such a run


def test_recipes_cover_the_papers():
    assert PAPERS.keys() == {(name, task) for name, tasks in transfer.RECIPES.items() for task in tasks}


def test_iterations_and_passes_override_each_other():
    assert (config("--weights", "none", "--epochs", 3).iters, config("--weights", "none", "--epochs", 3).epochs) == (None, 3)
    cfg = config("--weights", "none", "--task", "det", "--iters", 160_000)
    assert (cfg.iters, cfg.epochs) == (160_000, None)


def test_learning_rates():
    cfg = config("--weights", "none")  # MAE's
    rate = [transfer.learning_rate(step, cfg, 160_000) for step in range(160_000)]
    assert rate[0] == pytest.approx(1e-10) and rate[1500] == pytest.approx(1e-4 * (1 - 1500 / 160_000))
    assert rate[750] == pytest.approx(1e-4 * (1 - 750 / 160_000) * 0.5, rel=1e-4) and rate[-1] == pytest.approx(1e-4 / 160_000)
    cfg = config("--weights", "none", "--recipe", "cim_fcn_80k")
    assert transfer.learning_rate(0, cfg, 80_000) == pytest.approx(0.01)
    assert transfer.learning_rate(40_000, cfg, 80_000) == pytest.approx((0.01 - 1e-4) * 0.5**0.9 + 1e-4)
    cfg = config("--weights", "none", "--task", "det")  # ViTDet: 163,889 and 177,546 of 184,375
    rates = [transfer.learning_rate(step, cfg, 184_375) for step in (0, 250, 163_888, 163_890, 177_545, 177_547)]
    assert rates == pytest.approx([1e-7, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
    cfg = config("--weights", "none", "--task", "det", "--recipe", "mff")
    assert transfer.learning_rate(500, cfg, 1000) == pytest.approx(4e-5)


@pytest.mark.parametrize("words, message", [
    (["--recipe", "mae"], "--recipe mae is none of --task seg: mff, ddae, cim_linear"),
    (["--recipe", "ddae", "--task", "det"], "--recipe ddae is none of --task det: mff, ve, revcol"),
    (["--head", "fcn"], "--head fcn is not for base"),
    (["--task", "det", "--img_size", "64,96"], "--img_size 64,96: --task det wants one number, a multiple of 32"),
    (["--task", "det", "--img_size", "224", "--patch_size", "14"], "needs a --patch_size of 4, 8, 16 or 32, not 14"),
    (["--task", "det", "--head", "linear"], "--head and --compile are for --task seg"),
    (["--window", "-3"], "must not be negative"),
    (["--iters", "5", "--epochs", "3"], "--iters 5 and --epochs 3.0: give one of them"),
    (["--img_size", "500"], "is not a multiple of --patch_size 16"),
    ([], "--weights FILE is needed"),
    (["--weights", "nowhere.pth"], "nowhere.pth does not exist"),
    (["--demo"], "python mae_mff.py --demo makes it; or --weights none"),
])
def test_wrong_flags_are_refused_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words if "--weights" in words or not words or "--demo" in words else [*words, "--weights", "none"]
    with pytest.raises(SystemExit) as end:
        config(*words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


# ---- runs


@pytest.mark.parametrize("task", ["seg", "det"])
@pytest.mark.parametrize("model", ["nano", "resnet50", "revcol_tiny"])
def test_killed_and_resumed_equals_unbroken_bit_for_bit(scenes, tmp_path, task, model):
    command = [*(SEG if task == "seg" else DET), "--data", scenes / ("ade" if task == "seg" else "coco"), "--workers", 1,
               "--drop_path", 0 if model == "resnet50" else 0.2, "--model", model, "--resnet_width", 8]
    run_script([*command, "--out", "whole"], tmp_path)
    attack = sabotaged(tmp_path, [*command, "--out", "run"], "Run.end_update", "os.kill(os.getpid(), signal.SIGKILL)",
                       "args[0] == 5")
    run_script(attack, tmp_path, expect=-signal.SIGKILL)
    assert "resumed from run/last.pth: step 4" in run_script([*command, "--out", "run", "--resume"], tmp_path)
    first, second = state(tmp_path / "whole"), state(tmp_path / "run")
    assert first.keys() == second.keys() and [name for name in first if not same(first[name], second[name])] == []
    assert {path.name for path in (tmp_path / "run/pictures").iterdir()} == {
        f"step_000000{step}.png" for step in ((4, 8) if task == "seg" else (3, 6))}


def test_two_processes_equal_one(scenes, tmp_path):
    """No BatchNorm, drop path or ignored pixels: the losses are the same; and the scores, of images that 2 does not divide."""
    command = [*SEG, "--data", scenes / "ade", "--head", "linear", "--drop_path", 0, "--jitter", "1,1"]
    for processes in (1, 2):
        run_script([*command, "--out", f"run{processes}"], tmp_path, processes)
    one, two = (log(tmp_path / f"run{processes}") for processes in (1, 2))
    assert one[0].keys() == two[0].keys() and len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=0.05)


def test_scores_are_exact_on_any_number_of_processes(scenes, tmp_path):
    """A learning rate of nearly nothing leaves the weights, so that evaluations compare."""
    for name, command in (("ade", SEG), ("coco", DET)):
        lines = []
        for processes in (1, 2):
            run_script([*command, "--data", scenes / name, "--lr", 1e-12, "--iters", 1, "--pictures", 0, "--out",
                        f"{name}{processes}", *(["--head", "linear"] if name == "ade" else [])], tmp_path, processes)
            lines += [{key: value for key, value in line.items() if key.startswith("eval/")}
                      for line in log(tmp_path / f"{name}{processes}") if "eval" in str(line)]
        assert lines[0] == lines[1] and lines[0]


@pytest.mark.parametrize("task", ["seg", "det"])
def test_an_encoder_pretrained_here_is_loaded_and_the_demo_runs(scenes, small_npz, tmp_path, task):
    run_script(["mae_mff.py", "--demo", "--data", small_npz, "--epochs", 1, "--out", "runs/mae_mff"], tmp_path)
    output = run_script(["transfer_seg_det.py", "--demo", "--task", task, "--iters", 2, "--batch_size", 4, "--pictures", 3,
                         "--data", scenes / ("ade" if task == "seg" else "coco")], tmp_path)
    assert re.search(r"encoder\.pth: (\d+)/\1 tensors loaded; missing: none; unexpected: none", output)
    assert "5 held-out images" in output and f"done: runs/transfer_{task}/model.pth" in output
    with Image.open(tmp_path / f"runs/transfer_{task}/pictures/step_0000002.png") as picture:
        assert picture.height > 3 * data.SHOWN
    meta = torch.load(tmp_path / f"runs/transfer_{task}/model.pth", weights_only=True)["meta"]
    assert meta["task"] == task and len(meta["classes"]) == (11 if task == "seg" else 10)


@pytest.mark.parametrize("task, command", [("seg", SEG), ("det", DET)])
def test_the_docs_code_uses_the_result_as_the_evaluation_does(scenes, tmp_path, monkeypatch, task, command):
    folder = scenes / ("ade" if task == "seg" else "coco")
    run_script([*command, "--data", folder, "--out", "runs/transfer_seg"], tmp_path)
    source = data.open_scenes(small(task, "--data", folder), "val")
    shutil.copy(source.name(2), tmp_path / "photo.jpg")  # a PNG in truth, which does not matter
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs/TRANSFER.md").read_text(), re.DOTALL)[1], found)
    cfg, run = found["cfg"], types.SimpleNamespace(device=torch.device("cpu"), amp_dtype=None)
    batch = data.collate_scenes([data.Scenes(source, data.Fit(cfg.img_size, task), 0, 1)[0, 2]])
    images = common.Normalise(found["mean"], found["std"], run.device)(batch)
    with torch.inference_mode():
        expected = transfer.predict(found["model"], images, cfg, run)
    if task == "seg":
        assert found["labels"].shape == (40, 48)
        torch.testing.assert_close(found["scores"], expected)
    else:
        assert found["found"]["masks"].shape[1:] == (1, 40, 48)
        torch.testing.assert_close(found["found"]["boxes"], expected["boxes"])


def test_drawn_shapes_on_the_command_line(tmp_path):
    output = run_command([*SEG, "--iters", 1, "--pictures", 1], tmp_path)
    assert "step 1, 200 held-out images: miou" in output


def test_docs_name_every_flag_that_they_use():
    flags = set(transfer.Config.__dataclass_fields__)
    for page in ("docs/TRANSFER.md", "README.md"):
        for line in (ROOT / page).read_text().splitlines():
            if "transfer_seg_det.py" in line:
                used = re.findall(r"--(\w+)", line.split("transfer_seg_det.py", 1)[1])
                assert set(used) <= flags, line
