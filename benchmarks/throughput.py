"""Speed, side by side in one run: rivals take turns, the table shows medians. Prints Markdown and writes it to --out.

step     One pre-training update of ViT-B/16 at 224 px: ours (from the 8-bit batch to the optimizer, with all checks) against
         transformers' ViTMAEForPreTraining and an MAE of timm's blocks (ready float batch, fused AdamW); with the share of the
         machine's matrix-product speed, measured in the same run, and where our time goes.
methods  One update of each of our methods with that encoder, against MAE's: measured, and expected from the FLOPs of its parts.
cim      One update of CIM against one of a BEiT-B with the same tokenizer encoder (DALL-E's shape, random weights), as in the
         paper's A.1: measured, with the time and the FLOPs of each part.
electra  One update of Vision ELECTRA against the sum of its three passes, each timed alone.
loader   Images per second and core on a folder of photographs (--data): ours against MAE's published pipeline (Pillow,
         RandomResizedCrop bicubic, flip, ToTensor, Normalize) and against decoding alone; what DDAE's masks cost.
wait     Is `data_wait` honest? A loader that is too slow for its model: the logged share against one computed from rates.
start    From the command `python mae_mff.py --demo` to its first and its tenth update.

    python benchmarks/throughput.py --data PHOTOS        about ten minutes on two cores; needs requirements-dev.txt
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cim  # noqa: E402  (found through the line above)
import common  # noqa: E402
import ddae  # noqa: E402
import mae_mff  # noqa: E402
import vision_electra  # noqa: E402
from convert_dalle import DVAE  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = {"fp32": "off", "bf16": "bf16"}


def turns(rivals, rounds):
    """{name: function} -> {name: median seconds of one call}, after one call each to warm up."""
    times = {name: [] for name in rivals}
    for i in range(rounds + 1):
        for name, function in rivals.items():
            begin = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines] + [""]


# ---- step


class TimmMAE(nn.Module):
    """MAE as one would write it on timm's blocks."""

    def __init__(self, size=224, p=16, width=768, depth=12, heads=12, decoder=(512, 8, 16)):
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        self.p, L = p, (size // p) ** 2
        self.patch_embed = PatchEmbed(size, p, 3, width)
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 1, decoder[0]))
        self.pos_embed = nn.Parameter(torch.randn(1, L + 1, width) * 0.02, requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, L + 1, decoder[0]) * 0.02, requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.decoder_blocks = nn.Sequential(*(Block(decoder[0], decoder[2], qkv_bias=True) for _ in range(decoder[1])))
        self.norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(decoder[0])
        self.embed, self.pred = nn.Linear(width, decoder[0]), nn.Linear(decoder[0], p * p * 3)

    def forward(self, images):
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        B, L, D = x.shape
        shuffle = torch.rand(B, L, device=x.device).argsort(1)
        restore, kept = shuffle.argsort(1), L // 4
        x = x.gather(1, shuffle[:, :kept, None].expand(-1, -1, D))
        x = self.norm(self.blocks(torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], 1)))
        x = self.embed(x)
        hidden = self.mask_token.expand(B, L - kept, -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], hidden], 1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        pred = self.pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        target = common.patchify(images, self.p)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (((pred - target) ** 2).mean(-1) * (restore >= kept)).sum() / (B * (L - kept))


def for_an_update(script, model, cfg):
    """Moves the model to the device; returns what one update of it is called with beside batches and what the method adds."""
    model.to(DEVICE)
    optimizer = common.adamw(common.parameter_groups(model, cfg.weight_decay), cfg.betas)
    common.set_lr(optimizer, 1e-4)
    plan, run = common.make_plan(10 * cfg.batch_size, cfg, 1), common.Run(cfg, script.__name__)
    return optimizer, torch.amp.GradScaler(DEVICE.type, enabled=False), 0, cfg, plan, run


def our_model(script, images, amp, **values):
    """(model, draws of a batch like `images`, settings, what one update of it is called with)"""
    cfg = script.Config(amp=amp, batch_size=len(images), **values)
    mean, std = common.normalisation(cfg)
    if script is ddae:
        model, draw = ddae.DeepDynamicAutoEncoder(cfg), ddae.mask_source(cfg)
    else:
        model, draw = mae_mff.MaskedAutoencoder(cfg, mean, std), lambda: torch.rand(len(model.pos_embed[0]) - 1)
    batch = {"image": images, "flip": torch.arange(len(images)) % 2 == 0, "draw": torch.stack([draw() for _ in images]),
             "index": torch.arange(len(images))}
    return model, batch, common.Normalise(mean, std, DEVICE), for_an_update(script, model, cfg)


def our_step(script, images, amp, **values):
    """Function of one update of mae_mff.py or ddae.py."""
    model, batch, to_images, rest = our_model(script, images, amp, **values)
    models = (model, model) if script is ddae else (model,)
    return lambda: script.train_step(*models, iter([batch]), to_images, *rest)


def our_flops(script, images, **values):
    """{part of the model: FLOPs of its forward and, where it learns, backward pass on the batch}"""
    model, batch, to_images, _ = our_model(script, images, "bf16", **values)
    images, draw, parts = to_images(batch), batch["draw"].to(DEVICE), {}

    def count(part, function):
        with FlopCounterMode(display=False) as counter, torch.autocast(DEVICE.type, torch.bfloat16):
            output = function()
            if output.requires_grad:
                output.sum().backward()
        parts[part] = counter.get_total_flops()
        return output.detach().requires_grad_()

    if script is ddae:
        ids_restore = model.encode(images, draw)[1]
        latent = count("encoder", lambda: model.encode(images, draw)[0])
        count("pixel decoder, all levels", lambda: model.decode(model.pixel_decoder, latent, ids_restore))
        count("feature decoder, all levels", lambda: model.decode(model.feature_decoder, latent, ids_restore))
        count("momentum encoder, whole image", lambda: model.feature_target(images))
    else:
        ids_keep, ids_restore, _ = mae_mff.random_masking(draw, 0.75)
        latent = count("encoder", lambda: model.encode(images, ids_keep))
        count("decoder", lambda: model.decode(latent, ids_restore))
    return parts


def peer_step(model, images, amp, loss):
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    images = images.to(DEVICE) / 255

    def step():
        optimizer.zero_grad(set_to_none=True)
        with common.autocast(DEVICE, common.amp_dtype(amp, DEVICE)):
            value = loss(model(images))
        value.backward()
        optimizer.step()

    return step


GROUPS = {  # of operators, by a part of their name
    "matrix products of linear layers": ("aten::mm", "aten::addmm", "convolution"),
    "attention": ("aten::bmm", "softmax", "scaled_dot_product"),
    "GELU and LayerNorm": ("gelu", "layer_norm"),
    "optimizer, gradient norm": ("adamw", "vector_norm", "foreach"),
    "copies, casts, gathers": ("aten::copy_", "aten::cat", "gather", "scatter", "aten::empty", "aten::fill_", "aten::index"),
}


def profile(step):
    """{group: share of the time} of one update."""
    activities = [torch.profiler.ProfilerActivity.CUDA if DEVICE.type == "cuda" else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    seconds = dict.fromkeys([*GROUPS, "everything else"], 0.0)
    for event in profiler.key_averages():
        group = next((g for g, parts in GROUPS.items() if any(part in event.key for part in parts)), "everything else")
        seconds[group] += event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
    return {group: value / sum(seconds.values()) for group, value in seconds.items()}


def bench_step(args):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8)
    n = 2048 if DEVICE.type == "cpu" else 8192
    ours = {"mae_mff.py, MAE": {"fuse_layers": (11,)}, "mae_mff.py, MFF": {}}
    counts = {kind: sum(our_flops(mae_mff, images, **values).values()) for kind, values in ours.items()}
    mae, out, shares = counts["mae_mff.py, MAE"], [], {}
    for precision, amp in PRECISIONS.items():
        rivals = {kind: our_step(mae_mff, images, amp, **values) for kind, values in ours.items()}
        rivals["transformers ViTMAEForPreTraining"] = peer_step(
            ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True)), images, amp, lambda output: output.loss)
        rivals["MAE of timm's blocks"] = peer_step(TimmMAE(), images, amp, lambda value: value)
        a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if amp == "bf16" else torch.float32) for _ in range(2))
        seconds = turns(rivals | {"product": lambda a=a, b=b: [a @ b for _ in range(4)]}, args.rounds)
        peak = 4 * 2 * n**3 / seconds.pop("product")
        best = min(seconds[name] for name in list(rivals)[2:])
        for name, value in seconds.items():
            used = counts.get(name, mae) / value
            out.append([precision, name, f"{args.batch / value:.2f}", f"{best / value:.2f}", f"{used / peak:.0%}"])
        shares[precision] = profile(rivals["mae_mff.py, MAE"])
        out.append([precision, f"(matrix product of {n} x {n}: {peak / 1e9:,.0f} GFLOP/s)", "", "", "100%"])
    parts = [[group, *(f"{share[group]:.0%}" for share in shares.values())] for group in [*GROUPS, "everything else"]]
    gflop = f"{mae / args.batch / 1e9:.1f} GFLOP per image"
    setting = f"ViT-B/16, 224 px, batch {args.batch}, median of {args.rounds} turns; {gflop}"
    return [setting, "",
            *table(["precision", "update", "images/s", "against the best peer", "of the matrix-product speed"], out),
            "Where our time goes (MAE, one profiled update):", "", *table(["share of the time", *shares], parts)]


# ---- methods


def bench_methods(args):
    images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8)
    methods = {"MAE": (mae_mff, {"fuse_layers": (11,)}), "DDAE": (ddae, {})}
    parts = {name: our_flops(script, images, **values) for name, (script, values) in methods.items()}
    total = {name: sum(counts.values()) for name, counts in parts.items()}
    per_part = [[name, part, f"{count / args.batch / 1e9:.1f}", f"{count / total['MAE']:.2f}"]
                for name, counts in parts.items() for part, count in counts.items()]
    measured = []
    for precision, amp in PRECISIONS.items():
        seconds = turns({name: our_step(script, images, amp, **values) for name, (script, values) in methods.items()},
                        args.rounds)
        for name in list(methods)[1:]:
            expected, found = total[name] / total["MAE"], seconds[name] / seconds["MAE"]
            measured.append([name, precision, f"{args.batch / seconds['MAE']:.2f}", f"{args.batch / seconds[name]:.2f}",
                             f"{found:.2f}", f"{expected:.2f}", f"{found / expected - 1:+.0%}"])
    return [f"ViT-B/16, 224 px, batch {args.batch}, median of {args.rounds} turns.", "",
            *table(["method", "part", "GFLOP per image", "of MAE's update"], per_part),
            *table(["method", "precision", "MAE, images/s", "its images/s", "MAE's cost x", "expected", "off by"], measured)]


# ---- CIM


def bench_cim(args):
    pixels = torch.rand(args.batch, 3, 224, 224, device=DEVICE)
    batch = {"image": (255 * pixels).byte(), "flip": torch.zeros(args.batch).bool(), "draw": torch.rand(args.batch, 196),
             "index": torch.arange(args.batch)}
    to_pixels = common.Normalise((0.0,) * 3, (1.0,) * 3, DEVICE)
    tokenizer = DVAE((14, 14)).to(DEVICE).requires_grad_(False)
    settings = {"n_masked": torch.tensor(110, device=DEVICE), "tokenizer": tokenizer}
    kinds = {"BEiT-B": {"objective": "none", "generator_depth": 12}, "CIM-ResPix": {}, "CIM-RevDet": {"objective": "revdet"}}
    mask, positions = batch["draw"].to(DEVICE) < 0.5, batch["draw"].to(DEVICE).argsort(1)[:, :120]
    logits, ids = torch.randn(args.batch, 120, 8192, device=DEVICE), torch.randint(8192, (args.batch, 196), device=DEVICE)

    def run(function, learns, amp):
        with common.autocast(DEVICE, common.amp_dtype(amp, DEVICE)):
            output = function()
        if learns:
            output.backward()

    rows, parts_rows = [], []
    for precision, amp in PRECISIONS.items():
        steps, models = {}, {}
        for kind, values in kinds.items():
            cfg = cim.Config(amp=amp, batch_size=args.batch, tokenizer="random", **values)
            model = cim.CorruptedImageModel(cfg, 8192, *common.normalisation(cfg))
            rest = (settings, *for_an_update(cim, model, cfg))
            steps[kind] = lambda model=model, rest=rest: cim.train_step(model, iter([batch]), to_pixels, *rest)
            models[kind] = model
        seconds = turns(steps, args.rounds)
        for kind in list(kinds)[1:]:
            rows.append([kind, precision, *(f"{args.batch / seconds[name]:.2f}" for name in ("BEiT-B", kind)),
                         f"{seconds[kind] / seconds['BEiT-B']:.2f}"])
        beit, model = models["BEiT-B"], models["CIM-ResPix"]
        parts = {  # name: what runs, and whether backward runs too
            "tokenizer's encoder": (lambda: tokenizer.ids(pixels), False),
            "generator, 4 blocks": (lambda model=model: model.generator(pixels, mask, positions).sum(), True),
            "sampling": (lambda: cim.sample(logits, "softmax"), False),
            "tokenizer's decoder": (lambda: tokenizer.pixels(ids), False),
            "enhancer, 12 blocks": (lambda model=model: model.enhancer(pixels).sum(), True),
            "(BEiT's 12 blocks)": (lambda beit=beit: beit.generator(pixels, mask, positions).sum(), True),
        }
        seconds = turns({name: lambda part=part, amp=amp: run(*part, amp) for name, part in parts.items()}, args.rounds)
        flops = {}
        for name, part in parts.items():
            with FlopCounterMode(display=False) as counter:
                run(*part, amp)
            flops[name] = counter.get_total_flops() / args.batch
        parts_rows += [[precision, name, f"{1000 * value / args.batch:.0f}", f"{flops[name] / 1e9:.1f}"]
                       for name, value in seconds.items()]
    beit = sum(flops[name] for name in ("tokenizer's encoder", "(BEiT's 12 blocks)"))
    expected = sum(value for name, value in flops.items() if not name.startswith("(")) / beit
    return [f"ViT-B/16, 224 px, batch {args.batch}, median of {args.rounds} turns. CIM's cost by FLOPs: {expected:.2f} x "
            "BEiT's.", "", *table(["method", "precision", "BEiT-B, images/s", "its images/s", "BEiT's cost x"], rows),
            *table(["precision", "part (with backward where it learns)", "ms per image", "GFLOP per image"], parts_rows)]


def bench_electra(args):
    batch = {"image": torch.randint(256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=DEVICE),
             "flip": torch.zeros(args.batch).bool(), "draw": torch.rand(args.batch, 196), "index": torch.arange(args.batch)}
    rows = []
    for precision, amp in PRECISIONS.items():
        cfg = vision_electra.Config(amp=amp, batch_size=args.batch)
        model, to_images = vision_electra.VisionElectra(cfg), common.Normalise(*common.normalisation(cfg), DEVICE)
        rest = (cfg.gan_weight, *for_an_update(vision_electra, model, cfg))
        images, draw = to_images(batch), batch["draw"].to(DEVICE)
        frozen = {name: parameter.detach() for name, parameter in model.discriminator.named_parameters()}
        parts = {  # what runs, forward and backward
            "generator": lambda model=model, images=images, draw=draw: model.generate(images, draw)[0].square().mean(),
            "discriminator on originals and composites": lambda model=model, images=images: sum(
                s.mean() for s in model.discriminator(torch.cat([images, images])).values()),
            "generator's pass through it": lambda model=model, images=images, frozen=frozen: sum(
                s.mean() for s in functional_call(model.discriminator, frozen, (images.clone().requires_grad_(),)).values()),
        }

        def run(part, model=model, amp=amp):
            model.zero_grad(set_to_none=True)
            with common.autocast(DEVICE, common.amp_dtype(amp, DEVICE)):
                loss = part()
            loss.backward()

        rivals = {name: lambda part=part, run=run: run(part) for name, part in parts.items()}
        rivals["one update"] = lambda model=model, to_images=to_images, rest=rest: vision_electra.train_step(
            model, iter([batch]), to_images, *rest)
        seconds = turns(rivals, args.rounds)
        whole = seconds.pop("one update")
        rows += [[precision, name, f"{1000 * value / args.batch:.0f}", f"{value / sum(seconds.values()):.2f}"]
                 for name, value in [*seconds.items(), ("one update", whole)]]
    return [f"ViT-B/16 twice, 224 px, batch {args.batch}, median of {args.rounds} turns; the update has normalisation, losses, "
            "diversity, gradient norms and optimizer besides.", "",
            *table(["precision", "what, forward and backward", "ms per image", "of the sum of the parts"], rows)]


# ---- loader


def bench_loader(args):
    paths = common.list_images(args.data)[: args.images]
    source, n, batch = common.ImageFiles(paths, [-1] * len(paths), None, 3), len(paths), 16
    crop = common.RandomResizedCrop((224, 224))
    published = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD)])

    def batches():
        return (range(start, min(start + batch, n)) for start in range(0, n, batch))

    def views(draw):
        data = common.Views(source, crop, 0, 2, draw)
        return lambda: [common.collate([data[0, i] for i in part]) for part in batches()]

    def pillow(i):
        with open(paths[i], "rb") as file:
            return Image.open(file).convert("RGB")

    ddae_draw = ddae.mask_source(ddae.Config())
    rivals = {
        "MAE's published pipeline": lambda: [torch.stack([published(pillow(i)) for i in part]) for part in batches()],
        "decoding alone, Pillow": lambda: [pillow(i) for i in range(n)],
        "decoding alone, torchvision": lambda: [decode_image(p, ImageReadMode.RGB, apply_exif_orientation=True) for p in paths],
        "ours": views(lambda: torch.rand(196)),
        "ours, DDAE's masks and distance maps": views(ddae_draw),
        "ours without the masks' noise": views(None),
        "ours without noise, keys, bookkeeping": lambda: [
            torch.stack([crop(source.read(i)[0]).permute(1, 2, 0) for i in part]) for part in batches()],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = turns(rivals, 3 * args.rounds)
    masks = [ddae.block_mask(*ddae_draw.args) for _ in range(1000)]
    draws = turns({"mask": lambda: [ddae.block_mask(*ddae_draw.args) for _ in masks],
                   "map": lambda: [ddae.distance_map(mask) for mask in masks]}, args.rounds)
    torch.set_num_threads(threads)
    image = seconds["ours, DDAE's masks and distance maps"] / n
    drawn = "; ".join(f"{name} {1e3 * value:.0f} us, {value / 1000 / image:.1%}" for name, value in draws.items())
    decode, peer = seconds["decoding alone, torchvision"], seconds["MAE's published pipeline"]
    rows = [[name, f"{1e3 * value / n:.3f}", f"{n / value:,.0f}", f"{peer / value:.2f}", f"{decode / value:.0%}"]
            for name, value in seconds.items()]
    return [f"{n} photographs, one core, no worker process, batches of {batch}, median of {3 * args.rounds} turns.", "",
            *table(["", "ms per image", "images/s", "x the published pipeline", "of torchvision's decoding alone"], rows),
            f"DDAE's draw, timed alone, as a share of the loader's time per image: {drawn}.", ""]


# ---- wait


class Slow:
    """A crop that takes longer by `pause` seconds: a slow disk."""

    def __init__(self, crop, pause):
        self.crop, self.pause = crop, pause

    def __call__(self, image):
        time.sleep(self.pause)
        return self.crop(image)


def bench_wait(args):
    """A small model fed by one worker: data_wait as logged, and 1 - (rate with the loader) / (rate without it)."""
    paths, steps, batch, rows = common.list_images(args.data), 30, 32, []
    source = common.ImageFiles(paths, [-1] * len(paths), None, 3)
    values = {"model": "nano", "patch_size": 16, "workers": 1}
    cfg = mae_mff.Config(batch_size=batch, epochs=1e3, amp="off", **values)
    step = our_step(mae_mff, torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8), "off", **values)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for pause in (0.0, 0.01, 0.02, 0.05):
        run = common.Run(cfg, "wait")
        views = common.Views(source, Slow(common.RandomResizedCrop((224, 224)), pause), 0, 2, lambda: torch.rand(196))
        keys = common.KeyedBatches(common.make_plan(len(source), cfg, 1), 0, run, 0)
        loader = run.timed(common.make_loader(views, keys, run))
        for _ in range(8):  # what was loaded ahead
            next(loader)
            step()
        run.waited, begin = 0.0, time.perf_counter()
        for _ in range(steps):
            next(loader)
            step()
        together, waited = time.perf_counter() - begin, run.waited
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        alone = time.perf_counter() - begin
        rows.append([f"{1e3 * pause:.0f} ms", f"{steps * batch / alone:.0f}", f"{steps * batch / together:.0f}",
                     f"{waited / together:.0%}", f"{1 - alone / together:.0%}"])
    torch.set_num_threads(threads)
    head = ["pause per image", "images/s without loading", "with loading", "data_wait as logged", "1 - with / without"]
    return ["ViT-nano, 224 px photographs, one training thread, one loader worker slowed by a pause.", "", *table(head, rows)]


# ---- start


def bench_start(args):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch, torchvision.transforms.v2"], check=True)
            imports, log = time.perf_counter() - begin, Path(folder, str(i), "log.jsonl")
            begin = time.perf_counter()
            run = subprocess.Popen([sys.executable, ROOT / "mae_mff.py", "--demo", "--log_every", "1", "--out", log.parent],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            moments = []
            for line in (1, 10):
                while not (log.exists() and log.read_text().count("\n") >= line):
                    if run.poll() is not None:
                        sys.exit("the demo failed to start")
                    time.sleep(0.01)
                moments.append(time.perf_counter() - begin)
            run.kill()
            run.wait()
            rows.append([i + 1, f"{imports:.1f}", *(f"{moment:.1f}" for moment in moments)])
    return table(["start", "importing torch and torchvision, s", "command to first update, s", "to the tenth, s"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="step,methods,cim,electra,loader,wait,start", help="which, by commas (default all)")
    parser.add_argument("--data", help="folder of photographs, for loader and wait")
    parser.add_argument("--images", type=int, default=200, help="how many of them the loader part reads")
    parser.add_argument("--batch", type=int, default=16, help="of the step part")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each rival")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput.md"), help="the table (default runs/throughput.md)")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if not args.data and {"loader", "wait"} & set(parts):
        parser.error("--data FOLDER is needed for the parts loader and wait")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
        if Path("/proc/cpuinfo").exists() else iter([]), platform.processor())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    lines = [f"{machine}, torch {torch.__version__}, commit {commit}", ""]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part_lines = [f"### {part}", "", *globals()[f"bench_{part}"](args)]
        print("\n".join(part_lines), flush=True)
        lines += part_lines
        args.out.write_text("\n".join(lines))
    versions = {package: __import__(package).__version__ for package in ("transformers", "timm")} if "step" in parts else {}
    lines += [json.dumps(versions)] if versions else []
    args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
