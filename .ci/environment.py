"""Makes a virtual environment with a wheel and the packages that it asks for, as links to those of this environment.

    python environment.py FOLDER WHEEL [EXTRA ...]

Nothing is downloaded: pip checks that the packages are all that the wheel needs. A package that the wheel does not ask
for cannot be imported in the new environment, although it is installed here.
"""

import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(wheel: Distribution, extras: Iterable[str]) -> dict[str, Distribution]:
    """The distributions that a wheel and its extras bring, by name."""
    found: dict[str, Distribution] = {canonicalize_name(wheel.name): wheel}
    waiting, seen = [(wheel.name, extra) for extra in ("", *extras)], set()
    while waiting:
        name, extra = waiting.pop()
        name = canonicalize_name(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name not in found:
            found[name] = distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return found


def parts(installed: Distribution) -> Iterator[Path]:
    """Whole packages, and single files outside of packages, relative to the folder of all packages."""
    base, seen = Path(str(installed.locate_file(""))), set()
    for file in installed.files or ():
        if ".." in file.parts:  # scripts
            continue
        folders = (Path(*file.parts[:depth]) for depth in range(1, len(file.parts)))
        part = next((folder for folder in folders if (base / folder / "__init__.py").exists()), Path(file))
        if part not in seen and (base / part).exists():
            seen.add(part)
            yield part


def main(folder: str, wheel: str, *extras: str) -> None:
    """Make the environment, and let pip install the wheel into it from no index."""
    venv.create(folder, symlinks=True)
    python = Path(folder, "bin", "python")
    site = next(Path(folder, "lib").glob("python*/site-packages"))
    metadata = next(path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    _, *others = required(PathDistribution(metadata), extras).values()
    for installed in others:
        for part in parts(installed):
            (site / part).parent.mkdir(parents=True, exist_ok=True)
            (site / part).symlink_to(str(installed.locate_file(part)))
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", python]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-index", wheel + (f"[{','.join(extras)}]" if extras else "")], check=True
    )
    subprocess.run([*pip, "check"], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
