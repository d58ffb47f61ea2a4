"""cim.py, convert_dalle.py: tokenizer, safe conversion, masks, samples, targets, losses, gradients; demo."""

import collections
import io
import math
import os
import pickle
import sys
import types

import pytest
import torch
from commands import TOKENIZERS
from conftest import killed, losses, run_script
from PIL import Image
from scipy import stats
from torch import nn
from torch.nn import functional as F

import cim
import common
import convert_dalle
from cim import Config, CorruptedImageModel
from convert_dalle import DVAE

NANO = {"model": "nano", "img_size": (32, 32), "patch_size": 4, "tokenizer": "file"}
RESNET = NANO | {"enhancer": "resnet50", "resnet_width": 16, "img_size": (64, 64), "patch_size": 8}


def build(n=3, in_chans=3, **values):
    """Model, and what it is called with: pixels, noise, k. It normalises to 2 * pixels - 1."""
    half = (0.5,) * in_chans
    cfg = Config(**(NANO | {"in_chans": in_chans, "mean": half, "std": half} | values))
    model = CorruptedImageModel(cfg, cim.BEiTGenerator(cfg, 16))
    model.__dict__["tokenizer"] = DVAE(cfg.grid, 16, 8, cfg.in_chans).requires_grad_(False)
    pixels, noise = torch.rand(n, in_chans, *cfg.img_size), torch.rand(n, math.prod(cfg.grid))
    return model, (pixels, noise, torch.tensor(cfg.num_masked[0]))


def twice(model, arguments):
    """(loss, terms) of the model and what its `corrupt` returns, from the same random numbers."""
    torch.manual_seed(3)
    loss, terms = model(*arguments)
    torch.manual_seed(3)
    return loss, terms, model.corrupt(*arguments)


# ---- the tokenizer


def test_dvae_has_openais_names_and_sizes():
    with torch.device("meta"):
        model = DVAE((14, 14))
    encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
    sizes = [sum(p.numel() for p in part.values()) for part in (encoder, decoder)]
    assert sizes == [53_786_240, 43_829_766]
    parts = (encoder, (2, 3, 4), [3, 3, 3, 1]), (decoder, (1, 2, 3, 4), [1, 3, 3, 3])
    for part, widened, kernels in parts:
        names = ["blocks.input", "blocks.output.conv"]
        names += [f"blocks.group_{g}.block_1.id_path" for g in widened]
        paths = [f"blocks.group_{g}.block_{b}.res_path.conv_" for g in range(1, 5) for b in (1, 2)]
        names += [path + str(c) for path in paths for c in range(1, 5)]
        assert set(part) == {f"{name}.{kind}" for name in names for kind in "wb"}
        assert [part[f"{paths[2]}{c}.w"].shape[-1] for c in range(1, 5)] == kernels


def test_encoder_and_decoder_against_the_layers_written_out():
    """Gain 1/64 on the residual branch alone, pools after the blocks, unmapped sigmoid of the means."""
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
    out = trunk(one_hot, model.decoder.state_dict(), lambda x: F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(model.pixels(ids), ((out[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.logits(view).dtype == model.pixels(ids).dtype == torch.float32


def test_tokenizer_loss_against_a_slow_version():
    """Likelihood by scipy's Laplace density of the logit, KL from uniform by its entropy."""
    model, pixels = DVAE((2, 2), 7, 8), torch.rand(2, 3, 16, 16)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    torch.manual_seed(5)
    loss, terms = model(pixels, torch.tensor(0.7), torch.tensor(3.0))
    logits = model.logits(pixels).detach()
    torch.manual_seed(5)
    gumbel = -torch.empty_like(logits).exponential_().log()
    means, scales = model.decoder.blocks(((logits + gumbel) / 0.7).softmax(1)).detach().double().chunk(2, 1)
    x = (0.8 * pixels + 0.1).double().logit().numpy()
    likelihood = stats.laplace.logpdf(x, means.numpy(), scales.exp().numpy()).mean() + math.log(2)
    q = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, 7).double().numpy()
    kl = sum(stats.entropy(row, [1 / 7] * 7) for row in q) / len(q)
    expected = {"likelihood": likelihood, "kl": kl, "tokens_used": math.exp(stats.entropy(q.mean(0)))}
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(3.0 / 192 * kl - likelihood, rel=1e-4)


def test_schedule_of_temperature_and_kl_weight():
    shares = (0, 0.05, 0.1, 0.25, 0.5, 0.9)
    temperatures, weights = zip(*(convert_dalle.schedule(share, 6.6, "cpu") for share in shares), strict=True)
    assert weights == pytest.approx((0, 3.3, 6.6, 6.6, 6.6, 6.6))
    assert temperatures[:1] + temperatures[3:] == pytest.approx((1, (1 + 0.0625) / 2, 0.0625, 0.0625))


# ---- conversion of OpenAI's files


class Nested(nn.Module):
    """Takes the state of one half of the DVAE, split into nested modules as OpenAI's."""

    def __init__(self, state):
        super().__init__()
        for name in dict.fromkeys(key.split(".")[0] for key in state):
            prefix = f"{name}."
            inner = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            setattr(self, name, type(self)(inner) if inner else nn.Parameter(state[name]))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_conversion_reads_both_formats_without_the_library(zipped, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DVAE.__init__, "__defaults__", (16, 8, 3))  # in place of DALL-E's sizes
    monkeypatch.chdir(tmp_path)
    model = DVAE((14, 14))
    Encoder = type("Encoder", (Nested,), {"__module__": "dall_e.encoder", "__qualname__": "Encoder"})
    with monkeypatch.context() as library:
        for name in ("dall_e", "dall_e.encoder"):
            library.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["dall_e.encoder"].Encoder = Encoder
        for part in ("encoder", "decoder"):
            module = Encoder(getattr(model, part).state_dict())
            module.device, module.relu, module.n_hid = torch.device("cpu"), nn.ReLU(), 256  # as in theirs
            torch.save(module, f"{part}.pkl", _use_new_zipfile_serialization=zipped)

    def convert(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_dalle.py", *arguments])
        convert_dalle.convert()

    convert("encoder.pkl", "decoder.pkl")
    assert capsys.readouterr().out.count("sha256") == 3
    tokenizer, expected = convert_dalle.load_tokenizer("dalle.pth", (14, 14), 3), model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tokenizer.state_dict().items())
    assert not any(p.requires_grad for p in tokenizer.parameters()) and tokenizer.vocab_size == 16
    for arguments, words in ((("encoder.pkl", "decoder.pkl"), "dalle.pth exists already"),
                             (("decoder.pkl", "encoder.pkl", "--out", "swapped.pth"), "in this order?")):
        with pytest.raises(SystemExit) as error:
            convert(*arguments)
        assert error.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "swapped.pth").exists()


def read_pickle(path):
    return common.read_file(path, load=convert_dalle.unpickle)


def test_a_torchscript_archive_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """Reading it runs its code."""
    path = tmp_path / "encoder.pkl"
    torch.jit.script(nn.ReLU()).save(str(path))
    monkeypatch.setattr(torch._C, "import_ir_module", lambda *_: pytest.fail("it was read"))
    with pytest.raises(common.UserError, match="it is a TorchScript archive"):
        read_pickle(path)
    monkeypatch.setattr(convert_dalle.zipfile, "is_zipfile", lambda _: False)  # torch alone sees it
    with pytest.raises(common.UserError, match="map_location"):
        read_pickle(path)


def test_a_stand_in_cannot_be_turned_into_a_weapon(tmp_path):
    """torch's older format writes a file named after a class that has `dump_patches`."""
    def load(body):
        unpickler = convert_dalle.TensorUnpickler(io.BytesIO(b"\x80\x02" + body + b"."))
        unpickler.persistent_load = lambda saved: pytest.fail("torch's own code was asked about a class")
        return unpickler.load()

    def string(text):
        return b"X" + len(text).to_bytes(4, "little") + text.encode()

    the_class = b"cdall_e\nE\n"
    path = string(f"{tmp_path}/written")
    state = b"}(" + string("dump_patches") + b"\x88" + string("__name__") + path + b"u"
    with pytest.raises(TypeError):  # BUILD: attributes for the class itself
        load(the_class + b"N" + state + b"\x86b")
    assert not hasattr(convert_dalle.StandIn, "dump_patches")
    saved = b"(" + string("module") + the_class + string("source") + string("text") + b"tQ"
    assert load(saved) is load(the_class) is convert_dalle.StandIn


class Bomb:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(inside, zipped, tmp_path):
    bomb, path = Bomb(os.system, (f"touch {tmp_path}/executed",)), tmp_path / "encoder.pkl"
    content = collections.OrderedDict(w=torch.ones(1), x=bomb) if inside else bomb
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(common.UserError, match=r"it asks for '\w+\.system', which no tensor needs"):
        read_pickle(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch._utils._import_dotted_name",
                                  "torch.nn.functional.F.os", "torch.hub.load", "dall_e_evil.run"])
def test_only_tensors_and_stand_ins_are_found(name):
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        convert_dalle.TensorUnpickler(io.BytesIO()).find_class(*name.rsplit(".", 1))


@pytest.mark.parametrize("content, words", [
    ({"encoder.blocks.input.w": torch.ones(4, 3, 7, 7)}, "no tokenizer with encoder and decoder"),
    (DVAE((8, 8), 16, 8, in_chans=1).state_dict(), "of 1 channels, --in_chans is 3"),
])
def test_what_is_no_tokenizer_is_refused(content, words, tmp_path):
    torch.save({"model": content}, tmp_path / "file.pth")
    with pytest.raises(common.UserError, match=words):
        convert_dalle.load_tokenizer(tmp_path / "file.pth", (8, 8), 3)
    with pytest.raises(common.UserError, match="it holds no weights"):
        read_pickle(tmp_path / "file.pth")


# ---- eqs. (1) and (2): masks and samples


@pytest.mark.parametrize("mask", ["random", "block"])
@pytest.mark.parametrize("values", [{"img_size": (224, 224), "patch_size": 16}, {"img_size": (32, 64)}])
def test_exactly_k_are_hidden(mask, values):
    model, (pixels, noise, _) = build(mask=mask, **values)
    low, high = model.cfg.num_masked
    if mask == "block":
        noise = torch.stack([cim.block_order(model.cfg.grid, high) for _ in noise])
    with torch.no_grad():
        for k in (low, high):
            hidden = model.corrupt(pixels, noise, torch.tensor(k))[1]
            largest, rest = noise[hidden].view(len(noise), k), noise.masked_fill(hidden, math.inf)
            assert (largest.amax(1) < rest.amin(1)).all()


def test_num_masked_is_uniform_and_depends_on_seed_and_step_alone():
    cfg, other = Config(tokenizer="file"), Config(tokenizer="file", seed=1)
    counts = collections.Counter(cim.sample_num_masked(step, cfg) for step in range(21000))
    assert set(counts) == set(range(100, 121)) and stats.chisquare(list(counts.values())).pvalue > 0.001
    assert any(cim.sample_num_masked(step, cfg) != cim.sample_num_masked(step, other) for step in range(9))


@pytest.mark.parametrize("grid", [(14, 14), (2, 20), (1, 3)])
def test_blocks_are_laid_one_after_another(grid):
    order = cim.block_order(grid, math.prod(grid) - 1)
    assert len(order.unique()) == len(order) and order.isfinite().all()
    first = (order.floor() == 0).view(grid)
    rows, columns = first.any(1).nonzero(), first.any(0).nonzero()
    box = first[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.all() and first.sum() == box.numel()  # a full rectangle
    if grid == (14, 14):
        sizes = [(cim.block_order(grid, 120) < 1).sum().item() for _ in range(300)]
        # BEiT's areas: uniform from 16 to what is to be covered, as far as rounding and the grid allow
        assert min(sizes) >= 9 and 100 < max(sizes) <= 140 and 55 < sum(sizes) / 300 < 75


def test_samples_follow_the_softmax():
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0, 1.0])
    for sampling, p in (("softmax", logits.double().softmax(0)), ("uniform", torch.full((5,), 0.2).double())):
        count = cim.sample(logits.expand(40000, 5), sampling).bincount(minlength=5)
        assert stats.chisquare(count.numpy(), 40000 * (p / p.sum()).numpy()).pvalue > 0.001
    assert (cim.sample(logits.expand(100, 5), "argmax") == 0).all()
    assert cim.sample(torch.full((4, 7), math.nan), "softmax").shape == (4,)  # no error: skipped later


@pytest.mark.parametrize("values", [{}, RESNET, {"img_size": (32, 64)}], ids=["ViT", "ResNet", "rectangle"])
def test_corrupted_image_has_golden_tokens_where_visible(values):
    model, (pixels, noise, k) = build(**values, sampling="uniform")
    seen, original, golden = [], model.tokenizer.pixels, model.tokenizer.ids(pixels)
    model.tokenizer.pixels = lambda ids: seen.append(ids) or original(ids)
    corrupted, mask, replaced, _, _ = model.corrupt(pixels, noise, k)
    assert torch.equal(seen[0][~mask], golden[~mask]) and torch.equal(replaced, seen[0] != golden)
    assert not replaced[~mask].any() and (mask & ~replaced).any()  # one hidden token in 16 is hit by chance
    expected = F.interpolate(original(seen[0]), pixels.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(corrupted, expected)
    assert corrupted.min() >= 0 and corrupted.max() <= 1 and not corrupted.requires_grad
    assert model.tokenizer.view(pixels).shape[2:] == tuple(8 * n for n in model.cfg.grid)


# ---- targets and losses


@pytest.mark.parametrize("kind, per_channel, side", [
    ("window", False, 8), ("window", True, 8), ("window", False, 2), ("patch", False, 8), ("none", False, 8)])
def test_respix_target_and_loss(kind, per_channel, side):
    """Windows: offsets -3 to +4, reflected, biased variance, all channels or each; patches: MAE's."""
    model, arguments = build(2, pixel_norm=kind, window_per_channel=per_channel, window=side)
    images = arguments[0] * 2 - 1
    target = images.clone()
    for row in range(32 if kind != "none" else 0):
        for column in range(32):
            if kind == "patch":
                rows, columns = (range(at // 4 * 4, at // 4 * 4 + 4) for at in (row, column))
            else:
                places = ([at + i for i in range(1 - side // 2, side // 2 + 1)] for at in (row, column))
                rows, columns = ([min(abs(i), 62 - i) for i in place] for place in places)
            around = images[:, :, list(rows)][..., list(columns)].flatten(2 if per_channel else 1)
            variance, mean = torch.var_mean(around, -1, correction=int(kind == "patch"))
            mean, variance = (x if per_channel else x[:, None] for x in (mean, variance))
            target[..., row, column] = (images[..., row, column] - mean) / (variance + 1e-6).sqrt()
    loss, terms, (corrupted, _, _, generator_loss, _) = twice(model, arguments)
    error = (model.enhancer(corrupted * 2 - 1) - target).flatten()
    expected = sum(abs(e) + e * e for e in error.tolist()) / len(error)
    assert terms["enhancer_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(generator_loss.item() + 10 * expected, rel=1e-4)  # table 13's weight


@pytest.mark.parametrize(("offset", "size", "before"), [(0, 8, 3), (0.999, 8, 3), (-2.1, 8, 3), (0, 5, 2)])
def test_window_statistics_of_nearly_flat_areas_keep_their_digits(offset, size, before):
    """A white page with faint marks, against two local passes in float64."""
    images = offset + 1e-4 * torch.randn(1, 3, 24, 24)
    images[..., 8:, 8:] += 1.7  # an edge
    mean, deviation = cim.window_statistics(images, size=size)
    padded = F.pad(images.double(), (before, size - 1 - before) * 2, mode="reflect")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    expected = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
    variance, average = torch.var_mean(expected, -1, correction=0)
    torch.testing.assert_close(mean[:, 0], average.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(deviation[:, 0], (variance + 1e-6).sqrt().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("values", [{}, RESNET], ids=["ViT", "ResNet"])
def test_revdet_loss_and_what_it_has_learned(values):
    model, arguments = build(**values, objective="revdet")
    loss, terms, (corrupted, _, replaced, generator_loss, _) = twice(model.eval(), arguments)
    logits, truths = model.enhancer(corrupted * 2 - 1).flatten().tolist(), replaced.flatten().tolist()
    pairs = list(zip(logits, truths, strict=True))
    expected = sum(math.log(1 + math.exp(-logit if truth else logit)) for logit, truth in pairs) / len(pairs)
    assert terms["enhancer_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(generator_loss.item() + expected, rel=1e-4)  # weight 1
    above = [a > b for a, x in pairs for b, y in pairs if x and not y]
    assert terms["revdet_auc"].item() == pytest.approx(sum(above) / len(above), rel=1e-4)
    share = sum(truths) / len(truths)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert terms["revdet_gain"].item() == pytest.approx(entropy - expected, abs=1e-4)
    assert terms["replaced"].item() == pytest.approx(sum(truths) / len(truths))


def test_token_loss_and_accuracy_over_the_k_hidden_positions():
    model, (pixels, noise, _) = build()
    _, mask, _, loss, terms = model.corrupt(pixels, noise, torch.tensor(35))
    golden, nll, hits = model.tokenizer.ids(pixels), [], 0
    for b in range(len(pixels)):
        hidden = mask[b].nonzero()[:, 0]
        logits = model.generator((pixels * 2 - 1)[b : b + 1], mask[b : b + 1], hidden[None])[0]
        for row, truth in zip(logits.log_softmax(-1), golden[b, hidden], strict=True):
            nll.append(-row[truth].item())
            hits += row.argmax() == truth
    assert len(nll) == 3 * 35 and loss.item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert terms["generator_accuracy"].item() == pytest.approx(hits / len(nll))


def test_generator_sees_nothing_of_hidden_patches():
    model, (pixels, noise, k) = build()
    mask, everywhere = noise.argsort(1).argsort(1) < k, torch.arange(64).expand(3, -1)
    hidden = F.interpolate(mask.float().view(3, 1, 8, 8), (32, 32)) > 0
    other = torch.where(hidden, torch.rand_like(pixels), pixels)
    with torch.no_grad():
        for m, equal in ((mask, True), (~mask, False)):
            first, second = (model.generator(images, m, everywhere) for images in (pixels, other))
            assert torch.equal(first, second) == equal


# ---- gradients, sharing, networks


def test_the_enhancers_gradient_reaches_shared_layers_and_never_the_generators_own():
    model, arguments = build()
    names, found = [name for name, p in model.named_parameters() if p.requires_grad], []
    shared = [name for name in names if name.startswith(tuple(
        f"generator.{part}" for part in ("patch_embed", "blocks.0.", "blocks.1.")))]
    assert {name.split(".")[0] for name in model.state_dict()} == {"generator", "enhancer"}  # no tokenizer
    assert len(shared) == 2 + 2 * 12 and not any(f"enhancer.{name[10:]}" in names for name in shared)
    for loss in (lambda: model.corrupt(*arguments)[3], lambda: model(*arguments)[0]):
        model.zero_grad()
        torch.manual_seed(7)
        loss().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    by_generator, by_both = found
    assert list(by_both) == names
    assert list(by_generator) == [name for name in names if name.startswith("generator.")]
    for name in by_generator:
        equal = torch.allclose(by_both[name], by_generator[name], rtol=1e-4, atol=1e-7)
        assert equal == (name not in shared), name


@pytest.mark.parametrize("values", [
    {}, {"share": False}, {"objective": "revdet"}, {"objective": "none"}, RESNET,
    {"in_chans": 1, "img_size": (32, 64)}, {"generator_init": "file", "freeze_generator": True},
], ids=str)
def test_every_parameter_receives_a_gradient_and_bf16_is_close(values):
    check_gradients(*build(**values))


def check_gradients(model, arguments):
    torch.manual_seed(1)
    loss, terms = model(*arguments)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(torch.isfinite(value) for value in terms.values())
    if model.cfg.freeze_generator:
        assert not any(p.requires_grad for p in model.generator.parameters())
        assert loss.item() == pytest.approx(10 * terms["enhancer_loss"].item())
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*arguments)[0].item() == pytest.approx(loss.item(), rel=0.05)


def test_beit_initial_values():
    for vit in build(share=False)[0].children():
        for number, block in enumerate(vit.blocks, start=1):
            limit = 0.02 / math.sqrt(2 * number)
            for linear in (block.attn.proj, block.mlp.fc2):
                assert limit * 0.99 < linear.weight.abs().max() <= limit * 1.0001
            assert 0.0199 < block.attn.qkv.weight.abs().max() <= 0.02 and not block.attn.qkv.bias.any()
        assert vit.pos_embed.requires_grad and 0 < vit.pos_embed.abs().max() <= 0.02 and vit.cls_token.any()


@pytest.mark.parametrize("values", [
    {"tokenizer": None}, {"num_masked": (5, 64)}, {"generator_depth": 9}, {"freeze_generator": True},
    {**RESNET, "img_size": (72, 64)}], ids=str)
def test_settings_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match="--(tokenizer|num_masked|generator|freeze|objective|img_size)"):
        Config(**(NANO | values))


# ---- the commands

QUICK = ["--demo", "--in_chans", 3, "--amp", "off", "--workers", 0, "--pictures", 0, "--log_every", 1]
QUICK += ["--batch_size", 50, "--epochs", 0.4]


def read(path):
    return torch.load(path, weights_only=True)


def test_the_demo_trains_its_tokenizer_and_goes_on_where_it_was_stopped(tmp_path, small_npz):
    """In two processes, of which one is killed."""
    command = ["cim.py", *QUICK, "--data", small_npz, "--save_minutes", 0, "--pictures", 1, "--out"]
    output = run_script([*command, "whole"], tmp_path, 2)
    assert "--weights whole/encoder.pth --out whole_finetune" in output
    common.ViT("nano", (25, 25), 5).load_state_dict(read(tmp_path / "whole/encoder.pth")["model"])
    for picture, columns in (("pictures", 8), ("tokenizer/pictures", 2)):
        with Image.open(tmp_path / f"whole/{picture}/epoch_0001.png") as image:
            assert image.width > columns * 120
    where = "self.method == 'convert_dalle' and self.step == 3 and rank == 0"
    command += ["run", "--resume"]
    killed(tmp_path, command, where, processes=2)
    assert not (tmp_path / "run/last.pth").exists()
    assert "resumed from run/tokenizer/last.pth" in run_script(command, tmp_path, 2)
    for name in ("tokenizer/last.pth", "last.pth"):
        first, second = (read(tmp_path / out / name)["model"] for out in ("whole", "run"))
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_two_processes_equal_one(tmp_path, small_npz):
    command = ["cim.py", *QUICK, "--data", small_npz, "--tokenizer", TOKENIZERS / "tokenizer.pth"]
    command += ["--sampling", "argmax"]
    for processes in (1, 2):
        run_script([*command, "--out", str(processes)], tmp_path, processes)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-4)


def test_generator_first_then_frozen(tmp_path, small_npz):  # A.1
    command = ["cim.py", *QUICK, "--data", small_npz, "--tokenizer", TOKENIZERS / "tokenizer.pth"]
    frozen = [*command, "--generator_init", "beit/last.pth", "--freeze_generator"]
    run_script([*command, "--objective", "none", "--out", "beit"], tmp_path)
    assert "missing: none; ignored: none" in run_script([*frozen, "--out", "frozen"], tmp_path)
    before, after = (read(tmp_path / name / "last.pth")["model"] for name in ("beit", "frozen"))
    generator = [name for name in before if name.startswith("generator.")]
    assert generator and all(torch.equal(before[name], after[name]) for name in generator)
    other = ["--tokenizer", tmp_path / "other.pth"]
    torch.save({"model": DVAE((8, 8), 32, 8).state_dict()}, other[1])
    refused = run_script([*frozen, *other, "--out", "no"], tmp_path, expect=2)
    assert "was trained with another tokenizer" in refused and not (tmp_path / "no").exists()


def test_statistics_of_batch_norm_survive_a_skipped_update():
    model, (pixels, noise, _) = build(**RESNET)
    run = common.Run(model.cfg, "cim")
    run.accum_steps = 1
    optimizer = common.adamw(common.parameter_groups(model, 0.05), model.cfg.betas)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for factor in (1, math.nan):
        before = [buffer.clone() for buffer in model.buffers()]
        cim.train_step(model, iter([(factor * pixels, noise, torch.arange(3))]), optimizer, scaler, run)
        equal = all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
        assert equal == (run.skipped == "nonfinite") == math.isnan(factor)


def test_own_grey_rectangles_with_their_own_tokenizer(folder, tmp_path):
    shape = ["--data", folder, "--in_chans", 1, "--img_size", "32,64", "--patch_size", 8, "--amp", "off",
             "--workers", 0, "--batch_size", 20, "--epochs", 1, "--pictures", 2]
    tokenizer = ["convert_dalle.py", "--train", *shape, "--vocab_size", 16, "--tokenizer_width", 8]
    run_script([*tokenizer, "--out", "tokenizer"], tmp_path)
    shape += ["--tokenizer", "tokenizer/tokenizer.pth", "--model", "nano"]
    for out, network, flags in (
        ("vit", common.ViT("nano", (32, 64), 8, 1), ["--objective", "revdet"]),
        ("resnet", common.ResNet50(8, 1), ["--enhancer", "resnet50", "--resnet_width", 8]),
    ):
        run_script(["cim.py", *shape, *flags, "--out", out], tmp_path)
        network.load_state_dict(read(tmp_path / out / "encoder.pth")["model"])  # strict
        assert (tmp_path / out / "pictures/epoch_0001.png").exists()
