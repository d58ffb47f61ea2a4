"""cim.py and convert_dalle.py: tokenizer, its safe conversion, masks, sampling, windows, losses, gradients; the demos."""

import collections
import io
import json
import math
import os
import pickle
import sys
import types

import pytest
import torch
from conftest import run_command, run_script
from PIL import Image
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50

import cim
import common
import convert_dalle
from cim import Config, CorruptedImageModel
from convert_dalle import DVAE

NANO = {"model": "nano", "img_size": (32, 32), "patch_size": 4, "tokenizer": "file"}
NARROW = {"enhancer": "resnet50", "resnet_width": 16, "model": "nano", "img_size": (64, 64), "patch_size": 8,
          "tokenizer": "file"}
MEAN = STD = (0.5, 0.5, 0.5)


def small_tokenizer(cfg, vocab_size=16):
    return DVAE(cfg.grid, vocab_size, 8, cfg.in_chans).requires_grad_(False)


def build(n=3, **values):
    """Model, and what it is called with: pixels, noise, k, tokenizer."""
    cfg = Config(**(NANO | values))
    model = CorruptedImageModel(cfg, 16, *[(0.5,) * cfg.in_chans] * 2)
    pixels, noise = torch.rand(n, cfg.in_chans, *cfg.img_size), torch.rand(n, math.prod(cfg.grid))
    return model, (pixels, noise, torch.tensor(cfg.num_masked[0]), small_tokenizer(cfg))


# ---- the tokenizer


@pytest.fixture(scope="module")
def dalle():
    """The network at its full size, random weights."""
    return DVAE((14, 14)).requires_grad_(False)


def test_dvae_has_openais_names_shapes_and_sizes(dalle):
    encoder, decoder = dalle.encoder.state_dict(), dalle.decoder.state_dict()
    assert (len(encoder), len(decoder)) == (74, 76)
    assert sum(p.numel() for p in encoder.values()) == 53_786_240 and sum(p.numel() for p in decoder.values()) == 43_829_766
    expected = set()
    for with_id in ((2, 3, 4), (1, 2, 3, 4)):
        names = ["blocks.input", "blocks.output.conv"]
        for group in range(1, 5):
            names += [f"blocks.group_{group}.block_1.id_path"] * (group in with_id)
            names += [f"blocks.group_{group}.block_{b}.res_path.conv_{c}" for b in (1, 2) for c in range(1, 5)]
        expected = {f"{name}.{kind}" for name in names for kind in "wb"}
        assert expected == set(encoder if with_id == (2, 3, 4) else decoder)
    assert encoder["blocks.input.w"].shape == (256, 3, 7, 7) and encoder["blocks.output.conv.w"].shape == (8192, 2048, 1, 1)
    assert decoder["blocks.input.w"].shape == (128, 8192, 1, 1) and decoder["blocks.output.conv.w"].shape == (6, 256, 1, 1)
    for half, kernels in ((encoder, (3, 3, 3, 1)), (decoder, (1, 3, 3, 3))):
        assert tuple(half[f"blocks.group_2.block_1.res_path.conv_{c}.w"].shape[-1] for c in range(1, 5)) == kernels
    logits = dalle.logits(torch.rand(1, 3, 112, 112))
    assert logits.shape == (1, 8192, 14, 14)
    assert dalle.pixels(logits.argmax(1).flatten(1)).shape == (1, 3, 112, 112)


def test_encoder_and_decoder_against_the_layers_written_out():
    """Gain 1/64 on the residual branch alone, pools after the blocks, unmapped sigmoid of the first channels."""
    model = DVAE((2, 3), vocab_size=11, width=8)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)

    def conv(x, part, name):
        w = part[f"{name}.w"]
        return F.conv2d(x, w, part[f"{name}.b"], padding=w.shape[-1] // 2)

    def trunk(x, part, resample):
        x = conv(x, part, "blocks.input")
        for g in range(1, 5):
            for b in (1, 2):
                name, y = f"blocks.group_{g}.block_{b}", x
                for c in range(1, 5):
                    y = conv(y.relu(), part, f"{name}.res_path.conv_{c}")
                x = (conv(x, part, f"{name}.id_path") if f"{name}.id_path.w" in part else x) + y / 64
            x = resample(x) if g < 4 else x
        return conv(x.relu(), part, "blocks.output.conv")

    view = torch.rand(2, 3, 16, 24)
    logits = trunk(0.8 * view + 0.1, model.encoder.state_dict(), lambda x: F.max_pool2d(x, 2))
    torch.testing.assert_close(model.logits(view), logits)
    ids = logits.argmax(1).flatten(1)
    assert torch.equal(model.ids(view), ids)
    one_hot = F.one_hot(ids, 11).float().transpose(1, 2).unflatten(2, (2, 3))
    out = trunk(one_hot, model.decoder.state_dict(), lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(model.pixels(ids), ((out[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1))


def test_logits_are_float32_in_low_precision():
    model = DVAE((2, 2), 11, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits, ids = model.logits(torch.rand(1, 3, 16, 16)), model.ids(torch.rand(1, 3, 32, 32))
        assert logits.dtype == torch.float32 and model.pixels(ids).dtype == torch.float32


def test_tokenizer_loss_against_a_slow_version():
    """Likelihood by scipy's Laplace density of the logit, KL from uniform by its entropy."""
    torch.manual_seed(0)
    model, pixels = DVAE((2, 2), 7, 8), torch.rand(2, 3, 16, 16)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    torch.manual_seed(5)
    loss, terms = model(pixels, None, torch.tensor(0.7), torch.tensor(3.0))
    logits = model.logits(pixels)
    torch.manual_seed(5)
    gumbel = -torch.empty_like(logits).exponential_().log()
    means, scales = model.decoder.blocks(((logits + gumbel) / 0.7).softmax(1)).chunk(2, 1)
    x = (0.8 * pixels + 0.1).double().numpy()
    u = torch.from_numpy(x).logit().numpy()
    density = stats.laplace.logpdf(u, means.detach().numpy(), scales.detach().double().exp().numpy())
    q = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, 7).double()
    kl = sum(stats.entropy(row.detach().numpy(), [1 / 7] * 7) for row in q) / len(q)
    assert terms["likelihood"].item() == pytest.approx(density.mean() + math.log(2), rel=1e-4)
    assert terms["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert loss.item() == pytest.approx(3.0 / 192 * kl - density.mean() - math.log(2), rel=1e-4)
    assert terms["tokens_used"].item() == pytest.approx(math.exp(stats.entropy(q.mean(0).detach().numpy())), rel=1e-4)


def test_schedule_of_temperature_and_kl_weight():
    values = [convert_dalle.schedule(progress, 6.6, "cpu") for progress in (0, 0.05, 0.1, 0.25, 0.5, 0.9)]
    assert [v["kl_weight"].item() for v in values] == pytest.approx([0, 3.3, 6.6, 6.6, 6.6, 6.6])
    assert [v["temperature"].item() for v in values][::3] == pytest.approx([1, (1 + 0.0625) / 2])
    assert [v["temperature"].item() for v in values][-2:] == pytest.approx([0.0625] * 2)


# ---- conversion of OpenAI's files


class Fake(nn.Module):
    """Takes the state of one half of the DVAE, split into nested modules as OpenAI's."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            self.place(name.split("."), value)

    def place(self, path, value):
        if len(path) == 1:
            self.register_parameter(path[0], nn.Parameter(value))
        else:
            if path[0] not in self._modules:
                self.add_module(path[0], type(self)({}))
            self._modules[path[0]].place(path[1:], value)


@pytest.fixture
def dall_e(monkeypatch):
    """A module dall_e.encoder with an Encoder class, as the pickles name it; gone again before they are read."""
    modules = {name: types.ModuleType(name) for name in ("dall_e", "dall_e.encoder")}
    modules["dall_e.encoder"].Encoder = type("Encoder", (Fake,), {"__module__": "dall_e.encoder", "__qualname__": "Encoder"})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["dall_e.encoder"].Encoder


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_conversion_reads_both_formats_without_the_library(dalle, dall_e, zipped, tmp_path, monkeypatch, capsys):
    for part in ("encoder", "decoder"):
        module = dall_e(getattr(dalle, part).state_dict())
        module.device, module.relu = torch.device("cpu"), nn.ReLU()  # plain attributes and torch's own modules are there too
        module.up, module.n_hid = nn.Upsample(scale_factor=2), 256
        torch.save(module, tmp_path / f"{part}.pkl", _use_new_zipfile_serialization=zipped)
    for name in ("dall_e", "dall_e.encoder"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert_dalle.py", "encoder.pkl", "decoder.pkl"])
    convert_dalle.main()
    assert capsys.readouterr().out.count("sha256") == 3
    tokenizer = convert_dalle.load_tokenizer("dalle.pth", (14, 14), 3)
    expected = dalle.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tokenizer.state_dict().items())
    assert not any(p.requires_grad for p in tokenizer.parameters()) and tokenizer.vocab_size == 8192
    with pytest.raises(SystemExit) as error:  # a second time: nothing is overwritten
        convert_dalle.main()
    assert error.value.code == 2 and "dalle.pth exists already" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["convert_dalle.py", "decoder.pkl", "encoder.pkl", "--out", "swapped.pth"])
    with pytest.raises(SystemExit):
        convert_dalle.main()
    assert "are they in this order?" in capsys.readouterr().err and not (tmp_path / "swapped.pth").exists()


class Script(nn.Module):
    """A TorchScript module that writes a file as it is loaded."""

    def __init__(self, path):
        super().__init__()
        self.path: str = path

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state
        torch.save(torch.zeros(1), self.path)

    def forward(self, x):
        return x


def test_a_torchscript_archive_is_refused_before_it_runs(tmp_path, monkeypatch):
    path = tmp_path / "encoder.pkl"
    torch.jit.script(Script(str(tmp_path / "written"))).save(str(path))
    torch.jit.load(str(path))
    assert (tmp_path / "written").exists()  # it would
    (tmp_path / "written").unlink()
    with pytest.raises(common.Refused, match="it is a TorchScript archive"):
        convert_dalle.read_pickle(path)
    monkeypatch.setattr(convert_dalle.zipfile, "is_zipfile", lambda _: False)  # an archive that Python reads in another way
    with pytest.raises(common.Refused, match="map_location"):
        convert_dalle.read_pickle(path)
    assert not (tmp_path / "written").exists()


def string(text):
    """Pickle's opcode for a string."""
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def test_a_stand_in_cannot_be_turned_into_a_weapon(tmp_path):
    """torch's older format compares sources, and writes a file named after the class if the class says `dump_patches`."""
    def load(body):
        unpickler = convert_dalle.TensorUnpickler(io.BytesIO(b"\x80\x02" + body + b"."))
        unpickler.persistent_load = lambda saved: pytest.fail("torch's own code was asked about a class")
        return unpickler.load()

    the_class = b"cdall_e\nE\n"
    assert load(the_class) is convert_dalle.StandIn
    state = b"}(" + string("dump_patches") + b"\x88" + string("__name__") + string(f"{tmp_path}/written") + b"u"
    with pytest.raises(TypeError):  # BUILD: attributes for the class itself
        load(the_class + b"N" + state + b"\x86b")
    assert not hasattr(convert_dalle.StandIn, "dump_patches") and convert_dalle.StandIn.__name__ == "StandIn"
    assert load(b"(" + string("module") + the_class + string("source") + string("text") + b"tQ") is convert_dalle.StandIn


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["whole", "inside"])
def test_a_malicious_pickle_is_refused_and_not_run(where, zipped, tmp_path):
    bomb = Bomb(os.system, f"touch {tmp_path}/executed")
    path = tmp_path / "encoder.pkl"
    torch.save(bomb if where == "whole" else collections.OrderedDict(w=torch.ones(1), x=bomb), path,
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(common.Refused, match=r"it asks for '\w+\.system', which no tensor needs"):
        convert_dalle.read_pickle(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch._utils._import_dotted_name", "torch.nn.functional.F.os",
                                  "torch.hub.load", "os.path.join", "dall_e_evil.run", "torch.serialization.load"])
def test_only_tensors_and_stand_ins_are_found(name):
    module, attribute = name.rsplit(".", 1)
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        convert_dalle.TensorUnpickler(io.BytesIO()).find_class(module, attribute)


def test_what_is_no_weights_is_refused_by_what_it_is(tmp_path):
    log = tmp_path / "encoder.pkl"
    log.write_text("--2026-01-01 00:00:00--  https://cdn.openai.com/dall-e/encoder.pkl\nResolving ...")
    with pytest.raises(common.Refused, match="is a download log or a web page, not weights"):
        convert_dalle.read_pickle(log)
    torch.save({"a": 1}, log)
    with pytest.raises(common.Refused, match="holds no weights"):
        convert_dalle.read_pickle(log)
    with pytest.raises(common.Refused, match="does not exist"):
        convert_dalle.read_pickle(tmp_path / "nothing")
    torch.save({"encoder.blocks.input.w": torch.ones(4, 3, 7, 7)}, log)
    with pytest.raises(common.Refused, match="is no tokenizer with encoder and decoder"):
        convert_dalle.load_tokenizer(log, (8, 8), 3)
    grey = DVAE((8, 8), 16, 8, in_chans=1)
    torch.save({"model": grey.state_dict()}, log)
    with pytest.raises(common.Refused, match="for images of 1 channels, --in_chans is 3"):
        convert_dalle.load_tokenizer(log, (8, 8), 3)


# ---- eq. (1): masks


@pytest.mark.parametrize("mask", ["random", "block"])
@pytest.mark.parametrize("values", [{"img_size": (224, 224), "patch_size": 16}, {}, {"img_size": (32, 64)}], ids=str)
def test_exactly_k_are_hidden(mask, values):
    model, (pixels, noise, _, tokenizer) = build(mask=mask, **({"model": "nano"} | values))
    cfg = model.cfg
    if mask == "block":
        noise = torch.stack([cim.block_order(cfg.grid, cfg.num_masked[1]) for _ in noise])
    seen = {cim.draw_num_masked(step, cfg) for step in range(2000)}
    low, high = cfg.num_masked
    assert seen == set(range(low, high + 1))
    if cfg.grid == (14, 14):
        assert (low, high) == (100, 120)
    with torch.no_grad():
        for k in (low, high):
            hidden = model.corrupt(pixels, noise, torch.tensor(k), tokenizer)[1]
            assert hidden.dtype == torch.bool and (hidden.sum(1) == k).all()
            assert (noise[hidden].reshape(len(noise), -1).amax(1) < noise.masked_fill(hidden, math.inf).amin(1)).all()


def test_num_masked_is_uniform_and_depends_on_seed_and_step_alone():
    cfg = Config(tokenizer="file")
    counts = collections.Counter(cim.draw_num_masked(step, cfg) for step in range(21000))
    assert stats.chisquare(list(counts.values())).pvalue > 0.001
    other = Config(tokenizer="file", seed=1)
    assert [cim.draw_num_masked(step, cfg) for step in range(9)] != [cim.draw_num_masked(step, other) for step in range(9)]


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (2, 20), (1, 3)])
def test_blocks_are_laid_one_after_another(grid):
    order = cim.block_order(grid, math.prod(grid) - 1)
    assert len(order.unique()) == len(order) and order.isfinite().all()
    first = (order.floor() == 0).view(grid)
    rows, columns = first.any(1).nonzero(), first.any(0).nonzero()
    box = first[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.all() and first.sum() == box.numel()  # a full rectangle
    if grid == (14, 14):
        sizes = [(cim.block_order(grid, 120) < 1).sum().item() for _ in range(300)]
        assert min(sizes) >= 9 and max(sizes) <= 70 and 30 < sum(sizes) / 300 < 45


# ---- eq. (2): samples


def test_samples_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0, 1.0])
    drawn = cim.sample(logits.expand(40000, 5), "softmax").bincount(minlength=5)
    assert stats.chisquare(drawn.numpy(), 40000 * logits.double().softmax(0).numpy()).pvalue > 0.001
    uniform = cim.sample(logits.expand(40000, 5), "uniform").bincount(minlength=5)
    assert stats.chisquare(uniform.numpy()).pvalue > 0.001
    assert (cim.sample(logits.expand(100, 5), "argmax") == 0).all()
    assert cim.sample(torch.full((4, 7), math.nan), "softmax").shape == (4,)  # no error: the update is skipped later


@pytest.mark.parametrize("values", [NANO, NARROW], ids=["ViT", "ResNet"])
def test_corrupted_image_has_golden_tokens_where_visible(values):
    model, (pixels, noise, k, tokenizer) = build(**values, sampling="uniform")
    seen = []
    original = tokenizer.pixels
    tokenizer.pixels = lambda ids: seen.append(ids) or original(ids)
    corrupted, mask, replaced, _, _ = model.corrupt(pixels, noise, k, tokenizer)
    golden = tokenizer.ids(pixels)
    assert torch.equal(seen[0][~mask], golden[~mask]) and torch.equal(replaced, seen[0] != golden)
    correct = mask & ~replaced
    assert not replaced[~mask].any() and correct.any()  # of 16 tokens one in 16 is hit: hidden, sampled, and not "replaced"
    expected = F.interpolate(original(seen[0]), pixels.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(corrupted, expected)
    assert corrupted.shape == pixels.shape and corrupted.min() >= 0 and corrupted.max() <= 1 and not corrupted.requires_grad


def test_the_tokenizer_sees_the_crop_at_eight_pixels_per_patch():
    for cfg, size in ((Config(tokenizer="x"), (112, 112)), (Config(**NANO), (64, 64)), (Config(**NARROW), (64, 64)),
                      (Config(**(NANO | {"img_size": (32, 64)})), (64, 128))):
        tokenizer = small_tokenizer(cfg)
        pixels = torch.rand(1, 3, *cfg.img_size)
        assert tokenizer.view(pixels).shape[2:] == size and tokenizer.ids(pixels).shape == (1, math.prod(cfg.grid))
        if size == cfg.img_size:
            torch.testing.assert_close(tokenizer.view(pixels), pixels)


# ---- targets and losses


@pytest.mark.parametrize("per_channel", [False, True])
def test_window_statistics_against_a_loop_at_every_pixel(per_channel):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 11, 14) * 3 + 40
    mean, deviation = cim.window_statistics(images, per_channel)
    padded = F.pad(images.double(), (3, 4, 3, 4), mode="reflect")
    for row in range(11):
        for column in range(14):  # padded by three before: the window's offsets are -3 ... +4
            window = padded[:, :, row : row + 8, column : column + 8]
            dims = (2, 3) if per_channel else (1, 2, 3)
            expected = window.mean(dims, keepdim=True), (window.var(dims, correction=0, keepdim=True) + 1e-6).sqrt()
            here = (..., slice(row, row + 1), slice(column, column + 1))
            torch.testing.assert_close(mean[here].double(), expected[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(deviation[here].double(), expected[1], rtol=1e-4, atol=0)


def test_window_normalisation_of_a_constant_image_is_zero():
    for value in (0.0, 1e-3, -2.117903, 1e4):
        mean, deviation = cim.window_statistics(torch.full((1, 3, 32, 32), value))
        normalised = (value - mean) / deviation
        assert normalised.abs().max() <= 1e-3


@pytest.mark.parametrize("kind", ["window", "patch", "none"])
def test_respix_target_and_loss(kind):
    model, (pixels, noise, k, tokenizer) = build(pixel_norm=kind)
    images = pixels * 2 - 1
    target = torch.empty_like(images)
    for b in range(len(images)):
        for row in range(32):
            for column in range(32):
                if kind == "patch":
                    around = images[b, :, row // 4 * 4 : row // 4 * 4 + 4, column // 4 * 4 : column // 4 * 4 + 4]
                    mean, deviation = around.mean(), (around.var() + 1e-6).sqrt()
                elif kind == "window":
                    rows = [min(abs(row + i), 62 - (row + i)) for i in range(-3, 5)]
                    columns = [min(abs(column + i), 62 - (column + i)) for i in range(-3, 5)]
                    around = images[b][:, rows][:, :, columns]
                    mean, deviation = around.mean(), (around.var(correction=0) + 1e-6).sqrt()
                else:
                    mean, deviation = 0, 1
                target[b, :, row, column] = (images[b, :, row, column] - mean) / deviation
    torch.manual_seed(3)
    loss, terms = model(pixels, noise, k, tokenizer)
    torch.manual_seed(3)
    corrupted, _, _, generator_loss, _ = model.corrupt(pixels, noise, k, tokenizer)
    error = (model.enhancer(corrupted * 2 - 1) - target).flatten()
    expected = sum(abs(e) + e * e for e in error.tolist()) / len(error)
    assert terms["enhancer_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(generator_loss.item() + 10 * expected, rel=1e-4)  # table 13's weight
    assert terms["loss"] == loss and not terms["loss"].requires_grad


@pytest.mark.parametrize("values", [NANO, NARROW], ids=["ViT", "ResNet"])
def test_revdet_loss_and_accuracy(values):
    model, (pixels, noise, k, tokenizer) = build(**values, objective="revdet")
    model.eval()
    torch.manual_seed(3)
    loss, terms = model(pixels, noise, k, tokenizer)
    torch.manual_seed(3)
    corrupted, _, replaced, generator_loss, _ = model.corrupt(pixels, noise, k, tokenizer)
    logits = model.enhancer(corrupted * 2 - 1).flatten(1).tolist()
    expected, hits = [], 0
    for row, truths in zip(logits, replaced.tolist(), strict=True):
        for logit, truth in zip(row, truths, strict=True):
            p = 1 / (1 + math.exp(-logit))
            expected.append(-math.log(p if truth else 1 - p))
            hits += (logit > 0) == truth
    assert terms["enhancer_loss"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert loss.item() == pytest.approx(generator_loss.item() + sum(expected) / len(expected), rel=1e-4)  # weight 1
    assert terms["revdet_accuracy"].item() == pytest.approx(hits / len(expected)) and len(expected) == replaced.numel()
    assert terms["replaced"].item() == pytest.approx(replaced.float().mean().item())


def test_token_loss_and_accuracy_over_the_k_hidden_positions():
    model, (pixels, noise, _, tokenizer) = build()
    k = 35
    _, mask, _, loss, terms = model.corrupt(pixels, noise, torch.tensor(k), tokenizer)
    golden, nll, hits = tokenizer.ids(pixels), [], 0
    for b in range(len(pixels)):
        hidden = mask[b].nonzero()[:, 0]
        logits = model.generator((pixels * 2 - 1)[b : b + 1], mask[b : b + 1], hidden[None])[0]
        for row, truth in zip(logits.log_softmax(-1), golden[b, hidden], strict=True):
            nll.append(-row[truth].item())
            hits += row.argmax() == truth
    assert len(nll) == 3 * k
    assert loss.item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert terms["generator_accuracy"].item() == pytest.approx(hits / len(nll))


def test_generator_sees_nothing_of_hidden_patches():
    model, (pixels, noise, k, _) = build()
    mask = noise.argsort(1).argsort(1) < k
    everywhere = torch.arange(64).expand(3, -1)
    hidden = F.interpolate(mask.float().view(3, 1, 8, 8), (32, 32)) > 0
    other = torch.where(hidden, torch.rand_like(pixels), pixels)
    with torch.no_grad():
        assert torch.equal(model.generator(pixels, mask, everywhere), model.generator(other, mask, everywhere))
        assert not torch.equal(model.generator(pixels, ~mask, everywhere), model.generator(other, ~mask, everywhere))


# ---- gradients and sharing


def gradients(model, arguments, part):
    """{name: gradient} of the generator's or the enhancer's loss alone."""
    model.zero_grad()
    torch.manual_seed(7)
    pixels, noise, k, tokenizer = arguments
    corrupted, _, replaced, loss, _ = model.corrupt(pixels, noise, k, tokenizer)
    if part == "enhancer":
        images = model.normalise(pixels)
        mean, deviation = cim.window_statistics(images)
        error = model.enhancer(model.normalise(corrupted)) - (images - mean) / deviation
        loss = 10 * (error.abs().mean() + error.square().mean())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_shared_layers_appear_once_and_receive_both_gradients():
    model, arguments = build()
    names = [name for name, _ in model.named_parameters()]
    shared = [name for name in names if name.startswith(("generator.patch_embed", "generator.blocks.0", "generator.blocks.1"))]
    assert model.generator.blocks[1] is model.enhancer.blocks[1] and model.generator.blocks[2] is not model.enhancer.blocks[2]
    assert not any(name.startswith(("enhancer.patch_embed", "enhancer.blocks.0.", "enhancer.blocks.1.")) for name in names)
    groups = common.parameter_groups(model, 0.05, ("pos_embed", "cls_token"))
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(names) - len([n for n, p in model.named_parameters() if not p.requires_grad])
    by_generator, by_enhancer = (gradients(model, arguments, part) for part in ("generator", "enhancer"))
    assert set(by_generator) & set(by_enhancer) == set(shared) and len(shared) == 2 + 2 * 12
    assert all(name.startswith("generator.") for name in by_generator)  # and never reaches the enhancer's own layers
    assert set(by_enhancer) - set(shared) == {name for name in names if name.startswith("enhancer.")}  # nor the other way
    model.zero_grad()
    torch.manual_seed(7)
    model(*arguments)[0].backward()
    for name, parameter in model.named_parameters():
        both = by_generator.get(name, 0) + by_enhancer.get(name, 0)
        torch.testing.assert_close(parameter.grad, both, rtol=1e-4, atol=1e-6)


def test_positions_and_class_tokens_have_no_weight_decay():
    model, _ = build(share=False)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = common.parameter_groups(model, 0.05, ("pos_embed", "cls_token"))
    free = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {f"{net}.{name}" for net in ("generator", "enhancer") for name in ("pos_embed", "cls_token", "norm.bias")} <= free
    assert not free & {"generator.mask_token", "enhancer.head.weight", "generator.patch_embed.proj.weight"}


@pytest.mark.parametrize("values", [{}, NARROW], ids=["ViT", "ResNet"])
def test_bf16_is_close_to_float32(values):
    model, arguments = build(**values)
    losses = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(1)
        with common.autocast(torch.device("cpu"), dtype):
            losses.append(model(*arguments)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("values", [
    {}, {"share": False}, {"objective": "revdet"}, {"objective": "none"}, {"generator": "mae"}, {"generator": "mae", **NARROW},
    NARROW, {**NARROW, "objective": "revdet"}, {"in_chans": 1, "img_size": (32, 64)}, {"mask": "block", "generator_depth": 2},
    {"generator_init": "file", "freeze_generator": True},
], ids=str)
def test_every_parameter_receives_a_gradient(values):
    model, arguments = build(**values)
    loss, terms = model(*arguments)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == [] and all(torch.isfinite(value) for value in terms.values())
    assert model.cfg.share == (values in ({}, {"objective": "revdet"}) or "mask" in values or "in_chans" in values)
    if model.cfg.freeze_generator:
        assert not any(p.requires_grad for p in model.generator.parameters())
        assert loss.item() == pytest.approx(10 * terms["enhancer_loss"].item())


def test_mae_generator_keeps_visible_pixels_and_draws_the_others_around_its_prediction():
    model, (pixels, noise, k, _) = build(generator="mae", rgb_std=0.01)
    corrupted, mask, replaced, loss, _ = model.corrupt(pixels, noise, k, None)
    assert (mask.sum(1) == 32).all() and torch.equal(mask, replaced)
    patches, original = (common.patchify(x, 4) for x in (corrupted, pixels))
    assert torch.equal(patches[~mask], original[~mask])
    pred = model.generator(pixels * 2 - 1, noise.argsort(1), 32)
    expected = (pred - common.patchify(pixels * 2 - 1, 4)).square()[mask].mean()
    torch.testing.assert_close(loss, expected)
    error = patches[mask] - (pred[mask] + 1) / 2
    inside = (patches[mask] > 0.1) & (patches[mask] < 0.9)
    assert inside.sum() > 1000 and error[inside].std().item() == pytest.approx(0.01, rel=0.1)
    assert not corrupted.requires_grad


# ---- networks


def test_resnet_x1_is_torchvisions():
    ours, theirs = common.ResNet50(), resnet50()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    assert ours.state_dict().keys() == state.keys()
    ours.load_state_dict(state)
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    images = torch.randn(2, 3, 64, 96)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        torch.testing.assert_close(ours(images).flatten(1), theirs(images))


def test_resnet_sizes():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in common.ResNet50(width).parameters()) for width in (64, 128, 256)]
    assert [round(count / 1e6, 1) for count in counts] == [23.5, 93.9, 375.4]


@pytest.mark.parametrize("enhancer", ["vit", "resnet50"])
def test_heads_at_224_px(enhancer):
    for objective, shape in (("respix", (1, 3, 224, 224)), ("revdet", (1, 1, 14, 14))):
        cfg = Config(enhancer=enhancer, model="tiny", resnet_width=16, objective=objective, tokenizer="file")
        model = CorruptedImageModel(cfg, 16, MEAN, STD)
        assert model.enhancer(torch.rand(1, 3, 224, 224)).shape == shape
    assert Config(enhancer="resnet50", tokenizer="file").model == "small"  # the generator's width: 384


def test_vit_head_puts_every_patch_in_its_place():
    """With an identity for the trunk the linear head must give the image back."""
    model, (pixels, *_) = build()
    enhancer = model.enhancer
    enhancer.head = nn.Identity()
    tokens = common.patchify(pixels, 4)
    enhancer.blocks, enhancer.norm = nn.ModuleList(), nn.Identity()
    enhancer.embed, enhancer.prepend_cls = lambda x: tokens, lambda x: torch.cat([x[:, :1], x], 1)
    assert torch.equal(enhancer(pixels), pixels)


def test_beit_initial_values():
    model, _ = build(model="tiny", share=False)
    mae = build(initial="mae")[0].enhancer
    assert mae.pos_embed.requires_grad and torch.equal(mae.pos_embed.data, common.sincos_pos_embed(128, (8, 8)))
    for vit in (model.generator, model.enhancer):
        for number, block in enumerate(vit.blocks, start=1):
            for linear in (block.attn.proj, block.mlp.fc2):
                limit = 0.02 / math.sqrt(2 * number)
                assert limit * 0.99 < linear.weight.abs().max() <= limit * 1.0001
            assert 0.0199 < block.attn.qkv.weight.abs().max() <= 0.02 and not block.attn.qkv.bias.any()
        assert vit.pos_embed.requires_grad and 0 < vit.pos_embed.abs().max() <= 0.02 and vit.cls_token.any()


def test_paper_settings():
    cfg = Config(tokenizer="dalle.pth")
    assert (cfg.model, cfg.epochs, cfg.batch_size, cfg.lr, cfg.min_lr, cfg.weight_decay, cfg.betas, cfg.clip_grad) == (
        "base", 300, 2048, 1.5e-3, 1e-5, 0.05, (0.9, 0.98), 3.0)
    assert (cfg.num_masked, cfg.generator_depth, cfg.warmup_epochs, cfg.patch_size, cfg.img_size, cfg.share) == (
        (100, 120), 4, 10, 16, (224, 224), True)
    assert (cfg.objective, cfg.sampling, cfg.pixel_norm, cfg.mask) == ("respix", "softmax", "window", "random")
    assert not Config(tokenizer="x", enhancer="resnet50").share
    assert Config(tokenizer="x", generator="mae").num_masked == (98, 98)


@pytest.mark.parametrize("values, words", [
    ({"tokenizer": None}, "--tokenizer FILE is needed"), ({"num_masked": (0, 5)}, "--num_masked 0,5 does not lie"),
    ({"num_masked": (5, 64)}, "of 64 patches"), ({"generator_depth": 9}, "--generator_depth 9 must be 2 to 4"),
    ({"generator_depth": 1}, "or from 1: --no-share"),
    ({"objective": "none", "init": "file"}, "goes with neither this nor --init"),
    ({"tokenizer": None, "demo": True, "generator_init": "file"}, "--tokenizer FILE is needed"),
    ({"freeze_generator": True}, "--freeze_generator needs"),
    ({"generator": "mae", "objective": "revdet"}, "--generator mae has no tokens"),
    ({**NARROW, "img_size": (72, 64)}, "that 32 divides"), ({**NARROW, "patch_size": 12, "img_size": (96, 96)}, "divides 32"),
])
def test_settings_that_cannot_be_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Config(**(NANO | values))


# ---- the commands


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.pth"
    torch.save({"model": DVAE((8, 8), 32, 8).state_dict(), "meta": {}}, path)
    return path


QUICK = ["cim.py", "--demo", "--in_chans", 3, "--amp", "off", "--workers", 0, "--batch_size", 50, "--epochs", 0.4]


def test_demo_trains_its_tokenizer_then_vit(tmp_path, small_npz):
    output = run_command([*QUICK, "--data", small_npz, "--epochs", 1.2], tmp_path)
    run = tmp_path / "runs/cim"
    lines = [json.loads(line) for line in (run / "tokenizer/log.jsonl").read_text().splitlines()]
    assert {"train/temperature", "train/kl_weight", "train/kl", "train/likelihood", "train/tokens_used"} <= lines[-1].keys()
    assert "done: runs/cim/tokenizer/last.pth, pictures/, tokenizer.pth" in output
    assert "python finetune.py --demo --mode linear --weights runs/cim/encoder.pth" in output
    common.ViT("nano", (32, 32), 4).load_state_dict(torch.load(run / "encoder.pth", weights_only=True)["model"])  # strict
    with Image.open(run / "pictures/epoch_0001.png") as picture:  # original, masked, four samples, template, output
        assert picture.width == 8 * 132 and picture.height > 8 * 128
    with Image.open(run / "tokenizer/pictures/epoch_0001.png") as picture:
        assert picture.width == 2 * 132
    for path in run.glob("*.pth"):
        path.unlink()
    output = run_script([*QUICK, "--data", small_npz, "--epochs", 1.2, "--resume"], tmp_path)  # stopped before its first update
    assert "resumed from runs/cim/tokenizer/last.pth" in output


def test_resnet_demo_gives_torchvisions_weights_that_finetune_reads(tmp_path, small_npz, tokenizer_file):
    command = [*QUICK, "--data", small_npz, "--enhancer", "resnet50", "--resnet_width", 64, "--tokenizer", tokenizer_file]
    run_script([*command, "--objective", "revdet", "--batch_size", 20, "--epochs", 0.2, "--out", "x1"], tmp_path)
    weights = torch.load(tmp_path / "x1/encoder.pth", weights_only=True)["model"]
    model = resnet50()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], []) and weights["bn1.num_batches_tracked"] == 2
    torch.save(model.state_dict(), tmp_path / "torchvision.pth")
    shape = ["--data", small_npz, "--amp", "off", "--img_size", 64]
    linear = ["--augment", "none", "--batch_size", 50, "--epochs", 1, "--warmup_epochs", 0.1]
    for mode, more in (("knn", []), ("linear", linear)):
        results = []
        for name in ("x1/last.pth", "x1/encoder.pth", "torchvision.pth"):
            run_script(["finetune.py", "--mode", mode, *shape, *more, "--weights", name,
                        "--out", f"{mode}_{name.replace('/', '_')}"], tmp_path)
            log = (tmp_path / f"{mode}_{name.replace('/', '_')}" / "log.jsonl").read_text().splitlines()
            results.append(json.loads(log[-1])["eval/top1"])
        assert results[0] == results[1] == results[2]
    output = run_script(["finetune.py", *shape, "--weights", "x1/encoder.pth", "--batch_size", 25, "--epochs", 0.2,
                         "--warmup_epochs", 0, "--mixup", 0, "--cutmix", 0, "--ema", 0.9, "--out", "tuned"], tmp_path)
    assert "318/320 tensors loaded" in output
    best = torch.load(tmp_path / "tuned/best.pth", weights_only=True)["model"]
    classifier = resnet50(num_classes=10)
    classifier.load_state_dict(best)  # strict
    run_script([*command, "--init", "torchvision.pth", "--batch_size", 20, "--epochs", 0.1, "--out", "again"], tmp_path)
    refused = run_script(["finetune.py", *shape, "--weights", "x1/encoder.pth", "--layer_decay", 0.8, "--out", "no"], tmp_path,
                         expect=2)
    assert "is for ViTs" in refused and refused.count("\n") == 1


def test_generator_first_then_frozen(tmp_path, small_npz, tokenizer_file):
    """A.1; and an MAE's own file for table 10."""
    command = [*QUICK, "--data", small_npz, "--tokenizer", tokenizer_file]
    run_script([*command, "--objective", "none", "--out", "beit"], tmp_path)
    output = run_script([*command, "--generator_init", "beit/last.pth", "--freeze_generator", "--out", "frozen"], tmp_path)
    assert "missing: none; unexpected: none" in output
    before, after = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in ("beit", "frozen"))
    kept = [name for name in before if name.startswith("generator.")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert not (tmp_path / "beit/encoder.pth").exists()
    torch.save({"model": DVAE((8, 8), 32, 8).state_dict()}, tmp_path / "other.pth")
    refused = run_script([*command[:-1], "other.pth", "--generator_init", "beit/last.pth", "--out", "no"], tmp_path, expect=2)
    assert "was trained with another tokenizer" in refused and not (tmp_path / "no").exists()
    command = [*QUICK, "--data", small_npz, "--generator", "mae", "--generator_init"]
    for target, code in (("raw", 0), ("mae", 2)):
        run_script(["mae_mff.py", *QUICK[1:], "--data", small_npz, "--fuse_layers", 3, "--target", target, "--out", target],
                   tmp_path)
        output = run_script([*command, f"{target}/last.pth", "--out", f"with_{target}"], tmp_path, expect=code)
        assert ("predicts normalised pixels" in output) == bool(code)
    assert (tmp_path / "with_raw/encoder.pth").exists()


def test_another_tokenizer_is_refused_on_resume(tmp_path, small_npz, tokenizer_file):
    command = [*QUICK, "--data", small_npz, "--out", "run"]
    run_script([*command, "--tokenizer", tokenizer_file], tmp_path)
    other = tmp_path / "other.pth"
    torch.save({"model": DVAE((8, 8), 32, 8).state_dict()}, other)
    before = (tmp_path / "run/config.json").read_text()
    assert "has tokenizer_sha256" in run_script([*command, "--tokenizer", other, "--resume"], tmp_path, expect=2)
    assert (tmp_path / "run/config.json").read_text() == before
    moved = tmp_path / "moved.pth"
    moved.write_bytes(tokenizer_file.read_bytes())
    assert "resumed from run/last.pth" in run_script([*command, "--tokenizer", moved, "--resume"], tmp_path)


def test_statistics_of_batch_norm_survive_a_skipped_update(small_npz, tmp_path):
    model, arguments = build(**NARROW)
    before = [buffer.clone() for buffer in model.buffers()]
    run = types.SimpleNamespace(device=torch.device("cpu"), amp_dtype=None, seed=lambda *_: None, stop_requested=False,
                                world_size=1, bad_files=types.SimpleNamespace(new={}), stopping=False)
    cfg, plan = model.cfg, types.SimpleNamespace(accum_steps=1)
    optimizer = common.adamw(common.parameter_groups(model, 0.05), cfg.betas)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for bad in (False, True):
        pixels = arguments[0] * (math.nan if bad else 1)
        batch = {"draw": arguments[1], "index": torch.arange(3)}
        stats_, _ = cim.train_step(model, iter([batch]), lambda _, pixels=pixels: pixels,
                                   {"n_masked": arguments[2], "tokenizer": arguments[3]}, optimizer, scaler, 0, cfg, plan, run)
        after = [buffer.clone() for buffer in model.buffers()]
        assert stats_["skipped"] == ("nonfinite" if bad else "") and all(torch.isfinite(buffer).all() for buffer in after)
        assert bad == all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        before = after


def test_own_grey_rectangles_with_their_own_tokenizer(folder, tmp_path):
    shape = ["--data", folder, "--in_chans", 1, "--img_size", "32,64", "--amp", "off", "--workers", 0, "--batch_size", 20,
             "--epochs", 1, "--patch_size", 8, "--pictures", 2]
    run_script(["cim.py", *shape, "--train_tokenizer", "--vocab_size", 16, "--tokenizer_width", 8, "--out", "tokenizer"],
               tmp_path)
    for out, more in (("vit", ["--model", "nano", "--objective", "revdet"]),
                      ("resnet", ["--enhancer", "resnet50", "--resnet_width", 8, "--model", "nano"])):
        run_script(["cim.py", *shape, *more, "--tokenizer", "tokenizer/tokenizer.pth", "--out", out], tmp_path)
        assert (tmp_path / out / "pictures/epoch_0001.png").exists()
        weights = torch.load(tmp_path / out / "encoder.pth", weights_only=True)["model"]
        network = common.ViT("nano", (32, 64), 8, 1) if out == "vit" else common.ResNet50(8, 1)
        network.load_state_dict(weights)  # strict
