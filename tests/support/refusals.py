"""What was refused, and that it was in one line."""

import pytest


def refusal(kind, function, *arguments, **options):
    """The message of the exception that the call ends with."""
    with pytest.raises(kind) as raises:
        function(*arguments, **options)
    assert "\n" not in str(raises.value)
    return str(raises.value)
