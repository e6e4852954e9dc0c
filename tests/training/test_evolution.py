"""The evolution of widths: its draws, its memory, and that it finds what is best."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.training.evolution import Candidate, Evolution, EvolutionSettings, EvolutionState

widths_of_tables = st.lists(st.integers(1, 16), min_size=2, max_size=12)
seeds = st.integers(0, 2**32)


def planted(optimum: Sequence[int]) -> tuple[list[Candidate], object]:
    """A score with one best candidate, and the list of those that were scored."""
    asked: list[Candidate] = []

    def score(candidates: Sequence[Candidate], sample: bool) -> list[float]:
        asked.extend(candidates)
        return [-float(sum(abs(w - o) for w, o in zip(c, optimum, strict=True))) for c in candidates]

    return asked, score


@given(widths_of_tables, seeds)
@settings(max_examples=50, deadline=None)
def test_parents_are_never_changed_by_what_comes_from_them(full: list[int], seed: int) -> None:
    generator = random.Random(seed)
    search = Evolution(full, EvolutionSettings(mutation_probability=0.9), seed=seed)
    search.state.scores = {tuple(generator.randint(1, d) for d in full): generator.random() for _ in range(15)}
    before = dict(search.state.scores)
    best, ranking = search.state.best, search.state.ranking(15)
    for _ in range(5):
        search.next_population(generator)
    assert search.state.scores == before
    assert search.state.best == best and search.state.ranking(15) == ranking


@given(widths_of_tables, seeds)
@settings(max_examples=20, deadline=None)
def test_the_best_is_what_was_scored_best_in_any_generation(full: list[int], seed: int) -> None:
    scores: dict[Candidate, float] = {}
    generator = random.Random(seed)

    def score(candidates: Sequence[Candidate], sample: bool) -> list[float]:
        scores.update((candidate, generator.random()) for candidate in candidates)
        return [scores[candidate] for candidate in candidates]

    bests: list[float] = []
    search = Evolution(full, EvolutionSettings(generations=6), seed=seed)
    best = search.run(score, lambda state: bests.append(state.scores[state.best]))
    assert scores[best] == max(scores.values())
    assert bests == sorted(bests)


@given(widths_of_tables, seeds)
@settings(max_examples=50, deadline=None)
def test_children_are_cut_between_tables(full: list[int], seed: int) -> None:
    search = Evolution(full, EvolutionSettings())
    first, second = tuple(-1 for _ in full), tuple(-2 for _ in full)
    child = search.cross(first, second, random.Random(seed))
    cut = child.count(-1)
    assert 1 <= cut <= len(full) - 1
    assert child == first[:cut] + second[cut:]


def test_every_cut_and_every_width_is_drawn_alike() -> None:
    search = Evolution([4] * 5, EvolutionSettings(mutation_probability=1.0))
    generator = random.Random(0)
    cuts = [search.cross((1,) * 5, (2,) * 5, generator).count(1) for _ in range(4000)]
    assert all(900 < cuts.count(cut) < 1100 for cut in range(1, 5))
    for draw in (lambda: search.mutate((1,) * 5, generator), lambda: search.next_population(generator)[0]):
        drawn = [width for _ in range(800) for width in draw()]
        assert sorted(set(drawn)) == [1, 2, 3, 4]
        assert all(880 < drawn.count(width) < 1120 for width in range(1, 5))


def test_each_table_mutates_with_the_probability_given() -> None:
    search = Evolution([10**9] * 20, EvolutionSettings(mutation_probability=0.1))
    generator = random.Random(0)
    parent = (0,) * 20
    changed = sum(width != 0 for _ in range(500) for width in search.mutate(parent, generator))
    assert 850 < changed < 1150


@pytest.mark.parametrize("seed", range(5))
def test_the_global_optimum_of_a_small_problem_is_found(seed: int) -> None:
    optimum = (3, 1, 8, 5, 2)
    asked, score = planted(optimum)
    best = Evolution([8] * 5, EvolutionSettings(), seed=seed).run(score)  # type: ignore[arg-type]
    assert best == optimum
    # 8 ** 5 candidates there are; none is scored twice.
    assert len(asked) == len(set(asked)) <= 600


def test_a_sample_halves_the_candidates_and_finds_the_same_winner() -> None:
    optimum = (3, 1, 8, 5, 2)
    counts = {True: 0, False: 0}
    _, score = planted(optimum)

    def noisy(candidates: Sequence[Candidate], sample: bool) -> list[float]:
        counts[sample] += len(candidates)
        noise = [0.4 * random.Random(str(candidate)).random() if sample else 0.0 for candidate in candidates]
        return [value + error for value, error in zip(score(candidates, sample), noise, strict=True)]  # type: ignore[operator]

    search = Evolution([8] * 5, EvolutionSettings(promoted_fraction=0.25), has_sample=True)
    assert search.run(noisy) == optimum
    assert 0.2 < counts[False] / counts[True] < 0.35
    assert not set(search.state.scores) & set(search.state.dropped)


def test_of_equal_scores_the_narrowest_wins() -> None:
    search = Evolution([4, 4], EvolutionSettings(generations=4))
    best = search.run(lambda candidates, sample: [0.5] * len(candidates))
    assert sum(best) == min(sum(candidate) for candidate in search.state.scores)


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    path = tmp_path / "evolution.json"
    asked, score = planted((3, 1, 8, 5, 2))
    whole = Evolution([8] * 5, EvolutionSettings(generations=12), seed=7)
    whole.run(score)  # type: ignore[arg-type]

    class Killed(Exception):
        pass

    def save(state: EvolutionState) -> None:
        state.save(path)
        if state.generation == 5:
            raise Killed

    first_asked, first_score = planted((3, 1, 8, 5, 2))
    with pytest.raises(Killed):
        Evolution([8] * 5, EvolutionSettings(generations=12), seed=7).run(first_score, save)  # type: ignore[arg-type]
    second = Evolution([8] * 5, EvolutionSettings(generations=12), seed=7)
    second.state = EvolutionState.from_json(path.read_text())
    assert second.state.generation == 5
    second_asked, second_score = planted((3, 1, 8, 5, 2))
    second.run(second_score)  # type: ignore[arg-type]
    assert first_asked + second_asked == asked
    assert second.state == whole.state


def test_a_state_from_before_time_was_kept_goes_on_at_zero_seconds(tmp_path: Path) -> None:
    path = tmp_path / "evolution.json"
    state = EvolutionState(1, {(2, 3): 0.5}, {(1, 1): 0.25}, [{"generation": 1}], seconds=1.25, cpu_seconds=2.5)
    state.save(path)
    assert EvolutionState.from_json(path.read_text()) == state
    content = json.loads(path.read_text())
    del content["seconds"], content["cpu_seconds"]
    assert EvolutionState.from_json(json.dumps(content)) == replace(state, seconds=0.0, cpu_seconds=0.0)


def test_candidates_are_repaired_before_they_are_scored() -> None:
    asked, score = planted((8, 8, 8))

    def within(candidate: Candidate, generator: random.Random) -> Candidate:
        widths = list(candidate)
        while sum(widths) > 12:
            widths[generator.choice([i for i, width in enumerate(widths) if width > 1])] -= 1
        return tuple(widths)

    best = Evolution([8, 8, 8], EvolutionSettings(), repair=within).run(score)  # type: ignore[arg-type]
    assert max(sum(candidate) for candidate in asked) == 12 == sum(best)


def test_evolution_settings_are_checked() -> None:
    for wrong, message in (
        ({"generations": 0}, "generations must be at least 1"),
        ({"parents": 1}, "parents must be at least 2"),
        ({"mutants": 1, "children": 0}, "at least 2 together"),
        ({"mutation_probability": 0.0}, r"mutation_probability must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            EvolutionSettings(**wrong)  # type: ignore[arg-type]
