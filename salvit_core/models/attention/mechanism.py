"""What every attention mechanism is: tokens in, tokens out, made from a configuration, declared once, in its file."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..operations import unit_values

if TYPE_CHECKING:  # configurations check their names against the mechanisms, which therefore cannot import them
    from ..config import TransformerConfig

MECHANISMS: dict[str, type["Mechanism"]] = {}  # by name; a subclass that has a name of its own enters itself


class Mechanism(nn.Module):
    """Maps tokens (B, N, M) to tokens (B, N, M).

    A subclass declares, and nothing else needs to be told of it:

    Attributes:
        name: what a configuration calls it.
        rows: its rows in tables, label to what else the row changes in a configuration, such as the normaliser.
        sized: whether a set of `config.memory` slots, landmarks or features stands for the tokens.
        queried: whether it makes queries, keys or values, which `config.qkv_bias` gives biases.
        kind: of the local work in its forward; see `operations.KINDS`.

    Args of the constructor:
        config: the architecture; what a mechanism does not need of it, it ignores.
    """

    name: ClassVar[str]
    rows: ClassVar[dict[str, dict[str, Any]]] = {}
    sized: ClassVar[bool] = False
    queried: ClassVar[bool] = True
    kind = "scores"

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            MECHANISMS[cls.name] = cls

    def __init__(self, config: "TransformerConfig"):
        super().__init__()
        self.heads, self.head, self.tokens = config.heads, config.width // config.heads, config.tokens  # H, D, N

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> effective weights (B, H, N, N), none dropped: out_i = sum_j weights_ij value_j."""
        raise TypeError(f"{type(self).__name__} has no attention map")


class MergedAttention(Mechanism):
    """W_o attend(Q, K, V), heads merged, Q, K and V from one projection of the tokens.

    A subclass makes `qkv` and `projection` in its own order, and defines `attend`.
    """

    qkv: nn.Linear
    projection: nn.Linear

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C), linear in the values."""
        raise TypeError(f"{type(self).__name__} does not say how it attends")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        query, key, value = self._heads(x)
        values = self.attend(query, key, value)  # (B, H, N, D)
        return self.projection(values.transpose(1, 2).flatten(2))  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> effective weights (B, H, N, N), some of both signs: out_i = sum_j weights_ij value_j."""
        query, key, _ = self._heads(x)
        return self.attend(query, key, unit_values(x, self.heads))

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))  # (B, N, 3, H, D)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, N, D)
