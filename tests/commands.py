"""Each script's command for twenty updates."""

import tempfile

import torch

from convert_dalle import DVAE

TWENTY = ["--demo", "--amp", "off", "--workers", 0, "--log_every", 3, "--epochs", 1.92, "--batch_size", 24, "--save_minutes", 0]
FOLDER = tempfile.TemporaryDirectory()  # with a tokenizer for cim.py
torch.save({"model": DVAE((8, 8), 32, 8).state_dict()}, f"{FOLDER.name}/tokenizer.pth")
CIM = ["cim.py", *TWENTY, "--in_chans", 3, "--tokenizer", f"{FOLDER.name}/tokenizer.pth"]
RESNET = ["--enhancer", "resnet50", "--resnet_width", 8, "--objective", "revdet"]
SCRIPTS = {
    "mae_mff.py": ["mae_mff.py", *TWENTY],
    "ddae.py": ["ddae.py", *TWENTY, "--momentum", "0.9,0.99,0.999"],
    "cim.py": CIM,
    "vision_electra.py": ["vision_electra.py", *TWENTY, "--generator_warmup_epochs", 1.1],
    # A low rate: the keys' biases have no gradient but that of rounding, which Adam makes as large as any.
    "revcol_v2.py": ["revcol_v2.py", *TWENTY, "--memory", "column", "--base_lr", 4e-3],
    "finetune.py": ["finetune.py", *TWENTY, "--weights", "none", "--augment", "full", "--mixup", 0.8, "--erasing", 0.25,
                    "--drop_path", 0.1, "--ema", 0.9, "--warmup_epochs", 0.5],
}
