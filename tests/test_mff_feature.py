"""mff_feature.py: CLIP's tower against transformers', from files of every public form; masks, decoder and
loss against slow versions."""

import math

import pytest
import torch
import torch.nn.functional as F

import common
import mff_feature
from mff_feature import Config, FeatureAutoencoder, load_teacher

SMALL = {"model": "nano", "img_size": (32, 32), "patch_size": 8, "teacher": "random"}


def build(**values):
    cfg = Config(**SMALL | values)
    teacher = load_teacher(cfg)
    model = FeatureAutoencoder(cfg, teacher.proj.shape[1])
    model.__dict__["teacher"] = teacher
    return model


# ---- the teacher


@pytest.fixture(scope="module")
def clip():
    """transformers' CLIP, random weights that differ in every tensor."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
            "vocab_size": 8, "eos_token_id": 7, "bos_token_id": 6, "pad_token_id": 5}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation("eager")  # others keep no attention
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.rand_like(parameter) - 0.2
    return model


def openai_names(clip):
    """What OpenAI's and open_clip's files hold, the text's tower among it."""
    state, found = clip.vision_model.state_dict(), {}
    found["class_embedding"] = state["embeddings.class_embedding"]
    found["positional_embedding"] = state["embeddings.position_embedding.weight"]
    found["conv1.weight"] = state["embeddings.patch_embedding.weight"]
    for kind in ("weight", "bias"):
        found[f"ln_pre.{kind}"] = state[f"pre_layrnorm.{kind}"]
        found[f"ln_post.{kind}"] = state[f"post_layernorm.{kind}"]
        for i in range(4):
            new, old = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            parts = [state[f"{old}.self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
            found[f"{new}.attn.out_proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
            for theirs, ours in (("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("ln_1", "layer_norm1"),
                                 ("ln_2", "layer_norm2")):
                found[f"{new}.{theirs}.{kind}"] = state[f"{old}.{ours}.{kind}"]
    found["proj"] = clip.visual_projection.weight.detach().T.contiguous()
    text = {"positional_embedding": torch.zeros(77, 16), "text_projection": torch.zeros(16, 24),
            "transformer.resblocks.0.ln_1.weight": torch.zeros(16), "logit_scale": torch.zeros(())}
    return {f"visual.{name}": value.clone() for name, value in found.items()} | text


def save(clip, form, folder):
    """The path of CLIP's weights in one of the public forms."""
    if form == "OpenMMLab's, fp16":
        path = folder / "clip_vit_base_16.pth.tar"
        weights = {name: value.half() for name, value in openai_names(clip).items()}
        torch.save(weights | {"input_resolution": torch.tensor(32)}, path)
    elif form == "open_clip's safetensors":
        path = folder / "open_clip_model.safetensors"
        pytest.importorskip("safetensors.torch").save_file(openai_names(clip), path)
    else:
        clip.save_pretrained(folder)
        path = folder
    if form == "transformers' safetensors":  # as version 4 wrote them
        tensors, path = pytest.importorskip("safetensors.torch"), folder / "model.safetensors"
        places = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
        tensors.save_file(tensors.load_file(path) | places, path)
    return path


@pytest.mark.parametrize("form, img_size", [
    ("OpenMMLab's, fp16", (32, 32)), ("open_clip's safetensors", (48, 32)),
    ("transformers' safetensors", (32, 32)), ("transformers' folder", (48, 32))])
def test_the_teacher_is_transformers_clip(clip, tmp_path, form, img_size):
    """Projected features of all tokens and the class token's attention, for images that we normalised."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    cfg = Config(**SMALL | {"teacher": str(save(clip, form, tmp_path)), "img_size": img_size})
    pixels = torch.rand(2, 3, *img_size)
    features, attention = load_teacher(cfg)(common.Normalize(cfg.mean, cfg.std, "cpu")(pixels))
    with torch.no_grad():
        found = clip.vision_model(common.Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, "cpu")(pixels),
                                  interpolate_pos_encoding=True, output_attentions=True)
        expected = clip.visual_projection(clip.vision_model.post_layernorm(found.last_hidden_state))
        logits = clip.visual_projection(found.pooler_output)
    near = {"atol": 2e-2, "rtol": 2e-2} if "fp16" in form else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(features, expected, **near)
    torch.testing.assert_close(features[:, 0], logits, **near)
    torch.testing.assert_close(attention, found.attentions[-1].mean(1)[:, 0, 1:], **near)


def test_what_is_no_teacher_is_refused(clip, tmp_path):
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "ViT-B-16.pt"))
    weights = torch.load(save(clip, "OpenMMLab's, fp16", tmp_path))
    for name, lacks in (("bare", "visual.proj"), ("three", "resblocks.3"), ("half", "ln_2")):
        torch.save({key: x for key, x in weights.items() if lacks not in key}, tmp_path / f"{name}.pth")
    for name, p, words in (
            ("ViT-B-16.pt", 8, "program: give weights alone.*clip_vit_base_16.pth.tar"),
            ("bare.pth", 8, "no ViT of CLIP with its"), ("three.pth", 8, "3 blocks of width 128"),
            ("half.pth", 4, "patches of 8 px; .*--patch_size 4"), ("half.pth", 8, "8 tensors missing")):
        with pytest.raises(common.UserError, match=words) as error:
            load_teacher(Config(**SMALL | {"teacher": str(tmp_path / name), "patch_size": p}))
        assert "\n" not in str(error.value)


# ---- masks, decoder, loss


def test_semantic_masks_are_draws_without_replacement():
    """How often each pair of four patches is visible, against the closed form."""
    p, n, counts = [0.5, 0.3, 0.15, 0.05], 40_000, {}
    noise = mff_feature.semantic_noise(torch.rand(n, 4), 0.4 * torch.tensor(p))  # need not sum to 1
    ids_keep, _, mask = mff_feature.random_masking(noise, 0.5)
    assert (mask.sum(1) == 2).all()
    for first, second in ids_keep.tolist():
        counts[first, second] = counts.get((first, second), 0) + 1
    for i in range(4):
        for j in set(range(4)) - {i}:
            chance = p[i] * p[j] / (1 - p[i])
            assert abs(counts[i, j] / n - chance) < 4 * math.sqrt(chance * (1 - chance) / n), (i, j)


def test_prompting_decoder_against_a_loop_over_images():
    """Keys and values are all tokens, in the image's order; visible ones neither normalised nor changed."""
    model = build(target="milan", decoder_depth=2)
    heads, width = model.cfg.decoder_num_heads, model.cfg.decoder_embed_dim
    ids_keep, ids_restore, mask = mff_feature.random_masking(torch.rand(3, 16), 0.75)
    latent = torch.randn(3, 5, 128)
    out = model.decode(latent, ids_restore)
    assert out.shape == (3, 17, 128)
    for b in range(3):
        x = (model.decoder_pos_embed[0] + model.mask_token[0]).clone()
        places = [0, *(1 + i for i in ids_keep[b].tolist())]
        x[places] = model.decoder_embed(latent[b]) + model.decoder_pos_embed[0, places]
        hidden = [1 + i for i in range(16) if mask[b, i]]
        for block in model.decoder_blocks:
            attn, asked = block.attn, x.clone()
            asked[hidden] = block.norm1(x[hidden])
            weights = torch.cat([attn.q.weight, attn.kv.weight]), torch.cat([attn.q.bias, attn.kv.bias])
            moved, _ = F.multi_head_attention_forward(
                asked[hidden], asked, asked, width, heads, *weights, None, None, False, 0.0, attn.proj.weight,
                attn.proj.bias, training=False)
            x = x.clone()
            x[hidden] = x[hidden] + moved
            x[hidden] = x[hidden] + block.mlp(block.norm2(x[hidden]))
        expected = model.decoder_pred(model.decoder_norm(x))
        torch.testing.assert_close(out[b], expected, atol=1e-5, rtol=1e-4)


def test_loss_against_a_loop():
    pred, target = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
    error = [2 - 2 * float(p @ t / p.norm() / t.norm())
             for p, t in zip(pred.flatten(0, 1), target.flatten(0, 1), strict=True)]
    hidden = error[0] + error[3] + error[9]
    assert mff_feature.feature_loss(pred, target, mask).item() == pytest.approx(hidden / 3, rel=1e-5)
    assert mff_feature.feature_loss(pred, target).item() == pytest.approx(sum(error) / 10, rel=1e-5)


@pytest.mark.parametrize("target", ["eva", "milan"])
def test_each_target_has_its_tokens_and_masks(target):
    """Of the whole model: which targets enter the loss, and the patches that the teacher attends to."""
    model, noise = build(target=target), torch.rand(6, 16)
    images = torch.randn(6, 3, 32, 32)
    pred, wanted, mask, attention = model.predict(images, noise)
    features, attended = model.teacher(images)
    assert torch.equal(attention, attended) and (attention.sum(1) < 1).all()
    score = noise.log() / attention if target == "milan" else -noise  # the largest stay
    visible = score.topk(4, dim=1).indices
    assert not mask.gather(1, visible).any() and (mask.sum(1) == 12).all()
    tokens = features if target == "milan" else features[:, 1:]
    assert torch.equal(wanted, tokens)
    loss, terms = model(images, noise)
    weight = torch.ones(6, 17) if target == "milan" else mask
    error = (F.normalize(pred, dim=-1) - F.normalize(tokens, dim=-1)).square().sum(-1)  # = 2 - 2 cos
    torch.testing.assert_close(loss, (error * weight).sum() / weight.sum())
    best = F.normalize(F.normalize(tokens, dim=-1).mean((0, 1)), dim=0)
    constant = (best - F.normalize(tokens, dim=-1)).square().sum(-1).mean()
    torch.testing.assert_close(terms["target/constant_loss"], constant)
    common.ViT("nano", (32, 32), 8).load_state_dict(model.trunk_state())  # strict: what is exported
