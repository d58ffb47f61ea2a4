"""revcol_v2.py: columns against a slow version on maps, inversion, leakage, memory modes, counts, read-outs."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torture import log

import common
import finetune
import mae_mff
import revcol_v2 as revcol
import transfer_seg_det as transfer


def pretraining(*words):
    cfg = common.parse_config(revcol.Config, revcol.presets, ["--demo", "--amp", "off", *map(str, words)])
    return revcol.MaskedRevCol(cfg), cfg


def randomised(model):
    """Values that are not those of the start: biases, LayerNorms, tokens, scales of both signs."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.3, 0.9)
        if name.endswith(".a"):
            parameter.data *= torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0)
    return model


# ---- cells


@pytest.mark.parametrize("p, grid", [(4, (8, 8)), (8, (2, 5)), (16, (3, 2))])
def test_cells_are_undone_and_hold_the_pixels_of_their_place(p, grid):
    h, w = grid
    images = torch.randn(2, 3, h * p, w * p)
    cells = revcol.to_cells(images, p)
    assert cells.shape == (2, h * w, p * p * 3) and torch.equal(revcol.from_cells(cells, p, grid), images)
    for n in range(h * w):
        i, j = divmod(n, w)
        own = images[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
        assert torch.equal(cells[:, n].sort().values, own.flatten(1).sort().values)
    # the 16 positions are 4 x 4 squares of pixels; `to_map` puts them where they are
    q = p // 4
    tokens = cells.unflatten(2, (16, -1)).flatten(1, 2)
    expected = images.unfold(2, q, q).unfold(3, q, q).permute(0, 2, 3, 4, 5, 1).flatten(3).permute(0, 3, 1, 2)
    assert torch.equal(revcol.to_map(tokens, 0, grid), expected)


@pytest.mark.parametrize("level", range(4))
def test_positions_are_those_of_the_levels_own_grid(level):
    side = (4, 2, 1, 1)[level]
    table = revcol.level_pos_embed(16, level, (3, 2))
    expected = common.sincos_pos_embed(16, (3 * side, 2 * side))[:, 1:].transpose(1, 2).unflatten(2, (3 * side, 2 * side))
    assert torch.equal(revcol.to_map(table, level, (3, 2)), expected)


def test_target_is_maes_in_another_order():
    images = torch.randn(2, 3, 32, 48)
    for normalised in (True, False):
        ours = revcol.from_cells(revcol.cell_target(images, 8, normalised), 8, (4, 6))
        theirs = common.unpatchify(mae_mff.patch_target(images, 8, normalised), 8, (4, 6))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("ratio, img_size, patch_size, cells, kept", [
    (0.75, "32", 4, 64, 16), (0.6, "32", 4, 64, 25), (0.5, "32,48", 8, 24, 12), (0.9, "64", 16, 16, 1),
    (0.75, "224", 16, 196, 49)])
def test_exactly_so_many_cells_are_hidden(ratio, img_size, patch_size, cells, kept):
    model, cfg = pretraining("--mask_ratio", ratio, "--img_size", img_size, "--patch_size", patch_size)
    pred, mask = model.predict(torch.randn(2, 3, *cfg.img_size), torch.rand(2, cells))
    assert mask.sum(1).tolist() == 2 * [cells - kept] and pred.shape == (2, cells, patch_size**2 * 3)
    ids_keep, ids_restore, mask = revcol.random_masking(torch.rand(2, cells), ratio)
    for b in range(2):
        assert (mask[b, ids_keep[b]] == 0).all() and ids_restore[b].sort().values.tolist() == list(range(cells))


# ---- columns


def slow_unit(unit, level, sent_up, sent_down, before):
    """A unit on maps (B, C, h, w): convolutions of 2 x 2 in place of joined neighbours, nearest enlargement for copies."""
    total = 0
    if unit.down is not None and level == 0:
        total = sent_up  # the stem
    elif unit.down is not None:
        linear, ratio = unit.down.proj, unit.down.ratio
        side = 2 if ratio == 4 else 1
        kernel = linear.weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        x = F.conv2d(sent_up, kernel, linear.bias, stride=side)
        total = total + unit.down.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if unit.up is not None:
        x = F.conv2d(sent_down, unit.up.proj.weight[:, :, None, None], unit.up.proj.bias)
        x = unit.up.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        total = total + (F.interpolate(x, scale_factor=2) if unit.up.ratio == 4 else x)
    tokens = total.flatten(2).transpose(1, 2)
    for block in unit.blocks:
        if hasattr(block, "attn"):
            tokens = tokens + block.attn(block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        else:
            tokens = torch.cat([t + block.mlp(block.norm(t)) for t in tokens.split(1, dim=1)], dim=1)
    x = tokens.transpose(1, 2).unflatten(2, total.shape[2:])
    return x if unit.a is None else x + unit.a.view(1, -1, 1, 1) * before


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_columns_against_their_equations_on_maps(columns):
    torch.manual_seed(1)
    model = randomised(revcol.RevColV2("tiny", (16, 24), 8, columns=columns)).eval()
    images, (h, w) = torch.randn(2, 3, 16, 24), (2, 3)
    S = F.conv2d(images, model.stem.weight.unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2), model.stem.bias, stride=2)
    tables = [common.sincos_pos_embed(c, (h * s, w * s))[:, 1:].transpose(1, 2).unflatten(2, (h * s, w * s))
              for c, s in zip(model.channels, (4, 2, 1, 1), strict=True)]
    before, x = [None] * 4, None
    for column in model.bottom_up:
        x = []
        for level in range(4):
            lower = x[level - 1] if level else S + tables[0]
            upper = before[level + 1] if level < 3 else None
            x.append(slow_unit(column.units[str(level)], level, lower, upper, before[level]))
        before = x
    with torch.no_grad():
        encoded = model.encode(images)
    for level in range(4):
        torch.testing.assert_close(revcol.to_map(encoded[level], level, (h, w)), x[level], rtol=1e-4, atol=1e-4)
    before = [map + table for map, table in zip(x, tables, strict=True)]
    for column in model.top_down:
        x = [None] * 4
        for level in (3, 2, 1, 0):
            lower, upper = before[level - 1] if level else None, x[level + 1] if level < 3 else None
            x[level] = slow_unit(column.units[str(level)], level, lower, upper, before[level])
        before = x
    with torch.no_grad():
        maps, features = model.maps(images), model.features(images)
    for level in range(3):
        torch.testing.assert_close(maps[level], x[level], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps[3], F.max_pool2d(x[3], 2, ceil_mode=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features, x[3].mean((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, scale, tolerance", [(torch.float32, None, 1e-3), (torch.float64, 1e-3, 1e-6)])
def test_a_unit_and_whole_columns_are_inverted(dtype, scale, tolerance):
    """Also with the smallest scales that there are, in float64."""
    torch.manual_seed(1)
    model = randomised(revcol.RevColV2("tiny", (16, 16), 4, columns=2)).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".a") and scale:
            parameter.data.sign_().mul_(scale)
    N = 16
    before = [torch.randn(2, N * k, c, dtype=dtype) for k, c in zip(revcol.PER_CELL, model.channels, strict=True)]
    stem = torch.randn(2, N * 16, model.channels[0], dtype=dtype)
    with torch.no_grad():
        for column, seed in ((model.bottom_up[1], stem), (model.top_down[0], None)):
            after, found = column(seed, *before), [None] * 4
            for level in reversed(column.order):
                if seed is not None:  # from the top: what is above has been recovered, what is below is at hand
                    lower, upper = after[level - 1] if level else stem, found[level + 1] if level < 3 else None
                else:  # from the bottom
                    lower, upper = found[level - 1] if level else None, after[level + 1] if level < 3 else None
                found[level] = column.units[str(level)].inverse(after[level], lower, upper)
                torch.testing.assert_close(found[level], before[level], rtol=tolerance, atol=tolerance)
                found[level] = before[level] if scale else found[level]  # 1 / a would enlarge the error from level to level


def test_hidden_cells_leak_nowhere_but_into_the_target():
    model, cfg = pretraining("--patch_size", 8, "--img_size", 32, "--mask_ratio", 0.5)
    randomised(model).eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    ids_keep, ids_restore, mask = revcol.random_masking(noise, 0.5)
    hidden = common.spread(mask[..., None], 8, model.grid).bool()
    other = torch.where(hidden, torch.randn_like(images), images)
    with torch.no_grad():
        levels = zip(model.encode(images, ids_keep), model.encode(other, ids_keep), strict=True)
        assert all(torch.equal(a, b) for a, b in levels)
        assert torch.equal(model.predict(images, noise)[0], model.predict(other, noise)[0])
        target, changed = (revcol.cell_target(x, 8, True) for x in (images, other))
        assert ((target != changed).any(-1) == mask.bool()).all()
        assert model(images, noise)[0] != model(other, noise)[0]
        visible = images.clone()
        visible[:, :, hidden[0, 0].logical_not().nonzero()[0][0], hidden[0, 0].logical_not().nonzero()[0][1]] += 1
        assert not torch.equal(model.encode(images, ids_keep)[0], model.encode(visible, ids_keep)[0])


def test_fine_levels_do_not_mix_cells():
    """A pixel of one cell changes the two fine levels of the first column in that cell alone, the coarse ones everywhere."""
    model = randomised(revcol.RevColV2("tiny", (16, 16), 4, columns=1, read="bottom_up")).eval()
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[:, :, 5, 6] += 1  # cell (1, 1), number 5
    with torch.no_grad():
        for level, (a, b) in enumerate(zip(model.encode(images), model.encode(other), strict=True)):
            changed = (a != b).any(2)[0].view(16, -1).any(1).nonzero().flatten().tolist()
            assert changed == ([5] if level < 2 else list(range(16)))


def test_mask_tokens_fill_the_hidden_cells_of_every_level():
    model, _ = pretraining()
    noise = torch.rand(2, 64)
    ids_keep, ids_restore, mask = revcol.random_masking(noise, 0.75)
    x = [torch.randn(2, 16 * k, c) for k, c in zip(revcol.PER_CELL, model.channels, strict=True)]
    for level, filled in enumerate(model.fill(x, ids_restore, (8, 8))):
        k = revcol.PER_CELL[level]
        cells = (filled - model.pos_embed(level, (8, 8))).unflatten(1, (64, k))
        for b in range(2):
            kept = x[level].unflatten(1, (16, k))[b]
            for n in range(64):
                place = (ids_keep[b] == n).nonzero()
                expected = kept[place[0, 0]] if len(place) else model.mask_tokens[level][0, 0].expand(k, -1)
                torch.testing.assert_close(cells[b, n], expected, rtol=1e-4, atol=1e-5)
                assert bool(mask[b, n]) == (len(place) == 0)


def test_other_sizes_than_that_it_was_built_for():
    torch.manual_seed(1)
    built, fitting = (randomised(revcol.RevColV2("nano", size, 4)).eval() for size in ((32, 32), (16, 24)))
    fitting.load_state_dict(built.state_dict())
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        for a, b in zip(built.maps(images), fitting.maps(images), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(built.features(images), fitting.features(images))


# ---- memory


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 2e-2)])
def test_column_equals_plain(dtype, tolerance, device):
    """Outputs bit for bit; gradients, with drop path; residual streams are float32 throughout."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    images, found = torch.randn(4, 3, 32, 32, device=device), []
    for memory in ("plain", "column"):
        torch.manual_seed(2)
        model = randomised(revcol.RevColV2("tiny", (32, 32), 4, drop_path=0.5, memory=memory)).to(device).train()
        torch.manual_seed(3)
        with common.autocast(images.device, dtype):
            x = model.levels(images)
        assert all(level.dtype == torch.float32 for level in [*x, *model.encode(images)])
        sum(level.square().mean() for level in x).backward()
        found.append((x, [p.grad for p in model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def test_a_further_column_costs_at_most_a_third_of_the_memory():
    """In bytes that autograd stores; what a process really takes is measured by benchmarks/memory.py."""
    stored = {}
    for columns in (1, 3):
        for memory in ("plain", "column"):
            model, sizes = revcol.RevColV2("nano", (32, 32), 4, columns=columns, memory=memory), []

            def note(x, sizes=sizes):
                sizes.append(x.numel() * x.element_size())
                return x

            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                model.levels(torch.randn(2, 3, 32, 32))
            stored[columns, memory] = sum(sizes)
    assert stored[3, "column"] - stored[1, "column"] < 0.33 * (stored[3, "plain"] - stored[1, "plain"])


@pytest.mark.parametrize("script", ["revcol_v2.py", "finetune.py"])
def test_column_equals_plain_on_two_processes(small_npz, tmp_path, script):
    """Also with drop path and an average of the weights (fine-tuning)."""
    ways = {"revcol_v2.py": ("--memory=plain", "--memory=column"), "finetune.py": ("--no-recompute", "--recompute")}[script]
    flags = ["--demo", "--amp", "off", "--workers", 0, "--data", small_npz, "--epochs", 0.5, "--batch_size", 24,
             "--micro_batch", 6, "--log_every", 1]
    flags += {"revcol_v2.py": ["--pictures", 0], "finetune.py": ["--weights", "none", "--model", "revcol_nano", "--drop_path",
                                                                 0.5, "--ema", 0.9]}[script]
    logs = []
    for way in ways:
        run_script([script, *flags, way, "--out", way[2:]], tmp_path, processes=2)
        logs.append([(line["train/loss"], line["grad_norm"]) for line in log(tmp_path / way[2:]) if "train/loss" in line])
    assert len(logs[0]) == 5 and all(a == pytest.approx(b, rel=1e-5) for a, b in zip(*logs, strict=True))


def test_two_forward_passes_before_one_backward_pass():
    for memory in ("plain", "column"):
        model, _ = pretraining("--memory", memory)
        losses = [model(torch.randn(2, 3, 32, 32), torch.rand(2, 64))[0] for _ in range(2)]
        sum(losses).backward()  # the scales were looked after in between


# ---- counts, scales, read-outs


@pytest.mark.parametrize("size, parameters, multiply_adds", [("base", 88, 19), ("large", 327, 67)])
def test_sizes_of_the_supplements_table_5(size, parameters, multiply_adds):
    model = revcol.RevColV2(size, (224, 224), 16).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.03)
    # Attention as plain products: older counters do not know the CPU's fused kernel.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.levels(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.03)  # it counts a multiply-add as two


def test_scales_keep_away_from_0_and_do_not_decay():
    model, cfg = pretraining()
    scales = [unit.a for unit in model.modules() if isinstance(unit, revcol.Unit) and unit.a is not None]
    assert len(scales) == 12 and all((a == 0.5).all() for a in scales)
    scales[0].data[:8] = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 2e-3, -2e-3, 0.7, -0.7])
    model.keep_invertible()
    torch.testing.assert_close(scales[0][:8].detach(), torch.tensor([1e-3, 1e-3, 1e-3, -1e-3, 2e-3, -2e-3, 0.7, -0.7]))
    ids = {id(a) for a in scales}
    for group in common.parameter_groups(model, 0.05):
        assert group["weight_decay"] == 0 or not ids & {id(p) for p in group["params"]}
    scales[0].data.zero_()
    with torch.inference_mode():
        model.features(torch.randn(1, 3, 32, 32))  # every forward pass sees to it
    assert (scales[0] == 1e-3).all()


def test_every_parameter_learns_in_pretraining_and_in_classification():
    model, _ = pretraining()
    model(torch.randn(2, 3, 32, 32), torch.rand(2, 64))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    for mode, absent in (("finetune", 5), ("linear", 1)):
        words = ["--mode", mode, "--weights", "none", "--model", "revcol_tiny", "--patch_size", 4, "--img_size", 32]
        cfg = common.parse_config(finetune.Config, finetune.presets, [*map(str, words)])
        classifier = finetune.RevColClassifier(cfg, 10).train()
        torch.nn.init.normal_(classifier.head.weight if mode == "finetune" else classifier.head[1].weight)
        F.cross_entropy(classifier(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        learns = [p for p in classifier.parameters() if p.requires_grad]
        assert len(learns) > 1 and all(p.grad is not None and p.grad.any() for p in learns)
        assert len(classifier.beside) == absent


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_read_outs_are_parts_of_the_whole(columns):
    torch.manual_seed(1)
    whole = randomised(revcol.RevColV2("tiny", (32, 32), 4, columns=columns)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = {"top": whole.features(images), "bottom_up": whole.encode(images)[3].mean(1)}
        for read, features in expected.items():
            part = revcol.RevColV2("tiny", (32, 32), 4, columns=columns, read=read).eval()
            weights = {name: x for name, x in whole.state_dict().items() if not name.startswith(tuple(part.beside))}
            part.load_state_dict(weights)  # strict: no name too many, none too few
            torch.testing.assert_close(part.features(images), features)
    if columns == 2:
        dense, top = (revcol.RevColV2("base", (224, 224), 16, read=read) for read in ("dense", "top"))
        dropped = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in top.parameters())
        assert round(dropped / 1e6) == int(re.search(r"does not depend on \((\d+) M", revcol.__doc__.replace("\n", " "))[1])


def test_layer_ids_and_drop_path():
    """d + i: depth in the column's own order, plus the column; top-down columns counted on."""
    model = revcol.RevColV2("tiny", (32, 32), 4, drop_path=0.6)  # depths 1, 1, 2, 3
    expected = {"stem.weight": 0, "bottom_up.0.units.0.blocks.0.mlp.fc1.weight": 1, "bottom_up.0.units.1.blocks.0.norm.bias": 2,
                "bottom_up.0.units.2.blocks.1.attn.qkv.weight": 4, "bottom_up.0.units.3.blocks.2.norm1.weight": 7,
                "bottom_up.1.units.0.up.proj.weight": 2, "bottom_up.1.units.3.a": 2, "top_down.0.units.3.down.norm.weight": 3,
                "top_down.0.units.3.blocks.2.mlp.fc2.bias": 5, "top_down.1.units.0.blocks.0.norm.weight": 10,
                "top_down.1.units.0.a": 4, "head.weight": 11, "fc_norm.bias": 11}
    assert {name: model.layer(name) for name in expected} == expected and model.last_layer == 11
    assert {model.layer(name) for name, _ in model.named_parameters()} == set(range(11))
    for columns, read in ((1, "top"), (2, "top"), (3, "dense"), (2, "bottom_up")):  # the head comes right after what is there
        part = revcol.RevColV2("tiny", (32, 32), 4, columns=columns, read=read)
        assert part.last_layer == part.layer("head.weight") == 1 + max(part.layer(name) for name, _ in part.named_parameters())
    for column in [*model.bottom_up, *model.top_down]:
        rates = [block.drop_path for level in column.order for block in column.units[str(level)].blocks]
        assert rates == pytest.approx([0.1 * i for i in range(7)])


@pytest.mark.parametrize("words, message", [
    (["--patch_size", "6", "--img_size", "36"], "--patch_size 6 is no multiple of 4"),
    (["--mask_ratio", "1"], "hides none or all"),
    (["--img_size", "33"], "is not a multiple of --patch_size"), (["--model", "huge"], "invalid choice"),
])
def test_wrong_flags_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        pretraining(*words)
    assert message in capsys.readouterr().err


def test_rectangles_of_one_channel_with_normalised_target_and_a_start_from_weights(small_npz, tmp_path):
    flags = ["--demo", "--data", small_npz, "--epochs", 0.2, "--batch_size", 25, "--norm_pix_loss", "--img_size", "32,48",
             "--in_chans", 1, "--columns", 1]
    run_script(["revcol_v2.py", *flags, "--out", "first"], tmp_path)
    assert next((tmp_path / "first/pictures").iterdir()).stat().st_size > 1000
    for file in ("encoder.pth", "last.pth"):
        output = run_script(["revcol_v2.py", *flags, "--init", f"first/{file}", "--out", f"from_{file}"], tmp_path)
        assert "unexpected: none" in output


def test_its_encoder_serves_every_read_out(small_npz, tmp_path):
    run_script(["revcol_v2.py", "--demo", "--data", small_npz, "--epochs", 0.2, "--batch_size", 25, "--out", "run"], tmp_path)
    assert next((tmp_path / "run/pictures").iterdir()).stat().st_size > 1000
    saved = torch.load(tmp_path / "run/encoder.pth", weights_only=True)
    assert saved["meta"]["model"] == "revcol_nano" and not any(n.startswith(("mask", "pixel")) for n in saved["model"])
    for file in ("encoder.pth", "last.pth"):
        for mode in ("finetune", "linear", "knn"):
            output = run_script(["finetune.py", "--demo", "--mode", mode, "--weights", f"run/{file}", "--data", small_npz,
                                 "--epochs", 1, "--batch_size", 50, "--out", f"{mode}_{file}"], tmp_path)
            assert "unexpected: none" in output and "top-1" in output
    for task in ("seg", "det"):
        cfg = common.parse_config(transfer.Config, transfer.presets,
                                  ["--demo", "--task", task, "--weights", str(tmp_path / "run/encoder.pth")])
        encoder = transfer.make_encoder(cfg)
        common.load_weights(encoder, cfg.weights, ignore=(*common.BESIDE_TRUNK, *encoder.beside))
        maps = encoder(torch.randn(1, 3, *cfg.img_size))
        expected = [(c, cfg.img_size[0] // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
        assert [(x.shape[1], x.shape[2]) for x in maps] == expected
