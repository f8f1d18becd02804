"""The notebooks run as they stand, and are committed as they ran."""

import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_there_are_four_and_the_readme_links_to_each():
    readme = (ROOT / "README.md").read_text()
    assert len(NOTEBOOKS) == 4
    assert [path for path in NOTEBOOKS if f"(notebooks/{path.name})" not in readme] == []


@pytest.mark.slow
@each_notebook
def test_it_runs_from_the_first_cell_to_the_last(path, monkeypatch):
    # The kernel starts in notebooks/, as Jupyter's does, and finds the checkout as after an editable install.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    committed, notebook = read(path), read(path)
    for cell in code(notebook):
        cell.outputs = []
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    assert pictures(notebook) == pictures(committed)


@each_notebook
def test_it_is_committed_as_it_ran(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs(notebook) if output.output_type == "stream"} <= {"stdout"}
    assert pictures(notebook) >= 2
    assert path.stat().st_size < 400_000


@each_notebook
def test_it_says_nothing_of_the_machine_it_ran_on(path):
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.search(r"[\"' (](/[a-z]+){2,}|\b[A-Z]:\\\\|Warning", text)
