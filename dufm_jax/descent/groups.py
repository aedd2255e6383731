r"""Gradient descent on one column for each group of samples that have come together.

The objective sees the samples of a class only through their columns of H_1. The gradient of sample
i is

  \nabla_{h_i} = \frac{1}{N} J(h_i)^T r(h_i) + \lambda_{H_1} h_i,

with the gradient r of the sample's loss by its outputs (the residual f(h) - y for squared error)
and the Jacobian J of the network, and does not ask how many samples there are in its place; the
gradient of W_l is the sum over samples. So if the samples form
groups g of n_g equal columns, they stay equal, and descent on all N columns is descent on one
column a group, whose contribution to the weights is counted n_g times: exactly, for all time. With
one group a class this is Eq. (1) with n = 1, decay n \lambda_{H_1} and rate lr / n on the features.
That needs three things, which `exactness` checks: the step is the gradient times the learning rate,
the nonlinearities act on each column alone, and the loss of a sample depends on its own column.

For samples that are close but not equal write h_i = \mu_g + \delta_i with \sum_i \delta_i = 0.
While the group shares one activation pattern, f is linear in h on it, f(h) = A h, and for squared
error

  \delta_i <- (I - lr (\lambda_{H_1} I + A^T A / N)) \delta_i,

so each deviation shrinks by at least the factor 1 - lr \lambda_{H_1} in a step (A^T A / N is far
below 2 / lr where descent is stable). Any other loss that is convex in the outputs has A^T R A with
its second derivative R in place of A^T A; where loss or network curve the other way deviations can
grow, which the looks at all samples (`phases`) would find. The means feel the deviations at second
order alone: the linear term of each sum over the group vanishes, and what is left, such as
\sum_i A \delta_i \delta_i^T, is |\delta|^2. Where a ReLU bends between the samples of a group the
error is of first order, in those samples and that unit alone. Finite steps make that happen where
a minimum lies on a kink, and scatter a group by about what one step moves, in float64 as in
float32; so deviations end not at 0 but at a level in proportion to the rate.

Hence the criterion: every sample is within the `reach` of lr \lambda_{H_1}, relative to
the size of the features, of the centre of its group: it is nearer than one step of the decay moves
it. The neglected term is the square, 4e-6 at the paper's setting, and
falls by e^2 every 1 / (lr \lambda_{H_1}) steps. Summed over time it displaces the parameters, in
directions in which the loss is flat, by no more than about (lr \lambda_{H_1})^2 / \lambda_{H_1};
tests find 1e-4 of 4e-4 on smooth models in float64, and losses that agree to 1e-8. With the ReLU
descent amplifies any difference, be it rounding: in float32 at the paper's setting, to change the
order of the samples changes H_1 by 0.5 to 8 percent after 2,000 steps and, of ten runs of 200,000
steps, where three end. No two programs agree on such a trajectory; with and without the reduction
all ten runs end at the same solution, with losses within 0.04 percent.

A sample that stays away from its class, such as one whose features died, is a group of its own; a
class that does not come together keeps the run on all its samples.

`descend` is `step.descend` with the groups given. It leaves the deviations as they are, so the
full state is at hand at every record, and descent on all samples can take over again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from dufm_jax import dufm, linalg, nonlinearities
from dufm_jax.descent import state as states
from dufm_jax.descent.state import State
from dufm_jax.descent.step import Measure
from dufm_jax.problem import Decay, DecayLike, Params, Problem

_GROUPS_PER_CLASS = 3  # At most, and 2 K in all: beyond, the samples have not come together.
_LANES = 16  # Products in whole vectors are faster.


# --- Which samples have come together ----------------------------------------------------------


def reach(problem: Problem, features_rate: ArrayLike) -> Any:
    r"""Returns how far from the centre of its group a sample may be, as `find_groups` takes it.

    It is lr \lambda_{H_1}, and half of that where a nonlinearity is not known to act entry by
    entry, since its kinks may lie anywhere.

    Args:
      problem: Its nonlinearities.
      features_rate: lr \lambda_{H_1}.
    """
    known = all(map(nonlinearities.is_elementwise, problem.nonlinearities))
    return features_rate if known else features_rate / 2


def find_groups(
    features: Float[Array, "d N"], problem: Problem, reach: ArrayLike
) -> tuple[Int[Array, " N"], Int[Array, ""]]:
    """Finds groups of samples of one class that have come together.

    The first group of a class is around the median of its samples, coordinate by coordinate, and
    each further one around the first sample left.

    Args:
      features: H_1, [d_1, N], class by class.
      problem: The class counts.
      reach: The largest distance of a sample from the centre of its group, in units of the
        root mean square norm of a column of H_1.

    Returns:
      The group of each sample, [N], numbered from 0 class by class, and the number of groups; or
      0 as the number, where more than 2 K groups, or 3 of one class, or one for each sample would
      be needed.
    """
    num_classes, counts = problem.num_classes, np.array(problem.class_counts)
    place = np.arange(counts.max())
    exists = place < counts[:, None]  # [K, n]; classes of fewer samples are filled up.
    first_of_class = np.cumsum(counts) - counts
    members = first_of_class[:, None] + np.minimum(place, counts[:, None] - 1)
    samples = features[:, members]  # [d, K, n]
    distance = (reach * jnp.sqrt(jnp.mean(jnp.sum(features**2, axis=0)))).astype(features.dtype)
    free = jnp.asarray(exists)
    level = jnp.zeros(exists.shape, jnp.int32)
    used = []
    for index in range(_GROUPS_PER_CLASS):
        if index == 0:
            centre = _medians(samples, exists, counts)
        else:
            first = jnp.argmax(free, axis=1)[None, :, None]
            centre = jnp.take_along_axis(samples, first, axis=2)
        near = free & (jnp.linalg.norm(samples - centre, axis=0) <= distance)
        level = jnp.where(near, index, level)
        free = free & ~near
        used.append(jnp.any(near, axis=1))
    numbers = jnp.cumsum(jnp.stack(used, axis=1).ravel()).astype(jnp.int32) - 1
    groups = jnp.take_along_axis(numbers.reshape(num_classes, -1), level, axis=1)[exists]
    count = numbers[-1] + 1
    fewer = (count <= 2 * num_classes) & (count < problem.num_samples)
    found = ~jnp.any(free) & fewer & jnp.isfinite(distance)
    return groups, jnp.where(found, count, 0)


def _medians(
    samples: Float[Array, "d K n"], exists: np.ndarray, counts: np.ndarray
) -> Float[Array, "d K 1"]:
    """The median of each class's samples, coordinate by coordinate."""
    ordered = jnp.sort(jnp.where(exists, samples, jnp.inf), axis=2)
    low, high = (
        jnp.take_along_axis(ordered, middle[None, :, None], axis=2)
        for middle in ((counts - 1) // 2, counts // 2)
    )
    return low / 2 + high / 2


# --- Descent on groups -------------------------------------------------------------------------


@jax.custom_vjp
def _product(rows: Array, weight: Array, counts: Array) -> Array:
    """rows @ weight, in whose gradient by the weight each row counts as many samples."""
    del counts
    return rows @ weight


def _product_forward(rows: Array, weight: Array, counts: Array) -> tuple[Array, tuple]:
    return rows @ weight, (rows, weight, counts)


def _product_backward(saved: tuple, gradient: Array) -> tuple[Array, Array, None]:
    rows, weight, counts = saved
    return gradient @ weight.T, rows.T @ (counts * gradient), None


_product.defvjp(_product_forward, _product_backward)


def _on_rows(apply: nonlinearities.Nonlinearity) -> nonlinearities.Nonlinearity:
    """The nonlinearity for arrays whose rows are samples."""
    if nonlinearities.is_elementwise(apply):
        return apply
    return jax.vmap(lambda row: apply(row[:, None])[:, 0])


@linalg.full_precision
def descend(
    state: State,
    decay: DecayLike,
    learning_rate: ArrayLike,
    groups: Int[Array, " N"],
    *,
    num_groups: int,
    problem: Problem,
    num_records: int,
    record_every: int,
    measure: Measure,
) -> tuple[State, Any]:
    """Makes steps of plain gradient descent with one column a group; else as `step.descend`.

    Every sample moves with the mean of its group. Divergence is noticed at the records.

    Args:
      state: Where to go on.
      decay: The regularisation strengths.
      learning_rate: The step size.
      groups: The group of each sample, [N].
      num_groups: G, above all of `groups`; the cost of a step is in proportion.
      problem: What is minimised, with all samples; `exactness.obstacle` must find nothing.
      num_records: How many points to record, at least 1.
      record_every: The steps before each of them, at least 1.
      measure: As for `step.descend`; of all samples, whose deviations from their groups stay.

    Returns:
      The state after the last step, of all samples, and what `measure` returned, stacked along a
      leading axis [num_records].
    """
    dtype = state.params.features.dtype
    strengths = Decay.of(decay, problem.depth).astype(dtype)
    member = jax.nn.one_hot(groups, num_groups, dtype=dtype)  # [N, G]
    counts = jnp.sum(member, axis=0)[:, None]  # [G, 1]
    average = member / jnp.maximum(counts, 1).T  # [N, G]
    # A group without samples counts nothing, but must not be where a function has no derivative.
    average = jnp.where(counts.T > 0, average, average[:, :1])
    targets = average.T @ dufm.targets(problem, dtype).T  # [G, K]
    step = _make_step(problem, strengths, jnp.asarray(learning_rate, dtype), counts, targets)
    spare = _spare_units(problem)

    def record(state: State, _: None) -> tuple[State, Any]:
        features, weights = state.params
        centre = features[:, :1]  # Means of differences, which are exact where samples are equal.
        means = average.T @ (features - centre).T + centre.T  # [G, d_1]
        moved, weights_then = jax.lax.fori_loop(
            0, record_every, step, _as_rows(means, weights, spare)
        )
        moves = moved[:, : features.shape[0]] - means
        params = Params(
            features + (member @ moves).T,
            tuple(
                weight[:inputs, :outputs].T
                for weight, (outputs, inputs) in zip(
                    weights_then, problem.weight_shapes, strict=True
                )
            ),
        )
        reached = state._replace(params=params, step=state.step + record_every)
        loss = dufm.objective(params, problem, strengths)
        return states.mark_divergence(reached, loss), measure(params, strengths)

    return jax.lax.scan(record, state, None, length=num_records)


# Features as rows, [G, d_1], and weights [in, out]: the products of XLA:CPU want it so.
_Rows = tuple[Array, list[Array]]


def _make_step(
    problem: Problem,
    decay: Decay,
    learning_rate: Array,
    counts: Float[Array, "G 1"],
    targets: Float[Array, "G K"],
) -> Callable[[Any, _Rows], _Rows]:
    """One step of descent on one row a group, for a loop."""

    def outputs(features: Array, weights: list[Array]) -> Array:
        rows = features
        for weight, apply in zip(weights[:-1], problem.nonlinearities, strict=True):
            rows = _on_rows(apply)(_product(rows, weight, counts))
        return _product(rows, weights[-1], counts)

    def losses_of(values: Array) -> Array:
        def of_one(value: Array, target: Array) -> Array:
            return problem.loss(value[:, None], target[:, None])[0]

        return jax.vmap(of_one)(values, targets)

    def step(_: Any, rows: _Rows) -> _Rows:
        features, weights = rows
        values, pull_back = jax.vjp(outputs, features, weights)
        found, pull_back_loss = jax.vjp(losses_of, values)
        (gradient,) = pull_back_loss(jnp.ones_like(found))
        slope, slopes = pull_back(gradient / problem.num_samples)
        return features - learning_rate * (slope + decay.features * features), [
            weight - learning_rate * (own + decay.weights[index] * weight)
            for index, (weight, own) in enumerate(zip(weights, slopes, strict=True))
        ]

    return step


def _as_rows(means: Float[Array, "G d"], weights: tuple[Array, ...], spare: list[int]) -> _Rows:
    """The means and weights as a step has them, with spare units of value 0."""
    return jnp.pad(means, ((0, 0), (0, spare[0]))), [
        jnp.pad(weight.T, ((0, before), (0, after)))
        for weight, before, after in zip(weights, spare[:-1], spare[1:], strict=True)
    ]


def _spare_units(problem: Problem) -> list[int]:
    """The units of value 0 that make layers 1, ..., L and the outputs as wide as whole vectors.

    Only where all nonlinearities act entry by entry and 0 stays 0.
    """
    stays = all(
        nonlinearities.is_elementwise(apply)
        and not nonlinearities.eagerly(lambda apply=apply: apply(jnp.zeros((1, 1)))).any()
        for apply in set(problem.nonlinearities)
    )
    lanes = _LANES if stays else 1
    return [-width % lanes for width in problem.widths] + [0]
