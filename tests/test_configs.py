from __future__ import annotations

import copy
import importlib
import inspect
import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recemb.command_line import config_folder
from recemb.config import TrainConfig, build_target
from recemb.method import CompressedTables

CONFIGS = config_folder()
GROUPS = ("data", "model", "embedding", "optimizer", "trainer")
# What a config leaves open for the user to say.
REQUIRED = {"data=parquet": "data.path=somewhere", "model=dlrm_mlperf": "embedding.embedding_dim=128"}


def resolved(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [*overrides, "paths.run=somewhere"])
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def default() -> dict:
    return resolved()


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in options(group)])
def test_every_config_composes_and_every_key_of_it_is_read(choice):
    extra = [REQUIRED[choice]] if choice in REQUIRED else []
    parsed = TrainConfig.parse(resolved(choice, *extra))
    for target in (parsed.model, parsed.embedding.method, parsed.optimizer.embedding, parsed.optimizer.dense):
        build_target(target)


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_and_says_how_it_is_run(name):
    TrainConfig.parse(resolved(f"+experiment={name}"))
    lines = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# python -m recemb.train") and f"+experiment={name}" in lines[1]


def test_the_default_experiment_is_unified_at_ten_times():
    parsed = TrainConfig.parse(resolved("+experiment=criteo"))
    assert (parsed.embedding.method_name, parsed.embedding.budget) == ("unified", "10x")
    assert build_target(parsed.optimizer.embedding).name == "rowwise_adagrad"


def test_every_embedding_config_names_a_method_and_every_method_has_a_config():
    folder = Path(importlib.import_module("recemb.methods").__path__[0])
    methods = set()
    for path in folder.glob("[!_]*.py"):
        module = importlib.import_module(f"recemb.methods.{path.stem}")
        own = [
            value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        # What is built from a plan has none of its own: the search that makes the plan is configured.
        if any(issubclass(cls, CompressedTables) and "plan" not in inspect.signature(cls).parameters for cls in own):
            methods.add(path.stem)
    named = {
        name: TrainConfig.parse(resolved(f"embedding={name}")).embedding.method_name for name in options("embedding")
    }
    # Tables of a plan are built by the stages of a search.
    assert set(named.values()) == methods - {"pruned"}
    # A method with variants may have a config for each; one of its own name leads to itself.
    assert all(named.get(method, method) == method for method in methods)


def test_budgets_are_read_as_ratio_fraction_and_bytes():
    for text, value in (("10x", "10x"), ("0.1", 0.1), ("50_000_000", 50_000_000)):
        assert TrainConfig.parse(resolved(f"embedding.budget={text}")).embedding.budget == value


def leaves(content: dict, prefix: tuple[str, ...] = ()):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def test_a_key_too_many_is_an_error_in_every_group(default):
    groups = {path[:-1] for path in leaves(default)}
    assert ("trainer", "schedule") in groups and ("embedding", "method") in groups
    for group in groups:
        changed = copy.deepcopy(default)
        place = changed
        for key in group:
            place = place[key]
        place["lerning_rate"] = 1.0
        with pytest.raises(ValueError, match=rf"nothing reads {'.'.join((*group, 'lerning_rate'))}; "):
            TrainConfig.parse(changed)


def test_a_missing_key_is_named(default):
    for path in leaves(default):
        # Arguments with defaults of a class, and options with defaults, may be left out.
        if path[0] == "model" or path[:2] in (("embedding", "method"), ("embedding", "full_below_rows")):
            continue
        # Configs of runs from before there were stages lack the second.
        if path[:1] == ("optimizer",) or path == ("data", "architecture_fraction"):
            continue
        changed = copy.deepcopy(default)
        place = changed
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        with pytest.raises(ValueError, match=rf"config: {'.'.join(path)} is missing"):
            TrainConfig.parse(changed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epochs=two", "trainer.epochs must be int, got 'two'"),
        ("trainer.epochs=true", "trainer.epochs must be int, got True"),
        ("trainer.epochs=1.5", "trainer.epochs must be int, got 1.5"),
        ("trainer.max_steps=0", "trainer.max_steps must be at least 1, got 0"),
        ("trainer.precision=fp16", r"trainer.precision must be one of \['fp32', 'bf16'\], got 'fp16'"),
        ("trainer.compile=1", "trainer.compile must be bool, got 1"),
        ("trainer.schedule.decay=null", "trainer.schedule.decay must be one of"),
        ("data=nothing", "Could not find 'data/nothing'"),
        ("embedding.embedding_dim=10", "embedding_dim must be a multiple of 4.*got 10"),
        ("embedding.method._target_=recemb.methods.nothing.X", "cannot import recemb.methods.nothing.X"),
        ("+model.num_dense=5", "nothing reads model.num_dense"),
        ("+embedding.method.tables=[]", "nothing reads embedding.method.tables"),
    ],
)
def test_values_of_another_type_or_out_of_range_are_named(override, message):
    with pytest.raises(Exception, match=message):
        TrainConfig.parse(resolved(override))


def test_validations_come_after_steps_or_fractions_of_an_epoch():
    every = {"0.25": 49, "50": 50, "null": None, "0.001": 1}
    for text, steps in every.items():
        trainer = TrainConfig.parse(resolved(f"trainer.validate_every_steps={text}")).trainer
        assert trainer.steps_between_validations(196) == steps
    for text in ("0", "-1", "1.5", "1.0"):
        with pytest.raises(ValueError, match=rf"validate_every_steps must be a whole number .*got {text}"):
            TrainConfig.parse(resolved(f"trainer.validate_every_steps={text}"))


def test_whole_numbers_are_fine_where_fractions_are_meant():
    assert TrainConfig.parse(resolved("trainer.stopping.min_delta=1")).trainer.stopping.min_delta == 1.0


def test_optimizer_configs_differ_only_in_what_their_names_say():
    for name, other in itertools.combinations(options("optimizer"), 2):
        first, second = (resolved(f"optimizer={choice}")["optimizer"] for choice in (name, other))
        assert first["dense"] == second["dense"]
        assert first["embedding"]["name"] == name


def test_config_files_start_with_what_they_are_for():
    for path in CONFIGS.rglob("*.yaml"):
        assert path.read_text().startswith("#"), f"{path} has no comment"
        assert yaml.safe_load(path.read_text()) is not None
