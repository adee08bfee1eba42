"""A network that others wrote on its way to a graph of our operations: the graph so far, and what was refused.

Each operation of an exported program becomes nodes by the rule of its name (`rules`); whatever depends on weights and
shapes alone is computed at once, so that what is left is what must run on secrets.
"""

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .operations import Gain, Operation, Repeat

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

# Operations whose result is the same memory, and those of which only the shape of an activation counts.
PARTED = {"unbind", "split", "chunk", "split_with_sizes", "tensor_split"}
VIEWS = PARTED | {
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "select", "slice", "narrow", "getitem"),
    *("unsqueeze", "squeeze", "expand", "contiguous", "detach", "alias", "to", "dropout"),
}
LIKE = {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"}


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


class Adoption:
    """One network on its way: the graph so far, and what was refused.

    Args:
        model: the network in evaluation mode, for its modules' names.
        rules: what operations become, by name: called with the adoption and the operation's own arguments.
        softmax: a name of `NORMALIZERS`.
        gelu: a name of `ACTIVATIONS`.
    """

    def __init__(self, model: nn.Module, rules: dict[str, Callable[..., Any]], softmax: str, gelu: str):
        self.model, self.rules, self.softmax, self.gelu = model, rules, softmax, gelu
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
        answer = next(iter(program.graph.find_nodes(op="output"))).args[0][0].meta["val"]
        if not self.refused and (
            not answer.dim() or str(answer.shape[0]) != str(self.batch) or not is_open(self.batch)
        ):
            said = "is written for one size of batch, or gives no answer for each image"
            raise ValueError(f"{type(self.model).__name__} {said}: let it take any, with x.shape[0] in place of len(x)")
        self.graph.output(found[0])
        made = fx.GraphModule(self.root, self.graph, type(self.model).__name__).eval()
        made.graph.eliminate_dead_code()
        made.recompile()
        return made

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
            return args[0] if isinstance(args[0], fx.Node) else args[0][args[1]]  # a node: what was refused before
        name, place = name_of(node.target), self.path
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
            if name not in self.rules:
                raise Unknown(name)
            result = self._ruled(name, args, options)
        except Unknown as error:
            said, stand_in = str(error), STAND_INS.get(name)
            hint = f"{stand_in} could stand in for it" if stand_in else "write it with other operations"
            self.refused.append(f"no private protocol for {said} ({place or 'the network itself'}): {hint}")
            result = self.graph.placeholder(f"missing_{len(self.refused)}")
        if written and isinstance(node.args[0], fx.Node):
            env[node.args[0]] = result  # by its old name too, should torch.export read it by that
            if _seen_elsewhere(node):
                where = place or "the network itself"
                hint = f"{name} could stand in for it"
                self.refused.append(f"no private protocol for {name}_ of a view ({where}): {hint}")
        return result

    def _ruled(self, name: str, args: tuple, options: dict) -> Any:
        """The result of an operation by its rule."""
        rule = self.rules[name]
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
        return closed(self.node.meta["val"].shape)

    def shape_of(self, which: int) -> tuple[int, ...]:
        """Of an argument of the node, its open dimension -1."""
        return closed(self.node.args[which].meta["val"].shape)

    def module(self, name: str, module: nn.Module, *inputs: Any, weights: Sequence[Fixed | None] = ()) -> fx.Node:
        """A call of a module, at the place where the network has it.

        Args:
            name: what to call it where the network has no name of its own for it.
            module: ours.
            inputs: nodes.
            weights: its weight, and its bias: where they have been used so before, that module is called once more.
        """
        known = (*weights, repr(module))
        if weights and known in self.places:
            return self.graph.call_module(self.places[known], inputs)
        named = weights[0].name if weights and weights[0] is not None else None
        if self.path and not list(self.model.get_submodule(self.path).children()):
            place = self.path
        elif named is not None:
            place = named.removesuffix("weight").rstrip("._") or name
        else:
            place = f"{self.path}.{name}".lstrip(".")
        place = self._free(place)
        self.root_module(place, module)
        self.places[known] = place
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
        if not within(fixed.value.shape, shape):
            if fixed.value.dim() < len(shape):
                fixed = Fixed(fixed.value.expand(1, *fixed.value.shape), fixed.learnt)
            if fixed.value.dim() != len(shape) or fixed.value.shape[0] != 1:
                raise Unknown(f"{name_of(self.node.target)} that makes an activation larger")
            return self.function(operator.add, x, self.repeated(fixed))
        return self.function(operator.add, x, self.attribute(fixed))

    def gain(self, x: fx.Node, fixed: Fixed, shape: tuple[int, ...]) -> fx.Node:
        """An activation of this shape times a fixed tensor, entry by entry."""
        if fixed.number is not None:
            return self.function(operator.mul, x, fixed.number)
        if not within(fixed.value.shape, shape):
            raise Unknown(f"{name_of(self.node.target)} that makes an activation larger")
        module = Gain((1,))
        module.weight = self.parameter(fixed)
        return self.module("gain", module, x)


def name_of(target: Any) -> str:
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


def _seen_elsewhere(node: fx.Node) -> bool:
    """Whether what a node writes to is also read through a view, of it or by it: there the writing would not show."""
    written = node.args[0]
    before = [user for user in written.users if user < node]
    if any(name_of(user.target) in VIEWS for user in before):
        return True
    while written.op == "call_function" and name_of(written.target) in VIEWS:
        written = written.args[0]
        if len(written.users) > 1 and name_of(written.target) not in PARTED:
            return True
    return False


def is_open(size: Any) -> bool:
    """Whether a size is that of any batch."""
    return isinstance(size, torch.SymInt) and not str(size).isdigit()


def _open_shape(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(is_open(size) for size in value.shape)


def closed(shape: Sequence) -> tuple[int, ...]:
    """Sizes with -1 for that of any batch.

    Raises:
        Unknown: more than one is open.
    """
    made = tuple(-1 if is_open(size) else int(size) for size in shape)
    if made.count(-1) > 1:
        raise Unknown("a shape with two open dimensions")
    return made


def within(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be added to one of another without making it larger."""
    if len(small) > len(large):
        return False
    return all(a == 1 or a == b for a, b in zip(reversed(small), reversed(large)))


def _shown(args: tuple, options: dict) -> str:
    """Arguments that are no tensors, for a person."""
    plain = [str(arg) for arg in args if not isinstance(arg, Fixed | fx.Node)]
    return ", ".join(plain + [f"{name}={value}" for name, value in options.items()])
