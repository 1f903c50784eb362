"""Names, aliases, nearest names, entry points."""

from __future__ import annotations

import pytest

from eyetune.errors import UserError, did_you_mean, listing
from eyetune.registry import Registry


@pytest.fixture
def registry() -> Registry[int]:
    registry: Registry[int] = Registry("backbone", "eyetune.test_group")
    registry.add("retfound", 1, aliases=("large",))
    registry.add("visionfm", 2)
    return registry


def test_aliases_lead_to_the_entry(registry: Registry[int]) -> None:
    assert registry.get("large") == registry.get("retfound") == 1
    assert registry.canonical("large") == "retfound"
    assert registry.names() == ("retfound", "visionfm")
    assert "large" in registry
    assert "nothing" not in registry


def test_an_unknown_name_suggests_the_nearest(registry: Registry[int]) -> None:
    with pytest.raises(
        UserError, match=r"unknown backbone 'visonfm'\. Did you mean 'visionfm'\? Known: retfound, visionfm"
    ):
        registry.get("visonfm")


def test_a_name_is_registered_once(registry: Registry[int]) -> None:
    with pytest.raises(ValueError, match="twice"):
        registry.add("large", 3)


def test_outside_packages_register_by_entry_point(registry: Registry[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> None:
            registry.add("outside", 9)

    monkeypatch.setattr("eyetune.registry.metadata.entry_points", lambda group: [Point()] if group else [])
    assert registry.get("outside") == 9


def test_words() -> None:
    assert did_you_mean("epohcs", ["epochs", "lr"]) == " Did you mean 'epochs'?"
    assert did_you_mean("zzz", ["epochs"]) == ""
    assert listing("abc", limit=2) == "  a\n  b\n  … and 1 more"
