"""Evolutionary search for one width per table, by a score that costs a pass over data.

Reference: Lyu et al., "OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction", CIKM 2022,
arXiv:2208.04482, whose supernet scores candidates; the loop is that of Guo et al., "Single Path One-Shot Neural
Architecture Search with Uniform Sampling", ECCV 2020, arXiv:1904.00420.

It is the search as the paper describes it, not as the released code runs it: parents are never edited in place, so the
best candidate stays what was scored; children are cut between two tables, not between columns; every draw is of 1..D.

Differs from the paper:

* A candidate that was scored is never scored again, and where a draw gives one that was, it is drawn anew, so that a
  generation looks at as many new candidates as it may.
* Where there is a sample, new candidates meet on a fixed sample of the rows first, and only the better of them are
  scored on all (successive halving with one rung).
* A size term and a byte budget can be part of the search, both off by default.

Shapes: T searched tables, D their embedding_dims.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recemb.files import write_json

logger = logging.getLogger(__name__)

# One width a table.
Candidate = tuple[int, ...]
# Candidates, and whether to score them on the sample only -> one score each, larger is better.
Score = Callable[[Sequence[Candidate], bool], Sequence[float]]

STATE_FILE = "evolution.json"
# Of one candidate, until it is one that was not scored before.
_DRAWS = 10


@dataclass(frozen=True)
class EvolutionSettings:
    """How to search; the defaults are the paper's.

    Args:
        generations: T. The first is drawn at random.
        mutants: candidates of a generation that are a parent with some tables drawn anew.
        children: candidates that take their first tables from one parent and the others from another.
        parents: k, the best candidates seen so far, from which the next generation comes.
        mutation_probability: of each table of a mutant to be drawn anew.
        promoted_fraction: of the new candidates of a generation, how many are scored on all rows after a look at the
            sample; where there is a sample.

    Raises:
        ValueError: a count below its least useful value, or a share outside (0, 1].
    """

    generations: int = 30
    mutants: int = 10
    children: int = 10
    parents: int = 15
    mutation_probability: float = 0.1
    promoted_fraction: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("generations", 1), ("mutants", 0), ("children", 0), ("parents", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"evolution: {name} must be at least {least}, got {getattr(self, name)}")
        if self.mutants + self.children < 2:
            raise ValueError("evolution: mutants and children must be at least 2 together")
        for name in ("mutation_probability", "promoted_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"evolution: {name} must be in (0, 1], got {getattr(self, name)}")


@dataclass
class EvolutionState:
    """Where a search is, after whole generations.

    Args:
        generation: generations scored.
        scores: candidate -> its score on all rows.
        dropped: candidate -> its score on the sample, after which it was not scored further.
        history: one entry a generation, fit for people and plots.
        seconds, cpu_seconds: that the search took until then, killed runs included.
    """

    generation: int = 0
    scores: dict[Candidate, float] = field(default_factory=dict)
    dropped: dict[Candidate, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def best(self) -> Candidate:
        """The candidate of the highest score; of equal ones the narrowest."""
        return self.ranking(1)[0]

    def ranking(self, count: int) -> list[Candidate]:
        """The best ``count`` candidates, best first."""
        return sorted(self.scores, key=lambda candidate: (-self.scores[candidate], sum(candidate), candidate))[:count]

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        content = {
            "generation": self.generation,
            "best": list(self.best),
            "scores": [[list(candidate), score] for candidate, score in self.scores.items()],
            "dropped": [[list(candidate), score] for candidate, score in self.dropped.items()],
            "history": self.history,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        write_json(path, content)

    @staticmethod
    def from_json(text: str) -> EvolutionState:
        """What ``save`` wrote, to the last bit."""
        content: Mapping[str, Any] = json.loads(text)
        scores, dropped = (
            {tuple(candidate): score for candidate, score in content[key]} for key in ("scores", "dropped")
        )
        # Files from before time was kept have neither of the last two.
        seconds, cpu_seconds = (content.get(key, 0.0) for key in ("seconds", "cpu_seconds"))
        return EvolutionState(content["generation"], scores, dropped, content["history"], seconds, cpu_seconds)


class Evolution:
    """Looks for the widths of the highest score.

    Generation g draws from a generator of its own, so a search goes on after a kill as if nothing had happened.

    Args:
        widths: D of each searched table.
        settings: see there.
        seed: of all draws.
        repair: makes any candidate one that may be scored, such as one within a byte budget; None: all may.
        has_sample: ``score`` knows a sample, see ``Score``.
    """

    def __init__(
        self,
        widths: Sequence[int],
        settings: EvolutionSettings,
        *,
        seed: int = 0,
        repair: Callable[[Candidate, random.Random], Candidate] | None = None,
        has_sample: bool = False,
    ) -> None:
        self.widths = list(widths)
        self.settings = settings
        self.seed = seed
        self.state = EvolutionState()
        self._repair = repair
        self._has_sample = has_sample

    def run(self, score: Score, after_generation: Callable[[EvolutionState], None] | None = None) -> Candidate:
        """Go on with ``state`` to the last generation.

        Args:
            score: called with candidates it has not seen.
            after_generation: called with the state, to save and show it.
        """
        while self.state.generation < self.settings.generations:
            generator = random.Random(f"{self.seed}/{self.state.generation}")
            population = self.next_population(generator)
            self._score_new(population, score)
            self.state.generation += 1
            self._remember(population)
            if after_generation is not None:
                after_generation(self.state)
        return self.state.best

    def next_population(self, generator: random.Random) -> list[Candidate]:
        """The candidates of the next generation, ``mutants`` and ``children`` of them, repeats included."""
        parents = self.state.ranking(self.settings.parents)
        if not parents:
            draws: list[Callable[[], Candidate]] = [lambda: self._random(generator)]
            draws *= self.settings.mutants + self.settings.children
        else:
            draws = [lambda: self.mutate(generator.choice(parents), generator)] * self.settings.mutants
            draws += [lambda: self.cross(*_pair(parents, generator), generator)] * self.settings.children
        population: list[Candidate] = []
        for draw in draws:
            for _ in range(_DRAWS):
                candidate = draw() if self._repair is None else self._repair(draw(), generator)
                if not (candidate in self.state.scores or candidate in self.state.dropped or candidate in population):
                    break
            population.append(candidate)
        return population

    def mutate(self, parent: Candidate, generator: random.Random) -> Candidate:
        """``parent`` with each table drawn anew, from 1..D, with ``mutation_probability``."""
        probability = self.settings.mutation_probability
        return tuple(
            generator.randint(1, full) if generator.random() < probability else width
            for width, full in zip(parent, self.widths, strict=True)
        )

    def cross(self, first: Candidate, second: Candidate, generator: random.Random) -> Candidate:
        """The first tables of one and the other tables of another, at least one of each where there are two."""
        cut = generator.randint(1, max(len(first) - 1, 1))
        return first[:cut] + second[cut:]

    def _random(self, generator: random.Random) -> Candidate:
        return tuple(generator.randint(1, full) for full in self.widths)

    def _score_new(self, population: Sequence[Candidate], score: Score) -> None:
        state = self.state
        new = [c for c in dict.fromkeys(population) if c not in state.scores and c not in state.dropped]
        if self._has_sample and len(new) > 1:
            sampled = dict(zip(new, score(new, True), strict=True))
            by_score = sorted(new, key=lambda candidate: (-sampled[candidate], sum(candidate), candidate))
            number = max(1, round(len(new) * self.settings.promoted_fraction))
            state.dropped.update((candidate, sampled[candidate]) for candidate in by_score[number:])
            new = by_score[:number]
        if new:
            state.scores.update(zip(new, score(new, False), strict=True))

    def _remember(self, population: Sequence[Candidate]) -> None:
        state = self.state
        state.history.append(
            {
                "generation": state.generation,
                "best_score": state.scores[state.best],
                "best": list(state.best),
                "scored": len(state.scores),
                "dropped": len(state.dropped),
                "distinct": len(set(population)),
            }
        )


def _pair(parents: Sequence[Candidate], generator: random.Random) -> tuple[Candidate, Candidate]:
    """Two parents, different where there are two."""
    first, second = generator.sample(parents, 2) if len(parents) > 1 else (parents[0], parents[0])
    return first, second
