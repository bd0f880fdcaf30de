"""Runs that the tests of several rooms share; made once in a session."""

import pytest


@pytest.fixture(scope="session", name="latent_run")
def latent_run_fixture(tiny_run, tmp_path_factory):
    """A sampled posterior of latent embeddings: read it, never write to it."""
    # Imported here: the import hook of the shapes must be in place before probattn is imported.
    from tests.support.tiny_posterior import made_once, sample_latent

    return made_once(tmp_path_factory, "latent", lambda path: sample_latent(tiny_run, path))


@pytest.fixture(scope="session", name="language_run")
def language_run_fixture(tiny_run, tmp_path_factory):
    """A posterior of the network of the tiny run, made by hand: read it, never write to it."""
    from tests.support.tiny_posterior import language_by_hand, made_once

    return made_once(tmp_path_factory, "language", lambda path: language_by_hand(tiny_run, path))
