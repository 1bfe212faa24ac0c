"""A wheel brings configs/ and the demo's checkpoint inside the package, and config files find each other wherever they lie."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.runs import ROOT

BUILD = "from setuptools import build_meta; build_meta.build_wheel({!r})"


def python(code, cwd, *paths):
    """What a child process prints; it finds packages below `paths` before those of this checkout."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, paths)))
    child = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel of this tree, and a folder that it lies unpacked in."""
    pytest.importorskip("setuptools", minversion="77", reason="pip install 'setuptools>=77'")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("maskvit", "configs", "assets"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    python(BUILD.format(str(folder)), folder / "tree")
    (file,) = folder.glob("maskvit-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
        return set(archive.namelist()), folder / "site"


def test_what_a_wheel_holds(wheel):
    """Every module, config and asset of the tree, and nothing beside the package."""
    names, _ = wheel
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"maskvit"}
    for folder, place in (("maskvit", "maskvit"), ("configs", "maskvit/_configs"), ("assets", "maskvit/_assets")):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".pyo")]
        missing = {f"{place}/{path.relative_to(ROOT / folder).as_posix()}" for path in files} - names
        assert files and not missing


READ = """
import maskvit
from maskvit.core.config_files import load_config, run_file
from maskvit.core.shipped import find
print(maskvit.__file__)
print(load_config("configs/pretrain/mae_b_1600e.py").objective.name)
print(sorted(run_file("configs/sweeps/guided_fashion_mnist.py").get_sweep())[0])
print(find("assets/multimae_scenes.pth"))
import configs.common
print(configs.common.__file__)
"""


def test_an_installed_package_reads_its_own_configs(wheel, tmp_path):
    """In an empty folder, also those that import others."""
    _, site = wheel
    package, name, _, asset, common = python(READ, tmp_path, site)
    assert package == str(site / "maskvit" / "__init__.py") and name == "mae"
    assert asset == str(site / "maskvit" / "_assets" / "multimae_scenes.pth")
    assert common == str(site / "maskvit" / "_configs" / "common.py")


MINE = """
from ml_collections import ConfigDict
from configs import common
def get_config():
    return ConfigDict(dict(where=common.__file__))
"""
WHERE = "from maskvit.core.config_files import load_config; print(load_config({!r}).where)"


def test_what_lies_in_the_working_directory_comes_first(wheel, tmp_path):
    """A file of one's own below configs/ reads the shipped modules, and one's own where there is one of that name."""
    _, site = wheel
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(MINE)
    assert python(WHERE.format("configs/mine.py"), tmp_path, tmp_path, site) == [str(site / "maskvit" / "_configs" / "common.py")]
    (tmp_path / "configs" / "common.py").write_text("")
    assert python(WHERE.format("configs/mine.py"), tmp_path, tmp_path, site) == [str(tmp_path / "configs" / "common.py")]
    shutil.copytree(ROOT / "configs", tmp_path / "checkout" / "configs")
    here = python(READ, tmp_path / "checkout", tmp_path / "checkout", site)[-1]
    assert here == str(tmp_path / "checkout" / "configs" / "common.py")


def test_a_config_that_nobody_has(tmp_path, monkeypatch):
    from maskvit.core.config_files import load_config

    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="configs/nowhere.py does not exist; those that come with maskvit lie in .*configs"):
        load_config("configs/nowhere.py")
    assert load_config("configs/pretrain/mae_b_1600e.py").objective.name == "mae"


def test_a_demo_without_its_checkpoint(tmp_path, monkeypatch, capsys):
    """Before anything is written."""
    from maskvit.commands.demo import __main__ as demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "CHECKPOINT", pathlib.Path("assets/nowhere.pth"))
    assert demo.main(["--workdir", "run"]) == 2
    assert "assets/nowhere.pth is missing, here and in the package" in capsys.readouterr().err and not (tmp_path / "run").exists()
