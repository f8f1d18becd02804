"""What the README says is run, word for word."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_examples_run_as_they_stand(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    for expected in re.findall(r"# prints (.*)", code):
        assert re.search(expected, capsys.readouterr().out)


def test_there_is_an_example():
    assert len(blocks("python")) >= 1


def test_ci_calls_the_test_line_of_the_readme():
    (line,) = [line for block in blocks("sh") for line in block.splitlines() if line.endswith("-m pytest")]
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_and_figures_exist():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
