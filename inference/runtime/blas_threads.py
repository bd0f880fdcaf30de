"""How many threads the libraries below JAX may use."""

from threadpoolctl import threadpool_limits


def one_blas_thread() -> threadpool_limits:
    """Make a context in which each caller's OpenBLAS has one thread; JAX takes LAPACK from it.

    XLA spreads matrices over the cores. Threads of OpenBLAS below that share cores with each other
    and wait by spinning, up to a hundred times as long as the work takes.
    """
    return threadpool_limits(1, user_api="blas")
