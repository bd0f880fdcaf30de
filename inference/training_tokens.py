"""The tokens that a fit takes: both texts encoded, and long enough."""

import numpy as np
from jaxtyping import Int

from probattn.corpora import Corpus, DataError
from probattn.inference.config import RunConfig
from probattn.vocabulary import Vocabulary


def training_tokens(
    corpus: Corpus, vocabulary: Vocabulary, config: RunConfig
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]]:
    """Tokens of training and validation text.

    Raises:
        DataError: if there is one symbol alone, a text has no more tokens than a block, or the
            training text less than a minibatch.
    """
    if vocabulary.size < 2:
        raise DataError(f"corpus {corpus.name!r}: has one symbol alone: expected two or more")
    train, validation = vocabulary.encode(corpus.train), vocabulary.encode(corpus.validation)
    block, batch = config.model.block, config.fit.batch
    for part, tokens in (("training", train), ("validation", validation)):
        if len(tokens) <= block:
            raise DataError(
                f"corpus {corpus.name!r}: the {part} text has {len(tokens)} tokens: expected more "
                f"than one block of {block}; give a longer text or a smaller model.block"
            )
    if len(train) < batch * block:
        raise DataError(
            f"corpus {corpus.name!r}: the training text has {len(train)} tokens: expected at least "
            f"a minibatch of {batch} blocks of {block}; give a longer text or a smaller fit.batch"
        )
    return train, validation
