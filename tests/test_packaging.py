"""The folder mapping: what is packaged, what an installed wheel can do, and that the root disturbs nobody."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_folder_with_modules_is_named():
    found = set()
    for package, folder in SETTINGS["package-dir"].items():
        for file in (ROOT / folder).rglob("*.py"):
            if "__pycache__" not in file.parts:
                found.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    assert found | {"pairtile.csrc"} == set(SETTINGS["packages"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # a copy of what git would hand out, so that no build folder of this tree gets in
    source = folder / "source"
    source.mkdir()
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_sources_recipes_and_type_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "pairtile/kernels/py.typed",
        "pairtile/engine/recipes/glyphs_clip.yaml",
        "pairtile/csrc/cpu/features.cpp",
        "pairtile/csrc/cuda/token_selection.cu",
        "pairtile/csrc/cuda/token_selection.h",
    ):
        assert name in names
    modules = {name for name in names if name.endswith(".py")}
    assert all(name.startswith("pairtile/") for name in modules), "nothing lands beside the package"
    for folder, package in (("kernels", "pairtile/kernels"), ("engine", "pairtile/engine")):
        for file in (ROOT / folder).rglob("*.py"):
            if "__pycache__" not in file.parts:
                assert f"{package}/{file.relative_to(ROOT / folder)}" in names


@pytest.mark.slow
def test_installed_in_a_new_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # the dependencies of this environment, without the editable installation of pairtile itself
    ours = Path(sysconfig.get_path("purelib"))
    (site / "dependencies.pth").write_text(f"{ours}\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--force-reinstall",
        "--ignore-installed", wheel)  # fmt: skip
    where = run(
        python,
        "-c",
        "import pairtile.kernels as k; from pairtile.kernels import ClipLoss; print(k.__file__)",
        cwd=tmp_path,
    )
    assert where.startswith(str(site))
    script = tmp_path / "env" / "bin" / "pairtile"
    text = run(script, "--help", cwd=tmp_path)
    for command in ("prepare", "train", "evaluate", "export", "info"):
        assert re.search(rf"\b{command}\b", text)
    # transformers looks for a package called kernels; in the repository's root that name is a folder
    check = "import transformers; assert not transformers.utils.is_kernels_available(); from transformers import CLIPTextModel; print('fine')"
    for folder in (tmp_path, ROOT):
        assert run(python, "-c", check, cwd=folder).strip() == "fine"
    # the kernels alone, and a command line that says how to get the rest
    blocked = "import sys; sys.modules.update(typer=None, pydantic=None, deepspeed=None, timm=None, transformers=None, triton=None)"
    assert "ClipLoss" in run(
        python, "-c", f"{blocked}; from pairtile.kernels import ClipLoss; print(ClipLoss())", cwd=tmp_path
    )


def test_command_line_without_the_train_extra():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("typer", "pydantic") else find(name, *rest)
sys.argv = ["pairtile", *sys.argv[1:]]
import runpy
runpy.run_module("pairtile.engine", run_name="__main__")
"""
    for arguments, status in ((["--help"], 0), ([], 0), (["train", "x"], 2)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == status
        assert "pip install 'pairtile[train]'" in done.stdout + done.stderr
    done = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "backends" in done.stdout
