"""What ends a sampler while it works."""

import signal

import pytest

from probattn.inference.sampling.chains import Chains


@pytest.fixture
def interrupt_after():
    """Function that has a SIGTERM raised once all chains have ended their call of that number."""

    def interrupt(patch, calls):
        advance = Chains.advance

        def counted(self, first, stops):
            for number, part in enumerate(advance(self, first, stops), 1):
                if number == calls:
                    signal.raise_signal(signal.SIGTERM)
                yield part

        patch.setattr(Chains, "advance", counted)

    return interrupt
