"""The parameter shapes of known models, computed from their published configurations: no weights, no downloads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

from .shapes import Group, Model, Shape, grouped

Tensors = Iterator[tuple[str, Shape]]
MILLION = 1_000_000


def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def norm(name: str, size: int) -> Tensors:
    """LayerNorm, or what of BatchNorm is trained."""
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def is_matrix(shape: Shape) -> bool:
    return len(shape) > 1


def decay_matrices(name: str, source: str, tensors: Tensors) -> Model:
    """Two groups: weight decay for what has two dimensions or more, none for biases and norms."""
    return grouped(name, source, {tensor: (shape, 1.0, float(is_matrix(shape))) for tensor, shape in tensors})


def resnet50() -> Model:
    def tensors() -> Tensors:
        yield "conv1.weight", (64, 3, 7, 7)
        yield from norm("bn1", 64)
        inputs = 64
        for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            for block in range(blocks):
                place = f"layer{stage}.{block}"
                for number, shape in enumerate(
                    ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)), 1
                ):
                    yield f"{place}.conv{number}.weight", shape
                    yield from norm(f"{place}.bn{number}", shape[0])
                if block == 0:
                    yield f"{place}.downsample.0.weight", (4 * width, inputs, 1, 1)
                    yield from norm(f"{place}.downsample.1", 4 * width)
                inputs = 4 * width
        yield from linear("fc", 1000, 2048)

    return decay_matrices("resnet-50", "He et al. 2015, as torchvision's resnet50", tensors())


def vit(name: str, width: int, layers: int, rate: float) -> Model:
    """With layer-wise decay, as for fine-tuning: the groups are the pairs of layer and weight decay."""

    def tensors() -> Iterator[tuple[int, str, Shape]]:
        def at(layer: int, found: Tensors) -> Iterator[tuple[int, str, Shape]]:
            return ((layer, tensor, shape) for tensor, shape in found)

        yield 0, "cls_token", (1, 1, width)
        yield 0, "pos_embed", (1, 197, width)
        yield 0, "patch_embed.proj.weight", (width, 3, 16, 16)
        yield 0, "patch_embed.proj.bias", (width,)
        for layer in range(layers):
            place = f"blocks.{layer}"
            yield from at(layer + 1, norm(f"{place}.norm1", width))
            yield from at(layer + 1, linear(f"{place}.attn.qkv", 3 * width, width))
            yield from at(layer + 1, linear(f"{place}.attn.proj", width, width))
            yield from at(layer + 1, norm(f"{place}.norm2", width))
            yield from at(layer + 1, linear(f"{place}.mlp.fc1", 4 * width, width))
            yield from at(layer + 1, linear(f"{place}.mlp.fc2", width, 4 * width))
        yield from at(layers + 1, norm("norm", width))
        yield from at(layers + 1, linear("head", 1000, width))

    def decays(tensor: str, shape: Shape) -> float:
        return float(is_matrix(shape) and tensor not in ("cls_token", "pos_embed"))

    return grouped(
        name,
        f"Dosovitskiy et al. 2020, 224 pixels, 1000 classes; layer-wise decay {rate}",
        {tensor: (shape, rate ** (layers + 1 - layer), decays(tensor, shape)) for layer, tensor, shape in tensors()},
    )


def bert_large() -> Model:
    def tensors() -> Tensors:
        for table, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
            yield f"embeddings.{table}_embeddings.weight", (rows, 1024)
        yield from norm("embeddings.LayerNorm", 1024)
        for layer in range(24):
            place = f"encoder.layer.{layer}"
            for part in ("query", "key", "value"):
                yield from linear(f"{place}.attention.self.{part}", 1024, 1024)
            yield from linear(f"{place}.attention.output.dense", 1024, 1024)
            yield from norm(f"{place}.attention.output.LayerNorm", 1024)
            yield from linear(f"{place}.intermediate.dense", 4096, 1024)
            yield from linear(f"{place}.output.dense", 1024, 4096)
            yield from norm(f"{place}.output.LayerNorm", 1024)
        yield from linear("pooler.dense", 1024, 1024)

    return decay_matrices("bert-large", "Devlin et al. 2018, uncased, with the pooler, without heads", tensors())


def gpt2_xl() -> Model:
    def tensors() -> Tensors:
        yield "wte.weight", (50257, 1600)
        yield "wpe.weight", (1024, 1600)
        for layer in range(48):
            place = f"h.{layer}"
            yield from norm(f"{place}.ln_1", 1600)
            # Stored as [inputs, outputs].
            for part, inputs, outputs in (("attn.c_attn", 1600, 4800), ("attn.c_proj", 1600, 1600)):
                yield f"{place}.{part}.weight", (inputs, outputs)
                yield f"{place}.{part}.bias", (outputs,)
            yield from norm(f"{place}.ln_2", 1600)
            for part, inputs, outputs in (("mlp.c_fc", 1600, 6400), ("mlp.c_proj", 6400, 1600)):
                yield f"{place}.{part}.weight", (inputs, outputs)
                yield f"{place}.{part}.bias", (outputs,)
        yield from norm("ln_f", 1600)

    return decay_matrices("gpt2-xl", "Radford et al. 2019; the head is the embedding", tensors())


def llama_3_8b(name: str, layers: int, embeddings: bool) -> Model:
    def tensors() -> Tensors:
        if embeddings:
            yield "embed_tokens.weight", (128256, 4096)
        for layer in range(layers):
            place = f"layers.{layer}"
            for part, outputs, inputs in (
                ("self_attn.q_proj", 4096, 4096),
                ("self_attn.k_proj", 1024, 4096),
                ("self_attn.v_proj", 1024, 4096),
                ("self_attn.o_proj", 4096, 4096),
                ("mlp.gate_proj", 14336, 4096),
                ("mlp.up_proj", 14336, 4096),
                ("mlp.down_proj", 4096, 14336),
            ):
                yield from linear(f"{place}.{part}", outputs, inputs, bias=False)
            yield f"{place}.input_layernorm.weight", (4096,)
            yield f"{place}.post_attention_layernorm.weight", (4096,)
        yield "norm.weight", (4096,)
        if embeddings:
            yield "lm_head.weight", (128256, 4096)

    what = "whole, with its head" if embeddings else f"{layers} of its 32 layers and the last norm, no embeddings"
    return decay_matrices(name, f"Meta 2024, Llama 3 8B, {what}", tensors())


def quartznet_15x5() -> Model:
    def convolution(name: str, inputs: int, outputs: int, kernel: int, separable: bool = True) -> Tensors:
        if separable:
            yield f"{name}.depthwise.weight", (inputs, 1, kernel)
            inputs, kernel, name = inputs, 1, f"{name}.pointwise"
        yield f"{name}.weight", (outputs, inputs, kernel)

    def normed(name: str, inputs: int, outputs: int, kernel: int, separable: bool = True) -> Tensors:
        yield from convolution(f"{name}.conv", inputs, outputs, kernel, separable)
        yield from norm(f"{name}.bn", outputs)

    def tensors() -> Tensors:
        yield from normed("encoder.0", 64, 256, 33)
        inputs, place = 256, 1
        for outputs, kernel in ((256, 33), (256, 39), (512, 51), (512, 63), (512, 75)):
            for _ in range(3):
                first = inputs
                for repeat in range(5):
                    yield from normed(f"encoder.{place}.{repeat}", inputs, outputs, kernel)
                    inputs = outputs
                yield from normed(f"encoder.{place}.residual", first, outputs, 1, separable=False)
                place += 1
        yield from normed(f"encoder.{place}", 512, 512, 87)
        yield from normed(f"encoder.{place + 1}", 512, 1024, 1, separable=False)
        yield "decoder.weight", (29, 1024, 1)
        yield "decoder.bias", (29,)

    return decay_matrices("quartznet-15x5", "Kriman et al. 2019, 64 features, 28 letters and the blank", tensors())


def rf_detr_nano() -> Model:
    """A group a tensor, as rf-detr's get_param_dict made them before release 1.10 (rf-detr#1409)."""
    width, hidden, queries = 384, 256, 300 * 13

    def mlp(name: str, *sizes: int) -> Tensors:
        for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
            yield from linear(f"{name}.layers.{layer}", outputs, inputs)

    def backbone() -> Iterator[tuple[int, str, Shape]]:
        embeddings = {"cls_token": (1, 1, width), "mask_token": (1, width), "position_embeddings": (1, 577, width)}
        patches = {"patch_embeddings.weight": (width, 3, 16, 16), "patch_embeddings.bias": (width,)}
        yield from ((0, f"embeddings.{name}", shape) for name, shape in {**embeddings, **patches}.items())
        for layer in range(12):
            place = f"encoder.layer.{layer}"
            found = [*norm(f"{place}.norm1", width), *norm(f"{place}.norm2", width)]
            for part in ("query", "key", "value", "output"):
                found += linear(f"{place}.attention.{part}", width, width)
            found += [(f"{place}.layer_scale{number}", (width,)) for number in (1, 2)]
            found += linear(f"{place}.mlp.fc1", 4 * width, width)
            found += linear(f"{place}.mlp.fc2", width, 4 * width)
            yield from ((layer + 1, name, shape) for name, shape in found)
        yield from ((13, name, shape) for name, shape in norm("layernorm", width))

    def projector() -> Tensors:
        def normed(name: str, inputs: int, outputs: int, kernel: int) -> Tensors:
            yield f"projector.{name}.conv.weight", (outputs, inputs, kernel, kernel)
            yield from norm(f"projector.{name}.bn", outputs)

        yield from normed("cv1", 4 * width, hidden, 1)
        yield from normed("cv2", 5 * hidden // 2, hidden, 1)
        for block in range(3):
            for number in (1, 2):
                yield from normed(f"m.{block}.cv{number}", hidden // 2, hidden // 2, 3)
        yield from norm("projector.norm", hidden)

    def decoder() -> Tensors:
        for layer in range(2):
            place = f"decoder.layers.{layer}"
            yield f"{place}.self_attn.in_proj_weight", (3 * hidden, hidden)
            yield f"{place}.self_attn.in_proj_bias", (3 * hidden,)
            yield from linear(f"{place}.self_attn.out_proj", hidden, hidden)
            for part, outputs in (("sampling_offsets", 64), ("attention_weights", 32)):
                yield from linear(f"{place}.cross_attn.{part}", outputs, hidden)
            for part in ("value_proj", "output_proj"):
                yield from linear(f"{place}.cross_attn.{part}", hidden, hidden)
            yield from linear(f"{place}.linear1", 2048, hidden)
            yield from linear(f"{place}.linear2", hidden, 2048)
            for number in (1, 2, 3):
                yield from norm(f"{place}.norm{number}", hidden)
        yield from norm("decoder.norm", hidden)
        yield from mlp("decoder.ref_point_head", 2 * hidden, hidden, hidden)

    def heads() -> Tensors:
        for group in range(13):
            yield from linear(f"enc_output.{group}", hidden, hidden)
            yield from norm(f"enc_output_norm.{group}", hidden)
            yield from mlp(f"enc_out_bbox_embed.{group}", hidden, hidden, hidden, 4)
            yield from linear(f"enc_out_class_embed.{group}", 91, hidden)
        yield from linear("class_embed", 91, hidden)
        yield from mlp("bbox_embed", hidden, hidden, hidden, 4)
        yield "refpoint_embed.weight", (queries, 4)
        yield "query_feat.weight", (queries, hidden)

    groups = []
    for layer, name, shape in backbone():
        undecayed = layer in (0, 13) or re.search(r"norm|bias|layer_scale", name) is not None
        groups.append(Group(0.8 ** (13 - layer), float(not undecayed), {name: shape}))
    groups += [Group(1.0, 1.0, {name: shape}) for name, shape in (*projector(), *heads())]
    groups += [Group(0.7, 1.0, {name: shape}) for name, shape in decoder()]
    return Model("rf-detr-nano", tuple(groups), "Roboflow 2025, RF-DETR nano, 91 classes; a group a tensor")


def tiny() -> Model:
    """Small enough for a test: a two-layer perceptron."""

    def tensors() -> Tensors:
        yield from linear("0", 32, 16)
        yield from norm("1", 32)
        yield from linear("2", 8, 32)

    return decay_matrices("tiny", "a perceptron of 872 parameters, to try the harness with", tensors())


def dense(name: str, numel: int) -> Model:
    """One group of 40 matrices: what a step costs by size alone."""
    tensors = {f"{index}.weight": (numel // 40_000, 1000) for index in range(40)}
    return Model(name, (Group(1.0, 1.0, tensors),), "40 equal matrices in one group")


def matrices(name: str, rows: int) -> Model:
    """8 matrices whose rows are of a power of two, which every format of states takes."""
    return Model(
        name,
        (Group(1.0, 1.0, {f"{index}.weight": (rows, 1024) for index in range(8)}),),
        f"8 matrices of {rows:,} x 1,024",
    )


def small_tensors(name: str, groups: int) -> Model:
    """1,000 tensors of 16 elements in a number of groups: what a step costs the host."""
    each = 1000 // groups
    made = (
        Group(1.0 - index / (2 * groups), 1.0, {f"{index}.{position}": (16,) for position in range(each)})
        for index in range(groups)
    )
    return Model(name, tuple(made), f"1,000 tensors of 16 elements, {each} a group")


MODELS: dict[str, Callable[[], Model]] = {
    "resnet-50": resnet50,
    "vit-b-16": partial(vit, "vit-b-16", 768, 12, 0.65),
    "vit-l-16": partial(vit, "vit-l-16", 1024, 24, 0.75),
    "bert-large": bert_large,
    "gpt2-xl": gpt2_xl,
    "llama-3-8b": partial(llama_3_8b, "llama-3-8b", 32, embeddings=True),
    "llama-3-8b-slice": partial(llama_3_8b, "llama-3-8b-slice", 4, embeddings=False),
    "quartznet-15x5": quartznet_15x5,
    "rf-detr-nano": rf_detr_nano,
    "tiny": tiny,
    **{f"dense-{n}m": partial(dense, f"dense-{n}m", n * MILLION) for n in (1, 4, 16, 64, 256)},
    "dense-1g": partial(dense, "dense-1g", 1000 * MILLION),
    **{f"matrices-{n}m": partial(matrices, f"matrices-{n}m", 128 * n) for n in (1, 16)},
    **{f"groups-{n}": partial(small_tensors, f"groups-{n}", n) for n in (1, 10, 50, 200, 1000)},
}
