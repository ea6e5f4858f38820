"""Copies of a model with noise on the weights of its linear layers, and what they make of many images."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fedbd.defenses.own_weights import need_own_weights
from fedbd.errors import MethodRefused
from fedbd.metrics import logits, predict
from fedbd.types import Samples


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the model's Linear layers, in the order of its modules.

    Raises:
        MethodRefused: If it has none, or one whose weight is computed from other parameters.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        raise MethodRefused(
            "model_mutation mutates Linear layers and the model has none; take a model with a classifier"
        )
    for name, layer in layers.items():
        need_own_weights(name, layer, "model_mutation")
    return list(layers.values())


def split_before_linear(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return a model as two: up to its linear layers, and from there on; the second shares the model's layers.

    Args:
        model: In eval mode.

    Returns:
        ``(head, tail)`` with ``tail(head(x)) == model(x)``, whatever the linear layers' weights; None if the model
        cannot be traced (``torch.fx``) or is no chain at the cut.
    """
    try:
        traced = fx.symbolic_trace(model)
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError):
        return None  # its forward depends on the data
    nodes, late = list(traced.graph.nodes), set[fx.Node]()
    for node in nodes:
        if _reads_linear(model, node) or any(before in late for before in node.all_input_nodes):
            late.add(node)
    crossing = {before for node in late for before in node.all_input_nodes if before not in late}
    # What runs after a linear layer without its output may still change, in place, what the layer was given.
    first = next((i for i, node in enumerate(nodes) if node in late), len(nodes))
    if len(crossing) != 1 or not late.issuperset(nodes[first:]):
        return None
    (cut,) = crossing
    head, tail = fx.Graph(), fx.Graph()
    early: dict[fx.Node, fx.Node] = {}
    after = {cut: tail.placeholder("x")}
    for node in nodes:
        graph, copies = (tail, after) if node in late else (head, early)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    head.output(early[cut])
    return fx.GraphModule(traced, head), fx.GraphModule(traced, tail)


def _reads_linear(model: nn.Module, node: fx.Node) -> bool:
    if node.op not in ("call_module", "get_attr"):
        return False
    name = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
    return any(isinstance(module, nn.Linear) for module in model.get_submodule(name).modules()) if name else False


class Mutants:
    """The same mutants of one model, evaluated as often as asked, each time at a noise level of one's choice.

    Attributes:
        start: ``linear`` if what comes before the linear layers is computed once; ``images`` if the model could not be
            split there and every mutant is run from the images on.
    """

    start: Literal["linear", "images"]

    def __init__(self, model: nn.Module, count: int, seed: int, mean_shift: bool) -> None:
        """Prepare mutants.

        Args:
            model: Left untouched.
            count: How many.
            seed: Decides their noise, drawn per mutant and linear layer as a standard normal of the weights' shape.
            mean_shift: Add the layer's mean weight to the noise.

        Raises:
            MethodRefused: If the model has no Linear layer.
        """
        self._model = copy.deepcopy(model).eval()
        self._layers = linear_layers(self._model)
        self._weights = [layer.weight.detach().clone() for layer in self._layers]
        self._count, self._seed, self._mean_shift = count, seed, mean_shift
        self._split = split_before_linear(self._model)
        self.start = "images" if self._split is None else "linear"

    def inputs(self, images: Samples) -> Tensor:
        """Return what mutants take in of images: the images, or what comes before the linear layers of them."""
        return images.images if self._split is None else logits(self._split[0], images)

    def flips(self, inputs: Tensor, labels: NDArray[np.int64], noise: float) -> NDArray[np.bool_]:
        """Return which mutants give which inputs another label.

        Args:
            inputs: Of ``inputs``.
            labels: (N,) int64, what is no flip. A mutant's NaN is one.
            noise: v: deviation of the noise in multiples of a layer's largest signed weight.

        Returns:
            (mutants, N) bool.
        """
        rng = torch.Generator().manual_seed(self._seed)
        flips = np.empty((self._count, len(labels)), dtype=np.bool_)
        for i in range(self._count):
            for layer, weight in zip(self._layers, self._weights, strict=True):
                draw = torch.randn(weight.shape, generator=rng).to(weight)
                mean = weight.mean() if self._mean_shift else 0.0
                with torch.no_grad():
                    # A negative maximum mirrors the noise, which is distributed as before.
                    layer.weight.copy_(weight + mean + weight.max() * noise * draw)
            if self._split is None:
                flips[i] = predict(self._model, inputs) != labels
            else:
                # A copy of each chunk: the tail may work in place. Threads cost more than they save on so little.
                flips[i] = predict(self._split[1], inputs, stamp=torch.clone, threads=1) != labels
        return flips
