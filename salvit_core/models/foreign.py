"""Networks that others wrote, as graphs of our operations: read for what they compute, not for what it is called.

torch.export gives a network as a list of tensor operations with every shape, the batch's size left open. Each of them
becomes one or more of our operations here, by the rule of its name; whatever depends on weights and shapes alone is
computed at once, so that what is left is what must run on secrets. A rule that is not here is a refusal, by name and
place, with what could stand in for the operation.

Letters in the shape comments: B batch, C channels, N tokens, M dimension of the model, H heads, D of a head.
"""

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import ACTIVATIONS, TanhGELU
from .graph import TRACING, trace
from .normalizers import NORMALIZERS, Normalizer
from .operations import (
    Divide,
    Gain,
    MatMul,
    Multiply,
    Operation,
    Repeat,
    Resample,
    Sum,
    Take,
    known,
    of_kind,
)

# In the place of minus infinity in a mask: exp of it is nothing in float32 beside one, and fixed point can hold it.
MASKED = -64.0

# What could stand in for an operation that has no rule.
STAND_INS = {
    "softplus": "relu",
    "elu": "relu or silu",
    "selu": "relu or silu",
    "celu": "relu or silu",
    "mish": "silu or hardswish",
    "prelu": "leaky_relu",
    "log_softmax": "the logits before it: the classes are in the same order",
    "logsumexp": "the logits before it",
    "exp": "softmax, or a polynomial",
    "log": "a polynomial on a known range",
    "sqrt": "layer_norm, which divides by a root",
    "rsqrt": "layer_norm, which divides by a root",
    "linalg_vector_norm": "layer_norm, which divides by a root",
    "instance_norm": "batch_norm with running statistics",
    "conv_transpose2d": "interpolation and a convolution",
    "conv1d": "conv2d of height one",
    "conv3d": "conv2d",
    "lstm": "attention",
    "gru": "attention",
    "topk": "the logits before it",
    "argmax": "the logits before it",
    "max": "max_pool2d, or a mean",
    "amax": "max_pool2d, or a mean",
    "sort": "a mean",
    "where": "a product with a constant mask",
    "embedding": "a linear map of one-hot inputs",
    "grid_sampler": "interpolation at fixed places",
}


@dataclass(eq=False)
class Fixed:
    """A tensor that no image enters: a weight, or what was computed of weights and shapes.

    Attributes:
        value: the tensor.
        learnt: whether a parameter is in it.
        name: of the parameter or buffer that it is, if it is one as it stands.
    """

    value: torch.Tensor
    learnt: bool = False
    name: str | None = None

    @property
    def number(self) -> float | None:
        """The number that it is, if it is a single one that nobody learns."""
        return self.value.item() if self.value.numel() == 1 and self.value.dim() == 0 and not self.learnt else None


class Unknown(Exception):
    """What a rule does not cover: raised within, told with the place by `adopt`."""


def adopt(
    model: nn.Module,
    example: torch.Tensor,
    softmax: str = "softmax",
    gelu: str = "gelu",
) -> fx.GraphModule:
    """A network that others wrote, as a graph of our operations, in evaluation mode.

    It computes what the network does, within float's rounding: BatchNorm is folded into the convolution or linear map
    before it, and is an affine map where there is none; dropout is gone. Parameters stay parameters under their names
    where they are used as they are, so that the graph can be trained; a table that is only looked up by position, such
    as Swin's relative biases, becomes the matrix that it was looked up for.

    Args:
        model: any module that torch.export can read, whose forward maps images to logits; it is not changed.
        example: images (B, C, height, width) as it reads them. Their shape counts, the batch's size aside; their values
            only where the network divides by an activation, whose usual size a protocol has to know.
        softmax: what stands in softmax's place, a name of `NORMALIZERS`.
        gelu: what stands in GELU's place, a name of `ACTIVATIONS`.

    Returns:
        (B, C, height, width) -> (B, classes), a graph that `private`, `cost` and training take as they take our own.

    Raises:
        ValueError: an unknown name, a network that torch.export cannot read, or operations that have no rule here: one
            line each, with the place and what could stand in for it.
    """
    if softmax not in NORMALIZERS:
        raise ValueError(f"softmax {softmax!r} is unknown: choose from {', '.join(NORMALIZERS)}")
    if gelu not in ACTIVATIONS:
        raise ValueError(f"gelu {gelu!r} is unknown: choose from {', '.join(ACTIVATIONS)}")
    model = deepcopy(model).eval()
    adoption = _Adoption(model, softmax, gelu)
    graph = adoption.graph_of(_exported(model, example))
    if adoption.refused:
        raise ValueError("\n".join(dict.fromkeys(adoption.refused)))
    _size_divisions(graph, example)
    return graph


def read(model: nn.Module, images: torch.Tensor, lacking: Callable[[fx.GraphModule], list[str]]) -> fx.GraphModule:
    """A model's graph: as it is traced where nothing is lacking, else adopted.

    Args:
        model: any module.
        images: (B, C, height, width); their shape counts.
        lacking: what of a graph cannot be dealt with.

    Raises:
        ValueError: as `adopt`.
    """
    try:
        graph = trace(model)
        if isinstance(model, fx.GraphModule) or not lacking(graph):
            return graph
    except ValueError:
        pass
    parameter = next(model.parameters(), images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))  # public, unlike the images
    return trace(adopt(model, noise.to(parameter.device, parameter.dtype)))


def unknown(graph: fx.GraphModule) -> list[str]:
    """The modules of a graph that are no operation of ours, by name and place."""
    calls = [(node.target, graph.get_submodule(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    return [f"{type(module).__name__} ({place})" for place, module in calls if type(module) not in known()]


# Reading


def _exported(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """The network's operations, in evaluation mode, for any size of batch."""
    # Two images: of one, torch.export would take its size for a constant.
    images = example[:1].expand(2, *example.shape[1:]).contiguous()
    try:
        with TRACING, _plain_attention():
            return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    except Exception as error:  # torch's own, of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        tried = f"cannot be traced by torch.fx, nor by torch.export for images of shape {tuple(example.shape)}"
        raise ValueError(f"{type(model).__name__} {tried}: {reason}") from error


@contextmanager
def _plain_attention():
    """Without the fused kernel of nn.MultiheadAttention, which is one operation and says nothing of what it does."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Adoption:
    """One network on its way: the graph so far, and what was refused.

    Args:
        model: the network in evaluation mode, for its modules' names.
        softmax: a name of `NORMALIZERS`.
        gelu: a name of `ACTIVATIONS`.
    """

    def __init__(self, model: nn.Module, softmax: str, gelu: str):
        self.model, self.softmax, self.gelu = model, softmax, gelu
        self.root, self.graph = nn.Module(), fx.Graph()
        self.refused: list[str] = []
        self.parameters: dict[Fixed, torch.Tensor] = {}
        self.places: dict[tuple, str] = {}  # of what was made of a weight: a module that is called twice stays one
        self.attributes: dict[Fixed, str] = {}
        self.node: fx.Node  # of the exported graph, at which the reading is
        self.path = ""  # of the module that it is in

    def graph_of(self, program: torch.export.ExportedProgram) -> fx.GraphModule:
        """The graph of a whole program."""
        given = []
        for spec in program.graph_signature.input_specs:
            if spec.kind.name == "USER_INPUT":
                given.append(self.graph.placeholder("images"))
                self.images = given[-1]
            else:
                store = program.state_dict if spec.target in program.state_dict else program.constants
                given.append(Fixed(store[spec.target].detach(), spec.kind.name == "PARAMETER", spec.target))
        signature = program.module_call_graph[0].signature
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        self.batch = next(node for node in placeholders if node.name in program.graph_signature.user_inputs)
        self.batch = self.batch.meta["val"].shape[0]
        found = self._walk(program.graph_module, given)
        plain = signature is None or signature.out_spec.is_leaf()
        if len(found) != 1 or not plain or not isinstance(found[0], fx.Node):
            raise ValueError(
                f"{type(self.model).__name__} does not return one tensor: wrap it so that it returns logits"
            )
        if isinstance(self.batch, int):
            raise ValueError(f"{type(self.model).__name__} is written for one size of batch: let it take any")
        self.graph.output(found[0])
        _place(self.root, self.graph)
        return fx.GraphModule(self.root, self.graph, type(self.model).__name__).eval()

    def _walk(self, module: fx.GraphModule, given: Sequence[Any]) -> tuple:
        """Read a graph: each of its nodes becomes a node of ours, a fixed tensor, or what Python has for it."""
        env: dict[fx.Node, Any] = {}
        inputs = iter(given)
        outside = self.path
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(inputs)
            elif node.op == "get_attr":
                env[node] = module.get_submodule(node.target)
            elif node.op == "output":
                return tuple(fx.node.map_arg(node.args[0], env.__getitem__))
            else:
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                paths = [entry[0] for entry in stack if self._is_there(entry[0])]
                self.path = paths[-1] if paths else outside
                self.node = node
                env[node] = self._call(env)
                self.path = outside
        raise AssertionError("a graph without an output")

    def _is_there(self, path: str) -> bool:
        try:
            self.model.get_submodule(path)
            return True
        except AttributeError:
            return False

    def _call(self, env: dict[fx.Node, Any]) -> Any:
        node = self.node
        value = node.meta.get("val")
        if isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
            return value  # shape arithmetic: done
        args = fx.node.map_arg(node.args, lambda one: env[one])
        options = fx.node.map_arg(node.kwargs, lambda one: env[one])
        if node.target is operator.getitem:
            return args[0][args[1]]
        name, place = _name(node.target), self.path
        if name in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
            at = next(i for i, arg in enumerate(args) if isinstance(arg, nn.Module))
            return self._walk(args[at], args[at + 1 :])
        parts = _tensors((args, options))
        if not any(isinstance(part, fx.Node) for part in parts) and not _open_shape(value):
            return self._computed(parts, args, options)
        written = name.endswith("_") and not name.startswith("_")
        name = name.rstrip("_") if written else name
        try:
            if name in LIKE and not _open_shape(value):  # the shape of an activation, and nothing else of it
                return self._computed([], args, options)
            if name not in RULES:
                raise Unknown(name)
            result = self._ruled(name, args, options)
        except Unknown as error:
            said, stand_in = str(error), STAND_INS.get(name)
            hint = f"{stand_in} could stand in for it" if stand_in else "write it with other operations"
            self.refused.append(f"no private protocol for {said} ({place or 'the network itself'}): {hint}")
            result = self.graph.placeholder(f"missing_{len(self.refused)}")
        if written and isinstance(node.args[0], fx.Node):
            env[node.args[0]] = result
            source = node.args[0]
            if _name(source.target) in VIEWS and len(source.args[0].users) > 1:
                self.refused.append(
                    f"no private protocol for {name}_ of a view ({place}): {name} could stand in for it"
                )
        return result

    def _ruled(self, name: str, args: tuple, options: dict) -> Any:
        """The result of an operation by its rule."""
        rule = RULES[name]
        try:
            inspect.signature(rule).bind(self, *args, **options)
        except TypeError as error:
            raise Unknown(f"{name} with {_shown(args, options)}") from error
        return rule(self, *args, **options)

    def _computed(self, parts: list, args: tuple, options: dict) -> Any:
        """What no image enters, computed now."""

        def plain(what):
            if isinstance(what, fx.Node):
                return torch.empty(0)
            return what.value if isinstance(what, Fixed) else what

        learnt = any(part.learnt for part in parts)
        with torch.no_grad():
            made = self.node.target(*_mapped(plain, args), **_mapped(plain, options))
        if isinstance(made, tuple | list):
            return [Fixed(part, learnt) if isinstance(part, torch.Tensor) else part for part in made]
        if isinstance(made, torch.Tensor) and len(parts) == 1 and made is parts[0].value:
            return parts[0]  # itself, written to or not
        return Fixed(made, learnt) if isinstance(made, torch.Tensor) else made

    # What rules ask for

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, its open dimension -1.

        Raises:
            Unknown: more than one is open.
        """
        return _closed(self.node.meta["val"].shape)

    def shape_of(self, which: int) -> tuple[int, ...]:
        """Of an argument of the node, its open dimension -1."""
        return _closed(self.node.args[which].meta["val"].shape)

    def module(self, name: str, module: nn.Module, *inputs: Any, like: Fixed | None = None) -> fx.Node:
        """A call of a module, at the place where the network has it.

        Args:
            name: what to call it where the network has no name of its own for it.
            module: ours.
            inputs: nodes.
            like: its weight: where that has been used so before, the module is the one that was made then.
        """
        if like is not None and like.name is not None and (like, type(module)) in self.places:
            return self.graph.call_module(self.places[like, type(module)], inputs)
        if like is not None and like.name is not None:
            place = like.name.removesuffix("weight").rstrip("._")
        elif self.path and not list(self.model.get_submodule(self.path).children()):
            place = self.path
        else:
            place = f"{self.path}.{name}".lstrip(".")
        place = self._free(place)
        self.root_module(place, module)
        if like is not None:
            self.places[like, type(module)] = place
        return self.graph.call_module(place, inputs)

    def root_module(self, place: str, module: nn.Module) -> None:
        """Put a module where its place says."""
        *above, last = place.split(".")
        holder = self.root
        for part in above:
            if part not in dict(holder.named_children()):
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.add_module(last, module)

    def _free(self, place: str) -> str:
        """The place, or the next that nothing is at."""
        free, count = place, 1
        while self._taken(free):
            count += 1
            free = f"{place}_{count}"
        return free

    def _taken(self, place: str) -> bool:
        *above, last = place.split(".")
        holder = self.root
        for part in above:
            if isinstance(holder, Operation) or part not in dict(holder.named_children()):
                return isinstance(holder, Operation)
            holder = holder.get_submodule(part)
        return hasattr(holder, last)

    def parameter(self, fixed: Fixed | None) -> torch.Tensor | None:
        """A weight of a module of ours; a weight that several share stays one."""
        if fixed is None:
            return None
        if fixed not in self.parameters:
            self.parameters[fixed] = nn.Parameter(fixed.value.detach().clone(), requires_grad=fixed.learnt)
        return self.parameters[fixed]

    def attribute(self, fixed: Fixed) -> fx.Node:
        """A fixed tensor as the graph's own, to be added."""
        if fixed not in self.attributes:
            name = fixed.name or f"{self.path}.fixed".lstrip(".")
            if not fixed.name and self.path and not list(self.model.get_submodule(self.path).children()):
                name = f"{self.path}_fixed"
            place = self._free(name)
            *above, last = place.split(".")
            holder = self.root
            for part in above:
                if part not in dict(holder.named_children()):
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            value = self.finite(fixed)
            if fixed.learnt:
                holder.register_parameter(last, self.parameter(Fixed(value, True)))
            else:
                holder.register_buffer(last, value.clone())
            self.attributes[fixed] = place
        return self.graph.get_attr(self.attributes[fixed])

    @staticmethod
    def finite(fixed: Fixed) -> torch.Tensor:
        """Its numbers, minus infinity as `MASKED`."""
        value = fixed.value
        return value.masked_fill(value == -math.inf, MASKED) if value.is_floating_point() else value.float()

    def repeated(self, fixed: Fixed) -> fx.Node:
        """A fixed tensor for every image, of which it has none or one: (1, ...) -> (B, ...)."""
        module = Repeat(fixed.value.shape)
        module.weight = self.parameter(fixed)
        return self.module("repeat", module, self.images)

    def moved(self, x: fx.Node, name: str, *args: Any) -> fx.Node:
        """A method that only moves numbers about."""
        return self.graph.call_method(name, (x, *args))

    def function(self, function: Callable, *args: Any) -> fx.Node:
        """A function of torch's or Python's."""
        return self.graph.call_function(function, args)

    def at(self, x: fx.Node, dim: int, index: int | slice) -> fx.Node:
        """Entries along a dimension, from the front."""
        return self.function(operator.getitem, x, (*[slice(None)] * dim, index))

    def plus(self, x: fx.Node, fixed: Fixed, shape: tuple[int, ...]) -> fx.Node:
        """An activation of this shape and a fixed tensor, added up."""
        if fixed.number is not None:
            return self.function(operator.add, x, fixed.number)
        if not _within(fixed.value.shape, shape):
            if fixed.value.dim() < len(shape):
                fixed = Fixed(fixed.value.expand(1, *fixed.value.shape), fixed.learnt)
            if fixed.value.dim() != len(shape) or fixed.value.shape[0] != 1:
                raise Unknown(f"{_name(self.node.target)} that makes an activation larger")
            return self.function(operator.add, x, self.repeated(fixed))
        return self.function(operator.add, x, self.attribute(fixed))

    def gain(self, x: fx.Node, fixed: Fixed, shape: tuple[int, ...]) -> fx.Node:
        """An activation of this shape times a fixed tensor, entry by entry."""
        if fixed.number is not None:
            return self.function(operator.mul, x, fixed.number)
        if not _within(fixed.value.shape, shape):
            raise Unknown(f"{_name(self.node.target)} that makes an activation larger")
        module = Gain((1,))
        module.weight = self.parameter(fixed)
        return self.module("gain", module, x)


def _name(target: Any) -> str:
    """Of an operation: "add" of torch.ops.aten.add.Tensor."""
    text = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return text.split(".")[1] if text.startswith("aten.") else text


def _mapped(function: Callable[[Any], Any], what: Any) -> Any:
    """A function of all that nested arguments hold."""
    if isinstance(what, dict):
        return {key: _mapped(function, value) for key, value in what.items()}
    if isinstance(what, tuple | list):
        return (
            type(what)(_mapped(function, value) for value in what)
            if type(what) in (tuple, list)
            else [_mapped(function, value) for value in what]
        )
    return function(what)


def _tensors(what: Any) -> list:
    """The nodes and fixed tensors among nested arguments."""
    found: list = []
    _mapped(lambda one: found.append(one) if isinstance(one, Fixed | fx.Node) else None, what)
    return found


def _open_shape(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(not isinstance(size, int) for size in value.shape)


def _closed(shape: Sequence) -> tuple[int, ...]:
    made = tuple(size if isinstance(size, int) else -1 for size in shape)
    if made.count(-1) > 1:
        raise Unknown("a shape with two open dimensions")
    return made


def _within(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be added to one of another without making it larger."""
    if len(small) > len(large):
        return False
    return all(a == 1 or a == b for a, b in zip(reversed(small), reversed(large)))


def _shown(args: tuple, options: dict) -> str:
    """Arguments that are no tensors, for a person."""
    plain = [str(arg) for arg in args if not isinstance(arg, Fixed | fx.Node)]
    return ", ".join(plain + [f"{name}={value}" for name, value in options.items()])


# Rules: what the operations of torch.export become


VIEWS = {"view", "reshape", "transpose", "permute", "select", "slice", "unsqueeze", "squeeze", "expand", "t", "unbind"}
LIKE = {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"}
RULES: dict[str, Callable[..., Any]] = {}


def _rule(*names: str) -> Callable[[Callable], Callable]:
    """Enter a rule under names of torch.ops.aten; its arguments are those of the operation, after the adoption."""

    def enter(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def _secret(what: Any, name: str) -> fx.Node:
    """An argument that must be an activation."""
    if not isinstance(what, fx.Node):
        raise Unknown(f"{name} of what is no activation")
    return what


def _fixed(what: Any, name: str) -> Fixed | None:
    """An argument that must be a weight, or left out."""
    if what is not None and not isinstance(what, Fixed):
        raise Unknown(f"{name} with an activation for a weight")
    return what


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    """What torch keeps as one number or two."""
    first, second = sizes if len(sizes) == 2 else (sizes[0], sizes[0])
    return first, second


# What moves numbers about


@_rule(
    *("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "positive", "lift_fresh_copy", "float"),
    *("dropout", "feature_dropout", "alpha_dropout", "native_dropout"),
)
def _nothing(adoption: _Adoption, x: Any, *_, **__) -> Any:
    return x


@_rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size")
def _checked(adoption: _Adoption, *_, **__) -> None:
    return None


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshaped(adoption: _Adoption, x: Any, *_, **__) -> fx.Node:
    return adoption.moved(_secret(x, "reshape"), "reshape", adoption.shape)


@_rule("permute")
def _permuted(adoption: _Adoption, x: fx.Node, dims: list[int]) -> fx.Node:
    return adoption.moved(x, "permute", tuple(dims))


@_rule("transpose", "swapaxes", "swapdims")
def _transposed(adoption: _Adoption, x: fx.Node, first: int, second: int) -> fx.Node:
    return adoption.moved(x, "transpose", first, second)


@_rule("t", "numpy_T", "mT")
def _turned(adoption: _Adoption, x: fx.Node) -> fx.Node:
    return adoption.moved(x, "transpose", -2, -1)


@_rule("movedim", "moveaxis")
def _moved(adoption: _Adoption, x: fx.Node, source: int | list[int], target: int | list[int]) -> fx.Node:
    count = len(adoption.shape)
    order = torch.empty((0, *range(1, count + 1))).movedim(
        *([s + 1 if s >= 0 else s for s in ([side] if isinstance(side, int) else side)] for side in (source, target))
    )
    return adoption.moved(x, "permute", tuple(size - 1 for size in order.shape[1:]))


@_rule("expand", "expand_as", "broadcast_to")
def _expanded(adoption: _Adoption, x: Any, *_, **__) -> fx.Node:
    value = adoption.node.meta["val"]
    if isinstance(x, Fixed):
        lead = len(value.shape) - x.value.dim()
        whole = x.value.expand(*[1] * lead, *x.value.shape)
        if str(value.shape[0]) != str(adoption.batch) or whole.shape[0] != 1:
            raise Unknown("expand of a weight, but not along the batch")
        return adoption.repeated(Fixed(whole.expand(1, *adoption.shape[1:]), x.learnt, x.name))
    if adoption.shape == adoption.shape_of(0):
        return x
    return adoption.moved(x, "expand", adoption.shape)


@_rule("repeat")
def _tiled(adoption: _Adoption, x: Any, repeats: Sequence[Any]) -> fx.Node:
    value = adoption.node.meta["val"]
    if not isinstance(x, Fixed) or str(value.shape[0]) != str(adoption.batch):
        raise Unknown("repeat of an activation")
    with torch.no_grad():
        return adoption.repeated(Fixed(x.value.repeat(1, *repeats[1:])[:1], x.learnt, x.name))


@_rule("select")
def _selected(adoption: _Adoption, x: fx.Node, dim: int, index: int) -> fx.Node:
    shape = adoption.shape_of(0)
    dim %= len(shape)
    if shape[dim] == -1:
        raise Unknown("select of one image of the batch")
    return adoption.at(x, dim, index % shape[dim])


@_rule("slice")
def _sliced(
    adoption: _Adoption, x: fx.Node, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> fx.Node:
    shape = adoption.shape_of(0)
    dim %= len(shape)
    if shape == adoption.shape and step == 1:
        return x
    if shape[dim] == -1:
        raise Unknown("slice of the batch")
    first, last, step = slice(start, end, step).indices(shape[dim])
    return adoption.at(x, dim, slice(first, last, step))


@_rule("narrow")
def _narrowed(adoption: _Adoption, x: fx.Node, dim: int, start: int, length: int) -> fx.Node:
    return _sliced(adoption, x, dim, start, start + length)


@_rule("unbind")
def _unbound(adoption: _Adoption, x: fx.Node, dim: int = 0) -> list[fx.Node]:
    dim %= len(adoption.shape_of(0))
    if adoption.shape_of(0)[dim] == -1:
        raise Unknown("unbind of the batch")
    return [adoption.at(x, dim, i) for i in range(adoption.shape_of(0)[dim])]


@_rule("split", "chunk", "split_with_sizes", "tensor_split")
def _split(adoption: _Adoption, x: fx.Node, sizes: Any, dim: int = 0) -> list[fx.Node]:
    dim %= len(adoption.shape_of(0))
    made, start = [], 0
    for part in adoption.node.meta["val"]:
        size = part.shape[dim]
        if not isinstance(size, int):
            raise Unknown("split of the batch")
        made.append(adoption.at(x, dim, slice(start, start + size)))
        start += size
    return made


@_rule("cat", "concat", "concatenate")
def _joined(adoption: _Adoption, parts: Sequence[Any], dim: int = 0) -> fx.Node:
    made = [part if isinstance(part, fx.Node) else adoption.repeated(_single(part)) for part in parts]
    return adoption.graph.call_function(torch.cat, (made, dim % len(adoption.shape)))


def _single(part: Fixed) -> Fixed:
    if part.value.shape[0] != 1:
        raise Unknown("cat of a weight along the batch")
    return part


@_rule("stack")
def _stacked(adoption: _Adoption, parts: Sequence[Any], dim: int = 0) -> fx.Node:
    shape = adoption.shape
    dim %= len(shape)
    one = tuple(1 if i == dim else size for i, size in enumerate(shape))
    made = [adoption.moved(_secret(part, "stack"), "reshape", one) for part in parts]
    return adoption.graph.call_function(torch.cat, (made, dim))


@_rule("roll")
def _rolled(adoption: _Adoption, x: fx.Node, shifts: list[int], dims: Sequence[int] = ()) -> fx.Node:
    if not dims or 0 in [dim % len(adoption.shape) for dim in dims]:
        raise Unknown("roll of the batch")
    return adoption.moved(x, "roll", tuple(shifts), tuple(dims))


@_rule("pad", "constant_pad_nd")
def _padded(
    adoption: _Adoption, x: fx.Node, pads: Sequence[int], mode: str = "constant", value: float | None = None
) -> fx.Node:
    if not isinstance(mode, str):  # of constant_pad_nd, which has none
        mode, value = "constant", mode
    if mode != "constant":
        raise Unknown(f"pad, {mode}")
    if not any(pads):
        return x
    made = adoption.function(F.pad, x, tuple(pads))
    if not value:
        return made
    inside = tuple(max(size, 1) for size in adoption.shape_of(0)[-(len(pads) // 2) :])
    return adoption.plus(made, Fixed(F.pad(torch.zeros(inside), tuple(pads), value=value)), adoption.shape)


@_rule("index", "index_select")
def _taken(adoption: _Adoption, x: fx.Node, *where: Any) -> fx.Node:
    """Entries along one dimension, by a table that everybody knows."""
    if isinstance(where[0], int):
        dim, table = where
    else:
        there = [(i, one) for i, one in enumerate(where[0]) if one is not None]
        if len(there) != 1:
            raise Unknown("index along several dimensions")
        dim, table = there[0]
    shape = adoption.shape_of(0)
    dim %= len(shape)
    if not isinstance(table, Fixed) or table.value.dim() != 1 or shape[dim] == -1 or table.value.is_floating_point():
        raise Unknown("index by what is no fixed list of places")
    places = table.value.nonzero().flatten() if table.value.dtype == torch.bool else table.value % shape[dim]
    if dim == len(shape) - 2:
        return adoption.module("take", Take(places.tolist()), x)
    if len(shape) == 1:
        raise Unknown("index of the batch")
    turned = adoption.moved(x, "transpose", dim, -2)
    return adoption.moved(adoption.module("take", Take(places.tolist()), turned), "transpose", dim, -2)


# Sums and products


@_rule("add")
def _added(adoption: _Adoption, x: Any, y: Any, *, alpha: float = 1) -> fx.Node:
    if isinstance(y, fx.Node) and alpha != 1:
        y = adoption.function(operator.mul, y, float(alpha))
    elif alpha != 1:
        y = Fixed(y.value * alpha, y.learnt) if isinstance(y, Fixed) else y * alpha
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return adoption.function(operator.add, x, y)
    secret, other, which = (x, y, 0) if isinstance(x, fx.Node) else (y, x, 1)
    if isinstance(other, Fixed):
        return adoption.plus(secret, other, adoption.shape_of(which))
    return adoption.function(operator.add, secret, float(other))


@_rule("sub", "subtract")
def _subtracted(adoption: _Adoption, x: Any, y: Any, *, alpha: float = 1) -> fx.Node:
    if isinstance(x, fx.Node):
        if isinstance(y, fx.Node) and alpha == 1:
            return adoption.function(operator.sub, x, y)
        return _added(adoption, x, y, alpha=-alpha)
    negative = adoption.function(operator.neg, y if alpha == 1 else adoption.function(operator.mul, y, float(alpha)))
    if isinstance(x, Fixed):
        return adoption.plus(negative, x, adoption.shape_of(1))
    return adoption.function(operator.add, negative, float(x))


@_rule("rsub")
def _taken_from(adoption: _Adoption, x: Any, y: Any, *, alpha: float = 1) -> fx.Node:
    if alpha != 1 or isinstance(y, Fixed):
        raise Unknown("rsub of a weight")
    negative = adoption.function(operator.neg, x)
    return adoption.function(operator.add, negative, y if isinstance(y, fx.Node) else float(y))


@_rule("neg")
def _negated(adoption: _Adoption, x: fx.Node) -> fx.Node:
    return adoption.function(operator.neg, x)


@_rule("mul", "multiply")
def _multiplied(adoption: _Adoption, x: Any, y: Any) -> fx.Node:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return adoption.module("product", Multiply(), x, y)
    secret, other, which = (x, y, 0) if isinstance(x, fx.Node) else (y, x, 1)
    if isinstance(other, Fixed):
        return adoption.gain(secret, other, adoption.shape_of(which))
    return adoption.function(operator.mul, secret, float(other))


@_rule("square")
def _squared(adoption: _Adoption, x: fx.Node) -> fx.Node:
    return adoption.module("square", Multiply(), x, x)


@_rule("pow")
def _raised(adoption: _Adoption, x: Any, exponent: Any) -> fx.Node:
    if not isinstance(x, fx.Node) or exponent != 2:
        raise Unknown("pow but for the square")
    return _squared(adoption, x)


@_rule("div", "divide", "true_divide")
def _divided(adoption: _Adoption, x: Any, y: Any) -> fx.Node:
    if isinstance(y, Fixed):
        return adoption.gain(x, Fixed(1 / y.value, y.learnt), adoption.shape_of(0))
    if isinstance(y, fx.Node):
        return adoption.module("quotient", Divide(eps=0.0), _secret(x, "div"), y)
    return adoption.function(operator.truediv, x, float(y))


@_rule("matmul", "bmm", "mm")
def _product(adoption: _Adoption, x: Any, y: Any) -> fx.Node:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        if min(len(adoption.shape_of(0)), len(adoption.shape_of(1))) < 2:
            raise Unknown("matmul with a vector")
        return adoption.module("product", MatMul(), x, y)
    weight, turned = (y, False) if isinstance(y, Fixed) else (x, True)
    if weight.value.dim() != 2:
        raise Unknown("matmul with more than one matrix of weights")
    if turned:  # W x = (x^T W^T)^T
        made = _linear(adoption, adoption.moved(y, "transpose", -2, -1), Fixed(weight.value, weight.learnt))
        return adoption.moved(made, "transpose", -2, -1)
    return _linear(adoption, x, Fixed(weight.value.t(), weight.learnt))


@_rule("addmm")
def _affine(adoption: _Adoption, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> fx.Node:
    weight, bias = _fixed(weight, "addmm"), _fixed(bias, "addmm")
    if (beta, alpha) != (1, 1) or weight is None or bias is None or bias.value.dim() != 1:
        raise Unknown("addmm but for a linear map")
    return _linear(adoption, _secret(x, "addmm"), Fixed(weight.value.t(), weight.learnt), bias)


@_rule("linear")
def _linear(adoption: _Adoption, x: Any, weight: Any, bias: Any = None) -> fx.Node:
    x, weight, bias = _secret(x, "linear"), _fixed(weight, "linear"), _fixed(bias, "linear")
    assert weight is not None
    out, inside = weight.value.shape
    module = nn.Linear(inside, out, bias is not None, device="meta")
    module.weight, module.bias = adoption.parameter(weight), adoption.parameter(bias)
    return adoption.module("linear", module, x, like=weight)


@_rule("conv2d")
def _convolved(
    adoption: _Adoption,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Any = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> fx.Node:
    x, weight, bias = _secret(x, "conv2d"), _fixed(weight, "conv2d"), _fixed(bias, "conv2d")
    assert weight is not None
    out, inside, *kernel = weight.value.shape
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        whole = [0, 0] if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel)]
        if any(size % 2 for size in whole):  # the odd one goes behind, as torch has it
            left, top = whole[1] // 2, whole[0] // 2
            x = adoption.function(F.pad, x, (left, whole[1] - left, top, whole[0] - top))
            whole = [0, 0]
        padding = [size // 2 for size in whole]
    options = dict(stride=stride, padding=_pair(padding), dilation=dilation, groups=groups)
    module = nn.Conv2d(inside * groups, out, tuple(kernel), bias=bias is not None, device="meta", **options)
    module.weight, module.bias = adoption.parameter(weight), adoption.parameter(bias)
    return adoption.module("conv", module, x, like=weight)


# Normalisation


@_rule("batch_norm")
def _batch_norm(
    adoption: _Adoption, x: fx.Node, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any
) -> fx.Node:
    """Into the map before it, where nothing else reads that; else a scale and a shift."""
    if training or not isinstance(mean, Fixed) or not isinstance(variance, Fixed):
        raise Unknown("batch_norm with the batch's own statistics")
    eps = rest[1]
    scale = (variance.value + eps).rsqrt()
    scale = scale if weight is None else scale * weight.value
    shift = -mean.value * scale
    shift = shift if bias is None else shift + bias.value
    source = adoption.node.args[0]
    before: Any = adoption.root.get_submodule(x.target) if x.op == "call_module" else None
    calls = sum(node.op == "call_module" and node.target == x.target for node in adoption.graph.nodes)
    flat = isinstance(before, nn.Linear) and len(adoption.shape) == 2
    if (isinstance(before, nn.Conv2d) or flat) and calls == 1 and len(source.users) == 1:
        # What folds is learnt as one: the map's weight and bias.
        factor = scale.view(-1, *[1] * (before.weight.dim() - 1))
        before.weight = nn.Parameter((before.weight * factor).detach())
        bias = shift if before.bias is None else shift + before.bias * scale
        before.bias = nn.Parameter(bias.detach())
        return x
    shape = (-1, *[1] * (len(adoption.shape) - 2))
    made = adoption.gain(x, Fixed(scale.detach().view(shape), True), adoption.shape)
    return adoption.plus(made, Fixed(shift.detach().view(shape), True), adoption.shape)


@_rule("layer_norm")
def _layer_norm(
    adoption: _Adoption,
    x: Any,
    sizes: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    fused: bool = True,
) -> fx.Node:
    x, weight, bias = _secret(x, "layer_norm"), _fixed(weight, "layer_norm"), _fixed(bias, "layer_norm")
    if len(sizes) == 1 and (weight is not None or bias is None):
        module = nn.LayerNorm(sizes[0], eps, weight is not None, bias is not None, device="meta")
        if weight is not None:
            module.weight, module.bias = adoption.parameter(weight), adoption.parameter(bias)
        return adoption.module("norm", module, x, like=weight)
    flat = adoption.moved(x, "reshape", (*adoption.shape[: -len(sizes)], math.prod(sizes)))
    return _scaled(adoption, _plain_norm(adoption, flat, math.prod(sizes), eps), weight, bias)


@_rule("group_norm")
def _group_norm(
    adoption: _Adoption, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> fx.Node:
    batch, channels, *rest = adoption.shape
    size = channels // groups * math.prod(rest)
    flat = adoption.moved(_secret(x, "group_norm"), "reshape", (batch, groups, size))
    apart = [None if one is None else Fixed(one.value.view(-1, *[1] * len(rest)), True) for one in (weight, bias)]
    return _scaled(adoption, _plain_norm(adoption, flat, size, eps), *apart)


def _plain_norm(adoption: _Adoption, x: fx.Node, size: int, eps: float) -> fx.Node:
    return adoption.module("norm", nn.LayerNorm(size, eps, elementwise_affine=False), x)


def _scaled(adoption: _Adoption, x: fx.Node, weight: Fixed | None, bias: Fixed | None) -> fx.Node:
    """Numbers in the shape of the node's result, scaled and shifted."""
    made = adoption.moved(x, "reshape", adoption.shape)
    made = made if weight is None else adoption.gain(made, weight, adoption.shape)
    return made if bias is None else adoption.plus(made, bias, adoption.shape)


@_rule("softmax", "_softmax")
def _softmax(adoption: _Adoption, x: Any, dim: int, *_: Any, **__: Any) -> fx.Node:
    return _normalised(adoption, _secret(x, "softmax"), dim, adoption.shape)


def _normalised(adoption: _Adoption, scores: fx.Node, dim: int, shape: tuple[int, ...]) -> fx.Node:
    """The normaliser that was asked for, of scores of this shape."""
    kind = NORMALIZERS[adoption.softmax]
    options: dict[str, Any] = {"dim": dim - len(shape) if dim >= 0 else dim}
    if len(shape) == 4:
        options |= {"heads": shape[1], "shape": shape[1:]}
    elif adoption.softmax == "l2q":
        options |= {"granularity": "global"}
    return adoption.module("normalizer", kind(**options), scores)


@_rule("scaled_dot_product_attention")
def _attention(
    adoption: _Adoption,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> fx.Node:
    query, key, value = (_secret(x, "scaled_dot_product_attention") for x in (query, key, value))
    if enable_gqa or isinstance(mask, fx.Node):
        raise Unknown("scaled_dot_product_attention with " + ("grouped heads" if enable_gqa else "a secret mask"))
    *lead, tokens, width = adoption.shape_of(0)
    shape = (*lead, tokens, adoption.shape_of(1)[-2])
    scores = adoption.module("scores", MatMul(), query, adoption.moved(key, "transpose", -2, -1))
    scores = adoption.function(operator.mul, scores, width**-0.5 if scale is None else float(scale))
    if is_causal:
        mask = Fixed(torch.ones(shape[-2:], dtype=torch.bool).tril())
    if mask is not None:
        if mask.value.dtype == torch.bool:
            mask = Fixed(torch.zeros(mask.value.shape).masked_fill(~mask.value, MASKED))
        scores = adoption.plus(scores, mask, shape)
    return adoption.module("values", MatMul(), _normalised(adoption, scores, -1, shape), value)


# Activations


def _activation(name: str, make: Callable[..., nn.Module]) -> Callable[..., fx.Node]:
    """The rule of a function of one number: `make` has the operation's arguments but the first."""

    def rule(adoption: _Adoption, x: fx.Node, *options: Any) -> fx.Node:
        return adoption.module(name, make(*options), x)

    return rule


def _clipped(low: float | None = None, high: float | None = None) -> nn.Module:
    if high is None and low == 0:
        return nn.ReLU()
    if low is None or high is None or isinstance(low, Fixed) or isinstance(high, Fixed):
        raise Unknown("clamp but for two bounds, or zero below")
    return nn.Hardtanh(float(low), float(high))


RULES.update(
    {
        "relu": _activation("relu", nn.ReLU),
        "relu6": _activation("relu6", nn.ReLU6),
        "hardtanh": _activation("hardtanh", nn.Hardtanh),
        "clamp": _activation("clip", _clipped),
        "clip": _activation("clip", _clipped),
        "clamp_min": _activation("clip", _clipped),
        "hardswish": _activation("hardswish", nn.Hardswish),
        "hardsigmoid": _activation("hardsigmoid", nn.Hardsigmoid),
        "silu": _activation("silu", nn.SiLU),
        "sigmoid": _activation("sigmoid", nn.Sigmoid),
        "tanh": _activation("tanh", nn.Tanh),
        "leaky_relu": _activation("leaky_relu", nn.LeakyReLU),
    }
)


@_rule("gelu")
def _gelu(adoption: _Adoption, x: fx.Node, *, approximate: str = "none") -> fx.Node:
    if adoption.gelu == "gelu":
        return adoption.module("gelu", TanhGELU() if approximate == "tanh" else nn.GELU(), x)
    return adoption.module("gelu", ACTIVATIONS[adoption.gelu](adoption.shape[-1]), x)


# Pooling and interpolation


@_rule("sum")
def _summed(adoption: _Adoption, x: fx.Node, dims: Any = None, keepdim: bool = False, **_: Any) -> fx.Node:
    shape = adoption.shape_of(0)
    dims = tuple(range(len(shape))) if not dims else (dims,) if isinstance(dims, int) else tuple(dims)
    dims = tuple(dim % len(shape) for dim in dims)
    if any(shape[dim] == -1 for dim in dims):
        raise Unknown("sum over the batch")
    return adoption.module("sum", Sum(tuple(dim - len(shape) for dim in dims), keepdim), x)


@_rule("mean")
def _mean(adoption: _Adoption, x: fx.Node, dims: Any = None, keepdim: bool = False, **_: Any) -> fx.Node:
    made = _summed(adoption, x, dims, keepdim)
    shape = adoption.shape_of(0)
    count = math.prod(shape[dim] for dim in adoption.root.get_submodule(made.target).dims)
    return adoption.function(operator.mul, made, 1 / count)


@_rule("adaptive_avg_pool2d")
def _adapted(adoption: _Adoption, x: fx.Node, size: Sequence[int]) -> fx.Node:
    if adoption.shape == adoption.shape_of(0):
        return x
    if tuple(adoption.shape[-2:]) == (1, 1):
        return _mean(adoption, x, (-2, -1), True)
    return _resampled(adoption, x, lambda line, axis: F.adaptive_avg_pool1d(line, adoption.shape[axis]))


@_rule("avg_pool2d")
def _averaged(
    adoption: _Adoption,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil: bool = False,
    with_pads: bool = True,
    divisor: int | None = None,
) -> fx.Node:
    if divisor is not None:
        raise Unknown("avg_pool2d with a divisor of its own")
    sizes = [_pair(one) for one in (kernel, stride or kernel, padding)]

    def one(line: torch.Tensor, axis: int) -> torch.Tensor:
        return F.avg_pool1d(line, *(pair[axis] for pair in sizes), ceil, with_pads)

    return _resampled(adoption, x, one)


@_rule("upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d")
def _interpolated(adoption: _Adoption, x: fx.Node, *options: Any, **more: Any) -> fx.Node:
    """What is separable and fixed is a product with a matrix on either side; torch says which."""

    def one(line: torch.Tensor, axis: int) -> torch.Tensor:
        # A picture of one unit line: along the axis it is what torch makes of it, across it is all the same.
        picture = line[..., :, None] if axis == 0 else line[..., None, :]
        across = adoption.shape_of(0)[-1 - axis]
        picture = picture.repeat(*[1] * picture.dim()).expand(
            *(across if s == 1 and i == picture.dim() - 2 + (1 - axis) else s for i, s in enumerate(picture.shape))
        )
        made = adoption.node.target(picture.contiguous(), *options, **more)
        return made[..., :, 0] if axis == 0 else made[..., 0, :]

    return _resampled(adoption, x, one)


def _resampled(adoption: _Adoption, x: fx.Node, one: Callable[[torch.Tensor, int], torch.Tensor]) -> fx.Node:
    """A map of the last two dimensions, each by itself: `one` has unit lines (1, size, size) and the axis, -2 or -1."""
    shape = adoption.shape_of(0)
    matrices = []
    for axis in (0, 1):
        made = one(torch.eye(shape[axis - 2])[None], axis)  # (1, before, after)
        matrices.append(made[0].t().tolist())
    return adoption.module("pool", Resample(*matrices), x)


@_rule("max_pool2d", "adaptive_max_pool2d")
def _max_pooled(
    adoption: _Adoption,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil: bool = False,
) -> fx.Node:
    shape, sizes = adoption.shape_of(0), adoption.node.meta["val"]
    if isinstance(sizes, tuple | list):
        raise Unknown("max_pool2d with indices")
    if _name(adoption.node.target) == "adaptive_max_pool2d":
        raise Unknown("adaptive_max_pool2d")
    if _pair(dilation) != (1, 1):
        raise Unknown("max_pool2d, dilated")
    kernel, stride, padding = _pair(kernel), _pair(stride or kernel), _pair(padding)
    for axis in (0, 1):
        # A last window that is not full has the last line once more: the maximum may count it twice.
        after = adoption.shape[axis - 2]
        short = (after - 1) * stride[axis] + kernel[axis] - shape[axis - 2] - 2 * padding[axis]
        if ceil and short > 0:
            last = adoption.at(x, 2 + axis, slice(shape[axis - 2] - 1, shape[axis - 2]))
            x = adoption.graph.call_function(torch.cat, ([x, *[last] * short], 2 + axis))
    return adoption.module("pool", nn.MaxPool2d(kernel, stride, padding), x)


# Where in the network, and of what kind


def _place(root: nn.Module, graph: fx.Graph) -> None:
    """Note of every node in which layer it is, and of which kind."""
    modules = dict(root.named_modules())
    nodes = list(graph.nodes)
    output = nodes[-1].args[0]
    for node in nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if module is None:
            continue
        kind = None
        if isinstance(module, nn.Linear):
            mixed = any(isinstance(modules[near.target], MatMul) for near in _near(node, back=True) | _near(node))
            kind = "head" if _carried(output) is node else "projection" if mixed else "MLP"
        elif isinstance(module, MatMul):
            weighed = any(isinstance(modules[near.target], Normalizer) for near in _near(node, back=True))
            kind = "values" if weighed else "scores"
        else:
            kind = next((kind for types, kind in _KINDS if isinstance(module, types)), None)
        if kind and getattr(module, "kind", None) is None:
            of_kind(kind, module)
    for node in nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        before = next((one for one in node.all_input_nodes if "kind" in one.meta and one.op != "get_attr"), None)
        inherited = before.meta if before else {"layer": "tokenizer", "kind": "tokenizer"}
        kind = getattr(module, "kind", None) or inherited["kind"]
        node.meta["kind"] = kind
        node.meta["layer"] = _layer(str(node.target)) if module is not None else inherited["layer"]
    if (last := _carried(output)).meta["kind"] == "head":
        last.meta["layer"] = "head"


_KINDS: list[tuple[tuple[type, ...], str]] = [
    ((nn.Conv2d,), "convolution"),
    ((nn.LayerNorm,), "LayerNorm"),
    ((nn.MaxPool2d, Resample, Sum), "pooling"),
    (
        (nn.ReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.GELU),
        "activation",
    ),
]


def _carried(node: fx.Node) -> fx.Node:
    """The last call of a module before a node, or the node itself."""
    while node.op in ("call_method", "call_function") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _near(node: fx.Node, back: bool = False) -> set[fx.Node]:
    """The next modules that read a node's result, or that it reads, with nothing but moves and sums in between."""
    found, waiting, seen = set(), list(node.all_input_nodes if back else node.users), set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op == "call_module":
            found.add(one)
        elif one.op in ("call_method", "call_function") and one.target is not operator.add:
            waiting += one.all_input_nodes if back else one.users
    return found


def _layer(path: str) -> str:
    """Where in the network a module is: its path up to the first part that ends in a number, and numbers after it."""
    names = path.split(".")
    first = next((i for i, name in enumerate(names) if name[-1:].isdigit()), 0)
    last = first + 1
    while last < len(names) - 1 and names[last].isdigit():
        last += 1
    return ".".join(names[:last])


def _size_divisions(graph: fx.GraphModule, example: torch.Tensor) -> None:
    """Tell each division how large its denominators are on the example: a protocol has to know about how large.

    Sixteen times as large as what was seen, and a sixty-five thousandth of it, are within what `tuned` divides by.
    """
    if not any(isinstance(module, Divide) for module in graph.modules()) or example.device.type == "meta":
        return
    _Sizing(graph).run(example)


class _Sizing(fx.Interpreter):
    def run_node(self, node: fx.Node) -> Any:
        module = self.module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Divide):
            most = float(self.env[node.args[1]].max())
            module.scale = 2.0 ** (math.ceil(math.log2(most)) - 2) if most > 0 else 1.0
        with torch.no_grad():
            return super().run_node(node)
