"""What is public: it is documented, its examples run, and ecjax/API.md lists it."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import ecjax

ROOT = Path(__file__).parent.parent
MODULES = [importlib.import_module(f"ecjax.{module.name}") for module in pkgutil.iter_modules(ecjax.__path__)]
MODULES = [module for module in MODULES if not module.__name__.startswith("ecjax._")]


def public_names(module):
    """What a module offers: its ``__all__``, or what its own lines define without an underscore."""
    defined = re.findall(r"^(?:def |class )?([A-Za-z]\w*)(?:\(| = )", inspect.getsource(module), re.MULTILINE)
    return getattr(module, "__all__", defined)


PUBLIC = {module.__name__: {name: getattr(module, name) for name in public_names(module)} for module in MODULES}
# Type aliases and constants have no docstring of their own.
DOCUMENTED = {
    f"{module}.{name}": thing
    for module, names in PUBLIC.items()
    for name, thing in names.items()
    if callable(thing) and getattr(thing, "__module__", "").startswith("ecjax.")
}


def run_examples(name, text, names):
    """Runs the examples of a docstring with these names defined; returns all that are defined then."""
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert test.examples, f"{name} has no example"
    failures = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failures.append, clear_globs=False)
    assert not failures, "".join(failures)
    return test.globs


@pytest.fixture(scope="module")
def shared_names():
    """What the docstring of ecjax defines for all others."""
    return run_examples("ecjax", ecjax.__doc__, {})


@pytest.mark.parametrize("name", ["metrics", "staged"])
def test_examples_of_modules_run_as_they_stand(name, shared_names):
    run_examples(name, getattr(ecjax, name).__doc__, dict(shared_names))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_run_as_they_stand(name, shared_names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(name, DOCUMENTED[name].__doc__, shared_names)


# Explained once, in ecjax.networks.
SHARED = {"network", "params", "inputs", "batch_size", "exclude", "metric", "weights"}


@pytest.mark.parametrize("name", [name for name, thing in DOCUMENTED.items() if not inspect.isclass(thing)])
def test_docstrings_say_what_goes_in_and_what_is_refused(name):
    function = inspect.unwrap(DOCUMENTED[name])
    text, parameters = inspect.getdoc(function), list(inspect.signature(function).parameters)
    arguments = re.search(r"^Args:\n(.*?)(\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if arguments:
        explained = re.findall(r"^ {4}\**(\w+): ", arguments[1], re.MULTILINE)
        assert [name for name in parameters if name in explained] == explained
        assert set(parameters) - set(explained) <= SHARED
    else:
        assert (
            len(parameters) <= 2
            or set(parameters) <= SHARED
            or re.search("arguments (and errors )?are those of", text, re.IGNORECASE)
        )
    if re.search(r"raise \w+Error|\.require", inspect.getsource(function)):
        assert re.search("Raises|errors are those of", text)


def test_a_page_lists_every_name_with_its_file():
    page = ROOT / "ecjax" / "API.md"
    rows = re.findall(r"^\| \[`(ecjax\.\w+)`\]\((\S+\.py)\) \| .* \| (.*) \|$", page.read_text(), re.MULTILINE)
    listed = [
        (module, name, file)
        for module, file, items in rows
        for item in items.split("; ")
        for name in re.findall(r"`(\w+)`", re.match(r"(`\w+`(, )?)+", item)[0])
    ]
    assert sorted(found[:2] for found in listed) == sorted((m, name) for m, names in PUBLIC.items() for name in names)
    for _, name, file in listed:
        source = (page.parent / file).read_text()
        assert re.search(rf"^(def |class |){name}\b(\(|:| = )", source, re.MULTILINE), (name, file)
