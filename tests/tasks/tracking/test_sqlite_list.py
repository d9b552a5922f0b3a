"""The list read from MLflow's file, held against MLflow's own client."""

import shutil
import sqlite3

from support.tracking import record_policy

from tasks.catalogue import MODEL_NAMES
from tasks.tracking import list_versions, promote
from tasks.tracking.registry import versions_of
from tasks.tracking.sqlite_list import KNOWN_SCHEMA, versions_in_file
from tasks.tracking.store import tracking_uri
from tests.tasks.tracking.test_deleted import PARAMS, record


def by_mlflow(store):
    return [version for name in MODEL_NAMES for version in versions_of(store, name)]


def test_the_file_says_what_mlflow_says(checkout, store):
    record(checkout, "one")
    record_policy(checkout, "two", "other weights", scores=[1.0, 2.0], win_rate_low=0.7)
    promote(checkout, "rlhf-policy/2", params=PARAMS)
    store.client.set_registered_model_alias("rlhf-policy", "mine", "1")
    found = versions_in_file(tracking_uri(checkout))
    assert found == by_mlflow(store)
    assert [version.aliases for version in found] == [("mine",), ("candidate", "champion")]
    assert list_versions(checkout) == found
    store.client.delete_model_version("rlhf-policy", "1")
    assert versions_in_file(tracking_uri(checkout)) == by_mlflow(store)
    assert len(by_mlflow(store)) == 1


def test_what_is_not_known_is_left_to_mlflow(checkout, store, tmp_path):
    record(checkout, "one")
    uri = tracking_uri(checkout)
    assert versions_in_file("http://127.0.0.1:5000") is None
    assert versions_in_file(f"sqlite:///{tmp_path}/absent.db") is None
    other = tmp_path / "other.db"
    shutil.copyfile(uri.removeprefix("sqlite:///"), other)
    with sqlite3.connect(other) as base:
        base.execute("UPDATE alembic_version SET version_num = 'later'")
    assert versions_in_file(f"sqlite:///{other}") is None
    other.write_bytes(b"no database")
    assert versions_in_file(f"sqlite:///{other}") is None


def test_the_schema_that_is_known_is_that_of_the_mlflow_here(store):
    """With another MLflow the list is still right, and slow; this says that the number wants to be looked at."""
    with sqlite3.connect(store.uri.removeprefix("sqlite:///")) as base:
        assert base.execute("SELECT version_num FROM alembic_version").fetchall() == [(KNOWN_SCHEMA,)]
