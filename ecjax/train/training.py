"""Supervised training with any optax optimiser, and fine-tuning that keeps pruned weights at zero."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float, Int, PRNGKeyArray

from ecjax import _checks, _door, _progress, _trees
from ecjax._types import Inputs, Kernels, Loss, Network, Params, Targets
from ecjax.graph.convolutions import in_loops
from ecjax.graph.gone import of_removed_units


class State(NamedTuple):
    """Where training stands: the params, the optimiser's state and the key the next epoch is shuffled with.

    Example:
        >>> train.State(params, optimizer.init(params), jax.random.key(0)).params is params
        True
    """

    params: Params
    optimizer: optax.OptState
    key: PRNGKeyArray


class Epoch(NamedTuple):
    """What a progress callback is told after each epoch.

    Attributes:
        number: of the epoch, from 1.
        epochs: how many there are.
        loss: the mean training loss of the epoch.

    Example:
        >>> tell = lambda epoch: print(f"{epoch.number} of {epoch.epochs}")
        >>> trained = train.fit(network, params, inputs, labels, epochs=2, progress=tell, **fit)
        1 of 2
        2 of 2
    """

    number: int
    epochs: int
    loss: Array


class Trained(NamedTuple):
    """The trained params, and the mean training loss of each epoch.

    Example:
        >>> trained.losses.shape, bool(trained.losses[-1] < trained.losses[0])
        ((200,), True)
    """

    params: Params
    losses: Float[Array, " epochs"]


def keep_pruned(masks: Kernels) -> optax.GradientTransformation:
    """An optax transformation that sets pruned weights to exactly zero, whatever the optimiser wants.

    Put it last: ``optax.chain(optax.adamw(1e-3), train.keep_pruned(masks))``. The update of a removed weight becomes
    minus the weight itself, so momentum and weight decay that were computed before it have no say.

    Args:
        masks: Kernels of booleans, True where the weight stays.

    Raises:
        ValueError: masks that are not boolean; or the transformation is asked for an update without the params.

    Example:
        >>> tuning = optax.chain(optax.sgd(0.1), train.keep_pruned(pruned.masks))
        >>> updates, _ = tuning.update(params, tuning.init(pruned.params), pruned.params)  # any gradients
        >>> tuned = optax.apply_updates(pruned.params, updates)
        >>> bool(((tuned["Dense_0"]["kernel"] != 0) == pruned.masks["Dense_0"]["kernel"]).all())
        True
    """
    _checks.require_boolean(masks)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("keep_pruned needs the params: call optimizer.update(gradients, state, params)")
        kept, weights, moves = map(_trees.by_path, (masks, params, updates))
        held = {path: jnp.where(mask, moves[path], -weights[path]) for path, mask in kept.items()}
        return _trees.replace(updates, held), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def start(params: Params, optimizer: optax.GradientTransformation, key: PRNGKeyArray) -> State:
    """The state before the first epoch.

    Args:
        params: where to start.
        optimizer: any optax transformation; its own state starts from the params.
        key: shuffles the samples.

    Example:
        >>> state = train.start(params, optimizer, jax.random.key(0))
        >>> state.params is params
        True
    """
    return State(params, optimizer.init(params), key)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """How many batches one epoch takes: the last, incomplete one is left out, other samples each time.

    Example:
        >>> train.steps_per_epoch(samples=200, batch_size=64)
        3
    """
    return max(samples // batch_size, 1)


@functools.partial(jax.jit, static_argnames=("network", "loss", "optimizer", "batch_size"))
def epoch(
    network: Network,
    state: State,
    inputs: Inputs,
    targets: Targets,
    loss: Loss,
    *,
    optimizer: optax.GradientTransformation,
    batch_size: int = 128,
    masks: Kernels | None = None,
) -> tuple[State, Float[Array, ""]]:
    """One pass over the shuffled samples; returns the new state and the mean loss of the epoch.

    The arguments are those of ``fit``, with the state in place of params and key. Nothing is checked here.

    Example:
        >>> state = train.start(params, optimizer, jax.random.key(0))
        >>> state, mean_loss = train.epoch(network, state, inputs, labels, loss, optimizer=optimizer)
        >>> mean_loss.shape
        ()
    """
    key, order = shuffled(state.key, inputs.shape[0], batch_size)

    def step(carry, batch):
        params, of_optimizer = carry
        return one_step(network, params, of_optimizer, inputs[batch], targets[batch], loss, optimizer, masks)

    (params, optimizer_state), losses = lax.scan(step, (state.params, state.optimizer), order)
    return State(params, optimizer_state, key), losses.mean()


def shuffled(key: PRNGKeyArray, samples: int, batch_size: int) -> tuple[PRNGKeyArray, Int[Array, "steps batch"]]:
    """The key of the next epoch, and which samples each step of this one takes."""
    size = min(batch_size, samples)
    key, shuffle = jax.random.split(key)
    return key, jax.random.permutation(shuffle, samples)[: steps_per_epoch(samples, size) * size].reshape(-1, size)


def one_step(network, params, optimizer_state, inputs, targets, loss, optimizer, masks):
    """One step of the optimiser: the new params and state of it, and the mean loss before."""
    network = in_loops(network)
    value, gradients = jax.value_and_grad(lambda params: loss(network(params, inputs), targets).mean())(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    if masks is not None:
        updates, _ = keep_pruned(masks).update(updates, optax.EmptyState(), params)
    return (optax.apply_updates(params, updates), optimizer_state), value


def fit(
    network: Network,
    params: Params,
    inputs: Inputs,
    targets: Targets,
    loss: Loss,
    *,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    epochs: int,
    batch_size: int = 128,
    masks: Kernels | None = None,
    progress: bool | Callable[[Epoch], None] | None = None,
) -> Trained:
    """Trains a network, or fine-tunes a pruned one.

    Several seeds at once are one vmapped call: ``jax.vmap(lambda params, key: train.fit(network, params, ...))``.

    Args:
        params: where to start.
        targets: one for each sample: class labels, or values to regress on.
        loss: ``(outputs, targets) -> losses``, as optax's; its mean over a batch is minimised.
        optimizer: any optax transformation; compiled once for each object, so make it once.
        key: shuffles the samples anew each epoch.
        epochs: passes over the samples.
        batch_size: samples a step.
        masks: Kernels of booleans; weights where a mask is False stay exactly zero (``keep_pruned``), and with the last
            weights of a removed unit its biases and scales, as ``prune.neurons`` leaves them.
        progress: True for a bar, as for ``prune.staged``; or a function called after each epoch. The epochs are then
            compiled one by one, not all as one loop.

    Raises:
        ValueError: bad inputs, not one target for each sample, epochs or batch size below 1, masks unlike the params.

    Example:
        >>> tuned = train.fit(network, pruned.params, inputs, labels, epochs=3, masks=pruned.masks, **fit).params
        >>> bool(((tuned["Dense_0"]["kernel"] != 0) == pruned.masks["Dense_0"]["kernel"]).all())
        True
    """
    _checks.require_inputs(inputs)
    _checks.require_targets(inputs, targets)
    _checks.require_key(key)
    _checks.require_positive(epochs, "epochs")
    _checks.require_positive(batch_size, "batch_size")
    _progress.require(progress)
    if masks is not None:
        _checks.require_masks(params, masks)

    network, params, static = _trees.split(network, params)
    masks = None if masks is None else _with_units(network, params, inputs, masks)
    options = {"loss": loss, "optimizer": optimizer, "batch_size": int(batch_size)}
    given = inputs, targets, masks, int(epochs)
    state = start(params, optimizer, key)
    if progress:
        state, losses = _shown(network, state, *given, progress, **options)
    else:
        state, losses = _epochs(network, state, *given, **options)
    return Trained(_trees.whole(state.params, static), losses)


def _with_units(network: Network, params: Params, inputs: Inputs, masks: Kernels) -> Kernels:
    """The masks, and more of them: False for what is zero in other leaves because its unit was removed."""
    try:
        groups = _door.units(network, params, inputs)
    except ValueError:  # of a network that can't be read no units were removed
        return masks
    kept = _trees.by_path(masks)
    zeros = of_removed_units(groups, _trees.by_path(params), kept)
    return _trees.as_kernels(params, kept | {path: ~entries for path, entries in zeros.items()})


def _shown(network, state, inputs, targets, masks, epochs, progress, *, loss, **options):
    """All epochs one by one, and their losses, which are told."""
    losses = []
    with _progress.told(progress, "epoch", epochs, ("loss",)) as tell:
        for number in range(1, epochs + 1):
            state, value = epoch(network, state, inputs, targets, loss, masks=masks, **options)
            losses.append(jax.block_until_ready(value))
            tell(Epoch(number, epochs, value))
    return state, jnp.stack(losses)


@functools.partial(jax.jit, static_argnames=("network", "loss", "optimizer", "epochs", "batch_size"))
def _epochs(network, state, inputs, targets, masks, epochs, *, loss, optimizer, batch_size):
    def one_epoch(state, _):
        options = {"optimizer": optimizer, "batch_size": batch_size, "masks": masks}
        return epoch(network, state, inputs, targets, loss, **options)

    return lax.scan(one_epoch, state, length=epochs)
