"""How much can be removed without training again: ``python -m experiments.frontier``.

Two classifiers of handwritten digits and a surrogate of a partial differential equation are pruned in one shot, by the
combinatorial brain surgeon, and in stages of elimination-compensation with each repair, from 0.8 to 0.995. Only
"labels" sees labels, and nothing is fine-tuned.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ecjax import networks, prune, score, surgeon
from ecjax.networks import Params
from experiments import report, runs, saved, sweep
from experiments.datasets import Dataset, choose, diffusion_sorption

SECONDS = report.Measure("seconds", ".1f")
ACCURACY = report.CLASSIFIER_MEASURES["test_accuracy"]._replace(lowest=80.0)
ERROR = report.Measure("relative error", ".1e", logarithmic=True)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Config:
    """Prune three networks to high sparsity without fine-tuning, by methods from magnitude to staged survivors.

    Writes results.csv, config.json and frontier.png, and prints a table for each network with the time of each method.

    """

    networks: tuple[Literal["large", "modest", "surrogate"], ...] = ("large", "modest", "surrogate")
    """784-300-100-10 by Adam, 784-40-20-10 by plain SGD (both ReLU), and 2-64-64-64-1 (tanh) on diffusion-sorption."""
    data: Literal["mnist", "digits"] = "mnist"
    """What the classifiers see: MNIST, or the 8x8 digits bundled with scikit-learn."""
    data_dir: Path | None = None
    """Folder with the four idx files of MNIST, gzipped or not. Default: $ECJAX_DATA_DIR, else they are downloaded."""
    seeds: int = 3
    """How many networks to train, prune and average over."""
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98, 0.995)
    """Fractions of the weights to remove from the classifiers."""
    surrogate_sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
    """Fractions of the weights to remove from the surrogate."""
    calibration: int = 10_000
    """Calibration inputs; the modest network takes six times as many."""
    stages: int = 10
    """Stages of the staged methods; the modest network and the surrogate take twice as many."""
    surrogate_epochs: int = 300
    """Epochs of training of the surrogate."""
    quick: bool = False
    """One seed, three sparsities and 2,000 calibration inputs."""
    output: Path | None = None
    """Folder for the results. Default: results/frontier and the name of the data."""
    save: Path | None = None
    """Folder for each pruned network, as one small file, and report.csv with its size and speed. Takes minutes more."""


class Problem(NamedTuple):
    """A network to train and prune, and how.

    Attributes:
        name: of the network in tables.
        task: its data, and how it is judged.
        train: gives the trained params of every seed, stacked.
        metric: output metric of the criteria.
        sparsities: to prune it to.
        calibration: how many training samples the methods see.
        gradients: how many per-sample gradients the combinatorial brain surgeon sees.
        options: of the staged methods.
        activation: its name.
        few: how many of the calibration inputs are enough for what moves no weights.
    """

    name: str
    task: sweep.Task
    train: Callable[[], Params]
    metric: str
    sparsities: tuple[float, ...]
    calibration: int
    gradients: int
    options: dict[str, int]
    activation: str = "relu"
    few: int | None = None


class Given(NamedTuple):
    """What a method sees: the problem, one seed's params, calibration inputs and their labels."""

    problem: Problem
    params: Params
    inputs: jax.Array
    targets: jax.Array


def _one_shot(given: Given, sparsity: float, criterion: prune.Criterion) -> prune.Pruned:
    scores = criterion(given.problem.task.network, given.params, given.inputs)
    return prune.one_shot(given.params, scores, sparsity)


def _magnitude(given: Given, sparsity: float) -> prune.Pruned:
    return _one_shot(given, sparsity, lambda network, params, inputs: score.magnitude(params))


def _brain_damage(given: Given, sparsity: float) -> prune.Pruned:
    criterion = functools.partial(score.optimal_brain_damage, metric=given.problem.metric)
    return _one_shot(given, sparsity, criterion)


def _elimination(given: Given, sparsity: float) -> prune.Pruned:
    criterion = functools.partial(score.elimination_compensation, metric=given.problem.metric)
    return _one_shot(given, sparsity, criterion)


def _combinatorial(given: Given, sparsity: float) -> prune.Pruned:
    """CBS-S from magnitude, then CBS-U; for a regression that fits, with gradients of the output, not of the loss."""
    few = slice(given.problem.gradients)
    loss = cross_entropy if given.problem.metric == "fisher" else _first_output
    network = given.problem.task.network
    gradients = surgeon.loss_gradients(network, given.params, given.inputs[few], given.targets[few], loss)
    options = {"damping": 1e-2}
    chosen = {"start": "magnitude", "key": jax.random.key(0)}
    masks = surgeon.combinatorial_selection(given.params, gradients, sparsity, **chosen, **options)
    return prune.Pruned(surgeon.combinatorial_update(given.params, masks, gradients, **options), masks)


def _first_output(outputs, _targets):
    return outputs[..., 0]


def _staged(given: Given, sparsity: float, repair: str | None) -> prune.Pruned:
    options = given.problem.options if repair else {"stages": given.problem.options["stages"]}
    if repair == "biases":
        options = options | {"temperature": 1}  # few parameters: the first choice is what they can save
    network, metric = given.problem.task.network, given.problem.metric
    inputs = given.inputs if repair == "survivors" else given.inputs[: given.problem.few]
    return prune.staged(network, given.params, inputs, sparsity, repair=repair, metric=metric, **options)


def _with_labels(given: Given, sparsity: float) -> prune.Pruned:
    network, metric = given.problem.task.network, given.problem.metric
    options = given.problem.options | {"targets": given.targets, "temperature": 1}
    return prune.staged(network, given.params, given.inputs, sparsity, metric=metric, **options)


METHODS: dict[str, Callable[[Given, float], prune.Pruned]] = {
    "magnitude": _magnitude,
    "optimal brain damage": _brain_damage,
    "EC": _elimination,
    "CBS": _combinatorial,
    "EC, staged": functools.partial(_staged, repair=None),
    "EC, staged, biases": functools.partial(_staged, repair="biases"),
    "EC, staged, survivors": functools.partial(_staged, repair="survivors"),
    "EC, staged, survivors, labels": _with_labels,
}


def main(config: Config) -> None:
    """Runs the experiment from data to figures."""
    report.require_flags(
        config,
        fractions=("sparsities", "surrogate_sparsities"),
        counts=("seeds", "calibration", "stages", "surrogate_epochs"),
        distinct=("networks",),
    )
    if config.quick:
        small = {"sparsities": (0.8, 0.95, 0.98), "surrogate_sparsities": (0.5, 0.8, 0.95)}
        config = replace(config, seeds=1, calibration=min(config.calibration, 2000), surrogate_epochs=60, **small)
    classifiers = set(config.networks) - {"surrogate"}
    data = choose.load_or_exit(config.data, config.data_dir) if classifiers else None
    name = data.name if data else "diffusion-sorption"
    folder = config.output or Path("results") / f"frontier-{name.lower()}"
    problems = [PROBLEMS[chosen](config, data) for chosen in config.networks]
    plan = [
        sweep.lines(unit, data=problem.task.data.name, layers=problem.name)
        for problem in problems
        for unit in sweep.plan_timed(config.seeds, METHODS, problem.sparsities)
    ]
    values = {column: float for problem in problems for column in (*problem.task.measures, "seconds")}
    facts = {"data": name, "data_sha256": runs.digest(data) if data else None, "output": folder}
    kept = [_kept(problem, config, **facts) for problem in problems]
    with runs.opened(folder, config, plan, values, **facts) as rows, report.progress() as bar:
        for problem, its_folder in zip(problems, kept, strict=True):
            here = {"total": rows.planned(layers=problem.name), "completed": rows.count(layers=problem.name)}
            step = bar.add_task(f"{problem.name}: training", **here)
            params = runs.trained(folder, problem.name, problem.activation, config.seeds, problem.train)
            for unit in _measured(problem, params, its_folder, functools.partial(rows.has, layers=problem.name)):
                rows.add(sweep.lines(unit, data=problem.task.data.name, layers=problem.name))
                description = f"{problem.name}: {unit[0].method}, {unit[0].sparsity:g}"
                bar.update(step, description=description, completed=rows.count(layers=problem.name))

    tables, panels = [], []
    for problem, its_folder in zip(problems, kept, strict=True):
        frame = rows.frame().query("layers == @problem.name")
        shown, where = _measures(problem), problem.task.data.name
        title = f"{where}, MLP {problem.name}, {config.seeds} seeds, no fine-tuning"
        tables.append(report.table(frame, shown | {"seconds": SECONDS}, title))
        tables += [its_folder.finish()] if its_folder else []
        column = next(iter(shown))
        panels.append(report.Panel(f"{where}, {problem.name}", frame, sweep.PRUNED, column, shown[column]))
    report.figure([panels], "", ACCURACY, f"pruned without fine-tuning, {config.seeds} seeds", folder / "frontier.png")
    console = report.console()
    for table in tables:
        console.print(table)
    console.print(f"results.csv, config.json and frontier.png are in {folder}/")


def _kept(problem: Problem, config: Config, **facts) -> saved.Folder | None:
    if config.save is None:
        return None
    return saved.Folder(config.save / problem.name, problem.activation, METHODS, problem.sparsities, config, **facts)


def _large(config: Config, data: Dataset) -> Problem:
    """784-300-100-10, trained by Adam at a constant rate, as the papers do."""
    epochs = 10 if data.name == "MNIST" else 60
    problem = _classifier((300, 100), optax.adam(1e-3), epochs, config, data)
    return problem._replace(gradients=500, options={"stages": config.stages})


def _modest(config: Config, data: Dataset) -> Problem:
    """784-40-20-10, trained by plain SGD to about 94 %."""
    epochs = 5 if data.name == "MNIST" else 100
    problem = _classifier((40, 20), optax.sgd(0.05), epochs, config, data)
    options = {"stages": 2 * config.stages, "products": 20, "temperature": 2}
    return problem._replace(calibration=6 * config.calibration, few=config.calibration, options=options)


def _classifier(widths: tuple[int, ...], optimizer, epochs: int, config: Config, data: Dataset) -> Problem:
    classes = int(data.train_targets.max()) + 1
    mlp = networks.MLP((*widths, classes), nn.relu)
    task = sweep.Task(networks.pure(mlp), data, cross_entropy, sweep.CLASSIFIER_MEASURES, 128)
    train = functools.partial(_train, task, mlp, optimizer, epochs, config)
    name = "-".join(map(str, (data.train_inputs.shape[1], *widths, classes)))
    return Problem(name, task, train, "fisher", config.sparsities, config.calibration, 2000, {})


def _surrogate(config: Config, _data: Dataset | None) -> Problem:
    """2-64-64-64-1 with tanh on the noise-free solution of diffusion-sorption."""
    solution = diffusion_sorption.load(noise=0.0, cells=256, times=101, initial_concentration=0.1)
    mlp = networks.MLP((64, 64, 64, 1), jnp.tanh)
    measures = {"test_error": _relative_error, "test_loss": lambda outputs, targets: ((outputs - targets) ** 2).mean()}
    task = sweep.Task(networks.pure(mlp), solution, optax.squared_error, measures, 256)
    optimizer = sweep.decaying_adam(task, 5e-3, config.surrogate_epochs)
    train = functools.partial(_train, task, mlp, optimizer, config.surrogate_epochs, config)
    options = {"stages": 2 * config.stages, "products": 30}
    sizes = config.surrogate_sparsities, config.calibration, 2000
    return Problem("2-64-64-64-1", task, train, "euclidean", *sizes, options, "tanh")


def _relative_error(outputs, targets):
    return jnp.linalg.norm(outputs - targets) / jnp.linalg.norm(targets)


PROBLEMS = {"large": _large, "modest": _modest, "surrogate": _surrogate}


def _train(task: sweep.Task, mlp: networks.MLP, optimizer, epochs: int, config: Config) -> Params:
    initial = jnp.asarray(task.data.train_inputs[:1])
    return sweep.train_seeds(
        task,
        lambda key: mlp.init(key, initial)["params"],
        config.seeds,
        optimizer=optimizer,
        epochs=epochs,
        advance=lambda _: None,
    )


def _measures(problem: Problem) -> dict[str, report.Measure]:
    """What the figure shows first, and what else is in the table."""
    if problem.metric == "fisher":
        return {"test_accuracy": ACCURACY, "test_loss": report.CLASSIFIER_MEASURES["test_loss"]}
    return {"test_error": ERROR, "test_loss": ERROR._replace(words="mean squared error")}


def _measured(
    problem: Problem, params: Params, kept: saved.Folder | None, done: Callable[..., bool]
) -> Iterator[list[sweep.Row]]:
    """The rows of the dense networks, then one for each seed, method and sparsity, with the seconds it took."""
    yield sweep.measure(problem.task, params, sweep.DENSE, 0.0, sweep.TRAINED)
    inputs = jnp.asarray(problem.task.data.train_inputs[: problem.calibration])
    targets = jnp.asarray(problem.task.data.train_targets[: problem.calibration])
    seeds = len(jax.tree.leaves(params)[0])

    def give(seed: int) -> Given:
        return Given(problem, jax.tree.map(lambda leaf: leaf[seed], params), inputs, targets)

    def both(**keys) -> bool:
        return done(**keys) and (kept is None or kept.has(**keys))

    for timed in sweep.time_methods(METHODS, give, problem.sparsities, seeds=seeds, done=both):
        if kept is not None:
            stacked = jax.tree.map(lambda leaf: leaf[None], timed.result.params)
            kept.add(timed.method, timed.sparsity, stacked, first_seed=timed.seed)
        yield [sweep.measure_timed(problem.task, timed.result.params, timed)]


if __name__ == "__main__":
    runs.command(Config, main, __doc__)
