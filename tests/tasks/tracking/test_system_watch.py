"""Readings of the machine go where those of MLflow's own monitor go."""

import threading

import psutil
from support.tracking import STAGE

from tasks.tracking import Recorder, SystemWatch
from tasks.tracking.names import RUN_KEY


def readings(store, key):
    (run,) = store.client.search_runs([store.experiment_id], f"tags.`{RUN_KEY}` = '{key}'")
    return run, {name for name in run.data.metrics if name.startswith("system/")}


def test_every_stage_has_readings_under_mlflows_names_however_short_it_was(checkout, store):
    with Recorder(checkout, "run") as recorder:
        watch = SystemWatch(recorder, every_s=600.0)
        watch.ready.wait(60.0)
        for stage in ("sft", STAGE):
            recorder.start_stage(stage)
            watch.begin(stage)
            watch.end(stage)
            recorder.finish_stage(stage)
        watch.stop()
    for stage in ("sft", STAGE):
        run, names = readings(store, f"run/{stage}")
        assert names >= {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes",
                         "system/disk_usage_percentage", "system/network_receive_megabytes"}  # fmt: skip
        used, total = run.data.metrics["system/system_memory_usage_megabytes"], psutil.virtual_memory().total / 1e6
        assert 0.0 < used < total
    assert str(recorder.delivery) == ""


def test_a_resumed_stage_goes_on_with_its_steps(checkout, store):
    for _ in range(2):
        with Recorder(checkout, "run") as recorder:
            watch = SystemWatch(recorder, every_s=600.0)
            watch.ready.wait(60.0)
            recorder.start_stage("sft")
            watch.begin("sft")
            watch.end("sft")
            watch.stop()
    run, _ = readings(store, "run/sft")
    history = store.client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    assert sorted(point.step for point in history) == [0, 1]


def test_a_machine_that_cannot_be_read_ends_nothing(checkout, monkeypatch):
    def broken(monitor):
        raise OSError("no such counter")

    crashed = []
    monkeypatch.setattr("mlflow.system_metrics.metrics.cpu_monitor.CPUMonitor.collect_metrics", broken)
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    with Recorder(checkout, "run") as recorder:
        watch = SystemWatch(recorder, every_s=0.01)
        recorder.start_stage("sft")
        watch.begin("sft")
        watch.end("sft")
        watch.stop()
    assert "system-watch" not in {thread.name for thread in threading.enumerate()}
    assert crashed == [], "a traceback on somebody's terminal"
    assert str(recorder.delivery) == ""
