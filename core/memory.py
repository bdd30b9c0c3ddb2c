"""Whether an error says that memory ran out. torch has its own for graphics cards, and a plain RuntimeError for the CPU's."""


def ran_out(error: BaseException) -> bool:
    """True for torch's out-of-memory error, and for the one of its CPU allocator."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
