"""A CUDA that is not there: whole runs of the scripts on fake tensors of a device `cuda`, without a GPU.

`trace(module, flags)` runs a script's train() and returns, for its last update, what a GPU would have met:
    waits    {place: n}: the host waits for the device: values, numbers of hits, copies back
    copies   {place: n}: copies to the device from memory that is not pinned, or not asked to be non-blocking
    float32  {"operation in place": n}: matrix products and convolutions that half precision passed by
    stored   bytes that wait for the backward pass; flops
Tensors of two devices or of dtypes that do not fit raise as on a GPU. Images are read and files are written
for real. It replaces parts of torch for good, so it wants a process of its own.
"""

import contextlib
import importlib
import io
import os
import sys
import traceback
from collections import Counter, defaultdict

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
HITS = 50  # what is true of a mask, at most


class Fake(FakeTensorMode):
    avoid_device_init = True


def place():
    """FILE:FUNCTION of the innermost frame that is the project's."""
    frame = sys._getframe(1)
    while frame:
        folder, name = os.path.split(frame.f_code.co_filename)
        if folder == ROOT:
            return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class Meter(TorchDispatchMode):
    """Counts, and answers what fake tensors cannot: every number is 0, every mask has some hits."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.waits, self.copies, self.float32 = Counter(), Counter(), Counter()
        self.stored, self.flops = {}, 0

    def found(self):
        return {"waits": dict(self.waits), "copies": dict(self.copies), "float32": dict(self.float32),
                "stored": sum(x.nbytes() for x in self.stored.values()), "flops": self.flops}

    def wait(self, tensor):
        if tensor.device.type == "cuda":
            self.waits[place()] += 1

    def hits(self, mask):
        self.wait(mask)
        n = min(mask.numel(), HITS)
        return [torch.zeros(n, dtype=torch.int64, device=mask.device) for _ in range(mask.ndim)]

    def answer(self, name, args, kwargs):
        """The result of an operation whose shape or value depends on values; None for all others."""
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "_local_scalar_dense":
            self.wait(x)
            return False if x.dtype == torch.bool else 0.0 if x.is_floating_point() else 0
        if name == "nonzero":
            return torch.stack(self.hits(x), 1)
        if name == "nonzero_numpy" or name == "where" and len(args) == 1:
            return self.hits(x)
        if name == "nms":
            self.wait(x)
            return torch.zeros(min(len(x), HITS), dtype=torch.int64, device=x.device)
        if name == "bincount":
            self.wait(x)
            n = kwargs.get("minlength") or (args[2] if len(args) > 2 else 1)
            return torch.zeros(n, dtype=torch.int64, device=x.device)
        if name == "_unique2":
            self.wait(x)
            return x.new_zeros(3), x.new_zeros(0), x.new_zeros(0)
        return None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if torch.is_inference_mode_enabled() and name != "device":  # where compositions arrive in one piece
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in tensors:
            if isinstance(x, FakeTensor):
                x.constant = None  # torch would copy a number that it knows to the device
        if (result := self.answer(name, args, kwargs)) is not None:
            return result
        on_device = any(x.device.type == "cuda" for x in tensors)
        if name == "index":
            args = args[0], [j for i in args[1]
                             for j in (self.hits(i) if i is not None and i.dtype == torch.bool else [i])]
            if on_device and any(i is not None and i.device.type == "cpu" for i in args[1]):
                self.copies[place()] += 1
        if name in ("_to_copy", "copy_"):
            self.transfer(name, args, kwargs)
        if on_device and name in PRODUCTS and tensors[0].dtype == torch.float32:
            self.float32[f"{name} in {place()}"] += 1
        result, count = func(*args, **kwargs), flop_registry.get(func.overloadpacket)
        self.flops += count(*args, **kwargs, out_val=result) if count and on_device else 0
        return result

    def transfer(self, name, args, kwargs):
        """Notes a copy between devices that makes the host wait."""
        source, to = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device"))
        to = torch.device(to or source.device).type
        at_once = kwargs.get("non_blocking") or name == "copy_" and args[2:] == (True,)
        if source.device.type == to:
            return
        if to != "cuda":
            self.waits[place()] += not at_once
        elif not (at_once and getattr(source, "pinned", False)):
            self.copies[place()] += 1

    def store(self, x):
        """For saved_tensors_hooks: its storage, unless a parameter's."""
        if isinstance(x, FakeTensor) and not isinstance(x if x._base is None else x._base, nn.Parameter):
            self.stored[x.untyped_storage()._cdata] = x.untyped_storage()
        return x


# ---- parts of torch that ask the device -------------------------------------------------------------------


def backward(loss, *_, **__):
    """autograd's engine, whose streams want a device: each node once, when all that flow into it are done."""
    backward.passes += 1
    first, order, indegree = loss.grad_fn, [loss.grad_fn], Counter()
    for node in order:  # grows
        for following, _ in node.next_functions:
            if following is not None:
                if not indegree[following]:
                    order.append(following)
                indegree[following] += 1
    slots, ready = defaultdict(dict), [first]
    slots[first][0] = torch.ones_like(loss)
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = slots.pop(node, {})
            if (parameter := getattr(node, "variable", None)) is not None:
                gradient = given[0].detach()
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                continue
            for (following, number), gradient in zip(node.next_functions, call(node, given), strict=False):
                if following is None:
                    continue
                if gradient is not None:
                    gradient = fitted(gradient, following, number)
                    known = slots[following].get(number)
                    slots[following][number] = gradient if known is None else known + gradient
                indegree[following] -= 1
                if not indegree[following]:
                    ready.append(following)


backward.passes = 0


def call(node, given):
    """Gradients for node.next_functions, from {number: gradient} of its outputs."""
    if not given:
        return [None] * len(node.next_functions)
    inputs = [given.get(i) for i in range(len(node._input_metadata))]
    if callable(node):
        out = node(*inputs)
        return out if isinstance(out, tuple) else (out,)
    out = node.apply(*inputs)  # of a Function in Python: it answers for arguments that are no tensors, too
    some = (gradient for gradient in (out if isinstance(out, tuple) else (out,)) if gradient is not None)
    return [following and next(some, None) for following, _ in node.next_functions]


def fitted(gradient, node, number):
    """As the engine: summed over what was broadcast, in the output's dtype; on its device, or an error."""
    meta = getattr(node, "variable", None)
    meta = node._input_metadata[number] if meta is None else meta
    if gradient.device != meta.device:
        raise RuntimeError(f"{node}: a gradient on {gradient.device}, expected on {meta.device}")
    return gradient.sum_to_size(tuple(meta.shape)).to(meta.dtype)


def attention(query, key, value, attn_mask=None, **_):
    """The kernel that a GPU would choose, without dropout and causality."""
    if query.dtype == torch.float32 or attn_mask is not None:
        mask = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, torch.is_grad_enabled())[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def move(module, function, recurse=True):
    """nn.Module._apply with new parameters, not new content of the old ones, which stay on their device."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = function(parameter)
            if moved is not parameter:
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else function(buffer)
    return module


class Loader:
    """torch.utils.data.DataLoader without workers, outside of the fake world; its tensors are pinned."""

    def __init__(self, samples, batch_sampler, collate_fn, pin_memory, **_):
        self.samples, self.keys, self.collate, self.pin = samples, batch_sampler, collate_fn, pin_memory

    def __iter__(self):
        for keys in self.keys:
            with _disable_current_modes():
                batch = self.collate([self.samples[key] for key in keys])
            yield tree_map(self.fake, batch)

    def fake(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        x.pinned = self.pin
        return x


def real(function):
    """The function outside of the fake world; fake tensors among its arguments become real zeros."""

    def wrapped(*args, **kwargs):
        with _disable_current_modes():
            return function(*tree_map(solid, args), **tree_map(solid, kwargs))

    return wrapped


def solid(x):
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x


def install(meter):
    """Inside Fake, which asks before whether there is a CUDA."""
    answers = {"is_available": True, "is_bf16_supported": True, "current_device": 0, "device_count": 1,
               "get_device_name": "fake", "max_memory_allocated": 0, "set_device": None, "manual_seed": None,
               "manual_seed_all": None, "is_current_stream_capturing": False}
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    if hasattr(fake_tensor, "init_gpu_context"):  # older torch asks for a context
        fake_tensor.init_gpu_context = lambda device: None
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.accelerator.set_device_index = lambda index: None
    torch.Tensor.backward, nn.Module._apply = backward, move
    nn.functional.scaled_dot_product_attention = attention
    torch._C._current_graph_task_id = lambda: backward.passes or -1  # a checkpoint recomputes once per pass
    torch.utils.data.DataLoader = Loader
    torch.save, torch.load = real(torch.save), real(torch.load)
    torch.distributions.Distribution.set_default_validate_args(False)

    def zeros(shape):
        return [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0

    def tolist(x):
        meter.wait(x)
        return tree_map(int, zeros(x.shape)) if not x.is_floating_point() else zeros(x.shape)

    def pin_memory(x):
        copy = x.clone()
        copy.pinned = True
        return copy

    def deepcopy(x, memo):
        copy = x.detach().clone()
        memo[id(x)] = nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy
        return memo[id(x)]

    FakeTensor.tolist, FakeTensor.__deepcopy__, FakeTensor.numpy = tolist, deepcopy, real(torch.Tensor.numpy)
    FakeTensor.pin_memory = pin_memory
    FakeTensor.__format__ = lambda x, spec: format(0.0, spec)


# ---- runs --------------------------------------------------------------------------------------------------


def trace(name, flags, plant="", stop=True):
    """What the last update of `python NAME.py FLAGS` met; without updates, all of it. stop: after the first
    update, and --resume. plant: code to run before, with the script as `script`: a fault to be found."""
    import common

    script, met = importlib.import_module(name), []
    presets = getattr(script, "presets", lambda flags: script.DEMO if flags.demo else {})
    with Fake(allow_non_fake_inputs=True), Meter() as meter:
        install(meter)
        common.KeyedSamples.__getitem__ = real(common.KeyedSamples.__getitem__)
        common.TF.to_pil_image = real(common.TF.to_pil_image)
        exec(plant, {"common": common, "script": script, "torch": torch})
        end_update = common.Run.end_update

        def counted(run, *arguments):
            end_update(run, *arguments)
            met.append(meter.found())
            meter.clear()
            run.stopping = stop and len(met) == 1

        common.Run.end_update = counted
        with torch.autograd.graph.saved_tensors_hooks(meter.store, lambda x: x):
            for more in ([], ["--resume"]):
                if len(met) < 2 and not (more and not met):
                    cfg = common.parse_config(script.Config, presets, [*map(str, flags), *more])
                    script.train(cfg, common.Run(cfg, name))
    return met[-1] if met else meter.found()


def task(function, arguments, folder):
    """In a process of its own: what `function` of this file returns, or its error."""
    os.makedirs(folder)
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return globals()[function](*arguments)
    except BaseException:
        return traceback.format_exc()
