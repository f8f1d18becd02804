"""The diffusion-sorption equation of PDEBench in 1-D, solved with Diffrax, and its solution as a data set.

``∂u/∂t = D / R(u) · ∂²u/∂x²`` on x in (0, 1), t in (0, 500], with the retardation factor

    R(u) = 1 + (1 − φ)/φ · ρ_s · k · n_f · (u + 1e-6)^(n_f − 1)

u(0, t) = 1, u(1, t) = D ∂u/∂x(1, t), and u(x, 0) constant in [0, 0.2]. Source: Takamoto et al., "PDEBench",
arXiv:2210.07182, whose discretisation this is: N cells with centres at (i + ½)/N, second differences, and ghost cells.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import Dataset

DIFFUSION, POROSITY, BULK_DENSITY = 5e-4, 0.29, 2880.0
FREUNDLICH_K, FREUNDLICH_EXPONENT = 3.5e-4, 0.874
LAST_TIME = 500.0


def load(*, noise: float, cells: int, times: int, initial_concentration: float, seed: int = 0) -> Dataset:
    """Points (x, t), evenly spaced, scaled to [0, 1]: 80 % with u + U(−noise, noise) to train on, the others with u."""
    places, instants, exact = grid(cells, times, initial_concentration)
    x, t = np.meshgrid(places, instants / LAST_TIME)
    inputs = np.stack([x, t], -1).reshape(-1, 2).astype(np.float32)
    targets = exact.reshape(-1, 1).astype(np.float32)
    generator = np.random.default_rng(seed)
    train, test = np.split(generator.permutation(len(inputs)), [round(0.8 * len(inputs))])
    error = generator.uniform(-noise, noise, (len(train), 1)).astype(np.float32)
    return Dataset("diffusion-sorption", inputs[train], targets[train] + error, inputs[test], targets[test])


def grid(cells: int, times: int, initial_concentration: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centres of the cells, so many times up to 500, and u there, of shape (times, cells).

    It is solved by an implicit solver in double precision, whatever the caller's setting.
    """
    if cells < 2 or times < 1 or not 0 <= initial_concentration <= 0.2:
        given = f"cells={cells}, times={times}, initial_concentration={initial_concentration}"
        raise ValueError(f"{given}: give at least 2 cells, one time, and 0 to 0.2 at first")
    instants = np.linspace(0, LAST_TIME, times + 1)[1:]
    with jax.enable_x64(True):
        u = np.asarray(_solve(jnp.asarray(instants), jnp.full(cells, float(initial_concentration))))
    return (np.arange(cells) + 0.5) / cells, instants, u


def time_derivative(_time, concentration, _):
    """``∂u/∂t`` of the cells, with 1 in the left ghost cell and ``D (u_{N−1} − u_N)/Δx`` in the right one."""
    width = 1 / concentration.shape[0]
    right = DIFFUSION * (concentration[-2] - concentration[-1]) / width
    padded = jnp.concatenate([jnp.ones_like(concentration[:1]), concentration, right[None]])
    second_difference = (padded[:-2] - 2 * padded[1:-1] + padded[2:]) / width**2
    sorption = (1 - POROSITY) / POROSITY * BULK_DENSITY * FREUNDLICH_K * FREUNDLICH_EXPONENT
    retardation = 1 + sorption * (concentration + 1e-6) ** (FREUNDLICH_EXPONENT - 1)
    return DIFFUSION / retardation * second_difference


@jax.jit
def _solve(times, start):
    term, solver, saved = diffrax.ODETerm(time_derivative), diffrax.Kvaerno5(), diffrax.SaveAt(ts=times)
    options = {"stepsize_controller": diffrax.PIDController(rtol=1e-8, atol=1e-10), "max_steps": 100_000}
    return diffrax.diffeqsolve(term, solver, 0.0, LAST_TIME, 1e-4, start, saveat=saved, **options).ys
