"""What one narrower layer saves of the MACs, from the table or from one count, is what is counted on the narrower model."""

import pytest
from lissom.core.candidate import Cut
from lissom.core.widths import Width, widths
from lissom.tests.core.tiny_families import WIDE, arguments, wide
from lissom.workflow._gauge import Gauge
from lissom.workflow._widths import macs_of


def leaving(width: Width, stay: int) -> Cut:
    value = tuple(i for group in width.groups[len(width.groups) - stay :] for i in group)
    return Cut.model_validate({"address": width.address, "what": width.what, "value": value})


@pytest.mark.parametrize("name", WIDE)
def test_a_narrower_layer_saves_what_is_counted(name: str) -> None:
    denoiser = WIDE[name]()
    gauge = Gauge(denoiser, fallback=lambda: arguments(denoiser))
    found = widths(denoiser)
    assert found
    for width in found:
        fewest = 1 if width.what == "keep_channels" else 0
        for stay in sorted({fewest, 1, len(width.groups) // 2 or 1, len(width.groups) - 1}):
            cut = leaving(width, stay)
            counted = gauge.macs - gauge.after((cut,))[1]
            assert macs_of(gauge, cut) == pytest.approx(counted, rel=1e-6, abs=0.5), (cut.address, cut.what, stay)


def test_rungs_of_a_ladder_take_one_count(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = wide(next(name for name in WIDE if "flux" in name))
    gauge = Gauge(denoiser)
    counts: list[int] = []
    real = Gauge._count
    assert gauge.macs

    def counted(self: Gauge) -> object:
        counts.append(1)
        return real(self)

    monkeypatch.setattr(Gauge, "_count", counted)
    width = max(widths(denoiser), key=lambda one: len(one.groups))
    for stay in range(1, len(width.groups)):
        macs_of(gauge, leaving(width, stay))
    assert len(counts) <= 1 < len(width.groups) - 1
