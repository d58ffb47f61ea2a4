"""Every script on a CUDA that is not there (fake_cuda.py): what a GPU would refuse, wait for, or compute in
float32; and what `Run` does at the start and at the end on a GPU.

Cannot be seen here: values, speed, NCCL, DDP's hooks, memory's fragments. benchmarks/gpu.py is for these."""

import os
import types

import pytest
import torch
import torch.distributed as dist
from commands import TOKENIZERS
from conftest import FORKS
from test_transfer import scenes  # noqa: F401  (a fixture)

import common
import mae_mff

try:
    import fake_cuda
except ImportError as error:
    pytest.skip(f"fake_cuda.py uses private parts of torch that have gone: {error}", allow_module_level=True)

SLOW = "MINMIM_SLOW_TESTS" in os.environ
TINY = "--data IMAGES --img_size 32 --patch_size 4 --batch_size 4 --epochs 0.032 --workers 0"  # two updates
TUNE = f"{TINY} --warmup_epochs 0"
VIT = f"{TUNE} --model nano --pictures 2"
TUNE += " --weights none"
RESNET = "--resnet_width 8 --img_size 64 --patch_size 8"
PROBE = "--model nano --mode linear --mixup 0 --cutmix 0"
SCENES = ("--weights none --iters 2 --eval_every 2 --warmup_iters 0 --batch_size 2 --workers 0 --pictures 2 "
          "--img_size 64 --channels 16")
SEG, DET = f"{SCENES} --data ADE --patch_size 8", f"{SCENES} --data COCO --task det --patch_size 8 --rois 16"
MASKS = "--channels 32 --queries 9 --layers 1 --pixel_layers 1 --points 64"
COSTS = {"bmm in transfer_mask2former.py:match": 4}  # two products for each of two outputs
TOKENS = f"--tokenizer {TOKENIZERS}/tokenizer.pth"
LOGITS = {"convolution in convert_dalle.py:forward": 1}  # the tokenizer's last, in float32 on purpose
RUNS = {  # {name: (script, flags, products in float32 that are meant)}
    "mff, milan": ("mff_feature", f"{VIT} --teacher random --target milan", {}),
    "mff": ("mae_mff", f"{VIT} --target pixmim --fuse_layers 0,3 --micro_batch 2", {}),
    "ddae": ("ddae", VIT, {}),
    "ddae_beitv2": ("ddae_beitv2", f"{VIT} --tokenizer {TOKENIZERS}/vqkd.pth",
                    {"mm in ddae_beitv2.py:ids": 1}),  # the cosines
    "respix": ("cim", f"{VIT} {TOKENS}", LOGITS),
    "revdet, resnet": ("cim", f"{VIT} {TOKENS} {RESNET} --enhancer resnet50 --objective revdet", LOGITS),
    "tokenizer": ("convert_dalle", f"{TINY} --pictures 2 --vocab_size 32 --tokenizer_width 8", None),
    "electra": ("vision_electra", VIT, {}),
    "electra, swin": ("vision_electra_simmim", f"{VIT} --discriminator swin --swin_window 4", {}),
    "revcol, column": ("revcol_v2", f"{VIT} --memory column", {}),
    "finetune": ("finetune", f"{TUNE} --model nano --ema 0.9", {}),
    "finetune, resnet": ("finetune", f"{TUNE} {RESNET} --model resnet50 --drop_path .1 --loss bce", {}),
    "finetune, beit": ("finetune", f"{TUNE} --model beit_nano", {}),
    "finetune, revcol": ("finetune", f"{TUNE} --model revcol_nano --recompute", {}),
    "linear": ("finetune", f"{TUNE} {PROBE} --augment crop", {}),
    "seg": ("transfer_seg_det", f"{SEG} --model nano", {}),
    "seg, fcn": ("transfer_seg_det", f"{SEG} {RESNET} --model resnet50 --head fcn --optimizer sgd", {}),
    "mask2former": ("transfer_mask2former", f"{SEG} {MASKS} --model nano", COSTS),
    "det, cascade": ("transfer_seg_det", f"{DET} --model nano --window 4 --detector cascade", {}),
}
OTHERS = {mode: f"{TUNE.replace('0.032', '2')} --model nano --mode {mode}" for mode in ("knn", "layers")}
HALF = ["mff", "seg"] + ["ddae", "respix", "electra", "revcol, column", "finetune", "det, cascade"] * SLOW
RUNS |= {f"{name}, fp16": (RUNS[name][0], f"{RUNS[name][1]} --amp fp16", RUNS[name][2]) for name in HALF}
RESUMED = "mff", "revdet, resnet", "finetune", "seg", "mask2former"  # with a third update
FAULTS = {  # {what is planted in a run of mae_mff.py: (code, what finds it)}
    "a number is asked for": ("loss = script.masked_mse\n"
                              "script.masked_mse = lambda *x: loss(*x) * (1 if loss(*x).item() == 0 else 2)",
                              lambda found: "mae_mff.py:forward" in found["waits"]),
    "a tensor on the CPU": ("loss = script.masked_mse\n"
                            "script.masked_mse = lambda p, t, m: loss(p, t + torch.ones(t.shape), m)",
                            lambda found: "two" in found and any(f"devices{comma} cuda:0" in found
                                                                for comma in (",", ""))),
    "no autocast": ("import contextlib\ncommon.Run.autocast = lambda run: contextlib.nullcontext()",
                    lambda found: len(found["float32"]) > 3),
    "a blocking copy": ("loss = script.masked_mse\n"
                        "script.masked_mse = lambda *x: loss(*x) * torch.ones(2, device='cpu').to('cuda')[0]",
                        lambda found: found["copies"] == {"mae_mff.py:forward": 1}),
}


@pytest.fixture(scope="module")
def traced(scenes, small_npz, tmp_path_factory, request):  # noqa: F811
    """{name: a function that waits for that run and returns what fake_cuda found}, two at a time."""
    folder = tmp_path_factory.mktemp("cuda")
    places = {"IMAGES": small_npz, "ADE": scenes / "ade", "COCO": scenes / "coco"}

    def words(text):
        return [places.get(word, word) for word in text.split()]

    jobs = {name: (script, words(flags), "", False) for name, (script, flags, _) in RUNS.items()}
    for name in RESUMED:
        flags = RUNS[name][1].replace("0.032", "0.048").replace("_every 2", "_every 3")
        jobs[name] = (RUNS[name][0], words(flags.replace("--iters 2", "--iters 3")), "", True)
    mae = words(f"{VIT} --fuse_layers 3")
    jobs |= {name: ("mae_mff", mae, code, False) for name, (code, _) in FAULTS.items()}
    jobs |= {name: ("finetune", words(flags)) for name, flags in OTHERS.items()}
    asked = [item for item in request.session.items if "traced" in getattr(item, "fixturenames", ())]
    asked = {item.callspec.params["name"] for item in asked}
    jobs = {name: job for name, job in jobs.items() if name in asked}
    with FORKS.Pool(2, maxtasksperchild=1) as pool:
        handles = {name: pool.apply_async(fake_cuda.task, ("trace", job, folder / name.replace(" ", "_")))
                   for name, job in jobs.items()}
        yield lambda name: handles[name].get(200)


@pytest.mark.parametrize("name", RUNS)
def test_an_update_waits_once_and_multiplies_in_half_precision(traced, name):
    """With evaluation, pictures and files; some are stopped after the first update and resumed."""
    found, script = traced(name), RUNS[name][0]
    assert isinstance(found, dict), found
    waits, copies = dict(found["waits"]), dict(found["copies"])
    assert waits.pop("common.py:agree") == 1  # the one host synchronisation
    if name.startswith("det"):  # torchvision's detector asks for every number of boxes; two images
        files = (f"{script}.py:forward", "cascade.py:")
        for found_in, limit in zip((waits, copies), (43, 12), strict=True):
            places = [place for place in found_in if place.startswith(files)]
            assert 0 < sum(map(found_in.pop, places)) <= limit
    if script == "transfer_mask2former":  # the costs of all outputs, for scipy
        assert waits.pop(f"{script}.py:match") == 1
    assert not waits and not copies
    assert RUNS[name][2] is None or found["float32"] == RUNS[name][2]


@pytest.mark.parametrize("name", OTHERS)
def test_modes_without_training(traced, name):
    assert isinstance(traced(name), dict), traced(name)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(traced, name):
    assert FAULTS[name][1](traced(name)), traced(name)


# ---- the start and the end of a run


def test_the_process_group_is_nccls_on_a_device_that_was_set_before(monkeypatch, tmp_path):
    asked, cuda = [], torch.device("cuda")
    for place, name, value in (
            (torch.accelerator, "current_accelerator", lambda **_: cuda),
            (torch.accelerator, "device_count", lambda: 4),
            (torch.accelerator, "set_device_index", lambda i: asked.append(i)),
            (torch.cuda, "is_bf16_supported", lambda **_: True), (common, "Normalize", lambda *_: None),
            (dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 2, 4)])),
            (dist, "init_process_group", lambda backend, **how: asked.append((backend, how)))):
        monkeypatch.setattr(place, name, value)
    for name, value in {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 2, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    cfg = mae_mff.Config(out=str(tmp_path))
    common.Run(cfg, "mae_mff").join()
    index, (backend, how) = asked
    assert (index, backend, how["device_id"]) == (2, "nccl", torch.device("cuda", 2))
    assert (how["rank"], how["world_size"]) == (2, 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(common.UserError, match="LOCAL_RANK 4.*--nproc_per_node 4"):
        common.Run(cfg, "mae_mff")
    monkeypatch.delenv("LOCAL_RANK")  # set in part
    with pytest.raises(common.UserError, match="RANK=2"):
        common.Run(cfg, "mae_mff")


def test_loader_workers_are_the_share_of_the_cores_less_one(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for processes, workers in ((1, 63), (4, 15), (64, 1), (100, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert common.Run(mae_mff.Config(out=str(tmp_path)), "mae_mff").workers == workers


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "--micro_batch, now 256"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 b"), "--micro_batch"),
    (dist.DistBackendError("NCCL error in: x.cpp:1\nncclRemoteError"), "another process has ended or hangs"),
])
def test_errors_of_the_device_and_of_nccl_in_one_line(monkeypatch, capsys, tmp_path, error, words):
    def train(cfg, run):
        run.micro_batch = 256
        raise error

    monkeypatch.setattr(common.sys, "argv", ["mae_mff.py", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        common.launch(mae_mff.Config, mae_mff.presets, train, "mae_mff")
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and stop.value.code == 1


def test_a_bf16_checkpoint_goes_on_in_fp16(tmp_path):
    """After NaN, when --amp may change: the scaler of bf16 has no state."""
    run = types.SimpleNamespace(
        state={"scaler": torch.amp.GradScaler("cpu", enabled=True)}, saved={}, cfg=None, epoch=0.0,
        read_checkpoint=lambda path: {"scaler": {}, "bad_files": {}, "step": 3, "saved": {}})
    common.Run.restore(run, tmp_path / "last.pth")
    assert run.step == 3 and run.state["scaler"].get_scale() == 2.0**16
