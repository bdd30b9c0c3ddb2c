"""Cuts applied to a denoiser in memory: exact, undoable, and refused with a reason where they do not fit together."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from . import anatomy, narrowing, standins, widths
from .anatomy import uncompiled
from .candidate import Cut
from .errors import UserError
from .standins import Absent


class CannotCut(UserError):
    """These cuts do not fit the denoiser, or not each other."""


@contextmanager
def applied(denoiser: nn.Module, cuts: Sequence[Cut], *, following: Iterable[str] = ()) -> Iterator[dict[str, str]]:
    """Inside this context the denoiser is the smaller one; afterwards it is as it was, bit for bit. See `apply`.

    following: addresses in the whole denoiser. The context gives where those layers are now; those that are gone are left out.
    """
    target = uncompiled(denoiser)
    whole = {id(target.get_submodule(address)): address for address in following}
    before = {id(module) for module in target.modules()}
    undo = apply(denoiser, cuts)
    try:
        there = {whole[id(module)]: now for now, module in target.named_modules() if id(module) in whole} if whole else {}
        yield there | {old: now for old, now in narrowed_since(target, before) if old in whole.values()}
    finally:
        undo()


def apply(denoiser: nn.Module, cuts: Sequence[Cut]) -> Callable[[], None]:
    """Cut a denoiser in place; returns a function that undoes it. Raises CannotCut and leaves the denoiser as it was.

    Addresses are those of the denoiser as given, whatever the order of the cuts. No weight is changed: modules are exchanged for
    their stand-ins, so that undoing is exact and costs nothing. Only a layer that gets narrower is there twice meanwhile, once
    with copies of the weights that stay.
    """
    target = uncompiled(denoiser)
    plain = spelled(target, cuts)
    with _refusing():
        undo = standins.cut(target, plain)
    if (misfit := skip_connections_misfit(target)) is not None:
        undo()
        raise CannotCut(f"these cuts do not fit together: {misfit}")

    def back() -> None:
        home = next((p.device for p in target.parameters()), None)
        undo()
        if home is not None and _moves_as_a_whole(target):  # what was cut meanwhile stayed where it was
            target.to(home)

    return back


def spelled(denoiser: nn.Module, cuts: Sequence[Cut]) -> list[dict[str, Any]]:
    """Cuts as `standins.cut` takes them and a config holds them (`widths.spelled`), each once. CannotCut if they do not fit."""
    cuts = list(dict.fromkeys(cuts))
    with _refusing():
        _check(denoiser, cuts)
        return widths.spelled(denoiser, cuts)


@contextmanager
def _refusing() -> Iterator[None]:
    """Inside, a ValueError is CannotCut."""
    try:
        yield
    except ValueError as e:
        raise CannotCut(f"{e}. `lissom inspect MODEL --layers` lists what can be cut.") from e


def _moves_as_a_whole(denoiser: Any) -> bool:
    """Whether accelerate's model offload moves a denoiser: all of it or nothing, by where its first parameter is."""
    if (hook := getattr(denoiser, "_hf_hook", None)) is None:
        return False
    from accelerate.hooks import CpuOffload

    return any(isinstance(each, CpuOffload) for each in (hook, *getattr(hook, "hooks", ())))


def narrowed_since(denoiser: nn.Module, before: Container[int]) -> Iterator[tuple[str, str]]:
    """Address in the whole denoiser and address now of the layers that cuts made narrower. before: ids of the modules then."""
    for now, module in denoiser.named_modules():
        if id(module) not in before and (source := vars(module).get("narrowed_from")) is not None:
            yield source[0], now


def skip_connections_misfit(denoiser: Any) -> str | None:
    """Why the skip connections of a U-Net no longer fit, or None. Checked by channels and sizes, without a forward.

    Every ResNet of the way down pushes its output, every sampler too, and each ResNet of the way up pops one: it must be of the
    same size, and have as many channels as are left of the ResNet's input. Denoisers that are no U-Nets of ResNet blocks are
    not looked at.
    """
    down, up = stages(denoiser)
    if not down or not up or not all(_plain_block(block) for block in (*down, *up)):
        return None
    made = 1 + sum(len(block.resnets) + (block.downsamplers is not None) for block in down)
    if made != (taken := sum(len(block.resnets) for block in up)):
        return (
            f"the way down makes {made} skip connections and the way up takes {taken}; a pair or a sampler cut on one side needs "
            "one cut on the other."
        )
    width: int = denoiser.conv_in.out_channels
    halvings = 0  # how many times the feature map was halved
    pushed: list[tuple[str, int, int]] = [("conv_in", width, halvings)]
    for k, block in enumerate(down):
        for i, resnet in enumerate(block.resnets):
            if resnet.in_channels != width:
                return f"down_blocks.{k}.resnets.{i} takes {resnet.in_channels} channels and would get {width}."
            width = resnet.out_channels
            pushed.append((f"down_blocks.{k}.resnets.{i}", width, halvings))
        if block.downsamplers is not None:
            width, halvings = block.downsamplers[0].out_channels, halvings + 1
            pushed.append((f"down_blocks.{k}.downsamplers.0", width, halvings))
    if denoiser.mid_block is not None:
        first, last = denoiser.mid_block.resnets[0], denoiser.mid_block.resnets[-1]
        if first.in_channels != width:
            return f"mid_block takes {first.in_channels} channels and would get {width}."
        width = last.out_channels
    for k, block in enumerate(up):
        for i, resnet in enumerate(block.resnets):
            source, skipped, size = pushed.pop()
            if resnet.in_channels != width + skipped:
                return (
                    f"up_blocks.{k}.resnets.{i} takes {resnet.in_channels} channels and would get {width} + {skipped} (the skip "
                    f"connection of {source})."
                )
            if size != halvings:
                return (
                    f"up_blocks.{k}.resnets.{i} works at {_share(halvings)} and would get a skip connection of {_share(size)} "
                    f"(that of {source}); what is cut on one side needs its like cut on the other."
                )
            width = resnet.out_channels
        halvings -= block.upsamplers is not None
    if width != denoiser.conv_out.in_channels or halvings:
        return (
            f"conv_out takes {denoiser.conv_out.in_channels} channels at full size and would get {width} at {_share(halvings)}."
        )
    return None


def _share(halvings: int) -> str:
    """How large a feature map is.

    >>> _share(0), _share(2)
    ('full size', '1/4 of the size')
    """
    return f"1/{2**halvings} of the size" if halvings > 0 else "full size" if not halvings else f"{2**-halvings} times the size"


def pairs(unet: Any) -> list[tuple[Cut, Cut]]:
    """Which cuts go together: every way to take one (ResNet, attention) pair out of a stage of a U-Net, down and up.

    Leaving a pair's slot empty (remove) keeps its skip connection; taking the slot out drops one skip connection, so that the
    mirrored stage must lose a pair too. The last pair of an up stage never goes: it alone fits the skip connection of the
    stage before. Sorted by stage; within a stage, the way that leaves all other skip connections where they were comes first.
    """
    unet = uncompiled(unet)
    down, up = stages(unet)
    if not all(_plain_block(block) for block in (*down, *up)):
        return []
    found = []
    for k, block in enumerate(down):
        mirrored = len(up) - 1 - k
        n, m = len(getattr(block, "resnets", ())), len(getattr(up[mirrored], "resnets", ()))
        if n < 2 or m != n + 1:
            continue
        options = [(i, j) for i in range(n) for j in range(m - 1)]
        for i, j in sorted(options, key=lambda o: (o[1] != n - 1 - o[0], -o[0])):
            two = (
                Cut(address=f"down_blocks.{k}", what="keep_layers", value=tuple(x for x in range(n) if x != i)),
                Cut(address=f"up_blocks.{mirrored}", what="keep_layers", value=tuple(x for x in range(m) if x != j)),
            )
            undo = standins.cut(unet, [cut.plain() for cut in two])
            if skip_connections_misfit(unet) is None:
                found.append(two)
            undo()
    return found


def stages(denoiser: Any) -> tuple[list[Any], list[Any]]:
    """The blocks of the way down and of the way up of a U-Net; nothing for other denoisers."""
    down, up = getattr(denoiser, "down_blocks", None), getattr(denoiser, "up_blocks", None)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList) or not hasattr(denoiser, "conv_in"):
        return [], []
    return list(down), list(up)


def outermost(cuts: Sequence[Cut]) -> list[Cut]:
    """Cuts without those of layers that lie inside another removed one."""
    removed = {cut.address for cut in cuts if cut.what == "remove"}
    return [cut for cut in cuts if not any(cut.address.startswith(a + ".") for a in removed)]


def matching(patterns: Sequence[str], addresses: Sequence[str]) -> set[str]:
    """Addresses that match any of the patterns (shell style: *, ?, [..]). UserError for a pattern that matches nothing.

    >>> sorted(matching(["up*"], ["down.0", "up.0", "up.1"]))
    ['up.0', 'up.1']
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {a for a in addresses if fnmatchcase(a, pattern)}
        if not found:
            near = ", ".join(list(addresses)[:3])
            raise UserError(
                f"pattern {pattern!r} matches no layer that can be cut ({len(addresses)} there are, such as {near}). "
                "`lissom inspect MODEL --layers` lists them."
            )
        chosen |= found
    return chosen


def parameters(denoiser: nn.Module) -> int:
    """Numbers in the parameters of a denoiser, shared ones once."""
    return sum(p.numel() for p in denoiser.parameters())


def _check(denoiser: nn.Module, cuts: Sequence[Cut]) -> None:
    """ValueError for cuts that could be applied but would not give what they promise."""
    down, up = (len(blocks) for blocks in stages(denoiser))
    ends = {"down_blocks": down, "up_blocks": up}
    of_unet = {f"{side}.{k}" for side, count in ends.items() for k in range(count)}
    gone: dict[str, list[int]] = {side: [] for side in ends}
    seen: dict[str, Cut] = {}
    for cut in cuts:
        other = seen.setdefault(cut.address, cut)
        if other != cut and {other.what, cut.what} != {"keep_layers", "remove"}:  # a stage that goes takes its layers along
            raise ValueError(f"{cut.address}: two cuts of one layer ({other.what} and {cut.what}) exclude each other")
        parent, name, layer = standins.find(denoiser, cut.address)
        above = cut.address.rpartition(".")[0]
        if cut.what == "keep_layers" and cut.address not in of_unet:
            raise ValueError(f"{cut.address}: is no stage of a U-Net, so that it has no layers to keep")
        if cut.what in narrowing.NARROWS:
            try:
                widths.width(denoiser, cut.address, cut.what)
            except ValueError as e:
                raise ValueError(f"{cut.address}: {narrowing.NARROWS[cut.what][0]} cannot be cut here, because {e}") from None
        if cut.what != "remove":
            continue
        part_of_unet = ends["up_blocks"] and (cut.address == "mid_block" or above.endswith("samplers"))
        if cut.address in of_unet:
            gone[above].append(int(name))
        elif cut.value is None and not part_of_unet and not anatomy.offered(layer, parent):
            raise ValueError(f"{cut.address}: what stands in for {type(layer).__name__} here is not known")
    for side, indices in gone.items():
        innermost = range(ends[side] - len(indices), ends[side]) if side == "down_blocks" else range(len(indices))
        if sorted(indices) != list(innermost):
            outer = next(k for k in sorted(indices) if k not in innermost)
            raise ValueError(f"{side}.{outer}: the stages of a U-Net go from the innermost on, and further in some would stay")


def _plain_block(block: Any) -> bool:
    """Whether a stage is made of ResNet blocks and samplers that `skip_connections_misfit` can follow."""
    kinds = {type(r).__name__ if not isinstance(r, Absent) else r.was for r in getattr(block, "resnets", ())}
    return kinds == {"ResnetBlock2D"} and not hasattr(block, "skip_conv")
