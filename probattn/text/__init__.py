"""Text: corpora, vocabularies, and the blocks of tokens that models take."""
