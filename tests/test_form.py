"""What keeps the scripts easy to compare, to read and to copy: read off their source."""

import ast
import difflib
import importlib
import inspect
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import common

# Our files that each one imports. LAZY: only where it needs them, to be copied without them.
LAZY = {"common": {"shapes", "sources", "shards", "weights", "check", "draw"},
        "finetune": {"layers", "predict"}, "transfer_seg_det": {"cascade", "predict_scenes"},
        "convert_dalle": {"vqgan"}}
IMPORTS = {
    "shapes": set(),
    "common": LAZY["common"],
    "beit": {"common"},
    "weights": {"beit", "common"},
    "draw": {"common"},
    "shards": {"common"},
    "sources": {"common", "shapes", "shards"},
    "check": {"common", "sources"},
    **dict.fromkeys(("mae_mff", "ddae", "vision_electra", "revcol_v2"), {"common"}),
    "mff_feature": {"common", "mae_mff"},
    "ddae_beitv2": {"beit", "common", "ddae"},
    "swin": set(),
    "vision_electra_simmim": {"beit", "common", "swin", "vision_electra"},
    "vqgan": {"common"},
    "convert_dalle": {"common", "vqgan"},
    "cim": {"common", "convert_dalle"},
    "cim_pixels": {"cim", "common", "vision_electra"},
    "augment": {"common"},
    "evaluate": {"common"},
    "backbones": {"beit", "common", "revcol_v2", "swin"},
    "finetune": {"backbones", "beit", "common", "revcol_v2", "augment", "evaluate", "sources"}
    | LAZY["finetune"],
    "predict": {"backbones", "common", "evaluate", "sources"},
    "layers": {"backbones", "common", "draw", "evaluate", "finetune", "predict"},
    "transfer_data": {"common"},
    "coco": {"common", "shapes", "transfer_data"},
    "overlay": {"transfer_data"},
    "cascade": set(),
    "transfer_seg_det": {"backbones", "beit", "common", "revcol_v2", "swin", "transfer_data", "coco",
                         "overlay"} | LAZY["transfer_seg_det"],
    "transfer_mask2former": {"common", "transfer_data", "transfer_seg_det"},
    "predict_scenes": {"common", "transfer_data", "coco", "overlay", "predict"},
}
# Of train_step and the loop: lines of mae_mff.py that others may replace, and all lines of their own.
REPLACED = {
    "total = {}",
    "for images, noise in run.micro_batches(model, batches):",
    "loss, terms = model(images, noise)",
    "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.cfg.clip_grad or math.inf)",
    "lr = warmup_cosine(run.epoch, peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)",
    "save_pictures(path, model, examples, run)",
    "run.save(model.trunk_state())",
}
OWN = {
    "ddae": [
        "done = min(1.0, run.step / run.steps / run.cfg.feature_ramp) if run.cfg.feature_ramp else 1.0",
        "ramp = torch.full((), done, device=run.device)",
        "for images, distance in run.micro_batches(model, batches):",
        "loss, terms = model(images, distance, ramp)",
        "momentum = np.interp(run.epoch, (0, 100, 400), run.cfg.momentum)",
        'getattr(model, "module", model).update_teacher(momentum)',
    ],
    "ddae_beitv2": [
        "for images, distance in run.micro_batches(model, batches):",
        "loss, terms = model(images, distance)",
        "lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)",
        'run.save(model.trunk_state(), prefix=None, model=f"beit_{cfg.model}")',
    ],
    "cim": [
        "total, restore_statistics = ({}, remember_statistics(model))",
        "k = torch.full((), sample_num_masked(run.step, run.cfg), device=run.device)",
        "for pixels, noise in run.micro_batches(model, batches):",
        "loss, terms = model(pixels, noise, k)",
        "else:",
        "restore_statistics()",
        "lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)",
        'encoder = None if cfg.objective == "none" else model.enhancer.trunk_state()',
        'run.save(encoder, prefix="enhancer.", model=cfg.model if cfg.enhancer == "vit" else "resnet50")',
    ],
    "vision_electra": [
        "total, cfg = ({}, run.cfg)",
        'deceive = cfg.adversarial != "none" and run.epoch >= cfg.generator_warmup_epochs',
        "loss, terms = model(images, noise, cfg.gan_weight if deceive else 0.0)",
        "if cfg.generator_waits and run.epoch < cfg.generator_warmup_epochs:",
        'getattr(model, "module", model).generator.zero_grad(set_to_none=True)',
        'for name, network in getattr(model, "module", model).named_children():',
        'total[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(network.parameters(), math.inf)',
        "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)",
        "watch_for_collapse(terms, run)",
        'run.save(getattr(model, encoder).trunk_state(), prefix=f"{encoder}.")',
    ],
    "mff_feature": [],  # whose train_step is mae_mff.py's
    "cim_pixels": [  # whose train_step is cim.py's
        "lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)",
        'run.save(model.enhancer.trunk_state(), prefix="enhancer.", model=name)',
    ],
    "revcol_v2": ['run.save(model.trunk_state(), model=f"revcol_{cfg.model}")'],
}


def syntax(script):
    return ast.parse((ROOT / f"{script}.py").read_text())


def imports(tree):
    """{module of ours: names taken from it}"""
    found = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            found.setdefault(getattr(node, "module", alias.name), []).append(alias.name)
    return {module: names for module, names in found.items() if module in IMPORTS}


@pytest.mark.parametrize("script", IMPORTS)
def test_imports_form_floors(script):
    tree = syntax(script)
    found = imports(tree)
    tree.body = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    at_the_top = imports(tree).keys()
    assert found.keys() == IMPORTS[script] and len(found.get("common", ())) <= 30
    assert found.keys() - at_the_top == LAZY.get(script, set())


def lines_of_an_update(script):
    """train_step and the loop, without comments and docstring"""
    trees = syntax("mae_mff"), syntax(script)  # a script may import the first one's train_step
    functions = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    functions["train_step"].body.pop(0)
    loop = next(node for node in functions["train"].body if isinstance(node, ast.While))
    text = "\n".join(map(ast.unparse, (functions["train_step"], loop)))
    return [line.strip() for line in text.replace("'", '"').splitlines()]


@pytest.mark.parametrize("script", OWN)
def test_one_update_reads_the_same_in_every_script(script):
    lines = list(difflib.ndiff(lines_of_an_update("mae_mff"), lines_of_an_update(script)))
    assert [line[2:] for line in lines if line[0] == "+"] == OWN[script]
    assert {line[2:] for line in lines if line[0] == "-"} <= REPLACED


@pytest.mark.parametrize("script", [*OWN, "mae_mff", "vision_electra_simmim", "convert_dalle", "finetune",
                                    "transfer_seg_det"])
def test_flags_have_help_and_an_update_few_arguments(script):
    module = importlib.import_module(script)
    common.make_parser(module.Config).format_help()  # fails at a field without a comment
    assert len(inspect.signature(module.train_step).parameters) <= 5


def test_importing_has_no_effect(tmp_path):
    code = ["import sys, torch", "sys.argv, before = ['x', '--nonsense'], torch.get_rng_state()",
            f"import {', '.join(IMPORTS)}", "assert torch.equal(before, torch.get_rng_state())"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, check=True, env=environment)
    assert not list(tmp_path.iterdir())
