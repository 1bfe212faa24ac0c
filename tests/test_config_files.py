"""Config files that do not run, and what is set in them on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ml_collections import ConfigDict, config_dict

from configs import common
from maskvit.core.config_files import apply_overrides, load_config, parse_value, split_overrides
from maskvit.core.configuration import check_arguments
from maskvit.objectives import build_objective
from maskvit.training import config as config_of_run


def overridden(config: ConfigDict, *words: str) -> dict[str, Any]:
    others, overrides = split_overrides(words)
    assert not others
    apply_overrides(config, overrides)
    return config.to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the config file .*config.py does not exist"),
        ("def get_config(\n", r"config.py:1: .*never closed"),
        ("import nothing_of_the_kind\n", r"config.py:1: ModuleNotFoundError: .*nothing_of_the_kind"),
        ("x = 1\n", r"config.py defines no function get_config\(\)"),
        ("get_config = 3\n", r"config.py defines no function get_config\(\)"),
        ("def get_config():\n    pass\n", r"get_config\(\) of .*config.py returns NoneType, not an ml_collections.ConfigDict"),
        ("def get_config():\n    raise OSError('what', 'else')\n", r"config.py:2: OSError: .*what"),
        ("def get_config():\n    x = {}\n    return x['size']\n", r"config.py:3: KeyError: size \(in: return x\['size'\]\)"),
        ("def get_config(size):\n    pass\n", r"config.py: TypeError: .*size"),
        ("def get_config():\n    return 1 / 0\n", r"config.py:2: ZeroDivisionError"),
        ("\0", "config.py.*null"),
    ],
)
def test_a_config_file_that_does_not_run_is_one_line(text, message, tmp_path):
    path = tmp_path / "config.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_config(str(path))
    assert "\n" not in str(error.value)


def test_a_folder_is_no_config_file_and_an_argument_reaches_get_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; give a config file"):
        load_config(str(tmp_path))
    path = tmp_path / "sized.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config(size):\n    return ConfigDict({'size': size})\n")
    assert load_config(f"{path}:B").to_dict() == {"size": "B"}


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--config.total=20"], "total", "20"),
        (["--config.total=5%"], "total", "5%"),
        (["--config.image_size=224"], "image_size", 224),
        (["--config.image_size=(32,64)"], "image_size", (32, 64)),
        (["--config.seed=3"], "seed", 3),
        (["--config.seed", "3"], "seed", 3),
        (["-config.seed=3"], "seed", 3),
        (["--config.seed=1", "--config.seed=2"], "seed", 2),
        (["--config.objective.remat"], "objective.remat", True),
        (["--config.objective.remat=true"], "objective.remat", True),
        (["--noconfig.objective.remat"], "objective.remat", False),
        (["--config.optimizer.clip_norm=1"], "optimizer.clip_norm", 1.0),
        (["--config.optimizer.clip_norm=None"], "optimizer.clip_norm", None),
        (["--config.optimizer.weight_decay=(0.04,0.4)"], "optimizer.weight_decay", (0.04, 0.4)),
        (["--config.objective.guidance.name=self_attention"], "objective.guidance", {"name": "self_attention"}),
        (["--config.objective.loss_weight.tau=0.75"], "objective.loss_weight", {"tau": 0.75}),
        (["--config.objective.scores={}"], "objective.scores", {}),
        (["--config.objective.scores=()"], "objective.scores", {}),
        (["--config.objective.scores={'name': 'color', 'kind': 'green'}"], "objective.scores", {"name": "color", "kind": "green"}),
        (["--config.evaluators.knn.type=knn", "--config.evaluators.knn.ks=(3,)"], "evaluators", {"knn": {"type": "knn", "ks": (3,)}}),
        (["--config.objective.encoder=B"], "objective.encoder", "B"),
        (["--config.init_from.path=2026"], "init_from.path", "2026"),
        (["--config.data.train.data_dir=/a=b/c"], "data.train.data_dir", "/a=b/c"),
        (["--config.modalities.thermal={'channels': 1}"], "modalities.thermal", {"channels": 1}),
    ],
)
def test_overrides(words, key, value):
    found: Any = overridden(common.multimae_b(), *words)
    for name in key.split("."):
        found = found[name]
    assert found == value and isinstance(found, type(value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.modalities.rbg.patch=8"], "config.modalities has no 'rbg'; it has: depth, rgb, semseg"),
        (["--config.total.steps=8"], "'total.steps', but config.total is '1600 epochs', not a block"),
        (["--config.seed.x.y=8"], "config.seed is 0, not a block"),
        (["--config.=8"], "names no key"),
        (["--config.objective.inputs[0]=rgb"], "set the whole tuple, --config.objective.inputs="),
        (["--noconfig.objective.remat=true"], "sets a value and denies it"),
        (["--config.seed.x=1", "--config.modalities.rbg.patch=8"], "2 mistakes:\n.*config.seed is 0.*\n.*no 'rbg'"),
    ],
)
def test_overrides_that_cannot_be_set(words, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        overridden(common.multimae_b(), *words)


def test_an_override_reaches_what_refers_to_the_key():
    config = ConfigDict({"seed": 1, "data": {"seed": config_dict.FieldReference(1)}})
    config.copy = config.data.get_ref("seed")
    assert overridden(config, "--config.data.seed=5")["copy"] == 5


def test_other_words_are_left_alone():
    words = ["main.py", "--config=a.py", "--workdir", "x", "--configs.a=1", "--config.a", "--", "--config.b=2"]
    assert split_overrides(words) == (
        ["main.py", "--config=a.py", "--workdir", "x", "--configs.a=1", "--", "--config.b=2"],
        [("a", "true")],
    )


def test_values_are_literals_but_where_the_config_has_text():
    assert parse_value("1e-4") == 1e-4 and parse_value("a,b") == "a,b" and parse_value("None", "x") is None
    assert parse_value("20", "5 steps") == "20" and parse_value("'20'", "5 steps") == "20" and parse_value("()", (1, 2)) == ()


def block(*, size: int, rate: float = 1.0, names: tuple[str, ...] = (), pair: float | tuple[float, float] = 0.0, on: bool = False) -> None:
    """A constructor for the test below."""


@pytest.mark.parametrize(
    ("arguments", "mistakes"),
    [
        (dict(size=1, rate=2.0, names=("a",), pair=(1, 2.5), on=True), []),
        (dict(size=1.5), ["config.x.size is 1.5; it must be a whole number"]),
        (dict(size=True), ["config.x.size is True; it must be a whole number"]),
        (dict(size=1, rate="1e-3"), ["config.x.rate is '1e-3'; it must be a number"]),
        (dict(size=1, names="rgb"), ["config.x.names is 'rgb'; it must be several values (a, b), each text"]),
        (dict(size=1, pair=(1, 2, 3)), ["config.x.pair is (1, 2, 3); it must be a number or (a number, a number)"]),
        (dict(size=1, on=1), ["config.x.on is 1; it must be True or False"]),
        (dict(sise=1, on=None), ["config.x has unknown key 'sise'; known: size, rate, names, pair, on",
                                 "config.x lacks the key 'size'", "config.x.on is None; it must be True or False"]),
        ("rgb", ["config.x is 'rgb'; it must be a block of keys and values"]),
    ],
)  # fmt: skip
def test_arguments_are_checked_against_the_types_that_a_constructor_declares(arguments, mistakes):
    if not mistakes:
        return check_arguments("config.x", block, arguments)
    with pytest.raises(ValueError) as error:
        check_arguments("config.x", block, arguments)
    for mistake in mistakes:
        assert mistake in str(error.value)
    assert str(error.value).count("config.x") == len(mistakes)


def leaves(tree: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found += [(*above, key), *(leaves(value, (*above, key)) if isinstance(value, dict) else [])]
    return found


WRONG = ["x", -1, 0, 1.5, float("nan"), 10**30, True, None, (), ("a", 2), {}, {"name": 3}, {1: 2}, [[]]]
MODEL = ("modalities", "image_size", "objective")


def broken(config: dict[str, Any], check: Callable[[dict[str, Any]], Any], chosen: Callable[[str], bool]) -> list[str]:
    """What `check` makes of a config with a wrong value in one place, where that is another error than ValueError."""
    failed = []
    for place in leaves(config):
        if not chosen(place[0]):
            continue
        for value in WRONG:
            changed = load_copy(config)
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            try:
                check(changed)
            except ValueError:
                pass
            except Exception as error:
                failed.append(f"config.{'.'.join(place)} = {value!r}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return failed


@pytest.mark.parametrize("path", ["demo", "pretrain/crossmae_s", "pretrain/attmask_s_100e"])
def test_no_value_of_a_config_ends_in_anything_but_a_value_error(path, monkeypatch):
    """Whatever stands in whatever place."""
    config = load_config(f"configs/{path}.py").to_dict()
    failed = broken(config, build_objective, lambda block: block in MODEL)
    monkeypatch.setattr(config_of_run, "build_objective", lambda config: None)
    failed += broken(config, config_of_run.check_config, lambda block: block not in MODEL)
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("optimizer.base_lr=nan", "'nan'; it must be a number"),
        ("optimizer.base_lr=1e400", "config.optimizer.base_lr is inf; it must be at least 0"),
        ("optimizer.b1=1.0", "config.optimizer.b1 is 1.0"),
        ("optimizer.weight_decay=(0.1,-1)", r"config.optimizer.weight_decay is \(0.1, -1\)"),
        ("schedule.warmup_epochs=-1", "config.schedule.warmup_epochs is -1"),
        ("checkpoint.keep=0", "config.checkpoint.keep is 0"),
        ("data.workers=-1", "config.data.workers is -1"),
        ("total=99999999999", "config.total: '99999999999' is longer than any run"),
    ],
)
def test_numbers_out_of_range_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        config_of_run.check_config(overridden(common.scenes(), f"--config.{words}"))


def load_copy(tree: Any) -> Any:
    return {key: load_copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
