"""How the C library keeps freed memory: large blocks go back to the system at once.

glibc takes blocks from its heap up to the size of the largest one that was freed before (32 MiB at most). Activations
of a pass are of that size, live for very different times and differ in length from pass to pass, so the heap fills
with holes that fit none of the next: passes of 1,900 tokens through a model of 135 million parameters held 1.4
times what their tensors add up to, a plain forward with adapters 2.7 times. With a fixed threshold each large tensor is
a mapping of its own, gone when the tensor is.
"""

import ctypes

LARGE = 4 * 2**20
"""Bytes from which a block is a mapping of its own: tensors of small models stay in the heap, which is faster."""
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def map_large_blocks() -> bool:
    """Have this process map large blocks by themselves; False where the C library is not glibc."""
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, LARGE))
    except (OSError, AttributeError):
        return False
