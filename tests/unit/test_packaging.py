"""What a user installs and runs: light imports, pinned test machines, one command for CI, honest sizes."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engines.choice import SGLANG_FLOOR, version_numbers
from tests import check
from tests.sglang_cpu import enable

ROOT = check.ROOT
HEAVY = {"torch", "transformers", "sglang", "pydantic", "tyro"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def test_the_contract_is_light_to_import() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "protocol").rglob("*.py")
        if file.name not in ("__init__.py", "flags.py")
    ]
    program = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert HEAVY & set(done.stdout.split()) == set()


def test_the_commands_are_the_modules_mains(project: dict[str, Any]) -> None:
    assert project["scripts"] == {
        "headway-server": "rollout_server.__main__:main",
        "headway-learner": "learner.__main__:main",
    }


def test_each_side_installs_alone_and_make_installs_all(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    assert not [need for need in project["dependencies"] if need.startswith(("torch", "transformers"))]
    makefile = (ROOT / "Makefile").read_text()
    light = [name for name in extras if name not in ("server", "peers")]
    assert f"-e '.[{','.join(light)}]'" in makefile, "all but SGLang, which has an environment of its own"
    assert "-e '.[peers]'" in makefile.partition("\nbench:")[0], "and the peers, which only `make bench` wants"
    assert [name for name, needs in extras.items() if "sglang" in " ".join(needs)] == ["server"]
    assert set(extras["server-cpu"]) < set(extras["server"])


def test_the_floor_of_sglang_is_the_one_that_the_server_checks(project: dict[str, Any]) -> None:
    floor = ".".join(map(str, SGLANG_FLOOR))
    assert f"sglang>={floor}; sys_platform == 'linux'" in project["optional-dependencies"]["server"]


@pytest.mark.parametrize("name", ["constraints.txt", "tests/sglang_cpu/requirements.txt"])
def test_constraints_pin_versions_and_name_no_host(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(line.count("==") == 1 and "/" not in line for line in lines)
    assert len({line.split("==")[0] for line in lines}) == len(lines)


def test_what_the_server_needs_is_in_sglangs_environment(project: dict[str, Any]) -> None:
    """It is installed with --no-deps: nobody else would notice that something is missing or too old."""
    lines = (ROOT / "tests" / "sglang_cpu" / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for need in [*project["dependencies"], *project["optional-dependencies"]["server"]]:
        name, floor = need.split(";")[0].split(">=")
        assert version_numbers(pinned[name]) >= version_numbers(floor), need


def test_every_interpreter_of_sglangs_environment_finds_the_stand_ins(tmp_path: Path) -> None:
    file = enable.enable(tmp_path)
    folder, line = file.read_text().splitlines()
    assert file.suffix == ".pth"
    assert line == "import sglang_cpu_recipe"
    assert {path.stem for path in Path(folder).iterdir()} >= {"sgl_kernel", "triton", "xgrammar", "sglang_cpu_recipe"}


def test_ci_runs_make_test_and_nothing_else() -> None:
    file = ROOT / ".ci" / "run"
    lines = [line for line in file.read_text().splitlines() if line]
    assert lines[-1] == "exec make test"
    assert len(lines) == 4
    assert file.stat().st_mode & 0o111


@pytest.mark.parametrize("target", ["install", "demo", "test", "bench"])
def test_every_make_target_sets_itself_up(target: str) -> None:
    """In a clean clone no target may need another to be called first."""
    done = subprocess.run(
        ["make", "--dry-run", "VENV=build/no-such-venv", target], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "-m venv build/no-such-venv" in done.stdout
    assert "pip install" in done.stdout


def dry_run(*argv: str) -> str:
    command = ["make", "--dry-run", "VENV=build/no-venv", "SGLANG_VENV=build/no-sglang", "GPU_VENV=build/no-gpu", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize(
    ("argv", "environments"),
    [
        (["test"], {"build/no-venv", "build/no-sglang"}),
        (["sglang"], {"build/no-sglang"}),
        (["demo"], {"build/no-venv"}),
        (["demo", "ENGINE=sglang"], {"build/no-venv", "build/no-sglang"}),
        (["demo", "ENGINE=sglang", "SGLANG_PYTHON=python"], {"build/no-venv"}),
        (["test-gpu"], {"build/no-gpu"}),
        (["test-gpu", "GPU_PYTHON=build/no-sglang/bin/python"], {"build/no-sglang"}),
        (["test-gpu", "GPU_PYTHON=python"], set()),
    ],
)
def test_a_target_builds_the_environments_it_uses(argv: list[str], environments: set[str]) -> None:
    made = {line.split()[-1] for line in dry_run(*argv).splitlines() if " -m venv " in line}
    assert made == environments


def test_the_demonstration_names_the_servers_interpreter() -> None:
    assert "--engine sglang --server-python build/no-sglang/bin/python" in dry_run("demo", "ENGINE=sglang")
    assert "--engine sglang --server-python gpu/python" in dry_run("demo", "ENGINE=sglang", "SGLANG_PYTHON=gpu/python")
    assert "--engine auto" in dry_run("demo")
    assert "--server-python" not in dry_run("demo")


def test_clean_removes_every_environment() -> None:
    assert {".venv", ".venv-sglang", ".venv-gpu"} <= set(
        subprocess.run(
            ["make", "--dry-run", "clean"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
    )


def test_make_installs_once(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    command = ["make", "--dry-run", f"VENV={tmp_path}", "install"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "pip" not in done.stdout


def write_product(root: Path, body: str) -> None:
    (root / "protocol").mkdir()
    (root / "protocol" / "a.py").write_text(body)


def test_long_files_and_functions_are_reported(tmp_path: Path) -> None:
    lines = "\n".join(f"    x = {i}" for i in range(check.MAX_FUNCTION_LINES))
    write_product(tmp_path, f"async def long():\n{lines}\n" + "\n" * check.MAX_FILE_LINES)
    assert list(check.size_problems(tmp_path)) == [
        "protocol/a.py: 471 lines, at most 400",
        "protocol/a.py:1: long has 71 lines, at most 70",
    ]


def test_what_fits_is_not_reported(tmp_path: Path) -> None:
    lines = "\n".join(f"    x = {i}" for i in range(check.MAX_FUNCTION_LINES - 1))
    write_product(tmp_path, f"def fits():\n{lines}\n")
    assert list(check.size_problems(tmp_path)) == []


def test_fewer_tests_than_product_are_reported(tmp_path: Path) -> None:
    write_product(tmp_path, "a = 1\n" * 10)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("b = 1\n" * 9)
    assert list(check.volume_problems(tmp_path)) == [
        "tests have 9 lines for 10 lines of product: at least as many are wanted"
    ]
    (tmp_path / "tests" / "test_b.py").write_text("b = 1\n")
    assert list(check.volume_problems(tmp_path)) == []


def stages(monkeypatch: pytest.MonkeyPatch, codes: dict[str, int], problems: list[str]) -> tuple[int, list[str]]:
    ran: list[str] = []

    def run_stage(name: str, command: list[str], seconds: dict[str, float]) -> int:
        ran.append(name)
        seconds[name] = 0.0
        return codes.get(name, 0)

    monkeypatch.setattr(check, "run_stage", run_stage)
    monkeypatch.setattr(check, "size_problems", lambda root: iter(problems))
    monkeypatch.setattr(check, "volume_problems", lambda root: iter(()))
    return check.main([]), ran


def test_the_tests_run_only_when_every_static_stage_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stages(monkeypatch, {}, []) == (0, ["format", "lint", "types", "imports", "tests"])
    assert stages(monkeypatch, {"lint": 1}, []) == (1, ["format", "lint", "types", "imports"])
    assert "failed: lint; the tests did not run" in capsys.readouterr().out
    assert stages(monkeypatch, {}, ["a.py: 401 lines"]) == (1, ["format", "lint", "types", "imports"])
    assert "failed: sizes" in capsys.readouterr().out
    assert stages(monkeypatch, {"tests": 5}, [])[0] == 5


def test_a_stage_reports_its_tools_exit_code_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[str, float] = {}
    python = Path(sys.executable).name
    assert check.run_stage("try", [python, "-c", "import sys; sys.exit(4)"], seconds) == 4
    assert seconds["try"] > 0


def test_no_committed_text_names_a_machine() -> None:
    """Paths of somebody's checkout and addresses of package indexes do not belong in a repository."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    suspicious = ("/home" + "/", "/wor" + "k/", "index-" + "url", "/root" + "/")
    for name in listed.splitlines():
        file = ROOT / name
        if file.suffix in (".py", ".md", ".toml", ".txt", ".yaml", "") and file.is_file():
            text = file.read_text("utf-8")
            assert not [word for word in suspicious if word in text], name


def test_every_text_that_says_how_to_install_says_it_as_the_readme_does(project: dict[str, Any]) -> None:
    """headway is installed from its directory: `pip install 'headway[...]'` would look for it in an index."""
    files = [ROOT / "README.md", *(path for name in ("learner", "rollout_server", "protocol") for path in
             (ROOT / name).rglob("*") if path.suffix in (".py", ".md"))]  # fmt: skip
    told = [(path, extras) for path in files for extras in re.findall(r"'([\w.]*)\[([\w,-]+)\]'", path.read_text())]
    assert len(told) >= 8
    for path, (name, extras) in told:
        assert name == ".", f"{path}: {name}[{extras}]"
        assert set(extras.split(",")) <= project["optional-dependencies"].keys(), path
