"""Which configurations of a decoder are refused, and by what line."""

import re
from dataclasses import replace

import pytest

from probattn.models.decoder.config import DecoderConfig, RotaryConfig

CONFIG = DecoderConfig(
    vocabulary=7, width=8, layers=2, heads=4, key_heads=2, head_width=6, context=5, hidden=9
)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"width": 0}, "decoder.width is 0: expected an integer >= 1"),
        ({"layers": True}, "decoder.layers is True: expected an integer >= 1"),
        ({"key_heads": 3}, "decoder.key_heads is 3: expected a divisor of the 4 heads"),
        ({"norm": "batch"}, "decoder.norm is 'batch': expected one of layer, rms, rms_plus_one"),
        (
            {"activation": "relu"},
            "decoder.activation is 'relu': expected one of gelu, gelu_tanh, silu",
        ),
        ({"norm_eps": 0.0}, "decoder.norm_eps is 0.0: expected a finite number > 0"),
        ({"logit_cap": -1.0}, "decoder.logit_cap is -1.0: expected a finite number > 0"),
        (
            {"windows": (4,)},
            "decoder.windows has 1 entries: expected one for each of the 2 layers, or none",
        ),
        (
            {"windows": (4, 0)},
            "decoder.windows has the entry 0: expected integers >= 1, or None",
        ),
        (
            {"head_width": 7},
            "decoder.rotary turns 7 of 7 entries of a query: expected an even number of them, "
            "at least 2",
        ),
        (
            {"local_rotary": RotaryConfig(fraction=0.1)},
            "decoder.local_rotary turns 0 of 6 entries of a query: expected an even number of "
            "them, at least 2",
        ),
        (
            {"rotary": None, "local_rotary": RotaryConfig()},
            "decoder.local_rotary is given without decoder.rotary: expected both",
        ),
    ],
)
def test_a_bad_configuration_is_refused(changes, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"scaling": "yarn"}, "rotary.scaling is 'yarn': expected one of none, linear, llama3"),
        ({"base": float("inf")}, "rotary.base is inf: expected a finite number > 0"),
        ({"fraction": 1.5}, "rotary.fraction is 1.5: expected a number in (0, 1]"),
        (
            {"scaling": "llama3", "low_frequency_factor": 4.0},
            "rotary.low_frequency_factor is 4.0 and rotary.high_frequency_factor 4.0: expected "
            "the low one below the high one",
        ),
    ],
)
def test_bad_rotary_positions_are_refused(settings, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        RotaryConfig(**settings)
