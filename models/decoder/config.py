"""What distinguishes one decoder from another: frozen dataclasses that validate themselves."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from probattn.models.checks import check_integers

NormKind = Literal["layer", "rms", "rms_plus_one"]
Activation = Literal["gelu", "gelu_tanh", "silu"]
Scaling = Literal["none", "linear", "llama3"]
Precision = Literal["float32", "bfloat16"]
"""Precision of the factors of matrix products; all else has the dtype of the stream."""


def _check_choice(table: str, name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(
            f"{table}.{name} is {value!r}: expected one of {', '.join(get_args(choices))}"
        )


def _check_positive(table: str, name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and value > 0 and math.isfinite(value)):
        raise ValueError(f"{table}.{name} is {value!r}: expected a finite number > 0")


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions (Su et al. 2021): pair i of a query turns by its position times f_i.

    Without scaling, p pairs have f_i = base^(-i / p). Pair i is (i, i + p).

    Attributes:
        base: longest wavelength over 2 pi, or nearly.
        fraction: the part of a query's entries that turns; the first ones do.
        scaling: how frequencies differ from those. `linear` divides all by the factor. `llama3`
            divides those whose wavelength is above original_context / low_frequency_factor, keeps
            those below original_context / high_frequency_factor, and interpolates in between.
        factor: the divisor of both.
        low_frequency_factor: see llama3.
        high_frequency_factor: see llama3.
        original_context: tokens that the network was first trained on, for llama3.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        """Refuse what makes no rotation."""
        _check_choice("rotary", "scaling", self.scaling, Scaling)
        check_integers(self, "rotary", original_context=1)
        for name in ("base", "fraction", "factor", "low_frequency_factor", "high_frequency_factor"):
            _check_positive("rotary", name, getattr(self, name))
        if self.fraction > 1:
            raise ValueError(f"rotary.fraction is {self.fraction}: expected a number in (0, 1]")
        if self.scaling == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"rotary.low_frequency_factor is {self.low_frequency_factor} and "
                f"rotary.high_frequency_factor {self.high_frequency_factor}: "
                "expected the low one below the high one"
            )

    def turning(self, head_width: int) -> int:
        """Return how many entries of a query turn."""
        return int(head_width * self.fraction)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder: its size, and which of the published variants of each part it has.

    Attributes:
        vocabulary: number of token ids.
        width: d, of the stream.
        layers: number of layers.
        heads: number of heads of queries.
        key_heads: number of heads of keys and values, a divisor of `heads`. Each serves as many
            heads of queries, one after the other.
        head_width: r, of queries, keys and values.
        context: most tokens that the network may see at once.
        hidden: width of the MLP.
        norm: `layer` subtracts the mean and `rms` does not; the gain of `rms_plus_one` is 1 + g.
        norm_bias: whether norms add a bias.
        norm_eps: what a norm adds to the mean square.
        rotary: rotary positions; None for a table of positions that is added to the embedding.
        local_rotary: those of the layers that have a window; None for the same.
        query_norm: whether queries and keys are normalised, before they turn.
        attention_bias: whether queries, keys and values have biases.
        out_bias: whether the projection out of the attention has one.
        mlp_bias: whether the MLP has biases.
        activation: of the MLP: `gelu` is the exact one, `gelu_tanh` its usual approximation.
        gated: whether the MLP multiplies the activation of one projection by another projection.
        parallel: whether attention and MLP see the same stream, and not one after the other.
        post_norms: whether what attention and MLP add is normalised.
        tied: whether the logits use the table of embeddings.
        embedding_scale: factor of the embeddings.
        attention_scale: c > 0 of the attention's logits c q . k; None for 1 / sqrt(head_width).
        attention_cap: soft cap of these logits z, cap * tanh(z / cap); None for none.
        logit_cap: that of the network's logits.
        windows: for each layer, how many tokens a token attends to, itself included, or None for
            all. An empty tuple stands for no windows.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    context: int
    hidden: int
    norm: NormKind = "rms"
    norm_bias: bool = False
    norm_eps: float = 1e-6
    rotary: RotaryConfig | None = RotaryConfig()
    local_rotary: RotaryConfig | None = None
    query_norm: bool = False
    attention_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    gated: bool = True
    parallel: bool = False
    post_norms: bool = False
    tied: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no decoder."""
        sizes = ("vocabulary", "width", "layers", "heads", "key_heads", "head_width", "context")
        check_integers(self, "decoder", hidden=1, **dict.fromkeys(sizes, 1))
        if self.heads % self.key_heads:
            raise ValueError(
                f"decoder.key_heads is {self.key_heads}: expected a divisor of the {self.heads} "
                "heads"
            )
        _check_choice("decoder", "norm", self.norm, NormKind)
        _check_choice("decoder", "activation", self.activation, Activation)
        for name in ("norm_eps", "embedding_scale"):
            _check_positive("decoder", name, getattr(self, name))
        for name in ("attention_scale", "attention_cap", "logit_cap"):
            if getattr(self, name) is not None:
                _check_positive("decoder", name, getattr(self, name))
        self._check_windows()
        self._check_rotations()

    @property
    def scale(self) -> float:
        """Factor c of the attention's logits c q . k."""
        default = 1 / math.sqrt(self.head_width)
        return default if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """Return how many tokens one attends to in a layer, itself included; None for all."""
        return self.windows[layer] if self.windows else None

    def layer_rotary(self, layer: int) -> RotaryConfig | None:
        """Return the rotary positions of a layer."""
        local = self.window(layer) is not None and self.local_rotary is not None
        return self.local_rotary if local else self.rotary

    def _check_windows(self) -> None:
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(
                f"decoder.windows has {len(self.windows)} entries: expected one for each of the "
                f"{self.layers} layers, or none"
            )
        for window in self.windows:
            if window is not None and (type(window) is not int or window < 1):
                raise ValueError(
                    f"decoder.windows has the entry {window!r}: expected integers >= 1, or None"
                )

    def _check_rotations(self) -> None:
        for name in ("rotary", "local_rotary"):
            rotary = getattr(self, name)
            if rotary is None:
                continue
            turning = rotary.turning(self.head_width)
            if turning % 2 or turning == 0:
                raise ValueError(
                    f"decoder.{name} turns {turning} of {self.head_width} entries of a query: "
                    "expected an even number of them, at least 2"
                )
        if self.rotary is None and self.local_rotary is not None:
            raise ValueError("decoder.local_rotary is given without decoder.rotary: expected both")
