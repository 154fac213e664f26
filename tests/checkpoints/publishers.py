"""Networks of timm written down as their publishers name them: the inverse of what the package reads.

Every function takes timm's state dict and returns the publisher's, heads and all; written from the public naming,
without the package's tables.
"""

import argparse
import re

import torch


def swap(state, *pairs):
    """Names with parts replaced, in order."""
    out = {}
    for name, tensor in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out


def part(state, names, joined=r"attn\.qkv\."):
    """Query, key and value as tensors of their own; `names` are theirs, after the block's."""
    out = {}
    for name, tensor in state.items():
        if not re.search(joined, name):
            out[name] = tensor
            continue
        for own, piece in zip(names, tensor.chunk(3), strict=True):
            out[re.sub(joined, f"{own}.", name)] = piece.clone()
    return out


def rows(state):
    return next(iter(state.values())).new_ones(7, 32)


def dino(state):
    """A whole checkpoint of training, whose student is another one."""
    head = {"head.mlp.0.weight": torch.ones(8, 32), "head.last_layer.weight_v": torch.ones(9, 8)}
    teacher = {f"backbone.{k}": v for k, v in state.items()} | head
    student = {f"module.{k}": torch.randn_like(v) for k, v in teacher.items()}
    args = argparse.Namespace(arch="vit_tiny", patch_size=16)
    return {"student": student, "teacher": teacher, "optimizer": {"state": {}}, "epoch": 3, "args": args}


def dinov2(state):
    return state | {"mask_token": torch.zeros(1, 32)}


def dinov2_swiglu(state):
    return dinov2(swap(state, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")))


def dinov2_registers(state):
    """There, the class token has a position; timm has added it."""
    state, place = dict(state), torch.randn(1, 1, 32)
    state["cls_token"] = state["cls_token"] - place
    state["pos_embed"] = torch.cat((place, state["pos_embed"]), dim=1)
    state["register_tokens"] = state.pop("reg_token")
    return dinov2(state)


def dinov3(state):
    out = swap(state, (r"gamma_(\d)", r"ls\1.gamma"), (r"reg_token", "storage_tokens"))
    out = swap(out, (r"fc1_g", "w1"), (r"fc1_x", "w2"))
    if any("mlp.w1" in k for k in out):
        out = swap(out, (r"mlp\.fc2", "mlp.w3"))
    for i in range(2):
        q, v = (out.pop(f"blocks.{i}.attn.{x}_bias", torch.zeros(32)) for x in "qv")
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat((q, torch.zeros(32), v))
        out[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(96)
    return out | {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}


def mae(state):
    decoder = {
        "decoder_embed.weight": rows(state),
        "decoder_pos_embed": torch.ones(1, 5, 7),
        "mask_token": torch.ones(1, 1, 7),
    }
    decoder |= {"decoder_blocks.0.norm1.weight": torch.ones(7), "decoder_pred.bias": torch.ones(7)}
    return {"model": state | decoder, "epoch": 1, "args": argparse.Namespace(model="mae"), "scaler": {"scale": 1.0}}


def deit_distilled(state):
    return {"model": state | {"head.weight": rows(state), "head_dist.weight": rows(state)}}


def deit3(state):
    return {"model": swap(state, (r"ls(\d)\.gamma", r"gamma_\1")) | {"head.weight": rows(state)}}


def beit(state):
    """Fine-tuned: every block has positions, and timm's names are the authors'."""
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64) for i in range(2)}
    return {"model": state | index | {"head.weight": rows(state), "head.bias": torch.zeros(7)}}


def beit_pretrained(state):
    """All blocks share their positions (so do those of the network it is made from), and the norm is called `norm`."""
    table = state["blocks.0.attn.relative_position_bias_table"]
    state = {k: v for k, v in state.items() if "relative_position" not in k}
    state = swap(state, (r"^fc_norm", "norm"))
    shared = {"rel_pos_bias.relative_position_bias_table": table}
    return {"module": state | shared | {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": rows(state)}}


def eva(state):
    return {"module": state | {"head.weight": rows(state), "mask_token": torch.zeros(1, 1, 32)}}


def eva02(state):
    out = swap(state, (r"fc1_g", "w1"), (r"fc1_x", "w2"), (r"mlp\.fc2", "mlp.w3"), (r"mlp\.norm", "mlp.ffn_ln"))
    out = swap(out, (r"attn\.q_proj\.bias", "attn.q_bias"), (r"attn\.v_proj\.bias", "attn.v_bias"))
    return {"module": out | {"rope.freqs_cos": torch.ones(16, 16), "rope.freqs_sin": torch.ones(16, 16)}}


def clip(state):
    """OpenAI's, with the text tower beside, in half precision there; open_clip's has the same names."""
    vision = swap(
        state,
        (r"patch_embed\.proj", "conv1"),
        (r"pos_embed", "positional_embedding"),
        (r"cls_token", "class_embedding"),
        (r"norm_pre", "ln_pre"),
        (r"^norm", "ln_post"),
        (r"^blocks", "transformer.resblocks"),
        (r"norm(\d)", r"ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    vision["class_embedding"] = vision["class_embedding"].flatten()
    vision["positional_embedding"] = vision["positional_embedding"][0]
    text = {k: torch.ones_like(v) for k, v in vision.items() if k.startswith("transformer")}
    text |= {"positional_embedding": torch.ones(77, 32), "token_embedding.weight": torch.ones(9, 32)}
    text |= {"ln_final.weight": torch.ones(32), "text_projection": torch.ones(32, 16), "logit_scale": torch.ones(())}
    return {f"visual.{k}": v for k, v in vision.items()} | {"visual.proj": torch.ones(32, 16)} | text


def open_clip_trunk(state):
    beside = {"visual.head.proj.weight": torch.ones(16, 32), "text.token_embedding.weight": torch.ones(9, 32)}
    return {f"visual.trunk.{k}": v for k, v in state.items()} | beside


def swin(state):
    """The authors': a stage is made smaller at its end, in timm at the beginning of the next."""
    for i in (1, 2, 3):
        state = swap(state, (rf"^layers\.{i}\.downsample", f"layers.{i - 1}.downsample_"))
    state = swap(state, ("downsample_", "downsample"))
    return {"model": state | {"head.weight": rows(state), "layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49)}}


def convnext(state):
    grn = {k: v.reshape(1, 1, 1, -1) for k, v in state.items() if "grn" in k}
    out = swap(
        state | grn,
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"^stages\.(\d)\.blocks", r"stages.\1"),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"mlp\.grn\.weight", "grn.gamma"),
        (r"mlp\.grn\.bias", "grn.beta"),
        (r"^head\.norm", "norm"),
    )
    return {"model": out | {"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)}}


# --- Hugging Face's transformers --------------------------------------------------------------------------------------

EMBEDDINGS = (
    (r"^cls_token", "embeddings.cls_token"),
    (r"^dist_token", "embeddings.distillation_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
)
LAYER = (
    (r"^blocks\.", "encoder.layer."),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"attn\.proj", "attention.output.dense"),
)
ATTENTION = [f"attention.attention.{x}" for x in ("query", "key", "value")]


def below(prefix, state, **beside):
    return {f"{prefix}.{k}": v for k, v in state.items()} | {k.replace("_", ".", 1): v for k, v in beside.items()}


def hf_vit(state):
    state = swap(part(state, ATTENTION), *EMBEDDINGS, *LAYER, (r"^norm\.", "layernorm."))
    return below("vit", state, classifier_weight=torch.ones(7, 32), classifier_bias=torch.ones(7))


def hf_vit_model(state):
    """`ViTModel` alone: no prefix, a pooler."""
    vit = {k.removeprefix("vit."): v for k, v in hf_vit(state).items() if k.startswith("vit.")}
    return vit | {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}


def hf_deit(state):
    state = swap(part(state, ATTENTION), *EMBEDDINGS, *LAYER, (r"^norm\.", "layernorm."))
    state = below("deit", state)
    return state | {"cls_classifier.weight": torch.ones(7, 32), "distillation_classifier.weight": torch.ones(7, 32)}


def hf_dinov2(state):
    state = swap(
        part(state, ATTENTION),
        *EMBEDDINGS,
        (r"^register_tokens", "embeddings.register_tokens"),
        (r"^blocks\.", "encoder.layer."),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
        (r"attn\.proj", "attention.output.dense"),
        (r"^norm\.", "layernorm."),
        (r"mlp\.w12", "mlp.weights_in"),
        (r"mlp\.w3", "mlp.weights_out"),
    )
    return state | {"embeddings.mask_token": torch.zeros(1, 32)}


def hf_dinov2_swiglu(state):
    return hf_dinov2(swap(state, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")))


def hf_dinov2_registers(state):
    return hf_dinov2({k: v for k, v in dinov2_registers(state).items() if k != "mask_token"})


def hf_dinov3(state):
    gated = any("fc1_g" in k for k in state)
    out = swap(
        part(state, [f"attention.{x}_proj" for x in "qkv"]),
        (r"^cls_token", "embeddings.cls_token"),
        (r"^reg_token", "embeddings.register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
        (r"^blocks\.", "layer."),
        (r"gamma_(\d)", r"layer_scale\1.lambda1"),
        (r"attn\.proj", "attention.o_proj"),
        (r"attn\.([qv])_bias", r"attention.\1_proj.bias"),
        (r"mlp\.fc1_g", "mlp.gate_proj"),
        (r"mlp\.fc1_x" if gated else r"mlp\.fc1", "mlp.up_proj"),
        (r"mlp\.fc2", "mlp.down_proj"),
    )
    return out | {"embeddings.mask_token": torch.zeros(1, 1, 32)}


def hf_dinov3_silent(state):
    """Biases of queries and values are there and zero, as those of the published networks."""
    zeros = {f"layer.{i}.attention.{x}_proj.bias": torch.zeros(32) for i in range(2) for x in "qv"}
    return hf_dinov3(state) | zeros


def hf_beit(state):
    state = swap(
        part(state, ATTENTION),
        *EMBEDDINGS,
        (r"^blocks\.", "encoder.layer."),
        (r"attn\.q_bias", "attention.attention.query.bias"),
        (r"attn\.v_bias", "attention.attention.value.bias"),
        (r"attn\.rel", "attention.attention.relative_position_bias.rel"),
        (r"gamma_(\d)", r"lambda_\1"),
        *LAYER[1:],
        (r"^fc_norm", "pooler.layernorm"),
    )
    return below("beit", state, classifier_weight=torch.ones(7, 32))


def hf_swin(state):
    state = swin(state)["model"]
    state = {k: v for k, v in state.items() if not k.startswith("head") and "attn_mask" not in k}
    state = swap(
        part(state, [f"attention.self.{x}" for x in ("query", "key", "value")]),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^patch_embed\.norm", "embeddings.norm"),
        (r"^layers", "encoder.layers"),
        (r"attn\.rel", "attention.self.rel"),
        *LAYER[1:],
        (r"^norm\.", "layernorm."),
    )
    return below("swin", state, classifier_weight=torch.ones(7, 192))


def hf_convnext(state):
    state = {k: v for k, v in convnext(state)["model"].items() if not k.startswith("head")}
    state = swap(
        state,
        (r"grn\.gamma", "grn.weight"),
        (r"grn\.beta", "grn.bias"),
        (r"^downsample_layers\.0\.0", "embeddings.patch_embeddings"),
        (r"^downsample_layers\.0\.1", "embeddings.layernorm"),
        (r"^downsample_layers\.(\d)", r"encoder.stages.\1.downsampling_layer"),
        (r"^stages\.(\d)\.", r"encoder.stages.\1.layers."),
        (r"\bnorm\b", "layernorm"),
        (r"\.gamma$", ".layer_scale_parameter"),
    )
    return below("convnext", state, classifier_weight=torch.ones(7, 64))


def hf_clip(state):
    names = [f"self_attn.{x}_proj" for x in "qkv"]
    state = swap(
        part(state, names),
        (r"^cls_token", "embeddings.class_embedding"),
        (r"^pos_embed", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks", "encoder.layers"),
        (r"norm(\d)", r"layer_norm\1"),
        (r"attn\.proj", "self_attn.out_proj"),
    )
    state["embeddings.class_embedding"] = state["embeddings.class_embedding"].flatten()
    state["embeddings.position_embedding.weight"] = state["embeddings.position_embedding.weight"][0]
    beside = {"visual_projection.weight": torch.ones(16, 32), "logit_scale": torch.ones(())}
    beside["text_model.embeddings.token_embedding.weight"] = torch.ones(9, 32)
    return below("vision_model", state) | {"vision_model.embeddings.position_ids": torch.arange(17)[None]} | beside


# --- authors of methods -----------------------------------------------------------------------------------------------


def transfg(state):
    """Also FFVT's but for the names of the last block and its norm."""
    state = swap(
        part(state, [f"attn.{x}" for x in ("query", "key", "value")]),
        (r"^cls_token", "transformer.embeddings.cls_token"),
        (r"^pos_embed", "transformer.embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "transformer.embeddings.patch_embeddings"),
        (r"^norm\.", "transformer.encoder.part_norm."),
        (r"attn\.proj", "attn.out"),
        (r"norm1", "attention_norm"),
        (r"norm2", "ffn_norm"),
        (r"mlp", "ffn"),
        (r"^blocks\.0", "transformer.encoder.layer.0"),
        (r"^blocks\.1", "transformer.encoder.part_layer"),
    )
    return {"model": state | {"part_head.weight": torch.ones(7, 32), "part_head.bias": torch.ones(7)}}
