"""What pyproject.toml cannot say: a wheel holds configs/ and assets/ inside the package, as maskvit/_configs and maskvit/_assets."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    """An editable installation has them beside the package already."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ("configs", "assets"):
                place = pathlib.Path(self.build_lib) / "maskvit" / f"_{name}"
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(name, place, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": WithConfigs})
