"""Puts the compiled C code into wheels. Everything else about the package stands in pyproject.toml.

A wheel that is built where there is a compiler carries the library and fits one kind of machine, whatever its Python
(py3-none-linux_x86_64). Without a compiler it fits all (py3-none-any), and the code is compiled at first use by a
compiler that is there then. So is it in a checkout and an editable install, whose sources change.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # front ends build without it
from ssdtune.kernels.compiling import CompileError, compile_into


class BuildWithLibrary(build_py):
    """Compiles, beside the modules that it copies."""

    def libraries(self) -> list[Path]:
        """Compiled ones among what was built: one, or none where there was no compiler."""
        return sorted(Path(self.build_lib, "ssdtune", "kernels").glob("kernels-*.so"))

    def run(self) -> None:
        """As build_py. Without a compiler what is built is sound all the same, and the build says it."""
        super().run()
        if self.editable_mode:
            return
        for stale in self.libraries():  # of a build of other sources
            stale.unlink()
        try:
            compile_into(Path(self.build_lib, "ssdtune", "kernels"))
        except CompileError as error:
            self.warn(f"no compiled C code in this build, for {error}. {error.way_out}")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """As build_py, and the library."""
        compiled = [] if self.editable_mode else map(str, self.libraries())
        return [*super().get_outputs(include_bytecode), *compiled]


class WheelOfOneMachine(bdist_wheel):
    """For any Python; for one kind of machine where the library is in it."""

    def run(self) -> None:
        """As bdist_wheel, whose choice of a tag must know what was built."""
        if not self.skip_build:
            self.run_command("build")
        if self.get_finalized_command("build_py").libraries():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # installed where those go
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """(Python, ABI, platform)."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelOfOneMachine})
