"""What the README and the pages it leads to say is run, word for word."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "ecjax/README.md", "experiments/README.md")}
PAGES |= {"ecjax/API.md": (ROOT / "ecjax" / "API.md").read_text()}
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


@pytest.mark.parametrize(("page", "code"), [(page, code) for page in PAGES for code in blocks(page, "python")])
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
