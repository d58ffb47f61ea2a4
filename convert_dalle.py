"""DALL-E's image tokenizer: the network, a safe conversion of public files, training of smaller ones.

Ramesh et al., Zero-Shot Text-to-Image Generation, arXiv 2102.12092 (appendix A). `cim.py` uses it.

OpenAI's encoder.pkl and decoder.pkl are whole pickled modules. Unpickling runs whatever such a file says, and
the modules in them fail on current torch. So an unpickler reads them that knows tensors and nothing else: a
class of dall_e or torch.nn becomes an empty stand-in, any other name is refused. Only tensors are written.
VQGAN's checkpoints (vqgan.py) are read in the same way, with stand-ins for pytorch_lightning's classes.

    wget https://cdn.openai.com/dall-e/encoder.pkl https://cdn.openai.com/dall-e/decoder.pkl
    python convert_dalle.py encoder.pkl decoder.pkl --out dalle.pth
    python convert_dalle.py last.ckpt --out vqgan.pth

Training uses DALL-E's loss and, our choice, a shorter schedule; it writes runs/tokenizer/tokenizer.pth.

    python convert_dalle.py --train --data PHOTOS --out runs/tokenizer
"""

import argparse
import functools
import hashlib
import math
import pickle
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    Normalize,
    RandomResizedCrop,
    RunConfig,
    UserError,
    adamw,
    exit_with,
    interpolate,
    launch,
    load_weights,
    open_data,
    parameter_groups,
    patch_grid,
    read_file,
    save_image_grid,
    set_lr,
    warmup_cosine,
    weights_of,
    write_atomically,
)

# ---- the network: a discrete VAE, with the parameter names of the released files ---------------------------


class Conv(nn.Module):
    """Convolution of stride 1 that keeps the size; parameters w (out, in, k, k) and b (out,)."""

    def __init__(self, n_in, n_out, k):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, k, k) / math.sqrt(n_in * k * k))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    def __init__(self, n_in, n_out, kernels):
        super().__init__()
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths, layers = [n_in, *[n_out // 4] * 3, n_out], OrderedDict()
        for i, k in enumerate(kernels):
            layers |= {f"relu_{i + 1}": nn.ReLU(), f"conv_{i + 1}": Conv(widths[i], widths[i + 1], k)}
        self.res_path = nn.Sequential(layers)

    def forward(self, x):
        return self.id_path(x) + self.res_path(x) / 64  # 1 / (number of blocks)^2, as released


class Upsample(nn.Module):
    def forward(self, x):
        return interpolate(x, scale_factor=2)


def half(first, widths, kernels, resample, last):
    """Encoder or decoder: convolution `first`, four groups of two blocks resampled in between, `last`."""
    n_in, parts = len(first.w), OrderedDict(input=first)
    for i, width in enumerate(widths, start=1):
        group = OrderedDict(block_1=ResidualBlock(n_in, width, kernels))
        group["block_2"] = ResidualBlock(width, width, kernels)
        if i < len(widths):
            group["resample"] = resample
        parts[f"group_{i}"], n_in = nn.Sequential(group), width
    parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
    return nn.ModuleDict({"blocks": nn.Sequential(parts)})


class DVAE(nn.Module):
    """Images in [0, 1] <-> ids of visual tokens on the grid (h, w), 8 x 8 pixels of an (8h, 8w) image each.

    The defaults are DALL-E's: 53,786,240 parameters in the encoder, 43,829,766 in the decoder.
    """

    def __init__(self, grid, vocab_size=8192, width=256, in_chans=3):
        super().__init__()
        self.grid, self.vocab_size, widths = grid, vocab_size, [width * 2**i for i in range(4)]
        first, last = Conv(in_chans, width, 7), Conv(8 * width, vocab_size, 1)
        self.encoder = half(first, widths, (3, 3, 3, 1), nn.MaxPool2d(2), last)
        first, last = Conv(vocab_size, width // 2, 1), Conv(width, 2 * in_chans, 1)
        self.decoder = half(first, widths[::-1], (1, 3, 3, 3), Upsample(), last)
        self.to(memory_format=torch.channels_last)

    def view(self, pixels):
        """(B, C, H, W) -> (B, C, 8h, 8w), in [0, 1]: what the encoder sees."""
        return F.interpolate(pixels, [8 * n for n in self.grid], mode="bicubic", antialias=True).clamp(0, 1)

    def logits(self, view):
        """(B, C, 8h, 8w) -> (B, vocab_size, h, w) float32, in whatever precision the rest runs."""
        x = self.encoder.blocks[:-1](0.8 * view + 0.1)
        with torch.autocast(view.device.type, enabled=False):
            return self.encoder.blocks.output(x.float())

    @torch.no_grad()
    def ids(self, pixels):
        """(B, C, H, W) -> the most probable tokens, (B, L) int64."""
        return self.logits(self.view(pixels)).argmax(1).flatten(1)

    def distribution(self, x):
        """Output of the decoder's first convolution (B, width / 2, h, w) -> means and log scales, each
        (B, C, 8h, 8w) float32, of the logit of 0.8 * pixel + 0.1."""
        return self.decoder.blocks[1:](x).float().chunk(2, dim=1)

    @torch.no_grad()
    def pixels(self, ids):
        """(B, L) -> (B, C, 8h, 8w) in [0, 1]. The first convolution of a one-hot input looks up a column."""
        first = self.decoder.blocks.input
        x = F.embedding(ids.unflatten(1, self.grid), first.w.flatten(1).T) + first.b
        means, _ = self.distribution(x.permute(0, 3, 1, 2))
        return ((means.sigmoid() - 0.1) / 0.8).clamp(0, 1)

    def forward(self, pixels, temperature, kl_weight):
        """Training, on pixels (B, C, H, W) in [0, 1]: the loss and its terms.

        loss = kl_weight * KL / values per token - log likelihood per value; KL from a uniform use of tokens;
        logit-Laplace without constants, of relaxed tokens. tokens_used: exp(entropy of their mean use).
        """
        view = self.view(pixels)
        logits, squeezed = self.logits(view), 0.8 * view + 0.1
        gumbel = -torch.empty_like(logits).exponential_().log()
        relaxed = ((logits + gumbel) / temperature).softmax(1)
        means, log_scales = self.distribution(self.decoder.blocks.input(relaxed))
        with torch.autocast(pixels.device.type, enabled=False):
            likelihood = -((squeezed.logit() - means).abs() * (-log_scales).exp() + log_scales).mean()
            log_q = logits.log_softmax(1)
            kl = (log_q.exp() * log_q).sum(1).mean() + math.log(self.vocab_size)
            loss = kl_weight / (64 * view.shape[1]) * kl - likelihood
            use = log_q.detach().exp().mean((0, 2, 3))
            used = torch.special.entr(use).sum().exp()
            mse = ((means.sigmoid() - squeezed) / 0.8).square().mean()
        terms = {"loss": loss, "likelihood": likelihood, "kl": kl, "mse": mse, "tokens_used": used,
                 "temperature": temperature, "kl_weight": kl_weight}
        return loss, {name: value.detach() for name, value in terms.items()}


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_tokenizer(path, grid, in_chans, device="cpu"):
    """Frozen DVAE or VQGAN from a file of this script, of its weights' sizes. `digest`: the file's
    SHA-256."""
    content = read_file(path)
    weights = weights_of(content)
    network = DVAE
    names = "encoder.blocks.input.w", "encoder.blocks.output.conv.w", "decoder.blocks.input.w"
    if "quantize.embedding.weight" in weights:
        from vqgan import VQGAN as network  # a script that is copied elsewhere runs without it

        names = "encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_in.weight"
    if not set(names) <= weights.keys():
        raise UserError(f"{path} is no tokenizer with encoder and decoder: give a file of convert_dalle.py")
    first, entries, _ = (weights[name] for name in names)
    width, channels = first.shape[:2]
    if channels != in_chans:
        raise UserError(f"{path} is a tokenizer for images of {channels} channels, --in_chans is {in_chans}")
    more = () if network is DVAE else entries.shape[1:]  # channels of VQGAN's codebook
    tokenizer = network(grid, len(entries), width, in_chans, *more)
    load_weights(tokenizer, path, content=content)
    tokenizer.digest = sha256(path)
    return tokenizer.to(device).eval().requires_grad_(False)


# ---- training ----------------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    patch_size: int = 16  # pixels of the crop for each token; resized to 8
    vocab_size: int = 1024  # visual tokens; DALL-E's has 8192
    tokenizer_width: int = 64  # channels at full resolution; DALL-E's has 256
    kl_weight: float = 6.6  # of the KL divergence from uniform use; more of it uses more of the tokens
    epochs: float = 30.0  # passes over the data
    batch_size: int = 256  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of one process; default: the largest up to 256
    lr: float = 1e-3  # peak learning rate, absolute
    min_lr: float = 1e-5  # where the cosine ends
    warmup_epochs: float | None = None  # linear warm-up; default a fifth of the epochs, at most 10
    weight_decay: float = 1e-4  # AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip_grad: float = 3.0  # largest gradient norm; 0 = no clipping
    pictures: int = 8  # images drawn at each epoch's end; 0 = none

    def __post_init__(self):
        super().__post_init__()
        self.grid = patch_grid(self.img_size, self.patch_size)
        self.warmup_epochs = min(10.0, self.epochs / 5) if self.warmup_epochs is None else self.warmup_epochs


DEMO = {"data": "shapes", "img_size": (32, 32), "in_chans": 1, "patch_size": 4, "vocab_size": 64,
        "tokenizer_width": 8, "kl_weight": 5.0, "epochs": 0.2, "batch_size": 8, "lr": 1e-2,
        "warmup_epochs": 0.03, "log_every": 25}


def schedule(progress, kl_weight, device):
    """Temperature and KL weight, scalar tensors, at a share `progress` of the run: from 1 to 1/16, half a
    cosine over its first half; from 0, linear over its first tenth. DALL-E's values, its run is longer."""
    fall = (1 + math.cos(math.pi * min(1.0, 2 * progress))) / 2
    values = (1 + 15 * fall) / 16, kl_weight * min(1.0, 10 * progress)
    return [torch.full((), value, device=device) for value in values]


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches; returns the loss's terms, means over it, as floats."""
    optimizer.zero_grad(set_to_none=True)
    total = {}
    temperature, kl_weight = schedule(run.step / run.steps, run.cfg.kl_weight, run.device)
    for pixels, _ in run.micro_batches(model, batches):
        with run.autocast():
            loss, terms = model(pixels, temperature, kl_weight)
        scaler.scale(loss / run.accum_steps).backward()
        total = {name: total.get(name, 0) + term / run.accum_steps for name, term in terms.items()}
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.cfg.clip_grad or math.inf)
    terms, finite = run.agree(total, grad_norm)  # the one host synchronisation
    if finite:
        scaler.step(optimizer)
    scaler.update()
    return terms


def save_pictures(path, tokenizer, examples):
    """PNG with what the tokenizer sees, and what it makes of its tokens."""
    view = tokenizer.view(examples[0])
    ids = tokenizer.ids(view)
    used = f"{len(ids.unique())} of {tokenizer.vocab_size} in use here"
    rows = list(zip(view, tokenizer.pixels(ids), strict=True))
    save_image_grid(path, rows, ["original", "decoded"], f"decoded from {ids.shape[1]} tokens each; {used}")


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    model = DVAE(cfg.grid, cfg.vocab_size, cfg.tokenizer_width, cfg.in_chans)
    run.fit_batch(source)
    run.start(len(source), f"lr {cfg.lr:.3g}, whatever the batch")
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    sample_noise = functools.partial(torch.rand, math.prod(cfg.grid))  # unused; makes the crops cim.py's
    to_pixels = Normalize((0.0,) * cfg.in_chans, (1.0,) * cfg.in_chans, run.device)  # in [0, 1]
    batches = run.batches(source, RandomResizedCrop(cfg.img_size, (0.08, 1.0)), sample_noise, to_pixels)
    examples = run.examples(source, sample_noise, to_pixels)

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples)
        if run.save_due():
            run.export("tokenizer.pth", model.state_dict(), run.meta())
            run.save()
    run.finish("last.pth, tokenizer.pth, pictures/, curves.png", [])


def train_tokenizer(cfg, run):
    """For cim.py --demo: one of that run's data, into OUT/tokenizer. Returns whether it came to its end."""
    share = max(1, DEMO["batch_size"] // run.world_size)
    values = {field.name: getattr(cfg, field.name) for field in fields(RunConfig)}  # data, seed, ... as there
    values |= {"patch_size": cfg.patch_size, "pictures": cfg.pictures, "batch_size": share * run.world_size,
               "out": f"{run.out}/tokenizer", "resume": True}
    return run.run_stage(train, Config(**DEMO | values), "convert_dalle")


# ---- the conversion ----------------------------------------------------------------------------------------


class StandIn:
    """What is left of a module in the file: its attributes, no behaviour."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):  # an attack on the class itself, not an instance, ends in a TypeError
        vars(self).update(state)

    def __setitem__(self, name, value):  # of pytorch_lightning's dictionaries, which are not needed
        pass


ALLOWED = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor",
           "torch._utils._rebuild_parameter", "torch.device", "torch.Size", "builtins.set", "__builtin__.set"}


class TensorUnpickler(pickle.Unpickler):
    """Knows tensors and their containers; classes of dall_e, torch.nn and pytorch_lightning become
    stand-ins."""

    def find_class(self, module, name):  # asked for every global but torch's storages
        if f"{module}.{name}" in ALLOWED:
            return super().find_class(module, name)
        if module.split(".")[0] in ("dall_e", "pytorch_lightning") or module.startswith("torch.nn.modules."):
            return StandIn
        raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r}, which no tensor needs")

    def __setattr__(self, name, value):
        if name == "persistent_load":  # torch's also compares sources of classes, and writes patches
            load = value

            def value(saved):
                return load(saved) if saved[0] == "storage" else saved[1]

        super().__setattr__(name, value)


RESTRICTED = types.SimpleNamespace(__name__="pickle", Unpickler=TensorUnpickler,
                                   load=lambda file, **how: TensorUnpickler(file, **how).load())


def tensors(module, prefix=""):
    """{name: tensor} of an unpickled stand-in, by its `_parameters`, `_buffers` and `_modules`."""
    values = {**vars(module).get("_parameters", {}), **vars(module).get("_buffers", {})}
    found = {prefix + name: value.detach() for name, value in values.items() if value is not None}
    for name, child in vars(module).get("_modules", {}).items():
        found |= tensors(child, f"{prefix}{name}.")
    return found


def unpickle(path):
    """{name: tensor} of one of OpenAI's files, in torch's zip or older format, or of a plain state dict."""
    if tarfile.is_tarfile(path):  # torch's oldest format: DALL-E is younger
        raise pickle.UnpicklingError("it is a tar archive")
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any(name.endswith("constants.pkl") for name in names):
        raise pickle.UnpicklingError("it is a TorchScript archive, which is a program")
    # torch.load hands TorchScript to torch.jit.load, which refuses a function as map_location first of all.
    content = torch.load(path, lambda storage, _: storage, pickle_module=RESTRICTED, weights_only=False)
    found = tensors(content) if isinstance(content, StandIn) else dict(content)
    if isinstance(found.get("state_dict"), dict):  # VQGAN's, with the networks of its losses
        found = {name: x for name, x in found["state_dict"].items() if not name.startswith("loss.")}
    if not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError("it holds no weights")
    return {name: value.float().clone() for name, value in found.items()}


def expected_shapes(kind, weights):
    """{name: shape} of a published tokenizer; VQGAN's has one of two numbers of entries."""
    with torch.device("meta"):
        if kind == "DALL-E":
            network = DVAE((14, 14))
        else:
            from vqgan import VQGAN

            network = VQGAN((14, 14), len(weights.get("quantize.embedding.weight", range(1024))))
    return {name: value.shape for name, value in network.state_dict().items()}


def convert():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("encoder", help="OpenAI's encoder.pkl, or VQGAN's last.ckpt")
    parser.add_argument("decoder", nargs="?", help="OpenAI's decoder.pkl")
    parser.add_argument("--out", default="dalle.pth", help="file to write (default dalle.pth)")
    args = parser.parse_args()
    try:
        if Path(args.out).exists():
            raise UserError(f"{args.out} exists already: give another --out")
        weights, kind = read_file(args.encoder, load=unpickle), "VQGAN"
        if args.decoder:
            kind, parts = "DALL-E", {"encoder": weights, "decoder": read_file(args.decoder, load=unpickle)}
            weights = {f"{part}.{name}": x for part, found in parts.items() for name, x in found.items()}
        found = {name: value.shape for name, value in weights.items()}
        if wrong := sorted({name for name, _ in expected_shapes(kind, weights).items() ^ found.items()}):
            hint = "are they in this order?" if args.decoder else "DALL-E has two files"
            raise UserError(f"{len(wrong)} tensors of {args.encoder} and {args.decoder} are not {kind}'s, "
                            f"{wrong[0]} for one; {hint}")
        content = {"model": weights, "meta": {"method": kind.lower().replace("-", "")}}
        write_atomically(args.out, lambda file: torch.save(content, file))
    except UserError as error:
        exit_with("convert_dalle", error)
    for path in filter(None, (args.encoder, args.decoder, args.out)):
        print(f"{path}: sha256 {sha256(path)}")


if __name__ == "__main__":
    if "--train" in sys.argv:
        sys.argv.remove("--train")
        launch(Config, lambda flags: DEMO if flags.demo else {}, train, "convert_dalle")
    else:
        convert()
