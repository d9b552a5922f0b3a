import pytest

from rlhf_core.errors import ConfigError
from tasks.tracking.events import TagsEvent
from tasks.tracking.spool import Spool, spools


def event(name):
    return TagsEvent(run=name, tags={})


def test_events_come_back_in_order_with_their_positions(tmp_path):
    spool = Spool(tmp_path, "run-1")
    spool.append([event("a")])
    spool.append([event("b"), event("c")])
    read = list(spool.events())
    assert [one.run for _, one in read] == ["a", "b", "c"]
    assert [one.run for _, one in spool.events(read[0][0])] == ["b", "c"]
    assert read[-1][0] == spool.path.stat().st_size


def test_what_a_killed_writer_left_is_not_read_and_not_kept(tmp_path):
    spool = Spool(tmp_path, "run")
    spool.append([event("a")])
    with spool.path.open("ab") as file:
        file.write(b'{"kind": "half')
    assert spool.pending() == 1
    spool.append([event("b")])
    assert [one.run for _, one in Spool(tmp_path, "run").events()] == ["a", "b"]


def test_position_survives_and_counts_what_waits(tmp_path):
    spool = Spool(tmp_path, "run")
    spool.append([event("a"), event("b")])
    first, _ = next(spool.events())
    spool.advance(first)
    assert Spool(tmp_path, "run").pending() == 1


def test_a_kept_file_stays_as_it_was_when_the_original_is_replaced(tmp_path):
    spool = Spool(tmp_path, "run")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    kept = spool.keep(folder)
    (tmp_path / "new").write_text("new")
    (tmp_path / "new").replace(folder / "weights")
    assert (spool.files / kept / "weights").read_text() == "old"
    spool.drop(kept)
    assert not (spool.files / kept).exists()
    assert (folder / "weights").read_text() == "new"


def test_spools_are_listed_oldest_first_without_what_was_refused(tmp_path):
    for name in ("b", "a"):
        Spool(tmp_path, name).append([event("x")])
    Spool(tmp_path, "b").refuse(event("x"), "no")
    assert {spool.run_key for spool in spools(tmp_path)} == {"a", "b"}


@pytest.mark.parametrize("key", ["", "../x", "a/b", "-a", "a" * 101, "a b", "it's"])
def test_keys_that_are_no_plain_names_are_refused(tmp_path, key):
    with pytest.raises(ConfigError, match="not a plain name"):
        Spool(tmp_path, key)
