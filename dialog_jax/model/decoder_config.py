"""The structure of a decoder: sizes, and how one family's layers differ from another's. Knows no family and no file."""

import collections
import dataclasses

from dialog_jax.errors import UserError
from dialog_jax.model.rotary import LongRopeScaling, Rotary

ACTIVATIONS = ("silu", "gelu_tanh")
NORMS = ("pre", "post", "both")
QK_NORMS = ("none", "head", "width")
SCORINGS = ("softmax", "softmax_of_top", "sigmoid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """The structure of the mixtures of experts that some layers have in place of a feed-forward."""

    count: int
    active: int
    """How many compute each token."""
    width: int
    """Of each expert, as `DecoderConfig.feed_forward` of a dense layer."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have a feed-forward, in order."""
    shared_width: int = 0
    """Of a feed-forward that computes every token beside the experts; 0 for none."""
    scoring: str = "softmax"
    """How scores become weights: "softmax", over all experts; "softmax_of_top", over the active ones; "sigmoid"."""
    normalize: bool = False
    """Whether the weights of a token's experts are divided by their sum."""
    scale: float = 1.0
    """What the weights are multiplied by."""
    groups: int = 1
    """Experts are chosen from the best `active_groups` of so many groups of consecutive experts."""
    active_groups: int = 1
    router_bias: bool = False
    """Whether a bias is added to the scores; with `scoring` "sigmoid", for the choice only, and it has no gradient."""
    biases: bool = False
    """Whether the products with the experts' matrices have biases."""
    clamp: float = 0.0
    """0, or the limit c of the experts' activation (min(max(u, -c), c) + 1) * h * sigmoid(gate_slope * h), with
    h = min(g, c), of the products g with the gate and u with up."""
    gate_slope: float = 1.0

    def __post_init__(self):
        for field in ("count", "active", "width", "groups", "active_groups"):
            if getattr(self, field) < 1:
                raise UserError(f"experts.{field} is {getattr(self, field)}; it must be at least 1")
        if self.scoring not in SCORINGS:
            raise UserError(f"experts.scoring is {self.scoring!r}; choose one of {', '.join(SCORINGS)}")
        if self.count % self.groups or self.active_groups > self.groups:
            raise UserError(
                f"there are {self.count} experts, {self.groups} groups and {self.active_groups} active groups; groups "
                "must be equal, and no more of them active than there are"
            )
        if self.active > self.count // self.groups * self.active_groups:
            raise UserError(f"experts.active is {self.active}, more than there are to choose from")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The sizes of an attention's keys and values."""

    kv_heads: int
    head_dim: int
    values_are_keys: bool = False
    """Whether values are the keys before these are normalized and rotated, instead of products with a matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The structure of a decoder. The defaults are those of llama."""

    family: str
    """The record of `model.families` that reads and writes it; the decoder itself does not look at it."""
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    max_length: int
    """The longest context in tokens (see `context`)."""
    rotary: tuple[Rotary | None, ...]
    """The kinds of RoPE; a layer whose kind is None rotates nothing."""
    layer_rotary: tuple[int, ...] = ()
    """The index of each layer's kind in `rotary`; empty if there is one kind."""
    windows: tuple[int, ...] = ()
    """How many tokens of its own context a query of each layer sees, itself included; 0 for all. Empty: all 0."""
    norm_epsilon: float = 1e-6
    norms: str = "pre"
    """Where RMS norms are: "pre", before attention and feed-forward; "post", after them on the branch; "both"."""
    norm_offset: float = 0.0
    """Added to the weights of RMS norms: 1 for families that store the weight minus one."""
    qk_norm: str = "none"
    """Norms of queries and keys before they are rotated: "head", each head; "width", all heads together."""
    qkv_bias: bool = False
    output_bias: bool = False
    attention_scale: float | None = None
    """What scores are multiplied by; None for head_dim ** -0.5."""
    attention_cap: float | None = None
    """Scores s become cap * tanh(s / cap)."""
    activation: str = "silu"
    """Of the gate: "silu" or "gelu_tanh"."""
    embedding_scale: float = 1.0
    scales_soft_prompt: bool = False
    """Whether `embedding_scale` is also for the rows of a soft prompt: whether the model scales what it is given."""
    residual_scale: float = 1.0
    """What attention and feed-forward are multiplied by before they are added to the residual stream."""
    logit_scale: float = 1.0
    logit_cap: float | None = None
    """Logits z become cap * tanh(z / cap)."""
    tie_embeddings: bool = False
    full_attention: Heads | None = None
    """Of the layers without a window; None if they have the same `kv_heads` and `head_dim` as the others."""
    value_norm: bool = False
    """Whether each head's values are divided by their root mean square."""
    layer_scales: bool = False
    """Whether each layer multiplies the residual stream by a number, which is not trained."""
    sinks: bool = False
    """Whether each head has a learned score that takes part in the softmax and stands for no token."""
    experts: Experts | None = None
    """None if every layer has a feed-forward."""

    def __post_init__(self):
        for field in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "feed_forward", "max_length"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if not self.norm_epsilon > 0:
            raise UserError(f"norm_epsilon is {self.norm_epsilon}; it must be above 0")
        for field in ("attention_scale", "attention_cap", "logit_cap"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise UserError(f"{field} is {value}; it must be above 0")
        for field, choices in (("norms", NORMS), ("qk_norm", QK_NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, field) not in choices:
                raise UserError(f"{field} is {getattr(self, field)!r}; choose one of {', '.join(choices)}")
        for heads in self.attention_heads.values():
            if heads.kv_heads < 1 or self.heads % heads.kv_heads:
                raise UserError(f"heads ({self.heads}) must be a multiple of kv_heads ({heads.kv_heads})")
            if heads.head_dim < 1 or heads.head_dim % 2:
                raise UserError(f"head_dim is {heads.head_dim}; RoPE rotates pairs, so it must be even")
        for field in ("layer_rotary", "windows"):
            if getattr(self, field) and len(getattr(self, field)) != self.layers:
                raise UserError(f"{field} has {len(getattr(self, field))} values for {self.layers} layers")
        if self.full_attention is not None and not 0 < sum(map(bool, self.windows)) < self.layers:
            raise UserError("full_attention is of layers without a window, beside layers with one; both are needed")
        if min(self.windows, default=0) < 0:
            raise UserError(f"windows has {min(self.windows)}; a window is a number of tokens, or 0 for none")
        if not {0, *self.layer_rotary} <= set(range(len(self.rotary))):
            raise UserError(f"layer_rotary names kinds that rotary, with {len(self.rotary)} kinds, does not have")
        if len({kind.fraction for kind in self.rotary if kind is not None}) > 1:
            raise UserError("the kinds of RoPE rotate different fractions of a head; they must rotate the same")
        if self.experts is not None:
            dense = self.experts.dense_layers
            if list(dense) != sorted({*dense} & {*range(self.layers)}):
                raise UserError(
                    f"experts.dense_layers is {dense}; indices of {self.layers} layers, in order, are needed"
                )
            if len(dense) == self.layers:
                raise UserError("no layer has experts; a model without them has experts = None")

    @property
    def attention_heads(self) -> dict[str, Heads]:
        """The sizes of each kind of attention, by the name of its part in `parts`."""
        heads = {"attention": Heads(kv_heads=self.kv_heads, head_dim=self.head_dim)}
        return heads if self.full_attention is None else {**heads, "full_attention": self.full_attention}

    @property
    def attention_sizes(self) -> list[tuple[int, int]]:
        """Key/value heads and head dimension of each kind of attention."""
        return [(heads.kv_heads, heads.head_dim) for heads in self.attention_heads.values()]

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """The layers, in order, that have each of the parts of which a layer has the one or the other."""
        every = tuple(range(self.layers))
        parts = {"attention": every, "feed_forward": self.dense_layers, "experts": self.sparse_layers}
        if self.full_attention is not None:
            parts["attention"] = tuple(layer for layer in every if self.windows[layer])
            parts["full_attention"] = tuple(layer for layer in every if not self.windows[layer])
        return {name: layers for name, layers in parts.items() if layers}

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers that have a feed-forward; the others have experts."""
        return tuple(range(self.layers)) if self.experts is None else self.experts.dense_layers

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dense_layers)

    def for_length(self, length: int) -> "DecoderConfig":
        """Returns the structure for rows of up to `length` tokens: LongRoPE has two lists of factors."""
        kinds = list(self.rotary)
        for index, kind in enumerate(kinds):
            if kind is not None and isinstance(kind.scaling, LongRopeScaling):
                scaling = dataclasses.replace(kind.scaling, uses_long=length > kind.scaling.original_max_length)
                kinds[index] = dataclasses.replace(kind, scaling=scaling)
        return dataclasses.replace(self, rotary=tuple(kinds))

    @property
    def context(self) -> int:
        """Tokens that it can be given: `max_length`, or less with LongRoPE's factors for short rows."""
        scalings = [kind.scaling for kind in self.rotary if kind is not None]
        short = [s.original_max_length for s in scalings if isinstance(s, LongRopeScaling) and not s.uses_long]
        return min([self.max_length, *short])

    @property
    def window_shares(self) -> dict[int, float]:
        """The share of the layers with each window, weighted by their heads' size; without one, the model's context."""
        counts = collections.Counter[int]()
        for name, heads in self.attention_heads.items():
            for layer in self.parts[name]:
                counts[(self.windows or (0,) * self.layers)[layer] or self.max_length] += heads.head_dim
        return {window: count / counts.total() for window, count in counts.items()}

    @property
    def attention_additions(self) -> tuple[str, ...]:
        """What its attention has beyond a softmax over all ancestors: of "windows", "caps" and "sinks"."""
        additions = {"windows": any(self.windows), "caps": self.attention_cap is not None, "sinks": self.sinks}
        return tuple(name for name, present in additions.items() if present)
