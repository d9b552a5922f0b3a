"""What the libraries underneath read from the environment when they are loaded: set before the first import of them."""

import os

# How long threads spin while they wait for each other. For as long as libgomp likes, a stage on cores that others use
# too runs ten times slower; not at all, and it is half as fast on idle ones (measured: docs/lab-log.md).
SETTINGS = {
    "GOMP_SPINCOUNT": "20000",
    "OPENBLAS_NUM_THREADS": "1",  # numpy's and scipy's; a process that is forked later must have one thread
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's, of an allocator that it does not even use
}


def set_library_environment() -> None:
    """Set what is not set already."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
