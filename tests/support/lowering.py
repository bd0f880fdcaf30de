"""Programs lowered for accelerators that this machine need not have, and what is searched in them.

Lowering compiles nothing. It fails where an operation has no translation for a platform, and its
text names every library routine, every callback of the host and every dtype.
"""

import re

import jax
import jax.numpy as jnp

from probattn.inference.fitting.svi import Trainer

# Routines that run on the device itself. The names of those that go through the host are others:
# LAPACK's, `cuhybrid_eig_*`, and the callbacks of Python.
ROUTINES = {
    "cuda": {
        "cu_lu_pivots_to_permutation",
        "cu_threefry2x32_ffi",
        "cusolver_geqrf_ffi",  # QR
        "cusolver_orgqr_ffi",
        "cusolver_gesvd_ffi",  # singular values, by QR iteration
        "cusolver_gesvdj_ffi",  # and by Jacobi's method
        "cusolver_getrf_ffi",  # LU
        "cusolver_potrf_ffi",  # Cholesky
        "cusolver_syevd_ffi",  # symmetric eigenvalues
        "cublas_geqrf_batched_ffi",
        "cublas_getrf_batched_ffi",
    },
    "tpu": {
        "Eigh",
        "LuDecomposition",
        "ProductOfElementaryHouseholderReflectors",
        "Qr",
    },
}
# Hints to the compiler, on any platform.
HINTS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


def assert_runs_on_accelerators(traced):
    """Check that a traced program in single precision lowers to what accelerators run alone."""
    for platform, routines in ROUTINES.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        used = set(re.findall(r"custom_call @([\w.$]+)", text))
        assert used <= routines | HINTS, (platform, used - routines - HINTS)
        assert "f64" not in text, platform
        for transfer in ("send", "recv", "infeed", "outfeed"):
            assert f"stablehlo.{transfer}" not in text, (platform, transfer)


def assert_lowers(function, *arguments, **options):
    """Trace a function in single precision and check it."""
    with jax.enable_x64(False):
        assert_runs_on_accelerators(jax.jit(function).trace(*arguments, **options))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


class TracedTrainer(Trainer):
    """A trainer whose steps are traced and never compiled."""

    def _compiled(self, steps):
        self.traced = steps
        return steps
