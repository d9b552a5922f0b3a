"""A store that takes nothing any more while a run goes on: its disk is full, or it was made read-only."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from support.tracking import MODEL, STAGE, write_model

from tasks.tracking import Recorder, flush, list_versions


@contextmanager
def each_statement_after(pragma: str) -> Iterator[None]:
    """SQLite's own refusal: every statement comes after this setting of its connection."""

    def before(connection: Connection, cursor: object, *rest: object) -> None:
        connection.connection.driver_connection.execute(pragma)

    event.listen(Engine, "before_cursor_execute", before)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", before)


@pytest.mark.parametrize(
    ("fault", "healed", "said"),
    [
        ("PRAGMA query_only=ON", "PRAGMA query_only=OFF", "attempt to write a readonly database"),
        ("PRAGMA max_page_count=1", "PRAGMA max_page_count=1073741823", "database or disk is full"),
    ],
)
def test_records_wait_and_one_line_says_what_the_database_said(checkout, store, capfd, fault, healed, said):
    write_model(checkout, "model")
    with each_statement_after(fault):
        recorder = Recorder(checkout, "run", params={"note": "x" * 5000})
        recorder.start_stage(STAGE, params={f"p{number}": "x" * 400 for number in range(40)})
        recorder.metrics(STAGE, [{"step": step, "metrics": {"loss/train": 1.0}} for step in range(100)])
        recorder.register(STAGE, MODEL, {"reward": 1.0})
        recorder.finish_stage(STAGE)
        told = recorder.close()
    assert told.pending > 0
    assert told.refused == ()
    assert f"records wait to be sent ({said}). Fix: rlhf sync" in str(told)
    assert "Traceback" not in capfd.readouterr().err
    with each_statement_after(healed):
        assert str(flush(checkout)) == ""
    (version,) = list_versions(checkout, "rlhf-policy")
    assert version.metrics["reward"] == 1.0
    (run,) = store.client.search_runs([store.experiment_id], f"tags.stage = '{STAGE}'")
    assert len(store.client.get_metric_history(run.info.run_id, "loss/train")) == 100
