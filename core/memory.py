"""Memory that runs out: whether an error says so (torch has its own for graphics cards, a plain RuntimeError for the CPU's)."""

import gc


def ran_out(error: BaseException) -> bool:
    """True for torch's out-of-memory error, and for the one of its CPU allocator."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def give_back() -> None:
    """What nothing holds any more goes back to the device: for another try with less."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
