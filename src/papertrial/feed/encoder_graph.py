"""Write a BERT sentence encoder's safetensors weights as one small ONNX Runtime graph (needed once per machine).

The graph is built by hand instead of traced: the runtime's fused kernels are named directly and no general shape
arithmetic is left in it, so a session over it starts in some 20 ms without any graph optimisation.

A graph takes ``input_ids`` (B, T) int64 and gives ``embedding`` (B, H) float32: the mean over the tokens of the last
hidden states, not normalised. There is no attention mask, so a batch holds texts of one length; the encoder runs one
text at a time, which wastes nothing on padding and makes an embedding independent of the texts encoded beside it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp32", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
# 7 bits and a sign bit less than int8 offers: on processors without VNNI the kernels add two products of an unsigned
# activation and a signed weight in 16 bits, and 2 * 255 * 64 is the largest sum that cannot saturate there.
WEIGHT_CODES = 64.0
_CONTRIB = "com.microsoft"  # the domain of the runtime's own fused operators
_OPSET, _CONTRIB_OPSET, _IR_VERSION = 20, 1, 9


class _Graph:
    """Collects nodes and initialisers; every method returns the name of the tensor it makes."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._helper, self._numpy_helper = helper, numpy_helper
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.initializers.append(self._numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(self._helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output


def quantize_columns(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric codes of a weight in [-64, 64] with one scale per output.

    Parameters
    ----------
    weight : array (N, K)

    Returns
    -------
    codes : int8 array (K, N)
        ``weight.T ~ codes * scales``.
    scales : float32 array (N,)
    """
    scales = np.maximum(np.abs(weight).max(axis=1) / WEIGHT_CODES, np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(weight / scales[:, None]).astype(np.int8).T, scales


def _linear(graph: _Graph, x: str, name: str, weight: NDArray[Any], bias: NDArray[Any], precision: Precision) -> str:
    """``x @ weight.T + bias``; int8 multiplies in integers, the activations' range taken from the text at hand."""
    if precision == "fp32":
        product = graph.node("MatMul", [x, graph.constant(f"{name}.weight", weight.T)], f"{name}.product")
        return graph.node("Add", [product, graph.constant(f"{name}.bias", bias)], name)
    codes, scales = quantize_columns(weight)
    operands = [
        x,
        graph.constant(f"{name}.codes", codes),
        graph.constant(f"{name}.scales", scales),
        "",  # no zero points: the codes are symmetric
        graph.constant(f"{name}.bias", bias),
    ]
    return graph.node("DynamicQuantizeMatMul", operands, name, domain=_CONTRIB)


def _embeddings(graph: _Graph, take: Callable[[str], NDArray[Any]], max_length: int, precision: Precision) -> str:
    words = take("embeddings.word_embeddings.weight")
    if precision == "fp32":
        word = graph.node("Gather", [graph.constant("words", words), "input_ids"], "word", axis=0)
    else:  # one scale per word: half the file is this table
        scale = np.maximum(np.abs(words).max(axis=1, keepdims=True) / 127.0, np.finfo(np.float32).tiny)
        codes = graph.constant("word_codes", np.rint(words / scale).astype(np.int8))
        scales = graph.constant("word_scales", scale.astype(np.float32))
        picked = graph.node("Gather", [codes, "input_ids"], "word_code", axis=0)
        widened = graph.node("Cast", [picked], "word_float", to=1)
        word = graph.node("Mul", [widened, graph.node("Gather", [scales, "input_ids"], "word_scale")], "word")
    # every token is of segment 0, so its embedding joins the positions'
    table = take("embeddings.position_embeddings.weight")[:max_length]
    positions = graph.constant("positions", table + take("embeddings.token_type_embeddings.weight")[:1])
    length = graph.node("Shape", ["input_ids"], "length", start=1, end=2)
    zero = graph.constant("zero", np.zeros(1, np.int64))
    position = graph.node("Slice", [positions, zero, length, zero], "position")
    return graph.node("Add", [word, position], "embedded")


def build_graph(weights: Path, config: Path, max_length: int, precision: Precision) -> bytes:
    """The serialised ONNX model of a BERT encoder.

    Parameters
    ----------
    weights : path
        A safetensors file in the layout of ``transformers.BertModel``.
    config : path
        The model's ``config.json``.
    max_length : int
        The longest input in tokens; later positions are not carried.
    precision : {"fp32", "int8"}

    Raises
    ------
    ValueError
        The configuration is of another architecture, or a weight is missing.
    """
    from onnx import TensorProto, helper
    from safetensors.numpy import load_file

    settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.get("model_type") != "bert" or settings.get("hidden_act") != "gelu":
        raise ValueError(f"{config} is not a BERT encoder with GELU activations")
    tensors = load_file(weights)

    def take(name: str) -> NDArray[Any]:
        if name not in tensors:
            raise ValueError(f"{weights} lacks the weight {name}")
        return tensors[name].astype(np.float32)

    graph = _Graph()
    epsilon, heads = float(settings["layer_norm_eps"]), int(settings["num_attention_heads"])

    def parameters(name: str) -> list[str]:
        return [graph.constant(f"{name}.{part}", take(f"{name}.{part}")) for part in ("weight", "bias")]

    x = graph.node(
        "LayerNormalization",
        [_embeddings(graph, take, max_length, precision), *parameters("embeddings.LayerNorm")],
        "hidden",
        axis=-1,
        epsilon=epsilon,
    )
    for layer in range(int(settings["num_hidden_layers"])):
        x = _layer(graph, x, f"encoder.layer.{layer}", take, parameters, heads, epsilon, precision)
    axis = graph.constant("axis", np.ones(1, np.int64))
    graph.node("ReduceMean", [x, axis], "embedding", keepdims=0)
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"])]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", int(settings["hidden_size"])])]
    made = helper.make_graph(graph.nodes, "encoder", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, _CONTRIB_OPSET)]
    return helper.make_model(made, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString()


def _layer(
    graph: _Graph,
    x: str,
    name: str,
    take: Callable[[str], NDArray[Any]],
    parameters: Callable[[str], list[str]],
    heads: int,
    epsilon: float,
    precision: Precision,
) -> str:
    """One transformer block with the normalisation after each residual sum."""

    def linear(source: str, *modules: str) -> str:
        weight = np.concatenate([take(f"{name}.{module}.weight") for module in modules])
        bias = np.concatenate([take(f"{name}.{module}.bias") for module in modules])
        return _linear(graph, source, f"{name}.{'+'.join(modules)}", weight, bias, precision)

    def add_and_normalise(source: str, residual: str, module: str) -> str:
        # two plain nodes: measured 5 ms a text faster than the runtime's fused SkipLayerNormalization
        summed = graph.node("Add", [source, residual], f"{name}.{module}.sum")
        operands = [summed, *parameters(f"{name}.{module}.LayerNorm")]
        return graph.node("LayerNormalization", operands, f"{name}.{module}", axis=-1, epsilon=epsilon)

    projections = [f"attention.self.{part}" for part in ("query", "key", "value")]
    qkv = linear(x, *projections)
    parts = [f"{name}.{part}" for part in "qkv"]
    graph.nodes.append(graph._helper.make_node("Split", [qkv], parts, name=f"{name}.split", axis=-1, num_outputs=3))
    mixed = graph.node("MultiHeadAttention", parts, f"{name}.mixed", domain=_CONTRIB, num_heads=heads)
    x = add_and_normalise(linear(mixed, "attention.output.dense"), x, "attention.output")
    inner = graph.node("Gelu", [linear(x, "intermediate.dense")], f"{name}.inner")
    return add_and_normalise(linear(inner, "output.dense"), x, "output")
