"""How much memory a pass may take."""

from pathlib import Path

import psutil
import pytest

from tasks.frame import machine_memory
from tasks.frame.machine_memory import pass_bytes, total_bytes


def test_a_container_has_what_it_is_given(tmp_path: Path) -> None:
    assert total_bytes(tmp_path) == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("max\n")
    assert total_bytes(tmp_path) == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("1000000\n")
    assert total_bytes(tmp_path) == 1_000_000


@pytest.mark.parametrize(("total", "expected"), [(8 * 10**9, 10**9), (64 * 10**9, 2 * 10**9)])
def test_a_pass_may_take_an_eighth_and_two_gigabytes_at_most(
    monkeypatch: pytest.MonkeyPatch, total: int, expected: int
) -> None:
    monkeypatch.setattr(machine_memory, "total_bytes", lambda: total)
    assert pass_bytes(None, None) == expected
    assert pass_bytes(None, None, processes=2) == expected // 2
    assert pass_bytes(None, 80 * 10**9) == 20 * 10**9
    assert pass_bytes(0.5, 80 * 10**9) == pass_bytes(0.5, None) == 5 * 10**8
