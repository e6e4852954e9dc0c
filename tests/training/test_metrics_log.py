from __future__ import annotations

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recemb.training.metrics_log import FILE_NAME, MetricsLog, read_metrics


def test_lines_are_read_back_and_on_disk_as_soon_as_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(10, "train", {"loss": 0.5})
        assert json.loads((tmp_path / FILE_NAME).read_text()) == {"step": 10, "split": "train", "loss": 0.5}
        log.write(10, "validation", {"auc": 0.7})
    assert [line["split"] for line in read_metrics(tmp_path)] == ["train", "validation"]


def test_a_continued_log_drops_the_steps_that_will_be_done_again(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.write(step, "train", {"loss": step / 100})
    # What a process killed in mid-write leaves.
    with (tmp_path / FILE_NAME).open("a") as stream:
        stream.write('{"step": 40, "spl')
    with MetricsLog(tmp_path, resume_step=20) as log:
        log.write(30, "train", {"loss": 0.1})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(10, 0.1), (20, 0.2), (30, 0.1)]


def test_a_new_log_starts_empty(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"step": 1, "split": "train"}\n')
    MetricsLog(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_same_figures(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(5, "train", {"loss": 0.5})
        log.write(10, "train", {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 0.5), (10, 0.25)]


def test_no_file_means_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []
