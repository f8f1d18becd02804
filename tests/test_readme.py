"""What the README and the pages it leads to say is run, word for word."""

import re
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ecjax import networks

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "ecjax/README.md", "ecjax/RECIPES.md", "ecjax/API.md", "experiments/README.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
each_page = pytest.mark.parametrize("page", PAGES)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def prose(page):
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What a link to a heading ends in, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def examples():
    """The blocks of Python on each page; the first page trains a transformer, in a minute."""
    slow = {"README.md": pytest.mark.slow}
    alone = [page for page in PAGES if page != "ecjax/RECIPES.md"]  # those are in tests/test_recipes.py
    return [pytest.param(page, code, marks=slow.get(page, ())) for page in alone for code in blocks(page, "python")]


@pytest.mark.parametrize(("page", "code"), examples())
def test_examples_run_as_they_stand(page, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    for expected in re.findall(r"# prints (.*)", code):
        assert re.search(expected, capsys.readouterr().out)


def test_there_are_examples_on_the_first_page_and_on_that_of_the_mathematics():
    assert blocks("README.md", "python")
    assert blocks("ecjax/README.md", "python")


def test_ci_calls_the_test_line_of_the_readme():
    (line,) = [line for block in blocks("README.md", "sh") for line in block.splitlines() if line.endswith("-m pytest")]
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()


@each_page
def test_links_and_figures_exist(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", prose(page)):
        file = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), f"{target}#{anchor}"


def test_the_first_page_leads_to_all_others():
    for page in set(PAGES) - {"README.md"}:
        assert f"]({page})" in PAGES["README.md"]


def test_the_first_page_is_short():
    assert len(PAGES["README.md"].encode()) <= 10_000


@each_page
def test_lines_fit(page):
    """All but those of tables and pictures, which can't be broken."""
    assert [line for line in PAGES[page].splitlines() if len(line) > 120 and line[0] not in "|!"] == []


KINDS = {
    "Flax Linen": nn.Dense(2),
    "Flax NNX": nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
    "Equinox": eqx.nn.Linear(3, 2, key=jax.random.key(0)),
    "plain JAX": (jnp.ones((3, 2)), jnp.zeros(2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_network_is_given_as_the_table_says(kind):
    (line,) = re.findall(rf"^\| {kind} \| `([^`]+)`", PAGES["README.md"], re.MULTILINE)
    given = {"module": KINDS[kind], "params": KINDS[kind], "inputs": jnp.ones((5, 3)), "key": jax.random.key(1)}
    defined = {"jax": jax, "networks": networks, **given}
    exec(line, defined)
    (layer,) = networks.layers(defined["network"], defined["params"], given["inputs"])
    assert layer.weights == 6
    assert layer.bias is not None


def test_the_numbers_of_the_first_page_are_those_of_the_results():
    (table,) = re.findall(r"^## What it beats.*?^(\|.*?)\n\n", PAGES["README.md"], re.MULTILINE | re.DOTALL)
    rows = [row.strip("|").split("|")[1:] for row in table.splitlines()[2:]]
    quoted = {cell.strip(" *") for row in rows for cell in row} - {""}
    assert len(quoted) > 20
    assert [number for number in quoted if number not in PAGES["experiments/README.md"]] == []


def test_the_tests_of_the_formulas_exist():
    named = re.findall(r"\[`(test_\w+)`\]\((.*?)\)", PAGES["ecjax/README.md"])
    assert len(named) > 20
    for name, file in named:
        assert f"def {name}(" in (ROOT / "ecjax" / file).read_text(), name
