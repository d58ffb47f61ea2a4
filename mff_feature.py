"""MFF with feature targets: MFF_EVA and MFF_MILAN, and both without fusion.

MFF    Liu et al., Improving Pixel-based MIM by Reducing Wasted Modeling Capability, 2308.00261, appendix A.7
EVA    Fang et al., EVA: Exploring the Limits of Masked Visual Representation Learning at Scale, 2211.07636
MILAN  Hou et al., MILAN: Masked Image Pretraining on Language Assisted Representation, 2208.06049
CLIP   Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2103.00020

Idea. Predict, in place of pixels, what a frozen CLIP says of each patch. Such a target pulls no low-level
detail into the last block, so the fusion of mae_mff.py should gain next to nothing: the paper's control.

Data flow, in the order of the code (its names and shapes on the right)
    f         LayerNorm and projection of all of CLIP's tokens                features  (B, 1 + L, F)
    a         its last block's attention, class token to patches, head mean   attention (B, L)
    visible   EVA: drawn evenly; MILAN: without replacement, with
              probabilities in proportion to a (semantic-aware masks)         semantic_noise
    z         LayerNorm of mae_mff.py's encoder and fusion                    latent    (B, 1 + len_keep, D)
    p         EVA: MAE's decoder, of the patches                              pred      (B, L, F)
              MILAN: prompting decoder: mask tokens alone ask and change      pred      (B, 1 + L, F)
    loss      mean of 2 - 2 cos(p, f); EVA: hidden patches, MILAN: all tokens feature_loss
Only pre-training fuses: encoder.pth is a plain ViT. --fuse_layers 11: EVA, or MILAN, as they are.

--teacher: the weights of a CLIP that OpenAI trained, of the student's patch size, as plain tensors:
OpenMMLab's clip_vit_base_16.pth.tar, or safetensors of transformers (file or folder) or open_clip. LAION's
CLIPs have another activation, which their files do not show. --teacher random: untrained, for trials.

"EVA" is the MFF authors' small one: MAE's masks, encoder and decoder. From released code, not the text:
visible tokens are not normalised where mask tokens look at them. Our choice: images normalised CLIP's way for
CLIP (released: ImageNet's); its positions resized to other image sizes; masks that follow the samples' noise.

    python mff_feature.py --demo                                                    two minutes on a CPU
    torchrun --nproc_per_node 4 mff_feature.py --teacher FILE                       MFF_EVA, 400 epochs
    torchrun --nproc_per_node 4 mff_feature.py --teacher FILE --target milan        MFF_MILAN
"""

import functools
import math
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import mae_mff
from common import (
    MLP,
    VIT_SIZES,
    Block,
    RandomResizedCrop,
    UserError,
    ViT,
    adamw,
    attend,
    gather_tokens,
    launch,
    load_weights,
    open_data,
    parameter_groups,
    patches_to_pixels,
    read_file,
    save_image_grid,
    set_lr,
    warmup_cosine,
)
from mae_mff import MaskedAutoencoder, SimpleResizedCrop, random_masking, train_step


@dataclass
class Config(mae_mff.Config):
    # method
    target: Literal["eva", "milan"] = "eva"  # whose masks, decoder and tokens of the loss
    teacher: str | None = None  # weights of CLIP's visual tower (see the script's head); random: untrained
    # optimisation: MFF appendix, A.7
    epochs: float = 400.0  # passes over the data
    # run
    draw: str | None = None  # draw what these weights (last.pth) predict, to --out X.png

    def __post_init__(self):
        super().__post_init__()
        if not (self.teacher or self.check_data):
            raise ValueError("--teacher FILE is needed: CLIP's weights, or random for a trial")
        if self.in_chans != 3:
            raise ValueError(f"--in_chans {self.in_chans}: CLIP sees 3 channels")


# The teacher is a small untrained tower: no labels, no download. Its features keep colours and shapes.
DEMO = mae_mff.DEMO | {"target": "eva", "teacher": "random"}


def presets(flags):
    return DEMO if flags.demo else {}


# ---- teacher: CLIP's visual tower --------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RENAMED = (  # OpenAI's and open_clip's names, behind | transformers': ours
    (r"^class_embedding|^embeddings\.class_embedding", "cls_token"),
    (r"^positional_embedding|^embeddings\.position_embedding\.weight", "pos_embed"),
    (r"^conv1|^embeddings\.patch_embedding", "patch_embed.proj"),
    (r"^ln_pre|^pre_layrnorm", "norm_pre"),
    (r"^ln_post|^post_layernorm", "norm"),
    (r"^transformer\.resblocks|^encoder\.layers", "blocks"),
    (r"\bln_|\blayer_norm", "norm"),
    (r"\battn\.in_proj_|self_attn\.qkv_proj\.", "attn.qkv."),
    (r"\battn\.out_proj|self_attn\.out_proj", "attn.proj"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
)


def clip_weights(path):
    """{name: tensor} of the visual tower in a file of CLIP's weights, under the names of CLIPTower."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UserError(f"--teacher {path} is TorchScript, a program: give weights alone, as OpenMMLab's "
                            "clip_vit_base_16.pth.tar, or transformers' or open_clip's safetensors")
    found = read_file(path)["model"]
    prefix = "vision_model." if "visual_projection.weight" in found else "visual."
    weights = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    if prefix == "vision_model.":
        weights["proj"] = found["visual_projection.weight"].T
        for name in [name for name in weights if "self_attn.q_proj." in name]:
            values = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            weights[name.replace("q_proj", "qkv_proj")] = torch.cat(values)
    for pattern, new in RENAMED:
        weights = {re.sub(pattern, new, name): value for name, value in weights.items()}
    if not {"cls_token", "proj"} <= weights.keys():
        raise UserError(f"--teacher {path} holds no ViT of CLIP with its projection: expected visual.*, with "
                        "proj, or transformers' vision_model.* and visual_projection")
    return weights | {"cls_token": weights["cls_token"][None, None], "pos_embed": weights["pos_embed"][None]}


class QuickGELU(MLP):
    """Block.mlp with CLIP's activation"""

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class CLIPTower(ViT):
    """CLIP's image encoder, frozen: a ViT with a LayerNorm before its blocks and a projection at its end."""

    def __init__(self, cfg, size, feature_dim):
        super().__init__(size, cfg.img_size, cfg.patch_size)
        self.patch_embed.proj.bias = None
        self.norm_pre = nn.LayerNorm(self.embed_dim)
        self.proj = nn.Parameter(torch.randn(self.embed_dim, feature_dim) * self.embed_dim**-0.5)
        for block in self.blocks:
            block.mlp = QuickGELU(self.embed_dim, 4 * self.embed_dim)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        values = (torch.tensor(x).view(1, -1, 1, 1) for x in (cfg.mean, cfg.std, CLIP_MEAN, CLIP_STD))
        mean, std, clip_mean, clip_std = values  # from the student's normalisation to CLIP's
        self.register_buffer("scale", std / clip_std, persistent=False)
        self.register_buffer("shift", (mean - clip_mean) / clip_std, persistent=False)
        self.init_weights()
        self.eval().requires_grad_(False)

    def class_attention(self, x):
        """Tokens (B, 1 + L, D) before the last block -> what its class token pays to each patch, mean over
        heads: (B, L) float32; their sum is 1 less what it pays to itself."""
        attn, x = self.blocks[-1].attn, self.blocks[-1].norm1(x)
        (q_weight, k_weight, _), (q_bias, k_bias, _) = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
        q = F.linear(x[:, 0], q_weight, q_bias).unflatten(1, (attn.num_heads, -1))  # of the class token alone
        k = F.linear(x, k_weight, k_bias).unflatten(2, (attn.num_heads, -1))
        scores = torch.einsum("bhd,bnhd->bhn", q * q.shape[-1] ** -0.5, k)
        return scores.float().softmax(-1)[..., 1:].mean(1)

    @torch.no_grad()
    def forward(self, images):
        """(B, 3, H, W), normalised as the student's -> features (B, 1 + L, F), attention (B, L)"""
        x = self.norm_pre(self.prepend_cls(self.embed(images * self.scale + self.shift)))
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x)) @ self.proj, self.class_attention(x)


def load_teacher(cfg):
    """CLIPTower of --teacher's weights, for images and patches of cfg."""
    if cfg.teacher == "random":
        return CLIPTower(cfg, cfg.model, VIT_SIZES[cfg.model][0])
    weights = clip_weights(cfg.teacher)
    D, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    size = next((name for name, shape in VIT_SIZES.items() if shape[:2] == (D, depth)), None)
    if not size or patch_size != cfg.patch_size:
        raise UserError(f"--teacher {cfg.teacher}: {depth} blocks of width {D}, patches of {patch_size} px; "
                        f"expected the size of a --model, and --patch_size {cfg.patch_size}")
    teacher = CLIPTower(cfg, size, weights["proj"].shape[1])
    load_weights(teacher, cfg.teacher, ignore=("embeddings.",), content={"model": weights})
    return teacher


# ---- masks, decoder, loss ----------------------------------------------------------------------------------


def semantic_noise(noise, attention):
    """Noise (B, L), uniform in [0, 1), -> noise whose smallest values are a draw without replacement with
    probabilities ~ attention (B, L): exponential variables of these rates arrive in such an order."""
    return -noise.log() / attention


def feature_loss(pred, target, mask=None):
    """2 - 2 cos(pred, target) of tokens (B, N, F): mean over those where mask (B, N) is 1, or over all."""
    error = 2 - 2 * F.cosine_similarity(pred, target, dim=-1)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()


class PromptBlock(Block):
    """Of MILAN's decoder: x (B, n, D), the hidden tokens, ask all and change; `visible` (B, m, D) stay."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.attn.q, self.attn.kv, self.attn.qkv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), None

    def forward(self, x, visible):
        attn, y = self.attn, self.norm1(x)
        q = attn.q(y).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        kv = attn.kv(torch.cat([visible.to(y.dtype), y], dim=1))
        k, v = kv.unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + attn.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class FeatureAutoencoder(MaskedAutoencoder):
    """mae_mff.py's encoder and fusion, a decoder of features. `teacher` is set later and no submodule."""

    def __init__(self, cfg, feature_dim):
        super().__init__(cfg)
        size = cfg.decoder_embed_dim, cfg.decoder_num_heads
        self.decoder_pred = nn.Linear(cfg.decoder_embed_dim, feature_dim)
        if cfg.target == "milan":
            self.decoder_blocks = nn.ModuleList(PromptBlock(*size) for _ in range(cfg.decoder_depth))
        self.init_weights()

    def decode(self, latent, ids_restore):
        """(B, 1 + len_keep, D) -> predicted features: EVA of the patches (B, L, F), by MAE's decoder; MILAN
        of all tokens (B, 1 + L, F), by the prompting one."""
        if self.cfg.target == "eva":
            return super().decode(latent, ids_restore)
        x = self.decoder_embed(latent)
        B, n, _ = x.shape
        order = F.pad(1 + ids_restore.argsort(1), (1, 0))  # class token, visible patches, hidden ones
        positions = gather_tokens(self.decoder_pos_embed.expand(B, -1, -1), order)
        visible, hidden = x + positions[:, :n], self.mask_token + positions[:, n:]
        for block in self.decoder_blocks:
            hidden = block(hidden, visible)
        x = gather_tokens(torch.cat([visible, hidden], dim=1), order.argsort(1))  # undo the shuffle
        return self.decoder_pred(self.decoder_norm(x))

    def predict(self, images, noise):
        """(B, 3, H, W), noise (B, L) -> predictions and targets of the same tokens, mask (B, L), 1 = hidden,
        and attention (B, L)."""
        features, attention = self.teacher(images)
        milan = self.cfg.target == "milan"
        noise = semantic_noise(noise, attention) if milan else noise
        ids_keep, ids_restore, mask = random_masking(noise, self.cfg.mask_ratio)
        pred = self.decode(self.encode(images, ids_keep), ids_restore)
        return pred, features if milan else features[:, 1:], mask, attention

    def forward(self, images, noise):
        """Returns the loss and its terms: the loss; what one vector for all tokens would reach at best, which
        is 2 - 2 |mean of the targets' directions|; softmax(w) under the layers' numbers."""
        pred, target, mask, _ = self.predict(images, noise)
        with torch.autocast(images.device.type, enabled=False):  # the loss in float32
            pred, target = pred.float(), target.float()
            loss = feature_loss(pred, target, mask if self.cfg.target == "eva" else None)
            constant = 2 - 2 * F.normalize(target, dim=-1).mean((0, 1)).norm()
        return loss, {"loss": loss.detach(), "target/constant_loss": constant} | self.fuse_shares()


# ---- training ----------------------------------------------------------------------------------------------


@torch.no_grad()
def save_pictures(path, model, examples, run):
    """PNG: original, masked input, where CLIP's class token looks, cosine of prediction and target."""
    pred, target, mask, attention = model.predict(*examples)
    cosine = F.cosine_similarity(pred, target, dim=-1)[:, -mask.shape[1] :]  # of patches
    maps = (x[..., None] for x in (mask, attention / attention.amax(1, keepdim=True), cosine))
    hidden, attention, cosine = (patches_to_pixels(x, model.patch_size, model.grid) for x in maps)
    original = run.normalize.undo(examples[0])
    columns = original, original * (1 - hidden) + 0.5 * hidden, attention, cosine
    save_image_grid(path, list(zip(*columns, strict=True)), ["original", "masked", "attention", "cosine"],
                    f"target {model.cfg.target}; attention of the teacher's class token: white is an image's "
                    "most; cosine of predicted and true features: black is 0 or less, white 1")


def train(cfg, run):
    source = open_data(cfg)
    torch.manual_seed(cfg.seed)
    teacher = load_teacher(cfg)
    model = FeatureAutoencoder(cfg, teacher.proj.shape[1])
    # Past nn.Module's __setattr__: a submodule would be saved, trained and synchronised; this one is frozen.
    model.__dict__["teacher"] = teacher.to(run.device)
    sample_noise = functools.partial(torch.rand, math.prod(model.grid))
    if cfg.draw:
        return run.draw(model, source, sample_noise, save_pictures)
    if cfg.init:  # the encoder alone: decoders of pixels do not fit
        others = ("decoder", "mask_token", "fuse_")
        load_weights(model, cfg.init, allow_missing=others, ignore=("head.", "fc_norm.", *others))
    run.fit_batch(source)
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    run.start(len(source), f"lr {peak_lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 256")
    ddp = run.prepare(model)
    optimizer = adamw(parameter_groups(model, cfg.weight_decay), cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler)
    crop = SimpleResizedCrop(cfg.img_size) if cfg.crop == "src" else RandomResizedCrop(cfg.img_size)
    batches, examples = run.batches(source, crop, sample_noise), run.examples(source, sample_noise)

    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(ddp, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        if path := run.picture_due():
            save_pictures(path, model, examples, run)
        if run.save_due():
            run.save(model.trunk_state())
    run.finish()


if __name__ == "__main__":
    launch(Config, presets, train, "mff_feature")
