from __future__ import annotations

import pytest
from scipy import stats

from recemb.comparison.recommendation import probability_better, recommend
from recemb.comparison.report import reading
from recemb.comparison.summary import RunSummary, budget_table, table

FIRST, SECOND = (0.771, 0.774, 0.7725), (0.7700, 0.7712, 0.7731, 0.7695)


def run(
    name: str,
    size: int,
    auc: tuple[float, ...],
    budget: str | None = "10x",
    refused: str | None = None,
    training: int | None = None,
    out_of_reach: int = 0,
    diverged: int = 0,
) -> RunSummary:
    return RunSummary(
        name=name,
        method=name.split("-")[0],
        budget=budget,
        refused=refused,
        setting=(),
        tuning_trials=0,
        auc=auc,
        logloss=tuple(1 - value for value in auc),
        serving_bytes=size,
        full_bytes=1000,
        samples_per_cpu_second=tuple(float(size) for _ in auc),
        training_bytes=training,
        out_of_reach=out_of_reach,
        diverged=diverged,
    )


RUNS = [
    run("full", 1000, (0.799, 0.8, 0.801), budget=None),
    run("unified-10x", 100, (0.79, 0.791, 0.792)),
    run("hashing-10x", 90, (0.77, 0.771, 0.772)),
    run("robe-10x", 99, (0.7895, 0.791, 0.7915)),
    run("unified-100x", 10, (0.76, 0.761, 0.762), budget="100x"),
    run("path-100x", 0, (), budget="100x", refused="budget of 10 bytes cannot be met"),
]


def test_probability_is_one_minus_the_p_value_of_welchs_test() -> None:
    p_value = stats.ttest_ind(FIRST, SECOND, equal_var=False, alternative="greater").pvalue
    assert probability_better(FIRST, SECOND) == pytest.approx(1 - p_value, rel=1e-12)
    assert probability_better(SECOND, FIRST) == pytest.approx(p_value, rel=1e-12)


def test_one_seed_says_nothing_and_equal_seeds_a_toss_up() -> None:
    assert probability_better((0.9,), SECOND) == 0.5
    assert probability_better((0.7, 0.7), (0.7, 0.7)) == 0.5
    assert probability_better((0.8, 0.8), (0.7, 0.7)) == 1.0


def test_the_best_method_that_fits_is_recommended_with_each_rival_once() -> None:
    advice = recommend(RUNS, 100)
    assert advice.best.name == "unified-10x"
    assert [other.name for other, _ in advice.others] == ["robe-10x", "hashing-10x"]
    assert advice.loss_to_full == pytest.approx(0.009)
    assert "toss-up" in advice.text() and "100 bytes" in advice.text()
    assert recommend(RUNS, 99).best.name == "robe-10x"
    assert recommend(RUNS, 50).best.name == "unified-100x"
    assert recommend(RUNS, 50).others == ()


def test_a_budget_that_nothing_fits_names_the_smallest_run() -> None:
    with pytest.raises(ValueError, match="no run of the study fits 9 bytes; the smallest is unified-100x, 10 bytes"):
        recommend(RUNS, 9)


def test_the_reading_names_leader_ties_cliffs_and_what_was_refused() -> None:
    text = reading(RUNS)
    assert "Full tables (1,000 bytes) reach a test AUC of 0.8000" in text
    assert "At 10x unified leads with 0.7910 (-0.0090 against full tables), not told apart at 95% from robe." in text
    assert "hashing from 10x" in text and "unified from 100x" in text and "robe from" not in text
    assert text.endswith("Out of reach: path-100x.")


def test_the_reading_does_not_compare_what_has_one_seed() -> None:
    text = reading([*RUNS, run("magnitude-10x", 98, (0.78,))])
    assert "not told apart at 95% from robe, on one seed magnitude 0.7800." in text
    assert (
        "leads with 0.7990 (-0.0010 against full tables), on one seed unified 0.7910, robe 0.7907, hashing"
        in reading([*RUNS, run("magnitude-10x", 98, (0.799,))])
    )


def test_the_reading_says_who_leads_where_training_must_shrink_too() -> None:
    runs = [
        run("full", 1000, (0.8, 0.8), budget=None, training=1100),
        # Searched: as large as full tables while it trains.
        run("pep-10x", 100, (0.795, 0.795), training=2200),
        run("unified-10x", 100, (0.79, 0.79), training=110),
        run("robe-10x", 100, (0.791, 0.791), training=111),
        run("robe-100x", 10, (0.77, 0.77), budget="100x", training=12),
    ]
    text = reading(runs)
    assert "At 10x pep leads" in text
    # 110 bytes of training are a tenth of those of full tables, nothing is within 11.
    assert "(values and optimizer state of the tables) must be as much smaller: unified-10x at 10x (0.7900)." in text
    assert "as much smaller" not in reading(RUNS)


def test_the_table_has_every_run_also_those_refused() -> None:
    lines = table(RUNS).splitlines()
    assert len(lines) == 2 + len(RUNS)
    assert lines[3] == "| unified-10x | 0.7910 ± 0.0010 | 0.2090 ± 0.0010 | 100 | 10.0x | - | 100 | 3 |"
    assert lines[-1].startswith("| path-100x | budget of 10 bytes cannot be met |")
    assert len({line.count("|") for line in lines}) == 1


def test_a_column_a_budget_with_its_best_in_bold() -> None:
    searched = run("magnitude", 500, (0.795,), budget=None)
    assert budget_table([*RUNS, searched]).splitlines() == [
        "| method | 10x | 100x |",
        "|---|---|---|",
        "| full | 0.8000 ± 0.0010 (1.0x) | |",
        "| magnitude | 0.7950 (2.0x) | |",
        "| unified | **0.7910 ± 0.0010** | **0.7610 ± 0.0010** |",
        "| hashing | 0.7710 ± 0.0010 |  |",
        "| robe | 0.7907 ± 0.0010 |  |",
        "| path |  | - |",
    ]


def test_one_seed_is_named_as_such_and_has_no_spread() -> None:
    runs = [run("full", 1000, (0.8,), budget=None), run("unified-10x", 100, (0.79,))]
    assert recommend(runs, 100).text().splitlines()[0].endswith("100 bytes (10.0x), test AUC 0.7900 (one seed).")
    assert reading(runs).startswith("Full tables (1,000 bytes) reach a test AUC of 0.8000 (one seed).")
    text = recommend(RUNS, 100).text()
    assert text.splitlines()[0].endswith("test AUC 0.7910 over 3 seeds (sd 0.0010).")


def test_seeds_that_diverged_or_were_out_of_reach_are_counted_wherever_a_run_is_shown() -> None:
    runs = [
        *RUNS,
        run("pep-10x", 100, (0.78, 0.78), out_of_reach=1),
        run("memcom-10x", 100, (0.78,), diverged=2),
        run("cce-10x", 0, (), refused="diverged: loss is inf in step 3", diverged=3),
    ]
    assert reading(runs).endswith(
        "Out of reach: path-100x, pep-10x (1 of 3 seeds). Diverged: memcom-10x (2 of 3 seeds), cce-10x."
    )
    lines = {line.split(" | ")[0]: line for line in table(runs).splitlines()}
    assert lines["| pep-10x"].endswith("| 2, 1 out of reach |") and lines["| memcom-10x"].endswith("| 1, 2 diverged |")
    assert lines["| cce-10x"].startswith("| cce-10x | diverged: loss is inf in step 3 |")
    assert "| cce | diverged |  |" in budget_table(runs).splitlines()
