"""Mechanisms of any size, without a network around them: the fields of a configuration that a mechanism reads."""

from dataclasses import dataclass

from salvit_core.models.attention import ATTENTION


@dataclass(frozen=True)
class Sizes:
    """As `TransformerConfig`, but of any number of tokens."""

    width: int
    heads: int
    tokens: int
    normalizer: str = "softmax"
    attention_dropout: float = 0.1
    memory: int = 64
    l2q_granularity: str = "element"
    l2q_learn_c: bool = True
    l2q_learn_d: bool = True
    l2q_initial_c: float = 1.0
    l2q_initial_d: float = 1.0
    qkv_bias: bool = False


FIELDS = Sizes.__dataclass_fields__


def mechanism(name, width, heads, tokens, **options):
    """A mechanism by name; options that are no sizes are its own."""
    sizes = {option: options.pop(option) for option in list(options) if option in FIELDS}
    return ATTENTION[name](Sizes(width, heads, tokens, **sizes), **options)
