"""Puts the benchmarks into a wheel as std_fast/_benchmarks/benchmarks, where `std-fast bench` finds them.

A wheel must not give a user's environment a package called `benchmarks`. In a checkout they stand at the top level.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithBenchmarks(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source in sorted(Path("benchmarks").glob("*.py")):
                target = Path(self.build_lib, "std_fast", "_benchmarks", "benchmarks", source.name)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": WithBenchmarks})
