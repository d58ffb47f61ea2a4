"""transfer_seg_det.py, transfer_data.py: against other libraries' networks, slow counts, values by hand."""

import functools
import json
import math
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, killed, run_script, sabotaged
from malformed import MALFORMED, write_set
from PIL import Image
from torch import nn
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import masks_to_boxes
from torture import log, same, state

import backbones
import coco
import common
import revcol_v2
import transfer_data as data
import transfer_seg_det as transfer

SMALL = ["--demo", "--amp", "off", "--workers", 0, "--warmup_iters", 2, "--log_every", 2, "--save_minutes", 0,
         "--weights", "none", "--pictures", 2, "--eval_every", 2, "--iters", 4]
SEG = ["transfer_seg_det.py", *SMALL, "--channels", 16, "--batch_size", 4]
DET = ["transfer_seg_det.py", *SMALL, "--task", "det", "--channels", 8, "--rois", 8, "--batch_size", 2]
MASK2FORMER = ["transfer_mask2former.py", *SMALL, "--channels", 32, "--queries", 12, "--points", 64,
               "--pixel_layers", 1, "--layers", 1, "--batch_size", 4]
RGB = types.SimpleNamespace(in_chans=3, zero_is_ignore=False, exif="auto")


def config(*words):
    return common.parse_config(transfer.Config, transfer.presets, [*map(str, words)])


def small(task, *words):
    return config("--demo", "--weights", "none", "--task", task, *words)


def scores_of(out):
    """Those of a run's last evaluation."""
    return {name: x for name, x in log(out)[-1].items() if name.startswith("eval/")}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Folders in ADE20K's and in COCO's layout, 12 + 5 drawn images each; ids with gaps, the objects of
    image 1 are crowds, image 0 has none."""
    root = tmp_path_factory.mktemp("scenes")
    for split, ade, boxes, n in (("train", "training", "train2017", 12), ("val", "validation", "val2017", 5)):
        drawn = coco.DrawnScenes(types.SimpleNamespace(img_size=(40, 48), in_chans=3, task="det"), split)
        images, objects = [], []
        for inner in (f"ade/images/{ade}", f"ade/annotations/{ade}", f"coco/images/{boxes}",
                      "coco/annotations"):
            (root / inner).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture, instances, kinds = drawn.draw(i)
            labels = np.append(0, kinds + 1)[instances].astype(np.uint8)
            for pixels, name in ((picture, f"ade/images/{ade}/{i}"), (labels, f"ade/annotations/{ade}/{i}"),
                                 (picture, f"coco/images/{boxes}/{7 * i:012}")):
                Image.fromarray(pixels).save(root / f"{name}.png")
            images.append({"id": 7 * i, "file_name": f"{7 * i:012}.png", "height": 40, "width": 48})
            for entry in drawn.record(i)[3] if i else []:
                runs = {"size": [40, 48], "counts": entry["segmentation"]["counts"].decode()}
                objects.append(entry | {"id": len(objects) + 1, "image_id": 7 * i, "iscrowd": int(i == 1),
                                        "category_id": 3 * entry["category_id"] + 2, "segmentation": runs})
        categories = [{"id": 3 * i + 5, "name": name} for i, name in enumerate(drawn.classes)]
        content = {"images": images, "annotations": objects, "categories": categories[::-1]}
        (root / f"coco/annotations/instances_{boxes}.json").write_text(json.dumps(content))
    (root / "ade/classes.txt").write_text("ground\n" + "\n".join(drawn.classes) + "\n")
    return root


# ---- encoders


def test_vit_maps_equal_timms(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(32, 4, embed_dim=128, depth=4, num_heads=4).eval()
    nn.init.normal_(theirs.cls_token)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    images = torch.randn(2, 3, 32, 32)
    for head, taps, norm in (("uper", [0, 1, 2, 3], False), ("linear", [3], True)):
        encoder = backbones.ViTEncoder(small("seg", "--head", head)).eval()
        common.load_weights(encoder, tmp_path / "timm.pth", ignore=("head.", *encoder.unused_names))
        expected = theirs.forward_intermediates(images, indices=taps, norm=norm, intermediates_only=True)
        assert len(expected) == len(encoder.channels) == len(encoder.strides)
        for found, right in zip(encoder(images), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head, dilate", [("fcn", True), ("uper", False)])
def test_resnet_maps_equal_torchvisions(tmp_path, head, dilate):
    theirs = resnet50(replace_stride_with_dilation=[False, dilate, dilate]).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    ours = backbones.ResNetEncoder(small("seg", "--model", "resnet50", "--head", head)).eval()
    common.load_weights(ours, tmp_path / "resnet.pth", ignore=("fc.",))
    images = torch.randn(1, 3, 64, 64)
    expected = create_feature_extractor(theirs, [f"layer{i}" for i in range(1, 5)])(images).values()
    for x, right, channels, stride in zip(ours(images), expected, ours.channels, ours.strides, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-3, atol=1e-3)
        assert x.shape == (1, channels, 64 // stride, 64 // stride)


@pytest.mark.parametrize("grid, side", [((8, 8), 4), ((7, 5), 3), ((2, 2), 5)])
def test_window_attention_equals_a_loop_over_windows(grid, side):
    (h, w), x = grid, torch.randn(2, math.prod(grid), 8)
    windowed, plain = backbones.WindowAttention(8, 2, grid, side), common.Attention(8, 2)
    plain.load_state_dict(windowed.state_dict())
    padded = torch.zeros(2, side * math.ceil(h / side), side * math.ceil(w / side), 8)
    padded[:, :h, :w] = x.unflatten(1, grid)
    expected = torch.empty_like(padded)
    for i in range(0, padded.shape[1], side):
        for j in range(0, padded.shape[2], side):
            window = padded[:, i : i + side, j : j + side]
            expected[:, i : i + side, j : j + side] = plain(window.flatten(1, 2)).view(window.shape)
    torch.testing.assert_close(windowed(x), expected[:, :h, :w].flatten(1, 2))


def test_taps_windows_and_sizes_of_maps():
    """UperNet's blocks are BEiT's and MAE's, numbered from 1; global attention is ViTDet's, at quarters."""
    for size, taps, quarters in (("tiny", [4, 6, 8, 12], [3, 6, 9, 12]), ("nano", [1, 2, 3, 4], [1, 2, 3, 4]),
                                 ("large", [8, 12, 16, 24], [6, 12, 18, 24])):
        with torch.device("meta"):
            assert backbones.ViTEncoder(small("seg", "--model", size)).taps == taps
            encoder = backbones.ViTEncoder(small("det", "--model", size))
        kinds = [type(block.attn) is backbones.WindowAttention for block in encoder.blocks]
        assert encoder.taps == quarters[-1:] and kinds == [i + 1 not in quarters for i in range(len(kinds))]
    encoder = backbones.make_encoder(small("seg", "--model", "revcol_nano"))
    maps = encoder(torch.randn(2, 3, 24, 40))
    assert [tuple(x.shape[2:]) for x in maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    for model in ("tiny", "resnet50"):
        cfg = config("--weights", "none", "--task", "det", "--img_size", 64, "--model", model)
        detector = transfer.Detector(cfg, 3).eval().model
        maps = detector.backbone(torch.randn(1, 3, 64, 64)).values()
        assert [tuple(x.shape[1:]) for x in maps] == [(256, n, n) for n in (16, 8, 4, 2, 1)]
        assert detector.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))


@pytest.mark.parametrize("model, task", [("nano", "seg"), ("nano", "det"), ("resnet50", "seg"),
                                         ("revcol_nano", "seg")])
def test_layer_decay_and_weight_decay(model, task):
    cfg = small(task, "--model", model, "--resnet_width", 8)
    net = transfer.Segmenter(cfg, 5) if task == "seg" else transfer.Detector(cfg, 5)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = transfer.make_optimizer(net, cfg).param_groups
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    prefix = "encoder." if task == "seg" else "model.backbone.encoder."
    for name, group in found.items():
        inner = name.removeprefix(prefix)
        layer = 5 if inner == name else 0 if not inner.startswith("blocks.") else int(inner.split(".")[1]) + 1
        if model == "revcol_nano":  # five blocks in each of four columns, so 1 to 5 + 3; the head is 9
            layer = 5 if inner == name else net.encoder.layer_id(inner) - 4
        scale = 1.0 if model == "resnet50" else 0.75 ** (5 - layer)
        assert group["lr_scale"] == pytest.approx(scale), name
        vector = net.get_parameter(name).ndim == 1 or name.endswith(("pos_embed", "cls_token"))
        assert group["weight_decay"] == (0.0 if vector else cfg.weight_decay), name


# ---- segmentation


def test_parameter_counts():
    """As docs/TRANSFER.md has them, of 150 and of 80 classes."""
    with torch.device("meta"):
        model = transfer.Segmenter(config("--weights", "none"), 150)
        detector = transfer.Detector(config("--weights", "none", "--task", "det", "--img_size", 512), 80)
    counts = [sum(p.numel() for p in network.parameters()) for network in (model, detector)]
    assert counts[0] == 163_286_828 and f"{counts[1] / 1e6:.1f}" == "111.4"


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
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight)
    pools = zip(ours.pools, theirs.psp_modules.blocks, strict=True)
    pairs = [(ours.bottleneck, theirs.bottleneck), (ours.join, theirs.fpn_bottleneck),
             *zip(ours.laterals, theirs.lateral_convs, strict=True),
             *zip(ours.smooth, theirs.fpn_convs, strict=True),
             *((pool[1], block.layers[1]) for pool, block in pools)]
    for mine, other in pairs:
        mine[0].load_state_dict(other.conv.state_dict())
        mine[1].load_state_dict(other.batch_norm.state_dict())
    ours.classify[1].load_state_dict(theirs.classifier.state_dict())
    maps = [torch.randn(2, c, 40 // 2**i, 24 // 2**i) for i, c in enumerate(channels)]
    torch.testing.assert_close(ours(maps), theirs(maps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model, head, grid", [
    ("nano", "linear", 8), ("resnet50", "fcn", 4), ("revcol_tiny", "uper", 32)])
def test_segmenter_shapes_loss_and_gradients(model, head, grid):
    cfg = small("seg", "--model", model, "--head", head, "--resnet_width", 8)
    model = transfer.Segmenter(cfg, 11).train()
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
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # or DDP would hang
    assert model(images, torch.full_like(labels, data.IGNORE))[0] == 0  # nothing counts: no nan
    assert len(model.eval().scores(images)) == 1  # no auxiliary head in tests


@pytest.mark.parametrize("height, width", [(512, 683), (511, 513), (37, 1030), (1, 1)])
def test_windows_cover_every_pixel_of_any_size_once_averaged(height, width):
    shapes, images = [], torch.randn(1, 3, height, width)

    def scores(x):  # of the pixel alone: windows must not matter
        shapes.append(tuple(x.shape))
        return [torch.cat([x, -x], dim=1)]

    for inference in ("slide", "whole"):
        cfg = config("--weights", "none", "--inference", inference)
        model = types.SimpleNamespace(cfg=cfg, scores=scores)
        expected = torch.cat([images, -images], dim=1)[0]
        torch.testing.assert_close(transfer.Segmenter.predict(model, images), expected)
    windows = math.prod(1 + math.ceil(max(side - 512, 0) / 341) for side in (height, width))
    whole = [max(32, 16 * math.ceil(side / 16)) for side in (height, width)]
    assert shapes == [(windows, 3, 512, 512), (1, 3, *whole)]
    for length in range(512, 3000, 37):  # mmsegmentation's: steps of 341, moved back to the border
        starts = [min(341 * i, length - 512) for i in range((length - 512 + 340) // 341 + 1)]
        assert transfer.window_starts(length, 512) == starts


def test_miou_against_a_loop_over_pixels():
    classes = 6
    matrix, counts = torch.zeros(classes, classes, dtype=torch.int64), np.zeros((classes, classes))
    for _ in range(3):
        labels, predicted = torch.randint(0, 4, (9, 7)), torch.randint(1, 5, (9, 7))  # no class 5 at all
        labels[torch.rand(9, 7) < 0.2] = data.IGNORE
        matrix += transfer.confusion(predicted, labels, classes)
        for truth, guess in zip(labels.flatten().tolist(), predicted.flatten().tolist(), strict=True):
            if truth != data.IGNORE:
                counts[truth, guess] += 1
    iou, accuracy = {}, {}
    for c in range(classes):
        hit, truth, guessed = counts[c, c], counts[c].sum(), counts[:, c].sum()
        if truth + guessed:
            iou[c] = 100 * hit / (truth + guessed - hit)
        if truth:
            accuracy[c] = 100 * hit / truth
    scores = transfer.seg_scores(matrix, [f"c{i}" for i in range(classes)])
    assert len(iou) == 5 and len(accuracy) == 4
    assert scores == pytest.approx({
        "eval/miou": np.mean([*iou.values()]), "eval/macc": np.mean([*accuracy.values()]),
        "eval/aacc": 100 * np.trace(counts) / counts.sum(), **{f"eval/iou/c{c}": x for c, x in iou.items()}})


# ---- detection


def target_of(boxes, kinds, size):
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(kinds, dtype=torch.int64), "masks": masks}


def results_of(image_id, target, categories, scores=None):
    scores = torch.ones(len(target["boxes"])) if scores is None else torch.tensor(scores)
    output = target | {"masks": target["masks"][:, None].float(), "scores": scores}
    return coco.coco_results(image_id, output, categories)


def test_perfect_detections_have_an_ap_of_100(scenes):
    """Crowds are not to be found, and what could not be read does not count."""
    for source in (coco.CocoScenes(scenes / "coco", "val", RGB), coco.DrawnScenes(small("det"), "val")):
        truth, results, n = coco.coco_truth(source), [], min(len(source), 20)
        for i in range(n):
            results += results_of(source.ids[i], source.read(i)[1], source.categories)
        scores = coco.average_precision(truth, results, source.ids[:n])
        assert len(scores) == 4 and [*scores.values()] == pytest.approx([100] * 4)
        some = [result for result in results if result["image_id"] in source.ids[2:4]]
        for images, least, most in ((source.ids[2:4], 99.9, 100.1), (source.ids[:n], 0, 99)):
            assert least < coco.average_precision(truth, some, images)["eval/box_ap"] < most
        assert set(coco.average_precision(truth, [], source.ids).values()) == {0.0}


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade"])
def test_half_precision_does_not_round_boxes(detector):
    """torchvision decodes boxes in the precision of the heads' outputs: bf16 has whole pixels up to 256."""
    words = ["--img_size", 256, "--patch_size", 16, "--detector", detector]
    model = transfer.Detector(small("det", *words), 3).eval()
    for heads in (model.model.roi_heads, *getattr(model.model.roi_heads, "later", ())):
        heads.score_thresh = 0.0
        nn.init.zeros_(heads.box_predictor.bbox_pred.weight)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        boxes = model.predict(torch.randn(1, 3, 256, 256))["boxes"]
    assert boxes.dtype == torch.float32 and (boxes != boxes.bfloat16().float()).float().mean() > 0.5


def test_boxes_are_pooled_from_the_right_maps_whatever_the_first_image():
    model = transfer.Detector(small("det", "--img_size", 128, "--patch_size", 8), 3).eval()
    model.predict(torch.randn(1, 3, 60, 128))  # filled up: its maps look twice as high as it is
    for pool in (model.model.roi_heads.box_roi_pool, model.model.roi_heads.mask_roi_pool):
        assert pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
        fresh = type(pool)(pool.featmap_names, pool.output_size, pool.sampling_ratio)
        maps = {str(i): torch.randn(1, 4, 64 // 2**i, 64 // 2**i) for i in range(4)}
        boxes = [torch.tensor([[0.0, 0, 10, 10], [5, 5, 120, 100], [0, 0, 128, 128]])]
        torch.testing.assert_close(pool(maps, boxes, [(128, 128)]), fresh(maps, boxes, [(128, 128)]))


@pytest.mark.parametrize("model, detector", [
    ("nano", "mask_rcnn"), ("resnet50", "mask_rcnn"), ("revcol_tiny", "cascade")])
def test_detectors_learn_with_all_parameters_even_without_objects(model, detector):
    words = ["--model", model, "--resnet_width", 8, "--detector", detector]
    model = transfer.Detector(small("det", *words), 3).train()
    for n in (1, 0):
        targets = [target_of([[5, 5, 30, 40]][:k], [2][:k], (64, 64)) for k in (n, 0)]
        loss, terms = model(torch.randn(2, 3, 64, 64), targets)
        assert torch.isfinite(loss) and (terms["mask"] > 0) == (n > 0)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # or DDP would hang


# ---- transforms


def test_jitter_keeps_boxes_masks_labels_and_pixels_together():
    """Each object has its own colour: masks cover exactly their colour, boxes their mask."""
    cfg, gone, flips, smaller = small("det", "--jitter", "0.1,2", "--mean", "0,0,0"), 0, 0, 0
    jitter = functools.partial(data.large_scale_jitter, cfg=cfg)
    for seed in range(60):
        torch.manual_seed(seed)
        target = target_of([[4, 6, 30, 20], [40, 10, 60, 50], [10, 30, 20, 45]], [1, 2, 3], (56, 70))
        image, target = jitter(255 * target["masks"], target)
        assert image.shape == (3, 64, 64) and all(type(x) is torch.Tensor for x in target.values())
        masks = data.unpack(target["masks"])
        assert masks.dtype == torch.uint8 and masks.max() == 1  # a byte per pixel
        masks, gone = masks.bool(), gone + (len(masks) < 3)
        for box, kind, mask in zip(target["boxes"], target["labels"], masks, strict=True):
            colour = image[kind - 1] > 127
            # borders: half a pixel
            assert (colour & mask).sum() / (colour | mask).sum() > 0.85 or mask.sum() < 60
            assert torch.equal(masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1]), box)
        x = {int(kind): box[0] for kind, box in zip(target["labels"], target["boxes"], strict=True)}
        flips += {1, 2} <= x.keys() and x[1] > x[2]
        smaller += bool((image[:, :, -8:] == 0).all() and (image[:, -8:] == 0).all())
    assert gone > 5 and flips > 5 and smaller > 5  # all of it has happened
    _, target = jitter(image, target_of([], [], (64, 64)))
    assert target["boxes"].shape == (0, 4) and data.unpack(target["masks"]).shape == (0, 64, 64)


def test_segmentation_crop_keeps_pixels_and_labels_together(monkeypatch):
    monkeypatch.setattr(data, "distort", lambda image: image)
    cfg, ignored, shares = small("seg", "--img_size", "32,48", "--mean", "0,0,0"), 0, 0
    crop = functools.partial(data.segmentation_crop, cfg=cfg)
    for seed in range(60):
        torch.manual_seed(seed)
        labels = torch.zeros(60, 90, dtype=torch.uint8)
        labels[:, 30:] = 1
        labels[20:50, 50:80] = 2
        image, labels = crop((100 * labels + 10)[None].expand(3, -1, -1), labels)
        assert image.shape == (3, 32, 48) and labels.shape == (32, 48) and labels.dtype == torch.uint8
        counts = labels != data.IGNORE
        assert (image[:, ~counts] == 0).all()  # the mean colour
        right = (image[0].float() - (100 * labels.float() + 10)).abs() < 50
        assert right[counts].float().mean() > 0.93  # all but interpolated borders
        ignored += bool((~counts).any())
        shares += float(torch.bincount(labels[counts]).max() / counts.sum()) < 0.75
    assert ignored > 5 and shares > 55
    _, labels = crop(image, torch.full((32, 48), 3, dtype=torch.uint8))  # one class alone: no endless search
    assert set(labels.unique().tolist()) <= {3, data.IGNORE}


def test_distortion_by_its_definition(monkeypatch):
    image, real = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), torch.rand

    def distort(image, *parts):  # brightness, contrast, saturation, hue, contrast first: 0 = happens
        drawn = {(5,): torch.tensor(parts), ((),): torch.tensor(0.75)}
        monkeypatch.setattr(torch, "rand", lambda *size: drawn[size])
        return data.distort(image).float()

    x = image.float()
    for parts, expected in (((1.0, 1, 1, 1, 1), x), ((0.0, 1, 1, 1, 1), x + 16),
                            ((1.0, 0, 1, 1, 1), x * 1.25), ((0.0, 0, 1, 1, 0), (x + 16) * 1.25)):
        assert (distort(image, *parts) - expected.clamp(max=255)).abs().max() <= 1.5
    grey = image[:1].expand(3, -1, -1)
    assert (distort(grey, 1.0, 1, 0, 1, 1) - grey).abs().max() <= 1  # saturation leaves grey as it is
    monkeypatch.setattr(torch, "rand", real)
    for channels in (1, 4):
        assert data.distort(torch.rand(channels, 8, 8)).shape == (channels, 8, 8)  # other channels, 16 bit


# ---- data


def test_sources_agree_on_the_same_drawings(scenes):
    drawn = coco.Shapes((40, 48), 3, "train")
    ade = data.LabelMaps(scenes / "ade", "train", RGB)
    boxes = coco.CocoScenes(scenes / "coco", "train", RGB)
    assert ade.classes[1:] == boxes.classes == drawn.classes
    assert boxes.categories == [5 + 3 * i for i in range(10)]
    for i in range(12):
        for source in (ade, boxes):
            number = int(Path(source.name(i)).stem) // (1 if source is ade else 7)
            picture, instances, kinds = drawn.draw(number)
            image, target = source.read(i)
            assert (image.permute(1, 2, 0).numpy() == picture).all()
            if source is ade:
                assert (target.numpy() == np.append(0, kinds + 1)[instances]).all()
                continue
            # objects, no crowds
            seen = [n for n in range(len(kinds)) if (instances == n + 1).any()] if number > 1 else []
            assert target["labels"].tolist() == [kinds[n] + 1 for n in seen]
            for n, mask, (x1, y1, x2, y2) in zip(seen, target["masks"], target["boxes"].long(), strict=True):
                assert (mask.numpy() == (instances == n + 1)).all() and mask[y1:y2, x1:x2].sum() == mask.sum()
                assert all(edge.any() for edge in (mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1]))


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_annotations_end_in_one_line_or_are_counted(tmp_path, capsys, name):
    root = write_set(tmp_path / "set", MALFORMED[name])
    cfg = small("det", "--data", root)
    if name.startswith(("counted:", "read:")):
        source = transfer.open_scenes(cfg, "train")
        counted = "left out: " in capsys.readouterr().out
        assert counted == name.startswith("counted:")
        target = source.read(0)[1]
        assert len(target["boxes"]) == 2 - counted and target["masks"].sum() == 600 * len(target["boxes"])
        assert coco.coco_truth(source).getAnnIds()
        return
    with pytest.raises(common.UserError, match="instances_train.json") as end:
        transfer.open_scenes(cfg, "train")
    assert "\n" not in str(end.value) and len(str(end.value)) < 400


# ---- label maps of other kinds, rotated photographs


def label_folder(root, maps, classes, **tags):
    """images/{train,val}/N.jpg of noise, with label maps; tags: of the JPEGs."""
    for split in ("train", "val"):
        for i, array in enumerate(maps):
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (*array.shape[:2], 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"images/{split}/{i}.jpg", **tags)
            Image.fromarray(array).save(root / f"annotations/{split}/{i}.png")
    (root / "classes.txt").write_text(classes)
    return small("seg", "--data", root)


def test_masks_of_0_and_255_are_two_classes(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[5:, 10:] = 255
    source = transfer.open_scenes(label_folder(tmp_path, [mask, mask * 0], "ground\nthing"), "val")
    assert torch.equal(source.read(0)[1], torch.from_numpy(mask // 255)) and source.read(1)[1].sum() == 0
    mask[0, 0] = 1  # then 255 is "ignored", as everywhere
    source = transfer.open_scenes(label_folder(tmp_path, [mask], "ground\nthing"), "train")
    assert source.count(source.read(0)[1]) == {0: 20 * 30 - 15 * 20 - 1, 1: 1, -1: 15 * 20}


def test_colours_are_read_by_the_list(tmp_path):
    colours = np.array([[128, 64, 128], [224, 224, 192], [0, 0, 0], [70, 70, 70]], np.uint8)
    places = np.random.default_rng(0).integers(0, 4, (20, 30))
    lines = "road 128 64 128\nignored 224,224,192\nthe ground  0 0 0\nroad 70 70 70\n"
    cfg = label_folder(tmp_path, [colours[places]], lines)
    palette = Image.fromarray(places.astype(np.uint8))
    palette.putpalette(colours.flatten().tolist())
    palette.save(tmp_path / "annotations/val/0.png")
    for split in ("train", "val"):
        source = transfer.open_scenes(cfg, split)
        assert source.classes == ["road", "the ground"]
        assert torch.equal(source.read(0)[1].long(), torch.tensor([0, data.IGNORE, 1, 0])[places])
    (tmp_path / "classes.txt").write_text(lines.replace("70 70 70", "1 2 3"))
    with pytest.raises(ValueError, match="the colour 70 70 70, which"):
        transfer.open_scenes(cfg, "train").read(0)


@pytest.mark.parametrize("orientation", [3, 6])
def test_labels_on_stored_pixels_of_rotated_photographs(tmp_path, orientation):
    """Sizes tell it for quarter turns; a half turn is for --exif to say."""
    tags = Image.Exif()
    tags[274] = orientation
    mask = np.zeros((20, 30), np.uint8)
    mask[2:9, 3:20] = 1
    cfg = label_folder(tmp_path, [mask], "ground\nthing", exif=tags)
    stored = np.array(Image.open(tmp_path / "images/train/0.jpg"))

    def is_stored(exif):
        cfg.exif = exif
        image, labels = transfer.open_scenes(cfg, "train").read(0)
        assert torch.equal(labels, torch.from_numpy(mask))
        return np.abs(image.permute(1, 2, 0).numpy().astype(int) - stored).max() < 10

    assert is_stored("ignore") and is_stored("auto") == (orientation == 6)
    if orientation == 6:
        with pytest.raises(ValueError, match="--exif ignore"):
            is_stored("apply")
    objects = write_set(tmp_path / "boxes", lambda content: None, exif=tags)
    source = transfer.open_scenes(small("det", "--data", objects), "train")
    assert source.turn == (orientation == 3) and source.read(0)[0].shape == (3, 48, 64)


def test_max_detections_bounds_the_score():
    """150 perfect detections of 150 cells: AP 100 if all count, 2/3 of the recall if 100 do."""
    corners = [[10 * (i % 15), 10 * (i // 15), 10 * (i % 15) + 8, 10 * (i // 15) + 8] for i in range(150)]
    target = target_of(corners, [1] * 150, (100, 150))
    objects = [{"image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [x, y, 8, 8], "area": 64,
                "segmentation": [[x, y, x + 8, y, x + 8, y + 8, x, y + 8]]} for x, y, *_ in corners]
    source = coco.DrawnScenes(small("det"), "val")
    source.n, source.ids, source.record = 1, [1], lambda _: ["", 100, 150, objects]
    truth, results = coco.coco_truth(source), results_of(1, target, [1], [1 - i / 200 for i in range(150)])
    for most, ap in ((150, 100), (100, 67 / 101 * 100)):  # 101 recalls, 0 to .66 of them reached
        assert coco.average_precision(truth, results, [1], most)["eval/box_ap"] == pytest.approx(ap)


def edit(path, old, new):
    text = path.read_text()
    path.write_text(re.sub(old, new, text))
    assert path.read_text() != text


COCO = "annotations/instances_train2017.json"
WRONG = [  # task, what happens to the folder, what is named
    ("seg", lambda f: (f / "annotations/training/3.png").unlink(), "1 of 12 images .*training/3.png"),
    ("seg", lambda f: (f / "classes.txt").unlink(), "has no classes.txt"),
    ("seg", lambda f: (f / "classes.txt").write_text("a\nb"), r"number \d+, 2 classes are listed"),
    ("det", lambda f: edit(f / COCO, '"bbox"', '"box"'), "annotation 1, .*bbox.* is missing"),
    ("det", lambda f: edit(f / COCO, 'crowd": 0', 'crowd": 1'), "has no object to learn"),
    ("det", lambda f: edit(f / COCO, 'height": 40', 'height": 41'), "40 x 48 pixels, the image 41 x 48"),
    ("det", lambda f: edit(f / COCO, '"disc"', '"disk"'), "categories .* differ"),
]


@pytest.mark.parametrize("task, spoil, words", WRONG)
def test_wrong_data_is_refused(scenes, tmp_path, task, spoil, words):
    shutil.copytree(scenes / {"seg": "ade", "det": "coco"}[task], tmp_path / "data")
    spoil(tmp_path / "data")
    with pytest.raises((common.UserError, ValueError), match=words):
        source, _ = transfer.open_both(small(task, "--data", tmp_path / "data")).values()
        [source.read(i) for i in range(len(source))]


def test_unreadable_images_are_named_and_do_not_count(scenes, tmp_path):
    for kind, bad in (("coco", "coco/images/val2017/*21.png"), ("ade", "ade/images/training/*.png")):
        shutil.copytree(scenes / kind, tmp_path / kind)
        for image in tmp_path.glob(bad):
            image.write_bytes(b"no image")
    output = run_script([*DET, "--data", "coco", "--iters", 1, "--pictures", 0, "--out", "run"], tmp_path)
    assert output.count("unreadable: ") == 1 and "021.png" in output
    output = run_script([*SEG, "--data", "ade", "--head", "linear", "--out", "none"], tmp_path, expect=1)
    assert "Traceback" not in output and "--max_bad" in output


# ---- recipes, schedules, flags


PAPERS = {  # what the papers' text prints
    "mff_seg": {"batch_size": 16, "iters": 160_000},
    "mff_det": {"epochs": 25.0, "iters": None, "rpn_convs": 1},
    "ddae_seg": {"iters": 160_000, "head": "uper", "lr": 4e-4, "weight_decay": 0.05, "batch_size": 16,
                 "power": 1.0, "warmup_iters": 1500, "schedule": "poly", "layer_decay": 0.65,
                 "img_size": (512, 512)},
    "cim_linear_seg": {"lr": 3e-4, "layer_decay": 0.8, "head": "linear", "img_size": (512, 512)},
    "cim_fcn_80k_seg": {"iters": 80_000, "optimizer": "sgd", "lr": 0.01, "schedule": "poly", "batch_size": 16,
                        "img_size": (512, 512), "head": "fcn", "model": "resnet50"},
    "cim_fcn_160k_seg": {"iters": 160_000},
    "ve_seg": {"lr": 1e-4, "weight_decay": 0.05, "batch_size": 8, "img_size": (512, 512)},
    "ve_det": {"epochs": 100.0, "batch_size": 64, "lr": 8e-5, "weight_decay": 0.1, "img_size": (768, 768)},
    **dict.fromkeys(("revcol_seg", "revcol_l_seg"), {"iters": 160_000, "lr": 4e-5, "batch_size": 16,
                                                     "layer_decay": 0.65, "drop_path": 0.1}),
    "revcol_det": {"epochs": 50.0, "batch_size": 32, "lr": 1e-4, "jitter": (0.1, 2.0), "drop_path": 0.2,
                   "layer_decay": 0.9, "rpn_convs": 2},
    "revcol_l_det": {"epochs": 50.0, "drop_path": 0.3, "layer_decay": 0.9},
    "revcol_cascade_det": {"detector": "cascade", "epochs": 100.0, "batch_size": 64, "lr": 1e-4,
                           "jitter": (0.1, 2.0), "drop_path": 0.2, "layer_decay": 0.9},
    "revcol_l_cascade_det": {"detector": "cascade", "epochs": 100.0, "batch_size": 64, "drop_path": 0.3},
}


def test_recipes_hold_the_papers_numbers():
    files = {path.stem: path.read_text().splitlines() for path in (ROOT / "recipes").glob("*_[sd]e[gt].txt")}
    assert all(re.fullmatch(r"--\w+ \S+  # .+", line) for lines in files.values() for line in lines)
    assert files.keys() - {"demo_seg", "demo_det"} == PAPERS.keys()
    for name, values in PAPERS.items():
        cfg = config("--recipe", name[:-4], "--task", name[-3:], "--weights", "none")
        assert {field: getattr(cfg, field) for field in values} == values
    assert config("--recipe", "revcol", "--weights", "none", "--lr", 7).lr == 7  # a flag wins


def test_learning_rates():
    def rates(steps, total, *words):
        return [transfer.learning_rate(step, config("--weights", "none", *words), total) for step in steps]

    assert rates([0, 750, 1500, 159_999], 160_000) == pytest.approx(  # MAE's
        [1e-10, 1e-4 * (1 - 750 / 160_000) / 2, 1e-4 * (1 - 1500 / 160_000), 1e-4 / 160_000], rel=1e-4)
    found = rates([0, 40_000], 80_000, "--recipe", "cim_fcn_80k")
    assert found == pytest.approx([0.01, (0.01 - 1e-4) * 0.5**0.9 + 1e-4])
    found = rates([0, 250, 163_888, 163_890, 177_545, 177_547], 184_375, "--task", "det")  # ViTDet's
    assert found == pytest.approx([1e-7, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
    assert rates([500], 1000, "--task", "det", "--recipe", "mff") == pytest.approx([4e-5])


@pytest.mark.parametrize("words, message", [
    (["--recipe", "ddae", "--task", "det"], "ddae_det"),
    (["--task", "det", "--img_size", "64,96"], "one number, a multiple of 32"),
    (["--iters", "5", "--epochs", "3"], "give one of them"),
    (["--demo", "--weights", "nowhere.pth"], "nowhere.pth does not exist"),
])
def test_wrong_flags_are_refused_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        config("--weights", "none", *words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


# ---- runs


@pytest.mark.parametrize("kind, command", [
    ("ade", [*SEG, "--model", "nano"]), ("ade", MASK2FORMER),
    ("coco", [*DET, "--model", "resnet50", "--resnet_width", 8, "--detector", "cascade"])])
def test_killed_and_resumed_equals_unbroken_and_is_evaluated_alike(scenes, tmp_path, kind, command):
    """Bit for bit."""
    shutil.copytree(scenes / kind, tmp_path / "data")
    command = [*command, "--data", "data"]
    run_script([*command, "--out", "whole"], tmp_path)
    resume = [*command, "--out", "run", "--resume"]
    # The second dies inside the last evaluation.
    for method, when, step in (("end_update", "count == 3", 2), ("share_bad_files", "self.step == 4", 4)):
        killed(tmp_path, resume, when, f"Run.{method}")
        assert torch.load(tmp_path / "run/last.pth", weights_only=True)["step"] == step
    assert "resumed from run/last.pth: step 4" in run_script(resume, tmp_path)
    assert same(state(tmp_path / "whole"), state(tmp_path / "run"))
    pictures = {path.name for path in (tmp_path / "run/pictures").iterdir()}
    assert pictures == {f"step_000000{step}.png" for step in (2, 4)}
    finished = [command[0], "--mode", "evaluate", "--weights", "run/model.pth", "--data", "data"]
    run_script([*finished, "--amp", "off", "--workers", 0, "--out", "again"], tmp_path)
    assert scores_of(tmp_path / "again") == scores_of(tmp_path / "run")
    if kind == "ade":  # other classes
        edit(tmp_path / "data/classes.txt", "ground", "ceiling")
        assert "has list of classes 11 names" in run_script(resume, tmp_path, expect=2)


@pytest.mark.parametrize("kind, command", [
    ("ade", [*SEG, "--head", "linear", "--drop_path", 0, "--jitter", "1,1"]),
    ("ade", [*MASK2FORMER, "--model", "revcol_nano", "--drop_path", 0]),
    ("coco", [*DET, "--lr", 1e-12, "--iters", 2, "--detector", "cascade"])])
def test_two_processes_equal_one(scenes, tmp_path, kind, command):
    """Losses of models without BatchNorm and drop path, Mask2Former's at the same random places; exact scores
    of detectors that do not move; of images that 2 does not divide."""
    same_places = ("rand = torch.rand; torch.rand = lambda *s, **how: rand(*s, **how) if s[2:] != (2,) else "
                   "(torch.arange(2 * s[1]) * 0.618034 % 1).view(1, -1, 2).expand(*s)")
    lines = []
    for processes in (1, 2):
        words = [*command, "--data", scenes / kind, "--pictures", 0, "--out", f"run{processes}"]
        run_script(sabotaged(tmp_path, words, "Run.start", same_places), tmp_path, processes)
        lines.append(log(tmp_path / f"run{processes}"))
    assert len(lines[0]) == len(lines[1]) > 1 and "eval/" in str(lines)
    for one, two in zip(*lines, strict=True):
        if kind == "ade":
            assert two == pytest.approx(one, rel=1e-4, abs=0.05)
        elif "train/loss" not in one:
            assert one == two


def test_a_skipped_update_leaves_weights_and_statistics(scenes, tmp_path):
    cfg = small("seg", "--data", scenes / "ade", "--batch_size", 4, "--out", tmp_path / "run", "--workers", 0)
    run, source = common.Run(cfg, "test"), transfer.open_scenes(cfg, "train")
    run.start(len(source), steps=2)
    model = transfer.Segmenter(cfg, 11).train()
    optimizer, scaler = transfer.make_optimizer(model, cfg), torch.amp.GradScaler("cpu", enabled=False)
    common.set_lr(optimizer, 1e-3)
    batches = ((images * factor, labels, numbers) for (images, labels, numbers), factor in zip(
        transfer.training_batches(source, run), (math.nan, 1.0), strict=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transfer.train_step(model, batches, optimizer, scaler, run)
    assert run.skipped == "nonfinite" and same(dict(model.state_dict()), before)
    transfer.train_step(model, batches, optimizer, scaler, run)
    assert not run.skipped and not any(torch.equal(x, before[k]) for k, x in model.state_dict().items())


@pytest.mark.parametrize("task", ["seg", "det"])
def test_the_demo_loads_an_encoder_and_the_docs_code_uses_the_result(scenes, tmp_path, monkeypatch, task):
    folder, encoder = scenes / ("ade" if task == "seg" else "coco"), common.ViT("nano", (32, 32), 4)
    monkeypatch.chdir(tmp_path)
    Path("runs/mae_mff").mkdir(parents=True)
    torch.save({"model": encoder.trunk_state(), "meta": {"model": "nano", "patch_size": 4,
                                                         "img_size": (32, 32)}}, "runs/mae_mff/encoder.pth")
    command = ["transfer_seg_det.py", "--demo", "--task", task, "--iters", 1, "--batch_size", 4, "--data",
               folder, "--workers", 0, "--pictures", 0]
    output = run_script([*command, "--out", "runs/transfer_seg"], tmp_path)
    assert re.search(r"encoder\.pth: (\d+)/\1 tensors loaded; missing: none", output)
    assert "5 held-out images" in output and "done: runs/transfer_seg/model.pth" in output
    for file in ("last.pth", "model.pth") if task == "seg" else ():  # both give their encoder
        path = f"runs/transfer_seg/{file}"
        output = run_script([*command, "--weights", path, "--out", file[:-4]], tmp_path)
        assert re.search(rf"{path}: (\d+)/\1 tensors loaded", output)

    source = transfer.open_scenes(small(task, "--data", folder), "val")
    shutil.copy(source.name(2), "photo.jpg")  # a PNG in truth, which does not matter
    found = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs/TRANSFER.md").read_text(), re.DOTALL)[1], found)
    cfg = found["cfg"]
    run = types.SimpleNamespace(cfg=cfg, autocast=torch.no_grad,
                                normalize=common.Normalize(cfg.mean, cfg.std, "cpu"))
    samples = data.Scenes(common.KeyedSamples(source, data.Fit(cfg), 0, 1))
    expected = transfer.predict(found["model"], data.collate_scenes([samples[0, 2]]), run)
    answer = found["labels"] if task == "seg" else found["found"]["boxes"]
    torch.testing.assert_close(answer, expected if task == "seg" else expected["boxes"])


def test_a_revcol_fine_tuned_twice_serves_dense_tasks(scenes, small_npz, tmp_path):
    """Units that a classifier does not use stay as pre-trained, bit for bit; all that the second one can use
    goes on from the first, fc_norm included. (Its rate is too small to change anything.)"""
    encoder = revcol_v2.RevColV2("nano", (32, 32), 4)
    meta = {"method": "revcol_v2", "model": "revcol_nano", "patch_size": 4, "img_size": (32, 32)}
    torch.save({"model": encoder.state_dict(), "meta": meta}, tmp_path / "encoder.pth")
    np.savez(tmp_path / "three.npz", **dict(np.load(small_npz)) | {"labels": np.arange(303) % 3})
    tune = ["finetune.py", "--amp", "off", "--workers", 0, "--epochs", 1, "--batch_size", 125, "--ema", 0.9,
            "--warmup_epochs", 0, "--min_lr", 0]
    run_script([*tune, "--weights", "encoder.pth", "--data", small_npz, "--out", "one"], tmp_path)
    run_script([*tune, "--weights", "one/best.pth", "--data", "three.npz", "--out", "two", "--lr", 1e-12],
               tmp_path)
    before = encoder.state_dict()
    one, two = (common.weights_of(common.read_file(tmp_path / name / "best.pth")) for name in ("one", "two"))
    idle = {name for name in before if re.match(r"top_down\.(0\.units\.[01]|1\.units\.[012])\.", name)}
    assert {name for name in before if torch.equal(one[name], before[name])} == idle
    assert len(one["head.bias"]) == 10 and len(two["head.bias"]) == 3 and (one["fc_norm.weight"] != 1).any()
    assert all((one[name] - two[name]).abs().max() < 1e-9 for name in one if not name.startswith("head."))
    command = [*SEG, "--data", scenes / "ade", "--weights", "two/best.pth", "--iters", 1, "--pictures", 0]
    output = run_script([*command, "--img_size", 32, "--out", "seg"], tmp_path)
    assert re.search(r"two/best\.pth: (\d+)/\1 tensors loaded; missing: none", output)
