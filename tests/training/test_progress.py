from __future__ import annotations

import logging

import pytest

from recemb.training import progress
from recemb.training.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.4, "0:09"), (65, "1:05"), (3599.6, "1:00:00"), (3725, "1:02:05")]
)
def test_durations_read_as_clocks(seconds, text):
    assert duration(seconds) == text


def test_without_a_terminal_lines_tell_rows_rate_loss_and_time_left(caplog, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, logger="recemb"), Progress(1000, terminal=False) as shown:
        shown.update(step=5, num_samples=250, loss=0.6931)
    assert "step 5: 250 of 1,000 rows (25%)" in caplog.text
    assert "rows/s, loss 0.6931" in caplog.text
    assert "left" in caplog.text


def test_without_a_terminal_the_last_line_comes_however_soon(caplog):
    with caplog.at_level(logging.INFO, logger="recemb"), Progress(1000, terminal=False) as shown:
        shown.update(step=1, num_samples=500, loss=0.7)
        shown.update(step=2, num_samples=500, loss=0.6)
    assert [record.getMessage()[:7] for record in caplog.records] == ["step 2:"]


def test_a_continued_run_starts_at_the_rows_done(caplog):
    with caplog.at_level(logging.INFO, logger="recemb"), Progress(1000, done_samples=900, terminal=False) as shown:
        shown.update(step=10, num_samples=100, loss=0.5)
    assert "1,000 of 1,000 rows (100%)" in caplog.text


def test_on_a_terminal_a_bar_shows_step_and_loss(capsys):
    with Progress(1000, terminal=True) as shown:
        shown.update(step=5, num_samples=1000, loss=0.6931)
    text = capsys.readouterr().err
    assert "100%" in text
    assert "loss=0.6931" in text
    assert "step=5" in text
