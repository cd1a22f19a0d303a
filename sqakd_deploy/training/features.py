"""A layer's codes beside the logits: SQuaT's term, which compares student and teacher there.

The teacher's tensor is quantised by the student's own quantizer, so that the student is asked for
what it can express (Kim et al., 2026, *SQuaT*). No label takes part, and no gradient reaches the
quantizer through the teacher's side.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from sqakd_deploy.errors import SpecError
from sqakd_deploy.quantization import input_shape_of, spec_of
from sqakd_deploy.quantizers import ActivationQuantizer, WeightQuantizer
from sqakd_deploy.tracing.trace import trace


class WithCodes(nn.Module):
    """A network that answers with its logits and with a tensor's codes on [0, 1].

    Args:
        tapped: gives ``(logits, tensor)``.
        quantizer: of the tensor; its parameters are the student's.
        quantised: whether the tensor already comes from the quantizer.
    """

    def __init__(
        self, tapped: fx.GraphModule, quantizer: ActivationQuantizer, *, quantised: bool
    ) -> None:
        super().__init__()
        self.tapped, self.quantised = tapped, quantised
        self.quantizer = quantizer

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, K)`` logits, and codes of the tensor's own shape."""
        logits, tensor = self.tapped(images)
        tensor = tensor.float()
        value = tensor if self.quantised else self.quantizer(tensor)[0]
        return logits, self.quantizer.normalised(value)


def answers(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Logits, and codes where the network gives them, in float32."""
    return [output.float() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of codes on [0, 1]; the teacher's are constants."""
    return F.mse_loss(student, teacher.detach())


def with_codes(student: nn.Module, teacher: nn.Module) -> tuple[WithCodes, WithCodes]:
    """Student and teacher, both with the codes of the input of the last inner layer.

    That is the second convolution of the last block in the residual networks of the paper. The
    results share modules and parameters with the arguments.

    Args:
        student: made by :func:`~sqakd_deploy.quantization.quantize` from a model like the teacher.
        teacher: the float model.

    Raises:
        ModelError: if the student is none.
        SpecError: if no inner layer reads a quantised tensor, or the teacher has no such tensor.
    """
    spec_of(student)
    assert isinstance(student, fx.GraphModule)  # what spec_of accepts
    tap, quantizer = _last_inner_input(student)
    edge = tap
    while _quantizer(student, edge):
        (edge,) = edge.all_input_nodes
    traced = trace(teacher, input_shape_of(student))
    named = {node.name: node for node in traced.graph.nodes}
    if edge.name not in named:
        raise SpecError(
            f"features: the teacher has no tensor {edge.name!r}, as the student has; it must be "
            "of the student's architecture, or leave --features out"
        )
    ours = WithCodes(_tapped(student, tap), quantizer, quantised=True)
    theirs = WithCodes(_tapped(traced, named[edge.name]), quantizer, quantised=False)
    return ours, theirs


def _last_inner_input(student: fx.GraphModule) -> tuple[fx.Node, ActivationQuantizer]:
    """The quantised tensor that the last inner layer reads, and its quantizer.

    Inner are the layers at the spec's bits that the output does not come from.
    """
    spec, last = spec_of(student), _last_layers(student)
    calls = [node for node in student.graph.nodes if node.op == "call_module"]
    layers = [node for node in calls if node not in last]
    for node in reversed(layers):
        module = student.get_submodule(str(node.target))
        bits = {m.bits for m in module.modules() if isinstance(m, WeightQuantizer)}
        source = node.all_input_nodes[0]
        quantizer = _quantizer(student, source)
        if quantizer is None or quantizer.bits != spec.activations.bits:
            continue
        if bits == {spec.weights.bits}:
            return source, quantizer
    raise SpecError(
        f"features: no layer of this model has {spec.weights.bits}-bit weights and reads "
        f"{spec.activations.bits}-bit activations; leave --features out"
    )


def _last_layers(student: fx.GraphModule) -> set[fx.Node]:
    """The convolutions and linear layers behind which there is no other."""
    found: set[fx.Node] = set()
    ahead = [node for node in student.graph.nodes if node.op == "output"]
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        module = student.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            found.add(node)
            continue
        ahead += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return found


def _quantizer(student: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """The one that writes a node's tensor, if one does."""
    module = student.get_submodule(str(node.target)) if node.op == "call_module" else nn.Identity()
    found = [m for m in module.modules() if isinstance(m, ActivationQuantizer)]
    return found[0] if found else None


def _tapped(model: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """The same modules in a graph that returns ``(output, node)``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(model.graph, copies)
    graph.output((output, copies[node]))
    return fx.GraphModule(model, graph, type(model).__name__)
