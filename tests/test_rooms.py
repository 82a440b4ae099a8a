"""The house: imports go down only, no stray files, every option is read."""

import ast
import inspect
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "sae"
FLOORS = {
    "errors": 0, "files": 0, "signals": 0, "ops": 0, "checkpoints": 1, "dictionaries": 1, "activations": 1,
    "baselines": 2, "training": 2, "inspection": 2, "interop": 2, "studies": 3.5, "launch": 2, "callbacks": 3,
    "trust": 3, "run_lock": 3, "status": 4,
    "exits": 4, "cli": 4, "runs": 4, "planning": 4, "benchmarks": 4, "reporting": 5, "summary": 5,
}  # fmt: skip
SIDEWAYS = {("ops", "errors")}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] if node.module != "sae" else [f"sae.{a.name}" for a in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("sae.") and name.count("."))


def test_rooms_import_only_from_lower_floors():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for imported in _imports(path):
            same = imported == room or (room, imported) in SIDEWAYS
            if not same and FLOORS[imported] >= FLOORS[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports sae.{imported}")
    assert wrong == []


def test_every_file_says_its_idea_in_its_first_line():
    for path in PACKAGE.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring and len(docstring.splitlines()[0]) > 10, path


def test_files_and_functions_stay_small():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_every_option_is_read():
    """Each constructor argument that a configuration can set is used in its class's file."""
    from sae.activations import ActivationDataModule, Source
    from sae.callbacks import NMFBaseline, PCABaseline
    from sae.dictionaries import TopK
    from sae.training import SparseAutoencoderModule

    for cls in (ActivationDataModule, NMFBaseline, PCABaseline, TopK, SparseAutoencoderModule):
        function = inspect.unwrap(cls.__init__)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert set(inspect.signature(function).parameters) - {"self"} <= read, cls
    files = [*(PACKAGE / "activations").glob("harvest*.py"), PACKAGE / "activations" / "source.py"]
    harvest = "".join(path.read_text() for path in files)
    for name in Source.__dataclass_fields__:
        assert f"source.{name}" in harvest or f"self.{name}" in harvest, name
