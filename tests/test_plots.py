"""What is drawn is what was given; how it looks is for eyes."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt

from ecjax import plots, prune
from ecjax.prune import Afforded, Pruned, Tried
from ecjax.score import NeuronScores, Scores

MASKS = {"first": {"kernel": np.arange(12).reshape(4, 3) < 3, "bias": None}, "second": np.array([[True], [False]])}
SCORES = Scores({"a": jnp.asarray([[1e-6, 0.0, 1e3]]), "b": jnp.asarray([2.0, 3.0, jnp.inf]), "bias": None})
CURVE = tuple(Tried(*point) for point in ((0, 1.0, 0, True), (0.5, 0.9, 0, True), (1, 0.2, 0, False)))
AFFORDED = Afforded(None, None, CURVE[1], 0.8, CURVE)


@pytest.fixture(autouse=True)
def nothing_open():
    yield
    plt.close("all")


def draw(ax):
    """As a user sees it: drawing must not fail either."""
    ax.figure.canvas.draw()
    return ax


def names(ax):
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


CALLS = {
    "sparsity_by_layer": lambda **ax: plots.sparsity_by_layer(MASKS, **ax),
    "importances": lambda **ax: plots.importances(SCORES, **ax),
    "mask": lambda **ax: plots.mask(MASKS["second"], **ax),
    "curve": lambda **ax: plots.curve({"one": AFFORDED}, **ax),
}


@pytest.mark.parametrize("name", plots.__all__)
def test_each_draws_on_the_axes_it_is_given_or_on_the_current_ones(name):
    _, (ax, other) = plt.subplots(1, 2)
    assert CALLS[name](ax=ax) is ax
    assert draw(ax).has_data()
    assert not other.has_data()
    plt.sca(other)
    assert CALLS[name]() is other
    assert other.has_data()


def test_bars_of_sparsity():
    ax = draw(plots.sparsity_by_layer(MASKS))
    assert [bar.get_width() for bar in ax.patches] == [0.75, 0.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first/kernel", "second"]
    assert [text.get_text().strip() for text in ax.texts] == ["3 of 12 left", "1 of 2 left"]
    assert set(ax.get_lines()[0].get_xdata()) == {prune.sparsity(MASKS)}


def counts(ax):
    """How many are in the bars of each colour, by colour."""
    found = {}
    for bar in ax.patches:
        found[bar.get_facecolor()] = found.get(bar.get_facecolor(), 0) + bar.get_height()
    return list(found.values())


@pytest.mark.parametrize(("sparsity", "removed", "kept"), [(None, 0, 4), (0.5, 2, 2), (0, 0, 4), (1, 4, 0)])
def test_importances_that_go_and_that_stay(sparsity, removed, kept):
    ax = draw(plots.importances(SCORES, sparsity=sparsity))
    assert counts(ax) == [removed, kept]
    assert names(ax)[-2:] == ["not shown: 1 exactly 0", "not shown: 1 infinite"]
    if sparsity is not None:
        assert names(ax)[:2] == ["removed", "kept"]
    assert ("sparsity 0.5: up to 2" in names(ax)) == (removed == 2)


def test_what_goes_in_the_histogram_goes_in_one_shot():
    values = np.random.default_rng(0).exponential(size=(40, 25)) ** 4
    scores = Scores({"kernel": jnp.asarray(values, jnp.float32)})
    ax = plots.importances(scores, sparsity=0.83)
    kept = prune.one_shot(scores.importance, scores, 0.83).masks["kernel"]
    assert counts(ax) == [int((~kept).sum()), int(kept.sum())]
    (line,) = ax.get_lines()
    assert line.get_xdata()[0] == np.sort(values.astype(np.float32), axis=None)[829]


def test_equal_importances_and_those_of_neurons():
    ax = draw(plots.importances(Scores({"kernel": jnp.ones((2, 3))}), sparsity=0.5))
    assert counts(ax) == [3, 3]
    ax = plots.importances(NeuronScores({"kernel": jnp.asarray([1.0, 2])}), ax=ax)
    assert ax.get_ylabel() == "neurons"


def test_a_mask_as_an_image():
    (image,) = draw(plots.mask(MASKS["first"]["kernel"])).get_images()
    np.testing.assert_array_equal(image.get_array(), MASKS["first"]["kernel"])
    kernel = np.random.default_rng(0).random((3, 3, 2, 5)) < 0.3
    ax = draw(plots.mask(jnp.asarray(kernel)))
    np.testing.assert_array_equal(ax.get_images()[-1].get_array(), kernel.reshape(18, 5))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("output", "input (3 × 3 × 2)")


def test_reads_of_each_pixel():
    kernel = np.random.default_rng(0).random((12, 5)) < 0.3
    (image,) = draw(plots.mask(kernel, shape=(3, 4))).get_images()
    np.testing.assert_array_equal(image.get_array(), kernel.sum(1).reshape(3, 4))
    (image,) = plots.mask(kernel, shape=(2, 2, 3), ax=plt.figure().gca()).get_images()
    np.testing.assert_array_equal(image.get_array(), kernel.sum(1).reshape(2, 2, 3).sum(2))


def test_curves():
    pruned = [Pruned(None, {"kernel": jnp.arange(10) >= count}) for count in (9, 0)]
    ax = draw(plots.curve({"survivors": AFFORDED, "biases": [(pruned[0], jnp.asarray(0.5)), (pruned[1], 1)]}))
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(lines["survivors"].get_xydata(), [(0, 1), (0.5, 0.9), (1, 0.2)])
    np.testing.assert_array_equal(lines["biases"].get_xydata(), [(0, 1), (0.9, 0.5)])
    assert names(ax) == ["survivors", "survivors: sparsity 0.5", "biases"]
    assert len({line.get_color() for line in (lines["survivors"], lines["biases"])}) == 2


def test_a_single_dense_point():
    draw(plots.curve({"dense": [(Pruned(None, {"kernel": jnp.ones(3, bool)}), 0.9)]}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.sparsity_by_layer({"bias": None}), "there is no mask to draw"),
        (lambda: plots.sparsity_by_layer({"kernel": jnp.ones(3)}), "masks are boolean"),
        (lambda: plots.importances(Scores({"a": jnp.asarray([-1.0, 2])})), "importances from -1 to 2 have no place"),
        (lambda: plots.importances(Scores({"a": jnp.zeros(2)})), "importances from 0 to 0 have no place"),
        (lambda: plots.importances(Scores({"a": jnp.asarray([jnp.nan])})), "hold NaN"),
        (lambda: plots.importances(SCORES, sparsity=80), "sparsity is 80"),
        (lambda: plots.mask(np.ones((2, 2), bool), shape=(28, 28)), r"shape is \(28, 28\); the 2 inputs"),
        (lambda: plots.mask(np.ones((4, 2), bool), shape=(4,)), r"shape is \(4,\); the 4 inputs"),
        (lambda: plots.curve({}), "results must be a dict with at least one line"),
        (lambda: plots.curve({"one": []}), "'one' must be what prune.afford gives, or pairs"),
        (lambda: plots.curve({"one": [(0.5, 0.9)]}), "'one' holds a pair that starts with a float"),
    ],
)
@pytest.mark.usefixtures("without_checked_types")
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert not plt.get_fignums()


@pytest.mark.parametrize("given", [MASKS, jnp.ones((2, 3)), np.asarray(True), np.zeros((0, 3), bool), None])
@pytest.mark.usefixtures("without_checked_types")
def test_what_is_no_mask_of_one_kernel(given):
    with pytest.raises(ValueError, match="this draws the mask of one kernel"):
        plots.mask(given)


def test_without_matplotlib_the_error_names_the_extra():
    code = "import sys; sys.modules['matplotlib'] = None; import ecjax; from ecjax import plots"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: matplotlib is not installed: pip install 'ecjax[plots]'" in done.stderr
