"""Speed, side by side in one run: rivals take turns, the table shows medians. Writes Markdown to --out.

step     One pre-training update of ViT-B/16 at 224 px: ours (from the 8-bit batch to the optimizer, with all
         checks) against transformers' ViTMAEForPreTraining and an MAE of timm's blocks (ready float batch,
         fused AdamW); with the share of the machine's matrix-product speed, measured in the same run, and
         where our time goes.
methods  One update of every method and size in turns with MAE's: images/s, cost measured and expected from
         the FLOPs, and the peak memory of a process that trains it. The GPU: also Large.
compile  The same updates with torch.compile and without, and what compiling takes: Base (CPU: nano, MAE
         alone).
cim      One update of CIM against one of a BEiT-B with the same tokenizer encoder (DALL-E's shape, random
         weights), as in the paper's A.1: measured, with the time and the FLOPs of each part. A quarter of the
         batch.
electra  One update of Vision ELECTRA against the sum of its three passes, each timed alone. Half the batch.
loader   Images per second and core on a folder of photographs (--data): ours against MAE's published pipeline
         (Pillow, RandomResizedCrop bicubic, flip, ToTensor, Normalize) and against decoding alone; what
         DDAE's masks cost.
wait     Is `data_wait` right? A loader too slow for its model: the logged share against one computed from
         rates.
start    From the command `python mae_mff.py --demo` to its first and its tenth update.

It needs requirements-dev.txt, and half an hour on two cores. --against OTHER runs each part also with
OTHER/benchmarks/throughput.py, as it is in another checkout.

    python benchmarks/throughput.py --data PHOTOS
    python benchmarks/throughput.py --parts step,cim --against OTHER
"""

import argparse
import functools
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from replicate import git_commit  # noqa: E402

import cim  # noqa: E402  (found through the line above)
import common  # noqa: E402
import ddae  # noqa: E402
import mae_mff  # noqa: E402
import revcol_v2  # noqa: E402
import vision_electra  # noqa: E402
from convert_dalle import DVAE  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = {"fp32": "off", "bf16": "bf16"}
METHODS = {  # script and settings
    "MAE": (mae_mff, lambda size: {"fuse_layers": (common.VIT_SIZES[size][1] - 1,)}),
    "MFF": (mae_mff, lambda size: {}),
    "DDAE": (ddae, lambda size: {}),
    "CIM-ResPix": (cim, lambda size: {}),
    "CIM-RevDet": (cim, lambda size: {"objective": "revdet"}),
    "Vision ELECTRA": (vision_electra, lambda size: {}),
    "RevColV2": (revcol_v2, lambda size: {}),
}


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
    lines = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in [head, *rows]]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


# ---- step


class TimmMAE(nn.Module):
    """MAE as one would write it on timm's blocks."""

    def __init__(self, size=224, p=16, width=768, depth=12, heads=12, decoder=(512, 8, 16)):
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        self.p, L = p, (size // p) ** 2
        self.patch_embed = PatchEmbed(size, p, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder[0]))
        self.pos_embed = nn.Parameter(torch.randn(1, L + 1, width) * 0.02, requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, L + 1, decoder[0]) * 0.02, requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.decoder_blocks = nn.Sequential(*(Block(decoder[0], decoder[2], qkv_bias=True)
                                              for _ in range(decoder[1])))
        self.norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(decoder[0])
        self.embed, self.pred = nn.Linear(width, decoder[0]), nn.Linear(decoder[0], p * p * 3)

    def forward(self, images):
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        B, L, D = x.shape
        shuffle = torch.rand(B, L, device=x.device).argsort(1)
        restore, kept = shuffle.argsort(1), L // 4
        x = x.gather(1, shuffle[:, :kept, None].expand(-1, -1, D))
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        x = self.norm(self.blocks(torch.cat([cls_token, x], 1)))
        x = self.embed(x)
        hidden = self.mask_token.expand(B, L - kept, -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], hidden], 1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        pred = self.pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        target = common.patchify(images, self.p)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (((pred - target) ** 2).mean(-1) * (restore >= kept)).sum() / (B * (L - kept))


def make_update(script, batch_size, amp="off", compiled=False, **values):
    """(model, function that makes one update) of a method, from fixed 8-bit images to the optimizer"""
    values |= {"tokenizer": "random"} if script is cim else {}
    cfg = script.Config(amp=amp, batch_size=batch_size, **values)
    run = common.Run(cfg, script.__name__)
    run.n, run.steps = 1000 * batch_size, 1000
    run.micro_batch, run.accum_steps = common.split_batch(batch_size, cfg.micro_batch, 1)
    positions, normalize = math.prod(common.patch_grid(cfg.img_size, cfg.patch_size)), run.normalize
    if script is cim:
        model = cim.CorruptedImageModel(cfg, cim.BEiTGenerator(cfg, 8192))
        normalize = common.Normalize((0.0,) * 3, (1.0,) * 3, DEVICE)
        model.__dict__["tokenizer"] = DVAE(cfg.grid).to(DEVICE).requires_grad_(False)
    else:
        networks = {mae_mff: "MaskedAutoencoder", ddae: "DeepDynamicAutoEncoder",
                    vision_electra: "VisionElectra",
                    revcol_v2: "MaskedRevCol"}
        model = getattr(script, networks[script])(cfg)
    model.to(DEVICE)
    if compiled:
        model.compile()
    optimizer = common.adamw(common.parameter_groups(model, cfg.weight_decay), cfg.betas)
    common.set_lr(optimizer, 1e-4)
    images = torch.randint(256, (batch_size, 3, *cfg.img_size), dtype=torch.uint8)
    noise = torch.rand(batch_size, positions)
    if script is ddae:
        noise = torch.stack([ddae.sample_mask(cfg) for _ in images])
    if DEVICE.type == "cuda":  # as the loader hands them over
        images, noise = images.pin_memory(), noise.pin_memory()

    def batches():
        while True:
            for start in range(0, batch_size, run.micro_batch):
                part = slice(start, start + run.micro_batch)
                yield normalize(images[part]), noise[part].to(DEVICE), torch.arange(run.micro_batch)

    rest = batches(), optimizer, torch.amp.GradScaler(DEVICE.type, enabled=False), run
    return model, lambda: script.train_step(model, *rest)


def count_flops(function):
    """FLOPs of all matrix products, convolutions and attentions of one call, repeated ones included."""
    # fused attention on a CPU is not counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def matrix_product(amp):
    """(function of one large product, its FLOPs)"""
    n, dtype = 2048 if DEVICE.type == "cpu" else 8192, torch.bfloat16 if amp == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return lambda: [a @ b for _ in range(4)], 4 * 2 * n**3


def autocast(amp):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp == "bf16")


def peer_step(model, images, amp, loss):
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05,
                                  fused=True)
    images = images.to(DEVICE) / 255

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(amp):
            value = loss(model(images))
        value.backward()
        optimizer.step()

    return step


GROUPS = {  # of operators, by a part of their name
    "matrix products of linear layers": ("aten::mm", "aten::addmm", "convolution"),
    "attention": ("aten::bmm", "softmax", "scaled_dot_product"),
    "GELU and LayerNorm": ("gelu", "layer_norm"),
    "optimizer, gradient norm": ("adamw", "vector_norm", "foreach"),
    "copies, casts, gathers": ("aten::copy_", "aten::cat", "gather", "scatter", "aten::empty", "aten::fill_",
                               "aten::index"),
}


def profile(step):
    """{group: share of the time} of one update."""
    cuda, kinds = DEVICE.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU]) as profiler:
        step()
    seconds = dict.fromkeys([*GROUPS, "everything else"], 0.0)
    for event in profiler.key_averages():
        if cuda and event.device_type == torch.autograd.DeviceType.CUDA:
            continue  # a kernel: its time is counted with the operator that started it
        group = next((g for g, parts in GROUPS.items() if any(part in event.key for part in parts)),
                     "everything else")
        seconds[group] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {group: value / sum(seconds.values()) for group, value in seconds.items()}


def bench_step(args):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8)
    out, shares, flops = {}, {}, {}
    for precision, amp in PRECISIONS.items():
        rivals = {f"mae_mff.py, {name}": make_update(script, args.batch, amp, **values("base"))[1]
                  for name, (script, values) in list(METHODS.items())[:2]}
        flops = flops or {name: count_flops(update) for name, update in rivals.items()}
        rivals["transformers ViTMAEForPreTraining"] = peer_step(
            ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True)), images, amp, lambda output: output.loss)
        rivals["MAE of timm's blocks"] = peer_step(TimmMAE(), images, amp, lambda value: value)
        product, work = matrix_product(amp)
        seconds = turns(rivals | {"product": product}, args.rounds)
        peak = work / seconds.pop("product")
        best = min(seconds[name] for name in list(rivals)[2:])
        for name, value in seconds.items():
            used = flops.get(name, flops["mae_mff.py, MAE"]) / value
            rates = f"{args.batch / value:.2f}, {best / value:.2f}, {used / peak:.0%}"
            out.setdefault(name, [name]).append(rates)
        shares[precision] = profile(rivals["mae_mff.py, MAE"])
        out.setdefault("product", ["(matrix product)"]).append(f"{peak / 1e9:,.0f} GFLOP/s")
    parts = [[group, *(f"{share[group]:.0%}" for share in shares.values())]
             for group in [*GROUPS, "everything else"]]
    gflop = f"{flops['mae_mff.py, MAE'] / args.batch / 1e9:.1f} GFLOP per image"
    return [f"ViT-B/16, 224 px, batch {args.batch}, median of {args.rounds} turns; {gflop}, forward and "
            "backward. Cells: images/s, ratio to the best peer, share of the matrix-product speed.", "",
            *table(["update", *PRECISIONS], out.values()),
            "Where our time goes (MAE, one profiled update):", "",
            *table(["share of the time", *shares], parts)]


# ---- methods


def bench_methods(args):
    sizes = ["tiny", "small", "base", *(["large"] if DEVICE.type == "cuda" else [])]
    rows = {name: [name] for name in METHODS}
    for size in sizes:
        base = make_update(mae_mff, args.batch, "bf16", model=size, **METHODS["MAE"][1](size))[1]
        base_flops = 0
        for name, (script, values) in METHODS.items():
            if script is revcol_v2 and size not in revcol_v2.SIZES:
                rows[name].append("")
                continue
            update = base
            if name != "MAE":
                update = make_update(script, args.batch, "bf16", model=size, **values(size))[1]
            flops = count_flops(update)
            base_flops = base_flops or flops
            seconds = turns({"MAE": base, name: update}, args.rounds)
            command = [sys.executable, __file__, "--memory_of", name, size, "--batch", str(args.batch)]
            memory = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
            cost = f"{seconds[name] / seconds['MAE']:.2f} ({flops / base_flops:.2f})"
            rows[name].append(f"{args.batch / seconds[name]:.3g}, {cost}, {memory}")
    held = "the allocator's peak" if DEVICE.type == "cuda" else "of the process, Python and torch included"
    return [f"224 px, bf16, batch {args.batch}, median of {args.rounds} turns with MAE's update of the same "
            "size, timed anew for each. Cells: images/s, cost in MAE updates (expected from the FLOPs, with "
            f"what RevColV2 computes again), peak memory in GiB ({held}).", "",
            *table(["method", *sizes], rows.values())]


def print_memory(name, size, batch_size):
    """GiB of a process that makes two updates."""
    script, values = METHODS[name]
    _, update = make_update(script, batch_size, "bf16", model=size, **values(size))
    update()
    update()
    if DEVICE.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.2f}")
    else:  # not getrusage's peak, which on Linux is the parent's where that is larger
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(f"{int(status['VmHWM'].split()[0]) / 2**20:.2f}")


# ---- compile


def bench_compile(args):
    rows, size = [], "base" if DEVICE.type == "cuda" else "nano"
    for name, (script, values) in list(METHODS.items())[: None if DEVICE.type == "cuda" else 1]:
        updates = {kind: make_update(script, args.batch, "bf16", compiled=kind == "compiled", model=size,
                                     **values(size))[1]
                   for kind in ("eager", "compiled")}
        begin = time.perf_counter()
        updates["compiled"]()
        first = time.perf_counter() - begin
        seconds = turns(updates, args.rounds)
        rows.append([name, *(f"{args.batch / seconds[kind]:.3g}" for kind in updates),
                     f"{seconds['eager'] / seconds['compiled']:.2f}", f"{first:.0f}"])
    return [f"Size {size}, 224 px, bf16, batch {args.batch}, median of {args.rounds} turns.", "",
            *table(["method", "images/s", "images/s, compiled", "compiled is faster by x", "first update, s"],
                   rows)]


# ---- CIM


def bench_cim(args):
    n = max(1, args.batch // 4)
    pixels, noise = torch.rand(n, 3, 224, 224, device=DEVICE), torch.rand(n, 196, device=DEVICE)
    tokenizer = DVAE((14, 14)).to(DEVICE).requires_grad_(False)
    kinds = {"BEiT-B": {"objective": "none", "generator_depth": 12}, "CIM-ResPix": {},
             "CIM-RevDet": {"objective": "revdet"}}
    mask, positions = noise < 0.5, noise.argsort(1)[:, :120]
    logits, ids = torch.randn(n, 120, 8192, device=DEVICE), torch.randint(8192, (n, 196), device=DEVICE)

    def run(function, learns, amp):
        with autocast(amp):
            output = function()
        if learns:
            output.backward()

    rows, parts_rows = {}, {}
    for amp in PRECISIONS.values():
        models, steps = {}, {}
        for kind, values in kinds.items():
            models[kind], steps[kind] = make_update(cim, n, amp, **values)
        seconds = turns(steps, args.rounds)
        for kind in list(kinds)[1:]:
            rates = ", ".join(f"{n / seconds[name]:.2f}" for name in ("BEiT-B", kind))
            rows.setdefault(kind, [kind]).append(rates + f", {seconds[kind] / seconds['BEiT-B']:.2f}")
        beit, model = models["BEiT-B"], models["CIM-ResPix"]
        parts = {  # name: what runs, and whether backward runs too
            "tokenizer's encoder": (lambda: tokenizer.ids(pixels), False),
            "generator, 4 blocks": (lambda model=model: model.generator(pixels, mask, positions).sum(), True),
            "sampling": (lambda: cim.sample(logits, "softmax"), False),
            "tokenizer's decoder": (lambda: tokenizer.pixels(ids), False),
            "enhancer, 12 blocks": (lambda model=model: model.enhancer(pixels).sum(), True),
            "(BEiT's 12 blocks)": (lambda beit=beit: beit.generator(pixels, mask, positions).sum(), True),
        }
        seconds = turns({name: lambda part=part, amp=amp: run(*part, amp) for name, part in parts.items()},
                        args.rounds)
        flops = {name: count_flops(lambda part=part, amp=amp: run(*part, amp)) / n
                 for name, part in parts.items()}
        for name, value in seconds.items():
            parts_rows.setdefault(name, [name, f"{flops[name] / 1e9:.1f}"]).append(f"{1000 * value / n:.0f}")
    beit = sum(flops[name] for name in ("tokenizer's encoder", "(BEiT's 12 blocks)"))
    expected = sum(value for name, value in flops.items() if not name.startswith("(")) / beit
    return [f"ViT-B/16, 224 px, batch {n}, median of {args.rounds} turns. CIM's cost by FLOPs: "
            f"{expected:.2f} x BEiT's. Cells: BEiT-B's images/s, CIM's, cost.", "",
            *table(["method", *PRECISIONS], rows.values()),
            *table(["part (with backward where it learns)", "GFLOP per image", "fp32, ms per image",
                    "bf16, ms per image"],
                   parts_rows.values())]


def bench_electra(args):
    n, rows = max(1, args.batch // 2), {}
    images, noise = torch.randn(n, 3, 224, 224, device=DEVICE), torch.rand(n, 196, device=DEVICE)
    for amp in PRECISIONS.values():
        model, update = make_update(vision_electra, n, amp)
        frozen = {name: parameter.detach() for name, parameter in model.discriminator.named_parameters()}
        parts = {  # what runs, forward and backward
            "generator": lambda model=model: model.generate(images, noise)[0].square().mean(),
            "discriminator on originals and composites": lambda model=model: sum(
                s.mean() for s in model.discriminator(torch.cat([images, images])).values()),
            "generator's pass through it": lambda model=model, frozen=frozen: sum(
                verdict.mean() for verdict in
                functional_call(model.discriminator, frozen, (images.clone().requires_grad_(),)).values()),
        }

        def run(part, model=model, amp=amp):
            model.zero_grad(set_to_none=True)
            with autocast(amp):
                loss = part()
            loss.backward()

        rivals = {name: lambda part=part, run=run: run(part) for name, part in parts.items()}
        rivals["one update"] = update
        seconds = turns(rivals, args.rounds)
        whole = seconds.pop("one update")
        for name, value in [*seconds.items(), ("one update", whole)]:
            cell = f"{1000 * value / n:.0f}, {value / sum(seconds.values()):.2f}"
            rows.setdefault(name, [name]).append(cell)
    return [f"ViT-B/16 twice, 224 px, batch {n}, median of {args.rounds} turns. Cells: ms per image, share "
            "of the sum of the parts.", "", *table(["forward and backward", *PRECISIONS], rows.values())]


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

    def samples(sample_noise):
        data = common.KeyedSamples(source, crop, 0, 2, sample_noise)
        return lambda: [common.collate([data[0, i] for i in part]) for part in batches()]

    def pillow(i):
        with open(paths[i], "rb") as file:
            return Image.open(file).convert("RGB")

    sample_mask = functools.partial(ddae.sample_mask, ddae.Config())
    rivals = {
        "MAE's published pipeline": lambda: [torch.stack([published(pillow(i)) for i in part])
                                             for part in batches()],
        "decoding alone, Pillow": lambda: [pillow(i) for i in range(n)],
        "decoding alone, torchvision": lambda: [
            decode_image(path, ImageReadMode.RGB, apply_exif_orientation=True) for path in paths],
        "ours": samples(lambda: torch.rand(196)),
        "ours, DDAE's masks and distance maps": samples(sample_mask),
        "ours without the masks' noise": samples(None),
        "ours without noise, keys, bookkeeping": lambda: [
            torch.stack([crop(source.read(i)[0]).permute(1, 2, 0) for i in part]) for part in batches()],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = turns(rivals, 3 * args.rounds)
    masks = [sample_mask().view(14, 14).numpy() > 0 for _ in range(1000)]
    draws = turns({"mask and map": lambda: [sample_mask() for _ in masks],
                   "map": lambda: [ddae.distance_map(mask) for mask in masks]}, args.rounds)
    torch.set_num_threads(threads)
    image = seconds["ours, DDAE's masks and distance maps"] / n
    drawn = "; ".join(f"{name} {1e3 * value:.0f} us, {value / 1000 / image:.1%}"
                      for name, value in draws.items())
    peer = seconds["MAE's published pipeline"]
    rows = [[name, f"{n / value:,.0f}", f"{peer / value:.2f}"] for name, value in seconds.items()]
    return [f"{n} photographs, one core, no worker process, batches of {batch}, median of {3 * args.rounds} "
            "turns.",
            "",
            *table(["", "images/s", "x the published pipeline"], rows),
            f"DDAE's masks, timed alone, with their share of the time per image: {drawn}.", ""]


# ---- wait


class Slow:
    """A crop that takes longer by `pause` seconds: a slow disk."""

    def __init__(self, crop, pause):
        self.crop, self.pause = crop, pause

    def __call__(self, image):
        time.sleep(self.pause)
        return self.crop(image)


def bench_wait(args):
    """A small model fed by one worker: data_wait as logged, and 1 - (rate with the loader) / (without)."""
    paths, steps, batch, rows = common.list_images(args.data), 30, 32, []
    source = common.ImageFiles(paths, [-1] * len(paths), None, 3)
    values = {"model": "nano", "patch_size": 16, "workers": 1}
    cfg = mae_mff.Config(batch_size=batch, epochs=1e3, amp="off", **values)
    step = make_update(mae_mff, batch, **values)[1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for pause in (0.0, 0.01, 0.02, 0.05):
        run = common.Run(cfg, "wait")
        run.n, run.steps, run.micro_batch, run.accum_steps = len(source), 10**6, batch, 1
        crop = Slow(common.RandomResizedCrop((224, 224)), pause)
        loader = run.batches(source, crop, lambda: torch.rand(196))
        for i in range(8 + steps):
            if i == 8:  # after what was loaded ahead
                run.waited, begin = 0.0, time.perf_counter()
            for _ in run.micro_batches(types.SimpleNamespace(), loader):
                step()
        together, waited = time.perf_counter() - begin, run.waited
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        alone = time.perf_counter() - begin
        rows.append([f"{1e3 * pause:.0f} ms", f"{waited / together:.0%}", f"{1 - alone / together:.0%}"])
    torch.set_num_threads(threads)
    head = ["pause per image", "data_wait as logged", "computed from rates"]
    return ["ViT-nano, 224 px photographs, one training thread, one loader worker slowed by a pause.", "",
            *table(head, rows)]


# ---- start


def bench_start(args):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch, torchvision.transforms.v2"], check=True)
            imports, log = time.perf_counter() - begin, Path(folder, str(i), "log.jsonl")
            begin = time.perf_counter()
            run = subprocess.Popen([sys.executable, ROOT / "mae_mff.py", "--demo", "--log_every", "1",
                                    "--out", log.parent],
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
    return table(["start", "importing torch and torchvision, s", "command to first update, s",
                  "to the tenth, s"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="step,methods,compile,cim,electra,loader,wait,start",
                        help="by commas (default all)")
    parser.add_argument("--data", help="folder of photographs, for loader and wait")
    parser.add_argument("--images", type=int, default=200, help="how many of them the loader part reads")
    parser.add_argument("--batch", type=int, default=16, help="of an update")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each rival")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput.md"),
                        help="the tables (default runs/throughput.md)")
    parser.add_argument("--against", type=Path,
                        help="another checkout: its throughput.py takes turns, part by part")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return print_memory(*args.memory_of, args.batch)
    parts = args.parts.split(",")
    if unknown := [part for part in parts if f"bench_{part}" not in globals()]:
        parser.error(f"--parts {','.join(unknown)}: no such part")
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as common.Run does, here for the rivals too
    if not args.data and {"loader", "wait"} & set(parts):
        parser.error("--data FOLDER is needed for the parts loader and wait")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if "model name" in line)
        if Path("/proc/cpuinfo").exists() else iter([]), platform.processor())
    versions = ", ".join(f"{package} {version(package)}"
                         for package in ("torch", "torchvision", "transformers", "timm"))
    options = (f"--parts {args.parts} --batch {args.batch} --rounds {args.rounds} --images {args.images} "
               "--data PHOTOS")
    lines = ["# Speed", "", f"Written by `python benchmarks/throughput.py {options}`; its docstring says "
             f"what each part measures. {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
             f"{'CUDA' if DEVICE.type == 'cuda' else 'no GPU'}; {versions}; commit {git_commit()}.", ""]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part_lines = [f"## {part}", "", *globals()[f"bench_{part}"](args)]
        if args.against:
            other = args.out.with_suffix(".against.md")
            flags = ["--parts", part, "--batch", args.batch, "--rounds", args.rounds, "--images", args.images,
                     "--out", other]
            flags += ["--data", args.data] if args.data else []
            command = [sys.executable, args.against / "benchmarks/throughput.py", *flags]
            subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
            part_lines += other.read_text().splitlines()[2:]
        print("\n".join(part_lines), flush=True)
        lines += part_lines
        args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
