"""Which rooms may import which others, what may not be imported early, and that our packages are those of the checkout."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_pipeline

LATE = {
    "tensorflow",
    "pyarrow",
    "pydicom",
    "fsspec",
    "keras",
    "keras_hub",
    "jax",
    "torch",
    "sklearn",
    "skops",
    "onnx",
    "matplotlib",
    "mlflow",
    "openvino",
    "nncf",
    "onnxruntime",
    "tf2onnx",
    "ai_edge_litert",
    "dask",
    "distributed",
    "scipy",
    "starlette",
    "tensorboard",
    "uvicorn",
}
# Room -> the rooms that it may import; the ground lies under all of them. Nothing runs back.
FEATURE_ROOMS: dict[str, set[str]] = {
    "ground": set(),
    "pixels": {"ground"},
    "sources": {"ground", "pixels"},
    "networks": {"ground"},
    "store": {"ground", "sources"},
    "extraction": {"ground", "pixels", "sources", "networks", "store"},
    "transformer": {"ground", "pixels", "sources", "networks", "store", "extraction"},
}
# The ground of the pipeline: config intervals presets outputs progress streams tables. Stages lie over the other rooms.
BELOW_HEADS = {"ground", "scores", "tasks", "runs", "labels"}
BELOW_STAGES = BELOW_HEADS | {
    "heads",
    "search",
    "sweeps",
    "tuning",
    "exporting",
    "predicting",
    "reporting",
    "cluster",
    "auditing",
}
PIPELINE_ROOMS: dict[str, set[str]] = {
    "ground": set(),
    "scores": {"ground"},
    "tasks": {"ground", "scores"},
    "runs": {"ground", "scores", "tasks"},
    "heads": BELOW_HEADS,
    "search": BELOW_HEADS | {"heads"},
    "sweeps": BELOW_HEADS | {"heads", "search"},
    "tuning": BELOW_HEADS | {"heads"},
    "exporting": BELOW_HEADS | {"heads", "tuning"},
    "predicting": BELOW_HEADS | {"heads", "tuning", "exporting"},
    "reporting": BELOW_HEADS | {"heads", "tuning", "sweeps"},
    "cluster": BELOW_HEADS | {"heads", "sweeps"},
    "auditing": BELOW_HEADS | {"heads", "search", "sweeps", "reporting"},
    "stages": BELOW_STAGES,
    "api": BELOW_STAGES | {"stages"},
    "labels": {"ground"},
    "experiments": BELOW_STAGES | {"stages"},
    "review": BELOW_HEADS | {"heads", "search", "reporting", "auditing"},
    "commands": BELOW_STAGES | {"stages", "api", "experiments", "review"},
}
# Imported by no other module: whoever uses it has scikit-learn already.
LATE_MODULES = {"transformer": {"sklearn"}, "classifier": {"sklearn"}}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def calls_and_imports(path: Path) -> list[ast.AST]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call | ast.Import | ast.ImportFrom)]


@functools.cache
def imports(path: Path, *, top_only: bool) -> set[str]:
    nodes: list[ast.AST] = list(parsed(path).body) if top_only else calls_and_imports(path)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = node.module or ""
            found.add(module)
            if module in ("features", "pipeline"):
                found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_nothing_heavy_is_imported_at_the_top() -> None:
    found = {}
    for path in modules("features") + modules("pipeline"):
        early = {name.split(".")[0] for name in imports(path, top_only=True)} & LATE
        found[str(path)] = early - LATE_MODULES.get(path.stem, set())
    assert len(found) > 150
    assert {path: early for path, early in found.items() if early} == {}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The folder of a module inside its package; the ground, or a stage, for a module that lies in none."""
    package, *parts = module.split(".")
    if package == "pipeline" and parts:
        if parts[0] in ("cli", "__main__"):
            return "commands"
        return parts[0] if parts[0] in PIPELINE_ROOMS else "ground"
    return parts[0] if parts and parts[0] in FEATURE_ROOMS else "ground"


def arrows(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports, late imports and those for types too."""
    names = {name_of(path) for path in modules(package)}
    return {name_of(path): imports(path, top_only=False) & names for path in modules(package)}


@pytest.mark.parametrize("package", ["features", "pipeline"])
def test_rooms_import_only_what_lies_below(package: str) -> None:
    below = FEATURE_ROOMS if package == "features" else PIPELINE_ROOMS
    for module, imported in arrows(package).items():
        room = room_of(module)
        if module != package:  # the door names the public classes for type checkers
            assert {room_of(other) for other in imported} <= below[room] | {room}, module
        if room == "store":
            assert {name for name in imported if ".sources" in name} <= {"features.sources.splits"}


def test_features_does_not_know_the_pipeline() -> None:
    used = {name for path in modules("features") for name in imports(path, top_only=False)}
    # The door names compare_networks, whose verdict needs heads; for type checkers, as nothing is loaded there.
    assert {name for name in used if name.split(".")[0] == "pipeline"} == {"pipeline.api.looking"}


@pytest.mark.parametrize("package", ["features", "pipeline"])
def test_no_module_imports_itself_in_a_circle(package: str) -> None:
    tops = {name_of(path): imports(path, top_only=True) for path in modules(package)}
    graph = {name: tops[name] & tops.keys() for name in tops}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_only_the_store_and_the_weights_open_hdf5() -> None:
    users = {path for path in modules("features") + modules("pipeline") if "h5py" in imports(path, top_only=False)}
    early = ROOT / "pipeline" / "cluster" / "run.py"  # so that Ctrl-C does not end the import, which none could repeat
    assert early in users
    assert {path.stem for path in users - {early}} == {"untrusted", "writer", "tensors", "wheels"}  # the store; weights


def test_stages_do_not_import_each_other() -> None:
    for module, imported in arrows("pipeline").items():
        if room_of(module) == "stages":
            assert not {name for name in imported if room_of(name) == "stages"} - {"pipeline.stages"}, module


def test_no_pickle_and_no_print_in_the_packages() -> None:
    for path in modules("features") + modules("pipeline"):
        used = {name.split(".")[0] for name in imports(path, top_only=False)}
        banned = {"pickle", "joblib", "cloudpickle", "dill", "marshal", "shelve"}
        # joblib.load unpickles; the workers use joblib.Parallel and nothing that reads a file
        allowed = {"joblib"} if path.stem == "workers" else set()
        assert not used & (banned - allowed), path
        calls = [
            node.func.id
            for node in calls_and_imports(path)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "print" not in calls, path


def test_of_joblib_only_its_processes_are_used() -> None:
    tree = ast.parse((ROOT / "pipeline" / "sweeps" / "workers.py").read_text())
    names = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "joblib"
    ]
    assert set(names) == {"Parallel", "delayed", "parallel_config"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "joblib"]


def test_the_imported_packages_are_the_checkouts_own() -> None:
    import features
    import pipeline

    assert Path(features.__file__).parent == ROOT / "features"
    assert Path(pipeline.__file__).parent == ROOT / "pipeline"
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pipeline.cli import main\ncode = main(['--help'])\n"
        "heavy = {'numpy', 'keras', 'tensorflow', 'sklearn', 'h5py', 'PIL', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(code or (1 if heavy else 0))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_help_names_the_commands() -> None:
    result = run_pipeline("--help")
    assert result.returncode == 0
    commands = "extract compare inspect verify train-head leaderboard finetune predict evaluate report preview"
    for command in commands.split():
        assert command in result.stdout


def test_one_module_makes_temporary_names() -> None:
    """A name that says whose it is can be swept; what has no name (``TemporaryFile``) needs none."""
    for path in modules("features") + modules("pipeline"):
        if path.stem != "temporary":
            text = path.read_text()
            assert not re.search(r"mkdtemp|mkstemp|NamedTemporaryFile|TemporaryDirectory|gettempdir|\}\.tmp", text), (
                path
            )
